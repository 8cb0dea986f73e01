"""`otmdr report`: a full report on runs, on one page."""

import dataclasses
import pathlib
import shlex

import tyro

from otmdr_jax.experiments.cli.common import (
    DataPath,
    Folder,
    Method,
    RunPaths,
    Title,
    tabled_runs,
)


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

    runs: tyro.conf.Positional[RunPaths]
    """Folders of the runs. Runs that differ only in their seed form one method."""
    baseline: Method = None
    """Method to compare the others with: its label in the tables, or the folder of one
    of its runs. Default: the method of the first run."""
    output: Folder = "report"
    """Folder of the report. It may hold an earlier report on these runs, which is
    replaced, or on some of them."""
    title: Title = None
    """Title of the page. Default: Report, and the names of the data."""
    data_dir: DataPath = None
    """Folder of prepared TFDS data, or an .npz file or its folder, if they have moved
    since the runs: the page shows images."""
    overwrite: bool = False
    """Replace a report on other runs."""


def run(options: Report) -> None:
    """`otmdr report RUN RUN ...`."""
    from otmdr_jax.experiments import report

    found, title = tabled_runs(
        options.runs,
        options.output,
        options.title,
        what="Report",
        whole=True,
        overwrite=options.overwrite,
    )
    baseline = options.baseline
    folders = [pathlib.Path(run).resolve() for run in options.runs]
    if baseline is not None and pathlib.Path(baseline).resolve() in folders:
        baseline = found[folders.index(pathlib.Path(baseline).resolve())].label
    words = ["otmdr", "report", *options.runs]
    for flag in ("output", "title", "baseline", "data_dir"):
        if (value := getattr(options, flag)) is not None:
            words += [f"--{flag.replace('_', '-')}", value]
    path = report.write(
        options.output,
        found,
        title,
        shlex.join(words),
        whole=True,
        baseline=baseline,
        data_dir=options.data_dir,
        show_progress=True,
    )
    print(f"Report: {path}")
