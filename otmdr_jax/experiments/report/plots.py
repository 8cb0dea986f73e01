"""Shared parts of a report's pictures: colours, panels, legends, files.

A `*_figure` function builds a figure, and its `plot_*` twin writes it to a file; both
raise an ImportError without matplotlib. Figures are built without pyplot, so that they
choose no backend and touch no global state. A panel is a subfigure, so that a page can
place the panels of a drawn figure side by side on a wide screen, and below each other
on a narrow one.
"""

import collections
import math
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.io import extras, files

# Okabe and Ito's colours, distinct with any colour vision; without their yellow, which
# is too pale for lines.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
# A page draws these two in colours of its own, see :mod:`drawing`. What lies on a
# colour map is never one of them.
INK, PAPER = "#000000", "#ffffff"
DARK, LIGHT = "#010101", "#fefefe"
_STYLES = ("-", "--", ":", "-.")  # the second one starts at the eighth label
WIDTH, DPI = 8.0, 150  # inches, dots per inch: 1200 px, the width of a README
ALONE = 5.0  # inches: the width of a single panel
SMALL, LARGE = 8, 9  # points: ticks and legends, labels and titles

# Styles of bars and their legends: right and wrong, accuracy and gap.
RIGHT: dict[str, Any] = {"facecolor": "#56B4E9", "edgecolor": PAPER}
WRONG: dict[str, Any] = {
    "facecolor": "#F7CDB5",
    "edgecolor": "#D55E00",
    "hatch": "////",
}


def new_figure(width: float, height: float) -> Any:
    """Makes an empty figure; width and height are in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib. {extras.command('train')}"
        ) from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def panels(
    count: int, height: Callable[[float], float], most: int = 3
) -> tuple[Any, list[Any]]:
    """Makes a figure of panels.

    Args:
      count: Number of panels.
      height: Function from a panel's width to its height, in inches.
      most: Largest number of panels side by side.

    Returns:
      The figure, and a subfigure for each panel.
    """
    columns = min(most, {1: 1, 2: 2, 4: 2}.get(count, 3))
    rows = math.ceil(count / columns)
    width = ALONE if columns == 1 else WIDTH / columns
    figure = new_figure(width * columns, height(width) * rows)
    every = figure.subfigures(rows, columns, squeeze=False).flat
    return figure, list(every)[:count]


def dress(
    ax: Any, title: str = "", x: str = "", y: str = "", grid: bool = True
) -> None:
    """Gives axes their title and labels, and the common style of a report."""
    # Said where it is, a title's place need not be searched for: a fifth of the time.
    ax.set_title(title, fontsize=LARGE, y=1.0)
    ax.set_xlabel(x, fontsize=LARGE)
    ax.set_ylabel(y, fontsize=LARGE)
    ax.tick_params(labelsize=SMALL, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(alpha=0.25, linewidth=0.6)


def name_of_panel(label: str) -> str:
    """Wraps a label for a panel's title; a panel of 3 inches holds 30 letters."""
    return plain(textwrap.fill(label, 30))


def line_styles(
    names: Iterable[str], places: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Returns the colour and the dashes of each name.

    Args:
      names: The names in a picture.
      places: Place of each name among all of a page, which sets its colour, see
        :func:`labels.places`. Names that share a place differ in their dashes. Default:
        the place in this picture.
    """
    styles, used = [], collections.Counter[int]()
    for i, name in enumerate(names):
        place = i if places is None else places[name]
        dashes = place // len(COLOURS) + used[place]
        used[place] += 1
        styles.append(
            {
                "color": COLOURS[place % len(COLOURS)],
                "linestyle": _STYLES[dashes % len(_STYLES)],
            }
        )
    return styles


def mean_curve(curves: Sequence[dict[int, Any]]) -> dict[int, Any]:
    """Averages curves at the places that all of them have."""
    common = set.intersection(*(set(curve) for curve in curves))
    return {x: np.mean([curve[x] for curve in curves], axis=0) for x in common}


def legend_of_labels(
    figure: Any, groups: dict[str, list[Run]], styles: Sequence[dict[str, Any]]
) -> None:
    """Puts a legend of all labels and their styles under a figure."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=1.6, **style) for style in styles]
    names = [
        plain(f"{label}, n = {len(group)}" if len(group) > 1 else label)
        for label, group in groups.items()
    ]
    legend(figure, handles, names)


def legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Puts a legend under a figure, which grows by the legend's height.

    The legend is no wider than a single panel, so that it fits a narrow screen.
    """
    # About 72 small letters fit into a line; a handle takes the space of seven.
    columns = max(1, min(len(names), 72 // (max(map(len, names)) + 7)))
    rows = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * rows + 0.1)
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
    )


def say(ax: Any, text: str) -> None:
    """Writes a text into empty axes, which get no scale: there is nothing to read."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", fontsize=LARGE)


def plain(text: str) -> str:
    """Escapes dollars, so that matplotlib does not read text as a formula."""
    return text.replace("$", r"\$")


def pool(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs without NaN in their predictions; all must share the classes."""
    classes = sorted({run.log_probs.shape[1] for run in runs})
    if len(classes) > 1:
        raise ValueError(
            f"runs of {runs[0].label!r} predict different numbers of classes: "
            f"{', '.join(map(str, classes))}. Give them different labels."
        )
    return [run for run in runs if not np.isnan(run.log_probs).any()]


def save(figure: Any, path: str | pathlib.Path) -> pathlib.Path:
    """Writes a figure; equal figures give equal bytes."""
    path = pathlib.Path(path)
    metadata = {"Software": None} if path.suffix == ".png" else None
    with files.replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or None, dpi=DPI, metadata=metadata)
    return path
