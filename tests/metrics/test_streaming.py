"""Accumulated metrics: the same for any batches, and those of the whole set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otmdr_jax import metrics
from otmdr_jax.metrics import streaming
from tests.metrics.test_metrics import predictions, settings

CLASSES, SIZE = 7, 16
# Sums whose terms are computed in float32; all others are exact.
ROUNDED = {"nll", "brier", "entropy"}


def set_of(seed, n):
    """Float32 probabilities, some of them 0, 1 or on the edge of a bin."""
    probs, labels = predictions(seed, n, CLASSES, 3.0)
    probs[::5] = np.eye(CLASSES)[labels[::5]]
    probs[1::7] = 0.0
    probs[1::7, 0], probs[1::7, 1] = np.float32(1 / 3), np.float32(2 / 3)
    return probs.astype(np.float32), labels


def padded(probs, labels):
    """A batch of SIZE rows, of which those added hold what must not count."""
    extra = SIZE - len(labels)
    value, label = [(np.nan, -1), (3.0, 99), (1 / CLASSES, 1)][extra % 3]
    mask = np.arange(SIZE) < len(labels)
    rows = np.concatenate([probs, np.full((extra, CLASSES), value)])
    return rows.astype(np.float32), np.append(labels, np.full(extra, label)), mask


def accumulate(probs, labels, sizes, **options):
    state = streaming.init(CLASSES, 10)
    start = 0
    for size in sizes:
        batch = padded(probs[start : start + size], labels[start : start + size])
        state = streaming.update(state, *batch, **options)
        start += size
    assert start == len(labels)
    return state


def cut(seed, n):
    """Sizes of batches, of which some are empty."""
    rng, sizes = np.random.default_rng(seed), []
    while sum(sizes) < n:
        sizes.append(int(rng.integers(0, min(n - sum(sizes), SIZE) + 1)))
    return sizes


def computed(state):
    """The metrics; that with a root squared, or rounding near 0 would be magnified."""
    found = streaming.compute(state)
    return found | {"debiased_ece_width": found["debiased_ece_width"] ** 2}


def whole_set(probs, labels, num_bins=10, log_probs=False):
    found = metrics.summary(probs, labels, num_bins, log_probs=log_probs)
    p = metrics.check(probs, labels, log_probs=log_probs)
    root = metrics.debiased_ece(p, p.labels, num_bins, cut="width")
    return found | {"debiased_ece_width": root**2}


seeds = st.integers(0, 9999)
counts = st.integers(1, 60)


def assert_same(got, want):
    want = {"mutual_information": 0.0, **want}
    for name, value in got.items():
        rtol = 5e-7 if name in ROUNDED else 1e-12
        np.testing.assert_allclose(value, want[name], rtol, 1e-12, err_msg=name)


@pytest.mark.slow
@settings
@given(seeds, counts, seeds, seeds)
def test_any_batches_give_the_metrics_of_the_whole_set(seed, n, one, other):
    probs, labels = set_of(seed, n)
    first = computed(accumulate(probs, labels, cut(one, n)))
    second = computed(accumulate(probs, labels, cut(other, n)))
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, 1e-12, 1e-14, err_msg=name)
    assert_same(first, whole_set(probs, labels))


@pytest.mark.slow
@settings
@given(seeds, counts, seeds)
def test_states_merge_in_any_order(seed, n, order):
    probs, labels = set_of(seed, n)
    sizes, rng = cut(order, n), np.random.default_rng(order)
    want = computed(accumulate(probs, labels, sizes))
    states, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        states.append(accumulate(probs[rows], labels[rows], [size]))
        start += size
    while len(states) > 1:
        one, other = (states.pop(rng.integers(len(states))) for _ in range(2))
        states.append(streaming.merge(one, other))
    for name, value in computed(states[0]).items():
        np.testing.assert_allclose(value, want[name], 1e-12, 1e-14, err_msg=name)


@pytest.mark.slow
def test_many_examples_lose_nothing():
    """A plain float32 sum of as many terms is off by far more."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1.0, 2**18).astype(np.float32)
    probs = np.stack([p, 1 - p], axis=1)
    labels = (rng.random(len(p)) > p).astype(int)
    state = streaming.init(2)
    for start in range(0, len(p), 2**14):
        rows = slice(start, start + 2**14)
        state = streaming.update(state, probs[rows], labels[rows])
    want = whole_set(probs, labels, 15)
    got = computed(state)
    assert_same(got, want)
    np.testing.assert_allclose(got["nll"], want["nll"], rtol=1e-7)
    terms = jnp.asarray(p) ** 2
    exact = np.asarray(terms, np.float64).sum()
    total = jax.jit(streaming._total)(terms)
    assert abs(float(total.high) + np.float64(total.low) - exact) < 1e-12 * exact
    in_turn = float(np.add.accumulate(np.asarray(terms))[-1])
    assert abs(in_turn - exact) > 1e-6 * exact


def test_the_reliability_diagram_is_the_whole_sets():
    probs, labels = set_of(1, 64)
    got = streaming.reliability(accumulate(probs, labels, [16] * 4))
    for a, b in zip(got, metrics.reliability(probs, labels, 10), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("num_bins", [7, 15, 49])
def test_probabilities_on_an_edge_fall_into_the_bin_that_they_do_in_float64(num_bins):
    """Edges are compared in the dtype of the probabilities, and 0.1 is in none."""
    edges = (np.arange(1, num_bins) / num_bins).astype(np.float32)
    around = [edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, 1)]
    p = np.concatenate(around).astype(np.float32)
    probs = np.stack([p, (1 - p).astype(np.float32)], axis=1)
    state = streaming.update(streaming.init(2, num_bins), probs, np.zeros(len(p), int))
    want = metrics.reliability(probs, np.zeros(len(p), int), num_bins)
    np.testing.assert_array_equal(streaming.reliability(state).counts, want.counts)


@pytest.mark.slow
def test_log_probabilities():
    probs, labels = predictions(2, 48, CLASSES)
    logits = np.log(probs).astype(np.float32)
    state = accumulate(logits, labels, [16, 16, 16], log_probs=True)
    want = whole_set(logits, labels, log_probs=True)
    want["mutual_information"] = 0.0
    for name, value in computed(state).items():
        np.testing.assert_allclose(value, want[name], rtol=2e-6, err_msg=name)
    far = np.array([[0.0, -2000.0]], np.float32)
    state = streaming.update(streaming.init(2), far, [1], log_probs=True)
    assert streaming.compute(state)["nll"] == 2000.0
    state = streaming.update(streaming.init(2), np.exp(far), [1])
    assert streaming.compute(state)["nll"] == np.inf
    over = np.array([[1e-6, -30.0]], np.float32)  # above 1 by rounding
    state = streaming.update(streaming.init(2), over, [0], log_probs=True)
    assert streaming.reliability(state).counts[-1] == 1
    samples = np.stack([far, far[:, ::-1]])
    state = streaming.update(streaming.init(2), samples, [0], log_probs=True)
    for name in ("nll", "mutual_information"):
        np.testing.assert_allclose(streaming.compute(state)[name], np.log(2), rtol=1e-6)


@pytest.mark.slow
def test_a_state_goes_through_jit_scan_and_bfloat16():
    probs, labels = set_of(3, 64)
    batches = probs.reshape(4, 16, CLASSES), labels.reshape(4, 16)

    @jax.jit
    def run(state):
        step = lambda state, batch: (streaming.update(state, *batch), None)  # noqa: E731
        return jax.lax.scan(step, state, batches)[0]

    got = computed(run(streaming.init(CLASSES, 10)))
    assert_same(got, whole_set(probs, labels))
    samples = np.stack([probs, probs[:, ::-1]])
    state = streaming.update(streaming.init(CLASSES, 10), samples, labels)
    want = whole_set(samples, labels)
    for name, value in computed(state).items():  # a mean in float32
        np.testing.assert_allclose(value, want[name], rtol=1e-6, err_msg=name)
    assert want["mutual_information"] > 0.1
    rounded = jax.nn.softmax(jnp.log(probs + 1e-3).astype(jnp.bfloat16))
    got = computed(streaming.update(streaming.init(CLASSES, 10), rounded, labels))
    for name, value in whole_set(rounded, labels).items():
        if name in got:
            np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_float64_batches_leave_a_state_its_dtypes():
    probs, labels = predictions(4, 32, CLASSES)
    with jax.enable_x64(True):
        before = streaming.init(CLASSES, 10)
        state = streaming.update(before, jnp.asarray(probs), jnp.asarray(labels))
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
        got = computed(state)
    want = whole_set(probs, labels)
    for name in got.keys() & want.keys():
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("probs", "labels"),
    [
        ([[np.nan, 0.5]], [0]),
        ([[2.0, 1.0]], [0]),
        ([[1.5, -0.5]], [0]),
        ([[0.5, 0.4]], [0]),
        ([[0.5, 0.5]], [2]),
        ([[0.5, 0.5]], [-1]),
    ],
)
def test_bad_rows_are_counted_and_refused_at_the_end(probs, labels):
    state = streaming.update(streaming.init(2), [[0.9, 0.1]], [0])
    state = streaming.update(state, probs, labels)
    with pytest.raises(ValueError, match="1 of 2 examples are no distributions"):
        streaming.compute(state)


def test_a_mask_is_no_weight():
    probs, labels = set_of(0, 4)
    with pytest.raises(TypeError, match="mask must be bools, got dtype float32"):
        streaming.update(streaming.init(CLASSES), probs, labels, np.full(4, 0.5))


@pytest.mark.parametrize(("dtype", "classes"), [(np.uint8, 256), (np.int8, 200)])
def test_labels_narrower_than_the_number_of_classes(dtype, classes):
    """JAX compares with a number of classes that the labels' dtype has wrapped."""
    labels = np.array([0, 3, 90, 127], dtype)
    state = streaming.init(classes)
    uniform = np.full((4, classes), 1 / classes, np.float32)
    found = streaming.compute(streaming.update(state, uniform, labels))
    assert found["nll"] == pytest.approx(np.log(classes))


def test_bad_shapes_are_refused_at_once():
    with pytest.raises(ValueError, match="nothing was added"):
        streaming.compute(streaming.init(3))
    with pytest.raises(ValueError, match=r"\(B, 3\), or.*got \(2, 2\) and \(2,\)"):
        streaming.update(streaming.init(3), np.full((2, 2), 0.5), [0, 1])
    for arguments, message in {
        (1,): "num_classes must be at least 2, got 1",
        (3, 0): "num_bins must be at least 1, got 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            streaming.init(*arguments)
    with pytest.raises(TypeError, match="num_bins must be an integer"):
        streaming.init(3, 1.5)
    full = np.full((2, 3), 1 / 3)
    for mask in (True, [[True, True]], [True]):  # a broadcast one would count twice
        with pytest.raises(ValueError, match="a bool for each of the 2 examples"):
            streaming.update(streaming.init(3), full, [0, 1], mask)
    for labels in ([True, False], [0.0, 1.0]):
        with pytest.raises(TypeError, match="labels must be integers"):
            streaming.update(streaming.init(3), full, labels)
    with pytest.raises(ValueError, match="samples must hold at least one"):
        streaming.update(streaming.init(3), np.zeros((0, 2, 3)), [0, 1])


@pytest.mark.parametrize("other", [(3, 1), (3, 10), (4, 15), (1 + 1, 15)])
def test_states_of_other_numbers_do_not_merge(other):
    with pytest.raises(ValueError, match="got 3 classes and 15 bins and"):
        streaming.merge(streaming.init(3, 15), streaming.init(*other))


def test_an_empty_batch_adds_nothing():
    probs, labels = predictions(0, 5, 3)
    one = streaming.update(streaming.init(3), probs, labels)
    two = streaming.update(one, probs[:0], labels[:0])
    assert streaming.compute(one) == streaming.compute(two)
