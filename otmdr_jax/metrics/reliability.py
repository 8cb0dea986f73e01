"""Bins of a reliability diagram: their bounds in sorted order, and their sums.

Every binned calibration error is a sum over sections of sorted scores: the sum of p
minus the number of positives. They differ in what is sorted and where it is cut.
"""

from typing import Literal, NamedTuple

import numpy as np

from otmdr_jax.core.checks import check_count, check_word
from otmdr_jax.metrics.predictions import Array, Predictions, Ranked, check, rank

# Nguyen et al., 2023, appendix B.2, and the usual choice.
NUM_BINS = 15

Cut = Literal["width", "mass"]


class Reliability(NamedTuple):
    """A reliability diagram: one entry for each bin of top confidence.

    Attributes:
      edges: (bins + 1,) the bins' edges on [0, 1]; bin i is (edges[i], edges[i + 1]].
      counts: (bins,) numbers of examples.
      confidence: (bins,) means of the top confidence, NaN for empty bins.
      accuracy: (bins,) fractions of right predictions, NaN for empty bins.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


class BinSums(NamedTuple):
    """Sections of sorted scores: their sizes, sums and numbers of positives."""

    counts: np.ndarray
    scores: np.ndarray
    positives: np.ndarray

    def gap(self) -> float:
        """sum_b n_b |mean score - frequency|: a calibration error, not yet divided."""
        return float(np.abs(self.scores - self.positives).sum())

    def largest_gap(self) -> float:
        """max_b |mean score - frequency|."""
        gaps = np.abs(self.scores - self.positives) / np.maximum(self.counts, 1)
        return float(gaps.max())

    def debiased_square(self) -> float:
        """sum_b n_b [(mean score - f)^2 - f (1 - f) / (n_b - 1)], f the frequency."""
        several = self.counts > 1  # a bin of one example counts nothing
        n = self.counts[several]
        frequency, score = self.positives[several] / n, self.scores[several] / n
        chance = frequency * (1.0 - frequency) / (n - 1)
        return float(n @ ((frequency - score) ** 2 - chance))


def reliability(
    probs: Array, labels: Array, num_bins: int = NUM_BINS, *, cut: Cut = "width"
) -> Reliability:
    """The bins of a reliability diagram of the top class.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: The number of bins.
      cut: The kind of bins. "width": bins (lo, hi] of equal width on [0, 1]. "mass":
        bins of N // num_bins examples in the order of confidence, the last one taking
        the rest; equal confidences share a bin.

    Returns:
      :class:`Reliability`; with "mass" the edges are 0, the highest confidence of each
      bin but the last, and 1.

    Raises:
      ValueError: The input is bad (see :func:`check`), there is less than one bin, or
        the cut is unknown.

    Reference: DeGroot & Fienberg, `The Comparison and Evaluation of Forecasters
    <https://doi.org/10.2307/2987588>`_, 1983.

    Example:
      >>> from otmdr_jax import metrics
      >>> bins = metrics.reliability([[0.9, 0.1], [0.4, 0.6]], [0, 0], num_bins=2)
      >>> bins.counts, bins.accuracy
      (array([0, 2]), array([nan, 0.5]))
    """
    ranked, bounds = top_bins(check(probs, labels), num_bins, cut)
    sums = bin_sums(ranked, bounds)
    edges = edges_of(num_bins)
    if cut == "mass":
        inner = np.maximum(bounds[1:-1], 1) - 1
        edges[1:-1] = np.where(bounds[1:-1] > 0, ranked.probs[inner], 0.0)
    return diagram(edges, sums)


def edges_of(num_bins: int) -> np.ndarray:
    """The edges k / bins of bins of equal width, each the nearest float64.

    (`np.linspace` multiplies by 1 / bins: of 12 bins three edges are below k / 12.)
    """
    return np.arange(num_bins + 1) / num_bins


def diagram(edges: np.ndarray, bins: BinSums) -> Reliability:
    """Makes a reliability diagram from the sums of its bins."""
    with np.errstate(invalid="ignore"):
        confidence, accuracy = bins.scores / bins.counts, bins.positives / bins.counts
    return Reliability(edges, bins.counts, confidence, accuracy)


def top_bins(p: Predictions, num_bins: int, cut: str) -> tuple[Ranked, np.ndarray]:
    """The sorted confidence of the top class, and the bounds of its bins."""
    cuts = {"width": width_bounds, "mass": mass_bounds}
    check_word("cut", cut, tuple(cuts))
    ranked = rank(p.confidence, p.correct)
    return ranked, cuts[cut](ranked.probs, num_bins)


def width_bounds(ordered: np.ndarray, num_bins: int) -> np.ndarray:
    """(bins + 1,) bounds of the bins (lo, hi] of [0, 1]; 0 counts in the first one."""
    check_count("num_bins", num_bins)
    bounds = np.searchsorted(ordered, edges_of(num_bins), side="right")
    bounds[0] = 0
    return bounds


def mass_bounds(ordered: np.ndarray, num_bins: int) -> np.ndarray:
    """(bins + 1,) bounds of bins of n // bins scores, the last one taking the rest.

    A bin goes on to the last of equal scores. Cut among them, what a bin holds would
    depend on the order of the examples.
    """
    check_count("num_bins", num_bins)
    bounds = np.arange(num_bins + 1) * (len(ordered) // num_bins)
    if bounds[1]:
        bounds[1:] = np.searchsorted(ordered, ordered[bounds[1:] - 1], side="right")
    bounds[-1] = len(ordered)
    return bounds


def bin_sums(ranked: Ranked, bounds: np.ndarray) -> BinSums:
    """Sums up the scores between neighbouring bounds."""
    pairs = zip(bounds[:-1], bounds[1:], strict=True)
    sums = np.array([ranked.probs[a:b].sum() for a, b in pairs])
    return BinSums(np.diff(bounds), sums, np.diff(ranked.positives_before(bounds)))
