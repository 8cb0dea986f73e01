"""OT-MDR for JAX and Optax: train against the worst distribution of models nearby.

The names here need JAX and Optax alone. `models`, `data`, `training` and the rest are
modules of their own, imported when they are asked for.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import Any

from otmdr_jax._version import __version__
from otmdr_jax.core.gradient import (
    Diagnostics,
    RobustGradient,
    robust_gradient,
    value_and_grad,
)
from otmdr_jax.core.presets import PRESETS, preset
from otmdr_jax.core.transform import OtmdrState, asam, otmdr, sam

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
            "sweep",
            "training",
        )
    },
}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(_PARTS[name])
    raise AttributeError(f"module 'otmdr_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PARTS])


class _Parts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets `import otmdr_jax.training` find a part where it stands, and once alone."""

    def find_spec(self, fullname, path=None, target=None):
        if self._home(fullname) == fullname:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module):
        name = module.__name__
        sys.modules[name] = importlib.import_module(self._home(name))

    @staticmethod
    def _home(name):
        package, _, rest = name.partition(".")
        part, dot, inner = rest.partition(".")
        known = package == "otmdr_jax" and part in _PARTS
        return _PARTS[part] + dot + inner if known else name


sys.meta_path.insert(0, _Parts())
