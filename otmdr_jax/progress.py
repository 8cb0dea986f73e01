"""Progress of long work: a bar on a terminal, lines in a log."""

import sys
import time
from typing import Any

# Where nobody sees a bar (a log file, a notebook), one line each so many seconds.
SECONDS_A_LINE = 10.0


class Progress:
    """Shows steps done, their rate, the time left and a few numbers.

    Uses rich's bar on a terminal where rich is installed, lines on stderr elsewhere.

    Args:
      total: Steps in all.
      done: Steps that were done before.
      title: What is going on.
      enabled: False for silence.
    """

    def __init__(self, total: int, done: int, title: str, enabled: bool = True):
        """Starts the clock."""
        self.total, self.start, self.title = total, done, title
        self._enabled = enabled
        self._began = self._said = time.monotonic()
        self._bar = _rich_bar(total, done, title) if enabled else None

    def update(self, step: int, numbers: dict[str, float]) -> None:
        """Shows that `step` steps are done."""
        if not self._enabled:
            return
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=step, numbers=text)
            return
        now = time.monotonic()
        if now - self._said < SECONDS_A_LINE and step < self.total:
            return
        self._said = now
        rate = (step - self.start) / max(now - self._began, 1e-9)
        left = (self.total - step) / rate if rate > 0 else float("inf")
        print(
            f"{self.title}: step {step}/{self.total}, {rate:.3g} steps/s, "
            f"{_clock(left)} left  {text}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        """Returns itself."""
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar[0].stop()


def _rich_bar(total, done, title):
    try:
        from rich import progress
    except ImportError:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return None

    class Rate(progress.ProgressColumn):
        def render(self, task):
            return f"{task.speed:.3g} steps/s" if task.speed else ""

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        Rate(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[numbers]}"),
        console=console,
    )
    bar.start()
    return bar, bar.add_task(title, total=total, completed=done, numbers="")


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    )
