"""Methods that train a sparse network whose connections move: docs/sparse.md."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from otmdr_jax import baselines
from otmdr_jax.baselines import dst, schedules
from otmdr_jax.experiments.methods import point
from otmdr_jax.experiments.methods.base import (
    Course,
    MethodOptions,
    Run,
    no_frozen,
)
from otmdr_jax.experiments.methods.collected import Collecting
from otmdr_jax.experiments.methods.riding import Riding
from otmdr_jax.experiments.options import (
    Count,
    Share,
)

PyTree = Any

# Steps between updates of masks (the authors' command), and how many updates a run has
# at the least.
MASK_EVERY, MASK_UPDATES = 1000, 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Riding):
    """The options of methods that train a sparse network, on SGD."""

    is_sparse = True
    bases: ClassVar[dict[str, type[MethodOptions]]] = {"sgd": point.Sgd}
    own: ClassVar[tuple[str, ...]] = (
        "density",
        "rate",
        "steps",
        "growth",
        "escapes",
        "escape_rate",
    )

    density: Share = 0.2
    """Share of the weights that a sparse network has (Liu et al., 2022)."""
    prune_rate: Share = 0.5
    """Share of a layer's weights that an update drops and grows elsewhere (the released
    code)."""
    prune_decay: Literal["cosine", "constant"] = "cosine"
    """Its course over the run. Default: cosine to 0.005 for dst, constant for edst (the
    authors' commands)."""
    mask_every: Count | None = None
    """Steps between updates of the masks. Default: 1000 (the authors' command), or a
    twentieth of a run of less than 20,000 steps."""
    growth: Literal["gradient", "random"] = "gradient"
    """Where weights grow: where the gradient of all weights is largest (RigL, as in the
    authors' command), or anywhere (SET)."""

    @classmethod
    def wrapped_optimizer(cls, optimizer, own):
        sparse = {name: own.pop(name) for name in Sparse.own if name in own}
        # Its key is replaced by one of the method's.
        return baselines.dynamic(optimizer, jax.random.key(0), **sparse)

    @classmethod
    def wrapped(cls, method, model, **own):
        return super().wrapped(baselines.masked_from_the_start(method), model, **own)

    def options(self, run: Run) -> dict[str, Any]:
        found, total = super().options(run), run.total_steps
        every = self.mask_every
        if every is None:
            every = min(MASK_EVERY, max(total // MASK_UPDATES, 1))
        steps = dst.update_steps(every, found.get("ends", (total,)))
        if not steps:
            raise ValueError(
                f"mask_every={every} leaves no update of the masks in a run of "
                f"{total} steps: lower it, or train longer."
            )
        rate: Any = self.prune_rate
        return {
            **found,
            "density": self.density,
            "rate": dst.cosine(rate, total) if self.prune_decay == "cosine" else rate,
            "steps": steps,
            "growth": self.growth,
        }

    def check(self, config: Any) -> None:
        super().check(config)
        if config.model.freeze:
            raise no_frozen(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dst(Sparse):
    """DST: a sparse network whose connections move while it trains."""

    name = "dst"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edst(Sparse, Collecting):
    """EDST: several sparse networks, one after the other in one run."""

    name = "edst"
    own = (*Sparse.own, "ends")

    prune_decay: Literal["cosine", "constant"] = "constant"
    tickets: Count = 3
    """Sparse networks that edst collects, each at the end of a refinement phase."""
    exploration: Share = 1 / 3
    """Share of the run before edst's first refinement (150 of 450 epochs, the authors'
    command)."""
    escape_rate: Share = 0.8
    """Share of a layer's weights that edst drops and grows elsewhere between two
    tickets (the authors' command)."""

    def course(self, peak, total_steps, steps_per_epoch):
        start = round(self.exploration * total_steps)
        ends = schedules.edst_ends(total_steps, start, self.tickets)
        return Course(schedules.edst(peak, ends, start), ends)

    def options(self, run: Run) -> dict[str, Any]:
        found = super().options(run)
        # One step into the next phase: the ticket is kept as it was trained.
        escapes = tuple(end + 1 for end in found["ends"][:-1])
        return {**found, "escapes": escapes, "escape_rate": self.escape_rate}
