"""Ctrl-C and SIGTERM: the first asks a run to save and stop, the second ends it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# A signal that came before a run listened.
_early: list[int] = []


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and saved its state.

    Attributes:
      signum: The signal.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Remembers a Ctrl-C until a run listens, which then stops after its first step.

    It raises KeyboardInterrupt, as ever. But Python prints and ignores an exception
    that comes while it runs a callback, as those of imports, and imports take seconds.
    """
    mine = threading.current_thread() is threading.main_thread()
    # `nohup` and shells' background jobs ignore the signal.
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(signum, frame):
        remember(signum)
        signal.default_int_handler(signum, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _early.clear()


def remember(signum: int) -> None:
    """Remembers a signal that came before a run listened."""
    _early.append(signum)


def came_early() -> bool:
    """Whether there was a Ctrl-C that no run has heard of."""
    return bool(_early)


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
        if _early:
            handle(_early.pop(), None)
    try:
        yield
    finally:
        restore()
