"""Times a training step on a CPU by several versions of JAX and by PyTorch, in turn.

    python benchmarks/cpu_versions.py --jax PYTHON ... --pytorch PYTHON --json FILE
    python benchmarks/cpu_versions.py --smoke

PYTHON is an interpreter that has the version to measure: newest JAX and PyTorch do not
always run on one Python. Each has two worker processes, one of which keeps freed memory
(`KEPT`). They compile first; then this process, which imports neither, lets them run in
turn, round after round, and each says what wall-clock and processor time it took. Two
parts: `steps`, and `layers`, the convolutions of WRN-16-2. What FILE has of other steps
and parts stays. See docs/performance.md for the tables. Expected: 6 minutes on 2 CPU
cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from _record import markdown, options_of, write_json

# Programs of JAX take all their temporaries at once and return them after each step; by
# glibc's default they come from the operating system each time, page by page.
KEPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
STEPS = ("SGD", "OT-MDR K=1", "OT-MDR K=2 unroll", "OT-MDR K=2 scan")
IN_PYTORCH = STEPS[:2]
# Without ours it takes a minute, which benchmarks/cpu_convolution.py measures.
TOO_SLOW = ("OT-MDR K=2 scan", "XLA")
PARTS = ("forward", "images", "kernel")


# --- workers -------------------------------------------------------------------------


def jax_runs(part, sizes):
    """(what, way) -> a function of nothing; (what, way) -> costs; name and version."""
    import cpu_convolution as own
    import jax
    from _common import make_batch

    from otmdr_jax import models

    depth, width, batch_size, image_size = sizes
    ways = {"XLA": own.WAYS["lax"], "ours": own.WAYS["ours"]}
    runs, costs = {}, {}
    if part != "layers":
        model = models.create(f"wide_resnet_{depth}_{width}", 10)
        batch = make_batch(batch_size, image_size)
        for step in part:
            for way, convolution in ways.items():
                if (step, way) != TOO_SLOW:
                    made = own.step_program(model, batch, convolution, step)
                    runs[step, way], costs[step, way] = made
    else:
        for layer in layers_of(own, sizes):
            for way, convolution in ways.items():
                parts = own.layer_parts(convolution, layer, batch_size)
                for name in PARTS:
                    if (name, way) != ("forward", "ours"):  # XLA's
                        what = own.layer_name(layer, name)
                        runs[what, way] = own.program(*parts[name])[0]
    return runs, costs, f"JAX {jax.__version__}"


def pytorch_runs(part, sizes):
    """The same in PyTorch: eager, with channels last and threads that sleep."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import cpu_convolution as own
    import numpy as np
    import torch
    from cpu_alternatives import pytorch_run

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    depth, width, batch_size, image_size = sizes
    rng, runs = np.random.default_rng(0), {}
    if part != "layers":
        images = rng.normal(size=(batch_size, image_size, image_size, 3))
        batch = images.astype(np.float32), np.arange(batch_size) % 10
        for step in set(part) & set(IN_PYTORCH):
            runs[step, "PyTorch"] = pytorch_run(step, depth, width, *batch)
    else:
        last = {"memory_format": torch.channels_last}
        for layer in layers_of(own, sizes):
            channels, features, side, stride, size = layer
            x = torch.randn(batch_size, channels, side, side).to(**last)
            w = torch.randn(features, channels, size, size).to(**last)
            window = [stride] * 2, [size // 2] * 2

            def forward(x=x, w=w, window=window):
                return torch.conv2d(x, w, None, *window)

            y = torch.randn_like(forward()).to(**last)

            def backward(mask, x=x, w=w, y=y, window=window):
                rest = *window, [1, 1], False, [0, 0], 1, mask
                return torch.ops.aten.convolution_backward(y, x, w, None, *rest)

            for name, run in (
                ("forward", forward),
                ("images", lambda backward=backward: backward([True, False, False])),
                ("kernel", lambda backward=backward: backward([False, True, False])),
            ):
                runs[own.layer_name(layer, name), "PyTorch"] = run
    return runs, {}, f"PyTorch {torch.__version__.split('+')[0]}"


def layers_of(own, sizes):
    return own.LAYERS if sizes[0] == 16 else own.LAYERS[:1]


def work(library, part, sizes):
    """Runs what it reads the name of, and says how long that took.

    Args:
      library: "jax" or "pytorch".
      part: The names of steps, or "layers".
      sizes: Depth and width of the network, size of the batch and of its images.
    """
    runs, costs, version = {"jax": jax_runs, "pytorch": pytorch_runs}[library](
        part, sizes
    )
    for run in runs.values():
        for _ in range(2):
            run()
    names = [[*name, costs.get(name, {})] for name in runs]
    print(json.dumps([version, names]), flush=True)
    repeats = 3 if part == "layers" else 1
    for line in sys.stdin:
        run = runs[tuple(json.loads(line))]
        if part == "layers":
            run()  # the last one's data leave the cache
        time.sleep(0.02)  # threads that spin go to sleep
        processor, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            run()
        wall = time.perf_counter() - wall
        processor = time.process_time() - processor
        print(json.dumps([1e3 * t / repeats for t in (wall, processor)]), flush=True)


# --- what drives them ----------------------------------------------------------------


def start(library, python, part, sizes, kept):
    """A worker that has compiled: its process, version and what it runs."""
    process = subprocess.Popen(
        [python, __file__, "--worker", json.dumps([library, part, sizes])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(KEPT if kept else {})},
    )
    version, names = json.loads(process.stdout.readline() or '["failed", []]')
    return process, version + (", kept" if kept else ""), names


def measure(pythons, part, sizes, kept, rounds):
    """What -> "way, version" -> summary."""
    workers = [
        start(*python, part, sizes, keeps) for keeps in kept for python in pythons
    ]
    times, costs = {}, {}
    for _ in range(rounds):
        for what in dict.fromkeys(name[0] for worker in workers for name in worker[2]):
            for process, version, names in workers:
                for name, way, cost in names:
                    if name != what:
                        continue
                    process.stdin.write(json.dumps([name, way]) + "\n")
                    process.stdin.flush()
                    pair = json.loads(process.stdout.readline())
                    key = version if way == "PyTorch" else f"{version}: {way}"
                    times.setdefault(what, {}).setdefault(key, []).append(pair)
                    costs[what, key] = cost
    for process, *_ in workers:
        process.stdin.close()
        process.wait()
    return {
        what: {
            key: {**summarise(pairs, reference(of)), **costs[what, key]}
            for key, pairs in of.items()
        }
        for what, of in times.items()
    }


def reference(of):
    """PyTorch's times with its defaults; without them, the first."""
    found = [pairs for key, pairs in of.items() if key.startswith("PyTorch")]
    return (found or list(of.values()))[0]


def summarise(pairs, reference):
    """Medians, and of the ratio to the reference in the same round."""
    wall, processor = zip(*pairs, strict=True)
    ratios = [
        statistics.median(a[i] / b[i] for a, b in zip(pairs, reference, strict=True))
        for i in range(2)
    ]
    return {
        "milliseconds": statistics.median(wall),
        "processor_milliseconds": statistics.median(processor),
        "ratio": ratios[0],
        "processor_ratio": ratios[1],
        "n": len(pairs),
    }


def tables(record):
    """Two tables: steps, and processor time by layer."""
    found = []
    if steps := record.get("steps"):
        rows = [
            [
                step,
                key,
                f"{values['milliseconds']:.0f}",
                f"{values['processor_milliseconds']:.0f}",
                f"{values['ratio']:.2f} ({values['processor_ratio']:.2f})"
                if step in IN_PYTORCH
                else "",
                f"{values['peak_mib']:.0f}" if "peak_mib" in values else "",
                values["n"],
            ]
            for step, of in steps.items()
            for key, values in of.items()
        ]
        header = ["step", "by", "ms", "processor ms", "x PyTorch", "peak MiB", "n"]
        found.append(markdown(header, rows))
    if layers := record.get("layers"):
        keys = list(dict.fromkeys(key for of in layers.values() for key in of))
        rows = [
            [
                what,
                *(
                    f"{of[key]['processor_milliseconds']:.1f}" if key in of else ""
                    for key in keys
                ),
            ]
            for what, of in layers.items()
        ]
        found.append(markdown(["processor ms", *keys], rows))
    return found


def environment(pythons):
    """Machine and date; versions are in the names of what is measured."""
    code = (
        f"import sys, json; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
        "import _common; print(json.dumps(_common.environment()))"
    )
    own = next(python for library, python in pythons if library == "jax")
    out = subprocess.run([own, "-c", code], check=True, stdout=subprocess.PIPE)
    return json.loads(out.stdout)


def main():
    parser = options_of(__doc__, "tiny and once")
    add = parser.add_argument
    add("--jax", nargs="+", default=[sys.executable], metavar="PYTHON", help="with JAX")
    add("--pytorch", metavar="PYTHON", help="with PyTorch; default: none is measured")
    add("--only", nargs="*", default=["steps", "layers"], choices=["steps", "layers"])
    add("--steps", nargs="*", default=STEPS, choices=STEPS)
    add("--rounds", type=int, default=11)
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.worker:
        return work(*json.loads(options.worker))

    pythons = [("jax", python) for python in options.jax]
    if options.pytorch:
        pythons.append(("pytorch", options.pytorch))
    sizes = (10, 1, 4, 8) if options.smoke else (16, 2, 32, 32)
    if options.smoke:
        options.rounds, options.steps = 1, STEPS[:1]
    record = {}
    if options.json and os.path.exists(options.json):
        with open(options.json) as file:
            record = json.load(file)
    record |= {
        **environment(pythons),
        "kept": KEPT,
        "model": f"wide_resnet_{sizes[0]}_{sizes[1]}",
        "batch_size": sizes[2],
        "dtype": "float32",
    }
    for part in options.only:
        steps = part == "steps"
        found = measure(
            pythons,
            options.steps if steps else part,
            sizes,
            (False, True) if steps else (False,),
            options.rounds,
        )
        record[part] = record.get(part, {}) | found
        write_json(options.json, record)
        print(f"{tables({part: found})[0]}\n", flush=True)


if __name__ == "__main__":
    main()
