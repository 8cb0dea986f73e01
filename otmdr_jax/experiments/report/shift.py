"""Tables and curves of the records of `otmdr shift`.

A record is the result of :func:`otmdr_jax.experiments.measure.shift.evaluate`, as in
shift.json. A foreign set is one of other classes.
"""

import pathlib
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments.report import plots, records
from otmdr_jax.experiments.report.labels import by_label, grouped
from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.experiments.report.tables import Column, Table

Record = dict[str, Any]

_SHOWN = (
    Column("accuracy", "Accuracy (%)", scale=100.0, decimals=2),
    Column("nll", "NLL (nats)"),
    Column("ece", "ECE"),
)
_ACCURACY = _SHOWN[0]
_TITLES = [column.title for column in _SHOWN]
# With more methods than this, the lines of single corruptions would hide each other.
_MOST_WITH_LINES = 2
_PUBLISHED = "cifar10_corrupted/"


def plot_shift(
    found: Sequence[tuple[str, Record]], path: str | pathlib.Path
) -> pathlib.Path:
    """Writes :func:`shift_figure` to a file; the file's suffix sets the format."""
    return plots.save(shift_figure(found), path)


def shift_figure(
    found: Sequence[tuple[str, Record]],
    *,
    places: Mapping[str, int] | None = None,
) -> Any:
    """Draws accuracy, NLL and ECE against the severity of corruptions; 0 is clean.

    A thick line is the mean over corruptions; a thin line is one corruption. If there
    is one method, each corruption has its own colour; otherwise each method has. With
    more than two methods only the means are drawn.

    Args:
      found: (label, record) of each method; records without corruptions are left out.
      places: Places that set the colours, see :func:`labels.places`. Default: those in
        this picture.

    Returns:
      A `matplotlib.figure.Figure` of three axes. A line's gid is "mean:LABEL" or
      "NAME:LABEL" for a corruption of that name.

    Raises:
      ValueError: No record has corruptions.

    Reference: Ovadia et al., `Can You Trust Your Model's Uncertainty?
    <https://arxiv.org/abs/1906.02530>`_, NeurIPS 2019, which has these figures.
    """
    shown = [(label, record) for label, record in found if record["corruptions"]]
    if not shown:
        raise ValueError("a picture of shifts needs a record with corruptions.")
    # Where other pictures show other methods, a colour means a method.
    alone = len(shown) == 1 and len(set((places or {}).values())) <= 1
    styles = plots.line_styles([label for label, _ in shown], places)
    figure, parts = plots.panels(len(_SHOWN), lambda width: 2.7)
    handles: dict[str, Any] = {}
    for part, column in zip(parts, _SHOWN, strict=True):
        ax = part.subplots()
        for (label, record), thick in zip(shown, styles, strict=True):
            curves = _curves(record["clean"], record["corruptions"], column)
            single = curves if len(shown) <= _MOST_WITH_LINES else {}
            own = plots.line_styles([label, *single])[1:]  # not those of the mean
            for (name, curve), style in zip(single.items(), own, strict=False):
                thin = style if alone else {**thick, "alpha": 0.35}
                gid = f"{name}:{label}"
                line = _draw(ax, curve, gid, linewidth=0.9, **thin)
                if alone:
                    handles[name.replace("_", " ")] = line
            mean = plots.mean_curve(list(curves.values()))
            line = _draw(ax, mean, f"mean:{label}", linewidth=2.0, **thick)
            handles["mean of corruptions" if alone else label] = line
        plots.dress(ax, column.title, "Severity (0: clean)")
        ax.xaxis.get_major_locator().set_params(integer=True)
        if column.name == "ece":
            ax.set_ylim(bottom=0.0)
    names = [plots.plain(name) for name in handles]
    plots.legend(figure, list(handles.values()), names)
    return figure


def print_shift(record: Record, title: str = "") -> None:
    """Prints a record, with one line for each corruption, test set and foreign set.

    Args:
      record: The record.
      title: Line above the first table.
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
    """Tabulates each corruption: accuracies, then means over its severities."""
    table = _by_severity(record["corruptions"])
    blank = [""] * (len(table.header) - len(_SHOWN) - 1)
    clean = ["clean", *blank, *_texts(record["clean"])]
    return table._replace(lines=[clean, *table.lines])


def published_table(record: Record) -> Table:
    """Tabulates the files of CIFAR-10-C in the same way, without the clean set."""
    rows = []
    for row in record["sets"]:
        if row["name"].startswith(_PUBLISHED):
            own = row["name"].removeprefix(_PUBLISHED).partition(":")[0]  # no version
            name, _, severity = own.rpartition("_")
            rows.append({**row, "name": name, "severity": int(severity)})
    return _by_severity(rows)


def _by_severity(rows: Sequence[Record]) -> Table:
    """Tabulates each name: accuracies by severity, then means; last the mean of all."""
    levels = sorted({row["severity"] for row in rows})
    groups = grouped(rows, itemgetter("name"))
    if len(groups) > 1:
        groups["mean"] = list(rows)
    lines = []
    for name, group in groups.items():
        each = [[x for x in group if x["severity"] == level] for level in levels]
        accuracies = [_ACCURACY.text(_means(own)["accuracy"]) for own in each]
        lines.append([name.replace("_", " "), *accuracies, *_texts(_means(group))])
    return Table(["Corruption", *map(str, levels), *_TITLES], lines)


def set_table(record: Record) -> Table:
    """Tabulates the other test sets."""
    rows = [x for x in record["sets"] if not x["name"].startswith(_PUBLISHED)]
    lines = [[x["name"], str(x["num_examples"]), *_texts(x)] for x in rows]
    return Table(["Test set", "n", *_TITLES], lines)


def ood_table(found: dict[str, Record]) -> Table:
    """Tabulates each label, foreign set and score; a sole label "" is not shown."""
    columns = [Column(name, name.upper()) for name in ("auroc", "aupr", "fpr95")]
    lines = [
        [label, row["name"], str(row["num_examples"]), row["score"].replace("_", " ")]
        + [column.text(row[column.name]) for column in columns]
        for label, record in found.items()
        for row in record["ood"]
    ]
    header = ["Method", "Set", "n", "Score", *(column.title for column in columns)]
    if list(found) == [""]:
        header, lines = header[1:], [line[1:] for line in lines]
    return Table(header, lines)


def accuracy_table(found: dict[str, Record]) -> Table:
    """Tabulates each label's mean accuracy over severities, by corruption."""
    every = [
        grouped(record["corruptions"], itemgetter("name")) for record in found.values()
    ]
    lines = [
        [name.replace("_", " ")]
        + [_ACCURACY.text(_means(own.get(name, []))["accuracy"]) for own in every]
        for name in dict.fromkeys(name for own in every for name in own)
    ]
    return Table([_ACCURACY.title, *found], lines)


def summary_table(found: dict[str, Record]) -> Table:
    """Tabulates each label: the clean set, and the mean over its corruptions."""
    titles = ["accuracy (%)", *_TITLES[1:]]
    header = ["Method", f"Clean {titles[0]}", *(f"Corrupted {x}" for x in titles)]
    lines = [
        [label, _texts(record["clean"])[0], *_texts(_means(record["corruptions"]))]
        for label, record in found.items()
    ]
    return Table(header, lines)


def _texts(values: Record) -> list[str]:
    return [column.text(values[column.name]) for column in _SHOWN]


def _means(rows: Sequence[Record]) -> dict[str, float]:
    """Returns means over rows; NaN if a number is missing or there is no row."""
    means = {}
    for name in (column.name for column in _SHOWN):
        values = [np.nan if row[name] is None else row[name] for row in rows]
        means[name] = float(np.mean(values)) if values else np.nan
    return means


class Compared(NamedTuple):
    """The records of several methods, made comparable.

    Attributes:
      records: Mean record of each label's runs.
      notes: Sentences on differences between the records.
      gone: Reason for each set that could not be measured.
    """

    records: dict[str, Record]
    notes: list[str]
    gone: dict[str, str]


def compare(runs: Sequence[Run]) -> Compared:
    """Averages the records of each label, at the corruptions that all labels have."""
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
            notes.append(f"The runs of {label} were measured on different examples.")
        found[label] = mean_record(own)
    pairs = [
        {(row["name"], row["severity"]) for row in record["corruptions"]}
        for record in found.values()
        if record["corruptions"]
    ]
    common: set[Any] = set.intersection(*pairs) if pairs else set()
    if any(own != common for own in pairs):
        notes.append(
            f"The page shows the {len(common)} pairs of corruption and severity that "
            "all methods have; some were measured on more."
        )
    counts = {label: record["num_examples"] for label, record in found.items()}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{label} on {n}" for label, n in counts.items())
        notes.append(f"Test sets have different sizes: {each} examples.")
    for label, record in found.items():
        rows = record["corruptions"]
        shown = [row for row in rows if (row["name"], row["severity"]) in common]
        found[label] = {**record, "corruptions": shown}
    return Compared(found, notes, gone)


def mean_record(found: Sequence[Record]) -> Record:
    """Averages the records of several runs into one.

    It keeps the rows that all records have. A mean is None if any of its numbers is.
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


def _mean_of(values):
    """Averages values; a value that all runs share stays as it is."""
    if all(value == values[0] for value in values):
        return values[0]
    return None if None in values else float(np.mean(values))


def _curves(
    clean: Record, rows: Sequence[Record], column: Column
) -> dict[str, dict[int, float]]:
    """Maps a corruption to severity -> value in the figure's unit; 0 is clean."""
    every = {}
    for name, group in grouped(rows, itemgetter("name")).items():
        values = {0: clean, **{row["severity"]: row for row in group}}
        every[name] = {
            level: column.scale * _means([row])[column.name]
            for level, row in values.items()
        }
    return every


def _draw(ax: Any, curve: dict[int, float], gid: str, **style: Any) -> Any:
    points = sorted(curve.items())
    (line,) = ax.plot(
        *zip(*points, strict=True), gid=gid, marker="o", markersize=2.5, **style
    )
    return line
