"""The same step on one device, on many devices, and on many hosts.

A mesh arranges devices along named axes: "data" (each device has its part of the
batch), "particle" (its part of the K particles) and "member" (its part of an ensemble).
A step that is written for one device and knows the names of the axes,

    grad_fn = otmdr_jax.value_and_grad(
        loss_fn, axis_name="data", particle_axis_name="particle", num_particles=4
    )

runs on all of them through :func:`shard_map_step`, or :func:`pmap_step` in programs
that use `jax.pmap`. Under plain `jax.jit` no axis has a name: place the batch with
:func:`place` and XLA does the rest. docs/scaling.md says which to choose.
"""

from otmdr_jax.parallel.hosts import (
    agree,
    check_agreement,
    initialize,
    is_main,
    on_main,
)
from otmdr_jax.parallel.meshes import AXES, axis_size, make_mesh
from otmdr_jax.parallel.placement import (
    data_spec,
    host_rows,
    place,
    place_local,
    replicated,
)
from otmdr_jax.parallel.steps import pmap_step, shard_map_step

__all__ = [
    "AXES",
    "agree",
    "axis_size",
    "check_agreement",
    "data_spec",
    "host_rows",
    "initialize",
    "is_main",
    "make_mesh",
    "on_main",
    "place",
    "place_local",
    "pmap_step",
    "replicated",
    "shard_map_step",
]
