"""Isotonic regression: any increasing map of each class's probability."""

import dataclasses
from typing import Any

import numpy as np

from otmdr_jax.io import extras
from otmdr_jax.metrics.calibration.scaling import check_logits, log_softmax
from otmdr_jax.metrics.predictions import Array, check_labels


@dataclasses.dataclass(frozen=True)
class Isotonic:
    """A calibrator: logits (N, C) to log-probabilities (N, C), in float64.

    Attributes:
      of_classes: scikit-learn's regression of each class.
    """

    of_classes: list[Any]

    def __call__(self, logits: Array) -> np.ndarray:
        """The calibrated log-probabilities, of probabilities divided by their sum."""
        probs = np.exp(log_softmax(check_logits(logits)))
        if probs.shape[1] != len(self.of_classes):
            raise ValueError(
                f"the regression was fitted on {len(self.of_classes)} classes, got "
                f"logits of {probs.shape[1]}."
            )
        columns = zip(self.of_classes, probs.T, strict=True)
        mapped = np.stack([fit.predict(column) for fit, column in columns], axis=1)
        return np.log(mapped / mapped.sum(axis=1, keepdims=True))


def fit_isotonic(logits: Array, labels: Array) -> Isotonic:
    """Isotonic regression of each class against the rest, then division by the sum.

    It fits step functions, so it can correct any shape of miscalibration, but it needs
    some thousand examples and changes accuracy. A block of examples without the class
    would give probability 0 and an infinite NLL, so values stay 1 / (n + 2) away from 0
    and 1, which is Laplace's rule of succession for a block of all n examples
    (scikit-learn's `CalibratedClassifierCV` keeps the zeros).

    Args:
      logits: (N, C) logits or log-probabilities, held out from training.
      labels: (N,) integers in 0..C-1.

    Returns:
      :class:`Isotonic`.

    Raises:
      ImportError: scikit-learn is not installed.
      ValueError: Bad input, as in
        :func:`otmdr_jax.metrics.calibration.fit_temperature`.

    Reference: Zadrozny & Elkan, `Transforming Classifier Scores into Accurate
    Multiclass Probability Estimates <https://doi.org/10.1145/775047.775151>`_, KDD
    2002.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import calibration
      >>> logits = np.array([[4.0, 0.0], [0.0, 4.0]] * 4)
      >>> isotonic = calibration.fit_isotonic(logits, [0, 1, 0, 1, 0, 1, 1, 0])
      >>> np.exp(isotonic(logits[:2])).round(4)[:, 0]
      array([0.75, 0.25])
    """
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError:
        raise ImportError(
            f"isotonic regression needs scikit-learn. {extras.command('train')}"
        ) from None
    logits = check_logits(logits)
    labels = check_labels(labels, logits, logits.shape, "logits")
    floor = 1.0 / (len(labels) + 2)
    of_classes = []
    for c, column in enumerate(np.exp(log_softmax(logits)).T):
        fit = IsotonicRegression(y_min=floor, y_max=1.0 - floor, out_of_bounds="clip")
        of_classes.append(fit.fit(column, labels == c))
    return Isotonic(of_classes)
