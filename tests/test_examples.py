"""The shipped examples, run as a user runs them, shrunk by their own options."""

import argparse
import json
import pathlib
import re

import pytest

from otmdr_jax.experiments import building
from otmdr_jax.experiments import config as config_lib
from tests import scripts

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name, *args, cwd):
    return scripts.run(EXAMPLES / name, *args, cwd=cwd)


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
    out = run("language_model.py", "--steps", "8", "--seeds", "1", cwd=tmp_path)
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


def columns(out, pattern):
    """The name and the numbers of each line of a script's output that is as asked."""
    found = re.findall(pattern, out, re.MULTILINE)
    assert found, out
    return {name: [float(x) for x in numbers] for name, *numbers in found}


@pytest.mark.slow
def test_robust_training_draws_a_better_border_between_moons(tmp_path):
    out = run("gallery/moons.py", cwd=tmp_path)
    found = columns(out, r"^([\w -]+): training loss ([\d.]+), .*? ([\d.]+)$")
    (plain_loss, plain), (loss, robust) = found["Adam"], found["Adam with OT-MDR"]
    assert plain + 0.03 < robust and plain_loss < loss
    assert (tmp_path / "moons.png").stat().st_size > 10_000


@pytest.mark.slow
def test_robust_solutions_of_the_gallery_are_flatter(tmp_path):
    out = run("gallery/sharpness.py", cwd=tmp_path)
    found = columns(out, r"^(.{23}) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$")
    plain, *robust = found.values()
    for accuracy, loss, _, eigenvalue in robust:
        assert accuracy > plain[0] and loss > plain[1] and eigenvalue < plain[3]


@pytest.mark.slow
def test_draws_of_the_gallery_climb_as_the_temperature_falls(tmp_path):
    out = run("gallery/worst_distribution.py", cwd=tmp_path)
    found = columns(out, r"^(.+): mean loss ([-\d.]+), highest ([\d.]+)$")
    assert len(found) == 6
    anywhere, warmer, on_the_hill = (mean for mean, _ in list(found.values())[:3])
    # The loss is odd in its first weight, so that its mean over the ball is 0.
    assert abs(anywhere) < 0.1 and 0.3 < warmer < on_the_hill <= 1.0


@pytest.mark.slow
def test_bands_of_the_gallerys_regression_cover_its_points(tmp_path):
    text = (EXAMPLES / "gallery" / "regression.py").read_text()
    assert "6_000" in text
    (tmp_path / "short.py").write_text(text.replace("6_000", "1_500"))
    out = run(tmp_path / "short.py", cwd=tmp_path)
    found = columns(
        out, r"^(.+): log-likelihood inside (\S+), gap (\S+); spread at 0 (\S+)$"
    )
    assert len(found) == 4
    # By the noise alone it is 1.38, without a slope about -50.
    assert all(inside > -1 and spread > 0.1 for inside, _, spread in found.values())


@pytest.mark.slow
def test_a_temperature_mends_the_gallerys_ensemble(tmp_path):
    out = run("gallery/calibration.py", cwd=tmp_path)
    found = columns(
        out, r"^(as trained|temperature .*): accuracy (\S+), NLL (\S+), ECE (\S+)$"
    )
    (right, nll, ece), (same, lower, mended) = found.values()
    assert right == same > 0.9 and lower < nll and mended < ece / 3


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


@pytest.mark.parametrize(
    "path",
    [path.relative_to(EXAMPLES) for path in sorted(EXAMPLES.rglob("*.py"))],
    ids=str,
)
def test_an_example_opens_with_command_time_and_expectation(path):
    header = (EXAMPLES / path).read_text().split('"""')[1]
    assert f"python examples/{path}" in header
    assert re.search(r"second|minute|hour", header) and "xpected" in header
