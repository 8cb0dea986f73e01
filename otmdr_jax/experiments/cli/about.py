"""`otmdr demo` and `otmdr info`: a first experiment, and the environment."""

import dataclasses
import sys

from otmdr_jax._version import __version__
from otmdr_jax.experiments.cli.common import Folder
from otmdr_jax.io import extras


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train SGD, SAM, OT-MDR (K = 1, 2; 3 members) on noisy digits: one minute.

    The report has the table, the curves and every number; the runs are not kept.
    """

    output: Folder = "demo-report"
    """Folder of the report; an earlier one of the demo is replaced."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each method has one run for each seed."""
    epochs: int | None = None
    """Passes over the data. Default: those of the demo preset."""
    jobs: int | None = None
    """Methods trained at a time. Default: 2 where there are cores for them, else 1."""
    quiet: bool = False
    """Show no progress."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Show versions, devices and installed packages."""


def run_demo(options: Demo) -> None:
    """`otmdr demo`."""
    from otmdr_jax.experiments import demo as demo_lib
    from otmdr_jax.experiments import jobs as jobs_lib
    from otmdr_jax.experiments import training

    jobs = min(jobs_lib.most(), 2) if options.jobs is None else options.jobs
    try:
        demo_lib.run(
            options.output,
            seeds=options.seeds,
            epochs=options.epochs,
            jobs=jobs,
            show_progress=not options.quiet,
        )
    except training.Interrupted as stop:
        print("otmdr: stopped; the demo keeps no part of its runs.", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except training.NonFiniteError as error:
        print(f"otmdr: error: {error}", file=sys.stderr)
        sys.exit(1)


def run_info(options: Info) -> None:
    """`otmdr info`."""
    del options
    import jax

    print(f"otmdr_jax {__version__}, Python {sys.version.split()[0]}")
    print(f"backend {jax.default_backend()}:")
    for device in jax.devices():
        print(f"  {device} ({device.device_kind})")
    for extra, names in {"core": ("jax", "jaxlib", "optax"), **extras.EXTRAS}.items():
        print(f"{extra}:")
        for name in names:
            print(f"  {name:<22}{extras.version_of(name) or 'not installed'}")
    for extra, names in extras.EXTRAS.items():
        if any(extras.version_of(name) is None for name in names):
            print(extras.command(extra))
