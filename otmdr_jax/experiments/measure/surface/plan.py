"""What slice of which loss is wanted."""

import dataclasses
import math

import numpy as np

from otmdr_jax.experiments.options import Seed, check

KINDS = ("random", "hessian", "runs", "trajectory")
STATISTICS = ("auto", "running", "point")
# Beyond the runs or checkpoints that are shown, on each side, of their extent.
MARGIN = 0.25


@dataclasses.dataclass(frozen=True)
class Plan:
    """What slice of which loss is wanted.

    Attributes:
      kind: "random" (filter-normalised directions), "hessian" (its top eigenvectors),
        "runs" (through two or three runs), "trajectory" (principal components of the
        run's checkpoints).
      points: Points on each axis; 51 as in Li et al., 2018.
      range: The first and last coordinate of each axis. None: -1 to 1, and for "runs"
        and "trajectory" what holds all of them and a quarter more on each side.
      dimensions: 1 for a line, 2 for a plane. None: 2; of "runs" one less than runs.
      split: "train", "validation" or "test".
      num_examples: So many examples of the split, evenly spread; all where it has less.
      seed: The seed of random directions: equal seeds give equal ones before they are
        normalised.
      checkpoint: "latest", "best" on the validation set, or a step.
      member: One member of an ensemble, from 0. None: the loss of the mean probability
        of all of them, along directions of all of their weights.
      statistics: BatchNorm's: "running" (of the run; of several, the first), "point"
        (at each point anew, of all examples that are shown), or "auto": "point" for
        "runs" and "trajectory", along which they change, else "running".

    Raises:
      ValueError: A value is not possible.
    """

    kind: str = "random"
    points: int = 51
    range: tuple[float, float] | None = None
    dimensions: int | None = None
    split: str = "train"
    num_examples: int = 1_000
    seed: int = 0
    checkpoint: str = "latest"
    member: int | None = None
    statistics: str = "auto"

    def __post_init__(self) -> None:
        """Checks every value."""
        for name, known in (
            ("kind", KINDS),
            ("split", ("train", "validation", "test")),
            ("statistics", STATISTICS),
            ("dimensions", (None, 1, 2)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, known))}, got "
                    f"{getattr(self, name)!r}."
                )
        check("seed", self.seed, Seed)
        for name, least in (("points", 2), ("num_examples", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, got {getattr(self, name)}."
                )
        if self.range is not None:
            low, high = self.range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(
                    "range must be two finite numbers, the lower one first, got "
                    f"{low} and {high}."
                )

    def dimensions_of(self, num_runs: int) -> int:
        """The number of axes of a slice of so many runs.

        Raises:
          ValueError: The kind is not for so many runs, or not of these dimensions.
        """
        if self.kind != "runs":
            if num_runs != 1:
                raise ValueError(
                    f"a landscape of kind {self.kind} is one run's, got {num_runs}."
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
                f"{self.dimensions}: leave it out."
            )
        return num_runs - 1

    def axes(self, dimensions: int, shown: np.ndarray | None) -> list[np.ndarray]:
        """The coordinates on each axis.

        Args:
          dimensions: How many axes.
          shown: (n, dimensions) coordinates that must be on them, or None.
        """
        if self.range is not None or shown is None:
            ends = [self.range or (-1.0, 1.0)] * dimensions
        else:
            low, high = shown.min(axis=0), shown.max(axis=0)
            more = MARGIN * (high - low)
            ends = list(zip(low - more, high + more, strict=True))
        return [np.linspace(*both, self.points) for both in ends]
