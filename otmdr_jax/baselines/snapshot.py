"""Methods that collect an ensemble during one training run.

:func:`collect` turns any method of one weight vector into one that keeps a copy of its
weights (and BatchNorm statistics) after given steps, and predicts with the copies.
Snapshot ensembles, FGE and EDST differ only in their learning rates and steps. The M
copies are part of the training state, so checkpoints hold them, and are allocated from
the start. Every step reads and writes one of them, due or not, so that no branch is
needed; that costs next to nothing beside the forward and backward passes.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Collected(NamedTuple):
    """The members collected so far.

    Attributes:
      params: The members' weights, with a leading axis of M; zeros for members that are
        not collected yet.
      model_state: Their BatchNorm statistics, stacked in the same way.
      number: The number of members so far.
    """

    params: PyTree
    model_state: PyTree
    number: jax.Array


def collect(method: Any, ends: Sequence[int]) -> Any:
    """Makes a method that keeps its weights after given steps and predicts with them.

    Args:
      method: A :class:`otmdr_jax.experiments.methods.Method` of one weight vector.
      ends: The numbers of steps after which to collect, ascending. A step that was
        skipped because it was not finite counts too; it leaves the weights as they
        were.

    Returns:
      A method. Its state's `method_state` is a :class:`Collected`. `predict` returns
      (M, B, C) log-probabilities, or outputs where there are no classes: first those of
      the members collected so far; the remaining rows hold their mean probability, or
      output, so that the mean over all M rows is the ensemble's prediction at any time.
      Before the first member is collected, all rows are predictions of the current
      weights.

    Raises:
      ValueError: `ends` is empty, or is not ascending from at least 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from otmdr_jax import methods, models
      >>> from otmdr_jax.baselines import collect
      >>> one = methods.create("sgd", models.create("cnn_small", 10), optax.sgd(0.1))
      >>> method = collect(one, ends=(1, 2))
      >>> batch = jnp.zeros((4, 8, 8, 1)), jnp.arange(4)
      >>> state = method.init(jax.random.key(0), batch[0])
      >>> state, _ = jax.jit(method.step)(state, batch)
      >>> log_probs = jax.jit(method.predict)(state, batch[0])
      >>> int(state.method_state.number), log_probs.shape
      (1, (2, 4, 10))
    """
    check_ends(ends)

    def init(key, example_images):
        state = method.init(key, example_images)
        kept = Collected(
            _rows(state.params, len(ends)),
            _rows(state.model_state, len(ends)),
            jnp.zeros((), jnp.int32),
        )
        return state._replace(method_state=kept)

    def step(state, batch):
        kept = state.method_state
        state, metrics = method.step(state._replace(method_state=None), batch)
        due = is_due(state.step, ends)
        slot = jnp.minimum(kept.number, len(ends) - 1)
        kept = Collected(
            put(kept.params, state.params, slot, due),
            put(kept.model_state, state.model_state, slot, due),
            kept.number + due,
        )
        return state._replace(method_state=kept), metrics

    def predict(state, images):
        kept = state.method_state
        state = state._replace(method_state=None)

        def of(params, model_state):
            member = state._replace(params=params, model_state=model_state)
            return method.predict(member, images)[0]

        def row(slot_and_member):
            slot, params, model_state = slot_and_member
            # A branch: what is not collected is not computed.
            return jax.lax.cond(
                slot < kept.number,
                lambda: of(params, model_state),
                lambda: jnp.zeros(shape.shape, shape.dtype),
            )

        shape = jax.eval_shape(of, state.params, state.model_state)
        slots = jnp.arange(len(ends))
        rows = jax.lax.map(row, (slots, kept.params, kept.model_state))  # (M, B, ...)
        there = (slots < kept.number).reshape(-1, *[1] * (rows.ndim - 1))

        def mean_of_rows():
            count = kept.number.astype(rows.dtype)
            if not method.classes:
                return jnp.sum(jnp.where(there, rows, 0), axis=0) / count
            total = jax.nn.logsumexp(jnp.where(there, rows, -jnp.inf), axis=0)
            return total - jnp.log(count)  # log(1/count sum p)

        mean = jax.lax.cond(
            kept.number > 0, mean_of_rows, lambda: of(state.params, state.model_state)
        )
        return jnp.where(there, rows, mean)

    return method._replace(init=init, step=step, predict=predict)


def members(state: Any) -> list[Any]:
    """The collected members as training states, each with its own weights.

    Args:
      state: The state of a run of one model, outside of `jax.jit`, since the number of
        members must be known.

    Returns:
      One state for each member; an empty list if nothing has been collected yet.
    """
    kept = state.method_state
    return [
        state._replace(
            params=jax.tree.map(lambda x, i=i: x[i], kept.params),
            model_state=jax.tree.map(lambda x, i=i: x[i], kept.model_state),
            method_state=None,
        )
        for i in range(int(kept.number))
    ]


def check_ends(ends: Sequence[int]) -> None:
    """Raises ValueError unless the steps to collect at ascend from at least 1."""
    rising = all(a < b for a, b in itertools.pairwise(ends))
    if not ends or ends[0] < 1 or not rising:
        raise ValueError(
            "the steps to collect at must be at least one, ascending and 1 or more, "
            f"got {tuple(ends)}."
        )


def is_due(step: jax.Array, ends: Sequence[int]) -> jax.Array:
    """Whether members are collected after so many steps."""
    return jnp.any(step == jnp.asarray(ends, step.dtype))


def put(stacks: PyTree, values: PyTree, slot: jax.Array, due: jax.Array) -> PyTree:
    """Writes values into one row of stacked arrays if they are due.

    Only that row is read and written, in place if the state is donated.
    """

    def one(stack, value):
        old = jax.lax.dynamic_index_in_dim(stack, slot, keepdims=False)
        new = jnp.where(due, value, old)
        return jax.lax.dynamic_update_index_in_dim(stack, new, slot, 0)

    return jax.tree.map(one, stacks, values)


def _rows(values, count):
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), values)
