"""Bayesian networks as methods: training, resumption, prediction, reports, devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from otmdr_jax import bnn, data, metrics, models
from otmdr_jax.experiments import (
    building,
    checkpoint,
    cli,
    config,
    methods,
    optimizers,
    prediction,
    programs,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import evaluation, sharpness
from tests.experiments.test_training import assert_same_bits
from tests.sets import small_digits

pytestmark = pytest.mark.usefixtures("one_layer")

TINY = TrainConfig(
    model="one_layer", mesh="data=1", method="otmdr-bnn", noise_std=0.01, epochs=3,
    batch_size=64, log_every=2, seed=3, optimizer="adam", learning_rate=0.01,
    schedule="plateau", num_samples=5, posterior_std=0.02,
)  # fmt: skip
ONE = TINY.replace(epochs=1, prediction="mean", num_samples=30)
METHODS = tuple(n for n, kind in methods.METHODS.items() if kind.is_posterior)


@pytest.fixture(scope="module")
def small():
    return small_digits(400, validation=80)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """An uninterrupted run of each method, trained when it is asked for."""

    class Runs(dict):
        def __missing__(self, method):
            chosen = of_method(TINY, method)
            folder = tmp_path_factory.mktemp("straight") / method
            self[method] = training.train(chosen, small, folder, show_progress=False)
            return self[method]

    return Runs()


@pytest.fixture(scope="module")
def sgvb(straight):
    return straight["sgvb"]


@pytest.fixture(scope="module")
def plain(small):
    return training.train(ONE, small, show_progress=False)


def of_method(chosen, method, **options):
    if method != "otmdr-bnn":
        options |= dict(noise_std=0.0)
    return chosen.replace(method=method, **options)


class TestMethod:
    def make(self, name, architecture="one_layer", **options):
        model = models.create(architecture, 10)
        own = dict(num_data=400, **options)
        return model, methods.create(name, model, optax.adam(1e-3), **own)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", METHODS)
    def test_a_step_is_gradient_and_update_of_the_posterior(self, name, key):
        model, method = self.make(name, kl_weight=0.5, prior=bnn.Normal(0.2))
        images = jax.random.normal(key, (16, 8, 8, 1))
        batch = images, jnp.arange(16) % 10
        state = method.init(key, images)
        assert isinstance(state.params, bnn.MeanField)

        def loss_fn(params, batch):
            logits, new = model.apply(params, state.model_state, batch[0], train=True)
            return methods.cross_entropy(logits, batch[1]), new

        options = dict(num_data=400, prior_std=0.2, kl_weight=0.5, has_aux=True)

        def dual(q, batch, key):
            made = bnn.dual_gradient(loss_fn, **options)
            found, _ = made.apply(made.init(), q, batch, key=key)
            return (found.value, found.aux), found.grads

        grad_fn = {
            "sgvb": bnn.sgvb(loss_fn, **options),
            "otmdr-bnn": bnn.value_and_grad(loss_fn, **options),
            "otmdr-dual-bnn": dual,
        }[name]
        step_key = jax.random.split(state.key)[1]
        (value, statistics), grads = jax.jit(grad_fn)(state.params, batch, key=step_key)
        updates, _ = optax.adam(1e-3).update(grads, optax.adam(1e-3).init(grads))
        want = optax.apply_updates(state.params, updates)
        new, numbers = jax.jit(method.step)(state, batch)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-4, 1e-6), new.params, want)
        assert_allclose(numbers["loss"], value, rtol=1e-5)
        assert_allclose(numbers["kl"], bnn.kl(state.params, bnn.Normal(0.2)), rtol=1e-4)
        for got, of_loss in zip(
            *map(jax.tree.leaves, (new.model_state, statistics)), strict=True
        ):
            assert_allclose(got, of_loss, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_predictions_are_of_samples_and_the_same_for_all_batches(self, key):
        model, method = self.make("sgvb", num_samples=4, sigma=0.3)
        images = jax.random.normal(key, (12, 8, 8, 1))
        state = method.init(key, images)
        whole = method.predict(state, images)
        assert whole.shape == (4, 12, 10)
        assert np.std(whole, axis=0).min() > 0
        parts = [method.predict(state, images[i : i + 4]) for i in (0, 4, 8)]
        assert_allclose(whole, np.concatenate(parts, axis=1), atol=1e-4)
        _, at_mean = self.make("sgvb", mean_only=True, sigma=0.3)
        logits, _ = model.apply(
            bnn.mean(state.params), state.model_state, images, train=False
        )
        want = jax.nn.log_softmax(logits)[None]
        assert_allclose(at_mean.predict(state, images), want, atol=1e-4)

    @pytest.mark.slow
    def test_weights_of_the_divergence_follow_their_schedule(self, key):
        images = jax.random.normal(key, (16, 8, 8, 1))
        batch = images, jnp.arange(16) % 10
        _, method = self.make("sgvb", kl_weight=bnn.warmup(2))
        state = method.init(key, images)
        step = jax.jit(method.step)
        for weight in (0.0, 0.5, 1.0, 1.0):
            state, numbers = step(state, batch)
            beside = numbers["loss"] - numbers["likelihood_term"]
            assert_allclose(beside, weight * numbers["kl"] / 400, rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    def test_the_released_codes_initialisation(self, key):
        _, method = self.make("otmdr-bnn", "cnn_small", init="released")
        q = method.init(key, jnp.zeros((1, 8, 8, 1))).params
        kernel, raw = q.mean["conv3"]["kernel"], q.raw_scale["conv3"]["kernel"]
        assert_allclose([kernel.mean(), kernel.std()], [0.0, 0.1], atol=0.005)
        assert_allclose([raw.mean(), raw.std()], [-5.0, 0.1], atol=0.005)
        assert q.point["norm1"]["scale"].tolist() == [1.0] * 16
        assert abs(np.corrcoef(kernel.ravel(), raw.ravel())[0, 1]) < 0.05

    def test_numbers_of_data_and_samples_are_checked(self):
        with pytest.raises(ValueError, match="num_data"):
            methods.create("sgvb", models.create("cnn_small", 10), optax.sgd(0.1))
        with pytest.raises(ValueError, match="num_samples"):
            self.make("sgvb", num_samples=0)
        with pytest.raises(ValueError, match="init must be"):
            self.make("sgvb", init="zeros")
        with pytest.raises(TypeError, match="rho"):
            self.make("sgvb", rho=0.1)


class TestRuns:
    @pytest.mark.slow
    @pytest.mark.parametrize("method", METHODS)
    def test_a_run_learns_and_logs_its_posterior(self, method, straight):
        result = straight[method]
        rows = {
            split: [row for row in result.history if row["split"] == split]
            for split in ("train", "test", "posterior")
        }
        assert (
            rows["train"][-1]["likelihood_term"] < rows["train"][0]["likelihood_term"]
        )
        for row in rows["train"]:
            assert np.isfinite(row["kl"]) and row["kl"] > 0
        assert [row["step"] for row in rows["posterior"]] == [5, 10, 15]
        q = result.state.params
        last = rows["posterior"][-1]
        assert_allclose(
            last["sigma"]["conv1/kernel"], bnn.std(q)["conv1"]["kernel"].mean(), 1e-4
        )
        ratio = np.abs(q.mean["head"]["bias"]) / np.asarray(bnn.std(q)["head"]["bias"])
        assert_allclose(
            last["snr_db"]["head/bias"], np.mean(20 * np.log10(ratio)), 1e-3
        )
        weights = sum(x.size for x in jax.tree.leaves(q.mean))
        assert sum(last["snr_counts"]) == weights
        assert result.metrics["posterior"]["sigma"] == last["sigma"]
        assert 0 < result.metrics["epistemic"] < result.metrics["aleatoric"]
        lines = (result.folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == result.history

    @pytest.mark.slow
    def test_a_finished_run_that_is_resumed_logs_nothing_twice(self, small, straight):
        result = straight["sgvb"]
        before = (result.folder / "metrics.jsonl").read_text()
        training.train(
            of_method(TINY, "sgvb"), small, result.folder, resume=True,
            show_progress=False,
        )  # fmt: skip
        assert (result.folder / "metrics.jsonl").read_text() == before

    @pytest.mark.slow
    def test_the_checkpoint_holds_the_posterior(self, small, straight):
        result = straight["otmdr-bnn"]
        compiled = programs.compile_programs(TINY, small)
        with checkpoint.Checkpoints(
            result.folder / "checkpoints", read_only=True
        ) as saved:
            template = compiled.init(jax.random.key(9))
            state, _ = saved.restore(template)
        assert isinstance(state.params, bnn.MeanField)
        assert_same_bits(state, result.state)

    @pytest.mark.slow
    def test_metrics_are_those_of_the_mean_probability(self, small, sgvb):
        result = sgvb
        chosen = of_method(TINY, "sgvb")
        compiled = programs.compile_programs(chosen, small)
        samples = np.asarray(
            compiled.predict(result.state, jnp.asarray(small.test.images)), np.float64
        )
        mean = np.exp(samples).mean(axis=0)
        assert_allclose(np.exp(result.log_probs), mean, rtol=1e-4, atol=1e-6)
        found = evaluation.evaluate(chosen, result.state, small, "test", compiled)
        want = metrics.evaluate(np.log(mean), small.test.labels)
        for name, value in want.items():
            assert_allclose(found.metrics[name], value, rtol=1e-4)
        entropy = -np.sum(samples * np.exp(samples), axis=-1)  # (S, N)
        assert_allclose(found.metrics["aleatoric"], entropy.mean(), rtol=1e-4)
        total = -np.sum(mean * np.log(mean), axis=-1).mean()
        assert_allclose(
            found.metrics["epistemic"], total - entropy.mean(), rtol=1e-2, atol=1e-5
        )

    @pytest.mark.slow
    def test_sharpness_is_that_of_the_mean(self, small, sgvb):
        result = sgvb
        compiled = programs.compile_programs(of_method(TINY, "sgvb"), small)
        found = sharpness.gap(TINY, result.state, small, compiled)
        model = models.create("one_layer", 10)
        images = data.normalise(jnp.asarray(small.train.images), small.mean, small.std)
        logits, _ = model.apply(
            bnn.mean(result.state.params), result.state.model_state, images, train=False
        )
        nll = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.asarray(small.train.labels)
        )
        assert_allclose(found["train_nll"], nll.mean(), rtol=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            dict(kl_schedule="blundell", prior="fitted", dtype="bfloat16"),
            dict(kl_schedule="warmup", kl_warmup_epochs=0.5, prior="mixture"),
            dict(dtype="float16", learning_rate=1e-3),
            dict(method="sgvb", estimator="local", noise_std=0.0),
            dict(method="sgvb", estimator="local", noise_std=0.0, dtype="float16",
                 learning_rate=1e-3),
            dict(method="sgvb", estimator="flipout", noise_std=0.0, dtype="bfloat16"),
            dict(posterior_init="released", posterior_norm="joint", merge="sum",
                 sigma_gradient="particle", weight_noise="each_step",
                 posterior_std=None),
            dict(microbatch_size=32, input="host", optimizer="adamw", decay_all=False),
        ],
        ids=lambda options: ",".join(options),
    )  # fmt: skip
    def test_options_reach_the_step(self, options, small, plain):
        chosen = ONE.replace(**options)
        result = training.train(chosen, small, show_progress=False)
        assert np.isfinite(result.metrics["nll"])
        kinds = {x.dtype for x in jax.tree.leaves(result.state.params)}
        assert kinds == {jnp.dtype(jnp.float32)}
        assert not np.array_equal(result.log_probs, plain.log_probs)

    @pytest.mark.parametrize(
        ("option", "value", "reaches"),
        [
            ("posterior_std", 0.3, dict(sigma=0.3)),
            ("posterior_init", "released", dict(init="released")),
            ("prior", "mixture", dict(prior=bnn.ScaleMixture())),
            ("prior", "fitted", dict(prior=bnn.FittedNormal())),
            ("prior_std", 0.3, dict(prior=bnn.Normal(0.3))),
            ("kl_weight", 0.3, dict(kl_weight=0.3)),
            ("num_samples", 7, dict(num_samples=7)),
            ("prediction", "mean", dict(mean_only=True)),
            ("estimator", "local", dict(estimator="local")),
            ("estimator", "flipout", dict(estimator="flipout")),
            ("posterior_norm", "joint", dict(norm="joint")),
            ("sigma_gradient", "particle", dict(sigma_gradient="particle")),
            ("weight_noise", "each_step", dict(weight_noise="each_step")),
            ("rho", (0.2, 0.3), dict(rho=(0.2, 0.3))),
            ("num_particles", 3, dict(num_particles=3)),
        ],
    )
    def test_each_option_reaches_the_gradient(self, option, value, reaches):
        def options_of(chosen):
            rate = optimizers.schedule(chosen, 10, 5)
            return chosen.method.options(methods.Run(chosen, 320, 5, 10, rate, None))

        method = "sgvb" if option == "estimator" else "otmdr-bnn"
        base = TrainConfig(model="one_layer", method=method)
        before = options_of(base)
        found = options_of(base.replace(**{option: value}))
        assert {x: found[x] for x in reaches} == reaches
        changed = {x for x in found if x not in before or found[x] != before[x]}
        assert changed == set(reaches)

    def test_weights_of_the_divergence_have_their_course(self):
        def weight_of(**options):
            chosen = TrainConfig(model="one_layer", method="sgvb", kl_weight=2.0,
                                 **options)  # fmt: skip
            rate = optimizers.schedule(chosen, 20, 5)
            run = methods.Run(chosen, 320, 5, 20, rate, None)
            return chosen.method.options(run)["kl_weight"]

        blundell = weight_of(kl_schedule="blundell")
        want = [2.0 * 5 * 2.0 ** (4 - i) / 31 for i in range(5)] * 2
        assert_allclose([blundell(t) for t in range(10)], want, rtol=1e-6)
        warmup = weight_of(kl_schedule="warmup", kl_warmup_epochs=2.0)
        assert_allclose(warmup(10), 2.0, rtol=1e-6)
        rising = [float(warmup(t)) for t in range(12)]
        assert_allclose(np.diff(rising[:11]), 0.2, rtol=1e-5)
        assert rising[11] == 2.0

    @pytest.mark.slow
    def test_members_have_a_posterior_each(self, small, tmp_path):
        chosen = TINY.replace(members="2", epochs=1)
        result = training.train(chosen, small, tmp_path / "run", show_progress=False)
        rows = result.metrics["members"]
        assert len(rows) == 2 and all(row["epistemic"] > 0 for row in rows)
        assert rows[0]["nll"] != rows[1]["nll"]
        with np.load(tmp_path / "run" / "predictions.npz") as saved:
            each = np.exp(saved["member_log_probs"])
        assert each.shape == (2, 100, 10)
        assert_allclose(np.exp(result.log_probs), each.mean(0), rtol=1e-3, atol=1e-5)
        key = jax.random.split(programs.run_keys(TINY.run.seed)[0], 2)[1]
        alone = chosen.replace(members=None)
        compiled = programs.compile_programs(alone, small)
        order = compiled.epoch_order(
            jax.random.fold_in(programs.run_keys(TINY.run.seed)[1], 0)
        )
        state = compiled.init(key)
        for i in range(5):
            state, _ = compiled.train_step(
                state, tuple(small.train), order, np.int32(i)
            )
        mine = jax.tree.map(lambda x: x[1], result.state.params)
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, state.params
        )

    @pytest.mark.slow
    def test_many_devices_are_one(self, small):
        mesh = "data=2,particle=2"
        chosen = TINY.replace(
            mesh=mesh, split="shared", epochs=1, num_particles=2,
            sync_batchnorm=True, prediction="mean", num_samples=30, log_every=1,
        )  # fmt: skip
        got = training.train(chosen, small, show_progress=False)
        one = chosen.replace(mesh="data=1", sync_batchnorm=False)
        want = training.train(one, small, show_progress=False)

        def losses(result):
            return [r["loss"] for r in result.history if r["split"] == "train"]

        assert_allclose(losses(got), losses(want), rtol=1e-3)
        assert_allclose(got.log_probs, want.log_probs, atol=5e-3)
        assert got.metrics["mesh"] == mesh


class TestWeightDecay:
    def test_it_acts_on_point_estimates_alone(self, key):
        params = {"kernel": jnp.ones((2, 2)), "norm": {"scale": jnp.ones(3)}}
        q = bnn.init(params, mask={"kernel": True, "norm": {"scale": False}})
        chosen = TINY.replace(
            optimizer="sgd", weight_decay=0.1, learning_rate=1.0, momentum=0.0,
            schedule="constant",
        )  # fmt: skip
        tx = optimizers.create(chosen, 10, 5)
        zeros = jax.tree.map(jnp.zeros_like, q)
        updates, _ = tx.update(zeros, tx.init(q), q, value=jnp.zeros(()))
        assert not np.any(updates.mean["kernel"])
        assert not np.any(updates.raw_scale["kernel"])
        assert_allclose(updates.point["norm"]["scale"], -0.1)
        assert not any(jax.tree.leaves(methods.decays(q, everything=False)))

    def test_a_run_of_another_method_keeps_its_optimizer_state(self):
        """A mask where there was none would make older checkpoints unreadable."""
        chosen = TrainConfig(method="sgd")
        got = optimizers.create(chosen, 10, 5).init({"w": jnp.ones(2)})
        want = optax.chain(
            optax.add_decayed_weights(5e-4),
            optax.sgd(optax.cosine_decay_schedule(0.1, 10), 0.9),
        ).init({"w": jnp.ones(2)})
        assert jax.tree.structure(got) == jax.tree.structure(want)


QUICK = [
    "--steps", "4", "--batch-size", "32", "--quiet", "--mesh", "data=1",
    "--optimizer", "adam", "--learning-rate", "0.01", "--num-samples", "4",
    "--model", "one_layer",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(small, one_layer, tmp_path_factory):  # not `few` for later tests
    """A run of each method from the command line, on digits."""
    root = tmp_path_factory.mktemp("bnn")
    few = small_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: few)
        for method in METHODS:
            output = str(root / method)
            cli.main(["train", "--method", method, *QUICK, "--output", output])
        yield root


class TestCommandLine:
    @pytest.mark.slow
    def test_evaluate(self, runs, capsys):
        before = (runs / "sgvb" / "result.json").read_bytes()
        cli.main(["evaluate", str(runs / "sgvb"), "--num-samples", "2"])
        out = capsys.readouterr().out
        assert "SGVB" in out and "Epistemic" in out
        assert (runs / "sgvb" / "signal_to_noise_2_samples.png").stat().st_size > 10_000
        path = runs / "sgvb" / "evaluation_2_samples.json"
        found = json.loads(path.read_text())
        assert len(found["posterior"]["snr_counts"]) == 60
        assert (found["prediction"], found["num_samples"]) == ("samples", 2)
        with pytest.raises(SystemExit):  # the run has a number of its own
            cli.main(["evaluate", str(runs / "sgvb"), "--prediction", "mean",
                      "--num-samples", "3"])  # fmt: skip
        assert "leave one of them out" in capsys.readouterr().err
        cli.main(["evaluate", str(runs / "sgvb"), "--prediction", "mean"])
        assert "mean" in capsys.readouterr().out
        path = runs / "sgvb" / "evaluation_mean.json"
        at_mean = json.loads(path.read_text())
        assert at_mean["nll"] != found["nll"] and "epistemic" not in at_mean
        assert (runs / "sgvb" / "result.json").read_bytes() == before

    @pytest.mark.slow
    def test_compare(self, runs, tmp_path):
        paths = [str(runs / method) for method in METHODS]
        cli.main(["compare", *paths, "--output", str(tmp_path / "report")])
        page = (tmp_path / "report" / "report.md").read_text()
        assert "SGVB" in page and "OT-MDR-BNN (K = 1)" in page
        assert "Epistemic" in page and "signal_to_noise.png" in page
        assert (tmp_path / "report" / "signal_to_noise.png").exists()

    @pytest.mark.slow
    def test_an_ensemble_of_finished_runs(self, runs, tmp_path, capsys):
        other = str(tmp_path / "other")
        cli.main(
            ["train", "--method", "sgvb", *QUICK, "--seed", "1", "--output", other]
        )
        both = str(tmp_path / "both")
        cli.main(["ensemble", str(runs / "sgvb"), other, "--output", both])
        result = json.loads((tmp_path / "both" / "result.json").read_text())
        assert len(result["members"]) == 2 and result["epistemic"] > 0


class TestPresets:
    @pytest.mark.parametrize("data_name", ["cifar10", "cifar100"])
    def test_they_are_appendix_b3(self, data_name):
        paper = config.preset(f"paper-bnn-{data_name}")
        released = config.preset(f"released-bnn-{data_name}")
        sgvb = config.preset(f"sgvb-{data_name}")
        for found in (paper, released, sgvb):
            assert found.data.name == data_name and found.model.name == "resnet_10"
            assert (found.optimizer.name, found.schedule.learning_rate) == (
                "adam",
                1e-3,
            )
            assert (found.schedule.name, found.run.epochs) == ("plateau", 100)
            assert found.optimizer.weight_decay == 0.0
            assert (
                found.method.prior_std,
                found.method.kl_weight,
                found.method.num_samples,
            ) == (
                0.1,
                5e-6,
                30,
            )
            building.check_models(found.replace(model="resnet_18"))
        assert paper.method.rho == released.method.rho == (0.005, 0.01)
        assert (paper.method.posterior_norm, paper.method.sigma_gradient) == (
            "per_leaf",
            "center",
        )
        assert (paper.method.weight_noise, paper.method.split, paper.method.merge) == (
            "once",
            "random",
            None,
        )
        assert (released.method.posterior_norm, released.method.sigma_gradient) == (
            "joint", "particle",
        )  # fmt: skip
        assert (released.method.weight_noise, released.method.split) == (
            "each_step",
            "ordered",
        )
        assert (released.model.activation, released.run.batch_size) == (
            "softplus",
            1024,
        )
        assert (
            released.method.posterior_init == "released"
            and released.method.noise_std == 0.01
        )
        two = config.preset(f"released-bnn-{data_name}", 2)
        assert two.method.split == "random" and two.method.sum_particles

    @pytest.mark.parametrize("name", bnn.PRESETS)
    def test_those_of_the_gradient_are_the_same(self, name):
        options = bnn.preset(name, 2)
        found = config.preset(f"{name}-bnn-cifar10", 2)
        options["posterior_norm"] = options.pop("norm")
        assert {k: found.flat()[k] for k in options} == options
        bnn.value_and_grad(lambda w, b: 0.0, num_data=9, **bnn.preset(name))

    def test_an_unknown_one(self):
        with pytest.raises(ValueError, match="'paper', 'released'"):
            bnn.preset("cifar10")

    @pytest.mark.slow
    def test_softplus_networks_differ_from_relu_ones(self, key):
        images = jax.random.normal(key, (2, 8, 8, 3))
        plain, soft = (
            models.create("resnet_10", 10, activation=name)
            for name in ("relu", "softplus")
        )
        params, state = plain.init(key, images)
        a, b = (m.apply(params, state, images, train=True)[0] for m in (plain, soft))
        assert np.all(np.isfinite(b)) and not np.allclose(a, b)
        with pytest.raises(ValueError, match="activation must be one of"):
            models.create("resnet_10", 10, activation="tanh")
        with pytest.raises(TypeError, match="no option 'activation'"):
            models.create("cnn_small", 10, activation="softplus")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="sgvb", rho=(0.1,)), "sgvb has no option rho"),
        (dict(method="otmdr-bnn", estimator="local"), "has no option estimator"),
        (dict(method="otmdr-bnn", norm="per_leaf"), "norm is posterior_norm"),
        (dict(method="otmdr-bnn", project=True), "give posterior_norm='global'"),
        (dict(method="otmdr", prior_std=0.2), "otmdr has no option prior_std"),
        (dict(method="sgd", num_samples=5), "sgd has no option num_samples"),
        (dict(method="sgvb", members="2", ensemble="joint"), "joint ensemble"),
        (dict(method="sgvb", prior="fitted", prior_std=0.2), "has none"),
        (dict(method="sgvb", prediction="mean", num_samples=9), "leave one of them"),
        (dict(method="sgvb", kl_schedule="warmup"), "needs kl_warmup_epochs"),
        (dict(method="sgvb", kl_warmup_epochs=1.0), "needs --kl-schedule"),
        (dict(method="sgvb", kl_schedule="warmup", kl_warmup_epochs=0.01), "0 steps"),
        (dict(method="sgvb", kl_schedule="warmup", kl_warmup_epochs=99.0), "than all"),
        (dict(method="otmdr-bnn", num_particles=2, split="shared"), "equal particles"),
        (dict(method="sgvb", mesh="particle=2"), "no particles to spread"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        training.train(TrainConfig(steps=1, **options), show_progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(posterior_std=0.0), "posterior_std must be positive"),
        (dict(prior_std=-1.0), "prior_std must be positive"),
        (dict(kl_weight=-1.0), "kl_weight must be at least 0"),
        (dict(num_samples=0), "num_samples must be at least 1"),
        (dict(prior="laplace"), "prior must be one of"),
        (dict(sigma_gradient="mu"), "sigma_gradient must be one of"),
    ],
)
def test_bad_numbers_and_words(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.slow
def test_devices_of_a_data_axis_hold_the_same_posterior(small):
    """After a run on four devices every device's copy has the same bits."""
    chosen = ONE.replace(mesh="data=4")
    state = training.train(chosen, small, show_progress=False).state
    for leaf in jax.tree.leaves(state.params):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 4
        assert all(np.array_equal(copy, copies[0]) for copy in copies)


def first_steps(small, **options):
    """The states before and after, and the numbers, of four steps."""
    chosen = TINY.replace(method="sgvb", noise_std=0.0, **options)
    compiled = programs.compile_programs(chosen, small)
    state_key, data_key = programs.run_keys(0)
    order = compiled.epoch_order(data_key)
    states, numbers = [compiled.init(state_key)], []
    for i in range(4):
        copy = jax.tree.map(jnp.copy, states[-1])  # a step takes its state
        state, found = compiled.train_step(copy, tuple(small.train), order, np.int32(i))
        states.append(state)
        numbers.append(found)
    return states, numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        (dict(), [0.3] * 4),
        (dict(kl_schedule="warmup", kl_warmup_epochs=0.4), [0.0, 0.15, 0.3, 0.3]),
        (dict(kl_schedule="blundell"), 0.3 * 5 * 32 / 31 / 2.0 ** np.arange(1, 5)),
    ],
    ids=["constant", "warmup", "blundell"],
)
def test_options_of_the_objective_are_those_of_the_configuration(
    small, schedule, weights
):
    """From the numbers of steps: loss - likelihood = weight KL / N, N = 320."""
    states, numbers = first_steps(
        small, kl_weight=0.3, prior_std=0.25, posterior_std=0.05, **schedule
    )
    assert_allclose(bnn.std(states[0].params)["conv1"]["kernel"], 0.05, rtol=1e-4)
    assert small.train.num_examples == 320
    for state, found, weight in zip(states, numbers, weights, strict=False):
        kl = 0.0
        for mean, std in zip(
            *map(jax.tree.leaves, (state.params.mean, bnn.std(state.params))),
            strict=True,
        ):
            m, s = np.float64(mean), np.float64(std)
            kl += np.sum(np.log(0.25 / s) + (s**2 + m**2) / (2 * 0.25**2) - 0.5)
        assert_allclose(found["kl"], kl, rtol=1e-4)
        beside = float(found["loss"] - found["likelihood_term"])
        assert_allclose(beside, weight * kl / 320, rtol=1e-3, atol=1e-4)


def test_the_presets_steps_are_those_of_a_summed_objective():
    """Adam's epsilon has a scale: beside gradients per example it is smaller."""
    found = config.preset("paper-bnn-cifar10")
    tx = optimizers.create(found, 100, 10)
    theirs = optax.adam(1e-3)
    grads = {"w": jnp.array([1e-3, 1e-9, -3e-12])}  # per example
    whole = jax.tree.map(lambda g: 50_000 * g, grads)
    ours, _ = tx.update(grads, tx.init(grads), grads, value=jnp.ones(()))
    want, _ = theirs.update(whole, theirs.init(whole))
    assert_allclose(ours["w"], want["w"], rtol=1e-4)


@pytest.mark.slow
def test_members_of_different_architectures_log_their_posteriors(small):
    chosen = ONE.replace(
        model="cnn_small", members="one_layer,cnn_small", method="sgvb", noise_std=0.0,
        steps=2, epochs=None,
    )  # fmt: skip
    result = training.train(chosen, small, show_progress=False)
    found = result.metrics["posterior"]
    assert {"0/conv1/kernel", "1/head/kernel"} <= set(found["sigma"])
    weights = sum(x.size for s in result.state for x in jax.tree.leaves(s.params.mean))
    assert sum(found["snr_counts"]) == weights


def test_members_that_diverged_do_not_count():
    def summary(value):
        layers = {"w": jnp.float32(value)}
        return bnn.Summary(layers, layers, jnp.full(60, int(value)))

    class Programs:
        posterior = staticmethod(lambda state: [summary(1), summary(5), summary(3)])

    found = evaluation.posterior_record(Programs, None, without=(1,))
    assert found["sigma"] == {"w": 2.0} and found["snr_counts"] == [4] * 60


@pytest.mark.slow
def test_uncertainty_of_an_ensemble_is_that_of_the_members_that_count(small):
    chosen = TINY.replace(members="2", method="sgvb", noise_std=0.0)
    compiled = programs.compile_programs(chosen, small)
    state = compiled.init(programs.run_keys(0)[0])
    samples = np.asarray(
        compiled.predict(state, jnp.asarray(small.test.images)), np.float64
    )  # (2 x 5, N, C)
    entropy = -np.sum(samples[:5] * np.exp(samples[:5]), axis=-1).mean()
    information = metrics.mutual_information(np.exp(samples[:5]))
    # A member that does not count has diverged, as a rule.
    lost = state._replace(
        params=jax.tree.map(lambda x: x.at[1].set(jnp.nan), state.params)
    )
    for one in (state, lost):
        found = evaluation.evaluate(chosen, one, small, "test", compiled, without=(1,))
        for values in (found.metrics, found.members[0]):
            assert_allclose(values["aleatoric"], entropy, rtol=1e-4)
            assert_allclose(values["epistemic"], information.mean(), atol=1e-6)
        found = prediction.predict(chosen, one, small.test, compiled, without=(1,))
        assert_allclose(found.mutual_information(), information, atol=1e-6)
    assert np.isnan(found.members[1]).all()


@pytest.mark.parametrize(
    "split, message",
    [
        ("val", "split must be one of .*; got 'val'"),
        ("validation", "no validation set"),
    ],
)
def test_a_split_that_is_not_there_is_refused(split, message, small):
    alone = dataclasses.replace(small, validation=None)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(TINY, None, alone, split, programs=object())
