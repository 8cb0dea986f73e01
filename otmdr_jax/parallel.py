"""The same step on one device, on many, on many hosts.

A mesh arranges devices along named axes: "data" (each device has its part of the
batch), "particle" (its part of the K particles) and "member" (its part of an
ensemble). A step written for one device and told the names of the axes,

    grad_fn = otmdr_jax.value_and_grad(
        loss_fn, axis_name="data", particle_axis_name="particle", num_particles=4
    )

runs on all of them through :func:`shard_map_step`, or :func:`pmap_step` in programs
that use `jax.pmap`. Under plain `jax.jit` no axis has a name: place the batch with
:func:`place` and XLA does the rest. docs/scaling.md says which to choose.
"""

import functools
import math
import signal
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from otmdr_jax import collectives
from otmdr_jax.batches import batch_size

PyTree = Any
Step = Callable[..., tuple[PyTree, PyTree]]

AXES = ("data", "particle", "member")

_EVERYWHERE = P()


def make_mesh(
    shape: str | Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arranges devices along named axes.

    Args:
      shape: Devices along each axis, as "data=4,particle=2" or a mapping; -1 for one
        axis takes what is left. None puts all devices on "data".
      devices: Which devices; None for the first of all, on all hosts.

    Returns:
      A mesh with the axes that were named, outermost first.

    Raises:
      ValueError: An unknown axis, a size that is no positive integer, or more devices
        than there are. On many hosts every device must be used.

    Example:
      >>> from otmdr_jax import parallel
      >>> parallel.make_mesh("data=1,particle=1").axis_names
      ('data', 'particle')
    """
    # By host: on TPU pods the devices of one are not consecutive, and parts of a batch
    # must be.
    by_host = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    found = by_host if devices is None else list(devices)
    sizes = {"data": -1} if shape is None else _sizes(shape)
    given = math.prod(size for size in sizes.values() if size != -1)
    for axis in [axis for axis, size in sizes.items() if size == -1]:
        sizes[axis] = len(found) // given
        given *= sizes[axis]
    if given > len(found) or not given:
        raise ValueError(
            f"mesh {shape!r} needs {given or 'more'} devices, and there are "
            f"{len(found)}: {found[0].device_kind}. Use fewer, or -1 for what is left."
        )
    if given < len(found) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {shape!r} has {given} devices, and the hosts have {len(found)}: "
            "on many hosts each device must have its place. Use -1 for what is left."
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


def data_spec(mesh: Mesh | None) -> P:
    """How a batch lies on a mesh: divided over "data", where there is that axis."""
    return P("data") if mesh is not None and "data" in mesh.shape else P()


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """Devices along an axis; 1 where the mesh has no such axis."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def shard_map_step(
    step: Step,
    mesh: Mesh,
    *,
    batch_spec: P | None = None,
    state_spec: P = _EVERYWHERE,
    metrics_spec: P | None = None,
    donate: bool = True,
    check_vma: bool = True,
) -> Step:
    """Compiles a training step for a mesh, by `jax.shard_map`.

    Args:
      step: (state, batch, *args) -> (state, metrics), which sees its device's part of
        the batch and whose gradient function knows the axes (`axis_name="data"`).
      mesh: From :func:`make_mesh`.
      batch_spec: How the batch is divided; by default its leading axis over "data",
        where the mesh has that axis.
      state_spec: How the state is: on every device by default. P("member") for an
        ensemble whose members are stacked on a leading axis.
      metrics_spec: How the metrics are; None for as the state.
      donate: Whether the state's memory is reused for the new state.
      check_vma: Let JAX prove that what should be the same on all devices is. It
        finds a gradient that was not averaged, at compile time.

    Returns:
      (state, batch, *args) -> (state, metrics) on whole arrays: hand it the joined
      batch. Further arguments are the same on every device.

    Raises:
      ValueError: At the call, a batch that the devices do not divide.

    Example:
      >>> import jax, jax.numpy as jnp, optax, otmdr_jax
      >>> from otmdr_jax import parallel
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w) ** 2)
      >>> grad_fn = otmdr_jax.value_and_grad(loss_fn, axis_name="data")
      >>> def step(w, batch, key):
      ...     value, grads = grad_fn(w, batch, key=key)
      ...     return w - 0.1 * grads, value
      >>> train = parallel.shard_map_step(step, parallel.make_mesh("data=-1"))
      >>> w, value = train(jnp.ones(3), jnp.ones((16, 3)), jax.random.key(0))
      >>> w.shape
      (3,)
    """
    metrics_spec = state_spec if metrics_spec is None else metrics_spec
    spec_of_batch = data_spec(mesh) if batch_spec is None else batch_spec
    for spec in (spec_of_batch, state_spec, metrics_spec):
        if not isinstance(spec, P):
            raise TypeError(f"specs must each be one PartitionSpec, got {spec!r}.")
        named = collectives.axes_of(*spec)
        if unknown := [axis for axis in named if axis not in mesh.shape]:
            raise ValueError(
                f"{spec} names the axes {unknown}, which mesh {dict(mesh.shape)} has "
                "not."
            )

    def call(state, batch, *args):
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(state_spec, spec_of_batch, *(P() for _ in args)),
            out_specs=(state_spec, metrics_spec),
            check_vma=check_vma,
        )
        return mapped(state, batch, *args)

    compiled = jax.jit(call, donate_argnums=0 if donate else ())

    @functools.wraps(step)
    def run(state, batch, *args):
        _check_parts(batch, mesh, spec_of_batch)
        # The state where the result will be: a second call must not compile again. The
        # batch in parts: not the whole of it to every device.
        state = _settle(state, NamedSharding(mesh, state_spec))
        batch = _settle(batch, NamedSharding(mesh, spec_of_batch))
        return compiled(state, batch, *args)

    run.lower = compiled.lower  # type: ignore[attr-defined]
    return run


def _settle(values: PyTree, home: NamedSharding) -> PyTree:
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


def pmap_step(
    step: Step,
    axis_name: str = "data",
    devices: Sequence[jax.Device] | None = None,
) -> Step:
    """Compiles a training step for all local devices, by `jax.pmap`.

    For programs that use pmap already, which JAX keeps but no longer develops: new ones
    are better off with :func:`shard_map_step`, which also proves that gradients were
    averaged. Here a forgotten `axis_name` trains another model on each device.

    Args:
      step: (state, batch, *args) -> (state, metrics), which sees its device's part of
        the batch and whose gradient function has `axis_name=axis_name`.
      axis_name: The name of the device axis.
      devices: Which devices; None for all local ones.

    Returns:
      (state, batch, *args) -> (state, metrics) on whole arrays: the state is copied to
      the devices at the first call and stays there; the batch is cut into consecutive
      parts. Further arguments are the same on every device.

    Raises:
      ValueError: Several hosts; at the call, a batch that the devices do not divide.

    Example:
      >>> import jax, jax.numpy as jnp, otmdr_jax
      >>> from otmdr_jax import parallel
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w) ** 2)
      >>> grad_fn = otmdr_jax.value_and_grad(loss_fn, axis_name="data")
      >>> def step(w, batch, key):
      ...     value, grads = grad_fn(w, batch, key=key)
      ...     return w - 0.1 * grads, value
      >>> train = parallel.pmap_step(step)
      >>> w, value = train(jnp.ones(3), jnp.ones((16, 3)), jax.random.key(0))
      >>> w.shape
      (3,)
    """
    if jax.process_count() > 1:
        raise ValueError(
            "pmap_step is for the devices of one host: each would train a model of "
            "its own. Use shard_map_step, whose mesh spans all hosts."
        )
    devices = jax.local_devices() if devices is None else list(devices)
    count = len(devices)
    grid = Mesh(np.asarray(devices, object), (axis_name,), axis_types=(AxisType.Auto,))
    compiled: dict[int, Step] = {}

    def call(state, batch, *args):
        _check_divides(batch_size(batch), count)
        parts = jax.tree.map(
            lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch
        )
        if len(args) not in compiled:
            compiled[len(args)] = jax.pmap(
                step,
                axis_name,
                in_axes=(None, 0, *(None for _ in args)),
                out_axes=(None, None),
                devices=devices,
            )
        state = _settle(state, NamedSharding(grid, P()))
        return compiled[len(args)](state, parts, *args)

    return call


def place(values: PyTree, mesh: Mesh | None, spec: Any = _EVERYWHERE) -> PyTree:
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
        _check_parts(values, mesh, spec)
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
    _check_divides(size, mesh.shape["data"])
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


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of what every device has whole; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P())


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to a run on many hosts, by `jax.distributed`.

    Call it before anything touches a device. On SLURM, Open MPI, Kubernetes and Cloud
    TPU all arguments are found in the environment.

    Args:
      coordinator: "host:port" of process 0, reachable from all hosts.
      num_processes: How many processes there are.
      process_id: Which one this is, from 0.

    Raises:
      ValueError: Some of the three are missing, and the environment does not tell.
      RuntimeError: The others were not reached, or a device is in use already.
    """
    given = coordinator, num_processes, process_id
    if any(x is not None for x in given) and None in given:
        raise ValueError(
            "a run on many hosts needs coordinator, num_processes and process_id "
            f"together, or none of them on a cluster that JAX knows; got {given}."
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)
    if threading.current_thread() is threading.main_thread():
        # JAX's notice of preemption takes SIGTERM and nobody here asks for it: until a
        # training loop listens, the signal must end the process as ever.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_main() -> bool:
    """Whether this process is the one that writes logs and reports."""
    return jax.process_index() == 0


def agree(*numbers: float) -> tuple[float, ...]:
    """The maximum over all hosts of each number; every host must call it."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    everyone = multihost_utils.process_allgather(np.asarray(numbers, np.float32))
    return tuple(np.max(everyone, axis=0).tolist())


def check_agreement(text: str, what: str) -> None:
    """Refuses hosts that were started differently: they would wait for each other.

    Args:
      text: What must be the same on all hosts.
      what: How to call it in the error.

    Raises:
      ValueError: On every host, where the hosts' texts differ.
    """
    high, low = divmod(zlib.crc32(text.encode()), 2**16)  # a float32 holds 24 bits
    found = agree(high, low, -high, -low)
    if found != (high, low, -high, -low):
        raise ValueError(
            f"{what} must be the same on all hosts, and is not: start the same command "
            "on each."
        )


def on_main(function: Callable[[], Any]) -> Any:
    """Calls a function on the main process alone; every host must call this.

    Returns:
      What it returns there, None elsewhere.

    Raises:
      RuntimeError: On the other hosts, where it fails on the main one, which raises
        its own error: none waits for one that is gone.
    """
    result, error = None, None
    if is_main():
        try:
            result = function()
        except Exception as caught:
            error = caught
    (failed,) = agree(float(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("process 0 failed; its own log says why.")
    return result


def _check_parts(values, mesh, spec):
    axes = spec[0] if isinstance(spec, P) and spec else None
    if axes is not None:
        names = axes if isinstance(axes, tuple) else (axes,)
        _check_divides(batch_size(values), math.prod(mesh.shape[n] for n in names))


def _check_divides(size: int, devices: int) -> None:
    if size % devices:
        fit = max(size // devices, 1) * devices
        raise ValueError(
            f"a batch of {size} cannot be divided evenly over {devices} devices: use "
            f"{fit} or another multiple of {devices}, or fewer devices on its axis."
        )
