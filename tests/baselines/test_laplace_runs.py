"""Runs with a Laplace approximation: fitted at the end, resumed, evaluated, refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from otmdr_jax import data, models
from otmdr_jax.baselines import curvature, laplace
from otmdr_jax.experiments import (
    cli,
    config,
    members,
    programs,
    report,
    restore,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import cost
from otmdr_jax.io import files
from tests.experiments.test_training import assert_same_bits
from tests.sets import small_digits

STRUCTURES = curvature.STRUCTURES
pytestmark = pytest.mark.usefixtures("one_layer")

TINY = TrainConfig(
    model="one_layer", mesh="data=1", method="laplace", epochs=3, batch_size=64,
    log_every=2, seed=3, num_samples=6, eval_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return small_digits(320)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """Uninterrupted runs: of each structure, and of the base alone."""
    folder = tmp_path_factory.mktemp("straight")
    found = {
        name: training.train(
            TINY.replace(laplace=name),
            small,
            folder / name,
            show_progress=False,
        )
        for name in STRUCTURES
    }
    base = TINY.replace(method="sgd", num_samples=30)
    found["sgd"] = training.train(base, small, folder / "sgd", show_progress=False)
    return found


class TestRuns:
    @pytest.mark.slow
    def test_training_is_the_bases_bit_for_bit(self, straight):
        base = straight["sgd"]
        for name in STRUCTURES:
            run = straight[name]
            assert_same_bits(run.state, base.state)
            assert run.state.method_state is None
            assert run.metrics["epistemic"] > 0
            assert run.metrics["prior_precision"] > 0
            assert run.metrics["sharpness"] == base.metrics["sharpness"]
            # Before the end it is the mode that predicts.
            early = [
                next(r for r in one.history if r["split"] == "test")
                for one in (run, base)
            ]
            assert early[0]["step"] == 10 and early[0]["nll"] == early[1]["nll"]
            assert "epistemic" not in early[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_neither_batches_nor_devices_matter(self, structure, straight, small):
        chosen = TINY.replace(laplace=structure)
        state = straight[structure].state
        found = {}
        for name, size, mesh in (("a", 512, None), ("b", 100, None), ("c", 64, 2)):
            own = chosen.replace(eval_batch_size=size)
            if mesh:
                mesh = programs.make_mesh(own.replace(mesh="data=2"))
            compiled = programs.compile_programs(own, small, mesh)
            found[name] = own.method.finalize(own, state, small, compiled).method_state
        for name in ("b", "c"):
            assert_allclose(
                found[name].prior_precision, found["a"].prior_precision, rtol=1e-3
            )
            assert_allclose(
                found[name].effective_parameters,
                found["a"].effective_parameters,
                rtol=1e-3,
            )
        for x, y in zip(*(jax.tree.leaves(found[n].std) for n in "ac"), strict=True):
            assert_allclose(x, y, rtol=1e-3)

    @pytest.mark.slow
    def test_some_examples_stand_for_all(self, straight, small):
        chosen = TINY.replace(
            laplace="diagonal", laplace_examples=100, prior_precision=2.0
        )
        compiled = programs.compile_programs(chosen, small)
        state = chosen.method.finalize(chosen, straight["sgd"].state, small, compiled)
        kept = state.method_state
        assert chosen.method.finalize(chosen, state, small, compiled) is state
        # The sum over those hundred, by hand, and scaled up.
        count = small.train.num_examples
        rows = np.sort(np.random.default_rng(chosen.run.seed).permutation(count)[:100])
        images = data.normalise(small.train.images[rows], small.mean, small.std)
        trained = straight["sgd"].state
        summed = curvature.of_batch(
            models.create("one_layer", 10),
            trained.params,
            trained.model_state,
            images,
            jnp.ones(100),
            "diagonal",
        )["diagonal"]
        for std, h in zip(*map(jax.tree.leaves, (kept.std, summed)), strict=True):
            assert_allclose(1 / std**2, 2.0 + h * count / 100, rtol=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize("structure", ["last-layer", "diagonal"])
    def test_members_have_their_own(self, structure, small):
        chosen = TINY.replace(members="2", laplace=structure, epochs=1)
        compiled = programs.compile_programs(chosen, small)
        state = compiled.init(jax.random.key(0))
        state = chosen.method.finalize(chosen, state, small, compiled)
        kept = [member.method_state for member in members.separate(state)]
        assert len(kept) == 2
        assert float(kept[0].prior_precision) != float(kept[1].prior_precision)
        rows = compiled.predict(state, jnp.asarray(small.test.images[:4]))
        assert rows.shape == (12, 4, 10)
        assert set(chosen.method.fitted(state)) == {
            "prior_precision",
            "effective_parameters",
        }

    @pytest.mark.slow
    def test_float16_has_a_finite_curvature(self, small):
        chosen = TINY.replace(dtype="float16", laplace="diagonal", steps=2)
        result = training.train(chosen, small, show_progress=False)
        assert np.isfinite(result.metrics["nll"]) and result.metrics["epistemic"] > 0

    def test_the_mean_is_the_mode(self, small):
        chosen = TINY.replace(prediction="mean", num_samples=30)
        compiled = programs.compile_programs(chosen, small)
        state = compiled.init(jax.random.key(0))
        assert compiled.finish is None
        assert chosen.method.finalize(chosen, state, small, compiled) is state
        assert compiled.predict(state, small.test.images[:4]).shape == (1, 4, 10)


def test_options():
    for options, message in (
        (dict(method="sgd", laplace="diagonal"), "sgd has no option laplace"),
        (dict(method="laplace", rho=(0.1,)), "laplace has no option rho"),
        (dict(method="laplace", members="2", ensemble="joint"), "joint ensemble"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)
    for options in (
        dict(prior_precision=0.0),
        dict(laplace_examples=0),
        dict(laplace="full"),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            TrainConfig(method="laplace", **options)
    sam = TrainConfig(method="laplace", base_method="sam", rho=(0.1,))
    assert sam.method.base.rho == (0.1,)
    assert cost.gradient_evaluations(sam) == 2.0
    assert report.label_of(sam.flat()) == "Laplace of SAM"
    mode = sam.replace(prediction="mean")
    assert mode.method.base == sam.method.base
    for own in (dict(laplace="diagonal"), dict(prior_precision=1.0)):
        with pytest.raises(ValueError, match="for which nothing is fitted"):
            mode.replace(**own)
    assert callable(laplace)


@pytest.mark.slow
def test_the_command_line_trains_and_gives_runs_a_posterior(
    few_digits, tmp_path, capsys
):
    common = ["--model", "one_layer", "--steps", "12", "--mesh", "data=1", "--quiet"]
    own, base = str(tmp_path / "laplace"), str(tmp_path / "sam")
    options = ["--base-method", "sam", "--num-samples", "4"]
    cli.main(["train", "--method", "laplace", "--output", own, *options, *common])
    cli.main(["train", "--method", "sam", "--output", base, *common])
    cli.main(["evaluate", own])
    result, found = (
        json.loads((tmp_path / "laplace" / name).read_text())
        for name in ("result.json", "evaluation.json")
    )
    for name in ("nll", "epistemic", "prior_precision"):
        assert_allclose(found[name], result[name], rtol=1e-4)
    assert (
        config.load(tmp_path / "laplace" / "config.json").method.laplace == "last-layer"
    )

    before = {p.name: p.read_bytes() for p in (tmp_path / "sam").glob("*.*")}
    cli.main(["evaluate", base, "--laplace", "last-layer", "--num-samples", "4"])
    out = capsys.readouterr().out
    assert "evaluation_laplace_last_layer.json" in out
    shown = " ".join(out.split())
    assert f"prior precision {result['prior_precision']:.3g}," in shown
    after = {p.name: p.read_bytes() for p in (tmp_path / "sam").glob("*.*")}
    new = {"evaluation_laplace_last_layer.json", "reliability_laplace_last_layer.png"}
    assert set(after) - set(before) == new
    assert all(after[name] == content for name, content in before.items())
    found = json.loads(after["evaluation_laplace_last_layer.json"])
    for name in ("nll", "accuracy", "epistemic", "prior_precision"):
        assert_allclose(found[name], result[name], rtol=1e-4)  # trained alike
    assert found["num_samples"] == 4 and found["settings"]["step"] == 12
    # A run that has one is given another, whole; without samples there is none.
    cli.main(["evaluate", own, "--laplace", "last-layer-kron"])
    path = tmp_path / "laplace" / "evaluation_laplace_last_layer_kron.json"
    kron = json.loads(path.read_text())
    assert kron["settings"]["prior_precision"] is None
    assert kron["prior_precision"] not in (3.0, result["prior_precision"])
    cli.main(["evaluate", own, "--prediction", "mean"])
    mode = json.loads((tmp_path / "laplace" / "evaluation_mean.json").read_text())
    assert mode["num_samples"] is None and "prior_precision" not in mode
    for options, message in (
        (["--laplace", "last-layer"], "--overwrite"),  # of 30 samples
        (["--laplace", "diagonal", "--prediction", "mean"], "leave one of them out"),
        (["--laplace-examples", "9"], "are options of --laplace"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", base, *options])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="one trained weight vector"):
        files.write_json(
            tmp_path / "sam" / "config.json",
            {"method": "swa"},
        )
        restore.with_laplace(tmp_path / "sam", "diagonal")
