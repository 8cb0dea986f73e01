"""One particle: its climb from the center in S steps, each on a part of the batch.

Reference: Nguyen et al., 2023, section 4.2.1 and Algorithm 1.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core.ascent import ascend
from otmdr_jax.core.options import Options

PyTree = Any
Gradient = Callable[[PyTree, PyTree, int], tuple[tuple[jax.Array, PyTree], PyTree]]


class Climb(NamedTuple):
    """Where a particle arrives, and what it saw at the center.

    Attributes:
      particle: The weights after the last ascent step.
      center_loss: The loss at the center on the first part of the batch.
      aux: The auxiliary output of that pass.
      norms: (S,) gradient norms of the ascent steps.
      start: The gradient of the first of them.
    """

    particle: PyTree
    center_loss: jax.Array
    aux: PyTree
    norms: jax.Array
    start: PyTree


def climb(
    gradient: Gradient,
    params: PyTree,
    parts: Sequence[PyTree],
    rho: Sequence[jax.typing.ArrayLike],
    options: Options,
    *,
    mask: PyTree | None = None,
    norm_mask: PyTree | None = None,
    scale: PyTree | None = None,
    key: jax.Array | None = None,
    first: tuple[tuple[jax.Array, PyTree], PyTree] | None = None,
) -> Climb:
    """Takes one ascent step on each part (Eq. 9, first two lines for S = 2).

    Args:
      gradient: (params, part, steps taken) -> ((loss, aux), grads).
      params: The center.
      parts: S parts of the batch.
      rho: S radii.
      options: Norm, adaptivity, merging and noise.
      mask: Which leaves may move, already resolved.
      norm_mask: Which leaves count in a global norm; None: those that may move.
      scale: T of every ascent step, see :func:`otmdr_jax.core.ascent.ascend`.
      key: A PRNG key, needed if there is noise.
      first: What `gradient(params, parts[0], 0)` gives, where it is already known.
    """
    w, total, norms = params, None, []
    start = first
    for s, (part, radius) in enumerate(zip(parts, rho, strict=True)):
        (loss, aux), grads = start if start is not None else gradient(w, part, s)
        if s == 0:
            center_loss, center_aux, center_grads = loss, aux, grads
        start = None
        direction = None
        if options.merge is not None:
            # The released code never clears the gradients: g1, then g1 + g2, ...
            # over the norm of the last one alone.
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            parts_seen = s + 1 if options.merge == "mean" else 1
            direction = jax.tree.map(lambda g, n=parts_seen: g / n, total)
        w, length = ascend(
            w,
            grads,
            radius,
            direction=direction,
            norm=options.norm,
            adaptive=options.adaptive,
            fisher=options.fisher if options.curved else None,
            scale=scale,
            mask=mask,
            norm_mask=norm_mask,
            noise_std=options.noise_std if options.noisy else None,
            key=None if key is None else jax.random.fold_in(key, s),
        )
        norms.append(length)
    return Climb(w, center_loss, center_aux, jnp.stack(norms), center_grads)
