"""Which options of a configuration a method has, and which go together."""

from collections.abc import Iterable
from typing import Any

from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods import method_of

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
        **{name: name for name in _ROBUST if name != "norm"},
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
# Options of all methods that play a part with some values of another one alone. Not
# adam_eps, which presets set: their optimizer may be changed.
_ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "nesterov": ("optimizer", ("sgd",)),
    "plateau_patience": ("schedule", ("plateau",)),
    "plateau_factor": ("schedule", ("plateau",)),
    "posterior_std": ("posterior_init", ("model",)),
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


def options_of(config: TrainConfig) -> tuple[str, ...]:
    """The options that the method of a configuration has, and not every other."""
    riding = _RIDING.get(config.method, ())
    return tuple(dict.fromkeys((*_OPTIONS[config.gradient_method], *riding)))


def check_used(config: TrainConfig) -> None:
    """Raises ValueError for an option that another one leaves without effect.

    For runs that are about to start: older ones that have such options are still read.
    """
    defaults = TrainConfig(method=config.method)
    for name, (other, values) in _ONLY_WITH.items():
        value = getattr(config, other)
        if getattr(config, name) != getattr(defaults, name) and value not in values:
            raise ValueError(
                f"{name}={getattr(config, name)!r} does nothing with {other}="
                f"{value!r}, but with {' or '.join(values)}: leave one of them out."
            )


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
    mine = options_of(config)
    set_ = [name for name in every if getattr(config, name) != getattr(defaults, name)]
    if foreign := [name for name in set_ if name not in mine]:
        hint = ""
        if "norm" in foreign and "posterior_norm" in mine:
            hint = " Its norm is posterior_norm."
        raise ValueError(
            f"{config.method} has no option {', '.join(foreign)}"
            + f"; it has {', '.join(mine)}.{hint}"
        )
    method_of(config).check(config)
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
