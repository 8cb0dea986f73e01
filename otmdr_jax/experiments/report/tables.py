"""Tables, and the first of a report: means over the runs of each label."""

import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments.report.reading import Run, by_label

# What looks like a number: also a bold one, a difference, the mark of an unknown one.
_NUMBER = re.compile(r"[*+<≥ -]*\d|-$")


class Table(NamedTuple):
    """Headings and lines of text, for a page or a terminal.

    Attributes:
      header: The headings of the columns.
      lines: A text for each column; what stands between ** is bold.
    """

    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """The table as Markdown, columns of numbers to the right."""
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
        """Prints the table: with rich where it is installed, else as Markdown.

        Args:
          title: A line above the table.
          console: A `rich.console.Console`. Default: one on standard output.
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
    """A console on standard output, wide enough for a rich table in a file or pipe."""
    from rich.console import Console, Measurement

    console = Console()
    if console.is_terminal:
        return console
    # Nobody's window is too narrow.
    wide = console.options.update(width=10_000)
    needed = Measurement.get(console, wide, table).maximum
    return Console(width=max(console.width, needed))


def _in_a_cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


class Column(NamedTuple):
    """How a number of result.json is shown.

    Attributes:
      name: Its key in result.json.
      title: The column's heading.
      meaning: One sentence for the report.
      better: "higher", "lower" or None, where no best is marked.
      scale: What the number is multiplied by when it is shown.
      decimals: Digits after the point.
    """

    name: str
    title: str
    meaning: str = ""
    better: str | None = None
    scale: float = 1.0
    decimals: int = 4


class Cell(NamedTuple):
    """A column's numbers over the runs of one label, in the units of result.json.

    Attributes:
      column: What they are.
      mean: Their mean, None where no run knows the number.
      std: Their sample standard deviation (ddof = 1), None for fewer than two.
      n: How many runs know the number.
    """

    column: Column
    mean: float | None
    std: float | None
    n: int


class Row(NamedTuple):
    """The runs of one label.

    Attributes:
      label: The label.
      n: The number of runs.
      cells: A column's name -> its numbers.
    """

    label: str
    n: int
    cells: dict[str, Cell]


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


def known_columns(
    runs: Iterable[Run], columns: Sequence[Column] = DEFAULT_COLUMNS
) -> list[Column]:
    """The columns that at least one run has a number for."""
    runs = list(runs)
    return [c for c in columns if any(number_of(r, c.name) is not None for r in runs)]


def summarise(
    runs: Iterable[Run], columns: Sequence[Column | str] = DEFAULT_COLUMNS
) -> list[Row]:
    """Mean, standard deviation and count over the runs of each label.

    A number that a run does not know (null, or no number at all) is left out; `Cell.n`
    then differs from `Row.n`, and tables say so.

    Args:
      runs: The runs.
      columns: What to show: columns, or keys of result.json.

    Returns:
      A row for each label, in order of first appearance.

    Raises:
      ValueError: No runs, or a key that no run's result holds.

    Example:
      >>> runs = [Run(None, "SGD", {}, {"nll": x}, [], None, None) for x in (0.5, 0.7)]
      >>> print(markdown_table(summarise(runs, ["nll"])))
      | Method | NLL ↓ |
      | :-- | --: |
      | SGD, n = 2 | 0.6000 ± 0.1414 |
    """
    groups = by_label(runs)
    everything = [run for group in groups.values() for run in group]
    resolved = [_resolve(column, everything) for column in columns]
    return [
        Row(
            label=label,
            n=len(group),
            cells={column.name: _cell(column, group) for column in resolved},
        )
        for label, group in groups.items()
    ]


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: mean ± std, the best mean of a column in bold.

    Args:
      rows: What :func:`summarise` returns.

    Returns:
      The table's text, without a newline at its end. Means that look equal share the
      best mark; where all look equal there is none.

    Raises:
      ValueError: No rows.
    """
    header, columns = _columns(rows)
    labels = [f"{row.label}, n = {row.n}" for row in rows]
    return Table(header, _lines(labels, *columns)).markdown()


def print_table(rows: Sequence[Row], console: Any = None, title: str = "") -> None:
    """Prints the rows: with rich where it is installed, else as Markdown.

    Args:
      rows: What :func:`summarise` returns.
      console: A `rich.console.Console`. Default: one on standard output, and wide
        enough for the table where that is no terminal. Without rich it is not used.
      title: A line above the table.

    Raises:
      ValueError: No rows.
    """
    header, columns = _columns(rows)
    labels, counts = [row.label for row in rows], [str(row.n) for row in rows]
    lines = _lines(labels, counts, *columns)
    Table([header[0], "n", *header[1:]], lines).print(title, console)


def _resolve(column: Column | str, runs: Sequence[Run]) -> Column:
    if isinstance(column, Column):
        return column
    for known in DEFAULT_COLUMNS:
        if known.name == column:
            return known
    names = sorted({name for run in runs for name in run.result})
    if column not in names:
        raise ValueError(
            f"a column must be one of {', '.join(map(repr, names))}; got {column!r}."
        )
    return Column(column, column)


def number_of(run: Run, name: str) -> float | None:
    """A number of the run's result; None where it is unknown or no number."""
    value = run.result.get(name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value) if math.isfinite(value) else None


def _cell(column: Column, runs: Sequence[Run]) -> Cell:
    known = [number_of(run, column.name) for run in runs]
    values = np.array([value for value in known if value is not None], np.float64)
    return Cell(
        column=column,
        mean=float(np.mean(values)) if len(values) else None,
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        n=len(values),
    )


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The table's headings, and the texts of its columns but for the first."""
    if not rows:
        raise ValueError("a table needs at least one row, got none.")
    header, columns = ["Method"], []
    for name in rows[0].cells:
        cells = [row.cells[name] for row in rows]
        column = _fit_unit(cells)
        header.append(column.title)
        texts = [_text(x, column, row.n) for x, row in zip(cells, rows, strict=True)]
        # Means that look equal are equal.
        shown = [
            None if x.mean is None else round(x.mean * column.scale, column.decimals)
            for x in cells
        ]
        known = {mean for mean in shown if mean is not None}
        if column.better and len(known) > 1:
            best = max(known) if column.better == "higher" else min(known)
            texts = [
                f"**{text}**" if mean == best else text
                for text, mean in zip(texts, shown, strict=True)
            ]
        columns.append(texts)
    return header, columns


def _lines(*columns: Sequence[str]) -> list[list[str]]:
    return [list(line) for line in zip(*columns, strict=True)]


def _fit_unit(cells: Sequence[Cell]) -> Column:
    """The column; times below a second all in milliseconds."""
    column = cells[0].column
    largest = max((cell.mean for cell in cells if cell.mean is not None), default=1.0)
    if column.name != "seconds_per_step" or largest >= 1.0:
        return column
    title = column.title.replace("(s)", "(ms)")
    return column._replace(
        title=title, scale=1000.0, decimals=1 if largest > 0.1 else 2
    )


def _text(cell: Cell, column: Column, runs: int) -> str:
    if cell.mean is None:
        return "-"
    # The sum turns -0.0 into 0.0.
    mean, std = (
        f"{round((x or 0.0) * column.scale, column.decimals) + 0.0:.{column.decimals}f}"
        for x in (cell.mean, cell.std)
    )
    text = mean if cell.std is None else f"{mean} ± {std}"
    return text if cell.n == runs else f"{text} ({cell.n} of {runs})"
