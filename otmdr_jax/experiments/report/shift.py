"""What `otmdr shift` found: a table on the terminal, curves against the severity.

A record is what :func:`otmdr_jax.experiments.measure.shift.evaluate` returns, or
shift.json.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments.report import plots, records
from otmdr_jax.experiments.report.reading import Run, by_label
from otmdr_jax.experiments.report.tables import Table

Record = dict[str, Any]

# Metric, title, what it is multiplied by, digits.
_SHOWN = (
    ("accuracy", "Accuracy (%)", 100.0, 2),
    ("nll", "NLL (nats)", 1.0, 4),
    ("ece", "ECE", 1.0, 4),
)
_MOST_WITH_LINES = 2  # methods: the lines of more hide each other
_CLEAN, _MEAN = "clean", "mean"
_PUBLISHED = "cifar10_corrupted/"


def plot_shift(
    found: Sequence[tuple[str, Record]], path: str | pathlib.Path
) -> pathlib.Path:
    """Draws records: see :func:`shift_figure`.

    Args:
      found: (label, record) of each method.
      path: The picture's file; its ending picks the format.

    Returns:
      The path.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No record has corruptions.
    """
    return plots.save(shift_figure(found), path)


def shift_figure(
    found: Sequence[tuple[str, Record]],
    *,
    order: Sequence[str] | None = None,
) -> Any:
    """Accuracy, NLL and ECE against the severity of corruptions; 0 is the clean set.

    A thick line is the mean over corruptions, a thin one a corruption. Of one method
    each corruption has a colour of its own, of several each method; of more than two
    the means alone are shown.

    Args:
      found: (label, record) of each method; those without corruptions are left out.
      order: Labels in the order of their colours. Default: those of `found`.

    Returns:
      A `matplotlib.figure.Figure` of three axes. A line's gid is "mean:LABEL" or
      "NAME:LABEL" for a corruption of that name.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: No record has corruptions.

    Reference: Ovadia et al., `Can You Trust Your Model's Uncertainty?
    <https://arxiv.org/abs/1906.02530>`_, NeurIPS 2019, whose figures are these.
    """
    shown = [(label, record) for label, record in found if record["corruptions"]]
    if not shown:
        raise ValueError("a picture of shifts needs a record with corruptions.")
    alone = len(shown) == 1
    figure, parts = plots.panels(len(_SHOWN), lambda width: 2.7)
    handles: dict[str, Any] = {}
    for part, (metric, title, scale, _) in zip(parts, _SHOWN, strict=True):
        ax = part.subplots()
        for i, (label, record) in enumerate(shown):
            curves = _curves(record["clean"], record["corruptions"], metric)
            place = i if order is None else list(order).index(label)
            thick = {"color": "black"} if alone else plots.line_style(place)
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
        plots.dress(ax, title, "Severity (0: clean)")
        ax.xaxis.get_major_locator().set_params(integer=True)
        if metric == "ece":
            ax.set_ylim(bottom=0.0)
    names = [plots.plain(name) for name in handles]
    plots.legend(figure, list(handles.values()), names)
    return figure


def print_shift(record: Record, title: str = "") -> None:
    """Prints a record: a line for each corruption, set and foreign set.

    Args:
      record: The record.
      title: A line above the first table.
    """
    corruption_table(record).print(title)
    for name, table in (
        ("CIFAR-10-C", published_table(record)),
        ("Other test sets", set_table(record)),
        ("Out of distribution", ood_table({"": record})),
    ):
        if table.lines:
            table.print(name)
    for row in record["missing"]:
        print(f"Missing: {row['name']}: {row['why']}")


def corruption_table(record: Record) -> Table:
    """A line for each corruption: accuracies, then means over its severities."""
    return _by_severity(record["corruptions"], record["clean"])


def published_table(record: Record) -> Table:
    """The same of CIFAR-10-C's files, without the clean set."""
    rows = []
    for row in record["sets"]:
        if row["name"].startswith(_PUBLISHED):
            name, _, severity = row["name"].removeprefix(_PUBLISHED).rpartition("_")
            rows.append({**row, "name": name, "severity": int(severity)})
    return _by_severity(rows, None)


def set_table(record: Record) -> Table:
    """A line for each of the other test sets."""
    rows = [x for x in record["sets"] if not x["name"].startswith(_PUBLISHED)]
    header = ["Test set", "n", *(name for _, name, *_ in _SHOWN)]
    lines = [[x["name"], str(x["num_examples"]), *_numbers(x)] for x in rows]
    return Table(header, lines)


def ood_table(found: dict[str, Record]) -> Table:
    """A line for each foreign set and score, of each label."""
    names = "auroc", "aupr", "fpr95"
    alone = list(found) == [""]
    header = [*([] if alone else ["Method"]), "Set", "n", "Score"]
    lines = [
        [
            *([] if alone else [label]),
            row["name"],
            str(row["num_examples"]),
            row["score"].replace("_", " "),
            *(_text(row[name], 1.0, 4) for name in names),
        ]
        for label, record in found.items()
        for row in record["ood"]
    ]
    return Table([*header, *(name.upper() for name in names)], lines)


def accuracy_table(found: dict[str, Record]) -> Table:
    """A line for each corruption: of each label the mean accuracy over severities."""
    _, title, scale, digits = _SHOWN[0]
    every = [record["corruptions"] for record in found.values()]
    names = dict.fromkeys(row["name"] for rows in every for row in rows)
    lines = []
    for name in names:
        own = [[row for row in rows if row["name"] == name] for rows in every]
        means = [_average(rows, "accuracy") for rows in own]
        texts = [_text(mean, scale, digits) for mean in means]
        lines.append([name.replace("_", " "), *texts])
    return Table([title, *found], lines)


def summary_table(found: dict[str, Record]) -> Table:
    """A line for each label: the clean set, and the mean over its corruptions."""
    accuracy, *others = (title for _, title, *_ in _SHOWN)
    titles = [accuracy.lower(), *others]
    header = ["Method", f"Clean {titles[0]}", *(f"Corrupted {x}" for x in titles)]
    lines = []
    for label, record in found.items():
        rows = record["corruptions"]
        means = {metric: _average(rows, metric) for metric, *_ in _SHOWN}
        lines.append([label, _numbers(record["clean"])[0], *_numbers(means)])
    return Table(header, lines)


class Compared(NamedTuple):
    """The records of several methods, made comparable.

    Attributes:
      records: A label -> the mean record of its runs.
      notes: What is not alike between them, in sentences.
      gone: The name of a set that could not be measured -> why.
    """

    records: dict[str, Record]
    notes: list[str]
    gone: dict[str, str]


def compare(runs: Sequence[Run]) -> Compared:
    """The records of runs: means of each label, at the corruptions that all have."""
    found: dict[str, Record] = {}
    notes: list[str] = []
    gone: dict[str, str] = {}
    for label, group in by_label(runs).items():
        every = (records.read_record(run, records.SHIFT) for run in group)
        own = [record for record in every if record is not None]
        if not own:
            continue
        gone |= {x["name"]: x["why"] for record in own for x in record["missing"]}
        if len({(record["num_examples"], record.get("seed")) for record in own}) > 1:
            notes.append(f"The runs of {label} were measured on other examples each.")
        found[label] = mean_record(own)
    found, unlike = in_common(found)
    return Compared(found, notes + unlike, gone)


def mean_record(found: Sequence[Record]) -> Record:
    """One record whose numbers are means over those of several runs.

    Rows that not all of them have are left out; a mean is None where a number is.
    """

    def mean(rows):
        first = rows[0]
        names = [name for name in first if all(name in row for row in rows)]
        return {name: _mean_of([row[name] for row in rows]) for name in names}

    result = {**found[0], "clean": mean([record["clean"] for record in found])}
    for part, keys in (
        ("corruptions", ("name", "severity")),
        ("sets", ("name",)),
        ("ood", ("name", "score")),
    ):
        every = [
            {tuple(row[key] for key in keys): row for row in record[part]}
            for record in found
        ]
        common = [key for key in every[0] if all(key in rows for rows in every)]
        result[part] = [mean([rows[key] for rows in every]) for key in common]
    return result


def in_common(found: dict[str, Record]) -> tuple[dict[str, Record], list[str]]:
    """The records at the corruptions and severities that all of them have.

    Returns:
      The records, and what is not alike between them, in sentences.
    """
    every = [
        {(row["name"], row["severity"]) for row in record["corruptions"]}
        for record in found.values()
        if record["corruptions"]
    ]
    common = set.intersection(*every) if every else set()
    notes = []
    if any(pairs != common for pairs in every):
        notes.append(
            f"Shown are the {len(common)} pairs of corruption and severity that all "
            "have; some were measured on more."
        )
    counts = {label: record["num_examples"] for label, record in found.items()}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{label} on {n}" for label, n in counts.items())
        notes.append(f"Test sets are not alike: {each} examples.")
    shown = {
        label: {
            **record,
            "corruptions": [
                row
                for row in record["corruptions"]
                if (row["name"], row["severity"]) in common
            ],
        }
        for label, record in found.items()
    }
    return shown, notes


def _mean_of(values):
    """The mean of measures; of what is the same in all runs that itself."""
    if all(value == values[0] for value in values):
        return values[0]
    return None if None in values else float(np.mean(values))


def _by_severity(rows: Sequence[Record], clean: Record | None) -> Table:
    levels = sorted({row["severity"] for row in rows})
    _, title, scale, digits = _SHOWN[0]
    header = ["Corruption", *(f"{level}" for level in levels)]
    header += [title, *(name for _, name, *_ in _SHOWN[1:])]
    lines = []
    if clean is not None:
        lines.append([_CLEAN, *[""] * len(levels), *_numbers(clean)])
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
        lines.append([name.replace("_", " "), *texts, *_numbers(means)])
    return Table(header, lines)


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
