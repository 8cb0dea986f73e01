"""What a training run is told: options, their checks, names, files.

options.py   TrainConfig, every option with its default's source
checks.py    what options must be
named.py     preset(): the papers' experiments by name
files.py     save(), load(), and what two configurations differ in
"""

from otmdr_jax.experiments.config.files import RESUMABLE, differences, load, save
from otmdr_jax.experiments.config.named import PRESETS, preset
from otmdr_jax.experiments.config.options import MethodName, TrainConfig

__all__ = [
    "PRESETS",
    "RESUMABLE",
    "MethodName",
    "TrainConfig",
    "differences",
    "load",
    "preset",
    "save",
]
