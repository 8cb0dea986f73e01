"""Trains what is missing of a sweep, and keeps a row for each run."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from otmdr_jax.experiments import jobs as jobs_lib
from otmdr_jax.experiments import programs, run_folder
from otmdr_jax.experiments.config import TrainConfig, differences
from otmdr_jax.experiments.measure import cost
from otmdr_jax.experiments.sweep.planning import Planned
from otmdr_jax.io import files


def run(
    planned: Sequence[Planned],
    rows_file: str | os.PathLike,
    *,
    jobs: int = 1,
    measure_memory: bool = True,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Runs what is missing, resumes what was interrupted, leaves the rest.

    Args:
      planned: The runs, of :func:`plan`.
      rows_file: Where the rows are written, as JSON, after each run.
      jobs: How many runs are trained at a time, on processors. Each has its share of
        the cores: small networks finish sooner so than one after another with all of
        them. A script that asks for several needs `if __name__ == "__main__":`.
      measure_memory: Whether rows have the memory of a step, for which it is compiled
        once more after the last run.
      show_progress: Whether to show progress.

    Returns:
      A row for each run: label, seed, folder, status ("finished" or "diverged"),
      gradient_evaluations (of the whole run), seconds of its steps, memory_mib of a
      step by the compiler's account, and the numbers of its result.

    Raises:
      ValueError: A folder holds a run with other options; more jobs than cores.
      FileExistsError: A folder holds something else.
      Interrupted: On Ctrl-C or SIGTERM; the same call goes on.
    """
    check(planned)
    jobs_lib.check(jobs)
    rows_file = pathlib.Path(rows_file)
    known = _by_place(read_rows(rows_file))
    memory: dict[TrainConfig, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    # A row whose folder was deleted says nothing about the next run there.
    before = {
        one.folder: known.get(_place(one.folder), {})
        if run_folder.is_run(one.folder)
        else {}
        for one in planned
    }

    def note(one, status):
        row = _row(one, status)
        row["memory_mib"] = before[one.folder].get("memory_mib")
        rows[str(one.folder)] = row
        write()

    def write():
        # What is not reached yet, or is not planned this time, keeps its row; so does
        # what another process has written by now.
        done = set(map(_place, rows))
        there = _by_place(read_rows(rows_file))
        kept = [row for place, row in there.items() if place not in done]
        files.write_json(rows_file, {"rows": [*_in_order(planned, rows), *kept]})

    missing = []
    for one in planned:
        if _has_diverged(one, before[one.folder]):
            note(one, "diverged")
        elif state_of(one) == "finished":
            note(one, "finished")
        else:
            missing.append(one)
    alone = [[one] for one in missing]
    for one, status in jobs_lib.train(alone, jobs, show_progress=show_progress):
        note(one, status)
    if measure_memory:
        for one in planned:
            row = rows[str(one.folder)]
            if row["memory_mib"] is None:
                alike = one.config.replace(seed=0)
                if alike not in memory:
                    memory[alike] = _memory(one.config)
                row["memory_mib"] = memory[alike]
        write()
    return _in_order(planned, rows)


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows that :func:`run` wrote; none where there is no such file."""
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    rows = files.read_json(path).get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and "folder" in row for row in rows
    ):
        raise ValueError(f"{path} holds no rows of a sweep: move it away.")
    return rows


def _place(folder: str | os.PathLike) -> tuple[str, ...]:
    """What names a run, wherever the folder of the sweep is: its label and its seed."""
    return pathlib.Path(folder).parts[-2:]


def _by_place(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    return {_place(row["folder"]): row for row in rows}


def state_of(one: Planned) -> str:
    """What a run's folder holds: "missing", "interrupted" or "finished"."""
    if not run_folder.is_run(one.folder):
        return "missing"
    return "finished" if run_folder.is_finished(one.folder) else "interrupted"


def check(planned: Iterable[Planned]) -> None:
    """Raises an error if a folder holds anything but the run that is planned.

    Raises:
      ValueError: A run with other options or of other data; a new one with an option
        without effect.
      FileExistsError: No run.
    """
    described: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in planned:
        if not run_folder.is_run(one.folder):
            run_folder.check_free(one.folder)
            one.config.check_used()
            continue
        changed = differences(run_folder.read_config(one.folder), one.config)
        known = run_folder.read_data(one.folder)
        if known and _has_moved(*changed.get("data", ("", None))):
            _check_data(one, known["fingerprint"], described)
            del changed["data"]
        if changed:
            lines = [f"  {name}: {a!r} -> {b!r}" for name, (a, b) in changed.items()]
            raise ValueError(
                f"{one.folder} was started with other options:\n"
                + "\n".join(lines)
                + "\nName another --output, or restore the file."
            )


def _has_moved(before, now):
    return bool(now) and pathlib.Path(before).name == pathlib.Path(now).name


def _check_data(one, fingerprint, described):
    """Refuses data that a run was not started with: a file of the same name may do."""
    named = tuple((k, repr(x)) for k, x in vars(one.config.data).items())
    if named not in described:
        described[named] = programs.describe(programs.load_data(one.config))
    programs.check_same_data(fingerprint, described[named]["fingerprint"], one.folder)


def _in_order(planned, rows):
    folders = [str(one.folder) for one in planned]
    return [rows[folder] for folder in folders if folder in rows]


def _has_diverged(one, old):
    """Whether it diverged before and, with the same max_skipped, would again."""
    if old.get("status") != "diverged" or state_of(one) != "interrupted":
        return False
    before = run_folder.read_config(one.folder).run
    return before.max_skipped == one.config.run.max_skipped


def _memory(config):
    mesh = programs.make_mesh(config)
    dataset = programs.load_data(config)
    compiled = programs.compile_programs(config, dataset, mesh)
    return programs.step_memory_mib(compiled, dataset)


def _row(one: Planned, status: str) -> dict[str, Any]:
    finished = run_folder.is_finished(one.folder)
    result = run_folder.read_result(one.folder) if finished else {}
    steps, seconds = result.get("steps"), result.get("seconds_per_step")
    per_step = cost.gradient_evaluations(one.config)
    held_out = run_folder.read_validation(one.folder) if finished else {}
    return {
        **{f"validation_{name}": value for name, value in held_out.items()},
        **{
            name: value
            for name, value in result.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        },
        "label": one.label,
        "seed": one.config.run.seed,
        "folder": str(one.folder),
        "status": status,
        "gradient_evaluations": None if steps is None else per_step * steps,
        "seconds": None if steps is None or seconds is None else steps * seconds,
    }
