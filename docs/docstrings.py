"""Turns the reStructuredText in the package's docstrings into Markdown for the site."""

import re
import textwrap
from typing import Any

import griffe

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


class Docstrings(griffe.Extension):
    """Applies :func:`to_markdown` to every docstring that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
