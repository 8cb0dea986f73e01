"""Numbers of leaves that are drawn together are those of each leaf alone."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import otmdr_jax
from otmdr_jax import bnn
from otmdr_jax.baselines import preconditioned
from otmdr_jax.core import ascent, draws, shards

SHAPES = [(), (0,), (1,), (3, 3, 2, 4), (5,), (4, 4), (4, 5), (300,), (7,), (2, 0)]


@pytest.fixture
def one_device(monkeypatch):
    """As on a machine with one device, where leaves are drawn together."""
    monkeypatch.setattr(shards, "on_one_device", lambda: True)


def alone(key, leaves):
    return {
        i: jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        for i, x in leaves.items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for i, x in expected.items():
        assert found[i].shape == x.shape and found[i].dtype == x.dtype
        np.testing.assert_array_equal(found[i], x)


def drawn_at_a_time(key, leaves):
    return drawn_by(lambda key: draws.normals(key, leaves), key)


def drawn_by(function, key):
    """How many numbers each draw in the traced program of a function has."""
    return list(numbers_of(jax.make_jaxpr(function)(key).jaxpr))


def numbers_of(jaxpr):
    for eqn in jaxpr.eqns:
        if "normal" in str(eqn.params.get("name")):
            yield eqn.outvars[0].aval.size
            continue
        # On CPUs a scan draws a row at a time.
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                for count in numbers_of(getattr(inner, "jaxpr", inner)):
                    yield times * count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_they_have_the_numbers_that_they_have_alone(dtype, one_device, key):
    leaves = {2 * i: jnp.zeros(shape, dtype) for i, shape in enumerate(SHAPES)}
    assert_same(draws.normals(key, leaves), alone(key, leaves))
    some = {i: leaves[i] for i in (4, 6, 18)}  # the others' numbers do not matter
    assert_same(draws.normals(key, some), alone(key, some))


@pytest.mark.slow  # each list of sizes is compiled
@given(st.lists(st.integers(0, 70), max_size=12), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_whatever_their_sizes_are(sizes, seed):
    leaves = {i: jnp.zeros(n) for i, n in enumerate(sizes)}
    key = jax.random.key(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "on_one_device", lambda: True)
        assert_same(draws.normals(key, leaves), alone(key, leaves))


def test_dtypes_stand_side_by_side(one_device, key):
    leaves = {i: jnp.zeros(3, d) for i, d in enumerate(["float32", "bfloat16"] * 2)}
    assert_same(draws.normals(key, leaves), alone(key, leaves))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_draw_leaf_by_leaf(impl, one_device):
    key = jax.random.key(3, impl=impl)
    leaves = {i: jnp.zeros(shape) for i, shape in enumerate(SHAPES)}
    assert_same(draws.normals(key, leaves), alone(key, leaves))


def test_threefry_that_depends_on_the_length_draws_leaf_by_leaf(one_device, key):
    leaves = {i: jnp.zeros(shape) for i, shape in enumerate(SHAPES)}
    with jax.threefry_partitionable(False):
        found, expected = draws.normals(key, leaves), alone(key, leaves)
    assert_same(found, expected)
    other = alone(key, leaves)
    assert any((expected[i] != other[i]).any() for i in leaves)  # the flag matters


def test_particles_and_members_have_numbers_of_their_own(one_device, key):
    leaves = {i: jnp.zeros(shape) for i, shape in enumerate(SHAPES)}
    keys = jax.random.split(key, 3)
    found = jax.vmap(lambda key: draws.normals(key, leaves))(keys)
    for k in range(3):
        assert_same({i: x[k] for i, x in found.items()}, alone(keys[k], leaves))


def test_small_leaves_share_a_draw_and_large_ones_do_not(one_device, key):
    small = {i: jax.ShapeDtypeStruct((n,), "float32") for i, n in enumerate([9] * 100)}
    assert drawn_at_a_time(key, small) == [100 * 9]
    large = {i: jax.ShapeDtypeStruct((2**20 + i,), "float32") for i in range(3)}
    assert drawn_at_a_time(key, large) == [2**20, 2**20 + 1, 2**20 + 2]
    middle = {i: jax.ShapeDtypeStruct((200_000,), "float32") for i in range(10)}
    assert drawn_at_a_time(key, middle) == [800_000, 800_000, 400_000]


def test_on_several_devices_leaves_are_drawn_one_by_one(key):
    """XLA may spread them, which a part of a larger array would hinder."""
    leaves = {i: jax.ShapeDtypeStruct((9,), "float32") for i in range(5)}
    assert drawn_at_a_time(key, leaves) == [9] * 5
    leaves = {i: jnp.zeros(9) for i in leaves}
    assert_same(draws.normals(key, leaves), alone(key, leaves))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    each = jax.shard_map(
        lambda key: draws.normals(key, leaves), mesh=mesh, in_specs=P(), out_specs=P()
    )
    assert_same(jax.jit(each)(key), alone(key, leaves))  # there each has one


def test_accelerators_draw_all_rows_at_once(one_device, key, monkeypatch):
    """A loop would wait for each row's kernels."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    leaves = {i: jnp.zeros(shape) for i, shape in enumerate(SHAPES)}
    assert_same(draws.normals(key, leaves), alone(key, leaves))
    program = str(jax.make_jaxpr(lambda key: draws.normals(key, leaves))(key))
    assert "scan" not in program


PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(()), "d": jnp.ones(2)}


def loss_fn(params, batch):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) * batch.mean()


def gradient(**options):
    grad_fn = otmdr_jax.value_and_grad(loss_fn, **options)
    return lambda key: grad_fn(PARAMS, jnp.ones((4, 1)), key=key)


def unmoved(key):
    """A step from a zero gradient: noise alone."""
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    return ascent.ascend(PARAMS, still, 0.1, noise_std=0.5, key=key)


CALLERS = {
    "ascend": unmoved,
    "noise": gradient(noise_std=0.1),
    "noise of some leaves": gradient(
        noise_std=0.1, mask={"a": True, "b": True, "c": False, "d": True}
    ),
    "first_order": gradient(rho=(0.1,), sampler="first_order", tilt=0.5),
    "langevin": gradient(
        rho=(0.1,), sampler="langevin", tilt=0.5, num_steps=2, split="shared"
    ),
    "posterior": lambda key: bnn.sample(bnn.init(PARAMS, sigma=0.5), key),
    "preconditioned": lambda key: preconditioned.noise(key, PARAMS, 100.0),
    "numbers of Python": lambda key: preconditioned.noise(
        key, {"a": 4.0, "b": 2.0}, 100.0
    ),
}


@pytest.mark.parametrize("name", CALLERS)
def test_every_caller_draws_leaves_together_and_the_same(name, key, monkeypatch):
    call = CALLERS[name]
    expected = call(key)  # on several devices: leaf by leaf
    one_by_one = drawn_by(lambda key: call(key), key)  # traced anew
    monkeypatch.setattr(shards, "on_one_device", lambda: True)
    together = drawn_by(lambda key: call(key), key)
    assert 0 < len(together) < len(one_by_one)
    for found, want in zip(*map(jax.tree.leaves, (call(key), expected)), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_a_second_call_outside_of_jit_compiles_nothing(one_device, key):
    leaves = {i: jnp.zeros(shape) for i, shape in enumerate(SHAPES)}
    draws.normals(key, leaves)
    seen = []

    def listen(event, duration, **_):
        seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        draws.normals(jax.random.fold_in(key, 1), leaves)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in seen if "backend_compile" in event]


def test_noise_has_the_dtype_of_the_step(one_device, key):
    with jax.enable_x64(True):
        params = {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.ones(4, jnp.float32)}
        still = jax.tree.map(jnp.zeros_like, params)
        wide = jnp.float64(0.1)  # steps have the wider of two dtypes
        moved, _ = ascent.ascend(params, still, wide, noise_std=1.0, key=key)
        leaves = {i: x.astype(wide.dtype) for i, x in enumerate(params.values())}
        drawn = alone(key, leaves)
    for i, x in enumerate(moved.values()):
        np.testing.assert_allclose(x, 1 + np.array(drawn[i]), rtol=1e-5, atol=1e-6)
