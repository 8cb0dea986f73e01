"""The data and devices that a configuration names, checked."""

import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from otmdr_jax import data as data_lib
from otmdr_jax import parallel
from otmdr_jax.data import Dataset, Loader
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.programs.provenance import fingerprint, same_data

# With fewer images than this in a pass on a device, batch statistics are noise: in Wu &
# He, 2018 ("Group Normalization", figure 1) errors rise below 16.
FEW_IMAGES = 16


# What a run on a dataset of the caller's own is recorded by: "arrays:" and its name.
ARRAYS = "arrays:"
# Options that are applied where a set is loaded.
OF_LOADING = (
    "validation",
    "label_noise",
    "data_seed",
    "image_size",
    "train_examples",
    "test_examples",
)


def named(
    config: TrainConfig,
    dataset: Dataset,
    resume: bool = False,
    recorded: bool = True,
) -> TrainConfig:
    """The options of a run on a dataset that the caller has given.

    They stay as they are if the dataset is the one that they load.

    Args:
      config: The options.
      dataset: The data, which the options may name or not.
      resume: Whether the run is resumed, and its options are known.
      recorded: Whether the options are written down. If not, and if none of them is
        applied where a set is loaded, a dataset of the name is not loaded to compare.

    Raises:
      ValueError: Options that are applied where a set is loaded, for another dataset
        than the one that they load.
    """
    name = config.data.name
    own = name
    if name.endswith(".npz"):
        own = pathlib.Path(name).stem
    elif data_lib.is_folder(name):
        own = pathlib.Path(name).name
    changed = [x for x in config.changed() if x in OF_LOADING]
    matters = recorded or changed
    if own == dataset.name and (not matters or _is_loaded(config, dataset)):
        return config
    if changed and not resume:
        raise ValueError(
            f"options of loading ({', '.join(changed)}) do nothing to the dataset "
            f"{dataset.name!r} that was given: leave them out here, and give them to "
            "data.from_arrays or data.load."
        )
    return config.replace(data=ARRAYS + dataset.name)


def _is_loaded(config: TrainConfig, dataset: Dataset) -> bool:
    try:
        loaded = load_data(config)
    except (ValueError, TypeError, OSError, ImportError):
        return False
    return same_data(fingerprint(loaded), fingerprint(dataset))


def load_data(config: TrainConfig) -> Dataset:
    """Loads the data that a configuration names.

    Raises:
      ValueError: It names arrays that were given in Python, and `data_dir` is no file
        that :func:`otmdr_jax.data.save` wrote of them.
    """
    count, name = config.data.validation, config.data.name
    if name.startswith(ARRAYS):
        name = f"{name.removeprefix(ARRAYS).replace('/', '_')}.npz"
        if not str(config.data.data_dir).endswith(".npz"):
            raise ValueError(
                "the run was trained on arrays that were given to it in Python "
                f"({config.data.name}). Write them to a file, otmdr_jax.data.save("
                f"dataset, {name!r}), and say --data-dir {name}; or give the dataset "
                "itself: otmdr_jax.open_run(folder, dataset=dataset)."
            )
    loaded = data_lib.load(
        name,
        data_dir=config.data.data_dir,
        cache_dir=config.data.cache_dir,
        download=config.data.download,
        in_memory={"auto": None, "disk": False}.get(config.run.input, True),
        validation=count if count < 1 else int(count),
        label_noise=config.data.label_noise,
        seed=config.data.data_seed,
        image_size=config.data.image_size,
    )
    return data_lib.subset(
        loaded,
        train=config.data.train_examples,
        test=config.data.test_examples,
        seed=config.data.data_seed,
    )


def check_loader(config: TrainConfig, dataset: Dataset) -> None:
    """Refuses options that do not go with the batches of a loader.

    Args:
      config: The options.
      dataset: The data; only those of :func:`otmdr_jax.data.from_batches` are checked.

    Raises:
      ValueError: The batch size is another, an option needs the training set in memory,
        or there are several hosts.
    """
    if not isinstance(loader := dataset.train, Loader):
        return
    if config.run.batch_size != loader.batch_size:
        raise ValueError(
            f"batch_size={config.run.batch_size}, but the loader's batches have "
            f"{loader.batch_size} examples: set one of them to the other."
        )
    if config.model.member_data == "own":
        raise ValueError(
            "member_data='own' needs the training set on the device, where members can "
            "read it in any order, and a loader gives one batch for all: use "
            "member_data='shared', or data.from_arrays."
        )
    if config.run.input != "auto":
        raise ValueError(
            f"input={config.run.input!r} does nothing to the batches of a loader, "
            "which are always streamed: leave it out."
        )
    if jax.process_count() > 1:
        raise ValueError(
            "batches of a loader train on one host, and there are "
            f"{jax.process_count()}: use a folder, a TFDS set or arrays, of which each "
            "host reads its own part."
        )


def make_mesh(config: TrainConfig) -> Mesh | None:
    """The devices that a configuration names; None for a single one.

    Raises:
      ValueError: They do not divide the batch, or it names a "member" axis.
    """
    named, batch_size = config.run.mesh, config.run.batch_size
    mesh = parallel.make_mesh(named)
    axes = ("data", "particle", "member")
    data, particle, member = (parallel.axis_size(mesh, axis) for axis in axes)
    if member > 1 and not (config.model.members and config.model.stacked):
        raise ValueError(
            f"mesh={named!r}: a member axis needs members of one architecture, as "
            f"--members 4; members={config.model.members!r}."
        )
    if member > 1 and config.model.ensemble == "joint":
        raise ValueError(
            f"mesh={named!r}: members with a joint loss depend on each other in every "
            "pass; spread the data, or use --ensemble independent."
        )
    gradient = config.method.gradient
    if particle > 1 and not gradient.has_particles:
        raise ValueError(
            f"mesh={named!r}: {config.method.name} has no particles to spread; a "
            "particle axis needs --method otmdr (or otmdr-bnn) and --num-particles."
        )
    of_members = len(config.model.member_names)
    for name, value, devices in (
        ("batch_size", batch_size, data),
        ("num_particles", gradient.num_particles, particle),
        ("members", of_members, member),
    ):
        if value % devices:
            raise ValueError(
                f"{name}={value} cannot be divided evenly over the "
                f"{devices} devices of mesh {dict(mesh.shape)}: change it, or name "
                "fewer devices, as --mesh data=1."
            )
    parts = gradient.num_subbatches
    if parts > 1 and (parts % data or batch_size % parts):
        raise ValueError(
            f"{parts} sub-batches of one size, as {config.method.name} here has "
            f"them, need a multiple of the {data} devices on data that divides "
            f"batch_size={batch_size}: set --num-subbatches, --batch-size, or "
            "fewer devices (--mesh data=1)."
        )
    if batch_size // max(data, parts) < gradient.num_parts:
        raise ValueError(
            f"batch_size={batch_size} over devices on data={data} leaves each fewer "
            f"examples than the {gradient.num_parts} steps of {config.method.name}, "
            "each of which needs a part: use a larger batch"
            + (" or fewer devices on data." if data > 1 else ".")
        )
    return mesh if mesh.size > 1 else None


# Noise that moves the weights so many times as far as the ascent steps do is said.
MUCH_NOISE = 10


def much_noise(config: TrainConfig, state: Any) -> str | None:
    """A warning where the noise of the ascent steps drowns the steps.

    A step goes as far as its radius; Gaussian noise of standard deviation sigma on each
    of n weights as far as sigma sqrt(n).

    Args:
      config: The run's options.
      state: Its state.
    """
    gradient = config.method.gradient
    sigma, rho = getattr(gradient, "noise_std", 0.0), getattr(gradient, "rho", ())
    norm = getattr(gradient, "norm", getattr(gradient, "posterior_norm", "global"))
    one = state if hasattr(state, "step") else state[0]
    leaves = jax.tree.leaves(one.params)
    # Members that are stacked climb on their own.
    size = sum(x.size for x in leaves) // one.step.size
    noise = sigma * math.sqrt(size)
    steps = sum(rho) * (math.sqrt(len(leaves)) if norm == "per_leaf" else 1.0)
    if norm == "none" or noise <= MUCH_NOISE * steps:
        return None
    return (
        f"noise_std={sigma:g} on {size:,} weights moves them by {noise:.3g} a step, "
        f"the radii by {steps:.3g}: the particles are mostly noise. The paper's "
        "presets do so; --noise-std 0 climbs alone"
    )


def few_images(config: TrainConfig, mesh: Mesh | None) -> str | None:
    """A warning where BatchNorm's statistics are of very few images."""
    data, gradient = parallel.axis_size(mesh, "data"), config.method.gradient
    # Sub-batches divide a device's images where they are more than the devices.
    parts = max(gradient.num_subbatches // data, 1) * gradient.num_parts
    alone = 1 if config.run.sync_batchnorm else data
    micro = getattr(gradient, "microbatch_size", None)
    images = config.run.batch_size // data // parts
    images = min(images, micro or images) * (data // alone)
    if images >= FEW_IMAGES:
        return None
    ways = ["a larger --batch-size"]
    if micro:
        ways.append("a larger --microbatch-size")
    if parts > 1:
        ways.append("fewer parts (--split shared, --num-subbatches 1)")
    if alone > 1:
        ways.append("--sync-batchnorm, or fewer devices (--mesh data=1)")
    where = f" on each of {data} devices" if alone > 1 else ""
    return (
        f"BatchNorm sees only {images} image{'s' * (images > 1)} a pass{where}, fewer "
        f"than {FEW_IMAGES}: the running statistics that predictions use are not those "
        "it trained with (NLL on digits .18, .20, .36, 1.2, 2.3 for 16, 8, 4, 2, 1 "
        f"images). Use {'; or '.join(ways)}"
    )
