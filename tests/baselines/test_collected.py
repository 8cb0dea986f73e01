"""Members collected in one run, and averages of its weights."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from otmdr_jax import baselines, data, metrics, models
from otmdr_jax.baselines import schedules
from otmdr_jax.experiments import (
    building,
    cli,
    combine,
    config,
    members,
    methods,
    prediction,
    programs,
    report,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import cost
from otmdr_jax.metrics import diversity
from tests.sets import small_digits
from tests.zoo import np_conv

pytestmark = pytest.mark.usefixtures("one_layer")

TINY = TrainConfig(
    model="one_layer", mesh="data=1", method="snapshot", cycles=3, epochs=6,
    batch_size=64, log_every=2, seed=3, learning_rate=0.3,
)  # fmt: skip
# 5 batches an epoch: averages after 16, 21, 26 and 30 of 30 steps; 3 members each.
OWN = {
    "snapshot": dict(cycles=3),
    "fge": dict(collect_start=0.2, cycle_epochs=1.6, eval_every=9),
    "swa": dict(collect_every=1.0, eval_every=9),
    "swag": dict(collect_every=1.0, swag_rank=3, num_samples=4, eval_every=9),
}


@pytest.fixture(scope="module")
def small():
    return small_digits(400, validation=80)


def of_method(name, **options):
    default = TINY.replace(cycles=5)
    return default.replace(method=name, **{**OWN[name], **options})


def trained(name, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / name
    return training.train(of_method(name), small, folder, show_progress=False)


@pytest.fixture(scope="module")
def snapshot_run(small, tmp_path_factory):
    return trained("snapshot", small, tmp_path_factory)


@pytest.fixture(scope="module")
def swag_run(small, tmp_path_factory):
    return trained("swag", small, tmp_path_factory)


class TestSchedules:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(60, 300), st.integers(1, 8), st.floats(0.01, 1))
    def test_snapshot_is_eq_2_of_huang(self, total, cycles, peak):
        rate = schedules.cyclic_cosine(peak, total, cycles)
        period = math.ceil(total / cycles)
        for t in range(1, total + 1, max(total // 17, 1)):  # iterations from 1
            along = ((t - 1) % period) / period
            want = peak / 2 * (math.cos(math.pi * along) + 1)
            assert_allclose(rate(t - 1), want, rtol=1e-4, atol=1e-6 * peak)
        ends = schedules.snapshot_ends(total, cycles)
        assert len(ends) == cycles and ends[-1] == total
        for end in ends[:-1]:  # the next step starts anew
            assert_allclose(rate(end), peak, rtol=1e-6)

    @pytest.mark.slow
    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 50), st.integers(1, 12), st.integers(30, 90))
    def test_fge_is_the_triangle_of_garipov(self, start, half, more):
        c, total, a1, a2 = 2 * half, start + more, 0.05, 0.01
        rate = schedules.fge(0.1, total, start, c, a1, a2)
        for i in range(1, more + 1):  # iterations of the cyclic phase from 1
            t = ((i - 1) % c + 1) / c
            if t <= 0.5:
                want = (1 - 2 * t) * a1 + 2 * t * a2
            else:
                want = (2 - 2 * t) * a2 + (2 * t - 1) * a1
            assert_allclose(rate(start + i - 1), want, rtol=1e-5)
        ends = schedules.fge_ends(total, start, c)
        for end in ends:
            assert_allclose(rate(end - 1), a2, rtol=1e-5)
        assert len(ends) == sum(i % c == half for i in range(1, more + 1))

    def test_a_cycle_without_a_middle_is_refused(self):
        with pytest.raises(ValueError, match="period must be even.*got 5"):
            schedules.fge(0.1, 20, 10, 5, 0.05, 0.01)
        with pytest.raises(ValueError, match="period must be even.*got 5"):
            schedules.fge_ends(20, 10, 5)

    def test_pretraining_has_the_shape_of_its_authors_code(self):
        """`schedule` of timgaripov/swa/train.py, at whole epochs."""
        lr_init, swa_lr, swa_start = 0.1, 0.05, 161
        rate = schedules.flat_then_linear(lr_init, swa_lr, swa_start)
        for epoch in range(0, 300, 7):
            t, ratio = epoch / swa_start, swa_lr / lr_init
            if t <= 0.5:
                factor = 1.0
            elif t <= 0.9:
                factor = 1.0 - (1.0 - ratio) * (t - 0.5) / 0.4
            else:
                factor = ratio
            assert_allclose(rate(epoch), lr_init * factor, rtol=1e-5)
        before = schedules.fge(0.1, 200, 160, 4, 0.05, 0.01)
        assert_allclose(before(150), 0.1 * (1 - 0.99 * 0.25 / 0.4), rtol=1e-5)

    def test_options_give_the_steps_of_the_authors_commands(self):
        def ends(method, epochs, **options):
            chosen = TrainConfig(method=method, epochs=epochs, **options)
            return chosen.method.course(0.1, epochs * 390, 390).ends

        # README of Garipov et al.: 160 epochs, then 40 in cycles of 2.
        fge = ends("fge", 200)
        assert len(fge) == 20 and fge[0] == 161 * 390
        # README of Maddox et al.: from epoch 161 to 300, once an epoch.
        swag = ends("swag", 300)
        assert swag == tuple(epoch * 390 for epoch in range(161, 301))
        # README of Huang et al.: B = 200, M = 5.
        assert ends("snapshot", 200) == tuple(390 * e for e in (40, 80, 120, 160, 200))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(method="snapshot", cycles=7), "cycles=7 of 2 steps"),
            (dict(method="fge", cycle_epochs=9), "no cycle of"),
            (dict(method="swa", collect_start=0.95), "at least"),
        ],
    )
    def test_a_run_that_is_too_short_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options).method.course(0.1, 10, 2)


class Linear:
    """One layer and a running mean of its inputs: it compiles at once."""

    batchnorm_momentum = 0.9

    def init(self, key, images):
        size = images[0].size
        return {"kernel": 0.1 * jax.random.normal(key, (size, 10))}, {
            "mean": jnp.zeros(size)
        }

    def apply(self, params, state, images, *, train):
        x = images.reshape(len(images), -1)
        mean = jnp.mean(x, axis=0) if train else state["mean"]
        if train:
            state = {"mean": 0.9 * state["mean"] + 0.1 * mean}
        return (x - mean[None]) @ params["kernel"], state


class Walk:
    """A method of two weights that walks; its prediction shows where it is."""

    def __init__(self, seed=0, steps=40, dtype=jnp.float32):
        self.dtype = dtype
        self.path = np.random.default_rng(seed).normal(3, 1, (steps, 2, 5))

    def method(self):
        path = jnp.asarray(self.path, self.dtype)

        def init(key, images):
            del images
            params = {"a": path[0, 0], "b": path[0, 1]}
            zero = jnp.zeros((), jnp.int32)
            return methods.TrainState(
                params, {}, (), key, zero, jnp.zeros_like(zero), jnp.zeros_like(zero)
            )

        def step(state, batch):
            del batch
            params = {"a": path[state.step, 0], "b": path[state.step, 1]}
            return state._replace(params=params, step=state.step + 1), {}

        def predict(state, images):
            del images
            return jax.nn.log_softmax(state.params["a"] * state.params["b"])[None, None]

        return methods.Method(init, step, predict)

    def run(self, method, steps, key):
        state = method.init(key, None)
        step = jax.jit(method.step)
        for _ in range(steps):
            state, _ = step(state, None)
        return state


@pytest.mark.slow
def test_a_skipped_step_counts_for_the_schedule(key):
    """Or members would be collected before the learning rate is at its lowest."""
    rate = optax.piecewise_constant_schedule(1.0, {2: 0.25})
    method = methods.create("snapshot", Linear(), optax.sgd(rate), ends=(2, 3))
    images = jax.random.normal(key, (6, 4, 4, 1))
    labels = jnp.arange(6) % 10
    state = method.init(key, images)
    step = jax.jit(method.step)
    state, _ = step(state, (images, labels))
    before = state.params
    state, numbers = step(state, (images * jnp.nan, labels))
    assert numbers["skipped"] == 1
    chex.assert_trees_all_equal(state.params, before)
    after, _ = step(state, (images, labels))

    def loss(params):
        logits, _ = Linear().apply(params, state.model_state, images, train=True)
        return methods.cross_entropy(logits, labels)

    moved = jax.tree.map(lambda p, g: p - 0.25 * g, before, jax.grad(loss)(before))
    chex.assert_trees_all_close(after.params, moved, rtol=1e-5)


class TestCollect:
    ENDS = (2, 5, 6)

    def test_members_are_the_weights_after_those_steps(self, key):
        walk = Walk()
        method = baselines.collect(walk.method(), self.ENDS)
        for steps in range(8):
            kept = walk.run(method, steps, key).method_state
            want = [walk.path[end - 1] for end in self.ENDS if end <= steps]
            assert int(kept.number) == len(want)
            for i, (a, b) in enumerate(want):
                assert_array_equal(kept.params["a"][i], np.float32(a))
                assert_array_equal(kept.params["b"][i], np.float32(b))

    @pytest.mark.parametrize("axes", [1, 2, 3])
    def test_of_outputs_it_is_their_mean(self, axes, key):
        """Not that of probabilities, which a regression has none of."""
        walk = Walk()
        one = walk.method()._replace(
            classes=False,
            predict=lambda state, _: state.params["a"].reshape(*[1] * axes, -1),
        )
        method = baselines.collect(one, self.ENDS)
        for steps in (1, 3, 5, 7):
            rows = jax.jit(method.predict)(walk.run(method, steps, key), None)
            used = [end for end in self.ENDS if end <= steps] or [max(steps, 1)]
            want = np.mean([walk.path[end - 1, 0] for end in used], axis=0)
            assert_allclose(rows.mean(0).reshape(-1), want, rtol=1e-5)
            assert rows.shape == (len(self.ENDS), *[1] * (axes - 1), len(want))

    def test_the_mean_over_rows_is_the_prediction_at_any_time(self, key):
        walk = Walk()
        method = baselines.collect(walk.method(), self.ENDS)
        for steps in range(8):
            rows = jax.jit(method.predict)(walk.run(method, steps, key), None)
            assert rows.shape == (3, 1, 5)
            used = [end for end in self.ENDS if end <= steps] or [max(steps, 1)]
            logits = np.stack([np.prod(walk.path[end - 1], axis=0) for end in used])
            probs = np.exp(logits - logits.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            assert_allclose(np.exp(rows).mean(0)[0], probs.mean(0), rtol=1e-4)
            assert_allclose(np.exp(rows[: len(used), 0]), probs, rtol=1e-4, atol=1e-8)

    @pytest.mark.slow
    def test_a_run_is_that_of_the_base_method(self, key):
        model = Linear()
        optimizer = optax.sgd(0.1, 0.9)
        plain = methods.create("sam", model, optimizer, rho=(0.1,))
        method = methods.create(
            "snapshot", model, optimizer, base="sam", rho=(0.1,), ends=(1, 3)
        )
        images = jax.random.normal(key, (16, 8, 8, 1))
        batch = images, jnp.arange(16) % 10
        states = []
        one, two = plain.init(key, images), method.init(key, images)
        for _ in range(3):
            one, want = jax.jit(plain.step)(one, batch)
            two, got = jax.jit(method.step)(two, batch)
            states.append(one)
            assert_allclose(got["loss"], want["loss"], rtol=1e-5)
        for member, end in zip(baselines.members(two), (1, 3), strict=True):
            for part in ("params", "model_state"):
                jax.tree.map(
                    lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                    getattr(member, part),
                    getattr(states[end - 1], part),
                )

    @pytest.mark.slow
    def test_a_step_holds_no_copy_of_what_was_collected(self):
        """Members are written in place: its temporaries do not grow with them."""

        def temporaries(count):
            method = methods.create(
                "snapshot",
                models.create("cnn_small", 10),
                optax.sgd(0.1, 0.9),
                ends=tuple(range(1, count + 1)),
            )
            batch = jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, int)
            state = jax.eval_shape(method.init, jax.random.key(0), batch[0])
            step = jax.jit(method.step, donate_argnums=0).lower(state, batch)
            return step.compile().memory_analysis()

        few, many = temporaries(2), temporaries(40)
        model = 4 * 14_458
        assert many.argument_size_in_bytes - few.argument_size_in_bytes > 38 * model
        assert abs(many.temp_size_in_bytes - few.temp_size_in_bytes) < model

    @pytest.mark.parametrize("ends", [(), (0, 1), (3, 3), (4, 2)])
    def test_steps_that_do_not_ascend_are_refused(self, ends):
        with pytest.raises(ValueError, match="ascending"):
            baselines.collect(Walk().method(), ends)


class TestAverage:
    ENDS = (3, 4, 8, 9, 11, 20)

    def of_walk(self, rank, key, **options):
        walk = Walk()
        method = baselines.average(walk.method(), None, self.ENDS, rank=rank, **options)
        visited = walk.path[np.array(self.ENDS) - 1].astype(np.float32)  # (6, 2, 5)
        return walk, method, visited.astype(np.float64)

    def test_moments_are_those_of_numpy(self, key):
        rank = 4
        walk, method, visited = self.of_walk(rank, key)
        for steps in (2, 3, 9, 20, 22):
            kept = walk.run(method, steps, key).method_state
            seen = visited[: sum(end <= steps for end in self.ENDS)]
            assert int(kept.number) == len(seen)
            for i, name in enumerate("ab"):
                if not len(seen):
                    assert not np.any(kept.mean[name])
                    continue
                mine = seen[:, i]
                assert_allclose(kept.mean[name], mine.mean(0), rtol=1e-5)
                assert_allclose(kept.variance[name], mine.var(0), rtol=1e-4, atol=1e-6)
                want = [mine[j] - mine[: j + 1].mean(0) for j in range(len(mine))]
                want = np.array(want)[-rank:]
                got = np.asarray(kept.deviations[name])[: len(want)]
                order = lambda x: x[np.lexsort(x.T)]  # noqa: E731 - a ring has no order
                assert_allclose(order(got), order(want), atol=1e-5)

    def test_swa_predicts_with_the_mean(self, key):
        walk, method, visited = self.of_walk(0, key)
        state = walk.run(method, 20, key)
        assert state.method_state.variance is None
        a, b = visited.mean(0)
        want = jax.nn.log_softmax(jnp.asarray(a * b, jnp.float32))
        assert_allclose(method.predict(state, None)[0, 0], want, rtol=1e-4, atol=1e-5)
        early = walk.run(method, 2, key)
        a, b = walk.path[1]
        want = jax.nn.log_softmax(jnp.asarray(a * b, jnp.float32))
        assert_allclose(method.predict(early, None)[0, 0], want, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_samples_have_the_covariance_of_the_paper(self, key):
        """Sigma = 1/2 diag + D D^T / (2 (K - 1)), over both arrays together."""
        from otmdr_jax.baselines import swag

        rank, count = 3, 40_000
        walk, method, _ = self.of_walk(rank, key, num_samples=1)
        kept = walk.run(method, 20, key).method_state
        keys = jax.random.split(key, count)
        drawn = jax.vmap(lambda k: swag._sample(kept, k, jnp.ones(())))(keys)
        got = np.concatenate([drawn["a"], drawn["b"]], axis=1)  # (count, 10)
        flat = {
            part: np.concatenate([np.asarray(tree["a"]), np.asarray(tree["b"])], -1)
            for part, tree in kept._asdict().items()
            if part in ("mean", "variance", "deviations")
        }
        d = flat["deviations"]
        want = np.diag(flat["variance"]) / 2 + d.T @ d / (2 * (rank - 1))
        assert_allclose(got.mean(0), flat["mean"], atol=0.03)
        assert_allclose(np.cov(got.T), want, atol=0.06)
        still = swag._sample(kept, key, jnp.zeros(()))
        assert_array_equal(still["a"], kept.mean["a"])

    @pytest.mark.slow
    @pytest.mark.parametrize("alike", [True, False])
    def test_members_of_an_ensemble_are_settled_each_for_itself(self, alike, key):
        one = methods.create(
            "swag", Linear(), optax.sgd(0.1), ends=(1, 2), rank=2, num_samples=3
        )
        method = members.lift(one, 2) if alike else members.lift([one, one])
        images = jax.random.normal(key, (6, 2, 2, 1))
        state = method.init(key, images)
        step = jax.jit(method.step)
        for _ in range(2):
            state, _ = step(state, (images, jnp.arange(6)))
        statistics = jax.jit(method.finalize.of_batch)(state, images)
        rows = jax.jit(method.predict)(
            method.finalize.finish(state, statistics), images
        )
        assert rows.shape == (6, 6, 10)
        for m, mine in enumerate(members.separate(state)):
            mine = one.finalize.finish(
                mine, jax.jit(one.finalize.of_batch)(mine, images)
            )
            got = rows[3 * m : 3 * m + 3]
            want = jax.jit(one.predict)(mine, images)
            assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("options", [dict(rank=1), dict(num_samples=3)])
    def test_ranks_and_samples_that_cannot_be_are_refused(self, options):
        with pytest.raises(ValueError, match="rank"):
            baselines.average(Walk().method(), None, (1, 2), **options)

    @pytest.mark.parametrize("rank", [0, 20])
    def test_moments_of_bfloat16_weights_are_float32(self, rank, key):
        """300 weight vectors, against NumPy's mean and variance of them in float64."""
        walk = Walk(steps=300, dtype=jnp.bfloat16)
        method = baselines.average(
            walk.method(), None, range(1, 301), rank=rank, num_samples=min(rank, 2)
        )
        state = walk.run(method, 300, key)
        kept = state.method_state
        seen = np.float64(jnp.asarray(walk.path, jnp.bfloat16))
        for i, name in enumerate("ab"):
            assert kept.mean[name].dtype == jnp.float32
            assert_allclose(kept.mean[name], seen[:, i].mean(0), rtol=1e-5)
            if rank:
                assert_allclose(kept.variance[name], seen[:, i].var(0), rtol=1e-4)
                assert kept.deviations[name].dtype == jnp.float32
        # What predicts has the dtype of the weights.
        assert baselines.moments_of(state).params["a"].dtype == jnp.bfloat16
        rows = method.predict(state, None)
        assert rows.dtype == jnp.bfloat16 and np.all(np.isfinite(np.float32(rows)))

    @pytest.mark.slow
    def test_statistics_leave_out_a_batch_that_is_not_finite(self, key):
        """As training skips it: NaN pixels, and pixels whose squares are infinite."""
        method = methods.create(
            "swag", Linear(), optax.sgd(0.1), ends=(1, 2), rank=2, num_samples=3
        )
        images = jax.random.normal(key, (3, 6, 2, 2, 1))
        state = method.init(key, images[0])
        for i in range(2):
            state, _ = method.step(state, (images[i], jnp.arange(6)))
        seen = [method.finalize.of_batch(state, x) for x in images]
        bad = method.finalize.of_batch(state, images[0] * jnp.nan)

        def finished(*found):
            total = jax.tree.map(lambda *x: sum(x), *found)
            return method.finalize.finish(state, total).method_state.statistics["mean"]

        want = np.mean(np.reshape(images, (3, 6, 4)), axis=(0, 1))
        assert_allclose(finished(*seen), np.tile(want, (4, 1)), rtol=1e-4, atol=1e-6)
        assert_array_equal(finished(bad, *seen), finished(*seen))
        # A mean over batches, of which one in four is bad, is as good as their sum.
        mean = jax.tree.map(lambda *x: sum(x) / 4, bad, *seen)
        found = method.finalize.finish(state, mean).method_state.statistics["mean"]
        assert_allclose(found, finished(*seen), rtol=1e-5)
        found = method.finalize.finish(
            state, jax.tree.map(lambda *x: sum(x) / 4, bad, bad, bad, seen[0])
        )
        assert_allclose(
            found.method_state.statistics["mean"], finished(seen[0]), rtol=1e-5
        )
        # Where none is finite those of training stay.
        own = np.asarray(state.model_state["mean"])
        assert_array_equal(finished(bad, bad), np.tile(own, (4, 1)))

    def test_a_model_must_say_how_its_statistics_move(self, key):
        class Other:
            def apply(self, params, state, images, *, train):
                return images, state

        from otmdr_jax.baselines import swag

        with pytest.raises(TypeError, match="batchnorm_momentum"):
            swag.statistics_of(Other(), {}, {"mean": jnp.zeros(2)}, jnp.zeros((1, 2)))


class TestStatistics:
    """BatchNorm of averaged weights, recomputed."""

    def settled(self, result, small, chosen):
        compiled = programs.compile_programs(chosen, small)
        return chosen.method.finalize(chosen, result.state, small, compiled)

    @pytest.mark.slow
    @pytest.mark.parametrize("examples", [None, 130])
    def test_they_are_those_of_a_numpy_pass(self, examples, swag_run, small):
        chosen = of_method("swag", batchnorm_examples=examples)
        state = self.settled(swag_run, small, chosen)
        kept = state.method_state
        kernel = np.asarray(kept.mean["conv1"]["kernel"], np.float64)  # (3, 3, 1, 8)
        order = np.random.default_rng(chosen.run.seed).permutation(320)
        means, variances = [], []
        for i in range((examples or 320) // 64):
            x = small.train.images[order[64 * i : 64 * (i + 1)]] / 255.0
            x = (x - np.array(small.mean)) / np.array(small.std)
            y = np_conv(x, kernel, stride=2)  # (64, 4, 4, 8)
            means.append(y.mean((0, 1, 2)))
            variances.append(y.var((0, 1, 2)))
        got = jax.tree.map(lambda x: x[0], kept.statistics)["norm1"]
        assert_allclose(got["mean"], np.mean(means, 0), rtol=1e-3, atol=1e-5)
        assert_allclose(got["var"], np.mean(variances, 0), rtol=1e-3)

    @pytest.mark.slow
    def test_deeper_layers_are_the_limit_of_running_statistics(self, key):
        from otmdr_jax.baselines import swag

        model = models.create("cnn_small", 10)
        images = jax.random.normal(key, (8, 8, 8, 3))
        params, state = jax.jit(model.init)(key, images)
        got = jax.jit(swag.statistics_of, static_argnums=0)(
            model, params, state, images
        )
        apply = jax.jit(lambda s: model.apply(params, s, images, train=True)[1])
        for _ in range(200):
            state = apply(state)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-3, 1e-4), got, state)

    @pytest.mark.slow
    def test_predictions_use_them_and_are_better_for_it(self, swag_run, small):
        chosen = of_method("swag")
        state = self.settled(swag_run, small, chosen)
        method = building.methods_of(chosen, 10, 320, 30, 5, None)[0]
        images = data.normalise(small.test.images, small.mean, small.std)

        def predict(state):  # the mean over samples
            return np.log(np.mean(np.exp(method.predict(state, images)), axis=0))

        before, after = predict(swag_run.state), predict(state)
        assert_allclose(after, swag_run.log_probs, atol=1e-3)
        nll = [metrics.nll(np.exp(x), small.test.labels) for x in (before, after)]
        assert nll[1] < nll[0]

    @pytest.mark.slow
    def test_a_mesh_gives_the_same(self, swag_run, small):
        chosen = of_method("swag")
        alone = self.settled(swag_run, small, chosen)
        mesh = programs.make_mesh(chosen.replace(mesh="data=4"))
        spread = programs.compile_programs(chosen, small, mesh)
        state = chosen.method.finalize(chosen, swag_run.state, small, spread)
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            state.method_state.statistics,
            alone.method_state.statistics,
        )

    @pytest.mark.slow
    def test_settling_twice_or_early_does_nothing(self, swag_run, small):
        chosen = of_method("swag")
        compiled = programs.compile_programs(chosen, small)
        state = compiled.init(jax.random.key(0))
        assert chosen.method.finalize(chosen, state, small, compiled) is state
        state = self.settled(swag_run, small, chosen)
        assert chosen.method.finalize(chosen, state, small, compiled) is state


class TestRuns:
    @pytest.mark.slow
    def test_snapshots_are_an_ensemble(self, snapshot_run, small):
        result = snapshot_run
        assert_array_equal(result.state.method_state.number, 3)
        with np.load(result.folder / "predictions.npz") as saved:
            each, labels = saved["member_log_probs"], saved["labels"]
        assert each.shape == (3, 100, 10)
        mean = np.log(np.mean(np.exp(each.astype(np.float64)), axis=0))
        assert_allclose(result.log_probs, mean, atol=1e-5)
        for name, value in diversity.evaluate(each, labels).items():
            assert_allclose(result.metrics[name], value, rtol=1e-3, atol=1e-6)
        rows = result.metrics["members"]
        assert [row["model"] for row in rows] == ["one_layer"] * 3
        for row, own in zip(rows, each, strict=True):
            assert_allclose(row["nll"], metrics.nll(np.exp(own), labels), rtol=1e-4)
            assert math.isfinite(row["sharpness"])
        assert result.metrics["parameters"] == 3 * 418
        # Logged before the second member: one model's numbers; then those of members.
        tests = [r for r in result.history if r["split"] == "test"]
        counts = [len(r.get("members", {}).get("nll", ())) for r in tests]
        assert counts == [0, 0, 0, 2, 2, 3]

    @pytest.mark.slow
    def test_learning_rates_of_the_log_are_those_of_the_method(self, snapshot_run):
        rates = {
            r["step"]: r["learning_rate"]
            for r in snapshot_run.history
            if r["split"] == "train"
        }
        want = schedules.cyclic_cosine(0.3, 30, 3)
        for step, rate in rates.items():
            assert_allclose(rate, want(step - 1), rtol=1e-5, atol=1e-8)

    @pytest.mark.slow
    def test_swag_predicts_with_samples(self, swag_run):
        result = swag_run
        assert result.metrics["epistemic"] > 0
        assert "members" not in result.metrics
        assert result.metrics["parameters"] == 418
        assert result.metrics["accuracy"] > 0.35  # ten classes, 30 steps
        assert int(result.state.method_state.number) == 3

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("fge", dict(members="2")),
            ("snapshot", dict(base_method="otmdr", num_particles=2, dtype="bfloat16")),
            ("swa", dict(base_method="sam", dtype="float16", mesh="data=2",
                         sync_batchnorm=True)),
        ],
    )  # fmt: skip
    def test_it_runs_with_what_other_methods_run_with(self, name, options, small):
        chosen = of_method(name, **{"eval_every": 9, **options})
        result = training.train(chosen, small, show_progress=False)
        assert result.metrics["accuracy"] > 0.3
        if chosen.model.members is not None:
            kept = result.state.method_state
            assert_array_equal(kept.number, [3, 3])
            weights = kept.params["head"]["kernel"]
            assert weights.shape == (2, 3, 32, 10)
            assert not np.allclose(weights[0], weights[1])
            assert not np.allclose(weights[:, 0], weights[:, 1])
            assert len(result.metrics["members"]) == 2
            assert result.metrics["epistemic"] > 0

    @pytest.mark.parametrize("number", [1, 2])
    def test_slots_that_are_empty_do_not_count(self, small, number):
        # An ensemble of runs that have collected some of their copies.
        chosen = of_method("snapshot", members="2")
        compiled = programs.compile_programs(chosen, small)
        state = compiled.init(jax.random.key(0))
        kept = state.method_state
        rng = np.random.default_rng(0)
        drawn = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), kept.params
        )
        state = state._replace(
            method_state=kept._replace(
                params=drawn, number=jnp.full_like(kept.number, number)
            )
        )
        found = prediction.predict(chosen, state, small.test, compiled)
        each = np.exp(np.asarray(compiled.predict(state, small.test.images[:100])))
        each = each.reshape(2, -1, 100, 10)[:, :number].astype(np.float64)
        entropy = -np.sum(each * np.log(np.maximum(each, 1e-300)), axis=-1)
        if number == 1:
            assert found.within is None
        else:
            assert_allclose(found.within, entropy.mean(axis=1), rtol=1e-4, atol=1e-6)
        total = each.mean(axis=(0, 1))
        total = -np.sum(total * np.log(np.maximum(total, 1e-300)), axis=-1)
        want = total - entropy.mean(axis=(0, 1))
        assert_allclose(found.mutual_information(), want, rtol=1e-3, atol=1e-6)
        weights = [params for params, _ in members.predictors(chosen, state)]
        want = np.asarray(drawn["head"]["kernel"])[:, :number].reshape(-1, 32, 10)
        assert_array_equal([w["head"]["kernel"] for w in weights], want)
        assert members.num_parameters(chosen, state) == 2 * number * 418

    @pytest.mark.slow
    def test_runs_are_joined_into_an_ensemble(
        self, small, swag_run, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(programs, "load_data", lambda config: small)
        other = of_method("swag", seed=1)
        training.train(other, small, tmp_path / "1", show_progress=False)
        paths = [swag_run.folder, tmp_path / "1"]
        joined = combine.combine(paths, tmp_path / "both", show_progress=False)
        with np.load(tmp_path / "both" / "predictions.npz") as both:
            got = both["member_log_probs"][0]
        # Its own samples, statistics of the same pass: the seed is the first run's.
        assert_allclose(got, swag_run.log_probs, atol=0.05)
        assert joined["disagreement"] > 0 and joined["epistemic"] > 0


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(method="snapshot", schedule="step"), "part of the method"),
            (dict(method="fge", warmup_epochs=1.0), "part of the method"),
            (dict(method="snapshot", swag_rank=5), "snapshot has no option swag_rank"),
            (dict(method="sgd", cycles=3), "sgd has no option cycles"),
            (dict(method="swa", rho=(0.1,)), "swa has no option rho"),
            (dict(method="swa", num_samples=3), "swa has no option num_samples"),
            (
                dict(method="snapshot", members="2", ensemble="joint"),
                "joint ensemble is not defined",
            ),
            (
                dict(method="swag", prediction="mean", num_samples=3),
                "leave one of them out",
            ),
        ],
    )
    def test_options_that_do_not_go_together(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(collect_start=1.0), r"collect_start must be in \(0, 1\)"),
            (dict(cycle_rates=(0.01, 0.05)), "higher one first"),
            (dict(swag_rank=1), "at least 2"),
            (dict(cycles=0), "at least 1"),
            (dict(batchnorm_examples=0), "at least 1"),
        ],
    )
    def test_bad_numbers(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)

    def test_bases_that_are_none(self):
        model = models.create("cnn_small", 10)
        with pytest.raises(ValueError, match="base of swa must be one of"):
            methods.create("swa", model, optax.sgd(0.1), base="sgvb", ends=(1, 2))


@pytest.mark.parametrize(
    ("options", "gradients"),
    [  # counted by a callback in the loss; the table is that of docs/method.md
        (dict(split="random"), 6.0),
        (dict(split="shared", noise_std=0.1, rho=(0.1,)), 4.0),
        (dict(split="shared", noise_std=0.1, rho=(0.1, 0.2)), 7.0),
        (dict(split="ordered", noise_std=0.1, rho=(0.1, 0.2)), 5.0),
        (
            dict(
                split="ordered", sampler="langevin", chain_steps=4, tilt=0.5, rho=(0.1,)
            ),
            5.5,
        ),
        (dict(split="ordered", num_particles=1), 2.0),
        (dict(split="shared", num_particles=1), 3.0),
    ],
)
def test_particles_share_their_first_gradient(options, gradients):
    found = TrainConfig(**{"num_particles": 3, **options})
    assert cost.gradient_evaluations(found) == pytest.approx(gradients)


def test_a_step_costs_what_one_of_its_base_does():
    assert cost.gradient_evaluations(of_method("swag")) == 1.0
    sam = of_method("snapshot", base_method="sam", members="2")
    assert cost.gradient_evaluations(sam) == 4.0
    assert cost.gradient_evaluations(TrainConfig(method="edst")) == 1.0
    assert {"cycles", "density"} <= config.method_options().keys()


def test_labels_name_the_base():
    chosen = of_method("snapshot", base_method="sam").flat()
    assert report.label_of(chosen) == "Snapshot of SAM"


@pytest.mark.slow
def test_the_command_line_trains_and_evaluates(few_digits, tmp_path, capsys):
    common = ["--model", "one_layer", "--steps", "16", "--batch-size", "64",
              "--mesh", "data=1", "--quiet"]  # fmt: skip
    runs = []
    for name, options in {
        "snapshot": ["--cycles", "2"],
        "swag": ["--num-samples", "3", "--collect-every", "0.15"],
    }.items():
        runs.append(str(tmp_path / name))
        cli.main(["train", "--method", name, "--output", runs[-1], *options, *common])
        assert "Run: " in capsys.readouterr().out
    cli.main(["evaluate", runs[0]])
    out = capsys.readouterr().out
    assert "0: one_layer" in out and "1: one_layer" in out
    result = json.loads((tmp_path / "snapshot" / "result.json").read_text())
    found = json.loads((tmp_path / "snapshot" / "evaluation.json").read_text())
    assert_allclose(found["nll"], result["nll"], rtol=1e-5)
    assert len(found["members"]) == 2
    # Another number of samples than the run's, from the same checkpoint.
    result = json.loads((tmp_path / "swag" / "result.json").read_text())
    cli.main(["evaluate", runs[1], "--num-samples", "5"])
    found = json.loads((tmp_path / "swag" / "evaluation_5_samples.json").read_text())
    assert found["nll"] != result["nll"]
    assert_allclose(found["nll"], result["nll"], rtol=0.1)
    assert config.load(tmp_path / "swag" / "config.json").method.collect_every == 0.15
    found = report.with_distinct_labels([report.read_run(run) for run in runs])
    assert [run.label for run in found] == ["Snapshot", "SWAG"]
