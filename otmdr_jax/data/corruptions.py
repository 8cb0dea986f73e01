"""Corruptions of test images, computed on the device: no download, any image size.

There are six kinds in five severities, in the spirit of CIFAR-10-C (Hendrycks &
Dietterich, 2019), for users without those files. Numbers on the two cannot be compared;
:func:`corrupt` says what differs.

Each kind is one compiled program for all severities, which picks its parameters from a
table. Blur and pixelation are linear maps of rows and of columns, made once in float64.
"""

import functools
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jax.typing import ArrayLike

from otmdr_jax.core.checks import check_word

SEVERITIES = (1, 2, 3, 4, 5)

# One entry a severity; all but the last come from make_cifar_c.py in
# github.com/hendrycks/robustness.
NOISE_STD = (0.04, 0.06, 0.08, 0.09, 0.10)  # on the [0, 1] scale
BLUR_STD = (0.4, 0.6, 0.7, 0.8, 1.0)  # pixels, of images of 32
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # what remains of deviations from the mean
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)  # added to the value of HSV
PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)  # the fraction of pixels left on a side
DEGREES = (5.0, 10.0, 15.0, 20.0, 30.0)  # ours: CIFAR-10-C rotates nothing

_SIDE = 32  # of the images that the widths in pixels were chosen for
_TRUNCATE = 4.0  # standard deviations, as in SciPy and scikit-image


def corrupt(
    key: jax.Array,
    images: ArrayLike,
    name: str,
    severity: ArrayLike,
    first: ArrayLike = 0,
) -> jax.Array:
    r"""Corrupts a batch of images.

    Let x be the image in [0, 1], m the mean of a channel, s the severity and V the
    largest channel of a pixel. The result is clipped to [0, 1] and rounded to 256
    levels:

    - "gaussian_noise": x + sigma_s e, e standard normal, its own for each channel;
    - "gaussian_blur": x convolved with a Gaussian of sigma_s pixels, edges repeated;
    - "contrast": m + c_s (x - m);
    - "brightness": V + b_s in place of V, hue and saturation kept;
    - "pixelate": box-resized to f_s of its side and back, as PIL's BOX filter does;
    - "rotation": turned by +d_s or -d_s degrees around the center, bilinear, edges
      repeated; the sign is drawn for each image.

    Differences from CIFAR-10-C: levels are rounded, not cut off, which took half a
    level from every pixel. Noise is clipped before it is rounded, as there, and differs
    between severities only in its size, so that severities are ordered image by image.
    The blur's sigma grows with the shorter side of images larger than 32 pixels
    (smaller images keep it, since a Gaussian below half a pixel does nothing).
    Pixelation leaves at least one pixel fewer with each severity, so that small images
    have five levels too (a size that divides the side can then be nearer to the image
    than the milder one before it). Rotation is an addition.

    Args:
      key: A PRNG key. An image's draw depends only on the key and the image's position,
        whatever the batch. Kinds without randomness ignore it.
      images: (B, H, W, C) of any size and number of channels, uint8 or floats in
        [0, 1].
      name: A name in `CORRUPTIONS`; static under jit.
      severity: The severity, 1..5. A traced one is not checked but clipped.
      first: The position of images[0] in the whole set. Default 0.

    Returns:
      (B, H, W, C) of the same dtype; floats are multiples of 1 / 255.

    Raises:
      ValueError: The name is unknown (the message lists the known ones), or the
        severity is not 1..5.
      TypeError: The images have another integer type, whose scale is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.full((1, 2, 2, 1), 100, jnp.uint8).at[0, 0, 0].set(180)
      >>> corrupt(jax.random.key(0), images, "contrast", 2).ravel().tolist()
      [150, 110, 110, 110]

    Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations", ICLR 2019, and its code (make_cifar_c.py).
    """
    check_corruption(name)
    if not isinstance(severity, jax.core.Tracer):
        severity = check_severity(severity)
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise ValueError(
            f"images must have shape (B, H, W, C), got {images.shape}. Give a batch of "
            "grey images a channel, images[..., None], one image an axis, image[None]."
        )
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be uint8 (0..255) or floats in [0, 1], got {images.dtype}. "
            "Convert them: images.astype(jnp.uint8) if the values are 0..255."
        )
    if images.dtype != jnp.uint8 and not isinstance(images, jax.core.Tracer):
        low, high = float(jnp.min(images)), float(jnp.max(images))
        if low < 0.0 or high > 1.0:
            raise ValueError(
                f"float images must lie in [0, 1], got [{low:.4g}, {high:.4g}]: divide "
                "by their largest value, or pass uint8."
            )
    # As arrays, or every severity and position would be a program of its own.
    place = jnp.asarray(severity, jnp.int32), jnp.asarray(first, jnp.int32)
    return _corrupt(key, images, *place, name=name)


def check_corruption(name: str) -> str:
    """Returns the name, or raises ValueError with the known ones."""
    check_word("a corruption", name, CORRUPTIONS)
    return name


def check_severity(severity: ArrayLike) -> int:
    """Returns the severity as an int, or raises ValueError unless it is 1..5."""
    whole = isinstance(severity, numbers.Integral) and not isinstance(severity, bool)
    if isinstance(severity, (np.ndarray, jax.Array)) and severity.ndim == 0:
        whole = jnp.issubdtype(severity.dtype, jnp.integer)
    if not whole or int(severity) not in SEVERITIES:  # type: ignore[arg-type]
        raise ValueError(
            f"severity must be one of {', '.join(map(str, SEVERITIES))} (1 is the "
            f"mildest), got {severity!r}."
        )
    return int(severity)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames="name")
def _corrupt(key, images, severity, first, *, name):
    exact = images.dtype == jnp.uint8
    x = images.astype(jnp.float32)
    x = x / 255.0 if exact else x
    positions = first + jnp.arange(images.shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    # Out of range only where it is traced: see check_severity.
    level = jnp.clip(severity, SEVERITIES[0], SEVERITIES[-1]) - 1
    out = jnp.round(jnp.clip(_KINDS[name](keys, x, level), 0.0, 1.0) * 255.0)
    return out.astype(jnp.uint8) if exact else (out / 255.0).astype(images.dtype)


def _gaussian_noise(keys, x, level):
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    return x + jnp.asarray(NOISE_STD)[level] * noise


def _gaussian_blur(keys, x, level):
    del keys
    scale = max(1.0, min(x.shape[1:3]) / _SIDE)
    stds = [scale * std for std in BLUR_STD]
    return _by_axes(x, level, lambda size: [blur_matrix(size, std) for std in stds])


def _contrast(keys, x, level):
    del keys
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + jnp.asarray(CONTRAST)[level] * (x - mean)


def _brightness(keys, x, level):
    del keys
    value = x.max(axis=-1, keepdims=True)
    target = jnp.clip(value + jnp.asarray(BRIGHTNESS)[level], 0.0, 1.0)
    # With hue and saturation fixed all channels are proportional to the value.
    black = value <= 0.0
    return jnp.where(black, target, x * (target / jnp.where(black, 1.0, value)))


def _pixelate(keys, x, level):
    del keys
    return _by_axes(x, level, lambda size: [box_matrix(size, n) for n in sizes(size)])


def _rotation(keys, x, level):
    degrees = jnp.asarray(DEGREES)[level]
    sign = jax.vmap(lambda key: jax.random.rademacher(key, (), jnp.float32))(keys)
    return jax.vmap(rotate)(x, sign * degrees)


_KINDS: dict[str, Callable[..., jax.Array]] = {
    "gaussian_noise": _gaussian_noise,
    "gaussian_blur": _gaussian_blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
    "rotation": _rotation,
}
CORRUPTIONS = tuple(_KINDS)


def _by_axes(x, level, matrices):
    """Applies the severity's linear maps to rows and to columns."""
    rows, columns = (
        jnp.asarray(np.stack(matrices(size)), jnp.float32)[level]  # (5, n, n) -> (n, n)
        for size in x.shape[1:3]
    )
    # In full: TPUs and GPUs would round the factors to 8 or 11 bits.
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return dot("wv,bhvc->bhwc", columns, dot("hg,bgwc->bhwc", rows, x))


def blur_matrix(size: int, std: float) -> np.ndarray:
    """The (size, size) matrix of a Gaussian blur with repeated edges, in float64."""
    radius = int(_TRUNCATE * std + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / std) ** 2)
    weights /= weights.sum()
    matrix = np.zeros((size, size))
    for i in range(size):
        np.add.at(matrix[i], np.clip(i + offsets, 0, size - 1), weights)
    return matrix


def sizes(size: int) -> list[int]:
    """The number of pixels that pixelation leaves of `size`, at each severity."""
    found: list[int] = []
    for fraction in PIXELATE:
        fewer = (found[-1] if found else size) - 1
        found.append(max(1, min(int(size * fraction), fewer)))
    return found


def box_matrix(size: int, fewer: int) -> np.ndarray:
    """The (size, size) matrix to fewer pixels and back by PIL's BOX filter, in float64.

    A pixel counts fully if its center lies in the box, and not at all otherwise.
    """

    def resize(old, new):
        step = old / new
        centers = (np.arange(new) + 0.5) * step
        distance = (np.arange(old) + 0.5 - centers[:, None]) / max(step, 1.0)
        inside = (-0.5 < distance) & (distance <= 0.5)
        return inside / inside.sum(axis=1, keepdims=True)

    return resize(fewer, size) @ resize(size, fewer)


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
    """Turns an (H, W, C) image as `scipy.ndimage.rotate(order=1, reshape=False)`."""
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    height, width = image.shape[:2]
    y, x = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2,
        jnp.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    place = [
        cos * y + sin * x + (height - 1) / 2,
        cos * x - sin * y + (width - 1) / 2,
    ]
    turn = functools.partial(map_coordinates, order=1, mode="nearest")
    return jax.vmap(lambda channel: turn(channel, place), -1, -1)(image)
