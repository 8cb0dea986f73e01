"""The robust gradient against closed forms, NumPy and the limits of the method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import otmdr_jax
from otmdr_jax.core import loops
from tests import toy
from tests.marks import slow_but

# As a user's programs are compiled: see tests/conftest.py.
pytestmark = pytest.mark.usefixtures("optimized")
RTOL = 2e-5


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def halves(data, size):
    x, y = data["x"], data["y"]
    return [(x[:size], y[:size]), (x[size:], y[size:])]


# -- Eqs. 9 and 10 --------------------------------------------------------------------


@pytest.mark.essential
@pytest.mark.parametrize("batch", [12, 7])
def test_equations_9_and_10_against_numpy(batch):
    params, data = toy.regression_problem(batch=batch)
    radii = (0.05, 0.1)
    value, grads = jax.jit(
        otmdr_jax.value_and_grad(toy.regression, rho=radii, split="ordered")
    )(params, data)

    p, d = double(params), double(data)
    w, b = toy.climb(p["w"], p["b"], halves(d, -(-batch // 2)), radii)
    gw, gb = toy.regression_gradient(w, b, d["x"], d["y"])
    np.testing.assert_allclose(grads["w"], gw, rtol=RTOL)
    np.testing.assert_allclose(grads["b"], gb, rtol=RTOL)
    loss = np.mean((d["x"] @ w + b - d["y"]) ** 2)
    np.testing.assert_allclose(value, loss, rtol=RTOL)


@pytest.mark.slow
def test_k_particles_average_over_random_splits_against_numpy(key):
    """Recovers each particle's split by replaying the permutations, then NumPy."""
    params, data = toy.regression_problem(batch=9)
    radii, num_particles = (0.05, 0.1, 0.02), 3
    _, grads = otmdr_jax.value_and_grad(
        toy.regression, radii, num_particles=num_particles
    )(params, data, key=key)
    split_key, _ = jax.random.split(key)
    p, d = double(params), double(data)
    results = []
    for particle_key in jax.random.split(split_key, num_particles):
        order = np.asarray(jax.random.permutation(particle_key, 9))
        parts = [(d["x"][i], d["y"][i]) for i in np.array_split(order, 3)]
        w, b = toy.climb(p["w"], p["b"], parts, radii)
        results.append(toy.regression_gradient(w, b, d["x"], d["y"]))
    np.testing.assert_allclose(
        grads["w"], np.mean([g for g, _ in results], axis=0), rtol=RTOL
    )
    np.testing.assert_allclose(grads["b"], np.mean([g for _, g in results]), rtol=RTOL)


def test_quadratic_has_the_closed_form():
    w = jnp.array([1.0, -2.0, 0.5])
    a = np.array([1.0, 3.0, 10.0])
    value, grads = otmdr_jax.value_and_grad(toy.quadratic, rho=0.7, split="shared")(
        w, jnp.zeros(4)
    )
    g = a * np.asarray(w)
    expected = np.asarray(w) + 0.7 * g / np.linalg.norm(g)
    np.testing.assert_allclose(grads, a * expected, rtol=1e-6)
    np.testing.assert_allclose(value, 0.5 * np.sum(a * expected**2), rtol=1e-6)


def test_noise_has_the_stated_standard_deviation_after_each_step():
    """On a linear loss with rho = 0 the particle is the center plus S draws."""
    w = jnp.zeros(40_000)
    noise_std, steps = 0.3, 3
    result = otmdr_jax.robust_gradient(
        lambda w, batch: 0.5 * jnp.sum(w**2) + 0 * jnp.sum(batch),
        rho=(0.0,) * steps,
        noise_std=noise_std,
        split="shared",
    )(w, jnp.zeros(2), key=jax.random.key(1))
    # The gradient of 0.5 |w|^2 is the particle itself.
    assert abs(float(jnp.std(result.grads)) / (noise_std * steps**0.5) - 1) < 0.02
    assert abs(float(jnp.mean(result.grads))) < 0.01


def test_noise_differs_between_particles_steps_and_leaves(key):
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    seen = []

    def loss(p, batch):
        jax.debug.callback(lambda p: seen.append(jax.tree.map(np.asarray, p)), p)
        return jnp.sum(p["a"] * 0) + jnp.sum(p["b"] * 0) + 0 * jnp.sum(batch)

    otmdr_jax.value_and_grad(
        loss, (0.0, 0.0), num_particles=2, noise_std=1.0, split="ordered"
    )(params, jnp.zeros(4), key=key)
    jax.effects_barrier()
    points = np.array([np.concatenate([p["a"], p["b"]]) for p in seen])
    draws = points[np.abs(points).sum(axis=1) > 0]
    assert len(draws) == 4  # two particles, after one and after two steps
    flat = np.round(draws.ravel(), 6)
    assert len(np.unique(flat)) == len(flat)


# -- limits of section 2 of the method ------------------------------------------------


def sam_trajectory(loss_fn, params, batches, rho, lr):
    tx = optax.contrib.sam(
        optax.sgd(lr, momentum=0.9),
        optax.chain(optax.contrib.normalize(), optax.sgd(rho)),
        opaque_mode=True,
    )
    state = tx.init(params)
    for batch in batches:
        grad_fn = jax.grad(lambda p, _, batch=batch: loss_fn(p, batch))
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    return params


def run(tx, params, batches):
    state = tx.init(params)
    update = jax.jit(lambda s, p, b: tx.update(p, s, p, batch=b))
    for batch in batches:
        updates, state = update(state, params, batch)
        params = optax.apply_updates(params, updates)
    return params


def batches_of(problem_batches=20):
    return [toy.regression_problem(seed=s)[1] for s in range(problem_batches)]


def test_limit_sam_is_optax_contrib_sam_over_a_trajectory():
    params, _ = toy.regression_problem()
    params = jax.tree.map(jnp.asarray, params)
    expected = sam_trajectory(toy.regression, params, batches_of(), 0.1, 0.05)
    tx = optax.chain(
        otmdr_jax.sam(toy.regression, rho=0.1), optax.sgd(0.05, momentum=0.9)
    )
    got = run(tx, params, batches_of())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, expected
    )


def test_limit_one_step_on_the_whole_batch_is_sam():
    params, data = toy.regression_problem()
    _, grads = otmdr_jax.value_and_grad(toy.regression, (0.1,), split="ordered")(
        params, data
    )
    plain = jax.grad(toy.regression)(params, data)
    length = optax.tree.norm(plain)
    moved = jax.tree.map(lambda p, g: p + 0.1 * g / length, params, plain)
    expected = jax.grad(toy.regression)(moved, data)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL), grads, expected
    )


@pytest.mark.parametrize("num_particles", [1, 2, 5])
@pytest.mark.parametrize("split", ["random", "ordered", "shared"])
def test_limit_zero_radius_is_the_plain_gradient(split, num_particles, key):
    params, data = toy.regression_problem()
    value, grads = otmdr_jax.value_and_grad(
        toy.regression, (0.0, 0.0), num_particles=num_particles, split=split
    )(params, data, key=key)
    expected_value, expected = jax.value_and_grad(toy.regression)(params, data)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), grads, expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("particle_map", ["vmap", "unroll", "scan"])
def test_limit_particles_with_equal_randomness_are_one_particle(particle_map, key):
    params, data = toy.regression_problem()

    def particle(key):
        value, grads = otmdr_jax.value_and_grad(toy.regression, noise_std=0.1)(
            params, data, key=key
        )
        return grads, value

    one, _ = particle(key)
    mean, values = loops.average(particle, jnp.stack([key] * 4), 4, particle_map)
    assert values.shape == (4,)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mean, one)


def test_limit_without_randomness_all_particles_are_the_same():
    params, data = toy.regression_problem()
    one = otmdr_jax.robust_gradient(toy.regression, split="ordered")(params, data)
    many = otmdr_jax.robust_gradient(toy.regression, num_particles=3, split="ordered")(
        params, data
    )
    jax.tree.map(np.testing.assert_array_equal, one.grads, many.grads)
    np.testing.assert_array_equal(
        many.diagnostics.distances, np.repeat(one.diagnostics.distances, 3)
    )


@pytest.mark.parametrize(
    "particle_map", slow_but(["vmap", "scan"], ["vmap", "unroll", "scan"])
)
def test_limit_permuting_the_particles_changes_nothing(particle_map, key):
    params, data = toy.regression_problem()
    keys = jax.random.split(key, 4)

    def particle(key):
        value, grads = otmdr_jax.value_and_grad(toy.regression)(params, data, key=key)
        return grads, value

    average = jax.jit(lambda keys: loops.average(particle, keys, 4, particle_map))
    forth, values = average(keys)
    back, seulav = average(keys[::-1])
    np.testing.assert_allclose(values, seulav[::-1], rtol=1e-6)
    assert len(np.unique(values)) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), forth, back)


@pytest.mark.parametrize("factor", [1e-25, 1e-6, 1e6, 1e25])
def test_limit_scaling_the_loss_leaves_the_particles(factor, key):
    params, data = toy.regression_problem()

    scaled = otmdr_jax.robust_gradient(
        lambda p, b: factor * toy.regression(p, b), rho=(0.05, 0.1)
    )(params, data, key=key)
    reference = otmdr_jax.robust_gradient(toy.regression, rho=(0.05, 0.1))(
        params, data, key=key
    )
    np.testing.assert_allclose(
        scaled.diagnostics.distances, reference.diagnostics.distances, rtol=1e-4
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / factor, b, rtol=1e-4),
        scaled.grads,
        reference.grads,
    )


# -- options --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("particle_map", ["vmap", "scan"])
@pytest.mark.parametrize("noise_std", [0.0, 0.05])
def test_particle_maps_agree(particle_map, noise_std, key):
    params, data = toy.regression_problem(batch=11)

    def result(how):
        return jax.jit(
            otmdr_jax.robust_gradient(
                toy.regression,
                num_particles=3,
                noise_std=noise_std,
                particle_map=how,
            )
        )(params, data, key=key)

    expected, got = result("unroll"), result(particle_map)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected
    )
    assert len(np.unique(got.diagnostics.distances)) == 3


def test_per_leaf_norm_moves_each_leaf_by_rho():
    params, data = toy.regression_problem()
    _, grads = otmdr_jax.value_and_grad(
        toy.regression, 0.1, split="shared", norm="per_leaf"
    )(params, data)
    p, d = double(params), double(data)
    gw, gb = toy.regression_gradient(p["w"], p["b"], d["x"], d["y"])
    w = p["w"] + 0.1 * gw / np.linalg.norm(gw)
    b = p["b"] + 0.1 * np.sign(gb)
    expected, _ = toy.regression_gradient(w, b, d["x"], d["y"])
    np.testing.assert_allclose(grads["w"], expected, rtol=RTOL)


def test_adaptive_is_asam():
    params, data = toy.regression_problem()
    _, grads = otmdr_jax.value_and_grad(
        toy.regression, 0.5, split="shared", adaptive=True
    )(params, data)
    p, d = double(params), double(data)
    gw, gb = toy.regression_gradient(p["w"], p["b"], d["x"], d["y"])
    length = np.sqrt(np.sum((p["w"] * gw) ** 2) + (p["b"] * gb) ** 2)
    w = p["w"] + 0.5 * p["w"] ** 2 * gw / length
    b = p["b"] + 0.5 * p["b"] ** 2 * gb / length
    expected, _ = toy.regression_gradient(w, b, d["x"], d["y"])
    np.testing.assert_allclose(grads["w"], expected, rtol=RTOL)


def test_adaptive_is_invariant_to_a_rescaling_that_keeps_the_function():
    """ASAM's purpose: f(u, v) = u v is the same at (2u, v / 2), so is its ascent."""

    def loss(p, batch):
        return jnp.mean((p["u"] * p["v"] - batch) ** 2)

    def robust_loss(u, v):
        return otmdr_jax.value_and_grad(loss, 0.3, split="shared", adaptive=True)(
            {"u": jnp.array(u), "v": jnp.array(v)}, jnp.zeros(2)
        )[0]

    np.testing.assert_allclose(robust_loss(3.0, 1.0), robust_loss(6.0, 0.5), rtol=1e-6)


@pytest.mark.parametrize("merge", ["sum", "mean"])
def test_merge_is_the_released_second_direction(merge):
    params, data = toy.regression_problem()
    result = otmdr_jax.robust_gradient(
        toy.regression, (0.05, 0.1), split="ordered", merge=merge
    )(params, data)
    p, d = double(params), double(data)
    first, second = halves(d, 6)
    w1, b1 = toy.climb(p["w"], p["b"], [first], [0.05])
    gw1, gb1 = toy.regression_gradient(p["w"], p["b"], *first)
    gw2, gb2 = toy.regression_gradient(w1, b1, *second)
    share = 0.1 / np.sqrt(np.sum(gw2**2) + gb2**2) / (2 if merge == "mean" else 1)
    w2, b2 = w1 + share * (gw1 + gw2), b1 + share * (gb1 + gb2)
    expected, _ = toy.regression_gradient(w2, b2, d["x"], d["y"])
    np.testing.assert_allclose(result.grads["w"], expected, rtol=RTOL)
    distance = np.sqrt(np.sum((w2 - p["w"]) ** 2) + (b2 - p["b"]) ** 2)
    np.testing.assert_allclose(result.diagnostics.distances, [distance], rtol=1e-4)


def test_aux_comes_from_the_center_and_is_averaged_over_particles(key):
    w = jnp.array([1.0, 2.0])
    batch = jnp.arange(8.0)

    def loss(w, batch):
        aux = {"mean": jnp.mean(batch), "w": w, "count": jnp.int32(batch.shape[0])}
        return jnp.sum(w**2) + 0 * jnp.sum(batch), aux

    (_, aux), _ = otmdr_jax.value_and_grad(loss, num_particles=3, has_aux=True)(
        w, batch, key=key
    )
    np.testing.assert_array_equal(aux["w"], w)  # unperturbed
    assert aux["count"] == 4 and aux["count"].dtype == jnp.int32
    split_key, _ = jax.random.split(key)
    orders = [jax.random.permutation(k, 8)[:4] for k in jax.random.split(split_key, 3)]
    expected = np.mean([np.asarray(batch)[o].mean() for o in orders])
    np.testing.assert_allclose(aux["mean"], expected, rtol=1e-6)


def test_further_arguments_reach_the_loss():
    def loss(w, batch, scale, *, shift):
        return scale * jnp.sum(w**2) + shift + 0 * jnp.sum(batch)

    value, _ = otmdr_jax.value_and_grad(loss, (0.0,), split="shared")(
        jnp.array([2.0]), jnp.zeros(1), 3.0, shift=1.0
    )
    assert value == 13.0


def test_rho_can_be_overridden_for_one_call():
    params, data = toy.regression_problem()
    fn = otmdr_jax.value_and_grad(toy.regression, (0.05, 0.1), split="ordered")
    other = otmdr_jax.value_and_grad(toy.regression, (0.3, 0.0), split="ordered")
    got = fn(params, data, rho=(0.3, 0.0))
    jax.tree.map(np.testing.assert_array_equal, got, other(params, data))


def test_diagnostics_agree_with_separate_evaluations(key):
    params, data = toy.regression_problem()
    rho = (0.05, 0.1)
    result = otmdr_jax.robust_gradient(toy.regression, rho, split="ordered")(
        params, data
    )
    info = result.diagnostics
    first, second = halves(data, 6)
    center = toy.regression(params, {"x": first[0], "y": first[1]})
    np.testing.assert_allclose(info.center_loss, center, rtol=1e-6)
    assert info.robust_loss == result.value
    np.testing.assert_allclose(info.gap, result.value - center, rtol=1e-5)
    p, d = double(params), double(data)
    gw1, gb1 = toy.regression_gradient(p["w"], p["b"], *halves(d, 6)[0])
    w1, b1 = toy.climb(p["w"], p["b"], halves(d, 6)[:1], rho[:1])
    gw2, gb2 = toy.regression_gradient(w1, b1, *halves(d, 6)[1])
    np.testing.assert_allclose(
        info.ascent_norms,
        [np.hypot(np.linalg.norm(gw1), gb1), np.hypot(np.linalg.norm(gw2), gb2)],
        rtol=RTOL,
    )
    np.testing.assert_allclose(info.grad_norm, optax.tree.norm(result.grads), rtol=1e-6)
    w2, b2 = toy.climb(p["w"], p["b"], halves(d, 6), rho)
    moved = np.sqrt(np.sum((w2 - p["w"]) ** 2) + (b2 - p["b"]) ** 2)
    np.testing.assert_allclose(info.distances, [moved], rtol=1e-4)


def test_no_gradient_flows_through_the_ascent():
    """Finite differences of the loss at a particle held fixed give the result."""
    params, data = toy.regression_problem()
    p, d = double(params), double(data)
    w, b = toy.climb(p["w"], p["b"], halves(d, 6), (0.5, 1.0))
    _, grads = otmdr_jax.value_and_grad(toy.regression, (0.5, 1.0), split="ordered")(
        params, data
    )
    step = 1e-6

    def loss(w):
        return np.mean((d["x"] @ w + b - d["y"]) ** 2)

    numeric = [
        (loss(w + step * e) - loss(w - step * e)) / (2 * step) for e in np.eye(len(w))
    ]
    np.testing.assert_allclose(grads["w"], numeric, rtol=1e-4)


def test_complex_weights_climb_the_loss():
    def loss(z, batch):
        return jnp.mean(jnp.abs(z * batch - (1 + 2j)) ** 2)

    z, batch = jnp.array(0.5 - 0.25j), jnp.ones(4)
    robust, _ = otmdr_jax.value_and_grad(loss, 0.1, split="shared")(z, batch)
    distance = np.abs(0.5 - 0.25j - (1 + 2j))
    np.testing.assert_allclose(robust, (distance + 0.1) ** 2, rtol=1e-5)


# -- presets --------------------------------------------------------------------------


@pytest.mark.parametrize("name", otmdr_jax.PRESETS)
def test_every_preset_runs_in_both_interfaces(name, key):
    params, data = toy.regression_problem()
    options = otmdr_jax.preset(name)
    _, grads = otmdr_jax.value_and_grad(toy.regression, **options)(
        params, data, key=key
    )
    tx = otmdr_jax.otmdr(toy.regression, key, **options)
    updates, _ = tx.update(params, tx.init(params), params, batch=data)
    for leaf in jax.tree.leaves((grads, updates)):
        assert np.all(np.isfinite(leaf))


def test_presets_hold_the_versions_apart():
    paper, released = (
        otmdr_jax.preset(f"{version}-cifar10") for version in ("paper", "released")
    )
    assert (paper["split"], paper["noise_std"], paper.get("merge")) == (
        "random", 0.01, None,
    )  # fmt: skip
    assert (released["split"], released["noise_std"], released["merge"]) == (
        "ordered", 0.0, "sum",
    )  # fmt: skip
    assert otmdr_jax.preset("released-cifar10", num_particles=2)["split"] == "random"
    assert otmdr_jax.preset("released-mode1.1-cifar10")["merge"] == "mean"
    assert otmdr_jax.preset("paper-cifar100")["rho"] == (0.1, 0.2)
    assert paper is not otmdr_jax.preset("paper-cifar10")


def test_the_released_second_step_is_longer_than_its_radius():
    """Method.md, section 6: |rho2 (g1 + g2) / |g2|| exceeds rho2."""
    w, batch = jnp.array([3.0, 4.0]), jnp.zeros(2)

    def loss(w, batch):
        return jnp.sum(w * jnp.array([3.0, 4.0])) + 0 * jnp.sum(batch)

    result = otmdr_jax.robust_gradient(loss, **otmdr_jax.preset("released-cifar10"))(
        w, batch
    )
    # Equal gradients: the first step is 0.05 long, the second 2 * 0.1.
    np.testing.assert_allclose(result.diagnostics.distances, [0.25], rtol=1e-5)
