"""What a training method's parameters are: one weight vector, or a posterior.

A method trains a *center*. It says how the center is made of a model's parameters, how
it is differentiated, and how it predicts; everything else is the same for all. What a
gradient needs of the steps before it (a precision, a direction) is the center's memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax import baselines, bnn
from otmdr_jax.baselines.bsam import PRECISION
from otmdr_jax.baselines.ivon import HESS
from otmdr_jax.baselines.looksam import start
from otmdr_jax.core.gradient import build as build_gradient
from otmdr_jax.core.gradient import robust_gradient
from otmdr_jax.core.options import (
    Options,
    PassOptions,
    check_names,
    check_rho,
    fields_of,
)

PyTree = Any

INITS = ("model", "released")


class Center(NamedTuple):
    """The kind of a method's parameters.

    Attributes:
      init: (key, the model's parameters) -> the center.
      gradient: (center, batch, model_state, key=, step=, memory=, ...) -> (value, aux,
        grads and diagnostics, as a :class:`otmdr_jax.RobustGradient`; the new memory).
      predict: (log_probs_fn, center, key, memory) -> (S, B, C), with log_probs_fn from
        the model's parameters to (B, C) log-probabilities.
      metrics: What `gradient` gave -> further scalars for the log.
      start: The center -> its memory before the first step; None for no memory.
      arguments: (memory before a step, memory after it) -> what the optimizer is told
        beside the gradient.
      posterior: (center, memory) -> its posterior; None where there is none.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    gradient: Callable[..., Any]
    predict: Callable[..., jax.Array]
    metrics: Callable[[Any], dict[str, jax.Array]] = lambda found: {}
    start: Callable[[PyTree], PyTree] = lambda center: None
    arguments: Callable[[PyTree, PyTree], dict[str, Any]] = lambda old, new: {}
    posterior: Callable[[PyTree, PyTree], bnn.MeanField] | None = None


def weights(name: str, loss_fn: Callable, own: Any, options: dict[str, Any]) -> Center:
    """The center of one weight vector.

    Args:
      name: The method's, for errors.
      loss_fn: (params, batch, model_state) -> (loss, aux).
      own: The method's options of the robust gradient; None for the plain gradient.
      options: The user's, over them.
    """
    if own is None:
        known = set(fields_of(PassOptions)) - {"has_aux"}
        check_names(f"the method {name!r}", options, sorted(known))
        compute = build_gradient(
            loss_fn, (), Options(split="shared", has_aux=True, **options)
        )
    else:
        compute = robust_gradient(loss_fn, has_aux=True, **{**own, **options})

    def gradient(params, batch, model_state, *, key, step, memory, **scaled):
        del step
        return compute(params, batch, model_state, key=key, **scaled), memory

    return Center(
        init=lambda key, params: params,
        gradient=gradient,
        predict=_at_weights,
    )


def _at_weights(log_probs_fn, params, key, memory):
    del key, memory
    return log_probs_fn(params)[None]


def bsam(
    loss_fn: Callable,
    own: dict[str, Any],
    *,
    num_data: float,
    weight_decay: float,
    precision_init: float = PRECISION,
    order: str = "released",
    num_samples: int = bnn.NUM_SAMPLES,
    mean_only: bool = False,
    **options: Any,
) -> Center:
    """The center of bSAM: a mean that is trained, a precision that is remembered.

    Args:
      loss_fn: (params, batch, model_state) -> (loss, aux).
      own: The method's options.
      num_data: N.
      weight_decay: delta: that of :func:`otmdr_jax.baselines.bsam_rule`.
      precision_init: See :func:`otmdr_jax.baselines.bsam`, as the next.
      order: "released" or "paper".
      num_samples: Samples in a prediction.
      mean_only: Predict with the mean instead.
      **options: Of :func:`otmdr_jax.baselines.bsam_gradient`.
    """
    options = {**own, **options}
    radii: Any = check_rho(options.pop("rho"))
    if len(radii) != 1:
        raise ValueError(f"bsam has one radius, got {radii!r}.")
    compute = baselines.bsam_gradient(
        loss_fn,
        radii[0],
        num_data=num_data,
        weight_decay=weight_decay,
        has_aux=True,
        **options,
    )
    return _gaussian(
        compute,
        start=lambda params: baselines.preconditioned.full(params, precision_init),
        divisor=lambda old, new: baselines.bsam_divisor(old, new, order),
        precision=lambda memory: memory,
        num_data=num_data,
        num_samples=num_samples,
        mean_only=mean_only,
    )


def ivon(
    loss_fn: Callable,
    own: dict[str, Any],
    *,
    num_data: float,
    weight_decay: float,
    hess_init: float = HESS,
    num_samples: int = bnn.NUM_SAMPLES,
    mean_only: bool = False,
    **options: Any,
) -> Center:
    """The center of IVON: a mean that is trained, a Hessian that is remembered.

    Args:
      loss_fn: (params, batch, model_state) -> (loss, aux).
      own: The method's options.
      num_data: lambda.
      weight_decay: delta: that of :func:`otmdr_jax.baselines.ivon_rule`.
      hess_init: h_0: that of the rule.
      num_samples: Samples in a prediction.
      mean_only: Predict with the mean instead.
      **options: Of :func:`otmdr_jax.baselines.ivon_gradient`.
    """
    compute = baselines.ivon_gradient(
        loss_fn,
        num_data=num_data,
        weight_decay=weight_decay,
        has_aux=True,
        **{**own, **options},
    )

    def precision(memory):
        return baselines.ivon_precision(memory, weight_decay)

    return _gaussian(
        compute,
        start=lambda params: baselines.preconditioned.full(params, hess_init),
        divisor=lambda old, new: precision(new),
        precision=precision,
        num_data=num_data,
        num_samples=num_samples,
        mean_only=mean_only,
    )


def _gaussian(
    compute, *, start, divisor, precision, num_data, num_samples, mean_only
) -> Center:
    """A center of weights whose memory gives each a precision."""
    _check_samples(num_samples, mean_only)

    def posterior(params, memory):
        return baselines.posterior(params, precision(memory), num_data)

    def gradient(params, batch, model_state, *, key, step, memory, **scaled):
        del step
        return compute(memory, params, batch, model_state, key=key, **scaled)

    def predict(log_probs_fn, params, key, memory):
        if mean_only:
            return log_probs_fn(params)[None]
        q = posterior(params, memory)
        return bnn.predict(log_probs_fn, q, key=key, num_samples=num_samples)

    return Center(
        init=lambda key, params: params,
        gradient=gradient,
        predict=predict,
        start=start,
        arguments=lambda old, new: {"precision": divisor(old, new)},
        posterior=posterior,
    )


def posterior(
    loss_fn: Callable,
    own: Any,
    *,
    sigma: float = bnn.SIGMA,
    init: str = "model",
    kl_weight: Any = 1.0,
    num_samples: int = bnn.NUM_SAMPLES,
    mean_only: bool = False,
    **options: Any,
) -> Center:
    """The center that is a mean-field Gaussian.

    Args:
      loss_fn: (params, batch, model_state) -> (loss, aux), the loss the mean negative
        log-likelihood.
      own: The method's options of :func:`otmdr_jax.bnn.robust_gradient`; None for SGVB.
      sigma: Standard deviation to start from.
      init: "model" (means are the model's own initial weights) or "released" (means and
        scales drawn as the released code draws them; sigma is not looked at).
      kl_weight: A number, or a schedule of the step.
      num_samples: Samples in a prediction.
      mean_only: Predict with the mean of the posterior instead.
      **options: Of :func:`otmdr_jax.bnn.robust_gradient` or, for SGVB, of
        :func:`otmdr_jax.bnn.sgvb_gradient`.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}.")
    build = bnn.sgvb_gradient if own is None else bnn.robust_gradient
    number = 1.0 if callable(kl_weight) else kl_weight
    compute = build(
        loss_fn, has_aux=True, kl_weight=number, **{**(own or {}), **options}
    )
    _check_samples(num_samples, mean_only)

    def gradient(q, batch, model_state, *, key, step, memory, **scaled):
        weight = kl_weight(step) if callable(kl_weight) else None
        found = compute(q, batch, model_state, key=key, kl_weight=weight, **scaled)
        return found, memory

    return Center(
        init=(
            (lambda key, params: bnn.init(params, sigma))
            if init == "model"
            else lambda key, params: bnn.draw(params, key)
        ),
        gradient=gradient,
        predict=lambda log_probs_fn, q, key, memory: bnn.predict(
            log_probs_fn, q, key=key, num_samples=num_samples, mean_only=mean_only
        ),
        metrics=lambda found: {"likelihood_term": found.nll, "kl": found.kl},
        posterior=lambda q, memory: q,
    )


def gsam(
    loss_fn: Callable, own: dict[str, Any], *, follows: Any = None, **options: Any
) -> Center:
    """The center of GSAM: one weight vector.

    Args:
      loss_fn: (params, batch, model_state) -> (loss, aux).
      own: The method's options.
      follows: The radius as a schedule of the step; None for a constant one.
      **options: Of :func:`otmdr_jax.baselines.gsam_gradient`.
    """
    compute = baselines.gsam_gradient(loss_fn, has_aux=True, **{**own, **options})

    def gradient(params, batch, model_state, *, key, step, memory, **scaled):
        rho = None if follows is None else follows(step)
        return compute(params, batch, model_state, key=key, rho=rho, **scaled), memory

    return Center(
        init=lambda key, params: params, gradient=gradient, predict=_at_weights
    )


def looksam(loss_fn: Callable, own: dict[str, Any], **options: Any) -> Center:
    """The center of LookSAM: one weight vector, and the direction of its last climb.

    Args:
      loss_fn: (params, batch, model_state) -> (loss, aux).
      own: The method's options.
      **options: Of :func:`otmdr_jax.baselines.looksam_gradient`.
    """
    compute = baselines.looksam_gradient(loss_fn, has_aux=True, **{**own, **options})

    def gradient(params, batch, model_state, *, key, step, memory, **scaled):
        del step
        return compute(memory, params, batch, model_state, key=key, **scaled)

    return Center(
        init=lambda key, params: params,
        gradient=gradient,
        predict=_at_weights,
        start=start,
    )


# Those with a gradient of their own: a method -> its center.
OWN: dict[str, Callable[..., Center]] = {
    "bsam": bsam,
    "gsam": gsam,
    "looksam": looksam,
    "ivon": ivon,
}


def _check_samples(num_samples, mean_only):
    if not mean_only and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples!r}.")


def weights_of(center: PyTree) -> PyTree:
    """The one weight vector that stands for a center: a posterior's mean."""
    return bnn.mean(center) if isinstance(center, bnn.MeanField) else center


def decays(center: PyTree, everything: bool) -> PyTree:
    """Where weight decay acts: True for every leaf, or for kernels alone.

    Not on a posterior, which has a prior instead; on its point estimates it does.

    Args:
      center: The parameters.
      everything: Whether biases and the scales of norms decay too.
    """

    def of(leaves):
        return jax.tree.map(lambda leaf: everything or jnp.ndim(leaf) > 1, leaves)

    if not isinstance(center, bnn.MeanField):
        return of(center)
    never = functools.partial(jax.tree.map, lambda _: False)
    return bnn.MeanField(never(center.mean), never(center.raw_scale), of(center.point))
