"""Pictures of loss landscapes: contours, surfaces, lines.

Several landscapes stand side by side on the same axes and one scale of colours, so that
equal colours are equal losses. What they are made of is a record as in a run's
landscape.json: see :func:`otmdr_jax.experiments.measure.surface.measure`.
"""

import copy
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from otmdr_jax.experiments.report.plots import (
    LARGE,
    NARROW,
    SMALL,
    legend,
    line_style,
    new_figure,
    plain,
    save,
)

Record = Mapping[str, Any]
Labelled = tuple[str, Record]

# A kind -> its axes in words.
MEANINGS = {
    "random": "Random directions; at 1 each filter has moved by its own norm.",
    "hessian": "Top eigenvectors of the Hessian; axes are distances in weight space.",
    "runs": "Between runs; the unit is the distance of the first two.",
    "trajectory": "The plane along which a run's checkpoints spread most; axes are "
    "distances in weight space.",
}
# Even in lightness, and told apart with any colour vision.
COLOUR_MAP = "viridis"
_LEVELS = 25
# A logarithmic scale where losses span more than 10 times the smallest; it ends at so
# much of the largest, since a loss may be 0.
_WIDE, _SMALLEST = 10.0, 1e-6
_NAN = "#BBBBBB"  # where the loss is not finite
_MARKERS = ("o", "s", "^", "D", "v")


def plot_landscape(
    records: Sequence[Labelled], path: str | pathlib.Path, *, surface: bool = False
) -> pathlib.Path:
    """Draws landscapes: lines of one dimension, contours or surfaces of two.

    Args:
      records: Pairs of a label and a record.
      path: The picture's file; its ending picks the format.
      surface: A surface in three dimensions instead of contours.

    Returns:
      The path.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No records, or of different dimensions; no loss is finite.
    """
    if len(_checked(records, None)[0][1]["axes"]) == 1:
        return save(line_figure(records), path)
    return save((surface_figure if surface else contour_figure)(records), path)


def comparable(records: Sequence[Labelled]) -> list[list[Labelled]]:
    """Groups of landscapes that belong side by side.

    Args:
      records: Pairs of a label and a record.

    Returns:
      Lists of pairs whose records are of one kind, on as many axes and the same
      examples; of random directions also of one seed. Those between runs, and those of
      trajectories, lie in planes of their own and stand alone.
    """
    groups: dict[Any, list[Labelled]] = {}
    for i, (label, record) in enumerate(records):
        alone = i if record["kind"] in ("runs", "trajectory") else None
        seed = record["seed"] if record["kind"] == "random" else None
        key = (
            alone, seed, record["kind"], len(record["axes"]), record["split"],
            record["num_examples"],
        )  # fmt: skip
        groups.setdefault(key, []).append((label, record))
    return list(groups.values())


def contour_figure(records: Sequence[Labelled], *, narrow: bool = False) -> Any:
    """Contours of two-dimensional landscapes, a panel each.

    Args:
      records: Pairs of a label and a record.
      narrow: Panels below each other, for a phone.

    Returns:
      A `matplotlib.figure.Figure`: axes with gid "landscape:LABEL", and a colour bar in
      nats. Losses that are not finite are grey.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No records, or one that is not of two dimensions; no loss is finite.
    """
    found = _checked(records, 2)
    scale = _Scale([losses for _, _, losses in found])
    count = len(found)
    columns = 1 if narrow else min(count, 3)
    rows = math.ceil(count / columns)
    width = NARROW if narrow else 5.2 if count == 1 else 3.4 * columns + 1.0
    figure = new_figure(width, (4.4 if count == 1 and not narrow else 3.7) * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in panels.flat[count:]:
        ax.remove()
    filled = None
    for ax, (label, record, losses) in zip(panels.flat, found, strict=False):
        ax.set_gid(f"landscape:{label}")
        ax.set_facecolor(_NAN)
        shown = np.ma.masked_invalid(scale.clip(losses)).T  # x along the columns
        filled = ax.contourf(
            *record["axes"], shown, levels=scale.levels, norm=scale.norm(),
            cmap=COLOUR_MAP,
        )  # fmt: skip
        ax.contour(
            *record["axes"], shown, levels=scale.levels[::2], colors="white",
            linewidths=0.4, alpha=0.6,
        )  # fmt: skip
        _mark(ax, record)
        _title(ax, label, record)
        for side, name in zip("xy", record["axis_names"], strict=True):
            text = plain(textwrap.fill(name, 36))
            getattr(ax, f"set_{side}label")(text, fontsize=SMALL)
        ax.tick_params(labelsize=SMALL, labelbottom=True, labelleft=True)
        for side, axis in zip("xy", _limits(found), strict=True):
            getattr(ax, f"set_{side}lim")(axis)
    bar = figure.colorbar(filled, ax=panels.ravel().tolist()[:count], shrink=0.9)
    scale.label(bar.ax, "y", bar)
    _legend(figure, panels.flat[0])
    return figure


def surface_figure(records: Sequence[Labelled], *, narrow: bool = False) -> Any:
    """Two-dimensional landscapes as surfaces, a panel each, as high as they are lossy.

    Args:
      records: Pairs of a label and a record.
      narrow: Panels below each other, for a phone.

    Returns:
      A `matplotlib.figure.Figure`: three-dimensional axes with gid "surface:LABEL".

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No records, or one that is not of two dimensions; no loss is finite.
    """
    found = _checked(records, 2)
    scale = _Scale([losses for _, _, losses in found])
    count = len(found)
    columns = 1 if narrow else min(count, 2)
    rows = math.ceil(count / columns)
    width, height = (6.0, 4.6) if count == 1 else (9.0, 4.2)
    figure = (
        new_figure(NARROW, 3.4 * rows) if narrow else new_figure(width, height * rows)
    )
    from matplotlib import cm, ticker

    for i, (label, record, losses) in enumerate(found):
        ax = figure.add_subplot(rows, columns, i + 1, projection="3d")
        ax.set_gid(f"surface:{label}")
        x, y = np.meshgrid(*record["axes"], indexing="ij")
        heights = scale.height(losses)
        low, high = scale.height(np.array(scale.ends))
        ax.plot_surface(
            x, y, heights, cmap=COLOUR_MAP, vmin=low, vmax=high, rcount=80, ccount=80,
            linewidth=0.15, edgecolor=(0, 0, 0, 0.25),
        )  # fmt: skip
        ax.set_zlim(low, high)
        for side, axis in zip("xy", _limits(found), strict=True):
            getattr(ax, f"set_{side}lim")(axis)
        for side, name in zip("xy", record["axis_names"], strict=True):
            # The unit on a line of its own: three axes leave little room.
            name = plain(name).replace(" (", "\n(")
            getattr(ax, f"set_{side}label")(name, fontsize=SMALL, labelpad=8)
        ax.tick_params(labelsize=SMALL - 1, pad=3)
        scale.label(ax, "z")
        ax.set_zlabel("")  # that of the colour bar
        for axis in (ax.xaxis, ax.yaxis):
            # Not at the ends: there those of two axes meet.
            axis.set_major_locator(ticker.MaxNLocator(4, prune="both"))
        ax.view_init(elev=28, azim=-60)
        ax.set_box_aspect((4, 4, 3), zoom=0.72 if narrow else 0.84)
        _title(ax, label, record)
    colours = cm.ScalarMappable(scale.norm(), COLOUR_MAP)
    bar = figure.colorbar(colours, ax=figure.axes[:count], shrink=0.6, pad=0.08)
    scale.label(bar.ax, "y", bar)
    return figure


def line_figure(records: Sequence[Labelled], *, narrow: bool = False) -> Any:
    """One-dimensional landscapes as lines on the same axes.

    Args:
      records: Pairs of a label and a record.
      narrow: A picture for a phone.

    Returns:
      A `matplotlib.figure.Figure` of one axes. A line's gid is "landscape:LABEL"; it
      has gaps where the loss is not finite.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No records, or one that is not of one dimension; no loss is finite.
    """
    found = _checked(records, 1)
    scale = _Scale([losses for _, _, losses in found])
    figure = new_figure(NARROW if narrow else 6.0, 3.6)
    ax = figure.subplots()
    for i, (label, record, losses) in enumerate(found):
        axis = np.asarray(record["axes"][0])
        shown = np.where(np.isfinite(losses), losses, np.nan)
        ax.plot(
            axis, shown, gid=f"landscape:{label}", label=plain(_titled(label, record)),
            linewidth=1.6, **line_style(i),
        )  # fmt: skip
        for j, (name, at) in enumerate(_points(record) if record["points"] else ()):
            ax.plot(
                at, np.interp(at, axis, shown), linestyle="", label=plain(name),
                marker=_MARKERS[j % len(_MARKERS)], color="black", markersize=5,
            )  # fmt: skip
    ax.set_yscale("log" if scale.wide else "linear")
    scale.label(ax, "y")
    name = textwrap.fill(found[0][1]["axis_names"][0], 45)
    ax.set_xlabel(plain(name), fontsize=LARGE)
    ax.set_xlim(_limits(found)[0])
    ax.tick_params(labelsize=SMALL)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    _legend(figure, ax)
    return figure


class _Scale:
    """One scale of losses for all panels: logarithmic where they span decades."""

    def __init__(self, losses: Sequence[np.ndarray]):
        finite = np.concatenate([x[np.isfinite(x)] for x in losses])
        if not len(finite):
            raise ValueError("no loss of these landscapes is finite: nothing to draw.")
        low, high = float(finite.min()), float(finite.max())
        self.wide = low >= 0 and high > _WIDE * low and high > 0
        if self.wide:
            low = max(low, _SMALLEST * high)
        if not high > low:  # flat: any interval around it
            low, high = low - 0.5, high + 0.5
        self.ends = low, high
        spaced = np.geomspace if self.wide else np.linspace
        self.levels = spaced(low, high, _LEVELS)
        self.levels[[0, -1]] = low, high  # rounding must leave no point out

    def clip(self, losses: np.ndarray) -> np.ndarray:
        return np.clip(np.where(np.isfinite(losses), losses, np.nan), *self.ends)

    def height(self, losses: np.ndarray) -> np.ndarray:
        """Of a surface: matplotlib has no logarithmic axes in three dimensions."""
        return np.log10(self.clip(losses)) if self.wide else self.clip(losses)

    def norm(self) -> Any:
        from matplotlib import colors

        return (colors.LogNorm if self.wide else colors.Normalize)(*self.ends)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten, or powers alone where there are many."""
        low, high = (math.log10(x) for x in self.ends)
        factors = (1, 2, 5) if high - low < 2.5 else (1,)
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [f * 10.0**p for p in powers for f in factors]
        return [x for x in found if self.ends[0] <= x <= self.ends[1]]

    def label(self, ax: Any, side: str, bar: Any = None) -> None:
        """Ticks in nats, on an axis or a colour bar."""
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
        getattr(ax, f"set_{side}label")("Mean loss (nats)", fontsize=SMALL)
        ax.tick_params(labelsize=SMALL)


def _checked(
    records: Sequence[Labelled], dimensions: int | None
) -> list[tuple[str, Record, np.ndarray]]:
    """Labels, records and losses; null, in JSON, stands for what is not finite."""
    if not records:
        raise ValueError("there must be at least one landscape to draw.")
    each = {len(record["axes"]) for _, record in records}
    if len(each) > 1 or (dimensions is not None and each != {dimensions}):
        raise ValueError(
            f"landscapes of {dimensions or 'equal'} dimensions are drawn together, got "
            f"{', '.join(map(str, sorted(each)))}."
        )
    return [
        (label, record, np.array(record["losses"], np.float64))
        for label, record in records
    ]


def _limits(records: Any) -> list[tuple[float, float]]:
    """What holds the axes of all."""
    found = []
    for each in zip(*(record["axes"] for _, record, _ in records), strict=True):
        found.append((min(x[0] for x in each), max(x[-1] for x in each)))
    return found


def _points(record: Record) -> list[tuple[str, np.ndarray]]:
    """Solutions by name, with their coordinates: the origin where there are none."""
    if record["points"] is None:
        return [("Solution", np.zeros(len(record["axes"])))]
    points = np.asarray(record["points"], np.float64)
    if record["kind"] != "trajectory":
        return list(zip(record["labels"], points, strict=True))
    first, last = record["labels"][0], record["labels"][-1]
    return [(f"{first} (first)", points[0]), (f"{last} (last)", points[-1])]


def _mark(ax: Any, record: Record) -> None:
    """Marks solutions, and the way of a trajectory."""
    if record["kind"] == "trajectory":
        ax.plot(
            *np.asarray(record["points"], np.float64).T, color="white", marker="o",
            markersize=3, linewidth=1.2, label="Checkpoints", markeredgecolor="black",
            markeredgewidth=0.4,
        )  # fmt: skip
    for j, (name, at) in enumerate(_points(record)):
        ax.plot(
            *at[:, None], linestyle="", marker=_MARKERS[j % len(_MARKERS)],
            color="white", markeredgecolor="black", markersize=7, label=plain(name),
        )  # fmt: skip


def _titled(label: str, record: Record) -> str:
    """The label, with what belongs to the axes of this landscape alone."""
    if record.get("eigenvalues"):
        values = ", ".join(f"{x:.3g}" for x in record["eigenvalues"])
        return f"{label}\nEigenvalues {values}"
    if record.get("explained_variance"):
        shares = " + ".join(f"{100 * x:.0f} %" for x in record["explained_variance"])
        return f"{label}\n{shares} of the variance"
    return label


def _title(ax: Any, label: str, record: Record) -> None:
    lines = _titled(label, record).split("\n")
    # Panels are about 3 inches wide: 30 letters.
    lines[0] = textwrap.fill(lines[0], 30)
    ax.set_title(plain("\n".join(lines)), fontsize=LARGE)


def _legend(figure: Any, ax: Any) -> None:
    handles, names = ax.get_legend_handles_labels()
    handles = [copy.copy(handle) for handle in handles]
    for handle in handles:
        if handle.get_color() == "white" and handle.get_linestyle() != "None":
            handle.set(color="#888888", markerfacecolor="white")  # on white paper
    legend(figure, handles, [textwrap.fill(name, 45) for name in names])
