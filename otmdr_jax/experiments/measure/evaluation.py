"""Predictions and metrics of a training state over whole sets.

The metrics of an ensemble are those of its mean probability; the metrics of each member
and of their diversity stand beside them. The metrics of a posterior are those of the
mean probability of its samples; the two kinds of uncertainty stand beside them.

`without` names members that have diverged: they do not count in the prediction of the
ensemble.
"""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from otmdr_jax import data as data_lib
from otmdr_jax import metrics, parallel
from otmdr_jax.data import Dataset, Split
from otmdr_jax.experiments import members as members_lib
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.programs import Programs, compile_programs
from otmdr_jax.io.progress import Progress
from otmdr_jax.metrics import diversity, uncertainty
from otmdr_jax.metrics.predictions import mean_of_samples

PyTree = Any


# Of entropies in float64, far below any that matters.
_ROUNDING = 1e-12


class Evaluation(NamedTuple):
    """The result of :func:`evaluate`.

    Attributes:
      metrics: Metrics of :func:`otmdr_jax.metrics.evaluate`, in float64 over the whole
        split; NaN if a prediction is NaN. An ensemble adds those of
        :func:`otmdr_jax.metrics.diversity.evaluate`. Samples of a posterior add
        "aleatoric" and "epistemic", means in nats: see
        :func:`otmdr_jax.metrics.mutual_information`. A Laplace approximation adds
        "prior_precision" and "effective_parameters".
      log_probs: (N, C) logarithms of the mean probability over all samples.
      member_log_probs: (M, N, C) log-probabilities of an ensemble's members, whether
        they were trained separately or collected in one run; None for a single model.
      members: Metrics of each member; None for a single model.
    """

    metrics: dict[str, float]
    log_probs: np.ndarray
    member_log_probs: np.ndarray | None = None
    members: list[dict[str, float]] | None = None


class Predicted(NamedTuple):
    """The result of :func:`predict` for M members; a single model has M = 1.

    Attributes:
      log_probs: (N, C) logarithms of the mean probability over the members that count.
      members: (M, N, C) logarithms of each member's mean probability over its samples.
      within: (M, N) mean entropies of each member's samples; None if it has only one.
      kept: Indices of the members that count.
    """

    log_probs: np.ndarray
    members: np.ndarray
    within: np.ndarray | None
    kept: list[int]

    def mutual_information(self) -> np.ndarray | None:
        """Returns the mutual information over all samples of the members that count.

        It equals :func:`otmdr_jax.metrics.mutual_information` of the samples: (N,), in
        nats; None if there is a single sample.
        """
        kept = self.members[self.kept]
        if np.isnan(kept).any() or (self.within is None and len(kept) == 1):
            return None
        if self.within is None:
            return uncertainty.comparable_information(np.exp(kept))
        total = metrics.entropy(np.exp(self.log_probs))
        found = total - np.mean(self.within[self.kept], axis=0)
        # A difference of equal entropies is rounding, which must not rank examples.
        return np.where(found < _ROUNDING, 0.0, found)


def evaluate(
    config: TrainConfig,
    state: PyTree,
    dataset: Dataset,
    split: str = "test",
    programs: Programs | None = None,
    *,
    without: tuple[int, ...] = (),
    show_progress: bool = False,
) -> Evaluation:
    """Evaluates a trained state on a split, each example once.

    Args:
      config: The run's configuration.
      state: Its state, which is finalized if the method asks for it; see
        :meth:`otmdr_jax.experiments.methods.MethodOptions.finalize`.
      dataset: The data.
      split: "train", "validation" or "test".
      programs: Compiled functions. Default: compiles them.
      without: Indices of the members that have diverged.
      show_progress: Whether to show progress.

    Returns:
      An :class:`Evaluation`.
    """
    programs = compile_programs(config, dataset) if programs is None else programs
    return evaluate_run(
        config,
        state,
        dataset,
        programs,
        splits=(split,),
        without=without,
        show_progress=show_progress,
    ).splits[split]


class RunEvaluation(NamedTuple):
    """The result of :func:`evaluate_run`.

    Attributes:
      state: The state that made the predictions, finalized if the method asks for it.
      splits: The :class:`Evaluation` of each split.
      posterior: The record of :func:`posterior_record`.
      diverged: Indices of the members that have diverged.
    """

    state: PyTree
    splits: dict[str, Evaluation]
    posterior: dict[str, Any]
    diverged: tuple[int, ...]


def evaluate_run(
    config: TrainConfig,
    state: PyTree,
    dataset: Dataset,
    programs: Programs,
    *,
    splits: tuple[str, ...],
    without: tuple[int, ...] = (),
    final: bool = True,
    show_progress: bool = False,
) -> RunEvaluation:
    """Evaluates a state on several splits, during training or after.

    Args:
      config: The run's configuration.
      state: Its state.
      dataset: The data.
      programs: Compiled functions.
      splits: Names among "train", "validation" and "test".
      without: Indices of the members that have diverged.
      final: Whether training has ended. Until then a Gaussian that is fitted after
        training predicts with its mode, because its curvature may cost whole epochs.
      show_progress: Whether to show progress.
    """
    if final or not config.method.is_fitted:
        state = config.method.finalize(config, state, dataset, programs)
    found = {}
    for split in splits:
        examples = getattr(dataset, split)
        title = f"evaluating the {split} set"
        with Progress(examples.num_examples, 0, title, show_progress, "images") as bar:
            predicted = predict(
                config, state, examples, programs, without=without, report=bar.update
            )
        found[split] = measure(config, predicted, examples.labels)
        found[split].metrics.update(config.method.fitted(state))
    return RunEvaluation(
        state, found, posterior_record(programs, state, without), without
    )


def predict(
    config: TrainConfig,
    state: PyTree,
    examples: Split,
    programs: Programs,
    *,
    without: tuple[int, ...] = (),
    change: Callable[[jax.Array, int], jax.Array] | None = None,
    report: Callable[[int], None] | None = None,
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

    Returns:
      A :class:`Predicted`.
    """
    collected = members_lib.num_collected(config, state)
    count = len(config.model.member_names) if config.model.members is not None else 1
    count = max(collected, count)
    chunks: list[tuple[np.ndarray, np.ndarray | None]] = []
    mesh, done = programs.mesh, 0

    def fetch(log_probs, mask):
        nonlocal done
        samples = np.asarray(log_probs)[:, mask]
        if collected:  # the other slots of the preallocated ensemble are empty
            samples = samples[:collected]
        chunks.append(_by_member(samples, count))
        done += int(np.count_nonzero(mask))
        if report is not None:
            report(done)

    # Fetching lags one batch behind, so the device works while the host sends the next.
    ahead: collections.deque[Any] = collections.deque()
    first = 0
    for images, _, mask in eval_batches(config, examples, mesh):
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
    return Predicted(_mean(members[kept]), members, within, kept)


def measure(config: TrainConfig, found: Predicted, labels: Any) -> Evaluation:
    """Returns the metrics of predictions.

    Args:
      config: The run's configuration.
      found: Predictions of :func:`predict`.
      labels: (N,) labels of the same examples.
    """
    log_probs, members, within, kept = found
    values = _metrics(log_probs, labels) | _uncertainty(log_probs, within, kept)
    if config.model.members is None and len(members) == 1:
        return Evaluation(values, log_probs)
    if len(kept) > 1 and not np.isnan(members[kept]).any():
        values |= diversity.evaluate(members[kept], labels)
    each = [
        _metrics(mine, labels) | _uncertainty(mine, within, [m])
        for m, mine in enumerate(members)
    ]
    return Evaluation(values, log_probs, members, each)


def posterior_record(
    programs: Programs, state: PyTree, without: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Returns the log record of a posterior; it is empty for other methods.

    Args:
      programs: Compiled functions.
      state: The run's state.
      without: Indices of the members that have diverged.

    Returns:
      `sigma` and `snr_db`, the mean standard deviation and the mean signal-to-noise
      ratio (dB) of each layer; `snr_counts`, the histogram of the ratios, see
      :class:`otmdr_jax.bnn.Summary`. For an ensemble the first two are means over the
      members and the counts are sums; if the members' layers differ, each layer's name
      begins with its member, as in "1/head/kernel".
    """
    if programs.posterior is None:
        return {}
    found = programs.posterior(state)
    kept = [m for m in range(len(found)) if m not in without] or range(len(found))
    alike = all(one.sigma.keys() == found[0].sigma.keys() for one in found)
    record: dict[str, Any] = {}
    for name in ("sigma", "snr_db"):
        values: dict[str, list[float]] = {}
        for m in kept:
            for layer, value in getattr(found[m], name).items():
                own = layer if alike else f"{m}/{layer}"
                values.setdefault(own, []).append(float(value))
        record[name] = {layer: float(np.mean(x)) for layer, x in values.items()}
    counts = np.sum([found[m].counts for m in kept], axis=0)
    return record | {"snr_counts": counts.tolist()}


def _metrics(log_probs, labels):
    if np.isnan(log_probs).any():  # it diverged, so there is nothing to measure
        return dict.fromkeys(metrics.NAMES, float("nan"))
    return metrics.evaluate(log_probs, labels)


def _by_member(samples, count):
    """Reduces a batch's samples to members. # (M S, B, C) -> (M, B, C), (M, B).

    Returns the logarithm of each member's mean probability, and the mean entropy of its
    samples, which is None for a single sample.
    """
    samples = samples.reshape(count, -1, *samples.shape[1:]).astype(np.float64)
    means = np.stack([_mean(own) for own in samples])
    if samples.shape[1] == 1:
        return means, None
    within = np.full(means.shape[:2], np.nan)
    if not np.isnan(samples).any():
        for m, own in enumerate(samples):
            each = [metrics.entropy(np.exp(sample)) for sample in own]
            within[m] = np.mean(each, axis=0)
    return means, within


def _uncertainty(log_probs, within, members):
    """The means of both kinds of uncertainty over the set; none for a single sample."""
    if within is None:
        return {}
    aleatoric = np.mean(within[members])
    if np.isnan(log_probs).any() or np.isnan(aleatoric):
        return dict.fromkeys(("aleatoric", "epistemic"), float("nan"))
    # Equal to the mean of metrics.mutual_information over the examples.
    epistemic = max(np.mean(metrics.entropy(np.exp(log_probs))) - aleatoric, 0.0)
    return {"aleatoric": float(aleatoric), "epistemic": float(epistemic)}


def _mean(samples):
    """The logarithm of the mean of S probabilities. # (S, N, C) -> (N, C)."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN: see _metrics
        total = mean_of_samples(samples, log_probs=True)
        return total - np.logaddexp.reduce(total, axis=-1, keepdims=True)


def eval_batches(config, split, mesh):
    """Returns batches for evaluation, whose size is a multiple of the devices."""
    devices = parallel.axis_size(mesh, "data")
    size = min(config.run.eval_batch_size, split.num_examples)
    return data_lib.eval_batches(split, -(-size // devices) * devices)
