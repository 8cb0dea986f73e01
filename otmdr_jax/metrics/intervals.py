"""How far chance moves a metric: intervals, and a test of two models on the same set.

Both are about the examples: what another test set of this size might have given. What
another seed of training might have given is another question; for that compare seeds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from otmdr_jax.core.checks import check_count
from otmdr_jax.metrics.predictions import (
    Array,
    Predictions,
    generator,
    tolerance,
    unmasked,
)

NUM_SAMPLES = 1_000
LEVEL = 0.95

Metric = Callable[[Array, Array], float]


class Interval(NamedTuple):
    """A metric and its confidence interval.

    Attributes:
      value: On the set itself.
      low: Lower end.
      high: Upper end.
    """

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two models on the same examples: what :func:`paired_test` gives.

    Attributes:
      difference: Metric of the first less that of the second.
      low: Lower end of the difference's confidence interval.
      high: Upper end.
      p_value: Of no difference, two-sided, at least 1 / (num_samples + 1). All are NaN
        where the difference is: both values are infinite.
    """

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap(
    metric: Metric,
    probs: Array,
    labels: Array,
    *,
    num_samples: int = NUM_SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """A metric's confidence interval by the bootstrap over examples.

    Percentiles of the metric over sets that are drawn from the examples with
    replacement. Resampling adds chance a second time: what chance alone makes positive,
    such as the ECE of a calibrated model, is larger on resampled sets, and its interval
    lies too high. (Efron's BCa corrects for that, at N further evaluations.)

    Args:
      metric: (probs, labels) -> number, such as `metrics.nll`.
      probs: (N, C) predictions, or samples (S, N, C), in the form that the metric
        takes.
      labels: (N,) integers.
      num_samples: How many sets are drawn.
      level: Probability of the interval, in (0, 1).
      seed: The seed of the draws, in 0..2**32 - 1.

    Returns:
      :class:`Interval`.

    Raises:
      ValueError: Fewer than one sample or two examples, a level out of range; what the
        metric raises, on the set or on a resampled one.

    Reference: Efron, `Bootstrap Methods: Another Look at the Jackknife
    <https://doi.org/10.1214/aos/1176344552>`_, 1979.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import metrics
      >>> found = metrics.bootstrap(metrics.accuracy, [[0.9, 0.1]] * 100, [0, 1] * 50)
      >>> found.value, round(found.low, 1), round(found.high, 1)
      (0.5, 0.4, 0.6)
    """
    found = bootstrap_all(
        lambda p, y: {"": metric(p, y)},
        probs,
        labels,
        num_samples=num_samples,
        level=level,
        seed=seed,
    )
    return found[""]


def bootstrap_all(
    measure: Callable[[Array, Array], dict[str, float]],
    probs: Array,
    labels: Array,
    *,
    num_samples: int = NUM_SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """:func:`bootstrap` of several metrics at once, on the same drawn sets.

    Args:
      measure: (probs, labels) -> name -> number, such as `metrics.summary`. What is NaN
        on a drawn set is left out there.
      probs: As in :func:`bootstrap`.
      labels: As in :func:`bootstrap`.
      num_samples: As in :func:`bootstrap`.
      level: As in :func:`bootstrap`.
      seed: As in :func:`bootstrap`.

    Returns:
      Name -> :class:`Interval`.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import metrics
      >>> log_probs = np.log([[0.9, 0.1]] * 100)
      >>> found = metrics.bootstrap_all(metrics.evaluate, log_probs, [0, 1] * 50)
      >>> found["accuracy"].value, list(found)
      (0.5, ['accuracy', 'nll', 'brier', 'ece'])
    """
    probs, labels = _array(probs), unmasked(labels)
    _check(num_samples, level, labels)
    rng = generator(seed)
    values = measure(probs, labels)

    def on_rows(rows: np.ndarray) -> list[float]:
        found = measure(probs[..., rows, :], labels[rows])
        return [found[name] for name in values]

    drawn = _drawn(on_rows, len(labels), num_samples, rng)
    return {
        name: Interval(value, *_ends(own, level))
        for (name, value), own in zip(values.items(), drawn, strict=True)
    }


def paired_test(
    metric: Metric,
    probs: Array,
    other: Array,
    labels: Array,
    *,
    num_samples: int = NUM_SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Comparison:
    """Whether two models differ in a metric on the same examples.

    The p-value is that of a randomisation test: if the models were alike, swapping
    their predictions of an example would change nothing, so each is swapped with
    probability 1/2, and the p-value is the share of such differences that are as large
    as the one that is observed, itself included. It holds for any metric, of any
    distribution, and is exact but for the number of draws. The interval is that of
    :func:`bootstrap`, both models on the same drawn examples.

    Args:
      metric: (probs, labels) -> number.
      probs: (N, C) predictions of the first model, in the form that the metric takes.
      other: (N, C) predictions of the second one for the same examples.
      labels: (N,) integers.
      num_samples: How many sets are drawn, and as many swaps.
      level: Probability of the interval, in (0, 1).
      seed: Of the draws.

    Returns:
      :class:`Comparison`.

    Raises:
      ValueError: Predictions of different shapes or precisions, fewer than one sample
        or two examples, a level out of range.

    Reference: Fisher, 1935; Noreen, 1989; Dietterich, `Approximate Statistical Tests
    for Comparing Supervised Classification Learning Algorithms
    <https://doi.org/10.1162/089976698300017197>`_, 1998.

    Example:
      >>> from otmdr_jax import metrics
      >>> sure, unsure = [[0.9, 0.1]] * 20, [[0.6, 0.4]] * 20
      >>> found = metrics.paired_test(metrics.nll, sure, unsure, [0] * 20)
      >>> round(found.difference, 4), round(found.p_value, 3)
      (-0.4055, 0.001)
    """
    first, second, labels = _array(probs), _array(other), unmasked(labels)
    if first.shape != second.shape:
        raise ValueError(
            "a paired test needs predictions of the same examples, got shapes "
            f"{first.shape} and {second.shape}."
        )
    if tolerance(first.dtype) != tolerance(second.dtype):
        raise ValueError(
            "a paired test swaps the predictions of examples, which needs one dtype, "
            f"got {first.dtype} and {second.dtype}. Give both in float32, with rows "
            "that are normalised there: probs / probs.sum(-1, keepdims=True), and "
            "log-probabilities by jax.nn.log_softmax."
        )

    def gap(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> float:
        return metric(a, y) - metric(b, y)

    _check(num_samples, level, labels)
    rng, rng_of_rows = generator(seed), generator(seed)
    observed = gap(first, second, labels)
    if np.isnan(observed):  # as of two infinite values: nothing can be said
        nan = float("nan")
        return Comparison(observed, nan, nan, nan)

    def on_rows(rows: np.ndarray) -> list[float]:
        return [gap(first[..., rows, :], second[..., rows, :], labels[rows])]

    def as_large(swaps: np.ndarray, axis: int) -> np.ndarray:
        """1 where the difference with some examples swapped is as large, else 0."""
        swap = swaps.reshape(-1, 1) > 0
        swapped = np.where(swap, second, first), np.where(swap, first, second)
        # Equal differences may be summed in another order.
        found = abs(gap(*swapped, labels)) >= abs(observed) * (1.0 - 1e-9)
        return np.full(swaps.shape[:-1], float(found))

    from scipy import stats

    # permutation_test loops over examples: three times as long for 10,000 of them.
    tested = stats.monte_carlo_test(
        np.zeros(len(labels)),
        lambda size: rng.random(size) < 0.5,
        as_large,
        vectorized=True,
        n_resamples=num_samples,
        batch=1,
        alternative="greater",
    )
    (drawn,) = _drawn(on_rows, len(labels), num_samples, rng_of_rows)
    return Comparison(observed, *_ends(drawn, level), float(tested.pvalue))


def _array(probs: Array) -> np.ndarray:
    if isinstance(probs, Predictions):
        raise TypeError(
            "examples are drawn anew, and checked each time: give the predictions "
            "themselves, not what metrics.check returned."
        )
    return unmasked(probs)


def _drawn(
    measure: Callable[[np.ndarray], list[float]],
    num_examples: int,
    num_samples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """(K, num_samples) what K metrics are on rows that are drawn with replacement."""
    found = [
        measure(rng.integers(0, num_examples, num_examples)) for _ in range(num_samples)
    ]
    return np.array(found, np.float64).T


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    """The percentiles of a metric on drawn sets; what is NaN is left out.

    Nothing is interpolated, as SciPy does: infinite values do not allow that.
    """
    if not len(values := values[~np.isnan(values)]):
        return float("nan"), float("nan")
    low = np.quantile(values, (1.0 - level) / 2, method="lower")
    high = np.quantile(values, (1.0 + level) / 2, method="higher")
    return float(low), float(high)


def _check(num_samples: int, level: float, labels: np.ndarray) -> None:
    check_count("num_samples", num_samples)
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level}.")
    if len(labels) < 2:
        raise ValueError(
            f"what chance does is known of two examples and more, got {len(labels)}."
        )
