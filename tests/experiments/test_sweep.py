"""Sweeps: what a file means, what is run, and what rows and tables say."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from scipy import stats

from otmdr_jax import data
from otmdr_jax.experiments import cli, sweep, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import cost
from otmdr_jax.experiments.methods import METHODS
from otmdr_jax.experiments.report import cost as tables

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
FILE = """
seeds = [0, 3]
[options]
steps = 4
eval_every = 9
batch_size = 64
mesh = "data=1"
[methods."SGD"]
method = "sgd"
[methods."SAM"]
method = "sam"
rho = [[0.05], [0.1]]
"""

TUNING = "[tuning]\nmetric = 'nll'\nseeds = [10]\n"


def write(folder, text=FILE):
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


class TestPlan:
    def test_is_methods_by_settings_by_seeds(self, tmp_path):
        plan = sweep.plan(write(tmp_path), tmp_path / "out")
        assert [(x.label, x.config.run.seed) for x in plan.runs] == [
            ("SGD", 0), ("SGD", 3), ("SAM, rho = 0.05", 0), ("SAM, rho = 0.05", 3),
            ("SAM, rho = 0.1", 0), ("SAM, rho = 0.1", 3),
        ]  # fmt: skip
        last = plan.runs[-1]
        assert last.config == TrainConfig(
            method="sam", rho=(0.1,), steps=4, eval_every=9, batch_size=64, seed=3,
            mesh="data=1",
        )  # fmt: skip
        assert last.folder == tmp_path / "out" / "SAM-rho=0.1" / "seed3"
        assert plan.unequal == []

    def test_crosses_settings_and_says_what_is_not_equal(self, tmp_path):
        text = FILE + "learning_rate = [0.1, 1]\nepochs = 3\n"
        plan = sweep.plan(write(tmp_path, text), tmp_path)
        labels = list(dict.fromkeys(x.label for x in plan.runs))
        assert labels[1:] == [
            f"SAM, rho = {rho}, learning_rate = {rate}"
            for rho in (0.05, 0.1)
            for rate in (0.1, 1)
        ]
        # Epochs and rates are no part of what makes a method.
        assert sorted(plan.unequal) == ["epochs", "learning_rate"]

    def test_one_radius_for_each_step_is_one_setting(self, tmp_path):
        text = (
            '[methods.a]\nmethod = "otmdr"\nrho = [0.05, 0.1]\nnum_particles = [1, 2]'
        )
        plan = sweep.plan(write(tmp_path, text), tmp_path)
        assert [x.config.method.rho for x in plan.runs] == [(0.05, 0.1)] * 2
        assert [x.config.method.num_particles for x in plan.runs] == [1, 2]
        assert [x.config.run.seed for x in plan.runs] == [0, 0]

    def test_the_example_is_of_every_method(self, tmp_path):
        plan = sweep.plan(EXAMPLES / "sweep_digits.toml", tmp_path)
        # The dual form has an example of its own, its posterior has none.
        own = {one.config.method.name for one in plan.runs}
        assert own | {"otmdr-dual", "otmdr-dual-bnn"} == set(METHODS)
        dual = sweep.plan(EXAMPLES / "sweep_dual.toml", tmp_path)
        assert "otmdr-dual" in {one.config.method.name for one in dual.runs}
        assert len({one.label for one in plan.runs}) * 5 == len(plan.runs)
        assert plan.unequal == ["optimizer", "weight_decay", "learning_rate"]

    def test_the_example_on_cifar10_climbs_as_far_with_sam(self, tmp_path):
        plan = sweep.plan(EXAMPLES / "sweep_cifar10.toml", tmp_path)
        of = {}
        for one in plan.runs:
            if one.config.method.name in ("otmdr", "sam"):
                of.setdefault(one.config.method.name, set()).add(one.config.method.rho)
        assert of["otmdr"] == {(0.05, 0.1)}
        assert np.allclose(sorted(of["sam"]), [[0.05], [0.1], [0.05 + 0.1]])
        assert plan.unequal == ["weight_decay", "learning_rate"]
        # The small one has the same methods, but for second particles.
        small = sweep.plan(EXAMPLES / "sweep_cifar10_small.toml", tmp_path)
        shared = dict(model="resnet_18", dtype="bfloat16", epochs=200, eval_every=10)
        assert [
            one.config
            for one in plan.runs
            if one.config.method.gradient.num_particles == 1
        ] == [one.config.replace(**shared) for one in small.runs]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seeds = [", "is no TOML file"),
            ("seed = [1]", "may hold seeds, options, methods and tuning; got seed"),
            ("seeds = [1]", "must name methods"),
            ('seeds = 3\n[methods.a]\nmethod = "sgd"', "must be distinct integers"),
            (
                '[methods.a]\nmethod = "bsam"\nbatch_size = 100\nmesh = "data=1"',
                "sub-batches",
            ),
            (
                'seeds = [1, 1]\n[methods.a]\nmethod = "sgd"',
                "must be distinct integers",
            ),
            (
                'seeds = [true]\n[methods.a]\nmethod = "sgd"',
                "must be distinct integers",
            ),
            ("[methods]\na = 3", "are tables"),
            ('[methods.a]\nmethod = "sgd"\nrate = 3', "a: unknown options rate"),
            ('[methods.a]\nmethod = "sgb"', "a: method must be one of"),
            ('[methods.a]\nmethod = "sgd"\nrho = [1.0]', "sgd has no option rho"),
            ('[methods.a]\nmethod = "sgd"\nmodel = "vgg"', "vgg"),
            (
                '[options]\nmethod = "sgd"\n[methods."a b"]\n[methods."a-b"]',
                "two runs would lie in",
            ),
            (
                '[options]\nmethod = "sgd"\n[methods.a]\n[methods.A]',
                "two runs would lie in",
            ),
            (
                '[options]\nmethod = "sgd"\n[methods.Report]',
                "cannot be called 'Report'",
            ),
            ("[methods.sam]", 'sam: say method = "sam", or another'),
            ('[methods.a]\nmethod = "sgd"\nepochs = []', "epochs is a list without"),
            ('[methods.a]\nmethod = "sgd"\nseed = 3', r"seeds = \[3\] names"),
            ('[methods.a]\nmethod = "sgd"\nepoch = 3', "did you mean epochs"),
            (f"{TUNING}[methods.a]\nmethod = 'sgd'", "tuning has nothing to choose"),
            (
                f"seeds = [0, 10]\n{TUNING}[methods.a]\nmethod = 'sgd'\n"
                "learning_rate = [0.1, 0.2]",
                "must be others than those of the comparison; got 10 twice",
            ),
            (
                TUNING.replace("'nll'", "['nll']") + "[methods.a]\nmethod = 'sgd'",
                r"metric of tuning must be of .*; got \['nll'\]",
            ),
            (
                TUNING.replace("nll", "loss") + "[methods.a]\nmethod = 'sgd'",
                "metric of tuning must be of nll, accuracy, brier, ece; got 'loss'",
            ),
            (
                TUNING.replace("[10]", "[1, 1]") + "[methods.a]\nmethod = 'sgd'",
                "seeds of tuning must be distinct",
            ),
            (
                "[tuning]\nmetric = 'nll'\n[methods.a]\nmethod = 'sgd'",
                "must have metric, .* and seeds",
            ),
            ("tuning = 3\n[methods.a]\nmethod = 'sgd'", "must have metric"),
        ],
    )
    def test_what_cannot_be_is_refused(self, text, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            sweep.plan(write(tmp_path, text), tmp_path)


TUNED = (
    FILE.replace("[options]", "[tuning]\nmetric = 'nll'\nseeds = [7, 9]\n[options]")
    .replace("eval_every", "validation = 0.2\neval_every")
    .replace("[[0.05], [0.1]]", "[[0.05], [0.1], [0.2]]")
)


def tried(label, values, name="validation_nll"):
    return [{"label": label, "status": "finished", name: value} for value in values]


class TestTuning:
    def test_it_tries_each_setting_where_there_are_several(self, tmp_path):
        plan = sweep.plan(write(tmp_path, TUNED), tmp_path / "out")
        assert plan.tuning.metric == "nll"
        assert [(x.label, x.config.run.seed) for x in plan.tuning.runs] == [
            (f"SAM, rho = {rho}", seed) for rho in (0.05, 0.1, 0.2) for seed in (7, 9)
        ]
        assert len(plan.runs) == 4 * 2
        assert plan.tuning.runs[1].folder == tmp_path / "out/SAM-rho=0.05/seed9"
        assert [(x.method, x.label, x.ends) for x in plan.settings] == [
            ("SGD", "SGD", ()),
            ("SAM", "SAM, rho = 0.05", ("rho",)),
            ("SAM", "SAM, rho = 0.1", ()),
            ("SAM", "SAM, rho = 0.2", ("rho",)),
        ]
        # Of two values both would be ends.
        two = TUNED.replace(", [0.2]]", "]")
        plan = sweep.plan(write(tmp_path, two), tmp_path / "out")
        assert [x.ends for x in plan.settings] == [()] * 3
        without = sweep.plan(write(tmp_path), tmp_path / "out")
        assert without.tuning is None and len(without.settings) == 3

    @pytest.mark.parametrize(
        ("metric", "best"), [("nll", "SAM, rho = 0.1"), ("accuracy", "SAM, rho = 0.2")]
    )
    def test_the_best_mean_is_chosen(self, metric, best, tmp_path):
        text = TUNED.replace("'nll'", f"'{metric}'")
        plan = sweep.plan(write(tmp_path, text), tmp_path)
        name = f"validation_{metric}"
        rows = [
            *tried("SAM, rho = 0.05", [0.1, 0.9], name),
            *tried("SAM, rho = 0.1", [0.3, 0.4], name),
            *tried("SAM, rho = 0.2", [0.8, 0.6], name),
        ]
        found = sweep.scores(plan, rows)
        assert found == pytest.approx(
            {"SAM, rho = 0.05": 0.5, "SAM, rho = 0.1": 0.35, "SAM, rho = 0.2": 0.7}
        )
        assert [one.label for one in sweep.chosen(plan, found)] == ["SGD", best]

    def test_a_setting_that_diverged_is_not_chosen(self, tmp_path):
        plan = sweep.plan(write(tmp_path, TUNED), tmp_path)
        lost = {"label": "SAM, rho = 0.05", "status": "diverged"}
        rows = [
            *tried("SAM, rho = 0.05", [0.1]),
            lost,
            *tried("SAM, rho = 0.1", [0.4, 0.3]),
            *tried("SAM, rho = 0.2", [0.2, 0.6]),
        ]
        found = sweep.scores(plan, rows)
        assert sweep.chosen(plan, found)[1].label == "SAM, rho = 0.1"
        every = dict.fromkeys(found, float("nan"))
        with pytest.raises(ValueError, match="every setting of SAM has a run that div"):
            sweep.chosen(plan, every)

    def test_a_validation_set_is_needed_before_anything_is_trained(
        self, tmp_path, monkeypatch, capsys
    ):
        text = TUNED.replace("validation = 0.2\n", "")
        plan = sweep.plan(write(tmp_path, text), tmp_path)
        monkeypatch.setattr(training, "train", None)
        with pytest.raises(ValueError, match="tuning needs a validation set"):
            sweep.tune(plan, tmp_path / "tuning.json")
        assert not (tmp_path / "tuning.json").exists()
        output = ["--output", str(tmp_path / "out")]
        for words in ([], ["--dry-run"]):
            with pytest.raises(SystemExit):
                cli.main(["sweep", str(tmp_path / "sweep.toml"), *output, *words])
            assert "tuning needs a validation set" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            cli.main(["sweep", str(tmp_path / "nope.toml"), *output])
        assert "nope.toml is not there: it describes a" in capsys.readouterr().err
        without = sweep.plan(write(tmp_path), tmp_path)
        for function in (sweep.scores, sweep.chosen, sweep.tune):
            with pytest.raises(ValueError, match=r"no table \[tuning\]"):
                function(without, {})

    def test_data_may_bring_a_validation_set(self, tmp_path, monkeypatch):
        text = TUNED.replace("validation = 0.2\n", "")
        plan = sweep.plan(write(tmp_path, text), tmp_path)
        monkeypatch.setattr(sweep.tuning, "_has_validation", lambda config: True)
        rows = [
            *tried("SAM, rho = 0.05", [0.5]),
            *tried("SAM, rho = 0.1", [0.4]),
            *tried("SAM, rho = 0.2", [0.6]),
        ]
        monkeypatch.setattr(sweep.running, "run", lambda *args, **kwargs: rows)
        tuned = sweep.tune(plan, tmp_path / "tuning.json")
        assert [one.label for one in tuned.chosen] == ["SGD", "SAM, rho = 0.1"]
        assert {one.label for one in tuned.runs} == {"SGD", "SAM, rho = 0.1"}

    @pytest.mark.slow
    def test_the_command_tunes_and_compares_the_chosen(self, tmp_path, capsys):
        file = write(tmp_path, TUNED)
        output = tmp_path / "out"
        args = ["sweep", str(file), "--output", str(output)]
        cli.main([*args, "--dry-run"])
        out = capsys.readouterr().out
        assert "out: tuning" in out and "each method's best setting" in out
        cli.main([*args, "--baseline", "sam", "--quiet"])
        out = capsys.readouterr().out
        # By the runs' own records, read by hand.
        found = {}
        for rho in (0.05, 0.1, 0.2):
            values = []
            for seed in (7, 9):
                folder = output / f"SAM-rho={rho}" / f"seed{seed}"
                lines = (folder / "metrics.jsonl").read_text().splitlines()
                events = [json.loads(line) for line in lines]
                values += [x["nll"] for x in events if x["split"] == "validation"][-1:]
            assert len(values) == 2
            found[rho] = np.mean(values)
        best = min(found, key=found.get)
        trained = {path.parent.name for path in output.glob("SAM*/seed0")}
        assert trained == {f"SAM-rho={best}"}
        rows = json.loads((output / "sweep.json").read_text())["rows"]
        assert [(row["label"], row["seed"]) for row in rows] == [
            (label, seed) for label in ("SGD", f"SAM, rho = {best}") for seed in (0, 3)
        ]
        last = rows[-1]
        folder = output / f"SAM-rho={best}" / "seed3"
        result = json.loads((folder / "result.json").read_text())
        assert last["accuracy"] == result["accuracy"] and "validation_nll" in last
        assert f"Paired with SAM, rho = {best}" in out
        assert ("at the end of its values" in out) == (best != 0.1)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rows": [{"a": 1}]}'])
def test_rows_that_are_none_are_named(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match="sweep.json"):
        sweep.read_rows(tmp_path / "sweep.json")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "sweep.toml").write_bytes("seeds = [0]".encode("utf-16"))
    with pytest.raises(ValueError, match="sweep.toml is no TOML file"):
        sweep.plan(tmp_path / "sweep.toml", tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A sweep of six short runs, and the session's output."""
    root = tmp_path_factory.mktemp("sweep")
    plan = sweep.plan(write(root), root / "out")
    rows = sweep.run(plan.runs, root / "out" / "sweep.json", show_progress=False)
    return root, plan, rows


class TestRun:
    @pytest.mark.slow
    def test_rows_hold_results_and_cost(self, done):
        root, plan, rows = done
        stored = json.loads((root / "out" / "sweep.json").read_text())["rows"]
        assert len(rows) == len(stored) == 6
        for one, row in zip(plan.runs, rows, strict=True):
            result = json.loads((one.folder / "result.json").read_text())
            assert row["label"] == one.label and row["seed"] == one.config.run.seed
            assert row["accuracy"] == result["accuracy"]
            passes = 1 if one.label == "SGD" else 2
            assert row["gradient_evaluations"] == 4 * passes
            assert row["seconds"] == pytest.approx(4 * result["seconds_per_step"])
        memory = [row["memory_mib"] for row in rows]
        # The state (parameters and momentum) and the training set at the least.
        least = (2 * 4 * rows[0]["parameters"] + 1437 * 64) / 2**20
        assert memory[0] == memory[1] > least
        assert memory[2] == memory[4] > memory[0]

    @pytest.mark.slow
    def test_what_is_finished_is_not_run_again(self, done, monkeypatch):
        root, plan, rows = done
        monkeypatch.setattr(training, "train", None)
        again = sweep.run(plan.runs, root / "out" / "sweep.json", show_progress=False)
        assert again == json.loads(json.dumps(rows))
        assert {sweep.state_of(one) for one in plan.runs} == {"finished"}

    def test_a_folder_that_was_moved_keeps_its_rows(self, done, tmp_path):
        root, _, rows = done
        shutil.copytree(root / "out", tmp_path / "moved")
        plan = sweep.plan(root / "sweep.toml", tmp_path / "moved")
        file = tmp_path / "moved" / "sweep.json"
        found = sweep.read_rows(file)
        assert [row["folder"] for row in found] == [row["folder"] for row in rows]
        # Another process has added one in the meantime.
        found.append({**rows[0], "folder": str(tmp_path / "moved" / "SAM" / "seed9")})
        file.write_text(json.dumps({"rows": found}))
        again = sweep.run(plan.runs, file, show_progress=False)
        assert [row["memory_mib"] for row in again] == [x["memory_mib"] for x in rows]
        kept = [row["folder"] for row in sweep.read_rows(file)]
        assert kept == [*(str(one.folder) for one in plan.runs), found[-1]["folder"]]

    @pytest.mark.slow
    def test_what_is_missing_or_interrupted_is_run(self, done, tmp_path):
        root, _, rows = done
        shutil.copytree(root / "out", tmp_path / "out")
        plan = sweep.plan(root / "sweep.toml", tmp_path / "out")
        shutil.rmtree(plan.runs[0].folder)
        (plan.runs[3].folder / "result.json").unlink()  # as if it was stopped
        states = [sweep.state_of(one) for one in plan.runs]
        assert states == [
            "missing",
            *["finished"] * 2,
            "interrupted",
            *["finished"] * 2,
        ]
        again = sweep.run(plan.runs, tmp_path / "rows.json", show_progress=False)
        for old, new in zip(rows, again, strict=True):
            assert new["nll"] == pytest.approx(old["nll"], abs=1e-6)

    def test_other_options_are_refused_before_anything_runs(self, done, monkeypatch):
        root, _, _ = done
        monkeypatch.setattr(training, "train", None)
        text = FILE.replace("steps = 4", "steps = 5")
        changed = sweep.plan(write(root / "out", text), root / "out")
        with pytest.raises(ValueError, match=r"other options:\n  steps: 4 -> 5"):
            sweep.run(changed.runs, root / "x.json")
        assert not (root / "x.json").exists()

    @pytest.mark.slow
    def test_data_may_move_with_it_and_must_stay_the_same(self, tmp_path, monkeypatch):
        def mine(seed):
            images = np.random.default_rng(seed).integers(0, 256, (40, 8, 8, 1))
            pair = images.astype(np.uint8), np.arange(40) % 3
            return data.from_arrays(pair, pair, name="mine")

        def planned(root):
            monkeypatch.chdir(root)
            return sweep.plan(root / "sweep.toml", root / "out").runs

        text = 'seeds = [0]\n[options]\ndata = "mine.npz"\nsteps = 2\nbatch_size = 20\n'
        (tmp_path / "old").mkdir()
        write(
            tmp_path / "old", text + 'mesh = "data=1"\n[methods.SGD]\nmethod = "sgd"\n'
        )
        data.save(mine(0), tmp_path / "old" / "mine.npz")
        sweep.run(planned(tmp_path / "old"), tmp_path / "a.json", show_progress=False)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "old").rename(tmp_path / "new")
        runs = planned(tmp_path / "new")
        monkeypatch.setattr(training, "train", None)
        (row,) = sweep.run(runs, tmp_path / "b.json", show_progress=False)
        assert row["status"] == "finished"
        (tmp_path / "new" / "mine.npz").unlink()
        data.save(mine(1), tmp_path / "new" / "mine.npz")
        with pytest.raises(ValueError, match="was trained on mine.*data are now mine"):
            sweep.check(runs)

    def test_a_folder_of_something_else_is_refused(self, tmp_path):
        plan = sweep.plan(write(tmp_path), tmp_path / "out")
        plan.runs[2].folder.mkdir(parents=True)
        (plan.runs[2].folder / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="is not empty"):
            sweep.check(plan.runs)

    @pytest.mark.slow
    def test_a_run_that_diverges_does_not_stop_the_others(self, tmp_path):
        text = FILE.replace("steps = 4", "steps = 12\nmax_skipped = 2").replace(
            "[0, 3]", "[0]"
        )
        text = text.split('[methods."SAM"]')[0]
        wild = '[methods."wild"]\nmethod = "sgd"\nlearning_rate = 1e30\n'
        text = text.replace('[methods."SGD"]', wild + '[methods."SGD"]')
        plan = sweep.plan(write(tmp_path, text), tmp_path / "out")
        rows_file = tmp_path / "rows.json"
        rows = sweep.run(plan.runs, rows_file, show_progress=False)
        assert [row["status"] for row in rows] == ["diverged", "finished"]
        assert rows[0]["gradient_evaluations"] is None
        again = sweep.run(plan.runs, rows_file, show_progress=False)
        assert [row["status"] for row in again] == ["diverged", "finished"]
        # With more patience it is tried again.
        patient = sweep.plan(
            write(tmp_path, text.replace("max_skipped = 2", "max_skipped = 99")),
            tmp_path / "out",
        )
        again = sweep.run(patient.runs, rows_file, show_progress=False)
        assert [row["status"] for row in again] == ["finished", "finished"]

    def test_a_sweep_that_is_cut_off_keeps_all_rows(self, done, tmp_path, monkeypatch):
        root, _, rows = done
        shutil.copytree(root / "out", tmp_path / "out")
        plan = sweep.plan(root / "sweep.toml", tmp_path / "out")
        shutil.rmtree(plan.runs[1].folder)

        def stop(*args, **kwargs):
            raise training.Interrupted("stopped", 2)

        file = tmp_path / "rows.json"
        old = [
            {**row, "folder": str(one.folder)}
            for row, one in zip(rows, plan.runs, strict=True)
        ]
        old[1]["memory_mib"] = -1.0  # of a folder that is gone
        file.write_text(json.dumps({"rows": old}))
        monkeypatch.setattr(training, "train", stop)
        with pytest.raises(training.Interrupted):
            sweep.run(plan.runs, file, show_progress=False)
        kept = {row["folder"]: row for row in sweep.read_rows(file)}
        assert len(kept) == 6
        monkeypatch.undo()
        again = sweep.run(plan.runs, file, show_progress=False)
        assert [row["memory_mib"] for row in again] == [x["memory_mib"] for x in rows]


@pytest.mark.slow
def test_the_command_runs_compares_and_reports(done, capsys):
    root, _, _ = done
    args = ["sweep", str(root / "sweep.toml"), "--output", str(root / "out")]
    cli.main([*args, "--dry-run"])
    out = capsys.readouterr().out
    assert out.count("finished") == 6 and "SAM-rho=0.1" in out
    with pytest.raises(SystemExit):
        cli.main([*args, "--baseline", "Adam"])
    assert "baseline must be one of 'SGD'" in capsys.readouterr().err
    cli.main([*args, "--quiet"])
    out = capsys.readouterr().out
    assert "Paired with SGD" in out and "Memory of a step" in out
    text = (root / "out" / "report" / "report.md").read_text()
    assert "## Cost and seeds" in text and "(cost.png)" in text
    assert (root / "out" / "report" / "report.html").exists()


class TestCost:
    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_has_a_count(self, name):
        assert cost.gradient_evaluations(TrainConfig(method=name)) >= 1

    @pytest.mark.parametrize(
        ("options", "count"),
        [
            ({"method": "sgd"}, 1),
            ({"method": "sam", "rho": (0.1, 0.1, 0.1)}, 4),
            ({"method": "otmdr", "num_particles": 3}, 6),
            ({"method": "otmdr", "split": "shared", "noise_std": 0.1}, 3),
            ({"method": "otmdr-bnn"}, 2.5),
            ({"method": "otmdr-bnn", "num_particles": 2}, 4.5),
            ({"method": "otmdr-bnn", "sigma_gradient": "particle"}, 2),
            ({"sampler": "first_order", "rho": (0.1,), "num_particles": 3}, 4),
            (
                {"sampler": "first_order", "inverse_temperature": float("inf")}
                | {"rho": (0.1,), "tilt": None},
                2,
            ),
            ({"sampler": "langevin", "rho": (0.1,), "chain_steps": 3}, 2),
            (
                {"sampler": "langevin", "chain_steps": 3, "split": "shared"}
                | {"num_particles": 2, "rho": (0.1,)},
                9,
            ),
            ({"method": "sgvb", "members": "2"}, 2),
            ({"method": "looksam", "look_every": 4}, 1.25),
            ({"method": "bsam", "num_subbatches": 4}, 2),
            ({"method": "ivon", "mc_samples": 3}, 3),
        ],
    )
    def test_counts(self, options, count):
        if "sampler" in options:
            options = {"tilt": 0.5, **options}
        assert cost.gradient_evaluations(TrainConfig(**options)) == count


def rows_of(label, values, seeds=(0, 1, 2), **more):
    base = {"status": "finished", "gradient_evaluations": 100.0, "seconds": 2.0,
            "memory_mib": 3.0}  # fmt: skip
    return [
        base | {"label": label, "seed": s, "accuracy": v, "nll": 1 - v} | more
        for s, v in zip(seeds, values, strict=True)
    ]


class TestTables:
    def test_the_paired_test_is_scipys(self):
        one, other = rows_of("a", [0.5, 0.6, 0.9]), rows_of("b", [0.4, 0.55, 0.6])
        gap, p, n = tables.paired_difference(one, other[::-1], "accuracy")
        want = stats.ttest_rel([0.5, 0.6, 0.9], [0.4, 0.55, 0.6])
        assert (gap, p, n) == (pytest.approx(0.15), pytest.approx(want.pvalue), 3)

    def test_only_common_seeds_count(self):
        one = rows_of("a", [0.5, 0.6, 0.9])
        other = rows_of("b", [0.1, 0.3], seeds=(2, 7))
        gap, p, n = tables.paired_difference(one, other, "accuracy")
        assert gap == pytest.approx(0.8) and np.isnan(p) and n == 1
        assert tables.paired_difference(one, rows_of("b", [0.1], (9,)), "nll") is None
        assert tables.paired_difference(one + one, other, "accuracy")[2] == 1
        same = tables.paired_difference(one, one, "accuracy")
        assert same == (0.0, 1.0, 3)

    def test_the_interval_is_scipys_and_a_constant_gap_is_no_test(self):
        ours, theirs = {0: 0.5, 1: 0.6, 4: 0.9}, {4: 0.6, 0: 0.4, 1: 0.55, 2: None}
        found = tables.paired(ours, theirs)
        test = stats.ttest_rel([0.5, 0.6, 0.9], [0.4, 0.55, 0.6])
        assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert (found.p, found.n) == (pytest.approx(test.pvalue), 3)
        constant = tables.paired({0: 0.9, 1: 0.8}, {0: 0.73, 1: 0.63})
        assert np.isnan(constant.p) and constant.interval == (constant.mean,) * 2
        assert tables.paired({0: 1.0}, {0: None}) is None

    def test_cells(self):
        rows = rows_of("a", [0.5, 0.6, 0.9]) + rows_of("b", [0.4, 0.55, 0.6])
        rows[5] = {**rows[5], "status": "diverged", "accuracy": None, "seconds": None}
        header, lines = tables.table(rows)
        assert lines == [["a", "3", "100", "2.0", "3.0"],
                         ["b", "2 (1 diverged)", "100", "2.0", "3.0"]]  # fmt: skip
        header, (line,) = tables.paired_table(rows, "a")
        want = stats.ttest_rel([0.4, 0.55], [0.5, 0.6]).pvalue
        assert header[1] == "Δ Accuracy (%)"
        assert line[:2] == ["b", f"-7.50 (p = {want:.3f})"]
        assert line[-1] == "-"

    def test_the_figure_shows_means_and_deviations(self):
        rows = rows_of("a", [0.5, 0.6, 0.9]) + rows_of("b", [0.4], seeds=(0,))
        rows += rows_of("NaN", [0.1], seeds=(0,), accuracy=None)
        (ax,) = tables.figure(rows).axes
        points = {
            line.get_gid(): line.get_xydata().tolist()
            for line in ax.lines
            if (line.get_gid() or "").startswith("cost:")
        }
        (first,), (second,) = points["cost:a"], points["cost:b"]
        assert first[1] == pytest.approx(200 / 3) and second[1] == pytest.approx(40)
        # Of one cost: side by side around it.
        assert first[0] < 100 < second[0]
        assert first[0] * second[0] == pytest.approx(100**2)
        (low, high) = ax.collections[0].get_segments()[0][:, 1]
        assert (high - low) / 2 == pytest.approx(100 * np.std([0.5, 0.6, 0.9], ddof=1))
