"""`otmdr compare`: runs side by side."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs side by side: a table, learning curves, reliability diagrams.

    Runs that differ in their seed alone are one row: mean and standard deviation.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs."""
    output: str = "comparison"
    """Folder of the report; an earlier report in it is replaced."""
    title: str = "Comparison"
    """Title of the report."""


def run(options: Compare) -> None:
    """`otmdr compare RUN RUN ...`."""
    from otmdr_jax.experiments import report

    if not options.runs:
        raise ValueError("name the folders of at least one run.")
    report.check_folder(options.output)
    found = [report.read_run(run) for run in options.runs]
    found = report.with_distinct_labels(found)
    columns = report.known_columns(found)
    report.print_table(report.summarise(found, columns), title=options.title)
    command = "otmdr compare " + " ".join(options.runs)
    path = report.write(options.output, found, options.title, command=command)
    print(f"Report: {path}")
