"""Ranking by confidence: does a model know which predictions are wrong?"""

from typing import Literal, NamedTuple

import numpy as np

from otmdr_jax.core.checks import check_count, check_word
from otmdr_jax.metrics.detection import (
    auroc,
    auroc_of_ranked,
    average_precision,
    fpr_at_tpr,
    operating_points,
)
from otmdr_jax.metrics.predictions import (
    Array,
    Ranked,
    check,
    check_unlabelled,
    per_class,
)
from otmdr_jax.metrics.uncertainty import comparable_entropy, comparable_information

# Published values of AAC use ten.
NUM_STEPS = 10

Score = Literal["confidence", "entropy", "mutual_information"]


def aac(probs: Array, labels: Array, num_steps: int = NUM_STEPS) -> float:
    r"""Area above the accuracy-confidence curve, as the field's code has it.

    Examples are in ascending order of top confidence, and a_j is the accuracy of those
    from index i_j on, for i_j = 1, 1 + step, 1 + 2 step, ... < N with step = N //
    num_steps. Then

    .. math:: AAC = 1 - T / \text{num\_steps},\quad
      T = \sum_j \frac{a_j + a_{j+1}}{2}.

    This is the definition of the usual `acc_aac`, so that values compare; of equal
    confidences, whose order it leaves to the sort, it is the mean over all orders. T
    joins num_steps points, one interval less, so a model that is always right has 1 /
    num_steps, and one that is always wrong has 1. If num_steps does not divide N there
    are more points, and the area is less, below 0 even: with ten steps a model that is
    always right has 0.1 of 360 examples, 0 of 359 and -0.7 of 19. Compare sets of one
    size that num_steps divides. pytorch-ensembles' own default is 1,000 steps.
    :func:`aurc` is the same idea without these quirks.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.
      num_steps: The number of points of the curve.

    Returns:
      The area.

    Raises:
      ValueError: There are fewer than num_steps examples.

    Reference: Ashukha et al., `Pitfalls of In-Domain Uncertainty Estimation and
    Ensembling in Deep Learning <https://arxiv.org/abs/2002.06470>`_, ICLR 2020 (code).

    Example:
      >>> from otmdr_jax import metrics
      >>> round(metrics.aac([[0.9, 0.1]] * 20, [0] * 20), 4)
      0.1
    """
    p = check(probs, labels)
    count = p.shape[0]
    check_count("num_steps", num_steps)
    if num_steps > count:
        raise ValueError(
            f"aac needs 1 <= num_steps <= N, got num_steps = {num_steps} for N = "
            f"{count}: give it more examples or fewer steps."
        )
    starts = np.arange(1, count, count // num_steps)
    right = 1.0 - risk_coverage(p, p.labels).risk  # of the k + 1 most confident ones
    return float(1.0 - np.trapezoid(right[count - starts - 1]) / num_steps)


class RiskCoverage(NamedTuple):
    """A risk-coverage curve, with one entry for each number of examples kept.

    Attributes:
      coverage: (N,) fractions of examples kept, the most confident ones first.
      risk: (N,) fractions of these that are wrong.
    """

    coverage: np.ndarray
    risk: np.ndarray


def risk_coverage(probs: Array, labels: Array) -> RiskCoverage:
    """The error of the k most confident examples, for k = 1, ..., N.

    Errors among equally confident examples are spread evenly over them, which is the
    mean over all their orders. So the curve does not depend on the order of the set.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      :class:`RiskCoverage`.

    Reference: El-Yaniv & Wiener, `On the Foundations of Noise-free Selective
    Classification <https://jmlr.org/papers/v11/el-yaniv10a.html>`_, JMLR 2010.

    Example:
      >>> from otmdr_jax import metrics
      >>> curve = metrics.risk_coverage([[0.9, 0.1], [0.6, 0.4]], [0, 1])
      >>> curve.coverage.tolist(), curve.risk.tolist()
      ([0.5, 1.0], [0.0, 0.5])
    """
    p = check(probs, labels)
    kept, wrong = operating_points(p.confidence_key, ~p.correct)
    each = np.arange(1, p.shape[0] + 1)
    errors = np.interp(each, np.append(0, kept), np.append(0, wrong))
    return RiskCoverage(each / p.shape[0], errors / each)


def aurc(probs: Array, labels: Array) -> float:
    """Area under the risk-coverage curve, 0..1: the mean risk over all coverages.

    It is 1/N sum_k risk_k over :func:`risk_coverage`. It depends on the accuracy too:
    with error rate e the best order has about e + (1 - e) log(1 - e). Others integrate
    by trapezoids or over thresholds; some papers multiply by 1,000.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      The area.

    Reference: Geifman, Uziel & El-Yaniv, `Bias-Reduced Uncertainty Estimation for Deep
    Neural Classifiers <https://arxiv.org/abs/1805.08206>`_, ICLR 2019.

    Example:
      >>> from otmdr_jax import metrics
      >>> metrics.aurc([[0.9, 0.1], [0.6, 0.4]], [0, 1])
      0.25
    """
    return float(risk_coverage(probs, labels).risk.mean())


def misclassification_auroc(probs: Array, labels: Array) -> float:
    """AUROC of top confidence in telling right from wrong predictions, 0..1.

    It is the probability that a right prediction has more confidence than a wrong one,
    ties counting half; 0.5 is chance. Models of different accuracy have different right
    and wrong examples, so compare AURC too.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      The area.

    Raises:
      ValueError: All predictions are right, or all wrong.

    Reference: Hendrycks & Gimpel, `A Baseline for Detecting Misclassified and
    Out-of-Distribution Examples <https://arxiv.org/abs/1610.02136>`_, ICLR 2017.

    Example:
      >>> from otmdr_jax import metrics
      >>> metrics.misclassification_auroc([[0.9, 0.1], [0.6, 0.4]], [0, 1])
      1.0
    """
    return auroc(*_right_and_wrong(probs, labels))


def misclassification_aupr(probs: Array, labels: Array) -> float:
    """Average precision of finding wrong predictions by low confidence, 0..1.

    It is sum_i (R_i - R_{i-1}) P_i over thresholds, with wrong predictions as positives
    (AUPR-error). Chance is the error rate, so models of different accuracy cannot be
    compared. Others take right predictions as positives (AUPR-success, near 1), or join
    the points by trapezoids, which is too high.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      The area.

    Raises:
      ValueError: All predictions are right, or all wrong.

    Reference: Hendrycks & Gimpel, `A Baseline for Detecting Misclassified and
    Out-of-Distribution Examples <https://arxiv.org/abs/1610.02136>`_, ICLR 2017; Davis
    & Goadrich, 2006, on trapezoids.

    Example:
      >>> from otmdr_jax import metrics
      >>> p = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]
      >>> round(metrics.misclassification_aupr(p, [0, 1, 0]), 4)
      0.5
    """
    confidence, right = _right_and_wrong(probs, labels)
    return average_precision(-confidence, ~right)


def misclassification_fpr95(probs: Array, labels: Array) -> float:
    """The fraction of errors that pass if 95 % of right predictions do, 0..1.

    The threshold is the highest confidence that at least 95 % of right predictions
    reach; the result is the share of wrong predictions that reach it too. 0.95 is
    chance. Right predictions are the positives, as in most papers; with errors as
    positives the number is another.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      The fraction.

    Raises:
      ValueError: All predictions are right, or all wrong.

    Reference: Liang et al., `Enhancing the Reliability of Out-of-distribution Image
    Detection in Neural Networks <https://arxiv.org/abs/1706.02690>`_, ICLR 2018; for
    misclassification Corbière et al., 2019.

    Example:
      >>> from otmdr_jax import metrics
      >>> metrics.misclassification_fpr95([[0.9, 0.1], [0.6, 0.4]], [0, 1])
      0.0
    """
    return fpr_at_tpr(*_right_and_wrong(probs, labels))


def ovr_auroc(probs: Array, labels: Array) -> float:
    """One-vs-rest AUROC: the mean over classes of p[:, c] as a score of class c, 0..1.

    It is the plain mean (scikit-learn's `multi_class="ovr", average="macro"`) over the
    classes with examples, since a class without examples has no AUROC. It depends
    neither on calibration nor, for C > 2, on how the scores of different classes
    compare.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C), whose mean counts.
      labels: (N,) integers in 0..C-1.

    Returns:
      The mean area.

    Raises:
      ValueError: All labels are the same class.

    Reference: Provost & Domingos, 2000; Hanley & McNeil, `The meaning and use of the
    area under a ROC curve <https://doi.org/10.1148/radiology.143.1.7063747>`_, 1982.

    Example:
      >>> from otmdr_jax import metrics
      >>> metrics.ovr_auroc([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]], [0, 1, 0])
      1.0
    """
    p = check(probs, labels)
    if (p.labels == p.labels[0]).all():
        raise ValueError(
            "ovr_auroc needs examples of at least two classes, but all labels are "
            f"{p.labels[0]}."
        )
    return float(np.nanmean(per_class(p, auroc_of_class)[0]))


def auroc_of_class(ranked: Ranked) -> float:
    """The AUROC of a class against the rest; NaN if one of them has no examples."""
    both = 0 < len(ranked.of_positives) < len(ranked.ordered)
    return auroc_of_ranked(ranked) if both else float("nan")


def ood_auroc(probs: Array, ood_probs: Array, score: Score = "confidence") -> float:
    """AUROC of telling out-of-distribution examples from others, 0..1.

    It is the probability that an OOD example is more uncertain, ties counting half; 0.5
    is chance. It does not matter which set is called positive. Scores are the same to
    the bit for any order of classes and samples, and the mutual information of equal
    samples is 0, so that rounding does not decide ties.

    Args:
      probs: (N, C) probabilities on the test set, or samples (S, N, C).
      ood_probs: (M, C) probabilities on the other set, or samples (S, M, C).
      score: The measure of uncertainty: "confidence" (low is uncertain), "entropy", or
        "mutual_information", which needs samples.

    Returns:
      The area.

    Raises:
      ValueError: An unknown score; "mutual_information" without samples; sets with
        different numbers of classes.

    Reference: Hendrycks & Gimpel, `A Baseline for Detecting Misclassified and
    Out-of-Distribution Examples <https://arxiv.org/abs/1610.02136>`_, ICLR 2017.

    Example:
      >>> from otmdr_jax import metrics
      >>> metrics.ood_auroc([[0.9, 0.1], [0.6, 0.4]], [[0.5, 0.5]])
      1.0
    """
    sets = check_unlabelled(probs), check_unlabelled(ood_probs)
    # Logarithms rank what underflows, but only beside other logarithms.
    keys = all(p.log for p in sets)
    scores = {
        "confidence": lambda p: -(p.confidence_key if keys else p.confidence),
        "entropy": comparable_entropy,
        "mutual_information": comparable_information,
    }
    check_word("score", score, tuple(scores))
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            "both sets need predictions of one model, but they have "
            f"{sets[0].shape[1]} and {sets[1].shape[1]} classes."
        )
    inside, outside = map(scores[score], sets)
    positive = np.arange(len(inside) + len(outside)) >= len(inside)
    return auroc(np.concatenate([inside, outside]), positive)


def _right_and_wrong(probs: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and which predictions are right; some must be right, some wrong."""
    p = check(probs, labels)
    right = int(np.count_nonzero(p.correct))
    if right in (0, p.shape[0]):
        raise ValueError(
            "telling right from wrong predictions needs both, but "
            f"{right} of {p.shape[0]} are right."
        )
    return p.confidence_key, p.correct
