"""A trained run, ready to be looked at: its options, data, programs and a state."""

import os
import pathlib
from typing import Any, NamedTuple

import jax

from otmdr_jax.data import Dataset
from otmdr_jax.experiments import checkpoint, programs, run_folder
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods.post_hoc import Laplace

PyTree = Any


class Restored(NamedTuple):
    """What :func:`open_run` gives.

    Attributes:
      folder: The run's folder.
      config: Its options, the given ones among them.
      dataset: Its data.
      programs: Its compiled functions, on the default device.
      state: Its state at the checkpoint, finalized where it averages weights or has a
        Gaussian fitted to them.
      meta: What was saved beside the state.
      diverged: Members that do not count in an ensemble's prediction.
    """

    folder: pathlib.Path
    config: TrainConfig
    dataset: Dataset
    programs: programs.Programs
    state: PyTree
    meta: dict[str, Any]
    diverged: tuple[int, ...]


def open_run(
    folder: str | os.PathLike,
    which: str | int = "latest",
    *,
    dataset: Dataset | None = None,
    split: str = "test",
    predicts: bool = True,
    **given: Any,
) -> Restored:
    """Loads a run's data and one of its checkpoints.

    Args:
      folder: The run's folder.
      which: "latest", "best" on the validation set, or a step.
      dataset: Its data; None to load them as its options say. A run that was given
        its dataset in Python needs it again, or the file of
        :func:`otmdr_jax.data.save` as `data_dir`.
      split: The part of the data that will be looked at: it must be there.
      predicts: Whether the state will predict: without it a Laplace approximation,
        which changes no weight, is not fitted.
      **given: Options instead of the run's own, as `data_dir`.

    Returns:
      A :class:`Restored`.

    Raises:
      FileNotFoundError: The folder is no run, or has no such checkpoint.
      ValueError: There is no such split or checkpoint, or the data are not those that
        the run was trained on.
    """
    folder = pathlib.Path(folder)
    config = run_folder.read_config(folder).replace(**given)
    dataset = programs.load_data(config) if dataset is None else dataset
    if getattr(dataset, split) is None:
        raise ValueError(
            f"{folder} was trained without a {split} set (--validation): use the test "
            "set."
        )
    data = programs.fingerprint(dataset)
    with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as saved:
        step = step_of(which, saved)
        # Before the state is read: other data may mean other shapes.
        programs.check_same_data(saved.meta(step)["data"], data, folder, dataset)
    compiled = programs.compile_programs(config, dataset)
    restored = restore(config, compiled, folder, step)
    diverged = tuple(restored.meta.get("diverged", ()))
    state = restored.state
    if predicts or not config.method.is_fitted:
        state = config.method.finalize(config, state, dataset, compiled)
    return Restored(folder, config, dataset, compiled, state, restored.meta, diverged)


def with_laplace(
    folder: str | os.PathLike,
    structure: str,
    prior_precision: float | None = None,
    examples: int | None = None,
) -> dict[str, Any]:
    """Options for :func:`open_run` that give a run a Laplace approximation.

    Args:
      folder: The folder of a run of one of the methods that it can ride on.
      structure: The weights that it is of: see :func:`otmdr_jax.baselines.laplace`.
      prior_precision: The precision of its prior; None for that of highest marginal
        likelihood.
      examples: Training images that it is fitted to; None for all.

    Raises:
      ValueError: The run's method is another.
    """
    config = run_folder.read_config(pathlib.Path(folder))
    base = config.method.gradient.name
    known = (*Laplace.bases, Laplace.name)
    if config.method.name not in known:
        raise ValueError(
            f"a Laplace approximation is around one trained weight vector: {folder} "
            f"must be a run of {', '.join(known)}, got {config.method.name}."
        )
    # All of them: a run that has one already is given another, not a mixture.
    return {
        "method": "laplace",
        "base_method": base,
        "laplace": structure,
        "prediction": "samples",
        "prior_precision": prior_precision,
        "laplace_examples": examples,
    }


def step_of(which: str | int, saved: checkpoint.Checkpoints) -> int | None:
    """The step that "latest" (None), "best" or a number in words stands for.

    Raises:
      ValueError: No such words, or no checkpoint was scored.
    """
    if which == "latest":
        return None
    which = str(which)  # a step may be a number
    if which == "best":
        step = saved.best_step()
        if step is None:
            raise ValueError(
                "no checkpoint was scored: a run has a best one if it was trained with "
                "--validation. Use --checkpoint latest."
            )
        return step
    if not which.isdigit():
        raise ValueError(f"checkpoint must be latest, best or a step, got {which!r}.")
    return int(which)


def restore(
    config: TrainConfig,
    compiled: programs.Programs,
    folder: pathlib.Path,
    step: int | None = None,
) -> checkpoint.Restored:
    """The state of a run on the default device, wherever the run was trained.

    Args:
      config: The run's configuration.
      compiled: Its compiled functions, without a mesh.
      folder: The run's folder.
      step: Which checkpoint; None for the latest.

    Raises:
      FileNotFoundError: There is no such checkpoint.
    """
    with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as saved:
        return saved.restore(template(config, compiled), step)


def template(config: TrainConfig, compiled: programs.Programs) -> PyTree:
    """The shapes of a run's state, to be restored to the default device.

    Args:
      config: The run's configuration.
      compiled: Its compiled functions, without a mesh.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(compiled.init, programs.run_keys(config.run.seed)[0]),
    )
