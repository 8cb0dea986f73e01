"""The robust gradient as Optax transformations: `otmdr`, `sam` and `asam`.

They compute their own gradient from `batch=`, so the updates that come in are not
used. Everything chained after them (clipping, decay, momentum, accumulation) acts on
the robust gradient at the center.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from otmdr_jax.adapter import from_gradient, schedule_of
from otmdr_jax.gradients import PAPER_RHO, robust_gradient

PyTree = Any


def otmdr(
    loss_fn: Callable[..., Any],
    key: jax.Array | None = None,
    *,
    rho: Any = PAPER_RHO,
    num_particles: int = 1,
    noise_std: jax.typing.ArrayLike = 0.0,
    split: str = "random",
    norm: str = "global",
    adaptive: bool = False,
    merge: str | None = None,
    mask: Any = None,
    has_aux: bool = False,
    aux_init: PyTree = None,
    axis_name: Any = None,
    sync_perturbation: bool = True,
    particle_map: str = "auto",
    particle_axis_name: Any = None,
    microbatch_size: int | None = None,
    num_subbatches: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """OT-MDR as an Optax transformation: replaces updates by the robust gradient.

    `update(updates, state, params, *, batch, loss_args=(), loss_kwargs=None)` computes
    the gradient of `loss_fn(params, batch, *loss_args, **loss_kwargs)` itself: the
    incoming `updates` are not used (pass zeros, or the parameters, and skip the
    backward pass that would make them). Other extra arguments are ignored.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      key: A PRNG key, typed or raw. It lives in the state and is split at each update.
        May be None where nothing is random.
      rho: Radii as for :func:`otmdr_jax.value_and_grad`; each one, or the whole, may
        be an Optax schedule of the number of updates so far.
      num_particles: See :func:`otmdr_jax.value_and_grad`, as for all below.
      noise_std: Standard deviation of the noise per coordinate.
      split: "random", "ordered" or "shared".
      norm: "global" or "per_leaf".
      adaptive: ASAM's element-wise scaling.
      merge: None, "sum" or "mean".
      mask: What may be perturbed.
      has_aux: Whether `loss_fn` returns (loss, aux). The state then holds aux:
        `optax.tree.get(opt_state, "aux")`.
      aux_init: With `has_aux`: a pytree of arrays of the structure, shapes and dtypes
        of aux, the initial BatchNorm statistics, say.
      axis_name: Device axis inside pmap or shard_map.
      sync_perturbation: One global perturbation, or one for each device.
      particle_map: How the K particles are mapped.
      particle_axis_name: Device axis that the K particles are spread over.
      microbatch_size: Examples that a pass differentiates at a time.
      num_subbatches: Parts of the batch, each with particles of its own.

    Returns:
      An `optax.GradientTransformationExtraArgs`. To accumulate over micro-batches put
      `optax.MultiSteps` after it in the chain, around the optimizer: around the whole
      chain it would hand on the last micro-batch alone. To skip non-finite steps chain
      `optax.apply_if_finite(optimizer, n)` after it.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.value_and_grad`; `has_aux` without
        `aux_init`; at the update a missing batch, or an aux of another structure.

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
    options = dict(
        num_particles=num_particles,
        noise_std=noise_std,
        split=split,
        norm=norm,
        adaptive=adaptive,
        merge=merge,
        mask=mask,
        has_aux=has_aux,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        particle_map=particle_map,
        particle_axis_name=particle_axis_name,
        microbatch_size=microbatch_size,
        num_subbatches=num_subbatches,
    )
    compute = robust_gradient(loss_fn, (0.0,) * num_radii, **options)
    return from_gradient(
        compute,
        key,
        rho=rho,
        num_particles=num_particles,
        has_aux=has_aux,
        aux_init=aux_init,
    )


def sam(
    loss_fn: Callable[..., Any],
    rho: Any = 0.05,
    *,
    norm: str = "global",
    adaptive: bool = False,
    mask: Any = None,
    has_aux: bool = False,
    aux_init: PyTree = None,
    axis_name: Any = None,
    sync_perturbation: bool = True,
    microbatch_size: int | None = None,
    num_subbatches: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-Aware Minimization: OT-MDR with one step on the whole batch.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius; 0.05 as in Foret et al. for CIFAR-10. Several radii give
        several ascent steps; schedules as in :func:`otmdr`.
      norm: "global" or "per_leaf".
      adaptive: See :func:`asam`.
      mask: What may be perturbed.
      has_aux: See :func:`otmdr`.
      aux_init: See :func:`otmdr`.
      axis_name: Device axis inside pmap or shard_map.
      sync_perturbation: False is m-sharpness, each device its own perturbation.
      microbatch_size: See :func:`otmdr`.
      num_subbatches: Parts of the batch, each with its own perturbation: m-sharpness on
        one device.

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
    return otmdr(
        loss_fn,
        rho=rho,
        split="shared",
        norm=norm,
        adaptive=adaptive,
        mask=mask,
        has_aux=has_aux,
        aux_init=aux_init,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        microbatch_size=microbatch_size,
        num_subbatches=num_subbatches,
    )


def asam(
    loss_fn: Callable[..., Any], rho: Any = 0.5, **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the ball is measured in units of each weight.

    .. math:: w' = w + \rho \frac{T^2 g}{\|T g\|_2}, \qquad T = |w|

    The authors' implementation adds 0.01 to T for kernels and sets T = 1 for biases;
    the one here, as the released code of OT-MDR, does neither.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius; 0.5 as in Kwon et al. for CIFAR-10.
      **options: As for :func:`sam`.

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
    if "adaptive" in options:
        raise TypeError("asam is adaptive already: leave adaptive out, or use sam.")
    return sam(loss_fn, rho, adaptive=True, **options)
