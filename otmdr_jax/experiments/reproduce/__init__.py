"""The paper's tables and figures, each by one command: `otmdr reproduce table1`."""

from otmdr_jax.experiments.reproduce.claims import Measured
from otmdr_jax.experiments.reproduce.plans import SCALES, TARGETS, VARIANTS, Cell, cells
from otmdr_jax.experiments.reproduce.printed import Key, Number, numbers
from otmdr_jax.experiments.reproduce.running import estimate, planned, run
from otmdr_jax.experiments.reproduce.tables import measured, page

__all__ = [
    "SCALES",
    "TARGETS",
    "VARIANTS",
    "Cell",
    "Key",
    "Measured",
    "Number",
    "cells",
    "estimate",
    "measured",
    "numbers",
    "page",
    "planned",
    "run",
]
