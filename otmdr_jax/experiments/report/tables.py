"""Tables for a page or a terminal, and the format of numbers in their columns."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

# Texts that count as numbers, also in bold or with a sign.
_NUMBER = re.compile(r"[*+<≥ -]*\d")


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
            "--:" if i and not _is_text(column) else ":--"
            for i, column in enumerate(columns)
        ]
        return "\n".join(
            f"| {' | '.join(map(_in_a_cell, line))} |"
            for line in (self.header, rule, *self.lines)
        )

    def print(self, title: str = "", console: Any = None) -> None:
        """Prints the table with rich, or as Markdown if rich is not installed.

        A table that is too wide becomes several tables below each other, of which each
        repeats the columns of names. Names and headings are folded, numbers never.

        Args:
          title: Line above the table.
          console: `rich.console.Console` to print on. Default: standard output, wide
            enough for the table if it is a file or pipe.
        """
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
            from rich.text import Text
        except ImportError:
            print(*filter(None, [title, self.markdown()]), sep="\n")
            return
        header = [Text(name) for name in self.header]
        lines = [
            [Text(x[2:-2], "bold green") if x[:2] == "**" else Text(x) for x in line]
            for line in self.lines
        ]
        columns = list(zip(header, *lines, strict=True))
        names = [
            i
            for i in range(len(header))
            if not i or _is_text(line[i] for line in self.lines)
        ]
        widths = [max(x.cell_len for x in column) for column in columns]
        if console is None:
            console = Console()
            if not console.is_terminal:  # no window that could be too narrow
                console = Console(width=max(console.width, _sum(widths)))
        parts = [dict(enumerate(widths))]
        if _sum(widths) > console.width:
            for i in set(range(len(header))).difference(names):
                heading, *numbers = columns[i]
                widths[i] = max(x.cell_len for x in [*heading.split(), *numbers])
            parts = _parts(widths, names, console.width)
        for part in parts:
            shown = RichTable(title=Text(title) if title and part is parts[0] else None)
            for i, width in part.items():
                side: Any = "left" if i in names else "right"
                shown.add_column(header[i], justify=side, width=width, overflow="fold")
            for line in lines:
                shown.add_row(*(line[i] for i in part))
            console.print(shown)


def _parts(widths: list[int], names: list[int], width: int) -> list[dict[int, int]]:
    """Parts columns among tables that each have all columns of names.

    Args:
      widths: Width of each column, in characters. Columns of names may get less.
      names: Indices of the columns of names.
      width: Width of a table, borders included.

    Returns:
      Index -> width of the columns of each table.
    """

    def room(part: list[int]) -> int:
        """The characters that are left for the names."""
        return width - _sum([widths[i] for i in part] + [0] * len(names))

    least = min(sum(widths[i] for i in names), width // 3)
    parts: list[list[int]] = [[]]
    for i in range(len(widths)):
        if i in names:
            continue
        if parts[-1] and room([*parts[-1], i]) < least:
            parts.append([])
        parts[-1].append(i)
    left = min(map(room, parts))
    own = {i: widths[i] for i in names}
    while sum(own.values()) > max(left, len(own)):
        own[max(own, key=lambda i: own[i])] -= 1
    return [own | {i: widths[i] for i in part} for part in parts]


def _sum(widths: list[int]) -> int:
    """Returns the width of a table: two spaces and a border for each column."""
    return sum(widths) + 3 * len(widths) + 1


def _is_text(column: Iterable[str]) -> bool:
    """Returns whether no text of a column is a number; "-" says nothing of it."""
    known = [text for text in column if text != "-"]
    return bool(known) and not any(map(_NUMBER.match, known))


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
