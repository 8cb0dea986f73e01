"""`otmdr report`: all that is known of some runs, on one page."""

import dataclasses
import pathlib
import shlex

import tyro

from otmdr_jax.experiments.cli.common import tabled_runs


@dataclasses.dataclass(frozen=True)
class Report:
    """Write all that is known of runs into one page: report.html, and Markdown.

    Metrics with intervals and tests against a baseline, learning curves, reliability,
    calibration, confusion, risk and coverage, shift, sharpness, landscapes, the worst
    and the most uncertain images. What otmdr calibrate, shift, sharpness and landscape
    left in the runs' folders is shown; what is missing is named.

    Examples:
    otmdr report runs/a runs/b --baseline SGD

    otmdr report runs/* --output report --title "Digits with noisy labels"
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs. Those that differ in their seed alone are one method."""
    baseline: str | None = None
    """Method that the others are compared with, by its label in the tables, or one of
    the runs' folders. Default: that of the first run."""
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
