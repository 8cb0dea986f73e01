"""An Optax transformation, lifted to members: each has its own state and norms."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.core import shards
from otmdr_jax.ensemble.stacking import count_members, is_placeholder, is_tuple

PyTree = Any


def per_member(
    optimizer: optax.GradientTransformation,
    *,
    member_args: Sequence[str] = ("value", "grad"),
) -> optax.GradientTransformationExtraArgs:
    """Lifts an Optax transformation to members: each has its own norms and state.

    Without it `optax.clip_by_global_norm`, for example, would clip stacked members by
    one norm over all of them, and all would share a count or an injected
    hyper-parameter.

    Args:
      optimizer: Any transformation of one member.
      member_args: Names of the extra arguments that differ between members and have a
        leading axis of M (or are tuples, for a tuple of members). The default is what
        `reduce_on_plateau` of `optax.contrib` and line searches take. Other arguments
        are passed on whole.

    Returns:
      A transformation of stacked members, or of a tuple of them. Its state is the
      optimizer's with a leading axis of M on every leaf, or a tuple of states. Typed
      PRNG keys in the state are made different for each member, so those of
      `per_member(otmdr(loss_fn, key))` are independent, whatever kind `key` is. A raw
      key that another library keeps cannot be told from other numbers and stays the
      same for all members: give that library a typed key.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from otmdr_jax import ensemble
      >>> tx = ensemble.per_member(optax.clip_by_global_norm(1.0))
      >>> grads = jnp.array([[3.0, 4.0], [0.3, 0.4]])
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> [round(float(x), 4) for x in updates.ravel()]  # the second was shorter than 1
      [0.6, 0.8, 0.3, 0.4]
    """
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        if is_placeholder(params):
            return inner.init(params)
        count = count_members(params)
        if is_tuple(params):
            return tuple(_own_keys(inner.init(p), i) for i, p in enumerate(params))
        with shards.on_their_mesh(params):
            index = shards.align_rows(jnp.arange(count), params)
            state = jax.vmap(lambda p, i: _own_keys(inner.init(p), i))(params, index)
            return shards.place_like(shards.align_rows(state, params), params)

    def update_fn(updates, state, params=None, **extra_args):
        own = {k: extra_args.pop(k) for k in member_args if k in extra_args}

        def update(updates, state, params, own):
            return inner.update(updates, state, params, **own, **extra_args)

        if is_placeholder(updates):  # a group without parameters, as of a mask
            return update(updates, state, params, own)
        if not is_tuple(updates):
            with shards.on_their_mesh(updates):
                rows = shards.align_rows((updates, state, params, own), updates)
                return jax.vmap(update)(*rows)
        found = [
            update(
                updates[i],
                state[i],
                None if params is None else params[i],
                {name: values[i] for name, values in own.items()},
            )
            for i in range(count_members(updates))
        ]
        return tuple(zip(*found, strict=True))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _own_keys(state: PyTree, index: Any) -> PyTree:
    """Makes the typed PRNG keys in a member's state its own."""

    def fold(leaf):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return jax.random.fold_in(leaf, index)
        return leaf

    return jax.tree.map(fold, state)
