"""OT-MDR: particles, and the dual form."""

import dataclasses
from typing import Any, Literal

import jax

from otmdr_jax.core import dual as dual_lib
from otmdr_jax.core.dual import MAX_RATIO, RATE
from otmdr_jax.core.gradient import PAPER_RHO
from otmdr_jax.core.transform import otmdr
from otmdr_jax.experiments.methods import training
from otmdr_jax.experiments.methods.base import Run
from otmdr_jax.experiments.methods.point import Masked, Normed, one_radius, rule
from otmdr_jax.experiments.options import (
    AtLeastOne,
    Count,
    Heat,
    NotNegative,
    OnlyWith,
    Positive,
    Radii,
    Tilt,
)

PyTree = Any


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

        Steps that share the batch take one of it, others one each. The first one is
        that of all particles, unless each cuts the batch its own way.
        """
        count = float(self.num_particles)
        if self.sampler == "first_order":
            return 1.0 + count
        if self.split == "random":
            return 2.0 * count
        if self.split == "ordered":
            return 1 / self.num_parts + count * (2 - 1 / self.num_parts)
        if self.sampler == "langevin":
            return 1.0 + count * (1.0 + (self.chain_steps or 1))
        return 1.0 + count * len(self.rho)

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
