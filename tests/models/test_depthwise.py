"""The models' depthwise convolution against jax.lax's, through transformations."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from otmdr_jax.models.depthwise import convolve_depthwise

LAYOUT = ("NHWC", "HWIO", "NHWC")


def both(size=3, stride=1, channels=6, padding=None):
    pad = size // 2
    return [
        functools.partial(
            convolution,
            window_strides=(stride, stride),
            padding=padding or ((pad, pad), (pad, pad)),
            dimension_numbers=LAYOUT,
            feature_group_count=channels,
        )
        for convolution in (convolve_depthwise, lax.conv_general_dilated)
    ]


def draw(*shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(convolution):
    """The result, and both gradients of a function of it that is not linear."""

    def run(x, w):
        out, pullback = jax.vjp(convolution, x, w)
        return out, pullback(jnp.cos(out))

    return run


def assert_close(got, want, rtol=5e-6):
    """Compares trees by their largest entries, which a sum's error is relative to."""

    def check(a, b):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(abs(b).max(), 1e-3))

    jax.tree.map(check, got, want)


def has_convolution(function, *args):
    # A function of its own each time: jaxprs are cached by it, not by the backend.
    return "conv_general_dilated" in str(
        jax.make_jaxpr(lambda *xs: function(*xs))(*args)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_values_and_gradients_equal_those_of_lax(size, stride, dtype):
    x, w = draw((3, 9, 8, 6), (size, size, 1, 6), dtype=dtype)
    got, want = (
        jax.jit(value_and_gradients(f))(x, w) for f in both(size=size, stride=stride)
    )
    # bfloat16 keeps 8 bits: lax rounds where it likes, ours once.
    assert_close(got, want, 5e-6 if dtype == jnp.float32 else 3e-2)


@pytest.mark.slow
def test_bfloat16_rounds_once():
    x, w = draw((3, 9, 8, 6), (5, 5, 1, 6), dtype=jnp.bfloat16)
    ours, exact = both(size=5)
    wide = exact(x.astype(jnp.float32), w.astype(jnp.float32))
    got = np.asarray(ours(x, w), np.float32)
    np.testing.assert_allclose(got, wide, rtol=2.0**-8, atol=1e-5)


def test_unequal_padding_and_strides():
    x, w = draw((2, 7, 10, 3), (3, 5, 1, 3))
    got, want = (
        jax.jit(
            value_and_gradients(
                lambda x, w, f=f: f(
                    x,
                    w,
                    (2, 3),
                    ((0, 2), (3, 1)),
                    dimension_numbers=LAYOUT,
                    feature_group_count=3,
                )
            )
        )(x, w)
        for f in (convolve_depthwise, lax.conv_general_dilated)
    )
    assert_close(got, want)


@pytest.mark.slow
def test_derivatives_by_finite_differences_in_float64():
    with jax.enable_x64(True):
        x, w = draw((2, 5, 6, 2), (3, 3, 1, 2), dtype=np.float64)
        ours, _ = both(stride=2, channels=2)
        check_grads(lambda x, w: jnp.sin(ours(x, w)), (x, w), order=2)


def test_members_in_a_vmap_and_in_a_scan():
    x, w = draw((2, 3, 8, 8, 6), (2, 3, 3, 1, 6))
    ours, theirs = map(value_and_gradients, both())
    want = [theirs(*pair) for pair in zip(x, w, strict=True)]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *want)
    assert_close(jax.jit(jax.vmap(ours))(x, w), want)
    scanned = jax.jit(lambda *xs: lax.scan(lambda c, x: (c, ours(*x)), None, xs)[1])
    assert_close(scanned(x, w), want)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_batch_divided_over_devices(kind):
    x, w = draw((4, 8, 8, 6), (3, 3, 1, 6))
    mesh = jax.make_mesh(
        (2,),
        ("data",),
        (getattr(jax.sharding.AxisType, kind),),
        devices=jax.devices()[:2],
    )
    ours, theirs = map(value_and_gradients, both())
    want = theirs(x, w)
    with jax.set_mesh(mesh):
        divided = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        kernel = jax.device_put(w, jax.NamedSharding(mesh, jax.P()))
        assert_close(jax.jit(ours)(divided, kernel), want)


def test_inside_shard_map():
    """The kernel is the same on all devices: its gradient is their sum."""
    x, w = draw((4, 8, 8, 6), (3, 3, 1, 6))
    mesh = jax.make_mesh(
        (2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    ours, theirs = map(value_and_gradients, both())
    data = jax.P("data")
    run = jax.shard_map(
        ours, mesh=mesh, in_specs=(data, jax.P()), out_specs=(data, (data, jax.P()))
    )
    assert_close(jax.jit(run)(x, w), theirs(x, w))


def test_the_backend_chooses():
    x, w = draw((2, 8, 8, 6), (3, 3, 1, 6))
    ours, _ = both()
    assert not has_convolution(ours, x, w)
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        assert has_convolution(ours, x, w)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 1, 12), {}),  # two kernels a channel
        ((3, 3, 3, 6), {"feature_group_count": 2}),
        ((3, 3, 1, 6), {"padding": "SAME"}),
        ((3, 3, 1, 6), {"padding": ((-1, 1), (1, 1))}),
        ((3, 3, 1, 6), {"rhs_dilation": (2, 2)}),
        ((3, 3, 1, 6), {"precision": lax.Precision.HIGHEST}),
    ],
)
def test_anything_else_is_left_to_lax(kernel, options):
    x, w = draw((2, 8, 8, 6), kernel)
    ours, theirs = both()
    assert has_convolution(functools.partial(ours, **options), x, w)
    assert_close(ours(x, w, **options), theirs(x, w, **options))
