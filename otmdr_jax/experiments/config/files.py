"""Configurations as files, and what may differ between a run and its resumption."""

import json
import os
import pathlib
from typing import Any

from otmdr_jax.experiments.config.options import TrainConfig, check_names
from otmdr_jax.io import files

# Options that may differ between a run and its resumption: they change no number (the
# mesh: none but by rounding, by which examples share a split and BatchNorm's batch).
RESUMABLE = frozenset(
    {
        "data_dir",
        "cache_dir",
        "download",
        "eval_batch_size",
        "eval_every",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "max_skipped",
        "mesh",
        "input",
        "remat",
        "member_map",
    }
)


def save(config: TrainConfig, path: str | os.PathLike) -> None:
    """Writes a configuration as JSON, by the names of the command line, atomically."""
    files.write_json(pathlib.Path(path), config.flat())


def load(path: str | os.PathLike) -> TrainConfig:
    """Reads a configuration that :func:`save` wrote, or one written by hand.

    Options that are left out, or null, have their defaults. Files of older versions
    hold the options of all methods: those of others are passed over at their defaults.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no JSON object, or holds an unknown option or a bad value.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"a configuration must be a JSON file, and {path} is none."
        )
    try:
        # Some editors of Windows write a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file of options: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object of options.")
    try:
        check_names(values)
        _check_seeds(values)
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_seeds(values: dict[str, Any]) -> None:
    """Says what became of the seeds that older versions took."""
    seed, of_data = values.get("seed"), values.get("data_seed")
    if type(seed) is int and not 0 <= seed < 2**32:
        raise ValueError(
            f"seed must be in 0..2**32 - 1, got {seed}. JAX keeps the lower 32 bits of "
            "a seed, so that a run of an older version with this one is that of seed "
            f"{seed % 2**32}, and no run of its own beside that: write {seed % 2**32} "
            "into this file to open it."
        )
    if type(of_data) is int and not 0 <= of_data < 2**32:
        raise ValueError(
            f"data_seed must be in 0..2**32 - 1, got {of_data}. No other seed gives "
            "the validation split and the label noise of this one: a run that has it "
            "is opened by the version that made it."
        )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some names and values; JSON itself takes the last of two."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} stands in it twice.")
    return dict(pairs)


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Options that differ and change a run's numbers: name -> (old, new)."""
    before, after = old.flat(), new.flat()
    return {
        name: (before.get(name), after.get(name))
        for name in {**before, **after}
        if before.get(name) != after.get(name) and name not in RESUMABLE
    }
