"""What several commands share."""

from typing import Any

# Errors that say all there is to say: no traceback.
EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError)


def print_tables(run: Any, title: str) -> None:
    """A run's metrics and, of an ensemble, its members'."""
    from otmdr_jax.experiments import report
    from otmdr_jax.metrics import diversity

    columns = report.known_columns([run])
    report.print_table(report.summarise([run], columns), title=title)
    if of_members := report.member_runs(run):
        columns = [c for c in columns if c.name != "seconds_per_step"]
        rows = report.summarise(of_members, columns)
        report.print_table(rows, title=f"{title}: members")
        found = [f"{n} {run.result[n]:.4g}" for n in diversity.NAMES if n in run.result]
        print(f"Diversity: {', '.join(found) or 'not defined'}")
