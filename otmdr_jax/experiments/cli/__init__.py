"""The command line `otmdr`: one module for each command."""

import contextlib
import gc
import hashlib
import inspect
import io
import logging
import os
import pathlib
import platform
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from otmdr_jax._version import __version__
from otmdr_jax.io import extras

try:
    import tyro
except ImportError:
    sys.exit(f"otmdr needs tyro, which is not installed. {extras.command('train')}")

from otmdr_jax.experiments import interrupts
from otmdr_jax.experiments.cli import (
    about,
    calibrate,
    compare,
    ensemble,
    evaluate,
    export,
    landscape,
    predict,
    report,
    reproduce,
    sharpness,
    shift,
    sweep,
    train,
)
from otmdr_jax.experiments.cli.common import EXPECTED
from otmdr_jax.experiments.options import Seed, check, hint

# A command -> its options and what it does, in the order of a first session.
COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (train.Train, train.run),
    "evaluate": (evaluate.Evaluate, evaluate.run),
    "calibrate": (calibrate.Calibrate, calibrate.run),
    "predict": (predict.Predict, predict.run),
    "export": (export.Export, export.run),
    "sharpness": (sharpness.Sharpness, sharpness.run),
    "shift": (shift.Shift, shift.run),
    "landscape": (landscape.Landscape, landscape.run),
    "report": (report.Report, report.run),
    "compare": (compare.Compare, compare.run),
    "ensemble": (ensemble.Ensemble, ensemble.run),
    "sweep": (sweep.Sweep, sweep.run),
    "reproduce": (reproduce.Reproduce, reproduce.run),
    "demo": (about.Demo, about.run_demo),
    "info": (about.Info, about.run_info),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: Arguments. Default: those of the process.

    Raises:
      SystemExit: With status 0 after a help text, 1 if a run diverged, 2 if the request
        is not possible, and 128 + n if signal n stopped a run, or a reader of its
        output that had enough (`otmdr info | head -1`).
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show an arrow shows a "?": no error after the work.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if argv is None:  # a process of its own
        # What is imported stays: the collector need not walk through it each time.
        gc.freeze()
    try:
        with warnings.catch_warnings(), interrupts.remembered():
            warnings.showwarning = _say_warning
            _run(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:  # None where it was closed before the start
            sys.stdout.flush()
    except KeyboardInterrupt:
        # A run in training says itself what it has saved; nothing else is half written.
        print("otmdr: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # Else Python fails once more as it closes its output at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if argv[0] == "--version":
        print(__version__)
        return
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        near = hint(argv[0], COMMANDS)
        _fail(
            f"unknown command {argv[0]!r}.{near} There are {known}. See otmdr --help."
        )
    # Orbax warns when a checkpoint is opened for reading only, as evaluation does.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if "" not in sys.path:
        sys.path.insert(0, "")  # networks of one's own may stand in this folder
    kind, function = COMMANDS[argv[0]]
    _cache_programs()
    try:
        if kind is train.Train:  # the method decides which options it has
            return function(argv[1:])
        options: Any = tyro.cli(
            kind,
            prog=f"otmdr {argv[0]}",
            # Given as a whole, because tyro's own parser drops the examples.
            description=inspect.getdoc(kind),
            args=argv[1:],
        )
        if (seed := getattr(options, "seed", None)) is not None:
            check("seed", seed, Seed)  # before a run is read
        function(_expanded(options))
    except BrokenPipeError:  # an OSError that is no error
        raise
    except EXPECTED as error:
        if interrupts.came_early():  # a library may call it what it likes
            raise KeyboardInterrupt from error
        _fail(str(error))
    except (RuntimeError, AssertionError):
        _check_platforms()
        raise


def _check_platforms() -> None:
    """Ends the command where JAX finds no device of the platforms that it is told."""
    import jax

    if not (platforms := getattr(jax.config, "jax_platforms", None)):
        return
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        _fail(
            f"JAX finds no device of JAX_PLATFORMS={platforms!r}: unset it, or install "
            "what the device needs, as pip install 'otmdr_jax[cuda13]'."
        )


def _expanded(options: Any) -> Any:
    """The options with a home folder for ~, which a shell leaves in --output=~/runs."""

    def expand(value):
        if isinstance(value, tuple):
            return tuple(map(expand, value))
        home = isinstance(value, str) and (value + "/").startswith("~/")
        return os.path.expanduser(value) if home else value

    found = {x.name: expand(getattr(options, x.name)) for x in fields(options)}
    return replace(options, **found)


def _cache_programs() -> None:
    """Keeps compiled programs on disk, so that the next run does not compile again.

    JAX_COMPILATION_CACHE_DIR names the folder. Default: a folder beside the data cache,
    in which each kind of processor has its own, since a program of one may not run on
    another. JAX's own default keeps programs of a second and more; a run has dozens of
    smaller ones, which together take longer.
    """
    import jax

    from otmdr_jax.data import cache

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        folder = cache.default_directory() / "programs" / _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor() -> str:
    """Returns a name that differs where the instructions of processors do."""
    facts = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        facts += "".join(sorted({x for x in lines if x.startswith(("flags", "model"))}))
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _say_warning(message: Any, *_: Any, **__: Any) -> None:
    """Shows a warning without the line of code that it comes from."""
    print(f"otmdr: warning: {message}", file=sys.stderr)


def _overview() -> str:
    lines = ["usage: otmdr COMMAND [OPTIONS]", "", "commands:"]
    for name, (kind, _) in COMMANDS.items():
        lines.append(f"  {name:<10}{(kind.__doc__ or '').splitlines()[0]}")
    lines += ["", "otmdr COMMAND --help explains every option."]
    return "\n".join(lines)


def _fail(message: str) -> None:
    print(f"otmdr: error: {message}", file=sys.stderr)
    sys.exit(2)
