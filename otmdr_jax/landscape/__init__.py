"""The loss around a solution: sharpness, Hessians and slices, over whole sets.

Everything is measured over a whole set. The loss is `loss_sum(params, batch) -> (sum of
losses, number of examples)`, the set an iterable of batches. Sums over batches are
divided by the number of examples, so batches may differ in size. Networks with
BatchNorm are measured as they predict: evaluate them with `train=False` in `loss_sum`,
since with batch statistics the loss of a set would depend on how it is cut.
"""

from otmdr_jax.landscape.hessian import (
    Spectrum,
    Trace,
    hessian_eigenvalues,
    hessian_product,
    hessian_trace,
)
from otmdr_jax.landscape.sharpness import (
    AverageSharpness,
    Sharpness,
    average_sharpness,
    sam_gap,
    worst_in_ball,
)
from otmdr_jax.landscape.slices import (
    Subspace,
    loss_grid,
    points_at_once,
    random_direction,
    through,
)
from otmdr_jax.landscape.trajectory import trajectory_plane

__all__ = [
    "AverageSharpness",
    "Sharpness",
    "Spectrum",
    "Subspace",
    "Trace",
    "average_sharpness",
    "hessian_eigenvalues",
    "hessian_product",
    "hessian_trace",
    "loss_grid",
    "points_at_once",
    "random_direction",
    "sam_gap",
    "through",
    "trajectory_plane",
    "worst_in_ball",
]
