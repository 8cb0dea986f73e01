"""The groups of a run's options, but for the method's, which are its own.

Every option has its default's source under it. What goes together is checked by the
group that it is about.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, ClassVar, Literal

from otmdr_jax.data.dataset import check_augmentations
from otmdr_jax.data.sources import is_folder
from otmdr_jax.experiments.options import (
    Bound,
    Count,
    GroupRates,
    Must,
    NotNegative,
    OnlyWith,
    Patterns,
    Positive,
    Rate,
    Seed,
    Share,
)

Amount = Annotated[float, Must("at least 0", lambda x: x >= 0)]


def _absolute(path: str) -> str:
    return str(pathlib.Path(path).expanduser().absolute())


class Group:
    """A group of options.

    Attributes:
      only_with: Options that do nothing but with some values of another one.
    """

    only_with: ClassVar[tuple[OnlyWith, ...]] = ()

    def check(self, config: Any) -> None:
        """Refuses options that do not go together.

        Args:
          config: All options of the run.

        Raises:
          ValueError: Options that do not go together.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Group):
    """The data set."""

    name: str = "digits"
    """Data set: digits, cifar10, cifar100, any TFDS image set; a path to an .npz with
    train_images, train_labels, test_images, test_labels; or a folder of images with a
    folder for each class, alone or in train and test (docs/data.md)."""
    image_size: Count | None = None
    """Side in pixels that the images of a folder are resized to; needed unless they
    have one size."""
    data_dir: str | None = None
    """Folder of prepared TFDS data; of a run on an .npz or a folder of images that has
    moved, where it is now. Default: TFDS's own (~/tensorflow_datasets)."""
    cache_dir: str | None = None
    """Folder of decoded pixels. Default: ~/.cache/otmdr_jax."""
    download: bool = False
    """Let TFDS download and prepare the set if it is not there."""
    validation: Amount = 0.0
    """Training examples held out for validation: a fraction below 1, or a count."""
    train_examples: Count | None = None
    """Train on so many of the training examples, stratified and drawn by data_seed.
    Default: all."""
    test_examples: Count | None = None
    """Test on so many of the test examples, stratified and drawn by data_seed. Default:
    all."""
    label_noise: Rate = 0.0
    """Fraction of the training labels replaced by another class."""
    augment: tuple[str, ...] | None = None
    """Augmentations out of crop and flip. Default: the data set's own."""
    data_seed: Seed = 0
    """Seed of the validation split, the label noise and of what is left out: the same
    for all runs that are compared."""

    def check(self, config: Any) -> None:
        super().check(config)
        check_augmentations(self.augment or ())
        if self.image_size is not None and not is_folder(self.name):
            raise ValueError(
                "image_size must be left out but for a folder of images, and "
                f"{self.name!r} is none, got {self.image_size!r}. A folder is written "
                "as a path: ./photos."
            )
        if self.validation == 1:
            raise ValueError(
                "validation must be a fraction below 1, or a count of at least 2; 1 "
                "would be a single example, and not all of them."
            )
        if self.validation > 1 and not float(self.validation).is_integer():
            raise ValueError(
                "validation must be a fraction below 1 or a whole number of examples, "
                f"got {self.validation!r}."
            )

    def __post_init__(self) -> None:
        """Makes a path absolute: a run is opened from other folders too."""
        if self.name.endswith(".npz") or is_folder(self.name):
            object.__setattr__(self, "name", _absolute(self.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Group):
    """The networks."""

    name: str = "cnn_small"
    """Model: cnn_small, resnet_10, resnet_18, wide_resnet_<depth>_<width>,
    pyramidnet_101, pyramidnet_<depth>_a<alpha>, densenet_121, densenet_<depth>,
    mobilenet, efficientnet_b0, or a network of your own, package.module:Name
    (docs/own.md)."""
    stem: Literal["cifar", "imagenet"] | None = None
    """Stem: cifar (3x3, stride 1), the default of resnet_10, resnet_18 and
    efficientnet_b0, or imagenet (stride 2, and pooling but in efficientnet_b0), that of
    densenet_121. The others have no choice."""
    width: Positive | None = None
    """What the channels of every layer are multiplied by, in resnet_10, resnet_18,
    densenet_121 (its growth), mobilenet and efficientnet_b0: 0.25 for a sixteenth of
    the operations. Default: 1."""
    input_size: Count | None = None
    """Side in pixels that images are resized to before the first layer, as 224 for
    CIFAR in the paper's Table 2: in each step, so that they are stored as they are.
    Default: no resizing."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation. Parameters, norms and statistics stay float32. float16
    comes with dynamic loss scaling."""
    activation: Literal["relu", "softplus"] = "relu"
    """Activation of resnet_10 and resnet_18: softplus in the released code's Bayesian
    networks. The others have no choice."""
    dropout: Rate | None = None
    """Share of activations that are dropped while training, with any method; where, is
    in docs/models.md. Default: none, but 0.1 for mc-dropout (Uncertainty Baselines on
    CIFAR)."""
    remat: bool = False
    """Compute each block's activations again in the backward pass: less memory, about a
    third more time. No use on CPUs, where XLA undoes it."""
    members: str | None = None
    """Train an ensemble: a number of members of --model, or their models by name,
    resnet_18,mobilenet,efficientnet_b0. Default: a single model."""
    ensemble: Literal["independent", "joint"] = "independent"
    """Members with a loss each (the paper), or one loss on their mean probability and
    one gradient norm over all of them (the released code)."""
    member_data: Literal["shared", "own"] = "shared"
    """Whether members see the same batches, each with its own augmentation, or each has
    an order of the data of its own."""
    member_map: Literal["auto", "vmap", "unroll", "scan"] = "auto"
    """How members of one model are computed: a matter of speed and memory alone."""
    init_from: str | None = None
    """Start from trained weights: those of another run's folder, or of a .safetensors
    or .npz file with their names, or of torchvision in a .pth or .safetensors file. The
    classifier is drawn anew where the number of classes differs. Default: random
    weights."""
    new_head: bool = False
    """Draw the classifier anew although the weights of init_from have as many classes:
    theirs are others."""
    freeze: Patterns | None = None
    """Parameters that stay as they are, by patterns of their names: conv1/* "*norm*".
    They are not perturbed either. Default: none."""

    @property
    def member_names(self) -> tuple[str, ...]:
        """The model of each member; of a single model its own."""
        if self.members is None:
            return (self.name,)
        if self.members.isdigit():
            return (self.name,) * int(self.members)
        return tuple(name.strip() for name in self.members.split(","))

    @property
    def stacked(self) -> bool:
        """Whether all members are of one architecture."""
        return len(set(self.member_names)) == 1

    @property
    def joint(self) -> bool:
        """Whether members have one loss."""
        return self.members is not None and self.ensemble == "joint"

    def __post_init__(self) -> None:
        """Makes the path absolute, as that of the data."""
        if self.init_from is not None:
            object.__setattr__(self, "init_from", _absolute(self.init_from))

    def check(self, config: Any) -> None:
        if self.new_head and self.init_from is None:
            raise ValueError(
                "new_head is for weights of init_from: without them every layer is "
                "drawn anew. Leave it out."
            )
        if self.members is None:
            for name in ("ensemble", "member_data", "member_map"):
                if (value := getattr(self, name)) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} must be left out without members, got {value!r}."
                    )
            return
        names = self.member_names
        if len(names) < 2 or not all(names):
            raise ValueError(
                "members must be a number of at least 2, or the names of as many "
                f"models with commas between them, got {self.members!r}."
            )
        if not self.members.isdigit() and self.name not in (type(self).name, *names):
            raise ValueError(
                "model must be left out where members names the models, got "
                f"{self.name!r}."
            )
        if self.joint and self.member_data != "shared":
            raise ValueError(
                "member_data must be 'shared' for a joint loss, which is of one batch, "
                f"got {self.member_data!r}."
            )
        norm = getattr(config.method, "norm", None)
        if self.joint and self.stacked and norm == "per_leaf":
            raise ValueError(
                "norm must be 'global' or 'none' for a joint ensemble, whose members "
                "are stored in one array for each leaf: 'per_leaf' would be a norm "
                "over all of them, got 'per_leaf'."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Group):
    """The loss, and the optimizer of its (robust) gradient."""

    # Not adam_eps, which presets set: their optimizer may be changed.
    only_with = (
        OnlyWith("nesterov", "optimizer", ("sgd",)),
        OnlyWith("nesterov", "momentum"),
        OnlyWith("decay_all", "weight_decay"),
        OnlyWith("smoothing", "label_smoothing"),
    )

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Base optimizer of the (robust) gradient. bsam and ivon have their own updates."""
    momentum: Rate = 0.9
    """Momentum of sgd, first moment of adam, bsam and ivon (released code)."""
    adam_eps: Positive = 1e-8
    """What adam and adamw add to the root of the second moment. The gradient of a
    posterior is per example: its presets divide this by the number of examples, for
    the steps of an objective that is summed over the data set."""
    nesterov: bool = False
    """Nesterov momentum of sgd (released code: off)."""
    weight_decay: NotNegative = 5e-4
    """Decay: added to the gradient for sgd and adam, decoupled for adamw (released
    code: 5e-4). Not of a posterior, which has a prior; of its point estimates. For bsam
    and ivon it is the prior's precision per example."""
    decay_all: bool = True
    """Decay norms and biases too, as the released code does. With --no-decay-all only
    arrays of two and more axes decay."""
    clip_norm: Bound | None = None
    """Clip the gradient to this global norm. Default: no clipping."""
    label_smoothing: Rate = 0.0
    """Probability taken from the label's class."""
    smoothing: Literal["all", "others"] = "all"
    """Spread it over all C classes (Szegedy et al., 2016), or over the other C - 1 (the
    released code)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Group):
    """The learning rate."""

    only_with = (
        OnlyWith("plateau_patience", "schedule", ("plateau",)),
        OnlyWith("plateau_factor", "schedule", ("plateau",)),
    )

    name: Literal["cosine", "step", "constant", "plateau"] = "cosine"
    """Learning rate: cosine to 0; step (x 0.2 at 30, 60 and 80 %, released code);
    constant; plateau (x 0.1 when the epoch's loss stops falling)."""
    learning_rate: NotNegative = 0.1
    """Peak learning rate (appendix B.1)."""
    learning_rate_of: GroupRates | None = None
    """Peak learning rates of parameters by patterns of their names, head/*=0.1
    conv*=0.001; the first pattern that matches counts. They follow the schedule of
    --learning-rate, in proportion. Default: that of all."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warmup from 0."""
    plateau_patience: Count = 10
    """Epochs in a row without a lower loss after which plateau acts, as Optax counts:
    one more than PyTorch's number. 11, as in the presets, is PyTorch's default."""
    plateau_factor: Share = 0.1
    """What plateau multiplies the learning rate by (PyTorch's default)."""

    def check(self, config: Any) -> None:
        super().check(config)
        if self.learning_rate_of is not None and not self.learning_rate:
            raise ValueError(
                "learning_rate_of is in proportion to learning_rate, which must then "
                "be positive, got 0."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Group):
    """The length of a run, its devices, and its records."""

    epochs: Count = 40
    """Passes over the training set, each without its last partial batch."""
    steps: Count | None = None
    """Number of steps, instead of epochs."""
    batch_size: Count = 128
    """Examples a step (released code)."""
    seed: Seed = 0
    """Seed of initialisation, data order, augmentation, splits and noise."""
    mesh: str | None = None
    """How devices are arranged: data=4,particle=2 divides the batch by 4 and the
    particles by 2; -1 is what is left. Default: all devices, on all hosts, on data."""
    sync_batchnorm: bool = False
    """Share BatchNorm's batch statistics over the devices of data. By default each
    device has those of its own part, as is usual; running statistics are averaged."""
    input: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the training images are: in the memory of each device; in the host's, from
    where batches are sent ahead; or on disk, decoded as they are needed (TFDS sets).
    auto takes the first of which they fill at most a quarter. The numbers are the
    same, but for sets without published mean and deviation, which disk samples."""
    eval_every: Count = 1
    """Evaluate each so many epochs, and at the end."""
    eval_batch_size: Count = 512
    """Examples a batch in evaluation. Results do not depend on it."""
    log_every: Count = 50
    """Write training metrics each so many steps."""
    checkpoint_every: Count | None = None
    """Save each so many steps; on many hosts at the next multiple of log_every.
    Default: after an epoch, but not twice in 15 seconds, at each new best, and every
    ten minutes."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints to keep, beside the best one."""
    max_skipped: Count = 10
    """Stop after so many steps in a row whose loss or gradient was not finite."""
