"""The programs that `compile_for.py` compiles: name -> (function, its arguments).

Arguments are shapes with the shardings of the target's devices. Nothing is run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import make_arguments, make_batch, make_steps
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import otmdr_jax
from otmdr_jax import ensemble, models, parallel
from otmdr_jax.experiments import methods

BATCH = 128
# What a method needs beside a network and an optimizer.
_LAWS = {"num_data": 50_000, "num_samples": 2}
_OWN = {**_LAWS, "weight_decay": 5e-4, "learning_rate": 0.1}
NEEDS: dict[str, dict[str, Any]] = {
    "bsam": _OWN,
    "ivon": _OWN,
    "sgvb": _LAWS,
    "otmdr-bnn": _LAWS,
    "otmdr-dual-bnn": _LAWS,
    "looksam": {"every": 5},
    **{name: {"ends": (100, 200)} for name in ("snapshot", "fge", "swa")},
    "swag": {"ends": (100, 200), "rank": 2, "num_samples": 2},
    "dst": {"density": 0.5, "rate": 0.5, "steps": (100,)},
    "edst": {"density": 0.5, "rate": 0.5, "steps": (50, 150), "ends": (100, 200)},
    "mc-dropout": {"num_samples": 2},
    "laplace": {"num_samples": 2},
}


class Case(NamedTuple):
    """A program.

    Attributes:
      function: Jitted, with `lower`, or plain.
      arguments: Shapes with shardings.
      images: How many a step trains on, all devices together.
      divided: Whether the program is traced for all devices, and XLA divides it.
      mesh: A mesh to trace under, or None.
    """

    function: Any
    arguments: tuple
    images: int
    divided: bool = False
    mesh: Mesh | None = None


def shapes(function):
    """Of what a function makes; it is not run."""
    return jax.eval_shape(function)


def placed(values, sharding):
    """Shapes of arrays that lie where a sharding, or a function to one, says."""
    of = sharding if callable(sharding) else lambda x: sharding
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of(x)), values
    )


def on_one(target, function, arguments, images=BATCH, donate=(0,)):
    sharding = SingleDeviceSharding(target.devices[0])
    return Case(
        jax.jit(function, donate_argnums=donate), placed(arguments, sharding), images
    )


def step_of(name, network, size, dtype="bfloat16", of_model=(), **options):
    """A method's own step, as in a run, and its arguments."""
    dropout = {"dropout": 0.1} if name == "mc-dropout" else {}
    model = models.create(network, 10, dtype=dtype, **dict(of_model), **dropout)
    rule = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    if methods.METHODS[name].has_own_update:
        rule = optax.identity()
    options = {**NEEDS.get(name, {}), **options}
    if dtype == "float16":
        options["loss_scaling"] = True
    method = methods.create(name, model, rule, **options)
    return method, lambda batch, image_size=32: (
        jax.eval_shape(method.init, jax.random.key(0), make_shapes(2, image_size)[0]),
        make_shapes(batch, image_size),
    )


def make_shapes(size, image_size=32):
    images = jax.ShapeDtypeStruct((size, image_size, image_size, 3), jnp.float32)
    return images, jax.ShapeDtypeStruct((size,), jnp.int32)


def one_step(target, name, network, size=BATCH, image_size=32, **options):
    method, arguments = step_of(name, network, size, **options)
    return on_one(target, method.step, arguments(size, image_size), size)


# --- what is compared: the steps of one network --------------------------------------

STEPS = {
    "SGD": {},
    "SAM (optax.contrib)": {},
    "SAM": {},
    "OT-MDR K=1": {},
    "OT-MDR K=2 scan": {"particles": [(2, "scan")]},
    "OT-MDR K=2 unroll": {"particles": [(2, "unroll")]},
    "OT-MDR K=2 vmap": {"particles": [(2, "vmap")]},
    "OT-MDR K=4 scan": {"particles": [(4, "scan")]},
    "OT-MDR K=4 unroll": {"particles": [(4, "unroll")]},
    "draws K=1": {"draws": [1]},
    "dual, 1 ascent step": {"climbs": [1]},
}


def compared(target, network, dtype="bfloat16", size=BATCH):
    def case(name, made):
        model = models.create(network, 10, dtype=dtype)
        step = make_steps(model, **made)[name]
        arguments = shapes(lambda: make_arguments(step, model, make_batch(size)))
        return on_one(target, step.function, arguments, size, (0, 1, 2))

    return {name: lambda n=name, m=made: case(n, m) for name, made in STEPS.items()}


# --- coverage ------------------------------------------------------------------------


def every_step(target, name, network, size=BATCH, image_size=32):
    """A method's step on all devices of a target, with `size` images on each."""
    if len(target.devices) == 1:
        return one_step(target, name, network, size, image_size)
    return mapped(target, network, None, name, size=size, image_size=image_size)


def of_methods(target, network):
    return {
        name: lambda n=name: every_step(target, n, network) for name in methods.METHODS
    }


def of_networks(target):
    found = {}
    for network in models.names():
        found[network] = lambda n=network: every_step(target, "otmdr", n)
        found[f"{network} at 224"] = lambda n=network: every_step(
            target, "otmdr", n, size=32, image_size=224
        )
    return found


def of_options(target, network):
    given = {
        "float32": {"dtype": "float32"},
        "float16, loss scaling": {"dtype": "float16"},
        "remat": {"of_model": {"remat": True}},
        "micro-batches of 32": {"microbatch_size": 32},
        "remat, micro-batches of 32": {
            "of_model": {"remat": True},
            "microbatch_size": 32,
        },
        "2 sub-batches": {"num_subbatches": 2},
        "noise": {"noise_std": 0.01},
        "adaptive, per leaf, merged": {
            "adaptive": True,
            "norm": "per_leaf",
            "merge": "sum",
        },
        "K=4 scan": {"num_particles": 4, "particle_map": "scan"},
        "K=4 unroll": {"num_particles": 4, "particle_map": "unroll"},
        "K=4 vmap": {"num_particles": 4, "particle_map": "vmap"},
        "first_order, K=4": {
            "rho": (0.1,),
            "sampler": "first_order",
            "tilt": 0.5,
            "num_particles": 4,
        },
        "langevin, MALA": {
            "rho": (0.1,),
            "sampler": "langevin",
            "tilt": 0.5,
            "num_steps": 4,
            "split": "shared",
        },
        "projected": {"noise_std": 0.01, "project": True},
    }
    return {
        name: lambda own=own: one_step(target, "otmdr", network, **own)
        for name, own in given.items()
    }


def of_ensembles(target, network, members=5):
    model = models.create(network, 10, dtype="bfloat16")

    def loss_fn(params, batch, state):
        images, labels = batch
        logits, state = model.apply(params, state, images, train=True)
        return methods.cross_entropy(logits, labels), state

    def case(how):
        gradient = ensemble.value_and_grad(loss_fn, has_aux=True, member_map=how)
        rule = optax.sgd(0.1, momentum=0.9)

        def step(state, batch, key):
            params, opt_state, model_state = state
            (_, model_state), grads = gradient(params, batch, model_state, key=key)
            updates, opt_state = rule.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, model_state

        def make(key):
            keys = jax.random.split(key, members)
            params, state = jax.vmap(
                lambda k: model.init(k, jnp.zeros((2, 32, 32, 3)))
            )(keys)
            return params, rule.init(params), state

        key = jax.random.key(0)
        arguments = jax.eval_shape(make, key), make_shapes(BATCH), key
        return on_one(target, step, arguments)

    found = {
        f"{members} members, {how}": lambda h=how: case(h)
        for how in ("scan", "unroll", "vmap")
    }
    found["one member"] = lambda: one_step(target, "otmdr", network)
    return found


# --- many devices --------------------------------------------------------------------


def mapped(
    target,
    network,
    mesh_shape,
    name,
    members=0,
    size=BATCH,
    image_size=32,
    **options,
):
    """A method's step by `parallel.shard_map_step`, with `size` images on a device."""
    mesh = parallel.make_mesh(mesh_shape, target.devices)
    size = size * mesh.shape.get("data", 1)
    axes: dict[str, Any] = {}
    if "data" in mesh.shape:
        axes["axis_name"] = "data"
    if "particle" in mesh.shape:
        axes["particle_axis_name"] = "particle"
    method, arguments = step_of(name, network, size, **options, **axes)
    state, batch = arguments(size, image_size)
    step, spec = method.step, P()
    if members:
        state = jax.eval_shape(
            lambda s: jax.tree.map(lambda x: jnp.stack([x] * members), s), state
        )
        step, spec = jax.vmap(method.step, in_axes=(0, None)), P("member")
    compiled = parallel.shard_map_step(step, mesh, state_spec=spec)
    data = NamedSharding(mesh, P("data") if "data" in mesh.shape else P())
    arguments = placed(state, NamedSharding(mesh, spec)), placed(batch, data)
    return Case(compiled, arguments, size)


def by_compiler(target, network, name, fsdp=False, **options):
    """A method's step under plain `jax.jit`; XLA divides the work.

    The batch lies over all devices; with `fsdp` so does each parameter, along its
    longest axis that they divide.
    """
    devices = len(target.devices)
    mesh = parallel.make_mesh({"data": devices}, target.devices)
    method, arguments = step_of(name, network, BATCH * devices, **options)
    state, batch = arguments(BATCH * devices)

    def sharding(x):
        axes = [i for i, n in enumerate(x.shape) if n % devices == 0]
        spec = [None] * len(x.shape)
        if fsdp and axes and x.size >= 1024:
            spec[max(axes, key=lambda i: x.shape[i])] = "data"
        return NamedSharding(mesh, P(*spec))

    state = placed(state, sharding)
    arguments = state, placed(batch, NamedSharding(mesh, P("data")))
    where = jax.tree.map(lambda x: x.sharding, state)
    function = jax.jit(method.step, donate_argnums=0, out_shardings=(where, None))
    return Case(function, arguments, BATCH * devices, divided=True)


def explicit(target, rows=64):
    """Our gradient of a perceptron whose weights lie on a mesh with explicit axes."""
    devices = len(target.devices)
    grid = np.asarray(target.devices, object).reshape(devices // 2, 2)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def loss_fn(params, batch):
        hidden = jax.nn.relu(batch["x"] @ params["in"])
        out = jnp.matmul(hidden, params["out"], out_sharding=P("data"))
        return jnp.mean((out - batch["y"]) ** 2)

    tx = optax.chain(
        otmdr_jax.otmdr(loss_fn, jax.random.key(0), split="ordered"), optax.adam(1e-3)
    )

    def lies(shape, *axes):
        sharding = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    width, size = 1024, rows * devices
    params = {
        "in": lies((512, width), None, "model"),
        "out": lies((width, 16), "model"),
    }
    batch = {"x": lies((size, 512), "data"), "y": lies((size, 16), "data")}

    def step(params, batch):
        updates, _ = tx.update(params, tx.init(params), params, batch=batch)
        return optax.apply_updates(params, updates)

    return Case(jax.jit(step), (params, batch), size, divided=True, mesh=mesh)


def by_pmap(target, network):
    devices = len(target.devices)
    method, arguments = step_of("otmdr", network, BATCH * devices, axis_name="data")
    state, batch = arguments(BATCH * devices)
    parts = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((devices, BATCH, *x.shape[1:]), x.dtype), batch
    )
    function = jax.pmap(
        method.step,
        "data",
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=target.devices,
    )
    return Case(function, (state, parts), BATCH * devices)


def of_entries(target, network):
    devices = len(target.devices)
    half = f"data={devices // 2},particle=2"
    return {
        "SGD": lambda: mapped(target, network, None, "sgd"),
        "SAM": lambda: mapped(target, network, None, "sam"),
        "OT-MDR K=1": lambda: mapped(target, network, None, "otmdr"),
        "OT-MDR K=1, per device": lambda: mapped(
            target, network, None, "otmdr", sync_perturbation=False
        ),
        "OT-MDR K=2 scan": lambda: mapped(
            target, network, None, "otmdr", num_particles=2, particle_map="scan"
        ),
        "OT-MDR K=2, particle axis": lambda: mapped(
            target, network, half, "otmdr", num_particles=2
        ),
        "OT-MDR K=1, shared BatchNorm": lambda: mapped(
            target, network, None, "otmdr", of_model={"batchnorm_axis_name": "data"}
        ),
        "OT-MDR BNN": lambda: mapped(target, network, None, "otmdr-bnn"),
        "dual": lambda: mapped(target, network, None, "otmdr-dual"),
        "members on an axis": lambda: mapped(
            target, network, {"member": devices}, "otmdr", members=devices
        ),
        "jit, batch divided: SGD": lambda: by_compiler(target, network, "sgd"),
        "jit, batch divided: OT-MDR K=1": lambda: by_compiler(target, network, "otmdr"),
        "FSDP: SGD": lambda: by_compiler(target, network, "sgd", fsdp=True),
        "FSDP: SAM": lambda: by_compiler(target, network, "sam", fsdp=True),
        "FSDP: OT-MDR K=1": lambda: by_compiler(target, network, "otmdr", fsdp=True),
        "FSDP: OT-MDR K=1, ordered": lambda: by_compiler(
            target, network, "otmdr", fsdp=True, split="ordered"
        ),
        "FSDP: OT-MDR K=2 scan": lambda: by_compiler(
            target, network, "otmdr", fsdp=True, num_particles=2, particle_map="scan"
        ),
        "explicit mesh, data x model": lambda: explicit(target),
        "pmap": lambda: by_pmap(target, network),
    }


def of_scaling(target, network):
    """The same images on each device, however many there are."""
    return {
        "SGD": lambda: mapped(target, network, None, "sgd"),
        "SAM": lambda: mapped(target, network, None, "sam"),
        "OT-MDR K=1": lambda: mapped(target, network, None, "otmdr"),
        "OT-MDR K=1, per device": lambda: mapped(
            target, network, None, "otmdr", sync_perturbation=False
        ),
    }


def all_cases(target, compared_network, network):
    """Group -> name -> a function that makes the case.

    Args:
      target: One device or several, which have other cases.
      compared_network: The network of the groups "steps" and "scaling".
      network: That of the other groups.
    """
    if len(target.devices) > 1:
        return {
            "scaling": of_scaling(target, compared_network),
            "entries": of_entries(target, network),
            "methods": of_methods(target, network),
            "networks": of_networks(target),
        }
    return {
        "steps": compared(target, compared_network),
        "options": of_options(target, network),
        "ensembles": of_ensembles(target, network),
        "methods": of_methods(target, network),
        "networks": of_networks(target),
    }
