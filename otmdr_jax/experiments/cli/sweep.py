"""`otmdr sweep`: methods x seeds x settings from one file."""

import dataclasses
import pathlib
import shlex
import sys
from typing import Annotated

import tyro

from otmdr_jax.experiments.cli.common import Folder, Method


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Run methods x seeds x settings from one file; skip finished runs.

    The TOML file holds seeds = [0, 1, 2], a table [options] that all runs share, and a
    table [methods."NAME"] with the options of each method. A list of values stands for
    one run for each value. Every run is checked before the first one starts. Ctrl-C
    saves the current run, and the same command resumes the sweep.

    Writes a folder for each run, sweep.json with a row for each run (metrics, gradient
    evaluations, seconds, memory), and a report: mean and standard deviation over seeds,
    paired tests against the baseline, accuracy against cost.

    Examples:
    otmdr sweep examples/sweep_digits.toml --output sweeps/digits --baseline SGD

    otmdr sweep my.toml --output sweeps/mine --dry-run
    """

    file: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE.toml")]]
    """TOML file of the sweep."""
    output: Folder
    """Folder of the runs. Name the folder of an earlier sweep to resume it."""
    baseline: Method = None
    """Method to compare the others with. Default: the first one."""
    dry_run: bool = False
    """List the runs and stop."""
    quiet: bool = False
    """Show no progress."""


def run(options: Sweep) -> None:
    """`otmdr sweep FILE --output FOLDER`."""
    from otmdr_jax.experiments import report, run_folder, sweep, training
    from otmdr_jax.experiments.report import cost, significance, tables

    output = pathlib.Path(options.output).expanduser()
    if run_folder.is_run(output):
        raise ValueError(f"{output} is a run, not the folder of a sweep.")
    plan = sweep.plan(options.file, output)
    labels = list(dict.fromkeys(one.label for one in plan.runs))
    baseline = significance.find_baseline(labels, options.baseline)
    sweep.check(plan.runs)
    report.check_folder(output / "report")
    lines = [
        [one.label, str(one.config.run.seed), str(one.folder), sweep.state_of(one)]
        for one in plan.runs
    ]
    if options.dry_run:
        table = tables.Table(["Method", "Seed", "Folder", "State"], lines)
        table.print(str(output))
        _warn(plan)
        return
    try:
        rows = sweep.run(
            plan.runs, output / "sweep.json", show_progress=not options.quiet
        )
    except training.Interrupted as stop:
        again = _command(options)
        print(f"otmdr: {stop}\nTo resume the whole sweep: {again}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    finished = [
        report.read_run(one.folder, one.label)
        for one in plan.runs
        if run_folder.is_finished(one.folder)
    ]
    if not finished:
        raise ValueError("all runs diverged: lower learning_rate or rho.")
    if baseline not in [run.label for run in finished]:
        print(f"All runs of {baseline} diverged: {finished[0].label} is the baseline.")
        baseline = finished[0].label
    report.print_summary(finished, str(output))
    cost.table(rows).print("Cost of a run")
    cost.paired_table(rows, baseline).print(f"Paired with {baseline}")
    _warn(plan)
    for row in rows:
        if row["status"] == "diverged":
            print(f"Diverged: {row['folder']}")
    path = report.write(
        output / "report",
        finished,
        f"Sweep of {pathlib.Path(options.file).name}",
        _command(options),
        whole=True,
        baseline=baseline,
        costs=rows,
    )
    print(f"Written: {output / 'sweep.json'}, {path}")


def _command(options) -> str:
    words = ["otmdr", "sweep", options.file, "--output", options.output]
    if options.baseline is not None:
        words += ["--baseline", options.baseline]
    return shlex.join(words)


def _warn(plan) -> None:
    if plan.unequal:
        print(f"Methods differ in more than the method: {', '.join(plan.unequal)}")
