"""Metrics of labels with their intervals, and tests against a baseline.

Chance has two sources: the examples in the test set, and the seed of a run. Intervals
and p-values here are about the examples: a label's value is the mean over its runs, and
the examples are resampled. The standard deviation in the table of results shows the
effect of seeds.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.labels import by_label
from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.experiments.report.tables import DEFAULT_COLUMNS, Column, Table
from otmdr_jax.metrics import Comparison, Interval

# Metrics that are means over examples: the randomisation test is cheap and exact.
TESTED = ("accuracy", "nll", "brier")
_COLUMNS = {column.name: column for column in DEFAULT_COLUMNS}


class Tested(NamedTuple):
    """A label's metrics on the test set.

    Attributes:
      label: The label.
      n: Number of its runs with finite predictions.
      intervals: :class:`otmdr_jax.metrics.Interval` of each metric's mean over runs.
      against: :class:`otmdr_jax.metrics.Comparison` of each metric with the baseline:
        the label's value minus the baseline's. Empty for the baseline itself, and if
        the test sets differ.
    """

    label: str
    n: int
    intervals: dict[str, Interval]
    against: dict[str, Comparison]


def compare(runs: Iterable[Run], baseline: str | None = None) -> list[Tested]:
    """Computes intervals of every label, and tests it against a baseline.

    Args:
      runs: The runs.
      baseline: Label to compare with. Default: the first one.

    Returns:
      A :class:`Tested` for each label with finite predictions, in their order.

    Raises:
      ValueError: There are no runs, or no run has this label.
    """
    groups = by_label(runs)
    baseline = find_baseline(groups, baseline)
    values = {
        label: (pooled[0].labels, _of_examples(pooled))
        for label, group in groups.items()
        if (pooled := plots.pool(group)) and _same_set(pooled)
    }
    found = []
    for label, (labels, mine) in values.items():
        against = {}
        if baseline in values and label != baseline:
            of_baseline, other = values[baseline]
            if np.array_equal(labels, of_baseline):
                against = dict(zip(TESTED, compare_means(mine, other), strict=True))
        intervals = metrics.bootstrap_all(_means, mine, labels)
        found.append(Tested(label, len(plots.pool(groups[label])), intervals, against))
    return found


def compare_means(
    values: np.ndarray,
    others: np.ndarray,
    *,
    num_samples: int = metrics.intervals.NUM_SAMPLES,
    level: float = metrics.intervals.LEVEL,
    seed: int = 0,
) -> list[Comparison]:
    """Compares means of two models over the same examples, by one test.

    The p-value is that of :func:`otmdr_jax.metrics.paired_test`: the two values of each
    example are swapped at random. The interval has the differences that this test does
    not reject: it holds 0 exactly if the p-value is at least 1 - level. (A bootstrap
    interval may exclude 0 where the test finds nothing.) Swapping the values of some
    examples yields no larger difference than D exactly if D lies between the mean
    difference of these examples and that of the rest, so both follow from the means of
    random halves.

    Args:
      values: (N, K) values of the first model, K numbers of each example.
      others: (N, K) values of the second one.
      num_samples: Number of random swaps.
      level: Probability of the interval, in (0, 1).
      seed: Seed of the swaps.

    Returns:
      A :class:`otmdr_jax.metrics.Comparison` for each of the K means. A difference that
      is infinite is never significant, and nothing is known of one that is NaN.

    Reference: Hartigan, `Using Subsample Values as Typical Values
    <https://doi.org/10.1080/01621459.1969.10501057>`_, 1969.
    """
    rng = np.random.default_rng(seed)
    sizes, sums = [], []
    with np.errstate(invalid="ignore"):  # infinity less infinity, 0 times infinity
        gaps = np.asarray(values, np.float64) - np.asarray(others, np.float64)
        for _ in range(num_samples):
            swapped = rng.random(len(gaps)) < 0.5
            sizes.append(np.sum(swapped))
            sums.append(swapped @ gaps)
    return [
        _compare_mean(gap, np.array(sizes), own, level)
        for gap, own in zip(gaps.T, np.array(sums).T, strict=True)
    ]


def _compare_mean(
    gaps: np.ndarray, sizes: np.ndarray, sums: np.ndarray, level: float
) -> Comparison:
    """Compares one mean, given the sizes of random halves and the sums over them."""
    mean = float(np.mean(gaps))
    if not np.isfinite(mean):
        unknown = np.isnan(mean)
        ends = (np.nan, np.nan, np.nan) if unknown else (-np.inf, np.inf, 1.0)
        return Comparison(mean, *ends)
    with np.errstate(invalid="ignore", divide="ignore"):  # an empty half
        means = np.stack(
            [sums / sizes, (len(gaps) * mean - sums) / (len(gaps) - sizes)]
        )
    means[np.abs(means) < 1e-12 * np.mean(np.abs(gaps))] = 0.0  # rounding
    low, high = np.min(means, axis=0), np.max(means, axis=0)
    empty = (sizes == 0) | (sizes == len(gaps))
    low[empty], high[empty] = -np.inf, np.inf
    draws = len(sizes)
    p_value = (1 + np.sum((low <= 0) & (0 <= high))) / (draws + 1)
    # As many halves as this leave a p-value of 1 - level or more.
    needed = math.ceil(round((1 - level) * (draws + 1), 9)) - 1
    if needed < 1:  # so few draws reject nothing
        return Comparison(mean, -np.inf, np.inf, float(p_value))
    return Comparison(
        mean,
        min(mean, float(np.sort(low)[needed - 1])),
        max(mean, float(np.sort(high)[-needed])),
        float(p_value),
    )


def num_examples(runs: Sequence[Run], baseline: str) -> int:
    """Returns the size of the baseline's test set; if it diverged, the first run's."""
    pooled = plots.pool(by_label(runs)[baseline])
    return len((pooled or runs)[0].labels)


def not_compared(
    runs: Sequence[Run], tested: Sequence[Tested], baseline: str
) -> list[str]:
    """Returns the labels that cannot be compared with the baseline."""
    compared = {row.label for row in tested if row.against} | {baseline}
    return [label for label in by_label(runs) if label not in compared]


def find_baseline(labels: Iterable[str], baseline: str | None) -> str:
    """Finds the baseline's label; case does not matter unless it decides between two.

    Args:
      labels: The labels.
      baseline: One of them. Default: the first one.

    Raises:
      ValueError: There is no such label.
    """
    known = list(dict.fromkeys(labels))
    if baseline is None or baseline in known:
        return known[0] if baseline is None else baseline
    alike = [label for label in known if label.lower() == baseline.lower()]
    if len(alike) != 1:
        raise ValueError(
            f"the baseline must be one of {', '.join(map(repr, known))}; got "
            f"{baseline!r}."
        )
    return alike[0]


def tables(rows: Sequence[Tested]) -> list[Table]:
    """Tabulates values with 95 % intervals, and differences from the baseline.

    Each metric has a table with a line for each label; each difference has an interval
    and a p-value.
    """
    found = []
    for name in TESTED:
        column = _COLUMNS[name]
        lines = []
        for row in rows:
            value, low, high = map(column.text, row.intervals[name])
            line = [row.label, value, f"{low} to {high}"]
            lines.append(line + _difference(column, row.against.get(name)))
        header = [column.title, "Value", "95 %", "Δ", "95 % of Δ", "p"]
        found.append(Table(header, lines))
    return found


def _difference(column: Column, found: Comparison | None) -> list[str]:
    if found is None or np.isnan(found.difference):
        return ["-", "-", "-"]
    value, low, high = (column.text(x, "+") for x in found[:3])
    p = "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    return [value, f"{low} to {high}", f"**{p}**" if found.p_value < 0.05 else p]


def _of_examples(runs: Sequence[Run]) -> np.ndarray:
    """Returns (N, 3) values, means over runs; their means over examples are metrics."""
    every = []
    for run in runs:
        found = metrics.check(run.log_probs, run.labels, log_probs=True)
        every.append([found.correct, -found.log_of_label, _brier(found)])
    return np.mean(np.array(every, np.float64), axis=0).T


def _means(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return dict(zip(TESTED, np.mean(values, axis=0).tolist(), strict=True))


def _brier(found: metrics.Predictions) -> np.ndarray:
    scores = [np.sum(probs**2, axis=1) for _, probs in found.rows()]
    return np.concatenate(scores) - 2.0 * np.exp(found.log_of_label) + 1.0


def _same_set(runs: Sequence[Run]) -> bool:
    return all(np.array_equal(runs[0].labels, run.labels) for run in runs)


# The table of all metrics: name -> heading.
_SUMMARY = {
    "accuracy": "Accuracy ↑",
    "top5_accuracy": "Top-5 accuracy ↑",
    "nll": "NLL (nats) ↓",
    "brier": "Brier ↓",
    "brier_reliability": "Brier: reliability ↓",
    "brier_resolution": "Brier: resolution ↑",
    "brier_uncertainty": "Brier: uncertainty",
    "ece": "ECE, equal width ↓",
    "ece_mass": "ECE, equal mass ↓",
    "debiased_ece": "ECE, debiased ↓",
    "smooth_ece": "ECE, smooth ↓",
    "mce": "MCE ↓",
    "sce": "SCE ↓",
    "ace": "ACE ↓",
    "tace": "TACE ↓",
    "aac": "AAC ↓",
    "aurc": "AURC ↓",
    "misclassification_auroc": "Misclassification AUROC ↑",
    "misclassification_aupr": "Misclassification AUPR ↑",
    "misclassification_fpr95": "Misclassification FPR95 ↓",
    "ovr_auroc": "One-vs-rest AUROC ↑",
    "entropy": "Entropy (nats)",
}


def summary_table(runs: Iterable[Run]) -> Table:
    """Tabulates every metric (row) of every label (column), the mean over its runs."""
    groups = by_label(runs)
    found = {
        label: [
            metrics.summary(run.log_probs, run.labels, log_probs=True)
            for run in plots.pool(group)
        ]
        for label, group in groups.items()
    }
    lines = []
    for name, title in _SUMMARY.items():
        means = [
            float(np.mean([one[name] for one in each])) if each else float("nan")
            for each in found.values()
        ]
        lines.append([title, *("-" if np.isnan(x) else f"{x:.4f}" for x in means)])
    return Table(["Metric", *groups], lines)
