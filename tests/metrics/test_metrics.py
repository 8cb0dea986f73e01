"""Scores and calibration errors against scikit-learn and their definitions."""

import functools
import itertools
import math
from fractions import Fraction

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from sklearn import metrics as sk

from otmdr_jax import calibration, metrics
from otmdr_jax.metrics import diversity, streaming

settings = hypothesis.settings(
    deadline=None, max_examples=50, derandomize=True, database=None
)


def predictions(seed, n, classes, sharpness=2.0):
    """Probabilities and labels that they say something about."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * sharpness
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    noisy = logits + rng.gumbel(size=logits.shape) * 2.0
    return probs, noisy.argmax(axis=1)


cases = st.tuples(
    st.integers(0, 999), st.integers(1, 60), st.integers(2, 7), st.floats(0.1, 6)
)


# -- the definitions, one example and bin at a time -----------------------------------


def gap(members):
    """|bin| times |mean probability - frequency| of (probability, hit) pairs."""
    return abs(sum(p for p, _ in members) - sum(hit for _, hit in members))


def inside(pairs, b, num_bins):
    lo, hi = b / num_bins, (b + 1) / num_bins
    return [(p, hit) for p, hit in pairs if lo < p <= hi]


def equal_count(pairs, num_bins):
    pairs = sorted(pairs, key=lambda pair: pair[0])
    size = len(pairs) // num_bins
    cuts = [b * size for b in range(num_bins)] + [len(pairs)]
    for i, cut in enumerate(cuts):  # equal probabilities share the bin below
        while 0 < cut < len(pairs) and pairs[cut][0] == pairs[cut - 1][0]:
            cut += 1
        cuts[i] = cut
    return [pairs[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def top_pairs(probs, labels):
    rows = zip(probs, labels, strict=True)
    return [(max(p), int(np.argmax(p) == y)) for p, y in rows]


def class_pairs(probs, labels, c):
    return [(p[c], int(y == c)) for p, y in zip(probs, labels, strict=True)]


def ece_loop(probs, labels, num_bins=15):
    pairs = top_pairs(probs, labels)
    bins = [inside(pairs, b, num_bins) for b in range(num_bins)]
    return sum(gap(members) for members in bins) / len(labels)


def sce_loop(probs, labels, num_bins=15):
    total = 0.0
    for c in range(probs.shape[1]):
        pairs = class_pairs(probs, labels, c)
        total += sum(gap(inside(pairs, b, num_bins)) for b in range(num_bins))
    return total / probs.size


def tace_loop(probs, labels, num_bins=15, threshold=1e-3):
    total = 0.0
    for c in range(probs.shape[1]):
        pairs = [x for x in class_pairs(probs, labels, c) if x[0] > threshold]
        total += sum(gap(members) for members in equal_count(pairs, num_bins))
    return total / probs.size


def ece_mass_loop(probs, labels, num_bins=15):
    bins = equal_count(top_pairs(probs, labels), num_bins)
    return sum(gap(members) for members in bins) / len(labels)


@settings
@hypothesis.given(cases)
def test_scores_are_scikit_learns(case):
    probs, labels = predictions(*case)
    classes = list(range(probs.shape[1]))
    assert metrics.accuracy(probs, labels) == sk.accuracy_score(labels, probs.argmax(1))
    want = sk.log_loss(labels, probs, labels=classes)
    np.testing.assert_allclose(metrics.nll(probs, labels), want, rtol=1e-10)
    if len(set(labels)) > 1:  # scikit-learn's own requirement
        want = sk.brier_score_loss(labels, probs, labels=classes, scale_by_half=False)
        np.testing.assert_allclose(metrics.brier(probs, labels), want, rtol=1e-10)
        for k in range(2, len(classes)):
            want = sk.top_k_accuracy_score(labels, probs, k=k, labels=classes)
            np.testing.assert_allclose(metrics.top_k_accuracy(probs, labels, k), want)
    assert metrics.top_k_accuracy(probs, labels, 1) == metrics.accuracy(probs, labels)
    assert metrics.top_k_accuracy(probs, labels, len(classes)) == 1.0


@settings
@hypothesis.given(cases, st.sampled_from([1, 4, 15]))
def test_calibration_errors_are_those_of_the_definitions(case, num_bins):
    probs, labels = predictions(*case)
    for function, loop in (
        (metrics.ece, ece_loop),
        (metrics.sce, sce_loop),
        (metrics.tace, tace_loop),
    ):
        got = function(probs, labels, num_bins=num_bins)
        assert isinstance(got, float)
        np.testing.assert_allclose(got, loop(probs, labels, num_bins), atol=1e-12)
    got = metrics.ece(probs, labels, num_bins, cut="mass")
    want = ece_mass_loop(probs, labels, num_bins)
    np.testing.assert_allclose(got, want, atol=1e-12)
    got = metrics.ace(probs, labels, num_bins)
    want = tace_loop(probs, labels, num_bins, 0.0)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_the_defaults_agree_with_the_definitions():
    probs, labels = predictions(0, 1000, 12, 4.0)
    assert (probs < 1e-3).mean() > 0.3  # what the threshold leaves out matters
    want = {
        "ece": ece_loop(probs, labels),
        "sce": sce_loop(probs, labels),
        "ace": tace_loop(probs, labels, threshold=0.0),
        "tace": tace_loop(probs, labels),
    }
    for name, value in want.items():
        np.testing.assert_allclose(
            getattr(metrics, name)(probs, labels), value, atol=1e-9
        )
    assert len({round(value, 6) for value in want.values()}) == 4


@settings
@hypothesis.given(st.integers(0, 99), st.integers(2, 40))
def test_equal_probabilities_share_a_bin(seed, n):
    """Two digits: most bins end among equal values. 0 and 1 occur."""
    rng = np.random.default_rng(seed)
    tenths = rng.multinomial(10, [0.6, 0.3, 0.1], size=n) / 10
    labels = rng.integers(0, 3, n)
    for num_bins in (2, 3, 15):
        for got, want in (
            (metrics.sce, sce_loop(tenths, labels, num_bins)),
            (metrics.ace, tace_loop(tenths, labels, num_bins, 0.0)),
            (metrics.ece, ece_loop(tenths, labels, num_bins)),
        ):
            np.testing.assert_allclose(got(tenths, labels, num_bins), want, atol=1e-12)
        got = metrics.ece(tenths, labels, num_bins, cut="mass")
        want = ece_mass_loop(tenths, labels, num_bins)
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("log_probs", [False, True])
def test_no_metric_depends_on_the_order_of_the_examples(log_probs):
    """Data sets are often sorted by label, and sure predictions are often equal."""
    tenths = np.random.default_rng(0).multinomial(10, [0.7, 0.2, 0.1], size=200) / 10
    labels = np.sort(np.random.default_rng(1).integers(0, 3, 200))
    probs = np.log(np.maximum(tenths, 1e-300)) if log_probs else tenths
    want = metrics.summary(probs, labels, log_probs=log_probs)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(200)
        got = metrics.summary(probs[order], labels[order], log_probs=log_probs)
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-9, err_msg=name)


def test_a_calibrated_constant_has_no_error_whatever_the_bins():
    probs, labels = [[0.7, 0.3]] * 1000, [0] * 700 + [1] * 300
    for function in (metrics.ece, metrics.mce, metrics.debiased_ece):
        assert function(probs, labels, cut="mass") == pytest.approx(0.0, abs=1e-12)
    assert metrics.ace(probs, labels) == pytest.approx(0.0, abs=1e-12)
    bins = metrics.reliability(probs, labels, cut="mass")
    assert bins.counts[0] == 1000 and bins.accuracy[0] == 0.7


def test_of_tied_classes_the_first_one_counts():
    tied = [[0.4, 0.4, 0.2]] * 2
    assert metrics.accuracy(tied, [0, 0]) == 1.0
    assert metrics.accuracy(tied, [1, 1]) == 0.0
    assert metrics.top_k_accuracy(tied, [0, 0], 1) == 1.0
    assert metrics.top_k_accuracy(tied, [1, 1], 1) == 0.0


def test_blocks_and_threads_give_what_one_piece_does(monkeypatch):
    probs, labels = predictions(1, 300, 11)
    whole = metrics.summary(probs, labels)
    monkeypatch.setattr("otmdr_jax.metrics.predictions._BLOCK", 64)
    monkeypatch.setattr("otmdr_jax.metrics.predictions._COLUMNS", 3)
    monkeypatch.setattr("otmdr_jax.metrics.predictions._THREADED", 0)
    pieces = metrics.summary(probs, labels)
    for name, value in whole.items():
        np.testing.assert_allclose(pieces[name], value, rtol=1e-13, err_msg=name)


def test_ece_counts_a_confidence_of_one_and_closes_bins_on_the_right():
    """Pitfalls: confidence 1.0 falls out of the last bin elsewhere."""
    sure = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert metrics.ece(sure, np.array([0, 1])) == 0.5
    bins = metrics.reliability([[0.8, 0.2]], [0], num_bins=5)
    assert bins.counts.tolist() == [0, 0, 0, 1, 0]
    over = metrics.check([[1e-9, -30.0]], [0], log_probs=True)
    assert metrics.reliability(over, over.labels).counts[-1] == 1
    wrong = metrics.check([[1e-9, -30.0]], [1], log_probs=True)
    assert math.isclose(metrics.sce(wrong, wrong.labels), 1.0, rel_tol=1e-6)


def test_ece_is_over_the_whole_set_not_averaged_over_batches():
    """Pitfalls: two batches, each miscalibrated, that cancel in the whole set."""
    probs = np.full((4, 2), 0.5) + np.array([0.01, -0.01])
    labels = np.array([0, 0, 1, 1])
    assert math.isclose(metrics.ece(probs, labels), 0.01, abs_tol=1e-9)
    halves = [metrics.ece(probs[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    assert np.mean(halves) > 0.4


def test_reliability_diagrams():
    probs, labels = predictions(2, 500, 5)
    pairs = np.array(top_pairs(probs, labels))
    bins = metrics.reliability(probs, labels, 10)
    for b in range(10):
        members = np.array(inside(pairs, b, 10))
        assert bins.counts[b] == len(members)
        if len(members):
            np.testing.assert_allclose(bins.confidence[b], members[:, 0].mean())
            np.testing.assert_allclose(bins.accuracy[b], members[:, 1].mean())
    assert np.isnan(bins.accuracy[0]) and bins.counts[0] == 0  # none below 1 / C
    mass = metrics.reliability(probs, labels, 7, cut="mass")
    assert mass.counts.tolist() == [71] * 6 + [74]
    ordered = np.sort(probs.max(axis=1))
    np.testing.assert_array_equal(mass.edges[1:-1], ordered[71 * np.arange(1, 7) - 1])
    gaps = np.abs(bins.accuracy - bins.confidence)
    np.testing.assert_allclose(metrics.mce(probs, labels, 10), np.nanmax(gaps))


def test_fewer_examples_than_bins_of_equal_mass():
    bins = metrics.reliability([[0.9, 0.1], [0.6, 0.4]], [0, 1], cut="mass")
    assert bins.counts.tolist() == [0] * 14 + [2]
    assert bins.edges.tolist() == [0.0] * 15 + [1.0]


def test_brier_parts_add_up():
    probs, labels = predictions(3, 400, 4)
    probs[:200] = np.eye(4)[probs[:200].argmax(axis=1)]  # 0 and 1 count too
    parts = metrics.brier_parts(probs, labels, num_bins=8)
    onehot = np.eye(4)[labels]
    index = np.maximum(np.ceil(probs * 8) - 1, 0)
    reliability = resolution = within = 0.0
    for c in range(4):
        base = onehot[:, c].mean()
        for b in range(8):
            p, y = probs[index[:, c] == b, c], onehot[index[:, c] == b, c]
            if len(p):
                reliability += len(p) / 400 * (p.mean() - y.mean()) ** 2
                resolution += len(p) / 400 * (y.mean() - base) ** 2
                covariance = np.mean((p - p.mean()) * (y - y.mean()))
                within += len(p) / 400 * (p.var() - 2 * covariance)
    base = onehot.mean(axis=0)
    want = [reliability, resolution, np.sum(base * (1 - base)), within]
    np.testing.assert_allclose(parts, want, rtol=1e-10)
    total = reliability - resolution + np.sum(base * (1 - base)) + within
    np.testing.assert_allclose(metrics.brier(probs, labels), total)


def calibrated(seed, n):
    """Two classes whose labels are drawn from the probabilities."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.5, 1.0, n)
    return np.stack([1 - p, p], axis=1), (rng.random(n) < p).astype(int)


def test_debiased_ece_is_unbiased_where_the_plain_one_is_not():
    """On squares, which the correction is exact for; over 400 calibrated sets."""
    terms, plain = [], []
    for seed in range(400):
        probs, labels = calibrated(seed, 150)
        pairs = np.array(top_pairs(probs, labels))
        bins = np.array_split(pairs[np.argsort(pairs[:, 0])], 15)
        accuracy = np.array([x[:, 1].mean() for x in bins])
        square = np.mean((accuracy - [x[:, 0].mean() for x in bins]) ** 2)
        square -= np.mean(accuracy * (1 - accuracy) / 9)
        terms.append(square)
        plain.append(metrics.ece(probs, labels, cut="mass"))
        want = math.sqrt(max(0.0, square))
        np.testing.assert_allclose(metrics.debiased_ece(probs, labels), want, atol=1e-9)
    error = np.std(terms) / 20
    assert abs(np.mean(terms)) < 3 * error and error < 1e-3
    assert np.mean(plain) > 0.08  # what chance alone gives


def smooth_direct(confidence, hits, sigma, points=2001):
    """The integral by midpoints, the reflected kernel as a sum over images."""
    t = (np.arange(points) + 0.5) / points
    smooth = np.zeros(points)
    for p, hit in zip(confidence, hits, strict=True):
        for image in [p + 2 * k for k in range(-2, 3)]:
            for center in (image, -image):
                z = (t - center) / sigma
                kernel = np.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))
                smooth += (hit - p) * kernel
    return np.mean(np.abs(smooth / len(hits)))


def test_smooth_ece_is_the_fixed_point_of_its_bandwidth():
    """Too sure below a hit rate and not sure enough above it, or the other way round.

    So that residuals cancel under a wide kernel, inside and at the ends.
    """
    rng = np.random.default_rng(0)
    confidence = np.linspace(0.5, 1.0, 150)
    probs = np.stack([confidence, 1 - confidence], axis=1)
    for rate in (0.75, 1.5 - confidence):
        labels = (rng.random(150) > rate).astype(int)
        got = metrics.smooth_ece(probs, labels)
        direct = smooth_direct(confidence, labels == 0, got)
        np.testing.assert_allclose(got, direct, rtol=2e-4)
        assert smooth_direct(confidence, labels == 0, got / 2) > 1.05 * got > 0.05


def test_smooth_ece_at_the_ends():
    sure = np.array([[1.0, 0.0]] * 4)
    assert metrics.smooth_ece(sure, np.zeros(4, int)) < 1e-6
    # A residual of -1 at 1, smoothed by any kernel, keeps its integral.
    assert math.isclose(metrics.smooth_ece(sure, np.ones(4, int)), 1.0, rel_tol=1e-6)


def test_impossible_labels_and_certain_ones():
    sure = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert metrics.nll(sure, np.array([0, 0])) == np.inf
    right, wrong = (metrics.summary(sure, np.array(y)) for y in ([0, 1], [1, 0]))
    assert right["nll"] == 0.0 and math.copysign(1, right["nll"]) == 1
    for name in ("brier", "ece", "ece_mass", "mce", "ace", "sce", "aurc", "entropy"):
        assert right[name] == 0.0, name
    assert wrong["ece"] == 1.0 and wrong["brier"] == 2.0 and wrong["aurc"] == 1.0
    assert wrong["sce"] == 0.5  # a probability of 0 lies in no bin


def test_logarithms_keep_what_underflows():
    log_probs = np.array([[0.0, -2000.0], [-1000.0, 0.0]])
    labels = np.array([1, 0])
    assert metrics.nll(log_probs, labels, log_probs=True) == 1500.0
    assert metrics.evaluate(log_probs, labels)["nll"] == 1500.0
    assert metrics.summary(log_probs, labels, log_probs=True)["nll"] == 1500.0
    assert metrics.nll(np.exp(log_probs), labels) == np.inf


def test_log_probabilities_give_the_same_summary():
    probs, labels = predictions(4, 200, 6)
    got = metrics.summary(np.log(probs), labels, log_probs=True)
    for name, value in metrics.summary(probs, labels).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, err_msg=name)
    four = metrics.evaluate(np.log(probs), labels)
    assert tuple(four) == metrics.NAMES and four == {n: got[n] for n in metrics.NAMES}


def test_a_summary_is_what_the_functions_say():
    probs, labels = predictions(6, 300, 7)
    found = metrics.summary(probs, labels, num_bins=9)
    with_bins = {"ece", "mce", "sce", "ace", "tace", "debiased_ece"}
    names = with_bins | {"accuracy", "nll", "brier", "smooth_ece", "aac", "aurc"}
    names |= {f"misclassification_{x}" for x in ("auroc", "aupr", "fpr95")}
    for name in names | {"ovr_auroc"}:
        bins = {"num_bins": 9} if name in with_bins else {}
        want = getattr(metrics, name)(probs, labels, **bins)
        assert math.isclose(found.pop(name), want, rel_tol=1e-13), name
    parts = metrics.brier_parts(probs, labels, 9)
    assert list(found.items()) == [
        ("top5_accuracy", metrics.top_k_accuracy(probs, labels, 5)),
        ("brier_reliability", parts.reliability),
        ("brier_resolution", parts.resolution),
        ("brier_uncertainty", parts.uncertainty),
        ("ece_mass", metrics.ece(probs, labels, 9, cut="mass")),
        ("entropy", metrics.entropy(probs).mean()),
    ]


def test_of_samples_the_mean_probability_counts():
    samples = np.stack([predictions(seed, 50, 4)[0] for seed in range(3)])
    labels = predictions(0, 50, 4)[1]
    for function in (metrics.accuracy, metrics.nll, metrics.brier, metrics.tace):
        want = function(samples.mean(axis=0), labels)
        assert math.isclose(function(samples, labels), want, rel_tol=1e-12)
    want = metrics.nll(samples, labels)
    got = metrics.nll(np.log(samples), labels, log_probs=True)
    assert math.isclose(got, want, rel_tol=1e-12)
    found = metrics.summary(samples, labels)
    mean = samples.mean(axis=0)
    entropy = -np.sum(mean * np.log(mean), axis=1)
    within = -np.sum(samples * np.log(samples), axis=2).mean(axis=0)
    np.testing.assert_allclose(metrics.entropy(samples), entropy)
    np.testing.assert_allclose(metrics.mutual_information(samples), entropy - within)
    np.testing.assert_allclose(found["mutual_information"], np.mean(entropy - within))
    assert not metrics.mutual_information(samples[[0, 0, 0]]).any()
    with pytest.raises(ValueError, match=r"\(S, N, C\), got \(50, 4\)"):
        metrics.mutual_information(mean)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("log_probs", [False, True])
def test_sums_are_in_float64_whatever_comes(dtype, log_probs):
    """Rows of bfloat16 sum to 1 +- 0.01, which a float64 row may not."""
    probs, labels = predictions(5, 5000, 10)
    softmax = jax.nn.log_softmax if log_probs else jax.nn.softmax
    values = softmax(jnp.log(probs).astype(dtype))
    assert values.dtype == dtype
    exact = np.asarray(values).astype(np.float64)
    sums = (np.exp(exact) if log_probs else exact).sum(axis=1)
    if dtype == "bfloat16":
        assert np.abs(sums - 1).max() > 2e-3
    found = metrics.summary(values, jnp.asarray(labels), log_probs=log_probs)
    p = np.exp(exact) if log_probs else exact
    assert found["accuracy"] == np.mean(exact.argmax(axis=1) == labels)
    of_label = p[np.arange(len(p)), labels]
    np.testing.assert_allclose(found["nll"], -np.mean(np.log(of_label)), rtol=1e-12)
    brier = np.mean(np.sum((p - np.eye(10)[labels]) ** 2, axis=1))
    np.testing.assert_allclose(found["brier"], brier, rtol=1e-12)
    top = np.minimum(p.max(axis=1), 1.0)
    pairs = list(zip(top, exact.argmax(axis=1) == labels, strict=True))
    ece = sum(gap(inside(pairs, b, 15)) for b in range(15)) / len(pairs)
    np.testing.assert_allclose(found["ece"], ece, rtol=1e-9)
    samples = metrics.summary(values[None], labels, log_probs=log_probs)
    assert samples.pop("mutual_information") == 0.0
    for name, value in found.items():
        np.testing.assert_allclose(samples[name], value, rtol=1e-9, err_msg=name)


# -- ranks, edges and zeros -----------------------------------------------------------


def test_logarithms_rank_what_underflows():
    """The label is the second of seven, whatever the size of the others."""
    log_probs = np.array([[-900.0] * 5 + [-800.0, 0.0]])
    p = metrics.check(log_probs, [5], log_probs=True)
    hits = [metrics.top_k_accuracy(p, p.labels, k) for k in range(1, 8)]
    assert hits == [0.0] + [1.0] * 6
    assert metrics.summary(log_probs, [5], log_probs=True)["top5_accuracy"] == 1.0


def test_one_vs_rest_ranks_logarithms():
    """As log-odds do, up to where the other classes' probabilities underflow."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 4)) * 900.0
    labels = (logits + 900.0 * rng.gumbel(size=logits.shape)).argmax(axis=1)
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    assert (np.exp(log_probs) == 0.0).mean() > 0.3
    want = []
    for c in range(4):
        others = np.logaddexp.reduce(np.delete(logits, c, axis=1), axis=1)
        odds = np.minimum(logits[:, c] - others, 745.2)
        want.append(sk.roc_auc_score(labels == c, odds))
    p = metrics.check(log_probs, labels, log_probs=True)
    found = metrics.summary(log_probs, labels, log_probs=True)
    assert found["ovr_auroc"] == metrics.ovr_auroc(p, labels)
    np.testing.assert_allclose(found["ovr_auroc"], np.mean(want), rtol=1e-12)
    assert abs(metrics.ovr_auroc(np.exp(log_probs), labels) - np.mean(want)) > 1e-3


def test_confidence_near_one_is_ranked_by_its_logarithm():
    log_p = -np.array([1e-30, 1e-25, 1e-20, 1e-18])  # all are 1 in float64
    log_probs = np.stack([log_p, np.log(-log_p)], axis=1)
    p = metrics.check(log_probs, [0, 0, 1, 1], log_probs=True)
    assert metrics.misclassification_auroc(p, p.labels) == 1.0
    np.testing.assert_allclose(metrics.aurc(p, p.labels), (0 + 0 + 1 / 3 + 1 / 2) / 4)
    inside, outside = (
        metrics.check(x, [0, 0], log_probs=True) for x in (log_probs[:2], log_probs[2:])
    )
    assert metrics.ood_auroc(inside, outside) == 1.0
    assert metrics.ood_auroc(np.exp(log_probs[:2]), outside) == 0.5  # on one scale


@pytest.mark.parametrize("num_bins", range(1, 64))
def test_edges_are_the_nearest_numbers_to_their_fractions(num_bins):
    exact = [float(Fraction(k, num_bins)) for k in range(num_bins + 1)]
    p = np.array(exact[num_bins // 2 + 1 : -1] or [1.0])
    p = np.concatenate([p, np.nextafter(p, 2.0)[p < 1.0]])
    probs = np.stack([p, 1.0 - p], axis=1)
    found = metrics.reliability(probs, np.zeros(len(p), int), num_bins)
    assert found.edges.tolist() == exact
    counts = [sum(a < x <= b for x in p) for a, b in itertools.pairwise(exact)]
    assert found.counts.tolist() == counts  # an edge counts in the bin below it


def test_entropy_is_never_negative():
    assert metrics.entropy([[1.0009, 0.0]]).tolist() == [0.0]
    samples = np.array([[[1.0009, 0.0]], [[0.9995, 0.0]]])
    assert metrics.entropy(samples) >= 0 and metrics.mutual_information(samples) >= 0


@pytest.mark.parametrize("log_probs", [False, True])
def test_the_order_of_samples_changes_no_bit(log_probs):
    """The mean is that of exact sums, also of members that rule a class out."""
    rng = np.random.default_rng(0)
    samples = rng.dirichlet(np.full(6, 0.2), (9, 50))
    samples[::2, :9, 1] = samples[:, :3, 2] = 0.0
    samples /= samples.sum(axis=-1, keepdims=True)
    labels = rng.integers(3, 6, 50)
    with np.errstate(divide="ignore"):
        given = np.log(samples) if log_probs else samples
    want = metrics.summary(given, labels, log_probs=log_probs)
    for order in (np.arange(9)[::-1], rng.permutation(9)):
        found = metrics.summary(given[order], labels, log_probs=log_probs)
        # A sum over samples of its own, which ranks nothing.
        found["mutual_information"] = pytest.approx(found["mutual_information"])
        assert want == found
    ((_, found),) = metrics.check(given, labels, log_probs=log_probs).rows()
    exact = np.apply_along_axis(math.fsum, 0, samples) / 9
    np.testing.assert_allclose(found, exact, rtol=1e-13)


@pytest.mark.parametrize("log_probs", [False, True])
def test_every_sample_must_be_a_distribution(log_probs):
    """Their mean is [0.5, 0.5]."""
    samples = np.array([[[0.5, 0.5]], [[0.2, 0.2]], [[0.8, 0.8]]])
    given = np.log(samples) if log_probs else samples
    with pytest.raises(ValueError, match=r"row 0 of sample 1.*sum"):
        metrics.check(given, [0], log_probs=log_probs)
    state = streaming.update(streaming.init(2), given, [0], log_probs=log_probs)
    with pytest.raises(ValueError, match="1 of 1 examples are no distributions"):
        streaming.compute(state)
    with pytest.raises(ValueError, match="row 0 of sample 1.*logits"):
        metrics.mutual_information([[[0.5, 0.5]], [[1.5, -0.5]], [[-0.5, 1.5]]])


# -- bad input ------------------------------------------------------------------------

HALF = np.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (np.full((3, 2), 0.5), np.zeros(2, int), r"\(N, C\).*\(3, 2\) and \(2,\)"),
        (HALF, np.eye(2, dtype=int), "argmax of one-hot"),
        (np.zeros((0, 2)), np.zeros(0, int), "empty set"),
        (np.ones((2, 1)), np.zeros(2, int), "at least two classes"),
        (HALF, np.zeros(2), "integers, got dtype float64"),
        (HALF, np.array([0, 2]), r"0\.\.1 for 2 classes, got 0\.\.2"),
        (HALF, np.array([-1, 0]), r"0\.\.1 for 2 classes, got -1\.\.0"),
        (np.array([[0.5, 0.5], [2.0, 1.0]]), [0, 0], r"row 1 is \[2.* logits\? "),
        (np.array([[1.5, -0.5]]), [0], "logits.*jax.nn.softmax"),
        (np.log(HALF), [0, 1], r"log-probabilities\? Give np.exp"),
        (np.array([[0.5, 0.4]]), [0], "sums to 0.9. Divide rows"),
        (np.array([[np.nan, 0.5]]), [0], "row 0 holds NaN"),
        (np.array([[np.inf, 0.5]]), [0], "probabilities that sum to 1"),
        (np.array([[0.5j, 0.5]]), [0], "real numbers"),
        (np.array([["a", "b"]]), [0], "real numbers"),
    ],
)
def test_bad_input_is_refused(probs, labels, message):
    for name in (
        "accuracy nll brier ece sce ace tace aac misclassification_auroc ovr_auroc "
        "top_k_accuracy brier_parts reliability mce debiased_ece smooth_ece aurc "
        "risk_coverage summary"
    ).split():
        with pytest.raises((ValueError, TypeError), match=message):
            getattr(metrics, name)(probs, labels)


@pytest.mark.parametrize("shape", [(2, 3), (4, 2, 3)])
def test_large_logits_are_refused_and_nothing_overflows(shape):
    logits = np.full(shape, 1000.0)
    for function in (metrics.check, metrics.summary, metrics.nll):
        with pytest.raises(ValueError, match="logarithms of probabilities"):
            function(logits, [0, 1], log_probs=True)


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        ([[2.0, 1.0]], "sum to 10.107.*jax.nn.log_softmax"),
        ([[np.nan, 0.0]], "row 0 holds NaN"),
        ([[0.5, 0.5]], "sum to 3.29"),
    ],
)
def test_bad_log_probabilities_are_refused(log_probs, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(log_probs, [0])


def test_bad_options_are_refused():
    probs, labels = predictions(0, 20, 3)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        metrics.ece(probs, labels, 0)
    with pytest.raises(ValueError, match="one of 'width', 'mass'; got 'count'"):
        metrics.ece(probs, labels, cut="count")
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        metrics.tace(probs, labels, threshold=1.0)
    with pytest.raises(ValueError, match=r"1\.\.3, the number of classes, got 4"):
        metrics.top_k_accuracy(probs, labels, 4)
    # A number between 2 and 3 counts three classes, and bins past 1.
    for call in (
        lambda: metrics.top_k_accuracy(probs, labels, 2.5),
        lambda: metrics.top_k_accuracy(probs, labels, True),
        lambda: metrics.brier_parts(probs, labels, 1.5),
        lambda: metrics.ece(probs, labels, 15.0),
        lambda: metrics.ece(probs, labels, 2.5, cut="mass"),
        lambda: metrics.aac(probs, labels, 2.5),
    ):
        with pytest.raises(TypeError, match="must be an integer"):
            call()
    hidden = np.ma.masked_array(labels, mask=labels == 0)
    for masked in (
        (probs, hidden),
        (np.ma.masked_array(probs, mask=probs > 0.9), labels),
    ):
        for call in (
            metrics.accuracy,
            functools.partial(metrics.bootstrap, metrics.accuracy),
            functools.partial(metrics.bootstrap_all, metrics.evaluate),
            lambda p, y: metrics.paired_test(metrics.accuracy, probs, p, y),
            lambda p, y: diversity.nll_ambiguity(np.ma.log(np.ma.stack([p, p])), y),
            lambda p, y: calibration.fit_temperature(np.ma.log(p), y),
            lambda p, y: metrics.auroc(p.ravel(), np.ma.repeat(y == 1, 3)),
            lambda p, y: calibration.coverage(p > 0.5, y),
        ):
            with pytest.raises(TypeError, match="masked entries"):
                call(*masked)
    checked = metrics.check(probs, labels)
    with pytest.raises(ValueError, match="come with their labels"):
        metrics.accuracy(checked, (labels + 1) % 3)
