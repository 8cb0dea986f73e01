"""Files that are whole or not there, and JSON that every parser reads."""

import contextlib
import json
import math
import os
import pathlib
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Names a file in the error of a disk that is full, which names none itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` when it has been written whole.

    Until then it has a name of its own, `NAME.HEX.tmp`, so that several processes may
    write the same path. It is in the same folder, since `os.replace` is atomic within
    one file system.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path), scratch.open("xb") as file:
            yield file
            # Or a machine that loses power may keep the new name without its content.
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def check_writable(folder: pathlib.Path) -> None:
    """Raises an error where nothing can be written into a folder, before long work.

    Args:
      folder: The folder, which may not be there yet.

    Raises:
      NotADirectoryError: A file stands in its place, or in that of a folder above it.
      PermissionError: It is not writable, or cannot be made.
    """
    folder = folder.absolute()
    there = next(x for x in (folder, *folder.parents) if x.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"{there} is a file, and a folder must be there: name another path."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"nothing can be written into {there}: name another path, or change its "
            "permissions."
        )


# What a file of arrays raises that is none, or is torn.
UNREADABLE = (
    OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, TypeError,
)  # fmt: skip


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name as a .npz file, atomically."""
    with replacing(path) as file:
        np.savez(file, **arrays)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes bytes, atomically."""
    with replacing(path) as file:
        file.write(content)


def write_all(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes several files of a folder: all of them, or none if the disk is full.

    They take their names when each has been written, the last one first.

    Args:
      folder: The folder, which is there.
      contents: The content of each file by its name.
    """
    with contextlib.ExitStack() as waiting:
        for name, content in contents.items():
            file = waiting.enter_context(replacing(folder / name))
            file.write(content)
            file.flush()  # here a full disk is seen
            os.fsync(file.fileno())


def write_json(path: pathlib.Path, value: Any, default: Any = None) -> None:
    """Writes a value as strict JSON, atomically.

    Args:
      path: The file.
      value: What :func:`dumps` takes.
      default: A function that makes JSON's values of others. Default: they are errors.
    """
    write_text(path, document(value, default))


def document(value: Any, default: Any = None) -> str:
    """The text that :func:`write_json` writes."""
    return dumps(value, indent=2, default=default) + "\n"


def dumps(value: Any, **options: Any) -> str:
    """A value as strict JSON: null stands for NaN and infinities."""
    return json.dumps(strict(value), allow_nan=False, **options)


def strict(value: Any) -> Any:
    """The value as JSON gives it back: None for NaN, lists for tuples."""
    if isinstance(value, Mapping):
        return {name: strict(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loads(text: str | bytes) -> dict[str, Any]:
    """The object that a text of strict JSON holds.

    Raises:
      ValueError: It is no JSON (a `json.JSONDecodeError`), holds NaN or an infinity, or
        holds something else than an object.
    """
    value = json.loads(text, parse_constant=_refuse)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object must stand here, got {type(value).__name__}")
    return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object that a file of strict JSON holds, see :func:`loads`.

    Raises:
      ValueError: As of :func:`loads`, with the file and the line.
    """
    try:
        return loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}.") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON; what is unknown is written as null")
