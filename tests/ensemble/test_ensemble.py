"""Ensembles: members are runs of their own; the joint variant; lifted optimizers."""

from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import otmdr_jax
from otmdr_jax import ensemble, models, parallel
from otmdr_jax.core import loops
from otmdr_jax.experiments import members, methods
from otmdr_jax.metrics import diversity
from tests import toy
from tests.marks import one_axis_at_a_time, slow_but

MAPS = ("vmap", "unroll", "scan")
RHO = (0.05, 0.1)


def assert_close(a, b, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def assert_same(a, b):
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, a, b)


class Linear(NamedTuple):
    """A network that counts its batches."""

    dropout: float = 0.0

    def init(self, key, images):
        weights = jax.random.normal(key, (images[0].size, 10))
        return {"kernel": weights}, {"batches": jnp.zeros((), jnp.int32)}

    def apply(self, params, state, images, *, train=False):
        if train:
            state = {"batches": state["batches"] + 1}
        return images.reshape(len(images), -1) @ params["kernel"], state


def five(batch=16):
    """Stacked parameters of five members, and a batch."""
    _, data = toy.regression_problem(batch=batch)
    each = [toy.regression_problem(seed, batch=batch)[0] for seed in range(5)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *each), each, data


class TestGradient:
    @pytest.mark.slow
    @one_axis_at_a_time(
        how=MAPS,
        options=[
            {"num_particles": 2, "noise_std": 0.05},
            {"split": "shared", "rho": 0.05},
            {"norm": "per_leaf", "adaptive": True, "merge": "sum"},
        ],
    )
    def test_each_member_is_a_single_model_with_its_key(self, how, options, key):
        options = {"rho": RHO, **options}
        stacked, each, data = five()
        fn = ensemble.value_and_grad(toy.regression, member_map=how, **options)
        values, grads = jax.jit(fn)(stacked, data, key=key)
        one = jax.jit(otmdr_jax.value_and_grad(toy.regression, **options))
        keys = jax.random.split(key, 5)
        for m, params in enumerate(each):
            want = one(params, data, key=keys[m])
            got = values[m], jax.tree.map(lambda x, m=m: x[m], grads)
            assert_close(got, want)

    def test_members_have_their_own_norm(self):
        """Far larger gradients of one member change nothing for the other."""

        def loss(w, batch):
            return 0.5 * jnp.sum(w**2) + 0.0 * jnp.mean(batch)

        fn = ensemble.value_and_grad(loss, 0.5, split="shared")
        weights = jnp.array([[3.0, 4.0], [3e6, 4e6]])
        _, grads = fn(weights, jnp.zeros(2))
        np.testing.assert_allclose(grads[0], [3.3, 4.4], rtol=1e-6)

    @pytest.mark.slow
    def test_splits_and_noise_are_independent(self, key):
        """Members that start alike part, as different keys do; the same keys do not."""
        stacked, each, data = five()
        alike = jax.tree.map(lambda x: jnp.stack([x] * 3), each[0])
        fn = jax.jit(ensemble.value_and_grad(toy.regression, RHO, noise_std=0.05))
        values, _ = fn(alike, data, key=key)
        assert len(set(values.tolist())) == 3
        keys = jnp.stack([key, key, jax.random.key(7)])
        values, _ = fn(alike, data, key=keys)
        assert values[0] == values[1] != values[2]

    @pytest.mark.slow
    def test_different_architectures_are_a_tuple(self, key):
        def line(w, batch):
            return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

        params, data = toy.regression_problem(batch=16)
        weights = jnp.ones(data["x"].shape[1])
        functions = (toy.regression, line, toy.regression)
        together = (params, weights, params)
        fn = ensemble.value_and_grad(functions, RHO, num_particles=2)
        values, grads = jax.jit(fn)(together, data, key=key)
        keys = jax.random.split(key, 3)
        assert values.shape == (3,) and type(grads) is tuple
        for m, loss in enumerate(functions):
            one = jax.jit(otmdr_jax.value_and_grad(loss, RHO, num_particles=2))
            want = one(together[m], data, key=keys[m])
            assert_close((values[m], grads[m]), want)

    @pytest.mark.parametrize("how", slow_but([x for x in MAPS if x != "vmap"], MAPS))
    def test_aux_and_arguments_are_per_member_keywords_are_shared(self, how):
        def loss(w, batch, state, *, scale):
            value = scale * jnp.mean((batch - w) ** 2)
            return value, {"seen": state["seen"] + jnp.mean(batch)}

        fn = ensemble.value_and_grad(
            loss, 0.1, split="shared", has_aux=True, member_map=how
        )
        state = {"seen": jnp.array([1.0, 2.0])}
        (values, aux), grads = fn(jnp.zeros(2), jnp.ones(4), state, scale=3.0)
        assert values.shape == grads.shape == (2,)
        np.testing.assert_allclose(aux["seen"], [2.0, 3.0])

    @pytest.mark.parametrize("how", MAPS)
    def test_own_batches(self, how):
        def loss(w, batch):
            return jnp.mean((batch - w) ** 2)

        fn = ensemble.value_and_grad(
            loss, 0.0, split="shared", own_batches=True, member_map=how
        )
        batches = jnp.array([[1.0, 3.0], [10.0, 30.0]])
        values, grads = fn(jnp.zeros(2), batches)
        np.testing.assert_allclose(values, [5.0, 500.0])
        np.testing.assert_allclose(grads, [-4.0, -40.0])

    @pytest.mark.slow
    def test_members_on_a_mesh_take_the_keys_of_one_device(self, key):
        stacked, _, data = five()
        stacked = jax.tree.map(lambda x: x[:4], stacked)
        options = dict(num_particles=2, noise_std=0.05)
        here = jax.jit(ensemble.value_and_grad(toy.regression, RHO, **options))
        spread = ensemble.value_and_grad(
            toy.regression, RHO, member_axis_name="member", **options
        )
        mapped = jax.jit(
            jax.shard_map(
                lambda p, b, k: spread(p, b, key=k),
                mesh=parallel.make_mesh("member=2"),
                in_specs=(P("member"), P(), P()),
                out_specs=P("member"),
            )
        )
        assert_close(mapped(stacked, data, key), here(stacked, data, key=key))

    @pytest.mark.slow
    @pytest.mark.parametrize("how", MAPS)
    def test_raw_keys(self, how):
        stacked, _, data = five()
        fn = jax.jit(ensemble.value_and_grad(toy.regression, RHO, member_map=how))
        typed, _ = fn(stacked, data, key=jax.random.key(3))
        raw, _ = fn(stacked, data, key=jax.random.PRNGKey(3))
        np.testing.assert_array_equal(typed, raw)

    @pytest.mark.slow
    def test_unrolled_members_take_the_memory_of_one(self):
        def loss(weights, x):
            for w in weights:
                x = jnp.tanh(x @ w)
            return jnp.mean(x**2)

        one = [jnp.ones((64, 64)) / 64] * 6
        four = [jnp.stack([w] * 4) for w in one]
        x = jnp.ones((2048, 64))

        def temporaries(fn, weights):
            program = jax.jit(fn).lower(weights, x).compile()
            return program.memory_analysis().temp_size_in_bytes

        options = dict(rho=0.1, split="shared")
        single = temporaries(otmdr_jax.value_and_grad(loss, **options), one)
        maps = {
            how: temporaries(
                ensemble.value_and_grad(loss, member_map=how, **options), four
            )
            for how in MAPS
        }
        assert maps["unroll"] < 1.5 * single and maps["scan"] < 1.5 * single
        assert maps["vmap"] > 2.5 * single

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"members": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}, "must be stacked"),
            ({"members": ()}, "at least one member"),
            ({"key": jax.random.split(jax.random.key(0), 3)}, "one for each of 2"),
            ({"args": (jnp.ones(3),)}, "leading axis of 2"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, message, key):
        given = {"members": {"w": jnp.ones((2, 3))}, "key": key, "args": ()} | change
        fn = ensemble.value_and_grad(
            lambda p, b, *args: jnp.mean(b) * jnp.sum(p["w"]), RHO
        )
        with pytest.raises(ValueError, match=message):
            fn(given["members"], jnp.ones(4), *given["args"], key=given["key"])

    def test_functions_that_are_not_one_for_each_are_refused(self, key):
        fn = ensemble.value_and_grad([toy.regression] * 2, RHO)
        stacked, each, data = five()
        with pytest.raises(ValueError, match="2 functions need a tuple"):
            fn(stacked, data, key=key)
        with pytest.raises(ValueError, match="2 functions need a tuple"):
            fn(tuple(each), data, key=key)
        with pytest.raises(ValueError, match="no device axis 'member' here"):
            spread = ensemble.value_and_grad(toy.regression, member_axis_name="member")
            spread(stacked, data, key=key)
        with pytest.raises(ValueError, match="member_map must be one of"):
            ensemble.value_and_grad(toy.regression, member_map="pmap")


class TestJoint:
    """The released code: one loss on the mean probability, one norm."""

    @staticmethod
    def logits(w, batch):
        return batch["x"] @ w

    @staticmethod
    def nll(log_probs, batch):
        return -jnp.mean(jnp.take_along_axis(log_probs, batch["y"][:, None], 1))

    @pytest.mark.parametrize("how", [*MAPS, "tuple"])
    def test_one_step_is_that_of_numpy(self, how):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(6, 3)), rng.integers(0, 4, 6)
        weights = rng.normal(size=(2, 3, 4))
        first, second = slice(0, 3), slice(3, 6)

        def gradient(w, rows):
            """By hand: softmaxes, their mean, and the chain rule."""
            logits = np.einsum("nf,mfc->mnc", x[rows], w)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            onehot = np.eye(4)[y[rows]]
            of_label = (p * onehot).sum(-1, keepdims=True)  # (M, n, 1)
            mean = of_label.mean(0)
            share = of_label / (2 * mean) / len(onehot)
            d = share * (p - onehot)
            return -np.mean(np.log(mean)), np.einsum("nf,mnc->mfc", x[rows], d)

        _, g1 = gradient(weights, first)
        w1 = weights + 0.05 * g1 / np.sqrt((g1**2).sum())  # over both members
        _, g2 = gradient(w1, second)
        w2 = w1 + 0.1 * (g1 + g2) / np.sqrt((g2**2).sum())
        want = gradient(w2, slice(0, 6))

        loss_fn = ensemble.joint_loss(
            self.logits, self.nll, member_map="vmap" if how == "tuple" else how
        )
        options = otmdr_jax.preset("released-ensemble-cifar10")
        fn = jax.jit(otmdr_jax.value_and_grad(loss_fn, **options))
        start = jnp.asarray(weights, jnp.float32)
        if how == "tuple":
            start = tuple(start)
        batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y)}
        value, grads = fn(start, batch)
        np.testing.assert_allclose(value, want[0], rtol=1e-5)
        np.testing.assert_allclose(np.asarray(grads), want[1], rtol=1e-4, atol=1e-6)

    def test_a_joint_model_is_the_joint_loss(self):
        network = Linear()
        model = members.JointModel((network,), 2)
        images = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
        labels = jnp.arange(8)
        params, state = model.init(jax.random.key(0), images)
        method = members.joint(
            methods.create("sgd", model, optax.sgd(0.1), label_smoothing=0.1), model
        )
        start = method.init(jax.random.key(0), images)._replace(
            params=params, model_state=state
        )
        got, metrics = jax.jit(method.step)(start, (images, labels))

        def logits_fn(p, batch, s):
            return network.apply(p, s, batch[0], train=True)

        loss_fn = ensemble.joint_loss(
            logits_fn,
            lambda log_probs, batch: methods.cross_entropy(log_probs, batch[1], 0.1),
            has_aux=True,
        )
        (value, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
            params, (images, labels), state
        )
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        want = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        assert_close(got.params, want)
        assert got.model_state["batches"].tolist() == [1, 1]
        each = [network.apply({"kernel": w}, {}, images)[0] for w in want["kernel"]]
        want = jax.nn.log_softmax(jnp.stack(each))
        assert_close(method.predict(got, images), want)

    def test_the_dropout_of_a_joint_model_is_the_highest(self):
        networks = Linear(0.25), Linear(0.5), Linear()
        assert members.JointModel(networks, 3).dropout == 0.5

    @pytest.mark.slow
    def test_stacked_and_tuple_joint_models_agree(self):
        network = models.create("cnn_small", 10)
        one = members.JointModel((network,), 3)
        several = members.JointModel((network,) * 3, 3)
        images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
        params, state = one.init(jax.random.key(0), images)
        params_, state_ = several.init(jax.random.key(0), images)
        got, _ = one.apply(params, state, images, train=True)
        want, _ = several.apply(params_, state_, images, train=True)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(jnp.sum(jnp.exp(got), axis=1), 1.0, rtol=1e-5)


def test_parameters_that_are_a_tuple_are_not_stacked():
    """They would be taken for members: the first layers of both models for one."""
    one = jnp.ones((3, 3)), jnp.zeros((3, 3))
    with pytest.raises(TypeError, match="must not be a tuple.*use a list"):
        ensemble.stack([one, one])
    members = ensemble.stack([list(one), list(one)])
    assert ensemble.count_members(members) == 2
    assert [x.shape for x in members] == [(2, 3, 3)] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: ensemble.per_member(optax.adam(0.1)),
        lambda: optax.chain(
            ensemble.dual(toy.regression, 0.1), ensemble.per_member(optax.adam(0.1))
        ),
    ],
)
def test_optax_finds_what_has_the_shape_of_members_in_a_state(make):
    stacked, _, _ = five()
    tx = make()
    state = tx.init(stacked)
    found = optax.tree.map_params(
        tx, lambda x: "mine", state, transform_non_params=lambda x: None
    )
    kept = jax.tree.leaves(found)
    assert kept == ["mine"] * 2 * len(jax.tree.leaves(stacked))


class TestPerMember:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: optax.clip_by_global_norm(0.1),
            lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
            lambda: optax.inject_hyperparams(optax.sgd)(
                optax.linear_schedule(1.0, 0.0, 10), momentum=0.9
            ),
            lambda: optax.apply_if_finite(optax.sgd(0.1), 5),
            lambda: optax.lamb(1e-2),
        ],
        ids=["clip", "chain", "injected", "finite", "lamb"],
    )
    @pytest.mark.parametrize("as_tuple", [False, True])
    def test_each_member_has_what_it_had_alone(self, make, as_tuple):
        stacked, each, _ = five()
        grads = [
            jax.tree.map(lambda x, m=m: (m + 1.0) * x, p) for m, p in enumerate(each)
        ]
        grads[2] = jax.tree.map(lambda x: x * jnp.nan, grads[2])  # one diverges
        tx, lifted = make(), ensemble.per_member(make())
        params = tuple(each) if as_tuple else stacked
        updates = (
            tuple(grads) if as_tuple else jax.tree.map(lambda *x: jnp.stack(x), *grads)
        )
        state = lifted.init(params)
        states = [tx.init(p) for p in each]
        for _ in range(3):
            got, state = jax.jit(lifted.update)(updates, state, params)
            for m in range(5):
                want, states[m] = tx.update(grads[m], states[m], each[m])
                mine = got[m] if as_tuple else jax.tree.map(lambda x, m=m: x[m], got)
                assert_close(mine, want)
        counts = optax.tree.get_all_with_path(state, "notfinite_count")
        if counts and not as_tuple:
            assert counts[0][1].tolist() == [0, 0, 3, 0, 0]

    @pytest.mark.parametrize("empty", ["partition", "masked"])
    def test_a_group_may_have_no_parameters(self, empty):
        """As that of the biases of members that have none."""
        members, alone = {"k": jnp.arange(6.0).reshape(3, 2)}, optax.adam(0.1)
        lifted = ensemble.per_member(alone)
        if empty == "masked":
            tx = optax.chain(optax.masked(lifted, {"k": False}), lifted)
        else:
            tx = optax.partition({"a": lifted, "b": lifted}, {"k": "a"})
        state, states = tx.init(members), [alone.init({"k": x}) for x in members["k"]]
        for _ in range(2):
            got, state = tx.update(members, state, members)
            for m, x in enumerate(members["k"]):
                want, states[m] = alone.update({"k": x}, states[m])
                assert_close(got["k"][m], want["k"])

    def test_injected_hyperparameters_may_differ(self):
        tx = ensemble.per_member(optax.inject_hyperparams(optax.sgd)(1.0))
        grads = jnp.ones((2, 3))
        state = tx.init(grads)
        state.hyperparams["learning_rate"] = jnp.array([0.1, 0.2])
        updates, _ = tx.update(grads, state)
        np.testing.assert_allclose(updates, [[-0.1] * 3, [-0.2] * 3])

    def test_values_are_per_member(self):
        """One member's loss stops falling: its rate falls, the other's does not."""
        one = optax.contrib.reduce_on_plateau(0.1, patience=3)
        tx, grads = ensemble.per_member(one), jnp.ones((2, 3))
        state, alone = tx.init(grads), one.init(grads[0])
        for step in range(6):
            values = jnp.array([1.0, 1.0 / (step + 1)])
            updates, state = tx.update(grads, state, value=values)
            want, alone = one.update(grads[0], alone, value=values[0])
        assert want[0] < 1.0
        np.testing.assert_array_equal(updates, [want, grads[1]])

    @pytest.mark.slow
    def test_robust_transformations_climb_on_their_own(self, key):
        stacked, each, data = five()
        alike = jax.tree.map(lambda x: jnp.stack([x] * 3), each[0])
        tx = ensemble.per_member(
            optax.chain(otmdr_jax.otmdr(toy.regression, key, rho=RHO), optax.sgd(0.1))
        )
        state = tx.init(alike)
        updates, state = jax.jit(lambda s: tx.update(alike, s, alike, batch=data))(
            state
        )
        values = optax.tree.get(state, "diagnostics").robust_loss
        assert len(set(values.tolist())) == 3
        # Each is the transformation with its own key.
        own = jax.random.fold_in(key, 1)
        one = otmdr_jax.otmdr(toy.regression, own, rho=RHO)
        want, _ = one.update(each[0], one.init(each[0]), each[0], batch=data)
        got = jax.tree.map(lambda x: x[1], updates)
        assert_close(got, jax.tree.map(lambda g: -0.1 * g, want))


class TestLift:
    """Members take the steps of runs of their own."""

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls):
        images = jax.random.normal(jax.random.key(5), (16, 8, 8, 1))
        return images, jnp.arange(16) % 10

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "how"),
        [*(("otmdr", how) for how in MAPS), ("sgd", "scan"), ("sam", "scan")],
    )
    def test_independent_training_is_single_runs(
        self, name, how, data, one_layer, users_fusions
    ):
        """Scanned: to the bit, network and optimizer; unrolled or vmap: to rounding."""
        model = models.create(one_layer, 10)
        optimizer = optax.chain(
            optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)
        )
        options = {"noise_std": 0.01} if name == "otmdr" else {}
        one = methods.create(name, model, optimizer, **options)
        together = members.lift(one, 3, how)
        keys = jax.random.split(jax.random.key(0), 3)
        state = together.init(jax.random.key(0), data[0])
        exact = how == "scan"
        fusions = users_fusions if exact else {}
        step, single = (jax.jit(x.step, **fusions) for x in (together, one))
        alone = [one.init(k, data[0]) for k in keys]
        assert_same(members.separate(state), alone)
        for _ in range(3):
            state, metrics = step(state, data)
            found = [single(s, data) for s in alone]
            alone = [s for s, _ in found]
        compare = assert_same if exact else assert_close
        for got, want in zip(members.separate(state), alone, strict=True):
            assert_same(got.key, want.key)
            for part in ("params", "model_state", "opt_state", "step", "skipped"):
                compare(getattr(got, part), getattr(want, part))
        losses = [float(m["loss"]) for _, m in found]
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)

    @pytest.mark.slow
    def test_a_member_that_diverges_does_not_stop_the_rest(self, data):
        one = methods.create("sgd", models.create("cnn_small", 10), optax.sgd(0.1))
        together = members.lift(one, 2)
        state = together.init(jax.random.key(0), data[0])
        poison = jax.tree.map(lambda x: x.at[1].set(jnp.nan), state.params)
        state = state._replace(params=poison)
        new, metrics = jax.jit(together.step)(state, data)
        assert metrics["skipped_in_row"].tolist() == [0, 1]
        kernel = new.params["head"]["kernel"]
        assert np.isfinite(kernel[0]).all()
        assert (kernel[0] != state.params["head"]["kernel"][0]).any()

    @pytest.mark.slow
    def test_different_architectures(self, data):
        networks = models.create("cnn_small", 10), models.create("wide_resnet_10_1", 10)
        each = [methods.create("sgd", m, optax.sgd(0.1)) for m in networks]
        together = members.lift(each)
        state = together.init(jax.random.key(0), data[0])
        new, metrics = jax.jit(together.step)(state, data)
        keys = jax.random.split(jax.random.key(0), 2)
        for m, method in enumerate(each):
            want, _ = jax.jit(method.step)(method.init(keys[m], data[0]), data)
            assert_close(new[m].params, want.params, rtol=1e-4, atol=1e-5)
        assert metrics["loss"].shape == (2,)
        assert together.predict(new, data[0]).shape == (2, 16, 10)
        assert members.steps_taken(new) == 1

    def test_count_or_several(self):
        one = methods.create("sgd", models.create("cnn_small", 10), optax.sgd(0.1))
        for given in ((one, None), ([one, one], 2), (one, 0)):
            with pytest.raises(ValueError, match="one method and the number"):
                members.lift(*given)


class TestPrediction:
    @pytest.mark.slow
    @hypothesis.given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 6))
    @hypothesis.settings(max_examples=20, deadline=None)
    def test_the_mean_probability(self, count, examples, classes):
        rng = np.random.default_rng(count)
        logits = rng.normal(size=(count, examples, classes)) * 5
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        got = ensemble.log_mean_probs(jnp.log(jnp.asarray(p, jnp.float32)))
        np.testing.assert_allclose(np.exp(got), p.mean(0), rtol=1e-4, atol=1e-7)

    def test_where_probabilities_underflow(self):
        log_probs = jnp.array([[-500.0, 0.0], [-510.0, 0.0]])
        got = ensemble.log_mean_probs(log_probs)
        np.testing.assert_allclose(got[0], -500 + np.log1p(np.exp(-10.0)) - np.log(2))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_of_equal_members_it_is_theirs_to_the_bit(self, dtype):
        one = jnp.log(jnp.array([0.9, 0.09, 0.01])).astype(dtype)
        for count in (2, 30, 100):
            got = ensemble.log_mean_probs(jnp.tile(one, (count, 1)))
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, one)


class TestDiversity:
    @pytest.fixture
    def found(self):
        rng = np.random.default_rng(3)
        p = rng.dirichlet(np.ones(5), size=(4, 50))  # (members, examples, classes)
        labels = rng.integers(0, 5, 50)
        return p, labels

    def test_against_loops(self, found):
        p, labels = found
        got = diversity.evaluate(np.log(p), labels)
        pairs, kl = [], []
        for i in range(4):
            for j in range(4):
                if i != j:
                    pairs.append(np.mean(p[i].argmax(1) != p[j].argmax(1)))
                    kl.append(np.mean((p[i] * np.log(p[i] / p[j])).sum(1)))
        np.testing.assert_allclose(got["disagreement"], np.mean(pairs))
        np.testing.assert_allclose(got["pairwise_kl"], np.mean(kl))

    def test_ambiguity_is_what_the_mean_gains(self, found):
        from sklearn.metrics import log_loss

        p, labels = found
        mean = p.mean(0)
        nll = [log_loss(labels, q, labels=range(5)) for q in p]
        gain = np.mean(nll) - log_loss(labels, mean, labels=range(5))
        np.testing.assert_allclose(diversity.nll_ambiguity(np.log(p), labels), gain)
        onehot = np.eye(5)[labels]
        brier = np.mean(((p - onehot) ** 2).sum(-1))
        gain = brier - np.mean(((mean - onehot) ** 2).sum(-1))
        np.testing.assert_allclose(diversity.brier_ambiguity(np.log(p)), gain)

    def test_members_that_are_one_have_none(self, found):
        p, labels = found
        same = np.log(np.stack([p[0]] * 3))
        got = diversity.evaluate(same, labels)
        np.testing.assert_allclose(list(got.values()), 0.0, atol=1e-15)

    def test_impossible_classes(self):
        log_probs = np.array([[[0.0, -np.inf]], [[np.log(0.5)] * 2]])
        assert diversity.pairwise_kl(log_probs) == np.inf
        with pytest.raises(ValueError, match="at least two members"):
            diversity.disagreement(log_probs[:1])
        both = np.array([[[-np.inf, 0.0]], [[-np.inf, 0.0]]])
        assert list(diversity.evaluate(both, [0]).values()) == [0.0] * 4
        assert diversity.nll_ambiguity(log_probs, [1]) == np.inf
        mixed = np.concatenate([both, log_probs[[1, 1]]], axis=1)  # two examples
        assert diversity.nll_ambiguity(mixed, [0, 0]) == 0.0

    def test_a_class_that_underflows_for_one_and_is_impossible_for_another(self):
        log_probs = np.array([[[0.0, -800.0]], [[0.0, -np.inf]]])
        assert diversity.pairwise_kl(log_probs) == np.inf

    def test_labels_whose_probabilities_underflow(self):
        log_probs = np.array([[[0.0, -800.0]], [[0.0, -802.0]]])
        want = np.log(np.cosh(1.0))  # of x - 1 and x + 1, whatever x
        np.testing.assert_allclose(diversity.nll_ambiguity(log_probs, [1]), want)

    def test_what_is_no_distribution_and_labels_that_are_none_are_refused(self, found):
        p, labels = found
        bad = np.log(p)
        bad[2, 7] += 1.0
        for name in ("disagreement", "pairwise_kl", "brier_ambiguity"):
            with pytest.raises(ValueError, match="row 7 of member 2 sum to 2.718"):
                getattr(diversity, name)(bad)
        with pytest.raises(TypeError, match="real numbers"):
            diversity.disagreement(np.log(p) + 0j)
        for wrong in (labels - 1, labels[:-1]):
            with pytest.raises(ValueError, match="labels"):
                diversity.nll_ambiguity(np.log(p), wrong)


class TestEach:
    @pytest.mark.parametrize("how", [*MAPS, "auto"])
    def test_maps_agree_and_none_stays_none(self, how):
        def member(wait, x, nothing, key):
            assert nothing is None
            return {"y": wait(x) + jax.random.normal(key)}

        keys = jax.random.split(jax.random.key(0), 3)
        got = jax.jit(lambda: loops.each(member, (jnp.arange(3.0), None, keys), how))()
        want = [i + float(jax.random.normal(k)) for i, k in enumerate(keys)]
        np.testing.assert_allclose(got["y"], want, rtol=1e-6)
