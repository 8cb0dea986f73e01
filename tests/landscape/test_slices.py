"""Slices against direct evaluation, NumPy's norms and geometry by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otmdr_jax import landscape
from otmdr_jax.landscape import slices
from otmdr_jax.landscape.objective import Objective
from tests import toy


def least_squares(params, batch):
    residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.sum(residual**2), len(batch["y"])


LINE = jnp.array([0.1, 0.2, 0.3])


def halves(data):
    return [jax.tree.map(lambda x: x[:5], data), jax.tree.map(lambda x: x[5:], data)]


class TestGrid:
    def test_is_direct_evaluation_in_float64(self):
        params, data = toy.regression_problem()
        rng = np.random.default_rng(1)
        x, y = (
            {"w": np.float32(rng.normal(size=4)), "b": np.float32(rng.normal())}
            for _ in range(2)
        )
        first, second = [-1.0, 0.0, 0.5], [0.0, 2.0]
        found = landscape.loss_grid(
            least_squares, params, halves(data), [x, y], [first, second]
        )
        assert found.shape == (3, 2) and found.dtype == np.float64
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                w = params["w"] + a * x["w"] + b * y["w"]
                bias = params["b"] + a * x["b"] + b * y["b"]
                want = np.mean((data["x"] @ w + bias - data["y"]) ** 2)
                assert found[i, j] == pytest.approx(want, rel=1e-5)

    def test_points_of_float64_weights_are_float64(self):
        with jax.enable_x64(True):
            w = jnp.zeros(1)
            found = landscape.loss_grid(
                lambda w, _: (w[0], 1), w, [None], [w + 1.0], [[0.1]]
            )
        assert found.tolist() == [0.1]

    def test_along_an_eigenvector_is_a_parabola_of_its_eigenvalue(self):
        params, data = toy.regression_problem()
        batches = halves(data)
        top = landscape.hessian_eigenvalues(least_squares, params, batches)
        steps = np.linspace(-1, 1, 9)
        losses = landscape.loss_grid(
            least_squares, params, batches, top.vectors, [steps]
        )
        curvature = np.polynomial.polynomial.polyfit(steps, losses, 2)[2]
        assert curvature == pytest.approx(top.values[0] / 2, rel=1e-4)

    def test_is_compiled_once_and_reads_the_set_once(self):
        traced, read = [], []

        def loss_sum(w, batch):
            traced.append(batch.shape)
            return jnp.sum(batch @ w), len(batch)

        class Set:
            def __iter__(self):
                for n in (3, 3, 2):
                    read.append(n)
                    yield np.ones((n, 2), np.float32)

        for scale in (1.0, 2.0):
            found = landscape.loss_grid(
                loss_sum, jnp.ones(2) * scale, Set(), [jnp.ones(2)], [range(40)]
            )
            np.testing.assert_allclose(found, 2 * (scale + np.arange(40)), rtol=1e-6)
        assert len(traced) == 2 and read == [3, 3, 2] * 2

    def test_leaves_that_are_no_floats_stay(self):
        params = {"w": jnp.array([1.0, 2.0]), "pick": jnp.array([1])}

        def loss_sum(params, batch):
            return params["w"][params["pick"]][0], 1

        direction = {"w": jnp.array([0.0, 3.0]), "pick": jnp.array([-1])}
        found = landscape.loss_grid(loss_sum, params, [None], [direction], [[0, 1]])
        np.testing.assert_allclose(found, [2.0, 5.0])

    def test_what_is_not_finite_is_shown(self):
        def loss_sum(w, batch):
            return jnp.log(w), 1

        found = landscape.loss_grid(
            loss_sum, jnp.array(0.0), [None], [jnp.array(1.0)], [[-1, 0, 1]]
        )
        np.testing.assert_array_equal(found, [np.nan, -np.inf, 0])

    @pytest.mark.parametrize("at_once", [2, 5, 40])
    def test_points_at_once_are_the_same_grid(self, at_once):
        params, data = toy.regression_problem()
        rng = np.random.default_rng(1)
        directions = [{"w": np.float32(rng.normal(size=4)), "b": np.float32(0.5)}]
        arguments = (least_squares, params, halves(data), directions, [range(7)])
        one = landscape.loss_grid(*arguments)
        several = landscape.loss_grid(*arguments, at_once=at_once)
        np.testing.assert_allclose(several, one, rtol=1e-5)

    @pytest.mark.parametrize("at_once", [1, 3])
    def test_goes_on_to_the_same_bits(self, at_once, monkeypatch):
        params, data = toy.regression_problem()
        rng = np.random.default_rng(1)
        directions = [
            {"w": np.float32(rng.normal(size=4)), "b": np.float32(0.5)}
            for _ in range(2)
        ]
        axes = [np.linspace(-1, 1, 7), np.linspace(0, 2, 5)]
        arguments = (least_squares, params, halves(data), directions, axes)
        whole = landscape.loss_grid(*arguments, at_once=at_once)
        # So that a pass is of one call: many reports.
        monkeypatch.setattr("otmdr_jax.landscape.slices.SECONDS_A_REPORT", 0.0)
        reports = []

        def stop(losses):
            reports.append(losses)
            if len(reports) == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            landscape.loss_grid(*arguments, at_once=at_once, report=stop)
        assert [len(losses) for losses in reports] == [
            at_once * i for i in (1, 2, 3, 4)
        ]
        later = []
        # One point more than whole calls: what was not finished is done again.
        for known in (reports[-1], whole.ravel()[: 2 * at_once + at_once // 2]):
            found = landscape.loss_grid(
                *arguments, at_once=at_once, known=known, report=later.append
            )
            np.testing.assert_array_equal(found, whole)
        np.testing.assert_array_equal(later[-1], whole.ravel())
        # Blocks start where they do in the uninterrupted grid.
        assert all(len(x) % at_once == 0 or len(x) == whole.size for x in later)

    def test_known_points_are_not_evaluated(self):
        def fails(w, batch):
            raise AssertionError

        found = landscape.loss_grid(
            fails, jnp.ones(2), [None], [jnp.ones(2)], [[0, 1]], known=[3.0, np.nan]
        )
        np.testing.assert_array_equal(found, [3.0, np.nan])

    def test_as_many_at_once_as_half_of_the_memory_holds(self):
        def loss_sum(w, batch):
            return jnp.sum(jnp.sort(jnp.sin(batch * w))), 1

        whole = Objective(loss_sum, jnp.array(1.0), [jnp.ones(10_000)])
        directions = [[jnp.array(1.0)]]
        each = whole.bytes_of_a_point(directions)
        assert each >= 4 * 10_000  # a float32 for each example
        for free, want in ((None, 1), (each, 1), (7 * each, 3), (10**12, 16)):
            assert slices._fitting(whole, directions, free) == want

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (dict(known=[0, 1, 2]), "at most the grid's 2 losses"),
            (dict(known=0.0), "at most the grid's 2 losses"),
            (dict(at_once=0), "at_once must be at least 1"),
            (dict(directions=[], axes=[]), "same number"),
            (dict(axes=[[0], [1]]), "same number"),
            (dict(axes=[[]]), "vector of finite numbers"),
            (dict(axes=[0.5]), "vector of finite numbers"),
            (dict(axes=[[np.inf]]), "vector of finite numbers"),
            (dict(directions=[{"w": jnp.ones(2)}]), "structure and shapes of params"),
            (dict(directions=[jnp.ones(3)]), "structure and shapes of params"),
            (dict(batches=[]), "at least one batch"),
        ],
    )
    def test_bad_input_says_what_must_hold(self, call, message):
        arguments = dict(
            loss_sum=lambda w, _: (jnp.sum(w), 1),
            params=jnp.ones(2),
            batches=[None],
            directions=[jnp.ones(2)],
            axes=[[0, 1]],
        )
        with pytest.raises(ValueError, match=message):
            landscape.loss_grid(**arguments | call)
        with pytest.raises(TypeError, match="must be a list of pytrees"):
            landscape.loss_grid(**arguments | dict(directions=jnp.ones(2)))


class TestRandomDirection:
    def params(self, key):
        return {
            "conv": 3 * jax.random.normal(key, (3, 3, 2, 5)),
            "dense": jax.random.normal(key, (4, 6)),
            "bias": jnp.ones(6),
        }

    def test_kernels_without_entries_stay(self, key):
        found = landscape.random_direction({"w": jnp.zeros((0, 3))}, key)
        assert found["w"].shape == (0, 3)

    @pytest.mark.parametrize("axis", [1, 3, -2, 0.5])
    def test_an_axis_that_means_another_one_elsewhere_is_refused(self, axis, key):
        # 3 % 2 is the outputs of a dense kernel, and 3 % 3 the taps of a 1-D one.
        with pytest.raises(ValueError, match="filter_axis must be -1"):
            landscape.random_direction(
                {"w": jnp.ones((2, 2, 3))}, key, filter_axis=axis
            )

    @pytest.mark.slow
    @pytest.mark.parametrize("axis", [-1, 0])
    def test_filters_have_the_norms_of_the_weights(self, axis, key):
        params = self.params(key)
        found = landscape.random_direction(params, key, filter_axis=axis)
        for name in ("conv", "dense"):
            rows, of_weights = (
                np.moveaxis(np.asarray(t[name]), axis, 0).reshape(
                    t[name].shape[axis], -1
                )
                for t in (found, params)
            )
            np.testing.assert_allclose(
                np.linalg.norm(rows, axis=1),
                np.linalg.norm(of_weights, axis=1),
                rtol=1e-5,
            )
            cosine = np.sum(rows * of_weights) / np.sum(of_weights**2)
            assert abs(cosine) < 0.9
        assert not found["bias"].any()

    def test_is_that_of_the_key_at_the_scale_of_the_weights(self, key):
        params = self.params(key)
        one, two = (landscape.random_direction(params, key) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, one, two)
        larger = jax.tree.map(lambda x: 7 * x, params)
        scaled = landscape.random_direction(larger, key)
        np.testing.assert_allclose(scaled["conv"], 7 * one["conv"], rtol=1e-5)
        other = landscape.random_direction(params, jax.random.key(1))
        assert not np.allclose(other["conv"], one["conv"])

    @pytest.mark.parametrize("size", [1e-35, 1e-25, 1e25, 1e35])
    def test_filters_of_any_size(self, size, key):
        """The squares of such weights are 0 or infinite in float32."""
        plain = landscape.random_direction({"w": jnp.ones((4, 3))}, key)["w"]
        found = landscape.random_direction({"w": jnp.full((4, 3), size)}, key)["w"]
        np.testing.assert_allclose(found / jnp.float32(size), plain, rtol=1e-5)

    def test_leaves_of_one_shape_differ(self, key):
        found = landscape.random_direction([jnp.ones((4, 4)), jnp.ones((4, 4))], key)
        assert not np.isclose(found[0], found[1]).any()

    def test_mask_holds_leaves(self, key):
        mask = {"conv": False, "dense": True, "bias": True}
        found = landscape.random_direction(self.params(key), key, mask=mask)
        assert not found["conv"].any() and found["dense"].all()


class TestThrough:
    def test_leaves_that_do_not_move_may_be_of_any_kind(self):
        fixed = {"key": jax.random.key(0), "count": jnp.arange(3)}
        one, other = ({"w": w, **fixed} for w in (jnp.zeros(4), jnp.ones(4)))
        (direction,) = landscape.through(one, other).directions
        np.testing.assert_allclose(direction["w"], 1.0)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 1000))
    def test_every_solution_is_at_its_point(self, seed):
        rng = np.random.default_rng(seed)
        solutions = [
            {"a": np.float32(rng.normal(size=(2, 3))), "b": np.float32(rng.normal())}
            for _ in range(3)
        ]
        for chosen in (solutions[:2], solutions):
            found = landscape.through(*chosen)
            for point, solution in zip(found.points, chosen, strict=True):
                reached = found.origin
                for c, d in zip(point, found.directions, strict=True):
                    reached = jax.tree.map(lambda w, x, c=c: w + c * x, reached, d)
                for name in ("a", "b"):
                    np.testing.assert_allclose(
                        reached[name], solution[name], rtol=1e-3, atol=1e-4
                    )
        flat = [np.concatenate([np.ravel(d["a"]), [d["b"]]]) for d in found.directions]
        assert np.linalg.norm(flat[0]) == pytest.approx(np.linalg.norm(flat[1]), 1e-4)
        assert abs(flat[0] @ flat[1]) < 1e-4 * (flat[0] @ flat[0])

    @pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
    def test_solutions_of_any_size(self, size):
        """Of 1e-30 the products of two differences are 0, of 1e30 infinite."""
        one, two = size * jnp.array([4.0, 0.0]), size * jnp.array([1.0, 2.0])
        plane = landscape.through(jnp.zeros(2), one, two)
        want = [[0.0, 0.0], [1.0, 0.0], [0.25, 0.5]]
        np.testing.assert_allclose(plane.points, want, rtol=1e-6)
        np.testing.assert_allclose(plane.directions[1] / size, [0.0, 4.0], atol=1e-6)

    def test_grid_over_the_plane_holds_the_losses_of_the_solutions(self):
        solutions = [toy.regression_problem(seed)[0] for seed in range(3)]
        _, data = toy.regression_problem()
        plane = landscape.through(*solutions)
        for point, solution in zip(plane.points, solutions, strict=True):
            (found,) = landscape.loss_grid(
                least_squares,
                plane.origin,
                halves(data),
                plane.directions,
                point[:, None],
            ).ravel()
            want = np.mean((data["x"] @ solution["w"] + solution["b"] - data["y"]) ** 2)
            assert found == pytest.approx(want, rel=1e-4)

    @pytest.mark.parametrize(
        ("solutions", "message"),
        [
            ((jnp.ones(3), jnp.ones(3)), "coincide"),
            ((jnp.zeros(3), jnp.ones(3), 2 * jnp.ones(3)), "one line"),
            ((jnp.zeros(3), jnp.ones(3), jnp.zeros(3)), "one line"),
            # On the line to rounding.
            (
                (LINE, LINE + 0.7, LINE + 0.3 * jnp.full(3, 0.7)),
                "one line",
            ),
            ((jnp.zeros(3), LINE * jnp.nan), "must be finite: the first"),
            ((jnp.zeros(3), jnp.ones(3), LINE + jnp.inf), "the third holds NaN"),
            ((jnp.zeros(3), jnp.ones(2)), "same structure and shapes"),
            ((jnp.zeros(3), {"w": jnp.ones(3)}), "same structure and shapes"),
        ],
    )
    def test_bad_input_says_what_must_hold(self, solutions, message):
        with pytest.raises(ValueError, match=message):
            landscape.through(*solutions)
