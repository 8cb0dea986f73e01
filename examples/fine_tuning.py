"""Fine-tuning: from CIFAR-10's even classes to few images of its odd ones.

    python examples/fine_tuning.py --data-dir ~/tensorflow_datasets
    python examples/fine_tuning.py --smoke    # digits, a minute on a CPU

A small network learns the even classes (airplane, bird, deer, frog, ship). Then 20
images of each odd class are all there is: a network is trained on them from scratch,
the new head alone is trained on the features that are there, or all of the network is
fine-tuned, its body ten times slower than its head. Each with SGD and OT-MDR, over
three seeds of the choice of images and the training. Rates were not tuned.

Time: 13 processor minutes in all, on a busy machine of 2 CPU cores. Expected:
accuracy on the odd classes of 42 % from scratch, 42 % by the head alone and 45 % by
fine-tuning, give or take 2; an NLL of 1.9 (SGD) or 1.7 (OT-MDR) from scratch, and of
1.3 where the body was trained before. The whole table is in docs/fine-tuning.md.
"""

import argparse
import pathlib
import statistics

import numpy as np

from otmdr_jax import data
from otmdr_jax.experiments import training
from otmdr_jax.experiments.config import TrainConfig

EVEN, ODD = range(0, 10, 2), range(1, 10, 2)
BODY = ("conv*", "norm*")
METHODS = {"SGD": {"method": "sgd"}, "OT-MDR": {"method": "otmdr"}}
WAYS = {
    "from scratch": {},
    "head alone": {"freeze": BODY},
    "fine-tuned": {"learning_rate_of": [f"{pattern}=0.01" for pattern in BODY]},
}


def part(full, chosen, per_class, seed, name):
    """Some classes, numbered anew, with so many training images of each."""
    rng = np.random.default_rng(seed)

    def of(split, most):
        rows = [
            rng.permutation(np.flatnonzero(split.labels == label))[:most]
            for label in chosen
        ]
        labels = np.repeat(np.arange(len(rows)), [len(x) for x in rows])
        return split.images[np.concatenate(rows)], labels

    return data.from_arrays(
        of(full.train, per_class),
        of(full.test, None),
        name=name,
        # Features are of images that are normalised in one way.
        mean=full.mean,
        std=full.std,
        augment=full.augment,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", help="folder of prepared TFDS data")
    add("--output", default="runs/fine-tuning", help="where the pre-trained run goes")
    add("--seeds", type=int, default=3)
    add("--images", type=int, default=20, help="of each odd class")
    add("--smoke", action="store_true", help="digits and few steps")
    options = parser.parse_args()

    name = "digits" if options.smoke else "cifar10"
    full = data.load(name, data_dir=options.data_dir)
    before = TrainConfig(
        model="cnn_small", method="sgd", batch_size=64, learning_rate=0.1,
        epochs=2 if options.smoke else 10, eval_every=1000, mesh="data=1",
    )  # fmt: skip
    after = before.replace(batch_size=50, steps=4 if options.smoke else 200)

    even = part(full, EVEN, None if options.smoke else 2000, 0, f"{name}-even")
    folder = pathlib.Path(options.output) / f"{name}-even"
    trained = training.train(before, even, folder, resume=folder.exists())
    print(f"even classes: accuracy {trained.metrics['accuracy']:.1%}")

    found = {}
    for seed in range(options.seeds):
        odd = part(full, ODD, options.images, seed, f"{name}-odd")
        for method, own in METHODS.items():
            for way, how in WAYS.items():
                # The odd classes are five too: the head is to be another one.
                start = {"init_from": folder, "new_head": True} if how else {}
                config = after.replace(seed=seed, **own, **how, **start)
                metrics = training.train(config, odd, show_progress=False).metrics
                print(f"seed {seed}, {way}, {method}: {metrics['accuracy']:.1%}")
                found.setdefault((way, method), []).append(metrics)

    print(f"\nodd classes, {options.images} images of each, n = {options.seeds}:\n")
    print("|  | method | accuracy (%) | NLL |\n| :-- | :-- | --: | --: |")
    for way in WAYS:
        for method in METHODS:
            cells = [way, method]
            for metric, scale, digits in (("accuracy", 100, 1), ("nll", 1, 3)):
                values = [scale * x[metric] for x in found[way, method]]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                mean = statistics.mean(values)
                cells.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
