r"""Gradients of a posterior: SGVB, and OT-MDR on its means.

Once a step kappa ~ N(0, I) is drawn and kept. With L the objective of
:mod:`otmdr_jax.bnn.divergence`, for each of K particles (section 4.2.3; S = 2 there):

.. math::
    \mu^s_l = \mu^{s-1}_l + \rho_s
        \frac{\nabla_{\mu_l} L_{B_s}(\mu^{s-1} + \sigma \kappa)}
        {\|\nabla_{\mu_l} L_{B_s}(\mu^{s-1} + \sigma \kappa)\|_2} + \epsilon^s

.. math::
    g_\mu = \frac1K \sum_k \nabla_\mu L_B(\mu^S_k + \sigma \kappa), \qquad
    g_\sigma = \nabla_\sigma L_B(\mu + \sigma \kappa)

The engine is that of one model: means are weights that move, standard deviations and
point estimates are weights that do not.
"""

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax import collectives, engine
from otmdr_jax.bnn import divergence, local, posterior, priors
from otmdr_jax.bnn.posterior import MeanField
from otmdr_jax.engine import Diagnostics, Roles
from otmdr_jax.options import (
    Options,
    check_names,
    check_number,
    check_rho,
    check_word,
)

PyTree = Any

# Nguyen et al., 2023, appendix B.3, for all experiments with Bayesian networks.
PAPER_RHO = (0.005, 0.01)

NORMS = ("per_leaf", "global", "joint")
SIGMA_GRADIENTS = ("center", "center_first", "particle")
WEIGHT_NOISES = ("once", "each_step")


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


def value_and_grad(
    loss_fn: Callable[..., Any], **options: Any
) -> Callable[..., tuple[Any, MeanField]]:
    """OT-MDR for a Bayesian network: robust in the means of its posterior.

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` to the mean negative
        log-likelihood over the batch in nats, or to (loss, aux): the loss of one model.
      **options: Those of :func:`robust_gradient`, `num_data` among them.

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


def sgvb(
    loss_fn: Callable[..., Any], **options: Any
) -> Callable[..., tuple[Any, MeanField]]:
    """SGVB: the gradient of the objective at one sample of the posterior.

    Args:
      loss_fn: As for :func:`value_and_grad`.
      **options: Those of :func:`sgvb_gradient`, `num_data` among them.

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
    check_names(options, _own_options(sgvb_gradient))
    return _plain_face(sgvb_gradient(loss_fn, **options), options)


def robust_gradient(
    loss_fn: Callable[..., Any],
    *,
    num_data: int | None = None,
    prior_std: float | None = None,
    prior: Any = None,
    kl_weight: jax.typing.ArrayLike = 1.0,
    rho: Any = PAPER_RHO,
    norm: str = "per_leaf",
    sigma_gradient: str = "center",
    weight_noise: str = "once",
    mask: Any = None,
    **options: Any,
) -> Callable[..., BayesGradient]:
    """:func:`value_and_grad` with everything it knows.

    Cost in gradients of single examples, for two radii: 2.5 |B| (paper), K = 1, since
    the first ascent step is at the center and a pass over the rest of the batch
    completes the gradient of sigma; 2 |B| for the other choices of `sigma_gradient`.
    Each further particle takes 2 |B|.

    Args:
      loss_fn: See :func:`value_and_grad`.
      num_data: N, examples in the training set; required.
      prior_std: Standard deviation of a normal prior, 0.1 by default (released code).
      prior: Another prior in its place: see :mod:`otmdr_jax.bnn.priors`.
      kl_weight: What KL / N is multiplied by: 1 is the ELBO. A number or a traced
        scalar; schedules are called outside and handed to `grad_fn`.
      rho: Radii, one for each ascent step, (0.005, 0.01) by default (appendix B.3).
      norm: "per_leaf" (the paper: each layer's means have a norm), "global" (one over
        all means) or "joint" (one over the gradients of means and raw scales; the
        released code).
      sigma_gradient: "center" (the paper: at mu + sigma kappa, on all of the batch),
        "center_first" (there, but on the first part of the batch alone, which saves a
        pass), or "particle" (in the last pass; the released code).
      weight_noise: kappa drawn "once" a step (the paper), or at "each_step" of ascent,
        the last one kept for the last pass (the released code). The same on all devices
        in any case.
      mask: Which means may be perturbed: a pytree of bools of the model's structure, or
        a function of its parameters to one.
      **options: Others of :func:`otmdr_jax.value_and_grad`: num_particles, noise_std
        (of the means), split, adaptive, merge, has_aux, axis_name, ...

    Returns:
      `fn(q, batch, *args, key, rho=None, kl_weight=None, **kwargs)`, which returns a
      :class:`BayesGradient`. Point estimates are not perturbed; their gradient is that
      of the last pass.

    Raises:
      ValueError, TypeError: No `num_data`, an option that cannot work; at the call a
        posterior that is none, no key, and what :func:`otmdr_jax.value_and_grad`
        raises.
    """
    check_word("norm", norm, NORMS)
    check_word("sigma_gradient", sigma_gradient, SIGMA_GRADIENTS)
    check_word("weight_noise", weight_noise, WEIGHT_NOISES)
    _check_options(options)
    opts = Options(
        norm="global" if norm == "joint" else norm,
        mask=lambda q: posterior.map_means(_mask_function(mask), q),
        **{**options, "has_aux": True},
    )
    roles = Roles(
        counts=_marks(mean=True) if norm == "joint" else None,
        at_center=None if sigma_gradient == "particle" else _marks(mean=False),
        center_batch="first" if sigma_gradient == "center_first" else "all",
    )
    objective = _objective(loss_fn, num_data, prior_std, prior, options)
    radii = check_rho(rho)
    compute = engine.build(objective, radii, opts, roles)
    _check_weight(kl_weight)
    default = kl_weight

    def fn(q, batch, *args, key=None, rho=None, kl_weight=None, **kwargs):
        noise_key, key, later_key = _keys(q, key)
        steps = len(radii if rho is None else check_rho(rho))
        kappas = [posterior.noise(q, noise_key)] * steps
        if weight_noise == "each_step":
            for s in range(1, steps):
                kappas[s] = posterior.noise(q, jax.random.fold_in(later_key, s))
        _check_size(batch, num_data)
        weight = default if kl_weight is None else _check_weight(kl_weight)

        def by_pass(taken):
            kappa = kappas[min(taken, steps - 1)]
            return {"kappa": kappa, "weight": weight}

        found = compute(q, batch, args, kwargs, key=key, rho=rho, by_pass=by_pass)
        return _unpacked(found)

    return fn


def sgvb_gradient(
    loss_fn: Callable[..., Any],
    *,
    num_data: int | None = None,
    prior_std: float | None = None,
    prior: Any = None,
    kl_weight: jax.typing.ArrayLike = 1.0,
    estimator: str = "weights",
    has_aux: bool = False,
    axis_name: Any = None,
    particle_axis_name: Any = None,
    microbatch_size: int | None = None,
) -> Callable[..., BayesGradient]:
    """:func:`sgvb` with everything it knows; |B| gradients of single examples.

    Args:
      loss_fn: See :func:`value_and_grad`.
      num_data: See :func:`robust_gradient`, as for the next three.
      prior_std: Standard deviation of a normal prior.
      prior: Another prior.
      kl_weight: What KL / N is multiplied by.
      estimator: "weights" (one sample of the weights for the batch), "local" or
        "flipout" (noise of its own for each example: gradients of lower variance, two
        products for one; see :mod:`otmdr_jax.bnn.local`).
      has_aux: See :func:`otmdr_jax.value_and_grad`, as for all that follow.
      axis_name: Device axis of the data.
      particle_axis_name: Device axis that does the same everywhere.
      microbatch_size: Examples at a time.

    Returns:
      `fn(q, batch, *args, key, kl_weight=None, **kwargs)`, which returns a
      :class:`BayesGradient`.
    """
    check_word("estimator", estimator, local.ESTIMATORS)
    options = dict(
        has_aux=has_aux,
        axis_name=axis_name,
        particle_axis_name=particle_axis_name,
        microbatch_size=microbatch_size,
    )
    opts = Options(split="shared", **{**options, "has_aux": True})
    objective = _objective(loss_fn, num_data, prior_std, prior, options, estimator)
    compute = engine.build(objective, (), opts)
    _check_weight(kl_weight)
    default = kl_weight
    axes = collectives.axes_of(axis_name)

    def fn(q, batch, *args, key=None, kl_weight=None, **kwargs):
        noise_key, local_key, _ = _keys(q, key)
        _check_size(batch, num_data)
        weight = default if kl_weight is None else _check_weight(kl_weight)
        own: dict[str, Any] = {"weight": weight}
        if estimator == "weights":
            own["kappa"] = posterior.noise(q, noise_key)
        else:
            if axes:
                collectives.check_bound(axes)
                here = jax.lax.axis_index(axes)
                local_key = jax.random.fold_in(local_key, here)
            own["key"] = local_key
            # Micro-batches know by it which examples they hold.
            batch = batch, jnp.arange(engine.batch_size(batch))
        return _unpacked(compute(q, batch, args, kwargs, by_pass=lambda _: own))

    return fn


def _objective(loss_fn, num_data, prior_std, prior, options, estimator="weights"):
    """The objective per example, as a loss of a posterior."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, batch), got {loss_fn}")
    number = isinstance(num_data, numbers.Real) and not isinstance(num_data, bool)
    if not number or not 1 <= num_data < math.inf:
        raise ValueError(
            "num_data must be the number of examples in the training set, at least 1, "
            f"which the KL divergence is divided by; got {num_data!r}."
        )
    if prior is not None and prior_std is not None:
        raise ValueError("give prior or prior_std, not both.")
    if prior is None:
        prior = priors.Normal(priors.PRIOR_STD if prior_std is None else prior_std)
    priors.check_prior(prior)
    of_model = engine.checked(loss_fn, options.get("has_aux", False))

    def with_divergence(q, loss, aux, kappa, weight):
        kl = divergence.at_sample(q, prior, kappa)
        return loss + weight / num_data * kl, (aux, loss, kl)

    def of_weights(q, batch, args, kwargs, *, kappa, weight):
        params = posterior.at(q, kappa)
        loss, aux = of_model(params, batch, *args, **kwargs)
        return with_divergence(q, loss, aux, kappa, weight)

    def of_outputs(q, batch, args, kwargs, *, key, weight):
        batch, positions = batch
        key = jax.random.fold_in(key, positions[0])
        kappa_key, key = jax.random.split(key)
        loss, aux = local.call(of_model, q, estimator, key, batch, *args, **kwargs)
        return with_divergence(q, loss, aux, posterior.noise(q, kappa_key), weight)

    return of_weights if estimator == "weights" else of_outputs


def _unpacked(found):
    aux, nll, kl = found.aux
    return BayesGradient(found.value, aux, found.grads, found.diagnostics, nll, kl)


def _plain_face(compute, options):
    """(value, grads), as `jax.value_and_grad` gives them."""

    def grad_fn(q, batch, *args, **kwargs):
        found = compute(q, batch, *args, **kwargs)
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
    return jax.random.split(key, 3)


def _mask_function(mask):
    if mask is None:
        return lambda params: jax.tree.map(lambda _: True, params)
    return mask if callable(mask) else lambda params: mask


def _marks(mean):
    """A mask of raw scales, and of means or not."""

    def mask(q):
        kinds = zip(q, (mean, True, False), strict=True)
        return MeanField(*(jax.tree.map(lambda _, k=k: k, part) for part, k in kinds))

    return mask


def _check_options(options):
    known = {field.name for field in dataclasses.fields(Options)}
    known |= _own_options(robust_gradient)
    check_names(options, known)


def _own_options(function):
    return {p.name for p in inspect.signature(function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY}  # fmt: skip


def _check_weight(weight):
    if callable(weight):
        raise TypeError(
            "kl_weight must be a number: call a schedule with the step and pass its "
            "value, grad_fn(..., kl_weight=schedule(step))."
        )
    check_number("kl_weight", weight)
    return weight


def _check_size(batch, num_data):
    size = engine.batch_size(batch)
    if size > num_data:
        raise ValueError(
            f"num_data={num_data} is less than a batch of {size}: it is the number of "
            "examples in the training set, not of batches."
        )
