"""What the method is compared with, built as its authors would, on the one engine.

    preconditioned.py   a precision for each weight: noise, division, the posterior
    bayesian_sam.py     bsam
    surgery.py          gsam
    periodic.py         looksam
    fisher.py           fisher_sam
    online_newton.py    ivon

Each is an Optax transformation here, and a method by name in
:mod:`otmdr_jax.methods`.
"""

from otmdr_jax.baselines.bayesian_sam import (
    BsamState,
    bsam,
    bsam_divisor,
    bsam_gradient,
    bsam_rule,
)
from otmdr_jax.baselines.fisher import fisher_sam
from otmdr_jax.baselines.online_newton import (
    IvonState,
    ivon,
    ivon_gradient,
    ivon_precision,
    ivon_rule,
)
from otmdr_jax.baselines.periodic import LookMemory, looksam, looksam_gradient
from otmdr_jax.baselines.preconditioned import posterior
from otmdr_jax.baselines.surgery import follow, gsam, gsam_gradient

__all__ = [
    "BsamState",
    "bsam",
    "bsam_divisor",
    "bsam_gradient",
    "bsam_rule",
    "fisher_sam",
    "follow",
    "gsam",
    "gsam_gradient",
    "ivon",
    "ivon_gradient",
    "ivon_precision",
    "ivon_rule",
    "IvonState",
    "looksam",
    "looksam_gradient",
    "LookMemory",
    "posterior",
]
