"""The paper's tables with the numbers found here beside the printed ones."""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments import run_folder
from otmdr_jax.experiments.measure.calibrate import calibrate
from otmdr_jax.experiments.report import document
from otmdr_jax.experiments.report.labels import grouped
from otmdr_jax.experiments.report.tables import Column, Table
from otmdr_jax.experiments.reproduce import figures
from otmdr_jax.experiments.reproduce.plans import TARGETS, Cell
from otmdr_jax.io import files

# How the metrics of the tables are written, and which way is better.
COLUMNS = {
    column.name: column
    for column in (
        Column("accuracy", "ACC (%)", better="higher", scale=100.0, decimals=2),
        Column("misclassification_auroc", "AUROC of errors", better="higher"),
        Column("ovr_auroc", "AUROC, one vs rest", better="higher"),
        Column("brier", "Brier", better="lower"),
        Column("nll", "NLL", better="lower"),
        Column("ece", "ECE", better="lower"),
        Column("aac", "AAC", better="lower"),
        Column("seconds_per_epoch", "s / epoch", better="lower", decimals=1),
    )
}
# The rows that the paper's claims are about, and what they are compared with.
OURS, BASELINES = "OT-MDR", ("SAM", "SGVB", "SGD", "bSAM", "Deep Ensemble")
LEVEL = 0.95


class Measured(NamedTuple):
    """What was found for a cell.

    Attributes:
      cell: The cell.
      seeds: The seeds of its finished runs.
      values: The metrics, one number for each of these seeds.
      seconds: The mean time of a run's steps; None without a run.
      made: What the runs were made with: devices and versions.
    """

    cell: Cell
    seeds: list[int]
    values: dict[str, list[float]]
    seconds: float | None
    made: tuple[str, ...]


def measured(
    cells: Sequence[Cell], output: str | os.PathLike, target: str
) -> list[Measured]:
    """Reads the finished runs of cells.

    Args:
      cells: The cells.
      output: The folder of the runs.
      target: The table, which says what is measured.
    """
    return [_measured(cell, pathlib.Path(output), target) for cell in cells]


def _measured(cell, output, target):
    seeds, rows, seconds, made = [], [], [], set()
    for seed in cell.seeds:
        folder = output / cell.name / f"{seed}"
        if not run_folder.is_finished(folder):
            continue
        result = run_folder.read_result(folder)
        seeds.append(seed)
        rows.append(_numbers(folder, result, cell, target))
        if result.get("seconds_per_step") is not None:
            seconds.append(result["seconds_per_step"] * result["steps"])
        made.add(f"{result.get('device')}, JAX {result.get('jax')}")
    values = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    mean = float(np.mean(seconds)) if seconds else None
    return Measured(cell, seeds, values, mean, tuple(sorted(made)))


def _numbers(folder, result, cell, target):
    names = TARGETS[target].metrics
    if target == "table5":
        batch = cell.config.run.batch_size
        count = cell.config.data.train_examples or 50_000
        return {names[0]: result["seconds_per_step"] * (count // batch)}
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        log_probs, labels = arrays["log_probs"].astype(np.float64), arrays["labels"]
    if TARGETS[target].calibrated:
        record = calibrate(folder, ["temperature"])["methods"][0]
        if "metrics" not in record:
            return dict.fromkeys(names, float("nan"))
        return {
            # A temperature changes no prediction: the accuracy is that of all.
            name: result["accuracy"]
            if name == "accuracy"
            else record["metrics"][name]["calibrated"]
            for name in names
        }
    found = metrics.summary(log_probs, labels, log_probs=True)
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
    for (part, data), group in grouped(
        found, lambda one: (one.cell.part, one.cell.data)
    ).items():
        parts += [f"## {part}, {data}", table(group, what.metrics).markdown()]
        if (claims := tested(group, what.metrics)) is not None:
            parts.append(claims.markdown())
    if target == "figure1" and any(one.seeds for one in found):
        alt = "Accuracy by the number of particles; lines are means over seeds."
        pictures["particles"] = document.Picture(
            alt, lambda: figures.particles(_curves(found))
        )
        parts.append(f"![{alt}](particles.png)")
    for i, records in enumerate(landscapes):
        alt = "The loss around the solutions of SAM and OT-MDR, on one scale."
        name = f"landscape{i}"
        pictures[name] = document.Picture(
            alt, functools.partial(figures.landscape, records)
        )
        parts += [f"## {records[0][0].split(':')[0]}", f"![{alt}]({name}.png)"]
    parts.append(f"To make it again, or go on: `{command}`")
    return document.Page(what.title, "\n\n".join(parts) + "\n", pictures)


def table(found: Sequence[Measured], names: Sequence[str]) -> Table:
    """A row for each method: means and deviations over seeds, beside the printed."""
    header = ["Method", "n"]
    for name in names:
        header += [COLUMNS[name].title, "paper"]
    lines = []
    for one in found:
        line = [one.cell.method, str(len(one.seeds))]
        for name in names:
            line.append(_text(COLUMNS[name], one.values.get(name, [])))
            number = one.cell.printed.get(name)
            line.append("-" if number is None else _printed(number))
        lines.append([*line, "-" if one.seconds is None else f"{one.seconds:,.0f}"])
    return Table([*header, "seconds a run"], lines)


def _text(column: Column, values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = column.text(float(np.mean(values)))
    if len(values) < 2:
        return mean
    return f"{mean} ± {column.text(float(np.std(values, ddof=1)))}"


def _printed(number: Any) -> str:
    return f"{number.mean:g}" + ("" if number.std is None else f" ± {number.std:g}")


def tested(found: Sequence[Measured], names: Sequence[str]) -> Table | None:
    """Whether the paper's claims hold: OT-MDR against each other row, over seeds.

    Args:
      found: The methods of one network and data set.
      names: The metrics.

    Returns:
      A line for each baseline and metric: the mean difference over the seeds that both
      have, its 95 % interval and p-value by Student's paired t-test, what the paper
      prints, and whether its direction is seen. None where there is nothing to test.
    """
    ours = next((one for one in found if one.cell.method == OURS), None)
    if ours is None or len(ours.seeds) < 2:
        return None
    lines = []
    for other in found:
        common = [seed for seed in ours.seeds if seed in other.seeds]
        if other is ours or len(common) < 2:
            continue
        for name in names:
            lines.append(_tested(ours, other, common, COLUMNS[name]))
    if not lines:
        return None
    header = [
        f"{OURS} minus", "metric", "difference", f"{LEVEL:.0%} interval", "p", "paper",
        "the paper's order",
    ]  # fmt: skip
    return Table(header, lines)


def _tested(ours, other, common, column):
    from scipy import stats

    pairs = [
        [one.values[column.name][one.seeds.index(seed)] for seed in common]
        for one in (ours, other)
    ]
    differences = np.array(pairs[0]) - np.array(pairs[1])
    mean = float(differences.mean())
    # Without a spread, but for rounding, there is no test.
    if np.ptp(differences) <= 1e-12 * np.abs(pairs).max():
        interval, p = (mean, mean), float("nan")
    else:
        test = stats.ttest_rel(*pairs)
        interval, p = test.confidence_interval(LEVEL), float(test.pvalue)
    printed = [one.cell.printed.get(column.name) for one in (ours, other)]
    claim = "-"
    verdict = "-"
    if None not in printed:
        claimed = printed[0].mean - printed[1].mean
        claim = f"{claimed:+.3g}"
        if claimed == 0:
            verdict = "a tie in the paper"
        elif not p < 1 - LEVEL:
            verdict = "not decided"
        else:
            verdict = "holds" if np.sign(mean) == np.sign(claimed) else "reversed"
    ends = " to ".join(column.text(float(end), "+") for end in interval)
    return [
        other.cell.method,
        column.title,
        column.text(mean, "+"),
        ends,
        "-" if np.isnan(p) else f"{p:.3f}",
        claim,
        verdict,
    ]


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
                "seconds_a_run": one.seconds,
                "made_with": list(one.made),
                "printed": {k: list(v) for k, v in one.cell.printed.items()},
                "options": one.cell.config.changed(),
            }
            for one in found
        ],
    }


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
