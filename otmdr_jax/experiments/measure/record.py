"""The numbers of a run that result.json and evaluation.json record."""

from typing import Any

from otmdr_jax.data import Dataset
from otmdr_jax.experiments import members
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import sharpness
from otmdr_jax.experiments.measure.evaluation import RunEvaluation
from otmdr_jax.experiments.programs import Programs, environment


def record_of(
    config: TrainConfig,
    of_run: RunEvaluation,
    dataset: Dataset,
    programs: Programs,
    split: str = "test",
) -> dict[str, Any]:
    """Collects a run's metrics on a split, its sharpness, posterior and members.

    Args:
      config: The run's configuration.
      of_run: The run's evaluation, which includes the split.
      dataset: The data; sharpness is measured on the training set.
      programs: Compiled functions.
      split: Split of the metrics.

    Returns:
      A record for JSON. Losses and sharpness are in nats.
    """
    state, posterior, diverged = of_run.state, of_run.posterior, of_run.diverged
    found = of_run.splits[split]
    sharp = sharpness.gap(config, state, dataset, programs, without=diverged)
    solutions = members.predicting(config, state)
    trained = members.separate(state)
    record = {
        **found.metrics,
        "sharpness": sharp["sharpness"],
        # Of a loss of one's own it is no likelihood.
        "train_loss" if programs.own.loss else "train_nll": sharp["train_nll"],
        "steps": members.steps_taken(state),
        "skipped_steps": sum(int(member.skipped) for member in trained),
        "parameters": members.num_parameters(config, state),
        **environment(),
    }
    if posterior:
        record["posterior"] = posterior
    if found.members is None:
        return record
    names = config.model.member_names
    if config.model.members is None:  # collected in one run
        names *= len(found.members)
    rows: list[dict[str, Any]] = [
        {"model": name, **values, "diverged": i in diverged}
        for i, (name, values) in enumerate(zip(names, found.members, strict=True))
    ]
    # Members with a joint loss have no sharpness of their own.
    gaps = sharp.get("member_sharpness", ())
    for row, gap, member in zip(rows, gaps, solutions, strict=False):
        row |= {"sharpness": gap, "skipped_steps": int(member.skipped)}
    return record | {"members": rows}
