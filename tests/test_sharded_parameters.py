"""Parameters that are sharded over a mesh: one contract for all that takes them.

Whatever the mesh, the result is the unsharded one to rounding, gradients, updates and
what the state holds of the parameters' shape are sharded as the parameters are, and no
device ever holds a parameter whole.
"""

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
from otmdr_jax import baselines, bnn, ensemble, tree
from otmdr_jax.baselines import sparse

# No product of a batch has the number of entries of a leaf that is sharded, or two or
# three times it: a collective operation's size tells what it moves.
INPUTS, HIDDEN, OUTPUTS, BATCH = 10, 20, 6, 16
SPECS = {
    "hidden": {"kernel": P(None, "model"), "bias": P("model")},
    "out": {"kernel": P("model"), "bias": P()},
}
KEY = jax.random.key(0)


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_params(dtype=np.float32):
    params = {
        "hidden": {"kernel": numbers(0, INPUTS, HIDDEN), "bias": numbers(1, HIDDEN)},
        "out": {"kernel": numbers(2, HIDDEN, OUTPUTS), "bias": numbers(3, OUTPUTS)},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def make_batch():
    return {"x": jnp.asarray(numbers(4, BATCH, INPUTS)),
            "y": jnp.asarray(numbers(5, BATCH, OUTPUTS))}  # fmt: skip


def make_mesh(kind):
    """ "explicit-1d" and the like."""
    axes, dims = kind.split("-")
    shape, names = ((4,), ("model",)) if dims == "1d" else ((2, 4), ("data", "model"))
    types = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}[axes]
    return jax.make_mesh(shape, names, axis_types=(types,) * len(shape))


def make_loss(mesh=None):
    """A perceptron whose hidden units are spread over "model"."""

    def product(h, w):
        # Over hidden units: explicit axes want to know where the sum goes.
        explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
        if not explicit:
            return h @ w
        of_h = jax.typeof(h).sharding
        summed = NamedSharding(of_h.mesh, P(of_h.spec[0], None))
        return jnp.matmul(h, w, out_sharding=summed)

    def loss(params, batch):
        hidden, out = params["hidden"], params["out"]
        h = jnp.tanh(batch["x"] @ hidden["kernel"] + hidden["bias"][None])
        residual = product(h, out["kernel"]) + out["bias"][None] - batch["y"]
        return jnp.mean(residual.astype(jnp.float32) ** 2)

    return loss


def place(values, mesh, specs, lead=()):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, P(*lead, *spec))),
        values,
        specs,
    )


class Gradient:
    """A gradient function, in the form of a transformation without state."""

    def __init__(self, function):
        self.function = function

    def init(self, params):
        return ()

    def update(self, updates, state, params, batch):
        return self.function(params, batch, key=KEY), state


def with_loss_gradient(transformation):
    """One that takes gradients, with those of the loss."""

    def build(loss):
        tx = transformation
        grad = jax.grad(loss)

        def update(updates, state, params, batch):
            return tx.update(grad(params, batch), state, params)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return build


def robust(**options):
    return lambda loss: Gradient(otmdr_jax.robust_gradient(loss, **options))


TRANSFORMATIONS = {
    "otmdr": lambda loss: otmdr_jax.otmdr(loss, KEY, noise_std=0.01, num_particles=2),
    "sam": lambda loss: optax.chain(otmdr_jax.sam(loss), optax.adam(0.1)),
    "asam": otmdr_jax.asam,
    "gsam": baselines.gsam,
    "looksam": lambda loss: baselines.looksam(loss, every=2),
    "fisher_sam": baselines.fisher_sam,
    "bsam": lambda loss: baselines.bsam(
        loss, KEY, learning_rate=0.1, weight_decay=1e-3, num_data=100, num_subbatches=2
    ),
    "ivon": lambda loss: baselines.ivon(
        loss, KEY, learning_rate=0.1, num_data=100, mc_samples=2
    ),
    "dynamic": with_loss_gradient(
        sparse.dynamic(
            optax.sgd(0.1, 0.9), KEY, density=0.5, rate=0.5, steps=(1,), escapes=(2,)
        )
    ),
    "dynamic_random": with_loss_gradient(
        sparse.dynamic(
            optax.adam(0.1), KEY, density=0.5, rate=0.5, steps=(1,), growth="random"
        )
    ),
    "value_and_grad": lambda loss: Gradient(otmdr_jax.value_and_grad(loss)),
    "robust_gradient": robust(num_particles=2),
}
MEMBERS = {
    f"ensemble_{how}": functools.partial(
        lambda how, loss: Gradient(
            ensemble.robust_gradient(loss, noise_std=0.01, member_map=how)
        ),
        how,
    )
    for how in ("vmap", "unroll", "scan")
} | {
    f"per_member_{name}": functools.partial(
        lambda name, loss: ensemble.per_member(TRANSFORMATIONS[name](loss)), name
    )
    for name in ("otmdr", "looksam", "bsam", "dynamic")
}
POSTERIORS = {
    "bnn": lambda loss: Gradient(bnn.robust_gradient(loss, num_data=100)),
    "sgvb": lambda loss: Gradient(bnn.sgvb_gradient(loss, num_data=100)),
} | {
    f"sgvb_{estimator}": functools.partial(
        lambda estimator, loss: Gradient(
            bnn.sgvb_gradient(loss, num_data=100, estimator=estimator)
        ),
        estimator,
    )
    for estimator in ("local", "flipout")
}
ALL = TRANSFORMATIONS | MEMBERS | POSTERIORS
OPTIONS = {
    "ordered": dict(split="ordered"),
    "three parts": dict(split="ordered", rho=(0.01, 0.02, 0.03)),
    "shared": dict(split="shared"),
    "noise": dict(noise_std=0.01),
    "particles by vmap": dict(num_particles=3, noise_std=0.01, particle_map="vmap"),
    "particles by scan": dict(num_particles=3, noise_std=0.01, particle_map="scan"),
    "particles unrolled": dict(num_particles=3, particle_map="unroll"),
    "sum": dict(merge="sum"),
    "mean": dict(merge="mean"),
    "adaptive": dict(adaptive=True),
    "fisher": dict(fisher=1.0),
    "per leaf": dict(norm="per_leaf"),
    "no norm": dict(norm="none"),
    "mask": dict(mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "micro-batches": dict(microbatch_size=4, split="shared"),
    "uneven micro-batches": dict(microbatch_size=3),
    "sub-batches": dict(num_subbatches=2),
}


def run(name, loss, params, batch, steps=2, build=None):
    """Updates of all steps, the last state, and the compiled step."""
    tx = (build or ALL[name])(loss)
    state = tx.init(params)
    start = state
    step = jax.jit(lambda p, s, b: tx.update(p, s, p, batch=b))
    compiled = step.lower(params, state, batch).compile()
    found = []
    for _ in range(steps if jax.tree.leaves(state) else 1):
        updates, state = compiled(params, state, batch)
        found.append(updates)
    return found, (start, state), compiled


def around(name, params, specs=SPECS):
    """What a method takes as its parameters, and their shardings."""
    if name in MEMBERS:
        stacked = tree.stack([params, jax.tree.map(lambda x: 2 * x, params)])
        return stacked, jax.tree.map(lambda s: P(None, *s), specs)
    if name in POSTERIORS:
        q = bnn.init(
            params,
            mask=lambda p: {
                **{k: True for k in ()},
                **jax.tree.map(lambda x: x.ndim > 1, p),
            },
        )
    return params, specs


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
