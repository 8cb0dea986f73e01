"""Methods of one weight vector, each an Optax transformation of the gradient."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from otmdr_jax import baselines
from otmdr_jax.baselines.fisher_sam import ETA
from otmdr_jax.baselines.fisher_sam import RHO as FISHER_RHO
from otmdr_jax.baselines.gsam import ALPHA as GSAM_ALPHA
from otmdr_jax.baselines.gsam import RHO as GSAM_RHO
from otmdr_jax.baselines.looksam import ALPHA as LOOK_ALPHA
from otmdr_jax.baselines.looksam import EVERY
from otmdr_jax.baselines.looksam import RHO as LOOK_RHO
from otmdr_jax.core import dual as dual_lib
from otmdr_jax.core.dual import MAX_RATIO, RATE
from otmdr_jax.core.gradient import PAPER_RHO
from otmdr_jax.core.transform import asam, otmdr, plain, sam
from otmdr_jax.experiments import patterns
from otmdr_jax.experiments.methods import training
from otmdr_jax.experiments.methods.base import MethodOptions, Run
from otmdr_jax.experiments.options import (
    AtLeastOne,
    Count,
    Heat,
    NotNegative,
    OnlyWith,
    Patterns,
    Positive,
    Radii,
    Tilt,
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
    as the gradient makes them. That of otmdr-bnn is posterior_norm."""

    def options(self, run: Run) -> dict[str, Any]:
        return {**super().options(run), "norm": self.norm}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sam(Normed):
    """SAM: the loss at the worst point of a ball."""

    name = "sam"
    transformation: ClassVar[Any] = staticmethod(sam)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asam(Sam):
    """ASAM: a ball in units of each weight."""

    name = "asam"
    transformation = staticmethod(asam)

    rho: Radii = (0.5,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsam(Sam):
    """GSAM: SAM that also narrows the gap to the loss at the center."""

    name = "gsam"
    transformation = staticmethod(baselines.gsam)

    rho: Radii = (GSAM_RHO,)
    gsam_alpha: NotNegative = GSAM_ALPHA
    """Weight of what gsam takes out of the gradient: 0 is sam. 0.2 in its authors'
    example on CIFAR-10."""
    rho_min: NotNegative | None = None
    """Radius of gsam where the learning rate is 0; between it and --rho the radius
    follows the learning rate, as its paper has it. Default: --rho throughout."""

    def options(self, run: Run) -> dict[str, Any]:
        found = {**super().options(run), "alpha": self.gsam_alpha}
        if self.rho_min is not None:
            found["rho"] = baselines.follow(
                run.rate,
                self.rho[0],
                self.rho_min,
                run.config.schedule.learning_rate,
            )
        return found

    def check(self, config: Any) -> None:
        one_radius(self)
        if self.rho_min is not None and config.schedule.name == "plateau":
            raise ValueError(
                "rho_min needs a learning rate that is known beforehand: use "
                "--schedule cosine or step."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookSam(Sam):
    """LookSAM: SAM every so many steps, its direction used again in between."""

    name = "looksam"
    transformation = staticmethod(baselines.looksam)

    rho: Radii = (LOOK_RHO,)
    look_every: Count = EVERY
    """How often looksam climbs, in steps: 1 is sam (reimplementations: 5)."""
    look_alpha: NotNegative = LOOK_ALPHA
    """Length of looksam's remembered direction in lengths of the gradient
    (reimplementations)."""

    def options(self, run: Run) -> dict[str, Any]:
        own = {"every": self.look_every, "alpha": self.look_alpha}
        return {**super().options(run), **own}

    @property
    def gradients(self) -> float:
        """Every so many steps one more."""
        return 1.0 + 1.0 / self.look_every

    def check(self, config: Any) -> None:
        one_radius(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FisherSam(Sam):
    """Fisher SAM: a ball that the squared gradient bends."""

    name = "fisher-sam"
    transformation = staticmethod(baselines.fisher_sam)

    rho: Radii = (FISHER_RHO,)
    fisher_eta: NotNegative = ETA
    """How far the squared gradient bends the ball of fisher-sam: 0 is sam
    (reimplementations)."""

    def options(self, run: Run) -> dict[str, Any]:
        return {**super().options(run), "eta": self.fisher_eta}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(Masked):
    """What methods have whose radius adapts: the dual form (Eqs. 14, 26)."""

    dual_power: AtLeastOne = 2.0
    """p of the distance d, the p-th power of the length. Default: 2, with which
    particles go as far as their gradients are long; 1 needs dual_max_ratio 1."""
    dual_steps: Count = 1
    """Ascent steps towards the inner maximum, a gradient each."""
    dual_rate: NotNegative = RATE
    """Learning rate of the logarithm of lambda, by plain descent: the share of the
    distance d by which a budget that is spent twice over changes it in a step."""
    dual_max_ratio: Positive = MAX_RATIO
    """How many radii a particle may be away. With 1 and dual_power 1 it is sam (Theorem
    4.3)."""

    share = staticmethod(dual_lib.share)

    @staticmethod
    def logged(memory: PyTree) -> dict[str, jax.Array]:
        return {
            "lambda": memory.multiplier,
            "budget_used": memory.budget_used,
            "dual_value": memory.value,
        }

    def options(self, run: Run) -> dict[str, Any]:
        return {
            **super().options(run),
            "power": self.dual_power,
            "num_steps": self.dual_steps,
            "max_ratio": self.dual_max_ratio,
            "lambda_optimizer": dual_lib.lambda_optimizer(self.dual_rate),
        }

    @property
    def gradients(self) -> float:
        """One at the particle, one for each ascent step."""
        return 1.0 + self.dual_steps

    def check(self, config: Any) -> None:
        super().check(config)
        one_radius(self)
        if self.dual_power == 1 and self.dual_max_ratio > 1:
            raise ValueError(
                "dual_power=1 needs --dual-max-ratio 1, the ball of Theorem 4.3, got "
                f"{self.dual_max_ratio}: use a power above 1, as 2."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtmdrDual(Budgeted):
    """The dual form: a radius that adapts to the gradient, with a mean of --rho."""

    name = "otmdr-dual"
    transformation = staticmethod(dual_lib.dual)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Particles(Masked):
    """What methods have whose particles climb on parts of the batch, or are drawn."""

    has_particles = True
    only_with = (
        *(
            OnlyWith(n, "sampler", ("ascent",))
            for n in ("noise_std", "merge", "project")
        ),
        OnlyWith("split", "sampler", ("ascent", "langevin")),
        *(
            OnlyWith(name, "sampler", ("first_order", "langevin"))
            for name in ("tilt", "inverse_temperature")
        ),
        *(
            OnlyWith(name, "sampler", ("langevin",))
            for name in ("chain_steps", "chain_step_size")
        ),
    )

    rho: Radii = PAPER_RHO
    num_particles: Count = 1
    """K, the number of particles of otmdr and otmdr-bnn."""
    noise_std: NotNegative = 0.0
    """Noise per coordinate after each ascent step. 0 in the released code; 0.01 in the
    paper (appendix B.1)."""
    split: Literal["random", "ordered", "shared"] = "random"
    """How the ascent steps share the batch. Default: random for otmdr, otmdr-bnn."""
    sampler: Literal["ascent", "first_order", "langevin"] = "ascent"
    """What makes particles: the paper's steps of ascent, exact draws of the worst
    distribution of its Theorem 4.2 for the loss linearised at the center, or a Langevin
    chain for the loss itself. The latter two have one radius, --rho 0.05 say, and need
    --tilt or --inverse-temperature."""
    tilt: Tilt | None = None
    """Mean coordinate of drawn particles along the gradient in units of the radius, 0
    to 1: 0 is uniform in the ball (random weight perturbation), 1 is sam."""
    inverse_temperature: Heat | None = None
    """The same as lambda in exp(lambda L), 0 to infinity (inf): what a number does
    depends on the number of weights."""
    chain_steps: Count | None = None
    """Steps of --sampler langevin: each on a part of the batch of its own, or with
    --split shared on all of it, and then accepted or rejected."""
    chain_step_size: Positive | None = None
    """Standard deviation of their noise per coordinate in units of the radius. Default:
    see the option step_size of sample_particles."""
    project: bool = False
    """Take each ascent step back to the ball whose radius is the largest of --rho."""
    merge: Literal["sum", "mean"] | None = None
    """The released code's merged second direction. Default: none, as in the paper."""
    sum_particles: bool = False
    """Add the particles' gradients up instead of averaging (released code, mode 1)."""
    particle_map: Literal["auto", "vmap", "unroll", "scan"] = "auto"
    """How particles are computed: a matter of speed and memory alone."""

    def options(self, run: Run) -> dict[str, Any]:
        spread = {"particle_axis_name": "particle"} if "particle" in run.axes else {}
        return {
            **super().options(run),
            "num_particles": self.num_particles,
            "noise_std": self.noise_std,
            "split": self.split,
            "sampler": self.sampler,
            "tilt": self.tilt,
            "inverse_temperature": self.inverse_temperature,
            "num_steps": self.chain_steps,
            "step_size": self.chain_step_size,
            "project": self.project,
            "merge": self.merge,
            "particle_map": self.particle_map,
            "sum_particles": self.sum_particles,
            **spread,
        }

    @property
    def num_parts(self) -> int:
        """Steps that share the batch divide it."""
        if self.split == "shared" or self.sampler == "first_order":
            return 1
        return len(self.rho) if self.sampler == "ascent" else self.chain_steps or 1

    @property
    def gradients(self) -> float:
        """Of each particle one where it arrives, and those on its way there.

        Steps that share the batch take one of it, others one each; the first one is
        that of all particles where it is taken on all of the batch.
        """
        if self.sampler == "first_order":
            return 1.0 + self.num_particles
        if self.split != "shared":
            return self.num_particles * 2.0
        if self.sampler == "langevin":
            return 1.0 + self.num_particles * (1.0 + (self.chain_steps or 1))
        return self.num_particles * (1.0 + len(self.rho))

    def check(self, config: Any) -> None:
        # What the transformation refuses is refused here, before there is a model.
        self._check_sampler()
        alike = self.split in ("ordered", "shared") and not self.noise_std
        alike = alike and self.sampler == "ascent"
        if self.num_particles > 1 and alike:
            raise ValueError(
                f"num_particles={self.num_particles} with split={self.split!r} and "
                'no noise gives equal particles: use split="random", set noise_std, or '
                "leave num_particles at 1."
            )

    def _check_sampler(self):
        if self.sampler == "ascent":
            return
        if (self.tilt is None) == (self.inverse_temperature is None):
            raise ValueError(
                f"sampler={self.sampler!r} needs either tilt (0: uniform in the ball, "
                "1: SAM) or inverse_temperature."
            )
        if len(self.rho) != 1:
            raise ValueError(
                f"sampler={self.sampler!r} has one radius, that of its ball, got "
                f"{self.rho}: pass --rho 0.05, say."
            )
        if self.sampler == "langevin" and self.chain_steps is None:
            raise ValueError("sampler='langevin' needs chain_steps, the steps taken.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Otmdr(Particles, Normed):
    """OT-MDR: particles that climb on parts of the batch (Eqs. 9-10)."""

    name = "otmdr"

    @classmethod
    def make(cls, model, optimizer, loss, *, sum_particles=False, **options):

        def transformation(loss_fn, key, **aux):
            return otmdr(loss_fn, key, **options, **aux)

        transformation(lambda *args: None, jax.random.key(0))
        times = options.get("num_particles", 1) if sum_particles else 1
        made = rule(transformation, optimizer, times=times)
        return training.build(model, loss, made, options.get("axis_name"))


def one_radius(method: Any) -> None:
    """Refuses several radii of a method that has one."""
    if len(method.rho) != 1:
        raise ValueError(f"{method.name} has one radius, got {method.rho}.")
