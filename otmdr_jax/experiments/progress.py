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
        """Starts the clock."""
        self.total, self.start, self.title = total, done, title
        self._enabled, self._unit = enabled, unit
        self._began = self._said = time.monotonic()
        self._bar = _rich_bar(total, done, title, unit) if enabled else None

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
        last = step == self.total and self._unit == "steps"
        if now - self._said < SECONDS_A_LINE and not last:
            return
        self._said = now
        rate = (step - self.start) / max(now - self._began, 1e-9)
        left = (self.total - step) / rate if rate > 0 else float("inf")
        print(
            f"{self.title}: {step}/{self.total} {self._unit}, "
            f"{rate:.3g} {self._unit}/s, "
            f"{_clock(left)} left  {text}",
            file=sys.stderr,
            flush=True,
        )

    def say(self, text: str) -> None:
        """Tells what is going on where no step is being counted."""
        if self._bar is not None:
            self._bar[0].console.print(f"{self.title}: {text}")
        elif self._enabled:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def restart(self, step: int) -> None:
        """Starts the clock anew: what came before, compilation, is no rate."""
        self.start, self._began = step, time.monotonic()
        if self._bar is not None:
            bar, task = self._bar
            bar.reset(task, completed=step)

    def __enter__(self) -> "Progress":
        """Returns itself."""
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar[0].stop()


def _rich_bar(total, done, title, unit):
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
            return f"{task.speed:.3g} {unit}/s" if task.speed else ""

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
