"""A training step, written for one device, compiled for all of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from otmdr_jax.core.batches import batch_size
from otmdr_jax.parallel import placement
from otmdr_jax.parallel.placement import EVERYWHERE

PyTree = Any
Step = Callable[..., tuple[PyTree, PyTree]]


def shard_map_step(
    step: Step,
    mesh: Mesh,
    *,
    batch_spec: P | None = None,
    state_spec: P = EVERYWHERE,
    metrics_spec: P | None = None,
    donate: bool = True,
    check_vma: bool = True,
) -> Step:
    """Compiles a training step for a mesh, by `jax.shard_map`.

    Args:
      step: A function (state, batch, *args) -> (state, metrics). It sees its device's
        part of the batch, and its gradient function knows the axes
        (`axis_name="data"`).
      mesh: A mesh from :func:`make_mesh`.
      batch_spec: The division of the batch; by default its leading axis is divided over
        "data" if the mesh has that axis.
      state_spec: The division of the state; by default every device holds all of it.
        P("member") for an ensemble whose members are stacked on a leading axis.
      metrics_spec: The division of the metrics; None for that of the state.
      donate: True to reuse the state's memory for the new state.
      check_vma: True to let JAX prove that what should be equal on all devices is
        equal. With it a gradient function finds that its `axis_name` is missing.

    Returns:
      A function (state, batch, *args) -> (state, metrics) on whole arrays: pass it the
      whole batch. Further arguments are the same on every device.

    Raises:
      ValueError: At the call, the batch cannot be divided evenly over the devices.

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
    spec_of_batch = placement.data_spec(mesh) if batch_spec is None else batch_spec
    for spec in (spec_of_batch, state_spec, metrics_spec):
        placement.check_spec(spec, mesh)

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
        placement.check_parts(batch, mesh, spec_of_batch)
        # Put the state where the result will be, so that a second call does not compile
        # again, and the batch in parts, so that no device gets the whole of it.
        state = placement.settle(state, NamedSharding(mesh, state_spec))
        batch = placement.settle(batch, NamedSharding(mesh, spec_of_batch))
        try:
            return compiled(state, batch, *args)
        except ValueError as error:
            if "check_vma" in str(error):
                error.add_note(
                    "Here: is a value of each device's own returned, as a loss, a "
                    "metric or a gradient of jax.grad? Average it, as "
                    "jax.lax.pmean(value, 'data')."
                )
            raise

    run.lower = compiled.lower  # type: ignore[attr-defined]
    return run


def pmap_step(
    step: Step,
    axis_name: str = "data",
    devices: Sequence[jax.Device] | None = None,
) -> Step:
    """Compiles a training step for all local devices, by `jax.pmap`.

    It is for programs that use pmap already, which JAX keeps but no longer develops.
    Use :func:`shard_map_step` in new programs: it also proves that gradients were
    averaged, while here a forgotten `axis_name` trains another model on each device.

    Args:
      step: A function (state, batch, *args) -> (state, metrics). It sees its device's
        part of the batch, and its gradient function has `axis_name=axis_name`.
      axis_name: The name of the device axis.
      devices: The devices to use; None for all local ones.

    Returns:
      A function (state, batch, *args) -> (state, metrics) on whole arrays. The state is
      copied to the devices at the first call and stays there; the batch is cut into
      consecutive parts. Further arguments are the same on every device.

    Raises:
      ValueError: There are several hosts; at the call, the batch cannot be divided
        evenly over the devices.

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
            "pmap_step is for the devices of one host: each host would train its own "
            "model. Use shard_map_step, whose mesh spans all hosts."
        )
    devices = jax.local_devices() if devices is None else list(devices)
    count = len(devices)
    grid = Mesh(np.asarray(devices, object), (axis_name,), axis_types=(AxisType.Auto,))
    compiled: dict[int, Step] = {}

    def call(state, batch, *args):
        placement.check_divides(batch_size(batch), count)
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
        state = placement.settle(state, NamedSharding(grid, P()))
        return compiled[len(args)](state, parts, *args)

    return call
