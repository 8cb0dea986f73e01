"""From a configuration and the size of its data to its methods."""

from jax.sharding import Mesh

from otmdr_jax.experiments import members, methods, optimizers
from otmdr_jax.experiments.building.networks import networks
from otmdr_jax.experiments.config import TrainConfig


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
