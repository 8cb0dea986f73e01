"""What a run is given in Python and not by name: a network, a loss, metrics."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax import metrics as metrics_lib
from otmdr_jax.models import own as models
from otmdr_jax.models.own import GIVEN, name_of


class Own(NamedTuple):
    """A network, a loss and metrics of one's own, each None or empty if there is none.

    Attributes:
      model: See :func:`otmdr_jax.models.adapt`.
      loss: (outputs, targets) -> (B,) losses of the examples.
      metrics: Names, and functions (outputs, targets) -> a number, of whole sets.
    """

    model: Any = None
    loss: Callable[..., Any] | None = None
    metrics: tuple[tuple[str, Callable[..., Any]], ...] = ()


NOTHING = Own()

# What results and logs have by name beside the metrics of classifiers.
_TAKEN = (
    "loss", "sharpness", "train_nll", "train_loss", "steps", "epochs", "step", "epoch",
    "split", "skipped_steps", "parameters", "finished", "seconds_per_step", "best",
    "mesh", "members", "sparsity", "aleatoric", "epistemic", "device", "cores",
    "platform",
)  # fmt: skip


def given(
    model: Any = None,
    loss: Callable[..., Any] | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
) -> Own:
    """What the caller gave, checked.

    Raises:
      TypeError: A loss or a metric is no function, or the model is none.
    """
    if not isinstance(metrics, Mapping | None):
        raise TypeError(
            f"metrics must be functions by name, as {{'rmse': rmse}}, got {metrics!r}."
        )
    for name, function in {"loss": loss, **(metrics or {})}.items():
        if function is not None and not callable(function):
            raise TypeError(
                f"{name} must be a function of (outputs, targets), got {function!r}."
            )
    if known := sorted({*_TAKEN, *metrics_lib.NAMES} & set(metrics or {})):
        raise ValueError(
            f"metrics must have names of their own, got {', '.join(known)}, which runs "
            "have already."
        )
    for what, value in (("loss", loss), *(metrics or {}).items()):
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"{what} must be hashable, since programs are kept by it ({error}): "
                "give a function, or a dataclass with frozen=True."
            ) from error
    if isinstance(model, str):
        raise TypeError(
            f"model={model!r} is a name: it belongs to the options, "
            f"config.replace(model={model!r})."
        )
    return Own(model, loss, tuple((metrics or {}).items()))


def named(config: Any, own: Own) -> Any:
    """The options with the name of a model that was given.

    Args:
      config: The options, whose model is the default or has this name already.
      own: What was given.

    Raises:
      ValueError: The options name another model, or say what only the zoo's networks
        can do.
    """
    if own.model is None:
        return config
    name = name_of(own.model)
    was = config.model.name
    if was not in (name, type(config.model).name) or not config.model.stacked:
        raise ValueError(
            f"the options name the model {', '.join(config.model.member_names)}, and "
            f"{name} was given too: leave one of them out."
        )
    return config.replace(model=name)


def check_name(config: Any, own: Own) -> None:
    """Refuses a network of another name than the one that a run was trained on."""
    name = name_of(own.model)
    ours, theirs = (x.rpartition(":")[2] for x in (name, config.model.name))
    if ours != theirs:
        raise ValueError(
            f"the run was trained on {config.model.name}, and {name} was given."
        )


@functools.lru_cache(maxsize=32)
def recorded_loss(folder: Any, name: str | None) -> Any:
    """The loss that a run was given, found by its name; None for the cross entropy.

    Args:
      folder: The run's folder, for the error.
      name: Its name in the run's data.json.

    Returns:
      The function. If no name finds it, one that says so where it is used: what only
      predicts does not need it.
    """
    if name is None or not name.startswith(GIVEN):
        return name and models.load(name)

    def missing(outputs, targets):
        del outputs, targets
        raise ValueError(
            f"{folder} was trained on a loss that was given to it in Python, "
            f"{name.removeprefix(GIVEN)}, which is measured here: give it again, "
            "open_run(folder, loss=...). A loss in a module of its own is found by its "
            "name."
        )

    return missing


def network(name: str, own: Own, num_classes: int | None) -> Any:
    """A network that is not of the zoo.

    Args:
      name: "package.module:Name" or "given:Name".
      own: What was given.
      num_classes: The number of classes; None where there are none.

    Raises:
      ValueError: It was given in Python and has to be given again.
    """
    if own.model is not None:
        return models.adapt(own.model, num_classes)
    if name.startswith(GIVEN):
        raise ValueError(
            f"the run was trained on a network that was given to it in Python, "
            f"{name.removeprefix(GIVEN)}: give it again in Python, open_run(folder, "
            "model=...). Commands find a network that was trained by the name of its "
            "module, --model package.module:Name."
        )
    return models.adapt(models.load(name), num_classes)


def try_out(own: Own, model: Any, dataset: Any) -> None:
    """Tries a network and a loss on a few examples, before anything is written.

    Args:
      own: What was given.
      model: The network, with `init` and `apply`.
      dataset: The data.

    Raises:
      ValueError: The outputs are not one number for each class, where targets are class
        numbers, or the loss is not one of each example alone; TypeError: it is of
        integers.
    """
    count = min(3, dataset.test.num_examples)
    images = jax.ShapeDtypeStruct((count, *dataset.image_shape), jnp.float32)

    def predict(key, images):
        params, state = model.init(key, images)
        return model.apply(params, state, images, train=False)[0]

    shape = jax.eval_shape(predict, jax.random.key(0), images).shape
    classes = dataset.num_classes
    if classes and shape != (count, classes):
        raise ValueError(
            f"the network must return one number for each of the {classes} classes, "
            f"(B, {classes}), and of {count} examples it returns {shape}."
        )
    if own.loss is not None:
        outputs = jax.random.normal(jax.random.key(0), shape)
        _try_loss(own, outputs, jnp.asarray(dataset.test.labels[:count]))


def _try_loss(own, outputs, targets):
    """Refuses a loss that is not one of each example.

    One whose value for an example depends on the others is refused too: outputs (B, 1)
    beside targets (B,), say, become (B, B) where they are subtracted.
    """
    shape, count = outputs.shape, len(targets)
    rows = [slice(None), *(slice(i, i + 1) for i in range(count))]
    whole, *each = (jnp.asarray(own.loss(outputs[r], targets[r])) for r in rows)
    if whole.shape != (count,) or not jnp.issubdtype(whole.dtype, jnp.floating):
        kind = TypeError if whole.shape == (count,) else ValueError
        raise kind(
            "loss(outputs, targets) must be the losses of the examples, floats of "
            f"shape ({count},), got {whole.dtype} {whole.shape} for outputs {shape} "
            f"and targets {targets.shape}. Leave the mean over examples to the "
            "training; take that over other axes. Do their shapes agree?"
        )
    if not np.allclose(whole, np.concatenate(each), 1e-3, 1e-5, equal_nan=True):
        raise ValueError(
            "the loss of an example must not depend on the others in its batch, got "
            f"{whole.tolist()} for {count} together and {np.ravel(each).tolist()} for "
            f"each alone, of outputs {shape} and targets {targets.shape}. Do their "
            "shapes agree? Outputs (B, 1) beside targets (B,) become (B, B)."
        )
