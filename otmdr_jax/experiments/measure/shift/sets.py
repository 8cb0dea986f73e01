"""Finds the sets that a model can be tested on, and checks that they fit it.

A set that the user names must exist. The sets that "auto" stands for may be missing:
the record then says why, and how to prepare them.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax import data as data_lib
from otmdr_jax.data import Dataset, LazyImages, Split

AUTO = "auto"  # the sets that suit the data
UNIFORM_NOISE = "uniform_noise"  # the one set that needs no files

# The 15 kinds of the benchmark, by their TFDS names, without its four extra kinds.
CIFAR10_C = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "frosted_glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic",
    "pixelate",
    "jpeg_compression",
)

# Errors of a set that is missing or does not fit.
_ABSENT = (FileNotFoundError, ImportError, ValueError, TypeError)
_CORRUPTED = "cifar10_corrupted"
_STREAM = 2  # of a seed: streams 0 and 1 belong to the data sets


class Found(NamedTuple):
    """The sets that will be used, and those that are missing.

    Attributes:
      present: (name, number of examples) of each set to use.
      missing: {"name", "why"} of each missing set.
    """

    present: list[tuple[str, int]]
    missing: list[dict[str, str]]


def find_sets(
    names: Sequence[str],
    severities: Sequence[int],
    dataset: Dataset,
    data_dir: str | os.PathLike | None,
) -> Found:
    """Finds other test sets of the dataset's classes.

    Args:
      names: Names for :func:`otmdr_jax.data.load_test`. "auto" stands for the sets that
        suit the dataset: for "cifar10", both versions of CIFAR-10.1, and CIFAR-10-C.
        "cifar10_corrupted" stands for all 15 kinds of CIFAR-10-C.
      severities: Severities of CIFAR-10-C; a full name such as
        "cifar10_corrupted/fog_3" has its own.
      dataset: The data that the model was trained on.
      data_dir: Folder of prepared TFDS data.

    Raises:
      FileNotFoundError, ImportError, ValueError, TypeError: A named set is missing, or
        its images or classes do not fit.
    """
    corrupted = [f"{_CORRUPTED}/{kind}_{s}" for kind in CIFAR10_C for s in severities]
    suited = (
        ["cifar10_1/v4", "cifar10_1/v6", *corrupted] if _is(dataset, "cifar10") else []
    )
    return _find(
        [corrupted if name == _CORRUPTED else [name] for name in names],
        suited,
        dataset,
        data_dir,
        same_classes=True,
    )


def find_ood(
    names: Sequence[str], dataset: Dataset, data_dir: str | os.PathLike | None
) -> Found:
    """Finds sets of other classes, with images of the dataset's shape.

    Args:
      names: Names as for :func:`find_sets`. "auto" stands for uniform noise and, for
        images of 32x32x3, SVHN, CIFAR-10 and CIFAR-100, except the dataset itself.
      dataset: The data that the model was trained on.
      data_dir: Folder of prepared TFDS data.

    Raises:
      FileNotFoundError, ImportError, ValueError, TypeError: A named set is missing, or
        its images do not fit.
    """
    suited = []
    if dataset.image_shape == (32, 32, 3):
        photographs = ("svhn_cropped", "cifar100", "cifar10")
        suited = [name for name in photographs if not _is(dataset, name)]
    return _find(
        [[name] for name in names],
        [*suited, UNIFORM_NOISE],
        dataset,
        data_dir,
        same_classes=False,
    )


def _find(groups, suited, dataset, data_dir, *, same_classes) -> Found:
    present: dict[str, int] = {}
    missing: list[dict[str, str]] = []
    for names in groups:
        asked = names != [AUTO]
        for name in names if asked else suited:
            try:
                present[name] = _count(name, dataset, data_dir, same_classes)
            except _ABSENT as error:
                if asked:
                    raise
                missing.append({"name": name, "why": str(error)})
    return Found(list(present.items()), _grouped(missing))


def _count(name, dataset, data_dir, same_classes) -> int:
    """Returns the number of examples of a set; raises an error if it does not fit."""
    if name == UNIFORM_NOISE:
        return dataset.test.num_examples
    found = data_lib.describe_test(name, data_dir=data_dir)
    count, shape, num_classes, dtype, names = found
    if any(
        size is not None and size != want
        for size, want in zip(shape, dataset.image_shape, strict=True)
    ):
        raise ValueError(_unfit(name, "images", shape, dataset.image_shape))
    if dtype != dataset.test.images.dtype:
        raise TypeError(_unfit(name, "images", dtype, dataset.test.images.dtype))
    # A file may lack examples of some classes.
    few = name.endswith(".npz") and num_classes <= dataset.num_classes
    if same_classes and num_classes != dataset.num_classes and not few:
        raise ValueError(_unfit(name, "classes", num_classes, dataset.num_classes))
    ours = dataset.class_names or ()
    if same_classes and names and names != ours and sorted(names) == sorted(ours):
        raise ValueError(
            f"the classes of {name!r} are those that the model was trained on in "
            f"another order, got {', '.join(names)} and {', '.join(ours)}: bring its "
            "labels into the order of the training set."
        )
    return count


def _unfit(name, what, got, want) -> str:
    return (
        f"the {what} of {name!r} are {got}, but the model was trained on {want}: it "
        "cannot be tested on this set. Choose another one."
    )


def _grouped(missing):
    """Joins the many missing sets of CIFAR-10-C into one entry."""
    many = [x for x in missing if x["name"].startswith(_CORRUPTED)]
    if len(many) < 2:
        return missing
    why = f"{len(many)} of its sets, the first because {many[0]['why']}"
    rest = [x for x in missing if x not in many]
    return [*rest, {"name": _CORRUPTED, "why": why}]


def read(
    name: str,
    dataset: Dataset,
    *,
    data_dir: str | os.PathLike | None,
    cache_dir: str | os.PathLike | None,
    max_examples: int | None,
    seed: int,
) -> Split:
    """Reads the examples of a set.

    Args:
      name: Name of a set that is present in :class:`Found`.
      dataset: The data that the model was trained on.
      data_dir: Folder of prepared TFDS data.
      cache_dir: Folder of decoded images.
      max_examples: Largest number of examples, evenly spread; None for all.
      seed: Seed of uniform noise.

    Raises:
      ValueError: The images have another shape, which the metadata did not tell.
    """
    if name == UNIFORM_NOISE:
        return uniform_noise(dataset, max_examples, seed)
    split, _ = data_lib.load_test(
        name, data_dir=data_dir, cache_dir=cache_dir, in_memory=None
    )
    if split.images.shape[1:] != dataset.image_shape:
        shape = split.images.shape[1:]
        raise ValueError(_unfit(name, "images", shape, dataset.image_shape))
    return spread(split, max_examples)


def spread(split: Split, max_examples: int | None) -> Split:
    """Returns at most `max_examples` examples of a split, evenly spread; None: all."""
    count = split.num_examples
    if max_examples is None or max_examples >= count:
        return split
    chosen = np.zeros(count, bool)
    chosen[np.linspace(0, count - 1, max_examples).astype(int)] = True
    images: Any = split.images
    # A mask keeps lazy images lazy.
    images = images if isinstance(images, LazyImages) else np.asarray(images)
    return Split(images[chosen], np.asarray(split.labels)[chosen])


def uniform_noise(dataset: Dataset, max_examples: int | None, seed: int) -> Split:
    """Draws images of independent uniform noise, as many as the test set has.

    Reference: Liang et al., `ODIN <https://arxiv.org/abs/1706.02690>`_, ICLR 2018.
    """
    count = dataset.test.num_examples
    count = count if max_examples is None else min(count, max_examples)
    rng = np.random.default_rng([_STREAM, seed])
    images = rng.integers(0, 256, (count, *dataset.image_shape), dtype=np.uint8)
    if dataset.test.images.dtype != np.uint8:
        low, high = (f(dataset.test.images) for f in (np.min, np.max))
        images = (low + (high - low) * (images / 255.0)).astype(np.float32)
    return Split(images, np.zeros(count, np.int32))


def _is(dataset: Dataset, family: str) -> bool:
    return dataset.name.split(":")[0].split("/")[0] == family
