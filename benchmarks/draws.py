"""What drawn particles, and the dual form, cost beside the gradients that they take.

    python benchmarks/draws.py --json benchmarks/results/draws_cpu.json    # 3 minutes
    python benchmarks/draws.py --model cnn_small --batch-size 256 --rounds 41 --draws \
        --climbs 1 2 --json benchmarks/results/dual_cpu.json
    python benchmarks/draws.py --model resnet_18 --batch-size 128 --dtype bfloat16
    python benchmarks/draws.py --smoke

A step with K particles that are drawn from one gradient takes 1 + K gradients of the
batch; SAM takes 2, and the dual form with S ascent steps 1 + S. Each step is compiled,
then timed in turn, round after round, in one process. "x gradients" is the median over
rounds of its time beside that of as many SGD steps as it takes gradients, in the same
round: what exceeds 1 is what it does beside them. Memory is the compiler's account,
beside SAM's.
"""

import statistics

import jax.numpy as jnp
from _common import (
    compile_step,
    environment,
    make_arguments,
    make_batch,
    make_steps,
    measure,
)
from _record import markdown, options_of, write_json

from otmdr_jax import models


def table(results):
    """A line for each step."""
    sam = results["SAM"]["peak_mib"]
    rows = [
        [
            name,
            values["gradients"],
            f"{values['milliseconds']:.0f}",
            f"{values['ratio_to_its_gradients']:.3f}",
            f"{values['peak_mib']:.1f}",
            f"{values['peak_mib'] / sam:.3f}",
            f"{values['compile_seconds']:.1f}",
        ]
        for name, values in results.items()
    ]
    header = ["step", "gradients", "ms", "x gradients", "peak MiB", "x SAM"]
    return markdown([*header, "compile s"], rows)


def main():
    parser = options_of(__doc__, "a small network, two rounds")
    add = parser.add_argument
    add("--model", default="wide_resnet_16_2")
    add("--batch-size", type=int, default=32)
    add("--dtype", default="float32")
    add("--rounds", type=int, default=15)
    add("--draws", type=int, nargs="*", default=[1, 2, 4], help="numbers K")
    add("--climbs", type=int, nargs="*", default=[], help="steps S of the dual form")
    options = parser.parse_args()
    if options.smoke:
        options.model, options.rounds, options.draws = "cnn_small", 2, [1]
        options.climbs = [1]

    model = models.create(options.model, 10, dtype=jnp.dtype(options.dtype))
    batch = make_batch(options.batch_size)
    steps = make_steps(model, draws=options.draws, climbs=options.climbs)
    steps = {
        name: step
        for name, step in steps.items()
        if name in ("SGD", "SAM") or name.startswith(("draws", "dual"))
    }
    runs, results = {}, {}
    for name, step in steps.items():
        arguments = make_arguments(step, model, batch)
        runs[name], results[name] = compile_step(step.function, arguments)
    times = measure(runs, options.rounds)
    for name, mine in times.items():
        beside = zip(mine, times["SGD"], strict=True)
        results[name] |= {
            "gradients": steps[name].passes,
            "milliseconds": 1e3 * statistics.median(mine),
            "ratio_to_its_gradients": statistics.median(
                a / b / steps[name].passes for a, b in beside
            ),
            "n": len(mine),
        }
    print(
        f"{options.model}, batch {options.batch_size}, {options.dtype}; medians of "
        f"{options.rounds} rounds\n"
    )
    print(table(results))
    head = {key: vars(options)[key] for key in ("model", "batch_size", "dtype")}
    write_json(
        options.json, {**head, **environment(), "results": results, "seconds": times}
    )


if __name__ == "__main__":
    main()
