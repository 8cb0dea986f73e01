"""PRNG keys at the door: typed ones as they are, raw ones of the old kind made typed.

A raw key, of `jax.random.PRNGKey`, is an array of words like any other: nothing in a
state or a batch tells it from numbers, so that nothing makes it a member's or an
example's own. Typed keys say what they are. The results of both are the same.
"""

from typing import Any

import jax
import jax.numpy as jnp


def typed_keys(key: Any) -> Any:
    """A key or an array of keys as typed keys, of the shape of the keys; None stays.

    Args:
      key: Typed keys of any shape, or their raw words: (words,) is one key, (M, words)
        are M keys. Words are those of the default generator: two of Threefry.

    Raises:
      TypeError: No key; ValueError: raw words of another generator.

    Example:
      >>> import jax
      >>> from otmdr_jax.core.keys import typed_keys
      >>> typed_keys(jax.random.PRNGKey(0)) == jax.random.key(0)
      Array(True, dtype=bool)
      >>> typed_keys(jax.random.split(jax.random.PRNGKey(0), 3)).shape
      (3,)
    """
    if key is None:
        return None
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype != jnp.uint32 or not jnp.ndim(key):
        got = type(key).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(
            "key must be a PRNG key, as jax.random.key(0) or, raw, "
            f"jax.random.PRNGKey(0), got {got}: {key!r}."
        )
    try:
        return jax.random.wrap_key_data(jnp.asarray(key))
    except TypeError as error:
        raise ValueError(
            "a raw key must have the words of the default generator, "
            f"{jax.random.key_impl(jax.random.key(0))!r}, on its last axis, got shape "
            f"{jnp.shape(key)}: use typed keys, as jax.random.key(0, impl='rbg') or "
            "jax.random.wrap_key_data(raw, impl='rbg')."
        ) from error


def one_key(key: Any) -> Any:
    """:func:`typed_keys` of a single key, or None.

    Raises:
      TypeError, ValueError: As there; several keys.
    """
    key = typed_keys(key)
    if key is not None and key.shape:
        raise ValueError(
            f"key must be one PRNG key, got an array of keys of shape {key.shape}: "
            "index it, or map over it with jax.vmap."
        )
    return key
