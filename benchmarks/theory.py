"""The pictures and numbers of docs/theory.md: the worst distribution in two dimensions.

    python benchmarks/theory.py --pictures docs/theory \
        --json benchmarks/results/theory.json          # two minutes on 2 CPU cores
    python benchmarks/theory.py --smoke

A loss of two weights whose mean over a batch is known, in the unit ball around 0: its
worst distribution at three temperatures by quadrature, beside draws of the linearised
loss, of Markov chains, and the paper's two steps. The numbers are total variation
distances: half the sum of |share of draws - probability| over the cells of a grid.
A finite number of exact draws has one too, which is given. Beside them the accuracy of
examples/sweep_tilt.toml by tilt, from its record, and the course of the multiplier and
the radius in two runs of the dual form on the digits.
"""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from _common import environment
from _record import markdown, options_of, write_json

import otmdr_jax
from otmdr_jax import training
from otmdr_jax.experiments.config import TrainConfig

HEATS = (0.0, 1.5, 6.0)
CELLS, FINE = 16, 32
KEY = jax.random.key(0)


def loss_fn(w, batch):
    """Two hills and a valley; each example tilts the plane, their mean does not."""
    x, y = w[0], w[1]
    hills = jnp.sin(3 * x) * jnp.cos(2 * y) + 0.5 * x * y**2
    return hills + jnp.mean(batch @ w)


def make_batch(size=64, spread=1.0):
    batch = np.random.default_rng(0).normal(size=(size, 2)) * spread
    return jnp.asarray(batch - batch.mean(axis=0), jnp.float32)


def density(heat, points):
    """exp(heat L) on a grid of `points` each way over the square; 0 off the ball."""
    at = (np.arange(points) + 0.5) / points * 2 - 1
    x, y = np.meshgrid(at, at, indexing="ij")
    w = jnp.asarray(np.stack([x.ravel(), y.ravel()]), jnp.float32)
    loss = jax.vmap(lambda w: loss_fn(w, jnp.zeros((1, 2))), -1)(w)
    found = np.exp(heat * np.asarray(loss, np.float64)).reshape(x.shape)
    return at, np.where(x**2 + y**2 <= 1, found, 0.0)


def cells(heat):
    """The probability of each cell of the grid."""
    _, found = density(heat, CELLS * FINE)
    found = found.reshape(CELLS, FINE, CELLS, FINE).sum(axis=(1, 3))
    return found / found.sum()


def distance(particles, heat):
    """The total variation distance of draws from the worst distribution."""
    edges = np.linspace(-1, 1, CELLS + 1)
    seen, *_ = np.histogram2d(*np.asarray(particles).T, bins=[edges, edges])
    return 0.5 * float(np.abs(seen / len(particles) - cells(heat)).sum())


def draw(count, batch, key=KEY, **options):
    """Particles (K, 2) around 0, by one program."""
    options = {"rho": 1.0, "num_particles": count, "particle_map": "vmap"} | options
    sample = jax.jit(
        lambda key: otmdr_jax.sample_particles(
            loss_fn, jnp.zeros(2), batch, key, **options
        )
    )
    particles, seen = sample(key)
    return np.asarray(particles), seen


def samplers(heat, steps):
    """What the columns of the picture draw, by name."""
    chain = {"sampler": "langevin", "inverse_temperature": heat}
    return {
        "linearised loss": {"inverse_temperature": heat},
        "MALA": {**chain, "split": "shared", "num_steps": steps, "step_size": 0.3},
        "chain on 2 parts": {**chain, "split": "random", "num_steps": 2},
    }


def exact(heat, count):
    """Draws of the grid's own distribution, for what their number alone does."""
    _, found = density(heat, CELLS * FINE)
    rng = np.random.default_rng(1)
    rows = rng.choice(found.size, count, p=(found / found.sum()).ravel())
    at = (np.stack(np.unravel_index(rows, found.shape), 1) + 0.5) / (CELLS * FINE)
    return at * 2 - 1


def measure(count):
    """Total variation distances by temperature: of samplers, and of chains' lengths."""
    batch, found = make_batch(), []
    for heat in HEATS:
        row = {"inverse_temperature": heat, "as many exact draws": distance(
            exact(heat, count), heat)}  # fmt: skip
        for name, options in samplers(heat, 100).items():
            particles, seen = draw(count, batch, **options)
            row[name] = distance(particles, heat)
            if name == "MALA":
                row["acceptance"] = float(seen.acceptance_rate.mean())
                row["draws of a chain of 100"] = (
                    float(seen.effective_sample_size) / count
                )
        for parts in (4, 16, 64):  # beside the 2 of the picture
            particles, _ = draw(
                count, batch, sampler="langevin", split="random", num_steps=parts,
                inverse_temperature=heat,
            )  # fmt: skip
            row[f"chain on {parts} parts"] = distance(particles, heat)
        found.append(row)
    return found


def table(results):
    """A line for each temperature."""
    names = {
        "as many exact draws": "exact draws",
        "linearised loss": "`first_order`",
        "MALA": "MALA, 100 steps",
        **{f"chain on {n} parts": f"chain on {n} parts" for n in (2, 4, 16, 64)},
    }
    rows = [
        [f"{row['inverse_temperature']:g}", *(f"{row[name]:.3f}" for name in names)]
        + [f"{row['acceptance']:.2f}", f"{row['draws of a chain of 100']:.1f}"]
        for row in results
    ]
    header = ["λ", *names.values(), "MALA's acceptance", "draws its 100 are worth"]
    return markdown(header, rows)


def picture(path, count):
    """The ball: densities, draws, and the paper's two steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batch = make_batch()
    titles = ["worst distribution", *samplers(0.0, 1)]
    figure, axes = plt.subplots(4, 4, figsize=(10, 10.6), layout="constrained")
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    at, levels = density(1.0, 200)
    levels = np.where(levels > 0, np.log(np.where(levels > 0, levels, 1)), np.nan)
    for ax in axes.flat:
        ax.set(
            aspect="equal", xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), xticks=[], yticks=[]
        )
        ax.contour(at, at, levels.T, 9, colors="0.6", linewidths=0.6)
        ax.plot(circle.real, circle.imag, "k", linewidth=1)
        ax.plot(0, 0, "k+", markersize=9)

    def scatter(ax, particles):
        ax.scatter(*particles.T, s=2, color="C0", alpha=0.6, linewidths=0)

    for row, heat in zip(axes, HEATS, strict=False):
        row[0].set_ylabel(f"$\\lambda$ = {heat:g}", fontsize=12)
        shown = density(heat, 200)[1]
        row[0].pcolormesh(
            at, at, np.where(shown > 0, shown, np.nan).T / shown.max(), cmap="Blues",
            vmin=0, vmax=1.2,
        )  # fmt: skip
        for ax, options in zip(row[1:], samplers(heat, 100).values(), strict=True):
            scatter(ax, draw(count, batch, **options)[0])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=12)
    climb = {"sampler": "ascent", "rho": (0.33, 0.66)}
    axes[3][0].set_ylabel("two steps (Eq. 9)", fontsize=12)
    for ax, title, options in zip(
        axes[3],
        ("as in the paper", "with noise, σ = 0.3", "noise, projected", "tilt 0.7"),
        (
            climb,
            {**climb, "noise_std": 0.3},
            {**climb, "rho": (0.5, 1.0), "noise_std": 0.3, "project": True},
            {"tilt": 0.7},
        ),
        strict=True,
    ):
        ax.set_title(title if title != "tilt 0.7" else "linearised loss, tilt 0.7")
        scatter(ax, draw(count, batch, **options)[0])
    figure.savefig(path, dpi=110)


def picture_of_tilts(path, record):
    """Test accuracy by tilt, in a ball of one radius, beside the ends and Eq. 9."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {}
    for row in json.loads(record.read_text())["results"]:
        groups.setdefault(row["label"], []).append(100 * row["accuracy"])
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, count in enumerate((1, 2, 4)):
        tilts = (0.0, 0.25, 0.5, 0.75, 1.0)
        found = [groups[f"Draws, tilt = {t}, num_particles = {count}"] for t in tilts]
        mean, deviation = np.mean(found, axis=1), np.std(found, axis=1, ddof=1)
        at = np.array(tilts) + 0.012 * (i - 1)
        ax.errorbar(at, mean, deviation, marker="o", capsize=3, label=f"K = {count}")
    for label, style in (
        ("SGD", ":"),
        ("SAM", "--"),
        ("OT-MDR, num_particles = 1", "-."),
    ):
        name = label.partition(",")[0]
        ax.axhline(np.mean(groups[label]), color="0.4", linestyle=style, label=name)
    ax.set(xlabel="tilt, E[t]", ylabel="test accuracy, %")
    ax.legend(ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def picture_of_dual(path, epochs):
    """lambda, and the distance of the particle, in two runs of the dual form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for rho in (0.05, 0.15):
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                method="otmdr-dual", rho=(rho,), data="digits", label_noise=0.2,
                epochs=epochs, eval_every=epochs, log_every=2,
            )  # fmt: skip
            training.train(config, output=f"{folder}/run", show_progress=False)
            lines = pathlib.Path(folder, "run", "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in lines.splitlines()]
        rows = [row for row in rows if row["split"] == "train"]
        steps = [row["step"] for row in rows]
        for ax, name in zip(axes, ("lambda", "distance"), strict=True):
            ax.plot(steps, [row[name] for row in rows], label=f"ρ = {rho}")
        axes[1].axhline(rho, color="0.4", linestyle=":")
    axes[0].set(xlabel="step", ylabel="λ", yscale="log")
    axes[1].set(xlabel="step", ylabel="distance of the particle")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = options_of(__doc__, "few draws")
    parser.add_argument("--pictures", help="folder of the pictures")
    parser.add_argument("--draws", type=int, default=50_000)
    options = parser.parse_args()
    count = 500 if options.smoke else options.draws
    results = measure(count)
    print(table(results))
    write_json(options.json, {**environment(), "draws": count, "results": results})
    if options.pictures:
        folder = pathlib.Path(options.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        picture(folder / "ball.png", min(count, 2_000))
        record = pathlib.Path(__file__).parent / "results" / "sweep_tilt.json"
        picture_of_tilts(folder / "tilt.png", record)
        picture_of_dual(folder / "dual.png", 1 if options.smoke else 40)


if __name__ == "__main__":
    main()
