"""Cutting a batch: parts of the ascent steps, sub-batches and micro-batches."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.core import loops, rows, shards, tree

PyTree = Any


class NoBatch(NamedTuple):
    """The batch of a loss that takes none: a pytree without leaves."""


NO_BATCH = NoBatch()


def batch_size(batch: PyTree) -> int:
    """The leading axis that all leaves of a batch share.

    Raises:
      ValueError: The batch has no leaves, a leaf without axes, leaves that disagree,
        or no examples.
      TypeError: There is no batch.
    """
    if isinstance(batch, NoBatch):
        raise TypeError(
            "this gradient is of a batch that it cuts into parts: pass it, as "
            "grad_fn(params, batch, ...) or tx.update(..., params, batch=batch). "
            "Flax's TrainState.apply_gradients hands no batch on: give it gradients of "
            "grad_fn, or write tx.update and state.replace out. For a loss without a "
            'batch use split="shared".'
        )
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or any(not shape for shape in shapes):
        raise ValueError(
            "batch must be a pytree of arrays with a leading example axis, got "
            f"leaves of shapes {_listed(shapes)}. Pass what has no such axis as a "
            "further argument of the loss, after batch; make an array of a list of "
            "numbers, each of which is a leaf."
        )
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            "all leaves of batch must share their leading axis, got leaves of "
            f"shapes {_listed(shapes)}."
        )
    if sizes == {0}:
        raise ValueError(f"batch is empty: its leaves have shapes {_listed(shapes)}.")
    return sizes.pop()


def _listed(shapes):
    """The first shapes: a list of numbers has thousands."""
    more = f" and {len(shapes) - 8} more" if len(shapes) > 8 else ""
    return f"{', '.join(map(str, shapes[:8]))}{more}"


def check_examples(batch: PyTree) -> None:
    """Refuses a batch without examples; any other one will do where nothing is cut.

    The nodes and edges of graphs have axes of their own, and some losses take no batch.
    """
    if {tree.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)} == {(0,)}:
        batch_size(batch)  # raises


def check_known(size: Any, num_parts: int, what: str) -> None:
    """Raises ValueError for a symbolic size that does not divide into equal parts.

    A program that `jax.export` makes for any batch size cannot cut a batch where that
    depends on the size.

    Args:
      size: The batch's size, an integer or what `jax.export.symbolic_shape` makes.
      num_parts: Parts to cut it into; 0 where it has to be a number.
      what: What needs the size.
    """
    if isinstance(size, int) or (num_parts and isinstance(size % num_parts, int)):
        return
    parts = f" or a multiple of {num_parts}" if num_parts else ""
    raise ValueError(
        f"{what} needs a batch size that is a number{parts} when a program is "
        f"exported, got {size}: export with such a size, or use split='shared' without "
        "microbatch_size and num_subbatches, which works for any."
    )


def split_batch(batch: PyTree, num_parts: int, key: jax.Array | None) -> list[PyTree]:
    """Cuts a batch into parts whose sizes differ by at most one; drops nothing.

    Args:
      batch: A pytree with a leading example axis of B >= num_parts.
      num_parts: S, the number of parts; the first B mod S have one example more.
      key: A PRNG key for a random split, or None for consecutive parts.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core.batches import split_batch
      >>> [part.tolist() for part in split_batch(jnp.arange(5), 2, key=None)]
      [[0, 1, 2], [3, 4]]
    """
    size = batch_size(batch)
    if key is None:
        check_known(size, num_parts, "split='ordered'")
    else:
        check_known(size, 0, "split='random'")
    if size < num_parts:
        raise ValueError(
            f"a batch of {size} cannot be cut into {num_parts} parts, one for each "
            'step: use a larger batch, fewer radii or num_steps, or split="shared".'
        )
    each, longer = divmod(size, num_parts)
    bounds = [i * each + min(i, longer) for i in range(num_parts + 1)]
    divided = shards.may_be_divided(batch)
    if key is None and divided and size % (num_parts * jax.device_count()) == 0:
        return _divided_parts(batch, bounds, jnp.arange(size))
    if key is None:
        return [
            jax.tree.map(lambda x, a=a, b=b: shards.cut(x, a, b), batch)
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
    order = jax.random.permutation(key, size)
    if divided:
        return _divided_parts(batch, bounds, order)
    return [
        jax.tree.map(lambda x, i=order[a:b]: shards.take(jnp.asarray(x), i), batch)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]


def _divided_parts(batch, bounds, order):
    """Parts of a batch that XLA may have divided over devices, divided as it is.

    Rows that are gathered have no sharding that XLA could see, so that each device
    would compute all of a part. So all are sent to where their part wants them: the
    s-th of each S rows on every device are its rows of the s-th part.

    Args:
      batch: A pytree with a leading example axis of B.
      bounds: Where the parts begin and end in `order`; the first are longer by one.
      order: (B,) indices of examples.
    """
    num_parts = len(bounds) - 1
    even = len(order) % (num_parts * jax.device_count()) == 0
    sent = order
    for s, (a, b) in enumerate(itertools.pairwise(bounds)):
        sent = sent.at[s::num_parts].set(order[a:b])

    def cut(x):
        x = jnp.asarray(x)
        rows = shards.lying_as(x, x[sent])
        if not even:  # XLA pads fewer rows of these
            return [rows[s::num_parts] for s in range(num_parts)]
        rows = rows.reshape(-1, num_parts, *x.shape[1:])
        return [rows[:, s] for s in range(num_parts)]

    leaves, treedef = jax.tree.flatten(batch)
    columns = [cut(x) for x in leaves]
    return [
        jax.tree.unflatten(treedef, [column[s] for column in columns])
        for s in range(num_parts)
    ]


def subbatches(
    batch: PyTree, key: jax.Array | None, count: int, axes: tuple[Any, ...]
) -> tuple[PyTree, Any, int]:
    """Cuts a batch into consecutive parts of one size, for m-sharpness.

    Args:
      batch: A pytree with a leading example axis: this device's.
      key: The step's PRNG key or None.
      count: Parts of the batch of all devices.
      axes: The device axes that it is divided over.

    Returns:
      This device's parts and their keys, on a leading axis where they are several, and
      how many they are.
    """
    devices = jax.lax.axis_size(axes) if axes else 1
    here, over = divmod(count, devices)
    if over or not here:
        raise ValueError(
            f"num_subbatches must be 1 or a multiple of the {devices} devices that the "
            f"batch is divided over, got {count}: each cuts its own part."
        )
    size = batch_size(batch)
    check_known(size, here, f"num_subbatches={count}")
    if size % here:
        raise ValueError(
            f"{here} sub-batches of one size cannot be cut from a batch of {size}"
            + (f" on each of {devices} devices" if devices > 1 else "")
            + f": num_subbatches={count} must divide it."
        )
    keys = None if key is None else jax.random.split(key, count)
    first = here * jax.lax.axis_index(axes) if devices > 1 else 0
    if here == 1:
        return batch, None if keys is None else keys[first], 1
    each = size // here
    if shards.may_be_divided(batch) and size % (here * jax.device_count()) == 0:
        bounds = range(0, size + 1, each)
        parts = tree.stack(_divided_parts(batch, bounds, jnp.arange(size)))
    else:
        parts = jax.tree.map(
            lambda x: jnp.asarray(x).reshape(
                here, each, *x.shape[1:], out_sharding=shards.of_rows(x, each, lead=1)
            ),
            batch,
        )
    if keys is not None:
        keys = jax.lax.dynamic_slice_in_dim(keys, first, here)
    return parts, keys, here


def accumulate(
    function: Callable[[PyTree], PyTree],
    batch: PyTree,
    microbatch_size: int | None,
    waiting: Callable[[PyTree], PyTree] = lambda x: x,
) -> PyTree:
    """The mean of a function over a batch, computed micro-batch by micro-batch.

    Args:
      function: batch -> pytree of means over its examples: loss, aux, gradient.
      batch: A pytree with a leading example axis B.
      microbatch_size: Examples at a time; None for all of them. Where it does not
        divide B, the last micro-batch is smaller and weighs less. Micro-batches take
        every n-th example, so that each device of a sharded batch keeps its own.
      waiting: See :func:`otmdr_jax.core.loops.average`.

    Returns:
      What `function(batch)` returns if it is a mean over examples. Floating leaves are
      averaged by the number of examples, in float32 or wider; others are the first
      micro-batch's. `rows.Rows` are put together in the order of the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core.batches import accumulate
      >>> float(accumulate(jnp.mean, jnp.arange(5.0), 2))
      2.0
    """
    if microbatch_size is None:
        return function(batch)
    size = batch_size(batch)
    check_known(size, 0, f"microbatch_size={microbatch_size}")
    if microbatch_size >= size:
        return function(batch)
    count, rest = divmod(size, microbatch_size)
    whole = size - rest
    pieces = jax.tree.map(
        lambda x: _interleaved(shards.cut(jnp.asarray(x), 0, whole), microbatch_size),
        batch,
    )
    if count == 1:
        pieces = jax.tree.map(lambda x: x[0], pieces)
    mean, of_examples = loops.average(
        lambda piece: rows.split(function(piece)), pieces, count, "sequential", waiting
    )
    of_examples = jax.tree.map(lambda x: shards.flat(x.swapaxes(0, 1)), of_examples)
    if not rest:
        return tree.merge(mean, of_examples)
    # A shape of its own: one more copy of the pass in the program, no padding.
    rest_of = jax.tree.map(lambda x: shards.cut(jnp.asarray(x), whole, size), batch)
    last, of_rest = rows.split(function(loops.after(mean, rest_of)))
    mean = tree.weighted_mean(mean, last, whole, rest)
    return tree.merge(mean, jax.tree.map(shards.concatenate, of_examples, of_rest))


def _interleaved(x, microbatch_size):
    """Micro-batches on a new first axis, each of every n-th example."""
    sharding = shards.of_rows(x, microbatch_size, lead=1)
    if sharding is None:
        return optax.microbatching.reshape_batch_axis(x, microbatch_size)
    shape = -1, microbatch_size, *x.shape[1:]
    return x.reshape(shape, order="F", out_sharding=sharding)
