"""Rankings by confidence against scikit-learn and pairs that are counted."""

import itertools
import math
from fractions import Fraction

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from sklearn import metrics as sk

from otmdr_jax import metrics
from tests.metrics.test_metrics import predictions, settings


def with_ties(probs):
    """Coarser probabilities, of which many are equal."""
    probs = np.round(probs * 12) + 1
    return probs / probs.sum(axis=1, keepdims=True)


@st.composite
def scored(draw):
    """Scores with ties and both kinds of examples."""
    n = draw(st.integers(2, 60))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    positive = rng.random(n) < 0.4
    positive[:2] = [True, False]
    return rng.integers(0, draw(st.integers(1, 100)), n) / 100, positive


@settings
@hypothesis.given(scored())
def test_detection_is_scikit_learns(case):
    scores, positive = case
    auroc = sk.roc_auc_score(positive, scores)
    np.testing.assert_allclose(metrics.auroc(scores, positive), auroc, atol=1e-12)
    precision = sk.average_precision_score(positive, scores)
    np.testing.assert_allclose(metrics.average_precision(scores, positive), precision)
    fpr, tpr, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    for rate in (0.3, 0.95, 1.0):
        want = fpr[np.argmax(tpr >= rate - 1e-12)]
        np.testing.assert_allclose(metrics.fpr_at_tpr(scores, positive, rate), want)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_infinite_scores_are_ties_as_any_others(order):
    """The difference of two infinite scores is NaN, not 0."""
    positive = np.array([True, False, True, False])[order]
    for low, high in ((-np.inf, 0.0), (0.0, np.inf), (-np.inf, np.inf)):
        scores = np.array([high, high, low, low])[order]
        equal = np.array([1.0, 1.0, 0.0, 0.0])[order]
        for measure in (metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr):
            assert measure(scores, positive) == measure(equal, positive)


def test_scores_are_compared_as_they_are():
    """Of integers float64 makes some equal; of complex numbers half is nothing."""
    positive = np.array([False, True])
    for measure in (metrics.auroc, metrics.average_precision):
        assert measure(np.array([2**60, 2**60 + 1]), positive) == 1.0
        assert measure(np.array([False, True]), positive) == 1.0
        with pytest.raises(TypeError, match="scores must be real numbers"):
            measure(np.array([1.0, 1.0j]), positive)


@pytest.mark.parametrize("tpr", ["0.55", "0.95", "0.7", "0.3"])
def test_the_rate_is_reached_where_it_is_in_decimals(tpr):
    """0.55 * 100 is 55.00000000000001 in float64."""
    for count in (20, 100, 180, 200, 340, 1000):
        scores = -np.arange(2 * count)  # positives and negatives by turns
        need = math.ceil(Fraction(tpr) * count)
        found = metrics.fpr_at_tpr(scores, np.arange(2 * count) % 2 == 0, float(tpr))
        assert found == (need - 1) / count


def test_auroc_is_the_fraction_of_pairs_in_order():
    scores, positive = [0.1, 0.4, 0.4, 0.35, 0.8], [False, True, False, False, True]
    # (0.4 > 0.1, 0.4 = 0.4, 0.4 > 0.35) and all three below 0.8
    assert metrics.auroc(scores, positive) == (2.5 + 3) / 6


def test_misclassification_is_detected_by_confidence():
    probs, labels = predictions(0, 400, 5, 3.0)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    got = metrics.misclassification_auroc(probs, labels)
    np.testing.assert_allclose(got, sk.roc_auc_score(right, confidence), rtol=1e-12)
    assert 0.55 < got < 0.95  # it tells which way round
    got = metrics.misclassification_aupr(probs, labels)
    want = sk.average_precision_score(~right, -confidence)
    np.testing.assert_allclose(got, want)
    fpr, tpr, _ = sk.roc_curve(right, confidence, drop_intermediate=False)
    want = fpr[np.argmax(tpr >= 0.95)]
    np.testing.assert_allclose(metrics.misclassification_fpr95(probs, labels), want)


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_one_vs_rest_is_scikit_learns(classes):
    probs, labels = predictions(1, 300, classes, 3.0)
    probs = with_ties(probs)
    want = np.mean([sk.roc_auc_score(labels == c, probs[:, c]) for c in range(classes)])
    np.testing.assert_allclose(metrics.ovr_auroc(probs, labels), want, rtol=1e-12)
    if classes > 2:
        want = sk.roc_auc_score(labels, probs, multi_class="ovr")
        np.testing.assert_allclose(metrics.ovr_auroc(probs, labels), want, rtol=1e-12)


def test_a_class_without_examples_does_not_count():
    probs, labels = predictions(2, 200, 4)
    probs, labels = probs[labels != 3], labels[labels != 3]
    want = np.mean([sk.roc_auc_score(labels == c, probs[:, c]) for c in range(3)])
    np.testing.assert_allclose(metrics.ovr_auroc(probs, labels), want, rtol=1e-12)


def aac_loop(probs, labels, steps=10):
    order = sorted(range(len(labels)), key=lambda i: probs[i].max())
    hits = [int(probs[i].argmax() == labels[i]) for i in order]
    points = [
        sum(hits[i:]) / len(hits[i:]) for i in range(1, len(hits), len(hits) // steps)
    ]
    area = sum((a + b) / 2 for a, b in zip(points[:-1], points[1:], strict=True))
    return 1 - area / steps


@pytest.mark.parametrize("n", [10, 11, 19, 137, 1000, 1003])
def test_aac_is_the_fields(n):
    probs, labels = predictions(n, n, 3, 3.0)
    want = aac_loop(probs, labels)
    assert abs(metrics.aac(probs, labels) - want) < 1e-12
    want = aac_loop(probs, labels, 5)
    assert abs(metrics.aac(probs, labels, num_steps=5) - want) < 1e-12


@pytest.mark.parametrize(
    ("n", "area"), [(10, 0.2), (19, -0.7), (20, 0.1), (359, 0.0), (360, 0.1)]
)
def test_aac_of_a_model_that_is_always_right_depends_on_the_size(n, area):
    """As the documentation warns: 1 - (points - 1) / 10."""
    probs = np.tile([0.9, 0.1], (n, 1))
    assert metrics.aac(probs, np.zeros(n, int)) == pytest.approx(area)
    assert metrics.aac(probs, np.ones(n, int)) == pytest.approx(1.0)


def test_aac_of_equal_confidences_is_the_mean_over_their_orders():
    """Sorted by label, a constant prediction had .66 or .36 in place of .3."""
    probs, labels = predictions(3, 6, 3)
    probs = with_ties(probs / 3 + 2 / 9)
    orders = [list(order) for order in itertools.permutations(range(6))]
    want = np.mean([aac_loop(probs[i], labels[i], 3) for i in orders])
    for order in orders[:: len(orders) // 5]:
        got = metrics.aac(probs[order], labels[order], num_steps=3)
        assert abs(got - want) < 1e-12


def test_risk_coverage_does_not_depend_on_the_order_of_equal_confidences():
    """The mean over all orders of the tied ones."""
    probs = np.array([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3], [0.7, 0.3], [0.6, 0.4]])
    labels = np.array([0, 1, 0, 0, 1])
    curve = metrics.risk_coverage(probs, labels)
    want = [0, (1 / 3) / 2, (2 / 3) / 3, 1 / 4, 2 / 5]
    np.testing.assert_allclose(curve.risk, want, atol=1e-15)
    np.testing.assert_allclose(curve.coverage, np.arange(1, 6) / 5)
    np.testing.assert_allclose(metrics.aurc(probs, labels), np.mean(want))
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(5)
        again = metrics.risk_coverage(probs[order], labels[order])
        np.testing.assert_allclose(again.risk, want, atol=1e-15)


def test_aurc_of_distinct_confidences():
    probs, labels = predictions(3, 200, 4)
    order = np.argsort(-probs.max(axis=1))
    wrong = probs.argmax(axis=1)[order] != labels[order]
    want = np.mean([wrong[:k].mean() for k in range(1, 201)])
    np.testing.assert_allclose(metrics.aurc(probs, labels), want, rtol=1e-12)


def test_aurc_of_the_best_order():
    """What the docstring says: e + (1 - e) log(1 - e)."""
    n, e = 20_000, 0.2
    wrong = np.arange(n) >= n * (1 - e)
    confidence = np.linspace(0.99, 0.51, n)
    probs = np.stack([confidence, 1 - confidence], axis=1)
    want = e + (1 - e) * np.log(1 - e)
    np.testing.assert_allclose(metrics.aurc(probs, wrong.astype(int)), want, rtol=1e-3)


def test_out_of_distribution_examples_are_less_certain():
    rng = np.random.default_rng(0)
    inside = np.stack([predictions(seed, 80, 4, 4.0)[0] for seed in range(3)])
    outside = rng.dirichlet(np.ones(4), (3, 60))
    truth = [0] * 80 + [1] * 60
    for score, of_probs in (
        ("confidence", lambda x: -x.mean(axis=0).max(axis=1)),
        ("entropy", metrics.entropy),
        ("mutual_information", metrics.mutual_information),
    ):
        scores = np.concatenate([of_probs(inside), of_probs(outside)])
        want = sk.roc_auc_score(truth, scores)
        got = metrics.ood_auroc(inside, outside, score)
        np.testing.assert_allclose(got, want, rtol=1e-12)
    with pytest.raises(
        ValueError, match="'confidence', 'entropy', 'mutual_information'"
    ):
        metrics.ood_auroc(inside, outside, "energy")


@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_decide_ties(seed):
    """Equal members, one distribution in any order of classes, samples in any order."""
    rng = np.random.default_rng(seed)
    one, other = (rng.dirichlet(np.ones(10), n) for n in (30, 20))
    for count in (2, 3, 7):
        same = [np.stack([x] * count) for x in (one, other)]
        assert metrics.ood_auroc(*same, "mutual_information") == 0.5
    orders = np.stack([rng.permutation(one[0]) for _ in range(40)])
    for score in ("confidence", "entropy"):
        assert metrics.ood_auroc(orders[:25], orders[25:], score) == 0.5
    members = rng.dirichlet(np.ones(10), 5)
    examples = np.stack(
        [rng.permutation(members, axis=1)[rng.permutation(5)] for _ in range(40)], 1
    )
    for score in ("confidence", "entropy", "mutual_information"):
        assert metrics.ood_auroc(examples[:, :25], examples[:, 25:], score) == 0.5


@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_samples_does_not_decide_ties(seed, log_probs):
    """Examples that have the same samples, in any order, are ranked alike: 0.5."""
    rng = np.random.default_rng(seed)
    members = rng.dirichlet(np.full(5, 0.3), 7).astype(np.float32)
    examples = np.stack([rng.permutation(members) for _ in range(200)], axis=1)
    values = np.log(examples) if log_probs else examples
    p = metrics.check(values, rng.integers(0, 5, 200), log_probs=log_probs)
    assert metrics.ovr_auroc(p, p.labels) == 0.5
    assert metrics.misclassification_auroc(p, p.labels) == 0.5
    assert np.unique(metrics.risk_coverage(p, p.labels).risk.round(12)).size == 1
    if log_probs:
        other = metrics.check(values[:, ::-1], p.labels, log_probs=True)
        for score in ("confidence", "entropy", "mutual_information"):
            assert metrics.ood_auroc(p, other, score) == 0.5


def test_the_order_of_classes_does_not_decide_how_sure_it_is():
    """One distribution that float32 rounds to 1, its classes in any order."""
    rng = np.random.default_rng(0)
    one = np.append(0.0, rng.uniform(-25, -16, 9)).astype(np.float32)
    log_probs = np.stack([rng.permutation(one) for _ in range(200)])
    p = metrics.check(log_probs, rng.integers(0, 10, 200), log_probs=True)
    assert np.unique(p.confidence_key).size == 1
    right = -math.fsum(np.exp(one[1:].astype(float)))
    assert p.confidence_key[0] == pytest.approx(right, rel=1e-15)


def test_sure_predictions_in_float32_are_ranked_by_what_others_leave():
    """Their own logarithm is 0 throughout; the logits are of a torchmetrics report."""
    logits = [98.0950, 98.4612, 98.1145, 98.1506, 97.6037, 98.9425, 99.2644, 99.5014]
    logits += [99.7280, 99.6595, 99.6931, 99.4667, 99.9623, 99.8949, 99.8768]
    labels = np.array([0] + [1] * 14)
    rows = np.stack([np.zeros(15), logits], axis=1).astype(np.float32)
    log_probs = np.asarray(jax.nn.log_softmax(rows))
    assert not log_probs[:, 1].any()
    p = metrics.check(log_probs, labels, log_probs=True)
    want = sk.roc_auc_score(labels, logits)
    assert want == pytest.approx(13 / 14)
    for found in (
        metrics.ovr_auroc(p, labels),
        metrics.misclassification_auroc(p, labels),
        metrics.summary(log_probs, labels, log_probs=True)["ovr_auroc"],
    ):
        assert found == pytest.approx(want)
    assert metrics.ovr_auroc(np.exp(log_probs), labels) == pytest.approx(0.5, abs=0.25)


def test_sets_of_different_models_are_refused():
    with pytest.raises(ValueError, match="one model, but they have 2 and 3 classes"):
        metrics.ood_auroc(RIGHT, [[0.3, 0.3, 0.4]])


RIGHT = np.array([[0.9, 0.1], [0.8, 0.2]])


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_one_kind_alone_is_refused(labels):
    right = 2 if labels == [0, 0] else 0
    for name in ("auroc", "aupr", "fpr95"):
        with pytest.raises(ValueError, match=f"needs both, but {right} of 2 are right"):
            getattr(metrics, f"misclassification_{name}")(RIGHT, labels)
    with pytest.raises(
        ValueError, match=f"two classes, but all labels are {labels[0]}"
    ):
        metrics.ovr_auroc(RIGHT, labels)
    found = metrics.summary(RIGHT, labels)
    assert np.isnan([found["misclassification_fpr95"], found["ovr_auroc"]]).all()


def test_bad_scores_are_refused():
    for function in (metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr):
        with pytest.raises(ValueError, match="0 of 2 examples are positive"):
            function([0.1, 0.2], [False, False])
        with pytest.raises(ValueError, match="got NaN"):
            function([0.1, np.nan], [False, True])
        with pytest.raises(ValueError, match=r"\(N,\), got \(2,\) and \(3,\)"):
            function([0.1, 0.2], [False, True, True])
        with pytest.raises(TypeError, match="bools, got dtype int64"):
            function([0.1, 0.2], [0, 1])
    with pytest.raises(ValueError, match=r"\(0, 1\], got 0"):
        metrics.fpr_at_tpr([0.1, 0.2], [False, True], 0.0)
    with pytest.raises(ValueError, match="num_steps = 10 for N = 2"):
        metrics.aac(RIGHT, [0, 1])
