"""A run's options: six groups, given and kept by the names of the command line."""

import dataclasses
import difflib
import functools
import os
from typing import Any, Self

from otmdr_jax.baselines import presets as baselines
from otmdr_jax.experiments.config.groups import Data, Model, Optimizer, Run, Schedule
from otmdr_jax.experiments.methods import METHODS, MethodOptions, kind_of
from otmdr_jax.experiments.options import Option, check, is_optional, options_of, plain

# The groups but for the method's, which is one of METHODS.
GROUPS: dict[str, type] = {
    "data": Data,
    "model": Model,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "run": Run,
}
# Options of several texts, of which one may stand alone.
LISTS = ("augment", "freeze", "learning_rate_of", "perturb")


@dataclasses.dataclass(frozen=True, init=False)
class TrainConfig:
    """Options of a training run; `--preset demo` is the job of `otmdr demo`.

    They are given by the names of the command line, whatever their group:
    `TrainConfig(data="cifar10", method="sam", rho=(0.1,), epochs=3)`. They are read by
    group: `config.data.name`, `config.method.rho`, `config.run.epochs`.

    Attributes:
      data: The data set.
      model: The networks.
      method: How they are trained: of the type of the method that `method` names, one
        of :data:`otmdr_jax.experiments.methods.METHODS`, with its own options alone.
      optimizer: The loss, and what turns its gradient into an update.
      schedule: The learning rate.
      run: The length of the run, its devices, and its records.

    Raises:
      TypeError: There is no such option.
      ValueError: An option that the method does not have, a value that an option cannot
        have, or options that do not go together.

    Example:
      >>> from otmdr_jax.experiments.config import TrainConfig
      >>> config = TrainConfig(method="sam", epochs=3)
      >>> config.method.rho, config.run.epochs, config.schedule.learning_rate
      ((0.05,), 3, 0.1)
      >>> config.replace(method="otmdr", num_particles=2).method.num_particles
      2
      >>> TrainConfig(method="sam", num_particles=2)
      Traceback (most recent call last):
      ValueError: sam has no option num_particles; it has ...
    """

    data: Data
    model: Model
    method: MethodOptions
    optimizer: Optimizer
    schedule: Schedule
    run: Run

    def __init__(self, **options: Any) -> None:
        """Sorts options into groups and checks them.

        Args:
          **options: By their names; None stands for the default. `method` may also be
            "deep-ensemble", "sam-ensemble" or "otmdr-ensemble": sgd, sam and otmdr with
            five members, or `members`.
        """
        if isinstance(options.get("data"), Data):  # dataclasses.replace gives groups
            names = {field.name for field in dataclasses.fields(self)}
            new = ", ".join(f"{n}={x!r}" for n, x in options.items() if n not in names)
            raise TypeError(f"options are changed by config.replace({new}).")
        options = {name: _as_json(name, value) for name, value in options.items()}
        if not isinstance(given := options.get("model"), str | None):
            raise ValueError(
                "model must be the name of a network, which a run's folder records, "
                f"got a {type(given).__name__}. Give one of your own to the training, "
                "training.train(config, data, model=...), or name its module and "
                'class, model="package.module:Name".'
            )
        for word in ("method", "base_method"):
            if not isinstance(given := options.get(word), str | None):
                raise ValueError(f"{word} must be a name, got {given!r}.")
        name = options.pop("method", None) or "otmdr"
        if name in baselines.ENSEMBLES:
            if options.get("members") is None:
                options["members"] = baselines.MEMBERS
            name = baselines.ENSEMBLES[name]
        kind = kind_of(name)
        mine = kind.all_options(options.get("base_method"))
        given = _checked(name, mine, options)
        for key, group in GROUPS.items():
            own = options_of(group, key)
            values = {own[n].field: x for n, x in given.items() if n in own}
            object.__setattr__(self, key, group(**values))
        method = kind.of({n: x for n, x in given.items() if n in mine})
        object.__setattr__(self, "method", method)
        for field in dataclasses.fields(self):
            getattr(self, field.name).check(self)

    def flat(self) -> dict[str, Any]:
        """Every option that the run has, by its name: what `config.json` holds."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            group = getattr(self, field.name)
            if field.name == "method":
                found |= {"method": group.name, **group.flat()}
            else:
                own = options_of(type(group), field.name)
                found |= {name: getattr(group, x.field) for name, x in own.items()}
        return found

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, and the method."""
        base = getattr(self.method.gradient, "name", None)
        known = {**shared_options(), **self.method.all_options(base)}
        return {
            name: value
            for name, value in self.flat().items()
            if name == "method" or value != known[name].default
        }

    def replace(self, **options: Any) -> Self:
        """The same run but for some options.

        Args:
          **options: By their names; None resets one to its default. With another
            `method` the new one must have all options that differ from their defaults;
            those at the old method's defaults get the new one's. One of `steps` and
            `epochs` takes the place of the other.
        """
        kept = self.changed()
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if options.get(one) is not None:
                kept.pop(other, None)
        return type(self)(**{**kept, **options})

    def check_used(self) -> None:
        """Raises ValueError for an option that another one leaves without effect.

        For runs that are about to start: older ones that have such options are still
        read.
        """
        flat, changed = self.flat(), self.changed()
        if self.run.steps is not None and "epochs" in changed:
            raise ValueError(
                f"steps={self.run.steps} and epochs={self.run.epochs} each say how "
                "long a run is: give one of them."
            )
        for field in dataclasses.fields(self):
            for name, other, values in getattr(self, field.name).only_with:
                fits = flat[other] in values if values else flat[other]
                if name in changed and not fits:
                    raise ValueError(
                        f"{name}={flat[name]!r} does nothing with {other}="
                        f"{flat[other]!r}, but with {' or '.join(values) or 'more'}: "
                        "leave one of them out."
                    )


@functools.cache
def shared_options() -> dict[str, Option]:
    """The options that all methods have, by name."""
    return {
        name: option
        for key, group in GROUPS.items()
        for name, option in options_of(group, key).items()
    }


@functools.cache
def method_options() -> dict[str, tuple[Option, ...]]:
    """The options that some methods have and others have not: name -> each one's."""
    found: dict[str, tuple[Option, ...]] = {}
    for kind in METHODS.values():
        for name, option in kind.all_options(None).items():
            found[name] = (*found.get(name, ()), option)
    return found


def known_options() -> dict[str, Any]:
    """The types of all options, whatever the method: name -> type."""
    of_methods = {name: plain(each[0].kind) for name, each in method_options().items()}
    shared = {name: plain(option.kind) for name, option in shared_options().items()}
    return {**shared, "method": str, **of_methods}


def check_names(names: Any) -> None:
    """Raises TypeError for names that are no option's."""
    known = set(known_options())
    if unknown := sorted(set(names) - known):
        close = difflib.get_close_matches(unknown[0], known, 3)
        hint = f": did you mean {' or '.join(close)}?" if close else "."
        raise TypeError(f"unknown options {', '.join(unknown)}{hint}")


def refuse_foreign(method: str, names: Any, mine: Any) -> None:
    """Raises ValueError for options that a method does not have."""
    if foreign := [name for name in names if name not in mine]:
        hint = ""
        if "norm" in foreign and "posterior_norm" in mine:
            hint = " Its norm is posterior_norm."
        raise ValueError(
            f"{method} has no option {', '.join(foreign)}; it has {', '.join(mine)}."
            + hint
        )


def _as_json(name: str, value: Any) -> Any:
    """An option's value as config.json gives it back: numbers, texts and tuples.

    A seed out of np.arange, a radius of a computation, a path and one pattern are what
    a caller has; JSON has none of their types.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # of NumPy or JAX
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(_as_json("", x) for x in value)
    if name in LISTS and isinstance(value, str):
        return (value,)
    # The option is text because it may hold names: a number is meant all the same.
    return str(value) if name == "members" and type(value) is int else value


def _checked(method, mine, options):
    """The options with values of the right types; without those that mean nothing."""
    check_names(options)
    given, foreign = {}, []
    for name, value in options.items():
        own = shared_options().get(name) or mine.get(name)
        known = (own,) if own else method_options()[name]
        if value is None and not is_optional(known[0].kind):
            continue  # the default
        check(name, value, known[0].kind)
        if own:
            given[name] = value
        elif any(value != option.default for option in known):
            foreign.append(name)  # all but a default that all methods share
    refuse_foreign(method, foreign, mine)
    return given
