"""A report as a folder: a page to read, pictures, and every number behind them."""

import importlib.metadata
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from otmdr_jax import __version__, metrics
from otmdr_jax.experiments.report import document, plots, significance, summary
from otmdr_jax.experiments.report.labels import by_label
from otmdr_jax.experiments.report.reading import Run
from otmdr_jax.io import files
from otmdr_jax.io.progress import Progress

# A results.json with this key marks a folder as a report. Its value is the version of
# the files' layout.
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
    show_progress: bool = False,
) -> pathlib.Path:
    """Writes a report on runs, or replaces an earlier one.

    The files are report.md, its pictures, results.json (all rows and results) and
    configs.json (each run's exact options); a whole report also has report.html, the
    same page as one file with the pictures inside. Nothing is written if anything is
    wrong with the runs.

    Args:
      folder: A new or empty folder, or one of an earlier report: that report's files
        are replaced, other files are kept.
      runs: The runs.
      title: The page's heading.
      command: What made the report, for the page.
      whole: Everything that is known of the runs, with intervals, significance and
        images; what is missing is named. Otherwise the table of results, learning
        curves and reliability diagrams.
      baseline: The label that a whole report compares with, in upper or lower case.
        Default: the first one.
      costs: Rows of a sweep, see :func:`otmdr_jax.experiments.sweep.run`: what the runs
        cost, and tests over seeds, in a whole report.
      show_progress: Whether to show how many pictures are drawn.

    Returns:
      The path of report.html, or of report.md where there is none.

    Raises:
      FileExistsError: The folder holds something that is no report.
      ImportError: matplotlib, Jinja2 or markdown-it-py is not installed.
      ValueError: No runs, a run given twice, or no such baseline.
    """
    folder, runs = pathlib.Path(folder), list(runs)
    check_folder(folder)
    _check_distinct(runs)
    rows = summary.summarise(runs, summary.known_columns(runs))
    page = compose(
        title, runs, command=command, whole=whole, baseline=baseline, costs=costs
    )
    drawn = {}
    with Progress(len(page.pictures), 0, "drawing", show_progress, "pictures") as bar:
        for i, (name, picture) in enumerate(page.pictures.items(), 1):
            drawn[name] = plots.draw(picture.figure())
            bar.update(i)
    texts = {"report.md": document.markdown(page)}
    if whole:
        texts["report.html"] = document.html(page, drawn)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_pictures(folder, keep=drawn)
    # The marker comes first: a report that was cut off can be written again.
    results = {**_results(title, rows, runs), "pictures": list(drawn)}
    files.write_json(folder / "results.json", results, default=str)
    configs = [{**_name(run), "config": run.config} for run in runs]
    files.write_json(folder / "configs.json", configs, default=str)
    for name, text in texts.items():
        files.write_text(folder / name, text)
    for name, one in drawn.items():
        files.write_bytes(folder / f"{name}.png", one.png)
    return folder / list(texts)[-1]


def compose(
    title: str,
    runs: Sequence[Run],
    *,
    command: str | None = None,
    whole: bool = False,
    baseline: str | None = None,
    costs: Sequence[dict[str, Any]] | None = None,
) -> document.Page:
    """The page of a report, whose pictures are not drawn yet: see :func:`write`."""
    return document.page(
        title,
        runs=runs,
        rows=summary.summarise(runs, summary.known_columns(runs)),
        command=command,
        whole=whole,
        baseline=significance.find_baseline(by_label(runs), baseline),
        costs=costs,
        versions=", ".join(f"{name} {x}" for name, x in _versions().items()),
        metrics=metrics,
    )


def _remove_pictures(folder: pathlib.Path, keep: Iterable[str]) -> None:
    """Removes pictures that an earlier report lists and this one has not."""
    for name in set(_earlier(folder).get("pictures", [])) - set(keep):
        (folder / f"{name}.png").unlink(missing_ok=True)


def check_folder(folder: str | pathlib.Path) -> None:
    """Checks that a report may be written here, before the work for it is done.

    Args:
      folder: Where :func:`write` shall write.

    Raises:
      FileExistsError: The folder holds something that is no report.
    """
    folder = pathlib.Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if MARKER not in _earlier(folder):
        what = "is not empty and holds no report" if folder.is_dir() else "is a file"
        raise FileExistsError(
            f"{folder} {what} (no results.json with the key {MARKER!r}). Nothing was "
            "written: name a new folder, or empty this one."
        )


def _earlier(folder: pathlib.Path) -> dict[str, Any]:
    """The results.json of a folder; empty where there is none that can be read."""
    try:
        return files.read_json(folder / "results.json")
    except (OSError, ValueError):
        return {}


def _check_distinct(runs: Sequence[Run]) -> None:
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
    # An absolute path means nothing on another machine.
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
