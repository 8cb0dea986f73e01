"""Methods x seeds x settings from one file: missing runs are trained, none twice.

A file in TOML names the options that all runs share, the seeds, and for each method its
own options:

    seeds = [0, 1, 2]

    [options]
    data = "digits"
    label_noise = 0.2
    epochs = 20

    [methods."SGD"]
    method = "sgd"

    [methods."OT-MDR"]
    method = "otmdr"
    num_particles = [1, 2]          # a list of values: each is run

Epochs, augmentation and model are then equal by construction, and the schedule but for
methods that have one of their own (snapshot, FGE, SWA, SWAG, EDST). A run is a
folder like any other, `OUTPUT/<method>/seed<seed>`.
"""

import itertools
import os
import pathlib
import re
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from otmdr_jax.experiments import building, programs, run_folder, training
from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments.config import TrainConfig, differences
from otmdr_jax.experiments.config.options import LISTS
from otmdr_jax.experiments.measure import cost
from otmdr_jax.io import files
from otmdr_jax.io.progress import Progress

# Options that are lists themselves: of these a list of lists is one of values.
_LISTS = {"rho", "cycle_rates", *LISTS}


class Planned(NamedTuple):
    """A run of a sweep.

    Attributes:
      label: The name that groups it: the method's name in the file, and settings.
      config: Its options, seed included.
      folder: Where it is, or will be.
    """

    label: str
    config: TrainConfig
    folder: pathlib.Path


class Plan(NamedTuple):
    """The runs of a sweep's file.

    Attributes:
      runs: All runs, method by method.
      unequal: Options that differ between methods and are no method's own: what a
        comparison must say.
    """

    runs: list[Planned]
    unequal: list[str]


def plan(path: str | os.PathLike, output: str | os.PathLike) -> Plan:
    """Reads a file of a sweep and checks every run of it.

    Args:
      path: The file.
      output: The folder that the runs' folders are in.

    Returns:
      A :class:`Plan`.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no TOML, or names an unknown table or option, or options that do
        not go together, or two runs with one name.
    """
    path, output = pathlib.Path(path), pathlib.Path(output)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a TOMLDecodeError, or bytes that are no text
        raise ValueError(f"{path} is no TOML file: {error}") from error
    if unknown := sorted(set(content) - {"seeds", "options", "methods"}):
        raise ValueError(
            f"{path} may hold seeds, options and methods; got {', '.join(unknown)}."
        )
    seeds, methods = content.get("seeds", [0]), content.get("methods", {})
    whole = isinstance(seeds, list) and all(type(s) is int for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds must be distinct integers, got {seeds!r}.")
    if not isinstance(methods, dict) or not methods:
        raise ValueError(
            f'{path} must name methods, as [methods."SAM"] with method = "sam" below.'
        )
    planned: list[Planned] = []
    for name, own in methods.items():
        for label, options in _settings(path, name, content.get("options", {}), own):
            for seed in seeds:
                config = _config(path, label, {**options, "seed": seed})
                folder = output / _file_name(label) / f"seed{seed}"
                planned.append(Planned(label, config, folder))
    # Some file systems do not tell upper from lower case.
    folders = [str(one.folder).casefold() for one in planned]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"{path}: two runs would lie in {twice}; rename a method.")
    return Plan(planned, _unequal(planned))


def run(
    planned: Sequence[Planned],
    rows_file: str | os.PathLike,
    *,
    measure_memory: bool = True,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Runs what is missing, resumes what was interrupted, leaves the rest.

    Args:
      planned: The runs, of :func:`plan`.
      rows_file: Where the rows are written, as JSON, after each run.
      measure_memory: Whether rows have the memory of a step, for which it is compiled
        once more.
      show_progress: Whether to show progress.

    Returns:
      A row for each run: label, seed, folder, status ("finished" or "diverged"),
      gradient_evaluations (of the whole run), seconds of its steps, memory_mib of a
      step by the compiler's account, and the numbers of its result.

    Raises:
      ValueError: A folder holds a run with other options.
      FileExistsError: A folder holds something else.
      Interrupted: On Ctrl-C or SIGTERM; the same call goes on.
    """
    check(planned)
    rows_file = pathlib.Path(rows_file)
    known = {row["folder"]: row for row in read_rows(rows_file)}
    memory: dict[TrainConfig, float] = {}
    rows = []
    for i, one in enumerate(planned):
        title = (
            f"run {i + 1} of {len(planned)}: {one.label}, seed {one.config.run.seed}"
        )
        # A row whose folder was deleted says nothing about the next run there.
        old = known.get(str(one.folder), {}) if run_folder.is_run(one.folder) else {}
        status = "finished"
        if _has_diverged(one, old):
            status = "diverged"
        elif state_of(one) != "finished":
            status = _train(one, title, show_progress)
        row = _row(one, status)
        row["memory_mib"] = old.get("memory_mib")
        if row["memory_mib"] is None and measure_memory:
            alike = one.config.replace(seed=0)
            if alike not in memory:
                memory[alike] = _memory(one.config)
            row["memory_mib"] = memory[alike]
        rows.append(row)
        # What is not reached yet, or is not planned this time, keeps its row.
        reached = {str(x.folder) for x in planned[: i + 1]}
        kept = [row for folder, row in known.items() if folder not in reached]
        files.write_json(rows_file, {"rows": [*rows, *kept]})
    return rows


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


def state_of(one: Planned) -> str:
    """What a run's folder holds: "missing", "interrupted" or "finished"."""
    if not run_folder.is_run(one.folder):
        return "missing"
    return "finished" if run_folder.is_finished(one.folder) else "interrupted"


def _has_diverged(one, old):
    """Whether it diverged before and, with the same max_skipped, would again."""
    if old.get("status") != "diverged" or state_of(one) != "interrupted":
        return False
    before = run_folder.read_config(one.folder).run
    return before.max_skipped == one.config.run.max_skipped


def _train(one, title, show_progress):
    with Progress(1, 0, title, show_progress) as bar:
        bar.say(str(one.folder))
    try:
        training.train(
            one.config,
            output=one.folder,
            resume=run_folder.is_run(one.folder),
            show_progress=show_progress,
        )
    except training.NonFiniteError as error:
        with Progress(1, 0, title, show_progress) as bar:
            bar.say(f"diverged: {error}")
        return "diverged"
    return "finished"


def _memory(config):
    mesh = programs.make_mesh(config)
    dataset = programs.load_data(config)
    compiled = programs.compile_programs(config, dataset, mesh)
    return programs.step_memory_mib(compiled, dataset)


def check(planned: Iterable[Planned]) -> None:
    """Raises an error if a folder holds anything but the run that is planned.

    Raises:
      ValueError: A run with other options; a new one with an option without effect.
      FileExistsError: No run.
    """
    for one in planned:
        if not run_folder.is_run(one.folder):
            run_folder.check_free(one.folder)
            one.config.check_used()
            continue
        if changed := differences(run_folder.read_config(one.folder), one.config):
            lines = [f"  {name}: {a!r} -> {b!r}" for name, (a, b) in changed.items()]
            raise ValueError(
                f"{one.folder} was started with other options:\n"
                + "\n".join(lines)
                + "\nName another --output, or restore the file."
            )


def _row(one: Planned, status: str) -> dict[str, Any]:
    finished = run_folder.is_finished(one.folder)
    result = run_folder.read_result(one.folder) if finished else {}
    steps, seconds = result.get("steps"), result.get("seconds_per_step")
    per_step = cost.gradient_evaluations(one.config)
    return {
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


def _settings(path, name, shared, own):
    """(label, options) of a method: one for each combination of its lists of values."""
    if not isinstance(own, dict) or not isinstance(shared, dict):
        raise ValueError(f"{path}: options and methods are tables, as [options].")
    options = {**shared, **own}
    if "method" not in options:
        raise ValueError(
            f'{path}, {name}: say method = "sam", or another: its name in the file is '
            "a label."
        )
    if "seed" in options:
        raise ValueError(
            f"{path}, {name}: seeds = [{options['seed']}] names the seeds."
        )
    several = {key: x for key, x in options.items() if _is_several(key, x)}
    if empty := [key for key, x in several.items() if not x]:
        raise ValueError(f"{path}, {name}: {empty[0]} is a list without values.")
    for values in itertools.product(*several.values()):
        chosen = dict(zip(several, values, strict=True))
        extra = "".join(f", {key} = {_word(x)}" for key, x in chosen.items())
        yield name + extra, {**options, **chosen}


def _is_several(name, value):
    if name in _LISTS:
        return isinstance(value, list) and any(isinstance(x, list) for x in value)
    return isinstance(value, list)


def _word(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _config(path, label, options) -> TrainConfig:
    known = config_lib.known_options()
    # As the command line reads them: 1 is a learning rate too.
    values = {
        name: float(x) if known.get(name) is float and type(x) is int else x
        for name, x in options.items()
    }
    try:
        config = TrainConfig(**values)
        building.check_models(config)
        programs.make_mesh(config)  # whether devices and parts divide the batch
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, {label}: {error}") from error
    return config


def _unequal(planned: Sequence[Planned]) -> list[str]:
    settings = [one.config.flat() for one in planned]
    free = {"method", "members", "seed", *config_lib.method_options()}
    return [
        name
        for name in settings[0]
        if name not in free and len({repr(s[name]) for s in settings}) > 1
    ]


def _file_name(label: str) -> str:
    label = label.replace(" = ", "=")
    return re.sub(r"[^\w.=-]+", "-", label).strip("-.") or "method"
