"""What the options of a run must be, each by itself; together: see `building`."""

import dataclasses
import types
import typing
from typing import Any, Literal

from otmdr_jax.core.options import check_rho


def check(config: Any) -> None:
    """Checks numbers and words; names are checked where they are looked up.

    Args:
      config: A :class:`otmdr_jax.experiments.config.TrainConfig`.

    Raises:
      ValueError: An option that cannot be, by its name.
    """
    if config.rho is not None:
        check_rho(config.rho)
    for field in dataclasses.fields(config):
        value, is_number = getattr(config, field.name), field.type in (int, float)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _check(config, field.name, number or not is_number, "a number")
        is_flag = field.type is bool
        _check(config, field.name, not is_flag or value in (True, False), "a flag")
    for name in (
        "epochs", "batch_size", "eval_every", "eval_batch_size", "log_every",
        "keep_checkpoints", "max_skipped", "num_particles", "num_samples",
        "plateau_patience", "look_every", "mc_samples", "cycles", "swag_rank",
        "tickets",
    ):  # fmt: skip
        _check(config, name, isinstance(getattr(config, name), int), "an integer")
        _check(config, name, getattr(config, name) >= 1, "at least 1")
    for name in (
        "steps", "checkpoint_every", "microbatch_size", "num_subbatches",
        "batchnorm_examples", "mask_every", "laplace_examples",
    ):  # fmt: skip
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        good = value is None or (whole and value >= 1)
        _check(config, name, good, "an integer of at least 1, or left out")
    for name in (
        "learning_rate", "weight_decay", "warmup_epochs", "noise_std", "kl_weight",
        "kl_warmup_epochs", "damping", "gsam_alpha", "look_alpha", "fisher_eta",
        "average_rate",
    ):  # fmt: skip
        _check(config, name, 0 <= getattr(config, name) < float("inf"), "at least 0")
    for name in (
        "posterior_std", "prior_std", "adam_eps", "data_factor", "precision_init",
        "hess_init", "cycle_epochs", "collect_every",
    ):  # fmt: skip
        _check(config, name, 0 < getattr(config, name) < float("inf"), "positive")
    for name in ("momentum", "label_smoothing", "label_noise"):
        _check(config, name, 0 <= getattr(config, name) < 1, "in [0, 1)")
    prior = config.prior_precision
    good = prior is None or 0 < prior < float("inf")
    _check(config, "prior_precision", good, "positive, or left out")
    good = config.rho_min is None or 0 <= config.rho_min < float("inf")
    _check(config, "rho_min", good, "at least 0, or left out")
    rate = config.dropout
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    good = rate is None or (number and 0 <= rate < 1)
    _check(config, "dropout", good, "in [0, 1), or left out")
    good = config.b2 is None or (isinstance(config.b2, float) and 0 <= config.b2 < 1)
    _check(config, "b2", good, "in [0, 1), or left out")
    _check(config, "plateau_factor", 0 < config.plateau_factor < 1, "in (0, 1)")
    for name in ("density", "prune_rate", "exploration", "escape_rate"):
        _check(config, name, 0 < getattr(config, name) < 1, "in (0, 1)")
    start, rates = config.collect_start, config.cycle_rates
    _check(config, "collect_start", start is None or 0 < start < 1, "in (0, 1)")
    falling = len(rates) == 2 and rates[0] >= rates[1] >= 0
    _check(config, "cycle_rates", falling, "two rates, the higher one first")
    _check(config, "swag_rank", config.swag_rank >= 2, "at least 2")
    _check(config, "validation", config.validation >= 0, "at least 0")
    clip = config.clip_norm
    _check(config, "clip_norm", clip is None or clip > 0, "positive, or left out")
    clip = config.clip_radius
    _check(config, "clip_radius", clip is None or clip > 0, "positive, or left out")
    for name, type_ in typing.get_type_hints(type(config)).items():
        _check_literal(config, name, type_)
    _check_members(config)


def _check_members(config: Any) -> None:
    if config.members is None:
        for name in ("ensemble", "member_data", "member_map"):
            default = type(config).__dataclass_fields__[name].default
            _check(config, name, getattr(config, name) == default, "left out without "
                   "members")  # fmt: skip
        return
    _check(config, "members", isinstance(config.members, str), "text: '5', or names")
    names = config.member_names
    _check(
        config,
        "members",
        len(names) >= 2 and all(names),
        "a number of at least 2, or the names of as many models with commas between "
        "them",
    )
    if not config.members.isdigit():
        default = type(config).__dataclass_fields__["model"].default
        _check(config, "model", config.model in (default, *names), "left out where "
               "members names the models")  # fmt: skip
    if config.ensemble == "joint":
        _check(config, "member_data", config.member_data == "shared", "'shared' for a "
               "joint loss, which is of one batch")  # fmt: skip


def _check(config: Any, name: str, holds: bool, must: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {must}, got {getattr(config, name)!r}.")


def _check_literal(config: Any, name: str, type_: Any) -> None:
    """Checks a field of type Literal[...] or Literal[...] | None."""
    parts = [type_]
    if isinstance(type_, types.UnionType) or typing.get_origin(type_) is typing.Union:
        parts = list(typing.get_args(type_))
    words = [w for p in parts if typing.get_origin(p) is Literal
             for w in typing.get_args(p)]  # fmt: skip
    if words:
        words += [None] if type(None) in parts else []
        known = ", ".join(map(repr, words))
        _check(config, name, getattr(config, name) in words, f"one of {known}")
