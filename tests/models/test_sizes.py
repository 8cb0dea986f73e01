"""Networks of another width, depth and input size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otmdr_jax import models
from tests.marks import slow_but
from tests.zoo import assert_close

WIDE = ("resnet_10", "resnet_18", "densenet_121", "mobilenet", "efficientnet_b0")


def leaves(name, **options):
    model = models.create(name, 10, **options)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params, _ = jax.eval_shape(lambda k: model.init(k, images), jax.random.key(0))
    return {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.parametrize(
    "name", slow_but(["resnet_10", "resnet_18", "mobilenet"], WIDE)
)
def test_width_divides_the_channels_of_every_layer(name):
    whole, quarter = leaves(name), leaves(name, width=0.25)
    assert whole.keys() == quarter.keys()
    for path, shape in whole.items():
        if "head" in path and "bias" in path:
            assert quarter[path] == shape  # the classes
        elif name != "efficientnet_b0":  # whose channels no quarter divides
            for one, other in zip(shape[-2:], quarter[path][-2:], strict=True):
                assert other in (one, one / 4) or one == 10
    assert leaves(name, width=1.0) == whole


def test_channels_are_rounded_and_never_fewer_than_four():
    found = leaves("efficientnet_b0", width=0.1)
    # 32, 16, 24 and 320 channels, a tenth of them: 3.2, 1.6, 2.4 and 32.
    assert found["['stem']['kernel']"] == (3, 3, 3, 4)
    assert found["['stage1_block1']['project']['kernel']"][-1] == 4
    assert found["['head']['kernel']"] == (32, 10)


def test_a_quarter_of_the_width_is_about_a_sixteenth_of_the_operations():
    def operations(**options):
        model = models.create("resnet_18", 10, **options)
        shape = (32, 32, 3)
        params, _ = jax.eval_shape(
            lambda k: model.init(k, jax.ShapeDtypeStruct((1, *shape), jnp.float32)),
            jax.random.key(0),
        )
        kernels = {
            "/".join(k.key for k in path): leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        positions = models.output_positions(model, shape)
        return sum(count * kernels[name] for name, count in positions.items())

    assert operations() / operations(width=0.25) == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize(("depth", "layers"), [(13, 1), (21, 2)])
def test_dense_networks_of_equal_stages(depth, layers):
    found = leaves(f"densenet_{depth}", stem="cifar")
    for stage in range(1, 5):
        names = {path.split("'")[1] for path in found if f"stage{stage}_" in path}
        assert names == {f"stage{stage}_layer{i + 1}" for i in range(layers)}
    # Convolutions and the classifier: the depth.
    assert sum("kernel" in path for path in found) == depth


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("densenet_22", {}, "8n \\+ 5"),
        ("densenet_5", {}, "8n \\+ 5"),
        ("resnet_10", {"width": 0.0}, "width must be above 0"),
        ("resnet_10", {"width": -1.0}, "width"),
        ("resnet_10", {"input_size": 0}, "input_size"),
    ],
)
def test_sizes_that_cannot_be(name, options, match):
    with pytest.raises(ValueError, match=match):
        models.create(name, 10, **options)


@pytest.mark.parametrize("name", ["wide_resnet_10_1", "pyramidnet_11_a4", "cnn_small"])
def test_width_is_in_the_name_or_nowhere(name):
    with pytest.raises(TypeError, match="width"):
        models.create(name, 10, width=0.5)


def np_bilinear(images, size):
    """Each output pixel by the four inputs around its center, in float64."""
    _, height, width, _ = images.shape
    out = np.zeros((len(images), size, size, images.shape[3]))
    for i in range(size):
        for j in range(size):
            y = np.clip((i + 0.5) * height / size - 0.5, 0, height - 1)
            x = np.clip((j + 0.5) * width / size - 0.5, 0, width - 1)
            top, left = int(y), int(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            v, u = y - top, x - left
            out[:, i, j] = (1 - v) * (
                (1 - u) * images[:, top, left] + u * images[:, top, right]
            ) + v * ((1 - u) * images[:, below, left] + u * images[:, below, right])
    return out


@pytest.mark.parametrize("train", [True, False])
def test_input_size_is_bilinear_resizing(key, train):
    images = np.random.default_rng(0).normal(size=(4, 6, 6, 1))
    plain = models.create("cnn_small", 10)
    resizes = models.create("cnn_small", 10, input_size=14)
    params, state = resizes.init(key, jnp.zeros((1, 6, 6, 1)))
    expected, moved = plain.apply(
        params, state, jnp.asarray(np_bilinear(images, 14), jnp.float32), train=train
    )
    logits, found = resizes.apply(
        params, state, jnp.asarray(images, jnp.float32), train=train
    )
    assert_close(logits, expected, 1e-5)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, moved)


def test_operations_are_counted_at_the_input_size():
    model = models.create("cnn_small", 10, input_size=16)
    assert models.output_positions(model, (8, 8, 1)) == models.output_positions(
        models.create("cnn_small", 10), (16, 16, 1)
    )
