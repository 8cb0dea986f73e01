"""Peak memory of a compiled training step: recomputation, micro-batches, particle maps.

    python benchmarks/memory.py                       # WRN-10-2, batch 64
    python benchmarks/memory.py --json memory.json --particles 4
    python benchmarks/memory.py --smoke               # a tiny network

Nothing is run: memory is the compiled program's own account, temporaries + arguments +
outputs - aliases. On a CPU the programs are traced as for an accelerator (with its
loops and convolutions) and compiled without what accelerators do not have: the pass
that removes barriers and so undoes recomputation (see `models.create`), and YNNPACK's
reductions, which keep constants of the size of the parameters.
Expected: 10 to 20 minutes on 2 CPU cores, all compilation; `--particles 2` takes half.
"""

from unittest import mock

import jax
from _common import compile_step, environment, make_arguments, make_batch, make_steps
from _record import markdown, options_of, write_json

from otmdr_jax import models

# A column -> (options of the model, options of the robust gradient).
VARIANTS = {
    "plain": ({}, {}),
    "remat": ({"remat": True}, {}),
    "micro-batches of 16": ({}, {"microbatch_size": 16}),
    "both": ({"remat": True}, {"microbatch_size": 16}),
}
AS_ACCELERATORS = {
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_cpu_experimental_ynn_fusion_type": "",
}


def table(results):
    columns = list(results)
    rows = []
    for name in results[columns[0]]:
        cells = [results[column].get(name, {}).get("peak_mib") for column in columns]
        rows.append([name, *("-" if x is None else f"{x:.1f}" for x in cells)])
    return markdown(["step", *(f"{column}, MiB" for column in columns)], rows)


def main():
    parser = options_of(__doc__, "a tiny network and K = 1")
    add = parser.add_argument
    add("--model", default="wide_resnet_10_2")
    add("--batch-size", type=int, default=64)
    add("--image-size", type=int, default=32)
    add("--dtype", default="float32")
    add("--particles", type=int, nargs="*", default=[2, 4], help="K beside 1")
    add("--maps", nargs="*", default=["unroll", "scan", "vmap"])
    add("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    if options.smoke:
        options.model, options.batch_size, options.image_size = "cnn_small", 8, 8
        options.particles = []

    particles = [(k, how) for k in options.particles for how in options.maps]
    flags = AS_ACCELERATORS if jax.default_backend() == "cpu" else None
    batch = make_batch(options.batch_size, options.image_size)
    record = {
        "model": options.model,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "compiler_options": flags,
        **environment(),
        "results": {column: {} for column in options.variants},
    }
    for column in options.variants:
        of_model, of_gradient = VARIANTS[column]
        model = models.create(options.model, 10, dtype=options.dtype, **of_model)
        for name, step in make_steps(model, particles, **of_gradient).items():
            shapes = jax.eval_shape(lambda s=step, m=model: make_arguments(s, m, batch))
            with mock.patch.object(jax, "default_backend", lambda: "gpu"):
                _, cost = compile_step(step.function, shapes, flags)
            record["results"][column][name] = cost
            print(
                f"{column}: {name} takes {cost['peak_mib']:.1f} MiB; "
                f"compiled in {cost['compile_seconds']:.1f} s",
                flush=True,
            )
            write_json(options.json, record)
    print(
        f"\n{options.model}, batch {options.batch_size}, {options.dtype}, "
        f"{record['device']}, JAX {record['jax']}\n"
    )
    print(table(record["results"]))


if __name__ == "__main__":
    main()
