"""`otmdr export`: a run's weights or its prediction, for programs without otmdr_jax."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from otmdr_jax.experiments.cli.common import Checkpoint, RunPath


@dataclasses.dataclass(frozen=True)
class Export:
    """Export a run: its weights by name, or the program that predicts.

    safetensors and npz hold the parameters as arrays named by their paths, as
    params/conv1/kernel, and BatchNorm's statistics, as state/norm1/mean.

    stablehlo is a program from images to calibrated probabilities, with the weights in
    it, for CPUs, CUDA GPUs and TPUs. It runs where JAX is installed:

    program = jax.export.deserialize(open(FILE, "rb").read())

    probabilities = program.call(images)
    """

    run: tyro.conf.Positional[RunPath]
    """Folder of the run."""
    format: Literal["safetensors", "npz", "stablehlo"] = "safetensors"
    """Format of the file."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write. Default: RUN/export and the ending of the format."""
    checkpoint: Checkpoint = "latest"
    """Checkpoint: latest, best (on the validation set), or a step."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = (
        "cpu",
        "cuda",
        "tpu",
    )
    """Platforms of a stablehlo program."""
    batch_size: int | None = None
    """Number of images that a stablehlo program takes. Default: any number."""
    overwrite: bool = False
    """Replace the file."""


def run(options: Export) -> None:
    """`otmdr export RUN`."""
    from otmdr_jax.experiments import export, restore

    output = options.output
    if output is None:
        ending = export.FORMATS[options.format]
        output = str(pathlib.Path(options.run) / f"export{ending}")
    opened = restore.open_run(options.run, options.checkpoint)
    path = export.export(
        opened,
        output,
        options.format,
        platforms=options.platforms,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )
    size = path.stat().st_size / 2**20
    print(f"{opened!r} as {options.format}, {size:.1f} MiB")
    if opened.class_names:
        print(
            "Not calibrated: otmdr calibrate fits a temperature."
            if opened.temperature is None
            else f"Calibrated with the temperature {opened.temperature:.4g}."
        )
    print(f"Written: {path}")
