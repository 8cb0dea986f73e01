"""The paper's two figures."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments import run_folder
from otmdr_jax.experiments.measure import surface
from otmdr_jax.experiments.report import landscape as pictures
from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.labels import grouped
from otmdr_jax.experiments.reproduce.plans import Cell

# Points on an axis of Figure 2, and the examples that each is the loss of.
_PLAN: dict[str, dict[str, Any]] = {
    "paper": {"points": 51, "num_examples": 10_000, "split": "test"},
    "small": {"points": 21, "num_examples": 1_000, "split": "test"},
    "smoke": {"points": 3, "num_examples": 50, "split": "test"},
}


def particles(curves: Mapping[str, Sequence[tuple[int, Sequence[float]]]]) -> Any:
    """Figure 1: accuracy by the number of particles; points are seeds.

    Args:
      curves: Data set -> pairs of K and accuracies.

    Returns:
      The figure.
    """
    figure = plots.new_figure(plots.ALONE, 3.2)
    ax = figure.subplots()
    for colour, (data, points) in zip(plots.COLOURS, curves.items(), strict=False):
        means = [(k, 100 * np.mean(values)) for k, values in points]
        ax.plot(*zip(*means, strict=True), color=colour, label=data)
        for k, values in points:
            ax.plot([k] * len(values), 100 * np.array(values), ".", color=colour)
    ax.set_xticks(sorted({k for points in curves.values() for k, _ in points}))
    ax.set_xlabel("particles K")
    ax.set_ylabel("accuracy, %")
    ax.legend(frameon=False)
    return figure


class Landscapes(NamedTuple):
    """The landscapes of one kind of ensemble.

    Attributes:
      title: The kind, and the data set.
      records: Pairs of a method and its record.
      missing: Why there is no picture of them; empty where there is.
    """

    title: str
    records: list[tuple[str, dict[str, Any]]]
    missing: str = ""


def measure_landscapes(
    cells: Sequence[Cell],
    output: str | os.PathLike,
    scale: str,
    *,
    data_dir: str | None = None,
    show_progress: bool = True,
) -> dict[str, str]:
    """Figure 2: measures the loss around SAM's and OT-MDR's ensembles.

    Both along the same filter-normalised random directions, on test images, as in Li et
    al., 2018. What is measured is read; what was interrupted goes on. What cannot be
    measured keeps no other from it.

    Args:
      cells: The cells of "figure2"; those whose runs are not finished are left out.
      output: The folder of the runs.
      scale: The scale, which says how fine the grid is.
      data_dir: Folder of prepared TFDS data.
      show_progress: Whether to show progress.

    Returns:
      The title of a kind of ensemble -> why it could not be measured.
    """
    plan, failed = surface.Plan(**_PLAN[scale]), {}
    for title, folders in _by_title(cells, output).items():
        paths = list(folders.values())
        if not all(map(run_folder.is_finished, paths)):
            continue
        try:
            surface.check_comparison(paths, paths, plan, data_dir=data_dir)
            for path in paths:
                surface.measure(
                    [path], plan, data_dir=data_dir, show_progress=show_progress
                )
        except (ValueError, OSError) as error:
            failed[title] = str(error)
    return failed


def landscapes(
    cells: Sequence[Cell],
    output: str | os.PathLike,
    scale: str,
    failed: Mapping[str, str] | None = None,
) -> list[Landscapes]:
    """Reads what :func:`measure_landscapes` has measured so far.

    Args:
      cells: The cells of "figure2".
      output: The folder of the runs.
      scale: The scale: landscapes of other points or examples are not shown.
      failed: What it returned.
    """
    plan, found = surface.Plan(**_PLAN[scale]), []
    for title, folders in _by_title(cells, output).items():
        missing, records = (failed or {}).get(title, ""), []
        unfinished = [
            method
            for method, path in folders.items()
            if not run_folder.is_finished(path)
        ]
        if not missing and unfinished:
            missing = f"the first seed of {' and '.join(unfinished)} is not finished."
        if not missing:
            read = {method: _read(path, plan) for method, path in folders.items()}
            records = [(method, one) for method, one in read.items() if one is not None]
            if len(records) < len(read):
                missing = "the landscapes are not all measured yet."
            elif not any(pictures.is_finite(one) for _, one in records):
                missing = "no loss is finite."
        found.append(Landscapes(title, [] if missing else records, missing))
    return found


def _read(folder, plan):
    """The landscape of a plan; None where there is none, or only another one."""
    try:
        found = surface.read(folder)
    except ValueError:  # measuring it says what is wrong
        return None
    if found is None:
        return None
    theirs = found["kind"], found["split"], found["num_examples"]
    same = theirs == (plan.kind, plan.split, plan.num_examples)
    return found if same and {plan.points} == set(map(len, found["axes"])) else None


def landscape_examples(scale: str) -> int:
    """The images that a landscape's losses are of, over all of its points."""
    plan = _PLAN[scale]
    return plan["points"] ** 2 * plan["num_examples"]


def _by_title(cells, output):
    """{title: {method: the folder of the first seed}}."""
    return {
        f"{part}, {data}": {
            cell.method: pathlib.Path(output) / cell.name / f"{cell.seeds[0]}"
            for cell in group
        }
        for (part, data), group in grouped(
            cells, lambda cell: (cell.part, cell.data)
        ).items()
    }


def landscape(shown: Landscapes) -> Any:
    """A picture of ensembles side by side, on one scale."""
    return pictures.contour_figure(shown.records)
