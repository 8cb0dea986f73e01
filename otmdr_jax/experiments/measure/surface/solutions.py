"""A trained run as a weight vector, and its loss as a function of the weights."""

import functools
import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax import data as data_lib
from otmdr_jax import landscape
from otmdr_jax.core import tree
from otmdr_jax.data import Split
from otmdr_jax.experiments import (
    building,
    checkpoint,
    members,
    methods,
    restore,
    run_folder,
)
from otmdr_jax.experiments.measure.surface.plan import Plan
from otmdr_jax.experiments.members import steps_taken
from otmdr_jax.experiments.programs import loss_sum
from otmdr_jax.experiments.trained_run import TrainedRun

PyTree = Any


class Solution(NamedTuple):
    """A run as one weight vector.

    Attributes:
      run: The run at its checkpoint.
      members: Indices of the members: one, or all that have not diverged.
      network: The network of these members: a model of the zoo, or a joint one.
      step: Number of training steps.
      weights: The weight vector; for a posterior its mean.
      model_state: BatchNorm's running statistics.
    """

    run: TrainedRun
    members: tuple[int, ...]
    network: Any
    step: int
    weights: PyTree
    model_state: PyTree


def open_solution(
    folder: str | os.PathLike, plan: Plan, data_dir: str | None = None
) -> Solution:
    """Loads a run as one weight vector.

    Args:
      folder: The run's folder.
      plan: Plan that names the checkpoint, the member and the split.
      data_dir: Folder of prepared TFDS data, if it has moved since the run.

    Raises:
      FileNotFoundError: The folder is no run, or has no such checkpoint.
      ValueError: The run has no such split, checkpoint or member.
    """
    run_folder.check_classes(folder, "a landscape of a run")
    given: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    run = restore.open_run(
        folder, plan.checkpoint, split=plan.split, predicts=False, **given
    )
    config = run.config
    count = len(config.model.member_names) if config.model.members is not None else 1
    chosen: Sequence[int] = [m for m in range(count) if m not in run.diverged]
    if plan.member is not None:
        if config.model.members is None:
            raise ValueError(f"{folder} is a single model: leave --member out.")
        if not 0 <= plan.member < count:
            raise ValueError(
                f"{folder} has the members 0 to {count - 1}, got --member "
                f"{plan.member}."
            )
        chosen = [plan.member]
    chosen = tuple(chosen or range(count))
    separate = config.replace(ensemble="independent")
    # Without dropout: the loss is a function of the weights alone.
    classes, own = run.dataset.num_classes, run.programs.own
    networks = building.networks(separate, classes, drops=False, own=own)
    if not config.model.stacked:
        networks = tuple(networks[m] for m in chosen)
    network: Any = networks[0]
    if len(chosen) > 1:
        network = members.JointModel(networks, len(chosen), config.model.member_map)
    weights, model_state = weights_of(run, run.state, chosen)
    return Solution(run, chosen, network, steps_taken(run.state), weights, model_state)


def weights_of(
    run: TrainedRun, state: PyTree, chosen: Sequence[int]
) -> tuple[PyTree, PyTree]:
    """Returns the weights of members in a state, and their BatchNorm statistics.

    Args:
      run: The run.
      state: Its state at any checkpoint.
      chosen: Indices of the members. Several members of one architecture are stacked;
        of different architectures they form a tuple, as in
        :class:`otmdr_jax.experiments.members.JointModel`.
    """
    every = [
        (methods.weights_of(params), model_state)
        for params, model_state in members.weights(run.config, state)
    ]
    if len(chosen) == 1:
        return every[chosen[0]]
    weights, model_states = zip(*(every[m] for m in chosen), strict=True)
    return _join(run, weights), _join(run, model_states)


def random_directions(solution: Solution, seed: int, count: int) -> list[PyTree]:
    """Draws filter-normalised random directions, at the scale of each member's filters.

    Args:
      solution: The solution; each of its members gets its own direction.
      seed: Seed; use the same one for solutions that are to be compared.
      count: Number of directions.
    """
    root = jax.random.key(seed)
    axis_of = getattr(solution.network, "models", (solution.network,))[0]
    draw = functools.partial(
        landscape.random_direction, filter_axis=getattr(axis_of, "filter_axis", -1)
    )
    found = []
    for axis in range(count):
        key = jax.random.fold_in(root, axis)
        if len(solution.members) == 1:
            found.append(draw(solution.weights, key))
            continue
        each = [
            draw(
                weights_of(solution.run, solution.run.state, [m])[0],
                jax.random.fold_in(key, m),
            )
            for m in solution.members
        ]
        found.append(_join(solution.run, each))
    return found


def checkpoints_of(solution: Solution, dimensions: int) -> tuple[list[int], list]:
    """Returns steps and weights of a run's checkpoints, up to the solution's own.

    Raises:
      ValueError: There are too few checkpoints.
    """
    run = solution.run
    weights = []
    with checkpoint.Checkpoints(run.folder / "checkpoints", read_only=True) as saved:
        steps = [step for step in saved.steps() if step <= solution.step]
        if len(steps) <= dimensions:
            raise ValueError(
                f"a trajectory of {dimensions} dimensions needs at least "
                f"{dimensions + 1} checkpoints, but {run.folder} holds those of steps "
                f"{steps}: train with --keep-checkpoints 100 and --checkpoint-every "
                "STEPS, where STEPS is a tenth of the run or less."
            )
        template = restore.template(run.config, run.programs)
        for step in steps:
            state = saved.restore(template, step).state
            # Kept on the host, so that the device need not hold the whole trajectory.
            own, _ = weights_of(run, state, solution.members)
            weights.append(jax.device_get(own))
    return steps, weights


def examples(solution: Solution, split: str, num_examples: int) -> Split:
    """Returns at most `num_examples` examples of a split, evenly spread."""
    data: Split = getattr(solution.run.dataset, split)
    count = min(data.num_examples, num_examples)
    rows = np.linspace(0, data.num_examples - 1, count).astype(int)
    return Split(data.images[rows], data.labels[rows])


def objective(
    solution: Solution, split: str, num_examples: int, anew: bool
) -> tuple[Any, list[Any], int]:
    """Returns the loss as a function of weights, its batches, and their total size.

    Args:
      solution: The solution.
      split: Part of the data.
      num_examples: Largest number of examples, evenly spread.
      anew: Whether BatchNorm computes its statistics from these examples at each point;
        they then form one batch.
    """
    run = solution.run
    part = examples(solution, split, num_examples)
    count = part.num_examples
    size = count if anew else min(count, run.config.run.eval_batch_size)
    batches = [
        (*map(jnp.asarray, batch), solution.model_state)
        for batch in data_lib.eval_batches(part, size)
    ]
    mean, std, own = run.dataset.mean, run.dataset.std, run.programs.own
    classes = run.programs.classes
    function = loss_sum(solution.network, mean, std, anew, own.loss, classes)
    return function, batches, count


def checksum(*solutions: PyTree) -> int:
    """Returns a checksum of arrays, such as weights."""
    found = 0
    for leaf in jax.tree.leaves(solutions):
        found = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), found)
    return found


def _join(run, each):
    return tree.stack(list(each)) if run.config.model.stacked else tuple(each)
