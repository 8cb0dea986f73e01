"""Sharpness against closed forms, NumPy in float64 and plain evaluations."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from otmdr_jax import landscape, models
from otmdr_jax.landscape.objective import Objective
from tests import toy

CURVATURE = np.array([1.0, 3.0, 10.0])
SLOPE = np.array([0.5, -1.0, 2.0])


def quadratic(w, batch):
    """0.5 w'Aw - b'w for each example; A and b as above."""
    a, b = jnp.asarray(CURVATURE, w.dtype), jnp.asarray(SLOPE, w.dtype)
    return (0.5 * jnp.sum(a * w**2) - jnp.sum(b * w)) * len(batch), len(batch)


def least_squares(params, batch):
    residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.sum(residual**2), len(batch["y"])


def cut(data, sizes):
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda x, n=n, end=end: x[end - n : end], data)
        for n, end in zip(sizes, ends, strict=True)
    ]


def worst_of_quadratic(a, g, rho):
    """max of g'v + 0.5 v'diag(a)v over |v| = rho, by its secular equation."""

    def length(multiplier):
        return np.sqrt(np.sum((g / (multiplier - a)) ** 2)) - rho

    lowest = a.max()
    multiplier = optimize.brentq(length, lowest + 1e-9, lowest + 1e6, xtol=1e-13)
    v = g / (multiplier - a)
    return g @ v + 0.5 * a @ v**2


ONE = [np.zeros(1)]
CENTER = jnp.array([1.0, 2.0, -1.0])
GRADIENT = CURVATURE * np.asarray(CENTER, float) - SLOPE


class TestSamGap:
    @pytest.mark.parametrize("adaptive", [False, True])
    def test_is_one_step_of_numpy(self, adaptive):
        params, data = toy.regression_problem()
        gw, gb = toy.regression_gradient(
            *map(np.float64, params.values()), *data.values()
        )
        tw, tb = (np.abs(x) if adaptive else 1.0 for x in params.values())
        length = np.sqrt(np.sum((tw * gw) ** 2) + (tb * gb) ** 2)
        w = params["w"] + 0.3 * tw**2 * gw / length
        b = params["b"] + 0.3 * tb**2 * gb / length
        loss = np.mean((data["x"] @ params["w"] + params["b"] - data["y"]) ** 2)
        worst = np.mean((data["x"] @ w + b - data["y"]) ** 2)
        found = landscape.sam_gap(
            least_squares, params, cut(data, [5, 3, 4]), 0.3, adaptive=adaptive
        )
        np.testing.assert_allclose(found, (worst - loss, loss, worst), rtol=1e-5)

    def test_mask_holds_leaves_and_leaves_them_out_of_the_norm(self):
        params, data = toy.regression_problem()
        _, gb = toy.regression_gradient(*params.values(), *data.values())
        b = params["b"] + 0.3 * np.sign(gb)
        worst = np.mean((data["x"] @ params["w"] + b - data["y"]) ** 2)
        for mask in ({"w": False, "b": True}, lambda p: {"w": False, "b": True}):
            found = landscape.sam_gap(least_squares, params, [data], 0.3, mask=mask)
            np.testing.assert_allclose(found.worst, worst, rtol=1e-5)


class TestWorstInBall:
    @pytest.mark.parametrize("rho", [0.05, 1.0])
    def test_is_the_maximum_of_a_quadratic(self, rho):
        found = landscape.worst_in_ball(quadratic, CENTER, ONE, rho)
        want = worst_of_quadratic(CURVATURE, GRADIENT, rho)
        assert found.gap == pytest.approx(want, rel=1e-4)
        assert found.worst == pytest.approx(found.loss + want, rel=1e-4)
        one_step = landscape.sam_gap(quadratic, CENTER, ONE, rho).gap
        assert want - one_step > 0.01 * rho**2

    def test_adaptive_is_the_maximum_in_units_of_the_weights(self):
        t = np.abs(np.asarray(CENTER, float))
        found = landscape.worst_in_ball(quadratic, CENTER, ONE, 0.5, adaptive=True)
        want = worst_of_quadratic(t**2 * CURVATURE, t * GRADIENT, 0.5)
        assert found.gap == pytest.approx(want, rel=1e-4)
        assert want != pytest.approx(worst_of_quadratic(CURVATURE, GRADIENT, 0.5), 0.1)

    def test_random_start_leaves_a_minimum_and_the_center_does_not(self, key):
        def bowl(w, batch):
            return 0.5 * jnp.sum(jnp.asarray(CURVATURE, w.dtype) * w**2), 1

        found = landscape.worst_in_ball(bowl, jnp.zeros(3), ONE, 0.3, key=key)
        assert found.gap == pytest.approx(CURVATURE.max() * 0.3**2 / 2, rel=1e-3)
        assert landscape.worst_in_ball(bowl, jnp.zeros(3), ONE, 0.3).gap == 0

    def test_one_step_is_the_sam_gap(self):
        params, data = toy.regression_problem()
        one = landscape.worst_in_ball(least_squares, params, [data], 0.3, steps=1)
        want = landscape.sam_gap(least_squares, params, [data], 0.3)
        np.testing.assert_allclose(one, want, rtol=1e-6)

    def test_finds_a_maximum_inside_and_never_falls_below_the_center(self, key):
        top = jnp.array([1.02, 2.01, -1.03])

        def hill(w, batch):
            return -jnp.sum((w - top) ** 2), 1

        want = float(jnp.sum((CENTER - top) ** 2))
        found = landscape.worst_in_ball(hill, CENTER, ONE, 1.0)
        assert found.gap == pytest.approx(want, rel=1e-2)

        def ridge(w, batch):
            return -jnp.sum(jnp.asarray(CURVATURE, w.dtype) * (w - top) ** 2), 1

        below = landscape.worst_in_ball(ridge, top, ONE, 1.0, key=key, steps=1)
        assert below.gap == 0

    @settings(max_examples=20, deadline=None)
    @given(
        st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3),
        st.floats(0.01, 2.0),
        st.integers(1, 8),
    )
    def test_lies_between_the_sam_gap_and_the_maximum(self, center, rho, steps):
        center = np.float32(center)
        gradient = CURVATURE * center.astype(float) - SLOPE
        if np.abs(gradient).min() < 1e-2:
            return
        center = jnp.asarray(center)
        found = landscape.worst_in_ball(quadratic, center, ONE, rho, steps=steps)
        slack = 1e-5 * (1 + abs(found.loss) + found.gap)
        assert found.gap <= worst_of_quadratic(CURVATURE, gradient, rho) + slack
        assert found.gap >= landscape.sam_gap(quadratic, center, ONE, rho).gap - slack


class TestAverageSharpness:
    @pytest.mark.parametrize("adaptive", [False, True])
    def test_is_that_of_a_quadratic_within_its_error(self, adaptive, key):
        """Mean and variance of g'e + 0.5 e'Ae are known."""
        t = np.abs(np.asarray(CENTER, float)) if adaptive else np.ones(3)
        std, n = 0.3, 1000
        found = landscape.average_sharpness(
            quadratic, CENTER, ONE, std, key=key, num_directions=n, adaptive=adaptive
        )
        mean = std**2 * np.sum(t**2 * CURVATURE) / 2
        variance = np.sum(
            std**2 * (t * GRADIENT) ** 2 + std**4 * (t**2 * CURVATURE) ** 2 / 2
        )
        assert found.standard_error == pytest.approx(np.sqrt(variance / n), rel=0.1)
        assert abs(found.gap - mean) < 4 * found.standard_error
        assert found.gap == pytest.approx(np.mean(found.gaps)) and len(found.gaps) == n

    def test_directions_are_those_of_the_key(self, key):
        one, two = (
            landscape.average_sharpness(quadratic, CENTER, ONE, 0.1, key=k).gaps
            for k in (key, key)
        )
        other = landscape.average_sharpness(
            quadratic, CENTER, ONE, 0.1, key=jax.random.key(1)
        ).gaps
        np.testing.assert_array_equal(one, two)
        assert len(np.unique(np.concatenate([one, other]))) == 40

    def test_mask_holds_leaves(self, key):
        params, data = toy.regression_problem()
        found = landscape.average_sharpness(
            least_squares,
            params,
            [data],
            0.5,
            key=key,
            num_directions=400,
            mask={"w": False, "b": True},
        )
        assert abs(found.gap - 0.25) < 4 * found.standard_error  # std^2 * 2 / 2


def scaled_network(key, factor):
    """A ReLU network that is the same function for every positive factor."""
    a, b = jax.random.split(key)
    return {
        "in": jax.random.normal(a, (4, 5)) * factor,
        "out": jax.random.normal(b, (5, 3)) / factor,
    }


def network_loss(params, batch):
    logits = jax.nn.relu(batch[0] @ params["in"]) @ params["out"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return jnp.sum(losses), len(batch[1])


@pytest.mark.slow
def test_adaptive_versions_see_the_function_not_its_scale(key):
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(20, 4)).astype(np.float32), rng.integers(0, 3, 20))

    def measure(factor, adaptive):
        at = (network_loss, scaled_network(key, factor), [data])
        return np.array(
            [
                landscape.sam_gap(*at, 0.2, adaptive=adaptive).gap,
                landscape.worst_in_ball(*at, 0.2, adaptive=adaptive).gap,
                landscape.average_sharpness(*at, 0.2, key=key, adaptive=adaptive).gap,
            ]
        )

    np.testing.assert_allclose(measure(1.0, True), measure(8.0, True), rtol=1e-3)
    assert (np.abs(measure(1.0, False) / measure(8.0, False) - 1) > 0.1).all()


# -- whole sets -----------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_values_do_not_depend_on_how_the_set_is_cut(sizes):
    params, data = toy.regression_problem(batch=sum(sizes))
    key = jax.random.key(3)
    for measure in (
        lambda batches: landscape.sam_gap(least_squares, params, batches, 0.3),
        lambda batches: landscape.worst_in_ball(least_squares, params, batches, 0.3),
        lambda batches: (
            landscape.average_sharpness(
                least_squares, params, batches, 0.3, key=key, num_directions=4
            ).gaps
        ),
    ):
        np.testing.assert_allclose(
            measure(cut(data, sizes)), measure([data]), rtol=1e-4, atol=1e-5
        )


def test_an_iterator_is_read_once_and_other_sets_in_each_pass():
    params, data = toy.regression_problem()
    want = landscape.worst_in_ball(least_squares, params, [data], steps=3)
    got = landscape.worst_in_ball(
        least_squares, params, (b for b in cut(data, [6, 6])), steps=3
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_no_more_than_a_few_batches_are_alive():
    alive, most = weakref.WeakSet(), []

    class Batch(np.ndarray):
        __hash__ = object.__hash__

    class Set:
        def __iter__(self):
            for i in range(20):
                batch = np.full((4, 3), i, np.float32).view(Batch)
                alive.add(batch)
                most.append(len(alive))
                yield {"x": batch}

    def loss_sum(w, batch):
        return jnp.sum(batch["x"] @ w), 4

    found = landscape.worst_in_ball(loss_sum, jnp.ones(3), Set(), 1.0, steps=2)
    assert found.gap == pytest.approx(9.5 * np.sqrt(3), rel=1e-5)
    assert len(most) == 60 and max(most) <= 3


def test_programs_are_compiled_once_for_each_shape():
    traced = []

    def loss_sum(w, batch):
        traced.append(batch.shape)
        return jnp.sum((batch @ w) ** 2), len(batch)

    batches = [np.ones((n, 3), np.float32) for n in (4, 4, 2, 4)]
    for scale in (1.0, 2.0, 3.0):
        landscape.worst_in_ball(loss_sum, scale * jnp.ones(3), batches, scale, steps=3)
        landscape.sam_gap(loss_sum, scale * jnp.ones(3), batches, scale)
    assert sorted(traced) == [(2, 3), (2, 3), (4, 3), (4, 3)]  # loss, and gradient


def test_sums_over_batches_are_wider_than_bfloat16():
    whole = Objective(
        lambda w, x: (jnp.sum(w * x), 1), jnp.ones((), jnp.bfloat16), [1.0] * 1000
    )
    assert float(whole.gradient(whole.center)[1][0]) == 1.0


def test_leaves_that_are_no_floats_stay(key):
    params = {"w": CENTER, "table": jnp.array([2, 0, 1])}

    def loss_sum(params, batch):
        return quadratic(params["w"][params["table"]][jnp.array([1, 2, 0])], batch)

    for measure in (landscape.sam_gap, landscape.worst_in_ball):
        got = measure(loss_sum, params, ONE, 0.3)
        np.testing.assert_allclose(got, measure(quadratic, CENTER, ONE, 0.3), rtol=1e-5)


@pytest.mark.slow
def test_batchnorm_is_measured_with_its_running_statistics(key):
    """Whatever the batches; the batch's own statistics would depend on them."""
    model = models.create("cnn_small", 4)
    images = jax.random.normal(key, (12, 8, 8, 1))
    labels = jnp.arange(12) % 4
    params, state = jax.jit(model.init)(key, images)
    state = jax.tree.map(lambda x: x + 0.5, state)

    def loss_of(train):
        def loss_sum(params, batch):
            logits, _ = model.apply(params, state, batch[0], train=train)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
            return jnp.sum(losses), len(batch[1])

        return loss_sum

    batches = cut((images, labels), [4, 8])
    running = loss_of(train=False)
    halves = landscape.sam_gap(running, params, batches)
    whole = landscape.sam_gap(running, params, [(images, labels)])
    np.testing.assert_allclose(halves, whole, rtol=1e-4)
    loss, count = jax.jit(running)(params, (images, labels))
    assert whole.loss == pytest.approx(float(loss / count), rel=1e-5)
    of_batch = Objective(loss_of(train=True), params, batches)
    at_once = Objective(loss_of(train=True), params, [(images, labels)])
    assert abs(of_batch.loss(of_batch.center) - at_once.loss(at_once.center)) > 1e-3


# -- bad input ------------------------------------------------------------------------


def test_what_is_not_finite_is_nan(key):
    def cliff(w, batch):
        return jnp.sum(w) / jnp.where(jnp.sum(w) > 2.1, 0.0, 1.0), 1

    found = landscape.worst_in_ball(cliff, CENTER, ONE, 1.0)
    assert np.isnan(found.gap) and np.isnan(found.worst) and found.loss == 2.0
    bad = jnp.array([np.nan, 1.0, 1.0])
    assert np.isnan(landscape.sam_gap(quadratic, bad, ONE).gap)
    assert np.isnan(landscape.worst_in_ball(quadratic, bad, ONE).gap)
    assert np.isnan(landscape.average_sharpness(quadratic, bad, ONE, 0.1, key=key).gap)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(batches=[]), ValueError, "at least one batch"),
        (dict(batches=[np.zeros(0)]), ValueError, "at least one example"),
        (dict(rho=0.0), ValueError, "rho must be positive"),
        (dict(rho=float("nan")), ValueError, "rho must be positive"),
        (dict(rho=(0.05, 0.1)), TypeError, "rho must be a number"),
        (dict(rho="0.1"), TypeError, "rho must be a number"),
        (dict(steps=0), ValueError, "steps must be at least 1"),
        (dict(mask={"w": True}), ValueError, "structure of the parameters"),
        (dict(mask=False), ValueError, "no leaf of params moves"),
        (dict(params=jnp.arange(3)), ValueError, "no leaf of params moves"),
        (dict(params=jnp.ones(3) * 1j), TypeError, "real floating"),
        (dict(params=jnp.arange(3), mask=True), TypeError, "real floating"),
        (dict(loss_sum=lambda w, _: jnp.sum(w)), TypeError, "two scalars"),
        (dict(loss_sum=lambda w, _: (w, 1)), TypeError, "two scalars"),
    ],
)
def test_bad_input_says_what_must_hold(call, error, message):
    arguments = dict(loss_sum=quadratic, params=CENTER, batches=ONE) | call
    with pytest.raises(error, match=message):
        landscape.worst_in_ball(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(noise_std=-1.0), "noise_std must be positive"),
        (dict(noise_std=0.1, num_directions=2.5), "num_directions must be an integer"),
        (dict(noise_std=0.1, num_directions=1), "num_directions must be at least 2"),
    ],
)
def test_bad_directions_say_what_must_hold(options, message, key):
    with pytest.raises((ValueError, TypeError), match=message):
        landscape.average_sharpness(quadratic, CENTER, ONE, key=key, **options)


def test_a_loss_that_cannot_be_kept_is_refused():
    @dataclasses.dataclass
    class Loss:  # one that compares by value has no hash
        scale: float

        def __call__(self, w, batch):
            return self.scale * jnp.sum(batch @ w), len(batch)

    with pytest.raises(TypeError, match="loss_sum must be hashable.*got a Loss"):
        landscape.sam_gap(Loss(1.0), jnp.ones(3), [np.ones((4, 3), np.float32)], 0.1)
