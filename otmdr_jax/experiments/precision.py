"""Loss scaling: gradients of float16 networks that neither underflow nor poison.

The smallest float16 is 6e-8, and gradients of activations are often smaller. Multiplied
by a scale they are not; a scale that is too large overflows, the step is skipped, and
the scale halves. bfloat16 has float32's range and needs none of this.

Reference: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core import tree

PyTree = Any

# 2^15 and 2000 steps as in NVIDIA's Apex and PyTorch's GradScaler (2^16 there).
INITIAL_SCALE, GROWTH_INTERVAL = 2.0**15, 2_000
SMALLEST_SCALE, LARGEST_SCALE = 1.0, 2.0**24


class LossScale(NamedTuple):
    """The state of dynamic loss scaling: a pytree of two scalars.

    Attributes:
      scale: What losses are multiplied by, a power of two, float32.
      good_steps: Finite steps since it last changed, int32.
    """

    scale: jax.Array
    good_steps: jax.Array


def init(scale: float = INITIAL_SCALE) -> LossScale:
    """A loss scale to start with.

    Args:
      scale: 2^15 by default; a power of two, so that scaling does not round.
    """
    return LossScale(jnp.float32(scale), jnp.zeros((), jnp.int32))


def adjust(
    state: LossScale,
    finite: jax.typing.ArrayLike,
    growth_interval: int = GROWTH_INTERVAL,
) -> LossScale:
    """Doubles the scale after so many finite steps, halves it after one that was not.

    Args:
      state: The loss scale that the step used.
      finite: Whether the loss and the gradients of all its passes were finite.
      growth_interval: Finite steps between doublings; 2000 by default.

    Example:
      >>> from otmdr_jax import precision
      >>> state = precision.adjust(precision.init(8.0), finite=False)
      >>> float(state.scale)
      4.0
    """
    grows = state.good_steps + 1 >= growth_interval
    up = jnp.where(grows, 2 * state.scale, state.scale)
    scale = jnp.clip(
        jnp.where(finite, up, state.scale / 2), SMALLEST_SCALE, LARGEST_SCALE
    )
    return LossScale(scale, jnp.where(finite & ~grows, state.good_steps + 1, 0))


def scale_loss(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., Any]:
    """A loss whose gradient is computed at a scale, and comes back without it.

    The loss itself is as it was, so are its gradients but for rounding: every
    transformation that differentiates it, once or in several passes, sees true values.

    Args:
      loss_fn: (params, *args, **kwargs) -> loss, or (loss, aux).
      has_aux: Whether it returns (loss, aux).

    Returns:
      (params, *args, loss_scale, **kwargs) -> what `loss_fn` returns. `loss_scale` is
      a scalar, given by name. Reverse mode alone: no `jax.jvp` goes through it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import precision
      >>> def loss_fn(w):
      ...     half = (w * 1e-4).astype(jnp.float16)
      ...     return jnp.sum(half.astype(jnp.float32) * 1e-8)
      >>> w = jnp.ones(1)
      >>> float(jax.grad(loss_fn)(w)[0])
      0.0
      >>> scaled = precision.scale_loss(loss_fn)
      >>> round(float(jax.grad(scaled)(w, loss_scale=2.0**15)[0]), 14)
      1e-12
    """

    def scaled(params, *args, loss_scale, **kwargs):
        params = jax.tree.map(lambda p: _scale_gradient(p, 1 / loss_scale), params)
        out = loss_fn(params, *args, **kwargs)
        if has_aux:
            return _scale_gradient(out[0], loss_scale), out[1]
        return _scale_gradient(out, loss_scale)

    return scaled


@jax.custom_vjp
def _scale_gradient(x, scale):
    """The identity, whose gradient is multiplied by `scale`."""
    del scale
    return x


def _scale_gradient_bwd(scale, g):
    wide = g.astype(tree.accumulation_dtype(g)) * scale
    return wide.astype(g.dtype), jnp.zeros_like(scale)


_scale_gradient.defvjp(lambda x, scale: (x, scale), _scale_gradient_bwd)
