"""What bSAM and IVON share: a precision for each weight, noise and steps scaled by it.

Both keep a diagonal Gaussian N(w, 1 / (N p)) with one precision p per example for each
weight, draw noise from it, and divide their steps by p.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from otmdr_jax import bnn
from otmdr_jax.core import draws, tree
from otmdr_jax.core.checks import check_number
from otmdr_jax.core.transform import MemoryState, keep

PyTree = Any


def full(params: PyTree, value: jax.typing.ArrayLike) -> PyTree:
    """A pytree like the parameters that holds a value, float32 or wider.

    Raises:
      TypeError: A complex leaf.
    """
    for leaf in jax.tree.leaves(params):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                "bSAM and IVON keep a precision for each real weight, got a parameter "
                f"of {jnp.result_type(leaf)}: make its real and its imaginary part two "
                "parameters, and join them in the loss with jax.lax.complex."
            )
    return jax.tree.map(
        lambda p: jnp.full_like(p, value, tree.accumulation_dtype(p)), params
    )


def noise(key: jax.Array, precision: PyTree, num_data: float) -> PyTree:
    r"""A draw from :math:`\mathcal N(0, 1 / (N p))`, a variance of 1 / (N p).

    Args:
      key: A PRNG key.
      precision: p, a pytree of arrays.
      num_data: N.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax.baselines import preconditioned
      >>> e = preconditioned.noise(jax.random.key(0), jnp.full(100_000, 4.0), 25.0)
      >>> round(float(e.std()), 3)  # 1 / sqrt(25 * 4)
      0.1
    """
    leaves, treedef = jax.tree.flatten(precision)
    drawn = draws.normals(key, dict(enumerate(leaves)))
    scaled = [drawn[i] / jnp.sqrt(num_data * p) for i, p in enumerate(leaves)]
    return jax.tree.unflatten(treedef, scaled)


def posterior(params: PyTree, precision: PyTree, num_data: float) -> bnn.MeanField:
    """The Gaussian N(w, 1 / (N p)) as a posterior, for :mod:`otmdr_jax.bnn`.

    Args:
      params: w, its mean.
      precision: p, of the same structure.
      num_data: N, finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import baselines, bnn
      >>> q = baselines.posterior(jnp.ones(2), jnp.array([4.0, 1.0]), num_data=25)
      >>> bnn.std(q).round(4).tolist()
      [0.09..., 0.19...]
    """
    num_data = checked_num_data(num_data, infinite=False)
    sigma = jax.tree.map(lambda p: 1 / jnp.sqrt(num_data * p), precision)
    return bnn.init(params, sigma, mask=True)


def divide_by_precision() -> optax.GradientTransformationExtraArgs:
    """Divides updates by `precision=`, an extra argument of `update`."""

    def update_fn(updates, state, params=None, *, precision, **extra_args):
        del params, extra_args
        divided = jax.tree.map(lambda u, p: (u / p).astype(u.dtype), updates, precision)
        return divided, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def clipping(norm: float | None) -> list[optax.GradientTransformation]:
    """What clips a gradient to a global norm: nothing for None."""
    if norm is None:
        return []
    check_number("clip_norm", norm, positive=True)

    def clip(updates, params):
        del params
        # Optax' own norm overflows where a square does, and clips to 0 then.
        length = tree.norm(updates)
        factor = jnp.where(length > norm, norm / length, 1.0)
        return jax.tree.map(
            lambda u: (factor * u.astype(tree.accumulation_dtype(u))).astype(u.dtype),
            updates,
        )

    return [optax.stateless(clip)]


def check_decay(name: str, value: Any) -> None:
    """Raises unless a value is a decay rate in [0, 1), or a traced one."""
    check_number(name, value)
    if not isinstance(value, jax.core.Tracer) and not float(value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}.")


def check_learning_rate(value: Any) -> None:
    """Raises for a number that is no learning rate; a schedule may be anything.

    With NaN no update is finite, and a whole optimizer would take no step for good.
    """
    if not callable(value):
        check_number("learning_rate", value)


def checked_num_data(value: Any, *, infinite: bool) -> Any:
    """N as a float, or traced; an integer of JAX would end at 2^31.

    Raises:
      ValueError, TypeError: It is no positive number; infinity may be allowed.
    """
    if infinite and isinstance(value, float) and value == math.inf:
        return value
    try:
        check_number("num_data", value, positive=True)
    except (TypeError, ValueError) as error:
        hint = ", or float('inf') for no noise" if infinite else ""
        raise type(error)(
            f"{error} It is the number of training examples{hint}."
        ) from error
    return value if isinstance(value, jax.core.Tracer) else float(value)


def whole(
    gradient: optax.GradientTransformationExtraArgs,
    rule: optax.GradientTransformationExtraArgs,
    divisor: Callable[[PyTree, PyTree], PyTree],
    kind: Callable[..., Any],
) -> optax.GradientTransformationExtraArgs:
    """A whole optimizer of a gradient that remembers and the rule that uses it.

    A batch that is not finite moves nothing: see :mod:`otmdr_jax.core.transform`.

    Args:
      gradient: Of :func:`otmdr_jax.core.transform.from_gradient`, with a memory.
      rule: Its `update` takes `precision=`, what it divides by.
      divisor: (memory before, memory after) -> that precision.
      kind: The state: the fields of `MemoryState`, then the rule's state.
    """

    def init_fn(params):
        return kind(*gradient.init(params), rule.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        before: Any = MemoryState(*state[:-1])
        grads, after = gradient.update(updates, before, params, **extra_args)
        seen: Any = after
        precision = divisor(before.memory, seen.memory)
        updates, moved = rule.update(grads, state[-1], params, precision=precision)
        finite = tree.all_finite((seen.diagnostics, updates, moved))
        updates = keep(finite, updates, optax.tree.zeros_like(updates))
        return updates, kind(*seen, keep(finite, moved, state[-1]))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
