"""Sets of options, and functions that show them in their signatures and docstrings."""

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import (
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from otmdr_jax.core.checks import check_names, check_word

Function = TypeVar("Function", bound=Callable[..., Any])


class Field(NamedTuple):
    """What is known of an option.

    Attributes:
      type: Its type; a Literal of the words where it is one of several.
      default: Its default.
      text: What it does, for docstrings.
    """

    type: Any
    default: Any
    text: str


@functools.cache
def fields_of(kind: Any) -> dict[str, Field]:
    """The options of a set, by name.

    Example:
      >>> from otmdr_jax.core.options import BallOptions
      >>> from otmdr_jax.core.signatures import fields_of
      >>> fields_of(BallOptions)["norm"].default
      'global'
    """
    hints = get_type_hints(kind, include_extras=True)
    return {name: Field(*get_args(hint)) for name, hint in hints.items()}


def filled(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a set: those that are given, and the defaults of the others."""
    return {name: field.default for name, field in fields_of(kind).items()} | {**given}


def check_words(kind: Any, given: Mapping[str, Any]) -> None:
    """Raises ValueError unless options that are words are known ones of their set."""
    for name, field in fields_of(kind).items():
        if get_origin(field.type) is Literal:
            check_word(name, given[name], get_args(field.type))


def with_options(function: Function) -> Function:
    """Shows the options of a function's set, and refuses what is no option of it.

    Args:
      function: Its last parameter is `**options: Unpack[...]` of a set, as those in
        `core/options.py`; its docstring has an entry `**options:`, in whose place the
        options are described.

    Returns:
      The function, with each option in its signature, as a keyword with its default.

    Example:
      >>> import inspect, otmdr_jax
      >>> inspect.signature(otmdr_jax.sam).parameters["norm"].default
      'global'
      >>> otmdr_jax.sam(lambda w, batch: 0.0, nrom="none")
      Traceback (most recent call last):
      TypeError: otmdr_jax.sam takes no nrom (did you mean norm?); it takes rho, ...
    """
    signature = inspect.signature(function)
    *own, options = signature.parameters.values()
    (kind,) = get_args(options.annotation)
    fields = fields_of(kind)
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=field.type,
        )
        for name, field in fields.items()
    ]
    known = [parameter.name for parameter in (*own[1:], *keywords)]
    _, room, *inside = function.__module__.split(".")
    room = {"core": "otmdr_jax", "frameworks": inside[-1]}.get(room, room)
    name = f"{room}.{function.__name__}"

    @functools.wraps(function)
    def checked(*args, **kwargs):
        check_names(name, set(kwargs) - {own[0].name}, known)
        return function(*args, **kwargs)

    vars(checked)["__signature__"] = signature.replace(parameters=[*own, *keywords])
    checked.__doc__ = _described(inspect.getdoc(function) or "", fields)
    return checked  # type: ignore[return-value]


def _described(doc: str, fields: Mapping[str, Field]) -> str:
    """A docstring whose entry `**options:` has given way to those of the options."""
    before, _, rest = doc.partition("\n  **options:")
    _, blank, after = rest.partition("\n\n")  # it is the last one of its section
    entries = [
        textwrap.fill(
            f"{name}: {' '.join(field.text.split())}",
            width=84,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for name, field in fields.items()
    ]
    return "\n".join([before, *entries]) + blank + after
