"""Images that stay in their files and are decoded when they are indexed."""

import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

# Images a read: limits the memory beside the result, and spreads the cost of a call.
_CHUNK = 512

# The rest of a memory is for the model, its activations and other processes.
_SHARE_OF_MEMORY = 0.25


class LazyImages:
    """An (N, H, W, C) uint8 array to read from, for sets that do not fit in memory.

    Only the first axis can be indexed. The result depends on the kind of index:

    - an integer: one image, (H, W, C);
    - a slice, or a sequence of integers: a NumPy array, decoded on the spot;
    - a bool mask, (N,): another `LazyImages`, of which nothing is decoded. This is how
      `from_arrays` holds out a validation set.

    `np.asarray` decodes everything. Threads may read at once if `read` allows it, and
    the object can be pickled if `read` can.

    Args:
      read: A function of (n,) int64 row numbers that returns these images as an (n, H,
        W, C) uint8 array.
      shape: (N, H, W, C).
      checksums: (N,) integers that change with the images; with None, the default,
        `checksum` reads all pixels.

    Attributes:
      shape: (N, H, W, C).
      dtype: uint8.
      ndim: 4.
      nbytes: N * H * W * C, the size once decoded.

    Raises:
      ValueError: A shape is not as above, or `read` returns another shape.
      IndexError: An index is out of bounds, or a mask has another length.
      TypeError: The index is of another kind.

    Example:
      >>> import numpy as np
      >>> def read(rows):
      ...     return np.broadcast_to(rows, (2, 2, 1, len(rows))).T.astype(np.uint8)
      >>> images = LazyImages(read, (5, 1, 2, 2))
      >>> images[[4, 0]].ravel().tolist()
      [4, 4, 4, 4, 0, 0, 0, 0]
      >>> images[np.arange(5) % 2 == 1]
      LazyImages(2x1x2x2 uint8)
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, int, int, int],
        *,
        checksums: np.ndarray | None = None,
    ):
        if len(shape) != 4 or min(shape) < 0:
            raise ValueError(f"shape must be (N, H, W, C), got {shape}.")
        if checksums is not None and checksums.shape != shape[:1]:
            raise ValueError(
                f"checksums must have shape ({shape[0]},), one an image, got "
                f"{checksums.shape}. Leave them out to have the pixels read instead."
            )
        self._read, self._image_shape = read, tuple(shape[1:])
        self._checksums = checksums
        self._rows = np.arange(shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self._rows), *self._image_shape)

    @property
    def nbytes(self) -> int:
        """The size of all images once decoded."""
        return len(self._rows) * int(np.prod(self._image_shape))

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        """The shape; the pixels would have to be read."""
        return f"LazyImages({'x'.join(map(str, self.shape))} uint8)"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._decode(self._rows[index])
        # A tuple would pass for a sequence of rows; NumPy takes it for several axes.
        array = np.asarray(None if isinstance(index, tuple) else index)
        if array.dtype == bool:
            if array.shape != self._rows.shape:
                raise IndexError(
                    f"a mask must have shape ({len(self)},), one entry an image, got "
                    f"{array.shape}."
                )
            return self._select(array)
        if array.shape == (0,):
            array = array.astype(int)  # [] has a float dtype
        if array.ndim < 2 and array.dtype.kind in "iu":
            images = self._decode(np.atleast_1d(self._rows[array]))
            return images if array.ndim else images[0]
        raise TypeError(
            "lazy images take an integer, a slice, a sequence of integers or a bool "
            f"mask over the first axis, got {index!r}. Read the images first, then "
            "index the array: images[rows][:, :8]."
        )

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Decodes all images."""
        if copy is False:
            raise ValueError(
                "lazy images are decoded into new memory, so copy=False cannot be "
                "had. Leave copy out."
            )
        return self[:].astype(dtype or self.dtype, copy=False)

    def checksum(self) -> int:
        """A CRC-32 that changes with the images and with their order.

        It reads no pixels if the images came with checksums, and all of them otherwise.
        """
        if self._checksums is not None:
            return zlib.crc32(self._checksums[self._rows].tobytes())
        crc = 0
        for start in range(0, len(self), _CHUNK):
            crc = zlib.crc32(self[start : start + _CHUNK].tobytes(), crc)
        return crc

    def _select(self, mask: np.ndarray) -> "LazyImages":
        view = object.__new__(LazyImages)
        view.__dict__.update(self.__dict__, _rows=self._rows[mask])
        return view

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self._image_shape), np.uint8)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            block = self._read(part)
            want = (len(part), *self._image_shape)
            if block.shape != want or block.dtype != np.uint8:
                raise ValueError(
                    f"read must return {want} uint8 for {len(part)} rows, got "
                    f"{block.shape} {block.dtype}. Resize and convert the images "
                    "there."
                )
            images[start : start + len(part)] = block
        return images


def fits_in_memory(nbytes: int, memory: float | None = None) -> bool:
    """True if data take at most a quarter of a memory; None stands for the host's."""
    if memory is None:
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # not on Windows
            return True
    return nbytes <= _SHARE_OF_MEMORY * memory
