"""The configuration of a training run: options in groups, presets, files.

groups.py    Data, Model, Optimizer, Schedule and Run, every option with its default's
             source; a method's own are in `experiments.methods`
options.py   TrainConfig: the groups, given by the names of the command line
named.py     preset(): the papers' experiments by name
files.py     save(), load(), and what two configurations differ in
"""

from otmdr_jax.experiments.config.files import RESUMABLE, differences, load, save
from otmdr_jax.experiments.config.named import PRESETS, preset
from otmdr_jax.experiments.config.options import (
    GROUPS,
    TrainConfig,
    known_options,
    method_options,
    refuse_foreign,
    shared_options,
)

__all__ = [
    "GROUPS",
    "PRESETS",
    "RESUMABLE",
    "TrainConfig",
    "differences",
    "known_options",
    "load",
    "method_options",
    "preset",
    "refuse_foreign",
    "save",
    "shared_options",
]
