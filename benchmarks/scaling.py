"""What a step costs on many devices: collectives and weak scaling.

    python benchmarks/scaling.py                      # eight devices on this CPU
    python benchmarks/scaling.py --json scaling.json --rounds 15
    python benchmarks/scaling.py --smoke              # two devices, a tiny network

Two parts. The all-reduces of each compiled step, counted, with the bytes that each
device puts in, beside what the cost model says. Weak scaling: the same examples on each
of 1, 2, 4 and 8 devices. They share this machine's cores, so what can be kept is the
number of images a second; what is lost is the cost of dividing and reducing. Timed in
turn, in one process, medians over rounds. `compile_for.py` tells what programs for
8, 64 and 256 GPUs exchange.
Expected: about 8 minutes on 2 CPU cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import environment, make_batch, measure
from _program import summary
from _record import markdown, options_of, write_json

from otmdr_jax import models, parallel
from otmdr_jax.experiments import methods

# Mode -> (method, its options, all-reduces of a whole gradient a step by the model).
MODES = {
    "SGD": ("sgd", {}, 1),
    "SAM": ("sam", {}, 2),
    "SAM, per device": ("sam", {"sync_perturbation": False}, 1),
    "OT-MDR K=1": ("otmdr", {}, 3),
    "OT-MDR K=1, per device": ("otmdr", {"sync_perturbation": False}, 1),
    "OT-MDR K=2": ("otmdr", {"num_particles": 2}, 5),
    "OT-MDR K=2, per device": (
        "otmdr",
        {"num_particles": 2, "sync_perturbation": False},
        1,
    ),
    "OT-MDR K=2, particle axis": ("otmdr", {"num_particles": 2}, 3),
}


def make_step(name, model, mesh):
    """A training step on a mesh, and its arguments."""
    method, options, _ = MODES[name]
    axes = {"axis_name": "data"}
    if mesh is not None and "particle" in mesh.shape:
        axes["particle_axis_name"] = "particle"
    made = methods.create(
        method, model, optax.sgd(0.1, momentum=0.9), **options, **axes
    )
    return made.init, parallel.shard_map_step(made.step, mesh)


def mesh_of(name, devices):
    if "particle axis" in name:
        return parallel.make_mesh(f"data={max(devices // 2, 1)},particle=2")
    return parallel.make_mesh(f"data={devices}")


def count_collectives(model, batch, devices):
    rows = {}
    for name, (_, _, predicted) in MODES.items():
        mesh = mesh_of(name, devices)
        init, step = make_step(name, model, mesh)
        state = jax.eval_shape(init, jax.random.key(0), batch[0])
        gradient = sum(4 * x.size for x in jax.tree.leaves(state.params))
        found = summary(step.lower(state, batch).compile().as_text())
        reduces = found["kernels"]["all-reduce"]
        whole = found["exchanged_bytes"]["all-reduce"]
        rows[name] = {
            "all_reduces": reduces,
            "predicted": predicted,
            "bytes_over_gradient": whole / gradient,
        }
        print(f"{name}: {reduces} all-reduces, {whole / gradient:.2f} gradients")
    return rows


def weak_scaling(model, per_device, image_size, devices, names, rounds):
    """Images a second with the same examples on each device."""
    rows = {}
    for name in names:
        runs = {}
        for count in devices:
            mesh = mesh_of(name, count)
            init, step = make_step(name, model, mesh)
            batch = make_batch(per_device * count, image_size)
            place = parallel.place(batch, mesh, jax.sharding.PartitionSpec("data"))
            state = [jax.jit(init)(jax.random.key(0), batch[0])]

            def run(times=1, state=state, step=step, batch=place):
                for _ in range(times):
                    state[0], _ = step(state[0], batch)
                jax.block_until_ready(state[0])

            runs[count] = run
        times = measure(runs, rounds)
        base = np.asarray(times[devices[0]]) / devices[0]
        rows[name] = {
            str(count): {
                "milliseconds": 1e3 * float(np.median(times[count])),
                "relative_throughput": float(
                    np.median(base / (np.asarray(times[count]) / count))
                ),
                "n": rounds,
            }
            for count in devices
        }
        print(f"weak scaling of {name}: {rows[name]}", flush=True)
    return rows


def tables(record):
    """The two tables of docs/scaling.md."""
    found = record["collectives"]
    first = markdown(
        ["step", "all-reduces", "by the model", "bytes / gradient"],
        [
            [n, r["all_reduces"], r["predicted"], f"{r['bytes_over_gradient']:.2f}"]
            for n, r in found.items()
        ],
    )
    scaling = record["weak_scaling"]
    counts = list(next(iter(scaling.values())))
    second = markdown(
        ["images a second, relative to one device", *counts],
        [
            [n, *(f"{r[c]['relative_throughput']:.2f}" for c in counts)]
            for n, r in scaling.items()
        ],
    )
    return first, second


def main():
    parser = options_of(__doc__, "two devices, a tiny network")
    add = parser.add_argument
    add("--model", default="wide_resnet_10_1")
    add("--per-device", type=int, default=8, help="examples on each device")
    add("--image-size", type=int, default=32)
    add("--rounds", type=int, default=11)
    options = parser.parse_args()
    devices = [1, 2, 4, 8]
    jax.config.update("jax_num_cpu_devices", devices[-1])
    if options.smoke:
        options.model, options.image_size, options.rounds = "cnn_small", 8, 2
        devices = [1, 2]
    model = models.create(options.model, 10, dtype=jnp.float32)
    most = devices[-1]
    batch = make_batch(options.per_device * most, options.image_size)
    record = {
        **environment(),
        "model": options.model,
        "per_device": options.per_device,
        "devices": devices,
    }
    record["collectives"] = count_collectives(model, batch, most)
    write_json(options.json, record)
    record["weak_scaling"] = weak_scaling(
        model,
        options.per_device,
        options.image_size,
        devices,
        ["SGD", "OT-MDR K=1", "OT-MDR K=1, per device"],
        options.rounds,
    )
    write_json(options.json, record)
    print("\n\n".join(("", *tables(record))))


if __name__ == "__main__":
    main()
