"""The interface of a method, and the run that it is built for."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import optax
from jax.sharding import Mesh

from otmdr_jax.experiments.methods.training import Loss, Method
from otmdr_jax.experiments.options import OnlyWith, Option, options_of

PyTree = Any


class Run(NamedTuple):
    """The run that a method is built for.

    Attributes:
      config: All options, a :class:`otmdr_jax.experiments.config.TrainConfig`.
      num_train: Examples in the training set.
      steps_per_epoch: Whole batches in an epoch.
      total_steps: Steps of the run.
      rate: The learning rate at each step.
      mesh: The devices; None for one.
    """

    config: Any
    num_train: int
    steps_per_epoch: int
    total_steps: int
    rate: optax.Schedule
    mesh: Mesh | None

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes that devices are arranged along."""
        return () if self.mesh is None else tuple(self.mesh.axis_names)


class Course(NamedTuple):
    """The learning rate of a method that has its own.

    Attributes:
      rate: At each step.
      ends: The steps after which weights are collected or averaged.
    """

    rate: optax.Schedule
    ends: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """A method: its options, and all that a run asks of it.

    A method of one's own is a subclass with its options as fields, and an entry in
    :data:`otmdr_jax.experiments.methods.METHODS`.

    Attributes:
      name: What it goes by.
      has_particles: Whether devices may share its particles.
      is_posterior: Whether what it trains is a posterior, which does not decay.
      has_own_update: Whether its update takes the place of the base optimizer.
      is_sparse: Whether most of the weights that it trains are zero.
      needs_dropout: Whether it predicts with the masks of dropout.
      collects: Whether it predicts with copies of its weights.
      is_fitted: Whether predictions are of a Gaussian that a pass over the training set
        fits to weights, which it does not change.
      share: What makes one memory of those of an ensemble's members: see
        :class:`otmdr_jax.experiments.methods.Method`.
      only_with: Options that do nothing but with some values of another one.
    """

    name: ClassVar[str]
    has_particles: ClassVar[bool] = False
    is_posterior: ClassVar[bool] = False
    has_own_update: ClassVar[bool] = False
    is_sparse: ClassVar[bool] = False
    needs_dropout: ClassVar[bool] = False
    collects: ClassVar[bool] = False
    is_fitted: ClassVar[bool] = False
    share: ClassVar[Any] = None

    only_with: ClassVar[tuple[OnlyWith, ...]] = ()

    # -- its options by name --

    @classmethod
    def all_options(cls, base: str | None = None) -> dict[str, Option]:
        """The options by the names that they are given by.

        Args:
          base: The method that it rides on, whose options it has too; None for the
            default, and where it rides on none.
        """
        del base
        return options_of(cls)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """The method with options by the names that they are given by."""
        return cls(**options)

    def flat(self) -> dict[str, Any]:
        """The options by these names."""
        return {name: getattr(self, name) for name in options_of(type(self))}

    # -- what it is --

    @classmethod
    def make(
        cls,
        model: Any,
        optimizer: optax.GradientTransformation,
        loss: Loss,
        **options: Any,
    ) -> Method:
        """The method around a model; options are those of its functions.

        Args:
          model: The network, as for :func:`otmdr_jax.experiments.methods.create`.
          optimizer: What turns the gradient into an update.
          loss: The loss.
          **options: Those of the transformation, or of what it stands for.
        """
        raise NotImplementedError

    def options(self, run: Run) -> dict[str, Any]:
        """The options of :meth:`make` in a run."""
        raise NotImplementedError

    @staticmethod
    def logged(memory: PyTree) -> dict[str, Any]:
        """Further scalars for the log, of what the gradient remembers after a step."""
        del memory
        return {}

    @property
    def gradients(self) -> float:
        """Gradients of a whole batch that a step takes."""
        raise NotImplementedError

    @property
    def gradient(self) -> "MethodOptions":
        """The method that gives the gradient: another one where it rides on that."""
        return self

    @property
    def num_particles(self) -> int:
        """Copies of what is trained that climb on their own."""
        return 1

    @property
    def num_subbatches(self) -> int:
        """Parts of the batch that have a perturbation of their own."""
        return 1

    @property
    def num_parts(self) -> int:
        """Parts of a batch, or of a sub-batch, that the ascent steps share."""
        return 1

    def course(
        self, peak: float, total_steps: int, steps_per_epoch: int
    ) -> Course | None:
        """The learning rate where it is part of the method; else None.

        Args:
          peak: The highest rate.
          total_steps: Steps of the run.
          steps_per_epoch: Whole batches in an epoch.
        """
        del peak, total_steps, steps_per_epoch
        return None

    # -- what predicts --

    def seen(self, config: Any, state: PyTree, dataset: Any, programs: Any) -> Any:
        """What a prediction needs of the training set, summed over a pass over it.

        Args:
          config: The run's options.
          state: Its state.
          dataset: Its data.
          programs: Its compiled functions.

        Returns:
          The sum for `programs.finish`; None where a state predicts as it is.
        """
        del config, state, dataset, programs
        return None

    def finalize(self, config: Any, state: PyTree, dataset: Any, programs: Any) -> Any:
        """A state to predict with, after a pass over the training set where needed.

        Args:
          config: The run's options.
          state: Its state.
          dataset: Its data.
          programs: Its compiled functions.
        """
        seen = self.seen(config, state, dataset, programs)
        return state if seen is None else programs.finish(state, seen)

    def fitted(self, state: PyTree) -> dict[str, float]:
        """What is logged of what :meth:`finalize` fitted, of members a mean."""
        del state
        return {}

    def trained(self, state: PyTree) -> PyTree:
        """The state of the one weight vector that a member's training gives."""
        return state

    def collected(self, state: PyTree) -> list[PyTree]:
        """The members that a run of one model has collected, as states."""
        del state
        return []

    # -- what goes together --

    def check(self, config: Any) -> None:
        """Refuses options of a run that the method cannot go with.

        Args:
          config: All options of the run.

        Raises:
          ValueError: Options that do not go together.
        """


def no_frozen(name: str) -> ValueError:
    """The error that a sparse method freezes nothing."""
    return ValueError(
        f"freeze is not for {name}, which chooses the connections of all layers "
        "together: leave it out, or train with another method."
    )


def no_joint_loss(method: MethodOptions, config: Any, why: str) -> None:
    """Refuses members with one loss."""
    if config.model.joint:
        raise ValueError(
            f"{method.name} with a joint ensemble is not defined: {why} "
            "--ensemble independent."
        )
