"""The robust gradient of Equinox models: for `equinox.filter_value_and_grad`."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "otmdr_jax.equinox needs Equinox: pip install equinox."
    ) from error

from otmdr_jax.core.batches import NO_BATCH
from otmdr_jax.core.gradient import PAPER_RHO
from otmdr_jax.core.options import RobustOptions
from otmdr_jax.core.signatures import with_options
from otmdr_jax.frameworks.objects import gradient_of

PyTree = Any


@with_options
def filter_value_and_grad(
    loss_fn: Callable[..., Any] | None = None,
    rho: Any = PAPER_RHO,
    **options: Unpack[RobustOptions],
) -> Callable[..., Any]:
    """The OT-MDR counterpart of `equinox.filter_value_and_grad`.

    Args:
      loss_fn: `loss_fn(model, batch, *args, **kwargs)` to the mean loss over the batch,
        a scalar, or to (loss, aux). All that belongs to the examples is in `batch`,
        which is cut into parts: a pytree, such as (x, y), with a row of keys for each
        example where it needs some. Further arguments, as `equinox.nn.State` or one key
        for all, go to every pass as they are. With `split="shared"`, and without
        sub-batches and micro-batches, nothing is cut: `loss_fn(model, x, y)` and
        `loss_fn(model)` work too. Left out, the result is a decorator.
      rho: See :func:`otmdr_jax.value_and_grad`.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      `grad_fn(model, batch, *args, key=None, rho=None, **kwargs)`, which returns what
      `equinox.filter_value_and_grad` does: `(value, grads)`, or `((value, aux), grads)`
      with `has_aux`. `grads` has the structure of the model, with None for all that is
      no floating array. `aux`, a new `equinox.nn.State` say, comes from the pass at the
      center, see :func:`otmdr_jax.value_and_grad`. `key` is the particles'; a loss that
      needs a key of its own takes it by position.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.value_and_grad`; a model without a
        floating array.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, otmdr_jax
      >>> def loss_fn(model, batch):
      ...     x, y = batch
      ...     return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2)
      >>> model = eqx.nn.MLP(3, 1, 8, depth=1, key=jax.random.key(0))
      >>> grad_fn = otmdr_jax.equinox.filter_value_and_grad(loss_fn, num_particles=2)
      >>> batch = jnp.eye(4, 3), jnp.ones(4)
      >>> loss, grads = eqx.filter_jit(grad_fn)(model, batch, key=jax.random.key(1))
      >>> updates = jax.tree.map(lambda g: -0.1 * g, grads)
      >>> bool(loss_fn(eqx.apply_updates(model, updates), batch) < loss)
      True
    """
    if loss_fn is None:
        return functools.partial(filter_value_and_grad, rho=rho, **options)
    robust = gradient_of(loss_fn, rho, options, _is_object)

    def grad_fn(model, batch=NO_BATCH, *args, key=None, rho=None, **kwargs):
        params, rest = eqx.partition(model, eqx.is_inexact_array)
        if not jax.tree.leaves(params):
            raise ValueError(
                f"there is nothing to differentiate: the {type(model).__name__} that "
                "came first has no floating array."
            )

        def run(loss, params, batch, others):
            # New objects for each pass: a State that has been set is spent.
            rest_of, (args, kwargs) = jax.tree.map(lambda x: x, (rest, others))
            own = eqx.combine(params, rest_of)
            return *loss(own, batch, *args, **kwargs), None

        value, _, grads = robust(run, params, batch, (args, kwargs), key, rho)
        return value, grads

    return grad_fn


def _is_object(x):
    return isinstance(x, eqx.Module | eqx.nn.State)
