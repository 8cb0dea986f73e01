"""The robust gradient of Equinox models: Equinox' own where nothing moves."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import otmdr_jax
from tests.marks import slow_but

RHO = (0.3, 0.2)
SIZE = WIDTH = 8  # statistics look like rows of examples


class Net(eqx.Module):
    """Layers in a list, functions among them, as in Equinox' tutorials."""

    layers: list
    table: jax.Array
    name: str

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.layers = [
            eqx.nn.Linear(4, WIDTH, key=one),
            jax.nn.relu,
            eqx.nn.Linear(WIDTH, 3, key=two),
            jax.nn.log_softmax,
        ]
        self.table = jnp.arange(SIZE)
        self.name = "net"

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def loss_fn(model, batch):
    x, y = batch
    log_probs = jax.vmap(model)(x)
    return -jnp.mean(jnp.take_along_axis(log_probs, y[:, None], 1)), log_probs


@pytest.fixture(scope="module")
def batch():
    x = np.random.default_rng(0).normal(size=(SIZE, 4)).astype(np.float32)
    return jnp.asarray(x), jnp.arange(SIZE) % 3


@pytest.fixture(scope="module")
def model():
    return Net(jax.random.key(0))


def assert_same(got, want, rtol=0.0):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if eqx.is_array(a) or eqx.is_array(b):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol, atol=rtol)
        else:
            assert a == b


def ours(loss=loss_fn, rho=0.0, split="shared", has_aux=True, **options):
    return otmdr_jax.equinox.filter_value_and_grad(
        loss, rho, split=split, has_aux=has_aux, **options
    )


@pytest.mark.slow
def test_without_a_radius_it_is_equinox_filter_value_and_grad(model, batch):
    got = ours()(model, batch)
    want = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, batch)
    assert_same(got, want)
    assert isinstance(got[1], Net) and got[1].layers[1] is None is got[1].table
    value = ours(lambda *args: loss_fn(*args)[0], has_aux=False)(model, batch)[0]
    assert value == want[0][0]


WAYS = {
    "shared": {"split": "shared", "rho": 0.3},
    "particles": {"num_particles": 3, "noise_std": 0.1},
    "a scan": {"num_particles": 3, "particle_map": "scan"},
    "merge, norm": {"merge": "sum", "norm": "per_leaf", "split": "ordered"},
    "a mask": {"mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params)},
    "micro-batches": {"microbatch_size": 2},
    "sub-batches": {"num_subbatches": 2},
    "fisher": {"fisher": 1.0, "split": "ordered"},
    "weights": {"weights": lambda batch: 1.0 + batch[1]},
    "first order": {"sampler": "first_order", "tilt": 0.5, "rho": 0.3},
}


@pytest.mark.parametrize("way", slow_but(("shared",), WAYS))
def test_every_option_gives_what_the_core_gives_of_the_arrays(way, model, batch, key):
    options = {"rho": RHO, "has_aux": True} | WAYS[way]
    params, static = eqx.partition(model, eqx.is_inexact_array)
    of_params = lambda params, b: loss_fn(eqx.combine(params, static), b)  # noqa: E731
    core = eqx.filter_jit(otmdr_jax.value_and_grad(of_params, **options))
    fn = otmdr_jax.equinox.filter_value_and_grad(loss_fn, **options)
    got = eqx.filter_jit(fn)(model, batch, key=key)
    assert_same(got, core(params, batch, key=key), rtol=1e-6)


def test_one_shared_step_is_sam(model, batch):
    """In NumPy: the gradient at w + rho g / |g|."""
    plain = eqx.filter_value_and_grad(loss_fn, has_aux=True)
    _, first = plain(model, batch)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(first)))
    away = jax.tree.map(lambda g: 0.3 * g / length, first)
    _, want = plain(eqx.apply_updates(model, away), batch)
    _, grads = ours(rho=0.3)(model, batch)
    assert_same(grads, want, rtol=1e-5)
    assert not np.allclose(grads.layers[0].weight, first.layers[0].weight, rtol=0.01)


# -- as tutorials call it -------------------------------------------------------------


@pytest.mark.slow
def test_a_training_step_of_equinox_tutorials_runs_with_one_changed_line(batch):
    """A loss of x and y, jitted before, in a step that is jitted."""

    @eqx.filter_jit
    def loss(model, x, y):
        return loss_fn(model, (x, y))[0]

    def train(value_and_grad):
        optimizer = optax.adamw(1e-2)

        @eqx.filter_jit
        def make_step(model, state, x, y):
            value, grads = value_and_grad(loss)(model, x, y)
            params = eqx.filter(model, eqx.is_inexact_array)
            updates, state = optimizer.update(grads, state, params)
            return eqx.apply_updates(model, updates), state, value

        model = Net(jax.random.key(0))
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        for _ in range(3):
            model, state, value = make_step(model, state, *batch)
        return model, value

    plain, value = train(eqx.filter_value_and_grad)
    same, own_value = train(functools.partial(ours, has_aux=False))
    assert_same((same, own_value), (plain, value), rtol=1e-5)
    robust, own_value = train(functools.partial(ours, rho=0.5, has_aux=False))
    assert own_value > value
    moved = np.abs(robust.layers[0].weight - plain.layers[0].weight)
    assert np.max(moved) > 1e-3 and robust.name == "net"


def test_it_decorates(model, batch, key):
    @otmdr_jax.equinox.filter_value_and_grad(rho=0.1, has_aux=True)
    def robust(model, batch):
        return loss_fn(model, batch)

    want = ours(rho=0.1, split="random")(model, batch, key=key)
    assert_same(robust(model, batch, key=key), want)


class Stateful(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    calls: eqx.nn.StateIndex
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(4, WIDTH, key=one)
        self.norm = eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="batch")
        self.calls = eqx.nn.StateIndex(jnp.arange(SIZE))
        self.head = eqx.nn.Linear(WIDTH, 3, key=two)

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return jax.nn.log_softmax(self.head(jax.nn.relu(x))), state


def stateful_loss(model, batch, state):
    x, y = batch
    apply = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    log_probs, new = apply(x, state)
    new = new.set(model.calls, state.get(model.calls) + 1)
    return -jnp.mean(jnp.take_along_axis(log_probs, y[:, None], 1)), (new, log_probs)


SEEN = {  # options, and the examples that the pass at the center sees
    "ordered": ({"split": "ordered"}, slice(0, SIZE // 2)),
    "shared": ({"split": "shared"}, slice(None)),
    "particles": ({"num_particles": 3, "particle_map": "scan"}, None),
    "micro-batches": ({"microbatch_size": 2, "split": "shared"}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", SEEN)
def test_stateful_batch_norm_is_that_of_the_center(way, batch, key):
    """State has the batch's length, of integers even, and is no row of examples."""
    model, state = eqx.nn.make_with_state(Stateful)(jax.random.key(0))
    options, seen = SEEN[way]
    fn = otmdr_jax.equinox.filter_value_and_grad(
        stateful_loss, (5.0, 5.0), has_aux=True, **options
    )
    (_, (new, log_probs)), _ = eqx.filter_jit(fn)(model, batch, state, key=key)
    assert log_probs.shape == (SIZE, 3)
    np.testing.assert_array_equal(new.get(model.calls), np.arange(SIZE) + 1)
    if seen is not None:
        _, (want, _) = stateful_loss(model, tuple(x[seen] for x in batch), state)
        assert_same(new, want, rtol=1e-5)
    else:  # means over parts that are near the weights' own
        _, (want, _) = stateful_loss(model, batch, state)
        assert_same(new, want, rtol=0.5)


def test_a_state_that_every_pass_sets_is_new_in_each(batch, key):
    """Equinox spends a state that is set, outside of vmap too."""

    class Counting(eqx.Module):
        linear: eqx.nn.Linear
        calls: eqx.nn.StateIndex

        def __init__(self, key):
            self.linear = eqx.nn.Linear(4, 3, key=key)
            self.calls = eqx.nn.StateIndex(jnp.array(0))

    def loss(model, batch, state):
        state = state.set(model.calls, state.get(model.calls) + 1)
        return jnp.mean(jax.vmap(model.linear)(batch[0]) ** 2), state

    model, state = eqx.nn.make_with_state(Counting)(jax.random.key(0))
    fn = ours(loss, RHO, split="ordered")
    for calls in (1, 2):
        (_, state), _ = fn(model, batch, state)
        assert state.get(model.calls) == calls


@pytest.mark.slow
def test_dropout_with_keys_of_examples_and_with_one_for_all(model, batch, key):
    """Rows of keys are cut with their examples: each pass drops what it dropped."""
    dropout, (x, _) = eqx.nn.Dropout(0.5), batch

    def of_rows(model, batch):
        x, keys = batch
        dropped = jax.vmap(lambda x, k: dropout(x, key=k))(x, keys)
        return jnp.mean(jax.vmap(model)(dropped) ** 2), dropped

    keys = jax.random.split(key, SIZE)
    want = of_rows(model, (x, keys))[1]
    (_, dropped), _ = ours(of_rows, RHO, split="random")(model, (x, keys), key=key)
    np.testing.assert_array_equal(dropped, want)

    def of_one(model, x, key):
        return jnp.mean(jax.vmap(model)(dropout(x, key=key)) ** 2), None

    plain = eqx.filter_value_and_grad(of_one, has_aux=True)(model, x, key)
    assert_same(ours(of_one)(model, x, key), plain)
    with pytest.raises(ValueError, match="only the batch"):
        ours(lambda m, x, keys: of_rows(m, (x, keys)), RHO, split="random")(
            model, x, keys, key=key
        )


@pytest.mark.slow
def test_what_is_no_array_goes_in_and_comes_out(model, batch, key):
    """Functions and texts beside the batch, another model, and all of it in aux."""

    def loss(model, batch, teacher, activation, *, name):
        outputs = activation(jax.vmap(model)(batch[0]) - jax.vmap(teacher)(batch[0]))
        return jnp.mean(outputs**2), {"name": name, "of": activation, "net": teacher}

    teacher = Net(jax.random.key(1))
    fn = otmdr_jax.equinox.filter_value_and_grad(loss, RHO, has_aux=True)
    (_, aux), grads = eqx.filter_jit(fn)(
        model, batch, teacher, jax.nn.gelu, name="kd", key=key
    )
    assert aux["name"] == "kd" and aux["of"] is jax.nn.gelu
    assert_same(aux["net"], teacher)
    assert np.all(np.isfinite(grads.layers[0].weight))


@pytest.mark.slow
def test_an_ensemble_by_vmap(batch, key):
    keys = jax.random.split(key, 2)
    members = eqx.filter_vmap(Net)(keys)
    fn = ours(rho=RHO, split="random")
    axes = (eqx.if_array(0), None, 0)
    step = eqx.filter_vmap(lambda m, b, k: fn(m, b, key=k), in_axes=axes)
    (values, _), grads = eqx.filter_jit(step)(members, batch, keys)
    for i in range(2):
        of_i = lambda x: x[i] if eqx.is_array(x) else x  # noqa: B023, E731
        member = jax.tree.map(of_i, members)
        (value, _), own = eqx.filter_jit(fn)(member, batch, key=keys[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        assert_same(jax.tree.map(of_i, grads), own, rtol=1e-5)


# -- what is refused ------------------------------------------------------------------


def test_refused(model, batch, key):
    make = otmdr_jax.equinox.filter_value_and_grad
    with pytest.raises(
        TypeError, match="equinox.filter_value_and_grad takes no argnums"
    ):
        make(loss_fn, argnums=0)
    with pytest.raises(ValueError, match="one radius for each ascent step"):
        make(loss_fn, rho=())
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        make(3.0)
    fn = make(loss_fn, has_aux=True)
    with pytest.raises(ValueError, match="pass a key"):
        fn(model, batch)
    with pytest.raises(
        ValueError, match="the custom_jvp that came first has no floating"
    ):
        fn(jax.nn.relu, batch, key=key)
    with pytest.raises(ValueError, match="only the batch.*as .x, y."):
        make(lambda m, x, y: loss_fn(m, (x, y))[0])(model, *batch, key=key)
    with pytest.raises(TypeError, match="must return a scalar, got tuple"):
        make(loss_fn)(model, batch, key=key)
