"""Pictures of predictions: reliability, confidence, confusion, risk and coverage.

Each has a panel or a line for each label. Runs with NaN in their predictions are left
out.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.labels import by_label, class_names
from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.metrics.reliability import edges_of

# With more classes than these, a confusion matrix has no room for shares or for all
# classes on its axes.
MAX_NUMBERS, MAX_NAMES = 12, 20
_ACCURACY: dict[str, Any] = {"color": plots.INK, "linewidth": 1.8}
_DIAGONAL: dict[str, Any] = {"color": "#888888", "linestyle": "--", "linewidth": 1.2}
_EXAMPLES: dict[str, Any] = {"facecolor": "#888888", "edgecolor": plots.PAPER}
_SHARES = (0, 1, 5, 20, 50, 100)  # ticks of the colour bar, in percent
_GRID = np.linspace(0.0, 1.0, 201)[1:]  # coverages at which risks are averaged


def plot_reliability(
    runs: Iterable[Run], path: str | pathlib.Path, num_bins: int = metrics.NUM_BINS
) -> pathlib.Path:
    """Writes :func:`reliability_figure` to a file; its suffix sets the format."""
    return plots.save(reliability_figure(runs, num_bins), path)


def reliability_figure(runs: Iterable[Run], num_bins: int = metrics.NUM_BINS) -> Any:
    """Draws accuracy against confidence, and a histogram of the confidence.

    Each label has a panel over the pooled predictions of its runs. A panel says how
    many runs it leaves out because their predictions are NaN.

    Args:
      runs: The runs.
      num_bins: Number of bins of confidence.

    Returns:
      A `matplotlib.figure.Figure`: for each label an axes with gid "reliability:LABEL"
      and, below it, one with gid "histogram:LABEL". The bars' containers are labelled
      "Accuracy", "Gap to confidence" and "Examples".

    Raises:
      ValueError: There are no runs, or runs of one label differ in their classes.
    """
    groups = by_label(runs)
    figure, parts = plots.panels(
        len(groups), lambda width: min(1.15 * width + 0.45, 4.2)
    )
    histograms = []
    for part, (label, group) in zip(parts, groups.items(), strict=True):
        top, bottom = part.subplots(2, 1, sharex=True, height_ratios=[4, 1.1])
        top.set_gid(f"reliability:{label}")
        bottom.set_gid(f"histogram:{label}")
        title = _draw_reliability(top, bottom, group, num_bins)
        name = plots.name_of_panel(label)
        plots.dress(top, f"{name}{title}", y="Accuracy", grid=False)
        plots.dress(bottom, x="Confidence", y="Share (%)", grid=False)
        top.set(xlim=(0.0, 1.0), ylim=(0.0, 1.0))
        top.set_yticks(np.linspace(0.0, 1.0, 6))
        bottom.set_xticks(np.linspace(0.0, 1.0, 6))
        histograms.append(bottom)
    _same_height(histograms)
    _legend_of_bars(figure)
    return figure


def _draw_reliability(top: Any, bottom: Any, runs: Sequence[Run], num_bins: int) -> str:
    """Draws the panel of one label; returns the end of its title."""
    pooled = _pooled(runs)
    if pooled is None:
        plots.say(top, "no finite predictions")
        return ""
    bins = metrics.reliability(pooled, pooled.labels, num_bins)
    centers = (bins.edges[:-1] + bins.edges[1:]) / 2
    full = bins.counts > 0
    accuracy, confidence = bins.accuracy[full], bins.confidence[full]
    style = {"width": 1.0 / num_bins, "linewidth": 0.6}
    top.bar(centers[full], accuracy, label="Accuracy", **style, **plots.RIGHT)
    top.bar(
        centers[full],
        confidence - accuracy,
        bottom=accuracy,
        label="Gap to confidence",
        **style,
        **plots.WRONG,
    )
    # The gap hides the bar if accuracy exceeds confidence, so a line marks its end.
    lefts, rights = bins.edges[:-1][full], bins.edges[1:][full]
    top.hlines(accuracy, lefts, rights, zorder=3, clip_on=False, **_ACCURACY)
    top.plot([0, 1], [0, 1], **_DIAGONAL)
    share = 100.0 * bins.counts / bins.counts.sum()
    bottom.bar(centers, share, label="Examples", **style, **_EXAMPLES)
    finite = len(plots.pool(runs))
    left_out = f", {finite} of {len(runs)} runs" if finite < len(runs) else ""
    ece = metrics.ece(pooled, pooled.labels, num_bins)
    return f"\nECE {ece:.4f}{left_out}"


def _legend_of_bars(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Line2D([], [], **_ACCURACY), Patch(**plots.WRONG)]
    handles.append(Line2D([], [], **_DIAGONAL))
    names = ["Accuracy", "Gap to confidence", "Perfect calibration"]
    plots.legend(figure, handles, names)


def confidence_figure(runs: Iterable[Run], num_bins: int = metrics.NUM_BINS) -> Any:
    """Draws histograms of the confidence of right and of wrong predictions.

    Args:
      runs: The runs.
      num_bins: Number of bins of confidence.

    Returns:
      A `matplotlib.figure.Figure`: for each label an axes with gid "confidence:LABEL",
      whose bars' containers are labelled "Right" and "Wrong" (on top), in percent of
      all predictions.

    Raises:
      ValueError: There are no runs.
    """
    from matplotlib.patches import Patch

    groups = by_label(runs)
    figure, parts = plots.panels(len(groups), lambda width: 0.75 * width + 0.3)
    edges = edges_of(num_bins)
    centers = (edges[:-1] + edges[1:]) / 2
    panels = []
    for part, (label, group) in zip(parts, groups.items(), strict=True):
        panels.append(ax := part.subplots())
        ax.set_gid(f"confidence:{label}")
        title = plots.name_of_panel(label)
        plots.dress(ax, title, "Confidence", "Share of predictions (%)", grid=False)
        ax.set_xlim(0.0, 1.0)
        pooled = _pooled(group)
        if pooled is None:
            plots.say(ax, "no finite predictions")
            continue
        # Bins are closed on the right, as those of the ECE.
        rows = np.searchsorted(edges[1:-1], pooled.confidence, side="left")
        right, wrong = (
            100.0 * np.bincount(rows[x], minlength=num_bins) / len(rows)
            for x in (pooled.correct, ~pooled.correct)
        )
        style = {"width": 1.0 / num_bins, "linewidth": 0.6}
        ax.bar(centers, right, label="Right", **style, **plots.RIGHT)
        ax.bar(centers, wrong, bottom=right, label="Wrong", **style, **plots.WRONG)
    _same_height(panels)
    handles = [Patch(**plots.RIGHT), Patch(**plots.WRONG)]
    plots.legend(figure, handles, ["Right", "Wrong"])
    return figure


def confusion_figure(runs: Iterable[Run]) -> Any:
    """Draws confusion matrices: the shares of predictions of each true class (row).

    Args:
      runs: The runs.

    Returns:
      A `matplotlib.figure.Figure`: for each label an axes with gid "confusion:LABEL"
      and an image of (C, C) percentages, NaN for classes without examples.

    Raises:
      ValueError: There are no runs.
    """
    from matplotlib.colors import PowerNorm

    groups = by_label(runs)
    figure, parts = plots.panels(len(groups), lambda width: 0.84 * width, most=2)
    for part, (label, group) in zip(parts, groups.items(), strict=True):
        ax = part.subplots()
        ax.set_gid(f"confusion:{label}")
        title = plots.name_of_panel(label)
        plots.dress(ax, title, "Predicted class", "True class", grid=False)
        ax.spines[:].set_visible(True)
        pooled = _pooled(group)
        if pooled is None:
            plots.say(ax, "no finite predictions")
            ax.set_box_aspect(1.0)
            continue
        shares = confusion(pooled)
        classes = len(shares)
        # A root scale keeps the few errors visible beside the right predictions.
        image = ax.imshow(shares, cmap="cividis", norm=PowerNorm(0.5, 0.0, 100.0))
        if classes <= MAX_NAMES:
            names = [plots.plain(name) for name in class_names(group, classes)]
            upright = max(map(len, names)) <= 2
            ax.set_xticks(range(classes), names, rotation=0 if upright else 90)
            ax.set_yticks(range(classes), names)
        if classes <= MAX_NUMBERS:
            _write_shares(ax, shares)
        bar = part.colorbar(image, ax=ax, shrink=0.8, ticks=_SHARES)
        bar.set_label("Share of the class (%)", fontsize=plots.LARGE)
        bar.ax.tick_params(labelsize=plots.SMALL)
    return figure


def _write_shares(ax: Any, shares: np.ndarray) -> None:
    """Writes the percentages that do not round to 0 into their cells."""
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.05:
            ax.text(
                column,
                row,
                f"{share:.{0 if share >= 9.95 else 1}f}",
                ha="center",
                va="center",
                fontsize=6,
                color=plots.DARK if share > 25 else plots.LIGHT,
            )


def confusion(predictions: metrics.Predictions) -> np.ndarray:
    """Returns (C, C) percentages: [i, j] is the share of class i predicted as j."""
    classes = predictions.shape[1]
    cells = predictions.labels * classes + predictions.predicted
    counts = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    with np.errstate(invalid="ignore"):  # a class without examples has no shares
        return 100.0 * counts / counts.sum(axis=1, keepdims=True)


def risk_coverage_figure(runs: Iterable[Run]) -> Any:
    """Draws the error of the most confident predictions against their share.

    Args:
      runs: The runs.

    Returns:
      A `matplotlib.figure.Figure` of one axes. The line of a label, with gid
      "risk:LABEL", is the mean over its runs.

    Raises:
      ValueError: There are no runs.
    """
    groups = by_label(runs)
    figure = plots.new_figure(plots.ALONE, 3.2)
    ax = figure.subplots()
    styles = plots.line_styles(groups)
    for (label, group), style in zip(groups.items(), styles, strict=True):
        risks = []
        for run in plots.pool(group):
            checked = metrics.check(run.log_probs, run.labels, log_probs=True)
            found = metrics.risk_coverage(checked, run.labels)
            risks.append(np.interp(_GRID, found.coverage, found.risk))
        if risks:
            mean = 100.0 * np.mean(risks, axis=0)
            gid = f"risk:{label}"
            ax.plot(100.0 * _GRID, mean, gid=gid, linewidth=1.6, **style)
    if not ax.lines:
        plots.say(ax, "no finite predictions")
    ax.set_xlim(0.0, 100.0)
    ax.set_ylim(bottom=0.0)
    plots.dress(ax, x="Coverage: predictions kept (%)", y="Risk: error among them (%)")
    plots.legend_of_labels(figure, groups, styles)
    return figure


def _pooled(runs: Sequence[Run]) -> metrics.Predictions | None:
    """Joins the predictions of the runs without NaN; None if there are none."""
    pooled = plots.pool(runs)
    if not pooled:
        return None
    return metrics.check(
        np.concatenate([run.log_probs for run in pooled]),
        np.concatenate([run.labels for run in pooled]),
        log_probs=True,
    )


def _same_height(panels: Sequence[Any]) -> None:
    """Gives axes of bars a common scale, so that they can be compared."""
    # The limits of axes without bars are infinite.
    highest = [x for ax in panels if np.isfinite(x := ax.dataLim.ymax) and x > 0]
    for ax in panels if highest else ():
        ax.set_ylim(0.0, 1.05 * max(highest))
