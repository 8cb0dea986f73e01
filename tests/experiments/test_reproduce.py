"""The paper's tables: what is printed, what is planned, and small runs of cells."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from otmdr_jax.experiments import building, cli, programs, reproduce, run_folder, sweep
from otmdr_jax.experiments.reproduce import claims, figures, printed, running, tables
from otmdr_jax.experiments.reproduce.plans import _SIDE
from otmdr_jax.io import files

TABLES = ("table1", "table2", "table3", "table4", "table5")


# -- what is printed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "key", "metric", "number"),
    [  # read from the paper by eye
        ("table1", ("densenet_121", "cifar100", "OT-MDR"), "accuracy", (69.84, 0.176)),
        ("table2", ("resnet_18", "cifar100", "bSAM"), "auroc", (0.892, 0.003)),
        ("table3", (printed.FIVE, "cifar10", "Deep Ensemble"), "ece", (0.072, None)),
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
    found = reproduce.numbers("table3")
    sgd = found[reproduce.Key(printed.MIXED, "cifar10", "SGD")]
    assert "ece" not in sgd and len(sgd) == 4
    # Ten rows of two data sets and five metrics, one of them without two ECEs.
    assert sum(map(len, found.values())) == 10 * 2 * 5 - 2


def test_rows_whose_names_are_not_certain_have_no_numbers():
    found = reproduce.numbers("table3")
    for method in ("Snapshot", "EDST", "DST", "SGD", "SAM"):
        for part in (printed.FIVE, printed.THREE):
            assert reproduce.Key(part, "cifar10", method) not in found


# -- what is planned -------------------------------------------------------------------


@pytest.mark.parametrize("target", TABLES)
def test_every_printed_cell_is_planned_and_no_other(target):
    planned = [reproduce.Key(c.part, c.data, c.method) for c in reproduce.cells(target)]
    assert len(set(planned)) == len(planned)
    known = set(reproduce.numbers(target))
    assert known <= set(planned)
    assert target == "table3" or known == set(planned)


@pytest.mark.parametrize("scale", reproduce.SCALES)
@pytest.mark.parametrize("variant", reproduce.VARIANTS)
def test_all_options_go_together(scale, variant):
    for target in reproduce.TARGETS:
        for cell in reproduce.cells(target, scale, variant):
            cell.config.check_used()
            building.check_models(cell.config)
            programs.make_mesh(cell.config)


@pytest.mark.parametrize("scale", reproduce.SCALES)
@pytest.mark.parametrize("variant", reproduce.VARIANTS)
def test_one_folder_is_of_one_configuration(scale, variant):
    """Targets share the folder of a scale and variant, and runs that are the same."""
    found = {}
    for target in reproduce.TARGETS:
        for cell in reproduce.cells(target, scale, variant):
            assert found.setdefault(cell.name, cell.config) == cell.config, cell.name


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
    for part, count in ((printed.FIVE, 5), (printed.THREE, 3)):
        for scale, steps in (("paper", 390), ("small", 78)):
            fge = next(
                c.config
                for c in reproduce.cells("table3", scale, datasets=["cifar10"])
                if (c.part, c.method) == (part, "Fast Geometric")
            )
            total = fge.run.epochs * steps
            assert len(fge.method.course(0.1, total, steps).ends) == count
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
    sgvb, ours = (c.config for c in reproduce.cells("table4", variant="released")[:2])
    for config in (sgvb, ours):
        assert config.run.batch_size == 1024
        assert config.model.activation == "softplus"
        assert config.method.posterior_init == "released"


def test_the_miniature_keeps_families_and_methods():
    large = reproduce.cells("table3", datasets=["cifar10"])
    small = reproduce.cells("table3", "small", datasets=["cifar10"])
    for one, other in zip(large, small, strict=True):
        assert (one.part, one.method) == (other.part, other.method)
        assert one.config.model.member_names == other.config.model.member_names
        same = one.config.method == other.config.method
        assert same or one.method == "Fast Geometric"  # whose cycles are epochs
        assert other.config.data.train_examples == 5_000
        assert other.config.run.epochs == round(one.config.run.epochs / 20)
        assert other.config.data.augment == ()  # its networks fit the images
        assert len(other.seeds) == 3
    for one in reproduce.cells("table1", "small"):
        assert one.config.run.epochs == 200 // 10
    for one in reproduce.cells("figure1", "small"):
        assert one.config.run.epochs == 100 // 10


def test_figure_2_shares_the_ensembles_of_table_3():
    table = {c.name: c.config for c in reproduce.cells("table3", "small")}
    for cell in reproduce.cells("figure2", "small"):
        assert table[cell.name] == cell.config
    timed = {c.name for c in reproduce.cells("table5", "small")}
    assert not timed & {c.name for c in reproduce.cells("table1", "small")}


def test_the_miniature_of_bsam_leaves_batchnorm_enough_images():
    for scale in ("small", "smoke"):
        bsam = reproduce.cells("table2", scale)[2]
        assert bsam.method == "bSAM"
        assert programs.few_images(bsam.config, None) is None


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
    steps = 320 // 32
    assert row["steps"] == steps and row["gradients"] == 5 * steps * 2  # two seeds
    # Five members, two seeds, and 360 images of the test set once.
    training, testing = 3 * forward * 32 * 5 * steps * 2, forward * 360 * 5 * 2
    assert row["operations"] == training + testing
    (more,) = reproduce.estimate([sgd], landscape_examples=1_000)
    assert more["operations"] == row["operations"] + forward * 5 * 1_000
    (bayes,) = reproduce.estimate(reproduce.cells("table4", "smoke")[:1])
    samples = 30  # one network, that many samples of its weights; a KL counts nothing
    assert bayes["operations"] == 3 * forward * 32 * steps * 2 + forward * 720 * samples
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


def lines_of(found, name):
    tested = [one for one in claims.tested("table2", found) if one.metric == name]
    return claims.table(tested).lines


def test_claims_are_tested_over_seeds():
    ours, sam, sgd = [0.92, 0.93, 0.94], [0.90, 0.915, 0.92], [0.95, 0.957, 0.97]
    found = [made("SGD", sgd), made("SAM", sam), made("OT-MDR", ours)]
    lines = {line[0]: line for line in lines_of(found, "accuracy")}
    test = stats.ttest_rel(ours, sam)
    assert lines["SAM"][2] == f"{100 * np.mean(np.subtract(ours, sam)):+.2f}"
    assert lines["SAM"][4] == f"{test.pvalue:.3f}"
    low, high = test.confidence_interval(0.95)
    assert lines["SAM"][3] == f"{100 * low:+.2f} to {100 * high:+.2f}"
    assert lines["SAM"][6] == "+0.87"  # 96.59 - 95.72
    assert lines["SAM"][7] == "holds"
    assert lines["SGD"][7] == "reversed"
    close = [made("SAM", [0.93, 0.92, 0.95]), made("OT-MDR", ours)]
    assert lines_of(close, "accuracy")[0][7] == "not decided"


def test_q_is_corrected_for_all_tests_of_the_page():
    ours, sam, sgd = [0.92, 0.93, 0.94], [0.90, 0.915, 0.92], [0.95, 0.957, 0.97]
    cells = [made("SGD", sgd), made("SAM", sam), made("OT-MDR", ours)]
    other = [
        one._replace(cell=dataclasses.replace(one.cell, data="cifar100"))
        for one in cells
    ]
    found = claims.tested("table2", [*cells, *other])
    assert [(x.data, x.other) for x in found] == [
        (data, name) for data in ("cifar10", "cifar100") for name in ("SGD", "SAM")
    ]
    low, high = sorted({claim.p for claim in found})
    # Each p stands twice among four: ranks 2 and 4.
    want = {low: min(low * 4 / 2, high * 4 / 4), high: high}
    assert [claim.q for claim in found] == pytest.approx([want[x.p] for x in found])


def test_a_row_that_is_worse_in_print_may_be_better():
    values = {"accuracy": [0.5] * 3, "ece": [0.2] * 3}
    found = of_target(
        "table4",  # printed ResNet-10: accuracy + 0.74, NLL + 0.03, ECE + 0.03
        SGVB=values | {"nll": [1.5, 1.4, 1.3]},
        **{"OT-MDR": values | {"nll": [1.3, 1.21, 1.1]}},
    )
    verdicts = {x.metric: x.verdict for x in claims.tested("table4", found)}
    assert verdicts["nll"] == "worse in print, better here"
    assert verdicts["ece"] == "worse in print"  # no spread: nothing is decided
    claimed = {x.metric: x.is_claimed for x in claims.tested("table4", found)}
    assert claimed == {"accuracy": True, "nll": False, "ece": False}
    assert verdicts["accuracy"] == "not decided"


def test_a_run_without_numbers_is_no_test():
    nan = float("nan")
    found = [made("SAM", [0.9, nan, 0.92]), made("OT-MDR", [0.95, 0.96, 0.97])]
    (line,) = lines_of(found, "accuracy")
    assert line[4] == line[5] == "-" and line[7] == "not tested"
    row = tables.table(found, ["accuracy"]).lines[0]
    assert row[1:3] == ["3 (1 with no finite numbers)", "-"]


def test_a_tiny_p_is_no_zero():
    found = [made("SAM", [0.9, 0.91, 0.92]), made("OT-MDR", [0.95, 0.96, 0.9701])]
    assert lines_of(found, "accuracy")[0][4] == "< 0.001"


def test_rows_that_were_made_apart_are_said():
    found = [made("SAM", [0.9, 0.8]), made("OT-MDR", [0.95, 0.96])]
    text = tables.page("table2", "small", "paper", found, "x").text
    assert "not all made alike" not in text
    found[1] = found[1]._replace(made=("a gpu",))
    text = tables.page("table2", "small", "paper", found, "x").text
    assert "not all made alike. SAM: a cpu. OT-MDR: a gpu." in text


def test_an_undefined_auroc_is_no_claim():
    found = [
        one._replace(values={"ovr_auroc": one.values["accuracy"]})
        for one in (made("SAM", [0.9, 0.91]), made("OT-MDR", [0.99, 0.98]))
    ]
    assert lines_of(found, "ovr_auroc")[0][6:] == ["-", "-"]


def test_diverged_runs_and_members_are_said():
    lost = made("SAM", [0.9, 0.8])._replace(diverged=(1, 0))
    half = made("OT-MDR", [0.9, 0.8])._replace(diverged=(0, 2))
    table = tables.table([lost, half], ["accuracy"])
    counts = [line[1] for line in table.lines]
    assert counts == ["2 (1 diverged)", "2 (a member diverged in 2)"]
    nan = made("SAM", [float("nan"), 0.9])
    assert tables.table([nan], ["accuracy"]).lines[0][2] == "-"


def test_seeds_are_paired_by_their_numbers():
    ours, sam = made("OT-MDR", [0.9, 0.8, 0.7]), made("SAM", [0.71, 0.82])
    sam = sam._replace(seeds=[2, 1])
    (line,) = lines_of([ours, sam], "accuracy")
    assert line[2] == "-1.50"  # of 0.7 - 0.71 and 0.8 - 0.82


def test_differences_without_a_spread_decide_nothing():
    ours, sam = made("OT-MDR", [0.90, 0.80]), made("SAM", [0.73, 0.63])
    assert lines_of([ours, sam], "accuracy")[0][2:6] == [
        "+17.00", "+17.00 to +17.00", "-", "-",
    ]  # fmt: skip


def test_a_single_seed_decides_nothing():
    assert not claims.tested("table2", [made("SAM", [0.9]), made("OT-MDR", [0.8])])


def test_what_is_not_run_yet_is_a_dash():
    missing = made("SAM", [])._replace(seconds=None, values={})
    table = tables.table([missing, made("OT-MDR", [0.9, 0.8])], ["accuracy"])
    assert table.lines == [
        ["SAM", "0", "-", "95.72 ± 0.14", "-"],
        ["OT-MDR", "2", "85.00 ± 7.07", "96.59 ± 0.07", "1"],
    ]


def of_target(target, **values):
    """Cells of the miniature of a target's first network, with values by method."""
    first = reproduce.cells(target, "small", datasets=["cifar10"])[0].part
    return [
        reproduce.Measured(
            cell, [0, 1, 2], values[cell.method.replace(" ", "")], 1.0, ("a cpu",)
        )
        for cell in reproduce.cells(target, "small", datasets=["cifar10"])
        if cell.part == first
    ]


def test_what_the_paper_says_in_words_is_tested_too():
    by_k = {"K=1": [0.80, 0.82, 0.81], "K=2": [0.84, 0.86, 0.86]}
    by_k |= {"K=3": [0.90, 0.93, 0.91], "K=4": [0.84, 0.87, 0.85]}
    found = of_target("figure1", **{k: {"accuracy": v} for k, v in by_k.items()})
    rows = {one.other: one for one in claims.tested("figure1", found)}
    assert {k: x.verdict for k, x in rows.items()} == {
        "K = 1": "holds", "K = 3": "reversed", "K = 4": "not decided",
    }  # fmt: skip
    test = stats.ttest_rel(by_k["K=2"], by_k["K=1"])
    assert rows["K = 1"].p == pytest.approx(test.pvalue)
    table = claims.table(rows.values())
    assert table.header[0] == "K = 2 minus" and table.lines[0][6] == "higher"
    flat = of_target(
        "figure2",
        SAM={"nll": [1.3, 1.2, 1.3], "sharpness": [0.30, 0.31, 0.35]},
        **{"OT-MDR": {"nll": [1.2, 1.3, 1.3], "sharpness": [0.20, 0.22, 0.25]}},
    )
    assert [(x.metric, x.verdict) for x in claims.tested("figure2", flat)] == [
        ("nll", "not decided"), ("sharpness", "holds"),
    ]  # fmt: skip


def test_a_records_page_is_that_of_the_runs():
    found = of_target(
        "table4",
        SGVB={"accuracy": [0.4, 0.5, 0.45], "nll": [1.5, 1.4, 1.3], "ece": [0.1] * 3},
        **{"OT-MDR": {"accuracy": [0.5] * 3, "nll": [1.5] * 3, "ece": [0.2] * 3}},
    )
    found[0] = found[0]._replace(diverged=(1, 2), seeds=[0, 2, 5])
    found[1] = found[1]._replace(
        cell=dataclasses.replace(
            found[1].cell, config=found[1].cell.config.replace(data_dir="/home/me")
        )
    )
    what = ("table4", "small", "paper")
    found[1].values["nll"] = [1.5, float("nan"), 1.5]  # a run that diverged
    record = json.loads(files.dumps(tables.record(*what, found)))
    again = tables.read(record)
    assert tables.page(*what, again, "x").text == tables.page(*what, found, "x").text
    assert "/home/me" not in json.dumps(record)  # it is of one machine
    record["cells"][1]["options"]["epochs"] = 11
    with pytest.raises(ValueError, match=r"\{'epochs': \(11, 10\)\}.*Run it again"):
        tables.read(record)
    record["cells"][1]["options"].pop("epochs")  # or what was a default then
    with pytest.raises(ValueError, match=r"\{'epochs': \(None, 10\)\}"):
        tables.read(record)
    record["cells"][1]["method"] = "another"
    with pytest.raises(ValueError, match="resnet_10, cifar10, another"):
        tables.read(record)


def test_times_are_compared_by_their_ratio():
    seconds = {"SAM": [2.0, 3.0, 4.0], "OT-MDR": [3.0, 3.0, 6.0]}
    found = of_target(
        "table5", **{k: {"seconds_per_epoch": v} for k, v in seconds.items()}
    )
    text = tables.page("table5", "small", "paper", found, "x").text
    mean = np.mean([3 / 2, 3 / 3, 6 / 4])
    assert f"take {mean:.2f} times the time of SAM's (mean of 3 seeds); 1.36" in text
    assert {x.verdict for x in claims.tested("table5", found)} == {"-"}  # no claim
    # One run of OT-MDR, and one of SAM that was evaluated again and has no time.
    found[1] = found[1]._replace(seeds=[1], values={"seconds_per_epoch": [3.0]})
    text = tables.page("table5", "small", "paper", found, "x").text
    assert "take 1.00 times the time of SAM's (mean of 1 seeds)" in text
    found[0] = found[0]._replace(values={"seconds_per_epoch": [2.0, np.nan, 4.0]})
    assert (
        "times the time" not in tables.page("table5", "small", "paper", found, "x").text
    )


def test_the_first_seed_of_all_cells_is_first(tmp_path):
    cells = reproduce.cells("table4", "small", datasets=["cifar10"])
    runs = reproduce.planned(cells, tmp_path)
    assert [run.config.run.seed for run in runs] == [0] * 4 + [1] * 4 + [2] * 4
    assert [run.label for run in runs[:4]] == [cell.name for cell in cells]


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
    name = "cifar10-resnet_10-SGVB-posterior"
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
    assert cell["mean"]["nll"] == pytest.approx(np.mean(cell["values"]["nll"]))
    assert len(record["tests"]) == 2 * 3 and f"{2 * 3} tests" in text


@pytest.mark.slow
def test_finished_runs_are_kept(reproduced, capsys):
    command, output = reproduced
    times = {p: p.stat().st_mtime_ns for p in output.glob("runs/*/*/result.json")}
    assert len(times) == 8
    page = (output / "table4.md").read_text()
    cli.main([*command, str(output), "--only", "SGVB"])
    assert {p: p.stat().st_mtime_ns for p in times} == times
    rows = sweep.read_rows(running.rows_file(output / "runs", "table4"))
    assert len(rows) == 8  # those of what was not asked for, too
    # Another sitting, of less: all that is known stays on the page.
    again = (output / "table4.md").read_text()
    assert again.replace(" --only SGVB", "") == page
    cli.main([*command, str(output), "--dry-run"])
    out = capsys.readouterr().out
    assert "2 of 2" in out and "hours on this machine" in out


@pytest.mark.slow
def test_what_is_finished_is_shown_when_it_is_stopped(tmp_path):
    words = ["reproduce", "table4", "--scale", "smoke", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "otmdr_jax", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = tmp_path / "runs" / "cifar10-resnet_10-SGVB-posterior" / "0" / "result.json"
    until = time.monotonic() + 120
    second = first.parent.parent / "1" / "metrics.jsonl"
    while not (first.exists() and second.exists()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "To go on: otmdr reproduce table4 --scale smoke" in err
    record = json.loads((tmp_path / "table4.json").read_text())
    counts = [len(cell["seeds"]) for cell in record["cells"]]
    assert 1 <= sum(counts) < 8
    assert (
        f"{sum(counts)} of 8 runs are finished" in (tmp_path / "table4.md").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["table1", "table2", "table3", "table5", "figure1"])
def test_every_cell_runs_in_its_smoke_form(target, tmp_path, monkeypatch):
    command = ["reproduce", "--scale", "smoke", "--quiet", "--output", str(tmp_path)]
    only = []
    if target == "table3":
        # Of the ensembles those of Figure 2; test_collected has the ones that collect.
        only = ["--only", "SAM", "OT-MDR"]
        one = reproduce.SCALES["smoke"]._replace(seeds=(0,))
        monkeypatch.setitem(reproduce.SCALES, "smoke", one)
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
    pictures = list(tmp_path.glob("landscape-*.png"))
    assert len(pictures) == 3
    assert all(picture.stat().st_size > 5_000 for picture in pictures)
    folder = tmp_path / "runs" / "cifar10-five-resnet_10-SAM" / "0"
    assert np.shape(json.loads((folder / "landscape.json").read_text())["losses"]) == (
        3, 3,
    )  # fmt: skip


@pytest.mark.slow
def test_runs_of_another_plan_are_not_compared(reproduced, tmp_path, capsys):
    command, output = reproduced
    mine = shutil.copytree(output, tmp_path / "mine")
    folder = mine / "runs" / "cifar10-resnet_10-SGVB-posterior" / "1"
    words = [*command, str(mine), "--only", "OT-MDR"]

    def refused():
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2
        return capsys.readouterr().err

    cli.main(words)
    config = json.loads((folder / "config.json").read_text())
    capsys.readouterr()
    (folder / "config.json").write_text(json.dumps(config | {"epochs": 3}))
    assert "epochs: 3 -> 1" in refused()
    (folder / "config.json").write_text(json.dumps(config))
    data = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(data | {"test_fingerprint": "other"}))
    assert "saw different images of cifar10" in refused()


class TestLandscapes:
    """Figure 2, of landscapes that are made up."""

    @pytest.fixture
    def cells(self, monkeypatch):
        monkeypatch.setattr(run_folder, "is_finished", lambda _: True)
        monkeypatch.setattr(figures.surface, "check_comparison", lambda *_, **__: None)
        monkeypatch.setattr(figures.surface, "read", lambda folder: self.record())
        return reproduce.cells("figure2", "smoke", datasets=["cifar10"])

    def record(self, loss=1.0):
        axis = [-1.0, 0.0, 1.0]
        losses = [[loss * (1 + x * x + y * y) for y in axis] for x in axis]
        names = {"axis_names": ["x", "y"], "points": None, "labels": None}
        plan = {"kind": "random", "split": "test", "num_examples": 50}
        return {"axes": [axis, axis], "losses": losses, **names, **plan}

    @pytest.mark.parametrize(
        "other",
        [{"num_examples": 60}, {"split": "train"}, {"axes": [[0.0, 1.0]] * 2}, None],
    )
    def test_landscapes_of_another_plan_are_not_shown(self, other, cells, monkeypatch):
        """What stood there before an interrupted measurement came to it."""

        def read(folder):
            if other is None:
                raise ValueError("no landscape")
            return self.record() | other

        monkeypatch.setattr(figures.surface, "read", read)
        found = figures.landscapes(cells, "runs", "smoke")
        assert {one.missing for one in found} == {
            "the landscapes are not all measured yet."
        }

    def test_what_cannot_be_measured_is_said_and_the_others_are_shown(
        self, cells, monkeypatch
    ):
        seen = []

        def measure(folders, *args, **kwargs):
            seen.append(str(folders[0]))
            if "five" in seen[-1]:
                raise FileExistsError("a landscape of other settings")

        monkeypatch.setattr(figures.surface, "measure", measure)
        failed = figures.measure_landscapes(cells, "runs", "smoke")
        assert len(failed) == 1 and len(seen) == 5  # the first of three pairs ends
        found = figures.landscapes(cells, "runs", "smoke", failed)
        missing = {one.title: one.missing for one in found if one.missing}
        assert missing == failed and len(found) == 3
        for one in found:
            assert [name for name, _ in one.records] == (
                [] if one.missing else ["SAM", "OT-MDR"]
            )
        measured = [
            reproduce.Measured(cell, [], {}, None, ()) for cell in cells
        ]  # fmt: skip
        page = tables.page("figure2", "smoke", "paper", measured, "x", found)
        assert "Not shown: a landscape of other settings" in page.text
        assert len(page.pictures) == 2

    def test_an_interrupted_figure_shows_what_is_measured(self, cells, monkeypatch):
        monkeypatch.setattr(
            figures.surface,
            "read",
            lambda folder: None if "five" in str(folder) else self.record(),
        )
        found = figures.landscapes(cells, "runs", "smoke")
        assert [one.missing for one in found if one.missing] == [
            "the landscapes are not all measured yet."
        ]

    def test_losses_that_are_not_finite_give_no_picture(self, cells, monkeypatch):
        nan = self.record(float("nan"))
        monkeypatch.setattr(figures.surface, "read", lambda folder: nan)
        found = figures.landscapes(cells, "runs", "smoke")
        assert {one.missing for one in found} == {"no loss is finite."}

    def test_what_is_not_trained_is_said(self, cells, monkeypatch):
        monkeypatch.setattr(run_folder, "is_finished", lambda x: "SAM" in str(x))
        assert not figures.measure_landscapes(cells, "runs", "smoke")
        assert {one.missing for one in figures.landscapes(cells, "runs", "smoke")} == {
            "the first seed of OT-MDR is not finished."
        }


def test_data_that_are_not_prepared_are_said_before_anything_is_trained(
    cifar_dir, tmp_path, capsys
):
    command = ["reproduce", "table1", "--scale", "small", "--quiet", "--output"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, str(tmp_path), "--data-dir", str(cifar_dir)])
    assert stop.value.code == 2
    assert "cifar100" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["table1", "--scale", "smoke", "--datasets", "cifar100"], "no choice of data"),
        (["table5", "--datasets", "cifar100"], "no choice of data"),
        (["table1", "--scale", "smoke", "--data-dir", "."], "need no --data-dir"),
        (["table5", "--jobs", "2"], "leave out jobs"),
        (["table1", "--jobs", "0"], "positive integer, got 0"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, match, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *words])
    assert stop.value.code == 2 and match in capsys.readouterr().err


def test_unknown_methods_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "table1", "--only", "ASAM"])
    assert stop.value.code == 2
    assert "only must name methods of table1, SAM, OT-MDR" in capsys.readouterr().err
