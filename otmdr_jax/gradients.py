r"""The robust gradient: a drop-in for `jax.value_and_grad`.

For each of K particles (Nguyen et al., 2023, Eqs. 9-10; S = 2 radii in the paper):

    w_0 = theta
    g_s = grad L_{B_s}(w_{s-1}),   w_s = w_{s-1} + rho_s g_s / ||g_s||_2 + e_s
    result = 1/K sum_k grad L_B(w_S)

With one radius, the whole batch and no noise this is SAM (Theorem 4.3).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax import collectives, mapping, tree
from otmdr_jax.batches import accumulate, batch_size, split_batch
from otmdr_jax.options import Options, check_rho
from otmdr_jax.particles import climb
from otmdr_jax.perturbation import resolve_mask

PyTree = Any

# The paper's radii for CIFAR-10: rho_1 = 0.05 and rho_2 = 2 rho_1 (section 5.1).
PAPER_RHO = (0.05, 0.1)


class Diagnostics(NamedTuple):
    """What a robust gradient saw on its way; computed by no further pass.

    Attributes:
      center_loss: Mean over particles of the loss at the center, on the first part of
        the batch: with `split="shared"` on all of it.
      robust_loss: Mean over particles of the loss of all of the batch at the particle.
      gap: `robust_loss - center_loss`, a running estimate of sharpness.
      ascent_norms: (S,) gradient norms of the ascent steps, mean over particles.
      grad_norm: Norm of the gradient that is returned.
      distances: (K,) distance of each particle from the center.
    """

    center_loss: jax.Array
    robust_loss: jax.Array
    gap: jax.Array
    ascent_norms: jax.Array
    grad_norm: jax.Array
    distances: jax.Array


class RobustGradient(NamedTuple):
    """What :func:`robust_gradient` returns.

    Attributes:
      value: The robust loss, a scalar.
      aux: The auxiliary output of the pass at the center, or None.
      grads: The gradient, of the structure and dtypes of the parameters.
      diagnostics: See :class:`Diagnostics`.
    """

    value: jax.Array
    aux: PyTree
    grads: PyTree
    diagnostics: Diagnostics


def value_and_grad(
    loss_fn: Callable[..., Any],
    rho: Any = PAPER_RHO,
    num_particles: int = 1,
    noise_std: jax.typing.ArrayLike = 0.0,
    split: str = "random",
    norm: str = "global",
    adaptive: bool = False,
    merge: str | None = None,
    mask: Any = None,
    has_aux: bool = False,
    axis_name: Any = None,
    sync_perturbation: bool = True,
    particle_map: str = "auto",
    particle_axis_name: Any = None,
    microbatch_size: int | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""The OT-MDR counterpart of `jax.value_and_grad`.

    .. math::
        w_k^s = w_k^{s-1} + \rho_s \frac{\nabla L_{B_k^s}(w_k^{s-1})}
            {\|\nabla L_{B_k^s}(w_k^{s-1})\|_2} + \epsilon_k^s,
        \qquad w_k^0 = \theta, \qquad
        g = \frac1K \sum_{k=1}^K \nabla L_B(w_k^S)

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` to the mean loss over the
        batch, a scalar, or to (loss, aux). It sees plain pytrees.
      rho: One radius :math:`\rho_s` for each ascent step, in the units of the weights:
        numbers or traced scalars. The paper's (0.05, 0.1) for CIFAR-10 by default.
      num_particles: K. Cost in gradients of single examples: 2 K |B| for random parts.
        Otherwise the first gradient is that of all particles, and without noise all
        particles are one, so K is 1.
      noise_std: Standard deviation of :math:`\epsilon` per coordinate, after each
        ascent step. Without noise by default, as in the released code; 0.01 in the
        paper's appendix B.1.
      split: "random" (each particle cuts B at random into S parts, as the paper),
        "ordered" (consecutive parts, as the released code for K = 1), or "shared"
        (every step sees all of B, as SAM). Sizes differ by at most one.
      norm: "global" (one norm over all parameters) or "per_leaf".
      adaptive: Scale element-wise by the absolute weights (ASAM).
      merge: None (the paper), or the released code's second direction: "sum" of the
        gradients so far, or their "mean", over the norm of the last one.
      mask: A pytree of bools, or a function of the parameters to one: True where a
        leaf may be perturbed. Other leaves do not count in the norm, but are trained.
      has_aux: Whether `loss_fn` returns (loss, aux).
      axis_name: Name of the device axis inside `jax.pmap` or `jax.shard_map`; values,
        aux and gradients come back averaged over it.
      sync_perturbation: With `axis_name`: True makes every ascent direction the global
        one; False lets each device climb on its own part (m-sharpness), with a single
        all-reduce a step.
      particle_map: How K particles are mapped: "unroll", "scan", "vmap", or "auto".
        A matter of speed and memory only; see `docs/performance.md`.
      particle_axis_name: Name of a device axis that the K particles are spread over,
        K / devices on each; the same K particles as on one device. Averaged together
        with `axis_name`, in one reduction at the end.
      microbatch_size: Examples that a pass differentiates at a time; None for all. The
        objective stays that of the whole batch: gradients are accumulated inside each
        pass, before a norm is taken. With `axis_name` it counts a device's examples.
        BatchNorm sees micro-batches; aux is averaged over them.

    Returns:
      `grad_fn(params, batch, *args, key=None, rho=None, **kwargs)`, which returns
      `(value, grads)` or, with `has_aux`, `((value, aux), grads)`. `value` is the mean
      over particles of the loss of all of B at the particle; `aux` comes from the
      pass at the center, its floating leaves averaged over particles (BatchNorm
      statistics, say), others from the first particle. `key` may be left out where
      nothing is random; `rho` overrides the radii for one call. Both belong to
      `grad_fn`: a loss that needs a key or a rho of its own takes it by position.

    Raises:
      ValueError, TypeError: An option that cannot work, here; at the call a batch
        that cannot be split, a missing key, a mask of another structure, a loss that
        is no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, otmdr_jax
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
      >>> params = {"w": jnp.array([1.0, -1.0])}
      >>> batch = {"x": jnp.eye(2), "y": jnp.zeros(2)}
      >>> grad_fn = jax.jit(otmdr_jax.value_and_grad(loss_fn, rho=(0.05, 0.1)))
      >>> value, grads = grad_fn(params, batch, key=jax.random.key(0))
      >>> float(value) > float(loss_fn(params, batch))
      True

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023.
    """
    compute = robust_gradient(
        loss_fn,
        rho,
        num_particles=num_particles,
        noise_std=noise_std,
        split=split,
        norm=norm,
        adaptive=adaptive,
        merge=merge,
        mask=mask,
        has_aux=has_aux,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        particle_map=particle_map,
        particle_axis_name=particle_axis_name,
        microbatch_size=microbatch_size,
    )

    def grad_fn(params, batch, *args, key=None, rho=None, **kwargs):
        value, aux, grads, _ = compute(params, batch, *args, key=key, rho=rho, **kwargs)
        return ((value, aux) if has_aux else value), grads

    return grad_fn


def robust_gradient(
    loss_fn: Callable[..., Any], rho: Any = PAPER_RHO, **options: Any
) -> Callable[..., RobustGradient]:
    """:func:`value_and_grad` with everything it knows, diagnostics included.

    Under `jax.jit` diagnostics that are not used cost nothing.

    Args:
      loss_fn: See :func:`value_and_grad`.
      rho: See :func:`value_and_grad`.
      **options: See :func:`value_and_grad`.

    Returns:
      `fn(params, batch, *args, key=None, rho=None, **kwargs)`, which returns a
      :class:`RobustGradient`.

    Example:
      >>> import jax.numpy as jnp, otmdr_jax
      >>> def loss_fn(w, batch):
      ...     return 0.5 * jnp.sum(w**2) + 0.0 * jnp.mean(batch)
      >>> sam = otmdr_jax.robust_gradient(loss_fn, rho=0.5, split="shared")
      >>> result = sam(jnp.array([3.0, 4.0]), jnp.zeros(2))
      >>> result.grads
      Array([3.3, 4.4], dtype=float32)
      >>> float(result.diagnostics.gap)  # 5.5^2 / 2 - 5^2 / 2
      2.625
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, batch), got {loss_fn}")
    default_rho = check_rho(rho)
    known = {field.name for field in dataclasses.fields(Options)}
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"unknown options {', '.join(unknown)}; "
            f"there are {', '.join(sorted(known))}."
        )
    opts = Options(**options)
    gradient_of = jax.value_and_grad(_checked(loss_fn, opts.has_aux), has_aux=True)

    data_axes = collectives.axes_of(opts.axis_name)
    particle_axes = collectives.axes_of(opts.particle_axis_name)
    all_axes = data_axes + particle_axes

    def compute(params, batch, *args, key=None, rho=None, **kwargs):
        radii = default_rho if rho is None else check_rho(rho)
        mask = resolve_mask(opts.mask, params)
        if opts.random and key is None:
            raise ValueError(
                f"split={opts.split!r} and noise_std={opts.noise_std!r} need "
                "randomness: pass key=jax.random.key(...), a fresh one each step, or "
                'use split="ordered" or "shared" with noise_std=0.'
            )
        collectives.check_bound(all_axes)
        keys, here = _particle_keys(key, opts, data_axes, particle_axes)
        # The gradient of a replicated value is summed over devices behind our back
        # (shard_map with check_vma); of a value marked as varying it is not.
        center = collectives.vary(params, all_axes)
        differs = collectives.varying_axes((center, batch, args, kwargs, keys))

        def vary(fresh):
            return collectives.vary(fresh, differs)

        def gradient(w, part):
            def of(piece):
                return gradient_of(w, piece, *args, **kwargs)

            def fresh(zeros):
                # Sums start at zeros that wait for w: else XLA may lay out those of
                # all passes at once, each of the size of the parameters.
                return vary(mapping.after(w, zeros))

            return accumulate(of, part, opts.microbatch_size, fresh)

        def ascent_gradient(w, part):
            loss_aux, grads = gradient(w, part)
            if opts.sync_perturbation:
                grads = collectives.pmean(grads, data_axes)
            return loss_aux, grads

        parts = first = None
        if opts.split != "random":
            parts = _parts(batch, len(radii), opts.split)
            # All particles leave from the same gradient: compute it once.
            first = ascent_gradient(center, parts[0])
        else:
            batch_size(batch)

        def particle(keys):
            split_key, noise_key = keys
            mine = split_batch(batch, len(radii), split_key) if parts is None else parts
            path = climb(
                ascent_gradient,
                center,
                mine,
                radii,
                opts,
                mask=mask,
                key=noise_key,
                first=first,
            )
            # Never differentiated through: gradient() starts afresh at the particle.
            (value, _), grads = gradient(path.particle, batch)
            means = (value, path.aux, grads, path.center_loss, path.norms)
            return means, _distance(path.particle, center)

        means, distances = mapping.average(
            particle, keys, here, opts.particle_map, vary
        )
        if opts.random:
            distances = collectives.slots(distances, particle_axes)
        else:  # all particles are the same one
            distances = jnp.tile(distances, opts.num_particles)
        means, distances = collectives.pmean((means, distances), all_axes)
        value, aux, grads, center_loss, norms = means
        diagnostics = Diagnostics(
            center_loss, value, value - center_loss, norms, tree.norm(grads), distances
        )
        return RobustGradient(value, aux, grads, diagnostics)

    return compute


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


def _checked(loss_fn, has_aux):
    """`loss_fn` to (loss, aux) always, refusing what is no scalar loss."""

    def checked(params, batch, *args, **kwargs):
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

    return checked
