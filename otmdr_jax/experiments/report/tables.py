"""Tables for a page or a terminal, and the format of numbers in their columns."""

import math
import re
from typing import Any, NamedTuple

# Texts that count as numbers, also in bold, with a sign, or "-" for an unknown one.
_NUMBER = re.compile(r"[*+<≥ -]*\d|-$")


class Table(NamedTuple):
    """Headings and lines of text, for a page or a terminal.

    Attributes:
      header: Headings of the columns.
      lines: Lines with a text for each column; text between ** is bold.
    """

    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """Returns the table as Markdown, with numbers aligned to the right."""
        columns = list(zip(*self.lines, strict=True)) or [()] * len(self.header)
        rule = [
            "--:" if i and any(map(_NUMBER.match, column)) else ":--"
            for i, column in enumerate(columns)
        ]
        return "\n".join(
            f"| {' | '.join(map(_in_a_cell, line))} |"
            for line in (self.header, rule, *self.lines)
        )

    def print(self, title: str = "", console: Any = None) -> None:
        """Prints the table with rich, or as Markdown if rich is not installed.

        Args:
          title: Line above the table.
          console: `rich.console.Console` to print on. Default: standard output.
        """
        try:
            from rich.table import Table as RichTable
            from rich.text import Text
        except ImportError:
            print(*filter(None, [title, self.markdown()]), sep="\n")
            return
        shown = RichTable(title=Text(title) if title else None)
        for i, name in enumerate(self.header):
            shown.add_column(Text(name), justify="right" if i else "left")
        for line in self.lines:
            bold = [x.startswith("**") and x.endswith("**") for x in line]
            shown.add_row(
                *(
                    Text(x[2:-2], "bold green") if best else Text(x)
                    for x, best in zip(line, bold, strict=True)
                )
            )
        (console or _wide_console(shown)).print(shown)


def _wide_console(table: Any) -> Any:
    """Makes a console on standard output that is wide enough for a file or pipe."""
    from rich.console import Console, Measurement

    console = Console()
    if console.is_terminal:
        return console
    # A file or pipe has no window that could be too narrow.
    wide = console.options.update(width=10_000)
    needed = Measurement.get(console, wide, table).maximum
    return Console(width=max(console.width, needed))


def _in_a_cell(text: str) -> str:
    """Escapes text, so that it stays in its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


class Column(NamedTuple):
    """The format of a number of result.json.

    Attributes:
      name: Key in result.json.
      title: Heading of the column.
      meaning: Sentence for the report.
      better: Direction, "higher" or "lower"; None marks no best value.
      scale: Factor from the number to its text.
      decimals: Digits after the point.
    """

    name: str
    title: str
    meaning: str = ""
    better: str | None = None
    scale: float = 1.0
    decimals: int = 4

    def text(self, value: float | None, sign: str = "") -> str:
        """Formats a number; "-" for None and NaN. With sign="+" it shows plus signs."""
        if value is None or math.isnan(value):
            return "-"
        shown = round(value * self.scale, self.decimals) + 0.0  # no -0.0
        return f"{shown:{sign}.{self.decimals}f}"


DEFAULT_COLUMNS = (
    Column(
        "accuracy",
        "Accuracy (%) ↑",
        "share of the test set whose most probable class is the label",
        "higher",
        scale=100.0,
        decimals=2,
    ),
    Column(
        "nll",
        "NLL ↓",
        "negative log-likelihood of the test labels, in nats per example",
        "lower",
    ),
    Column(
        "ece",
        "ECE ↓",
        "expected calibration error: the mean distance between confidence and accuracy "
        "over bins of confidence, 0 to 1",
        "lower",
    ),
    Column(
        "brier",
        "Brier ↓",
        "squared distance between the probabilities and the label, summed over "
        "classes, 0 to 2",
        "lower",
    ),
    Column(
        "sharpness",
        "Sharpness ↓",
        "rise of the loss after one ascent step away from the solution, in nats",
        "lower",
    ),
    Column(
        "epistemic",
        "Epistemic",
        "uncertainty that more data would remove: the mutual information between label "
        "and weights, in nats, the mean over the test set",
    ),
    Column(
        "seconds_per_step",
        "Time per step (s)",
        "wall-clock time of one training step on the run's device; compare runs of one "
        "device only",
        decimals=2,
    ),
)
