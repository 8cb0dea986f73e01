"""The dual form: budgets, the trust region, Theorem 4.3, and what lambda lives through.

Independent values are closed forms, NumPy loops, SciPy and Optax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import otmdr_jax
from otmdr_jax import bnn, ensemble, parallel
from otmdr_jax.core.dual import share
from otmdr_jax.core.transform import plain
from tests import toy
from tests.experiments.test_training import assert_same_bits
from tests.marks import one_axis_at_a_time

RHO = 0.5
SLOPE = jnp.array([3.0, 4.0])  # of norm 5


def linear(w, batch=1.0):
    """A loss whose gradient is the same everywhere, times the batch."""
    return jnp.mean(batch) * jnp.sum(SLOPE * w)


def states_of(dual, params, batches, loop=True):
    """What is seen in each step and the states after it, the parameters held still."""

    def step(state, batch):
        found, state = dual.apply(state, params, batch)
        return state, (found, state)

    if loop:
        return jax.jit(lambda xs: jax.lax.scan(step, dual.init(), xs))(batches)[1]
    return jax.lax.scan(step, dual.init(), batches)[1]


# -- the radius ------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(
    power=st.floats(1.3, 20.0),
    rho=st.floats(1e-4, 1e2),
    jump=st.floats(0.2, 3.0),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_the_distance_converges_to_the_budget(power, rho, jump, scale):
    """Of a constant gradient, from the first step on and after it has changed at once.

    The budget that is used follows the map u -> u exp(rate (1 - u)), clipped.
    """
    dual = otmdr_jax.dual_gradient(linear, rho, power=power)
    sizes = scale * jnp.concatenate([jnp.ones(3), jnp.full(297, jump)])
    found, states = states_of(dual, jnp.zeros(2), sizes[:, None])
    distances = found.diagnostics.distances[:, 0] / rho
    assert_allclose(distances[:3], 1.0, rtol=1e-4)
    assert_allclose(distances[-1], 1.0, rtol=1e-3)
    top = 10.0**power
    used, seen = jump ** (power / (power - 1)), []
    for _ in range(297):
        seen.append(min(used, top))
        used = used * np.exp(0.1 * np.clip(1 - min(used, top), -1, 1))
    assert_allclose(states.budget_used[3:], seen, rtol=2e-2)
    assert_allclose(distances**power, states.budget_used, rtol=2e-2)
    want = np.log(5 * jump * scale / power) - (power - 1) * np.log(rho)
    if abs(want) < 79:  # it is what it is where float32 holds it
        assert_allclose(np.log(states.multiplier[-1]), want, atol=1e-2)


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
def test_a_step_is_the_inner_maximum_of_the_linearised_loss(power):
    """SciPy's, along the gradient, for a lambda that is kept."""
    for multiplier in (0.7, 3.0):
        dual = otmdr_jax.dual_gradient(
            linear, RHO, power=power, lambda_init=multiplier,
            lambda_optimizer=optax.set_to_zero(), max_ratio=1e4,
        )  # fmt: skip
        found, state = dual.apply(dual.init(), jnp.zeros(2), jnp.ones(1))
        best = scipy.optimize.minimize_scalar(
            lambda r, m=multiplier: -(5 * r - m * r**power),
            bounds=(0, 100),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert_allclose(found.diagnostics.distances[0], best.x, rtol=1e-4)
        assert_allclose(state.multiplier, multiplier, rtol=1e-5)
        value = multiplier * RHO**power - best.fun
        assert_allclose(state.value, value, rtol=1e-5)


def test_a_lambda_that_is_kept_is_a_step_without_a_norm():
    """Eq. 4 with p = 2: the step g / (2 lambda) of unnormalised SAM, whatever rho."""
    params, data = toy.regression_problem()
    params = jax.tree.map(jnp.asarray, params)
    for rho in (0.2, 0.7):
        tx = otmdr_jax.dual(
            toy.regression, rho, lambda_init=4.0, lambda_optimizer=optax.set_to_zero()
        )
        same = otmdr_jax.sam(toy.regression, 1 / 8, norm="none")
        got, _ = tx.update(params, tx.init(params), params, batch=data)
        want, _ = same.update(params, same.init(params), params, batch=data)
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-5), got, want)


def test_batches_go_as_far_as_their_gradients_make_them():
    """With p = 2 in proportion, and the budget is their mean, not met by each."""
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0.5, 1.5, 4000).astype(np.float32)
    dual = otmdr_jax.dual_gradient(linear, RHO, lambda_optimizer=optax.sgd(0.01))
    found, states = states_of(dual, jnp.zeros(2), sizes[:, None])
    r = np.asarray(found.diagnostics.distances)[1000:, 0]
    assert_allclose(np.mean(r**2), RHO**2, rtol=0.01)
    ratio = r / sizes[1000:]
    assert np.std(ratio) < 0.1 * np.mean(ratio) and np.std(r) > 0.2 * np.mean(r)
    assert_allclose(2 * states.multiplier * r_all(found), 5 * sizes, rtol=1e-4)


def r_all(found):
    return found.diagnostics.distances[:, 0]


def test_a_schedule_of_the_radius_is_followed_at_once():
    tx = otmdr_jax.dual(linear, optax.linear_schedule(0.5, 0.1, 4), power=3.0)
    w, state, seen = jnp.zeros(2), tx.init(jnp.zeros(2)), []
    for _ in range(6):
        _, state = tx.update(w, state, w, batch=jnp.ones(1))
        seen.append(float(state.diagnostics.distances[0]))
    assert_allclose(seen, [0.5, 0.4, 0.3, 0.2, 0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize("end", [0.0, -3e-9])
def test_a_schedule_may_end_at_a_radius_of_zero(end):
    """As `optax.linear_schedule(0.1, 0, 3)` does, in compiled programs a bit below."""
    tx = otmdr_jax.dual(linear, lambda count: jnp.where(count < 3, 0.1, end))
    w, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    for count in range(6):
        _, state = jax.jit(tx.update)(w, state, w, batch=jnp.full(1, count + 1.0))
        # A step that is not finite would leave the memory as it was.
        assert_allclose(state.memory.slope, 5 * (count + 1), rtol=1e-5)
        assert np.isfinite(state.memory.multiplier)
        assert bool(state.diagnostics.distances[0] > 0.01) == (count < 3)


def test_a_lambda_to_start_from_waits_for_a_radius():
    """G = 5 and lambda = 25: a distance of 1/10, once there is a radius."""
    tx = otmdr_jax.dual(
        linear, optax.linear_schedule(0.0, 0.1, 10), lambda_init=25.0, max_ratio=1e4
    )
    w, state, seen = jnp.zeros(2), tx.init(jnp.zeros(2)), []
    assert state.memory.multiplier == 25
    for _ in range(200):
        _, state = tx.update(w, state, w, batch=jnp.ones(1))
        seen.append((state.diagnostics.distances[0], state.memory.multiplier))
    assert_allclose(seen[:2], [(0, 25), (0.1, 25)], rtol=1e-5)
    assert_allclose(seen[-1], (0.1, 25), rtol=0.01)


def test_the_scale_of_the_loss_plays_no_part():
    params, data = toy.regression_problem()
    for scale in (1e-15, 1e12):
        both = []
        for factor in (1.0, scale):
            dual = otmdr_jax.dual_gradient(
                lambda p, b, f=factor: f * toy.regression(p, b), RHO
            )
            state, distances = dual.init(), []
            for shift in (0.0, 0.3, -0.2):
                moved = jax.tree.map(lambda x, s=shift: jnp.asarray(x + s), params)
                found, state = dual.apply(state, moved, data)
                distances.append(float(found.diagnostics.distances[0]))
            both.append((distances, float(state.multiplier) / factor))
        assert_allclose(both[0][0], both[1][0], rtol=1e-5)
        assert_allclose(both[0][1], both[1][1], rtol=1e-5)


# -- the trust region ------------------------------------------------------------------


def trust_region(h, g, rho):
    """max g's + s'Hs / 2 on the ball, by the secular equation: s, lambda, the value."""
    eigenvalues, q = np.linalg.eigh(h)
    b = q.T @ g

    def secular(lam):  # ||(2 lambda I - H)^-1 g|| - rho
        return np.linalg.norm(b / (2 * lam - eigenvalues)) - rho

    low = max(eigenvalues.max(), 0) / 2 + 1e-9
    lam = scipy.optimize.brentq(secular, low, low + 1e6, xtol=1e-14)
    s = q @ (b / (2 * lam - eigenvalues))
    return s, lam, g @ s + s @ h @ s / 2


@pytest.mark.slow
@one_axis_at_a_time(seed=range(3), definite=[False, True])
def test_several_steps_solve_the_trust_region_problem(seed, definite):
    """Primal and dual values agree to 1e-5: there is no duality gap."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(4, 4))
    h = a @ a.T / 4 if definite else (a + a.T) / 4
    g, rho = rng.normal(size=4), 0.4
    s, lam, value = trust_region(h, g, rho)
    hj, gj = jnp.asarray(h, jnp.float32), jnp.asarray(g, jnp.float32)
    dual = otmdr_jax.dual_gradient(
        lambda w, b: gj @ w + w @ hj @ w / 2 + 0 * jnp.mean(b), rho, num_steps=60
    )
    found, states = states_of(dual, jnp.zeros(4), jnp.ones((80, 1)))
    last = jax.tree.map(lambda x: x[-1], (found, states))
    assert_allclose(last[1].multiplier, lam, rtol=1e-4)
    assert_allclose(last[0].diagnostics.distances[0], rho, rtol=1e-4)
    assert_allclose(last[0].value, value, atol=1e-5)  # the loss at the particle
    assert_allclose(last[1].value, value, atol=1e-5)  # the dual objective
    assert_allclose(last[0].grads, g + h @ s, atol=1e-4)
    # Weak duality on the way, to rounding.
    assert np.all(np.asarray(states.value) >= value - 1e-5)


def test_steps_of_the_inner_maximum_never_descend_on_a_convex_loss():
    """The concave-convex procedure, at a lambda that is kept, near and far from it."""
    params, data = toy.regression_problem()
    params = jax.tree.map(jnp.asarray, params)
    for multiplier in (2.0, 10.0):
        values = []
        for steps in range(1, 6):
            dual = otmdr_jax.dual_gradient(
                toy.regression, RHO, num_steps=steps, lambda_init=multiplier,
                lambda_optimizer=optax.set_to_zero(),
            )  # fmt: skip
            values.append(float(dual.apply(dual.init(), params, data)[1].value))
        assert np.all(np.diff(values) > -1e-5), values


# -- Theorem 4.3 -----------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2.0, 3.5])
def test_with_the_distance_of_theorem_43_it_is_sam(power):
    """In a ball of rho the budget always suffices, whatever the power."""
    params, data = toy.regression_problem()
    params = jax.tree.map(jnp.asarray, params)
    ours = otmdr_jax.dual(toy.regression, 0.2, power=power, max_ratio=1)
    theirs = otmdr_jax.sam(toy.regression, 0.2)
    sam = optax.contrib.sam(
        optax.sgd(0.1),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.2)),
        sync_period=2,
        opaque_mode=True,
    )
    states = ours.init(params), theirs.init(params)
    at, there, far = params, params, sam.init(params)
    descend = lambda p, g: jax.tree.map(lambda x, y: x - 0.1 * y, p, g)  # noqa: E731
    grad = jax.grad(toy.regression)
    for _ in range(4):
        got, ours_next = ours.update(at, states[0], at, batch=data)
        want, theirs_next = theirs.update(at, states[1], at, batch=data)
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-5), got, want)
        states, at = (ours_next, theirs_next), descend(at, got)
        updates, far = sam.update(
            grad(there, data), far, there, grad_fn=lambda p, _: grad(p, data)
        )
        there = optax.apply_updates(there, updates)
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-4), at, there)
        assert_allclose(states[0].memory.budget_used, 1.0)
        loss = states[0].diagnostics.robust_loss  # lambda is 0 in the limit
        assert_allclose(states[0].memory.value, loss, rtol=1e-6)


# -- a budget for several --------------------------------------------------------------


@pytest.mark.slow
def test_two_members_share_the_budget_by_their_gradients():
    dual = ensemble.dual_gradient(lambda w, b, size: size * linear(w, b), RHO)
    members, sizes = jnp.zeros((2, 2)), jnp.array([1.0, 3.0])
    state = dual.init()
    step = jax.jit(lambda s: dual.apply(s, members, jnp.ones(1), sizes))
    for _ in range(150):
        found, state = step(state)
    first, second = np.asarray(found.diagnostics.distances)[:, 0]
    assert_allclose(second / first, 3.0, rtol=1e-4)
    assert_allclose((first**2 + second**2) / 2, RHO**2, rtol=1e-4)
    assert state.log_slope.shape == ()
    # lambda in closed form: the root mean square of the norms over 2 rho.
    assert_allclose(state.multiplier, 5 * 5**0.5 / (2 * RHO), rtol=1e-4)


@pytest.mark.slow
def test_members_that_are_a_tuple_share_it_too():
    losses = [linear, lambda w, b: 3 * linear(w["deep"], b)]
    tx = ensemble.dual(losses, RHO)
    members = jnp.zeros(2), {"deep": jnp.zeros(2)}
    state = tx.init(members)
    update = jax.jit(lambda s: tx.update(members, s, members, batch=jnp.ones(1)))
    for _ in range(150):
        updates, state = update(state)
    first, second = np.asarray(state.diagnostics.distances)[:, 0]
    assert_allclose([second / first, first**2 + second**2], [3, 0.5], rtol=1e-4)
    assert set(updates[1]) == {"deep"}
    assert_allclose(optax.tree.get(state, "multiplier"), 5 * 5**0.5, rtol=1e-4)


@pytest.mark.slow
def test_a_member_that_is_not_finite_does_not_count():
    dual = ensemble.dual_gradient(lambda w, b, size: size * linear(w, b), RHO)
    members, sizes = jnp.zeros((3, 2)), jnp.array([jnp.nan, 1.0, 3.0])
    step = jax.jit(lambda s, sizes: dual.apply(s, members, jnp.ones(1), sizes)[1])
    state, both = dual.init(), dual.init()
    two = ensemble.dual_gradient(lambda w, b, size: size * linear(w, b), RHO)
    for _ in range(5):
        state = step(state, sizes)
        both = two.apply(both, members[1:], jnp.ones(1), sizes[1:])[1]
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-5), state, both)
    assert_same_bits(step(state, jnp.full(3, jnp.inf)), state)


@pytest.mark.slow
def test_members_on_devices_have_one_lambda():
    """Each device has one member: the state is that of one device, on both."""
    function = lambda w, b, size: size * linear(w, b)  # noqa: E731
    one = ensemble.dual_gradient(function, RHO)
    spread = ensemble.dual_gradient(function, RHO, member_axis_name="member")
    members, sizes = jnp.zeros((2, 2)), jnp.array([1.0, 3.0])
    mesh = jax.make_mesh((2,), ("member",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    run = jax.jit(
        jax.shard_map(
            lambda state, m, s: spread.apply(state, m, jnp.ones(1), s)[1],
            mesh=mesh,
            in_specs=(spec(), spec("member"), spec("member")),
            out_specs=spec(),
        )
    )
    want, got = one.init(), one.init()
    for _ in range(4):
        want = one.apply(want, members, jnp.ones(1), sizes)[1]
        got = run(got, members, sizes)
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-6), got, want)
    for leaf in jax.tree.leaves(got):
        first, second = (np.asarray(s.data) for s in leaf.addressable_shards)
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("how", ["sub-batches", "devices"])
def test_parts_of_a_batch_share_the_budget(how):
    """m-sharpness: each part climbs on its own, and the mean of d is the budget."""
    sizes = jnp.array([1.0, 1.0, 3.0, 3.0])
    if how == "sub-batches":
        dual = otmdr_jax.dual_gradient(linear, RHO, num_subbatches=2)
        step = jax.jit(lambda s: dual.apply(s, jnp.zeros(2), sizes))
    else:
        dual = otmdr_jax.dual_gradient(
            linear, RHO, axis_name="data", sync_perturbation=False
        )
        run = parallel.shard_map_step(
            lambda s, batch: dual.apply(s, jnp.zeros(2), batch)[::-1],
            parallel.make_mesh("data=2"),
            donate=False,
        )
        step = lambda s: run(s, sizes)[::-1]  # noqa: E731
    state = dual.init()
    for _ in range(120):
        found, state = step(state)
    assert_allclose(state.budget_used, 1.0, rtol=1e-4)
    assert_allclose(state.multiplier, 5 * 5**0.5 / (2 * RHO), rtol=1e-4)
    mean = RHO * (1 + 3) / 2 / 5**0.5
    assert_allclose(found.diagnostics.distances[0], mean, rtol=1e-4)


@pytest.mark.slow
def test_draws_of_a_posterior_share_the_budget():
    """The mean over draws: what lambda moves by is the sum of 1 - u, to rounding."""
    q = bnn.init(jnp.array([[1.0], [-2.0]]), sigma=0.5)
    rate, steps = 0.02, 400
    dual = bnn.dual_gradient(
        lambda w, x: jnp.mean((x @ w) ** 2), RHO, num_data=100,
        lambda_optimizer=optax.sgd(rate),
    )  # fmt: skip

    def step(state, key):
        found, state = dual.apply(state, q, jnp.eye(2), key=key)
        return state, (found, state)

    keys = jax.random.split(jax.random.key(0), steps)
    _, (found, states) = jax.jit(lambda k: jax.lax.scan(step, dual.init(), k))(keys)
    used, r = states.budget_used, found.diagnostics.distances[:, 0]
    assert_allclose((r / RHO) ** 2, used, rtol=1e-4)
    assert np.std(used) > 0.15  # draws differ
    assert_allclose(2 * states.multiplier * r, states.slope, rtol=1e-4)
    moved = states.log_slope[-1] - states.log_slope[1]
    assert_allclose(moved, -rate / 2 * np.sum(1 - used[1:-1]), rtol=1e-3, atol=1e-4)
    assert_allclose(np.mean(used[100:]), 1.0, atol=0.1)


@pytest.mark.slow
def test_scales_of_a_posterior_have_their_gradient_at_the_center():
    """With a budget of 0 all is SGVB; with one, means move and scales do not."""
    q = bnn.init(jnp.array([[1.0], [-2.0]]), sigma=0.5)
    loss = lambda w, x: jnp.mean((x @ w) ** 2)  # noqa: E731
    key, options = jax.random.key(2), dict(num_data=10)
    plain = bnn.sgvb_gradient(loss, **options)(q, jnp.eye(2), key=key)
    for rho in (0.0, 0.3):
        dual = bnn.dual_gradient(loss, rho, **options)
        found, _ = dual.apply(dual.init(), q, jnp.eye(2), key=key)
        assert_allclose(found.grads.raw_scale, plain.grads.raw_scale, rtol=1e-5)
        far = np.abs(found.grads.mean - plain.grads.mean).max()
        assert far < 1e-6 if rho == 0 else far > 1e-2
    sam = bnn.robust_gradient(loss, rho=0.3, split="shared", norm="global", **options)(
        q, jnp.eye(2), key=key
    )
    assert_allclose(found.grads.mean, sam.grads.mean, rtol=1e-5)


# -- what lambda lives through ---------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(
        st.sampled_from([0.0, 1e-38, 1e-20, 1.0, 3.0, 1e20, 1e38, np.inf, np.nan]),
        min_size=8,
        max_size=8,
    ),
    rate=st.sampled_from([1e-3, 0.5, 1e3, 1e30, np.inf]),
    optimizer=st.sampled_from([optax.sgd, optax.adam]),
)
def test_lambda_stays_positive_and_finite(sizes, rate, optimizer):
    """Through gradients of 0, infinity and NaN; what is not finite leaves no trace."""
    init, step = living(optimizer)
    state = init()
    for size in sizes:
        found, after = step(state, jnp.full(1, size), rate)
        assert 0 < after.multiplier < np.inf and np.isfinite(after.log_slope)
        if not np.all(np.isfinite(jax.tree.leaves(found.diagnostics)[1])):
            assert_same_bits(after, state)
        state = after
    for _ in range(2):  # it comes back, whatever has been
        found, state = step(state, jnp.ones(1), rate)
        assert np.isfinite(found.value) and found.diagnostics.distances[0] <= 5.001


@functools.cache
def living(optimizer):
    """One program for all rates."""

    def dual(rate):
        return otmdr_jax.dual_gradient(linear, RHO, lambda_optimizer=optimizer(rate))

    step = jax.jit(lambda s, b, rate: dual(rate).apply(s, jnp.zeros(2), b))
    return dual(1.0).init, step


def test_an_optimizer_that_squares_the_violation_lives_through_a_large_one():
    """A particle at the limit has used 10^20 budgets of the power 20."""
    dual = otmdr_jax.dual_gradient(
        linear, RHO, power=20.0, lambda_optimizer=optax.adam(0.3, b2=0.9)
    )
    sizes = jnp.concatenate([jnp.full(2, 1e-20), jnp.ones(600)])[:, None]
    found, states = states_of(dual, jnp.zeros(2), sizes)
    assert found.diagnostics.distances[2, 0] == pytest.approx(10 * RHO)
    assert np.all(np.isfinite(states.value)) and states.log_slope[-1] > -10


def test_it_recovers_from_a_long_time_without_a_gradient():
    """The limit of the distance keeps particles where losses are finite."""
    dual = otmdr_jax.dual_gradient(linear, RHO)
    sizes = jnp.concatenate([jnp.ones(1), jnp.zeros(200), jnp.ones(600)])[:, None]
    found, states = states_of(dual, jnp.zeros(2), sizes)
    far = np.asarray(found.diagnostics.distances)[:, 0]
    assert np.all(far[1:201] == 0) and far[201] == pytest.approx(10 * RHO)
    assert far[-1] == pytest.approx(RHO, rel=1e-3)
    assert states.multiplier[200] < states.multiplier[0]


def test_a_first_gradient_of_zero_starts_nothing():
    dual = otmdr_jax.dual_gradient(linear, RHO)
    sizes = jnp.array([0.0, jnp.nan, 0.0, 2.0, 2.0])[:, None]
    found, states = states_of(dual, jnp.zeros(2), sizes)
    assert states.started.tolist() == [False, False, False, False, True]
    assert_allclose(found.diagnostics.distances[3:, 0], RHO, rtol=1e-5)
    assert_allclose(states.multiplier[3:], 10 / (2 * RHO), rtol=1e-5)


def test_a_budget_of_zero_is_the_plain_gradient():
    params, data = toy.regression_problem()
    params = jax.tree.map(jnp.asarray, params)
    for power in (1, 1.5, 2.0, 4.0):
        ball = {"max_ratio": 1} if power == 1 else {}
        tx = otmdr_jax.dual(toy.regression, 0.0, power=power, **ball)
        none = plain(toy.regression)
        state = tx.init(params)
        for _ in range(3):
            got, state = tx.update(params, state, params, batch=data)
            assert 0 < state.memory.multiplier < np.inf
            assert_allclose(state.memory.budget_used, 1.0)
        want, _ = none.update(params, none.init(params), params, batch=data)
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-6), got, want)


@pytest.mark.parametrize("steps", [1, 2])
def test_leaves_that_stay_have_no_part_in_the_budget(steps):
    params, data = toy.regression_problem()
    params = jax.tree.map(jnp.asarray, params)
    seen = []

    def loss(p, batch):
        jax.debug.callback(lambda b: seen.append(float(b)), p["b"])
        return toy.regression(p, batch)

    mask = {"w": True, "b": False}
    dual = otmdr_jax.dual_gradient(loss, RHO, mask=mask, num_steps=steps)
    found, state = dual.apply(dual.init(), params, data)
    jax.effects_barrier()
    assert len(seen) == 1 + steps and len(set(seen)) == 1
    if steps == 1:
        grads = toy.regression_gradient(params["w"], params["b"], data["x"], data["y"])
        assert_allclose(state.slope, np.linalg.norm(grads[0]), rtol=1e-5)
    assert_allclose(found.diagnostics.distances[0], RHO, rtol=1e-5)


def test_a_ball_in_units_of_the_weights():
    """With the first gradient it is ASAM, whose distance is measured as d is."""
    params, data = toy.regression_problem()
    params = jax.tree.map(jnp.asarray, params)
    dual = otmdr_jax.dual_gradient(toy.regression, RHO, adaptive=True)
    found, state = dual.apply(dual.init(), params, data)
    asam = otmdr_jax.robust_gradient(
        toy.regression, rho=RHO, split="shared", adaptive=True
    )(params, data)
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-5), found.grads, asam.grads)
    assert_allclose(state.slope, asam.diagnostics.ascent_norms[0], rtol=1e-5)


def test_share_is_the_mean_of_the_finite():
    dual = otmdr_jax.dual_gradient(linear, RHO)
    state = dual.init()
    states = [dual.apply(state, jnp.zeros(2), jnp.full(1, x))[1] for x in (1.0, 3.0)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *states)
    assert float(share(both, jnp.array([True, True])).slope) == pytest.approx(10)
    assert float(share(both, jnp.array([False, True])).slope) == pytest.approx(15)


# -- wrong options ---------------------------------------------------------------------

WRONG = [
    (dict(power=1), ValueError, "power must be above 1.*max_ratio=1.*Theorem 4.3"),
    (dict(power=0.5), ValueError, "power must be above 1"),
    (dict(power=0.5, max_ratio=1), ValueError, "power must be above 1"),
    (dict(power=0), ValueError, "power must be positive"),
    (dict(power=-2.0), ValueError, "power must be positive"),
    (dict(power=np.nan), ValueError, "power must be positive and finite"),
    (dict(power=np.inf), ValueError, "power must be positive and finite"),
    (dict(power="two"), TypeError, "power must be a number"),
    (dict(rho=-0.1), ValueError, "rho must be finite and not negative"),
    (dict(rho=np.nan), ValueError, "rho must be finite"),
    (dict(rho=np.inf), ValueError, "rho must be finite"),
    (dict(rho=(0.1, 0.2)), ValueError, "one radius.*num_steps"),
    (dict(num_steps=0), ValueError, "num_steps must be at least 1"),
    (dict(num_steps=1.5), TypeError, "num_steps must be an integer"),
    (dict(max_ratio=0), ValueError, "max_ratio must be positive"),
    (dict(lambda_init=0), ValueError, "lambda_init must be positive"),
    (dict(lambda_init=-1), ValueError, "lambda_init must be positive"),
    (dict(lambda_init=np.nan), ValueError, "lambda_init must be positive"),
    (dict(lambda_optimizer=0.1), TypeError, "Optax optimizer.*got 0.1"),
    (dict(norm="per_leaf"), TypeError, "takes no norm"),
    (dict(split="random"), TypeError, "takes no split"),
    (dict(noise_std=0.1), TypeError, "takes no noise_std"),
    (dict(num_particles=2), TypeError, "takes no num_particles"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_what_cannot_work_is_refused(options, error, message):
    for build in (
        otmdr_jax.dual,
        otmdr_jax.dual_gradient,
        ensemble.dual,
        ensemble.dual_gradient,
    ):
        with pytest.raises(error, match=message):
            build(toy.regression, **options)
    if not {"norm", "split", "noise_std", "num_particles"} & set(options):
        with pytest.raises(error, match=message):
            bnn.dual_gradient(toy.regression, num_data=10, **options)


def test_a_number_that_is_traced_is_refused_by_name():
    with pytest.raises(TypeError, match="power must be a number known at trace time"):
        jax.jit(lambda p: otmdr_jax.dual_gradient(linear, power=p).init())(2.0)
