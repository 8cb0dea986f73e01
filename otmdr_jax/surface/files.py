"""The files of a landscape, which an interrupted one goes on from.

landscape.json          what was measured, and the losses
landscape.npz           the same numbers, exact: axis0, axis1, losses, points
landscape.partial.npz   the losses so far of a grid that is not finished
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from otmdr_jax import runs
from otmdr_jax.programs import environment

NAME = "landscape"


def read(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The record of a finished landscape, losses exact; None where there is none."""
    path = pathlib.Path(folder) / f"{NAME}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as arrays:
        record["losses"] = arrays["losses"].tolist()  # JSON has no NaN
    return record


class Files:
    """The files of one landscape in a folder."""

    def __init__(self, folder: pathlib.Path, settings: dict[str, Any], overwrite: bool):
        """Refuses a folder that holds a landscape of other settings."""
        self.folder, self.settings, self._overwrite = folder, settings, overwrite
        self.partial = folder / f"{NAME}.partial.npz"
        self._known: tuple[np.ndarray, float, int | None] = np.empty(0), 0.0, None
        device = {name: environment()[name] for name in ("device", "jax")}
        self._of_partial = {**settings, **device}
        record = read(folder)
        self._record = None
        if self.partial.exists():
            with np.load(self.partial) as arrays:
                theirs = json.loads(str(arrays["settings"]))
                if theirs == self._of_partial:
                    self._known = (
                        arrays["losses"],
                        float(arrays["seconds"]),
                        int(arrays["at_once"]),
                    )
                    return
            if not overwrite and (record is None or record["settings"] != settings):
                self._refuse("an unfinished landscape", theirs, self._of_partial)
        if record is not None and not overwrite:
            if record["settings"] != settings:
                self._refuse("a landscape", record["settings"], settings)
            self._record = record

    def _refuse(self, what, theirs, ours):
        differ = [
            f"  {name}: {theirs.get(name)!r}, now {value!r}"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        raise FileExistsError(
            f"{self.folder} holds {what} of other settings:\n"
            + "\n".join(differ)
            + "\nReplace it with --overwrite, or name another folder with --output."
        )

    def finished(self) -> dict[str, Any] | None:
        """The record of this very landscape, if it is there already."""
        return self._record

    def known(self) -> tuple[np.ndarray, float, int | None]:
        """Losses so far, the seconds that they took, points at once if it matters."""
        return self._known

    def save(self, losses: np.ndarray, seconds: float, at_once: int) -> None:
        """Saves the losses so far, for the same command to go on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            "losses": losses,
            "seconds": seconds,
            "at_once": at_once,
            "settings": json.dumps(self._of_partial),
        }
        runs.write_arrays(self.partial, arrays)

    def finish(self, record, axes, losses, points) -> None:
        """Writes the record; only then the losses so far go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"axis{i}": axis for i, axis in enumerate(axes)}
        if points is not None:
            arrays["points"] = points
        arrays |= {"losses": losses}
        runs.write_arrays(self.folder / f"{NAME}.npz", arrays)
        runs.write_json(self.folder / f"{NAME}.json", record)
        self.partial.unlink(missing_ok=True)
