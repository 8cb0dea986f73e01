r"""Gradients of a posterior: SGVB, and OT-MDR on its means.

Once a step kappa ~ N(0, I) is drawn and kept. With L the objective of
:mod:`otmdr_jax.bnn.kl_divergence`, for each of K particles (section 4.2.3; S = 2
there):

.. math::
    \mu^s_l = \mu^{s-1}_l + \rho_s
        \frac{\nabla_{\mu_l} L_{B_s}(\mu^{s-1} + \sigma \kappa)}
        {\|\nabla_{\mu_l} L_{B_s}(\mu^{s-1} + \sigma \kappa)\|_2} + \epsilon^s

.. math::
    g_\mu = \frac1K \sum_k \nabla_\mu L_B(\mu^S_k + \sigma \kappa), \qquad
    g_\sigma = \nabla_\sigma L_B(\mu + \sigma \kappa)

The particles are those of one model: means are weights that move, standard deviations
and point estimates are weights that do not.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from otmdr_jax.bnn import kl_divergence, local_reparam, posterior, priors
from otmdr_jax.bnn.options import (
    MeanFieldOptions,
    SgvbOptions,
)
from otmdr_jax.bnn.posterior import MeanField
from otmdr_jax.bnn.scales import scales_at_center
from otmdr_jax.core import collectives
from otmdr_jax.core.batches import NO_BATCH, batch_size
from otmdr_jax.core.checks import check_number, check_rho
from otmdr_jax.core.gradient import Diagnostics, build, checked
from otmdr_jax.core.keys import one_key
from otmdr_jax.core.options import (
    Options,
    PassOptions,
    RobustOptions,
)
from otmdr_jax.core.particle import all_particles
from otmdr_jax.core.signatures import check_words, fields_of, filled, with_options
from otmdr_jax.core.step import Particle, Step

PyTree = Any


class BayesGradient(NamedTuple):
    """What :func:`robust_gradient` and :func:`sgvb_gradient` return.

    Attributes:
      value: The objective in nats per example: at the particle for OT-MDR.
      aux: The auxiliary output of the pass at the center, or None.
      grads: The gradient, a :class:`MeanField`.
      diagnostics: See :class:`otmdr_jax.Diagnostics`.
      nll: The likelihood term, the mean of `loss_fn` in the pass at the center.
      kl: KL(Q || prior) at the center in nats, unweighted.
    """

    value: jax.Array
    aux: PyTree
    grads: MeanField
    diagnostics: Diagnostics
    nll: jax.Array
    kl: jax.Array


@with_options
def value_and_grad(
    loss_fn: Callable[..., Any], **options: Unpack[MeanFieldOptions]
) -> Callable[..., tuple[Any, MeanField]]:
    """OT-MDR for a Bayesian network: robust in the means of its posterior.

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` to the mean negative
        log-likelihood over the batch in nats, or to (loss, aux): the loss of one model.
      **options: Those of :class:`MeanFieldOptions`.

    Returns:
      `grad_fn(q, batch, *args, key, rho=None, kl_weight=None, **kwargs)`, which returns
      `(value, grads)` or, with `has_aux`, `((value, aux), grads)`. `grads` is a
      :class:`MeanField`: descend on it with any optimizer, without weight decay, which
      is what the prior is for.

    Raises:
      ValueError, TypeError: As :func:`robust_gradient`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> q = bnn.init(jnp.zeros((2, 1)))
      >>> grad_fn = jax.jit(bnn.value_and_grad(loss_fn, num_data=50_000))
      >>> value, grads = grad_fn(q, jnp.eye(2), key=jax.random.key(0))
      >>> grads.mean.shape, grads.raw_scale.shape
      ((2, 1), (2, 1))

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023, section 4.2.3.
    """
    return _plain_face(robust_gradient(loss_fn, **options), options)


@with_options
def sgvb(
    loss_fn: Callable[..., Any], **options: Unpack[SgvbOptions]
) -> Callable[..., tuple[Any, MeanField]]:
    """SGVB: the gradient of the objective at one sample of the posterior.

    Args:
      loss_fn: The loss, as for :func:`value_and_grad`.
      **options: Those of :class:`SgvbOptions`.

    Returns:
      A function like that of :func:`value_and_grad`, without `rho`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> q = bnn.init(jnp.zeros((2, 1)))
      >>> grad_fn = jax.jit(bnn.sgvb(loss_fn, num_data=50_000, estimator="local"))
      >>> value, grads = grad_fn(q, jnp.eye(2), key=jax.random.key(0))

    Reference:
      Kingma & Welling, `Auto-Encoding Variational Bayes
      <https://arxiv.org/abs/1312.6114>`_, ICLR 2014; Blundell et al., 2015.
    """
    return _plain_face(sgvb_gradient(loss_fn, **options), options)


@with_options
def robust_gradient(
    loss_fn: Callable[..., Any], **options: Unpack[MeanFieldOptions]
) -> Callable[..., BayesGradient]:
    """:func:`value_and_grad` with everything it knows.

    Cost in gradients of single examples, for two radii: 2.5 |B| (paper), K = 1, since
    the first ascent step is at the center and a pass over the rest of the batch
    completes the gradient of sigma; 2 |B| for the other choices of `sigma_gradient`.
    Each further particle takes 2 |B|.

    Args:
      loss_fn: See :func:`value_and_grad`.
      **options: Those of :class:`MeanFieldOptions`.

    Returns:
      `fn(q, batch, *args, key, rho=None, kl_weight=None, **kwargs)`, which returns a
      :class:`BayesGradient`. Point estimates are not perturbed; their gradient is that
      of the last pass.

    Raises:
      ValueError, TypeError: No `num_data`, an option that cannot work; at the call a
        posterior that is none, no key, and what :func:`otmdr_jax.value_and_grad`
        raises.
    """
    given = filled(MeanFieldOptions, options)
    check_words(MeanFieldOptions, given)
    norm, sigma_gradient = given["norm"], given["sigma_gradient"]
    if norm == "per_leaf" and (given["project"] or given["sampler"] == "langevin"):
        raise ValueError(
            'project=True and sampler="langevin" need one ball of all means, and the '
            'norm of a posterior is "per_leaf" by default: pass norm="global".'
        )

    def climb(step):
        if norm == "joint":
            moving = opts.mask(step.center)
            step = step._replace(norm_mask=moving._replace(raw_scale=moving.mean))
        if sigma_gradient == "particle":
            return all_particles(step)
        return scales_at_center(step, whole=sigma_gradient == "center")

    opts = options_of_means(given, norm="global" if norm == "joint" else norm)
    if given["weight_noise"] == "each_step" and opts.sampler != "ascent":
        raise ValueError(
            'weight_noise="each_step" is for steps of ascent, '
            f"sampler={opts.sampler!r} takes none: leave it out."
        )
    if norm == "joint" and opts.sampler != "ascent":
        raise ValueError(
            f'norm="joint" counts scales in the length of a step, and '
            f"sampler={opts.sampler!r} draws in a ball of the means: use "
            'norm="per_leaf" or "global".'
        )
    return of_means(loss_fn, given, opts, climb)


def options_of_means(given: dict[str, Any], **others: Any) -> Options:
    """The options of a gradient whose weights are a posterior and move in its means."""
    shared = {name: given[name] for name in fields_of(RobustOptions) if name in given}
    mask = _mask_function(given["mask"])
    shared["mask"] = lambda q: posterior.map_means(mask, q)
    return Options(**{**shared, "has_aux": True, **others})


def of_means(
    loss_fn: Callable[..., Any],
    given: dict[str, Any],
    options: Options,
    climb: Callable[[Step], Particle],
) -> Callable[..., BayesGradient]:
    """What :func:`robust_gradient` returns, of particles that climb in any way.

    Args:
      loss_fn: See :func:`value_and_grad`.
      given: All options of the function.
      options: Those of the gradient, checked.
      climb: What becomes of a step, whose passes know the noise of the weights.
    """
    objective = _objective(loss_fn, given)
    radii = check_rho(given["rho"])
    default = _check_weight(given["kl_weight"])

    def fn(q, batch=NO_BATCH, *args, key=None, rho=None, kl_weight=None, **kwargs):
        noise_key, key, later_key = _keys(q, key)
        steps = len(radii if rho is None else check_rho(rho))
        kappas = [posterior.noise(q, noise_key)] * steps
        if given.get("weight_noise") == "each_step":
            for s in range(1, steps):
                kappas[s] = posterior.noise(q, jax.random.fold_in(later_key, s))
        _check_size(batch, given["num_data"])
        weight = default if kl_weight is None else _check_weight(kl_weight)

        def particles(step):
            own = lambda taken: {"kappa": kappas[min(taken, steps - 1)]}  # noqa: E731
            return climb(step._replace(own=own))

        compute = build(objective, radii, options, particles)
        return _unpacked(
            compute(q, batch, args, kwargs, key=key, rho=rho, weight=weight)
        )

    return fn


@with_options
def sgvb_gradient(
    loss_fn: Callable[..., Any], **options: Unpack[SgvbOptions]
) -> Callable[..., BayesGradient]:
    """:func:`sgvb` with everything it knows; |B| gradients of single examples.

    Args:
      loss_fn: See :func:`value_and_grad`.
      **options: Those of :class:`SgvbOptions`.

    Returns:
      `fn(q, batch, *args, key, kl_weight=None, **kwargs)`, which returns a
      :class:`BayesGradient`.
    """
    given = filled(SgvbOptions, options)
    check_words(SgvbOptions, given)
    shared = {name: given[name] for name in fields_of(PassOptions)}
    opts = Options(**{**shared, "split": "shared", "has_aux": True})
    compute = build(_objective(loss_fn, given), (), opts)
    default = _check_weight(given["kl_weight"])
    axes = collectives.axes_of(opts.axis_name)

    def fn(q, batch=NO_BATCH, *args, key=None, kl_weight=None, **kwargs):
        noise_key, local_key, _ = _keys(q, key)
        _check_size(batch, given["num_data"])
        weight = default if kl_weight is None else _check_weight(kl_weight)
        own: dict[str, Any] = {"weight": weight}
        if given["estimator"] == "weights":
            own["kappa"] = posterior.noise(q, noise_key)
        else:
            if axes:
                collectives.check_bound(axes)
                here = jax.lax.axis_index(axes)
                local_key = jax.random.fold_in(local_key, here)
            own["local_key"] = local_key
            # Micro-batches know by it which examples they hold.
            batch = batch, jnp.arange(batch_size(batch))
        return _unpacked(compute(q, batch, args, kwargs, **own))

    return fn


def _objective(loss_fn, given):
    """The objective per example, as a loss of a posterior."""
    num_data, prior, prior_std = (
        given[name] for name in ("num_data", "prior", "prior_std")
    )
    estimator = given.get("estimator", "weights")
    number = isinstance(num_data, numbers.Real) and not isinstance(num_data, bool)
    if not number or not 1 <= num_data < math.inf:
        raise ValueError(
            "num_data must be the number of examples in the training set, at least 1, "
            f"which the KL divergence is divided by; got {num_data!r}."
        )
    num_data = float(num_data)  # an integer of JAX would end at 2^31
    if prior is not None and prior_std is not None:
        raise ValueError("give prior or prior_std, not both.")
    if prior is None:
        prior = priors.Normal(priors.PRIOR_STD if prior_std is None else prior_std)
    priors.check_prior(prior)
    of_model = checked(loss_fn, given["has_aux"])

    def with_divergence(q, loss, aux, kappa, weight):
        kl = kl_divergence.at_sample(q, prior, kappa)
        return loss + weight / num_data * kl, (aux, loss, kl)

    def of_weights(q, *given, kappa, weight):
        *batch, args, kwargs = given
        params = posterior.at(q, kappa)
        loss, aux = of_model(params, *(batch or [NO_BATCH]), *args, **kwargs)
        return with_divergence(q, loss, aux, kappa, weight)

    def of_outputs(q, batch, args, kwargs, *, local_key, weight):
        batch, positions = batch
        key = jax.random.fold_in(local_key, positions[0])
        kappa_key, key = jax.random.split(key)
        loss, aux = local_reparam.call(
            of_model, q, estimator, key, batch, *args, **kwargs
        )
        return with_divergence(q, loss, aux, posterior.noise(q, kappa_key), weight)

    return of_weights if estimator == "weights" else of_outputs


def _unpacked(found):
    aux, nll, kl = found.aux
    return BayesGradient(found.value, aux, found.grads, found.diagnostics, nll, kl)


def _plain_face(compute, options):
    """(value, grads), as `jax.value_and_grad` gives them."""

    def grad_fn(q, *args, **kwargs):
        found = compute(q, *args, **kwargs)
        has_aux = options.get("has_aux", False)
        return ((found.value, found.aux) if has_aux else found.value), found.grads

    return grad_fn


def _keys(q, key):
    posterior.check(q)
    if key is None:
        raise ValueError(
            "the weight noise kappa is random: pass key=jax.random.key(...) by name, a "
            "fresh one each step."
        )
    return jax.random.split(one_key(key), 3)


def _mask_function(mask):
    if mask is None:
        return lambda params: jax.tree.map(lambda _: True, params)
    return mask if callable(mask) else lambda params: mask


def _check_weight(weight):
    if callable(weight):
        raise TypeError(
            "kl_weight must be a number: call a schedule with the step and pass its "
            "value, grad_fn(..., kl_weight=schedule(step))."
        )
    check_number("kl_weight", weight)
    return weight


def _check_size(batch, num_data):
    firsts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    (size,) = firsts.pop() if len(firsts) == 1 and firsts != {()} else (None,)
    if isinstance(size, int) and size > num_data:  # not one of jax.export
        raise ValueError(
            f"num_data={num_data} is less than a batch of {size}: it is the number of "
            "examples in the training set, not of batches."
        )
