"""Evaluation under distribution shift: images unlike those of the training set.

    run = restore.open_run("runs/mine")
    record = shift.evaluate(run.config, run.state, run.dataset, run.programs)
    record["clean"]["accuracy"], [row["accuracy"] for row in record["corruptions"]]

There are three kinds of shift: corruptions of the test set, computed on the device
(:func:`otmdr_jax.data.corrupt`); other test sets of the same classes (CIFAR-10.1,
CIFAR-10-C); and sets of other classes, on which a model should be uncertain.
"""

from otmdr_jax.experiments.measure.shift.detection import SCORES, detect, scores
from otmdr_jax.experiments.measure.shift.evaluation import check, evaluate
from otmdr_jax.experiments.measure.shift.sets import AUTO, CIFAR10_C, UNIFORM_NOISE

__all__ = [
    "AUTO",
    "CIFAR10_C",
    "SCORES",
    "UNIFORM_NOISE",
    "check",
    "detect",
    "evaluate",
    "scores",
]
