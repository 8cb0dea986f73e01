"""The diversity of the members of an ensemble, and its effect on scores.

All functions take log-probabilities of shape (M, N, C) of M members and N examples.
They compute in float64 over the whole set.
"""

import itertools
from typing import Any

import numpy as np

from otmdr_jax.metrics.predictions import (
    check_labels,
    check_sample,
    tolerance,
    unmasked,
)

Array = Any

# The names that `evaluate` returns.
NAMES = ("disagreement", "pairwise_kl", "nll_ambiguity", "brier_ambiguity")


def evaluate(log_probs: Array, labels: Array) -> dict[str, float]:
    """All measures of this module by name.

    Args:
      log_probs: (M, N, C) log-probabilities of M >= 2 members.
      labels: (N,) integers in 0..C-1.

    Returns:
      A dictionary of floats: disagreement, pairwise_kl, nll_ambiguity, brier_ambiguity.

    Raises:
      ValueError: The shape is another, there is a single member, a member's predictions
        are no distributions (logits, NaN), or labels are out of range.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import diversity
      >>> p = np.array([[[0.9, 0.1]], [[0.3, 0.7]]])
      >>> found = diversity.evaluate(np.log(p), [0])
      >>> found["disagreement"], round(found["brier_ambiguity"], 4)
      (1.0, 0.18)
    """
    return {
        "disagreement": disagreement(log_probs),
        "pairwise_kl": pairwise_kl(log_probs),
        "nll_ambiguity": nll_ambiguity(log_probs, labels),
        "brier_ambiguity": brier_ambiguity(log_probs),
    }


def disagreement(log_probs: Array) -> float:
    """The fraction of examples on which two members predict different classes, 0..1.

    It is the mean over all pairs of members.

    Reference: Kuncheva & Whitaker, `Measures of Diversity in Classifier Ensembles
    <https://doi.org/10.1023/A:1022859003006>`_, Machine Learning 2003, of whether
    members are right; of the classes that they name, as here, Fort et al., 2019.
    """
    classes = _checked(log_probs).argmax(axis=2)  # (M, N)
    pairs = itertools.combinations(classes, 2)
    return float(np.mean([np.mean(a != b) for a, b in pairs]))


def pairwise_kl(log_probs: Array) -> float:
    """The mean of KL(p_i || p_j) over examples and ordered pairs, in nats.

    It lies between 0 and infinity, and is infinite if a member gives probability 0 to a
    class that another one allows.

    Reference: Kullback & Leibler, 1951; as a measure of an ensemble's diversity Fort et
    al., `Deep Ensembles: A Loss Landscape Perspective
    <https://arxiv.org/abs/1912.02757>`_, 2019.
    """
    log_probs = _checked(log_probs)
    found = []
    for p, q in itertools.permutations(log_probs, 2):
        with np.errstate(invalid="ignore"):  # 0 log 0 = 0, whatever q is
            terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
        # Also where p is so small that exp(p) is 0 in float64.
        terms[np.isneginf(q) & ~np.isneginf(p)] = np.inf
        found.append(np.mean(np.sum(terms, axis=1)))
    return float(np.mean(found))


def nll_ambiguity(log_probs: Array, labels: Array) -> float:
    """Mean NLL of the members minus the NLL of their mean probability, in nats.

    It is the gap of Jensen's inequality: never negative, and 0 if all members give the
    label the same probability, also the probability 0. It is infinite if only some
    members give a label the probability 0. Unlike the ambiguity of the Brier score it
    depends on the labels.

    Reference: Abe et al., `Deep Ensembles Work, But Are They Necessary?
    <https://arxiv.org/abs/2202.06985>`_, NeurIPS 2022.
    """
    log_probs = _checked(log_probs)
    labels = check_labels(labels, log_probs[0], log_probs.shape, "log_probs")
    of_label = log_probs[:, np.arange(len(labels)), labels]  # (M, N)
    # The mean of exp(x - max) is exactly 1 where all are equal.
    highest = np.maximum(of_label.max(axis=0), np.finfo(np.float64).min)
    below = of_label - highest
    below[:, np.isneginf(below).all(axis=0)] = 0.0
    gaps = np.log(np.exp(below).mean(axis=0)) - below.mean(axis=0)
    return float(np.mean(np.maximum(gaps, 0.0)))


def brier_ambiguity(log_probs: Array) -> float:
    """Mean Brier score of the members minus that of their mean probability.

    mean_n 1/M sum_m sum_c (p_m - mean p)^2: the members' variance, whatever the labels.
    From 0 to 1.

    Reference: Krogh & Vedelsby, "Neural Network Ensembles, Cross Validation, and Active
    Learning", NIPS 1994.
    """
    return float(np.mean(np.exp(_checked(log_probs)).var(axis=0).sum(axis=1)))


def _checked(log_probs: Array) -> np.ndarray:
    log_probs = unmasked(log_probs)
    allowed = tolerance(log_probs.dtype)
    if np.iscomplexobj(log_probs):
        raise TypeError("log_probs must be real numbers, got complex ones.")
    log_probs = np.asarray(log_probs, np.float64)
    if log_probs.ndim != 3 or log_probs.shape[0] < 2 or not log_probs.shape[1]:
        raise ValueError(
            "diversity needs log_probs of shape (M, N, C) with at least two members "
            f"and one example, got {log_probs.shape}."
        )
    for member, values in enumerate(log_probs):
        check_sample(values, True, allowed, f" of member {member}")
    return log_probs
