"""What the site shows of the package's docstrings and signatures.

Their reStructuredText becomes Markdown, and functions that take options by
`**options: Unpack[...]` are shown with each of them, as `help` shows them.
"""

import importlib
import inspect
import re
import textwrap
from typing import Any

import griffe
import jax

_ROLE = re.compile(r":(?:func|class|mod|meth|attr):`~?([^`]+)`")
_INLINE_MATH = re.compile(r":math:`([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_")
# Griffe knows the plural alone: it then shows doctests as code, not as Markdown.
_EXAMPLE = re.compile(r"^([ ]*)Example:$", re.MULTILINE)
_MATH_BLOCK = re.compile(
    r"^(?P<indent>[ ]*)\.\. math::(?P<first>[^\n]*)\n"
    r"(?P<body>(?:[ ]*\n|(?P=indent)[ ]+[^\n]*\n?)*)",
    re.MULTILINE,
)


def to_markdown(text: str) -> str:
    """Replaces roles, formulas and links; leaves everything else."""

    def block(match: re.Match) -> str:
        indent = match["indent"]
        formula = f"{match['first'].strip()}\n{textwrap.dedent(match['body'])}".strip()
        return textwrap.indent(f"\n$$\n{formula}\n$$\n\n", indent, lambda line: True)

    text = _EXAMPLE.sub(r"\1Examples:", _MATH_BLOCK.sub(block, text))
    text = _INLINE_MATH.sub(r"$\1$", text)
    text = _ROLE.sub(r"`\1`", text)
    return _LINK.sub(lambda m: f"[{' '.join(m[1].split())}]({m[2]})", text)


def _shown(annotation: Any) -> str:
    """A type as it is written in code."""
    if annotation == jax.typing.ArrayLike:
        return "ArrayLike"
    return inspect.formatannotation(annotation).replace("typing.", "")


def _spell_out(func: griffe.Function) -> None:
    """Puts each option of `**options: Unpack[...]` in its place."""
    if "options" not in func.parameters or func.docstring is None:
        return
    if "Unpack" not in str(func.parameters["options"].annotation):
        return
    made = getattr(importlib.import_module(func.module.path), func.name)
    func.docstring.value = inspect.getdoc(made) or ""
    del func.parameters["options"]
    for parameter in inspect.signature(made).parameters.values():
        if parameter.name not in func.parameters:
            func.parameters.add(
                griffe.Parameter(
                    parameter.name,
                    annotation=_shown(parameter.annotation),
                    kind=griffe.ParameterKind.keyword_only,
                    default=repr(parameter.default),
                )
            )


class Docstrings(griffe.Extension):
    """Spells options out, and applies :func:`to_markdown` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        del kwargs
        if isinstance(obj, griffe.Function):
            _spell_out(obj)
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
