"""From a configuration and the size of its data to its methods.

What an option stands for may depend on the data and the length of the run: a prior, a
schedule, the steps at which members are collected or masks change.
"""

from typing import Any

from jax.sharding import Mesh

from otmdr_jax import baselines, bnn
from otmdr_jax.baselines import dst
from otmdr_jax.baselines.gsam import RHO as GSAM_RHO
from otmdr_jax.experiments import members, methods, optimizers
from otmdr_jax.experiments.building.networks import networks
from otmdr_jax.experiments.building.options import method_options
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
      num_classes: Of the data, as the next.
      num_train: Examples in the training set.
      total_steps: Of the run, for schedules, as the next.
      steps_per_epoch: Whole batches in an epoch.
      mesh: The devices, for the names of their axes.
    """
    on_data = mesh is not None and "data" in mesh.shape
    axis = "data" if on_data and config.sync_batchnorm else None
    found = []
    for network in networks(config, num_classes, axis):
        method = methods.create(
            config.method,
            network,
            optimizers.create(config, total_steps, steps_per_epoch),
            label_smoothing=config.label_smoothing,
            smoothing=config.smoothing,
            loss_scaling=config.dtype == "float16",
            **_on_devices(method_options(config), config, mesh),
            **_posterior_options(config, num_train, total_steps, steps_per_epoch),
            **_radius_schedule(config, total_steps, steps_per_epoch),
            **_collecting_options(config, total_steps, steps_per_epoch),
        )
        if isinstance(network, members.JointModel):
            method = members.joint(method, network)
        found.append(method)
    return found


def _on_devices(options, config, mesh):
    """The options of a method, with the axes of a mesh that it has a use for."""
    found = () if mesh is None else mesh.shape
    if "data" in found:
        options |= {"axis_name": "data"}
    else:  # one device's own perturbation is that of all
        options.pop("sync_perturbation", None)
    if "particle" in found and config.gradient_method in methods.PARTICLES:
        options |= {"particle_axis_name": "particle"}
    return options


def _radius_schedule(config, total_steps, steps_per_epoch):
    """The radius that follows the learning rate, where it does."""
    if config.rho_min is None:
        return {}
    return {
        "follows": baselines.follow(
            optimizers.schedule(config, total_steps, steps_per_epoch),
            (config.rho or (GSAM_RHO,))[0],
            config.rho_min,
            config.learning_rate,
        )
    }


def _posterior_options(config, num_train, total_steps, steps_per_epoch):
    """What a Bayesian method takes beside; nothing for others."""
    if config.method in methods.VARIATIONAL:
        return {
            "num_data": num_train * config.data_factor,
            "weight_decay": config.weight_decay,
            "num_samples": config.num_samples,
            "mean_only": config.prediction == "mean",
        }
    if config.method not in methods.BAYESIAN:
        return {}
    priors = {
        "normal": bnn.Normal(config.prior_std),
        "mixture": bnn.ScaleMixture(),
        "fitted": bnn.FittedNormal(),
    }
    weight: Any = config.kl_weight
    if config.kl_schedule == "blundell":
        weight = bnn.blundell(steps_per_epoch, weight)
    elif config.kl_schedule == "warmup":
        steps = round(config.kl_warmup_epochs * steps_per_epoch)
        if not 1 <= steps < total_steps:
            raise ValueError(
                f"kl_warmup_epochs={config.kl_warmup_epochs} is {steps} steps of a run "
                f"of {total_steps}: it must be at least one and less than all."
            )
        weight = bnn.warmup(steps, weight)
    return {
        "num_data": num_train,
        "sigma": config.posterior_std,
        "init": config.posterior_init,
        "prior": priors[config.prior],
        "kl_weight": weight,
        "num_samples": config.num_samples,
        "mean_only": config.prediction == "mean",
    }


def _collecting_options(config, total_steps, steps_per_epoch):
    """What a method that rides on another one takes beside; nothing for others."""
    if config.method not in methods.RIDING:
        return {}
    options: dict[str, Any] = {}
    ends: tuple[int, ...] = (total_steps,)
    if config.method in methods.COLLECTING + methods.AVERAGING:
        _, ends = optimizers.collection(config, total_steps, steps_per_epoch)
        options["ends"] = ends
    if config.method in methods.SPARSE:
        return options | _sparse_options(config, total_steps, ends)
    options["base"] = config.base_method
    mean_only = config.prediction == "mean"
    if config.method in methods.DROPPING:
        options |= {"num_samples": config.num_samples, "mean_only": mean_only}
    samples = 0 if mean_only else config.num_samples
    if config.method == "swag":
        options |= {"rank": config.swag_rank, "num_samples": samples}
    if config.method in methods.FITTED:
        options |= {
            "structure": config.laplace,
            "num_samples": samples,
            "prior_precision": config.prior_precision,
        }
    return options


# Steps between updates of masks (the authors' command), and how many updates a run has
# at the least.
MASK_EVERY, MASK_UPDATES = 1000, 20


def _sparse_options(config, total_steps, ends):
    every = config.mask_every
    if every is None:
        every = min(MASK_EVERY, max(total_steps // MASK_UPDATES, 1))
    steps = dst.update_steps(every, ends)
    if not steps:
        raise ValueError(
            f"mask_every={every} leaves no update of the masks in a run of "
            f"{total_steps} steps: lower it, or train longer."
        )
    decay = config.prune_decay or ("constant" if config.method == "edst" else "cosine")
    rate: Any = config.prune_rate
    options = {
        "density": config.density,
        "rate": dst.cosine(rate, total_steps) if decay == "cosine" else rate,
        "steps": steps,
        "growth": config.growth,
    }
    if config.method == "edst":
        # One step into the next phase: the ticket is kept as it was trained.
        options["escapes"] = tuple(end + 1 for end in ends[:-1])
        options["escape_rate"] = config.escape_rate
    return options
