"""`otmdr compare`: a short report on several runs side by side."""

import dataclasses

import tyro

from otmdr_jax.experiments.cli.common import tabled_runs


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs side by side: a table, learning curves, reliability diagrams.

    Runs that differ only in their seed form one row with mean and standard deviation.
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

    found = tabled_runs(options.runs, options.output, options.title)
    command = "otmdr compare " + " ".join(options.runs)
    path = report.write(options.output, found, options.title, command=command)
    print(f"Report: {path}")
