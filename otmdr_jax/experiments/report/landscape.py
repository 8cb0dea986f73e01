"""Pictures of loss landscapes: contours, surfaces, lines.

Several landscapes share their axes and their colour scale, so that equal colours mean
equal losses. A record is the result of
:func:`otmdr_jax.experiments.measure.surface.measure`, as in a run's landscape.json.
Figures take pairs of a label and a record.
"""

import copy
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.labels import grouped

Record = Mapping[str, Any]
Labelled = tuple[str, Record]

# Explanations of the axes, by the kind of landscape.
MEANINGS = {
    "random": "Random directions; at 1 each filter has moved by its own norm.",
    "hessian": "Top eigenvectors of the Hessian; axes are distances in weight space.",
    "runs": "Between runs; the unit is the distance between the first two.",
    "trajectory": "Directions along which a run's checkpoints vary most; axes are "
    "distances in weight space.",
}
# Its lightness rises evenly, and its colours are distinct with any colour vision.
COLOUR_MAP = "viridis"
_LEVELS = 25
# The scale is logarithmic if the largest loss exceeds 10 times the smallest. It then
# starts at 1e-6 of the largest at least, because a loss may be 0.
_WIDE, _SMALLEST = 10.0, 1e-6
_NAN = "#BBBBBB"  # colour of losses that are not finite
_MARKERS = ("o", "s", "^", "D", "v")


def plot_landscape(
    records: Sequence[Labelled], path: str | pathlib.Path, *, surface: bool = False
) -> pathlib.Path:
    """Draws landscapes: lines for one dimension, contours or surfaces for two.

    Args:
      records: Pairs of a label and a record.
      path: File of the picture; its suffix sets the format.
      surface: Whether to draw surfaces in three dimensions instead of contours.

    Returns:
      The path.

    Raises:
      ValueError: There are no records, their dimensions differ, or no loss is finite.
    """
    if len(_checked(records, None)[0][1]["axes"]) == 1:
        return plots.save(line_figure(records), path)
    return plots.save((surface_figure if surface else contour_figure)(records), path)


def comparable(records: Sequence[Labelled]) -> list[list[Labelled]]:
    """Groups landscapes that can be compared side by side.

    Args:
      records: Pairs of a label and a record.

    Returns:
      Lists of pairs. The records of a list share the kind, the number of axes, the data
      and the examples; for random directions also the seed. Landscapes of the kinds
      "runs" and "trajectory" lie in planes of their own, so each forms its own list.
      Landscapes without a finite loss are left out.
    """

    def plane(i: int) -> Any:
        record = records[i][1]
        alone = i if record["kind"] in ("runs", "trajectory") else None
        seed = record["seed"] if record["kind"] == "random" else None
        same = (record[name] for name in ("kind", "split", "num_examples"))
        # Older records have none. What is last depends on how images are read.
        data = record.get("settings", {}).get("data", "").rpartition("-")[0]
        return alone, seed, len(record["axes"]), data, *same

    known = [i for i, (_, record) in enumerate(records) if is_finite(record)]
    return [[records[i] for i in group] for group in grouped(known, plane).values()]


def is_finite(record: Record) -> bool:
    """Returns whether any loss of a landscape is finite; null in JSON means NaN."""
    return bool(np.isfinite(np.array(record["losses"], np.float64)).any())


def contour_figure(records: Sequence[Labelled]) -> Any:
    """Draws the contours of two-dimensional landscapes, one panel for each.

    Args:
      records: Pairs of a label and a record.

    Returns:
      A `matplotlib.figure.Figure`: axes with gid "landscape:LABEL", and equal colour
      bars in nats. Losses that are not finite are grey.

    Raises:
      ValueError: There are no records, one does not have two dimensions, or no loss is
        finite.
    """
    found = _checked(records, 2)
    scale = _Scale([losses for _, _, losses in found])
    figure, parts = plots.panels(len(found), lambda width: 0.88 * width, most=2)
    for part, (label, record, losses) in zip(parts, found, strict=True):
        ax = part.subplots()
        ax.set_gid(f"landscape:{label}")
        ax.set_facecolor(_NAN)
        shown = np.ma.masked_invalid(scale.clip(losses)).T  # columns are x
        filled = ax.contourf(
            *record["axes"],
            shown,
            levels=scale.levels,
            norm=scale.norm(),
            cmap=COLOUR_MAP,
        )
        lines = {"colors": plots.LIGHT, "linewidths": 0.4, "alpha": 0.6}
        ax.contour(*record["axes"], shown, levels=scale.levels[::2], **lines)
        _mark(ax, record)
        x, y = (plots.plain(textwrap.fill(x, 36)) for x in record["axis_names"])
        plots.dress(ax, _title(label, record), x, y, grid=False)
        _set_limits(ax, found)
        bar = part.colorbar(filled, ax=ax, shrink=0.9)
        scale.label(bar.ax, "y", bar)
    _legend(figure, figure.axes[0])
    return figure


def surface_figure(records: Sequence[Labelled]) -> Any:
    """Draws two-dimensional landscapes as surfaces, one panel for each.

    Args:
      records: Pairs of a label and a record.

    Returns:
      A `matplotlib.figure.Figure`: three-dimensional axes with gid "surface:LABEL",
      whose height is the loss.

    Raises:
      ValueError: There are no records, one does not have two dimensions, or no loss is
        finite.
    """
    found = _checked(records, 2)
    scale = _Scale([losses for _, _, losses in found])
    figure, parts = plots.panels(len(found), lambda width: 0.85 * width, most=2)
    from matplotlib import cm, ticker

    for part, (label, record, losses) in zip(parts, found, strict=True):
        ax = part.add_subplot(projection="3d")
        ax.set_gid(f"surface:{label}")
        x, y = np.meshgrid(*record["axes"], indexing="ij")
        low, high = scale.height(np.array(scale.ends))
        ax.plot_surface(
            x,
            y,
            scale.height(losses),
            cmap=COLOUR_MAP,
            vmin=low,
            vmax=high,
            rcount=80,
            ccount=80,
            linewidth=0.15,
            edgecolor=(0, 0, 0, 0.25),
            rasterized=True,  # thousands of faces would make a page of megabytes
        )
        ax.set_title(_title(label, record), fontsize=plots.LARGE, y=1.0)
        ax.set_zlim(low, high)
        _set_limits(ax, found)
        # The unit gets its own line, because three axes leave little room.
        names = [plots.plain(x).replace(" (", "\n(") for x in record["axis_names"]]
        ax.set_xlabel(names[0], fontsize=plots.SMALL, labelpad=8)
        ax.set_ylabel(names[1], fontsize=plots.SMALL, labelpad=8)
        ax.tick_params(labelsize=plots.SMALL - 1, pad=3)
        scale.label(ax, "z")
        ax.set_zlabel("")  # the colour bar has this label
        for axis in (ax.xaxis, ax.yaxis):
            # No ticks at the ends, where those of two axes would overlap.
            axis.set_major_locator(ticker.MaxNLocator(4, prune="both"))
        ax.view_init(elev=28, azim=-60)
        ax.set_box_aspect((4, 4, 3), zoom=0.8)
        colours = cm.ScalarMappable(scale.norm(), COLOUR_MAP)
        bar = part.colorbar(colours, ax=ax, shrink=0.6, pad=0.08)
        scale.label(bar.ax, "y", bar)
    return figure


def line_figure(
    records: Sequence[Labelled], *, places: Mapping[str, int] | None = None
) -> Any:
    """Draws one-dimensional landscapes as lines on the same axes.

    Args:
      records: Pairs of a label and a record.
      places: Places that set the colours, see :func:`labels.places`. Default: those in
        this picture.

    Returns:
      A `matplotlib.figure.Figure` of one axes. A line's gid is "landscape:LABEL"; the
      line has gaps where the loss is not finite.

    Raises:
      ValueError: There are no records, one does not have one dimension, or no loss is
        finite.
    """
    found = _checked(records, 1)
    scale = _Scale([losses for _, _, losses in found])
    figure = plots.new_figure(plots.ALONE, 3.6)
    ax = figure.subplots()
    styles = plots.line_styles([label for label, _ in records], places)
    for (label, record, losses), own in zip(found, styles, strict=True):
        axis = np.asarray(record["axes"][0])
        shown = np.where(np.isfinite(losses), losses, np.nan)
        name, gid = plots.plain(_with_details(label, record)), f"landscape:{label}"
        ax.plot(axis, shown, gid=gid, label=name, linewidth=1.6, **own)
        for j, (name, at) in enumerate(_points(record) if record["points"] else ()):
            style = {"color": plots.INK, "markersize": 5, **_marker(j, name)}
            ax.plot(at, np.interp(at, axis, shown), **style)
    ax.set_yscale("log" if scale.wide else "linear")
    plots.dress(ax, x=plots.plain(textwrap.fill(found[0][1]["axis_names"][0], 45)))
    scale.label(ax, "y")
    ax.set_xlim(_limits(found)[0])
    _legend(figure, ax)
    return figure


class _Scale:
    """The common scale of losses of all panels, logarithmic for a wide range."""

    def __init__(self, losses: Sequence[np.ndarray]):
        finite = np.concatenate([x[np.isfinite(x)] for x in losses])
        if not len(finite):
            raise ValueError("no loss of these landscapes is finite: nothing to draw.")
        low, high = float(finite.min()), float(finite.max())
        self.wide = low >= 0 and high > _WIDE * low and high > 0
        if self.wide:
            low = max(low, _SMALLEST * high)
        if not high > low:  # constant losses: take an interval around them
            low, high = low - 0.5, high + 0.5
        self.ends = low, high
        spaced = np.geomspace if self.wide else np.linspace
        self.levels = spaced(low, high, _LEVELS)
        self.levels[[0, -1]] = low, high  # rounding must not exclude a point

    def clip(self, losses: np.ndarray) -> np.ndarray:
        return np.clip(np.where(np.isfinite(losses), losses, np.nan), *self.ends)

    def height(self, losses: np.ndarray) -> np.ndarray:
        """Returns heights; matplotlib has no logarithmic axes in three dimensions."""
        return np.log10(self.clip(losses)) if self.wide else self.clip(losses)

    def norm(self) -> Any:
        from matplotlib import colors

        return (colors.LogNorm if self.wide else colors.Normalize)(*self.ends)

    def ticks(self) -> list[float]:
        """Returns powers of ten; over few decades also 2 and 5 times powers of ten."""
        low, high = (math.log10(x) for x in self.ends)
        factors = (1, 2, 5) if high - low < 2.5 else (1,)
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [f * 10.0**p for p in powers for f in factors]
        return [x for x in found if self.ends[0] <= x <= self.ends[1]]

    def label(self, ax: Any, side: str, bar: Any = None) -> None:
        """Puts ticks in nats on an axis or a colour bar."""
        from matplotlib import ticker

        if self.wide:
            ticks = self.ticks()
            names = [f"{x:g}" for x in ticks]
            if bar is not None:
                bar.set_ticks(ticks, labels=names)
                bar.ax.minorticks_off()
            elif side == "z":
                ax.set_zticks(np.log10(ticks), labels=names)
            else:
                ax.set_yticks(ticks, labels=names)
        elif bar is not None:  # round numbers, not the limits of the contours
            bar.set_ticks(ticker.MaxNLocator(8))
        getattr(ax, f"set_{side}label")("Mean loss (nats)", fontsize=plots.SMALL)
        ax.tick_params(labelsize=plots.SMALL)


def _checked(
    records: Sequence[Labelled], dimensions: int | None
) -> list[tuple[str, Record, np.ndarray]]:
    """Checks records; returns label, record and losses, where null becomes NaN."""
    if not records:
        raise ValueError("there must be at least one landscape to draw.")
    each = {len(record["axes"]) for _, record in records}
    if len(each) > 1 or (dimensions is not None and each != {dimensions}):
        raise ValueError(
            f"landscapes must have {dimensions or 'equal'} dimensions to be drawn "
            f"together, got {', '.join(map(str, sorted(each)))}."
        )
    return [
        (label, record, np.array(record["losses"], np.float64))
        for label, record in records
    ]


def _limits(records: Any) -> list[tuple[float, float]]:
    """Returns the limits of each axis over all records."""
    every = zip(*(record["axes"] for _, record, _ in records), strict=True)
    return [(min(x[0] for x in each), max(x[-1] for x in each)) for each in every]


def _set_limits(ax: Any, records: Any) -> None:
    """Gives two-dimensional axes limits that hold all records."""
    x, y = _limits(records)
    ax.set_xlim(x)
    ax.set_ylim(y)


def _points(record: Record) -> list[tuple[str, np.ndarray]]:
    """Returns name and coordinates of each solution; a single one is at the origin."""
    if record["points"] is None:
        return [("Solution", np.zeros(len(record["axes"])))]
    points = np.asarray(record["points"], np.float64)
    if record["kind"] != "trajectory":
        return list(zip(record["labels"], points, strict=True))
    first, last = record["labels"][0], record["labels"][-1]
    return [(f"{first} (first)", points[0]), (f"{last} (last)", points[-1])]


def _mark(ax: Any, record: Record) -> None:
    """Marks solutions, and the path of a trajectory."""
    white = {"color": plots.LIGHT, "markeredgecolor": plots.DARK}
    if record["kind"] == "trajectory":
        line = {"marker": "o", "markersize": 3, "markeredgewidth": 0.4}
        path = np.asarray(record["points"], np.float64).T
        ax.plot(*path, linewidth=1.2, label="Checkpoints", **line, **white)
    for j, (name, at) in enumerate(_points(record)):
        ax.plot(*at[:, None], markersize=7, **_marker(j, name), **white)


def _marker(j: int, name: str) -> dict[str, Any]:
    """Returns marker and legend text of the j-th solution."""
    marker = _MARKERS[j % len(_MARKERS)]
    return {"linestyle": "", "marker": marker, "label": plots.plain(name)}


def _with_details(label: str, record: Record) -> str:
    """Adds eigenvalues or the explained variance of a record to its label."""
    if record.get("eigenvalues"):
        values = ", ".join(f"{x:.3g}" for x in record["eigenvalues"])
        return f"{label}\nEigenvalues {values}"
    if record.get("explained_variance"):
        shares = " + ".join(f"{100 * x:.0f} %" for x in record["explained_variance"])
        return f"{label}\n{shares} of the variance"
    return label


def _title(label: str, record: Record) -> str:
    return _with_details(plots.name_of_panel(label), record)


def _legend(figure: Any, ax: Any) -> None:
    handles, names = ax.get_legend_handles_labels()
    handles = [copy.copy(handle) for handle in handles]
    for handle in handles:
        if handle.get_color() == plots.LIGHT and handle.get_linestyle() != "None":
            handle.set(color="#888888", markerfacecolor=plots.LIGHT)  # on any paper
    plots.legend(figure, handles, [textwrap.fill(name, 45) for name in names])
