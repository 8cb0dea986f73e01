"""The folder of a run, whose files are written so that nothing gets lost.

config.json       every option
data.json         the data: name, sizes, checksums, mean and deviation
initial.json      the weights that it started from, where these were given: their
                  checksum, and what was drawn anew
metrics.jsonl     one line an event: {"step", "epoch", "split", ...}
events.out...     the same for TensorBoard, where tensorboardX is installed
checkpoints/      see otmdr_jax.experiments.checkpoint
result.json       the final metrics
predictions.npz   log_probs (N, C) and labels (N,) of the test set
seen.npz          of swa, swag and laplace: what the pass over the training set gave
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.tensorboard import Board
from otmdr_jax.io import files


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from writing into a folder, to the end of this one's work.

    The lock is the system's, on the folder itself: nothing is left behind by a process
    that is killed. Where a system or a file system has no such locks nothing is locked.

    Args:
      path: The folder, which is there.

    Raises:
      FileExistsError: Another process works on it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            raise FileExistsError(
                f"another process is writing into {path}. Wait for its end, or stop it "
                "(Ctrl-C saves its state); a new run needs another --output."
            ) from error
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def claimed(path: str | os.PathLike) -> Iterator[None]:
    """Makes a folder for a new run, :func:`locked` from the start.

    Raises:
      FileExistsError: The folder holds something, or another process works on it.
    """
    path = pathlib.Path(path)
    check_free(path)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        check_free(path)  # another process may have been quicker
        yield


class RunFolder:
    """A run's folder, open for writing. Use :func:`create` or :func:`reopen`."""

    def __init__(self, path: str | os.PathLike, step: int = 0):
        """Opens the logs, to go on after `step`."""
        self.path = pathlib.Path(path)
        self._lines = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
        self._board = Board(self.path, step)

    def log(self, record: dict[str, Any]) -> None:
        """Appends an event with step, epoch, split and numbers."""
        if os.fstat(self._lines.fileno()).st_nlink == 0:
            raise FileNotFoundError(
                f"{self.path / 'metrics.jsonl'} was removed, or replaced, while the "
                "run was writing it: the run stops, since it could not be resumed."
            )
        with files.naming(self.path / "metrics.jsonl"):
            self._lines.write(files.dumps(record) + "\n")
            self._lines.flush()
        self._board.log(record)

    def close(self) -> None:
        """Closes the logs."""
        self._lines.close()
        self._board.close()


def create(
    path: str | os.PathLike, config: TrainConfig, data: dict[str, Any]
) -> RunFolder:
    """Makes the folder of a new run.

    Args:
      path: The folder.
      config: The run's options.
      data: What :func:`otmdr_jax.experiments.programs.describe` says of its data.

    Raises:
      FileExistsError: The folder holds something already.
    """
    path = pathlib.Path(path)
    check_free(path)
    path.mkdir(parents=True, exist_ok=True)
    describe(path, config, data)
    return RunFolder(path)


def withdraw(path: pathlib.Path) -> None:
    """Empties the folder of a new run that failed before it had anything to keep.

    The folder stays, and whatever else is in it; so does a run with a line in its log
    or a checkpoint.
    """
    log, saved = path / "metrics.jsonl", path / "checkpoints"
    if log.is_file() and log.stat().st_size > 0:
        return
    if saved.is_dir() and any(saved.iterdir()):
        return
    shutil.rmtree(saved, ignore_errors=True)
    for name in ("config.json", "data.json", "metrics.jsonl"):
        (path / name).unlink(missing_ok=True)
    for board in path.glob("events.out.tfevents.*"):
        board.unlink()


def describe(path: pathlib.Path, config: TrainConfig, data: dict[str, Any]) -> None:
    """Writes data.json and config.json into a run's folder."""
    files.write_json(path / "data.json", data)
    config_lib.save(config, path / "config.json")  # the last: it makes it a run


def record_start(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes initial.json, or refuses other weights than those that it is of.

    Args:
      path: The run's folder.
      record: What :func:`otmdr_jax.experiments.training.initial.read` says of them.

    Raises:
      ValueError: A run that was interrupted before its first checkpoint started from
        other weights.
    """
    file = path / "initial.json"
    if file.exists() and files.read_json(file)["checksum"] != record["checksum"]:
        raise ValueError(
            f"{path} started from other weights than those of {record['init_from']} "
            "now, and was stopped before it saved any: start a new run."
        )
    files.write_json(file, record)


def read_data(path: str | os.PathLike) -> dict[str, Any] | None:
    """Reads the record of a run's data; None for a run of an older version.

    Raises:
      ValueError: The file is torn, or lacks a field that its version has.
    """
    path = pathlib.Path(path) / "data.json"
    if not path.is_file():
        return None
    record = files.read_json(path)
    needed = ["name", "fingerprint", "num_classes"]
    if "mean" in record:  # since runs predict new images without their data
        needed += ["image_shape", "dtype", "std", "augment", "train"]
    missing = [name for name in needed if record.get(name) is None]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: copy it again from where the run was "
            "trained, or remove it, and what needs the data reads them."
        )
    return record


def read_predictions(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads log_probs (N, C) and labels (N,) of a run's test set.

    Raises:
      ValueError: The file is torn, or holds something else.
    """
    path = pathlib.Path(path) / "predictions.npz"
    try:
        # np.load of a path leaves the file open where it is torn.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            log_probs, labels = arrays["log_probs"], arrays["labels"]
        if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1]:
            raise ValueError(f"they have shapes {log_probs.shape} and {labels.shape}")
    except files.UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as log_probs (N, C) and labels (N,) ({error}): "
            f"move it away, and write it again with `otmdr evaluate {path.parent}`."
        ) from error
    return log_probs, labels


def check_classes(path: str | os.PathLike, what: str) -> None:
    """Refuses a run whose targets are no class numbers.

    Args:
      path: The run's folder.
      what: What is for classes alone.

    Raises:
      ValueError: They are none.
    """
    record = read_data(path)
    if record is not None and not record["num_classes"]:
        raise ValueError(
            f"{what} is for classifiers, and the targets of {path} are no class "
            "numbers. In Python, open_run(folder).predict(inputs) gives its outputs, "
            "and open_run(folder, dataset=..., loss=...) is what measures take."
        )


def check_free(path: str | os.PathLike) -> None:
    """Raises FileExistsError unless a folder may be that of a new run."""
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if is_run(path) and is_finished(path):
            advice = "It is a finished run; leave it as it is"
        elif is_run(path):
            advice = f"Go on with it (otmdr train --resume {path})"
        else:
            advice = "It is no run of otmdr_jax; leave it alone"
        raise FileExistsError(
            f"{path} is not empty. {advice}, or name another folder with --output."
        )


def is_run(path: str | os.PathLike) -> bool:
    """Whether a folder was made by :func:`create`."""
    return (pathlib.Path(path) / "config.json").is_file()


def is_finished(path: str | os.PathLike) -> bool:
    """Whether a run came to its end and wrote its result."""
    result = pathlib.Path(path) / "result.json"
    return result.is_file() and bool(files.read_json(result).get("finished"))


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """The result of a finished run, or of an evaluation of an interrupted one."""
    return files.read_json(pathlib.Path(path) / "result.json")


def read_validation(path: str | os.PathLike) -> dict[str, float]:
    """The metrics of a run's last evaluation on its validation set; {} without one."""
    found: dict[str, float] = {}
    with contextlib.suppress(FileNotFoundError):
        text = (pathlib.Path(path) / "metrics.jsonl").read_text(encoding="utf-8")
        for line in text.splitlines():
            # A killed run may have left a torn line.
            with contextlib.suppress(json.JSONDecodeError, TypeError):
                event = json.loads(line)
                if event["split"] == "validation":
                    found = {k: v for k, v in event.items() if isinstance(v, float)}
    found.pop("epoch", None)
    return found


def read_config(path: str | os.PathLike) -> TrainConfig:
    """The configuration of a run.

    Raises:
      FileNotFoundError: The folder is no run.
    """
    if not is_run(path):
        raise FileNotFoundError(
            f"{path} is no run folder: it holds no config.json. Runs are made by "
            "`otmdr train`."
        )
    return config_lib.load(pathlib.Path(path) / "config.json")


def reopen(path: str | os.PathLike, step: int) -> RunFolder:
    """Opens the folder of an interrupted run to go on after `step`.

    Events after that step are dropped: they will happen again.
    """
    path = pathlib.Path(path)
    if not is_finished(path):
        # An evaluation of the interrupted run, about to be out of date.
        for name in ("result.json", "predictions.npz"):
            (path / name).unlink(missing_ok=True)
    events = path / "metrics.jsonl"
    if events.exists():
        # A machine that crashes may leave bytes of another file at the end.
        lines = events.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line for line in lines if _until(line, step)]
        files.write_text(events, "".join(line + "\n" for line in kept))
    return RunFolder(path, step)


def write_result(
    path: str | os.PathLike,
    result: dict[str, Any],
    log_probs: Any,
    labels: Any,
    member_log_probs: Any = None,
) -> None:
    """Writes result.json and predictions.npz, each atomically."""
    write_predictions(path, log_probs, labels, member_log_probs)
    files.write_json(pathlib.Path(path) / "result.json", result)


def write_predictions(
    path: str | os.PathLike, log_probs: Any, labels: Any, member_log_probs: Any = None
) -> None:
    """Writes predictions.npz, atomically.

    Where targets are no classes, outputs and targets stand in the places of
    log-probabilities and labels.
    """
    labels = np.asarray(labels)
    kind = np.int32 if labels.dtype.kind in "iub" else np.float32  # targets
    arrays: dict[str, Any] = {
        "log_probs": np.asarray(log_probs, np.float32),
        "labels": labels.astype(kind),
    }
    if member_log_probs is not None:  # (M, N, C)
        arrays["member_log_probs"] = np.asarray(member_log_probs, np.float32)
    files.write_arrays(pathlib.Path(path) / "predictions.npz", arrays)


def write_seen(path: str | os.PathLike, step: int, seen: Any) -> None:
    """Writes what a pass over the training set gave, so that none is needed again.

    Args:
      path: The run's folder.
      step: The step of the state that the pass was for.
      seen: See :meth:`otmdr_jax.experiments.methods.MethodOptions.seen`.
    """
    leaves = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(seen))}
    arrays = {"step": np.asarray(step), **leaves}
    files.write_arrays(pathlib.Path(path) / "seen.npz", arrays)


def read_seen(path: str | os.PathLike, step: int, shapes: Any) -> Any:
    """Reads what a pass over the training set gave; None where it was not written.

    Args:
      path: The run's folder.
      step: The step of the state that it is wanted for: of another one it is of no use.
      shapes: The shapes that it must have.
    """
    path = pathlib.Path(path) / "seen.npz"
    if not path.is_file():
        return None
    leaves, structure = jax.tree.flatten(shapes)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = [arrays[f"leaf{i}"] for i in range(len(arrays) - 1)]
            if int(arrays["step"]) != step:
                return None
    except files.UNREADABLE:  # torn: the pass is made anew
        return None
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in leaves]:
        return None
    return jax.tree.unflatten(structure, found)


def read_temperature(path: str | os.PathLike, step: int) -> float | None:
    """The temperature that `otmdr calibrate` fitted for new images at a step, or None.

    Args:
      path: The run's folder.
      step: The step of the state that predicts.
    """
    path = pathlib.Path(path) / "calibration.json"
    if not path.is_file():
        return None
    record = files.read_json(path)
    if record.get("settings", {}).get("step") != step:
        return None
    return record.get("temperature")


def check_record(
    path: pathlib.Path,
    settings: dict[str, Any],
    overwrite: bool,
    instead: str = "move it away",
) -> None:
    """Refuses to replace a record of other settings, before a new one is made.

    Args:
      path: The record's JSON file, which may not be there.
      settings: What the new record's numbers depend on; it will hold them under that
        name.
      overwrite: Whether it may be replaced whatever it is.
      instead: What else can be done, for the error.

    Raises:
      FileExistsError: The file is a record of other settings, or does not say of which.
      PermissionError: The folder is not writable.
    """
    files.check_writable(path.parent)
    if overwrite or not path.exists():
        return
    try:
        theirs = files.read_json(path)["settings"]
        names = set(theirs) | set(settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileExistsError(
            f"{path} is there and does not say of which settings it is. Replace it "
            f"with --overwrite, or {instead}."
        ) from error
    if any(theirs.get(name) != files.strict(settings.get(name)) for name in names):
        raise other_settings(
            f"{path.parent} holds a {path.name}", theirs, settings, instead
        )


def write_record(
    path: pathlib.Path,
    record: dict[str, Any],
    settings: dict[str, Any],
    overwrite: bool,
) -> None:
    """Writes a record with its settings, after :func:`check_record` once more.

    Another process may have written one of other settings in the meantime.
    """
    check_record(path, settings, overwrite)
    files.write_json(path, {**record, "settings": settings})


def other_settings(
    what: str, theirs: dict[str, Any], ours: dict[str, Any], instead: str
) -> FileExistsError:
    """The error that something of other settings stands in the way, with what differs.

    Args:
      what: Who holds what, in words.
      theirs: Its settings.
      ours: Those that are asked for.
      instead: What else can be done than to replace it.
    """
    differ = [
        f"  {name}: {theirs.get(name)!r}, now {files.strict(ours.get(name))!r}"
        for name in dict.fromkeys((*ours, *theirs))
        if theirs.get(name) != files.strict(ours.get(name))
    ]
    return FileExistsError(
        "\n".join([f"{what} of other settings:", *differ])
        + f"\nReplace it with --overwrite, or {instead}."
    )


def _until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False  # the line that a killed run was writing
