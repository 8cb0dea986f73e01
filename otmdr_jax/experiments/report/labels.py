"""What runs are called, grouped by, and told apart by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from otmdr_jax.experiments import config as config_lib

Run = Any  # of `reading`, which asks for labels itself
T = TypeVar("T")

_NAMES = {
    "sgd": "SGD",
    "sam": "SAM",
    "asam": "ASAM",
    "otmdr": "OT-MDR",
    "sgvb": "SGVB",
    "otmdr-bnn": "OT-MDR-BNN",
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
# What may differ between runs that are averaged: it is meant to, or changes no number.
_FREE = {"seed"} | config_lib.RESUMABLE


def label_of(config: Mapping[str, Any]) -> str:
    """A short label of a run's method, for humans.

    Args:
      config: The run's options; "method", "base_method", "num_particles", "optimizer",
        "laplace", "dropout", "prediction", "members" and "ensemble" are used.

    Returns:
      The method's written name, with K for OT-MDR; the method itself where no other
      name is known. "sgd" is the plain gradient, so another optimizer gives its name.

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
            "a run's label is made from config['method'], which is missing: pass "
            "label=... ."
        )
    method = str(config["method"])
    label = _NAMES.get(method, method)
    if method in ("otmdr", "otmdr-bnn") and "num_particles" in config:
        label += f" (K = {config['num_particles']})"
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
    """The members of an ensemble's run, each as a run of its own to be tabulated.

    Args:
      run: A run.

    Returns:
      A run for each member, with its number and model as label; none for the run of a
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
    """Items by a key, in order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Groups runs by their label, in order of first appearance.

    Raises:
      ValueError: No runs.
    """
    groups = grouped(runs, attrgetter("label"))
    if not groups:
        raise ValueError("a report needs at least one run, got none.")
    return groups


def name_of(run: Run, runs: Sequence[Run]) -> str:
    """A run among others: its label, and as much of its path as tells it apart."""
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
    """Gives runs that differ in more than the seed labels of their own.

    Args:
      runs: The runs.

    Returns:
      The runs in their order. Where runs of a label differ in options that change a
      run's numbers, these options are added to the label.

    Example:
      >>> from otmdr_jax.experiments.report import Run
      >>> configs = [{"epochs": 2, "seed": 0}, {"epochs": 4, "seed": 0}]
      >>> runs = [Run(None, "SAM", c, {}, [], None, None) for c in configs]
      >>> [run.label for run in with_distinct_labels(runs)]
      ['SAM, epochs = 2', 'SAM, epochs = 4']
    """
    runs = list(runs)
    groups = by_label(runs) if runs else {}
    options = {label: beyond_the_seed(group) for label, group in groups.items()}
    return [
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


def cautions(runs: Sequence[Run]) -> list[str]:
    """What makes a mean over a label's runs worth less than it looks."""
    found = []
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


def beyond_the_seed(runs: Sequence[Run]) -> list[str]:
    """Options other than the seed that differ and change a run's numbers."""
    return [n for n in differing([run.config for run in runs]) if n not in _FREE]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names that some settings lack or that have several values, in order."""
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    return [name for name in names if len({text_of(s, name) for s in settings}) > 1]


def text_of(setting: Mapping[str, Any], name: str) -> str:
    """A setting's value as JSON would show it; "-" where there is none."""
    return json.dumps(setting[name], default=str) if name in setting else "-"
