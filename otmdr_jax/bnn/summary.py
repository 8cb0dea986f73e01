"""A summary of a posterior: mean sigma and signal-to-noise ratio of its layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.bnn import posterior
from otmdr_jax.bnn.posterior import MeanField

PyTree = Any

# Bins of the histogram in decibel; values beyond fall into the first or the last bin.
LOWEST, HIGHEST, WIDTH = -60.0, 60.0, 2.0
NUM_BINS = round((HIGHEST - LOWEST) / WIDTH)


class Summary(NamedTuple):
    """The result of :func:`summarise`.

    Attributes:
      sigma: Mean standard deviation of each layer, by its name.
      snr_db: Mean signal-to-noise ratio of each layer, 20 log10(|mu| / sigma), in dB.
      counts: (60,) numbers of weights with a ratio in each bin of 2 dB, from -60 dB on.
    """

    sigma: dict[str, jax.Array]
    snr_db: dict[str, jax.Array]
    counts: jax.Array


def summarise(q: MeanField) -> Summary:
    """Mean sigma and signal-to-noise ratio of each stochastic array, and a histogram.

    Args:
      q: The posterior.

    Returns:
      A :class:`Summary`; layers are named by their path, for example "conv1/kernel".

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> q = bnn.init({"dense": {"kernel": jnp.full((2, 2), 10.0)}}, sigma=0.1)
      >>> round(float(bnn.summarise(q).snr_db["dense/kernel"]), 3)
      40.0

    Reference: Blundell et al., 2015, section 5.1 and figure 4.
    """
    decibels = jax.tree.map(
        lambda ratio: 20 * jnp.log10(jnp.maximum(ratio, 1e-30)),
        posterior.signal_to_noise(q),
    )
    counts = jnp.zeros(NUM_BINS, jnp.int32)
    for values in jax.tree.leaves(decibels):
        bins = jnp.floor((values.ravel() - LOWEST) / WIDTH).astype(jnp.int32)
        there = ~jnp.isnan(values.ravel())
        counts = counts.at[jnp.clip(bins, 0, NUM_BINS - 1)].add(there)
    return Summary(_means(posterior.std(q)), _means(decibels), counts)


def _means(values):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "weights": jnp.mean(x)
        for path, x in jax.tree.leaves_with_path(values)
    }
