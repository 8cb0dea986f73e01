"""The steps from a set to a batch: gather, augment, normalise; pure and jittable.

Shapes are static and randomness comes from keys, so one trace serves every batch. As in
the usual PyTorch pipeline, crop and flip see raw pixels, the padding is black (zero
before normalisation), and normalisation comes last.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from otmdr_jax.core import shards
from otmdr_jax.data.dataset import Split, check_augmentations
from otmdr_jax.data.lazy import LazyImages

# Zero pixels on each side before a random crop: the released code's RandomCrop(32, 4).
CROP_PADDING = 4


def normalise(
    images: ArrayLike,
    mean: ArrayLike | Sequence[float],
    std: ArrayLike | Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Scales images to zero mean and unit deviation: (x - mean) / std per channel.

    Args:
      images: Images (..., C), uint8 (then x = images / 255) or floats (x = images).
      mean: (C,), such as `Dataset.mean`.
      std: (C,), such as `Dataset.std`; positive.
      dtype: The dtype of the result, float32 by default. The arithmetic is always
        float32, since bfloat16 has 8 bits and would lose pixel values on the way.

    Returns:
      (..., C) of `dtype`.

    Raises:
      TypeError: The images have another integer type, whose scale is unknown.
      ValueError: mean or std does not have C entries.

    Example:
      >>> import jax.numpy as jnp
      >>> pixels = jnp.array([[[0, 255]]], jnp.uint8)[..., None]
      >>> normalise(pixels, mean=(0.5,), std=(0.5,)).ravel().tolist()
      [-1.0, 1.0]
    """
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8:
        x = images.astype(jnp.float32) / 255.0
    elif jnp.issubdtype(images.dtype, jnp.floating):
        x = images.astype(jnp.float32)
    else:
        raise TypeError(
            f"images must be uint8 (0..255) or floats, got {images.dtype}. Convert "
            "them: images.astype(jnp.uint8) if the values are 0..255."
        )
    per_channel = (1,) * (x.ndim - 1) + (-1,)  # no silent rank promotion
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    if mean.shape != x.shape[-1:] or std.shape != x.shape[-1:]:
        raise ValueError(
            f"mean and std must have one entry for each of {x.shape[-1]} channels, "
            f"got shapes {mean.shape} and {std.shape} for images {images.shape}. The "
            "channels must come last."
        )
    x = (x - mean.reshape(per_channel)) / std.reshape(per_channel)
    return x.astype(dtype)


def augment(
    key: jax.Array, images: ArrayLike, ops: Sequence[str], first: ArrayLike = 0
) -> jax.Array:
    """Augments each image of a batch at random.

    "crop" pads 4 black pixels on each side and cuts the original size at a uniformly
    random offset; "flip" mirrors left and right with probability 1/2. Both act on raw
    pixels: call this before `normalise`, so that the padding is black.

    Args:
      key: A PRNG key; it is split into one key per op.
      images: (B, H, W, C) of any dtype.
      ops: Names, "crop" and "flip", applied in this order; static under jit.
        `Dataset.augment` holds the standard ones of a set. () returns the images.
      first: The position of images[0] in the whole batch if these images are one
        device's part of it; an image's draw depends only on its position.

    Returns:
      (B, H, W, C), of the same dtype.

    Raises:
      ValueError: A name is unknown; the message lists the known ones.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.ones((2, 8, 8, 3), jnp.uint8)
      >>> augment(jax.random.key(0), images, ("crop", "flip")).shape
      (2, 8, 8, 3)

    Source: He et al., "Deep Residual Learning for Image Recognition" (2016), 4.2.
    """
    images = jnp.asarray(images)
    names = check_augmentations(ops)
    if not names:
        return images
    run = shards.left_to_compiler(functools.partial(_augmented, names), images)
    return run(key, images, jnp.asarray(first))


def _augmented(names, key, images, first):
    positions = first + jnp.arange(images.shape[0])
    for name, op_key in zip(names, jax.random.split(key, len(names)), strict=True):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(op_key, positions)
        images = _OPS[name](keys, images)
    return images


def random_crop(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts each image by up to `CROP_PADDING` pixels and fills with black."""
    offsets = jax.vmap(
        lambda key: jax.random.randint(key, (2,), 0, 2 * CROP_PADDING + 1)
    )(keys)
    return crop_at(images, offsets)


def crop_at(images: jax.Array, offsets: jax.Array) -> jax.Array:
    """Cuts (H, W) out of each zero-padded image at its own (row, column) offset.

    Args:
      images: (B, H, W, C).
      offsets: (B, 2) integers in 0..2 * CROP_PADDING; CROP_PADDING is the identity.

    Returns:
      (B, H, W, C), of the same dtype.
    """
    side = (CROP_PADDING, CROP_PADDING)
    padded = jnp.pad(images, ((0, 0), side, side, (0, 0)))

    def cut(image, offset):  # (H + 8, W + 8, C), (2,) -> (H, W, C)
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(cut)(padded, offsets)


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left and right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
    return jnp.where(flip, images[:, :, ::-1], images)


_OPS = {"crop": random_crop, "flip": random_flip}


def epoch_order(key: jax.Array, num_examples: int) -> jax.Array:
    """Draws the order of one epoch: a permutation of all examples.

    Args:
      key: A PRNG key, a new one for each epoch.
      num_examples: N; static under jit.

    Returns:
      (N,) int32 with each of 0..N-1 once.

    Example:
      >>> import jax
      >>> sorted(epoch_order(jax.random.key(0), 5).tolist())
      [0, 1, 2, 3, 4]
    """
    return jax.random.permutation(key, jnp.arange(num_examples, dtype=jnp.int32))


def take(split: Split, order: jax.Array, i: ArrayLike, batch_size: int) -> Split:
    """Gathers batch i of an epoch on the device.

    Batches 0..N // batch_size - 1 hold each example at most once. If batch_size does
    not divide N, one more batch visits the remaining examples. The first examples of
    the order fill it up, so shapes never change and no example is left out.

    Args:
      split: Images (N, ...) and labels (N,), both on the device (`jax.device_put`): as
        NumPy arrays they would become constants of the compiled program.
      order: (N,) from `epoch_order`.
      i: The number of the batch, which may be traced; beyond the epoch it starts over.
      batch_size: B; static under jit.

    Returns:
      `Split` of images (B, ...) and labels (B,).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> split = Split(jnp.zeros((5, 2, 2, 1)), jnp.arange(5))
      >>> take(split, jnp.array([4, 3, 2, 1, 0]), 2, batch_size=2).labels.tolist()
      [0, 4]
    """
    positions = (jnp.asarray(i) * batch_size + jnp.arange(batch_size)) % order.shape[0]
    # In bounds by construction; "clip" spares the check that fills with NaN.
    rows = jnp.take(order, positions, mode="clip")
    images, labels = (shards.take(jnp.asarray(a), rows, "clip") for a in split)
    return Split(images, labels)


def eval_batches(
    split: Split, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields all examples in order, in batches of one size, for evaluation.

    The last batch is padded with black images of class 0 and the mask is False there:
    sums weighted by the mask count every example exactly once.

    Args:
      split: Images (N, H, W, C), of which lazy ones are decoded batch by batch, and
        labels (N,).
      batch_size: B, at least 1; also the size of the last batch.

    Yields:
      (images, labels, mask): (B, H, W, C), (B,) int32 and (B,) bool.

    Raises:
      ValueError: batch_size is below 1.

    Example:
      >>> import numpy as np
      >>> split = Split(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32))
      >>> [mask.tolist() for _, _, mask in eval_batches(split, 2)]
      [[True, True], [True, False]]
    """
    if batch_size < 1:
        raise ValueError(
            f"batch_size must be at least 1, got {batch_size=}. Evaluation fits "
            "larger batches than training; 512 is a fair start."
        )
    images = split.images
    if not isinstance(images, LazyImages):
        images = np.asarray(images)
    return _eval_batches(images, np.asarray(split.labels), batch_size)


def _eval_batches(images, labels, batch_size):
    for start in range(0, len(labels), batch_size):
        block = images[start : start + batch_size], labels[start : start + batch_size]
        valid = len(block[1])
        padded = (
            np.pad(a, ((0, batch_size - valid),) + ((0, 0),) * (a.ndim - 1))
            for a in block
        )
        yield *padded, np.arange(batch_size) < valid
