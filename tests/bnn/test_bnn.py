"""Posteriors, priors, divergences and predictions, against independent values."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from otmdr_jax import bnn, metrics, models
from otmdr_jax.bnn import kl_divergence, posterior
from tests.marks import one_axis_at_a_time

positive = st.floats(0.01, 10.0)


def one(mean, sigma):
    """A posterior over a single weight."""
    return bnn.init(jnp.array([mean], jnp.float32), sigma=sigma)


# --- the posterior ---


@pytest.mark.parametrize("sigma", [1e-8, 0.0067, 1.0, 30.0])
def test_the_initial_sigma_is_what_was_asked_for(sigma):
    q = bnn.init({"w": jnp.zeros((2, 3))}, sigma=sigma)
    assert_allclose(bnn.std(q)["w"], sigma, rtol=1e-5)
    assert bnn.mean(q)["w"].shape == (2, 3)


def test_sigma_may_be_one_for_each_leaf():
    q = bnn.init({"a": jnp.zeros((2, 3)), "b": jnp.ones(3)}, {"a": 0.1, "b": 0.2})
    assert_allclose(bnn.std(q)["a"], 0.1, rtol=1e-5)
    assert_allclose(bnn.std(q)["b"], 0.2, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["cnn_small", "resnet_10", "wide_resnet_10_1", "densenet_121", "mobilenet",
     "efficientnet_b0", "pyramidnet_20_a8"],
)  # fmt: skip
def test_kernels_and_biases_are_stochastic_and_batchnorm_is_not(name):
    model = models.create(name, num_classes=10)
    params, _ = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    mask = bnn.weights_and_biases(params)
    for path, chosen in jax.tree.leaves_with_path(mask):
        keys = [part.key for part in path]
        layer = params
        for key in keys[:-1]:
            layer = layer[key]
        assert chosen == ("kernel" in layer), keys
        assert chosen or "scale" in layer, keys
    assert any(jax.tree.leaves(mask)) and not all(jax.tree.leaves(mask))


def test_the_mask_chooses_the_leaves():
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "c": None}
    q = bnn.init(params, mask={"a": True, "b": False, "c": None})
    assert q.point["a"] is None and q.mean["b"] is None
    assert bnn.sample(q, jax.random.key(0))["b"].tolist() == [1.0, 1.0, 1.0]
    everywhere = bnn.init(params, mask=True)
    assert not jax.tree.leaves(everywhere.point)
    by_function = bnn.init(params, mask=lambda p: jax.tree.map(lambda x: x.size > 2, p))
    assert by_function.mean["a"] is None and by_function.mean["b"] is not None


def test_samples_are_those_of_a_normal(key):
    q = bnn.init({"w": jnp.full((300, 300), -2.0)}, sigma=0.3)
    w = np.asarray(bnn.sample(q, key)["w"]).ravel()
    assert scipy.stats.kstest((w + 2.0) / 0.3, "norm").pvalue > 1e-3
    other = bnn.sample(q, jax.random.key(1))["w"]
    assert np.abs(np.corrcoef(w, np.ravel(other))[0, 1]) < 0.02


def test_leaves_have_noise_of_their_own(key):
    q = bnn.init({"a": jnp.zeros((50, 50)), "b": jnp.zeros((50, 50))}, sigma=1.0)
    w = bnn.sample(q, key)
    assert np.abs(np.corrcoef(w["a"].ravel(), w["b"].ravel())[0, 1]) < 0.1


def test_posterior_is_float32_whatever_the_model(key):
    q = bnn.init({"w": jnp.ones((2, 2), jnp.bfloat16)})
    assert q.mean["w"].dtype == q.raw_scale["w"].dtype == jnp.float32
    assert bnn.sample(q, key)["w"].dtype == jnp.float32


def test_signal_to_noise():
    q = bnn.init({"w": jnp.array([[3.0, -0.5]])}, sigma=0.25)
    assert_allclose(bnn.signal_to_noise(q)["w"], [[12.0, 2.0]], rtol=1e-5)


def test_a_summary_is_that_of_numpy():
    w = 10 ** np.random.default_rng(0).uniform(-4.5, 3.0, (40, 30))
    w[0, 0] = 0.0  # no signal: in the first bin
    found = bnn.summarise(bnn.init({"w": jnp.asarray(w)}, sigma=0.25))
    decibels = 20 * np.log10(np.maximum(w / 0.25, 1e-30))
    assert decibels.min() < -60 < 60 < decibels.max()
    counts, _ = np.histogram(np.clip(decibels, -60, 59.9), 60, (-60, 60))
    assert found.counts.tolist() == counts.tolist()
    assert_allclose(found.snr_db["w"], decibels.mean(), rtol=1e-5)
    assert_allclose(found.sigma["w"], 0.25, rtol=1e-5)


# --- divergences ---


@hypothesis.given(st.floats(-5.0, 5.0), positive, positive)
@hypothesis.settings(deadline=None, max_examples=30)
def test_kl_of_a_normal_prior_is_that_of_numpyro(mean, sigma, prior_std):
    got = bnn.kl(one(mean, sigma), bnn.Normal(prior_std))
    want = dist.kl_divergence(dist.Normal(mean, sigma), dist.Normal(0.0, prior_std))
    assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def quadrature(mean, sigma, log_prior):
    """KL(N(mean, sigma^2) || prior) by numerical integration."""

    def integrand(w):
        log_q = scipy.stats.norm.logpdf(w, mean, sigma)
        return np.exp(log_q) * (log_q - log_prior(w))

    bounds = mean - 12 * sigma, mean + 12 * sigma
    points = [x for x in (-0.01, 0.0, 0.01) if bounds[0] < x < bounds[1]]
    found, error = scipy.integrate.quad(integrand, *bounds, points=points, limit=500)
    assert error < 1e-5
    return found


@pytest.mark.parametrize(("mean", "sigma"), [(0.3, 0.7), (-1.0, 0.05), (0.0, 2.0)])
def test_kl_closed_form_quadrature_and_monte_carlo_agree(mean, sigma, key):
    prior, q = bnn.Normal(0.5), one(mean, sigma)
    closed = float(bnn.kl(q, prior))
    want = quadrature(mean, sigma, lambda w: scipy.stats.norm.logpdf(w, 0.0, 0.5))
    assert_allclose(closed, want, rtol=1e-4)
    sampled = float(bnn.kl(q, prior, key=key, num_samples=20_000))
    assert_allclose(sampled, closed, rtol=0.05, atol=0.03)


@pytest.mark.parametrize(("mean", "sigma"), [(0.3, 0.7), (0.02, 0.01)])
def test_kl_of_a_mixture_by_monte_carlo_is_that_of_quadrature(mean, sigma, key):
    prior = bnn.ScaleMixture(1.0, 0.05, 0.25)

    def log_prior(w):
        logs = scipy.stats.norm.logpdf(w, 0.0, [1.0, 0.05])
        return scipy.special.logsumexp(logs, b=[0.25, 0.75])

    want = quadrature(mean, sigma, log_prior)
    got = float(bnn.kl(one(mean, sigma), prior, key=key, num_samples=50_000))
    assert_allclose(got, want, rtol=0.03, atol=0.01)


@pytest.mark.slow
@hypothesis.given(st.floats(-3.0, 3.0))
@hypothesis.settings(deadline=None, max_examples=20)
def test_mixture_density_is_that_of_numpyro(w):
    prior = bnn.ScaleMixture(1.5, 0.01, 0.3)
    parts = dist.Normal(0.0, jnp.array([1.5, 0.01]))
    reference = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), parts)
    assert_allclose(
        prior.log_prob(jnp.array([w], jnp.float32)),
        reference.log_prob(jnp.float32(w)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("per", ["leaf", "all"])
def test_fitted_prior_maximises_the_elbo(per):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=2) * 5}
    q = bnn.init(jax.tree.map(jnp.float32, params), sigma=0.4)
    prior = bnn.FittedNormal(per)
    best = float(bnn.kl(q, prior))
    fitted = prior.fit(q.mean, bnn.std(q))
    for a, b in ((1.05, 1.05), (0.95, 0.95)):
        worse = bnn.Normal({"a": fitted.std["a"] * a, "b": fitted.std["b"] * b})
        assert float(bnn.kl(q, worse)) > best
    if per == "leaf":
        off = bnn.Normal({"a": fitted.std["a"] * 1.05, "b": fitted.std["b"]})
        assert float(bnn.kl(q, off)) > best
    # Its gradient is that with the prior held: the ELBO is stationary in it.
    through = jax.grad(lambda q: bnn.kl(q, prior))(q)
    held = jax.grad(lambda q: bnn.kl(q, fitted))(q)
    jax.tree.map(
        lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=1e-5), through, held
    )


def test_kl_of_a_fitted_prior_by_monte_carlo(key):
    q = bnn.init({"w": jnp.arange(6.0).reshape(2, 3)}, sigma=0.7)
    closed = float(bnn.kl(q, bnn.FittedNormal()))
    sampled = float(bnn.kl(q, bnn.FittedNormal(), key=key, num_samples=20_000))
    assert_allclose(sampled, closed, rtol=0.03)


def test_own_prior_with_a_density_alone(key):
    class Laplace:
        def log_prob(self, weights):
            parts = [dist.Laplace().log_prob(w).sum() for w in jax.tree.leaves(weights)]
            return sum(parts)

    got = float(bnn.kl(one(0.5, 0.8), Laplace(), key=key, num_samples=20_000))
    want = quadrature(0.5, 0.8, lambda w: scipy.stats.laplace.logpdf(w))
    assert_allclose(got, want, rtol=0.05)


def test_kl_of_a_scale_that_nearly_vanished_is_finite():
    value, grads = jax.value_and_grad(lambda q: bnn.kl(q))(one(0.5, 1e-30))
    assert np.isfinite(value) and np.all(np.isfinite(grads.raw_scale))


# --- its weight ---


@pytest.mark.slow
@hypothesis.given(st.integers(1, 400), st.floats(0.01, 10.0))
@hypothesis.settings(deadline=None, max_examples=20)
def test_blundells_weights_have_the_mean_that_was_asked_for(num_batches, weight):
    schedule = bnn.blundell(num_batches, weight)
    steps = np.arange(3 * num_batches)
    weights = np.array(schedule(steps))
    assert_allclose(weights.reshape(3, -1).mean(axis=1), weight, rtol=1e-4)
    assert_allclose(weights[:num_batches], weights[num_batches : 2 * num_batches])


def test_blundells_weights_are_those_of_the_paper():
    m = 5
    paper = [2 ** (m - i) / (2**m - 1) for i in range(1, m + 1)]
    got = [float(bnn.blundell(m)(i)) / m for i in range(m)]
    assert_allclose(got, paper, rtol=1e-6)


def test_conventions_differ_by_a_factor_alone():
    """Every convention of the objective is ours, times a constant."""
    n, b, beta, nll, kl = 1_000, 50, 0.3, 1.7, 42.0
    theirs = {
        "data_set": n * nll + beta * kl,
        "batch": b * nll + beta * kl,
        "example": nll + beta * kl,
    }
    factor = {"data_set": n, "batch": b, "example": 1}
    for scale, value in theirs.items():
        w = bnn.convert_beta(beta, scale, num_data=n, batch_size=b)
        assert_allclose(factor[scale] * (nll + w / n * kl), value, rtol=1e-12)


def test_warmup_reaches_its_weight():
    schedule = bnn.warmup(4, 0.5)
    assert [float(schedule(s)) for s in (0, 2, 4, 9)] == [0.0, 0.25, 0.5, 0.5]


# --- prediction ---


def linear(w, x):
    return jax.nn.log_softmax(x @ w)


@pytest.mark.parametrize("how", ["scan", "vmap", "unroll", "auto"])
def test_predictions_are_those_of_samples(how, key):
    q = bnn.init(jnp.ones((3, 4)), sigma=0.5)
    x = jax.random.normal(key, (5, 3))
    got = bnn.predict(linear, q, x, key=key, num_samples=7, sample_map=how)
    want = [linear(bnn.sample(q, k), x) for k in jax.random.split(key, 7)]
    assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-6)


def test_predictions_by_default_have_thirty_samples(key):
    q = bnn.init(jnp.ones((3, 4)))
    assert bnn.predict(linear, q, jnp.ones((2, 3)), key=key).shape == (30, 2, 4)


def test_prediction_at_the_mean(key):
    q = bnn.init(jnp.arange(12.0).reshape(3, 4), sigma=0.5)
    x = jax.random.normal(key, (5, 3))
    got = bnn.predict(linear, q, x, mean_only=True)
    assert got.shape == (1, 5, 4)
    assert_allclose(got[0], linear(bnn.mean(q), x), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("raw", [-80.0, -88.0, -100.0, -1000.0])
def test_a_posterior_that_collapsed_is_pulled_back(raw):
    """In float32 softplus(-88) is 0: an infinite divergence, and a gradient of NaN."""
    q = bnn.init(jnp.zeros((2, 2)))._replace(raw_scale=jnp.full((2, 2), raw))
    divergence = lambda q: bnn.kl(q, bnn.Normal(0.1))  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(divergence))(q)
    sigma = max(math.exp(raw), 1e-37)
    assert_allclose(value, 4 * (math.log(0.1 / sigma) - 0.5), rtol=1e-5)
    assert_allclose(grads.raw_scale, -1.0, rtol=1e-5)
    along = jax.jvp(divergence, (q,), (jax.tree.map(jnp.ones_like, q),))[1]
    assert_allclose(along, -4.0, rtol=1e-5)


@pytest.mark.slow
def test_uncertainty_is_that_of_loops(key):
    log_probs = np.asarray(
        jax.nn.log_softmax(3 * jax.random.normal(key, (6, 4, 5))), np.float64
    )
    found = bnn.uncertainty(jnp.asarray(log_probs))
    for n in range(4):
        p = np.exp(log_probs[:, n])
        mean = p.mean(axis=0)
        total = -sum(x * math.log(x) for x in mean)
        each = [-sum(x * math.log(x) for x in row) for row in p]
        assert_allclose(found.total[n], total, rtol=1e-5)
        assert_allclose(found.aleatoric[n], np.mean(each), rtol=1e-5)
        # Mutual information: the mean divergence from the mean.
        kls = [
            sum(x * math.log(x / m) for x, m in zip(row, mean, strict=True))
            for row in p
        ]
        assert_allclose(found.epistemic[n], np.mean(kls), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@one_axis_at_a_time(dtype=["bfloat16", "float16"], classes=[1000, 10, 100])
def test_uncertainty_takes_rounded_log_probabilities(dtype, classes, key):
    logits = 0.1 * jax.random.normal(key, (4, 8, classes))
    rounded = jax.nn.log_softmax(logits.astype(dtype))
    found = bnn.uncertainty(rounded)
    # The formulas in float64, of the rounded numbers divided by their sum.
    p = np.exp(np.asarray(rounded.astype(jnp.float32), np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    mean = p.mean(axis=0)
    total = -np.sum(mean * np.log(mean), axis=-1)
    aleatoric = -np.mean(np.sum(p * np.log(p), axis=-1), axis=0)
    assert_allclose(found.total, total, rtol=1e-4)
    assert_allclose(found.aleatoric, aleatoric, rtol=1e-4)
    assert_allclose(found.epistemic, total - aleatoric, rtol=0.05, atol=1e-5)
    with pytest.raises(ValueError, match="Apply jax.nn.log_softmax"):
        bnn.uncertainty(logits.astype(dtype))


def test_uncertainty_is_that_of_metrics(key):
    """On the device here, on the host in float64 there: two codes, one formula."""
    log_probs = jax.nn.log_softmax(3 * jax.random.normal(key, (7, 20, 5)))
    found = bnn.uncertainty(log_probs)
    probs = np.exp(np.asarray(log_probs, np.float64))
    assert_allclose(found.total, metrics.entropy(probs), rtol=1e-5)
    want = metrics.mutual_information(probs)
    assert_allclose(found.epistemic, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_likelihood_of_predictions_is_in_log_space():
    """Where all probabilities underflow, their mean does not become log 0."""
    log_probs = jnp.array([[[-500.0, 0.0]], [[-600.0, 0.0]]])
    assert_allclose(bnn.log_mean_probs(log_probs)[0, 0], -500.0 - math.log(2))
    found = bnn.uncertainty(log_probs)
    assert all(np.all(np.isfinite(x)) for x in found)


@pytest.mark.slow
def test_uncertainty_of_what_diverged_is_no_certainty(key):
    """Where p > 0 is asked, NaN has an entropy of 0, as if it were sure."""
    log_probs = jax.nn.log_softmax(jax.random.normal(key, (3, 4, 5)))
    found = bnn.uncertainty(log_probs.at[1, 2].set(jnp.nan))
    for part in found:
        assert np.isnan(part).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_equal_samples_have_no_epistemic_uncertainty(key, dtype):
    one = jax.nn.log_softmax(jax.random.normal(key, (1, 50, 7)).astype(dtype))
    one = jnp.concatenate([one, jnp.log(jnp.eye(7, dtype=dtype))[None]], axis=1)
    found = jax.jit(bnn.uncertainty)(jnp.tile(one, (7, 1, 1)))
    assert np.all(found.epistemic == 0) and found.epistemic.dtype == jnp.float32
    probs = np.exp(np.asarray(one[0], np.float64))
    probs /= probs.sum(axis=1, keepdims=True)
    want = -np.sum(probs * np.log(np.where(probs > 0, probs, 1)), axis=1)
    assert_allclose(found.total, want, rtol=1e-5)
    assert_allclose(found.aleatoric, want, rtol=1e-5)


def test_uncertainty_of_logits_is_refused(key):
    logits = jax.random.normal(key, (3, 4, 5))
    with pytest.raises(ValueError, match="log_softmax to logits"):
        bnn.uncertainty(logits)
    with pytest.raises(ValueError, match="shape"):
        bnn.uncertainty(jnp.zeros(3))


@pytest.mark.slow
@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(1, 8))
@hypothesis.settings(deadline=None, max_examples=20)
def test_epistemic_uncertainty_lies_between_zero_and_log_samples(seed, samples):
    logits = 10 * jax.random.normal(jax.random.key(seed), (samples, 3, 4))
    found = bnn.uncertainty(jax.nn.log_softmax(logits))
    assert np.all(found.epistemic >= 0)
    assert np.all(found.epistemic <= math.log(samples) + 1e-5)


# --- bad input ---


@pytest.mark.parametrize("sigma", [0.0, -1.0, 1e-40, float("nan"), float("inf")])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match="sigma must be positive"):
        bnn.init(jnp.ones((2, 2)), sigma=sigma)


def test_sigma_of_another_structure():
    with pytest.raises(ValueError, match="pytree of the structure"):
        bnn.init({"w": jnp.ones((2, 2))}, sigma={"v": 0.1})


def test_a_mask_must_select_something():
    with pytest.raises(ValueError, match="selects nothing"):
        bnn.init({"w": jnp.ones((2, 2))}, mask={"w": False})
    with pytest.raises(ValueError, match="selects nothing"):
        bnn.init({"w": jnp.ones((2, 2))}, mask=False)
    with pytest.raises(ValueError, match="selects nothing.*mask=True"):
        bnn.init({"scale": jnp.ones(2), "bias": jnp.ones(2)})


def test_what_is_a_posterior_already():
    with pytest.raises(TypeError, match="bnn.mean"):
        bnn.init(bnn.init(jnp.ones((2, 2))))


def test_a_mask_of_another_structure():
    with pytest.raises(ValueError, match="structure of the parameters"):
        bnn.init({"w": jnp.ones((2, 2))}, mask={"v": True})


def test_stochastic_leaves_are_real_and_floating():
    with pytest.raises(TypeError, match="real floating"):
        bnn.init({"w": jnp.ones((2, 2), jnp.int32)})


@pytest.mark.parametrize("function", [bnn.mean, bnn.std, bnn.kl, bnn.signal_to_noise])
def test_what_is_no_posterior_is_refused(function):
    with pytest.raises(TypeError, match="bnn.init"):
        function({"w": jnp.ones((2, 2))})


def test_a_posterior_whose_parts_do_not_fit():
    q = bnn.init({"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="same leaves and shapes"):
        bnn.mean(q._replace(raw_scale={"w": q.raw_scale["w"], "v": jnp.ones(3)}))
    with pytest.raises(ValueError, match="structure of one model"):
        bnn.mean(q._replace(point={"w": None}))


@pytest.mark.slow
def test_a_posterior_of_another_model(key):
    images = jnp.zeros((2, 8, 8, 1))
    small, other = (models.create("cnn_small", classes) for classes in (10, 7))
    q = bnn.init(small.init(key, images)[0])
    state = other.init(key, images)[1]
    with pytest.raises(ValueError, match="must be of shape"):
        bnn.predict(lambda p: other.apply(p, state, images, train=False)[0], q, key=key)


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_at_least_one_sample(samples, key):
    q = bnn.init(jnp.ones((3, 4)))
    with pytest.raises((TypeError, ValueError), match="num_samples must be a"):
        bnn.predict(linear, q, jnp.ones((2, 3)), key=key, num_samples=samples)


def test_samples_need_a_key():
    q = bnn.init(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="pass key=.*mean_only"):
        bnn.predict(linear, q, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="no KL divergence in closed form"):
        bnn.kl(q, bnn.ScaleMixture())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bnn.Normal(0.0), "std of a prior must be positive"),
        (lambda: bnn.Normal(-1.0), "std of a prior must be positive"),
        (lambda: bnn.ScaleMixture(1.0, 0.0), "narrow_std"),
        (lambda: bnn.ScaleMixture(weight=1.0), "weight must lie"),
        (lambda: bnn.FittedNormal("layer"), "per must be"),
        (lambda: bnn.blundell(0), "num_batches"),
        (lambda: bnn.Normal(None), "std of a prior must be positive"),
        (lambda: bnn.warmup(0), "num_steps"),
        (lambda: bnn.convert_beta(1.0, "batch", num_data=9), "needs batch_size"),
        (lambda: bnn.convert_beta(1.0, "epoch", num_data=9), "scale must be"),
        (lambda: bnn.kl(one(0.0, 1.0), key=jax.random.key(0), num_samples=0), "num_s"),
    ],
)
def test_bad_numbers(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_numbers_of_batches_are_integers_of_any_kind():
    assert float(bnn.blundell(np.int64(2))(0)) == pytest.approx(4 / 3)
    with pytest.raises(TypeError, match="num_batches"):
        bnn.blundell(2.5)


def test_more_examples_than_integers_of_jax_have(key):
    """As tokens; the KL weight is that of a schedule."""
    loss = bnn.sgvb(lambda w: 0.0 * jnp.sum(w), num_data=3_000_000_000, prior_std=1.0)
    q = one(0.5, 0.1)
    value, _ = jax.vmap(lambda k: loss(q, key=k, kl_weight=jnp.float32(1e9)))(
        jax.random.split(key, 4_000)
    )
    # A third of the divergence from N(0, 1), by Monte Carlo as `bnn.sgvb` estimates it.
    assert_allclose(value.mean(), float(bnn.kl(q, bnn.Normal(1.0))) / 3, rtol=0.05)


def test_a_weight_that_is_nan_is_in_no_bin():
    q = bnn.init({"kernel": jnp.array([[jnp.nan, 1.0], [2.0, 3.0]])}, sigma=0.1)
    assert int(bnn.summarise(q).counts.sum()) == 3


def test_what_is_no_prior():
    with pytest.raises(TypeError, match=r"kl\(mean, std\) or log_prob"):
        bnn.kl(one(0.0, 1.0), 0.1)


def test_join_is_the_inverse_of_splitting():
    params = {"a": jnp.ones((2, 2)), "n": {"scale": jnp.zeros(2)}, "none": None}
    q = bnn.init(params)
    assert jax.tree.structure(bnn.mean(q)) == jax.tree.structure(params)
    assert posterior.chosen(q) == {"a": True, "n": {"scale": False}, "none": None}


@pytest.mark.slow
def test_a_sampled_divergence_has_the_gradient_of_the_closed_form(key):
    """Of a single sample the gradient is noisy; over many it is that of the KL."""
    q, prior = one(0.4, 0.3), bnn.Normal(0.5)

    def sampled(q, k):
        return kl_divergence.estimate(q, prior, posterior.noise(q, k))

    keys = jax.random.split(key, 50_000)
    grads = jax.vmap(jax.grad(sampled), in_axes=(None, 0))(q, keys)
    exact = jax.grad(lambda q: bnn.kl(q, prior))(q)
    assert_allclose(grads.mean.mean(), exact.mean[0], rtol=0.05)
    assert_allclose(grads.raw_scale.mean(), exact.raw_scale[0], rtol=0.05)
