"""Compiled functions: whatever the seed, so that runs of several seeds share them.

Everything a step does (gather, augment, normalise, differentiate, update) is one
program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from otmdr_jax import bnn, parallel
from otmdr_jax import data as data_lib
from otmdr_jax import models as models_lib
from otmdr_jax.baselines import dst_costs
from otmdr_jax.data import Dataset, Split
from otmdr_jax.experiments import building, members, optimizers
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods.training import Loss
from otmdr_jax.experiments.own import NOTHING, Own
from otmdr_jax.experiments.programs.inputs import check_loader
from otmdr_jax.experiments.programs.provenance import DataInfo

PyTree = Any


class Programs(NamedTuple):
    """The compiled functions of a configuration, whatever its seed.

    Attributes:
      init: key -> a state, on every device of the mesh.
      train_step: (state, (images, labels), order, i) -> (state, metrics): step i of an
        epoch, on the training set that lives on the devices.
      stream_step: (state, (images, labels)) -> (state, metrics): on one batch, divided
        over the mesh.
      predict: (state, images) -> (S, B, C) log-probabilities of all samples or members,
        on every device.
      epoch_order: key -> (N,) order of an epoch, (M, N) where members have their own.
      loss_sums: (params, (images, labels, mask, model_state)) -> (sum, count): one, or
        one for each member of another architecture.
      rate: (step, state) -> the learning rate of that step.
      of_batch: (state, batch, key) -> what a batch has to do with the pass before a
        prediction; None where there is no such pass. See
        :class:`otmdr_jax.baselines.Finalize`: images are augmented here where it wants
        that, and normalised.
      finish: (state, the mean or the sum of these) -> a state to predict with; None
        where there is no such pass.
      seen_shapes: state -> the shapes of that sum; None where there is no such pass.
      posterior: state -> the :class:`otmdr_jax.bnn.Summary` of each member's posterior;
        None where there is none.
      sparsity: state -> what results hold of a sparse network; None of dense ones.
      steps_per_epoch: Whole batches in an epoch.
      total_steps: Steps of the run.
      mesh: The devices; None for one.
      own: What the run was given in Python.
      classes: Whether targets are class numbers; if not, `predict` gives outputs.
    """

    init: Callable[[jax.Array], PyTree]
    train_step: Callable[..., tuple[PyTree, dict[str, jax.Array]]]
    stream_step: Callable[..., tuple[PyTree, dict[str, jax.Array]]]
    predict: Callable[[PyTree, jax.Array], jax.Array]
    epoch_order: Callable[[jax.Array], jax.Array]
    loss_sums: tuple[Callable[..., tuple[jax.Array, jax.Array]], ...]
    rate: Callable[..., jax.Array]
    of_batch: Callable[..., PyTree] | None
    finish: Callable[[PyTree, PyTree], PyTree] | None
    seen_shapes: Callable[[PyTree], PyTree] | None
    posterior: Callable[[PyTree], list[bnn.Summary]] | None
    sparsity: Callable[[PyTree], dict[str, Any]] | None
    steps_per_epoch: int
    total_steps: int
    mesh: Mesh | None
    own: Own = NOTHING
    classes: bool = True


def compile_programs(
    config: TrainConfig,
    dataset: Dataset | DataInfo,
    mesh: Mesh | None = None,
    own: Own = NOTHING,
) -> Programs:
    """The compiled functions of a configuration: shared by runs of several seeds.

    Args:
      config: What to compile; its mesh is not looked at.
      dataset: For the shapes, and for how images are augmented and normalised: the data
        or what is known of them.
      mesh: From :func:`make_mesh`; None for the default device.
      own: What the run was given in Python.

    Raises:
      ValueError: The batch is larger than the training set, or the data are batches of
        a loader that do not go with the options.
    """
    info: Any = dataset
    if isinstance(dataset, Dataset):
        check_loader(config, dataset)
        info = DataInfo.of(dataset)
    key = config.replace(
        seed=0, data_dir=None, mesh=None, init_from=None, new_head=None
    )
    augment = info.augment if config.data.augment is None else config.data.augment
    return _programs(
        key,
        info.num_classes,
        info.image_shape,
        info.num_train,
        tuple(augment),
        info.mean,
        info.std,
        mesh,
        own,
    )


@functools.lru_cache(maxsize=16)
def _programs(
    config, num_classes, image_shape, num_train, augment, mean, std, mesh, own
):
    batch_size = config.run.batch_size
    steps_per_epoch = num_train // batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"batch_size={batch_size} is larger than the training set of {num_train}."
        )
    total_steps = config.run.steps or config.run.epochs * steps_per_epoch
    on_data = mesh is not None and "data" in mesh.shape
    parts = parallel.axis_size(mesh, "data")
    size = batch_size // parts  # of a device's part
    methods_ = building.methods_of(
        config, num_classes, num_train, total_steps, steps_per_epoch, mesh, own
    )
    lifted = config.model.members is not None and config.model.ensemble == "independent"
    spread = lifted and parallel.axis_size(mesh, "member") > 1
    count = len(config.model.member_names) if lifted and config.model.stacked else None

    def part():
        return jax.lax.axis_index("data") if on_data else 0

    def of_method(method):
        def stream_step(state, own, batch):
            del own
            key, augment_key = jax.random.split(state.key)
            images, labels = batch
            images = data_lib.augment(augment_key, images, augment, part() * size)
            images = data_lib.normalise(images, mean, std)
            return method.step(state._replace(key=key), (images, labels))

        def train_step(state, own_order, i, examples, order):
            order = order if own_order is None else own_order
            batch = data_lib.take(Split(*examples), order, i * parts + part(), size)
            return stream_step(state, None, batch)

        return stream_step, train_step

    pairs = [of_method(method) for method in methods_]
    stream, train = pairs[0]
    if lifted:
        axis = "member" if spread else None
        stream, train = (
            members.lift_step(steps, config.model.member_map, axis, methods_[0].share)
            for steps in zip(*pairs, strict=True)
        )
    own_data = lifted and config.model.member_data == "own"

    def stream_step(state, batch):
        return stream(state, None, batch)

    def train_step(state, examples, order, i):
        return train(state, order if own_data else None, i, examples, order)

    state_spec = P("member") if spread else P()

    def compiled(step, batch_spec):
        if mesh is None:
            return jax.jit(step, donate_argnums=0)
        return parallel.shard_map_step(
            step,
            mesh,
            batch_spec=batch_spec,
            state_spec=state_spec,
            metrics_spec=P(),
            # The branches of Optax's plateau differ in what is marked as varying.
            check_vma=not (spread and config.schedule.name == "plateau"),
        )

    def init(key):
        if lifted:
            return members.lift_init([m.init for m in methods_], count, key, example)
        return methods_[0].init(key, example)

    def predict(state, images):
        images = data_lib.normalise(images, mean, std)
        if lifted:
            predicts = [m.predict for m in methods_]
            return members.lift_predict(
                predicts, state, images, config.model.member_map
            )
        return methods_[0].predict(state, images)

    finalize = methods_[0].finalize
    if lifted:
        each = [m.finalize for m in methods_ if m.finalize]
        finalize = members.lift_finalize(each, config.model.member_map)

    def of_batch(state, batch, key):
        assert finalize is not None
        if finalize.augmented:
            batch = data_lib.augment(key, batch, augment)
            batch = data_lib.normalise(batch, mean, std)
        else:  # the examples themselves, each once
            images, mask = batch
            batch = data_lib.normalise(images, mean, std), mask
        return finalize.of_batch(state, batch)

    def seen_shapes(state):
        assert finalize is not None
        batch: Any = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
        if not finalize.augmented:
            batch = batch, jax.ShapeDtypeStruct((batch_size,), bool)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(of_batch, state, batch, key)

    def epoch_order(key):
        if not own_data:
            return data_lib.epoch_order(key, num_train)
        keys = jax.random.split(key, len(config.model.member_names))
        return jnp.stack([data_lib.epoch_order(k, num_train) for k in keys])

    def posterior(state):
        found: list[Any] = [method.posterior for method in methods_]
        return [
            bnn.summarise(found[i % len(found)](member))
            for i, member in enumerate(members.separate(state))
        ]

    schedule = optimizers.schedule(config, total_steps, steps_per_epoch)
    read_rate = jax.jit(functools.partial(optimizers.learning_rate, schedule))

    def rate(step, state):  # compiled for what it reads, not for the whole state
        return read_rate(step, members.opt_states(state))

    example = jnp.zeros((1, *image_shape))
    everywhere = parallel.replicated(mesh)
    home = NamedSharding(mesh, state_spec) if mesh is not None else None
    return Programs(
        init=jax.jit(init, out_shardings=home, compiler_options=_once()),
        train_step=compiled(train_step, P()),
        stream_step=compiled(stream_step, parallel.data_spec(mesh)),
        predict=jax.jit(predict, out_shardings=everywhere),
        epoch_order=jax.jit(epoch_order, out_shardings=everywhere),
        loss_sums=tuple(
            loss_sum(network, mean, std, function=own.loss, classes=num_classes > 0)
            for network in building.networks(config, num_classes, drops=False, own=own)
        ),
        rate=rate,
        of_batch=jax.jit(of_batch, out_shardings=everywhere) if finalize else None,
        finish=finalize.finish if finalize else None,
        seen_shapes=seen_shapes if finalize else None,
        posterior=jax.jit(posterior) if methods_[0].posterior else None,
        sparsity=(
            functools.partial(
                _sparsity, building.networks(config, num_classes, own=own), image_shape
            )
            if config.method.is_sparse
            else None
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        mesh=mesh,
        own=own,
        classes=num_classes > 0,
    )


def _once():
    """Compiler options of a program that runs once: on CPUs a third of the time.

    Draws of weights are element by element, which no level sums in another order, and
    levels from 1 on fuse the same multiplications and additions: bits stay the same.
    """
    if jax.default_backend() != "cpu" or jax.config.read(
        "jax_disable_most_optimizations"
    ):
        return None
    return {"xla_backend_optimization_level": 1}


def _sparsity(networks, image_shape, state):
    """The record of a sparse network, or of each member's."""
    found = []
    for i, member in enumerate(members.separate(state)):
        positions = _positions(networks[i % len(networks)], image_shape)
        masks = member.opt_state.masks
        found.append(dst_costs.sparsity(member.params, masks, positions))
    return found[0] if len(found) == 1 else {"members": found}


@functools.lru_cache(maxsize=16)
def _positions(network, image_shape):
    return models_lib.output_positions(network, image_shape)


@functools.lru_cache(maxsize=16)
def loss_sum(
    model: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    train: bool = False,
    function: Callable[..., jax.Array] | None = None,
    classes: bool = True,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The loss of a network on a batch: one function object, so that it compiles once.

    Args:
      model: The network.
      mean: The mean of each channel over the training set.
      std: The standard deviation of each channel.
      train: Normalise by the statistics of the batch instead of the running ones.
      function: A loss of one's own; None for the cross entropy.
      classes: Whether targets are class numbers.

    Returns:
      (params, (images, labels, mask, model_state)) -> (sum of losses, number of
      examples), of those where the mask is True.
    """

    def of_batch(params, batch):
        images, labels, mask, model_state = batch
        images = data_lib.normalise(images, mean, std)
        logits, _ = model.apply(params, model_state, images, train=train)
        loss = Loss(function=function, classes=classes)
        losses = loss.of_examples(logits, labels)
        return jnp.sum(losses * mask), jnp.sum(mask)

    return of_batch


def step_memory_mib(programs: Programs, dataset: Dataset) -> float:
    """Memory of a compiled training step, by the compiler's account: nothing is run.

    State, training set, temporaries and what is new in the output, in MiB a device.

    Args:
      programs: The compiled functions.
      dataset: The data, for their shapes.
    """
    key = run_keys(0)[0]
    state = jax.eval_shape(programs.init, key)
    examples = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(dataset.train)
    )
    order = jax.eval_shape(programs.epoch_order, key)
    step: Any = programs.train_step
    memory = step.lower(state, examples, order, np.int32(0)).compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    ) / 2**20


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The two keys of a run: of its state, and of the order of its data.

    Split, not folded: fold_in(key, 1) is split(key)[1], which the state's key is made
    of already.
    """
    state_key, data_key = jax.random.split(jax.random.key(seed))
    return state_key, data_key
