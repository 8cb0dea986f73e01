"""The result of a finished run, as an object and as result.json."""

import math
import pathlib
import statistics
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.data import Dataset
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure.evaluation import RunEvaluation
from otmdr_jax.experiments.measure.record import record_of
from otmdr_jax.experiments.programs import Programs

PyTree = Any


class Result(NamedTuple):
    """The result of a run.

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

    def __repr__(self) -> str:
        """The numbers in one line; weights and predictions would fill the screen."""
        names = ("accuracy", "nll", "ece", "steps")
        shown = [f"{x}={self.metrics[x]:.4g}" for x in names if x in self.metrics]
        return f"Result({', '.join(shown)}, folder={str(self.folder)!r})"


def final_result(
    config: TrainConfig,
    of_run: RunEvaluation,
    dataset: Dataset,
    programs: Programs,
    meta: dict[str, Any],
) -> dict[str, Any]:
    """Makes the content of a finished run's result.json.

    Args:
      config: The run's configuration.
      of_run: Its evaluation after the last step.
      dataset: Its data.
      programs: Its compiled functions.
      meta: The record that is saved beside the state.
    """
    result = {"finished": True, **record_of(config, of_run, dataset, programs)}
    result["epochs"] = result["steps"] / programs.steps_per_epoch
    speeds = meta["speeds"]
    result["seconds_per_step"] = statistics.median(speeds) if speeds else math.nan
    if programs.sparsity is not None:
        result["sparsity"] = programs.sparsity(of_run.state)
    return result | {"best": meta["best"], "mesh": meta["mesh"]}
