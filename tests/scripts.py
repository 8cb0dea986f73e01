"""Runs scripts of the repository, each in a process of its own that has its imports."""

import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile

from tests.frames import in_one_piece

# Its processes are copies of one in which nothing but these imports has happened: no
# backend of JAX has started there. They take two processor seconds of a script's four.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "flax.nnx",
        "jax",
        "matplotlib.pyplot",
        "optax",
        "otmdr_jax.experiments.checkpoint",
        "otmdr_jax.experiments.cli",
        "otmdr_jax.experiments.training",
        "sklearn.datasets",
    ]
)


def run(path, *args, cwd=None):
    """What a script prints, run as `python PATH ARGS...` is.

    Raises:
      RuntimeError: It did not end with 0 within five minutes; the message has what it
        wrote as errors.
    """
    with tempfile.TemporaryDirectory() as logs:
        files = [pathlib.Path(logs) / name for name in ("output", "errors")]
        words = [str(path), *map(str, args)]
        place = str(cwd or pathlib.Path.cwd())
        process = _PROCESSES.Process(
            target=_script, args=(words, place, dict(os.environ), files)
        )
        process.start()
        process.join(300)
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(
                f"{words} ended with {process.exitcode}: {files[1].read_text()}"
            )
        return files[0].read_text()


def _script(words, place, environment, files):
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    sys.argv = words
    sys.path.insert(0, str(pathlib.Path(words[0]).parent))
    in_one_piece(runpy.run_path, words[0], run_name="__main__")
