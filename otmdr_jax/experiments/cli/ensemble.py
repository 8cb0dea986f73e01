"""`otmdr ensemble`: members of finished runs, joined."""

import dataclasses

import tyro

from otmdr_jax.experiments.cli.common import print_tables


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Make an ensemble of finished runs: add members, drop members, train none.

    Examples:
    otmdr ensemble runs/a runs/b --output runs/ab

    otmdr ensemble runs/five --keep 0 2 3 --output runs/three
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of finished runs, of single models or ensembles: same data and options,
    but for model and seed."""
    output: str
    """Folder of the new run. The others stay as they are."""
    keep: tuple[int, ...] | None = None
    """Members to take, counted from 0 over all runs in their order. Default: all."""
    data_dir: str | None = None
    """Folder of prepared TFDS data, if it is no longer where the runs found it."""


def run(options: Ensemble) -> None:
    """`otmdr ensemble RUN RUN ...`."""
    from otmdr_jax.experiments import combine, report

    if not options.runs:
        raise ValueError("name the folders of at least one run.")
    combine.combine(
        options.runs, options.output, options.keep, data_dir=options.data_dir
    )
    print_tables(report.read_run(options.output), options.output)
    print(f"Run: {options.output}")
