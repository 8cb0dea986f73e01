"""A training run's options: one flat, frozen dataclass, its presets and its file.

Every option has its default's source beside it. The same class serves the Python API,
the command line (`otmdr train --help` prints these comments) and `config.json`.
"""

import dataclasses
import json
import os
import pathlib
import types
import typing
from typing import Any, Literal

from otmdr_jax import bnn, presets
from otmdr_jax.baselines import presets as baselines
from otmdr_jax.options import check_rho

MethodName = Literal[
    "sgd", "sam", "asam", "otmdr", "sgvb", "otmdr-bnn",
    "gsam", "looksam", "fisher-sam", "bsam", "ivon",
    "snapshot", "fge", "swa", "swag", "dst", "edst", "mc-dropout",
    "deep-ensemble", "sam-ensemble", "otmdr-ensemble",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a training run; `--preset demo` is the job of `otmdr demo`."""

    # -- data --
    data: str = "digits"
    """Data set: digits, cifar10, cifar100, any TFDS image set, or a path to an .npz
    with train_images, train_labels, test_images, test_labels."""
    data_dir: str | None = None
    """Folder of prepared TFDS data. Default: TFDS's own (~/tensorflow_datasets)."""
    cache_dir: str | None = None
    """Folder of decoded pixels. Default: ~/.cache/otmdr_jax."""
    download: bool = False
    """Let TFDS download and prepare the set if it is not there."""
    validation: float = 0.0
    """Training examples held out for validation: a fraction below 1, or a count."""
    label_noise: float = 0.0
    """Fraction of the training labels replaced by another class."""
    augment: tuple[str, ...] | None = None
    """Augmentations out of crop and flip. Default: the data set's own."""
    data_seed: int = 0
    """Seed of the validation split and the label noise: the same for all runs that are
    compared."""

    # -- model --
    model: str = "cnn_small"
    """Model: cnn_small, resnet_10, resnet_18, wide_resnet_<depth>_<width>,
    pyramidnet_101, pyramidnet_<depth>_a<alpha>, densenet_121, mobilenet or
    efficientnet_b0."""
    stem: Literal["cifar", "imagenet"] | None = None
    """Stem: cifar (3x3, stride 1), the default of resnet_10, resnet_18 and
    efficientnet_b0, or imagenet (stride 2, and pooling but in efficientnet_b0), that of
    densenet_121. The others have no choice."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation. Parameters, norms and statistics stay float32. float16
    comes with dynamic loss scaling."""
    activation: Literal["relu", "softplus"] = "relu"
    """Activation of resnet_10 and resnet_18: softplus in the released code's Bayesian
    networks. The others have no choice."""
    dropout: float | None = None
    """Share of activations that are dropped while training, with any method; where, is
    in docs/models.md. Default: none, but 0.1 for mc-dropout (Uncertainty Baselines on
    CIFAR)."""
    remat: bool = False
    """Compute each block's activations again in the backward pass: less memory, about a
    third more time. No use on CPUs, where XLA undoes it."""

    # -- ensemble --
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

    # -- method --
    method: MethodName = "otmdr"
    """What to minimise: the loss (sgd), its worst value nearby (otmdr; sam and its kin
    asam, gsam, looksam, fisher-sam), or, over a Gaussian posterior of the weights, the
    negative evidence bound (sgvb, ivon) or its worst value nearby (otmdr-bnn, bsam).
    Members collected in one run: snapshot, fge; an average of its weights: swa, swag;
    sparse networks: dst, edst; samples of dropout's masks in a prediction: mc-dropout.
    deep-ensemble, sam-ensemble and otmdr-ensemble are sgd, sam and otmdr with five
    members, or --members. docs/baselines.md has the equations."""
    rho: tuple[float, ...] | None = None
    """Radii, one for each ascent step. Default: 0.05 0.1 for otmdr (section 5.1 of the
    paper), 0.005 0.01 for otmdr-bnn (appendix B.3), 0.05 for sam and 0.5 for asam
    (their papers, CIFAR-10), sam's for gsam and looksam, 0.01 for bsam (its released
    commands), 0.1 for fisher-sam (reimplementations). sam takes several too: it climbs
    that often, each time on the whole batch."""
    num_particles: int = 1
    """K, the number of particles of otmdr and otmdr-bnn."""
    noise_std: float = 0.0
    """Noise per coordinate after each ascent step. 0 in the released code; 0.01 in the
    paper (appendix B.1)."""
    split: Literal["random", "ordered", "shared"] | None = None
    """How the ascent steps share the batch. Default: random for otmdr, otmdr-bnn."""
    norm: Literal["global", "per_leaf", "none"] = "global"
    """One gradient norm over all parameters, one for each array, or none: steps as long
    as the gradient makes them. That of otmdr-bnn is posterior_norm."""
    merge: Literal["sum", "mean"] | None = None
    """The released code's merged second direction. Default: none, as in the paper."""
    sum_particles: bool = False
    """Add the particles' gradients up instead of averaging (released code, mode 1)."""
    particle_map: Literal["auto", "vmap", "unroll", "scan"] = "auto"
    """How particles are computed: a matter of speed and memory alone."""
    sync_perturbation: bool = True
    """On many devices: one perturbation for all, from the whole batch. With
    --no-sync-perturbation each device has its own (m-sharpness), and gradients are
    exchanged once a step instead of once a pass."""
    microbatch_size: int | None = None
    """Examples that a device differentiates at a time, to save memory. The objective
    stays that of the whole batch, but BatchNorm sees micro-batches. Default: all."""

    num_subbatches: int | None = None
    """Equal consecutive parts of the batch, each with a perturbation of its own
    (m-sharpness), whatever the devices. Default: 8 for bsam (its released commands), 1
    for the others."""

    # -- gsam, looksam, fisher-sam --
    gsam_alpha: float = 0.2
    """Weight of what gsam takes out of the gradient: 0 is sam. 0.2 in its authors'
    example on CIFAR-10."""
    rho_min: float | None = None
    """Radius of gsam where the learning rate is 0; between it and --rho the radius
    follows the learning rate, as its paper has it. Default: --rho throughout."""
    look_every: int = 5
    """How often looksam climbs, in steps: 1 is sam (reimplementations: 5)."""
    look_alpha: float = 0.7
    """Length of looksam's remembered direction in lengths of the gradient
    (reimplementations)."""
    fisher_eta: float = 1.0
    """How far the squared gradient bends the ball of fisher-sam: 0 is sam
    (reimplementations)."""

    # -- bsam and ivon --
    data_factor: float = 1.0
    """What the number of training examples is multiplied by where it sets a posterior's
    width, for the augmentation. 4 in bsam's released commands for CIFAR."""
    b2: float | None = None
    """How slowly the precision follows the gradients. Default: 0.999 for bsam (its
    paper), 0.99999 for ivon (released code)."""
    precision_init: float = 1.0
    """Precision of every weight at the start (released code)."""
    damping: float = 0.1
    """What is added to the precision (released code)."""
    precision_order: Literal["released", "paper"] = "released"
    """Whether bsam divides its step by the precision before its update (the code), or
    after it (the paper's listing)."""
    hess_init: float = 1.0
    """Hessian of every weight at the start of ivon; the larger, the less noise
    (released code)."""
    mc_samples: int = 1
    """Samples of the posterior in a step of ivon, a gradient each."""
    clip_radius: float | None = None
    """Bound on each coordinate of ivon's step before the learning rate. Default:
    none."""

    # -- posterior (sgvb, otmdr-bnn; of bsam and ivon the samples of a prediction) --
    posterior_std: float = 0.0067
    """Standard deviation that every weight starts with: softplus(-5), released code."""
    posterior_init: Literal["model", "released"] = "model"
    """Means that start as the model's own initial weights, or means and scales that are
    drawn as the released code draws them (0.1 and softplus(-5) or so)."""
    prior: Literal["normal", "mixture", "fitted"] = "normal"
    """Prior of the weights: normal, Blundell's scale mixture (1 and e^-6, half each),
    or normals that are fitted to each array (empirical Bayes)."""
    prior_std: float = 0.1
    """Standard deviation of the normal prior; 0.1 in the OT-MDR authors' code."""
    kl_weight: float = 1.0
    """Weight of KL / N beside the mean log-likelihood: 1 is the evidence bound, less a
    cold posterior; 5e-6 in the released code."""
    kl_schedule: Literal["constant", "blundell", "warmup"] = "constant"
    """Its course: constant; high in the first batches of an epoch, of the same mean
    (Blundell et al., 2015); or growing from 0 over kl_warmup_epochs."""
    kl_warmup_epochs: float = 0.0
    """Epochs over which kl_schedule warmup grows."""
    estimator: Literal["weights", "local", "flipout"] = "weights"
    """Noise of sgvb: one sample of the weights a batch, or noise of each example's own
    (local reparameterisation, Flipout)."""
    posterior_norm: Literal["per_leaf", "global", "joint"] = "per_leaf"
    """Gradient norm of otmdr-bnn: for each array (the paper), over all means, or over
    means and scales (released code)."""
    sigma_gradient: Literal["center", "center_first", "particle"] = "center"
    """Where otmdr-bnn takes the gradient of scales: at the center (the paper), there
    but on the first part of the batch alone, or at the particle (released code)."""
    weight_noise: Literal["once", "each_step"] = "once"
    """How often a step of otmdr-bnn draws the weights' noise: once (the paper), or at
    each ascent step (released code)."""
    num_samples: int = 30
    """Samples of the posterior in a prediction; 30 in the OT-MDR authors' code. Of swag
    those of its Gaussian; 30 in Maddox et al., 2019. Of mc-dropout those of masks."""
    prediction: Literal["samples", "mean"] = "samples"
    """Predict with samples of the posterior or Gaussian, or with its mean alone; of
    mc-dropout with the network without dropout."""

    # -- members and averages of one run (snapshot, fge, swa, swag, edst) --
    base_method: Literal["sgd", "sam", "asam", "otmdr"] = "sgd"
    """What snapshot, fge, swa, swag and mc-dropout train with, and whose options they
    take."""
    cycles: int = 5
    """Cycles of snapshot, each of which gives a member (the authors' command)."""
    collect_start: float | None = None
    """Share of the run before fge cycles, or swa and swag average. Default: 160 of 200
    epochs for fge, 161 of 300 for swa and swag (their authors' commands)."""
    cycle_epochs: float = 2.0
    """Epochs of a cycle of fge, each of which gives a member (the authors' command)."""
    cycle_rates: tuple[float, float] = (0.05, 0.01)
    """Highest and lowest learning rate of fge's cycles (the authors' command for
    WideResNet-28-10)."""
    average_rate: float = 0.05
    """Constant learning rate at which swa and swag average (their authors' default)."""
    collect_every: float = 1.0
    """Epochs between two weights that enter the average of swa and swag."""
    swag_rank: int = 20
    """Deviations from the mean that swag keeps, each of the size of the model (Maddox
    et al., 2019). Its samples in a prediction are num_samples."""
    batchnorm_examples: int | None = None
    """Training images that BatchNorm statistics of swa's and swag's weights are
    computed from before a prediction. Default: all, as their authors."""

    # -- sparse training (dst, edst) --
    density: float = 0.2
    """Share of the weights that a sparse network has (Liu et al., 2022)."""
    prune_rate: float = 0.5
    """Share of a layer's weights that an update drops and grows elsewhere (the released
    code)."""
    prune_decay: Literal["cosine", "constant"] | None = None
    """Its course over the run. Default: cosine to 0.005 for dst, constant for edst (the
    authors' commands)."""
    mask_every: int | None = None
    """Steps between updates of the masks. Default: 1000 (the authors' command), or a
    twentieth of a run of less than 20,000 steps."""
    growth: Literal["gradient", "random"] = "gradient"
    """Where weights grow: where the gradient of all weights is largest (RigL, as in the
    authors' command), or anywhere (SET)."""
    tickets: int = 3
    """Sparse networks that edst collects, each at the end of a refinement phase."""
    exploration: float = 1 / 3
    """Share of the run before edst's first refinement (150 of 450 epochs, the authors'
    command)."""
    escape_rate: float = 0.8
    """Share of a layer's weights that edst drops and grows elsewhere between two
    tickets (the authors' command)."""

    # -- loss and optimizer --
    label_smoothing: float = 0.0
    """Probability taken from the label's class."""
    smoothing: Literal["all", "others"] = "all"
    """Spread it over all C classes (Szegedy et al., 2016), or over the other C - 1 (the
    released code)."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Base optimizer of the (robust) gradient. bsam and ivon have their own updates."""
    learning_rate: float = 0.1
    """Peak learning rate (appendix B.1)."""
    momentum: float = 0.9
    """Momentum of sgd, first moment of adam, bsam and ivon (released code)."""
    adam_eps: float = 1e-8
    """What adam and adamw add to the root of the second moment. The gradient of a
    posterior is per example: its presets divide this by the number of examples, for
    the steps of an objective that is summed over the data set."""
    nesterov: bool = False
    """Nesterov momentum of sgd (released code: off)."""
    weight_decay: float = 5e-4
    """Decay: added to the gradient for sgd and adam, decoupled for adamw (released
    code: 5e-4). Not of a posterior, which has a prior; of its point estimates. For bsam
    and ivon it is the prior's precision per example."""
    decay_all: bool = True
    """Decay norms and biases too, as the released code does. With --no-decay-all only
    arrays of two and more axes decay."""
    clip_norm: float | None = None
    """Clip the gradient to this global norm. Default: no clipping."""
    schedule: Literal["cosine", "step", "constant", "plateau"] = "cosine"
    """Learning rate: cosine to 0; step (x 0.2 at 30, 60 and 80 %, released code);
    constant; plateau (x 0.1 when the epoch's loss stops falling)."""
    warmup_epochs: float = 0.0
    """Epochs of linear warmup from 0."""
    plateau_patience: int = 10
    """Epochs without a lower loss before plateau acts (PyTorch's default)."""
    plateau_factor: float = 0.1
    """What plateau multiplies the learning rate by (PyTorch's default)."""

    # -- devices --
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

    # -- run --
    epochs: int = 40
    """Passes over the training set, each without its last partial batch."""
    steps: int | None = None
    """Number of steps, instead of epochs."""
    batch_size: int = 128
    """Examples a step (released code)."""
    seed: int = 0
    """Seed of initialisation, data order, augmentation, splits and noise."""
    eval_every: int = 1
    """Evaluate each so many epochs, and at the end."""
    eval_batch_size: int = 512
    """Examples a batch in evaluation. Results do not depend on it."""
    log_every: int = 50
    """Write training metrics each so many steps."""
    checkpoint_every: int | None = None
    """Save each so many steps; on many hosts at the next multiple of log_every.
    Default: after an epoch, but not twice in 15 seconds, at each new best, and every
    ten minutes."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints to keep, beside the best one."""
    max_skipped: int = 10
    """Stop after so many steps in a row whose loss or gradient was not finite."""

    def __post_init__(self):
        """Checks numbers; names are checked where they are looked up."""
        if self.method in baselines.ENSEMBLES:
            members = baselines.MEMBERS if self.members is None else self.members
            object.__setattr__(self, "members", members)
            object.__setattr__(self, "method", baselines.ENSEMBLES[self.method])
        for name in (
            "rho",
            "augment",
            "cycle_rates",
        ):  # lists, as from JSON, would not hash
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rho is not None:
            check_rho(self.rho)
        for field in dataclasses.fields(self):
            value, is_number = getattr(self, field.name), field.type in (int, float)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _check(self, field.name, number or not is_number, "a number")
            is_flag = field.type is bool
            _check(self, field.name, not is_flag or value in (True, False), "a flag")
        for name in (
            "epochs", "batch_size", "eval_every", "eval_batch_size", "log_every",
            "keep_checkpoints", "max_skipped", "num_particles", "num_samples",
            "plateau_patience", "look_every", "mc_samples", "cycles", "swag_rank",
            "tickets",
        ):  # fmt: skip
            _check(self, name, isinstance(getattr(self, name), int), "an integer")
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "steps", "checkpoint_every", "microbatch_size", "num_subbatches",
            "batchnorm_examples", "mask_every",
        ):  # fmt: skip
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            good = value is None or (whole and value >= 1)
            _check(self, name, good, "an integer of at least 1, or left out")
        for name in (
            "learning_rate", "weight_decay", "warmup_epochs", "noise_std", "kl_weight",
            "kl_warmup_epochs", "damping", "gsam_alpha", "look_alpha", "fisher_eta",
            "average_rate",
        ):  # fmt: skip
            _check(self, name, 0 <= getattr(self, name) < float("inf"), "at least 0")
        for name in (
            "posterior_std", "prior_std", "adam_eps", "data_factor", "precision_init",
            "hess_init", "cycle_epochs", "collect_every",
        ):  # fmt: skip
            _check(self, name, 0 < getattr(self, name) < float("inf"), "positive")
        for name in ("momentum", "label_smoothing", "label_noise"):
            _check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        good = self.rho_min is None or 0 <= self.rho_min < float("inf")
        _check(self, "rho_min", good, "at least 0, or left out")
        rate = self.dropout
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        good = rate is None or (number and 0 <= rate < 1)
        _check(self, "dropout", good, "in [0, 1), or left out")
        good = self.b2 is None or (isinstance(self.b2, float) and 0 <= self.b2 < 1)
        _check(self, "b2", good, "in [0, 1), or left out")
        _check(self, "plateau_factor", 0 < self.plateau_factor < 1, "in (0, 1)")
        for name in ("density", "prune_rate", "exploration", "escape_rate"):
            _check(self, name, 0 < getattr(self, name) < 1, "in (0, 1)")
        start, rates = self.collect_start, self.cycle_rates
        _check(self, "collect_start", start is None or 0 < start < 1, "in (0, 1)")
        falling = len(rates) == 2 and rates[0] >= rates[1] >= 0
        _check(self, "cycle_rates", falling, "two rates, the higher one first")
        _check(self, "swag_rank", self.swag_rank >= 2, "at least 2")
        _check(self, "validation", self.validation >= 0, "at least 0")
        clip = self.clip_norm
        _check(self, "clip_norm", clip is None or clip > 0, "positive, or left out")
        clip = self.clip_radius
        _check(self, "clip_radius", clip is None or clip > 0, "positive, or left out")
        for name, type_ in typing.get_type_hints(TrainConfig).items():
            _check_literal(self, name, type_)
        _check_members(self)

    @property
    def gradient_method(self) -> str:
        """The method that gives the gradient: the base where another one rides on it.

        Of sparse training "sgd".
        """
        if self.method in ("snapshot", "fge", "swa", "swag", "mc-dropout"):
            return self.base_method
        return "sgd" if self.method in ("dst", "edst") else self.method

    @property
    def member_names(self) -> tuple[str, ...]:
        """The model of each member; of a single model its own."""
        if self.members is None:
            return (self.model,)
        if self.members.isdigit():
            return (self.model,) * int(self.members)
        return tuple(name.strip() for name in self.members.split(","))

    @property
    def stacked(self) -> bool:
        """Whether all members are of one architecture."""
        return len(set(self.member_names)) == 1


# Options that may differ between a run and its resumption: they change no number (the
# mesh: none but by rounding, by which examples share a split and BatchNorm's batch).
RESUMABLE = frozenset(
    {
        "data_dir", "cache_dir", "download", "eval_batch_size", "eval_every",
        "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped", "mesh",
        "input", "remat", "member_map",
    }
)  # fmt: skip


def preset(name: str, num_particles: int = 1) -> TrainConfig:
    """A named configuration.

    Args:
      name: "demo" (digits), or a paper's experiment: "paper-cifar10",
        "paper-cifar100", "released-cifar10", "released-cifar100",
        "released-mode1.1-cifar10", "released-mode1.1-cifar100",
        "released-ensemble-cifar10", "released-ensemble-cifar100" (five ResNet-10),
        "sam-cifar10", "sam-cifar100", "bsam-cifar10", "bsam-cifar100" (the released
        commands of bSAM: ResNet-18); of Bayesian ResNet-10 (Table 4; give
        `model="resnet_18"` for the other column) "paper-bnn-cifar10",
        "released-bnn-cifar10", "sgvb-cifar10", and the same with "cifar100"; of its
        Table 3 (ResNet-10) "deep-ensemble-cifar10", "sam-ensemble-cifar10",
        "otmdr-ensemble-cifar10", "snapshot-cifar10", "fge-cifar10", "swa-cifar10",
        "swag-cifar10", "dst-cifar10", "edst-cifar10", and the same with "cifar100".
      num_particles: K, for those of OT-MDR: see :func:`otmdr_jax.preset`.

    Returns:
      A :class:`TrainConfig`.

    Raises:
      ValueError: An unknown name.

    Example:
      >>> from otmdr_jax import config
      >>> config.preset("released-cifar10").model  # what its "WRN-28-10" really is
      'wide_resnet_34_10'
      >>> config.preset("paper-cifar100").rho
      (0.1, 0.2)

    Reference: Nguyen et al., 2023, appendix B.1, and their released code.
    """
    if name not in PRESETS:
        known = ", ".join(map(repr, PRESETS))
        raise ValueError(f"preset must be one of {known}; got {name!r}.")
    if name == "demo":
        # One device: the batch need not suit the machine; there is little to divide.
        return TrainConfig(label_noise=0.2, epochs=28, eval_every=2, mesh="data=1")
    version, data = name.rsplit("-", 1)
    if version in _BAYESIAN:
        return _bayesian_preset(version, data, num_particles)
    if version == "bsam":
        return _bsam_preset(data)
    if version in baselines.PRESETS:
        return _baseline_preset(version, data, num_particles)
    common: dict[str, Any] = dict(data=data, epochs=200, model="wide_resnet_28_10")
    if version == "sam":
        # The radii of Foret et al., which the paper takes over (section 5.1).
        rho = (0.05,) if data == "cifar10" else (0.1,)
        return TrainConfig(method="sam", rho=rho, **common)
    options = presets.preset(name, num_particles)
    if version.startswith("released"):
        common |= dict(
            model="wide_resnet_34_10", label_smoothing=0.1, smoothing="others"
        )
        common["sum_particles"] = version in ("released", "released-ensemble")
    if version == "released-ensemble":
        # The first of the paper's Table 3, on one loss of the mean probability.
        common |= dict(model="resnet_10", members="5", ensemble="joint")
    return TrainConfig(method="otmdr", **common, **options)


def _bsam_preset(data: str) -> TrainConfig:
    """What the README of Moellenhoff & Khan's code runs, and how it evaluates that."""
    return TrainConfig(
        data=data,
        method="bsam",
        model="resnet_18",
        epochs=180,
        batch_size=200,
        num_subbatches=8,
        rho=(0.01,),
        learning_rate=0.5,
        warmup_epochs=5,
        # A prior precision of 10, divided by four times the training set.
        weight_decay=10 / 200_000,
        data_factor=4.0,
        num_samples=32,
    )


def _bayesian_preset(version: str, data: str, num_particles: int) -> TrainConfig:
    """Appendix B.3: Adam at 1e-3, a plateau schedule, 100 epochs, no weight decay."""
    common: dict[str, Any] = dict(
        data=data,
        model="resnet_10",
        epochs=100,
        optimizer="adam",
        learning_rate=1e-3,
        schedule="plateau",
        weight_decay=0.0,
        # Adam's 1e-8 beside the gradient of the sum over 50,000 examples.
        adam_eps=1e-8 / 50_000,
    )
    options = bnn.preset(
        "released" if "released" in version else "paper", num_particles
    )
    prior = {name: options[name] for name in ("prior_std", "kl_weight")}
    if version == "sgvb":
        return TrainConfig(method="sgvb", **common, **prior)
    if version == "released-bnn":
        common |= dict(
            batch_size=1024, activation="softplus", posterior_init="released"
        )
        common["sum_particles"] = num_particles > 1
    options["posterior_norm"] = options.pop("norm")
    return TrainConfig(method="otmdr-bnn", **common, **options)


def _baseline_preset(version: str, data: str, num_particles: int) -> TrainConfig:
    """A competitor's settings, with the paper's radii where there are any."""
    options = baselines.preset(version)
    if version == "sam-ensemble":
        options["rho"] = (0.05,) if data == "cifar10" else (0.1,)
    elif version == "otmdr-ensemble":
        options |= presets.preset(f"paper-{data}", num_particles)
    return TrainConfig(data=data, **options)


_BAYESIAN = ("paper-bnn", "released-bnn", "sgvb")

PRESETS = (
    "demo",
    *(name for name in presets.PRESETS if "-" in name),
    "sam-cifar10",
    "sam-cifar100",
    "bsam-cifar10",
    "bsam-cifar100",
    *(
        f"{version}-{data}"
        for version in (*_BAYESIAN, *baselines.PRESETS)
        for data in ("cifar10", "cifar100")
    ),
)


def save(config: TrainConfig, path: str | os.PathLike) -> None:
    """Writes a configuration as JSON, atomically."""
    path = pathlib.Path(path)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    os.replace(scratch, path)


def load(path: str | os.PathLike) -> TrainConfig:
    """Reads a configuration that :func:`save` wrote, or one written by hand.

    Options that are left out have their defaults.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no JSON object, or holds an unknown option or a bad value.
    """
    path = pathlib.Path(path)
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object of options.")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{path} holds unknown options {', '.join(unknown)}; "
            f"known are {', '.join(sorted(known))}."
        )
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    try:
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Options that differ and change a run's numbers: name -> (old, new)."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return {
        name: (before[name], after[name])
        for name in before
        if before[name] != after[name] and name not in RESUMABLE
    }


def _check_members(config: TrainConfig) -> None:
    if config.members is None:
        for name in ("ensemble", "member_data", "member_map"):
            default = TrainConfig.__dataclass_fields__[name].default
            _check(config, name, getattr(config, name) == default, "left out without "
                   "members")  # fmt: skip
        return
    _check(config, "members", isinstance(config.members, str), "text: '5', or names")
    names = config.member_names
    _check(
        config,
        "members",
        len(names) >= 2 and all(names),
        "a number of at least 2, or the names of as many models with commas between "
        "them",
    )
    if not config.members.isdigit():
        default = TrainConfig.__dataclass_fields__["model"].default
        _check(config, "model", config.model in (default, *names), "left out where "
               "members names the models")  # fmt: skip
    if config.ensemble == "joint":
        _check(config, "member_data", config.member_data == "shared", "'shared' for a "
               "joint loss, which is of one batch")  # fmt: skip


def _check(config: TrainConfig, name: str, holds: bool, must: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {must}, got {getattr(config, name)!r}.")


def _check_literal(config: TrainConfig, name: str, type_: Any) -> None:
    """Checks a field of type Literal[...] or Literal[...] | None."""
    parts = [type_]
    if isinstance(type_, types.UnionType) or typing.get_origin(type_) is typing.Union:
        parts = list(typing.get_args(type_))
    words = [w for p in parts if typing.get_origin(p) is Literal
             for w in typing.get_args(p)]  # fmt: skip
    if words:
        words += [None] if type(None) in parts else []
        known = ", ".join(map(repr, words))
        _check(config, name, getattr(config, name) in words, f"one of {known}")
