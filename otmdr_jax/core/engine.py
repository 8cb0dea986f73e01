"""The robust gradient itself: particles, their average, and what each leaf's part is.

:mod:`otmdr_jax.core.gradient` is its public face. A center distribution other than one
weight vector (:mod:`otmdr_jax.bnn`) has parameters of several kinds, which
:class:`Roles` tells apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, mapping, tree
from otmdr_jax.core.ascent import resolve_mask
from otmdr_jax.core.batches import accumulate, batch_size, split_batch
from otmdr_jax.core.keys import one_key
from otmdr_jax.core.options import Options, check_rho
from otmdr_jax.core.particle import climb

PyTree = Any


class Diagnostics(NamedTuple):
    """What a robust gradient saw on its way; computed by no further pass.

    Attributes:
      center_loss: Mean over particles of the loss at the center, on the first part of
        the batch: with `split="shared"` on all of it.
      robust_loss: Mean over particles of the loss of all of the batch at the particle.
      gap: `robust_loss - center_loss`, a running estimate of sharpness.
      ascent_norms: (S,) gradient norms of the ascent steps, mean over particles; None
        in the state of a transformation that takes no such steps.
      grad_norm: Norm of the gradient that is returned.
      distances: (K,) distance of each particle from the center.
    """

    center_loss: jax.Array
    robust_loss: jax.Array
    gap: jax.Array
    ascent_norms: jax.Array | None
    grad_norm: jax.Array
    distances: jax.Array


class RobustGradient(NamedTuple):
    """What :func:`otmdr_jax.robust_gradient` returns.

    Attributes:
      value: The robust loss, a scalar.
      aux: The auxiliary output of the pass at the center, or None.
      grads: The gradient, of the structure and dtypes of the parameters as arrays.
      diagnostics: See :class:`Diagnostics`.
    """

    value: jax.Array
    aux: PyTree
    grads: PyTree
    diagnostics: Diagnostics


class Roles(NamedTuple):
    """What leaves do that are no ordinary weights; masks as in :class:`Options`.

    Attributes:
      counts: Leaves whose gradients enter a global norm; None: those that move.
      at_center: Leaves whose gradient is taken at the center instead of at the
        particle; None: none.
      center_batch: On what: "all" of the batch, which takes a pass over what the first
        ascent step does not see, or its "first" part alone, which takes none.
    """

    counts: Any = None
    at_center: Any = None
    center_batch: str = "all"


def build(
    loss_fn: Callable[..., Any],
    rho: tuple[jax.typing.ArrayLike, ...],
    options: Options,
    roles: Roles | None = None,
    scale: PyTree | None = None,
    finish: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] | None = None,
) -> Callable[..., RobustGradient]:
    """Builds the function behind :func:`otmdr_jax.robust_gradient`.

    Args:
      loss_fn: As there.
      rho: Checked radii; none for the plain gradient, at the center.
      options: Checked options.
      roles: What leaves do beside moving, for parameters of several kinds.
      scale: T of every ascent step, see :func:`otmdr_jax.core.ascent.ascend`.
      finish: What a particle's gradient becomes: (the gradient of its first ascent
        step, its last one) -> (gradient, extra). Both are those of all devices where
        these share a perturbation. The result's aux is then (aux, extra). Without
        `roles`.

    Returns:
      `fn(params, batch, *args, key=None, rho=None, by_pass=None, **kwargs)`;
      `by_pass` is a function of the number of ascent steps taken to further keyword
      arguments of the loss in that pass.
    """
    roles = Roles() if roles is None else roles
    default_rho = rho
    gradient_of = jax.value_and_grad(checked(loss_fn, options.has_aux), has_aux=True)
    data_axes = collectives.axes_of(options.axis_name)
    particle_axes = collectives.axes_of(options.particle_axis_name)
    all_axes = data_axes + particle_axes

    def compute(params, batch, *args, key=None, rho=None, by_pass=None, **kwargs):
        params, key = tree.arrays(params), one_key(key)
        radii = default_rho if rho is None else check_rho(rho)
        moves, counts, central = (
            resolve_mask(mask, params)
            for mask in (options.mask, roles.counts, roles.at_center)
        )
        if options.random and key is None:
            raise ValueError(
                f"split={options.split!r} and noise_std={options.noise_std!r} need "
                "randomness: pass key=jax.random.key(...), a fresh one each step, or "
                'use split="ordered" or "shared" with noise_std=0.'
            )
        collectives.check_bound(all_axes)
        keys, here = _particle_keys(key, options, data_axes, particle_axes)
        # The gradient of a replicated value is summed over devices behind our back
        # (shard_map with check_vma); of a value marked as varying it is not.
        center = collectives.vary(params, all_axes)
        differs = collectives.varying_axes((center, batch, args, kwargs, keys))

        def vary(fresh):
            return collectives.vary(fresh, differs)

        def gradient(w, part, taken):
            own = {} if by_pass is None else by_pass(taken)

            def of(piece):
                return gradient_of(w, piece, *args, **kwargs, **own)

            def fresh(zeros):
                # Sums start at zeros that wait for w: else XLA may lay out those of
                # all passes at once, each of the size of the parameters.
                return vary(mapping.after(w, zeros))

            return accumulate(of, part, options.microbatch_size, fresh)

        def ascent_gradient(w, part, taken):
            (loss, aux), grads = gradient(w, part, taken)
            _, kept = _parted(grads, central)
            if options.sync_perturbation:
                grads = collectives.pmean(grads, data_axes)
            return (loss, (aux, kept)), grads

        def particle(keys, parts=None, first=None):
            split_key, noise_key = keys
            path = climb(
                ascent_gradient,
                center,
                split_batch(batch, len(radii), split_key) if parts is None else parts,
                radii,
                options,
                mask=moves,
                norm_mask=counts,
                scale=scale,
                key=noise_key,
                first=first,
            )
            # Never differentiated through: gradient() starts afresh at the particle.
            (value, _), grads = gradient(path.particle, batch, len(radii))
            aux, kept = path.aux
            if finish is not None:
                if options.sync_perturbation:
                    grads = collectives.pmean(grads, data_axes)
                grads, extra = finish(path.start, grads)
                aux = aux, extra
            moved, _ = _parted(grads, central)
            means = (value, aux, moved, kept, path.center_loss, path.norms)
            return means, _distance(path.particle, center)

        def completed(first, parts):
            """The gradient at the center on all parts; the parts, available after it.

            The first ascent step has it on the first part: one pass over the others.
            """
            kept = first[0][1][1]
            if not kept or roles.center_batch == "first" or options.split == "shared":
                return kept, parts
            rest = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts[1:])
            _, grads = gradient(center, mapping.after(kept, rest), 0)
            sizes = batch_size(parts[0]), batch_size(rest)
            kept = tree.weighted_mean(kept, _parted(grads, central)[1], *sizes)
            return kept, mapping.after(kept, parts)

        def average(function, keys, count):
            return mapping.average(function, keys, count, options.particle_map, vary)

        batch_size(batch)
        completes = central is not None and roles.center_batch == "all"
        if not radii:
            (value, aux), grads = gradient(center, batch, 0)
            means: Any = (value, aux, jax.tree.leaves(grads), [], value, jnp.zeros(0))
            distances = jnp.zeros(1)
        elif options.split != "random":
            # All particles leave from the same gradients: compute them once.
            parts = _parts(batch, len(radii), options.split)
            first = ascent_gradient(center, parts[0], 0)
            kept, parts = completed(first, parts)
            means, distances = average(
                lambda keys: particle(keys, parts, first), keys, here
            )
            means = (*means[:3], kept, *means[4:])
        elif completes and len(radii) > 1:
            # The first particle's split serves all, so that one pass does.
            lead = jax.tree.map(lambda k: k[0], keys) if here > 1 else keys
            parts = split_batch(batch, len(radii), lead[0])
            first = ascent_gradient(center, parts[0], 0)
            kept, parts = completed(first, parts)
            means, distance = particle(lead, parts, first)
            distances = distance[None]
            if here > 1:
                others = jax.tree.map(lambda k: k[1:], keys)
                if here == 2:
                    others = jax.tree.map(lambda k: k[0], others)
                more, further = average(
                    particle, mapping.after(means, others), here - 1
                )
                means = tree.weighted_mean(means, more, 1, here - 1)
                distances = jnp.concatenate([distances, further])
            means = (*means[:3], kept, *means[4:])
        else:
            means, distances = average(particle, keys, here)
        if options.random:
            distances = collectives.slots(distances, particle_axes)
        else:  # all particles are the same one
            distances = jnp.tile(distances, options.num_particles)
        means, distances = collectives.pmean((means, distances), all_axes)
        value, aux, moved, kept, center_loss, norms = means
        grads = tree.like(_joined(moved, kept, central, params), params)
        diagnostics = Diagnostics(
            center_loss, value, value - center_loss, norms, tree.norm(grads), distances
        )
        return RobustGradient(value, aux, grads, diagnostics)

    return compute


def _parted(grads, mask):
    """The leaves that a mask does not name, and those that it names, as lists."""
    leaves = jax.tree.leaves(grads)
    named = [False] * len(leaves) if mask is None else jax.tree.leaves(mask)
    pairs = list(zip(leaves, named, strict=True))
    return [x for x, n in pairs if not n], [x for x, n in pairs if n]


def _joined(others, picked, mask, like):
    """The inverse of `_parted`, with the structure of the parameters."""
    treedef = jax.tree.structure(like)
    named = [False] * len(others) if not picked else jax.tree.leaves(mask)
    sources = iter(others), iter(picked)
    return jax.tree.unflatten(treedef, [next(sources[n]) for n in named])


def _parts(batch, num_parts, split):
    if split == "ordered":
        return split_batch(batch, num_parts, key=None)
    batch_size(batch)
    return [batch] * num_parts


def _particle_keys(key, opts, data_axes, particle_axes):
    """The keys of this device's particles, and how many there are.

    A pair of keys for each, (k,) of each kind; one pair, without axis, for k = 1.
    Devices of a data axis split their parts of the batch independently of each other.
    Noise belongs to the perturbation: it is the same everywhere if that is. Particles
    have the keys that they would have on one device.
    """
    if not opts.random:
        return (None, None), 1
    devices = jax.lax.axis_size(particle_axes) if particle_axes else 1
    here, over = divmod(opts.num_particles, devices)
    if over:
        raise ValueError(
            f"num_particles must be a multiple of the {devices} devices of axis "
            f"{opts.particle_axis_name!r}, got {opts.num_particles}."
        )
    split_key, noise_key = jax.random.split(key)
    if data_axes and jax.lax.axis_size(data_axes) > 1:
        device = jax.lax.axis_index(data_axes)
        split_key = jax.random.fold_in(split_key, device)
        if not opts.sync_perturbation:
            noise_key = jax.random.fold_in(noise_key, device)
    keys = split_key, noise_key
    if opts.num_particles == 1:
        return keys, 1
    keys = jax.tree.map(lambda k: jax.random.split(k, opts.num_particles), keys)
    if not particle_axes:
        return keys, here
    start = here * jax.lax.axis_index(particle_axes)
    if here == 1:
        return jax.tree.map(lambda k: k[start], keys), 1
    return jax.tree.map(
        lambda k: jax.lax.dynamic_slice_in_dim(k, start, here), keys
    ), here


def _distance(particle, center):
    away = jax.tree.map(
        lambda a, b: a.astype(tree.accumulation_dtype(a)) - b, particle, center
    )
    return tree.norm(away)


def checked(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """`loss_fn` to (loss, aux) always, refusing what is no scalar loss."""

    def of(params, batch, *args, **kwargs):
        out = loss_fn(params, batch, *args, **kwargs)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                "with has_aux=True loss_fn must return (loss, aux), got "
                f"{type(out).__name__}."
            )
        loss, aux = out if has_aux else (out, None)
        if isinstance(loss, (tuple, list, dict)) or loss is None:
            raise TypeError(
                f"loss_fn must return a scalar, got {type(loss).__name__}: for "
                "(loss, aux) pass has_aux=True."
            )
        loss = jnp.asarray(loss)
        if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(
                "loss_fn must return a real floating scalar, got shape "
                f"{loss.shape} and dtype {loss.dtype}: average over the batch with "
                "jnp.mean."
            )
        return loss, aux

    return of
