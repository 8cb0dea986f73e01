"""Methods of one weight vector, each an Optax transformation of the gradient."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.core.transform import plain
from otmdr_jax.experiments import patterns
from otmdr_jax.experiments.methods import training
from otmdr_jax.experiments.methods.base import MethodOptions, Run
from otmdr_jax.experiments.options import (
    Count,
    Patterns,
    Radii,
)

PyTree = Any


def rule(
    transformation: Callable[..., optax.GradientTransformationExtraArgs],
    optimizer: optax.GradientTransformation,
    *,
    times: int = 1,
    logged: Callable[[PyTree], dict[str, jax.Array]] = lambda memory: {},
    share: training.Share | None = None,
) -> Callable[[Callable], training.Rule]:
    """The rule of a transformation that computes its own gradient, as `otmdr` does.

    Args:
      transformation: (loss_fn, key, **has_aux and aux_init) -> the transformation.
      optimizer: What turns its gradient into an update.
      times: What the gradient is multiplied by.
      logged: The memory after a step -> further scalars for the log.
      share: See :class:`training.Method`.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def of_loss(loss_fn):
        def init(params):
            aux = jnp.zeros(())  # not used: only the memory is read
            state: Any = transformation(
                loss_fn, jax.random.key(0), has_aux=True, aux_init=aux
            ).init(params)
            return optimizer.init(params), state.memory if len(state) > 4 else None

        def update(state, batch, scaled):
            grads, after = step(transformation, loss_fn, state, batch, scaled)
            info = after.diagnostics
            if times > 1:
                grads = jax.tree.map(lambda g: times * g, grads)
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.params, value=info.robust_loss
            )
            memory = after.memory if len(after) > 4 else None
            return training.Update(
                updates, opt_state, memory, after.aux, info, logged(memory)
            )

        return training.Rule(
            lambda key, params: params, init, update, at_weights, share=share
        )

    return of_loss


def step(transformation, loss_fn, state, batch, scaled, *kept):
    """An update of a transformation whose state is a part of a run's state.

    Args:
      transformation: See :func:`rule`.
      loss_fn: (params, batch, model_state) -> (loss, (statistics, accuracy)).
      state: The run's state, which has the count, the key and the statistics.
      batch: The batch.
      scaled: Further arguments of the loss.
      *kept: What the transformation's state holds beside; by default the memory.

    Returns:
      (updates, the transformation's new state).
    """
    tx = transformation(
        loss_fn, state.key, has_aux=True, aux_init=(state.model_state, jnp.zeros(()))
    )
    fresh = tx.init(state.params)
    if not kept and state.memory is not None:
        kept = (state.memory,)
    before = type(fresh)(state.step, *fresh[1:4], *kept)
    return tx.update(
        state.params,
        before,
        state.params,
        batch=batch,
        loss_args=(state.model_state,),
        loss_kwargs=scaled,
    )


def at_weights(log_probs_fn, state, key):
    """The prediction of one weight vector."""
    del key
    return log_probs_fn(state.params)[None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point(MethodOptions):
    """Any method of one weight vector.

    Attributes:
      transformation: (loss_fn, **options) -> an Optax transformation.
    """

    transformation: ClassVar[Any]

    microbatch_size: Count | None = None
    """Examples that a device differentiates at a time, to save memory. The objective
    stays that of the whole batch, but BatchNorm sees micro-batches. Default: all."""

    @classmethod
    def make(cls, model, optimizer, loss, **options):

        def transformation(loss_fn, key, **aux):
            del key  # nothing is random
            return cls.transformation(loss_fn, **options, **aux)

        # Here, that what cannot work is refused before there is a state.
        cls.transformation(lambda *args: None, **options)
        made = rule(transformation, optimizer, logged=cls.logged, share=cls.share)
        return training.build(model, loss, made, options.get("axis_name"))

    def options(self, run: Run) -> dict[str, Any]:
        data = {"axis_name": "data"} if "data" in run.axes else {}
        return {"microbatch_size": self.microbatch_size, **data}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Point):
    """The plain gradient, whatever the optimizer."""

    name = "sgd"
    gradients = 1.0
    transformation = staticmethod(plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Climbing(Point):
    """The options of methods that look for a worse loss nearby."""

    rho: Radii = (0.05,)
    """Radii, one for each ascent step. Default: 0.05 0.1 for otmdr (section 5.1 of the
    paper), 0.005 0.01 for otmdr-bnn (appendix B.3), 0.05 for sam and 0.5 for asam
    (their papers, CIFAR-10), sam's for gsam, looksam and the dual forms, 0.01 for bsam
    (its released commands), 0.1 for fisher-sam (reimplementations). sam takes several
    too: it climbs that often, each time on the whole batch."""
    num_subbatches: Count = 1
    """Equal consecutive parts of the batch, each with a perturbation of its own
    (m-sharpness), whatever the devices. Default: 8 for bsam (its released commands), 1
    for the others."""
    sync_perturbation: bool = True
    """On many devices: one perturbation for all, from the whole batch. With
    --no-sync-perturbation each device has its own (m-sharpness), and gradients are
    exchanged once a step instead of once a pass."""

    def options(self, run: Run) -> dict[str, Any]:
        found = {
            **super().options(run),
            "rho": self.rho,
            "num_subbatches": self.num_subbatches,
        }
        if "data" in run.axes:  # else one device's own perturbation is that of all
            found["sync_perturbation"] = self.sync_perturbation
        return found

    @property
    def gradients(self) -> float:
        """One at the particle, one for each ascent step on all of the batch."""
        return 1.0 + len(self.rho)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(Climbing):
    """The options of methods that may leave some parameters where they are."""

    perturb: Patterns | None = None
    """Parameters that are perturbed, by patterns of their names: head/* "*/kernel". The
    others are trained at the center, and count in no radius. Default: all."""

    def options(self, run: Run) -> dict[str, Any]:
        found = super().options(run)
        if self.perturb is not None:
            found["mask"] = functools.partial(patterns.mask, self.perturb)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normed(Masked):
    """The options of methods whose ascent steps are normalised."""

    norm: Literal["global", "per_leaf", "none"] = "global"
    """One gradient norm over all parameters, one for each array, or none: steps as long
    as the gradient makes them. That of otmdr-bnn is --posterior-norm."""

    def options(self, run: Run) -> dict[str, Any]:
        return {**super().options(run), "norm": self.norm}


def one_radius(method: Any) -> None:
    """Refuses several radii of a method that has one."""
    if len(method.rho) != 1:
        raise ValueError(f"{method.name} has one radius, got {method.rho}.")
