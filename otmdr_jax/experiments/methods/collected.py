"""Methods that keep copies of the weights on their way, or average them.

They ride on a method of one weight vector: docs/collected.md.
"""

import dataclasses
import itertools
from typing import Annotated, Any, ClassVar

import jax
import numpy as np

from otmdr_jax import baselines, parallel
from otmdr_jax.baselines import schedules
from otmdr_jax.data import Loader
from otmdr_jax.experiments.methods.base import Course, Run
from otmdr_jax.experiments.methods.riding import Riding, summed
from otmdr_jax.experiments.methods.sampled import Sampled
from otmdr_jax.experiments.options import (
    Count,
    Must,
    NotNegative,
    Positive,
    Share,
)

PyTree = Any

# Where they start to collect: 160 of 200 epochs (README of Garipov's code), 161 of 300
# (README of Maddox's).
FGE_START, AVERAGING_START = 160 / 200, 161 / 300

Deviations = Annotated[int, Must("at least 2", lambda n: n >= 2)]
TwoRates = Annotated[
    tuple[float, float],
    Must(
        "two rates, the higher one first",
        lambda rates: (
            isinstance(rates, tuple) and len(rates) == 2 and rates[0] >= rates[1] >= 0
        ),
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduled(Riding):
    """The options of methods whose learning rate is a part of them."""

    own: ClassVar[tuple[str, ...]] = ("ends",)

    def course(self, peak: float, total_steps: int, steps_per_epoch: int) -> Course:
        raise NotImplementedError

    def check(self, config: Any) -> None:
        super().check(config)
        for name, default in (("schedule", "cosine"), ("warmup_epochs", 0.0)):
            if (value := config.flat()[name]) != default:
                raise ValueError(
                    f"{name}={value!r}: the learning rate of {self.name} is part of "
                    f"the method; leave {name} out."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collecting(Scheduled):
    """The options of methods that predict with copies of their weights."""

    collects = True

    @classmethod
    def wrapped(cls, method, model, *, ends=(), **own):
        del model, own
        return baselines.collect(method, ends)

    def collected(self, state: PyTree) -> list[PyTree]:
        return baselines.members(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot(Collecting):
    """Snapshot ensembles: a copy at the end of each cycle of the learning rate."""

    name = "snapshot"

    cycles: Count = 5
    """Cycles of snapshot, each of which gives a member (the authors' command)."""

    def course(self, peak, total_steps, steps_per_epoch):
        return Course(
            schedules.cyclic_cosine(peak, total_steps, self.cycles),
            schedules.snapshot_ends(total_steps, self.cycles),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fge(Collecting):
    """Fast geometric ensembles: a copy at the end of each short cycle."""

    name = "fge"

    collect_start: Share = FGE_START
    """Share of the run before fge cycles, or swa and swag average. Default: 160 of 200
    epochs for fge, 161 of 300 for swa and swag (their authors' commands)."""
    cycle_epochs: Positive = 2.0
    """Epochs of a cycle of fge, each of which gives a member (the authors' command)."""
    cycle_rates: TwoRates = (0.05, 0.01)
    """Highest and lowest learning rate of fge's cycles (the authors' command for
    WideResNet-28-10)."""

    def course(self, peak, total_steps, steps_per_epoch):
        start = max(round(self.collect_start * total_steps), 1)
        period = 2 * max(round(self.cycle_epochs * steps_per_epoch / 2), 1)
        return Course(
            schedules.fge(peak, total_steps, start, period, *self.cycle_rates),
            schedules.fge_ends(total_steps, start, period),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swa(Scheduled):
    """SWA: the mean of the weights along the end of a run."""

    name = "swa"

    collect_start: Share = AVERAGING_START
    """Share of the run before fge cycles, or swa and swag average. Default: 160 of 200
    epochs for fge, 161 of 300 for swa and swag (their authors' commands)."""
    average_rate: NotNegative = 0.05
    """Constant learning rate at which swa and swag average (their authors' default)."""
    collect_every: Positive = 1.0
    """Epochs between two weights that enter the average of swa and swag."""
    batchnorm_examples: Count | None = None
    """Training images that BatchNorm statistics of swa's and swag's weights are
    computed from before a prediction. Default: all, as their authors."""

    @classmethod
    def wrapped(cls, method, model, *, ends=(), **own):
        return baselines.average(method, model, ends, **own)

    def course(self, peak, total_steps, steps_per_epoch):
        start = max(round(self.collect_start * total_steps), 1)
        every = max(round(self.collect_every * steps_per_epoch), 1)
        return Course(
            schedules.flat_then_linear(peak, self.average_rate, start),
            schedules.averaging_ends(total_steps, start, every),
        )

    def trained(self, state: PyTree) -> PyTree:
        return baselines.moments_of(state)

    def seen(self, config: Any, state: PyTree, dataset: Any, programs: Any) -> Any:
        """BatchNorm statistics of averaged weights: what SWA's `bn_update` computes.

        The sum over batches of the training set, in an order and with augmentation
        of their own, of the batches' statistics at the weights that predict. One
        forward pass for each batch and weight vector; the same numbers on any mesh,
        where each batch is one.
        """
        each = [state] if hasattr(state, "step") else state
        kept = each[0].method_state
        # Members of several architectures may have BatchNorm or not.
        statistics = jax.tree.leaves([member.model_state for member in each])
        if kept.statistics is not None or not statistics or not number(kept.number):
            return None
        train = dataset.train
        wanted = min(self.batchnorm_examples or train.num_examples, train.num_examples)
        devices = parallel.axis_size(programs.mesh, "data")
        size = max(min(config.run.batch_size, wanted) // devices, 1) * devices
        # Neither of the two keys that a run has: see programs.run_keys.
        key = jax.random.fold_in(jax.random.key(config.run.seed), 2)
        count = max(wanted // size, 1)
        if isinstance(train, Loader):  # its order, and its augmentation before ours
            read: Any = (batch.images[:size] for batch in train.epoch(0))
        else:
            order = np.random.default_rng(config.run.seed).permutation(
                len(train.labels)
            )
            rows = order[: count * size].reshape(count, -1)
            read = (np.asarray(train.images[x]) for x in rows)
        batches = (
            (images, jax.random.fold_in(key, i))
            for i, images in enumerate(itertools.islice(read, count))
        )
        return summed(programs, state, batches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swag(Sampled, Swa):
    """SWAG: a Gaussian around SWA's mean."""

    name = "swag"
    own = ("ends", "rank", "num_samples")

    swag_rank: Deviations = baselines.RANK
    """Deviations from the mean that swag keeps, each of the size of the model (Maddox
    et al., 2019). Its samples in a prediction are num_samples."""

    @classmethod
    def wrapped(cls, method, model, **own):
        defaults = {"rank": baselines.RANK, "num_samples": baselines.NUM_SAMPLES}
        return super().wrapped(method, model, **(defaults | own))

    def options(self, run: Run) -> dict[str, Any]:
        samples = 0 if self.prediction == "mean" else self.num_samples
        own = {"rank": self.swag_rank, "num_samples": samples}
        return {**super().options(run), **own}


def number(x: jax.Array) -> int:
    """The first entry of an array that may be spread over hosts."""
    return int(np.ravel(x.addressable_data(0))[0])
