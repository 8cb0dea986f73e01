"""EfficientNet-B0: inverted bottlenecks with squeeze-and-excitation.

Two variants, by stem. "imagenet" is torchvision's `efficientnet_b0`: a 3x3 stem of
stride 2, and a 1x1 convolution to 1280 features before the pool. "cifar" is that of the
released code (https://github.com/kuangliu/pytorch-cifar): a stem of stride 1 and a
classifier that reads the 320 features of the last block. Its file also holds an
expansion that the first block never runs, 1,088 parameters that are left out here.

Dropout is before the classifier, where both variants have it, at a rate of 0 unless
asked for; theirs is 0.2. There is no stochastic depth, whose rate is 0 in the released
code and up to 0.2 in torchvision's.

Reference: Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks", ICML 2019.
"""

from typing import NamedTuple

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


class _Stage(NamedTuple):
    expansion: int
    channels: int
    kernel_size: int
    stride: int


_STAGES = (
    _Stage(1, 16, 3, 1),
    _Stage(6, 24, 3, 2),
    _Stage(6, 40, 5, 2),
    _Stage(6, 80, 3, 2),
    _Stage(6, 112, 5, 1),
    _Stage(6, 192, 5, 2),
    _Stage(6, 320, 3, 1),
)


class SqueezeExcite(nnx.Module):
    """Scales each channel by a function of all channels' means."""

    def __init__(self, layers: Layers, channels: int, squeezed: int):
        """Builds channels - squeezed - swish - channels - sigmoid."""
        self.reduce = layers.linear(channels, squeezed)
        self.expand = layers.linear(squeezed, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, channels) to the same shape."""
        means = global_average_pool(x)  # (B, channels), in float32
        gate = nnx.sigmoid(self.expand(nnx.swish(self.reduce(means))))
        return x * gate[:, None, None, :].astype(x.dtype)


class InvertedBottleneck(nnx.Module):
    """1x1 up - depthwise - squeeze-and-excitation - 1x1 down, plus the input."""

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        channels: int,
        expansion: int,
        kernel_size: int,
        stride: int,
    ):
        """Builds the block; `stride` is that of its depthwise convolution."""
        inner = expansion * in_channels
        self.expands = expansion != 1
        if self.expands:
            self.expand = layers.conv(in_channels, inner, 1)
            self.expand_norm = layers.batch_norm(inner)
        self.depthwise = layers.depthwise_conv(inner, kernel_size, stride)
        self.depthwise_norm = layers.batch_norm(inner)
        # A quarter of the block's own input, not of the expanded channels.
        self.excite = SqueezeExcite(layers, inner, in_channels // 4)
        self.project = layers.conv(inner, channels, 1)
        self.project_norm = layers.batch_norm(channels)
        self.adds = stride == 1 and in_channels == channels

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (B, H, W, in_channels) to (B, H / stride, W / stride, channels)."""
        y = x
        if self.expands:
            y = nnx.swish(self.expand_norm(self.expand(y), train=train))
        y = nnx.swish(self.depthwise_norm(self.depthwise(y), train=train))
        # The projection is linear: no activation follows it.
        y = self.project_norm(self.project(self.excite(y)), train=train)
        return x + y if self.adds else y


class EfficientNet(Chain):
    """The network: 3x3 stem of 32, seven stages, (1x1 to 1280,) pool, dense."""

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        num_classes: int,
        *,
        stage_sizes: tuple[int, ...],
        stem: str = "cifar",
        width: float = 1.0,
    ):
        """Builds the network of `stage_sizes` blocks a stage."""
        standard = stem == "imagenet"
        channels = widened(32, width)
        self.stem = layers.conv(in_channels, channels, 3, stride=2 if standard else 1)
        self.stem_norm = layers.batch_norm(channels)
        for number, (stage, size) in enumerate(
            zip(_STAGES, stage_sizes, strict=True), start=1
        ):
            out_channels = widened(stage.channels, width)
            for index in range(size):
                name = f"stage{number}_block{index + 1}"
                block = InvertedBottleneck(
                    layers,
                    channels,
                    out_channels,
                    stage.expansion,
                    stage.kernel_size,
                    stage.stride if index == 0 else 1,
                )
                self.add(name, block)
                channels = out_channels
        self.remat = layers.remat
        self.widens = standard
        if standard:
            last = widened(1280, width)
            self.last = layers.conv(channels, last, 1)
            self.last_norm = layers.batch_norm(last)
            channels = last
        self.dropout = layers.dropout()
        self.head = layers.dense(channels, num_classes)

    @staticmethod
    def check(
        stage_sizes: tuple[int, ...], stem: str = "cifar", width: float = 1.0
    ) -> None:
        """Raises ValueError unless the stem is known."""
        del stage_sizes  # the registry's
        check_width(width)
        check_word("stem", stem, _STEMS)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, num_classes)."""
        x = nnx.swish(self.stem_norm(self.stem(images), train=train))
        x = self.through_blocks(x, train=train)
        if self.widens:
            x = nnx.swish(self.last_norm(self.last(x), train=train))
        return self.head(self.dropout(global_average_pool(x), keys))
