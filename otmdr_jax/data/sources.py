"""`load` and `load_test`: sets by name: scikit-learn's, TFDS's, .npz files."""

import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.data import prepared
from otmdr_jax.data.dataset import (
    Dataset,
    Split,
    check_split,
    from_arrays,
    stratified_choice,
)

# Channel mean and std of the training sets, as in the paper's released code; other
# sets get theirs computed.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
}

# Augmentations that are standard for a set. No other gets one unasked: a flip, for one,
# changes what a digit or a letter means.
_AUGMENT = {"cifar10": ("crop", "flip"), "cifar100": ("crop", "flip")}

_NPZ_KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),  # Keras
)
_NPZ_TEST_KEYS = tuple(keys[2:] for keys in _NPZ_KEYS)


def load(
    name: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
    in_memory: bool | None = True,
    validation: int | float = 0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Loads an image classification set.

    Args:
      name: one of
        "digits": scikit-learn's 1797 handwritten digits, 8 x 8 x 1, scaled from 0..16
        to 0..255; always the same stratified 1437 / 360 train / test split;
        "cifar10", "cifar100" or any image classification set of TFDS, also
        "name/config:version", from its prepared array_record files, with neither
        TensorFlow nor network; the splits "train" and "test", or "validation" as the
        test split where there is no "test";
        a path that ends in .npz, with the arrays train_images, train_labels,
        test_images, test_labels (or Keras' x_train, y_train, x_test, y_test) as
        `from_arrays` takes them.
      data_dir: the folder of prepared TFDS data. None: TFDS's own default, which is
        the environment's TFDS_DATA_DIR or ~/tensorflow_datasets.
      cache_dir: where decoded TFDS images are kept, one file for each prepared folder,
        so that only the first load decodes. None: the environment's OTMDR_CACHE, else
        $XDG_CACHE_HOME/otmdr_jax, else ~/.cache/otmdr_jax. Safe to delete.
      download: let TFDS download and prepare a set that is not there. Most sets then
        need TensorFlow, once. Default False: nothing reaches for the network unasked.
      in_memory: whether to decode all images now. False leaves those of TFDS sets in
        their files, as `LazyImages` to train on with `stream_batches`, and reads and
        caches the labels alone: the splits and labels are the same. "digits" and .npz
        files are read whatever it says. None: where they take at most a quarter of
        the host's memory. Default True.
      validation: training examples to hold out, a count or a fraction, stratified.
        Default 0: none.
      label_noise: the fraction of training labels to replace by other classes.
        Default 0.
      seed: of the validation split and the label noise.

    Returns:
      A `Dataset`. CIFAR's mean and std are the released code's; others are computed
      over the training images in use (a sample of them, see `from_arrays`, where they
      are not in memory). CIFAR's `augment` is ("crop", "flip"), others' is ().

    Raises:
      ImportError: where a package is missing; says what to install.
      FileNotFoundError: where the data are not prepared, with the command that
        prepares them, or where the .npz file does not exist.
      ValueError: for an unknown name, with close matches, for damaged files, and for
        data that are not images with one class each.
      TypeError: for arrays of an unfit dtype, and for images other than uint8 that
        are not to be in memory.

    Example:
      >>> load("digits", validation=0.1)
      Dataset('digits': 1293 train, 144 validation, 360 test, 8x8x1 uint8, 10 classes)

    Source: statistics and augmentation as in the released code of OT-MDR; the digits
    are the test part of the UCI set of Alpaydin and Kaynak (1998).
    """
    options: dict[str, Any] = {
        "validation": validation,
        "label_noise": label_noise,
        "seed": seed,
    }
    text = os.fspath(name)
    if text.endswith(".npz"):
        train, test = _read_npz(pathlib.Path(text).expanduser(), _NPZ_KEYS)
        return from_arrays(train, test, name=pathlib.Path(text).stem, **options)
    if text == "digits":
        train, test = _digits()
        return from_arrays(train, test, num_classes=10, name="digits", **options)
    train, test, num_classes = prepared.read(
        text,
        data_dir=data_dir,
        cache_dir=cache_dir,
        download=download,
        in_memory=in_memory,
    )
    family = text.split(":")[0].split("/")[0]
    mean, std = _STATISTICS.get(family, (None, None))
    return from_arrays(
        train,
        test,
        num_classes=num_classes,
        name=text,
        mean=mean,
        std=std,
        augment=_AUGMENT.get(family, ()),
        **options,
    )


def load_test(
    name: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
    in_memory: bool | None = True,
) -> tuple[Split, int]:
    """Loads the test split alone of a set, which needs no training split.

    For sets to test on and not to train on: CIFAR-10.1 ("cifar10_1/v6"), CIFAR-10-C
    ("cifar10_corrupted/fog_3"), and those from outside of the distribution.

    Args:
      name: as for :func:`load`; a path that ends in .npz needs the arrays test_images
        and test_labels (or Keras' x_test, y_test) alone.
      data_dir: see :func:`load`.
      cache_dir: likewise.
      download: likewise.
      in_memory: likewise.

    Returns:
      (split, num_classes): a `Split` of checked images and labels, and C. Of an .npz
      file C is the largest label plus one.

    Raises:
      ImportError, FileNotFoundError, ValueError, TypeError: see :func:`load`.

    Example:
      >>> split, num_classes = load_test("digits")
      >>> split.images.shape, num_classes
      ((360, 8, 8, 1), 10)
    """
    text = os.fspath(name)
    if text.endswith(".npz"):
        path = pathlib.Path(text).expanduser()
        test, num_classes = _read_npz(path, _NPZ_TEST_KEYS)[0], None
    elif text == "digits":
        test, num_classes = _digits()[1], 10
    else:
        test, num_classes = prepared.read_test(
            text,
            data_dir=data_dir,
            cache_dir=cache_dir,
            download=download,
            in_memory=in_memory,
        )
    return check_split(test, num_classes, "test")


class TestInfo(NamedTuple):
    """What :func:`describe_test` tells of a set's test split.

    Attributes:
      num_examples: N.
      image_shape: (H, W, C); None where only the images know.
      num_classes: C, of an .npz file the largest label plus one.
    """

    num_examples: int
    image_shape: tuple[int | None, ...]
    num_classes: int


def describe_test(
    name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None
) -> TestInfo:
    """Says what :func:`load_test` would load; nothing of a TFDS set is decoded.

    Args:
      name: as for :func:`load_test`.
      data_dir: likewise.

    Returns:
      A :class:`TestInfo`.

    Raises:
      ImportError, FileNotFoundError, ValueError, TypeError: as :func:`load_test`, where
        the set is not there or cannot be read.

    Example:
      >>> describe_test("digits")
      TestInfo(num_examples=360, image_shape=(8, 8, 1), num_classes=10)
    """
    text = os.fspath(name)
    if text.endswith(".npz") or text == "digits":
        split, num_classes = load_test(text)
        return TestInfo(split.num_examples, split.images.shape[1:], num_classes)
    return TestInfo(*prepared.describe_test(text, data_dir=data_dir))


def _digits() -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed. Run: pip "
            "install otmdr-jax[data]"
        ) from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # A fifth, with a fixed seed: the same test set whatever the run's own seed.
    in_test = stratified_choice(labels, 360, np.random.default_rng(0))
    return (
        Split(images[~in_test], labels[~in_test]),
        Split(images[in_test], labels[in_test]),
    )


def _read_npz(path: pathlib.Path, choices: Sequence[Sequence[str]]) -> list[Split]:
    """Pairs of arrays of a user's file, by their names; nothing in them is checked."""
    if not path.is_file():
        raise FileNotFoundError(
            f"a name that ends in .npz must be a file, and {str(path)!r} is none "
            f"(looked in {str(path.absolute().parent)!r}). Correct the path."
        )
    try:
        # np.load of a path leaves the file open where it is no zip; this does not.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            for keys in choices:
                if set(keys) <= set(file.files):
                    arrays = [file[key] for key in keys]
                    pairs = zip(arrays[::2], arrays[1::2], strict=True)
                    return [Split(*pair) for pair in pairs]
            found = sorted(file.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} must be an .npz file of plain arrays, and reading it "
            f"failed with: {error}. Write it again with np.savez; arrays of Python "
            "objects cannot be read."
        ) from error
    names = " or ".join(", ".join(keys) for keys in choices)
    raise ValueError(
        f"{str(path)!r} must hold the arrays {names}, and it holds {found}. Rename "
        "them where you save the file."
    )
