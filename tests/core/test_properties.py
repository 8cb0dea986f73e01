"""Properties that hold for any shapes, dtypes, batch sizes, K and radii."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import otmdr_jax
from otmdr_jax.core import batches, tree
from tests.marks import one_axis_at_a_time

# Every example traces anew, which takes a while; the seed is fixed.
settings = hypothesis.settings(
    deadline=None, max_examples=25, derandomize=True, database=None
)
TOLERANCE = {"float32": 2e-4, "bfloat16": 6e-2, "float16": 1e-2}


@st.composite
def problems(draw, dtypes=("float32", "bfloat16", "float16")):
    """A pytree of weights of mixed shapes and dtypes, and a batch."""
    shapes = draw(
        st.lists(
            st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=4
        )
    )
    kinds = [draw(st.sampled_from(dtypes)) for _ in shapes]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    params = {
        str(i): jnp.asarray(rng.normal(size=s) + 1.0, k)
        for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))
    }
    batch = jnp.asarray(rng.normal(size=draw(st.integers(3, 9))), jnp.float32)
    return params, batch


def loss_fn(params, batch):
    """A smooth loss that couples every leaf with the batch."""
    flat = [jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(params)]
    return jnp.mean((sum(flat) - batch) ** 2) + sum(
        jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params)
    )


radii = st.lists(st.floats(0.01, 0.5), min_size=1, max_size=3).map(tuple)


@pytest.mark.slow
@settings
@hypothesis.given(problems(("float32",)), radii, st.integers(1, 3))
def test_particles_stay_within_the_sum_of_the_radii(problem, rho, num_particles):
    params, batch = problem
    info = otmdr_jax.robust_gradient(loss_fn, rho, num_particles=num_particles)(
        params, batch, key=jax.random.key(0)
    ).diagnostics
    assert info.distances.shape == (num_particles,)
    assert np.all(np.asarray(info.distances) <= sum(rho) * (1 + 1e-4))
    if len(rho) == 1:  # one step: exactly on the sphere
        np.testing.assert_allclose(info.distances, rho[0], rtol=1e-3)


@pytest.mark.slow
@settings
@hypothesis.given(problems(), st.integers(1, 3), st.integers(1, 3))
def test_zero_radii_give_the_plain_gradient_in_any_dtype(problem, steps, num_particles):
    params, batch = problem
    value, grads = otmdr_jax.value_and_grad(
        loss_fn, (0.0,) * steps, num_particles=num_particles
    )(params, batch, key=jax.random.key(1))
    expected_value, expected = jax.value_and_grad(loss_fn)(params, batch)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for name, leaf in grads.items():
        assert leaf.dtype == params[name].dtype and leaf.shape == params[name].shape
        np.testing.assert_allclose(
            np.asarray(leaf, np.float32),
            np.asarray(expected[name], np.float32),
            rtol=TOLERANCE[str(leaf.dtype)],
            atol=1e-6,
        )


@pytest.mark.slow
@settings
@hypothesis.given(problems(("float32",)), st.floats(0.01, 1.0))
def test_a_small_ascent_step_raises_the_loss(problem, scale):
    params, batch = problem
    info = otmdr_jax.robust_gradient(loss_fn, 1e-3 * scale, split="shared")(
        params, batch
    ).diagnostics
    predicted = 1e-3 * scale * float(info.ascent_norms[0])
    # First order: the loss grows by rho |g|. Curvature and rounding are the rest.
    rounding = 1e-6 * abs(float(info.center_loss))
    assert float(info.gap) >= 0.5 * predicted - 10 * rounding - 1e-5


@pytest.mark.slow
@settings
@hypothesis.given(problems(), radii)
def test_grads_and_particles_keep_dtypes_and_are_finite(problem, rho):
    params, batch = problem
    _, grads = otmdr_jax.value_and_grad(loss_fn, rho, norm="per_leaf", split="shared")(
        params, batch
    )
    for name, leaf in grads.items():
        assert leaf.dtype == params[name].dtype
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


@pytest.mark.slow
@settings
@hypothesis.given(st.integers(1, 40), st.integers(1, 8), st.booleans())
def test_a_split_drops_nothing_and_is_balanced(size, parts, random):
    hypothesis.assume(size >= parts)
    key = jax.random.key(size) if random else None
    batch = {"x": jnp.arange(size), "y": jnp.arange(2 * size).reshape(size, 2)}
    pieces = batches.split_batch(batch, parts, key)
    sizes = [len(piece["x"]) for piece in pieces]
    assert len(pieces) == parts and max(sizes) - min(sizes) <= 1
    seen = np.concatenate([piece["x"] for piece in pieces])
    np.testing.assert_array_equal(np.sort(seen), np.arange(size))
    for piece in pieces:  # leaves are cut alike
        np.testing.assert_array_equal(piece["y"][:, 0], 2 * piece["x"])
    if not random:
        np.testing.assert_array_equal(seen, np.arange(size))


@settings
@hypothesis.given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), st.integers(-30, 30)
)
def test_norm_is_homogeneous_over_sixty_orders_of_magnitude(values, exponent):
    hypothesis.assume(max(map(abs, values)) > 1e-3)
    scale = np.float32(10.0**exponent)
    got = tree.norm({"x": jnp.asarray(values, jnp.float32) * scale})
    expected = np.linalg.norm(np.asarray(values, np.float64)) * float(scale)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.slow
@one_axis_at_a_time(
    shape=[(3,), (), (1,), (1, 1)],
    dtype=["float32", "float64", "complex64", "complex128"],
)
def test_norm_of_all_normal_numbers(dtype, shape):
    """Compiled: of a scalar XLA squares the factor that keeps its square in range."""
    lowest, highest = (-36, 36) if dtype in ("float32", "complex64") else (-300, 300)
    with jax.enable_x64(highest == 300):
        norm = jax.jit(tree.norm)
        slope = jax.jit(jax.grad(lambda x: tree.norm({"x": x})))
        for exponent in range(lowest, highest + 1, 12):
            x = np.full(shape, 10.0**exponent, dtype)
            got = norm({"x": x}) if exponent % 24 else norm([x, 0 * x])
            want = float(np.abs(x).ravel()[0]) * max(x.size, 1) ** 0.5
            np.testing.assert_allclose(float(got), want, rtol=1e-6)
            np.testing.assert_allclose(slope(x), max(x.size, 1) ** -0.5, rtol=1e-6)
        assert norm([x.real, x]).dtype == x.real.dtype


def test_norm_that_nothing_can_be_divided_by_is_not_finite():
    """A product with 1 / 1e38, which is subnormal, would be 0: no step, and no word."""
    assert np.isfinite(tree.norm(jnp.full(4, 4e37)))
    assert np.isinf(tree.norm(jnp.full(4, 5e37)))
    assert np.isnan(tree.norm(jnp.array([jnp.nan, 1.0])))
    with jax.enable_x64(True):  # float32 beside float64
        got = tree.norm([jnp.full(1, 3e-36, jnp.float32), jnp.full(1, 4e-36)])
        np.testing.assert_allclose(got, 5e-36, rtol=1e-6)
        assert float(tree.norm([jnp.ones(1, jnp.float32), jnp.full(1, 1e200)])) == 1e200


@pytest.mark.slow
@settings
@hypothesis.given(st.integers(1, 5), st.integers(1, 4))
def test_stack_and_unstack_are_inverse(count, size):
    trees = [{"a": jnp.full(size, i), "b": jnp.asarray(i)} for i in range(count)]
    for got, want in zip(tree.unstack(tree.stack(trees)), trees, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
