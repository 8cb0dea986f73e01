"""Reports: read strictly, averaged as NumPy does, drawn as read, never overwriting."""

import io
import json
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest

from otmdr_jax import metrics
from otmdr_jax.experiments import cli, config, report
from otmdr_jax.experiments.report import drawing
from otmdr_jax.experiments.report.tables import Table
from tests.sets import at_most

CONFIG = {"method": "sam", "num_particles": 1, "seed": 0, "model": "mlp", "epochs": 2}


def predictions(seed, n=60, classes=4):
    """Of one test set, whatever the seed."""
    rng = np.random.default_rng(0)
    logits = 2.0 * rng.normal(size=(n, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # calibrated
    logits += 0.1 * np.random.default_rng(seed).normal(size=logits.shape)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_probs.astype(np.float32), labels.astype(np.int32)


def history(seed):
    lines = []
    for epoch in (1, 2):
        loss = 1.0 / (epoch + seed)
        at = {"step": 10 * epoch, "epoch": float(epoch)}
        lines.append({**at, "split": "train", "loss": loss, "gap": None})
        lines.append({**at, "split": "test", "accuracy": 0.5 + 0.1 * seed, "nll": loss})
    return lines


def make(label="SAM", seed=0, **changes):
    """A run in memory; `changes` go into its result."""
    log_probs, labels = predictions(seed)
    result = {"accuracy": 0.5, "nll": 1.0, **changes}
    config = {**CONFIG, "seed": seed}
    return report.Run(None, label, config, result, history(seed), log_probs, labels)


@pytest.fixture
def folder(tmp_path):
    """A whole run folder."""
    path = tmp_path / "run"
    path.mkdir()
    log_probs, labels = predictions(0)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "result.json").write_text(json.dumps({"accuracy": 0.5, "nll": None}))
    lines = "".join(json.dumps(line) + "\n" for line in history(0))
    (path / "metrics.jsonl").write_text(lines)
    np.savez(path / "predictions.npz", log_probs=log_probs, labels=labels)
    return path


def test_seeds_of_older_versions_are_averaged_with_todays(folder, tmp_path):
    """Older files hold the options of all methods, null where they have a default."""
    old = pathlib.Path(__file__).parent / "config_of_older_versions.json"
    options = {**json.loads(old.read_text()), "seed": 0}
    (folder / "config.json").write_text(json.dumps(options))
    other = shutil.copytree(folder, tmp_path / "other")
    config.save(
        config.load(folder / "config.json").replace(seed=1), other / "config.json"
    )
    runs = [report.read_run(path) for path in (folder, other)]
    assert [run.config["seed"] for run in runs] == [0, 1]
    (row,) = report.summarise(runs, report.known_columns(runs))
    assert row.label == runs[0].label == runs[1].label


# -- reading --


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"method": "sgd", "num_particles": 1, "optimizer": "sgd"}, "SGD"),
        ({"method": "sgd", "optimizer": "adamw"}, "AdamW"),
        ({"method": "sam", "num_particles": 1}, "SAM"),
        ({"method": "asam", "optimizer": "adam"}, "ASAM"),
        ({"method": "otmdr", "num_particles": 2}, "OT-MDR (K = 2)"),
        ({"method": "otmdr"}, "OT-MDR"),
        ({"method": "snapshot", "num_particles": 3}, "Snapshot"),
        ({"method": "mine", "num_particles": 3}, "mine"),
    ],
)
def test_label_of(config, label):
    assert report.label_of(config) == label


def test_label_of_needs_a_method():
    with pytest.raises(ValueError, match=r"config\['method'\], which is missing"):
        report.label_of({"seed": 0})


def test_reads_what_the_folder_holds(folder):
    run = report.read_run(str(folder))
    log_probs, labels = predictions(0)
    assert (run.folder, run.label, run.config) == (folder, "SAM", CONFIG)
    assert run.result == {"accuracy": 0.5, "nll": None}
    assert run.history == history(0)
    np.testing.assert_array_equal(run.log_probs, log_probs)
    np.testing.assert_array_equal(run.labels, labels)
    assert report.read_run(folder, label="mine").label == "mine"


def test_not_a_run_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder: there is no such"):
        report.read_run(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"not a run .* it lacks metrics.jsonl"):
        report.read_run(tmp_path)


@pytest.mark.parametrize("name", ["result.json", "predictions.npz"])
def test_unfinished_run(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"it lacks {name}") as error:
        report.read_run(folder)
    assert f"`otmdr evaluate {folder}`" in str(error.value)


@pytest.mark.parametrize("tail", ['{"step": 3, "epo', "{", '{"step": 3, "loss": -'])
def test_a_last_line_cut_off_is_dropped(folder, tail):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert report.read_run(folder).history == history(0)


def test_a_last_line_cut_off_within_a_letter_is_dropped(folder):
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write('{"note": "é'.encode()[:-1])
    assert report.read_run(folder).history == history(0)


def test_a_whole_last_line_without_its_newline_counts(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    assert report.read_run(folder).history == history(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 3, "epo', "Unterminated string"),
        ("", "Expecting value"),
        ("[1, 2]", "a JSON object must stand here, got list"),
        ('{"step": 1, "epoch": 0.5, "split": "train", "loss": NaN}', "NaN is not JSON"),
        ('{"step": 1, "loss": 0.5}', "the line has no epoch and no split"),
    ],
)
def test_any_other_broken_line_is_named(folder, line, message):
    path = folder / "metrics.jsonl"
    first, rest = path.read_text().split("\n", 1)
    for text, number in ((f"{first}\n{line}\n{rest}", 2), (f"{first}\n{line}\n", 2)):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            report.read_run(folder)
        assert f"{path}, line {number}: " in str(error.value)


def test_broken_json_files_are_named(folder):
    (folder / "result.json").write_text('{\n"nll": }')
    with pytest.raises(ValueError, match=r"result.json, line 2: Expecting value"):
        report.read_run(folder)
    (folder / "result.json").write_text('{"nll": Infinity}')
    with pytest.raises(ValueError, match=r"result.json: Infinity is not JSON"):
        report.read_run(folder)


def test_broken_predictions_are_named(folder):
    path = folder / "predictions.npz"
    np.savez(path, labels=np.zeros(3))
    with pytest.raises(ValueError, match=r"predictions.npz cannot be read"):
        report.read_run(folder)
    np.savez(path, log_probs=np.zeros((3, 2)), labels=np.zeros(4))
    with pytest.raises(ValueError, match=r"shapes \(3, 2\) and \(4,\)"):
        report.read_run(folder)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="predictions.npz cannot be read"):
        report.read_run(folder)


# -- tables --

NLL = {"SGD": [0.61, 0.55, 0.7], "SAM": [0.5, 0.42]}


def nll_runs():
    runs = [make("SGD", i, nll=x) for i, x in enumerate(NLL["SGD"])]
    # Interleaved: a label's place is that of its first run.
    others = [make("SAM", i, nll=x) for i, x in enumerate(NLL["SAM"])]
    return [runs[0], others[0], *runs[1:], others[1]]


def test_mean_std_and_n_are_numpys():
    rows = report.summarise(nll_runs(), ["nll"])
    assert [(row.label, row.n) for row in rows] == [("SGD", 3), ("SAM", 2)]
    for row in rows:
        values = np.array(NLL[row.label])
        cell = row.cells["nll"]
        mean = values.sum() / len(values)
        assert cell.mean == pytest.approx(mean, rel=1e-14)
        variance = ((values - mean) ** 2).sum() / (len(values) - 1)
        assert cell.std == pytest.approx(variance**0.5, rel=1e-12)
        assert cell.n == len(values)


def test_one_run_has_no_std():
    (row,) = report.summarise([make(nll=0.25)])
    assert row.cells["nll"][1:] == (0.25, None, 1)
    assert tuple(row.cells) == tuple(c.name for c in report.DEFAULT_COLUMNS)


@pytest.mark.parametrize("value", [None, "fast", True, float("nan"), float("inf")])
def test_what_is_no_number_is_unknown(value):
    runs = [make(ece=0.1), make(ece=0.3), make(ece=value)]
    (row,) = report.summarise(runs, ["ece", "brier"])
    assert row.cells["ece"].mean == pytest.approx(0.2)
    assert (row.n, row.cells["ece"].n) == (3, 2)
    assert row.cells["brier"][1:] == (None, None, 0)
    assert "| 0.2000 ± 0.1414 (2 of 3) | - |" in report.markdown_table([row])


def test_summarise_refuses_no_runs_and_unknown_columns():
    with pytest.raises(ValueError, match="at least one run"):
        report.summarise([])
    with pytest.raises(ValueError, match="one of 'accuracy', 'nll'; got 'speed'"):
        report.summarise([make()], ["speed"])
    with pytest.raises(ValueError, match="at least one row"):
        report.markdown_table([])


def test_markdown_table():
    runs = [
        make("A|B", 0, accuracy=0.95, nll=0.2, seconds_per_step=0.5),
        make("A|B", 1, accuracy=0.96, nll=0.4, seconds_per_step=0.7),
        make("SAM", 0, accuracy=0.9612, nll=0.3, seconds_per_step=0.2),
        make("ASAM", 0, accuracy=0.9, nll=0.35, seconds_per_step=0.25),
    ]
    rows = report.summarise(runs, ["accuracy", "nll", "seconds_per_step"])
    assert report.markdown_table(rows).split("\n") == [
        "| Method | Accuracy (%) ↑ | NLL ↓ | Time per step (ms) |",
        "| :-- | --: | --: | --: |",
        # The best means: highest accuracy, lowest NLL (a tie as shown), no best time.
        "| A\\|B, n = 2 | 95.50 ± 0.71 | **0.3000 ± 0.1414** | 600.0 ± 141.4 |",
        "| SAM, n = 1 | **96.12** | **0.3000** | 200.0 |",
        "| ASAM, n = 1 | 90.00 | 0.3500 | 250.0 |",
    ]


def test_no_best_where_all_are_alike():
    assert "**" not in report.markdown_table(report.summarise([make("A"), make("B")]))
    assert "**" not in report.markdown_table(report.summarise([make("A"), make("A")]))


def test_times_of_a_second_stay_seconds():
    runs = [make("A", seconds_per_step=0.5), make("B", seconds_per_step=1.25)]
    table = report.markdown_table(report.summarise(runs, ["seconds_per_step"]))
    assert "Time per step (s)" in table
    assert "| 0.50 |" in table and "| 1.25 |" in table


def test_no_minus_zero():
    table = report.markdown_table(report.summarise([make(nll=-1e-9)], ["nll"]))
    assert "| 0.0000 |" in table


def numbers(text):
    words = [word.strip("*") for word in text.split()]
    return [word for word in words if word.replace(".", "").isdigit()]


def test_rich_and_plain_print_the_numbers_of_the_markdown(capsys, monkeypatch):
    rows = report.summarise(nll_runs(), ["accuracy", "nll"])
    report.print_table(rows, title="[bold]results")
    with_rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.setitem(sys.modules, name, None)
    report.print_table(rows, title="[bold]results")
    plain = capsys.readouterr().out
    expected = ["3", "50.00", "0.00", "0.6200", "0.0755"]
    expected += ["2", "50.00", "0.00", "0.4600", "0.0566"]
    assert numbers(with_rich) == numbers(plain) == expected
    assert "[bold]results" in with_rich and "[bold]results" in plain
    lines = plain.splitlines()
    assert lines[3].startswith("| SGD | 3 |") and "*" not in lines[3]
    assert lines[4].endswith("| **0.4600 ± 0.0566** |")


def test_print_table_uses_the_console():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=60)
    report.print_table(report.summarise([make(nll=0.25)], ["nll"]), console)
    assert "0.2500" in console.file.getvalue()


def printed(table, width, title=""):
    """What a terminal of this width shows: [(headings, lines of cells)] of each table.

    A cell is the list of its lines. A line of numbers begins a line of the table.
    """
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None
    )
    table.print(title, console)
    shown, tables, rows = console.file.getvalue().splitlines(), [], []
    assert max(map(len, shown)) <= width
    for line in shown:
        if line[0] == "┏":
            tables.append(rows := [])
        elif line[0] in "┃│":
            rows.append((line[0], [x.strip() for x in line.strip("┃│").split(line[0])]))
    found = []
    for rows in tables:
        columns = zip(*(cells for kind, cells in rows if kind == "┃"), strict=True)
        heads, lines = [" ".join(filter(None, x)) for x in columns], []
        for cells in (cells for kind, cells in rows if kind == "│"):
            if any(cells[1:]) and (len(table.lines) > 1 or not lines):
                lines.append([[x] for x in cells])
            else:
                lines[-1] = [
                    old + [x] * bool(x) for old, x in zip(lines[-1], cells, strict=True)
                ]
        found.append((heads, lines))
    return found


@pytest.mark.parametrize("width", [40, 41, 53, 64, 79, 80, 81, 100, 130, 160, 200])
def test_a_terminal_of_any_width_shows_every_digit(width):
    header = ["Method", "n", "Accuracy (%) ↑", "NLL ↓", "ECE ↓", "Sharpness ↓"]
    labels = [
        "SGD",
        "OT-MDR (K = 2), epochs = 3, label_noise_of_the_training_set = 0.2",
    ]
    numbers = [
        ["2", "84.58 ± 19.45", "0.4365 ± 0.0183", "12345.6789", "-"],
        ["3", "**93.11 ± 1.05**", "0.4365", "-", "0.4365 ± 0.0183 (2 of 3)"],
    ]
    lines = [[label, *x] for label, x in zip(labels, numbers, strict=True)]
    found = printed(Table(header, lines), width, "a title " * 30)
    columns = {}
    for heads, rows in found:
        assert heads[0] == "Method" and len(heads) > 1
        for label, (folded, *_) in zip(labels, rows, strict=True):
            assert "".join(folded).replace(" ", "") == label.replace(" ", "")
        for i, head in enumerate(heads[1:], 1):
            assert head not in columns
            columns[head] = [row[i] for row in rows]
    # Each column once and in order, and each number whole in one line.
    assert list(columns) == header[1:]
    assert list(columns.values()) == [
        [[x.strip("*")] for x in column] for column in zip(*numbers, strict=True)
    ]
    assert len(found) == 1 or width < 160


def test_numbers_are_to_the_right_and_words_to_the_left():
    """What is not known, "-", is either."""
    lines = [["SAM", "not decided", "+0.2", "-"], ["SGD", "-", "-", "-"]]
    text = Table(["Method", "order", "gain", "paper"], lines).markdown()
    assert text.splitlines()[1] == "| :-- | :-- | --: | --: |"


def test_parts_of_a_table_repeat_all_that_names_a_line():
    rows = [
        ["ones", "100", score, "0.1234", "0.1234", "0.1234", "0.1234"]
        for score in ("confidence", "entropy")
    ]
    header = ["Set", "n", "Score", "AUROC", "AUPR", "FPR95", "FPR99"]
    found = printed(Table(header, rows), 40)
    assert len(found) > 1
    for heads, lines in found:
        assert heads[:2] == ["Set", "Score"]
        assert [row[1] for row in lines] == [["confidence"], ["entropy"]]
    assert [x for heads, _ in found for x in heads[2:]] == ["n", *header[3:]]


def test_names_are_folded_before_a_table_is_parted():
    folder = "sweep/" + "a-long-name/" * 6
    line = ["SAM", "1", folder, "finished"]
    ((heads, (cells,)),) = printed(
        Table(["Method", "Seed", "Folder", "State"], [line]), 80
    )
    assert heads == ["Method", "Folder", "State", "Seed"]
    assert ["".join(x) for x in cells] == ["SAM", folder, "finished", "1"]
    ((_, (cells,)),) = printed(Table(["Method", "State"], [["SAM" * 30, "x" * 70]]), 60)
    assert ["".join(x) for x in cells] == ["SAM" * 30, "x" * 70]


# -- plots --


def lines_of(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


def test_learning_curves_show_the_history():
    figure = report.learning_curves_figure([make(seed=0), make(seed=2), make("SGD", 1)])
    loss, accuracy, nll = figure.axes
    assert [ax.get_title() for ax in figure.axes] == [
        "Training loss (nats)",
        "Test accuracy (%)",
        "Test NLL (nats)",
    ]
    for ax, values in [
        (loss, [[1.0, 1 / 2], [1 / 3, 1 / 4]]),
        (nll, [[1.0, 1 / 2], [1 / 3, 1 / 4]]),
        (accuracy, [[50.0, 50.0], [70.0, 70.0]]),
    ]:
        assert ax.get_xlabel() == "Epoch"
        thin = lines_of(ax, "run:SAM")
        np.testing.assert_allclose([line.get_ydata() for line in thin], values)
        (mean,) = lines_of(ax, "mean:SAM")
        np.testing.assert_allclose(mean.get_xdata(), [1, 2])
        np.testing.assert_allclose(mean.get_ydata(), np.add(*values) / 2)
        assert {line.get_color() for line in [*thin, mean]} == {mean.get_color()}
        (single,) = lines_of(ax, "mean:SGD")
        assert not lines_of(ax, "run:SGD")
        assert single.get_color() != mean.get_color()
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == ["SAM, n = 2", "SGD"]


def test_the_mean_is_over_the_steps_that_all_runs_logged():
    short, long = make(seed=0), make(seed=2)
    short = short._replace(history=short.history[:2])
    loss = report.learning_curves_figure([short, long]).axes[0]
    (mean,) = lines_of(loss, "mean:SAM")
    np.testing.assert_allclose(mean.get_xydata(), [[1, (1 + 1 / 3) / 2]])
    assert mean.get_marker() == "o"  # a lone point shows


def test_a_step_logged_again_counts_once_and_null_leaves_a_gap():
    run = make()
    again = {"step": 20, "epoch": 2.0, "split": "train", "loss": 0.125}
    null = {"step": 30, "epoch": 3.0, "split": "train", "loss": None}
    run = run._replace(history=[*run.history, null, again])
    loss = report.learning_curves_figure([run]).axes[0]
    (mean,) = lines_of(loss, "mean:SAM")
    np.testing.assert_array_equal(mean.get_ydata(), [1.0, 0.125, np.nan])


def test_curves_of_the_split_that_was_evaluated_most():
    run = make()
    lines = [
        {**x, "split": x["split"].replace("test", "validation")} for x in history(0)
    ]
    run = run._replace(history=[*lines, history(0)[-1]])
    assert report.learning_curves_figure([run]).axes[1].get_title().startswith("Valid")


def test_wide_losses_get_a_logarithmic_axis_and_missing_ones_a_word():
    run = make()
    small = {"step": 30, "epoch": 3.0, "split": "train", "loss": 0.01}
    axes = report.learning_curves_figure([run._replace(history=[*run.history, small])])
    assert [ax.get_yscale() for ax in axes.axes] == ["log", "linear", "linear"]
    axes.canvas.draw()
    pieces = drawing.cut(axes, "curves", "curves").panels
    # Its numbers are formulas, 10^-2, which matplotlib sets in pieces of a text.
    powers = re.findall(
        r"<(?:\w+:)?tspan[^>]*>([^<]*)</", "".join(x.svg for x in pieces)
    )
    assert {"1", "0", "−", "2"} <= {text.strip() for text in powers}
    figure = report.learning_curves_figure([run._replace(history=[])])
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["not recorded"] * 3


def panel(figure, gid):
    (ax,) = [ax for ax in figure.axes if ax.get_gid() == gid]
    bars = {container.get_label(): container.patches for container in ax.containers}
    return ax, bars


def heights(patches):
    return np.array([patch.get_height() for patch in patches])


def test_reliability_pools_the_seeds():
    runs = [make(seed=0), make("SGD", 1), make(seed=2)]
    figure = report.reliability_figure(runs, num_bins=10)
    log_probs = np.concatenate([runs[0].log_probs, runs[2].log_probs])
    labels = np.concatenate([runs[0].labels, runs[2].labels])
    checked = metrics.check(log_probs, labels, log_probs=True)
    bins = metrics.reliability(checked, labels, 10)
    full = bins.counts > 0
    ax, bars = panel(figure, "reliability:SAM")
    np.testing.assert_allclose(heights(bars["Accuracy"]), bins.accuracy[full])
    marks = [segment[:, 1] for segment in ax.collections[0].get_segments()]
    np.testing.assert_allclose(marks, np.stack([bins.accuracy[full]] * 2, axis=1))
    lefts = [patch.get_x() for patch in bars["Accuracy"]]
    np.testing.assert_allclose(lefts, bins.edges[:-1][full], atol=1e-12)
    gap = bars["Gap to confidence"]
    ends = [patch.get_y() + patch.get_height() for patch in gap]
    np.testing.assert_allclose([p.get_y() for p in gap], bins.accuracy[full])
    np.testing.assert_allclose(ends, bins.confidence[full])
    ece = metrics.ece(checked, labels, 10)
    assert abs(ece - metrics.ece(checked, labels)) > 1e-3  # the bins matter
    assert ax.get_title() == f"SAM\nECE {ece:.4f}"
    below, bars = panel(figure, "histogram:SAM")
    np.testing.assert_allclose(heights(bars["Examples"]), 100 * bins.counts / 120)
    other, _ = panel(figure, "histogram:SGD")
    assert below.get_ylim() == other.get_ylim()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_one_panel_for_each_label(count):
    figure = report.reliability_figure([make(f"m{i}", i) for i in range(count)])
    gids = [ax.get_gid() for ax in figure.axes]
    assert sorted(gids) == sorted(
        f"{part}:m{i}" for i in range(count) for part in ("reliability", "histogram")
    )


def test_runs_without_numbers_are_left_out_of_reliability():
    broken = make(seed=1)._replace(log_probs=np.full((60, 4), np.nan, np.float32))
    ax, _ = panel(report.reliability_figure([make(), broken]), "reliability:SAM")
    log_probs, labels = predictions(0)
    ece = metrics.ece(np.exp(log_probs), labels)
    assert ax.get_title() == f"SAM\nECE {ece:.4f}, 1 of 2 runs"
    ax, _ = panel(report.reliability_figure([broken]), "reliability:SAM")
    assert ax.texts[0].get_text() == "no finite predictions"


def test_runs_of_one_label_must_share_their_classes():
    log_probs, labels = predictions(1, classes=3)
    other = make()._replace(log_probs=log_probs, labels=labels)
    with pytest.raises(ValueError, match="'SAM' predict different .* classes: 3, 4"):
        report.reliability_figure([make(), other])


@pytest.mark.slow
def test_pictures_are_1200_pixels_wide_and_reproducible(tmp_path):
    runs = [make("costs $1 and $2"), make("SAM")]
    for plot in (report.plot_learning_curves, report.plot_reliability):
        content = [plot(runs, tmp_path / f"{i}.png").read_bytes() for i in (1, 2)]
        assert content[0] == content[1]
        assert content[0][:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(content[0][16:20], "big") == 1200


def test_plots_leave_pyplot_alone_and_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    report.plot_learning_curves([make()], tmp_path / "curves.png")
    assert "matplotlib.pyplot" not in sys.modules
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (
        lambda: report.plot_learning_curves([make()], tmp_path / "x.png"),
        lambda: report.plot_reliability([make()], tmp_path / "x.png"),
        lambda: report.write(tmp_path / "report", [make()], "T"),
    ):
        with pytest.raises(ImportError, match=r"pip install '.\[train\]'"):
            call()
    assert not (tmp_path / "report").exists()


# -- the page --


def strict(path):
    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


FILES = {
    "report.md",
    "results.json",
    "configs.json",
    "learning_curves.png",
    "reliability.png",
}


@pytest.mark.slow
def test_write(tmp_path, folder):
    runs = [
        report.read_run(folder)._replace(result={"nll": 0.5, "device": "cpu"}),
        make("SAM", 1, nll=0.7, accuracy=float("nan"), device="cpu"),
        make("SGD", 0, nll=float("nan"), accuracy=0.25, device="gpu"),
    ]
    out = tmp_path / "new" / "report"
    page = report.write(out, runs, "Digits", command="otmdr demo")
    assert page == out / "report.md"
    assert {path.name for path in out.iterdir()} == FILES
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Digits\n")
    table = report.markdown_table(report.summarise(runs, ["accuracy", "nll"]))
    assert table in text  # columns that no run knows are left out
    assert "![Learning curves](learning_curves.png)" in text
    assert "![Reliability diagrams](reliability.png)" in text
    assert "- **Accuracy**: share of" in text and "**Sharpness**" not in text
    assert '| `model` | `"mlp"` |' in text  # shared by all
    assert "| `seed` | `0` |\n" not in text  # not by all
    assert "| method | run | options |" in text  # in one cell, which folds
    assert '| SAM | run | `device = "cpu"`, `seed = 0` |' in text
    assert '| SGD | - | `device = "gpu"`, `seed = 0` |' in text
    assert "otmdr_jax 0." in text and "```\notmdr demo\n```" in text
    (note,) = re.findall(r"\*\*Note:\*\* (.*)", text)
    assert note == (
        "runs were not made alike: the device is cpu in SAM; gpu in SGD. Times cannot "
        "be compared."
    )
    assert text.index("Note:") < text.index("Each cell is")  # beside the headline

    results = strict(out / "results.json")
    assert "otmdr_report" in results and results["title"] == "Digits"
    sam, sgd = results["rows"]
    assert (sam["label"], sam["n"]) == ("SAM", 2)
    assert sam["nll"] == pytest.approx({"mean": 0.6, "std": 0.02**0.5, "n": 2})
    assert sgd["nll"] == {"mean": None, "std": None, "n": 0}
    assert results["runs"][2] == {
        "label": "SGD",
        "folder": None,
        "result": {"accuracy": 0.25, "nll": None, "device": "gpu"},
    }
    configs = strict(out / "configs.json")
    assert [entry["config"] for entry in configs] == [run.config for run in runs]
    assert configs[0]["folder"] == "run"  # no path of this machine


@pytest.mark.slow
def test_write_replaces_an_earlier_report_and_keeps_other_files(tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    report.write(out, [make()], "First")  # an empty folder will do
    (out / "notes.txt").write_text("mine")
    report.write(out, [make()], "Second")
    assert (out / "report.md").read_text(encoding="utf-8").startswith("# Second")
    assert strict(out / "results.json")["title"] == "Second"
    assert (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in out.iterdir()} == FILES | {"notes.txt"}


@pytest.mark.slow
def test_a_report_that_finds_no_room_leaves_the_earlier_one(tmp_path):
    out, runs = tmp_path / "report", [make(), make("SGD")]
    report.write(tmp_path / "other", runs, "Second")
    largest = max(path.stat().st_size for path in (tmp_path / "other").iterdir())
    report.write(out, [make()], "First", whole=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with at_most(largest - 1), pytest.raises(OSError, match="File too large"):
        report.write(out, runs, "Second")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    report.write(out, runs, "Second")
    assert {path.name for path in out.iterdir()} == FILES  # and no report.html


@pytest.mark.parametrize("content", [None, "{}", "[]", "not JSON", '["otmdr_report"]'])
def test_write_refuses_what_is_no_report(tmp_path, content):
    (tmp_path / "report.md").write_text("mine")
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds no report .* name a new folder"):
        report.write(tmp_path, [make()], "T")
    with pytest.raises(FileExistsError, match="holds no report"):
        report.check_folder(tmp_path)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_write_refuses_a_file_and_a_run_folder(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        report.write(tmp_path / "file", [make()], "T")
    with pytest.raises(FileExistsError, match="holds no report"):
        report.write(folder, [make()], "T")


def test_write_refuses_no_runs_and_a_run_given_twice(tmp_path, folder):
    run = report.read_run(folder)
    same = report.read_run(folder / ".." / "run")
    with pytest.raises(ValueError, match="was given twice"):
        report.write(tmp_path / "out", [run, same], "T")
    with pytest.raises(ValueError, match="at least one run"):
        report.write(tmp_path / "out", [], "T")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_page_warns_of_averages_over_unlike_runs(tmp_path):
    other = make(seed=1)
    other.config.update(epochs=3, log_every=7)  # log_every changes no number
    text = report.write(tmp_path / "a", [make(), other], "T").read_text("utf-8")
    assert "**Note:** the runs of SAM differ in more than the seed: epochs." in text
    text = report.write(tmp_path / "b", [make(), make()], "T").read_text("utf-8")
    assert "**Note:** runs of SAM share a seed." in text


def test_with_distinct_labels_parts_what_is_not_alike():
    runs = [make(seed=0), make(seed=1), make(seed=0), make("SGD", 0), make("SGD", 1)]
    runs[2].config.update(epochs=3, model="cnn")
    runs[4].config.update(log_every=7)  # changes no number
    assert [run.label for run in report.with_distinct_labels(runs)] == [
        "SAM, model = mlp, epochs = 2",
        "SAM, model = mlp, epochs = 2",
        "SAM, model = cnn, epochs = 3",
        "SGD",
        "SGD",
    ]
    assert report.with_distinct_labels([]) == []


def described(name="digits", sampled="0a1b2c3d", whole="p00000001", train=1437):
    return {
        "name": name, "train": train, "test": 60,
        "fingerprint": f"{name}-{train}-{sampled}-{whole}",
    }  # fmt: skip


def test_runs_on_several_data_are_no_seeds_of_one_method():
    first, second = make(seed=0), make(seed=1)

    def labels(one, other):
        runs = [first._replace(data=one), second._replace(data=other)]
        return [run.label for run in report.with_distinct_labels(runs)]

    one = described()
    assert labels(one, one) == labels(one, None) == ["SAM", "SAM"]
    # The same images under another name, or left in their files.
    assert labels(one, described(name="copy")) == ["SAM", "SAM"]
    assert labels(one, described(whole="r00000002")) == ["SAM", "SAM"]
    text = "SAM, data digits ({} for training, 60 to test, {})"
    assert labels(one, described(train=9)) == [
        text.format(1437, "0a1b2c3d-p00000001"), text.format(9, "0a1b2c3d-p00000001"),
    ]  # fmt: skip
    assert len(set(labels(one, described(sampled="ffffffff")))) == 2
    assert len(set(labels(one, described(whole="p00000002")))) == 2
    # Older runs say nothing of their data; other test labels part them.
    fewer = second._replace(labels=second.labels[:50])
    found = [run.label for run in report.with_distinct_labels([first, fewer])]
    assert len(set(found)) == 2 and all("test examples" in label for label in found)
    # Data that an option tells apart are named by the option.
    runs = [first._replace(data=one), second._replace(data=described(sampled="ff"))]
    runs[1].config["label_noise"] = 0.2
    assert [x.label for x in report.with_distinct_labels(runs)] == [
        "SAM, label_noise = -", "SAM, label_noise = 0.2",
    ]  # fmt: skip


def test_data_are_told_apart_within_what_options_tell_apart():
    whole = ["p00000001", "p00000002", "p00000001"]
    runs = [make(seed=i)._replace(data=described(whole=w)) for i, w in enumerate(whole)]
    for run, noise in zip(runs, (0.0, 0.0, 0.2), strict=True):
        run.config["label_noise"] = noise
    labels = [run.label for run in report.with_distinct_labels(runs)]
    assert len(set(labels)) == 3
    assert labels[2] == "SAM, label_noise = 0.2" and "p00000002" in labels[1]


def test_one_set_of_data_by_two_names_is_one():
    runs = [make(seed=seed)._replace(data=described()) for seed in range(2)]
    for run, name in zip(runs, ("/x/a.npz", "/y/b.npz"), strict=True):
        run.config["data"] = name
    assert [run.label for run in report.with_distinct_labels(runs)] == ["SAM", "SAM"]
    assert not report.cautions([runs[0], runs[1]._replace(label="SGD")])


def test_an_unfinished_run_is_no_seed_of_the_finished_ones():
    done, stopped = make(seed=0, finished=True), make(seed=1, checkpoint="latest")
    stopped.result["steps"] = 29
    runs = report.with_distinct_labels([done, stopped])
    assert [run.label for run in runs] == ["SAM", "SAM, unfinished at step 29"]
    assert [row.n for row in report.summarise(runs, ["nll"])] == [1, 1]


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"epochs": 3}, "epochs is 2 in SAM; 3 in SGD"),
        # The options hold a number of epochs, which steps take the place of.
        ({"epochs": 40, "steps": 9}, "epochs is 2 in SAM; left to steps in SGD. steps"),
        ({"label_noise": 0.2}, "label_noise is - in SAM; 0.2 in SGD"),
        ({"optimizer": "adam"}, 'optimizer is - in SAM; "adam" in SGD'),
        ({"member_data": "own"}, 'member_data is - in SAM; "own" in SGD'),
        ({"validation": 0.1}, "validation is - in SAM; 0.1 in SGD"),
        ({"rho": [0.1], "log_every": 3, "seed": 4}, None),
    ],
)
def test_methods_that_differ_in_more_than_themselves_are_noted(options, note):
    one, other = make("SAM"), make("SGD")
    other.config.update(options)
    found = report.cautions([one, other])
    if note is None:
        assert not found
        return
    assert len(found) == 1
    assert found[0].startswith(f"methods differ in more than themselves: {note}")


def test_the_odd_one_out_is_named_and_the_others_together():
    runs = [make(x) for x in ("SGD", "SAM", "ASAM", "GSAM")]
    runs[1].config["epochs"] = 3
    (note,) = report.cautions(runs)
    assert note.endswith(": epochs is 3 in SAM; 2 in the others.")
    runs[3].config["epochs"] = 3
    (note,) = report.cautions(runs)
    assert note.endswith(": epochs is 3 in SAM and GSAM; 2 in the others.")
    # Of a method with both values "the others" would be unclear.
    runs.append(make("SGD", 1))
    runs[-1].config["epochs"] = 3
    notes = report.cautions(runs)
    assert "epochs is 2 in SGD and ASAM; 3 in SGD and SAM and GSAM." in notes[0]


def test_devices_and_versions_that_differ_are_noted_also_among_seeds():
    made = {"device": "cpu x 1", "mesh": "one device", "jax": "0.10.2"}
    one, other = make("SAM", 0, **made), make("SAM", 1, **made)
    assert not report.cautions([one, other])
    assert not report.cautions([one, make("SAM", 1)])  # an older run does not say
    other.result["jax"] = "0.12.0"
    (note,) = report.cautions([one, other])
    assert note == "runs were not made alike: JAX is 0.10.2 in SAM; 0.12.0 in SAM."
    other.result["mesh"] = "data=4"
    (note,) = report.cautions([one, other])
    assert "the mesh is one device in SAM; data=4 in SAM. JAX is" in note
    assert note.endswith(" Times cannot be compared.")


def test_methods_on_other_test_sets_are_noted():
    one, other = make("SAM"), make("SGD")
    other = other._replace(labels=other.labels[::-1].copy())
    for option in ({}, {"label_noise": 0.2}, {"data": "arrays:mine"}):
        other.config.update(option)
        (note,) = report.cautions([one, other])
        assert "the data are of 60 test examples" in note and "in SGD" in note


def test_a_run_that_is_given_twice_is_refused_before_anything_is_shown(
    folder, tmp_path, capsys
):
    twice = [str(folder), str(folder), "--output", str(tmp_path / "out")]
    for command in ("compare", "report"):
        with pytest.raises(SystemExit):
            cli.main([command, *twice])
        out, err = capsys.readouterr()
        assert not out and "was given twice" in err
