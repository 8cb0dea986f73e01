"""The main job in one minute: SGD, SAM and OT-MDR on digits with noisy labels."""

import os
import pathlib
import shlex
import tempfile

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments import jobs as jobs_lib
from otmdr_jax.experiments import report, sweep, training
from otmdr_jax.experiments.measure import cost

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
    jobs: int = 1,
    show_progress: bool = True,
) -> list[report.Run]:
    """Trains every method with every seed, prints the table and writes the report.

    Args:
      output: The report's folder; an earlier report of the demo in it is replaced.
      seeds: Seeds of initialisation, data order, splits and noise.
      epochs: Passes over the data; None for the demo's own.
      jobs: How many methods are trained at a time, on processors. A script that asks
        for several needs `if __name__ == "__main__":` around what it does.
      show_progress: Whether to show progress.

    Returns:
      The runs.

    Raises:
      FileExistsError: `output` holds something that is no report of the demo.
      NonFiniteError: A run diverged.
      Interrupted: On Ctrl-C or SIGTERM; nothing is kept.
    """
    title = f"Digits with {BASE.data.label_noise:.0%} wrong training labels"
    report.check_folder(pathlib.Path(output), title)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or several different ones, got {seeds}.")
    epochs = BASE.run.epochs if epochs is None else epochs
    with tempfile.TemporaryDirectory() as scratch:
        groups = []
        for method in METHODS:
            runs = [method.replace(seed=seed, epochs=epochs) for seed in seeds]
            label = report.label_of(method.flat())
            groups.append(
                [
                    sweep.Planned(label, one, pathlib.Path(scratch, f"{label}-s{seed}"))
                    for seed, one in zip(seeds, runs, strict=True)
                ]
            )
        # The longest first, so that no job is left with a long one at the end.
        order = sorted(groups, key=lambda x: -cost.gradient_evaluations(x[0].config))
        for one, status in jobs_lib.train(order, jobs, show_progress=show_progress):
            if status == "diverged":
                raise training.NonFiniteError(
                    f"{one.label}, seed {one.config.run.seed}, diverged."
                )
        found = [report.read_run(one.folder) for group in groups for one in group]
    report.print_summary(found, title)
    words = [] if seeds == SEEDS else ["--seeds", *map(str, seeds)]
    words += [] if epochs == BASE.run.epochs else ["--epochs", str(epochs)]
    command = shlex.join(["otmdr", "demo", *words])
    path = report.write(pathlib.Path(output), found, title, command=command)
    print(f"Report: {path}")
    return found
