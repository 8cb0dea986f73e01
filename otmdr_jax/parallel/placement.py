"""The place of arrays on a mesh: batches in parts, everything else whole.

On many hosts an array is joined from what each host holds: the whole array
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
    """The division of a batch: over the axis "data" if the mesh has it, else none."""
    return P("data") if mesh is not None and "data" in mesh.shape else P()


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of arrays that every device holds whole; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P())


def place(values: PyTree, mesh: Mesh | None, spec: Any = EVERYWHERE) -> PyTree:
    """Puts arrays on the devices of a mesh.

    Args:
      values: A pytree of whole host arrays or keys, the same on every host.
      mesh: A mesh from :func:`make_mesh`; None for the default device.
      spec: The division: P() for a copy on every device, P("data") to divide the
        leading axis.

    Raises:
      ValueError: A leading axis cannot be divided evenly over the devices.
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
      values: A pytree of host arrays with the rows that :func:`host_rows` names.
      mesh: A mesh from :func:`make_mesh`; None for the default device.
    """
    if mesh is None:
        return jax.device_put(values)
    sharding = NamedSharding(mesh, data_spec(mesh))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
        values,
    )


def host_rows(mesh: Mesh | None, size: int) -> tuple[int, int]:
    """The first row of a global batch that this host's devices need, and the last + 1.

    Args:
      mesh: A mesh from :func:`make_mesh`; None for one device.
      size: B, the number of rows of the global batch.

    Raises:
      ValueError: B cannot be divided evenly over the devices, or hosts do not hold
        consecutive parts of equal size.
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
            f"of {size}, which is not a consecutive part: name data first, and let the "
            "devices of a host hold whole parts."
        )
    return first, last


def settle(values: PyTree, home: NamedSharding) -> PyTree:
    """Moves arrays that are elsewhere. The check of all leaves takes microseconds."""

    def is_elsewhere(x):
        known = isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
        return not known and getattr(x, "sharding", None) != home

    if not any(map(is_elsewhere, jax.tree.leaves(values))):
        return values
    if home.is_fully_addressable:
        return jax.device_put(values, home)
    # On many hosts every host holds the whole arrays.
    return _mover(home)(values)


@functools.lru_cache(maxsize=64)
def _mover(home: NamedSharding) -> Callable[[PyTree], PyTree]:
    """One function object for each place, so that what it compiles is kept."""
    return jax.jit(lambda values: values, out_shardings=home)


def check_parts(values: PyTree, mesh: Mesh, spec: Any) -> None:
    """Refuses arrays whose leading axis cannot be divided evenly over the devices."""
    axes = spec[0] if isinstance(spec, P) and spec else None
    if axes is not None:
        names = axes if isinstance(axes, tuple) else (axes,)
        check_divides(batch_size(values), math.prod(mesh.shape[n] for n in names))


def check_divides(size: int, devices: int) -> None:
    """Refuses a batch that cannot be divided evenly, and names a size that can."""
    if size % devices:
        fit = max(size // devices, 1) * devices
        raise ValueError(
            f"a batch of {size} cannot be divided evenly over {devices} devices: use "
            f"{fit} or another multiple of {devices}, or fewer devices on its axis."
        )
