"""Encoded images, of files or of tables: decoded once, or each time they are needed.

Every image becomes uint8 of one shape, whatever its format has: turned as its EXIF
orientation says, transparent pixels over white, 16 bits by their high byte (as Pillow
reads 16 bits of colour), palettes and CMYK as RGB, the first frame of several. A set
has one channel if each of its images is greyscale, three otherwise.
"""

import concurrent.futures
import functools
import io
import math
import numbers
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from otmdr_jax.data import cache
from otmdr_jax.data.lazy import LazyImages, fits_in_memory
from otmdr_jax.io import extras
from otmdr_jax.io.progress import Progress

# Images that threads work on at a time: enough for all of them, few next to the set.
_CHUNK = 512
_MOST_NAMED = 5
# EXIF: the tag of the orientation, and the values that exchange height and width.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)

Size = tuple[int, int]


class Encoded(Protocol):
    """The images of one split, each as the bytes of an image file."""

    def __len__(self) -> int:
        """N, the number of images."""

    def read(self, row: int) -> bytes:
        """The bytes of one image; threads may read at once."""

    def name_of(self, row: int) -> str:
        """What an image is called in errors."""


def check_size(size: int | tuple[int, int] | None) -> Size | None:
    """(height, width) of what a user gives: a side, both, or None for images as is."""
    if size is None:
        return None
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(
        isinstance(x, numbers.Integral) and not isinstance(x, bool) and x >= 1
        for x in pair
    ):
        raise ValueError(
            "size must be a number of pixels, or (height, width), of at least 1, got "
            f"{size!r}. Leave it out where all images have one size."
        )
    return int(pair[0]), int(pair[1])


def read_splits(
    splits: Mapping[str, Encoded],
    size: Size | None,
    what: str,
    *,
    in_memory: bool | None,
    cached: tuple[pathlib.Path, Mapping[str, str]] | None = None,
) -> dict[str, np.ndarray | LazyImages]:
    """Decodes the images of several splits, which get one shape.

    Args:
      splits: The encoded images by the split's name.
      size: (height, width) to resize and crop to; None where all have one.
      what: What the images are of, for progress and errors.
      in_memory: True to decode all now; False to decode them when they are indexed;
        None decodes them now if they take at most a quarter of the memory.
      cached: The folder and the identity (see :mod:`otmdr_jax.data.cache`) of what is
        kept for the next time; None keeps nothing.

    Returns:
      Images (N, H, W, C) of each split, uint8.

    Raises:
      ValueError: Images cannot be read, or have several sizes; their names are said. A
        split has none.
    """
    for split, images in splits.items():
        if not len(images):
            raise ValueError(f"the {split} set of {what} holds no images.")
    _pillow()  # it is missing once, and not for each image
    if in_memory is None:
        in_memory = _fits(splits, size)
    make = functools.partial(_decoded if in_memory else _indexed, splits, size, what)
    if cached is None:
        arrays = make()
    else:
        directory, identity = cached[0], dict(cached[1])
        if not in_memory:
            identity["name"] += "-index"  # beside the file of decoded images
        path = cache.file_path(directory, identity)
        found = cache.read(path, identity)
        arrays = make() if found is None else found
        if found is None:
            cache.write(path, identity, arrays)
    if in_memory:
        return {split: arrays[split] for split in splits}
    height, width, channels = map(int, arrays["shape"])
    shape = height, width, channels
    return {
        split: LazyImages(
            functools.partial(_read_rows, images, arrays[split], size, shape, what),
            (len(images), *shape),
            checksums=arrays[split],
        )
        for split, images in splits.items()
    }


def _fits(splits: Mapping[str, Encoded], size: Size | None) -> bool:
    """Whether images of the shape of the first one fit in memory."""
    try:
        one = peek(next(iter(splits.values())).read(0), size)
    except Exception:  # decoding says which ones cannot be read
        return True
    count = sum(len(images) for images in splits.values())
    return fits_in_memory(count * math.prod(one))


def _decoded(splits, size, what) -> dict[str, np.ndarray]:
    """The pixels of each split."""
    found = {x: _decode_all(images, size, what, x) for x, images in splits.items()}
    _check_one_size({split: images.shape[1:] for split, images in found.items()}, what)
    channels = max(images.shape[-1] for images in found.values())
    return {split: _with_channels(images, channels) for split, images in found.items()}


def _decode_all(images: Encoded, size, what, split) -> np.ndarray:
    result: Any = None
    decoder = functools.partial(_decode_row, images, size)
    for row, image in _each(images, decoder, f"decoding {what} {split}", what):
        if result is None:
            result = np.empty((len(images), *image.shape), np.uint8)
        if image.shape[:2] != result.shape[1:3]:
            shapes = {"the first": result.shape[1:], images.name_of(row): image.shape}
            _check_one_size(shapes, what)
        if image.shape[-1] > result.shape[-1]:  # the first one that is not greyscale
            result = _with_channels(result, image.shape[-1])
        result[row] = image
    return result


def _indexed(splits, size, what) -> dict[str, np.ndarray]:
    """A checksum of each image by split, and the shape of all; decodes no image."""
    arrays: dict[str, np.ndarray] = {}
    shapes: dict[tuple, str] = {}
    for split, images in splits.items():
        arrays[split] = np.empty(len(images), np.uint32)
        looker = functools.partial(_look, images, size)
        text = f"reading {what} {split}"
        for row, (checksum, shape) in _each(images, looker, text, what):
            arrays[split][row] = checksum
            shapes.setdefault(shape, images.name_of(row))
    _check_one_size({name: shape for shape, name in shapes.items()}, what)
    # One shape but for the channels, of which colour has more.
    return {**arrays, "shape": np.array(max(shapes))}


def _each(
    images: Encoded, function: Callable[[int], Any], text: str, what: str
) -> Iterator[tuple[int, Any]]:
    """Yields (row, function(row)) in order, by threads; then says what has failed."""

    def attempt(row):
        try:
            return function(row), None
        except Exception as error:  # Pillow's plugins raise errors of many kinds
            return None, f"{images.name_of(row)} ({_message(error)})"

    failed: list[str] = []
    workers = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    with workers as pool, Progress(len(images), 0, text, unit="images") as bar:
        for start in range(0, len(images), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(images)))
            for row, (value, error) in zip(rows, pool.map(attempt, rows), strict=True):
                if error is None:
                    yield row, value
                else:
                    failed.append(error)
            bar.update(rows.stop)
    if failed:
        few = "; ".join(failed[:_MOST_NAMED])
        raise ValueError(
            f"the images of {what} must be readable, and {len(failed)} of "
            f"{len(images)} are not: {few}{'; ...' * (len(failed) > _MOST_NAMED)}. "
            "Repair or remove them."
        )


def _message(error: Exception) -> str:
    # Pillow names an object in memory, which tells nobody anything.
    return re.sub(r" <_io\.\w+ object at \w+>", "", str(error)) or type(error).__name__


def _decode_row(images: Encoded, size: Size | None, row: int) -> np.ndarray:
    return decode(images.read(row), size)


def _look(images: Encoded, size: Size | None, row: int) -> tuple[int, tuple]:
    content = images.read(row)
    return zlib.crc32(content), peek(content, size)


def _read_rows(
    images: Encoded,
    checksums: np.ndarray,
    size: Size | None,
    shape: tuple[int, int, int],
    what: str,
    rows: np.ndarray,
) -> np.ndarray:
    """What `LazyImages` read: some rows, if they are what they were when listed."""
    result = np.empty((len(rows), *shape), np.uint8)
    for i, row in enumerate(rows.tolist()):
        try:
            content = images.read(row)
            if zlib.crc32(content) != checksums[row]:
                raise ValueError("it has changed since the set was opened")
            result[i] = _with_channels(decode(content, size), shape[-1])
        except Exception as error:
            raise ValueError(
                f"the images of {what} must be readable, and {images.name_of(row)} is "
                f"not ({_message(error)}). Restore it, or open the set anew."
            ) from error
    return result


def _check_one_size(shapes: Mapping[str, tuple], what: str) -> None:
    """Refuses images of several heights and widths."""
    sizes = {shape[:2]: name for name, shape in shapes.items()}
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"the images of {what} must have one size, and {first} has "
            f"{one[0]}x{one[1]} pixels, {second} {other[0]}x{other[1]}. Give the size "
            "that they are resized to: size=64 in Python, --image-size 64 on the "
            "command line."
        )


def _with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Greyscale in so many channels; what has them already stays as it is."""
    if images.shape[-1] == channels:
        return images
    return np.repeat(images, channels, axis=-1)


# --- One image ----------------------------------------------------------------------


def decode(content: bytes, size: Size | None) -> np.ndarray:
    """The pixels of an image.

    Args:
      content: The bytes of its file.
      size: (height, width): the largest centred part of that shape is resized to it
        with bilinear antialiasing, which is resizing the side that is too short and
        cropping the other one's middle. None leaves the image as it is.

    Returns:
      (H, W, 1) uint8 of a greyscale image, (H, W, 3) of any other.

    Raises:
      ValueError: Pixels are floats or have 32 bits, whose scale is not known.
      Exception: What Pillow raises of a file that it cannot read.
    """
    Image, ImageOps = _pillow()
    with Image.open(io.BytesIO(content)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        plain = _plain(Image, image)
    if size is not None:
        plain = ImageOps.fit(plain, size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(plain)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def peek(content: bytes, size: Size | None) -> tuple[int, int, int]:
    """The shape that :func:`decode` will give, from the head of a file."""
    Image, _ = _pillow()
    with Image.open(io.BytesIO(content)) as image:
        if size is None:  # or a PNG would be decoded for its orientation
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            size = image.size if turned else image.size[::-1]
        return (*size, 1 if _is_gray(image.mode) else 3)


def _is_gray(mode: str) -> bool:
    return mode in ("1", "L", "LA", "F") or mode.startswith("I")


def _plain(Image, image):
    """The image in mode L if it is greyscale, else RGB."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose scale is not known")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        # Pillow opens PNG of 16 bits in a mode of 32.
        of_16_bits = image.mode != "I" or image.format in ("PNG", "PPM")
        if not of_16_bits or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its pixels have 32 bits, whose scale is not known")
        return Image.fromarray((values >> 8).astype(np.uint8))
    gray = _is_gray(image.mode)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("L" if gray else "RGB")


def _pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            f"reading images needs pillow, and importing it failed with: {error}. "
            + extras.command("data")
        ) from error
    return Image, ImageOps
