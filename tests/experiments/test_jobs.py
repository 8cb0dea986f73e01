"""Runs side by side: cores of their own, signals, errors."""

import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from otmdr_jax.experiments import interrupts, jobs, sweep, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.sweep import Planned

CORES = jobs.cores_at_hand()
several = pytest.mark.skipif(len(CORES) < 2, reason="needs two processor cores")
SHORT = dict(method="sgd", batch_size=64, eval_every=99, mesh="data=1")
LONG = dict(SHORT, steps=200_000, log_every=10, checkpoint_every=1_000_000)


class Odd(Exception):
    """Cannot be pickled: its arguments are not those of its constructor."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Fake:
    """A run that says which cores its process has, and then does something."""

    def __init__(self, folder, what):
        self.folder, self.what, self.parent = folder, what, os.getpid()
        self.label = what

    @property
    def config(self):
        if os.getpid() == self.parent:
            return SimpleNamespace(run=SimpleNamespace(seed=7))
        cores = sorted(os.sched_getaffinity(0))
        precision = jax.config.jax_default_matmul_precision
        facts = [cores, os.environ["NPROC"], os.getpid(), precision]
        self.folder.with_suffix(".json").write_text(json.dumps(facts))
        return getattr(self, self.what)()

    def error(self):
        raise FileExistsError("another process trains it")

    def odd(self):
        raise Odd("one", "two")

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def diverges(self):
        raise training.NonFiniteError("it is NaN")

    def waits(self):
        until(interrupts.came_early)
        raise training.Interrupted("saved", signal.SIGTERM)


def fakes(folder, *what):
    """A group of one for each."""
    return [[Fake(folder / f"{i}", name)] for i, name in enumerate(what)]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "positive integer, got 0"),
        (True, "positive integer, got True"),
        (1.5, "positive integer, got 1.5"),
        (len(CORES) + 1, f"at most the processor's {len(CORES)} cores"),
    ],
)
def test_what_cannot_be_is_refused(count, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jobs.check(count)
    with pytest.raises(ValueError, match=message):
        sweep.run([], tmp_path / "rows.json", jobs=count)


def test_on_an_accelerator_it_is_refused(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    jobs.check(1)
    if len(CORES) > 1:
        with pytest.raises(ValueError, match="runs here use the gpu"):
            jobs.check(2)


pinned = pytest.mark.skipif(
    len(CORES) < 2 or not hasattr(os, "sched_setaffinity"), reason="pins two cores"
)


@pinned
@pytest.mark.slow
def test_each_run_has_cores_of_its_own_and_the_parents_settings(tmp_path):
    old = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        runs = fakes(tmp_path, "diverges", "diverges", "diverges")
        found = list(jobs.train(runs, 2, show_progress=False))
    finally:
        jax.config.update("jax_default_matmul_precision", old)
    assert sorted(one.folder.name for one, _ in found) == ["0", "1", "2"]
    assert [status for _, status in found] == ["diverged"] * 3
    seen = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert {tuple(cores) for cores, *_ in seen} == {tuple(x) for x in jobs._shares(2)}
    assert all(int(count) == len(cores) for cores, count, *_ in seen)
    assert len({pid for *_, pid, _ in seen} - {os.getpid()}) == 3
    assert all(precision == "float32" for *_, precision in seen)
    assert jobs.cores_at_hand() == CORES and "NPROC" not in os.environ


@pinned
@pytest.mark.slow
def test_runs_of_a_group_share_a_process(tmp_path):
    runs = sum(fakes(tmp_path, *["diverges"] * 5), [])
    found = list(jobs.train([runs[:3], runs[3:]], 2, show_progress=False))
    assert {one for one, _ in found} == set(runs) and len(found) == 5
    mine = [one for one, _ in found if one in runs[:3]]
    assert mine == runs[:3]  # in their order
    seen = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    pids = [pid for *_, pid, _ in seen]
    assert len(set(pids[:3])) == 1 and len(set(pids[3:])) == 1 and len(set(pids)) == 2


@pinned
@pytest.mark.slow
def test_an_error_ends_all_groups(tmp_path):
    runs = sum(fakes(tmp_path, "diverges", "error", "diverges", "waits", "waits"), [])
    found = jobs.train([runs[:3], runs[3:], []], 2, show_progress=False)
    assert next(found) == (runs[0], "diverged")
    with pytest.raises(FileExistsError, match="another"):
        list(found)
    assert begun(tmp_path) == {"0", "1", "3"}
    assert not multiprocessing.active_children()


@pinned
@pytest.mark.slow
def test_a_signal_ends_all_groups(tmp_path):
    runs = sum(fakes(tmp_path, "waits", "diverges", "waits", "diverges"), [])
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(training.Interrupted, match="saved the runs at work"):
        list(jobs.train([runs[:2], runs[2:]], 2, show_progress=False))
    timer.join()
    assert begun(tmp_path) <= {"0", "2"}
    assert not multiprocessing.active_children()


def begun(folder):
    return {path.stem for path in folder.glob("*.json")}


def test_shares_are_of_all_cores_and_keep_threads_of_a_core_together(monkeypatch):
    monkeypatch.setattr(jobs, "cores_at_hand", lambda: list(range(8)))
    monkeypatch.setattr(jobs, "_siblings", lambda core: core % 4)  # 0 and 4, 1 and 5
    assert jobs._shares(2) == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert [len(x) for x in jobs._shares(3)] == [3, 2, 3]
    assert sorted(sum(jobs._shares(3), [])) == list(range(8))


@pinned
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("error", FileExistsError, "^another process trains it$"),
        ("odd", RuntimeError, "^Odd: one and two$"),
        ("killed", ChildProcessError, "0 ended with exit code -9, for want of memory"),
    ],
)
def test_an_error_is_that_of_the_run_and_the_others_are_stopped(
    what, kind, message, tmp_path
):
    runs = fakes(tmp_path, what, "waits", "diverges")
    with pytest.raises(kind, match=message) as caught:
        list(jobs.train(runs, 2, show_progress=False))
    if what != "killed":
        assert f"{runs[0][0].folder}:" in str(caught.value.__cause__)
    assert not (tmp_path / "2.json").exists()  # it was not begun
    assert not multiprocessing.active_children()


@pinned
@pytest.mark.slow
def test_who_wants_no_more_runs_stops_those_at_work(tmp_path):
    training_runs = jobs.train(
        fakes(tmp_path, "diverges", "waits", "waits"), 2, show_progress=False
    )
    assert next(training_runs)[1] == "diverged"
    training_runs.close()
    assert not multiprocessing.active_children()


@pinned
@pytest.mark.slow
def test_a_signal_while_a_process_starts_is_heard(tmp_path):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(training.Interrupted, match="saved the runs at work"):
        list(jobs.train(fakes(tmp_path, "waits", "waits"), 2, show_progress=False))
    timer.join()
    assert not multiprocessing.active_children()
    assert not interrupts.came_early()


def planned(folder, options, **differing):
    (name, values), *_ = differing.items()
    return [
        Planned(
            f"{name} {value}",
            TrainConfig(**options).replace(**{name: value}),
            folder / f"{value}",
        )
        for value in values
    ]


@several
@pytest.mark.slow
def test_runs_are_those_of_one_after_another(tmp_path):
    options = dict(SHORT, steps=4, max_skipped=2)
    found = {}
    for count in (1, 2):
        folder = tmp_path / f"{count}"
        runs = planned(folder, options, learning_rate=[0.1, 1e30, 0.2])
        # Enough steps to see that one diverges.
        runs[1] = runs[1]._replace(config=runs[1].config.replace(steps=12))
        how = {"jobs": count, "measure_memory": False, "show_progress": False}
        found[count] = sweep.run(runs, folder / "rows.json", **how)
        stored = json.loads((folder / "rows.json").read_text())["rows"]
        assert [row["label"] for row in stored] == [one.label for one in runs]
    status = [row["status"] for row in found[1]]
    assert status == ["finished", "diverged", "finished"]
    assert [row["status"] for row in found[2]] == status
    for one, other in zip(found[1][::2], found[2][::2], strict=True):
        # Sums over two cores and over one may round apart.
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-4)


def start(tmp_path, text):
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    command = [sys.executable, "-m", "otmdr_jax", "sweep", str(file)]
    command += ["--output", str(tmp_path / "out"), "--jobs", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    logs = [tmp_path / f"out/{name}/seed0/metrics.jsonl" for name in "ab"]
    until(lambda: all(log.is_file() and log.stat().st_size for log in logs))
    return process


def until(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def text_of(steps):
    options = "\n".join(
        f"{name} = {json.dumps(value)}"
        for name, value in {**LONG, "steps": steps}.items()
    )
    return f"[options]\n{options}\n[methods.a]\n[methods.b]\nlearning_rate = 0.2\n"


def saved(tmp_path):
    return sorted(
        int(path.name)
        for path in (tmp_path / "out").glob("*/seed0/checkpoints/*")
        if path.name.isdigit()
    )


@several
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_signal_saves_all_runs_at_work(tmp_path):
    process = start(tmp_path, text_of(200_000))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "saved the runs at work" in said and "--jobs 2" in said
    steps = saved(tmp_path)
    assert len(steps) == 2 and min(steps) > 0


@several
@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path("/proc").is_dir(), reason="looks for processes in /proc"
)
def test_runs_do_not_outlive_a_killed_parent(tmp_path):
    process = start(tmp_path, text_of(200_000))
    children = [
        int(path.name)
        for path in pathlib.Path("/proc").iterdir()
        if path.name.isdigit() and parent_of(path) == process.pid
    ]
    assert len(children) >= 2
    process.kill()
    _, said = process.communicate(timeout=300)  # until the last child has closed it
    until(lambda: not any(alive(pid) for pid in children))
    assert "Traceback" not in said
    assert len(saved(tmp_path)) == 2


def parent_of(path):
    try:
        return int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def alive(pid):
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rsplit(")", 1)[1].split()[0] != "Z"
