"""The compiled functions behind a configuration: data and model in, numbers out.

Everything a step does (gather, augment, normalise, differentiate, update) is one
program. Runs that differ in their seed alone share programs, so they compile once.
"""

import dataclasses
import functools
import platform
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from otmdr_jax import (
    _version,
    landscape,
    methods,
    metrics,
    models,
    optimizers,
    parallel,
)
from otmdr_jax import data as data_lib
from otmdr_jax.config import TrainConfig
from otmdr_jax.data import Dataset, LazyImages, Split
from otmdr_jax.gradients import PAPER_RHO
from otmdr_jax.methods import TrainState
from otmdr_jax.progress import Progress

# Sharpness is measured on at most so many training images, evenly spread.
SHARPNESS_EXAMPLES = 2_000


class Programs(NamedTuple):
    """The compiled functions of a configuration, whatever its seed.

    Attributes:
      init: key -> TrainState, on every device of the mesh.
      train_step: (state, (images, labels), order, i) -> (state, metrics): step i of an
        epoch, on the training set that lives on the devices.
      stream_step: (state, (images, labels)) -> (state, metrics): on one batch, divided
        over the mesh.
      predict: (state, images) -> (B, C) log-probabilities, on every device.
      epoch_order: key -> (N,) order of an epoch.
      loss_sum: (params, (images, labels, mask, model_state)) -> (sum, count).
      rate: (step, opt_state) -> the learning rate.
      steps_per_epoch: Whole batches in an epoch.
      total_steps: Steps of the run.
      mesh: The devices; None for one.
    """

    init: Callable[[jax.Array], TrainState]
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    stream_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    predict: Callable[[TrainState, jax.Array], jax.Array]
    epoch_order: Callable[[jax.Array], jax.Array]
    loss_sum: Callable[..., tuple[jax.Array, jax.Array]]
    rate: Callable[..., jax.Array]
    steps_per_epoch: int
    total_steps: int
    mesh: Mesh | None


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
    mesh = programs.mesh
    with Progress(examples.num_examples, 0, title, show_progress, "images") as bar:
        for images, _, mask in _batches(config, examples, mesh):
            images = parallel.place(images, mesh, _rows(mesh))
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
        in_memory={"auto": None, "disk": False}.get(config.input, True),
        validation=count if count < 1 else int(count),
        label_noise=config.label_noise,
        seed=config.data_seed,
    )


def make_mesh(config: TrainConfig) -> Mesh | None:
    """The devices that a configuration names; None for a single one.

    Raises:
      ValueError: They do not divide the batch, or it names a "member" axis.
    """
    mesh = parallel.make_mesh(config.mesh)
    if "member" in mesh.shape:
        raise ValueError(
            f"mesh={config.mesh!r}: a run trains one model; members of an ensemble on "
            "their own devices are for loops of your own (otmdr_jax.parallel)."
        )
    data, particle = (parallel.axis_size(mesh, a) for a in ("data", "particle"))
    if particle > 1 and config.method != "otmdr":
        raise ValueError(
            f"mesh={config.mesh!r}: {config.method} has no particles to spread; a "
            "particle axis needs --method otmdr and --num-particles."
        )
    for name, devices in (("batch_size", data), ("num_particles", particle)):
        if getattr(config, name) % devices:
            raise ValueError(
                f"{name}={getattr(config, name)} cannot be divided evenly over the "
                f"{devices} devices of mesh {dict(mesh.shape)}: change it, or name "
                "fewer devices, as --mesh data=1."
            )
    radii = len(config.rho or PAPER_RHO)
    if config.method == "otmdr" and config.split != "shared":
        if config.batch_size // data < radii:
            raise ValueError(
                f"batch_size={config.batch_size} over {data} devices leaves each fewer "
                f"examples than the {radii} radii in rho, each of which needs a part: "
                "use a larger batch or fewer devices on data."
            )
    return mesh if mesh.size > 1 else None


def compile_programs(
    config: TrainConfig, dataset: Dataset, mesh: Mesh | None = None
) -> Programs:
    """The compiled functions of a configuration: shared by runs of several seeds.

    Args:
      config: What to compile; its mesh is not looked at.
      dataset: For the shapes, and for how images are augmented and normalised.
      mesh: From :func:`make_mesh`; None for the default device.
    """
    key = dataclasses.replace(config, seed=0, data_dir=None, mesh=None)
    augment = dataset.augment if config.augment is None else config.augment
    return _programs(
        key,
        dataset.num_classes,
        dataset.image_shape,
        dataset.train.num_examples,
        tuple(augment),
        dataset.mean,
        dataset.std,
        mesh,
    )


@functools.lru_cache(maxsize=16)
def _programs(config, num_classes, image_shape, num_train, augment, mean, std, mesh):
    batch_size = config.batch_size
    steps_per_epoch = num_train // batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"batch_size={batch_size} is larger than the training set of {num_train}."
        )
    total_steps = config.steps or config.epochs * steps_per_epoch
    on_data = mesh is not None and "data" in mesh.shape
    model = models.create(
        config.model,
        num_classes,
        dtype=jnp.dtype(config.dtype),
        batchnorm_axis_name="data" if on_data and config.sync_batchnorm else None,
        **_model_options(config),
    )
    method = methods.create(
        config.method,
        model,
        optimizers.create(config, total_steps, steps_per_epoch),
        label_smoothing=config.label_smoothing,
        smoothing=config.smoothing,
        loss_scaling=config.dtype == "float16",
        **method_options(config),
        **_axis_names(mesh),
    )
    parts = parallel.axis_size(mesh, "data")
    size = batch_size // parts  # of a device's part

    def part():
        return jax.lax.axis_index("data") if on_data else 0

    def stream_step(state, batch):
        key, augment_key = jax.random.split(state.key)
        images, labels = batch
        images = data_lib.augment(augment_key, images, augment, part() * size)
        images = data_lib.normalise(images, mean, std)
        return method.step(state._replace(key=key), (images, labels))

    def train_step(state, examples, order, i):
        batch = data_lib.take(Split(*examples), order, i * parts + part(), size)
        return stream_step(state, batch)

    def compiled(step, batch_spec):
        if mesh is None:
            return jax.jit(step, donate_argnums=0)
        return parallel.shard_map_step(step, mesh, batch_spec=batch_spec)

    def predict(state, images):
        samples = method.predict(state, data_lib.normalise(images, mean, std))
        # The mean of S probabilities, in log space. # (S, B, C) -> (B, C)
        log_mean = jax.nn.logsumexp(samples, axis=0) - jnp.log(samples.shape[0])
        return jax.nn.log_softmax(log_mean)

    example = jnp.zeros((1, *image_shape))
    everywhere = parallel.replicated(mesh)
    return Programs(
        init=jax.jit(lambda key: method.init(key, example), out_shardings=everywhere),
        train_step=compiled(train_step, P()),
        stream_step=compiled(stream_step, _rows(mesh)),
        predict=jax.jit(predict, out_shardings=everywhere),
        epoch_order=jax.jit(
            lambda key: data_lib.epoch_order(key, num_train), out_shardings=everywhere
        ),
        loss_sum=_loss_sum(model, mean, std),
        rate=jax.jit(
            functools.partial(
                optimizers.learning_rate,
                optimizers.schedule(config, total_steps, steps_per_epoch),
            )
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        mesh=mesh,
    )


def _model_options(config):
    options = {"stem": config.stem, "remat": config.remat or None}
    return {name: value for name, value in options.items() if value is not None}


def _axis_names(mesh):
    """The axes of a mesh, as the options of a method."""
    names = {"data": "axis_name", "particle": "particle_axis_name"}
    return {names[axis]: axis for axis in (() if mesh is None else mesh.shape)}


def _rows(mesh):
    """How a batch is divided over a mesh."""
    return P("data") if parallel.axis_size(mesh, "data") > 1 else P()


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
        "sgd": ("microbatch_size",),
        "sam": ("rho", "norm", "sync_perturbation", "microbatch_size"),
        "asam": ("rho", "norm", "sync_perturbation", "microbatch_size"),
        "otmdr": (
            "rho", "num_particles", "noise_std", "split", "norm", "merge",
            "sum_particles", "particle_map", "sync_perturbation", "microbatch_size",
        ),
    }  # fmt: skip
    every, mine = names["otmdr"], names[config.method]
    set_ = [name for name in every if getattr(config, name) != getattr(defaults, name)]
    if foreign := [name for name in set_ if name not in mine]:
        raise ValueError(
            f"{config.method} has no option {', '.join(foreign)}"
            + f"; it has {', '.join(mine)}."
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
    mesh = programs.mesh
    batches = [
        (*parallel.place(batch, mesh, _rows(mesh)), state.model_state)
        for batch in _batches(config, part, mesh)
    ]
    found = landscape.sam_gap(programs.loss_sum, state.params, batches)
    return {"sharpness": found.gap, "train_nll": found.loss}


def _batches(config: TrainConfig, split: Split, mesh: Mesh | None):
    """Batches for evaluation, of a size that the devices divide."""
    devices = parallel.axis_size(mesh, "data")
    size = min(config.eval_batch_size, split.num_examples)
    return data_lib.eval_batches(split, -(-size // devices) * devices)


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
    """Checksums of all splits, to tell whether a run goes on with its data.

    Two of them: of the labels, of a thousand images of each split and of the mean and
    deviation that normalise them; and of all images
    ("p"), or of their records where they are not in memory ("r").
    """
    sampled = whole = 0
    splits = [s for s in (dataset.train, dataset.validation, dataset.test) if s]
    kind = "r" if isinstance(dataset.train.images, LazyImages) else "p"
    # Of a set without published statistics these may be of a sample of the images.
    sampled = zlib.crc32(np.asarray((dataset.mean, dataset.std)).tobytes(), sampled)
    for images, labels in splits:
        rows = np.linspace(0, len(labels) - 1, min(len(labels), 1_000)).astype(int)
        for array in (labels, images[rows]):
            sampled = zlib.crc32(np.ascontiguousarray(array).tobytes(), sampled)
        if isinstance(images, LazyImages):
            whole = zlib.crc32(str(images.checksum()).encode(), whole)
        else:
            whole = zlib.crc32(np.ascontiguousarray(images).tobytes(), whole)
    count = dataset.train.num_examples
    return f"{dataset.name}-{count}-{sampled:08x}-{kind}{whole:08x}"


def check_same_data(meta: dict[str, Any], dataset: Dataset, output: Any) -> None:
    """Refuses data other than those that a run was trained on.

    Raises:
      ValueError: The checksums in the checkpoint's `meta` are others. Those of all
        images are compared where both are of pixels, or both of records.
    """
    was, now = meta["data"], fingerprint(dataset)
    same_kind = was.rpartition("-")[2][0] == now.rpartition("-")[2][0]
    if was != now and (same_kind or was.rpartition("-")[0] != now.rpartition("-")[0]):
        raise ValueError(
            f"{output} was trained on {was}, but the data are now {now} (name, "
            "examples, checksums). Restore the data, or start a new run."
        )
