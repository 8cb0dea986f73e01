"""`otmdr calibrate`: a run's metrics after scaling or isotonic regression."""

import dataclasses
import pathlib
from typing import Literal

import tyro

from otmdr_jax.experiments.cli.common import DataPath, RunPath

Method = Literal["temperature", "vector", "matrix", "isotonic"]


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Calibrate a run: raw and calibrated metrics side by side, and conformal sets.

    No fit is measured on its own labels. By default the command splits the test set
    into halves, fits on one and measures on the other, both ways, five times (the
    protocol of the field). With --fit validation it fits on the run's validation set
    and measures on the whole test set. It writes calibration.json.
    """

    run: tyro.conf.Positional[RunPath]
    """Folder of a finished run."""
    methods: tuple[Method, ...] = ("temperature", "vector", "matrix", "isotonic")
    """Calibration methods to fit."""
    fit: Literal["folds", "validation"] = "folds"
    """Data to fit on: halves of the test set, or the run's validation set."""
    num_repeats: int = 5
    """Number of random splits of the test set into halves."""
    alpha: float = 0.1
    """Share of test examples whose conformal set may miss the label."""
    seed: int = 0
    """Seed of the halves."""
    data_dir: DataPath = None
    """Folder of prepared TFDS data, or an .npz file or its folder, if they have moved
    since the run."""
    overwrite: bool = False
    """Replace a calibration.json of other settings, or of another step."""


def run(options: Calibrate) -> None:
    """`otmdr calibrate RUN`."""
    from otmdr_jax.experiments import run_folder
    from otmdr_jax.experiments.measure import calibrate
    from otmdr_jax.experiments.report import records

    folder = pathlib.Path(options.run)
    # The step of the predictions. Without a result, `calibrate` says what is missing.
    finished = (folder / "result.json").is_file()
    settings = {
        "step": run_folder.read_result(folder).get("steps") if finished else None,
        "methods": options.methods,
        "fit": options.fit,
        "num_repeats": options.num_repeats if options.fit == "folds" else None,
        "alpha": options.alpha,
        "seed": options.seed,
    }
    run_folder.check_record(folder / "calibration.json", settings, options.overwrite)
    record = calibrate.calibrate(
        folder,
        options.methods,
        fit=options.fit,
        num_repeats=options.num_repeats,
        alpha=options.alpha,
        seed=options.seed,
        data_dir=options.data_dir,
    )
    written = folder / "calibration.json"
    run_folder.write_record(written, record, settings, options.overwrite)
    title = f"{folder}: {record['how']}"
    records.calibration_table(record).print(title)
    for method in record["methods"]:
        if why := method.get("why"):
            print(f"{method['name']} failed: {why}")
        if note := method.get("note"):
            print(f"Note: {note}")
    if record.get("temperature", 1.0) is None:
        print(
            "New images are predicted without a temperature: none is best for the "
            "examples that it would be fitted to."
        )
    records.conformal_table(record).print("Conformal sets")
    print(f"Written: {written}")
