r"""The tables of docs/baselines.md: methods x seeds from a file of examples/.

    python benchmarks/sweeps.py examples/sweep_digits.toml --output sweeps/digits \
        --json benchmarks/results/sweep_digits.json --picture docs/baselines/digits.png
    python benchmarks/sweeps.py examples/sweep_cifar10.toml --output sweeps/cifar10 \
        --json benchmarks/results/sweep_cifar10.json       # an accelerator, many hours
    python benchmarks/sweeps.py examples/sweep_digits.toml --smoke

Runs the file as `otmdr sweep` does (what OUTPUT holds is not run again) and keeps the
numbers of each run. Means over seeds; p-values are those of the paired t-test against
SGD over seeds.
"""

import pathlib
import re
import tempfile

import numpy as np
from _common import environment
from _record import markdown, options_of, write_json

from otmdr_jax.experiments import sweep
from otmdr_jax.experiments.report import cost, plots

NAMES = {
    "accuracy": ("accuracy, %", 100, 2),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE", 1, 4),
}
KEPT = (
    "label", "seed", "status", "accuracy", "nll", "ece", "brier", "sharpness",
    "gradient_evaluations", "seconds", "memory_mib",
)  # fmt: skip


def table(rows):
    """A line for each method: means ± standard deviations, and what they cost."""
    header = ["method", "n", *(title for title, *_ in NAMES.values())]
    header += ["Δ accuracy to SGD", "gradients", "memory, MiB"]
    groups = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    lines = []
    for label, group in groups.items():
        done = [row for row in group if row["accuracy"] is not None]
        cells = []
        for name, (_, scale, digits) in NAMES.items():
            values = scale * np.array([row[name] for row in done])
            cells.append(
                f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
            )
        found = cost.paired_difference(group, groups["SGD"], "accuracy")
        if label == "SGD" or found is None:
            cells.append("-")
        else:
            gap, p, _ = found
            value = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
            cells.append(f"{100 * gap:+.2f} ({value})")
        for name, digits in (("gradient_evaluations", 0), ("memory_mib", 1)):
            cells.append(f"{np.mean([row[name] for row in done]):,.{digits}f}")
        lines.append([label, len(done), *cells])
    return markdown(header, lines)


def main():
    parser = options_of(__doc__, "three steps, two seeds")
    parser.add_argument("file", help="the sweep, such as examples/sweep_digits.toml")
    parser.add_argument("--output", help="folder of the runs; default: a temporary one")
    parser.add_argument("--picture", help="also draw accuracy against cost")
    options = parser.parse_args()
    text = pathlib.Path(options.file).read_text()
    with tempfile.TemporaryDirectory() as scratch:
        output = pathlib.Path(options.output or scratch)
        if options.smoke:
            text = re.sub(r"(?m)^seeds = .*", "seeds = [0, 1]", text)
            text = re.sub(r"(?m)^epochs = .*", "steps = 3", text)
            text = re.sub(r"(?m)^rho = .*", "rho = [[0.05], [0.1]]", text)
            text = "\n[methods".join(text.split("\n[methods")[:3])
        file = pathlib.Path(scratch) / "sweep.toml"
        file.write_text(text)
        plan = sweep.plan(file, output)
        rows = sweep.run(plan.runs, output / "sweep.json")
    rows = [{name: row.get(name) for name in KEPT} for row in rows]
    write_json(options.json, {**environment(), "sweep": text, "results": rows})
    print(table(rows))
    if options.picture:
        plots.save(cost.figure(rows), options.picture)


if __name__ == "__main__":
    main()
