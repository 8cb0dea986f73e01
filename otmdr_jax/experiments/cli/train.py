"""`otmdr train`: one run, from options, a preset, a file or an interrupted run."""

import argparse
import contextlib
import dataclasses
import inspect
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from otmdr_jax.baselines.presets import ENSEMBLES
from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments.cli.common import EXPECTED, print_tables
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods import METHODS
from otmdr_jax.experiments.options import options_of, plain

_METHOD = """Method. sgd minimises the loss; otmdr, sam and its variants asam, gsam,
looksam and fisher-sam minimise the worst loss nearby, otmdr-dual with a radius that
adapts. With a Gaussian posterior of the weights, sgvb and ivon minimise the negative
evidence bound; otmdr-bnn, otmdr-dual-bnn and bsam minimise its worst value nearby.
snapshot and fge collect members in one run; swa and swag average its weights; dst and
edst train sparse networks; mc-dropout predicts with samples of dropout masks; laplace
fits a Gaussian to the trained weights. deep-ensemble, sam-ensemble and otmdr-ensemble
are sgd, sam and otmdr with five members, or --members. The options below are those of
this method: otmdr train --method NAME --help shows those of another one.
docs/baselines.md and docs/dual.md have the equations."""

# What the help shows in the place of a text; of other values their type will do.
_METAVARS = {
    "data": "NAME|FILE.npz|FOLDER",
    "data_dir": "FOLDER|FILE.npz",
    "image_size": "PIXELS",
    "cache_dir": "FOLDER",
    "augment": "[{crop,flip} ...]",
    "model": "NAME",
    "members": "NUMBER|NAME,NAME",
    "mesh": "data=4,particle=2",
    "init_from": "RUN|FILE",
    "freeze": "PATTERN ...",
    "perturb": "PATTERN ...",
    "learning_rate_of": "PATTERN=RATE ...",
}


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model. Every option has a default; the run's folder records them all.

    The help shows the options of one method: otmdr train --method sam --help.

    Examples:
    otmdr train --method otmdr --num-particles 2

    otmdr train --preset paper-cifar10 --data-dir ~/tensorflow_datasets

    otmdr train --data ./photos --image-size 64 --model resnet_18

    otmdr train --resume runs/digits-cnn_small-otmdr-seed0

    otmdr train --members 5 --model resnet_10 --data cifar10

    otmdr train --method otmdr-bnn --optimizer adam --learning-rate 1e-3

    otmdr train --method bsam --learning-rate 0.5 --num-subbatches 4

    otmdr train --method snapshot --cycles 5 --epochs 40

    otmdr train --mesh data=4,particle=2 --num-particles 2

    otmdr train --init-from runs/pretrained --freeze "conv*" "norm*"

    srun otmdr train --distributed --output /shared/run
    """

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Start from a named configuration: demo, paper-cifar10, paper-cifar100,
    released-cifar10, released-cifar100, released-mode1.1-cifar10,
    released-mode1.1-cifar100, released-ensemble-cifar10, released-ensemble-cifar100,
    sam-cifar10, sam-cifar100, bsam-cifar10, bsam-cifar100; Bayesian networks:
    paper-bnn-cifar10, paper-bnn-cifar100, released-bnn-cifar10,
    released-bnn-cifar100, sgvb-cifar10, sgvb-cifar100; ensembles and competitors, each
    with -cifar10 or -cifar100: deep-ensemble, sam-ensemble, otmdr-ensemble, snapshot,
    fge, swa, swag, dst, edst. Options on the command line override it.
    """
    config_file: Annotated[
        str | None, tyro.conf.arg(name="config", metavar="FILE.json")
    ] = None
    """Start from a configuration file, such as a run's config.json."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the run. Default: runs/<data>-<model>-<method>-seed<seed>."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Folder of an interrupted run to resume, with its own options."""
    quiet: bool = False
    """Show no progress."""
    distributed: bool = False
    """Join a run on many hosts: start the same command on each host. SLURM, Open MPI,
    Kubernetes and Cloud TPU need no further option. --output must be on a file system
    that all hosts share."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """host:port of process 0, on clusters that JAX does not detect."""
    num_processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Index of this process, from 0, with --coordinator."""


def parse(argv: Sequence[str]) -> tuple[Train, TrainConfig]:
    """Reads a command line; --preset, --config or --resume set the defaults.

    Its help shows only the options of the method that --method names.

    Args:
      argv: Arguments after `otmdr train`.

    Raises:
      ValueError: More than one of these three is given, the method does not have an
        option, or options do not go together.
    """
    start = _start_of(argv)
    mine = start.method.all_options(start.method.gradient.name)
    config_lib.refuse_foreign(start.method.name, _of_other_methods(argv, mine), mine)
    defaults = start.flat()
    given_flags = {arg.split("=")[0] for arg in argv}
    if {"--steps", "--epochs"} <= given_flags:
        raise ValueError(
            "--steps and --epochs each say how long a run is: give one of them."
        )
    # A preset's epochs, say, mean nothing beside --steps.
    if "--steps" in given_flags:
        defaults["epochs"] = config_lib.shared_options()["epochs"].default
    elif "--epochs" in given_flags:
        defaults["steps"] = None
    groups = {
        key: {
            name: (option.kind, option.text)
            for name, option in options_of(kind, key).items()
        }
        for key, kind in config_lib.GROUPS.items()
    }
    names = Literal[(*METHODS, *ENSEMBLES)]  # type: ignore[valid-type]
    own = {name: (option.kind, option.text) for name, option in mine.items()}
    groups["method"] = {"method": (names, _METHOD), **own}
    order = ("data", "model", "method", "optimizer", "schedule", "run")
    everything: Any = dataclasses.make_dataclass(
        "Everything",
        [
            ("train", Annotated[Train, tyro.conf.OmitArgPrefixes]),
            *((key, _group(key, groups[key], defaults)) for key in order),
        ],
    )
    found = tyro.cli(
        everything,
        prog="otmdr train",
        # Given as a whole, because tyro's own parser drops the examples.
        description=inspect.getdoc(Train),
        args=list(argv),
    )
    given: dict[str, Any] = {}
    for key in order:
        given |= vars(getattr(found, key))
    return found.train, TrainConfig(**given)


def _group(key, options, defaults):
    """Makes the dataclass that tyro reads a group of options from, with their help."""
    fields = [
        (
            name,
            Annotated[
                plain(kind),
                tyro.conf.arg(help=" ".join(text.split()), metavar=_METAVARS.get(name)),
            ],
            dataclasses.field(default=defaults[name]),
        )
        for name, (kind, text) in options.items()
    ]
    made: Any = dataclasses.make_dataclass(key.capitalize(), fields)
    kind = config_lib.GROUPS.get(key)
    made.__doc__ = kind.__doc__ if kind else "The training method and its options."
    return Annotated[made, tyro.conf.OmitArgPrefixes]


def _of_other_methods(argv, mine):
    """Lists options on a command line that only other methods have."""
    flags = [arg.split("=")[0] for arg in argv if arg.startswith("--")]
    names = [re.sub("^no_", "", flag[2:].replace("-", "_")) for flag in flags]
    return [n for n in names if n in config_lib.method_options() and n not in mine]


def _start_of(argv: Sequence[str]) -> TrainConfig:
    """Returns the options of --preset, --config or --resume, changed to --method."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags = ("preset", "config", "resume")
    # Tyro takes both spellings, and says what is wrong with a value.
    for flag in (*flags, "method", "base-method", "num-particles"):
        spellings = {f"--{flag}", f"--{flag.replace('-', '_')}"}
        parser.add_argument(*spellings, dest=flag.replace("-", "_"), nargs="?")
    known, _ = parser.parse_known_args(argv)
    sources = [flag for flag in flags if getattr(known, flag) is not None]
    if len(sources) > 1:
        several = " and ".join(f"--{source}" for source in sources)
        raise ValueError(
            f"{several} each name a whole configuration: give one of them."
        )
    config = TrainConfig()
    if known.preset is not None:
        # The released code splits the batch differently for K > 1.
        particles = known.num_particles or ""
        config = config_lib.preset(
            known.preset, int(particles) if particles.isdecimal() else 1
        )
    elif known.config is not None:
        config = config_lib.load(known.config)
    elif known.resume is not None:
        from otmdr_jax.experiments import run_folder

        config = run_folder.read_config(known.resume)
    if known.method is None and known.base_method is None:
        return config
    chosen = {"method": known.method or config.method.name}
    if known.base_method is not None:
        chosen["base_method"] = known.base_method
    return config.replace(**chosen)


def run(argv: Sequence[str]) -> None:
    """`otmdr train`."""
    from otmdr_jax import parallel

    options, config = parse(argv)
    address = options.coordinator, options.num_processes, options.process_id
    if options.distributed or any(part is not None for part in address):
        parallel.initialize(*address)
        with _leaving_at_once():
            return _train(options, config)
    return _train(options, config)


@contextlib.contextmanager
def _leaving_at_once():
    """Ends a failed process of a run on many hosts without waiting for the others.

    At its exit JAX would wait five minutes for the other hosts, which wait for this
    one. They notice when this process has ended.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, EXPECTED):
            print(f"otmdr: error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        time.sleep(2)  # so that the other hosts can print their errors
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def _train(options: Train, config: TrainConfig) -> None:
    from otmdr_jax import parallel
    from otmdr_jax.experiments import report, training

    resume = options.resume is not None
    for flag in ("output", "resume"):
        if getattr(options, flag) == "":
            raise ValueError(f"--{flag} must name a folder, got an empty text.")
    if resume and options.output is not None:
        raise ValueError("--resume writes to the run's own folder: leave --output out.")
    model = config.model.name
    if config.model.members is not None:
        names = config.model.member_names
        model = f"{len(names)}x{names[0]}" if config.model.stacked else "-".join(names)
    name = f"{pathlib.Path(config.data.name).stem}-{model}-{config.method.name}"
    output = options.resume or options.output or f"runs/{name}-seed{config.run.seed}"
    output = os.path.expanduser(output)  # a shell leaves --output=~/runs alone
    try:
        result = training.train(
            config, output=output, resume=resume, show_progress=not options.quiet
        )
    except training.Interrupted as stop:
        print(f"otmdr: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except training.NonFiniteError as error:
        print(f"otmdr: error: {error}", file=sys.stderr)
        sys.exit(1)
    if not parallel.is_main():
        return
    print_tables(report.read_run(output), output)
    if result.metrics["skipped_steps"]:
        print(f"Steps skipped as not finite: {result.metrics['skipped_steps']}")
    print(f"Run: {output}")
