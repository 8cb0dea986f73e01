"""The distribution of signal-to-noise ratios over the weights of Bayesian networks."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from otmdr_jax.bnn import summary
from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.reading import Run, by_label

# More layers than this have no room for their names.
_MAX_NAMES = 8


def bayesian(runs: Iterable[Run]) -> list[Run]:
    """The runs that have a posterior."""
    return [run for run in runs if run.result.get("posterior")]


def plot_signal_to_noise(runs: Iterable[Run], path: str | pathlib.Path) -> pathlib.Path:
    """Draws the runs' distributions: see :func:`signal_to_noise_figure`.

    Args:
      runs: The runs.
      path: The picture's file; its ending picks the format.

    Returns:
      The path.
    """
    return plots.save(signal_to_noise_figure(runs), path)


def signal_to_noise_figure(runs: Iterable[Run], *, narrow: bool = False) -> Any:
    r"""How many weights have which ratio of \|mu\| to sigma, and which layers.

    Left the share of weights in bins of 2 dB, a line for each label: the mean over its
    runs. Right the mean ratio of each layer.

    Args:
      runs: The runs; those without a posterior are left out.
      narrow: Axes below each other, for a phone.

    Returns:
      A `matplotlib.figure.Figure` of two axes. A line's gid is "share:LABEL" or
      "layers:LABEL".

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No run has a posterior.

    Reference: Blundell et al., 2015, figure 4.
    """
    groups = by_label(bayesian(runs))
    size = (plots.NARROW, 6.0) if narrow else (plots.WIDTH, 3.2)
    figure = plots.new_figure(*size)
    left, right = figure.subplots(*((2, 1) if narrow else (1, 2)))
    centers = summary.LOWEST + summary.WIDTH * (np.arange(summary.NUM_BINS) + 0.5)
    every: list[str] = []
    for i, (label, group) in enumerate(groups.items()):
        counts = np.array([run.result["posterior"]["snr_counts"] for run in group])
        shares = 100.0 * counts / counts.sum(axis=1, keepdims=True)
        style = plots.line_style(i)
        left.plot(centers, shares.mean(axis=0), gid=f"share:{label}", **style)
        layers, means = _layers(group)
        gid = f"layers:{label}"
        places = np.arange(len(layers)) + 1
        right.plot(places, means, marker="o", markersize=3, gid=gid, **style)
        every = layers if len(layers) > len(every) else every
    used = np.nonzero(np.sum([line.get_ydata() for line in left.lines], axis=0))[0]
    left.set_xlim(centers[used[0]] - 2, centers[used[-1]] + 2)
    left.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
    left.set_ylim(bottom=0.0)
    left.set_title("Weights (% in bins of 2 dB)", fontsize=plots.LARGE)
    left.set_xlabel(
        "Signal-to-noise ratio |μ| / σ (dB); ends: and beyond", fontsize=plots.LARGE
    )
    right.set_title("Mean ratio of a layer (dB)", fontsize=plots.LARGE)
    if len(every) <= _MAX_NAMES:
        right.set_xticks(np.arange(len(every)) + 1, every, rotation=30, ha="right")
    else:
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("Array, in the order of result.json", fontsize=plots.LARGE)
    for ax in (left, right):
        ax.tick_params(labelsize=plots.SMALL)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    plots.legend_of_labels(figure, groups)
    return figure


def _layers(runs: Sequence[Run]) -> tuple[list[str], np.ndarray]:
    """Names, and means over the runs, of the layers that all of them have."""
    every = [run.result["posterior"]["snr_db"] for run in runs]
    names = [name for name in every[0] if all(name in one for one in every)]
    return names, np.mean([[one[name] for name in names] for one in every], axis=0)
