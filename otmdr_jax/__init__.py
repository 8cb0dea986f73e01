"""OT-MDR for JAX and Optax: train against the worst distribution of models nearby.

The names here need JAX and Optax alone. `models`, `data`, `training` and the rest are
modules of their own, imported when they are asked for.
"""

import importlib
from typing import Any

from otmdr_jax._version import __version__
from otmdr_jax.adapter import OtmdrState
from otmdr_jax.gradients import (
    Diagnostics,
    RobustGradient,
    robust_gradient,
    value_and_grad,
)
from otmdr_jax.presets import PRESETS, preset
from otmdr_jax.transform import asam, otmdr, sam

__all__ = [
    "PRESETS",
    "Diagnostics",
    "OtmdrState",
    "RobustGradient",
    "__version__",
    "asam",
    "otmdr",
    "preset",
    "robust_gradient",
    "sam",
    "value_and_grad",
]

# Loaded at first use: `otmdr_jax.models` costs an import of Flax, the core does not.
_MODULES = (
    "baselines",
    "bnn",
    "calibration",
    "data",
    "diversity",
    "ensemble",
    "members",
    "methods",
    "metrics",
    "models",
    "parallel",
    "precision",
    "report",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"otmdr_jax.{name}")
    raise AttributeError(f"module 'otmdr_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
