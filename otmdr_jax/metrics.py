"""What a classifier's probabilities are worth, over a whole set and in float64.

All functions take log-probabilities of shape (N, C) and integer labels of shape (N,).
Averages over batches of these metrics are other numbers (ECE most of all): collect the
whole set first.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any

# Nguyen et al., 2023, appendix B.2, and the field's usual choice.
NUM_BINS = 15

# What `evaluate` gives.
NAMES = ("accuracy", "nll", "brier", "ece")


class Reliability(NamedTuple):
    """A reliability diagram: one entry for each bin of top confidence.

    Attributes:
      edges: (bins + 1,) the bins' edges on [0, 1]; bin i is (edges[i], edges[i + 1]].
      counts: (bins,) number of examples.
      confidence: (bins,) mean top confidence, NaN where a bin is empty.
      accuracy: (bins,) fraction that is right, NaN where a bin is empty.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def evaluate(log_probs: Array, labels: Array, num_bins: int = NUM_BINS) -> dict:
    """All metrics of this module by name.

    Args:
      log_probs: (N, C) log-probabilities.
      labels: (N,) integers in 0..C-1.
      num_bins: Bins of the calibration error.

    Returns:
      A dictionary of floats: accuracy, nll, brier, ece.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import metrics
      >>> p = np.array([[0.9, 0.1], [0.6, 0.4]])
      >>> {k: round(v, 4) for k, v in metrics.evaluate(np.log(p), [0, 1]).items()}
      {'accuracy': 0.5, 'nll': 0.5108, 'brier': 0.37, 'ece': 0.35}
    """
    return {
        "accuracy": accuracy(log_probs, labels),
        "nll": nll(log_probs, labels),
        "brier": brier(log_probs, labels),
        "ece": ece(log_probs, labels, num_bins),
    }


def accuracy(log_probs: Array, labels: Array) -> float:
    """The fraction of examples whose most probable class is the label, 0..1.

    Of tied classes the first counts.
    """
    log_probs, labels = _checked(log_probs, labels)
    return float(np.mean(log_probs.argmax(axis=1) == labels))


def nll(log_probs: Array, labels: Array) -> float:
    """Negative log-likelihood in nats: -mean log p[y], from 0 to infinity."""
    log_probs, labels = _checked(log_probs, labels)
    return float(-np.mean(log_probs[np.arange(len(labels)), labels]))


def brier(log_probs: Array, labels: Array) -> float:
    """The Brier score as its author gave it: mean_n sum_c (p - onehot)^2, 0..2.

    Others divide by the number of classes, or keep the top class alone.

    Reference: Brier, 1950.
    """
    log_probs, labels = _checked(log_probs, labels)
    probs = np.exp(log_probs)
    probs[np.arange(len(labels)), labels] -= 1.0
    return float(np.mean(np.sum(probs**2, axis=1)))


def ece(log_probs: Array, labels: Array, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error of the top class, equal-width bins, 0..1.

    sum_b |B_b| / N |accuracy_b - confidence_b| over bins (lo, hi] of [0, 1]: closed on
    the right, so that a confidence of 1 counts.

    Reference: Guo et al., `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, ICML 2017.
    """
    bins = reliability(log_probs, labels, num_bins)
    full = bins.counts > 0
    gaps = np.abs(bins.accuracy[full] - bins.confidence[full])
    return float(np.sum(bins.counts[full] * gaps) / np.sum(bins.counts))


def reliability(
    log_probs: Array, labels: Array, num_bins: int = NUM_BINS
) -> Reliability:
    """The bins of a reliability diagram: see :class:`Reliability`."""
    log_probs, labels = _checked(log_probs, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    # exp(log_softmax) of a certain prediction can exceed 1 by a rounding error.
    confidence = np.minimum(np.exp(log_probs.max(axis=1)), 1.0)
    right = log_probs.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, None)
    counts = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, confidence, num_bins) / counts
        mean_accuracy = np.bincount(index, right, num_bins) / counts
    return Reliability(edges, counts, mean_confidence, mean_accuracy)


def _checked(log_probs: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    log_probs = np.asarray(log_probs, np.float64)
    labels = np.asarray(labels)
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1]:
        raise ValueError(
            "metrics need log_probs of shape (N, C) and labels of shape (N,), got "
            f"{log_probs.shape} and {labels.shape}."
        )
    if not len(labels):
        raise ValueError("metrics of an empty set are not defined: got N = 0.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    classes = log_probs.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie in 0..{classes - 1} for {classes} classes, got "
            f"{labels.min()}..{labels.max()}."
        )
    totals = np.exp(log_probs).sum(axis=1)
    if not np.allclose(totals, 1.0, atol=1e-3):
        worst = totals[np.argmax(np.abs(totals - 1.0))]
        raise ValueError(
            "log_probs must be logarithms of probabilities that sum to 1 over classes; "
            f"one row sums to {worst:.6g}. Apply jax.nn.log_softmax to logits."
        )
    return log_probs, labels
