"""SGVB against OT-MDR-BNN on digits with 20 % wrong training labels.

    python benchmarks/bnn_digits.py --json bnn_digits.json    # five seeds, 15 minutes
    python benchmarks/bnn_digits.py --smoke                   # one run of one epoch

Each row is a method at a weight of the divergence: 1, the evidence bound, and 0.1, a
cold posterior. Model, epochs, optimizer, schedule, prior and samples are the same for
all; OT-MDR-BNN has the paper's radii (0.005, 0.01), and ten times these.
"""

import pathlib
import tempfile

from _common import environment
from _record import markdown, options_of, write_json

from otmdr_jax.experiments import report, training
from otmdr_jax.experiments.config import TrainConfig

BASE = TrainConfig(
    method="otmdr-bnn",
    label_noise=0.2,
    epochs=28,
    eval_every=28,
    optimizer="adam",
    learning_rate=0.03,
    weight_decay=0.0,
    posterior_std=0.02,
    mesh="data=1",
)
METHODS = {
    "SGVB": {"method": "sgvb"},
    "SGVB, Flipout": {"method": "sgvb", "estimator": "flipout"},
    "OT-MDR-BNN, radii 0.005 0.01": {"method": "otmdr-bnn"},
    "OT-MDR-BNN, radii 0.05 0.1": {"method": "otmdr-bnn", "rho": (0.05, 0.1)},
}
WEIGHTS = (1.0, 0.1)
NAMES = ("accuracy", "nll", "ece", "epistemic")


def table(results):
    header = ["KL weight", "method", "n", "accuracy, %", "NLL", "ECE", "epistemic"]
    rows = []
    for row in results:
        cells = [f"{row['kl_weight']:g}", row["method"], row["n"]]
        for name in NAMES:
            scale, digits = (100, 2) if name == "accuracy" else (1, 4)
            cell = row[name]
            text = f"{scale * cell['mean']:.{digits}f}"
            if cell["std"] is not None:
                text += f" ± {scale * cell['std']:.{digits}f}"
            cells.append(text)
        rows.append(cells)
    return markdown(header, rows)


def main():
    parser = options_of(__doc__, "one run of one epoch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--report", help="also write a report to this folder")
    options = parser.parse_args()
    seeds, base, weights, methods = range(options.seeds), BASE, WEIGHTS, METHODS
    if options.smoke:
        seeds, base = range(1), BASE.replace(epochs=1, num_samples=3)
        weights, methods = WEIGHTS[1:], {"SGVB": METHODS["SGVB"]}

    record = {"config": base.flat(), "seeds": len(seeds)}
    record |= {**environment(), "results": []}
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for weight in weights:
            for label, chosen in methods.items():
                mine = []
                for seed in seeds:
                    config = base.replace(kl_weight=weight, seed=seed, **chosen)
                    folder = pathlib.Path(scratch) / str(len(runs))
                    training.train(config, output=folder, show_progress=False)
                    full = f"{label}, KL weight {weight:g}"
                    mine.append(report.read_run(folder, full))
                    runs.append(mine[-1])
                (row,) = report.summarise(mine, NAMES)
                record["results"].append(
                    {
                        "method": label,
                        "kl_weight": weight,
                        "n": row.n,
                        **{
                            name: {"mean": cell.mean, "std": cell.std}
                            for name, cell in row.cells.items()
                        },
                        "seconds_per_step": [
                            run.result["seconds_per_step"] for run in mine
                        ],
                    }
                )
                write_json(options.json, record)
    print(table(record["results"]))
    if options.report:
        command = "python benchmarks/bnn_digits.py"
        print(report.write(options.report, runs, "Bayesian digits", command=command))


if __name__ == "__main__":
    main()
