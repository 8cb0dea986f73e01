"""Draws the signal-to-noise ratios of the weights of Bayesian networks."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from otmdr_jax.bnn import summary
from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.labels import by_label
from otmdr_jax.experiments.report.reading import Run

# With more layers than this there is no room for their names.
_MAX_NAMES = 8


def bayesian(runs: Iterable[Run]) -> list[Run]:
    """Returns the runs that have a posterior."""
    return [run for run in runs if run.result.get("posterior")]


def plot_signal_to_noise(runs: Iterable[Run], path: str | pathlib.Path) -> pathlib.Path:
    """Writes :func:`signal_to_noise_figure` to a file; its suffix sets the format."""
    return plots.save(signal_to_noise_figure(runs), path)


def signal_to_noise_figure(
    runs: Iterable[Run], *, places: Mapping[str, int] | None = None
) -> Any:
    r"""Draws the distribution of \|mu\| / sigma over weights, and its mean per layer.

    The left axes show the share of weights in bins of 2 dB, with one line for each
    label, the mean over its runs. The right axes show the mean ratio of each layer.

    Args:
      runs: The runs; runs without a posterior are left out.
      places: Places that set the colours, see :func:`labels.places`. Default: those in
        this picture.

    Returns:
      A `matplotlib.figure.Figure` of two axes. A line's gid is "share:LABEL" or
      "layers:LABEL".

    Raises:
      ValueError: No run has a posterior.

    Reference: Blundell et al., 2015, figure 4.
    """
    groups = by_label(bayesian(runs))
    figure, parts = plots.panels(2, lambda width: 3.2)
    left, right = (part.subplots() for part in parts)
    centers = summary.LOWEST + summary.WIDTH * (np.arange(summary.NUM_BINS) + 0.5)
    every: list[str] = []
    styles = plots.line_styles(groups, places)
    for (label, group), style in zip(groups.items(), styles, strict=True):
        counts = np.array([run.result["posterior"]["snr_counts"] for run in group])
        shares = 100.0 * counts / counts.sum(axis=1, keepdims=True)
        left.plot(centers, shares.mean(axis=0), gid=f"share:{label}", **style)
        layers, means = _layers(group)
        gid = f"layers:{label}"
        numbers = np.arange(len(layers)) + 1
        right.plot(numbers, means, marker="o", markersize=3, gid=gid, **style)
        every = layers if len(layers) > len(every) else every
    used = np.nonzero(np.sum([line.get_ydata() for line in left.lines], axis=0))[0]
    left.set_xlim(centers[used[0]] - 2, centers[used[-1]] + 2)
    left.axvline(0.0, color=plots.INK, linewidth=0.8, linestyle=":")
    left.set_ylim(bottom=0.0)
    plots.dress(
        left,
        "Weights (% in bins of 2 dB)",
        "Signal-to-noise ratio |μ| / σ (dB); ends: and beyond",
    )
    plots.dress(right, "Mean ratio of a layer (dB)")
    if len(every) <= _MAX_NAMES:
        right.set_xticks(np.arange(len(every)) + 1, every, rotation=30, ha="right")
    else:
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("Array, in the order of result.json", fontsize=plots.LARGE)
    plots.legend_of_labels(figure, groups, styles)
    return figure


def _layers(runs: Sequence[Run]) -> tuple[list[str], np.ndarray]:
    """Returns the layers that all runs have: names, and means over the runs."""
    every = [run.result["posterior"]["snr_db"] for run in runs]
    names = [name for name in every[0] if all(name in one for one in every)]
    return names, np.mean([[one[name] for name in names] for one in every], axis=0)
