"""Learning-rate schedules and base optimizers, made of Optax's parts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.experiments import patterns
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods import decays

# The released code's step schedule: x 0.2 at 30, 60 and 80 % of the epochs.
STEP_FRACTIONS, STEP_FACTOR = (0.3, 0.6, 0.8), 0.2


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
    peak = config.schedule.learning_rate
    course = config.method.course(peak, total_steps, steps_per_epoch)
    if course is not None:
        return course.rate
    warmup = round(config.schedule.warmup_epochs * steps_per_epoch)
    if warmup >= total_steps:
        raise ValueError(
            f"warmup_epochs={config.schedule.warmup_epochs} is {warmup} steps, but the "
            f"run has {total_steps}: shorten the warmup or lengthen the run."
        )
    rest = total_steps - warmup
    if config.schedule.name == "cosine":
        main = optax.cosine_decay_schedule(peak, rest)
    elif config.schedule.name == "step":
        # Counted from the start of the run, warmup included.
        starts = [round(f * total_steps) - warmup for f in STEP_FRACTIONS]
        if warmup:  # which ends at the rate of the step that comes after it
            peak *= STEP_FACTOR ** sum(start <= 0 for start in starts)
        main = optax.piecewise_constant_schedule(
            peak, {start: STEP_FACTOR for start in starts if start > 0}
        )
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    ramp = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([ramp, main], [warmup])


def create(
    config: TrainConfig, total_steps: int, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that turns the (robust) gradient into an update.

    In order: clipping, decay (coupled, or decoupled for adamw), the base optimizer, the
    plateau factor, the rates of groups: of a method that has an update of its own the
    last two alone.
    `update` takes `value=` (the step's loss), which only the plateau schedule looks at.

    Args:
      config: Its optimizer, schedule and method.
      total_steps: See :func:`schedule`.
      steps_per_epoch: See :func:`schedule`.
    """
    rate = schedule(config, total_steps, steps_per_epoch)
    method, parts = config.method, []
    if not method.has_own_update:
        if config.optimizer.clip_norm is not None:
            parts.append(optax.clip_by_global_norm(config.optimizer.clip_norm))
        mask = None
        if method.is_posterior or not config.optimizer.decay_all:
            mask = functools.partial(
                decays,
                everything=config.optimizer.decay_all,
                # Other members have an optimizer each.
                stacked=config.model.joint and config.model.stacked,
            )
        parts += _base(config, rate, mask)
    if config.schedule.name == "plateau":
        parts.append(
            optax.contrib.reduce_on_plateau(
                factor=config.schedule.plateau_factor,
                patience=config.schedule.plateau_patience,
                rtol=1e-4,  # PyTorch's threshold
                accumulation_size=steps_per_epoch,
            )
        )
    if config.schedule.learning_rate_of is not None:
        parts.append(_of_groups(config))
    chain = optax.chain(*parts) if parts else optax.identity()
    return optax.with_extra_args_support(chain)


def _of_groups(config: TrainConfig) -> optax.GradientTransformation:
    """Learning rates of groups of parameters.

    Updates are a learning rate times what does not depend on it, decay included, so
    that a factor on them is one on the learning rate.
    """
    peak = config.schedule.learning_rate
    groups = patterns.rates(config.schedule.learning_rate_of or ())
    parts = {
        f"group{i}": optax.scale(rate / peak) for i, (_, rate) in enumerate(groups)
    }

    def group_of(name, leaf):
        del leaf
        for label, (pattern, _) in zip(parts, groups, strict=True):
            if patterns.matches(name, [pattern]):
                return label
        return "others"

    return optax.partition(
        {**parts, "others": optax.identity()},
        functools.partial(patterns.map_named, group_of),
    )


def _base(config: TrainConfig, rate: optax.Schedule, mask: Any) -> list[Any]:
    """Decay and base optimizer."""
    own = config.optimizer
    if own.name == "adamw":
        return [
            optax.adamw(
                rate,
                b1=own.momentum,
                eps=own.adam_eps,
                weight_decay=own.weight_decay,
                mask=mask,
            )
        ]
    parts: list[Any] = []
    if own.weight_decay:
        parts.append(optax.add_decayed_weights(own.weight_decay, mask))
    if own.name == "sgd":
        # A momentum of 0 would keep a trace for nothing.
        parts.append(optax.sgd(rate, own.momentum or None, own.nesterov))
    else:
        parts.append(optax.adam(rate, b1=own.momentum, eps=own.adam_eps))
    return parts


def learning_rate(rate: optax.Schedule, step: int, opt_state: Any) -> jax.Array:
    """The learning rate at a step, the plateau's factor included: members' mean."""
    # By type: a parameter of a norm may be called "scale" too.
    kind = optax.contrib.ReduceLROnPlateauState
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    factors = [part.scale for part in parts if isinstance(part, kind)]
    if not factors:
        return rate(step)
    return rate(step) * jnp.mean(jnp.stack(factors))
