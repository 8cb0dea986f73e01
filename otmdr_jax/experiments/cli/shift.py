"""`otmdr shift`: a run on shifted versions of its test set."""

import dataclasses
from typing import Any

import tyro

# Written out, since data and JAX are not imported for --help; a test compares them.
CORRUPTIONS = (
    "gaussian_noise",
    "gaussian_blur",
    "contrast",
    "brightness",
    "pixelate",
    "rotation",
)


@dataclasses.dataclass(frozen=True)
class Shift:
    """Evaluate a run on shifted images: prints a table, writes shift.json, shift.png.

    Corruptions are computed, sets of TFDS are used where they are prepared; nothing is
    downloaded. otmdr report shows what was found of several runs.

    Examples:
    otmdr shift runs/digits-cnn_small-otmdr-seed0

    otmdr shift RUN --corruptions gaussian_noise contrast --severities 1 3 5

    otmdr shift RUN --ood svhn_cropped --data-dir ~/tensorflow_datasets

    otmdr shift RUN --corruptions --sets auto mine.npz
    """

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    corruptions: tuple[str, ...] = CORRUPTIONS
    """Corruptions of the test set; none after the flag for none."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities, of 1 (mild) to 5."""
    sets: tuple[str, ...] = ("auto",)
    """Other test sets of the same classes: TFDS names, as cifar10_1/v6 or
    cifar10_corrupted/fog_3, or .npz files. auto: for CIFAR-10, CIFAR-10.1 and
    CIFAR-10-C where they are prepared. None after the flag for none."""
    ood: tuple[str, ...] = ("auto",)
    """Sets of other classes, to be told from the test set. auto: uniform noise and, for
    images of CIFAR's shape, SVHN, CIFAR-10 and CIFAR-100 where they are prepared."""
    max_examples: int | None = None
    """Of each set at most so many, evenly spread. Default: all."""
    seed: int = 0
    """Of the noise."""
    checkpoint: str = "latest"
    """Which checkpoint: latest, best (on the validation set), or a step."""
    data_dir: str | None = None
    """Folder of prepared TFDS data, if it is no longer where the run found it."""
    overwrite: bool = False
    """Replace a shift.json of other settings, or of another step."""
    quiet: bool = False
    """Show no progress."""


def run(options: Shift) -> None:
    """`otmdr shift RUN`."""
    from otmdr_jax.experiments import members, report, restore, run_folder
    from otmdr_jax.experiments.measure import shift as shift_lib
    from otmdr_jax.io import files

    shift_lib.check(options.corruptions, options.severities, options.max_examples)
    given: dict[str, Any] = (
        {} if options.data_dir is None else {"data_dir": options.data_dir}
    )
    opened = restore.open_run(options.run, options.checkpoint, **given)
    settings = {
        "step": members.steps_taken(opened.state),
        "corruptions": options.corruptions,
        "severities": options.severities,
        "sets": options.sets,
        "ood": options.ood,
        "max_examples": options.max_examples,
        "seed": options.seed,
    }
    run_folder.check_record(opened.folder / "shift.json", settings, options.overwrite)
    record = shift_lib.evaluate(
        opened.config,
        opened.state,
        opened.dataset,
        opened.programs,
        corruptions=options.corruptions,
        severities=options.severities,
        other_sets=options.sets,
        ood=options.ood,
        max_examples=options.max_examples,
        seed=options.seed,
        without=opened.diverged,
        show_progress=not options.quiet,
    )
    written = [opened.folder / "shift.json"]
    files.write_json(written[0], {**record, "settings": settings})
    count = record["num_examples"]
    title = f"{opened.folder}, step {record['step']}, {count} test examples"
    report.print_shift(record, f"{title}: accuracy (%) by severity, and means")
    if record["corruptions"]:
        label = report.label_of(opened.config.flat())
        written.append(
            report.plot_shift([(label, record)], opened.folder / "shift.png")
        )
    print(f"Written: {', '.join(map(str, written))}")
