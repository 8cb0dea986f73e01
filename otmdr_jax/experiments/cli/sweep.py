"""`otmdr sweep`: methods x seeds x settings from one file."""

import dataclasses
import pathlib
import shlex
import sys
from typing import Annotated, Any

import tyro

from otmdr_jax.experiments.cli.common import Folder, Method


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Run methods x seeds x settings from one file; skip finished runs.

    The TOML file holds seeds = [0, 1, 2], a table [options] that all runs share, and a
    table [methods."NAME"] with the options of each method. A list of values stands for
    one run for each value; with a table [tuning], each method's best setting on the
    validation set is found first, and it alone is run with the seeds. Every run is
    checked before the first one starts. Ctrl-C saves the runs at work, and the same
    command resumes the sweep.

    Writes a folder for each run, sweep.json with a row for each run (metrics, gradient
    evaluations, seconds, memory), tuning.json with those of the tuning, and a report:
    mean and standard deviation over seeds, paired tests against the baseline, accuracy
    against cost.

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
    jobs: int = 1
    """Runs to train at a time, on processors: each has its share of the cores, and
    small networks finish sooner so."""
    dry_run: bool = False
    """List the runs and stop."""
    quiet: bool = False
    """Show no progress."""


def run(options: Sweep) -> None:
    """`otmdr sweep FILE --output FOLDER`."""
    from otmdr_jax.experiments import jobs, report, run_folder, sweep, training
    from otmdr_jax.experiments.report import cost, significance

    output = pathlib.Path(options.output)
    if run_folder.is_run(output):
        raise ValueError(f"{output} is a run, not the folder of a sweep.")
    plan = sweep.plan(options.file, output)
    jobs.check(options.jobs)
    names = [one.label if plan.tuning is None else one.method for one in plan.settings]
    baseline = significance.find_baseline(names, options.baseline)
    trials = [] if plan.tuning is None else plan.tuning.runs
    sweep.check([*trials, *plan.runs])
    report.check_folder(output / "report")
    sweep.check_tuning(plan)
    if options.dry_run:
        _print_plan(plan, trials, output)
        return
    training_options: dict[str, Any] = {
        "jobs": options.jobs,
        "show_progress": not options.quiet,
    }
    runs = plan.runs
    try:
        if plan.tuning is not None:
            tuned = sweep.tune(plan, output / "tuning.json", **training_options)
            _print_tuning(plan, tuned)
            runs = tuned.runs
            baseline = next(one.label for one in tuned.chosen if one.method == baseline)
        rows = sweep.run(runs, output / "sweep.json", **training_options)
    except training.Interrupted as stop:
        again = _command(options)
        print(f"otmdr: {stop}\nTo resume the whole sweep: {again}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    finished = [
        report.read_run(one.folder, one.label)
        for one in runs
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


def _print_plan(plan, trials, output):
    from otmdr_jax.experiments import sweep
    from otmdr_jax.experiments.report import tables

    for title, runs in (("tuning", trials), ("runs", plan.runs)):
        lines = [
            [one.label, str(one.config.run.seed), str(one.folder), sweep.state_of(one)]
            for one in runs
        ]
        if runs:
            table = tables.Table(["Method", "Seed", "Folder", "State"], lines)
            table.print(f"{output}: {title}")
    if trials:
        print("Of the runs, those of each method's best setting will be trained.")
    _warn(plan)


def _print_tuning(plan, tuned):
    from otmdr_jax.experiments.report import tables

    chosen = [one.label for one in tuned.chosen]
    lines = [
        [label, f"{value:.4f}", "yes" if label in chosen else ""]
        for label, value in tuned.scores.items()
    ]
    metric = f"validation {plan.tuning.metric}"
    tables.Table(["Setting", metric, "chosen"], lines).print("Tuning")
    for one in tuned.chosen:
        for name in one.ends:
            print(
                f"{one.label}: {name} is at the end of its values; a better one may "
                "lie beyond."
            )


def _command(options) -> str:
    words = ["otmdr", "sweep", options.file, "--output", options.output]
    if options.baseline is not None:
        words += ["--baseline", options.baseline]
    if options.jobs != 1:
        words += ["--jobs", str(options.jobs)]
    return shlex.join(words)


def _warn(plan) -> None:
    if plan.unequal:
        print(f"Methods differ in more than the method: {', '.join(plan.unequal)}")
