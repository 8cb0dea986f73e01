"""The uncertainty of each prediction: entropy and mutual information."""

import numpy as np

from otmdr_jax.metrics.predictions import Array, check_unlabelled


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
    found = np.empty(p.shape[0])
    for rows, block in p.rows():
        # Where p is 0 its logarithm is never taken, and the product is 0.
        logs = np.log(block, out=np.zeros_like(block), where=block > 0.0)
        found[rows] = 0.0 - np.einsum("nc,nc->n", block, logs)
    return found


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
      (N,) mutual informations.

    Raises:
      ValueError: There is no axis of samples.

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
    samples = np.asarray(samples)
    if samples.ndim != 3:
        raise ValueError(
            "mutual_information needs samples of shape (S, N, C), got "
            f"{samples.shape}: of one prediction there is none."
        )
    within = np.mean([entropy(sample) for sample in samples], axis=0)
    return np.maximum(entropy(samples) - within, 0.0)
