"""A small convolutional network with BatchNorm, for small images and for a CPU.

Three convolutions and a global average pool: 14,458 parameters for grey images of 10
classes (8x8 digits, 28x28 MNIST), enough to tell robust training from plain training
in seconds. Not from the paper. Dropout, 0 unless asked for, is before each convolution
but the first, as in a block of a wide residual network: our choice.
"""

import jax
from flax import nnx

from otmdr_jax.models.layers import Layers, global_average_pool


class SmallCNN(nnx.Module):
    """3x3 of 16, 3x3 of 32 with stride 2, 3x3 of 32, each BN - ReLU; pool, dense."""

    def __init__(self, layers: Layers, in_channels: int, num_classes: int):
        self.conv1 = layers.conv(in_channels, 16, 3)
        self.norm1 = layers.batch_norm(16)
        self.dropout2, self.dropout3 = layers.dropout(), layers.dropout()
        self.conv2 = layers.conv(16, 32, 3, stride=2)
        self.norm2 = layers.batch_norm(32)
        self.conv3 = layers.conv(32, 32, 3)
        self.norm3 = layers.batch_norm(32)
        self.head = layers.dense(32, num_classes)
        self.remat = layers.remat

    @staticmethod
    def check() -> None:
        """Does nothing: there are no options."""

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, num_classes)."""

        def call(conv, norm, x):
            return nnx.relu(norm(conv(x), train=train))

        if self.remat:  # only the input of each layer is kept for the backward pass
            call = nnx.remat(call)
        x = call(self.conv1, self.norm1, images)
        x = call(self.conv2, self.norm2, self.dropout2(x, keys))
        x = call(self.conv3, self.norm3, self.dropout3(x, keys))
        return self.head(global_average_pool(x))
