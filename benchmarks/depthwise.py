"""Times the models' depthwise convolution against XLA's own on a CPU, by layer.

    python benchmarks/depthwise.py --json benchmarks/results/depthwise_cpu.json

Medians over 11 rounds, in which all programs run in turn, and of the ratios XLA / ours
within a round. Batch 16, float32. Expected: half a minute on 2 CPU cores.
"""

import functools
import operator
import statistics
import time

import jax
from _common import environment
from _record import markdown, options_of, write_json
from jax import lax

from otmdr_jax.models.depthwise import convolve_depthwise

ROUNDS = 11
WAYS = {"lax": lax.conv_general_dilated, "ours": convolve_depthwise}
# Channels, side of the image, side of the kernel, stride: of MobileNet and
# EfficientNet-B0 for 32x32 images.
LAYERS = (
    (64, 32, 3, 1),
    (96, 32, 3, 2),
    (144, 16, 5, 2),
    (512, 4, 3, 1),
    (672, 4, 5, 1),
)


def parts(convolution, layer, batch_size=16):
    """Part -> (function, operands): the convolution and its two gradients."""
    channels, side, size, stride = layer
    conv = functools.partial(
        convolution,
        window_strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch_size, side, side, channels))
    w = jax.random.normal(keys[1], (size, size, 1, channels))
    y = jax.random.normal(keys[2], jax.eval_shape(conv, x, w).shape)
    return {
        "forward": (conv, (x, w)),
        "images": (
            lambda w, y: jax.linear_transpose(lambda x: conv(x, w), x)(y),
            (w, y),
        ),
        "kernel": (
            lambda x, y: jax.linear_transpose(lambda w: conv(x, w), w)(y),
            (x, y),
        ),
    }


def measure():
    """What -> the medians of XLA's and our milliseconds and of their ratios."""
    found = {}
    for layer in LAYERS:
        programs = {
            (part, way): (jax.jit(function).lower(*operands).compile(), operands)
            for way, convolution in WAYS.items()
            for part, (function, operands) in parts(convolution, layer).items()
        }
        times = {key: [] for key in programs}
        for turn in range(ROUNDS + 1):
            for key, (program, operands) in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*operands))
                if turn:  # the first warms up
                    times[key].append(1e3 * (time.perf_counter() - start))
        channels, side, size, stride = layer
        for part in ("forward", "images", "kernel"):
            xla, ours = times[part, "lax"], times[part, "ours"]
            name = f"{size}x{size}/{stride}, {channels} channels at {side}: {part}"
            found[name] = {
                "xla_ms": statistics.median(xla),
                "ours_ms": statistics.median(ours),
                "speedup": statistics.median(map(operator.truediv, xla, ours)),
            }
    return found


def table(results):
    return markdown(
        ["layer and pass", "XLA ms", "ours ms", "x"],
        [
            [
                name,
                f"{x['xla_ms']:.1f}",
                f"{x['ours_ms']:.2f}",
                f"{x['speedup']:.1f}",
            ]
            for name, x in results.items()
        ],
    )


def main():
    options = options_of(__doc__).parse_args()
    results = measure()
    print(table(results))
    settings = {"batch_size": 16, "dtype": "float32", "n": ROUNDS}
    write_json(options.json, {**environment(), **settings, "results": results})


if __name__ == "__main__":
    main()
