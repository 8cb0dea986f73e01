"""Time and memory of a loss landscape, and of the Hessian, around one network.

    python benchmarks/landscape.py                   # 51 x 51 points, 1,000 digits
    python benchmarks/landscape.py --smoke           # 3 x 3 points, 40 digits

The grid is measured as `otmdr landscape` measures it on CPUs, point by point, and a
line of it with several points at once too; what compilation takes is in the seconds of
a first line. Times are the best of n. The peak is the compiled program's own account of
a call. The Hessian's costs are in gradients of the whole set: of one product with a
vector, and of all that the eigenvalues and the trace take.
Expected: 2 minutes on 2 CPU cores.
"""

import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from _common import environment, peak_mib
from _record import markdown, options_of, write_json

from otmdr_jax import data, landscape, models
from otmdr_jax.experiments.programs import loss_sum

AT_ONCE = (1, 4)


def make_problem(name, count):
    """A network at its start, its loss, and the digits on the device."""
    digits = data.load("digits")
    model = models.create(name, digits.num_classes)
    images = jnp.asarray(digits.train.images[:count])
    labels = jnp.asarray(digits.train.labels[:count])
    params, state = model.init(jax.random.key(0), images[:1])
    batches = [(images, labels, jnp.ones(count), state)]
    return params, loss_sum(model, digits.mean, digits.std), batches


def seconds(function, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return {
        "seconds": min(times),
        "median_seconds": statistics.median(times),
        "n": rounds,
    }


def measure_grid(problem, points, rounds, at_once, whole):
    """A line of the grid, and where it is asked for the whole of it."""
    params, function, batches = problem
    directions = [
        landscape.random_direction(params, jax.random.key(i)) for i in range(2)
    ]
    axis = np.linspace(-1, 1, points)

    def grid(lines):
        return landscape.loss_grid(
            function,
            params,
            batches,
            directions,
            [axis[:lines], axis],
            at_once=at_once,
            report=lambda losses: None,
        )

    start = time.perf_counter()
    grid(1)
    first = time.perf_counter() - start

    def at(c, batch):
        moved = jax.tree.map(
            lambda w, x, y: w + c[0] * x + c[1] * y, params, *directions
        )
        return function(moved, batch)

    block = jnp.zeros((at_once, 2))
    call = at if at_once == 1 else jax.vmap(at, in_axes=(0, None))
    program = jax.jit(call).lower(block[0] if at_once == 1 else block, batches[0])
    result = {
        "first_line_seconds": first,
        "line": seconds(lambda: grid(1), rounds),
        "peak_mib": peak_mib(program.compile()),
    }
    if whole:
        result["grid"] = seconds(lambda: grid(points), rounds)
    return result


def measure_hessian(problem, rounds, probes):
    """Seconds, and gradients of the whole set that take as long."""
    params, function, batches = problem
    count = len(batches[0][0])

    def mean(p):
        return function(p, batches[0])[0] / count

    gradient = jax.jit(jax.grad(mean))
    vector = gradient(params)
    key = jax.random.key(0)
    jobs = {
        "gradient": lambda: jax.block_until_ready(gradient(params)),
        "product": lambda: jax.block_until_ready(
            landscape.hessian_product(function, params, batches, vector)
        ),
        "largest eigenvalue": lambda: landscape.hessian_eigenvalues(
            function, params, batches
        ),
        f"trace, {probes} probes": lambda: landscape.hessian_trace(
            function, params, batches, key=key, num_probes=probes
        ),
    }
    results = {}
    for name, job in jobs.items():
        job()
        results[name] = seconds(job, rounds)
        results[name]["gradients"] = (
            results[name]["seconds"] / results["gradient"]["seconds"]
        )
    return results


def main():
    parser = options_of(__doc__, "3 x 3 points, 40 digits, one round")
    add = parser.add_argument
    add("--model", default="cnn_small")
    add("--points", type=int, default=51)
    add("--examples", type=int, default=1_000)
    add("--probes", type=int, default=100)
    add("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.smoke:
        options.points, options.examples, options.rounds = 3, 40, 1
        options.probes = 2

    problem = make_problem(options.model, options.examples)
    record = {
        "model": options.model,
        "points": options.points,
        "examples": options.examples,
        **environment(),
        "load": os.getloadavg()[0],
        "grid": {},
    }
    for at_once in AT_ONCE:
        record["grid"][str(at_once)] = measure_grid(
            problem, options.points, options.rounds, at_once, whole=at_once == 1
        )
        write_json(options.json, record)
    record["hessian"] = measure_hessian(problem, options.rounds, options.probes)
    write_json(options.json, record)

    size = f"{options.points} x {options.points} points"
    print(f"{options.model}, {size}, {options.examples:,} digits\n")
    rows = []
    for name, found in record["grid"].items():
        each = 1e3 * found["line"]["seconds"] / options.points
        whole = f"{found['grid']['seconds']:.1f}" if "grid" in found else "-"
        rows.append([name, f"{each:.2f}", whole, f"{found['peak_mib']:.1f}"])
    header = ["points at once", "a point, ms", "the grid, s", "peak, MiB"]
    print(markdown(header, rows))
    rows = [
        [name, f"{x['seconds']:.3f}", f"{x['gradients']:.1f}"]
        for name, x in record["hessian"].items()
    ]
    print(markdown(["Hessian", "best of n, s", "gradients"], rows))


if __name__ == "__main__":
    main()
