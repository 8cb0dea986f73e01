"""A loss of objects, told to the core as a loss of arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from otmdr_jax.core import tree
from otmdr_jax.core.batches import NO_BATCH
from otmdr_jax.core.checks import check_rho
from otmdr_jax.core.gradient import build, checked, suited
from otmdr_jax.core.options import Options, RobustOptions

PyTree = Any

# Of objects, a batch and further arguments, to (loss, aux).
Loss = Callable[..., tuple[jax.Array, PyTree]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """What is no array, carried out of a pass as a pytree without leaves."""

    value: Any


def gradient_of(
    loss_fn: Callable[..., Any],
    rho: Any,
    options: RobustOptions,
    is_object: Callable[[Any], bool],
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    """The robust gradient of a loss that a function of the framework calls.

    Args:
      loss_fn: The user's loss, of objects.
      rho: Its radii, unchecked.
      options: Its options, unchecked.
      is_object: What among the loss' further arguments is a model, or the state of one:
        it belongs to no example, whatever the shapes of its arrays.

    Returns:
      `of(run, params, batch, others, key, rho)` to (value, or (value, aux); what was
      kept; gradient). In each pass `run(loss, params, batch, others)` makes objects of
      arrays and calls `loss`, which is `loss_fn` checked; it returns (value, aux, keep)
      with anything that is wanted of the pass at the center. `others` are the loss'
      further arguments.
    """
    own = Options(**options, watched=False)
    radii = suited(check_rho(rho), own)
    loss = checked(loss_fn, own.has_aux)
    always: Any = {"has_aux": True}
    with_aux = dataclasses.replace(own, **always)

    def of(run, params, batch, others, key, rho):
        # Arrays go through the core, which refuses labels beside a batch that it cuts.
        arrays, objects = tree.partition(others, _is_array, is_object)

        def of_arrays(params, batch=NO_BATCH, *, arrays):
            value, aux, keep = run(loss, params, batch, tree.merge(arrays, objects))
            found, rest = tree.partition((aux, keep), _is_array)
            leaves, treedef = jax.tree.flatten(rest)
            return value, (found, Static((tuple(leaves), treedef)))

        compute = build(of_arrays, radii, with_aux)
        found = compute(params, batch, arrays=arrays, key=key, rho=rho)
        of_center, rest = found.aux
        leaves, treedef = rest.value
        aux, keep = tree.merge(of_center, jax.tree.unflatten(treedef, leaves))
        return ((found.value, aux) if own.has_aux else found.value), keep, found.grads

    return of


def _is_array(x):
    """Whether the core takes a leaf: an array or a number, but no function or text."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float, complex))
