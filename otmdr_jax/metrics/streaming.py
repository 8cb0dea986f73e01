"""Metrics accumulated batch by batch on the device, the same for any batches.

A state of counts and sums is updated in a compiled step, merged between devices or
hosts, and turned into metrics at the end:

    state = streaming.init(num_classes=10)
    for probs, labels, mask in batches:
        state = streaming.update(state, probs, labels, mask)
    streaming.compute(state)

Counts are integers and exact up to 2^31. Sums are pairs of numbers, of which the second
holds what the first lost to rounding, so that float32 keeps 48 bits. The cut into
batches changes a metric by less than 1e-12 of its value. Binned errors of float32
probabilities agree with :mod:`otmdr_jax.metrics` to the same precision; the terms of
NLL, Brier score and entropy have float32's own rounding, about 1e-7 each. Probabilities
below 1.2e-38 count as 0, since XLA flushes subnormal numbers; `log_probs=True` has no
such limit.

Metrics that depend on ranks in the whole set have no such state: AUROC and average
precision, AAC and AURC, bins of equal mass, the smooth error. Keep the predictions for
those, as training runs do: 40 MB for 1,000,000 examples of 10 classes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax.core import shards
from otmdr_jax.core.checks import check_count
from otmdr_jax.metrics.predictions import tolerance
from otmdr_jax.metrics.reliability import (
    NUM_BINS,
    BinSums,
    Reliability,
    diagram,
    edges_of,
)
from otmdr_jax.metrics.scores import join_parts, parts_of_bins

Array = Any


class Sum(NamedTuple):
    """A compensated sum, `high + low`."""

    high: jax.Array
    low: jax.Array


class State(NamedTuple):
    """The counts and sums of the examples so far, from :func:`init`.

    Attributes:
      seen: The number of examples.
      invalid: The number that are not distributions or have no valid label.
      correct: The number whose most probable class is the label.
      top5: The number whose label is among the five most probable classes.
      impossible: The number whose label has probability 0.
      nll: Sum of -log p[y] over the others.
      brier: Sum of Brier scores.
      entropy: Sum of entropies.
      within: Sum of the mean entropies of samples.
      bin_counts: (bins, C + 1) numbers of examples by the probability of each class,
        and by the top one.
      bin_scores: (bins, C + 1) sums of those probabilities.
      bin_positives: (bins, C + 1) numbers of these examples that are of the class, or
        right.
      at_zero: (C + 1,) numbers of the latter with a probability of exactly 0.
    """

    seen: jax.Array
    invalid: jax.Array
    correct: jax.Array
    top5: jax.Array
    impossible: jax.Array
    nll: Sum
    brier: Sum
    entropy: Sum
    within: Sum
    bin_counts: jax.Array
    bin_scores: Sum
    bin_positives: jax.Array
    at_zero: jax.Array


def init(num_classes: int, num_bins: int = NUM_BINS) -> State:
    """Makes an empty state.

    Args:
      num_classes: C, the number of classes.
      num_bins: The number of bins of all calibration errors.

    Returns:
      A pytree of arrays, which can be carried, donated, sharded or saved.

    Raises:
      ValueError: There are fewer than two classes or one bin; TypeError: no integers.

    Example:
      >>> from otmdr_jax.metrics import streaming
      >>> state = streaming.init(num_classes=2)
      >>> state = streaming.update(state, [[0.9, 0.1]], [0])
      >>> state = streaming.update(state, [[0.6, 0.4]], [1])
      >>> round(streaming.compute(state)["ece"], 4)
      0.35
    """
    check_count("num_classes", num_classes)
    check_count("num_bins", num_bins)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    columns = num_classes + 1

    def whole(*shape):  # a buffer for each: a state may be donated
        return jnp.zeros(shape, jnp.int32)

    def real(*shape):
        return Sum(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    return State(
        seen=whole(),
        invalid=whole(),
        correct=whole(),
        top5=whole(),
        impossible=whole(),
        nll=real(),
        brier=real(),
        entropy=real(),
        within=real(),
        bin_counts=whole(num_bins, columns),
        bin_scores=real(num_bins, columns),
        bin_positives=whole(num_bins, columns),
        at_zero=whole(columns),
    )


@functools.partial(jax.jit, static_argnames="log_probs")
def update(
    state: State,
    probs: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    log_probs: bool = False,
) -> State:
    """Adds a batch.

    Args:
      state: The state so far.
      probs: (B, C) probabilities in any floating dtype, or samples (S, B, C), whose
        mean counts.
      labels: (B,) integers in 0..C-1.
      mask: (B,) bools, True for rows that count. Others may hold anything.
      log_probs: True if `probs` are logarithms of probabilities.

    Returns:
      The state with the batch in it. Rows that are not distributions and labels that
      are not classes are counted, and :func:`compute` raises an error.

    Raises:
      ValueError: Shapes do not fit.
      TypeError: Labels are not integers, or a mask is not bools.
    """
    columns = state.bin_counts.shape[1]
    values, labels = jnp.asarray(probs), jnp.asarray(labels)
    if values.ndim == 3 and not len(values):
        raise ValueError("a stack of samples must hold at least one, got none.")
    if values.shape[-2:] != (*labels.shape, columns - 1) or values.ndim not in (2, 3):
        raise ValueError(
            f"need probs of shape (B, {columns - 1}), or samples (S, B, {columns - 1}),"
            f" and labels of shape (B,), got {values.shape} and {labels.shape}."
        )
    if labels.size and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    if labels.dtype.itemsize < 4:  # uint8 does not compare with 256 classes
        labels = labels.astype(jnp.int32)
    mask = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bools, got dtype {mask.dtype}: use mask > 0.")
    if mask.shape != labels.shape:
        raise ValueError(
            f"mask must have a bool for each of the {len(labels)} examples, got shape "
            f"{mask.shape}."
        )
    if not len(labels):
        return state
    sharded = next((x for x in (values, labels, mask) if shards.of(x)), values)
    add = functools.partial(_update, log_probs)
    run = shards.left_to_compiler(add, sharded, whole=True)
    return run(state, values, labels, mask)


def _update(log_probs, state, values, labels, mask):
    num_bins, columns = state.bin_counts.shape
    samples = values.reshape(-1, *values.shape[-2:])  # (S, B, C)
    samples = samples.astype(jnp.promote_types(values.dtype, jnp.float32))
    probs = jnp.exp(samples) if log_probs else samples
    valid = _valid(probs, labels, tolerance(values.dtype))
    within = jnp.mean(_entropy(jnp.minimum(probs, 1.0)), axis=0)
    values = _mean(samples, log_probs)
    counts = mask & valid
    # Rows that do not count become sure and right: their NLL, Brier score and entropy
    # are 0. (Multiplied by the mask, NaN would stay NaN.)
    classes = jnp.arange(columns - 1)[None, :]
    sure = jnp.where(classes == 0, 1.0 - log_probs, -1e9 if log_probs else 0.0)
    values = jnp.where(counts[:, None], values, sure)
    labels = jnp.where(counts, labels, 0)[:, None]  # (B, 1)

    p = jnp.minimum(jnp.exp(values) if log_probs else values, 1.0)
    onehot = labels == classes  # (B, C)
    of_label = jnp.take_along_axis(values, labels, axis=1)  # (B, 1)
    before = (values > of_label) | ((values == of_label) & (classes < labels))
    rank = jnp.sum(before, axis=1)  # of the label, from 0
    logs = of_label[:, 0] if log_probs else jnp.log(of_label[:, 0])
    possible = jnp.isfinite(logs)

    def number(rows):
        return jnp.sum(rows & counts, dtype=jnp.int32)

    scores = jnp.concatenate([p, jnp.max(p, axis=1, keepdims=True)], axis=1)
    hits = jnp.concatenate([onehot, (rank == 0)[:, None]], axis=1)
    bin_counts, bin_scores, bin_positives = _binned(scores, hits, counts, num_bins)
    batch = State(
        seen=jnp.sum(mask, dtype=jnp.int32),
        invalid=jnp.sum(mask & ~valid, dtype=jnp.int32),
        correct=number(rank == 0),
        top5=number(rank < 5),
        impossible=number(~possible),
        nll=_total(jnp.where(possible, -logs, 0.0)),
        brier=_total(jnp.sum((p - onehot) ** 2, axis=1)),
        entropy=_total(_entropy(p)),
        within=_total(jnp.where(counts, within, 0.0)),
        bin_counts=bin_counts,
        bin_scores=bin_scores,
        bin_positives=bin_positives,
        at_zero=jnp.sum(hits & (scores == 0.0), axis=0, dtype=jnp.int32),
    )
    return merge(state, batch)


def merge(one: State, other: State) -> State:
    """Joins the states of devices, hosts or parts of a set, in any order.

    Raises:
      ValueError: They are of other numbers of classes or bins.
    """
    shapes = [x.bin_counts.shape for x in (one, other)]
    if shapes[0] != shapes[1]:
        of = [f"{columns - 1} classes and {bins} bins" for bins, columns in shapes]
        raise ValueError(f"states must be of the same numbers, got {' and '.join(of)}.")

    def add(a, b):
        return _add(a, b) if isinstance(a, Sum) else a + b

    return jax.tree.map(add, one, other, is_leaf=lambda x: isinstance(x, Sum))


def compute(state: State) -> dict[str, float]:
    """Computes the metrics in float64 on the host, by the names of `metrics.summary`.

    Args:
      state: The state.

    Returns:
      accuracy, top5_accuracy, nll, brier and its three parts, ece, mce, sce, entropy,
      mutual_information (0 unless predictions are samples); debiased_ece_width, which
      is `metrics.debiased_ece(cut="width")`, since bins of equal mass need ranks.

    Raises:
      ValueError: The state is empty, or some rows are not distributions, or some labels
        are not classes.
    """
    seen = jax.tree.map(np.asarray, state)
    count = int(seen.seen)
    if not count:
        raise ValueError("metrics of an empty set are not defined: nothing was added.")
    if seen.invalid:
        raise ValueError(
            f"{seen.invalid} of {count} examples are no distributions over the classes "
            "or have labels that are none: NaN, logits (apply jax.nn.softmax), log-"
            "probabilities (log_probs=True), rows that do not sum to 1."
        )
    *classes, top = _bins(seen)
    parts = np.array([parts_of_bins(bins) for bins in classes])
    brier = _value(seen.brier) / count
    reliability, resolution, uncertainty, _ = join_parts(parts, brier)
    # A probability of 0 lies in no bin of the SCE: see `metrics.sce`.
    first = np.arange(len(top.counts)) == 0
    gaps = [
        bins._replace(positives=bins.positives - first * zeros).gap()
        for bins, zeros in zip(classes, seen.at_zero[:-1], strict=True)
    ]
    return {
        "accuracy": int(seen.correct) / count,
        "top5_accuracy": int(seen.top5) / count,
        "nll": float("inf") if seen.impossible else _value(seen.nll) / count,
        "brier": brier,
        "brier_reliability": reliability,
        "brier_resolution": resolution,
        "brier_uncertainty": uncertainty,
        "ece": top.gap() / count,
        "mce": top.largest_gap(),
        "debiased_ece_width": max(0.0, top.debiased_square() / count) ** 0.5,
        "sce": sum(gaps) / (count * len(classes)),
        "entropy": _value(seen.entropy) / count,
        "mutual_information": max(0.0, _value(seen.entropy) - _value(seen.within))
        / count,
    }


def reliability(state: State) -> Reliability:
    """The reliability diagram of the top class, as `metrics.reliability`."""
    top = _bins(jax.tree.map(np.asarray, state))[-1]
    return diagram(edges_of(len(top.counts)), top)


def _bins(seen: State) -> list[BinSums]:
    """The bins of each class, and last those of the top one."""
    scores = np.asarray(_pair(seen.bin_scores))
    columns = zip(seen.bin_counts.T, scores.T, seen.bin_positives.T, strict=True)
    return [BinSums(*column) for column in columns]


def _pair(x: Sum) -> np.ndarray:
    return np.asarray(x.high, np.float64) + np.asarray(x.low, np.float64)


def _value(x: Sum) -> float:
    return float(_pair(x))


def _mean(samples: jax.Array, log_probs: bool) -> jax.Array:
    """(S, B, C) -> (B, C)."""
    if len(samples) == 1:  # to the bit
        return samples[0]
    if log_probs:
        return jax.nn.logsumexp(samples, axis=0) - jnp.log(len(samples))
    return jnp.mean(samples, axis=0)


def _entropy(p: jax.Array) -> jax.Array:
    """In nats, with 0 log 0 = 0."""
    return -jnp.sum(p * jnp.log(jnp.where(p > 0.0, p, 1.0)), axis=-1)


def _valid(probs: jax.Array, labels: jax.Array, allowed: float) -> jax.Array:
    """(B,) bools, True for rows whose samples are distributions, with a valid label."""
    sums_to_one = jnp.abs(jnp.sum(probs, axis=2) - 1.0) <= allowed  # not of NaN
    distributions = jnp.all(sums_to_one & (jnp.min(probs, axis=2) >= 0.0), axis=0)
    return distributions & (labels >= 0) & (labels < probs.shape[2])


def _binned(
    scores: jax.Array, hits: jax.Array, counts: jax.Array, num_bins: int
) -> tuple[jax.Array, Sum, jax.Array]:
    """(bins, C + 1) numbers, sums and hits of the scores in rows that count."""
    edges = _edges(num_bins, scores.dtype)
    index = jnp.maximum(jnp.searchsorted(edges, scores, side="left") - 1, 0)
    index = jnp.where(counts[:, None], index, -1)

    def of_bin(b):
        inside = index == b
        return (
            jnp.sum(inside, axis=0, dtype=jnp.int32),
            _total(jnp.where(inside, scores, 0.0)),
            jnp.sum(inside & hits, axis=0, dtype=jnp.int32),
        )

    return jax.lax.map(of_bin, jnp.arange(num_bins))


def _edges(num_bins: int, dtype: Any) -> jax.Array:
    """The bins' edges: p > edge holds in this dtype exactly if it does in float64."""
    exact = edges_of(num_bins)
    edges = exact.astype(dtype)
    above = edges.astype(np.float64) > exact
    return jnp.asarray(np.where(above, np.nextafter(edges, np.array(0, dtype)), edges))


def _add(a: Sum, b: Sum) -> Sum:
    """The sum of two compensated sums (Knuth's two-sum, then renormalised)."""
    high = a.high + b.high
    part = high - a.high
    lost = (a.high - (high - part)) + (b.high - part)
    low = a.low + b.low + lost
    total = high + low
    return Sum(total, low - (total - high))


def _total(terms: jax.Array) -> Sum:
    """The compensated sum over the first axis, adding halves."""
    found = Sum(terms, jnp.zeros_like(terms))
    while (size := len(found.high)) > 1:
        half = size // 2
        parts = slice(half), slice(half, 2 * half), slice(2 * half, None)
        one, other, rest = (Sum(found.high[part], found.low[part]) for part in parts)
        pairs = _add(one, other)
        found = Sum(*(jnp.concatenate(x) for x in zip(pairs, rest, strict=True)))
    high = found.high[0].astype(jnp.float32)  # a state's dtype, whatever the batch's
    low = found.high[0] - high.astype(terms.dtype) + found.low[0]
    return Sum(high, low.astype(jnp.float32))
