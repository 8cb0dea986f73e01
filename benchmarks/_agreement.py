"""One step on an accelerator against the same step on the CPU of the same process.

Both have the same weights, images and keys. Of every case the loss, the gradient, the
BatchNorm statistics and the diagnostics are compared with the CPU's in float32, each by
its relative error |x - y| / |y|. A case fails if one of its outputs is off by more than
its tolerance, which is `FACTOR` times the largest of four errors, with u = 2^-24 for
the rounding of float32:

- that of the CPU's own step in the case's dtype;
- that of the CPU's step in float32 from weights which are moved by sqrt(m) u, for m
  numbers in the longest sum of a forward pass: so far may activations be off. A ReLU
  whose input is near 0 opens or closes then; one of a million of them changes the
  gradient by up to a thousandth. Whether one does is chance: the largest of 4 draws;
- a tenth of the largest of these over all outputs: the error of a scalar may be small
  by chance;
- sqrt(n) u, for n numbers in the longest sum of a backward pass (a kernel's gradient:
  all pixels of all images).

Errors by ReLUs grow with the root of the rounding. Products in TF32 have that of
float16, 2^13 u: with `cnn_small` their gradient is off by 7e-3, three times as far as
the tolerance of float32 allows.

The two sides share no formula below the mathematics: the accelerator has the
convolutions of `jax.lax` and each particle map, the CPU unrolls the particles and has
the library's own gradients of convolutions (Winograd's for 3x3 kernels).
"""

import functools
import math
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from _record import markdown
from _session import compile_all

import otmdr_jax
from otmdr_jax import models
from otmdr_jax.experiments import methods, precision

FACTOR, UNIT = 4.0, 2.0**-24
DTYPES = ("float32", "bfloat16", "float16")
MAPS = ("unroll", "scan", "vmap")
RHO = (0.05, 0.1)
WHERE = {
    "accelerator": "traced for the default backend: convolutions of jax.lax, particles "
    "by the map that the case names, products in float32 at highest precision",
    "cpu": "traced for a CPU: gradients of convolutions by matrix products (3x3 of "
    "stride 1 by Winograd's formula), particles unrolled",
}


def cases(model, how):
    """Name -> (params, statistics, batch, key) -> what a step computes.

    Args:
      model: Of `otmdr_jax.models`.
      how: The particle map; methods without particles are among those of "unroll".
    """

    def plain_loss(params, batch, statistics):
        images, labels = batch
        logits, statistics = model.apply(params, statistics, images, train=True)
        return methods.cross_entropy(logits, labels), statistics

    loss_fn = plain_loss
    if model.dtype == jnp.float16:  # else small gradients underflow, as in training
        scaled = precision.scale_loss(plain_loss, has_aux=True)
        loss_fn = functools.partial(scaled, loss_scale=precision.INITIAL_SCALE)

    def sgd(params, statistics, batch, key):
        del key
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, statistics), grads = gradient(params, batch, statistics)
        return {"loss": loss, "gradient": grads, "statistics": statistics}

    def seen(found):
        of_pass = {"gradient": found.grads, "statistics": found.aux}
        # The gap is a small difference of two of these.
        info = found.diagnostics._asdict()
        return {**of_pass, **{name: info[name] for name in info if name != "gap"}}

    def robust(rho=RHO, **options):
        compute = otmdr_jax.robust_gradient(
            loss_fn, rho, has_aux=True, particle_map=how, **options
        )
        return lambda params, statistics, batch, key: seen(
            compute(params, batch, statistics, key=key)
        )

    def dual(params, statistics, batch, key):
        del key
        # A multiplier that makes the radius follow the gradient from the first step.
        form = otmdr_jax.dual_gradient(loss_fn, RHO[0], has_aux=True, lambda_init=20.0)
        found, memory = form.apply(form.init(), params, batch, statistics)
        own = {name: getattr(memory, name) for name in ("slope", "budget_used")}
        return {**seen(found), **own}

    own_map = {
        f"OT-MDR K=2 {how}": robust(num_particles=2),
        f"draws K=2 {how}": robust(
            RHO[:1], sampler="first_order", tilt=0.5, num_particles=2
        ),
    }
    if how != "unroll":
        return own_map
    return {
        "SGD": sgd,
        "SAM": robust(RHO[:1], split="shared"),
        "OT-MDR K=1": robust(),
        **own_map,
        "dual": dual,
    }


def make_inputs(model, size, image_size):
    """Arguments of a case, as NumPy arrays that no device holds, and a key."""
    rng = np.random.default_rng(0)
    shape = (size, image_size, image_size, 3)
    images = rng.standard_normal(shape, np.float32)
    params, statistics = model.init(jax.random.key(0), images)
    labels = rng.integers(0, model.num_classes, size).astype(np.int32)
    trees = jax.tree.map(np.asarray, (params, statistics))
    return *trees, (images, labels), jax.random.key_data(jax.random.key(1))


def compile_on(device, case, inputs):
    """A program of a case: inputs -> outputs, as NumPy arrays."""

    def step(params, statistics, batch, key):
        return case(params, statistics, batch, jax.random.wrap_key_data(key))

    start = time.perf_counter()
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(step).lower(*jax.device_put(inputs, device)).compile()

    def run(inputs=inputs):
        outputs = compiled(*jax.device_put(inputs, device))
        return jax.tree.map(np.asarray, outputs)

    return run, {"compile_seconds": time.perf_counter() - start}


def errors(found, expected):
    """Relative error of each output: Euclidean, over all its leaves."""

    def norm(leaves):
        return math.sqrt(sum(float(np.sum(np.square(x))) for x in leaves))

    result = {}
    for name, right in expected.items():
        pairs = zip(jax.tree.leaves(found[name]), jax.tree.leaves(right), strict=True)
        pairs = [(np.float64(a), np.float64(b)) for a, b in pairs]
        off, length = norm(a - b for a, b in pairs), norm(b for _, b in pairs)
        result[name] = off / length if length else (math.inf if off else 0.0)
    return result


def largest(values):
    """The largest error; NaN if any is."""
    return float(np.max(list(values)))


def moved(inputs, seed):
    """The inputs with weights that are off by as much as activations may be."""
    params, *others = inputs
    rng = np.random.default_rng(seed)
    terms = max(math.prod(x.shape[:-1]) for x in jax.tree.leaves(params))

    def nearby(x):
        noise = math.sqrt(terms) * UNIT * rng.standard_normal(x.shape)
        return np.float32(x * (1 + noise))

    return jax.tree.map(nearby, params), *others


def reference_of(case):
    """The case of the CPU, which unrolls its particles."""
    words = case.split()
    return " ".join([*words[:-1], "unroll"]) if words[-1] in MAPS else case


def check(session, name, size):
    """Fills record["agreement"]."""
    image_size, dtypes = 32, DTYPES
    if session.options.smoke:
        image_size, dtypes = 8, DTYPES[:1]
    of_dtype = {
        dtype: models.create(name, 10, dtype=jnp.dtype(dtype)) for dtype in dtypes
    }
    inputs = make_inputs(of_dtype["float32"], size, image_size)
    record = {"network": name, "batch_size": size, "factor": FACTOR, "where": WHERE}
    record |= {"planned": 0, "results": {}}
    session.record["agreement"] = record

    def compiled(label, device, maps):
        jobs = {
            f"{dtype} {case}": (
                0,
                functools.partial(compile_on, device, function, inputs),
            )
            for dtype, model in of_dtype.items()
            for how in maps
            for case, function in cases(model, how).items()
        }
        ready = compile_all(session, label, jobs)
        return {name: run for name, (run, _) in ready.items()}

    # The CPU's are all traced before any other: what they are traced for is global.
    with mock.patch.object(jax, "default_backend", lambda: "cpu"):
        own = compiled("agreement, the CPU", jax.devices("cpu")[0], ["unroll"])
    record["planned"] = sum(
        len(cases(model, how)) for model in of_dtype.values() for how in MAPS
    )
    for name, run in compiled("agreement", jax.devices()[0], MAPS).items():
        dtype, case = name.split(maxsplit=1)
        arguments = (run, own, dtype, reference_of(case), inputs)
        found = session.attempt(f"agreement: {name}, run", 0, compare, *arguments)
        if found:
            record["results"].setdefault(case, {})[dtype] = found
    show(session, record)


def compare(run, own, dtype, case, inputs):
    """How far a program is off, and how far it may be.

    Args:
      run: The accelerator's program.
      own: The CPU's, by dtype and case.
      dtype: The dtype of the program.
      case: Its case on the CPU.
      inputs: What it is run on.
    """
    exact = own[f"float32 {case}"]
    right = exact()
    rounded = [exact(moved(inputs, seed)) for seed in range(1, 5)]
    others = [errors(found, right) for found in (*rounded, own[f"{dtype} {case}"]())]
    bounds = {name: largest(found[name] for found in others) for name in right}
    chance = largest(bounds.values()) / 10
    sums = UNIT * math.sqrt(math.prod(inputs[2][0].shape[:3]))
    each = errors(run(), right)
    allowed = {name: FACTOR * largest([bounds[name], chance, sums]) for name in each}
    worst = max(each, key=lambda name: _excess(each[name], allowed[name]))
    return {
        "output": worst,
        "error": each[worst],
        "tolerance": allowed[worst],
        # Where the CPU's own step overflows, nothing is known of what is allowed.
        "passed": each[worst] <= allowed[worst] and math.isfinite(chance),
        "errors": each,
    }


def _excess(error, tolerance):
    return math.inf if math.isnan(error) else error / tolerance


def show(session, record):
    session.save()
    rows = []
    for case, results in record["results"].items():
        cells = []
        for dtype in DTYPES:
            found = results.get(dtype)
            cells.append("-")
            if found:
                sign = "<" if found["passed"] else "FAIL, above"
                cells[-1] = f"{found['error']:.1e} {sign} {found['tolerance']:.1e}"
        rows.append([case, *cells])
    print(
        f"\nagreement with the CPU\n{markdown(['step', *DTYPES], rows)}\n", flush=True
    )
