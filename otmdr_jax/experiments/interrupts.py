"""Ctrl-C and SIGTERM: the first asks a run to save and stop, the next acts as ever."""

import signal
import threading
from collections.abc import Callable
from typing import Any


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and saved its state.

    Attributes:
      signum: The signal.
    """

    def __init__(self, message: str, signum: int):
        """Keeps the signal for the exit status."""
        super().__init__(message)
        self.signum = signum


class Requests:
    """Turns SIGTERM and the first Ctrl-C into a request, while it is entered."""

    def __init__(self, request: Callable[[int], None]):
        """Keeps what to call with the signal's number."""
        self._request = request
        self._old: dict[int, Any] = {}

    def __enter__(self):
        """Listens."""
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum, frame):
        del frame
        self._restore()
        self._request(signum)

    def _restore(self):
        for signum, old in self._old.items():
            signal.signal(signum, old)
        self._old = {}

    def __exit__(self, *exc_info):
        """Puts back the handlers that were there."""
        self._restore()
