"""`otmdr shift`: a run on shifted versions of its test set."""

import dataclasses
from typing import Annotated, Any

import tyro

from otmdr_jax.experiments.cli.common import Checkpoint, DataPath, RunPath

# A copy of otmdr_jax.data.CORRUPTIONS, because --help imports neither data nor JAX; a
# test compares the two.
CORRUPTIONS = (
    "gaussian_noise",
    "gaussian_blur",
    "contrast",
    "brightness",
    "pixelate",
    "rotation",
)


Sets = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[auto|NAME|FILE.npz ...]")]


@dataclasses.dataclass(frozen=True)
class Shift:
    """Evaluate a run on shifted images: print a table, write shift.json and shift.png.

    The command computes corruptions and uses the sets of TFDS that are prepared; it
    downloads nothing. otmdr report shows the records of several runs.

    Examples:
    otmdr shift runs/digits-cnn_small-otmdr-seed0

    otmdr shift RUN --corruptions gaussian_noise contrast --severities 1 3 5

    otmdr shift RUN --ood svhn_cropped --data-dir ~/tensorflow_datasets

    otmdr shift RUN --corruptions --sets auto mine.npz
    """

    run: tyro.conf.Positional[RunPath]
    """Folder of the run."""
    corruptions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")] = (
        CORRUPTIONS
    )
    """Corruptions of the test set. The bare flag means none."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities, from 1 (mild) to 5."""
    sets: Sets = ("auto",)
    """Other test sets of the same classes: TFDS names, such as cifar10_1/v6 or
    cifar10_corrupted/fog_3, or .npz files. auto: CIFAR-10.1 and CIFAR-10-C for a run on
    CIFAR-10, if they are prepared. The bare flag means none."""
    ood: Sets = ("auto",)
    """Sets of other classes, which a model should detect as unknown. auto: uniform
    noise and, for images of CIFAR's shape, SVHN, CIFAR-10 and CIFAR-100 if they are
    prepared. The bare flag means none."""
    max_examples: int | None = None
    """Largest number of examples of each set, evenly spread. Default: all."""
    seed: int = 0
    """Seed of the noise."""
    checkpoint: Checkpoint = "latest"
    """Checkpoint: latest, best (on the validation set), or a step."""
    data_dir: DataPath = None
    """Folder of prepared TFDS data, or an .npz file or its folder, if they have moved
    since the run."""
    overwrite: bool = False
    """Replace a shift.json of other settings, or of another step."""
    quiet: bool = False
    """Show no progress."""


def run(options: Shift) -> None:
    """`otmdr shift RUN`."""
    from otmdr_jax.experiments import members, report, restore, run_folder
    from otmdr_jax.experiments.measure import shift as shift_lib

    shift_lib.check(options.corruptions, options.severities, options.max_examples)
    given: dict[str, Any] = (
        {} if options.data_dir is None else {"data_dir": options.data_dir}
    )
    run_folder.check_classes(options.run, "otmdr shift")
    opened = restore.open_run(options.run, options.checkpoint, split="test", **given)
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
    count = record["num_examples"]
    title = f"{opened.folder}, step {record['step']}, {count} test examples"
    report.print_shift(record, f"{title}: accuracy (%) by severity, and means")
    # After the table: a disk may be full.
    written = [opened.folder / "shift.json"]
    run_folder.write_record(written[0], record, settings, options.overwrite)
    if record["corruptions"]:
        label = report.label_of(opened.config.flat())
        written.append(
            report.plot_shift([(label, record)], opened.folder / "shift.png")
        )
    else:  # it would show the record that is replaced
        (opened.folder / "shift.png").unlink(missing_ok=True)
    print(f"Written: {', '.join(map(str, written))}")
