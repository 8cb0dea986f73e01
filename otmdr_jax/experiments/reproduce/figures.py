"""The paper's two figures."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

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


def landscapes(
    cells: Sequence[Cell],
    output: str | os.PathLike,
    scale: str,
    *,
    data_dir: str | None = None,
    show_progress: bool = True,
) -> list[list[tuple[str, dict[str, Any]]]]:
    """Figure 2: measures the loss around SAM's and OT-MDR's ensembles.

    Both along the same filter-normalised random directions, on test images, as in Li et
    al., 2018. What is measured is read; what was interrupted goes on.

    Args:
      cells: The cells of "figure2"; those whose runs are not finished are left out.
      output: The folder of the runs.
      scale: The scale, which says how fine the grid is.
      data_dir: Folder of prepared TFDS data.
      show_progress: Whether to show progress.

    Returns:
      For each kind of ensemble, pairs of a label and a record that one picture shows.
    """
    plan = surface.Plan(**_PLAN[scale])
    found = []
    for (part, data), group in grouped(
        cells, lambda cell: (cell.part, cell.data)
    ).items():
        folders = [
            pathlib.Path(output) / cell.name / f"{cell.seeds[0]}" for cell in group
        ]
        if not all(map(run_folder.is_finished, folders)):
            continue
        records = [
            surface.measure(
                [folder], plan, data_dir=data_dir, show_progress=show_progress
            )
            for folder in folders
        ]
        labels = [f"{part}, {data}: {cell.method}" for cell in group]
        found.append(list(zip(labels, records, strict=True)))
    return found


def landscape(records: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    """A picture of ensembles side by side, on one scale."""
    return pictures.contour_figure(
        [(label.rsplit(": ", 1)[1], record) for label, record in records]
    )
