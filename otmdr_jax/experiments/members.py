"""The members of a training run: one model, M of one architecture, or several.

Methods, states and steps are written for one model; here they are mapped over members.
The state of M models of one architecture is a `TrainState` with a leading axis of M on
every leaf, that of different architectures a tuple of `TrainState`. Every member has
its own key, and with it initialisation, augmentation, splits and noise; its own
optimizer state and statistics; and is skipped on its own where its step is not finite.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax import baselines, ensemble
from otmdr_jax.core import collectives, loops, tree
from otmdr_jax.ensemble.joint import member_log_probs
from otmdr_jax.experiments.methods import Method, TrainState
from otmdr_jax.experiments.methods.collected import number
from otmdr_jax.experiments.methods.training import Share

# For users; the rest serves the commands.
__all__ = ["JointModel", "join", "joint", "lift", "lift_step", "separate"]

PyTree = Any
Step = Callable[..., tuple[PyTree, dict[str, jax.Array]]]


def lift(
    methods: Method | Sequence[Method], count: int | None = None, how: str = "auto"
) -> Method:
    """An ensemble of independent members as one method.

    Member m takes the steps of a run of its own whose state's key is the m-th: to the
    bit where members are scanned, to rounding where they are mapped in another way,
    since XLA then groups and orders the sums of several members differently. In the
    dual form members share a multiplier.

    Args:
      methods: One method for M members of one architecture, or a sequence of M.
      count: M, where there is one method.
      how: How members of one architecture are mapped: "vmap", "unroll", "scan", "auto".

    Returns:
      A method. `init(key, images)` splits the key into M, or takes M keys; metrics of
      `step` are (M,); `predict` gives the (M S, B, C) log-probabilities of all.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from otmdr_jax import members, methods, models
      >>> one = methods.create("sgd", models.create("cnn_small", 10), optax.sgd(0.1))
      >>> method = members.lift(one, 3)
      >>> images, labels = jnp.zeros((4, 8, 8, 1)), jnp.arange(4)
      >>> state = method.init(jax.random.key(0), images)
      >>> state, metrics = jax.jit(method.step)(state, (images, labels))
      >>> metrics["loss"].shape, jax.jit(method.predict)(state, images).shape
      ((3,), (3, 4, 10))
    """
    each = [methods] if isinstance(methods, Method) else list(methods)
    if (count is None) == (len(each) == 1) or (count is not None and count < 1):
        raise ValueError(
            "give one method and the number of members, or several methods; got "
            f"{len(each)} and count={count!r}."
        )
    step = lift_step(
        [lambda state, own, batch, m=m: m.step(state, batch) for m in each],
        how,
        share=each[0].share,
    )
    return Method(
        init=lambda key, images: lift_init([m.init for m in each], count, key, images),
        step=lambda state, batch: step(state, None, batch),
        predict=lambda state, images: lift_predict(
            [m.predict for m in each], state, images, how
        ),
        finalize=lift_finalize([m.finalize for m in each if m.finalize], how),
    )


def lift_init(
    inits: Sequence[Callable], count: int | None, key: jax.Array, images: Any
) -> PyTree:
    """Initial states of all members; see :func:`lift`."""
    members = len(inits) if count is None else count
    keys = ensemble.member_keys(key, members)
    if count is None:
        return tuple(f(k, images) for f, k in zip(inits, keys, strict=True))
    # Drawn as each member alone would be: vmap changes no bit of a PRNG.
    return jax.vmap(lambda k: inits[0](k, images))(keys)


def lift_step(
    steps: Sequence[Step],
    how: str = "auto",
    axis_name: Any = None,
    share: Share | None = None,
) -> Step:
    """Maps a step over members.

    Args:
      steps: One for members of one architecture, or one for each. Each is (state, own,
        token, *shared) -> (state, metrics), all of whose work depends on the token (a
        batch, an index), which is what unrolled members wait for each other with.
      how: The map over members, as in :func:`lift`.
      axis_name: Device axis that stacked members are spread over.
      share: What makes the members' memories one after each step, where they have one:
        see :class:`otmdr_jax.experiments.methods.Method`.

    Returns:
      (states, own, token, *shared) -> (states, metrics): `own` is None or has a leading
      axis of M, of all members; metrics are (M,), of all members on every device.
    """

    def step(states, own, token, *shared):
        if axis_name is not None and own is not None:
            here = states.step.shape[0]
            start = here * jax.lax.axis_index(axis_name)
            own = jax.lax.dynamic_slice_in_dim(own, start, here)

        def of_member(function):
            return lambda wait, state, own: function(state, own, wait(token), *shared)

        found = _each([of_member(f) for f in steps], (states, own), how)
        if len(steps) > 1:
            states, metrics = zip(*found, strict=True)
            states, metrics = states, tree.stack(metrics)
        else:
            states, metrics = found
        if share is not None:
            states = _sharing(share, states, metrics["skipped"] == 0, axis_name)
        return states, metrics if len(steps) > 1 else _of_all(metrics, axis_name)

    return step


def _sharing(share, states, finite, axis_name):
    """The states of members that have a memory in common."""
    if isinstance(states, TrainState):
        common = share(states.memory, finite, axis_name)
        each = jax.tree.map(
            lambda x, own: jnp.broadcast_to(x, own.shape), common, states.memory
        )
        return states._replace(memory=each)
    common = share(tree.stack([state.memory for state in states]), finite, axis_name)
    return tuple(state._replace(memory=common) for state in states)


def lift_predict(
    predicts: Sequence[Callable], states: PyTree, images: jax.Array, how: str = "auto"
) -> jax.Array:
    """(M S, B, C) log-probabilities of M members with S samples each."""

    def of_member(function):
        return lambda wait, state: function(state, wait(images))

    found = _each([of_member(f) for f in predicts], (states,), how)
    if len(predicts) > 1:
        return jnp.concatenate(found)
    return found.reshape(-1, *found.shape[2:])  # (M, S, B, C) -> (M S, B, C)


def lift_finalize(
    functions: Sequence[baselines.Finalize], how: str = "auto"
) -> baselines.Finalize | None:
    """The pass over the training set of all members; None where none needs one.

    Args:
      functions: That of members of one architecture, or one for each.
      how: The map over members, as in :func:`lift`.
    """
    if not functions:
        return None

    def of_batch(states, batch):
        def of_member(function):
            return lambda wait, state: function(state, wait(batch))

        return _each([of_member(f.of_batch) for f in functions], (states,), how)

    def finish(states, found):
        if len(functions) == 1:
            return functions[0].finish(states, found)
        parts = zip(functions, states, found, strict=True)
        return tuple(f.finish(state, own) for f, state, own in parts)

    return baselines.Finalize(of_batch, finish, functions[0].augmented)


def separate(state: PyTree) -> list[TrainState]:
    """The states of all members, one by one; of one model, a list of one."""
    if not isinstance(state, TrainState):
        return list(state)
    if jnp.ndim(state.step) == 0:
        return [state]
    count = state.step.shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], state) for i in range(count)]


def trained(config: Any, state: PyTree) -> list[TrainState]:
    """The weights of each trained member as a state of its own: of averages the mean.

    Args:
      config: The run's configuration.
      state: Its state, finalized where it needs to be.
    """
    return [config.method.trained(member) for member in separate(state)]


def predicting(config: Any, state: PyTree) -> list[TrainState]:
    """The same, but of one run that collects members those that it has collected."""
    if config.model.members is None and num_collected(config, state):
        return config.method.collected(state)
    return trained(config, state)


def weights(config: Any, state: PyTree) -> list[tuple[PyTree, PyTree]]:
    """The parameters of each trained member, and its BatchNorm statistics.

    Args:
      config: The run's configuration.
      state: Its state, finalized where it needs to be.
    """
    if not config.model.joint:
        every = trained(config, state)
        return [(member.params, member.model_state) for member in every]
    both = state.params, state.model_state
    if not config.model.stacked:
        return list(zip(*both, strict=True))
    count = len(config.model.member_names)
    return [jax.tree.map(lambda x, m=m: x[m], both) for m in range(count)]


def predictors(config: Any, state: PyTree) -> list[tuple[PyTree, PyTree]]:
    """The same of all that predict: the copies that each run has collected."""
    if not num_collected(config, state):
        return weights(config, state)
    copies = [config.method.collected(member) for member in separate(state)]
    return [(copy.params, copy.model_state) for copy in itertools.chain(*copies)]


def num_parameters(config: Any, state: PyTree) -> int:
    """How many parameters all that predict have."""
    each = [params for params, _ in predictors(config, state)]
    return sum(x.size for x in jax.tree.leaves(each))


def num_runs(config: Any) -> int:
    """How many members a run trains; 1 for one model."""
    return len(config.model.member_names) if config.model.members is not None else 1


def num_collected(config: Any, state: PyTree) -> int:
    """How many copies of its weights each run has collected; 0 where none does.

    Of an ensemble all have as many, since they collect at the same steps.
    """
    if not config.method.collects:
        return 0
    first: Any = state if isinstance(state, TrainState) else state[0]
    return number(first.method_state.number)


def num_predicting(config: Any, collected: int) -> int:
    """How many members predictions are of: of one run, each copy that it collected.

    Args:
      config: The run's configuration.
      collected: From :func:`num_collected`.
    """
    return num_runs(config) if config.model.members is not None else max(collected, 1)


def without_empty(config: Any, samples: Any, collected: int) -> Any:
    """Predictions by copies that are collected, without the slots that are empty.

    Args:
      config: The run's configuration.
      samples: (M S, B, C) predictions of M members by S slots each.
      collected: From :func:`num_collected`; 0 keeps all.
    """
    if not collected:
        return samples
    slots = samples.reshape(num_runs(config), -1, *samples.shape[1:])
    return slots[:, :collected].reshape(-1, *samples.shape[1:])


def join(states: Sequence[TrainState], stacked: bool) -> PyTree:
    """The inverse of :func:`separate` for an ensemble."""
    return tree.stack(states) if stacked else tuple(states)


def opt_states(state: PyTree) -> PyTree:
    """The optimizer states of all members."""
    if isinstance(state, TrainState):
        return state.opt_state
    return tuple(member.opt_state for member in state)


def steps_taken(state: PyTree) -> int:
    """Steps taken so far, the same for all members."""
    step = (state if isinstance(state, TrainState) else state[0]).step
    if isinstance(step, jax.Array):  # of members on other hosts, what is here
        step = step.addressable_data(0)
    return int(np.ravel(step)[0])


@dataclasses.dataclass(frozen=True)
class JointModel:
    """Several networks as one, whose logits are the log of their mean probability.

    Given to :func:`otmdr_jax.experiments.methods.create` it makes the released code's
    joint variant, :func:`otmdr_jax.ensemble.joint_loss`: one loss on the mean
    probability, one gradient norm over all members.

    Attributes:
      models: One for members of one architecture, or one for each.
      count: M.
      how: The map over members, as in :func:`lift`.
    """

    models: tuple[Any, ...]
    count: int
    how: str = "auto"

    def init(self, key: jax.Array, images: Any) -> tuple[PyTree, PyTree]:
        """Draws every member's parameters and statistics."""
        keys = jax.random.split(key, self.count)
        if len(self.models) == 1:
            return jax.vmap(lambda k: self.models[0].init(k, images))(keys)
        found = [m.init(k, images) for m, k in zip(self.models, keys, strict=True)]
        params, states = zip(*found, strict=True)
        return params, states

    @property
    def dropout(self) -> float:
        """The highest rate of dropout of the members."""
        return max(baselines.rate_of(model) for model in self.models)

    def apply(
        self,
        params: PyTree,
        state: PyTree,
        images: jax.Array,
        *,
        train: bool,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """(B, C) logarithms of the mean probability, and the new statistics."""
        log_probs, state = self.apply_members(
            params, state, images, train=train, keys=keys
        )
        return ensemble.log_mean_probs(log_probs), state

    def apply_members(
        self,
        params: PyTree,
        state: PyTree,
        images: jax.Array,
        *,
        train: bool,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """(M, B, C) log-probabilities of the members, and the new statistics."""

        def of_member(model):
            def logits_fn(params, images, state, *number):
                dropped = {} if keys is None else {"keys": _own(keys, *number)}
                return model.apply(params, state, images, train=train, **dropped)

            return logits_fn

        numbers: list[Any] = [] if keys is None else [jnp.arange(self.count)]
        if len(self.models) > 1:
            numbers = [tuple(number) for number in numbers]
        of_members = member_log_probs(
            [of_member(m) for m in self.models],
            has_aux=True,
            member_map=self.how,
        )
        return of_members(params, images, state, *numbers)


def joint(method: Method, model: JointModel) -> Method:
    """A method of a :class:`JointModel` whose prediction tells the members apart."""

    def predict(state, images):
        params, model_state = state.params, state.model_state
        return model.apply_members(params, model_state, images, train=False)[0]

    return method._replace(predict=predict)


def _own(keys, number):
    """A member's own keys of examples, or of all of them."""
    fold = jax.random.fold_in
    return jax.vmap(fold, (0, None))(keys, number) if keys.ndim else fold(keys, number)


def _each(functions, columns, how):
    """One function is for all members of one architecture."""
    functions = functions if len(functions) > 1 else functions[0]
    return loops.each(functions, columns, how)


def _of_all(metrics, axis_name):
    """Metrics (M,) of every device, joined: the same on all devices."""
    axes = collectives.axes_of(axis_name)
    if not axes:
        return metrics
    return {
        name: collectives.pmean(
            collectives.slots(x.astype(tree.accumulation_dtype(x)), axes), axes
        )
        for name, x in metrics.items()
    }
