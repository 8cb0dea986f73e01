"""The Hessian against dense ones by jax.hessian, NumPy's eigenvalues, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from otmdr_jax import landscape, models
from tests.marks import slow_but

ONE = [np.zeros(1)]


def network(seed=0):
    """A network of 67 weights, batches of different sizes, and its dense Hessian."""
    rng = np.random.default_rng(seed)
    params = {
        "in": (rng.normal(size=(4, 8)), rng.normal(size=8)),
        "out": rng.normal(size=(8, 3)),
        "bias": rng.normal(size=3),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    x, y = rng.normal(size=(20, 4)).astype(np.float32), rng.integers(0, 3, 20)
    batches = [(x[i:j], y[i:j]) for i, j in ((0, 7), (7, 9), (9, 20))]
    flat, unravel = ravel_pytree(params)

    def mean(flat):
        total, count = network_loss(unravel(flat), (x, y))
        return total / count

    return params, batches, np.asarray(jax.jit(jax.hessian(mean))(flat), float)


def network_loss(params, batch):
    hidden = jnp.tanh(batch[0] @ params["in"][0] + params["in"][1][None])
    logits = hidden @ params["out"] + params["bias"][None]
    # Of integer labels JAX 0.12 cannot take the gradient on explicit axes.
    labels = jax.nn.one_hot(batch[1], logits.shape[-1])
    return jnp.sum(optax.softmax_cross_entropy(logits, labels)), len(batch[1])


def quadratic(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    return lambda w, batch: (0.5 * w @ matrix @ w * len(batch), len(batch))


def rotated(values, seed=0):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return basis, basis * np.asarray(values) @ basis.T


class TestProduct:
    @pytest.mark.slow
    def test_is_that_of_the_dense_hessian(self, key):
        params, batches, dense = network()
        flat, unravel = ravel_pytree(params)
        v = jax.random.normal(key, flat.shape)
        got = landscape.hessian_product(network_loss, params, batches, unravel(v))
        assert jax.tree.structure(got) == jax.tree.structure(params)
        want = dense @ np.asarray(v, float)
        np.testing.assert_allclose(ravel_pytree(got)[0], want, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_mask_cuts_rows_and_columns(self, key):
        params, batches, dense = network()
        mask = {"in": (True, False), "out": True, "bias": False}
        flat, unravel = ravel_pytree(params)
        moves = np.asarray(
            ravel_pytree(jax.tree.map(lambda x, m: x * 0 + m, params, mask))[0], bool
        )
        v = jax.random.normal(key, flat.shape)
        got = landscape.hessian_product(
            network_loss, params, batches, unravel(v), mask=mask
        )
        want = np.where(moves, dense @ np.where(moves, v, 0), 0)
        np.testing.assert_allclose(ravel_pytree(got)[0], want, rtol=1e-4, atol=1e-5)

    def test_refuses_a_vector_of_another_structure_or_shape(self):
        params, batches, _ = network()
        for vector in (params["in"], params | {"bias": jnp.ones(4)}):
            with pytest.raises(ValueError, match="structure and shapes of params"):
                landscape.hessian_product(network_loss, params, batches, vector)


class TestEigenvalues:
    @pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
    @pytest.mark.parametrize("k", slow_but([5], [1, 5]))
    def test_are_those_of_the_dense_hessian(self, which, k):
        params, batches, dense = network()
        values = np.linalg.eigvalsh(dense)
        assert values[0] < -1e-2  # no minimum: the three orders differ
        order = {
            "largest": -values,
            "smallest": values,
            "magnitude": -np.abs(values),
        }[which]
        want = values[np.argsort(order)[:k]]
        found = landscape.hessian_eigenvalues(
            network_loss, params, batches, k, which=which, tol=1e-5
        )
        np.testing.assert_allclose(found.values, want, rtol=1e-4, atol=1e-5)
        rows = np.stack([ravel_pytree(v)[0] for v in found.vectors]).astype(float)
        np.testing.assert_allclose(rows @ rows.T, np.eye(k), atol=1e-4)
        off = rows @ dense - found.values[:, None] * rows
        assert (np.linalg.norm(off, axis=1) < 1e-3 * np.abs(values).max()).all()
        for row in rows:
            assert row[np.abs(row).argmax()] > 0

    def test_residuals_bound_the_error_at_any_tolerance(self):
        _, matrix = rotated(np.linspace(0, 1, 300) ** 2)
        found = landscape.hessian_eigenvalues(
            quadratic(matrix), jnp.ones(300), ONE, 2, tol=0.05
        )
        matrix = np.asarray(matrix, np.float32).astype(float)
        rows = np.stack(found.vectors).astype(float)
        want = np.linalg.norm(rows @ matrix - found.values[:, None] * rows, axis=1)
        assert want.max() > 1e-5  # the tolerance is loose
        np.testing.assert_allclose(found.residuals, want, rtol=0.05, atol=1e-6)

    def test_multiple_ones_come_as_often_as_they_occur(self):
        basis, matrix = rotated([7.0, 5.0, 5.0, 5.0, *np.linspace(-2, 1, 60)])
        found = landscape.hessian_eigenvalues(quadratic(matrix), jnp.ones(64), ONE, 4)
        np.testing.assert_allclose(found.values, [7, 5, 5, 5], rtol=1e-4)
        inside = np.stack(found.vectors) @ basis[:, :4]
        np.testing.assert_allclose(inside @ inside.T, np.eye(4), atol=1e-3)
        assert abs(found.vectors[0] @ basis[:, 0]) == pytest.approx(1, abs=1e-4)

    @pytest.mark.slow
    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 30), st.integers(0, 10), st.data())
    def test_of_any_symmetric_matrix(self, size, seed, data):
        k = data.draw(st.integers(1, size))
        matrix = np.random.default_rng(seed).normal(size=(size, size))
        matrix = np.float32(matrix + matrix.T)
        found = landscape.hessian_eigenvalues(
            quadratic(matrix), jnp.ones(size), ONE, k, which="smallest", tol=1e-5
        )
        want = np.linalg.eigvalsh(matrix.astype(float))[:k]
        np.testing.assert_allclose(found.values, want, atol=1e-3)

    def test_of_a_linear_model_each_comes_once_for_each_output(self):
        """Least squares with ten outputs: ten times the values of X'X / N."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(200, 20)) * np.linspace(1, 3, 20)
        x = np.float32(x @ np.linalg.qr(rng.normal(size=(20, 20)))[0])

        def loss_sum(w, batch):
            return jnp.sum((batch @ w) ** 2) / 2, len(batch)

        want = np.linalg.eigvalsh(x.T.astype(float) @ x / 200)[::-1]
        assert want[0] > 1.05 * want[1]
        found = landscape.hessian_eigenvalues(
            loss_sum, jnp.zeros((20, 10)), [x[:90], x[90:]], 12
        )
        expected = [*want[[0] * 10], *want[[1] * 2]]
        np.testing.assert_allclose(found.values, expected, rtol=1e-5)
        rows = np.stack([np.ravel(v) for v in found.vectors])
        np.testing.assert_allclose(rows @ rows.T, np.eye(12), atol=1e-5)
        assert found.residuals.max() < 1e-4 * want[0]

    @pytest.mark.parametrize(("k", "most"), [(1, 21), (5, 45)])
    def test_products_are_counted_and_few_where_values_stand_apart(self, k, most):
        passes = []

        class Batches:
            def __iter__(self):
                passes.append(1)
                return iter(ONE)

        values = np.concatenate([[60, 40, 30, 24, 19, 15], np.linspace(-1, 1, 394)])
        found = landscape.hessian_eigenvalues(
            quadratic(np.diag(values)), jnp.zeros(400), Batches(), k
        )
        np.testing.assert_allclose(found.values, values[:k], rtol=1e-5)
        assert found.products == len(passes) <= most

    @pytest.mark.slow
    def test_a_mask_restricts_them(self):
        params, batches, dense = network()
        mask = {"in": (False, False), "out": True, "bias": False}
        found = landscape.hessian_eigenvalues(
            network_loss, params, batches, 2, mask=mask, tol=1e-5
        )
        want = np.linalg.eigvalsh(dense[-24:, -24:])  # "out" is the last of them
        np.testing.assert_allclose(found.values, want[::-1][:2], rtol=1e-4)
        assert not found.vectors[0]["bias"].any() and found.vectors[0]["out"].any()

    def test_a_linear_loss_has_none_but_zero(self):
        def linear(w, batch):
            return jnp.sum(w), 1

        found = landscape.hessian_eigenvalues(linear, jnp.ones(40), ONE, 3)
        np.testing.assert_array_equal(found.values, np.zeros(3))
        np.testing.assert_array_equal(found.residuals, np.zeros(3))
        assert np.linalg.matrix_rank(np.stack(found.vectors)) == 3

    def test_are_the_same_each_time(self):
        params, batches, _ = network()
        one, two = (
            landscape.hessian_eigenvalues(network_loss, params, batches, 2)
            for _ in range(2)
        )
        np.testing.assert_array_equal(one.values, two.values)
        jax.tree.map(np.testing.assert_array_equal, one.vectors, two.vectors)

    def test_says_when_it_has_not_converged(self):
        with pytest.raises(RuntimeError, match=r"0 of 3 eigenvalues .* max_restarts"):
            landscape.hessian_eigenvalues(
                lambda w, batch: (0.5 * jnp.linspace(0, 1, 2001) @ w**2, 1),
                jnp.ones(2001),
                ONE,
                3,
                which="smallest",
                tol=1e-6,
                max_restarts=2,
            )

    def test_refuses_what_is_not_finite(self):
        params, batches, _ = network()
        params = params | {"bias": params["bias"] * np.nan}
        with pytest.raises(ValueError, match="Hessian is not finite"):
            landscape.hessian_eigenvalues(network_loss, params, batches)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(k=0), "k must be at least 1, got 0"),
            (dict(k=2.0), "k must be an integer"),
            (dict(k=4), "k must be between 1 and the 3 weights"),
            (dict(which="top"), "which must be one of"),
            (dict(tol=0.0), "tol must be a positive"),
            (dict(max_restarts=0), "max_restarts must be at least 1"),
            (dict(max_restarts=2.5), "max_restarts must be an integer"),
        ],
    )
    def test_bad_options_say_what_must_hold(self, options, message):
        with pytest.raises((ValueError, TypeError), match=message):
            landscape.hessian_eigenvalues(
                quadratic(np.eye(3)), jnp.ones(3), ONE, **options
            )


class TestTrace:
    def test_is_exact_for_a_diagonal(self, key):
        """z'Hz is the trace whatever the signs."""
        found = landscape.hessian_trace(
            quadratic(np.diag([1.0, 2.0, 4.0])), jnp.ones(3), ONE, key=key, num_probes=5
        )
        assert found.value == 7 and found.standard_error == 0

    @pytest.mark.slow
    def test_is_that_of_the_dense_hessian_within_its_error(self, key):
        params, batches, dense = network()
        found = landscape.hessian_trace(
            network_loss, params, batches, key=key, num_probes=400
        )
        off = dense - np.diag(np.diag(dense))
        want = np.sqrt(2 * np.sum(off**2) / 400)
        assert found.standard_error == pytest.approx(want, rel=0.15)
        assert abs(found.value - np.trace(dense)) < 4 * want
        assert found.value == pytest.approx(np.mean(found.samples))
        assert len(np.unique(found.samples)) == 400

    def test_signs_differ_between_leaves_of_one_shape(self, key):
        """a'b has trace 0; the same signs in both would give 2 x 50 each time."""

        def bilinear(params, batch):
            return jnp.vdot(params["a"], params["b"]), 1

        params = {"a": jnp.ones(50), "b": jnp.ones(50)}
        found = landscape.hessian_trace(bilinear, params, ONE, key=key)
        assert abs(found.value) < 4 * found.standard_error
        # Two entries of 1 a row pair: the variance of a probe is 2 x 100.
        assert found.standard_error == pytest.approx(np.sqrt(200 / 100), rel=0.3)

    @pytest.mark.slow
    def test_is_the_average_sharpness_of_small_noise(self, key):
        _, matrix = rotated([3.0, 2.0, 1.0, -1.0])
        at = (quadratic(matrix), jnp.zeros(4), ONE)
        found = landscape.average_sharpness(*at, 0.1, key=key, num_directions=500)
        assert abs(found.gap - 0.1**2 * 5 / 2) < 4 * found.standard_error
        traced = landscape.hessian_trace(*at, key=key, num_probes=500)
        assert abs(traced.value - 5) < 4 * traced.standard_error

    def test_needs_two_probes(self, key):
        with pytest.raises(ValueError, match="num_probes must be at least 2"):
            landscape.hessian_trace(
                quadratic(np.eye(3)), jnp.ones(3), ONE, key=key, num_probes=1
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "kind"),
    [(1, AxisType.Explicit), (4, AxisType.Explicit), (4, AxisType.Auto)],
)
def test_batches_may_be_spread_over_devices(devices, kind, key):
    params, batches, dense = network()
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    mesh = jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices], axis_types=(kind,)
    )
    spread = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    found = landscape.hessian_eigenvalues(network_loss, params, [spread], 2, tol=1e-5)
    want = np.linalg.eigvalsh(dense)[::-1][:2]
    np.testing.assert_allclose(found.values, want, rtol=1e-4)
    traced = landscape.hessian_trace(
        network_loss, params, [spread], key=key, num_probes=10
    )
    one = landscape.hessian_trace(
        network_loss, network()[0], batches, key=key, num_probes=10
    )
    np.testing.assert_allclose(traced.samples, one.samples, rtol=1e-3)


# -- a network of the zoo -------------------------------------------------------------


def of_the_zoo(name, key):
    model = models.create(name, 4)
    images = jax.random.normal(key, (6, 8, 8, 3))
    params, state = jax.jit(model.init)(key, images)
    labels = jnp.arange(6) % 4

    def loss_sum(params, batch):
        logits, _ = model.apply(params, state, batch[0], train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return jnp.sum(losses), len(batch[1])

    logits, _ = jax.jit(lambda p: model.apply(p, state, images, train=False))(params)
    return loss_sum, params, (images, labels), np.asarray(logits, float)


@pytest.mark.slow
def test_convolutions_go_forward_over_reverse(key):
    """Against reverse over reverse, and the closed form of the last bias' Hessian."""
    loss_sum, params, batch, logits = of_the_zoo("cnn_small", key)
    v = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(2), slice(2, 6))]
    got = landscape.hessian_product(loss_sum, params, halves, v)

    @jax.jit
    def reverse_over_reverse(params):
        def along(p):
            grads = jax.grad(lambda q: loss_sum(q, batch)[0] / 6)(p)
            return sum(map(jnp.vdot, jax.tree.leaves(grads), jax.tree.leaves(v)))

        return jax.grad(along)(params)

    want = ravel_pytree(reverse_over_reverse(params))[0]
    error = np.linalg.norm(ravel_pytree(got)[0] - want)
    assert error < 1e-4 * np.linalg.norm(want)

    paths = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    mask = jax.tree.map(lambda path: "head" in path and "bias" in path, paths)
    assert sum(jax.tree.leaves(mask)) == 1
    found = landscape.hessian_eigenvalues(loss_sum, params, halves, 4, mask=mask)
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    dense = np.diag(p.mean(axis=0)) - p.T @ p / len(p)
    np.testing.assert_allclose(
        found.values, np.linalg.eigvalsh(dense)[::-1], rtol=1e-4, atol=1e-6
    )
