"""Starts a run, or resumes one from its last whole checkpoint.

A configuration that cannot work is refused first. Then the data are read, the programs
are compiled, and the folder is opened, in which one process writes. On many hosts every
process makes the same call.
"""

import contextlib
import os
import pathlib
from typing import Any

import jax

from otmdr_jax import parallel
from otmdr_jax.data import Dataset
from otmdr_jax.experiments import run_folder
from otmdr_jax.experiments.building import check_models
from otmdr_jax.experiments.config import TrainConfig, differences
from otmdr_jax.experiments.programs import (
    check_same_data,
    compile_programs,
    describe,
    load_data,
    make_mesh,
    named,
    run_keys,
)
from otmdr_jax.experiments.training.loop import Loop
from otmdr_jax.experiments.training.result import Result


def train(
    config: TrainConfig,
    dataset: Dataset | None = None,
    output: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    show_progress: bool = True,
) -> Result:
    """Trains a model from a configuration.

    Args:
      config: The options, see :class:`otmdr_jax.experiments.config.TrainConfig`.
      dataset: The data; None loads `config.data.name`. With arrays of your own
        (:func:`otmdr_jax.data.from_arrays`) nothing but JAX, Flax and Optax is needed.
      output: Folder of the run, with logs and checkpoints (which need Orbax). None
        keeps everything in memory.
      resume: Whether to resume the run in `output` from its last whole checkpoint.
      show_progress: Whether to show a bar, or lines where there is no terminal.

    Returns:
      A :class:`Result`.

    Raises:
      FileExistsError: `output` holds something and `resume` is False.
      ValueError: The configuration, or the data, are not those of the resumed run.
      NonFiniteError: `config.run.max_skipped` steps in a row were not finite.
      Interrupted: On Ctrl-C or SIGTERM, after the state is saved.

    Example:
      >>> from otmdr_jax import training
      >>> from otmdr_jax.experiments.config import TrainConfig
      >>> result = training.train(
      ...     TrainConfig(method="sgd", steps=11, eval_every=9), show_progress=False
      ... )
      >>> result.metrics["steps"], result.log_probs.shape
      (11, (360, 10))
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(
            "config must be a TrainConfig, as TrainConfig(method='sam'), got "
            f"{config!r}."
        )
    if not isinstance(dataset, Dataset | None):
        raise TypeError(
            "dataset must be a Dataset, as of data.from_arrays((images, labels)) or "
            f"data.load('mine.npz'), got a {type(dataset).__name__}."
        )
    mesh = make_mesh(config)
    # What cannot work is refused before the data are read.
    check_models(config)
    if not resume:
        config.check_used()
    if dataset is None:
        dataset = load_data(config)
    else:
        config = named(config, dataset, resume, recorded=output is not None)
    described = describe(dataset)
    data = described["fingerprint"]
    if jax.process_count() > 1:
        same = config.replace(data_dir=None, cache_dir=None).flat()
        # Hosts may have a file in folders of their own.
        same["data"] = pathlib.Path(same["data"]).name
        parallel.check_agreement(repr(same), "the configuration")
        parallel.check_agreement(data, "the data")
    programs = compile_programs(config, dataset, mesh)
    show_progress = show_progress and parallel.is_main()
    if output is None:
        if resume:
            raise ValueError("resume=True needs output, the folder of the run.")
        loop = Loop(config, dataset, programs, data, show_progress)
        return loop.run(programs.init(run_keys(config.run.seed)[0]), {})
    from otmdr_jax.experiments import checkpoint  # needs Orbax

    output = pathlib.Path(output)
    if resume:
        _check_same_run(run_folder.read_config(output), config, output)
        if (known := run_folder.read_data(output)) is not None:
            check_same_data(known["fingerprint"], data, output, dataset)
    mine = run_folder.locked if resume else run_folder.claimed
    with contextlib.ExitStack() as stack:
        folder = None
        # Before checkpoints are opened, which clears away what is half written.
        parallel.on_main(lambda: stack.enter_context(mine(output)))
        if not resume:
            folder = parallel.on_main(
                lambda: run_folder.create(output, config, described)
            )
            stack.callback(_close, folder)
        saved = stack.enter_context(
            checkpoint.Checkpoints(
                output / "checkpoints",
                config.run.keep_checkpoints,
                scored=dataset.validation is not None,
            )
        )
        state = programs.init(run_keys(config.run.seed)[0])
        meta: dict[str, Any] = {}
        step = 0
        # Directory listings of a shared file system may be of different age.
        (latest,) = parallel.agree(-max(saved.steps(), default=-1))
        if resume and latest <= 0:
            step = -int(latest)
            check_same_data(saved.meta(step)["data"], data, output, dataset)
            state, meta = saved.restore(state, step)
        elif resume and run_folder.is_finished(output):
            raise ValueError(
                f"{output} is a finished run without checkpoints: there is nothing to "
                "go on from. To train it anew name another folder: otmdr train "
                f"--config {output / 'config.json'} --output FOLDER."
            )
        if resume:
            parallel.on_main(lambda: run_folder.describe(output, config, described))
            folder = parallel.on_main(lambda: run_folder.reopen(output, step))
            stack.callback(_close, folder)
        loop = Loop(config, dataset, programs, data, show_progress, folder, saved)
        return loop.run(state, meta, step)


def _close(folder: run_folder.RunFolder | None) -> None:
    if folder is not None:  # one host writes
        folder.close()


def _check_same_run(old: TrainConfig, new: TrainConfig, output: pathlib.Path) -> None:
    changed = differences(old, new)
    changed.pop("data", None)  # a file may have moved: its checksums decide
    if changed:
        lines = [f"  {name}: {a!r} -> {b!r}" for name, (a, b) in changed.items()]
        raise ValueError(
            f"{output} was started with other options; resuming would give a run that "
            "is neither:\n" + "\n".join(lines) + "\nLeave them out, or start a new run."
        )
