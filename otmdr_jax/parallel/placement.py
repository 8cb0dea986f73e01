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

from otmdr_jax.core import collectives
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
      ValueError: A leading axis cannot be divided evenly over the devices, or the spec
        names an axis that the mesh has not; TypeError: it is no PartitionSpec.
    """
    if mesh is None:
        return jax.device_put(values)
    check_spec(spec, mesh)
    if spec != P():
        check_parts(values, mesh, spec)
    sharding = NamedSharding(mesh, spec)

    def put(x):
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jax.tree.map(functools.partial(_as_words, put), values)


def _as_words(put: Callable[[np.ndarray], jax.Array], x: Any) -> jax.Array:
    """Puts an array of the host somewhere; of keys their words."""
    if not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        return put(np.asarray(x))
    words = put(np.asarray(jax.random.key_data(x)))
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))


def place_local(values: PyTree, mesh: Mesh | None) -> PyTree:
    """Joins the parts of a batch that each host has read into one array on the mesh.

    Args:
      values: A pytree of host arrays or keys with the rows that :func:`host_rows`
        names.
      mesh: A mesh from :func:`make_mesh`; None for the default device.

    Raises:
      ValueError: The rows cannot be divided evenly over this host's devices.
    """
    if mesh is None:
        return jax.device_put(values)
    spec = data_spec(mesh)
    if spec != P():
        check_divides(batch_size(values), mesh.local_mesh.shape["data"])
    sharding = NamedSharding(mesh, spec)
    put = functools.partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(functools.partial(_as_words, put), values)


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


def check_spec(spec: Any, mesh: Mesh) -> None:
    """Refuses what is no PartitionSpec, or names axes that the mesh has not."""
    if not isinstance(spec, P):
        raise TypeError(f"specs must each be one PartitionSpec, got {spec!r}.")
    named = collectives.axes_of(*spec)
    if unknown := [axis for axis in named if axis not in mesh.shape]:
        raise ValueError(
            f"{spec} names the axes {unknown}, but mesh {dict(mesh.shape)} has none of "
            "that name."
        )


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
