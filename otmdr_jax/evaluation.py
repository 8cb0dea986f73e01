"""What a training state is worth: predictions, metrics, sharpness, over whole sets.

Of an ensemble these are the metrics of its mean probability; its members' own and how
much they differ stand beside them. Of a posterior they are those of the mean
probability of its samples, with the two kinds of uncertainty beside them.
"""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax import baselines, centers, diversity, landscape, metrics, parallel
from otmdr_jax import data as data_lib
from otmdr_jax import members as members_lib
from otmdr_jax.config import TrainConfig
from otmdr_jax.data import Dataset, Split
from otmdr_jax.methods import AVERAGING, COLLECTING
from otmdr_jax.programs import Programs, compile_programs
from otmdr_jax.progress import Progress

PyTree = Any

# Sharpness is measured on at most so many training images, evenly spread.
SHARPNESS_EXAMPLES = 2_000


class Evaluation(NamedTuple):
    """What :func:`evaluate` gives.

    Attributes:
      metrics: Metrics of :func:`otmdr_jax.metrics.evaluate`, in float64 over the whole
        split; NaN if a prediction is. Of an ensemble also those of
        :func:`otmdr_jax.diversity.evaluate`, of samples of a posterior "aleatoric" and
        "epistemic", means in nats: see :func:`otmdr_jax.metrics.mutual_information`.
      log_probs: (N, C) log-probabilities: the mean over samples, in log space.
      member_log_probs: (M, N, C) of an ensemble's members, be they trained or collected
        in one run; None of a single model.
      members: Metrics of each member, None of a single model.
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
    """Evaluates a state on a split, each example once.

    Args:
      config: The run's configuration.
      state: Its state.
      dataset: The data.
      split: "train", "validation" or "test".
      programs: Compiled functions, where they exist already.
      without: Members that do not count in the ensemble's prediction, as they diverged.
      show_progress: Whether to show progress.

    Returns:
      An :class:`Evaluation`.
    """
    programs = compile_programs(config, dataset) if programs is None else programs
    state = settle(config, state, dataset, programs)
    examples = getattr(dataset, split)
    collected = _collected(config, state)
    count = len(config.member_names) if config.members is not None else 1
    count = max(collected, count)
    chunks: list[tuple[np.ndarray, np.ndarray | None]] = []
    title = f"evaluating the {split} set"
    mesh = programs.mesh
    with Progress(examples.num_examples, 0, title, show_progress, "images") as bar:

        def fetch(log_probs, mask):
            samples = np.asarray(log_probs)[:, mask]
            if collected:  # the rest of a preallocated ensemble
                samples = samples[:collected]
            chunks.append(_by_member(samples, count))
            bar.update(sum(means.shape[1] for means, _ in chunks), {})

        # Fetched one batch behind: the device has work while the host sends the next.
        ahead: collections.deque[Any] = collections.deque()
        for images, _, mask in _batches(config, examples, mesh):
            images = parallel.place(images, mesh, parallel.data_spec(mesh))
            ahead.append((programs.predict(state, images), mask))
            if len(ahead) > 1:
                fetch(*ahead.popleft())
        fetch(*ahead.popleft())
    members = np.concatenate([means for means, _ in chunks], axis=1)  # (M, N, C)
    entropies = [x for _, x in chunks if x is not None]
    within = np.concatenate(entropies, axis=1) if entropies else None  # (M, N)
    labels = examples.labels
    kept = [m for m in range(count) if m not in without] or list(range(count))
    log_probs = _mean(members[kept])
    found = _metrics(log_probs, labels) | _uncertainty(log_probs, within, kept)
    if config.members is None and not collected:
        return Evaluation(found, log_probs)
    if len(kept) > 1 and not np.isnan(members[kept]).any():
        found |= diversity.evaluate(members[kept], labels)
    each = [
        _metrics(mine, labels) | _uncertainty(mine, within, [m])
        for m, mine in enumerate(members)
    ]
    return Evaluation(found, log_probs, members, each)


def settle(
    config: TrainConfig, state: PyTree, dataset: Dataset, programs: Programs
) -> PyTree:
    """A state to predict with: BatchNorm statistics of averaged weights.

    The mean over batches of the training set, in an order and with augmentation of
    their own, of the batches' statistics at the weights that predict: what the
    `bn_update` of SWA's authors computes. One forward pass for each batch and weight
    vector; the same numbers on any mesh, where each batch is one.

    Args:
      config: The run's configuration; `batchnorm_examples` bounds the examples.
      state: Its state.
      dataset: The data.
      programs: Compiled functions.

    Returns:
      The state itself where there is nothing to do: for most methods, before the first
      average, and for a state that comes from here.
    """
    if programs.batch_statistics is None or programs.settle is None:
        return state
    one = state[0] if not hasattr(state, "step") else state
    kept = one.method_state
    if kept.statistics is not None or not jax.tree.leaves(one.model_state):
        return state
    if not _number(kept.number):
        return state
    images = dataset.train.images
    wanted = min(config.batchnorm_examples or len(images), len(images))
    size = min(config.batch_size, wanted)
    devices = parallel.axis_size(programs.mesh, "data")
    size = max(size // devices, 1) * devices
    order = np.random.default_rng(config.seed).permutation(len(images))
    # Neither of the two keys that a run has: see programs.run_keys.
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    count = max(wanted // size, 1)
    total = None
    for i in range(count):
        rows = order[i * size : (i + 1) * size]
        batch = np.asarray(images[rows])
        batch = parallel.place(batch, programs.mesh, parallel.data_spec(programs.mesh))
        found = programs.batch_statistics(state, batch, jax.random.fold_in(key, i))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return programs.settle(state, jax.tree.map(lambda x: x / count, total))


def predictors(config: TrainConfig, state: PyTree) -> list[PyTree]:
    """The weight vectors behind a prediction, each as a training state of its own.

    Args:
      config: The run's configuration.
      state: Its state, settled where it needs to be.

    Returns:
      Of an ensemble its members; of a run that collects what it has collected, or the
      current weights before; of an average of weights the mean.
    """
    if _collected(config, state):
        return baselines.members(state)
    each = members_lib.separate(state)
    if config.method in AVERAGING:
        return [baselines.moments_of(member) for member in each]
    return each


def sharpness(
    config: TrainConfig,
    state: PyTree,
    dataset: Dataset,
    programs: Programs,
    *,
    without: tuple[int, ...] = (),
) -> dict[str, Any]:
    """The SAM gap on the training set, BatchNorm with its running statistics.

    Args:
      config: The run's configuration.
      state: Its state.
      dataset: The data.
      programs: Compiled functions.
      without: Members that do not count in the means, as they diverged.

    Returns:
      sharpness (the gap at rho = 0.05) and train_nll, both in nats: of an ensemble of
      independent members their means, and `member_sharpness`; of a posterior those of
      its mean.
    """
    state = settle(config, state, dataset, programs)
    train = dataset.train
    chosen = np.linspace(
        0, train.num_examples - 1, min(train.num_examples, SHARPNESS_EXAMPLES)
    ).astype(int)
    part = Split(train.images[chosen], train.labels[chosen])
    mesh = programs.mesh
    batches = [
        parallel.place(batch, mesh, parallel.data_spec(mesh))
        for batch in _batches(config, part, mesh)
    ]
    found = []
    for i, member in enumerate(predictors(config, state)):
        loss_sum = programs.loss_sums[i % len(programs.loss_sums)]
        with_state = [(*batch, member.model_state) for batch in batches]
        weights = centers.weights_of(member.params)
        found.append(landscape.sam_gap(loss_sum, weights, with_state))
    kept = [x for i, x in enumerate(found) if i not in without] or found
    result: dict[str, Any] = {
        "sharpness": float(np.mean([x.gap for x in kept])),
        "train_nll": float(np.mean([x.loss for x in kept])),
    }
    if len(found) > 1:
        result["member_sharpness"] = [x.gap for x in found]
    return result


def posterior_record(
    programs: Programs, state: PyTree, without: tuple[int, ...] = ()
) -> dict[str, Any]:
    """What is logged of a posterior; nothing where there is none.

    Args:
      programs: Compiled functions.
      state: The run's state.
      without: Members that do not count, as they diverged.

    Returns:
      sigma and snr_db, for each layer the mean standard deviation and the mean
      signal-to-noise ratio in decibel; snr_counts, the histogram of the ratios, see
      :class:`otmdr_jax.bnn.Summary`. Of an ensemble means, and sums, over members;
      layers of members that differ are named by member, as "1/head/kernel".
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


def member_rows(
    config: TrainConfig,
    state: PyTree,
    found: Evaluation,
    sharp: dict[str, Any],
    meta: dict[str, Any],
) -> list[dict[str, Any]]:
    """What results hold of each member of an ensemble: model, metrics, divergence.

    Args:
      config: The run's configuration.
      state: Its state.
      found: Its evaluation.
      sharp: What :func:`sharpness` gave; members with a joint loss have none.
      meta: What is saved beside the state.
    """
    names = config.member_names
    if config.members is None:  # collected in one run
        names *= len(found.members or ())
    rows = [
        {"model": name, **values, "diverged": i in meta.get("diverged", ())}
        for i, (name, values) in enumerate(zip(names, found.members or (), strict=True))
    ]
    gaps = sharp.get("member_sharpness", ())
    states = predictors(config, state) if gaps else ()
    for row, gap, member in zip(rows, gaps, states, strict=False):
        row |= {"sharpness": gap, "skipped_steps": int(member.skipped)}
    return rows


def _collected(config, state):
    """How many members a run of one model has collected; 0 of other runs."""
    if config.members is not None or config.method not in COLLECTING:
        return 0
    return _number(state.method_state.number)


def _number(x):
    """The first entry of an array that may be spread over hosts."""
    return int(np.ravel(x.addressable_data(0))[0])


def _metrics(log_probs, labels):
    if np.isnan(log_probs).any():  # diverged: there is nothing to measure
        return dict.fromkeys(metrics.NAMES, float("nan"))
    return metrics.evaluate(log_probs, labels)


def _by_member(samples, count):
    """What is kept of a batch's samples. # (M S, B, C) -> (M, B, C), (M, B).

    Each member's mean probability in log space, and the mean entropy of its samples:
    None where there is but one sample.
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
    """Its two kinds, where there is more than one sample: means over the set."""
    if within is None:
        return {}
    aleatoric = np.mean(within[members])
    if np.isnan(log_probs).any() or np.isnan(aleatoric):
        return dict.fromkeys(("aleatoric", "epistemic"), float("nan"))
    # The mean of what metrics.mutual_information gives for each example.
    epistemic = max(np.mean(metrics.entropy(np.exp(log_probs))) - aleatoric, 0.0)
    return {"aleatoric": float(aleatoric), "epistemic": float(epistemic)}


def _mean(samples):
    """The mean of S probabilities in log space, normalised. # (S, N, C) -> (N, C)."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN: see _metrics
        total = np.logaddexp.reduce(samples, axis=0)
        return total - np.logaddexp.reduce(total, axis=-1, keepdims=True)


def _batches(config, split, mesh):
    """Batches for evaluation, of a size that the devices divide."""
    devices = parallel.axis_size(mesh, "data")
    size = min(config.eval_batch_size, split.num_examples)
    return data_lib.eval_batches(split, -(-size // devices) * devices)
