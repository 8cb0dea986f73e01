"""Many metrics by name: the four that a run logs, and all of them."""

import numpy as np

from otmdr_jax.metrics.errors import (
    THRESHOLD,
    classwise,
    debiased_ece,
    ece,
    mass_gap,
    mce,
    smooth_ece,
    width_gap,
)
from otmdr_jax.metrics.predictions import Array, check, per_class
from otmdr_jax.metrics.ranking import (
    NUM_STEPS,
    aac,
    aurc,
    auroc_of_class,
    misclassification_aupr,
    misclassification_auroc,
    misclassification_fpr95,
)
from otmdr_jax.metrics.reliability import NUM_BINS
from otmdr_jax.metrics.scores import (
    accuracy,
    brier,
    join_parts,
    nll,
    parts_of_class,
    top_k_accuracy,
)
from otmdr_jax.metrics.uncertainty import entropy, mutual_information

# The names that `evaluate` returns.
NAMES = ("accuracy", "nll", "brier", "ece")


def evaluate(log_probs: Array, labels: Array, num_bins: int = NUM_BINS) -> dict:
    """The metrics that a training run logs, from log-probabilities.

    Unlike the functions of single metrics it takes logarithms, since a model has them
    and a probability that underflows makes the NLL infinite.

    Args:
      log_probs: (N, C) log-probabilities, or samples (S, N, C), whose mean probability
        counts.
      labels: (N,) integers in 0..C-1.
      num_bins: The number of bins of the calibration error.

    Returns:
      A dictionary of floats: accuracy, nll, brier, ece.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import metrics
      >>> p = np.array([[0.9, 0.1], [0.6, 0.4]])
      >>> {k: round(v, 4) for k, v in metrics.evaluate(np.log(p), [0, 1]).items()}
      {'accuracy': 0.5, 'nll': 0.5108, 'brier': 0.37, 'ece': 0.35}
    """
    p = check(log_probs, labels, log_probs=True)
    return {
        "accuracy": accuracy(p, p.labels),
        "nll": nll(p, p.labels),
        "brier": brier(p, p.labels),
        "ece": ece(p, p.labels, num_bins),
    }


def summary(
    probs: Array, labels: Array, num_bins: int = NUM_BINS, *, log_probs: bool = False
) -> dict[str, float]:
    """All metrics of one set that are numbers, by name.

    A metric that is not defined is NaN: those of misclassification if all predictions
    are right or all wrong, the one-vs-rest AUROC if all labels are one class, AAC of
    fewer than ten examples. The functions themselves raise an error there.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_bins: The number of bins of all calibration errors.
      log_probs: True if `probs` are logarithms of probabilities.

    Returns:
      A dictionary of floats in a fixed order. `top5_accuracy` is 1 for up to five
      classes; `mutual_information` is there only for samples.

    Example:
      >>> from otmdr_jax import metrics
      >>> found = metrics.summary([[0.9, 0.1], [0.6, 0.4]], [0, 1])
      >>> found["accuracy"], found["misclassification_auroc"], found["aac"]
      (0.5, 1.0, nan)
    """
    p = check(probs, labels, log_probs=log_probs)
    y, (count, classes) = p.labels, p.shape
    nan = float("nan")
    *gaps, aurocs, parts = per_class(  # at once: sorting the classes is what takes time
        p,
        width_gap(num_bins),
        mass_gap(num_bins, 0.0),
        mass_gap(num_bins, THRESHOLD),
        auroc_of_class,
        parts_of_class(num_bins),
    )
    score = brier(p, y)
    reliability, resolution, uncertainty, _ = join_parts(parts, score)
    both = 0 < np.count_nonzero(p.correct) < count
    several = bool((y != y[0]).any())
    found = {
        "accuracy": accuracy(p, y),
        "top5_accuracy": top_k_accuracy(p, y) if classes > 5 else 1.0,
        "nll": nll(p, y),
        "brier": score,
        "brier_reliability": reliability,
        "brier_resolution": resolution,
        "brier_uncertainty": uncertainty,
        "ece": ece(p, y, num_bins),
        "ece_mass": ece(p, y, num_bins, cut="mass"),
        "mce": mce(p, y, num_bins),
        **dict(zip(("sce", "ace", "tace"), classwise(p, gaps), strict=True)),
        "debiased_ece": debiased_ece(p, y, num_bins),
        "smooth_ece": smooth_ece(p, y),
        "aac": aac(p, y) if count >= NUM_STEPS else nan,
        "aurc": aurc(p, y),
        "misclassification_auroc": misclassification_auroc(p, y) if both else nan,
        "misclassification_aupr": misclassification_aupr(p, y) if both else nan,
        "misclassification_fpr95": misclassification_fpr95(p, y) if both else nan,
        "ovr_auroc": float(np.nanmean(aurocs)) if several else nan,
        "entropy": float(entropy(p).mean()),
    }
    if p.samples is not None:
        found["mutual_information"] = float(mutual_information(p).mean())
    return found
