"""What a step costs on many devices: collectives, weak scaling, a model of the rest.

    python benchmarks/scaling.py                      # eight devices on this CPU
    python benchmarks/scaling.py --json scaling.json --rounds 15
    python benchmarks/scaling.py --smoke              # two devices, a tiny network

Three parts. The all-reduces of each compiled step, counted, with the bytes that each
device puts in, beside what the cost model says. Weak scaling: the same examples on each
of 1, 2, 4 and 8 devices. They share this machine's cores, so what can be kept is the
number of images a second; what is lost is the cost of dividing and reducing. Timed in
turn, in one process, medians over rounds. And, by the cost model, the share of a step
that 8 and 256 GPUs would spend on all-reduces that hide behind nothing, for
assumptions that are printed: it is arithmetic, not a measurement.
Expected: about 8 minutes on 2 CPU cores.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import environment, make_batch, measure
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
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}

# Assumptions of the prediction. Peak: H100 SXM, dense bfloat16, by its data sheet. The
# rest are round figures to be replaced by your own: utilisation, and the bandwidth
# that an all-reduce reaches a GPU (NVLink within a node of 8, InfiniBand between).
PEAK_FLOPS, UTILISATION = 989e12, 0.45
BANDWIDTH = {8: 400e9, 256: 45e9}
FORWARD_FLOPS = 2 * 5.25e9  # WRN-28-10, an image of 32 x 32: 5.25 G multiply-adds
PARAMETERS = 36_479_194


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


def collectives(compiled):
    """All-reduces of a program: how many, and the bytes that a device puts in."""
    count = total = 0
    for line in compiled.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?\S+ = (.*?) all-reduce(?:-start)?\(", line)
        if not match:
            continue
        count += 1
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
            size = np.prod([int(n) for n in shape.split(",") if n], initial=1)
            total += int(size) * BYTES[dtype]
    return count, total


def count_collectives(model, batch, devices):
    rows = {}
    for name, (_, _, predicted) in MODES.items():
        mesh = mesh_of(name, devices)
        init, step = make_step(name, model, mesh)
        state = jax.eval_shape(init, jax.random.key(0), batch[0])
        gradient = sum(4 * x.size for x in jax.tree.leaves(state.params))
        found, moved = collectives(step.lower(state, batch).compile())
        rows[name] = {
            "all_reduces": found,
            "predicted": predicted,
            "bytes_over_gradient": moved / gradient,
        }
        print(f"{name}: {found} all-reduces, {moved / gradient:.2f} gradients")
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


def predict(per_device=128):
    """Share of a step spent on all-reduces, if none of them is hidden."""
    rows = {}
    passes = {"SGD": 1, "SAM": 2, "OT-MDR K=1": 2, "OT-MDR K=2": 4}
    for name, (_, _, reduces) in MODES.items():
        if "axis" in name:
            continue
        compute = (3 * FORWARD_FLOPS * per_device * passes[name.split(",")[0]]) / (
            PEAK_FLOPS * UTILISATION
        )
        rows[name] = {"compute_ms": 1e3 * compute}
        for gpus, bandwidth in BANDWIDTH.items():
            moved = reduces * 4 * PARAMETERS * 2 * (gpus - 1) / gpus
            seconds = moved / bandwidth
            rows[name][f"all_reduce_ms_{gpus}"] = 1e3 * seconds
            rows[name][f"efficiency_{gpus}"] = compute / (compute + seconds)
    return rows


def tables(record):
    """The three tables of docs/scaling.md."""
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
    third = markdown(
        ["step", "compute, ms", "8 GPUs: all-reduce, ms", "efficiency",
         "256 GPUs: all-reduce, ms", "efficiency"],
        [
            [n, f"{r['compute_ms']:.0f}", f"{r['all_reduce_ms_8']:.1f}",
             f"{r['efficiency_8']:.2f}", f"{r['all_reduce_ms_256']:.0f}",
             f"{r['efficiency_256']:.2f}"]
            for n, r in record["prediction"].items()
        ],
    )  # fmt: skip
    return first, second, third


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
        "assumptions": {
            "peak_flops": PEAK_FLOPS,
            "utilisation": UTILISATION,
            "bandwidth": BANDWIDTH,
            "batch_per_gpu": 128,
        },
        "prediction": predict(),
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
