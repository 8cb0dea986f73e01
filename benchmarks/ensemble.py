"""Steps of ensembles by number of members and map, against separate compiled steps.

    python benchmarks/ensemble.py                     # WRN-10-2, batch 32: a CPU
    python benchmarks/ensemble.py --model resnet_10 --batch-size 128 --dtype bfloat16
    python benchmarks/ensemble.py --smoke

Members share a batch; each has its own parameters, split, optimizer state, statistics.
"separate" is the compiled step of one member, run once for each of them: what training
the members one after the other costs. Programs are compiled first and then run in turn,
round after round, in one process; ratios are medians over rounds of the ratio to
"separate" in the same round. Memory is the compiled program's own account; that of
"separate" holds one member at a time.
Expected: 5 minutes on 2 CPU cores.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax
from _common import environment, make_batch, peak_mib
from _record import markdown, options_of, write_json

from otmdr_jax import models
from otmdr_jax.experiments import members, methods

MAPS = ("vmap", "unroll", "scan")


def compile_method(method, batch, times=1):
    """`run()`, which takes the step `times` times and waits, and what it costs."""
    state = jax.jit(method.init)(jax.random.key(0), batch[0])
    start = time.perf_counter()
    compiled = jax.jit(method.step, donate_argnums=0).lower(state, batch).compile()
    cost = {
        "compile_seconds": time.perf_counter() - start,
        "peak_mib": peak_mib(compiled),
    }
    held = [state]

    def run():
        for _ in range(times):
            held[0], metrics = compiled(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return run, cost


def measure(runs, rounds):
    """Interleaved seconds: wall-clock and of the processor."""
    seconds = {name: ([], []) for name in runs}
    for run in runs.values():
        run()
    for turn in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            seconds[name][0].append(time.perf_counter() - start[0])
            seconds[name][1].append(time.process_time() - start[1])
        print(f"round {turn + 1}/{rounds}", flush=True)
    return seconds


def measure_members(one, count, batch, rounds, maps):
    """One number of members: name -> numbers."""
    runs, results = {}, {}
    runs["separate"], results["separate"] = compile_method(one, batch, count)
    for how in maps if count > 1 else ():
        runs[how], results[how] = compile_method(members.lift(one, count, how), batch)
        print(
            f"{count} members, {how}: compiled in "
            f"{results[how]['compile_seconds']:.1f} s",
            flush=True,
        )
    for name, (wall, processor) in (times := measure(runs, rounds)).items():
        results[name] |= {"milliseconds": 1e3 * statistics.median(wall), "n": rounds}
        for key, mine, theirs in (
            ("ratio_to_separate", wall, times["separate"][0]),
            ("processor_ratio", processor, times["separate"][1]),
        ):
            pairs = zip(mine, theirs, strict=True)
            results[name][key] = statistics.median(a / b for a, b in pairs)
    return results


def table(record):
    """The table of the page on ensembles."""
    single = record["results"]["1"]["separate"]["compile_seconds"]
    rows = []
    for count, results in record["results"].items():
        for name, x in results.items():
            # That of one model serves all members that are separate.
            compiled = name != "separate" or count == "1"
            compile_seconds = x["compile_seconds"]
            rows.append(
                [
                    count,
                    "one model" if count == "1" else name,
                    f"{x['milliseconds']:.0f}",
                    f"{x['ratio_to_separate']:.2f}",
                    f"{x['processor_ratio']:.2f}",
                    f"{x['peak_mib']:.0f}",
                    f"{compile_seconds:.1f}" if compiled else "",
                    f"{compile_seconds / single:.2f}" if compiled else "",
                    str(x["n"]),
                ]
            )
    titles = ["M", "map", "ms a step", "x separate", "by processor time", "peak MiB"]
    return markdown([*titles, "compile s", "x one model", "n"], rows)


def main():
    parser = options_of(__doc__, "a tiny network, two members, one round")
    add = parser.add_argument
    add("--model", default="wide_resnet_10_2")
    add("--method", default="otmdr", choices=["sgd", "sam", "otmdr"])
    add("--batch-size", type=int, default=32)
    add("--image-size", type=int, default=32)
    add("--dtype", default="float32")
    add("--members", type=int, nargs="*", default=[2, 5], help="M beside 1")
    add("--maps", nargs="*", default=list(MAPS), choices=MAPS)
    add("--rounds", type=int, default=11)
    options = parser.parse_args()
    if options.smoke:
        options.model, options.image_size, options.batch_size = "cnn_small", 8, 8
        options.members, options.rounds = [2], 1

    model = models.create(options.model, 10, dtype=jnp.dtype(options.dtype))
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)
    )
    one = methods.create(options.method, model, optimizer)
    batch = make_batch(options.batch_size, options.image_size)
    record = {
        **{k: getattr(options, k) for k in ("model", "method", "batch_size", "dtype")},
        **environment(),
        "results": {},
    }
    for count in (1, *options.members):
        record["results"][str(count)] = measure_members(
            one, count, batch, options.rounds, options.maps
        )
        write_json(options.json, record)
    print(
        f"\n{options.model}, {options.method}, batch {options.batch_size}, "
        f"{options.dtype}, {record['device']}, JAX {record['jax']}\n"
    )
    print(table(record))


if __name__ == "__main__":
    main()
