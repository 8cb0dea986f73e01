"""TFDS image sets from prepared array_record files, without TensorFlow.

TFDS resolves names, versions and features; the records are read and decoded once, and
the decoded arrays are kept by `cache`. Every count is checked against the dataset's own
metadata, and array_record verifies a checksum of every record: a damaged folder gives
an error, never fewer or other images.
"""

import difflib
import logging
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from otmdr_jax.data import cache
from otmdr_jax.data.dataset import Split

logger = logging.getLogger(__name__)

# Records a read; large enough to spread its cost, small next to the decoded set.
_CHUNK = 512


def read(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
) -> tuple[Split, Split, int]:
    """Reads a prepared TFDS set, from the cache where it was decoded before.

    Args:
      name: as TFDS takes it: "name", "name/config" or "name/config:version".
      data_dir: the folder of prepared data; None for TFDS's default.
      cache_dir: the folder of decoded arrays; None for `cache.default_directory()`.
      download: whether TFDS may download and prepare what is missing.

    Returns:
      (train, test, num_classes).

    Raises:
      ImportError, FileNotFoundError, ValueError: see `otmdr_jax.data.load`.
    """
    tfds = _import_tfds()
    data_dir = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    builder = _find(tfds, name, data_dir)
    if not builder.is_prepared():
        if not download:
            raise FileNotFoundError(
                f"{name!r} must be prepared in {str(builder.data_path)!r}, and it is "
                "not there. Pass the data_dir that has it, or prepare it once (this "
                "downloads, and most sets need TensorFlow for it): "
                f"{_command(name, data_dir)}"
            )
        _prepare(builder, name)
    _check_format(builder, name, data_dir)
    image_key, label_key = _keys(tfds, builder, name)
    splits = _split_names(builder, name)
    folder = pathlib.Path(builder.data_path)
    identity = {
        "name": "/".join(
            part.name for part in (builder, builder.builder_config) if part
        ),
        "version": str(builder.version),
        "fingerprint": cache.fingerprint(folder),
        "contents": " ".join((*splits, image_key, label_key)),
    }
    directory = pathlib.Path(cache_dir or cache.default_directory()).expanduser()
    path = cache.file_path(directory, identity)
    arrays = cache.read(path, identity)
    if arrays is None:
        arrays = {}
        for split in splits:
            images, labels = _decode(tfds, builder, split, image_key, label_key)
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
        cache.write(path, identity, arrays)
    train, test = (Split(arrays[f"{s}_images"], arrays[f"{s}_labels"]) for s in splits)
    return train, test, builder.info.features[label_key].num_classes


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


def _decode(
    tfds, builder, split: str, image_key: str, label_key: str
) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of one split, in the order of the records."""
    _check_records(builder, split)
    # Other features (ids, boxes) are not parsed: a quarter of the time for CIFAR-10.
    # One thread: parsing holds the interpreter's lock, and two were slower than one.
    features = tfds.features.FeaturesDict(
        {key: builder.info.features[key] for key in (image_key, label_key)}
    )
    source = builder.as_data_source(
        split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
    )
    total = len(source)
    images, labels = None, np.empty(total, np.int32)
    chunks = [range(i, min(i + _CHUNK, total)) for i in range(0, total, _CHUNK)]
    for chunk in _progress(chunks, f"decoding {builder.name} {split}"):
        for index, record in zip(chunk, _records(source, chunk, builder), strict=True):
            example = features.deserialize_example_np(record)
            image = np.asarray(example[image_key])
            if images is None:
                images = np.empty((total, *image.shape), image.dtype)
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"all images of {builder.name!r} must have one shape, and {split} "
                    f"image {index} has {image.shape} after {images.shape[1:]}. Choose "
                    'a resized config (as "imagenet_resized/32x32"), or resize them '
                    "and save an .npz file."
                )
            images[index], labels[index] = image, example[label_key]
    if images is None:
        raise ValueError(
            f"{builder.name!r} {split} must not be empty. {_again(builder)}"
        )
    return images, labels


def _records(source, chunk: range, builder) -> list[bytes]:
    try:
        return source.__getitems__(list(chunk))
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"the records of {builder.name!r} must be intact, and reading records "
            f"{chunk.start}..{chunk.stop - 1} failed with: {error}. {_again(builder)}"
        ) from error


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
