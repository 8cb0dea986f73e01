"""The effect of calibration, fitted on some folds and measured on another.

A calibrator that is measured on the examples it was fitted on has seen their labels.
The usual protocol cuts the test set into two halves, fits on one and measures on the
other, both ways, five times.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.core.checks import check_count
from otmdr_jax.metrics.calibration.isotonic import fit_isotonic
from otmdr_jax.metrics.calibration.scaling import (
    Scaling,
    check_logits,
    fit_matrix,
    fit_temperature,
    fit_vector,
    log_softmax,
)
from otmdr_jax.metrics.predictions import Array, check_labels, generator

# From logits to log-probabilities.
Calibrator = Callable[[Array], np.ndarray]


def _temperature(logits: Array, labels: Array) -> Calibrator:
    weight = 1.0 / fit_temperature(logits, labels)
    return Scaling(np.asarray(weight), np.zeros(()))


METHODS: dict[str, Callable[[Array, Array], Calibrator]] = {
    "temperature": _temperature,
    "vector": fit_vector,
    "matrix": fit_matrix,
    "isotonic": fit_isotonic,
}


class Pair(NamedTuple):
    """A metric before and after calibration, over the same folds.

    Attributes:
      raw: Mean over folds of the metric as it is.
      calibrated: Mean over folds of the metric after calibration.
      raw_std: Standard deviation of the former over folds, with n - 1.
      calibrated_std: That of the latter.
    """

    raw: float
    calibrated: float
    raw_std: float
    calibrated_std: float


class CrossCalibration(NamedTuple):
    """The result of :func:`cross_calibrate`.

    Attributes:
      metrics: Name -> :class:`Pair`.
      calibrators: One calibrator for each fold and repeat; for temperature scaling `1 /
        calibrator.weight` is the temperature.
    """

    metrics: dict[str, Pair]
    calibrators: list[Any]


def cross_calibrate(
    logits: Array,
    labels: Array,
    method: str | Callable[[Array, Array], Calibrator] = "temperature",
    *,
    measure: Callable[[Array, Array], dict[str, float]] = metrics.evaluate,
    num_folds: int = 2,
    num_repeats: int = 5,
    seed: int = 0,
) -> CrossCalibration:
    """Metrics before and after calibration, on labels that the fit has not seen.

    In each of the repeats the examples are shuffled and cut into folds whose sizes
    differ by at most one. For each fold the calibrator is fitted on the others; then
    both the raw and the calibrated predictions are measured on it. Raw values are those
    of folds too, so that the two can be compared: an ECE of half the examples is larger
    than that of all.

    Args:
      logits: (N, C) logits or log-probabilities; for an ensemble the logarithm of its
        mean probability.
      labels: (N,) integers in 0..C-1.
      method: A name, "temperature", "vector", "matrix" or "isotonic", or a function of
        logits and labels that returns a function from logits to log-probabilities.
      measure: A function (log-probabilities, labels) -> name -> value; for all metrics
        `functools.partial(metrics.summary, log_probs=True)`.
      num_folds: The number of folds, usually 2.
      num_repeats: The number of repeats, usually 5.
      seed: The seed of the shuffles, in 0..2**32 - 1.

    Returns:
      :class:`CrossCalibration`.

    Raises:
      ValueError: The input is bad, the method is unknown, or there are fewer than two
        folds, one repeat, or as many examples as folds.

    Reference: Ashukha et al., `Pitfalls of In-Domain Uncertainty Estimation and
    Ensembling in Deep Learning <https://arxiv.org/abs/2002.06470>`_, ICLR 2020.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import calibration
      >>> rng = np.random.default_rng(0)
      >>> logits = rng.normal(size=(400, 3))
      >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
      >>> found = calibration.cross_calibrate(3 * logits, labels)  # too sure by 3
      >>> found.metrics["nll"].calibrated < found.metrics["nll"].raw
      True
    """
    rng = generator(seed)
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"method must be one of {', '.join(METHODS)}, or a function, got "
                f"{method!r}."
            )
        method = METHODS[method]
    logits = check_logits(logits)
    labels = check_labels(labels, logits, logits.shape, "logits")
    check_count("num_repeats", num_repeats)
    check_count("num_folds", num_folds)
    if not 2 <= num_folds <= len(labels):
        raise ValueError(
            f"need 2 <= num_folds <= N, got {num_folds = } for N = {len(labels)}."
        )
    raw, calibrated, calibrators = [], [], []
    for _ in range(num_repeats):
        folds = np.array_split(rng.permutation(len(labels)), num_folds)
        for i, held_out in enumerate(folds):
            rest = np.concatenate([x for j, x in enumerate(folds) if j != i])
            calibrator = method(logits[rest], labels[rest])
            calibrators.append(calibrator)
            raw.append(measure(log_softmax(logits[held_out]), labels[held_out]))
            calibrated.append(measure(calibrator(logits[held_out]), labels[held_out]))
    pairs = {}
    for name in raw[0]:
        before, after = ([row[name] for row in rows] for rows in (raw, calibrated))
        with np.errstate(invalid="ignore"):  # of infinite values there is no deviation
            spread = np.std(before, ddof=1), np.std(after, ddof=1)
        pairs[name] = Pair(_mean(before), _mean(after), *map(float, spread))
    return CrossCalibration(pairs, calibrators)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
