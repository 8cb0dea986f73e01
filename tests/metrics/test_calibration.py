"""Calibrators against SciPy's optimum, folds that leak nothing, coverage of sets."""

import functools
import math
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from otmdr_jax import metrics
from otmdr_jax.metrics import calibration
from otmdr_jax.metrics.calibration.scaling import log_softmax
from tests.marks import one_axis_at_a_time


def sample(seed, n=300, classes=4, temperature=2.5):
    """Logits, and labels drawn from their softmax at a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 3
    noise = rng.gumbel(size=logits.shape)
    return logits, (logits / temperature + noise).argmax(axis=1)


def loss(logits, labels):
    return -np.mean(log_softmax(logits)[np.arange(len(labels)), labels])


# -- scaling --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 8.0])
def test_temperature_is_scipys_optimum(temperature):
    logits, labels = sample(0, temperature=temperature)

    def slope(t):  # d NLL / d(1 / T), at whose root the optimum lies
        probs = np.exp(log_softmax(logits / t))
        of_label = logits[np.arange(len(labels)), labels]
        return np.mean((probs * logits).sum(axis=1) - of_label)

    want = scipy.optimize.brentq(slope, 0.05, 50.0, xtol=1e-12)
    got = calibration.fit_temperature(logits, labels)
    assert isinstance(got, float)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got, temperature, rtol=0.25)
    shifted = calibration.fit_temperature(log_softmax(logits), labels)
    np.testing.assert_allclose(shifted, want, rtol=1e-6)  # log-probabilities serve too


def test_float32_logits_are_fitted_in_float64_and_nothing_is_switched():
    logits, labels = sample(1)
    got = calibration.fit_temperature(logits.astype(np.float32), labels)
    exact = calibration.fit_temperature(
        logits.astype(np.float32).astype(np.float64), labels
    )
    assert got == exact
    assert not jax.config.jax_enable_x64 and jax.numpy.ones(1).dtype == np.float32


def test_where_no_temperature_is_best_the_nearest_bound_is():
    logits = np.array([[3.0, 0.0], [0.0, 2.0]])
    with pytest.warns(UserWarning, match="falls below .* 0.01.* all predictions are"):
        assert calibration.fit_temperature(logits, [0, 1]) == 0.01
    for wrong in (logits, np.zeros((2, 2))):  # of zeros any temperature is best
        with pytest.warns(UserWarning, match="falls above .* 100.0.* no better than"):
            assert calibration.fit_temperature(wrong, [1, 0]) == 100.0


def scipys(logits, labels, start, unpack, l2):
    onehot = np.eye(logits.shape[1])[labels]

    def value_and_grad(flat):
        weight, bias = unpack(flat)
        scaled = logits @ weight.T + bias
        error = (np.exp(log_softmax(scaled)) - onehot) / len(labels)
        gradient = np.concatenate([(error.T @ logits).ravel(), error.sum(axis=0)])
        if len(flat) == 2 * len(bias):  # a vector's weights are the diagonal
            diagonal = (error * logits).sum(axis=0)
            gradient = np.concatenate([diagonal, error.sum(axis=0)])
        moved = flat - start
        return loss(scaled, labels) + l2 / 2 * moved @ moved, gradient + l2 * moved

    options = {"gtol": 1e-10, "ftol": 1e-16, "maxiter": 5000, "maxfun": 9999}
    return scipy.optimize.minimize(
        value_and_grad, start, jac=True, method="L-BFGS-B", options=options
    )


@pytest.mark.slow
@one_axis_at_a_time(l2=[0.01, 0.0, None], kind=["matrix", "vector"])
def test_scaling_is_scipys_optimum(kind, l2):
    """None is a Gaussian prior of deviation 1, of which each example sees 1 / N."""
    logits, labels = sample(2, n=400, classes=3)
    given, l2 = l2, 1 / 400 if l2 is None else l2
    logits = logits @ np.array([[1.0, 0.3, 0.0], [0.0, 0.8, 0.0], [0.2, 0.0, 1.4]])
    logits += [0.5, 0.0, -1.0]
    eye = np.eye(3)

    def unpack(flat):
        weight = np.diag(flat[:3]) if kind == "vector" else flat[:9].reshape(3, 3)
        return weight, flat[-3:]

    ones = np.ones(3) if kind == "vector" else eye.ravel()
    want = scipys(logits, labels, np.append(ones, np.zeros(3)), unpack, l2)
    got = getattr(calibration, f"fit_{kind}")(logits, labels, l2=given)
    weight, bias = unpack(want.x)
    np.testing.assert_allclose(
        np.exp(got(logits)), np.exp(log_softmax(logits @ weight.T + bias)), atol=1e-6
    )
    mine = np.append(np.ravel(got.weight), got.bias)
    penalty = l2 / 2 * np.sum((mine - np.append(ones, np.zeros(3))) ** 2)
    value = loss(got(logits), labels) + penalty
    assert abs(value - want.fun) < 1e-10
    assert value < loss(logits, labels) - 0.01
    if l2:  # without it a number added to all biases changes nothing
        np.testing.assert_allclose(mine, want.x, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_classes_that_can_be_told_apart_do_not_make_it_sure_of_all(kind):
    """Sixty examples of five classes: without a penalty weights have no bound."""
    rng = np.random.default_rng(0)
    labels = np.arange(1000) % 5
    logits = 3.0 * np.eye(5)[labels] + rng.normal(size=(1000, 5))
    fit = getattr(calibration, f"fit_{kind}")
    few, rest = slice(60), slice(60, None)
    raw = loss(logits[rest], labels[rest])
    assert loss(fit(logits[few], labels[few])(logits[rest]), labels[rest]) < 1.1 * raw
    bare = fit(logits[few], labels[few], l2=0)
    assert loss(bare(logits[rest]), labels[rest]) > 1.2 * raw


def test_a_fit_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(calibration.scaling, "_STEPS", 1)
    logits, labels = sample(2, n=77, classes=3)
    with pytest.warns(UserWarning, match="matrix scaling has not converged.* l2 > 0"):
        calibration.fit_matrix(logits, labels, l2=0.0)


def test_isotonic_is_increasing_and_never_impossible():
    logits, labels = sample(3, n=600, classes=3, temperature=4.0)
    isotonic = calibration.fit_isotonic(logits, labels)
    probs, after = np.exp(log_softmax(logits)), np.exp(isotonic(logits))
    np.testing.assert_allclose(after.sum(axis=1), 1.0)
    assert after.min() > 0.0
    assert metrics.sce(after, labels) < 0.2 * metrics.sce(probs, labels)
    for c, fit in enumerate(isotonic.of_classes):
        steps = fit.predict(np.sort(probs[:, c]))
        assert (np.diff(steps) >= 0).all()
        # A block of pooled adjacent violators has its frequency.
        np.testing.assert_allclose(steps.mean(), np.mean(labels == c), atol=0.01)
    sure = calibration.fit_isotonic(np.array([[9.0, -9.0]] * 8), [0] * 8)
    np.testing.assert_allclose(np.exp(sure([[9.0, -9.0]])), [[0.9, 0.1]], rtol=1e-6)


def test_isotonic_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.isotonic", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*'.\[train\]'"):
        calibration.fit_isotonic(*sample(0))


# -- folds ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_protocol_is_two_folds_five_times_raw_beside_calibrated():
    logits, labels = sample(4, n=401)
    seen = []

    def spy(rest, its_labels):
        rows = [np.flatnonzero((logits == row).all(axis=1))[0] for row in rest]
        np.testing.assert_array_equal(labels[rows], its_labels)
        seen.append(set(rows))
        return calibration.METHODS["temperature"](rest, its_labels)

    found = calibration.cross_calibrate(logits, labels, spy, seed=3)
    assert len(seen) == len(found.calibrators) == 10
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert not one & other and one | other == set(range(401))
    assert len({frozenset(rows) for rows in seen}) == 10  # shuffled anew
    raw, after = {}, {}
    for rows, calibrator in zip(seen, found.calibrators, strict=True):
        held_out = np.array(sorted(set(range(401)) - rows))
        want = calibration.fit_temperature(logits[sorted(rows)], labels[sorted(rows)])
        np.testing.assert_allclose(1 / calibrator.weight, want, rtol=1e-6)
        for sums, scale in ((raw, 1.0), (after, want)):
            log_probs = log_softmax(logits[held_out] / scale)
            for name, x in metrics.evaluate(log_probs, labels[held_out]).items():
                sums.setdefault(name, []).append(x)
    for name, pair in found.metrics.items():
        np.testing.assert_allclose(pair.raw, np.mean(raw[name]), rtol=1e-9)
        np.testing.assert_allclose(pair.calibrated, np.mean(after[name]), rtol=1e-6)
        np.testing.assert_allclose(pair.raw_std, np.std(raw[name], ddof=1))
        np.testing.assert_allclose(
            pair.calibrated_std, np.std(after[name], ddof=1), rtol=1e-4, atol=1e-12
        )
    assert found.metrics["ece"].calibrated < found.metrics["ece"].raw
    assert found.metrics["accuracy"].calibrated == found.metrics["accuracy"].raw


@pytest.mark.parametrize("num_folds", [2, 3])
def test_no_label_leaks_into_what_it_is_measured_on(num_folds):
    """A calibrator that remembers labels is right on what it was fitted on alone."""
    logits, labels = sample(5, n=90)

    def remember(rest, its_labels):
        known = {row.tobytes(): y for row, y in zip(rest, its_labels, strict=True)}

        def calibrator(new):
            probs = np.full(new.shape, 0.25)
            for i, row in enumerate(new):
                if (y := known.get(row.tobytes())) is not None:
                    probs[i] = np.eye(4)[y] * 0.96 + 0.01
            return np.log(probs)

        assert metrics.evaluate(calibrator(rest), its_labels)["accuracy"] == 1.0
        return calibrator

    measured = []

    def measure(log_probs, its_labels):
        measured.append(its_labels.tolist())
        return metrics.evaluate(log_probs, its_labels)

    found = calibration.cross_calibrate(
        logits, labels, remember, measure=measure, num_folds=num_folds, num_repeats=2
    )
    assert measured[::2] == measured[1::2]  # raw and calibrated
    assert {len(its_labels) for its_labels in measured} == {90 // num_folds}
    assert len(found.calibrators) == 2 * num_folds
    assert math.isclose(found.metrics["nll"].calibrated, math.log(4))


@pytest.mark.slow
def test_every_method_and_metric_goes_through_the_folds():
    logits, labels = sample(6, n=400, classes=3)
    measure = functools.partial(metrics.summary, log_probs=True)
    for method in calibration.METHODS:
        found = calibration.cross_calibrate(
            logits, labels, method, measure=measure, num_repeats=1
        )
        assert set(found.metrics) == set(measure(log_softmax(logits), labels))
        assert found.metrics["smooth_ece"].calibrated < found.metrics["smooth_ece"].raw
    again = calibration.cross_calibrate(
        logits, labels, method, measure=measure, num_repeats=1
    )
    assert again.metrics == found.metrics  # seeded


# -- conformal prediction -------------------------------------------------------------


def scores_loop(probs, score, penalty, free_ranks, u):
    found = np.empty_like(probs)
    for i, p in enumerate(probs):
        for c in range(len(p)):
            above = [x for x in p if x > p[c]]
            aps = sum(above) + u[i] * p[c]
            extra = penalty * max(0, len(above) + 1 - free_ranks)
            found[i, c] = {"lac": 1 - p[c], "aps": aps, "raps": aps + extra}[score]
    return found


@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
@pytest.mark.parametrize("randomised", [True, False])
def test_sets_are_those_of_the_definitions(score, randomised):
    logits, labels = sample(7, n=60, classes=6)
    probs = np.exp(log_softmax(logits))
    conformal = calibration.fit_conformal(
        probs[:30],
        labels[:30],
        0.15,
        score=score,
        penalty=0.1,
        free_ranks=2,
        randomised=randomised,
        seed=5,
    )
    draws = calibration.conformal._uniform(probs, 5)
    one, two = (draws if randomised else np.ones(60)).reshape(2, 30)
    want = scores_loop(probs[:30], score, 0.1, 2, one)[np.arange(30), labels[:30]]
    threshold = sorted(want)[math.ceil(31 * 0.85) - 1]
    assert math.isclose(conformal.threshold, threshold, rel_tol=1e-12)
    sets = conformal.sets(probs[30:])
    want = scores_loop(probs[30:], score, 0.1, 2, two) <= threshold + 1e-12
    np.testing.assert_array_equal(sets, want)
    assert calibration.coverage(sets, labels[30:]) == np.mean(
        [sets[i, y] for i, y in enumerate(labels[30:])]
    )


@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
def test_coverage_is_what_theory_says(score):
    """Exactly k / (n + 1) on average where scores do not tie, for any model.

    With n = 10 the quantile's + 1 and rounding up make a difference of 0.09.
    """
    n, alpha = 10, 0.1
    logits, labels = sample(8, n=4000 * (n + 1) // 11, classes=5)
    wrong_model = np.exp(log_softmax(logits[:, ::-1] * 2.0))
    hits = []
    for i, start in enumerate(range(0, len(labels) - n, n + 1)):
        rows = slice(start, start + n)
        one = slice(start + n, start + n + 1)
        conformal = calibration.fit_conformal(
            wrong_model[rows], labels[rows], alpha, score=score, seed=i
        )
        sets = conformal.sets(wrong_model[one])
        hits.append(calibration.coverage(sets, labels[one]))
    want = math.ceil((n + 1) * (1 - alpha)) / (n + 1)
    assert len(hits) > 350
    low, high = scipy.stats.binom.interval(0.998, len(hits), want)
    assert low <= sum(hits) <= high


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("score", ["aps", "raps"])
def test_coverage_does_not_depend_on_how_examples_come(score, seed):
    """One by one, in batches or at once; of sure predictions, whose sets are small."""
    logits, labels = sample(10 + seed, n=3000, classes=5, temperature=1.0)
    probs = np.exp(log_softmax(logits)).astype(np.float32)
    fitted = calibration.fit_conformal(probs[:2000], labels[:2000], score=score, seed=4)
    at_once = fitted.sets(probs[2000:])
    single = np.concatenate([fitted.sets(row[None]) for row in probs[2000:]])
    batches = np.concatenate([fitted.sets(x) for x in np.split(probs[2000:], [7, 300])])
    np.testing.assert_array_equal(single, at_once)
    np.testing.assert_array_equal(batches, at_once)
    # The coverage given the calibration set is a Beta; that of 1,000 a beta-binomial.
    k = math.ceil(2001 * 0.9)
    low, high = scipy.stats.betabinom.interval(0.9999, 1000, k, 2001 - k)
    hits = round(1000 * calibration.coverage(at_once, labels[2000:]))
    assert low <= hits <= high


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_what_conformal_scores_draw_is_uniform(classes, dtype):
    logits, _ = sample(1, n=4000, classes=classes)
    probs = np.exp(log_softmax(logits)).astype(dtype).astype(np.float64)
    probs = np.unique(probs, axis=0)
    draws = [calibration.conformal._uniform(probs, seed) for seed in range(3)]
    for u in draws:
        assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
        for other in (np.roll(u, 1), probs[:, 0], probs.max(axis=1)):
            assert abs(scipy.stats.spearmanr(u, other).statistic) < 4 / len(u) ** 0.5
    assert abs(np.corrcoef(draws)[np.triu_indices(3, 1)]).max() < 4 / len(u) ** 0.5


def test_a_level_that_asks_for_hardly_any_label_takes_the_lowest_score():
    """(n + 1)(1 - alpha) lies between 0 and 1, so k is 1."""
    p = np.array([0.9, 0.8, 0.7])
    probs = np.stack([p, 1 - p], axis=1)
    for alpha in (0.8, 1 - 1e-9, 1 - 1e-12, 1 - 2**-53):
        found = calibration.fit_conformal(probs, [0, 0, 0], alpha, score="lac")
        assert found.threshold == 1 - 0.9
    for n in (1, 2, 3):  # k = n + 1
        found = calibration.fit_conformal(probs[:n], [0] * n, 1e-9)
        assert found.threshold == math.inf


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_checked_at_the_start(seed):
    logits, labels = sample(0, n=20)
    probs = np.exp(log_softmax(logits))

    def never(*_):
        raise AssertionError

    for call in (
        lambda: calibration.cross_calibrate(logits, labels, never, seed=seed),
        lambda: calibration.fit_conformal(probs, labels, seed=seed),
        lambda: metrics.bootstrap(never, probs, labels, seed=seed),
        lambda: metrics.paired_test(never, probs, probs, labels, seed=seed),
    ):
        with pytest.raises(ValueError, match=rf"seed must lie in .*, got {seed}\."):
            call()


def test_coverage_of_a_large_set():
    logits, labels = sample(9, n=20_000, classes=8)
    probs = np.exp(log_softmax(logits))
    sizes = {}
    for score in ("lac", "aps", "raps"):
        conformal = calibration.fit_conformal(
            probs[:10_000], labels[:10_000], 0.2, score=score
        )
        sets = conformal.sets(probs[10_000:])
        # Two binomial deviations of 0.004: of the calibration set and of the test set.
        assert abs(calibration.coverage(sets, labels[10_000:]) - 0.8) < 0.017
        sizes[score] = sets.sum(axis=1).mean()
    assert sizes["lac"] < sizes["raps"] < sizes["aps"]
    conformal = calibration.fit_conformal(
        probs[:10_000], labels[:10_000], 0.2, randomised=False
    )
    assert conformal.sets(probs[10_000:]).sum(axis=1).mean() > sizes["aps"]


def test_a_level_that_few_examples_cannot_give_takes_all_classes():
    conformal = calibration.fit_conformal([[0.9, 0.1]] * 8, [0] * 8, alpha=0.1)
    assert conformal.threshold == math.inf and conformal.sets([[1.0, 0.0]]).all()
    enough = calibration.fit_conformal([[0.9, 0.1]] * 9, [0] * 9, alpha=0.1)
    assert enough.threshold < 0.9


def test_the_quantile_is_that_of_exact_arithmetic():
    """Of 300 sizes and levels as people write them, k = ceil((n + 1)(1 - alpha))."""
    scores = np.linspace(0.01, 0.49, 300)
    probs = np.stack([1 - scores, scores], axis=1)
    for alpha in ("0.01", "0.05", "0.1", "0.18", "0.2", "0.3", "0.5", "0.9"):
        for n in (*range(1, 60), 99, 100, 149, 199, 299):
            k = math.ceil((n + 1) * (1 - Fraction(alpha)))
            found = calibration.fit_conformal(
                probs[:n], [0] * n, float(alpha), score="lac"
            )
            want = math.inf if k > n else 1 - probs[k - 1, 0]
            assert found.threshold == want, (alpha, n)


@pytest.mark.slow
def test_a_scaling_is_for_as_many_classes_as_it_was_fitted_on():
    for fit in (calibration.fit_vector, calibration.fit_matrix):
        with pytest.raises(ValueError, match="fitted on 4 classes, got logits of 1"):
            fit(*sample(0, n=40))(np.zeros((2, 1)))


def test_a_level_that_is_whole_is_not_rounded_up():
    """(149 + 1)(1 - 0.18) is 123, and 123.00000000000001 in float64."""
    p = np.linspace(0.99, 0.51, 149)
    probs = np.stack([p, 1 - p], axis=1)
    found = calibration.fit_conformal(probs, [0] * 149, alpha=0.18, score="lac")
    assert found.threshold == 1 - p[122]
    assert found.sets(probs[122:124])[:, 0].tolist() == [True, False]


# -- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fit",
    [
        calibration.fit_temperature,
        calibration.fit_vector,
        calibration.fit_matrix,
        calibration.fit_isotonic,
        calibration.cross_calibrate,
    ],
)
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3, 2)), [0, 0, 1], r"\(N, C\), got \(2, 3, 2\)"),
        (np.array([[0.0, 1.0], [-np.inf, 0.0]]), [0, 1], "row 1 is .*np.maximum"),
        (np.array([[0.0, np.nan]]), [0], "finite, but row 0"),
        (np.zeros((0, 2)), np.zeros(0, int), "empty set"),
        (np.zeros((2, 1)), [0, 0], "at least two classes"),
        (np.zeros((2, 2)), [0, 2], r"0\.\.1 for 2 classes, got 0\.\.2"),
        (np.zeros((2, 2)), [0.0, 1.0], "integers"),
        (np.zeros((2, 2), complex), [0, 1], "real numbers"),
        (np.zeros((2, 2)), [0], r"got \(2, 2\) and \(1,\)"),
        (np.array([[0.9, 0.1], [0.25, 0.75]]), [0, 1], "these rows are probabilities"),
        (np.array([[1, 0], [0, 1]], np.float16), [0, 1], "Give np.log"),
        # Rounded to 8 bits, these thirds add up to 1.002.
        (np.full((3, 3), 1 / 3, jnp.bfloat16), [0, 1, 2], "rows are probabilities"),
    ],
)
def test_bad_logits_are_refused(fit, logits, labels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(logits, labels)


def test_bad_options_are_refused():
    logits, labels = sample(0, n=20)
    probs = np.exp(log_softmax(logits))
    for kwargs, message in (
        ({"method": "platt"}, "temperature, vector, matrix, isotonic, or a function"),
        ({"num_folds": 1}, "num_folds = 1 for N = 20"),
        ({"num_folds": 21}, "num_folds = 21 for N = 20"),
        ({"num_repeats": 0}, "num_repeats must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration.cross_calibrate(logits, labels, **kwargs)
    with pytest.raises(TypeError, match="num_folds must be an integer"):
        calibration.cross_calibrate(logits, labels, num_folds=2.5)
    for fit in (calibration.fit_vector, calibration.fit_isotonic):
        with pytest.raises(ValueError, match="fitted on .* classes, got logits of 2"):
            fit(logits, labels)(logits[:, :2])
    for kwargs, message in (
        ({"alpha": 0.0}, r"\(0, 1\), got 0"),
        ({"score": "top"}, "'lac', 'aps', 'raps'; got 'top'"),
        ({"penalty": -1.0}, "penalty >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration.fit_conformal(probs, labels, **kwargs)
    with pytest.raises(ValueError, match="logits"):
        calibration.fit_conformal(logits, labels)
    with pytest.raises(ValueError, match="fitted on .* classes, got prob"):
        calibration.fit_conformal(probs, labels).sets([[0.5, 0.5]])
    with pytest.raises(TypeError, match="bools, got dtype float64"):
        calibration.coverage(probs, labels)
    with pytest.raises(ValueError, match="l2 must be finite"):
        calibration.fit_matrix(logits, labels, l2=-1.0)
