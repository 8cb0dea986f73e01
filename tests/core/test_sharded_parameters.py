"""Parameters that are sharded over a mesh: one contract for all that takes them.

Whatever the mesh, the result is the unsharded one to rounding, gradients, updates and
what a state holds of the parameters' shape are sharded as the parameters are, and no
device ever holds a parameter whole.
"""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import otmdr_jax
from otmdr_jax import baselines, bnn, ensemble
from otmdr_jax.baselines import dst
from otmdr_jax.core import tree
from tests.marks import slow_but

# No part of a batch has the number of entries of a kernel, or two or three times it:
# the size of a collective operation tells what it moves.
INPUTS, HIDDEN, OUTPUTS, BATCH = 10, 20, 6, 16
SPECS = {"kernel": P(None, "model"), "bias": P("model"), "out": P("model")}
KEY = jax.random.key(0)


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_mesh(kind):
    """Of "explicit" or "auto" axes, "1d" or "2d", as in "explicit-1d"."""
    axes, dims = kind.split("-")
    shape, names = ((4,), ("model",)) if dims == "1d" else ((2, 4), ("data", "model"))
    types = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}[axes]
    return jax.make_mesh(shape, names, axis_types=(types,) * len(shape))


def loss_fn(params, batch):
    """A perceptron whose hidden units are spread over devices."""
    h = jnp.tanh(batch["x"] @ params["kernel"] + params["bias"][None])
    sharding = jax.typeof(h).sharding
    if sharding.spec[1] is None:
        prediction = h @ params["out"]
    else:  # over hidden units: explicit axes want to know where the sum goes
        summed = NamedSharding(sharding.mesh, P(sharding.spec[0], None))
        prediction = jnp.matmul(h, params["out"], out_sharding=summed)
    return jnp.mean((prediction - batch["y"]) ** 2)


class Gradient:
    """A gradient function, in the form of a transformation without state."""

    def __init__(self, function):
        self.function = function

    def init(self, params):
        return ()

    def update(self, updates, state, params, batch):
        return self.function(params, batch, key=KEY), state


def gradient(build, loss=loss_fn, **options):
    return Gradient(build(loss, **options))


def pruned(optimizer, growth):
    """Sparse training, of the gradients of the loss."""
    tx = dst.dynamic(optimizer, KEY, density=0.5, rate=0.5, steps=(1,), growth=growth)

    def update(updates, state, params, batch):
        return tx.update(jax.grad(loss_fn)(params, batch), state, params)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def functional(dual):
    """A functional form of the dual, whose state has no differences of losses."""

    def update(updates, state, params, batch):
        found, state = dual.apply(state, params, batch)
        return found.grads, state

    return optax.GradientTransformationExtraArgs(lambda params: dual.init(), update)


TRANSFORMATIONS = {
    "otmdr": otmdr_jax.otmdr(loss_fn, KEY),
    "sam": otmdr_jax.sam(loss_fn),
    "asam": otmdr_jax.asam(loss_fn),
    "dual": otmdr_jax.dual(loss_fn, num_steps=2),
    "gsam": baselines.gsam(loss_fn),
    "looksam": baselines.looksam(loss_fn, rho=1.0, every=2),
    "fisher_sam": baselines.fisher_sam(loss_fn),
    "bsam": baselines.bsam(
        loss_fn, KEY, learning_rate=0.1, weight_decay=1e-3, num_data=100
    ),
    "ivon": baselines.ivon(loss_fn, KEY, learning_rate=0.1, num_data=100),
    "dynamic": pruned(optax.sgd(0.1, 0.9), "gradient"),
    "dynamic, random growth": pruned(optax.sgd(0.1, 0.9), "random"),
}
MEMBERS = (
    {
        f"ensemble, {how}": gradient(
            ensemble.value_and_grad, split="shared", member_map=how
        )
        for how in ("unroll", "vmap", "scan")
    }
    | {
        f"per_member({name})": ensemble.per_member(TRANSFORMATIONS[name])
        for name in ("looksam", "bsam", "dynamic, random growth")
    }
    | {
        f"ensemble.dual, {how}": functional(
            ensemble.dual_gradient(loss_fn, member_map=how)
        )
        for how in ("unroll", "vmap", "scan")
    }
)
POSTERIORS = {
    "bnn": gradient(bnn.value_and_grad, num_data=100, split="shared"),
    "sgvb, local": gradient(bnn.sgvb, num_data=100, estimator="local"),
    "sgvb, flipout": gradient(bnn.sgvb, num_data=100, estimator="flipout"),
}
OPTIONS = {
    "three steps": dict(
        split="ordered", rho=(0.1, 0.2, 0.3), merge="mean", norm="per_leaf"
    ),
    "fisher, mask": dict(
        split="shared", fisher=1.0, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "noise": dict(split="shared", rho=0.1, noise_std=0.01),
    "particles, unroll": dict(num_particles=2, norm="none", particle_map="unroll"),
    "particles, vmap": dict(num_particles=3, adaptive=True, particle_map="vmap"),
    "particles, scan": dict(
        rho=0.1, split="shared", num_particles=2, noise_std=0.01, particle_map="scan"
    ),
    "micro-batches": dict(split="shared", rho=0.1, microbatch_size=8, merge="sum"),
    "micro-batches, uneven": dict(split="shared", rho=0.1, microbatch_size=7),
    "sub-batches": dict(split="shared", rho=0.1, num_subbatches=2),
    "first order": dict(rho=0.1, sampler="first_order", tilt=0.5, num_particles=2),
    "first order, by leaf": dict(
        rho=0.1, sampler="first_order", tilt=0.5, norm="per_leaf", fisher=1.0
    ),
    "chain": dict(rho=0.1, sampler="langevin", tilt=0.5, num_steps=2, split="shared"),
    "chain on parts": dict(
        rho=0.1, sampler="langevin", tilt=0.5, num_steps=2, split="ordered"
    ),
    "projected": dict(split="ordered", rho=(0.2, 0.3), project=True),
}
GRADIENTS = {
    name: gradient(otmdr_jax.robust_gradient, **options)
    for name, options in OPTIONS.items()
}
METHODS = TRANSFORMATIONS | MEMBERS | POSTERIORS | GRADIENTS


def setup(name, mesh=None, specs=SPECS, lead=None):
    """The parameters of a method, on a mesh or on one device."""
    shapes = {"kernel": (INPUTS, HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN, OUTPUTS)}
    params = {k: jnp.asarray(numbers(len(k), *shape)) for k, shape in shapes.items()}
    if name in MEMBERS:
        params = tree.stack([params, jax.tree.map(lambda x: 2 * x, params)])
        specs = {k: P(lead, *spec) for k, spec in specs.items()}
    if mesh is not None:
        params = place(params, mesh, specs)
    return bnn.init(params, mask=True) if name in POSTERIORS else params


def make_batch(mesh=None, spec=None):
    batch = {"x": numbers(1, BATCH, INPUTS), "y": numbers(2, BATCH, OUTPUTS)}
    batch = jax.tree.map(jnp.asarray, batch)
    return batch if mesh is None else place(batch, mesh, dict.fromkeys("xy", spec))


def place(values, mesh, specs):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put(values, shardings)


def run(tx, params, state, batch, step):
    """The updates and states of two steps."""
    found = []
    for _ in range(2 if jax.tree.leaves(state) else 1):
        updates, state = step(params, state, batch)
        found.append((updates, state))
    return found


@functools.cache
def on_one_device(name):
    """One particle, one member after the other."""
    unrolled = re.sub("vmap|scan", "unroll", name)
    if name in GRADIENTS:
        options = OPTIONS[name] | {"particle_map": "unroll"}
        tx = gradient(otmdr_jax.robust_gradient, **options)
    else:
        tx = METHODS[unrolled]
    params = setup(unrolled)

    def step(params, state, batch):
        return tx.update(params, state, params, batch=batch)

    # Most of the operations, one by one, are those of other methods too.
    long = name in MEMBERS or name in POSTERIORS or "dynamic" in name
    step = jax.jit(step) if long else step
    return run(tx, params, tx.init(params), make_batch(), step)


def check(name, mesh, batch_spec=None, **placing):
    """The contract; returns the compiled step."""
    tx, params = METHODS[name], setup(name, mesh, **placing)
    if batch_spec is None:
        batch_spec = P("data") if "data" in mesh.axis_names else P()
    batch, state = make_batch(mesh, batch_spec), tx.init(params)
    step = jax.jit(lambda p, s, b: tx.update(p, s, p, batch=b))
    compiled = step.lower(params, state, batch).compile()
    found = run(tx, params, state, batch, compiled)
    assert_close(found, on_one_device(name))
    assert_sharded_as(params, (state, found))
    return compiled


def assert_close(found, expected):
    pairs = zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    )
    for (path, x), y in pairs:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, 2e-5, 2e-5, equal_nan=True, err_msg=where)


def assert_sharded_as(params, values):
    """All arrays of a parameter's shape are sharded as it is; each shape is one's."""
    shardings = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    seen = set()
    for path, x in jax.tree.leaves_with_path(values):
        if x.shape in shardings:
            same = x.sharding.is_equivalent_to(shardings[x.shape], x.ndim)
            assert same, (jax.tree_util.keystr(path), x.sharding)
            seen.add(x.shape)
    assert seen == set(shardings)


def moved(compiled):
    """(operation, entries) of all that is sent but sums of partial results."""
    lines = re.findall(
        r"= (.*?) (all-gather|all-to-all|collective-permute|ragged-all-to-all)"
        r"(?:-start)?\(",
        compiled.as_text(),
    )
    return [
        (operation, math.prod(map(int, filter(None, dims.split(",")))))
        for shapes, operation in lines
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


def of_kernels(compiled):
    """Those that move as much as a kernel holds, or as it has in members, particles."""
    sizes = [n * HIDDEN * width for width in (INPUTS, OUTPUTS) for n in (1, 2, 3)]
    return [(what, entries) for what, entries in moved(compiled) if entries in sizes]


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["micro-batches", "particles, scan"],
        [n for n in METHODS if n != "dynamic, random growth"],
    ),
)
def test_explicit_axes(name):
    assert not of_kernels(check(name, make_mesh("explicit-2d")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["looksam", "dual", "dynamic", "per_member(bsam)", "bnn", "sub-batches"],
)
def test_automatic_axes(name):
    assert not of_kernels(check(name, make_mesh("auto-2d")))


@pytest.mark.parametrize(
    "kind", slow_but(["explicit-2d"], ["explicit-1d", "auto-1d", "explicit-2d"])
)
def test_nothing_moves_where_the_batch_is_everywhere(kind):
    compiled = check("noise", make_mesh(kind), batch_spec=P())
    assert "all-reduce" in compiled.as_text()
    assert not moved(compiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["ensemble, vmap", "per_member(looksam)", "ensemble.dual, vmap"],
)
def test_members_may_be_spread_over_an_explicit_axis(name):
    mesh = jax.make_mesh(
        (2, 4), ("member", "model"), axis_types=(AxisType.Explicit,) * 2
    )
    assert not of_kernels(check(name, mesh, lead="member"))


@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_spread_members_are_mapped_at_once_or_not_at_all(how):
    mesh = jax.make_mesh((2,), ("member",), axis_types=(AxisType.Explicit,))
    specs = dict.fromkeys(SPECS, P())
    params = setup("ensemble, vmap", mesh, specs, lead="member")
    with pytest.raises(ValueError, match=f"'member'.*mapped at once.*got '{how}'"):
        METHODS[f"ensemble, {how}"].update(None, (), params, make_batch(mesh, P()))


@pytest.mark.parametrize("name", slow_but(["sam"], ["sgvb, local", "sam"]))
def test_fully_sharded_parameters_are_gathered_by_the_loss_alone(name):
    """As with FSDP: over the axis of the data; the loss has each layer when it is due.

    Local reparameterisation looks through the gathering.
    """
    mesh = make_mesh("explicit-2d")

    def loss(params, batch):
        everywhere = NamedSharding(jax.typeof(params["kernel"]).sharding.mesh, P())
        whole = jax.tree.map(lambda x: jax.sharding.reshard(x, everywhere), params)
        return loss_fn(whole, batch)

    specs = {"kernel": P("data"), "bias": P("data"), "out": P("data")}
    params = setup(name, mesh, specs)
    batch = make_batch(mesh, P("data"))
    if name == "sam":
        tx, passes = otmdr_jax.sam(loss), 2
    else:  # of the means, the deviations and their draw
        tx, passes = gradient(bnn.sgvb, loss=loss, num_data=100, estimator="local"), 3
    state = tx.init(params)
    step = jax.jit(lambda p, s, b: tx.update(p, s, p, batch=b))
    compiled = step.lower(params, state, batch).compile()
    updates, state = compiled(params, state, batch)
    (expected, _), *_ = on_one_device(name)
    assert_close(updates, expected)
    assert_sharded_as(params, updates)
    plain = jax.jit(jax.grad(loss)).lower(
        bnn.mean(params) if passes == 3 else params, batch
    )
    assert len(of_kernels(compiled)) <= passes * len(of_kernels(plain.compile()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["looksam", "dual", "bsam", "dynamic"])
def test_a_state_may_be_made_inside_of_jit(name):
    mesh = make_mesh("explicit-2d")
    params = setup(name, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(METHODS[name].init)(params)
    assert_sharded_as(params, (state, params))
    assert_close(state, METHODS[name].init(setup(name)))


@pytest.mark.slow
def test_bfloat16_parameters_stay_what_and_where_they_are():
    mesh = make_mesh("explicit-2d")
    params, batch = setup("noise", mesh), make_batch(mesh, P("data"))
    params, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch))
    found = jax.jit(METHODS["noise"].function)(params, batch, key=KEY)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found.grads))
    assert_sharded_as(params, found.grads)
    (expected, _), *_ = on_one_device("noise")
    for name, grad in found.grads.items():
        np.testing.assert_allclose(
            np.float32(grad), expected.grads[name], rtol=0.1, atol=0.05
        )


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "name", ["noise", "micro-batches", "micro-batches, uneven", "sub-batches", "chain"]
)
def test_outside_of_jit_arrays_stay_sharded_too(name, inside):
    mesh = make_mesh("explicit-2d")
    params, batch = setup(name, mesh), make_batch(mesh, P("data"))
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        found = METHODS[name].function(params, batch, key=KEY)
    assert_sharded_as(params, found.grads)
    (expected, _), *_ = on_one_device(name)
    assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise", "particles, scan"])
def test_in_the_context_of_a_mesh_no_device_makes_a_whole_kernel(name):
    """There a new array is on all devices, unless its sharding is said."""
    mesh = make_mesh("explicit-2d")
    with jax.set_mesh(mesh):
        compiled = check(name, mesh)
    text = compiled.as_text()
    assert f"[{INPUTS},{HIDDEN // 4}]" in text
    assert f"[{INPUTS},{HIDDEN}]" not in text
