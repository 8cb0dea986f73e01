"""TFDS's builder of a name, once it is prepared as array_record.

TFDS resolves names, versions and features. A set that is missing, in another format, or
without an image and a class gives an error that says what to do.
"""

import contextlib
import difflib
import logging
import os
from collections.abc import Iterator
from typing import Any

from otmdr_jax.io import extras


def open_builder(name, data_dir, *, download):
    """TFDS, and the builder of a set that is prepared in the right format."""
    tfds = _import_tfds()
    data_dir = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    builder = _find(tfds, name, data_dir)
    with _without_warnings():  # the error below says it, and what to do
        ready = builder.is_prepared()
    if not ready:
        if not download:
            raise FileNotFoundError(
                f"{name!r} must be prepared in {str(builder.data_path)!r}, and it is "
                "not there. Pass the data_dir that has it, or prepare it once (this "
                "downloads, and most sets need TensorFlow for it): "
                f"{_command(name, data_dir)}"
            )
        _prepare(builder, name)
    _check_format(builder, name, data_dir)
    return tfds, builder


def _import_tfds():
    try:
        import array_record.python.array_record_module  # noqa: F401
        import PIL.Image  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "reading TFDS data needs tensorflow-datasets, array-record and pillow, and "
            f"importing failed with: {error}. {extras.command('data')}"
        ) from error
    return tfds


def _command(name: str, data_dir: str | None) -> str:
    """The shell command that prepares a set in the format this module reads."""
    where = "" if data_dir is None else f", data_dir={data_dir!r}"
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}).download_and_prepare("
        "file_format='array_record')\""
    )


def _find(tfds, name: str, data_dir: str | None):
    """The builder of a name, from TFDS's own code or from the prepared folder."""
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # TFDS raises AssertionError, ValueError and others
        # Community sets are left out: listing them needs the network.
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        family = name.split(":")[0].split("/")[0]
        if family in known:
            raise ValueError(
                f"TFDS cannot open {name!r}: {error} Correct the config or version, "
                "or repair the files."
            ) from error
        close = difflib.get_close_matches(family.lower(), known, n=3, cutoff=0.5)
        hint = f"close names: {', '.join(close)}" if close else "no name is close"
        raise ValueError(
            'data must be "digits", a TFDS dataset, an .npz file or a folder of images '
            f"(./photos), got {name!r}; {hint}. For prepared data of your own, check "
            f"data_dir ({data_dir!r})."
        ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppresses warnings that TFDS logs."""
    log = logging.getLogger("absl")

    def serious(record):
        return record.levelno > logging.WARNING

    log.addFilter(serious)
    try:
        yield
    finally:
        log.removeFilter(serious)


def _prepare(builder, name: str) -> None:
    try:
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        raise ImportError(
            f"preparing {name!r} needs more than reading it, and importing failed "
            f"with: {error}. Run: pip install tensorflow importlib_resources. They are "
            "needed once; a prepared folder is read without them, also on another "
            "machine."
        ) from error


def _check_format(builder, name: str, data_dir: str | None) -> None:
    formats = {str(f.value) for f in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ValueError(
            f"{name!r} must be prepared as array_record to be read without TensorFlow, "
            f"and {str(builder.data_path)!r} holds {', '.join(sorted(formats))}. "
            "Delete that folder, or choose another data_dir, and prepare it again: "
            f"{_command(name, data_dir)}"
        )


def find_keys(tfds, builder, name: str) -> tuple[str, str]:
    """Finds the features that hold the image and its class."""
    features = builder.info.features

    def fits(pair: Any) -> bool:
        kinds = tfds.features.Image, tfds.features.ClassLabel
        return (
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(key, str) and key in features for key in pair)
            and all(type(features[k]) is t for k, t in zip(pair, kinds, strict=True))
        )

    for pair in (builder.info.supervised_keys, ("image", "label")):
        if fits(pair):
            return pair
    found = features.items() if hasattr(features, "items") else [("", features)]
    listed = ", ".join(f"{key}: {type(value).__name__}" for key, value in sorted(found))
    raise ValueError(
        f"{name!r} must have an Image and a ClassLabel feature, as its supervised keys "
        f'or named "image" and "label", but it has {listed}. Save the arrays you want '
        "as an .npz file and load that."
    )
