"""What `optax.tree` lacks: norms that neither overflow nor divide by zero, stacking.

A gradient of 1e20 has a float32 square of infinity, one of 1e-30 a square of zero.
Both are ordinary in mixed precision, so norms here are taken of `x / max|x|`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def accumulation_dtype(leaf: jax.Array) -> jnp.dtype:
    """The dtype in which a leaf's norm is summed: float32 at the least."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def scaled_norm(leaves: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    r"""The Euclidean norm of some arrays as a product that cannot overflow.

    Returns `(scale, rest)` with :math:`\|x\|_2 = scale \cdot rest`, where
    :math:`scale = \max |x|` and :math:`rest = \|x / scale\|_2 \in [1, \sqrt{n}]`.
    For arrays of zeros `scale` is 0 and `rest` is 0. A NaN or an infinity anywhere
    makes `rest` NaN.

    Args:
      leaves: Arrays of any shape and inexact dtype; may be empty.

    Returns:
      Two scalars, float32 or wider.
    """
    if not leaves:
        return jnp.zeros(()), jnp.zeros(())
    wide = [jnp.abs(x).astype(_real(accumulation_dtype(x))) for x in leaves]
    scale = jnp.max(jnp.stack([jnp.max(x, initial=0.0) for x in wide]))
    safe = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    total = sum(jnp.sum(jnp.square(x / safe)) for x in wide)
    return scale, jnp.sqrt(total)


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, in float32 or wider.

    Args:
      tree: A pytree of inexact arrays.

    Returns:
      A scalar. Exact where `optax.tree.norm` overflows or underflows.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import tree
      >>> float(tree.norm({"a": jnp.array([3e30]), "b": jnp.array([4e30])})) / 1e30
      5.0
    """
    scale, rest = scaled_norm([jnp.asarray(x) for x in jax.tree.leaves(tree)])
    return scale * rest


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


def _real(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of a dtype's absolute values: float32 for complex64."""
    return jnp.finfo(dtype).dtype
