"""A grid of texts on the terminal: with rich where it is installed, else aligned."""

from collections.abc import Sequence
from typing import Any

# A text, and whether it is the best of its column; None where nothing is marked.
Entry = tuple[str, bool | None]


def print_grid(
    header: Sequence[str],
    lines: Sequence[Sequence[Entry]],
    console: Any = None,
    title: str = "",
) -> None:
    """Prints a table: the first column to the left, the others to the right.

    Args:
      header: A heading for each column.
      lines: At least one line, with an entry for each column.
      console: A `rich.console.Console`. Default: one on standard output, and wide
        enough for the table where that is no terminal. Without rich it is not used.
      title: A line above the table.
    """
    try:
        import rich.console
        import rich.table
        import rich.text
    except ImportError:
        print(_plain(header, lines, title))
        return
    table = rich.table.Table(title=rich.text.Text(title) if title else None)
    for i, name in enumerate(header):
        table.add_column(rich.text.Text(name), justify="right" if i else "left")
    for line in lines:
        table.add_row(
            *(rich.text.Text(text, "bold green" if best else "") for text, best in line)
        )
    if console is None:
        console = rich.console.Console()
        if not console.is_terminal:  # a file or a pipe has no width to keep to
            wide = console.options.update(width=10_000)
            needed = rich.console.Measurement.get(console, wide, table).maximum
            console = rich.console.Console(width=max(console.width, needed))
    console.print(table)


def _plain(header, lines, title: str) -> str:
    marks = {True: " *", False: "  ", None: ""}
    # Headings end where the numbers do, before the two places of the best mark.
    places = ["" if best is None else "  " for _, best in lines[0]]
    texts = [[name + place for name, place in zip(header, places, strict=True)]]
    texts += [[text + marks[best] for text, best in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    shown = [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in texts
    ]
    shown.insert(1, "-" * max(map(len, shown)))
    marked = any(best for line in lines for _, best in line)
    note = ["* best of its column"] if marked else []
    return "\n".join([*([title] if title else []), *shown, *note])
