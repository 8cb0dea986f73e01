r"""Losses that are normalised by weights: what one is worth on a part of the batch.

.. math:: L_B = \frac{\sum_{i \in B} w_i \ell_i}{\sum_{i \in B} w_i}

A mean over parts by their numbers of examples is not :math:`L_B`: parts have other sums
of weights, and one whose weights are all zero has the loss 0 / 0. With :math:`\bar w_B`
the mean weight of an example of B,

.. math:: \sum_p \frac{|p|}{|B|} \, \frac{\bar w_p}{\bar w_B} L_p = L_B

so that :math:`(\bar w_p / \bar w_B) L_p` is a loss of parts that may be averaged like
any other, over micro-batches, sub-batches and devices. What belongs to some parts alone
is divided by their weight: the gradient of a climb, which is that of their own loss
:math:`L_p`, and in the end aux and the loss at the center.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, rows, tree
from otmdr_jax.core.batches import batch_size

PyTree = Any

# The weight that aux of a part without any has, so that it counts where no other does.
_NONE = 1e-20


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["aux", "weight"],
    meta_fields=["dtypes"],
)
@dataclasses.dataclass(frozen=True)
class Weighed:
    """Aux of parts of the batch, which averages like a mean over examples.

    Attributes:
      aux: The sum over parts of what they return, times their weights.
      weight: The sum of these.
      dtypes: Those that the loss and the leaves of aux had before, but for rows.
    """

    aux: PyTree
    weight: jax.Array
    dtypes: tuple[Any, ...]


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

    A part without weight has the loss 0 and the gradient 0, whatever the loss says. Aux
    is :class:`Weighed`, but for what each example has. Products with weights are in
    float32 or wider until they are averaged: in float16 they would overflow.
    """

    def of(params, part, *args, **kwargs):
        batch, weights = part
        share = jnp.mean(weights)
        (loss, aux), grads = gradient_of(params, batch, *args, **kwargs)

        def times_share(x):
            return jnp.where(share == 0, 0.0, _product(share, x))

        mean, of_examples = rows.split(aux)
        dtypes = tuple(jnp.result_type(x) for x in (loss, *jax.tree.leaves(mean)))
        weight = jnp.where(share == 0, _NONE, share)

        def weighed(x):
            if not tree.is_floating(x):
                return x
            x = jnp.where((share == 0) & ~jnp.isfinite(x), 0, x)
            return _product(weight, x)

        aux = tree.merge(jax.tree.map(weighed, mean), of_examples)
        grads = jax.tree.map(times_share, grads)
        return (times_share(loss), Weighed(aux, weight, dtypes)), grads

    return of


def divided(values: PyTree, weight: jax.Array) -> PyTree:
    """The loss or the gradient of some parts from one that is to be averaged."""
    return jax.tree.map(lambda x: (x / weight).astype(x.dtype), values)


def weight_of(aux: PyTree) -> jax.Array:
    """The weight of the parts that aux, which has one :class:`Weighed`, is of."""
    return _weighed_of(aux).weight


def _weighed_of(aux):
    leaves = jax.tree.leaves(aux, is_leaf=_is_weighed)
    (found,) = filter(_is_weighed, leaves)
    return found


def _is_weighed(x):
    return isinstance(x, Weighed)


def _product(weight, x):
    wide = tree.accumulation_dtype(x)
    return weight.astype(jnp.finfo(wide).dtype) * x.astype(wide)


def settled(
    loss: jax.Array, aux: PyTree, value: jax.Array
) -> tuple[jax.Array, PyTree, jax.Array]:
    """The loss and aux of some parts by the weight of these alone, in their dtypes.

    Args:
      loss: Their mean, times weights.
      aux: Theirs, in which one thing is :class:`Weighed`.
      value: The loss of the whole batch, which parts without weight have.

    Returns:
      The loss, aux and the value.
    """
    found = _weighed_of(aux)
    weight, (of_loss, *dtypes) = found.weight, found.dtypes

    def settle(x, dtype):
        return (x / weight).astype(dtype) if tree.is_floating(x) else x

    def of(x):
        if not _is_weighed(x):
            return x
        mean, of_examples = rows.split(x.aux)
        leaves, treedef = jax.tree.flatten(mean)
        new = [settle(*both) for both in zip(leaves, dtypes, strict=True)]
        return tree.merge(jax.tree.unflatten(treedef, new), of_examples)

    nothing = weight <= 2 * _NONE
    return (
        jnp.where(nothing, value.astype(of_loss), settle(loss, of_loss)),
        jax.tree.map(of, aux, is_leaf=_is_weighed),
        value.astype(of_loss),
    )
