"""OT-MDR for JAX and Optax: train against the worst distribution of models nearby.

The names here need JAX and Optax alone. `models`, `data`, `training` and the rest are
modules of their own, imported when they are asked for.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
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

    def create_module(self, spec):
        # Whole from the start: another thread may take it before exec_module is done.
        module = importlib.import_module(self._home(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        # The import has put the alias's specification in the place of the module's own.
        module.__spec__ = module.__spec__.loader_state

    @staticmethod
    def _home(name):
        package, _, rest = name.partition(".")
        part, dot, inner = rest.partition(".")
        known = package == "otmdr_jax" and part in _PARTS
        return _PARTS[part] + dot + inner if known else name


sys.meta_path.insert(0, _Parts())
