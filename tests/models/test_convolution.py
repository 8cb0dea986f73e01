"""The models' convolution against jax.lax's, through every transformation."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from otmdr_jax.models.convolution import convolve

LAYOUT = ("NHWC", "HWIO", "NHWC")
SAME = ((1, 1), (1, 1))


def with_window(convolution, strides=(1, 1), padding=SAME):
    return functools.partial(
        convolution,
        window_strides=strides,
        padding=padding,
        dimension_numbers=LAYOUT,
    )


def both(strides=(1, 1), padding=SAME):
    return [
        with_window(f, strides, padding) for f in (convolve, lax.conv_general_dilated)
    ]


def draw(*shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def scalar(convolution):
    """A function of both operands whose derivatives of every order differ from 0."""
    return lambda x, w: jnp.sum(jnp.sin(convolution(x, w).astype(jnp.float32)))


def scalar64(convolution):
    return lambda x, w: jnp.sum(jnp.sin(convolution(x, w)))


def assert_close(got, want, rtol):
    """Compares trees by their largest entries, which a sum's error is relative to."""

    def check(a, b):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(abs(b).max(), 1e-3))

    jax.tree.map(check, got, want)


def primitives(function, *args):
    return set(re.findall(r"= (\w+)\[", str(jax.make_jaxpr(function)(*args))))


# --- values and gradients -----------------------------------------------------------


@st.composite
def windows(draw):
    side = st.integers(1, 5)
    kernel = draw(side), draw(side)
    strides = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    # Unequal on two sides, and wider than the kernel, where a border sees no image.
    pad = st.integers(0, 4)
    padding = (draw(pad), draw(pad)), (draw(pad), draw(pad))
    sizes = [
        draw(st.integers(max(1, k - low - high), 9))
        for k, (low, high) in zip(kernel, padding, strict=True)
    ]
    # Kernels of 16 channels and more take Winograd's way.
    channels = draw(st.sampled_from([(1, 1), (3, 16), (2, 5), (16, 17)]))
    batch = draw(st.integers(1, 3))
    return (batch, *sizes, channels[0]), (*kernel, *channels), strides, padding


@pytest.mark.slow
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.example((((2, 8, 8, 16), (3, 3, 16, 16), (1, 1), SAME)), jnp.float32)
@hypothesis.example((((2, 7, 5, 16), (3, 3, 16, 16), (1, 1), SAME)), jnp.float16)
@hypothesis.example((((2, 5, 8, 16), (3, 3, 16, 16), (1, 1), SAME)), jnp.bfloat16)
@hypothesis.example((((2, 9, 8, 3), (3, 3, 3, 4), (2, 2), SAME)), jnp.bfloat16)
@hypothesis.example((((2, 7, 8, 4), (1, 1, 4, 5), (2, 2), ((0, 0),) * 2)), jnp.float32)
@hypothesis.example((((2, 9, 9, 3), (7, 7, 3, 4), (2, 2), ((3, 3),) * 2)), jnp.float32)
@hypothesis.given(windows(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_values_and_gradients_equal_those_of_lax(window, dtype):
    images, kernel, strides, padding = window
    x, w = draw(images, kernel, dtype=dtype)

    def run(convolution):
        out, pullback = jax.vjp(convolution, x, w)
        return out, pullback(jnp.cos(out))

    got, want = (jax.jit(functools.partial(run, f))() for f in both(strides, padding))
    # bfloat16 keeps 8 bits. Ours sums in float32; lax may round each partial sum.
    rtol = {jnp.float32: 5e-6, jnp.float16: 5e-3, jnp.bfloat16: 3e-2}[dtype]
    assert_close(got, want, rtol)


@pytest.mark.parametrize(
    ("channels", "size", "stride"), [(16, 3, 1), (2, 3, 1), (2, 3, 2), (2, 1, 2)]
)
def test_derivatives_of_first_and_second_order_in_float64(channels, size, stride):
    """To 1e-12: Winograd's way is exact but for rounding."""
    pad = ((size // 2, size // 2),) * 2
    with jax.enable_x64(True):
        x, w, dx, dw = draw(
            *((2, 6, 7, channels), (size, size, channels, 16)) * 2, dtype=np.float64
        )

        def run(convolution):
            f = scalar64(convolution)
            grad = jax.grad(f, (0, 1))

            def squared(x, w):
                return sum(jnp.sum(g**2) for g in grad(x, w))

            return {
                "value": convolution(x, w),
                "forward": jax.jvp(f, (x, w), (dx, dw)),
                "forward over reverse": jax.jvp(grad, (x, w), (dx, dw)),
                "reverse over reverse": jax.grad(squared, (0, 1))(x, w),
                "reverse over forward": jax.grad(
                    lambda x, w: jax.jvp(f, (x, w), (dx, dw))[1], (0, 1)
                )(x, w),
            }

        got, want = (
            jax.jit(functools.partial(run, f))() for f in both((stride, stride), pad)
        )
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_rounds_the_gradient_of_the_kernel_once(stride):
    x, w = draw((4, 16, 16, 16), (3, 3, 16, 16), dtype=jnp.bfloat16)
    conv = with_window(convolve, (stride, stride))
    exact = with_window(lax.conv_general_dilated, (stride, stride))
    y = conv(x, w)
    (got,) = jax.jit(jax.linear_transpose(lambda w: conv(x, w), w))(y)
    with jax.enable_x64(True):
        x, w, y = (np.asarray(a, np.float64) for a in (x, w, y))
        want = np.asarray(jax.linear_transpose(lambda w: exact(x, w), w)(y)[0])
    # Half a unit in the last place of eight bits, and what float32 leaves where
    # positive and negative terms cancel.
    atol = 1e-6 * abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=atol)


@pytest.mark.slow
def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        x, w = draw((2, 5, 4, 16), (3, 3, 16, 16), dtype=np.float64)
        f = scalar64(with_window(convolve))
        check_grads(f, (x, w), order=2, modes=["fwd", "rev"], eps=1e-5)


@pytest.mark.slow
def test_without_jit():
    """`jax.disable_jit`, to look for an error with a debugger."""
    ours, lax_own = map(scalar, both(strides=(2, 1)))
    operands = draw((2, 5, 4, 3), (3, 3, 3, 2))
    want = jax.value_and_grad(lax_own, (0, 1))(*operands)
    with jax.disable_jit():
        got = jax.value_and_grad(ours, (0, 1))(*operands)
        mapped = jax.vmap(ours, (None, 0))(operands[0], operands[1][None])
    assert_close(got, want, 1e-5)
    assert_close(mapped, want[0][None], 1e-5)


def test_outside_jit():
    x, w = draw((2, 6, 6, 16), (3, 3, 16, 16))
    got, want = (jax.grad(scalar(f), (0, 1))(x, w) for f in both())
    assert_close(got, want, 5e-6)


# --- transformations ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 3), (None, 4)])
def test_vmap_equals_a_loop(axes):
    shapes = [list(shape) for shape in ((2, 6, 5, 16), (3, 3, 16, 17))]
    for shape, axis in zip(shapes, axes, strict=True):
        if axis is not None:
            shape.insert(axis, 3)
    x, w = draw(*shapes)
    grad = jax.value_and_grad(scalar(with_window(convolve)), (0, 1))
    want = jax.value_and_grad(scalar(with_window(lax.conv_general_dilated)), (0, 1))
    got = jax.jit(jax.vmap(grad, axes))(x, w)
    members = [
        [
            a if i is None else jnp.take(a, m, i)
            for a, i in zip((x, w), axes, strict=True)
        ]
        for m in range(3)
    ]
    alone = jax.tree.map(
        lambda *a: jnp.stack(a), *[want(*member) for member in members]
    )
    assert_close(got, alone, 5e-6)


@pytest.mark.slow
def test_vmap_of_vmap_and_gradients_through_it():
    x, w = draw((2, 3, 2, 5, 5, 4), (2, 3, 3, 3, 4, 4))

    def total(convolution):
        nested = jax.vmap(jax.vmap(convolution))
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(nested(x, w))), (0, 1))

    # Only the outer one batches kernels; the inner one joins the examples.
    def mixed(convolution):
        nested = jax.vmap(jax.vmap(convolution, (0, None)))
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(nested(x, w[:, 0]))), (0, 1))

    for how in (total, mixed):
        got, want = (jax.jit(how(f))(x, w) for f in both())
        assert_close(got, want, 5e-6)


def test_scan():
    x, w = draw((3, 2, 6, 6, 16), (3, 3, 3, 16, 16))

    def loop(convolution):
        grad = jax.grad(scalar(convolution), (0, 1))
        return lax.scan(lambda c, xw: (c, grad(*xw)), None, (x, w))[1]

    got, want = (jax.jit(functools.partial(loop, f))() for f in both())
    assert_close(got, want, 5e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("channels", [4, 16])
def test_shard_map(channels, check_vma):
    x, w = draw((8, 6, 6, channels), (3, 3, channels, 16))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data, whole = PartitionSpec("data"), PartitionSpec()

    def device(x, w):
        if check_vma:  # the sum over devices is then the transpose's own
            return jax.grad(scalar(with_window(convolve)), (0, 1))(x, w)
        dx, dw = jax.grad(scalar(with_window(convolve)), (0, 1))(x, w)
        return dx, lax.psum(dw, "data")

    sharded = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(data, whole),
        out_specs=(data, whole),
        check_vma=check_vma,
    )
    want = jax.grad(scalar(with_window(lax.conv_general_dilated)), (0, 1))(x, w)
    assert_close(jax.jit(sharded)(x, w), want, 5e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_images_that_are_sharded(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x, w = draw((8, 6, 6, 16), (3, 3, 16, 16))
    want = jax.grad(scalar(with_window(lax.conv_general_dilated)), (0, 1))(x, w)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
        grad = jax.grad(scalar(with_window(convolve)), (0, 1))
        assert_close(jax.jit(grad)(x, w), want, 5e-6)


def test_checkpoint():
    x, w = draw((2, 6, 6, 16), (3, 3, 16, 16))

    def deep(convolution):
        @jax.checkpoint
        def block(x, w):
            return jnp.tanh(convolution(jnp.tanh(convolution(x, w)), w))

        return jax.grad(scalar(lambda x, w: block(block(x, w), w)), (0, 1))(x, w)

    got, want = (jax.jit(functools.partial(deep, f))() for f in both())
    assert_close(got, want, 2e-5)


# --- programs -----------------------------------------------------------------------


def test_cpus_never_take_the_gradient_of_a_kernel_by_convolution():
    """Where XLA is slow: a window as large as the image, in a loop most of all."""
    x, w = draw((2, 2, 12, 12, 16), (2, 3, 3, 16, 16))

    def windows(convolution):
        grad = jax.grad(scalar(convolution), (0, 1))
        loop = jax.jit(lambda x, w: lax.scan(lambda c, a: (c, grad(*a)), 0, (x, w)))
        text = loop.lower(x, w).compile().as_text()
        return re.findall(r" convolution\(.*window={size=(\w+)", text)

    ours, theirs = map(windows, both())
    assert set(ours) == {"3x3"}
    assert "12x12" in theirs


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("mapped", [False, True])
def test_lowered_for_other_platforms_it_is_the_program_of_lax(
    platform, size, stride, mapped
):
    pad = ((size // 2, size // 2),) * 2
    x, w = draw((2, 2, 8, 8, 16), (2, size, size, 16, 32))
    if not mapped:
        x, w = x[0], w[0]

    def operations(convolution):
        grad = jax.grad(scalar(convolution), (0, 1))
        traced = jax.jit(jax.vmap(grad) if mapped else grad).trace(x, w)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        lines = re.findall(r"= (stablehlo\..*)", text)
        return sorted(re.sub(r"%\w+|#\w+", "%", line) for line in lines)

    ours, theirs = map(operations, both((stride, stride), pad))
    if not mapped:
        assert ours == theirs
    # Which axis members are on differs, and with it what is transposed.
    for name, count in (("convolution", 3), ("while", 0), ("dot", 0)):
        for lines in (ours, theirs):
            assert sum(x.startswith(f"stablehlo.{name}") for x in lines) == count


def test_other_backends_call_lax(monkeypatch):
    x, w = draw((2, 4, 4, 3), (3, 3, 3, 4))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert primitives(with_window(convolve), x, w) == {"conv_general_dilated"}


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"lhs_dilation": (2, 1)},
        {"rhs_dilation": (1, 2)},
        {"dimension_numbers": ("HWNC", "HWIO", "HWNC")},
        {"precision": "highest"},
        {"preferred_element_type": jnp.float32},
        {"feature_group_count": 2},
    ],
)
def test_what_is_left_to_lax(options):
    x, w = draw((4, 4, 4, 4), (3, 3, 4 // options.get("feature_group_count", 1), 4))
    options = {"padding": SAME, "dimension_numbers": LAYOUT, **options}
    call = functools.partial(convolve, window_strides=(1, 1), **options)
    assert primitives(call, x, w) == {"conv_general_dilated"}
    want = lax.conv_general_dilated(x, w, (1, 1), **options)
    np.testing.assert_array_equal(call(x, w), want)
    assert primitives(with_window(convolve), *draw((4,) * 4, (3, 3, 4, 4))) == {
        "convolve"
    }


def test_shapes_that_do_not_fit_raise_the_error_of_lax():
    x, w = draw((2, 4, 4, 3), (3, 3, 4, 4))
    with pytest.raises(ValueError, match="feature"):
        jax.eval_shape(with_window(convolve), x, w)
    narrow = w[:, :, :3].astype(jnp.bfloat16)
    with pytest.raises(TypeError, match="dtype"):
        jax.eval_shape(with_window(convolve), x, narrow)
