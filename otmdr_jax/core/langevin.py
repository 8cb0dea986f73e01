r"""Markov chains whose limit is gamma* of the loss itself (Theorem 4.2).

A chain of displacements d = w - theta with proposals

    d' = d + h^2 / 2 lambda grad L(theta + d) + h xi,        xi ~ N(0, I)

:func:`metropolis` is MALA: a proposal outside of the ball is rejected, one inside by
the ratio of Metropolis and Hastings, so that the limit is gamma* for any h.
:func:`projected` takes each gradient on another part of the batch, and what leaves the
ball back to its surface: as cheap as steps of ascent, and biased (docs/theory.md).

Displacements are lists of arrays, one for each leaf that moves, in float32 or wider
whatever the weights are: small steps in bfloat16 would be none.

Reference: Roberts & Tweedie, `Exponential convergence of Langevin distributions
<https://doi.org/10.2307/3318418>`_, 1996; Welling & Teh, 2011 (SGLD).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, tree
from otmdr_jax.core.ascent import noise

Away = list[jax.Array]
# d -> (what the loss returned there, its value, the direction uphill).
Pass = Callable[[Away], tuple[Any, jax.Array, Away]]


class Chain(NamedTuple):
    """Where a chain is after S steps, and what it saw.

    Attributes:
      away: The displacement.
      found: What the loss returned there; None where it was not asked.
      energies: (S,) losses: after each step of :func:`metropolis`, before each one of
        :func:`projected`.
      tilts: (S,) coordinates of d along the gradient at the center, in units of rho.
      accepted: (S,) whether each proposal was accepted.
    """

    away: Away
    found: Any
    energies: jax.Array
    tilts: jax.Array
    accepted: jax.Array


def metropolis(
    at: Pass,
    away: Away,
    key: jax.Array,
    rho: jax.typing.ArrayLike,
    *,
    num_steps: int,
    inverse_temperature: jax.typing.ArrayLike,
    step_size: jax.typing.ArrayLike,
    along: Away,
) -> Chain:
    """MALA on the ball.

    Args:
      at: The loss and its gradient, on one batch; equal on devices that share a chain.
      away: The displacement to begin with, inside of the ball.
      key: A PRNG key.
      rho: The radius of the ball.
      num_steps: S, the number of proposals.
      inverse_temperature: lambda, finite.
      step_size: h, in the units of the weights.
      along: The unit vector that `Chain.tilts` are taken along.

    Returns:
      The chain. A loss that is NaN inside of the ball is accepted, so that a guard
      further on can see it.
    """

    def reach(away):
        found, loss, uphill = at(away)
        return found, loss, _pull(uphill, inverse_temperature)

    def step(state, key):
        away, (_, loss, pull) = state
        for_noise, for_choice = jax.random.split(key)
        new = _proposal(away, pull, for_noise, step_size)
        reached = reach(new)
        _, new_loss, new_pull = reached
        # log of gamma*(d') q(d | d') / gamma*(d) q(d' | d), its large terms cancelled
        # by hand: for a linear loss it is 0.
        moved = [x - y for x, y in zip(new, away, strict=True)]
        both = [x + y for x, y in zip(pull, new_pull, strict=True)]
        rise = inverse_temperature * (new_loss - loss) - 0.5 * inner(moved, both)
        steeper = inner(pull, pull) - inner(new_pull, new_pull)
        ratio = rise + step_size * step_size / 8 * steeper
        chosen = jnp.log1p(-jax.random.uniform(for_choice)) <= ratio
        accepted = (tree.norm(new) <= rho) & (chosen | jnp.isnan(ratio))
        state = jax.tree.map(
            lambda x, y: jnp.where(accepted, x, y), (new, reached), state
        )
        away, (_, loss, _) = state
        return state, (loss, tilt(away, along, rho), accepted)

    start = away, reach(away)
    keys = jax.random.split(key, num_steps)
    (away, (found, _, _)), seen = collectives.scan(step, start, keys)
    return Chain(away, found, *seen)


def projected(
    passes: Sequence[Pass],
    away: Away,
    key: jax.Array,
    rho: jax.typing.ArrayLike,
    *,
    inverse_temperature: jax.typing.ArrayLike,
    step_size: jax.typing.ArrayLike,
    along: Away,
) -> Chain:
    """A chain of one step for each of S parts of a batch, held in the ball.

    Args:
      passes: The loss and its gradient on each of the parts.
      away: The displacement to begin with.
      key: A PRNG key.
      rho: The radius of the ball.
      inverse_temperature: lambda, finite.
      step_size: h, in the units of the weights.
      along: The unit vector that `Chain.tilts` are taken along.

    Returns:
      The chain; each of its energies is that before the step, on the step's part.
    """
    energies, tilts = [], []
    for s, at in enumerate(passes):
        _, loss, uphill = at(away)
        pull = _pull(uphill, inverse_temperature)
        away = _proposal(away, pull, jax.random.fold_in(key, s), step_size)
        away = onto_ball(away, rho)
        energies.append(loss)
        tilts.append(tilt(away, along, rho))
    accepted = jnp.ones(len(energies), bool)
    return Chain(away, None, jnp.stack(energies), jnp.stack(tilts), accepted)


def onto_ball(away: Any, rho: jax.typing.ArrayLike) -> Any:
    """The nearest displacement whose norm is rho at the most."""
    length = tree.norm(away)
    factor = jnp.where(length > rho, rho / jnp.where(length == 0, 1.0, length), 1.0)
    return jax.tree.map(lambda x: x * factor, away)


def inner(x: Away, y: Away) -> jax.Array:
    """The inner product, of complex numbers as pairs of real ones."""
    products = [jnp.sum(jnp.real(a * jnp.conj(b))) for a, b in zip(x, y, strict=True)]
    return sum(products, start=jnp.zeros(()))


def tilt(away: Away, along: Away, rho: jax.typing.ArrayLike) -> jax.Array:
    """The coordinate along a unit vector in units of the radius; 0 for a ball of 0."""
    return inner(away, along) / jnp.where(jnp.asarray(rho) == 0, 1.0, rho)


def effective_sample_size(values: jax.Array) -> jax.Array:
    """How many independent draws have a mean as exact as that of these chains.

    Args:
      values: (K, S) a number of each of S states of K chains.

    Returns:
      K S / tau, a scalar: tau is Geyer's estimate of the time of autocorrelation, the
      sum over pairs of lags up to the first that is negative. At the most K S; that
      also of chains that never move, which tell nothing of it.

    Reference: Geyer, `Practical Markov chain Monte Carlo
    <https://doi.org/10.1214/ss/1177011137>`_, 1992; Gelman et al., Bayesian Data
    Analysis, third edition, section 11.5, for several chains.

    Example:
      >>> import jax
      >>> from otmdr_jax.core import langevin
      >>> independent = jax.random.normal(jax.random.key(0), (4, 100))
      >>> 200 < float(langevin.effective_sample_size(independent)) <= 400
      True
    """
    chains, steps = values.shape
    centered = values - values.mean(axis=1, keepdims=True)
    padded = jnp.fft.rfft(centered, 2 * steps, axis=1)
    covariances = jnp.fft.irfft(padded * jnp.conj(padded), 2 * steps, axis=1)
    covariances = covariances[:, :steps].mean(axis=0) / steps
    within = covariances[0] * steps / max(steps - 1, 1)
    between = jnp.var(values.mean(axis=1), ddof=1) if chains > 1 else 0.0
    total = within * (steps - 1) / steps + between
    rest = within - covariances * steps / max(steps - 1, 1)
    correlations = 1 - rest / jnp.where(total == 0, 1.0, total)
    pairs = correlations[: steps // 2 * 2].reshape(-1, 2).sum(axis=1)
    until = jnp.cumprod(pairs > 0)
    falling = jax.lax.cummin(pairs)
    time = jnp.maximum(2 * jnp.sum(jnp.where(until, falling, 0.0)) - 1, 1.0)
    return jnp.where(total == 0, 1.0, 1.0 / time) * chains * steps


def _pull(uphill, inverse_temperature):
    """The gradient times lambda: the products of one alone may be out of range."""
    return [(inverse_temperature * g).astype(g.dtype) for g in uphill]


def _proposal(away, pull, key, h):
    drawn = noise(key, dict(enumerate(away)))
    return [
        (x + 0.5 * h * h * g + h * drawn[i]).astype(x.dtype)
        for i, (x, g) in enumerate(zip(away, pull, strict=True))
    ]
