r"""The tables of docs/comparison.md: where OT-MDR's gain comes from.

    python benchmarks/comparison.py examples/sweep_fair.toml --output sweeps/fair \
        --jobs 2 --json benchmarks/results/comparison.json \
        --pictures docs/comparison       # two cores, an hour and a half
    python benchmarks/comparison.py examples/sweep_fair.toml --smoke
    python benchmarks/comparison.py --read benchmarks/results/comparison.json

Trains the file as `otmdr sweep` does (what OUTPUT holds is not trained again), measures
each run at its optimal temperature and on corrupted images, and answers the page's
questions by paired tests over seeds. --read prints the tables of a record, and draws.
"""

import json
import pathlib
import re
import tempfile

import numpy as np
from _common import environment
from _record import markdown, options_of, write_json

from otmdr_jax.experiments import restore, sweep
from otmdr_jax.experiments.measure import shift
from otmdr_jax.experiments.measure.calibrate import calibrate
from otmdr_jax.experiments.report import cost, plots

# name: (title, factor, decimals)
MEASURES = {
    "accuracy": ("accuracy, %", 100, 2),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE", 1, 3),
    "calibrated_nll": ("NLL, calibrated", 1, 3),
    "calibrated_ece": ("ECE, calibrated", 1, 3),
    "shifted_accuracy": ("corrupted accuracy, %", 100, 2),
    "shifted_nll": ("corrupted NLL", 1, 3),
    "sharpness": ("sharpness", 1, 3),
    "train_nll": ("training NLL", 1, 2),
}
KEPT = (
    "method", "label", "seed", "status", "gradient_evaluations", "seconds", *MEASURES,
)  # fmt: skip
# (the question, the method, what it is compared with)
QUESTIONS = (
    ("Does SAM gain anything here?", "SAM", "SGD"),
    ("Does OT-MDR?", "OT-MDR", "SGD"),
    ("The paper's comparison: its radii against SAM at rho1",
     "OT-MDR at the paper's radii", "SAM at rho1"),
    ("The same against SAM at rho2", "OT-MDR at the paper's radii", "SAM at rho2"),
    ("The same against SAM at the same distance",
     "OT-MDR at the paper's radii", "SAM at rho1 + rho2"),
    ("The longer path: SAM at rho1 + rho2 against SAM at rho1",
     "SAM at rho1 + rho2", "SAM at rho1"),
    ("Both at their best radius", "OT-MDR", "SAM"),
    ("Two steps: against SAM's one", "SAM, two steps", "SAM"),
    ("Halves of the batch: against two steps on all of it", "OT-MDR", "SAM, two steps"),
    ("The released merge: against the paper's steps", "OT-MDR, released", "OT-MDR"),
    ("A second particle", "OT-MDR, K = 2", "OT-MDR"),
    ("Projection to the ball", "OT-MDR, projected", "OT-MDR"),
    ("The paper's noise", "OT-MDR, noise 0.01", "OT-MDR"),
    ("Draws of the exact distribution: against SAM",
     "Exact distribution, tilt 0.5", "SAM"),
    ("Random weights: against SGD", "Random weights", "SGD"),
    ("The dual form: against SAM", "Dual form", "SAM"),
)  # fmt: skip
SHIFT = {"severities": (1, 3, 5), "max_examples": 2000, "other_sets": (), "ood": ()}
SMOKE = {
    r"(?m)^seeds = \[0.*": "seeds = [0, 1]",
    r"(?m)^(data|train_examples|input_size|augment) = .*\n": "",
    r"(?m)^validation = .*": "validation = 0.1",
    r"(?m)^epochs = .*": "steps = 2",
    r'(?m)^model = "resnet_10"\nwidth = .*': 'model = "cnn_small"',
    r"(?m)^rho = \[\[.*": "rho = [[0.05], [0.1]]",
}


def measured(row, folder, programs):
    """Adds what a run's own result does not have; a run that predicts NaN diverged."""
    run = restore.open_run(folder, split="test")
    # One program evaluates all runs of one network on the same data.
    network = (run.config.model, run.config.data, run.config.run.eval_batch_size)
    compiled = programs.setdefault(network, run.programs)
    try:
        at_temperature = calibrate(folder, ["temperature"], show_progress=False)
    except ValueError as error:
        print(error)
        return row | {"status": "diverged"}
    calibrated = at_temperature["methods"][0].get("metrics", {})
    found = shift.evaluate(run.config, run.state, run.dataset, compiled, **SHIFT)
    return row | {
        **{
            f"calibrated_{name}": calibrated[name]["calibrated"]
            for name in ("nll", "ece")
            if calibrated
        },
        **{
            f"shifted_{name}": float(np.mean([x[name] for x in found["corruptions"]]))
            for name in ("accuracy", "nll")
        },
    }


def values_of(rows, method, name):
    """{seed: value} of the runs of a method that finished."""
    return {
        row["seed"]: row[name]
        for row in rows
        if row["method"] == method and row["status"] == "finished"
    }


def difference(rows, method, other, name):
    """The :class:`cost.Paired` difference of two methods."""
    return cost.paired(*(values_of(rows, one, name) for one in (method, other)))


def text_of(rows, method, other, name):
    """A difference in words: +3.15 ± 0.59, the half of its 95 % interval."""
    _, factor, digits = MEASURES[name]
    found = difference(rows, method, other, name)
    half = (found.interval[1] - found.interval[0]) / 2
    return f"{factor * found.mean:+.{digits}f} ± {factor * half:.{digits}f}"


def means_table(rows):
    header = ["method", "setting", "n", "gradients"]
    header += [title for title, *_ in MEASURES.values()]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        first = next(row for row in rows if row["method"] == method)
        setting = first["label"].removeprefix(method).removeprefix(", ") or "-"
        cells = []
        for name, (_, factor, digits) in MEASURES.items():
            values = [
                x for x in values_of(rows, method, name).values() if x is not None
            ]
            text = "-"
            if len(values) > 1:
                mean, deviation = np.mean(values), np.std(values, ddof=1)
                text = f"{factor * mean:.{digits}f} ± {factor * deviation:.{digits}f}"
            cells.append(text)
        gradients = first["gradient_evaluations"]
        cells.insert(0, "-" if gradients is None else f"{gradients:,.0f}")
        lines.append([method, setting, len(values), *cells])
    return markdown(header, lines)


def asked(rows):
    """The questions whose two methods have runs."""
    known = {row["method"] for row in rows}
    return [one for one in QUESTIONS if {one[1], one[2]} <= known]


def questions_table(rows, names=("accuracy", "calibrated_nll", "shifted_accuracy")):
    """A line for each question: differences with 95 % intervals, p and q."""
    header = ["question", "method minus other"]
    for name in names:
        header += [f"Δ {MEASURES[name][0]}", "p", "q"]
    found = [
        [difference(rows, ours, other, name) for name in names]
        for _, ours, other in asked(rows)
    ]
    corrected = iter(cost.q_values([one.p for line in found for one in line]))
    lines = []
    for (question, ours, other), line in zip(asked(rows), found, strict=True):
        cells = []
        for name, one in zip(names, line, strict=True):
            cells += [
                text_of(rows, ours, other, name),
                f"{one.p:.3f}",
                f"{next(corrected):.3f}",
            ]
        lines.append([question, f"{ours} - {other}", *cells])
    return markdown(header, lines)


def tuning_table(record):
    """The validation scores of each method, by the distance of its radii."""
    chosen = {row["label"] for row in record["rows"]}
    lines = {}
    for setting in record["tuning"]:
        mark = "**" if setting["label"] in chosen else ""
        text = "-" if setting["score"] is None else f"{setting['score']:.3f}"
        end = " (an end)" if mark and setting["ends"] else ""
        lines.setdefault(setting["method"], []).append(f"{mark}{text}{mark}{end}")
    distances = [
        x["distance"] for x in record["tuning"][: len(next(iter(lines.values())))]
    ]
    header = [f"validation {record['metric']} at"] + [f"{x:g}" for x in distances]
    return markdown(header, [[name, *cells] for name, cells in lines.items()])


def differences_figure(rows):
    """The questions' differences in accuracy, with their 95 % intervals."""
    questions = asked(rows)
    picture = plots.new_figure(7.5, 0.36 * len(questions) + 0.8)
    axes = picture.subplots()
    for i, (_, ours, other) in enumerate(reversed(questions)):
        found = difference(rows, ours, other, "accuracy")
        half = (found.interval[1] - found.interval[0]) / 2
        colour = plots.COLOURS[0] if abs(found.mean) > half else "#999999"
        axes.errorbar(
            100 * found.mean, i, xerr=100 * half, fmt="o", capsize=3, color=colour
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(questions)),
        [f"{ours} - {other}" for _, ours, other in reversed(questions)],
    )
    plots.dress(axes, x="difference in test accuracy, points")
    return picture


def radii_figure(record):
    """The validation score of each method against the distance of its radii."""
    methods = list(dict.fromkeys(x["method"] for x in record["tuning"]))
    picture = plots.new_figure(7.5, 4.2)
    axes = picture.subplots()
    for method, style in zip(methods, plots.line_styles(methods), strict=True):
        those = [x for x in record["tuning"] if x["method"] == method]
        axes.plot(
            [x["distance"] for x in those],
            [np.nan if x["score"] is None else x["score"] for x in those],
            marker="o", markersize=3.5, linewidth=1.5, label=method, **style,
        )  # fmt: skip
    plots.dress(
        axes, x="rho, or rho1 + rho2", y=f"validation {record['metric'].upper()}"
    )
    axes.set_xscale("log")
    ticks = sorted({x["distance"] for x in record["tuning"]})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.legend(
        fontsize=plots.SMALL,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
    )
    return picture


def trained(options):
    """Trains, measures and records."""
    text = pathlib.Path(options.file).read_text()
    if options.smoke:
        for pattern, replacement in SMOKE.items():
            text, count = re.subn(pattern, replacement, text)
            assert count, f"{options.file} has no {pattern}"
        shared, *methods = text.split("[methods.")
        few = ('"SGD"', '"SAM"', '"OT-MDR"')
        text = "[methods.".join([shared, *(m for m in methods if m.startswith(few))])
    with tempfile.TemporaryDirectory() as scratch:
        output = pathlib.Path(options.output or scratch)
        file = pathlib.Path(scratch) / "sweep.toml"
        place = ""
        if options.data_dir is not None:
            place = f"\ndata_dir = {json.dumps(options.data_dir)}"
        file.write_text(text.replace("[options]", f"[options]{place}"))
        plan = sweep.plan(file, output)
        how = {"jobs": options.jobs, "show_progress": not options.smoke}
        tuned = sweep.tune(plan, output / "tuning.json", **how)
        rows = sweep.run(tuned.runs, output / "sweep.json", measure_memory=False, **how)
        record = {
            **environment(),
            "sweep": text,
            "metric": plan.tuning.metric,
            "tuning": list(scores(plan, tuned)),
            "rows": [],
        }
        methods = {one.label: one.method for one in tuned.chosen}
        programs = {}
        for i, row in enumerate(rows):
            row = row | {"method": methods[row["label"]]}
            if row["status"] == "finished":
                row = measured(row, row["folder"], programs)
            record["rows"].append({name: row.get(name) for name in KEPT})
            write_json(options.json, record)
            if not options.smoke:
                print(f"measured {i + 1} of {len(rows)}", flush=True)
    return record


def scores(plan, tuned):
    """What is kept of each setting that was tried."""
    configs = {one.label: one.config for one in plan.tuning.runs}
    for setting in plan.settings:
        if setting.label in configs:
            score = tuned.scores[setting.label]
            yield {
                "method": setting.method,
                "label": setting.label,
                "distance": sum(configs[setting.label].method.rho),
                "score": None if np.isnan(score) else score,
                "ends": list(setting.ends),
            }


def main():
    parser = options_of(__doc__, "three methods on digits, two steps, two seeds")
    parser.add_argument("file", nargs="?", help="the sweep, with a table [tuning]")
    parser.add_argument("--output", help="folder of the runs")
    parser.add_argument("--data-dir", help="folder of prepared TFDS data")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--read", help="a record, whose tables are printed")
    parser.add_argument("--pictures", help="also draw into this folder")
    options = parser.parse_args()
    if (options.file is None) == (options.read is None):
        parser.error("name a sweep's file, or a record to --read")
    if options.read is not None and (options.json or options.output or options.smoke):
        parser.error("--read trains nothing: it goes with --pictures alone")
    if options.file is not None and options.output is None and not options.smoke:
        parser.error("name the folder of the runs, --output: they take long")
    record = (
        trained(options)
        if options.read is None
        else json.loads(pathlib.Path(options.read).read_text())
    )
    rows = record["rows"]
    print(tuning_table(record), means_table(rows), questions_table(rows), sep="\n\n")
    if options.pictures:
        folder = pathlib.Path(options.pictures)
        plots.save(differences_figure(rows), folder / "differences.png")
        plots.save(radii_figure(record), folder / "radii.png")


if __name__ == "__main__":
    main()
