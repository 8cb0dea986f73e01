"""The dual form with members: one budget, and one multiplier, for all of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import optax

from otmdr_jax.core import dual as single
from otmdr_jax.core import tree
from otmdr_jax.core.batches import NO_BATCH
from otmdr_jax.core.dual import RHO, DualGradient, DualOptions
from otmdr_jax.core.signatures import with_options
from otmdr_jax.core.transform import from_gradient, schedule_of
from otmdr_jax.ensemble.gradient import joined, over_members
from otmdr_jax.ensemble.stacking import (
    count_members,
    functions_of,
    is_placeholder,
    is_tuple,
)

PyTree = Any


@with_options
def dual(
    loss_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    rho: Any = RHO,
    *,
    aux_init: PyTree = None,
    member_map: str = "auto",
    own_batches: bool = False,
    **options: Unpack[DualOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""The dual form as an Optax transformation of all members together.

    .. math::
        \min_{\theta_{1:M}} \min_{\lambda > 0} \; \lambda \rho^p + \frac1M \sum_m
            \max_w \left[ L(w) - \lambda \|w - \theta_m\|_2^p \right]

    Members with long gradients go far and others do not; their mean d is the budget.
    `ensemble.per_member(otmdr_jax.dual(...))` gives each member one of its own.

    Args:
      loss_fn: The loss of one member, as for :func:`dual_gradient`.
      rho: The radius, or a schedule, as for :func:`otmdr_jax.dual`.
      aux_init: See :func:`otmdr_jax.otmdr`; of all members.
      member_map: The way members are mapped.
      own_batches: True if each member has its own batch.
      **options: Those of :class:`otmdr_jax.core.dual.DualOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs` of stacked members, or of a tuple of
      them. `loss_args` are per member. Where any member is not finite, lambda and aux
      stay as they were.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import ensemble
      >>> def loss_fn(w, batch):
      ...     return 0.5 * jnp.sum(w**2) + 0.0 * jnp.mean(batch)
      >>> tx = ensemble.dual(loss_fn, rho=0.5)
      >>> members, batch = jnp.array([[3.0, 4.0], [0.6, 0.8]]), jnp.ones(4)
      >>> update = jax.jit(lambda s: tx.update(members, s, members, batch=batch)[1])
      >>> state = tx.init(members)
      >>> for _ in range(100):
      ...     state = update(state)
      >>> [round(float(d), 2) for d in state.diagnostics.distances[:, 0]]  # as 5 to 1
      [0.69, 0.14]
    """
    radii_at, _ = schedule_of(rho)
    made = dual_gradient(
        loss_fn,
        radii_at(jnp.zeros((), jnp.int32)),
        member_map=member_map,
        own_batches=own_batches,
        **options,
    )
    return from_gradient(
        made.apply,
        rho=rho,
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
        start=lambda members: made.init(),
        members=lambda x: 1 if is_placeholder(x) else count_members(x),
    )


@with_options
def dual_gradient(
    loss_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    rho: Any = RHO,
    *,
    member_map: str = "auto",
    member_axis_name: Any = None,
    own_batches: bool = False,
    **options: Unpack[DualOptions],
) -> DualGradient:
    """The functional form of :func:`dual`: state in, state out.

    Args:
      loss_fn: The loss of one member, as for :func:`otmdr_jax.ensemble.value_and_grad`,
        which explains the arguments about members.
      rho: The radius.
      member_map: The way members are mapped.
      member_axis_name: Name of the device axis that members are spread over; the state
        is the same on all devices.
      own_batches: True if each member has its own batch.
      **options: Those of :class:`otmdr_jax.core.dual.DualOptions`.

    Returns:
      A :class:`otmdr_jax.DualGradient` whose `apply(state, members, batch, ...)` gives
      what :func:`otmdr_jax.ensemble.robust_gradient` does, and a state: that of one
      model, whose numbers are means over the members whose step was finite.
    """
    made = [single.dual_gradient(f, rho, **options) for f in functions_of(loss_fn)]
    over_members([], member_map)  # here, that a wrong word is refused at once

    def apply(state, members, batch=NO_BATCH, *args, rho=None, key=None, **kwargs):
        del key  # nothing is random
        compute = over_members(
            [functools.partial(_step, one, state) for one in made],
            member_map,
            member_axis_name,
            own_batches,
        )
        found = compute(members, batch, *args, rho=rho, **kwargs)
        if is_tuple(members):
            results, states, finite = zip(*found, strict=True)
            found = joined(results), tree.stack(states), jnp.stack(finite)
        result, states, finite = found
        if not options.get("has_aux", False):
            result = result._replace(aux=None)
        return result, single.share(states, finite, member_axis_name)

    return DualGradient(made[0].init, apply)


def _step(one, state, params, *args, **kwargs):
    """A member's step, and whether it was finite."""
    result, state = one.apply(state, params, *args, **kwargs)
    return result, state, tree.all_finite(result.diagnostics)
