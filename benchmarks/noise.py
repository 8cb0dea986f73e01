"""What the paper's noise costs: compilation, time and memory of a step with it.

    python benchmarks/noise.py --json benchmarks/results/noise_cpu.json      # 5 minutes
    python benchmarks/noise.py --networks wide_resnet_28_10 --batch-size 128
    python benchmarks/noise.py --smoke

Small leaves of the parameters are drawn together (`otmdr_jax.core.draws`); "leaf by
leaf" is the same step with a draw for each. Each step is compiled, then run in turn,
round after round, in one process. Seconds of compilation are those of processors, so
that other work on the machine counts less. "x" is the median over rounds of a step's
time beside that of the step without noise.
"""

import statistics
import time

import jax
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
from otmdr_jax.core import draws

STD, OURS = 0.01, "OT-MDR K=1"  # the paper's
NETWORKS = [("resnet_10", 0.125), ("densenet_21", 0.5), ("wide_resnet_16_2", 1.0)]
WAYS = {"no noise": None, "together": draws._MOST, "leaf by leaf": 0}


def of_network(name, width, batch_size, rounds):
    """{way: what its step costs}."""
    model = models.create(name, 10, **({} if width == 1 else {"width": width}))
    batch = make_batch(batch_size)
    runs, results = {}, {}
    for way, most in WAYS.items():
        step = make_steps(model, **({} if most is None else {"noise_std": STD}))[OURS]
        draws._MOST = WAYS["together"] if most is None else most
        arguments = make_arguments(step, model, batch)
        start = time.process_time()
        runs[way], results[way] = compile_step(step.function, arguments)
        results[way]["compile_seconds"] = time.process_time() - start
    draws._MOST = WAYS["together"]
    times = measure(runs, rounds)
    for way, mine in times.items():
        beside = zip(mine, times["no noise"], strict=True)
        results[way] |= {
            "milliseconds": statistics.median(mine) * 1e3,
            "x": statistics.median(a / b for a, b in beside),
            "n": len(mine),
        }
    params, _ = model.init(jax.random.key(0), batch[0][:1])
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return {"leaves": len(sizes), "weights": sum(sizes), "ways": results}


def table(networks):
    rows = [
        [
            name,
            found["leaves"],
            way,
            f"{one['compile_seconds']:.1f}",
            f"{one['milliseconds']:.0f}",
            f"{one['x']:.3f}",
            f"{one['peak_mib']:.1f}",
        ]
        for name, found in networks.items()
        for way, one in found["ways"].items()
    ]
    header = ["network", "leaves", "noise", "compile s", "ms", "x", "peak MiB"]
    return markdown(header, rows)


def main():
    parser = options_of(__doc__, "a small network, two rounds")
    add = parser.add_argument
    add("--networks", nargs="+", help="names of the zoo, at full width")
    add("--batch-size", type=int, default=32)
    add("--rounds", type=int, default=31)
    options = parser.parse_args()
    networks = NETWORKS
    if options.smoke:
        networks, options.rounds = [("cnn_small", 1.0)], 2
    if options.networks:
        networks = [(name, 1.0) for name in options.networks]
    jax.config.update("jax_enable_compilation_cache", False)  # its time is measured
    record = {"batch_size": options.batch_size, **environment(), "networks": {}}
    for name, width in networks:
        label = name if width == 1 else f"{name}, width {width:g}"
        record["networks"][label] = of_network(
            name, width, options.batch_size, options.rounds
        )
        write_json(options.json, record)
    print(table(record["networks"]))


if __name__ == "__main__":
    main()
