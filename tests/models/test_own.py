"""Networks of one's own behind init and apply: those of each framework say what."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import otmdr_jax
from otmdr_jax import bnn, models

IMAGES = jax.random.normal(jax.random.key(1), (6, 4, 4, 2))


class Nnx(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.layers = nnx.List([nnx.Conv(2, 3, (3, 3), rngs=rngs)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, num_classes, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        x = nnx.relu(self.norm(x)).mean((1, 2))
        return self.head(self.drop(x))


class Linen(linen.Module):
    num_classes: int

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(3, (3, 3))(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.relu(x).mean((1, 2))
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(self.num_classes)(x)


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, num_classes, *, key):
        one, two = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(2, 3, 3, padding=1, key=one)
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="ema")
        self.drop = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(3, num_classes, key=two)

    def __call__(self, x, state, *, key=None):
        x = self.conv(jnp.moveaxis(x, -1, 0))
        x, state = self.norm(x, state)
        x = self.drop(jax.nn.relu(x).mean((1, 2)), key=key)
        return self.head(x), state


def equinox_net(num_classes, *, key):
    return eqx.nn.make_with_state(Equinox)(num_classes, key=key)


ALL = {"nnx": Nnx, "linen": Linen, "equinox": equinox_net}


@pytest.fixture(scope="module", params=ALL)
def kind(request):
    return request.param


def made(kind):
    model = models.adapt(ALL[kind], 5)
    return model, *model.init(jax.random.key(0), IMAGES[:1])


def test_it_is_pure_and_its_arrays_have_names(kind):
    model, params, state = made(kind)
    again, _ = model.init(jax.random.key(0), IMAGES[:1])
    other, _ = model.init(jax.random.key(1), IMAGES[:1])
    leaves = jax.tree.leaves
    for a, b in zip(leaves(params), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(leaves(params), leaves(other), strict=True)
    )
    # Dicts of arrays alone: checkpoints keep nothing else.
    assert all(isinstance(x, jax.Array) for x in leaves((params, state)))
    for path, _ in jax.tree_util.tree_leaves_with_path((params, state)):
        assert all(isinstance(k.key, str) for k in path[1:])
    apply = jax.jit(model.apply, static_argnames="train")
    keys = jax.random.split(jax.random.key(2), 6)
    first = apply(params, state, IMAGES, train=True, keys=keys)
    second = apply(params, state, IMAGES, train=True, keys=keys)
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[0].shape == (6, 5)
    # Training draws, by its keys, and moves the statistics; a prediction does neither.
    assert model.dropout
    others = apply(params, state, IMAGES, train=True, keys=keys[::-1])
    assert (first[0] != others[0]).any()
    assert jax.tree.structure(first[1]) == jax.tree.structure(state)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(leaves(first[1]), leaves(state), strict=True)
    )
    logits, kept = apply(params, state, IMAGES, train=False)
    assert kept is not None and (logits != first[0]).any()
    for a, b in zip(leaves(kept), leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_says_what_the_module_says(kind):
    """The framework's own call, on weights that are set to those of init."""
    model, params, state = made(kind)
    found, _ = model.apply(params, state, IMAGES, train=False)
    if kind == "nnx":
        module = Nnx(5, rngs=nnx.Rngs(7))
        module.layers[0].kernel[...] = params["layers"]["0"]["kernel"]
        module.layers[0].bias[...] = params["layers"]["0"]["bias"]
        module.head.kernel[...] = params["head"]["kernel"]
        module.eval()
        want = module(IMAGES)
        module.train()
        module.drop.deterministic = True
        module(IMAGES)
        mean = module.norm.mean[...]
        _, moved = model.apply(params, state, IMAGES, train=True)
        np.testing.assert_allclose(moved["norm"]["mean"], mean, rtol=1e-6)
    elif kind == "linen":
        variables = {"params": params, **state}
        want = Linen(5).apply(variables, IMAGES, False)
        _, changed = Linen(5).apply(
            variables,
            IMAGES,
            True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        _, moved = model.apply(
            params, state, IMAGES, train=True, keys=jax.random.key(0)
        )
        for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(changed), strict=True):
            np.testing.assert_array_equal(a, b)
    else:
        module, own = equinox_net(5, key=jax.random.key(0))
        net = eqx.nn.inference_mode(module)
        want, _ = jax.vmap(
            net, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )(IMAGES, own)
        np.testing.assert_array_equal(params["head"]["weight"], module.head.weight)
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.slow
def test_gradients_are_of_the_parameters_alone(kind):
    model, params, state = made(kind)

    def loss(params, state):
        keys = jax.random.split(jax.random.key(0), 6)
        logits, moved = model.apply(params, state, IMAGES, train=True, keys=keys)
        return jnp.sum(logits**2) + sum(
            jnp.sum(x)
            for x in jax.tree.leaves(moved)
            if jnp.isdtype(x.dtype, "real floating")
        )

    value = jax.grad(loss)(params, state)
    assert jax.tree.structure(value) == jax.tree.structure(params)
    of_head = [x for x in jax.tree.leaves(value) if 5 in x.shape]
    assert len(of_head) == 2 and all((x != 0).any() for x in of_head)


def test_a_posterior_is_over_weights_and_not_over_norms(kind):
    """As in the zoo: a layer's bias belongs to its weights, a norm's does not."""
    _, params, _ = made(kind)
    chosen = bnn.weights_and_biases(params)
    for path, value in jax.tree_util.tree_leaves_with_path(chosen):
        name = jax.tree_util.keystr(path).lower()
        assert value == ("norm" not in name), name


def test_what_a_call_adds_is_not_carried_on():
    class Adds(nnx.Module):
        def __init__(self, *, rngs):
            self.head = nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, x):
            x = self.head(x.mean((1, 2)))
            self.seen = nnx.Intermediate(x)
            return x

    model = models.adapt(Adds)
    params, state = model.init(jax.random.key(0), IMAGES)
    _, moved = model.apply(params, state, IMAGES, train=True)
    assert jax.tree.structure(moved) == jax.tree.structure(state)


class Across(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        norm = linen.BatchNorm(use_running_average=not train, axis_name="data")
        return linen.Dense(3)(norm(x).mean((1, 2)))


def test_a_linen_module_may_average_over_devices():
    """It starts outside of the axis."""
    model, images = models.adapt(Across()), jnp.ones((2, 4, 4, 1))
    params, state = model.init(jax.random.key(0), images)
    logits, moved = jax.vmap(
        lambda x: model.apply(params, state, x, train=True), axis_name="data"
    )(images[:, None])
    assert logits.shape == (2, 1, 3) and set(moved) == {"batch_stats"}


class Sowing(linen.Module):
    """Sows into two collections, one of them its own, and one has its state beside."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(3)(x.reshape(len(x), -1))
        seen = self.variable("mixed", "seen", lambda: jnp.zeros(()))
        pair = self.variable("mixed", "pair", lambda: (jnp.zeros(2), jnp.ones(1)))
        if self.is_mutable_collection("mixed") and not self.is_initializing():
            seen.value += 1
            pair.value = jax.tree.map(lambda x: x + 2, pair.value)
        for collection in ("intermediates", "losses", "mixed"):
            self.sow(collection, "size", jnp.mean(x))
        return x


def test_what_a_linen_module_sows_is_no_state():
    """It would be one more array at each step: no jitted step takes that."""
    model, images = models.adapt(Sowing()), jnp.ones((2, 4, 4, 1))
    params, state = model.init(jax.random.key(0), images)
    assert set(state) == {"mixed"} and set(state["mixed"]) == {"seen", "pair"}
    for step in (1, 2):
        logits, moved = model.apply(params, state, images, train=True)
        assert jax.tree.structure(moved) == jax.tree.structure(state)
        state = moved
        assert state["mixed"]["seen"] == step
        np.testing.assert_array_equal(state["mixed"]["pair"][1], [1 + 2 * step])
    evaluated, kept = model.apply(params, state, images, train=False)
    np.testing.assert_array_equal(evaluated, logits)
    assert kept["mixed"]["seen"] == 2


def test_functions_that_are_told_whether_they_train():
    def apply(params, images, train):
        return images.mean((1, 2)) * params["w"][None] * (2 if train else 1)

    model = models.adapt([lambda key, images: {"w": jnp.ones(2)}, apply])
    params, state = model.init(jax.random.key(0), IMAGES)
    once, _ = model.apply(params, state, IMAGES, train=False)
    twice, _ = model.apply(params, state, IMAGES, train=True)
    np.testing.assert_array_equal(twice, 2 * once)


def test_functions_with_a_state_and_without():
    def init(key, images):
        return {"w": jax.random.normal(key, (images.shape[-1], 3))}

    def apply(params, images):
        return images.mean((1, 2)) @ params["w"]

    model = models.adapt((init, apply))
    params, state = model.init(jax.random.key(0), IMAGES)
    found, kept = model.apply(params, state, IMAGES, train=True)
    np.testing.assert_array_equal(found, apply(params, IMAGES))
    assert kept == state == {} and not model.dropout

    def init_both(key, images):
        return init(key, images), {"count": jnp.zeros(())}

    def apply_both(params, state, images, *, train, keys=None):
        count = state["count"] + train
        noise = 0.0 if keys is None else jax.random.normal(keys[0])
        return apply(params, images) + noise, {"count": count}

    model = models.adapt((init_both, apply_both))
    params, state = model.init(jax.random.key(0), IMAGES)
    keys = jax.random.split(jax.random.key(0), 6)
    found, kept = model.apply(params, state, IMAGES, train=True, keys=keys)
    assert kept["count"] == 1 and model.dropout
    np.testing.assert_allclose(
        found, apply(params, IMAGES) + jax.random.normal(keys[0]), rtol=1e-6
    )


def test_a_function_of_any_names_is_told_that_it_trains():
    told = []

    def apply(params, images, **options):
        told.append(sorted(options))
        return images.mean((1, 2)) * params["w"][None]

    model = models.adapt((lambda key, images: {"w": jnp.ones(2)}, apply))
    assert model.dropout
    params, state = model.init(jax.random.key(0), IMAGES)
    model.apply(params, state, IMAGES, train=True, keys=jax.random.key(0))
    assert told == [["keys", "train"]]


def test_an_image_is_dropped_by_its_own_key():
    class Drops(eqx.Module):
        w: jax.Array

        def __init__(self, *, key):
            self.w = jnp.ones(())

        def __call__(self, x, *, key=None):
            return self.w * eqx.nn.Dropout(0.5)(x.ravel(), key=key)

    model = models.adapt(Drops)
    params, state = model.init(jax.random.key(0), IMAGES[:1])
    images, keys = jnp.ones((6, 4, 4, 2)), jax.random.split(jax.random.key(1), 6)
    whole, _ = model.apply(params, state, images, train=True, keys=keys)
    assert len({row.tobytes() for row in np.asarray(whole)}) == 6
    for raw in (keys, jax.random.key_data(keys)):
        part, _ = model.apply(params, state, images[2:], train=True, keys=raw[2:])
        np.testing.assert_array_equal(part, whole[2:])
    one, _ = model.apply(params, state, images, train=True, keys=keys[0])
    assert len({row.tobytes() for row in np.asarray(one)}) == 6

    # So that the loss is the same however a batch is parted.
    def loss(params, batch):
        outputs, _ = model.apply(params, state, batch[0], train=True, keys=batch[1])
        return jnp.mean(outputs**2 * jnp.arange(32.0)[None])

    losses = [
        otmdr_jax.value_and_grad(loss, 0.0, split="shared", microbatch_size=size)(
            params, (images, keys), key=jax.random.key(0)
        )[0]
        for size in (None, 1, 2, 3)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@pytest.mark.parametrize("kind_of", ["nnx", "linen"])
def test_raw_keys_drop_as_typed_ones(kind_of):
    model, params, state = made(kind_of)
    keys = jax.random.split(jax.random.key(3), len(IMAGES))
    of = [
        model.apply(params, state, IMAGES, train=True, keys=k)[0]
        for k in (
            keys,
            jax.random.key_data(keys),
            keys[0],
            jax.random.key_data(keys[0]),
        )
    ]
    for found in of[1:]:
        np.testing.assert_array_equal(found, of[0])


def test_a_constructor_may_be_inherited():
    class Inherits(Nnx):
        pass

    assert models.adapt(Inherits, 5).init(jax.random.key(0), IMAGES)[0]["head"]


def test_a_network_of_the_zoo_is_one_already():
    zoo = models.create("cnn_small", 5)
    assert models.adapt(zoo) is zoo
    assert models.adapt(Nnx, 5) is models.adapt(Nnx, 5)  # compiled once


@pytest.mark.parametrize(
    "model, message",
    [
        (Nnx(3, rngs=nnx.Rngs(0)), r"drawn already.*Give Nnx itself"),
        (eqx.nn.Linear(2, 3, key=jax.random.key(0)), "Give Linear itself"),
        (lambda x: x, "must be a class or function that takes rngs"),
        (3, "must be a class or function"),
    ],
)
def test_what_is_no_network_is_refused(model, message):
    with pytest.raises(TypeError, match=message):
        models.adapt(model, 5)


def test_other_parameters_are_refused():
    model, params, state = made("nnx")
    params["head"].pop("bias")
    with pytest.raises(ValueError, match=r"missing \['head/bias'\]"):
        model.apply(params, state, IMAGES, train=False)


def test_names(tmp_path, monkeypatch):
    from otmdr_jax.models import own

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mynets.py").write_text("class A:\n    class B:\n        pass\n")
    found = own.load("mynets:A.B")
    assert own.name_of(found) == "mynets:A.B"
    assert own.name_of(lambda rngs: None) == "given:" + "test_names.<locals>.<lambda>"
    with pytest.raises(ValueError, match="has no 'C'"):
        own.load("mynets:C")
    with pytest.raises(ValueError, match="importing 'nowhere' failed"):
        own.load("nowhere:C")
