"""m-sharpness, several steps, GSAM, LookSAM and Fisher SAM: equations and limits."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import otmdr_jax
from otmdr_jax import baselines, parallel
from otmdr_jax.baselines.gsam import orthogonal
from otmdr_jax.core import ascent
from otmdr_jax.experiments import methods, optimizers, training
from otmdr_jax.experiments.config import TrainConfig
from tests import toy
from tests.baselines.test_bsam import Linear, small  # noqa: F401
from tests.experiments.test_training import assert_same_bits, stop_after
from tests.marks import slow_but

RHO = 0.3


def flat(tree):
    """`toy.regression_problem`'s parameters as one vector of float64: w, then b."""
    return np.append(np.asarray(tree["w"], np.float64), float(tree["b"]))


def gradient(v, data):
    gw, gb = toy.regression_gradient(v[:-1], v[-1], data["x"], data["y"])
    return np.append(gw, gb)


def climb(v, data, rho=RHO):
    g = gradient(v, data)
    return v + rho * g / np.linalg.norm(g)


def sam(v, data, rho=RHO):
    return gradient(climb(v, data, rho), data)


def parts_of(data, count):
    columns = {name: np.split(x, count) for name, x in data.items()}
    return [{name: parts[i] for name, parts in columns.items()} for i in range(count)]


def one_update(tx, params, data, state=None):
    state = tx.init(params) if state is None else state
    grads, state = jax.jit(tx.update)(params, state, params, batch=data)
    return grads, state


def on_devices(tx, params, data, devices):
    """One update on a mesh, each device its part of the batch."""

    def step(state, batch):
        grads, state = tx.update(params, state, params, batch=batch)
        return state, grads

    mesh = parallel.make_mesh(f"data={devices}")
    run = parallel.shard_map_step(step, mesh, donate=False)
    return run(tx.init(params), data)[1]


class TestSubBatches:
    @pytest.mark.slow
    @pytest.mark.parametrize("count", [2, 3, 6])
    def test_they_are_the_mean_of_sam_on_each(self, count):
        params, data = toy.regression_problem(batch=12)
        want = np.mean([sam(flat(params), d) for d in parts_of(data, count)], axis=0)
        tx = otmdr_jax.sam(toy.regression, RHO, num_subbatches=count)
        got, state = one_update(tx, params, data)
        assert_allclose(flat(got), want, rtol=1e-5)
        assert_allclose(state.diagnostics.grad_norm, np.linalg.norm(want), rtol=1e-5)
        assert_allclose(state.diagnostics.distances, RHO, rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [2, 8])
    def test_they_are_many_devices_without_a_shared_perturbation(self, count):
        params, data = toy.regression_problem(batch=16)
        each = otmdr_jax.sam(
            toy.regression, RHO, axis_name="data", sync_perturbation=False
        )
        want = on_devices(each, params, data, count)
        alone = otmdr_jax.sam(toy.regression, RHO, num_subbatches=count)
        assert_allclose(flat(one_update(alone, params, data)[0]), flat(want), rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["unroll", "scan", "vmap"])
    def test_the_map_and_the_devices_change_nothing(self, how, key):
        """With noise: parts have the keys that they have on one device."""
        params, data = toy.regression_problem(batch=16)
        options = dict(rho=RHO, split="shared", num_subbatches=4, noise_std=0.1)
        tx = otmdr_jax.otmdr(toy.regression, key, **options)
        want, _ = one_update(tx, params, data)
        options |= dict(particle_map=how)
        tx = otmdr_jax.otmdr(toy.regression, key, axis_name="data", **options)
        assert_allclose(flat(on_devices(tx, params, data, 2)), flat(want), rtol=1e-5)

    def test_auxiliary_output_is_averaged(self):
        params, data = toy.regression_problem(batch=12)

        def loss(params, batch):
            return toy.regression(params, batch), {"y": jnp.mean(batch["y"])}

        grad_fn = otmdr_jax.value_and_grad(
            loss, RHO, split="shared", num_subbatches=3, has_aux=True
        )
        (_, aux), _ = grad_fn(params, data)
        assert_allclose(aux["y"], np.mean(data["y"]), rtol=1e-5)

    def test_a_size_that_cannot_be_is_refused(self):
        params, data = toy.regression_problem(batch=12)
        with pytest.raises(ValueError, match="num_subbatches=5 must divide it"):
            otmdr_jax.value_and_grad(toy.regression, num_subbatches=5, split="shared")(
                params, data
            )
        with pytest.raises(TypeError, match="num_subbatches must be an integer"):
            otmdr_jax.value_and_grad(toy.regression, num_subbatches=2.0)


class TestAscent:
    def test_several_radii_are_several_steps_on_the_whole_batch(self):
        params, data = toy.regression_problem()
        v, total = flat(params), 0.3
        for rho in (0.1, 0.1, 0.1):
            v = climb(v, data, rho)
        got, state = one_update(otmdr_jax.sam(toy.regression, (0.1,) * 3), params, data)
        assert_allclose(flat(got), gradient(v, data), rtol=1e-5)
        assert state.diagnostics.ascent_norms.shape == (3,)
        assert float(state.diagnostics.distances[0]) <= total + 1e-6

    def test_without_a_norm_steps_are_gradients(self):
        params, data = toy.regression_problem()
        v = flat(params)
        want = gradient(v + 0.05 * gradient(v, data), data)
        got, _ = one_update(
            otmdr_jax.sam(toy.regression, 0.05, norm="none"), params, data
        )
        assert_allclose(flat(got), want, rtol=1e-5)

    def test_a_metric_of_ones_own(self):
        w, g, t = (jnp.array(x) for x in ([1.0, 2.0], [3.0, 4.0], [0.5, 2.0]))
        moved, length = ascent.ascend(w, g, 0.1, metric=lambda w, g: t)
        assert_allclose(length, np.hypot(1.5, 8.0), rtol=1e-6)
        step = np.array([0.25 * 3, 4 * 4]) / np.hypot(1.5, 8.0)
        assert_allclose(moved, np.asarray(w) + 0.1 * step, rtol=1e-6)


class TestFisher:
    def test_against_numpy(self):
        params, data = toy.regression_problem()
        v, eta = flat(params), 3.0
        g = gradient(v, data)
        inverse = 1 / (1 + eta * g**2)
        worst = v + RHO * inverse * g / np.sqrt(g @ (inverse * g))
        tx = baselines.fisher_sam(toy.regression, RHO, eta=eta)
        got, state = one_update(tx, params, data)
        assert_allclose(flat(got), gradient(worst, data), rtol=1e-5)
        assert_allclose(state.diagnostics.distances[0], np.linalg.norm(worst - v), 1e-5)

    def test_eta_0_is_sam(self):
        params, data = toy.regression_problem()
        got, _ = one_update(
            baselines.fisher_sam(toy.regression, RHO, eta=0.0), params, data
        )
        assert_same_bits(
            got, one_update(otmdr_jax.sam(toy.regression, RHO), params, data)[0]
        )

    def test_gradients_of_one_size_point_as_in_sam(self):
        """F is a multiple of I: its root is the radius's."""
        w, g = jnp.zeros(3), jnp.array([2.0, -2.0, 2.0])
        plain, _ = ascent.ascend(w, g, 0.5)
        bent, _ = ascent.ascend(w, g, 0.5, metric=ascent.fisher(0.75))
        assert_allclose(bent, plain / np.sqrt(1 + 0.75 * 4), rtol=1e-6)

    def test_a_large_eta_favours_small_gradients(self):
        w, g = jnp.zeros(2), jnp.array([1.0, 100.0])
        moved, _ = ascent.ascend(w, g, 1.0, metric=ascent.fisher(1e12))
        assert_allclose(moved[0] / moved[1], 100.0, rtol=1e-4)

    @pytest.mark.parametrize("size", [1e25, 1e-25])
    def test_no_square_overflows(self, size):
        w, g = jnp.zeros(2), jnp.array([size, size], jnp.float32)
        moved, _ = ascent.ascend(w, g, 1.0, metric=ascent.fisher(1.0))
        want = 1 / np.sqrt(2 * (1 + float(size) ** 2))
        assert_allclose(moved, want, rtol=1e-5, atol=1e-38)

    def test_two_shapes_of_the_ball_are_refused(self):
        with pytest.raises(ValueError, match="two shapes of the ball"):
            otmdr_jax.value_and_grad(toy.regression, adaptive=True, fisher=1.0)
        with pytest.raises(ValueError, match="fisher must be finite"):
            baselines.fisher_sam(toy.regression, eta=-1.0)


def gsam_of(v, data, alpha, rho=RHO):
    g, worst = gradient(v, data), sam(v, data, rho)
    aside = g - (g @ worst) / (worst @ worst) * worst
    return worst - alpha * aside


class TestGsam:
    def test_against_numpy(self):
        params, data = toy.regression_problem()
        got, _ = one_update(
            baselines.gsam(toy.regression, RHO, alpha=0.7), params, data
        )
        assert_allclose(flat(got), gsam_of(flat(params), data, 0.7), rtol=1e-5)

    def test_alpha_0_is_sam(self):
        params, data = toy.regression_problem()
        got, state = one_update(
            baselines.gsam(toy.regression, RHO, alpha=0.0), params, data
        )
        want, there = one_update(otmdr_jax.sam(toy.regression, RHO), params, data)
        assert_allclose(flat(got), flat(want), rtol=1e-6)
        assert_allclose(state.diagnostics.gap, there.diagnostics.gap, rtol=1e-5)

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(st.integers(0, 2**16), st.sampled_from([1e-30, 1.0, 1e25]))
    def test_what_is_taken_out_is_orthogonal(self, seed, size):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(2, 5))
        trees = [{"x": jnp.float32(v[:2] * size), "y": jnp.float32(v[2:] * size)}
                 for v in (a, b)]  # fmt: skip
        aside = orthogonal(*trees)
        got = np.concatenate([np.asarray(aside["x"]), np.asarray(aside["y"])]) / size
        assert_allclose(got, a - (a @ b) / (b @ b) * b, rtol=1e-4, atol=1e-5)

    def test_a_gradient_of_zero_takes_nothing_out(self):
        v = jnp.array([1.0, 2.0])
        assert_allclose(orthogonal(v, jnp.zeros(2)), v)

    @pytest.mark.parametrize("devices", [2, 4])
    def test_a_shared_perturbation_is_decomposed_on_all_devices_at_once(self, devices):
        params, data = toy.regression_problem(batch=16)
        tx = baselines.gsam(toy.regression, RHO, alpha=0.7, axis_name="data")
        got = on_devices(tx, params, data, devices)
        assert_allclose(flat(got), gsam_of(flat(params), data, 0.7), rtol=1e-5)

    @pytest.mark.slow
    def test_sub_batches_are_decomposed_on_their_own(self):
        params, data = toy.regression_problem(batch=16)
        want = np.mean(
            [gsam_of(flat(params), d, 0.7) for d in parts_of(data, 4)], axis=0
        )
        one = baselines.gsam(toy.regression, RHO, alpha=0.7, num_subbatches=4)
        assert_allclose(flat(one_update(one, params, data)[0]), want, rtol=1e-5)
        each = baselines.gsam(
            toy.regression, RHO, alpha=0.7, axis_name="data", sync_perturbation=False
        )
        assert_allclose(flat(on_devices(each, params, data, 4)), want, rtol=1e-5)

    def test_a_radius_stays_at_its_ends_where_the_learning_rate_is_beyond(self):
        """In a warmup from 0 the line through the two goes below 0."""
        rate = optax.linear_schedule(0.0, 0.3, 30)
        rho = baselines.follow(rate, 0.4, 0.1, rate_max=0.2, rate_min=0.1)
        found = [float(rho(step)) for step in (0, 5, 10, 15, 20, 25)]
        assert_allclose(found, [0.1, 0.1, 0.1, 0.25, 0.4, 0.4], rtol=1e-5)

    def test_a_radius_that_follows_the_learning_rate(self):
        params, data = toy.regression_problem()
        rho = baselines.follow(optax.linear_schedule(0.2, 0.0, 4), 0.4, 0.2, 0.2)
        tx = baselines.gsam(toy.regression, rho, alpha=0.5)
        _, state = one_update(tx, params, data)
        got, _ = one_update(tx, params, data, state)
        assert_allclose(flat(got), gsam_of(flat(params), data, 0.5, 0.35), rtol=1e-5)
        with pytest.raises(ValueError, match="rho_min, must be from 0 to the largest"):
            baselines.follow(optax.constant_schedule(0.1), 0.1, 0.2, 0.1)
        with pytest.raises(ValueError, match="largest value must be above its least"):
            baselines.follow(optax.constant_schedule(0.1), 0.2, 0.1, 0.1, 0.1)


def looksam_of(v, batches, every, alpha=0.7, rate=0.1):
    """Algorithm 1 with plain gradient descent, in float64."""
    for t, data in enumerate(batches):
        g = gradient(v, data)
        if t % every == 0:
            step = sam(v, data)
            aside = step - (step @ g) / (g @ g) * g
        else:
            step = g + alpha * np.linalg.norm(g) / np.linalg.norm(aside) * aside
        v = v - rate * step
    return v


def train(tx, params, batches):
    state, update = tx.init(params), jax.jit(tx.update)
    for data in batches:
        updates, state = update(params, state, params, batch=data)
        params = optax.apply_updates(params, updates)
    return params, state


class TestLooksam:
    @pytest.fixture
    def batches(self):
        return [toy.regression_problem(seed)[1] for seed in range(7)]

    @pytest.mark.parametrize("every", [2, 3])
    def test_against_numpy(self, every, batches):
        params, _ = toy.regression_problem()
        params = jax.tree.map(jnp.asarray, params)
        tx = optax.chain(
            baselines.looksam(toy.regression, RHO, every=every), optax.sgd(0.1)
        )
        got, state = train(tx, params, batches)
        assert_allclose(flat(got), looksam_of(flat(params), batches, every), rtol=1e-4)
        assert state[0].memory.count == 7
        assert state[0].diagnostics.distances.shape == (1,)

    def test_k_1_is_sam(self, batches):
        params, _ = toy.regression_problem()
        params = jax.tree.map(jnp.asarray, params)
        got, _ = train(
            optax.chain(
                baselines.looksam(toy.regression, RHO, every=1), optax.sgd(0.1)
            ),
            params,
            batches,
        )
        want, _ = train(
            optax.chain(otmdr_jax.sam(toy.regression, RHO), optax.sgd(0.1)),
            params,
            batches,
        )
        assert_allclose(flat(got), flat(want), rtol=1e-5)

    def test_leaves_of_two_precisions_keep_theirs(self):
        """The first step is SAM's, here by hand, and the others may be scanned."""
        with jax.enable_x64(True):
            x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))
            params = {"w": jnp.ones(3, jnp.float32), "t": jnp.array(0.5, jnp.float64)}

            def loss(p, batch):
                return jnp.mean((batch @ p["w"].astype(jnp.float64) - p["t"]) ** 2)

            tx = baselines.looksam(loss, 0.3, every=2)
            start = tx.init(params)
            got, state = tx.update(params, start, params, batch=x)
            first = jax.grad(loss)(params, x)
            length = jnp.sqrt(jnp.sum(first["w"] ** 2.0) + first["t"] ** 2)
            away = jax.tree.map(lambda p, g: p + 0.3 * g / length, params, first)
            want = jax.grad(loss)(away, x)
            for name in params:
                assert got[name].dtype == params[name].dtype
                assert_allclose(got[name], want[name], rtol=1e-5)

            def step(state, _):
                updates, state = tx.update(params, state, params, batch=x)
                return state, updates

            last, _ = jax.lax.scan(step, state, None, length=3)
            kinds = [jax.tree.map(lambda x: x.dtype, s.memory) for s in (start, last)]
            assert kinds[0] == kinds[1]

    def test_it_takes_one_pass_in_between(self, batches):
        passes = []

        def loss(params, batch):
            jax.debug.callback(lambda: passes.append(1))
            return toy.regression(params, batch)

        params, _ = toy.regression_problem()
        tx = baselines.looksam(loss, RHO, every=3)
        train(tx, jax.tree.map(jnp.asarray, params), batches[:6])
        jax.effects_barrier()
        assert len(passes) == 2 * 2 + 4

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize(
        "case", slow_but(["linear loss"], ["radius of 0", "linear loss"])
    )
    def test_rounding_is_no_direction(self, case, dtype):
        """Where SAM's gradient is the plain one, the steps in between take it too."""
        scale = jnp.asarray([0.3, -1.7, 2.9], dtype)

        def loss(w, batch):
            value = scale * w if case == "linear loss" else 0.5 * scale * w**2
            return jnp.sum(value) + 0.0 * jnp.mean(batch)

        w, batch = jnp.asarray([0.37, -1.3, 0.77], dtype), jnp.ones(4, dtype)
        rho = 0.05 if case == "linear loss" else 0.0
        tx = baselines.looksam(loss, rho, every=2)
        _, state = tx.update(w, tx.init(w), w, batch=batch)
        got, _ = tx.update(w, state, w, batch=batch)
        assert_allclose(
            np.float32(got), np.float32(jax.grad(loss)(w, batch)), rtol=1e-6
        )

    def test_a_small_radius_keeps_its_direction(self):
        """1e-4: the direction is a ten-thousandth of the gradient, and no rounding."""
        a, w = np.array([1.0, 3.0, 10.0]), np.array([0.37, -1.3, 0.77])
        tx = baselines.looksam(toy.quadratic, 1e-4, every=2, alpha=0.7)
        p, batch = jnp.float32(w), jnp.ones(4)
        _, state = tx.update(p, tx.init(p), p, batch=batch)
        got, _ = tx.update(p, state, p, batch=batch)
        g = a * w
        v = a * (w + 1e-4 * g / np.linalg.norm(g))
        v -= (v @ g) / (g @ g) * g
        want = g + 0.7 * np.linalg.norm(g) * v / np.linalg.norm(v)
        assert_allclose(got, want, rtol=2e-2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [(dict(every=0), "every must be at least 1"), (dict(alpha=-1.0), "alpha must")],
    )
    def test_what_cannot_work_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            baselines.looksam(toy.regression, **options)


class TestMethods:
    TRANSFORMATIONS = {
        "gsam": lambda loss: baselines.gsam(loss, 0.2, alpha=0.5),
        "looksam": lambda loss: baselines.looksam(loss, 0.2, every=2, alpha=0.5),
        "fisher-sam": lambda loss: baselines.fisher_sam(loss, 0.2, eta=2.0),
        "sam": lambda loss: otmdr_jax.sam(loss, 0.2, num_subbatches=2),
    }
    OPTIONS = {
        "gsam": dict(alpha=0.5),
        "looksam": dict(every=2, alpha=0.5),
        "fisher-sam": dict(eta=2.0),
        "sam": dict(num_subbatches=2),
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OPTIONS)
    def test_a_step_is_the_transformation_and_the_optimizer(self, name, key):
        model = Linear()
        method = methods.create(
            name, model, optax.sgd(0.1), rho=(0.2,), **self.OPTIONS[name]
        )
        images = jax.random.normal(key, (8, 2))
        batch = images, jnp.arange(8) % 3
        state = method.init(key, images)

        def loss_fn(params, batch):
            logits, _ = model.apply(params, {}, batch[0], train=True)
            return methods.cross_entropy(logits, batch[1])

        tx = optax.chain(self.TRANSFORMATIONS[name](loss_fn), optax.sgd(0.1))
        want, _ = train(tx, state.params, [batch] * 3)
        step = jax.jit(method.step)
        for _ in range(3):
            state, metrics = step(state, batch)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-5), state.params, want)
        assert np.isfinite(metrics["loss"]) and not metrics["skipped"]
        assert method.predict(state, images).shape == (1, 8, 3)

    @pytest.mark.slow
    def test_the_radius_of_gsam_follows_the_schedule(self, key):
        chosen = TrainConfig(
            method="gsam", rho=(0.4,), rho_min=0.1, learning_rate=0.2, batch_size=8
        )
        rate = optimizers.schedule(chosen, 10, 5)
        run = methods.Run(chosen, 100, 5, 10, rate, None)
        follows = chosen.method.options(run)["rho"]
        assert_allclose([follows(0), follows(5), follows(10)], [0.4, 0.25, 0.1], 1e-6)
        images, batch = jnp.ones((4, 2)), (jnp.eye(4)[:, :2], jnp.arange(4) % 3)
        distances = []
        method = methods.create("gsam", Linear(), optax.sgd(0.0), rho=follows)
        state, step = method.init(key, images), jax.jit(method.step)
        for _ in range(3):
            state, metrics = step(state, batch)
            distances.append(metrics["distance"])
        assert_allclose(distances, [follows(t) for t in range(3)], rtol=1e-4)

    @pytest.mark.slow
    def test_a_run_that_remembers_is_resumed_exactly(
        self,
        small,  # noqa: F811
        one_layer,
        tmp_path,
        monkeypatch,
    ):
        chosen = TrainConfig(
            model=one_layer, mesh="data=1", method="looksam", look_every=3, steps=8,
            batch_size=64, log_every=2,
        )  # fmt: skip
        straight = training.train(chosen, small, show_progress=False)
        folder = tmp_path / "run"
        with monkeypatch.context() as patch:
            stop_after(4, patch)
            with pytest.raises(training.Interrupted):
                training.train(chosen, small, folder, show_progress=False)
        got = training.train(chosen, small, folder, resume=True, show_progress=False)
        assert got.state.memory.count == 8
        assert_same_bits(got.state, straight.state)
        gaps = [r["gap"] for r in straight.history if r["split"] == "train"]
        # Means of two steps, of which the 1st, 4th and 7th climb.
        assert np.all(np.array(gaps)[[0, 1, 3]] > 0) and gaps[2] == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(method="gsam", rho=(0.1, 0.2)), "one radius"),
            (dict(method="looksam", rho=(0.1, 0.2)), "one radius"),
            (dict(method="sam", gsam_alpha=0.1), "sam has no option gsam_alpha"),
            (dict(method="gsam", look_every=2), "gsam has no option look_every"),
            (dict(method="otmdr", fisher_eta=2.0), "otmdr has no option fisher_eta"),
            (dict(method="gsam", rho_min=0.1, schedule="plateau"), "known beforehand"),
            (dict(method="sgd", num_subbatches=2), "sgd has no option num_subbatches"),
        ],
    )
    def test_options_that_do_not_go_together(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)

    def test_options_reach_their_methods(self):
        chosen = TrainConfig(
            method="looksam", look_every=2, num_subbatches=4, rho=(0.1,)
        )
        run = methods.Run(chosen, 100, 5, 10, optax.constant_schedule(0.1), None)
        found = chosen.method.options(run)
        assert (found["every"], found["num_subbatches"], found["rho"]) == (2, 4, (0.1,))
        base = TrainConfig(method="fisher-sam", fisher_eta=0.5, norm="none")
        found = base.method.options(run)
        assert (found["eta"], found["norm"]) == (0.5, "none")
        for name in methods.METHODS:  # whatever a method is called, it has defaults
            assert TrainConfig(method=name).method == methods.METHODS[name]()
