"""Puts KaTeX into the site, so that its formulas need no network.

`make docs` fetches the package from npm into .cache/npm; it is not a part of the
repository.
"""

import pathlib

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent / ".cache/npm/node_modules/katex/dist"


def on_files(files: Files, config) -> Files:
    """Adds the script, the style and the fonts of browsers of today."""
    if not ROOT.is_dir():
        raise PluginError(
            "the site's formulas need KaTeX: run make docs, which fetches it by npm."
        )
    wanted = [ROOT / "katex.min.js", ROOT / "katex.min.css"]
    for path in (*wanted, *ROOT.glob("fonts/*.woff2")):
        name = f"katex/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
