"""`otmdr demo` and `otmdr info`: a first experiment, and the environment."""

import dataclasses
import importlib.metadata
import sys

from otmdr_jax._version import __version__


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train SGD, SAM and OT-MDR (K = 1, 2) on digits with noisy labels: two minutes."""

    output: str = "demo-report"
    """Folder of the report; an earlier report in it is replaced."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each method has one run for each seed."""
    epochs: int | None = None
    """Passes over the data. Default: those of the demo preset."""
    quiet: bool = False
    """Show no progress."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Show versions, devices and installed packages."""


def run_demo(options: Demo) -> None:
    """`otmdr demo`."""
    from otmdr_jax.experiments import demo as demo_lib

    demo_lib.run(
        options.output,
        seeds=options.seeds,
        epochs=options.epochs,
        show_progress=not options.quiet,
    )


def run_info(options: Info) -> None:
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
        "train": (
            "orbax-checkpoint",
            "jinja2",
            "matplotlib",
            "rich",
            "tensorboardX",
            "tyro",
        ),
    }
    for extra, names in packages.items():
        print(f"{extra}:")
        for name in names:
            print(f"  {name:<22}{_installed(name, extra)}")


def _installed(name: str, extra: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install otmdr-jax[{extra}])"
