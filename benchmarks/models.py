"""Size, FLOPs and speed of the zoo's networks, for 32x32 images.

    python benchmarks/models.py
    python benchmarks/models.py --json benchmarks/results/models_cpu.json
    python benchmarks/models.py --smoke               # one tiny network, seconds

Parameters are counted from shapes. FLOPs are XLA's own account (`cost_analysis`) of the
compiled forward pass of one image, traced as for an accelerator: a CPU's convolutions
are written as other operations. A multiply-add is two. Speed is that of one batch over
the median of the timed runs: a forward pass (`train=False`), and a training step of SGD
with momentum. Expected: 6 minutes on 2 idle CPU cores, most of it compilation.
"""

import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
from _common import compile_step, environment, make_arguments, make_batch, make_steps
from _record import markdown, options_of, write_json

from otmdr_jax import models

MODELS = (
    ("cnn_small", {}),
    ("resnet_10", {}),
    ("resnet_18", {}),
    ("resnet_18", {"stem": "imagenet"}),
    ("wide_resnet_28_10", {}),
    ("wide_resnet_34_10", {}),
    ("pyramidnet_101", {}),
    ("densenet_121", {}),
    ("densenet_121", {"stem": "cifar"}),
    ("mobilenet", {}),
    ("efficientnet_b0", {}),
    ("efficientnet_b0", {"stem": "imagenet"}),
)


def forward(model):
    return lambda *args: model.apply(*args, train=False)[0]


def forward_mflop(model, side):
    """XLA's count for one image, of the program with its own convolutions."""
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), images)
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        lowered = jax.jit(forward(model)).lower(params, state, images)
    return lowered.compile().cost_analysis()["flops"] / 1e6


def timed(run, rounds):
    """Seconds of each round, after one to warm up."""
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def speed(model, batch, rounds):
    """Images a second, forward and in a training step."""
    size = len(batch[1])
    params, state = model.init(jax.random.key(0), batch[0])
    compiled = jax.jit(forward(model)).lower(params, state, batch[0]).compile()
    passes = timed(
        lambda: jax.block_until_ready(compiled(params, state, batch[0])), rounds
    )
    step = make_steps(model)["SGD"]
    run, cost = compile_step(step.function, make_arguments(step, model, batch))
    steps = timed(run, rounds)
    return {
        "forward_images_per_second": size / statistics.median(passes),
        "step_images_per_second": size / statistics.median(steps),
        "n": rounds,
        **cost,
    }


def table(results):
    rows = [
        [
            name,
            *(f"{count:,}" for count in result["parameters"]),
            f"{result['forward_mflop']:,.0f}",
            f"{result['forward_images_per_second']:.3g}",
            f"{result['step_images_per_second']:.3g}",
            result["n"],
        ]
        for name, result in results.items()
    ]
    return markdown(
        [
            "model",
            "parameters, 10 classes",
            "100 classes",
            "MFLOP a forward pass",
            "images/s forward",
            "images/s, training step",
            "n",
        ],
        rows,
    )


def main():
    parser = options_of(__doc__, "cnn_small, 8 images of 8x8, once")
    add = parser.add_argument
    add("--batch-size", type=int, default=16)
    add("--rounds", type=int, default=5)
    add("--slow-rounds", type=int, default=3, help="of wide residual networks")
    options = parser.parse_args()
    which, side = MODELS, 32
    if options.smoke:
        which, side = MODELS[:1], 8
        options.batch_size, options.rounds = 8, 1

    batch = make_batch(options.batch_size, side)
    record = {
        "batch_size": options.batch_size,
        "image_size": side,
        "dtype": "float32",
        **environment(),
        "results": {},
    }
    for name, of_model in which:
        label = " ".join([name, *(f"{k}={v}" for k, v in of_model.items())])
        ten, hundred = (models.create(name, count, **of_model) for count in (10, 100))
        wide = name.startswith("wide")
        record["results"][label] = {
            "parameters": [
                models.parameter_count(model, (side, side, 3))
                for model in (ten, hundred)
            ],
            "forward_mflop": forward_mflop(ten, side),
            **speed(ten, batch, options.slow_rounds if wide else options.rounds),
        }
        print(f"{label}: {record['results'][label]}", flush=True)
        write_json(options.json, record)
    print(
        f"\nbatch {options.batch_size}, {side}x{side}, float32, {record['device']}, "
        f"{record['cores']} cores, JAX {record['jax']}; medians of n runs\n"
    )
    print(table(record["results"]))


if __name__ == "__main__":
    main()
