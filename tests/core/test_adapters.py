"""The optimizers and containers users have: each adapter ends where a loop ends."""

import chex
import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import otmdr_jax
from tests import toy

RHO = (0.05, 0.1)
STEPS = 5


@pytest.fixture(scope="module")
def problem():
    params, data = toy.regression_problem()
    return jax.tree.map(jnp.asarray, params), data


@pytest.fixture(scope="module")
def expected(problem):
    """A plain loop: the reference for every adapter."""
    params, data = problem
    grad_fn = jax.jit(otmdr_jax.value_and_grad(toy.regression, RHO))
    tx = optax.sgd(0.05, momentum=0.9)
    state = tx.init(params)
    for step in range(STEPS):
        _, grads = grad_fn(params, data, key=jax.random.key(step))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(got, want, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol, atol=1e-6), got, want
    )


def test_plain_loop_lowers_the_robust_loss(problem, expected):
    params, data = problem
    assert toy.regression(expected, data) < toy.regression(params, data)


def test_flax_train_state(problem, expected):
    params, data = problem
    state = TrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(0.05, momentum=0.9)
    )
    grad_fn = otmdr_jax.value_and_grad(toy.regression, RHO)

    @jax.jit
    def train_step(state, batch, key):
        value, grads = grad_fn(state.params, batch, key=key)
        return state.apply_gradients(grads=grads), value

    for step in range(STEPS):
        state, _ = train_step(state, data, jax.random.key(step))
    assert_close(state.params, expected)


@pytest.mark.parametrize("make", [otmdr_jax.otmdr, otmdr_jax.sam])
def test_a_train_state_that_hands_on_no_batch_is_named(problem, make):
    params, _ = problem
    key = [jax.random.key(0)] if make is otmdr_jax.otmdr else []
    tx = make(toy.regression, *key)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    with pytest.raises(TypeError, match="TrainState.apply_gradients hands no batch"):
        state.apply_gradients(grads=params)


class Linear(nnx.Module):
    def __init__(self, w, b):
        self.w, self.b = nnx.Param(w), nnx.Param(b)

    def __call__(self, x):
        return x @ self.w[...] + self.b[...]


def test_nnx_optimizer(problem, expected):
    params, data = problem
    model = Linear(params["w"], params["b"])
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch, key):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, batch):
            # copy=True: the loss is traced several times from the same state.
            net = nnx.merge(graphdef, params, rest, copy=True)
            return jnp.mean((net(batch["x"]) - batch["y"]) ** 2)

        value, grads = otmdr_jax.value_and_grad(loss_fn, RHO)(params, batch, key=key)
        optimizer.update(model, grads)
        return value

    for step in range(STEPS):
        train_step(model, optimizer, data, jax.random.key(step))
    assert_close({"w": model.w[...], "b": model.b[...]}, expected)


@pytest.mark.slow
def test_linen_with_batch_statistics(key):
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, train):
            x = flax.linen.Dense(8)(x)
            x = flax.linen.BatchNorm(use_running_average=not train)(x)
            return flax.linen.Dense(1)(flax.linen.relu(x))[:, 0]

    net, (_, data) = Net(), toy.regression_problem()
    variables = net.init(key, data["x"], train=False)
    params, stats = variables["params"], variables["batch_stats"]

    def loss_fn(params, batch, stats):
        out, new = net.apply(
            {"params": params, "batch_stats": stats},
            batch["x"],
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean((out - batch["y"]) ** 2), new["batch_stats"]

    grad_fn = jax.jit(
        otmdr_jax.value_and_grad(loss_fn, RHO, has_aux=True, split="shared")
    )
    (_, new_stats), grads = grad_fn(params, data, stats)
    _, plain_stats = loss_fn(params, data, stats)
    assert_close(new_stats, plain_stats)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    # The same through the transformation, where aux lives in the state.
    tx = otmdr_jax.otmdr(loss_fn, rho=RHO, split="shared", has_aux=True, aux_init=stats)
    updates, state = tx.update(
        params, tx.init(params), params, batch=data, loss_args=(stats,)
    )
    assert_close(optax.tree.get(state, "aux"), new_stats)
    assert_close(updates, grads)


def test_equinox_modules(problem, expected):
    class Net(eqx.Module):
        w: jax.Array
        b: jax.Array
        name: str = eqx.field(default="linear", static=True)
        steps: int = 3  # a leaf that is no array

    params, data = problem
    net = Net(params["w"], params["b"])
    trainable, static = eqx.partition(net, eqx.is_inexact_array)

    def loss_fn(trainable, batch):
        net = eqx.combine(trainable, static)
        return jnp.mean((batch["x"] @ net.w + net.b - batch["y"]) ** 2)

    grad_fn = eqx.filter_jit(otmdr_jax.value_and_grad(loss_fn, RHO))
    tx = optax.sgd(0.05, momentum=0.9)
    state = tx.init(trainable)
    for step in range(STEPS):
        _, grads = grad_fn(trainable, data, key=jax.random.key(step))
        updates, state = tx.update(grads, state, trainable)
        trainable = eqx.apply_updates(trainable, updates)
    net = eqx.combine(trainable, static)
    assert net.steps == 3
    assert_close({"w": net.w, "b": net.b}, expected)


@pytest.mark.slow
def test_optax_chain_follows_its_own_keys(problem):
    params, data = problem
    tx = optax.chain(
        otmdr_jax.otmdr(toy.regression, jax.random.key(7), rho=RHO, num_particles=2),
        optax.sgd(0.05, momentum=0.9),
    )
    state = tx.init(params)
    update = jax.jit(lambda s, p: tx.update(p, s, p, batch=data))
    grad_fn = jax.jit(otmdr_jax.value_and_grad(toy.regression, RHO, num_particles=2))
    base = optax.sgd(0.05, momentum=0.9)
    key, base_state, reference = jax.random.key(7), base.init(params), params
    for _ in range(STEPS):
        updates, state = update(state, params)
        params = optax.apply_updates(params, updates)
        key, step_key = jax.random.split(key)
        _, grads = grad_fn(reference, data, key=step_key)
        updates, base_state = base.update(grads, base_state, reference)
        reference = optax.apply_updates(reference, updates)
    assert_close(params, reference)
    assert int(optax.tree.get(state, "count")) == STEPS


def test_optax_inject_hyperparams(problem):
    """rho is read from, and can be set in, the optimizer's state."""
    params, data = problem

    def make(rho, learning_rate):
        return optax.chain(
            otmdr_jax.otmdr(
                toy.regression, jax.random.key(0), rho=(rho, 2 * rho), split="ordered"
            ),
            optax.sgd(learning_rate),
        )

    tx = optax.inject_hyperparams(make)(rho=0.05, learning_rate=0.1)
    state = tx.init(params)
    update = jax.jit(lambda s, p: tx.update(p, s, p, batch=data))
    updates, state = update(state, params)
    _, grads = otmdr_jax.value_and_grad(toy.regression, (0.05, 0.1), split="ordered")(
        params, data
    )
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, grads))
    state.hyperparams["rho"] = jnp.asarray(0.2)
    updates, state = update(state, params)
    _, grads = otmdr_jax.value_and_grad(toy.regression, (0.2, 0.4), split="ordered")(
        params, data
    )
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, grads))


@pytest.mark.slow
def test_donated_buffers(problem):
    params, data = problem
    tx = optax.chain(otmdr_jax.otmdr(toy.regression, jax.random.key(0)), optax.sgd(0.1))

    @jax.jit
    def plain(params, state):
        updates, state = tx.update(params, state, params, batch=data)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(plain, donate_argnums=(0, 1))
    expected, _ = plain(params, tx.init(params))
    got, _ = donating(jax.tree.map(jnp.copy, params), tx.init(params))
    assert_close(got, expected)
    # What the caller gave is still there: a second state can be made of it.
    donating(jax.tree.map(jnp.copy, params), tx.init(params))
