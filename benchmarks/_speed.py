"""Speed of a device: peak rates, steps by network, batch size and dtype, ensembles."""

import statistics
import time

import jax
import jax.numpy as jnp
from _common import (
    compile_step,
    make_arguments,
    make_batch,
    make_steps,
    measure,
    summarise,
)
from _record import markdown
from _session import MEASURE_SECONDS, compile_all

from otmdr_jax import models

ROBUST = "OT-MDR K=1"
# Dense peaks of data sheets in TFLOP/s, where float32 by default is TF32, and
# GB/s of the memory: of SXM modules, by the names that their driver gives them.
_HOPPER = {"bfloat16": 989.0, "float32": 494.0, "float32 highest": 67.0}
DATA_SHEETS = {
    "NVIDIA H100 80GB HBM3": {**_HOPPER, "copy": 3350.0},
    "NVIDIA H200": {**_HOPPER, "copy": 4800.0},
}


def measure_peak(session):
    size = 256 if session.options.smoke else 8192
    kinds = {
        "bfloat16": (jnp.bfloat16, None),
        "float32": (jnp.float32, None),
        "float32 highest": (jnp.float32, jax.lax.Precision.HIGHEST),
    }
    for name, (dtype, precision) in kinds.items():

        def rate(dtype=dtype, precision=precision):
            key = jax.random.key(0)
            a = jax.random.normal(key, (size, size), dtype)
            multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
            return {"tflops": 2 * size**3 / _seconds(multiply, a, a) / 1e12}

        _peak(session, name, rate, "TFLOP/s", "tflops")

    def bandwidth():
        x = jnp.ones((2**20 if session.options.smoke else 2**29,), jnp.bfloat16)
        seconds = _seconds(jax.jit(lambda x: -x), x)
        return {"gb_per_second": 2 * x.nbytes / seconds / 1e9}

    _peak(session, "copy", bandwidth, "GB/s", "gb_per_second")


def _peak(session, name, function, unit, key):
    result = session.attempt(f"peak {name}", 5, function)
    if result:
        session.record["peak"][name] = result
        text = f"peak {name}: {result[key]:.4g} {unit}"
        kind = jax.devices()[0].device_kind
        if sheet := DATA_SHEETS.get(kind):
            result["of_data_sheet"] = result[key] / sheet[name]
            text += f", {result['of_data_sheet']:.0%} of the data sheet"
        session.say(text)
        session.save()


def _seconds(function, *args, calls=10, rounds=5):
    """Median over rounds of a call's time, several being under way at once."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def forward_flops(model, images):
    """FLOPs of the convolutions and products of one forward pass; runs nothing."""
    positions = models.output_positions(model, images.shape[1:])
    params, _ = jax.eval_shape(model.init, jax.random.key(0), images)
    adds = 0  # a kernel's entry takes part in one at each position of its output
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        adds += positions.get(name, 0) * leaf.size
    return 2 * images.shape[0] * adds


def time_all(session, label, ready):
    """Interleaved times of what runs at all: name -> list of seconds a step."""
    runs, turn = {}, 0.0
    steps = 1 if session.options.smoke else 5
    for name, (run, _) in ready.items():

        def warm_up(run=run):
            run()
            start = time.perf_counter()
            run(steps)
            return time.perf_counter() - start

        seconds = session.attempt(f"{label}: {name}, run", 0, warm_up)
        if seconds is not None:
            runs[name] = run
            turn += seconds
    rounds = session.options.rounds
    if not session.options.smoke:
        rounds = max(3, min(rounds, int(MEASURE_SECONDS / max(turn, 1e-9))))
    return measure(runs, rounds, steps=steps) if runs else {}


def time_steps(session, name, size, dtype, particles, only=None):
    """One model, batch size and dtype: fills record["steps"][label]."""
    label = f"{name} {dtype} {size}"
    model = models.create(name, 10, dtype=jnp.dtype(dtype))
    batch = make_batch(size, 8 if session.options.smoke else 32)
    flops = forward_flops(model, batch[0])
    group = session.record["steps"].setdefault(
        label, {"batch_size": size, "forward_gflop": flops / 1e9, "results": {}}
    )
    steps = make_steps(model, particles)
    if only:
        steps = {key: step for key, step in steps.items() if key in only}

    def job(step):
        return lambda: compile_step(step.function, make_arguments(step, model, batch))

    jobs = {
        key: (2 if key.endswith(("scan", "vmap")) else step.passes, job(step))
        for key, step in steps.items()
    }
    ready = compile_all(session, label, jobs)
    times = time_all(session, label, ready)
    peak = session.record["peak"].get(dtype)
    for key, values in summarise(times).items():
        seconds = values["milliseconds"] / 1e3
        values |= ready[key][1]
        values["passes"] = steps[key].passes
        values["images_per_second"] = size / seconds
        model_flops = 3 * steps[key].passes * flops
        values["model_tflops_per_second"] = model_flops / seconds / 1e12
        if peak:
            values["mfu"] = model_flops / seconds / 1e12 / peak["tflops"]
        # A second group under the same label keeps the first's reference.
        group["results"].setdefault(key, values)
    session.save()
    for key in ("SGD", ROBUST):
        if key in times:
            gap = session.attempt(f"{label}: gap of {key}", 0, measure_gap, ready[key])
            group["results"][key]["gap"] = gap
    show(session, label, group["results"])


def measure_gap(ready):
    """Milliseconds a step: many without waiting, and waiting for each."""
    run, _ = ready
    start = time.perf_counter()
    run()
    steps = max(1, min(20, int(1 / (time.perf_counter() - start))))
    waiting, free = [], []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(steps):
            run()
        waiting.append((time.perf_counter() - start) / steps)
        start = time.perf_counter()
        run(steps)
        free.append((time.perf_counter() - start) / steps)
    blocked, queued = statistics.median(waiting), statistics.median(free)
    return {
        "blocked_milliseconds": 1e3 * blocked,
        "async_milliseconds": 1e3 * queued,
        "gap_milliseconds": 1e3 * (blocked - queued),
        "steps": steps,
    }


def time_ensemble(session, name, size, dtype, members):
    """Members that share a batch: together in one program, or one after the other."""
    label = f"{members} x {name} {dtype} {size}"
    model = models.create(name, 10, dtype=jnp.dtype(dtype))
    batch = make_batch(size, 8 if session.options.smoke else 32)
    step = make_steps(model)[ROBUST]

    def unrolled(*arguments):
        *trees, batch, keys = arguments
        outs = [
            step.function(*member, batch, key)
            for *member, key in zip(*trees, keys, strict=True)
        ]
        return tuple(zip(*outs, strict=True))

    def of_all():
        each = [make_arguments(step, model, batch, seed) for seed in range(members)]
        return [tuple(values) for values in zip(*each, strict=True)]

    def compile_vmap():
        params, opt_states, states, _, keys = (
            jax.tree.map(lambda *xs: jnp.stack(xs), *values) for values in of_all()
        )
        together = jax.vmap(step.function, in_axes=(0, 0, 0, None, 0))
        return compile_step(together, (params, opt_states, states, batch, keys))

    def compile_unrolled():
        params, opt_states, states, _, keys = of_all()
        return compile_step(unrolled, (params, opt_states, states, batch, keys))

    def compile_separate():
        run, cost = compile_step(step.function, make_arguments(step, model, batch))
        # The same member over and over costs the time of all of them. The memory is
        # that of one: the others' parameters and momenta come on top.
        return lambda times=1: run(members * times), cost

    jobs = {
        "separate": (step.passes, compile_separate),
        "vmap": (step.passes, compile_vmap),
        "unroll": (step.passes * members, compile_unrolled),
    }
    ready = compile_all(session, label, jobs)
    results = {}
    for key, values in summarise(time_all(session, label, ready)).items():
        values |= ready[key][1]
        values["images_per_second"] = members * size / values["milliseconds"] * 1e3
        results[key] = values
    session.record["ensemble"][label] = {
        "batch_size": size,
        "members": members,
        "results": results,
    }
    show(session, label, results)


def show(session, label, results):
    session.save()
    columns = {
        "ms": ("milliseconds", ".2f"),
        "x SAM": ("ratio_to_optax_sam", ".3f"),
        "images/s": ("images_per_second", ".0f"),
        "MFU": ("mfu", ".1%"),
        "peak MiB": ("peak_mib", ".0f"),
        "compile s": ("compile_seconds", ".1f"),
        "gap ms": ("gap_milliseconds", ".2f"),
        "n": ("n", "d"),
    }
    rows = []
    for name, values in results.items():
        values = {**values, **(values.get("gap") or {})}
        cells = [
            format(values[key], spec) if key in values else "-"
            for key, spec in columns.values()
        ]
        rows.append([name, *cells])
    print(f"\n{label}\n{markdown(['step', *columns], rows)}\n", flush=True)
