"""Where arrays lie on a mesh: batches in parts, everything else whole.

On many hosts an array is put together of what each host has: all of it
(:func:`place`), or the rows of its own devices (:func:`host_rows`,
:func:`place_local`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from otmdr_jax.core.batches import batch_size

PyTree = Any

EVERYWHERE = P()


def data_spec(mesh: Mesh | None) -> P:
    """How a batch lies on a mesh: divided over "data", where there is that axis."""
    return P("data") if mesh is not None and "data" in mesh.shape else P()


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of what every device has whole; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P())


def place(values: PyTree, mesh: Mesh | None, spec: Any = EVERYWHERE) -> PyTree:
    """Puts arrays on the devices of a mesh, each device its part.

    Args:
      values: A pytree of host arrays or keys, each whole, the same on every host.
      mesh: From :func:`make_mesh`; None for the default device.
      spec: P() for a copy on every device, P("data") to divide the leading axis.

    Raises:
      ValueError: The devices do not divide a leading axis.
    """
    if mesh is None:
        return jax.device_put(values)
    if spec != P():
        check_parts(values, mesh, spec)
    sharding = NamedSharding(mesh, spec)

    def put(x):
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            return jax.jit(lambda key: key, out_shardings=sharding)(x)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jax.tree.map(put, values)


def place_local(values: PyTree, mesh: Mesh | None) -> PyTree:
    """Joins the parts of a batch that each host has read into one array on the mesh.

    Args:
      values: A pytree of host arrays: the rows that :func:`host_rows` names.
      mesh: From :func:`make_mesh`; None for the default device.
    """
    if mesh is None:
        return jax.device_put(values)
    sharding = NamedSharding(mesh, data_spec(mesh))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
        values,
    )


def host_rows(mesh: Mesh | None, size: int) -> tuple[int, int]:
    """The rows of a global batch that this host's devices need: from, to.

    Args:
      mesh: From :func:`make_mesh`; None for one device.
      size: B, the number of rows of the global batch.

    Raises:
      ValueError: The devices do not divide B, or hosts do not hold consecutive parts of
        one size.
    """
    if mesh is None or "data" not in mesh.shape:
        return 0, size
    check_divides(size, mesh.shape["data"])
    sharding = NamedSharding(mesh, P("data"))
    parts = sharding.addressable_devices_indices_map((size,)).values()
    rows = {part[0].indices(size)[:2] for part in parts if part is not None}
    first, last = min(row[0] for row in rows), max(row[1] for row in rows)
    count = last - first
    if sum(b - a for a, b in rows) != count or size % count or first % count:
        raise ValueError(
            f"on mesh {dict(mesh.shape)} this host's devices hold rows {sorted(rows)} "
            f"of {size}, which are no part of their own: name data first, and let the "
            "devices of a host hold whole parts."
        )
    return first, last


def settle(values: PyTree, home: NamedSharding) -> PyTree:
    """Moves arrays that are elsewhere; a check of every leaf, some microseconds."""

    def is_elsewhere(x):
        known = isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
        return not known and getattr(x, "sharding", None) != home

    if not any(map(is_elsewhere, jax.tree.leaves(values))):
        return values
    if home.is_fully_addressable:
        return jax.device_put(values, home)
    # On many hosts: from the whole arrays, which every host has.
    return _mover(home)(values)


@functools.lru_cache(maxsize=64)
def _mover(home: NamedSharding) -> Callable[[PyTree], PyTree]:
    """One function object for a place: what it compiles is kept."""
    return jax.jit(lambda values: values, out_shardings=home)


def check_parts(values: PyTree, mesh: Mesh, spec: Any) -> None:
    """Refuses arrays whose leading axis the devices of a spec do not divide."""
    axes = spec[0] if isinstance(spec, P) and spec else None
    if axes is not None:
        names = axes if isinstance(axes, tuple) else (axes,)
        check_divides(batch_size(values), math.prod(mesh.shape[n] for n in names))


def check_divides(size: int, devices: int) -> None:
    """Refuses a batch that so many devices do not divide; names one that they do."""
    if size % devices:
        fit = max(size // devices, 1) * devices
        raise ValueError(
            f"a batch of {size} cannot be divided evenly over {devices} devices: use "
            f"{fit} or another multiple of {devices}, or fewer devices on its axis."
        )
