"""Renders a page from its template: as Markdown with pictures, or as one HTML file.

`templates/report.md.j2` defines the content of a page. The HTML page has the same
Markdown as its body and shows each picture's panels side by side or below each other.
"""

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from otmdr_jax.experiments.report.drawing import Drawn
from otmdr_jax.io import extras

_BRACKETS, _ESCAPED = re.compile(r"([\[\]\\])"), r"\\\1"
# A standard deviation, or error, after its number.
_SPREAD = re.compile(r"(?<=\d)( ± \d\S*)")


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
      alt: Description for readers who cannot see it.
      figure: Function that makes the `matplotlib.figure.Figure`.
    """

    alt: str
    figure: Callable[[], Any]


class Page(NamedTuple):
    """A page before its pictures are drawn.

    Attributes:
      title: The heading.
      text: The Markdown below the heading.
      pictures: The pictures in the text, by name.
    """

    title: str
    text: str
    pictures: dict[str, Picture]


def page(title: str, **context: Any) -> Page:
    """Fills the template of a report.

    Args:
      title: Heading of the page, plain text.
      **context: Variables of the template.
    """
    pictures: dict[str, Picture] = {}

    def picture(name, alt, figure, *args, **kwargs):
        alt = " ".join(alt.split())
        pictures[name] = Picture(alt, functools.partial(figure, *args, **kwargs))
        return f"![{_BRACKETS.sub(_ESCAPED, alt)}]({name}.png)"

    template = _templates().get_template("report.md.j2")
    text = template.render(title=title, picture=picture, **context)
    # Omitted parts leave blank lines behind.
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return Page(title, text, pictures)


def markdown(page: Page) -> str:
    """Returns the page as Markdown, which refers to its pictures as `NAME.png`."""
    return f"# {page.title}\n\n{page.text}"


def html(page: Page, drawn: Mapping[str, Drawn]) -> str:
    """Returns the page as one HTML file with its pictures inside.

    Args:
      page: The page.
      drawn: Its drawn pictures, by name.

    Raises:
      ImportError: markdown-it-py is not installed.
    """
    try:
        from markdown_it import MarkdownIt
        from markdown_it.common.utils import escapeHtml
    except ImportError as error:
        raise ImportError(
            f"HTML pages need markdown-it-py. {extras.command('train')}"
        ) from error
    templates = _templates()

    def image(renderer, tokens, index, options, env):
        name = tokens[index].attrs["src"].removesuffix(".png")
        figure = templates.get_template("picture.html.j2")
        return figure.render(drawn=drawn[name])

    def text(renderer, tokens, index, options, env):
        escaped = escapeHtml(tokens[index].content)
        return _SPREAD.sub(r'<span class="spread">\1</span>', escaped)

    # Raw HTML in a text, such as a run's name, stays text.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", image)
    parser.add_render_rule(
        "table_open", lambda *_: '<div class="scroll" tabindex="0"><table>\n'
    )
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    parser.add_render_rule("text", text)
    tokens = parser.parse(page.text)
    sections = []
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if before.type == "heading_open" and before.tag == "h2":
            anchor = re.sub(r"\W+", "-", token.content.lower())
            before.attrSet("id", anchor)
            sections.append((anchor, token.content))
        if [child.type for child in token.children or ()] == ["image"]:
            before.hidden = after.hidden = True  # a figure is no paragraph
    body = parser.renderer.render(tokens, parser.options, {})
    from markupsafe import Markup

    return templates.get_template("report.html.j2").render(
        title=page.title, sections=sections, body=Markup(body)
    )


@functools.cache
def _templates() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(f"reports need Jinja2. {extras.command('train')}") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("otmdr_jax.experiments.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["modules"] = _modules
    return environment


def _modules(*names: str) -> list[Any]:
    """Imports modules of this package that a template uses."""
    return [importlib.import_module(f"{__package__}.{name}") for name in names]
