"""The worst inner distribution (Theorem 4.2), against SciPy and quadrature."""

import functools
import math

import blackjax
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate, special, stats

import otmdr_jax
from otmdr_jax.core import langevin, sampling
from tests import toy
from tests.marks import one_axis_at_a_time, slow_but

KEY = jax.random.key(0)
# Tests of hypotheses are of one draw with this key; under the null one in a thousand
# keys would fail.
LEVEL = 1e-3


def linear(slope):
    return lambda w: jnp.sum(jnp.asarray(slope) * w)


def draws(loss, count=20_000, dim=2, *, key=KEY, **options):
    """Particles (K, n) of a loss of one array, at `center`, by one program."""
    center = options.pop("center", jnp.zeros(dim))
    options.setdefault("rho", 1.0)

    @jax.jit
    def sample(key):
        return otmdr_jax.sample_particles(
            loss, center, key=key, num_particles=count, particle_map="vmap", **options
        )

    particles, seen = sample(key)
    return np.asarray(particles, np.float64) - np.asarray(center, np.float64), seen


def cdf_along(kappa, n):
    """Of exp(kappa t) (1 - t^2)^((n - 1) / 2) on [-1, 1], by quadrature."""
    t = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 200_001))
    log = kappa * (t - 1)
    if n > 1:
        with np.errstate(divide="ignore"):
            log = log + (n - 1) / 2 * np.log1p(-t * t)
    density = np.exp(log - log[1:-1].max())
    total = integrate.cumulative_trapezoid(density, t, initial=0)
    return lambda x: np.interp(x, t, total / total[-1])


def bessel_ratio(kappa, n):
    if kappa < n / 10:  # there these underflow
        hypergeometric = [special.hyp0f1(n / 2 + i, kappa**2 / 4) for i in (1, 2)]
        return kappa / (n + 2) * hypergeometric[1] / hypergeometric[0]
    return special.ive(n / 2 + 1, kappa) / special.ive(n / 2, kappa)


# -- E[t] ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 17, 200, 1_000])
def test_the_mean_tilt_is_a_ratio_of_bessel_functions(n):
    for kappa in (1e-3, 0.3, 2.0, 40.0, 900.0):
        got = sampling.mean_tilt(kappa, n)
        assert_allclose(got, bessel_ratio(kappa, n), rtol=3e-6)


@hypothesis.given(tilt=st.floats(1e-4, 0.999), n=st.integers(1, 300))
@hypothesis.settings(max_examples=25, deadline=None)
def test_a_tilt_gives_the_kappa_that_has_it(tilt, n):
    kappa = float(sampling.concentration(tilt, n))
    assert_allclose(bessel_ratio(kappa, n), tilt, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("n", [1, 36_000_000, 10**9])
def test_the_ends_of_the_tilt(n):
    ends = [sampling.concentration(tilt, n) for tilt in (0.0, 1.0)]
    assert_array_equal(ends, [0.0, np.inf])
    assert_array_equal([sampling.mean_tilt(k, n) for k in ends], [0.0, 1.0])


# -- the coordinate along the gradient -------------------------------------------------


@functools.partial(jax.jit, static_argnames="n")
def coordinates(kappa, n):
    draw = jax.vmap(sampling._coordinate, in_axes=(0, None, None))
    return draw(jax.random.split(KEY, 20_000), kappa, n)


@pytest.mark.slow
@one_axis_at_a_time(n=[5, 1, 2, 200], kappa_per_weight=[3.0, 0.0, 0.5, 40.0])
def test_the_coordinate_has_its_density(n, kappa_per_weight):
    kappa = kappa_per_weight * n
    t, rest = coordinates(kappa, n)
    assert stats.kstest(t, cdf_along(kappa, n)).pvalue > LEVEL
    assert_allclose(t**2 + rest**2, 1, rtol=1e-5)


@pytest.mark.slow
@one_axis_at_a_time(n=[10**9, 10**6], tilt=[0.5, 0.0, 0.01, 0.9])
def test_it_is_right_for_as_many_weights_as_there_are(n, tilt):
    """Where the density is a normal one: its mean and variance, in float32."""
    kappa = sampling.concentration(tilt, n)
    t = np.asarray(coordinates(kappa, n)[0], np.float64)
    # Minus the second derivative of the log density at its mode, whose t is the tilt.
    precision = n * (1 + tilt**2) / (1 - tilt**2) ** 2
    error = 5 / np.sqrt(precision * len(t)) + 1e-7  # half an ulp of t
    assert abs(t.mean() - tilt) < error
    if n < 10**9:  # there an ulp of t is no small part of its deviation
        assert_allclose(t.var() * precision, 1, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [np.inf, 1e30, 3e38])
def test_it_ends_at_the_point_of_sam(kappa):
    t, rest = sampling._coordinate(KEY, jnp.float32(kappa), 100)
    assert t == 1 and rest < 1e-12


# -- draws for a linear loss -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 5, 200])
def test_without_preference_it_is_uniform_in_the_ball(n):
    particles, seen = draws(linear(np.ones(n)), dim=n, inverse_temperature=0.0, rho=0.3)
    radii = np.linalg.norm(particles, axis=1)
    assert stats.kstest(radii / 0.3, lambda r: r**n).pvalue > LEVEL
    moments = (particles**2).mean(axis=0) * (n + 2) / 0.3**2
    # The fourth moment of a coordinate is 3 / ((n + 2) (n + 4)).
    spread = math.sqrt((3 * (n + 2) / (n + 4) - 1) / len(particles))
    assert np.abs(moments - 1).max() < 4.5 * spread
    assert_allclose(seen.distances, radii, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "kappa"), [(1, 2.0), (5, 8.0), (200, 150.0)])
def test_it_is_a_von_mises_fisher_distribution_without_two_coordinates(n, kappa):
    slope = np.full(n, 2.0) / np.sqrt(n)
    options = {"inverse_temperature": kappa / 2 / 0.5, "rho": 0.5}
    particles, seen = draws(linear(slope), dim=n, **options)
    along = particles @ slope / 2 / 0.5
    assert_allclose(seen.tilts, along, atol=2e-5)
    mean = np.zeros(n + 2)
    mean[:n] = slope / 2
    theirs = stats.vonmises_fisher(mean, kappa).rvs(20_000, random_state=0)[:, :n]
    for ours, other in (
        (along, theirs @ slope / 2),
        (np.linalg.norm(particles, axis=1) / 0.5, np.linalg.norm(theirs, axis=1)),
        (particles[:, 0] / 0.5, theirs[:, 0]),
    ):
        assert stats.ks_2samp(ours, other).pvalue > LEVEL
    tilt = bessel_ratio(kappa, n)
    variance = 1 - tilt**2 - (n + 1) * tilt / kappa
    assert abs(along.mean() - tilt) < 4 * np.sqrt(variance / len(along))
    assert_allclose(along.var(), variance, rtol=0.06)


@pytest.mark.slow
def test_a_tilt_is_the_mean_coordinate_whatever_the_slope_and_the_radius_are():
    for slope, rho in ((3.0, 0.1), (1e-12, 5.0), (1e20, 1e-3)):
        _, seen = draws(linear(np.full(9, slope)), dim=9, tilt=0.6, rho=rho)
        assert_allclose(seen.tilts.mean(), 0.6, atol=0.01)
        assert_allclose(
            seen.inverse_temperature * rho * 3 * slope,
            sampling.concentration(0.6, 9),
            rtol=1e-5,
        )


@pytest.mark.parametrize(
    "limit",
    slow_but([{"tilt": 1.0}], [{"tilt": 1.0}, {"inverse_temperature": math.inf}]),
)
def test_without_temperature_it_is_sam_to_the_bit(limit):
    params, batch = jax.tree.map(jnp.asarray, toy.regression_problem())
    sam = otmdr_jax.robust_gradient(toy.regression, 0.05, split="shared")
    ours = otmdr_jax.robust_gradient(
        toy.regression, 0.05, sampler="first_order", **limit
    )
    jax.tree.map(
        assert_array_equal,
        jax.jit(ours)(params, batch, key=KEY),
        jax.jit(sam)(params, batch),
    )


# -- what it is drawn for --------------------------------------------------------------

PARAMS = {
    "w": jnp.array([[1.0, -2.0], [0.5, 3.0]]),
    "b": jnp.array([0.1, 0.0, 0.2]),
}


def bent(params, batch=0.0):
    return jnp.sum(params["w"] ** 2) + jnp.sum(jnp.sin(params["b"])) + jnp.mean(batch)


def spread_of(options, name, count=20_000):
    particles, _ = otmdr_jax.sample_particles(
        bent, PARAMS, key=KEY, rho=0.1, num_particles=count, **options
    )
    away = np.asarray(particles[name]) - np.asarray(PARAMS[name])
    return away.reshape(count, -1)


@pytest.mark.slow
def test_a_mask_takes_its_leaves_out_of_the_ball():
    options = {"tilt": 0.0, "mask": {"w": False, "b": True}}
    assert not spread_of(options, "w", 10).any()
    away = spread_of(options, "b")
    assert_allclose((away**2).mean(axis=0), 0.1**2 / (3 + 2), rtol=0.05)


@pytest.mark.slow
def test_leaves_may_have_balls_of_their_own():
    for name, n in (("w", 4), ("b", 3)):
        away = spread_of({"tilt": 0.8, "norm": "per_leaf"}, name)
        gradient = np.ravel(jax.grad(bent)(PARAMS)[name])
        along = away @ gradient / np.linalg.norm(gradient) / 0.1
        kappa = float(sampling.concentration(0.8, n))
        assert stats.kstest(along, cdf_along(kappa, n)).pvalue > LEVEL
        assert np.linalg.norm(away, axis=1).max() <= 0.1 * (1 + 1e-5)


@pytest.mark.slow
def test_an_ellipsoid_is_a_ball_in_units_of_the_weights():
    away = spread_of({"tilt": 0.7, "adaptive": True}, "w")
    scale = np.abs(np.ravel(PARAMS["w"]))
    units = away / scale / 0.1
    scaled = {k: np.abs(PARAMS[k]) * g for k, g in jax.grad(bent)(PARAMS).items()}
    whole = np.concatenate([np.ravel(scaled["w"]), np.ravel(scaled["b"])])
    # The mean of u is the tilt along T g, of which these are four of seven coordinates.
    want = 0.7 * np.ravel(scaled["w"]) / np.linalg.norm(whole)
    assert_allclose(units.mean(axis=0), want, atol=0.01)


@pytest.mark.slow
def test_complex_weights_are_pairs_of_real_ones():
    slope = 3.0 - 4.0j
    particles, _ = otmdr_jax.sample_particles(
        lambda z: jnp.sum(jnp.real(jnp.conj(slope) * z)),
        jnp.zeros(2, jnp.complex64),
        key=KEY, rho=1.0, tilt=0.6, num_particles=20_000,
    )  # fmt: skip
    unit = np.full(2, slope) / np.linalg.norm(np.full(2, slope))
    along = np.real(np.asarray(particles) @ np.conj(unit))
    kappa = float(sampling.concentration(0.6, 4))
    assert stats.kstest(along, cdf_along(kappa, 4)).pvalue > LEVEL


@pytest.mark.slow
def test_without_a_slope_it_is_uniform_and_at_the_limit_stays():
    for options in ({"tilt": 0.5}, {"inverse_temperature": 7.0}):
        particles, _ = draws(lambda w: 0.0 * jnp.sum(w), dim=3, **options)
        radii = np.linalg.norm(particles, axis=1)
        assert stats.kstest(radii, lambda r: r**3).pvalue > LEVEL
    for options in ({"tilt": 1.0}, {"inverse_temperature": np.inf}):
        particles, _ = draws(lambda w: 0.0 * jnp.sum(w), 10, 3, **options)
        assert not particles.any()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["first_order", "langevin"])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_what_is_not_finite_is_seen_and_a_radius_of_zero_stays(sampler, rho):
    options = {"num_steps": 3} if sampler == "langevin" else {}
    options |= {"sampler": sampler, "tilt": 0.9}
    particles, seen = draws(linear([2.0, 1.0]), 10, **options, rho=0.0)
    assert not particles.any() and not seen.tilts.any()
    bad = linear([np.nan, 1.0])
    particles, _ = draws(bad, 10, **options, rho=rho)
    assert np.isnan(particles).any(axis=1).all()


@pytest.mark.slow
def test_half_precision_weights_keep_their_dtype_and_the_law():
    center = {"w": jnp.ones(8, jnp.bfloat16)}
    particles, _ = otmdr_jax.sample_particles(
        lambda p: jnp.sum(p["w"]), center,
        key=KEY, rho=0.5, tilt=0.5, num_particles=20_000,
    )  # fmt: skip
    assert particles["w"].dtype == jnp.bfloat16
    along = (np.asarray(particles["w"], np.float64) - 1).sum(axis=1) / 8**0.5 / 0.5
    assert_allclose(along.mean(), 0.5, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0.0, 1e-7])
@pytest.mark.parametrize("n", [1, 2])
def test_a_draw_is_finite_whatever_numbers_come(n, number, monkeypatch):
    """One in 2^23 exponential numbers is 0: the length of what is left out."""
    monkeypatch.setattr(jax.random, "exponential", lambda k, s=(): jnp.full(s, number))
    particles, seen = draws(linear(np.ones(n)), 10, n, tilt=0.6)
    assert np.isfinite(particles).all()
    if n == 1:  # t is all there is; where proposals are 0 it is the mode
        kappa = float(sampling.concentration(0.6, 1))
        assert_allclose(particles, math.hypot(1 / kappa, 1) - 1 / kappa, atol=2e-3)
    assert seen.distances.max() <= 1 + 1e-6


@pytest.mark.parametrize("limit", [{"tilt": 1.0}, {"inverse_temperature": math.inf}])
def test_no_nan_is_made_on_the_way(limit):
    for options in (limit, dict.fromkeys(limit, 0.0)):
        for slope in (0.0, 2.0):
            with jax.debug_nans(True):
                otmdr_jax.sample_particles(
                    linear([slope, 0.0]), jnp.zeros(2), key=KEY, rho=0.5, **options
                )


def test_a_tilt_that_is_nan_is_seen():
    assert np.isnan(sampling.concentration(np.nan, 5))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"adaptive": True}, {"fisher": 2.0}])
def test_in_an_ellipsoid_lambda_and_tilts_are_those_of_its_ball(shape):
    w, slope = np.array([1.0, -2.0, 3.0]), np.array([1.0, 1.0, 4.0])
    t = np.abs(w) if "adaptive" in shape else 1 / np.sqrt(1 + 2 * slope**2)
    options = {"center": jnp.asarray(w, jnp.float32), "rho": 0.5, **shape}
    particles, seen = draws(linear(slope), dim=3, tilt=0.6, **options)
    length = np.linalg.norm(t * slope)
    along = particles / t / 0.5 @ (t * slope) / length
    assert_allclose(seen.tilts, along, atol=1e-5)
    assert_allclose(along.mean(), 0.6, atol=0.01)
    kappa = seen.inverse_temperature * 0.5 * length
    assert_allclose(kappa, sampling.concentration(0.6, 3), rtol=1e-5)
    assert_allclose(seen.grad_norm, np.linalg.norm(slope), rtol=1e-6)
    # With that lambda in place of the tilt the draws are the same ones.
    again, _ = draws(
        linear(slope), dim=3, inverse_temperature=seen.inverse_temperature, **options
    )
    assert_allclose(again, particles, atol=1e-5)


def test_particles_that_are_all_the_same_one_are_as_many_as_asked_for():
    params, batch = jax.tree.map(jnp.asarray, toy.regression_problem())
    particles, seen = otmdr_jax.sample_particles(
        toy.regression, params, batch, rho=(0.1, 0.2), sampler="ascent",
        split="ordered", num_particles=3,
    )  # fmt: skip
    assert particles["w"].shape == (3, *params["w"].shape)
    assert_array_equal(particles["w"][1:], particles["w"][:-1])
    assert seen.distances.shape == seen.tilts.shape == (3,)


@pytest.mark.slow
def test_on_devices_what_is_seen_is_that_of_all_examples():
    params, batch = jax.tree.map(jnp.asarray, toy.regression_problem())

    def loss(params, batch):
        residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
        return jnp.mean(residual**2), {"mean": residual.mean(), "each": residual}

    def run(batch, axis):
        return otmdr_jax.sample_particles(
            loss, params, batch, KEY, rho=0.2, tilt=0.5, has_aux=True,
            axis_name=axis,
        )  # fmt: skip

    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    particles, seen = jax.vmap(lambda b: run(b, "data"), axis_name="data")(halves)
    want, whole = jax.jit(lambda b: run(b, None))(batch)
    for device in range(2):
        here = jax.tree.map(lambda x, i=device: x[i], (particles, seen))
        aux = here[1].aux.pop("each")
        assert_allclose(aux, np.split(whole.aux["each"], 2, axis=1)[device], rtol=1e-4)
        jax.tree.map(
            functools.partial(assert_allclose, rtol=1e-4, atol=1e-6),
            here,
            (want, whole._replace(aux={"mean": whole.aux["mean"]})),
        )


# -- Markov chains ---------------------------------------------------------------------


def wavy(w):
    """Neither linear nor quadratic, with two maxima in the ball."""
    return jnp.sin(3 * w[0]) * jnp.cos(2 * w[1]) + 0.5 * w[0] * w[1] ** 2


@functools.cache
def cells(heat, bins=12):
    """Probabilities of the cells of a grid over the unit ball, by quadrature."""
    fine = (np.arange(bins * 40) + 0.5) / (bins * 40) * 2 - 1
    x, y = np.meshgrid(fine, fine, indexing="ij")
    density = np.exp(
        heat * np.asarray(jax.vmap(wavy, -1)(jnp.stack([x.ravel(), y.ravel()])))
    )
    density = density.reshape(x.shape) * (x**2 + y**2 <= 1)
    density = np.float64(density)
    blocks = density.reshape(bins, 40, bins, 40).sum(axis=(1, 3))
    return blocks / blocks.sum()


def chi_square(particles, expected, bins=12):
    """The p-value of a histogram, its rare cells taken together."""
    edges = np.linspace(-1, 1, bins + 1)
    seen, *_ = np.histogram2d(*particles.T, bins=[edges, edges])
    expected = expected * len(particles)
    rare = expected < 10
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue


def chains(heat, **options):
    options = {"num_steps": 60, "step_size": 0.35, "split": "shared", **options}
    return draws(wavy, sampler="langevin", inverse_temperature=heat, **options)


@pytest.mark.slow
@pytest.mark.parametrize("heat", [0.0, 1.5, 4.0])
def test_a_chain_has_the_density_of_the_loss(heat):
    particles, seen = chains(heat)
    assert chi_square(particles, cells(heat)) > LEVEL
    assert np.all((seen.acceptance_rate > 0.1) & (seen.acceptance_rate <= 1))
    if heat:  # which the linearised loss has not
        others, _ = draws(wavy, inverse_temperature=heat)
        assert chi_square(others, cells(heat)) < 1e-10


@pytest.mark.slow
def test_it_agrees_with_the_chain_of_blackjax():
    """Their MALA of the same density, with the ball's edge as a wall."""
    heat = 1.5

    def log_density(w):
        return jnp.where(jnp.sum(w**2) <= 1, heat * wavy(w), -jnp.inf)

    # Their proposal moves by step_size grad + sqrt(2 step_size) noise.
    mala = blackjax.mala(log_density, 0.35**2 / 2)

    def chain(key):
        def step(state, key):
            return mala.step(key, state)[0], None

        start = mala.init(jnp.zeros(2))
        return jax.lax.scan(step, start, jax.random.split(key, 300))[0].position

    theirs = jax.jit(jax.vmap(chain))(jax.random.split(KEY, 20_000))
    ours, _ = chains(heat)
    for coordinate in (lambda w: w[:, 0], lambda w: w[:, 1], lambda w: (w**2).sum(1)):
        test = stats.ks_2samp(coordinate(ours), coordinate(np.asarray(theirs)))
        assert test.pvalue > LEVEL


@pytest.mark.slow
def test_a_quadratic_gives_a_gaussian_cut_off_at_the_ball():
    """Whose squared radius is chi-square, cut off."""
    heat, n = 6.0, 3
    particles, _ = draws(
        lambda w: -0.5 * jnp.sum(w**2), dim=n, sampler="langevin", split="shared",
        inverse_temperature=heat, num_steps=60, step_size=0.3,
    )  # fmt: skip
    chi2 = stats.chi2(n)
    squares = (particles**2).sum(axis=1) * heat
    assert stats.kstest(squares, lambda x: chi2.cdf(x) / chi2.cdf(heat)).pvalue > LEVEL


@pytest.mark.slow
def test_a_chain_of_a_linear_loss_stays_in_its_law():
    particles, seen = draws(
        linear([3.0, 4.0]), sampler="langevin", split="shared", tilt=0.7, num_steps=20
    )
    kappa = float(sampling.concentration(0.7, 2))
    along = particles @ np.array([0.6, 0.8])
    assert stats.kstest(along, cdf_along(kappa, 2)).pvalue > LEVEL
    # It moves, so that its states are worth less than as many draws, but not nothing.
    worth = float(seen.effective_sample_size)
    assert 5_000 < worth < 20_000 * 20 / 3
    assert seen.energies.shape == (20_000, 20)
    assert_allclose(
        seen.energies[:, -1], particles @ np.array([3.0, 4.0]), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_the_effective_sample_size_of_an_autoregression(correlation):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(8, 4_000)) * math.sqrt(1 - correlation**2)
    x = np.zeros_like(noise)
    for i in range(1, x.shape[1]):
        x[:, i] = correlation * x[:, i - 1] + noise[:, i]
    got = langevin.effective_sample_size(jnp.asarray(x, jnp.float32))
    want = x.size * (1 - correlation) / (1 + correlation)
    assert_allclose(got, want, rtol=0.12)
    theirs = blackjax.diagnostics.effective_sample_size(x)
    assert_allclose(got, theirs, rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("heat", [1e6, 1e9])
def test_parts_of_the_batch_in_turn_are_a_loop_in_numpy(heat):
    """One gradient for each part, held in the ball: the noise is what is left over."""
    params, batch = toy.regression_problem()
    ours = functools.partial(
        otmdr_jax.sample_particles, toy.regression, params, batch, rho=0.2,
        sampler="langevin", split="ordered", num_steps=3, num_particles=4_000,
        particle_map="vmap",
    )  # fmt: skip
    # So little noise that the chain is an ascent: lambda h^2 / 2 is its rate.
    h = 1e-4
    particles, seen = ours(key=KEY, inverse_temperature=heat, step_size=h)
    rate = heat * (h * 0.2) ** 2 / 2
    w, b = params["w"].astype(np.float64), float(params["b"])
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        gw, gb = toy.regression_gradient(w, b, batch["x"][rows], batch["y"][rows])
        w, b = w + rate * gw, b + rate * gb
        dw, db = w - params["w"], b - params["b"]
        factor = min(1.0, 0.2 / math.sqrt((dw**2).sum() + db**2))
        w, b = params["w"] + factor * dw, params["b"] + factor * db
    spread = h * 0.2 * 3**0.5
    error = spread / 4_000**0.5 * 5 + 2e-6
    assert_allclose(particles["w"].mean(axis=0), w, atol=error)
    assert seen.distances.max() <= 0.2 * (1 + 1e-5)
    if heat > 1e6:  # each step leaves the ball, and is taken back to it
        assert_allclose(seen.distances, 0.2, rtol=1e-4)
        return
    # With noise alone its variance is that of the steps.
    particles, _ = ours(key=KEY, inverse_temperature=0.0, step_size=0.05)
    away = np.asarray(particles["w"]) - params["w"]
    assert_allclose(away.std(axis=0), 0.05 * 0.2 * 3**0.5, rtol=0.05)


@pytest.mark.slow
def test_a_chain_does_not_depend_on_the_units_of_the_loss():
    """The products of gradients of 1e-24 or 1e24 are out of float32's range."""

    @jax.jit
    def chains_of(scale):
        particles, seen = otmdr_jax.sample_particles(
            lambda w: scale * wavy(w), jnp.zeros(2), key=KEY, rho=1.0, tilt=0.5,
            sampler="langevin", num_steps=30, step_size=0.35, num_particles=500,
            particle_map="vmap",
        )  # fmt: skip
        return particles, seen.acceptance_rate

    want = chains_of(1.0)
    for scale in (2.0**-80, 2.0**80):
        close = functools.partial(assert_allclose, atol=1e-5)
        jax.tree.map(close, chains_of(scale), want)


@pytest.mark.slow
def test_what_has_no_probability_is_never_reached():
    particles, seen = draws(
        lambda w: jnp.where(w[0] > 0, -jnp.inf, jnp.sum(w)), 500, sampler="langevin",
        split="shared", inverse_temperature=1.0, num_steps=20, step_size=0.35,
        center=jnp.array([-1e-3, 0.0]), rho=1.0,
    )  # fmt: skip
    possible = np.isfinite(seen.energies)
    assert np.all(possible[:, 1:] >= possible[:, :-1])  # left once, and for good
    assert possible[:, -1].mean() > 0.9 and (particles[possible[:, -1], 0] < 2e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["shared", "ordered"])
def test_chains_of_float32_weights_with_64_bits_enabled(split):
    with jax.enable_x64(True):
        params, batch = toy.regression_problem()
        particles, seen = otmdr_jax.sample_particles(
            toy.regression, params, batch, jax.random.key(0), rho=0.2, tilt=0.5,
            sampler="langevin", split=split, num_steps=2, num_particles=2,
        )  # fmt: skip
    assert particles["w"].dtype == params["w"].dtype == np.float32
    assert np.all(seen.distances <= 0.2 * (1 + 1e-6))


# -- training on it --------------------------------------------------------------------


@one_axis_at_a_time(
    options=[
        {"sampler": "first_order", "tilt": 0.6},
        {"sampler": "first_order", "inverse_temperature": 5.0, "norm": "per_leaf"},
        {"sampler": "langevin", "tilt": 0.6, "split": "shared", "num_steps": 3},
        {"sampler": "langevin", "tilt": 0.6, "split": "random", "num_steps": 3},
        {"sampler": "ascent", "project": True},
    ],
    count=[3, 1],
)
@pytest.mark.slow
def test_the_gradient_is_the_mean_over_these_particles(options, count):
    params, batch = jax.tree.map(jnp.asarray, toy.regression_problem())
    rho = (0.1, 0.2) if options["sampler"] == "ascent" else 0.2
    options = {**options, "num_particles": count}
    gradient = otmdr_jax.robust_gradient(toy.regression, rho, **options)
    found = gradient(params, batch, key=KEY)
    particles, seen = otmdr_jax.sample_particles(
        toy.regression, params, batch, KEY, rho=rho, **options
    )
    losses, grads = [], []
    for w, b in zip(
        np.asarray(particles["w"]), np.asarray(particles["b"]), strict=True
    ):
        residual = batch["x"] @ w + b - batch["y"]
        losses.append(np.mean(residual**2))
        grads.append(toy.regression_gradient(w, b, batch["x"], batch["y"]))
    assert_allclose(found.value, np.mean(losses), rtol=1e-5)
    for name, values in zip("wb", zip(*grads, strict=True), strict=True):
        assert_allclose(
            found.grads[name], np.mean(values, axis=0), rtol=2e-5, atol=1e-6
        )
    assert_allclose(found.diagnostics.distances, seen.distances, rtol=1e-4)
    assert seen.distances.max() <= 0.2 * (2 if options.get("norm") else 1) * (1 + 1e-5)


def test_a_projected_climb_is_one_in_numpy():
    params, batch = toy.regression_problem()
    x, y = batch["x"], batch["y"]
    w, b = params["w"].astype(np.float64), float(params["b"])
    for rows, rho in ((slice(0, 6), 0.3), (slice(6, 12), 0.25)):
        w, b = toy.climb(w, b, [(x[rows], y[rows])], [rho])
        dw, db = w - params["w"], b - params["b"]
        factor = min(1.0, 0.3 / math.sqrt((dw**2).sum() + db**2))
        w, b = params["w"] + factor * dw, params["b"] + factor * db
    particles, seen = otmdr_jax.sample_particles(
        toy.regression, params, batch, rho=(0.3, 0.25), sampler="ascent",
        split="ordered", project=True,
    )  # fmt: skip
    assert_allclose(particles["w"][0], w, rtol=1e-5)
    assert_allclose(seen.distances, 0.3, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"split": "shared"}, 2),
        ({"sampler": "first_order", "tilt": 0.5, "num_particles": 1}, 2),
        pytest.param(
            {"sampler": "first_order", "tilt": 0.5, "num_particles": 4},
            5,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"sampler": "langevin", "split": "shared", "num_particles": 2},
            1 + 2 * 4,
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_one_gradient_serves_all_particles(options, count):
    """1 + K passes over the whole batch, of a chain 1 + K (1 + S)."""
    passes = []

    def loss(w, batch):
        jax.debug.callback(lambda: passes.append(len(batch)))
        return jnp.mean((batch @ w) ** 2)

    if options.get("sampler") == "langevin":
        options = {**options, "tilt": 0.5, "num_steps": 3}
    run = jax.jit(otmdr_jax.value_and_grad(loss, 0.1, **options))
    jax.block_until_ready(run(jnp.ones(3), jnp.ones((8, 3)), key=KEY))
    jax.effects_barrier()
    assert passes == [8] * count


CHAIN = {"sampler": "langevin", "num_steps": 2, "tilt": 0.5}


@pytest.mark.slow
def test_strength_may_follow_a_schedule():
    loss = linear([3.0, 4.0])
    tx = otmdr_jax.otmdr(
        lambda w, batch: loss(w) + 0.5 * jnp.sum(w**2) + 0 * jnp.mean(batch),
        KEY, rho=0.5, sampler="first_order",
        tilt=lambda count: jnp.where(count < 2, 0.0, 1.0),
    )  # fmt: skip
    w = jnp.zeros(2)
    state, at_limit = tx.init(w), []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(w, state, w, batch=jnp.ones(2))
        at_limit.append(np.allclose(updates, [3.3, 4.4], atol=1e-5))
    assert at_limit == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "first_order"}, "needs either inverse_temperature"),
        ({"sampler": "first_order", "tilt": 0.5, "inverse_temperature": 1.0}, "either"),
        ({"sampler": "first_order", "tilt": 1.5}, "tilt must be from 0 to 1"),
        ({"sampler": "first_order", "tilt": -0.1}, "tilt must be finite and not neg"),
        ({"sampler": "first_order", "inverse_temperature": -1.0}, "must be at least 0"),
        ({"sampler": "first_order", "inverse_temperature": math.nan}, "at least 0"),
        ({"sampler": "first_order", "tilt": 0.5, "num_steps": 3}, "num_steps does not"),
        ({"sampler": "first_order", "tilt": 0.5, "noise_std": 0.1}, "no steps of asc"),
        ({"sampler": "first_order", "tilt": 0.5, "norm": "none"}, "has no ball"),
        ({"sampler": "first_order", "tilt": 0.5, "split": "ordered"}, "does nothing"),
        ({"sampler": "first_order", "tilt": 0.5, "project": True}, "project does not"),
        ({"sampler": "langevin", "tilt": 0.5}, "needs num_steps"),
        ({**CHAIN, "tilt": 1.0}, "a tilt below 1"),
        (
            {"sampler": "langevin", "num_steps": 2, "inverse_temperature": math.inf},
            "fi",
        ),
        ({**CHAIN, "adaptive": True}, "ball of all weights"),
        ({**CHAIN, "num_steps": 0}, "at least 1"),
        ({**CHAIN, "step_size": -1.0}, "not negative"),
        ({"inverse_temperature": 0.0}, "does nothing with sampler='ascent'"),
        ({"project": True, "norm": "per_leaf"}, "needs a ball, and one radius"),
        ({"project": True}, "does nothing for one step without noise"),
        ({"sampler": "mala", "tilt": 0.5}, "sampler must be one of 'ascent'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused_before_the_call(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        otmdr_jax.value_and_grad(bent, 0.1, **options)


def test_particles_from_one_gradient_have_no_split():
    with pytest.raises(ValueError, match="split='random' does nothing with"):
        otmdr_jax.sample_particles(
            linear([1.0]), jnp.zeros(1), key=KEY, rho=0.1, tilt=0.5, split="random"
        )


def test_a_sampler_has_one_radius():
    with pytest.raises(ValueError, match="has one radius, that of its ball; got 2"):
        otmdr_jax.value_and_grad(bent, sampler="first_order", tilt=0.5)
    run = otmdr_jax.value_and_grad(bent, 0.1, sampler="first_order", tilt=0.5)
    with pytest.raises(ValueError, match="has one radius"):
        run(PARAMS, jnp.ones(2), key=KEY, rho=(0.1, 0.2))
    with pytest.raises(ValueError, match="need randomness: pass a key"):
        run(PARAMS, jnp.ones(2))
