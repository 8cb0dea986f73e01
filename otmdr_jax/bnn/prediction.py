r"""Prediction with a posterior: the mean over S samples of its models.

.. math:: p(y \mid x) \approx \frac1S \sum_s p(y \mid x, \theta_s), \qquad
    \theta_s \sim Q
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.bnn import posterior
from otmdr_jax.bnn.posterior import MeanField
from otmdr_jax.core import loops, tree
from otmdr_jax.core.checks import check_count, check_word
from otmdr_jax.core.options import MEMBER_MAPS
from otmdr_jax.ensemble import log_mean_probs

PyTree = Any

# The number in the code released with Nguyen et al., 2023.
NUM_SAMPLES = 30


class Uncertainty(NamedTuple):
    """How uncertain a prediction is, and why, in nats.

    Attributes:
      total: Entropy of the mean probability.
      aleatoric: Mean entropy of the samples, which more data would not remove.
      epistemic: The difference, the mutual information between label and weights.
    """

    total: jax.Array
    aleatoric: jax.Array
    epistemic: jax.Array


def predict(
    function: Callable[..., PyTree],
    q: MeanField,
    *args: Any,
    key: jax.Array | None = None,
    num_samples: int = NUM_SAMPLES,
    mean_only: bool = False,
    sample_map: str = "scan",
) -> PyTree:
    """Evaluates a model at S samples of its posterior.

    Args:
      function: The function of one model, `function(params, *args)` to logits,
        log-probabilities or any other pytree of arrays.
      q: The posterior.
      *args: Inputs, the same for all samples.
      key: A PRNG key. The same key gives the same S models; use one key for a whole
        set.
      num_samples: S, the number of samples; 30 by default (released code).
      mean_only: True to evaluate the model at the mean of the posterior instead. S is
        then 1.
      sample_map: The way samples are mapped: "scan" (one after the other, with the
        memory of one), "vmap" (all at once; fast on accelerators if S times the
        activations fit), "unroll" (like scan, but with S copies of the program; for
        convolutions of `jax.lax` on CPUs, which are slow in loops) or "auto" (unroll
        where such convolutions are, else scan).

    Returns:
      The results of `function`, with a leading axis of S.

    Raises:
      ValueError: There is less than one sample, or no key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> q = bnn.init(jnp.zeros((3, 2)), sigma=1.0)
      >>> def log_probs(w, x):
      ...     return jax.nn.log_softmax(x @ w)
      >>> samples = bnn.predict(log_probs, q, jnp.ones((5, 3)), key=jax.random.key(0))
      >>> samples.shape, bnn.log_mean_probs(samples).shape
      ((30, 5, 2), (5, 2))
    """
    posterior.check(q)
    check_word("sample_map", sample_map, MEMBER_MAPS)
    if mean_only:
        found = function(posterior.mean(q), *args)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], found)
    check_count("num_samples", num_samples)
    if key is None:
        raise ValueError(
            "samples of the posterior are random: pass key=jax.random.key(...), or "
            "mean_only=True."
        )

    def of_sample(wait, key):
        return function(posterior.sample(q, wait(key)), *args)

    keys = jax.random.split(key, int(num_samples))
    return loops.each(of_sample, [keys], sample_map, may_be_spread=False)


def uncertainty(log_probs: jax.Array) -> Uncertainty:
    """Splits the uncertainty of a prediction into its two kinds.

    Args:
      log_probs: (S, ..., C) log-probabilities of S samples; not logits. What rounding
        has added to their sum is taken away.

    Returns:
      An :class:`Uncertainty` of arrays (...), float32 or wider. The epistemic part is
      never negative, at most log S, and exactly 0 where all samples are equal. NaN
      stays NaN.

    Raises:
      ValueError: There is no axis of samples, or the values are not log-probabilities
        (checked only outside of `jax.jit`).

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> certain = jnp.log(jnp.array([[1.0, 0.0], [0.0, 1.0]]))  # but they disagree
      >>> [round(float(x), 4) for x in bnn.uncertainty(certain)]
      [0.6931, 0.0, 0.6931]

    Reference: Depeweg et al., `Decomposition of Uncertainty in Bayesian Deep Learning
    <https://arxiv.org/abs/1710.07283>`_, ICML 2018.
    """
    log_probs = jnp.asarray(log_probs)
    if log_probs.ndim < 2:
        raise ValueError(
            "log_probs must be of shape (samples, ..., classes), got "
            f"{jnp.shape(log_probs)}."
        )
    rounding = float(jnp.finfo(log_probs.dtype).eps)
    log_probs = log_probs.astype(tree.accumulation_dtype(log_probs))
    sums = jax.nn.logsumexp(log_probs, axis=-1)
    if not isinstance(sums, jax.core.Tracer):
        worst = float(jnp.max(jnp.abs(sums)))  # NaN is not refused: it shows
        largest = jnp.max(jnp.where(jnp.isfinite(log_probs), jnp.abs(log_probs), 0))
        if worst > max(1e-2, rounding * (1 + float(largest))):
            raise ValueError(
                "log_probs must be logarithms of probabilities that sum to 1 over the "
                f"last axis; one sums to exp({worst:.3g}) or exp(-{worst:.3g}). Apply "
                "jax.nn.log_softmax to logits."
            )
    # Rounded to 16 bits they sum to 1 within a percent: entropies would be as wrong.
    log_probs = log_probs - sums[..., None]
    equal = jnp.all(log_probs == log_probs[:1], axis=0)
    mean = jnp.where(equal, log_probs[0], log_mean_probs(log_probs))
    total, aleatoric = _mean_of(mean, -mean), _mean_of(log_probs, -log_probs)
    epistemic = _mean_of(log_probs, log_probs - mean[None])
    return Uncertainty(
        total, jnp.mean(aleatoric, axis=0), jnp.maximum(jnp.mean(epistemic, axis=0), 0)
    )


def _mean_of(log_probs, values):
    """The sum of p values, 0 where p is 0; of NaN it is NaN."""
    p = jnp.exp(log_probs)
    return jnp.sum(jnp.where(p == 0, 0.0, p * values), axis=-1)
