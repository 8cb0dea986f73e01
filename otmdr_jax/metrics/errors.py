"""Calibration errors: the distance of probabilities from frequencies."""

from collections.abc import Sequence

import numpy as np

from otmdr_jax.metrics.predictions import (
    Array,
    Measure,
    Predictions,
    Ranked,
    check,
    per_class,
)
from otmdr_jax.metrics.reliability import (
    NUM_BINS,
    Cut,
    bin_sums,
    mass_bounds,
    top_bins,
    width_bounds,
)

# Nixon et al., 2019, and pytorch-ensembles.
THRESHOLD = 1e-3

# The smooth error's grid. At the smallest bandwidth that occurs, 1e-3, its cells smear
# the kernel by 0.06 %.
_CELLS = 2**13


def ece(
    probs: Array, labels: Array, num_bins: int = NUM_BINS, *, cut: Cut = "width"
) -> float:
    r"""Expected calibration error of the top class, 0..1.

    .. math:: \sum_b \frac{n_b}{N} \lvert acc_b - conf_b \rvert

    over bins (lo, hi] of equal width of [0, 1], closed on the right, so that a
    confidence of 1 counts. It is taken over the whole set; a mean over batches is
    larger. By chance a calibrated model has about sum_b n_b / N sqrt(2 acc (1 - acc) /
    (pi n_b)), not 0; see :func:`debiased_ece`. torchmetrics closes its bins on the
    left.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: The number of bins: 15, as is usual; 10 in the first papers.
      cut: The kind of bins: "width", or "mass" for bins of N // num_bins examples in
        the order of confidence, the last one taking the rest. Equal confidences share a
        bin, so that the order of the examples does not matter.

    Returns:
      The error, not in percent.

    Reference: Guo et al., `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, ICML 2017; Naeini et al., AAAI 2015; bins of
    equal mass: Nguyen & O'Connor, `Posterior calibration and exploratory analysis for
    natural language processing models <https://arxiv.org/abs/1508.05154>`_, 2015.

    Example:
      >>> from otmdr_jax import metrics
      >>> round(metrics.ece([[0.9, 0.1], [0.6, 0.4]], [0, 1]), 4)
      0.35
    """
    p = check(probs, labels)
    return bin_sums(*top_bins(p, num_bins, cut)).gap() / p.shape[0]


def mce(
    probs: Array, labels: Array, num_bins: int = NUM_BINS, *, cut: Cut = "width"
) -> float:
    """Maximum calibration error: the largest gap of a bin, 0..1.

    It is max_b |acc_b - conf_b| over the bins of :func:`ece`. A bin with one example
    can decide it, so bins of equal mass are steadier.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: The number of bins.
      cut: The kind of bins, "width" or "mass", as in :func:`ece`.

    Returns:
      The error, not in percent.

    Reference: Naeini et al., `Obtaining Well Calibrated Probabilities Using Bayesian
    Binning <https://doi.org/10.1609/aaai.v29i1.9602>`_, AAAI 2015.

    Example:
      >>> from otmdr_jax import metrics
      >>> round(metrics.mce([[0.9, 0.1], [0.6, 0.4]], [0, 1]), 4)
      0.6
    """
    return bin_sums(*top_bins(check(probs, labels), num_bins, cut)).largest_gap()


def debiased_ece(
    probs: Array, labels: Array, num_bins: int = NUM_BINS, *, cut: Cut = "mass"
) -> float:
    r"""Root mean squared calibration error of the top class without its bias, 0..1.

    .. math::
      \sqrt{\max\Bigl(0, \sum_b \frac{n_b}{N} \Bigl[(acc_b - conf_b)^2
      - \frac{acc_b (1 - acc_b)}{n_b - 1}\Bigr]\Bigr)}

    The randomness of the labels adds the subtracted term to the square in expectation.
    So the sum under the root is unbiased for the binned error, and a calibrated model
    has 0 for any N. A bin with one example does not count. This is an l2 error, which
    is no smaller than the l1 error of the same bins that :func:`ece` estimates.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: The number of bins.
      cut: The kind of bins: "mass" as in the source, or "width", as in :func:`ece`.

    Returns:
      The error, not in percent.

    Reference: Kumar, Liang & Ma, `Verified Uncertainty Calibration
    <https://arxiv.org/abs/1909.10155>`_, NeurIPS 2019.

    Example:
      >>> from otmdr_jax import metrics
      >>> p = [[0.9, 0.1]] * 4
      >>> round(metrics.debiased_ece(p, [0, 0, 1, 1], num_bins=1), 4)  # 0.4^2 - 0.5^2/3
      0.2769
    """
    p = check(probs, labels)
    bins = bin_sums(*top_bins(p, num_bins, cut))
    return float(np.sqrt(max(0.0, bins.debiased_square() / p.shape[0])))


def sce(probs: Array, labels: Array, num_bins: int = NUM_BINS) -> float:
    r"""Static calibration error: the classwise ECE, 0..1.

    .. math::
      \sum_{c,b} \frac{n_{cb}}{N C}
      \lvert \overline{p_c} - f_c \rvert_b

    over the bins (lo, hi] of equal width of p[:, c], with f_c the frequency of class c.
    A probability of exactly 0 lies in no bin, as in pytorch-ensembles. With many
    classes most probabilities are near 0, and the value is small, so compare only sets
    with the same C. Kull et al. (2019) divide by N and average over classes, which is
    the same.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: How many bins a class.

    Returns:
      The error, not in percent.

    Reference: Nixon et al., `Measuring Calibration in Deep Learning
    <https://arxiv.org/abs/1904.01685>`_, 2019.

    Example:
      >>> from otmdr_jax import metrics
      >>> round(metrics.sce([[0.9, 0.1], [0.6, 0.4]], [0, 1]), 4)
      0.35
    """
    p = check(probs, labels)
    return classwise(p, per_class(p, width_gap(num_bins)))[0]


def ace(probs: Array, labels: Array, num_bins: int = NUM_BINS) -> float:
    """Adaptive calibration error: :func:`tace` with the threshold 0, 0..1.

    It sorts every class's probabilities above 0 into bins of equal count. With many
    classes most bins hold probabilities near 0, hence :func:`tace`.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: How many bins a class.

    Returns:
      The error, not in percent.

    Reference: Nixon et al., `Measuring Calibration in Deep Learning
    <https://arxiv.org/abs/1904.01685>`_, 2019.

    Example:
      >>> from otmdr_jax import metrics
      >>> round(metrics.ace([[0.9, 0.1], [0.6, 0.4]], [0, 1], num_bins=2), 4)
      0.35
    """
    return tace(probs, labels, num_bins, threshold=0.0)


def tace(
    probs: Array,
    labels: Array,
    num_bins: int = NUM_BINS,
    threshold: float = THRESHOLD,
) -> float:
    """Thresholded adaptive calibration error, 0..1.

    It is the sum of :func:`sce` with other bins: for each class, the n probabilities
    above the threshold, in ascending order, are cut into bins of n // num_bins, the
    last one taking the rest (all, if n < num_bins). The sum is still divided by N C, so
    what the threshold leaves out counts as no error. Equal probabilities share a bin;
    pytorch-ensembles cuts among them in an order that it leaves to the sort. The paper
    does not say whether bins that cannot be equal differ by one or only in the last
    one; pytorch-ensembles does the latter, as here.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: How many bins a class.
      threshold: The probability up to which, inclusive, probabilities are left out.

    Returns:
      The error, not in percent.

    Reference: Nixon et al., `Measuring Calibration in Deep Learning
    <https://arxiv.org/abs/1904.01685>`_, 2019.

    Example:
      >>> from otmdr_jax import metrics
      >>> p = [[0.9, 0.1], [0.6, 0.4]]
      >>> round(metrics.tace(p, [0, 1], num_bins=1, threshold=0.5), 4)
      0.125
    """
    p = check(probs, labels)
    return classwise(p, per_class(p, mass_gap(num_bins, threshold)))[0]


def classwise(p: Predictions, gaps: Sequence[np.ndarray]) -> list[float]:
    """Classwise calibration errors from the gaps of classes: their sum over N C."""
    return [float(of_classes.sum() / p.size) for of_classes in gaps]


def width_gap(num_bins: int) -> Measure:
    """The contribution of a class to :func:`sce`, not yet divided."""

    def gap(ranked: Ranked) -> float:
        zeros = np.searchsorted(ranked.probs, 0.0, side="right")
        bounds = np.maximum(width_bounds(ranked.probs, num_bins), zeros)
        return bin_sums(ranked, bounds).gap()

    return gap


def mass_gap(num_bins: int, threshold: float) -> Measure:
    """The contribution of a class to :func:`tace`, not yet divided."""
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}.")

    def gap(ranked: Ranked) -> float:
        first = int(np.searchsorted(ranked.probs, threshold, side="right"))
        bounds = first + mass_bounds(ranked.probs[first:], num_bins)
        return bin_sums(ranked, bounds).gap()

    return gap


def smooth_ece(probs: Array, labels: Array) -> float:
    r"""Smooth calibration error of the top class, 0..1, without bins or parameters.

    The residuals of the diagram are smoothed by a Gaussian kernel that is reflected at
    0 and 1, and their absolute value is integrated:

    .. math::
      smECE_\sigma = \int_0^1 \Bigl\lvert \frac{1}{N} \sum_n
      K_\sigma(t, p_n) (correct_n - p_n) \Bigr\rvert dt.

    The bandwidth is the one that equals its error, smECE_sigma = sigma. Unlike binned
    errors, the value is continuous in the predictions. It is computed on a grid of
    8,192 cells, by the cosine series of the kernel, to about 1e-4 of its value if that
    is above 0.002.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      The error, not in percent.

    Reference: Blasiok & Nakkiran, `Smooth ECE: Principled Reliability Diagrams via
    Kernel Smoothing <https://arxiv.org/abs/2309.12236>`_, ICLR 2024.

    Example:
      >>> from otmdr_jax import metrics
      >>> round(metrics.smooth_ece([[0.9, 0.1]] * 10, [0] * 5 + [1] * 5), 2)
      0.4
    """
    p = check(probs, labels)
    cell = np.minimum((p.confidence * _CELLS).astype(int), _CELLS - 1)
    residuals = np.bincount(cell, p.correct - p.confidence, _CELLS) / p.shape[0]
    # Reflected at both ends it is periodic, and the heat kernel is a product of its
    # Fourier coefficients: cos(pi k t) shrinks by exp(-(pi k sigma)^2 / 2).
    coefficients = np.fft.rfft(np.concatenate([residuals, residuals[::-1]]))
    decay = (np.pi * np.arange(_CELLS + 1)) ** 2 / 2

    def error(sigma: float) -> float:
        smooth = np.fft.irfft(coefficients * np.exp(-decay * sigma**2))[:_CELLS]
        return float(np.abs(smooth).sum())

    low, high = 0.0, 1.0  # error(sigma) - sigma falls, from >= 0 to <= 0
    for _ in range(40):
        sigma = (low + high) / 2
        low, high = (sigma, high) if error(sigma) > sigma else (low, sigma)
    return error((low + high) / 2)
