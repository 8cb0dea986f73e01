"""All speed figures of an accelerator in one call of at most eight minutes.

    python benchmarks/accelerator.py --json accelerator.json
    python benchmarks/accelerator.py --smoke          # tiny, on a CPU, in minutes

What is measured, most important first:

- `benchmarks/pytorch_step.py`, where PyTorch is installed, in a process of its own and
  before JAX takes the device's memory;
- the peak rate of matrix products (8192^3) and the bandwidth of a copy (read + write);
- steps of SGD, SAM (Optax's and ours) and OT-MDR for WRN-28-10 and ResNet-18, by batch
  size, dtype, number of particles and particle map;
- ensembles of 5 ResNet-10, by `jax.vmap`, unrolled and one after the other.

Steps are timed in turn, round after round, in one process: medians over rounds of a few
steps that are dispatched without waiting, as in a training loop. `gap` is what a step
takes longer if the host waits for each. Compilation runs in several threads, so that
its seconds hold for a busy host. Memory is the compiled program's own account.

Model FLOPs follow the usual convention: 2 x multiply-adds of the convolutions and
matrix products of one forward pass, padding included; times 3 for a gradient pass
(forward, and twice that backward); times the passes over a whole batch a step (SGD 1,
SAM 2, OT-MDR 2 K: S halves make one). Model-flop utilisation (MFU) is that over the
time and over the peak measured for this dtype in the same run; for float32 the peak of
products as JAX runs them by default.

A measurement that fails (out of memory, say) is recorded with its error, one that does
not fit into `--minutes` any more as skipped. The file is rewritten after each.
Expected: OT-MDR with K = 1 takes as long as SAM; see TARGETS.
"""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

# Before JAX starts its backend. What it does not hold is left for cuDNN's and cuBLAS's
# own workspaces; the PyTorch process is over by then.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from _common import (  # noqa: E402
    REFERENCE,
    compile_step,
    environment,
    make_arguments,
    make_batch,
    make_steps,
    measure,
    summarise,
)
from _record import markdown, nvidia_smi, options_of, write_json  # noqa: E402

from otmdr_jax import models  # noqa: E402

MAPS = ("unroll", "vmap", "scan")
PARTS = ("pytorch", "peak", "steps", "ensemble")
ROBUST = "OT-MDR K=1"
# A guess until a program has been compiled, for what still fits into the time.
COMPILE_SECONDS_A_PASS = 10.0
MEASURE_SECONDS = 6.0


class Skipped(Exception):
    """Raised by what does not fit into the time that is left."""


class Session:
    """The clock, the record, and what keeps one failure from ending the rest."""

    def __init__(self, options):
        self.options = options
        self.start = time.perf_counter()
        self.lock = threading.Lock()  # programs are compiled in threads
        self.compile_seconds_a_pass = COMPILE_SECONDS_A_PASS
        self.record = {
            "options": vars(options),
            "nvidia_smi": nvidia_smi(),
            "pytorch": {},
            "peak": {},
            "steps": {},
            "ensemble": {},
            "targets": [],
            "skipped": [],
            "errors": {},
        }

    def left(self):
        return 60 * self.options.minutes - (time.perf_counter() - self.start)

    def say(self, text):
        print(f"[{time.perf_counter() - self.start:6.1f} s] {text}", flush=True)

    def save(self):
        with self.lock:
            self.record["elapsed_seconds"] = time.perf_counter() - self.start
            write_json(self.options.json, self.record)

    def attempt(self, name, seconds, function, *args):
        """function(*args), or None if it fails or does not fit."""
        try:
            if self.left() < seconds:
                raise Skipped(f"{seconds:.0f} s do not fit")
            return function(*args)
        except Skipped as reason:
            with self.lock:
                self.record["skipped"].append(f"{name}: {reason}")
            self.say(f"skipped {name}: {reason}")
        except Exception as error:
            # Out of memory, a compiler's error, a missing driver: all are results.
            message = f"{type(error).__name__}: {error}"[:1000]
            with self.lock:
                self.record["errors"][name] = message
            self.say(f"FAILED {name}: {message[:200]}")
        finally:
            self.save()
        return None


# -- peaks ----------------------------------------------------------------------------


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
        session.say(f"peak {name}: {result[key]:.4g} {unit}")
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


# -- steps ----------------------------------------------------------------------------


def compile_all(session, label, jobs):
    """Compiles in threads; returns name -> (run, cost) of those that work.

    Args:
      session: The session.
      label: What the jobs are part of.
      jobs: Name -> (passes in the program, function that gives compile_step's result).
    """

    def compile_one(name, passes, job):
        def run():
            needed = session.compile_seconds_a_pass * passes + MEASURE_SECONDS
            if session.left() < needed:
                raise Skipped(f"{needed:.0f} s do not fit")
            return job()

        return name, session.attempt(f"{label}: {name}", 0, run)

    ready = {}
    with concurrent.futures.ThreadPoolExecutor(session.options.threads) as pool:
        futures = [
            pool.submit(compile_one, name, passes, job)
            for name, (passes, job) in jobs.items()
        ]
        for future in concurrent.futures.as_completed(futures):
            name, result = future.result()
            if result is None:
                continue
            ready[name] = result
            seconds = result[1]["compile_seconds"]
            session.say(f"{label}: {name} compiled in {seconds:.1f} s")
            # Small programs have a cost of their own: what a large one takes is less.
            session.compile_seconds_a_pass = max(
                session.compile_seconds_a_pass, seconds / jobs[name][0] / 2
            )
    return {name: ready[name] for name in jobs if name in ready}


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


# -- PyTorch and the targets ----------------------------------------------------------


def run_pytorch(session):
    """Runs the script with a time limit; what it has written by then counts."""
    if importlib.util.find_spec("torch") is None:
        raise Skipped("PyTorch is not installed")
    script = pathlib.Path(__file__).with_name("pytorch_step.py")
    # A share of the time: the steps of this package must not be crowded out.
    limit = (0.8 if session.options.smoke else 0.3) * session.left()
    failed = ""
    with tempfile.TemporaryDirectory() as folder:
        file, log = pathlib.Path(folder, "pytorch.json"), pathlib.Path(folder, "log")
        command = [sys.executable, str(script), "--json", str(file)]
        command += ["--smoke"] if session.options.smoke else []
        # A group of its own, for the compiler's workers end with it; a file, since
        # a pipe would be held open by those that do not.
        with log.open("w") as errors:
            process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        try:
            if process.wait(limit):
                failed = log.read_text()[-500:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            failed = f"stopped after {limit:.0f} s"
        if file.exists():
            session.record["pytorch"] = json.loads(file.read_text())
    if failed:
        raise RuntimeError(failed)


def targets(record):
    """Rows of what was aimed at, what came out, and whether that is a pass."""

    def value(label, step, key):
        group = record["steps"].get(label, {"results": {}})
        return group["results"].get(step, {}).get(key)

    rows = []

    def row(name, measured, aim, passed):
        known = measured is not None
        rows.append(
            {
                "target": f"{name} {aim}",
                "measured": measured,
                "passed": passed(measured) if known else None,
            }
        )

    for size in (128, 512):
        label = f"wide_resnet_28_10 bfloat16 {size}"
        ratio = value(label, ROBUST, "ratio_to_optax_sam")
        row(
            f"{label}: OT-MDR K=1 / SAM",
            ratio,
            "at most 1.05",
            lambda x: x <= 1.05,
        )
        ours = value(label, ROBUST, "images_per_second")
        theirs = [
            result["images_per_second"]
            for name, result in record["pytorch"].get("results", {}).items()
            if name.startswith(f"bfloat16 {size} ") and "images_per_second" in result
        ]
        row(
            f"{label}: speed / PyTorch's fastest",
            ours / max(theirs) if ours and theirs else None,
            "at least 1",
            lambda x: x >= 1,
        )
    label = "wide_resnet_28_10 bfloat16 512"
    row(
        f"{label}: MFU of OT-MDR K=1",
        value(label, ROBUST, "mfu"),
        "at least 0.45",
        lambda x: x >= 0.45,
    )
    label = "wide_resnet_28_10 bfloat16 128"
    one = value(label, ROBUST, "milliseconds")
    four = [value(label, f"OT-MDR K=4 {how}", "milliseconds") for how in MAPS]
    four = [x for x in four if x]
    row(
        f"{label}: OT-MDR K=4 by its fastest map / K=1",
        min(four) / one if one and four else None,
        "at most 3",
        lambda x: x <= 3,
    )
    return rows


# -- the plan -------------------------------------------------------------------------


def plan(options):
    """(name, model, batch size, dtype, particles, steps or None), in this order."""
    if options.smoke:
        particles = [(k, "unroll") for k in options.particles]
        return [("cnn_small", 8, "float32", particles, None)]
    wide, narrow = "wide_resnet_28_10", "resnet_18"
    first, *more = [[(k, how) for how in MAPS] for k in options.particles] or [[]]
    groups = [
        (wide, 128, "bfloat16", first, None),
        (wide, 512, "bfloat16", [], None),
        (narrow, 128, "bfloat16", first, None),
        (wide, 2048, "bfloat16", [], None),
        (narrow, 512, "bfloat16", [], None),
        (wide, 128, "float32", [], None),
        (narrow, 2048, "bfloat16", [], None),
    ]
    for particles in more:
        names = {REFERENCE, *(f"OT-MDR K={k} {how}" for k, how in particles)}
        groups += [(name, 128, "bfloat16", particles, names) for name in (wide, narrow)]
    groups += [
        (narrow, 128, "float32", [], None),
        (wide, 512, "float32", [], None),
        (narrow, 512, "float32", [], None),
        (narrow, 2048, "float32", [], None),
        (wide, 2048, "float32", [], None),
    ]
    for size in (512, 2048):
        for name in (wide, narrow):
            for particles in (first, *more):
                names = {REFERENCE, *(f"OT-MDR K={k} {how}" for k, how in particles)}
                if particles:
                    groups.append((name, size, "bfloat16", particles, names))
    return groups


def main():
    parser = options_of(__doc__, "tiny networks, one round, on the CPU")
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="begin nothing that takes longer")
    add("--only", nargs="*", default=list(PARTS), choices=PARTS)
    add("--particles", type=int, nargs="*", help="K beside 1; default 4 2, smoke 2")
    add("--rounds", type=int, default=31, help="at most")
    add("--threads", type=int, default=4, help="programs compiled at once")
    options = parser.parse_args()
    if options.particles is None:
        options.particles = [2] if options.smoke else [4, 2]
    if options.smoke:
        options.rounds, options.threads = 1, 2
        jax.config.update("jax_platforms", "cpu")
    session = Session(options)
    record = session.record

    if "pytorch" in options.only:
        session.attempt("pytorch", 60, run_pytorch, session)
    head = session.attempt("environment", 0, environment)
    if head is None:  # no device: nothing below can work
        sys.exit(1)
    record.update(head)
    session.say(f"{head['device']}, JAX {head['jax']}, {head['nvidia_smi']}")
    if "peak" in options.only:
        measure_peak(session)
    groups = plan(options) if "steps" in options.only else []
    ensemble = ("cnn_small", 8, "float32", 2)
    if not options.smoke:
        ensemble = ("resnet_10", 128, "bfloat16", 5)
    for turn in range(max(2, len(groups))):
        if turn < len(groups):
            name, size, dtype, *_ = groups[turn]
            label = f"{name} {dtype} {size}"
            session.attempt(label, 15, time_steps, session, *groups[turn])
        # After the two groups that the targets are about.
        if turn == 1 and "ensemble" in options.only:
            session.attempt("ensemble", 30, time_ensemble, session, *ensemble)

    record["targets"] = targets(record)
    session.save()
    rows = [
        [
            row["target"],
            "-" if row["measured"] is None else f"{row['measured']:.3f}",
            {True: "pass", False: "FAIL", None: "not measured"}[row["passed"]],
        ]
        for row in record["targets"]
    ]
    print(f"\n{markdown(['target', 'measured', ''], rows)}\n")
    for name in record["skipped"]:
        print(f"skipped: {name}")
    for name, message in record["errors"].items():
        print(f"failed: {name}: {message[:200]}")
    session.say("done")


if __name__ == "__main__":
    main()
