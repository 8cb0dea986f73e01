"""
# How flat is it?

    python examples/gallery/sharpness.py           # 40 seconds, writes sharpness.png

A perceptron on the digits of scikit-learn, of which a fifth have a wrong label, trained
by SGD, SAM and OT-MDR; then the training loss around each solution. Expected: the
robust solutions lie in a wider valley, have a smaller largest eigenvalue of the
Hessian, and get more of the test images right, although their training loss is higher.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import otmdr_jax
from otmdr_jax import data, landscape

# %%
# ## Training
# In a plain Optax loop, with the same batches for all.

digits = data.load("digits", label_noise=0.2)
train_set = {
    "x": data.normalise(digits.train.images, digits.mean, digits.std).reshape(-1, 64),
    "y": jnp.asarray(digits.train.labels),
}
test = data.normalise(digits.test.images, digits.mean, digits.std).reshape(-1, 64)


def init(key, sizes=(64, 128, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def network(params, x):
    hidden, out = params
    return jax.nn.relu(x @ hidden["w"] + hidden["b"]) @ out["w"] + out["b"]


def losses(params, batch):
    logits = network(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def loss_fn(params, batch):
    return losses(params, batch).mean()


def train(grad_fn, steps=1500, size=128):
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)
    params = init(jax.random.key(0))

    def step(carry, key):
        params, state = carry
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (size,), 0, len(train_set["y"]))
        batch = jax.tree.map(lambda x: x[rows], train_set)
        _, grads = grad_fn(params, batch, noise_key)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p, keys: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0])
    return run(params, jax.random.split(jax.random.key(1), steps))[0]


plain = jax.value_and_grad(loss_fn)
sam = otmdr_jax.value_and_grad(loss_fn, rho=0.15, split="shared")
otmdr = otmdr_jax.value_and_grad(loss_fn, rho=(0.05, 0.1))
METHODS = {
    "SGD": lambda params, batch, key: plain(params, batch),
    "SAM, radius 0.15": lambda params, batch, key: sam(params, batch),
    "OT-MDR, radii 0.05 0.1": lambda params, batch, key: otmdr(params, batch, key=key),
}
solutions = {name: train(grad_fn) for name, grad_fn in METHODS.items()}

# %%
# ## What lies around
# Everything is measured over the whole training set: the loss along random directions
# whose filters have the lengths of the network's own (Li et al., 2018), the worst loss
# in a ball, and the largest eigenvalue of the Hessian.


def loss_sum(params, batch):
    return losses(params, batch).sum(), len(batch["y"])


batches = [train_set]
along = np.linspace(-1.0, 1.0, 41)
slices = {}
print("method                    test  train loss  worst in ball  eigenvalue")
for name, params in solutions.items():
    slices[name] = [
        landscape.loss_grid(
            loss_sum, params, batches,
            [landscape.random_direction(params, jax.random.key(k))], [along],
        )
        for k in range(5)
    ]  # fmt: skip
    right = np.mean(np.argmax(network(params, test), 1) == digits.test.labels)
    worst = landscape.worst_in_ball(loss_sum, params, batches, rho=0.3)
    spectrum = landscape.hessian_eigenvalues(loss_sum, params, batches)
    print(
        f"{name:23} {right:6.3f} {worst.loss:11.3f} "
        f"{worst.worst:14.3f} {spectrum.values[0]:11.1f}"
    )

# %%
# ## The picture

figure, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for colour, (name, lines) in zip(
    ("#999999", "#0072B2", "#D55E00"), slices.items(), strict=True
):
    for line in lines:
        ax.plot(along, line, color=colour, linewidth=0.6, alpha=0.5)
    ax.plot(along, np.mean(lines, 0), color=colour, linewidth=2, label=name)
ax.set(xlabel="distance along a random direction", ylabel="training loss, nats")
ax.legend(frameon=False)
figure.savefig("sharpness.png", dpi=130)
