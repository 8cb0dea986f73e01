"""The packages that each extra brings, and how those that are missing are installed."""

import importlib.metadata

# As in pyproject.toml, without those that only prepare data.
EXTRAS = {
    "models": ("flax",),
    "data": ("tensorflow-datasets", "array-record", "grain", "pillow", "scikit-learn"),
    "train": (
        "flax",
        "orbax-checkpoint",
        "scikit-learn",
        "jinja2",
        "matplotlib",
        "markdown-it-py",
        "rich",
        "flatbuffers",
        "safetensors",
        "tensorboardX",
        "tyro",
    ),
}


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command(extra: str) -> str:
    """What installs an extra, with all that is missing of it, to end an error with.

    Args:
      extra: The extra's name.

    Example:
      >>> from otmdr_jax.io import extras
      >>> extras.command("models")
      "Run, in a clone of otmdr_jax: pip install '.[models]'."
    """
    missing = [name for name in EXTRAS[extra] if version_of(name) is None]
    brings = f" It brings {', '.join(missing)}." if missing else ""
    return f"Run, in a clone of otmdr_jax: pip install '.[{extra}]'.{brings}"
