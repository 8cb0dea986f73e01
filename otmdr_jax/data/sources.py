"""`load` and `load_test`: sets by name: scikit-learn's, TFDS's, .npz files, folders."""

import importlib.util
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.data import npz, prepared
from otmdr_jax.data.checks import check_class_names, stated_channels
from otmdr_jax.data.dataset import (
    Dataset,
    Split,
    check_split,
    from_arrays,
    stratified_choice,
)
from otmdr_jax.data.folder import from_folder, holds_images
from otmdr_jax.io import extras

# Channel mean and std of the training sets, as in the paper's released code; other
# sets get theirs computed.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
}

# Augmentations that are standard for a set. No other gets one unasked: a flip, for one,
# changes what a digit or a letter means.
_AUGMENT = {"cifar10": ("crop", "flip"), "cifar100": ("crop", "flip")}


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
    image_size: int | None = None,
) -> Dataset:
    """Loads an image classification set.

    Args:
      name: One of four kinds. (1) "digits": scikit-learn's 1797 handwritten digits, 8
        x 8 x 1, scaled from 0..16 to 0..255, always with the same stratified split into
        1437 for training and 360 for testing. (2) "cifar10", "cifar100" or any image
        classification set of TFDS, also "name/config:version", from its prepared
        array_record files, with neither TensorFlow nor network; its splits "train" and
        "test", or "validation" if there is no "test". (3) A path that ends in .npz, to
        a file with the arrays train_images, train_labels, test_images, test_labels (or
        Keras' x_train, y_train, x_test, y_test) as `from_arrays` takes them. It may
        hold a validation set too (validation_images, val_images or x_val, and labels).
        Without a test set a fifth of the training set, stratified and drawn by `seed`,
        is left to test on, with a warning. (4) The path of a folder of images, as
        :func:`from_folder` takes it; see :func:`is_folder` for what is a path.
      data_dir: The folder of prepared TFDS data. None: TFDS's default, which is the
        environment's TFDS_DATA_DIR or ~/tensorflow_datasets. Where an .npz file is
        not at its path: the folder that it is in now. An .npz file itself takes the
        place of the one that is named. So do a folder of images and the folder above.
      cache_dir: The folder where decoded images of TFDS sets and folders are kept, one
        file for each of them, so that only the first load decodes. None: the
        environment's OTMDR_CACHE, else $XDG_CACHE_HOME/otmdr_jax, else
        ~/.cache/otmdr_jax. It is safe to delete.
      download: True to let TFDS download and prepare a missing set. Most sets then need
        TensorFlow, once. Default False: nothing uses the network unasked.
      in_memory: True, the default, to decode all images now. False leaves those of TFDS
        sets and folders in their files, as `LazyImages` to train on with
        `stream_batches`, and reads and caches only the labels; splits and labels are
        the same. None decodes them if they take at most a quarter of the host's memory.
        "digits" and .npz files are always read.
      validation: Training examples to hold out, a count or a fraction, stratified.
        Default 0: none.
      label_noise: The fraction of training labels to replace by other classes. Default
        0.
      seed: The seed of the validation split and of the label noise.
      image_size: The side in pixels that the images of a folder are resized to, the
        `size` of :func:`from_folder`; for nothing else.

    Returns:
      A `Dataset`. CIFAR's mean and std are the released code's; others are computed
      over the training images in use (over a sample, as in `from_arrays`, if they are
      not in memory). CIFAR's `augment` is ("crop", "flip"), that of others is ().

    Raises:
      ImportError: A package is missing; the message says what to install.
      FileNotFoundError: The data are not prepared (the message has the command that
        prepares them), or the .npz file does not exist.
      ValueError: The name is unknown (the message has close matches), files are
        damaged, or the data are not images with one class each.
      TypeError: An array has an unfit dtype, or images that are to stay in their files
        are not uint8.

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
    if is_folder(name):
        return from_folder(
            folder_path(text, data_dir),
            image_size,
            cache_dir=cache_dir,
            in_memory=in_memory,
            **options,
        )
    if image_size is not None:
        raise ValueError(
            f"image_size is for folders of images, and {text!r} is none: leave "
            f"{image_size=} out, or write the path as ./{text}."
        )
    if text.endswith(".npz"):
        path = npz.path_of(text, data_dir)
        return from_arrays(name=path.stem, **npz.read(path, **options))
    if text == "digits":
        train, test = _digits()
        names = [str(digit) for digit in range(10)]
        return from_arrays(train, test, class_names=names, name="digits", **options)
    train, test, class_names = prepared.read(
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
        class_names=class_names,
        name=text,
        mean=mean,
        std=std,
        augment=_AUGMENT.get(family, ()),
        **options,
    )


def is_folder(name: str | os.PathLike) -> bool:
    """Whether a name of :func:`load` is the path of a folder of images.

    It is if it is an `os.PathLike`, or a text that is absolute, begins with "." or "~",
    or ends with "/". Any other text is if there is a folder of that name with images in
    it, which prepared TFDS data have none of; "digits", "cifar10" and "cifar100" always
    are the sets.

    Args:
      name: The name.

    Example:
      >>> [is_folder(name) for name in ("./photos", "/data/photos", "mnist", "my.npz")]
      [True, True, False, False]
    """
    text = os.fspath(name)
    if not text or text.endswith(".npz"):
        return False
    if isinstance(name, os.PathLike) or os.path.isabs(text):
        return True
    if text.startswith((".", "~")) or text.endswith(("/", os.sep)):
        return True
    return text not in ("digits", *_STATISTICS) and holds_images(text)


def load_test(
    name: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
    in_memory: bool | None = True,
) -> tuple[Split, int]:
    """Loads only the test split of a set, which need not have a training split.

    It is for sets to test on and not to train on: CIFAR-10.1 ("cifar10_1/v6"),
    CIFAR-10-C ("cifar10_corrupted/fog_3"), and out-of-distribution sets.

    Args:
      name: A name as for :func:`load`; a path that ends in .npz needs only the arrays
        test_images and test_labels (or Keras' x_test, y_test).
      data_dir: The folder of prepared TFDS data; None for TFDS's default. A file is
        read from its path.
      cache_dir: The folder of decoded images; None for the default of :func:`load`.
      download: True to let TFDS download and prepare a missing set.
      in_memory: False to leave images in their files, as in :func:`load`.

    Returns:
      (split, num_classes): a `Split` of checked images and labels, and C. For an .npz
      file that does not say it C is the largest label plus one.

    Raises:
      ImportError, FileNotFoundError, ValueError, TypeError: The errors of :func:`load`.

    Example:
      >>> split, num_classes = load_test("digits")
      >>> split.images.shape, num_classes
      ((360, 8, 8, 1), 10)
    """
    _refuse_folder(name)
    text = os.fspath(name)
    if (found := _file_or_digits(text)) is not None:
        return found[:2]
    test, class_names = prepared.read(
        text,
        test_only=True,
        data_dir=data_dir,
        cache_dir=cache_dir,
        download=download,
        in_memory=in_memory,
    )
    return check_split(test, class_names and len(class_names), "test")


def _file_or_digits(text):
    """A test split, C and the classes' names; None for a name of TFDS."""
    if text == "digits":
        return *check_split(_digits()[1], 10, "test"), None
    if not text.endswith(".npz"):
        return None
    # Its path and no other: data_dir says where the data of a run are, and this is
    # another set.
    splits, saved = npz.splits_of(pathlib.Path(text).expanduser(), "test")
    split, num_classes = check_split(
        splits["test"],
        saved.get("num_classes"),
        "test",
        stated_channels(saved.get("mean"), saved.get("std")),
    )
    return split, num_classes, check_class_names(saved.get("class_names"), num_classes)


class TestInfo(NamedTuple):
    """The result of :func:`describe_test`.

    Attributes:
      num_examples: N, the number of examples.
      image_shape: (H, W, C); None for sizes that the metadata do not have.
      num_classes: C; for an .npz file that does not say it the largest label plus one.
      dtype: The dtype of the images: uint8, or float32 for any floats.
      class_names: C texts, or None where they are not known.
    """

    num_examples: int
    image_shape: tuple[int | None, ...]
    num_classes: int
    dtype: np.dtype
    class_names: tuple[str, ...] | None


def describe_test(
    name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None
) -> TestInfo:
    """Describes what :func:`load_test` would load, without decoding a TFDS set.

    Args:
      name: A name as for :func:`load_test`.
      data_dir: The folder of prepared TFDS data; None for TFDS's default. A file is
        read from its path.

    Returns:
      A :class:`TestInfo`.

    Raises:
      ImportError, FileNotFoundError, ValueError, TypeError: The set is not there or
        cannot be read.

    Example:
      >>> describe_test("digits")[:3]
      (360, (8, 8, 1), 10)
    """
    _refuse_folder(name)
    text = os.fspath(name)
    if (found := _file_or_digits(text)) is not None:
        (images, _), num_classes, names = found
        return TestInfo(len(images), images.shape[1:], num_classes, images.dtype, names)
    info = TestInfo(*prepared.describe_test(text, data_dir=data_dir))
    if np.issubdtype(info.dtype, np.floating):
        info = info._replace(dtype=np.dtype(np.float32))
    return info


def _digits() -> tuple[Split, Split]:
    images, labels = _sklearn_digits()
    images = np.round(images * (255 / 16)).astype(np.uint8)[..., None]
    labels = labels.astype(np.int32)
    # A fifth, with a fixed seed: the same test set whatever the run's own seed.
    in_test = stratified_choice(labels, 360, np.random.default_rng(0))
    return (
        Split(images[~in_test], labels[~in_test]),
        Split(images[in_test], labels[in_test]),
    )


def _refuse_folder(name: str | os.PathLike) -> None:
    if is_folder(name):
        raise ValueError(
            f"a folder of images, as {os.fspath(name)!r}, cannot be a set to test on "
            "alone, since it does not say to which size. Write it to a file: "
            "data.save(data.from_folder(folder, size=...), 'other.npz')."
        )


def folder_path(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Where the folder is: at its path, or where it has been moved."""
    path = pathlib.Path(name).expanduser()
    if data_dir is None:
        return path
    moved = pathlib.Path(data_dir).expanduser()
    return there if (there := moved / path.name).is_dir() else moved


def _sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads scikit-learn's digits: (1797, 8, 8) images of 0 to 16, and their labels.

    Its file is read where it is found, because to import scikit-learn takes a second.
    """
    try:
        found = importlib.util.find_spec("sklearn")
    except ImportError:
        found = None
    if found is None:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed. "
            + extras.command("data")
        )
    for folder in found.submodule_search_locations or ():
        file = pathlib.Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            rows = np.loadtxt(file, delimiter=",")  # 64 pixels and the label
            return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target
