"""The main job in two minutes: SGD, SAM and OT-MDR on digits with noisy labels."""

import os
import pathlib
import tempfile

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments import report, training

# A fifth of the training labels is wrong, so that fitting them all does not pay.
BASE = config_lib.preset("demo")
METHODS = (
    BASE.replace(method="sgd"),
    BASE.replace(method="sam"),
    BASE.replace(method="otmdr", num_particles=1),
    BASE.replace(method="otmdr", num_particles=2),
    BASE.replace(method="otmdr", num_particles=1, members="3"),
)
SEEDS = (0, 1, 2)


def run(
    output: str | os.PathLike,
    *,
    seeds: tuple[int, ...] = SEEDS,
    epochs: int | None = None,
    show_progress: bool = True,
) -> list[report.Run]:
    """Trains every method with every seed, prints the table and writes the report.

    Args:
      output: The report's folder; an earlier report of the demo in it is replaced.
      seeds: Seeds of initialisation, data order, splits and noise.
      epochs: Passes over the data; None for the demo's own.
      show_progress: Whether to show progress.

    Returns:
      The runs.

    Raises:
      FileExistsError: `output` holds something that is no report of the demo.
    """
    title = f"Digits with {BASE.data.label_noise:.0%} wrong training labels"
    report.check_folder(pathlib.Path(output), title)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ from each other, got {seeds}.")
    epochs = BASE.run.epochs if epochs is None else epochs
    configs = [one.replace(seed=s, epochs=epochs) for one in METHODS for s in seeds]
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for config in configs:
            many = f"-m{config.model.members}" if config.model.members else ""
            name = f"{report.label_of(config.flat())}{many}-s{config.run.seed}"
            folder = pathlib.Path(scratch) / name
            training.train(config, output=folder, show_progress=show_progress)
            runs.append(report.read_run(folder))
    report.print_summary(runs, title)
    path = report.write(pathlib.Path(output), runs, title, command="otmdr demo")
    print(f"Report: {path}")
    return runs
