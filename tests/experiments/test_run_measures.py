"""Calibration and sharpness of a run, against the parts they are made of."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest

from otmdr_jax import landscape, metrics, models
from otmdr_jax.experiments import cli, programs, restore, run_folder, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import calibrate, evaluation, sharpness
from otmdr_jax.io import files
from otmdr_jax.metrics import calibration

pytestmark = pytest.mark.usefixtures("one_layer")

TINY = TrainConfig(
    model="one_layer", method="sgd", epochs=4, eval_every=4, batch_size=64,
    validation=0.2, mesh="data=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(one_layer, tmp_path_factory):
    """A run on the digits with a validation set."""
    folder = tmp_path_factory.mktemp("measures") / "run"
    training.train(TINY, output=folder, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def opened(run):
    return restore.open_run(run)


class TestOpening:
    @pytest.mark.slow
    def test_a_run_is_what_was_trained(self, run, opened):
        assert opened.config == TINY and opened.diverged == ()
        found = np.load(run / "predictions.npz")
        images = opened.dataset.test.images
        (log_probs,) = opened.programs.predict(opened.state, images)
        np.testing.assert_allclose(log_probs, found["log_probs"], atol=1e-5)

    def test_words_for_checkpoints(self, run):
        best = restore.open_run(run, "best").meta["best"]["step"]
        assert int(restore.open_run(run, str(best)).state.step) == best
        with pytest.raises(ValueError, match="latest, best or a step, got 'first'"):
            restore.open_run(run, "first")

    def test_what_is_not_there(self, run, tmp_path):
        with pytest.raises(FileNotFoundError, match="no run folder"):
            restore.open_run(tmp_path)
        with pytest.raises(FileNotFoundError, match="99999"):
            restore.open_run(run, "99999")
        with pytest.raises(ValueError, match="trained without a validation set"):
            restore.open_run(run, split="validation", validation=0.0)
        with pytest.raises(ValueError, match="was trained on"):
            restore.open_run(run, label_noise=0.5)


class TestCalibrate:
    def test_on_folds_it_is_cross_calibration(self, run):
        record = calibrate.calibrate(run, ["temperature"], num_repeats=2, seed=3)
        arrays = np.load(run / "predictions.npz")
        log_probs, labels = arrays["log_probs"].astype(np.float64), arrays["labels"]
        # By hand: halves of the seed's permutations, SciPy for the temperature.
        from scipy import optimize, special

        rng, raw, after, temperatures = np.random.default_rng(3), [], [], []
        for _ in range(2):
            halves = np.array_split(rng.permutation(len(labels)), 2)
            for held_out, rest in (halves, halves[::-1]):

                def nll(log_t, rows):
                    scaled = special.log_softmax(log_probs[rows] / np.exp(log_t), 1)
                    return -scaled[np.arange(len(rows)), labels[rows]].mean()

                best = optimize.minimize_scalar(lambda x, r=rest: nll(x, r)).x
                temperatures.append(np.exp(best))
                raw.append(nll(0.0, held_out))
                after.append(nll(best, held_out))
        (found,) = record["methods"]
        assert found["temperature"] == pytest.approx(np.mean(temperatures), rel=1e-4)
        assert found["metrics"]["nll"]["raw"] == pytest.approx(np.mean(raw), rel=1e-6)
        got = found["metrics"]["nll"]["calibrated"]
        assert got == pytest.approx(np.mean(after), rel=1e-6)
        assert "2 folds x 2 of 360 test examples" in record["how"]

    @pytest.mark.slow
    def test_with_the_validation_set(self, run, opened):
        record = calibrate.calibrate(run, fit="validation", show_progress=False)
        valid = opened.dataset.validation
        (log_probs,) = opened.programs.predict(opened.state, valid.images)
        temperature = calibration.fit_temperature(log_probs, valid.labels)
        found = {method["name"]: method for method in record["methods"]}
        assert list(found) == ["temperature", "vector", "matrix", "isotonic"]
        assert found["temperature"]["temperature"] == pytest.approx(temperature, 1e-4)
        # Raw values are the run's own, of the whole test set.
        result = json.loads((run / "result.json").read_text())
        for name in ("accuracy", "nll", "ece"):
            pair = found["temperature"]["metrics"][name]
            assert pair["raw"] == pytest.approx(result[name], abs=1e-6)
        arrays = np.load(run / "predictions.npz")
        scaled = calibration.log_softmax(arrays["log_probs"] / temperature)
        want = metrics.ece(np.exp(scaled), arrays["labels"])
        got = found["temperature"]["metrics"]["ece"]["calibrated"]
        assert got == pytest.approx(want, abs=1e-5)

    def test_conformal_sets_cover_what_was_asked(self, run):
        record = calibrate.calibrate(run, ["temperature"], alpha=0.2)
        for one in record["conformal"]:
            # Three standard errors of 360 examples; the halves share them.
            assert abs(one["coverage"] - 0.8) < 3 * np.sqrt(0.16 / 360), one
            assert 0 < one["size"] < 10

    def test_conformal_sets_are_of_the_other_half(self, run):
        record = calibrate.calibrate(run, ["temperature"], num_repeats=1, seed=4)
        arrays = np.load(run / "predictions.npz")
        probs, labels = np.exp(arrays["log_probs"].astype(float)), arrays["labels"]
        one, two = np.array_split(np.random.default_rng(4).permutation(360), 2)
        covered, sizes = [], []
        for fitted, measured in ((one, two), (two, one)):
            scores = np.sort(1 - probs[fitted, labels[fitted]])
            sets = 1 - probs[measured] <= scores[int(np.ceil(181 * 0.9)) - 1] + 1e-9
            covered.append(sets[np.arange(180), labels[measured]].mean())
            sizes.append(sets.sum(axis=1).mean())
        lac = record["conformal"][0]
        assert lac["score"] == "lac"
        assert lac["coverage"] == pytest.approx(np.mean(covered), abs=1e-9)
        assert lac["size"] == pytest.approx(np.mean(sizes), abs=1e-9)

    def test_a_fit_that_fails_is_named(self, run, monkeypatch):
        def fails(logits, labels):
            raise ValueError("it cannot be")

        monkeypatch.setitem(calibration.METHODS, "vector", fails)
        for fit in ("folds", "validation"):
            record = calibrate.calibrate(run, ["vector"], fit=fit, show_progress=False)
            assert record["methods"] == [{"name": "vector", "why": "it cannot be"}]

    @pytest.mark.parametrize("fit", ["folds", "validation"])
    def test_no_row_is_worse_than_raw_without_a_word(self, run, fit, monkeypatch):
        def too_sure(logits, labels):
            warnings.warn("it has no optimum.", stacklevel=2)
            return calibration.Scaling(np.asarray(50.0), np.zeros(()))

        monkeypatch.setitem(calibration.METHODS, "vector", too_sure)
        record = calibrate.calibrate(
            run, ["temperature", "vector"], fit=fit, show_progress=False
        )
        temperature, vector = record["methods"]
        assert "note" not in temperature
        nll = vector["metrics"]["nll"]
        assert nll["calibrated"] > 2 * nll["raw"]
        for part in (
            "vector: it has no optimum. ",
            f"rises from {nll['raw']:.4g} to {nll['calibrated']:.4g}",
            "more than 180 examples" if fit == "folds" else "examples",
        ):
            assert part in vector["note"]

    @pytest.mark.parametrize("scale", [9.0, -9.0])
    def test_no_temperature_is_kept_where_none_is_best(
        self, run, tmp_path, scale, capsys
    ):
        # All predictions right, or all wrong: the NLL falls to the end of the range.
        shutil.copytree(run, tmp_path / "run")
        with np.load(run / "predictions.npz") as arrays:
            kept = dict(arrays)
        hot = scale * np.eye(10)[kept["labels"]]
        kept["log_probs"] = calibration.log_softmax(hot).astype(np.float32)
        np.savez(tmp_path / "run" / "predictions.npz", **kept)
        command = ["calibrate", str(tmp_path / "run"), "--methods", "temperature"]
        cli.main([*command, "--overwrite"])
        assert "predicted without a temperature" in capsys.readouterr().out
        record = files.read_json(tmp_path / "run" / "calibration.json")
        assert record["temperature"] is None
        assert "end of the range" in record["methods"][0]["note"]
        opened = restore.open_run(tmp_path / "run")
        assert opened.temperature is None

    def test_bad_input_is_refused(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("ran"))
        for options, message in (
            ({"methods": ["platt"]}, "some of temperature, vector.*got platt"),
            ({"methods": []}, "at least one method"),
            ({"fit": "test"}, "'folds' or 'validation', got 'test'"),
            ({"alpha": 1.5}, "alpha must lie in"),
            ({"alpha": 0.0, "fit": "validation"}, "alpha must lie in"),
            ({"num_repeats": 0}, "num_repeats must be at least 1, got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                calibrate.calibrate(run, **options)
        with pytest.raises(FileNotFoundError, match="no run folder"):
            calibrate.calibrate(tmp_path)
        (tmp_path / "config.json").write_text((run / "config.json").read_text())
        with pytest.raises(FileNotFoundError, match="otmdr evaluate"):
            calibrate.calibrate(tmp_path)
        nothing = np.full((4, 10), np.nan)
        run_folder.write_result(tmp_path, {}, nothing, np.zeros(4))
        with pytest.raises(ValueError, match="it diverged"):
            calibrate.calibrate(tmp_path)


class TestSharpness:
    def of(self, opened, **options):
        return sharpness.measure(
            opened.config, opened.state, opened.dataset, opened.programs,
            num_examples=200, num_probes=3, **options,
        )  # fmt: skip

    @pytest.mark.slow
    def test_measures_are_those_of_landscape(self, opened):
        record = self.of(opened, num_eigenvalues=2, seed=5)
        found = {row["name"]: row for row in record["measures"]}
        train, model = opened.dataset.train, models.create("one_layer", 10)
        rows = np.linspace(0, train.num_examples - 1, 200).astype(int)
        state, mean, std = opened.state, opened.dataset.mean, opened.dataset.std

        def loss_sum(params, batch):  # written again, in one batch
            images, labels = batch
            images = (images / 255.0 - np.float32(mean[0])) / np.float32(std[0])
            logits, _ = model.apply(params, state.model_state, images, train=False)
            log_probs = jax.nn.log_softmax(logits)
            return -log_probs[np.arange(len(labels)), labels].sum(), len(labels)

        batches = [(train.images[rows].astype(np.float32), train.labels[rows])]
        solution = (loss_sum, state.params, batches)
        key = jax.random.fold_in(jax.random.key(5), 0)
        gap = landscape.sam_gap(*solution)
        values = landscape.hessian_eigenvalues(*solution, 2).values
        average = landscape.average_sharpness(
            *solution, 0.01, key=key, num_directions=3
        )
        trace = landscape.hessian_trace(*solution, key=key, num_probes=3)
        want = {
            "train_nll": gap.loss,
            "sam_gap": gap.gap,
            "adaptive_sam_gap": landscape.sam_gap(*solution, 0.5, adaptive=True).gap,
            "worst_in_ball": landscape.worst_in_ball(*solution).gap,
            "adaptive_worst_in_ball": landscape.worst_in_ball(
                *solution, 0.5, adaptive=True
            ).gap,
            "average": average.gap,
            "adaptive_average": landscape.average_sharpness(
                *solution, 0.1, key=key, num_directions=3, adaptive=True
            ).gap,
            "hessian_eigenvalue_1": values[0],
            "hessian_eigenvalue_2": values[1],
            "hessian_trace": trace.value,
        }
        assert list(found) == list(want)
        for name, value in want.items():
            assert found[name]["value"] == pytest.approx(value, rel=2e-2), name
        error = found["hessian_trace"]["standard_error"]
        assert error == pytest.approx(trace.standard_error, rel=2e-2)
        assert found["sam_gap"]["standard_error"] is None
        assert record["num_examples"] == 200 and record["seed"] == 5

    @pytest.mark.slow
    def test_of_members_it_is_the_mean_of_those_that_count(self, opened, monkeypatch):
        config = TrainConfig(method="sgd", members="3", mesh="data=1", validation=0.2)
        compiled = programs.compile_programs(config, opened.dataset)
        state = compiled.init(jax.random.key(0))
        # Three measures are enough here, the Hessian's trace among them.
        every = sharpness._measures
        monkeypatch.setattr(
            sharpness, "_measures", lambda *args: [every(*args)[i] for i in (0, 4, 7)]
        )

        def measure(state, without):
            return sharpness.measure(
                config, state, opened.dataset, compiled,
                without=without, num_examples=50, num_probes=2,
            )  # fmt: skip

        params = jax.tree.map(lambda x: x.at[1].set(np.nan), state.params)
        record = measure(state._replace(params=params), (1,))
        for row in record["measures"]:
            first, gone, last = row["values"]
            assert row["value"] == np.mean([first, last]) and first != last
            assert gone is None
        # Members' directions are their own: equal members differ in what is drawn.
        twins = jax.tree.map(lambda x: x.at[2].set(x[0]), state)
        loss, _, average, trace = measure(twins, (1,))["measures"]
        assert loss["values"][0] == loss["values"][2]
        assert average["values"][0] != average["values"][2]
        assert trace["values"][0] != trace["values"][2]
        # What cannot be measured says why, and the rest is there.
        for row in measure(state._replace(params=params), ())["measures"]:
            assert row["value"] is None and "finite" in row["why"]
            assert row["values"][0] is not None and row["values"][1] is None
        quick = sharpness.gap(config, state, opened.dataset, compiled, without=(1,))
        assert quick["sharpness"] == np.mean(
            [quick["member_sharpness"][i] for i in (0, 2)]
        )
        error = record["measures"][-1]["standard_error"]
        assert error is not None and error > 0

    def test_bad_numbers_are_refused(self, opened):
        for options in ({"num_eigenvalues": 0}, {"seed": 0, "num_probes": 1}):
            with pytest.raises(ValueError, match="must be at least 1, num_probes 2"):
                sharpness.measure(
                    opened.config, opened.state, opened.dataset, opened.programs,
                    **options,
                )  # fmt: skip


@pytest.mark.slow
def test_the_commands_write_and_the_report_shows(run, capsys, tmp_path):
    cli.main(["calibrate", str(run), "--methods", "temperature", "--num-repeats", "1"])
    out = capsys.readouterr().out
    assert "temperature" in out and "LAC" in out and "Temperature" in out
    cli.main(["sharpness", str(run), "--num-examples", "100", "--num-probes", "2"])
    assert "Trace of the Hessian" in capsys.readouterr().out
    cli.main(["report", str(run), "--output", str(tmp_path / "page")])
    assert f"Report: {tmp_path / 'page' / 'report.html'}" in capsys.readouterr().out
    text = (tmp_path / "page" / "report.html").read_text()
    for kind in ("sharpness", "calibration"):
        assert (run / f"{kind}.json").exists()
        assert f"<code>otmdr {kind.replace('ion', 'e')} RUN" not in text
    assert "<code>otmdr shift RUN" in text
    # What is no report is left alone, before any work.
    with pytest.raises(SystemExit):
        cli.main(["report", str(run), "--output", str(run)])
    assert "holds no report" in capsys.readouterr().err
    assert not (run / "report.md").exists()


@pytest.mark.slow
def test_records_of_other_settings_are_not_replaced(run, capsys, monkeypatch):
    few = ["--num-examples", "50", "--num-probes", "2"]
    for command, name, options, others, differs in (
        ("calibrate", "calibration", ["--methods", "temperature"], ["--alpha", "0.2"],
         "alpha: 0.1, now 0.2"),
        ("sharpness", "sharpness", few, ["--num-probes", "3"],
         "num_examples: 50, now 1150"),
    ):  # fmt: skip
        path = run / f"{name}.json"
        cli.main([command, str(run), *options, "--overwrite"])
        cli.main([command, str(run), *options])  # the same: replaced freely
        before = path.read_bytes()
        settings = json.loads(before)["settings"]
        assert settings["step"] == run_folder.read_result(run)["steps"] > 0
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for module, function in (
                (calibrate, "calibrate"),
                (sharpness, "measure"),
            ):
                patch.setattr(module, function, lambda *_, **__: pytest.fail("ran"))
            with pytest.raises(SystemExit):
                cli.main([command, str(run), *others])
        assert path.read_bytes() == before
        text = capsys.readouterr().err
        assert differs in text and "Replace it with --overwrite" in text
        cli.main([command, str(run), *options, *others, "--overwrite"])
        assert json.loads(path.read_bytes())["settings"] != settings
