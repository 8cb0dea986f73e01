"""IVON against its equations in NumPy, an exact posterior, and as a method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from otmdr_jax import baselines, bnn, parallel
from otmdr_jax.experiments import cli, methods, report
from otmdr_jax.experiments.config import TrainConfig
from tests.baselines.test_bsam import Linear, gradient, loss, problem, run

ALPHA, B1, B2, DELTA, H0, N = 0.2, 0.8, 0.9, 0.05, 0.5, 40.0
OPTIONS = dict(
    learning_rate=ALPHA, b1=B1, b2=B2, weight_decay=DELTA, hess_init=H0, num_data=N
)


def in_numpy(w, batches, draws, clip=np.inf, debias=True):
    """Algorithm 1 as the released code computes it, in float64.

    `draws[t]` are standard normal, one for each sample of a step.
    """
    h, m = np.full_like(w, H0), np.zeros_like(w)
    for t, ((x, y), kappas) in enumerate(zip(batches, draws, strict=True), start=1):
        grads, products = [], []
        for kappa in kappas:
            e = np.asarray(kappa, np.float64) / np.sqrt(N * (h + DELTA))
            grads.append(gradient(w + e, x, y))
            products.append(e * grads[-1])
        m = B1 * m + (1 - B1) * np.mean(grads, axis=0)
        f = N * (h + DELTA) * np.mean(products, axis=0)
        h = B2 * h + (1 - B2) * f + 0.5 * (1 - B2) ** 2 * (h - f) ** 2 / (h + DELTA)
        momentum = m / (1 - B1**t) if debias else m
        step = np.clip((momentum + DELTA * w) / (h + DELTA), -clip, clip)
        w = w - ALPHA * (H0 + DELTA) * step
    return w, h


def draws_of(key, steps, samples):
    """What the library draws in each step."""
    found = []
    for _ in range(steps):
        key, step_key = jax.random.split(key)
        keys = [step_key] if samples == 1 else jax.random.split(step_key, samples)
        found.append([jax.random.normal(jax.random.fold_in(k, 0), (4,)) for k in keys])
    return found


class TestEquations:
    @pytest.mark.parametrize(
        "options",
        [{}, {"samples": 3}, {"clip": 0.5}, {"debias": False}],
        ids=["plain", "samples", "clip", "debias"],
    )
    def test_three_steps(self, options, key):
        w, batches = problem()
        options = dict(options)
        samples = options.pop("samples", 1)
        want, hess = in_numpy(w, batches, draws_of(key, 3, samples), **options)
        tx = baselines.ivon(
            loss, key, mc_samples=samples, clip_radius=options.get("clip"),
            debias=options.get("debias", True), **OPTIONS,
        )  # fmt: skip
        got, states = run(tx, w, batches)
        assert_allclose(got, want, rtol=5e-5, atol=1e-6)
        assert_allclose(states[-1].hess, hess, rtol=5e-5)

    @pytest.mark.slow
    def test_without_rescaling(self, key):
        w, batches = problem(steps=1)
        one, _ = run(baselines.ivon(loss, key, **OPTIONS), w, batches)
        other, _ = run(baselines.ivon(loss, key, rescale=False, **OPTIONS), w, batches)
        assert_allclose(one - w, (H0 + DELTA) * (other - w), rtol=1e-4)

    @pytest.mark.slow
    def test_the_noise_has_a_root(self, key):
        """On w^2 / 2 the gradient less w is the noise."""
        tx = baselines.ivon(
            lambda w, batch: jnp.sum(w**2) / 2 + 0 * jnp.mean(batch), key,
            **OPTIONS | dict(b1=0.0, learning_rate=1.0), rescale=False, debias=False,
        )  # fmt: skip
        w = jnp.full(200_000, 3.0)
        updates, state = jax.jit(tx.update)(w, tx.init(w), w, batch=jnp.zeros(2))
        step = -np.asarray(updates, np.float64) * (np.asarray(state.hess) + DELTA)
        e = step - DELTA * 3.0 - 3.0
        assert_allclose(e.mean(), 0, atol=2e-3)
        assert_allclose(e.std(), 1 / np.sqrt(N * (H0 + DELTA)), rtol=0.01)

    @pytest.mark.slow
    def test_it_finds_the_posterior_of_a_gaussian(self, key):
        """Of a quadratic loss: precision a + delta, mean 0.5 a / (a + delta)."""
        a = jnp.repeat(jnp.array([0.5, 2.0, 8.0]), 4_000)
        tx = baselines.ivon(
            lambda w, batch: jnp.sum(a * (w - 0.5) ** 2) / 2 + 0 * jnp.mean(batch),
            key, learning_rate=0.05, num_data=50.0, weight_decay=0.1, b2=0.98,
        )  # fmt: skip

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(w, state, w, batch=jnp.zeros(2))
            return (optax.apply_updates(w, updates), state), None

        w = jnp.zeros(12_000)
        (w, state), _ = jax.jit(
            lambda w, s: jax.lax.scan(step, (w, s), length=600)
        )(w, tx.init(w))  # fmt: skip
        for part, true in zip(np.split(np.arange(12_000), 3), (0.5, 2, 8), strict=True):
            assert_allclose(np.mean(state.hess[part]), true, rtol=0.06)
            assert_allclose(np.mean(w[part]), 0.5 * true / (true + 0.1), rtol=0.03)
        assert np.all(np.asarray(state.hess) + 0.1 > 0)
        q = baselines.posterior(w, baselines.ivon_precision(state.hess, 0.1), 50.0)
        assert_allclose(np.mean(bnn.std(q)[-4000:]), 1 / np.sqrt(50 * 8.1), rtol=0.1)

    @pytest.mark.slow
    @pytest.mark.parametrize("samples", [1, 2])
    def test_on_devices(self, samples, key):
        w, batches = problem(steps=1, size=16)
        w = jnp.asarray(w, jnp.float32)
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batches[0])
        one = baselines.ivon(loss, key, mc_samples=samples, **OPTIONS)
        want, there = one.update(w, one.init(w), w, batch=batch)
        tx = baselines.ivon(
            loss,
            key,
            mc_samples=samples,
            axis_name="data",
            microbatch_size=2,
            **OPTIONS,
        )

        def step(state, batch):
            updates, state = tx.update(w, state, w, batch=batch)
            return state, updates

        mesh = parallel.make_mesh("data=4")
        state, got = parallel.shard_map_step(step, mesh, donate=False)(
            tx.init(w), batch
        )
        assert_allclose(got, want, rtol=1e-4)
        assert_allclose(state.hess, there.hess, rtol=1e-4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(key=None), "pass a key"),
            (dict(num_data=float("inf")), "num_data must be positive and finite"),
            (dict(learning_rate=float("nan")), "learning_rate must be finite"),
            (dict(weight_decay=0.0), "weight_decay must be positive"),
            (dict(hess_init=0.0), "hess_init must be positive"),
            (dict(b2=1.0), "b2 must be in"),
            (dict(mc_samples=0), "mc_samples must be at least 1"),
            (dict(clip_radius=0.0), "clip_radius must be positive"),
        ],
    )
    def test_what_cannot_work_is_refused(self, options, message, key):
        with pytest.raises(ValueError, match=message):
            baselines.ivon(loss, **{"key": key, **OPTIONS, **options})


class TestMethod:
    def make(self, **options):
        own = dict(
            num_data=N, weight_decay=DELTA, hess_init=H0, b1=B1, b2=B2,
            learning_rate=ALPHA,
        )  # fmt: skip
        return methods.create(
            "ivon", Linear(), optax.identity(), num_samples=3, **own, **options
        )

    @pytest.mark.slow
    def test_a_step_is_one_of_the_transformation(self, key):
        method, model = self.make(), Linear()
        images = jax.random.normal(key, (8, 2))
        batch = images, jnp.arange(8) % 3
        state = method.init(key, images)

        def loss_fn(params, batch):
            logits, _ = model.apply(params, {}, batch[0], train=True)
            return methods.cross_entropy(logits, batch[1])

        tx = baselines.ivon(loss_fn, state.key, **OPTIONS)
        updates, want = jax.jit(tx.update)(
            state.params, tx.init(state.params), state.params, batch=batch
        )
        params = optax.apply_updates(state.params, updates)
        got, metrics = jax.jit(method.step)(state, batch)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-5), got.params, params)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-5), got.memory, want.hess)
        assert metrics["distance"] > 0 and metrics["gap"] == 0
        predicted = method.predict(got, images)
        assert predicted.shape == (3, 8, 3)
        sigma = bnn.std(method.posterior(got))["w"]
        assert_allclose(sigma, 1 / np.sqrt(N * (got.memory["w"] + DELTA)), rtol=1e-4)
        at_mean = self.make(mean_only=True).predict(got, images)
        logits = images @ got.params["w"]
        assert_allclose(at_mean[0], jax.nn.log_softmax(logits), rtol=1e-5)

    @pytest.mark.slow
    def test_the_command_line(self, one_layer, few_digits, tmp_path, capsys):
        output = tmp_path / "run"
        common = ["train", "--output", str(output), "--quiet"]
        options = ["--method", "ivon", "--mesh", "data=1", "--num-samples", "2",
                   "--mc-samples", "2", "--hess-init", "0.5"]  # fmt: skip
        cli.main([*common, *options, "--model", one_layer, "--steps", "4"])
        found = report.read_run(output)
        assert found.label == "IVON" and found.result["epistemic"] > 0
        assert np.isfinite(found.result["nll"])
        assert sum(found.result["posterior"]["snr_counts"]) == 418
        capsys.readouterr()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(weight_decay=0.0), "ivon needs a weight decay"),
            (dict(rho=(0.1,)), "ivon has no option rho"),
            (dict(num_subbatches=2), "ivon has no option num_subbatches"),
            (dict(optimizer="adamw"), "an update of its own"),
            (dict(method="bsam", mc_samples=2), "bsam has no option mc_samples"),
        ],
    )
    def test_options_that_do_not_go_together(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**{"method": "ivon", **options})

    def test_options_reach_the_gradient_and_the_rule(self):
        chosen = TrainConfig(
            method="ivon", b2=0.5, hess_init=2.0, clip_radius=1.0, data_factor=2.0
        )
        run = methods.Run(chosen, 100, 5, 10, optax.constant_schedule(0.1), None)
        more = chosen.method.options(run)
        assert (more["clip_radius"], more["b2"], more["hess_init"]) == (1.0, 0.5, 2.0)
        assert more["num_data"] == 200.0 and more["weight_decay"] == 5e-4
        for bad in (dict(hess_init=0.0), dict(clip_radius=-1.0), dict(mc_samples=0)):
            with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
                TrainConfig(method="ivon", **bad)
