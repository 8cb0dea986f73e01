"""Normal numbers for the leaves of a pytree: small leaves are drawn together.

A network has a hundred leaves, and the draw of one takes XLA 0.2 to 0.4 seconds to
compile on a CPU, of however few numbers it is. Threefry's numbers do not depend on how
many are drawn, so that leaves are the beginnings of rows of one draw, with a key for
each row, and have the numbers that they have alone.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import shards

# Rows are as long as powers of 4, so that there are few draws, of less than four times
# the numbers. No draw has more numbers than these: they take no memory to speak of.
_BASE, _MOST = 4, 2**20


def normals(key: jax.Array, leaves: Mapping[int, Any]) -> dict[int, jax.Array]:
    """Standard normal numbers for leaves.

    Args:
      key: A PRNG key.
      leaves: Arrays by their index in the pytree. Some may be missing: a leaf's numbers
        do not depend on which others there are.

    Returns:
      For each index i, numbers of the shape and dtype of its leaf: those of
      `jax.random.normal(jax.random.fold_in(key, i), shape, dtype)`. Leaves that are
      spread over devices are drawn there.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax.core import draws
      >>> key = jax.random.key(0)
      >>> z = draws.normals(key, {0: jnp.zeros((2, 3)), 5: jnp.zeros(4)})
      >>> bool((z[5] == jax.random.normal(jax.random.fold_in(key, 5), 4)).all())
      True
    """
    found = {}
    for rows in _groups(key, leaves):
        if len(rows) == 1:
            own = jax.random.fold_in(key, rows[0])
            found[rows[0]] = shards.draw(jax.random.normal, own, leaves[rows[0]])
            continue
        table = _table(
            key,
            jnp.array(rows, jnp.uint32),
            length=max(_size(leaves[i]) for i in rows),
            dtype=jnp.result_type(leaves[rows[0]]),
            loop=jax.default_backend() == "cpu",
        )
        for i, row in zip(rows, table, strict=True):
            found[i] = row[: _size(leaves[i])].reshape(jnp.shape(leaves[i]))
    return found


# Compiled once for all calls outside of jit: a loop would be compiled at each of them.
@functools.partial(jax.jit, static_argnames=("length", "dtype", "loop"))
def _table(key, rows, *, length, dtype, loop):
    """Normal numbers, of which each row has a key of its own.

    On CPUs rows are drawn in a loop, whose result XLA stores. What it does not store it
    would compute again for each activation that a weight is applied to: steps took a
    tenth longer. On accelerators a loop is slow.
    """

    def draw(row):
        return jax.random.normal(jax.random.fold_in(key, row), (length,), dtype)

    return jax.lax.map(draw, rows) if loop else jax.vmap(draw)(rows)


def _groups(key, leaves) -> Iterator[list[int]]:
    """Indices of leaves that are drawn together."""
    together = (
        jax.random.key_impl(key) == "threefry2x32"
        and jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
        and shards.on_one_device()
    )
    waiting: dict[Any, list[int]] = {}
    for i, leaf in leaves.items():
        if not together or shards.is_explicit(leaf):
            yield [i]
            continue
        kind = jnp.result_type(leaf), _row_length(leaf)
        rows = waiting.setdefault(kind, [])
        rows.append(i)
        if (len(rows) + 1) * kind[1] > _MOST:
            yield waiting.pop(kind)
    yield from waiting.values()


def _row_length(leaf):
    length = 1
    while length < _size(leaf):
        length *= _BASE
    return length


def _size(leaf):
    return math.prod(jnp.shape(leaf))
