"""Test images with the worst predictions, and with the most uncertain ones."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.data import Dataset
from otmdr_jax.experiments import programs
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.labels import by_label, class_names, name_of
from otmdr_jax.experiments.report.reading import Run

COUNT, _COLUMNS = 12, 6
_TITLE = 0.4  # inches above an image
# Options of a run that name its test images and where they are.
_DATA = ("data", "data_dir", "cache_dir", "image_size", "data_seed")


class Shown(NamedTuple):
    """A run and the images of its test set, if they can be read.

    Attributes:
      run: The run.
      name: Name of the run.
      images: (N, H, W, C) images of its test set; None if they cannot be read.
      why: Reason for missing images; empty if there are images.
    """

    run: Run
    name: str
    images: Any
    why: str = ""


class Chosen(NamedTuple):
    """Some examples of a test set.

    Attributes:
      rows: (n,) indices in the set.
      labels: (n,) classes.
      predicted: (n,) most probable classes.
      confidence: (n,) probabilities of the most probable classes.
      names: C texts, what the classes are called.
    """

    rows: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    names: Sequence[str]


def worst(run: Run, count: int = COUNT) -> Chosen:
    """Chooses the examples whose label has the lowest probability, the worst first."""
    return _choose(run, lambda found: -found.log_of_label, count)


def most_uncertain(run: Run, count: int = COUNT) -> Chosen:
    """Chooses the examples whose prediction has the largest entropy, largest first."""
    return _choose(run, metrics.entropy, count)


def of_labels(runs: Sequence[Run], data_dir: str | None = None) -> list[Shown]:
    """Returns the first run of each label, with the images of its test set.

    Args:
      runs: The runs.
      data_dir: Where the data are now; None for where they were.
    """
    # Methods share a data set; the next page reads it again, as files change.
    load = functools.cache(programs.load_data)
    shown = []
    for group in by_label(runs).values():
        run = next(iter(plots.pool(group)), group[0])
        name = name_of(run, runs)
        if not plots.pool([run]):
            why = f"{run.label}: its predictions are not finite."
            shown.append(Shown(run, name, None, why))
            continue
        try:
            shown.append(Shown(run, name, _test_images(run, load, data_dir)))
        except (ValueError, TypeError, OSError, ImportError) as error:
            shown.append(Shown(run, name, None, f"{name}: {error}"))
    return shown


def _test_images(
    run: Run, load: Callable[[TrainConfig], Dataset], data_dir: str | None
) -> Any:
    """Reads the images of a run's test set; an error says why it cannot."""
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in run.config.items()
        if name in _DATA and value is not None
    }
    if "data" not in options:
        raise ValueError("its configuration names no data.")
    if data_dir is not None:
        options["data_dir"] = data_dir
    try:
        dataset = load(TrainConfig(**options))
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ValueError(f"its images cannot be read: {error}") from error
    same = list(dataset.test.labels) == list(run.labels)
    if run.data is not None:
        here = programs.fingerprint_of_test(dataset)
        same = same and programs.same_data(run.data["test_fingerprint"], here)
    if not same:
        raise ValueError("the data here differ from its test set.")
    return dataset.test.images


def examples_figure(images: Any, chosen: Chosen) -> Any:
    """Draws images with their true and their predicted class.

    Args:
      images: (N, H, W, C) images of the whole set, or any object that rows can index.
      chosen: The examples to draw.

    Returns:
      A `matplotlib.figure.Figure` with a panel for each example, titled
      "LABEL → PREDICTED" and its confidence in percent.
    """
    from matplotlib.image import BboxImage
    from matplotlib.transforms import Bbox, TransformedBbox

    width = plots.WIDTH / _COLUMNS
    height = width + _TITLE
    rows = math.ceil(len(chosen.rows) / _COLUMNS)
    figure = plots.new_figure(plots.WIDTH, height * rows)
    # All panels are alike: there is no layout to search for.
    figure.set_layout_engine("none")
    parts = figure.subfigures(rows, _COLUMNS, squeeze=False, wspace=0, hspace=0).flat
    shown = np.asarray(images[chosen.rows])
    # All of a set are of one shape: the longer side fills the panel.
    share = np.array(shown.shape[2:0:-1]) / max(shown.shape[1:3])  # across, up
    across, up = share * (0.92, 0.96 * width / height)
    for i, part in zip(range(len(shown)), parts, strict=False):
        # Without axes, which take most of the time of a page of images.
        place = Bbox.from_bounds(0.5 - across / 2, 0.02, across, up)
        image = BboxImage(
            TransformedBbox(place, part.transSubfigure),
            cmap="gray",
            interpolation="nearest",
            origin="upper",
        )
        image.set_data(_visible(shown[i]))
        part.add_artist(image)
        label, predicted = chosen.labels[i], chosen.predicted[i]
        names = (chosen.names[label], chosen.names[predicted])
        right = "=" if label == predicted else "→"
        part.text(
            0.5,
            place.y1 + 0.03,
            plots.plain(f"{names[0]} {right} {names[1]}\n{chosen.confidence[i]:.0%}"),
            fontsize=plots.SMALL,
            ha="center",
            va="bottom",
        )
    return figure


def _choose(run: Run, score: Any, count: int) -> Chosen:
    found = metrics.check(run.log_probs, run.labels, log_probs=True)
    rows = np.argsort(-score(found), kind="stable")[:count]
    return Chosen(
        rows,
        found.labels[rows],
        found.predicted[rows],
        found.confidence[rows],
        class_names([run], found.shape[1]),
    )


def _visible(image: np.ndarray) -> np.ndarray:
    """Converts an image for matplotlib. # (H, W, C) -> (H, W[, 3])."""
    if image.dtype != np.uint8:  # floats may have any scale
        low, high = float(image.min()), float(image.max())
        image = (image - low) / (high - low or 1.0)
    return image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
