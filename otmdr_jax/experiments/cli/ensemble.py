"""`otmdr ensemble`: an ensemble made of finished runs."""

import dataclasses

import tyro

from otmdr_jax.experiments.cli.common import DataPath, Folder, RunPaths, print_tables


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Make an ensemble of finished runs without training; add or drop members.

    Examples:
    otmdr ensemble runs/a runs/b --output runs/ab

    otmdr ensemble runs/five --keep 0 2 3 --output runs/three
    """

    runs: tyro.conf.Positional[RunPaths]
    """Folders of finished runs, of single models or ensembles. Their data and options
    must be equal, except model and seed."""
    output: Folder
    """Folder of the new run. The other runs stay unchanged."""
    keep: tuple[int, ...] | None = None
    """Members to keep, counted from 0 over all runs in order. Default: all."""
    data_dir: DataPath = None
    """Folder of prepared TFDS data, or an .npz file or its folder, if they have moved
    since the runs."""


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
