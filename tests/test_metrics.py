"""Metrics against scikit-learn and loops written from their definitions."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from sklearn import metrics as sk

from otmdr_jax import metrics

settings = hypothesis.settings(
    deadline=None, max_examples=50, derandomize=True, database=None
)


def predictions(seed, n, classes, sharpness):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * sharpness
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_probs, rng.integers(0, classes, n)


def ece_loop(log_probs, labels, num_bins):
    probs, total = np.exp(log_probs), 0.0
    for b in range(num_bins):
        lo, hi = b / num_bins, (b + 1) / num_bins
        inside = [
            (max(p), int(np.argmax(p) == y))
            for p, y in zip(probs, labels, strict=True)
            if lo < max(p) <= hi
        ]
        if inside:
            conf, acc = np.mean(inside, axis=0)
            total += len(inside) / len(labels) * abs(acc - conf)
    return total


cases = st.tuples(
    st.integers(0, 999), st.integers(1, 60), st.integers(2, 7), st.floats(0.1, 6)
)


@settings
@hypothesis.given(cases)
def test_against_scikit_learn_and_a_loop(case):
    log_probs, labels = predictions(*case)
    classes = list(range(log_probs.shape[1]))
    probs = np.exp(log_probs)
    got = metrics.evaluate(log_probs, labels)
    np.testing.assert_allclose(
        got["accuracy"], sk.accuracy_score(labels, probs.argmax(axis=1))
    )
    np.testing.assert_allclose(
        got["nll"], sk.log_loss(labels, probs, labels=classes), rtol=1e-10
    )
    if len(set(labels)) > 1:  # scikit-learn's own requirement
        np.testing.assert_allclose(
            got["brier"],
            sk.brier_score_loss(labels, probs, labels=classes, scale_by_half=False),
            rtol=1e-10,
        )
    np.testing.assert_allclose(
        got["ece"], ece_loop(log_probs, labels, 15), rtol=1e-9, atol=1e-12
    )


def test_ece_counts_a_confidence_of_one_and_closes_bins_on_the_right():
    """Pitfalls: confidence 1.0 falls out of the last bin elsewhere."""
    sure = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    assert metrics.ece(sure, np.array([0, 1])) == 0.5
    on_edge = np.log(np.array([[0.8, 0.2]]))
    bins = metrics.reliability(on_edge, np.array([0]), num_bins=5)
    assert bins.counts.tolist() == [0, 0, 0, 1, 0]
    slightly_over = np.array([[1e-9, -30.0]])
    assert metrics.reliability(slightly_over, np.array([0])).counts[-1] == 1


def test_ece_is_over_the_whole_set_not_averaged_over_batches():
    """Pitfalls: two batches, each miscalibrated, that cancel in the whole set."""
    log_probs = np.log(np.full((4, 2), 0.5) + np.array([0.01, -0.01]))
    labels = np.array([0, 0, 1, 1])
    assert math.isclose(metrics.ece(log_probs, labels), 0.01, abs_tol=1e-9)
    halves = [
        metrics.ece(log_probs[:2], labels[:2]),
        metrics.ece(log_probs[2:], labels[2:]),
    ]
    assert np.mean(halves) > 0.4


def test_nll_of_an_impossible_label_is_infinite():
    assert metrics.nll(np.array([[0.0, -np.inf]]), np.array([1])) == np.inf


def test_metrics_are_computed_in_float64():
    log_probs, labels = predictions(0, 5000, 10, 2.0)
    exact = -np.mean(log_probs[np.arange(5000), labels])
    assert metrics.nll(log_probs, labels) == exact


@pytest.mark.parametrize(
    ("log_probs", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), r"\(N, C\)"),
        (np.zeros((0, 2)), np.zeros(0, int), "empty set"),
        (np.log(np.full((2, 2), 0.5)), np.zeros(2), "integers"),
        (np.log(np.full((2, 2), 0.5)), np.array([0, 2]), r"0\.\.1 for 2 classes"),
        (np.array([[2.0, 1.0]]), np.array([0]), "log_softmax"),
        (np.array([[np.nan, 0.0]]), np.array([0]), "sums to nan"),
    ],
)
def test_bad_input_is_refused(log_probs, labels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        metrics.evaluate(log_probs, labels)
