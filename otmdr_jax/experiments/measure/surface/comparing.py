"""Checks that the landscapes of several runs can be compared side by side."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from otmdr_jax.experiments.measure.surface import measuring, solutions
from otmdr_jax.experiments.measure.surface.plan import Plan
from otmdr_jax.io.files import check_writable


def check_comparison(
    folders: Sequence[str | os.PathLike],
    targets: Sequence[str | os.PathLike],
    plan: Plan,
    *,
    data_dir: str | None = None,
    overwrite: bool = False,
) -> None:
    """Checks every run of a comparison before the first one is measured.

    It opens the runs one after the other, as the measurement will, so that memory holds
    one run at a time. A comparison needs the same examples, whatever else the runs were
    trained on, and the same directions, hence weights of the same shapes.

    Args:
      folders: Folders of the runs.
      targets: Folders of their landscapes, in the same order.
      plan: The plan of each landscape, of kind "random" or "hessian".
      data_dir: Folder of prepared TFDS data, if it has moved since the runs.
      overwrite: Whether landscapes of other settings may be replaced.

    Raises:
      FileNotFoundError, FileExistsError: See
        :func:`otmdr_jax.experiments.measure.surface.measure`.
      ValueError: See there; also if two runs differ in their examples or in the shapes
        of their weights.
    """
    for target in targets:
        check_writable(pathlib.Path(target))
    first: _Compared | None = None
    for folder, target in zip(folders, targets, strict=True):
        other = _open(folder, target, plan, data_dir, overwrite)
        first = first or other
        both = f"{folders[0]} and {folder}"
        if first.shapes != other.shapes:
            raise ValueError(
                f"{both} have weights of different shapes ({first.network}; "
                f"{other.network}), so they share no direction: only runs of one "
                "architecture and one number of members can be compared. Show each by "
                "itself: otmdr landscape RUN."
            )
        if first.examples != other.examples:
            raise ValueError(
                f"{both} have different examples in their {plan.split} sets "
                f"({first.data}; {other.data}), but losses can only be compared on the "
                "same ones. Runs that were trained on other images or labels may share "
                "a test set: --split test."
            )


class _Compared(NamedTuple):
    """The properties that compared runs must share, and their names for errors."""

    shapes: Any
    examples: int
    network: str
    data: str


def _open(folder, target, plan, data_dir, overwrite) -> _Compared:
    """Opens a run and keeps only what the comparison needs."""
    opened = measuring.open_runs(
        [folder], plan, target, data_dir=data_dir, overwrite=overwrite
    )
    (solution,) = opened.found
    names = ", ".join(dict.fromkeys(solution.run.config.model.member_names))
    shown = solutions.examples(solution, plan.split, plan.num_examples)
    return _Compared(
        jax.tree.map(np.shape, solution.weights),
        solutions.checksum(tuple(shown)),
        f"{names}, members shown: {len(solution.members)}",
        solution.run.meta["data"],
    )
