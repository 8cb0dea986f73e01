"""A page as its parts, written as Markdown beside pictures or as one HTML file.

Text is Markdown in both. In HTML, pictures stand inside the page, and narrow screens
get pictures that are drawn for them.
"""

import base64
import html
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from otmdr_jax.experiments.report import plots

_MISSING = "**Missing:** "

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 960px; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
nav { columns: 14rem; } nav a { display: block; padding: .15rem 0; }
a { color: #00558f; }
.scroll { overflow-x: auto; margin: 1rem 0; background:  /* a shadow where it goes on */
  linear-gradient(to left, #fff 2rem, transparent) right / 3rem 100% local no-repeat,
  linear-gradient(to left, #bbb, transparent) right / .8rem 100% scroll no-repeat; }
table { border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; } td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; display: block; }
code { background: #f2f2f2; padding: 0 .2em; }
td code { white-space: pre; }
pre { background: #f2f2f2; padding: .7rem; overflow-x: auto; }
pre code { padding: 0; }
.missing { border-left: 4px solid #d55e00; background: #fdf3ec;
  padding: .4rem .8rem; }
"""


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
      name: Of its file, without an ending.
      alt: What it shows, for those who cannot see it.
      draw: narrow -> a `matplotlib.figure.Figure`, where narrow asks for the picture of
        a phone.
    """

    name: str
    alt: str
    draw: Callable[[bool], Any]


class Section(NamedTuple):
    """A heading, "" for none, and what stands under it: Markdown or pictures."""

    title: str
    parts: tuple[str | Picture, ...]


class Document(NamedTuple):
    """A title and its sections."""

    title: str
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> Iterator[Picture]:
        """All pictures in their order."""
        for section in self.sections:
            yield from (part for part in section.parts if isinstance(part, Picture))


def missing(what: str) -> str:
    """A paragraph that names what a page lacks, and how to get it."""
    return _MISSING + what


def markdown(document: Document) -> str:
    """The page as Markdown; its pictures are files beside it, `NAME.png`."""
    parts = [f"# {document.title}"]
    for section in document.sections:
        if section.title:
            parts.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, Picture):
                part = f"![{part.alt}]({part.name}.png)"
            parts.append(part)
    return "\n\n".join(parts) + "\n"


def html_page(document: Document, wide: dict[str, bytes]) -> str:
    """The page as one HTML file.

    Args:
      document: What it holds.
      wide: The pictures that Markdown shows, as PNG by name: drawn once for both.

    Raises:
      ImportError: markdown-it-py is not installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError(
            "HTML pages need markdown-it-py: pip install otmdr-jax[train]"
        ) from error
    # Raw HTML in a text, a run's name for one, stays text.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    body, links = [], []
    for section in document.sections:
        if section.title:
            anchor = re.sub(r"\W+", "-", section.title.lower())
            links.append(f'<a href="#{anchor}">{html.escape(section.title)}</a>')
            body.append(f'<h2 id="{anchor}">{html.escape(section.title)}</h2>')
        for part in section.parts:
            if isinstance(part, Picture):
                body.append(_figure(part, wide[part.name]))
                continue
            text = parser.render(part)
            text = text.replace("<table>", '<div class="scroll"><table>')
            text = text.replace("</table>", "</table></div>")
            if part.startswith(_MISSING):
                text = text.replace("<p>", '<p class="missing">')
            body.append(text)
    title = html.escape(document.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n<nav>{' '.join(links)}</nav>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _figure(picture: Picture, wide: bytes) -> str:
    alt = html.escape(picture.alt, quote=True)
    # A CSS inch has 96 pixels; a PNG says its width behind its first chunk's name.
    width = round(96 * int.from_bytes(wide[16:20], "big") / plots.DPI)
    narrow = plots.png(picture.draw(True))
    return (
        "<figure><picture>"
        f'<source media="(max-width: 640px)" srcset="{_data(narrow)}">'
        f'<img src="{_data(wide)}" alt="{alt}" width="{width}">'
        "</picture></figure>"
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
