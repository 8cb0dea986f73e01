"""Sections of what commands measured of runs and left in their folders."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from otmdr_jax.experiments.report import landscape, records, shift
from otmdr_jax.experiments.report.document import Picture, Section, missing
from otmdr_jax.experiments.report.reading import Run, by_label

Part = str | Picture


def calibration_section(runs: Sequence[Run]) -> Section:
    """Raw and calibrated metrics, and conformal sets, of each run that has them."""
    return _of_records(
        "Calibration",
        runs,
        records.CALIBRATION,
        lambda record: [
            f"{record['how'][0].upper()}{record['how'][1:]}:",
            records.markdown(records.calibration_table(record)),
            *(
                f"{method['name']} failed: {method['why']}"
                for method in record["methods"]
                if "why" in method
            ),
            *(
                f"**Note:** {method['note']}"
                for method in record["methods"]
                if "note" in method
            ),
            "Conformal sets:",
            records.markdown(records.conformal_table(record)),
        ],
        "Raw and calibrated values are of the same examples, none of which the "
        "calibrator was fitted on.",
    )


def sharpness_section(runs: Sequence[Run]) -> Section:
    """Every measure of sharpness, runs side by side."""
    found = dict(_records(runs, records.SHARPNESS))
    parts: list[Part] = []
    if found:
        counts = sorted({record["num_examples"] for record in found.values()})
        parts += [
            records.markdown(records.sharpness_table(found)),
            "How far the training loss rises around the solution, on "
            f"{' or '.join(map(str, counts))} training images; ± is the standard error "
            "where directions are drawn. Adaptive measures take the size of each "
            "weight as its unit; compare those between networks whose weights differ "
            "in size.",
        ]
    return Section("Sharpness", (*parts, *_what_is_missing(runs, records.SHARPNESS)))


def shift_section(runs: Sequence[Run]) -> Section:
    """Curves and tables of corrupted, other and foreign images."""
    found: dict[str, Any] = {}
    notes: list[str] = []
    gone: dict[str, str] = {}
    for label, group in by_label(runs).items():
        every = [records.read_record(run, records.SHIFT) for run in group]
        own = [record for record in every if record is not None]
        if not own:
            continue
        gone |= {x["name"]: x["why"] for record in own for x in record["missing"]}
        if len({(record["num_examples"], record.get("seed")) for record in own}) > 1:
            notes.append(f"The runs of {label} were measured on other examples each.")
        found[label] = shift.mean_record(own)
    found, unlike = shift.in_common(found)
    notes += unlike
    parts: list[Part] = []
    if any(record["corruptions"] for record in found.values()):
        parts += [
            Picture(
                "shift",
                "Accuracy, NLL and ECE against the severity of corruptions",
                lambda narrow: shift.shift_figure(
                    list(found.items()), narrow=narrow, order=list(by_label(runs))
                ),
            ),
            records.markdown(shift.summary_table(found)),
            records.markdown(shift.accuracy_table(found)),
            "Thick lines are means over corruptions, thin ones (of up to two methods) "
            "a corruption each. Corruptions are computed on the test images, they are "
            "not the files of CIFAR-10-C; tables show means over severities and the "
            "runs of a method, the first one over corruptions too.",
        ]
    parts += [f"**Note:** {note}" for note in notes]
    for label, record in found.items():
        for name, table in (
            ("CIFAR-10-C", shift.published_table(record)),
            ("other test sets", shift.set_table(record)),
        ):
            if table[1]:
                parts += [f"### {label}: {name}", records.markdown(table)]
    if any(record["ood"] for record in found.values()):
        parts += [
            records.markdown(shift.ood_table(found)),
            "Foreign images told from the test set by uncertainty. AUROC: 0.5 is "
            "chance; AUPR: foreign images are the positives; FPR95: the share of them "
            "that pass where 95 % of the test set do.",
        ]
    parts += [missing(f"{name}: {why}") for name, why in gone.items()]
    return Section("Shift", (*parts, *_what_is_missing(runs, records.SHIFT)))


def landscape_section(runs: Sequence[Run]) -> Section:
    """Contours and surfaces, of comparable runs on shared axes and colours."""
    found = _records(runs, records.LANDSCAPE)
    parts: list[Part] = [
        missing(f"{name}: none of its losses is finite.")
        for name, record in found
        if not _is_finite(record)
    ]
    found = [(name, record) for name, record in found if _is_finite(record)]
    for i, group in enumerate(landscape.comparable(found), 1):
        first = group[0][1]
        number = f"_{i}" if i > 1 else ""
        figures = (
            {"landscape_line": landscape.line_figure}
            if len(first["axes"]) == 1
            else {
                "landscape": landscape.contour_figure,
                "landscape_surface": landscape.surface_figure,
            }
        )
        parts += [
            Picture(
                name + number,
                f"Loss landscape: {', '.join(label for label, _ in group)}",
                functools.partial(_draw_landscape, figure, group),
            )
            for name, figure in figures.items()
        ]
        parts.append(
            f"{landscape.MEANINGS[first['kind']]} Mean loss of "
            f"{first['num_examples']} images of the {first['split']} set"
            + ("." if len(first["axes"]) == 1 else "; equal colours are equal losses.")
        )
    return Section(
        "Loss landscape", (*parts, *_what_is_missing(runs, records.LANDSCAPE))
    )


def _is_finite(record) -> bool:
    return bool(np.isfinite(np.array(record["losses"], np.float64)).any())


def _draw_landscape(figure, group, narrow):
    return figure(group, narrow=narrow)


def _of_records(
    title: str,
    runs: Sequence[Run],
    kind: tuple[str, str],
    parts_of: Callable[[dict[str, Any]], list[str]],
    note: str,
) -> Section:
    """A section with a record's tables for each run that has one."""
    parts: list[Part] = []
    for name, record in _records(runs, kind):
        parts += [f"### {name}", *parts_of(record)]
    if parts:
        parts.append(note)
    return Section(title, (*parts, *_what_is_missing(runs, kind)))


def _records(
    runs: Sequence[Run], kind: tuple[str, str]
) -> list[tuple[str, dict[str, Any]]]:
    """The records that are there, by the label, and the folder where it has several."""
    found = [(run, records.read_record(run, kind)) for run in runs]
    there = [(run, record) for run, record in found if record is not None]
    labels = [run.label for run, _ in there]
    return [
        (run.label if labels.count(run.label) == 1 else name_of(run, runs), record)
        for run, record in there
    ]


def _what_is_missing(runs, kind) -> list[str]:
    """What a reader must know: which runs have no record, or one of another step."""
    every = [(run, records.read_record(run, kind)) for run in runs]
    notes = []
    for run, record in every:
        step, last = (record or {}).get("step"), run.result.get("steps")
        if None not in (step, last) and step != last:
            notes.append(
                f"**Note:** {name_of(run, runs)} was measured at step {step}; its "
                f"result is that of step {last}."
            )
    lacking = [run for run, record in every if record is None]
    if not lacking:
        return notes
    names = ", ".join(name_of(run, runs) for run in lacking)
    _, command = kind
    text = f"{names}. `{command} RUN` writes it; then make this page again."
    return [*notes, missing(text)]


def name_of(run: Run, runs: Sequence[Run]) -> str:
    """A run among others: its label, and as much of its path as tells it apart."""
    if run.folder is None:
        return run.label
    alike = [x.folder.parts for x in runs if x.folder and x.label == run.label]
    parts = run.folder.parts
    count = next(
        (
            n
            for n in range(1, len(parts))
            if [x[-n:] for x in alike].count(parts[-n:]) == 1
        ),
        len(parts),
    )
    return f"{run.label} ({'/'.join(parts[-count:])})"
