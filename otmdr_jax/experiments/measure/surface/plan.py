"""The plan of a landscape: its slice and its loss."""

import dataclasses
import math
import typing
from typing import Annotated, Literal

import numpy as np

from otmdr_jax.experiments.options import Count, Must, Seed, check, options_of

Kind = Literal["random", "hessian", "runs", "trajectory"]
Points = Annotated[int, Must("at least 2", lambda n: n >= 2)]
Range = Annotated[
    tuple[float, float],
    Must(
        "two finite numbers, the lower one first",
        lambda ends: all(map(math.isfinite, ends)) and ends[0] < ends[1],
    ),
]
KINDS = typing.get_args(Kind)
# Margin on each side of the runs or checkpoints, as a fraction of their extent.
MARGIN = 0.25


@dataclasses.dataclass(frozen=True)
class Plan:
    """The slice and the loss of a landscape.

    Attributes:
      kind: Directions: "random" (filter-normalised), "hessian" (its top eigenvectors),
        "runs" (through two or three runs), or "trajectory" (principal components of the
        run's checkpoints).
      points: Number of points on each axis; 51 as in Li et al., 2018.
      range: First and last coordinate of each axis. Default: -1 to 1; for "runs" and
        "trajectory", the extent of the runs or checkpoints and a quarter more on each
        side.
      dimensions: Number of axes: 1 for a line, 2 for a plane. Default: 2; for "runs",
        one less than the number of runs.
      split: Part of the data: "train", "validation" or "test".
      num_examples: Largest number of examples of the split, evenly spread.
      seed: Seed of random directions. Equal seeds give equal directions before
        normalisation.
      checkpoint: Name of the checkpoint: "latest", "best" on the validation set, or a
        step.
      member: Index of one member of an ensemble, from 0. Default: the loss of the mean
        probability of all members, along directions of all their weights.
      statistics: BatchNorm's statistics: "running" (those of the run, or of the first
        of several), "point" (computed at each point from all examples of the plan), or
        "auto": "point" for "runs" and "trajectory", along which the statistics change,
        and "running" for the others.

    Raises:
      ValueError: A value is not possible.
    """

    kind: Kind = "random"
    points: Points = 51
    range: Range | None = None
    dimensions: Literal[1, 2] | None = None
    split: Literal["train", "validation", "test"] = "train"
    num_examples: Count = 1_000
    seed: Seed = 0
    checkpoint: str = "latest"
    member: int | None = None
    statistics: Literal["auto", "running", "point"] = "auto"

    def __post_init__(self) -> None:
        """Checks every value."""
        for name, option in options_of(type(self)).items():
            check(name, getattr(self, name), option.kind)

    def dimensions_of(self, num_runs: int) -> int:
        """Returns the number of axes of a slice through `num_runs` runs.

        Raises:
          ValueError: The kind does not take this number of runs, or the runs span
            another number of dimensions.
        """
        if self.kind != "runs":
            if num_runs != 1:
                raise ValueError(
                    f"a landscape of kind {self.kind} is one run's, got {num_runs} "
                    "runs."
                )
            return self.dimensions or 2
        if num_runs not in (2, 3):
            raise ValueError(
                "kind runs needs two runs, for the line through them, or three, for "
                f"their plane; got {num_runs}."
            )
        if self.dimensions not in (None, num_runs - 1):
            raise ValueError(
                f"{num_runs} runs span {num_runs - 1} dimensions, got dimensions="
                f"{self.dimensions}: leave the option out."
            )
        return num_runs - 1

    def axes(self, dimensions: int, shown: np.ndarray | None) -> list[np.ndarray]:
        """Returns the coordinates on each axis.

        Args:
          dimensions: Number of axes.
          shown: (n, dimensions) coordinates that the axes must cover, or None.
        """
        if self.range is not None or shown is None:
            ends = [self.range or (-1.0, 1.0)] * dimensions
        else:
            low, high = shown.min(axis=0), shown.max(axis=0)
            more = MARGIN * (high - low)
            ends = list(zip(low - more, high + more, strict=True))
        return [np.linspace(*both, self.points) for both in ends]
