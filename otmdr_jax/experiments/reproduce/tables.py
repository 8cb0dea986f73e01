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

    Raises:
      ValueError: See :func:`otmdr_jax.experiments.reproduce.running.check`.
    """
    running.check(cells, output)
    root = pathlib.Path(output)
    # Of other targets too, which share runs. Folders are named as they were written.
    lost = {
        pathlib.Path(row["folder"]).parts[-2:]
        for name in TARGETS
        for row in sweep.read_rows(running.rows_file(root, name))
        if row["status"] == "diverged"
    }
    return [_measured(cell, root, target, lost) for cell in cells]


def _measured(cell, output, target, lost):
    seeds, rows, seconds, made = [], [], [], set()
    members = gone = 0
    for seed in cell.seeds:
        folder = output / cell.name / f"{seed}"
        if not run_folder.is_finished(folder):
            gone += folder.parts[-2:] in lost
            continue
        result = run_folder.read_result(folder)
        seeds.append(seed)
        members += any(m.get("diverged") for m in result.get("members") or ())
        rows.append(_numbers(folder, result, cell, target))
        if result.get("seconds_per_step") is not None:
            seconds.append(result["seconds_per_step"] * result["steps"])
        cores = f" of {result['cores']} cores" if "cores" in result else ""
        versions = f"JAX {result.get('jax')}, otmdr_jax {result.get('otmdr_jax')}"
        made.add(f"{result.get('device')}{cores}, {versions}")
    values = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    mean = float(np.mean(seconds)) if seconds else None
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
    log_probs, labels = run_folder.read_predictions(folder)
    log_probs = log_probs.astype(np.float64)
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
    return {name: found[name] for name in names}


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
      landscapes: For "figure2", of :func:`figures.landscapes`.

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
    if scale == "smoke":
        parts.append(
            "These runs are of one small network on a few digits, whatever networks "
            "and data the tables name: they show that the command works, and nothing "
            "of the methods."
        )
    elif scale != "paper" and any(one.cell.printed for one in found):
        parts.append(
            "The printed numbers are of other networks and data than these runs: "
            "compare the order of methods, not the numbers."
        )
    pictures: dict[str, document.Picture] = {}
    tests = claims.tested(target, found)
    for (part, data), group in blocks(found).items():
        parts += [f"## {part}, {data}", table(group, what.metrics).markdown()]
        if note := _made_apart(group):
            parts.append(note)
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
    for one in landscapes:
        parts.append(f"## {one.title}")
        if one.missing:
            parts.append(f"Not shown: {one.missing}")
            continue
        alt = "The loss around the solutions of SAM and OT-MDR, on one scale."
        name = "landscape-" + re.sub(r"\W+", "-", one.title)
        pictures[name] = document.Picture(
            alt, functools.partial(figures.landscape, one)
        )
        parts.append(f"![{alt}]({name}.png)")
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


def _made_apart(group: Sequence[Measured]) -> str:
    """What the rows of a table were made with, where that is not the same."""
    made = {one.cell.method: "; ".join(one.made) for one in group if one.made}
    if len(set(made.values())) < 2:
        return ""
    rows = grouped(made, lambda method: made[method])
    said = [f"{', '.join(methods)}: {text}" for text, methods in rows.items()]
    return f"Its runs were not all made alike. {'. '.join(said)}."


def _count(one: Measured) -> str:
    gone, members = one.diverged
    broken = max(map(_no_numbers, one.values.values()), default=0)
    said = [f"{gone} diverged"] * bool(gone)
    said += [f"{broken} with no finite numbers"] * bool(broken)
    said += [f"a member diverged in {members}"] * bool(members)
    return f"{len(one.seeds)}" + (f" ({', '.join(said)})" if said else "")


def _no_numbers(values: Sequence[float]) -> int:
    return int(np.sum(~np.isfinite(values)))


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
    places = ("data_dir", "cache_dir")
    return {k: v for k, v in cell.config.flat().items() if k not in places}


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
        text = f"The record of {found['target']} has runs of {', '.join(place)}"
        if cell is None:
            raise ValueError(f"{text}, and today's plan has none: run it again.")
        then, today = one["options"], files.strict(_options(cell))
        if changed := {
            name: (then.get(name), today.get(name))
            for name in {**then, **today}
            if then.get(name) != today.get(name)
        }:
            raise ValueError(
                f"{text} with other options than today's plan: {changed} (then and "
                "today). Run it again."
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
