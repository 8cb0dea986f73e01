"""The weights of a sparse network and the operations of a prediction."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def sparsity(params: PyTree, masks: PyTree, positions: Mapping[str, int]) -> dict:
    """Densities, weights and operations of one network.

    Args:
      params: Nested dictionaries of arrays; arrays of two and more axes are kernels.
      masks: Masks from :func:`otmdr_jax.baselines.dst.draw_masks`.
      positions: The number of times that each kernel is applied to one image, from
        :func:`otmdr_jax.models.output_positions`.

    Returns:
      A dictionary: `density` and `weights` of all kernels together; `flops` and
      `dense_flops` of a prediction for one image, two for each multiply-add of a weight
      (biases and norms are left out, as is usual); `layers`, the density of each.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 2))}}
      >>> masks = {"conv": {"kernel": jnp.arange(18).reshape(3, 3, 1, 2) < 6}}
      >>> found = sparsity(params, masks, {"conv/kernel": 64})
      >>> found["weights"], found["flops"], found["dense_flops"]
      (6, 768, 2304)
    """
    kept: dict[str, tuple[int, int]] = {}
    for (path, leaf), mask in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(masks), strict=True
    ):
        if leaf.ndim > 1:
            name = "/".join(str(part.key) for part in path)
            there = int(jnp.sum(mask)) if mask.ndim else leaf.size
            kept[name] = (there, leaf.size)
    weights, size = (sum(column) for column in zip(*kept.values(), strict=True))
    return {
        "density": weights / size,
        "weights": weights,
        "flops": sum(2 * positions[name] * n for name, (n, _) in kept.items()),
        "dense_flops": sum(2 * positions[name] * n for name, (_, n) in kept.items()),
        "layers": {name: n / of for name, (n, of) in kept.items()},
    }
