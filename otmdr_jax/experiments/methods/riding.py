"""The common part of methods that ride on a method of one weight vector."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp

from otmdr_jax import parallel
from otmdr_jax.core.checks import check_word
from otmdr_jax.experiments.methods import otmdr, point, sam
from otmdr_jax.experiments.methods.base import Course, MethodOptions, Run, no_joint_loss
from otmdr_jax.experiments.options import Option, options_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Riding(MethodOptions):
    """The options of methods that ride on another one.

    Attributes:
      bases: What they can ride on.
      own: The options of the function that they are made by, and not of the base.
    """

    bases: ClassVar[dict[str, type[MethodOptions]]] = {
        kind.name: kind for kind in (point.Sgd, sam.Sam, sam.Asam, otmdr.Otmdr)
    }
    own: ClassVar[tuple[str, ...]] = ()

    base: MethodOptions = point.Sgd()
    """What snapshot, fge, swa, swag, mc-dropout and laplace train with, and whose
    options they take."""

    @classmethod
    def all_options(cls, base: str | None = None) -> dict[str, Option]:
        """See :class:`MethodOptions`: `base` is given by its name, `base_method`."""
        found = dict(options_of(cls))
        riding = found.pop("base")
        if len(cls.bases) > 1:
            kind = Literal[tuple(cls.bases)]  # type: ignore[valid-type]
            found["base_method"] = riding._replace(
                name="base_method", kind=kind, default="sgd"
            )
        return cls.bases.get(base or "sgd", point.Sgd).all_options() | found

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        own, rest = options_of(cls), dict(options)
        base = cls.bases[rest.pop("base_method", "sgd")]
        mine = {name: rest.pop(name) for name in options if name in own}
        return cls(base=base.of(rest), **mine)

    def flat(self) -> dict[str, Any]:
        found = super().flat()
        found.pop("base")
        named = {"base_method": self.base.name} if len(self.bases) > 1 else {}
        return {**named, **self.base.flat(), **found}

    @classmethod
    def make(cls, model, optimizer, loss, *, base="sgd", **options):
        """See :class:`MethodOptions`.

        Args:
          model: The network.
          optimizer: The optimizer of the base.
          loss: The loss.
          base: The name of the method that it rides on.
          **options: Those of the base, and its own.
        """
        check_word(f"base of {cls.name}", base, tuple(cls.bases))
        if "ends" in options and "ends" not in cls.own:
            raise TypeError(
                f"{cls.name} collects nothing on its way: leave ends out, got "
                f"{options['ends']!r}."
            )
        own = {name: options.pop(name) for name in cls.own if name in options}
        optimizer = cls.wrapped_optimizer(optimizer, own)
        made = cls.bases[base].make(model, optimizer, loss, **options)
        return cls.wrapped(made, model, **own)

    @classmethod
    def wrapped_optimizer(cls, optimizer: Any, own: dict[str, Any]) -> Any:
        """The optimizer of the base; it may take options out of `own`."""
        del own
        return optimizer

    @classmethod
    def wrapped(cls, method: Any, model: Any, **own: Any) -> Any:
        """The method around the base's."""
        del model, own
        return method

    def options(self, run: Run) -> dict[str, Any]:
        found = {**self.base.options(run), "base": self.base.name}
        if (course := self._course(run)) is not None:
            found["ends"] = course.ends
        return found

    def _course(self, run: Run) -> Course | None:
        peak = run.config.schedule.learning_rate
        return self.course(peak, run.total_steps, run.steps_per_epoch)

    @property
    def gradients(self) -> float:
        """Those of the base."""
        return self.base.gradients

    @property
    def gradient(self) -> MethodOptions:
        """The base."""
        return self.base

    def check(self, config: Any) -> None:
        super().check(config)
        self.base.check(config)
        no_joint_loss(
            self,
            config,
            "each member collects its own weights, or has its own masks or Gaussian, "
            "with",
        )


def summed(programs: Any, state: Any, batches: Iterable[tuple[Any, jax.Array]]) -> Any:
    """The sum of what `programs.of_batch` gives for each batch with its key."""
    total = None
    for batch, key in batches:
        mesh = programs.mesh
        batch = parallel.place(batch, mesh, parallel.data_spec(mesh))
        found = programs.of_batch(state, batch, key)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total
