"""A training run's options: one flat, frozen dataclass.

Every option has its default's source beside it. The same class serves the Python API,
the command line (`otmdr train --help` prints these comments) and `config.json`.
"""

import dataclasses
from typing import Literal

from otmdr_jax.baselines import presets as baselines
from otmdr_jax.experiments.config.checks import check

MethodName = Literal[
    "sgd", "sam", "asam", "otmdr", "sgvb", "otmdr-bnn",
    "gsam", "looksam", "fisher-sam", "bsam", "ivon",
    "snapshot", "fge", "swa", "swag", "dst", "edst", "mc-dropout", "laplace",
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
    A Gaussian fitted to what was trained: laplace. deep-ensemble, sam-ensemble and
    otmdr-ensemble are sgd, sam and otmdr with five members, or --members.
    docs/baselines.md has the equations."""
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
    """What snapshot, fge, swa, swag, mc-dropout and laplace train with, and whose
    options they take."""
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

    # -- laplace --
    laplace: Literal["last-layer", "last-layer-kron", "diagonal"] = "last-layer"
    """Of what: all of the last layer's matrix, up to 10,000 parameters; its Kronecker
    factors, for larger ones; or the diagonal of all weights, for which predictions
    follow the network's linearisation."""
    prior_precision: float | None = None
    """Precision of its Gaussian prior. Default: that of highest marginal likelihood."""
    laplace_examples: int | None = None
    """Training images that its curvature is computed from, scaled up to all. Default:
    all."""

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
        """Resolves an ensemble's name, and checks what was given."""
        if self.method in baselines.ENSEMBLES:
            members = baselines.MEMBERS if self.members is None else self.members
            object.__setattr__(self, "members", members)
            object.__setattr__(self, "method", baselines.ENSEMBLES[self.method])
        # Lists, as from JSON, would not hash.
        for name in ("rho", "augment", "cycle_rates"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check(self)

    @property
    def gradient_method(self) -> str:
        """The method that gives the gradient: the base where another one rides on it.

        Of sparse training "sgd".
        """
        if self.method in ("snapshot", "fge", "swa", "swag", "mc-dropout", "laplace"):
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
