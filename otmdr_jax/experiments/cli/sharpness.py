"""`otmdr sharpness`: how much the training loss rises around a run's solution."""

import dataclasses
from typing import Any

import tyro

from otmdr_jax.experiments.cli.common import Checkpoint, DataPath, RunPath


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """Measure a run's sharpness in every way: print a table, write sharpness.json.

    It measures SAM's gap, the worst loss in a ball and the average over random
    directions, each also relative to the size of each weight; and the Hessian's largest
    eigenvalue and its trace. It uses training images and BatchNorm's running
    statistics.
    """

    run: tyro.conf.Positional[RunPath]
    """Folder of the run."""
    checkpoint: Checkpoint = "latest"
    """Checkpoint: latest, best (on the validation set), or a step."""
    num_examples: int = 2000
    """Number of training images, evenly spread over the set."""
    num_eigenvalues: int = 1
    """Number of the Hessian's largest eigenvalues."""
    num_probes: int = 30
    """Number of random directions for the average and for the trace."""
    seed: int = 0
    """Seed of the directions."""
    data_dir: DataPath = None
    """Folder of prepared TFDS data, or an .npz file or its folder, if they have moved
    since the run."""
    overwrite: bool = False
    """Replace a sharpness.json of other settings, or of another step."""


def run(options: Sharpness) -> None:
    """`otmdr sharpness RUN`."""
    from otmdr_jax.experiments import members, restore, run_folder
    from otmdr_jax.experiments.measure import sharpness
    from otmdr_jax.experiments.report import records

    given: dict[str, Any] = (
        {} if options.data_dir is None else {"data_dir": options.data_dir}
    )
    run_folder.check_classes(options.run, "otmdr sharpness")
    opened = restore.open_run(
        options.run, options.checkpoint, split="train", predicts=False, **given
    )
    folder, dataset, state = opened.folder, opened.dataset, opened.state
    settings = {
        "step": members.steps_taken(state),
        "num_examples": min(options.num_examples, dataset.train.num_examples),
        "num_eigenvalues": options.num_eigenvalues,
        "num_probes": options.num_probes,
        "seed": options.seed,
    }
    run_folder.check_record(folder / "sharpness.json", settings, options.overwrite)
    record = sharpness.measure(
        opened.config,
        state,
        dataset,
        opened.programs,
        without=opened.diverged,
        num_examples=options.num_examples,
        num_eigenvalues=options.num_eigenvalues,
        num_probes=options.num_probes,
        seed=options.seed,
        show_progress=True,
    )
    written = folder / "sharpness.json"
    run_folder.write_record(written, record, settings, options.overwrite)
    title = f"{folder}, step {record['step']}, {record['num_examples']} images"
    records.sharpness_table({"Value": record}).print(title)
    print(f"Written: {written}")
