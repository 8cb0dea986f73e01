"""The events of a run for TensorBoard, where tensorboardX is installed.

They are a copy of those in metrics.jsonl: what goes wrong here stops no run.
"""

import importlib
import pathlib
import sys
import warnings
from typing import Any

# Room for events: for more than one record has, so that `log` never waits for the
# thread that writes them.
_QUEUE = 10_000


class Board:
    """TensorBoard's file in a run's folder; nothing without tensorboardX."""

    def __init__(self, path: pathlib.Path, step: int):
        """Opens a file, to go on after `step`."""
        self._path = path
        self._writer: Any = None
        try:
            writer = _tensorboardx().SummaryWriter
        except ImportError:
            return
        # purge_step hides what a resumed run will log again.
        purge = step + 1 if step else None
        self._writer = writer(str(path), purge_step=purge, max_queue=_QUEUE)

    def log(self, record: dict[str, Any]) -> None:
        """Adds the numbers of an event."""
        if self._writer is not None and not self._writes():
            self._leave()
        if self._writer is not None:
            for name, value in _scalars(record).items():
                tag = f"{record['split']}/{name}"
                self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Writes what is left, and closes the file."""
        if self._writer is None:
            return
        try:
            if self._writes():
                self._writer.close()
                return
        except OSError:  # a full disk: it keeps events for two minutes
            pass
        self._leave()

    def _writes(self):
        """Whether the thread that writes the file still does.

        It ends where the disk is full. Who puts an event into its full queue, or leaves
        the process before the queue is empty, would then wait for ever.
        """
        return self._writer.file_writer.event_writer._worker.is_alive()

    def _leave(self):
        events = self._writer.file_writer.event_writer
        events._event_queue.cancel_join_thread()
        events._closed = True  # or it tries again as the process ends
        self._writer = None
        warnings.warn(
            f"TensorBoard's file cannot be written into {self._path}: it is left out "
            "from here. metrics.jsonl has the same numbers.",
            stacklevel=4,
        )


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an event by name: those of members and of layers too."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if name in ("step", "epoch", "split"):
            continue
        if name == "members":
            for number, of_members in value.items():
                found |= {f"{number}/member{i}": x for i, x in enumerate(of_members)}
        elif isinstance(value, dict):
            found |= {f"{name}/{layer}": x for layer, x in value.items()}
        elif not isinstance(value, list):  # a histogram
            found[name] = value
    return found


def _tensorboardx():
    """Imports tensorboardX, without PyTorch, which it imports where it is installed.

    That takes two seconds, for tensors of PyTorch, which no run logs.
    """
    if "torch" in sys.modules:
        return importlib.import_module("tensorboardX")
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]
