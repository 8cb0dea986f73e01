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

A table [tuning] says how each method's settings are chosen before:

    [tuning]
    metric = "nll"                  # on the validation set
    seeds = [10, 11]

Epochs, augmentation and model are then equal by construction, and the schedule but for
methods that have one of their own (snapshot, FGE, SWA, SWAG, EDST). A run is a
folder like any other, `OUTPUT/<method>/seed<seed>`.
"""

import itertools
import math
import os
import pathlib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from otmdr_jax.experiments import building, programs, run_folder
from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments import jobs as jobs_lib
from otmdr_jax.experiments.config import TrainConfig, differences
from otmdr_jax.experiments.config.options import LISTS
from otmdr_jax.experiments.measure import cost
from otmdr_jax.io import files

# What settings may be chosen by, and whether less of it is better.
METRICS = {"nll": True, "accuracy": False, "brier": True, "ece": True}
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


class Setting(NamedTuple):
    """A method with one value for each of its options.

    Attributes:
      method: The method's name in the file.
      label: That and its values, of the options that have several in the file.
      ends: The options whose value is the first or last of three or more in the file.
    """

    method: str
    label: str
    ends: tuple[str, ...]


class Tuning(NamedTuple):
    """How the setting of each method is chosen.

    Attributes:
      metric: A name in `METRICS`, on the validation set.
      runs: The runs of all settings of the methods that have several.
    """

    metric: str
    runs: list[Planned]


class Plan(NamedTuple):
    """The runs of a sweep's file.

    Attributes:
      runs: All runs, method by method; with `tuning` those of every setting, of which
        :func:`chosen` names one for each method.
      unequal: Options that differ between methods and are no method's own: what a
        comparison must say.
      settings: All settings.
      tuning: How they are chosen. None: all of them are run.
    """

    runs: list[Planned]
    unequal: list[str]
    settings: list[Setting]
    tuning: Tuning | None = None


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
    if unknown := sorted(set(content) - {"seeds", "options", "methods", "tuning"}):
        raise ValueError(
            f"{path} may hold seeds, options, methods and tuning; got "
            f"{', '.join(unknown)}."
        )
    seeds, methods = content.get("seeds", [0]), content.get("methods", {})
    _check_seeds(f"{path}: seeds", seeds)
    if not isinstance(methods, dict) or not methods:
        raise ValueError(
            f'{path} must name methods, as [methods."SAM"] with method = "sam" below.'
        )
    metric, tuning_seeds = _tuning(path, content.get("tuning"))
    planned: list[Planned] = []
    settings: list[Setting] = []
    trials: list[Planned] = []
    for name, own in methods.items():
        for setting, options in _settings(path, name, content.get("options", {}), own):
            settings.append(setting)
            several = setting.label != name
            for seed in dict.fromkeys([*seeds, *(tuning_seeds if several else ())]):
                config = _config(path, setting.label, {**options, "seed": seed})
                folder = output / _file_name(setting.label) / f"seed{seed}"
                one = Planned(setting.label, config, folder)
                if seed in seeds:
                    planned.append(one)
                if several and seed in tuning_seeds:
                    trials.append(one)
    # Some file systems do not tell upper from lower case.
    folders = [str(one.folder).casefold() for one in planned]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"{path}: two runs would lie in {twice}; rename a method.")
    if metric is None:
        return Plan(planned, _unequal(planned), settings)
    if not trials:
        raise ValueError(f"{path}: tuning has nothing to choose: no option has values.")
    for one in trials:
        if not one.config.data.validation:
            raise ValueError(
                f"{path}, {one.label}: tuning needs a validation set, as "
                "validation = 0.2 in [options]."
            )
    return Plan(planned, _unequal(planned), settings, Tuning(metric, trials))


class Tuned(NamedTuple):
    """What a tuning found.

    Attributes:
      scores: The mean validation metric of each setting, by its label.
      chosen: The best setting of each method, in the file's order.
      runs: The runs of these settings.
    """

    scores: dict[str, float]
    chosen: list[Setting]
    runs: list[Planned]


def tune(
    plan: Plan,
    rows_file: str | os.PathLike,
    *,
    jobs: int = 1,
    show_progress: bool = True,
) -> Tuned:
    """Runs what is missing of a tuning, and chooses each method's setting.

    Args:
      plan: A plan with `tuning`.
      rows_file: Where the rows of its runs are written, as JSON.
      jobs: How many runs are trained at a time, as in :func:`run`.
      show_progress: Whether to show progress.

    Returns:
      A :class:`Tuned`; :func:`run` takes its `runs`.

    Raises:
      ValueError: As :func:`run` and :func:`chosen`.
      Interrupted: On Ctrl-C or SIGTERM; the same call goes on.
    """
    assert plan.tuning is not None
    rows = run(
        plan.tuning.runs,
        rows_file,
        jobs=jobs,
        measure_memory=False,
        show_progress=show_progress,
    )
    found = scores(plan, rows)
    best = chosen(plan, found)
    labels = {one.label for one in best}
    return Tuned(found, best, [one for one in plan.runs if one.label in labels])


def scores(plan: Plan, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean validation metric of each setting over the seeds of the tuning.

    Args:
      plan: A plan with `tuning`.
      rows: The rows of its runs, of :func:`run`.

    Returns:
      {label: mean}; NaN where a run diverged.
    """
    assert plan.tuning is not None
    name = f"validation_{plan.tuning.metric}"
    values: dict[str, list[float]] = {}
    for row in rows:
        found = row.get(name) if row["status"] == "finished" else None
        values.setdefault(row["label"], []).append(math.nan if found is None else found)
    return {label: sum(found) / len(found) for label, found in values.items()}


def chosen(plan: Plan, found: Mapping[str, float]) -> list[Setting]:
    """The best setting of each method on the validation set.

    Args:
      plan: A plan with `tuning`.
      found: The scores, of :func:`scores`.

    Returns:
      A setting for each method, in the file's order; the first of equal ones.

    Raises:
      ValueError: A run of every setting of a method diverged.
    """
    assert plan.tuning is not None
    sign = 1 if METRICS[plan.tuning.metric] else -1
    best = []
    for method in dict.fromkeys(setting.method for setting in plan.settings):
        those = [one for one in plan.settings if one.method == method]
        if len(those) > 1:
            those = [one for one in those if not math.isnan(found[one.label])]
        if not those:
            raise ValueError(
                f"a run of every setting of {method} diverged: add a smaller value."
            )
        best.append(min(those, key=lambda one: sign * found.get(one.label, 0.0)))
    return best


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
      jobs: How many runs are trained at a time, on processors. Each has cores of its
        own: small networks finish sooner so than one after another with all cores.
      measure_memory: Whether rows have the memory of a step, for which it is compiled
        once more.
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
    known = {row["folder"]: row for row in read_rows(rows_file)}
    memory: dict[TrainConfig, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    # A row whose folder was deleted says nothing about the next run there.
    before = {
        one.folder: known.get(str(one.folder), {})
        if run_folder.is_run(one.folder)
        else {}
        for one in planned
    }

    def note(one, status):
        row = _row(one, status)
        row["memory_mib"] = before[one.folder].get("memory_mib")
        if row["memory_mib"] is None and measure_memory:
            alike = one.config.replace(seed=0)
            if alike not in memory:
                memory[alike] = _memory(one.config)
            row["memory_mib"] = memory[alike]
        rows[str(one.folder)] = row
        # What is not reached yet, or is not planned this time, keeps its row.
        kept = [row for folder, row in known.items() if folder not in rows]
        files.write_json(rows_file, {"rows": [*_in_order(planned, rows), *kept]})

    missing = []
    for one in planned:
        if _has_diverged(one, before[one.folder]):
            note(one, "diverged")
        elif state_of(one) == "finished":
            note(one, "finished")
        else:
            missing.append(one)
    for one, status in jobs_lib.train(missing, jobs, show_progress=show_progress):
        note(one, status)
    return _in_order(planned, rows)


def _in_order(planned, rows):
    folders = [str(one.folder) for one in planned]
    return [rows[folder] for folder in folders if folder in rows]


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


def _check_seeds(what, seeds):
    whole = isinstance(seeds, list) and all(type(s) is int for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{what} must be distinct integers, got {seeds!r}.")


def _tuning(path, table):
    """(metric, seeds) of the table [tuning]; (None, []) without one."""
    if table is None:
        return None, []
    if not isinstance(table, dict) or set(table) != {"metric", "seeds"}:
        raise ValueError(
            f'{path}: [tuning] must have metric, as "nll", and seeds, as [10, 11], and '
            "nothing else."
        )
    if table["metric"] not in METRICS:
        raise ValueError(
            f"{path}: the metric of tuning must be of {', '.join(METRICS)}; got "
            f"{table['metric']!r}."
        )
    _check_seeds(f"{path}: seeds of tuning", table["seeds"])
    return table["metric"], table["seeds"]


def _settings(path, name, shared, own):
    """(setting, options) for each combination of a method's lists of values."""
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
        picked = dict(zip(several, values, strict=True))
        extra = "".join(f", {key} = {_word(x)}" for key, x in picked.items())
        ends = tuple(
            key
            for key, x in picked.items()
            if len(several[key]) > 2 and x in (several[key][0], several[key][-1])
        )
        yield Setting(name, name + extra, ends), {**options, **picked}


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
