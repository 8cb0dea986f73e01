"""Mapping over particles, micro-batches and members: vmap, unrolled or scanned.

How they are mapped is a matter of speed and memory alone: see docs/performance.md.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import jaxprs_in_params

from otmdr_jax.core import collectives, shards, tree

PyTree = Any

# Dozens of micro-batches in one program would take minutes to compile.
MAX_UNROLLED = 8
_NOTHING = object()
_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def average(
    function: Callable[..., tuple[PyTree, PyTree]],
    xs: PyTree,
    count: int,
    how: str = "auto",
    waiting: Callable[[PyTree], PyTree] = lambda x: x,
    common: PyTree = _NOTHING,
) -> tuple[PyTree, PyTree]:
    """Runs a function on every x and averages what it returns.

    Args:
      function: x -> (to_average, to_stack), or (x, common) to these.
      xs: A pytree with a leading axis of `count`: keys, examples; for a count of 1 one
        x, without that axis.
      count: How many.
      how: "unroll" (a loop in the program: one after the other, the memory of one),
        "scan" (the same, compiled once), "vmap" (all at once, `count` times the
        activations), "auto" or "sequential" (for micro-batches, which may be many):
        see :func:`fastest`.
      waiting: Makes the zeros that a scan's sums start from wait for something.
      common: What all of them start from, as the weights of the center. Other things
        that `function` knows may be converted or copied once for all, and kept.

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

    def of(x, common=common):
        return function(x) if common is _NOTHING else function(x, common)

    if count == 1:
        mean, stacked = of(xs)
        return mean, jax.tree.map(lambda x: jnp.asarray(x)[None], stacked)

    how = fastest(how, lambda xs: of(_take(xs, 0)), (xs,), count)
    if how == "vmap":
        mean, stacked = jax.vmap(of)(xs)
        return jax.tree.map(_mean_of_stacked, mean), stacked
    if how == "scan":
        return _scan(lambda x: of(x, _as_they_lie(common)), xs, count, waiting)
    return _unroll(of, xs, count, common)


def each(
    functions: Callable[..., PyTree] | Sequence[Callable[..., PyTree]],
    columns: Sequence[Any],
    how: str = "auto",
    *,
    may_be_spread: bool = True,
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
      may_be_spread: Whether the rows may lie on several devices, unseen by tracing.

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

    def together(row):
        return functions(lambda values: values, *row)

    # Members may be spread over an automatic mesh, which is not seen here: there a loop
    # would run them one after the other on all devices.
    several = jax.default_backend() != "cpu" and not shards.on_one_device()
    if spread or (how == "auto" and several and may_be_spread):
        how = "vmap"
    elif how == "auto":
        how = fastest(how, lambda xs: together(_take(xs, 0)), (columns,), count)
    if how == "unroll":
        rows = [_take(columns, i) for i in range(count)]
        return tree.stack(unrolled([functions] * count, rows))
    if how == "scan":
        return jax.lax.map(together, columns)
    with shards.on_their_mesh(first):
        return jax.vmap(together)(shards.align_rows(columns, first))


def fastest(
    how: str, function: Callable[..., PyTree], arguments: Sequence[Any], count: int
) -> str:
    """The map that "auto" and "sequential" stand for on the default backend.

    A scan takes the memory and the compilation of one evaluation, and on accelerators
    runs the same kernels as an unrolled program. On CPUs, XLA runs a convolution inside
    of a loop, or one batched over kernels, many times slower than the same convolution
    standing alone. Where one of `jax.lax` stands in the function, which is traced for
    this, "auto" unrolls, and "sequential" does if the copies are few.

    Args:
      how: A map, which stays, or one of the two words.
      function: What is mapped.
      arguments: Its arguments for one evaluation.
      count: How many evaluations there are.
    """
    if how not in ("auto", "sequential"):
        return how
    if jax.default_backend() != "cpu" or (how == "sequential" and count > MAX_UNROLLED):
        return "scan"
    try:
        program = jax.make_jaxpr(function)(*arguments)
    except _LOOKS_AT_VALUES:  # outside of jit, where unrolling lets it
        return "unroll"
    return "unroll" if _holds_convolution(program.jaxpr) else "scan"


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
        if not hasattr(x, "dtype"):  # a flag, a name
            return x
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(x) + zero
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if x.dtype == jnp.bool_:
            return x ^ zero.astype(x.dtype)
        return x + zero.astype(x.dtype)

    return jax.tree.map(wait, xs)


def _holds_convolution(jaxpr):
    return any(
        eqn.primitive is jax.lax.conv_general_dilated_p
        or any(map(_holds_convolution, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _as_they_lie(common):
    """Keeps a GPU's compiler from copying all weights, laid out anew, for a loop.

    Of weights that are divided over devices, the constraint would gather all parts.
    """
    if (
        common is _NOTHING
        or jax.default_backend() != "gpu"
        or not shards.on_one_device()
    ):
        return common
    return jax.tree.map(
        lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), common
    )


def _unroll(function, xs, count, common):
    mean, stacked = function(_take(xs, 0))
    floats, others = tree.partition(mean, tree.is_floating)
    total, stacks = _widen(floats), [stacked]
    for i in range(1, count):
        x = after(total, _take(xs, i))
        # Or what is made of `common` in one evaluation is kept for the next ones.
        own = common
        if common is not _NOTHING:
            # As words: JAX's check of keys takes those of a barrier for used.
            words = jax.tree.map(_words, x)
            words, own = collectives.barrier((), (words, common))
            x = jax.tree.map(_of_words, x, words)
        more, stacked = function(x, own)
        more, _ = tree.partition(more, tree.is_floating)
        total = jax.tree.map(jnp.add, total, more)
        if i < count - 1:  # or the terms are kept, to be added at the end
            total = collectives.barrier((), total)
        stacks.append(stacked)
    return tree.merge(_divide(total, floats, count), others), tree.stack(stacks)


def _scan(function, xs, count, waiting):
    shapes, _ = jax.eval_shape(lambda xs: function(_take(xs, 0)), xs)
    shapes, _ = tree.partition(shapes, tree.is_floating)
    zeros = _widen(jax.tree.map(shards.zeros, shapes))

    def of_one_type(waits, zero):  # what waits may differ along more device axes
        return waits if jax.typeof(waits).mat == jax.typeof(zero).mat else zero

    start = jax.tree.map(of_one_type, waiting(zeros), zeros)

    def body(total, x):
        mean, stacked = function(x)
        floats, others = tree.partition(mean, tree.is_floating)
        return jax.tree.map(jnp.add, total, floats), (others, stacked)

    total, (others, stacked) = jax.lax.scan(body, start, xs)
    others = jax.tree.map(lambda x: x[0], others)
    return tree.merge(_divide(total, shapes, count), others), stacked


def _mean_of_stacked(x):
    return jnp.mean(x, axis=0).astype(x.dtype) if tree.is_floating(x) else x[0]


def _words(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def _of_words(like, words):
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return words
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like))


def _take(xs, index):
    return jax.tree.map(lambda x: x[index], xs)


def _widen(floats):
    """Sums of bfloat16 gradients are kept in float32."""
    return jax.tree.map(
        lambda x: jnp.asarray(x).astype(tree.accumulation_dtype(x)), floats
    )


def _divide(total, like, count):
    return jax.tree.map(
        lambda t, x: (t / count).astype(jnp.result_type(x)), total, like
    )
