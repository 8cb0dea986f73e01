"""Kinds of options: what a value must be stands with the option's type.

    rate: Share = 0.5

is a number in (0, 1), and everything else is refused by the option's name. The text
under an option is its help on the command line.
"""

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from otmdr_jax.core.options import check_rho


class Must(NamedTuple):
    """What a value must be.

    Attributes:
      be: In words, after "must be".
      holds: A value of the right type -> whether it is so.
    """

    be: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Must("at least 1", lambda n: n >= 1)]
NotNegative = Annotated[float, Must("at least 0", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Must("positive", lambda x: 0 < x < math.inf)]
Bound = Annotated[float, Must("positive", lambda x: x > 0)]
Share = Annotated[float, Must("in (0, 1)", lambda x: 0 < x < 1)]
Rate = Annotated[float, Must("in [0, 1)", lambda x: 0 <= x < 1)]


def _are_radii(value: Any) -> bool:
    check_rho(value)  # says itself what it must be
    return True


Radii = Annotated[tuple[float, ...], Must("radii", _are_radii)]


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
    also = ", or left out" if optional else ""
    words = [word for one in kinds for word in typing.get_args(_plain(one))]
    if typing.get_origin(_plain(kinds[0])) is Literal:
        words += [None] if optional else []
        known = ", ".join(map(repr, words))
        _must(name, value, value in words, f"one of {known}")
        return
    plain = _plain(kinds[0])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if plain is bool:
        _must(name, value, isinstance(value, bool), "a flag")
    elif plain is float:
        _must(name, value, number, "a number" + also)
    elif plain is int:
        _must(name, value, number, "a number" + also)
        _must(name, value, isinstance(value, int), "an integer" + also)
    elif plain is str:
        _must(name, value, isinstance(value, str), "text" + also)
    for must in getattr(kinds[0], "__metadata__", ()):
        _must(name, value, must.holds(value), must.be + also)


def _must(name: str, value: Any, holds: bool, be: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {be}, got {value!r}.")


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


@functools.cache
def kinds_of(group: type) -> dict[str, Any]:
    """The options of a dataclass: name -> type, with what it allows."""
    hints = typing.get_type_hints(group, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(group)}


@functools.cache
def texts_of(group: type) -> dict[str, str]:
    """The text under each option of a dataclass, with those of what it inherits."""
    found: dict[str, str] = {}
    for kind in reversed(group.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(node, ast.ClassDef)
        for option, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(option, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(option.target, ast.Name)
                assert isinstance(text.value, ast.Constant)
                found[option.target.id] = inspect.cleandoc(str(text.value.value))
    return found
