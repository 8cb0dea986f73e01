"""Intervals and tests against theory and SciPy."""

import itertools
import math
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from otmdr_jax import metrics
from tests.metrics.test_metrics import predictions


def test_the_bootstrap_of_a_mean_is_the_central_limit_theorems():
    probs, labels = predictions(0, 400, 3)
    terms = -np.log(probs[np.arange(400), labels])
    found = metrics.bootstrap(metrics.nll, probs, labels, level=0.9)
    half = scipy.stats.norm.ppf(0.95) * terms.std() / 20
    assert found.value == metrics.nll(probs, labels)
    np.testing.assert_allclose(found.high - found.value, half, rtol=0.12)
    np.testing.assert_allclose(found.value - found.low, half, rtol=0.12)
    wider = metrics.bootstrap(metrics.nll, probs, labels, level=0.99)
    assert wider.low < found.low and wider.high > found.high


def test_the_bootstrap_is_scipys():
    probs, labels = predictions(1, 150, 3)
    right = probs.argmax(axis=1) == labels
    found = metrics.bootstrap(metrics.accuracy, probs, labels, num_samples=4000)
    want = scipy.stats.bootstrap(
        (right,), np.mean, n_resamples=4000, method="percentile"
    ).confidence_interval
    np.testing.assert_allclose(found[1:], want, atol=0.011)  # steps of 1 / 150


def test_the_bootstrap_is_seeded_and_takes_samples():
    probs, labels = predictions(2, 60, 3)
    samples = np.stack([probs, probs[:, ::-1]])
    first, again, other = (
        metrics.bootstrap(metrics.brier, samples, labels, num_samples=50, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again and first.low != other.low
    assert first.value == metrics.brier(samples, labels)
    assert first.low < first.value < first.high
    one = metrics.bootstrap(metrics.brier, samples, labels, num_samples=1)
    assert one.low == one.high


def test_several_metrics_share_the_draws():
    probs, labels = predictions(3, 80, 3)
    found = metrics.bootstrap_all(metrics.summary, probs, labels, num_samples=20)
    for name in ("ece", "ovr_auroc", "accuracy"):
        one = metrics.bootstrap(
            lambda p, y, name=name: metrics.summary(p, y)[name],
            probs,
            labels,
            num_samples=20,
        )
        assert found[name] == one
    sure = metrics.bootstrap_all(
        metrics.summary, [[0.9, 0.1]] * 9, [0] * 9, num_samples=20
    )
    assert sure["accuracy"] == (1.0, 1.0, 1.0)
    assert np.isnan(sure["misclassification_auroc"]).all()


def test_an_infinite_metric_has_an_interval():
    probs = np.array([[1.0, 0.0]] * 10)
    found = metrics.bootstrap(metrics.nll, probs, [0] * 9 + [1], level=0.9)
    assert found == (math.inf, 0.0, math.inf)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "scale"), [(metrics.accuracy, 1.0), (metrics.nll, -math.log(9))]
)
def test_the_paired_test_of_two_values_is_mcnemars(metric, scale):
    """Swapping is a sign test on the examples that one model alone gets right.

    The NLL's differences are equal but for the order in which they are summed.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    right, wrong = np.eye(2)[labels] * 0.8 + 0.1, np.eye(2)[1 - labels] * 0.8 + 0.1
    for first_alone, second_alone in ((9, 3), (20, 5), (6, 6)):
        discordant = first_alone + second_alone
        a, b = right.copy(), right.copy()
        b[:first_alone] = wrong[:first_alone]
        a[first_alone:discordant] = wrong[first_alone:discordant]
        order = rng.permutation(200)
        a, b, y = a[order], b[order], labels[order]
        found = metrics.paired_test(metric, a, b, y, num_samples=2000)
        want = scipy.stats.binomtest(first_alone, discordant).pvalue
        assert (
            abs(found.p_value - want) < 4 * math.sqrt(want * (1 - want) / 2000) + 1e-3
        )
        mean = (first_alone - second_alone) / 200
        assert math.isclose(found.difference, scale * mean, abs_tol=1e-12)
        assert found.low <= found.difference + 1e-12 and found.difference <= found.high
        # The interval of a mean of -1, 0 and 1.
        half = 1.96 * math.sqrt(discordant / 200 - mean**2) / math.sqrt(200)
        width = found.high - found.low
        np.testing.assert_allclose(width, 2 * half * abs(scale), rtol=0.15)


def test_the_paired_test_is_scipys_permutation_test():
    probs, labels = predictions(4, 120, 3)
    other = 0.9 * probs + 0.1 / 3
    rows = np.arange(120)
    terms = (-np.log(p[rows, labels]) for p in (probs, other))
    want = scipy.stats.permutation_test(
        tuple(terms),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=5000,
        vectorized=True,
    )
    found = metrics.paired_test(metrics.nll, probs, other, labels, num_samples=2000)
    np.testing.assert_allclose(found.difference, want.statistic)
    assert abs(found.p_value - want.pvalue) < 0.03
    swapped = metrics.paired_test(metrics.nll, other, probs, labels, num_samples=2000)
    assert math.isclose(swapped.difference, -found.difference)
    assert swapped.p_value == found.p_value  # seeded


def test_the_randomisation_test_is_that_of_all_swaps():
    """Of 10 examples there are 1024, which can be tried one by one."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 10)
    probs, other = rng.dirichlet(np.ones(3), (2, 10))
    # A metric that is no mean over examples: swaps of all are not those of means.
    observed = abs(metrics.ece(probs, labels) - metrics.ece(other, labels))
    found = 0
    for swaps in itertools.product((False, True), repeat=10):
        swap = np.array(swaps)[:, None]
        one, two = np.where(swap, other, probs), np.where(swap, probs, other)
        gap = abs(metrics.ece(one, labels) - metrics.ece(two, labels))
        found += gap >= observed - 1e-12
    want = found / 1024
    assert 0.05 < want < 0.95
    test = metrics.paired_test(metrics.ece, probs, other, labels, num_samples=2000)
    assert abs(test.p_value - want) < 4 * math.sqrt(want * (1 - want) / 2000)


def test_of_infinite_differences_the_test_holds_too():
    probs = np.array([[1.0, 0.0]] * 9)
    found = metrics.paired_test(
        metrics.nll, probs, np.full((9, 2), 0.5), [0] * 8 + [1], num_samples=50
    )
    assert found.difference == math.inf and found.p_value == 1.0
    assert found.high == math.inf and found.low < 0


@pytest.mark.slow
def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        right = rng.random(80) < 0.7
        probs = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
        found = metrics.bootstrap(
            metrics.accuracy, probs, [0] * 80, num_samples=300, level=0.9
        )
        covered += found.low <= 0.7 <= found.high
    assert abs(covered / 300 - 0.9) < 0.06  # three standard errors, and its steps


def test_a_large_set_takes_the_memory_of_one_drawn_set():
    values = np.linspace(0.0, 1.0, 200_000)[:, None]
    labels = np.zeros(len(values), np.int64)
    tracemalloc.start()
    try:
        metrics.paired_test(
            lambda p, y: float(np.mean(p)), values, values**2, labels, num_samples=30
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 15 * 8 * len(values)  # all 30 sets would take 30 times that


def test_a_model_does_not_differ_from_itself():
    probs, labels = predictions(5, 50, 3)
    found = metrics.paired_test(metrics.ece, probs, probs, labels, num_samples=50)
    assert found == (0.0, 0.0, 0.0, 1.0)


def test_predictions_of_two_precisions_are_refused():
    """Rows of 8 bits, swapped into others, would not sum to 1 as those must."""
    probs, labels = predictions(7, 50, 9)
    narrow = probs.astype(jnp.bfloat16)
    message = "one dtype, got float32 and bfloat16. Give both in float32"
    with pytest.raises(ValueError, match=message):
        metrics.paired_test(metrics.brier, probs.astype(np.float32), narrow, labels)
    wide = narrow.astype(np.float64)
    wide /= wide.sum(-1, keepdims=True)
    found = metrics.paired_test(metrics.brier, probs.astype(np.float32), wide, labels)
    want = metrics.brier(probs, labels) - metrics.brier(wide, labels)
    assert found.difference == pytest.approx(want, abs=1e-6)
    metrics.paired_test(metrics.brier, narrow, narrow, labels, num_samples=20)


def test_bad_options_are_refused():
    probs, labels = predictions(6, 20, 3)
    for kwargs, message in (
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": 20.0}, "num_samples must be an integer"),
        ({"level": 1.0}, r"level must be in \(0, 1\)"),
        ({"level": 0.0}, r"level must be in \(0, 1\)"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            metrics.bootstrap(metrics.nll, probs, labels, **kwargs)
        with pytest.raises((ValueError, TypeError), match=message):
            metrics.paired_test(metrics.nll, probs, probs, labels, **kwargs)
    checked = metrics.check(probs, labels)
    with pytest.raises(TypeError, match="not what metrics.check returned"):
        metrics.bootstrap(metrics.nll, checked, labels)
    with pytest.raises(ValueError, match="two examples and more, got 1"):
        metrics.bootstrap(metrics.nll, probs[:1], labels[:1])
    with pytest.raises(ValueError, match=r"\(20, 3\) and \(19, 3\)"):
        metrics.paired_test(metrics.nll, probs, probs[1:], labels)
