"""Times the models' convolution against XLA's own on a CPU, by layer and by step.

    python benchmarks/cpu_convolution.py
    python benchmarks/cpu_convolution.py --json benchmarks/results/cpu_convolution.json

Both are compiled first and then timed in turn, round after round, in one process, and
what is reported is the median of the ratios XLA / ours within a round. On a machine
that others use, the ratio of processor time is steadier than that of wall-clock time.
Memory is the compiled program's own account. Expected: 10 minutes on 2 CPU cores, most
of it XLA's convolutions in loops.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
from _common import compile_step, environment, make_arguments, make_batch, make_steps
from _record import markdown, options_of, processor_name, write_json
from jax import lax

from otmdr_jax import models
from otmdr_jax.models import base, layers
from otmdr_jax.models.convolution import convolve

WAYS = {"lax": lax.conv_general_dilated, "ours": convolve}
# Channels in and out, side of the image, stride, side of the kernel: WRN-16-2's layers,
# then the first of an ImageNet network.
LAYERS = (
    (3, 16, 32, 1, 3),
    (16, 32, 32, 1, 3),
    (32, 32, 32, 1, 3),
    (32, 64, 32, 2, 3),
    (64, 64, 16, 1, 3),
    (64, 128, 16, 2, 3),
    (128, 128, 8, 1, 3),
    (16, 32, 32, 1, 1),
    (32, 64, 32, 2, 1),
    (64, 128, 16, 2, 1),
    (3, 64, 64, 2, 7),
)
IN_LOOPS = ((32, 32, 32, 1, 3), (128, 128, 8, 1, 3))
# How often WRN-16-2 has each of them.
COUNTS = (1, 1, 3, 1, 3, 1, 3, 1, 1, 1, 0)
PARTS = ("forward", "images", "kernel")
STEPS = ("SGD", "OT-MDR K=1", "OT-MDR K=2 unroll", "OT-MDR K=2 scan")


def layer_operands(conv, layer, batch_size):
    """Random images, kernel and cotangent of a layer."""
    channels, features, side, _, size = layer
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch_size, side, side, channels))
    w = jax.random.normal(keys[1], (size, size, channels, features))
    return x, w, jax.random.normal(keys[2], jax.eval_shape(conv, x, w).shape)


def gradients(conv, x, w, y):
    """Part -> (function, operands): the convolution and its two gradients."""
    return {
        "forward": (conv, (x, w)),
        "images": (
            lambda w, y: jax.linear_transpose(lambda x: conv(x, w), x)(y)[0],
            (w, y),
        ),
        "kernel": (
            lambda x, y: jax.linear_transpose(lambda w: conv(x, w), w)(y)[0],
            (x, y),
        ),
    }


def layer_parts(convolution, layer, batch_size):
    """The `gradients` of one way to convolve."""
    _, _, _, stride, size = layer
    conv = functools.partial(
        convolution,
        window_strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return gradients(conv, *layer_operands(conv, layer, batch_size))


def looped(how, function, operands, members=2):
    """The same for two members at once, each with its kernel."""
    stacked = [jnp.stack([a] * members) for a in operands]
    if how == "vmap":
        return jax.vmap(function), stacked
    return lambda *xs: lax.scan(lambda c, x: (c, function(*x)), None, xs)[1], stacked


def program(function, operands, compiler_options=None):
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*operands)
    compiled = lowered.compile(compiler_options=compiler_options)
    seconds = time.perf_counter() - start
    cost = {
        "compile_seconds": seconds,
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    return lambda: jax.block_until_ready(compiled(*operands)), cost


def layer_name(layer, part):
    channels, features, side, stride, size = layer
    return f"{size}x{size}/{stride} {channels}->{features} at {side}: {part}"


def step_program(model, batch, convolution, name, compiler_options=None):
    """One training step of a network whose layers take this convolution."""
    layers.convolve = convolution
    base._skeleton.cache_clear()  # it holds the layers of the other way
    try:
        step = make_steps(model, [(2, "unroll"), (2, "scan")])[name]
        arguments = make_arguments(step, model, batch)
        return compile_step(step.function, arguments, compiler_options)
    finally:
        layers.convolve = convolve
        base._skeleton.cache_clear()


def compare(name, programs, rounds):
    """Runs both ways in turn; returns and prints the record of one row."""
    times = {way: [] for way in programs}
    for run, _ in programs.values():
        run()  # warm-up
    for _ in range(rounds):
        for way, (run, _) in programs.items():
            processor, wall = time.process_time(), time.perf_counter()
            run()
            wall, processor = (
                time.perf_counter() - wall,
                time.process_time() - processor,
            )
            times[way].append((1e3 * wall, 1e3 * processor))
    record = {"name": name, "n": rounds}
    for way, (_, cost) in programs.items():
        wall, processor = zip(*times[way], strict=True)
        record[way] = {
            **cost,
            "milliseconds": statistics.median(wall),
            "processor_milliseconds": statistics.median(processor),
            "all_milliseconds": wall,
        }
    pairs = list(zip(times["lax"], times["ours"], strict=True))
    record["speedup"] = statistics.median(a[0] / b[0] for a, b in pairs)
    record["processor_speedup"] = statistics.median(a[1] / b[1] for a, b in pairs)
    memory = "peak_mib" if "peak_mib" in record["ours"] else "temporary_mib"
    lax_, ours = record["lax"], record["ours"]
    print(
        f"| {name} | {lax_['milliseconds']:.1f} | {ours['milliseconds']:.1f} "
        f"| {record['speedup']:.2f} | {record['processor_speedup']:.2f} "
        f"| {lax_[memory]:.0f} | {ours[memory]:.0f} "
        f"| {lax_['compile_seconds']:.1f} | {ours['compile_seconds']:.1f} | {rounds} |",
        flush=True,
    )
    return record


def sums(records):
    """Part -> way -> milliseconds and processor time over all layers of WRN-16-2."""
    found = {record["name"]: record for record in records}
    return {
        part: {
            way: {
                key: sum(
                    count * found[layer_name(layer, part)][way][key]
                    for layer, count in zip(LAYERS, COUNTS, strict=True)
                )
                for key in ("milliseconds", "processor_milliseconds")
            }
            for way in WAYS
        }
        for part in PARTS
    }


def tables(record):
    """Three tables of the page: steps, layers, members in loops."""
    found = {result["name"]: result for result in record["results"]}

    def ratio(name):
        return f"{found[name]['processor_speedup']:.2f}"

    steps = [
        [
            result["name"].removeprefix(f"{record['model']} "),
            *(
                f"{result[way][key]:.0f}"
                for key in ("processor_milliseconds", "peak_mib")
                for way in WAYS
            ),
            f"{result['speedup']:.2f}",
            f"{result['processor_speedup']:.2f}",
            result["n"],
        ]
        for result in record["results"]
        if "peak_mib" in result["ours"]
    ]
    layers = [
        [
            layer_name(layer, "")[:-2],
            *(ratio(layer_name(layer, part)) for part in PARTS),
            found[layer_name(layer, "kernel")]["n"],
        ]
        for layer in LAYERS
    ]
    parts = sums(record["results"]).values()
    clock = "processor_milliseconds"
    n = layers[-1][-1]
    for way, title in (("lax", "XLA"), ("ours", "ours")):
        milliseconds = [f"{ways[way][clock]:.0f} ms" for ways in parts]
        layers.append([f"all of WRN-16-2, {title}", *milliseconds, n])
    ratios = [f"{ways['lax'][clock] / ways['ours'][clock]:.2f}" for ways in parts]
    layers.append(["all of WRN-16-2", *ratios, n])
    loops = [
        [name, *(ratio(f"{name}, {how} over 2") for how in ("scan", "vmap"))]
        + [found[f"{name}, scan over 2"]["n"]]
        for layer in IN_LOOPS
        for name in (layer_name(layer, part) for part in PARTS)
    ]
    header = ["step", "XLA, processor ms", "ours", "XLA, peak MiB", "ours"]
    header += ["times as fast", "by processor time", "n"]
    return (
        markdown(header, steps),
        markdown(["convolution", *PARTS, "n"], layers),
        markdown(["convolution", "in a scan over 2", "vmap over 2", "n"], loops),
    )


def main():
    parser = options_of(__doc__)
    add = parser.add_argument
    add("--model", default="wide_resnet_16_2")
    add("--batch-size", type=int, default=32)
    add("--rounds", type=int, default=11)
    add("--slow-rounds", type=int, default=3, help="where XLA takes seconds")
    add("--steps", nargs="*", default=STEPS, help="of benchmarks/step_time.py")
    options = parser.parse_args()
    if jax.default_backend() != "cpu":
        parser.error("this measures CPUs: set JAX_PLATFORMS=cpu")

    print(f"JAX {jax.__version__}, {processor_name()}\n")
    print("| what | XLA ms | ours ms | x wall | x CPU | XLA MiB | ours MiB ", end="")
    print("| XLA compile s | ours | n |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    records = []

    def layers(which, rounds, how=None):
        for layer in which:
            parts = {
                way: layer_parts(f, layer, options.batch_size)
                for way, f in WAYS.items()
            }
            for part in parts["ours"]:
                programs = {
                    way: program(
                        *(looped(how, *p[part]) if how is not None else p[part])
                    )
                    for way, p in parts.items()
                }
                name = layer_name(layer, part)
                name += "" if how is None else f", {how} over 2"
                records.append(compare(name, programs, rounds))

    layers(LAYERS, options.rounds)
    for how in ("scan", "vmap"):
        layers(IN_LOOPS, options.slow_rounds, how)

    model = models.create(options.model, 10)
    batch = make_batch(options.batch_size)
    for name in options.steps:
        programs = {way: step_program(model, batch, f, name) for way, f in WAYS.items()}
        slow = name.endswith("scan")
        rounds = options.slow_rounds if slow else options.rounds
        records.append(compare(f"{options.model} {name}", programs, rounds))

    record = {
        **environment(),
        "model": options.model,
        "batch_size": options.batch_size,
        "dtype": "float32",
        "results": records,
    }
    print("", *tables(record), sep="\n\n")
    write_json(options.json, record)


if __name__ == "__main__":
    main()
