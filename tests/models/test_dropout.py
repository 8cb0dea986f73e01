"""Dropout in networks and methods, and MC dropout, against masks drawn in NumPy."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from otmdr_jax import baselines, ensemble, models, parallel
from otmdr_jax.baselines.mc_dropout import _STREAM
from otmdr_jax.experiments import (
    building,
    cli,
    members,
    methods,
    programs,
    report,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import cost, evaluation
from otmdr_jax.models.dropout import Dropout, checked_keys, kept_levels
from tests.experiments.test_training import assert_same_bits
from tests.sets import small_digits
from tests.zoo import (
    as_float32,
    draw,
    equations,
    np_conv,
    np_head,
    np_norm,
    np_relu,
    shapes,
)

# Each family, and at how many places it drops.
PLACES = {
    "cnn_small": 2,
    "resnet_10": 4,
    "wide_resnet_10_1": 3,
    "pyramidnet_11_a9": 6,
    "densenet_121": 2 * 3 + 1,
    "mobilenet": 1,
    "efficientnet_b0": 1,
}
# Few blocks are enough: deep networks take seconds to trace.
FEW = {"densenet_121": (2, 1), "efficientnet_b0": (1, 0, 0, 0, 0, 0, 0)}
RATE = 0.3


def network(name, num_classes=5, **options):
    """A network of a family, of few blocks."""
    model = models.create(name, num_classes, **options)
    if name not in FEW:
        return model
    own = dict(model.options, stage_sizes=FEW[name], stem="cifar")
    return dataclasses.replace(model, options=tuple(sorted(own.items())))


def np_mask(key, site, shape, rate):
    """What a site keeps of one example, over the share kept: of the key's bits."""
    count = math.prod(shape)
    words = jax.random.bits(
        jax.random.fold_in(key, site), ((count + 1) // 2,), jnp.uint32
    )
    halves = np.asarray(words).view(np.uint16)[:count]
    kept = halves < round((1 - rate) * 2**16)
    return kept.reshape(shape) / (1 - rate)


def np_masks(keys, site, shape, rate):
    return np.stack([np_mask(key, site, shape, rate) for key in keys])


class TestMasks:
    @pytest.mark.slow
    @settings(max_examples=20, deadline=None)
    @given(
        rate=st.floats(0.0, 0.95),
        count=st.integers(1, 7),
        side=st.integers(1, 9),
        site=st.integers(0, 200),
        seed=st.integers(0, 2**31),
    )
    def test_are_those_of_numpy(self, rate, count, side, site, seed):
        x = np.random.default_rng(seed).normal(size=(count, side, 3)).astype(np.float32)
        keys = jax.random.split(jax.random.key(seed), count)
        got = Dropout(rate, site)(jnp.asarray(x), keys)
        want = x * np_masks(keys, site, (side, 3), rate) if rate else x
        assert_allclose(got, want, rtol=2e-3 if rate > 0.5 else 1e-4)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_keep_a_share_and_the_mean(self, dtype):
        """Of N entries N (1 - p) +- 4 sqrt(N p (1 - p)), each times 1 / (1 - p)."""
        keys = jax.random.split(jax.random.key(1), 64)
        y = np.asarray(Dropout(RATE, 0)(jnp.ones((64, 501), dtype), keys))
        assert y.dtype == dtype
        kept = y != 0
        count, error = kept.size, math.sqrt(kept.size * RATE * (1 - RATE))
        assert abs(kept.sum() - count * (1 - RATE)) < 4 * error
        # Every place and every example at its own.
        for axis, size in ((0, 64), (1, 501)):
            shares = kept.mean(axis=axis)
            spread = math.sqrt(RATE * (1 - RATE) / size)
            assert abs(np.std(shares) / spread - 1) < 0.35
        assert_allclose(y[kept].astype(np.float64), 1 / (1 - RATE), rtol=4e-3)
        wide = np.asarray(Dropout(RATE, 0)(jnp.ones((64, 501)), keys))
        assert_array_equal(kept, wide != 0)  # whatever the dtype

    def test_scaling_keeps_the_mean_at_any_rate(self):
        for rate in (1e-7, 0.1, 1 / 3, 0.99999, 1 - 1e-7):
            levels = kept_levels(rate)
            assert 0 < levels < 2**16
            assert abs(levels / 2**16 - (1 - rate)) <= 2**-16

    def test_places_and_examples_have_their_own(self):
        keys = jax.random.split(jax.random.key(0), 2)
        x = jnp.ones((2, 400))
        first, second = (np.asarray(Dropout(0.5, site)(x, keys)) for site in (0, 1))
        for a, b in ((first, second), (first[0], first[1])):
            assert abs(np.mean((a != 0) == (b != 0)) - 0.5) < 0.15

    @pytest.mark.slow
    def test_do_not_depend_on_the_generator_of_the_keys(self):
        """Those of "rbg" are not the same in a batch as alone."""
        keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
        x, layer = jnp.ones((3, 40)), Dropout(0.5, 0)
        whole = layer(x, checked_keys(keys, 3))
        each = [layer(x[:1], checked_keys(keys[i : i + 1], 1)) for i in range(3)]
        assert_array_equal(whole, jnp.concatenate(each))


class TestNetworks:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", PLACES)
    def test_without_keys_they_are_the_networks_without_dropout(self, name):
        """The same programs, and so the same bits, parameters and initial weights."""
        plain, drops = (network(name, dropout=rate) for rate in (0.0, RATE))
        assert plain == network(name) != drops
        images = jnp.zeros((2, 32, 32, 3))
        trees = shapes(plain, images.shape)
        assert trees == shapes(drops, images.shape)
        keys = jax.random.split(jax.random.key(0), 2)

        def program(model, **options):
            return jax.make_jaxpr(lambda *args: model.apply(*args, **options))(
                *trees, images
            ).jaxpr

        jaxpr = program(drops, train=True, keys=keys)
        assert len(list(equations(jaxpr, "random_bits"))) == PLACES[name]
        module = nnx.eval_shape(lambda: drops.module_fn(3, nnx.Rngs(0)))
        sites = [m.site for _, m in nnx.iter_modules(module) if isinstance(m, Dropout)]
        assert sorted(sites) == list(range(PLACES[name]))
        assert str(program(plain, train=False)) == str(program(drops, train=False))
        without = program(plain, train=True)
        assert str(without) == str(program(plain, train=True, keys=keys))
        inits = [
            str(jax.make_jaxpr(lambda key, m=m: m.init(key, images))(keys[0]))
            for m in (plain, drops)
        ]
        assert inits[0] == inits[1]

    @pytest.mark.slow
    @pytest.mark.parametrize("train", [True, False])
    def test_the_small_network_drops_where_numpy_does(self, train):
        model = models.create("cnn_small", 5, dropout=RATE)
        params, state, x = draw(model, (4, 8, 8, 1))
        keys = jax.random.split(jax.random.key(3), 4)
        got = model.apply(
            *as_float32((params, state, x)), train=train, keys=jax.random.key_data(keys)
        )
        moved = {}
        for i, stride in ((1, 1), (2, 2), (3, 1)):
            if i > 1:
                x = x * np_masks(keys, i - 2, x.shape[1:], RATE)
            x = np_conv(x, params[f"conv{i}"]["kernel"], stride)
            norm = f"norm{i}"
            x, moved[norm] = np_norm(x, params[norm], state[norm], train)
            x = np_relu(x)
        assert_allclose(got[0], np_head(x, params["head"]), rtol=2e-4, atol=2e-4)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4), got[1], moved)

    @pytest.mark.slow
    def test_the_wide_one_drops_between_its_convolutions(self):
        model = models.create("wide_resnet_10_1", 5, dropout=RATE)
        params, state, x = draw(model, (3, 8, 8, 3))
        keys = jax.random.split(jax.random.key(3), 3)
        got, _ = jax.jit(lambda *args: model.apply(*args, train=True, keys=keys))(
            *as_float32((params, state, x))
        )
        x = np_conv(x, params["stem"]["kernel"])
        for i, stride in enumerate((1, 2, 2)):
            p, s = (t[f"stage{i + 1}_block1"] for t in (params, state))
            h = np_relu(np_norm(x, p["norm1"], s["norm1"], True)[0])
            y = np_conv(h, p["conv1"]["kernel"], stride)
            y = np_relu(np_norm(y, p["norm2"], s["norm2"], True)[0])
            y = np_conv(y * np_masks(keys, i, y.shape[1:], RATE), p["conv2"]["kernel"])
            if "shortcut" in p:
                x = np_conv(h, p["shortcut"]["kernel"], stride)
            x = x + y
        x = np_relu(np_norm(x, params["norm"], state["norm"], True)[0])
        assert_allclose(got, np_head(x, params["head"]), rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_the_dense_one_drops_after_its_convolutions(self):
        model = network("densenet_121", dropout=RATE)
        params, state, x = draw(model, (3, 4, 4, 3))
        keys = jax.random.split(jax.random.key(3), 3)
        got, _ = jax.jit(lambda *args: model.apply(*args, train=True, keys=keys))(
            *as_float32((params, state, x))
        )

        def activated(x, p, s):
            return np_relu(np_norm(x, p, s, True)[0])

        def layer(x, name, site):
            p, s = params[name], state[name]
            y = np_conv(activated(x, p["norm1"], s["norm1"]), p["conv1"]["kernel"])
            y = activated(y * masks(y, site), p["norm2"], s["norm2"])
            y = np_conv(y, p["conv2"]["kernel"])
            return np.concatenate([x, y * masks(y, site + 1)], axis=-1)

        def masks(y, site):
            return np_masks(keys, site, y.shape[1:], RATE)

        x = np_conv(x, params["stem"]["kernel"])
        x = activated(x, params["stem_norm"], state["stem_norm"])
        x = layer(layer(x, "stage1_layer1", 0), "stage1_layer2", 2)
        p, s = params["transition1"], state["transition1"]
        x = np_conv(activated(x, p["norm"], s["norm"]), p["conv"]["kernel"])
        x = x * masks(x, 4)
        x = x.reshape(3, 2, 2, 2, 2, -1).mean(axis=(2, 4))
        x = activated(layer(x, "stage2_layer1", 5), params["norm"], state["norm"])
        assert_allclose(got, np_head(x, params["head"]), rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_a_basic_block_drops_between_its_convolutions(self):
        model = models.create("resnet_10", 5, dropout=RATE)
        own = dict(model.options, stage_sizes=(1,))
        model = dataclasses.replace(model, options=tuple(sorted(own.items())))
        params, state, x = draw(model, (3, 4, 4, 3))
        keys = jax.random.split(jax.random.key(3), 3)
        got, _ = model.apply(*as_float32((params, state, x)), train=True, keys=keys)
        p, s = params["stage1_block1"], state["stage1_block1"]
        x = np_conv(x, params["stem"]["kernel"])
        x = np_relu(np_norm(x, params["stem_norm"], state["stem_norm"], True)[0])
        y = np_conv(x, p["conv1"]["kernel"])
        y = np_relu(np_norm(y, p["norm1"], s["norm1"], True)[0])
        y = np_conv(y * np_masks(keys, 0, y.shape[1:], RATE), p["conv2"]["kernel"])
        y = np_relu(np_norm(y, p["norm2"], s["norm2"], True)[0] + x)
        assert_allclose(got, np_head(y, params["head"]), rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_efficientnet_drops_what_its_classifier_reads(self):
        """With the identity as classifier, logits are what it reads."""
        model = network("efficientnet_b0", num_classes=16, dropout=RATE)
        params, state, x = as_float32(draw(model, (3, 4, 4, 3)))
        params["head"] = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
        keys = jax.random.split(jax.random.key(3), 3)
        apply = jax.jit(lambda keys: model.apply(params, state, x, train=False,
                                                 keys=keys)[0])  # fmt: skip
        want = np.asarray(apply(None)) * np_masks(keys, 0, (16,), RATE)
        assert_allclose(apply(keys), want, rtol=1e-4, atol=1e-6)

    @pytest.mark.slow
    def test_masks_travel_with_their_examples(self):
        """Any subset in any order, one by one or under vmap, jit and scan."""
        model = models.create("cnn_small", 5, dropout=RATE)
        params, state, images = as_float32(draw(model, (6, 8, 8, 1)))
        keys = jax.random.split(jax.random.key(0), 6)

        @jax.jit
        def logits(images, keys):
            return model.apply(params, state, images, train=False, keys=keys)[0]

        whole = logits(images, keys)
        rows = np.array([4, 1, 3])
        assert_allclose(logits(images[rows], keys[rows]), whole[rows], atol=1e-5)
        each = jax.vmap(logits)(images[:, None], keys[:, None])[:, 0]
        assert_allclose(each, whole, atol=1e-5)
        _, each = jax.lax.scan(
            lambda c, x: (c, logits(x[0][None], x[1][None])[0]), None, (images, keys)
        )
        assert_allclose(each, whole, atol=1e-5)
        # One key is that key for all; raw keys are their typed ones.
        one = logits(images, keys[2])
        assert_array_equal(one, logits(images, jnp.stack([keys[2]] * 6)))
        assert_array_equal(whole, logits(images, jax.random.key_data(keys)))
        assert not np.allclose(one, whole)

    @pytest.mark.slow
    def test_a_block_that_is_computed_again_drops_the_same(self):
        found = []
        for remat in (False, True):
            model = models.create("cnn_small", 5, dropout=RATE, remat=remat)
            params, state, images = as_float32(draw(model, (4, 8, 8, 1)))
            keys = jax.random.split(jax.random.key(0), 4)

            def loss(params, model=model, state=state, images=images, keys=keys):
                logits, moved = model.apply(
                    params, state, images, train=True, keys=keys
                )
                return jnp.mean(logits**2), moved

            found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)

    @pytest.mark.parametrize(
        ("keys", "error", "message"),
        [
            (None, ValueError, "needs keys to train"),
            (jax.random.split(jax.random.key(0), 3), ValueError, "each of the 2 exam"),
            (jnp.zeros((2, 3), jnp.uint32), ValueError, "two words, or four"),
            (jnp.zeros((2, 2)), TypeError, "got an array of float32"),
            (0, TypeError, "got int"),
        ],
    )
    def test_keys_that_are_none(self, keys, error, message):
        model = models.create("cnn_small", 5, dropout=RATE)
        params, state = (as_float32(t) for t in draw(model, (2, 8, 8, 1))[:2])
        with pytest.raises(error, match=message):
            model.apply(params, state, jnp.zeros((2, 8, 8, 1)), train=True, keys=keys)

    @pytest.mark.parametrize(
        ("rate", "error"),
        [(1.0, ValueError), (-0.1, ValueError), (math.nan, ValueError),
         ("0.1", TypeError), (True, TypeError)],
    )  # fmt: skip
    def test_rates_that_are_none(self, rate, error):
        with pytest.raises(error, match="dropout must be"):
            models.create("cnn_small", 10, dropout=rate)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Softmax regression that drops inputs: NumPy does the same in a few lines."""

    dropout: float = RATE

    def init(self, key, images):
        size = images[0].size
        return {"kernel": jax.random.normal(key, (size, 3))}, {}

    def apply(self, params, state, images, *, train, keys=None):
        x = Dropout(self.dropout, 0)(images.reshape(len(images), -1), keys)
        return x @ params["kernel"], state


IMAGES = jax.random.normal(jax.random.key(7), (12, 2, 2, 2))
LABELS = jnp.arange(12) % 3


def np_gradient(w, x, labels):
    logits = x @ w
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return x.T @ (p - np.eye(3)[labels]) / len(x)


def np_robust_gradient(w, x, labels, parts, rho):
    """Eq. 9 with one climb on each part; each row of x dropped once and for all."""
    at = w
    for rows, radius in zip(parts, rho, strict=True):
        g = np_gradient(at, x[rows], labels[rows])
        at = at + radius * g / np.linalg.norm(g)
    return np_gradient(at, x, labels)


ALL = np.arange(12)


class TestRobustGradients:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "options", "parts", "rho"),
        [
            ("sgd", {}, [], ()),
            ("sgd", dict(microbatch_size=5), [], ()),
            ("sam", dict(rho=0.5), [ALL], (0.5,)),
            ("sam", dict(rho=(0.3, 0.4), microbatch_size=5), [ALL] * 2, (0.3, 0.4)),
            ("otmdr", dict(split="ordered", rho=(0.3, 0.4)), [ALL[:6], ALL[6:]],
             (0.3, 0.4)),
        ],
    )  # fmt: skip
    def test_all_passes_see_one_mask(self, name, options, parts, rho):
        method = methods.create(name, Softmax(), optax.sgd(1.0), **options)
        state = method.init(jax.random.key(0), IMAGES)
        after, _ = jax.jit(method.step)(state, (IMAGES, LABELS))
        _, step_key = jax.random.split(state.key)
        keys = baselines.example_keys(step_key, 12)
        x = np.asarray(IMAGES, np.float64).reshape(12, -1)
        x = x * np_masks(keys, 0, (8,), RATE)
        w = np.asarray(state.params["kernel"], np.float64)
        want = w - np_robust_gradient(w, x, np.asarray(LABELS), parts, rho)
        assert_allclose(after.params["kernel"], want, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_sub_batches_climb_with_the_masks_of_their_examples(self):
        method = methods.create(
            "sam", Softmax(), optax.sgd(1.0), rho=0.5, num_subbatches=3
        )
        state = method.init(jax.random.key(0), IMAGES)
        after, _ = method.step(state, (IMAGES, LABELS))
        keys = baselines.example_keys(jax.random.split(state.key)[1], 12)
        x = np.asarray(IMAGES, np.float64).reshape(12, -1)
        x, w = x * np_masks(keys, 0, (8,), RATE), np.asarray(state.params["kernel"])
        each = [
            np_robust_gradient(w, x[rows], np.asarray(LABELS)[rows], [ALL[:4]], [0.5])
            for rows in np.split(ALL, 3)
        ]
        assert_allclose(
            after.params["kernel"], w - np.mean(each, axis=0), rtol=1e-4, atol=1e-5
        )

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options", [dict(particle_map="scan"), dict(particle_map="vmap"),
                    dict(microbatch_size=4), dict(microbatch_size=5)]
    )  # fmt: skip
    def test_how_it_is_computed_changes_nothing(self, options):
        def run(**options):
            method = methods.create(
                "otmdr", Softmax(), optax.sgd(1.0), num_particles=3, **options
            )
            state = method.init(jax.random.key(0), IMAGES)
            return method.step(state, (IMAGES, LABELS))[0].params["kernel"]

        assert_allclose(run(**options), run(), rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["sgd", "sam"])
    def test_two_devices_drop_what_one_does(self, name):
        def run(devices):
            own = {} if devices == 1 else {"axis_name": "data"}
            method = methods.create(name, Softmax(), optax.sgd(1.0), **own)
            state = method.init(jax.random.key(0), IMAGES)
            step = jax.jit(method.step)
            if devices > 1:
                mesh = parallel.make_mesh(f"data={devices}")
                step = parallel.shard_map_step(method.step, mesh, metrics_spec=None)
            for _ in range(2):
                state, _ = step(state, (IMAGES, LABELS))
            return state.params["kernel"]

        assert_allclose(run(2), run(1), rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_pmap_too(self):
        method = methods.create("sam", Softmax(), optax.sgd(1.0), axis_name="data")
        state = method.init(jax.random.key(0), IMAGES)
        step = parallel.pmap_step(method.step, devices=jax.devices()[:2])
        after, _ = step(state, (IMAGES, LABELS))
        one = methods.create("sam", Softmax(), optax.sgd(1.0))
        state = one.init(jax.random.key(0), IMAGES)
        want, _ = one.step(state, (IMAGES, LABELS))
        assert_allclose(
            after.params["kernel"], want.params["kernel"], rtol=1e-5, atol=1e-6
        )

    @pytest.mark.slow
    def test_steps_differ_and_other_draws_do_not(self):
        """At a radius of 0 the particles of a random split are the center."""
        drops, plain = (
            methods.create("otmdr", Softmax(rate), optax.sgd(0.0), noise_std=0.1)
            for rate in (RATE, 0.0)
        )
        states = [m.init(jax.random.key(0), IMAGES) for m in (drops, plain)]
        for _ in range(2):
            found = [
                m.step(s, (IMAGES, LABELS))
                for m, s in zip((drops, plain), states, strict=True)
            ]
            before = states[0].key
            states = [state for state, _ in found]
            assert (states[0].key == states[1].key).all()
            a, b = (
                baselines.example_keys(jax.random.split(key)[1], 12)
                for key in (before, states[0].key)
            )
            assert not (a == b).any()

    def test_keys_of_a_step_are_those_of_no_split(self):
        key = jax.random.key(0)
        data = jax.random.key_data
        taken = {tuple(k) for k in np.asarray(data(jax.random.split(key, 1000)))}
        # fold_in(key, 1) is among them: the stream's number must be far away.
        root = jax.random.fold_in(key, _STREAM)
        assert tuple(np.asarray(data(root))) not in taken
        assert tuple(np.asarray(data(jax.random.fold_in(key, 1)))) in taken
        mine = {tuple(k) for k in np.asarray(data(baselines.example_keys(key, 1000)))}
        assert len(mine) == 1000 and not mine & taken


def test_expected_loss_is_a_ridge_penalty():
    """Srivastava et al., section 9.1; Wager et al., 2013: of least squares

    E |y - (m x / (1 - p)) w|^2 = |y - X w|^2 + p / (1 - p) sum_j w_j^2 |X_j|^2.
    """
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(20, 6)), rng.normal(size=20), rng.normal(size=6)
    layer, draws = Dropout(RATE, 0), 4000

    @jax.vmap
    def loss(key):
        keys = jax.random.split(key, 20)
        dropped = layer(jnp.asarray(x, jnp.float32), keys)
        return jnp.sum((jnp.asarray(y, jnp.float32) - dropped @ w.astype("f4")) ** 2)

    found = np.asarray(jax.jit(loss)(jax.random.split(jax.random.key(0), draws)))
    penalty = RATE / (1 - RATE) * np.sum(w**2 * np.sum(x**2, axis=0))
    want = np.sum((y - x @ w) ** 2) + penalty
    error = np.std(found) / math.sqrt(draws)
    assert penalty > 50 * error
    assert abs(np.mean(found) - want) < 4 * error


class TestMonteCarlo:
    def method(self, model=None, **options):
        return methods.create(
            "mc-dropout", model or Softmax(), optax.sgd(0.5), **options
        )

    @pytest.mark.slow
    def test_predicts_with_draws_of_masks(self):
        method = self.method(num_samples=7)
        state = method.init(jax.random.key(0), IMAGES)
        state, _ = method.step(state, (IMAGES, LABELS))
        got = jax.jit(method.predict)(state, IMAGES)
        key = jax.random.split(state.key, 3)[2]
        x = np.asarray(IMAGES, np.float64).reshape(12, -1)
        w = np.asarray(state.params["kernel"], np.float64)
        probs = []
        for sample in jax.random.split(key, 7):  # one mask for all examples
            logits = (x * np_mask(sample, 0, (8,), RATE)[None]) @ w
            p = np.exp(logits)
            probs.append(p / p.sum(axis=1, keepdims=True))
        assert_allclose(np.exp(got), probs, rtol=1e-3, atol=1e-5)
        assert_allclose(
            np.exp(ensemble.log_mean_probs(got)), np.mean(probs, axis=0), rtol=1e-3,
            atol=1e-5,
        )  # fmt: skip
        assert np.std(probs, axis=0).max() > 0.05

    def test_of_a_regression_it_predicts_outputs(self):
        """Their mean over masks is the output without dropout: the net is linear."""
        method = self.method(
            num_samples=400, classes=False, loss=lambda z, y: jnp.sum((z - y) ** 2, -1)
        )
        state = method.init(jax.random.key(0), IMAGES)
        got = jax.jit(method.predict)(state, IMAGES)
        want = np.asarray(IMAGES).reshape(12, -1) @ np.asarray(state.params["kernel"])
        error = np.std(got, axis=0) / 20
        assert np.all(np.abs(np.mean(got, axis=0) - want) < 5 * error + 1e-6)
        assert np.std(want) > 1

    @pytest.mark.slow
    def test_no_prediction_depends_on_its_batch(self):
        method = self.method(num_samples=3)
        state = method.init(jax.random.key(0), IMAGES)
        whole = method.predict(state, IMAGES)
        for rows in (ALL[:5], ALL[5:], ALL[::-1]):
            got = method.predict(state, IMAGES[rows])
            assert_allclose(got, whole[:, rows], rtol=1e-5, atol=1e-6)

    def test_the_mean_is_the_network_without_dropout(self):
        method = self.method(mean_only=True)
        state = method.init(jax.random.key(0), IMAGES)
        x = IMAGES.reshape(12, -1)
        want = jax.nn.log_softmax(x @ state.params["kernel"])[None]
        assert_allclose(method.predict(state, IMAGES), want, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_trains_as_its_base_does(self):
        mine = self.method(base="otmdr", num_particles=2, num_samples=3)
        base = methods.create("otmdr", Softmax(), optax.sgd(0.5), num_particles=2)
        states = [m.init(jax.random.key(0), IMAGES) for m in (mine, base)]
        after = [
            m.step(s, (IMAGES, LABELS))[0]
            for m, s in zip((mine, base), states, strict=True)
        ]
        assert_same_bits(*after)
        assert base.predict(after[1], IMAGES).shape == (1, 12, 3)

    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [
            (Softmax(0.0), {}, "needs a model that drops"),
            (Softmax(1.0), {}, "does so in training alone"),  # as models.adapt says it
            (Softmax(), dict(num_samples=0), "num_samples must be at least 1"),
            (Softmax(), dict(base="swa"), "base of mc-dropout must be one of"),
        ],
    )
    def test_what_cannot_be(self, model, options, message):
        with pytest.raises(ValueError, match=message):
            self.method(model, **options)


@pytest.mark.slow
def test_members_of_a_joint_loss_have_masks_of_their_own():
    model = members.JointModel((Softmax(),), 2)
    mixed = members.JointModel((Softmax(), Softmax(0.6)), 2)
    assert (model.dropout, mixed.dropout) == (RATE, 0.6)
    params, state = model.init(jax.random.key(0), IMAGES)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), params)
    keys = jax.random.split(jax.random.key(1), 12)
    got, _ = model.apply_members(same, state, IMAGES, train=True, keys=keys)
    for m in range(2):
        own = jax.vmap(lambda key, m=m: jax.random.fold_in(key, m))(keys)
        weights = jax.tree.map(lambda x: x[0], params)
        logits, _ = Softmax().apply(weights, {}, IMAGES, train=True, keys=own)
        assert_allclose(got[m], jax.nn.log_softmax(logits), rtol=1e-5, atol=1e-6)
    assert not np.allclose(got[0], got[1])
    for joint in (model, mixed):
        method = methods.create("sam", joint, optax.sgd(0.1))
        state = method.init(jax.random.key(0), IMAGES)
        _, metrics = method.step(state, (IMAGES, LABELS))
        assert np.isfinite(metrics["loss"])


TINY = TrainConfig(
    model="one_layer", mesh="data=1", method="mc-dropout", base_method="sam", epochs=4,
    eval_every=9, batch_size=64, num_samples=4, log_every=2, seed=3, learning_rate=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return small_digits(320)


@pytest.fixture(scope="module")
def straight(one_layer, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    return training.train(TINY, small, folder, show_progress=False)


class TestRuns:
    def test_rates_that_nobody_gave(self):
        assert building.dropout_rate(TrainConfig(method="mc-dropout")) == 0.1
        assert building.dropout_rate(TrainConfig(method="sam")) == 0.0
        assert cost.gradient_evaluations(TINY) == 2.0

    @pytest.mark.slow
    def test_it_learns_and_is_uncertain(self, straight):
        assert straight.metrics["accuracy"] > 0.3  # ten classes, 20 steps
        assert straight.metrics["epistemic"] > 0
        assert report.read_run(straight.folder).label == "MC dropout of SAM"

    @pytest.mark.slow
    @pytest.mark.parametrize("change", [dict(eval_batch_size=32), dict(mesh="data=2")])
    def test_predictions_do_not_depend_on_batches(self, change, small, straight):
        chosen = TINY.replace(**change)
        mesh = programs.make_mesh(chosen)
        compiled = programs.compile_programs(chosen, small, mesh)
        state = parallel.place(straight.state, mesh)
        found = evaluation.evaluate(chosen, state, small, "test", compiled)
        assert_allclose(found.log_probs, straight.log_probs, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            dict(members="2", base_method="sgd", dtype="bfloat16"),
            dict(method="swag", dropout=0.2, collect_every=0.2, swag_rank=2,
                 collect_start=0.5, base_method="sgd"),
        ],
    )  # fmt: skip
    def test_it_runs_with_what_other_methods_run_with(self, options, one_layer, small):
        chosen = TINY.replace(epochs=2, **options)
        result = training.train(chosen, small, show_progress=False)
        assert np.isfinite(result.metrics["nll"])
        assert result.metrics["epistemic"] > 0
        if chosen.model.members is not None:
            assert len(result.metrics["members"]) == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(method="mc-dropout", dropout=0.0), "mc-dropout needs dropout"),
            (dict(method="mc-dropout", members="2", ensemble="joint"),
             "joint ensemble is not defined"),
            (dict(method="mc-dropout", prediction="mean", num_samples=3),
             "leave one of them out"),
            (dict(method="mc-dropout", rho=(0.1,)), "no option rho"),
            (dict(method="sgd", dropout=0.1, num_samples=3), "no option num_samples"),
        ],
    )  # fmt: skip
    def test_options_that_do_not_go_together(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)

    @pytest.mark.parametrize("rate", [1.0, -0.5, math.nan, True, "0.1"])
    def test_rates_that_are_none(self, rate):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
            TrainConfig(dropout=rate)


@pytest.mark.slow
def test_the_command_line_knows_it(one_layer, few_digits, tmp_path, capsys):
    """From training to a report; what measures weights does so without dropout."""
    run = str(tmp_path / "run")
    cli.main(
        ["train", "--method", "mc-dropout", "--dropout", "0.2", "--num-samples", "3",
         "--steps", "6", "--batch-size", "64", "--mesh", "data=1", "--output", run,
         "--quiet", "--model", one_layer]
    )  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    cli.main(["evaluate", run])
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for name in ("nll", "epistemic", "sharpness"):
        assert_allclose(found[name], result[name], rtol=1e-4)
    cli.main(["evaluate", run, "--prediction", "mean"])
    found = json.loads((tmp_path / "run" / "evaluation_mean.json").read_text())
    assert "epistemic" not in found and found["nll"] != result["nll"]
    cli.main(["calibrate", run, "--methods", "temperature", "--num-repeats", "1"])
    cli.main(["sharpness", run, "--num-examples", "50", "--num-probes", "2"])
    measured = json.loads((tmp_path / "run" / "sharpness.json").read_text())
    assert all(row["value"] is not None for row in measured["measures"])
    cli.main(["shift", run, "--corruptions", "contrast", "--severities", "3",
              "--max-examples", "30", "--quiet"])  # fmt: skip
    cli.main(["landscape", run, "--points", "3", "--num-examples", "50",
              "--dimensions", "1", "--statistics", "point", "--quiet"])  # fmt: skip
    cli.main(["report", run, "--output", str(tmp_path / "report")])
    capsys.readouterr()
    assert "MC dropout" in (tmp_path / "report" / "report.html").read_text()
