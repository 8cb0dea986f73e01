"""Metrics of a training state over whole sets.

The metrics of an ensemble are those of its mean probability; the metrics of each member
and of their diversity stand beside them. The metrics of a posterior are those of the
mean probability of its samples; the two kinds of uncertainty stand beside them.

`without` names members that have diverged: they do not count in the prediction of the
ensemble.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from otmdr_jax import metrics
from otmdr_jax.core.checks import check_word
from otmdr_jax.data import Dataset
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods.training import Loss
from otmdr_jax.experiments.own import NOTHING, Own
from otmdr_jax.experiments.prediction import Predicted, predict
from otmdr_jax.experiments.programs import Programs, compile_programs
from otmdr_jax.io.progress import Progress
from otmdr_jax.metrics import diversity

PyTree = Any


class Evaluation(NamedTuple):
    """The result of :func:`evaluate`.

    Attributes:
      metrics: Metrics of :func:`otmdr_jax.metrics.evaluate`, in float64 over the whole
        split, and those of one's own; NaN if a prediction is NaN. Where targets are no
        classes, the mean "loss" and those of one's own alone. An ensemble adds those of
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
      seen: What a pass over the training set gave for these predictions, or None: see
        :meth:`otmdr_jax.experiments.methods.MethodOptions.seen`.
    """

    state: PyTree
    splits: dict[str, Evaluation]
    posterior: dict[str, Any]
    diverged: tuple[int, ...]
    seen: PyTree = None


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
    for split in splits:
        check_word("split", split, ("train", "validation", "test"))
        if getattr(dataset, split) is None:
            raise ValueError(f"the data have no {split} set: evaluate another split.")
    seen = None
    if final or not config.method.is_fitted:
        seen = config.method.seen(config, state, dataset, programs)
    if seen is not None:
        assert programs.finish is not None
        state = programs.finish(state, seen)
    found = {}
    for split in splits:
        examples = getattr(dataset, split)
        labels = examples.labels  # which batches of a loader do not have
        title = f"evaluating the {split} set"
        with Progress(examples.num_examples, 0, title, show_progress, "images") as bar:
            predicted = predict(
                config, state, examples, programs, without=without, report=bar.update
            )
        found[split] = measure(config, predicted, labels, programs.own)
        found[split].metrics.update(config.method.fitted(state))
    return RunEvaluation(
        state, found, posterior_record(programs, state, without), without, seen
    )


def measure(
    config: TrainConfig, found: Predicted, labels: Any, own: Own = NOTHING
) -> Evaluation:
    """Returns the metrics of predictions.

    Args:
      config: The run's configuration.
      found: Predictions of :func:`predict`.
      labels: (N,) labels of the same examples, or other targets.
      own: What the run was given in Python: its metrics, and its loss where there are
        no classes.
    """

    def of(predicted, within, kept):
        values = _given_metrics(predicted, labels, own, found.classes)
        if not found.classes:
            return values
        known = _metrics(predicted, labels) | _uncertainty(predicted, within, kept)
        return known | values

    predicted, members, within, kept = found[:4]
    values = of(predicted, within, kept)
    if config.model.members is None and len(members) == 1:
        return Evaluation(values, predicted)
    if found.classes and len(kept) > 1 and not np.isnan(members[kept]).any():
        values |= diversity.evaluate(members[kept], labels)
    each = [of(mine, within, [m]) for m, mine in enumerate(members)]
    return Evaluation(values, predicted, members, each)


def _given_metrics(predicted, targets, own, classes):
    """Metrics of one's own, of probabilities or outputs; the loss without classes."""
    outputs = np.exp(predicted) if classes else predicted
    targets = np.asarray(targets)
    values = {}
    if not classes:
        loss = Loss(function=own.loss, classes=False)
        losses = loss.of_examples(jnp.asarray(outputs), targets)
        values["loss"] = float(np.mean(np.asarray(losses, np.float64)))
    for name, function in own.metrics:
        try:
            value = np.asarray(function(outputs, targets))
        except Exception as error:
            error.add_note(f"It comes from the metric {name!r}.")
            raise
        if value.shape != ():
            raise ValueError(
                f"the metric {name!r} must give one number of a whole set, got an "
                f"array of shape {value.shape}."
            )
        values[name] = float(value)
    return values


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
