"""The robust gradient of a Flax NNX model: a drop-in for `flax.nnx.value_and_grad`.

A model, or several, goes through `nnx.to_tree` and `nnx.from_tree`, as it does in
`nnx.value_and_grad`. Each pass starts from the state that the model has at the call.
What the loss changes is written back once, as the pass at the center left it.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax

try:
    from flax import nnx
except ImportError as error:
    from otmdr_jax.io import extras

    raise ImportError(
        f"otmdr_jax.nnx needs Flax. {extras.command('models')}"
    ) from error

from otmdr_jax.core.batches import NO_BATCH
from otmdr_jax.core.gradient import PAPER_RHO
from otmdr_jax.core.options import RobustOptions
from otmdr_jax.core.signatures import with_options
from otmdr_jax.frameworks.objects import Static, gradient_of

PyTree = Any
Argnum = int | nnx.DiffState

# NNX finds an object again, inside and outside of a pass, by the context's name.
_CONTEXT = "otmdr_jax"


@with_options
def value_and_grad(
    loss_fn: Callable[..., Any] | None = None,
    rho: Any = PAPER_RHO,
    argnums: Argnum | Sequence[Argnum] = 0,
    **options: Unpack[RobustOptions],
) -> Callable[..., Any]:
    """The OT-MDR counterpart of `flax.nnx.value_and_grad`.

    Every pass starts from the model's state at the call: BatchNorm's statistics, random
    streams and all else that is not differentiated. What the pass at the center changes
    of it is written back once, whatever the number of passes. It is treated as aux is,
    see :func:`otmdr_jax.value_and_grad`: floating arrays are averaged over particles,
    parts of the batch and devices, counts are those of one pass.

    Args:
      loss_fn: `loss_fn(model, batch, *args, **kwargs)` to the mean loss over the batch,
        a scalar, or to (loss, aux). All that belongs to the examples is in `batch`,
        which is cut into parts; further arguments, among them `nnx.Rngs` and other
        models, go to every pass as they are. With `split="shared"`, and without
        sub-batches and micro-batches, nothing is cut: `loss_fn(model, x, y)` and
        `loss_fn(model)` work too. Left out, the result is a decorator.
      rho: See :func:`otmdr_jax.value_and_grad`.
      argnums: What is differentiated, and perturbed, as in `nnx.value_and_grad`: the
        position of an argument, whose `nnx.Param` are meant, or
        `nnx.DiffState(position, filter)`, or several of these. Position 1, the batch,
        is none of them. `mask` has the structure of the gradient.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      `grad_fn(model, batch, *args, key=None, rho=None, **kwargs)`, which returns what
      `nnx.value_and_grad` does: `(value, grads)`, or `((value, aux), grads)` with
      `has_aux`. `grads` is an `nnx.State`, for several `argnums` a tuple of them.
      `key` is the particles'; no stream of the model pays for it.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.value_and_grad`; `argnums` that name no
        argument, the batch, or nothing to differentiate; a method of a model.

    Example:
      >>> import jax, jax.numpy as jnp, optax, otmdr_jax
      >>> from flax import nnx
      >>> def loss_fn(model, batch):
      ...     return jnp.mean((model(batch["x"])[:, 0] - batch["y"]) ** 2)
      >>> @nnx.jit
      ... def train_step(model, optimizer, batch, key):
      ...     grad_fn = otmdr_jax.nnx.value_and_grad(loss_fn, num_particles=2)
      ...     loss, grads = grad_fn(model, batch, key=key)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> batch = {"x": jnp.eye(4, 3), "y": jnp.ones(4)}
      >>> first = train_step(model, optimizer, batch, jax.random.key(0))
      >>> bool(train_step(model, optimizer, batch, jax.random.key(1)) < first)
      True
    """
    filters = _filters(argnums)
    if loss_fn is None:
        return functools.partial(value_and_grad, rho=rho, argnums=argnums, **options)
    if inspect.ismethod(loss_fn) and isinstance(loss_fn.__self__, nnx.Module):
        raise TypeError(
            f"loss_fn must be a function of (model, batch), got the method "
            f"{loss_fn.__name__} of a model: pass {type(loss_fn.__self__).__name__}."
            f"{loss_fn.__name__}, whose first argument is the model."
        )
    robust = gradient_of(loss_fn, rho, options, _is_node)
    several = not isinstance(argnums, Argnum)

    @nnx.update_context(_CONTEXT)
    def grad_fn(model, batch=NO_BATCH, *args, key=None, rho=None, **kwargs):
        if (last := max(filters)) >= 2 + len(args):
            raise ValueError(
                f"argnums has {last}, but the last argument passed by position is "
                f"{1 + len(args)}: pass by position what is differentiated."
            )
        args, kwargs = _split(((model, None, *args), kwargs), filters)
        params = tuple(_states(args[i]) for i in filters)
        if not jax.tree.leaves(params):
            raise ValueError(
                f"argnums={argnums!r} names nothing to differentiate: no variable of "
                "the model is of that kind."
            )
        others = [None if i in filters else x for i, x in enumerate(args)]

        def run(loss, params, batch, others):
            own, kwargs = others
            for i, states in zip(filters, params if several else [params], strict=True):
                own[i] = _with_states(args[i], states)
            before = tuple(own), kwargs
            own, kwargs = nnx.from_tree(before, is_inner=True, ctxtag=_CONTEXT)
            value, aux = loss(own[0], batch, *own[2:], **kwargs)
            *after, aux = _split((own, kwargs, aux), filters, check_aliasing=False)
            old, new = _leaves(before), _leaves(tuple(after))
            # Of the rest nothing is averaged: the mean of equal numbers is rounded.
            changed = {path: x for path, x in new.items() if x is not old.get(path)}
            return value, aux, (changed, Static((jax.tree.structure(after), *new)))

        value, (changed, what), grads = robust(
            run, params if several else params[0], batch, (others, kwargs), key, rho
        )
        treedef, *paths = what.value
        center = _leaves((args, kwargs)) | changed
        after = jax.tree.unflatten(treedef, [center[path] for path in paths])
        # Writes `after` into the objects that the call was given.
        _, value = nnx.from_tree((after, value), is_inner=False, ctxtag=_CONTEXT)
        return value, grads

    return grad_fn


def _filters(argnums: Any) -> dict[int, Any]:
    """{position of an argument: `nnx.DiffState` of what is differentiated there}."""
    found: dict[int, Any] = {}
    for argnum in [argnums] if isinstance(argnums, Argnum) else argnums:
        state: Any = argnum
        if not isinstance(argnum, nnx.DiffState):
            state = nnx.DiffState(argnum, nnx.Param)
        position = state.argnum
        if isinstance(position, bool) or not isinstance(position, int) or position < 0:
            raise TypeError(
                "argnums must be positions of arguments, from 0, or nnx.DiffState("
                f"position, filter), got {argnum!r}."
            )
        if position == 1:
            raise ValueError(
                "argnums has 1, the batch, which is cut, not differentiated. Another "
                "model comes after it: loss_fn(model, batch, other), argnums=(0, 2)."
            )
        if position in found:
            raise ValueError(f"argnums has {position} twice: join the two filters.")
        found[position] = state
    if not found:
        raise ValueError("argnums is empty: pass 0 for the model.")
    return found


def _split(arguments, filters, **options):
    """(args, ...) whose objects are `nnx.NodeStates`, what is differentiated first."""
    args, *others = arguments
    prefix = tuple(filters.get(i) for i in range(len(args))), *(None for _ in others)

    def states(context, path, own, node):
        # A variable that is an argument itself is differentiated whatever its kind.
        chosen = own is not None and not isinstance(node, nnx.Variable)
        parts = context.split(node, *([own.filter, ...] if chosen else []))
        return nnx.NodeStates.from_split(*parts)

    return nnx.to_tree(
        arguments, prefix=prefix, split_fn=states, ctxtag=_CONTEXT, **options
    )


def _states(argument):
    """What is differentiated of an argument: of the structure of its gradient."""
    return jax.tree.map(
        lambda x: x.states[0] if _is_node(x) else x, argument, is_leaf=_is_node
    )


def _with_states(argument, states):
    """The argument with others in the place of its own."""
    return jax.tree.map(
        lambda x, own: x.replace(states=(own, *x.states[1:])) if _is_node(x) else own,
        argument,
        states,
        is_leaf=_is_node,
    )


def _leaves(values):
    """The leaves of a pytree by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(values)
    return {jax.tree_util.keystr(path): x for path, x in leaves}


def _is_node(x):
    return isinstance(x, nnx.NodeStates)
