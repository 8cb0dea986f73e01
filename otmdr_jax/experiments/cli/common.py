"""Helpers that several commands share."""

from collections.abc import Sequence
from typing import Any

# Errors whose message is enough for a user; the command prints no traceback.
EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError)


def tabled_runs(folders: Sequence[str], output: str, title: str) -> list[Any]:
    """Reads the runs for a report and prints their table, before the report is written.

    Args:
      folders: Folders of the runs.
      output: Folder of the report; it is checked first.
      title: Title of the table.
    """
    from otmdr_jax.experiments import report

    if not folders:
        raise ValueError("name the folders of at least one run.")
    report.check_folder(output)
    found = report.with_distinct_labels(map(report.read_run, folders))
    report.check_distinct(found)
    report.print_summary(found, title)
    for caution in report.cautions(found):
        print(f"Note: {caution}")
    return found


def print_tables(run: Any, title: str) -> None:
    """Prints a run's metrics and, for an ensemble, those of its members."""
    from otmdr_jax.experiments import report
    from otmdr_jax.metrics import diversity

    report.print_summary([run], title)
    if of_members := report.member_runs(run):
        report.print_summary(of_members, f"{title}: members")
        found = [f"{n} {run.result[n]:.4g}" for n in diversity.NAMES if n in run.result]
        print(f"Diversity: {', '.join(found) or 'not defined'}")
