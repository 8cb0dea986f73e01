"""The paper's Bayesian networks (Table 4): SGVB and OT-MDR on CIFAR, by preset.

    python examples/cifar_bnn.py --data-dir ~/tensorflow_datasets   # OT-MDR, ResNet-10
    python examples/cifar_bnn.py --method sgvb --model resnet_18
    python examples/cifar_bnn.py --released     # the released code's version of OT-MDR
    python examples/cifar_bnn.py --smoke        # digits, seconds on a CPU

Time: 100 epochs of ResNet-10 are a matter of hours on one accelerator and out of reach
of a CPU. Expected, from the paper's Table 4, accuracy (%), NLL and ECE:

                     ResNet-10                ResNet-18
    CIFAR-10
      SGVB           80.52  0.78  0.23        86.74  0.54  0.18
      OT-MDR         81.26  0.81  0.26        87.55  0.52  0.17
    CIFAR-100
      SGVB           54.40  1.96  0.21        60.91  1.74  0.24
      OT-MDR         55.33  1.85  0.18        63.17  1.55  0.20

This project has not run them to the end yet. The run's folder says what comes out; an
interrupted run goes on with the same command and --resume.
"""

import argparse
import json

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments import training


def configuration(options):
    """The preset of a method, on the model that was asked for."""
    version = "paper-bnn"
    if options.method == "sgvb":
        version = "sgvb"
    elif options.released:
        version = "released-bnn"
    config = config_lib.preset(f"{version}-{options.data}", options.num_particles)
    return config.replace(
        model=options.model,
        data_dir=options.data_dir,
        dtype=options.dtype,
        seed=options.seed,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", default="otmdr-bnn", choices=["otmdr-bnn", "sgvb"])
    add("--released", action="store_true", help="the released code's OT-MDR")
    add("--model", default="resnet_10", choices=["resnet_10", "resnet_18"])
    add("--data", default="cifar10", choices=["cifar10", "cifar100"])
    add("--num-particles", type=int, default=1)
    add("--data-dir", help="folder of prepared TFDS data")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--seed", type=int, default=0)
    add("--output", help="default: runs/<data>-<model>-<method>-seed<seed>")
    add("--resume", action="store_true", help="go on with the run")
    add("--smoke", action="store_true", help="a tiny run on embedded digits")
    options = parser.parse_args()
    if options.released and options.method == "sgvb":
        parser.error("--released is a version of OT-MDR: leave out --method sgvb")

    config = configuration(options)
    name = f"{options.data}-{options.model}"
    if options.smoke:  # the same code paths with a small network
        name = "smoke"
        config = config.replace(
            data="digits", model="cnn_small", activation="relu", steps=4,
            batch_size=32, learning_rate=0.01, num_samples=2, mesh="data=1",
        )  # fmt: skip
    released = "-released" if options.released else ""
    output = f"runs/{name}-{options.method}{released}-seed{options.seed}"
    output = options.output or output
    result = training.train(config, output=output, resume=options.resume)
    names = ("accuracy", "nll", "ece", "aleatoric", "epistemic")
    print(json.dumps({name: result.metrics[name] for name in names}, indent=2))
    print(f"Run: {output}")


if __name__ == "__main__":
    main()
