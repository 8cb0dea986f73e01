"""An ensemble out of finished runs: members are added or dropped, none is retrained."""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from otmdr_jax.data import Dataset
from otmdr_jax.experiments import (
    checkpoint,
    members,
    programs,
    restore,
    run_folder,
    training,
)
from otmdr_jax.experiments.config import differences
from otmdr_jax.experiments.measure.evaluation import evaluate_run
from otmdr_jax.experiments.methods import TrainState
from otmdr_jax.io import files

PyTree = Any

# What members of one ensemble may differ in.
_FREE = ("model", "members", "seed", "member_data", "data")  # data: by its checksums


def combine(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    keep: Sequence[int] | None = None,
    *,
    dataset: Dataset | None = None,
    data_dir: str | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Makes a run of an ensemble from the members of finished runs.

    Args:
      folders: Finished runs, of single models or of independent ensembles, of the same
        data and options; they may differ in their models and seeds. They stay as they
        are.
      output: The new run's folder: evaluated, and to be used like any other.
      keep: Which members, counted from 0 over all runs in their order; None for all.
      dataset: The runs' data; None to load them as the first run's options say.
      data_dir: Folder of prepared TFDS data, if no longer where the first run found it.
      show_progress: Whether to show progress.

    Returns:
      The new run's result, as in its result.json.

    Raises:
      FileNotFoundError: A folder is no run, or has no checkpoint.
      FileExistsError: `output` holds something.
      ValueError: A run is not finished, its options or data differ, its ensemble is
        joint; members that are not there, or fewer than two.
    """
    paths = [pathlib.Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(
            f"each run must be named once, got {', '.join(map(str, paths))}: a member "
            "that counts twice adds nothing."
        )
    configs = [run_folder.read_config(path) for path in paths]
    for path, found in zip(paths, configs, strict=True):
        _check_run(path, found, paths[0], configs[0])
    names = [name for found in configs for name in found.model.member_names]
    kept = list(range(len(names))) if keep is None else list(keep)
    if len(set(kept)) != len(kept) or not set(kept) <= set(range(len(names))):
        raise ValueError(
            f"keep must name members once each, out of 0..{len(names) - 1} of "
            f"{', '.join(map(str, paths))}; got {kept}."
        )
    if len(kept) < 2:
        raise ValueError(
            f"an ensemble needs at least two members, got {len(kept)} of "
            f"{', '.join(map(str, paths))}."
        )
    new = _config_of(configs[0], [names[i] for i in kept], data_dir)
    dataset = programs.load_data(new) if dataset is None else dataset
    run_folder.check_free(output)
    files.check_writable(pathlib.Path(output))
    state, meta = _load(paths, configs, dataset, kept, new.model.stacked)
    compiled = programs.compile_programs(new, dataset)
    of_run = evaluate_run(
        new,
        state,
        dataset,
        compiled,
        splits=("test",),
        without=tuple(meta["diverged"]),
        show_progress=show_progress,
    )
    result = training.final_result(new, of_run, dataset, compiled, meta)
    path = pathlib.Path(output)
    with run_folder.claimed(path):
        try:
            _write(path, new, state, meta, of_run, result, dataset)
        except BaseException:
            for there in path.iterdir():  # all of it is ours: it was empty
                shutil.rmtree(there) if there.is_dir() else there.unlink()
            raise
    return result


def _write(path, config, state, meta, of_run, result, dataset):
    """Writes the run: config.json, which makes it one, when all else is there.

    A run that lacked its checkpoint would be trained anew by `otmdr train --resume`.
    """
    with checkpoint.Checkpoints(
        path / "checkpoints", scored=dataset.validation is not None
    ) as saved:
        saved.save(state, meta)
    tested = of_run.splits["test"]
    record = {"step": result["steps"], "epoch": result["epochs"], "split": "test"}
    with contextlib.closing(run_folder.RunFolder(path)) as folder:
        folder.log({**record, **tested.metrics})
    if of_run.seen is not None:
        run_folder.write_seen(path, result["steps"], of_run.seen)
    run_folder.write_result(
        path, result, tested.log_probs, dataset.test.labels, tested.member_log_probs
    )
    run_folder.describe(path, config, programs.describe(dataset))


def _check_run(path, found, first_path, first):
    if (run_folder.read_data(path) or {}).get("loss") is not None:
        raise ValueError(
            f"{path} has a loss that was given in Python: train its members together, "
            "train(config.replace(members=...), loss=...)."
        )
    if not run_folder.is_finished(path):
        raise ValueError(
            f"{path} is not finished: go on with otmdr train --resume {path}."
        )
    if found.model.members is not None and found.model.ensemble == "joint":
        raise ValueError(
            f"{path} has a joint loss: its members were trained for each other and "
            "cannot be taken apart."
        )
    changed = differences(first, found)
    differ = {name: pair for name, pair in changed.items() if name not in _FREE}
    if differ:
        lines = [f"  {name}: {a!r} and {b!r}" for name, (a, b) in differ.items()]
        raise ValueError(
            f"{first_path} and {path} were trained with different options:\n"
            + "\n".join(lines)
        )


def _config_of(first, names, data_dir):
    """The first run's options, for the members that are kept."""
    of_one = len(set(names)) == 1
    return first.replace(
        model=names[0] if of_one else None,  # the default
        members=str(len(names)) if of_one else ",".join(names),
        data_dir=data_dir or first.data.data_dir,
        mesh=None,
    )


def _load(paths, configs, dataset, kept, stacked):
    """The members' states, joined, and what is known of them."""
    states: list[TrainState] = []
    diverged: list[int] = []
    where: list[pathlib.Path] = []  # the run of each
    meta: dict[str, Any] = {}
    data = programs.fingerprint(dataset)
    for path, found in zip(paths, configs, strict=True):
        compiled = programs.compile_programs(found, dataset)
        with checkpoint.Checkpoints(path / "checkpoints", read_only=True) as saved:
            programs.check_same_data(saved.meta()["data"], data, path, dataset)
        state, own_meta = restore.restore(found, compiled, path)
        diverged += [len(states) + i for i in own_meta.get("diverged", [])]
        states += members.separate(state)
        where += [path] * (len(states) - len(where))
        meta = meta or own_meta
    _check_distinct({i: states[i] for i in kept}, where)
    place = {member: i for i, member in enumerate(kept)}
    state = members.join([states[i] for i in kept], stacked)
    mine = sorted(place[i] for i in diverged if i in place)
    meta |= {"best": None, "speeds": [], "diverged": mine, "mesh": "one device"}
    return state, meta


def _check_distinct(kept: dict[int, TrainState], where: list[pathlib.Path]) -> None:
    """Refuses one network twice: by its weights, since a run may have been copied."""
    found: dict[bytes, int] = {}
    for i, state in kept.items():
        total = hashlib.sha256()
        for leaf in jax.tree.leaves(state.params):
            total.update(np.ascontiguousarray(leaf).tobytes())
        first = found.setdefault(total.digest(), i)
        if first != i:
            raise ValueError(
                f"members {first} (of {where[first]}) and {i} (of {where[i]}) have the "
                "same weights, and a member that counts twice adds nothing: leave one "
                "of the runs out, or name the members to keep."
            )
