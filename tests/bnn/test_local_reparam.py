"""Noise for each example: local reparameterisation and Flipout, in any loss."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from otmdr_jax import bnn, models, precision
from otmdr_jax.bnn import local_reparam
from otmdr_jax.experiments.methods import cross_entropy
from tests.marks import slow_but

ESTIMATORS = ("local", "flipout")
DRAWS = 4_000


def draws(function, q, estimator, *args, count=DRAWS):
    """(count, ...) outputs with independent noise."""
    keys = jax.random.split(jax.random.key(5), count)
    if estimator == "weights":
        return jax.vmap(lambda k: function(bnn.sample(q, k), *args))(keys)
    return jax.vmap(lambda k: local_reparam.call(function, q, estimator, k, *args))(
        keys
    )


def check_moments(function, q, x, estimator, mean, std):
    """Outputs have the mean and the deviation that sampled weights give them."""
    found = np.asarray(draws(function, q, estimator, x))
    error = 5 * std / np.sqrt(len(found)) + 1e-6
    assert np.all(np.abs(found.mean(0) - mean) < error)
    assert_allclose(found.std(0), std, rtol=0.1)
    return found


LAYERS = {
    "x @ w": (lambda w, x: x @ w, (6, 4)),
    "x @ w.T": (lambda w, x: x @ w.T, (4, 6)),
    "(w @ x.T).T": (lambda w, x: (w @ x.T).T, (4, 6)),
    "jit": (jax.jit(lambda w, x: x @ w), (6, 4)),
    "checkpoint": (jax.checkpoint(lambda w, x: x @ w), (6, 4)),
    "half": (lambda w, x: 2 * x @ (w * 0.5), (6, 4)),
    "vmap": (lambda w, x: jax.vmap(lambda row: row @ w)(x), (6, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "estimator"),
    [
        *((layer, "local") for layer in LAYERS),
        ("x @ w", "weights"),
        ("x @ w", "flipout"),
        ("x @ w.T", "flipout"),
    ],
)
def test_dense_layers_have_the_distribution_of_sampled_weights(layer, estimator):
    function, shape = LAYERS[layer]
    rng = np.random.default_rng(0)
    m, s = rng.normal(size=shape), rng.uniform(0.1, 1.0, size=shape)
    x = rng.normal(size=(3, 6))
    q = bnn.init(jnp.float32(m), jnp.float32(s))
    if shape == (4, 6):
        m, s = m.T, s.T
    std = np.sqrt(x**2 @ s**2)
    found = check_moments(function, q, jnp.float32(x), estimator, x @ m, std)
    # Noise of one example says nothing of another's, unless weights are shared.
    between = np.corrcoef(found[:, 0, 0], found[:, 1, 0])[0, 1]
    shared = (x[0] * x[1]) @ s[:, 0] ** 2 / np.prod(np.sqrt(x[:2] ** 2 @ s[:, 0] ** 2))
    if estimator != "weights":
        shared = 0.0
    assert_allclose(between, shared, atol=0.07)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(("size", "sigma"), [(1.0, 0.1), (400.0, 1e-3), (0.01, 1e-4)])
def test_numbers_of_16_bits_neither_overflow_nor_vanish(dtype, size, sigma):
    # Squares of 400 overflow in float16, those of 1e-4 are 0. A row of zeros has no
    # deviation, and the square root no slope there.
    rng = np.random.default_rng(0)
    x = jnp.asarray(size * rng.normal(size=(300, 6)), dtype).at[1].set(0.0)
    s = jnp.float32(sigma * rng.uniform(0.5, 1, size=(6, 4)))

    def noise(s, x):
        q = bnn.init(jnp.zeros((6, 4)), sigma=s)
        y = local_reparam.call(
            lambda w, x: x @ w.astype(dtype), q, "local", jax.random.key(1), x
        )
        return y.astype(jnp.float32)

    got = np.float64(noise(s, x))
    wide, deep = np.asarray(x, np.float64), np.float64(s)
    std = np.sqrt(wide**2 @ deep**2)
    zeta = got / np.where(std > 0, std, np.inf)
    assert not got[1].any()
    assert abs(np.mean(zeta**2) - 1) < 5 * np.sqrt(2 / 1200)
    total = jax.grad(lambda s, x: jnp.sum(jnp.abs(noise(s, x))), (0, 1))
    at_s, at_x = total(s, x)
    share = np.abs(zeta) / np.where(std > 0, std, np.inf)
    assert_allclose(at_s, (wide**2).T @ share * deep, rtol=0.05)
    want = wide * (share @ (deep**2).T)
    assert_allclose(np.float64(at_x), want, rtol=0.1, atol=0.02 * np.max(want))


POSITIONS = jnp.cos(jnp.arange(24.0).reshape(4, 6))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*draws")
@pytest.mark.parametrize(
    ("how", "times", "estimator"),
    [
        ("time first", 3, "local"),
        ("time first", 4, "local"),
        ("time first", 4, "flipout"),
        ("time first", 4, "weights"),
        ("time first", 5, "local"),
        ("a table", 4, "local"),
        ("examples first", 4, "local"),
        ("examples first", 4, "flipout"),
    ],
)
def test_an_axis_as_long_as_the_batch_is_not_taken_for_it(how, times, estimator):
    """4 examples of so many steps: the sum over steps is that of one network."""
    rng = np.random.default_rng(0)
    s = rng.uniform(0.1, 1.0, size=(6, 2))
    x = np.float32(rng.normal(size=(4, times, 6)))
    q = bnn.init(jnp.zeros((6, 2)), jnp.float32(s))

    def function(w, x):
        if how == "a table":  # of rows that are no examples
            return x[:, 0, :1] * jnp.sum(POSITIONS @ w, axis=0)[None]
        if how == "examples first":
            return jnp.sum(x @ w, axis=1)
        return jnp.sum(x.swapaxes(0, 1) @ w, axis=0)

    seen = x.sum(axis=1)
    if how == "a table":
        seen = x[:, 0, :1] * np.asarray(POSITIONS).sum(axis=0)
    check_moments(function, q, x, estimator, 0.0, np.sqrt(seen**2 @ s**2))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_function_of_one_size_has_noise_for_each_example(estimator, key):
    q = bnn.init(jnp.zeros((6, 2)), sigma=1.0)
    x = jnp.ones((4, 6))
    y = local_reparam.call(lambda w, x: x.reshape(4, 6) @ w, q, estimator, key, x)
    assert len(np.unique(y[:, 0])) > 1


dense = jax.jit(lambda w, x: x @ w)

# One example's output by several uses of a kernel. They are linear in it, so that with
# the Jacobian J the variance is sum J^2 S^2, whatever the mean.
USES = {
    "x @ w - x @ w": lambda w, x: x @ w - x @ w,
    "x @ w + x @ w": lambda w, x: x @ w + x @ w,
    "two inputs": lambda w, x: x @ w + jnp.sin(3 * x) @ w,
    "jit": lambda w, x: (lambda f: f(w, x) - 3 * f(w, x[::-1]))(
        jax.jit(lambda w, x: x @ w)
    ),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w: x @ w)(w) - (2 * x) @ w,
    "both in one block": jax.checkpoint(lambda w, x: x @ w - jnp.cos(x) @ w),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w - (row**2) @ w)(x),
    "transposed": lambda w, x: x @ w + x @ w.T,
    "rounded and not": lambda w, x: x @ (0.5 * w) - jnp.float32(x @ w.astype(float)),
    "entries": lambda w, x: x @ w - w[:1],
    "in a branch": lambda w, x: (
        x @ w - jax.lax.cond(x[0, 0] > 9, lambda: jnp.sin(x) @ w, lambda: x @ w)
    ),
    "in a loop": lambda w, x: (
        x @ w - jax.lax.scan(lambda h, row: (h, row @ w), 0.0, x)[1]
    ),
    "unrolled": lambda w, x: sum((x**k) @ w for k in range(1, 4)),
    "views in a row": lambda w, x: (lambda y: y[:3] - y[3:])(
        jnp.concatenate([x, x**2]) @ w
    ),
    "views on the first axis": lambda w, x: jnp.diff(jnp.stack([x, x**2]) @ w, axis=0)[
        0
    ],
    "views on the second axis": lambda w, x: jnp.diff(
        jnp.stack([x, x**2], 1) @ w, axis=1
    )[:, 0],
    "rows of no example": lambda w, x: x[:, :1] * jnp.sum(jnp.eye(5, 6) @ w, 0)[None],
    "one row": lambda w, x: x @ w + (x[0] @ w)[None],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:estimator=")
@pytest.mark.parametrize(
    ("use", "estimator"),
    [
        *((use, "local") for use in USES),
        *((use, "flipout") for use in ("two inputs", "views in a row", "one row")),
    ],
)
def test_uses_of_one_kernel_see_one_kernel(use, estimator):
    rng = np.random.default_rng(0)
    m, s = rng.normal(size=(6, 6)), rng.uniform(0.1, 1.0, size=(6, 6))
    m, s, x = (jnp.float32(a) for a in (m, s, rng.normal(size=(3, 6))))
    jacobian = jax.jacobian(USES[use])(m, x)
    std = np.sqrt(np.sum(np.square(jacobian) * np.square(s), axis=(-2, -1)))
    found = np.asarray(draws(USES[use], bnn.init(m, s), estimator, x))
    mean = np.asarray(USES[use](m, x))
    assert np.all(np.abs(found.mean(0) - mean) < 5 * std / np.sqrt(DRAWS) + 1e-5)
    assert_allclose(found.std(0), std, rtol=0.08, atol=1e-5)  # 7 standard errors


@pytest.mark.filterwarnings("ignore:estimator=")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["two products", "one product of two rows"])
def test_covariance_of_two_outputs_is_that_of_their_inputs(how, estimator):
    """Of x1 w and x2 w it is sum x1 x2 sigma^2, in one example's pass."""
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(3, 2, 6)))
    s = rng.uniform(0.1, 1.0, size=(6, 1))

    def function(w, x):
        if how == "two products":
            return jnp.concatenate([x[:, 0] @ w, x[:, 1] @ w], 1)
        return (x @ w)[..., 0]

    q = bnn.init(jnp.zeros((6, 1)), jnp.float32(s))
    found = np.asarray(draws(function, q, estimator, jnp.asarray(x)))
    for i in range(3):
        want = np.einsum("ad,bd,d->ab", x[i], x[i], s[:, 0] ** 2)
        got = np.cov(found[:, i].T)
        # Of a product of normals: (C11 C22 + C12^2) / n.
        variances = np.diag(want)
        error = np.sqrt((np.outer(variances, variances) + want**2) / DRAWS)
        assert np.all(np.abs(got - want) < 5 * error)


@pytest.mark.filterwarnings("ignore:estimator=")
@pytest.mark.parametrize("estimator", slow_but(["flipout"], ESTIMATORS))
def test_gradients_of_a_siamese_network_have_the_right_mean(estimator):
    """For ((x1 - x2) w - t)^2: 2 d (d m - t), and 2 d^2 sigma for the scales."""
    rng = np.random.default_rng(2)
    one, two = rng.normal(size=(2, 8, 4))
    m, s, t = rng.normal(size=(4, 1)), rng.uniform(0.1, 1.0, (4, 1)), 0.3
    q = bnn.init(jnp.float32(m), jnp.float32(s))

    def loss(w, batch):
        return jnp.mean((batch[0] @ w - batch[1] @ w - t) ** 2)

    grad_fn = bnn.sgvb(loss, num_data=99, kl_weight=0.0, estimator=estimator)
    batch = jnp.float32(one), jnp.float32(two)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    found = jax.vmap(lambda k: grad_fn(q, batch, key=k)[1])(keys)
    d = one - two
    of_mean = np.mean(2 * d[:, :, None] * (d @ m - t)[:, None], axis=0)
    of_raw = 2 * np.mean(d**2, axis=0)[:, None] * s * (1 - np.exp(-s))
    for got, want in ((found.mean, of_mean), (found.raw_scale, of_raw)):
        got = np.asarray(got)
        error = got.std(0) / np.sqrt(DRAWS)
        assert np.all(np.abs(got.mean(0) - want) < 5 * error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:estimator=")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("network", ["unrolled", "scanned", "tied"])
def test_networks_that_use_a_kernel_again_are_those_of_sampled_weights(
    network, estimator
):
    """Moments of what is not linear in the kernel, against NumPy's own draws."""
    rng = np.random.default_rng(3)
    m, s = rng.normal(size=(4, 4)) / 2, rng.uniform(0.1, 0.5, size=(4, 4))
    x = rng.normal(size=(2, 4))

    def function(w, x, scanned=network == "scanned"):
        if network == "tied":
            return jnp.tanh(x @ w) @ w.T
        if scanned:
            body = lambda h, _: (jnp.tanh(h @ w + x), None)  # noqa: E731
            return jax.lax.scan(body, jnp.zeros_like(x), length=3)[0] + x @ w
        h = jnp.zeros_like(x)
        for _ in range(3):
            h = jnp.tanh(h @ w + x)
        return h + x @ w

    sampled = m + s * rng.normal(size=(40_000, 4, 4))
    want = np.asarray(
        jax.vmap(lambda w: function(w, jnp.float32(x), False))(jnp.float32(sampled))
    )
    q = bnn.init(jnp.float32(m), jnp.float32(s))
    got = np.asarray(draws(function, q, estimator, jnp.float32(x)))
    error = 5 * want.std(0) / np.sqrt(DRAWS)
    assert np.all(np.abs(got.mean(0) - want.mean(0)) < error)
    assert_allclose(got.std(0), want.std(0), rtol=0.12)


@pytest.mark.parametrize("estimator", slow_but(["flipout"], ESTIMATORS))
def test_a_warning_names_the_kernels_that_examples_share(estimator, key):
    params = {"in": jnp.zeros((3, 4)), "again": jnp.ones((4, 4)), "b": jnp.ones(4)}
    q = bnn.init(params, sigma=0.5)

    def function(params, x, times):
        x = x @ params["in"] + params["b"][None]
        for _ in range(times):
            x = jnp.tanh(x @ params["again"])
        return x

    call = local_reparam.call
    x = jnp.ones((5, 3))
    call(function, q, estimator, key, x, 1)  # no warning
    with pytest.warns(UserWarning, match=r"draws \['again'\] once for all examples"):
        y = call(function, q, estimator, key, x, 2)
    assert not np.allclose(y[0], y[1])  # the other kernel is not shared

    # A bias of two axes is no kernel: nothing is said of it.
    wide = {**params, "b": jnp.ones((1, 4))}
    call(lambda p, x: x @ p["in"] + p["b"], bnn.init(wide), estimator, key, x)
    with pytest.warns(UserWarning, match="the 5 examples"):
        call(lambda p, x: function(p, jnp.tile(x, (2, 1)), 1), q, estimator, key, x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_number_of_examples_must_be_known(estimator, key):
    q = bnn.init(jnp.ones((3, 2)))
    for batch in ((), ((jnp.ones((5, 3)), jnp.ones(4)),)):
        with pytest.raises(ValueError, match="must be the batch"):
            local_reparam.call(
                lambda w, *x: jnp.ones((5, 3)) @ w, q, estimator, key, *batch
            )


def convolution(w, x):
    return jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def zoo_convolution(w, x):
    return models.convolution.convolve(
        x, w, (2, 2), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layer", [convolution, zoo_convolution])
def test_convolutions_have_the_distribution_of_sampled_weights(layer, estimator):
    rng = np.random.default_rng(1)
    m, s = rng.normal(size=(3, 3, 2, 4)), rng.uniform(0.1, 1.0, size=(3, 3, 2, 4))
    x = jnp.float32(rng.normal(size=(2, 4, 4, 2)))
    q = bnn.init(jnp.float32(m), jnp.float32(s))
    mean = np.asarray(convolution(jnp.float32(m), x), np.float64)
    std = np.sqrt(convolution(jnp.float32(s**2), x**2))
    found = check_moments(layer, q, x, estimator, mean, std)
    between = np.corrcoef(found[:, 0, 1, 1, 0], found[:, 1, 1, 1, 0])[0, 1]
    assert abs(between) < 0.07


@pytest.mark.slow
@pytest.mark.parametrize("layer", [convolution, zoo_convolution])
def test_flipout_keeps_one_set_of_weights_for_an_example(layer):
    """Within an example outputs stay as correlated as with sampled weights, but signs.

    At two positions of an image with equal inputs, one kernel gives equal outputs.
    """
    q = bnn.init(jnp.ones((3, 3, 2, 4)), 0.5)
    x = jnp.ones((2, 6, 6, 2))
    y = local_reparam.call(layer, q, "flipout", jax.random.key(0), x)
    assert_allclose(y[:, 0, 0], y[:, 1, 1], rtol=1e-5)
    assert not np.allclose(y[0], y[1])
    noisy = local_reparam.call(layer, q, "local", jax.random.key(0), x)
    assert not np.allclose(noisy[:, 0, 0], noisy[:, 1, 1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_leaves_are_sampled_once_for_the_batch(estimator):
    """A bias, and a scale that stands in a sum."""
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    q = bnn.init(params, sigma={"w": 1e-6, "b": 1.0})

    def function(params, x):
        return x @ params["w"] + params["b"][None] + jnp.sum(params["b"] ** 2) / 1e6

    x = jnp.ones((5, 3))
    y = np.asarray(local_reparam.call(function, q, estimator, jax.random.key(0), x))
    assert_allclose(y, np.tile(y[:1], (5, 1)), atol=1e-4)
    assert np.all(np.abs(y[0]) > 1e-3)
    found = draws(function, q, estimator, x)
    assert_allclose(np.std(found[:, 0], axis=0), 1.0, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_noise_it_is_the_function_itself(estimator, key):
    model = models.create("wide_resnet_10_1", num_classes=10, remat=True)
    images = jax.random.normal(key, (16, 8, 8, 3))
    params, state = model.init(key, images)
    q = bnn.init(params, sigma=1e-12)

    def function(params, images):
        return model.apply(params, state, images, train=True)

    got, got_state = jax.jit(
        lambda q: local_reparam.call(function, q, estimator, key, images)
    )(q)
    want, want_state = jax.jit(function)(params, images)
    assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), got_state, want_state
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_module_of_another_library(estimator, key):
    mlp = eqx.nn.MLP(3, 2, 8, 1, key=key)
    params, static = eqx.partition(mlp, eqx.is_inexact_array)
    q = bnn.init(params, sigma=1e-12)
    assert all(jax.tree.leaves(bnn.weights_and_biases(params)))

    def function(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = jax.random.normal(key, (5, 3))
    assert_allclose(
        local_reparam.call(function, q, estimator, key, x),
        jax.vmap(mlp)(x),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kernels_that_are_rounded_keep_noise_of_their_own(estimator, key):
    """As in a model that computes in bfloat16."""
    q = bnn.init(jnp.ones((8, 4)), sigma=0.5)

    def function(w, x):
        return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)

    y = local_reparam.call(function, q, estimator, key, jnp.ones((5, 8)))
    assert y.dtype == jnp.bfloat16 and not np.allclose(y[0], y[1], atol=0.1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_scaled_loss_has_the_same_noise_and_gradients(estimator, key):
    """As float16 networks train: a scale of 2^10 does not round."""
    q = bnn.init(jnp.linspace(-1, 1, 8).reshape(4, 2), sigma=0.5)
    x = jnp.arange(20.0).reshape(5, 4) / 10

    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    def gradient(function, **options):
        def of(q):
            return local_reparam.call(function, q, estimator, key, x, **options)

        return jax.value_and_grad(of)(q)

    found = gradient(precision.scale_loss(loss), loss_scale=jnp.float32(1024))
    chex.assert_trees_all_close(found, gradient(loss), rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_gradient_that_looks_at_the_weight_is_refused(estimator, key):
    """A straight-through estimator would look at the standard deviation, say."""

    @jax.custom_vjp
    def clipped(w, limit):
        return w

    clipped.defvjp(
        lambda w, limit: (w, (w, limit)),
        lambda seen, g: (jnp.where(abs(seen[0]) < seen[1], g, 0), jnp.zeros(())),
    )
    q = bnn.init(jnp.ones((4, 2)), sigma=0.5)
    with pytest.raises(ValueError, match="found no dense layer or convolution"):
        local_reparam.call(
            lambda w, x: x @ clipped(w, jnp.float32(0.4)),
            q,
            estimator,
            key,
            jnp.ones((5, 4)),
        )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_flags_and_words_of_a_loss_stay_what_they_are(estimator, key):
    q = bnn.init(jnp.ones((8, 4)), sigma=0.5)

    def loss_fn(w, batch, kind, twice=False):
        assert kind == "squares"
        loss = jnp.mean((batch @ w) ** 2)
        return 2 * loss if twice else loss

    grad_fn = bnn.sgvb(loss_fn, num_data=100, kl_weight=0.0, estimator=estimator)
    one, two = (
        grad_fn(q, jnp.ones((5, 8)), "squares", twice=twice, key=key)[0]
        for twice in (False, True)
    )
    assert_allclose(two, 2 * one, rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_without_layers_is_refused(estimator, key):
    q = bnn.init(jnp.ones((2, 4)))
    grad_fn = bnn.sgvb(
        lambda w, b: jnp.sum(w[None][0] ** 2), num_data=100, estimator=estimator
    )
    with pytest.raises(ValueError, match="found no dense layer or convolution"):
        grad_fn(q, jnp.ones((5, 8)), key=key)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_inputs_of_zero_have_a_gradient(estimator, key):
    q = bnn.init(jnp.ones((3, 2)))

    def loss(w, batch):
        return jnp.mean((batch @ w) ** 2)

    _, grads = bnn.sgvb(loss, num_data=1_000, estimator=estimator)(
        q, jnp.zeros((4, 3)), key=key
    )
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def problem(batch=64):
    """A small network, some images, its posterior and its loss."""
    model = models.create("one_layer", num_classes=10)
    images = jax.random.normal(jax.random.key(1), (batch, 8, 8, 1))
    params, state = model.init(jax.random.key(0), images)

    def loss_fn(params, batch):
        logits, _ = model.apply(params, state, batch[0], train=False)
        return cross_entropy(logits, batch[1])

    return bnn.init(params, sigma=0.05), (images, jnp.arange(batch) % 10), loss_fn


@pytest.fixture(scope="module")
def gradients(one_layer):
    """Estimator -> (draws, parameters) gradients of the likelihood by the means."""
    q, batch, loss_fn = problem()
    keys = jax.random.split(jax.random.key(3), 300)
    found = {}
    for estimator in ("weights", *ESTIMATORS):
        grad_fn = bnn.sgvb(loss_fn, num_data=1_000, kl_weight=0.0, estimator=estimator)

        @jax.jit
        def flat(key, grad_fn=grad_fn):
            grads = grad_fn(q, batch, key=key)[1]
            return tuple(
                jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(part)])
                for part in (grads.mean, grads.raw_scale)
            )

        parts = [flat(k) for k in keys]
        found[estimator] = [np.stack(x) for x in zip(*parts, strict=True)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ("weights", *ESTIMATORS))
def test_variance_of_gradients_is_that_of_the_closed_form(estimator):
    """Least squares: noise that examples share does not average out, other noise does.

    With weights g = H (w - m + sigma kappa) and H = 2 X'X / B; with noise delta of
    variance x^2 sigma^2 for each example g = H (w - m) + 2 X' delta / B.
    """
    rng = np.random.default_rng(2)
    x, sigma = rng.normal(size=(256, 4)), rng.uniform(0.1, 1.0, size=(4, 1))
    hessian = 2 * x.T @ x / 256
    shared = hessian**2 @ sigma**2
    own = 4 / 256**2 * (x**2).T @ (x**2 @ sigma**2)
    assert np.all(own < 0.2 * shared)

    def loss(w, batch):
        return jnp.mean((batch @ w) ** 2)

    grad_fn = bnn.sgvb(loss, num_data=999, kl_weight=0.0, estimator=estimator)
    q = bnn.init(jnp.ones((4, 1)), jnp.float32(sigma))
    keys = jax.random.split(jax.random.key(0), DRAWS)
    found = jax.vmap(lambda k: grad_fn(q, jnp.float32(x), key=k)[1].mean)(keys)
    want = shared if estimator == "weights" else own
    assert_allclose(np.var(found, axis=0), want, rtol=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_have_the_same_mean(gradients, estimator):
    """Flipout's is exactly that of weights; local's is, but for convolutions.

    There it draws each position on its own, which a nonlinearity and a pool notice.
    """
    for theirs, mine in zip(gradients["weights"], gradients[estimator], strict=True):
        error = np.sqrt(theirs.var(0) / len(theirs) + mine.var(0) / len(mine))
        away = np.abs(theirs.mean(0) - mine.mean(0)) / (error + 1e-9)
        assert np.mean(away < 3) > (0.98 if estimator == "flipout" else 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_microbatches_have_noise_of_their_own(estimator, key):
    """Equal micro-batches would give equal gradients, were their noise the same."""
    q = bnn.init(jnp.ones((3, 1)), sigma=1.0)

    def loss(w, batch):
        y = batch @ w
        return jnp.mean(y), y[0, 0]

    def gradient(size):
        grad_fn = bnn.sgvb(
            loss,
            num_data=1_000,
            estimator=estimator,
            has_aux=True,
            microbatch_size=size,
        )
        keys = jax.random.split(key, 500)
        aux = jax.vmap(lambda k: grad_fn(q, jnp.ones((8, 3)), key=k)[0][1])(keys)
        return float(aux.std())

    # aux is averaged over micro-batches: over eight of them its deviation is less.
    assert gradient(1) == pytest.approx(gradient(8) / np.sqrt(8), rel=0.15)
