"""`otmdr landscape`: pictures of the loss on a line or plane in weight space."""

import dataclasses
import pathlib
import sys
from typing import Annotated, Any, Literal

import tyro

from otmdr_jax.experiments.cli.common import Checkpoint, DataPath, RunPaths


@dataclasses.dataclass(frozen=True)
class Landscape:
    """Show the loss landscape of a run, or of several side by side.

    Writes landscape.json, landscape.npz, landscape.png and, in two dimensions,
    landscape_surface.png into the run's folder. After an interrupt the same command
    resumes where it stopped.

    Examples:
    otmdr landscape runs/a

    otmdr landscape runs/a --kind hessian --range -0.5 0.5

    otmdr landscape runs/sgd runs/otmdr --split test

    otmdr landscape runs/a runs/b runs/c --kind runs

    otmdr landscape runs/a --kind trajectory
    """

    runs: tyro.conf.Positional[RunPaths]
    """Folders of the runs. Several runs of kind random or hessian are compared on the
    same axes, along the same random directions, with one colour scale. They must be of
    one architecture and have the same examples in the split."""
    kind: Literal["random", "hessian", "runs", "trajectory"] = "random"
    """Directions. random: filter-normalised, each filter at the norm of the network's
    own; hessian: the top eigenvectors of the Hessian; runs: through two or three runs;
    trajectory: the principal components of a run's checkpoints, of which training must
    keep enough."""
    points: int = 51
    """Number of points on each axis."""
    range: tuple[float, float] | None = None
    """First and last coordinate of each axis. Default: -1 1; for runs and trajectory,
    their extent and a quarter more on each side."""
    dimensions: Literal[1, 2] | None = None
    """1 for a line, 2 for a plane. Default: 2; for two runs, the line through them."""
    split: Literal["train", "validation", "test"] = "train"
    """Split of the data to measure on."""
    num_examples: int = 1_000
    """Number of examples of the split, evenly spread."""
    seed: int = 0
    """Seed of random directions."""
    checkpoint: Checkpoint = "latest"
    """Checkpoint: latest, best (on the validation set), or a step."""
    member: int | None = None
    """Member of an ensemble, counted from 0. Default: the loss of the mean probability
    of all members, along directions of all their weights."""
    statistics: Literal["auto", "running", "point"] = "auto"
    """BatchNorm's statistics. running: those of the run; point: those of the examples
    at each point; auto: point for the kinds runs and trajectory, running for the
    others."""
    data_dir: DataPath = None
    """Folder of prepared TFDS data, or an .npz file or its folder, if they have moved
    since the run."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the files. Default: the run's own; landscape-comparison for several
    runs, and landscape-runs for the kind runs."""
    overwrite: bool = False
    """Replace a landscape of other settings, another comparison, or foreign files of
    these names; measure the same landscape again."""
    quiet: bool = False
    """Show no progress."""


def run(options: Landscape) -> None:
    """`otmdr landscape RUN [RUN ...]`."""
    from otmdr_jax.experiments import report, run_folder, training
    from otmdr_jax.experiments.measure import surface

    if not options.runs:
        raise ValueError("name the folders of at least one run.")
    named = {field.name for field in dataclasses.fields(surface.Plan)}
    plan = surface.Plan(
        **{name: value for name, value in vars(options).items() if name in named}
    )
    folders = [pathlib.Path(folder) for folder in options.runs]
    labels = [
        report.label_of(run_folder.read_config(folder).flat()) for folder in folders
    ]
    compared = plan.kind != "runs" and len(folders) > 1
    if compared and plan.kind == "trajectory":
        raise ValueError(
            "trajectories lie in planes of their own and cannot be compared: name one "
            "run, or use --kind random or hessian."
        )
    default = "landscape-comparison" if compared else "landscape-runs"
    output = folders[0] if len(folders) == 1 else pathlib.Path(default)
    if options.output is not None:
        output = pathlib.Path(options.output)
    # Each compared run has its own folder, so that each measurement can resume.
    jobs = (
        [
            ([folder], output / f"{i}-{folder.resolve().name}")
            for i, folder in enumerate(folders)
        ]
        if compared
        else [(folders, output)]
    )
    comparison = None
    if compared:
        comparison = {
            "runs": [str(folder.resolve()) for folder in folders],
            **dataclasses.asdict(plan),
            "dimensions": plan.dimensions_of(1),
            "seed": plan.seed if plan.kind == "random" else None,
        }
    surface_goes = surface.check_pictures(output, comparison, options.overwrite)
    if compared:
        surface.check_comparison(
            folders,
            [target for _, target in jobs],
            plan,
            data_dir=options.data_dir,
            overwrite=options.overwrite,
        )
    records = []
    for inputs, target in jobs:
        try:
            records.append(
                surface.measure(
                    inputs,
                    plan,
                    target,
                    data_dir=options.data_dir,
                    overwrite=options.overwrite,
                    show_progress=not options.quiet,
                )
            )
        except training.Interrupted as stop:
            print(f"otmdr: {stop}", file=sys.stderr)
            sys.exit(128 + stop.signum)
    if plan.member is not None:
        labels = [f"{label}: member {plan.member}" for label in labels]
    if not compared:
        labels = [" and ".join(dict.fromkeys(labels))]
    elif len(set(labels)) < len(labels):
        labels = [
            f"{label}: {f.name}" for label, f in zip(labels, folders, strict=True)
        ]
    pairs = list(zip(labels, records, strict=True))
    written = [target / "landscape.json" for _, target in jobs]
    surface.mark_pictures(output, comparison)
    written.append(report.plot_landscape(pairs, output / "landscape.png"))
    path = output / "landscape_surface.png"
    if len(records[0]["axes"]) == 2:
        written.append(report.plot_landscape(pairs, path, surface=True))
    elif surface_goes:
        path.unlink(missing_ok=True)  # it shows the replaced landscape
    _print(pairs)
    print(f"Written: {', '.join(map(str, written))}")


def _print(pairs: list[tuple[str, dict[str, Any]]]) -> None:
    import numpy as np

    for label, record in pairs:
        losses = np.array(record["losses"], np.float64)
        finite = losses[np.isfinite(losses)]
        ends = f"{finite.min():.4g} to {finite.max():.4g}" if len(finite) else "none"
        print(
            f"{label}: {losses.size} points, losses {ends} nats on "
            f"{record['num_examples']} images of the {record['split']} set, step "
            f"{record['step']}, {record['seconds']:.1f} s"
        )
        missing = losses.size - finite.size
        if missing:
            print(f"  the loss is not finite at {missing} points")
        if record["eigenvalues"]:
            print(
                f"  eigenvalues {', '.join(f'{x:.4g}' for x in record['eigenvalues'])}"
            )
        if record["explained_variance"]:
            shares = [f"{100 * x:.1f} %" for x in record["explained_variance"]]
            print(f"  the axes hold {', '.join(shares)} of the variance of checkpoints")
