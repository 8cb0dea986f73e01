"""Densely connected networks: a layer sees the features of all layers before it.

`densenet_121` has stages of 6, 12, 24 and 16 layers, each of which adds 32 channels
(growth), and halves channels and sides between stages.

Its default is the ImageNet stem (7x7, stride 2, max-pool), unlike the other families':
the paper's Table 2 and the count of its parameters, 6,964,106 for 10 classes, are of
that network. The CIFAR stem (3x3, stride 1, no pooling) is the usual one for 32x32
images, as in https://github.com/kuangliu/pytorch-cifar.

Dropout, 0 unless asked for, is after each convolution but the stem, as in the paper
(section 4.2) and its code; torchvision has it after the 3x3 convolutions alone.

Reference: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017;
https://github.com/liuzhuang13/DenseNet; torchvision's `densenet121`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from otmdr_jax.core.checks import check_word
from otmdr_jax.models.layers import Layers, check_width, global_average_pool, widened

_STEMS = ("cifar", "imagenet")


class DenseLayer(nnx.Module):
    """BN - ReLU - 1x1 - BN - ReLU - 3x3 of all features so far: `growth` new ones."""

    def __init__(self, layers: Layers, in_channels: int, growth: int):
        """Builds the layer; the 1x1 convolution has 4 growth channels."""
        self.norm1 = layers.batch_norm(in_channels)
        self.conv1 = layers.conv(in_channels, 4 * growth, 1)
        self.norm2 = layers.batch_norm(4 * growth)
        self.conv2 = layers.conv(4 * growth, growth, 3)
        self.dropout1, self.dropout2 = layers.dropout(), layers.dropout()

    def __call__(
        self,
        features: tuple[jax.Array, ...],
        *,
        train: bool,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Maps arrays of in_channels in all to (B, H, W, growth)."""
        # Joined here, so that recomputation keeps the parts, which layers share, and
        # not a copy of all features a layer.
        x = jnp.concatenate(features, axis=-1)
        y = self.dropout1(self.conv1(nnx.relu(self.norm1(x, train=train))), keys)
        y = self.conv2(nnx.relu(self.norm2(y, train=train)))
        return self.dropout2(y, keys)


class Transition(nnx.Module):
    """BN - ReLU - 1x1 to half the channels - 2x2 average."""

    def __init__(self, layers: Layers, in_channels: int):
        self.norm = layers.batch_norm(in_channels)
        self.conv = layers.conv(in_channels, in_channels // 2, 1)
        self.dropout = layers.dropout()

    def __call__(
        self, x: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps (B, H, W, in_channels) to (B, H // 2, W // 2, in_channels // 2)."""
        x = self.dropout(self.conv(nnx.relu(self.norm(x, train=train))), keys)
        return nnx.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNet(nnx.Module):
    """The network: stem of 2 growth, stages and transitions, BN - ReLU, pool, dense."""

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        num_classes: int,
        *,
        stage_sizes: tuple[int, ...],
        growth: int,
        stem: str = "imagenet",
        width: float = 1.0,
    ):
        """Builds the network of `stage_sizes` layers a stage."""
        self.downsamples = stem == "imagenet"
        growth = widened(growth, width)
        channels = 2 * growth
        self.stem = (
            layers.conv(in_channels, channels, 7, stride=2)
            if self.downsamples
            else layers.conv(in_channels, channels, 3)
        )
        self.stem_norm = layers.batch_norm(channels)
        for stage, size in enumerate(stage_sizes, start=1):
            for index in range(1, size + 1):
                layer = DenseLayer(layers, channels, growth)
                setattr(self, f"stage{stage}_layer{index}", layer)
                channels += growth
            if stage < len(stage_sizes):
                setattr(self, f"transition{stage}", Transition(layers, channels))
                channels //= 2
        self.stage_sizes = stage_sizes
        self.remat = layers.remat
        self.norm = layers.batch_norm(channels)
        self.head = layers.dense(channels, num_classes)

    @staticmethod
    def check(
        stage_sizes: tuple[int, ...],
        growth: int,
        stem: str = "imagenet",
        width: float = 1.0,
    ) -> None:
        """Raises ValueError unless the stem is known."""
        del stage_sizes, growth  # the registry's
        check_width(width)
        check_word("stem", stem, _STEMS)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, num_classes)."""
        x = nnx.relu(self.stem_norm(self.stem(images), train=train))
        if self.downsamples:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

        def call(layer, features, keys):
            return layer(features, train=train, keys=keys)

        if self.remat:  # only the new features of each layer are kept
            call = nnx.remat(call)
        for stage, size in enumerate(self.stage_sizes, start=1):
            features: tuple[jax.Array, ...] = (x,)
            for index in range(1, size + 1):
                layer = getattr(self, f"stage{stage}_layer{index}")
                features = (*features, call(layer, features, keys))
            x = jnp.concatenate(features, axis=-1)
            if stage < len(self.stage_sizes):
                x = call(getattr(self, f"transition{stage}"), x, keys)
        x = nnx.relu(self.norm(x, train=train))
        return self.head(global_average_pool(x))
