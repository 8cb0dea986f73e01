"""Times a training step: SGD, SAM (Optax's and ours), OT-MDR by K and particle map.

    python benchmarks/step_time.py                    # WRN-16-2, batch 32 on CPU;
                                                      # WRN-28-10, batch 128 elsewhere
    python benchmarks/step_time.py --json step_time.json --rounds 21

All steps are compiled first and then timed in turn, round after round, in one process:
a machine that slows down slows all of them down. What is reported is the median over
rounds and the median of the ratio to `optax.contrib.sam` in the same round. Memory is
the compiled program's own account: temporaries + arguments + outputs - aliases.
Expected: about 8 minutes on 2 CPU cores; see docs/performance.md for the table.
"""

import jax
import jax.numpy as jnp
from _common import (
    REFERENCE,
    compile_step,
    environment,
    make_arguments,
    make_batch,
    make_steps,
    measure,
    summarise,
)
from _record import markdown, options_of, write_json

from otmdr_jax import models


def table(results):
    memory = results[REFERENCE]["peak_mib"]
    rows = [
        [
            name,
            f"{values['milliseconds']:.0f}",
            f"{values['ratio_to_optax_sam']:.2f}",
            f"{values['compile_seconds']:.0f}",
            f"{values['peak_mib']:.0f}",
            f"{values['peak_mib'] / memory:.2f}",
            f"{values['gflop']:.1f}",
            values["n"],
        ]
        for name, values in results.items()
    ]
    header = ["step", "ms", "x SAM", "compile s", "peak MiB", "x SAM", "GFLOP", "n"]
    return markdown(header, rows)


def main():
    cpu = jax.default_backend() == "cpu"
    parser = options_of(__doc__)
    add = parser.add_argument
    add("--model", default="wide_resnet_16_2" if cpu else "wide_resnet_28_10")
    add("--batch-size", type=int, default=32 if cpu else 128)
    add("--dtype", default="float32" if cpu else "bfloat16")
    add("--rounds", type=int, default=11 if cpu else 31)
    add("--particles", type=int, nargs="*", default=[2, 4])
    add("--map-particles", type=int, nargs="*", default=[2] if cpu else [2, 4])
    options = parser.parse_args()

    model = models.create(options.model, 10, dtype=jnp.dtype(options.dtype))
    batch = make_batch(options.batch_size)
    maps = ("auto", "unroll", "scan", "vmap")
    particles = [
        (k, how)
        for k in options.particles
        for how in (maps if k in options.map_particles else maps[:1])
    ]
    runs, results = {}, {}
    for name, step in make_steps(model, particles).items():
        arguments = make_arguments(step, model, batch)
        runs[name], results[name] = compile_step(step.function, arguments)
        print(
            f"compiled {name} in {results[name]['compile_seconds']:.1f} s", flush=True
        )
    times = measure(runs, options.rounds, progress=True)
    for name, values in summarise(times).items():
        results[name].update(values)
    record = {
        "model": options.model,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        **environment(),
        "results": results,
        "seconds": times,
    }
    print(
        f"\n{options.model}, batch {options.batch_size}, {options.dtype}, "
        f"{record['device']}, JAX {record['jax']}, Optax {record['optax']}; "
        "medians of n rounds\n"
    )
    print(table(results))
    write_json(options.json, record)


if __name__ == "__main__":
    main()
