"""`otmdr train`: one run, from options, a preset, a file or an interrupted run."""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated

import tyro

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments.cli.common import EXPECTED, print_tables
from otmdr_jax.experiments.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model. Every option has a default; a run's folder holds them all.

    Examples:
    otmdr train --method otmdr --num-particles 2

    otmdr train --preset paper-cifar10 --data-dir ~/tensorflow_datasets

    otmdr train --resume runs/digits-cnn_small-otmdr-seed0

    otmdr train --members 5 --model resnet_10 --data cifar10

    otmdr train --method otmdr-bnn --optimizer adam --learning-rate 1e-3

    otmdr train --method bsam --learning-rate 0.5 --num-subbatches 4

    otmdr train --method snapshot --cycles 5 --epochs 40

    otmdr train --mesh data=4,particle=2 --num-particles 2

    srun otmdr train --distributed --output /shared/run
    """

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    preset: str | None = None
    """Start from a named configuration: demo, paper-cifar10, paper-cifar100,
    released-cifar10, released-cifar100, released-mode1.1-cifar10,
    released-mode1.1-cifar100, released-ensemble-cifar10, released-ensemble-cifar100,
    sam-cifar10, sam-cifar100, bsam-cifar10, bsam-cifar100; Bayesian networks:
    paper-bnn-cifar10, paper-bnn-cifar100, released-bnn-cifar10,
    released-bnn-cifar100, sgvb-cifar10, sgvb-cifar100; ensembles and competitors, each
    with -cifar10 or -cifar100: deep-ensemble, sam-ensemble, otmdr-ensemble, snapshot,
    fge, swa, swag, dst, edst. Options given beside it win.
    """
    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """Start from a configuration file, such as a run's config.json."""
    output: str | None = None
    """Folder of the run. Default: runs/<data>-<model>-<method>-seed<seed>."""
    resume: str | None = None
    """Go on with an interrupted run, given its folder; its options hold."""
    quiet: bool = False
    """Show no progress."""
    distributed: bool = False
    """Join a run on many hosts: start the same command on each. On SLURM, Open MPI,
    Kubernetes and Cloud TPU nothing else is needed; --output must be on a file system
    that all hosts share."""
    coordinator: str | None = None
    """host:port of process 0, on clusters that JAX does not know."""
    num_processes: int | None = None
    """How many processes there are, with --coordinator."""
    process_id: int | None = None
    """Which one this is, from 0, with --coordinator."""


def run(options: Train) -> None:
    """`otmdr train`."""
    from otmdr_jax import parallel

    address = options.coordinator, options.num_processes, options.process_id
    if options.distributed or any(part is not None for part in address):
        parallel.initialize(*address)
        with _leaving_at_once():
            return _train(options)
    return _train(options)


def default_of(argv: Sequence[str]) -> Train:
    """The options that --preset, --config or --resume stand for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags = ("preset", "config", "resume")
    for flag in flags:
        parser.add_argument(f"--{flag}")
    parser.add_argument("--num-particles", type=int, default=1)
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
        config = config_lib.preset(known.preset, known.num_particles)
    elif known.config is not None:
        config = config_lib.load(known.config)
    elif known.resume is not None:
        from otmdr_jax.experiments import run_folder

        config = run_folder.read_config(known.resume)
    return Train(config, known.preset, known.config, None, known.resume)


@contextlib.contextmanager
def _leaving_at_once():
    """On many hosts, ends a process that failed without waiting for the others.

    JAX would wait at its exit for hosts that wait for this one, five minutes long. Once
    it is gone, they notice.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, EXPECTED):
            print(f"otmdr: error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        time.sleep(2)  # for what the others have to say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def _train(options: Train) -> None:
    from otmdr_jax import parallel
    from otmdr_jax.experiments import report, training

    config = options.config
    resume = options.resume is not None
    if resume and options.output is not None:
        raise ValueError("--resume goes on in the run's own folder: give no --output.")
    model = config.model
    if config.members is not None:
        names = config.member_names
        model = f"{len(names)}x{names[0]}" if config.stacked else "-".join(names)
    name = f"{pathlib.Path(config.data).stem}-{model}-{config.method}"
    output = options.resume or options.output or f"runs/{name}-seed{config.seed}"
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
        print(f"Skipped, not finite: {result.metrics['skipped_steps']} steps.")
    print(f"Run: {output}")
