"""The layers of all families, with one place for dtypes, random streams and dropout."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from otmdr_jax.core.checks import check_number
from otmdr_jax.models.convolution import convolve
from otmdr_jax.models.depthwise import convolve_depthwise
from otmdr_jax.models.dropout import Dropout

# PyTorch's default, whose momentum of 0.1 is the weight of the new batch; also
# Torch7's.
BATCHNORM_MOMENTUM = 0.9

# He et al. 2015, "Delving deep into rectifiers", eq. 14: std = sqrt(2 / fan_out), not
# truncated, as Zagoruyko's `MSRinit` and torchvision's `kaiming_normal_(fan_out)`.
_conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# Torch's default for a linear layer: uniform within +-1/sqrt(fan_in), since
# variance_scaling draws within +-sqrt(3 * scale / fan_in). The bias is 0, as in
# Zagoruyko's `FCinit`.
_dense_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class BatchNorm(nnx.BatchNorm):
    """BatchNorm that takes `train` at each call and keeps the dtype of its input.

    Statistics and normalisation are in (at least) float32; only the result is rounded
    to the compute dtype, so that bfloat16 activations take half the memory. The
    running variance averages the biased batch variance; PyTorch's averages the
    unbiased one, larger by 1 / (B H W - 1).

    The result is `x * factor + shift`, with one factor and one shift a channel. Flax's
    `(x - mean) * factor + bias` would keep `x - mean` beside x for the backward pass,
    which on CPUs is a quarter of a step's memory.
    """

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # type: ignore[override]
        """Normalises x: (..., channels).

        Raises:
          ValueError: It trains on one value a channel, whose variance is 0.
        """
        if train and self.axis_name is None and math.prod(x.shape[:-1]) == 1:
            raise ValueError(
                "BatchNorm needs two values a channel to train on, got an input of "
                f"{x.shape}, (images, height, width, channels): its output would be "
                "its bias whatever the image. Train on more images, or larger ones, in "
                "each pass (parts, micro-batches and devices divide a batch)."
            )
        wide = x.astype(self.dtype)
        if train:
            mean, var = self._moments(wide)
            for running, new in ((self.mean, mean), (self.var, var)):
                moved = self.momentum * running[...] + (1 - self.momentum) * new
                running[...] = jax.lax.stop_gradient(moved)
        else:
            mean, var = self.mean[...], self.var[...]
        variables: Any = mean, var, self.scale, self.bias
        mean, var, scale, bias = (a[...].astype(self.dtype) for a in variables)
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        factor, shift = (
            a.reshape((1,) * (x.ndim - 1) + a.shape)
            for a in (factor, bias - mean * factor)
        )
        return (wide * factor + shift).astype(x.dtype)

    def _moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The batch's mean and variance by channel, over the named axis if any."""
        axes = tuple(range(x.ndim - 1))
        moments = x.mean(axes), jnp.square(x).mean(axes)
        if self.axis_name is not None:  # together, in one exchange
            moments = tuple(jax.lax.pmean(jnp.stack(moments), self.axis_name))
        mean, square = moments
        return mean, jnp.maximum(0.0, square - jnp.square(mean))


def widened(channels: int, width: float) -> int:
    """The channels of a layer in a network of another width: at least 4."""
    return max(4, round(channels * width))


def check_width(width: float) -> None:
    """Raises ValueError or TypeError unless it is a positive number."""
    check_number("width", width)
    if not width > 0:
        raise ValueError(
            f"width must be above 0, what channels are multiplied by, got {width}."
        )


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the layers of one network, all with its dtypes and random stream.

    Attributes:
      rngs: The random stream of the initial weights.
      dtype: The dtype of convolutions and activations.
      param_dtype: The dtype of the parameters.
      batchnorm_axis_name: Name of the axis that shares batch statistics, or None.
      remat: True if blocks are recomputed in the backward pass.
      rate: The rate of dropout.
      sites: The numbers of the places where activations are dropped.
    """

    rngs: nnx.Rngs
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    batchnorm_axis_name: str | None
    remat: bool = False
    rate: float = 0.0
    sites: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> nnx.Conv:
        """A square convolution without bias: BatchNorm's bias follows it."""
        return self._conv(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_init=_conv_init,
            conv_general_dilated=convolve,
        )

    def depthwise_conv(
        self, channels: int, kernel_size: int, stride: int = 1
    ) -> nnx.Conv:
        """A square convolution of each channel with its own kernel, without bias."""
        return self._conv(
            channels,
            channels,
            kernel_size,
            stride,
            feature_group_count=channels,
            # An input reaches kernel_size^2 outputs, those of its channel, which is
            # fan_out in He's derivation. Torchvision's counts all channels' outputs,
            # and starts sqrt(channels) times smaller.
            kernel_init=nnx.initializers.normal(math.sqrt(2.0) / kernel_size),
            conv_general_dilated=convolve_depthwise,
        )

    def _conv(self, in_channels, out_channels, kernel_size, stride, **options):
        # Symmetric as in PyTorch. "SAME" would pad a stride of 2 on one side only,
        # which shifts the features by a pixel against the reference.
        pad = (kernel_size - 1) // 2
        return nnx.Conv(
            in_channels,
            out_channels,
            kernel_size=(kernel_size, kernel_size),
            strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
            **options,
        )

    def linear(
        self, in_features: int, out_features: int, kernel_init: Any = _conv_init
    ) -> nnx.Linear:
        """A linear layer of pooled features, in float32, like a 1x1 convolution."""
        return nnx.Linear(
            in_features,
            out_features,
            dtype=at_least_float32(self.dtype),
            param_dtype=self.param_dtype,
            kernel_init=kernel_init,
            bias_init=nnx.initializers.zeros_init(),
            rngs=self.rngs,
        )

    def dense(self, in_features: int, num_classes: int) -> nnx.Linear:
        """The classifier, in float32, which costs little beside the convolutions."""
        return self.linear(in_features, num_classes, _dense_init)

    def batch_norm(self, channels: int) -> BatchNorm:
        """BatchNorm with scale 1 and bias 0."""
        return BatchNorm(
            channels,
            momentum=BATCHNORM_MOMENTUM,
            epsilon=1e-5,
            dtype=at_least_float32(self.dtype),
            param_dtype=self.param_dtype,
            axis_name=self.batchnorm_axis_name,
            rngs=self.rngs,
        )

    def dropout(self) -> Dropout:
        """A place where activations are dropped, with its own random bits."""
        return Dropout(self.rate, next(self.sites))


class Chain(nnx.Module):
    """A network with blocks in a row, each recomputed in the backward pass on request.

    Attributes:
      remat: True if only the input of each block is kept for the backward pass.
      blocks: The names of the blocks, in the order of the calls. Names, not an
        `nnx.List`: integer keys would come back from a checkpoint as strings.
    """

    remat: bool = False
    blocks: tuple[str, ...] = ()

    def add(self, name: str, block: nnx.Module) -> None:
        """Adds a block at the end."""
        setattr(self, name, block)
        self.blocks = (*self.blocks, name)

    def through_blocks(self, x: jax.Array, *, train: bool, **keys: Any) -> jax.Array:
        """Calls all blocks, with `keys=` if they have dropout."""

        def call(block, x, keys):
            return block(x, train=train, **keys)

        if self.remat:
            call = nnx.remat(call)
        for name in self.blocks:
            x = call(getattr(self, name), x, keys)
        return x


def global_average_pool(x: jax.Array) -> jax.Array:
    """Averages x: (B, H, W, C) over its pixels in float32: (B, C)."""
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # JAX 0.12's XLA may fuse this sum with what made x, and give NaN:
        # docs/architecture.md, Versions.
        x = jax.lax.optimization_barrier(x)
    return jnp.mean(x, axis=(1, 2), dtype=at_least_float32(x.dtype))


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32 or what is wider: float64 stays, for checks by finite differences."""
    return jnp.promote_types(dtype, jnp.float32)
