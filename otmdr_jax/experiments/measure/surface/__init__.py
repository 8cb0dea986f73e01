"""Loss landscapes of finished runs: run folders in, grids of losses and files out.

A landscape shows the loss as a function of weights: those of a single model, of one
member, of all members together (the loss of their mean probability), or the mean of a
posterior. :mod:`otmdr_jax.landscape` computes the slices and does not know about runs.
"""

from otmdr_jax.experiments.measure.surface.comparing import check_comparison
from otmdr_jax.experiments.measure.surface.files import (
    check_pictures,
    mark_pictures,
    read,
)
from otmdr_jax.experiments.measure.surface.measuring import measure
from otmdr_jax.experiments.measure.surface.plan import KINDS, Plan

__all__ = [
    "KINDS",
    "Plan",
    "check_comparison",
    "check_pictures",
    "mark_pictures",
    "measure",
    "read",
]
