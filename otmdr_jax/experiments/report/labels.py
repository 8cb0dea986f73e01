"""Labels that name runs, group them, and distinguish them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments.programs import same_data

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
# Options that change the data of a run, whatever set it names.
_OF_LOADING = ("validation", "label_noise", "data_seed")
# Options that labels name.
_IN_LABELS = {
    "members", "ensemble", "member_data", "dropout", "optimizer", "sampler", "tilt",
}  # fmt: skip


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
    """Returns warnings about means and comparisons that are not over seeds alone."""
    found = _unlike(runs)
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
        f"{name} is "
        + "; ".join(f"{text} in {_listed(labels)}" for text, labels in values.items())
        for name, values in (
            (name, _values(groups, lambda run, n=name: text_of(run.config, n)))
            for name in differing([run.config for run in runs])
            if name in shared
        )
    ]
    # Metrics of other test sets cannot be compared, whatever the options say.
    explained = differing([{n: r.config.get(n) for n in _OF_LOADING} for r in runs])
    unexplained = _of_several_data(runs) and not explained
    if "data" in beyond_the_seed(runs) or _of_several_tests(runs) or unexplained:
        values = _values(groups, _name_of_data)
        found.append(
            "the data are "
            + "; ".join(f"{text} in {_listed(x)}" for text, x in values.items())
        )
    if not found:
        return []
    return [f"methods differ in more than themselves: {'. '.join(found)}."]


def _values(groups: Mapping[str, Sequence[Run]], of: Callable) -> dict[str, list[str]]:
    """Returns value -> the labels that have it."""
    values: dict[str, list[str]] = {}
    for label, group in groups.items():
        for text in dict.fromkeys(of(run) for run in group):
            values.setdefault(text, []).append(label)
    return values


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels)


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
