"""Learning-rate schedules and base optimizers, made of Optax's parts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from otmdr_jax import baselines
from otmdr_jax.baselines import schedules
from otmdr_jax.experiments import centers
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods import AVERAGING, BAYESIAN, VARIATIONAL

# The released code's step schedule: x 0.2 at 30, 60 and 80 % of the epochs.
STEP_FRACTIONS, STEP_FACTOR = (0.3, 0.6, 0.8), 0.2

# Methods whose learning rate is part of the method.
OWN_SCHEDULE = ("snapshot", "fge", "swa", "swag", "edst")
# Where they start to collect: 160 of 200 epochs (README of Garipov's code), 161 of 300
# (README of Maddox's).
FGE_START, AVERAGING_START = 160 / 200, 161 / 300


def schedule(
    config: TrainConfig, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate at each step.

    Args:
      config: Its schedule, learning_rate and warmup_epochs.
      total_steps: Steps of the whole run; the schedule ends there.
      steps_per_epoch: For the warmup.

    Returns:
      An Optax schedule. That of "plateau" is constant: the rest is in the optimizer's
      state, see :func:`learning_rate`. Methods that collect members have their own.

    Example:
      >>> from otmdr_jax.experiments.config import TrainConfig
      >>> lr = schedule(TrainConfig(schedule="step", learning_rate=1.0), 100, 10)
      >>> [round(float(lr(step)), 3) for step in (0, 29, 30, 60, 80)]
      [1.0, 1.0, 0.2, 0.04, 0.008]
    """
    if config.method in OWN_SCHEDULE:
        return collection(config, total_steps, steps_per_epoch)[0]
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= total_steps:
        raise ValueError(
            f"warmup_epochs={config.warmup_epochs} is {warmup} steps, but the run has "
            f"{total_steps}: shorten the warmup or lengthen the run."
        )
    peak, rest = config.learning_rate, total_steps - warmup
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest)
    elif config.schedule == "step":
        # Counted from the start of the run, warmup included.
        starts = [round(f * total_steps) - warmup for f in STEP_FRACTIONS]
        main = optax.piecewise_constant_schedule(
            peak, {start: STEP_FACTOR for start in starts if start > 0}
        )
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    ramp = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([ramp, main], [warmup])


def collection(
    config: TrainConfig, total_steps: int, steps_per_epoch: int
) -> tuple[optax.Schedule, tuple[int, ...]]:
    """The learning rate of a method that collects, and the steps that it does so after.

    Args:
      config: Its method, learning_rate, and the options under "members and averages".
      total_steps: Steps of the whole run.
      steps_per_epoch: For options in epochs.

    Raises:
      ValueError: The run is too short for a member.

    Example:
      >>> from otmdr_jax.experiments.config import TrainConfig
      >>> collection(TrainConfig(method="snapshot", cycles=4), 100, 10)[1]
      (25, 50, 75, 100)
    """
    peak = config.learning_rate
    if config.method == "snapshot":
        return (
            schedules.cyclic_cosine(peak, total_steps, config.cycles),
            schedules.snapshot_ends(total_steps, config.cycles),
        )
    if config.method == "edst":
        start = round(config.exploration * total_steps)
        ends = schedules.edst_ends(total_steps, start, config.tickets)
        return schedules.edst(peak, ends, start), ends
    share = config.collect_start
    if share is None:
        share = AVERAGING_START if config.method in AVERAGING else FGE_START
    start = max(round(share * total_steps), 1)
    if config.method in AVERAGING:
        every = max(round(config.collect_every * steps_per_epoch), 1)
        return (
            schedules.averaging(peak, config.average_rate, start),
            schedules.averaging_ends(total_steps, start, every),
        )
    period = 2 * max(round(config.cycle_epochs * steps_per_epoch / 2), 1)
    return (
        schedules.fge(peak, total_steps, start, period, *config.cycle_rates),
        schedules.fge_ends(total_steps, start, period),
    )


def create(
    config: TrainConfig, total_steps: int, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that turns the (robust) gradient into an update.

    In order: clipping, decay (coupled, or decoupled for adamw), the base optimizer (or
    the update of a method that has its own), the plateau factor. `update` takes
    `value=` (the step's loss), which only the plateau schedule looks at.

    Args:
      config: All options under "loss and optimizer".
      total_steps: See :func:`schedule`.
      steps_per_epoch: See :func:`schedule`.
    """
    rate = schedule(config, total_steps, steps_per_epoch)
    mask = None
    if config.method in BAYESIAN or not config.decay_all:
        mask = functools.partial(centers.decays, everything=config.decay_all)
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.method in VARIATIONAL:
        parts.append(_own_update(config, rate))
    else:
        parts += _base(config, rate, mask)
    if config.schedule == "plateau":
        parts.append(
            optax.contrib.reduce_on_plateau(
                factor=config.plateau_factor,
                patience=config.plateau_patience,
                rtol=1e-4,  # PyTorch's threshold
                accumulation_size=steps_per_epoch,
            )
        )
    return optax.with_extra_args_support(optax.chain(*parts))


def _base(config: TrainConfig, rate: optax.Schedule, mask: Any) -> list[Any]:
    """Decay and base optimizer."""
    if config.optimizer == "adamw":
        return [
            optax.adamw(
                rate,
                b1=config.momentum,
                eps=config.adam_eps,
                weight_decay=config.weight_decay,
                mask=mask,
            )
        ]
    parts: list[Any] = []
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    if config.optimizer == "sgd":
        # A momentum of 0 would keep a trace for nothing.
        parts.append(optax.sgd(rate, config.momentum or None, config.nesterov))
    else:
        parts.append(optax.adam(rate, b1=config.momentum, eps=config.adam_eps))
    return parts


def _own_update(config: TrainConfig, rate: optax.Schedule) -> Any:
    """The update of a method that has one, in the place of decay and optimizer."""
    own: dict[str, Any] = {"b1": config.momentum, "weight_decay": config.weight_decay}
    if config.method == "bsam":
        return baselines.bsam_rule(rate, **own)
    return baselines.ivon_rule(
        rate, hess_init=config.hess_init, clip_radius=config.clip_radius, **own
    )


def learning_rate(rate: optax.Schedule, step: int, opt_state: Any) -> jax.Array:
    """The learning rate at a step, the plateau's factor included: members' mean."""
    # By type: a parameter of a norm may be called "scale" too.
    kind = optax.contrib.ReduceLROnPlateauState
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    factors = [part.scale for part in parts if isinstance(part, kind)]
    if not factors:
        return rate(step)
    return rate(step) * jnp.mean(jnp.stack(factors))
