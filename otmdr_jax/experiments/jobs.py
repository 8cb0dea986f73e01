"""Runs one after another, or side by side, each with its share of the processor.

A small network leaves most of a processor's cores waiting. Two runs with a core each
finish sooner than one after the other with both.
"""

import contextlib
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple

import jax

from otmdr_jax.experiments import interrupts, run_folder, training
from otmdr_jax.experiments.programs.provenance import cores_at_hand
from otmdr_jax.io.progress import Progress

# Processes are started anew: JAX has threads, which do not survive a fork.
_SPAWN = multiprocessing.get_context("spawn")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that a process may take to end after its answer.
_PATIENCE = 60.0


class _Job(NamedTuple):
    """A process that trains runs, one after another: the first is at work."""

    runs: list[Any]
    process: Any
    answer: connection.Connection
    cores: list[int]


def most() -> int:
    """How many jobs this machine can have: one on accelerators."""
    several = os.name == "posix" and jax.default_backend() == "cpu"
    return len(cores_at_hand()) if several else 1


def check(jobs: int) -> None:
    """Raises a ValueError unless `jobs` runs can be trained at a time."""
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be a positive integer, got {jobs!r}.")
    if jobs == 1:
        return
    if os.name != "posix":
        raise ValueError("jobs needs POSIX signals, to save runs: leave it out.")
    if jobs > (count := len(cores_at_hand())):
        raise ValueError(
            f"jobs must be at most the processor's {count} cores, got {jobs}."
        )
    if (backend := jax.default_backend()) != "cpu":
        raise ValueError(
            f"jobs shares out processor cores, and runs here use the {backend}: leave "
            "it out."
        )


def train(
    groups: Sequence[Sequence[Any]], jobs: int = 1, *, show_progress: bool = True
) -> Iterator[tuple[Any, str]]:
    """Trains runs, and yields each with its status as it ends.

    A script that asks for several jobs needs `if __name__ == "__main__":` around what
    it does: the processes of the runs import it.

    Args:
      groups: Runs that are not finished, with a label, a config and a folder. One that
        was interrupted goes on. Those of a group are trained by one process, one after
        another: runs that are alike but for their seeds share what is compiled.
      jobs: How many groups are trained at a time.
      show_progress: Whether to show progress.

    Yields:
      (run, "finished" or "diverged").

    Raises:
      ValueError: More jobs than cores.
      Interrupted: On Ctrl-C or SIGTERM, after each run at work has saved its state.
      ChildProcessError: The process of a run was killed.
      Exception: What a run raises. Those beside it are saved and stopped.
    """
    check(jobs)
    groups = [group for group in groups if group]
    if (count := min(jobs, len(groups))) > 1:
        yield from _side_by_side(groups, count, show_progress)
        return
    runs = [one for group in groups for one in group]
    for i, one in enumerate(runs):
        title = f"run {i + 1} of {len(runs)}: {_name(one)}"
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


def _side_by_side(waiting, count, show_progress):
    working, free = list[_Job](), _shares(count)
    total, done = sum(map(len, waiting)), 0
    ended: list[tuple[Any, str]] = []
    asked: list[int] = []
    failures: list[BaseException] = []

    def ask(signum):
        asked.append(signum)
        if show_progress:
            # Not print: a handler may come in the middle of one.
            os.write(2, b"\nstopping the runs at work; once more stops at once\n")
        for job in working:
            _stop(job)

    title = f"{total} runs, {count} at a time"
    with (
        interrupts.requests(ask),
        Progress(total, 0, title, show_progress, unit="runs") as bar,
    ):
        try:
            while True:
                while free and waiting and not asked and not failures:
                    working.append(_start(waiting.pop(0), free.pop()))
                    bar.say(_begun(working[-1]))
                    if asked:  # the signal came while it started
                        _stop(working[-1])
                # After the next ones have started: the caller may take its time.
                while ended:
                    yield ended.pop(0)
                if not working:
                    break
                ready = connection.wait([job.answer for job in working])
                for job in [job for job in working if job.answer in ready]:
                    status, said = _answer(job, asked or failures)
                    one = job.runs.pop(0)
                    if not job.runs or status in ("failed", "interrupted"):
                        _end(job)
                        working.remove(job)
                        free.append(job.cores)
                    if status == "failed" and not failures:
                        failures.append(said)
                        for other in working:
                            _stop(other)
                    elif status == "interrupted" and not asked and not failures:
                        ask(said)  # somebody stopped this run alone
                    if status in ("failed", "interrupted"):
                        continue
                    note = f"diverged: {said}" if status == "diverged" else status
                    bar.say(f"{_name(one)}: {note}")
                    ended.append((one, status))
                    done += 1
                    bar.update(done)
                    if job.runs:
                        bar.say(_begun(job))
        except KeyboardInterrupt:  # a second Ctrl-C
            raise
        except BaseException:  # the caller wants no more, or nothing can be started
            for job in working:
                _stop(job)
            for job in working:
                job.process.join()
            raise
        finally:
            for job in working:
                job.process.kill()
    if failures:
        raise failures[0]
    if asked:
        raise training.Interrupted("stopped, and saved the runs at work", asked[0])


def _name(one):
    return f"{one.label}, seed {one.config.run.seed}"


def _begun(job):
    return f"{_name(job.runs[0])}: {job.runs[0].folder}"


def _start(runs, cores):
    ours, theirs = _SPAWN.Pipe(duplex=False)
    settings = dict(jax.config.values)
    # A daemon would be killed, without saving, where this process ends by an error.
    process = _SPAWN.Process(
        target=_work, args=(runs, cores, settings, theirs), daemon=False
    )
    resource_tracker.ensure_running()  # else it starts now, and clears the mask
    # What XLA asks for where nothing is pinned.
    with _environment(NPROC=str(len(cores))), _deaf():
        process.start()
    theirs.close()
    return _Job(list(runs), process, ours, cores)


def _stop(job):
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.process.pid, signal.SIGTERM)


def _answer(job, told):
    """(status, what goes with it) of the run at work: if it failed, the error."""
    folder = job.runs[0].folder
    try:
        status, said = job.answer.recv()
    except EOFError:
        job.process.join()
        code, why = job.process.exitcode, ""
        if told and code != -signal.SIGKILL:  # to stop, before it listened
            return "interrupted", signal.SIGTERM
        if code == -signal.SIGKILL:
            why = ", for want of memory perhaps: ask for fewer jobs"
        elif code == 1:
            why = '; does the script that started it lack `if __name__ == "__main__":`?'
        text = f"the process of {folder} ended with exit code {code}{why}."
        return "failed", ChildProcessError(text)
    if status == "failed":
        error, text = said
        error.__cause__ = RuntimeError(f"{folder}:\n{text}")
        return status, error
    return status, said


def _end(job):
    """Waits for a process that has given its last answer."""
    job.process.join(_PATIENCE)
    if job.process.is_alive():  # it hangs at its exit
        job.process.kill()


def _work(runs, cores, settings, answer):
    """In a process of its own: trains runs on its cores, and answers after each."""
    # Ctrl-C reaches every process of a terminal: the parent says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, _: interrupts.remember(signum))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_follow_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    # As the parent was told in Python: precision, platforms, the cache of programs.
    for name, value in settings.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
    try:
        for one in runs:
            _tell(answer, _train(one, False))
    except interrupts.Interrupted as stop:
        _tell(answer, ("interrupted", stop.signum))
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # of a class that takes other arguments
            error = RuntimeError(f"{type(error).__name__}: {error}")
        _tell(answer, ("failed", (error, text)))


def _tell(answer, said):
    with contextlib.suppress(ConnectionError):  # the parent was killed: nobody asks
        answer.send(said)


def _follow_parent():
    """Saves and stops where the parent was killed: nobody would ask for the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _shares(count):
    """As many lists of cores; threads of one core stay together."""
    cores = sorted(cores_at_hand(), key=lambda core: (_siblings(core), core))
    size = len(cores) / count
    return [cores[round(i * size) : round((i + 1) * size)] for i in range(count)]


def _siblings(core):
    """The first of the threads that share a physical core."""
    path = f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
    try:
        return int(re.split("[-,]", pathlib.Path(path).read_text())[0])
    except (OSError, ValueError):
        return core


@contextlib.contextmanager
def _deaf():
    """Puts signals off, here and in a process that is started, until it listens."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


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
