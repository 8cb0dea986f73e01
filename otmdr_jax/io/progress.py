"""Progress of long work: a bar on a terminal, lines in a log."""

import contextlib
import datetime
import sys
import time
from typing import Any

# Where nobody sees a bar (a log file, a notebook), one line each so many seconds.
SECONDS_A_LINE = 10.0


class Progress(contextlib.AbstractContextManager):
    """Shows the steps that are done, their rate, the time left and a few numbers.

    Uses rich's bar on a terminal where rich is installed, lines on stderr elsewhere.

    Args:
      total: Steps in all.
      done: Steps that were done before.
      title: What is going on.
      enabled: False for silence.
      unit: What is counted.
    """

    def __init__(
        self,
        total: int,
        done: int,
        title: str,
        enabled: bool = True,
        unit: str = "steps",
    ):
        self.total, self.start, self.title = total, done, title
        self._enabled, self._unit = enabled, unit
        self._began = self._said = time.monotonic()
        self._bar = _rich_bar(total, done, title) if enabled else None

    def update(self, step: int, numbers: dict[str, float] | None = None) -> None:
        """Shows that `step` steps are done."""
        if not self._enabled:
            return
        now = time.monotonic()
        rate = (step - self.start) / max(now - self._began, 1e-9)
        shown = [f"{rate:.3g} {self._unit}/s"] if rate > 0 else []
        shown += [f"{name} {value:.4g}" for name, value in (numbers or {}).items()]
        if self._bar is not None:
            text = "  ".join(shown)
            self._bar.update(self._bar.task_ids[0], completed=step, text=text)
            return
        last = step == self.total and self._unit == "steps"
        if now - self._said < SECONDS_A_LINE and not last:
            return
        self._said = now
        if rate > 0:
            seconds = round((self.total - step) / rate)
            shown.insert(1, f"{datetime.timedelta(seconds=seconds)} left")
        self.say(", ".join([f"{step}/{self.total} {self._unit}", *shown]))

    def say(self, text: str) -> None:
        """Tells what is going on where no step is being counted."""
        if self._bar is not None:
            self._bar.console.print(f"{self.title}: {text}", markup=False)
        elif self._enabled:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def restart(self, step: int) -> None:
        """Starts the clock anew: what came before, compilation, is no rate."""
        self.start, self._began = step, time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], completed=step)

    def __exit__(self, *exc_info: Any) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()


def _rich_bar(total: int, done: int, title: str) -> Any:
    """A started `rich.progress.Progress` of one task; None where nobody sees a bar."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),  # [names] are names
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[text]}", markup=False),
        console=console,
    )
    bar.start()
    bar.add_task(title, total=total, completed=done, text="")
    return bar
