"""Members side by side: stacked on a leading axis, or a tuple; a key for each."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, tree
from otmdr_jax.core.keys import typed_keys

PyTree = Any


def stack(models: Sequence[PyTree]) -> PyTree:
    """Members of one architecture: equal pytrees along a new leading axis.

    Raises:
      TypeError: A model is a tuple, which would be taken for models that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import ensemble
      >>> ensemble.stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
      (2, 3)
    """
    if any(map(is_tuple, models)):
        raise TypeError(
            "the parameters of a model must not be a tuple, since an ensemble takes a "
            "tuple for models that differ, one in each place: use a list, a dict or a "
            "NamedTuple."
        )
    return tree.stack(models)


def count_members(members: PyTree) -> int:
    """M: the leading axis that all leaves share, or the length of a tuple.

    Raises:
      ValueError: No members, or leaves that do not share their leading axis.
    """
    if is_tuple(members):
        if not members:
            raise ValueError("an ensemble needs at least one member, got none.")
        return len(members)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(members)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or not all(shapes) or sizes == {(0,)}:
        raise ValueError(
            "members of one architecture must be stacked: one leading axis of M on "
            f"every leaf, got shapes {sorted(set(shapes))[:8]}. Stack them with "
            "otmdr_jax.ensemble.stack; members that differ are a tuple."
        )
    return shapes[0][0]


def is_placeholder(members: PyTree) -> bool:
    """Whether `optax.tree.map_params` looks at a state: it gives no leaves."""
    return not jax.tree.leaves(members)


def member_keys(key: Any, count: int, axis_name: Any = None) -> Any:
    """The (M,) typed keys of the members on this device; None for no key.

    Args:
      key: One key, typed () or raw (words,), which is split into one for each member;
        or M keys, typed (M,) or raw (M, words), which are used as they are.
      count: M, the number of members on this device.
      axis_name: Name of the device axis that members are spread over, or None. A single
        key is split into keys for the members of all devices; each device takes its
        own.

    Raises:
      ValueError: Keys that are neither one nor M; TypeError: no keys.
    """
    if key is None:
        return None
    key = typed_keys(key)
    if key.shape == (count,):
        return key
    if key.shape:
        raise ValueError(
            f"key must be one key, or one for each of {count} members, got an array "
            f"of shape {key.shape}."
        )
    axes = collectives.axes_of(axis_name)
    if not axes:
        return jax.random.split(key, count)
    collectives.check_bound(axes)
    keys = jax.random.split(key, count * jax.lax.axis_size(axes))
    start = count * jax.lax.axis_index(axes)
    return jax.lax.dynamic_slice_in_dim(keys, start, count)


def is_tuple(members: PyTree) -> bool:
    """Whether members are a tuple of models; lists and NamedTuples are one model's."""
    return type(members) is tuple


def functions_of(function: Any) -> list[Callable[..., Any]]:
    """A list of one function for all members, or of one function each."""
    return list(function) if isinstance(function, (tuple, list)) else [function]


def each_or_one(functions: list, members: PyTree) -> Any:
    """One function if members are stacked, a list of one each if they are a tuple."""
    if not is_tuple(members):
        return functions[0]
    return functions * len(members) if len(functions) == 1 else functions


def rows_of(args: tuple, members: PyTree) -> Any:
    """Turns arguments that are tuples of M into M tuples; leaves stacked ones alone."""
    if not is_tuple(members):
        return args
    return [tuple(arg[i] for arg in args) for i in range(len(members))]


def check_all(members: PyTree, per_member: tuple, functions: int) -> int:
    """Checks that there is one of everything for each member; returns M."""
    count, different = count_members(members), is_tuple(members)
    if functions > 1 and not (different and functions == count):
        raise ValueError(
            f"{functions} functions need a tuple of as many members, got "
            + (f"{count}." if different else "stacked members, which share one.")
        )
    for values in per_member:
        if different:
            if not is_tuple(values) or len(values) != count:
                raise ValueError(
                    f"an argument must be a tuple of {count}, one for each member, got "
                    f"{type(values).__name__}. What all members share is passed by "
                    "name."
                )
            continue
        shapes = [tree.shape(leaf) for leaf in jax.tree.leaves(values)]
        if any(shape[:1] != (count,) for shape in shapes):
            raise ValueError(
                f"an argument must have a leading axis of {count}, one for each "
                f"member, got shapes {sorted(set(shapes))[:8]}. What all members share "
                "is passed by name."
            )
    return count
