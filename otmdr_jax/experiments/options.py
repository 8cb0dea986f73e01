"""Kinds of options: what a value must be stands with the option's type.

    rate: Share = 0.5

is a number in (0, 1), and everything else is refused by the option's name. The text
under an option is its help on the command line.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple

from otmdr_jax.core.checks import check_rho
from otmdr_jax.experiments import patterns


class Must(NamedTuple):
    """What a value must be.

    Attributes:
      be: In words, after "must be".
      holds: A value of the right type -> whether it is so.
    """

    be: str
    holds: Callable[[Any], bool]


class OnlyWith(NamedTuple):
    """An option that does nothing but with some values of another one.

    Attributes:
      name: The option.
      other: The other one.
      values: The values that the other one may have; none are named for any but 0.
    """

    name: str
    other: str
    values: tuple[str, ...] = ()


class Option(NamedTuple):
    """An option as it is given.

    Attributes:
      name: The name that it is given by.
      field: The name of its field in its group.
      kind: Its type, with what it must be.
      default: Its default.
      group: The dataclass that has it.
    """

    name: str
    field: str
    kind: Any
    default: Any
    group: type

    @property
    def text(self) -> str:
        """Its help."""
        return texts_of(self.group)[self.field]


Count = Annotated[int, Must("at least 1", lambda n: n >= 1)]
NotNegative = Annotated[float, Must("at least 0", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Must("positive", lambda x: 0 < x < math.inf)]
AtLeastOne = Annotated[float, Must("at least 1", lambda x: 1 <= x < math.inf)]
Bound = Annotated[float, Must("positive", lambda x: x > 0)]
Heat = Annotated[float, Must("at least 0", lambda x: x >= 0)]
Tilt = Annotated[float, Must("in [0, 1]", lambda x: 0 <= x <= 1)]
Share = Annotated[float, Must("in (0, 1)", lambda x: 0 < x < 1)]
Rate = Annotated[float, Must("in [0, 1)", lambda x: 0 <= x < 1)]
# What JAX keeps of a seed: a larger one would be another one's run. NumPy has no
# negative ones.
Seed = Annotated[int, Must("in 0..2**32 - 1", lambda n: 0 <= n < 2**32)]


def _are_radii(value: Any) -> bool:
    check_rho(value)  # says itself what it must be
    return isinstance(value, tuple)


Radii = Annotated[tuple[float, ...], Must("a tuple of radii", _are_radii)]


def _are_patterns(value: Any) -> bool:
    right = isinstance(value, tuple) and bool(value)
    return right and all(isinstance(pattern, str) and pattern for pattern in value)


Patterns = Annotated[
    tuple[str, ...], Must("patterns of parameters' names, as conv*", _are_patterns)
]


def _are_rates(value: Any) -> bool:
    if not _are_patterns(value):
        return False
    patterns.rates(value)  # says itself what it must be
    return True


GroupRates = Annotated[
    tuple[str, ...], Must("patterns with a rate each, as head/*=0.1", _are_rates)
]


def check(name: str, value: Any, kind: Any) -> None:
    """Refuses a value that an option cannot have.

    Args:
      name: The option's name, for the error.
      value: Its value.
      kind: Its type.

    Raises:
      ValueError: A value of another type, or one that the type does not allow.

    Example:
      >>> check("rate", 0.5, Share)
      >>> check("rate", 1.5, Share)
      Traceback (most recent call last):
      ValueError: rate must be in (0, 1), got 1.5.
    """
    kinds, optional = alternatives(kind)
    if value is None and optional:
        return
    left_out = ", or left out" if optional else ""
    plain, musts = _plain(kinds[0]), getattr(kinds[0], "__metadata__", ())
    if typing.get_origin(plain) is Literal:
        words = [*typing.get_args(plain), *([None] if optional else [])]
        be = f"one of {', '.join(map(repr, words))}"
        near = hint(value, filter(None, words)) if isinstance(value, str) else ""
        _must(name, value, value in words, be, near)
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = number and isinstance(value, int) if plain is int else True
    right = number if plain is float else right
    if plain in (bool, str):
        right = isinstance(value, plain)
    if optional and musts:  # all that it must be in one sentence
        be = "an integer of " * (plain is int) + musts[0].be
        _must(name, value, right and musts[0].holds(value), be + left_out)
        return
    if plain is int:
        _must(name, value, number, "a number" + left_out)
    nouns = {bool: "a flag", float: "a number", int: "an integer", str: "text"}
    _must(name, value, right, nouns.get(plain, "") + left_out)
    for must in musts:
        _must(name, value, must.holds(value), must.be)


def _must(name: str, value: Any, holds: bool, be: str, near: str = "") -> None:
    if not holds:
        plain = isinstance(value, str | int | float | tuple | list | dict | None)
        got = repr(value) if plain else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be {be}, got {got}.{near}")


def hint(word: Any, known: Iterable[str]) -> str:
    """What an unknown word may have meant, to end an error with; "" for nothing near.

    Args:
      word: What came.
      known: The words that there are.

    Example:
      >>> hint("SMA", ["sgd", "sam"])
      " Did you mean 'sam'?"
    """
    words = {name.lower().replace("_", "-"): name for name in known}
    near = difflib.get_close_matches(str(word).lower().replace("_", "-"), words, 2)
    return f" Did you mean {' or '.join(repr(words[x]) for x in near)}?" * bool(near)


def alternatives(kind: Any) -> tuple[list[Any], bool]:
    """The types that a type allows without None, and whether it allows None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = list(typing.get_args(kind))
    else:
        parts = [kind]
    without = [part for part in parts if part is not type(None)]
    return without, len(without) < len(parts)


def _plain(kind: Any) -> Any:
    return typing.get_args(kind)[0] if hasattr(kind, "__metadata__") else kind


def is_optional(kind: Any) -> bool:
    """Whether a type allows None."""
    return alternatives(kind)[1]


def plain(kind: Any) -> Any:
    """A type without what its values must be."""
    kinds, optional = alternatives(kind)
    return _plain(kinds[0]) | None if optional else _plain(kinds[0])


def options_of(group: type, key: str = "name") -> dict[str, Option]:
    """The options of a dataclass by the names that they are given by.

    Args:
      group: The dataclass.
      key: The name by which its `name` is given.
    """
    return _options_of(group, key)


@functools.cache
def _options_of(group: Any, key: str) -> dict[str, Option]:
    hints = typing.get_type_hints(group, include_extras=True)
    found = {}
    for field in dataclasses.fields(group):
        name = key if field.name == "name" else field.name
        kind = hints[field.name]
        found[name] = Option(name, field.name, kind, field.default, group)
    return found


@functools.cache
def texts_of(group: Any) -> dict[str, str]:
    """The text under each option of a dataclass, with those of what it inherits."""
    found: dict[str, str] = {}
    kinds: list[Any] = [x for x in group.__mro__ if dataclasses.is_dataclass(x)]
    for kind in reversed(kinds):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(node, ast.ClassDef)
        for option, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(option, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(option.target, ast.Name)
                assert isinstance(text.value, ast.Constant)
                found[option.target.id] = inspect.cleandoc(str(text.value.value))
    return found
