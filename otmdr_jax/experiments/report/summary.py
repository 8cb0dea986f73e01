"""Means over the runs of each label, and their options: first and last on a page."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments.report.labels import by_label, differing, text_of
from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.experiments.report.tables import DEFAULT_COLUMNS, Column, Table


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


def print_summary(runs: Sequence[Run], title: str) -> None:
    """Prints the table of runs, in the columns that any of them has a number for."""
    print_table(summarise(runs, known_columns(runs)), title=title)


def configuration(runs: Sequence[Run]) -> tuple[Table, Table]:
    """The options that all runs share, and those of each run."""
    # Words in a result (a device, say) are no option, but as good to know.
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
        [run.label, run.folder.name if run.folder else "-"]
        + [f"`{text_of(setting, name)}`" for name in unlike]
        for run, setting in zip(runs, settings, strict=True)
    ]
    header = ["method", "run", *(f"`{name}`" for name in unlike)]
    return Table(["option", "value"], shared), Table(header, each)


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
    text = column.text(cell.mean)
    if cell.std is not None:
        text += f" ± {column.text(cell.std)}"
    return text if cell.n in (0, runs) else f"{text} ({cell.n} of {runs})"
