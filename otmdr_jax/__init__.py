"""OT-MDR for JAX and Optax: train against the worst distribution of models nearby.

The names here need JAX and Optax alone. `models`, `data`, `training` and the rest are
modules, loaded when they are first asked for: `from otmdr_jax import training`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from otmdr_jax._version import __version__
from otmdr_jax.core.dual import DualGradient, DualState, dual, dual_gradient
from otmdr_jax.core.gradient import (
    Diagnostics,
    RobustGradient,
    robust_gradient,
    value_and_grad,
)
from otmdr_jax.core.presets import PRESETS, preset
from otmdr_jax.core.sample import SamplingDiagnostics, sample_particles
from otmdr_jax.core.transform import OtmdrState, asam, otmdr, sam

if TYPE_CHECKING:  # who reads types follows the parts to where they stand
    from otmdr_jax import baselines as baselines
    from otmdr_jax import bnn as bnn
    from otmdr_jax import data as data
    from otmdr_jax import ensemble as ensemble
    from otmdr_jax import landscape as landscape
    from otmdr_jax import metrics as metrics
    from otmdr_jax import models as models
    from otmdr_jax import parallel as parallel
    from otmdr_jax.experiments import config as config
    from otmdr_jax.experiments import demo as demo
    from otmdr_jax.experiments import members as members
    from otmdr_jax.experiments import methods as methods
    from otmdr_jax.experiments import precision as precision
    from otmdr_jax.experiments import programs as programs
    from otmdr_jax.experiments import report as report
    from otmdr_jax.experiments import restore as restore
    from otmdr_jax.experiments import sweep as sweep
    from otmdr_jax.experiments import training as training
    from otmdr_jax.experiments.measure import shift as shift
    from otmdr_jax.experiments.restore import open_run as open_run
    from otmdr_jax.frameworks import equinox as equinox
    from otmdr_jax.frameworks import nnx as nnx
    from otmdr_jax.metrics import calibration as calibration
    from otmdr_jax.metrics import diversity as diversity

__all__ = [
    "PRESETS",
    "Diagnostics",
    "DualGradient",
    "DualState",
    "OtmdrState",
    "RobustGradient",
    "SamplingDiagnostics",
    "__version__",
    "asam",
    "dual",
    "dual_gradient",
    "otmdr",
    "preset",
    "robust_gradient",
    "sam",
    "sample_particles",
    "value_and_grad",
]

# The parts, loaded at first use: an import of the core costs none of Flax, say. Users
# name them without the floor that they stand on.
_PARTS = {
    **{
        name: f"otmdr_jax.{name}"
        for name in (
            "baselines",
            "bnn",
            "data",
            "ensemble",
            "landscape",
            "metrics",
            "models",
            "parallel",
        )
    },
    "calibration": "otmdr_jax.metrics.calibration",
    "diversity": "otmdr_jax.metrics.diversity",
    "equinox": "otmdr_jax.frameworks.equinox",
    "nnx": "otmdr_jax.frameworks.nnx",
    "precision": "otmdr_jax.experiments.precision",
    "shift": "otmdr_jax.experiments.measure.shift",
    **{
        name: f"otmdr_jax.experiments.{name}"
        for name in (
            "config",
            "demo",
            "members",
            "methods",
            "programs",
            "report",
            "restore",
            "sweep",
            "training",
        )
    },
}

# Names that need more than the core does.
_NAMES = {"open_run": "otmdr_jax.experiments.restore"}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(_PARTS[name])
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'otmdr_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    # What is for users, and what every module has.
    standard = (name for name in globals() if name.startswith("__"))
    return sorted({*__all__, *_PARTS, *_NAMES, *standard})
