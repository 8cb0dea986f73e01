"""Sections of what commands measured of runs and left in their folders."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from otmdr_jax.report import landscape, records, shift
from otmdr_jax.report.document import Picture, Section, missing
from otmdr_jax.report.reading import Run, by_label

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
            "Conformal sets:",
            records.markdown(records.conformal_table(record)),
        ],
        "Raw and calibrated values are of the same examples, none of which the "
        "calibrator was fitted on.",
    )


def sharpness_section(runs: Sequence[Run]) -> Section:
    """Every measure of sharpness, runs side by side."""
    found = {
        name_of(run): record
        for run in runs
        if (record := records.read_record(run, records.SHARPNESS)) is not None
    }
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
    found = {}
    for label, group in by_label(runs).items():
        every = [records.read_record(run, records.SHIFT) for run in group]
        own = [record for record in every if record is not None]
        if own:
            found[label] = shift.mean_record(own)
    parts: list[Part] = []
    if any(record["corruptions"] for record in found.values()):
        parts += [
            Picture(
                "shift",
                "Accuracy, NLL and ECE against the severity of corruptions",
                lambda narrow: shift.shift_figure(list(found.items()), narrow=narrow),
            ),
            records.markdown(shift.summary_table(found)),
            records.markdown(shift.accuracy_table(found)),
            "Corruptions computed on the test images, not the files of CIFAR-10-C; "
            "means over severities, over the runs of a method and, above, over "
            "corruptions.",
        ]
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
    return Section("Shift", (*parts, *_what_is_missing(runs, records.SHIFT)))


def landscape_section(runs: Sequence[Run]) -> Section:
    """Contours and surfaces, of comparable runs on shared axes and colours."""
    found = [
        (name_of(run), record)
        for run in runs
        if (record := records.read_record(run, records.LANDSCAPE)) is not None
    ]
    parts: list[Part] = []
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
            f"{first['num_examples']} images of the {first['split']} set; equal "
            "colours are equal losses."
        )
    return Section(
        "Loss landscape", (*parts, *_what_is_missing(runs, records.LANDSCAPE))
    )


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
    for run in runs:
        record = records.read_record(run, kind)
        if record is not None:
            parts += [f"### {name_of(run)}", *parts_of(record)]
    if parts:
        parts.append(note)
    return Section(title, (*parts, *_what_is_missing(runs, kind)))


def _what_is_missing(runs, kind) -> list[str]:
    lacking = [run for run in runs if records.read_record(run, kind) is None]
    if not lacking:
        return []
    names = ", ".join(name_of(run) for run in lacking)
    _, command = kind
    return [missing(f"{names}. `{command} RUN` writes it; then make this page again.")]


def name_of(run: Run) -> str:
    """A run among others of its label."""
    return run.label if run.folder is None else f"{run.label} ({run.folder.name})"
