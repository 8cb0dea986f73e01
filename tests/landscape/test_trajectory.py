"""The plane of a training run against scikit-learn, NumPy's SVD and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otmdr_jax import landscape


def run(seed, count, scale=1.0):
    """Checkpoints of two leaves that floats move, and one that is no float."""
    rng = np.random.default_rng(seed)
    return [
        {
            "w": np.float32(scale * rng.normal(size=(4, 3))),
            "b": np.float32(rng.normal(size=5)),
            "count": np.int32(i),
        }
        for i in range(count)
    ]


def flat(solutions):
    rows = [np.concatenate([np.ravel(s["b"]), np.ravel(s["w"])]) for s in solutions]
    return np.stack(rows).astype(np.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 9), st.sampled_from([1e-2, 1.0, 1e2]))
def test_components_are_those_of_scikit_learn(seed, count, scale):
    decomposition = pytest.importorskip("sklearn.decomposition")
    solutions = run(seed, count, scale)
    found = landscape.trajectory_plane(solutions)
    rows = flat(solutions)
    pca = decomposition.PCA(2).fit(rows)
    np.testing.assert_allclose(found.explained, pca.explained_variance_ratio_, 1e-6)
    ours = flat(found.directions)
    np.testing.assert_allclose(ours @ ours.T, np.eye(2), atol=1e-5)
    cosines = np.sum(ours * pca.components_, axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)
    # The projections of theta_i - theta_n, whatever scikit-learn's signs.
    want = (rows - rows[-1]) @ pca.components_.T * np.sign(cosines)
    np.testing.assert_allclose(found.points, want, atol=1e-4 * np.abs(want).max())
    assert not found.directions[0]["count"].any()


@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_run_in_a_plane_is_reached_and_explained(dimensions):
    """Three points span a plane, two a line: nothing is left over."""
    solutions = run(0, dimensions + 1)
    found = landscape.trajectory_plane(solutions, dimensions)
    assert found.explained.sum() == pytest.approx(1)
    assert found.origin is solutions[-1] and found.points.shape[1] == dimensions
    np.testing.assert_allclose(found.points[-1], 0, atol=1e-6)
    reached = flat([found.origin]) + found.points @ flat(found.directions)
    np.testing.assert_allclose(reached, flat(solutions), atol=1e-5)
    assert (found.points[np.abs(found.points).argmax(0), range(dimensions)] > 0).all()


def test_losses_of_a_quadratic_in_the_plane_are_its_closed_form():
    """Gradient descent on 0.5 w'Aw: the two slow axes carry most of the way."""
    curvature = np.array([1.0, 3.0, 10.0])
    start = np.array([2.0, -1.0, 0.3])
    path = [jnp.asarray(start * (1 - 0.05 * curvature) ** i) for i in range(12)]
    plane = landscape.trajectory_plane(path)

    def loss_sum(w, batch):
        return 0.5 * jnp.sum(jnp.asarray(curvature, w.dtype) * w**2), 1

    axes = [np.linspace(-1, 2, 7), np.linspace(-1, 1, 5)]
    found = landscape.loss_grid(loss_sum, plane.origin, [None], plane.directions, axes)
    x, y = (np.asarray(d, np.float64) for d in plane.directions)
    last = np.asarray(path[-1], np.float64)
    for i, a in enumerate(axes[0]):
        for j, b in enumerate(axes[1]):
            w = last + a * x + b * y
            assert found[i, j] == pytest.approx(0.5 * curvature @ w**2, rel=1e-4)
    assert plane.explained[0] > 0.8 and plane.explained.sum() > 0.98


def test_memory_is_not_that_of_weights_by_weights():
    """300,000 weights squared would be 720 GB."""
    keys = jax.random.split(jax.random.key(0), 4)
    solutions = [{"w": jax.random.normal(k, (300, 1000))} for k in keys]
    found = landscape.trajectory_plane(solutions)
    rows = np.stack([np.ravel(s["w"]) for s in solutions]).astype(np.float64)
    singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    np.testing.assert_allclose(
        found.explained, singular[:2] ** 2 / np.sum(singular**2), rtol=1e-6
    )


LINE = [np.float32([1.0, 0.3, 0.2]) * c for c in (0.1, 0.7, 2.0)]


@pytest.mark.parametrize(
    ("solutions", "dimensions", "message"),
    [
        ([np.ones(2)] * 2, 2, "at least 3 solutions, got 2"),
        ([np.ones(2)], 1, "at least 2 solutions, got 1"),
        ([np.ones(2)] * 3, 3, "dimensions must be 1 or 2"),
        ([np.ones(2)] * 3, 2, "coincide"),
        (LINE, 2, "use dimensions=1"),
        ([np.ones(2), np.ones(2), np.ones(3)], 2, "same structure and shapes"),
        ([np.ones(2), np.array([np.nan, 1]), np.zeros(2)], 2, "finite"),
    ],
)
def test_bad_input_says_what_must_hold(solutions, dimensions, message):
    with pytest.raises(ValueError, match=message):
        landscape.trajectory_plane(solutions, dimensions)
