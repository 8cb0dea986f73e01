"""The page on extending the library, followed to the letter on a copy of it."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.test_docs import ROOT, blocks

TITLE = re.compile(r'title="([^"]+)"')


def change(text, diff):
    """Applies the lines of one diff, which must fit in exactly one place."""
    lines = diff.splitlines()
    assert all(line[:1] in ("+", "-", " ", "") for line in lines), diff
    before, after = (
        "".join(line[1:] + "\n" for line in lines if line[:1] != other)
        for other in ("+", "-")
    )
    assert text.count(before) == 1, f"the page changes lines that are not:\n{before}"
    return text.replace(before, after)


def test_a_diff_changes_exactly_the_lines_that_it_names():
    assert change("a\nb\nc\n", " a\n-b\n+d\n") == "a\nd\nc\n"
    with pytest.raises(AssertionError, match="lines that are not"):
        change("a\nb\n", " b\n+c\n d\n")


@pytest.mark.slow
def test_the_page_works_step_by_step(tmp_path):
    package = tmp_path / "otmdr_jax"
    shutil.copytree(
        ROOT / "otmdr_jax", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    page = (ROOT / "docs" / "extending.md").read_text().splitlines()
    program, new, names = [], [], []
    for block in blocks("\n".join(page)):
        title = TITLE.search(page[block.line - 2])
        if title is None:
            program.append(block.code)
            continue
        path = tmp_path / title[1]
        names.append(title[1])
        if block.language == "diff":
            path.write_text(change(path.read_text(), block.code))
        else:
            assert not path.exists(), f"{title[1]} is there already"
            path.write_text(block.code)
            new.append(path)
    assert len(new) == 3 and len(names) >= 10 and len(program) >= 4

    run = tmp_path / "run"
    run.mkdir()
    (run / "program.py").write_text("\n".join(program))
    train = "train --model mlp_small --data mine.npz --steps 2 --batch-size 8"
    for command in (
        [str(run / "program.py")],
        ["-m", "otmdr_jax", *train.split()],
        ["-m", "doctest", *map(str, new)],
        ["-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *names],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path if "ruff" in command else run,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert pathlib.Path(run / "runs").exists()
