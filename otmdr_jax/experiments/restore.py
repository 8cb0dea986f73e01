"""Opens a trained run at one of its checkpoints."""

import os
import pathlib
from typing import Any

import jax

from otmdr_jax.data import Dataset
from otmdr_jax.experiments import checkpoint as checkpoint_lib
from otmdr_jax.experiments import own as own_lib
from otmdr_jax.experiments import programs, run_folder
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods.post_hoc import Laplace
from otmdr_jax.experiments.trained_run import TrainedRun

# For users; the rest serves the commands.
__all__ = ["TrainedRun", "open_run"]

PyTree = Any


def open_run(
    folder: str | os.PathLike,
    checkpoint: str | int = "latest",
    *,
    dataset: Dataset | None = None,
    split: str | None = None,
    predicts: bool = True,
    model: Any = None,
    loss: Any = None,
    metrics: Any = None,
    **given: Any,
) -> TrainedRun:
    """Opens a trained run at one of its checkpoints, to predict or to look at it.

    It needs no data to predict: what a prediction depends on is in the run's folder.
    The training data are read for other checkpoints of swa, swag and laplace than the
    last, and for runs of older versions, whose data.json has no mean and deviation.

    Args:
      folder: The run's folder.
      checkpoint: "latest", "best" on the validation set, or a step.
      dataset: Its data; None to load them as its options say, when they are needed. A
        run that was given its dataset in Python needs it again, or the file of
        :func:`otmdr_jax.data.save` as `data_dir`.
      split: A part of the data that will be looked at: it must be there. None loads the
        data when they are asked for, or where options of the data are given.
      predicts: Whether the state will predict: without it a Laplace approximation,
        which changes no weight, is not fitted.
      model: The network that the run was given in Python, if no name finds it.
      loss: The loss that it was given, if no name finds it; a prediction does not need
        it.
      metrics: Metrics of your own.
      **given: Options instead of the run's own, as `data_dir` or `num_samples`.

    Returns:
      A :class:`TrainedRun`.

    Raises:
      FileNotFoundError: The folder is no run, or has no such checkpoint.
      ValueError: There is no such split or checkpoint, or the data are not those that
        the run was trained on.

    Example:
      >>> import tempfile, otmdr_jax
      >>> from otmdr_jax import training
      >>> folder = tempfile.mkdtemp() + "/run"
      >>> config = otmdr_jax.config.TrainConfig(method="sam", steps=2)
      >>> _ = training.train(config, output=folder, show_progress=False)
      >>> run = otmdr_jax.open_run(folder)
      >>> run.step, run.params["head"]["kernel"].shape, run.metrics["steps"]
      (2, (32, 10), 2)
    """
    folder = pathlib.Path(folder)
    own = run_folder.read_config(folder)
    config = own.replace(**given)
    record = run_folder.read_data(folder)
    if loss is None:
        loss = own_lib.recorded_loss(folder, (record or {}).get("loss"))
    mine = own_lib.given(model, loss, metrics)
    if model is not None:
        own_lib.check_name(config, mine)
    with checkpoint_lib.Checkpoints(folder / "checkpoints", read_only=True) as saved:
        step = step_of(checkpoint, saved)
        # Before the state is read: other data may mean other shapes.
        data = saved.meta(step)["data"]
    info = programs.DataInfo.of_record(record)
    wanted = split is not None or info is None or config.data != own.data
    if dataset is None and wanted:
        dataset = programs.load_data(config)
    if split is not None and getattr(dataset, split) is None:
        raise ValueError(
            f"{folder} was trained without a {split} set (--validation): use the test "
            "set."
        )
    if dataset is not None:
        programs.check_same_data(data, programs.fingerprint(dataset), folder, dataset)
        info = programs.DataInfo.of(dataset)
    assert info is not None  # of the record, or of the data
    compiled = programs.compile_programs(config, info, own=mine)
    restored = restore(config, compiled, folder, step)
    run = TrainedRun(folder, config, info, compiled, restored.state, restored.meta)
    if dataset is not None:
        run.dataset = dataset
    if config.method == own.method:  # else it was fitted to other predictions
        run.temperature = run_folder.read_temperature(folder, run.step)
    if predicts or not config.method.is_fitted:
        _finalize(run, own)
    return run


def _finalize(run: TrainedRun, own: TrainConfig) -> None:
    """Makes the state fit to predict: by what the run kept, else by a pass anew."""
    if run.programs.seen_shapes is None:
        return
    finished = None
    if run.config.method == own.method:
        finished = finished_by_record(run.folder, run.step, run.state, run.programs)
    if finished is None:
        finished = run.config.method.finalize(
            run.config, run.state, run.dataset, run.programs
        )
    run.state = finished


def finished_by_record(
    folder: pathlib.Path, step: int, state: PyTree, compiled: programs.Programs
) -> PyTree | None:
    """A state that predicts, by what the run kept of a pass over its training set.

    Args:
      folder: The run's folder.
      step: The step of the state.
      state: Its state.
      compiled: Its compiled functions.

    Returns:
      The state; None where there is no such pass, or it was not kept for this step.
    """
    if compiled.seen_shapes is None:
        return None
    assert compiled.finish is not None
    seen = run_folder.read_seen(folder, step, compiled.seen_shapes(state))
    return None if seen is None else compiled.finish(state, seen)


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


def step_of(which: str | int, saved: checkpoint_lib.Checkpoints) -> int | None:
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
) -> checkpoint_lib.Restored:
    """The state of a run on the default device, wherever the run was trained.

    Args:
      config: The run's configuration.
      compiled: Its compiled functions, without a mesh.
      folder: The run's folder.
      step: Which checkpoint; None for the latest.

    Raises:
      FileNotFoundError: There is no such checkpoint.
    """
    with checkpoint_lib.Checkpoints(folder / "checkpoints", read_only=True) as saved:
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
