"""Whether the paper's claims are seen: paired tests of its rows over seeds."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments.report import cost
from otmdr_jax.experiments.report.labels import grouped
from otmdr_jax.experiments.report.tables import Column, Table
from otmdr_jax.experiments.reproduce.plans import TARGETS, Cell

# How the metrics of the tables are written, and which way is better.
COLUMNS = {
    column.name: column
    for column in (
        Column("accuracy", "ACC (%)", better="higher", scale=100.0, decimals=2),
        Column("misclassification_auroc", "AUROC of errors", better="higher"),
        Column("ovr_auroc", "AUROC, one vs rest", better="higher"),
        Column("brier", "Brier", better="lower"),
        Column("nll", "NLL", better="lower"),
        Column("ece", "ECE", better="lower"),
        Column("aac", "AAC", better="lower"),
        Column("sharpness", "sharpness", better="lower"),
        Column("seconds_per_epoch", "s / epoch", better="lower", decimals=1),
    )
}
LEVEL = 0.05
# Which AUROC the paper means is not known, and it may differ between rows. That
# OT-MDR takes longer is no claim for it.
_NO_CLAIM = ("misclassification_auroc", "ovr_auroc", "seconds_per_epoch")


class Measured(NamedTuple):
    """What was found for a cell.

    Attributes:
      cell: The cell.
      seeds: The seeds of its finished runs.
      values: The metrics, one number for each of these seeds.
      seconds: The mean time of a run's steps; None without a run.
      made: What the runs were made with: devices and versions.
      diverged: How many runs diverged, and how many had a member that did.
    """

    cell: Cell
    seeds: list[int]
    values: dict[str, list[float]]
    seconds: float | None
    made: tuple[str, ...]
    diverged: tuple[int, int] = (0, 0)


class Claim(NamedTuple):
    """A claim of the paper, and what was found.

    Attributes:
      part: The paper's network or ensemble.
      data: The data set.
      ours: The row that the claim is about.
      other: The row that it is compared with.
      metric: The metric.
      difference: The mean over seeds of our value minus the other's.
      interval: Its 95 % interval.
      p: The p-value of Student's paired t-test; NaN where there is no spread.
      q: The p-value, corrected for all tests of the page.
      claimed: The same difference in print; "higher" or "lower" where the paper says so
        in words; None where it makes no claim.
    """

    part: str
    data: str
    ours: str
    other: str
    metric: str
    difference: float
    interval: tuple[float, float]
    p: float
    q: float
    claimed: float | str | None

    @property
    def is_claimed(self) -> bool:
        """Whether the paper has its own row ahead, in print or in words."""
        if self.claimed is None or self.claimed == 0:
            return False
        sign = {"higher": 1.0, "lower": -1.0}.get(str(self.claimed))
        return _is_better(self.metric, self.claimed if sign is None else sign)

    @property
    def verdict(self) -> str:
        """What was found of a claim, or of a row that is worse in print.

        A claim "holds", is "reversed", or is "not decided" where the test decides
        nothing. A row that is no better in print is "worse in print" or "a tie in
        print", and "better here" or "worse here" where the test decides. "not tested"
        is what has no p-value, as where a run has no finite numbers.
        """
        if self.claimed is None:
            return "-"
        better = _is_better(self.metric, self.difference)
        if self.is_claimed:
            if np.isnan(self.p):
                return "not tested"
            if self.p >= LEVEL:
                return "not decided"
            return "holds" if better else "reversed"
        printed = "a tie in print" if self.claimed == 0 else "worse in print"
        if not self.p < LEVEL:
            return printed
        return f"{printed}, {'better' if better else 'worse'} here"


def _is_better(metric: str, difference: Any) -> bool:
    return (difference > 0) == (COLUMNS[metric].better == "higher")


def tested(target: str, found: Sequence[Measured]) -> list[Claim]:
    """Tests the row that a table or figure is about against each other row, over seeds.

    Args:
      target: The table or figure.
      found: Its cells.

    Returns:
      A :class:`Claim` for each other row and metric of each network and data set, over
      the seeds that both have; none where these are less than two.
    """
    what = TARGETS[target]
    claims: list[Any] = []
    for group in blocks(found).values():
        ours = next((one for one in group if one.cell.method == what.ours), None)
        for other in group:
            if ours is not None and other is not ours:
                claims += [_tested(what, ours, other, name) for name in what.metrics]
    claims = [claim for claim in claims if claim is not None]
    corrected = cost.q_values([claim.p for claim in claims])
    return [claim._replace(q=q) for claim, q in zip(claims, corrected, strict=True)]


def blocks(found: Sequence[Measured]) -> dict[tuple[str, str], list[Measured]]:
    """{(network, data set): cells}; each has a table of its own."""
    return grouped(found, lambda one: (one.cell.part, one.cell.data))


def _tested(what, ours, other, name):
    """A claim without its q; None without two common seeds."""
    found = cost.paired(by_seed(ours, name), by_seed(other, name))
    if found is None or found.n < 2:
        return None
    printed = [one.cell.printed.get(name) for one in (ours, other)]
    claimed = what.claims.get(name)
    if None not in printed and name not in _NO_CLAIM:
        claimed = printed[0].mean - printed[1].mean
    cell = other.cell
    rows = (cell.part, cell.data, ours.cell.method, cell.method, name)
    return Claim(*rows, found.mean, found.interval, found.p, float("nan"), claimed)


def by_seed(one: Measured, name: str) -> dict[int, Any]:
    """{seed: value} of a metric; None where it was not measured."""
    values = one.values.get(name, [None] * len(one.seeds))
    return dict(zip(one.seeds, values, strict=True))


def table(claims: Iterable[Claim]) -> Table:
    """A line for each claim: difference, interval, p, q, the paper's, the verdict."""
    lines, ours = [], ""
    for claim in claims:
        column, ours = COLUMNS[claim.metric], claim.ours
        lines.append(
            [
                claim.other,
                column.title,
                column.text(claim.difference, "+"),
                " to ".join(column.text(end, "+") for end in claim.interval),
                *map(_share, (claim.p, claim.q)),
                _claimed(claim),
                claim.verdict,
            ]
        )
    header = [
        f"{ours} minus", "metric", "difference", "95 % interval", "p", "q", "paper",
        "the paper's order",
    ]  # fmt: skip
    return Table(header, lines)


def _claimed(claim: Claim) -> str:
    if claim.claimed is None:
        return "-"
    return claim.claimed if isinstance(claim.claimed, str) else f"{claim.claimed:+.3g}"


def _share(p: float) -> str:
    if np.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
