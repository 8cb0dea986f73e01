"""Tables of the records that commands leave in a run's folder beside its result.

A table is a heading and lines of text: printed in a terminal, or Markdown on a page.
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.experiments.report.tables import (
    DEFAULT_COLUMNS,
    aligned_text,
    markdown_cell,
)

Table = tuple[list[str], list[list[str]]]

# A record's name -> its file and the command that writes it.
SHARPNESS = ("sharpness.json", "otmdr sharpness")
CALIBRATION = ("calibration.json", "otmdr calibrate")
SHIFT = ("shift.json", "otmdr shift")
LANDSCAPE = ("landscape.json", "otmdr landscape")

# Also of a bold one, of a difference, and the mark of one that is not known.
_NUMBER = re.compile(r"[*+<≥ -]*\d|-$")
# What a record must hold.
_KEYS = {
    SHARPNESS: ("step", "num_examples", "measures"),
    CALIBRATION: ("how", "methods", "conformal", "alpha"),
    SHIFT: ("step", "num_examples", "clean", "corruptions", "sets", "ood", "missing"),
    LANDSCAPE: ("step", "kind", "split", "num_examples", "axes", "losses", "points"),
}
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


def read_record(run: Run, kind: tuple[str, str]) -> dict[str, Any] | None:
    """A record of a run; None where it was not made.

    Raises:
      ValueError: The file is no JSON object.
    """
    if run.folder is None:
        return None
    path = pathlib.Path(run.folder) / kind[0]
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    if lacking := [key for key in _KEYS[kind] if key not in record]:
        raise ValueError(
            f"{path} is no record of `{kind[1]}`: it lacks {', '.join(lacking)}. Let "
            "the command write it anew."
        )
    return record


def sharpness_table(found: dict[str, dict[str, Any]]) -> Table:
    """Records of sharpness, see `experiments.measure.sharpness`, side by side."""
    every = [{row["name"]: row for row in one["measures"]} for one in found.values()]
    lines = []
    for name in dict.fromkeys(name for one in every for name in one):
        shown = [_with_error(one[name]) if name in one else "-" for one in every]
        lines.append([_measure_title(name), *shown])
    return ["Measure", *found], lines


def _measure_title(name: str) -> str:
    """A measure of sharpness in words."""
    if name.startswith("hessian_eigenvalue_"):
        return f"Hessian eigenvalue {name.rpartition('_')[2]}"
    return _MEASURES.get(name, name)


def calibration_table(record: dict[str, Any]) -> Table:
    """Of a record of :func:`otmdr_jax.experiments.measure.calibrate.calibrate`."""
    fitted = [method for method in record["methods"] if "metrics" in method]
    names = list(fitted[0]["metrics"]) if fitted else []
    lines = []
    if fitted:
        raw = fitted[0]["metrics"]  # the same for all methods
        lines.append(["raw", "-", *(_pair(raw[n], "raw") for n in names)])
    for method in record["methods"]:
        temperature = method.get("temperature")
        shown = "-" if temperature is None else f"{temperature:.3f}"
        if "metrics" in method:
            pairs = [_pair(method["metrics"][n], "calibrated") for n in names]
        else:
            pairs = ["failed"] * len(names)
        lines.append([method["name"], shown, *pairs])
    titles = [_TITLES[name].replace(" (%)", "") for name in names]
    return ["Calibration", "Temperature", *titles], lines


def conformal_table(record: dict[str, Any]) -> Table:
    """Coverage and size of the conformal sets of a calibration record."""
    asked = f"Coverage (%), asked {100 * (1 - record['alpha']):.4g}"
    lines = [
        [one["score"].upper(), f"{100 * one['coverage']:.2f}", f"{one['size']:.3f}"]
        for one in record["conformal"]
    ]
    return ["Score", asked, "Mean size (classes)"], lines


def markdown(table: Table) -> str:
    """A table as Markdown."""
    header, lines = table
    columns = list(zip(*lines, strict=True)) or [()] * len(header)
    rule = [":--" if not i or _is_text(c) else "--:" for i, c in enumerate(columns)]
    return "\n".join(
        f"| {' | '.join(map(markdown_cell, line))} |" for line in (header, rule, *lines)
    )


def print_lines(table: Table, title: str) -> None:
    """Prints a table: with rich where it is installed, else as aligned text."""
    header, lines = table
    try:
        import rich.table
        import rich.text
    except ImportError:
        print(aligned_text(header, lines, title))
        return
    from otmdr_jax.experiments.report.tables import wide_console

    shown = rich.table.Table(title=rich.text.Text(title))
    for i, name in enumerate(header):
        shown.add_column(rich.text.Text(name), justify="right" if i else "left")
    for line in lines:
        shown.add_row(*map(rich.text.Text, line))
    wide_console(shown).print(shown)


def number(value: float | None) -> str:
    """A number of any size to four digits; "-" for none."""
    return "-" if value is None else f"{value:.4g}"


def _is_text(column: Sequence[str]) -> bool:
    """Whether a column holds words, which stand at its left."""
    return not any(_NUMBER.match(cell) for cell in column)


def _with_error(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return number(row["value"]) + ("" if error is None else f" ± {error:.2g}")


def _pair(pair: dict[str, Any], which: str) -> str:
    value, std = pair[which], pair[f"{which}_std"]
    if value is None:
        return "-"
    return f"{value:.4f}" if std is None else f"{value:.4f} ± {std:.4f}"
