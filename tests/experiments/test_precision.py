"""Mixed precision: bfloat16 within its error, float16 with a loss scale that works."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import otmdr_jax
from otmdr_jax import models
from otmdr_jax.experiments import methods, precision, training
from otmdr_jax.experiments.config import TrainConfig
from tests import toy

RHO = (0.05, 0.1)


@pytest.fixture(scope="module")
def problem():
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
    return images, jnp.arange(16) % 4


def smooth(dtype):
    """A perceptron without kinks: rounding moves its gradient by rounding alone."""

    def loss_fn(params, batch):
        x = batch[0].reshape(len(batch[0]), -1).astype(dtype)
        for w in params[:-1]:
            x = jnp.tanh(x @ w.astype(dtype))
        logits = (x @ params[-1].astype(dtype)).astype(jnp.float32)
        return methods.cross_entropy(logits, batch[1]), jnp.mean(logits)

    keys = jax.random.split(jax.random.key(3), 3)
    shapes = [(64, 64), (64, 64), (64, 4)]
    return loss_fn, [
        jax.random.normal(key, shape) / 8
        for key, shape in zip(keys, shapes, strict=True)
    ]


def network(dtype):
    model = models.create("one_layer", num_classes=4, dtype=dtype)
    params, state = model.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))

    def loss_fn(params, batch):
        logits, new = model.apply(params, state, batch[0], train=True)
        return methods.cross_entropy(logits, batch[1]), new

    return loss_fn, params


@pytest.mark.slow
@pytest.mark.parametrize("dtype, scale", [("bfloat16", None), ("float16", 2.0**12)])
@pytest.mark.parametrize(
    "make, factor",
    # Rounding flips some of a network's ReLUs: their gradients change all at once.
    [(smooth, 2), (network, 12)],
)
def test_particles_agree_with_float32_within_the_formats_error(
    make, factor, dtype, scale, problem, one_layer
):
    def gradient_in(dtype, loss_scale):
        loss_fn, params = make(dtype)
        scaled = {} if loss_scale is None else {"loss_scale": jnp.float32(loss_scale)}
        if loss_scale is not None:
            loss_fn = precision.scale_loss(loss_fn, has_aux=True)
        fn = otmdr_jax.robust_gradient(loss_fn, RHO, num_particles=2, has_aux=True)
        return jax.jit(fn)(params, problem, key=jax.random.key(2), **scaled)

    exact, got = gradient_in(jnp.float32, None), gradient_in(jnp.dtype(dtype), scale)
    eps = float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_equal_dtypes(got, exact)  # all float32: params, statistics
    np.testing.assert_allclose(got.value, exact.value, rtol=4 * eps)
    # Steps as long as the radii say, in directions that are slightly others.
    np.testing.assert_allclose(
        got.diagnostics.distances, exact.diagnostics.distances, rtol=4 * eps
    )
    away = jax.tree.map(jnp.subtract, got.grads, exact.grads)
    assert 0 < optax.tree.norm(away) < factor * eps * optax.tree.norm(exact.grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=8 * eps),
        got.aux,
        exact.aux,
    )


@pytest.mark.parametrize("options", [{}, {"norm": "per_leaf"}, {"adaptive": True}])
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_norms_do_not_overflow(size, options):
    """The square of 1e20 is no float32; of 1e-25 it is zero. The step is as long."""

    def loss(w, batch):
        return size * jnp.sum(w * jnp.array([3.0, 4.0])) + 0 * jnp.sum(batch)

    gradient = otmdr_jax.robust_gradient(loss, 0.5, split="shared", **options)
    found = gradient(jnp.ones(2), jnp.ones(2))
    np.testing.assert_allclose(found.diagnostics.ascent_norms, 5 * size, rtol=1e-6)
    np.testing.assert_allclose(found.diagnostics.distances, 0.5, rtol=1e-5)


class TestLossScale:
    @hypothesis.given(
        finite=st.lists(st.booleans(), max_size=60), interval=st.integers(1, 7)
    )
    @hypothesis.settings(max_examples=50, deadline=None)
    def test_it_follows_the_rule(self, finite, interval):
        """Against a loop in plain Python."""
        state, scale, good = precision.init(2.0**4), 2.0**4, 0
        for ok in finite:
            state = precision.adjust(state, ok, interval)
            good = good + 1 if ok else 0
            if not ok:
                scale = max(scale / 2, 1.0)
            elif good == interval:
                scale, good = min(scale * 2, 2.0**24), 0
            assert (float(state.scale), int(state.good_steps)) == (scale, good)

    @pytest.mark.parametrize("scale", [1.0, 2.0**15])
    def test_loss_and_gradient_are_those_without_it(self, scale):
        params, data = toy.regression_problem()
        fn = precision.scale_loss(toy.regression)
        got = jax.value_and_grad(fn)(params, data, loss_scale=scale)
        want = jax.value_and_grad(toy.regression)(params, data)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), got, want)

    def test_inside_the_gradients_are_scaled(self):
        seen = []

        @jax.custom_vjp
        def probe(x):
            return x

        def backward(_, g):
            seen.append(float(g[0]))
            return (g,)

        probe.defvjp(lambda x: (x, None), backward)
        fn = precision.scale_loss(lambda w: jnp.sum(probe(w) * 3.0))
        grads = jax.grad(fn)(jnp.ones(1), loss_scale=8.0)
        assert seen == [24.0] and grads.tolist() == [3.0]

    def test_underflow_is_what_it_saves_from(self, problem):
        """Gradients of 1e-9 of a float16 network: zero without a scale."""

        def small(w, x):
            y = (x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32)
            return 1e-9 * jnp.mean(y)

        w, x = jnp.ones(8), jnp.ones((4, 8))
        assert not jnp.any(jax.grad(small)(w, x))
        got = jax.grad(precision.scale_loss(small))(w, x, loss_scale=2.0**15)
        np.testing.assert_allclose(got, 1e-9, rtol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bad_pass", ["ascent", "particle"])
def test_a_step_is_skipped_as_a_whole_if_one_pass_overflows(bad_pass, problem):
    """State, statistics and optimizer stay; the scale halves; then training goes on."""

    class Model:
        """A line whose gradient overflows float16 in one of the passes."""

        def init(self, key, images):
            return {"w": jnp.zeros(4)}, {"mean": jnp.zeros(())}

        def apply(self, params, state, images, train):
            # A particle that is lost looks fine from here: its own pass is finite.
            w = jnp.nan_to_num(params["w"])
            logits = images.reshape(len(images), -1)[:, :4] * w[None]
            moved = jnp.any(w != 0)
            bad = moved if bad_pass == "particle" else ~moved
            # Its gradient is 1 or as large as float16 goes; times 2^15 that is inf.
            steep = jnp.where(bad, 6e4, 0.0) * jnp.sum(w.astype(jnp.float16))
            logits = logits + steep.astype(jnp.float32)
            return logits * jnp.array([[1.0, 2, 3, 4]]), {"mean": state["mean"] + 1}

    rho = (0.05, 0.1) if bad_pass == "ascent" else (0.05,)  # none climbs on the bad one
    method = methods.create(
        "otmdr", Model(), optax.adam(0.1), loss_scaling=True, rho=rho
    )
    before = method.init(jax.random.key(0), problem[0])
    after, metrics = jax.jit(method.step)(before, problem)
    assert int(after.skipped) == int(metrics["skipped"]) == 1
    assert int(metrics["skipped_in_row"]) == 0  # it looks for a scale
    for part in ("params", "model_state", "opt_state"):
        chex.assert_trees_all_equal(getattr(after, part), getattr(before, part))
    assert float(after.loss_scale.scale) == float(before.loss_scale.scale) / 2


def test_the_scale_grows_in_training(problem):
    """After 2000 finite steps, which the state counts."""

    class Model:
        def init(self, key, images):
            return {"w": jnp.zeros(4)}, {}

        def apply(self, params, state, images, train):
            return images.reshape(len(images), -1)[:, :4] * params["w"][None], state

    method = methods.create("sgd", Model(), optax.sgd(0.1), loss_scaling=True)
    step = jax.jit(method.step)
    state, _ = step(method.init(jax.random.key(0), problem[0]), problem)
    assert int(state.loss_scale.good_steps) == 1
    almost = state.loss_scale._replace(good_steps=jnp.int32(1999))
    state, _ = step(state._replace(loss_scale=almost), problem)
    assert float(state.loss_scale.scale) == 2.0**16
    assert int(state.loss_scale.good_steps) == 0


def test_only_a_scale_that_cannot_fall_any_more_is_divergence(problem):
    class Model:
        """Its gradient overflows at any scale."""

        def init(self, key, images):
            return {"w": jnp.ones(4)}, {}

        def apply(self, params, state, images, train):
            steep = jnp.sqrt(params["w"] - params["w"])  # 0, of infinite slope
            return jnp.zeros((len(images), 4)) + steep[None], state

    method = methods.create("sgd", Model(), optax.sgd(0.1), loss_scaling=True)
    state = method.init(jax.random.key(0), problem[0])
    step, in_row = jax.jit(method.step), []
    for _ in range(18):
        state, metrics = step(state, problem)
        in_row.append(int(metrics["skipped_in_row"]))
    assert in_row == [0] * 15 + [1, 2, 3]  # 2^15 halves fifteen times
    assert int(state.skipped) == 18


@pytest.mark.slow
def test_float16_trains_from_the_configuration():
    """From a scale that overflows at first: some steps are skipped, the rest learn."""
    config = TrainConfig(
        dtype="float16", steps=40, mesh="data=1", log_every=10, learning_rate=0.1,
        max_skipped=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "INITIAL_SCALE", 2.0**24)
        patch.setattr(precision.init, "__defaults__", (2.0**24,))
        result = training.train(config, show_progress=False)
    assert 1 <= result.metrics["skipped_steps"] <= 20
    scales = [r["loss_scale"] for r in result.history if r["split"] == "train"]
    assert scales[-1] < scales[0] <= 2.0**24
    assert result.metrics["accuracy"] > 0.6
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result.state.params))


@pytest.mark.slow
def test_other_dtypes_have_no_loss_scale(one_layer):
    config = TrainConfig(model=one_layer, dtype="bfloat16", steps=11, mesh="data=1")
    result = training.train(config, show_progress=False)
    assert result.state.loss_scale is None
    assert "loss_scale" not in result.history[0]
    with pytest.raises(ValueError, match="dtype must be one of"):
        config.replace(dtype="float8")
