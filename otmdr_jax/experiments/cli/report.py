"""`otmdr report`: a full report on runs, on one page."""

import dataclasses
import pathlib
import shlex

import tyro

from otmdr_jax.experiments.cli.common import tabled_runs


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a full report on runs as one page: report.html, and Markdown.

    It shows metrics with intervals and tests against a baseline, learning curves,
    reliability, calibration, confusion, risk and coverage, shift, sharpness,
    landscapes, and the worst and the most uncertain images. Some parts need the records
    that otmdr calibrate, shift, sharpness and landscape write into the runs' folders;
    the page names those that are missing.

    Examples:
    otmdr report runs/a runs/b --baseline SGD

    otmdr report runs/* --output report --title "Digits with noisy labels"
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs. Runs that differ only in their seed form one method."""
    baseline: str | None = None
    """Method to compare the others with: its label in the tables, or the folder of one
    of its runs. Default: the method of the first run."""
    output: str = "report"
    """Folder of the report; an earlier report in it is replaced."""
    title: str = "Report"
    """Title of the page."""


def run(options: Report) -> None:
    """`otmdr report RUN RUN ...`."""
    from otmdr_jax.experiments import report

    found = tabled_runs(options.runs, options.output, options.title)
    baseline = options.baseline
    folders = [pathlib.Path(run).resolve() for run in options.runs]
    if baseline is not None and pathlib.Path(baseline).resolve() in folders:
        baseline = found[folders.index(pathlib.Path(baseline).resolve())].label
    words = ["otmdr", "report", *options.runs, "--output", options.output]
    words += ["--title", options.title]
    if options.baseline is not None:
        words += ["--baseline", options.baseline]
    path = report.write(
        options.output,
        found,
        options.title,
        shlex.join(words),
        whole=True,
        baseline=baseline,
        show_progress=True,
    )
    print(f"Report: {path}")
