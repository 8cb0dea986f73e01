"""Times what the models' convolution could have been instead, on a CPU.

    python benchmarks/cpu_alternatives.py --json cpu_alternatives.json
    python benchmarks/cpu_alternatives.py --smoke

Three parts. `layers`: the 3x3 layers of WRN-16-2 by several formulas, by XLA with other
settings and by PyTorch, each with its error against a sum in float64. `steps`: whole
training steps. `flags`: settings of a whole process, each in one of its own. All ways
are compiled first and then run in turn, round after round; before each run the threads
of the last get time to fall asleep. PyTorch runs eagerly, with channels last and as
many threads as there are cores, which sleep where they wait (OMP_WAIT_POLICY=PASSIVE):
spinning, as is the default, multiplies its times where other jobs run. Where it is not
installed it is left out. See docs/performance.md for the tables. Expected: 6 minutes on
2 CPU cores.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from _common import compile_step, environment, make_arguments, make_batch, make_steps
from _record import markdown, options_of, write_json
from cpu_convolution import WAYS, gradients, layer_operands, program, step_program
from jax import lax

from otmdr_jax import models
from otmdr_jax.models import convolution as zoo
from otmdr_jax.models import convolution_programs as programs

LAYERS = ((32, 32, 32, 1, 3), (64, 64, 16, 1, 3), (128, 128, 8, 1, 3))
PAD = ((1, 1), (1, 1))
NO_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}
FLAGS = {
    "none": {},
    "oneDNN": {
        "XLA_FLAGS": "--xla_cpu_use_onednn=true "
        "--xla_cpu_experimental_onednn_custom_call=true"
    },
    "fast mathematics": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
    "concurrent scheduler": {
        "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=true"
    },
    "glibc keeps memory": {
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    },
}
xla, ours = (
    functools.partial(
        way,
        window_strides=(1, 1),
        padding=PAD,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    for way in WAYS.values()
)
xla_nchw = functools.partial(lax.conv_general_dilated, window_strides=(1, 1))
xla_nchw = functools.partial(xla_nchw, padding=PAD)  # NCHW and OIHW by default


@functools.cache
def pytorch():
    """PyTorch, whose threads sleep where they wait, or None."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch


# --- other formulas for a 3x3 convolution of stride 1 that keeps the image's size ----


def windows(x):
    """What each tap of the kernel sees of x: nine times (B, H, W, C)."""
    padded = jnp.pad(x, ((0, 0), *PAD, (0, 0)))
    _, height, width, _ = x.shape
    return [
        padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    ]


def patches(x):
    return jnp.concatenate(windows(x), axis=-1)


def nine_products(x, w):
    taps = w.reshape(9, *w.shape[2:])
    return sum(seen @ tap for seen, tap in zip(windows(x), taps, strict=True))


def im2col(x, w):
    return patches(x) @ w.reshape(-1, w.shape[-1])


def combine(matrix, items):
    return [
        sum(c * item for c, item in zip(row, items, strict=True) if c) for row in matrix
    ]


def winograd(x, w):
    """F(2x2, 3x3): outputs in tiles of 2x2 from tiles of 4x4 that overlap; sides even.

    Lavin and Gray, 2015, section 4.1.
    """
    from_x = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
    from_w = jnp.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    back = ((1, 1, 1, 0), (0, 1, -1, -1))
    (batch, height, width, _), features = x.shape, w.shape[-1]
    padded = jnp.pad(x, ((0, 0), *PAD, (0, 0)))
    kernels = jnp.einsum("ui,vj,ijcd->uvcd", from_w, from_w, w)
    tiles = [
        [padded[:, i : i + height - 1 : 2, j : j + width - 1 : 2] for j in range(4)]
        for i in range(4)
    ]
    columns = [combine(from_x, column) for column in zip(*tiles, strict=True)]
    images = [combine(from_x, row) for row in zip(*columns, strict=True)]
    products = [[images[u][v] @ kernels[u, v] for v in range(4)] for u in range(4)]
    columns = [combine(back, column) for column in zip(*products, strict=True)]
    out = [combine(back, row) for row in zip(*columns, strict=True)]
    out = jnp.stack([jnp.stack(row) for row in out])  # (2, 2, B, H / 2, W / 2, D)
    return out.transpose(2, 3, 0, 4, 1, 5).reshape(batch, height, width, features)


def loop_kernel(x, y):
    return programs._tap_kernel(x, y, (1, 1), PAD, (3, 3))


def unrolled_kernel(x, y):
    taps = jnp.stack([programs._product(seen, y) for seen in windows(x)])
    return taps.reshape(3, 3, *taps.shape[1:])


def im2col_kernel(x, y):
    return programs._product(patches(x), y).reshape(3, 3, x.shape[3], y.shape[3])


def assemble(forward, kernel_gradient):
    """A convolution for networks by these formulas where they apply, ours elsewhere."""
    conv = jax.custom_vjp(forward)

    def backward(operands, y):
        images, operands_ = gradients(ours, *operands, y)["images"]
        return images(*operands_), kernel_gradient(operands[0], y)

    conv.defvjp(lambda x, w: (forward(x, w), (x, w)), backward)

    def convolution(x, w, window_strides, padding, **options):
        plain = w.shape[:2] == (3, 3) and tuple(window_strides) == (1, 1)
        if plain and w.shape[2] >= 16:
            return conv(x, w)
        return zoo.convolve(x, w, window_strides, padding, **options)

    return convolution


# --- layers --------------------------------------------------------------------------


def layer_runs(layer, batch_size):
    """Part -> way -> a function of nothing, and what transposes its result to ours."""
    x, w, y = layer_operands(xla, layer, batch_size)
    nchw = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), y.transpose(0, 3, 1, 2)
    ways = {"forward": {}, "images": {}, "kernel": {}}
    for name, conv, operands, settings in (
        ("XLA", xla, (x, w, y), None),
        ("ours", ours, (x, w, y), None),
        ("XLA, NCHW", xla_nchw, nchw, None),
        ("XLA without YNNPACK", xla, (x, w, y), NO_YNNPACK),
        ("ours without YNNPACK", ours, (x, w, y), NO_YNNPACK),
    ):
        for part, (function, of) in gradients(conv, *operands).items():
            ways[part][name] = program(function, of, settings)[0]
    del ways["forward"]["ours"], ways["forward"]["ours without YNNPACK"]  # XLA's
    for part, name, function, of in (
        ("forward", "nine products", nine_products, (x, w)),
        ("forward", "im2col", im2col, (x, w)),
        ("forward", "Winograd", winograd, (x, w)),
        ("kernel", "taps in a loop", loop_kernel, (x, y)),
        ("kernel", "taps unrolled", unrolled_kernel, (x, y)),
        ("kernel", "im2col", im2col_kernel, (x, y)),
    ):
        ways[part][name] = program(function, of)[0]
    if torch := pytorch():
        x_, w_, y_ = (
            torch.from_numpy(np.array(a)).to(memory_format=torch.channels_last)
            for a in nchw
        )

        def backward(which):
            mask = [which == 0, which == 1, False]
            sizes = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
            return torch.ops.aten.convolution_backward(y_, x_, w_, None, *sizes)[which]

        ways["forward"]["PyTorch"] = lambda: torch.conv2d(x_, w_, padding=1)
        ways["images"]["PyTorch"] = lambda: backward(0)
        ways["kernel"]["PyTorch"] = lambda: backward(1)
    return ways, exact(*(np.asarray(a, np.float64) for a in (x, w, y)))


def exact(x, w, y):
    """Part -> result, in float64."""

    def seen(x):
        padded = np.pad(x, ((0, 0), *PAD, (0, 0)))
        _, h, v, _ = x.shape
        return {
            (i, j): padded[:, i : i + h, j : j + v] for i in range(3) for j in range(3)
        }

    turned = w[::-1, ::-1].swapaxes(2, 3)
    kernel = [np.tensordot(part, y, ((0, 1, 2),) * 2) for part in seen(x).values()]
    return {
        "forward": sum(part @ w[ij] for ij, part in seen(x).items()),
        "images": sum(part @ turned[ij] for ij, part in seen(y).items()),
        "kernel": np.reshape(kernel, w.shape),
    }


def error(name, part, result, expected):
    """The largest, over the largest entry of what is expected."""
    result = np.asarray(result)
    if name in ("XLA, NCHW", "PyTorch"):
        axes = (2, 3, 1, 0) if part == "kernel" else (0, 2, 3, 1)
        result = result.transpose(axes)
    return float(np.abs(result - expected).max() / np.abs(expected).max())


def measure_layers(layers, batch_size, rounds):
    records = {}
    for layer in layers:
        ways, expected = layer_runs(layer, batch_size)
        for part, runs in ways.items():
            errors = {
                name: error(name, part, run(), expected[part])
                for name, run in runs.items()
            }
            record = summarise(timed(runs, rounds))
            for name, values in record.items():
                values["error"] = errors[name]
            record = {"channels": layer[0], "side": layer[2], "ways": record}
            records.setdefault(part, []).append(record)
    return records


# --- steps ---------------------------------------------------------------------------

STEPS = {
    "SGD": {
        "XLA": (lax.conv_general_dilated, None),
        "ours": (zoo.convolve, None),
        "XLA without YNNPACK": (lax.conv_general_dilated, NO_YNNPACK),
        "ours without YNNPACK": (zoo.convolve, NO_YNNPACK),
        "ours, forward by Winograd": (
            assemble(winograd, lambda x, y: programs._winograd_kernel(x, y, PAD)),
            None,
        ),
        "ours, kernel by taps in a loop": (assemble(ours, loop_kernel), None),
        "ours, kernel by taps unrolled": (assemble(ours, unrolled_kernel), None),
        "ours, kernel by im2col": (assemble(ours, im2col_kernel), None),
    },
    "OT-MDR K=1": {
        "XLA": (lax.conv_general_dilated, None),
        "ours": (zoo.convolve, None),
    },
}


def pytorch_run(step, depth, width, images, labels):
    """A function of nothing that takes a step of the same network, in PyTorch."""
    import pytorch_step

    torch = pytorch()
    module = pytorch_step.WideResNet(depth, width)
    module = module.to(memory_format=torch.channels_last).train()
    images = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(np.array(labels)).long()
    if step != "SGD":
        return pytorch_step.make_step(module, module, images, labels, torch.float32)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
    )

    def run():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()

    return run


def measure_steps(which, sizes, rounds):
    depth, width, batch_size, image_size = sizes
    model = models.create(f"wide_resnet_{depth}_{width}", 10)
    batch = make_batch(batch_size, image_size)
    records = {}
    for step, ways in which.items():
        runs, costs = {}, {}
        for name, (convolution, settings) in ways.items():
            runs[name], costs[name] = step_program(
                model, batch, convolution, step, settings
            )
        if pytorch():
            runs["PyTorch"] = pytorch_run(step, depth, width, *batch)
            for _ in range(2):
                runs["PyTorch"]()
        records[step] = summarise(timed(runs, rounds))
        for name, cost in costs.items():
            records[step][name].update(cost)
    return records


# --- flags ---------------------------------------------------------------------------


def child(depth, width, batch_size, image_size):
    """Measures once for each line it reads."""
    x, w, y = layer_operands(xla, LAYERS[0], batch_size)
    model = models.create(f"wide_resnet_{depth}_{width}", 10)
    step = make_steps(model)["SGD"]
    arguments = make_arguments(step, model, make_batch(batch_size, image_size))
    runs = {
        "forward": program(*gradients(xla, x, w, y)["forward"])[0],
        "kernel": program(*gradients(xla, x, w, y)["kernel"])[0],
        "kernel, ours": program(*gradients(ours, x, w, y)["kernel"])[0],
        "kernel, im2col": program(im2col_kernel, (x, y))[0],
        "SGD, ours": compile_step(step.function, arguments)[0],
    }
    timed(runs, 1)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(runs, 1)), flush=True)


def measure_flags(names, sizes, rounds):
    """Flags -> what is timed -> summary, or {"error": last line}."""
    processes, logs, times, failed = {}, {}, {}, {}
    command = [sys.executable, __file__, "--child", json.dumps(sizes)]
    for name in names:
        flags = {k: v for k, v in FLAGS[name].items() if k != "XLA_FLAGS"}
        xla_flags = (
            f"{os.environ.get('XLA_FLAGS', '')} {FLAGS[name].get('XLA_FLAGS', '')}"
        )
        logs[name] = tempfile.TemporaryFile("w+")
        processes[name] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=logs[name],
            text=True,
            env={**os.environ, **flags, "XLA_FLAGS": xla_flags.strip()},
        )
        if processes[name].stdout.readline() != "ready\n":
            processes.pop(name).wait()
            logs[name].seek(0)
            failed[name] = {"error": (logs[name].read().splitlines() or [""])[-1]}
    for _ in range(rounds):
        for name, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            for what, (pair,) in json.loads(process.stdout.readline()).items():
                times.setdefault(what, {}).setdefault(name, []).append(pair)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    by_what = {what: summarise(of, "none") for what, of in times.items()}
    return {
        name: failed.get(name) or {what: of[name] for what, of in by_what.items()}
        for name in names
    }


# --- clocks and tables ---------------------------------------------------------------


def timed(runs, rounds):
    """Name -> a pair a round: wall-clock and processor milliseconds."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.02)  # threads that spin, of XLA's or of PyTorch's, go to sleep
            processor, wall = time.process_time(), time.perf_counter()
            run()
            wall = time.perf_counter() - wall
            processor = time.process_time() - processor
            times[name].append((1e3 * wall, 1e3 * processor))
    return times


def summarise(times, reference="XLA"):
    """Medians, and of the ratio reference / this one in the same round."""
    summary = {}
    for name, pairs in times.items():
        wall, processor = zip(*pairs, strict=True)
        summary[name] = {
            "milliseconds": statistics.median(wall),
            "fastest_milliseconds": min(wall),
            "processor_milliseconds": statistics.median(processor),
            "n": len(pairs),
        }
        for prefix, base in (("", reference), ("ours_", "ours")):
            if base in times:
                ratios = [
                    [a / b for a, b in zip(x, y, strict=True)]
                    for x, y in zip(times[base], pairs, strict=True)
                ]
                for key, ratio in zip(
                    ("speedup", "processor_speedup"),
                    zip(*ratios, strict=True),
                    strict=True,
                ):
                    summary[name][prefix + key] = statistics.median(ratio)
    return summary


def tables(record):
    """Three tables: layers, steps, flags."""

    def both(values, prefix=""):
        wall, processor = (
            values[f"{prefix}{clock}speedup"] for clock in ("", "processor_")
        )
        return f"{wall:.2f} ({processor:.2f})"

    found = []
    if layers := record.get("layers"):
        of = [f"{r['channels']} at {r['side']}x{r['side']}" for r in layers["forward"]]
        rows = [
            [
                f"{part}: {name}",
                *(
                    f"{r['ways'][name]['milliseconds']:.1f} "
                    f"({r['ways'][name]['processor_milliseconds']:.1f})"
                    for r in records
                ),
                f"{max(r['ways'][name]['error'] for r in records):.0e}",
            ]
            for part, records in layers.items()
            for name in records[0]["ways"]
            if part != "images" or name in ("XLA", "ours", "PyTorch")
        ]
        found.append(markdown(["ms (processor ms)", *of, "error"], rows))
    if steps := record.get("steps"):
        rows = [
            [
                f"{step}: {name}",
                *(
                    f"{values[clock + 'milliseconds']:.0f}"
                    for clock in ("", "fastest_", "processor_")
                ),
                both(values),
                *(
                    f"{values[cost]:.0f}" if cost in values else ""
                    for cost in ("peak_mib", "compile_seconds")
                ),
                values["n"],
            ]
            for step, ways in steps.items()
            for name, values in ways.items()
        ]
        header = ["step", "ms", "fastest", "processor ms"]
        header += ["times as fast as XLA", "peak MiB", "compile s", "n"]
        found.append(markdown(header, rows))
    if flags := record.get("flags"):
        whats = list(flags["none"])
        rows = [
            [name, values["error"], *[""] * (len(whats) - 1)]
            if "error" in values
            else [name, *(both(values[what]) for what in whats)]
            for name, values in flags.items()
            if name != "none"
        ]
        found.append(markdown(["times as fast with", *whats], rows))
    return found


def main():
    parser = options_of(__doc__, "tiny and once: seconds")
    add = parser.add_argument
    parts = ("layers", "steps", "flags")
    add("--only", nargs="*", default=parts, choices=parts)
    add("--rounds", type=int, default=11)
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if jax.default_backend() != "cpu":
        parser.error("this measures CPUs: set JAX_PLATFORMS=cpu")
    if options.child:
        return child(*json.loads(options.child))

    layers, steps, flags, sizes = LAYERS, STEPS, list(FLAGS), (16, 2, 32, 32)
    if options.smoke:
        layers, flags, sizes = ((16, 16, 8, 1, 3),), ["none"], (10, 1, 4, 8)
        steps = {"SGD": dict(list(STEPS["SGD"].items())[:2])}
        options.rounds = 1
    torch = pytorch()
    record = {
        **environment(),
        "torch": torch.__version__ if torch else None,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "model": f"wide_resnet_{sizes[0]}_{sizes[1]}",
        "batch_size": sizes[2],
        "dtype": "float32",
    }
    for part, measure in (
        ("layers", lambda: measure_layers(layers, sizes[2], options.rounds)),
        ("steps", lambda: measure_steps(steps, sizes, options.rounds)),
        ("flags", lambda: measure_flags(flags, sizes, options.rounds)),
    ):
        if part in options.only:
            record[part] = measure()
            write_json(options.json, record)
            print(f"{tables({part: record[part]})[0]}\n", flush=True)


if __name__ == "__main__":
    main()
