"""Run folders in the hands of others: two processes, full disks, missing files."""

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import orbax.checkpoint as ocp
import pytest

from otmdr_jax import data
from otmdr_jax.experiments import (
    checkpoint,
    cli,
    report,
    restore,
    run_folder,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import calibrate
from otmdr_jax.experiments.members import steps_taken
from otmdr_jax.experiments.report import examples

TINY = TrainConfig(
    model="one_layer", method="sgd", batch_size=20, steps=2, mesh="data=1", log_every=1
)


@pytest.fixture(scope="module")
def mine():
    images = np.arange(60 * 64).astype(np.uint8).reshape(60, 8, 8, 1)
    pair = images, np.arange(60) % 3
    return data.from_arrays(pair, pair, name="mine")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mine, one_layer):
    folder = tmp_path_factory.mktemp("runs") / "run"
    training.train(TINY, mine, folder, show_progress=False)
    data.save(mine, folder.parent / "mine.npz")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to be broken."""
    return shutil.copytree(finished, tmp_path / "run")


HOLD = """
import sys
from otmdr_jax.experiments import run_folder
with run_folder.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestTwoProcesses:
    @pytest.mark.slow
    def test_one_folder_is_one_processs(self, run, mine):
        before = {path.name: path.read_bytes() for path in run.glob("*.*")}
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match="another process is writing into"):
            training.train(TINY, mine, run, resume=True, show_progress=False)
        assert {path.name: path.read_bytes() for path in run.glob("*.*")} == before
        other.kill()  # which leaves no lock behind
        other.communicate()
        training.train(TINY, mine, run, resume=True, show_progress=False)

    def test_the_slower_of_two_new_runs_is_refused(self, tmp_path, monkeypatch):
        def quicker(path):
            (path / "config.json").write_text("{}")
            return lock(path)

        lock = run_folder.locked
        monkeypatch.setattr(run_folder, "locked", quicker)
        with pytest.raises(FileExistsError, match="Go on with it"):
            with run_folder.claimed(tmp_path / "run"):
                raise AssertionError("both have it")

    def test_a_file_system_without_locks_will_do(self, tmp_path, monkeypatch):
        import fcntl

        def fails(*_):
            raise OSError(errno.EBADF, "NFS locks files alone")

        monkeypatch.setattr(fcntl, "flock", fails)
        with run_folder.locked(tmp_path):
            pass


class TestWithdrawn:
    """A run that fails at its start leaves nothing in the way of the next try."""

    @pytest.fixture
    def failing(self, monkeypatch):
        def fails(*args):
            raise ValueError("the first step fails")

        def set_up(loop, config, dataset, programs, *rest):
            init(loop, config, dataset, programs._replace(train_step=fails), *rest)

        init = training.Loop.__init__
        with monkeypatch.context() as patch:
            patch.setattr(training.Loop, "__init__", set_up)
            yield patch

    def test_the_folder_is_free_again(self, failing, mine, one_layer, tmp_path):
        (tmp_path / "run").mkdir()  # one's own, and empty
        with pytest.raises(ValueError, match="the first step fails"):
            training.train(TINY, mine, tmp_path / "run", show_progress=False)
        assert not list((tmp_path / "run").iterdir())
        failing.undo()
        training.train(TINY, mine, tmp_path / "run", show_progress=False)
        assert run_folder.is_finished(tmp_path / "run")

    def test_what_is_not_the_runs_stays(self, finished, tmp_path):
        folder = tmp_path / "run"
        opened = run_folder.create(folder, TINY, {})
        opened.close()
        (folder / "mine.txt").write_text("kept")
        run_folder.withdraw(folder)
        assert os.listdir(folder) == ["mine.txt"]

    @pytest.mark.parametrize("kept", ["metrics.jsonl", "checkpoints"])
    def test_a_run_with_something_to_keep_stays(self, kept, run):
        for name in {"metrics.jsonl", "checkpoints"} - {kept}:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.write_text("")
        before = sorted(os.listdir(run))
        run_folder.withdraw(run)
        assert sorted(os.listdir(run)) == before


def test_what_a_pass_gave_is_none_where_its_file_is_torn(tmp_path):
    seen = {"mean": np.arange(3.0, dtype=np.float32)}
    run_folder.write_seen(tmp_path, 7, seen)
    np.testing.assert_array_equal(
        run_folder.read_seen(tmp_path, 7, seen)["mean"], seen["mean"]
    )
    assert run_folder.read_seen(tmp_path, 8, seen) is None
    whole = (tmp_path / "seen.npz").read_bytes()
    for size in range(0, len(whole), 40):
        (tmp_path / "seen.npz").write_bytes(whole[:size])
        assert run_folder.read_seen(tmp_path, 7, seen) is None
    np.savez(tmp_path / "seen.npz", step=7, other=0)
    assert run_folder.read_seen(tmp_path, 7, seen) is None


def test_a_folder_that_is_removed_ends_the_run(tmp_path):
    opened = run_folder.create(tmp_path / "run", TINY, {})
    opened.log({"step": 1, "epoch": 1.0, "split": "train", "loss": 0.0})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="metrics.jsonl was removed"):
        opened.log({"step": 2, "epoch": 1.0, "split": "train", "loss": 0.0})
    opened.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("torn", ["d", "meta", "manifest.ocdbt"])
def test_a_torn_checkpoint_is_one_line_that_says_which(torn, run, mine, capsys):
    """As of a run that was copied in part: shortened files, or missing ones."""
    (step,) = (run / "checkpoints").glob("2")
    if torn == "d":
        for file in step.glob("state/**/d/*"):
            file.write_bytes(file.read_bytes()[:100])
    elif torn == "meta":
        shutil.rmtree(step / "meta")
    else:
        (step / "state" / torn).unlink()
    np.save(run.parent / "new.npy", mine.test.images)
    words = ["predict", str(run), str(run.parent / "new.npy"), "--output"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, str(run.parent / "out.csv")])
    assert stop.value.code == 2
    message = r"checkpoint of step 2 in \S+ cannot be read \(.+\). If the run was"
    assert re.search(message, capsys.readouterr().err)


def test_what_fails_after_a_torn_read_prints_no_traceback(run, capfd):
    """Orbax closes its loop at the first failure, while hundreds of reads go on."""
    saved, late = checkpoint.Checkpoints(run / "checkpoints"), []
    state = {f"leaf{i}": np.full(100, i, np.float32) for i in range(300)}
    hook = sys.unraisablehook

    def restore(step, args):
        assert sys.unraisablehook is not hook
        return ocp.StandardCheckpointer().restore(run.parent / "many", state)

    with ocp.StandardCheckpointer() as writer:
        writer.save(run.parent / "many", state)
    saved._manager.restore = restore
    saved._read(2, None)
    assert sys.unraisablehook is hook  # a read that ends well leaves nothing behind

    def interrupted(step, args):
        raise KeyboardInterrupt

    saved._manager.restore = interrupted
    with pytest.raises(KeyboardInterrupt):
        saved._read(2, None)
    assert sys.unraisablehook is hook  # and so does one that is stopped
    saved._manager.restore = restore
    for file in (run.parent / "many").glob("**/d/*"):
        file.unlink()
    try:
        sys.unraisablehook = late.append
        with pytest.raises(OSError, match="step 2 .*cannot be read"):
            saved._read(2, None)
        time.sleep(0.5)
        gc.collect()  # tasks whose exception nobody took say so as they go
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError("other")))
    finally:
        sys.unraisablehook = hook
    assert [str(told.exc_value) for told in late] == ["other"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("at", ["save", "close"])
def test_a_full_disk_is_one_line_that_names_the_last_whole_checkpoint(
    at, run, mine, monkeypatch
):
    """Orbax raises what its thread met at the next save, or as it is closed."""
    saved = checkpoint.Checkpoints(run / "checkpoints", scored=False)

    def fails(*_, **__):
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing "key/0": Failed to write 9 bytes: No '
            "space left on device [os_error_code: 28 No space left on device]\n more"
        )

    monkeypatch.setattr(saved._manager, at, fails)
    monkeypatch.setattr(checkpoint, "steps_taken", lambda state: 9)
    monkeypatch.setattr(checkpoint, "_stored", lambda state: state)
    with pytest.raises(
        OSError, match="No space left on device.*step 2 is whole.*--res"
    ):
        if at == "save":
            saved.save({}, {})
        else:
            saved.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_goes_on_without_tensorboard(run, monkeypatch):
    """Its thread ends where a disk is full, and nobody empties its queue then."""
    folder = run_folder.RunFolder(run, step=2)
    writer = folder._board._writer.file_writer.event_writer

    def full(event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer._ev_writer, "write_event", full)
    records = [{"step": i, "split": "train", "loss": 1.0} for i in range(40)]
    with pytest.warns(UserWarning, match="TensorBoard's file cannot be written"):
        folder.log(records[0])
        writer._worker.join(10)
        folder.log(records[1])
    for record in records[2:]:  # four times what its queue holds by default
        folder.log(record)
    folder.close()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[-40:]] == records


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_at_the_end_ends_no_run(run):
    """TensorBoard's file keeps events for two minutes."""
    folder = run_folder.RunFolder(run)  # no step to purge: no event yet
    writer = folder._board._writer.file_writer.event_writer
    while not writer._worker._next_flush_time:  # the first flush is at once
        time.sleep(0.01)
    inner = writer._ev_writer._py_recordio_writer
    inner._writer.close()
    inner._writer = open("/dev/full", "wb")
    folder.log({"step": 3, "split": "train", "loss": 1.0})
    with pytest.warns(UserWarning, match="TensorBoard's file cannot be written"):
        folder.close()
    writer.close()  # as the process ends: it must not try again
    writer._worker.stop()
    with contextlib.suppress(OSError):
        inner._writer.close()


def test_a_full_disk_names_the_file(run, monkeypatch):
    folder = run_folder.RunFolder(run)
    folder._lines.close()
    folder._lines = open("/dev/full", "a")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        folder.log({"step": 1, "split": "train", "loss": 1.0})
    with contextlib.suppress(OSError):
        folder._lines.close()


def test_a_finished_run_keeps_its_result(run, mine):
    """It may have been made elsewhere, and its times are of that machine."""
    result = json.loads((run / "result.json").read_text())
    result |= {"device": "H200 x 8", "jax": "0.9.0"}
    (run / "result.json").write_text(json.dumps(result))
    found = training.train(TINY, mine, run, resume=True, show_progress=False)
    assert json.loads((run / "result.json").read_text()) == found.metrics == result


def test_torn_predictions_are_named(run, capsys):
    path = run / "predictions.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", str(run)])
    assert ended.value.code == 2
    assert "predictions.npz cannot be read" in capsys.readouterr().err


def test_a_finished_run_without_checkpoints_is_not_trained_anew(run, mine):
    shutil.rmtree(run / "checkpoints")
    before = {path.name: path.read_bytes() for path in run.glob("*.*")}
    with pytest.raises(ValueError, match="is a finished run without checkpoints"):
        training.train(TINY, mine, run, resume=True, show_progress=False)
    assert {path.name: path.read_bytes() for path in run.glob("*.*")} == before


def test_an_evaluation_gives_predictions_back_and_leaves_the_result(run, finished):
    (run / "predictions.npz").unlink()
    cli.main(["evaluate", str(run), "--data-dir", str(finished.parent / "mine.npz")])
    result = (finished / "result.json").read_bytes()
    assert (run / "result.json").read_bytes() == result
    found, want = (report.read_run(folder).log_probs for folder in (run, finished))
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("name", ["result.json", "data.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b'{"finished": tr', b"[]", b"\xff"])
def test_a_file_that_is_no_json_is_named(name, content, run, capsys):
    (run / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(run), "--output", str(run.parent / "page")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert str(run / name) in error and error.count("\n") == 1


@pytest.mark.parametrize("field", ["num_classes", "fingerprint", "std"])
@pytest.mark.parametrize("command", ["evaluate", "compare", "predict"])
def test_a_record_of_data_without_a_field_is_named(field, command, run, mine, capsys):
    record = json.loads((run / "data.json").read_text())
    del record[field]
    (run / "data.json").write_text(json.dumps(record))
    np.save(run.parent / "new.npy", mine.test.images)
    images = [str(run.parent / "new.npy")] if command == "predict" else []
    output = [] if command == "evaluate" else ["--output", str(run.parent / "out.csv")]
    with pytest.raises(SystemExit) as stop:
        cli.main([command, str(run), *images, *output])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"data.json lacks {field}" in error and error.count("\n") == 1


def test_predictions_of_an_interrupted_run_go_when_it_goes_on(run):
    """They are those of an evaluation in between: nothing may be fitted to them."""
    (run / "result.json").unlink()
    run_folder.reopen(run, 2).close()
    assert not (run / "predictions.npz").exists()
    with pytest.raises(FileNotFoundError, match="has no predictions.npz: finish"):
        calibrate.calibrate(run)


def test_bytes_that_are_no_text_at_the_end_of_a_log_are_dropped(run):
    log = run / "metrics.jsonl"
    lines = log.read_bytes()
    log.write_bytes(lines + b'{"step": 1, "sp\x00\xff\xfe')
    run_folder.reopen(run, 2).close()
    assert log.read_bytes() == lines


class TestReports:
    """A report takes the place of another only where it shows as much."""

    def compare(self, *args):
        try:
            cli.main(["compare", *map(str, args)])
        except SystemExit as stop:
            return stop.code
        return 0

    @pytest.mark.slow
    def test_one_on_other_runs_is_kept(self, run, finished, tmp_path, capsys):
        page = tmp_path / "page"
        (run / "config.json").write_text(
            json.dumps({**json.loads((run / "config.json").read_text()), "seed": 5})
        )
        assert self.compare(finished, "--output", page) == 0
        before = (page / "report.md").read_text()
        assert before.startswith("# Comparison: mine\n")
        assert self.compare(run, "--output", page) == 2
        assert "shows other runs too (run)" in capsys.readouterr().err
        assert (page / "report.md").read_text() == before
        assert self.compare(finished, run, "--output", page) == 0  # it shows both
        assert self.compare(run, "--output", page, "--overwrite") == 0

    def test_runs_of_one_name_are_told_apart(self, run, tmp_path, capsys):
        other = shutil.copytree(run, tmp_path / "other" / "run")
        page = tmp_path / "page"
        assert self.compare(run, "--output", page) == 0
        assert self.compare(other, "--output", page) == 0  # a copy, or moved
        with np.load(other / "predictions.npz") as arrays:
            found = {name: arrays[name].copy() for name in arrays.files}
        found["log_probs"] = found["log_probs"][:, ::-1]
        np.savez(other / "predictions.npz", **found)
        assert self.compare(other, "--output", page) == 0  # it was trained anew there
        assert self.compare(run, "--output", page) == 2
        assert "shows other runs too (run)" in capsys.readouterr().err

    def test_a_short_one_does_not_take_the_place_of_a_whole_one(
        self, run, tmp_path, capsys
    ):
        page = tmp_path / "page"
        report.write(page, [report.read_run(run)], "T")
        (page / "report.html").write_text("whole")
        assert self.compare(run, "--output", page) == 2
        assert "a whole report" in capsys.readouterr().err
        assert self.compare(run, "--output", page, "--overwrite") == 0
        assert not (page / "report.html").exists()  # it was of the earlier one


@pytest.mark.parametrize("given", ["mine.npz", ((1, 2), (3, 4)), {}])
def test_what_is_no_dataset_is_refused(given):
    with pytest.raises(TypeError, match="dataset must be a Dataset, as of data.from_a"):
        training.train(TINY, given)


def test_a_step_may_be_a_number(finished, mine):
    found = restore.open_run(finished, 2, dataset=mine)
    assert steps_taken(found.state) == 2


def test_a_report_finds_the_images_of_data_that_have_moved(finished):
    (lost,) = examples.of_labels([report.read_run(finished)])
    assert lost.images is None
    file = str(finished.parent / "mine.npz")
    (found,) = examples.of_labels([report.read_run(finished)], file)
    assert found.images.shape == (60, 8, 8, 1)


@pytest.mark.slow
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, one_layer, finished):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cli.main(
        ["train", "--output=~/out", "--data", str(finished.parent / "mine.npz")]
        + ["--model", "one_layer", "--method", "sgd", "--steps", "1"]
        + ["--batch-size", "20", "--mesh", "data=1", "--quiet"]
    )
    assert os.listdir(tmp_path) == ["out"]
