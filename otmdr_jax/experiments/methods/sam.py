"""SAM and the methods that came of it."""

import dataclasses
from typing import Any, ClassVar

from otmdr_jax import baselines
from otmdr_jax.baselines.fisher_sam import ETA
from otmdr_jax.baselines.fisher_sam import RHO as FISHER_RHO
from otmdr_jax.baselines.gsam import ALPHA as GSAM_ALPHA
from otmdr_jax.baselines.gsam import RHO as GSAM_RHO
from otmdr_jax.baselines.looksam import ALPHA as LOOK_ALPHA
from otmdr_jax.baselines.looksam import EVERY
from otmdr_jax.baselines.looksam import RHO as LOOK_RHO
from otmdr_jax.core.transform import asam, sam
from otmdr_jax.experiments.methods.base import Run
from otmdr_jax.experiments.methods.point import Normed, one_radius
from otmdr_jax.experiments.options import Count, NotNegative, Radii


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
