"""A dataset in memory: checked arrays, a stratified validation split, label noise.

Every source ends in `from_arrays`, so every dataset passes the same checks. Validation
and label noise draw from separate streams of one seed: asking for noise does not move
the validation split, and test and validation labels are always the original ones.
"""

import dataclasses
import numbers
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from otmdr_jax.data.checks import (
    check_agreement,
    check_class_names,
    check_classes,
    check_pair,
    check_trained,
    stated_channels,
)
from otmdr_jax.data.statistics import check_statistics

if TYPE_CHECKING:
    from otmdr_jax.data.loader import Loader

AUGMENTATIONS = ("crop", "flip")

# Streams of the one seed: independent, and stable when another one is added. The third
# is that of measure/shift.
_VALIDATION_STREAM, _NOISE_STREAM, _TEST_STREAM = 0, 1, 3
_SUBSET_STREAMS = {"train": 4, "test": 5}

# The part of a training set that is left to test on where there is no test set.
_TEST_SHARE = 0.2


class Split(NamedTuple):
    """Images and labels of one split; a pytree, so `jax.device_put` takes it whole.

    Attributes:
      images: (N, H, W, C), uint8 in 0..255 or float32; `LazyImages` where they do not
        fit in memory, which no device takes.
      labels: (N,) int32 in 0..num_classes-1.
    """

    # Any is for LazyImages: a batch is a Split too, and its images are an array.
    images: np.ndarray | jax.Array | Any
    labels: np.ndarray | jax.Array

    @property
    def num_examples(self) -> int:
        """N; `len()` of this tuple is 2, its number of fields."""
        return self.labels.shape[0]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Train, validation and test splits with what a training loop needs to know.

    Attributes:
      name: The origin of the data.
      train: The training split; a `Loader` of :func:`otmdr_jax.data.from_batches`.
      validation: A stratified part held out of the training data, or None.
      test: The test split.
      num_classes: C, the number of classes; 0 where targets are no class numbers, as
        :func:`otmdr_jax.data.from_targets` makes them.
      mean: C_in floats, the channel means; on the [0, 1] scale for uint8 images.
      std: C_in floats, the channel standard deviations on the same scale, all > 0.
      augment: Names of the training augmentations that are standard for this set, for
        `augment`; () if there are none.
      class_names: C texts, what the classes are called; None where that is not known.
    """

    name: str
    train: "Split | Loader"
    validation: Split | None
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of one image; the shape of one input where inputs are no images."""
        return tuple(self.test.images.shape[1:])

    def __repr__(self) -> str:
        """One line with sizes; the arrays themselves would fill the screen."""
        held_out = (
            f", {self.validation.num_examples} validation" if self.validation else ""
        )
        shape = "x".join(map(str, self.image_shape))
        return (
            f"Dataset({self.name!r}: {self.train.num_examples} train{held_out}, "
            f"{self.test.num_examples} test, {shape} {self.test.images.dtype}, "
            f"{self.num_classes or 'no'} classes)"
        )


def from_arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any] | None = None,
    num_classes: int | None = None,
    name: str = "arrays",
    validation: int | float | tuple[Any, Any] = 0,
    label_noise: float = 0.0,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Makes a dataset of arrays, after checking them.

    Args:
      train: (images, labels). Images are (N, H, W, C), or (N, H, W) for one channel,
        of dtype uint8 (0..255) or a float dtype (any finite scale; kept as float32).
        `LazyImages` stay lazy. Labels are integers 0..C-1 of shape (N,) or (N, 1).
      test: Images and labels of the test split, with the image shape and dtype of
        `train`. None leaves a fifth of `train` to test on, stratified by class and
        drawn by `seed`, with a warning.
      num_classes: C; None takes the number of `class_names`. Without these it takes the
        largest label plus one, and refuses labels that skip a class in training.
      name: A name for the dataset.
      validation: Examples to hold out of `train`, stratified by class and drawn by
        `seed`: an int is a count, a float in (0, 1) a fraction. Or the images and
        labels of a validation split of their own. Default 0: none.
      label_noise: The fraction of training labels to replace, `round(fraction * N)` of
        the N that remain after `validation`, each by another class drawn uniformly.
        Test and validation labels stay as they are. Default 0.
      seed: The seed of the validation split and of the label noise, in separate
        streams.
      mean: The mean of each channel, on the [0, 1] scale for uint8 images. None
        computes it in float64 over the training images that remain after `validation`,
        for lazy images over at most 10,000 or 1 GiB of them, evenly spread.
      std: The standard deviation of each channel, computed in the same way; a constant
        channel gets 1, so that it normalises to 0.
      augment: Names of augmentations for training, "crop" and "flip". Default none,
        since it depends on the data whether a flip keeps the label.
      class_names: What the classes are called, C texts. Default: not known.

    Returns:
      The `Dataset`; images of the right dtype are not copied.

    Raises:
      ValueError: An array or an option is not as above, or images look like (N, C, H,
        W); the message says what must hold, what came and what to do.
      TypeError: A dtype is not as above.

    Warns:
      UserWarning: A split has examples of a class that training has none of, where
        `num_classes` is given; there is no test split; float images of two splits seem
        to have two scales.

    Example:
      >>> import numpy as np
      >>> images = np.arange(20 * 4 * 4, dtype=np.uint16).astype(np.uint8)
      >>> images, labels = images.reshape(20, 4, 4), np.arange(20) % 2
      >>> from_arrays((images, labels), (images, labels), validation=4)
      Dataset('arrays': 16 train, 4 validation, 20 test, 4x4x1 uint8, 2 classes)
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a text that is not empty, got {name!r}.")
    channels = stated_channels(mean, std)
    if test is None:
        train, test = leave_test(train, seed, f"dataset {name!r}", channels)
    given = {"train": train, "test": test}
    if isinstance(validation, tuple | list):
        given["validation"], validation = tuple(validation), 0
    pairs = {split: check_pair(x, split, channels) for split, x in given.items()}
    for split in list(pairs)[1:]:
        check_agreement(pairs["train"][0], pairs[split][0], split)
    labels = {split: labels for split, (_, labels) in pairs.items()}
    if class_names is not None and num_classes is None:
        num_classes = len(class_names)
    counted = num_classes is None
    num_classes = check_classes(labels, num_classes)
    check_trained(labels, counted)
    # After the range check: a cast may wrap, and copies keep the caller's labels clean.
    splits = {k: Split(x, y.astype(np.int32)) for k, (x, y) in pairs.items()}
    train_split, held_out = splits["train"], splits.get("validation")
    if count := _validation_count(validation, train_split.num_examples):
        rng = np.random.default_rng([_VALIDATION_STREAM, _seed(seed)])
        chosen = stratified_choice(train_split.labels, count, rng)
        held_out = Split(*(a[chosen] for a in train_split))
        train_split = Split(*(a[~chosen] for a in train_split))
    noise_rng = np.random.default_rng([_NOISE_STREAM, _seed(seed)])
    noisy = _replace_labels(train_split.labels, label_noise, num_classes, noise_rng)
    mean, std = check_statistics(train_split.images, mean, std)
    return Dataset(
        name=name,
        train=Split(train_split.images, noisy),
        validation=held_out,
        test=splits["test"],
        num_classes=num_classes,
        mean=mean,
        std=std,
        augment=check_augmentations(augment),
        class_names=check_class_names(class_names, num_classes),
    )


def subset(
    dataset: Dataset,
    *,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """A dataset with fewer examples to train or to test on, stratified by class.

    Smaller experiments on the same images: five thousand images can be learned by heart
    by a small network in minutes, as fifty thousand by a large one in hours.

    Args:
      dataset: The dataset; its validation split, mean and std stay as they are.
      train: The number of training examples to keep; None keeps all.
      test: The number of test examples to keep; None keeps all.
      seed: The seed that draws them, in a stream of its own for each split.

    Returns:
      The :class:`Dataset`; the examples keep their order.

    Raises:
      ValueError: There are fewer, a class would have none left to train on, or the
        training set is batches of a loader.

    Example:
      >>> from otmdr_jax import data
      >>> data.subset(data.load("digits"), train=100, test=50)
      Dataset('digits': 100 train, 50 test, 8x8x1 uint8, 10 classes)
    """
    changed: dict[str, Any] = {}
    for name, count in (("train", train), ("test", test)):
        if count is None:
            continue
        split = getattr(dataset, name)
        if not isinstance(split, Split):
            raise ValueError(
                "the training set is batches of a loader, of which no part can be "
                "taken: give fewer to the loader."
            )
        if not isinstance(count, numbers.Integral) or not 0 < count:
            raise ValueError(f"{name} must be a number of at least 1, got {count!r}.")
        if count > split.num_examples:
            raise ValueError(
                f"{name}={count}, but there are {split.num_examples} examples in the "
                f"{name} split of {dataset.name!r}: ask for fewer, or leave it out."
            )
        labels = np.asarray(split.labels)
        rng = np.random.default_rng([_SUBSET_STREAMS[name], _seed(seed)])
        # Targets that are no classes have no strata.
        strata = labels if dataset.num_classes else np.zeros(len(labels), int)
        chosen = stratified_choice(strata, int(count), rng)
        lost = np.setdiff1d(strata, strata[chosen])
        if name == "train" and lost.size:
            raise ValueError(
                f"{train=} leaves no example of class {lost[0]}: ask for more."
            )
        changed[name] = Split(*(a[chosen] for a in split))
    return dataclasses.replace(dataset, **changed) if changed else dataset


def check_split(
    pair: tuple[Any, Any],
    num_classes: int | None,
    name: str,
    channels: int | None = None,
) -> tuple[Split, int]:
    """Checks one split by itself and converts it to the dtypes of `from_arrays`.

    Args:
      pair: (images, labels) as `from_arrays` takes them.
      num_classes: C; None takes the largest label plus one.
      name: The split's name in errors.
      channels: The number of channels, where it is known.

    Returns:
      The split and C.

    Raises:
      ValueError, TypeError: The errors of `from_arrays`.
    """
    images, labels = check_pair(pair, name, channels)
    classes = check_classes({name: labels}, num_classes)
    return Split(images, labels.astype(np.int32)), classes


def check_augmentations(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names as a tuple, or raises ValueError with the known ones."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if len(set(names)) < len(names):
        raise ValueError(f"augmentations must be named once, got {names}.")
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise ValueError(
            f"augmentations must be of {AUGMENTATIONS}, got {unknown[0]!r}. Correct "
            "the name, or apply your own function to the images."
        )
    return names


def stratified_choice(labels, count: int, rng: np.random.Generator) -> np.ndarray:
    """Marks `count` of N examples, from each class as equal a share as possible.

    Args:
      labels: (N,) integers.
      count: The number to choose, 0..N.
      rng: The generator that draws the examples of a class.

    Returns:
      (N,) bools, True for chosen examples. Class c gives the floor or the ceiling of
      count * N_c / N; the classes with the largest remainders give the ceiling.
    """
    _, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    # Integers throughout, so that equal remainders tie exactly on every machine.
    quota, remainder = np.divmod(sizes.astype(np.int64) * count, len(labels))
    ties = rng.permutation(len(sizes))
    most_first = ties[np.argsort(-remainder[ties], kind="stable")]
    quota[most_first[: count - quota.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    for index, share in enumerate(quota):
        own = np.flatnonzero(members == index)
        chosen[rng.choice(own, share, replace=False)] = True
    return chosen


def leave_test(
    train: tuple[Any, Any], seed: int, what: str, channels: int | None = None
) -> tuple[Split, Split]:
    """Leaves a stratified part of a training set to test on, and says so.

    Args:
      train: (images, labels), not checked yet.
      seed: The seed that draws the part.
      what: What has no test set, for the warning.
      channels: The number of channels, where it is known.

    Returns:
      The training split and the test split.

    Raises:
      ValueError: A class would have no example left to train on.
    """
    split, _ = check_split(train, None, "train", channels)
    count = max(round(_TEST_SHARE * split.num_examples), 1)
    rng = np.random.default_rng([_TEST_STREAM, _seed(seed)])
    chosen = stratified_choice(split.labels, count, rng)
    if lost := np.setdiff1d(split.labels, split.labels[~chosen]).tolist():
        raise ValueError(
            f"{what} has no test set, and too few training examples to leave some to "
            f"test on: {split.num_examples}, and none would be left of class "
            f"{lost[0]}. Give a test set."
        )
    warnings.warn(
        f"{what} has no test set: {count} of its {split.num_examples} examples, "
        f"stratified by class and drawn by seed={seed}, are left to test on.",
        stacklevel=4,
    )
    return Split(*(a[~chosen] for a in split)), Split(*(a[chosen] for a in split))


def _validation_count(validation: int | float, num_train: int) -> int:
    """The number of examples that `validation` asks for."""
    count = -1
    if isinstance(validation, numbers.Integral) and not isinstance(validation, bool):
        count = int(validation)
    elif isinstance(validation, numbers.Real) and 0.0 <= float(validation) < 1.0:
        count = round(float(validation) * num_train)
    if count == 0 and validation:
        raise ValueError(
            f"{validation=} is less than one of the {num_train} training examples: "
            "give a larger fraction, or leave it out."
        )
    if not 0 <= count < num_train:
        raise ValueError(
            f"validation must be a count in 0..{num_train - 1} or a fraction in "
            f"[0, 1) of the {num_train} training examples, got {validation=}. It must "
            "leave some to train on."
        )
    return count


def _replace_labels(
    labels, fraction: float, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Changes exactly round(fraction * N) of the labels, in place."""
    if not isinstance(fraction, numbers.Real) or not 0.0 <= float(fraction) <= 1.0:
        raise ValueError(
            "label_noise must be a fraction of the training labels in [0, 1], got "
            f"label_noise={fraction!r}. For 20 % pass 0.2."
        )
    count = round(float(fraction) * len(labels))
    if fraction and not count:
        raise ValueError(
            f"label_noise={fraction!r} is less than one of the {len(labels)} training "
            "labels: give a larger fraction, or leave it out."
        )
    if count and num_classes < 2:
        raise ValueError(
            f"label_noise needs another class to change to, got {num_classes=}. "
            "Leave label_noise at 0."
        )
    if count:
        where = rng.choice(len(labels), count, replace=False)
        # A shift by 1..C-1 modulo C is uniform over the other classes.
        shift = rng.integers(1, num_classes, size=count)
        labels[where] = (labels[where] + shift) % num_classes
    return labels


def _seed(seed: int) -> int:
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(
            f"seed must be an int of at least 0, got {seed=}. Pass for example 0."
        )
    return int(seed)
