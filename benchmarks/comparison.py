r"""The tables of docs/comparison.md: where OT-MDR's gain comes from.

    python benchmarks/comparison.py examples/sweep_fair.toml --output sweeps/fair \
        --jobs 2 --json benchmarks/results/comparison.json \
        --picture docs/comparison/differences.png      # two cores, an hour and a half
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
from scipy import stats

from otmdr_jax.experiments import restore, sweep
from otmdr_jax.experiments.measure import shift
from otmdr_jax.experiments.measure.calibrate import calibrate
from otmdr_jax.experiments.report import cost, plots

# name: (title, factor, decimals, whether more is better)
MEASURES = {
    "accuracy": ("accuracy, %", 100, 2, True),
    "nll": ("NLL", 1, 3, False),
    "ece": ("ECE", 1, 3, False),
    "calibrated_nll": ("NLL, calibrated", 1, 3, False),
    "calibrated_ece": ("ECE, calibrated", 1, 3, False),
    "shifted_accuracy": ("corrupted accuracy, %", 100, 2, True),
    "shifted_nll": ("corrupted NLL", 1, 3, False),
    "sharpness": ("sharpness", 1, 3, False),
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
    """The numbers of a run that its own result does not have."""
    run = restore.open_run(folder, split="test")
    programs.setdefault("same network", run.programs)
    found = shift.evaluate(
        run.config, run.state, run.dataset, programs["same network"], **SHIFT
    )
    at_temperature = calibrate(folder, ["temperature"], show_progress=False)
    calibrated = at_temperature["methods"][0]["metrics"]
    corrupted = found["corruptions"]
    return row | {
        "calibrated_nll": calibrated["nll"]["calibrated"],
        "calibrated_ece": calibrated["ece"]["calibrated"],
        "shifted_accuracy": float(np.mean([x["accuracy"] for x in corrupted])),
        "shifted_nll": float(np.mean([x["nll"] for x in corrupted])),
    }


def values_of(rows, method, name):
    """{seed: value} of the runs of a method that finished."""
    return {
        row["seed"]: row[name]
        for row in rows
        if row["method"] == method and row["status"] == "finished"
    }


def difference(rows, method, other, name):
    """(mean, half of the 95 % interval, p) over the seeds that both have."""
    ours, theirs = (values_of(rows, one, name) for one in (method, other))
    gaps = np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    error = stats.sem(gaps)
    half = stats.t.ppf(0.975, len(gaps) - 1) * error
    return gaps.mean(), half, stats.ttest_1samp(gaps, 0.0).pvalue


def means_table(rows):
    header = ["method", "setting", "n", "gradients"]
    header += [title for title, *_ in MEASURES.values()]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        done = [
            row
            for row in rows
            if row["method"] == method and row["status"] == "finished"
        ]
        label = done[0]["label"] if done else method
        setting = label.removeprefix(method).removeprefix(", ") or "-"
        gradients = f"{done[0]['gradient_evaluations']:,.0f}" if done else "-"
        cells = []
        for name, (_, factor, digits, _) in MEASURES.items():
            values = factor * np.array([row[name] for row in done])
            cells.append(
                f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
            )
        lines.append([method, setting, len(done), gradients, *cells])
    return markdown(header, lines)


def asked(rows):
    """The questions whose two methods have runs."""
    known = {row["method"] for row in rows}
    return [one for one in QUESTIONS if {one[1], one[2]} <= known]


def questions_table(rows, names=("accuracy", "calibrated_nll", "shifted_accuracy")):
    """A line for each question: differences with 95 % intervals, p and q."""
    header = ["question", "method minus other"]
    for name in names:
        title, *_ = MEASURES[name]
        header += [f"Δ {title}", "p", "q"]
    columns = []
    for name in names:
        found = [difference(rows, ours, other, name) for _, ours, other in asked(rows)]
        columns.append((name, found, cost.q_values([p for *_, p in found])))
    lines = []
    for i, (question, ours, other) in enumerate(asked(rows)):
        line = [question, f"{ours} - {other}"]
        for name, found, adjusted in columns:
            _, factor, digits, _ = MEASURES[name]
            mean, half, p = found[i]
            line += [
                f"{factor * mean:+.{digits}f} ± {factor * half:.{digits}f}",
                f"{p:.3f}",
                f"{adjusted[i]:.3f}",
            ]
        lines.append(line)
    return markdown(header, lines)


def tuning_table(found, chosen):
    lines = [
        [label, f"{value:.4f}", "chosen" if label in chosen else ""]
        for label, value in found.items()
    ]
    return markdown(["setting", "validation NLL", ""], lines)


def figure(rows):
    """The differences of the questions in accuracy, with their 95 % intervals."""
    import matplotlib.pyplot as plt

    questions = asked(rows)
    drawn, axes = plt.subplots(figsize=(8.5, 0.36 * len(questions) + 0.9))
    for i, (_, ours, other) in enumerate(reversed(questions)):
        mean, half, _ = difference(rows, ours, other, "accuracy")
        sure = abs(mean) > half
        axes.errorbar(
            100 * mean, i, xerr=100 * half, fmt="o", capsize=3,
            color="#1f6fb4" if sure else "#999999",
        )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(questions)),
        [f"{ours} - {other}" for _, ours, other in reversed(questions)],
    )
    axes.set_xlabel("difference in test accuracy, points")
    axes.grid(axis="x", alpha=0.3)
    drawn.tight_layout()
    return drawn


def trained(options):
    """Trains, measures and records."""
    text = pathlib.Path(options.file).read_text()
    if options.smoke:
        for pattern, replacement in SMOKE.items():
            text = re.sub(pattern, replacement, text)
        shared, *methods = text.split("[methods.")
        few = ('"SGD"', '"SAM"', '"OT-MDR"')
        text = "[methods.".join([shared, *(m for m in methods if m.startswith(few))])
    with tempfile.TemporaryDirectory() as scratch:
        output = pathlib.Path(options.output or scratch)
        file = pathlib.Path(scratch) / "sweep.toml"
        file.write_text(text)
        plan = sweep.plan(file, output)
        how = {"jobs": options.jobs, "show_progress": not options.smoke}
        tuned = sweep.tune(plan, output / "tuning.json", **how)
        rows = sweep.run(tuned.runs, output / "sweep.json", measure_memory=False, **how)
        methods = {one.label: one.method for one in tuned.chosen}
        record = {**environment(), "sweep": text, "tuning": tuned.scores, "rows": []}
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


def main():
    parser = options_of(__doc__, "three methods on digits, two steps, two seeds")
    parser.add_argument("file", nargs="?", help="the sweep, with a table [tuning]")
    parser.add_argument("--output", help="folder of the runs; default: a temporary one")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--read", help="a record, whose tables are printed")
    parser.add_argument("--picture", help="also draw the differences into this file")
    options = parser.parse_args()
    if (options.file is None) == (options.read is None):
        parser.error("name a sweep's file, or a record to --read")
    record = (
        trained(options)
        if options.read is None
        else json.loads(pathlib.Path(options.read).read_text())
    )
    rows = record["rows"]
    chosen = {row["label"] for row in rows}
    print(tuning_table(record["tuning"], chosen))
    print()
    print(means_table(rows))
    print()
    print(questions_table(rows))
    if options.picture:
        plots.save(figure(rows), options.picture)


if __name__ == "__main__":
    main()
