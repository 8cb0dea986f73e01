"""`otmdr predict`: the classes of new images."""

import csv
import dataclasses
import io
import pathlib
from typing import Annotated, Any

import numpy as np
import tyro

from otmdr_jax.experiments.cli.common import Checkpoint, RunPath
from otmdr_jax.io import files

# Images that are read, predicted and written at a time.
_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predict the classes of new images: a CSV file with a row for each image.

    The columns are the image (its path, or its number), the class of highest
    probability, that probability, the entropy in nats, for ensembles and posteriors the
    mutual information (how far members or samples disagree), and the probability of
    each class. Probabilities are those of the mean over members and samples,
    calibrated if `otmdr calibrate` was run on the run, and the entropy is theirs. The
    mutual information is of members and samples as they are, so that only with
    --no-calibrated it is a part of the entropy.

    The run's data are not needed.
    """

    run: tyro.conf.Positional[RunPath]
    """Folder of the run."""
    images: tyro.conf.Positional[
        Annotated[str, tyro.conf.arg(metavar="IMAGES.npz|FOLDER")]
    ]
    """Images: an .npz or .npy file with an array (N, height, width, channels) of images
    as the run was trained on, or a folder of image files, which are cropped and resized
    to the run's size."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE.csv|FILE.npz")] = (
        "predictions.csv"
    )
    """File to write: a table, or an .npz with the same as arrays."""
    array: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the array in the .npz. Default: images, test_images, or the only one."""
    checkpoint: Checkpoint = "latest"
    """Checkpoint: latest, best (on the validation set), or a step."""
    calibrated: bool = True
    """Apply the temperature that otmdr calibrate has fitted."""
    overwrite: bool = False
    """Replace the file."""
    quiet: bool = False
    """Show no progress."""


def run(options: Predict) -> None:
    """`otmdr predict RUN IMAGES`."""
    from otmdr_jax.experiments import restore
    from otmdr_jax.io.progress import Progress

    output = pathlib.Path(options.output)
    if output.suffix not in (".csv", ".npz"):
        raise ValueError(
            f"the output must be a .csv or .npz file, got {output.name!r}."
        )
    if output.exists() and not options.overwrite:
        raise FileExistsError(
            f"{output} is there: name another file with --output, or replace it with "
            "--overwrite."
        )
    files.check_writable(output.parent)
    opened = restore.open_run(options.run, options.checkpoint)
    names, images = _images(options.images, options.array, opened.info)
    if not names:
        raise ValueError(f"{options.images} holds no images.")
    found = []
    count = len(images)
    with Progress(count, 0, "predicting", not options.quiet, "images") as bar:
        for start in range(0, count, _CHUNK):
            predicted = opened.predict_members(
                images[start : start + _CHUNK],
                report=lambda done, start=start: bar.update(start + done),
            )
            probs = opened.calibrated(predicted.log_probs, options.calibrated)
            broken = ~np.isfinite(probs).reshape(len(probs), -1).all(axis=1)
            if broken.any():
                raise ValueError(
                    f"the run predicts NaN for {names[start + np.argmax(broken)]}, the "
                    f"first of {np.count_nonzero(broken)} such images: it has "
                    "diverged, or numbers overflow at them. Nothing is written."
                )
            found.append((probs, predicted.mutual_information()))
    columns = _columns(names, found, opened)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".npz":
        files.write_arrays(output, columns | {"classes": np.array(opened.class_names)})
    else:
        # Names of files may be bytes that are no text.
        table = _table(columns, opened.class_names).encode(errors="surrogateescape")
        files.write_bytes(output, table)
    _say(columns, opened, options)
    print(f"Written: {output}")


def _images(given: str, array: str | None, info: Any) -> tuple[list[str], Any]:
    """The images of a file or folder, and what they are called."""
    path = pathlib.Path(given)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name an .npz file or a folder.")
    if array is not None and path.suffix != ".npz":
        raise ValueError(f"--array is of .npz files, and {path} is none.")
    if path.is_dir() and len(info.image_shape) != 3:
        raise ValueError(
            f"the run was trained on inputs {info.image_shape}, which are no images: "
            "give an .npz file, not a folder."
        )
    if path.is_dir():
        from otmdr_jax.data.folder import images_below

        images, names = images_below(path, info.image_shape)
        return list(names), images
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"{path} is no .npz or .npy file and no folder of images.")
    try:
        # np.load of a path leaves the file open where it is torn; this does not.
        with path.open("rb") as raw:
            loaded = np.load(raw, allow_pickle=False)
            stored = getattr(loaded, "files", [])  # the content decides, not the ending
            found = {name: loaded[name] for name in _likely(array, stored)}
    except files.UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as arrays: {error}") from error
    if not isinstance(loaded, np.ndarray) and len(found) != 1:
        raise ValueError(
            f"{path} holds the arrays {', '.join(stored) or '(none)'}: say which one "
            "has the images with --array NAME."
        )
    (images,) = found.values() if found else (loaded,)
    if not images.ndim:
        raise ValueError(f"{path} holds one number, where images must be.")
    return [str(i) for i in range(len(images))], images


def _likely(array: str | None, names: list[str]) -> list[str]:
    """The names of the arrays in a file that may be its images."""
    if array is not None:
        return [name for name in names if name == array]
    known = [name for name in names if name in ("images", "test_images")]
    return sorted(known)[:1] or names[:2]


def _columns(names, found, opened) -> dict[str, np.ndarray]:
    """What is told of each image: the last column has several numbers."""
    from otmdr_jax.metrics import entropy

    classes = len(opened.class_names)
    values = np.concatenate([x for x, _ in found] or [np.zeros((0, max(classes, 1)))])
    columns = {"image": np.array(names)}
    if not classes:
        return columns | {"outputs": values.reshape(len(values), -1)}
    columns |= {
        "class": np.array(opened.class_names)[values.argmax(axis=1)],
        "probability": values.max(axis=1),
        "entropy": entropy(values),
    }
    if found and found[0][1] is not None:
        columns["mutual_information"] = np.concatenate([x for _, x in found])
    return columns | {"probabilities": values}


def _table(columns: dict[str, np.ndarray], class_names: tuple[str, ...]) -> str:
    """The columns as CSV."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    *single, _ = columns
    several = [f"p({name})" for name in class_names]
    several = several or [f"output{i}" for i in range(columns["outputs"].shape[1])]
    rows.writerow([*single, *several])
    for row in zip(*columns.values(), strict=True):
        first = [x if isinstance(x, str) else f"{x:.6g}" for x in row[:-1]]
        rows.writerow([*map(str, first), *(f"{p:.6g}" for p in row[-1])])
    return text.getvalue()


def _say(columns: dict[str, np.ndarray], opened: Any, options: Predict) -> None:
    """Prints how often each class was predicted."""
    count = len(columns["image"])
    if not opened.class_names:
        print(f"{opened!r}: {count} inputs")
        return
    how = "not calibrated: otmdr calibrate fits a temperature"
    if opened.temperature is not None:
        how = f"temperature {opened.temperature:.3f}"
        how = how if options.calibrated else f"without its {how}"
    print(f"{opened!r}: {count} images, {how}")
    names, numbers = np.unique(columns["class"], return_counts=True)
    most = np.argsort(-numbers, kind="stable")[:10]
    for i in most:
        mine = columns["probability"][columns["class"] == names[i]]
        print(f"  {names[i]:<20} {numbers[i]:>8}  mean probability {np.mean(mine):.3f}")
    if len(names) > len(most):
        print(f"  and {len(names) - len(most)} classes more")
