"""Predictions of a training state: each image once, in batches of one size.

An ensemble, a posterior and other samples predict by their mean probability. `without`
names members that have diverged: they do not count in it.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from otmdr_jax import data as data_lib
from otmdr_jax import metrics, parallel
from otmdr_jax.data import Split
from otmdr_jax.experiments import members as members_lib
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.programs import Programs
from otmdr_jax.metrics import uncertainty
from otmdr_jax.metrics.predictions import mean_of_samples

PyTree = Any

# Of entropies in float64, far below any that matters.
_ROUNDING = 1e-12


class Predicted(NamedTuple):
    """The result of :func:`predict` for M members; a single model has M = 1.

    Where targets are no classes it holds outputs, and their means, in the place of
    log-probabilities.

    Attributes:
      log_probs: (N, C) logarithms of the mean probability over the members that count.
      members: (M, N, C) logarithms of each member's mean probability over its samples.
      within: (M, N) mean entropies of each member's samples; None if it has only one.
      kept: Indices of the members that count.
      classes: Whether there are classes.
    """

    log_probs: np.ndarray
    members: np.ndarray
    within: np.ndarray | None
    kept: list[int]
    classes: bool = True

    def mutual_information(self) -> np.ndarray | None:
        """Returns the mutual information over all samples of the members that count.

        It equals :func:`otmdr_jax.metrics.mutual_information` of the samples: (N,), in
        nats; None if there is a single sample.
        """
        kept = self.members[self.kept]
        if (
            not self.classes
            or np.isnan(kept).any()
            or (self.within is None and len(kept) == 1)
        ):
            return None
        if not kept.size:
            return np.zeros(0)
        if self.within is None:
            return uncertainty.comparable_information(np.exp(kept))
        total = metrics.entropy(np.exp(self.log_probs))
        found = total - np.mean(self.within[self.kept], axis=0)
        # A difference of equal entropies is rounding, which must not rank examples.
        return np.where(found < _ROUNDING, 0.0, found)


def predict(
    config: TrainConfig,
    state: PyTree,
    examples: Split,
    programs: Programs,
    *,
    without: tuple[int, ...] = (),
    change: Callable[[jax.Array, int], jax.Array] | None = None,
    report: Callable[[int], None] | None = None,
    batch_size: int | None = None,
) -> Predicted:
    """Predicts each example once, without its label.

    Args:
      config: The run's configuration.
      state: Its state, finalized if the method asks for it
        (:meth:`otmdr_jax.experiments.methods.MethodOptions.finalize`).
      examples: Images of the shape that the programs were compiled for.
      programs: Compiled functions.
      without: Indices of the members that have diverged.
      change: Function (images, first) -> images that changes each batch on the device;
        `first` is the index of the batch's first example. It also sees the images that
        pad the last batch.
      report: Function that is called with the number of finished examples.
      batch_size: Examples a batch, the last one filled up. Default: the run's
        `eval_batch_size`, or all examples if they are fewer.

    Returns:
      A :class:`Predicted`.
    """
    collected = members_lib.num_collected(config, state)
    count = members_lib.num_predicting(config, collected)
    chunks: list[tuple[np.ndarray, np.ndarray | None]] = []
    mesh, done = programs.mesh, 0

    def fetch(log_probs, mask):
        nonlocal done
        samples = np.asarray(log_probs)[:, mask]
        samples = members_lib.without_empty(config, samples, collected)
        chunks.append(_by_member(samples, count, programs.classes))
        done += int(np.count_nonzero(mask))
        if report is not None:
            report(done)

    # Fetching lags one batch behind, so the device works while the host sends the next.
    ahead: collections.deque[Any] = collections.deque()
    first = 0
    if batch_size is None:
        batch_size = min(config.run.eval_batch_size, examples.num_examples)
    for images, _, mask in eval_batches(batch_size, examples, mesh):
        images = parallel.place(images, mesh, parallel.data_spec(mesh))
        if change is not None:
            images = change(images, first)
        ahead.append((programs.predict(state, images), mask))
        first += len(mask)
        if len(ahead) > 1:
            fetch(*ahead.popleft())
    fetch(*ahead.popleft())
    members = np.concatenate([means for means, _ in chunks], axis=1)  # (M, N, C)
    entropies = [x for _, x in chunks if x is not None]
    within = np.concatenate(entropies, axis=1) if entropies else None  # (M, N)
    kept = [m for m in range(count) if m not in without] or list(range(count))
    mean: Any = _mean if programs.classes else functools.partial(np.mean, axis=0)
    return Predicted(mean(members[kept]), members, within, kept, programs.classes)


def _by_member(samples, count, classes):
    """Reduces a batch's samples to members. # (M S, B, C) -> (M, B, C), (M, B).

    Returns the logarithm of each member's mean probability, and the mean entropy of its
    samples, which is None for a single sample.
    """
    samples = samples.reshape(count, -1, *samples.shape[1:]).astype(np.float64)
    if not classes:
        return samples.mean(axis=1), None
    means = np.stack([_mean(own) for own in samples])
    if samples.shape[1] == 1:
        return means, None
    within = np.full(means.shape[:2], np.nan)
    for m, own in enumerate(samples):
        if not np.isnan(own).any():
            each = [metrics.entropy(np.exp(sample)) for sample in own]
            within[m] = np.mean(each, axis=0)
    return means, within


def _mean(samples):
    """The logarithm of the mean of S probabilities. # (S, N, C) -> (N, C)."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN: see _metrics
        total = mean_of_samples(samples, log_probs=True)
        return total - np.logaddexp.reduce(total, axis=-1, keepdims=True)


def eval_batches(size, split, mesh):
    """Returns batches for evaluation, of the next multiple of the devices."""
    devices = parallel.axis_size(mesh, "data")
    return data_lib.eval_batches(split, -(-size // devices) * devices)
