"""`otmdr reproduce`: the paper's tables and figures."""

import dataclasses
import pathlib
import shlex
import signal
import sys
from typing import Annotated, Literal

import tyro

from otmdr_jax.experiments.cli.common import DataPath, Folder

Name = Literal["table1", "table2", "table3", "table4", "table5", "figure1", "figure2"]


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Train the runs of a table or figure of the paper; print it beside the paper's.

    Runs that are finished are kept, one that was interrupted goes on: several sittings
    add up. Targets of one output folder share the runs that they have in common.

    Writes TARGET.md, TARGET.html and TARGET.json: each cell with mean, standard
    deviation, number of seeds and seconds, the printed number beside it, and paired
    tests of the paper's order.

    Examples:
    otmdr reproduce table1 --scale small --dry-run

    otmdr reproduce table1 --scale small --data-dir ~/tfds --datasets cifar10

    otmdr reproduce table3 --scale paper --variant released
    """

    target: tyro.conf.Positional[Name]
    """Table or figure."""
    scale: Literal["paper", "small", "smoke"] = "paper"
    """paper: the paper's networks and epochs. small: the same families at small width,
    5,000 training and 2,000 test images, a tenth of the epochs (of ensembles a
    twentieth): hours on two processor cores. smoke: a few steps of each cell on digits,
    to see that all of it runs."""
    variant: Literal["paper", "released"] = "paper"
    """The paper's text, or its published code where the two differ
    (docs/paper-versus-code.md)."""
    datasets: tuple[Literal["cifar10", "cifar100"], ...] = ("cifar10", "cifar100")
    """Data sets of the paper to run."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD ...")] = ()
    """Methods to run, by their names in the table. Default: all of them."""
    data_dir: DataPath = None
    """Folder of prepared TFDS data."""
    output: Annotated[Folder | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the runs and pages. Default: reproduction/SCALE-VARIANT."""
    jobs: int = 1
    """Runs to train at a time, on processors: each has its share of the cores."""
    dry_run: bool = False
    """Print the cells, their gradients and an estimate of hours on this machine, and
    stop."""
    quiet: bool = False
    """Show no progress."""


def run(options: Reproduce) -> None:
    """`otmdr reproduce TARGET`."""
    from otmdr_jax.experiments import jobs, reproduce, training
    from otmdr_jax.experiments.reproduce import figures, running

    every, cells = _cells(options)
    output = pathlib.Path(
        options.output or f"reproduction/{options.scale}-{options.variant}"
    )
    if options.jobs != 1 and options.target == "table5":
        raise ValueError(
            "table5 times runs that have the machine alone: leave out jobs."
        )
    jobs.check(options.jobs)
    # All that the page will show, before hours of training.
    running.check(every, output / "runs")
    if options.dry_run:
        _print_estimate(options, cells, output)
        return
    show = {"show_progress": not options.quiet}
    stopped: BaseException | None = None
    failed: dict[str, str] = {}
    try:
        reproduce.run(cells, output / "runs", options.target, jobs=options.jobs, **show)
        if options.target == "figure2":
            failed = figures.measure_landscapes(
                every, output / "runs", options.scale, data_dir=options.data_dir, **show
            )
    except (training.Interrupted, KeyboardInterrupt) as stop:
        stopped = stop  # what is finished is shown all the same
    _show(options, every, cells, output, failed)
    if stopped is not None:
        said = str(stopped) or "stopped"
        print(f"otmdr: {said}\nTo go on: {_command(options)}", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "signum", signal.SIGINT))


def _cells(options):
    """(all cells of the target, those that are asked for)."""
    from otmdr_jax.experiments import reproduce

    # One set of digits stands for both, and Table 5 is of one.
    single = options.scale == "smoke" or options.target == "table5"
    both = ("cifar10",) if single else ("cifar10", "cifar100")
    if single and options.datasets not in (both, ("cifar10", "cifar100")):
        raise ValueError(
            f"{options.target} at the scale {options.scale!r} has no choice of data: "
            "leave --datasets out."
        )
    if options.scale == "smoke" and options.data_dir is not None:
        raise ValueError("smoke trains on digits, which need no --data-dir.")
    every = reproduce.cells(
        options.target,
        options.scale,
        options.variant,
        datasets=both,
        data_dir=options.data_dir,
    )
    if not options.datasets:
        raise ValueError("datasets must name at least one set: cifar10, cifar100.")
    cells = [cell for cell in every if cell.data in options.datasets]
    names = list(dict.fromkeys(cell.method for cell in cells))
    if unknown := [name for name in options.only if name not in names]:
        raise ValueError(
            f"only must name methods of {options.target}, {', '.join(names)}; got "
            f"{', '.join(unknown)}."
        )
    return every, [c for c in cells if not options.only or c.method in options.only]


def _print_estimate(options, cells, output):
    from otmdr_jax.experiments import reproduce
    from otmdr_jax.experiments.report.tables import Table
    from otmdr_jax.experiments.reproduce import figures, running

    done = running.finished(cells, output / "runs")
    examples = 0
    if options.target == "figure2":
        examples = figures.landscape_examples(options.scale)
    rows = reproduce.estimate(cells, landscape_examples=examples)
    for row in rows:
        row["left"] = row["hours"] * (1 - len(done[row["name"]]) / row["runs"])
    lines = [
        [
            row["name"],
            f"{len(done[row['name']])} of {row['runs']}",
            f"{row['steps']:,}",
            f"{row['gradients']:,.0f}",
            f"{row['operations']:.1e}",
            _hours(row["hours"]),
            _hours(row["left"]),
        ]
        for row in rows
    ]
    header = ["cell", "finished", "steps a run", "gradients", "operations", "hours"]
    header.append("left")
    title = reproduce.TARGETS[options.target].title
    Table(header, lines).print(f"{title}, {options.scale}")
    hours, left = (sum(row[name] for row in rows) for name in ("hours", "left"))
    print(
        f"In all about {_hours(hours)} hours on this machine, one run at a time, and "
        f"{_hours(left)} of them left, from the speed of a small network; compilation "
        "comes on top."
    )


def _show(options, every, cells, output, failed):
    """Prints and writes what there is."""
    from otmdr_jax.experiments import reproduce
    from otmdr_jax.experiments.reproduce import figures, running, tables

    # What other sittings have trained stays on the page.
    done = running.finished(every, output / "runs")
    shown = [cell for cell in every if cell in cells or done[cell.name]]
    found = reproduce.measured(shown, output / "runs", options.target)
    what = (options.target, options.scale, options.variant, found)
    for (part, data), group in tables.blocks(found).items():
        names = reproduce.TARGETS[options.target].metrics
        tables.table(group, names).print(f"{part}, {data}")
    landscapes = []
    if options.target == "figure2":
        places = {(cell.part, cell.data) for cell in shown}
        pairs = [cell for cell in every if (cell.part, cell.data) in places]
        landscapes = figures.landscapes(pairs, output / "runs", options.scale, failed)
        for one in landscapes:
            if one.missing:
                print(f"{one.title}: not shown: {one.missing}")
    page = reproduce.page(*what, _command(options), landscapes)
    path = tables.write(output, options.target, page, tables.record(*what))
    print(f"Written: {path}")


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "< 0.01" if hours else "0"
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _command(options: Reproduce) -> str:
    words = ["otmdr", "reproduce", options.target, "--scale", options.scale]
    if options.variant != "paper":
        words += ["--variant", options.variant]
    if options.datasets != ("cifar10", "cifar100"):
        words += ["--datasets", *options.datasets]
    if options.only:
        words += ["--only", *options.only]
    if options.data_dir is not None:
        words += ["--data-dir", options.data_dir]
    if options.jobs != 1:
        words += ["--jobs", str(options.jobs)]
    if options.output is not None:
        words += ["--output", str(options.output)]
    return shlex.join(words)
