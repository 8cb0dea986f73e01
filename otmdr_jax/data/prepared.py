"""TFDS image sets from prepared array_record files, without TensorFlow.

The records are read and decoded once, and `cache` keeps the decoded arrays. If a set
does not fit in memory, only its labels are read and kept, and images are decoded on
demand. `builders` finds the set, `records` its records.
"""

import functools
import logging
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from otmdr_jax.data import cache
from otmdr_jax.data.builders import find_keys, open_builder
from otmdr_jax.data.dataset import Split
from otmdr_jax.data.lazy import LazyImages, fits_in_memory
from otmdr_jax.data.records import Records, open_split

logger = logging.getLogger(__name__)


def read(
    name: str,
    *,
    test_only: bool = False,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
    in_memory: bool | None = True,
) -> Any:
    """Reads a prepared TFDS set, from the cache if it was decoded before.

    Args:
      name: A name of TFDS: "name", "name/config" or "name/config:version".
      test_only: True to read the test split alone; the set may have no other.
      data_dir: The folder of prepared data; None for TFDS's default.
      cache_dir: The folder of decoded arrays; None for `cache.default_directory()`.
      download: True if TFDS may download and prepare a missing set.
      in_memory: True to decode all images now; False gives `LazyImages`, with all
        labels in memory; None decodes what takes at most a quarter of the memory.

    Returns:
      (train, test, class names), or (test, class names) with `test_only`. The names are
      "0", "1" and so on where the metadata have none, and None where these do not even
      have their number.

    Raises:
      ImportError, FileNotFoundError, ValueError, TypeError: see `otmdr_jax.data.load`.
    """
    tfds, builder = open_builder(name, data_dir, download=download)
    image_key, label_key = find_keys(tfds, builder, name)
    splits = (_test_name if test_only else _split_names)(builder, name)
    if in_memory is None:
        in_memory = fits_in_memory(_nbytes(builder, splits, image_key))
    folder = pathlib.Path(builder.data_path)
    identity = {
        "name": "/".join(
            part.name for part in (builder, builder.builder_config) if part
        ),
        "version": str(builder.version),
        "fingerprint": cache.fingerprint(folder),
        "contents": " ".join((*splits, image_key, label_key)),
    }
    if test_only:
        identity["name"] += "-test"  # beside the file of all splits
    directory = pathlib.Path(cache_dir or cache.default_directory()).expanduser()
    columns, read_split = ("images", "labels"), _decode
    if not in_memory:
        columns, read_split = ("checksums", "labels"), _index
        identity["name"] += "-labels"  # beside the file of decoded images
    path = cache.file_path(directory, identity)
    arrays = cache.read(path, identity)
    if arrays is None:
        arrays = {}
        for split in splits:
            found = read_split(tfds, builder, split, image_key, label_key)
            arrays |= {
                f"{split}_{column}": array
                for column, array in zip(columns, found, strict=True)
            }
        cache.write(path, identity, arrays)

    def made(split: str) -> Split:
        first, labels = (arrays[f"{split}_{column}"] for column in columns)
        if not in_memory:
            first = _lazy(tfds, builder, split, image_key, first)
        return Split(first, labels)

    feature = builder.info.features[label_key]
    return *map(made, splits), tuple(feature.names) if feature.num_classes else None


def describe_test(
    name: str, *, data_dir: str | os.PathLike | None = None
) -> tuple[int, tuple[int | None, ...], int, np.dtype, tuple[str, ...]]:
    """Describes what `read(name, test_only=True)` would read, from the metadata alone.

    Args:
      name: A name of TFDS, as for :func:`read`.
      data_dir: The folder of prepared data.

    Returns:
      (num_examples, image shape, num_classes, dtype of the stored images, class names);
      None for sizes that the metadata do not have.

    Raises:
      ImportError, FileNotFoundError, ValueError: see `otmdr_jax.data.load`.
    """
    tfds, builder = open_builder(name, data_dir, download=False)
    image_key, label_key = find_keys(tfds, builder, name)
    (split,) = _test_name(builder, name)
    features = builder.info.features
    return (
        builder.info.splits[split].num_examples,
        tuple(features[image_key].shape),
        features[label_key].num_classes,
        np.dtype(features[image_key].np_dtype),
        tuple(features[label_key].names),
    )


def _nbytes(builder, splits: Sequence[str], image_key: str) -> int:
    """Bytes of all decoded images; 0 if their shape is not known beforehand."""
    shape = builder.info.features[image_key].shape
    count = sum(builder.info.splits[split].num_examples for split in splits)
    return count * math.prod(size or 0 for size in shape)


def _split_names(builder, name: str) -> tuple[str, ...]:
    splits = list(builder.info.splits)
    if "train" in splits and "test" in splits:
        return "train", "test"
    if "train" in splits and "validation" in splits:
        logger.warning('%s has no "test" split; its "validation" split is used.', name)
        return "train", "validation"
    raise ValueError(
        f'{name!r} must have the splits "train" and "test" (or "validation"), and it '
        f"has {splits}. Save your own split as an .npz file and load that."
    )


def _test_name(builder, name: str) -> tuple[str, ...]:
    splits = list(builder.info.splits)
    for split in ("test", "validation"):
        if split in splits:
            return (split,)
    raise ValueError(
        f'{name!r} must have the split "test" (or "validation"), and it has {splits}. '
        "Save your own split as an .npz file and load that."
    )


def _decode(
    tfds, builder, split: str, image_key: str, label_key: str
) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of one split, in the order of the records."""
    records = open_split(tfds, builder, split)
    # Other features (ids, boxes) are not parsed: a quarter of the time for CIFAR-10.
    # One thread: parsing holds the interpreter's lock, and two were slower than one.
    parse = _parser(tfds, builder, image_key, label_key)
    images, labels = None, np.empty(len(records), np.int32)
    for index, record in records.all(f"decoding {builder.name} {split}"):
        example = parse(record)
        image = np.asarray(example[image_key])
        if images is None:
            images = np.empty((len(records), *image.shape), image.dtype)
        records.check_shape(image, index, images.shape[1:])
        images[index], labels[index] = image, example[label_key]
    assert images is not None  # an empty split is not opened
    return images, labels


def _index(
    tfds, builder, split: str, image_key: str, label_key: str
) -> tuple[np.ndarray, np.ndarray]:
    """A checksum of each record of one split, and the labels; decodes no image."""
    records = open_split(tfds, builder, split)
    parse = _parser(tfds, builder, label_key)
    checksums = np.empty(len(records), np.uint32)
    labels = np.empty(len(records), np.int32)
    for index, record in records.all(f"reading labels of {builder.name} {split}"):
        checksums[index], labels[index] = zlib.crc32(record), parse(record)[label_key]
    return checksums, labels


def _lazy(
    tfds, builder, split: str, image_key: str, checksums: np.ndarray
) -> LazyImages:
    """The images of one split, to be decoded later."""
    records = open_split(tfds, builder, split)
    parse = _parser(tfds, builder, image_key)
    first = parse(records.read([0])[0])[image_key]
    if first.dtype != np.uint8:
        raise TypeError(
            f"images that are not held in memory must be uint8, and those of "
            f"{builder.name!r} are {first.dtype}. Load them with in_memory=True."
        )
    # For threads, and to be pickled.
    read = functools.partial(_read_images, records, parse, image_key, first.shape)
    return LazyImages(read, (len(records), *first.shape), checksums=checksums)


def _read_images(
    records: Records,
    parse: Callable[[bytes], dict[str, Any]],
    image_key: str,
    shape: tuple[int, int, int],
    rows: np.ndarray,
) -> np.ndarray:
    images = np.empty((len(rows), *shape), np.uint8)
    for i, record in enumerate(records.read(rows.tolist())):
        image = parse(record)[image_key]
        records.check_shape(image, rows[i], shape)
        images[i] = image
    return images


def _parser(tfds, builder, *keys: str) -> Callable[[bytes], dict[str, Any]]:
    """Parses the features `keys` of a record and no other."""
    features = {key: builder.info.features[key] for key in keys}
    return tfds.features.FeaturesDict(features).deserialize_example_np
