"""Checks of the arrays that a dataset is made of: shapes, dtypes and classes."""

import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from otmdr_jax.data.lazy import LazyImages

# Images of one scale differ by less in their largest value; 0..1 and 0..255 by more.
_SCALES = 50
# More classes than this are no labels but codes: ImageNet-21k has 21,841.
_MOST_CLASSES = 10**6


def stated_channels(mean: Any, std: Any) -> int | None:
    """The number of channels that both statistics are of; None without them."""
    return None if mean is None or std is None else np.size(mean)


def check_pair(
    pair: tuple[Any, Any], split: str, channels: int | None = None
) -> tuple[np.ndarray | LazyImages, np.ndarray]:
    """Checks one split's arrays and gives them their final ranks.

    Args:
      pair: (images, labels).
      split: The split's name, for errors.
      channels: The number of channels, where the caller has said it.

    Returns:
      Images (N, H, W, C), uint8 or float32, and labels (N,) of the dtype that they had.
    """
    try:
        # A dictionary of two arrays would be unpacked into its keys.
        images, labels = None if isinstance(pair, Mapping) else pair
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{split} must be a pair (images, labels), got {type(pair).__name__}. "
            f"Pass {split}=(images, labels)."
        ) from error
    images, labels = (
        _check_images(images, split, channels),
        _check_labels(labels, split),
    )
    if len(images) != len(labels):
        raise ValueError(
            f"{split} needs one label for each image, got {len(images)} images and "
            f"{len(labels)} labels. Check that both arrays come from the same split."
        )
    return images, labels


def _check_images(
    images: Any, split: str, channels: int | None
) -> np.ndarray | LazyImages:
    if not isinstance(images, LazyImages):
        images = plain(images, f"{split} images")
    if images.ndim == 3:
        if len(images) in (1, 3) and min(images.shape[1:]) > 4:
            raise ValueError(
                f"{split} images of shape {images.shape} look like one image (C, H, "
                "W). Images are (N, H, W, C); say so of gray ones with images[..., "
                "None]."
            )
        images = images[..., None]  # (N, H, W) -> (N, H, W, 1)
    if images.ndim != 4:
        raise ValueError(
            f"{split} images must have shape (N, H, W, C) or (N, H, W), got "
            f"{images.shape}. Reshape them."
        )
    if 0 in images.shape:
        raise ValueError(
            f"{split} images must not be empty, got shape {images.shape}. Check what "
            "was written."
        )
    _, height, width, last = images.shape
    if height in (1, 3) and width > 4 and last > 4 and channels != last:
        raise ValueError(
            f"{split} images must have shape (N, H, W, C), and {images.shape} looks "
            "like (N, C, H, W). Move the channels: images.transpose(0, 2, 3, 1). If "
            f"the last axis does hold {last} channels, give mean and std, one number "
            "for each."
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(
            f"{split} images must be uint8 (0..255) or floats, got {images.dtype}. "
            "Convert them: images.astype(np.uint8) if the values are 0..255, else "
            "images.astype(np.float32)."
        )
    with np.errstate(over="ignore"):  # what overflows is reported below, as inf
        images = images.astype(np.float32, copy=False)
    bad = ~np.isfinite(images).all(axis=(1, 2, 3))
    if bad.any():
        raise ValueError(
            f"{split} images must be finite in float32, got NaN or inf in "
            f"{bad.sum()} of {len(images)} images, the first at index "
            f"{bad.argmax()}. Repair or drop them."
        )
    return images


def plain(values: Any, name: str) -> np.ndarray:
    """An array without hidden entries, whose numbers would be taken for data."""
    if np.ma.is_masked(values):
        raise ValueError(
            f"{name} must be plain arrays, got masked entries. Fill them, "
            "values.filled(...), or drop these examples."
        )
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"{name} must be one array, got a {type(values).__name__} whose items have "
            f"several shapes ({error}). Resize or crop them."
        ) from error


def _check_labels(labels: Any, split: str) -> np.ndarray:
    labels = plain(labels, f"{split} labels")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(
            f"{split} labels must have shape (N,) or (N, 1), got {labels.shape}. "
            "Turn one-hot rows into classes: labels.argmax(axis=1)."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(
            f"{split} labels must be integers 0..C-1, got dtype {labels.dtype}. "
            "Convert them: labels.astype(np.int32), or for other labels "
            "np.unique(labels, return_inverse=True)[1]."
        )
    return labels


def check_agreement(train: Any, test: Any, name: str) -> None:
    """Refuses images that are unfit for one model and one normalisation.

    Args:
      train: Images (N, H, W, C) of the training split.
      test: Those of another one.
      name: That one's name, for errors.
    """
    shapes = train.shape[1:], test.shape[1:]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"train and {name} images must have one shape (H, W, C), got train "
            f"{shapes[0]} and {name} {shapes[1]}. Resize or crop one of them."
        )
    dtypes = train.dtype, test.dtype
    if dtypes[0] != dtypes[1]:
        raise TypeError(
            f"train and {name} images must both be uint8 or both floats, got train "
            f"{dtypes[0]} and {name} {dtypes[1]}. Convert one of them to the other's "
            "dtype and scale."
        )
    if dtypes[0] == np.uint8 or isinstance(test, LazyImages):
        return
    spreads = [float(np.abs(x).max()) for x in (train, test)]
    if min(spreads) > 0 and max(spreads) > _SCALES * min(spreads):
        warnings.warn(
            f"train and {name} images seem to have several scales: the largest values "
            f"are {spreads[0]:.4g} and {spreads[1]:.4g}. Both are normalised by the "
            "mean and deviation of the training images.",
            stacklevel=3,
        )


def check_classes(labels: dict[str, np.ndarray], num_classes: int | None) -> int:
    """Counts the classes and checks that all labels are of them.

    Args:
      labels: (N,) integers of each split, by its name.
      num_classes: C; None takes the largest label plus one.

    Returns:
      C.
    """
    highest = max(int(own.max()) for own in labels.values())
    if num_classes is None and highest >= _MOST_CLASSES:
        raise ValueError(
            f"labels must be integers 0..C-1, got {highest}, which looks like a code. "
            "Renumber them over all splits at once: np.unique(labels, "
            "return_inverse=True)[1]."
        )
    if num_classes is None:
        num_classes = highest + 1
    whole = isinstance(num_classes, numbers.Integral | np.integer)
    if not whole or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(
            f"num_classes must be an int of at least 1, got {num_classes=}. Leave it "
            "out to take the largest label plus one."
        )
    for name, own in labels.items():
        low, high = int(own.min()), int(own.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name} labels must be 0..{num_classes - 1} for {num_classes=}, got "
                f"{low}..{high}. Shift labels that start at 1, drop unlabelled "
                "examples (often -1), or correct num_classes or class_names."
            )
    return int(num_classes)


def check_class_names(
    names: Sequence[str] | None, num_classes: int
) -> tuple[str, ...] | None:
    """The names of C classes as a tuple of texts; None stays None."""
    if names is None:
        return None
    listed = None if isinstance(names, str) else tuple(names)
    if listed is None or not all(isinstance(x, str) for x in listed):
        raise ValueError(f"class_names must be texts, one a class, got {names!r}.")
    if len(listed) != num_classes:
        raise ValueError(
            f"class_names must be {num_classes} texts, one a class, got {len(listed)}: "
            f"{_listed(listed)}. Leave them out where they are not known."
        )
    return tuple(map(str, listed))  # NumPy's texts become Python's


def check_trained(labels: dict[str, np.ndarray], counted: bool) -> None:
    """Refuses classes that no training example shows, or warns of them.

    Args:
      labels: (N,) labels of each split, by its name; "train" among them.
      counted: Whether the number of classes was taken from the labels. Then labels that
        skip numbers are refused: they are likelier to be 1..C, or codes. Where the
        caller named it, a class of another split without training examples is a
        warning, and one without any is fine.
    """
    shown = np.unique(labels["train"])
    seen = np.unique(np.concatenate(list(labels.values())))
    unseen = np.setdiff1d(seen, shown)
    if counted and len(skipped := np.setdiff1d(np.arange(seen[-1] + 1), shown)):
        raise ValueError(
            f"the training labels must show every class from 0 to {seen[-1]}, the "
            f"largest label, but none is {_listed(skipped)}. If they start at "
            "1 or are codes, renumber them over all splits at once: np.unique(labels, "
            "return_inverse=True)[1]. If these classes exist, give num_classes="
            f"{seen[-1] + 1}."
        )
    for name, own in labels.items():
        if len(never := np.intersect1d(own, unseen)):
            count = int(np.isin(own, never).sum())
            warnings.warn(
                f"{count} of {len(own)} {name} examples are of classes without a "
                f"training example ({_listed(never)}): no model can learn them.",
                stacklevel=3,
            )


def _listed(classes: Sequence | np.ndarray) -> str:
    few = ", ".join(map(str, classes[:5]))
    return few if len(classes) <= 5 else f"{few}, ... ({len(classes)} classes)"
