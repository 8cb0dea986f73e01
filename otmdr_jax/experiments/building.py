"""From a configuration and the size of its data to its networks and methods."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from otmdr_jax import models
from otmdr_jax.baselines.mc_dropout import RATE
from otmdr_jax.experiments import members, methods, optimizers
from otmdr_jax.experiments.config import TrainConfig


def networks(
    config: TrainConfig,
    num_classes: int,
    batchnorm_axis_name: str | None = None,
    *,
    drops: bool = True,
) -> tuple[Any, ...]:
    """One network, one for each member of another architecture, or a joint one.

    Args:
      config: The configuration.
      num_classes: Classes of the data.
      batchnorm_axis_name: Axis that BatchNorm's statistics are shared over.
      drops: Whether they have dropout where the configuration says so. Parameters are
        the same without, and so is a prediction that takes no keys.
    """
    names = (
        config.model.member_names[:1]
        if config.model.stacked
        else config.model.member_names
    )
    found = tuple(
        models.create(
            name,
            num_classes,
            dtype=jnp.dtype(config.model.dtype),
            batchnorm_axis_name=batchnorm_axis_name,
            **_model_options(config, drops),
        )
        for name in names
    )
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
        "remat": config.model.remat or None,
        "activation": None
        if config.model.activation == "relu"
        else config.model.activation,
    }
    return {name: value for name, value in options.items() if value is not None}


def check_models(config: TrainConfig) -> None:
    """Raises ValueError or TypeError unless the zoo has a configuration's models."""
    networks(config, 10)


def methods_of(
    config: TrainConfig,
    num_classes: int,
    num_train: int,
    total_steps: int,
    steps_per_epoch: int,
    mesh: Mesh | None,
) -> list[methods.Method]:
    """One method, or one for each member of another architecture.

    Args:
      config: The configuration.
      num_classes: Classes of the data.
      num_train: Examples in the training set.
      total_steps: Steps of the run, for schedules.
      steps_per_epoch: Whole batches in an epoch.
      mesh: The devices, for the names of their axes.
    """
    rate = optimizers.schedule(config, total_steps, steps_per_epoch)
    run = methods.Run(config, num_train, steps_per_epoch, total_steps, rate, mesh)
    axis = "data" if "data" in run.axes and config.run.sync_batchnorm else None
    found = []
    for network in networks(config, num_classes, axis):
        method = methods.create(
            config.method.name,
            network,
            optimizers.create(config, total_steps, steps_per_epoch),
            label_smoothing=config.optimizer.label_smoothing,
            smoothing=config.optimizer.smoothing,
            loss_scaling=config.model.dtype == "float16",
            **config.method.options(run),
        )
        if isinstance(network, members.JointModel):
            method = members.joint(method, network)
        found.append(method)
    return found
