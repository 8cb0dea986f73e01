"""The compiled functions behind a configuration: data and model in, numbers out.

Everything a step does (gather, augment, normalise, differentiate, update) is one
program. Runs that differ in their seed alone share programs, so they compile once.
"""

import functools
import platform
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from otmdr_jax import _version, landscape, methods, metrics, models, optimizers
from otmdr_jax import data as data_lib
from otmdr_jax.config import TrainConfig
from otmdr_jax.data import Dataset, Split
from otmdr_jax.methods import TrainState
from otmdr_jax.progress import Progress

# Sharpness is measured on at most so many training images, evenly spread.
SHARPNESS_EXAMPLES = 2_000


class Programs(NamedTuple):
    """The compiled functions of a configuration, whatever its seed.

    Attributes:
      init: key -> TrainState.
      train_step: (state, images, labels, order, i) -> (state, metrics).
      predict: (state, images) -> (B, C) log-probabilities.
      epoch_order: key -> (N,) order of an epoch.
      loss_sum: (params, (images, labels, mask, model_state)) -> (sum, count).
      rate: (step, opt_state) -> the learning rate.
      steps_per_epoch: Whole batches in an epoch.
      total_steps: Steps of the run.
    """

    init: Callable[[jax.Array], TrainState]
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    predict: Callable[[TrainState, jax.Array], jax.Array]
    epoch_order: Callable[[jax.Array], jax.Array]
    loss_sum: Callable[..., tuple[jax.Array, jax.Array]]
    rate: Callable[..., jax.Array]
    steps_per_epoch: int
    total_steps: int


def evaluate(
    config: TrainConfig,
    state: TrainState,
    dataset: Dataset,
    split: str = "test",
    programs: Programs | None = None,
    *,
    show_progress: bool = False,
) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates a state on a split, each example once.

    Args:
      config: The run's configuration.
      state: Its state.
      dataset: The data.
      split: "train", "validation" or "test".
      programs: Compiled functions, where they exist already.
      show_progress: Whether to show progress.

    Returns:
      The metrics of :func:`otmdr_jax.metrics.evaluate`, in float64 over the whole
      split, and the log-probabilities (N, C). Metrics are NaN if a prediction is.
    """
    programs = compile_programs(config, dataset) if programs is None else programs
    examples = getattr(dataset, split)
    chunks, done = [], 0
    title = f"evaluating the {split} set"
    with Progress(examples.num_examples, 0, title, show_progress, "images") as bar:
        for images, _, mask in _batches(config, examples):
            chunks.append(np.asarray(programs.predict(state, images))[mask])
            done += len(chunks[-1])
            bar.update(done, {})
    log_probs = np.concatenate(chunks).astype(np.float64)
    if np.isnan(log_probs).any():  # diverged: there is nothing to measure
        return dict.fromkeys(metrics.NAMES, float("nan")), log_probs
    return metrics.evaluate(log_probs, examples.labels), log_probs


def load_data(config: TrainConfig) -> Dataset:
    """Loads the data that a configuration names."""
    count = config.validation
    return data_lib.load(
        config.data,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        download=config.download,
        validation=count if count < 1 else int(count),
        label_noise=config.label_noise,
        seed=config.data_seed,
    )


def compile_programs(config: TrainConfig, dataset: Dataset) -> Programs:
    """The compiled functions of a configuration: shared by runs of several seeds."""
    key = TrainConfig(**{**vars(config), "seed": 0, "data_dir": None})
    augment = dataset.augment if config.augment is None else config.augment
    return _programs(
        key,
        dataset.num_classes,
        dataset.image_shape,
        dataset.train.num_examples,
        tuple(augment),
        dataset.mean,
        dataset.std,
    )


@functools.lru_cache(maxsize=16)
def _programs(config, num_classes, image_shape, num_train, augment, mean, std):
    batch_size = config.batch_size
    steps_per_epoch = num_train // batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"batch_size={batch_size} is larger than the training set of {num_train}."
        )
    total_steps = config.steps or config.epochs * steps_per_epoch
    options = {} if config.stem is None else {"stem": config.stem}
    model = models.create(
        config.model, num_classes, dtype=jnp.dtype(config.dtype), **options
    )
    method = methods.create(
        config.method,
        model,
        optimizers.create(config, total_steps, steps_per_epoch),
        label_smoothing=config.label_smoothing,
        smoothing=config.smoothing,
        **method_options(config),
    )

    def train_step(state, images, labels, order, i):
        key, augment_key = jax.random.split(state.key)
        batch = data_lib.take(Split(images, labels), order, i, batch_size)
        images = data_lib.augment(augment_key, batch.images, augment)
        images = data_lib.normalise(images, mean, std)
        return method.step(state._replace(key=key), (images, jnp.asarray(batch.labels)))

    def predict(state, images):
        samples = method.predict(state, data_lib.normalise(images, mean, std))
        # The mean of S probabilities, in log space. # (S, B, C) -> (B, C)
        log_mean = jax.nn.logsumexp(samples, axis=0) - jnp.log(samples.shape[0])
        return jax.nn.log_softmax(log_mean)

    example = jnp.zeros((1, *image_shape))
    return Programs(
        init=jax.jit(lambda key: method.init(key, example)),
        train_step=jax.jit(train_step, donate_argnums=0),
        predict=jax.jit(predict),
        epoch_order=jax.jit(lambda key: data_lib.epoch_order(key, num_train)),
        loss_sum=_loss_sum(model, mean, std),
        rate=jax.jit(
            functools.partial(
                optimizers.learning_rate,
                optimizers.schedule(config, total_steps, steps_per_epoch),
            )
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


@functools.lru_cache(maxsize=16)
def _loss_sum(model, mean, std):
    """One function object a model, whatever the method: it compiles once."""

    def loss_sum(params, batch):
        images, labels, mask, model_state = batch
        images = data_lib.normalise(images, mean, std)
        logits, _ = model.apply(params, model_state, images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses * mask), jnp.sum(mask)

    return loss_sum


def method_options(config: TrainConfig) -> dict[str, Any]:
    """The options of the robust gradient that a configuration names.

    Raises:
      ValueError: An option that the method does not have was set.
    """
    defaults = TrainConfig(method=config.method)
    names = {
        "sgd": (),
        "sam": ("rho", "norm"),
        "asam": ("rho", "norm"),
        "otmdr": (
            "rho", "num_particles", "noise_std", "split", "norm", "merge",
            "sum_particles", "particle_map",
        ),
    }  # fmt: skip
    every, mine = names["otmdr"], names[config.method]
    set_ = [name for name in every if getattr(config, name) != getattr(defaults, name)]
    if foreign := [name for name in set_ if name not in mine]:
        raise ValueError(
            f"{config.method} has no option {', '.join(foreign)}"
            + (f"; it has {', '.join(mine)}." if mine else "; it has none.")
        )
    if config.num_particles > 1 and config.split in ("ordered", "shared"):
        if not config.noise_std:
            raise ValueError(
                f"num_particles={config.num_particles} with split={config.split!r} and "
                'no noise gives equal particles: use split="random", set noise_std, or '
                "leave num_particles at 1."
            )
    return {name: getattr(config, name) for name in set_}


def sharpness(
    config: TrainConfig, state: TrainState, dataset: Dataset, programs: Programs
) -> dict[str, float]:
    """The SAM gap on the training set, BatchNorm with its running statistics.

    Args:
      config: The run's configuration.
      state: Its state.
      dataset: The data.
      programs: Compiled functions.

    Returns:
      sharpness (the gap at rho = 0.05) and train_nll, both in nats.
    """
    train = dataset.train
    chosen = np.linspace(
        0, train.num_examples - 1, min(train.num_examples, SHARPNESS_EXAMPLES)
    ).astype(int)
    part = Split(train.images[chosen], train.labels[chosen])
    batches = [
        (images, labels, mask, state.model_state)
        for images, labels, mask in _batches(config, part)
    ]
    found = landscape.sam_gap(programs.loss_sum, state.params, batches)
    return {"sharpness": found.gap, "train_nll": found.loss}


def _batches(config: TrainConfig, split: Split):
    return data_lib.eval_batches(split, min(config.eval_batch_size, split.num_examples))


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The two keys of a run: of its state, and of the order of its data.

    Split, not folded: fold_in(key, 1) is split(key)[1], which the state's key is made
    of already.
    """
    state_key, data_key = jax.random.split(jax.random.key(seed))
    return state_key, data_key


def environment() -> dict[str, str]:
    """Versions and device: what a figure means nothing without."""
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} x {jax.device_count()}",
        "platform": device.platform,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "otmdr_jax": _version.__version__,
        "python": platform.python_version(),
    }


def fingerprint(dataset: Dataset) -> str:
    """A checksum of all splits, to tell whether a run goes on with its data."""
    crc = 0
    for split in (dataset.train, dataset.validation, dataset.test):
        for array in split or ():
            crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    return f"{dataset.name}-{dataset.train.num_examples}-{crc:08x}"


def check_same_data(meta: dict[str, Any], dataset: Dataset, output: Any) -> None:
    """Refuses data other than those that a run was trained on.

    Raises:
      ValueError: The checksum in the checkpoint's `meta` is another one.
    """
    if meta["data"] != fingerprint(dataset):
        raise ValueError(
            f"{output} was trained on {meta['data']}, but the data are now "
            f"{fingerprint(dataset)} (name, examples, checksum). Restore the data, or "
            "start a new run."
        )
