"""Functions of one's own that a run calls on its way."""

from collections.abc import Sequence
from typing import Any


class Callback:
    """What a run calls; a subclass overrides what it needs.

    The calls come from the host's loop, between steps: on many hosts on each of them,
    :func:`otmdr_jax.parallel.is_main` says which is the first. What they raise stops
    the run, whose last checkpoint stays.

    Example:
      >>> from otmdr_jax import training
      >>> from otmdr_jax.experiments.config import TrainConfig
      >>> class Print(training.Callback):
      ...     def on_evaluation(self, step, metrics):
      ...         print(step, sorted(metrics), metrics["test"]["accuracy"] > 0)
      >>> config = TrainConfig(method="sgd", steps=2)
      >>> _ = training.train(config, callbacks=[Print()], show_progress=False)
      2 ['test'] True
    """

    def on_window(self, step: int, means: dict[str, float]) -> None:
        """After each `log_every` steps, some steps later.

        Args:
          step: The last step of the window.
          means: The means of its steps: loss, accuracy, grad_norm and so on.
        """

    def on_evaluation(self, step: int, metrics: dict[str, dict[str, float]]) -> None:
        """After each evaluation.

        Args:
          step: The steps that were taken.
          metrics: Those of each split, "test" and, if there is one, "validation".
        """

    def on_checkpoint(self, step: int, state: Any) -> None:
        """After a checkpoint was started to be written.

        Args:
          step: The steps that were taken.
          state: The training state. It is donated to the next step: copy what is kept.
        """

    def on_end(self, result: Any) -> None:
        """After the last evaluation, when the result is written.

        Args:
          result: The :class:`otmdr_jax.experiments.training.Result`.
        """


def check_callbacks(callbacks: Any) -> None:
    """Raises TypeError unless they are a sequence of callbacks."""
    if not isinstance(callbacks, Sequence) or not all(
        isinstance(one, Callback) for one in callbacks
    ):
        raise TypeError(
            "callbacks must be a list of objects of subclasses of training.Callback, "
            f"[Mine()], got {callbacks!r}."
        )
