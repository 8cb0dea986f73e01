"""Devices along named axes: "data", "particle" and "member"."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "particle", "member")


def make_mesh(
    shape: str | Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arranges devices along named axes.

    Args:
      shape: The number of devices along each axis, for example "data=4,particle=2" or a
        mapping; -1 for one axis takes all devices that are left. None puts all devices
        on "data".
      devices: The devices to use; None for the first ones of all hosts.

    Returns:
      A mesh with the axes that were named, outermost first.

    Raises:
      ValueError: An axis is unknown, a size is not a positive integer, or there are too
        few devices; with -1, and on many hosts, also if a device is left over.

    Example:
      >>> from otmdr_jax import parallel
      >>> parallel.make_mesh("data=1,particle=1").axis_names
      ('data', 'particle')
    """
    # Sorted by host: on TPU pods a host's devices are not consecutive, but its parts of
    # a batch must be.
    by_host = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    found = by_host if devices is None else list(devices)
    if not found:
        raise ValueError("a mesh needs at least one device, got an empty list.")
    sizes = {"data": -1} if shape is None else _sizes(shape)
    given = math.prod(size for size in sizes.values() if size != -1)
    for axis in [axis for axis, size in sizes.items() if size == -1]:
        if len(found) > given and len(found) % given:
            raise ValueError(
                f"mesh {shape!r} cannot have all {len(found)} devices, since the other "
                f"axes have {given}: name the number of {axis} in the place of -1."
            )
        sizes[axis] = len(found) // given
        given *= sizes[axis]
    if given > len(found) or not given:
        raise ValueError(
            f"mesh {shape!r} needs {given or 'more'} devices, but there are "
            f"{len(found)}: {found[0].device_kind}. Use fewer, or -1 for what is left."
        )
    if given < len(found) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {shape!r} has {given} devices, but the hosts have {len(found)}: "
            "on many hosts every device must be used. Use -1 for what is left."
        )
    grid = np.asarray(found[:given], dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _sizes(shape: str | Mapping[str, int]) -> dict[str, int]:
    pairs: list[tuple[str, Any]]
    if isinstance(shape, Mapping):
        pairs = list(shape.items())
    elif not isinstance(shape, str):
        raise TypeError(
            'mesh must be named axes, as "data=4,particle=2" or {"data": 4}, got '
            f"{shape!r}."
        )
    else:
        parts = [part.partition("=") for part in shape.split(",") if part.strip()]
        pairs = [(axis.strip(), size.strip()) for axis, _, size in parts]
    sizes: dict[str, int] = {}
    for axis, size in pairs:
        try:
            number = int(size)
        except (TypeError, ValueError):
            number = 0
        if not isinstance(size, str | numbers.Integral) or isinstance(size, bool):
            number = 0  # int() cuts 1.5
        if axis not in AXES or axis in sizes or (number < 1 and number != -1):
            raise ValueError(
                "mesh must name each of the axes data, particle, member at most once "
                'with its number of devices, as "data=4,particle=2" (-1: what is '
                f"left), got {shape!r}."
            )
        sizes[axis] = number
    if not sizes or list(sizes.values()).count(-1) > 1:
        raise ValueError(
            f"mesh must name at least one axis, and -1 at most once, got {shape!r}."
        )
    return sizes


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """The number of devices along an axis; 1 if the mesh has no such axis."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)
