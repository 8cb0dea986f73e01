"""The first and last part of a page: means over the runs of each label, and options."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments.report.labels import by_label, differing, text_of
from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.experiments.report.tables import DEFAULT_COLUMNS, Column, Table


class Cell(NamedTuple):
    """The numbers of one column over the runs of one label, in result.json's units.

    Attributes:
      column: The column.
      mean: Mean of the numbers; None if no run has one.
      std: Sample standard deviation (ddof = 1); None for fewer than two numbers.
      n: Number of runs that have the number.
    """

    column: Column
    mean: float | None
    std: float | None
    n: int


class Row(NamedTuple):
    """The runs of one label.

    Attributes:
      label: The label.
      n: Number of runs.
      cells: Cells by the name of their column.
    """

    label: str
    n: int
    cells: dict[str, Cell]


def known_columns(
    runs: Iterable[Run], columns: Sequence[Column] = DEFAULT_COLUMNS
) -> list[Column]:
    """Returns the columns for which at least one run has a number."""
    runs = list(runs)
    return [c for c in columns if any(number_of(r, c.name) is not None for r in runs)]


def summarise(
    runs: Iterable[Run], columns: Sequence[Column | str] = DEFAULT_COLUMNS
) -> list[Row]:
    """Computes mean, standard deviation and count over the runs of each label.

    A mean leaves out runs that lack the number (null, or not a number). `Cell.n` then
    differs from `Row.n`, and tables say so.

    Args:
      runs: The runs.
      columns: Columns, or keys of result.json.

    Returns:
      A row for each label, in order of first appearance.

    Raises:
      ValueError: There are no runs, or no run's result holds a key.

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
    """Makes a Markdown table: mean ± std, with the best mean of each column in bold.

    Args:
      rows: Rows of :func:`summarise`.

    Returns:
      The table's text, without a newline at its end. Means that round to the same text
      are all bold; if all means do, none is bold.

    Raises:
      ValueError: There are no rows.
    """
    header, columns = _columns(rows)
    labels = [f"{row.label}, n = {row.n}" for row in rows]
    return Table(header, _lines(labels, *columns)).markdown()


def print_table(rows: Sequence[Row], console: Any = None, title: str = "") -> None:
    """Prints the rows with rich, or as Markdown if rich is not installed.

    Args:
      rows: Rows of :func:`summarise`.
      console: `rich.console.Console` to print on. Default: standard output, wide enough
        for the table if it is no terminal.
      title: Line above the table.

    Raises:
      ValueError: There are no rows.
    """
    header, columns = _columns(rows)
    labels, counts = [row.label for row in rows], [str(row.n) for row in rows]
    lines = _lines(labels, counts, *columns)
    Table([header[0], "n", *header[1:]], lines).print(title, console)


def print_summary(runs: Sequence[Run], title: str) -> None:
    """Prints the table of runs, with every column for which a run has a number."""
    print_table(summarise(runs, known_columns(runs)), title=title)


def configuration(runs: Sequence[Run]) -> tuple[Table, Table]:
    """Returns two tables: the options that all runs share, and those of each run.

    Those of a run stand in one cell, where they fold: a column for each would be wider
    than a screen.
    """
    # Texts in a result, such as the device, are shown with the options.
    settings = [
        {**{k: v for k, v in run.result.items() if isinstance(v, str)}, **run.config}
        for run in runs
    ]
    unlike = differing(settings)
    shared = [
        [f"`{name}`", f"`{text_of(settings[0], name)}`"]
        for name in settings[0]
        if name not in unlike
    ]
    each = [
        [
            run.label,
            run.folder.name if run.folder else "-",
            ", ".join(
                f"`{name} = {text_of(setting, name)}`"
                for name in unlike
                if name in setting
            ),
        ]
        for run, setting in zip(runs, settings, strict=True)
    ]
    return Table(["option", "value"], shared), Table(["method", "run", "options"], each)


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
    """Returns a number of the run's result; None if it is missing or not finite."""
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
    """Returns the headings of the table, and the texts of all columns but the first."""
    if not rows:
        raise ValueError("a table needs at least one row, got none.")
    header, columns = ["Method"], []
    for name in rows[0].cells:
        cells = [row.cells[name] for row in rows]
        column = _fit_unit(cells)
        header.append(column.title)
        texts = [_text(x, column, row.n) for x, row in zip(cells, rows, strict=True)]
        # Means that round to the same text count as equal.
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
    """Returns the column, in milliseconds if all of its times are below a second."""
    column = cells[0].column
    largest = max((cell.mean for cell in cells if cell.mean is not None), default=1.0)
    if column.name != "seconds_per_step" or largest >= 1.0:
        return column
    title = column.title.replace("(s)", "(ms)")
    return column._replace(
        title=title, scale=1000.0, decimals=1 if largest > 0.1 else 2
    )


def _text(cell: Cell, column: Column, runs: int) -> str:
    text = column.text(cell.mean)
    if cell.std is not None:
        text += f" ± {column.text(cell.std)}"
    return text if cell.n in (0, runs) else f"{text} ({cell.n} of {runs})"
