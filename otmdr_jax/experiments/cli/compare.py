"""`otmdr compare`: a short report on several runs side by side."""

import dataclasses
import shlex

import tyro

from otmdr_jax.experiments.cli.common import Folder, RunPaths, Title, tabled_runs


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs side by side: a table, learning curves, reliability diagrams.

    Runs that differ only in their seed form one row with mean and standard deviation.
    """

    runs: tyro.conf.Positional[RunPaths]
    """Folders of the runs."""
    output: Folder = "comparison"
    """Folder of the report. It may hold an earlier report on these runs, which is
    replaced, or on some of them."""
    title: Title = None
    """Title of the report. Default: Comparison, and the names of the data."""
    overwrite: bool = False
    """Replace a report on other runs, or a whole one."""


def run(options: Compare) -> None:
    """`otmdr compare RUN RUN ...`."""
    from otmdr_jax.experiments import report

    found, title = tabled_runs(
        options.runs,
        options.output,
        options.title,
        what="Comparison",
        whole=False,
        overwrite=options.overwrite,
    )
    words = ["otmdr", "compare", *options.runs, "--output", options.output]
    if options.title is not None:
        words += ["--title", options.title]
    path = report.write(options.output, found, title, command=shlex.join(words))
    print(f"Report: {path}")
