"""A convolution whose gradients are fast on CPUs, and XLA's own everywhere else.

On CPUs XLA lowers the gradient of a kernel to a convolution with a window as large as
the image, which is slow, and any gradient inside a loop or batched over kernels to
code slower by one or two orders of magnitude (figures in docs/performance.md). So:

- The gradient of the kernel is a loop of matrix products. For 3x3 kernels of stride 1
  it is Winograd's minimal filtering F(3x3, 2x2): 16 products over a quarter of the
  pixels in place of 9 over all of them. Its rounding error is that of a direct sum.
- The gradient of the images is a convolution of the same form as the forward one.
- Kernels that differ between members of a batch are taken one member at a time.

A convolution is bilinear, and so are its two gradients, each of which is a gradient of
the other two. They are three JAX primitives, each naming the others as its transposes,
so that derivatives of any order and mode (Hessian-vector products too) never leave
these formulas. They are used where CPUs are JAX's default backend; elsewhere programs
are those of `jax.lax.conv_general_dilated`. A program that is traced on a CPU but
lowered for another platform gets convolutions there, not loops.

Reference: Lavin and Gray, 2015, "Fast algorithms for convolutional neural networks",
section 4.1 and, for the gradient of the kernel, section 4.2.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

# Winograd's F(3, 2): three outputs of a filter with two taps, from four inputs, by four
# products: out = _FROM_PRODUCTS^T [(_FROM_IMAGES images) * (_FROM_OUTPUTS outputs)].
# A row of _FROM_IMAGES is kept as images[first] + sign * images[second].
_FIRST, _SECOND = np.array([0, 1, 2, 3]), np.array([2, 2, 1, 1])
_SIGN = np.array([-1.0, 1.0, -1.0, -1.0])
_FROM_OUTPUTS = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [0.0, 1.0]])
_FROM_PRODUCTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])

# With fewer channels than this the transforms cost more than the products they save.
_NARROW = 16


def convolve(
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
    """What `jax.lax.conv_general_dilated` computes, with gradients fast on CPUs.

    Args:
      images: (B, H, W, C).
      kernel: (height, width, C, features), of the same dtype.
      window_strides: two.
      padding: ((low, high), (low, high)); a name such as "SAME" is left to `jax.lax`.
      lhs_dilation: as in `jax.lax`, as are all that follow. Dilated or grouped
        convolutions, other layouts, precisions and shardings, and operands sharded
        over an explicit mesh are left to `jax.lax`.
      rhs_dilation: see above.
      dimension_numbers: see above.
      feature_group_count: see above.
      **options: see above.

    Returns:
      (B, H', W', features).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax.models.convolution import convolve
      >>> images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> pad = ((1, 1), (1, 1))
      >>> convolve(images, kernel, (2, 2), pad, dimension_numbers=layout).shape
      (2, 4, 4, 4)
    """
    ours = (
        jax.default_backend() == "cpu"
        and images.ndim == kernel.ndim == 4
        and dimension_numbers is not None
        and lax.conv_dimension_numbers(images.shape, kernel.shape, dimension_numbers)
        == lax.conv_dimension_numbers(images.shape, kernel.shape, _LAYOUT)
        and not isinstance(padding, str)
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and feature_group_count == 1
        and all(option is None for option in options.values())
        and images.dtype == kernel.dtype
        and jnp.issubdtype(images.dtype, jnp.floating)
        and images.shape[3] == kernel.shape[2]
        and not any(_explicit(x) for x in (images, kernel))
    )
    if ours:
        strides: Any = tuple(map(int, window_strides))
        pads: Any = tuple((int(low), int(high)) for low, high in padding)
        sizes = _output_sizes(images.shape, kernel.shape, strides, pads)
        ours = min(*images.shape, *kernel.shape, *strides, *sizes) > 0
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
    images, kernel = _vary_alike(images, kernel)
    return _forward.bind(images, kernel, strides=strides, padding=pads)


_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _explicit(x: jax.Array) -> bool:
    """Whether an operand's type says how it is sharded, which `jax.lax` propagates."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.AxisType.Explicit in mesh.axis_types


def _vary_alike(*operands: jax.Array) -> list[jax.Array]:
    """Inside shard_map: lets all operands vary over the axes that any varies over."""

    def axes(x):
        aval = jax.typeof(x)
        kind = getattr(aval, "mat", None)  # since JAX 0.10
        return kind.varying if kind is not None else getattr(aval, "vma", frozenset())

    union = frozenset().union(*map(axes, operands))
    missing = [tuple(sorted(union - axes(x))) for x in operands]
    return [
        lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(operands, missing, strict=True)
    ]


# --- shapes -------------------------------------------------------------------------


def _output_sizes(images, kernel, strides, padding):
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


def _lax_forward(images, kernel, *, strides, padding):
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=_LAYOUT
    )


def _lax_input(cotangent, kernel, *, strides, padding, shape):
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


def _lax_kernel(images, cotangent, *, strides, padding, size):
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


def _cpu_input(cotangent, kernel, *, strides, padding, shape):
    pads = _input_padding(
        cotangent.shape[1:3], shape, kernel.shape[:2], strides, padding
    )
    zero = jnp.zeros((), cotangent.dtype)
    spread = [(*pad, s - 1) for pad, s in zip(pads, strides, strict=True)]
    cotangent = lax.pad(cotangent, zero, [(0, 0, 0), *spread, (0, 0, 0)])
    # Turned and transposed as arrays. With the same said by dimension numbers, as
    # jax.lax does, XLA has only a naive loop for it inside a scan.
    turned = lax.rev(kernel, (0, 1)).swapaxes(2, 3)
    return _lax_forward(cotangent, turned, strides=(1, 1), padding=((0, 0), (0, 0)))


def _cpu_kernel(images, cotangent, *, strides, padding, size):
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


# --- the primitives -----------------------------------------------------------------


def _primitive(
    name: str, cpu: Callable, other: Callable, shape: Callable, fold: str | None
) -> Primitive:
    """A bilinear map of two (..., N, N, N, N) arrays, mapped over leading axes.

    Args:
      name: of the primitive.
      cpu: the map of arrays of rank 4, on CPUs.
      other: the same, on all other platforms.
      shape: the result's shape from the operands' and the parameters.
      fold: "first" if a batch of first operands may join their axis 0.
    """
    primitive = Primitive(name)

    def abstract(x, y, **options):
        lead = x.shape[:-4]
        assert lead == y.shape[:-4], (x.shape, y.shape)
        result = shape(x.shape[-4:], y.shape[-4:], **options)
        return x.update(shape=(*lead, *result), weak_type=False)

    def one_by_one(x, y, **options):
        lead, function = x.shape[:-4], functools.partial(cpu, **options)
        if not lead:
            return function(x, y)
        x, y = (a.reshape(-1, *a.shape[-4:]) for a in (x, y))
        out = lax.map(lambda pair: function(*pair), (x, y))
        return out.reshape(*lead, *out.shape[1:])

    def together(x, y, **options):
        function = functools.partial(other, **options)
        for _ in x.shape[:-4]:
            function = jax.vmap(function)
        return function(x, y)

    def batch(operands, axes, **options):
        x, y = operands
        if axes[1] is None and fold == "first" and x.ndim == 5:
            x = jnp.moveaxis(x, axes[0], 0)
            members, examples = x.shape[:2]
            out = primitive.bind(x.reshape(-1, *x.shape[2:]), y, **options)
            return out.reshape(members, examples, *out.shape[1:]), 0
        size = next(
            a.shape[i] for a, i in zip(operands, axes, strict=True) if i is not None
        )
        x, y = (
            jnp.broadcast_to(a, (size, *a.shape))
            if i is None
            else jnp.moveaxis(a, i, 0)
            for a, i in zip(operands, axes, strict=True)
        )
        return primitive.bind(x, y, **options), 0

    @functools.lru_cache(maxsize=256)
    def compiled(**options):
        return jax.jit(functools.partial(primitive.bind, **options))

    primitive.def_impl(lambda x, y, **options: compiled(**options)(x, y))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    lower = functools.partial(mlir.lower_fun, multiple_results=False)
    mlir.register_lowering(primitive, lower(together))
    mlir.register_lowering(primitive, lower(one_by_one), platform="cpu")
    return primitive


_forward = _primitive(
    "convolve",
    _lax_forward,
    _lax_forward,
    lambda images, kernel, *, strides, padding: (
        images[0],
        *_output_sizes(images, kernel, strides, padding),
        kernel[3],
    ),
    fold="first",
)
_input = _primitive(
    "convolve_input_gradient",
    _cpu_input,
    _lax_input,
    lambda cotangent, kernel, *, strides, padding, shape: (
        cotangent[0],
        *shape,
        kernel[2],
    ),
    fold="first",
)
_kernel = _primitive(
    "convolve_kernel_gradient",
    _cpu_kernel,
    _lax_kernel,
    lambda images, cotangent, *, strides, padding, size: (
        *size,
        images[3],
        cotangent[3],
    ),
    fold=None,
)


def _shape(images):
    return images.aval.shape[-3:-1]


def _size(kernel):
    return kernel.aval.shape[-4:-2]


ad.defbilinear(
    _forward,
    lambda ct, images, kernel, **window: _input.bind(
        ct, kernel, shape=_shape(images), **window
    ),
    lambda ct, images, kernel, **window: _kernel.bind(
        images, ct, size=_size(kernel), **window
    ),
)
ad.defbilinear(
    _input,
    lambda ct, cotangent, kernel, *, shape, **window: _forward.bind(
        ct, kernel, **window
    ),
    lambda ct, cotangent, kernel, *, shape, **window: _kernel.bind(
        ct, cotangent, size=_size(kernel), **window
    ),
)
ad.defbilinear(
    _kernel,
    lambda ct, images, cotangent, *, size, **window: _input.bind(
        cotangent, ct, shape=_shape(images), **window
    ),
    lambda ct, images, cotangent, *, size, **window: _forward.bind(
        images, ct, **window
    ),
)
