"""TFDS image sets from prepared array_record files, without TensorFlow.

TFDS resolves names, versions and features; the records are read and decoded once, and
the decoded arrays are kept by `cache`. Of a set that does not fit in memory the labels
are read and kept in the same way, and images are decoded when they are asked for. Every
count is checked against the dataset's own metadata, and array_record verifies a
checksum of every record: a damaged folder gives an error, never fewer or other images.
"""

import contextlib
import dataclasses
import difflib
import logging
import math
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from otmdr_jax.data import cache
from otmdr_jax.data.dataset import Split
from otmdr_jax.data.lazy import LazyImages, fits_in_memory

logger = logging.getLogger(__name__)

# Records a read; large enough to spread its cost, small next to the decoded set.
_CHUNK = 512


def read(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
    in_memory: bool | None = True,
) -> tuple[Split, Split, int]:
    """Reads a prepared TFDS set, from the cache where it was decoded before.

    Args:
      name: as TFDS takes it: "name", "name/config" or "name/config:version".
      data_dir: the folder of prepared data; None for TFDS's default.
      cache_dir: the folder of decoded arrays; None for `cache.default_directory()`.
      download: whether TFDS may download and prepare what is missing.
      in_memory: whether to decode all images now; False gives `LazyImages`, with all
        labels in memory; None decodes what takes at most a quarter of the memory.

    Returns:
      (train, test, num_classes).

    Raises:
      ImportError, FileNotFoundError, ValueError, TypeError: see `otmdr_jax.data.load`.
    """
    return _read(
        name,
        _split_names,
        data_dir=data_dir,
        cache_dir=cache_dir,
        download=download,
        in_memory=in_memory,
    )


def read_test(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
    in_memory: bool | None = True,
) -> tuple[Split, int]:
    """Reads the test split alone of a prepared TFDS set, which may have no other.

    Args:
      name: see :func:`read`.
      data_dir: likewise.
      cache_dir: likewise.
      download: likewise.
      in_memory: likewise.

    Returns:
      (test, num_classes).

    Raises:
      ImportError, FileNotFoundError, ValueError, TypeError: see `otmdr_jax.data.load`.
    """
    return _read(
        name,
        _test_name,
        data_dir=data_dir,
        cache_dir=cache_dir,
        download=download,
        in_memory=in_memory,
    )


def describe_test(
    name: str, *, data_dir: str | os.PathLike | None = None
) -> tuple[int, tuple[int | None, ...], int]:
    """What :func:`read_test` would read, from the metadata: no record is opened.

    Args:
      name: see :func:`read`.
      data_dir: likewise.

    Returns:
      (num_examples, image shape, num_classes); None for sizes that the metadata leave
      open.

    Raises:
      ImportError, FileNotFoundError, ValueError: see `otmdr_jax.data.load`.
    """
    tfds, builder = _open_builder(name, data_dir, download=False)
    image_key, label_key = _keys(tfds, builder, name)
    (split,) = _test_name(builder, name)
    features = builder.info.features
    return (
        builder.info.splits[split].num_examples,
        tuple(features[image_key].shape),
        features[label_key].num_classes,
    )


def _open_builder(name, data_dir, *, download):
    """TFDS, and the builder of a set that is prepared in the right format."""
    tfds = _import_tfds()
    data_dir = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    builder = _find(tfds, name, data_dir)
    with _without_warnings():  # the error below says it, and what to do
        ready = builder.is_prepared()
    if not ready:
        if not download:
            raise FileNotFoundError(
                f"{name!r} must be prepared in {str(builder.data_path)!r}, and it is "
                "not there. Pass the data_dir that has it, or prepare it once (this "
                "downloads, and most sets need TensorFlow for it): "
                f"{_command(name, data_dir)}"
            )
        _prepare(builder, name)
    _check_format(builder, name, data_dir)
    return tfds, builder


def _read(name, choose, *, data_dir, cache_dir, download, in_memory) -> Any:
    """The splits that `choose` names of a builder, and the number of classes."""
    tfds, builder = _open_builder(name, data_dir, download=download)
    image_key, label_key = _keys(tfds, builder, name)
    splits = choose(builder, name)
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
    if choose is _test_name:
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

    return *map(made, splits), builder.info.features[label_key].num_classes


def _nbytes(builder, splits: Sequence[str], image_key: str) -> int:
    """Bytes of all images, decoded; 0 where their shape is not known beforehand."""
    shape = builder.info.features[image_key].shape
    count = sum(builder.info.splits[split].num_examples for split in splits)
    return count * math.prod(size or 0 for size in shape)


def _import_tfds():
    try:
        import array_record.python.array_record_module  # noqa: F401
        import PIL.Image  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "reading TFDS data needs tensorflow-datasets, array-record and pillow, and "
            f"importing failed with: {error}. Run: pip install otmdr-jax[data]"
        ) from error
    return tfds


def _command(name: str, data_dir: str | None) -> str:
    """The shell command that prepares a set in the format this module reads."""
    where = "" if data_dir is None else f", data_dir={data_dir!r}"
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}).download_and_prepare("
        "file_format='array_record')\""
    )


def _find(tfds, name: str, data_dir: str | None):
    """The builder of a name, from TFDS's own code or from the prepared folder."""
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # TFDS raises AssertionError, ValueError and others
        # Community sets are left out: listing them needs the network.
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        family = name.split(":")[0].split("/")[0]
        if family in known:
            raise ValueError(
                f"TFDS cannot open {name!r}: {error} Correct the config or version, "
                "or repair the files."
            ) from error
        close = difflib.get_close_matches(family.lower(), known, n=3, cutoff=0.5)
        hint = f"close names: {', '.join(close)}" if close else "no name is close"
        raise ValueError(
            'name must be "digits", a TFDS dataset or a path that ends in .npz, got '
            f"{name!r}; {hint}. For prepared data of your own, check data_dir "
            f"({data_dir!r})."
        ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Holds back what TFDS logs as a warning."""
    log = logging.getLogger("absl")

    def serious(record):
        return record.levelno > logging.WARNING

    log.addFilter(serious)
    try:
        yield
    finally:
        log.removeFilter(serious)


def _prepare(builder, name: str) -> None:
    try:
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        raise ImportError(
            f"preparing {name!r} needs more than reading it, and importing failed "
            f"with: {error}. Run: pip install tensorflow importlib_resources. They are "
            "needed once; a prepared folder is read without them, also on another "
            "machine."
        ) from error


def _check_format(builder, name: str, data_dir: str | None) -> None:
    formats = {str(f.value) for f in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ValueError(
            f"{name!r} must be prepared as array_record to be read without TensorFlow, "
            f"and {str(builder.data_path)!r} holds {', '.join(sorted(formats))}. "
            "Delete that folder, or choose another data_dir, and prepare it again: "
            f"{_command(name, data_dir)}"
        )


def _keys(tfds, builder, name: str) -> tuple[str, str]:
    """The features that hold the image and its class."""
    features = builder.info.features

    def fits(pair: Any) -> bool:
        kinds = tfds.features.Image, tfds.features.ClassLabel
        return (
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(key, str) and key in features for key in pair)
            and all(type(features[k]) is t for k, t in zip(pair, kinds, strict=True))
        )

    for pair in (builder.info.supervised_keys, ("image", "label")):
        if fits(pair):
            return pair
    found = features.items() if hasattr(features, "items") else [("", features)]
    listed = ", ".join(f"{key}: {type(value).__name__}" for key, value in sorted(found))
    raise ValueError(
        f"{name!r} must have an Image and a ClassLabel feature, as its supervised keys "
        f'or named "image" and "label", and it has {listed}. Save the arrays you want '
        "as an .npz file and load that."
    )


def _split_names(builder, name: str) -> tuple[str, str]:
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


def _test_name(builder, name: str) -> tuple[str]:
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
    records = _open(tfds, builder, split)
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
    records = _open(tfds, builder, split)
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
    records = _open(tfds, builder, split)
    parse = _parser(tfds, builder, image_key)
    first = parse(records.read([0])[0])[image_key]
    if first.dtype != np.uint8:
        raise TypeError(
            f"images that are not held in memory must be uint8, and those of "
            f"{builder.name!r} are {first.dtype}. Load them with in_memory=True."
        )
    read = _ReadImages(records, parse, image_key, first.shape)
    return LazyImages(read, (len(records), *first.shape), checksums=checksums)


@dataclasses.dataclass(frozen=True)
class _ReadImages:
    """What `LazyImages` reads with; threads may share it, and it can be pickled."""

    records: "_Records"
    parse: Callable[[bytes], dict[str, Any]]
    image_key: str
    shape: tuple[int, int, int]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape), np.uint8)
        for i, record in enumerate(self.records.read(rows.tolist())):
            image = self.parse(record)[self.image_key]
            self.records.check_shape(image, rows[i], self.shape)
            images[i] = image
        return images


def _parser(tfds, builder, *keys: str) -> Callable[[bytes], dict[str, Any]]:
    """Parses the features `keys` of a record and no other."""
    features = {key: builder.info.features[key] for key in keys}
    return tfds.features.FeaturesDict(features).deserialize_example_np


def _open(tfds, builder, split: str) -> "_Records":
    """The records of one split, once their number is known to be right."""
    _check_records(builder, split)
    source = builder.as_data_source(
        split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
    )
    if not len(source):
        raise ValueError(
            f"{builder.name!r} {split} must not be empty. {_again(builder)}"
        )
    # The reader below TFDS's, which drags the whole builder along when pickled.
    return _Records(source.data_source, builder.name, split, _again(builder))


@dataclasses.dataclass(frozen=True)
class _Records:
    """The records of one split, as bytes, with errors that say what to do."""

    source: Any
    name: str
    split: str
    again: str

    def __len__(self) -> int:
        return len(self.source)

    def all(self, text: str) -> Iterator[tuple[int, bytes]]:
        """Every record with its index, in order, with progress under `text`."""
        total = len(self)
        chunks = [range(i, min(i + _CHUNK, total)) for i in range(0, total, _CHUNK)]
        for chunk in _progress(chunks, text):
            yield from zip(chunk, self.read(chunk), strict=True)

    def read(self, rows: Sequence[int]) -> Sequence[bytes]:
        try:
            return self.source.__getitems__(list(rows))
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"the records of {self.name!r} must be intact, and reading records "
                f"{min(rows)}..{max(rows)} failed with: {error}. {self.again}"
            ) from error

    def check_shape(self, image: np.ndarray, index: int, shape: tuple) -> None:
        if image.shape != shape:
            raise ValueError(
                f"all images of {self.name!r} must have one shape, and {self.split} "
                f"image {index} has {image.shape} after {shape}. Choose a resized "
                'config (as "imagenet_resized/32x32"), or resize them and save an '
                ".npz file."
            )


def _check_records(builder, split: str) -> None:
    """Each record file must hold as many records as the metadata promises."""
    info = builder.info.splits[split]
    for path, promised in zip(info.filepaths, info.shard_lengths, strict=True):
        found = _count_records(os.fspath(path))
        if found != promised:
            raise ValueError(
                f"{os.fspath(path)!r} must hold {promised} records, and what is there "
                f"is {found}. {_again(builder)}"
            )


def _count_records(path: str) -> int | str:
    """The number of records in a file, or what is wrong with it."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not os.path.isfile(path):
        return "no file"
    reader = ArrayRecordReader(path)
    count = reader.num_records()  # 0 where the index at the file's end is damaged
    try:
        reader.close()  # raises what went wrong
    except RuntimeError as error:
        return f"a damaged file ({error})"
    return count


def _again(builder) -> str:
    return f"Delete {str(builder.data_path)!r} and prepare or copy it again."


def _progress(chunks: list[range], text: str) -> Iterable[range]:
    """Iterates with a progress line on stderr; rich's on a terminal that has rich."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return _plain_progress(chunks, text)
    console = Console(stderr=True)
    if not console.is_terminal:
        return _plain_progress(chunks, text)
    return track(chunks, text, console=console, transient=True)


def _plain_progress(chunks: list[range], text: str) -> Iterator[range]:
    """A line every five seconds: none for a small set, a short log for a large one."""
    last = time.monotonic()
    for i, chunk in enumerate(chunks):
        if time.monotonic() - last > 5.0:
            last = time.monotonic()
            done = f"{text}: {100 * i // len(chunks)} %"
            print(done, file=sys.stderr, flush=True)
        yield chunk
