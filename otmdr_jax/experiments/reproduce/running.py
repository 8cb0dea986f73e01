"""Trains what is missing of a table, and says before how long that takes."""

import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from otmdr_jax import data as data_lib
from otmdr_jax import models
from otmdr_jax.experiments import building, run_folder, sweep
from otmdr_jax.experiments.measure import cost
from otmdr_jax.experiments.reproduce.plans import Cell
from otmdr_jax.experiments.sweep import Planned

# A network of the size that the miniatures have; its speed stands for all.
_TIMED, _BATCH, _ROUNDS = "wide_resnet_10_1", 64, 3


def planned(cells: Sequence[Cell], output: str | os.PathLike) -> list[Planned]:
    """The runs of cells, as a sweep has them: the first seed of all cells first.

    Args:
      cells: The cells.
      output: The folder that the runs' folders are in; targets of one scale and variant
        may share it, and then share runs.
    """
    root = pathlib.Path(output)
    return [
        Planned(cell.name, cell.config.replace(seed=seed), root / cell.name / f"{seed}")
        for seed in dict.fromkeys(seed for cell in cells for seed in cell.seeds)
        for cell in cells
        if seed in cell.seeds
    ]


def check(cells: Sequence[Cell], output: str | os.PathLike) -> None:
    """Raises an error if a folder holds anything but a run of its cell.

    A page beside whose plan the library has changed would compare runs of other options
    in silence.

    Raises:
      ValueError: A folder holds a run with other options, or runs of one table saw
        other images than each other.
      FileExistsError: A folder holds no run.
    """
    runs = planned(cells, output)
    sweep.check(runs)
    places = {cell.name: (cell.part, cell.data) for cell in cells}
    seen: dict[Any, dict[str, pathlib.Path]] = {}
    for one in runs:
        if run_folder.is_finished(one.folder):
            images = run_folder.read_data(one.folder) or {}
            for split in ("fingerprint", "test_fingerprint"):
                place = *places[one.label], split
                seen.setdefault(place, {}).setdefault(images.get(split, ""), one.folder)
    for (part, data, _), folders in seen.items():
        if len(folders) > 1:
            first, second, *_ = folders.values()
            raise ValueError(
                f"{first} and {second} saw different images of {data}, and are of one "
                f"table ({part}): move one of them away, and run it again."
            )


def run(
    cells: Sequence[Cell],
    output: str | os.PathLike,
    target: str,
    *,
    jobs: int = 1,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains the runs that are not finished; Ctrl-C saves, and the same call goes on.

    Args:
      cells: The cells, of :func:`otmdr_jax.experiments.reproduce.cells`.
      output: The folder of the runs.
      target: The table, for the file of its rows.
      jobs: How many runs are trained at a time, on processors.
      show_progress: Whether to show progress.

    Returns:
      A row for each run, as :func:`otmdr_jax.experiments.sweep.run` returns it.

    Raises:
      FileNotFoundError: Data are not prepared; the message has the command.
      ValueError: A folder holds a run with other options.
      Interrupted: On Ctrl-C or SIGTERM.
    """
    runs = planned(cells, output)
    for cell in cells:
        building.check_models(cell.config)
    check(cells, output)
    # Hours later would be late to say that the second set is not there.
    for name, data_dir in {(c.config.data.name, c.config.data.data_dir) for c in cells}:
        data_lib.describe_test(name, data_dir=data_dir)
    return sweep.run(
        runs,
        rows_file(output, target),
        jobs=jobs,
        measure_memory=False,
        show_progress=show_progress,
    )


def rows_file(output: str | os.PathLike, target: str) -> pathlib.Path:
    """The file of a target's rows: of which runs diverged, among others."""
    return pathlib.Path(output) / f"{target}.rows.json"


def estimate(
    cells: Sequence[Cell], *, landscape_examples: int = 0
) -> list[dict[str, Any]]:
    """What each cell costs: gradients of a batch, operations, hours on this machine.

    A gradient is counted as three forward passes, and a forward pass as two operations
    for each multiply-add of a kernel; evaluations are forward passes of the test
    images, for each sample of a posterior. The machine's speed is measured with one
    small network, so that hours are an order of magnitude: other networks use it better
    or worse. Compilation and the input pipeline come on top.

    Args:
      cells: The cells.
      landscape_examples: Images at all points of a landscape, of which the first seed
        of each cell has one.

    Returns:
      A row for each cell: name, runs, steps, gradients (of whole batches, of all runs),
      operations (of these, of evaluations and of landscapes) and hours.
    """
    speed = _speed()
    return [_row(cell, speed, landscape_examples) for cell in cells]


def _row(cell: Cell, speed: float, landscape_examples: int) -> dict[str, Any]:
    config = cell.config
    digits = config.data.name == "digits"
    count = config.data.train_examples or 50_000
    shape = (8, 8, 1) if digits else (32, 32, 3)
    classes = 100 if config.data.name == "cifar100" else 10
    steps = config.run.steps or config.run.epochs * (count // config.run.batch_size)
    networks = building.networks(config, classes, drops=False)
    mean = float(np.mean([_operations(network, shape) for network in networks]))
    gradients = steps * cost.gradient_evaluations(config) * len(cell.seeds)
    # Evaluated at the last step too, if it is not one of those that are due.
    evaluations = math.ceil(config.run.epochs / config.run.eval_every)
    images = 360 if digits else config.data.test_examples or 10_000
    passes = evaluations * images * len(cell.seeds) + landscape_examples
    samples = getattr(config.method, "of_samples", {}).get("num_samples", 1)
    forward = mean * len(config.model.member_names) * samples * passes
    operations = 3 * mean * config.run.batch_size * gradients + forward
    return {
        "name": cell.name,
        "runs": len(cell.seeds),
        "steps": steps,
        "gradients": gradients,
        "operations": operations,
        "hours": operations / speed / 3600,
    }


def _operations(network: Any, image_shape: tuple[int, ...]) -> float:
    """Of a forward pass of one image."""
    if hasattr(network, "models"):  # a joint loss of members
        return float(np.mean([_operations(one, image_shape) for one in network.models]))
    params, _ = building.shapes_of(network, image_shape)
    positions = models.output_positions(network, image_shape)
    kernels = {
        "/".join(str(key.key) for key in path): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return sum(2.0 * count * kernels[name] for name, count in positions.items())


def _speed() -> float:
    """Operations a second of a gradient of one small network on this machine."""
    shape = (32, 32, 3)
    network = models.create(_TIMED, num_classes=10)
    params, state = network.init(jax.random.key(0), jnp.zeros((1, *shape)))
    images, labels = jnp.ones((_BATCH, *shape)), jnp.zeros(_BATCH, int)

    def loss_fn(params):
        logits, _ = network.apply(params, state, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.jit(jax.grad(loss_fn))
    jax.block_until_ready(gradient(params))
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(gradient(params))
        seconds.append(time.perf_counter() - start)
    return 3 * _operations(network, shape) * _BATCH / min(seconds)


def finished(cells: Sequence[Cell], output: str | os.PathLike) -> dict[str, list[int]]:
    """The seeds of each cell whose runs are finished, by the cell's name."""
    root = pathlib.Path(output)
    return {
        cell.name: [
            seed
            for seed in cell.seeds
            if run_folder.is_finished(root / cell.name / f"{seed}")
        ]
        for cell in cells
    }
