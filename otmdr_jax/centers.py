"""What a training method's parameters are: one weight vector, or a posterior.

A method trains a *center*. It says how the center is made of a model's parameters, how
it is differentiated, and how it predicts; everything else is the same for all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax import bnn, engine
from otmdr_jax.gradients import robust_gradient
from otmdr_jax.options import Options

PyTree = Any

# What the plain gradient has of the robust gradient's options.
PLAIN_OPTIONS = ("microbatch_size", "axis_name", "particle_axis_name")
INITS = ("model", "released")


class Center(NamedTuple):
    """The kind of a method's parameters.

    Attributes:
      init: (key, the model's parameters) -> the center.
      gradient: (center, batch, model_state, key=, step=, ...) -> value, aux, grads and
        diagnostics, as a :class:`otmdr_jax.RobustGradient`.
      predict: (log_probs_fn, center, key) -> (S, B, C), with log_probs_fn from the
        model's parameters to (B, C) log-probabilities.
      metrics: What `gradient` gave -> further scalars for the log.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    gradient: Callable[..., Any]
    predict: Callable[[Callable[[PyTree], jax.Array], PyTree, jax.Array], jax.Array]
    metrics: Callable[[Any], dict[str, jax.Array]]


def weights(name: str, loss_fn: Callable, own: Any, options: dict[str, Any]) -> Center:
    """The center of one weight vector.

    Args:
      name: The method's, for errors.
      loss_fn: (params, batch, model_state) -> (loss, aux).
      own: The method's options of the robust gradient; None for the plain gradient.
      options: The user's, over them.
    """
    if own is None:
        if foreign := sorted(set(options) - set(PLAIN_OPTIONS)):
            raise TypeError(
                f"{name} has no option {', '.join(foreign)}; it has "
                f"{', '.join(PLAIN_OPTIONS)}."
            )
        compute = engine.build(
            loss_fn, (), Options(split="shared", has_aux=True, **options)
        )
    else:
        compute = robust_gradient(loss_fn, has_aux=True, **{**own, **options})

    def gradient(params, batch, model_state, *, key, step, **scaled):
        del step
        return compute(params, batch, model_state, key=key, **scaled)

    return Center(
        init=lambda key, params: params,
        gradient=gradient,
        predict=lambda log_probs_fn, params, key: log_probs_fn(params)[None],
        metrics=lambda found: {},
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
    if not mean_only and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples!r}.")

    def gradient(q, batch, model_state, *, key, step, **scaled):
        weight = kl_weight(step) if callable(kl_weight) else None
        return compute(q, batch, model_state, key=key, kl_weight=weight, **scaled)

    return Center(
        init=(
            (lambda key, params: bnn.init(params, sigma))
            if init == "model"
            else lambda key, params: bnn.draw(params, key)
        ),
        gradient=gradient,
        predict=lambda log_probs_fn, q, key: bnn.predict(
            log_probs_fn, q, key=key, num_samples=num_samples, mean_only=mean_only
        ),
        metrics=lambda found: {"likelihood_term": found.nll, "kl": found.kl},
    )


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
