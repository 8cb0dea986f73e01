"""Mean and standard deviation of each channel, with which images are normalised."""

from collections.abc import Iterator, Sequence

import numpy as np

from otmdr_jax.data.lazy import LazyImages

# The most images, and the most bytes, for statistics of images that are not in memory.
_STATISTICS_IMAGES, _STATISTICS_BYTES = 10_000, 2**30


def check_statistics(
    images, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Checks given channel statistics, and computes missing ones from the images."""
    if mean is None or std is None:
        computed = channel_statistics(_sample(images))
        mean = computed[0] if mean is None else mean
        std = computed[1] if std is None else std
    channels = images.shape[-1]
    result = []
    for label, values in (("mean", mean), ("std", std)):
        array = np.asarray(values, np.float64)
        if array.shape != (channels,) or not np.isfinite(array).all():
            raise ValueError(
                f"{label} must be {channels} finite numbers, one a channel, got "
                f"{values!r}. Leave it out to compute it from the training images."
            )
        result.append(tuple(array.tolist()))
    if min(result[1]) <= 0.0:
        raise ValueError(
            f"std must be positive, got {std!r}. For a constant channel pass 1."
        )
    return result[0], result[1]


def _sample(images) -> np.ndarray:
    """The images, or a sample of lazy ones, small enough to be read at every start."""
    if not isinstance(images, LazyImages):
        return images
    affordable = _STATISTICS_BYTES * len(images) // images.nbytes
    count = min(len(images), _STATISTICS_IMAGES, max(1, affordable))
    return images[np.linspace(0, len(images) - 1, count).astype(int)]


def channel_statistics(images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in float64 and two passes.

    Args:
      images: (N, H, W, C); uint8 counts as value / 255.

    Returns:
      (mean, std), C floats each. The deviation is the population's (divided by N * H *
      W), and 1 for a channel that is constant up to float32's rounding.
    """
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    count = images[..., 0].size
    total = sum(block.sum(axis=0) for block in _pixel_blocks(images))
    mean = total / count
    squares = sum(((b - mean) ** 2).sum(axis=0) for b in _pixel_blocks(images))
    std = np.sqrt(squares / count)
    # Float32 resolves 6e-8 of a value: a spread below 1e-6 of the mean is rounding.
    # Below float32's smallest normal number, dividing by it would give inf.
    floor = np.maximum(1e-6 * np.abs(mean), np.finfo(np.float32).tiny)
    std = np.where(std > floor, std / scale, 1.0)
    return tuple((mean / scale).tolist()), tuple(std.tolist())


def _pixel_blocks(images) -> Iterator[np.ndarray]:
    """Blocks of (pixels, C) in float64, small enough to leave memory alone."""
    for start in range(0, len(images), 1024):
        block = images[start : start + 1024]
        yield block.reshape(-1, images.shape[-1]).astype(np.float64)
