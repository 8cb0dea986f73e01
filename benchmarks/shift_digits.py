r"""The demo's methods on corrupted digits: SGD, SAM, OT-MDR, an ensemble.

    python benchmarks/shift_digits.py --json benchmarks/results/shift_digits.json \
        --picture docs/shift/digits.png                  # three seeds, 3 minutes
    python benchmarks/shift_digits.py --smoke            # one method, one epoch

Trained as `otmdr demo` does, with 20 % wrong training labels; tested as `otmdr shift`
does, on all six corruptions in five severities. Means over seeds.
"""

import statistics

from _common import environment
from _record import markdown, options_of, write_json

from otmdr_jax import data
from otmdr_jax.experiments import demo, programs, report, training
from otmdr_jax.experiments.measure import shift
from otmdr_jax.experiments.report.shift import mean_record

NAMES = {"accuracy": (100, 2), "nll": (1, 4), "ece": (1, 4)}


def of_corruptions(record, name):
    """A number's mean over corruptions and severities."""
    return statistics.mean(row[name] for row in record["corruptions"])


def table(results):
    header = ["method", "n", "clean accuracy, %"]
    header += [f"corrupted {x}" for x in ("accuracy, %", "NLL", "ECE")]
    rows = []
    for label, records in results.items():
        numbers = [[100 * record["clean"]["accuracy"] for record in records]]
        numbers += [
            [scale * of_corruptions(record, name) for record in records]
            for name, (scale, _) in NAMES.items()
        ]
        cells = []
        for values, digits in zip(numbers, (2, 2, 4, 4), strict=True):
            text = f"{statistics.mean(values):.{digits}f}"
            if len(values) > 1:
                text += f" ± {statistics.stdev(values):.{digits}f}"
            cells.append(text)
        rows.append([label, len(records), *cells])
    return markdown(header, rows)


def main():
    parser = options_of(__doc__, "one method, one epoch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", help="also draw the means into this file")
    options = parser.parse_args()
    chosen, seeds, severities = demo.METHODS, range(options.seeds), data.SEVERITIES
    if options.smoke:
        chosen = [demo.METHODS[0].replace(epochs=1)]
        seeds, severities = range(2), (1, 5)

    record = {"config": demo.BASE.flat(), "seeds": len(seeds)}
    record |= {**environment(), "results": {}}
    for base in chosen:
        records = []
        for seed in seeds:
            config = base.replace(seed=seed)
            dataset = programs.load_data(config)
            result = training.train(config, dataset, show_progress=False)
            found = shift.evaluate(config, result.state, dataset, severities=severities)
            records.append(found)
        record["results"][report.label_of(base.flat())] = records
        write_json(options.json, record)
    print(table(record["results"]))
    if options.picture:
        means = [(label, mean_record(x)) for label, x in record["results"].items()]
        report.plot_shift(means, options.picture)


if __name__ == "__main__":
    main()
