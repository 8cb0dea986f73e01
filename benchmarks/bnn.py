"""Bayesian networks: a step of SGVB and OT-MDR-BNN, its memory, variance of gradients.

    python benchmarks/bnn.py                      # WRN-16-2, batch 32 on CPU
    python benchmarks/bnn.py --model resnet_10 --json bnn.json
    python benchmarks/bnn.py --smoke              # a tiny network

Steps are compiled first and timed in turn, round after round, in one process; what
counts is the median ratio to SGVB in the same round. By the count of gradients it is
2.5 for the paper's version with K = 1, 2 where the gradient of sigma takes no pass of
its own, and 2 more for each further particle. Memory is the compiled program's own
account, on CPUs of programs traced and compiled as in memory.py. The variance is that
of the gradient of the likelihood by the means, over draws of the weight noise alone,
at a posterior that was trained on digits.
Expected: 15 minutes on 2 CPU cores.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import Step, compile_step, environment, make_batch, measure, summarise
from _record import markdown, options_of, write_json
from bnn_digits import BASE
from memory import AS_ACCELERATORS

from otmdr_jax import bnn, data, models
from otmdr_jax.experiments import methods, training

REFERENCE = "SGVB"
VERSIONS = {
    "OT-MDR-BNN, sigma at the center": ({}, 2.5),
    "OT-MDR-BNN, sigma at the center, first part": (
        {"sigma_gradient": "center_first"},
        2.0,
    ),
    "OT-MDR-BNN, sigma at the particle": ({"sigma_gradient": "particle"}, 2.0),
    "OT-MDR-BNN, sigma at the center, K = 2": ({"num_particles": 2}, 4.5),
}
BATCHES = (32, 128, 512)


def make_steps(model, num_data=50_000):
    """Name -> (step, gradients of single examples over those of SGVB)."""
    optimizer = optax.adam(1e-3)

    def loss_fn(params, batch, model_state):
        images, labels = batch
        logits, model_state = model.apply(params, model_state, images, train=True)
        return methods.cross_entropy(logits, labels), model_state

    def with_gradient(grad_fn):
        def step(q, opt_state, model_state, batch, key):
            (_, model_state), grads = grad_fn(q, batch, model_state, key=key)
            updates, opt_state = optimizer.update(grads, opt_state, q)
            return optax.apply_updates(q, updates), opt_state, model_state

        return step

    common = dict(num_data=num_data, has_aux=True)
    sgvb = functools.partial(bnn.sgvb, loss_fn, **common)
    steps = {REFERENCE: (with_gradient(sgvb()), 1.0)}
    for name, (options, gradients) in VERSIONS.items():
        grad_fn = bnn.value_and_grad(loss_fn, **common, **options)
        steps[name] = (with_gradient(grad_fn), gradients)
    for estimator in ("local", "flipout"):
        step = with_gradient(sgvb(estimator=estimator))
        steps[f"SGVB, {estimator}"] = (step, 2.0)
    return {
        name: (Step(function, optimizer, gradients), gradients)
        for name, (function, gradients) in steps.items()
    }


def make_arguments(step, model, batch):
    params, model_state = model.init(jax.random.key(0), batch[0])
    q = bnn.init(params)
    return q, step.optimizer.init(q), model_state, batch, jax.random.key(1)


def peak_memory(step, model, batch):
    """MiB of the step's program, traced as for an accelerator."""
    shapes = jax.eval_shape(lambda: make_arguments(step, model, batch))
    flags = AS_ACCELERATORS if jax.default_backend() == "cpu" else None
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        return compile_step(step.function, shapes, flags)[1]["peak_mib"]


def variances(epochs, draws, batches):
    """Estimator -> batch size -> variance of the gradient, summed over the means."""
    dataset = data.load("digits", label_noise=0.2)
    config = BASE.replace(method="sgvb", kl_weight=0.1, epochs=epochs, num_samples=1)
    state = training.train(config, dataset, show_progress=False).state
    model = models.create("cnn_small", 10)
    found = {}
    for estimator in ("weights", "local", "flipout"):
        found[estimator] = {}
        for size in batches:
            images = jnp.asarray(dataset.train.images[:size])
            images = data.normalise(images, dataset.mean, dataset.std)
            batch = images, jnp.asarray(dataset.train.labels[:size])

            def loss_fn(params, batch):
                logits, _ = model.apply(
                    params, state.model_state, batch[0], train=False
                )
                return methods.cross_entropy(logits, batch[1])

            grad_fn = bnn.sgvb(
                loss_fn, num_data=1_437, kl_weight=0.0, estimator=estimator
            )

            @jax.jit
            def flat(key, grad_fn=grad_fn, batch=batch):
                grads = grad_fn(state.params, batch, key=key)[1].mean
                return jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

            keys = jax.random.split(jax.random.key(0), draws)
            gradients = np.stack([np.asarray(flat(key), np.float64) for key in keys])
            found[estimator][str(size)] = float(gradients.var(axis=0, ddof=1).sum())
    return found


def table(record):
    means = record["means_mib"]
    rows = []
    for name, values in record["results"].items():
        budget = record["results"][REFERENCE]["peak_mib"]
        budget += means if name.startswith("OT-MDR") else 0.0
        ratio = values["ratio_to_sgvb"]
        rows.append(
            [
                name,
                f"{values['milliseconds']:.0f}",
                f"{ratio:.2f}",
                f"{values['gradients']:g}",
                f"{ratio / values['gradients']:.2f}",
                f"{values['peak_mib']:.0f}",
                f"{values['peak_mib'] / budget:.2f}",
                f"{values['compile_seconds']:.0f}",
                values["n"],
            ]
        )
    header = ["step", "ms", "x SGVB", "gradients", "ratio of the two", "peak MiB",
              "of its budget", "compile s", "n"]  # fmt: skip
    return markdown(header, rows)


def variance_table(found):
    sizes = list(next(iter(found.values())))
    rows = [
        [name, *(f"{of[size]:.3g}" for size in sizes)]
        + [f"{of[size] / found['weights'][size]:.2f}" for size in sizes]
        for name, of in found.items()
    ]
    header = ["estimator", *(f"batch {size}" for size in sizes)]
    return markdown([*header, *(f"x weights, {size}" for size in sizes)], rows)


def main():
    cpu = jax.default_backend() == "cpu"
    parser = options_of(__doc__, "a tiny network, three steps, one round")
    add = parser.add_argument
    add("--model", default="wide_resnet_16_2" if cpu else "resnet_10")
    add("--batch-size", type=int, default=32 if cpu else 128)
    add("--dtype", default="float32" if cpu else "bfloat16")
    add("--image-size", type=int, default=32)
    add("--rounds", type=int, default=9 if cpu else 31)
    add("--draws", type=int, default=200, help="for the variance")
    options = parser.parse_args()
    epochs, batches, chosen = BASE.run.epochs, BATCHES, None
    if options.smoke:
        chosen = [REFERENCE, next(iter(VERSIONS)), "SGVB, flipout"]
        options.model, options.batch_size, options.image_size = "cnn_small", 8, 8
        options.rounds, options.draws, epochs, batches = 1, 3, 1, (8,)

    model = models.create(options.model, 10, dtype=jnp.dtype(options.dtype))
    batch = make_batch(options.batch_size, options.image_size)
    runs, results = {}, {}
    steps = make_steps(model)
    for name in chosen or steps:
        step, gradients = steps[name]
        arguments = make_arguments(step, model, batch)
        runs[name], results[name] = compile_step(step.function, arguments)
        results[name]["gradients"] = gradients
        results[name]["peak_mib"] = peak_memory(step, model, batch)
        print(
            f"compiled {name} in {results[name]['compile_seconds']:.1f} s", flush=True
        )
    means = jax.tree.leaves(arguments[0].mean)
    times = measure(runs, options.rounds, progress=True)
    for name, values in summarise(times, REFERENCE, "ratio_to_sgvb").items():
        results[name].update(values)
    record = {
        "model": options.model,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "means_mib": sum(x.size * x.dtype.itemsize for x in means) / 2**20,
        "draws": options.draws,
        **environment(),
        "results": results,
        "seconds": times,
    }
    print(f"\n{options.model}, batch {options.batch_size}, {record['device']}\n")
    print(table(record))
    write_json(options.json, record)
    record["variance"] = variances(epochs, options.draws, batches)
    print("\nVariance of the gradient by the means\n")
    print(variance_table(record["variance"]))
    write_json(options.json, record)


if __name__ == "__main__":
    main()
