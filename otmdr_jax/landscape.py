"""How the loss behaves around a solution: the sharpness that OT-MDR trades against."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.perturbation import ascend

PyTree = Any


class Sharpness(NamedTuple):
    """What :func:`sam_gap` measures.

    Attributes:
      gap: `worst - loss`.
      loss: Mean loss at the solution.
      worst: Mean loss one ascent step of length rho away.
    """

    gap: float
    loss: float
    worst: float


def sam_gap(
    loss_sum: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]],
    params: PyTree,
    batches: Iterable[PyTree],
    rho: float = 0.05,
) -> Sharpness:
    r"""Sharpness as SAM sees it, over a whole set.

    .. math:: L(\theta + \rho \nabla L(\theta) / \|\nabla L(\theta)\|_2) - L(\theta)

    Unlike the gap in a step's diagnostics this is one gradient and one loss of the
    whole set, at fixed weights.

    Args:
      loss_sum: (params, batch) -> (sum of losses, number of examples). It is compiled
        once, so pass the same function object each time.
      params: The solution.
      batches: The set, in batches of any sizes; iterated over twice.
      rho: The radius, in the units of the weights; 0.05 as SAM on CIFAR-10.

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

    Reference: Foret et al., 2021, Eq. 1 with the solution of its first-order problem.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("sam_gap needs at least one batch, got none.")
    accumulate, loss_of, step = _compiled(loss_sum)
    grads, sums = jax.tree.map(jnp.zeros_like, params), []
    for batch in batches:
        loss_and_count, grads = accumulate(grads, params, batch)
        sums.append(loss_and_count)
    # The norm takes care of the factor 1 / count.
    away = step(params, grads, rho)
    worsts = [loss_of(away, batch)[0] for batch in batches]
    # Fetched when all is dispatched; added up in float64.
    count = sum(float(examples) for _, examples in sums)
    loss = sum(float(loss) for loss, _ in sums) / count
    worst = sum(float(loss) for loss in worsts) / count
    return Sharpness(worst - loss, loss, worst)


@functools.lru_cache(maxsize=16)
def _compiled(loss_sum):
    """Compiled once for a loss, however many solutions are measured with it."""
    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def accumulate(grads, params, batch):
        loss_and_count, more = gradient(params, batch)
        return loss_and_count, jax.tree.map(jnp.add, grads, more)

    @jax.jit
    def step(params, grads, rho):
        return ascend(params, grads, rho)[0]

    return accumulate, jax.jit(loss_sum), step
