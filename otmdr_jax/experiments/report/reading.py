"""Reads a finished run from its folder and checks it."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments import run_folder
from otmdr_jax.experiments.report.labels import label_of
from otmdr_jax.io import files


class Run(NamedTuple):
    """One finished training run.

    Attributes:
      folder: The run's folder; None for a run made in memory.
      label: Name that groups runs in tables and plots.
      config: The run's options.
      result: Its final numbers on the test set; an unknown number is None.
      history: The lines of metrics.jsonl in order.
      log_probs: (N, C) log-probabilities on the test set.
      labels: (N,) integers, the classes of the test set.
      data: Name, sizes and fingerprints of its data, see
        :func:`otmdr_jax.experiments.programs.describe`; None of runs of older versions.
    """

    folder: pathlib.Path | None
    label: str
    config: dict[str, Any]
    result: dict[str, Any]
    history: list[dict[str, Any]]
    log_probs: np.ndarray
    labels: np.ndarray
    data: dict[str, Any] | None = None


def read_run(folder: str | pathlib.Path, label: str | None = None) -> Run:
    """Reads a run folder.

    A killed run may leave the last line of metrics.jsonl incomplete. Such a line is
    dropped.

    Args:
      folder: Folder with config.json, metrics.jsonl, result.json and predictions.npz.
      label: Name that groups runs. Default: :func:`label_of` its configuration.

    Returns:
      The run.

    Raises:
      FileNotFoundError: The folder is no run folder, or the run is not finished.
      ValueError: A file has wrong content; the message names the file and the line.
    """
    folder = pathlib.Path(folder)
    missing = _missing(folder, "config.json", "metrics.jsonl")
    if missing:
        problem = (
            f"it lacks {missing}" if folder.is_dir() else "there is no such folder"
        )
        raise FileNotFoundError(f"{folder} is not a run folder: {problem}.")
    missing = _missing(folder, "result.json", "predictions.npz")
    if missing:
        raise FileNotFoundError(
            f"{folder} is an unfinished run: it lacks {missing}. Finish it, or write "
            f"the missing files from its last checkpoint: `otmdr evaluate {folder}`."
        )
    config = _read_config(folder / "config.json")
    log_probs, labels = run_folder.read_predictions(folder)
    return Run(
        folder=folder,
        label=label_of(config) if label is None else label,
        config=config,
        result=files.read_json(folder / "result.json"),
        history=_read_history(folder / "metrics.jsonl"),
        log_probs=log_probs,
        labels=labels,
        data=run_folder.read_data(folder),
    )


def _missing(folder: pathlib.Path, *names: str) -> str:
    return " and ".join(name for name in names if not (folder / name).is_file())


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads the options of a run; old files hold the options of all methods."""
    config = files.read_json(path)
    try:
        own = json.loads(files.dumps(config_lib.load(path).flat()))
    except (TypeError, ValueError):
        return config  # another program wrote it; show it unchanged
    return own if set(own) <= set(config) else config


def _read_history(path: pathlib.Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = files.loads(line)
            _check_entry(entry)
        except ValueError as error:
            # Each line ends with a newline. Text after the last newline is an
            # incomplete line, unless only its newline is missing.
            if number == len(lines):
                break
            message = getattr(error, "msg", error)
            raise ValueError(f"{path}, line {number}: {message}.") from error
        history.append(entry)
    return history


def _check_entry(entry: dict[str, Any]) -> None:
    missing = [key for key in ("step", "epoch", "split") if entry.get(key) is None]
    if missing:
        raise ValueError(f"the line has no {' and no '.join(missing)}")
