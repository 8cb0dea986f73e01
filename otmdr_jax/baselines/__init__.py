"""What the method is compared with, built as its authors would, on the core.

Optax transformations, and methods by name in :mod:`otmdr_jax.experiments.methods`:

    preconditioned.py   a precision for each weight: noise, division, the posterior
    bsam.py  ivon.py  gsam.py  looksam.py  fisher_sam.py

Around any method of one weight vector (docs/collected.md), and sparse training
(docs/sparse.md):

    finalize.py         the pass over the training set before a prediction
    snapshot.py         collect: snapshot ensembles, FGE
    swag.py             average: SWA, SWAG
    curvature.py        the Gauss-Newton matrix: last layer, Kronecker, diagonal
    laplace.py          laplace: a Gaussian around trained weights
    mc_dropout.py       samples of dropout's masks
    schedules.py        learning rates, and when members are collected
    dst.py              dynamic: DST, EDST
    dst_costs.py        operations of a sparse network's prediction
    presets.py          the competitors of the paper's Table 3
"""

from otmdr_jax.baselines.bsam import (
    BsamState,
    bsam,
    bsam_divisor,
    bsam_gradient,
    bsam_rule,
)
from otmdr_jax.baselines.dst import Sparse, dynamic, masked_from_the_start
from otmdr_jax.baselines.finalize import Finalize
from otmdr_jax.baselines.fisher_sam import fisher_sam
from otmdr_jax.baselines.gsam import follow, gsam, gsam_gradient
from otmdr_jax.baselines.ivon import (
    IvonState,
    ivon,
    ivon_gradient,
    ivon_precision,
    ivon_rule,
)
from otmdr_jax.baselines.laplace import LaplacePosterior, laplace
from otmdr_jax.baselines.looksam import LookMemory, looksam, looksam_gradient
from otmdr_jax.baselines.mc_dropout import example_keys, mc_dropout, rate_of
from otmdr_jax.baselines.preconditioned import posterior
from otmdr_jax.baselines.snapshot import Collected, collect, members
from otmdr_jax.baselines.swag import NUM_SAMPLES, RANK, Moments, average, moments_of

__all__ = [
    "NUM_SAMPLES",
    "RANK",
    "BsamState",
    "Collected",
    "Finalize",
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
