r"""The worst inner distribution itself: Theorem 4.2 for a loss that is linear nearby.

    gamma*(w | theta)  proportional to  exp(lambda L(w))   on ||w - theta||_2 <= rho

With L(w) = L(theta) + <g, w - theta> it can be drawn exactly, of one gradient. Let n be
the number of weights, kappa = lambda rho ||g|| and u = (w - theta) / rho. The
coordinate t of u along g has a density proportional to exp(kappa t)
(1 - t^2)^((n - 1) / 2) on [-1, 1]; the rest of u is uniform in the ball of radius
sqrt(1 - t^2) that is orthogonal to g. That is the von Mises-Fisher distribution on the
unit sphere of n + 2 dimensions without its last two coordinates: Wood's rejection
sampler gives t, normal numbers give the rest.

kappa = 0 is the uniform distribution in the ball, random weight perturbation; kappa to
infinity is the point of SAM. What a given lambda does depends on n, so that it may be
given as the tilt E[t] = I_(n/2+1)(kappa) / I_(n/2)(kappa) instead, which is 0 for the
one and 1 for the other.

Reference: Nguyen et al., 2023, Theorem 4.2; Wood, `Simulation of the von Mises Fisher
distribution <https://doi.org/10.1080/03610919408813161>`_, 1994.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core import tree
from otmdr_jax.core.ascent import Metric, noise, sphere

PyTree = Any

# Wood's sampler accepts a proposal with a probability of 0.68 at the least, over all n
# and kappa: that none of these is accepted happens once in 10^15 draws.
_PROPOSALS = 32
# Steps of the two iterations for E[t]: with these it is right to float32's rounding.
_BACKWARD, _FIXED_POINT = 24, 8


class Strength(NamedTuple):
    """How much the worse weights are preferred: one of the two is given.

    Attributes:
      inverse_temperature: lambda, in 1 / nats; 0 to infinity.
      tilt: E[t], 0 to 1.
    """

    inverse_temperature: jax.typing.ArrayLike | None = None
    tilt: jax.typing.ArrayLike | None = None


def draw(
    params: PyTree,
    grads: PyTree,
    rho: jax.typing.ArrayLike,
    key: jax.Array,
    *,
    strength: Strength,
    metric: Metric = sphere,
    norm: str = "global",
    mask: PyTree | None = None,
) -> tuple[PyTree, jax.Array]:
    """Draws weights of the linearised loss's gamma*, exactly.

    Args:
      params: The weights theta, a pytree of inexact arrays.
      grads: The gradient g at theta, of the same structure.
      rho: The radius of the ball, a scalar in the units of the weights.
      key: A PRNG key.
      strength: lambda, or the tilt.
      metric: T, which makes the ball an ellipsoid: theta + T u, with u drawn for T g.
      norm: "global", one ball of all weights, or "per_leaf", one of each leaf.
      mask: A pytree of bools, True where a leaf is perturbed; None for everywhere.

    Returns:
      The weights drawn, of the dtypes of `params`, and the norm ||T g||_2 over the
      perturbed leaves. A zero gradient gives the uniform distribution, but at an
      infinite lambda moves nothing, as in SAM; a non-finite one makes the result NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax.core import sampling
      >>> w, g = jnp.zeros(2), jnp.array([3.0, 4.0])
      >>> sam = sampling.Strength(tilt=1.0)
      >>> moved, length = sampling.draw(w, g, 0.5, jax.random.key(0), strength=sam)
      >>> moved.round(4).tolist(), float(length)
      ([0.29..., 0.39...], 5.0)
    """
    w, treedef = jax.tree.flatten(params)
    moving = [True] * len(w) if mask is None else jax.tree.leaves(mask)
    t = jax.tree.leaves(metric(params, grads))
    tg = [
        ti * gi.astype(tree.accumulation_dtype(gi))
        for ti, gi in zip(t, jax.tree.leaves(grads), strict=True)
    ]
    moved = [i for i, m in enumerate(moving) if m]
    new = list(w)
    for_balls, for_leaves = jax.random.split(key)
    balls = {i: [i] for i in moved} if norm == "per_leaf" else {0: moved}
    for number, ball in balls.items():
        keys = jax.random.fold_in(for_balls, number), for_leaves
        units = _in_ball({i: tg[i] for i in ball}, rho, keys, strength)
        for i, unit in units.items():
            new[i] = w[i] + rho * (t[i] * unit)
    total = tree.norm([tg[i] for i in moved])
    return tree.like(jax.tree.unflatten(treedef, new), params), total


def inverse_temperature_of(
    strength: Strength, rho: jax.typing.ArrayLike, length: jax.Array, size: int
) -> jax.Array:
    """The lambda of a strength, kappa / (rho ||g||), from the norm ||g|| and n."""
    if strength.tilt is None:
        return jnp.asarray(strength.inverse_temperature)
    reach = jnp.asarray(rho) * length
    kappa = concentration(strength.tilt, size)
    return jnp.where(reach == 0, 0.0, kappa / jnp.where(reach == 0, 1.0, reach))


def mean_tilt(kappa: jax.typing.ArrayLike, size: int) -> jax.Array:
    """E[t], the mean of the coordinate along the gradient, in units of the radius.

    Args:
      kappa: lambda rho ||g||, a scalar from 0 to infinity.
      size: n, the number of weights.

    Returns:
      I_(n/2+1)(kappa) / I_(n/2)(kappa), a float32 scalar (or wider) from 0 to 1.

    Example:
      >>> import math
      >>> from otmdr_jax.core import sampling
      >>> float(sampling.mean_tilt(2.0, 1)), 1 / math.tanh(2.0) - 1 / 2.0
      (0.537..., 0.537...)
    """
    kappa = jnp.asarray(kappa, jnp.result_type(float))
    # Backwards in the order v: I_(v+1) / I_v = 1 / (2 (v + 1) / kappa + I_(v+2) /
    # I_(v+1)), from a bound that is close where v is large or kappa is.
    ratio = _bound(kappa, size / 2 + _BACKWARD)
    for v in range(_BACKWARD - 1, -1, -1):
        ratio = 1 / ((size + 2 * v + 2) / kappa + ratio)
    return ratio


def concentration(tilt: jax.typing.ArrayLike, size: int) -> jax.Array:
    """The kappa of a tilt: the inverse of :func:`mean_tilt`.

    Args:
      tilt: E[t], a scalar from 0 (kappa = 0) to 1 (infinity).
      size: n, the number of weights.

    Example:
      >>> from otmdr_jax.core import sampling
      >>> round(float(sampling.mean_tilt(sampling.concentration(0.3, 1000), 1000)), 4)
      0.3
    """
    tilt = jnp.asarray(tilt, jnp.result_type(float))
    inside = (tilt > 0) & (tilt < 1)
    aim = jnp.where(inside, tilt, 0.5)
    kappa = _inverse_bound(aim, size / 2)
    for _ in range(_FIXED_POINT):
        # The bound times (mean / bound), which hardly changes with kappa.
        scale = _bound(kappa, size / 2) / mean_tilt(kappa, size)
        kappa = _inverse_bound(jnp.minimum(aim * scale, (1 + aim) / 2), size / 2)
    end = jnp.where(tilt >= 1, jnp.inf, jnp.maximum(tilt, 0.0))  # NaN stays
    return jnp.where(inside, kappa, end)


def _bound(kappa, order):
    """I_(v+1) / I_v from above, close for large v and kappa (Hornik & Grun, 2013)."""
    low, high = order + 0.5, order + 1.5
    return 1 / (low / kappa + jnp.sqrt(low * high / kappa / kappa + 1))


def _inverse_bound(ratio, order):
    """The kappa at which the bound is the ratio."""
    low, off = order + 0.5, (1 - ratio) * (1 + ratio)
    return ratio * (low + jnp.sqrt(low * (low + off))) / off


def _in_ball(tg, rho, keys, strength):
    """The leaves of u in one ball, by their index, as those of T g are."""
    if not tg:
        return {}
    size = tree.num_coordinates(tg)
    length = tree.norm(tg)
    divisor = jnp.where(length == 0, 1.0, length)
    if strength.tilt is None:
        reach = jnp.asarray(rho) * length
        times = jnp.where(reach == 0, 1.0, reach)  # infinity times 0 is NaN
        kappa = jnp.where(reach == 0, 0.0, strength.inverse_temperature * times)
        certain = jnp.asarray(strength.inverse_temperature) == jnp.inf
    else:
        kappa = concentration(strength.tilt, size)
        certain = jnp.asarray(strength.tilt) == 1
    for_ball, for_leaves = keys
    for_t, for_last_two = jax.random.split(for_ball)
    t, rest = _coordinate(for_t, kappa, size)
    if size == 1:  # nothing is across the gradient: no rounding is divided by 0
        rest = 0.0
    t, rest = jnp.where(length == 0, 0.0, t), jnp.where(length == 0, 1.0, rest)
    radius = jnp.where((length == 0) & certain, 0.0, 1.0)
    radius = jnp.where(jnp.isfinite(length), radius, jnp.nan)

    # The conjugate of JAX's gradient leads uphill, where weights are complex.
    uphill = {i: jnp.conj(x) / divisor for i, x in tg.items()}
    normal = noise(for_leaves, tg)
    along = sum(jnp.sum(jnp.real(normal[i] * jnp.conj(uphill[i]))) for i in tg)
    squares = sum(jnp.sum(jnp.real(z * jnp.conj(z))) for z in normal.values())
    # The part across the gradient is z - (z g) g: it is never there as a whole.
    across = jnp.maximum(squares - along * along, 0.0)
    last_two = 2 * jax.random.exponential(for_last_two)
    last_two = jnp.maximum(last_two, jnp.finfo(last_two.dtype).tiny)
    scale = rest / jnp.sqrt(across + last_two)
    lead = t - scale * along
    return {i: radius * (lead * uphill[i] + scale * normal[i]) for i in tg}


def _coordinate(key, kappa, size):
    """Draws t, with sqrt(1 - t^2).

    Wood's proposals are those of t at kappa = 0, moved by the Mobius map of the
    interval that takes 0 to x. Written in their position s before they are moved, the
    logarithm of the acceptance needs no difference of large numbers, whatever n is.
    """
    m, kappa = size + 1.0, jnp.asarray(kappa)
    x = 1 / (m / (2 * kappa) + jnp.hypot(m / (2 * kappa), 1.0))
    for_radius, for_angle, for_choice = jax.random.split(key, 3)
    # s is one of two coordinates of a uniform point on the sphere (Ulrich, 1984).
    exponential = jax.random.exponential(for_radius, (_PROPOSALS,))
    angle = 2 * jnp.pi * jax.random.uniform(for_angle, (_PROPOSALS,))
    s = jnp.sqrt(-jnp.expm1(-2 * exponential / size)) * jnp.cos(angle)
    q = -x * s
    # q / (1 - q) + log(1 - q) = q^2 / 2 + 2 q^3 / 3 + 3 q^4 / 4 + ...
    series = q * q * (1 / 2 + q * (2 / 3 + q * (3 / 4 + q * (4 / 5 + q * (5 / 6)))))
    excess = jnp.where(jnp.abs(q) < 0.02, series, q / (1 - q) + jnp.log1p(-q))
    uniform = jax.random.uniform(for_choice, (_PROPOSALS,))
    accepted = jnp.log1p(-uniform) <= -m * excess
    s = s[jnp.argmax(accepted)]
    t = (x + s) / (1 + x * s)
    height = jnp.sqrt(2 / (1 + jnp.hypot(1.0, 2 * kappa / m)))  # sqrt(1 - x^2)
    rest = height * jnp.sqrt((1 - s) * (1 + s)) / (1 + x * s)
    return t, rest
