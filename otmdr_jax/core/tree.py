"""What `optax.tree` lacks: a norm that cannot overflow, stacking, leaves of any kind.

A gradient of 1e20 has a float32 square of infinity, one of 1e-30 a square of zero.
Both are ordinary in mixed precision and with scaled losses.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import shards

PyTree = Any

# The sum of squares is taken of x, x / shift and x shift; one of them is in range for
# all numbers of a dtype. The factors are constants, so that, unlike with max|x|, a leaf
# can be reduced as soon as it is there and in one pass, and nothing of its size is
# kept. By the bits of a real number: (shift, large and small sums of squares).
_RANGES = {32: (2.0**80, 1e30, 1e-20), 64: (2.0**600, 1e200, 1e-200)}


def arrays(params: PyTree) -> PyTree:
    """Parameters as JAX arrays; Python's numbers stay weakly typed, as under `jax.jit`.

    Args:
      params: A pytree of what `jax.value_and_grad` differentiates: real or complex
        floating arrays, NumPy's too, and Python numbers.

    Raises:
      TypeError: A leaf that cannot be differentiated.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax.core import tree
      >>> tree.arrays({"scale": 2.0, "w": np.ones(2)})["w"]
      Array([1., 1.], dtype=float32)
    """

    def array(path, leaf):
        try:
            x = jnp.asarray(leaf)
        except TypeError:  # a function, a text
            x = None
        if x is None or not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                "parameters must be real or complex floating numbers to be "
                f"differentiated, got {type(leaf).__name__ if x is None else x.dtype} "
                f"at params{jax.tree_util.keystr(path)}. Make it floating, or a "
                f"further argument of the loss. {_taking_objects(params)}Of a model "
                "pass the parameters alone; the loss puts the rest back: "
                "nnx.split(model, nnx.Param, ...), "
                "variables['params'] of Linen, "
                "equinox.partition(model, equinox.is_inexact_array)."
            )
        return x

    return jax.tree_util.tree_map_with_path(array, params)


def _taking_objects(params):
    """Which function takes a model whole, told by its class: none is imported here."""
    for kind in type(params).__mro__:
        for package, name in (
            ("flax.nnx.", "otmdr_jax.nnx.value_and_grad"),
            ("equinox.", "otmdr_jax.equinox.filter_value_and_grad"),
        ):
            if f"{kind.__module__}.".startswith(package):
                return f"{name} takes the model as it is. "
    return ""


def like(values: PyTree, leaves: PyTree) -> PyTree:
    """Values in the dtypes of an equal pytree of arrays, weakly typed where those are.

    A parameter that is a Python number does not decide in what dtype the loss is
    computed; at a particle, and as a gradient, it does not either.
    """

    def cast(x, leaf):
        leaf = jnp.asarray(leaf)
        if not leaf.weak_type:
            return x.astype(leaf.dtype)
        # No function of JAX gives an array a weak type, only its primitive does.
        return jax.lax.convert_element_type_p.bind(
            x, new_dtype=leaf.dtype, weak_type=True, sharding=None
        )

    return jax.tree.map(cast, values, leaves)


def accumulation_dtype(leaf: jax.typing.ArrayLike) -> jnp.dtype:
    """The dtype in which a leaf's norm is summed: float32 at the least."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no leaf holds a NaN or an infinity; a scalar, True for no leaves."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    numbers = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    found = [jnp.all(jnp.isfinite(x)) for x in numbers]
    # Not stacked: under vmap some may be spread over devices, and others not.
    return functools.reduce(jnp.logical_and, found, jnp.ones((), bool))


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, in float32 or wider.

    Args:
      tree: A pytree of inexact arrays.

    Returns:
      A scalar; 0 for no leaves. Exact to rounding for all normal numbers, where
      `optax.tree.norm` overflows or underflows; not finite if a leaf is not, or above
      the reciprocal of the smallest normal number (8.5e37 in float32), which nothing
      can be divided by: XLA multiplies by the reciprocal. So is its derivative, x /
      norm, which is taken to be 0 where the norm is.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core import tree
      >>> tree.norm({"a": jnp.array([3e30]), "b": jnp.array([4e30])})
      Array(5.e+30, dtype=float32)
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    leaves = [x.astype(accumulation_dtype(x)) for x in leaves]
    if any(jnp.finfo(x.dtype).bits == 64 for x in leaves):
        leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float64)) for x in leaves]
    return _norm(leaves)


@jax.custom_jvp
def _norm(leaves: list[jax.Array]) -> jax.Array:
    bits = jnp.finfo(leaves[0].dtype).bits if leaves else 32
    shift, large, small = _RANGES[int(bits)]

    groups = _alike(leaves)

    def root_sum_of_squares(factor):
        squares = [_sum_of_squares(x, factor) for x in groups]
        return jnp.sqrt(sum(squares, start=0.0))  # of the leaves' dtype

    plain = root_sum_of_squares(1.0)
    down, up = root_sum_of_squares(1 / shift), root_sum_of_squares(shift)
    in_range = jnp.where(plain**2 < small, up / shift, plain)
    found = jnp.where(plain**2 > large, down * shift, in_range)
    return jnp.where(found > 1 / jnp.finfo(found.dtype).tiny, jnp.inf, found)


def _alike(leaves: list[jax.Array]) -> list[jax.Array]:
    """Leaves of one shape stacked, where that takes fewer kernels.

    Accelerators' compilers reduce a stack without storing it: the 80 leaves of
    WRN-28-10 take 40 kernels of an H100 instead of 160. On CPUs it would be a copy, and
    leaves that lie on devices in different ways would be sent around.
    """
    if jax.default_backend() == "cpu" or not shards.on_one_device():
        return leaves
    if any(map(shards.is_explicit, leaves)):
        return leaves
    groups: dict[Any, list[jax.Array]] = {}
    for i, x in enumerate(leaves):
        kind = (x.shape, x.dtype, jax.typeof(x).mat) if x.size > 1 else i
        groups.setdefault(kind, []).append(x)
    return [jnp.stack(xs) if len(xs) > 1 else xs[0] for xs in groups.values()]


def _sum_of_squares(x: jax.Array, factor: float) -> jax.Array:
    if jnp.iscomplexobj(x):  # a product of complex numbers that overflows is NaN
        return _sum_of_squares(x.real, factor) + _sum_of_squares(x.imag, factor)
    scaled = x * factor
    if x.size == 1:  # of a scalar XLA makes x^2 factor^2, which is out of range again
        scaled = jax.lax.optimization_barrier(scaled)
    return jnp.sum(scaled * scaled)


@_norm.defjvp
def _norm_jvp(primals, tangents):
    """Re <x / norm, dx>: JAX's own would be infinity times 0 at 0 and out of range."""
    (leaves,), (moves,) = primals, tangents
    length = _norm(leaves)
    divisor = jnp.where(length == 0, 1.0, length)
    units = [jnp.where(length == 0, 0.0, x / divisor) for x in leaves]
    products = [
        jnp.sum(jnp.real(jnp.conj(unit) * dx))
        for unit, dx in zip(units, moves, strict=True)
    ]
    return length, jnp.asarray(sum(products, start=0.0), length.dtype)


def num_coordinates(tree: PyTree) -> int:
    """The number of real coordinates of all leaves: complex numbers have two.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core import tree
      >>> tree.num_coordinates([jnp.zeros((2, 3)), jnp.zeros(2, complex)])
      10
    """
    return sum(x.size * (1 + jnp.iscomplexobj(x)) for x in jax.tree.leaves(tree))


def weighted_mean(
    first: PyTree, second: PyTree, weight: float, other_weight: float
) -> PyTree:
    """The mean of two equal pytrees by weight, summed in float32 or wider.

    Leaves that are not floating are the first's.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core import tree
      >>> float(tree.weighted_mean(jnp.array(1.0), jnp.array(4.0), 2, 1))
      2.0
    """

    def mean(x, y):
        if not is_floating(x):
            return x
        x, y = jnp.asarray(x), jnp.asarray(y)
        wide = accumulation_dtype(x)
        total = weight * x.astype(wide) + other_weight * y.astype(wide)
        return (total / (weight + other_weight)).astype(x.dtype)

    return jax.tree.map(mean, first, second)


def shape(leaf: Any) -> tuple[int, ...]:
    """Its shape; () of a number, and of what is no array, as a function or a name."""
    return getattr(leaf, "shape", ())


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks equal pytrees along a new leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core import tree
      >>> tree.stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
      (2, 3)
    """
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """The inverse of :func:`stack`: a list of pytrees without the leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core import tree
      >>> [t["w"].tolist() for t in tree.unstack({"w": jnp.arange(4.0).reshape(2, 2)})]
      [[0.0, 1.0], [2.0, 3.0]]
    """
    leaves, treedef = jax.tree.flatten(tree)
    return [
        jax.tree.unflatten(treedef, [leaf[i] for leaf in leaves])
        for i in range(len(leaves[0]))
    ]


def partition(
    tree: PyTree,
    which: Callable[[Any], bool],
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[PyTree, PyTree]:
    """A pytree as two: the leaves for which something holds, and the others.

    Args:
      tree: Any pytree.
      which: The predicate of a leaf.
      is_leaf: What counts as a leaf, as in `jax.tree.map`.

    Returns:
      Two pytrees with None in the place of the other one's leaves; :func:`merge` is the
      inverse.

    Example:
      >>> from otmdr_jax.core import tree
      >>> tree.partition({"a": 1, "b": 2.0}, tree.is_floating)
      ({'a': None, 'b': 2.0}, {'a': 1, 'b': None})
    """
    chosen = jax.tree.map(lambda x: x if which(x) else None, tree, is_leaf=is_leaf)
    others = jax.tree.map(lambda x: None if which(x) else x, tree, is_leaf=is_leaf)
    return chosen, others


def merge(chosen: PyTree, others: PyTree) -> PyTree:
    """The pytree that :func:`partition` made two of."""
    return jax.tree.map(
        lambda x, other: other if x is None else x,
        chosen,
        others,
        is_leaf=lambda x: x is None,
    )


def is_floating(x: Any) -> bool:
    """Whether a leaf can be averaged: a real or complex floating array or number."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
