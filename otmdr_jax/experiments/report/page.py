"""Writes a report folder: a page, its pictures, and every number behind them."""

import importlib.metadata
import json
import pathlib
import platform
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from otmdr_jax import __version__, metrics
from otmdr_jax.experiments.report import document, drawing, significance, summary
from otmdr_jax.experiments.report.labels import by_label, places
from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.io import files
from otmdr_jax.io.progress import Progress

# This key in results.json marks a folder as a report. Its value is the version of the
# file layout.
MARKER = "otmdr_report"
_LAYOUT = 1
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def write(
    folder: str | pathlib.Path,
    runs: Iterable[Run],
    title: str,
    command: str | None = None,
    *,
    whole: bool = False,
    baseline: str | None = None,
    costs: Sequence[dict[str, Any]] | None = None,
    data_dir: str | None = None,
    show_progress: bool = False,
) -> pathlib.Path:
    """Writes a report on runs, or replaces an earlier one.

    The files are report.md, its pictures, results.json (all rows and results) and
    configs.json (each run's exact options). A whole report also has report.html, the
    same page as one file with the pictures inside. If anything is wrong with the runs,
    or the disk is full, nothing is written.

    Args:
      folder: Folder that is new or empty or holds an earlier report. The files of an
        earlier report are replaced, other files are kept.
      runs: The runs.
      title: Heading of the page.
      command: Command that made the report, for the page.
      whole: Whether to write a whole report, with intervals, tests, records and images;
        it names the records that are missing. Otherwise the report has the table of
        results, learning curves and reliability diagrams.
      baseline: Label that a whole report compares with, in upper or lower case.
        Default: the first one.
      costs: Rows of a sweep, see :func:`otmdr_jax.experiments.sweep.run`, from which a
        whole report shows the cost of runs and tests over seeds.
      data_dir: Where the data are now, whose images a whole report shows. Default:
        where the runs found them.
      show_progress: Whether to show how many pictures are drawn.

    Returns:
      The path of report.html, or of report.md if the report is not whole.

    Raises:
      FileExistsError: The folder holds files, but no report.
      ImportError: matplotlib, Jinja2 or markdown-it-py is not installed.
      ValueError: There are no runs, a run is given twice, or no run has the baseline's
        label.
    """
    folder, runs = pathlib.Path(folder), list(runs)
    check_folder(folder)
    check_distinct(runs)
    rows = summary.summarise(runs, summary.known_columns(runs))
    page = compose(
        title,
        runs,
        rows,
        command=command,
        whole=whole,
        baseline=baseline,
        costs=costs,
        data_dir=data_dir,
    )
    pngs: dict[str, bytes] = {}
    drawn: dict[str, drawing.Drawn] = {}
    with Progress(len(page.pictures), 0, "drawing", show_progress, "pictures") as bar:
        for i, (name, picture) in enumerate(page.pictures.items(), 1):
            figure = picture.figure()
            pngs[name] = drawing.png(figure)
            if whole:
                drawn[name] = drawing.cut(figure, name, picture.alt)
            bar.update(i)
    texts = {"report.md": document.markdown(page)}
    if whole:
        texts["report.html"] = document.html(page, drawn)
    results = {**_results(title, rows, runs), "pictures": list(pngs)}
    configs = [_described(run) for run in runs]
    contents = {f"{name}.png": png for name, png in pngs.items()}
    contents |= {name: text.encode() for name, text in texts.items()}
    contents["configs.json"] = files.document(configs, default=str).encode()
    # The marker is the first in its place, so that a report that a kill interrupts can
    # be written again.
    contents["results.json"] = files.document(results, default=str).encode()
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(folder)
    files.write_all(folder, contents)
    # What an earlier report has beside this one.
    stale = {f"{name}.png" for name in earlier.get("pictures", [])}
    if MARKER in earlier:
        stale.add("report.html")
    for name in stale - set(contents):
        (folder / name).unlink(missing_ok=True)
    return folder / list(texts)[-1]


def compose(
    title: str,
    runs: Sequence[Run],
    rows: Sequence[summary.Row],
    *,
    command: str | None = None,
    whole: bool = False,
    baseline: str | None = None,
    costs: Sequence[dict[str, Any]] | None = None,
    data_dir: str | None = None,
) -> document.Page:
    """Composes the page of a report without drawing its pictures; see :func:`write`."""
    return document.page(
        title,
        runs=runs,
        rows=rows,
        places=places(runs, [row["label"] for row in costs or ()]),
        command=command,
        whole=whole,
        baseline=significance.find_baseline(by_label(runs), baseline),
        costs=costs,
        data_dir=data_dir,
        versions=", ".join(f"{name} {x}" for name, x in _versions().items()),
        metrics=metrics,
    )


def check_folder(folder: str | pathlib.Path, title: str | None = None) -> None:
    """Checks that :func:`write` may write into a folder, before the work begins.

    Args:
      folder: Folder for the report.
      title: The title that an earlier report in it must have; None for any.

    Raises:
      FileExistsError: The folder holds files, but no report, or one of another title.
      NotADirectoryError: It is a file.
    """
    folder = pathlib.Path(folder)
    files.check_writable(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if MARKER not in _earlier(folder):
        raise FileExistsError(
            f"{folder} is not empty and holds no report (no results.json with the key "
            f"{MARKER!r}). Nothing was written: name a new folder, or empty this one."
        )
    if title is not None and (theirs := _earlier(folder).get("title")) != title:
        raise FileExistsError(
            f"{folder} holds another report, {theirs!r}: name another folder."
        )


def check_replaced(
    folder: str | pathlib.Path, runs: Sequence[Run], whole: bool
) -> None:
    """Refuses to replace an earlier report by one that shows less.

    Args:
      folder: Folder for the report.
      runs: The runs of the new report. One with all runs of the earlier report may
        take its place.
      whole: Whether the new report is a whole one.

    Raises:
      FileExistsError: The folder holds a report on other runs, or a whole one where the
        new one is short.
    """
    folder = pathlib.Path(folder)
    if MARKER not in _earlier(folder):
        return
    try:
        shown = json.loads((folder / "configs.json").read_bytes())
    except (OSError, ValueError):
        return  # a report that was never whole
    new = [files.strict(_described(run)) for run in runs]
    lost = [x for x in shown if not any(_same_run(x, one) for one in new)]
    if lost:
        names = dict.fromkeys(str(x["folder"] or x["label"]) for x in lost)
        what = f"a report that shows other runs too ({', '.join(names)})"
    elif not whole and (folder / "report.html").exists():
        what = "a whole report, of otmdr report"
    else:
        return
    raise FileExistsError(
        f"{folder} holds {what}. Name another folder with --output, or replace it with "
        "--overwrite."
    )


def _described(run: Run) -> dict[str, Any]:
    marks: dict[str, int] = {}
    if run.folder is not None:
        # A checksum: absolute paths have no meaning on another machine.
        marks["place"] = zlib.crc32(str(pathlib.Path(run.folder).resolve()).encode())
    if run.log_probs is not None:
        marks["predictions"] = zlib.crc32(np.ascontiguousarray(run.log_probs).tobytes())
    return {**_name(run), "config": run.config, **marks}


def _same_run(shown, new):
    """Whether two runs of reports are one, which may have moved or gone on."""
    alike = all(shown[name] == new[name] for name in ("folder", "config"))
    marks = [x for x in ("place", "predictions") if x in shown and x in new]
    return alike and (not marks or any(shown[x] == new[x] for x in marks))


def _earlier(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the results.json of a folder; empty if it cannot be read."""
    try:
        return files.read_json(folder / "results.json")
    except (OSError, ValueError):
        return {}


def check_distinct(runs: Sequence[Run]) -> None:
    """Refuses a run that is given twice.

    Raises:
      ValueError: A run counts once in a mean.
    """
    seen = set()
    for run in runs:
        if run.folder is None:
            continue
        path = pathlib.Path(run.folder).resolve()
        if path in seen:
            raise ValueError(
                f"{run.folder} was given twice: a run counts once in a mean."
            )
        seen.add(path)


def _results(title: str, rows: Sequence[summary.Row], runs: Sequence[Run]) -> dict:
    return {
        MARKER: _LAYOUT,
        "title": title,
        "versions": _versions(),
        "rows": [
            {
                "label": row.label,
                "n": row.n,
                **{
                    name: {"mean": cell.mean, "std": cell.std, "n": cell.n}
                    for name, cell in row.cells.items()
                },
            }
            for row in rows
        ],
        "runs": [{**_name(run), "result": run.result} for run in runs],
    }


def _name(run: Run) -> dict[str, Any]:
    if run.folder is None:
        return {"label": run.label, "folder": None}
    # An absolute path has no meaning on another machine.
    path = pathlib.Path(run.folder)
    return {
        "label": run.label,
        "folder": path.name if path.is_absolute() else path.as_posix(),
    }


def _versions() -> dict[str, str]:
    versions = {"otmdr_jax": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
