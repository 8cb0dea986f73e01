"""A trained run in memory: its weights, its results, and its predictions."""

import functools
import math
import pathlib
import warnings
from typing import Any

import jax
import numpy as np

from otmdr_jax import parallel
from otmdr_jax.data import Dataset, LazyImages, Split
from otmdr_jax.data.checks import plain
from otmdr_jax.experiments import members, prediction, programs, run_folder
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.metrics.calibration import log_softmax

PyTree = Any

# Normalised images are a few deviations from 0; those of another scale are far off.
_FAR = 20


class TrainedRun:
    """A trained run: its weights, its options, its results, and its predictions.

    Made by :func:`otmdr_jax.open_run`.

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
          >>> run.predict(np.full((3, 8, 8, 1), 128, np.uint8)).shape
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


def checked_images(images: Any, info: programs.DataInfo) -> np.ndarray | LazyImages:
    """Images that a run can predict, (N, H, W, C).

    Args:
      images: An array, or lazy images.
      info: The shapes and statistics of the run's data.

    Raises:
      ValueError: They are of another shape, or hide entries.
      TypeError: They are of another dtype.

    Warns:
      UserWarning: Their values seem to be of another scale.
    """
    if not isinstance(images, LazyImages):
        images = plain(images, "images")
    if images.ndim == 3 and info.image_shape[-1] == 1:
        if images.shape[1:] == info.image_shape[:2]:
            images = images[..., None]
    if images.ndim < 2 or images.shape[1:] != info.image_shape:
        one = images.shape == info.image_shape or images.shape == info.image_shape[:2]
        raise ValueError(
            f"images must be (N, {', '.join(map(str, info.image_shape))}), as the run "
            f"was trained on, got {images.shape}. "
            + ("Of one image give images[None]." if one else _reshaped(images, info))
        )
    wide = np.issubdtype(images.dtype, np.floating) or images.dtype == "bfloat16"
    if info.dtype == np.uint8 and images.dtype != np.uint8:
        raise TypeError(
            "images must be uint8 in 0..255, as the run was trained on, got "
            f"{images.dtype}. Of floats in [0, 1] give np.round(255 * images)"
            ".astype(np.uint8), of integers in 0..255 images.astype(np.uint8)."
        )
    if info.dtype == np.uint8 and not isinstance(images, LazyImages):
        tops = images.max(axis=tuple(range(images.ndim - 1)), initial=0) / 255
        if len(images) > 1 and (tops < np.asarray(info.mean)).all():
            warnings.warn(
                f"the images go up to {images.max()}, which is below the mean of the "
                "training images: are they on a scale of 0..255?",
                stacklevel=4,
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


def _reshaped(images, info):
    """What to do with images of a wrong shape."""
    *size, channels = info.image_shape
    if images.dtype == object or images.ndim == 0:
        return "Give one array."
    if len(info.image_shape) == 3 and images.shape[1:] == (channels, *size):
        return "Move the channels: images.transpose(0, 2, 3, 1)."
    if images.size == len(images) * math.prod(info.image_shape):
        shape = ", ".join(map(str, info.image_shape))
        return f"Reshape them: images.reshape(-1, {shape})."
    return "Resize them first."
