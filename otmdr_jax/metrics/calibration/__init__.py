"""Calibration after training: maps of logits, and sets of classes.

A calibrator is fitted on held-out logits and labels and maps logits to
log-probabilities. :func:`cross_calibrate` measures it on labels that it has not seen.
Conformal prediction gives sets and needs no calibrated probabilities.
"""

from otmdr_jax.metrics.calibration.conformal import Conformal, coverage, fit_conformal
from otmdr_jax.metrics.calibration.folds import (
    METHODS,
    CrossCalibration,
    Pair,
    cross_calibrate,
)
from otmdr_jax.metrics.calibration.isotonic import Isotonic, fit_isotonic
from otmdr_jax.metrics.calibration.scaling import (
    Scaling,
    fit_matrix,
    fit_temperature,
    fit_vector,
    log_softmax,
)

__all__ = [
    "METHODS",
    "Conformal",
    "CrossCalibration",
    "Isotonic",
    "Pair",
    "Scaling",
    "coverage",
    "cross_calibrate",
    "fit_conformal",
    "fit_isotonic",
    "fit_matrix",
    "fit_temperature",
    "fit_vector",
    "log_softmax",
]
