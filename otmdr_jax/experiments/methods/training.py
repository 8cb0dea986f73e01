"""The parts that all methods share.

They are the training state, the loss, a step that is skipped where it is not finite,
and the prediction. What differs between methods is their :class:`Rule`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from otmdr_jax import baselines, bnn
from otmdr_jax.core import tree
from otmdr_jax.core.gradient import Diagnostics
from otmdr_jax.core.keys import one_key
from otmdr_jax.core.transform import keep
from otmdr_jax.experiments import patterns, precision

PyTree = Any
Batch = tuple[jax.Array, jax.Array]
Share = Callable[[PyTree, jax.Array, Any], PyTree]


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
        precision of bSAM, the Hessian of IVON, the direction of LookSAM, the multiplier
        of the dual form.
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
        likelihood_term and kl for Bayesian networks, lambda, budget_used and
        dual_value for the dual form.
      predict: (state, images) -> (S, B, C) log-probabilities of S samples of the
        posterior, or outputs where there are no classes; of one weight vector S is 1.
      posterior: state -> its :class:`otmdr_jax.bnn.MeanField`, or None for a method
        without one.
      finalize: The pass over the training set that a prediction needs, or None for
        most methods, which predict with the state that they train.
      share: (memories of all members on a leading axis, (M,) whose step was finite, the
        device axis that members are spread over) -> the one memory that all of them go
        on with; None where members have nothing in common.
      classes: Whether `predict` gives log-probabilities of classes.
    """

    init: Callable[[jax.Array, jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    predict: Callable[[TrainState, jax.Array], jax.Array]
    posterior: Callable[[TrainState], bnn.MeanField] | None = None
    finalize: baselines.Finalize | None = None
    share: Share | None = None
    classes: bool = True


class Update(NamedTuple):
    """The result of a rule's update.

    Attributes:
      updates: To be added to the parameters.
      opt_state: The optimizer's next state.
      memory: What the gradient remembers for the next step.
      aux: (statistics, accuracy) of the pass at the center.
      info: The gradient's diagnostics.
      metrics: Further scalars for the log.
    """

    updates: PyTree
    opt_state: PyTree
    memory: PyTree
    aux: tuple[PyTree, jax.Array]
    info: Diagnostics
    metrics: dict[str, jax.Array] = {}  # noqa: RUF012 - never written to


class Rule(NamedTuple):
    """How a method initialises, updates and predicts.

    Attributes:
      start: (key, the model's parameters) -> what is trained, which is the parameters
        themselves or a posterior over them.
      init: What is trained -> (the optimizer's state, the memory before the first
        step).
      update: (state, batch, further arguments of the loss) -> :class:`Update`.
      predict: (log_probs_fn, state, key) -> (S, B, C), with log_probs_fn from the
        model's parameters to (B, C) log-probabilities.
      posterior: state -> its posterior; None where there is none.
      share: See :class:`Method`.
    """

    start: Callable[[jax.Array, PyTree], PyTree]
    init: Callable[[PyTree], tuple[PyTree, PyTree]]
    update: Callable[[TrainState, Any, dict[str, Any]], Update]
    predict: Callable[..., jax.Array]
    posterior: Callable[[TrainState], bnn.MeanField] | None = None
    share: Share | None = None


class Loss(NamedTuple):
    """The loss that a method minimises, a mean over examples.

    Attributes:
      label_smoothing: The probability that is taken from the label's class.
      smoothing: Where it goes, "all" or "others": see :func:`cross_entropy`.
      scaling: Scale losses dynamically, as float16 needs: see
        :mod:`otmdr_jax.experiments.precision`.
      function: (outputs, targets) -> (B,) losses of the examples; None for the cross
        entropy.
      classes: Whether targets are class numbers and outputs logits.
      frozen: Patterns of the names of parameters that it is no function of, but that
        are its constants: see :mod:`otmdr_jax.experiments.patterns`.
    """

    label_smoothing: float = 0.0
    smoothing: str = "all"
    scaling: bool = False
    function: Callable[[jax.Array, Any], jax.Array] | None = None
    classes: bool = True
    frozen: tuple[str, ...] = ()

    def mean(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """The mean over a batch."""
        if self.function is None and self.classes:
            smoothed = self.label_smoothing, self.smoothing
            return cross_entropy(outputs, targets, *smoothed)
        return jnp.mean(self.of_examples(outputs, targets))

    def of_examples(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """(B,) losses, without label smoothing."""
        if self.function is None and not self.classes:
            raise ValueError(
                "targets that are no class numbers have no cross entropy: give the "
                "loss that the run was trained on, open_run(folder, loss=...)."
            )
        if self.function is None:
            return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        losses = jnp.asarray(self.function(outputs, targets))
        if losses.shape != outputs.shape[:1]:
            raise ValueError(
                "loss(outputs, targets) must be the losses of the examples, of shape "
                f"{outputs.shape[:1]}, got {losses.shape} for outputs {outputs.shape} "
                f"and targets {jnp.shape(targets)}. Leave the mean over examples to "
                "the training; take that over other axes."
            )
        return losses.astype(tree.accumulation_dtype(losses))


def build(
    model: Any, loss: Loss, make: Callable[[Callable], Rule], axis_name: Any = None
) -> Method:
    """Makes a method of a model, a loss and a rule.

    Args:
      model: A :class:`otmdr_jax.models.Model`, or anything with its `init` and `apply`.
        Where its `dropout` is above 0 it gets a key for each example while it trains.
      loss: The loss.
      make: (params, batch, model_state) -> (loss, (statistics, accuracy)), as a
        function -> the :class:`Rule` of it.
      axis_name: The device axis that the batch is divided over.
    """

    def loss_fn(params, batch, model_state, fixed=None):
        params = patterns.join(params, fixed)
        images, labels, *keys = batch
        dropped = {"keys": keys[0]} if keys else {}
        # Of an ensemble as one model the logits of its mean probability.
        logits, model_state = model.apply(
            params, model_state, images, train=True, **dropped
        )
        value = loss.mean(logits, labels)
        # Huge images have an infinite variance, and a finite loss.
        value = jnp.where(tree.all_finite(model_state), value, jnp.nan)
        accuracy = jnp.full((), jnp.nan)
        if loss.classes:
            accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return value, (model_state, accuracy)

    if loss.scaling:
        loss_fn = precision.scale_loss(loss_fn, has_aux=True)
    rule = make(loss_fn)

    def trained_part(state):
        """The state as a rule sees it, and the frozen leaves."""
        trained, fixed = patterns.split(loss.frozen, state.params)
        return state._replace(params=trained), fixed

    def init(key, example_images):
        # A third key, that models of one weight vector have the keys they had.
        init_key, key, own_key = jax.random.split(one_key(key), 3)
        params, model_state = model.init(init_key, example_images)
        if loss.frozen:
            patterns.check_frozen(loss.frozen, patterns.names(params))
        params = patterns.pinned(loss.frozen, rule.start(own_key, params), params)
        opt_state, memory = rule.init(patterns.split(loss.frozen, params)[0])
        # Three arrays, not one three times: the state is made to be donated.
        step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(
            params,
            model_state,
            opt_state,
            key,
            step,
            skipped,
            in_row,
            precision.init() if loss.scaling else None,
            memory,
        )

    def step(state, batch):
        key, step_key = jax.random.split(state.key)
        scaled = {"loss_scale": state.loss_scale.scale} if loss.scaling else {}
        if baselines.rate_of(model):
            # With the batch: every pass sees what its examples dropped in the others.
            keys = baselines.example_keys(step_key, len(batch[1]), axis_name)
            batch = (*batch, keys)
        state, fixed = trained_part(state)
        constants = {} if fixed is None else {"fixed": fixed}
        found = rule.update(state, batch, scaled | constants)
        model_state, accuracy = found.aux
        params = optax.apply_updates(state.params, found.updates)
        info = found.info
        # Of every pass: a particle that went astray may still have a finite gradient.
        seen = info.robust_loss, info.center_loss, info.grad_norm, info.ascent_norms
        finite = tree.all_finite(seen)
        params, model_state, opt_state, memory = keep(
            finite,
            (params, model_state, found.opt_state, found.memory),
            (state.params, state.model_state, state.opt_state, state.memory),
        )
        # While a loss scale comes down from where gradients overflow, the loss at the
        # center is finite: such a step is skipped, but it is no sign of divergence.
        searching = jnp.zeros((), bool)
        if loss.scaling:
            can_fall = state.loss_scale.scale > precision.SMALLEST_SCALE
            searching = jnp.isfinite(info.center_loss) & can_fall
        in_row = jnp.where(finite, 0, state.skipped_in_row + jnp.where(searching, 0, 1))
        metrics = {
            "loss": info.robust_loss,
            "center_loss": info.center_loss,
            "gap": info.gap,
            "accuracy": accuracy,
            "grad_norm": info.grad_norm,
            "distance": jnp.mean(info.distances),
            "skipped": jnp.where(finite, 0, 1),
            "skipped_in_row": in_row,
            **found.metrics,
        }
        if not loss.classes:
            del metrics["accuracy"]
        scale = state.loss_scale
        if loss.scaling:
            metrics["loss_scale"] = scale.scale
            scale = precision.adjust(scale, finite)
        counts = state.step + 1, state.skipped + jnp.where(finite, 0, 1), in_row
        params = patterns.join(params, fixed)
        return (
            TrainState(params, model_state, opt_state, key, *counts, scale, memory),
            metrics,
        )

    def predict(state, images):
        state, fixed = trained_part(state)

        def log_probs(params):
            params = patterns.join(params, fixed)
            logits, _ = model.apply(params, state.model_state, images, train=False)
            logits = logits.astype(jnp.float32)
            return jax.nn.log_softmax(logits) if loss.classes else logits  # (B, C)

        # Of the step: all batches of an evaluation see the same samples.
        key = jax.random.split(state.key, 3)[2]
        return rule.predict(log_probs, state, key)

    posterior = rule.posterior
    if posterior is not None and loss.frozen:
        of_trained = posterior
        posterior = lambda state: of_trained(trained_part(state)[0])  # noqa: E731
    return Method(
        init, step, predict, posterior, share=rule.share, classes=loss.classes
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
      ValueError: An unknown smoothing, labels of another shape; TypeError: no integers.
    """
    if labels.shape != logits.shape[:-1]:  # (B, 1) would meet every example
        raise ValueError(
            "labels must be class numbers, one for each example, of shape "
            f"{logits.shape[:-1]}, got {labels.shape}: take argmax of one-hot ones."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
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


def weights_of(trained: PyTree) -> PyTree:
    """The one weight vector that stands for what is trained: a posterior's mean."""
    return bnn.mean(trained) if isinstance(trained, bnn.MeanField) else trained


def with_weights(trained: PyTree, weights: PyTree) -> PyTree:
    """What is trained, at other weights: the means of a posterior, whose scales stay.

    Args:
      trained: Parameters, or a posterior over them.
      weights: A model's parameters, with None where a leaf stays as it is.
    """
    if isinstance(trained, bnn.MeanField):
        return trained._replace(
            mean=with_weights(trained.mean, weights),
            point=with_weights(trained.point, weights),
        )
    return jax.tree.map(
        lambda x, new: x if x is None or new is None else jnp.asarray(new, x.dtype),
        trained,
        weights,
        is_leaf=lambda x: x is None,
    )


def decays(trained: PyTree, everything: bool, stacked: bool = False) -> PyTree:
    """Where weight decay acts: True for every leaf, or for kernels alone.

    Not on a posterior, which has a prior instead; on its point estimates it does.

    Args:
      trained: The parameters.
      everything: Whether biases and the scales of norms decay too.
      stacked: Whether the first axis of each leaf is that of members.
    """

    def of(leaves):
        return jax.tree.map(
            lambda leaf: everything or jnp.ndim(leaf) > 1 + stacked, leaves
        )

    if not isinstance(trained, bnn.MeanField):
        return of(trained)
    mean, scale = (
        jax.tree.map(lambda _: False, part)
        for part in (trained.mean, trained.raw_scale)
    )
    return bnn.MeanField(mean, scale, of(trained.point))
