"""What the method is compared with, built as its authors would, on the one engine.

Optax transformations, and methods by name in :mod:`otmdr_jax.methods`:

    preconditioned.py   a precision for each weight: noise, division, the posterior
    bayesian_sam.py     bsam
    surgery.py          gsam
    periodic.py         looksam
    fisher.py           fisher_sam
    online_newton.py    ivon

Around any method of one weight vector (docs/collected.md), and sparse training
(docs/sparse.md):

    collector.py        collect: snapshot ensembles, FGE
    swag.py             average: SWA, SWAG
    curvature.py        the Gauss-Newton matrix: last layer, Kronecker, diagonal
    laplace.py          laplace: a Gaussian around trained weights
    dropout.py          mc_dropout: samples of dropout's masks
    schedules.py        learning rates, and when members are collected
    sparse.py           dynamic: DST, EDST
    costs.py            operations of a prediction
    presets.py          the competitors of the paper's Table 3
"""

from otmdr_jax.baselines.bayesian_sam import (
    BsamState,
    bsam,
    bsam_divisor,
    bsam_gradient,
    bsam_rule,
)
from otmdr_jax.baselines.collector import Collected, collect, members
from otmdr_jax.baselines.dropout import example_keys, mc_dropout, rate_of
from otmdr_jax.baselines.fisher import fisher_sam
from otmdr_jax.baselines.laplace import LaplacePosterior, laplace
from otmdr_jax.baselines.online_newton import (
    IvonState,
    ivon,
    ivon_gradient,
    ivon_precision,
    ivon_rule,
)
from otmdr_jax.baselines.periodic import LookMemory, looksam, looksam_gradient
from otmdr_jax.baselines.preconditioned import posterior
from otmdr_jax.baselines.sparse import Sparse, dynamic, masked_from_the_start
from otmdr_jax.baselines.surgery import follow, gsam, gsam_gradient
from otmdr_jax.baselines.swag import NUM_SAMPLES, RANK, Moments, average, moments_of

__all__ = [
    "NUM_SAMPLES",
    "RANK",
    "BsamState",
    "Collected",
    "IvonState",
    "LaplacePosterior",
    "LookMemory",
    "Moments",
    "Sparse",
    "average",
    "bsam",
    "bsam_divisor",
    "bsam_gradient",
    "bsam_rule",
    "collect",
    "dynamic",
    "example_keys",
    "fisher_sam",
    "follow",
    "gsam",
    "gsam_gradient",
    "ivon",
    "ivon_gradient",
    "ivon_precision",
    "ivon_rule",
    "laplace",
    "looksam",
    "looksam_gradient",
    "masked_from_the_start",
    "mc_dropout",
    "members",
    "moments_of",
    "posterior",
    "rate_of",
]
