"""Evaluates a state on every shifted version of its test set, as one record."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from otmdr_jax import data as data_lib
from otmdr_jax.data import CORRUPTIONS, SEVERITIES, Dataset, LazyImages, Split
from otmdr_jax.experiments import options, prediction
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import evaluation
from otmdr_jax.experiments.measure.shift import detection, sets
from otmdr_jax.experiments.members import steps_taken
from otmdr_jax.experiments.programs import Programs, compile_programs
from otmdr_jax.io.progress import Progress

PyTree = Any


def evaluate(
    config: TrainConfig,
    state: PyTree,
    dataset: Dataset,
    programs: Programs | None = None,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    other_sets: Sequence[str] = (sets.AUTO,),
    ood: Sequence[str] = (sets.AUTO,),
    max_examples: int | None = None,
    seed: int = 0,
    without: tuple[int, ...] = (),
    show_progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a state on shifted versions of its test set.

    Images are corrupted on the device batch by batch. Nothing is downloaded.

    Args:
      config: The run's configuration. Its data_dir and cache_dir are the folders that
        hold the sets of TFDS.
      state: Its state, of one model, an ensemble or a posterior.
      dataset: Its data.
      programs: Compiled functions. Default: compiles them.
      corruptions: Names among :data:`otmdr_jax.data.CORRUPTIONS`. Default: all.
      severities: Numbers among 1..5. Default: all.
      other_sets: Names of other test sets of the same classes, as in
        :func:`otmdr_jax.data.load_test`. "auto" means, for CIFAR-10, those of
        CIFAR-10.1 and CIFAR-10-C that are prepared, and none for other data.
      ood: Names of sets of other classes. "auto" means uniform noise and, for images of
        CIFAR's shape, SVHN, CIFAR-10 and CIFAR-100, except the run's own.
      max_examples: Largest number of examples of each set, evenly spread. Default: all.
      seed: Seed of the noise, and of the direction in which an image is rotated.
      without: Indices of the members that have diverged; they do not count in the
        prediction of the ensemble.
      show_progress: Whether to show progress.

    Returns:
      The record, as in shift.json: step, split ("test"), num_examples, seed; clean, the
      metrics of :func:`otmdr_jax.experiments.measure.evaluation.evaluate`; corruptions,
      a row for each kind and severity; sets, a row for each set; ood, a row for each
      set and score, with auroc, aupr and fpr95, see
      :func:`otmdr_jax.experiments.measure.shift.detect`; missing, {"name", "why"} for
      each set of "auto" that is not prepared.

    Raises:
      FileNotFoundError, ImportError: A named set is missing; the message says how to
        prepare it.
      ValueError: A corruption or severity is unknown; a named set has images of another
        shape or other classes; or images are neither uint8 nor in [0, 1], and therefore
        cannot be corrupted.
      TypeError: The images of a set have another dtype.
    """
    options.check("seed", seed, options.Seed)
    names, levels = check(corruptions, severities, max_examples)
    if names:
        _check_range(dataset.test)
    others = sets.find_sets(other_sets, levels, dataset, config.data.data_dir)
    outside = sets.find_ood(ood, dataset, config.data.data_dir)
    programs = compile_programs(config, dataset) if programs is None else programs
    test = sets.spread(dataset.test, max_examples)
    counts = [test.num_examples] * (1 + len(names) * len(levels))
    found_counts = [n for _, n in (*others.present, *outside.present)]
    counts += [min(n, max_examples or n) for n in found_counts]
    read = functools.partial(
        sets.read,
        dataset=dataset,
        data_dir=config.data.data_dir,
        cache_dir=config.data.cache_dir,
        max_examples=max_examples,
        seed=seed,
    )
    with Progress(sum(counts), 0, "shift", show_progress, "images") as bar:
        predict = _Predict(config, state, programs, without, bar)
        clean = predict(test)
        rows = {
            "corruptions": [
                {"name": name, "severity": severity}
                | predict.metrics(test, _corruption(name, severity, seed))
                for name in names
                for severity in levels
            ],
            "sets": [
                _row_of_set(predict, name, read(name)) for name, _ in others.present
            ],
            "ood": [
                row
                for name, _ in outside.present
                for row in _rows_of_ood(predict, clean, name, read(name))
            ],
        }
    return {
        "step": steps_taken(state),
        "split": "test",
        "num_examples": test.num_examples,
        "seed": seed,
        "clean": evaluation.measure(config, clean, test.labels).metrics,
        **rows,
        "missing": [*others.missing, *outside.missing],
    }


def check(
    corruptions: Sequence[str], severities: Sequence[int], max_examples: int | None
) -> tuple[list[str], list[int]]:
    """Checks options before anything is loaded; raises ValueError if one is wrong.

    Args:
      corruptions: Names of corruptions.
      severities: Severities of the corruptions.
      max_examples: Largest number of examples, or None.

    Returns:
      The names and the severities.
    """
    names = _once("corruptions", map(data_lib.check_corruption, corruptions))
    levels = _once("severities", map(data_lib.check_severity, severities))
    if names and not levels:
        raise ValueError("corruptions need severities: name some of 1..5.")
    options.check("max_examples", max_examples, options.Count | None)
    return names, levels


@dataclasses.dataclass
class _Predict:
    """Predicts one set after the other, under one progress bar."""

    config: TrainConfig
    state: PyTree
    programs: Programs
    without: tuple[int, ...]
    bar: Progress
    done: int = 0

    def __call__(self, examples: Split, change=None) -> prediction.Predicted:
        found = prediction.predict(
            self.config,
            self.state,
            examples,
            self.programs,
            without=self.without,
            change=change,
            report=lambda finished: self.bar.update(self.done + finished, {}),
        )
        self.done += examples.num_examples
        return found

    def metrics(self, examples: Split, change=None) -> dict[str, float]:
        found = self(examples, change)
        return evaluation.measure(self.config, found, examples.labels).metrics


def _row_of_set(predict: _Predict, name: str, examples: Split) -> dict[str, Any]:
    row = {"name": name, "num_examples": examples.num_examples}
    return row | predict.metrics(examples)


def _rows_of_ood(
    predict: _Predict, clean: prediction.Predicted, name: str, examples: Split
) -> list[dict[str, Any]]:
    """Returns one row for each score."""
    inside, outside = detection.scores(clean), detection.scores(predict(examples))
    row = {"name": name, "num_examples": examples.num_examples}
    return [
        {**row, "score": score, **detection.detect(inside[score], outside[score])}
        for score in inside
        if score in outside
    ]


def _corruption(name: str, severity: int, seed: int) -> Callable[..., jax.Array]:
    # Each kind has its own stream, so that leaving one out does not change the others.
    key = jax.random.fold_in(jax.random.key(seed), CORRUPTIONS.index(name))
    return lambda images, first: data_lib.corrupt(key, images, name, severity, first)


def _once(what: str, values) -> list:
    found = list(values)
    if len(set(found)) < len(found):
        raise ValueError(f"{what} must be named once each, got {found}.")
    return found


def _check_range(test: Split) -> None:
    """Refuses floats outside [0, 1], because corruptions do not know their scale."""
    if isinstance(test.images, LazyImages) or test.images.dtype == np.uint8:
        return
    low, high = float(np.min(test.images)), float(np.max(test.images))
    if low < 0.0 or high > 1.0:
        raise ValueError(
            "images that are corrupted must be uint8 or floats in [0, 1], and the test "
            f"set has floats in [{low:.4g}, {high:.4g}]. Save them as uint8, or leave "
            "corruptions out: corruptions=(), on the command line --corruptions."
        )
