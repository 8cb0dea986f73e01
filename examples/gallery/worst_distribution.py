r"""
# The worst distribution nearby

    python examples/gallery/worst_distribution.py  # 15 seconds, writes a picture

What particles are draws of. The paper's theorem says how bad the worst distribution of
models in a ball is: its density is proportional to $\exp(\lambda L(w))$. Expected:
draws are spread over the whole ball where $\lambda = 0$ and sit on its highest points
where it is large; SAM's one point is the end of the linearised sampler.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import otmdr_jax

# %%
# ## A loss with two hills
# The center is the middle of the unit ball; the loss bends inside of it, more than the
# loss of a network does in a ball that one would train with.


def loss_fn(w, batch):
    hills = jnp.sin(3 * w[0]) * jnp.cos(2 * w[1]) + 0.5 * w[0] * w[1] ** 2
    return hills + jnp.mean(batch @ w)


examples = np.random.default_rng(0).normal(size=(64, 2))
batch = jnp.asarray(examples - examples.mean(0), jnp.float32)

# %%
# ## Draws
# `sampler="first_order"` draws the exact distribution of the loss made linear at the
# center, for one gradient however many particles there are. `sampler="langevin"` is a
# Markov chain of the loss itself. `sampler="ascent"` takes the paper's two steps on
# halves of the batch.


def draw(**options):
    sample = jax.jit(
        lambda key: otmdr_jax.sample_particles(
            loss_fn, jnp.zeros(2), batch, key, rho=options.pop("rho", 1.0),
            num_particles=400, particle_map="vmap", **options,
        )[0]
    )  # fmt: skip
    return sample(jax.random.key(0))


def chain(heat, step_size=0.3):
    return draw(
        sampler="langevin", inverse_temperature=heat, split="shared", num_steps=300,
        step_size=step_size,
    )  # fmt: skip


panels = {
    "λ = 0: anywhere": chain(0.0),
    "λ = 3": chain(3.0),
    "λ = 12: on the hill": chain(12.0, step_size=0.1),
    "linearised, tilt 0.6": draw(sampler="first_order", tilt=0.6),
    "linearised, tilt 1: SAM": draw(sampler="first_order", tilt=1.0),
    "the paper's two steps": draw(sampler="ascent", rho=(0.33, 0.67), noise_std=0.05),
}
for name, particles in panels.items():
    losses = jax.vmap(loss_fn, (0, None))(particles, batch)
    print(f"{name}: mean loss {losses.mean():.2f}, highest {losses.max():.2f}")

# %%
# ## The picture

at = np.linspace(-1.3, 1.3, 131)
grid = jnp.stack(jnp.meshgrid(at, at), -1).astype(jnp.float32)
height = jax.vmap(jax.vmap(loss_fn, (0, None)), (0, None))(grid, batch)
circle = np.stack([f(np.linspace(0, 2 * np.pi, 200)) for f in (np.cos, np.sin)])

figure, axes = plt.subplots(
    2, 3, figsize=(8, 5.6), sharex=True, sharey=True, layout="constrained"
)
for ax, (name, particles) in zip(axes.flat, panels.items(), strict=True):
    ax.contourf(at, at, height, levels=20, cmap="Greys_r")
    ax.plot(*circle, color="white", linewidth=1)
    ax.plot(*np.asarray(particles).T, ".", color="#D55E00", markersize=3)
    ax.plot(0, 0, "+", color="#56B4E9", markersize=9)
    ax.set(aspect="equal")
    ax.set_title(name, fontsize=10)
figure.savefig("worst_distribution.png", dpi=130)
