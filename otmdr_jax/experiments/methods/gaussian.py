"""Methods that train one weight vector and a precision around it: bSAM and IVON."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from otmdr_jax import baselines, bnn
from otmdr_jax.baselines.bsam import B2 as BSAM_B2
from otmdr_jax.baselines.bsam import DAMPING, PRECISION
from otmdr_jax.baselines.bsam import RHO as BSAM_RHO
from otmdr_jax.baselines.ivon import B2 as IVON_B2
from otmdr_jax.baselines.ivon import HESS
from otmdr_jax.core.checks import check_count
from otmdr_jax.experiments.methods import training
from otmdr_jax.experiments.methods.base import Run, no_joint_loss
from otmdr_jax.experiments.methods.point import (
    Climbing,
    Point,
    at_weights,
    one_radius,
    step,
)
from otmdr_jax.experiments.methods.sampled import Sampled
from otmdr_jax.experiments.options import (
    Bound,
    Count,
    NotNegative,
    Positive,
    Radii,
    Rate,
)

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Sampled, Point):
    """The options of methods that keep a precision for each weight.

    Their transformation is a whole optimizer: its state is count, key, aux and
    diagnostics, then what the precision is made of, then the rule's state. A run keeps
    the last two as its memory and as the first part of its optimizer's state; the rest
    of that is of what follows the update, as a plateau's factor does.
    """

    has_own_update = True

    data_factor: Positive = 1.0
    """What the number of training examples is multiplied by where it sets a posterior's
    width, for the augmentation. 4 in bsam's released commands for CIFAR."""

    @classmethod
    def precision(cls, memory: PyTree, weight_decay: float) -> PyTree:
        """The precision per example of each weight."""
        raise NotImplementedError

    @classmethod
    def make(  # type: ignore[override]  # what is required is checked by name
        cls,
        model,
        optimizer,
        loss,
        *,
        num_data: float,
        weight_decay: float,
        num_samples: int = bnn.NUM_SAMPLES,
        mean_only: bool = False,
        **options,
    ):
        """See :class:`MethodOptions`.

        Args:
          model: The network.
          optimizer: What follows the method's own update, an `optax.chain`, or
            `optax.identity()` for nothing.
          loss: The mean negative log-likelihood.
          num_data: N, what the posterior's width is of.
          weight_decay: delta, the prior's precision per example.
          num_samples: Samples in a prediction.
          mean_only: Predict with the mean instead.
          **options: Of the transformation.
        """
        if not mean_only:
            check_count("num_samples", num_samples)
        options |= {"num_data": num_data, "weight_decay": weight_decay}

        def transformation(loss_fn, key, **aux):
            return cls.transformation(loss_fn, key, **options, **aux)

        transformation(lambda *args: None, jax.random.key(0))
        optimizer = optax.with_extra_args_support(optimizer)

        def rule(loss_fn):
            def init(params):
                aux = jnp.zeros(())
                state: Any = transformation(
                    loss_fn, jax.random.key(0), has_aux=True, aux_init=aux
                ).init(params)
                return (state[5], *optimizer.init(params)), state[4]

            def update(state, batch, scaled):
                own, *rest = state.opt_state
                updates, after = step(
                    transformation, loss_fn, state, batch, scaled, state.memory, own
                )
                info = after.diagnostics
                updates, rest = optimizer.update(
                    updates, tuple(rest), state.params, value=info.robust_loss
                )
                return training.Update(
                    updates, (after[5], *rest), after[4], after.aux, info
                )

            def posterior(state):
                precision = cls.precision(state.memory, weight_decay)
                return baselines.posterior(state.params, precision, num_data)

            def predict(log_probs_fn, state, key):
                if mean_only:
                    return at_weights(log_probs_fn, state, key)
                return bnn.predict(
                    log_probs_fn, posterior(state), key=key, num_samples=num_samples
                )

            return training.Rule(
                lambda key, params: params, init, update, predict, posterior
            )

        return training.build(model, loss, rule, options.get("axis_name"))

    def options(self, run: Run) -> dict[str, Any]:
        return {
            **super().options(run),
            **self.of_samples,
            "num_data": run.num_train * self.data_factor,
            "learning_rate": run.rate,
            "b1": run.config.optimizer.momentum,
            "weight_decay": run.config.optimizer.weight_decay,
            "clip_norm": run.config.optimizer.clip_norm,
        }

    def check(self, config: Any) -> None:
        super().check(config)
        no_joint_loss(self, config, "members with a posterior each are trained with")
        for name, default in (
            ("optimizer", "sgd"),
            ("nesterov", False),
            ("adam_eps", 1e-8),
            ("decay_all", True),
        ):
            if (value := config.flat()[name]) != default:
                raise ValueError(
                    f"{self.name} has an update of its own: leave {name} out, got "
                    f"{value!r}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bsam(Gaussian, Climbing):
    """BSAM: SAM whose ellipsoid is the Gaussian that it trains."""

    name = "bsam"
    transformation = staticmethod(baselines.bsam)

    rho: Radii = (BSAM_RHO,)
    num_subbatches: Count = 8
    b2: Rate = BSAM_B2
    """How slowly the precision follows the gradients. Default: 0.999 for bsam (its
    paper), 0.99999 for ivon (released code)."""
    precision_init: Positive = PRECISION
    """Precision of every weight at the start (released code)."""
    damping: NotNegative = DAMPING
    """What is added to the precision (released code)."""
    precision_order: Literal["released", "paper"] = "released"
    """Whether bsam divides its step by the precision before its update (the code), or
    after it (the paper's listing)."""

    @classmethod
    def precision(cls, memory, weight_decay):
        del weight_decay
        return memory

    def options(self, run: Run) -> dict[str, Any]:
        return {
            **super().options(run),
            "b2": self.b2,
            "precision_init": self.precision_init,
            "damping": self.damping,
            "order": self.precision_order,
        }

    def check(self, config: Any) -> None:
        super().check(config)
        one_radius(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ivon(Gaussian):
    """IVON: variational learning by an online Newton step."""

    name = "ivon"
    transformation = staticmethod(baselines.ivon)

    b2: Rate = IVON_B2
    """How slowly the precision follows the gradients. Default: 0.999 for bsam (its
    paper), 0.99999 for ivon (released code)."""
    hess_init: Positive = HESS
    """Hessian of every weight at the start of ivon; the larger, the less noise
    (released code)."""
    mc_samples: Count = 1
    """Samples of the posterior in a step of ivon, a gradient each."""
    clip_radius: Bound | None = None
    """Bound on each coordinate of ivon's step before the learning rate. Default:
    none."""

    @classmethod
    def precision(cls, memory, weight_decay):
        return baselines.ivon_precision(memory, weight_decay)

    def options(self, run: Run) -> dict[str, Any]:
        return {
            **super().options(run),
            "b2": self.b2,
            "hess_init": self.hess_init,
            "mc_samples": self.mc_samples,
            "clip_radius": self.clip_radius,
        }

    @property
    def gradients(self) -> float:
        """One at each sample."""
        return float(self.mc_samples)

    def check(self, config: Any) -> None:
        super().check(config)
        if not config.optimizer.weight_decay:
            raise ValueError(
                "ivon needs a weight decay, the precision of its prior, got "
                "weight_decay=0."
            )
