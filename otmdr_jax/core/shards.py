"""Arrays whose sharding is part of their type: those on a mesh with explicit axes.

There JAX follows shardings while it traces, and has to be told wherever an operation
leaves a choice. For all other arrays (on one device, on automatic axes, inside
`jax.shard_map`) these functions are the plain operations.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


def of(x: Any) -> NamedSharding | None:
    """The sharding in the type of an array; None where no axis of it is sharded."""
    sharding = jax.typeof(x).sharding
    return sharding if any(axes is not None for axes in sharding.spec) else None


def is_explicit(x: Any) -> bool:
    """Whether an array lies on a mesh with explicit axes, sharded or not."""
    types = jax.typeof(x).sharding.mesh.axis_types
    return jax.sharding.AxisType.Explicit in types


def axes_of_rows(x: Any) -> Any:
    """The mesh axes that the first axis of an array is sharded over, or None."""
    sharding = of(x)
    return sharding.spec[0] if sharding else None


def of_rows(x: Any, size: int, lead: int = 0) -> NamedSharding | None:
    """The sharding of so many rows of an array; None where it has none.

    Rows that the devices do not divide are on all of them.

    Args:
      x: An array of rows.
      size: How many of them.
      lead: New axes before that of the rows; they are not sharded.
    """
    sharding = of(x)
    if sharding is None:
        return None
    axes, *rest = sharding.spec
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    if size % math.prod(sharding.mesh.shape[name] for name in names):
        axes = None
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * lead, axes, *rest))


def take(x: jax.Array, index: jax.Array, mode: str | None = None) -> jax.Array:
    """The rows `x[index]`, sharded as those of x; `mode` as in `jnp.take`."""
    sharding = of_rows(x, index.shape[0])
    if sharding is None:
        return x[index] if mode is None else jnp.take(x, index, 0, mode=mode)
    return x.at[index].get(mode=mode, out_sharding=sharding)


def cut(x: jax.Array, start: int, stop: int) -> jax.Array:
    """The rows `x[start:stop]`, sharded as those of x."""
    if axes_of_rows(x) is None:
        return x[start:stop]
    return take(x, jnp.arange(start, min(stop, len(x))))


def flat(x: jax.Array) -> jax.Array:
    """Parts (n, m, ...) as rows (n m, ...), sharded as the parts or their rows are."""
    sharding = of(x)
    if sharding is not None:
        parts, inner, *rest = sharding.spec
        spec = PartitionSpec(inner if parts is None else parts, *rest)
        sharding = NamedSharding(sharding.mesh, spec)
    return x.reshape(-1, *x.shape[2:], out_sharding=sharding)


def concatenate(x: jax.Array, y: jax.Array) -> jax.Array:
    """The rows of two arrays, sharded as those of either if the devices divide them."""
    like = x if axes_of_rows(x) else y
    sharding = of_rows(like, len(x) + len(y))
    if sharding is None:
        return jnp.concatenate([x, y])
    mesh = (_sharding_on_devices(like) or sharding).mesh
    return jax.sharding.auto_axes(
        lambda *both: jnp.concatenate(both),
        out_sharding=NamedSharding(mesh, sharding.spec),
    )(x, y)


def first_entry(x: jax.Array) -> jax.Array:
    """The scalar `x[0, ..., 0]`; only it is sent from device to device."""

    def first(x):
        return x[(0,) * x.ndim]

    sharding = of(x)
    if sharding is None:
        return first(x)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.sharding.auto_axes(first, out_sharding=everywhere)(x)


def left_to_compiler(
    function: Callable[..., PyTree], like: Any, *, whole: bool = False
) -> Callable[..., PyTree]:
    """A function whose shardings XLA chooses, as on automatic axes.

    For what cuts or gathers rows in ways that JAX does not follow on explicit axes.

    Args:
      function: Takes arrays alone.
      like: An array: results are sharded as it is; where none of its axes is sharded
        the function stays as it is.
      whole: Whether results are on all devices instead.
    """
    sharding = of(like)
    if sharding is None:
        return function
    spec = PartitionSpec() if whole else sharding.spec
    concrete = _sharding_on_devices(like)
    mesh = (concrete or sharding).mesh
    return jax.sharding.auto_axes(function, out_sharding=NamedSharding(mesh, spec))


def align_rows(values: PyTree, like: PyTree) -> PyTree:
    """Spreads the first axes of arrays over devices as those of other arrays are.

    `jax.vmap` wants this of all that it maps over.

    Args:
      values: A pytree of arrays.
      like: A pytree of arrays; the first one's first axis is what counts.
    """
    leaves = jax.tree.leaves(like)
    axes = axes_of_rows(leaves[0]) if leaves else None
    if axes is None:
        return values
    # Outside of jit a mesh without its devices would not do.
    concrete = _sharding_on_devices(leaves[0])
    mesh = (concrete or jax.typeof(leaves[0]).sharding).mesh

    def align(x):
        if axes_of_rows(x) == axes:
            return x
        spec = PartitionSpec(axes, *jax.typeof(x).sharding.spec[1:])
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(align, values)


def on_their_mesh(values: PyTree) -> contextlib.AbstractContextManager:
    """A context in which `jax.vmap` finds the mesh with explicit axes of some arrays.

    What is new under it, zeros or a broadcast, belongs to the mesh of the context, not
    to that of its operands. Nothing changes where there is no such mesh.
    """
    for x in jax.tree.leaves(values):
        if not is_explicit(x):
            continue
        if isinstance(jnp.zeros(()), jax.core.Tracer):  # inside of jit
            return jax.sharding.use_abstract_mesh(jax.typeof(x).sharding.mesh)
        if sharding := _sharding_on_devices(x):
            return jax.set_mesh(sharding.mesh)
    return contextlib.nullcontext()


def place_like(state: PyTree, params: PyTree) -> PyTree:
    """Places what a state holds of the parameters' structure and shapes as they are.

    Inside of jit it is where it is.
    """
    structure: Any = jax.tree.structure(params)

    def place(x, like):
        sharding = _sharding_on_devices(like)
        alike = sharding and x.shape == like.shape
        return jax.device_put(x, sharding) if alike else x

    def is_alike(part):
        return jax.tree.structure(part) == structure

    return jax.tree.map(
        lambda part: jax.tree.map(place, part, params) if is_alike(part) else part,
        state,
        is_leaf=is_alike,
    )


def cond(
    pred: jax.Array,
    true_fun: Callable[[], PyTree],
    false_fun: Callable[[], PyTree],
    values: PyTree,
) -> PyTree:
    """`jax.lax.cond` of functions without arguments, which may be mapped by `jax.vmap`.

    JAX's own rule for a predicate that differs between members refuses sharded arrays.

    Args:
      pred: A boolean scalar.
      true_fun: What to do if it is True.
      false_fun: What to do if not.
      values: What they work on: the plain `cond` is used where none of it is on a mesh
        with explicit axes.
    """
    if not any(map(is_explicit, jax.tree.leaves(values))):
        return jax.lax.cond(pred, true_fun, false_fun)
    programs = [jax.make_jaxpr(f, return_shape=True)() for f in (true_fun, false_fun)]
    (true, shape), (false, _) = programs
    branches = [functools.partial(jax.core.eval_jaxpr, p.jaxpr) for p in (true, false)]

    @jax.custom_batching.custom_vmap
    def chosen(pred, of_true, of_false):
        return jax.lax.cond(
            pred, lambda: branches[0](of_true), lambda: branches[1](of_false)
        )

    @chosen.def_vmap
    def mapped(axis_size, in_batched, pred, *operands):
        axes = [jax.tree.map(lambda b: 0 if b else None, own) for own in in_batched]

        def both(pred, *operands):
            found = [run(own) for run, own in zip(branches, operands, strict=True)]
            return [jnp.where(pred, x, y) for x, y in zip(*found, strict=True)]

        if in_batched[0]:
            out = jax.vmap(both, axes, axis_size=axis_size)(pred, *operands)
        else:
            out = jax.vmap(functools.partial(chosen, pred), axes[1:])(*operands)
        return out, [True] * len(out)

    found = chosen(pred, true.consts, false.consts)
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def on_one_device() -> bool:
    """Whether what is traced runs on one device, for all that JAX tells.

    Inside of `jax.shard_map` and `jax.pmap` it does. Under `jax.jit` with several
    devices XLA may divide it, on a mesh that tracing does not see.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return manual or jax.device_count() == 1


def may_be_divided(values: PyTree) -> bool:
    """Whether XLA may divide arrays over devices in ways that tracing does not see."""
    return not on_one_device() and not any(map(is_explicit, jax.tree.leaves(values)))


def lying_as(like: jax.Array, values: jax.Array) -> jax.Array:
    """Values that XLA divides over devices as it does another array of their shape.

    For automatic axes, which have no name here: an elementwise operation of both is
    what spreads a sharding from one to the other.
    """
    always = jax.lax.optimization_barrier(jnp.array(True))
    return jnp.where(always, values, like)


def draw(
    sampler: Callable[..., jax.Array],
    key: jax.Array,
    like: Any,
    *,
    shape: Sequence[int] | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Random numbers of an array's shape and dtype; each device draws its part.

    The numbers are those of `sampler(key, shape, dtype)`.

    Args:
      sampler: `jax.random.normal`, `uniform` or another one that takes `out_sharding`.
      key: A PRNG key.
      like: The array, or its shape and dtype alone.
      shape: Another shape of as many axes; those of length 1 are not sharded.
      dtype: Another dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax.core import shards
      >>> shards.draw(jax.random.normal, jax.random.key(0), jnp.zeros((2, 3))).shape
      (2, 3)
    """
    shape = jnp.shape(like) if shape is None else tuple(shape)
    dtype = jnp.dtype(jnp.result_type(like) if dtype is None else dtype)
    if isinstance(like, jax.ShapeDtypeStruct):
        return sampler(key, shape, dtype)
    concrete = _sharding_on_devices(like)
    sharding = concrete or of(like)
    if sharding is None or sharding.is_fully_replicated:
        return sampler(key, shape, dtype)
    spec = [
        None if n == 1 else axes
        for axes, n in itertools.zip_longest(sharding.spec, shape)
    ]
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    if concrete:
        return _sharded(sampler, shape, dtype, sharding)(key)
    return sampler(key, shape, dtype, out_sharding=sharding)


@functools.lru_cache(maxsize=1024)
def _sharded(sampler, shape, dtype, sharding):
    return jax.jit(lambda key: sampler(key, shape, dtype), out_shardings=sharding)


def zeros(like: Any) -> jax.Array:
    """Zeros of a type as `jax.eval_shape` gives it: sharded, differing along axes."""
    sharding = like.sharding
    sharded = sharding is not None and any(sharding.spec)
    found = jnp.zeros(like.shape, like.dtype)
    if sharded:  # JAX 0.12 drops `device` and `out_sharding` of zeros in compiled code
        found = jax.sharding.reshard(found, sharding)
    if (kind := like.manual_axis_type) is None or not kind.varying:
        return found
    return jax.lax.pcast(found, tuple(sorted(kind.varying)), to="varying")


def _sharding_on_devices(x):
    """The sharding of an array on a mesh, outside of jit; else None."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return None
    return x.sharding if isinstance(x.sharding, NamedSharding) else None
