"""The files of a landscape; an interrupted measurement resumes from them.

landscape.json              the settings and the losses
landscape.npz               the exact numbers: axis0, axis1, losses, points
landscape.partial.npz       the losses of an unfinished grid so far
landscape_comparison.json   the settings behind the pictures of a comparison
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from otmdr_jax.experiments import run_folder
from otmdr_jax.experiments.programs import environment
from otmdr_jax.io.files import (
    UNREADABLE,
    check_writable,
    read_json,
    write_arrays,
    write_json,
)

NAME = "landscape"
PICTURES = (f"{NAME}.png", f"{NAME}_surface.png")
COMPARISON = f"{NAME}_comparison.json"

_ELSEWHERE = "name another folder with --output"


def read(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Reads the record of a finished landscape, with exact losses.

    Args:
      folder: Folder of the landscape.

    Returns:
      The record; None if the folder has none.

    Raises:
      ValueError: Files of these names exist, but hold no landscape.
    """
    path = pathlib.Path(folder) / f"{NAME}.json"
    if not path.exists():
        return None
    exact = path.with_suffix(".npz")
    try:
        record = _read_json(path)
        if not exact.is_file():
            raise ValueError(f"{exact.name} is not beside it")
        try:
            with np.load(exact, allow_pickle=False) as arrays:
                record["losses"] = arrays["losses"].tolist()  # JSON has no NaN
        except UNREADABLE as error:
            raise ValueError(f"{exact.name} holds no losses") from error
    except ValueError as error:
        raise ValueError(
            f"{path} must be a landscape that `otmdr landscape` wrote, but {error}. "
            f"Replace it with --overwrite, move it away, or {_ELSEWHERE}."
        ) from error
    return record


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        record = read_json(path)
        dict(record["settings"]), len(record["axes"])
    except UNREADABLE as error:
        raise ValueError("it holds none") from error
    return record


def check_pictures(
    folder: pathlib.Path, comparison: dict[str, Any] | None, overwrite: bool
) -> bool:
    """Refuses to replace pictures of other landscapes than those to be drawn.

    Args:
      folder: Folder of the pictures.
      comparison: Settings of a comparison; None for a single landscape, whose settings
        stand in its landscape.json.
      overwrite: Whether to replace pictures of any origin.

    Returns:
      Whether a surface picture in the folder belongs to the landscape that is replaced.
      It must be deleted if the new landscape has no surface.

    Raises:
      FileExistsError: The folder holds pictures of another comparison, or pictures that
        `otmdr landscape` did not make; or the folder is a file.
    """
    check_writable(folder)
    mark, record = folder / COMPARISON, folder / f"{NAME}.json"
    if mark.exists():
        if comparison is None and not overwrite:
            raise FileExistsError(
                f"{folder} holds a comparison of landscapes. Replace its pictures with "
                f"--overwrite, or {_ELSEWHERE}."
            )
        if comparison is not None:
            run_folder.check_record(mark, comparison, overwrite, _ELSEWHERE)
        try:
            return read_json(mark)["settings"]["dimensions"] == 2
        except UNREADABLE:
            return False
    if comparison is None and record.exists():
        try:
            return len(_read_json(record)["axes"]) == 2
        except ValueError:
            return False  # `Files` will raise
    found = [name for name in PICTURES if (folder / name).exists()]
    if found and not overwrite:
        what = "this comparison" if comparison is not None else "a landscape"
        raise FileExistsError(
            f"{folder} holds {' and '.join(found)}, not drawn from {what}. Replace "
            f"with --overwrite, or {_ELSEWHERE}."
        )
    return False


def mark_pictures(folder: pathlib.Path, comparison: dict[str, Any] | None) -> None:
    """Records which landscapes the pictures show that are about to be drawn.

    Args:
      folder: Folder of the pictures.
      comparison: Settings of a comparison, as for :func:`check_pictures`.
    """
    if comparison is None:
        (folder / COMPARISON).unlink(missing_ok=True)
    else:
        write_json(folder / COMPARISON, {"settings": comparison})


class Files:
    """The files of one landscape in a folder.

    Attributes:
      finished: The record of this very landscape; None if it is not finished.
      known: The losses so far, their seconds and the number of points at once, which is
        None if no measurement is under way.
    """

    def __init__(self, folder: pathlib.Path, settings: dict[str, Any], overwrite: bool):
        """Refuses a folder with a landscape of other settings or with foreign files."""
        check_writable(folder)
        self.folder, self.settings, self._overwrite = folder, settings, overwrite
        self.partial = folder / f"{NAME}.partial.npz"
        self.known: tuple[np.ndarray, float, int | None] = np.empty(0), 0.0, None
        device = {name: environment()[name] for name in ("device", "jax")}
        self._of_partial = {**settings, **device}
        self.finished: dict[str, Any] | None = None
        record = None if overwrite else read(folder)
        theirs, known = self._read_partial() if self.partial.exists() else ({}, None)
        if known is not None and theirs == self._of_partial:
            self.known = known
            return
        if overwrite:
            return
        if record is not None and record["settings"] == settings:
            self.finished = record
        elif known is not None:
            self._refuse("an unfinished landscape", theirs, self._of_partial)
        elif record is not None:
            self._refuse("a landscape", record["settings"], settings)
        elif (folder / f"{NAME}.npz").exists():
            raise FileExistsError(
                f"{folder} holds a {NAME}.npz without the {NAME}.json of a landscape. "
                f"Replace it with --overwrite, move it away, or {_ELSEWHERE}."
            )

    def _read_partial(self):
        """Reads (settings, known); `known` is None if the file may be replaced."""
        try:
            with np.load(self.partial, allow_pickle=False) as arrays:
                theirs = dict(json.loads(str(arrays["settings"])))
                seconds, at_once = float(arrays["seconds"]), int(arrays["at_once"])
                return theirs, (arrays["losses"], seconds, at_once)
        except UNREADABLE as error:
            if self._overwrite:
                return {}, None
            raise ValueError(
                f"{self.partial} must hold the losses of an unfinished landscape, but "
                "it cannot be read. Remove it, start again with --overwrite, or "
                f"{_ELSEWHERE}."
            ) from error

    def _refuse(self, what, theirs, ours):
        raise run_folder.other_settings(
            f"{self.folder} holds {what}", theirs, ours, _ELSEWHERE
        )

    def save(self, losses: np.ndarray, seconds: float, at_once: int) -> None:
        """Saves the losses so far; the same command resumes from them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            "losses": losses,
            "seconds": seconds,
            "at_once": at_once,
            "settings": json.dumps(self._of_partial),
        }
        write_arrays(self.partial, arrays)

    def finish(self, record, axes, losses, points) -> None:
        """Writes the record, then deletes the file of the losses so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"axis{i}": axis for i, axis in enumerate(axes)}
        if points is not None:
            arrays["points"] = points
        arrays |= {"losses": losses}
        write_arrays(self.folder / f"{NAME}.npz", arrays)
        write_json(self.folder / f"{NAME}.json", record)
        self.partial.unlink(missing_ok=True)
