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

import argparse
import datetime
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import otmdr_jax
from otmdr_jax import methods, models

RHO = (0.05, 0.1)
REFERENCE = "SAM (optax.contrib)"


def make_steps(model, particles, map_particles):
    """Name -> (params, opt_state, model_state, batch, key) -> (params, opt, state)."""

    def loss_fn(params, batch, model_state):
        images, labels = batch
        logits, model_state = model.apply(params, model_state, images, train=True)
        return methods.cross_entropy(logits, labels), model_state

    base = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))

    def with_gradient(grad_fn, keyed):
        def step(params, opt_state, model_state, batch, key):
            kwargs = {"key": key} if keyed else {}
            (_, model_state), grads = grad_fn(params, batch, model_state, **kwargs)
            updates, opt_state = base.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, model_state

        return step, base

    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO[0]))
    theirs = optax.contrib.sam(base, ascent, opaque_mode=True)

    def optax_sam(params, opt_state, model_state, batch, key):
        del key
        (_, new_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch, model_state
        )
        updates, opt_state = theirs.update(
            grads,
            opt_state,
            params,
            grad_fn=lambda p, _: jax.grad(loss_fn, has_aux=True)(p, batch, model_state)[
                0
            ],
        )
        return optax.apply_updates(params, updates), opt_state, new_state

    def robust(rho=RHO, **options):
        return with_gradient(
            otmdr_jax.value_and_grad(loss_fn, rho, has_aux=True, **options), keyed=True
        )

    steps = {
        "SGD": with_gradient(jax.value_and_grad(loss_fn, has_aux=True), keyed=False),
        REFERENCE: (optax_sam, theirs),
        "SAM": robust(RHO[:1], split="shared"),
        "OT-MDR K=1": robust(),
    }
    for k in particles:
        maps = ("auto", "unroll", "scan", "vmap") if k in map_particles else ("auto",)
        for how in maps:
            steps[f"OT-MDR K={k} {how}"] = robust(num_particles=k, particle_map=how)
    return steps


def compile_step(step, optimizer, model, batch):
    """Compiles one step; returns how to run it, and what the program costs."""
    params, model_state = jax.jit(model.init)(jax.random.key(0), batch[0])
    arguments = (params, optimizer.init(params), model_state, batch, jax.random.key(1))
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    cost = {
        "compile_seconds": seconds,
        "peak_mib": (
            memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
        / 2**20,
        # XLA counts a loop's body once, so a scan's figure is that of one particle.
        "gflop": compiled.cost_analysis().get("flops", float("nan")) / 1e9,
    }
    state = list(arguments[:3])

    def run():
        state[:] = compiled(*state, *arguments[3:])
        jax.block_until_ready(state)

    return run, cost


def measure(runs, rounds, slow):
    """Interleaved times: every step once a round; the slow ones in the first two."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up
    for turn in range(rounds):
        for name, run in runs.items():
            if name in slow and turn >= 2:
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        print(f"round {turn + 1}/{rounds}", flush=True)
    return times


def table(results, times):
    reference = times[REFERENCE]
    memory = results[REFERENCE]["peak_mib"]
    rows = [
        "| step | ms | x SAM | compile s | peak MiB | x SAM | GFLOP | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, values in results.items():
        mine = times[name]
        ratios = [a / b for a, b in zip(mine, reference, strict=False)]
        values["milliseconds"] = 1e3 * statistics.median(mine)
        values["ratio_to_optax_sam"] = statistics.median(ratios)
        values["n"] = len(mine)
        rows.append(
            f"| {name} | {values['milliseconds']:.0f} "
            f"| {values['ratio_to_optax_sam']:.2f} | {values['compile_seconds']:.0f} "
            f"| {values['peak_mib']:.0f} | {values['peak_mib'] / memory:.2f} "
            f"| {values['gflop']:.1f} | {values['n']} |"
        )
    return "\n".join(rows)


def main():
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="wide_resnet_16_2" if cpu else "wide_resnet_28_10")
    add("--batch-size", type=int, default=32 if cpu else 128)
    add("--dtype", default="float32" if cpu else "bfloat16")
    add("--rounds", type=int, default=11 if cpu else 31)
    add("--particles", type=int, nargs="*", default=[2, 4])
    add("--map-particles", type=int, nargs="*", default=[2] if cpu else [2, 4])
    add("--json", help="also write everything to this file")
    options = parser.parse_args()

    model = models.create(options.model, 10, dtype=jnp.dtype(options.dtype))
    key = jax.random.key(2)
    images = jax.random.normal(key, (options.batch_size, 32, 32, 3))
    batch = (images, jnp.arange(options.batch_size) % 10)
    runs, results = {}, {}
    for name, (step, optimizer) in make_steps(
        model, options.particles, options.map_particles
    ).items():
        runs[name], results[name] = compile_step(step, optimizer, model, batch)
        print(
            f"compiled {name} in {results[name]['compile_seconds']:.1f} s", flush=True
        )
    # Convolutions in a scan or batched over kernels take minutes on CPUs.
    slow = {name for name in runs if cpu and name.endswith(("scan", "vmap"))}
    times = measure(runs, options.rounds, slow)
    device = jax.devices()[0].device_kind
    print(
        f"\n{options.model}, batch {options.batch_size}, {options.dtype}, {device}, "
        f"JAX {jax.__version__}, Optax {optax.__version__}; medians of n rounds\n"
    )
    print(table(results, times))
    if options.json:
        record = {
            "model": options.model,
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            "device": device,
            "machine": platform.machine(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "date": datetime.date.today().isoformat(),
            "results": results,
            "seconds": times,
        }
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
