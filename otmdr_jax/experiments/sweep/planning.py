"""What a sweep's file means: its runs, and the settings to choose from."""

import itertools
import os
import pathlib
import re
import tomllib
from collections.abc import Sequence
from typing import NamedTuple

from otmdr_jax.experiments import building, programs
from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.config.options import LISTS

# What settings may be chosen by, and whether less of it is better.
METRICS = {"nll": True, "accuracy": False, "brier": True, "ece": True}
# What a sweep writes beside the folders of its methods.
_OURS = {"report", "sweep.json", "tuning.json"}
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
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is not there: it describes a sweep."
        ) from error
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
    if both := sorted({*seeds} & {*tuning_seeds}):
        raise ValueError(
            f"{path}: a setting may be chosen for its luck with a seed, so seeds of "
            f"tuning must be others than those of the comparison; got {both[0]} twice."
        )
    planned: list[Planned] = []
    settings: list[Setting] = []
    trials: list[Planned] = []
    for name, own in methods.items():
        for setting, options in _settings(path, name, content.get("options", {}), own):
            settings.append(setting)
            several = setting.label != name
            for seed in [*seeds, *(tuning_seeds if several else ())]:
                config = _config(path, setting.label, {**options, "seed": seed})
                folder = output / _file_name(setting.label) / f"seed{seed}"
                runs = planned if seed in seeds else trials
                runs.append(Planned(setting.label, config, folder))
    # Some file systems do not tell upper from lower case.
    folders = [str(one.folder).casefold() for one in planned]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"{path}: two runs would lie in {twice}; rename a method.")
    for setting in settings:
        if _file_name(setting.label).casefold() in _OURS:
            raise ValueError(
                f"{path}: a method cannot be called {setting.label!r}, since the sweep "
                "writes its own results there; rename it."
            )
    if metric is None:
        return Plan(planned, _unequal(planned), settings)
    if not trials:
        raise ValueError(f"{path}: tuning has nothing to choose: no option has values.")
    return Plan(planned, _unequal(planned), settings, Tuning(metric, trials))


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
    if str(table["metric"]) not in METRICS:
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
