"""What OT-MDR is compared with, each a method like any other.

:func:`collect` and :func:`average` ride on any method of one weight vector: snapshot
ensembles and FGE keep weights, SWA and SWAG average them. See docs/collected.md.
:func:`dynamic` is sparse training, of which DST and EDST are made: see docs/sparse.md.
"""

from otmdr_jax.baselines.collector import Collected, collect, members
from otmdr_jax.baselines.sparse import Sparse, dynamic, masked_from_the_start
from otmdr_jax.baselines.swag import NUM_SAMPLES, RANK, Moments, average, moments_of

__all__ = [
    "NUM_SAMPLES",
    "RANK",
    "Collected",
    "Moments",
    "Sparse",
    "average",
    "collect",
    "dynamic",
    "masked_from_the_start",
    "members",
    "moments_of",
]
