"""Accuracy and proper scores of probabilities."""

from typing import NamedTuple

import numpy as np

from otmdr_jax.core.checks import check_count
from otmdr_jax.metrics.predictions import Array, Measure, Ranked, check, per_class
from otmdr_jax.metrics.reliability import NUM_BINS, BinSums, bin_sums, width_bounds


def accuracy(probs: Array, labels: Array) -> float:
    """The fraction of examples whose most probable class is the label, 0..1.

    Among tied classes the first one counts.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      The accuracy, not in percent.

    Example:
      >>> from otmdr_jax import metrics
      >>> metrics.accuracy([[0.9, 0.1], [0.6, 0.4]], [0, 1])
      0.5
    """
    return float(np.mean(check(probs, labels).correct))


def top_k_accuracy(probs: Array, labels: Array, k: int = 5) -> float:
    """The fraction of examples whose label is among the k most probable classes, 0..1.

    A label counts if fewer than k classes come before it: more probable ones, and tied
    ones with a lower number. With k = 1 this is :func:`accuracy`, with k = C it is 1.
    (scikit-learn's `top_k_accuracy_score` prefers the higher number among tied
    classes.)

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      k: The number of classes that count; 5 as for ImageNet.

    Returns:
      The accuracy, not in percent.

    Raises:
      ValueError: k is not in 1..C; TypeError: it is no integer.

    Example:
      >>> from otmdr_jax import metrics
      >>> metrics.top_k_accuracy([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], [1, 2], k=2)
      0.5
    """
    p = check(probs, labels)
    check_count("k", k)
    if k > p.shape[1]:
        raise ValueError(
            f"k must lie in 1..{p.shape[1]}, the number of classes, got {k}."
        )
    hits = 0
    classes = np.arange(p.shape[1])
    for rows, block in p.keys():
        labels = p.labels[rows, None]
        of_label = np.take_along_axis(block, labels, axis=1)
        before = np.count_nonzero(block > of_label, axis=1)
        before += np.count_nonzero((block == of_label) & (classes < labels), axis=1)
        hits += int(np.count_nonzero(before < k))
    return hits / p.shape[0]


def nll(probs: Array, labels: Array, *, log_probs: bool = False) -> float:
    """Negative log-likelihood in nats: -mean log p[y], from 0 to infinity.

    It is infinite if a label has probability 0, even by underflow. With `log_probs` the
    logarithms of a model are used as they are, which is exact. Others add 1e-12 inside
    the logarithm (pytorch-ensembles) or clip probabilities (scikit-learn), so that one
    impossible label costs at most 28 or 36 nats.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      log_probs: True if `probs` are logarithms of probabilities.

    Returns:
      The mean over examples, in nats; divide by log 2 for bits.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import metrics
      >>> metrics.nll([[0.5, 0.5]], [1]) == float(np.log(2))
      True
      >>> metrics.nll([[0.0, -2000.0]], [1], log_probs=True)
      2000.0
    """
    # Zero minus the mean, so that a sure and right model has 0.0, not -0.0.
    return float(0.0 - np.mean(check(probs, labels, log_probs=log_probs).log_of_label))


def brier(probs: Array, labels: Array) -> float:
    """The Brier score in its author's form: mean_n sum_c (p - onehot)^2, 0..2.

    Others divide by the number of classes or by 2, or take only the top class.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      The mean over examples.

    Reference: Brier, `Verification of Forecasts Expressed in Terms of Probability
    <https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2>`_, 1950.

    Example:
      >>> from otmdr_jax import metrics
      >>> round(metrics.brier([[0.9, 0.1], [0.6, 0.4]], [0, 1]), 4)
      0.37
    """
    p = check(probs, labels)
    total = 0.0
    for rows, block in p.rows():
        block[np.arange(len(block)), p.labels[rows]] -= 1.0
        total += float(np.sum(np.square(block, out=block)))
    return total / p.shape[0]


class BrierParts(NamedTuple):
    """brier = reliability - resolution + uncertainty + within_bins, exactly.

    Attributes:
      reliability: Squared gap of mean probability and frequency, 0..2; less is better.
      resolution: Squared distance of the bins' frequencies from the base rate; more is
        better.
      uncertainty: sum_c base_c (1 - base_c), which depends only on the labels.
      within_bins: The contribution of forecasts that differ within a bin.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float


def brier_parts(probs: Array, labels: Array, num_bins: int = NUM_BINS) -> BrierParts:
    r"""Reliability, resolution and uncertainty of the Brier score.

    Per class, over bins b of equal width of p[:, c], with the mean probability m, the
    frequency f of the class and the base rate of the class:

    .. math::
      REL = \sum_{c,b} \frac{n_{cb}}{N} (m_{cb} - f_{cb})^2,\quad
      RES = \sum_{c,b} \frac{n_{cb}}{N} (f_{cb} - \bar f_c)^2,\quad
      UNC = \sum_c \bar f_c (1 - \bar f_c).

    Murphy's three parts add up to the score if all forecasts of a bin are equal. The
    rest, the variance of forecasts in their bins minus twice their covariance with the
    labels, is the fourth part; most implementations leave it out and do not add up.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: The number of bins of equal width for each class, as in the calibration
        error.

    Returns:
      :class:`BrierParts`.

    Reference: Murphy, `A New Vector Partition of the Probability Score
    <https://doi.org/10.1175/1520-0450(1973)012%3C0595:ANVPOT%3E2.0.CO;2>`_, 1973; the
    parts within bins: Stephenson et al., 2008.

    Example:
      >>> from otmdr_jax import metrics
      >>> parts = metrics.brier_parts([[0.8, 0.2]] * 4, [0, 0, 0, 1])
      >>> [round(x, 6) for x in parts]
      [0.005, 0.0, 0.375, 0.0]
    """
    p = check(probs, labels)
    return join_parts(per_class(p, parts_of_class(num_bins))[0], brier(p, p.labels))


def parts_of_class(num_bins: int) -> Measure:
    """The contribution of a class to reliability, resolution and uncertainty."""

    def parts(ranked: Ranked) -> tuple[float, float, float]:
        return parts_of_bins(bin_sums(ranked, width_bounds(ranked.probs, num_bins)))

    return parts


def parts_of_bins(bins: BinSums) -> tuple[float, float, float]:
    """The same from the bins of a class, which hold every example."""
    count = bins.counts.sum()
    n = np.maximum(bins.counts, 1)
    mean, frequency = bins.scores / n, bins.positives / n
    base = float(bins.positives.sum() / count)
    weight = bins.counts / count
    reliability = weight @ (mean - frequency) ** 2
    resolution = weight @ (frequency - base) ** 2
    return float(reliability), float(resolution), base * (1.0 - base)


def join_parts(parts: np.ndarray, score: float) -> BrierParts:
    """Joins (C, 3) parts of classes with the Brier score that they are parts of."""
    reliability, resolution, uncertainty = map(float, parts.sum(axis=0))
    within = score - (reliability - resolution + uncertainty)
    return BrierParts(reliability, resolution, uncertainty, within)
