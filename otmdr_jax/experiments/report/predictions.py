"""Pictures of predictions: how sure, confused with what, and which to leave to others.

Each has a panel or a line for each label, over the pooled predictions of its runs.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from otmdr_jax import metrics
from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.reading import Run, by_label

# With more classes a confusion matrix has no room for numbers, or for names.
MAX_NUMBERS, MAX_NAMES = 12, 20
_RIGHT: dict[str, Any] = {"facecolor": "#56B4E9", "edgecolor": "white"}
_WRONG: dict[str, Any] = {
    "facecolor": "#F7CDB5",
    "edgecolor": "#D55E00",
    "hatch": "////",
}
_GRID = np.linspace(0.0, 1.0, 201)[1:]  # coverages that risks are averaged at


def confidence_figure(
    runs: Iterable[Run], num_bins: int = metrics.NUM_BINS, *, narrow: bool = False
) -> Any:
    """How often each confidence was given, to right and to wrong predictions.

    Args:
      runs: The runs; those whose predictions are not numbers are left out.
      num_bins: Bins of confidence.
      narrow: Panels below each other, for a phone.

    Returns:
      A `matplotlib.figure.Figure`: for each label an axes with gid "confidence:LABEL",
      whose bars' containers are labelled "Right" and "Wrong" (on top), in percent of
      all predictions.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No runs.
    """
    from matplotlib.patches import Patch

    groups = by_label(runs)
    figure, panels = _panels(groups, 0.75, narrow, 3)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    centers, width = (edges[:-1] + edges[1:]) / 2, 1.0 / num_bins
    for ax, (label, group) in zip(panels, groups.items(), strict=True):
        ax.set_gid(f"confidence:{label}")
        _title(ax, label)
        pooled = _predictions(group)
        if pooled is None:
            plots.say(ax, "no finite predictions")
            continue
        # Closed on the right, as the bins of ECE are.
        rows = np.searchsorted(edges[1:-1], pooled.confidence, side="left")
        right, wrong = (
            100.0 * np.bincount(rows[x], minlength=num_bins) / len(rows)
            for x in (pooled.correct, ~pooled.correct)
        )
        style = {"width": width, "linewidth": 0.6}
        ax.bar(centers, right, label="Right", **style, **_RIGHT)
        ax.bar(centers, wrong, bottom=right, label="Wrong", **style, **_WRONG)
    _share_axes(panels, "Confidence", "Share of predictions (%)", narrow)
    for ax in panels:
        ax.set_xlim(0.0, 1.0)
    figure.legend(
        handles=[Patch(label="Right", **_RIGHT), Patch(label="Wrong", **_WRONG)],
        loc="outside lower center",
        ncols=2,
        fontsize=plots.SMALL,
        frameon=False,
    )
    return figure


def confusion_figure(
    runs: Iterable[Run], names: Sequence[str] | None = None, *, narrow: bool = False
) -> Any:
    """Which class is taken for which: of each class (row) the shares of predictions.

    Args:
      runs: The runs; those whose predictions are not numbers are left out.
      names: Of the classes. Default: their numbers.
      narrow: Panels below each other, for a phone.

    Returns:
      A `matplotlib.figure.Figure`: for each label an axes with gid "confusion:LABEL"
      and an image of (C, C) percentages, NaN for classes without examples.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No runs, or names of another number of classes.
    """
    from matplotlib.colors import PowerNorm

    groups = by_label(runs)
    # Squares, and the colour bar beside them.
    figure, panels = _panels(groups, 0.84 if narrow else 0.9, narrow, 2)
    image = None
    for ax, (label, group) in zip(panels, groups.items(), strict=True):
        ax.set_gid(f"confusion:{label}")
        _title(ax, label)
        pooled = _predictions(group)
        if pooled is None:
            plots.say(ax, "no finite predictions")
            continue
        shares = confusion(pooled)
        classes = len(shares)
        if names is not None and len(names) != classes:
            raise ValueError(
                f"names must be those of the {classes} classes, got {len(names)}."
            )
        # A root, so that the few that are wrong are seen beside those that are right.
        image = ax.imshow(shares, cmap="cividis", norm=PowerNorm(0.5, 0.0, 100.0))
        place = ax.get_subplotspec()
        if _is_lowest(ax, panels):
            ax.set_xlabel("Predicted class", fontsize=plots.LARGE)
        if place.is_first_col():
            ax.set_ylabel("True class", fontsize=plots.LARGE)
        if classes <= MAX_NAMES:
            shown = list(map(str, range(classes))) if names is None else list(names)
            long = max(map(len, shown)) > 2
            ax.set_xticks(range(classes), shown, rotation=90 if long else 0)
            ax.set_yticks(range(classes), shown)
        if classes <= MAX_NUMBERS:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.05:
                    decimals = 0 if share >= 9.95 else 1
                    ax.text(
                        column, row, f"{share:.{decimals}f}",
                        ha="center", va="center", fontsize=6,
                        color="black" if share > 25 else "white",
                    )  # fmt: skip
        ax.tick_params(labelsize=plots.SMALL - 1)
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
        bar.set_label("Share of the class (%)", fontsize=plots.LARGE)
        bar.ax.tick_params(labelsize=plots.SMALL)
    return figure


def confusion(predictions: metrics.Predictions) -> np.ndarray:
    """(C, C) percentages: row i column j is how much of class i is predicted as j."""
    classes = predictions.shape[1]
    cells = predictions.labels * classes + predictions.predicted
    counts = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    with np.errstate(invalid="ignore"):  # a class without examples has no shares
        return 100.0 * counts / counts.sum(axis=1, keepdims=True)


def risk_coverage_figure(runs: Iterable[Run], *, narrow: bool = False) -> Any:
    """The error of the surest predictions, against how many of them are kept.

    Args:
      runs: The runs; those whose predictions are not numbers are left out.
      narrow: For a phone.

    Returns:
      A `matplotlib.figure.Figure` of one axes; a line's gid is "risk:LABEL", the mean
      over the label's runs.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No runs.
    """
    groups = by_label(runs)
    figure = plots.new_figure(plots.NARROW if narrow else 5.2, 3.2)
    ax = figure.subplots()
    for i, (label, group) in enumerate(groups.items()):
        risks = []
        for run in plots.pool(group):
            checked = metrics.check(run.log_probs, run.labels, log_probs=True)
            found = metrics.risk_coverage(checked, run.labels)
            risks.append(np.interp(_GRID, found.coverage, found.risk))
        if risks:
            mean = 100.0 * np.mean(risks, axis=0)
            gid, style = f"risk:{label}", plots.line_style(i)
            ax.plot(100.0 * _GRID, mean, gid=gid, linewidth=1.6, **style)
    if not ax.lines:
        plots.say(ax, "no finite predictions")
    ax.set_xlim(0.0, 100.0)
    ax.set_ylim(bottom=0.0)
    ax.set_xlabel("Coverage: predictions kept (%)", fontsize=plots.LARGE)
    ax.set_ylabel("Risk: error among them (%)", fontsize=plots.LARGE)
    ax.tick_params(labelsize=plots.SMALL)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    plots.legend_of_labels(figure, groups)
    return figure


def _predictions(runs: Sequence[Run]) -> metrics.Predictions | None:
    pooled = plots.pool(runs)
    if not pooled:
        return None
    return metrics.check(
        np.concatenate([run.log_probs for run in pooled]),
        np.concatenate([run.labels for run in pooled]),
        log_probs=True,
    )


def _panels(groups, aspect: float, narrow: bool, at_most: int):
    """A figure with a panel for each label; the aspect is height over width."""
    columns = 1 if narrow else min(at_most, plots.panel_columns(len(groups)))
    lines = math.ceil(len(groups) / columns)
    width = plots.NARROW if narrow else 4.8 if columns == 1 else plots.WIDTH
    figure = plots.new_figure(width, aspect * width / columns * lines + 0.5)
    grid = figure.subplots(lines, columns, squeeze=False)
    for ax in grid.flat[len(groups) :]:
        ax.remove()
    return figure, list(grid.flat[: len(groups)])


def _is_lowest(ax, panels) -> bool:
    """Whether no panel is below."""
    mine = ax.get_subplotspec()
    below = [x.get_subplotspec() for x in panels if x is not ax]
    return not any(
        x.colspan == mine.colspan and x.rowspan.start > mine.rowspan.start
        for x in below
    )


def _share_axes(panels, x: str, y: str, narrow: bool) -> None:
    highest = max(ax.dataLim.ymax for ax in panels)
    for ax in panels:
        if np.isfinite(highest):
            ax.set_ylim(0.0, 1.05 * highest)
        ax.tick_params(labelsize=plots.SMALL)
        ax.spines[["top", "right"]].set_visible(False)
        place = ax.get_subplotspec()
        if narrow or _is_lowest(ax, panels):
            ax.set_xlabel(x, fontsize=plots.LARGE)
        if place.is_first_col():
            ax.set_ylabel(y, fontsize=plots.LARGE)


def _title(ax: Any, label: str) -> None:
    ax.set_title(plots.plain(textwrap.fill(label, 30)), fontsize=plots.LARGE)
