"""All members as one model: the mean of their probabilities, and its loss."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import loops, tree
from otmdr_jax.core.checks import check_word
from otmdr_jax.core.options import MEMBER_MAPS
from otmdr_jax.ensemble.stacking import (
    check_all,
    each_or_one,
    functions_of,
    is_tuple,
    rows_of,
)

PyTree = Any


def log_mean_probs(log_probs: jax.Array, axis: int = 0) -> jax.Array:
    """The ensemble's prediction: log of the mean of its members' probabilities.

    Args:
      log_probs: (M, ..., C) log-probabilities of M members.
      axis: The members' axis.

    Returns:
      (..., C) log-probabilities of the same dtype, exact even if the probabilities
      underflow.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import ensemble
      >>> p = jnp.array([[0.9, 0.1], [0.5, 0.5]])
      >>> [round(float(p), 4) for p in jnp.exp(ensemble.log_mean_probs(jnp.log(p)))]
      [0.7, 0.3]
    """
    log_probs = jnp.asarray(log_probs)
    # In bfloat16 the sum of a hundred members would be rounded by a hundredth.
    wide = log_probs.astype(tree.accumulation_dtype(log_probs))
    mean = jax.nn.logsumexp(wide, axis=axis) - math.log(log_probs.shape[axis])
    return mean.astype(log_probs.dtype) if tree.is_floating(log_probs) else mean


def joint_loss(
    logits_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    loss: Callable[[jax.Array, PyTree], jax.Array],
    *,
    has_aux: bool = False,
    member_map: str = "auto",
) -> Callable[..., Any]:
    r"""The released code's joint variant: one loss on the members' mean probability.

    .. math:: L(\theta_{1:M}) = \ell\Big(\log \frac1M \sum_m p_{\theta_m}(x), y\Big)

    It is the loss of one model whose parameters are those of all members. Pass it to
    :func:`otmdr_jax.value_and_grad` itself: the gradient norm is then taken over all
    members together, as in the released code. The paper trains members independently
    (:func:`value_and_grad` of this module).

    Args:
      logits_fn: The network of one member, (params, batch, *args) -> (B, C) logits, or
        (logits, aux). A tuple of members takes one function, or a tuple of M.
      loss: The loss of a prediction, ((B, C) log-probabilities, batch) -> scalar, a
        mean over the batch.
      has_aux: True if `logits_fn` returns (logits, aux).
      member_map: The way members are mapped, as for
        :func:`otmdr_jax.ensemble.value_and_grad`.

    Returns:
      `loss_fn(members, batch, *args)` -> loss, or (loss, aux) with aux stacked or a
      tuple. Each of the `args` is stacked or a tuple too, as the members are.

    Example:
      >>> import jax, jax.numpy as jnp, optax, otmdr_jax
      >>> from otmdr_jax import ensemble
      >>> def nll(log_probs, batch):
      ...     return -jnp.mean(jnp.take_along_axis(log_probs, batch["y"][:, None], 1))
      >>> loss_fn = ensemble.joint_loss(lambda w, batch: batch["x"] @ w, nll)
      >>> members = jnp.zeros((3, 2, 4))  # of 2 features and 4 classes
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([0, 3])}
      >>> round(float(loss_fn(members, batch)), 4)  # log 4
      1.3863
      >>> grad_fn = otmdr_jax.value_and_grad(
      ...     loss_fn, **otmdr_jax.preset("released-cifar10")
      ... )
      >>> grad_fn(members, batch)[1].shape
      (3, 2, 4)

    Reference: the code released with Nguyen et al., 2023.
    """
    of_members = member_log_probs(logits_fn, has_aux=has_aux, member_map=member_map)

    def joint(members, batch, *args):
        log_probs, aux = of_members(members, batch, *args)
        value = loss(log_mean_probs(log_probs), batch)
        return (value, aux) if has_aux else value

    return joint


def member_log_probs(
    logits_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    *,
    has_aux: bool = False,
    member_map: str = "auto",
) -> Callable[..., tuple[jax.Array, PyTree]]:
    """The log-probabilities of all members, whose mean :func:`joint_loss` takes.

    Args:
      logits_fn: The network of one member, as for :func:`joint_loss`.
      has_aux: True if `logits_fn` returns (logits, aux).
      member_map: The way members are mapped.

    Returns:
      A function (members, batch, *args) -> ((M, B, C) log-probabilities, aux); aux is
      stacked or a tuple, or None if there is none.
    """
    check_word("member_map", member_map, MEMBER_MAPS)
    functions = functions_of(logits_fn)

    def of_members(members, batch, *args):
        check_all(members, args, len(functions))

        def of_member(function):
            def member(wait, params, own_args):
                del wait  # their backward passes run together: nothing is saved
                out = function(params, batch, *own_args)
                logits, aux = out if has_aux else (out, None)
                wide = logits.astype(tree.accumulation_dtype(logits))
                return jax.nn.log_softmax(wide), aux

            return member

        found: Any = loops.each(
            each_or_one([of_member(f) for f in functions], members),
            (members, rows_of(args, members)),
            member_map,
        )
        if is_tuple(members):
            log_probs, aux = zip(*found, strict=True)
            return jnp.stack(log_probs), aux
        return found

    return of_members
