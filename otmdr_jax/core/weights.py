r"""Losses that are normalised by weights: what one is worth on a part of the batch.

.. math:: L_B = \frac{\sum_{i \in B} w_i \ell_i}{\sum_{i \in B} w_i}

A mean over parts by their numbers of examples is not :math:`L_B`: parts have other sums
of weights, and one whose weights are all zero has the loss 0 / 0. With :math:`\bar w_B`
the mean weight of an example of B,

.. math:: \sum_p \frac{|p|}{|B|} \, \frac{\bar w_p}{\bar w_B} L_p = L_B

so that :math:`(\bar w_p / \bar w_B) L_p` is a loss of parts that may be averaged like
any other, over micro-batches, sub-batches and devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, tree
from otmdr_jax.core.batches import batch_size

PyTree = Any


def attach(
    weights: Callable[[PyTree], Any], batch: PyTree, axes: collectives.Axes
) -> tuple[PyTree, jax.Array]:
    """The batch, and for each example its weight over the mean one, to be cut alike.

    Args:
      weights: A function of the batch to (B,) weights, or to (B, ...), as of tokens.
      batch: This device's part of the batch.
      axes: The device axes that it is divided over.
    """
    found, size = jnp.asarray(weights(batch)), batch_size(batch)
    if found.shape[:1] != (size,):
        raise ValueError(
            f"weights must give each of the {size} examples a weight, or its tokens, "
            f"(examples, ...), got shape {found.shape}."
        )
    wide = found.astype(tree.accumulation_dtype(found))
    each = jnp.sum(wide, axis=tuple(range(1, wide.ndim)))
    mean = collectives.pmean(jnp.mean(each), axes)
    return batch, jnp.where(mean == 0, 0.0, each / jnp.where(mean == 0, 1.0, mean))


def scaled(gradient_of: Callable[..., Any]) -> Callable[..., Any]:
    """((loss, aux), gradient) of a part of what :func:`attach` returns.

    A part without weight has the loss 0 and the gradient 0, whatever the loss says.
    """

    def of(params, part, *args, **kwargs):
        batch, weights = part
        share = jnp.mean(weights)
        (loss, aux), grads = gradient_of(params, batch, *args, **kwargs)

        def times_share(x):
            return jnp.where(share == 0, 0.0, share * x).astype(x.dtype)

        return (times_share(loss), aux), jax.tree.map(times_share, grads)

    return of
