"""m-sharpness on any number of devices: parts of the batch, each with its particle.

The batch is cut into consecutive parts of one size; each of them climbs on its own, and
the results are averaged. With as many parts as devices it is what many devices give
without a shared perturbation (Foret et al., 2021, section 4.1).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, engine, mapping, shards, tree
from otmdr_jax.core.batches import batch_size, check_known
from otmdr_jax.core.engine import RobustGradient
from otmdr_jax.core.keys import one_key
from otmdr_jax.core.options import Options

PyTree = Any


def build(
    loss_fn: Callable[..., Any],
    rho: tuple[jax.typing.ArrayLike, ...],
    options: Options,
    *,
    per_key: Callable[[jax.Array], dict[str, Any]] | None = None,
    **hooks: Any,
) -> Callable[..., RobustGradient]:
    """:func:`otmdr_jax.core.engine.build` on `options.num_subbatches` parts of a batch.

    Args:
      loss_fn: As there, as the next two.
      rho: Checked radii.
      options: Checked options. On the devices of `axis_name` each cuts its own part of
        the batch, so that the parts are those of one device. Parts come one after the
        other ("auto"), or as `particle_map` says.
      per_key: Further arguments of the engine's function, from a part's own key.
      **hooks: Those of :func:`otmdr_jax.core.engine.build`.

    Returns:
      A function as there; the key is split into one for each part.
    """
    count = options.num_subbatches
    axes = collectives.axes_of(options.axis_name)
    own = options
    if count > 1:
        # The parts are those of one device: each climbs on its own.
        alone: Any = {"axis_name": None, "sync_perturbation": True, "num_subbatches": 1}
        own = dataclasses.replace(options, **alone)
    of_one = engine.build(loss_fn, rho, own, **hooks)
    how = "sequential" if options.particle_map == "auto" else options.particle_map

    def of_part(params, batch, *args, key, **kwargs):
        extra = {} if per_key is None else per_key(key)
        return of_one(params, batch, *args, key=key, **extra, **kwargs)

    def compute(params, batch, *args, key=None, **kwargs):
        params, key = tree.arrays(params), one_key(key)
        if count == 1:
            return of_part(params, batch, *args, key=key, **kwargs)
        collectives.check_bound(axes)
        parts, keys, here = _parts(batch, key, count, axes)
        # Not averaged part by part: see engine.py on what shard_map does otherwise.
        params = collectives.vary(params, axes)
        differs = collectives.varying_axes((params, parts, args, kwargs, keys))
        mean, _ = mapping.average(
            lambda own: (of_part(params, own[0], *args, key=own[1], **kwargs), ()),
            (parts, keys),
            here,
            how,
            lambda fresh: collectives.vary(fresh, differs),
        )
        mean = collectives.pmean(mean, axes)
        mean = mean._replace(grads=tree.like(mean.grads, params))
        info = mean.diagnostics._replace(grad_norm=tree.norm(mean.grads))
        return mean._replace(diagnostics=info)

    return compute


def _parts(batch, key, count, axes):
    """This device's parts and their keys, on a leading axis where there are several."""
    devices = jax.lax.axis_size(axes) if axes else 1
    here, over = divmod(count, devices)
    if over or not here:
        raise ValueError(
            f"num_subbatches must be 1 or a multiple of the {devices} devices that the "
            f"batch is divided over, got {count}: each cuts its own part."
        )
    size = batch_size(batch)
    check_known(size, here, f"num_subbatches={count}")
    if size % here:
        raise ValueError(
            f"{here} sub-batches of one size cannot be cut from a batch of {size}"
            + (f" on each of {devices} devices" if devices > 1 else "")
            + f": num_subbatches={count} must divide it."
        )
    keys = None if key is None else jax.random.split(key, count)
    first = here * jax.lax.axis_index(axes) if devices > 1 else 0
    if here == 1:
        return batch, None if keys is None else keys[first], 1
    each = size // here
    parts = jax.tree.map(
        lambda x: jnp.asarray(x).reshape(
            here, each, *x.shape[1:], out_sharding=shards.of_rows(x, each, lead=1)
        ),
        batch,
    )
    if keys is not None:
        keys = jax.lax.dynamic_slice_in_dim(keys, first, here)
    return parts, keys, here
