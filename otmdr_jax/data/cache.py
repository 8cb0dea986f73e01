"""A cache of decoded arrays, one file for each prepared folder.

The file is an uncompressed .npz that appears under its name only when it is whole, see
:mod:`otmdr_jax.io.files`. A manifest in it says which data it was made from; zip's
checksums cover every byte of every array. A file that does not match counts as absent,
and the caller decodes again.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from otmdr_jax.io import files

logger = logging.getLogger(__name__)

# Raise this when what is stored, or how it is decoded, changes.
FORMAT_VERSION = 1

_STALE_SECONDS = 3600.0


def default_directory() -> pathlib.Path:
    """$OTMDR_CACHE, else $XDG_CACHE_HOME/otmdr_jax, else ~/.cache/otmdr_jax."""
    if own := os.environ.get("OTMDR_CACHE"):
        return pathlib.Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "otmdr_jax"


def fingerprint(folder: pathlib.Path) -> str:
    """A hash that changes when a prepared folder is made again or swapped.

    Args:
      folder: A folder with JSON metadata, which is read, and record files, whose name,
        size and modification time count: hashing their contents would take as long as
        decoding them.

    Returns:
      64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        stat = file.stat()
        if file.suffix == ".json":
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            content = f"{stat.st_size} {stat.st_mtime_ns}"
        digest.update(json.dumps([file.name, content]).encode())
    return digest.hexdigest()


def file_path(directory: pathlib.Path, identity: Mapping[str, str]) -> pathlib.Path:
    """The file of an `identity`, which has a name, a version and a fingerprint."""
    name = "-".join(identity[key] for key in ("name", "version")).replace("/", "-")
    start = identity["fingerprint"][:16]
    return directory / f"{name}-v{FORMAT_VERSION}-{start}.npz"


def read(path: pathlib.Path, identity: Mapping[str, str]) -> dict[str, Any] | None:
    """Reads the arrays that `write` stored under the same identity.

    Args:
      path: A path from `file_path`.
      identity: The identity, which must equal the one in the file's manifest.

    Returns:
      Arrays by name, or None if the file is absent, damaged or of other data; the
      latter two are logged as warnings.
    """
    if not path.exists():
        return None
    try:
        # np.load of a path leaves the file open where it is no zip; this does not.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            manifest = json.loads(str(file["manifest"]))
            # Reading a member to its end checks its CRC-32.
            arrays = {key: file[key] for key in file.files if key != "manifest"}
        if manifest != _manifest(identity, arrays):
            raise ValueError("its manifest describes other data")
    except Exception as error:  # a cache can be damaged in any way
        logger.warning("The cache %s is unusable and is made again: %s", path, error)
        return None
    return arrays


def write(
    path: pathlib.Path, identity: Mapping[str, str], arrays: Mapping[str, np.ndarray]
) -> None:
    """Stores arrays so that `path` is either whole or not there.

    If the cache cannot be written (a full or read-only disk), a warning is logged: the
    data are in memory, so the caller can go on.
    """
    manifest = np.array(json.dumps(_manifest(identity, arrays)))
    contents: dict[str, Any] = {"manifest": manifest, **arrays}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        files.write_arrays(path, contents)
    except OSError as error:
        logger.warning("The cache %s could not be written: %s", path, error)


def _manifest(identity: Mapping[str, str], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The description that the file must hold, in types that JSON keeps unchanged."""
    described = {k: [list(a.shape), str(a.dtype)] for k, a in arrays.items()}
    return {"format": FORMAT_VERSION, **identity, "arrays": described}


def _remove_stale(path: pathlib.Path) -> None:
    """Removes what a killed process left; a young file may belong to a live writer."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()
