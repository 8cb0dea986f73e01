"""A depthwise convolution that is fast on CPUs, and XLA's own everywhere else.

Each channel has its own kernel. XLA has no fast code for that on CPUs: its gradients
are slower than those of a dense convolution, and in a loop slower by one or two orders
of magnitude (figures in docs/performance.md). Written out, the convolution is

    out[b, h, w, c] = sum_ij images[b, s h + i, s w + j, c] kernel[i, j, c]

over the k^2 taps (i, j): strided slices of the padded images, each times a row of the
kernel. These are element-wise operations, which XLA fuses and vectorises over channels,
with derivatives of their kind in any order and mode, batched over kernels or in a loop.

They are used where CPUs are JAX's default backend when the program is traced; elsewhere
programs are those of `jax.lax.conv_general_dilated`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from otmdr_jax.models import convolution_programs as programs


def convolve_depthwise(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """Computes `jax.lax.conv_general_dilated`, fast on CPUs if it is depthwise.

    Args:
      images: (B, H, W, C).
      kernel: (height, width, 1, C), of the same dtype. Products of dtypes below float32
        are summed in float32 and rounded once.
      window_strides: Two strides.
      padding: Zeros ((low, high), (low, high)), not negative; a name such as "SAME" is
        left to `jax.lax`.
      lhs_dilation: Dilation of the images, as in `jax.lax`. Dilated convolutions, other
        layouts and precisions are left to `jax.lax`.
      rhs_dilation: Dilation of the kernel.
      dimension_numbers: The layout.
      feature_group_count: C; any other number is left to `jax.lax`.
      **options: Further options of `jax.lax.conv_general_dilated`.

    Returns:
      (B, H', W', C).

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.models.depthwise import convolve_depthwise
      >>> images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 1, 3))
      >>> convolve_depthwise(
      ...     images,
      ...     kernel,
      ...     (2, 2),
      ...     ((1, 1), (1, 1)),
      ...     dimension_numbers=("NHWC", "HWIO", "NHWC"),
      ...     feature_group_count=3,
      ... ).shape
      (2, 4, 4, 3)
    """
    layout = padding, lhs_dilation, rhs_dilation, dimension_numbers, options
    ours = (
        programs.is_plain(images, kernel, *layout)
        and kernel.shape[2:] == (1, images.shape[3])
        and feature_group_count == images.shape[3]
        and all(pad >= 0 for pads in padding for pad in pads)
    )
    if ours:
        sizes = programs.output_sizes(
            images.shape, kernel.shape, window_strides, padding
        )
        ours = min(sizes) > 0
    if not ours:
        return lax.conv_general_dilated(
            images,
            kernel,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            **options,
        )
    return _sum_of_taps(images, kernel, window_strides, padding, sizes)


def _sum_of_taps(images, kernel, strides, padding, sizes):
    batch, _, _, channels = images.shape
    wide = jnp.promote_types(images.dtype, jnp.float32)
    x = jnp.pad(images, ((0, 0), *padding, (0, 0))).astype(wide)
    w = kernel.astype(wide)
    # A stride's last slice ends at its last sample, not at the next one.
    rows, columns = (s * (n - 1) + 1 for s, n in zip(strides, sizes, strict=True))
    out = jnp.zeros((), wide)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            tap = lax.slice(
                x,
                (0, i, j, 0),
                (batch, i + rows, j + columns, channels),
                (1, *strides, 1),
            )
            out += tap * w[i : i + 1, j : j + 1]  # (B, H', W', C) * (1, 1, 1, C)
    return out.astype(images.dtype)
