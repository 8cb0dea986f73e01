"""Training methods: a name -> a dataclass of options -> init, step and predict.

training.py    the state, the loss and the step, which all methods share
base.py        what a method says of itself
point.py       what those of one weight vector share; sgd
sam.py         sam, asam, gsam, looksam, fisher-sam
otmdr.py       otmdr, otmdr-dual
sampled.py     what those share that predict with samples
posterior.py   of means and scales: sgvb, otmdr-bnn, otmdr-dual-bnn
gaussian.py    of one weight vector and a precision: bsam, ivon
riding.py      what those share that ride on a method of one weight vector:
collected.py   snapshot, fge, swa, swag
sparse.py      dst, edst
post_hoc.py    mc-dropout, laplace
table.py       METHODS, the only list of them, and create()

What a method overrides is explained once, in :class:`MethodOptions`.

A new method is a dataclass with its options, the transformation that it stands for, and
what a step of it costs; and an entry in the table:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Slam(Sam):
        name = "slam"
        transformation = staticmethod(slam)

        slam_rate: Positive = 0.5
        \"\"\"How hard it slams; 0.5 in its paper.\"\"\"

        def options(self, run):
            return {**super().options(run), "rate": self.slam_rate}
"""

from otmdr_jax.experiments.methods.base import Course, MethodOptions, Run
from otmdr_jax.experiments.methods.table import METHODS, create, kind_of
from otmdr_jax.experiments.methods.training import (
    Loss,
    Method,
    TrainState,
    cross_entropy,
    decays,
    weights_of,
    with_weights,
)

__all__ = [
    "METHODS",
    "Course",
    "Loss",
    "Method",
    "MethodOptions",
    "Run",
    "TrainState",
    "create",
    "cross_entropy",
    "decays",
    "kind_of",
    "weights_of",
    "with_weights",
]
