"""Chooses each method's setting on a validation set, before methods are compared."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from otmdr_jax.experiments import programs
from otmdr_jax.experiments.sweep import running
from otmdr_jax.experiments.sweep.planning import METRICS, Plan, Planned, Setting, Tuning


class Tuned(NamedTuple):
    """What a tuning found.

    Attributes:
      scores: The mean validation metric of each setting, by its label.
      chosen: The best setting of each method, in the file's order.
      runs: The runs of these settings.
    """

    scores: dict[str, float]
    chosen: list[Setting]
    runs: list[Planned]


def check_tuning(plan: Plan) -> None:
    """Raises ValueError if a plan chooses settings without a validation set."""
    runs = () if plan.tuning is None else plan.tuning.runs
    for config in {one.config.data: one.config for one in runs}.values():
        if not config.data.validation and not _has_validation(config):
            raise ValueError(
                "tuning needs a validation set, as validation = 0.2 in [options]."
            )


def tune(
    plan: Plan,
    rows_file: str | os.PathLike,
    *,
    jobs: int = 1,
    show_progress: bool = True,
) -> Tuned:
    """Runs what is missing of a tuning, and chooses each method's setting.

    Args:
      plan: A plan with `tuning`.
      rows_file: Where the rows of its runs are written, as JSON.
      jobs: How many runs are trained at a time, as in :func:`run`.
      show_progress: Whether to show progress.

    Returns:
      A :class:`Tuned`; :func:`run` takes its `runs`.

    Raises:
      ValueError: As :func:`run` and :func:`chosen`.
      Interrupted: On Ctrl-C or SIGTERM; the same call goes on.
    """
    tuning = _tuning_of(plan)
    check_tuning(plan)
    rows = running.run(
        tuning.runs,
        rows_file,
        jobs=jobs,
        measure_memory=False,
        show_progress=show_progress,
    )
    found = scores(plan, rows)
    best = chosen(plan, found)
    labels = {one.label for one in best}
    return Tuned(found, best, [one for one in plan.runs if one.label in labels])


def scores(plan: Plan, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean validation metric of each setting over the seeds of the tuning.

    Args:
      plan: A plan with `tuning`.
      rows: The rows of its runs, of :func:`run`.

    Returns:
      {label: mean}; NaN where a run diverged.
    """
    name = f"validation_{_tuning_of(plan).metric}"
    values: dict[str, list[float]] = {}
    for row in rows:
        found = row.get(name) if row["status"] == "finished" else None
        values.setdefault(row["label"], []).append(math.nan if found is None else found)
    return {label: sum(found) / len(found) for label, found in values.items()}


def chosen(plan: Plan, found: Mapping[str, float]) -> list[Setting]:
    """The best setting of each method on the validation set.

    Args:
      plan: A plan with `tuning`.
      found: The scores, of :func:`scores`.

    Returns:
      A setting for each method, in the file's order; the first of equal ones.

    Raises:
      ValueError: A run of every setting of a method diverged.
    """
    metric = _tuning_of(plan).metric
    sign = 1 if METRICS[metric] else -1
    best = []
    for method in dict.fromkeys(setting.method for setting in plan.settings):
        those = [one for one in plan.settings if one.method == method]
        if len(those) > 1:
            those = [one for one in those if not math.isnan(found[one.label])]
        if not those:
            raise ValueError(
                f"every setting of {method} has a run that diverged, or that has no "
                f"{metric} on a validation set: add a smaller value."
            )
        best.append(min(those, key=lambda one: sign * found.get(one.label, 0.0)))
    return best


def _tuning_of(plan: Plan) -> Tuning:
    if plan.tuning is None:
        raise ValueError("the file of this plan has no table [tuning].")
    return plan.tuning


def _has_validation(config):
    """Whether the data bring a validation set of their own."""
    return programs.load_data(config).validation is not None
