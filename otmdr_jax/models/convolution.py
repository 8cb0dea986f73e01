"""A convolution whose gradients are fast on CPUs, and XLA's own everywhere else.

On CPUs XLA lowers the gradient of a kernel to a convolution with a window as large as
the image, which is slow on some processors. Gradients inside a loop or batched over
kernels are slower still, by one or two orders of magnitude (figures in
docs/performance.md). So:

- The gradient of the kernel is a loop of matrix products: `convolution_programs`.
- The gradient of the images is a convolution of the same form as the forward one.
- Kernels that differ between members of a batch are taken one member at a time.

A convolution is bilinear, and so are its two gradients, each of which is a gradient of
the other two. They are three JAX primitives, each naming the others as its transposes,
so that derivatives of any order and mode (Hessian-vector products too) never leave
these formulas. They are used where CPUs are JAX's default backend; elsewhere programs
are those of `jax.lax.conv_general_dilated`. A program that is traced on a CPU but
lowered for another platform gets convolutions there, not loops.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from otmdr_jax.models import convolution_programs as programs


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
    """Computes `jax.lax.conv_general_dilated`, with gradients that are fast on CPUs.

    Args:
      images: (B, H, W, C).
      kernel: (height, width, C, features), of the same dtype.
      window_strides: Two strides.
      padding: Zeros ((low, high), (low, high)); a name such as "SAME" is left to
        `jax.lax`.
      lhs_dilation: Dilation of the images, as in `jax.lax`. Dilated or grouped
        convolutions, other layouts, precisions and shardings, and operands sharded over
        an explicit mesh are left to `jax.lax`.
      rhs_dilation: Dilation of the kernel.
      dimension_numbers: The layout.
      feature_group_count: The number of groups.
      **options: Further options of `jax.lax.conv_general_dilated`.

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
    layout = padding, lhs_dilation, rhs_dilation, dimension_numbers, options
    ours = (
        programs.is_plain(images, kernel, *layout)
        and feature_group_count == 1
        and images.shape[3] == kernel.shape[2]
        and not any(_explicit(x) for x in (images, kernel))
    )
    if ours:
        strides: Any = tuple(map(int, window_strides))
        pads: Any = tuple((int(low), int(high)) for low, high in padding)
        sizes = programs.output_sizes(images.shape, kernel.shape, strides, pads)
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


def _explicit(x: jax.Array) -> bool:
    """True if an operand's type says how it is sharded, which `jax.lax` propagates."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.AxisType.Explicit in mesh.axis_types


def _vary_alike(*operands: jax.Array) -> list[jax.Array]:
    """Inside shard_map: lets all operands vary over the axes that any varies over."""
    axes = [jax.typeof(x).mat.varying for x in operands]
    missing = [tuple(sorted(frozenset().union(*axes) - own)) for own in axes]
    return [
        lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(operands, missing, strict=True)
    ]


# --- the primitives -----------------------------------------------------------------


def _primitive(
    name: str, cpu: Callable, other: Callable, shape: Callable, fold: str | None
) -> Primitive:
    """A bilinear map of two (..., N, N, N, N) arrays, mapped over leading axes.

    Args:
      name: The primitive's name.
      cpu: The map of arrays of rank 4, on CPUs.
      other: The same map on all other platforms.
      shape: A function from the operands' shapes and the parameters to the result's.
      fold: The word "first" if a batch of first operands may join their axis 0.
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

    def evaluate(x, y, **options):
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            # What is compiled would come back here, for ever.
            own = one_by_one if jax.default_backend() == "cpu" else together
            return own(x, y, **options)
        return compiled(**options)(x, y)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    lower = functools.partial(mlir.lower_fun, multiple_results=False)
    mlir.register_lowering(primitive, lower(together))
    mlir.register_lowering(primitive, lower(one_by_one), platform="cpu")
    return primitive


_forward = _primitive(
    "convolve",
    programs.lax_forward,
    programs.lax_forward,
    lambda images, kernel, *, strides, padding: (
        images[0],
        *programs.output_sizes(images, kernel, strides, padding),
        kernel[3],
    ),
    fold="first",
)
_input = _primitive(
    "convolve_input_gradient",
    programs.cpu_input,
    programs.lax_input,
    lambda cotangent, kernel, *, strides, padding, shape: (
        cotangent[0],
        *shape,
        kernel[2],
    ),
    fold="first",
)
_kernel = _primitive(
    "convolve_kernel_gradient",
    programs.cpu_kernel,
    programs.lax_kernel,
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
