"""`otmdr demo`: what it refuses, and the whole of it with one epoch."""

import json
import signal

import pytest

from otmdr_jax.experiments import cli, demo, jobs, report, training
from otmdr_jax.experiments.config import TrainConfig

LABELS = [
    "SGD",
    "SAM",
    "OT-MDR (K = 1)",
    "OT-MDR (K = 2)",
    "OT-MDR (K = 1), 3 members",
]


def test_another_report_is_kept(tmp_path, one_layer, capsys):
    config = TrainConfig(
        model="one_layer", method="sgd", steps=1, batch_size=64, mesh="data=1"
    )
    training.train(config, output=tmp_path / "run", show_progress=False)
    page = tmp_path / "page"
    report.write(page, [report.read_run(tmp_path / "run")], "My runs")
    with pytest.raises(SystemExit):
        cli.main(["demo", "--output", str(page)])
    assert "another report, 'My runs'" in capsys.readouterr().err
    assert json.loads((page / "results.json").read_text())["title"] == "My runs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--seeds"], "seeds must be one or several different ones, got ()"),
        (["--jobs", "0"], "jobs must be a positive integer, got 0"),
        (["--jobs", "99999"], "jobs must be at most the processor's"),
    ],
)
def test_bad_words_are_refused_before_the_first_run(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--output", str(tmp_path / "page"), *words])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_two_jobs_are_the_default_where_there_are_cores_for_them(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run", lambda *_, jobs, **__: asked.append(jobs))
    monkeypatch.setattr(jobs, "cores_at_hand", lambda: [0, 1, 2, 3])
    cli.main(["demo"])
    monkeypatch.setattr(jobs, "cores_at_hand", lambda: [3])
    cli.main(["demo"])
    monkeypatch.setattr(jobs, "cores_at_hand", lambda: [0, 1, 2, 3])
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    cli.main(["demo"])
    cli.main(["demo", "--jobs", "3"])
    assert asked == [2, 1, 1, 3]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (training.Interrupted("saved", signal.SIGTERM), 143, "keeps no part of its"),
        (training.NonFiniteError("SGD, seed 0, diverged."), 1, "SGD, seed 0, diverged"),
    ],
)
def test_what_ends_it_early_is_said(error, code, said, monkeypatch, capsys):
    def ends(*args, **kwargs):
        raise error

    monkeypatch.setattr(demo, "run", ends)
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo"])
    assert stop.value.code == code and said in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_of_it_is_the_same_with_one_job_and_two(
    tmp_path, capsys, monkeypatch
):
    page = tmp_path / "page"

    def rows_of(count, labels):
        words = ["--seeds", "4", "--epochs", "1", "--jobs", f"{count}", "--quiet"]
        cli.main(["demo", "--output", str(page), *words])
        assert f"Report: {page / 'report.md'}" in capsys.readouterr().out
        configs = json.loads((page / "configs.json").read_text())
        assert [one["label"] for one in configs] == labels
        assert {one["config"]["seed"] for one in configs} == {4}
        rows = json.loads((page / "results.json").read_text())["rows"]
        assert [(row["label"], row["n"]) for row in rows] == [(x, 1) for x in labels]
        return [row["nll"]["mean"] for row in rows]

    whole = rows_of(min(2, len(jobs.cores_at_hand())), LABELS)
    # The second one writes over what the first one wrote.
    monkeypatch.setattr(demo, "METHODS", demo.METHODS[1:3])
    # Sums over two cores and over one may round apart.
    assert rows_of(1, LABELS[1:3]) == pytest.approx(whole[1:3], rel=1e-3)
