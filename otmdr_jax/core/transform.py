"""The robust gradient as Optax transformations: `otmdr`, `sam` and `asam`.

They compute their own gradient from `batch=`, so the updates that come in are not
used. Everything chained after them (clipping, decay, momentum, accumulation) acts on
the robust gradient at the center.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax

from otmdr_jax.core.adapter import from_gradient, schedule_of
from otmdr_jax.core.gradient import PAPER_RHO, robust_gradient
from otmdr_jax.core.options import (
    FixedShapeOptions,
    RobustOptions,
    SamOptions,
    with_options,
)

PyTree = Any


@with_options
def otmdr(
    loss_fn: Callable[..., Any],
    key: jax.Array | None = None,
    *,
    rho: Any = PAPER_RHO,
    aux_init: PyTree = None,
    **options: Unpack[RobustOptions],
) -> optax.GradientTransformationExtraArgs:
    """OT-MDR as an Optax transformation: replaces updates by the robust gradient.

    `update(updates, state, params, *, batch, loss_args=(), loss_kwargs=None)` computes
    the gradient of `loss_fn(params, batch, *loss_args, **loss_kwargs)` itself: the
    incoming `updates` are not used (pass zeros, or the parameters, and skip the
    backward pass that would make them). Other extra arguments are ignored.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      key: A PRNG key, typed or raw. It lives in the state, as a typed one, and is split
        at each update. May be None where nothing is random.
      rho: Radii as for :func:`otmdr_jax.value_and_grad`; each one, or the whole, may
        be an Optax schedule of the number of updates so far.
      aux_init: With `has_aux`: a pytree of arrays of the structure, shapes and dtypes
        of aux, the initial BatchNorm statistics, say. The state then holds aux:
        `optax.tree.get(opt_state, "aux")`.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. To accumulate over micro-batches put
      `optax.MultiSteps` after it in the chain, around the optimizer: around the whole
      chain it would hand on the last micro-batch alone. To skip non-finite steps chain
      `optax.apply_if_finite(optimizer, n)` after it.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.value_and_grad`; one of `has_aux` and
        `aux_init` without the other; at the update a missing batch, or an aux of
        another structure; parameters of which `optax.masked` or `optax.partition` took
        some away.

    Example:
      >>> import jax, jax.numpy as jnp, optax, otmdr_jax
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> tx = optax.chain(
      ...     otmdr_jax.otmdr(loss_fn, jax.random.key(0), rho=(0.01, 0.02)),
      ...     optax.sgd(0.1, momentum=0.9),
      ... )
      >>> w, batch = jnp.zeros(2), jnp.eye(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(w, state, w, batch=batch)
      >>> int(state[0].count)  # of the chain's first part
      1
      >>> float(optax.tree.get(state, "diagnostics").robust_loss)
      1.03...

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023.
    """
    _, num_radii = schedule_of(rho)
    compute = robust_gradient(loss_fn, (0.0,) * num_radii, **options)
    return from_gradient(
        compute,
        key,
        rho=rho,
        num_particles=options.get("num_particles", 1),
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
    )


@with_options
def sam(
    loss_fn: Callable[..., Any],
    rho: Any = 0.05,
    *,
    aux_init: PyTree = None,
    **options: Unpack[SamOptions],
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-Aware Minimization: OT-MDR with one step on the whole batch.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius; 0.05 as in Foret et al. for CIFAR-10. Several radii give
        several ascent steps; schedules as in :func:`otmdr`.
      aux_init: See :func:`otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.SamOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, used like :func:`otmdr`.

    Example:
      >>> import jax.numpy as jnp, optax, otmdr_jax
      >>> tx = otmdr_jax.sam(lambda w, batch: jnp.mean(batch) * w[0] ** 2, rho=0.5)
      >>> w, batch = jnp.array([1.0]), jnp.ones(4)
      >>> grads, _ = tx.update(w, tx.init(w), w, batch=batch)
      >>> grads.tolist()
      [3.0]

    Reference:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021; Nguyen et al.,
      2023, Theorem 4.3.
    """
    return otmdr(loss_fn, rho=rho, aux_init=aux_init, split="shared", **options)


@with_options
def asam(
    loss_fn: Callable[..., Any],
    rho: Any = 0.5,
    *,
    aux_init: PyTree = None,
    **options: Unpack[FixedShapeOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the ball is measured in units of each weight.

    .. math:: w' = w + \rho \frac{T^2 g}{\|T g\|_2}, \qquad T = |w|

    The authors' implementation adds 0.01 to T for kernels and sets T = 1 for biases;
    the one here, as the released code of OT-MDR, does neither.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius; 0.5 as in Kwon et al. for CIFAR-10.
      aux_init: See :func:`otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.FixedShapeOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, used like :func:`otmdr`.

    Example:
      >>> import jax.numpy as jnp, optax, otmdr_jax
      >>> tx = otmdr_jax.asam(lambda w, batch: jnp.mean(batch) * w[0] ** 2, rho=0.5)
      >>> w, batch = jnp.array([2.0]), jnp.ones(4)
      >>> grads, _ = tx.update(w, tx.init(w), w, batch=batch)
      >>> grads.tolist()  # at w + 0.5 |w|
      [6.0]

    Reference:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.
    """
    return sam(loss_fn, rho, aux_init=aux_init, adaptive=True, **options)
