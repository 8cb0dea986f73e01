"""What the tests of the model zoo share: layers in NumPy, drawn weights, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from otmdr_jax import models

# --- NumPy reference: float64, explicit padding, no code of the package -------------


def np_conv(x, kernel, stride=1):
    size = kernel.shape[0]
    pad = (size - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]  # (B, H', W', C, k, k)
    return np.tensordot(windows, kernel, axes=((3, 4, 5), (2, 0, 1)))


def np_max_pool(x):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].max(axis=(-2, -1))


def np_norm(x, params, state, train):
    """Returns the normalised x and the running statistics afterwards."""
    mean, var = state["mean"], state["var"]
    if train:
        mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    y = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    if not train:
        return y, state
    moved = {
        "mean": 0.9 * state["mean"] + 0.1 * mean,
        "var": 0.9 * state["var"] + 0.1 * var,
    }
    return y, moved


def np_relu(x):
    return np.maximum(x, 0)


def np_head(x, params):
    return x.mean(axis=(1, 2)) @ params["kernel"] + params["bias"]


# --- a network of one layer ---------------------------------------------------------


class OneLayer(nnx.Module):
    """What all of them have, once: for runs in which the network is not the point."""

    def __init__(self, layers, in_channels, num_classes):
        self.conv1 = layers.conv(in_channels, 8, 3, stride=2)
        self.norm1 = layers.batch_norm(8)
        self.dropout = layers.dropout()
        self.head = layers.dense(4 * 8, num_classes)

    @staticmethod
    def check():
        """Has no options to check."""

    def __call__(self, images, *, train, keys=None):
        x = nnx.relu(self.norm1(self.conv1(images), train=train))
        x = self.dropout(x, keys)
        # The mean of each quarter: where something is tells digits apart in few steps.
        n, height, width, channels = x.shape
        x = x.reshape(n, 2, height // 2, 2, width // 2, channels).mean((2, 4))
        return self.head(x.reshape(n, -1))


# What a process of its own does first, so that it knows the network by a name too.
WITH_ONE_LAYER = """
from otmdr_jax import models
from tests.zoo import OneLayer
models._REGISTRY["one_layer"] = (OneLayer, {})
"""

# --- helpers ------------------------------------------------------------------------


def shapes(model, image_shape):
    return jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct(image_shape, jnp.float32)
    )


def draw(model, image_shape, seed=0):
    """Parameters, statistics and images that leave nothing at 0 or 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        if path[-1].key == "kernel":
            scale = np.sqrt(2 / np.prod(like.shape[:-1]))
            return rng.normal(0, scale, like.shape)
        if path[-1].key == "var":
            return rng.uniform(0.5, 2.0, like.shape)
        shift = 1.0 if path[-1].key == "scale" else 0.0
        return shift + rng.normal(0, 0.2, like.shape)

    trees = jax.tree.map_with_path(leaf, shapes(model, image_shape))
    return *trees, rng.normal(size=image_shape)


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def equations(jaxpr, primitive):
    """All equations of a primitive, those of inner functions included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive:
            yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner, primitive)


apply = jax.jit(models.Model.apply, static_argnums=0, static_argnames="train")


def classification_loss(model):
    def loss(params, batch, state):
        images, labels = batch
        logits, state = model.apply(params, state, images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), state

    return loss


def kept_and_recomputed(name, dtype=jnp.float32, size=8):
    """A loss without and one with remat; parameters, a batch and statistics."""
    plain = models.create(name, 5, dtype=dtype)
    lean = models.create(name, 5, dtype=dtype, remat=True)
    assert plain != lean
    assert shapes(plain, (2, 8, 8, 3)) == shapes(lean, (2, 8, 8, 3))
    params, state, images = as_float32(draw(plain, (size, 8, 8, 3)))
    batch = (images, jnp.arange(size) % 5)
    return map(classification_loss, (plain, lean)), (params, batch, state)


def assert_close(got, want, tolerance):
    """Leaves differ by at most a share of the norm of the leaf."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        scale = np.linalg.norm(np.asarray(b, np.float64)) + 1e-3
        assert np.linalg.norm(np.asarray(a - b, np.float64)) <= tolerance * scale
