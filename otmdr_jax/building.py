"""From a configuration to its networks and methods."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from otmdr_jax import baselines, bnn, members, methods, models, optimizers
from otmdr_jax.baselines import sparse
from otmdr_jax.config import TrainConfig


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
            **method_options(config),
            **_posterior_options(config, num_train, total_steps, steps_per_epoch),
            **_radius_schedule(config, total_steps, steps_per_epoch),
            **_collecting_options(config, total_steps, steps_per_epoch),
            **_axis_names(mesh),
        )
        if isinstance(network, members.JointModel):
            method = members.joint(method, network)
        found.append(method)
    return found


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
      num_classes: Of the data.
      batchnorm_axis_name: Axis that BatchNorm's statistics are shared over.
      drops: Whether they have dropout where the configuration says so. Parameters are
        the same without, and so is a prediction that takes no keys.
    """
    names = config.member_names[:1] if config.stacked else config.member_names
    found = tuple(
        models.create(
            name,
            num_classes,
            dtype=jnp.dtype(config.dtype),
            batchnorm_axis_name=batchnorm_axis_name,
            **_model_options(config, drops),
        )
        for name in names
    )
    if config.members is not None and config.ensemble == "joint":
        count = len(config.member_names)
        return (members.JointModel(found, count, config.member_map),)
    return found


def dropout_rate(config: TrainConfig) -> float:
    """The rate of dropout of a configuration's networks."""
    if config.dropout is not None:
        return config.dropout
    return baselines.dropout.RATE if config.method in methods.DROPPING else 0.0


def _model_options(config, drops):
    options = {
        "dropout": (drops and dropout_rate(config)) or None,
        "stem": config.stem,
        "remat": config.remat or None,
        "activation": None if config.activation == "relu" else config.activation,
    }
    return {name: value for name, value in options.items() if value is not None}


def _axis_names(mesh):
    """The axes of a mesh, as the options of a method."""
    names = {"data": "axis_name", "particle": "particle_axis_name"}
    found = () if mesh is None else mesh.shape
    return {names[axis]: axis for axis in found if axis in names}


def check_models(config: TrainConfig) -> None:
    """Raises ValueError or TypeError unless the zoo has a configuration's models."""
    networks(config, 10)


# Options of a configuration -> the names that a method knows them by.
_ROBUST = {
    name: name
    for name in (
        "rho", "num_particles", "noise_std", "split", "norm", "merge", "sum_particles",
        "particle_map", "sync_perturbation", "microbatch_size", "num_subbatches",
    )
}  # fmt: skip
_SAM = ("rho", "norm", "sync_perturbation", "microbatch_size", "num_subbatches")
_POSTERIOR = {
    "posterior_std": "sigma",
    "posterior_init": "init",
    "prior": "prior",
    "prior_std": "prior_std",
    "kl_weight": "kl_weight",
    "kl_schedule": "kl_schedule",
    "kl_warmup_epochs": "kl_warmup_epochs",
    "num_samples": "num_samples",
    "prediction": "prediction",
}
_OTMDR_BNN = {
    "posterior_norm": "norm",
    "sigma_gradient": "sigma_gradient",
    "weight_noise": "weight_noise",
}
# Of Gaussians around one weight vector: what the data or the optimizer decide too.
_GAUSSIAN = ("data_factor", "num_samples", "prediction")
_BSAM = {
    "b2": "b2",
    "precision_init": "precision_init",
    "damping": "damping",
    "precision_order": "order",
}
_OPTIONS: dict[str, dict[str, str]] = {
    "sgd": {"microbatch_size": "microbatch_size"},
    "sam": {name: name for name in _SAM},
    "asam": {name: name for name in _SAM},
    "otmdr": _ROBUST,
    "sgvb": {
        "microbatch_size": "microbatch_size", "estimator": "estimator", **_POSTERIOR
    },
    "otmdr-bnn": {
        **{n: n for n in _ROBUST if n not in ("norm", "num_subbatches")},
        **_OTMDR_BNN,
        **_POSTERIOR,
    },
    "gsam": {
        **{name: name for name in _SAM},
        "gsam_alpha": "alpha",
        "rho_min": "rho_min",
    },
    "looksam": {
        **{name: name for name in _SAM},
        "look_every": "every",
        "look_alpha": "alpha",
    },
    "fisher-sam": {**{name: name for name in _SAM}, "fisher_eta": "fisher"},
    "bsam": {
        **{name: name for name in _SAM if name != "norm"},
        **_BSAM,
        **{name: name for name in _GAUSSIAN},
    },
}  # fmt: skip
_OPTIONS["ivon"] = {
    "microbatch_size": "microbatch_size",
    "b2": "b2",
    "hess_init": "hess_init",
    "mc_samples": "mc_samples",
    "clip_radius": "clip_radius",
    **{name: name for name in _GAUSSIAN},
}
# Of the released commands, which cut batches of 200 into parts of 25.
_SUBBATCHES = {"bsam": 8}
# Options of methods that ride on another one, beside the other one's.
_BASE = ("base_method",)
_AVERAGE = (*_BASE, "collect_start", "average_rate", "collect_every",
            "batchnorm_examples")  # fmt: skip
_SPARSE = ("density", "prune_rate", "prune_decay", "mask_every", "growth")
_RIDING: dict[str, tuple[str, ...]] = {
    "snapshot": (*_BASE, "cycles"),
    "fge": (*_BASE, "collect_start", "cycle_epochs", "cycle_rates"),
    "swa": _AVERAGE,
    "swag": (*_AVERAGE, "swag_rank", "num_samples", "prediction"),
    "mc-dropout": (*_BASE, "num_samples", "prediction"),
    "laplace": (*_BASE, "laplace", "prior_precision", "laplace_examples",
                "num_samples", "prediction"),
    "dst": _SPARSE,
    "edst": (*_SPARSE, "tickets", "exploration", "escape_rate"),
}  # fmt: skip


def method_names() -> frozenset[str]:
    """The options that some methods have and others have not."""
    tables: tuple[Iterable[str], ...] = (*_OPTIONS.values(), *_RIDING.values())
    return frozenset(name for known in tables for name in known)


def method_options(config: TrainConfig) -> dict[str, Any]:
    """The options of the gradient that a configuration names, by its own names.

    Those of the posterior, which need the data, are not among them.

    Raises:
      ValueError: An option that the method does not have was set, or options that do
        not go together.
    """
    defaults = TrainConfig(method=config.method)
    tables: tuple[Iterable[str], ...] = (*_OPTIONS.values(), *_RIDING.values())
    every = {name: None for known in tables for name in known}
    own = _OPTIONS[config.gradient_method]
    mine = {**own, **dict.fromkeys(_RIDING.get(config.method, ()))}
    set_ = [name for name in every if getattr(config, name) != getattr(defaults, name)]
    if foreign := [name for name in set_ if name not in mine]:
        hint = ""
        if "norm" in foreign and "posterior_norm" in mine:
            hint = " Its norm is posterior_norm."
        raise ValueError(
            f"{config.method} has no option {', '.join(foreign)}"
            + f"; it has {', '.join(mine)}.{hint}"
        )
    if config.num_particles > 1 and config.split in ("ordered", "shared"):
        if not config.noise_std:
            raise ValueError(
                f"num_particles={config.num_particles} with split={config.split!r} and "
                'no noise gives equal particles: use split="random", set noise_std, or '
                "leave num_particles at 1."
            )
    if config.method in methods.BAYESIAN:
        _check_posterior(config)
    if config.method in methods.VARIATIONAL:
        _check_variational(config)
    if config.method in ("gsam", "looksam") and len(config.rho or (0,)) != 1:
        raise ValueError(f"{config.method} has one radius, got {config.rho}.")
    if config.rho_min is not None and config.schedule == "plateau":
        raise ValueError(
            "rho_min needs a learning rate that is known beforehand: use --schedule "
            "cosine or step."
        )
    if config.method in _RIDING:
        _check_riding(config)
    found = {
        own[name]: getattr(config, name)
        for name in set_
        if name in own
        and name not in (*_POSTERIOR, *_GAUSSIAN, "rho_min", "clip_radius")
    }
    if config.method in _SUBBATCHES:
        found["num_subbatches"] = num_subbatches(config)
    return found


def num_subbatches(config: TrainConfig) -> int:
    """How many parts of the batch have a perturbation of their own."""
    return config.num_subbatches or _SUBBATCHES.get(config.method, 1)


def _check_riding(config):
    if config.members is not None and config.ensemble == "joint":
        raise ValueError(
            f"{config.method} with a joint ensemble is not defined: each member "
            "collects its own weights, or has its own masks or Gaussian, with "
            "--ensemble independent."
        )
    _check_samples(config)
    if config.method in methods.DROPPING and not dropout_rate(config):
        raise ValueError(
            f"{config.method} needs dropout, got dropout=0: leave it out for "
            f"{baselines.dropout.RATE}, or name a rate."
        )
    if config.method not in optimizers.OWN_SCHEDULE:
        return
    defaults = TrainConfig()
    for name in ("schedule", "warmup_epochs"):
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r}: the learning rate of "
                f"{config.method} is part of the method; leave {name} out."
            )


def _check_joint(config):
    if config.members is not None and config.ensemble == "joint":
        raise ValueError(
            f"{config.method} with a joint ensemble is not defined: members with a "
            "posterior each are trained with --ensemble independent."
        )


def _check_samples(config):
    if config.prediction == "mean" and config.num_samples != bnn.NUM_SAMPLES:
        raise ValueError(
            f"num_samples={config.num_samples} with prediction='mean', which has no "
            "samples: leave one of them out."
        )


def _check_variational(config):
    """The update is the method's own: options of other optimizers mean nothing."""
    _check_joint(config)
    _check_samples(config)
    defaults = TrainConfig.__dataclass_fields__
    for name in ("optimizer", "nesterov", "adam_eps", "decay_all"):
        if getattr(config, name) != defaults[name].default:
            raise ValueError(
                f"{config.method} has an update of its own: leave {name} out, got "
                f"{getattr(config, name)!r}."
            )
    if config.method == "ivon" and not config.weight_decay:
        raise ValueError(
            "ivon needs a weight decay, the precision of its prior, got weight_decay=0."
        )
    if config.rho is not None and len(config.rho) != 1:
        raise ValueError(f"{config.method} has one radius, got {config.rho}.")


def _check_posterior(config):
    _check_joint(config)
    _check_samples(config)
    if config.dtype == "float16" and config.estimator != "weights":
        raise ValueError(
            f"estimator={config.estimator!r} squares standard deviations, which "
            "float16 cannot hold: use --dtype bfloat16 or --estimator weights."
        )
    if config.prior != "normal" and config.prior_std != bnn.PRIOR_STD:
        raise ValueError(
            f"prior_std={config.prior_std} is that of the normal prior; the "
            f"{config.prior} prior has none."
        )
    if config.kl_schedule != "warmup" and config.kl_warmup_epochs != 0:
        raise ValueError("kl_warmup_epochs needs --kl-schedule warmup.")
    if config.kl_schedule == "warmup" and not config.kl_warmup_epochs:
        raise ValueError(
            "kl_schedule='warmup' needs kl_warmup_epochs, over which the weight grows."
        )


def _radius_schedule(config, total_steps, steps_per_epoch):
    """The radius that follows the learning rate, where it does."""
    if config.rho_min is None:
        return {}
    return {
        "follows": baselines.follow(
            optimizers.schedule(config, total_steps, steps_per_epoch),
            (config.rho or (baselines.surgery.RHO,))[0],
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
    if config.method not in _RIDING:
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
    steps = sparse.update_steps(every, ends)
    if not steps:
        raise ValueError(
            f"mask_every={every} leaves no update of the masks in a run of "
            f"{total_steps} steps: lower it, or train longer."
        )
    decay = config.prune_decay or ("constant" if config.method == "edst" else "cosine")
    rate: Any = config.prune_rate
    options = {
        "density": config.density,
        "rate": sparse.cosine(rate, total_steps) if decay == "cosine" else rate,
        "steps": steps,
        "growth": config.growth,
    }
    if config.method == "edst":
        # One step into the next phase: the ticket is kept as it was trained.
        options["escapes"] = tuple(end + 1 for end in ends[:-1])
        options["escape_rate"] = config.escape_rate
    return options
