"""Helpers that several commands share."""

import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

# Errors whose message is enough for a user; the command prints no traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError)


# What the help shows in the place of a value.
RunPath = Annotated[str, tyro.conf.arg(metavar="RUN")]
RunPaths = Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]
Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER")]
DataPath = Annotated[str | None, tyro.conf.arg(metavar="FOLDER|FILE.npz")]
Checkpoint = Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")]
Method = Annotated[str | None, tyro.conf.arg(metavar="METHOD|RUN")]
Title = Annotated[str | None, tyro.conf.arg(metavar="TITLE")]


def tabled_runs(
    folders: Sequence[str],
    output: str,
    title: str | None,
    *,
    what: str,
    whole: bool,
    overwrite: bool,
) -> tuple[list[Any], str]:
    """Reads the runs for a report and prints their table, before the report is written.

    Args:
      folders: Folders of the runs.
      output: Folder of the report; it is checked first.
      title: Title of the report; None for `what` and the names of the data.
      what: What the report is.
      whole: Whether it is a whole report.
      overwrite: Whether it may replace one that shows more.

    Returns:
      The runs and the title.
    """
    from otmdr_jax.experiments import report, run_folder

    if not folders:
        raise ValueError("name the folders of at least one run.")
    report.check_folder(output)
    for folder in folders:
        run_folder.check_classes(folder, "a report")
    found = report.with_distinct_labels(map(report.read_run, folders))
    report.check_distinct(found)
    if not overwrite:
        report.check_replaced(output, found, whole)
    if title is None:
        title = f"{what}: {', '.join(dict.fromkeys(map(_data_of, found)))}"
    report.print_summary(found, title)
    for caution in report.cautions(found):
        print(f"Note: {caution}")
    return found, title


def _data_of(run: Any) -> str:
    """The name of a run's data."""
    if run.data is not None:
        return str(run.data["name"])
    return pathlib.Path(str(run.config.get("data", "unknown data"))).stem


def print_tables(run: Any, title: str) -> None:
    """Prints a run's metrics and, for an ensemble, those of its members."""
    from otmdr_jax.experiments import report
    from otmdr_jax.metrics import diversity

    report.print_summary([run], title)
    if of_members := report.member_runs(run):
        report.print_summary(of_members, f"{title}: members")
        found = [f"{n} {run.result[n]:.4g}" for n in diversity.NAMES if n in run.result]
        print(f"Diversity: {', '.join(found) or 'not defined'}")
