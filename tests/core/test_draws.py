"""Numbers of leaves that are drawn together are those of each leaf alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from otmdr_jax import bnn
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
    """How many numbers each draw in the traced program has."""
    jaxpr = jax.make_jaxpr(lambda key: draws.normals(key, leaves))(key)
    return list(numbers_of(jaxpr.jaxpr))


def numbers_of(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":  # a row at a time, on CPUs
            yield eqn.params["length"] * sum(numbers_of(eqn.params["jaxpr"].jaxpr))
        elif "normal" in str(eqn.params.get("name")):
            yield eqn.outvars[0].aval.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_they_have_the_numbers_that_they_have_alone(dtype, one_device, key):
    leaves = {2 * i: jnp.zeros(shape, dtype) for i, shape in enumerate(SHAPES)}
    assert_same(draws.normals(key, leaves), alone(key, leaves))
    some = {i: leaves[i] for i in (4, 6, 18)}  # the others' numbers do not matter
    assert_same(draws.normals(key, some), alone(key, some))


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


def test_ascent_and_posteriors_draw_so(one_device, key):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(())}
    still = jax.tree.map(jnp.zeros_like, params)
    moved, _ = ascent.ascend(params, still, 0.1, noise_std=0.5, key=key)
    leaves = dict(enumerate(jax.tree.leaves(params)))
    expected = jax.tree.unflatten(
        jax.tree.structure(params), alone(key, leaves).values()
    )
    for name, x in expected.items():
        np.testing.assert_allclose(moved[name], 1 + 0.5 * x, rtol=1e-5, atol=1e-6)
    q = bnn.init(params, sigma=0.5)
    drawn = bnn.sample(q, key)
    for name, x in expected.items():
        np.testing.assert_allclose(drawn[name], 1 + 0.5 * x, rtol=1e-5, atol=1e-6)
