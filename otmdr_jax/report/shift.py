"""What `otmdr shift` found: a table on the terminal, curves against the severity.

A record is what :func:`otmdr_jax.shift.evaluate` returns, or shift.json.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from otmdr_jax.report import plots
from otmdr_jax.report.grid import Entry, print_grid

Record = dict[str, Any]

# Metric, title, what it is multiplied by, digits.
_SHOWN = (
    ("accuracy", "Accuracy (%)", 100.0, 2),
    ("nll", "NLL", 1.0, 4),
    ("ece", "ECE", 1.0, 4),
)
_MOST_WITH_LINES = 2  # methods: the lines of more hide each other
_CLEAN, _MEAN = "clean", "mean"
_PUBLISHED = "cifar10_corrupted/"


def plot_shift(
    records: Sequence[tuple[str, Record]], path: str | pathlib.Path
) -> pathlib.Path:
    """Draws records: see :func:`shift_figure`.

    Args:
      records: (label, record) of each method.
      path: The picture's file; its ending picks the format.

    Returns:
      The path.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No record has corruptions.
    """
    return plots.save(shift_figure(records), path)


def shift_figure(records: Sequence[tuple[str, Record]]) -> Any:
    """Accuracy, NLL and ECE against the severity of corruptions; 0 is the clean set.

    A thick line is the mean over corruptions, a thin one a corruption. Of one method
    each corruption has a colour of its own, of several each method; of more than two
    the means alone are shown.

    Args:
      records: (label, record) of each method; those without corruptions are left out.

    Returns:
      A `matplotlib.figure.Figure` of three axes. A line's gid is "mean:LABEL" or
      "NAME:LABEL" for a corruption of that name.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No record has corruptions.

    Reference: Ovadia et al., `Can You Trust Your Model's Uncertainty?
    <https://arxiv.org/abs/1906.02530>`_, NeurIPS 2019, whose figures are these.
    """
    shown = [(label, record) for label, record in records if record["corruptions"]]
    if not shown:
        raise ValueError("a picture of shifts needs a record with corruptions.")
    alone = len(shown) == 1
    figure = plots.new_figure(plots.WIDTH, 2.7)
    axes = figure.subplots(1, 3)
    handles: dict[str, Any] = {}
    for ax, (metric, title, scale, _) in zip(axes, _SHOWN, strict=True):
        for i, (label, record) in enumerate(shown):
            curves = _curves(record["clean"], record["corruptions"], metric)
            thick = {"color": "black"} if alone else plots.line_style(i)
            single = curves.items() if len(shown) <= _MOST_WITH_LINES else ()
            for k, (name, curve) in enumerate(single):
                thin = plots.line_style(k) if alone else {**thick, "alpha": 0.35}
                gid = f"{name}:{label}"
                line = _draw(ax, curve, scale, gid, linewidth=0.9, **thin)
                if alone:
                    handles[name.replace("_", " ")] = line
            mean = _mean_curve(curves)
            line = _draw(ax, mean, scale, f"mean:{label}", linewidth=2.0, **thick)
            handles["mean of corruptions" if alone else label] = line
        ax.set_title(title, fontsize=plots.LARGE)
        ax.set_xlabel("Severity (0: clean)", fontsize=plots.LARGE)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.tick_params(labelsize=plots.SMALL)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        if metric == "ece":
            ax.set_ylim(bottom=0.0)
    names = [plots.plain(name) for name in handles]
    plots.legend(figure, list(handles.values()), names)
    return figure


def print_shift(record: Record, title: str = "", console: Any = None) -> None:
    """Prints a record: a line for each corruption, set and foreign set.

    Args:
      record: The record.
      title: A line above the first table.
      console: A `rich.console.Console`; default: standard output.
    """
    print_grid(*_by_severity(record["corruptions"], record["clean"]), console, title)
    published = [x for x in record["sets"] if x["name"].startswith(_PUBLISHED)]
    if published:
        rows = []
        for row in published:
            name, _, severity = row["name"].removeprefix(_PUBLISHED).rpartition("_")
            rows.append({**row, "name": name, "severity": int(severity)})
        print_grid(*_by_severity(rows, None), console, "CIFAR-10-C")
    others = [x for x in record["sets"] if x not in published]
    if others:
        header = ["Test set", "n", *(name for _, name, *_ in _SHOWN)]
        print_grid(
            header,
            [_line(x["name"], str(x["num_examples"]), *_numbers(x)) for x in others],
            console,
            "Other test sets",
        )
    if record["ood"]:
        names = "auroc", "aupr", "fpr95"
        header = ["Set", "n", "Score", *(name.upper() for name in names)]
        lines = [
            _line(
                row["name"],
                str(row["num_examples"]),
                row["score"].replace("_", " "),
                *(_text(row[name], 1.0, 4) for name in names),
            )
            for row in record["ood"]
        ]
        print_grid(header, lines, console, "Out of distribution")
    for row in record["missing"]:
        print(f"Missing: {row['name']}: {row['why']}")


def _by_severity(
    rows: Sequence[Record], clean: Record | None
) -> tuple[list[str], list[list[Entry]]]:
    """A line for each corruption: accuracies, then means over its severities."""
    levels = sorted({row["severity"] for row in rows})
    _, title, scale, digits = _SHOWN[0]
    header = ["Corruption", *(f"{level}" for level in levels)]
    header += [title, *(name for _, name, *_ in _SHOWN[1:])]
    lines = []
    if clean is not None:
        lines.append(_line(_CLEAN, *[""] * len(levels), *_numbers(clean)))
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    for name, group in [*groups.items(), *([(_MEAN, rows)] if len(groups) > 1 else [])]:
        each = [
            _average([x for x in group if x["severity"] == level], "accuracy")
            for level in levels
        ]
        means = {metric: _average(group, metric) for metric, *_ in _SHOWN}
        texts = [_text(x, scale, digits) for x in each]
        lines.append(_line(name.replace("_", " "), *texts, *_numbers(means)))
    return header, lines


def _line(*texts: str) -> list[Entry]:
    return [(text, None) for text in texts]


def _numbers(values: Record) -> list[str]:
    return [_text(values[metric], scale, n) for metric, _, scale, n in _SHOWN]


def _text(value: float | None, scale: float, digits: int) -> str:
    if value is None or not np.isfinite(value):
        return "-"
    return f"{scale * value:.{digits}f}"


def _average(rows: Iterable[Record], metric: str) -> float:
    """The mean; NaN where a number is missing, or there is no row."""
    values = [np.nan if row[metric] is None else row[metric] for row in rows]
    return float(np.mean(values)) if values else float("nan")


def _curves(clean: Record, rows: Sequence[Record], metric: str) -> dict[str, dict]:
    """A corruption -> severity -> value, the clean set at 0."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        curve = curves.setdefault(row["name"], {0: _average([clean], metric)})
        curve[row["severity"]] = _average([row], metric)
    return curves


def _mean_curve(curves: dict[str, dict[int, float]]) -> dict[int, float]:
    """The mean at the severities that all corruptions have."""
    common = set.intersection(*(set(curve) for curve in curves.values()))
    return {
        level: float(np.mean([curve[level] for curve in curves.values()]))
        for level in common
    }


def _draw(ax: Any, curve: dict[int, float], scale: float, gid: str, **style) -> Any:
    levels = sorted(curve)
    values = [scale * curve[level] for level in levels]
    (line,) = ax.plot(levels, values, gid=gid, marker="o", markersize=2.5, **style)
    return line
