"""The records of a prepared split, as bytes, complete and undamaged.

Records are counted against the dataset's own metadata, and array_record verifies a
checksum of every record: a damaged folder gives an error, never fewer or other records.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from otmdr_jax.io.progress import Progress

# Records a read: enough to spread its cost, few next to the decoded set.
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one split, as bytes, with errors that say what to do."""

    source: Any
    name: str
    split: str
    again: str

    def __len__(self) -> int:
        """The number of records."""
        return len(self.source)

    def all(self, text: str) -> Iterator[tuple[int, bytes]]:
        """Every record with its index, in order, with progress under `text`."""
        total = len(self)
        with Progress(total, 0, text, unit="records") as bar:
            for start in range(0, total, _CHUNK):
                rows = range(start, min(start + _CHUNK, total))
                yield from zip(rows, self.read(rows), strict=True)
                bar.update(rows.stop)

    def read(self, rows: Sequence[int]) -> Sequence[bytes]:
        """The records of some rows; a ValueError where they are damaged."""
        try:
            return self.source.__getitems__(list(rows))
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"the records of {self.name!r} must be intact, and reading records "
                f"{min(rows)}..{max(rows)} failed with: {error}. {self.again}"
            ) from error

    def check_shape(self, image: np.ndarray, index: int, shape: tuple) -> None:
        """Refuses an image whose shape is not that of the first one."""
        if image.shape != shape:
            raise ValueError(
                f"all images of {self.name!r} must have one shape, and {self.split} "
                f"image {index} has {image.shape} after {shape}. Choose a resized "
                'config (as "imagenet_resized/32x32"), or resize them and save an '
                ".npz file."
            )


def open_split(tfds, builder, split: str) -> Records:
    """Opens the records of one split after checking their number."""
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
    # The reader inside TFDS's, which would be pickled together with the whole builder.
    return Records(source.data_source, builder.name, split, _again(builder))


def _check_records(builder, split: str) -> None:
    """Checks that each record file holds as many records as the metadata say."""
    info = builder.info.splits[split]
    for path, promised in zip(info.filepaths, info.shard_lengths, strict=True):
        found = _count_records(os.fspath(path))
        if found != promised:
            raise ValueError(
                f"{os.fspath(path)!r} must hold {promised} records, but what is there "
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
