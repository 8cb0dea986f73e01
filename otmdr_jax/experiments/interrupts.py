"""Ctrl-C and SIGTERM: the first asks a run to save and stop, the second ends it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and saved its state.

    Attributes:
      signum: The signal.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def requests(request: Callable[[int], None]) -> Iterator[None]:
    """Turns SIGTERM and the first Ctrl-C into a request, while it is entered.

    Args:
      request: A function that is called with the signal's number.
    """
    old: dict[int, Any] = {}

    def restore():
        for signum, handler in old.items():
            signal.signal(signum, handler)
        old.clear()

    def handle(signum, frame):
        del frame
        restore()
        request(signum)

    # Python lets the main thread alone set handlers.
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            old[signum] = signal.signal(signum, handle)
    try:
        yield
    finally:
        restore()
