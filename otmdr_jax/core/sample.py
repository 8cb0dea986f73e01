"""The particles themselves: draws of the worst distribution of weights nearby."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, langevin, loops, rows, sampling, tree, weights
from otmdr_jax.core.batches import NO_BATCH, check_examples
from otmdr_jax.core.checks import check_rho
from otmdr_jax.core.gradient import checked, step_of, suited
from otmdr_jax.core.options import (
    BallOptions,
    LossOptions,
    Map,
    Options,
    ParticleOptions,
    SamplerOptions,
    ShapeOptions,
)
from otmdr_jax.core.samplers import SAMPLERS
from otmdr_jax.core.signatures import with_options

PyTree = Any


class SampleOptions(
    SamplerOptions, ParticleOptions, BallOptions, ShapeOptions, LossOptions, total=False
):
    """Of :func:`sample_particles`."""


class SamplingDiagnostics(NamedTuple):
    """What is known of K particles.

    Attributes:
      center_loss: The loss of the first pass, at the center.
      aux: The auxiliary output of each particle's first pass, with a leading axis of K,
        or None. One pass serves all, but for parts cut at random. It and the losses are
        averaged over the devices of `axis_name`.
      grad_norm: The norm of the gradient there, over the leaves that may move.
      distances: (K,) distance of each particle from the center.
      tilts: (K,) coordinate of each particle along that gradient, in units of the
        (last) radius: 1 for SAM's point, in a ball of whatever shape. With balls of
        their own for each leaf their sum, each by its share of the gradient's norm.
      inverse_temperature: lambda, in units of 1 / loss; None for an ascent, and for
        balls of their own for each leaf.
      energies: (K, S) losses of a Markov chain of S steps: after each step, or with one
        step on each part of the batch before it, on this part. None for other samplers.
      acceptance_rate: (K,) share of the proposals that a chain accepted, or None.
      effective_sample_size: The number of independent draws that all states of all
        chains are worth, judged by their tilts, or None. At the most K S.
    """

    center_loss: jax.Array
    aux: PyTree
    grad_norm: jax.Array
    distances: jax.Array
    tilts: jax.Array
    inverse_temperature: jax.Array | None
    energies: jax.Array | None
    acceptance_rate: jax.Array | None
    effective_sample_size: jax.Array | None


@with_options
def sample_particles(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree = NO_BATCH,
    key: jax.Array | None = None,
    *,
    rho: Any,
    sampler: str = "first_order",
    particle_map: Map = "auto",
    loss_args: tuple[Any, ...] = (),
    **options: Unpack[SampleOptions],
) -> tuple[PyTree, SamplingDiagnostics]:
    r"""Draws particles around weights: models of the worst distribution nearby.

    .. math::
        \gamma^*(w \mid \theta) \propto e^{\lambda L(w)}
        \quad\text{on}\quad \|w - \theta\|_2 \le \rho

    "first_order" draws it exactly for the loss linearised at :math:`\theta`, with one
    gradient for all particles. "langevin" begins there and moves each particle by a
    Metropolis-adjusted Langevin chain of the loss itself, S + 1 gradients a particle;
    for many weights its steps are short, about :math:`\rho / n`. With
    `split="random"` or "ordered" it is the stochastic-gradient form of the paper's
    section 4.1: S parts of the batch, one gradient of B in all, held in the ball.
    "ascent" takes the paper's steps, as :func:`otmdr_jax.value_and_grad` does.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      params: The center :math:`\theta`.
      batch: The batch; may be left out for a loss of the parameters alone.
      key: A PRNG key.
      rho: The radius of the ball in the units of the weights; for "ascent" one radius
        for each step.
      sampler: "first_order", "langevin" or "ascent".
      particle_map: How particles are mapped: "vmap", "scan", "unroll", or "auto", which
        is "vmap" for "first_order", where a particle takes no pass of its own.
      loss_args: Further arguments of the loss.
      **options: Those of :class:`SampleOptions`. `split` is "shared" by default, but
        for "ascent" "random".

    Returns:
      (particles, diagnostics): the parameters with a leading axis of K on each leaf,
      and :class:`SamplingDiagnostics`. Inside shard_map, with `particle_axis_name`,
      those of this device.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.value_and_grad`; neither or both of
        `inverse_temperature` and `tilt`.

    Example:
      >>> import jax, jax.numpy as jnp, otmdr_jax
      >>> def loss_fn(w):
      ...     return jnp.sum(jnp.sin(w))
      >>> particles, seen = otmdr_jax.sample_particles(
      ...     loss_fn, jnp.zeros(3), key=jax.random.key(0),
      ...     rho=0.5, tilt=0.7, num_particles=1000,
      ... )
      >>> particles.shape, bool(seen.distances.max() <= 0.5)
      ((1000, 3), True)
      >>> round(float(seen.tilts.mean()), 1)
      0.7

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023, Theorem 4.2.
    """
    given: dict[str, Any] = {**options, "sampler": sampler}
    if sampler == "first_order" and given.get("split", "shared") != "shared":
        raise ValueError(
            f'split={given["split"]!r} does nothing with sampler="first_order", which '
            "takes one gradient of the whole batch: leave it out."
        )
    if sampler != "ascent":
        given.setdefault("split", "shared")
    made = Options(**given, particle_map=particle_map)
    radii = suited(check_rho(rho), made)
    loss = checked(loss_fn, made.has_aux)
    check_examples(batch)
    if made.cuts:
        loss = rows.only_in_batch(loss, batch)
    axes = collectives.axes_of(made.axis_name)
    if made.weights is not None:
        batch = weights.attach(made.weights, batch, axes)
    params = tree.arrays(params)
    step = step_of(loss, params, batch, loss_args, {}, key, radii, made)

    first = None
    if made.split != "random":
        first = step.ascent_gradient(step.center, step.split(step.keys)[0])

    def one(keys):
        found: Any = SAMPLERS[sampler](step, keys, step.split(keys), first)
        (loss, aux), _ = found.first
        uphill = step.uphill(step.own_gradient(found.first))
        away = step.away(found.params)
        # u T g / ||T g||, where the particle is at rho T u.
        shaped = found.norms[0]
        unit = [g / jnp.where(shaped == 0, 1.0, shaped) for g in uphill]
        tilt = langevin.tilt(away, unit, step.radii[-1])
        means, of_examples = rows.split((loss, aux))
        means = collectives.pmean(means, axes)
        loss, aux = tree.merge(means, of_examples)
        if made.weights is not None:
            loss, aux, _ = weights.settled(loss, aux, loss)
        aux = rows.unmarked(aux)
        seen = loss, aux, tree.norm(uphill), shaped, tree.norm(away), tilt
        return {}, (found.params, seen, found.chain and found.chain[2:])

    how: str = particle_map
    if how == "auto":
        how = "vmap" if sampler == "first_order" else "sequential"
    found = loops.average(one, step.keys, step.num_particles, how)
    _, (particles, seen, chains) = found
    losses, aux, lengths, shaped, distances, tilts = seen
    heat = None
    if sampler != "ascent" and made.norm == "global":
        size = tree.num_coordinates(step.uphill(params))
        strength = sampling.Strength(made.inverse_temperature, made.tilt)
        length = shaped.mean()
        heat = sampling.inverse_temperature_of(strength, radii[0], length, size)
    energies = rate = worth = None
    if not made.random:  # all particles are the same one
        particles, aux, distances, tilts = jax.tree.map(
            lambda x: jnp.repeat(x, made.num_particles, axis=0),
            (particles, aux, distances, tilts),
        )
    if chains is not None:
        energies, along, accepted = chains
        rate = accepted.mean(axis=1)
        worth = langevin.effective_sample_size(along)
    return particles, SamplingDiagnostics(
        losses.mean(),
        aux,
        lengths.mean(),
        distances,
        tilts,
        heat,
        energies,
        rate,
        worth,
    )
