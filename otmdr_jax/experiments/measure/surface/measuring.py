"""Measures the loss of runs on a line or plane in weight space."""

import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from otmdr_jax import landscape
from otmdr_jax.experiments.interrupts import Interrupted
from otmdr_jax.experiments.measure.surface import solutions
from otmdr_jax.experiments.measure.surface.files import Files
from otmdr_jax.experiments.measure.surface.plan import Plan
from otmdr_jax.experiments.measure.surface.solutions import Solution
from otmdr_jax.experiments.programs import check_same_data, environment
from otmdr_jax.io.files import check_writable
from otmdr_jax.io.progress import Progress

PyTree = Any

# The most work that a killed process loses.
SECONDS_A_SAVE = 5.0


class _Slice(NamedTuple):
    """The points at which losses are measured, and their description."""

    origin: PyTree
    directions: Sequence[PyTree]
    points: np.ndarray | None
    labels: list[str] | None
    names: list[str]  # of the axes
    explained: list[float] | None = None
    eigenvalues: list[float] | None = None


class Opened(NamedTuple):
    """Runs that are loaded and ready to be measured.

    Attributes:
      found: The runs.
      dimensions: Number of axes of the slice.
      steps: Steps of a trajectory's checkpoints; empty for other kinds.
      path: Weights of these checkpoints.
      statistics: BatchNorm's statistics, "running" or "point"; None for a network
        without BatchNorm.
      loss: The loss as a function of weights, and its batches.
      num_examples: Number of examples in the batches.
      files: Files of the landscape, checked to hold nothing of other settings.
    """

    found: list[Solution]
    dimensions: int
    steps: list[int]
    path: list[PyTree]
    statistics: str | None
    loss: tuple[Any, list[Any]]
    num_examples: int
    files: Files


def measure(
    folders: Sequence[str | os.PathLike],
    plan: Plan,
    output: str | os.PathLike | None = None,
    *,
    data_dir: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Measures the loss on a line or plane through one run or several.

    An interrupted measurement resumes where it stopped, with the same bits. A finished
    one of the same settings and weights is read instead of measured again.

    Args:
      folders: Folder of one run; for the kind "runs", folders of two or three runs of
        one architecture and data set.
      plan: The slice and the loss to measure.
      output: Folder of the files. Default: the run's own.
      data_dir: Folder of prepared TFDS data, if it has moved since the runs.
      overwrite: Whether to replace a landscape of other settings, and to measure the
        same one again.
      show_progress: Whether to show progress.

    Returns:
      The record, as in landscape.json: kind, split, num_examples, step, seed, axes (one
      or two lists of coordinates), axis_names (with their units), losses (nats, one
      list for each coordinate of the first axis), points (coordinates of runs or
      checkpoints, or None) and their labels, explained_variance (of "trajectory"),
      eigenvalues (of "hessian"), statistics (BatchNorm's; None without BatchNorm),
      members, runs, model, method, seconds, settings, and the fields of
      :func:`otmdr_jax.experiments.programs.environment`.

    Raises:
      FileNotFoundError: A folder is no run, or has no such checkpoint.
      FileExistsError: The output folder holds a landscape of other settings, or foreign
        files of the same names.
      ValueError: The plan is not possible for these runs.
      Interrupted: The user pressed Ctrl-C; the losses so far are saved.
    """
    opened = open_runs(folders, plan, output, data_dir=data_dir, overwrite=overwrite)
    done, found, first = opened.files, opened.found, opened.found[0]
    if (record := done.finished) is not None:
        return record
    chosen = _slice(
        plan, opened.dimensions, found, opened.steps, opened.path, opened.loss
    )
    axes = plan.axes(opened.dimensions, chosen.points)
    loss_sum, batches = opened.loss
    losses, seconds = _grid(
        done, (loss_sum, chosen.origin, batches, chosen.directions), axes, show_progress
    )
    config = first.run.config
    names = config.model.member_names
    record = {
        "kind": plan.kind,
        "split": plan.split,
        "num_examples": opened.num_examples,
        "step": first.step,
        "seed": plan.seed,
        "axes": [axis.tolist() for axis in axes],
        "axis_names": chosen.names,
        "losses": losses.tolist(),
        "points": None if chosen.points is None else chosen.points.tolist(),
        "labels": chosen.labels,
        "explained_variance": chosen.explained,
        "eigenvalues": chosen.eigenvalues,
        "statistics": opened.statistics,
        "members": list(first.members) if config.model.members is not None else None,
        "runs": [str(solution.run.folder) for solution in found],
        "model": names[0] if config.model.members is None else names,
        "method": config.method.name,
        "seconds": seconds,
        "settings": done.settings,
        **environment(),
    }
    done.finish(record, axes, losses, chosen.points)
    return record


def open_runs(
    folders: Sequence[str | os.PathLike],
    plan: Plan,
    output: str | os.PathLike | None,
    *,
    data_dir: str | None,
    overwrite: bool,
) -> Opened:
    """Loads the runs for :func:`measure`, and makes every check that needs no grid.

    Its arguments and errors are those of :func:`measure`.
    """
    dimensions = plan.dimensions_of(len(folders))
    if output is None and len(folders) > 1:
        raise ValueError("a landscape of several runs needs an output folder.")
    target = pathlib.Path(folders[0] if output is None else output)
    check_writable(target)
    found = [solutions.open_solution(folder, plan, data_dir) for folder in folders]
    _check_alike(found)
    first = found[0]
    steps: list[int] = []
    path: list[PyTree] = []
    if plan.kind == "trajectory":
        steps, path = solutions.checkpoints_of(first, dimensions)
    statistics = _statistics(plan, first)
    loss_sum, batches, count = solutions.objective(
        first, plan.split, plan.num_examples, statistics == "point"
    )
    settings = {
        "kind": plan.kind,
        "dimensions": dimensions,
        "points": plan.points,
        "range": plan.range and list(plan.range),
        "split": plan.split,
        "num_examples": count,
        "seed": plan.seed if plan.kind == "random" else None,
        "statistics": statistics,
        "steps": steps or [solution.step for solution in found],
        "members": [list(solution.members) for solution in found],
        "data": first.run.meta["data"],
        "weights": solutions.checksum(
            [(x.weights, x.model_state) for x in found], path
        ),
    }
    files = Files(target, settings, overwrite)
    loss = loss_sum, batches
    return Opened(found, dimensions, steps, path, statistics, loss, count, files)


def _check_alike(found: Sequence[Solution]) -> None:
    first = found[0]
    for other in found[1:]:
        folders = f"{first.run.folder} and {other.run.folder}"
        data = other.run.meta["data"]
        check_same_data(data, first.run.meta["data"], other.run.folder)
        one, two = (
            first.run.config.model.member_names,
            other.run.config.model.member_names,
        )
        if first.network != other.network or len(first.members) != len(other.members):
            raise ValueError(
                f"{folders} must be of one architecture, with equal model options, to "
                f"share one weight space; got {', '.join(one)} and {', '.join(two)}, "
                f"with {len(first.members)} and {len(other.members)} members."
            )


def _statistics(plan: Plan, solution: Solution) -> str | None:
    """Chooses BatchNorm's statistics; None for a network without BatchNorm."""
    if not jax.tree.leaves(solution.model_state):
        return None
    if plan.statistics != "auto":
        return plan.statistics
    return "point" if plan.kind in ("runs", "trajectory") else "running"


def _slice(plan, dimensions, found, steps, path, loss) -> _Slice:
    first = found[0]
    axes = range(1, dimensions + 1)
    if plan.kind == "random":
        return _Slice(
            first.weights,
            solutions.random_directions(first, plan.seed, dimensions),
            None,
            None,
            [f"Random direction {i} (norms of the filters)" for i in axes],
        )
    if plan.kind == "hessian":
        loss_sum, batches = loss
        top = landscape.hessian_eigenvalues(
            loss_sum, first.weights, batches, k=dimensions
        )
        names = [f"Eigenvector {i} (distance in weight space)" for i in axes]
        values = top.values.tolist()
        return _Slice(first.weights, top.vectors, None, None, names, eigenvalues=values)
    if plan.kind == "runs":
        plane = landscape.through(*(solution.weights for solution in found))
        labels = [solution.run.folder.name for solution in found]
        if len(set(labels)) < len(labels):
            labels = [str(solution.run.folder) for solution in found]
        names = [f"From {labels[0]} to {labels[1]} (their distance)"]
        if dimensions == 2:
            names.append(f"Towards {labels[2]} (same unit)")
        return _Slice(plane.origin, plane.directions, plane.points, labels, names)
    plane = landscape.trajectory_plane(path, dimensions)
    names = [f"Principal component {i} (distance in weight space)" for i in axes]
    return _Slice(
        plane.origin,
        plane.directions,
        plane.points,
        [f"step {step}" for step in steps],
        names,
        np.asarray(plane.explained).tolist(),
    )


def _grid(
    files: Files,
    arguments: tuple[Any, Any, Any, Any],
    axes: Sequence[np.ndarray],
    show_progress: bool,
) -> tuple[np.ndarray, float]:
    """Returns the losses, and the seconds that they took in total."""
    known, seconds, at_once = files.known
    if at_once is None:
        at_once = landscape.points_at_once(*arguments)
    total = int(np.prod([len(axis) for axis in axes]))
    before = len(known)
    began = saved = time.monotonic()
    title = f"landscape of {files.folder}"
    with Progress(total, before, title, show_progress, "points") as bar:
        if before:
            bar.say(f"resuming from {before} of {total} points")

        def spent():
            return seconds + time.monotonic() - began

        def report(losses):
            nonlocal known, saved
            if len(known) == before:
                bar.restart(len(losses))  # the time before was compilation
            known = losses
            bar.update(len(losses), {"lowest loss": float(np.fmin.reduce(losses))})
            if time.monotonic() - saved > SECONDS_A_SAVE:
                files.save(known, spent(), at_once)
                saved = time.monotonic()

        try:
            losses = landscape.loss_grid(
                *arguments, axes, at_once=at_once, known=known, report=report
            )
        except KeyboardInterrupt as stop:
            files.save(known, spent(), at_once)
            raise Interrupted(
                f"stopped at {len(known)} of {total} points, which are in "
                f"{files.partial}. The same command goes on from there.",
                2,
            ) from stop
    return losses, spent()
