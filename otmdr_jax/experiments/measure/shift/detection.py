"""Detection of images of other classes by the uncertainty of predictions."""

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments.prediction import Predicted
from otmdr_jax.metrics import uncertainty
from otmdr_jax.metrics.predictions import check_unlabelled

# A higher score is more uncertain. The names are those of metrics.ood_auroc.
SCORES = ("confidence", "entropy", "mutual_information")


def scores(found: Predicted) -> dict[str, np.ndarray]:
    """Scores the uncertainty of each prediction.

    Args:
      found: Predictions of N examples.

    Returns:
      Name -> (N,) scores in nats: "confidence", minus the logarithm of the largest
      probability; "entropy" of the mean probability; and, with more than one sample or
      member, "mutual_information", the epistemic part of the entropy. All are NaN if a
      prediction is NaN.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax.experiments.prediction import Predicted
      >>> p = np.log([[0.9, 0.1], [0.5, 0.5]])
      >>> found = scores(Predicted(p, p[None], None, [0]))
      >>> {name: np.exp(x).round(3).tolist() for name, x in found.items()}
      {'confidence': [1.111, 2.0], 'entropy': [1.384, 2.0]}
    """
    log_probs = found.log_probs
    if np.isnan(log_probs).any():
        unknown = np.full(len(log_probs), np.nan)
        return dict.fromkeys(SCORES[:2], unknown)
    values = {
        # Taken from logarithms, because probabilities close to 1 would tie.
        "confidence": -log_probs.max(axis=1),
        "entropy": uncertainty.comparable_entropy(check_unlabelled(np.exp(log_probs))),
    }
    information = found.mutual_information()
    if information is not None:
        values["mutual_information"] = information
    return values


def detect(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """Measures how well a score separates out-of-distribution examples from the others.

    Args:
      inside: (N,) scores of the test set; a higher score is more uncertain.
      outside: (M,) scores of the other set.

    Returns:
      - auroc: the probability that an example from outside has the higher score; ties
        count half. Chance is 0.5 for any N and M.
      - aupr: the average precision, with examples from outside as positives. Chance is
        M / (N + M).
      - fpr95: the fraction of examples from outside that pass the threshold that 95 %
        of the test set passes. Chance is 0.95. The test set is positive, as in most
        papers.

      All are NaN if a score is NaN.

    Example:
      >>> import numpy as np
      >>> detect(np.array([0.1, 0.2, 0.3]), np.array([0.25, 0.5]))["auroc"].__round__(4)
      0.8333

    Reference: Hendrycks & Gimpel, `A Baseline for Detecting Misclassified and
    Out-of-Distribution Examples <https://arxiv.org/abs/1610.02136>`_, ICLR 2017; FPR95
    of Liang et al., `ODIN <https://arxiv.org/abs/1706.02690>`_, ICLR 2018.
    """
    both = np.concatenate([inside, outside])
    if np.isnan(both).any():
        return dict.fromkeys(("auroc", "aupr", "fpr95"), float("nan"))
    is_outside = np.arange(len(both)) >= len(inside)
    return {
        "auroc": metrics.auroc(both, is_outside),
        "aupr": metrics.average_precision(both, is_outside),
        "fpr95": metrics.fpr_at_tpr(-both, ~is_outside, 0.95),
    }
