"""What dropout costs: steps of networks with it and without, and MC predictions.

    python benchmarks/dropout.py --json benchmarks/results/dropout_cpu.json
    python benchmarks/dropout.py --smoke

Each round takes every step once, so that all see the same load. Expected: two minutes
on 2 CPU cores.
"""

import jax
import optax
from _common import compile_step, environment, make_batch, measure, summarise
from _record import markdown, options_of, write_json

from otmdr_jax import models
from otmdr_jax.experiments import methods

MODELS = ("cnn_small", "wide_resnet_16_2")
RATE, SAMPLES = 0.1, 10
PLAIN, DROPS = "step", "step with dropout"
ONE, MANY = "prediction", f"prediction of {SAMPLES} samples"


def calls_of(name, batch):
    """Name -> `run(times)`: a step without and with dropout, and predictions."""
    images = batch[0]
    calls = {}
    for kind, rate in ((PLAIN, 0.0), (DROPS, RATE)):
        model = models.create(name, 10, dropout=rate)
        method = methods.create("sgd", model, optax.sgd(0.01))
        state = method.init(jax.random.key(0), images)

        def step(state, unused, also_unused, batch, key, method=method):
            return method.step(state, batch)[0], unused, also_unused

        calls[kind], _ = compile_step(step, (state, (), (), batch, ()))
    state = method.init(jax.random.key(0), images)
    sampling = methods.create("mc-dropout", model, optax.sgd(0.01), num_samples=SAMPLES)
    for kind, predict in ((ONE, method.predict), (MANY, sampling.predict)):
        compiled = jax.jit(predict).lower(state, images).compile()

        def run(times=1, compiled=compiled):
            for _ in range(times):
                jax.block_until_ready(compiled(state, images))

        calls[kind] = run
    return calls


def table(results):
    rows = [
        [
            f"`{name}`",
            f"{found[PLAIN]['milliseconds']:.0f}",
            f"{found[DROPS]['milliseconds']:.0f}",
            f"{found[DROPS]['ratio']:.2f}",
            f"{found[MANY]['milliseconds'] / found[ONE]['milliseconds']:.1f}",
        ]
        for name, found in results.items()
    ]
    return markdown(
        [
            "", "ms a step", f"with dropout {RATE}", "times",
            f"{SAMPLES} samples, in predictions",
        ],
        rows,
    )  # fmt: skip


def main():
    parser = options_of(__doc__, "the smallest run that does everything")
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS)
    add("--batch-size", type=int, default=16)
    add("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.smoke:
        args.models, args.batch_size, args.rounds = ["cnn_small"], 4, 2
    batch = make_batch(args.batch_size)
    results = {}
    for name in args.models:
        times = measure(calls_of(name, batch), args.rounds)
        results[name] = summarise(times, reference=PLAIN, ratio="ratio")
        print(name, {k: round(v["milliseconds"], 1) for k, v in results[name].items()})
    print(table(results))
    options = {"batch_size": args.batch_size, "rate": RATE, "samples": SAMPLES}
    write_json(
        args.json,
        {"environment": environment(), "options": options, "results": results},
    )


if __name__ == "__main__":
    main()
