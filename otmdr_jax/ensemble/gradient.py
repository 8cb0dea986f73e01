"""The robust gradient of every member (Eqs. 11-12)."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax.numpy as jnp

from otmdr_jax.core import gradient as single
from otmdr_jax.core import loops, tree
from otmdr_jax.core.batches import NO_BATCH
from otmdr_jax.core.checks import check_word
from otmdr_jax.core.gradient import PAPER_RHO, RobustGradient
from otmdr_jax.core.options import MEMBER_MAPS, RobustOptions
from otmdr_jax.core.signatures import with_options
from otmdr_jax.ensemble.stacking import (
    check_all,
    each_or_one,
    functions_of,
    is_tuple,
    member_keys,
    rows_of,
)

PyTree = Any


@with_options
def value_and_grad(
    loss_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    rho: Any = PAPER_RHO,
    *,
    member_map: str = "auto",
    member_axis_name: Any = None,
    own_batches: bool = False,
    **options: Unpack[RobustOptions],
) -> Callable[..., tuple[Any, PyTree]]:
    r"""The robust gradient of every member of an ensemble.

    .. math::
        g_m = \frac1K \sum_{k=1}^K \nabla L_B(w_{mk}^S), \qquad m = 1, \dots, M

    with the particles of :func:`otmdr_jax.value_and_grad` around each member. Member m
    gets what a run of its own with the m-th key would get: to the bit if members are
    scanned, up to rounding if they are mapped in another way.

    Args:
      loss_fn: The loss of one member, `loss_fn(params, batch, *args, **kwargs)`, as for
        :func:`otmdr_jax.value_and_grad`. A tuple of members takes one function for all,
        or a tuple of M functions.
      rho: Radii, the same for all members.
      member_map: The way members of one architecture are mapped: "vmap", "unroll",
        "scan", or "auto". It changes speed and memory only; see `docs/performance.md`.
        Different architectures are always unrolled.
      member_axis_name: Name of the device axis inside `jax.shard_map` that stacked
        members are spread over, each device holding its part. It tells which of the
        keys belong to this device; nothing is exchanged between members.
      own_batches: True if each member has its own batch: a leading axis of M on every
        leaf of the batch, or a tuple of M batches for a tuple of members.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      `grad_fn(members, batch, *args, key=None, rho=None, **kwargs)`, which returns
      `(values, grads)` or, with `has_aux`, `((values, aux), grads)`. `values` is (M,);
      `grads` and `aux` are stacked or a tuple, as the members are. So are `args`, which
      each member has its own of (BatchNorm statistics, for example); `kwargs` are
      shared. `key` is one key, which is split into M, or M keys.

    Raises:
      ValueError, TypeError: The errors of :func:`otmdr_jax.value_and_grad`; members
        whose leaves do not share their leading axis; functions, arguments, batches or
        keys of another number than the members.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import ensemble
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> grad_fn = jax.jit(ensemble.value_and_grad(loss_fn, rho=(0.01, 0.02)))
      >>> members = jnp.zeros((5, 2))
      >>> values, grads = grad_fn(members, jnp.eye(2), key=jax.random.key(0))
      >>> values.shape, grads.shape
      ((5,), (5, 2))

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023, section 4.2.2.
    """
    compute = robust_gradient(
        loss_fn,
        rho,
        member_map=member_map,
        member_axis_name=member_axis_name,
        own_batches=own_batches,
        **options,
    )
    has_aux = options.get("has_aux", False)

    def grad_fn(members, batch=NO_BATCH, *args, key=None, rho=None, **kwargs):
        found = compute(members, batch, *args, key=key, rho=rho, **kwargs)
        return ((found.value, found.aux) if has_aux else found.value), found.grads

    return grad_fn


@with_options
def robust_gradient(
    loss_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    rho: Any = PAPER_RHO,
    *,
    member_map: str = "auto",
    member_axis_name: Any = None,
    own_batches: bool = False,
    **options: Unpack[RobustOptions],
) -> Callable[..., RobustGradient]:
    """Like :func:`value_and_grad`, but also returns the diagnostics.

    Args:
      loss_fn: The loss of one member; this and all other arguments are explained at
        :func:`value_and_grad`.
      rho: Radii, the same for all members.
      member_map: The way members are mapped.
      member_axis_name: Name of the device axis that members are spread over.
      own_batches: True if each member has its own batch.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      A function like that of :func:`value_and_grad` which returns a
      :class:`otmdr_jax.RobustGradient`: value and diagnostics with a leading axis of M,
      aux and gradient as the members are.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import ensemble
      >>> def loss_fn(w, batch):
      ...     return 0.5 * jnp.sum(w**2) + 0.0 * jnp.mean(batch)
      >>> gradient = ensemble.robust_gradient(loss_fn, rho=0.5, split="shared")
      >>> found = gradient(jnp.array([[3.0, 4.0], [0.6, 0.8]]), jnp.zeros(2))
      >>> [round(float(gap), 3) for gap in found.diagnostics.gap]
      [2.625, 0.625]
    """
    functions = functions_of(loss_fn)
    compute = over_members(
        [single.robust_gradient(f, rho, **options) for f in functions],
        member_map,
        member_axis_name,
        own_batches,
    )

    def of_call(members, batch=NO_BATCH, *args, key=None, rho=None, **kwargs):
        found = compute(members, batch, *args, key=key, rho=rho, **kwargs)
        return joined(found) if is_tuple(members) else found

    return of_call


def over_members(
    computes: Sequence[Callable[..., PyTree]],
    member_map: str = "auto",
    member_axis_name: Any = None,
    own_batches: bool = False,
) -> Callable[..., PyTree]:
    """What is computed of one model, of every member.

    Args:
      computes: (params, batch, *args, key, **kwargs) -> a pytree: one function for all
        members, or one for each.
      member_map: The way members are mapped.
      member_axis_name: Name of the device axis that members are spread over.
      own_batches: True if each member has its own batch.

    Returns:
      A function of members to what their functions return, with a leading axis of M;
      for a tuple of members a tuple.
    """
    check_word("member_map", member_map, MEMBER_MAPS)

    def compute(members, batch=NO_BATCH, *args, key=None, **kwargs):
        per_member = (*args, batch) if own_batches else args
        count = check_all(members, per_member, len(computes))

        def of_member(run):
            def member(wait, params, own_key, own_args, own_batch):
                part = wait(own_batch if own_batches else batch)
                return run(params, part, *own_args, key=own_key, **kwargs)

            return member

        return loops.each(
            each_or_one([of_member(run) for run in computes], members),
            (
                members,
                member_keys(key, count, member_axis_name),
                rows_of(args, members),
                batch if own_batches else None,
            ),
            member_map,
        )

    return compute


def joined(found: Sequence[RobustGradient]) -> RobustGradient:
    """Those of a tuple of members as one: numbers stacked, the rest a tuple."""
    value, aux, grads, diagnostics = zip(*found, strict=True)
    return RobustGradient(jnp.stack(value), aux, grads, tree.stack(diagnostics))
