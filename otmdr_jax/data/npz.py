"""Sets in .npz files: ours, and those that Keras and MedMNIST write."""

import os
import pathlib
import warnings
from typing import Any

import numpy as np

from otmdr_jax.data.dataset import Dataset, Split, leave_test
from otmdr_jax.data.lazy import LazyImages
from otmdr_jax.io import files

# The arrays of a split in an .npz file. The first names are the documented ones; the
# second Keras', the third those of MedMNIST.
_KEYS = {
    "train": (
        ("train_images", "train_labels"),
        ("x_train", "y_train"),
    ),
    "test": (
        ("test_images", "test_labels"),
        ("x_test", "y_test"),
    ),
    "validation": (
        ("validation_images", "validation_labels"),
        ("val_images", "val_labels"),
        ("x_val", "y_val"),
        ("x_valid", "y_valid"),
        ("x_validation", "y_validation"),
    ),
}

# What `save` writes beside the arrays, by names that nobody else has.
_OPTIONS = {
    x: f"otmdr_jax_{x}"
    for x in ("num_classes", "mean", "std", "augment", "class_names")
}


def save(dataset: Dataset, path: str | os.PathLike) -> None:
    """Writes a dataset to an .npz file, of which `load` makes the same dataset.

    A run that was trained on arrays can then be opened from other processes.

    Args:
      dataset: The data; images must be in memory.
      path: The file, which ends in .npz and must not be there yet.

    Raises:
      FileExistsError: The file is there.
      ValueError: Another ending, or images that are left in their files.

    Example:
      >>> import os, tempfile
      >>> from otmdr_jax.data import load
      >>> digits = load("digits", validation=0.1, label_noise=0.2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(digits, os.path.join(folder, "digits.npz"))
      ...     load(os.path.join(folder, "digits.npz"))
      Dataset('digits': 1293 train, 144 validation, 360 test, 8x8x1 uint8, 10 classes)
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {str(path)!r}.")
    if path.exists():
        raise FileExistsError(f"{path} is there already: name another file.")
    if not dataset.num_classes:
        raise ValueError(
            "the targets of these data are no class numbers, which files of load are "
            "of: keep the arrays, np.savez(path, ...), and give them to from_targets."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(dataset.train.images, LazyImages):
        raise ValueError(
            "the images are left in their files: open the set with in_memory=True."
        )
    arrays: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        if (split := getattr(dataset, name)) is not None:
            arrays |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    for name, key in _OPTIONS.items():
        if (value := getattr(dataset, name)) is not None:
            arrays[key] = np.asarray(value)
    files.write_arrays(path, arrays)


def path_of(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Where the file is: at its path, or where it has been moved."""
    path = pathlib.Path(name).expanduser()
    if data_dir is None:
        return path
    moved = pathlib.Path(data_dir).expanduser()
    if moved.suffix == ".npz":
        return moved
    there = moved / path.name
    return there if there.is_file() else path


def read(path, validation, label_noise, seed) -> dict[str, Any]:
    """The arguments of `from_arrays` for an .npz file."""
    splits, saved = splits_of(path, "train")
    options = {
        **saved,
        "label_noise": label_noise,
        "seed": seed,
        "validation": validation,
    }
    if "validation" in splits:
        if validation:
            raise ValueError(
                f"{str(path)!r} has a validation set of its own: leave "
                f"validation={validation!r} out. A run of an older version, which did "
                "not read it, needs a file without it."
            )
        options["validation"] = splits["validation"]
    train, test = splits["train"], splits.get("test")
    if test is None:
        train, test = leave_test(train, seed, repr(str(path)))
    return {"train": train, "test": test, **options}


def splits_of(path: pathlib.Path, needed: str) -> tuple[dict[str, Split], dict]:
    """Reads the splits of a user's file, without checking them.

    Args:
      path: The file.
      needed: The split that must be there.

    Returns:
      The splits by name, and the options of `from_arrays` that :func:`save` wrote.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"a name that ends in .npz must be a file, and {str(path)!r} is none "
            f"(looked in {str(path.absolute().parent)!r}). Correct the path"
            + (
                "."
                if needed == "test"
                else ", or say where the file is now: data_dir, --data-dir on the "
                "command line."
            )
        )
    splits, used = {}, set()
    try:
        # np.load of a path leaves the file open where it is no zip; this does not.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = sorted(file.files)
            for split, choices in _KEYS.items():
                keys = next((k for k in choices if set(k) <= set(found)), ())
                used |= {key for pair in choices for key in pair} & set(keys)
                if keys and (split == needed or needed == "train"):
                    splits[split] = Split(*(file[key] for key in keys))
            saved = {n: k for n, k in _OPTIONS.items() if k in found}
            options = {name: file[key].tolist() for name, key in saved.items()}
    except files.UNREADABLE as error:
        raise ValueError(
            f"{str(path)!r} must be an .npz file of plain arrays, and reading it "
            f"failed with: {error}. Write it again with np.savez; arrays of Python "
            "objects cannot be read."
        ) from error
    if needed not in splits:
        names = " or ".join(", ".join(keys) for keys in _KEYS[needed])
        raise ValueError(
            f"{str(path)!r} must hold the arrays {names}, and it holds {found}. Rename "
            "them where you save the file."
        )
    if unused := sorted(set(found) - used - set(_OPTIONS.values())):
        warnings.warn(
            f"{str(path)!r} also holds {', '.join(unused)}, which are not used.",
            stacklevel=4,
        )
    return splits, options
