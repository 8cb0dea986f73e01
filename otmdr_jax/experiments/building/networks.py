"""From a configuration to its networks."""

from typing import Any

import jax.numpy as jnp

from otmdr_jax import models
from otmdr_jax.baselines.mc_dropout import RATE
from otmdr_jax.experiments import members
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
