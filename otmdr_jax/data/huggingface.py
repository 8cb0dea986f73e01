"""Image sets of Hugging Face's `datasets`."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from otmdr_jax.data.dataset import Dataset, from_arrays
from otmdr_jax.data.encoded import check_size, read_splits


@dataclasses.dataclass(frozen=True)
class Rows:
    """The images of a table: an :class:`otmdr_jax.data.encoded.Encoded`."""

    table: Any  # of one column, whose images are not decoded
    column: str
    split: str

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.table)

    def read(self, row: int) -> bytes:
        """The bytes of an image, or of the file that the table names."""
        image = self.table[row][self.column]
        if image is None:
            raise ValueError("it is missing")
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()

    def name_of(self, row: int) -> str:
        """The split and the row."""
        return f"{self.split}[{row}]"


def from_huggingface(
    dataset: Any,
    image: str | None = None,
    label: str | None = None,
    size: int | tuple[int, int] | None = None,
    *,
    validation: int | float = 0,
    label_noise: float = 0.0,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Sequence[str] = (),
    name: str | None = None,
    in_memory: bool | None = None,
) -> Dataset:
    """Makes a dataset of what `datasets.load_dataset` returns.

    Of a `datasets.DatasetDict` the splits "train", "test" and "validation" are used;
    without "test" the validation split is the test set, with a warning. Of a
    `datasets.Dataset`, or of "train" alone, a fifth is left to test on, stratified by
    class and drawn by `seed`, with a warning.

    Images are decoded as :func:`from_folder` does, from the files that are stored: a
    format or a transform that was set on the object is not applied.

    Args:
      dataset: A `datasets.DatasetDict`, a dictionary of `datasets.Dataset`, or one.
      image: The column of images, of the type `datasets.Image`. None finds it by its
        type.
      label: The column of labels, a `datasets.ClassLabel`, whose names are kept, or
        integers 0..C-1. None finds the `ClassLabel`.
      size: The side in pixels, or (height, width), that images are resized and cropped
        to. None for images that have one size.
      validation: Training examples to hold out, a count or a fraction, stratified.
        Default 0: none, or the validation split.
      label_noise: The fraction of training labels to replace by other classes. Default
        0.
      seed: The seed of the splits and of the label noise.
      mean: The mean of each channel; None computes it as :func:`from_arrays` does.
      std: The standard deviation of each channel; None computes it.
      augment: Names of augmentations for training, "crop" and "flip". Default none.
      name: A name for the dataset. Default: that of the set on the hub, else
        "huggingface".
      in_memory: True to decode all images now. False to decode them when they are
        needed, as `LazyImages`. None, the default, decodes them if they take at most a
        quarter of the host's memory.

    Returns:
      A `Dataset`.

    Raises:
      ValueError: There is no such column or split, images cannot be read or have
        several sizes, or an option is not as above.
      TypeError: The object is none of `datasets`, or is streamed.

    Warns:
      UserWarning: There is no test split; there are splits that are not used.

    Example:
      >>> import datasets
      >>> from PIL import Image
      >>> columns = {"photo": [Image.new("L", (9, 8))] * 6, "kind": [0, 1, 0, 1, 0, 1]}
      >>> features = datasets.Features(
      ...     photo=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"])
      ... )
      >>> table = datasets.Dataset.from_dict(columns, features=features)
      >>> from_huggingface({"train": table, "test": table}, size=8)
      Dataset('huggingface': 6 train, 6 test, 8x8x1 uint8, 2 classes)
    """
    shape = check_size(size)
    splits = _splits(dataset)
    image, label = _columns(splits["train"], image, label)
    features = splits["train"].features
    for split, table in splits.items():
        for column in (image, label):
            if table.features.get(column) != features[column]:
                raise ValueError(
                    f"column {column!r} must be the same in all splits, and it is "
                    f"{features[column]} in train and {table.features.get(column)} in "
                    f"{split}. Cast it: dataset.cast_column({column!r}, ...)."
                )
    rows = {x: Rows(_stored(table, image), image, x) for x, table in splits.items()}
    known = getattr(splits["train"].info, "dataset_name", None)
    name = name or known or "huggingface"
    images = read_splits(rows, shape, name, in_memory=in_memory)
    pairs: dict[str, Any] = {
        x: (images[x], np.asarray(table.select_columns([label])[:][label]))
        for x, table in splits.items()
    }
    if "validation" in pairs:
        if validation:
            raise ValueError(
                f"{name!r} has a validation split of its own: leave "
                f"validation={validation!r} out."
            )
        validation = pairs["validation"]
    return from_arrays(
        pairs["train"],
        pairs.get("test"),
        name=name,
        class_names=getattr(features[label], "names", None),
        validation=validation,
        label_noise=label_noise,
        seed=seed,
        mean=mean,
        std=std,
        augment=augment,
    )


def _splits(dataset: Any) -> dict[str, Any]:
    """The tables of the splits that are used, without formats and transforms."""
    import datasets

    given = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    for table in given.values():
        if not isinstance(table, datasets.Dataset):
            raise TypeError(
                "a datasets.DatasetDict or datasets.Dataset is needed, got a "
                f"{type(table).__name__}. A stream has no length: load the set with "
                "streaming=False, or give its batches to data.from_batches."
            )
    found = {x: given[x] for x in ("train", "validation", "test") if x in given}
    if "train" not in found:
        raise ValueError(
            f'there must be a split "train", and there are {", ".join(given)}. Name '
            'them: from_huggingface({"train": ..., "test": ...}).'
        )
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
        warnings.warn(
            "there is no test split; the validation split is the test set.",
            stacklevel=3,
        )
    if unused := [str(x) for x in given if given[x] not in found.values()]:
        warnings.warn(
            f"there are other splits, {', '.join(unused)}, which are not used.",
            stacklevel=3,
        )
    return {split: table.with_format(None) for split, table in found.items()}


def _columns(table: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """The columns of images and of labels, found where they are not named."""
    import datasets

    features = table.features
    image = _column(features, datasets.Image, image, "image")
    if not isinstance(features[image], datasets.Image):
        raise ValueError(
            f"column {image!r} must have images, and it has {features[image]}. Cast "
            f"it: dataset.cast_column({image!r}, datasets.Image())."
        )
    label = _column(features, datasets.ClassLabel, label, "label")
    kind = getattr(features[label], "dtype", "")
    if not kind.startswith(("int", "uint")):
        raise ValueError(
            f"column {label!r} must have classes, and it has {features[label]}. Encode "
            f"them: dataset.class_encode_column({label!r})."
        )
    return image, label


def _column(features: Any, kind: type, name: str | None, option: str) -> str:
    listed = ", ".join(
        f"{key}: {type(value).__name__}" for key, value in features.items()
    )
    if name is not None:
        if name not in features:
            raise ValueError(f"there is no column {name!r}: there are {listed}.")
        return name
    found = [key for key, value in features.items() if isinstance(value, kind)]
    if len(found) != 1:
        raise ValueError(
            f"one column must be of the type datasets.{kind.__name__}, and there are "
            f"{listed}. Name the column: {option}=..."
        )
    return found[0]


def _stored(table: Any, image: str) -> Any:
    """A table of images alone, as bytes."""
    import datasets

    return table.select_columns([image]).cast_column(
        image, datasets.Image(decode=False)
    )
