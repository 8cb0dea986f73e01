"""A training step of every method: time and memory beside the plain gradient's.

    python benchmarks/methods.py                      # WRN-16-2, batch 32: 10 minutes
    python benchmarks/methods.py --model resnet_18 --batch-size 128 --dtype bfloat16
    python benchmarks/methods.py --smoke

Each method has its defaults of `otmdr train`. Its step is the run's own: it gathers,
augments and normalises a batch of the images on the device, differentiates, updates.
Programs are compiled first; then each takes --steps steps, in turn, round after round,
in one process. The ratio is the median over rounds of the ratio to SGD in the same
round. Gradients are those that the method has by its definition, of whole batches, so
that a ratio above them is what else it does. Memory is the compiler's own account.
"""

import statistics
import time

import jax
import numpy as np
from _common import environment, measure
from _record import markdown, options_of, write_json

from otmdr_jax.data import Dataset, Split
from otmdr_jax.experiments import methods, programs
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import cost

EXAMPLES = 1024


def make_dataset(size):
    """Random pixels of CIFAR's shape: what a step costs does not depend on them."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, size, size, 3), dtype=np.uint8)
    split = Split(images, np.arange(EXAMPLES, dtype=np.int32) % 10)
    return Dataset(
        "random", split, None, split, 10, (0.5,) * 3, (0.25,) * 3, ("crop", "flip")
    )


def compile_method(config, dataset):
    """`run(times)`, which takes as many steps, and what the program costs."""
    compiled = programs.compile_programs(config, dataset)
    state_key, data_key = programs.run_keys(0)
    state, order = compiled.init(state_key), compiled.epoch_order(data_key)
    examples = jax.device_put(tuple(dataset.train))
    start = time.perf_counter()
    held = [compiled.train_step(state, examples, order, np.int32(0))[0]]
    jax.block_until_ready(held)
    result = {
        "first_step_seconds": time.perf_counter() - start,
        "peak_mib": programs.step_memory_mib(compiled, dataset),
        "gradients": cost.gradient_evaluations(config),
    }

    def run(times=1):
        for i in range(times):
            at = np.int32(i % compiled.steps_per_epoch)
            held[0] = compiled.train_step(held[0], examples, order, at)[0]
        jax.block_until_ready(held)

    return run, result


def table(record):
    rows = []
    base = record["results"]["sgd"]
    for name, x in record["results"].items():
        cells = [f"{x['gradients']:g}", f"{x['ratio_to_sgd']:.2f}"]
        cells += [f"{x['peak_mib']:.0f}", f"{x['peak_mib'] / base['peak_mib']:.2f}"]
        rows.append([f"`{name}`", *cells, f"{x['first_step_seconds']:.0f}", x["n"]])
    titles = ["method", "gradients", "x SGD's time", "peak MiB", "x SGD's memory"]
    return markdown([*titles, "first step, s", "n"], rows)


def main():
    parser = options_of(__doc__, "a tiny network, three methods")
    add = parser.add_argument
    add("--model", default="wide_resnet_16_2")
    add("--batch-size", type=int, default=32)
    add("--image-size", type=int, default=32)
    add("--dtype", default="float32")
    add("--methods", nargs="*", default=list(methods.METHODS))
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=5, help="a round; LookSAM climbs every fifth")
    options = parser.parse_args()
    if options.smoke:
        options.model, options.image_size, options.batch_size = "cnn_small", 8, 8
        options.methods, options.rounds = ["sgd", "sam", "swag"], 1

    dataset = make_dataset(options.image_size)
    names = ("model", "batch_size", "dtype", "steps")
    record = {**{k: getattr(options, k) for k in names}, **environment()}
    runs, record["results"] = {}, {}
    for name in options.methods:
        config = TrainConfig(
            method=name,
            model=options.model,
            batch_size=options.batch_size,
            dtype=options.dtype,
            mesh="data=1",
        )
        runs[name], record["results"][name] = compile_method(config, dataset)
        seconds = record["results"][name]["first_step_seconds"]
        print(f"{name}: first step after {seconds:.1f} s", flush=True)
    times = measure(runs, options.rounds, options.steps, progress=True)
    for name, mine in times.items():
        pairs = zip(mine, times["sgd"], strict=True)
        record["results"][name] |= {
            "milliseconds": 1e3 * statistics.median(mine),
            "ratio_to_sgd": statistics.median(a / b for a, b in pairs),
            "n": len(mine),
        }
    write_json(options.json, record)
    print(
        f"\n{options.model}, batch {options.batch_size}, {options.dtype}, "
        f"{record['device']}, JAX {record['jax']}\n"
    )
    print(table(record))


if __name__ == "__main__":
    main()
