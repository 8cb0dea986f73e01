"""
# A Flax network on two moons

    python examples/gallery/moons.py               # 20 seconds, writes moons.png

Two moons of points, a fifth with the wrong label, and a network that is large enough to
learn all of them by heart. The loop is Flax's own; only `nnx.value_and_grad` becomes
`otmdr_jax.nnx.value_and_grad`. Expected: plain training follows the wrong labels with
islands and bays; robust training draws a plainer border, and gets more of the right
labels right.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import make_moons

import otmdr_jax

# %%
# ## Points and network

x, truth = make_moons(400, noise=0.12, random_state=0)
flipped = np.random.default_rng(0).random(len(truth)) < 0.2
labels = np.where(flipped, 1 - truth, truth)
batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(labels)}
new_x, new_y = make_moons(2000, noise=0.12, random_state=1)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.out = nnx.Linear(128, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.second(nnx.relu(self.first(x)))))


def loss_fn(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(batch["x"]), batch["y"]
    )
    return losses.mean()


# %%
# ## Training
# The one line that differs between the methods is `grad_fn`.


def train(grad_fn, steps=1500):
    model = Net(nnx.Rngs(0))
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        loss, grads = grad_fn(model, batch, key)
        optimizer.update(model, grads)
        return loss

    for key in jax.random.split(jax.random.key(0), steps):
        loss = step(model, optimizer, key)
    return model, float(loss)


plain = nnx.value_and_grad(loss_fn)
robust = otmdr_jax.nnx.value_and_grad(loss_fn, rho=(0.1, 0.2))
METHODS = {
    "Adam": lambda model, batch, key: plain(model, batch),
    "Adam with OT-MDR": lambda model, batch, key: robust(model, batch, key=key),
}
models = {}
for name, grad_fn in METHODS.items():
    model, loss = train(grad_fn)
    right = np.mean(np.argmax(model(jnp.asarray(new_x)), -1) == new_y)
    print(f"{name}: training loss {loss:.3f}, accuracy on new points {right:.3f}")
    models[name] = model, right

# %%
# ## The borders

across, up = np.linspace(-1.6, 2.6, 211), np.linspace(-1.1, 1.6, 136)
grid = jnp.stack(jnp.meshgrid(across, up), -1).astype(jnp.float32)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True, layout="constrained")
for ax, (name, (model, right)) in zip(axes, models.items(), strict=True):
    ax.contourf(
        across, up, jax.nn.softmax(model(grid))[..., 1], levels=20, cmap="RdBu_r",
        vmin=0, vmax=1, alpha=0.6,
    )  # fmt: skip
    for label, colour in enumerate(("#0072B2", "#D55E00")):
        ax.plot(*x[labels == label].T, ".", color=colour, markersize=4)
    ax.set_title(f"{name}: {right:.1%} of new points right", fontsize=10)
figure.savefig("moons.png", dpi=130)
