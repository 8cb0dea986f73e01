"""Draws figures: whole as PNG, and as pieces of SVG that a page embeds.

A figure is drawn as SVG and cut into its panels and legends. Text stays text. Black and
white become the ink and the paper of the page, so that a picture can be read on light
and on dark paper; what lies on a colour map is :data:`plots.DARK` or `LIGHT` instead.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any, NamedTuple

from otmdr_jax.experiments.report import plots

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF, _DEFS = f"{{{_LINK}}}href", f"{{{_SVG}}}defs"
_DOTS, _PIXELS = 72, 96  # of an inch: units of matplotlib's SVG, and of CSS
_URL = re.compile(r"url\(#([^)]+)\)")
_LONG = re.compile(r"-?\d+\.\d{3,}")
# Said once, by the page.
_FAMILY = re.compile(r" ?font-family: [^;]*;?")


class Piece(NamedTuple):
    """A part of a drawn figure.

    Attributes:
      svg: An element `<svg>`, for a page in HTML.
      width: Width in CSS pixels, 96 to an inch.
    """

    svg: str
    width: int


class Drawn(NamedTuple):
    """A figure that has been cut into its parts.

    Attributes:
      panels: The panels; a figure without any is one panel.
      legends: The legends below them.
    """

    panels: list[Piece]
    legends: list[Piece]


def png(figure: Any) -> bytes:
    """Draws a figure as PNG; equal figures give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def cut(figure: Any, name: str, alt: str) -> Drawn:
    """Draws a figure as SVG and cuts it into its parts.

    It changes the figure, so it comes last.

    Args:
      figure: A figure whose layout is made: it has been drawn before.
      name: Name that no other figure of the page has.
      alt: Description for readers who cannot see it.
    """
    parts = [part for part in figure.subfigs if part.axes or part.texts] or [figure]
    legends = figure.legends if figure.subfigs else []
    every = [*parts, *legends]
    for i, part in enumerate(every):
        part.set_gid(f"piece-{i}")
    root = _svg(figure)  # from here on the units of boxes are those of the SVG
    height = figure.bbox.height
    known = {x.get("id"): x for defs in root.iter(_DEFS) for x in defs}
    for parent in list(root.iter()):
        for defs in parent.findall(_DEFS):
            parent.remove(defs)
    groups = {x.get("id"): x for x in root.iter()}
    pieces = []
    for i, part in enumerate(every):
        names = alt, *([f"{i + 1} of {len(parts)}"] * (len(parts) > 1))
        box = part.get_window_extent() if part in legends else part.bbox
        pieces.append(
            _piece(
                groups[f"piece-{i}"],
                known,
                (box.x0, height - box.y1, box.width, box.height),
                f"{name}-{i}-",
                f"{alt}, legend" if part in legends else ", ".join(names),
            )
        )
    return Drawn(pieces[: len(parts)], pieces[len(parts) :])


def _svg(figure: Any) -> ElementTree.Element:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Its names for what is drawn several times are random without a salt.
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "otmdr_jax"}
    figure.set_layout_engine("none")  # the layout stays
    with matplotlib.rc_context(options):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    return ElementTree.fromstring(buffer.getvalue())


def _piece(
    group: ElementTree.Element,
    known: dict[Any, ElementTree.Element],
    box: tuple[float, float, float, float],
    prefix: str,
    alt: str,
) -> Piece:
    """Makes an `<svg>` of a group of a drawn figure.

    Args:
      group: The group.
      known: Elements by id that groups refer to, such as markers.
      box: Left, top, width and height of the group in the figure.
      prefix: Prefix that makes ids unique on a page.
      alt: Description.
    """
    used: dict[str, ElementTree.Element] = {}
    waiting = list(_references(group))
    while waiting:
        found = waiting.pop()
        if found not in used:
            used[found] = known[found]
            waiting += _references(known[found])
    names = {old: f"{prefix}{i}" for i, old in enumerate(used)}
    width = round(_PIXELS * box[2] / _DOTS)
    svg = ElementTree.Element(
        f"{{{_SVG}}}svg",
        {
            "viewBox": " ".join(f"{x:.2f}" for x in box),
            "width": f"{width}",
            "role": "img",
            "aria-label": alt,
        },
    )
    if used:
        ElementTree.SubElement(svg, _DEFS).extend(used.values())
    svg.append(group)
    copy = ElementTree.fromstring(ElementTree.tostring(svg))  # a definition is shared
    for element in copy.iter():
        _clean(element, names)
    return Piece(ElementTree.tostring(copy, encoding="unicode"), width)


def _clean(element: ElementTree.Element, names: dict[str, str]) -> None:
    """Gives an element its place in a page: unique ids, short numbers, the ink."""
    own = element.attrib.pop("id", None)
    if own in names:
        element.set("id", names[own])
    for key, value in element.items():
        if key == "aria-label" or value.startswith("data:"):  # texts, and pixels
            continue
        if key == _HREF:
            value = f"#{names[value[1:]]}"
        value = _URL.sub(lambda found: f"url(#{names[found[1]]})", value)
        value = _LONG.sub(lambda found: f"{float(found[0]):.2f}", value)
        value = _FAMILY.sub("", value)
        value = value.replace(plots.INK, "currentColor")
        value = value.replace(plots.PAPER, "var(--paper)")
        element.set(key, " ".join(value.split()))
    if element.tag not in (f"{{{_SVG}}}text", f"{{{_SVG}}}tspan"):
        element.text = None
    element.tail = None


def _references(group: ElementTree.Element) -> Iterator[str]:
    """Finds the ids that a group refers to."""
    for element in group.iter():
        for key, value in element.items():
            if key == _HREF and value.startswith("#"):
                yield value[1:]
            if not value.startswith("data:"):
                yield from _URL.findall(value)


ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _LINK)
