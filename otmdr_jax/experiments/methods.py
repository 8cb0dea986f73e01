"""The one table of training methods: a name -> Method(init, step, predict).

A method is three pure functions around a model and an optimizer. `step` takes a batch
of normalised images, does one update and skips it as a whole if the loss or the
gradient is not finite.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from otmdr_jax import baselines, bnn
from otmdr_jax.baselines.bsam import RHO as BSAM_RHO
from otmdr_jax.baselines.fisher_sam import ETA as FISHER_ETA
from otmdr_jax.baselines.fisher_sam import RHO as FISHER_RHO
from otmdr_jax.baselines.gsam import RHO as GSAM_RHO
from otmdr_jax.baselines.looksam import RHO as LOOKSAM_RHO
from otmdr_jax.core import tree
from otmdr_jax.core.gradient import PAPER_RHO
from otmdr_jax.core.keys import one_key
from otmdr_jax.experiments import centers, precision

PyTree = Any
Batch = tuple[jax.Array, jax.Array]


class TrainState(NamedTuple):
    """All that a run needs to go on: a pytree of arrays.

    Attributes:
      params: The model's parameters, the center: for a Bayesian network a
        :class:`otmdr_jax.bnn.MeanField` over them.
      model_state: BatchNorm's running statistics.
      opt_state: The optimizer's state.
      key: PRNG key of the next step.
      step: Number of steps taken, skipped ones included.
      skipped: How many steps were skipped because they were not finite.
      skipped_in_row: How many of them since the last good one, but for those that
        looked for a loss scale.
      loss_scale: The :class:`otmdr_jax.experiments.precision.LossScale` of float16,
        or None.
      memory: What the method's gradient remembers of the steps before, or None: the
        precision of bSAM, the Hessian of IVON, the direction of LookSAM.
      method_state: What a method keeps of its own, as the members that it collects, or
        None: see :mod:`otmdr_jax.baselines`.
    """

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: jax.Array
    step: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    loss_scale: precision.LossScale | None = None
    memory: PyTree = None
    method_state: PyTree | None = None


class Method(NamedTuple):
    """A training method as pure functions.

    Attributes:
      init: (key, example_images) -> TrainState; of the images the shape is read alone.
      step: (state, (images, labels)) -> (state, metrics); compile it with `jax.jit`
        and donate the state. Metrics are scalars: loss, center_loss, gap, accuracy,
        grad_norm, distance, skipped, skipped_in_row, loss_scale where there is one,
        likelihood_term and kl for Bayesian networks.
      predict: (state, images) -> (S, B, C) log-probabilities of S samples of the
        posterior; of one weight vector S is 1.
      posterior: state -> its :class:`otmdr_jax.bnn.MeanField`, or None for a method
        without one.
      batch_statistics: (state, images) -> BatchNorm statistics of a batch at what
        predicts, where no training step has seen it; None for most methods. Of
        "laplace" (state, (images, mask)) -> the curvature of these.
      settle: (state, the mean of these over batches, of curvatures the sum) -> a state
        to predict with, which is not for further steps.
    """

    init: Callable[[jax.Array, jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    predict: Callable[[TrainState, jax.Array], jax.Array]
    posterior: Callable[[TrainState], bnn.MeanField] | None = None
    batch_statistics: Callable[[TrainState, jax.Array], PyTree] | None = None
    settle: Callable[[TrainState, PyTree], TrainState] | None = None


# A method -> the options of the robust gradient that make it; None: the plain one.
# Radii for CIFAR-10 by their papers.
METHODS: dict[str, dict[str, Any] | None] = {
    "sgd": None,
    "sam": {"rho": (0.05,), "split": "shared"},
    "asam": {"rho": (0.5,), "split": "shared", "adaptive": True},
    "otmdr": {"rho": PAPER_RHO, "split": "random"},
    "sgvb": None,
    "otmdr-bnn": {"rho": bnn.PAPER_RHO, "split": "random"},
    "gsam": {"rho": (GSAM_RHO,)},
    "looksam": {"rho": (LOOKSAM_RHO,)},
    "fisher-sam": {
        "rho": (FISHER_RHO,),
        "split": "shared",
        "fisher": FISHER_ETA,
    },
    "bsam": {"rho": (BSAM_RHO,)},
    "ivon": {},
}

# Those whose center is a posterior.
BAYESIAN = ("sgvb", "otmdr-bnn")

# Those with particles, which devices may share.
PARTICLES = ("otmdr", "otmdr-bnn")
# Those that train a Gaussian around one weight vector by an update of their own, which
# takes the place of the base optimizer: see optimizers.create.
VARIATIONAL = ("bsam", "ivon")
# Those that ride on a method of one weight vector, "sgd" unless told otherwise: they
# keep copies of the weights, or average them. docs/collected.md.
COLLECTING = ("snapshot", "fge", "edst")
AVERAGING = ("swa", "swag")
BASES = ("sgd", "sam", "asam", "otmdr")
# Those of sparse networks: docs/sparse.md.
SPARSE = ("dst", "edst")
# Samples of its masks in a prediction, on a method of one weight vector.
DROPPING = ("mc-dropout",)
# Those fitted to what was trained, from the curvature over the training set.
FITTED = ("laplace",)
RIDING = ("snapshot", "fge", "swa", "swag", "dst", "edst", *DROPPING, *FITTED)
METHODS |= dict.fromkeys(RIDING)


def create(
    name: str,
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    smoothing: str = "all",
    sum_particles: bool = False,
    loss_scaling: bool = False,
    **options: Any,
) -> Method:
    """Builds a method from a model and an optimizer.

    Args:
      name: "sgd" (the plain gradient, whatever the optimizer), "sam", "asam", "otmdr";
        for Bayesian networks "sgvb" and "otmdr-bnn"; "gsam", "looksam", "fisher-sam",
        "bsam", "ivon", "snapshot", "fge", "swa", "swag", "dst", "edst", "mc-dropout"
        and "laplace" of :mod:`otmdr_jax.baselines`.
      model: A :class:`otmdr_jax.models.Model`, or anything with its `init` and `apply`.
        Where its `dropout` is above 0 it gets a key for each example while it trains.
      optimizer: What turns the gradient into an update; gets `value=` where it takes
        extra arguments. For "bsam" :func:`otmdr_jax.baselines.bsam_rule`, for
        "ivon" :func:`otmdr_jax.baselines.ivon_rule`.
      label_smoothing: See :func:`cross_entropy`.
      smoothing: See :func:`cross_entropy`.
      sum_particles: Add the K particles' gradients up instead of averaging them, as
        mode 1 of the released code.
      loss_scaling: Scale losses dynamically, as float16 needs: see
        :mod:`otmdr_jax.experiments.precision`.
      **options: Those of :func:`otmdr_jax.value_and_grad`, over the method's own. With
        `axis_name` (and for particles `particle_axis_name`) the step runs inside
        `jax.shard_map` or `jax.pmap`: see :mod:`otmdr_jax.parallel`. "sgd" has
        `axis_name` and `microbatch_size`. "sgvb" and "otmdr-bnn" have those of
        :func:`otmdr_jax.experiments.centers.posterior`; `num_data` is required.
        "snapshot" and "fge" have `base`, the method that they ride on, its options,
        and `ends` of
        :func:`otmdr_jax.baselines.collect`; "swa" and "swag" those of
        :func:`otmdr_jax.baselines.average`; "dst" and "edst" those of
        :func:`otmdr_jax.baselines.dynamic`, and "edst" `ends`. Their learning rates are
        the optimizer's. "mc-dropout" has `base`, its options, and those of
        :func:`otmdr_jax.baselines.mc_dropout`, "laplace" likewise those of
        :func:`otmdr_jax.baselines.laplace`. The others have those of their functions in
        :mod:`otmdr_jax.experiments.centers`.

    Returns:
      A :class:`Method`.

    Raises:
      ValueError: An unknown name; TypeError: an option that the method has not.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from otmdr_jax import methods, models
      >>> model = models.create("cnn_small", num_classes=10)
      >>> method = methods.create("otmdr", model, optax.sgd(0.1), num_particles=2)
      >>> images, labels = jnp.zeros((4, 8, 8, 1)), jnp.arange(4)
      >>> state = method.init(jax.random.key(0), images)
      >>> state, metrics = jax.jit(method.step)(state, (images, labels))
      >>> method.predict(state, images).shape
      (1, 4, 10)
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}.")
    if name in RIDING:
        shared = dict(
            label_smoothing=label_smoothing,
            smoothing=smoothing,
            sum_particles=sum_particles,
            loss_scaling=loss_scaling,
        )
        return _riding(name, model, optimizer, **shared, **options)
    own = METHODS[name]
    if sum_particles and (own is None or name in centers.OWN):
        raise TypeError(
            f"{name} has no particles to add up: leave sum_particles out, or use "
            f"{' or '.join(PARTICLES)}."
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_fn(params, batch, model_state):
        images, labels, *keys = batch
        dropped = {"keys": keys[0]} if keys else {}
        logits, model_state = model.apply(
            params, model_state, images, train=True, **dropped
        )
        loss = cross_entropy(logits, labels, label_smoothing, smoothing)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return loss, (model_state, accuracy)

    if loss_scaling:
        loss_fn = precision.scale_loss(loss_fn, has_aux=True)
    if name in BAYESIAN:
        center = centers.posterior(loss_fn, own, **options)
    elif name in centers.OWN:
        center = centers.OWN[name](loss_fn, own, **options)
    else:
        center = centers.weights(name, loss_fn, own, options)
    copies = options.get("num_particles", 1) if sum_particles else 1

    def init(key, example_images):
        # A third key, that models of one weight vector have the keys they had.
        init_key, key, center_key = jax.random.split(one_key(key), 3)
        params, model_state = model.init(init_key, example_images)
        params = center.init(center_key, params)
        # Three arrays, not one three times: the state is made to be donated.
        step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        opt_state = optimizer.init(params)
        scale = precision.init() if loss_scaling else None
        return TrainState(
            params, model_state, opt_state, key, step, skipped, in_row, scale,
            center.start(params),
        )  # fmt: skip

    def step(state, batch):
        key, step_key = jax.random.split(state.key)
        scaled = {"loss_scale": state.loss_scale.scale} if loss_scaling else {}
        if baselines.rate_of(model):
            # With the batch: every pass sees what its examples dropped in the others.
            count, axis = len(batch[1]), options.get("axis_name")
            batch = (*batch, baselines.example_keys(step_key, count, axis))
        result, memory = center.gradient(
            state.params,
            batch,
            state.model_state,
            key=step_key,
            step=state.step,
            memory=state.memory,
            **scaled,
        )
        model_state, accuracy = result.aux
        grads = jax.tree.map(lambda g: copies * g, result.grads)
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            value=result.value,
            **center.arguments(state.memory, memory),
        )
        params = optax.apply_updates(state.params, updates)
        info = result.diagnostics
        # Of every pass: a particle that went astray may still have a finite gradient.
        seen = (result.value, info.center_loss, info.grad_norm, info.ascent_norms)
        finite = jnp.all(jnp.isfinite(jnp.hstack(seen)))
        params, model_state, opt_state, memory = jax.tree.map(
            lambda new, old: new if _counts(new) else jnp.where(finite, new, old),
            (params, model_state, opt_state, memory),
            (state.params, state.model_state, state.opt_state, state.memory),
            is_leaf=_counts,
        )
        # While a loss scale comes down from where gradients overflow, the loss at the
        # center is finite: such a step is skipped, but it is no sign of divergence.
        searching = jnp.zeros((), bool)
        if loss_scaling:
            can_fall = state.loss_scale.scale > precision.SMALLEST_SCALE
            searching = jnp.isfinite(info.center_loss) & can_fall
        in_row = jnp.where(finite, 0, state.skipped_in_row + jnp.where(searching, 0, 1))
        skipped = state.skipped + jnp.where(finite, 0, 1)
        metrics = {
            "loss": result.value,
            "center_loss": info.center_loss,
            "gap": info.gap,
            "accuracy": accuracy,
            "grad_norm": info.grad_norm,
            "distance": jnp.mean(info.distances),
            "skipped": jnp.where(finite, 0, 1),
            "skipped_in_row": in_row,
            **center.metrics(result),
        }
        scale = state.loss_scale
        if loss_scaling:
            metrics["loss_scale"] = scale.scale
            scale = precision.adjust(scale, finite)
        return TrainState(
            params, model_state, opt_state, key, state.step + 1, skipped, in_row, scale,
            memory,
        ), metrics  # fmt: skip

    def predict(state, images):
        def log_probs(params):
            logits, _ = model.apply(params, state.model_state, images, train=False)
            return jax.nn.log_softmax(logits.astype(jnp.float32))  # (B, C)

        # Of the step: all batches of an evaluation see the same samples.
        key = jax.random.split(state.key, 3)[2]
        return center.predict(log_probs, state.params, key, state.memory)

    posterior_of = center.posterior
    if posterior_of is None:
        return Method(init, step, predict)
    return Method(
        init, step, predict, lambda state: posterior_of(state.params, state.memory)
    )


def _counts(node) -> bool:
    """Whether it is the count of a schedule.

    A skipped step counts there, as it does in the state's own step: or the learning
    rate would lag behind what is collected at its minima, and never reach its end.
    """
    return isinstance(node, optax.ScaleByScheduleState)


def _riding(name, model, optimizer, *, base="sgd", ends=None, **options):
    """A method on top of another one."""
    if base not in BASES or (name in SPARSE and base != "sgd"):
        known = "sgd" if name in SPARSE else ", ".join(BASES)
        raise ValueError(f"base of {name} must be one of {known}; got {base!r}.")
    if ends is not None and name not in COLLECTING + AVERAGING:
        raise TypeError(
            f"{name} collects nothing on its way: leave ends out, got {ends!r}."
        )
    takes = {
        "swag": ("rank", "num_samples"),
        "laplace": ("structure", "num_samples", "prior_precision"),
        "mc-dropout": ("num_samples", "mean_only"),
        **dict.fromkeys(
            SPARSE, ("density", "rate", "steps", "growth", "escapes", "escape_rate")
        ),
    }
    own = {key: options.pop(key) for key in takes.get(name, ()) if key in options}
    if name in SPARSE:
        # Its key is replaced by one of the method's.
        optimizer = baselines.dynamic(optimizer, jax.random.key(0), **own)
    method = create(base, model, optimizer, **options)
    if name in SPARSE:
        method = baselines.masked_from_the_start(method)
    if name in DROPPING:
        return baselines.mc_dropout(method, model, **own)
    if name in COLLECTING:
        return baselines.collect(method, ends)
    if name == "laplace":
        # Without samples it predicts with the mode, as its base does.
        mode_only = own.get("num_samples") == 0
        return method if mode_only else baselines.laplace(method, model, **own)
    if name == "swag":
        own = {"rank": baselines.RANK, "num_samples": baselines.NUM_SAMPLES, **own}
    return (
        baselines.average(method, model, ends, **own) if name in AVERAGING else method
    )


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    smoothing: str = "all",
) -> jax.Array:
    """Mean cross entropy with smoothed labels.

    Args:
      logits: (B, C).
      labels: (B,) integers.
      label_smoothing: a, the probability taken from the label's class.
      smoothing: Where it goes: "all" spreads it over all C classes, so that the label
        keeps 1 - a + a / C (Szegedy et al., 2016; PyTorch, Optax); "others" over the
        other C - 1, so that it keeps 1 - a (the released code of OT-MDR).

    Returns:
      A scalar in nats, float32 or wider.

    Raises:
      ValueError: An unknown smoothing.
    """
    if smoothing not in ("all", "others"):
        raise ValueError(f"smoothing must be 'all' or 'others', got {smoothing!r}.")
    logits = logits.astype(tree.accumulation_dtype(logits))
    classes = logits.shape[-1]
    targets = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    if label_smoothing:
        share = 1 - label_smoothing
        if smoothing == "all":
            targets = share * targets + label_smoothing / classes
        else:
            rest = label_smoothing / (classes - 1)
            targets = share * targets + rest * (1 - targets)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))
