"""The uncertainty of each prediction: entropy and mutual information."""

from collections.abc import Callable, Iterator

import numpy as np

from otmdr_jax.metrics.predictions import Array, Predictions, check_unlabelled


def entropy(probs: Array) -> np.ndarray:
    """Entropy of each prediction in nats: -sum_c p log p, 0..log C.

    0 log 0 counts as 0. For samples it is the entropy of their mean probability, the
    total uncertainty. Some divide by log C.

    Args:
      probs: (N, C) probabilities, or samples (S, N, C).

    Returns:
      (N,) entropies; tables show their mean.

    Reference: Shannon, 1948.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import metrics
      >>> np.exp(metrics.entropy([[0.5, 0.5], [1.0, 0.0]])).round(6)
      array([2., 1.])
    """
    p = check_unlabelled(probs)
    return _of_rows(_entropy, p.rows(), p.shape[0])


def mutual_information(samples: Array) -> np.ndarray:
    r"""The disagreement of each example's samples, in nats, 0..log min(S, C).

    .. math:: I = H\Bigl[\frac{1}{S} \sum_s p_s\Bigr] - \frac{1}{S} \sum_s H[p_s]

    for members of an ensemble, or for particles or weights drawn from a posterior. It
    is the part of the entropy that comes from not knowing the model (epistemic; BALD).
    The rest, the mean entropy, comes from the data. With M members it is the
    Jensen-Shannon divergence.

    Args:
      samples: (S, N, C) probabilities.

    Returns:
      (N,) mutual informations, exactly 0 where all samples are equal.

    Raises:
      ValueError: There is no axis of samples, or a sample is no distribution.

    Reference: Houlsby et al., `Bayesian Active Learning for Classification and
    Preference Learning <https://arxiv.org/abs/1112.5745>`_, 2011; Depeweg et al., ICML
    2018.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import metrics
      >>> found = metrics.mutual_information([[[1.0, 0.0]], [[0.0, 1.0]]])
      >>> np.exp(found).round(6)
      array([2.])
    """
    p = _with_samples(samples)
    return _of_rows(_information, p.rows_of_samples(), p.shape[0])


def comparable_entropy(p: Predictions) -> np.ndarray:
    """:func:`entropy`, the same to the bit for any order of classes and samples."""
    return _of_rows(_entropy, p.sorted_rows(), p.shape[0])


def comparable_information(samples: Array) -> np.ndarray:
    """:func:`mutual_information`, the same to the bit for any order of both."""
    p = _with_samples(samples)

    def of_sorted(block: np.ndarray) -> np.ndarray:
        return _information(np.sort(block, axis=0), np.sort)

    return _of_rows(of_sorted, p.rows_of_samples(), p.shape[0])


def _with_samples(samples: Array) -> Predictions:
    p = check_unlabelled(samples)
    if p.samples is None:
        raise ValueError(
            "mutual_information needs samples of shape (S, N, C), got "
            f"{p.shape}: of one prediction there is none."
        )
    return p


def _of_rows(
    measure: Callable[[np.ndarray], np.ndarray],
    blocks: Iterator[tuple[slice, np.ndarray]],
    count: int,
) -> np.ndarray:
    found = np.empty(count)
    for rows, block in blocks:
        found[rows] = measure(block)
    return found


def _log(p: np.ndarray) -> np.ndarray:
    """The logarithm, 0 at 0, where it is multiplied by 0."""
    return np.log(p, out=np.zeros_like(p), where=p > 0.0)


def _entropy(p: np.ndarray) -> np.ndarray:
    """(n, C) -> (n,). A probability above 1 by rounding counts as 1."""
    p = np.minimum(p, 1.0, out=p)
    return 0.0 - np.einsum("nc,nc->n", p, _log(p))


def _information(
    p: np.ndarray, order: Callable[[np.ndarray], np.ndarray] = lambda terms: terms
) -> np.ndarray:
    """(S, n, C) -> (n,), by the terms p_s (log p_s - log mean) of each class."""
    mean = p[0] + (p - p[0]).mean(axis=0)  # to the bit where samples are equal
    terms = (p * (_log(p) - _log(mean))).mean(axis=0)
    return np.maximum(order(terms).sum(axis=1), 0.0)
