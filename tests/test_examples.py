"""The shipped examples, run as a user runs them, shrunk by their own options."""

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name, *args, cwd):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        check=True,
        capture_output=True,
        text=True,
        cwd=cwd,
    ).stdout


def test_quickstart_is_short_and_does_what_its_header_expects(tmp_path):
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 100
    out = run("quickstart.py", cwd=tmp_path)
    accuracy = {
        name: float(value)
        for name, value in re.findall(r"([\w-]+): test accuracy ([\d.]+)", out)
    }
    assert 0.93 <= accuracy["OT-MDR"] <= 0.97
    assert accuracy["SGD"] < accuracy["OT-MDR"]


def test_cifar_single_runs_whole_and_resumes_in_its_smoke_form(tmp_path):
    out = run("cifar_single.py", "--smoke", cwd=tmp_path)
    folder = tmp_path / "runs" / "smoke-paper-cifar10-seed0"
    assert "smoke-paper-cifar10-seed0" in out
    assert (folder / "result.json").exists()
    out = run("cifar_single.py", "--smoke", "--resume", cwd=tmp_path)
    assert '"accuracy"' in out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_opens_with_command_time_and_expectation(path):
    header = path.read_text().split('"""')[1]
    assert f"python examples/{path.name}" in header
    assert re.search(r"second|minute|hour", header) and "xpected" in header
