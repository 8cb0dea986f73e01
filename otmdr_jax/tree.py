"""What `optax.tree` lacks: a norm that cannot overflow, stacking.

A gradient of 1e20 has a float32 square of infinity, one of 1e-30 a square of zero.
Both are ordinary in mixed precision and with scaled losses.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

# The sum of squares is taken of x, x / 2^60 and x 2^60; one of them is in range. The
# factors are constants, so that, unlike with max|x|, a leaf can be reduced as soon as
# it is there and in one pass, and nothing of its size is kept.
_SHIFT = 2.0**60
_LARGE, _SMALL = 1e30, 1e-20


def accumulation_dtype(leaf: jax.Array) -> jnp.dtype:
    """The dtype in which a leaf's norm is summed: float32 at the least."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, in float32 or wider.

    Args:
      tree: A pytree of inexact arrays.

    Returns:
      A scalar; 0 for no leaves. Exact to rounding where `optax.tree.norm` overflows or
      underflows; not finite if a leaf is not.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import tree
      >>> tree.norm({"a": jnp.array([3e30]), "b": jnp.array([4e30])})
      Array(5.e+30, dtype=float32)
    """

    def root_sum_of_squares(factor):
        squares = [_sum_of_squares(jnp.asarray(x), factor) for x in leaves]
        return jnp.sqrt(sum(squares, start=jnp.zeros(())))

    leaves = jax.tree.leaves(tree)
    plain = root_sum_of_squares(1.0)
    down, up = root_sum_of_squares(1 / _SHIFT), root_sum_of_squares(_SHIFT)
    in_range = jnp.where(plain**2 < _SMALL, up / _SHIFT, plain)
    return jnp.where(plain**2 > _LARGE, down * _SHIFT, in_range)


def _sum_of_squares(x: jax.Array, factor: float) -> jax.Array:
    wide = x.astype(accumulation_dtype(x)) * factor
    return jnp.sum(jnp.real(wide * jnp.conj(wide)))


def weighted_mean(
    first: PyTree, second: PyTree, weight: float, other_weight: float
) -> PyTree:
    """The mean of two equal pytrees by weight, summed in float32 or wider.

    Leaves that are not floating are the first's.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import tree
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


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks equal pytrees along a new leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import tree
      >>> tree.stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
      (2, 3)
    """
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """The inverse of :func:`stack`: a list of pytrees without the leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import tree
      >>> [t["w"].tolist() for t in tree.unstack({"w": jnp.arange(4.0).reshape(2, 2)})]
      [[0.0, 1.0], [2.0, 3.0]]
    """
    leaves, treedef = jax.tree.flatten(tree)
    return [
        jax.tree.unflatten(treedef, [leaf[i] for leaf in leaves])
        for i in range(len(leaves[0]))
    ]


def is_floating(x: Any) -> bool:
    """Whether a leaf can be averaged: a real or complex floating array or number."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
