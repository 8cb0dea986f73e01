"""Wide residual networks: pre-activated basic blocks, K times as wide as ResNet's.

`wide_resnet_D_K` has three stages of n = (D - 4) / 6 blocks and 16K, 32K, 64K channels.
The paper's tables name the 28x10; the code released with the paper runs the 34x10.

Reference: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, and its
implementation https://github.com/szagoruyko/wide-residual-networks. Dropout, 0 unless
asked for, is where both have it: before the second convolution of a block.
"""

import jax
from flax import nnx

from otmdr_jax.models.layers import Chain, Layers, global_average_pool


class WideBlock(nnx.Module):
    """BN - ReLU - 3x3 - BN - ReLU - dropout - 3x3, added to the input."""

    def __init__(self, layers: Layers, in_channels: int, channels: int, stride: int):
        """Builds the block; `stride` is that of its first convolution."""
        self.norm1 = layers.batch_norm(in_channels)
        self.conv1 = layers.conv(in_channels, channels, 3, stride)
        self.norm2 = layers.batch_norm(channels)
        self.dropout = layers.dropout()
        self.conv2 = layers.conv(channels, channels, 3)
        self.shortcut = (
            layers.conv(in_channels, channels, 1, stride)
            if stride != 1 or in_channels != channels
            else None
        )

    def __call__(
        self, x: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps (B, H, W, in_channels) to (B, H / stride, W / stride, channels)."""
        activated = nnx.relu(self.norm1(x, train=train))
        y = self.conv1(activated)
        y = self.dropout(nnx.relu(self.norm2(y, train=train)), keys)
        y = self.conv2(y)
        # A projection sees the activated input, as in the reference; an identity
        # passes the raw one, so that the residual stream is never rectified.
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(Chain):
    """The network: 3x3 stem of 16 channels, three stages, BN - ReLU - pool - dense."""

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        num_classes: int,
        *,
        depth: int,
        width: int,
    ):
        """Builds the network of `depth` layers, `width` times as wide as ResNet's."""
        self.stem = layers.conv(in_channels, 16, 3)
        channels = 16
        for stage, stride in enumerate((1, 2, 2)):
            for index in range((depth - 4) // 6):
                name = f"stage{stage + 1}_block{index + 1}"
                out_channels = 16 * width * 2**stage
                block_stride = stride if index == 0 else 1
                block = WideBlock(layers, channels, out_channels, block_stride)
                self.add(name, block)
                channels = out_channels
        self.remat = layers.remat
        self.norm = layers.batch_norm(channels)
        self.head = layers.dense(channels, num_classes)

    @staticmethod
    def check(depth: int, width: int) -> None:
        """Raises ValueError unless the depth and the width are legal."""
        if depth < 10 or depth % 6 != 4:
            below = max(10, depth - (depth - 4) % 6)
            raise ValueError(
                "A wide residual network's depth must be 6n + 4 (10, 16, 22, 28, ...): "
                f"three stages of n blocks of two convolutions; got {depth=}. "
                f"Try depth {below} or {below + 6}."
            )
        if width < 1:
            raise ValueError(
                "A wide residual network's width must be at least 1 (1 is as wide as "
                f"ResNet), got {width=}."
            )

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, num_classes)."""
        x = self.stem(images)
        x = self.through_blocks(x, train=train, keys=keys)
        x = nnx.relu(self.norm(x, train=train))
        return self.head(global_average_pool(x))
