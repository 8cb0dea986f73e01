"""What a finished run gives: to the caller, and as result.json."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from otmdr_jax.experiments import members
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure.evaluation import (
    Evaluation,
    member_rows,
    posterior_record,
)
from otmdr_jax.experiments.programs import environment

PyTree = Any


class Result(NamedTuple):
    """What a run gives.

    Attributes:
      state: The final training state: of an ensemble see
        :mod:`otmdr_jax.experiments.members`.
      metrics: Final metrics on the test set, sharpness, speed: see result.json.
      history: The logged events, as in metrics.jsonl.
      log_probs: (N, C) on the test set; of an ensemble, of its mean probability.
      labels: (N,) of the test set.
      folder: Where everything is, or None.
    """

    state: PyTree
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    log_probs: np.ndarray
    labels: np.ndarray
    folder: pathlib.Path | None


def final_result(
    config: TrainConfig,
    state: PyTree,
    step: int,
    programs: Any,
    found: Evaluation,
    sharp: dict[str, Any],
    meta: dict[str, Any],
) -> dict[str, Any]:
    """What result.json holds of a finished run, but for its speed.

    Args:
      config: The run's configuration.
      state: Its final state.
      step: Steps that it took.
      programs: Its compiled functions.
      found: Its evaluation on the test set.
      sharp: What :func:`otmdr_jax.experiments.measure.sharpness.gap` gave.
      meta: What is saved beside the state.
    """
    each = members.separate(state)
    result = {
        "finished": True,
        **found.metrics,
        "sharpness": sharp["sharpness"],
        "train_nll": sharp["train_nll"],
        "steps": step,
        "epochs": step / programs.steps_per_epoch,
        "skipped_steps": sum(int(member.skipped) for member in each),
        "parameters": sum(
            x.size
            for one in members.predicting(config, state)
            for x in jax.tree.leaves(one.params)
        ),
        "best": meta["best"],
        "mesh": meta["mesh"],
        **environment(),
    }
    if found.members is not None:
        result["members"] = member_rows(config, state, found, sharp, meta)
    if programs.sparsity is not None:
        result["sparsity"] = programs.sparsity(state)
    if record := posterior_record(programs, state, tuple(meta.get("diverged", ()))):
        result["posterior"] = record
    return result
