"""The tests themselves: what takes long must say so."""

import subprocess
import sys

import pytest

from tests.sets import ROOT

SPIN = """
import pytest, time

def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_short(): spin(0.01)
def test_long(): spin(0.5)
@pytest.mark.slow
def test_long_and_marked(): spin(0.5)
@pytest.mark.essential
def test_long_and_essential(): spin(0.5)
"""


@pytest.mark.slow
def test_a_test_without_a_mark_may_not_take_long(tmp_path):
    (tmp_path / "test_spin.py").write_text(SPIN)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--cpu-limit", "0.3",
         "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path),
         "-p", "no:cacheprovider", str(tmp_path / "test_spin.py")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert "1 failed, 3 passed" in done.stdout, done.stdout
    assert "test_long took 0." in done.stdout and "mark it slow" in done.stdout
