"""What every method does alike, whichever it is: one contract over all of them.

Formulas have their independent values in the tests of each method.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from otmdr_jax import bnn, parallel
from otmdr_jax.core import tree
from otmdr_jax.experiments import (
    building,
    checkpoint,
    members,
    methods,
    report,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.models.dropout import Dropout
from tests.experiments.test_training import assert_same_bits, stop_after
from tests.marks import slow_but
from tests.sets import small_digits

SIZE, CLASSES = 8, 3
IMAGES = jax.random.normal(jax.random.key(7), (SIZE, 1, 1, 5))
BATCH = IMAGES, jnp.arange(SIZE) % CLASSES


@dataclasses.dataclass(frozen=True)
class Net:
    """A linear head on standardised inputs: statistics, dropout and a last layer."""

    dropout: float = 0.0
    batchnorm_momentum: float = 0.9

    def init(self, key, images):
        kernel = 0.5 * jax.random.normal(key, (images.shape[-1], CLASSES))
        head = {"kernel": kernel, "bias": jnp.zeros(CLASSES)}
        zeros = jnp.zeros(images.shape[-1])
        return {"head": head}, {"mean": zeros, "square": zeros}

    def apply(self, params, state, images, *, train, keys=None):
        x = images.reshape(len(images), -1)
        if train:
            # Of the running mean, not of the batch: a part of it then sees the same.
            moments = {"mean": jnp.mean(x, axis=0), "square": jnp.mean(x**2, axis=0)}
            state = jax.tree.map(lambda old, x: 0.9 * old + 0.1 * x, state, moments)
        if keys is not None:
            x = Dropout(self.dropout, 0)(x, keys)
        return x @ params["head"]["kernel"] + params["head"]["bias"][None], state


RULE = optax.sgd(0.2, momentum=0.9)
OWN = dict(num_data=100.0, weight_decay=0.01, learning_rate=0.2)
# What a method needs beside a network and an optimizer, for a run of four steps.
NEEDS = {
    "bsam": dict(OWN, num_samples=2),
    "ivon": dict(OWN, num_samples=2),
    "sgvb": dict(num_data=100, num_samples=2),
    "otmdr-bnn": dict(num_data=100, num_samples=2),
    "otmdr-dual-bnn": dict(num_data=100, num_samples=2),
    "looksam": dict(every=2),
    "snapshot": dict(ends=(2, 4)),
    "fge": dict(ends=(2, 4)),
    "swa": dict(ends=(2, 4)),
    "swag": dict(ends=(2, 4), rank=2, num_samples=2),
    "dst": dict(density=0.5, rate=0.5, steps=(2,)),
    "edst": dict(density=0.5, rate=0.5, steps=(1, 3), ends=(2, 4)),
    "mc-dropout": dict(num_samples=2),
    "laplace": dict(num_samples=2),
}
ALL = tuple(methods.METHODS)
every_method = pytest.mark.parametrize("name", ALL)


def some(*fast):
    """These by `make test`, all of them by `make test-all`."""
    return pytest.mark.parametrize("name", slow_but(fast, ALL))


def make(name, **options):
    model = Net(0.3 if name == "mc-dropout" else 0.0)
    rule = optax.identity() if methods.METHODS[name].has_own_update else RULE
    return methods.create(name, model, rule, **NEEDS.get(name, {}), **options)


def start(name, **options):
    method = make(name, **options)
    return method, method.init(jax.random.key(1), IMAGES), jax.jit(method.step)


def run(step, state, count, batch=BATCH):
    for _ in range(count):
        state, metrics = step(state, batch)
    return state, metrics


def close(got, want, rtol=1e-4, atol=1e-5):
    def compare(a, b):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert_allclose(a, b, rtol=rtol, atol=atol)

    jax.tree.map(compare, got, want)


# One of each kind, and those that take no longer.
@some(
    "sgd", "sam", "otmdr", "otmdr-dual", "looksam", "sgvb", "edst", "fge", "swa",
    "laplace",
)  # fmt: skip
def test_it_steps_predicts_and_skips(name):
    """One trace; what is not finite changes nothing; predictions are probabilities.

    Nor does a method collect it: NaN is in no memory of its own.
    """
    traces = []
    method = make(name)

    def step(state, batch):
        traces.append(name)
        return method.step(state, batch)

    state = method.init(jax.random.key(1), IMAGES)
    shapes = jax.eval_shape(lambda x: x, state)
    step = jax.jit(step)
    first, metrics = step(state, BATCH)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, state)
    assert jax.eval_shape(lambda x: x, first) == shapes  # dtypes too
    leaves = zip(*map(jax.tree.leaves, (first.params, state.params)), strict=True)
    assert any(not np.array_equal(a, b) for a, b in leaves)

    # Of the last the loss and its gradient are finite, and no square of an image is.
    for bad in (IMAGES.at[0].set(jnp.nan), IMAGES.at[0].set(jnp.inf), IMAGES * 1e20):
        after, metrics = step(first, (bad, BATCH[1]))
        assert metrics["skipped"] == 1 and metrics["skipped_in_row"] == 1
        assert after.step == 2 and after.skipped == 1
        for part in ("params", "model_state", "opt_state", "memory"):
            assert_same_bits(getattr(after, part), getattr(first, part))
    again, metrics = step(after, BATCH)
    assert metrics["skipped"] == 0 and again.skipped_in_row == 0
    assert np.isfinite(metrics["loss"]) and len(traces) == 1
    for _ in range(2):  # collected after steps 2, which was skipped, and 4
        again, _ = step(again, BATCH)
    assert tree.all_finite(again)
    rows = jax.jit(method.predict)(again, IMAGES)
    assert rows.ndim == 3 and rows.shape[1:] == (SIZE, CLASSES)
    assert_allclose(np.exp(rows).sum(-1), 1.0, rtol=1e-4)
    if method.posterior is not None:
        q = method.posterior(again)
        assert all(jnp.all(x > 0) for x in jax.tree.leaves(bnn.std(q)))


@some("sgd", "otmdr-dual")
def test_a_checkpoint_goes_on_as_the_run_did(name, tmp_path):
    method, state, step = start(name)
    state, _ = run(step, state, 2)
    with checkpoint.Checkpoints(tmp_path, scored=False) as saved:
        saved.save(state, {})
    with checkpoint.Checkpoints(tmp_path, scored=False, read_only=True) as saved:
        template = method.init(jax.random.key(9), IMAGES)
        restored = saved.restore(template).state
    assert_same_bits(restored, state)
    # To rounding: arrays from a file are aligned otherwise, which orders XLA's sums.
    close(*(run(step, s, 2)[0] for s in (restored, state)), rtol=1e-5)


@some("otmdr")
def test_members_are_runs_of_their_own(name):
    one = make(name)
    both = members.lift(one, 2, "vmap")
    keys = jax.random.split(jax.random.key(3))
    state, _ = run(jax.jit(both.step), both.init(keys, IMAGES), 2)
    want, step = [one.init(k, IMAGES) for k in keys], jax.jit(one.step)
    for _ in range(2):
        want = [step(state, BATCH)[0] for state in want]
        if one.share is not None:  # what each saw of a budget is the mean of both
            mean = jax.tree.map(lambda *x: sum(x) / 2, *[s.memory for s in want])
            mean = mean._replace(started=want[0].memory.started)
            want = [state._replace(memory=mean) for state in want]
    for got, alone in zip(members.separate(state), want, strict=True):
        close(got, alone)
    rows = jax.jit(one.predict)(want[1], IMAGES)
    predicted = jax.jit(both.predict)(state, IMAGES)
    assert predicted.shape == (2 * len(rows), SIZE, CLASSES)
    assert_allclose(predicted[len(rows) :], rows, rtol=1e-3, atol=1e-4)


@pytest.mark.essential
@some("sgd", "otmdr", "ivon")
def test_two_devices_train_what_one_does(name):
    """With the split of one device, since each cuts its own part of the batch."""
    whole = {"split": "shared"} if methods.METHODS[name].has_particles else {}
    _, state, step = start(name, **whole)
    want, _ = run(step, state, 2)
    spread = make(name, **whole, axis_name="data")
    step = parallel.shard_map_step(
        spread.step, parallel.make_mesh("data=2"), donate=False
    )
    got, _ = run(step, state, 2)
    close(got.params, want.params)
    for leaf in jax.tree.leaves(got.params):
        first, second = (np.asarray(s.data) for s in leaf.addressable_shards)
        np.testing.assert_array_equal(first, second)


RUNS = TrainConfig(
    mesh="data=1", batch_size=64, epochs=2, log_every=2, seed=3, eval_every=2,
)  # fmt: skip
RUN_OPTIONS = {
    "looksam": dict(look_every=3),
    "snapshot": dict(cycles=2),
    "fge": dict(collect_start=0.2, cycle_epochs=0.8),
    "swa": dict(collect_start=0.5, collect_every=0.4),
    "swag": dict(collect_start=0.4, collect_every=0.4, swag_rank=2, num_samples=2),
    "dst": dict(mask_every=2),
    "edst": dict(mask_every=1, tickets=2),
    "sgvb": dict(optimizer="adam", learning_rate=0.01, num_samples=2),
    "otmdr-bnn": dict(optimizer="adam", learning_rate=0.01, num_samples=2),
    "otmdr-dual-bnn": dict(optimizer="adam", learning_rate=0.01, num_samples=2),
    "bsam": dict(num_subbatches=2, num_samples=2),
    "ivon": dict(num_samples=2),
    "mc-dropout": dict(num_samples=2),
    "laplace": dict(num_samples=2),
}


@pytest.fixture(scope="module")
def small():
    return small_digits(320)


@pytest.mark.slow
@every_method
def test_a_stopped_run_resumes_to_the_same_bits(
    name,
    small,
    one_layer,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """By a real SIGTERM in the middle: weights, predictions and records."""
    chosen = RUNS.replace(model=one_layer, method=name, **RUN_OPTIONS.get(name, {}))
    whole = training.train(chosen, small, tmp_path / "whole", show_progress=False)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(training.Interrupted):
            training.train(chosen, small, tmp_path / "run", show_progress=False)
    got = training.train(
        chosen, small, tmp_path / "run", resume=True, show_progress=False
    )
    assert_same_bits(got.state, whole.state)
    np.testing.assert_array_equal(got.log_probs, whole.log_probs)
    assert got.metrics.get("posterior") == whole.metrics.get("posterior")
    assert np.isfinite(got.metrics["nll"])
    label = report.read_run(tmp_path / "run").label
    assert label and label == report.read_run(tmp_path / "whole").label


def test_every_method_has_defaults_and_takes_dropout():
    for name in ALL:
        chosen = TrainConfig(method=name, dropout=0.2)
        (network,) = building.networks(chosen, 10)
        assert network.dropout == 0.2
        (network,) = building.networks(chosen, 10, drops=False)
        assert network == building.networks(TrainConfig(), 10)[0]


def test_memories_are_of_methods_that_remember():
    """The others' checkpoints hold what they held before there were memories."""
    for name in ("sgd", "sam", "otmdr", "gsam"):
        state = make(name).init(jax.random.key(0), IMAGES)
        assert state.memory is None
        assert "memory" not in checkpoint._stored(state)
