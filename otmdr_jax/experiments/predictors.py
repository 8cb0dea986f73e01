"""What predicts: the weight vectors behind a prediction, with their statistics.

Of most runs these are the weights that they train. Some collect members on the way, or
average their weights (:mod:`otmdr_jax.baselines`); averages need BatchNorm statistics
of their own before they predict, Laplace approximations the curvature.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax import baselines, parallel
from otmdr_jax.data import Dataset, Split, eval_batches
from otmdr_jax.experiments import members
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods import AVERAGING, COLLECTING, FITTED
from otmdr_jax.experiments.programs import Programs

PyTree = Any


def settle(
    config: TrainConfig, state: PyTree, dataset: Dataset, programs: Programs
) -> PyTree:
    """A state to predict with: BatchNorm statistics of averaged weights, or a Gaussian.

    The mean over batches of the training set, in an order and with augmentation of
    their own, of the batches' statistics at the weights that predict: what the
    `bn_update` of SWA's authors computes. One forward pass for each batch and weight
    vector; the same numbers on any mesh, where each batch is one. Of a Laplace
    approximation the curvature at the trained weights: a forward pass over the training
    set, without augmentation; of its diagonal a backward pass for each class as well.

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
    if programs.batch_statistics is None or programs.settle is None:
        return state
    if config.method in FITTED:
        return _fitted(config, state, dataset, programs)
    each = [state] if hasattr(state, "step") else state
    kept = each[0].method_state
    # Members of several architectures may have BatchNorm or not.
    if kept.statistics is not None or not jax.tree.leaves(
        [member.model_state for member in each]
    ):
        return state
    if not _number(kept.number):
        return state
    images = dataset.train.images
    wanted = min(config.batchnorm_examples or len(images), len(images))
    size = min(config.batch_size, wanted)
    devices = parallel.axis_size(programs.mesh, "data")
    size = max(size // devices, 1) * devices
    order = np.random.default_rng(config.seed).permutation(len(images))
    # Neither of the two keys that a run has: see programs.run_keys.
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    count = max(wanted // size, 1)
    total = None
    for i in range(count):
        rows = order[i * size : (i + 1) * size]
        batch = np.asarray(images[rows])
        batch = parallel.place(batch, programs.mesh, parallel.data_spec(programs.mesh))
        found = programs.batch_statistics(state, batch, jax.random.fold_in(key, i))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return programs.settle(state, jax.tree.map(lambda x: x / count, total))


def _fitted(config, state, dataset, programs):
    """The Gaussian of a Laplace approximation, from sums over the training set."""
    if posteriors(config, state):
        return state
    total = None
    examples, devices = dataset.train, parallel.axis_size(programs.mesh, "data")
    count = examples.num_examples
    wanted = min(config.laplace_examples or count, count)
    if wanted < count:
        rows = np.random.default_rng(config.seed).permutation(count)[:wanted]
        rows.sort()
        examples = Split(np.asarray(examples.images[rows]), examples.labels[rows])
    size = -(-min(config.eval_batch_size, wanted) // devices) * devices
    for images, _, mask in eval_batches(examples, size):
        batch = parallel.place(
            (images, mask), programs.mesh, parallel.data_spec(programs.mesh)
        )
        found = programs.batch_statistics(state, batch, jax.random.key(0))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return programs.settle(state, jax.tree.map(lambda x: x * (count / wanted), total))


def posteriors(config: TrainConfig, state: PyTree) -> list[Any]:
    """The :class:`otmdr_jax.baselines.LaplacePosterior` of each member.

    Args:
      config: The run's configuration.
      state: Its state.

    Returns:
      None of them for other methods, and for a state that is not settled.
    """
    if config.method not in FITTED:
        return []
    found = [member.method_state for member in members.separate(state)]
    return [one for one in found if one is not None]


def fitted_record(config: TrainConfig, state: PyTree) -> dict[str, float]:
    """What is logged of Laplace approximations; nothing of other methods.

    Args:
      config: The run's configuration.
      state: Its state.

    Returns:
      prior_precision and effective_parameters, of an ensemble means over members.
    """
    found = posteriors(config, state)
    names = ("prior_precision", "effective_parameters") if found else ()
    return {
        name: float(np.mean([np.asarray(getattr(one, name)) for one in found]))
        for name in names
    }


def trained(config: TrainConfig, state: PyTree) -> list[PyTree]:
    """The weights of each trained member as a state of its own: of averages the mean.

    Args:
      config: The run's configuration.
      state: Its state, settled where it needs to be.
    """
    each = members.separate(state)
    if config.method in AVERAGING:
        return [baselines.moments_of(member) for member in each]
    return each


def every(config: TrainConfig, state: PyTree) -> list[PyTree]:
    """The same as :func:`trained`, but of a run that collects what it has collected."""
    if collected(config, state):
        return baselines.members(state)
    return trained(config, state)


def collected(config: TrainConfig, state: PyTree) -> int:
    """How many members a run of one model has collected; 0 of other runs."""
    if config.members is not None or config.method not in COLLECTING:
        return 0
    return _number(state.method_state.number)


def _number(x):
    """The first entry of an array that may be spread over hosts."""
    return int(np.ravel(x.addressable_data(0))[0])
