r"""The robust gradient: a drop-in for `jax.value_and_grad`.

For each of K particles (Nguyen et al., 2023, Eqs. 9-10; S = 2 radii in the paper):

    w_0 = theta
    g_s = grad L_{B_s}(w_{s-1}),   w_s = w_{s-1} + rho_s g_s / ||g_s||_2 + e_s
    result = 1/K sum_k grad L_B(w_S)

With one radius, the whole batch and no noise this is SAM (Theorem 4.3).
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, loops, rows, shards, tree, weights
from otmdr_jax.core.ascent import resolve_mask
from otmdr_jax.core.batches import (
    NO_BATCH,
    NoBatch,
    check_examples,
    subbatches,
)
from otmdr_jax.core.checks import check_rho
from otmdr_jax.core.keys import one_key
from otmdr_jax.core.options import Options, RobustOptions
from otmdr_jax.core.particle import all_particles
from otmdr_jax.core.signatures import with_options
from otmdr_jax.core.step import Particle, Step, metric_of

PyTree = Any

# The paper's radii for CIFAR-10: rho_1 = 0.05 and rho_2 = 2 rho_1 (section 5.1).
PAPER_RHO = (0.05, 0.1)


class Diagnostics(NamedTuple):
    """What a robust gradient saw on its way; computed by no further pass.

    Attributes:
      center_loss: Mean over particles of the loss at the center, on the first part of
        the batch: with `split="shared"` on all of it.
      robust_loss: Mean over particles of the loss of all of the batch at the particle.
      gap: `robust_loss - center_loss`, a running estimate of sharpness; 0 where the
        first part has no weight.
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
      aux: The auxiliary output as :func:`value_and_grad` explains it, or None.
      grads: The gradient, of the structure and dtypes of the parameters as arrays.
      diagnostics: See :class:`Diagnostics`.
    """

    value: jax.Array
    aux: PyTree
    grads: PyTree
    diagnostics: Diagnostics


@with_options
def value_and_grad(
    loss_fn: Callable[..., Any], rho: Any = PAPER_RHO, **options: Unpack[RobustOptions]
) -> Callable[..., tuple[Any, PyTree]]:
    r"""The OT-MDR counterpart of `jax.value_and_grad`.

    .. math::
        w_k^s = w_k^{s-1} + \rho_s \frac{\nabla L_{B_k^s}(w_k^{s-1})}
            {\|\nabla L_{B_k^s}(w_k^{s-1})\|_2} + \epsilon_k^s,
        \qquad w_k^0 = \theta, \qquad
        g = \frac1K \sum_{k=1}^K \nabla L_B(w_k^S)

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` to the mean loss over the
        batch, a scalar, or to (loss, aux). It sees plain pytrees. All that belongs to
        the examples is in `batch`, which is cut into parts. With `split="shared"`, and
        without sub-batches and micro-batches, nothing is cut: the batch may be of any
        form, or left out, `loss_fn(params)`.
      rho: One radius :math:`\rho_s` for each ascent step, in the units of the weights:
        numbers or traced scalars. The paper's (0.05, 0.1) for CIFAR-10 by default.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      `grad_fn(params, batch, *args, key=None, rho=None, **kwargs)`, which returns
      `(value, grads)` or, with `has_aux`, `((value, aux), grads)`. `value` is the mean
      over particles of the loss of all of B at the particle; `aux` comes from the
      pass at the center, its floating leaves averaged over particles (BatchNorm
      statistics, say), others from the first particle. Leaves whose shape follows the
      batch (logits, losses of the examples) come from the pass of `value`, at the
      particle, with a row for each example of B in its order; with `split="shared"`
      from the center too. `key`, typed or raw, may be left out where nothing is random;
      `rho` overrides the radii for one call. Both belong to `grad_fn`: a loss that
      needs a key or a rho of its own takes it by position.

    Raises:
      ValueError, TypeError: An option that cannot work, here; at the call a batch
        that cannot be split, a missing key, a mask of another structure, a parameter
        that cannot be differentiated, a loss that is no scalar.

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
    compute = build(loss_fn, check_rho(rho), Options(**options, watched=False))
    has_aux = options.get("has_aux", False)

    def grad_fn(params, batch=NO_BATCH, *args, key=None, rho=None, **kwargs):
        value, aux, grads, _ = compute(params, batch, *args, key=key, rho=rho, **kwargs)
        return ((value, aux) if has_aux else value), grads

    return grad_fn


@with_options
def robust_gradient(
    loss_fn: Callable[..., Any], rho: Any = PAPER_RHO, **options: Unpack[RobustOptions]
) -> Callable[..., RobustGradient]:
    """:func:`value_and_grad` with everything it knows, diagnostics included.

    Under `jax.jit` diagnostics that are not used cost next to nothing: the distances
    alone are computed, for they decide when the last pass begins.

    Args:
      loss_fn: See :func:`value_and_grad`.
      rho: See :func:`value_and_grad`.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

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
    return build(loss_fn, check_rho(rho), Options(**options))


def build(
    loss_fn: Callable[..., Any],
    rho: tuple[jax.typing.ArrayLike, ...],
    options: Options,
    particles: Callable[[Step], Particle] = all_particles,
) -> Callable[..., RobustGradient]:
    """The function that :func:`robust_gradient` returns, of whatever particles.

    Args:
      loss_fn: See :func:`value_and_grad`.
      rho: Checked radii; none for the plain gradient, at the center.
      options: Checked options.
      particles: What becomes of a step: the mean over its particles on this device. The
        one hook for methods that climb in another way, see
        :mod:`otmdr_jax.core.particle`.
    """
    loss = checked(loss_fn, options.has_aux)
    default_rho = suited(rho, options)
    axes = collectives.axes_of(options.axis_name)
    of_batch = _over_subbatches if options.num_subbatches > 1 else _of_batch

    def compute(params, batch=NO_BATCH, *args, key=None, rho=None, **kwargs):
        collectives.check_bound(axes)
        check_examples(batch)
        own = rows.only_in_batch(loss, batch) if options.cuts else loss
        if options.weights is not None:
            batch = weights.attach(options.weights, batch, axes)
        radii = default_rho if rho is None else suited(check_rho(rho), options)
        params = tree.arrays(params)
        call = (own, params, batch, args, kwargs, key, radii)
        with shards.on_their_mesh(params):  # for zeros that a scan starts from
            found = of_batch(*call, options, particles)
        if options.weights is not None:
            info, value = found.diagnostics, found.value
            center, aux, value = weights.settled(info.center_loss, found.aux, value)
            info = info._replace(
                robust_loss=value, center_loss=center, gap=value - center
            )
            found = found._replace(value=value, aux=aux, diagnostics=info)
        return found._replace(aux=rows.unmarked(found.aux))

    return compute


def _of_batch(
    loss, params, batch, args, kwargs, key, radii, options, particles, joined=False
):
    """The gradient whose particles move on all of the batch, its aux marked."""
    particle_axes = collectives.axes_of(options.particle_axis_name)
    all_axes = collectives.axes_of(options.axis_name) + particle_axes
    found = particles(
        step_of(loss, params, batch, args, kwargs, key, radii, options, joined)
    )
    if options.random:
        distances = collectives.slots(found.distance, particle_axes)
    else:  # all particles are the same one
        distances = jnp.tile(found.distance, options.num_particles)
    found = found._replace(distance=distances)
    mean, of_examples = rows.split(found)
    mean = collectives.pmean(mean, all_axes)
    of_examples = collectives.pmean(of_examples, particle_axes)
    value, aux, grads, center_loss, norms, distances = tree.merge(mean, of_examples)
    # Those of sub-batches are averaged before they are rounded.
    grads = grads if joined else tree.like(grads, params)
    diagnostics = Diagnostics(
        center_loss, value, value - center_loss, norms, tree.norm(grads), distances
    )
    return RobustGradient(value, aux, grads, diagnostics)


def step_of(loss, params, batch, args, kwargs, key, radii, options, joined=False):
    """What the particles of one call have in common; see :class:`Step`."""
    data_axes = collectives.axes_of(options.axis_name)
    particle_axes = collectives.axes_of(options.particle_axis_name)
    all_axes = data_axes + particle_axes
    key = one_key(key)
    if options.random and key is None:
        source = f"draws of sampler={options.sampler!r} need"
        if options.sampler == "ascent":
            noise = f"noise_std={options.noise_std!r}" if options.noisy else ""
            split = 'split="random"' if options.split == "random" else ""
            both = " and ".join(filter(None, (split, noise)))
            source = f"{both} need" + "s" * (" and " not in both)
        raise ValueError(
            f"{source} randomness: pass a key, as jax.random.key(0). A gradient "
            "function takes a fresh one in each call, by name, grad_fn(params, batch, "
            "key=key), since what follows the batch belongs to the loss; "
            "a transformation takes one where it is made, otmdr(loss_fn, key). Or "
            'climb with split="ordered" or "shared" and noise_std=0.'
        )
    collectives.check_bound(all_axes)
    loss = _averaged(loss)
    pieces = joined or options.microbatch_size is not None
    parted = pieces or bool(data_axes) or options.split != "shared"
    of_loss = rows.marked(loss, joined=pieces) if parted else loss
    gradient_of = jax.value_and_grad(of_loss, has_aux=True)
    if options.weights is not None:
        gradient_of = weights.scaled(gradient_of)
    keys, count = _particle_keys(key, options, data_axes, particle_axes)
    # The gradient of a replicated value is summed over devices behind our back
    # (shard_map with check_vma); of a value marked as varying it is not.
    center = collectives.vary(params, all_axes)
    return Step(
        center=center,
        batch=batch,
        radii=radii,
        options=options,
        mask=_mask_of(options, params),
        metric=metric_of(options),
        key=key,
        keys=keys,
        num_particles=count,
        loss_and_gradient=lambda w, part, **own: gradient_of(
            w, part, *args, **kwargs, **own
        ),
    )


def _mask_of(options, params):
    mask = resolve_mask(options.mask, params)
    if jax.tree.leaves(mask) and not any(jax.tree.leaves(mask)):
        raise ValueError(
            "mask is False for all parameters, so that nothing is perturbed: name the "
            "leaves that may move, or take the plain gradient, rho=0 without a mask."
        )
    return mask


def suited(radii, options):
    """Radii, as many as the sampler has steps for."""
    if options.sampler != "ascent" and len(radii) != 1:
        raise ValueError(
            f"sampler={options.sampler!r} has one radius, that of its ball; got "
            f"{len(radii)}: pass rho=0.1, say."
        )
    if options.project and len(radii) < 2 and not options.noisy:
        raise ValueError(
            "project=True does nothing for one step without noise, which ends on the "
            "ball: leave it out."
        )
    return radii


def _over_subbatches(loss, params, batch, args, kwargs, key, radii, options, particles):
    """m-sharpness: the mean over parts of the batch, each with particles of its own.

    With as many parts as devices it is what devices give without a shared perturbation
    (Foret et al., 2021, section 4.1). On the devices of `axis_name` each cuts its own
    part of the batch, so that the parts are those of one device.
    """
    axes = collectives.axes_of(options.axis_name)
    how = "sequential" if options.particle_map == "auto" else options.particle_map
    alone: Any = {"axis_name": None, "sync_perturbation": True, "num_subbatches": 1}
    alone = dataclasses.replace(options, **alone)
    key = one_key(key)
    parts, keys, here = subbatches(batch, key, options.num_subbatches, axes)
    # Not averaged part by part: see `step_of` on what shard_map does otherwise.
    params = collectives.vary(params, axes)

    def of_part(own):
        part, key = own
        call = (loss, params, part, args, kwargs, key, radii, alone, particles)
        return rows.split(_of_batch(*call, joined=True))

    mean, of_examples = loops.average(of_part, (parts, keys), here, how)
    mean = collectives.pmean(mean, axes)
    grads = tree.like(mean.grads, params)
    info = mean.diagnostics._replace(grad_norm=tree.norm(grads))
    found = mean._replace(grads=grads, diagnostics=info)
    return tree.merge(found, jax.tree.map(shards.flat, of_examples))


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


def call(loss_fn: Callable[..., Any], params: PyTree, batch: PyTree, *args, **kwargs):
    """`loss_fn(params, batch, ...)`, or without `batch` where there is none."""
    if not isinstance(batch, NoBatch):
        return loss_fn(params, batch, *args, **kwargs)
    try:
        inspect.signature(loss_fn).bind(params, *args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"loss_fn was called without a batch, and {error}: pass one, as "
            "grad_fn(params, batch) or tx.update(updates, state, params, batch=batch). "
            "Flax's TrainState.apply_gradients hands no batch on: give it the "
            "gradients of grad_fn, or write tx.update and state.replace out."
        ) from error
    except ValueError:  # a function that has no signature
        pass
    return loss_fn(params, *args, **kwargs)


def _named(out):
    """What a loss returned: the names of JAX's tracers say nothing to users."""
    if isinstance(out, jax.Array):
        return f"an array of shape {out.shape}"
    if isinstance(out, (tuple, list)):
        return f"a {type(out).__name__} of {len(out)}"
    return f"a {type(out).__name__}"


def _averaged(loss):
    """A loss that is refused where its gradient would be a sum over devices.

    JAX sums it of its own accord if devices have the same parameters and each has
    another loss.
    """

    def of(params, *args, **kwargs):
        value, aux = loss(params, *args, **kwargs)
        leaves = jax.tree.leaves(params)
        own = collectives.varying(value).difference(*map(collectives.varying, leaves))
        if own:
            names = ", ".join(map(repr, sorted(own)))
            raise ValueError(
                f"each device has a loss of its own along the mesh axis {names}, and "
                "the same parameters: JAX would sum the gradients of all devices. Name "
                "the axis for their mean, as value_and_grad(loss_fn, axis_name="
                f"{min(own)!r}), or return one loss of all devices: jax.lax.pmean of "
                "means, or jax.lax.psum of what each adds to it."
            )
        return value, aux

    return of


def checked(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """`loss_fn` to (loss, aux) always, refusing what is no scalar loss."""
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function of (params, batch), got a "
            f"{type(loss_fn).__name__}. An optimizer follows the robust gradient: "
            "optax.chain(otmdr_jax.sam(loss_fn), optax.sgd(0.1))."
        )

    def of(params, batch, *args, **kwargs):
        out = call(loss_fn, params, batch, *args, **kwargs)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                "with has_aux=True loss_fn must return (loss, aux), got "
                f"{_named(out)}: return both, or leave has_aux out."
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
