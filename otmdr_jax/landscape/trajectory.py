r"""The plane along which a run's weights vary most: their principal components.

Let :math:`D` be the matrix with a row :math:`\theta_i - \theta_n` for each checkpoint,
and :math:`C` the matrix that subtracts the mean of the rows. The components are the
right singular vectors of :math:`C D`. They come from the small matrix :math:`C D D^\top
C`, so no matrix of weights by weights is ever built.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax.core import tree
from otmdr_jax.landscape.slices import Subspace, check_like

PyTree = Any

# The smallest spread relative to the first component's: less is rounding in float32.
_FLAT = 1e-5


def trajectory_plane(solutions: Sequence[PyTree], dimensions: int = 2) -> Subspace:
    r"""The line or plane along which the checkpoints of a run spread most.

    .. math:: \theta_i \approx \theta_n + a_i\, x + b_i\, y

    where x and y are the first principal components, with norm 1, so that coordinates
    are distances in weight space. The plane goes through the last solution; the others
    are projected onto it.

    Args:
      solutions: n checkpoints in the order of training, pytrees of one structure, on
        the host or the device; leaves that are not floating are left out. The function
        takes the memory of n more copies of the largest leaf, in float64.
      dimensions: The number of components, 1 for a line, 2 for a plane.

    Returns:
      A :class:`Subspace`: `origin` is the last solution, `points` are the projections
      of all, `explained` are the components' shares of the variance. The point farthest
      out on an axis has a positive coordinate.

    Raises:
      ValueError: There are too few solutions, or they differ in structure or shape, or
        they spread in too few directions.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> run = [jnp.array(w) for w in ([4.0, 0.0], [2.0, 1.0], [0.0, 0.0])]
      >>> plane = landscape.trajectory_plane(run)
      >>> plane.points[1].round(3).tolist(), plane.explained.round(3).tolist()
      ([2.0, 1.0], [0.923, 0.077])

    Reference: Li et al., 2018, section 7.
    """
    if dimensions not in (1, 2):
        raise ValueError(f"dimensions must be 1 or 2, got {dimensions!r}.")
    if len(solutions) <= dimensions:
        raise ValueError(
            f"{dimensions} principal components need at least {dimensions + 1} "
            f"solutions, got {len(solutions)}."
        )
    last = solutions[-1]
    for other in solutions[:-1]:
        check_like(last, other)
    columns = [jax.tree.leaves(solution) for solution in solutions]
    count = len(columns)

    def differences(i):
        rows = [np.asarray(leaves[i], np.float64).ravel() for leaves in columns]
        return np.stack(rows) - rows[-1]  # (n, size of leaf i)

    floating = [tree.is_floating(x) for x in columns[-1]]
    gram = np.zeros((count, count))
    for i, moves in enumerate(floating):
        if moves:
            rows = differences(i)
            gram += rows @ rows.T
    if not np.isfinite(gram).all():
        raise ValueError("the solutions must be finite: one of them holds NaN or inf.")
    center = np.eye(count) - 1.0 / count
    values, vectors = np.linalg.eigh(center @ gram @ center)
    values, vectors = values[::-1], vectors[:, ::-1]
    if not values[0] > 0 or values[dimensions - 1] <= _FLAT**2 * values[0]:
        raise ValueError(
            f"the {count} solutions spread in fewer than {dimensions} directions"
            + (": they coincide." if not values[0] > 0 else ": use dimensions=1.")
        )
    # Component k is weights[:, k] times the rows of D.
    weights = center @ vectors[:, :dimensions] / np.sqrt(values[:dimensions])
    points = gram @ weights
    farthest = points[np.abs(points).argmax(axis=0), np.arange(dimensions)]
    signs = np.where(farthest < 0, -1.0, 1.0)
    weights, points = weights * signs, points * signs
    directions: list[list[Any]] = [[] for _ in range(dimensions)]
    for i, moves in enumerate(floating):
        leaf = jnp.asarray(columns[-1][i])
        if not moves:
            for found in directions:
                found.append(jnp.zeros_like(leaf))
            continue
        components = weights.T @ differences(i)
        dtype = tree.accumulation_dtype(leaf)
        for found, component in zip(directions, components, strict=True):
            found.append(jnp.asarray(component.reshape(leaf.shape), dtype))
    treedef = jax.tree.structure(last)
    return Subspace(
        last,
        tuple(jax.tree.unflatten(treedef, found) for found in directions),
        points,
        values[:dimensions] / np.trace(center @ gram @ center),
    )
