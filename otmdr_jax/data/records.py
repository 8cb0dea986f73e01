"""The records of a prepared split, as bytes: all of them, and undamaged.

Files are counted against the dataset's own metadata, and array_record verifies a
checksum of every record: a damaged folder gives an error, never fewer or other records.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

# Records a read; large enough to spread its cost, small next to the decoded set.
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
        chunks = [range(i, min(i + _CHUNK, total)) for i in range(0, total, _CHUNK)]
        for chunk in progress(chunks, text):
            yield from zip(chunk, self.read(chunk), strict=True)

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
        """Refuses the image of a record that has not the shape of the first."""
        if image.shape != shape:
            raise ValueError(
                f"all images of {self.name!r} must have one shape, and {self.split} "
                f"image {index} has {image.shape} after {shape}. Choose a resized "
                'config (as "imagenet_resized/32x32"), or resize them and save an '
                ".npz file."
            )


def open_split(tfds, builder, split: str) -> Records:
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
    return Records(source.data_source, builder.name, split, _again(builder))


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


def progress(chunks: list[range], text: str) -> Iterable[range]:
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
