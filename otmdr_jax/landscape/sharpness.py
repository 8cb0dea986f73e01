r"""The rise of the loss near a solution, in the worst direction and on average.

Distances are Euclidean over all leaves together, in the units of the weights. Adaptive
versions measure each weight in units of its own size: they move :math:`v` in
:math:`\theta' = \theta + T v`, with :math:`T = |\theta|` element by element. So
rescaling weights in a way that keeps the network's function keeps its adaptive
sharpness. Weights that are 0 do not move.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax.core import tree
from otmdr_jax.core.ascent import absolute_weights, ascend, sphere
from otmdr_jax.core.checks import check_count, check_number
from otmdr_jax.landscape.objective import LossSum, Objective

PyTree = Any


class Sharpness(NamedTuple):
    """The result of :func:`sam_gap` and :func:`worst_in_ball`.

    Attributes:
      gap: The difference `worst - loss`.
      loss: Mean loss at the solution.
      worst: Mean loss at the point that was found.
    """

    gap: float
    loss: float
    worst: float


class AverageSharpness(NamedTuple):
    """The result of :func:`average_sharpness`.

    Attributes:
      gap: The mean of `gaps`.
      standard_error: The standard error of that mean, estimated from the directions.
      loss: Mean loss at the solution.
      gaps: (n,) rises of the loss, one for each direction.
    """

    gap: float
    standard_error: float
    loss: float
    gaps: np.ndarray


def sam_gap(
    loss_sum: LossSum,
    params: PyTree,
    batches: Iterable[PyTree],
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    mask: PyTree | None = None,
) -> Sharpness:
    r"""Sharpness in SAM's sense, over a whole set.

    .. math:: L(\theta + \rho T^2 g / \|T g\|_2) - L(\theta), \; g = \nabla L(\theta)

    Unlike the gap in a step's diagnostics, it takes one gradient and one loss of the
    whole set, at fixed weights.

    Args:
      loss_sum: (params, batch) -> (sum of losses, number of examples). It is compiled
        once, so pass the same function object each time.
      params: The solution.
      batches: The set, in batches of any sizes; iterated over twice.
      rho: The radius, in the units of the weights; 0.05 as for SAM on CIFAR-10.
      adaptive: True for T = abs(params), element by element (ASAM, whose radii are
        about 10 times as large), instead of T = 1.
      mask: A pytree of bools, or a function of `params` to one, True where a leaf
        moves; None for all floating leaves.

    Returns:
      A :class:`Sharpness`.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> def loss_sum(w, batch):
      ...     return 0.5 * jnp.sum(w**2) * len(batch), len(batch)
      >>> result = landscape.sam_gap(loss_sum, jnp.array([3.0, 4.0]), [[1, 2]], rho=1.0)
      >>> round(result.gap, 4)  # 6^2 / 2 - 5^2 / 2
      5.5

    Reference: Foret et al., 2021, Eq. 1 with the solution of its first-order problem;
    Kwon et al., 2021.
    """
    check_number("rho", rho, positive=True)
    whole = Objective(loss_sum, params, batches, mask)
    loss, grads = whole.gradient(whole.center)
    worst = whole.loss(_ascend(whole.center, grads, rho, adaptive=adaptive))
    return Sharpness(worst - loss, loss, worst)


def worst_in_ball(
    loss_sum: LossSum,
    params: PyTree,
    batches: Iterable[PyTree],
    rho: float = 0.05,
    *,
    steps: int = 20,
    adaptive: bool = False,
    mask: PyTree | None = None,
    key: jax.Array | None = None,
) -> Sharpness:
    r"""The largest loss in a ball that projected gradient ascent finds.

    .. math:: \max_{\|v\|_2 \le \rho} L(\theta + T v) - L(\theta)

    From the best point so far, the ascent takes a step of length :math:`\rho` along the
    normalised gradient and projects onto the ball. A step that does not raise the loss
    is taken back, and the length is halved. The center counts as a point, so the gap is
    never negative. It is a lower bound of the maximum; one step gives :func:`sam_gap`
    if that is positive.

    Args:
      loss_sum: (params, batch) -> (sum of losses, number of examples). It is compiled
        once, so pass the same function object each time.
      params: The solution.
      batches: The set, in batches of any sizes; iterated over `steps + 1` times, and
        once more with `key`.
      rho: The radius, in the units of the weights; 0.05 as for SAM on CIFAR-10.
      steps: The number of ascent steps; 20 as in the code of Andriushchenko et al.,
        2023.
      adaptive: True for T = abs(params), element by element, instead of T = 1.
      mask: A pytree of bools, or a function of `params` to one, True where a leaf
        moves; None for all floating leaves.
      key: A PRNG key, to start at a random point of the sphere. None starts at the
        center, from which no step leads away if the gradient vanishes there.

    Returns:
      A :class:`Sharpness`; NaN if a loss on the way is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> def loss_sum(w, batch):
      ...     return 0.5 * (w[0] ** 2 + 9 * w[1] ** 2), 1
      >>> result = landscape.worst_in_ball(
      ...     loss_sum, jnp.zeros(2), [None], rho=0.1, key=jax.random.key(0))
      >>> round(result.gap, 4)  # the largest eigenvalue times rho^2 / 2
      0.045

    Reference: Keskar et al., 2017; Andriushchenko et al., 2023, whose ascent is APGD of
    Croce & Hein, 2020.
    """
    check_number("rho", rho, positive=True)
    check_count("steps", steps)
    whole = Objective(loss_sum, params, batches, mask)
    loss, grads = whole.gradient(whole.center)
    at_center = loss
    offsets, length = _zeros(whole.center), rho
    if key is not None:
        offsets = _on_sphere(_gaussian(offsets, 1.0, key), rho)
        loss, grads = whole.gradient(_away(whole.center, offsets, adaptive=adaptive))
    for _ in range(steps):
        tried = _climb(whole.center, offsets, grads, length, rho, adaptive=adaptive)
        found, slope = whole.gradient(_away(whole.center, tried, adaptive=adaptive))
        if not math.isfinite(found):
            return Sharpness(math.nan, at_center, math.nan)
        if found > loss:
            loss, grads, offsets = found, slope, tried
        else:
            length /= 2
    worst = max(loss, at_center)
    return Sharpness(worst - at_center, at_center, worst)


def average_sharpness(
    loss_sum: LossSum,
    params: PyTree,
    batches: Iterable[PyTree],
    noise_std: float,
    *,
    key: jax.Array,
    num_directions: int = 20,
    adaptive: bool = False,
    mask: PyTree | None = None,
) -> AverageSharpness:
    r"""The average rise of the loss under Gaussian noise on the weights.

    .. math:: E_{e \sim N(0, \sigma^2 I)} L(\theta + T e) - L(\theta)

    For small :math:`\sigma` and T = 1 it is :math:`\sigma^2 \mathrm{tr} H / 2`, see
    :func:`otmdr_jax.landscape.hessian_trace`.

    Args:
      loss_sum: (params, batch) -> (sum of losses, number of examples). It is compiled
        once, so pass the same function object each time.
      params: The solution.
      batches: The set, in batches of any sizes; iterated over `num_directions + 1`
        times.
      noise_std: The standard deviation :math:`\sigma` of each weight, in the units of
        the weights; a share of the weight if `adaptive`. The length of a direction is
        about :math:`\sigma \sqrt P`, with P the number of weights.
      key: A PRNG key; the same key gives the same directions.
      num_directions: The number of random directions, at least 2; 20 as in the code of
        Andriushchenko et al., 2023. The standard error falls with its root.
      adaptive: True for T = abs(params), element by element, instead of T = 1.
      mask: A pytree of bools, or a function of `params` to one, True where a leaf
        moves; None for all floating leaves.

    Returns:
      An :class:`AverageSharpness`; NaN if a loss is.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> def loss_sum(w, batch):
      ...     return 0.5 * (w[0] ** 2 + 9 * w[1] ** 2), 1
      >>> found = landscape.average_sharpness(
      ...     loss_sum, jnp.zeros(2), [None], 0.1, key=jax.random.key(0))
      >>> abs(found.gap - 0.05) < 3 * found.standard_error  # trace times 0.1^2 / 2
      True

    Reference: Andriushchenko et al., 2023; Dziugaite & Roy, 2017.
    """
    check_number("noise_std", noise_std, positive=True)
    check_count("num_directions", num_directions)
    if num_directions < 2:
        raise ValueError(
            "num_directions must be at least 2, for a standard error; got "
            f"{num_directions}."
        )
    whole = Objective(loss_sum, params, batches, mask)
    zeros = _zeros(whole.center)
    loss = whole.loss(whole.center)
    gaps = np.empty(num_directions)
    for i in range(num_directions):
        offsets = _gaussian(zeros, noise_std, jax.random.fold_in(key, i))
        gaps[i] = whole.loss(_away(whole.center, offsets, adaptive=adaptive)) - loss
    error = np.std(gaps, ddof=1) / math.sqrt(num_directions)
    return AverageSharpness(float(np.mean(gaps)), float(error), loss, gaps)


@functools.partial(jax.jit, static_argnames="adaptive")
def _ascend(weights, grads, rho, *, adaptive):
    return ascend(weights, grads, rho, metric=_metric(adaptive))[0]


@functools.partial(jax.jit, static_argnames="adaptive")
def _away(center, offsets, *, adaptive):
    """The weights at center + T offsets."""
    scaled = _scaled(center, offsets, adaptive)
    return [(w + s).astype(w.dtype) for w, s in zip(center, scaled, strict=True)]


@functools.partial(jax.jit, static_argnames="adaptive")
def _climb(center, offsets, grads, step, rho, *, adaptive):
    """An ascent step on the offsets, whose gradient is T g, and the projection."""
    climbed, _ = ascend(offsets, _scaled(center, grads, adaptive), step)
    return _project(climbed, rho)


@jax.jit
def _project(offsets, rho):
    factor = rho / jnp.maximum(tree.norm(offsets), rho)
    return [x * factor.astype(x.dtype) for x in offsets]


@jax.jit
def _on_sphere(offsets, rho):
    return ascend(_zeros(offsets), offsets, rho)[0]


@jax.jit
def _gaussian(zeros, noise_std, key):
    return ascend(zeros, zeros, 0.0, noise_std=noise_std, key=key)[0]


def _scaled(center, vector, adaptive):
    scales = _metric(adaptive)(center, vector)
    return [t * v.astype(t.dtype) for t, v in zip(scales, vector, strict=True)]


def _metric(adaptive):
    return absolute_weights if adaptive else sphere


def _zeros(center):
    return [jnp.zeros_like(w, dtype=tree.accumulation_dtype(w)) for w in center]
