"""Learning curves and reliability diagrams, for a README.

Figures are built without pyplot: no backend is chosen and no global state is touched.
A `*_figure` function builds, its `plot_*` twin writes the file.
"""

import io
import math
import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments.report.reading import Run, by_label

# Okabe and Ito's colours, told apart with any colour vision; their yellow is too pale
# for lines.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
_STYLES = ("-", "--", ":", "-.")  # for an eighth label and more
WIDTH, DPI = 8.0, 150  # inches, dots per inch: 1200 px, the width of a README
NARROW = 4.0  # inches: letters of a readable size on a phone
SMALL, LARGE = 8, 9  # points: ticks and legends, labels and titles

# The parts of a reliability diagram, alike in panels and legend.
_ACCURACY: dict[str, Any] = {"facecolor": "#56B4E9", "edgecolor": "white"}
_TOP: dict[str, Any] = {"color": "#004B76", "linewidth": 1.8}
_GAP: dict[str, Any] = {
    "facecolor": "#F7CDB5",
    "edgecolor": "#D55E00",
    "hatch": "////",
}
_EXAMPLES: dict[str, Any] = {"facecolor": "#666666", "edgecolor": "white"}
_DIAGONAL: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.0}


def plot_learning_curves(runs: Iterable[Run], path: str | pathlib.Path) -> pathlib.Path:
    """Draws the runs' learning curves: see :func:`learning_curves_figure`.

    Args:
      runs: The runs.
      path: The picture's file; its ending picks the format.

    Returns:
      The path.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No runs.
    """
    return save(learning_curves_figure(runs), path)


def plot_reliability(
    runs: Iterable[Run], path: str | pathlib.Path, num_bins: int = metrics.NUM_BINS
) -> pathlib.Path:
    """Draws reliability diagrams of the runs: see :func:`reliability_figure`.

    Args:
      runs: The runs.
      path: The picture's file; its ending picks the format.
      num_bins: Bins of confidence.

    Returns:
      The path.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No runs, or runs of one label that differ in their classes.
    """
    return save(reliability_figure(runs, num_bins), path)


def learning_curves_figure(runs: Iterable[Run], *, narrow: bool = False) -> Any:
    """Training loss, accuracy and negative log-likelihood against the epoch.

    A label has one colour: a thin line for each run, a thick one for their mean at the
    steps that all of them logged. Accuracy and likelihood come from the split that was
    evaluated most often, the test set when there is a choice.

    Args:
      runs: The runs.
      narrow: Panels below each other, for a phone.

    Returns:
      A `matplotlib.figure.Figure` of three axes. A line's gid is "run:LABEL" or
      "mean:LABEL".

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No runs.
    """
    groups = by_label(runs)
    split = _evaluated_split([run for group in groups.values() for run in group])
    figure = new_figure(NARROW, 6.6) if narrow else new_figure(WIDTH, 2.7)
    panels = (
        ("train", "loss", 1.0, "Training loss (nats)"),
        (split, "accuracy", 100.0, f"{split.capitalize()} accuracy (%)"),
        (split, "nll", 1.0, f"{split.capitalize()} NLL (nats)"),
    )
    axes = figure.subplots(*((3, 1) if narrow else (1, 3)))
    for ax, (source, name, scale, title) in zip(axes, panels, strict=True):
        for i, (label, group) in enumerate(groups.items()):
            _draw_group(ax, label, line_style(i), _curves(group, source, name, scale))
        if not ax.lines:
            say(ax, "not recorded")
        elif name != "accuracy":
            _log_if_wide(ax)
        ax.set_title(title, fontsize=LARGE)
        ax.set_xlabel("Epoch", fontsize=LARGE)
        ax.tick_params(labelsize=SMALL)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    legend_of_labels(figure, groups)
    return figure


def reliability_figure(
    runs: Iterable[Run], num_bins: int = metrics.NUM_BINS, *, narrow: bool = False
) -> Any:
    """Accuracy against confidence, and how often each confidence was given.

    One panel for each label over the pooled predictions of its runs, on the same axes.
    Runs whose predictions are not numbers are left out, and the panel says so.

    Args:
      runs: The runs.
      num_bins: Bins of confidence.
      narrow: Panels below each other, for a phone.

    Returns:
      A `matplotlib.figure.Figure`: for each label an axes with gid "reliability:LABEL"
      and one beneath with gid "histogram:LABEL". The bars' containers are labelled
      "Accuracy", "Gap to confidence" and "Examples".

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No runs, or runs of one label that differ in their classes.
    """
    groups = by_label(runs)
    columns = 1 if narrow else panel_columns(len(groups))
    lines = math.ceil(len(groups) / columns)
    width = NARROW if narrow else 4.8 if columns == 1 else WIDTH
    height = 1.15 * width / columns + 0.45
    figure = new_figure(width, min(height, 4.2) * lines + 0.4)
    grid = figure.subplots(
        2 * lines, columns, squeeze=False, height_ratios=[4, 1.1] * lines
    )
    highest = 0.0
    for i, (label, group) in enumerate(groups.items()):
        line, column = divmod(i, columns)
        top, bottom = grid[2 * line, column], grid[2 * line + 1, column]
        top.set_gid(f"reliability:{label}")
        bottom.set_gid(f"histogram:{label}")
        highest = max(highest, _draw_reliability(top, bottom, label, group, num_bins))
        last = narrow or i + columns >= len(groups)
        _label_panel(top, bottom, first=column == 0, last=last)
    for ax in grid[1::2].flat:
        ax.set_ylim(0.0, 1.08 * highest or 1.0)
    for i in range(len(groups), lines * columns):
        line, column = divmod(i, columns)
        grid[2 * line, column].remove()
        grid[2 * line + 1, column].remove()
    _legend_of_bars(figure)
    return figure


def save(figure: Any, path: str | pathlib.Path) -> pathlib.Path:
    """Writes a figure; the same figure gives the same bytes."""
    path = pathlib.Path(path)
    metadata = {"Software": None} if path.suffix == ".png" else None
    figure.savefig(path, dpi=DPI, metadata=metadata)
    return path


def png(figure: Any) -> bytes:
    """A figure as the bytes of its file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, metadata={"Software": None}, format="png")
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a report: width and height in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install otmdr-jax[train]"
        ) from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def panel_columns(panels: int) -> int:
    """How many panels stand side by side."""
    return {1: 1, 2: 2, 4: 2}.get(panels, 3)


def _evaluated_split(runs: Sequence[Run]) -> str:
    lines = [entry["split"] for run in runs for entry in run.history]
    return max(("test", "validation"), key=lines.count)  # the first of equals


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th label."""
    style = _STYLES[i // len(COLOURS) % len(_STYLES)]
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": style}


def _curves(runs: Sequence[Run], split: str, name: str, scale: float) -> list[dict]:
    """For each run that logged the number: step -> (epoch, value)."""
    curves = []
    for run in runs:
        curve = {}
        # A resumed run may log a step twice: what was logged last counts.
        for entry in run.history:
            if entry["split"] == split and name in entry:
                value = entry[name]
                shown = np.nan if value is None else scale * value
                curve[entry["step"]] = (entry["epoch"], shown)
        if curve:
            curves.append(curve)
    return curves


def _draw_group(ax: Any, label: str, style: dict, curves: list[dict]) -> None:
    if not curves:
        return
    if len(curves) > 1:
        for curve in curves:
            _draw(ax, f"run:{label}", curve, {**style, "linewidth": 0.7, "alpha": 0.4})
    common = set.intersection(*(set(curve) for curve in curves))
    mean = {
        step: tuple(np.mean([curve[step] for curve in curves], axis=0))
        for step in common
    }
    if mean:
        _draw(ax, f"mean:{label}", mean, {**style, "linewidth": 1.6})


def _draw(ax: Any, gid: str, curve: dict, style: dict) -> None:
    points = np.array([curve[step] for step in sorted(curve)], np.float64)  # (n, 2)
    marker = "o" if len(points) < 3 else ""  # a lone point makes no line
    ax.plot(*points.T, gid=gid, marker=marker, markersize=4, **style)


def _log_if_wide(ax: Any) -> None:
    """A logarithmic axis where values span more than 30 times their smallest."""
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 30 * values.min():
        ax.set_yscale("log")


def legend_of_labels(figure: Any, groups: dict[str, list[Run]]) -> None:
    """Puts a legend of all labels under a figure, which grows by its height."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linewidth=1.6, **line_style(i)) for i in range(len(groups))
    ]
    names = [
        plain(f"{label}, n = {len(group)}" if len(group) > 1 else label)
        for label, group in groups.items()
    ]
    legend(figure, handles, names)


def legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Puts a legend under a figure, which grows by its height."""
    # About 115 small letters fit in the width; a handle takes the place of seven.
    letters = round(115 * figure.get_figwidth() / WIDTH)
    columns = max(1, min(len(names), letters // (max(map(len, names)) + 7)))
    rows = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * rows)
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
    )


def pool(runs: Sequence[Run]) -> list[Run]:
    """The runs whose predictions are numbers, checked to share their classes."""
    classes = sorted({run.log_probs.shape[1] for run in runs})
    if len(classes) > 1:
        raise ValueError(
            f"runs of {runs[0].label!r} predict different numbers of classes: "
            f"{', '.join(map(str, classes))}. Give them labels of their own."
        )
    return [run for run in runs if not np.isnan(run.log_probs).any()]


def _draw_reliability(
    top: Any, bottom: Any, label: str, runs: Sequence[Run], num_bins: int
) -> float:
    """Draws one label's panel; returns the highest bar of its histogram."""
    name = plain(textwrap.fill(label, 30))
    pooled = pool(runs)
    if not pooled:
        top.set_title(name, fontsize=LARGE)
        say(top, "no finite predictions")
        return 0.0
    log_probs = np.concatenate([run.log_probs for run in pooled])
    labels = np.concatenate([run.labels for run in pooled])
    checked = metrics.check(log_probs, labels, log_probs=True)
    bins = metrics.reliability(checked, labels, num_bins)
    centers = (bins.edges[:-1] + bins.edges[1:]) / 2
    width = 1.0 / num_bins
    full = bins.counts > 0
    style = {"width": width, "linewidth": 0.6}
    top.bar(
        centers[full],
        bins.accuracy[full],
        label="Accuracy",
        **style,
        **_ACCURACY,
    )
    top.bar(
        centers[full],
        bins.confidence[full] - bins.accuracy[full],
        bottom=bins.accuracy[full],
        label="Gap to confidence",
        **style,
        **_GAP,
    )
    # The gap hides the bar where accuracy exceeds confidence: mark where it ends.
    tops = bins.accuracy[full]
    lefts, rights = bins.edges[:-1][full], bins.edges[1:][full]
    top.hlines(tops, lefts, rights, zorder=3, clip_on=False, **_TOP)
    top.plot([0, 1], [0, 1], **_DIAGONAL)
    share = 100.0 * bins.counts / bins.counts.sum()
    bottom.bar(centers, share, label="Examples", **style, **_EXAMPLES)
    left_out = f", {len(pooled)} of {len(runs)} runs" if len(pooled) < len(runs) else ""
    ece = metrics.ece(checked, labels, num_bins)
    top.set_title(f"{name}\nECE {ece:.4f}{left_out}", fontsize=LARGE)
    return float(share.max())


def _label_panel(top: Any, bottom: Any, *, first: bool, last: bool) -> None:
    """Axes of a panel: names at the grid's left and lower edge alone."""
    ticks = np.linspace(0.0, 1.0, 6)
    for ax in (top, bottom):
        ax.set_xlim(0.0, 1.0)
        ax.set_xticks(ticks)
        ax.tick_params(labelsize=SMALL, labelbottom=ax is bottom and last)
        ax.tick_params(labelleft=first)
        ax.spines[["top", "right"]].set_visible(False)
    top.set_ylim(0.0, 1.0)
    top.set_yticks(ticks)
    if first:
        top.set_ylabel("Accuracy", fontsize=LARGE)
        bottom.set_ylabel("Share (%)", fontsize=LARGE)
    if last:
        bottom.set_xlabel("Confidence", fontsize=LARGE)


def _legend_of_bars(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Line2D([], [], label="Accuracy", **_TOP),
            Patch(label="Gap to confidence", **_GAP),
            Line2D([], [], label="Perfect calibration", **_DIAGONAL),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=SMALL,
        frameon=False,
    )


def say(ax: Any, text: str) -> None:
    """Writes into an axes that has nothing to show."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", fontsize=LARGE)


def plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
