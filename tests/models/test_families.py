"""PyramidNet, DenseNet, MobileNet and EfficientNet: counts, NumPy, gradients, fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from otmdr_jax import models
from otmdr_jax.models.densenet import DenseNet
from otmdr_jax.models.efficientnet import EfficientNet
from otmdr_jax.models.layers import Layers
from otmdr_jax.models.pyramidnet import _average_pool
from tests.sets import real_cifar10
from tests.zoo import (
    apply,
    as_float32,
    assert_close,
    classification_loss,
    draw,
    dtypes,
    equations,
    np_conv,
    np_head,
    np_max_pool,
    np_norm,
    np_relu,
    shapes,
)

# --- NumPy reference: see tests/zoo.py ----------------------------------------------


def np_depthwise(x, kernel, stride=1):
    """Each channel by itself."""
    channels = [
        np_conv(x[..., c : c + 1], kernel[..., c : c + 1], stride)
        for c in range(x.shape[-1])
    ]
    return np.concatenate(channels, axis=-1)


def np_average_pool(x):
    """2x2 windows of even sides."""
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def np_sigmoid(x):
    return 1 / (1 + np.exp(-x))


def np_swish(x):
    return x * np_sigmoid(x)


class Norms:
    """Applies BatchNorms by name and collects their statistics afterwards."""

    def __init__(self, params, state, train):
        self.params, self.state, self.train = params, state, train
        self.moved = {}

    def __call__(self, x, *path):
        p, s, moved = self.params, self.state, self.moved
        for name in path[:-1]:
            p, s, moved = p[name], s[name], moved.setdefault(name, {})
        name = path[-1]
        x, moved[name] = np_norm(x, p[name], s[name], self.train)
        return x


def np_pyramidnet(params, state, x, train):
    """One block a stage."""
    norm = Norms(params, state, train)
    x = norm(np_conv(x, params["stem"]["kernel"]), "stem_norm")
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        name = f"stage{stage}_block1"
        p = params[name]
        y = np_conv(norm(x, name, "norm1"), p["conv1"]["kernel"])
        y = np_conv(np_relu(norm(y, name, "norm2")), p["conv2"]["kernel"], stride)
        y = np_conv(np_relu(norm(y, name, "norm3")), p["conv3"]["kernel"])
        y = norm(y, name, "norm4")
        x = np_average_pool(x) if stride == 2 else x
        y[..., : x.shape[-1]] += x
        x = y
    return np_head(np_relu(norm(x, "norm")), params["head"]), norm.moved


def np_densenet(params, state, x, train):
    """Two stages of two layers."""
    norm = Norms(params, state, train)
    imagenet = params["stem"]["kernel"].shape[0] == 7
    x = np_conv(x, params["stem"]["kernel"], 2 if imagenet else 1)
    x = np_relu(norm(x, "stem_norm"))
    x = np_max_pool(x) if imagenet else x
    for stage in (1, 2):
        for layer in (1, 2):
            name = f"stage{stage}_layer{layer}"
            y = np_conv(
                np_relu(norm(x, name, "norm1")), params[name]["conv1"]["kernel"]
            )
            y = np_conv(
                np_relu(norm(y, name, "norm2")), params[name]["conv2"]["kernel"]
            )
            x = np.concatenate([x, y], axis=-1)
        if stage == 1:
            x = np_relu(norm(x, "transition1", "norm"))
            x = np_average_pool(np_conv(x, params["transition1"]["conv"]["kernel"]))
    return np_head(np_relu(norm(x, "norm")), params["head"]), norm.moved


def np_mobilenet(params, state, x, train):
    norm = Norms(params, state, train)
    x = np_relu(norm(np_conv(x, params["stem"]["kernel"]), "stem_norm"))
    for index in range(1, 14):
        name = f"block{index}"
        stride = 2 if index in (2, 4, 6, 12) else 1
        x = np_depthwise(x, params[name]["conv1"]["kernel"], stride)
        x = np_relu(norm(x, name, "norm1"))
        x = np_conv(x, params[name]["conv2"]["kernel"])
        x = np_relu(norm(x, name, "norm2"))
    return np_head(x, params["head"]), norm.moved


def np_efficientnet(params, state, x, train):
    norm = Norms(params, state, train)
    imagenet = "last" in params
    x = np_conv(x, params["stem"]["kernel"], 2 if imagenet else 1)
    x = np_swish(norm(x, "stem_norm"))
    repeats = (1, 2, 2, 3, 3, 4, 1)
    strides = (1, 2, 2, 2, 1, 2, 1)
    for stage, (size, stride) in enumerate(zip(repeats, strides, strict=True), 1):
        for block in range(1, size + 1):
            name = f"stage{stage}_block{block}"
            p, y = params[name], x
            if stage > 1:
                y = np_conv(y, p["expand"]["kernel"])
                y = np_swish(norm(y, name, "expand_norm"))
            y = np_depthwise(y, p["depthwise"]["kernel"], stride if block == 1 else 1)
            y = np_swish(norm(y, name, "depthwise_norm"))
            gate = np_swish(np_head(y, p["excite"]["reduce"]))
            gate = (
                gate @ p["excite"]["expand"]["kernel"] + p["excite"]["expand"]["bias"]
            )
            y = y * np_sigmoid(gate)[:, None, None]
            y = norm(np_conv(y, p["project"]["kernel"]), name, "project_norm")
            x = y if block == 1 else x + y
    if imagenet:
        x = np_swish(norm(np_conv(x, params["last"]["kernel"]), "last_norm"))
    return np_head(x, params["head"]), norm.moved


# --- architecture -------------------------------------------------------------------


def small(family, **options):
    """A member of a family that no name stands for: as few blocks as show all."""
    return models.Model("small", 10, family, tuple(sorted(options.items())))


def small_densenet(stem="cifar"):
    return small(DenseNet, stage_sizes=(2, 2), growth=4, stem=stem)


def small_efficientnet(stem="cifar"):
    """Its two expansions, two sizes of kernels, and a block around which x goes."""
    return small(EfficientNet, stage_sizes=(1, 2, 1, 0, 0, 0, 0), stem=stem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "side", "count_10", "count_100"),
    [
        ("pyramidnet_101", {}, 32, 1_557_518, 1_586_408),
        ("densenet_121", {}, 224, 6_964_106, 7_056_356),
        # 3x3 and not 7x7: 40 taps fewer of 3 x 64 weights.
        ("densenet_121", {"stem": "cifar"}, 32, 6_956_426, 7_048_676),
        ("mobilenet", {}, 32, 3_217_226, 3_309_476),
        ("efficientnet_b0", {}, 32, 3_598_598, 3_627_488),
        # Torchvision's 5,288,548 for 1000 classes, less 1,281 a class.
        ("efficientnet_b0", {"stem": "imagenet"}, 224, 4_020_358, 4_135_648),
    ],
)
def test_parameters_and_shapes_of_logits_and_state(
    name, options, side, count_10, count_100
):
    model = models.create(name, 10, **options)
    image_shape = (2, side, side, 3)
    params, state = shapes(model, image_shape)
    assert sum(x.size for x in jax.tree.leaves(params)) == count_10
    # Of 90 classes more the head alone is larger: no second trace.
    assert set(params["head"]) == {"kernel", "bias"}
    features, classes = params["head"]["kernel"].shape
    assert classes == 10 and count_10 + 90 * (features + 1) == count_100
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    logits, new_state = jax.eval_shape(
        lambda *args: model.apply(*args, train=True), params, state, images
    )
    assert logits.shape == (2, 10)
    assert logits.dtype == jnp.float32
    assert new_state == state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("densenet_121", 7_978_856), ("efficientnet_b0", 5_288_548)]
)
def test_torchvisions_counts_for_1000_classes(name, count):
    model = models.create(name, 1000, stem="imagenet")
    assert models.parameter_count(model, (224, 224, 3)) == count


@pytest.mark.slow
def test_a_pyramid_grows_by_alpha():
    """Han et al., eq. 3; stages of 11 blocks that grow by 64 / 33 channels each."""
    params, _ = shapes(models.create("pyramidnet_101", 10), (1, 32, 32, 3))
    widths = [
        params[f"stage{stage}_block{block}"]["conv2"]["kernel"].shape[-1]
        for stage in (1, 2, 3)
        for block in range(1, 12)
    ]
    assert widths[:4] == [18, 20, 22, 24] and widths[-2:] == [78, 80]
    assert widths == [int(np.rint(16 + k * 64 / 33)) for k in range(1, 34)]
    assert params["head"]["kernel"].shape == (320, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "image_shape", "reference"),
    [
        (models.create("pyramidnet_11_a7", 5), (4, 8, 12, 3), np_pyramidnet),
        (small_densenet(), (4, 8, 6, 1), np_densenet),
        (small_densenet(stem="imagenet"), (4, 24, 32, 3), np_densenet),
        (models.create("mobilenet", 5), (3, 32, 32, 3), np_mobilenet),
        (models.create("efficientnet_b0", 5), (3, 32, 32, 3), np_efficientnet),
        (
            models.create("efficientnet_b0", 5, stem="imagenet"),
            (3, 64, 48, 1),
            np_efficientnet,
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("train", [True, False])
def test_forward_equals_numpy(model, image_shape, reference, train):
    """In float64, where BatchNorm over few pixels does not blow up the rounding."""
    with jax.enable_x64(True):
        wide = jnp.dtype("float64")
        model = dataclasses.replace(model, dtype=wide, param_dtype=wide)
        params, state, images = draw(model, image_shape)
        logits, new_state = apply(model, params, state, images, train=train)
        assert dtypes((logits, new_state)) == {"float64"}
    expected, moved = reference(params, state, images, train)
    np.testing.assert_allclose(logits, expected, rtol=1e-7, atol=1e-7)
    if train:
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-7),
            new_state,
            moved,
        )


@pytest.mark.slow
def test_odd_sides_average_over_what_is_there():
    """PyTorch's `ceil_mode`: the last window of a side of 7 is one pixel wide."""
    model = models.create("pyramidnet_11_a3", 5)
    params, state, images = as_float32(draw(model, (2, 7, 5, 3)))
    logits, _ = apply(model, params, state, images, train=False)
    assert np.isfinite(logits).all()

    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    got = _average_pool(x, 2)[0, ..., 0]
    np.testing.assert_allclose(got, [[3, 5, 6.5], [10.5, 12.5, 14]])


def test_initial_depthwise_kernels(key):
    layers = Layers(
        nnx.Rngs(params=key), jnp.dtype("float32"), jnp.dtype("float32"), None
    )
    kernel = np.asarray(layers.depthwise_conv(4096, 3).kernel[...])
    assert kernel.shape == (3, 3, 1, 4096)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 9), rtol=0.02)
    dense = np.asarray(layers.linear(64, 128).kernel[...])
    np.testing.assert_allclose(dense.std(), np.sqrt(2 / 128), rtol=0.05)


# --- gradients ----------------------------------------------------------------------

# Full networks of the last two families compile for most of a minute.
FAMILIES = {
    "pyramidnet": models.create("pyramidnet_11_a12", 10),
    "mobilenet": models.create("mobilenet", 10),
    "densenet": small_densenet(),
    "efficientnet": small_efficientnet(),
}
family = pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES)


@pytest.mark.slow
@family
def test_bfloat16_gradients_are_finite_at_initialisation(model, key):
    model = dataclasses.replace(model, dtype=jnp.dtype("bfloat16"))
    images = jax.random.normal(key, (4, 16, 16, 3))
    params, state = model.init(key, images)
    gradient = jax.jit(jax.value_and_grad(classification_loss(model), has_aux=True))
    (loss, state), grads = gradient(params, (images, jnp.arange(4)), state)
    assert 1 < loss < 6  # about log(10)
    for leaf in jax.tree.leaves((grads, state)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@family
def test_remat_changes_no_result(model):
    """In float64: BatchNorm of four single pixels blows up float32's rounding."""
    wide = jnp.dtype("float64")
    with jax.enable_x64(True):
        model = dataclasses.replace(model, dtype=wide, param_dtype=wide)
        params, state, images = draw(model, (4, 16, 16, 3))
        want, got = (
            jax.jit(jax.value_and_grad(classification_loss(m), has_aux=True))(
                params, (images, jnp.arange(4)), state
            )
            for m in (model, dataclasses.replace(model, remat=True))
        )
    assert_close(got, want, 1e-8)


@pytest.mark.slow
def test_remat_of_a_dense_network_takes_less_memory():
    """With the barriers in place, as on accelerators: see `models.create`."""
    model = small(DenseNet, stage_sizes=(8,), growth=4, stem="cifar")
    images = jax.ShapeDtypeStruct((64, 16, 16, 3), jnp.float32)
    params, state = shapes(model, images.shape)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    kept, recomputed = (
        jax.jit(jax.grad(classification_loss(m), has_aux=True))
        .lower(params, (images, labels), state)
        .compile(compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"})
        .memory_analysis()
        .temp_size_in_bytes
        for m in (model, dataclasses.replace(model, remat=True))
    )
    # What is kept is less since BatchNorm does without the difference to the mean.
    assert recomputed < 0.7 * kept
    assert recomputed < 40e6 and kept < 60e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet", "efficientnet_b0"])
def test_bfloat16_computes_convolutions_and_nothing_else(name):
    """Traced as for an accelerator, where all of them are XLA's."""
    model = models.create(name, 10, dtype=jnp.bfloat16)
    params, state = shapes(model, (2, 32, 32, 3))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        traced = jax.make_jaxpr(lambda *args: model.apply(*args, train=True))(
            params, state, images
        )
    convolutions = list(equations(traced.jaxpr, "conv_general_dilated"))
    assert len(convolutions) == sum(len(x.shape) == 4 for x in jax.tree.leaves(params))
    assert any(eqn.params["feature_group_count"] > 1 for eqn in convolutions)
    for eqn in convolutions:
        assert dtypes([v.aval for v in eqn.invars]) == {"bfloat16"}
    for primitive in ("rsqrt", "dot_general"):  # BatchNorm; gates, the classifier
        for eqn in equations(traced.jaxpr, primitive):
            assert dtypes([v.aval for v in eqn.invars]) == {"float32"}


@pytest.mark.slow
def test_stacked_members_equal_a_loop():
    """Depthwise kernels of two members in one `vmap`."""
    model = small_efficientnet()
    drawn = [as_float32(draw(model, (4, 8, 8, 3), seed)) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)

    @jax.jit
    def run(params, state, images):
        return model.apply(params, state, images, train=False)[0]

    together = jax.jit(jax.vmap(run))(*stacked)
    want = jnp.stack([run(*member) for member in drawn])
    np.testing.assert_allclose(together, want, rtol=1e-4, atol=1e-4)


# --- every family learns ------------------------------------------------------------


@pytest.fixture(scope="module")
def real_images():
    """32 images of CIFAR-10, averaged over 2x2 pixels to 16x16; their labels."""
    images, labels = real_cifar10(np.linspace(0, 49_999, 32).astype(int))
    assert len(set(labels.tolist())) == 10
    small = images.astype(np.float32).reshape(32, 16, 2, 16, 2, 3).mean((2, 4))
    return (small - small.mean()) / small.std(), labels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "learning_rate", "side"),
    [
        (models.create("cnn_small", 10), 0.02, 16),
        (models.create("resnet_10", 10), 0.003, 8),
        (models.create("wide_resnet_16_2", 10), 0.01, 8),
        # In place of pyramidnet_101, densenet_121 and efficientnet_b0, which compile
        # for longer.
        (FAMILIES["pyramidnet"], 0.01, 8),
        (
            small(DenseNet, stage_sizes=(2, 2, 2), growth=12, stem="cifar"),
            0.01,
            8,
        ),
        (models.create("mobilenet", 10), 0.003, 8),
        (FAMILIES["efficientnet"], 0.01, 8),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_overfits_real_images(model, learning_rate, side, real_images, key):
    """Adam fits 32 images of CIFAR-10 within 60 steps of the whole batch."""
    images, labels = real_images
    cut = 16 // side
    images = jnp.asarray(images.reshape(32, side, cut, side, cut, 3).mean((2, 4)))
    params, state = model.init(key, images)
    tx = optax.adam(learning_rate)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, state, opt_state):
        (loss, state), grads = jax.value_and_grad(
            classification_loss(model), has_aux=True
        )(params, (images, labels), state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, loss

    first = None
    for _ in range(60):
        params, state, opt_state, loss = step(params, state, opt_state)
        first = loss if first is None else first
        if loss < 0.1:
            break
    assert loss < 0.1 < 1.5 < first
