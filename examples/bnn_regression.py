"""A Bayesian network on a line: the predictive bands of SGVB and OT-MDR.

    python examples/bnn_regression.py                       # writes bnn_regression.png

Sixty noisy points with a gap in the middle, a network of one hidden layer, a Gaussian
posterior over its weights. Plain functions and Optax: nothing but the core is needed
(and matplotlib for the picture). Expected: half a minute on 2 CPU cores, and two bands
that cover the points; see docs/bayesian.md for what they do where there are none.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from otmdr_jax import bnn

NOISE = 0.1  # standard deviation of the points, known to the model
HIDDEN = 50


def make_data(seed=0):
    """X and y = sin(3 x) + noise, on [-2, -0.7] and [0.5, 2]."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(-2.0, -0.7, 30), rng.uniform(0.5, 2.0, 30)])
    y = np.sin(3 * x) + NOISE * rng.normal(size=60)
    return jnp.asarray(x, jnp.float32)[:, None], jnp.asarray(y, jnp.float32)[:, None]


def init_network(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {
            "kernel": jax.random.normal(first, (1, HIDDEN)),
            "bias": jnp.linspace(-2.0, 2.0, HIDDEN),
        },
        "output": {
            "kernel": jax.random.normal(second, (HIDDEN, 1)) / HIDDEN**0.5,
            "bias": jnp.zeros(1),
        },
    }


def network(params, x):
    hidden = x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
    return (
        jnp.tanh(hidden) @ params["output"]["kernel"] + params["output"]["bias"][None]
    )


def loss_fn(params, batch):
    """Negative log-likelihood of a normal of known deviation, in nats."""
    x, y = batch
    residual = (network(params, x) - y) / NOISE
    return jnp.mean(0.5 * residual**2 + jnp.log(NOISE * (2 * jnp.pi) ** 0.5))


def train(grad_fn, q, batch, steps, key):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, steps))

    def step(carry, key):
        q, state = carry
        value, grads = grad_fn(q, batch, key=key)
        updates, state = optimizer.update(grads, state, q)
        return (optax.apply_updates(q, updates), state), value

    @jax.jit
    def run(q, keys):
        (q, _), values = jax.lax.scan(step, (q, optimizer.init(q)), keys)
        return q, values

    return run(q, jax.random.split(key, steps))


def bands(q, x, key):
    """Mean, deviation of the function, and deviation of a new point."""
    y = bnn.predict(network, q, x, key=key, num_samples=500)[..., 0]
    deviation = y.std(axis=0)
    return y.mean(axis=0), deviation, jnp.sqrt(deviation**2 + NOISE**2)


def draw(panels, data, x, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (title, (mean, of_function, of_point)) in zip(
        axes, panels.items(), strict=True
    ):
        for width, alpha, name in (
            (of_point, 0.18, "a new point, ± 2 σ"),
            (of_function, 0.35, "the function, ± 2 σ"),
        ):
            ax.fill_between(
                x, mean - 2 * width, mean + 2 * width, color="#0072B2", alpha=alpha,
                linewidth=0, label=name,
            )  # fmt: skip
        ax.plot(x, mean, color="#0072B2", label="mean")
        ax.plot(x, np.sin(3 * x), "--", color="black", linewidth=1, label="truth")
        ax.plot(*data, ".", color="#D55E00", markersize=4, label="points")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("x", fontsize=9)
        ax.set_ylim(-2.5, 2.5)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("y", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8,
                  frameon=False)  # fmt: skip
    figure.savefig(path, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="bnn_regression.png")
    parser.add_argument("--steps", type=int, default=8_000)
    options = parser.parse_args()

    batch = make_data()
    q = bnn.init(init_network(jax.random.key(0)), sigma=0.05)
    common = dict(num_data=60, prior_std=1.0)
    methods = {
        "SGVB": bnn.sgvb(loss_fn, **common),
        "OT-MDR, radii 0.005 0.01": bnn.value_and_grad(loss_fn, **common),
    }
    x = jnp.linspace(-3.0, 3.0, 241)
    panels = {}
    for name, grad_fn in methods.items():
        trained, values = train(grad_fn, q, batch, options.steps, jax.random.key(1))
        panels[name] = bands(trained, x[:, None], jax.random.key(2))
        gap, near = (float(panels[name][1][i]) for i in (120, 60))
        print(
            f"{name}: objective {values[-100:].mean():.3f} nats, deviation of the "
            f"function {gap:.2f} at x = 0 (no points), {near:.2f} at -1.5 (points)"
        )
    draw(panels, [np.ravel(part) for part in batch], np.asarray(x), options.output)
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
