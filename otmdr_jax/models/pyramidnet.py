"""Pyramidal residual networks: every block is a little wider than the one before.

`pyramidnet_D_aA` has three stages of n = (D - 2) / 9 bottlenecks. The k-th of all 3n
has round(16 + k A / 3n) channels inside and four times as many at its output, so that
the width grows by A in all (additive). `pyramidnet_101` is D = 101 and A = 64.

Reference: Han et al., "Deep Pyramidal Residual Networks", CVPR 2017, and its
implementation https://github.com/dyhan0920/PyramidNet-PyTorch. Neither drops
activations; where asked to, these do before each convolution of a block but its first,
which is the rule of wide residual networks for a block of three.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from otmdr_jax.models.layers import Chain, Layers, global_average_pool

_EXPANSION = 4


class PyramidBottleneck(nnx.Module):
    """BN - 1x1 - BN - ReLU - 3x3 - BN - ReLU - 1x1 - BN, added to the input."""

    def __init__(self, layers: Layers, in_channels: int, width: int, stride: int):
        """Builds the block; `stride` is that of its 3x3 convolution."""
        self.norm1 = layers.batch_norm(in_channels)
        self.conv1 = layers.conv(in_channels, width, 1)
        self.norm2 = layers.batch_norm(width)
        self.dropout2 = layers.dropout()
        self.conv2 = layers.conv(width, width, 3, stride)
        self.norm3 = layers.batch_norm(width)
        self.dropout3 = layers.dropout()
        self.conv3 = layers.conv(width, _EXPANSION * width, 1)
        self.norm4 = layers.batch_norm(_EXPANSION * width)
        self.stride = stride

    def __call__(
        self, x: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps (B, H, W, in_channels) to (B, H / stride, W / stride, 4 width)."""
        y = self.conv1(self.norm1(x, train=train))
        y = self.dropout2(nnx.relu(self.norm2(y, train=train)), keys)
        y = self.dropout3(nnx.relu(self.norm3(self.conv2(y), train=train)), keys)
        y = self.conv3(y)
        y = self.norm4(y, train=train)
        if self.stride != 1:
            x = _average_pool(x, self.stride)
        # No projection: the channels that the shortcut lacks are zeros.
        missing = y.shape[-1] - x.shape[-1]
        return y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))


def _average_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages windows of size x size; one that the border cuts, over what is left."""
    pads = tuple((0, -side % size) for side in x.shape[1:3])
    return nnx.avg_pool(
        x, (size, size), strides=(size, size), padding=pads, count_include_pad=False
    )


class PyramidNet(Chain):
    """The network: 3x3 stem of 16 - BN, three stages, BN - ReLU - pool - dense."""

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        num_classes: int,
        *,
        depth: int,
        alpha: int,
    ):
        """Builds the network of `depth` layers, `alpha` wider at its end."""
        self.stem = layers.conv(in_channels, 16, 3)
        self.stem_norm = layers.batch_norm(16)
        size = (depth - 2) // 9
        channels = 16
        for stage, stride in enumerate((1, 2, 2)):
            for index in range(size):
                name = f"stage{stage + 1}_block{index + 1}"
                grown = stage * size + index + 1
                width = round(16 + alpha * grown / (3 * size))
                block_stride = stride if index == 0 else 1
                block = PyramidBottleneck(layers, channels, width, block_stride)
                self.add(name, block)
                channels = _EXPANSION * width
        self.remat = layers.remat
        self.norm = layers.batch_norm(channels)
        self.head = layers.dense(channels, num_classes)

    @staticmethod
    def check(depth: int, alpha: int) -> None:
        """Raises ValueError unless the depth and alpha are legal."""
        if depth < 11 or depth % 9 != 2:
            below = max(11, depth - (depth - 2) % 9)
            raise ValueError(
                "A pyramidal network's depth must be 9n + 2 (11, 20, 29, ..., 101, "
                "...): three stages of n bottlenecks of three convolutions; got "
                f"{depth=}. Try depth {below} or {below + 9}."
            )
        if alpha < 1:
            raise ValueError(
                "A pyramidal network's alpha, the channels that it gains from its "
                f"first block to its last, must be at least 1, got {alpha=}."
            )

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, num_classes)."""
        x = self.stem_norm(self.stem(images), train=train)
        x = self.through_blocks(x, train=train, keys=keys)
        x = nnx.relu(self.norm(x, train=train))
        return self.head(global_average_pool(x))
