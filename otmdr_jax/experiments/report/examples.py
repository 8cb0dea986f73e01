"""The test images that a run got most wrong, and those that it is least sure of."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.reading import Run

COUNT = 12


class Chosen(NamedTuple):
    """Some examples of a test set.

    Attributes:
      rows: (n,) where they are in the set.
      labels: (n,) their classes.
      predicted: (n,) the most probable classes.
      confidence: (n,) the probabilities of those.
    """

    rows: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def worst(run: Run, count: int = COUNT) -> Chosen:
    """The examples whose label the run found least probable, the worst first."""
    return _choose(run, lambda found: -found.log_of_label, count)


def most_uncertain(run: Run, count: int = COUNT) -> Chosen:
    """The examples with the largest entropy of the prediction, the largest first."""
    return _choose(run, metrics.entropy, count)


def examples_figure(
    images: Any,
    chosen: Chosen,
    names: Sequence[str] | None = None,
    *,
    narrow: bool = False,
) -> Any:
    """The images with their class, and what they were taken for.

    Args:
      images: (N, H, W, C) of the whole set, or anything that can be indexed by rows.
      chosen: Which of them.
      names: Of the classes. Default: their numbers.
      narrow: For a phone.

    Returns:
      A `matplotlib.figure.Figure` with an axes for each example, titled
      "LABEL → PREDICTED" and its confidence in percent.

    Raises:
      ImportError: matplotlib is not installed.
    """
    columns = 4 if narrow else 6
    lines = math.ceil(len(chosen.rows) / columns)
    width = plots.NARROW if narrow else plots.WIDTH
    figure = plots.new_figure(width, (width / columns + 0.4) * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    shown = np.asarray(images[chosen.rows])
    for i, ax in enumerate(grid.flat):
        ax.set_axis_off()
        if i >= len(chosen.rows):
            continue
        label, predicted = (
            str(x[i]) if names is None else names[x[i]]
            for x in (chosen.labels, chosen.predicted)
        )
        ax.imshow(_visible(shown[i]), cmap="gray", interpolation="nearest")
        right = "=" if chosen.labels[i] == chosen.predicted[i] else "→"
        ax.set_title(
            plots.plain(f"{label} {right} {predicted}\n{chosen.confidence[i]:.0%}"),
            fontsize=plots.SMALL,
        )
    return figure


def _choose(run: Run, score: Any, count: int) -> Chosen:
    found = metrics.check(run.log_probs, run.labels, log_probs=True)
    rows = np.argsort(-score(found), kind="stable")[:count]
    return Chosen(
        rows, found.labels[rows], found.predicted[rows], found.confidence[rows]
    )


def _visible(image: np.ndarray) -> np.ndarray:
    """An image that matplotlib shows as it is. # (H, W, C) -> (H, W[, 3])."""
    if image.dtype != np.uint8:  # of any scale
        low, high = float(image.min()), float(image.max())
        image = (image - low) / (high - low or 1.0)
    return image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
