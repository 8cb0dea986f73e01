"""K particles around one center: the split of the batch, the climb, the average.

A particle climbs from the center in S steps, each on its own part of the batch
(Eq. 9); what it returns is averaged over the K particles (Eq. 10). How the K are
mapped is a matter of speed alone: see `average`.

Reference: Nguyen et al., 2023, section 4.2.1 and Algorithm 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax import tree
from otmdr_jax.options import Options
from otmdr_jax.perturbation import ascend

PyTree = Any
Gradient = Callable[[PyTree, PyTree], tuple[tuple[jax.Array, PyTree], PyTree]]

# With more particles than this, `auto` scans on an accelerator: an unrolled program
# is as fast there, but takes K times as long to compile.
MAX_UNROLLED = 8


class Climb(NamedTuple):
    """Where a particle arrives, and what it saw at the center.

    Attributes:
      particle: The weights after the last ascent step.
      center_loss: The loss at the center on the first part of the batch.
      aux: The auxiliary output of that pass.
      norms: (S,) gradient norms of the ascent steps.
    """

    particle: PyTree
    center_loss: jax.Array
    aux: PyTree
    norms: jax.Array


def batch_size(batch: PyTree) -> int:
    """The leading axis that all leaves of a batch share.

    Raises:
      ValueError: The batch has no leaves, a leaf without axes, leaves that disagree,
        or no examples.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or any(not shape for shape in shapes):
        raise ValueError(
            "batch must be a pytree of arrays with a leading example axis, got "
            f"leaves of shapes {shapes}. Pass what has no such axis as a further "
            "argument of the loss, after batch."
        )
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            "all leaves of batch must share their leading axis, got leaves of "
            f"shapes {shapes}."
        )
    if sizes == {0}:
        raise ValueError(f"batch is empty: its leaves have shapes {shapes}.")
    return sizes.pop()


def split_batch(batch: PyTree, num_parts: int, key: jax.Array | None) -> list[PyTree]:
    """Cuts a batch into parts whose sizes differ by at most one; drops nothing.

    Args:
      batch: A pytree with a leading example axis of B >= num_parts.
      num_parts: S, the number of parts; the first B mod S have one example more.
      key: A PRNG key for a random split, or None for consecutive parts.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.particles import split_batch
      >>> [part.tolist() for part in split_batch(jnp.arange(5), 2, key=None)]
      [[0, 1, 2], [3, 4]]
    """
    size = batch_size(batch)
    if size < num_parts:
        raise ValueError(
            f"a batch of {size} cannot be cut into {num_parts} parts, one for each "
            'radius in rho: use a larger batch, fewer radii, or split="shared".'
        )
    each, longer = divmod(size, num_parts)
    bounds = [i * each + min(i, longer) for i in range(num_parts + 1)]
    if key is None:
        return [
            jax.tree.map(lambda x, a=a, b=b: x[a:b], batch)
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
    order = jax.random.permutation(key, size)
    return [
        jax.tree.map(lambda x, i=order[a:b]: _gather(jnp.asarray(x), i), batch)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]


def _gather(x, index):
    """x[index]; on a mesh with explicit axes the result is sharded as x is."""
    sharding = jax.typeof(x).sharding
    axes = sharding.spec[0] if sharding.spec else None
    if axes is None:
        return x[index]
    mesh, rest = sharding.mesh, sharding.spec[1:]
    names = axes if isinstance(axes, tuple) else (axes,)
    devices = math.prod(mesh.shape[name] for name in names)
    # A part that the devices do not divide is on all of them.
    first = None if len(index) % devices else axes
    spec = jax.sharding.PartitionSpec(first, *rest)
    return x.at[index].get(out_sharding=jax.NamedSharding(mesh, spec))


def climb(
    gradient: Gradient,
    params: PyTree,
    parts: Sequence[PyTree],
    rho: Sequence[jax.typing.ArrayLike],
    options: Options,
    *,
    mask: PyTree | None = None,
    key: jax.Array | None = None,
    first: tuple[tuple[jax.Array, PyTree], PyTree] | None = None,
) -> Climb:
    """Takes one ascent step on each part (Eq. 9, first two lines for S = 2).

    Args:
      gradient: (params, part) -> ((loss, aux), grads).
      params: The center.
      parts: S parts of the batch.
      rho: S radii.
      options: Norm, adaptivity, merging and noise.
      mask: Which leaves may move, already resolved.
      key: A PRNG key, needed if there is noise.
      first: What `gradient(params, parts[0])` gives, where it is already known.
    """
    w, total, norms = params, None, []
    start = first
    for s, (part, radius) in enumerate(zip(parts, rho, strict=True)):
        (loss, aux), grads = start if start is not None else gradient(w, part)
        if s == 0:
            center_loss, center_aux = loss, aux
        start = None
        direction = None
        if options.merge is not None:
            # The released code never clears the gradients: g1, then g1 + g2, ...
            # over the norm of the last one alone.
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            parts_seen = s + 1 if options.merge == "mean" else 1
            direction = jax.tree.map(lambda g, n=parts_seen: g / n, total)
        w, length = ascend(
            w,
            grads,
            radius,
            direction=direction,
            norm=options.norm,
            adaptive=options.adaptive,
            mask=mask,
            noise_std=options.noise_std if options.noisy else None,
            key=None if key is None else jax.random.fold_in(key, s),
        )
        norms.append(length)
    return Climb(w, center_loss, center_aux, jnp.stack(norms))


def average(
    particle: Callable[[Any], tuple[PyTree, PyTree]],
    keys: Any,
    num_particles: int,
    particle_map: str = "auto",
    varying: Callable[[PyTree], PyTree] = lambda x: x,
) -> tuple[PyTree, PyTree]:
    """Runs every particle and averages what it returns (Eq. 10).

    Args:
      particle: key -> (to_average, to_stack).
      keys: A pytree of (K,) PRNG keys; for K = 1 anything, handed on as it is.
      num_particles: K.
      particle_map: "unroll" (a loop in the program: one particle after the other, the
        memory of one), "scan" (the same, compiled once), "vmap" (all at once, K times
        the activations), or "auto".
      varying: Marks fresh arrays as differing between devices, for a scan's carry
        inside shard_map.

    Returns:
      The mean of `to_average` over particles (of leaves that are not floating, the
      first particle's) and `to_stack` with a leading axis K.
    """
    if num_particles == 1:
        mean, stacked = particle(keys)
        return mean, jax.tree.map(lambda x: jnp.asarray(x)[None], stacked)
    if particle_map == "auto":
        particle_map = _fastest_map(num_particles)

    def parted(key):
        mean, stacked = particle(key)
        floats = jax.tree.map(lambda x: x if tree.is_floating(x) else None, mean)
        others = jax.tree.map(lambda x: None if tree.is_floating(x) else x, mean)
        return floats, (others, stacked)

    if particle_map == "vmap":
        floats, (others, stacked) = jax.vmap(parted)(keys)
        floats = jax.tree.map(lambda x: jnp.mean(x, axis=0).astype(x.dtype), floats)
    elif particle_map == "scan":
        floats, (others, stacked) = _scan(parted, keys, num_particles, varying)
    else:
        floats, (others, stacked) = _unroll(parted, keys, num_particles)
    mean = jax.tree.map(
        lambda x, other: x if other is None else other[0],
        floats,
        others,
        is_leaf=lambda x: x is None,
    )
    return mean, stacked


def _fastest_map(num_particles: int) -> str:
    """What `auto` stands for on the default backend: see docs/performance.md.

    On CPUs XLA runs a convolution inside a loop, or one batched over kernels, many
    times slower than the same convolution standing alone.
    """
    if jax.default_backend() == "cpu" or num_particles <= MAX_UNROLLED:
        return "unroll"
    return "scan"


def _unroll(particle, keys, num_particles):
    floats, others = particle(_take(keys, 0))
    total, stacks = _widen(floats), [others]
    for k in range(1, num_particles):
        key = _after(total, _take(keys, k))
        more, others = particle(key)
        total = jax.tree.map(jnp.add, total, more)
        stacks.append(others)
    return _divide(total, floats, num_particles), tree.stack(stacks)


def _scan(particle, keys, num_particles, varying):
    shapes, _ = jax.eval_shape(particle, _take(keys, 0))

    def body(total, key):
        floats, others = particle(key)
        return jax.tree.map(jnp.add, total, floats), others

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, others = jax.lax.scan(body, varying(_widen(zeros)), keys)
    return _divide(total, shapes, num_particles), others


def _after(floats, keys):
    """`keys`, but available only once `floats` is.

    Makes a particle wait for the one before it, so that only one holds activations at
    a time. An optimization barrier does not: XLA removes it before it schedules, and
    on CPUs it schedules for concurrency. x * 0 may be NaN, so that no compiler drops
    it; as an integer it is 0 either way.
    """
    seen = sum(jnp.real(jnp.ravel(x)[0]) for x in jax.tree.leaves(floats) if x.size)
    zero = jnp.nan_to_num(seen * 0).astype(jnp.uint32)

    def wait(key):
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return key + zero
        data = jax.random.key_data(key) + zero
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))

    return jax.tree.map(wait, keys)


def _take(keys, index):
    return jax.tree.map(lambda key: key[index], keys)


def _widen(floats):
    """Sums of bfloat16 gradients are kept in float32."""
    return jax.tree.map(
        lambda x: jnp.asarray(x).astype(tree.accumulation_dtype(x)), floats
    )


def _divide(total, like, num_particles):
    return jax.tree.map(lambda t, x: (t / num_particles).astype(x.dtype), total, like)
