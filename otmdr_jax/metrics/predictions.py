"""The input of a metric: probabilities and labels, checked once.

No metric copies the whole set to float64: it takes a block of rows, or eight columns,
at a time, so that a set may fill a large part of the memory.
"""

import functools
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

Array = Any
T = TypeVar("T")

# Softmax in float32 over 1,000 classes is off by 1e-6. 1e-3 accepts that and numbers
# rounded to three digits, and refuses what is not a distribution.
TOLERANCE = 1e-3

# 2 MiB in float64, so that a block's second pass finds it in a core's cache.
_BLOCK = 2**18
_COLUMNS = 8
# Logarithms above -1e-6 have at most three bits in float32.
_ROUNDED = 1e-6
# Smaller sets take less time than starting threads.
_THREADED = 2**22


class Predictions:
    """Checked probabilities and labels, the result of :func:`check`.

    Every metric takes it in place of `probs`, together with its `labels`, so that many
    metrics of one set check it once.

    Attributes:
      labels: (N,) integers in 0..C-1.
      shape: (N, C).
      size: The number N C.
      predicted: (N,) most probable classes, the first one among tied ones.
      confidence: (N,) probabilities of these classes.
      log_of_label: (N,) log-probabilities of the labels, -inf at probability 0.
      log: Whether logarithms were given. They rank what underflows to equal
        probabilities.
      confidence_key: (N,) numbers that rank examples by confidence: its logarithm if
        logarithms were given. Close to 0, where float32 rounds it, it is what the other
        classes leave.
      samples: (S, N, C) the samples as they were given, None of a single prediction.
    """

    def __init__(
        self,
        values: np.ndarray,
        labels: np.ndarray,
        log_probs: bool,
        allowed: float,
        samples: np.ndarray | None,
    ):
        """Checks all rows: see :func:`check`."""
        self.labels = labels
        self.shape = values.shape
        self.size = values.size
        self.log = log_probs
        self.samples = samples
        self._values = values
        self._allowed = allowed
        found = parallel(self._check_rows, self._blocks(), values.size)
        predicted, highest, of_label = zip(*found, strict=True)
        self.predicted = np.concatenate(predicted)
        # exp(log_softmax) of a certain prediction can exceed 1 by a rounding error.
        self.confidence_key = np.minimum(
            np.concatenate(highest), 0.0 if log_probs else 1.0
        )
        self.confidence = (
            np.exp(self.confidence_key) if log_probs else self.confidence_key
        )
        self.log_of_label = np.concatenate(of_label)

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """(N,) bools: whether the most probable class is the label."""
        return self.predicted == self.labels

    def rows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields blocks of rows and their probabilities in float64."""
        for rows in self._blocks():
            yield rows, self._probs(self._values[rows].astype(np.float64))

    def sorted_rows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields :meth:`rows` with ascending probabilities of each row.

        They are the same to the bit in whatever order classes and samples come.
        """
        for rows, block in self.rows():
            yield rows, np.sort(block, axis=1)

    def rows_of_samples(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields blocks of rows and their samples' probabilities (S, rows, C)."""
        assert self.samples is not None
        for rows in self._blocks(len(self.samples)):
            yield rows, self._probs(self.samples[:, rows].astype(np.float64))

    def keys(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields blocks of rows and what ranks their classes, in float64.

        That is the logarithms if they were given, since probabilities underflow.
        """
        for rows in self._blocks():
            yield rows, self._values[rows].astype(np.float64)

    def columns(self) -> Iterator[slice]:
        """Yields blocks of classes, for :meth:`of_classes`."""
        for start in range(0, self.shape[1], _COLUMNS):
            yield slice(start, min(start + _COLUMNS, self.shape[1]))

    def of_classes(self, classes: slice) -> np.ndarray:
        """(classes, N) :meth:`keys` in float64, each class contiguous."""
        columns = np.array(self._values[:, classes].T, np.float64, order="C")
        if self.log:
            for c, column in enumerate(columns, classes.start):
                highest = self.predicted == c
                column[highest] = self.confidence_key[highest]
        return np.minimum(columns, 0.0 if self.log else 1.0, out=columns)

    def _probs(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # logits: no distribution, which is said
            return np.exp(values, out=values) if self.log else values

    def _blocks(self, samples: int = 1) -> Iterator[slice]:
        size = max(1, _BLOCK // (samples * self.shape[1]))
        return (slice(i, i + size) for i in range(0, self.shape[0], size))

    def _check_rows(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values = self._values[rows].astype(np.float64)
        every = np.arange(len(values))
        predicted = values.argmax(axis=1)  # of the logarithms, where they are given
        highest = values[every, predicted]
        of_label = values[every, self.labels[rows]]
        probs = self._probs(values)
        _refuse(probs, self._values, rows, self.log, self._allowed)
        if self.log:
            sure = np.flatnonzero(highest > -_ROUNDED)
            probs[sure, predicted[sure]] = 0.0
            # Sorted, so that the order of classes does not decide ties.
            highest[sure] = -np.sort(probs[sure], axis=1).sum(axis=1)
        else:
            with np.errstate(divide="ignore"):
                of_label = np.log(of_label)
        return predicted, highest, of_label


def check(probs: Array, labels: Array, *, log_probs: bool = False) -> Predictions:
    """Checks predictions and labels.

    Args:
      probs: (N, C) probabilities of C >= 2 classes in any floating dtype, or samples
        (S, N, C), whose mean probability counts and each of which is checked.
        :class:`Predictions` are returned unchanged.
      labels: (N,) integers in 0..C-1.
      log_probs: True if `probs` are logarithms of probabilities.

    Returns:
      :class:`Predictions`, which every metric takes.

    Raises:
      ValueError: The shape is another, the set is empty, there is a single class, NaN
        or a negative number, rows do not sum to 1 within 1e-3 (logits, for example; in
        float16 and bfloat16 within 0.004 and 0.03, four times their precision), or
        labels are out of range. The message says what is wrong.
      TypeError: Labels are not integers, or predictions are not numbers.

    Example:
      >>> from otmdr_jax import metrics
      >>> p = metrics.check([[0.9, 0.1], [0.6, 0.4]], [0, 1])
      >>> metrics.accuracy(p, p.labels), round(metrics.brier(p, p.labels), 2)
      (0.5, 0.37)
    """
    if isinstance(probs, Predictions):
        if labels is not probs.labels and not np.array_equal(labels, probs.labels):
            raise ValueError(
                "checked predictions come with their labels, but got others: give "
                "`p.labels`, or check the predictions with the labels that you mean."
            )
        return probs
    name = "log_probs" if log_probs else "probs"
    numbers = _numbers(probs, name)
    allowed = tolerance(np.asarray(probs).dtype)
    samples = numbers if numbers.ndim == 3 and len(numbers) else None
    values = numbers if samples is None else mean_of_samples(samples, log_probs)
    labels = check_labels(labels, values, np.shape(probs), name)
    for index in range(0 if samples is None else len(samples)):
        check_sample(numbers[index], log_probs, allowed, f" of sample {index}")
    return Predictions(values, labels, log_probs, allowed, samples)


def tolerance(dtype: Any) -> float:
    """The distance from 1 that sums of probabilities of this dtype may have."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    return max(TOLERANCE, 4 * float(jnp.finfo(dtype).eps)) if floating else TOLERANCE


def check_sample(
    values: np.ndarray, log_probs: bool, allowed: float, of: str = ""
) -> None:
    """Raises ValueError unless each row of (N, C) values is a distribution."""
    size = max(1, _BLOCK // values.shape[1])
    for start in range(0, len(values), size):
        rows = slice(start, start + size)
        block = values[rows].astype(np.float64)
        with np.errstate(over="ignore"):
            probs = np.exp(block, out=block) if log_probs else block
        _refuse(probs, values, rows, log_probs, allowed, of)


def check_labels(
    labels: Array, values: np.ndarray, shape: tuple[int, ...], name: str
) -> np.ndarray:
    """Checks that labels (N,) are classes of values (N, C); `shape` is the input's."""
    labels = unmasked(labels)
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise ValueError(
            f"need {name} of shape (N, C), or samples (S, N, C), and labels of shape "
            f"(N,), got {shape} and {labels.shape}. Labels are class numbers: take "
            "argmax of one-hot ones."
        )
    count, classes = values.shape
    if not count:
        raise ValueError(f"an empty set has no {name}: got N = 0.")
    if classes < 2:
        raise ValueError(
            f"need {name} of at least two classes, got C = {classes}. Give both "
            "probabilities of a binary classifier: np.stack([1 - p, p], axis=1)."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie in 0..{classes - 1} for {classes} classes, got "
            f"{labels.min()}..{labels.max()}."
        )
    return labels


def check_unlabelled(probs: Array) -> Predictions:
    """Like :func:`check`, for measures that need no labels."""
    if isinstance(probs, Predictions):
        return probs
    count = np.shape(probs)[-2] if np.ndim(probs) >= 2 else 0
    return check(probs, np.zeros(count, int))


def generator(seed: int) -> np.random.Generator:
    """NumPy's generator of a seed, which is refused outside of 0..2**32 - 1."""
    if not 0 <= operator.index(seed) < 2**32:
        raise ValueError(f"seed must lie in 0..2**32 - 1, got {seed}.")
    return np.random.default_rng(seed)


class Ranked(NamedTuple):
    """Scores in ascending order and the positives among them.

    Scores are probabilities, or logarithms where those are given.

    Attributes:
      ordered: (n,) scores in ascending order.
      of_positives: Ascending scores of the positives.
      probs: (n,) probabilities in ascending order.
    """

    ordered: np.ndarray
    of_positives: np.ndarray
    probs: np.ndarray

    def positives_before(self, bounds: np.ndarray) -> np.ndarray:
        """The number of positives among the first `bound` examples, for each bound.

        Equal scores must be on one side of a bound, or it would matter which comes
        first.
        """
        end = bounds >= len(self.ordered)
        scores = self.ordered[np.where(end, 0, bounds)]
        before = np.searchsorted(self.of_positives, scores)
        return np.where(end, len(self.of_positives), before)


# A measure of a class.
Measure = Callable[[Ranked], Any]


def rank(scores: np.ndarray, positive: np.ndarray, *, log: bool = False) -> Ranked:
    """Sorts probabilities or their logarithms: see :class:`Ranked`."""
    ordered = probs = np.sort(scores)
    if log:  # the last bit of exp may be out of order; to sort what is sorted is fast
        probs = np.sort(np.exp(ordered), kind="stable")
    return Ranked(ordered, np.sort(scores[positive]), probs)


def per_class(p: Predictions, *measures: Measure) -> list[np.ndarray]:
    """Measures each class, with its probabilities ranked and its examples as positives.

    One sort of a class serves all measures.

    Args:
      p: Checked predictions.
      *measures: Functions from a class's :class:`Ranked` to one or several numbers.

    Returns:
      For each measure an array with a leading axis of classes.
    """

    def of_block(classes: slice) -> list[list[Any]]:
        columns = p.of_classes(classes)
        ranked = (
            rank(columns[i], p.labels == c, log=p.log)
            for i, c in enumerate(range(classes.start, classes.stop))
        )
        return [[measure(x) for measure in measures] for x in ranked]

    blocks = parallel(of_block, p.columns(), p.size)
    rows = [row for block in blocks for row in block]
    return [np.array(column) for column in zip(*rows, strict=True)]


def parallel(function: Callable[[Any], T], items: Iterable[Any], size: int) -> list[T]:
    """`map`, in two threads if there is enough to do.

    NumPy's loops release the GIL. More threads would wait for memory, since each holds
    a block.
    """
    if size < _THREADED or (os.cpu_count() or 1) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def unmasked(values: Array) -> np.ndarray:
    """An array; masked ones whose mask hides something are refused."""
    if np.ma.is_masked(values):  # an array of them would hold what the mask hides
        raise TypeError(
            "masked entries are no predictions and no labels: leave their examples out."
        )
    return np.asarray(values)


def _numbers(probs: Array, name: str) -> np.ndarray:
    values = unmasked(probs)
    if values.dtype.kind in "biu":
        return values.astype(np.float64)
    if values.dtype.kind == "V":  # bfloat16 and float8, exact in float32
        return values.astype(np.float32)
    if values.dtype.kind != "f":
        raise TypeError(f"{name} must be real numbers, got dtype {values.dtype}.")
    return values


def mean_of_samples(samples: np.ndarray, log_probs: bool) -> np.ndarray:
    """The mean probability, or its logarithm: (S, N, C) -> (N, C) in float64.

    It is the same to the bit in whatever order samples come: else rounding would rank
    examples, or classes, whose samples are equal but for their order.
    """
    found = np.empty(samples.shape[1:])

    def fill(rows: slice) -> None:
        block = samples[:, rows].astype(np.float64)
        block.sort(axis=0)
        if not log_probs:
            found[rows] = block.mean(axis=0)
            return
        highest = block[-1].copy()
        highest[np.isneginf(highest)] = 0.0
        # What is not a number is refused by whoever checks the samples.
        with np.errstate(divide="ignore", invalid="ignore"):
            block -= highest
            found[rows] = np.log(np.exp(block, out=block).mean(axis=0)) + highest

    size = max(1, _BLOCK // max(1, len(samples) * samples.shape[2]))
    starts = range(0, samples.shape[1], size)
    parallel(fill, (slice(i, i + size) for i in starts), samples.size)
    return found


def _refuse(
    probs: np.ndarray,
    values: np.ndarray,
    rows: slice,
    log_probs: bool,
    allowed: float,
    of: str = "",
) -> None:
    """Raises ValueError unless rows of values, as probs, are distributions."""
    # Numbers that are not negative and sum to 1 are not above 1.
    bad = ~(np.abs(probs.sum(axis=1) - 1.0) <= allowed) | ~(probs.min(axis=1) >= 0.0)
    if bad.any():
        row = rows.start + int(np.argmax(bad))
        raise ValueError(_what_is_wrong(values[row], f"{row}{of}", log_probs))


def _what_is_wrong(row: np.ndarray, index: str, log_probs: bool) -> str:
    row = row.astype(np.float64)
    shown = np.array2string(row[:6], precision=4, separator=", ")
    shown = shown if len(row) <= 6 else f"{shown[:-1]}, ...]"
    if np.isnan(row).any():
        return (
            f"predictions must be numbers: row {index} holds NaN ({shown}). The model "
            "may have diverged; leave such rows out, or measure an earlier state."
        )
    with np.errstate(over="ignore"):
        total = float(np.exp(row).sum())
    if log_probs:
        return (
            "log_probs must be logarithms of probabilities that sum to 1 over classes; "
            f"those of row {index} sum to {total:.6g} ({shown}). Apply "
            "jax.nn.log_softmax to logits."
        )
    problem = (
        f"probs must be probabilities that sum to 1 over classes, but row {index} is "
        f"{shown}"
    )
    if row.max() <= 0.0 and abs(total - 1.0) <= TOLERANCE:
        return f"{problem}: log-probabilities? Give np.exp of them."
    if row.min() < 0.0 or row.max() > 1.0 + TOLERANCE:
        return f"{problem}: logits? Apply jax.nn.softmax to them."
    return f"{problem}, which sums to {row.sum():.6g}. Divide rows by their sums."
