"""Learning curves: training loss, accuracy and likelihood against the epoch."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.labels import by_label
from otmdr_jax.experiments.report.reading import Run


def plot_learning_curves(runs: Iterable[Run], path: str | pathlib.Path) -> pathlib.Path:
    """Writes :func:`learning_curves_figure` to a file; its suffix sets the format."""
    return plots.save(learning_curves_figure(runs), path)


def learning_curves_figure(runs: Iterable[Run]) -> Any:
    """Draws training loss, accuracy and negative log-likelihood against the epoch.

    Each label has one colour, with a thin line for each run and a thick line for their
    mean at the steps that all of them logged. Accuracy and likelihood come from the
    split that was evaluated most often; the test set wins a tie.

    Args:
      runs: The runs.

    Returns:
      A `matplotlib.figure.Figure` of three axes. A line's gid is "run:LABEL" or
      "mean:LABEL".

    Raises:
      ValueError: There are no runs.
    """
    groups = by_label(runs)
    styles = plots.line_styles(groups)
    split = _evaluated_split([run for group in groups.values() for run in group])
    figure, parts = plots.panels(3, lambda width: 2.7)
    for part, (source, name, scale, title) in zip(
        parts,
        (
            ("train", "loss", 1.0, "Training loss (nats)"),
            (split, "accuracy", 100.0, f"{split.capitalize()} accuracy (%)"),
            (split, "nll", 1.0, f"{split.capitalize()} NLL (nats)"),
        ),
        strict=True,
    ):
        ax = part.subplots()
        for (label, group), style in zip(groups.items(), styles, strict=True):
            _draw_group(ax, label, style, _curves(group, source, name, scale))
        if not ax.lines:
            plots.say(ax, "not recorded")
        elif name != "accuracy":
            _log_if_wide(ax)
        plots.dress(ax, title, "Epoch")
    plots.legend_of_labels(figure, groups, styles)
    return figure


def _evaluated_split(runs: Sequence[Run]) -> str:
    lines = [entry["split"] for run in runs for entry in run.history]
    return max(("test", "validation"), key=lines.count)  # the first one wins a tie


def _curves(runs: Sequence[Run], split: str, name: str, scale: float) -> list[dict]:
    """Returns step -> (epoch, value) for each run that logged the number."""
    curves = []
    for run in runs:
        curve = {}
        # A resumed run may log a step twice; the last entry counts.
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
    if mean := plots.mean_curve(curves):
        _draw(ax, f"mean:{label}", mean, {**style, "linewidth": 1.6})


def _draw(ax: Any, gid: str, curve: dict, style: dict) -> None:
    points = np.array([curve[step] for step in sorted(curve)], np.float64)  # (n, 2)
    # A single point makes no line; a run that diverged may have no more.
    marker = "o" if np.isfinite(points).all(axis=1).sum() < 3 else ""
    ax.plot(*points.T, gid=gid, marker=marker, markersize=4, **style)


def _log_if_wide(ax: Any) -> None:
    """Makes the axis logarithmic if values exceed 30 times the smallest one."""
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 30 * values.min():
        ax.set_yscale("log")
