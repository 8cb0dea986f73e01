"""Files that are whole or not there, strict JSON, and progress without a terminal."""

import io
import json
import os
import pathlib
import re
import sys

import numpy as np
import pytest

from otmdr_jax.io import files
from otmdr_jax.io.progress import Progress
from tests.sets import at_most


class TestFiles:
    def test_hold_what_was_written(self, tmp_path):
        files.write_text(tmp_path / "a.txt", "é\n")
        assert (tmp_path / "a.txt").read_bytes() == "é\n".encode()
        files.write_arrays(tmp_path / "b.npz", {"x": np.arange(3)})
        assert np.load(tmp_path / "b.npz")["x"].tolist() == [0, 1, 2]
        files.write_json(tmp_path / "c.json", {"x": (1.5, float("nan"))})
        assert json.loads((tmp_path / "c.json").read_text()) == {"x": [1.5, None]}
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"a.txt", "b.npz", "c.json"}

    def test_stay_as_they_were_where_writing_fails(self, tmp_path, monkeypatch):
        path = tmp_path / "a.json"
        files.write_json(path, {"x": 1})
        with pytest.raises(TypeError):
            files.write_json(path, {"x": object()})

        def full(*args):
            raise OSError("no space left")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            files.write_json(path, {"x": 2})
        assert json.loads(path.read_text()) == {"x": 1}
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("large", ["a", "b", "c"])
    def test_of_several_all_are_replaced_or_none(self, large, tmp_path):
        for name in ("a", "b", "c", "mine"):
            (tmp_path / name).write_bytes(b"before")
        new = {name: b"after" for name in ("a", "b", "c")}
        with at_most(5_000), pytest.raises(OSError, match=rf"too large: '.*/{large}'"):
            files.write_all(tmp_path, new | {large: bytes(10_000)})
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert found == dict.fromkeys(("a", "b", "c", "mine"), b"before")
        files.write_all(tmp_path, new)
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert found == new | {"mine": b"before"}

    def test_are_on_the_disk_whole_before_they_have_their_name(
        self, tmp_path, monkeypatch
    ):
        on_disk, replace = [], os.replace

        def fsync(descriptor):
            (scratch,) = tmp_path.iterdir()
            assert os.fstat(descriptor).st_ino == scratch.stat().st_ino
            on_disk.append(scratch.read_bytes())

        def replaced(source, target):
            assert on_disk == [source.read_bytes()]
            replace(source, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replaced)
        files.write_json(tmp_path / "a.json", {"x": 1})
        assert json.loads(on_disk[0]) == {"x": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


class TestWritable:
    def test_a_folder_that_can_be_made(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for path in (tmp_path, tmp_path / "a" / "b", pathlib.Path("c")):
            files.check_writable(path)
        assert not list(tmp_path.iterdir())

    def test_a_file_in_its_place(self, tmp_path):
        (tmp_path / "a").touch()
        for path in (tmp_path / "a", tmp_path / "a" / "b" / "c"):
            with pytest.raises(NotADirectoryError, match="a is a file"):
                files.check_writable(path)

    def test_a_folder_that_is_read_only(self, tmp_path, monkeypatch):
        # Root may write into all of them, and tests may run as root.
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
        with pytest.raises(PermissionError, match="nothing can be written into"):
            files.check_writable(tmp_path / "a")


class TestJson:
    def test_null_stands_for_what_is_not_finite(self):
        value = {"a": [np.float64("nan"), float("inf")], "b": (1, True, "x", None)}
        text = files.dumps(value)
        assert text == '{"a": [null, null], "b": [1, true, "x", null]}'
        assert files.loads(text) == files.strict(value)

    @pytest.mark.parametrize("text", ["[1]", "NaN", '{"a": -Infinity}', "{", b"\xff"])
    def test_anything_else_is_refused(self, text):
        with pytest.raises(ValueError):
            files.loads(text)


def test_lines_where_there_is_no_terminal(capsys):
    with Progress(3, 1, "counting") as bar:
        bar.say("begins")
        bar.update(2, {"loss": 0.25})  # too soon for a line
        bar.update(3, {"loss": 0.123456})
    with Progress(3, 0, "silence", enabled=False) as bar:
        bar.say("nothing")
        bar.update(3)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "counting: begins"
    assert last.startswith("counting: 3/3 steps, ")
    assert last.endswith(" steps/s, 0:00:00 left, loss 0.1235")


def test_names_in_brackets_are_no_markup(monkeypatch):
    # On a terminal, where rich would take them for colours, or for an error.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Progress(3, 0, "runs/[red]x") as bar:
        bar.say("SGD [/x] begins")
        bar.update(3)
    text = written.getvalue()
    assert "runs/[red]x: SGD [/x] begins" in re.sub(r"\x1b\[[0-9;]*m", "", text)
