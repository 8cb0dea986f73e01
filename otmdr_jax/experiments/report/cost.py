"""The cost of methods, and tests over seeds: tables and a plot.

Rows are those of :func:`otmdr_jax.experiments.sweep.run`.
"""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.labels import grouped
from otmdr_jax.experiments.report.tables import DEFAULT_COLUMNS, Column, Table

# Distance between points of equal cost, as the logarithm of a factor.
_APART = 0.035
Rows = Sequence[dict[str, Any]]

_PAIRED = tuple(
    column
    for column in DEFAULT_COLUMNS
    if column.name in ("accuracy", "nll", "ece", "brier")
)


def table(rows: Rows) -> Table:
    """Tabulates each label: mean gradients, seconds and memory of a run."""
    lines = []
    for label, group in grouped(rows, itemgetter("label")).items():
        done = [row for row in group if row["status"] == "finished"]
        diverged = len(group) - len(done)
        lines.append(
            [
                label,
                f"{len(done)}" + (f" ({diverged} diverged)" if diverged else ""),
                _mean(done, "gradient_evaluations", "{:,.0f}"),
                _mean(done, "seconds", "{:.1f}"),
                _mean(done, "memory_mib", "{:.1f}"),
            ]
        )
    header = ["Method", "n", "Gradients", "Seconds", "Memory of a step (MiB)"]
    return Table(header, lines)


def paired_table(rows: Rows, baseline: str) -> Table:
    """Compares each label with a baseline over the seeds that both have.

    Args:
      rows: The rows.
      baseline: Label to compare with.

    Returns:
      A line for each other label: the mean difference of each metric and the two-sided
      p-value of Student's paired t-test over seeds. A single seed gives no p-value; no
      common seed gives "-".

    Reference: Student, 1908; SciPy's `ttest_rel`.
    """
    groups = grouped(rows, itemgetter("label"))
    lines = []
    for label, group in groups.items():
        if label != baseline:
            cells = [_paired(group, groups[baseline], column) for column in _PAIRED]
            lines.append([label, *cells])
    header = ["Method", *(f"Δ {c.title.rstrip(' ↑↓')}" for c in _PAIRED)]
    return Table(header, lines)


class Paired(NamedTuple):
    """A difference over pairs.

    Attributes:
      mean: The mean difference.
      interval: Its 95 % interval, of Student's t; NaN for a single pair.
      p: The two-sided p-value of Student's paired t-test; NaN for a single pair, and
        where all differences are the same, but for rounding, and not 0.
      n: The number of pairs.
    """

    mean: float
    interval: tuple[float, float]
    p: float
    n: int


def paired(
    ours: Mapping[int, float | None], theirs: Mapping[int, float | None]
) -> Paired | None:
    """Compares two methods over the seeds that both have.

    Args:
      ours: {seed: value} of one method; None where there is no value.
      theirs: The same of the other.

    Returns:
      The :class:`Paired` difference of ours minus theirs; None without a common seed.

    Example:
      >>> found = paired({0: 0.9, 1: 0.8, 2: 0.9}, {0: 0.7, 1: 0.7, 3: 0.1})
      >>> round(found.mean, 3), found.n
      (0.15, 2)

    Reference: Student, 1908; SciPy's `ttest_1samp`.
    """
    from scipy import stats  # comes with JAX

    pairs = np.array(
        [
            (value, theirs[seed])
            for seed, value in ours.items()
            if value is not None and theirs.get(seed) is not None
        ],
        np.float64,
    )
    if not len(pairs):
        return None
    gaps = pairs[:, 0] - pairs[:, 1]
    mean, nan = float(gaps.mean()), float("nan")
    if len(gaps) < 2:
        return Paired(mean, (nan, nan), nan, 1)
    if np.ptp(gaps) <= 1e-12 * np.abs(pairs).max():
        return Paired(mean, (mean, mean), nan if gaps.any() else 1.0, len(gaps))
    test = stats.ttest_1samp(gaps, 0.0)
    low, high = test.confidence_interval(0.95)
    return Paired(mean, (float(low), float(high)), float(test.pvalue), len(gaps))


def paired_difference(
    rows: Rows, others: Rows, name: str
) -> tuple[float, float, int] | None:
    """Returns mean difference, p-value and number of the common seeds.

    The result is None if no seed has both numbers. P-values are those of
    :func:`paired`.
    """
    mine, other = ({x["seed"]: x.get(name) for x in one} for one in (rows, others))
    found = paired(mine, other)
    return None if found is None else (found.mean, found.p, found.n)


def q_values(pvalues: Sequence[float]) -> list[float]:
    """Corrects the p-values of many tests, by the false discovery rate.

    Where all tests with q below 0.05 are called differences, at most one in twenty of
    these is expected to be none, if tests are independent or positively dependent.

    Args:
      pvalues: P-values; NaN is no test, and stays NaN.

    Example:
      >>> [round(q, 3) for q in q_values([0.01, 0.04, float("nan"), 0.03])]
      [0.03, 0.04, nan, 0.04]

    Reference: Benjamini and Hochberg, 1995; SciPy's `false_discovery_control`.
    """
    from scipy import stats

    p = np.array(pvalues, np.float64)
    tested = ~np.isnan(p)
    if tested.any():
        p[tested] = stats.false_discovery_control(p[tested])
    return [float(q) for q in p]


def figure(rows: Rows, *, places: Mapping[str, int] | None = None) -> Any:
    """Draws accuracy, ± one standard deviation, against the gradients of a run.

    Points of equal cost stand side by side.

    Args:
      rows: The rows.
      places: Places that set the colours, see :func:`labels.places`. Default: those in
        this picture.

    Returns:
      A `matplotlib.figure.Figure` of one axes; a point's gid is "cost:LABEL".
    """
    picture = plots.new_figure(plots.ALONE, 3.6)
    from matplotlib import ticker

    ax = picture.subplots()
    # A finished run may predict NaN.
    groups = {
        label: [row for row in group if row.get("accuracy") is not None]
        for label, group in grouped(rows, itemgetter("label")).items()
    }
    costs = {
        label: float(np.mean([row["gradient_evaluations"] for row in group]))
        for label, group in groups.items()
        if group
    }
    styles = plots.line_styles(groups, places)
    for i, (label, group) in enumerate(groups.items()):
        if not group:
            continue
        beside = [other for other in costs if costs[other] == costs[label]]
        place = beside.index(label) - (len(beside) - 1) / 2
        x = costs[label] * math.exp(_APART * place)
        y = 100.0 * np.array([row["accuracy"] for row in group])
        bar = ax.errorbar(
            x,
            y.mean(),
            y.std(ddof=1) if len(y) > 1 else 0.0,
            color=styles[i]["color"],
            marker="osD^v<>P"[i % 8],
            markersize=6,
            capsize=3,
            linestyle="none",
            label=plots.plain(label),
        )
        bar.lines[0].set_gid(f"cost:{label}")
    ax.set_xscale("log")
    for axis in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        axis(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    plots.dress(
        ax, x="Gradient evaluations of a run (whole batches)", y="Test accuracy (%)"
    )
    handles, names = ax.get_legend_handles_labels()
    plots.legend(picture, handles, names)
    return picture


def _mean(rows, name: str, form: str) -> str:
    known = [row[name] for row in rows if row.get(name) is not None]
    return form.format(math.fsum(known) / len(known)) if known else "-"


def _paired(rows, others, column: Column) -> str:
    found = paired_difference(rows, others, column.name)
    if found is None:
        return "-"
    gap, p, count = found
    shown = column.text(gap, "+")
    if math.isnan(p):
        return f"{shown} (n = {count})"
    value = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{shown} ({value})"
