"""Residual networks of basic blocks, with a stem for CIFAR or for ImageNet.

Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. The
ImageNet stem is torchvision's; the CIFAR stem (3x3, stride 1, no pooling) and a 1x1
convolution with BatchNorm on each shortcut that changes shape are the variant in
common use for 32x32 images (https://github.com/kuangliu/pytorch-cifar). Neither drops
activations; where asked to, these do as wide residual networks do, before the second
convolution of a block.
"""

import jax
from flax import nnx

from otmdr_jax.core.checks import check_word
from otmdr_jax.models.layers import (
    Chain,
    Layers,
    check_width,
    global_average_pool,
    widened,
)

_STEMS = ("cifar", "imagenet")
# softplus is what the code released with Nguyen et al., 2023 has in Bayesian networks.
_ACTIVATIONS = {"relu": nnx.relu, "softplus": nnx.softplus}


class BasicBlock(nnx.Module):
    """3x3 - BN - ReLU - dropout - 3x3 - BN, added to the input, then ReLU."""

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        channels: int,
        stride: int,
        activation: str = "relu",
    ):
        """Builds the block; `stride` is that of its first convolution."""
        self.activation = activation
        self.conv1 = layers.conv(in_channels, channels, 3, stride)
        self.norm1 = layers.batch_norm(channels)
        self.dropout = layers.dropout()
        self.conv2 = layers.conv(channels, channels, 3)
        self.norm2 = layers.batch_norm(channels)
        self.projects = stride != 1 or in_channels != channels
        if self.projects:
            self.shortcut = layers.conv(in_channels, channels, 1, stride)
            self.shortcut_norm = layers.batch_norm(channels)

    def __call__(
        self, x: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps (B, H, W, in_channels) to (B, H / stride, W / stride, channels)."""
        activate = _ACTIVATIONS[self.activation]
        y = activate(self.norm1(self.conv1(x), train=train))
        y = self.norm2(self.conv2(self.dropout(y, keys)), train=train)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), train=train)
        return activate(y + x)


class ResNet(Chain):
    """The network: a stem of 64 channels, stages of 64, 128, ..., pool, dense."""

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        num_classes: int,
        *,
        stage_sizes: tuple[int, ...],
        stem: str = "cifar",
        activation: str = "relu",
        width: float = 1.0,
    ):
        """Builds the network of `stage_sizes` blocks a stage."""
        self.activation = activation
        self.downsamples = stem == "imagenet"
        channels = widened(64, width)
        self.stem = (
            layers.conv(in_channels, channels, 7, stride=2)
            if self.downsamples
            else layers.conv(in_channels, channels, 3)
        )
        self.stem_norm = layers.batch_norm(channels)
        for stage, size in enumerate(stage_sizes):
            for index in range(size):
                name = f"stage{stage + 1}_block{index + 1}"
                out_channels = widened(64 * 2**stage, width)
                stride = 2 if stage > 0 and index == 0 else 1
                block = BasicBlock(layers, channels, out_channels, stride, activation)
                self.add(name, block)
                channels = out_channels
        self.remat = layers.remat
        self.head = layers.dense(channels, num_classes)

    @staticmethod
    def check(
        stage_sizes: tuple[int, ...],
        stem: str = "cifar",
        activation: str = "relu",
        width: float = 1.0,
    ) -> None:
        """Raises ValueError unless the stem and the activation are known."""
        del stage_sizes  # the registry's
        check_width(width)
        check_word("stem", stem, _STEMS)
        check_word("activation", activation, tuple(_ACTIVATIONS))

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, num_classes)."""
        activate = _ACTIVATIONS[self.activation]
        x = activate(self.stem_norm(self.stem(images), train=train))
        if self.downsamples:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        x = self.through_blocks(x, train=train, keys=keys)
        return self.head(global_average_pool(x))
