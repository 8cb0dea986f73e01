"""bSAM against its equations in NumPy, its limits, and as a method of training."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import otmdr_jax
from otmdr_jax import baselines, bnn, parallel
from otmdr_jax.experiments import cli, config, methods, report, training
from otmdr_jax.experiments.config import TrainConfig
from tests import toy
from tests.sets import small_digits

ALPHA, B1, B2, DELTA, RHO, GAMMA, N = 0.3, 0.8, 0.9, 0.02, 0.05, 0.1, 50.0
OPTIONS = dict(
    learning_rate=ALPHA, b1=B1, b2=B2, weight_decay=DELTA, rho=RHO, damping=GAMMA,
)  # fmt: skip


def gradient(w, x, y):
    return 2 * x.T @ (x @ w - y) / len(y)


def in_numpy(w, batches, draws, parts, order="released"):
    """The listing of the paper and the released code, in float64.

    `draws[t][j]` is standard normal noise; None for none.
    """
    s, m = np.ones_like(w), np.zeros_like(w)
    for (x, y), kappas in zip(batches, draws, strict=True):
        perturbed, curvature = [], []
        for xj, yj, kappa in zip(
            np.split(x, parts), np.split(y, parts), kappas, strict=True
        ):
            g = gradient(w + kappa / np.sqrt(N * s), xj, yj)
            perturbed.append(gradient(w + RHO * g / s, xj, yj))
            curvature.append(np.sqrt(s) * np.abs(g))
        m = B1 * m + (1 - B1) * (np.mean(perturbed, 0) + DELTA * w)
        new = B2 * s + (1 - B2) * (np.mean(curvature, 0) + GAMMA + DELTA)
        w = w - ALPHA * m / (s if order == "released" else new)
        s = new
    return w, s


def problem(seed=0, steps=3, size=12, dim=4):
    rng = np.random.default_rng(seed)
    batches = [
        (rng.normal(size=(size, dim)), rng.normal(size=size)) for _ in range(steps)
    ]
    return rng.normal(size=dim), batches


def loss(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def run(tx, w, batches):
    w = jnp.asarray(w, jnp.float32)
    state, update = tx.init(w), jax.jit(tx.update)
    states = []
    for batch in batches:
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
        updates, state = update(jnp.zeros_like(w), state, w, batch=batch)
        w = optax.apply_updates(w, updates)
        states.append(state)
    return w, states


class TestEquations:
    @pytest.mark.parametrize("parts", [1, 3])
    @pytest.mark.parametrize("order", ["released", "paper"])
    def test_three_steps_without_noise(self, parts, order):
        w, batches = problem()
        still = [[np.zeros(4)] * parts] * 3
        want, precision = in_numpy(w, batches, still, parts, order)
        tx = baselines.bsam(
            loss,
            None,
            num_data=float("inf"),
            num_subbatches=parts,
            order=order,
            **OPTIONS,
        )
        got, states = run(tx, w, batches)
        assert_allclose(got, want, rtol=2e-5, atol=1e-6)
        assert_allclose(states[-1].precision, precision, rtol=2e-5)

    @pytest.mark.parametrize("parts", [1, 3])
    def test_three_steps_with_noise(self, parts, key):
        """The draws are the library's own; what is made of them is NumPy's."""
        w, batches = problem()
        now, draws = key, []
        for _ in range(3):
            now, step_key = jax.random.split(now)
            keys = [step_key] if parts == 1 else jax.random.split(step_key, parts)
            draws.append(
                [
                    np.asarray(jax.random.normal(jax.random.fold_in(k, 0), (4,)))
                    for k in keys
                ]
            )
        want, precision = in_numpy(w, batches, draws, parts)
        tx = baselines.bsam(loss, key, num_data=N, num_subbatches=parts, **OPTIONS)
        got, states = run(tx, w, batches)
        assert_allclose(got, want, rtol=2e-5, atol=1e-6)
        assert_allclose(states[-1].precision, precision, rtol=2e-5)

    def test_the_noise_has_a_root_and_is_not_in_the_second_pass(self, key):
        """On w^2 / 2 gradients are weights: precision and momentum show the noise."""
        s, n, w0 = 4.0, 25.0, 10.0  # a standard deviation of 0.1
        tx = baselines.bsam(
            lambda w, batch: jnp.sum(w**2) / 2 + 0 * jnp.mean(batch),
            key, num_data=n, precision_init=s, **OPTIONS,
        )  # fmt: skip
        w = jnp.full(200_000, w0)
        updates, state = jax.jit(tx.update)(w, tx.init(w), w, batch=jnp.zeros(2))
        target = (np.asarray(state.precision, np.float64) - B2 * s) / (1 - B2)
        e = (target - GAMMA - DELTA) / np.sqrt(s) - w0
        assert_allclose(e.mean(), 0, atol=2e-3)
        assert_allclose(e.std(), 1 / np.sqrt(n * s), rtol=0.01)
        # g' = w + rho (w + e) / s, whatever else e would do if it stayed.
        m = -np.asarray(updates, np.float64) * s / ALPHA / (1 - B1)
        assert_allclose(m, w0 + RHO * (w0 + e) / s + DELTA * w0, rtol=1e-5)

    @pytest.mark.slow
    def test_sub_batches_draw_their_own_noise(self, key):
        tx = baselines.bsam(
            lambda w, batch: jnp.sum(w**2) / 2 + 0 * jnp.mean(batch),
            key, num_data=1.0, num_subbatches=4, **OPTIONS,
        )  # fmt: skip
        w = jnp.full(100_000, 100.0)
        _, state = jax.jit(tx.update)(w, tx.init(w), w, batch=jnp.zeros(8))
        mean = (np.asarray(state.precision, np.float64) - B2) / (1 - B2) - GAMMA - DELTA
        assert_allclose((mean - 100).std(), 1 / np.sqrt(4), rtol=0.02)

    def test_without_perturbation_momentum_or_curvature_it_is_gradient_descent(self):
        w, batches = problem()
        tx = baselines.bsam(
            loss, learning_rate=ALPHA, b1=0.0, b2=0.0, weight_decay=0.0, rho=0.0,
            damping=1.0, num_data=float("inf"),
        )  # fmt: skip
        got, _ = run(tx, w, batches[:1])  # the first step is divided by 1
        assert_allclose(got, w - ALPHA * gradient(w, *batches[0]), rtol=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(key=None), "pass a key"),
            (dict(learning_rate=math.nan), "learning_rate must be finite"),
            (dict(b2=1.0), "b2 must be in"),
            (dict(b1=-0.1), "b1 must be"),
            (dict(num_data=0), "num_data must be positive"),
            (dict(rho=(0.1, 0.2)), "one radius"),
            (dict(precision_init=0.0), "precision_init must be positive"),
            (dict(order="first"), "order must be one of"),
            (dict(num_subbatches=0), "num_subbatches must be at least 1"),
            (dict(has_aux=True), "needs aux_init"),
        ],
    )
    def test_what_cannot_work_is_refused(self, options, message, key):
        options = {"key": key, "num_data": N, **OPTIONS, **options}
        with pytest.raises(ValueError, match=message):
            baselines.bsam(loss, **options)

    def test_parts_that_do_not_divide_the_batch_are_refused(self, key):
        w, batches = problem()
        tx = baselines.bsam(loss, key, num_data=N, num_subbatches=5, **OPTIONS)
        with pytest.raises(ValueError, match="5 sub-batches of one size"):
            run(tx, w, batches)


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("bsam", "float16", 300.0),
        ("bsam", "bfloat16", 300.0),
        ("bsam", "float32", 1e20),
        ("ivon", "float32", 1e20),
    ],
)
def test_a_gradient_is_clipped_where_its_square_overflows(name, dtype, size, key):
    """optax.clip_by_global_norm makes it 0 there."""
    w = jnp.zeros(2, dtype)
    options = dict(rho=0.0, b1=0.0) if name == "bsam" else dict(b1=0.0)
    tx = getattr(baselines, name)(
        lambda w, batch: jnp.sum(w * jnp.asarray(size, dtype)), key,
        learning_rate=1.0, num_data=1e30, clip_norm=1.0, weight_decay=0.0 + 1e-3,
        **options,
    )  # fmt: skip
    state = tx.init(w)
    update, _ = tx.update(w, state, w, batch=jnp.zeros(1))
    # The direction of (1, 1), of length 1: bSAM divides by the precision of before the
    # step, and IVON keeps its Hessian where the new one overflows.
    assert_allclose(np.float64(update), [-(2**-0.5)] * 2, rtol=5e-3)


@pytest.mark.parametrize("name", ["bsam", "ivon"])
def test_a_number_of_examples_may_be_large(name, key):
    """JAX's integers end at 2^31."""
    found = []
    for count in (10**10, 1e10):
        w = jnp.ones(3)
        tx = getattr(baselines, name)(
            lambda w, batch: jnp.mean(w**2), key,
            learning_rate=0.1, num_data=count, weight_decay=1e-3,
        )  # fmt: skip
        found.append(tx.update(w, tx.init(w), w, batch=jnp.zeros(1))[0])
        q = baselines.posterior(w, jnp.full(3, 4.0), num_data=count)
        assert_allclose(bnn.std(q), 1 / np.sqrt(4e10), rtol=1e-5)
    assert_allclose(*found)


class TestDevices:
    @pytest.mark.slow
    @pytest.mark.parametrize("devices", [1, 4])
    def test_sub_batches_on_devices_are_those_of_one(self, devices, key):
        w, batches = problem(steps=1, size=16)
        w = jnp.asarray(w, jnp.float32)
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batches[0])
        make = lambda axis: baselines.bsam(  # noqa: E731
            loss, key, num_data=N, num_subbatches=4, axis_name=axis, **OPTIONS
        )
        want, there = make(None).update(w, make(None).init(w), w, batch=batch)
        tx = make("data")

        def step(state, batch):
            updates, state = tx.update(w, state, w, batch=batch)
            return state, updates

        mesh = parallel.make_mesh(f"data={devices}")
        state, got = parallel.shard_map_step(step, mesh, donate=False)(
            tx.init(w), batch
        )
        assert_allclose(got, want, rtol=1e-5)
        assert_allclose(state.precision, there.precision, rtol=1e-5)

    def test_devices_that_perturb_on_their_own_draw_their_own_noise(self, key):
        """As sub-batches do: of the same examples, their curvatures differ."""
        w, batches = problem(size=4)
        twice = jax.tree.map(lambda x: np.concatenate([x, x]), batches[0])

        def precision(sync, size=2):
            tx = baselines.bsam(
                loss, key, num_data=N, axis_name="data", sync_perturbation=sync,
                **OPTIONS,
            )  # fmt: skip

            def step(w, batch):
                return w, tx.update(w, tx.init(w), w, batch=batch)[1].precision

            mesh = parallel.make_mesh(f"data={size}")
            step = parallel.shard_map_step(step, mesh, donate=False)
            return np.asarray(
                step(jnp.float32(w), twice if size == 2 else batches[0])[1]
            )

        one = precision(False, size=1)
        assert_allclose(precision(True), one, rtol=1e-6)  # both draw as one does
        assert np.abs(precision(False) - one).max() > 1e-4

    def test_sub_batches_that_devices_do_not_share_are_refused(self, key):
        grad_fn = otmdr_jax.value_and_grad(
            toy.regression, 0.1, split="shared", num_subbatches=3, axis_name="data"
        )
        params, batch = toy.regression_problem(batch=24)
        step = parallel.shard_map_step(
            lambda p, b: grad_fn(p, b)[::-1], parallel.make_mesh("data=2")
        )
        with pytest.raises(ValueError, match="multiple of the 2 devices"):
            step(params, batch)


class Linear:
    """Logits of three classes from two numbers."""

    def init(self, key, images):
        del images
        return {"w": jax.random.normal(key, (2, 3))}, {}

    def apply(self, params, state, images, train):
        del train
        return images @ params["w"], state


@pytest.fixture(scope="module")
def small():
    return small_digits(400)


@pytest.fixture(scope="module")
def straight(one_layer, tmp_path_factory):
    """A run from the command line, on digits."""
    folder = tmp_path_factory.mktemp("straight") / "bsam"
    cli.main(
        ["train", "--method", "bsam", "--output", str(folder), "--quiet",
         "--model", one_layer,
         "--mesh", "data=1", "--steps", "24", "--batch-size", "64", "--log-every", "2",
         "--learning-rate", "0.5", "--num-subbatches", "1", "--num-samples", "4",
         "--weight-decay", "1e-3", "--seed", "3"]
    )  # fmt: skip
    return folder


class TestTraining:
    @pytest.mark.slow
    def test_a_step_of_the_method_is_one_of_the_transformation(self, key):
        model = Linear()
        options = dict(weight_decay=DELTA, num_data=400.0, damping=GAMMA, b2=B2)
        options |= dict(learning_rate=ALPHA, b1=B1)
        rule = optax.identity()
        method = methods.create(
            "bsam", model, rule, rho=RHO, num_subbatches=2, num_samples=3, **options
        )
        images = jax.random.normal(key, (8, 2))
        batch = images, jnp.arange(8) % 3
        state = method.init(key, images)

        def loss_fn(params, batch, model_state):
            logits, _ = model.apply(params, model_state, batch[0], train=True)
            return methods.cross_entropy(logits, batch[1])

        tx = baselines.bsam(
            loss_fn, state.key, rho=RHO, num_subbatches=2, **options
        )  # fmt: skip
        updates, want = tx.update(
            None, tx.init(state.params), state.params, batch=batch,
            loss_args=(state.model_state,),
        )  # fmt: skip
        params = optax.apply_updates(state.params, updates)
        got, _ = jax.jit(method.step)(state, batch)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-5, 1e-6), got.params, params)
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, 1e-4, 1e-6), got.memory, want.precision
        )
        # Prediction: samples of N(w, 1 / (N s)), written out.
        predicted = method.predict(got, images)
        assert predicted.shape == (3, 8, 3)
        q = method.posterior(got)
        jax.tree.map(
            lambda sigma, s: assert_allclose(sigma, 1 / np.sqrt(400 * s), 1e-4),
            bnn.std(q), got.memory,
        )  # fmt: skip
        at_mean = methods.create(
            "bsam", model, rule, rho=RHO, mean_only=True, **options
        ).predict(got, images)
        logits, _ = model.apply(got.params, got.model_state, images, train=False)
        assert_allclose(at_mean, jax.nn.log_softmax(logits)[None], 1e-5, 1e-5)
        assert np.abs(np.asarray(predicted - at_mean)).max() > 1e-4

    @pytest.mark.slow
    def test_a_run_learns_and_logs_its_posterior(self, straight, capsys):
        found = report.read_run(straight)
        assert found.label == "bSAM" and found.config["learning_rate"] == 0.5
        rows = [r for r in found.history if r["split"] == "train"]
        assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
        assert found.result["epistemic"] > 0
        weights = found.result["parameters"]
        assert sum(found.result["posterior"]["snr_counts"]) == weights
        cli.main(["evaluate", str(straight), "--prediction", "mean"])
        assert "bSAM" in capsys.readouterr().out

    @pytest.mark.slow
    def test_float16_on_two_devices(self, one_layer, small):
        chosen = TrainConfig(
            model=one_layer, method="bsam", steps=4, batch_size=64, mesh="data=2",
            dtype="float16", num_subbatches=2, prediction="mean",
        )  # fmt: skip
        result = training.train(chosen, small, show_progress=False)
        assert np.isfinite(result.metrics["nll"]) and "epistemic" not in result.metrics
        for leaf in jax.tree.leaves(result.state.memory):
            assert leaf.dtype == jnp.float32 and not np.any(leaf == 1.0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(optimizer="adam"), "an update of its own"),
            (dict(nesterov=True), "an update of its own"),
            (dict(decay_all=False), "an update of its own"),
            (dict(members="2", ensemble="joint"), "joint ensemble"),
            (dict(rho=(0.1, 0.2)), "one radius"),
            (dict(num_particles=2), "has no option num_particles"),
            (dict(prior_std=0.2), "has no option prior_std"),
            (dict(prediction="mean", num_samples=3), "leave one of them out"),
            (dict(batch_size=100, mesh="data=1"), "8 sub-batches of one size"),
            (dict(mesh="data=3", batch_size=96), "8 sub-batches of one size"),
            (dict(method="sgd", damping=0.2), "sgd has no option damping"),
        ],
    )
    def test_options_that_do_not_go_together(self, options, message):
        with pytest.raises(ValueError, match=message):
            chosen = TrainConfig(steps=1, **{"method": "bsam", **options})
            training.train(chosen, show_progress=False)

    @pytest.mark.parametrize(
        "options", [dict(b2=1.0), dict(data_factor=0.0), dict(damping=-1.0)]
    )
    def test_numbers_are_checked(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            TrainConfig(method="bsam", **options)


def test_presets_are_the_released_commands():
    for name in ("cifar10", "cifar100"):
        found = config.preset(f"bsam-{name}")
        assert (found.data.name, found.model.name, found.run.epochs) == (
            name,
            "resnet_18",
            180,
        )
        assert (
            found.run.batch_size,
            found.method.num_subbatches,
            found.method.rho,
        ) == (200, 8, (0.01,))
        assert (
            found.optimizer.weight_decay == 10 / (4 * 50_000)
            and found.method.num_samples == 32
        )
        assert found.method == type(found.method)(
            data_factor=4.0, num_samples=32, num_subbatches=8
        )
