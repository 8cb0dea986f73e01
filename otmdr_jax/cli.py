"""The command line: `otmdr train | evaluate | compare | ensemble | demo | info`."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from otmdr_jax import config as config_lib
from otmdr_jax._version import __version__
from otmdr_jax.config import TrainConfig

try:
    import tyro
except ImportError:
    sys.exit("otmdr needs tyro, which is not installed: pip install otmdr-jax[train]")

# Errors that say all there is to say: no traceback.
EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model. Every option has a default; a run's folder holds them all.

    Examples:
    otmdr train --method otmdr --num-particles 2

    otmdr train --preset paper-cifar10 --data-dir ~/tensorflow_datasets

    otmdr train --resume runs/digits-cnn_small-otmdr-seed0

    otmdr train --members 5 --model resnet_10 --data cifar10

    otmdr train --method otmdr-bnn --optimizer adam --learning-rate 1e-3

    otmdr train --mesh data=4,particle=2 --num-particles 2

    srun otmdr train --distributed --output /shared/run
    """

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    preset: str | None = None
    """Start from a named configuration: demo, paper-cifar10, paper-cifar100,
    released-cifar10, released-cifar100, released-mode1.1-cifar10,
    released-mode1.1-cifar100, released-ensemble-cifar10, released-ensemble-cifar100,
    sam-cifar10, sam-cifar100; Bayesian networks: paper-bnn-cifar10,
    paper-bnn-cifar100, released-bnn-cifar10, released-bnn-cifar100, sgvb-cifar10,
    sgvb-cifar100. Options given beside it win.
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


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run: prints a table, writes evaluation.json and reliability.png.

    Of a Bayesian network it also writes signal_to_noise.png.

    An interrupted run gets its result.json and can then be compared with others.
    """

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    split: Literal["test", "validation", "train"] = "test"
    """Which examples."""
    checkpoint: str = "latest"
    """Which checkpoint: latest, best (on the validation set), or a step."""
    data_dir: str | None = None
    """Folder of prepared TFDS data, if it is no longer where the run found it."""
    num_samples: int | None = None
    """Samples of the posterior of a Bayesian network, instead of the run's own."""
    prediction: Literal["samples", "mean"] | None = None
    """Predict with samples of the posterior or with its mean, instead of the run's."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs side by side: a table, learning curves, reliability diagrams.

    Runs that differ in their seed alone are one row: mean and standard deviation.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs."""
    output: str = "comparison"
    """Folder of the report; an earlier report in it is replaced."""
    title: str = "Comparison"
    """Title of the report."""


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Make an ensemble of finished runs: add members, drop members, train none.

    Examples:
    otmdr ensemble runs/a runs/b --output runs/ab

    otmdr ensemble runs/five --keep 0 2 3 --output runs/three
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of finished runs, of single models or ensembles: same data and options,
    but for model and seed."""
    output: str
    """Folder of the new run. The others stay as they are."""
    keep: tuple[int, ...] | None = None
    """Members to take, counted from 0 over all runs in their order. Default: all."""
    data_dir: str | None = None
    """Folder of prepared TFDS data, if it is no longer where the runs found it."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train SGD, SAM and OT-MDR (K = 1, 2) on digits with noisy labels: two minutes."""

    output: str = "demo-report"
    """Folder of the report; an earlier report in it is replaced."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds: one run of each method for each."""
    epochs: int | None = None
    """Passes over the data. Default: the demo's own."""
    quiet: bool = False
    """Show no progress."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Show versions, devices and what is installed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: The arguments; None for the process's own.

    Raises:
      SystemExit: Status 0; 1 for a run that diverged; 2 for what cannot be done as
        asked; 128 + n for a run stopped by signal n.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[type, Callable[[Any], None]]] = {
        "train": (Train, train),
        "evaluate": (Evaluate, evaluate),
        "compare": (Compare, compare),
        "ensemble": (Ensemble, ensemble),
        "demo": (Demo, demo),
        "info": (Info, info),
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(commands))
        return
    if argv[0] == "--version":
        print(__version__)
        return
    if argv[0] not in commands:
        known = ", ".join(commands)
        _fail(f"unknown command {argv[0]!r}; there are {known}. See otmdr --help.")
    kind, function = commands[argv[0]]
    _cache_programs()
    try:
        default = _train_default(argv[1:]) if kind is Train else None
        options = tyro.cli(
            kind, prog=f"otmdr {argv[0]}", args=argv[1:], default=default
        )
        function(options)
    except EXPECTED as error:
        _fail(str(error))


def train(options: Train) -> None:
    """`otmdr train`."""
    from otmdr_jax import parallel

    address = options.coordinator, options.num_processes, options.process_id
    if options.distributed or any(part is not None for part in address):
        parallel.initialize(*address)
        with _leaving_at_once():
            return _train(options)
    return _train(options)


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
    from otmdr_jax import parallel, report, training

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
    _print_tables(report.read_run(output), output)
    if result.metrics["skipped_steps"]:
        print(f"Skipped, not finite: {result.metrics['skipped_steps']} steps.")
    print(f"Run: {output}")


def evaluate(options: Evaluate) -> None:
    """`otmdr evaluate RUN`."""
    from otmdr_jax import (
        bnn,
        building,
        checkpoint,
        combine,
        evaluation,
        programs,
        report,
        runs,
    )
    from otmdr_jax.members import steps_taken

    folder = pathlib.Path(options.run)
    config = runs.read_config(folder)
    given = {
        name: getattr(options, name)
        for name in ("data_dir", "num_samples", "prediction")
        if getattr(options, name) is not None
    }
    if given.get("prediction") == "mean" and "num_samples" not in given:
        given["num_samples"] = bnn.NUM_SAMPLES  # the run's own number has no meaning
    config = dataclasses.replace(config, **given)
    building.method_options(config)  # before the data are read
    dataset = programs.load_data(config)
    if getattr(dataset, options.split) is None:
        raise ValueError(
            f"{folder} was trained without a {options.split} set: use --split test."
        )
    compiled = programs.compile_programs(config, dataset)
    with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as saved:
        step = _step(options.checkpoint, saved)
    restored = combine.restore(config, compiled, folder, step)
    data = programs.fingerprint(dataset)
    programs.check_same_data(restored.meta["data"], data, folder)
    state = restored.state
    diverged = tuple(restored.meta.get("diverged", ()))
    found = evaluation.evaluate(
        config,
        state,
        dataset,
        options.split,
        compiled,
        without=diverged,
        show_progress=True,
    )
    sharp = evaluation.sharpness(config, state, dataset, compiled, without=diverged)
    result = {
        "split": options.split,
        "checkpoint": options.checkpoint,
        "steps": steps_taken(state),
        **found.metrics,
        "sharpness": sharp["sharpness"],
        "train_nll": sharp["train_nll"],
        "seconds_per_step": None,
        **programs.environment(),
    }
    if found.members is not None:
        result["members"] = evaluation.member_rows(
            config, state, found, sharp, restored.meta
        )
    how = ""
    if posterior := evaluation.posterior_record(compiled, state, diverged):
        result["posterior"] = posterior
        samples = config.prediction == "samples"
        how = f", {config.num_samples} samples" if samples else ", mean"
        result["prediction"] = config.prediction
        result["num_samples"] = config.num_samples if samples else None
    labels = getattr(dataset, options.split).labels
    runs.write_json(folder / "evaluation.json", result)
    latest = options.split == "test" and options.checkpoint == "latest"
    latest = latest and not {"num_samples", "prediction"} & set(given)
    whole = runs.is_finished(folder) and (folder / "predictions.npz").exists()
    if latest and not whole:
        # The run's result until it is resumed and finished.
        runs.write_result(
            folder, result, found.log_probs, labels, found.member_log_probs
        )
    label = report.label_of(dataclasses.asdict(config))
    run = report.Run(
        folder, label, dataclasses.asdict(config), result, [], found.log_probs, labels
    )
    title = f"{folder}, step {result['steps']}, {options.split} set{how}"
    _print_tables(run, title)
    written = [folder / "evaluation.json", folder / "reliability.png"]
    report.plot_reliability([run], folder / "reliability.png")
    if posterior:
        written.append(folder / "signal_to_noise.png")
        report.plot_signal_to_noise([run], written[-1])
    print(f"Written: {', '.join(map(str, written))}")


def compare(options: Compare) -> None:
    """`otmdr compare RUN RUN ...`."""
    from otmdr_jax import report

    if not options.runs:
        raise ValueError("name the folders of at least one run.")
    found = [report.read_run(run) for run in options.runs]
    found = report.with_distinct_labels(found)
    columns = report.known_columns(found)
    report.print_table(report.summarise(found, columns), title=options.title)
    command = "otmdr compare " + " ".join(options.runs)
    path = report.write(options.output, found, options.title, command=command)
    print(f"Report: {path}")


def ensemble(options: Ensemble) -> None:
    """`otmdr ensemble RUN RUN ...`."""
    from otmdr_jax import combine, report

    if not options.runs:
        raise ValueError("name the folders of at least one run.")
    combine.combine(
        options.runs, options.output, options.keep, data_dir=options.data_dir
    )
    _print_tables(report.read_run(options.output), options.output)
    print(f"Run: {options.output}")


def demo(options: Demo) -> None:
    """`otmdr demo`."""
    from otmdr_jax import demo as demo_lib

    demo_lib.run(
        options.output,
        seeds=options.seeds,
        epochs=options.epochs,
        show_progress=not options.quiet,
    )


def info(options: Info) -> None:
    """`otmdr info`."""
    del options
    import jax

    print(f"otmdr_jax {__version__}, Python {sys.version.split()[0]}")
    print(f"backend {jax.default_backend()}:")
    for device in jax.devices():
        print(f"  {device} ({device.device_kind})")
    packages = {
        "core": ("jax", "jaxlib", "optax"),
        "models": ("flax",),
        "data": ("tensorflow-datasets", "array-record", "pillow", "scikit-learn"),
        "train": ("orbax-checkpoint", "matplotlib", "rich", "tensorboardX", "tyro"),
    }
    for extra, names in packages.items():
        print(f"{extra}:")
        for name in names:
            print(f"  {name:<22}{_installed(name, extra)}")


def _print_tables(run: Any, title: str) -> None:
    """A run's metrics and, of an ensemble, its members'."""
    from otmdr_jax import diversity, report

    columns = report.known_columns([run])
    report.print_table(report.summarise([run], columns), title=title)
    if of_members := report.member_runs(run):
        columns = [c for c in columns if c.name != "seconds_per_step"]
        rows = report.summarise(of_members, columns)
        report.print_table(rows, title=f"{title}: members")
        found = [f"{n} {run.result[n]:.4g}" for n in diversity.NAMES if n in run.result]
        print(f"Diversity: {', '.join(found) or 'not defined'}")


def _train_default(argv: Sequence[str]) -> Train:
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
        from otmdr_jax import runs

        config = runs.read_config(known.resume)
    return Train(config, known.preset, known.config, None, known.resume)


def _cache_programs() -> None:
    """Keeps compiled programs on disk, so that a resumed run need not compile again.

    JAX's own JAX_COMPILATION_CACHE_DIR says where; without it, beside the data cache.
    """
    import jax

    from otmdr_jax.data import cache

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        folder = cache.default_directory() / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _step(word: str, saved: Any) -> int | None:
    if word == "latest":
        return None
    if word == "best":
        step = saved.best_step()
        if step is None:
            raise ValueError(
                "no checkpoint was scored: a run has a best one if it was trained with "
                "--validation. Use --checkpoint latest."
            )
        return step
    if not word.isdigit():
        raise ValueError(f"checkpoint must be latest, best or a step, got {word!r}.")
    return int(word)


def _installed(name: str, extra: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install otmdr-jax[{extra}])"


def _overview(commands: dict[str, tuple[type, Any]]) -> str:
    lines = ["usage: otmdr COMMAND [OPTIONS]", "", "commands:"]
    for name, (kind, _) in commands.items():
        lines.append(f"  {name:<10}{(kind.__doc__ or '').splitlines()[0]}")
    lines += ["", "otmdr COMMAND --help explains every option."]
    return "\n".join(lines)


def _fail(message: str) -> None:
    print(f"otmdr: error: {message}", file=sys.stderr)
    sys.exit(2)
