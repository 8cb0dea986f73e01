"""Mapping over particles, micro-batches and members: vmap, unrolled or scanned.

How they are mapped is a matter of speed and memory alone: see docs/performance.md.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import shards, tree

PyTree = Any

# With more than this, `auto` scans on an accelerator: an unrolled program is as fast
# there, but takes as many times as long to compile.
MAX_UNROLLED = 8


def average(
    function: Callable[[Any], tuple[PyTree, PyTree]],
    xs: PyTree,
    count: int,
    how: str = "auto",
    varying: Callable[[PyTree], PyTree] = lambda x: x,
) -> tuple[PyTree, PyTree]:
    """Runs a function on every x and averages what it returns.

    Args:
      function: x -> (to_average, to_stack).
      xs: A pytree with a leading axis of `count`: keys, examples; for a count of 1 one
        x, without that axis.
      count: How many.
      how: "unroll" (a loop in the program: one after the other, the memory of one),
        "scan" (the same, compiled once), "vmap" (all at once, `count` times the
        activations), "auto" (for particles) or "sequential" (for micro-batches: never
        all at once, and one copy in the program wherever a loop is fast).
      varying: Marks fresh arrays as differing between devices, for a scan's carry
        inside shard_map.

    Returns:
      The mean of `to_average`, summed in float32 or wider (of leaves that are not
      floating, the first x's), and `to_stack` with a leading axis of `count`.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core.loops import average
      >>> mean, each = average(lambda x: (x, 2 * x), jnp.arange(3.0), 3, "scan")
      >>> float(mean), each.tolist()
      (1.0, [0.0, 2.0, 4.0])
    """
    if count == 1:
        mean, stacked = function(xs)
        return mean, jax.tree.map(lambda x: jnp.asarray(x)[None], stacked)

    how = _fastest(how, count)
    if how == "vmap":
        mean, stacked = jax.vmap(function)(xs)
        return jax.tree.map(_mean_of_stacked, mean), stacked
    if how == "scan":
        return _scan(function, xs, count, varying)
    return _unroll(function, xs, count)


def each(
    functions: Callable[..., PyTree] | Sequence[Callable[..., PyTree]],
    columns: Sequence[Any],
    how: str = "auto",
) -> PyTree:
    """Runs a function for each member of an ensemble.

    Args:
      functions: (wait, *row) -> pytree of arrays: one function for members that are
        alike, or M for members that differ. An unrolled call holds activations while
        the one before does, unless it hands `wait` something that all its work depends
        on (its key, its batch, an index): see :func:`after`.
      columns: The arguments. For one function each is a pytree with a leading axis of M
        on every leaf, or None; for M functions a sequence of M pytrees, or None.
      how: "unroll", "scan", "vmap" or "auto". Members that differ are unrolled.

    Returns:
      What the function returns with a leading axis of M on every leaf; for M functions
      a tuple of what each returns.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core.loops import each
      >>> double = lambda wait, x: 2 * wait(x)
      >>> each(double, [jnp.arange(3.0)], "unroll").tolist()
      [0.0, 2.0, 4.0]
      >>> [x.shape for x in each([double, double], [(jnp.ones(2), jnp.ones(3))])]
      [(2,), (3,)]
    """

    def unrolled(functions, rows):
        outs: list[PyTree] = []
        for function, row in zip(functions, rows, strict=True):
            wait = functools.partial(after, outs[-1] if outs else None)
            outs.append(function(wait, *row))
        return outs

    if not callable(functions):
        rows = [
            [None if column is None else column[i] for column in columns]
            for i in range(len(functions))
        ]
        return tuple(unrolled(functions, rows))
    columns = list(columns)
    first = jax.tree.leaves(columns)[0]
    count = jnp.shape(first)[0]
    if (spread := shards.axes_of_rows(first)) and how not in ("auto", "vmap"):
        raise ValueError(
            f"members that are spread over devices (axis {spread!r} of an explicit "
            f'mesh) are mapped at once: use member_map="vmap" or "auto", got {how!r}.'
        )
    how = "vmap" if spread else member_map(how)
    if how == "unroll":
        rows = [_take(columns, i) for i in range(count)]
        return tree.stack(unrolled([functions] * count, rows))

    def together(row):
        return functions(lambda values: values, *row)

    if how == "scan":
        return jax.lax.map(together, columns)
    with shards.on_their_mesh(first):
        return jax.vmap(together)(shards.align_rows(columns, first))


def member_map(how: str, *, fast_in_loops: bool = False) -> str:
    """The map that `auto` stands for: the fastest one of the default backend.

    On accelerators that is "vmap". On CPUs, where it is measured
    (benchmarks/ensemble.py), a scan is the fastest and takes the memory of one member,
    unless a convolution of `jax.lax` stands in the loop; unrolled members are next.

    Args:
      how: "auto", or a map, which stays.
      fast_in_loops: Whether members are known to hold no convolution of `jax.lax`, as
        the networks of :mod:`otmdr_jax.models` are. A loss of the user's is not.
    """
    if how != "auto":
        return how
    if jax.default_backend() != "cpu":
        return "vmap"
    return "scan" if fast_in_loops else "unroll"


def after(floats: PyTree, xs: PyTree) -> PyTree:
    """`xs`, but available only once `floats` is.

    Makes one evaluation wait for the one before it, so that only one holds activations
    at a time. An optimization barrier does not: XLA removes it before it schedules, and
    on CPUs it schedules for concurrency. x * 0 may be NaN, so that no compiler drops
    it; as an integer it is 0 either way.
    """
    leaves = [x for x in map(jnp.asarray, jax.tree.leaves(floats)) if x.size]
    seen = sum(jnp.real(shards.first_entry(x)) for x in leaves if tree.is_floating(x))
    zero = jnp.nan_to_num(seen * 0).astype(jnp.uint32)

    def wait(x):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(x) + zero
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if x.dtype == jnp.bool_:
            return x ^ zero.astype(x.dtype)
        return x + zero.astype(x.dtype)

    return jax.tree.map(wait, xs)


def _fastest(how: str, count: int) -> str:
    """What `auto` and `sequential` stand for on the default backend.

    On CPUs XLA runs a convolution inside a loop, or one batched over kernels, many
    times slower than the same convolution standing alone.
    """
    if how not in ("auto", "sequential"):
        return how
    on_cpu, few = jax.default_backend() == "cpu", count <= MAX_UNROLLED
    if how == "sequential":  # dozens of copies would take minutes to compile
        return "unroll" if on_cpu and few else "scan"
    return "unroll" if on_cpu or few else "scan"


def _unroll(function, xs, count):
    mean, stacked = function(_take(xs, 0))
    floats, others = tree.partition(mean, tree.is_floating)
    total, stacks = _widen(floats), [stacked]
    for i in range(1, count):
        more, stacked = function(after(total, _take(xs, i)))
        more, _ = tree.partition(more, tree.is_floating)
        total = jax.tree.map(jnp.add, total, more)
        stacks.append(stacked)
    return tree.merge(_divide(total, floats, count), others), tree.stack(stacks)


def _scan(function, xs, count, varying):
    shapes, _ = jax.eval_shape(function, _take(xs, 0))
    shapes, _ = tree.partition(shapes, tree.is_floating)

    def body(total, x):
        mean, stacked = function(x)
        floats, others = tree.partition(mean, tree.is_floating)
        return jax.tree.map(jnp.add, total, floats), (others, stacked)

    zeros = jax.tree.map(shards.zeros, shapes)
    total, (others, stacked) = jax.lax.scan(body, varying(_widen(zeros)), xs)
    others = jax.tree.map(lambda x: x[0], others)
    return tree.merge(_divide(total, shapes, count), others), stacked


def _mean_of_stacked(x):
    return jnp.mean(x, axis=0).astype(x.dtype) if tree.is_floating(x) else x[0]


def _take(xs, index):
    return jax.tree.map(lambda x: x[index], xs)


def _widen(floats):
    """Sums of bfloat16 gradients are kept in float32."""
    return jax.tree.map(
        lambda x: jnp.asarray(x).astype(tree.accumulation_dtype(x)), floats
    )


def _divide(total, like, count):
    return jax.tree.map(lambda t, x: (t / count).astype(x.dtype), total, like)
