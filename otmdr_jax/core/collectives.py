"""Device axes inside `jax.shard_map` and `jax.pmap`: what is averaged, what differs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import tree

PyTree = Any
Axes = tuple[Any, ...]


def axes_of(*names: Any) -> Axes:
    """One flat tuple of axis names; None is no axis, a tuple or list is several."""
    flat: Axes = ()
    for name in names:
        several = isinstance(name, (tuple, list))
        flat += tuple(name) if several else () if name is None else (name,)
    return flat


def check_bound(axes: Axes) -> None:
    """Raises ValueError unless the axes are those of a shard_map or pmap around."""
    for axis in axes:
        try:
            jax.lax.axis_size(axis)
        except NameError as error:
            raise ValueError(
                f"there is no device axis {axis!r} here: call this inside "
                "jax.shard_map (on a mesh that has it) or jax.pmap, or leave axis_name "
                "out."
            ) from error


def pmean(values: PyTree, axes: Axes) -> PyTree:
    """Averages floating leaves over devices; leaves others as each device has them."""
    if not axes:
        return values

    def mean(x):
        if not tree.is_floating(x):
            return x
        # A sum of float16 overflows. bfloat16 has the range of float32, and is
        # exchanged as it is, which takes half of the bytes.
        wide = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
        return jax.lax.pmean(vary(wide, axes), axes).astype(x.dtype)

    return jax.tree.map(mean, values)


def slots(values: jax.Array, axes: Axes) -> jax.Array:
    """Puts (n,) of each device where its mean over devices joins them: (devices n,)."""
    if not axes:
        return values
    devices = jax.lax.axis_size(axes)
    spread = jnp.zeros((devices, *values.shape), values.dtype)
    return spread.at[jax.lax.axis_index(axes)].set(devices * values).reshape(-1)


def gather(values: PyTree, axes: Axes) -> PyTree:
    """Joins (n, ...) of each device: (devices n, ...), the same on all to the bit."""
    if not axes:
        return values
    devices, here = jax.lax.axis_size(axes), jax.lax.axis_index(axes)

    def gathered(x):
        wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        spread = jnp.zeros((devices, *x.shape), wide.dtype).at[here].set(wide)
        found = jax.lax.psum(vary(spread, axes), axes).astype(x.dtype)
        return found.reshape(devices * x.shape[0], *x.shape[1:])

    return jax.tree.map(gathered, values)


def vary(values: PyTree, axes: Axes) -> PyTree:
    """Marks arrays as differing between devices, where shard_map keeps track."""
    # Of a vmap's axis with that name nobody does.
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = tuple(axis for axis in axes if axis in manual)
    return jax.tree.map(lambda x: _mark(x, [a for a in axes if _is_same(x, a)]), values)


def varying(x: Any) -> frozenset:
    """The device axes along which an array may differ, where shard_map keeps track."""
    return frozenset(jax.typeof(x).mat.varying)


def scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], start: PyTree, xs: PyTree
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`, whose carry may start along fewer device axes than it ends."""

    def widened(x, end):
        kind = end.manual_axis_type
        return _mark(x, kind.varying - varying(x)) if kind else x

    while jax.sharding.get_abstract_mesh().manual_axes:
        first = jax.tree.map(lambda x: x[0], xs)
        before = start
        start = jax.tree.map(widened, start, jax.eval_shape(step, start, first)[0])
        if _types(start) == _types(before):
            break
    return jax.lax.scan(step, start, xs)


def barrier(first: PyTree, then: PyTree) -> PyTree:
    """`then`, but available only once `first` is, to XLA's optimizations.

    `jax.lax.optimization_barrier`, of which each result would be marked as differing
    along the axes of all operands. Leaves that differ along fewer axes than all of
    `first` do not wait for it.
    """
    leaves, treedef = jax.tree.flatten(then)
    before = jax.tree.leaves(first)
    kinds = [varying(x) if isinstance(x, jax.Array) else None for x in leaves]
    for kind in dict.fromkeys(kinds):  # a set would have another order in each process
        if kind is None:
            continue
        own = [i for i, k in enumerate(kinds) if k == kind]
        waited = [x for x in before if varying(x) <= kind]
        _, kept = jax.lax.optimization_barrier((waited, [leaves[i] for i in own]))
        for i, x in zip(own, kept, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(treedef, leaves)


def _types(values):
    return [jax.typeof(x) for x in jax.tree.leaves(values)]


def _mark(x, axes):
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _is_same(x, axis):
    """Whether x may still be marked as varying over an axis; only a trial tells."""
    try:
        jax.lax.pcast(x, axis, to="varying")
    except ValueError:
        return False
    return True
