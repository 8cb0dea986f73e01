"""Runs one after another, or side by side, each with processor cores of its own.

A small network leaves most of a processor's cores waiting. Two runs with a core each
finish sooner than one after the other with both.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

from otmdr_jax.experiments import interrupts, run_folder, training
from otmdr_jax.io.progress import Progress

# Processes are started anew: JAX has threads, which do not survive a fork.
_SPAWN = multiprocessing.get_context("spawn")


class _Job(NamedTuple):
    """A process that trains a run."""

    index: int
    process: Any
    answer: connection.Connection
    cores: list[int]


def check(jobs: int) -> None:
    """Raises a ValueError unless each of `jobs` runs can have a core of its own."""
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be a positive integer, got {jobs!r}.")
    if jobs == 1:
        return
    if jobs > (count := len(_cores())):
        raise ValueError(
            f"jobs must be at most the processor's {count} cores, got {jobs}."
        )
    import jax

    if (backend := jax.default_backend()) != "cpu":
        raise ValueError(
            f"jobs shares out processor cores, and runs here use the {backend}: leave "
            "it out."
        )


def train(
    runs: Sequence[Any], jobs: int = 1, *, show_progress: bool = True
) -> Iterator[tuple[Any, str]]:
    """Trains runs, and yields each with its status as it ends.

    Args:
      runs: Runs that are not finished, with a label, a config and a folder. One that
        was interrupted goes on.
      jobs: How many are trained at a time.
      show_progress: Whether to show progress.

    Yields:
      (run, "finished" or "diverged").

    Raises:
      ValueError: More jobs than cores.
      Interrupted: On Ctrl-C or SIGTERM, after each run at work has saved its state.
      RuntimeError: A run ended with an error. Those beside it are saved and stopped.
    """
    check(jobs)
    if min(jobs, len(runs)) > 1:
        yield from _side_by_side(runs, min(jobs, len(runs)), show_progress)
        return
    for i, one in enumerate(runs):
        title = f"run {i + 1} of {len(runs)}: {one.label}, seed {one.config.run.seed}"
        with Progress(1, 0, title, show_progress) as bar:
            bar.say(str(one.folder))
        status, said = _train(one, show_progress)
        if status == "diverged":
            with Progress(1, 0, title, show_progress) as bar:
                bar.say(f"diverged: {said}")
        yield one, status


def _train(one, show_progress):
    try:
        training.train(
            one.config,
            output=one.folder,
            resume=run_folder.is_run(one.folder),
            show_progress=show_progress,
        )
    except training.NonFiniteError as error:
        return "diverged", str(error)
    return "finished", ""


def _side_by_side(runs, count, show_progress):
    cores = _cores()
    size = len(cores) / count
    free = [cores[round(i * size) : round((i + 1) * size)] for i in range(count)]
    waiting, working = list(range(len(runs))), list[_Job]()
    ended: list[tuple[Any, str]] = []
    asked: list[int] = []

    def ask(signum):
        asked.append(signum)
        for job in working:
            _stop(job)

    title = f"{len(runs)} runs, {count} at a time"
    with (
        interrupts.requests(ask),
        Progress(len(runs), 0, title, show_progress, unit="runs") as bar,
    ):
        try:
            while working or ended or (waiting and not asked):
                while free and waiting and not asked:
                    index = waiting.pop(0)
                    working.append(_start(index, runs[index], free.pop()))
                    bar.say(f"{_name(runs[index])}: {runs[index].folder}")
                    if asked:  # the signal came while it started
                        _stop(working[-1])
                # After the next ones have started: the caller may take its time.
                while ended:
                    yield ended.pop(0)
                ready = connection.wait([job.answer for job in working], timeout=1.0)
                for job in [job for job in working if job.answer in ready]:
                    working.remove(job)
                    free.append(job.cores)
                    one = runs[job.index]
                    status, said = _answer(job)
                    if status == "interrupted":
                        asked.append(int(said))
                        continue
                    if status == "failed":
                        raise RuntimeError(f"{one.folder} failed:\n{said}")
                    note = f"diverged: {said}" if status == "diverged" else status
                    bar.say(f"{_name(one)}: {note}")
                    ended.append((one, status))
                    bar.update(len(runs) - len(waiting) - len(working))
        except (GeneratorExit, RuntimeError):
            for job in working:
                _stop(job)
            for job in working:
                job.process.join()
            raise
        except BaseException:  # a second Ctrl-C
            for job in working:
                job.process.kill()
            raise
    if asked:
        raise training.Interrupted("stopped, and saved the runs at work", asked[0])


def _name(one):
    return f"{one.label}, seed {one.config.run.seed}"


def _start(index, one, cores):
    ours, theirs = _SPAWN.Pipe(duplex=False)
    # A daemon would be killed, without saving, where this process ends by an error.
    process = _SPAWN.Process(target=_work, args=(one, cores, theirs), daemon=False)
    with _environment(NPROC=str(len(cores))):  # what XLA asks where nothing is pinned
        process.start()
    theirs.close()
    return _Job(index, process, ours, cores)


def _stop(job):
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.process.pid, signal.SIGTERM)


def _answer(job):
    try:
        status, said = job.answer.recv()
    except EOFError:  # killed, for memory perhaps
        job.process.join()
        return "failed", f"its process ended with exit code {job.process.exitcode}."
    job.process.join()
    return status, said


def _work(one, cores, answer):
    """In a process of its own: trains a run on its cores."""
    # Ctrl-C reaches every process of a terminal: the parent says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, _: interrupts.remember(signum))
    threading.Thread(target=_follow_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    try:
        answer.send(_train(one, False))
    except interrupts.Interrupted as stop:
        answer.send(("interrupted", str(stop.signum)))
    except Exception:
        answer.send(("failed", traceback.format_exc()))


def _follow_parent():
    """Saves and stops where the parent was killed: nobody would ask for the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _cores():
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def _environment(**values):
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
