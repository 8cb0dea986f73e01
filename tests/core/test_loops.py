"""How particles and members are mapped, and what accelerators get in the place of it.

The form that an accelerator gets runs here on a CPU: the backend's name is replaced.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import otmdr_jax
from otmdr_jax import bnn, ensemble, models
from otmdr_jax.core import loops, tree
from otmdr_jax.experiments import methods

KEY = jax.random.key(0)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def seen_as(backend, devices=1):
    """What the library is told of where it runs."""
    return mock.patch.multiple(
        jax, default_backend=lambda: backend, device_count=lambda: devices
    )


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def backend(request):
    with seen_as(request.param):
        yield request.param


def convolution(params, batch):
    out = jax.lax.conv_general_dilated(
        batch, params, (1, 1), "SAME", dimension_numbers=LAYOUT
    )
    return jnp.mean(jnp.tanh(out) ** 2)


def product(params, batch):
    return jnp.mean(jnp.tanh(batch.reshape(len(batch), -1) @ params) ** 2)


KERNEL, WEIGHTS = jnp.ones((3, 3, 2, 2)), jnp.full((32, 3), 0.01)
BATCH = jnp.ones((4, 4, 4, 2))


def loops_in(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("scan[")


def wrapped(params, batch):
    """A convolution in a conditional, in a loop, in a checkpoint."""

    def body(carry, _):
        loss = jax.lax.cond(
            carry > 0, jax.checkpoint(convolution), lambda *_: 1.0, params, batch
        )
        return loss, None

    return jax.lax.scan(body, 1.0, None, length=2)[0]


class TestAuto:
    """On CPUs only a convolution of `jax.lax` keeps particles out of a loop."""

    @pytest.mark.parametrize(
        ("loss", "params", "in_program"),
        [(convolution, KERNEL, 0), (product, WEIGHTS, 1)],
    )
    def test_particles(self, loss, params, in_program, backend):
        fn = otmdr_jax.value_and_grad(loss, num_particles=3)
        program = lambda p, b: fn(p, b, key=KEY)  # noqa: E731
        scans = in_program if backend == "cpu" else 1
        assert loops_in(program, params, BATCH) == scans

    @pytest.mark.parametrize(
        ("loss", "params", "in_program"),
        [(convolution, KERNEL, 0), (product, WEIGHTS, 1)],
    )
    def test_members(self, loss, params, in_program):
        fn = ensemble.value_and_grad(loss)
        members = jnp.stack([params] * 3)
        program = lambda p, b: fn(p, b, key=KEY)  # noqa: E731
        assert loops_in(program, members, BATCH) == in_program

    @pytest.mark.parametrize(("devices", "in_program"), [(1, 1), (4, 0)])
    def test_members_that_several_accelerators_may_share(self, devices, in_program):
        """A loop would run all on all devices, one after the other."""
        fn = ensemble.value_and_grad(product)
        program = lambda p, b: fn(p, b, key=KEY)  # noqa: E731
        with seen_as("gpu", devices):
            assert loops_in(program, jnp.stack([WEIGHTS] * 3), BATCH) == in_program

    @pytest.mark.slow
    def test_a_loss_that_looks_at_values_is_unrolled(self):
        """Outside of jit Python may decide on numbers, which no loop lets it."""

        def loss(params, batch):
            large = batch[batch[:, 0] > -9.0]  # a shape that depends on values
            value = jnp.mean((large @ params) ** 2)
            return value if float(jax.lax.stop_gradient(value)) > 0 else -value

        def plain(params, batch):
            return jnp.mean((batch @ params) ** 2)

        batch = jax.random.normal(KEY, (6, 4))
        options = {"num_particles": 3, "microbatch_size": 2}
        got, want = (
            otmdr_jax.value_and_grad(fn, **options)(jnp.ones(4), batch, key=KEY)
            for fn in (loss, plain)
        )
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), got, want)

    def test_a_convolution_deep_in_the_program_is_found(self):
        found = loops.fastest("auto", wrapped, (KERNEL, BATCH), 2)
        assert found == "unroll"
        gradient = jax.grad(wrapped)
        assert loops.fastest("auto", gradient, (KERNEL, BATCH), 2) == "unroll"

    def test_networks_of_the_zoo_are_scanned(self):
        """Their convolutions are not those of `jax.lax` on CPUs."""
        model = models.create("cnn_small", 10)
        images = jnp.zeros((4, 8, 8, 3))
        params, state = jax.jit(model.init)(KEY, images)

        def loss_fn(params, batch):
            logits, _ = model.apply(params, state, batch, train=True)
            return methods.cross_entropy(logits, jnp.arange(4))

        gradient = jax.grad(loss_fn)
        assert loops.fastest("auto", gradient, (params, images), 2) == "scan"

    def test_many_micro_batches_are_never_copied(self):
        copied = loops.fastest("sequential", convolution, (KERNEL, BATCH), 8)
        looped = loops.fastest("sequential", convolution, (KERNEL, BATCH), 9)
        assert (copied, looped) == ("unroll", "scan")


@pytest.mark.parametrize("how", ["unroll", "scan", "vmap"])
def test_every_backend_computes_the_same(how, backend):
    """Against the particles one by one, outside of any map."""
    params = {"w": jax.random.normal(KEY, (5, 3)), "b": jnp.full(3, 0.1)}
    batch = jax.random.normal(jax.random.key(1), (8, 5))

    def loss_fn(p, batch):
        return jnp.mean(jnp.sin(batch @ p["w"] + p["b"][None]) ** 2)

    def one(x, center):
        away = jax.tree.map(lambda w: w * (1 + x), center)
        value, grads = jax.value_and_grad(loss_fn)(away, batch)
        return grads, value

    xs = jnp.array([0.0, 0.1, 0.3, -0.2])
    got, values = jax.jit(lambda p: loops.average(one, xs, 4, how, common=p))(params)
    each = [one(float(x), params) for x in xs]
    want = jax.tree.map(lambda *g: np.mean(np.stack(g), 0), *[g for g, _ in each])
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)
    assert_allclose(values, [v for _, v in each], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_a_program_of_a_gpu_can_be_differentiated_and_mapped(how):
    """Barriers and layouts do not stand in the way; by differences."""
    params, batch = jnp.full((4, 3), 0.3), jax.random.normal(KEY, (8, 4))

    def loss_fn(params, batch):
        return jnp.mean(jnp.sin(batch @ params) ** 2)

    fn = otmdr_jax.value_and_grad(
        loss_fn, num_particles=2, noise_std=0.1, particle_map=how
    )

    def after_a_step(rho):
        _, grads = fn(params, batch, key=KEY, rho=(rho, 2 * rho))
        return loss_fn(params - grads, batch)

    with seen_as("gpu"):
        slope = jax.jit(jax.grad(after_a_step))(0.05)
        low, high = jax.jit(jax.vmap(after_a_step))(jnp.array([0.04, 0.06]))
    assert_allclose(slope, (high - low) / 0.02, rtol=1e-2)


@pytest.mark.parametrize(("devices", "kept"), [(1, True), (4, False)])
def test_weights_keep_their_layout_where_no_mesh_can_divide_them(devices, kept):
    """On a mesh the constraint would gather them; inside of shard_map there is none."""
    fn = otmdr_jax.value_and_grad(product, num_particles=2, particle_map="scan")

    def step(params, batch):
        return fn(params, batch, key=KEY)

    mapped = jax.shard_map(
        step,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    with seen_as("gpu", devices):
        jitted = str(jax.make_jaxpr(step)(WEIGHTS, BATCH))
        in_map = str(jax.make_jaxpr(mapped)(WEIGHTS, jnp.concatenate([BATCH] * 4)))
    assert ("layout_constraint" in jitted) is kept
    assert "layout_constraint" in in_map


def test_a_scan_for_a_gpu_can_be_exported():
    """JAX has to be told that the layout of the weights is meant."""
    fn = otmdr_jax.value_and_grad(product, num_particles=2, particle_map="scan")
    program = jax.jit(lambda p, b: fn(p, b, key=KEY))
    meant = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    with seen_as("gpu"):
        found = jax.export.export(program, platforms=["cuda"], disabled_checks=[meant])(
            WEIGHTS, BATCH
        )
    assert found.platforms == ("cuda",)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["auto", "unroll", "scan", "vmap"])
def test_no_parameters_at_all(how):
    fn = otmdr_jax.value_and_grad(
        lambda _, batch: jnp.mean(batch), num_particles=2, particle_map=how
    )
    value, grads = fn(None, jnp.arange(4.0), key=KEY)
    assert_allclose(value, 1.5)
    assert grads is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["auto", "unroll", "scan", "vmap"])
def test_aux_may_hold_numbers_of_python(how):
    fn = otmdr_jax.value_and_grad(
        lambda w, batch: (jnp.mean((batch @ w) ** 2), {"temperature": 1.5}),
        num_particles=3,
        has_aux=True,
        particle_map=how,
    )
    (_, aux), _ = fn(jnp.ones(2), jnp.ones((4, 2)), key=KEY)
    assert_allclose(aux["temperature"], 1.5)


def test_samples_of_a_posterior_are_not_spread_over_accelerators():
    """Each device draws them, so that a loop leaves none of the work to others."""
    posterior = bnn.init({"w": jnp.ones((4, 2))})

    def sample(posterior, x):
        return bnn.predict(
            lambda p: x @ p["w"], posterior, key=KEY, num_samples=5, sample_map="auto"
        )

    with seen_as("gpu", 4):
        assert loops_in(sample, posterior, jnp.ones((3, 4))) == 1


def leaves_of(scale):
    """Leaves alike and not, scalars among them."""
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (3, 4), (7,), (7,), (7,), (), (), (1,), (2, 2)]
    return [np.float32(scale * rng.normal(size=shape)) for shape in shapes]


class TestNorm:
    @pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-22])
    def test_leaves_alike_are_summed_together(self, scale, backend):
        leaves = leaves_of(scale)
        flat = np.concatenate([np.float64(x).ravel() for x in leaves])
        got = jax.jit(tree.norm)([jnp.asarray(x) for x in leaves])
        assert_allclose(got, np.linalg.norm(flat), rtol=1e-6)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_scalars_alone(self, scale, backend):
        """XLA makes x^2 c^2 of (x c)^2 where it sees scalars."""
        got = jax.jit(tree.norm)([jnp.float32(3 * scale), jnp.float32(4 * scale)])
        assert_allclose(got, 5 * scale, rtol=1e-6)

    def test_it_joins_no_dtypes_and_counts_complex_numbers(self, backend):
        leaves = [jnp.full(2, 3.0), jnp.full(2, 4j), jnp.full(2, 2.0, jnp.bfloat16)]
        assert_allclose(tree.norm(leaves), np.sqrt(2 * (9 + 16 + 4)), rtol=1e-6)

    def test_it_has_its_derivative(self, backend):
        x = [jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0]), jnp.zeros(())]
        got = jax.jit(jax.grad(tree.norm))(x)
        for a, b in zip(got, x, strict=True):
            assert_allclose(a, b / 5, rtol=1e-6)

    def test_fewer_kernels_are_needed(self):
        """As many sums as there are shapes, three of each."""
        leaves = [jnp.ones((3, 4))] * 5 + [jnp.ones(7)] * 6
        sums = {}
        for name in ("cpu", "gpu"):
            with seen_as(name):
                program = jax.make_jaxpr(lambda x: tree.norm(x))(leaves)
            sums[name] = str(program).count("reduce_sum")
        assert sums == {"cpu": 33, "gpu": 6}

    def test_leaves_that_lie_in_different_ways_are_not_joined(self):
        """Which JAX refuses on explicit axes, however many devices it knows of."""
        mesh = jax.make_mesh((2, 2), ("data", "model"))
        kernel = np.random.default_rng(2).normal(size=(4, 8)).astype(np.float32)
        leaves = [
            jax.device_put(kernel, NamedSharding(mesh, P(*axes)))
            for axes in (("data",), (None, "model"), ())
        ]
        with seen_as("gpu", 1):
            got = jax.jit(lambda x: tree.norm(x))(leaves)
        assert_allclose(got, np.sqrt(3 * np.sum(kernel**2)), rtol=1e-6)

    def test_of_members_that_are_spread_over_devices(self):
        """`jax.vmap` does not stack what lies on a mesh with explicit axes."""
        mesh = jax.make_mesh((2, 2), ("member", "model"))  # explicit by default
        lies = NamedSharding(mesh, P("member", None, "model"))
        kernel = np.random.default_rng(2).normal(size=(4, 3, 8)).astype(np.float32)
        leaves = [jax.device_put(scale * kernel, lies) for scale in (1, 2)]
        for devices in (1, 4):
            with seen_as("gpu", devices), jax.set_mesh(mesh):
                got = jax.jit(jax.vmap(lambda x: tree.norm(x)))(leaves)
            want = np.sqrt(5 * np.sum(kernel**2, axis=(1, 2)))
            assert_allclose(got, want, rtol=1e-6)

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_sharded_leaves_are_not_gathered(self, kind):
        mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))

        def spread(x, *spec):
            return jax.device_put(x, NamedSharding(mesh, P(*spec)))

        kernel = np.random.default_rng(1).normal(size=(8, 12)).astype(np.float32)
        leaves = [
            *(spread(kernel, None, "model") for _ in range(3)),
            spread(kernel, "model"),
            spread(kernel),
            spread(kernel[0], "model"),
            spread(kernel[1], "model"),
        ]
        with seen_as("gpu", 4):
            program = jax.jit(tree.norm).lower(leaves).compile()
        want = np.linalg.norm(np.concatenate([np.ravel(x) for x in leaves]))
        assert_allclose(program(leaves), want, rtol=1e-6)
        text = program.as_text()
        assert "all-reduce" in text
        assert "all-gather" not in text
        assert "all-to-all" not in text


def test_only_who_looks_at_the_distance_pays_for_it():
    """It is measured before the last pass, which then needs no ascent gradient."""
    options = {"split": "shared", "rho": 0.1}
    watched = otmdr_jax.robust_gradient(product, **options)
    blind = otmdr_jax.value_and_grad(product, **options)
    seen, unseen = (str(jax.make_jaxpr(fn)(WEIGHTS, BATCH)) for fn in (watched, blind))
    assert seen.count("optimization_barrier") == 1
    assert unseen.count("optimization_barrier") == 0
    found = jax.jit(watched)(WEIGHTS, BATCH)
    value, grads = jax.jit(blind)(WEIGHTS, BATCH)
    assert_allclose(found.diagnostics.distances, [0.1], rtol=1e-5)
    assert_allclose(found.value, value, rtol=1e-6)
    assert_allclose(found.grads, grads, rtol=1e-5)
