r"""The robust gradient: a drop-in for `jax.value_and_grad`.

For each of K particles (Nguyen et al., 2023, Eqs. 9-10; S = 2 radii in the paper):

    w_0 = theta
    g_s = grad L_{B_s}(w_{s-1}),   w_s = w_{s-1} + rho_s g_s / ||g_s||_2 + e_s
    result = 1/K sum_k grad L_B(w_S)

With one radius, the whole batch and no noise this is SAM (Theorem 4.3).
"""

from collections.abc import Callable
from typing import Any, Unpack

from otmdr_jax.core import subbatches
from otmdr_jax.core.engine import Diagnostics, RobustGradient
from otmdr_jax.core.options import Options, RobustOptions, check_rho, with_options

__all__ = [
    "PAPER_RHO",
    "Diagnostics",
    "RobustGradient",
    "robust_gradient",
    "value_and_grad",
]

PyTree = Any

# The paper's radii for CIFAR-10: rho_1 = 0.05 and rho_2 = 2 rho_1 (section 5.1).
PAPER_RHO = (0.05, 0.1)


@with_options
def value_and_grad(
    loss_fn: Callable[..., Any], rho: Any = PAPER_RHO, **options: Unpack[RobustOptions]
) -> Callable[..., tuple[Any, PyTree]]:
    r"""The OT-MDR counterpart of `jax.value_and_grad`.

    .. math::
        w_k^s = w_k^{s-1} + \rho_s \frac{\nabla L_{B_k^s}(w_k^{s-1})}
            {\|\nabla L_{B_k^s}(w_k^{s-1})\|_2} + \epsilon_k^s,
        \qquad w_k^0 = \theta, \qquad
        g = \frac1K \sum_{k=1}^K \nabla L_B(w_k^S)

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` to the mean loss over the
        batch, a scalar, or to (loss, aux). It sees plain pytrees.
      rho: One radius :math:`\rho_s` for each ascent step, in the units of the weights:
        numbers or traced scalars. The paper's (0.05, 0.1) for CIFAR-10 by default.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      `grad_fn(params, batch, *args, key=None, rho=None, **kwargs)`, which returns
      `(value, grads)` or, with `has_aux`, `((value, aux), grads)`. `value` is the mean
      over particles of the loss of all of B at the particle; `aux` comes from the
      pass at the center, its floating leaves averaged over particles (BatchNorm
      statistics, say), others from the first particle. `key`, typed or raw, may be
      left out where nothing is random; `rho` overrides the radii for one call. Both
      belong to `grad_fn`: a loss that needs a key or a rho of its own takes it by
      position.

    Raises:
      ValueError, TypeError: An option that cannot work, here; at the call a batch
        that cannot be split, a missing key, a mask of another structure, a parameter
        that cannot be differentiated, a loss that is no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, otmdr_jax
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
      >>> params = {"w": jnp.array([1.0, -1.0])}
      >>> batch = {"x": jnp.eye(2), "y": jnp.zeros(2)}
      >>> grad_fn = jax.jit(otmdr_jax.value_and_grad(loss_fn, rho=(0.05, 0.1)))
      >>> value, grads = grad_fn(params, batch, key=jax.random.key(0))
      >>> float(value) > float(loss_fn(params, batch))
      True

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023.
    """
    compute = robust_gradient(loss_fn, rho, **options)
    has_aux = options.get("has_aux", False)

    def grad_fn(params, batch, *args, key=None, rho=None, **kwargs):
        value, aux, grads, _ = compute(params, batch, *args, key=key, rho=rho, **kwargs)
        return ((value, aux) if has_aux else value), grads

    return grad_fn


@with_options
def robust_gradient(
    loss_fn: Callable[..., Any], rho: Any = PAPER_RHO, **options: Unpack[RobustOptions]
) -> Callable[..., RobustGradient]:
    """:func:`value_and_grad` with everything it knows, diagnostics included.

    Under `jax.jit` diagnostics that are not used cost nothing.

    Args:
      loss_fn: See :func:`value_and_grad`.
      rho: See :func:`value_and_grad`.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      `fn(params, batch, *args, key=None, rho=None, **kwargs)`, which returns a
      :class:`RobustGradient`.

    Example:
      >>> import jax.numpy as jnp, otmdr_jax
      >>> def loss_fn(w, batch):
      ...     return 0.5 * jnp.sum(w**2) + 0.0 * jnp.mean(batch)
      >>> sam = otmdr_jax.robust_gradient(loss_fn, rho=0.5, split="shared")
      >>> result = sam(jnp.array([3.0, 4.0]), jnp.zeros(2))
      >>> result.grads
      Array([3.3, 4.4], dtype=float32)
      >>> float(result.diagnostics.gap)  # 5.5^2 / 2 - 5^2 / 2
      2.625
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, batch), got {loss_fn}")
    return subbatches.build(loss_fn, check_rho(rho), Options(**options))
