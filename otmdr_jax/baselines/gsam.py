r"""GSAM: SAM's gradient, without a part of the plain gradient that is orthogonal to it.

.. math::
    g' = \nabla L(w + \rho\, g / \|g\|), \qquad
    g_\perp = g - \frac{\langle g, g' \rangle}{\|g'\|^2} g', \qquad
    \text{result} = g' - \alpha g_\perp

The step along :math:`-g_\perp` changes the loss at w and, to first order, not the one
at the particle: it narrows the gap between them.

Reference: Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
<https://arxiv.org/abs/2203.08065>`_, ICLR 2022, Algorithm 1.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.core import tree
from otmdr_jax.core.checks import check_number, check_rho
from otmdr_jax.core.gradient import build
from otmdr_jax.core.options import Options, SamOptions
from otmdr_jax.core.particle import from_one_gradient
from otmdr_jax.core.signatures import with_options
from otmdr_jax.core.transform import from_gradient, schedule_of

PyTree = Any

# SAM's radius; alpha of the authors' example on CIFAR-10.
RHO, ALPHA = 0.05, 0.2


@with_options
def gsam(
    loss_fn: Callable[..., Any],
    rho: Any = RHO,
    *,
    alpha: float = ALPHA,
    aux_init: PyTree = None,
    **options: Unpack[SamOptions],
) -> optax.GradientTransformationExtraArgs:
    """GSAM as an Optax transformation, used like :func:`otmdr_jax.sam`.

    Sub-batches, and devices that climb on their own, are also decomposed on their own.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius: a number, or a schedule of the number of updates. The authors let
        it follow the learning rate: see :func:`follow`.
      alpha: Weight of the orthogonal part; with 0 and a constant radius it is SAM.
      aux_init: See :func:`otmdr_jax.otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.SamOptions`.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import baselines
      >>> def loss_fn(w, batch):
      ...     return 0.5 * w[0] ** 2 + 2.0 * w[1] ** 2 + 0.0 * jnp.mean(batch)
      >>> tx = baselines.gsam(loss_fn, rho=1.0, alpha=0.5)
      >>> w, batch = jnp.ones(2), jnp.ones(4)
      >>> grads, _ = tx.update(w, tx.init(w), w, batch=batch)
      >>> grads.round(3).tolist()
      [1.06..., 7.90...]

    Reference:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    return from_gradient(
        gsam_gradient(
            loss_fn,
            (0.0,) * schedule_of(rho)[1],
            alpha=alpha,
            **options,
        ),
        rho=rho,
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
    )


@with_options
def gsam_gradient(
    loss_fn: Callable[..., Any],
    rho: Any = RHO,
    *,
    alpha: float = ALPHA,
    **options: Unpack[SamOptions],
) -> Callable[..., Any]:
    """GSAM's gradient, to be called as that of :func:`otmdr_jax.robust_gradient`.

    Args:
      loss_fn: The loss, as for :func:`gsam`.
      rho: The radii of a call that names none.
      alpha: The weight of the orthogonal part.
      **options: Those of :class:`otmdr_jax.core.options.SamOptions`.
    """
    check_number("alpha", alpha)

    def decomposed(step):
        found, first = from_one_gradient(step)
        grads = step.shared(found.grads)
        aside = orthogonal(first, grads)
        cut = jax.tree.map(lambda g, o: (g - alpha * o).astype(g.dtype), grads, aside)
        return found._replace(grads=cut)

    return build(
        loss_fn, check_rho(rho), Options(split="shared", **options), decomposed
    )


def orthogonal(vector: PyTree, to: PyTree) -> PyTree:
    """What of a vector is orthogonal to another one; all of it where that one is 0.

    Args:
      vector: A pytree of arrays; complex ones are vectors of their parts.
      to: Another one of the same structure.

    Returns:
      A pytree in float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.baselines.gsam import orthogonal
      >>> orthogonal(jnp.array([3.0, 4.0]), jnp.array([0.0, 1e30])).tolist()
      [3.0, 0.0]
    """
    length = tree.norm(to)
    unit = jax.tree.map(
        lambda x: (
            x.astype(tree.accumulation_dtype(x)) / jnp.where(length == 0, 1.0, length)
        ),
        to,
    )
    products = jax.tree.map(
        lambda v, u: jnp.sum(jnp.real(v.astype(u.dtype) * jnp.conj(u))), vector, unit
    )
    along = sum(jax.tree.leaves(products), start=0.0)  # of the leaves' dtype
    return jax.tree.map(lambda v, u: v.astype(u.dtype) - along * u, vector, unit)


def follow(
    learning_rate: optax.Schedule,
    rho_max: float,
    rho_min: float,
    rate_max: float,
    rate_min: float = 0.0,
) -> optax.Schedule:
    r"""A radius that follows the learning rate, as in the authors' Algorithm 1.

    .. math:: \rho_t = \rho_{\min} + (\rho_{\max} - \rho_{\min})
        \frac{\eta_t - \eta_{\min}}{\eta_{\max} - \eta_{\min}}

    Args:
      learning_rate: The schedule of eta.
      rho_max: The radius at the highest learning rate.
      rho_min: The one at the lowest.
      rate_max: The highest learning rate.
      rate_min: The lowest. Where eta is outside, as below it in a warmup, the radius
        stays at its end.

    Example:
      >>> import optax
      >>> from otmdr_jax.baselines import follow
      >>> rho = follow(optax.linear_schedule(0.1, 0.0, 10), 0.08, 0.04, 0.1)
      >>> [round(float(rho(t)), 3) for t in (0, 5, 10)]
      [0.08, 0.06, 0.04]
    """
    if not 0 <= rho_min <= rho_max:
        raise ValueError(
            "the least radius, rho_min, must be from 0 to the largest, rho; got "
            f"rho_min={rho_min!r}, and rho={rho_max!r}."
        )
    if not rate_max > rate_min:
        raise ValueError(
            "the radius follows the learning rate, whose largest value must be above "
            f"its least; got {rate_max=}, {rate_min=}."
        )

    def rho(step):
        share = (learning_rate(step) - rate_min) / (rate_max - rate_min)
        # A negative radius would descend, by a warmup from 0 or by rounding alone.
        return rho_min + (rho_max - rho_min) * jnp.clip(share, 0.0, 1.0)

    return rho
