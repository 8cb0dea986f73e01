"""Parameters, batches, keys and programs as people have them.

Python numbers and NumPy arrays, raw keys, exported programs of any batch size, complex
weights, derivatives of the robust gradient, optax.masked around it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import otmdr_jax
from otmdr_jax import baselines, bnn, ensemble
from otmdr_jax.baselines.gsam import orthogonal
from otmdr_jax.core import ascent, batches, keys, tree
from otmdr_jax.experiments import methods
from tests import toy
from tests.marks import slow_but

KEY, RAW = jax.random.key(7), jax.random.PRNGKey(7)
X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def scaled(params, x):
    """A loss of a number, a vector and an array of no axes, all of them of use."""
    return jnp.mean((params["scale"] * (x @ params["w"]) + params["b"] - 1.0) ** 2)


def scaled_kernel(params, x):
    return scaled({**params, "w": jnp.ones(2)}, x @ params["w"])


AS_ARRAYS = {
    "scale": jnp.float32(0.5),
    "w": jnp.array([1.0, -1.0, 2.0]),
    "b": jnp.float32(0.25),
}
# A Python float, an array of float64 without 64 bits, a NumPy scalar.
AS_PEOPLE = {"scale": 0.5, "w": np.array([1.0, -1.0, 2.0]), "b": np.float32(0.25)}


def call(fn, params, x=X, key=KEY):
    """A compiled call whose arguments are seen as they are, not as traced arrays."""
    return jax.jit(lambda: fn(params, x, key=key))()


def assert_equal(got, want):
    """Equal to the bit, keys included."""

    def check(a, b):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(check, got, want)


def assert_close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want
    )


# Options of the robust gradient, one way through the code each.
OPTIONS = {
    "random": {},
    "shared": {"split": "shared"},
    "noisy particles": {"num_particles": 2, "noise_std": 0.01},
    "scanned": {"num_particles": 2, "particle_map": "scan"},
    "vmapped": {"num_particles": 2, "particle_map": "vmap"},
    "merged and adaptive": {"split": "ordered", "merge": "sum", "adaptive": True},
    "per leaf, masked": {
        "norm": "per_leaf",
        "mask": lambda p: jax.tree.map(lambda x: x.ndim > 0, p),
    },
    "fisher": {"fisher": 1.0, "split": "shared"},
    "micro-batches": {"microbatch_size": 4, "split": "shared"},
    "sub-batches": {"num_subbatches": 3},
}


def some(*names):
    """Of these, for what takes longer than a trace."""
    return pytest.mark.parametrize("options", [OPTIONS[n] for n in names], ids=names)


def transformations(loss, key=KEY):
    """Every transformation of whole parameters, and dynamic, as functions to one."""
    whole = {"learning_rate": 0.1, "num_data": 60, "weight_decay": 1e-3}
    return {
        "otmdr": lambda: otmdr_jax.otmdr(loss, key, noise_std=0.01),
        "sam": lambda: otmdr_jax.sam(loss),
        "asam": lambda: otmdr_jax.asam(loss),
        "dual": lambda: otmdr_jax.dual(loss, num_steps=2),
        "gsam": lambda: baselines.gsam(loss),
        "looksam": lambda: baselines.looksam(loss, every=2),
        "fisher_sam": lambda: baselines.fisher_sam(loss),
        "bsam": lambda: baselines.bsam(loss, key, num_subbatches=2, **whole),
        "ivon": lambda: baselines.ivon(loss, key, mc_samples=2, **whole),
    }


NAMES = tuple(transformations(scaled))
OWN = tuple(name for name in NAMES if name not in ("sam", "asam"))  # not of otmdr


def updated(tx, params, steps=3, **kwargs):
    """Updates and state of some steps at the same parameters."""
    state, found = tx.init(params), []
    update = jax.jit(lambda state: tx.update(params, state, params, **kwargs))
    for _ in range(steps):
        updates, state = update(state)
        found.append(updates)
    return found, state


class TestLeaves:
    """Python numbers and NumPy arrays as leaves of the parameters."""

    @pytest.mark.slow
    @some("random", "noisy particles", "per leaf, masked", "sub-batches")
    def test_they_are_what_arrays_are(self, options):
        fn = otmdr_jax.value_and_grad(scaled, **options)
        assert_equal(call(fn, AS_PEOPLE), call(fn, AS_ARRAYS))

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_gradients_come_back_as_those_of_jax(self, options):
        fn = otmdr_jax.value_and_grad(scaled, **options)
        found = jax.eval_shape(lambda: fn(AS_PEOPLE, X, key=KEY))
        want = jax.eval_shape(lambda: jax.value_and_grad(scaled)(AS_PEOPLE, X))
        assert want[1]["scale"].weak_type and not want[1]["b"].weak_type
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)

    @pytest.mark.slow
    def test_a_python_number_does_not_widen_the_pass_at_the_particle(self):
        seen = []

        def loss(params, x):
            out = params["scale"] * params["w"]
            seen.append(out.dtype)
            return jnp.mean(x) * jnp.sum(out)

        params = {"scale": 2.0, "w": jnp.ones(3, jnp.bfloat16)}
        otmdr_jax.value_and_grad(loss, norm="per_leaf")(params, jnp.ones(4), key=KEY)
        assert set(seen) == {jnp.dtype(jnp.bfloat16)} and len(seen) == 3

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OWN)
    def test_transformations_take_them(self, name):
        tx = transformations(scaled)[name]()
        got, want = (updated(tx, p, batch=X) for p in (AS_PEOPLE, AS_ARRAYS))
        assert_equal(got, want)

    @pytest.mark.slow
    def test_sparse_training_takes_them(self):
        kernel = np.random.default_rng(1).normal(size=(8, 5))
        as_people = {"kernel": kernel, "scale": 0.5, "bias": np.zeros(5)}
        as_arrays = jax.tree.map(jnp.float32, as_people)
        tx = baselines.dynamic(
            optax.sgd(0.1, 0.9), KEY, density=0.3, rate=0.5, steps=(1, 2)
        )
        grads = jax.tree.map(lambda x: 0.1 * x + 1.0, as_arrays)

        def run(params):
            state = tx.init(params)
            masked = baselines.dst.apply(state.masks, params)
            return masked, tx.update(grads, state, params)

        assert_equal(run(as_people), run(as_arrays))

    @pytest.mark.slow
    @pytest.mark.parametrize("member_map", ["unroll", "scan", "vmap"])
    def test_stacked_members_of_numpy(self, member_map):
        stacked = {name: np.stack([x, x + 1]) for name, x in AS_PEOPLE.items()}
        arrays = jax.tree.map(jnp.float32, stacked)
        fn = ensemble.value_and_grad(scaled, member_map=member_map)
        assert_close(call(fn, stacked), call(fn, arrays))
        tx = ensemble.per_member(otmdr_jax.otmdr(scaled, KEY))
        assert_equal(*(updated(tx, p, batch=X) for p in (stacked, arrays)))

    @pytest.mark.slow
    def test_a_tuple_of_members_with_python_numbers(self):
        fn = ensemble.value_and_grad(scaled)
        got = call(fn, (AS_PEOPLE, AS_PEOPLE))
        assert_close(got, call(fn, (AS_ARRAYS, AS_ARRAYS)))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("mask", "make"), [(None, bnn.value_and_grad), (True, bnn.sgvb)]
    )
    def test_posteriors(self, mask, make):
        q = bnn.init({**AS_PEOPLE, "w": np.ones((3, 2))}, mask=mask)
        arrays = bnn.init({**AS_ARRAYS, "w": jnp.ones((3, 2))}, mask=mask)
        assert_equal(jax.tree.map(jnp.asarray, q), arrays)
        loaded = jax.tree.map(lambda x: np.asarray(x, np.float64), q)
        fn = make(scaled_kernel, num_data=60)
        want = call(fn, arrays)
        assert_close(call(fn, q), want)
        assert_close(call(fn, loaded), want)

    @pytest.mark.parametrize("bad", [3, np.arange(3), True], ids=repr)
    def test_integers_are_refused_by_name(self, bad):
        params = {**AS_PEOPLE, "count": bad}
        with pytest.raises(TypeError):
            jax.value_and_grad(lambda p, x: scaled(p, x))(params, X)
        message = r"floating.*got (int32|bool) at params\['count'\].*further argument"
        stacked = jax.tree.map(lambda x: np.stack([x, x]), params)
        calls = [
            lambda: otmdr_jax.value_and_grad(scaled)(params, X, key=KEY),
            lambda: otmdr_jax.value_and_grad(scaled, num_subbatches=2)(
                params, X, key=KEY
            ),
            lambda: ensemble.value_and_grad(scaled)(stacked, X, key=KEY),
        ]
        for name in NAMES:
            tx = transformations(scaled)[name]()
            calls.append(lambda tx=tx: updated(tx, params, batch=X))
        for call in calls:
            with pytest.raises(TypeError, match=message):
                call()

    def test_integers_among_point_estimates_too(self):
        params = {**AS_PEOPLE, "count": 3, "w": np.ones((3, 2))}
        q = bnn.init(params, mask={name: name == "w" for name in params})
        with pytest.raises(TypeError, match=r"int32 at params\.point\['count'\]"):
            bnn.sgvb(scaled_kernel, num_data=60)(q, X, key=KEY)

    def test_what_is_no_number_at_all_is_refused(self):
        with pytest.raises(TypeError, match=r"got str at params\['w'\]"):
            otmdr_jax.value_and_grad(scaled)({"w": "weights"}, X, key=KEY)

    @pytest.mark.slow
    def test_aux_init_may_be_python_numbers(self):
        traces = []

        def loss(params, x):
            traces.append(1)
            return scaled(params, x), {"seen": 1.0 * jnp.sum(x)}

        tx = otmdr_jax.otmdr(loss, KEY, has_aux=True, aux_init={"seen": 0.0})
        state = tx.init(AS_ARRAYS)
        update = jax.jit(lambda s: tx.update(AS_ARRAYS, s, AS_ARRAYS, batch=X))
        _, state = update(state)
        once = len(traces)
        update(state)
        assert len(traces) == once


class TestBatches:
    """Batches of NumPy arrays, and of lists."""

    @pytest.mark.slow
    @some("noisy particles", "micro-batches", "sub-batches")
    def test_numpy_of_64_bits(self, options):
        def loss(params, batch):
            x, number, keep = batch
            return scaled(params, x * keep[:, None] + 0.1 * number[:, None])

        as_people = [
            X.astype(np.float64), np.arange(6), np.array([True, False] * 3)
        ]  # fmt: skip
        fn = otmdr_jax.value_and_grad(loss, **options)
        got = call(fn, AS_ARRAYS, as_people)
        assert_equal(got, call(fn, AS_ARRAYS, jax.tree.map(jnp.asarray, as_people)))

    def test_a_list_of_numbers_is_refused_with_what_to_do(self):
        def loss(w, x):
            return jnp.mean((w - jnp.array(x)) ** 2)

        with pytest.raises(ValueError, match="make an array of a list of numbers"):
            otmdr_jax.value_and_grad(loss)(1.0, [1.0, 2.0], key=KEY)


# -- exported programs ----------------------------------------------------------------

Q = bnn.init({"w": jnp.ones((3, 2)), "scale": jnp.ones(()), "b": jnp.zeros(())})
MEMBERS = jax.tree.map(lambda x: jnp.stack([x, x + 0.5]), AS_ARRAYS)


def once(tx, params):
    return lambda x: tx.update(params, tx.init(params), params, batch=x)[0]


def robust(**options):
    fn = otmdr_jax.value_and_grad(scaled, **options)
    return lambda x: fn(AS_ARRAYS, x, key=KEY)


def bayes(make, **options):
    fn = make(scaled_kernel, num_data=60, **options)
    return lambda x: fn(Q, x, key=KEY)


def members(**options):
    fn = ensemble.value_and_grad(scaled, split="shared", **options)
    return lambda x: fn(MEMBERS, x, key=KEY)


ANY_SIZE = {
    "value_and_grad": robust(split="shared", rho=(0.05, 0.1)),
    "scanned particles": robust(
        split="shared", rho=0.1, num_particles=2, noise_std=0.01, particle_map="scan"
    ),
    "fisher_sam": once(baselines.fisher_sam(scaled), AS_ARRAYS),
    "dual": once(otmdr_jax.dual(scaled), AS_ARRAYS),
    "gsam": once(baselines.gsam(scaled), AS_ARRAYS),
    "looksam": once(baselines.looksam(scaled), AS_ARRAYS),
    "bsam": once(
        baselines.bsam(scaled, KEY, learning_rate=0.1, weight_decay=0.1, num_data=60),
        AS_ARRAYS,
    ),
    "ivon": once(
        baselines.ivon(scaled, KEY, learning_rate=0.1, num_data=60), AS_ARRAYS
    ),
    "bnn": bayes(bnn.value_and_grad, split="shared", rho=0.1),
    "local": bayes(bnn.sgvb, estimator="local"),
    "members": members(rho=0.1, member_map="scan"),
    "per_member": once(ensemble.per_member(otmdr_jax.sam(scaled)), MEMBERS),
    "keys of examples": lambda x: jax.random.key_data(
        baselines.example_keys(KEY, x.shape[0])
    ),
}


def exported(function, size):
    (symbol,) = jax.export.symbolic_shape(size)
    shape = jax.ShapeDtypeStruct((symbol, 3), jnp.float32)
    return jax.export.export(jax.jit(function))(shape)


def assert_exported(function, size):
    program = exported(function, size)
    for n in (4, 6):
        assert_close(program.call(X[:n]), jax.jit(function)(X[:n]), atol=1e-5)


class TestExport:
    """Programs of jax.export with a symbolic batch size."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ANY_SIZE)
    def test_any_size_where_nothing_is_cut(self, name):
        assert_exported(ANY_SIZE[name], "b")

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({}, "split='random' needs a batch size that is a number when"),
            ({"split": "ordered"}, "split='ordered' .* or a multiple of 2 when"),
            ({"split": "shared", "microbatch_size": 2}, "microbatch_size=2 needs"),
            ({"split": "shared", "num_subbatches": 3}, "num_subbatches=3 .* of 3 when"),
        ],
    )
    def test_what_needs_the_size_says_so(self, options, what):
        with pytest.raises(ValueError, match=f"{what}.*got b: .*split='shared'"):
            exported(robust(**options), "b")

    @pytest.mark.parametrize(
        ("make", "what"),
        [
            (lambda: bayes(bnn.value_and_grad), "split='random'"),
            (
                lambda: once(transformations(scaled)["bsam"](), AS_ARRAYS),
                "num_subbatches=2",
            ),
        ],
        ids=["bnn", "bsam"],
    )
    def test_other_functions_say_it_too(self, make, what):
        with pytest.raises(ValueError, match=what):
            exported(make(), "b")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [{"split": "ordered"}, {"split": "shared", "num_subbatches": 2}],
    )
    def test_a_multiple_may_be_cut(self, options):
        assert_exported(robust(**options), "2*b")

    def test_numbers_pass(self):
        batches.check_known(5, 2, "nothing")


# -- derivatives ----------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_loses_small_steps_and_a_cast_in_the_loss_does_not():
    """0.05 / sqrt(P) is below half a unit in the last place of most weights."""
    w = 0.05 * jax.random.normal(KEY, (1_000_000,))

    def loss(w, batch):
        return 0.5 * jnp.sum(w.astype(jnp.float32) ** 2)

    def gap(loss, w):
        fn = otmdr_jax.robust_gradient(loss, rho=0.05, split="shared")
        info = jax.jit(fn)(w, jnp.zeros(1)).diagnostics
        return float(info.gap), float(info.distances[0])

    want = 0.05 * np.linalg.norm(w) + 0.05**2 / 2
    assert gap(loss, w.astype(jnp.bfloat16)) == (0.0, 0.0)
    found, distance = gap(lambda w, b: loss(w.astype(jnp.bfloat16), b), w)
    assert found == pytest.approx(want, rel=0.02)
    assert distance == pytest.approx(0.05, rel=1e-4)


class TestDerivatives:
    """Through the norm, the ascent step and the whole robust gradient."""

    @pytest.mark.parametrize("scale", [1e20, 1.0, 1e-30])
    def test_norm_in_any_range(self, scale):
        x = {"a": scale * jnp.array([3.0, 0.0]), "b": scale * jnp.array(4.0)}
        want = {"a": [0.6, 0.0], "b": 0.8}
        assert_close(jax.grad(tree.norm)(x), want)
        moves = jax.tree.map(jnp.ones_like, x)
        assert_close(jax.jvp(tree.norm, (x,), (moves,))[1], 1.4)

    @pytest.mark.parametrize(
        "dtype",
        [jnp.float32, jnp.bfloat16, jnp.complex64],
    )
    def test_norm_at_zero_has_the_derivative_zero(self, dtype):
        zero = {"a": jnp.zeros(3, dtype), "b": jnp.zeros((), dtype)}
        grads = jax.grad(tree.norm)(zero)
        assert_equal(grads, zero)
        moves = jax.tree.map(jnp.ones_like, zero)
        assert jax.jvp(tree.norm, (zero,), (moves,))[1] == 0
        if dtype == jnp.float32:
            assert np.all(jax.hessian(tree.norm)(jnp.zeros(2)) == 0)

    def test_norm_of_complex_numbers_and_its_curvature(self):
        z = jnp.array([3.0 + 4.0j, 12.0j])
        # JAX's gradient of a real function is the conjugate.
        np.testing.assert_allclose(jax.grad(tree.norm)(z), z.conj() / 13, rtol=1e-6)
        x = np.array([3.0, 4.0])
        want = (np.eye(2) - np.outer(x, x) / 25) / 5
        np.testing.assert_allclose(jax.hessian(tree.norm)(x), want, atol=1e-6)

    def test_norm_that_is_not_finite_has_no_finite_derivative(self):
        assert np.isnan(jax.grad(tree.norm)(jnp.array([jnp.inf, 1.0]))).any()

    def test_fisher_scale_is_differentiated_at_eta_zero(self):
        g = jnp.array([0.0, 3.0])
        # T = (1 + eta g^2)^(-1/2): dT/d eta = -g^2 T^3 / 2, dT/dg = -eta g T^3.
        for eta in (0.0, 0.5):
            t = (1 + eta * np.square(g)) ** -0.5
            by_eta = jax.jacfwd(lambda e: ascent.fisher(e)(None, g))(eta)
            np.testing.assert_allclose(by_eta, -(g**2) * t**3 / 2, rtol=1e-6)
            by_g = jax.grad(lambda g: ascent.fisher(eta)(None, g).sum())(g)  # noqa: B023
            np.testing.assert_allclose(by_g, -eta * g * t**3, rtol=1e-6)
        far = jax.grad(lambda g: ascent.fisher(0.5)(None, g).sum())
        assert np.all(np.isfinite(far(jnp.array([1e20, 1e-30]))))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"norm": "per_leaf"},
            {"norm": "none"},
            {"adaptive": True},
            {"fisher": 0.5},
            {"merge": "sum"},
            {"noise_std": 0.01},
        ],
        ids=str,
    )
    def test_at_a_zero_gradient_all_is_finite(self, options):
        def loss(w, x):  # flat at 0 and with w itself unknown to the first pass
            return jnp.sum(w["a"] ** 2) + jnp.sum(w["b"] ** 2) * jnp.mean(x) ** 2

        fn = otmdr_jax.robust_gradient(loss, split="ordered", **options)

        def after(w, rho):
            found = fn(w, jnp.ones(4), key=KEY, rho=(rho, 2 * rho))
            return tree.norm(found.grads) ** 2 + found.value, found

        w = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
        mode = jax.jacfwd if "merge" in options else jax.jacrev
        found = jax.jit(mode(after, argnums=(0, 1)))(w, 0.1)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))

    def test_at_a_zero_gradient_the_particle_moves_with_the_center(self):
        step = jax.jacobian(lambda w: ascent.ascend(w, 0.0 * w, 0.1)[0])
        np.testing.assert_array_equal(step(jnp.ones(2)), np.eye(2))
        by_rho = jax.jacobian(
            lambda rho: ascent.ascend(jnp.ones(2), jnp.zeros(2), rho)[0]
        )
        np.testing.assert_array_equal(by_rho(0.1), np.zeros(2))

    @pytest.mark.parametrize(
        "options",
        slow_but(
            [
                {"split": "shared"},
                {"split": "ordered", "norm": "per_leaf", "merge": "mean"},
            ],
            [
                {"split": "shared"},
                {"split": "ordered", "norm": "per_leaf", "merge": "mean"},
                {"split": "shared", "adaptive": True},
                {"split": "shared", "fisher": 0.5},
                {"noise_std": 0.01},
            ],
        ),
        ids=str,
    )
    def test_through_the_whole_against_finite_differences(self, options):
        """Meta-learning: a loss after a step, by its start and by the radius."""
        with jax.enable_x64(True):
            fn = otmdr_jax.value_and_grad(toy.regression, **options)
            params, data = toy.regression_problem(dtype=np.float64)
            start, back = jax.flatten_util.ravel_pytree(params)

            @jax.jit
            def after(w, rho):
                w = back(w)
                _, g = fn(w, data, key=KEY, rho=(rho, 2 * rho))
                w = jax.tree.map(lambda w, g: w - 0.1 * g, w, g)
                return toy.regression(w, data)

            by_start, by_rho = jax.jit(jax.grad(after, argnums=(0, 1)))(start, 0.3)
            step = 1e-6
            numeric = [
                (after(start + e, 0.3) - after(start - e, 0.3)) / (2 * step)
                for e in step * np.eye(len(start))
            ]
            np.testing.assert_allclose(by_start, numeric, rtol=1e-5, atol=1e-8)
            numeric = (after(start, 0.3 + step) - after(start, 0.3 - step)) / (2 * step)
            np.testing.assert_allclose(by_rho, numeric, rtol=1e-5, atol=1e-8)
            assert abs(float(by_rho)) > 1e-4

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name",
        ["dual", "gsam", "looksam", "bsam", "ivon"],
    )
    def test_updates_of_all_transformations_at_a_zero_gradient(self, name):
        def loss(w, x):
            return jnp.sum(w**2) * jnp.mean(x)

        tx = transformations(loss)[name]()

        def after(w):
            updates, state = tx.update(w, tx.init(w), w, batch=jnp.ones(4))
            updates, _ = tx.update(w, state, w, batch=jnp.ones(4))
            return jnp.sum((w - 0.1 * updates) ** 2)

        assert np.all(np.isfinite(jax.jit(jax.grad(after))(jnp.zeros(3))))


# -- keys -----------------------------------------------------------------------------


class TestKeys:
    """Raw keys, of jax.random.PRNGKey, wherever typed ones go."""

    @pytest.mark.parametrize(
        "way", slow_but(["noisy particles"], ["noisy particles", "sub-batches"])
    )
    def test_both_kinds_give_the_same(self, way):
        fn = otmdr_jax.value_and_grad(scaled, **OPTIONS[way])
        assert_equal(call(fn, AS_ARRAYS, key=RAW), call(fn, AS_ARRAYS))

    @pytest.mark.parametrize("name", slow_but(["otmdr"], ["otmdr", "bsam", "ivon"]))
    def test_transformations_give_the_same_and_their_state_stays_as_it_is(self, name):
        raw, typed = (transformations(scaled, key)[name]() for key in (RAW, KEY))
        first = raw.init(AS_ARRAYS)
        updates, state = updated(raw, AS_ARRAYS, batch=X)
        assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(
            lambda x: x.dtype, state
        )
        assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
        assert_equal((updates, state), updated(typed, AS_ARRAYS, batch=X))

    def test_the_callers_raw_key_outlives_a_donated_state(self):
        raw = jnp.array(RAW)
        tx = otmdr_jax.otmdr(scaled, raw)
        update = jax.jit(
            lambda state: tx.update(AS_ARRAYS, state, AS_ARRAYS, batch=X)[1],
            donate_argnums=0,
        )
        for _ in range(2):
            update(update(tx.init(AS_ARRAYS)))
        np.testing.assert_array_equal(raw, RAW)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("otmdr", "stacked"),
            ("otmdr", "tuple"),
            ("bsam", "stacked"),
            ("ivon", "tuple"),
        ],
    )
    def test_members_of_one_raw_key_differ(self, name, kind):
        same = [AS_ARRAYS] * 3
        members = tree.stack(same) if kind == "stacked" else tuple(same)
        found = {}
        for key in (RAW, KEY):
            tx = ensemble.per_member(transformations(scaled, key)[name]())
            # Before the second step precisions of bSAM and IVON are still alike.
            (updates,), _ = updated(tx, members, steps=1, batch=X)
            found[key.dtype] = updates
        assert_equal(*found.values())
        w = [m["w"] for m in (updates if kind == "tuple" else tree.unstack(updates))]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not np.allclose(w[a], w[b], rtol=1e-4)

    def test_keys_of_members(self):
        # As many members as a raw key has words: one raw key is still one key.
        for count in (2, 3):
            one = ensemble.member_keys(RAW, count)
            assert_equal(one, jax.random.split(KEY, count))
            many = jax.random.split(RAW, count)
            assert many.shape == (count, 2)
            assert_equal(
                ensemble.member_keys(many, count), jax.random.split(KEY, count)
            )
            assert_equal(ensemble.member_keys(np.asarray(many), count), one)
        assert ensemble.member_keys(RAW, 1).shape == (1,)
        assert_equal(ensemble.member_keys(RAW[None], 1), KEY[None])
        with pytest.raises(ValueError, match=r"one for each of 2 members.*\(3,\)"):
            ensemble.member_keys(jax.random.split(RAW, 3), 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("member_map", ["scan", "vmap"])
    def test_members_with_raw_keys(self, member_map):
        fn = ensemble.value_and_grad(scaled, member_map=member_map, noise_std=0.01)
        want = call(fn, MEMBERS)
        assert_equal(call(fn, MEMBERS, key=RAW), want)
        assert_equal(call(fn, MEMBERS, key=jax.random.split(RAW, 2)), want)

    @pytest.mark.slow
    def test_posteriors(self):
        fn = bnn.value_and_grad(scaled_kernel, num_data=60, noise_std=0.01)
        assert_equal(call(fn, Q, key=RAW), call(fn, Q))
        assert_equal(*(jax.jit(bnn.sample)(Q, key) for key in (RAW, KEY)))

    def test_sparse_training(self):
        found = [
            baselines.dynamic(
                optax.sgd(0.1), key, density=0.3, rate=0.5, steps=(1,), growth="random"
            ).init({"kernel": jnp.ones((8, 5))})
            for key in (RAW, KEY)
        ]
        assert_equal(*found)

    def test_keys_of_examples(self):
        found = baselines.example_keys(RAW, 4)
        assert found.shape == (4,)
        assert_equal(found, baselines.example_keys(KEY, 4))

    @pytest.mark.slow
    def test_a_method_of_a_raw_key(self):
        model = otmdr_jax.models.create("cnn_small", 10, dropout=0.5)
        one = methods.create("sgd", model, optax.sgd(0.1))
        method = baselines.mc_dropout(one, model, num_samples=2)
        images = jnp.ones((3, 8, 8, 1))
        raw, typed = (method.init(key, images) for key in (RAW, KEY))
        assert_equal(raw, typed)
        predict = jax.jit(method.predict)
        want = predict(typed, images)
        assert not np.allclose(want[0], want[1])
        assert_equal(
            predict(typed._replace(key=jax.random.key_data(typed.key)), images), want
        )

    @pytest.mark.slow
    def test_it_may_be_traced(self):
        fn = otmdr_jax.value_and_grad(scaled)
        each = jax.jit(jax.vmap(lambda key: fn(AS_ARRAYS, X, key=key)[0]))
        assert_equal(each(jax.random.split(RAW, 3)), each(jax.random.split(KEY, 3)))

    @pytest.mark.parametrize(
        ("key", "error", "message"),
        [
            (0, TypeError, "must be a PRNG key.*got int: 0"),
            (np.zeros(2), TypeError, "got an array of float64"),
            (jnp.uint32(0), TypeError, "got an array of uint32"),
            (jax.random.PRNGKey(0, impl="rbg"), ValueError, r"'threefry2x32'.*\(4,\)"),
            (jax.random.split(RAW, 3), ValueError, r"one PRNG key.*\(3,\)"),
            (jax.random.split(KEY, 3), ValueError, r"one PRNG key.*\(3,\)"),
        ],
        ids=["number", "floats", "a word", "rbg", "raw keys", "typed keys"],
    )  # fmt: skip
    def test_what_is_no_key_is_refused(self, key, error, message):
        for call in (
            lambda: otmdr_jax.value_and_grad(scaled)(AS_ARRAYS, X, key=key),
            lambda: otmdr_jax.otmdr(scaled, key),
            lambda: bnn.sgvb(scaled_kernel, num_data=60)(Q, X, key=key),
            lambda: baselines.example_keys(key, 2),
        ):
            with pytest.raises(error, match=message):
                call()

    @pytest.mark.slow
    def test_typed_keys_of_other_generators_and_none_pass(self):
        rbg = jax.random.key(0, impl="rbg")
        assert keys.one_key(rbg) is rbg and keys.one_key(None) is None
        value, _ = otmdr_jax.value_and_grad(scaled)(AS_ARRAYS, X, key=rbg)
        assert np.isfinite(value)

    def test_raw_keys_of_another_default_generator(self):
        with jax.default_prng_impl("rbg"):
            raw, typed = jax.random.PRNGKey(0), jax.random.key(0)
            assert raw.shape == (4,)
            assert_equal(keys.one_key(raw), typed)
            assert ensemble.member_keys(jax.random.split(raw, 4), 4).shape == (4,)


# -- optax.masked and optax.partition -------------------------------------------------

LABELS = {"scale": "frozen", "w": "trained", "b": "trained"}
TRAINED = {name: label == "trained" for name, label in LABELS.items()}


class TestMasked:
    """Transformations that need all parameters, inside those that take some away."""

    @pytest.mark.parametrize("name", NAMES)
    def test_around_the_robust_gradient_they_are_refused(self, name):
        inner = transformations(scaled)[name]()
        outer = (
            optax.masked(inner, TRAINED),
            optax.partition({"trained": inner, "frozen": optax.sgd(0.1)}, LABELS),
            optax.chain(optax.masked(optax.chain(inner, optax.sgd(0.1)), TRAINED)),
        )
        for tx in outer:
            with pytest.raises(
                TypeError, match="needs all parameters.*optax.chain.*mask="
            ):
                tx.init(AS_ARRAYS)

    def test_at_the_update_too(self):
        tx = otmdr_jax.sam(scaled)
        part = {**AS_ARRAYS, "b": optax.MaskedNode()}
        with pytest.raises(TypeError, match="needs all parameters"):
            tx.update(part, tx.init(AS_ARRAYS), part, batch=X)

    @pytest.mark.slow
    def test_after_it_they_work(self):
        robust = otmdr_jax.otmdr(scaled, KEY)
        tx = optax.chain(
            robust,
            optax.partition(
                {"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, LABELS
            ),
        )
        (grads,), _ = updated(robust, AS_ARRAYS, steps=1, batch=X)
        (updates,), _ = updated(tx, AS_ARRAYS, steps=1, batch=X)
        want = {n: -0.1 * TRAINED[n] * g for n, g in grads.items()}
        assert_close(updates, want)

    def test_the_mask_of_the_transformation(self):
        tx = otmdr_jax.sam(scaled, mask=TRAINED)
        (grads,), _ = updated(tx, AS_ARRAYS, steps=1, batch=X)
        fn = otmdr_jax.value_and_grad(scaled, 0.05, split="shared", mask=TRAINED)
        assert_close(grads, fn(AS_ARRAYS, X)[1])

    @pytest.mark.slow
    def test_sparse_training_of_some_leaves(self):
        params = {"a": jnp.ones((20, 10)), "b": jnp.ones((20, 10))}
        inner = baselines.dynamic(
            optax.sgd(0.1), KEY, density=0.1, rate=0.5, steps=(1,)
        )
        tx = optax.masked(inner, {"a": True, "b": False})
        state = tx.init(params)
        updates, _ = tx.update(params, state, params)
        new = optax.apply_updates(params, updates)
        assert (np.count_nonzero(new["a"]), np.count_nonzero(new["b"])) == (10, 200)


# -- complex weights ------------------------------------------------------------------

Z = {"z": jnp.array([0.5 - 0.25j, 1.0 + 1.0j, -0.5j]), "u": jnp.array(0.3 + 0.1j)}
CX = X[:, :2] @ np.array([[1, 2j, 1 - 1j], [0.5j, 1, -1]], np.complex64)


def complex_loss(params, x):
    """Not analytic, and curved differently along both parts."""
    out = x @ params["z"] + params["u"] - (1 + 2j)
    return jnp.mean(jnp.abs(out) ** 2 + jnp.cos(jnp.real(out)))


def in_parts(params):
    return jax.tree.map(lambda z: jnp.stack([z.real, z.imag], axis=-1), params)


def joined(parts):
    return jax.tree.map(lambda p: jax.lax.complex(p[..., 0], p[..., 1]), parts)


def real_loss(parts, x):
    return complex_loss(joined(parts), x)


DECOMPOSING = {
    "dual": lambda loss: otmdr_jax.dual(loss, num_steps=2),
    "gsam": lambda loss: baselines.gsam(loss, alpha=0.5),
    "looksam": lambda loss: baselines.looksam(loss, every=3),
    "looksam per leaf": lambda loss: baselines.looksam(loss, every=2, norm="per_leaf"),
    "sam": otmdr_jax.sam,
}


class TestComplex:
    """JAX's gradient of complex weights is the conjugate of the steepest ascent."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
                {"norm": norm, "merge": merge}
                for norm, merge in (
                    ("global", None), ("per_leaf", None), ("none", None),
                    ("global", "sum"), ("global", "mean"), ("per_leaf", "sum"),
                )
            ] + [{"microbatch_size": 4}, {"num_subbatches": 2}],
        ids=str,
    )  # fmt: skip
    def test_they_are_the_problem_of_their_parts(self, options):
        got, want = (
            call(
                otmdr_jax.robust_gradient(loss, split="ordered", **options), params, CX
            )
            for loss, params in ((complex_loss, Z), (real_loss, in_parts(Z)))
        )
        assert_close(got.value, want.value)
        assert_close(jax.tree.map(jnp.conj, got.grads), joined(want.grads), atol=1e-5)
        assert_close(got.diagnostics, want.diagnostics, atol=1e-5)
        assert got.grads["z"].dtype == jnp.complex64

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name",
        DECOMPOSING,
    )
    def test_decompositions_are_those_of_their_parts(self, name):
        make = DECOMPOSING[name]
        got, _ = updated(make(complex_loss), Z, batch=CX)
        want, _ = updated(make(real_loss), in_parts(Z), batch=CX)
        for a, b in zip(got, want, strict=True):
            assert_close(jax.tree.map(jnp.conj, a), joined(b), atol=1e-5)

    def test_what_is_orthogonal_is_so_as_real_vectors(self):
        a, b = Z, jax.tree.map(lambda z: (2 - 1j) * z + 1, Z)
        aside = orthogonal(a, b)
        want = orthogonal(in_parts(a), in_parts(b))
        assert_close(in_parts(aside), want)

    def test_scales_are_those_of_the_modulus(self):
        w = np.array([3 + 4j, 1j], np.complex64)
        g = np.array([1 - 1j, 2], np.complex64)
        for metric, t in (
            (ascent.absolute_weights, np.abs(w)),
            (ascent.fisher(0.5), (1 + 0.5 * np.abs(g) ** 2) ** -0.5),
        ):
            moved, length = ascent.ascend(
                jnp.array(w), jnp.array(g), 0.1, metric=metric
            )
            want = np.linalg.norm(t * g)
            np.testing.assert_allclose(length, want, rtol=1e-6)
            np.testing.assert_allclose(
                moved, w + 0.1 * t**2 * g.conj() / want, rtol=1e-6
            )

    def test_noise_is_that_of_both_parts(self):
        w = jnp.zeros(20_000, jnp.complex64)
        moved, _ = ascent.ascend(w, w, 0.0, noise_std=0.5, key=KEY)
        np.testing.assert_allclose(
            [moved.real.std(), moved.imag.std()], [0.5, 0.5], rtol=0.03
        )

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
                {}, {"merge": "sum"}, {"merge": "mean"}, {"norm": "per_leaf"},
                {"adaptive": True}, {"fisher": 0.5, "split": "shared"},
                {"num_particles": 2},
            ],
        ids=str,
    )  # fmt: skip
    def test_particles_climb_and_conjugates_descend(self, options):
        options = {"split": "ordered", "rho": (0.05, 0.1)} | options
        fn = jax.jit(otmdr_jax.value_and_grad(complex_loss, **options))
        params, losses = Z, []
        for _ in range(10):
            losses.append(complex_loss(params, CX))
            value, grads = fn(params, CX)
            assert value > losses[-1]
            params = jax.tree.map(lambda w, g: w - 0.005 * g.conj(), params, grads)
        assert np.all(np.diff(losses) < 0)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name",
        [n for n in NAMES if n not in ("bsam", "ivon")],
    )
    def test_transformations_descend_with_conjugates_after_them(self, name):
        conjugate = optax.stateless(lambda g, _: jax.tree.map(jnp.conj, g))
        tx = optax.chain(
            transformations(complex_loss)[name](), conjugate, optax.sgd(0.002)
        )
        params, state, losses = Z, tx.init(Z), []
        update = jax.jit(lambda p, s: tx.update(p, s, p, batch=CX))
        for _ in range(6):
            losses.append(complex_loss(params, CX))
            updates, state = update(params, state)
            params = optax.apply_updates(params, updates)
        assert np.all(np.diff(losses) < 0)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["bsam", "ivon"])
    def test_precisions_are_of_real_weights(self, name):
        with pytest.raises(TypeError, match="each real weight.*complex64.*imaginary"):
            transformations(complex_loss)[name]().init(Z)
        tx, params = transformations(real_loss)[name](), in_parts(Z)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(params, state, params, batch=CX)
            small = jax.tree.map(lambda u: u / 20, updates)
            return optax.apply_updates(params, small), state

        new, state = params, tx.init(params)
        for _ in range(5):
            new, state = step(new, state)
        assert real_loss(new, CX) < real_loss(params, CX)
