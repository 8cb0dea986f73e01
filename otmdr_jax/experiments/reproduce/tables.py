"""The paper's tables with the numbers found here beside the printed ones."""

import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments import run_folder, sweep
from otmdr_jax.experiments.measure.calibrate import calibrate
from otmdr_jax.experiments.report import document
from otmdr_jax.experiments.report.labels import grouped
from otmdr_jax.experiments.report.tables import Column, Table
from otmdr_jax.experiments.reproduce import claims, figures, plans, running
from otmdr_jax.experiments.reproduce.claims import COLUMNS, Measured, blocks
from otmdr_jax.experiments.reproduce.plans import TARGETS, Cell
from otmdr_jax.io import files


def measured(
    cells: Sequence[Cell], output: str | os.PathLike, target: str
) -> list[Measured]:
    """Reads the finished runs of cells.

    Args:
      cells: The cells.
      output: The folder of the runs.
      target: The table, which says what is measured.
    """
    lost = {
        row["folder"]
        for row in sweep.read_rows(running.rows_file(output, target))
        if row["status"] == "diverged"
    }
    return [_measured(cell, pathlib.Path(output), target, lost) for cell in cells]


def _measured(cell, output, target, lost):
    seeds, rows, seconds, made = [], [], [], set()
    folders = [output / cell.name / f"{seed}" for seed in cell.seeds]
    members = 0
    for seed in cell.seeds:
        folder = output / cell.name / f"{seed}"
        if not run_folder.is_finished(folder):
            continue
        result = run_folder.read_result(folder)
        seeds.append(seed)
        members += any(m.get("diverged") for m in result.get("members") or ())
        rows.append(_numbers(folder, result, cell, target))
        if result.get("seconds_per_step") is not None:
            seconds.append(result["seconds_per_step"] * result["steps"])
        cores = f" of {result['cores']} cores" if "cores" in result else ""
        made.add(f"{result.get('device')}{cores}, JAX {result.get('jax')}")
    values = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    mean = float(np.mean(seconds)) if seconds else None
    gone = sum(str(folder) in lost for folder in folders)
    return Measured(cell, seeds, values, mean, tuple(sorted(made)), (gone, members))


def _numbers(folder, result, cell, target):
    names = TARGETS[target].metrics
    unknown = dict.fromkeys(names, float("nan"))
    if target == "table5":
        if result.get("seconds_per_step") is None:  # evaluated again
            return unknown
        batch = cell.config.run.batch_size
        count = cell.config.data.train_examples or 50_000
        return {names[0]: result["seconds_per_step"] * (count // batch)}
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        log_probs, labels = arrays["log_probs"].astype(np.float64), arrays["labels"]
    if not np.isfinite(log_probs.max(axis=1)).all():  # it diverged at the end
        return unknown
    if TARGETS[target].calibrated:
        record = calibrate(folder, ["temperature"])["methods"][0].get("metrics", {})
        found = {n: record[n]["calibrated"] if record else unknown[n] for n in names}
        # A temperature changes no prediction: the accuracy is that of all.
        return found | {"accuracy": result["accuracy"]}
    found = metrics.summary(log_probs, labels, log_probs=True)
    if "sharpness" in names:
        sharpness = result.get("sharpness")  # null where it is no finite number
        found["sharpness"] = unknown["sharpness"] if sharpness is None else sharpness
    probs = np.exp(log_probs)
    return {
        name: found[name]
        if name in found
        else float(getattr(metrics, name)(probs, labels))
        for name in names
    }


def page(
    target: str,
    scale: str,
    variant: str,
    found: Sequence[Measured],
    command: str,
    landscapes: Sequence[Any] = (),
) -> document.Page:
    """Composes the page of a table or figure.

    Args:
      target: Its name.
      scale: The scale of the runs.
      variant: The paper's text or the released code.
      found: What was found, of :func:`measured`.
      command: The command that makes it again.
      landscapes: For "figure2", lists of (label, record) that are shown side by side.

    Returns:
      A :class:`otmdr_jax.experiments.report.document.Page`; its text is Markdown.
    """
    what = TARGETS[target]
    runs = sum(len(one.seeds) for one in found)
    asked = sum(len(one.cell.seeds) for one in found)
    made = sorted({text for one in found for text in one.made})
    parts = [
        f"Scale: {scale}. Variant: {variant}. {runs} of {asked} runs are finished.",
        f"Made with: {'; '.join(made) or 'nothing yet'}.",
        *([what.note] if what.note else []),
    ]
    if scale != "paper":
        parts.append(
            "The printed numbers are of other networks and data than these runs: "
            "compare the order of methods, not the numbers."
        )
    pictures: dict[str, document.Picture] = {}
    tests = claims.tested(target, found)
    for (part, data), group in blocks(found).items():
        parts += [f"## {part}, {data}", table(group, what.metrics).markdown()]
        if own := [one for one in tests if (one.part, one.data) == (part, data)]:
            parts.append(claims.table(own).markdown())
        if target == "table5" and (ratio := _ratio(group)):
            parts.append(ratio)
    if target == "figure1" and any(one.seeds for one in found):
        alt = "Accuracy by the number of particles; lines are means over seeds."
        pictures["particles"] = document.Picture(
            alt, lambda: figures.particles(_curves(found))
        )
        parts.append(f"![{alt}](particles.png)")
    for records in landscapes:
        alt = "The loss around the solutions of SAM and OT-MDR, on one scale."
        words = records[0][0].rsplit(":", 1)[0]
        name = "landscape-" + re.sub(r"\W+", "-", words)
        pictures[name] = document.Picture(
            alt, functools.partial(figures.landscape, records)
        )
        parts += [f"## {words}", f"![{alt}]({name}.png)"]
    if count := sum(not np.isnan(claim.p) for claim in tests):
        parts.append(
            f"This page has {count} tests, each by itself at 5 %: about "
            f"{count / 20:.1f} of them would decide where there is no difference. q "
            "corrects for their number: of those with q below 0.05 at most one in "
            "twenty is expected to be no difference (Benjamini and Hochberg, 1995)."
        )
    parts.append(f"To make it again, or go on: `{command}`")
    return document.Page(what.title, "\n\n".join(parts) + "\n", pictures)


def table(found: Sequence[Measured], names: Sequence[str]) -> Table:
    """A row for each method: means and deviations over seeds, beside the printed."""
    header = ["Method", "n"]
    for name in names:
        header += [COLUMNS[name].title, "paper"]
    lines = []
    for one in found:
        line = [one.cell.method, _count(one)]
        for name in names:
            line.append(_text(COLUMNS[name], one.values.get(name, [])))
            number = one.cell.printed.get(name)
            line.append("-" if number is None else _printed(number))
        lines.append([*line, "-" if one.seconds is None else f"{one.seconds:,.0f}"])
    return Table([*header, "seconds a run"], lines)


def _ratio(group: Sequence[Measured]) -> str:
    """How many times SAM's seconds OT-MDR takes; empty without a common seed."""
    name = TARGETS["table5"].metrics[0]
    by_method = {one.cell.method: one for one in group}
    if not {"SAM", "OT-MDR"} <= set(by_method):
        return ""
    sam, ours = by_method["SAM"], by_method["OT-MDR"]
    seconds = claims.by_seed(sam, name)
    ratios = [
        mine / seconds[seed]
        for seed, mine in claims.by_seed(ours, name).items()
        if np.isfinite(mine) and np.isfinite(seconds.get(seed, np.nan))
    ]
    if not ratios:
        return ""
    printed = ours.cell.printed[name].mean / sam.cell.printed[name].mean
    return (
        f"OT-MDR's epochs take {np.mean(ratios):.2f} times the time of SAM's (mean of "
        f"{len(ratios)} seeds); {printed:.2f} times in print."
    )


def _count(one: Measured) -> str:
    gone, members = one.diverged
    said = [f"{gone} diverged"] * bool(gone)
    said += [f"a member diverged in {members}"] * bool(members)
    return f"{len(one.seeds)}" + (f" ({', '.join(said)})" if said else "")


def _text(column: Column, values: Sequence[float]) -> str:
    if not values or not np.isfinite(values).all():
        return "-"
    mean = column.text(float(np.mean(values)))
    if len(values) < 2:
        return mean
    return f"{mean} ± {column.text(float(np.std(values, ddof=1)))}"


def _printed(number: Any) -> str:
    return f"{number.mean:g}" + ("" if number.std is None else f" ± {number.std:g}")


def _curves(found):
    """{data: [(K, accuracies)]} of the cells of Figure 1."""
    return {
        data: [
            (int(one.cell.method.split()[-1]), one.values["accuracy"])
            for one in group
            if one.seeds
        ]
        for data, group in grouped(found, lambda one: one.cell.data).items()
    }


def record(target: str, scale: str, variant: str, found: Sequence[Measured]) -> dict:
    """The numbers of a page, as they are written to a file."""
    return {
        "target": target,
        "scale": scale,
        "variant": variant,
        "cells": [
            {
                "part": one.cell.part,
                "data": one.cell.data,
                "method": one.cell.method,
                "seeds": one.seeds,
                "values": one.values,
                "mean": {k: float(np.mean(v)) for k, v in one.values.items()},
                "std": {
                    k: float(np.std(v, ddof=1))
                    for k, v in one.values.items()
                    if len(v) > 1
                },
                "diverged": one.diverged[0],
                "diverged_members": one.diverged[1],
                "seconds_a_run": one.seconds,
                "made_with": list(one.made),
                "printed": {k: list(v) for k, v in one.cell.printed.items()},
                "options": _options(one.cell),
            }
            for one in found
        ],
        "tests": [
            {**claim._asdict(), "verdict": claim.verdict}
            for claim in claims.tested(target, found)
        ],
    }


def _options(cell: Cell) -> dict[str, Any]:
    """What a cell's runs are made with, wherever the data lie."""
    changed = cell.config.changed()
    changed.pop("data_dir", None)
    return changed


def read(found: Mapping[str, Any]) -> list[Measured]:
    """What was found, from a record of :func:`record`.

    Raises:
      ValueError: Today's plan has no such cell, or other options for it.
    """
    planned = {
        (cell.part, cell.data, cell.method): cell
        for cell in plans.cells(found["target"], found["scale"], found["variant"])
    }
    rows = []
    for one in found["cells"]:
        place = one["part"], one["data"], one["method"]
        cell = planned.get(place)
        today = None if cell is None else files.strict(_options(cell))
        if cell is None or one["options"] != today:
            raise ValueError(
                f"The record of {found['target']} has runs of {', '.join(place)} with "
                f"{one['options']}, and today's plan is {today}: run it again."
            )
        values = {  # files have null for what is no number
            name: [float("nan") if x is None else x for x in of_seeds]
            for name, of_seeds in one["values"].items()
        }
        rows.append(
            Measured(
                cell,
                one["seeds"],
                values,
                one["seconds_a_run"],
                tuple(one["made_with"]),
                (one["diverged"], one["diverged_members"]),
            )
        )
    return rows


def write(
    folder: str | os.PathLike, name: str, page_: document.Page, found: dict
) -> pathlib.Path:
    """Writes a page as Markdown and HTML with its pictures, and its numbers as JSON.

    Args:
      folder: The folder; files of the same target in it are replaced.
      name: The name of the files, without an ending.
      page_: The page.
      found: The numbers, of :func:`record`.

    Returns:
      The path of the HTML page.
    """
    from otmdr_jax.experiments.report import drawing

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for picture, made in page_.pictures.items():
        figure = made.figure()
        files.write_bytes(folder / f"{picture}.png", drawing.png(figure))
        drawn[picture] = drawing.cut(figure, picture, made.alt)
    files.write_json(folder / f"{name}.json", found, default=str)
    files.write_text(folder / f"{name}.md", document.markdown(page_))
    files.write_text(folder / f"{name}.html", document.html(page_, drawn))
    return folder / f"{name}.html"
