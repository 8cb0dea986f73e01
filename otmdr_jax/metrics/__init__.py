"""The quality of a classifier's probabilities, over a whole set and in float64.

Every function takes probabilities of shape (N, C), or samples (S, N, C), whose mean
probability counts, and integer labels of shape (N,). :func:`evaluate` takes
log-probabilities; :func:`nll`, :func:`summary` and :func:`check` do on request.

Averages of these metrics over batches are other numbers (ECE most of all). Collect the
whole set first, or use :mod:`otmdr_jax.metrics.streaming`.
"""

from otmdr_jax.metrics import streaming
from otmdr_jax.metrics.detection import auroc, average_precision, fpr_at_tpr
from otmdr_jax.metrics.errors import ace, debiased_ece, ece, mce, sce, smooth_ece, tace
from otmdr_jax.metrics.intervals import (
    Comparison,
    Interval,
    bootstrap,
    bootstrap_all,
    paired_test,
)
from otmdr_jax.metrics.predictions import Predictions, check
from otmdr_jax.metrics.ranking import (
    RiskCoverage,
    aac,
    aurc,
    misclassification_aupr,
    misclassification_auroc,
    misclassification_fpr95,
    ood_auroc,
    ovr_auroc,
    risk_coverage,
)
from otmdr_jax.metrics.reliability import NUM_BINS, Reliability, reliability
from otmdr_jax.metrics.scores import (
    BrierParts,
    accuracy,
    brier,
    brier_parts,
    nll,
    top_k_accuracy,
)
from otmdr_jax.metrics.summary import NAMES, evaluate, summary
from otmdr_jax.metrics.uncertainty import entropy, mutual_information

__all__ = [
    "NAMES",
    "NUM_BINS",
    "BrierParts",
    "Comparison",
    "Interval",
    "Predictions",
    "Reliability",
    "RiskCoverage",
    "aac",
    "accuracy",
    "ace",
    "aurc",
    "auroc",
    "average_precision",
    "bootstrap",
    "bootstrap_all",
    "brier",
    "brier_parts",
    "check",
    "debiased_ece",
    "ece",
    "entropy",
    "evaluate",
    "fpr_at_tpr",
    "mce",
    "misclassification_aupr",
    "misclassification_auroc",
    "misclassification_fpr95",
    "mutual_information",
    "nll",
    "ood_auroc",
    "ovr_auroc",
    "paired_test",
    "reliability",
    "risk_coverage",
    "sce",
    "smooth_ece",
    "streaming",
    "summary",
    "tace",
    "top_k_accuracy",
]
