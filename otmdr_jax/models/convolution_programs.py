"""The programs of a convolution and its two gradients: `jax.lax`'s, and those of CPUs.

Each is a function of two arrays of rank 4; `convolution` makes primitives of them. On
CPUs the gradient of the kernel is a loop of matrix products. For 3x3 kernels of stride
1 it is Winograd's minimal filtering F(3x3, 2x2): 16 products over a quarter of the
pixels in place of 9 over all of them. Its rounding error is that of a direct sum.

Reference: Lavin and Gray, 2015, "Fast algorithms for convolutional neural networks",
section 4.1 and, for the gradient of the kernel, section 4.2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")

# Winograd's F(3, 2): three outputs of a filter with two taps, from four inputs, by four
# products: out = _FROM_PRODUCTS^T [(_FROM_IMAGES images) * (_FROM_OUTPUTS outputs)].
# A row of _FROM_IMAGES is kept as images[first] + sign * images[second].
_FIRST, _SECOND = np.array([0, 1, 2, 3]), np.array([2, 2, 1, 1])
_SIGN = np.array([-1.0, 1.0, -1.0, -1.0])
_FROM_OUTPUTS = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [0.0, 1.0]])
_FROM_PRODUCTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])

# With fewer channels than this the transforms cost more than the products they save.
_NARROW = 16


def is_plain(
    images, kernel, padding, lhs_dilation, rhs_dilation, dimension_numbers, options
):
    """True on CPUs for floats of one dtype in our layout, with no other option."""
    return (
        jax.default_backend() == "cpu"
        and images.ndim == kernel.ndim == 4
        # Sizes that an export leaves open are symbols, which jax.lax knows.
        and all(isinstance(n, int) for n in (*images.shape, *kernel.shape))
        and dimension_numbers is not None
        and lax.conv_dimension_numbers(images.shape, kernel.shape, dimension_numbers)
        == lax.conv_dimension_numbers(images.shape, kernel.shape, LAYOUT)
        and not isinstance(padding, str)
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and all(option is None for option in options.values())
        and images.dtype == kernel.dtype
        and jnp.issubdtype(images.dtype, jnp.floating)
    )


# --- shapes -------------------------------------------------------------------------


def output_sizes(images, kernel, strides, padding):
    """Rows and columns of the result."""
    return tuple(
        (n + low + high - k) // s + 1
        for n, k, s, (low, high) in zip(
            images[1:3], kernel[:2], strides, padding, strict=True
        )
    )


def _input_padding(outputs, shape, size, strides, padding):
    """How to pad the spread cotangent so that a plain convolution gives images."""
    return tuple(
        (k - 1 - low, n + low - (s * (m - 1) + 1))
        for n, m, k, s, (low, _) in zip(
            shape, outputs, size, strides, padding, strict=True
        )
    )


def _kernel_padding(outputs, shape, size, strides, padding):
    """How to pad images so that the spread cotangent fits in as often as kernels."""
    return tuple(
        (low, k + s * (m - 1) - n - low)
        for n, m, k, s, (low, _) in zip(
            shape, outputs, size, strides, padding, strict=True
        )
    )


# --- what every platform but CPUs runs: the program of jax.lax and its gradients ----


def lax_forward(images, kernel, *, strides, padding):
    """The convolution."""
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=LAYOUT
    )


def lax_input(cotangent, kernel, *, strides, padding, shape):
    """The gradient of the images; `shape` are their rows and columns."""
    pads = _input_padding(
        cotangent.shape[1:3], shape, kernel.shape[:2], strides, padding
    )
    return lax.conv_general_dilated(
        cotangent,
        lax.rev(kernel, (0, 1)),
        (1, 1),
        pads,
        lhs_dilation=strides,
        dimension_numbers=("NHWC", "HWOI", "NHWC"),
    )


def lax_kernel(images, cotangent, *, strides, padding, size):
    """The gradient of the kernel; `size` are its rows and columns."""
    pads = _kernel_padding(
        cotangent.shape[1:3], images.shape[1:3], size, strides, padding
    )
    return lax.conv_general_dilated(
        images,
        cotangent,
        (1, 1),
        pads,
        rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )


# --- what CPUs run ------------------------------------------------------------------


def cpu_input(cotangent, kernel, *, strides, padding, shape):
    """The gradient of the images, as a convolution of the forward one's form."""
    pads = _input_padding(
        cotangent.shape[1:3], shape, kernel.shape[:2], strides, padding
    )
    zero = jnp.zeros((), cotangent.dtype)
    spread = [(*pad, s - 1) for pad, s in zip(pads, strides, strict=True)]
    cotangent = lax.pad(cotangent, zero, [(0, 0, 0), *spread, (0, 0, 0)])
    # Turned and transposed as arrays. With the same said by dimension numbers, as
    # jax.lax does, XLA has only a naive loop for it inside a scan.
    turned = lax.rev(kernel, (0, 1)).swapaxes(2, 3)
    return lax_forward(cotangent, turned, strides=(1, 1), padding=((0, 0), (0, 0)))


def cpu_kernel(images, cotangent, *, strides, padding, size):
    """The gradient of the kernel, as a loop of matrix products."""
    narrow = min(images.shape[3], cotangent.shape[3]) < _NARROW
    if size == (3, 3) and strides == (1, 1) and not narrow:
        gradient = _winograd_kernel(images, cotangent, padding)
    else:
        gradient = _tap_kernel(images, cotangent, strides, padding, size)
    return gradient.astype(images.dtype)


def _tap_kernel(images, cotangent, strides, padding, size):
    """One product for each tap of the kernel."""
    outputs = cotangent.shape[1:3]
    images = _padded(images, [low for low, _ in padding], strides, outputs, size)

    def tap(_, ij):
        return None, _product(_window(images, ij, strides, outputs), cotangent)

    taps = jnp.asarray(np.indices(size).reshape(2, -1).T, jnp.int32)
    _, products = lax.scan(tap, None, taps, unroll=len(taps) == 1)
    return products.reshape(*size, *products.shape[1:])


def _winograd_kernel(images, cotangent, padding):
    """F(3x3, 2x2): cotangents in tiles of 2x2, images in tiles of 4x4 that overlap."""
    tiles = tuple(-(-n // 2) for n in cotangent.shape[1:3])
    images = _padded(images, [low for low, _ in padding], (2, 2), tiles, (4, 4))
    cotangent = _padded(cotangent, (0, 0), (2, 2), tiles, (2, 2))
    wide = jnp.promote_types(images.dtype, jnp.float32)
    first, second = jnp.asarray(_FIRST, jnp.int32), jnp.asarray(_SECOND, jnp.int32)
    sign, from_outputs = jnp.asarray(_SIGN, wide), jnp.asarray(_FROM_OUTPUTS, wide)

    def x(i, j):
        return _window(images, (i, j), (2, 2), tiles).astype(wide)

    def y(i, j):
        return _window(cotangent, (i, j), (2, 2), tiles).astype(wide)

    def frequency(_, uv):
        u, v = uv
        row0 = x(first[u], first[v]) + sign[v] * x(first[u], second[v])
        row1 = x(second[u], first[v]) + sign[v] * x(second[u], second[v])
        top, bottom = from_outputs[u]
        left, right = from_outputs[v]
        column0 = top * y(0, 0) + bottom * y(1, 0)
        column1 = top * y(0, 1) + bottom * y(1, 1)
        return None, _product(row0 + sign[u] * row1, left * column0 + right * column1)

    frequencies = jnp.asarray(np.indices((4, 4)).reshape(2, -1).T, jnp.int32)
    _, products = lax.scan(frequency, None, frequencies)
    products = products.reshape(4, 4, *products.shape[1:])
    back = jnp.asarray(_FROM_PRODUCTS, wide)
    return jnp.einsum("ui,vj,uvcd->ijcd", back, back, products)


def _padded(x, low, strides, counts, size):
    """x: (B, H, W, C) with `low` zeros before it, cut or filled to fit all windows."""
    pads = [
        (before, k + s * (count - 1) - n - before, 0)
        for n, before, s, count, k in zip(
            x.shape[1:3], low, strides, counts, size, strict=True
        )
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def _window(x, start, strides, counts):
    """The pixels `start`, `start + stride`, ... of x: (B, *counts, C)."""
    rows, columns = (s * (n - 1) + 1 for s, n in zip(strides, counts, strict=True))
    begin = [jnp.asarray(i, jnp.int32) for i in (0, *start, 0)]
    x = lax.dynamic_slice(x, begin, (x.shape[0], rows, columns, x.shape[3]))
    return lax.slice(x, (0, 0, 0, 0), x.shape, (1, *strides, 1))


def _product(x, y):
    """Sums x y^T over all pixels: (C, features), in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, y = (a.astype(wide).reshape(-1, a.shape[-1]) for a in (x, y))
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())))
