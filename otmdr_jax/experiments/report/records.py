"""Records that commands leave in run folders: reads them and makes their tables."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from otmdr_jax.experiments.report.labels import name_of
from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.experiments.report.tables import DEFAULT_COLUMNS, Table
from otmdr_jax.io import files


class Kind(NamedTuple):
    """A kind of record.

    Attributes:
      file: Name of its file in a run's folder.
      command: Command that writes it.
      keys: Keys that it must hold.
    """

    file: str
    command: str
    keys: tuple[str, ...]


SHARPNESS = Kind(
    "sharpness.json", "otmdr sharpness", ("step", "num_examples", "measures")
)
CALIBRATION = Kind(
    "calibration.json", "otmdr calibrate", ("how", "methods", "conformal", "alpha")
)
SHIFT = Kind(
    "shift.json",
    "otmdr shift",
    ("step", "num_examples", "clean", "corruptions", "sets", "ood", "missing"),
)
LANDSCAPE = Kind(
    "landscape.json",
    "otmdr landscape",
    ("step", "kind", "split", "num_examples", "axes", "losses", "points"),
)
_MEASURES = {
    "train_nll": "Training NLL (nats)",
    "sam_gap": "SAM's gap, ρ = 0.05 (nats)",
    "adaptive_sam_gap": "Adaptive SAM's gap, ρ = 0.5 (nats)",
    "worst_in_ball": "Worst in the ball, ρ = 0.05 (nats)",
    "adaptive_worst_in_ball": "Adaptive worst in the ball, ρ = 0.5 (nats)",
    "average": "Average, noise of std 0.01 (nats)",
    "adaptive_average": "Adaptive average, noise of std 0.1 (nats)",
    "hessian_trace": "Trace of the Hessian",
}
_TITLES = {column.name: column.title for column in DEFAULT_COLUMNS} | {
    "sce": "SCE ↓",
    "ace": "ACE ↓",
    "tace": "TACE ↓",
    "aac": "AAC ↓",
}


def read_record(run: Run, kind: Kind) -> dict[str, Any] | None:
    """Reads a record of a run; None if the run has none.

    Raises:
      ValueError: The file is no JSON object, or lacks keys of this kind.
    """
    if run.folder is None:
        return None
    path = pathlib.Path(run.folder) / kind.file
    if not path.is_file():
        return None
    try:
        record = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if lacking := [key for key in kind.keys if key not in record]:
        raise ValueError(
            f"{path} is no record of `{kind.command}`: it lacks {', '.join(lacking)}. "
            "Run the command again."
        )
    return record


def found(runs: Sequence[Run], kind: Kind) -> list[tuple[str, dict[str, Any]]]:
    """Returns (name, record) of each run that has a record.

    The name is the run's label, and also its folder if several runs share the label.
    """
    every = [(run, read_record(run, kind)) for run in runs]
    there = [(run, record) for run, record in every if record is not None]
    labels = [run.label for run, _ in there]
    return [
        (run.label if labels.count(run.label) == 1 else name_of(run, runs), record)
        for run, record in there
    ]


def without(runs: Sequence[Run], kind: Kind) -> list[str]:
    """Returns the names of the runs that have no record of a kind."""
    return [name_of(run, runs) for run in runs if read_record(run, kind) is None]


def out_of_date(runs: Sequence[Run], kind: Kind) -> list[str]:
    """Returns a sentence for each record of another step than the run's result."""
    notes = []
    for run in runs:
        record = read_record(run, kind) or {}
        step = record.get("step", record.get("settings", {}).get("step"))
        last = run.result.get("steps")
        if None not in (step, last) and step != last:
            notes.append(
                f"{name_of(run, runs)} was measured at step {step}, but its result is "
                f"that of step {last}."
            )
    return notes


def sharpness_table(found: dict[str, dict[str, Any]]) -> Table:
    """Puts records of :mod:`otmdr_jax.experiments.measure.sharpness` side by side."""
    every = [{row["name"]: row for row in one["measures"]} for one in found.values()]
    lines = []
    for name in dict.fromkeys(name for one in every for name in one):
        shown = [_with_error(one[name]) if name in one else "-" for one in every]
        lines.append([_measure_title(name), *shown])
    return Table(["Measure", *found], lines)


def _measure_title(name: str) -> str:
    """Returns the title of a measure of sharpness."""
    if name.startswith("hessian_eigenvalue_"):
        return f"Hessian eigenvalue {name.rpartition('_')[2]}"
    return _MEASURES.get(name, name)


def calibration_table(record: dict[str, Any]) -> Table:
    """Makes the table of a record of `experiments.measure.calibrate.calibrate`.

    Each metric has a line; the raw values and each method have a column.
    """
    fitted = [method for method in record["methods"] if "metrics" in method]
    names = list(fitted[0]["metrics"]) if fitted else []
    titles = [_TITLES[name].replace(" (%)", "") for name in names]
    columns = [["Metric", "Temperature", *titles]]
    if fitted:
        raw = fitted[0]["metrics"]  # the same for all methods
        columns.append(["raw", "-", *(_pair(raw[n], "raw") for n in names)])
    for method in record["methods"]:
        temperature = method.get("temperature")
        shown = "-" if temperature is None else f"{temperature:.3f}"
        if "metrics" in method:
            pairs = [_pair(method["metrics"][n], "calibrated") for n in names]
        else:
            pairs = ["failed"] * len(names)
        columns.append([method["name"], shown, *pairs])
    header, *lines = map(list, zip(*columns, strict=True))
    return Table(header, lines)


def conformal_table(record: dict[str, Any]) -> Table:
    """Makes the table of the conformal sets in a calibration record."""
    asked = f"Coverage (%), asked {100 * (1 - record['alpha']):.4g}"
    lines = [
        [one["score"].upper(), f"{100 * one['coverage']:.2f}", f"{one['size']:.3f}"]
        for one in record["conformal"]
    ]
    return Table(["Score", asked, "Mean size (classes)"], lines)


def number(value: float | None) -> str:
    """Formats a number of any size with four digits; "-" for None."""
    return "-" if value is None else f"{value:.4g}"


def _with_error(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return number(row["value"]) + ("" if error is None else f" ± {error:.2g}")


def _pair(pair: dict[str, Any], which: str) -> str:
    value, std = pair[which], pair[f"{which}_std"]
    if value is None:
        return "-"
    return f"{value:.4f}" if std is None else f"{value:.4f} ± {std:.4f}"
