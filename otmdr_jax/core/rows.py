"""Leaves of aux that follow the batch: logits, losses, whatever each example has.

A gradient sees the batch in parts, and averages what the passes over them give. A row
of one example must not be averaged with that of another. :func:`marked` finds such
leaves; whoever averages puts :class:`Rows` together in the batch's order instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core import shards, tree

PyTree = Any


class Rows(NamedTuple):
    """A leaf of aux that follows the batch.

    Attributes:
      array: Where it is put together from parts, (B, ...): a row for each example.
    """

    array: Any


def split(values: PyTree) -> tuple[PyTree, PyTree]:
    """A pytree without its :class:`Rows`, and these; `tree.merge` is the inverse."""
    return tree.partition(values, lambda x: not _is_rows(x), _is_rows)


def replaced(values: PyTree, others: PyTree) -> PyTree:
    """A pytree with the :class:`Rows` of an equal one in the place of its own."""
    return tree.merge(split(values)[0], split(others)[1])


def unmarked(values: PyTree) -> PyTree:
    """A pytree whose :class:`Rows` are the arrays that they hold."""
    return jax.tree.map(
        lambda x: x.array if _is_rows(x) else x, values, is_leaf=_is_rows
    )


def marked(loss: Callable[..., Any], *, joined: bool) -> Callable[..., Any]:
    """A loss to (value, aux) whose leaves of aux that follow the batch are Rows.

    A leaf does if a batch of twice the size changes its shape; of that batch nothing is
    computed. The statistics of BatchNorm have one shape, whatever the batch's.

    Args:
      loss: (params, batch, *args, **kwargs) -> (value, aux).
      joined: Whether parts of the batch are put together, for which the first axis must
        be that of the examples.

    Raises:
      ValueError: At the call, a leaf that follows the batch in another way; a loss that
        fails for another size, where a leaf has as many rows as the batch.
    """
    found: list[PyTree] = []  # of the first pass: the others have the same leaves

    def of(params, batch, *args, **kwargs):
        value, aux = loss(params, batch, *args, **kwargs)
        if not found:
            found.append(_follows(loss, aux, joined, params, batch, args, kwargs))
        return value, jax.tree.map(lambda f, x: Rows(x) if f else x, found[0], aux)

    return of


def only_in_batch(loss: Callable[..., Any], whole: PyTree) -> Callable[..., Any]:
    """A loss that refuses further arguments with a row for each example.

    The batch is cut and they are not. Integers are taken for labels; of floating leaves
    the loss of a batch of twice the size tells whether they belong to it: it fails.

    Args:
      loss: (params, batch, *args, **kwargs) -> (value, aux).
      whole: The batch, before it is cut.

    Raises:
      ValueError: At the call, such an argument. A loss that fails for the whole batch
        too raises what it raises.
    """
    done: list[bool] = []

    def of(params, batch, *args, **kwargs):
        if not done:
            _check_beside(loss, whole, params, args, kwargs)
            done.append(True)
        return loss(params, batch, *args, **kwargs)

    return of


def _check_beside(loss, whole, params, args, kwargs):
    size = tree.shape(jax.tree.leaves(whole)[0])[0]
    beside = jax.tree.leaves((args, kwargs))
    beside = [x for x in beside if tree.shape(x)[:1] == (size,)]
    labels = [x for x in beside if _is_integer(x)]
    error = None
    if beside and not labels:
        try:
            _of_larger(2, loss, params, whole, args, kwargs)
            return
        except Exception as raised:
            error = raised
        _of_larger(1, loss, params, whole, args, kwargs)  # does it fail anyway?
    if beside:
        raise ValueError(
            "only the batch, the first argument of loss_fn after params, is cut into "
            f"parts, got {size} examples of it and another argument of shape "
            f"{jnp.shape((labels or beside)[0])}. What belongs to the examples, as "
            "their labels, has to be cut with them: pass one pytree as the batch, such "
            "as (x, y). What does not can be bound to the loss by functools.partial."
        ) from error


def _follows(loss, aux, joined, params, batch, args, kwargs):
    """Which leaves of aux follow the batch."""
    sizes = {tree.shape(x)[:1] for x in jax.tree.leaves(batch)}
    other = aux
    try:
        if any(map(tree.shape, jax.tree.leaves(aux))):
            _, other = _of_larger(2, loss, params, batch, args, kwargs)
    except Exception as error:
        # Nothing to say of a loss that takes one size, unless it matters.
        if any(tree.shape(x)[:1] in sizes - {()} for x in jax.tree.leaves(aux)):
            raise ValueError(
                "a leaf of aux has as many rows as the batch. Whether it has one for "
                "each example cannot be told, since the loss fails for a batch of "
                "twice the size: put all that each example has into batch, the first "
                "argument after params."
            ) from error

    def follows(path, x, y):
        shape, of_twice = tree.shape(x), tree.shape(y)
        first = shape[:1] in sizes and of_twice == (2 * shape[0], *shape[1:])
        if joined and shape != of_twice and not first:
            raise ValueError(
                "microbatch_size and num_subbatches put aux of the examples together "
                "along its first axis, got a leaf that follows the batch in another "
                f"way: aux{jax.tree_util.keystr(path)} of shape {shape} for "
                f"{sorted(sizes)[0][0]} examples. Return (examples, ...)."
            )
        return shape != of_twice

    return jax.tree_util.tree_map_with_path(follows, aux, other)


def repeated(batch: PyTree, times: int) -> PyTree:
    """A batch of a multiple of the size, to trace what follows its examples."""

    def of(x):
        if not tree.shape(x):
            return x
        x = jnp.asarray(x)
        return shards.take(x, jnp.arange(times * x.shape[0]) % x.shape[0])

    return jax.tree.map(of, batch)


def _of_larger(times, loss, params, batch, args, kwargs):
    """What the loss returns for a batch of a multiple of the size: the shapes alone."""
    larger = repeated(batch, times)
    return jax.eval_shape(lambda: loss(params, larger, *args, **kwargs))


def _is_integer(x):
    """Whether a leaf may hold labels: the words of raw keys do not."""
    dtype = jnp.result_type(x)
    return dtype != jnp.uint32 and (
        jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
    )


def _is_rows(x):
    return isinstance(x, Rows)
