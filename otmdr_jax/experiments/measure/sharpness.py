"""Sharpness: how much the training loss rises around a run's solution.

BatchNorm uses its running statistics. Each independent member is measured by itself; a
posterior is measured at its mean.

`without` names members that have diverged: they do not count in means over members.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from otmdr_jax import landscape, parallel
from otmdr_jax.data import Dataset, Loader, Split
from otmdr_jax.experiments import members
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.members import steps_taken
from otmdr_jax.experiments.methods import weights_of
from otmdr_jax.experiments.options import Seed, check
from otmdr_jax.experiments.prediction import eval_batches
from otmdr_jax.experiments.programs import Programs
from otmdr_jax.io.progress import Progress

PyTree = Any

# The most training images to measure on, evenly spread over the set; of a loader the
# first ones.
NUM_EXAMPLES = 2_000
# Radii of SAM and ASAM for CIFAR-10 (their papers).
RHO, ADAPTIVE_RHO = 0.05, 0.5
# Standard deviation of the noise on one weight; adaptive noise is relative to its size.
NOISE_STD, ADAPTIVE_NOISE_STD = 0.01, 0.1


class Estimate(NamedTuple):
    """One measure of one solution: its value and standard error, or why it has none."""

    value: float | None
    error: float | None
    why: str | None


def gap(
    config: TrainConfig,
    state: PyTree,
    dataset: Dataset,
    programs: Programs,
    *,
    without: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Measures the SAM gap on the training set.

    Args:
      config: The run's configuration.
      state: Its state.
      dataset: The data.
      programs: Compiled functions.
      without: Indices of the members that have diverged.

    Returns:
      `sharpness` (the gap at rho = 0.05) and `train_nll`, both in nats. For independent
      members they are means, and `member_sharpness` lists the gap of each member.
    """
    found = [
        landscape.sam_gap(loss_sum, weights, batches, RHO)
        for loss_sum, weights, batches in _members(config, state, dataset, programs)
    ]
    kept = [x for i, x in enumerate(found) if i not in without] or found
    result: dict[str, Any] = {
        "sharpness": float(np.mean([x.gap for x in kept])),
        "train_nll": float(np.mean([x.loss for x in kept])),
    }
    if len(found) > 1:
        result["member_sharpness"] = [x.gap for x in found]
    return result


def measure(
    config: TrainConfig,
    state: PyTree,
    dataset: Dataset,
    programs: Programs,
    *,
    without: tuple[int, ...] = (),
    num_examples: int = NUM_EXAMPLES,
    num_eigenvalues: int = 1,
    num_probes: int = 30,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Takes every measure of :mod:`otmdr_jax.landscape` on the training set.

    Args:
      config: The run's configuration.
      state: Its state.
      dataset: The data.
      programs: Compiled functions.
      without: Indices of the members that have diverged.
      num_examples: Largest number of training images, evenly spread over the set.
      num_eigenvalues: Number of the Hessian's largest eigenvalues.
      num_probes: Number of probes of the Hessian's trace, and of directions for average
        sharpness.
      seed: Seed of the probes and directions.
      show_progress: Whether to show progress.

    Returns:
      A record: `step`, `split`, `num_examples`, `seed` and `measures`. Each measure has
      a `name`, a `value`, a `standard_error` (None if nothing is random) and, for
      independent members, the `values` of each. If it cannot be measured, the value is
      None and `why` says the reason. Losses and gaps are in nats.

    Raises:
      ValueError: A number is below 1, or there are fewer than 2 probes.
    """
    check("seed", seed, Seed)
    if num_examples < 1 or num_eigenvalues < 1 or num_probes < 2:
        raise ValueError(
            "num_examples and num_eigenvalues must be at least 1, num_probes 2; got "
            f"{num_examples}, {num_eigenvalues} and {num_probes}."
        )
    every = list(_members(config, state, dataset, programs, num_examples))
    # A member that has diverged has no sharpness.
    counted = [i for i in range(len(every)) if i not in without]
    found: dict[int, dict[str, Estimate]] = {}
    total = len(counted) * (8 + num_eigenvalues)  # the number of names in `_measures`
    with Progress(total, 0, "sharpness", show_progress, "measures") as bar:
        for i in counted:
            # Each member draws its own directions, so that estimates are independent.
            key = jax.random.fold_in(jax.random.key(seed), i)
            found[i] = {}
            for names, function in _measures(num_eigenvalues, num_probes, key):
                found[i] |= _estimate(names, function, every[i])
                done = sum(len(x) for x in found.values())
                bar.update(done, {})
    rows = []
    for name in next(iter(found.values()), {}):
        estimates = [one[name] for one in found.values()]
        rows.append({"name": name, **_mean_of(estimates)})
        if len(every) > 1:
            rows[-1]["values"] = [
                found[i][name].value if i in found else None for i in range(len(every))
            ]
    return {
        "step": steps_taken(state),
        "split": "train",
        "num_examples": min(num_examples, dataset.train.num_examples),
        "seed": seed,
        "measures": rows,
    }


def _estimate(names, function, solution) -> dict[str, Estimate]:
    """Takes one measure. If it fails, its estimates say why and the others go on."""
    try:
        pairs = function(*solution)
    except (ValueError, RuntimeError) as error:  # not finite, or not converged
        return {name: Estimate(None, None, str(error)) for name in names}
    found = {}
    for name, (value, spread) in zip(names, pairs, strict=True):
        known = math.isfinite(value)
        why = None if known else "it is not finite"
        found[name] = Estimate(value if known else None, spread, why)
    return found


def _mean_of(estimates: list[Estimate]) -> dict[str, Any]:
    whys = [x.why for x in estimates if x.why]
    if whys:
        return {"value": None, "standard_error": None, "why": whys[0]}
    errors = [x.error for x in estimates if x.error is not None]
    return {
        "value": float(np.mean([x.value for x in estimates])),
        # The standard error of the mean of independent estimates.
        "standard_error": math.hypot(*errors) / len(estimates) if errors else None,
    }


def _measures(num_eigenvalues, num_probes, key):
    """Lists (names, (loss_sum, weights, batches) -> [(value, error or None)])."""

    def gap_at(adaptive):
        rho = ADAPTIVE_RHO if adaptive else RHO

        def of(loss_sum, weights, batches):
            found = landscape.sam_gap(
                loss_sum, weights, batches, rho, adaptive=adaptive
            )
            loss = [] if adaptive else [(found.loss, None)]
            return [*loss, (found.gap, None)]

        return of

    def worst(adaptive):
        rho = ADAPTIVE_RHO if adaptive else RHO

        def of(loss_sum, weights, batches):
            found = landscape.worst_in_ball(
                loss_sum, weights, batches, rho, adaptive=adaptive
            )
            return [(found.gap, None)]

        return of

    def average(adaptive):
        std = ADAPTIVE_NOISE_STD if adaptive else NOISE_STD

        def of(loss_sum, weights, batches):
            found = landscape.average_sharpness(
                loss_sum,
                weights,
                batches,
                std,
                key=key,
                num_directions=num_probes,
                adaptive=adaptive,
            )
            return [(found.gap, found.standard_error)]

        return of

    def eigenvalues(loss_sum, weights, batches):
        found = landscape.hessian_eigenvalues(
            loss_sum, weights, batches, num_eigenvalues
        )
        return [(float(value), None) for value in found.values]

    def trace(loss_sum, weights, batches):
        found = landscape.hessian_trace(
            loss_sum, weights, batches, key=key, num_probes=num_probes
        )
        return [(found.value, found.standard_error)]

    numbers = [f"hessian_eigenvalue_{i + 1}" for i in range(num_eigenvalues)]
    return [
        (["train_nll", "sam_gap"], gap_at(False)),
        (["adaptive_sam_gap"], gap_at(True)),
        (["worst_in_ball"], worst(False)),
        (["adaptive_worst_in_ball"], worst(True)),
        (["average"], average(False)),
        (["adaptive_average"], average(True)),
        (numbers, eigenvalues),
        (["hessian_trace"], trace),
    ]


def _members(config, state, dataset, programs, num_examples=NUM_EXAMPLES):
    """Yields (loss_sum, weights, batches) of every member that has its own loss."""
    train = dataset.train
    if isinstance(train, Loader):
        part = train.first(num_examples)
    else:
        chosen = np.linspace(
            0, train.num_examples - 1, min(train.num_examples, num_examples)
        ).astype(int)
        part = Split(train.images[chosen], train.labels[chosen])
    mesh, size = programs.mesh, min(config.run.eval_batch_size, part.num_examples)
    batches = [
        parallel.place(batch, mesh, parallel.data_spec(mesh))
        for batch in eval_batches(size, part, mesh)
    ]
    if not config.method.is_fitted:  # a fitted Gaussian keeps the trained weights
        state = config.method.finalize(config, state, dataset, programs)
    for i, member in enumerate(members.predicting(config, state)):
        loss_sum = programs.loss_sums[i % len(programs.loss_sums)]
        with_state = [(*batch, member.model_state) for batch in batches]
        yield loss_sum, weights_of(member.params), with_state
