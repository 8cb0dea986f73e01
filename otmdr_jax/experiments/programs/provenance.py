"""The provenance of a run's numbers: versions, the device, checksums of the data."""

import dataclasses
import os
import platform
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import optax

from otmdr_jax import _version
from otmdr_jax.data import Dataset, LazyImages, Loader, Split


def environment() -> dict[str, str]:
    """Versions and device, to be recorded with every figure."""
    device = jax.devices()[0]
    cores = {"cores": str(len(cores_at_hand()))} if device.platform == "cpu" else {}
    return {
        "device": f"{device.device_kind} x {jax.device_count()}",
        **cores,
        "platform": device.platform,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "otmdr_jax": _version.__version__,
        "python": platform.python_version(),
    }


def cores_at_hand() -> list[int]:
    """The processor's cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def fingerprint(dataset: Dataset) -> str:
    """Name, size and checksums of a dataset, to tell whether a run goes on with it.

    Two checksums: of the labels, of a thousand images of each split and of the mean and
    deviation that normalise them; and of all images ("p" for pixels), or of their
    records where they are not in memory ("r"). Of the batches of a loader, which may
    differ each time they are read, their number alone is compared.
    """
    # Of a set without published statistics these may be of a sample of the images.
    start = zlib.crc32(np.asarray((dataset.mean, dataset.std)).tobytes())
    every = dataset.train, dataset.validation, dataset.test
    splits = [x for x in every if x is not None and not isinstance(x, Loader)]
    return f"{dataset.name}-{dataset.train.num_examples}-{_checksums(splits, start)}"


def fingerprint_of_test(dataset: Dataset) -> str:
    """The same of the images and labels of the test set alone."""
    return f"{dataset.name}-{dataset.test.num_examples}-{_checksums([dataset.test], 0)}"


def _checksums(splits: Sequence[Split], sampled: int) -> str:
    whole = 0
    kind = "r" if isinstance(splits[0].images, LazyImages) else "p"
    for images, labels in splits:
        rows = np.linspace(0, len(labels) - 1, min(len(labels), 1_000)).astype(int)
        for array in (labels, images[rows]):
            sampled = zlib.crc32(np.ascontiguousarray(array).tobytes(), sampled)
        if isinstance(images, LazyImages):
            whole = zlib.crc32(str(images.checksum()).encode(), whole)
        else:
            whole = zlib.crc32(np.ascontiguousarray(images).tobytes(), whole)
    return f"{sampled:08x}-{kind}{whole:08x}"


class DataInfo(NamedTuple):
    """What the programs of a run depend on of its data.

    Attributes:
      num_classes: C; 0 where targets are no class numbers.
      image_shape: (H, W, C_in), or the shape of another input.
      dtype: That of the images, uint8 or float32.
      num_train: Examples in the training set.
      augment: Names of the augmentations.
      mean: The mean of each channel.
      std: The standard deviation of each channel.
      class_names: The names of the classes, where they have some.
    """

    num_classes: int
    image_shape: tuple[int, ...]
    dtype: np.dtype
    num_train: int
    augment: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """That of a dataset."""
        return cls(
            dataset.num_classes,
            dataset.image_shape,
            np.dtype(dataset.test.images.dtype),
            dataset.train.num_examples,
            tuple(dataset.augment),
            dataset.mean,
            dataset.std,
            dataset.class_names,
        )

    @classmethod
    def of_record(cls, record: dict[str, Any] | None) -> Self | None:
        """That of a run's data.json; None for a run of an older version."""
        if record is None or "mean" not in record:
            return None
        names = record.get("class_names")
        return cls(
            record["num_classes"],
            tuple(record["image_shape"]),
            np.dtype(record["dtype"]),
            record["train"],
            tuple(record["augment"]),
            tuple(record["mean"]),
            tuple(record["std"]),
            names and tuple(names),
        )


def describe(dataset: Dataset) -> dict[str, Any]:
    """The content of data.json: what a run's data are, and how images are prepared.

    With it a run predicts new images where its data are not there.

    Args:
      dataset: The data.

    Returns:
      A record: name, fingerprint (see :func:`fingerprint`), test_fingerprint,
      num_classes, class_names (None where they are not known), image_shape, dtype, mean
      and std (lists of floats, one a channel) and augment of the
      :class:`otmdr_jax.data.Dataset`, and the numbers of examples of train, validation
      (None without one) and test.
    """
    splits = {x: getattr(dataset, x) for x in ("train", "validation", "test")}
    return {
        "name": dataset.name,
        "fingerprint": fingerprint(dataset),
        "test_fingerprint": fingerprint_of_test(dataset),
        "num_classes": dataset.num_classes,
        "class_names": dataset.class_names and list(dataset.class_names),
        "image_shape": list(dataset.image_shape),
        "dtype": str(dataset.test.images.dtype),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "augment": list(dataset.augment),
        **{name: split and split.num_examples for name, split in splits.items()},
    }


def same_data(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same data, whatever their names.

    The checksums of all images are compared where both are of pixels, or both of
    records.
    """
    _, *before, whole = one.rsplit("-", 3)
    _, *after, other_whole = other.rsplit("-", 3)
    return before == after and (whole == other_whole or whole[0] != other_whole[0])


def check_same_data(
    was: str, now: str, output: Any, dataset: Dataset | None = None
) -> None:
    """Refuses data other than those that a run was trained on.

    Args:
      was: :func:`fingerprint` of the run's data, from its checkpoint.
      now: That of the data at hand.
      output: The run's folder, for the error.
      dataset: The data at hand, to find out in what they differ.

    Raises:
      ValueError: They are not the :func:`same_data`.
    """
    if same_data(was, now):
        return
    way_out = (
        "Restore the data, say where they are with --data-dir, or start a new run."
    )
    if dataset is not None and dataset.validation is not None:
        without = dataclasses.replace(dataset, validation=None)
        if same_data(was, fingerprint(without)):
            way_out = (
                "They differ in the validation set alone, which older versions did not "
                "read from an .npz. Write a file without it, otmdr_jax.data.save("
                "dataclasses.replace(dataset, validation=None), 'without.npz'), and "
                "say --data-dir without.npz."
            )
    raise ValueError(
        f"{output} was trained on {was}, but the data are now {now} (name, examples, "
        f"checksums). {way_out}"
    )
