"""The one table of methods, and their making by name."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from otmdr_jax.experiments.methods import (
    collected,
    gaussian,
    otmdr,
    point,
    post_hoc,
    posterior,
    sam,
    sparse,
)
from otmdr_jax.experiments.methods.base import MethodOptions, no_frozen
from otmdr_jax.experiments.methods.training import Loss, Method
from otmdr_jax.experiments.options import hint

# A method is a dataclass of its options, which says all that a run asks of it; this is
# the only list of them.
METHODS: dict[str, type[MethodOptions]] = {
    kind.name: kind
    for kind in (
        point.Sgd,
        sam.Sam,
        sam.Asam,
        otmdr.Otmdr,
        otmdr.OtmdrDual,
        posterior.Sgvb,
        posterior.OtmdrBnn,
        posterior.OtmdrDualBnn,
        sam.Gsam,
        sam.LookSam,
        sam.FisherSam,
        gaussian.Bsam,
        gaussian.Ivon,
        collected.Snapshot,
        collected.Fge,
        collected.Swa,
        collected.Swag,
        sparse.Dst,
        sparse.Edst,
        post_hoc.McDropout,
        post_hoc.Laplace,
    )
}


def kind_of(name: str) -> type[MethodOptions]:
    """The dataclass of a method.

    Args:
      name: The method's.

    Raises:
      ValueError: An unknown name.
    """
    if name not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}; got {name!r}."
            + hint(name, METHODS)
        )
    return METHODS[name]


def create(
    name: str,
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    smoothing: str = "all",
    loss: Callable[[jax.Array, Any], jax.Array] | None = None,
    classes: bool = True,
    sum_particles: bool = False,
    loss_scaling: bool = False,
    freeze: Sequence[str] = (),
    **options: Any,
) -> Method:
    """Builds a method from a model and an optimizer.

    Args:
      name: "sgd" (the plain gradient, whatever the optimizer), "sam", "asam", "otmdr",
        "otmdr-dual"; for Bayesian networks "sgvb", "otmdr-bnn" and "otmdr-dual-bnn";
        "gsam", "looksam", "fisher-sam", "bsam", "ivon", "snapshot", "fge", "swa",
        "swag", "dst", "edst", "mc-dropout" and "laplace" of
        :mod:`otmdr_jax.baselines`.
      model: A :class:`otmdr_jax.models.Model`, or anything with its `init` and `apply`.
        Where its `dropout` is above 0 it gets a key for each example while it trains.
      optimizer: What turns the gradient into an update; gets `value=` where it takes
        extra arguments. "bsam" and "ivon" are whole optimizers: of these an
        `optax.chain` of what follows their update, `optax.identity()` for nothing.
      label_smoothing: See :func:`cross_entropy`.
      smoothing: See :func:`cross_entropy`.
      loss: (outputs, targets) -> (B,) losses of the examples, instead of the cross
        entropy.
      classes: Whether targets are class numbers and outputs logits. If not, steps have
        no accuracy, and `predict` gives outputs.
      sum_particles: Add the K particles' gradients up instead of averaging them, as
        mode 1 of the released code.
      loss_scaling: Scale losses dynamically, as float16 needs: see
        :mod:`otmdr_jax.experiments.precision`.
      freeze: Patterns of the names of parameters that stay as they are, as "conv*": see
        :mod:`otmdr_jax.experiments.patterns`. They are no part of what is trained,
        perturbed, decayed or counted in a norm, and have no posterior. Not of "dst" and
        "edst".
      **options: Those of the method's transformation: :func:`otmdr_jax.otmdr`, `sam`,
        `asam`, `dual`, and those of :mod:`otmdr_jax.baselines` by their names; "sgd"
        has `axis_name` and `microbatch_size`. With `axis_name` (and for particles
        `particle_axis_name`) the step runs inside `jax.shard_map` or `jax.pmap`: see
        :mod:`otmdr_jax.parallel`. "sgvb" and "otmdr-bnn" have those of
        :meth:`otmdr_jax.experiments.methods.posterior.Posterior.make`, "bsam" and
        "ivon" also `num_samples` and `mean_only`; `num_data` is required. The others
        have `base`, the method that they ride on, its options, and those of
        :func:`otmdr_jax.baselines.collect` ("snapshot", "fge"), `average` ("swa",
        "swag"), `dynamic` ("dst", and "edst" with `ends`), `mc_dropout` and `laplace`.
        Their learning rates are the optimizer's.

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
      >>> jax.jit(method.predict)(state, images).shape
      (1, 4, 10)
    """
    kind = kind_of(name)
    if "weights" in options:
        raise TypeError(
            "methods.create takes no weights: the loss of a method is a mean over the "
            "examples of its batch."
        )
    if sum_particles:
        with_particles = [n for n, one in METHODS.items() if one.has_particles]
        base = kind
        if issubclass(kind, collected.Riding):
            base = kind.bases.get(options.get("base", "sgd"), kind)
        if not base.has_particles:
            raise TypeError(
                f"{name} has no particles to add up: leave sum_particles out, or use "
                f"{' or '.join(with_particles)}."
            )
        options["sum_particles"] = True
    if freeze and kind.is_sparse:
        raise no_frozen(name)
    if loss is not None and label_smoothing:
        raise ValueError(
            f"label_smoothing={label_smoothing} is of the cross entropy: leave it out "
            "with a loss of your own."
        )
    if loss is not None and kind.is_fitted:
        raise ValueError(
            f"{name} fits the curvature of the cross entropy: it cannot have a loss of "
            "your own."
        )
    whole = Loss(label_smoothing, smoothing, loss_scaling, loss, classes, tuple(freeze))
    return kind.make(model, optimizer, whole, **options)
