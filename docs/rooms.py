"""Draws docs/architecture.svg: the rooms of the package, and who imports whom.

Run it after an import between rooms has come or gone: `python docs/rooms.py`. An arrow
points from a room to one that it imports; arrows that follow from others are left out.
"""

import ast
import html
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "otmdr_jax"
SVG = ROOT / "docs" / "architecture.svg"

# From the roof to the ground, as in tests/test_layout.py: a room and what it is for.
FLOORS: list[dict[str, str]] = [
    {"experiments": "training runs, measurements, reports, command line"},
    {"baselines": "what it is compared with"},
    {"bnn": "a Gaussian (4.2.3)"},
    {
        "ensemble": "M models (Eqs. 11-12)",
        "landscape": "the loss nearby",
        "metrics": "worth of predictions",
        "parallel": "many devices",
        "models": "networks in Flax",
        "data": "image sets",
        "frameworks": "models as objects",
    },
    {"core": "one robust gradient (Eqs. 9-10)", "io": "files, progress"},
]
ROOMS = {room: text for floor in FLOORS for room, text in floor.items()}
COLUMNS = {"experiments": 7, "baselines": 1.4, "core": 6}  # how many a room spans
WIDTH, HEIGHT, GAP, RISE = 138, 48, 14, 92


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports, by the files' import statements."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for room in ROOMS:
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.ImportFrom) or not node.module:
                    continue
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                parts = [name.split(".") for name in names]
                used = {p[1] for p in parts if p[0] == "otmdr_jax"} & set(ROOMS)
                found[room] |= used - {room}
    return found


def below(room: str, used: dict[str, set[str]]) -> set[str]:
    """Every room that a room needs, directly or not."""
    return used[room].union(*(below(other, used) for other in used[room]))


def draw() -> str:
    """The drawing, as SVG."""
    used = imports()
    needs = {room: below(room, used) for room in ROOMS}
    arrows = [
        (room, other)
        for room in ROOMS
        for other in sorted(used[room])
        if not any(other in needs[between] for between in used[room])
    ]
    total = COLUMNS["experiments"] * (WIDTH + GAP) + GAP
    places = {}
    for level, rooms in enumerate(FLOORS):
        x = float(GAP)
        for room in rooms:
            wide = COLUMNS.get(room, 1) * (WIDTH + GAP) - GAP
            places[room] = x, GAP + level * RISE, wide
            x += wide + GAP
    height = len(FLOORS) * RISE - (RISE - HEIGHT) + 2 * GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" '
        f'width="{total}" height="{height}" font-family="sans-serif" '
        'font-size="12" fill="#102027">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#607d8b"/>'
        "</marker></defs>",
        f'<rect width="{total}" height="{height}" rx="8" fill="#fafafa"/>',
    ]
    for room, other in arrows:
        x, y, wide = places[room]
        to_x, to_y, to_wide = places[other]
        # As upright as the two allow.
        low, high = max(x, to_x), min(x + wide, to_x + to_wide)
        start = end = (low + high) / 2
        if low >= high:  # beside each other
            start = x + wide / 2
            end = to_x + to_wide - WIDTH / 4 if start > to_x else to_x + WIDTH / 4
        lines.append(
            f'<path d="M{start} {y + HEIGHT} L{end} {to_y - 1}" fill="none" '
            'stroke="#607d8b" stroke-width="1.3" marker-end="url(#tip)"/>'
        )
    for room, text in ROOMS.items():
        x, y, wide = places[room]
        lines.append(
            f'<rect x="{x}" y="{y}" width="{wide}" height="{HEIGHT}" rx="6" '
            'fill="#e3f2fd" stroke="#1565c0"/>'
        )
        middle, name = f'x="{x + wide / 2}" text-anchor="middle"', f"{room}/"
        lines += [
            f'<text {middle} y="{y + 20}" font-weight="bold">{name}</text>',
            f'<text {middle} y="{y + 37}">{html.escape(text)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    SVG.write_text(draw())
