"""Batches of a loader as training data: Grain, tf.data, PyTorch, or any iterable.

The loader reads, shuffles and augments; training takes its batches as they come, read
ahead by a thread. Nothing but a batch is held in memory.
"""

import collections
import concurrent.futures
import inspect
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from otmdr_jax.data.checks import (
    check_agreement,
    check_class_names,
    check_classes,
    check_pair,
    plain,
)
from otmdr_jax.data.dataset import Dataset, Split, check_augmentations
from otmdr_jax.data.statistics import check_statistics
from otmdr_jax.io.progress import Progress

# The names under which a batch that is a dictionary has its images and labels.
_KEYS = (("image", "label"), ("images", "labels"))
_PREFETCH = 4  # batches that are held ready


class Loader:
    """The training data of :func:`from_batches`: what stands for its training `Split`.

    It has the number of examples that a split has. It has no arrays: whatever asks for
    these is told so.

    Args:
      start: A function of the epoch's number that returns an iterator of batches.
      like: A batch as all must be: (B, H, W, C) images and (B,) labels.
      num_classes: C; labels are in 0..C-1.
      steps_per_epoch: The number of batches of an epoch.

    Attributes:
      batch_size: B.
      steps_per_epoch: The number of batches of an epoch.
    """

    def __init__(
        self,
        start: Callable[[int], Iterator[Any]],
        like: Split,
        num_classes: int,
        steps_per_epoch: int,
    ):
        self._start, self._num_classes = start, num_classes
        self._shape, self._dtype = like.images.shape, like.images.dtype
        self.batch_size, self.steps_per_epoch = self._shape[0], steps_per_epoch

    @property
    def num_examples(self) -> int:
        """The number of examples of an epoch, all in whole batches."""
        return self.batch_size * self.steps_per_epoch

    def epoch(self, number: int, skip: int = 0) -> Generator[Split]:
        """Reads the batches of an epoch anew, each checked.

        Args:
          number: The number of the epoch, from 0.
          skip: So many batches are read and not given.

        Yields:
          Images (B, H, W, C) and labels (B,) int32, copies that nobody else writes to.

        Raises:
          ValueError, TypeError: A batch is not like the first, or there are too few.
        """
        batches = itertools.islice(self._start(number), self.steps_per_epoch)
        count = 0
        for batch in batches:
            if count >= skip:
                yield self._checked(batch, f"batch {count} of epoch {number}")
            count += 1
        if count < self.steps_per_epoch:
            raise ValueError(
                f"each epoch of the loader must have {self.steps_per_epoch} batches, "
                f"and epoch {number} ended after {count}. Give the number of the "
                "smallest one as steps_per_epoch."
            )

    def first(self, count: int) -> Split:
        """The first examples of epoch 0, at most all of them, in memory."""
        batches = -(-min(count, self.num_examples) // self.batch_size)
        read = list(itertools.islice(self.epoch(0), batches))
        images, labels = (np.concatenate(x)[:count] for x in zip(*read, strict=True))
        return Split(images, labels)

    def stream(self, start_step: int, total_steps: int) -> "Stream":
        """The batches of a run's steps, from one on, read ahead."""
        return Stream(self, start_step, total_steps)

    def _checked(self, batch: Any, name: str) -> Split:
        images, labels = _arrays(batch, name, self._shape[-1])
        if len(labels) != self.batch_size:
            raise ValueError(
                f"each batch must have {self.batch_size} examples, as the first, and "
                f"{name} has {len(labels)}. Let the loader drop the last batch where "
                "it has fewer, or count whole batches alone in steps_per_epoch."
            )
        if images.shape != self._shape or images.dtype != self._dtype:
            raise ValueError(
                f"each batch must have images {self._shape} {self._dtype}, as the "
                f"first, and {name} has {images.shape} {images.dtype}."
            )
        check_classes({name: labels}, self._num_classes)
        # A loader may fill the same memory again while these wait for their step.
        return Split(np.array(images), labels.astype(np.int32))

    @property
    def images(self) -> Any:
        """A ValueError: there are none in memory."""
        raise _none()

    @property
    def labels(self) -> Any:
        """A ValueError: there are none in memory."""
        raise _none()

    def __iter__(self) -> Iterator[Any]:
        raise _none()


def _none() -> ValueError:
    return ValueError(
        "the training data are batches of a loader (data.from_batches), of which none "
        "are kept, and this needs all of them in memory: give the data as arrays "
        "(data.from_arrays), or do it with the test or the validation set."
    )


class Stream:
    """An iterator over the batches of a run, which a thread reads ahead.

    It reads ahead within an epoch alone. Between two epochs nothing reads, so that an
    evaluation may read the loader from its start: some loaders have one iterator only.
    """

    def __init__(self, loader: Loader, step: int, total_steps: int):
        self._loader, self._step, self._total = loader, step, total_steps
        self._pool: Any = None
        self._ready: collections.deque[concurrent.futures.Future] = collections.deque()

    def __next__(self) -> Split:
        if self._step == self._total:
            raise StopIteration
        if self._pool is None:
            epoch, skip = divmod(self._step, self._loader.steps_per_epoch)
            self._batches = self._loader.epoch(epoch, skip)
            self._pool = concurrent.futures.ThreadPoolExecutor(1)
            self._ready.extend(self._reading() for _ in range(_PREFETCH))
        batch = self._ready.popleft().result()
        self._ready.append(self._reading())
        self._step += 1
        if self._step == self._total or not self._step % self._loader.steps_per_epoch:
            self.close()
        return batch

    def _reading(self) -> concurrent.futures.Future:
        return self._pool.submit(next, self._batches, None)

    def close(self) -> None:
        """Ends the thread, after the batch that it reads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._batches.close()
        self._pool = None
        self._ready.clear()


def from_batches(
    train: Iterable[Any] | Callable[..., Iterable[Any]],
    test: Iterable[Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    validation: Iterable[Any] | None = None,
    steps_per_epoch: int | None = None,
    augment: Sequence[str] = (),
    name: str = "batches",
) -> Dataset:
    """Makes a dataset of a loader's batches: of Grain, tf.data, PyTorch or your own.

    A batch is a pair (images, labels), or a dictionary of "image" and "label" or of
    "images" and "labels": NumPy arrays, tensors of PyTorch or TensorFlow, or whatever
    else `np.asarray` takes. Images are (B, H, W, C), uint8 or floats, and labels (B,)
    integers in 0..C-1. All batches have the size of the first, which a run's batch_size
    must name, but for the last of an epoch, which is skipped where it has fewer. The
    loader shuffles and augments.

    The training batches are streamed: a thread reads them ahead, each is checked, and
    none is kept. Each epoch iterates over the loader anew. A run that goes on from the
    middle of an epoch reads and drops the batches before; it ends with the same bits as
    one that was not stopped if the loader gives an epoch the same batches again. For
    that, give a function of the epoch's number, or a loader that has `set_epoch`, by
    itself or on its `sampler`, as PyTorch's distributed one: it is called before each
    epoch.

    What needs all training images at once is refused: `member_data="own"`, and an
    evaluation on the training set. Sharpness is measured on the first 2,000 examples of
    the loader; BatchNorm of averaged weights and Laplace approximations read it once.

    Args:
      train: An iterable of batches that can be iterated over again, or a function that
        returns one, of no argument or of the epoch's number, from 0.
      test: An iterable of batches, read once into memory; a pair of arrays is one.
      mean: The mean of each channel, on the [0, 1] scale for uint8 images; 0 each for
        images that the loader has normalised. It must be given, since a run is only
        resumed with the same.
      std: The standard deviation of each channel; 1 each for normalised images.
      num_classes: C. None takes the number of `class_names`; one of both is needed.
      class_names: What the classes are called, C texts. Default: not known.
      validation: As `test`, or None for no validation set.
      steps_per_epoch: The number of batches of an epoch. None counts the whole ones of
        a loader that has a length, by reading it once. An epoch of a longer loader ends
        after so many.
      augment: Names of augmentations after the loader's own, on the device. Default
        none.
      name: A name for the dataset.

    Returns:
      A `Dataset` whose `train` is a :class:`Loader`.

    Raises:
      ValueError: A batch or an argument is not as above; the message says what must
        hold, what came and what to do.
      TypeError: A dtype is not as above.

    Example:
      >>> import numpy as np
      >>> def read(epoch):
      ...     rng = np.random.default_rng(epoch)
      ...     for _ in range(10):
      ...         labels = rng.integers(0, 2, 4)
      ...         yield labels[:, None, None, None] * np.ones((4, 8, 8, 1)), labels
      >>> test = (np.zeros((6, 8, 8, 1)), np.zeros(6, int))
      >>> from_batches(
      ...     read, test, mean=(0.5,), std=(0.5,), num_classes=2, steps_per_epoch=10
      ... )
      Dataset('batches': 40 train, 6 test, 8x8x1 float32, 2 classes)
    """
    if num_classes is None and class_names is None:
        raise ValueError(
            "num_classes or class_names must be given: a loader is not read for them."
        )
    start, channels = _starter(train), np.size(mean)
    first = "the first training batch"
    images, seen = _arrays(next(start(0), None), first, channels)
    like = Split(images, seen)
    held = {"test": _whole(test, "test", channels)}
    if validation is not None:
        held["validation"] = _whole(validation, "validation", channels)
    for split, (images, _) in held.items():
        check_agreement(like.images, images, split)
    classes = len(class_names or ()) if num_classes is None else num_classes
    labels = {first: seen, **{split: own for split, (_, own) in held.items()}}
    classes = check_classes(labels, classes)
    mean, std = check_statistics(like.images, mean, std)
    names = check_class_names(class_names, classes)
    augment = check_augmentations(augment)
    if steps_per_epoch is None:
        steps_per_epoch = _count(train, start, len(like.labels), channels)
    elif isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int):
        raise ValueError(f"steps_per_epoch must be an int, got {steps_per_epoch!r}.")
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}.")
    splits = {split: Split(x, y.astype(np.int32)) for split, (x, y) in held.items()}
    return Dataset(
        name=name,
        train=Loader(start, like, classes, steps_per_epoch),
        validation=splits.get("validation"),
        test=splits["test"],
        num_classes=classes,
        mean=mean,
        std=std,
        augment=augment,
        class_names=names,
    )


def _starter(train: Any) -> Callable[[int], Iterator[Any]]:
    """A function of the epoch's number that begins to read it."""
    if isinstance(train, Iterator):
        raise ValueError(
            f"train must be read anew each epoch, and a {type(train).__name__} can be "
            "read once: give what makes it, a loader or a function."
        )
    if hasattr(train, "__iter__") or hasattr(train, "__getitem__"):
        owners: tuple[Any, ...] = (train, getattr(train, "sampler", None))
        told = [x.set_epoch for x in owners if hasattr(x, "set_epoch")]

        def start(epoch):
            for tell in told[:1]:
                tell(epoch)
            return iter(train)

        return start
    if not callable(train):
        raise ValueError(
            "train must be an iterable of batches, or a function that returns one, got "
            f"a {type(train).__name__}."
        )
    takes = inspect.signature(train).parameters.values()
    if any(x.default is x.empty and x.kind != x.VAR_KEYWORD for x in takes):
        return lambda epoch: iter(train(epoch))
    return lambda epoch: iter(train())


def _arrays(batch: Any, name: str, channels: int | None = None) -> tuple[Any, Any]:
    """Images (B, H, W, C) and labels (B,) of a batch of any kind, checked."""
    pair = batch
    if isinstance(batch, Mapping):
        found = [keys for keys in _KEYS if set(keys) <= set(batch)]
        pair = tuple(batch[key] for key in found[0]) if found else None
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        what = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            what = f"a dictionary of {', '.join(map(str, batch))}"
        elif isinstance(batch, tuple | list):
            what += f" of {len(batch)}"
        raise ValueError(
            f"{name} must be a pair (images, labels), or a dictionary of "
            f'"image" and "label", got {what if batch is not None else "nothing"}.'
        )
    try:
        images, labels = (plain(x, name) for x in pair)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be what NumPy makes arrays of, and it is not: {error}"
        ) from error
    return check_pair((images, labels), name, channels)


def _whole(batches: Any, split: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split that is read into memory."""
    if (
        isinstance(batches, tuple)
        and len(batches) == 2
        and hasattr(batches[0], "shape")
    ):
        batches = [batches]
    read = []
    for i, batch in enumerate(batches() if callable(batches) else batches):
        images, labels = _arrays(batch, f"{split} batch {i}", channels)
        read.append((np.array(images), np.array(labels)))
    if not read:
        raise ValueError(
            f"{split} must have batches, and it is empty. A generator can be read once."
        )
    shapes = sorted({images.shape[1:] for images, _ in read})
    if len(shapes) > 1:
        raise ValueError(f"{split} images must have one shape, got {shapes}.")
    images, labels = (np.concatenate(x) for x in zip(*read, strict=True))
    return images, labels


def _count(
    train: Any, start: Callable[[int], Iterator[Any]], size: int, channels: int
) -> int:
    """The number of whole batches of a loader that ends."""
    try:
        length = len(train)
    except TypeError:
        length = sys.maxsize
    if length >= sys.maxsize:  # what Grain says of a loader without an end
        raise ValueError(
            "steps_per_epoch must be given for a loader whose length is not known, got "
            f"None for a {type(train).__name__}."
        )
    whole = 0
    with Progress(length, 0, "counting batches", unit="batches") as bar:
        for i, batch in enumerate(start(0)):
            if whole < i:
                raise ValueError(
                    f"each batch must have {size} examples, as the first, but the last "
                    f"one, and batch {i - 1} is neither."
                )
            _, labels = _arrays(batch, f"batch {i} of epoch 0", channels)
            whole += len(labels) == size
            bar.update(i + 1)
    return whole
