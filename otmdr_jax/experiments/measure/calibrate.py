"""Calibration of a finished run: its raw and calibrated metrics, and conformal sets."""

import functools
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments import restore, run_folder
from otmdr_jax.experiments.measure import evaluation
from otmdr_jax.experiments.options import Seed, check
from otmdr_jax.metrics import calibration
from otmdr_jax.metrics.calibration import conformal

# The metrics of a record. AUROC is missing: it ranks examples, and a temperature hardly
# changes their order.
SHOWN = ("accuracy", "nll", "brier", "ece", "sce", "ace", "tace", "aac")
SCORES: tuple[conformal.Score, ...] = ("lac", "aps", "raps")


def calibrate(
    folder: str | os.PathLike,
    methods: Sequence[str] = tuple(calibration.METHODS),
    *,
    fit: str = "folds",
    num_repeats: int = 5,
    alpha: float = 0.1,
    seed: int = 0,
    data_dir: str | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Measures a finished run on its test set, before and after calibration.

    Args:
      folder: The run's folder.
      methods: Names among "temperature", "vector", "matrix" and "isotonic".
      fit: Protocol. "folds" fits on one half of the test set and measures on the other,
        both ways, `num_repeats` times. "validation" fits on the run's validation set
        and measures on the whole test set.
      num_repeats: Number of splits into halves. Default: 5, the protocol of the field.
      alpha: Share of labels that conformal sets may miss.
      seed: Seed of the halves, and of the randomised conformal scores.
      data_dir: Folder of prepared TFDS data, which "validation" reads.
      show_progress: Whether to show the progress of an evaluation.

    Returns:
      A record: `how` (the protocol in words), `num_examples`, `num_repeats`, `seed`,
      `alpha`, `methods` and `conformal`; with temperature scaling also `temperature`,
      that of predictions of new images, fitted to all of the test set or of the
      validation set (None if the fit failed, or if no temperature is best, as where all
      predictions are right). Each entry of `methods` has a `name`. If the fit failed,
      `why` says the reason. Otherwise the entry has `metrics` (name -> raw, calibrated,
      raw_std, calibrated_std; the deviations are None for "validation"), a `note` if
      the fit did not converge or made the NLL worse and, for temperature scaling, the
      mean `temperature` of the fits. Each entry of `conformal` has a score, its
      coverage and its mean set size.

    Raises:
      FileNotFoundError: The folder is no run, or the run is not finished.
      ValueError: A name is unknown, num_repeats is below 1, alpha is outside (0, 1),
        predictions are not finite, or the run has no validation set.
    """
    check("seed", seed, Seed)
    if fit not in ("folds", "validation"):
        raise ValueError(f"fit must be 'folds' or 'validation', got {fit!r}.")
    if unknown := [name for name in methods if name not in calibration.METHODS]:
        known = ", ".join(calibration.METHODS)
        raise ValueError(f"methods must be some of {known}; got {', '.join(unknown)}.")
    if not methods:
        raise ValueError("name at least one method of calibration.")
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats}.")
    conformal.check_alpha(alpha)
    run_folder.check_classes(folder, "calibration")
    log_probs, labels = _test_predictions(pathlib.Path(folder))
    record: dict[str, Any] = {
        "fit": fit,
        "num_examples": len(labels),
        "num_repeats": num_repeats if fit == "folds" else None,
        "alpha": alpha,
        "seed": seed,
    }
    if fit == "folds":
        record["how"] = f"2 folds x {num_repeats} of {len(labels)} test examples"
        sets = _sets_on_folds(log_probs, labels, alpha, num_repeats, seed)
        found = [
            _on_folds(name, log_probs, labels, num_repeats, seed) for name in methods
        ]
    else:
        held_out = _validation_predictions(folder, data_dir, show_progress)
        record["how"] = (
            f"fitted on {len(held_out[1])} validation examples, measured on "
            f"{len(labels)} test examples"
        )
        found = [_held_out(name, held_out, (log_probs, labels)) for name in methods]
        sets = _sets(np.exp(held_out[0]), held_out[1], np.exp(log_probs), alpha, seed)
        sets = [(name, *_coverage_and_size(s, labels)) for name, s in sets]
    if "temperature" in methods:
        # It is for new images: all labels that are known may be fitted to.
        fitted: Any = (log_probs, labels) if fit == "folds" else held_out
        record["temperature"] = _temperature(*fitted)
    return record | {
        "methods": found,
        "conformal": [
            {"score": name, "coverage": covered, "size": size}
            for name, covered, size in sets
        ],
    }


def _test_predictions(folder):
    if not run_folder.is_run(folder) or not (folder / "predictions.npz").is_file():
        run_folder.read_config(folder)  # raises if the folder is no run
        raise FileNotFoundError(
            f"{folder} has no predictions.npz: finish the run, or write the file with "
            f"`otmdr evaluate {folder}`."
        )
    log_probs, labels = run_folder.read_predictions(folder)
    log_probs = log_probs.astype(np.float64)
    if not np.isfinite(log_probs.max(axis=1)).all():
        raise ValueError(
            f"{folder} predicts NaN: it diverged, so it cannot be calibrated."
        )
    return calibration.log_softmax(log_probs), labels


def _validation_predictions(folder, data_dir, show_progress):
    given = {} if data_dir is None else {"data_dir": data_dir}
    run = restore.open_run(folder, split="validation", **given)
    found = evaluation.evaluate(
        run.config,
        run.state,
        run.dataset,
        "validation",
        run.programs,
        without=run.diverged,
        show_progress=show_progress,
    )
    assert run.dataset.validation is not None
    return found.log_probs, np.asarray(run.dataset.validation.labels)


# By less the NLL may rise where there was nothing to calibrate.
_WORSE = 1.02

_measure = functools.partial(metrics.summary, log_probs=True)


def _on_folds(name, log_probs, labels, num_repeats, seed):
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = calibration.cross_calibrate(
                log_probs,
                labels,
                name,
                measure=_measure,
                num_repeats=num_repeats,
                seed=seed,
            )
    except (ValueError, RuntimeError) as error:
        return {"name": name, "why": str(error)}
    nll = found.metrics["nll"]
    row: dict[str, Any] = {
        "name": name,
        **_note(name, caught, nll.raw, nll.calibrated, len(labels) // 2),
        "metrics": {metric: found.metrics[metric]._asdict() for metric in SHOWN},
    }
    if name == "temperature":
        row["temperature"] = float(np.mean([1 / c.weight for c in found.calibrators]))
    return row


def _temperature(log_probs, labels):
    """The temperature of new images; None where none is best, or can be fitted."""
    try:
        with warnings.catch_warnings():
            # It warns of the end of its range, where it is no optimum: all images are
            # right, say, and new ones will not be. The fit's note tells it.
            warnings.simplefilter("error", UserWarning)
            return float(calibration.fit_temperature(log_probs, labels))
    except (ValueError, RuntimeError, UserWarning):
        return None


def _held_out(name, held_out, test):
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            calibrator: Any = calibration.METHODS[name](*held_out)
    except (ValueError, RuntimeError) as error:
        return {"name": name, "why": str(error)}
    log_probs, labels = test
    raw, calibrated = (
        _measure(log_probs, labels),
        _measure(calibrator(log_probs), labels),
    )
    row: dict[str, Any] = {
        "name": name,
        **_note(name, caught, raw["nll"], calibrated["nll"], len(held_out[1])),
        "metrics": {
            metric: {
                "raw": raw[metric],
                "calibrated": calibrated[metric],
                "raw_std": None,
                "calibrated_std": None,
            }
            for metric in SHOWN
        },
    }
    if name == "temperature":
        row["temperature"] = float(1 / calibrator.weight)
    return row


def _note(name, caught, raw, calibrated, count):
    """Explains a fit that makes predictions worse, or has no optimum."""
    found = dict.fromkeys(
        str(warning.message)
        for warning in caught
        if issubclass(warning.category, UserWarning)
    )
    if calibrated > _WORSE * raw:
        found[
            f"the NLL of examples that it was not fitted on rises from {raw:.4g} to "
            f"{calibrated:.4g}. Its fit needs more than {count} examples."
        ] = None
    return {"note": f"{name}: {' '.join(found)}"} if found else {}


def _sets_on_folds(log_probs, labels, alpha, num_repeats, seed):
    """Returns (score, coverage, mean set size) of each score, averaged over folds."""
    probs, rng = np.exp(log_probs), np.random.default_rng(seed)
    found: dict[str, list] = {score: [] for score in SCORES}
    for _ in range(num_repeats):
        halves = np.array_split(rng.permutation(len(labels)), 2)
        for fitted, measured in (halves, halves[::-1]):
            for score, sets in _sets(
                probs[fitted], labels[fitted], probs[measured], alpha, seed
            ):
                found[score].append(_coverage_and_size(sets, labels[measured]))
    return [(score, *np.mean(rows, axis=0).tolist()) for score, rows in found.items()]


def _sets(probs, labels, test_probs, alpha, seed):
    for score in SCORES:
        fitted = conformal.fit_conformal(probs, labels, alpha, score=score, seed=seed)
        yield score, fitted.sets(test_probs)


def _coverage_and_size(sets, labels):
    return conformal.coverage(sets, labels), float(sets.sum(axis=1).mean())
