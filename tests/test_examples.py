"""The shipped examples, run as a user runs them, shrunk by their own options."""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import pytest

from otmdr_jax.experiments import building
from otmdr_jax.experiments import config as config_lib

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name, *args, cwd):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        check=True,
        capture_output=True,
        text=True,
        cwd=cwd,
    ).stdout


@pytest.mark.slow
def test_quickstart_is_short_and_does_what_its_header_expects(tmp_path):
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 100
    out = run("quickstart.py", cwd=tmp_path)
    accuracy = {
        name: float(value)
        for name, value in re.findall(r"([\w-]+): test accuracy ([\d.]+)", out)
    }
    assert 0.93 <= accuracy["OT-MDR"] <= 0.97
    assert accuracy["SGD"] < accuracy["OT-MDR"]


@pytest.mark.slow
def test_the_language_model_learns_by_each_method(tmp_path):
    out = run("language_model.py", "--steps", "12", "--seeds", "1", cwd=tmp_path)
    found = {
        name: float(value)
        for name, value in re.findall(r"^(AdamW|SAM|OT-MDR) +([\d.]+)$", out, re.M)
    }
    assert set(found) == {"AdamW", "SAM", "OT-MDR"}
    # Of 128 characters that are equally likely it is 4.85.
    assert all(1.0 < loss < 4.2 for loss in found.values())


@pytest.mark.slow
def test_cifar_single_runs_whole_and_resumes_in_its_smoke_form(tmp_path):
    out = run("cifar_single.py", "--smoke", cwd=tmp_path)
    folder = tmp_path / "runs" / "smoke-paper-cifar10-seed0"
    assert "smoke-paper-cifar10-seed0" in out
    assert (folder / "result.json").exists()
    out = run("cifar_single.py", "--smoke", "--resume", cwd=tmp_path)
    assert '"accuracy"' in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "members"),
    [
        (["--ensemble", "mixed", "--method", "sgd"], ["cnn_small", "wide_resnet_10_1"]),
        (["--ensemble", "3-resnet18", "--joint"], ["cnn_small"] * 3),
    ],
    ids=["mixed", "joint"],
)
def test_cifar_ensemble_in_its_smoke_form(options, members, tmp_path):
    out = run("cifar_ensemble.py", "--smoke", *options, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert [row["model"] for row in result["members"]] == members
    assert f"Run: {folder.relative_to(tmp_path)}" in out
    config = json.loads((folder / "config.json").read_text())
    assert config["ensemble"] == ("joint" if "--joint" in options else "independent")


def test_the_papers_ensembles_are_in_the_zoo(monkeypatch):
    """The presets that --smoke does not run: their networks, and their options."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import cifar_ensemble

    for options in cifar_ensemble.ENSEMBLES.values():
        config = config_lib.preset("paper-cifar10").replace(model="cnn_small")
        building.check_models(config.replace(**options))
        assert config.method.rho == (0.05, 0.1) and config.run.epochs == 200
    joint = config_lib.preset("released-ensemble-cifar10")
    assert (
        joint.model.member_names == ("resnet_10",) * 5 and joint.method.merge == "sum"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--released", "--num-particles", "2"], ["--method", "sgvb"]],
    ids=["paper", "released", "sgvb"],
)  # fmt: skip
def test_cifar_bnn_in_its_smoke_form(options, tmp_path):
    out = run("cifar_bnn.py", "--smoke", *options, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "config.json").read_text())
    released = "--released" in options
    norm = None if "sgvb" in options else "joint" if released else "per_leaf"
    assert config.get("posterior_norm") == norm  # sgvb takes no ascent step
    assert config["posterior_init"] == ("released" if released else "model")
    assert config["method"] == ("sgvb" if "sgvb" in options else "otmdr-bnn")
    assert (config["kl_weight"], config["optimizer"]) == (5e-6, "adam")
    assert '"epistemic"' in out and f"Run: {folder.relative_to(tmp_path)}" in out


def test_the_papers_bayesian_networks_are_in_the_zoo(monkeypatch):
    """The settings that --smoke does not run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import cifar_bnn

    for model in ("resnet_10", "resnet_18"):
        for method, released in (
            ("sgvb", False),
            ("otmdr-bnn", False),
            ("otmdr-bnn", True),
        ):
            options = argparse.Namespace(
                method=method, released=released, data="cifar100", model=model,
                num_particles=1, data_dir=None, dtype="bfloat16", seed=0,
            )  # fmt: skip
            config = cifar_bnn.configuration(options)
            building.check_models(config)
            assert config.model.name == model and config.run.epochs == 100


@pytest.mark.slow
def test_bnn_regression_covers_its_points(tmp_path):
    out = run("bnn_regression.py", "--steps", "2000", cwd=tmp_path)
    assert (tmp_path / "bnn_regression.png").stat().st_size > 10_000
    for name in ("SGVB", "OT-MDR"):
        objective = float(re.search(rf"{name}.*: objective ([-\d.]+)", out)[1])
        assert objective < 20  # from 60 nats an example


@pytest.mark.slow
def test_fine_tuning_in_its_smoke_form(tmp_path):
    out = run("fine_tuning.py", "--smoke", "--seeds", "1", cwd=tmp_path)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("| ")
    ]
    assert len(rows) == 2 + 3 * 2 and len({tuple(row[:2]) for row in rows}) == 8
    accuracy = [float(re.match(r"([\d.]+) ± 0", row[2])[1]) for row in rows[2:]]
    assert all(10 <= value <= 100 for value in accuracy)
    folder = tmp_path / "runs" / "fine-tuning" / "digits-even"
    assert json.loads((folder / "result.json").read_text())["finished"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_opens_with_command_time_and_expectation(path):
    header = path.read_text().split('"""')[1]
    assert f"python examples/{path.name}" in header
    assert re.search(r"second|minute|hour", header) and "xpected" in header
