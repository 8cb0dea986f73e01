"""The paper's tables: what is printed, what is planned, and small runs of cells."""

import json

import numpy as np
import pytest
from scipy import stats

from otmdr_jax.experiments import cli, programs, reproduce, run_folder
from otmdr_jax.experiments.reproduce import printed, running, tables
from otmdr_jax.experiments.reproduce.plans import _SIDE

TABLES = ("table1", "table2", "table3", "table4", "table5")


# -- what is printed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "key", "metric", "number"),
    [  # read from the paper by eye
        ("table1", ("densenet_121", "cifar100", "OT-MDR"), "accuracy", (69.84, 0.176)),
        ("table2", ("resnet_18", "cifar100", "bSAM"), "auroc", (0.892, 0.003)),
        ("table3", (printed.FIVE, "cifar10", "EDST"), "ece", (0.065, None)),
        ("table3", (printed.THREE, "cifar100", "OT-MDR"), "aac", (0.045, None)),
        ("table3", (printed.MIXED, "cifar100", "DST"), "brier", (0.393, None)),
        ("table4", ("resnet_18", "cifar10", "SGVB"), "nll", (0.54, 0.01)),
        (
            "table5",
            ("pyramidnet_101", "cifar10", "OT-MDR"),
            "seconds_per_epoch",
            (192, None),
        ),
    ],
)  # fmt: skip
def test_numbers_are_those_of_the_paper(target, key, metric, number):
    assert reproduce.numbers(target)[reproduce.Key(*key)][metric] == number


def test_what_the_paper_leaves_out_is_left_out():
    sam = reproduce.numbers("table3")[reproduce.Key(printed.FIVE, "cifar10", "SAM")]
    assert "ece" not in sam and len(sam) == 4
    assert sum(map(len, reproduce.numbers("table3").values())) == 21 * 10 - 6


# -- what is planned -------------------------------------------------------------------


@pytest.mark.parametrize("target", TABLES)
def test_every_printed_cell_is_planned_and_no_other(target):
    planned = [reproduce.Key(c.part, c.data, c.method) for c in reproduce.cells(target)]
    assert len(set(planned)) == len(planned)
    assert set(planned) == set(reproduce.numbers(target))


@pytest.mark.parametrize("scale", reproduce.SCALES)
@pytest.mark.parametrize("variant", reproduce.VARIANTS)
def test_all_options_go_together(scale, variant):
    for target in reproduce.TARGETS:
        for cell in reproduce.cells(target, scale, variant):
            cell.config.check_used()
            programs.make_mesh(cell.config)


def test_the_papers_scale_is_the_papers_setting():
    found = {
        (c.part, c.method): c.config
        for target in ("table1", "figure1")
        for c in reproduce.cells(target, datasets=["cifar10"])
    }
    sam, ours = (found["pyramidnet_101", name] for name in ("SAM", "OT-MDR"))
    assert sam.method.rho == (0.05,) and ours.method.rho == (0.05, 0.1)
    assert ours.method.noise_std == 0.01 and ours.method.num_particles == 1
    for config in (sam, ours):
        assert config.model.name == "pyramidnet_101"
        assert config.run.epochs == 200 and config.run.batch_size == 128
        assert config.schedule.name == "cosine"
        assert config.schedule.learning_rate == 0.1
        assert config.data.train_examples is None
    three = found["wide_resnet_28_10", "K = 3"]
    assert three.method.num_particles == 3 and three.run.epochs == 100
    large = reproduce.cells("table2")[3].config
    assert large.model.name == "resnet_18"
    assert {k: getattr(large.model, k) for k in _SIDE} == _SIDE
    bayes = reproduce.cells("table4")[1].config
    assert bayes.method.rho == (0.005, 0.01) and bayes.run.epochs == 100
    assert bayes.optimizer.name == "adam" and bayes.schedule.name == "plateau"


def test_ensembles_have_the_papers_members():
    cells = {
        (c.part, c.method): c.config
        for c in reproduce.cells("table3", datasets=["cifar100"])
    }
    assert cells[printed.FIVE, "SAM"].model.member_names == ("resnet_10",) * 5
    assert cells[printed.THREE, "OT-MDR"].model.member_names == ("resnet_18",) * 3
    assert cells[printed.MIXED, "DST"].model.member_names == (
        "resnet_18", "mobilenet", "efficientnet_b0",
    )  # fmt: skip
    assert cells[printed.FIVE, "Snapshot"].method.cycles == 5
    assert cells[printed.THREE, "EDST"].method.tickets == 3
    assert cells[printed.THREE, "OT-MDR"].method.rho == (0.1, 0.2)


def test_the_released_variant_is_that_of_the_code():
    sam, ours = (
        c.config
        for c in reproduce.cells("table1", variant="released", datasets=["cifar10"])[:2]
    )
    assert sam.schedule.name == "step" and ours.schedule.name == "cosine"
    assert ours.method.merge == "sum" and ours.method.noise_std == 0
    for config in (sam, ours):
        assert config.model.name == "wide_resnet_34_10"
        assert config.optimizer.label_smoothing == 0.1


def test_the_miniature_keeps_families_and_methods():
    large = reproduce.cells("table3", datasets=["cifar10"])
    small = reproduce.cells("table3", "small", datasets=["cifar10"])
    for one, other in zip(large, small, strict=True):
        assert (one.part, one.method) == (other.part, other.method)
        assert one.config.model.member_names == other.config.model.member_names
        same = one.config.method == other.config.method
        assert same or one.method == "Fast Geometric"  # whose cycles are epochs
        assert other.config.data.train_examples == 5_000
        assert other.config.run.epochs == round(one.config.run.epochs / 10)
        assert len(other.seeds) == 3


def test_figure_2_shares_the_ensembles_of_table_3():
    table = {c.name: c.config for c in reproduce.cells("table3", "small")}
    for cell in reproduce.cells("figure2", "small"):
        assert table[cell.name] == cell.config
    timed = {c.name for c in reproduce.cells("table5", "small")}
    assert not timed & {c.name for c in reproduce.cells("table1", "small")}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("table6",), "target must be of 'table1'"),
        (("table1", "tiny"), "scale must be of 'paper', 'small', 'smoke'"),
        (("table1", "paper", "mine"), "variant must be of 'paper', 'released'"),
    ],
)
def test_unknown_names_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        reproduce.cells(*arguments)
    with pytest.raises(ValueError, match="datasets must be of 'cifar10', 'cifar100'"):
        reproduce.cells("table1", datasets=["mnist"])


# -- costs -----------------------------------------------------------------------------


def test_operations_are_those_of_the_layers(monkeypatch):
    monkeypatch.setattr(running, "_speed", lambda: 1e9)
    sgd, sam, ours = (
        one
        for one in reproduce.cells("table3", "smoke", datasets=["cifar10"])
        if one.part == printed.FIVE and one.method in ("SGD", "SAM", "OT-MDR")
    )
    # cnn_small on 8 x 8 x 1: 3x3 to 16, 3x3 to 32 at stride 2, 3x3 to 32, dense to 10.
    forward = 2 * (64 * 9 * 16 + 16 * 9 * 16 * 32 + 16 * 9 * 32 * 32 + 32 * 10)
    row, *rest = reproduce.estimate([sgd, sam, ours])
    steps = 640 // 32
    assert row["steps"] == steps and row["gradients"] == 5 * steps * 2  # two seeds
    assert row["operations"] == 3 * forward * 32 * 5 * steps * 2
    assert row["hours"] == pytest.approx(row["operations"] / 1e9 / 3600)
    assert [one["gradients"] for one in rest] == [2 * row["gradients"]] * 2


# -- the tables ------------------------------------------------------------------------


def made(method, values, part="resnet_18", data="cifar10"):
    cell = next(
        c
        for c in reproduce.cells("table2", "small")
        if (c.part, c.data, c.method) == (part, data, method)
    )
    seeds = list(range(len(values)))
    return reproduce.Measured(cell, seeds, {"accuracy": values}, 1.0, ("a cpu",))


def test_claims_are_tested_over_seeds():
    ours, sam, sgd = [0.92, 0.93, 0.94], [0.90, 0.915, 0.92], [0.95, 0.957, 0.97]
    found = [made("SGD", sgd), made("SAM", sam), made("OT-MDR", ours)]
    lines = {line[0]: line for line in tables.tested(found, ["accuracy"]).lines}
    test = stats.ttest_rel(ours, sam)
    assert lines["SAM"][2] == f"{100 * np.mean(np.subtract(ours, sam)):+.2f}"
    assert lines["SAM"][4] == f"{test.pvalue:.3f}"
    low, high = test.confidence_interval(0.95)
    assert lines["SAM"][3] == f"{100 * low:+.2f} to {100 * high:+.2f}"
    assert lines["SAM"][5] == "+0.87"  # 96.59 - 95.72
    assert lines["SAM"][6] == "holds"
    assert lines["SGD"][6] == "reversed"
    close = [made("SAM", [0.93, 0.92, 0.95]), made("OT-MDR", ours)]
    assert tables.tested(close, ["accuracy"]).lines[0][6] == "not decided"


def test_seeds_are_paired_by_their_numbers():
    ours, sam = made("OT-MDR", [0.9, 0.8, 0.7]), made("SAM", [0.71, 0.82])
    sam = sam._replace(seeds=[2, 1])
    line = tables.tested([ours, sam], ["accuracy"]).lines[0]
    assert line[2] == "-1.50"  # of 0.7 - 0.71 and 0.8 - 0.82


def test_differences_without_a_spread_decide_nothing():
    ours, sam = made("OT-MDR", [0.90, 0.80]), made("SAM", [0.73, 0.63])
    assert tables.tested([ours, sam], ["accuracy"]).lines[0][2:5] == [
        "+17.00", "+17.00 to +17.00", "-",
    ]  # fmt: skip


def test_a_single_seed_decides_nothing():
    assert tables.tested([made("SAM", [0.9]), made("OT-MDR", [0.8])], ["accuracy"]) is (
        None
    )


def test_what_is_not_run_yet_is_a_dash():
    missing = made("SAM", [])._replace(seconds=None, values={})
    table = tables.table([missing, made("OT-MDR", [0.9, 0.8])], ["accuracy"])
    assert table.lines == [
        ["SAM", "0", "-", "95.72 ± 0.14", "-"],
        ["OT-MDR", "2", "85.00 ± 7.07", "96.59 ± 0.07", "1"],
    ]


# -- runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A table of the smoke form, made by the command line."""
    output = tmp_path_factory.mktemp("reproduce")
    command = ["reproduce", "table4", "--scale", "smoke", "--quiet", "--output"]
    cli.main([*command, str(output)])
    return command, output


@pytest.mark.slow
def test_the_command_trains_measures_and_writes(reproduced, capsys):
    command, output = reproduced
    record = json.loads((output / "table4.json").read_text())
    assert len(record["cells"]) == 4
    for cell in record["cells"]:
        assert cell["seeds"] == [0, 1] and set(cell["values"]) == {
            "accuracy", "nll", "ece",
        }  # fmt: skip
    name = "cifar10-resnet_10-SGVB"
    results = [
        run_folder.read_result(output / "runs" / name / f"{seed}") for seed in (0, 1)
    ]
    first = record["cells"][0]["values"]
    assert first["accuracy"] == [r["accuracy"] for r in results]
    assert first["nll"] == pytest.approx([r["nll"] for r in results], rel=1e-5)
    text = (output / "table4.md").read_text()
    mean = 100 * np.mean(first["accuracy"])
    assert f"{mean:.2f}" in text and "80.52 ± 2.1" in text
    assert "<table>" in (output / "table4.html").read_text()


@pytest.mark.slow
def test_finished_runs_are_kept(reproduced, capsys):
    command, output = reproduced
    times = {p: p.stat().st_mtime_ns for p in output.glob("runs/*/*/result.json")}
    assert len(times) == 8
    cli.main([*command, str(output), "--only", "SGVB"])
    assert {p: p.stat().st_mtime_ns for p in times} == times
    cli.main([*command, str(output), "--dry-run"])
    out = capsys.readouterr().out
    assert "2 of 2" in out and "hours on this machine" in out


@pytest.mark.slow
@pytest.mark.parametrize("target", ["table1", "table2", "table3", "table5", "figure1"])
def test_every_cell_runs_in_its_smoke_form(target, tmp_path):
    command = ["reproduce", "--scale", "smoke", "--quiet", "--output", str(tmp_path)]
    # Of the ensembles a method that collects, and those of Figure 2.
    only = ["--only", "Snapshot", "SAM", "OT-MDR"] if target == "table3" else []
    cli.main([*command, target, *only])
    record = json.loads((tmp_path / f"{target}.json").read_text())
    asked = [
        cell
        for cell in reproduce.cells(target, "smoke", datasets=["cifar10"])
        if not only or cell.method in only
    ]
    assert len(record["cells"]) == len(asked)
    for cell, planned in zip(record["cells"], asked, strict=True):
        assert cell["seeds"] == list(planned.seeds)
        names = reproduce.TARGETS[target].metrics
        assert all(np.isfinite(cell["values"][name]).all() for name in names)
    if target == "figure1":
        assert (tmp_path / "particles.png").stat().st_size > 5_000
    if target == "table3":  # its ensembles are those of Figure 2
        trained = sorted(tmp_path.glob("runs/*/*"))
        cli.main([*command, "figure2"])
        assert sorted(tmp_path.glob("runs/*/*")) == trained
        check_landscapes(tmp_path)


def check_landscapes(tmp_path):
    for i in range(3):
        assert (tmp_path / f"landscape{i}.png").stat().st_size > 5_000
    folder = tmp_path / "runs" / "cifar10-five-resnet_10-SAM" / "0"
    assert np.shape(json.loads((folder / "landscape.json").read_text())["losses"]) == (
        3, 3,
    )  # fmt: skip


def test_data_that_are_not_prepared_are_said_before_anything_is_trained(
    cifar_dir, tmp_path, capsys
):
    command = ["reproduce", "table1", "--scale", "small", "--quiet", "--output"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, str(tmp_path), "--data-dir", str(cifar_dir)])
    assert stop.value.code == 2
    assert "cifar100" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_unknown_methods_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "table1", "--only", "ASAM"])
    assert stop.value.code == 2
    assert "only must name methods of table1, SAM, OT-MDR" in capsys.readouterr().err
