"""From a configuration and the size of its data to its networks and methods."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from otmdr_jax import bnn, models
from otmdr_jax.baselines.mc_dropout import RATE
from otmdr_jax.experiments import members, methods, optimizers, patterns
from otmdr_jax.experiments import own as own_lib
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.own import NOTHING, Own

# Options that a network which is not of the zoo does not have.
_OF_ZOO = ("stem", "dtype", "activation", "dropout", "remat", "input_size", "width")


def networks(
    config: TrainConfig,
    num_classes: int,
    batchnorm_axis_name: str | None = None,
    *,
    drops: bool = True,
    own: Own = NOTHING,
) -> tuple[Any, ...]:
    """One network, one for each member of another architecture, or a joint one.

    Args:
      config: The configuration.
      num_classes: Classes of the data; 0 where targets are no classes.
      batchnorm_axis_name: Axis that BatchNorm's statistics are shared over.
      drops: Whether they have dropout where the configuration says so. Parameters are
        the same without, and so is a prediction that takes no keys.
      own: What the run was given in Python.

    Raises:
      ValueError: A network of the zoo where there are no classes, options that a
        network of one's own does not have, or one that has to be given again.
    """
    names = (
        config.model.member_names[:1]
        if config.model.stacked
        else config.model.member_names
    )

    def create(name):
        if ":" in name:
            _check_own(config, name)
            return own_lib.network(name, own, num_classes or None)
        if not num_classes:
            raise ValueError(
                f"{name} is a classifier, and the targets of these data are no class "
                "numbers: give a network and a loss of your own, train(..., model=..., "
                "loss=...)."
            )
        return models.create(
            name,
            num_classes,
            dtype=jnp.dtype(config.model.dtype),
            batchnorm_axis_name=batchnorm_axis_name,
            **_model_options(config, drops),
        )

    found = tuple(map(create, names))
    if config.model.members is not None and config.model.ensemble == "joint":
        count = len(config.model.member_names)
        return (members.JointModel(found, count, config.model.member_map),)
    return found


def dropout_rate(config: TrainConfig) -> float:
    """The rate of dropout of a configuration's networks."""
    if config.model.dropout is not None:
        return config.model.dropout
    return RATE if config.method.needs_dropout else 0.0


def _model_options(config, drops):
    options = {
        "dropout": (drops and dropout_rate(config)) or None,
        "stem": config.model.stem,
        "input_size": config.model.input_size,
        "width": config.model.width,
        "remat": config.model.remat or None,
        "activation": None
        if config.model.activation == "relu"
        else config.model.activation,
    }
    return {name: value for name, value in options.items() if value is not None}


def _check_own(config, name):
    """Refuses options that a network which is not of the zoo does not have."""
    changed = config.changed()
    for option in _OF_ZOO:
        if option in changed:
            raise ValueError(
                f"{option}={changed[option]!r} is of the zoo's networks: {name} says "
                "itself what it does. Leave it out."
            )
    if config.method.needs_dropout or config.method.is_sparse:
        why = (
            "drops activations in a prediction, where a network of one's own does not"
            if config.method.needs_dropout
            else "counts the operations of the zoo's layers"
        )
        raise ValueError(f"{config.method.name} {why}: use a network of the zoo.")


def shapes_of(network: Any, image_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The shapes of a network's parameters and statistics; nothing is allocated.

    Args:
      network: The network.
      image_shape: (H, W, C).
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda key: network.init(key, images), jax.random.key(0))


def check_models(config: TrainConfig, own: Own = NOTHING) -> None:
    """Raises ValueError or TypeError unless a configuration's models are there."""
    networks(config, 10, own=own)


def check_statistics(
    config: TrainConfig,
    num_classes: int,
    image_shape: tuple[int, ...],
    own: Own = NOTHING,
) -> None:
    """Refuses averages of weights whose BatchNorm statistics cannot be computed anew.

    Args:
      config: The configuration.
      num_classes: Classes of the data.
      image_shape: (H, W, C).
      own: What the run was given in Python.
    """
    if not hasattr(config.method, "batchnorm_examples"):
        return
    for network in networks(config, num_classes, drops=False, own=own):
        _, state = shapes_of(network, image_shape)
        if jax.tree.leaves(state) and not hasattr(network, "batchnorm_momentum"):
            raise ValueError(
                f"{config.method.name} computes BatchNorm statistics anew and must "
                "know how the network's running ones move: give an object with init, "
                "apply and batchnorm_momentum (m in m old + (1 - m) batch)."
            )


def check_patterns(
    config: TrainConfig,
    num_classes: int,
    image_shape: tuple[int, ...],
    own: Own = NOTHING,
) -> None:
    """Refuses patterns of parameters' names that do nothing.

    Args:
      config: The configuration, whose freeze, perturb and learning_rate_of are looked
        at.
      num_classes: Classes of the data.
      image_shape: (H, W, C).
      own: What the run was given in Python.

    Raises:
      ValueError: A pattern is the name of no parameter, of one network at least, or of
        none that another option leaves; or nothing is left to train.
    """
    frozen = config.model.freeze or ()
    perturbed = getattr(config.method.gradient, "perturb", None) or ()
    groups = patterns.rates(config.schedule.learning_rate_of or ())
    if not (frozen or perturbed or groups):
        return
    for network in networks(config, num_classes, drops=False, own=own):
        params, _ = shapes_of(network, image_shape)
        known = patterns.check_frozen(frozen, patterns.names(params))
        loose = known
        if config.method.is_posterior:  # point estimates are not perturbed
            stochastic = bnn.weights_and_biases(params)
            loose = [
                name
                for (name, chosen) in zip(
                    patterns.names(params), jax.tree.leaves(stochastic), strict=True
                )
                if chosen and name in known
            ]
        patterns.check("perturb", perturbed, loose)
        for i, (pattern, _) in enumerate(groups):
            before = [earlier for earlier, _ in groups[:i]]
            left = [name for name in known if not patterns.matches(name, before)]
            patterns.check("learning_rate_of", [pattern], left)


def methods_of(
    config: TrainConfig,
    num_classes: int,
    num_train: int,
    total_steps: int,
    steps_per_epoch: int,
    mesh: Mesh | None,
    own: Own = NOTHING,
) -> list[methods.Method]:
    """One method, or one for each member of another architecture.

    Args:
      config: The configuration.
      num_classes: Classes of the data.
      num_train: Examples in the training set.
      total_steps: Steps of the run, for schedules.
      steps_per_epoch: Whole batches in an epoch.
      mesh: The devices, for the names of their axes.
      own: What the run was given in Python.
    """
    rate = optimizers.schedule(config, total_steps, steps_per_epoch)
    run = methods.Run(config, num_train, steps_per_epoch, total_steps, rate, mesh)
    axis = "data" if "data" in run.axes and config.run.sync_batchnorm else None
    found = []
    if not num_classes and config.model.joint:
        raise ValueError(
            "a joint ensemble has one loss on its mean probability, and the targets of "
            "these data are no classes: use --ensemble independent."
        )
    for network in networks(config, num_classes, axis, own=own):
        method = methods.create(
            config.method.name,
            network,
            optimizers.create(config, total_steps, steps_per_epoch),
            label_smoothing=config.optimizer.label_smoothing,
            smoothing=config.optimizer.smoothing,
            loss=own.loss,
            classes=num_classes > 0,
            loss_scaling=config.model.dtype == "float16",
            freeze=config.model.freeze or (),
            **config.method.options(run),
        )
        if isinstance(network, members.JointModel):
            method = members.joint(method, network)
        found.append(method)
    return found
