"""MobileNet, version 1: depthwise-separable convolutions, for 32x32 images.

The stem keeps the side (3x3, stride 1) and the first of the original's five strides of
2 is left out, so that 32x32 images come to 2x2.

Reference: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for
Mobile Vision Applications", 2017 (https://arxiv.org/abs/1704.04861); the variant for
CIFAR is that of https://github.com/kuangliu/pytorch-cifar, as in the released code.
Dropout, 0 unless asked for, is before the classifier, as in TF-Slim's `mobilenet_v1`.
"""

import jax
from flax import nnx

from otmdr_jax.models.layers import (
    Chain,
    Layers,
    check_width,
    global_average_pool,
    widened,
)

# Channels and stride of each block.
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


class SeparableBlock(nnx.Module):
    """3x3 of each channel - BN - ReLU - 1x1 - BN - ReLU."""

    def __init__(self, layers: Layers, in_channels: int, channels: int, stride: int):
        """Builds the block; `stride` is that of its depthwise convolution."""
        self.conv1 = layers.depthwise_conv(in_channels, 3, stride)
        self.norm1 = layers.batch_norm(in_channels)
        self.conv2 = layers.conv(in_channels, channels, 1)
        self.norm2 = layers.batch_norm(channels)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (B, H, W, in_channels) to (B, H / stride, W / stride, channels)."""
        x = nnx.relu(self.norm1(self.conv1(x), train=train))
        return nnx.relu(self.norm2(self.conv2(x), train=train))


class MobileNet(Chain):
    """The network: 3x3 stem of 32 - BN - ReLU, 13 blocks, pool, dense."""

    def __init__(
        self, layers: Layers, in_channels: int, num_classes: int, *, width: float = 1.0
    ):
        channels = widened(32, width)
        self.stem = layers.conv(in_channels, channels, 3)
        self.stem_norm = layers.batch_norm(channels)
        for index, (out_channels, stride) in enumerate(_BLOCKS):
            name = f"block{index + 1}"
            out_channels = widened(out_channels, width)
            block = SeparableBlock(layers, channels, out_channels, stride)
            self.add(name, block)
            channels = out_channels
        self.remat = layers.remat
        self.dropout = layers.dropout()
        self.head = layers.dense(channels, num_classes)

    @staticmethod
    def check(width: float = 1.0) -> None:
        """Raises ValueError unless the width is positive."""
        check_width(width)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, num_classes)."""
        x = nnx.relu(self.stem_norm(self.stem(images), train=train))
        x = self.through_blocks(x, train=train)
        return self.head(self.dropout(global_average_pool(x), keys))
