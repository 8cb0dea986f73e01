"""Labels that name runs, group them, and distinguish them."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments.programs import same_data
from otmdr_jax.experiments.programs.inputs import OF_LOADING

Run = Any  # reading.Run; `reading` imports this module
T = TypeVar("T")

_NAMES = {
    "sgd": "SGD",
    "sam": "SAM",
    "asam": "ASAM",
    "otmdr": "OT-MDR",
    "otmdr-dual": "OT-MDR dual",
    "sgvb": "SGVB",
    "otmdr-bnn": "OT-MDR-BNN",
    "otmdr-dual-bnn": "OT-MDR-BNN dual",
    "gsam": "GSAM",
    "looksam": "LookSAM",
    "fisher-sam": "Fisher SAM",
    "bsam": "bSAM",
    "ivon": "IVON",
    "snapshot": "Snapshot",
    "fge": "FGE",
    "swa": "SWA",
    "swag": "SWAG",
    "laplace": "Laplace",
    "dst": "DST",
    "edst": "EDST",
    "mc-dropout": "MC dropout",
}
_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW"}
# Options that may differ between averaged runs: the seed, and those that change no
# number.
_FREE = {"seed"} | config_lib.RESUMABLE
# Characters of a class's name that pictures have room for.
_LONGEST_CLASS = 14
# What a run's result says of how it was made, with its name in a sentence. Times belong
# to a device; versions may round differently, which training makes larger.
_CONDITIONS = {
    "device": "the device", "cores": "the number of cores", "mesh": "the mesh",
    "otmdr_jax": "otmdr_jax", "jax": "JAX", "optax": "Optax", "python": "Python",
}  # fmt: skip
# Options that labels name.
_IN_LABELS = {"members", "ensemble", "dropout", "sampler", "tilt"}


def label_of(config: Mapping[str, Any]) -> str:
    """Makes a short label of a run's method.

    Args:
      config: The run's options. The label depends on "method", "base_method",
        "num_particles", "sampler", "tilt", "optimizer", "laplace", "dropout",
        "prediction", "members" and "ensemble".

    Returns:
      The method's usual name, with K for OT-MDR. An unknown method keeps its own name.
      "sgd" is the plain gradient, so with another optimizer the label is the
      optimizer's name.

    Raises:
      ValueError: The configuration names no method.

    Example:
      >>> label_of({"method": "otmdr", "num_particles": 2})
      'OT-MDR (K = 2)'
      >>> label_of({"method": "sam"}), label_of({"method": "sam", "members": "5"})
      ('SAM', 'SAM, 5 members')
      >>> label_of({"method": "laplace", "laplace": "diagonal", "dropout": 0.1})
      'Laplace, diagonal, dropout 0.1'
    """
    if not config.get("method"):
        raise ValueError(
            "a run's label is made from config['method'], which is missing: pass label "
            "instead."
        )
    method = str(config["method"])
    label = _NAMES.get(method, method)
    if method in ("otmdr", "otmdr-bnn") and "num_particles" in config:
        label += f" (K = {config['num_particles']})"
        if config.get("sampler", "ascent") != "ascent":
            label += f", {config['sampler'].replace('_', '-')}"
            label += (
                f", tilt {config['tilt']:g}" if config.get("tilt") is not None else ""
            )
    if method == "sgd" and config.get("optimizer") in _OPTIMIZERS:
        label = _OPTIMIZERS[config["optimizer"]]
    if config.get("base_method", "sgd") != "sgd":
        label += f" of {_NAMES[config['base_method']]}"
    if method == "laplace" and config.get("laplace", "last-layer") != "last-layer":
        label += f", {config['laplace']}"
    if config.get("dropout"):
        label += f", dropout {config['dropout']:g}"
    if config.get("prediction") == "mean":
        label += ", mean"
    if members := config.get("members"):
        count = int(members) if members.isdigit() else len(members.split(","))
        label += f", {count} members"
        if config.get("ensemble") == "joint":
            label += ", joint"
    return label


def member_runs(run: Run) -> list[Run]:
    """Returns each member of an ensemble as its own run, for a table.

    Args:
      run: A run.

    Returns:
      A run for each member, labelled by its number and model; an empty list for a
      single model. Predictions are those of the ensemble.

    Example:
      >>> from otmdr_jax.experiments.report import Run
      >>> result = {"members": [{"model": "cnn_small", "nll": 0.5}]}
      >>> [r.label for r in member_runs(Run(None, "SGD", {}, result, [], None, None))]
      ['0: cnn_small']
    """
    return [
        run._replace(
            label=f"{i}: {member['model']}"
            + (" (diverged)" if member.get("diverged") else ""),
            result=member,
        )
        for i, member in enumerate(run.result.get("members", []))
    ]


def class_names(runs: Sequence[Run], count: int) -> list[str]:
    """Names the classes of runs as their data do, else by their numbers.

    Args:
      runs: The runs.
      count: C, the number of classes.

    Returns:
      C texts, long names shortened.
    """
    known = [(run.data or {}).get("class_names") for run in runs]
    if not known or not known[0] or any(names != known[0] for names in known):
        return [str(number) for number in range(count)]
    most = _LONGEST_CLASS
    return [x if len(x) <= most else f"{x[: most - 1]}…" for x in known[0]]


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Groups items by a key, in order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Groups runs by their label, in order of first appearance.

    Raises:
      ValueError: There are no runs.
    """
    groups = grouped(runs, attrgetter("label"))
    if not groups:
        raise ValueError("a report needs at least one run, got none.")
    return groups


def places(runs: Sequence[Run], others: Iterable[str] = ()) -> dict[str, int]:
    """Returns the place of each label, which sets its colour in all pictures of a page.

    Args:
      runs: All runs of the page.
      others: Labels without runs; they come last.

    Returns:
      Place of each label, and of each run by its name.
    """
    order = {x: i for i, x in enumerate(dict.fromkeys([*by_label(runs), *others]))}
    return {name_of(run, runs): order[run.label] for run in runs} | order


def name_of(run: Run, runs: Sequence[Run]) -> str:
    """Names a run among others: its label, and the end of its path that is unique."""
    if run.folder is None:
        return run.label
    alike = [x.folder.parts for x in runs if x.folder and x.label == run.label]
    parts = run.folder.parts
    count = next(
        (
            n
            for n in range(1, len(parts))
            if [x[-n:] for x in alike].count(parts[-n:]) == 1
        ),
        len(parts),
    )
    return f"{run.label} ({'/'.join(parts[-count:])})"


def with_distinct_labels(runs: Iterable[Run]) -> list[Run]:
    """Gives distinct labels to runs that differ in more than the seed.

    Args:
      runs: The runs.

    Returns:
      The runs in their order. If runs of a label differ in options that change a run's
      numbers, or in their data, the label names these. The label of an unfinished run
      says so.

    Example:
      >>> from otmdr_jax.experiments.report import Run
      >>> configs = [{"epochs": 2, "seed": 0}, {"epochs": 4, "seed": 0}]
      >>> runs = [Run(None, "SAM", c, {}, [], None, None) for c in configs]
      >>> [run.label for run in with_distinct_labels(runs)]
      ['SAM, epochs = 2', 'SAM, epochs = 4']
    """
    runs = [run._replace(label=run.label + _unfinished(run)) for run in runs]
    options = {x: beyond_the_seed(group) for x, group in _groups(runs).items()}
    runs = [
        run._replace(
            label=", ".join(
                [run.label]
                + [
                    f"{name} = {text_of(run.config, name).strip(chr(34))}"
                    for name in options[run.label]
                ]
            )
        )
        for run in runs
    ]
    # Options need not tell data apart: a file may have been written anew.
    several = {x: _of_several_data(group) for x, group in _groups(runs).items()}
    return [
        run._replace(label=f"{run.label}, data {_name_of_data(run)}")
        if several[run.label]
        else run
        for run in runs
    ]


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return by_label(runs) if runs else {}


def cautions(runs: Sequence[Run]) -> list[str]:
    """Returns warnings about means and comparisons that are not over seeds alone.

    Args:
      runs: The runs.

    Returns:
      Sentences: options, data, devices and versions in which methods differ beside what
      makes them methods, and runs of one method that are no seeds of each other.

    Example:
      >>> from otmdr_jax import report
      >>> from otmdr_jax.experiments.report import Run
      >>> epochs = {"SGD": 40, "SAM": 3, "ASAM": 40}
      >>> runs = [Run(None, x, {"epochs": n}, {}, [], None, None)
      ...         for x, n in epochs.items()]
      >>> report.cautions(runs)
      ['methods differ in more than themselves: epochs is 3 in SAM; 40 in the others.']
    """
    found = _unlike(runs) + _made_unlike(runs)
    for label, group in by_label(runs).items():
        options = beyond_the_seed(group)
        if options:
            found.append(
                f"the runs of {label} differ in more than the seed: "
                f"{', '.join(options)}."
            )
        seeds = [run.config["seed"] for run in group if "seed" in run.config]
        if not options and len(set(seeds)) < len(seeds):
            found.append(f"runs of {label} share a seed.")
    return found


def _unlike(runs: Sequence[Run]) -> list[str]:
    """Describes differences between labels other than their methods."""
    groups = by_label(runs)
    if len(groups) < 2:
        return []
    named = {"data"} | _IN_LABELS | _FREE
    shared = [name for name in config_lib.shared_options() if name not in named]
    found = [
        f"{name} is {_in_words(groups, functools.partial(_option, name))}"
        for name in differing([run.config for run in runs])
        if name in shared
    ]
    # Metrics of other test sets cannot be compared, whatever the options say.
    explained = differing([{n: r.config.get(n) for n in OF_LOADING} for r in runs])
    unexplained = _of_several_data(runs) and not explained
    if "data" in beyond_the_seed(runs) or _of_several_tests(runs) or unexplained:
        found.append(f"the data are {_in_words(groups, _name_of_data)}")
    if not found:
        return []
    return [f"methods differ in more than themselves: {'. '.join(found)}."]


def _made_unlike(runs: Sequence[Run]) -> list[str]:
    """Describes differences of devices and versions; what is unknown is left out."""
    found = []
    for name, words in _CONDITIONS.items():
        known = [run for run in runs if isinstance(run.result.get(name), str)]
        if len({run.result[name] for run in known}) > 1:
            of = functools.partial(_result, name)
            found.append(f"{words} is {_in_words(by_label(known), of)}")
    if not found:
        return []
    times = " Times cannot be compared." if found[0].startswith("the ") else ""
    return [f"runs were not made alike: {'. '.join(found)}.{times}"]


def _option(name: str, run: Run) -> str:
    if name == "epochs" and run.config.get("steps") is not None:
        return "left to steps"
    return text_of(run.config, name)


def _result(name: str, run: Run) -> str:
    return run.result[name]


def _in_words(groups: Mapping[str, Sequence[Run]], of: Callable[[Any], str]) -> str:
    """Says which labels have which value: "3 in SAM; 40 in the others"."""
    values: dict[str, list[str]] = {}
    for label, group in groups.items():
        for text in dict.fromkeys(of(run) for run in group):
            values.setdefault(text, []).append(label)
    usual = max(values, key=lambda text: len(values[text]))
    one_each = sum(map(len, values.values())) == len(groups)
    names = {text: " and ".join(labels) for text, labels in values.items()}
    if one_each and len(values[usual]) > 1:
        del names[usual]
        names[usual] = "the others"
    return "; ".join(f"{text} in {where}" for text, where in names.items())


def _unfinished(run: Run) -> str:
    """Returns the end of the label of an unfinished run: "" if it is finished."""
    if run.result.get("finished") or "checkpoint" not in run.result:
        return ""
    return f", unfinished at step {run.result.get('steps')}"


def _of_several_data(runs: Sequence[Run]) -> bool:
    """Says whether runs are known to have several data."""
    known = [run.data["fingerprint"] for run in runs if run.data is not None]
    apart = any(not same_data(known[0], other) for other in known[1:])
    return apart or _of_several_tests(runs)


def _of_several_tests(runs: Sequence[Run]) -> bool:
    """Says whether runs were tested on examples with other labels."""
    return len({np.asarray(run.labels).tobytes() for run in runs}) > 1


def _name_of_data(run: Run) -> str:
    """Names a run's data by their name, size and checksum."""
    if run.data is None:
        checksum = zlib.crc32(np.ascontiguousarray(run.labels).tobytes())
        return f"of {len(run.labels)} test examples (labels {checksum:08x})"
    name, count, *checksums = run.data["fingerprint"].rsplit("-", 3)
    test = run.data["test"]
    return f"{name} ({count} for training, {test} to test, {'-'.join(checksums)})"


def beyond_the_seed(runs: Sequence[Run]) -> list[str]:
    """Names the options other than the seed that differ and change a run's numbers."""
    names = [n for n in differing([run.config for run in runs]) if n not in _FREE]
    known = all(run.data is not None for run in runs)
    if "data" in names and known and not _of_several_data(runs):
        names.remove("data")  # the same data by another name, or in another place
    return names


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns names that have several values or that some settings lack, in order."""
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    return [name for name in names if len({text_of(s, name) for s in settings}) > 1]


def text_of(setting: Mapping[str, Any], name: str) -> str:
    """Returns a setting's value as JSON; "-" if it is missing."""
    return json.dumps(setting[name], default=str) if name in setting else "-"
