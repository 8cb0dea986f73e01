r"""The KL divergence from the prior, and its weight in the objective.

This package has one convention: the objective is *per example*,

.. math:: L = \frac1B \sum_{i \in B} -\log p(y_i \mid x_i, \theta)
    + \frac{w}{N} \mathrm{KL}(Q \,\|\, p)

in nats, with N examples in the training set. With w = `kl_weight` = 1, -N L is the
ELBO; a smaller weight gives a "cold" posterior. :func:`convert_beta` converts other
conventions into this one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.bnn import posterior
from otmdr_jax.bnn.posterior import MeanField
from otmdr_jax.bnn.priors import Normal, check_prior
from otmdr_jax.core.checks import check_count

PyTree = Any


def kl(
    q: MeanField,
    prior: Any = None,
    *,
    key: jax.Array | None = None,
    num_samples: int = 1,
) -> jax.Array:
    r"""KL(Q || prior) in nats, summed over all stochastic weights.

    Args:
      q: The posterior.
      prior: A prior: by default :class:`otmdr_jax.bnn.Normal` of std 0.1, or a
        `ScaleMixture`, a `FittedNormal`, or any object with their methods.
      key: A PRNG key for a Monte Carlo estimate, the mean of log q(w) - log p(w) over
        samples w of Q; None for the closed form.
      num_samples: The number of samples, at least 1.

    Raises:
      ValueError: The prior has no closed form and there is no key, or there is less
        than one sample.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> q = bnn.init(jnp.ones((2, 2)), sigma=1.0)
      >>> float(bnn.kl(q, bnn.Normal(1.0)))  # 4 (mu^2 / 2)
      2.0
      >>> estimate = bnn.kl(
      ...     q, bnn.Normal(1.0), key=jax.random.key(0), num_samples=10_000
      ... )
      >>> abs(float(estimate) - 2.0) < 0.1
      True
    """
    prior = check_prior(Normal() if prior is None else prior)
    mean, std = posterior.check(q).mean, posterior.std(q)
    if key is None:
        if not hasattr(prior, "kl"):
            raise ValueError(
                f"{type(prior).__name__} has no KL divergence in closed form: pass "
                "key=jax.random.key(...) for an estimate."
            )
        return prior.kl(mean, std)
    check_count("num_samples", num_samples)
    keys = jax.random.split(key, num_samples)
    return jnp.mean(
        jax.lax.map(lambda k: estimate(q, prior, posterior.noise(q, k)), keys)
    )


def estimate(q: MeanField, prior: Any, kappa: PyTree) -> jax.Array:
    """One sample of the divergence: log q(w) - log p(w) at w = mu + sigma kappa."""
    mean, std = q.mean, posterior.std(q)
    if hasattr(prior, "fit"):
        prior = prior.fit(mean, std)
    weights = jax.tree.map(lambda m, s, k: m + s * k, mean, std, kappa)
    # log q(w) depends on sigma and kappa alone.
    log_q = Normal(1.0).log_prob(kappa) - sum(
        jnp.sum(jnp.log(s)) for s in jax.tree.leaves(std)
    )
    return log_q - prior.log_prob(weights)


def at_sample(q: MeanField, prior: Any, kappa: PyTree) -> jax.Array:
    """The divergence of one step: the closed form if there is one, else a sample."""
    if hasattr(prior, "kl"):
        return prior.kl(q.mean, posterior.std(q))
    return estimate(q, prior, kappa)


def convert_beta(
    beta: float, scale: str, *, num_data: int, batch_size: int | None = None
) -> float:
    """The `kl_weight` that makes our objective a multiple of another paper's.

    Args:
      beta: The factor of the KL divergence in that paper.
      scale: The form of the negative log-likelihood that is added to it: "data_set",
        its mean times N (Nguyen et al., 2023, with a beta of 5e-6); "batch", its sum
        over a batch (Blundell et al., with a beta of 1 / batches); "example", its mean.
      num_data: N, the number of examples in the training set.
      batch_size: B, required for "batch".

    Example:
      >>> from otmdr_jax import bnn
      >>> bnn.convert_beta(5e-6, "data_set", num_data=50_000)
      5e-06
      >>> bnn.convert_beta(1 / 500, "batch", num_data=50_000, batch_size=100)
      1.0
    """
    if scale == "data_set":
        return beta
    if scale == "example":
        return beta * num_data
    if scale != "batch":
        raise ValueError(
            f"scale must be 'data_set', 'batch' or 'example', got {scale!r}."
        )
    if batch_size is None:
        raise ValueError("scale='batch' needs batch_size, the examples of a batch.")
    return beta * num_data / batch_size


def blundell(num_batches: int, weight: float = 1.0) -> Callable[[Any], jax.Array]:
    r"""Blundell's weights: the i-th of M batches of an epoch has 2^(M-i) / (2^M - 1).

    The first batches of an epoch see the prior, the later ones the data. Here they are
    multiplied by M, so that their mean over an epoch is `weight`.

    Args:
      num_batches: M, the number of batches in an epoch.
      weight: The mean weight over an epoch.

    Returns:
      A schedule, step -> kl_weight.

    Example:
      >>> from otmdr_jax import bnn
      >>> schedule = bnn.blundell(2)
      >>> [round(float(schedule(step)), 4) for step in range(3)]
      [1.3333, 0.6667, 1.3333]

    Reference: Blundell et al., 2015, section 3.4.
    """
    check_count("num_batches", num_batches)
    # 2^(M-i) / (2^M - 1) = 2^-i / (1 - 2^-M), which does not overflow.
    first = weight * num_batches / (1.0 - 2.0 ** -min(num_batches, 1_000))

    def schedule(step):
        return first * jnp.exp2(-(jnp.asarray(step) % num_batches + 1.0))

    return schedule


def warmup(num_steps: int, weight: float = 1.0) -> Callable[[Any], jax.Array]:
    """A weight that grows linearly from 0.

    Args:
      num_steps: The number of steps in which it grows.
      weight: The final weight.

    Example:
      >>> from otmdr_jax import bnn
      >>> float(bnn.warmup(10)(5)), float(bnn.warmup(10)(100))
      (0.5, 1.0)

    Reference: Sonderby et al., `Ladder Variational Autoencoders
    <https://arxiv.org/abs/1602.02282>`_, NIPS 2016.
    """
    check_count("num_steps", num_steps)
    return optax.linear_schedule(0.0, weight, num_steps)
