"""What every Optax transformation does alike: one contract over all of them.

Formulas have their independent values in the tests of each; parameters on meshes are in
test_sharded_parameters.py, options in test_options.py.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import otmdr_jax
from otmdr_jax import baselines, ensemble, parallel
from otmdr_jax.core import tree
from tests import toy
from tests.experiments.test_training import assert_same_bits
from tests.marks import slow_but

KEY = jax.random.key(3)
OWN = dict(learning_rate=0.1, weight_decay=0.01, num_data=50.0)
# Each: (loss, options) -> transformation. One of its numbers, for inject_hyperparams.
MAKE = {
    "otmdr": lambda loss, **o: otmdr_jax.otmdr(
        loss, KEY, split="ordered", noise_std=0.1, **o
    ),
    "sam": lambda loss, **o: otmdr_jax.sam(loss, **o),
    "asam": lambda loss, **o: otmdr_jax.asam(loss, **o),
    "dual": lambda loss, **o: otmdr_jax.dual(loss, **o),
    "gsam": lambda loss, **o: baselines.gsam(loss, **o),
    "looksam": lambda loss, **o: baselines.looksam(loss, every=2, **o),
    "fisher_sam": lambda loss, **o: baselines.fisher_sam(loss, **o),
    "bsam": lambda loss, **o: baselines.bsam(loss, KEY, **OWN, **o),
    "ivon": lambda loss, **o: baselines.ivon(loss, KEY, **{**OWN, **o}),
}
NUMBER = dict.fromkeys(MAKE, "rho") | {"ivon": "learning_rate"}
WHOLE = ("bsam", "ivon")  # optimizers, not to be chained with one
every_one = pytest.mark.parametrize("name", MAKE)


def every_one_but_fast(*names):
    """All of them by `make test-all`, and these by `make test`."""
    return pytest.mark.parametrize("name", slow_but(names, MAKE))


def test_the_table_has_every_transformation_of_a_loss():
    found = set()
    for module in (otmdr_jax, baselines):
        for name in module.__all__:
            if inspect.isfunction(function := getattr(module, name)):
                signature = inspect.signature(function)
                gives = signature.return_annotation
                if (
                    gives is optax.GradientTransformationExtraArgs
                    and "loss_fn" in signature.parameters
                ):
                    found.add(name)
    assert found == set(MAKE)


@pytest.fixture(scope="module")
def problem():
    params, data = toy.regression_problem(batch=8)
    return jax.tree.map(jnp.asarray, params), data


def steps(tx, params, data, count=3, **extra):
    """The updates and the state after some steps by plain descent, in one program."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, batch=data, **extra)
        params = jax.tree.map(
            lambda p, u: (p - 0.1 * u).astype(p.dtype), params, updates
        )
        return (params, state), updates

    # A scan wants a state whose structure, shapes and dtypes never change.
    loop = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), length=count))
    (params, state), updates = loop(params, tx.init(params))
    return params, state, updates


@pytest.fixture(scope="module")
def end(problem):
    """The parameters after three steps with the plain loss, of a name."""
    return functools.cache(lambda name: steps(MAKE[name](toy.regression), *problem)[0])


def close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


@every_one
def test_arguments_of_the_loss_and_of_others(name, problem):
    """loss_args and loss_kwargs reach the loss; what others in a chain take, nobody."""
    params, data = problem
    seen = []

    def loss(params, batch, scale, *, shift):
        seen.append((scale, shift))
        return scale * toy.regression(params, batch) + shift

    def plain(params, batch):
        return 2.0 * toy.regression(params, batch) + 1.0

    extra = dict(loss_args=(2.0,), loss_kwargs={"shift": 1.0}, value=jnp.zeros(()))
    got, state, _ = steps(MAKE[name](loss), params, data, **extra)
    want, _, _ = steps(MAKE[name](plain), params, data)
    close(got, want)
    assert seen and state.count == 3
    with pytest.raises(TypeError, match="batch=batch"):
        MAKE[name](plain).update(params, MAKE[name](plain).init(params), params)
    with pytest.raises(ValueError, match="params"):
        MAKE[name](plain).update(params, MAKE[name](plain).init(params), batch=data)


@every_one
def test_auxiliary_output_is_in_the_state(name, problem, end):
    params, data = problem

    def loss(params, batch):
        return toy.regression(params, batch), {"mean": jnp.mean(batch["y"])}

    tx = MAKE[name](loss, has_aux=True, aux_init={"mean": jnp.zeros(())})
    got, state, _ = steps(tx, params, data)
    # OT-MDR's comes from the pass at the center, on the first half.
    rows = data["y"][:4] if name == "otmdr" else data["y"]
    assert_allclose(optax.tree.get(state, "aux")["mean"], np.mean(rows), rtol=1e-5)
    close(got, end(name))
    with pytest.raises(ValueError, match="aux_init"):
        MAKE[name](loss, has_aux=True)


@every_one
def test_float32_stays_float32_beside_float64(name, problem, end):
    """With 64-bit numbers enabled, a scan and a branch want equal dtypes too."""
    params, data = problem
    want = end(name)
    with jax.enable_x64(True):
        close(steps(MAKE[name](toy.regression), params, data)[0], want)


@every_one
def test_no_nan_is_made_where_none_comes_in(name, problem):
    """Under jax.debug_nans a state that starts at NaN cannot even be made."""
    params, data = problem
    with jax.debug_nans(True):
        tx = MAKE[name](lambda p, b: 0.0 * toy.regression(p, b))  # a gradient of 0
        state = jax.jit(tx.init)(params)
        steps(tx, params, data)
    assert state.diagnostics.robust_loss == np.inf


@every_one
def test_a_model_may_have_no_parameters(name, problem):
    got, _, updates = steps(MAKE[name](lambda p, b: jnp.mean(b["y"])), {}, problem[1])
    assert got == updates == {}


@every_one
def test_dtypes_are_kept(name, problem, end):
    params, data = problem
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), data)
    got, state, updates = steps(MAKE[name](toy.regression), small, data)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    # What is remembered has the precision of sums, but for a gradient itself.
    if name in ("bsam", "ivon"):
        memory = state.precision if name == "bsam" else state.hess
        assert {m.dtype for m in jax.tree.leaves(memory)} == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=0.1, atol=0.1), wide, end(name)
    )


@every_one_but_fast("sam", "dual", "bsam", "ivon")
def test_its_number_may_be_injected(name, problem):
    params, data = problem
    number = NUMBER[name]
    made = optax.inject_hyperparams(lambda x: MAKE[name](toy.regression, **{number: x}))
    tx = made(x=0.05)
    state = tx.init(params)
    update = jax.jit(lambda s: tx.update(params, s, params, batch=data))
    for value in (0.05, 0.3):
        state.hyperparams["x"] = jnp.asarray(value)
        updates, _ = update(state)
        plain = MAKE[name](toy.regression, **{number: value})
        want, _ = plain.update(params, plain.init(params), params, batch=data)
        close(updates, want)


@every_one_but_fast("otmdr", "sam", "looksam")
def test_donated_states_cost_the_caller_nothing(name, problem):
    params, data = problem
    tx = MAKE[name](toy.regression)
    step = jax.jit(lambda s, p: tx.update(p, s, p, batch=data)[::-1], donate_argnums=0)
    first, second = tx.init(params), tx.init(params)
    state, updates = step(first, params)
    step(state, params)
    _, again = step(second, params)  # the key and all else are still there
    assert_same_bits(again, updates)


# What may be wrong with a batch. "hidden" is an infinite gradient of the first pass,
# after which loss and gradient are finite again.
FAULTS = ["nan loss", "inf loss", "nan gradient", "inf gradient", "hidden", "nan aux"]
NAN_LOSS, INF_LOSS, NAN, INF, HIDDEN, NAN_AUX = range(1, 7)


@jax.custom_vjp
def spoiled(loss, params, fault):
    """The loss, or what a fault makes of it."""
    del params
    loss = jnp.where(fault == HIDDEN, jnp.nan_to_num(loss), loss)
    return loss + jnp.select([fault == NAN_LOSS, fault == INF_LOSS], [jnp.nan, jnp.inf])


def _forwards(loss, params, fault):
    return spoiled(loss, params, fault), (params, fault)


def _backwards(kept, g):
    params, fault = kept
    strayed = ~tree.all_finite(params)
    wrong = jnp.select(
        [fault == NAN, (fault == INF) | ((fault == HIDDEN) & ~strayed)],
        [jnp.nan, jnp.inf],
    )
    g = jnp.where((fault == HIDDEN) & strayed, 0.0, g)
    return g, jax.tree.map(lambda p: jnp.full_like(p, wrong), params), None


spoiled.defvjp(_forwards, _backwards)


def faulty(params, batch):
    fault = batch["fault"][0]
    aux = jnp.where(fault == NAN_AUX, jnp.nan, jnp.mean(batch["y"]))
    # What is finite of a loss at NaN has a gradient of NaN, but for a gradient of 0.
    loss = toy.regression(jax.tree.map(jnp.nan_to_num, params), batch)
    return spoiled(loss, params, fault), {"mean": aux}


GUARDS = {
    "none": lambda tx: tx,
    "apply_if_finite around it": lambda tx: optax.apply_if_finite(tx, 5),
    "zero_nans after it": lambda tx: optax.chain(tx, optax.zero_nans()),
    "apply_if_finite after it": lambda tx: optax.chain(
        tx, optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5)
    ),
}


@pytest.mark.parametrize(
    ("name", "guard"),
    slow_but(
        [(name, "none") for name in ("otmdr", "dual", "looksam", "ivon")]
        + [("sam", guard) for guard in GUARDS]
        + [("ivon", "apply_if_finite after it")],
        itertools.product(MAKE, GUARDS),
    ),
)
def test_a_bad_batch_leaves_no_trace(name, guard, problem):
    """NaN and infinity in every pass: what is remembered stays, the next step moves.

    A whole optimizer makes no step of such a batch, a gradient is passed on as it is.
    """
    params, data = problem
    tx = MAKE[name](faulty, has_aux=True, aux_init={"mean": jnp.zeros(())})
    chained = GUARDS[guard](tx)

    @jax.jit
    def update(state, fault, updates):
        batch = {**data, "fault": jnp.full(len(data["y"]), fault)}
        return chained.update(updates, state, params, batch=batch)

    def own(state):
        if guard == "apply_if_finite around it":
            return state.inner_state
        return state if guard == "none" else state[0]

    first = chained.init(params)
    _, second = update(first, 0, params)
    for fault, named in enumerate(FAULTS, 1):
        for before in (first, second):  # LookSAM climbs in one of them
            updates, after = update(before, fault, params)
            if fault != NAN_AUX:
                assert_same_bits(own(after)[4:], own(before)[4:])
                if name in WHOLE and guard != "apply_if_finite after it":
                    assert all(np.all(u == 0) for u in jax.tree.leaves(updates)), named
                assert_same_bits(own(after).aux, own(before).aux)
            assert own(after).count == own(before).count + 1
            if guard == "apply_if_finite after it" or name in WHOLE:
                assert tree.all_finite(updates), named
            assert np.isfinite(own(after).aux["mean"])
            again, last = update(after, 0, params)
            assert tree.all_finite((again, own(last).diagnostics)), named
            assert any(np.any(u != 0) for u in jax.tree.leaves(again)), named
    if guard == "apply_if_finite around it":
        nothing = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
        _, after = update(second, 0, nothing)
        assert_same_bits(own(after), own(second))


@every_one_but_fast("ivon")
def test_a_checkpoint_holds_its_state(name, problem, tmp_path):
    import orbax.checkpoint as ocp

    params, data = problem
    tx = MAKE[name](toy.regression)
    update = jax.jit(lambda s: tx.update(params, s, params, batch=data))
    _, state = update(tx.init(params))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", tx.init(params))
    assert_same_bits(restored, state)
    close(update(restored)[0], update(state)[0])


@every_one_but_fast("dual", "ivon")
def test_two_devices_are_one(name, problem):
    params, data = problem
    if name == "otmdr":  # each device halves its own part of the batch
        make = lambda loss, **o: otmdr_jax.otmdr(  # noqa: E731
            loss, KEY, split="shared", noise_std=0.1, **o
        )
    else:
        make = MAKE[name]
    tx = make(toy.regression, axis_name="data")

    def step(state, batch):
        updates, state = tx.update(params, state, params, batch=batch)
        return state, updates

    mesh = parallel.make_mesh("data=2")
    run = parallel.shard_map_step(step, mesh, donate=False)
    state, first = run(tx.init(params), data)
    _, second = run(state, data)
    one = make(toy.regression)
    want, there = one.update(params, one.init(params), params, batch=data)
    close(first, want)
    # LookSAM divides by what is left of a gradient: rounding grows.
    close(second, one.update(params, there, params, batch=data)[0], 1e-3, 1e-4)


@every_one_but_fast("sam", "dual", "ivon")
def test_micro_batches_change_nothing(name, problem, end):
    params, data = problem
    tx = MAKE[name](toy.regression, microbatch_size=3)
    close(steps(tx, params, data)[0], end(name))


@every_one_but_fast("sam", "dual", "ivon")
def test_members_climb_on_their_own(name, problem):
    params, data = problem
    each = [params, jax.tree.map(lambda p: p + 0.5, params)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *each)
    tx = MAKE[name](toy.regression)
    lifted = ensemble.per_member(tx)
    state = lifted.init(both)
    got, _ = lifted.update(both, state, both, batch=data)
    for i, own in enumerate(each):
        alone = jax.tree.map(lambda x, i=i: x[i], state)  # with a key of its own
        want, _ = tx.update(own, alone, own, batch=data)
        close(jax.tree.map(lambda x, i=i: x[i], got), want)
