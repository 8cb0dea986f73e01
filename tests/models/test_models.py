"""The zoo against the papers' counts and forward passes written in NumPy."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import otmdr_jax
from otmdr_jax import models
from otmdr_jax.models.layers import Layers
from tests.marks import slow_but
from tests.zoo import (
    apply,
    as_float32,
    assert_close,
    draw,
    dtypes,
    equations,
    kept_and_recomputed,
    np_conv,
    np_head,
    np_max_pool,
    np_norm,
    np_relu,
    shapes,
)

# --- NumPy reference: see tests/zoo.py ----------------------------------------------


def np_cnn_small(params, state, x, train):
    moved = {}
    for i, stride in ((1, 1), (2, 2), (3, 1)):
        x = np_conv(x, params[f"conv{i}"]["kernel"], stride)
        norm = f"norm{i}"
        x, moved[norm] = np_norm(x, params[norm], state[norm], train)
        x = np_relu(x)
    return np_head(x, params["head"]), moved


def np_wide_resnet(params, state, x, train):
    """A wide residual network of one block a stage."""
    moved = {}
    x = np_conv(x, params["stem"]["kernel"])
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        name = f"stage{stage}_block1"
        p, s, m = params[name], state[name], moved.setdefault(name, {})
        h, m["norm1"] = np_norm(x, p["norm1"], s["norm1"], train)
        h = np_relu(h)
        y = np_conv(h, p["conv1"]["kernel"], stride)
        y, m["norm2"] = np_norm(y, p["norm2"], s["norm2"], train)
        y = np_conv(np_relu(y), p["conv2"]["kernel"])
        x = y + (np_conv(h, p["shortcut"]["kernel"], stride) if "shortcut" in p else x)
    x, moved["norm"] = np_norm(x, params["norm"], state["norm"], train)
    return np_head(np_relu(x), params["head"]), moved


def np_resnet_imagenet(params, state, x, train):
    """A residual network of one block a stage behind the ImageNet stem."""
    moved = {}
    x = np_conv(x, params["stem"]["kernel"], 2)
    x, moved["stem_norm"] = np_norm(x, params["stem_norm"], state["stem_norm"], train)
    x = np_max_pool(np_relu(x))
    for stage, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
        name = f"stage{stage}_block1"
        p, s, m = params[name], state[name], moved.setdefault(name, {})
        y = np_conv(x, p["conv1"]["kernel"], stride)
        y, m["norm1"] = np_norm(y, p["norm1"], s["norm1"], train)
        y = np_conv(np_relu(y), p["conv2"]["kernel"])
        y, m["norm2"] = np_norm(y, p["norm2"], s["norm2"], train)
        if "shortcut" in p:
            x = np_conv(x, p["shortcut"]["kernel"], stride)
            norm = "shortcut_norm"
            x, m[norm] = np_norm(x, p[norm], s[norm], train)
        x = np_relu(x + y)
    return np_head(x, params["head"]), moved


# --- architecture -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "image_shape", "count_10", "count_100"),
    [
        ("wide_resnet_28_10", {}, (32, 32, 3), 36_479_194, 36_536_884),
        ("wide_resnet_34_10", {}, (32, 32, 3), 46_160_474, 46_218_164),
        ("resnet_10", {}, (32, 32, 3), 4_903_242, 4_949_412),
        ("resnet_18", {}, (32, 32, 3), 11_173_962, 11_220_132),
        ("resnet_18", {"stem": "imagenet"}, (224, 224, 3), 11_181_642, 11_227_812),
        # 9*16 + 9*16*32 + 9*32*32 + 2*(16+32+32) + 33 * classes
        ("cnn_small", {}, (8, 8, 1), 14_458, 17_428),
    ],
)
def test_parameter_counts(name, options, image_shape, count_10, count_100):
    for num_classes, count in ((10, count_10), (100, count_100)):
        model = models.create(name, num_classes, **options)
        assert models.parameter_count(model, image_shape) == count
        assert models.parameter_count(model, (7, *image_shape)) == count


@pytest.mark.parametrize(
    ("name", "options", "image_shape"),
    [
        ("wide_resnet_16_2", {}, (3, 32, 32, 3)),
        ("resnet_10", {}, (3, 28, 28, 1)),
        ("resnet_18", {"stem": "imagenet"}, (2, 224, 224, 3)),
        ("cnn_small", {}, (5, 28, 28, 1)),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_shapes_of_logits_and_state(name, options, image_shape, train):
    model = models.create(name, 7, **options)
    params, state = shapes(model, image_shape)
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    logits, new_state = jax.eval_shape(
        lambda *args: model.apply(*args, train=train), params, state, images
    )
    assert logits.shape == (image_shape[0], 7)
    assert logits.dtype == jnp.float32
    assert new_state == state


@pytest.mark.parametrize(
    ("name", "options", "image_shape", "reference"),
    [
        ("cnn_small", {}, (4, 8, 8, 1), np_cnn_small),
        ("wide_resnet_10_1", {}, (4, 8, 8, 3), np_wide_resnet),
        ("wide_resnet_10_2", {}, (3, 7, 10, 1), np_wide_resnet),
        ("resnet_10", {"stem": "imagenet"}, (4, 36, 40, 3), np_resnet_imagenet),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_forward_equals_numpy(name, options, image_shape, reference, train):
    model = models.create(name, 5, **options)
    params, state, images = draw(model, image_shape)
    logits, new_state = apply(model, *as_float32((params, state, images)), train=train)
    expected, moved = reference(params, state, images, train)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)
    # After a training batch: 0.9 * old + 0.1 * batch, at every BatchNorm.
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4),
        new_state,
        moved,
    )


@pytest.mark.slow
def test_blocks_are_called_in_order_beyond_ten_a_stage():
    model = models.create("wide_resnet_70_1", 2)
    module = nnx.eval_shape(lambda: model.module_fn(3, nnx.Rngs(0)))
    graph, arrays = nnx.split(module)
    merged = nnx.merge(graph, arrays)
    assert merged.blocks[8:12] == (
        "stage1_block9",
        "stage1_block10",
        "stage1_block11",
        "stage2_block1",
    )


# --- state --------------------------------------------------------------------------


def test_evaluation_leaves_the_state_as_it_is():
    model = models.create("wide_resnet_10_1", 5)
    params, state, images = as_float32(draw(model, (4, 8, 8, 3)))
    _, new_state = apply(model, params, state, images, train=False)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


@pytest.mark.slow
def test_no_gradient_flows_through_the_running_statistics():
    model = models.create("cnn_small", 5)
    params, state, images = as_float32(draw(model, (4, 8, 8, 1)))

    @jax.jit
    @jax.grad
    def gradient(params):
        _, new_state = model.apply(params, state, images, train=True)
        return optax.tree.sum(new_state)

    assert optax.tree.norm(gradient(params)) == 0


def test_batchnorm_axis_shares_the_statistics_of_the_whole_batch():
    whole = models.create("cnn_small", 5)
    params, state, images = as_float32(draw(whole, (8, 8, 8, 1)))
    expected = apply(whole, params, state, images, train=True)

    shared = models.create("cnn_small", 5, batchnorm_axis_name="batch")
    halves = images.reshape(2, 4, 8, 8, 1)
    logits, new_state = jax.jit(
        jax.vmap(
            lambda half: shared.apply(params, state, half, train=True),
            axis_name="batch",
            out_axes=(0, None),
        )
    )(halves)
    np.testing.assert_allclose(logits.reshape(8, 5), expected[0], atol=1e-5)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5),
        new_state,
        expected[1],
    )


# --- dtypes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wide_resnet_10_1", "resnet_10", "cnn_small"])
@pytest.mark.parametrize("train", [True, False])
def test_bfloat16_computes_convolutions_and_nothing_else(name, train):
    model = models.create(name, 5, dtype=jnp.bfloat16)
    params, state = shapes(model, (2, 8, 8, 3))
    assert dtypes((params, state)) == {"float32"}

    traced = jax.jit(model.apply, static_argnames="train").trace(
        params, state, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), train=train
    )
    convolutions = list(equations(traced.jaxpr.jaxpr, "convolve"))
    kernels = [x for x in jax.tree.leaves(params) if len(x.shape) == 4]
    assert len(convolutions) == len(kernels)
    for eqn in convolutions:
        assert dtypes([v.aval for v in eqn.invars]) == {"bfloat16"}
    for primitive in ("rsqrt", "dot_general"):  # BatchNorm, the classifier
        found = list(equations(traced.jaxpr.jaxpr, primitive))
        assert found
        for eqn in found:
            assert dtypes([v.aval for v in eqn.invars]) == {"float32"}
    logits, new_state = traced.out_info
    assert dtypes((logits, new_state)) == {"float32"}


def test_param_dtype_is_separate():
    model = models.create("cnn_small", 5, param_dtype=jnp.bfloat16)
    params, state = shapes(model, (2, 8, 8, 3))
    assert dtypes(params) == {"bfloat16"}
    assert dtypes(state) == {"float32"}


def test_bfloat16_is_close_to_float32():
    narrow = models.create("cnn_small", 5, dtype=jnp.bfloat16)
    params, state, images = as_float32(draw(narrow, (4, 8, 8, 1)))
    wide = models.create("cnn_small", 5)
    got, _ = apply(narrow, params, state, images, train=True)
    want, _ = apply(wide, params, state, images, train=True)
    np.testing.assert_allclose(got, want, atol=0.1)
    assert not np.array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("members", [None, 2])
def test_bfloat16_predictions_are_finite(members, key):
    """In one program with what they are made from: JAX 0.12 fused a sum wrongly."""
    narrow = models.create("cnn_small", 10, dtype=jnp.bfloat16)
    images = jax.random.normal(key, (16, 16, 16, 3))

    def predict(model, key):
        return model.apply(*model.init(key, images), images, train=False)[0]

    keys = key if members is None else jax.random.split(key, members)
    run = predict if members is None else jax.vmap(predict, in_axes=(None, 0))
    got = jax.jit(run, static_argnums=0)(narrow, keys)
    want = jax.jit(run, static_argnums=0)(models.create("cnn_small", 10), keys)
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())


def test_float64_throughout_for_gradient_checks():
    with jax.enable_x64(True):
        model = models.create(
            "cnn_small", 5, dtype=jnp.float64, param_dtype=jnp.float64
        )
        params, state, images = draw(model, (4, 8, 8, 1))
        logits, new_state = apply(model, params, state, images, train=True)
        assert dtypes((logits, new_state)) == {"float64"}
        expected, _ = np_cnn_small(params, state, images, train=True)
        np.testing.assert_allclose(logits, expected, rtol=1e-9)


# --- initial values -----------------------------------------------------------------


def test_initial_distributions(key):
    layers = Layers(
        nnx.Rngs(params=key), jnp.dtype("float32"), jnp.dtype("float32"), None
    )
    kernel = np.asarray(layers.conv(32, 256, 3).kernel[...])
    std = np.sqrt(2 / (3 * 3 * 256))  # fan_out; fan_in would be 2.8 times as large
    np.testing.assert_allclose(kernel.std(), std, rtol=0.05)
    # A normal has 4.55 % beyond two deviations, one truncated there has none.
    np.testing.assert_allclose(np.mean(abs(kernel) > 2 * std), 0.0455, rtol=0.1)

    dense = layers.dense(400, 100)
    kernel = np.asarray(dense.kernel[...])
    assert abs(kernel).max() <= 1 / np.sqrt(400)
    np.testing.assert_allclose(kernel.std(), 1 / np.sqrt(3 * 400), rtol=0.05)
    np.testing.assert_array_equal(dense.bias[...], np.zeros(100))


def test_initial_batchnorm_and_keys(key):
    model = models.create("cnn_small", 10)
    images = jnp.zeros((2, 8, 8, 1))
    params, state = model.init(key, images)
    for name in ("norm1", "norm2", "norm3"):
        np.testing.assert_array_equal(params[name]["scale"], 1)
        np.testing.assert_array_equal(params[name]["bias"], 0)
        np.testing.assert_array_equal(state[name]["mean"], 0)
        np.testing.assert_array_equal(state[name]["var"], 1)

    again, _ = model.init(key, jax.ShapeDtypeStruct((9, 28, 28, 1), jnp.uint8))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    other, _ = model.init(jax.random.key(1), images)
    for name in ("conv1", "conv2", "conv3", "head"):
        assert not np.array_equal(other[name]["kernel"], params[name]["kernel"])


# --- transformations ----------------------------------------------------------------


@pytest.mark.slow
def test_gradients_of_stacked_members_equal_a_loop():
    model = models.create("cnn_small", 5)
    drawn = [as_float32(draw(model, (4, 8, 8, 1), seed)) for seed in range(2)]
    labels = jnp.array([0, 1, 2, 3])

    def loss(params, state, images):
        logits, state = model.apply(params, state, images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), state

    grad = jax.value_and_grad(loss, has_aux=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    together = jax.jit(jax.vmap(grad))(*stacked)
    alone = jax.jit(grad)
    for i, member in enumerate(drawn):
        jax.tree.map(
            lambda got, want, i=i: np.testing.assert_allclose(
                got[i], want, rtol=1e-3, atol=1e-5
            ),
            together,
            alone(*member),
        )


@pytest.mark.slow
def test_first_use_inside_a_transformation_leaks_no_tracer():
    model = models.create("wide_resnet_10_1", 3)
    images = jax.ShapeDtypeStruct((2, 9, 9, 2), jnp.float32)

    def loss(key, images):
        params, state = model.init(key, images)
        return jax.grad(
            lambda params: model.apply(params, state, images, train=True)[0].sum()
        )(params)

    with jax.checking_leaks():
        jax.eval_shape(loss, jax.random.key(0), images)


@pytest.mark.slow
def test_small_cnn_learns_digits():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    images = jnp.asarray(digits.images[order, ..., None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target[order])
    model = models.create("cnn_small", 10)
    params, state = model.init(jax.random.key(0), images)
    tx = optax.sgd(0.1, momentum=0.9)
    opt_state = tx.init(params)

    def loss(params, state, rows):
        logits, state = model.apply(params, state, images[rows], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return losses.mean(), state

    @jax.jit
    def step(params, state, opt_state, rows):
        grads, state = jax.grad(loss, has_aux=True)(params, state, rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state

    for _ in range(100):
        params, state, opt_state = step(
            params, state, opt_state, rng.integers(0, 1400, 64)
        )
    logits, _ = apply(model, params, state, images[1400:], train=False)
    assert (logits.argmax(-1) == labels[1400:]).mean() > 0.9


# --- recomputation ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("cnn_small", jnp.float32, 1e-4),
        ("resnet_10", jnp.float32, 1e-4),
        ("wide_resnet_10_1", jnp.float32, 1e-4),
        # Programs round at different places: each is as far from float32's gradient.
        ("cnn_small", jnp.bfloat16, 0.2),
    ],
)
def test_remat_changes_no_result(name, dtype, tolerance):
    losses, arguments = kept_and_recomputed(name, dtype)
    want, got = (
        jax.jit(jax.value_and_grad(loss, has_aux=True))(*arguments) for loss in losses
    )
    assert_close(got, want, tolerance)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), got[0][1], arguments[2])
    assert all(jax.tree.leaves(moved))  # the running statistics


@pytest.mark.slow
def test_remat_under_a_robust_gradient(key):
    """K particles in a loop of the compiled program, and batched."""
    (plain, lean), arguments = kept_and_recomputed("cnn_small")

    def gradient(loss, particle_map):
        return jax.jit(
            otmdr_jax.value_and_grad(
                loss,
                rho=0.05,
                num_particles=2,
                noise_std=0.01,
                split="shared",
                has_aux=True,
                particle_map=particle_map,
            )
        )(*arguments, key=key)

    want = gradient(plain, "unroll")
    for particle_map in ("scan", "vmap"):
        assert_close(gradient(lean, particle_map), want, 1e-3)


@pytest.mark.slow
def test_remat_inside_shard_map():
    """Each device climbs on its part, with BatchNorm's statistics of that part."""
    losses, arguments = kept_and_recomputed("cnn_small")
    mesh = jax.make_mesh(
        (2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )

    def gradient(loss):
        grad_fn = otmdr_jax.value_and_grad(
            loss, rho=0.05, split="shared", has_aux=True, axis_name="data"
        )
        return jax.jit(
            jax.shard_map(
                grad_fn,
                mesh=mesh,
                in_specs=(jax.P(), jax.P("data"), jax.P()),
                out_specs=jax.P(),
            )
        )(*arguments)

    want, got = map(gradient, losses)
    assert_close(got, want, 1e-3)


@pytest.mark.slow
def test_remat_of_a_deep_network_takes_less_memory():
    """With the barriers in place, as on accelerators: see `models.create`."""
    losses, arguments = kept_and_recomputed("wide_resnet_16_1", size=256)
    kept, recomputed = (
        jax.jit(jax.grad(loss, has_aux=True))
        .lower(*arguments)
        .compile(compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"})
        .memory_analysis()
        .temp_size_in_bytes
        for loss in losses
    )
    assert recomputed < 0.6 * kept


# --- the registry and its errors ----------------------------------------------------


def test_every_listed_name_can_be_created():
    assert set(models.names()) >= {
        "cnn_small",
        "densenet_121",
        "efficientnet_b0",
        "mobilenet",
        "pyramidnet_101",
        "resnet_10",
        "resnet_18",
        "wide_resnet_28_10",
        "wide_resnet_34_10",
    }
    for name in models.names():
        assert models.create(name, 10).name == name


def test_models_created_alike_are_one_static_argument():
    first = models.create("resnet_18", 10, dtype=jnp.bfloat16, stem="cifar")
    second = models.create("resnet_18", 10, dtype="bfloat16", stem="cifar")
    assert first == second
    assert hash(first) == hash(second)
    assert first != models.create("resnet_18", 10, stem="imagenet")
    with pytest.raises(AttributeError):
        first.name = "other"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("wide_resnet_29_10", 10), ValueError, r"6n \+ 4.*Try depth 28 or 34"),
        (("wide_resnet_4_1", 10), ValueError, "Try depth 10 or 16"),
        (("wide_resnet_28_0", 10), ValueError, "width must be at least 1.*width=0"),
        (("pyramidnet_100_a64", 10), ValueError, r"9n \+ 2.*Try depth 92 or 101"),
        (("pyramidnet_2_a64", 10), ValueError, "Try depth 11 or 20"),
        (("pyramidnet_11_a0", 10), ValueError, "at least 1, got alpha=0"),
        (("pyramidnet_101", 1), ValueError, "at least 2, got 1"),
        (("resnet18", 10), ValueError, "Did you mean 'resnet_18'.*cnn_small"),
        (("vit", 10), ValueError, "Known models: .*wide_resnet_<d.*pyramidnet_<d"),
        (("resnet_18", 1), ValueError, "at least 2, got 1"),
        (("resnet_18", 10.0), TypeError, "num_classes must be an integer .*got 10.0"),
    ],
)
def test_illegal_names_and_classes(arguments, error, message):
    with pytest.raises(error, match=message):
        models.create(*arguments)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("resnet_18", {"stem": "mnist"}, ValueError, "one of .*'imagenet'.*'mnist'"),
        ("densenet_121", {"stem": 3}, ValueError, "one of .*'imagenet'; got 3"),
        ("efficientnet_b0", {"stem": ""}, ValueError, "one of .*'imagenet'; got ''"),
        ("mobilenet", {"stem": "cifar"}, TypeError, "takes the options: width"),
        (
            "resnet_18",
            {"steam": "cifar"},
            TypeError,
            "'steam'.*takes the options: stem",
        ),
        ("resnet_18", {"stage_sizes": (1,)}, TypeError, "no option 'stage_sizes'"),
        ("cnn_small", {"stem": "cifar"}, TypeError, "it takes no options"),
        ("cnn_small", {"dtype": jnp.int32}, TypeError, "dtype must be a floating"),
        ("cnn_small", {"param_dtype": "int8"}, TypeError, "param_dtype must be a fl"),
        ("cnn_small", {"remat": 1}, TypeError, "remat must be True or False, got 1"),
    ],
)
def test_illegal_options(name, options, error, message):
    with pytest.raises(error, match=message):
        models.create(name, 10, **options)


def test_calls_that_do_not_fit(key):
    model = models.create("cnn_small", 10)
    with pytest.raises(ValueError, match=r"\(batch, height, width, channels\)"):
        model.init(key, jnp.zeros((8, 8, 1)))
    with pytest.raises(ValueError, match=r"image_shape must be .* got \(8, 8\)"):
        models.parameter_count(model, (8, 8))

    params, state, images = as_float32(draw(model, (2, 8, 8, 1)))
    with pytest.raises(ValueError, match=r"got \(8, 8, 1\)"):
        model.apply(params, state, images[0], train=False)
    with pytest.raises(ValueError, match="params must be the nested dict"):
        model.apply(state, params, images, train=False)
    with pytest.raises(ValueError, match=r"'kernel'.*\(3, 3, 3, 16\).*\(3, 3, 1, 16\)"):
        model.apply(params, state, jnp.zeros((2, 8, 8, 3)), train=False)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    with pytest.raises(ValueError, match="call apply under jax.vmap"):
        model.apply(stacked, state, images, train=False)
    with pytest.raises(TypeError, match="static_argnames"):
        jax.jit(lambda train: model.apply(params, state, images, train=train))(True)


def test_missing_flax_names_the_extra(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("otmdr_jax.models")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"pip install '.\[models\]'"):
        importlib.import_module("otmdr_jax.models")


def test_one_value_a_channel_is_refused(key):
    """Its variance is 0: the logits would be the same whatever the image."""
    model = models.create("resnet_10", num_classes=3)

    def train(count, size):
        images = jax.ShapeDtypeStruct((count, size, size, 3), jnp.float32)
        params, state = jax.eval_shape(model.init, key, images)
        run = lambda p, s, x: model.apply(p, s, x, train=True)  # noqa: E731
        return jax.eval_shape(run, params, state, images)

    with pytest.raises(ValueError, match=r"two values a channel .* \(1, 1, 1, 512\)"):
        train(1, 8)
    for enough in ((2, 8), (1, 16)):
        assert train(*enough)[0].shape == (enough[0], 3)


def batch_norms(dtype):
    """Ours, and Flax's own with the same settings, as functions with gradients."""

    def function(make, call):
        def run(x, scale, bias, train):
            module = make()
            module.scale, module.bias = nnx.Param(scale), nnx.Param(bias)
            module.mean = nnx.BatchStat(jnp.full_like(scale, 0.5))
            module.var = nnx.BatchStat(jnp.full_like(scale, 2.0))
            out = call(module, x, train)
            return out, (module.mean[...], module.var[...])

        return run

    settings = {"momentum": 0.9, "epsilon": 1e-5, "dtype": dtype}
    return (
        function(
            lambda: Layers(nnx.Rngs(0), dtype, dtype, None).batch_norm(3),
            lambda module, x, train: module(x, train=train),
        ),
        function(
            lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0), **settings),
            lambda module, x, train: module(x, use_running_average=not train),
        ),
    )


@pytest.mark.parametrize("train", slow_but([False], [True, False]))
def test_batch_norm_is_that_of_flax_in_another_form(train):
    """To rounding in float64, derivatives included."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, weights = (jnp.asarray(rng.normal(5, 2, (4, 3, 2, 3))) for _ in range(2))
        scale, bias = (jnp.asarray(rng.normal(1, 1, 3)) for _ in range(2))

        def run(norm):
            def f(x, scale, bias):
                out, state = norm(x, scale, bias, train)
                return jnp.sum(weights * jnp.sin(out)), (out, state)

            return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(x, scale, bias)

        got, want = map(run, batch_norms(jnp.float64))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            got,
            want,
        )


def test_batch_norm_is_as_exact_as_that_of_flax_far_from_zero():
    rng = np.random.default_rng(0)
    x = rng.normal(30, 1, (64, 4, 4, 3)).astype(np.float32)
    wide = x.astype(np.float64)
    exact = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
    ours, flax = (
        abs(norm(jnp.asarray(x), jnp.ones(3), jnp.zeros(3), True)[0] - exact).max()
        for norm in batch_norms(jnp.float32)
    )
    assert ours < max(2 * flax, 1e-4) < 1e-2


def test_batch_norm_keeps_less_for_the_backward_pass_than_that_of_flax():
    """On CPUs Flax's form keeps the difference to the mean beside its operand."""
    x = jnp.ones((8, 16, 16, 3))

    def temporaries(norm):
        def loss(x, scale, bias):
            for _ in range(4):
                x = jax.nn.relu(norm(x, scale, bias, True)[0])
            return jnp.sum(x**2)

        grad = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = grad.lower(x, jnp.ones(3), jnp.zeros(3)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours, flax = map(temporaries, batch_norms(jnp.float32))
    assert ours <= flax - x.nbytes
