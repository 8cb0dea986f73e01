r"""What corrupting images costs beside evaluating them, and what they look like.

    python benchmarks/corruptions.py --json benchmarks/results/corruptions_cpu.json
    python benchmarks/corruptions.py --picture docs/shift/corruptions.png \
        --data cifar10 --data-dir ~/tensorflow_datasets
    python benchmarks/corruptions.py --smoke

Times are of a batch of CIFAR's shape on the device, in turns: the predictions of a
small network first, then each corruption. Expected: a minute on 2 CPU cores.
"""

import statistics
import time

import jax
import numpy as np
from _common import environment
from _record import markdown, options_of, write_json

from otmdr_jax import data, models
from otmdr_jax.experiments.report import plots

MODEL = "cnn_small"


def measure(batch, rounds):
    """Images a second of the network and of each corruption, and shares of its time."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
    images = jax.device_put(images)
    key = jax.random.key(0)
    model = models.create(MODEL, num_classes=10)
    params, state = model.init(key, np.zeros((1, 32, 32, 3), np.float32))

    @jax.jit
    def predict(images):
        x = data.normalise(images, (0.5,) * 3, (0.25,) * 3)
        logits, _ = model.apply(params, state, x, train=False)
        return jax.nn.log_softmax(logits)

    calls = {MODEL: lambda: predict(images)} | {
        name: lambda name=name: data.corrupt(key, images, name, 3)
        for name in data.CORRUPTIONS
    }
    times = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())  # compiles
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "images_per_second": batch / statistics.median(values),
            # Each beside the prediction of its own round: both see the same load.
            "share": statistics.median(
                x / y for x, y in zip(values, times[MODEL], strict=True)
            ),
            "n": rounds,
        }
        for name, values in times.items()
    }


def table(results):
    rows = [
        [
            f"`{name}`",
            f"{round(x['images_per_second'], -2):,.0f}",
            "" if name == MODEL else f"{100 * x['share']:.0f}",
        ]
        for name, x in results.items()
    ]
    shares = [x["share"] for name, x in results.items() if name != MODEL]
    rows.append(["mean of all six", "", f"{100 * statistics.mean(shares):.0f}"])
    return markdown(["", "images a second", "% of the prediction's time"], rows)


def sheet(image):
    """A row for each corruption, a column for each severity, the clean image first."""
    levels = (0, *data.SEVERITIES)
    rows = len(data.CORRUPTIONS)
    figure = plots.new_figure(plots.WIDTH, plots.WIDTH * rows / (len(levels) + 0.9))
    grid = figure.subplots(rows, len(levels))
    gray = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.shape[-1] == 1 else {}
    for line, name in zip(grid, data.CORRUPTIONS, strict=True):
        for ax, level in zip(line, levels, strict=True):
            shown = image
            if level:
                key = jax.random.key(0)
                shown = np.asarray(data.corrupt(key, image[None], name, level)[0])
            shown = shown.squeeze(-1) if gray else shown
            ax.imshow(shown, interpolation="nearest", **gray)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name.replace("_", "\n"), fontsize=plots.LARGE)
    for ax, level in zip(grid[0], levels, strict=True):
        ax.set_title(f"severity {level}" if level else "clean", fontsize=plots.LARGE)
    return figure


def main():
    parser = options_of(__doc__, "16 images, one round")
    add = parser.add_argument
    add("--batch-size", type=int, default=512)
    add("--rounds", type=int, default=15)
    add("--picture", help="draw a test image in all corruptions; nothing is timed")
    add("--data", default="digits", help="the picture's set")
    add("--data-dir", help="folder of prepared TFDS data")
    add("--image", type=int, default=0, help="which test image")
    options = parser.parse_args()
    if options.picture:
        split, _ = data.load_test(options.data, data_dir=options.data_dir)
        plots.save(sheet(np.asarray(split.images[options.image])), options.picture)
        return
    if options.smoke:
        options.batch_size, options.rounds = 16, 1
    record = {"batch_size": options.batch_size, **environment()}
    record["results"] = measure(options.batch_size, options.rounds)
    write_json(options.json, record)
    print(table(record["results"]))


if __name__ == "__main__":
    main()
