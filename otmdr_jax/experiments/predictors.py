"""What predicts: the weight vectors behind a prediction, with their statistics.

Of most runs these are the weights that they train. Some collect members on the way, or
average their weights; averages need BatchNorm statistics of their own before they
predict, Laplace approximations the curvature. The methods themselves know how
(:mod:`otmdr_jax.experiments.methods.collected`).
"""

from typing import Any

import numpy as np

from otmdr_jax.data import Dataset
from otmdr_jax.experiments import members
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods.collected import Laplace, number
from otmdr_jax.experiments.programs import Programs

PyTree = Any


def finalize(
    config: TrainConfig, state: PyTree, dataset: Dataset, programs: Programs
) -> PyTree:
    """A state to predict with: BatchNorm statistics of averaged weights, or a Gaussian.

    Args:
      config: The run's configuration; `batchnorm_examples`, or `laplace_examples`,
        bounds the examples.
      state: Its state.
      dataset: The data.
      programs: Compiled functions.

    Returns:
      The state itself where there is nothing to do: for most methods, before the first
      average, and for a state that comes from here.
    """
    return config.method.finalize(config, state, dataset, programs)


def is_fitted(config: TrainConfig) -> bool:
    """Whether predictions are of a Gaussian fitted to weights that it does not change.

    Args:
      config: The run's configuration.
    """
    return isinstance(config.method, Laplace)


def fitted_record(config: TrainConfig, state: PyTree) -> dict[str, float]:
    """What is logged of Laplace approximations; nothing of other methods.

    Args:
      config: The run's configuration.
      state: Its state.

    Returns:
      prior_precision and effective_parameters, of an ensemble means over members.
    """
    method = config.method
    if not isinstance(method, Laplace) or not (found := method.posteriors(state)):
        return {}
    return {
        name: float(np.mean(np.hstack([np.asarray(getattr(x, name)) for x in found])))
        for name in ("prior_precision", "effective_parameters")
    }


def trained(config: TrainConfig, state: PyTree) -> list[PyTree]:
    """The weights of each trained member as a state of its own: of averages the mean.

    Args:
      config: The run's configuration.
      state: Its state, finalized where it needs to be.
    """
    method = config.method
    return [method.trained(member) for member in members.separate(state)]


def every(config: TrainConfig, state: PyTree) -> list[PyTree]:
    """The same as :func:`trained`, but of a run that collects what it has collected."""
    if collected(config, state):
        return config.method.collected(state)
    return trained(config, state)


def collected(config: TrainConfig, state: PyTree) -> int:
    """How many members a run of one model has collected; 0 of other runs."""
    if config.model.members is not None or not config.method.collects:
        return 0
    return number(state.method_state.number)
