"""Conformal prediction: sets of classes that hold the label with a given probability.

Split conformal prediction scores how strange each class would be; the threshold is a
quantile of the labels' scores on a calibration set. If calibration and test examples
are exchangeable, the sets of new examples hold their labels with probability at least 1
- alpha, whatever the model, and at most 1 - alpha + 1 / (n + 1) if no scores tie. This
probability is over all examples, not for a given example or class.

The uniform number U that some scores draw is a hash of the example's probabilities and
of a seed. So an example has the same set in whatever batch it comes, also alone, and a
score is a function of the example, which is all that the theorem asks. (Numbers from a
generator that starts anew in each call would be the same for all examples that come one
by one: then the coverage is that of a single U, from far too little to too much.)
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from otmdr_jax.core.checks import check_word
from otmdr_jax.metrics.predictions import (
    Array,
    Predictions,
    check,
    check_labels,
    check_unlabelled,
    generator,
    unmasked,
)

Score = Literal["lac", "aps", "raps"]

# Within the grids of Angelopoulos et al., 2021, table 4.
PENALTY = 0.01
FREE_RANKS = 5


class Conformal(NamedTuple):
    """A fitted conformal predictor, the result of :func:`fit_conformal`.

    Attributes:
      threshold: The highest score of a class in the set; infinite if there are too few
        calibration examples for the level.
      score: The kind of score, "lac", "aps" or "raps".
      penalty: RAPS' lambda; 0 for the others.
      free_ranks: RAPS' k_reg, the number of classes without a penalty.
      randomised: True if APS and RAPS draw a part of the class's own probability.
      seed: The seed of what they draw.
      num_classes: The number of classes that it was fitted on.
    """

    threshold: float
    score: str
    penalty: float
    free_ranks: int
    randomised: bool
    seed: int
    num_classes: int

    def sets(self, probs: Array) -> np.ndarray:
        """The set of classes of each example, the same in whatever batch it comes.

        Args:
          probs: (N, C) probabilities, or samples (S, N, C).

        Returns:
          (N, C) bools.

        Raises:
          ValueError: Another number of classes than it was fitted on.
        """
        p = check_unlabelled(probs)
        if p.shape[1] != self.num_classes:
            raise ValueError(
                f"the predictor was fitted on {self.num_classes} classes, got "
                f"probabilities of {p.shape[1]}."
            )
        found = np.empty(p.shape, bool)
        for rows, block in p.rows():
            found[rows] = self._scores(block) <= self.threshold
        return found

    def _scores(self, probs: np.ndarray) -> np.ndarray:
        """(n, C) scores, of every class as the label."""
        if self.score == "lac":
            return 1.0 - probs
        order = np.argsort(-probs, axis=1, kind="stable")
        ordered = np.take_along_axis(probs, order, axis=1)
        before = np.cumsum(ordered, axis=1) - ordered
        own = _uniform(probs, self.seed)[:, None] if self.randomised else 1.0
        ranks = np.arange(1, probs.shape[1] + 1)
        penalty = self.penalty * np.maximum(ranks - self.free_ranks, 0)
        scores = np.empty_like(probs)
        np.put_along_axis(scores, order, before + own * ordered + penalty, axis=1)
        return scores


def fit_conformal(
    probs: Array,
    labels: Array,
    alpha: float = 0.1,
    *,
    score: Score = "aps",
    penalty: float = PENALTY,
    free_ranks: int = FREE_RANKS,
    randomised: bool = True,
    seed: int = 0,
) -> Conformal:
    r"""Fits split conformal prediction: finds the threshold on a calibration set.

    Let r(c) be the rank of class c in descending order of probability, and U uniform on
    [0, 1), a hash of the example's probabilities:

    .. math::
      s_{LAC}(c) = 1 - p_c,\quad
      s_{APS}(c) = \sum_{r(c') < r(c)} p_{c'} + U p_c,\quad
      s_{RAPS}(c) = s_{APS}(c) + \lambda \max(0, r(c) - k).

    The threshold is the k-th smallest score of the n labels, k = ceil((n + 1)(1 -
    alpha)), at least 1; for k = n + 1 all classes are in all sets. LAC's sets are the
    smallest on average, and may be empty; those of APS adapt to how hard an example is;
    those of RAPS have a short tail. Without U (`randomised=False`) sets are larger and
    cover more than required. (The released code of RAPS leaves no set empty by default;
    the theorem holds for the sets here.)

    Args:
      probs: (n, C) probabilities of examples that neither training nor temperature
        scaling have seen, or samples (S, n, C).
      labels: (n,) integers in 0..C-1.
      alpha: The fraction of labels that may be missed, in (0, 1).
      score: The kind of score, "lac", "aps" or "raps".
      penalty: RAPS' lambda.
      free_ranks: RAPS' k.
      randomised: True to draw U; False for U = 1. Examples with equal probabilities
        have the same U, so a model that predicts few different ones covers more.
      seed: The seed of U, in 0..2**32 - 1; another one gives other sets that hold as
        many labels.

    Returns:
      :class:`Conformal`, whose `sets` gives the sets of new examples.

    Raises:
      ValueError: The input is bad, the score is unknown, alpha is out of range, or the
        penalty or the seed is negative.

    Reference: Vovk et al., 2005; LAC: Sadinle, Lei & Wasserman, `Least Ambiguous
    Set-Valued Classifiers with Bounded Error Levels
    <https://arxiv.org/abs/1609.00451>`_, JASA 2019; APS: Romano, Sesia & Candès,
    `Classification with Valid and Adaptive Coverage
    <https://arxiv.org/abs/2006.02544>`_, NeurIPS 2020; RAPS: Angelopoulos et al.,
    `Uncertainty Sets for Image Classifiers using Conformal Prediction
    <https://arxiv.org/abs/2009.14193>`_, ICLR 2021.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import calibration
      >>> probs = np.array([[0.8, 0.15, 0.05]] * 9)
      >>> labels = [0, 0, 0, 0, 0, 0, 0, 1, 1]
      >>> conformal = calibration.fit_conformal(probs, labels, alpha=0.2, score="lac")
      >>> conformal.sets([[0.8, 0.15, 0.05], [0.4, 0.35, 0.25]])  # 1 - p <= 0.85
      array([[ True,  True, False],
             [ True,  True,  True]])
    """
    check_alpha(alpha)
    check_word("score", score, ("lac", "aps", "raps"))
    if not 0.0 <= penalty < math.inf or free_ranks < 0:
        raise ValueError(
            f"need penalty >= 0 and free_ranks >= 0, got {penalty} and {free_ranks}."
        )
    generator(seed)  # checks it
    p = check(probs, labels)
    penalty = penalty if score == "raps" else 0.0
    predictor = Conformal(
        math.inf, score, penalty, free_ranks, randomised, seed, p.shape[1]
    )
    return predictor._replace(threshold=_threshold(predictor, p, alpha))


def coverage(sets: Array, labels: Array) -> float:
    """The fraction of examples whose set holds their label, 0..1.

    Args:
      sets: (N, C) bools from :meth:`Conformal.sets`.
      labels: (N,) integers in 0..C-1.

    Returns:
      The fraction; the mean size of sets is `sets.sum(axis=1).mean()`.

    Raises:
      TypeError: Sets are not bools.
      ValueError: Labels are out of range, or shapes do not fit.

    Example:
      >>> from otmdr_jax import calibration
      >>> calibration.coverage([[True, False], [True, False]], [0, 1])
      0.5
    """
    sets = unmasked(sets)
    if sets.dtype != np.bool_:
        raise TypeError(f"sets must be bools, got dtype {sets.dtype}.")
    labels = check_labels(labels, sets, sets.shape, "sets")
    return float(np.mean(sets[np.arange(len(labels)), labels]))


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless alpha is in (0, 1)."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}.")


def _uniform(probs: np.ndarray, seed: int) -> np.ndarray:
    """(n,) numbers in [0, 1) that look random: hashes of the rows (n, C).

    A sum of odd multiples of the bits modulo 2^64, then the finaliser of splitmix64
    (Steele, Lea & Flood, 2014), of whose result the upper 53 bits count.
    """
    rng = generator(seed)
    factors = rng.integers(2**64, size=probs.shape[1] + 1, dtype=np.uint64) | 1
    bits = (probs + 0.0).view(np.uint64)  # of 0 where it is -0
    found = (bits ^ bits >> np.uint64(32)) @ factors[1:] + factors[0]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ found >> np.uint64(shift)) * np.uint64(factor)
    return ((found ^ found >> np.uint64(31)) >> np.uint64(11)) * 2.0**-53


def _threshold(predictor: Conformal, p: Predictions, alpha: float) -> float:
    of_labels = np.concatenate(
        [
            predictor._scores(block)[np.arange(len(block)), p.labels[rows]]
            for rows, block in p.rows()
        ]
    )
    # If (n + 1)(1 - alpha) should be whole, rounding may put it just above.
    k = max(1, math.ceil((len(of_labels) + 1) * (1.0 - alpha) - 1e-9))
    return float(np.sort(of_labels)[k - 1]) if k <= len(of_labels) else math.inf
