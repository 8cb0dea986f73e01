"""
# Regression: ensembles and posteriors

    python examples/gallery/regression.py          # 40 seconds, writes regression.png

Sixty noisy points with a gap in the middle, and a network of one hidden layer: five
members of an ensemble, or a Gaussian posterior over its weights, each with and without
OT-MDR. Plain functions and Optax: nothing but the core is needed (and matplotlib for
the picture). Expected: all bands cover the points. Members disagree where there are
none, robust members less; a mean-field posterior's bands hardly widen there, which is a
known limit of such posteriors (Foong et al., 2020), and OT-MDR does not remove it.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from otmdr_jax import bnn, ensemble

# %%
# ## Points and network
# The noise of the points, 0.1, is known to the model. The loss is the mean negative
# log-likelihood in nats.

NOISE, HIDDEN, STEPS = 0.1, 50, 6_000
rng = np.random.default_rng(0)
x = np.concatenate([rng.uniform(-2.0, -0.7, 30), rng.uniform(0.5, 2.0, 30)])
y = np.sin(3 * x) + NOISE * rng.normal(size=60)
batch = tuple(jnp.asarray(part, jnp.float32)[:, None] for part in (x, y))


def init(key):
    first, second, third = jax.random.split(key, 3)
    return {
        "hidden": {
            "kernel": jax.random.normal(first, (1, HIDDEN)),
            "bias": jax.random.uniform(third, (HIDDEN,), minval=-2.0, maxval=2.0),
        },
        "output": {
            "kernel": jax.random.normal(second, (HIDDEN, 1)) / HIDDEN**0.5,
            "bias": jnp.zeros(1),
        },
    }


def network(params, x):
    hidden = x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
    output = jnp.tanh(hidden) @ params["output"]["kernel"]
    return output + params["output"]["bias"][None]


def loss_fn(params, batch):
    x, y = batch
    residual = (network(params, x) - y) / NOISE
    return jnp.mean(0.5 * residual**2 + jnp.log(NOISE * (2 * jnp.pi) ** 0.5))


# %%
# ## One loop for all four
# It takes what `value_and_grad` gives: of members that are stacked on a leading axis,
# or of a posterior.


def train(grad_fn, start, key):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))

    def step(carry, key):
        params, state = carry
        _, grads = grad_fn(params, batch, key=key)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p, keys: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0])
    return run(start, jax.random.split(key, STEPS))[0]


def plain(members, batch, key):
    return jax.vmap(jax.value_and_grad(loss_fn), (0, None))(members, batch)


members = jax.vmap(init)(jax.random.split(jax.random.key(0), 5))
posterior = bnn.init(init(jax.random.key(0)), sigma=0.05)
bayes = dict(num_data=60, prior_std=1.0)
RUNS = {
    "ensemble": (plain, members),
    "ensemble, OT-MDR": (ensemble.value_and_grad(loss_fn, rho=(0.005, 0.01)), members),
    "posterior, SGVB": (bnn.sgvb(loss_fn, **bayes), posterior),
    "posterior, OT-MDR": (bnn.value_and_grad(loss_fn, **bayes), posterior),
}


# %%
# ## Predictions
# The spread of members, or of draws of the posterior, is what the model does not know;
# the noise of a new point comes on top. `inside` are new points where there were
# points, `gap` those between.


def predict(trained, x):
    """The functions that members or draws are, (S, N)."""
    if isinstance(trained, bnn.MeanField):
        key = jax.random.key(2)
        return bnn.predict(network, trained, x, key=key, num_samples=500)[..., 0]
    return jax.vmap(network, (0, None))(trained, x)[..., 0]


def log_likelihood(functions, truth):
    """Of new points without noise, by a normal of the predicted mean and spread."""
    spread = jnp.sqrt(functions.var(0) + NOISE**2)
    return jax.scipy.stats.norm.logpdf(truth, functions.mean(0), spread).mean()


at = jnp.linspace(-3.0, 3.0, 241)[:, None]
inside, gap = (
    jnp.linspace(0.5, 2.0, 100)[:, None],
    jnp.linspace(-0.6, 0.4, 100)[:, None],
)
panels = {}
for name, (grad_fn, start) in RUNS.items():
    trained = train(grad_fn, start, jax.random.key(1))
    panels[name] = predict(trained, at)
    scores = [
        f"{where} {log_likelihood(predict(trained, new), jnp.sin(3 * new[:, 0])):.2f}"
        for where, new in (("inside", inside), ("gap", gap))
    ]
    spread = predict(trained, jnp.zeros((1, 1))).std()
    print(f"{name}: log-likelihood {', '.join(scores)}; spread at 0 {spread:.2f}")

# %%
# ## The picture

figure, axes = plt.subplots(
    2, 2, figsize=(9, 5.4), sharex=True, sharey=True, layout="constrained"
)
for ax, (name, functions) in zip(axes.flat, panels.items(), strict=True):
    mean, of_function = functions.mean(0), functions.std(0)
    of_point = jnp.sqrt(of_function**2 + NOISE**2)
    for width, alpha, what in (
        (of_point, 0.18, "a new point, ± 2 σ"),
        (of_function, 0.35, "the function, ± 2 σ"),
    ):
        ax.fill_between(
            at[:, 0], mean - 2 * width, mean + 2 * width, color="#0072B2", alpha=alpha,
            linewidth=0, label=what,
        )  # fmt: skip
    ax.plot(at, mean, color="#0072B2", label="mean")
    ax.plot(at, np.sin(3 * at), "--", color="black", linewidth=1, label="truth")
    ax.plot(x, y, ".", color="#D55E00", markersize=4, label="points")
    ax.set(title=name, ylim=(-2.5, 2.5))
handles = axes[0, 0].get_legend_handles_labels()
figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
figure.savefig("regression.png", dpi=130)
