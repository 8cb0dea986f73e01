"""A trained run, opened to predict or to be looked at."""

import functools
import os
import pathlib
import warnings
from typing import Any

import jax
import numpy as np

from otmdr_jax import parallel
from otmdr_jax.data import Dataset, LazyImages, Split
from otmdr_jax.experiments import (
    checkpoint,
    members,
    prediction,
    programs,
    run_folder,
)
from otmdr_jax.experiments import own as own_lib
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods.post_hoc import Laplace
from otmdr_jax.metrics.calibration import log_softmax

# For users; the rest serves the commands.
__all__ = ["TrainedRun", "open_run"]

PyTree = Any

# Normalised images are a few deviations from 0; those of another scale are far off.
_FAR = 20


class TrainedRun:
    """A trained run: its weights, its options, its results, and its predictions.

    Made by :func:`open_run`.

    Attributes:
      folder: The run's folder.
      config: Its options, the given ones among them.
      info: The shapes and statistics of its data.
      programs: Its compiled functions, on the default device.
      state: Its state at the checkpoint, finalized where it averages weights or has a
        Gaussian fitted to them.
      meta: What was saved beside the state.
      diverged: Members that do not count in an ensemble's prediction.
      temperature: What the logarithms of predicted probabilities are divided by, as
        `otmdr calibrate` fitted it at this step; None where it did not.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        config: TrainConfig,
        info: programs.DataInfo,
        compiled: programs.Programs,
        state: PyTree,
        meta: dict[str, Any],
    ):
        self.folder, self.config, self.info = folder, config, info
        self.programs, self.state, self.meta = compiled, state, meta
        self.diverged: tuple[int, ...] = tuple(meta.get("diverged", ()))
        self.temperature: float | None = None

    def __repr__(self) -> str:
        """One line; the weights would fill the screen."""
        method, model = self.config.method.name, self.config.model.name
        if self.config.model.members is not None:
            model = " + ".join(self.config.model.member_names)
        return f"TrainedRun({str(self.folder)!r}, {method}, {model}, step {self.step})"

    @property
    def step(self) -> int:
        """The steps that it was trained for, up to its checkpoint."""
        return members.steps_taken(self.state)

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of result.json; empty for a run that has none yet."""
        found = self.folder / "result.json"
        return run_folder.read_result(self.folder) if found.is_file() else {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; their numbers where they have none."""
        return self.info.class_names or tuple(map(str, range(self.info.num_classes)))

    @property
    def params(self) -> PyTree:
        """The parameters that predict.

        Of an ensemble, and of a run that has collected members, a list with those of
        each member; of a posterior a :class:`otmdr_jax.bnn.MeanField`.
        """
        found = [params for params, _ in members.predictors(self.config, self.state)]
        return found[0] if len(found) == 1 else found

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The run's data, loaded when they are first asked for.

        Raises:
          FileNotFoundError: They are not there.
          ValueError: They are not those that the run was trained on.
        """
        found = programs.load_data(self.config)
        now = programs.fingerprint(found)
        programs.check_same_data(self.meta["data"], now, self.folder, found)
        return found

    def predict(self, images: Any, *, calibrated: bool = True) -> np.ndarray:
        """Predicts the probability of each class; where there are none, the outputs.

        Of an ensemble, a posterior, or other samples it is their mean probability, then
        calibrated by the :attr:`temperature` if one was fitted. The images go through
        one compiled program in batches of the run's `eval_batch_size`; fewer than that
        through one for the next power of 2. Several devices share a batch.

        Args:
          images: (N, H, W, C), of any number N, as the training images were before they
            were normalised: of the same size and dtype, on the same scale. Gray images
            may be (N, H, W).
          calibrated: Whether to apply the temperature.

        Returns:
          (N, C) float64 probabilities; where targets are no classes, the mean outputs
          of members and samples.

        Raises:
          ValueError: Images of another shape; TypeError: of another dtype.

        Example:
          >>> import tempfile, numpy as np, otmdr_jax
          >>> from otmdr_jax import training
          >>> folder = tempfile.mkdtemp() + "/run"
          >>> config = otmdr_jax.config.TrainConfig(method="sam", steps=2)
          >>> _ = training.train(config, output=folder, show_progress=False)
          >>> run = otmdr_jax.open_run(folder)
          >>> run.predict(np.zeros((3, 8, 8, 1), np.uint8)).shape
          (3, 10)
        """
        return self.calibrated(self.predict_members(images).log_probs, calibrated)

    def calibrated(self, log_probs: np.ndarray, calibrated: bool = True) -> np.ndarray:
        """(N, C) probabilities of log-probabilities, at the :attr:`temperature`."""
        if not self.info.num_classes:
            return log_probs  # outputs
        if calibrated and self.temperature is not None:
            log_probs = log_softmax(log_probs / self.temperature)
        return np.exp(log_probs)

    def predict_members(self, images: Any, report: Any = None) -> prediction.Predicted:
        """Predicts with each member, and says how far samples disagree.

        Args:
          images: As for :meth:`predict`.
          report: Function that is called with the number of finished images.

        Returns:
          The :class:`otmdr_jax.experiments.prediction.Predicted` of the images,
          without the temperature.
        """
        images = checked_images(images, self.info)
        compiled, state = self._spread
        largest = self.config.run.eval_batch_size
        size = min(largest, 1 << max(len(images) - 1, 0).bit_length())
        labels = np.zeros(max(len(images), 1), np.int32)  # not looked at
        examples = Split(images, labels)
        if not len(images):
            blank = np.zeros((1, *images.shape[1:]), images.dtype)
            examples = Split(blank, labels)
        found = prediction.predict(
            self.config,
            state,
            examples,
            compiled,
            without=self.diverged,
            report=report,
            batch_size=size,
        )
        if len(images):
            return found
        within = None if found.within is None else found.within[:, :0]
        return found._replace(
            log_probs=found.log_probs[:0], members=found.members[:, :0], within=within
        )

    @functools.cached_property
    def _spread(self) -> tuple[programs.Programs, PyTree]:
        """Programs and state on all devices of this process, which share a batch."""
        devices = jax.local_devices()
        if len(devices) == 1:
            return self.programs, self.state
        mesh = parallel.make_mesh({"data": len(devices)}, devices)
        mine = self.programs.own
        compiled = programs.compile_programs(self.config, self.info, mesh, mine)
        return compiled, jax.device_put(self.state, parallel.replicated(mesh))


def open_run(
    folder: str | os.PathLike,
    which: str | int = "latest",
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
      which: "latest", "best" on the validation set, or a step.
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
    with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as saved:
        step = step_of(which, saved)
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
    assert run.programs.finish is not None
    if run.config.method == own.method:
        shapes = run.programs.seen_shapes(run.state)
        seen = run_folder.read_seen(run.folder, run.step, shapes)
        if seen is not None:
            run.state = run.programs.finish(run.state, seen)
            return
    run.state = run.config.method.finalize(
        run.config, run.state, run.dataset, run.programs
    )


def checked_images(images: Any, info: programs.DataInfo) -> np.ndarray | LazyImages:
    """Images that a run can predict, (N, H, W, C).

    Args:
      images: An array, or lazy images.
      info: The shapes and statistics of the run's data.

    Raises:
      ValueError: They are of another shape; TypeError: of another dtype.

    Warns:
      UserWarning: Their values seem to be of another scale.
    """
    if not isinstance(images, LazyImages):
        images = np.asarray(images)
    if images.ndim == 3 and info.image_shape[-1] == 1:
        if images.shape[1:] == info.image_shape[:2]:
            images = images[..., None]
    if images.ndim < 2 or images.shape[1:] != info.image_shape:
        one = images.shape == info.image_shape or images.shape == info.image_shape[:2]
        raise ValueError(
            f"images must be (N, {', '.join(map(str, info.image_shape))}), as the run "
            f"was trained on, got {images.shape}. "
            + ("Of one image give images[None]." if one else "Resize them first.")
        )
    wide = np.issubdtype(images.dtype, np.floating) or images.dtype == "bfloat16"
    if info.dtype == np.uint8 and images.dtype != np.uint8:
        raise TypeError(
            "images must be uint8 in 0..255, as the run was trained on, got "
            f"{images.dtype}. Of floats in [0, 1] give np.round(255 * images)"
            ".astype(np.uint8)."
        )
    if info.dtype != np.uint8:
        if not wide:
            raise TypeError(
                "images must be floats on the scale that the run was trained on, got "
                f"{images.dtype}: convert them as the training images were."
            )
        images = images.astype(np.float32)
        finite = np.isfinite(images).all(axis=tuple(range(1, images.ndim)))
        if not finite.all():
            raise ValueError(
                f"images must be finite: the one with index {np.argmin(finite)} is not."
            )
        if len(images) < 2:
            return images
        distance = np.abs(images - np.asarray(info.mean)) / np.asarray(info.std)
        near = np.std(images, axis=tuple(range(images.ndim - 1))) * _FAR
        if np.median(distance) > _FAR or (near < info.std).all():
            warnings.warn(
                "the images seem to be of another scale than the training images: half "
                f"of their values are over {_FAR} standard deviations from the mean, "
                f"or their own deviation is less than 1/{_FAR} of it.",
                stacklevel=4,
            )
    return images


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
