"""Gradients of posteriors: SGVB and OT-MDR against limits, closed forms and NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import otmdr_jax
from otmdr_jax import bnn, models, parallel
from otmdr_jax.bnn import posterior
from otmdr_jax.core.batches import split_batch
from otmdr_jax.experiments.methods import cross_entropy
from tests import toy
from tests.marks import one_axis_at_a_time, slow_but

N = 500
RHO = (0.05, 0.1)


def assert_close(a, b, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol, atol), a, b)


@pytest.fixture
def problem():
    params, data = toy.regression_problem()
    params = jax.tree.map(jnp.asarray, params)
    return bnn.init(params, sigma={"w": 0.3, "b": 0.2}, mask=True), data


# --- limits ---


@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("sigma_gradient", ["center", "particle"])
def test_without_radius_and_noise_it_is_sgvb(problem, key, particles, sigma_gradient):
    q, data = problem
    robust = bnn.robust_gradient(
        toy.regression,
        num_data=N,
        rho=(0.0, 0.0),
        num_particles=particles,
        sigma_gradient=sigma_gradient,
    )(q, data, key=key)
    plain = bnn.sgvb_gradient(toy.regression, num_data=N)(q, data, key=key)
    assert_close(robust.grads, plain.grads)
    assert_close(robust.value, plain.value)


def test_sgvb_is_the_gradient_of_the_objective_at_a_sample(problem, key):
    q, data = problem
    kappa = posterior.noise(q, jax.random.split(key)[0])

    def objective(q):
        kl = bnn.kl(q, bnn.Normal(0.5))
        return toy.regression(posterior.at(q, kappa), data) + 0.3 / N * kl

    want, want_grads = jax.value_and_grad(objective)(q)
    value, grads = bnn.sgvb(toy.regression, num_data=N, prior_std=0.5, kl_weight=0.3)(
        q, data, key=key
    )
    assert_close((value, grads), (want, want_grads))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "first_order", "tilt": 0.5, "num_particles": 3},
        {"sampler": "first_order", "inverse_temperature": 5.0, "norm": "global"},
        {"sampler": "langevin", "tilt": 0.5, "norm": "global", "num_steps": 2},
        {"sampler": "ascent", "norm": "global", "project": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_samplers_draw_means_as_they_draw_one_model(key, options):
    """Without sigma and divergence; scales are not perturbed and count in no ball."""
    params, data = toy.regression_problem()
    q = bnn.init(jax.tree.map(jnp.asarray, params), sigma=1e-12, mask=True)
    options = {"norm": "per_leaf", "split": "ordered"} | options
    if options["sampler"] == "first_order":
        options["split"] = "shared"
    rho = RHO if options["sampler"] == "ascent" else 0.2
    found = bnn.robust_gradient(
        toy.regression, num_data=N, kl_weight=0.0, rho=rho, **options
    )(q, data, key=key)
    want = otmdr_jax.robust_gradient(toy.regression, rho, **options)(
        params, data, key=jax.random.split(key)[1]
    )
    assert_close((found.value, found.grads.mean), (want.value, want.grads))
    assert_close(found.diagnostics.distances, want.diagnostics.distances)


def test_masked_means_do_not_count_in_the_joint_norm(key):
    """Their gradient is 100 times as long, and they do not move."""

    def loss(w, batch):
        return jnp.sum(w["a"]) + 100 * jnp.sum(w["b"]) + 0 * jnp.sum(batch)

    # So narrow that the gradients of the scales are next to nothing.
    q = bnn.init({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, sigma=1e-6)
    for mask, distance in (({"a": True, "b": False}, 0.1), (None, 0.1)):
        found = bnn.robust_gradient(
            loss, num_data=10, rho=0.1, norm="joint", mask=mask, split="shared",
            kl_weight=0.0,
        )(q, jnp.zeros((4, 1)), key=key)  # fmt: skip
        assert_allclose(found.diagnostics.distances, [distance], rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [dict(project=True), dict(sampler="langevin", num_steps=2, tilt=0.5)],
)
def test_one_ball_needs_one_norm(options):
    loss = toy.regression
    with pytest.raises(ValueError, match='"per_leaf" by default: pass norm="global"'):
        bnn.robust_gradient(loss, num_data=10, rho=0.1, **options)
    bnn.robust_gradient(loss, num_data=10, rho=0.1, norm="global", **options)


def test_a_norm_over_scales_has_no_ball():
    with pytest.raises(ValueError, match='weight_noise="each_step" is for steps'):
        bnn.robust_gradient(
            toy.regression, num_data=N, rho=0.1, weight_noise="each_step",
            sampler="first_order", tilt=0.5,
        )  # fmt: skip
    with pytest.raises(ValueError, match='norm="joint" counts scales'):
        bnn.robust_gradient(
            toy.regression, num_data=N, rho=0.1, norm="joint",
            sampler="first_order", tilt=0.5,
        )  # fmt: skip


@pytest.mark.parametrize("particles", slow_but([1], [1, 3]))
@pytest.mark.parametrize("norm", ["global", "per_leaf"])
def test_without_sigma_and_divergence_it_is_otmdr_of_one_model(key, particles, norm):
    params, data = toy.regression_problem()
    q = bnn.init(jax.tree.map(jnp.asarray, params), sigma=1e-12, mask=True)
    options = dict(num_particles=particles, norm=norm, noise_std=0.01)
    value, grads = bnn.value_and_grad(
        toy.regression, num_data=N, kl_weight=0.0, rho=RHO, **options
    )(q, data, key=key)
    want, want_grads = otmdr_jax.value_and_grad(toy.regression, RHO, **options)(
        params, data, key=jax.random.split(key)[1]
    )
    assert_close((value, grads.mean), (want, want_grads))


def test_only_means_are_perturbed_and_by_the_radius_for_each_leaf(problem, key):
    q, data = problem
    found = bnn.robust_gradient(toy.regression, num_data=N, rho=0.1, split="shared")(
        q, data, key=key
    )
    leaves = len(jax.tree.leaves(q.mean))
    assert_allclose(found.diagnostics.distances, [0.1 * np.sqrt(leaves)], rtol=1e-5)


# --- one full step, in NumPy ---


def loss_with_scale(params, batch):
    """Least squares with a point estimate: prediction = scale (x w + b)."""
    prediction = params["scale"] * (batch["x"] @ params["w"] + params["b"])
    return jnp.mean((prediction - batch["y"]) ** 2)


class InNumPy:
    """Section 4.2.3 in NumPy float64 for `loss_with_scale` and a normal prior."""

    def __init__(self, q, prior_std, weight, num_data):
        self.sigma = {k: self.softplus(q.raw_scale[k]) for k in "wb"}
        self.slope = {k: 1 / (1 + np.exp(-np.float64(q.raw_scale[k]))) for k in "wb"}
        self.mu = {k: np.float64(q.mean[k]) for k in "wb"}
        self.scale = np.float64(q.point["scale"])
        self.prior_std, self.factor = prior_std, weight / num_data

    @staticmethod
    def softplus(x):
        return np.log1p(np.exp(np.float64(x)))

    def divergence(self, mu):
        s = self.prior_std
        total = 0.0
        for k in "wb":
            sigma = self.sigma[k]
            total += np.sum(
                np.log(s / sigma) + (sigma**2 + mu[k] ** 2) / (2 * s**2) - 0.5
            )
        return total

    def __call__(self, mu, kappa, part):
        """value, gradients of mu, of raw scales and of the point estimate."""
        w = mu["w"] + self.sigma["w"] * kappa["w"]
        b = mu["b"] + self.sigma["b"] * kappa["b"]
        x, y = np.float64(part["x"]), np.float64(part["y"])
        inner = x @ w + b
        residual = self.scale * inner - y
        of_theta = {
            "w": 2 * self.scale * x.T @ residual / len(y),
            "b": 2 * self.scale * residual.mean(),
        }
        value = np.mean(residual**2) + self.factor * self.divergence(mu)
        g_mu, g_raw = {}, {}
        for k in "wb":
            sigma, s = self.sigma[k], self.prior_std
            g_mu[k] = of_theta[k] + self.factor * mu[k] / s**2
            of_sigma = of_theta[k] * kappa[k] + self.factor * (sigma / s**2 - 1 / sigma)
            g_raw[k] = of_sigma * self.slope[k]
        return value, g_mu, g_raw, 2 * np.mean(residual * inner)


PAPER = dict(norm="per_leaf", sigma_gradient="center", weight_noise="once")
RELEASED = dict(
    norm="joint", sigma_gradient="particle", weight_noise="each_step", merge="sum"
)
VERSIONS = {
    "paper": PAPER,
    "released": RELEASED,
    "center_first": PAPER | {"sigma_gradient": "center_first"},
    "global": PAPER | {"norm": "global"},
    "each_step at the center": PAPER | {"weight_noise": "each_step"},
    "three radii": RELEASED | {"radii": (0.05, 0.1, 0.02)},
    "mean": RELEASED | {"merge": "mean", "norm": "global"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "particles", "split"),
    [
        *((version, 2, "random") for version in VERSIONS),
        *((version, 1, "ordered") for version in ("paper", "released", "center_first")),
        ("released", 3, "random"),
    ],
)
def test_a_full_step_is_that_of_numpy(key, version, particles, split):
    options = {"merge": None} | VERSIONS[version]
    radii = options.pop("radii", RHO)
    _, data = toy.regression_problem(batch=13)
    params = {
        "w": jnp.array([0.5, -1.0, 0.2, 2.0]),
        "b": jnp.array(0.3),
        "scale": jnp.array(1.4),
    }
    q = bnn.init(
        params,
        {"w": 0.4, "b": 0.2, "scale": 1.0},
        {"w": True, "b": True, "scale": False},
    )
    noise_std, prior_std, weight = 0.02, 0.7, 0.4
    found = bnn.robust_gradient(
        loss_with_scale,
        num_data=N,
        prior_std=prior_std,
        kl_weight=weight,
        rho=radii,
        num_particles=particles,
        noise_std=noise_std,
        split=split,
        **options,
    )(q, data, key=key)

    # The draws: the library's own, everything else by hand.
    kappa_key, rest, later = jax.random.split(key, 3)
    kappas = [posterior.noise(q, kappa_key)] * len(radii)
    if options["weight_noise"] == "each_step":
        for s in range(1, len(radii)):
            kappas[s] = posterior.noise(q, jax.random.fold_in(later, s))
    kappas = [{k: np.float64(kappa[k]) for k in "wb"} for kappa in kappas]
    split_key, noise_key = jax.random.split(rest)
    keys = [(split_key, noise_key)]
    if particles > 1:
        of_splits, of_noises = (jax.random.split(k, particles) for k in keys[0])
        keys = list(zip(of_splits, of_noises, strict=True))
    reference = InNumPy(q, prior_std, weight, N)
    moved = sorted("bw")  # the order of leaves, as JAX sorts them

    values, g_mus, at_particles, firsts, points = [], [], [], [], []
    for of_split, of_noise in keys:
        parts = split_batch(data, len(radii), of_split if split == "random" else None)
        mu, total = dict(reference.mu), None
        for s, part in enumerate(parts):
            _, g, raw, _ = reference(mu, kappas[s], part)
            if s == 0:
                firsts.append(raw)
            total = dict(g) if total is None else {k: total[k] + g[k] for k in g}
            direction = g
            if options["merge"]:
                n = s + 1 if options["merge"] == "mean" else 1
                direction = {k: total[k] / n for k in g}
            squares = sum(np.sum(g[k] ** 2) for k in g)
            if options["norm"] == "joint":
                squares += sum(np.sum(raw[k] ** 2) for k in raw)
            step_key = jax.random.fold_in(of_noise, s)
            for i, k in enumerate(moved):
                length = np.sqrt(
                    np.sum(g[k] ** 2) if options["norm"] == "per_leaf" else squares
                )
                e = jax.random.normal(
                    jax.random.fold_in(step_key, i), np.shape(mu[k]), jnp.float32
                )
                step = radii[s] * direction[k] / length
                mu[k] = mu[k] + step + noise_std * np.float64(e)
        value, g_mu, g_raw, g_point = reference(mu, kappas[-1], data)
        values.append(value)
        g_mus.append(g_mu)
        at_particles.append(g_raw)
        points.append(g_point)

    _, _, at_center, _ = reference(reference.mu, kappas[0], data)
    for k in "wb":
        want = {
            "center": at_center[k],
            "center_first": np.mean([f[k] for f in firsts], axis=0),
            "particle": np.mean([g[k] for g in at_particles], axis=0),
        }[options["sigma_gradient"]]
        assert_allclose(found.grads.raw_scale[k], want, rtol=2e-4, atol=1e-6)
        want = np.mean([g[k] for g in g_mus], axis=0)
        assert_allclose(found.grads.mean[k], want, rtol=2e-4, atol=1e-6)
    assert_allclose(found.grads.point["scale"], np.mean(points), rtol=2e-4)
    assert_allclose(found.value, np.mean(values), rtol=2e-4)
    assert_allclose(found.kl, reference.divergence(reference.mu), rtol=1e-4)


@pytest.mark.slow
@one_axis_at_a_time(
    how=["scan", "vmap", "unroll"],
    sigma_gradient=["particle", "center", "center_first"],
)
def test_how_particles_are_mapped_changes_nothing(problem, key, how, sigma_gradient):
    q, data = problem
    options = dict(num_data=N, rho=RHO, sigma_gradient=sigma_gradient, num_particles=4)
    want = bnn.value_and_grad(toy.regression, **options)(q, data, key=key)
    got = bnn.value_and_grad(toy.regression, particle_map=how, **options)(
        q, data, key=key
    )
    assert_close(got, want)


# --- a model whose posterior is known ---


def linear_gaussian():
    """y = x w + noise of variance 1, and the exact mean-field optimum for it."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 3)) @ np.array([[1, 0.6, 0], [0, 1, 0.3], [0, 0, 0.5]])
    y = x @ [1.0, -2.0, 0.5] + rng.normal(size=40)
    prior_std = 0.8
    precision = x.T @ x + np.eye(3) / prior_std**2
    # The Gaussian nearest to N(m, precision^-1) in KL(q || p), among the diagonal ones.
    mean = np.linalg.solve(precision, x.T @ y)
    sigma = 1 / np.sqrt(np.diag(precision))
    data = {"x": jnp.float32(x), "y": jnp.float32(y)}
    return data, prior_std, precision, mean, sigma


def gaussian_nll(w, batch):
    residual = batch["x"] @ w[:, 0] - batch["y"]
    return jnp.mean(0.5 * residual**2 + 0.5 * jnp.log(2 * jnp.pi))


def trained(grad_fn, q, data, steps=1_500, draws=16):
    """Adam with a rate that falls to 0, on gradients averaged over draws of kappa."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))

    def step(carry, key):
        q, state = carry
        keys = jax.random.split(key, draws)
        _, grads = jax.vmap(lambda k: grad_fn(q, data, key=k))(keys)
        grads = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(q, updates), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0][0])
    return run((q, optimizer.init(q)), jax.random.split(jax.random.key(7), steps))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["weights", "local", "flipout"])
def test_sgvb_reaches_the_exact_mean_field_optimum(estimator):
    data, prior_std, _, mean, sigma = linear_gaussian()
    q = bnn.init(jnp.zeros((3, 1)), sigma=0.05)
    grad_fn = bnn.sgvb(
        gaussian_nll, num_data=40, prior_std=prior_std, estimator=estimator
    )
    q = trained(grad_fn, q, data)
    assert_allclose(q.mean[:, 0], mean, rtol=0.02, atol=0.01)
    assert_allclose(bnn.std(q)[:, 0], sigma, rtol=0.04)


@pytest.mark.slow
def test_the_objective_at_the_optimum_is_the_evidence_bound():
    """-N L there is log p(y) less the divergence of the mean field from the truth."""
    data, prior_std, precision, mean, sigma = linear_gaussian()
    q = bnn.init(jnp.float32(mean)[:, None], sigma=jnp.float32(sigma)[:, None])
    grad_fn = bnn.sgvb(gaussian_nll, num_data=40, prior_std=prior_std)
    keys = jax.random.split(jax.random.key(0), 20_000)
    values = jax.vmap(lambda k: grad_fn(q, data, key=k)[0])(keys)
    x, y = np.float64(data["x"]), np.float64(data["y"])
    cov = np.eye(40) + prior_std**2 * x @ x.T
    evidence = -0.5 * (
        y @ np.linalg.solve(cov, y) + np.linalg.slogdet(cov)[1] + 40 * np.log(2 * np.pi)
    )
    gap = 0.5 * (np.sum(np.log(np.diag(precision))) - np.linalg.slogdet(precision)[1])
    error = float(values.std()) / np.sqrt(len(values)) * 40
    assert abs(-40 * float(values.mean()) - (evidence - gap)) < 5 * error + 1e-3


@pytest.mark.slow
def test_otmdr_of_the_paper_has_the_same_fixed_point():
    """Its gradient of mu is g + rho A g / ||g|| with g = A (mu - m) + H sigma kappa.

    At mu = m that is odd in kappa, so its mean is 0; sigma's gradient is that of SGVB.
    """
    data, prior_std, _, mean, sigma = linear_gaussian()
    grad_fn = bnn.value_and_grad(
        gaussian_nll, num_data=40, prior_std=prior_std, rho=RHO, split="shared"
    )
    q = trained(grad_fn, bnn.init(jnp.zeros((3, 1)), sigma=0.05), data, draws=32)
    assert_allclose(q.mean[:, 0], mean, rtol=0.03, atol=0.02)
    assert_allclose(bnn.std(q)[:, 0], sigma, rtol=0.04)


@pytest.mark.slow
def test_otmdr_of_the_released_code_has_smaller_scales():
    """In one dimension sigma solves a sigma^2 + h rho c sigma = w / N.

    The gradient of sigma at the particle is h sigma + h rho E|kappa| + w / N (sigma /
    s^2 - 1 / sigma), with c = E|kappa| = sqrt(2 / pi) and a = h + w / (N s^2): the
    ascent goes where h sigma kappa points.
    """
    data, prior_std, _, _, _ = linear_gaussian()
    data = {"x": data["x"][:, :1], "y": data["y"]}
    rho, num = 0.1, 40
    h = float(jnp.mean(data["x"] ** 2))
    a, b = h + 1 / (num * prior_std**2), h * rho * np.sqrt(2 / np.pi)
    want = (-b + np.sqrt(b**2 + 4 * a / num)) / (2 * a)
    grad_fn = bnn.value_and_grad(
        gaussian_nll,
        num_data=num,
        prior_std=prior_std,
        rho=rho,
        split="shared",
        sigma_gradient="particle",
    )
    q = trained(grad_fn, bnn.init(jnp.zeros((1, 1)), sigma=0.05), data, draws=32)
    plain = 1 / np.sqrt(num * a)
    assert want < 0.8 * plain
    assert_allclose(bnn.std(q)[0, 0], want, rtol=0.04)


# --- options ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "prior", [bnn.ScaleMixture(1.0, 0.1), bnn.FittedNormal(), bnn.Normal(0.3)]
)
def test_priors_enter_the_objective(problem, key, prior):
    q, data = problem
    kappa = posterior.noise(q, jax.random.split(key)[0])
    found = bnn.robust_gradient(
        toy.regression, num_data=N, prior=prior, kl_weight=2.0, rho=0.0, split="shared"
    )(q, data, key=key)
    kl = (
        bnn.kl(q, prior)
        if hasattr(prior, "kl")
        else posterior_log(q, kappa) - prior.log_prob(drawn(q, kappa))
    )
    assert_allclose(found.kl, kl, rtol=1e-4)
    nll = toy.regression(posterior.at(q, kappa), data)
    assert_allclose(found.value, nll + 2.0 / N * kl, rtol=1e-4)
    assert_allclose(found.nll, nll, rtol=1e-5)


def drawn(q, kappa):
    return jax.tree.map(lambda m, s, k: m + s * k, q.mean, bnn.std(q), kappa)


def posterior_log(q, kappa):
    from scipy.stats import norm

    logs = jax.tree.map(
        lambda w, m, s: norm.logpdf(w, m, s).sum(), drawn(q, kappa), q.mean, bnn.std(q)
    )
    return sum(jax.tree.leaves(logs))


@pytest.mark.slow
def test_the_weight_of_the_divergence_and_radii_change_without_recompiling(
    problem, key
):
    q, data = problem
    grad_fn = bnn.value_and_grad(toy.regression, num_data=N)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(q, weight, rho):
        return grad_fn(q, data, key=key, kl_weight=weight, rho=(rho, 2 * rho))[0]

    chex.clear_trace_counter()
    low, high = step(q, 0.0, 0.1), step(q, 1.0, 0.1)
    kl = bnn.kl(q)
    assert float(high - low) > 0 and step(q, 0.0, 0.0) < low
    without = bnn.value_and_grad(toy.regression, num_data=N, kl_weight=0.0)
    assert_allclose(without(q, data, key=key, rho=(0.1, 0.2))[0], low, rtol=1e-5)
    at_rest = [step(q, w, 0.0) for w in (0.0, 1.0)]
    assert_allclose(at_rest[1] - at_rest[0], kl / N, rtol=1e-4)


def test_a_mask_keeps_means_where_they_are(problem, key):
    q, data = problem
    found = bnn.robust_gradient(
        toy.regression,
        num_data=N,
        rho=0.1,
        split="shared",
        mask={"w": True, "b": False},
    )(q, data, key=key)
    assert_allclose(found.diagnostics.distances, [0.1], rtol=1e-5)


def test_aux_is_that_of_the_pass_at_the_center(problem, key):
    q, data = problem

    def loss_fn(params, batch):
        return toy.regression(params, batch), params["w"]

    kappa_key = jax.random.split(key)[0]
    want = bnn.sample(q, kappa_key)["w"]
    for build in (bnn.value_and_grad, bnn.sgvb):
        (_, aux), _ = build(loss_fn, num_data=N, has_aux=True)(q, data, key=key)
        assert_allclose(aux, want, rtol=1e-6)


@pytest.mark.slow
@one_axis_at_a_time(size=[3, 4, 12], build=[bnn.value_and_grad, bnn.sgvb])
def test_microbatches_change_nothing(problem, key, size, build):
    q, data = problem
    want = build(toy.regression, num_data=N)(q, data, key=key)
    got = build(toy.regression, num_data=N, microbatch_size=size)(q, data, key=key)
    assert_close(got, want)


@pytest.mark.slow
def test_point_estimates_are_trained_and_not_perturbed(key):
    model = models.create("cnn_small", num_classes=10)
    images = jax.random.normal(key, (8, 8, 8, 1))
    params, state = model.init(key, images)

    def loss_fn(params, batch):
        logits, _ = model.apply(params, state, batch[0], train=True)
        return cross_entropy(logits, batch[1])

    q = bnn.init(params)
    batch = images, jnp.arange(8)
    value, grads = jax.jit(bnn.value_and_grad(loss_fn, num_data=N))(q, batch, key=key)
    assert np.isfinite(value)
    scales = jax.tree.leaves(grads.point)
    assert len(scales) == 6 and all(np.any(np.asarray(g) != 0) for g in scales)


@pytest.mark.slow
def test_bfloat16_model_and_float32_posterior(key):
    model = models.create("cnn_small", num_classes=10, dtype=jnp.bfloat16)
    images = jax.random.normal(key, (8, 8, 8, 1))
    params, state = model.init(key, images)

    def loss_fn(params, batch):
        logits, _ = model.apply(params, state, batch[0], train=True)
        return cross_entropy(logits, batch[1])

    q = bnn.init(params)
    batch = images, jnp.arange(8)
    for build in (bnn.value_and_grad, bnn.sgvb):
        _, grads = jax.jit(build(loss_fn, num_data=N))(q, batch, key=key)
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


# --- devices ---


def on_mesh(build, q, data, key, **options):
    mesh = parallel.make_mesh("data=4")
    grad_fn = build(toy.regression, num_data=N, axis_name="data", **options)
    mapped = jax.shard_map(
        lambda q, b, k: grad_fn(q, b, key=k),
        mesh=mesh,
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
    )
    return jax.jit(mapped)(q, data, key)


@pytest.mark.slow
@one_axis_at_a_time(
    sigma_gradient=["center", "center_first", "particle"], split=["ordered", "shared"]
)
def test_devices_of_a_data_axis_give_what_one_gives(
    problem, key, split, sigma_gradient
):
    q, _ = problem
    _, data = toy.regression_problem(batch=24)
    options = dict(rho=RHO, split=split, sigma_gradient=sigma_gradient)
    got = on_mesh(bnn.value_and_grad, q, data, key, **options)
    whole = data
    if split == "ordered":  # each device's first half, then each device's second
        order = np.arange(24).reshape(4, 2, 3).swapaxes(0, 1).ravel()
        whole = jax.tree.map(lambda x: x[order], data)
    want = bnn.value_and_grad(toy.regression, num_data=N, **options)(q, whole, key=key)
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("sync", [True, False])
def test_weight_noise_is_the_same_on_all_devices_of_a_data_axis(problem, key, sync):
    q, _ = problem
    _, data = toy.regression_problem(batch=24)
    mesh = parallel.make_mesh("data=4")

    def loss_fn(params, batch):  # aux tells every device's weights from the others'
        mine = jax.lax.axis_index("data") == jnp.arange(4)
        return toy.regression(params, batch), jnp.where(mine, 4 * params["b"], 0.0)

    for build, options in (
        (bnn.value_and_grad, {"sync_perturbation": sync}),
        (bnn.sgvb, {}),
    ):
        grad_fn = build(loss_fn, num_data=N, has_aux=True, axis_name="data", **options)
        mapped = jax.shard_map(
            lambda q, b, k, f=grad_fn: f(q, b, key=k)[0][1],
            mesh=mesh,
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
        )
        each = np.asarray(jax.jit(mapped)(q, data, key))
        want = bnn.sample(q, jax.random.split(key)[0])["b"]
        assert_allclose(each, np.full(4, want), rtol=1e-6)


@pytest.mark.slow
@one_axis_at_a_time(estimator=["local", "flipout"], micro=[2, None])
def test_devices_have_local_noise_of_their_own(key, estimator, micro):
    """Equal examples on all devices, whose mean has a quarter of one's variance."""
    q = bnn.init(jnp.ones((3, 1)), sigma=1.0)
    mesh = parallel.make_mesh("data=4")

    def loss_fn(w, batch):
        out = batch @ w
        mine = jax.lax.axis_index("data") == jnp.arange(4)
        return jnp.mean(out), jnp.where(mine, 4 * out[0, 0], 0.0)

    grad_fn = bnn.sgvb(
        loss_fn, num_data=N, has_aux=True, axis_name="data", estimator=estimator,
        microbatch_size=micro,
    )  # fmt: skip
    mapped = jax.jit(
        jax.shard_map(
            lambda q, b, k: grad_fn(q, b, key=k)[0][1],
            mesh=mesh,
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
        )
    )
    keys = jax.random.split(key, 300)
    each = np.array([mapped(q, jnp.ones((16, 3)), k) for k in keys])  # (300, 4)
    between = np.corrcoef(each.T)[~np.eye(4, dtype=bool)]
    assert np.all(np.abs(between) < 0.25)


@pytest.mark.slow
def test_particles_spread_over_devices(problem, key):
    q, data = problem
    mesh = parallel.make_mesh("particle=2")
    options = dict(num_data=N, rho=RHO, num_particles=4)
    grad_fn = bnn.value_and_grad(
        toy.regression, particle_axis_name="particle", **options
    )
    mapped = jax.shard_map(
        lambda q, b, k: grad_fn(q, b, key=k),
        mesh=mesh,
        in_specs=(P(), P(), P()),
        out_specs=P(),
    )
    got = jax.jit(mapped)(q, data, key)
    want = bnn.value_and_grad(toy.regression, **options)(q, data, key=key)
    assert_close(got, want)


# --- cost ---


def passes(q, data, key, **options):
    """How many examples the loss sees in a step, as XLA counts its matrix products."""

    def loss_fn(w, batch):
        return jnp.mean((batch["x"] @ w) ** 2)

    build = options.pop("build", bnn.value_and_grad)
    step = jax.jit(build(loss_fn, num_data=2 * N, **options))
    cost = step.lower(q, data, key=key).compile().cost_analysis()
    return cost["flops"]


@pytest.mark.parametrize(
    ("sigma_gradient", "particles", "gradients"),
    slow_but(
        [("center", 1, 2.5)],
        [("center", 1, 2.5), ("center_first", 1, 2.0), ("particle", 1, 2.0),
         ("center", 2, 4.5)],
    ),
)  # fmt: skip
def test_cost_in_gradients(key, sigma_gradient, particles, gradients):
    q = bnn.init(jnp.ones((64, 64)))
    data = {"x": jnp.ones((512, 64))}
    one = passes(q, data, key, build=bnn.sgvb)
    many = passes(q, data, key, sigma_gradient=sigma_gradient, num_particles=particles)
    assert many / one == pytest.approx(gradients, rel=0.06)


# --- bad input, before anything is compiled ---


@pytest.mark.parametrize("build", [bnn.value_and_grad, bnn.sgvb])
@pytest.mark.parametrize("num_data", [None, 0, -5, "all", True, float("inf")])
def test_num_data_is_required(build, num_data):
    with pytest.raises(ValueError, match="num_data must be the number of examples"):
        build(toy.regression, num_data=num_data)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(norm="layer"), ValueError, "norm must be one of"),
        (dict(sigma_gradient="mu"), ValueError, "sigma_gradient must be one of"),
        (dict(weight_noise="twice"), ValueError, "weight_noise must be one of"),
        (dict(prior_std=-0.1), ValueError, "std of a prior must be positive"),
        (dict(prior_std=0.1, prior=bnn.Normal()), ValueError, "not both"),
        (dict(prior="normal"), TypeError, "prior must have"),
        (dict(prior=bnn.Normal), TypeError, "prior must have"),
        (dict(kl_weight=-1.0), ValueError, "kl_weight must be"),
        (dict(kl_weight=bnn.warmup(3)), TypeError, "call a schedule"),
        (dict(rho=()), ValueError, "one radius for each"),
        (
            dict(particles=2),
            TypeError,
            r"bnn.value_and_grad takes no particles \(did you",
        ),
        (dict(noise_std=-1.0), ValueError, "noise_std"),
    ],
)
def test_options_that_cannot_work(options, error, message):
    with pytest.raises(error, match=message):
        bnn.value_and_grad(toy.regression, num_data=N, **options)


@pytest.mark.parametrize("build", [bnn.value_and_grad, bnn.sgvb])
def test_arguments_of_a_call_that_cannot_work(problem, key, build):
    q, data = problem
    grad_fn = build(toy.regression, num_data=N)
    with pytest.raises(TypeError, match="call a schedule"):
        grad_fn(q, data, key=key, kl_weight=bnn.warmup(3))
    with pytest.raises(ValueError, match="kl_weight must be"):
        grad_fn(q, data, key=key, kl_weight=-1.0)
    with pytest.raises(ValueError, match="num_data=5 is less than a batch of 12"):
        build(toy.regression, num_data=5)(q, data, key=key)


def test_an_option_of_the_other_method():
    with pytest.raises(TypeError, match="bnn.sgvb takes no rho; it takes .*estimator"):
        bnn.sgvb(toy.regression, num_data=N, rho=0.1)
    with pytest.raises(
        TypeError, match="takes no estimator; it takes .*sigma_gradient"
    ):
        bnn.value_and_grad(toy.regression, num_data=N, estimator="local")


def test_an_unknown_estimator():
    with pytest.raises(ValueError, match="estimator must be one of.*flipout"):
        bnn.sgvb(toy.regression, num_data=N, estimator="reinforce")


@pytest.mark.parametrize("build", [bnn.value_and_grad, bnn.sgvb])
def test_a_mask_of_another_structure(problem, key, build):
    q, data = problem
    if build is bnn.value_and_grad:
        grad_fn = build(toy.regression, num_data=N, mask={"v": True})
        with pytest.raises(ValueError, match="structure of the parameters"):
            grad_fn(q, data, key=key)
    with pytest.raises(ValueError, match="one for each stochastic leaf"):
        build(toy.regression, num_data=N, prior=bnn.Normal({"v": 0.1}))(
            q, data, key=key
        )


@pytest.mark.parametrize("build", [bnn.value_and_grad, bnn.sgvb])
def test_a_posterior_and_a_key_are_needed(problem, key, build):
    q, data = problem
    grad_fn = build(toy.regression, num_data=N)
    with pytest.raises(TypeError, match="bnn.init"):
        grad_fn(bnn.mean(q), data, key=key)
    with pytest.raises(ValueError, match="pass key="):
        grad_fn(q, data)
