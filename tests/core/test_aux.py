"""Aux that each example has a row of: it is the whole batch's, in its order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import otmdr_jax
from otmdr_jax import baselines, bnn, ensemble
from tests import toy
from tests.marks import one_axis_at_a_time, slow_but

pytestmark = pytest.mark.usefixtures("optimized")
RHO = (0.3, 0.2)


def problem(batch=12):
    params, data = toy.regression_problem(batch=batch)
    return params, data | {"index": np.arange(batch, dtype=np.int32)}


def loss_fn(params, batch):
    """What has a row for each example, and what has the batch's size by chance."""
    losses = (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2
    statistics = jnp.full(12, jnp.mean(batch["x"]))
    aux = {"losses": losses, "index": batch["index"], "statistics": statistics}
    return jnp.mean(losses), aux


def check(value, aux, data):
    """The rows are those of the loss that was returned, which is of all examples."""
    np.testing.assert_array_equal(aux["index"], data["index"])
    np.testing.assert_allclose(np.mean(aux["losses"]), value, rtol=1e-5)


WAYS = {
    "random": {},
    "one radius": {"rho": 0.3},
    "three particles": {"num_particles": 3, "noise_std": 0.1},
    "a scan": {"num_particles": 3, "particle_map": "scan"},
    "vmap": {"num_particles": 3, "particle_map": "vmap"},
    "ordered": {"split": "ordered", "num_particles": 2, "noise_std": 0.1},
    "micro-batches": {"microbatch_size": 3},
    "micro-batches, uneven": {"microbatch_size": 5},
    "one micro-batch and a rest": {"microbatch_size": 7, "split": "ordered"},
    "sub-batches": {"num_subbatches": 3, "num_particles": 2},
    "sub-batches in micro-batches": {"num_subbatches": 2, "microbatch_size": 4},
    "sub-batches, mapped": {"num_subbatches": 3, "particle_map": "vmap"},
}


@pytest.mark.parametrize(
    "way",
    slow_but(
        ("random", "a scan", "vmap", "micro-batches, uneven", "sub-batches, mapped"),
        WAYS,
    ),
)
def test_rows_are_the_whole_batchs_in_its_order(way, key):
    params, data = problem()
    fn = jax.jit(
        otmdr_jax.value_and_grad(loss_fn, **{"rho": RHO} | WAYS[way], has_aux=True)
    )
    (value, aux), _ = fn(params, data, key=key)
    check(value, aux, data)


@pytest.mark.slow
def test_the_accuracy_of_logits_is_that_of_the_examples(key):
    """Sixty separable examples of six classes, in a random order."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 10))
    batch = {"x": np.eye(6, dtype=np.float32)[labels], "y": labels}

    def loss(w, batch):
        logits = batch["x"] @ w
        of_label = jnp.take_along_axis(logits, batch["y"][:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - of_label), logits

    fn = otmdr_jax.value_and_grad(loss, has_aux=True, num_particles=2)
    (_, logits), _ = jax.jit(fn)(3.0 * jnp.eye(6), batch, key=key)
    assert logits.shape == (60, 6)
    assert np.mean(np.argmax(logits, axis=1) == labels) == 1.0


@pytest.mark.parametrize(
    "options",
    slow_but(
        [{"microbatch_size": 5}], [{}, {"microbatch_size": 5}, {"num_subbatches": 3}]
    ),
)
def test_of_a_shared_split_they_come_from_the_center(options):
    params, data = problem()
    fn = otmdr_jax.value_and_grad(loss_fn, split="shared", has_aux=True, **options)
    (_, aux), _ = jax.jit(fn)(params, data)
    p, d = jax.tree.map(np.float64, (params, data))
    expected = (d["x"] @ p["w"] + p["b"] - d["y"]) ** 2
    np.testing.assert_allclose(aux["losses"], expected, rtol=1e-5)
    np.testing.assert_array_equal(aux["index"], data["index"])


def test_what_keeps_its_shape_is_a_statistic_of_the_center():
    """A leaf of the batch's length that the batch's size does not change."""
    params, data = problem()
    fn = otmdr_jax.value_and_grad(loss_fn, RHO, split="ordered", has_aux=True)
    (_, aux), _ = fn(params, data)
    np.testing.assert_allclose(aux["statistics"], np.mean(data["x"][:6]), rtol=1e-5)


@pytest.mark.slow
@one_axis_at_a_time(
    sync=[True, False], options=[{}, {"split": "shared"}, {"num_subbatches": 4}]
)
def test_each_device_has_the_rows_of_its_examples(options, sync, key):
    params, data = problem()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    if "num_subbatches" not in options:
        options = options | {"sync_perturbation": sync}
    fn = otmdr_jax.value_and_grad(
        loss_fn, RHO, has_aux=True, axis_name="data", **options
    )
    rows = {"losses": P("data"), "index": P("data"), "statistics": P()}
    mapped = jax.shard_map(
        lambda params, data, key: fn(params, data, key=key),
        mesh=mesh,
        in_specs=(P(), P("data"), P()),
        out_specs=((P(), rows), P()),
    )
    (value, aux), _ = jax.jit(mapped)(params, data, key)
    np.testing.assert_array_equal(aux["index"], data["index"])
    if options.get("split") != "shared":
        check(value, aux, data)


@pytest.mark.slow
def test_particles_on_devices_are_averaged(key):
    params, data = problem()
    mesh = jax.make_mesh((2,), ("particle",), axis_types=(AxisType.Auto,))
    fn = otmdr_jax.value_and_grad(
        loss_fn, RHO, num_particles=4, has_aux=True, particle_axis_name="particle"
    )
    mapped = jax.shard_map(
        lambda params, data, key: fn(params, data, key=key),
        mesh=mesh,
        in_specs=(P(), P(), P()),
        out_specs=P(),
    )
    (value, aux), _ = jax.jit(mapped)(params, data, key)
    check(value, aux, data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [WAYS["micro-batches, uneven"], {"microbatch_size": 4}, WAYS["sub-batches"]],
)
def test_rows_of_a_batch_on_explicit_axes(options, key):
    params, data = problem()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    fn = otmdr_jax.value_and_grad(loss_fn, RHO, has_aux=True, **options)
    data = jax.device_put(data, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        (value, aux), _ = jax.jit(fn)(params, data, key=key)
    check(value, aux, data)


@pytest.mark.slow
@pytest.mark.parametrize("member_map", ["vmap", "scan", "unroll"])
def test_members_have_rows_of_their_own(member_map, key):
    params, data = problem()
    members = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    fn = ensemble.value_and_grad(loss_fn, RHO, has_aux=True, member_map=member_map)
    (values, aux), _ = jax.jit(fn)(members, data, key=key)
    for m in range(2):
        check(values[m], jax.tree.map(lambda x, m=m: x[m], aux), data)


@pytest.mark.slow
def test_of_a_joint_loss_the_examples_are_on_the_second_axis(key):
    params, data = problem()
    members = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)

    def logits_fn(params, batch):
        logits = jnp.outer(batch["x"] @ params["w"], jnp.arange(2.0))
        return logits, batch["index"]

    loss = ensemble.joint_loss(
        logits_fn, lambda log_probs, batch: -jnp.mean(log_probs[:, 0]), has_aux=True
    )
    (_, index), _ = otmdr_jax.value_and_grad(loss, has_aux=True)(members, data, key=key)
    np.testing.assert_array_equal(index, [data["index"]] * 2)
    with pytest.raises(ValueError, match="aux of shape .2, 4. for 4 examples"):
        otmdr_jax.value_and_grad(loss, has_aux=True, microbatch_size=4)(
            members, data, key=key
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"num_particles": 2}, {"microbatch_size": 5}],
)
def test_of_a_posterior_too(options, key):
    params, data = problem()
    q = bnn.init(jax.tree.map(jnp.asarray, params), sigma=0.1, mask=True)
    fn = bnn.robust_gradient(loss_fn, num_data=100, rho=RHO, has_aux=True, **options)
    found = jax.jit(fn)(q, data, key=key, kl_weight=0.0)
    check(found.value, found.aux, data)


@pytest.mark.parametrize(
    "build",
    slow_but(
        [otmdr_jax.sam],
        [otmdr_jax.sam, otmdr_jax.dual, baselines.gsam, baselines.looksam],
    ),
)
def test_transformations_hold_them(build):
    params, data = problem()
    aux = jax.tree.map(jnp.zeros_like, loss_fn(params, data)[1])
    tx = build(loss_fn, has_aux=True, aux_init=aux, microbatch_size=5)
    _, state = jax.jit(tx.update)(params, tx.init(params), params, batch=data)
    np.testing.assert_array_equal(state.aux["index"], data["index"])


def test_a_loss_of_one_size_says_so_where_it_matters(key):
    params, data = problem()
    y, batch = data["y"], {"x": data["x"]}

    def loss(params, batch, y):
        losses = (batch["x"] @ params["w"] + params["b"] - y) ** 2
        return jnp.mean(losses), losses

    options = {"split": "shared", "has_aux": True, "axis_name": "data"}
    fn = otmdr_jax.value_and_grad(loss, **options | {"axis_name": None})
    np.testing.assert_allclose(
        fn(params, batch, y)[0][1], loss(params, batch, y)[1], rtol=1e-5
    )
    with pytest.raises(ValueError, match="a leaf of aux has as many rows as the batch"):
        jax.vmap(
            lambda batch, y: otmdr_jax.value_and_grad(loss, **options)(
                params, batch, y
            ),
            axis_name="data",
        )({"x": data["x"][None]}, y[None])


@pytest.mark.parametrize(
    "options",
    slow_but([{"split": "ordered"}], [{"split": "ordered"}, {"num_subbatches": 2}]),
)
def test_in_a_program_for_any_size(options):
    params, data = problem()
    fn = jax.jit(
        otmdr_jax.value_and_grad(
            loss_fn, RHO, has_aux=True, **{"split": "shared"} | options
        )
    )
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2 * b, *x.shape[1:]), x.dtype), data
    )
    program = jax.export.export(fn)(params, shapes)
    (_, aux), _ = program.call(params, data)
    np.testing.assert_array_equal(aux["index"], data["index"])
