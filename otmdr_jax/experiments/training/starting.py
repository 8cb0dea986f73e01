"""Starts a run, or resumes one from its last whole checkpoint.

A configuration that cannot work is refused first. Then the data are read, the programs
are compiled, and the folder is opened, in which one process writes. On many hosts every
process makes the same call.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from otmdr_jax import parallel
from otmdr_jax.data import Dataset, is_folder
from otmdr_jax.data.sources import folder_path
from otmdr_jax.experiments import own as own_lib
from otmdr_jax.experiments import run_folder
from otmdr_jax.experiments.building import (
    check_models,
    check_patterns,
    check_statistics,
    networks,
)
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
from otmdr_jax.experiments.training import initial
from otmdr_jax.experiments.training.callbacks import Callback, check_callbacks
from otmdr_jax.experiments.training.loop import Loop
from otmdr_jax.experiments.training.result import Result


def train(
    config: TrainConfig,
    dataset: Dataset | None = None,
    output: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    show_progress: bool = True,
    model: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    callbacks: Sequence[Callback] = (),
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
      model: A network of your own: a class of Flax NNX, Linen or Equinox, or functions;
        see :func:`otmdr_jax.models.adapt`. None for the one that the options name.
      loss: Function (outputs, targets) -> (B,), the losses of a batch's examples. None
        for the cross entropy.
      metrics: Functions (outputs, targets) -> a number, by name, of whole sets as NumPy
        arrays; outputs are probabilities (N, C) where targets are class numbers, else
        the mean outputs of members and samples.
      callbacks: What the run calls on its way; see
        :class:`otmdr_jax.experiments.training.Callback`.

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
    mine = own_lib.given(model, loss, metrics)
    check_callbacks(callbacks)
    config = own_lib.named(config, mine)
    mesh = make_mesh(config)
    # What cannot work is refused before the data are read.
    check_models(config, mine)
    if not resume:
        config.check_used()
        if output is not None and dataset is None:
            _check_outside(output, config)
    if dataset is None:
        dataset = load_data(config)
    else:
        config = named(config, dataset, resume, recorded=output is not None)
    if not dataset.num_classes and loss is None:
        raise ValueError(
            "the targets of these data are no class numbers: they need a loss of their "
            "own, train(..., loss=...)."
        )
    if config.data.augment and len(dataset.image_shape) != 3:
        raise ValueError(
            f"augment={config.data.augment} is of images, and the inputs are "
            f"{dataset.image_shape}: leave it out."
        )
    if mine.loss is not None or ":" in config.model.member_names[0]:
        for network in networks(config, dataset.num_classes, drops=False, own=mine):
            own_lib.try_out(mine, network, dataset)
    described = describe(dataset)
    if loss is not None:
        described["loss"] = own_lib.name_of(loss)
    data = described["fingerprint"]
    if jax.process_count() > 1:
        same = config.replace(data_dir=None, cache_dir=None).flat()
        # Hosts may have a file in folders of their own.
        same["data"] = pathlib.Path(same["data"]).name
        parallel.check_agreement(repr(same), "the configuration")
        parallel.check_agreement(data, "the data")
    for check in (check_patterns, check_statistics):
        check(config, dataset.num_classes, dataset.image_shape, mine)
    # A run that goes on has them in its checkpoint.
    start = None if resume else initial.read(config, dataset, mesh, mine)
    programs = compile_programs(config, dataset, mesh, mine)
    show_progress = show_progress and parallel.is_main()
    if output is None:
        if resume:
            raise ValueError("resume=True needs output, the folder of the run.")
        loop = Loop(config, dataset, programs, data, show_progress, callbacks=callbacks)
        state = programs.init(run_keys(config.run.seed)[0])
        if start is not None:
            loop.news = (start.line,)
            state = initial.put(config, programs, state, start)
        return loop.run(state, {})
    from otmdr_jax.experiments import checkpoint  # needs Orbax

    output = pathlib.Path(output)
    if resume:
        _check_same_run(run_folder.read_config(output), config, output)
        if (known := run_folder.read_data(output)) is not None:
            check_same_data(known["fingerprint"], data, output, dataset)
            was, now = (x.get("loss") for x in (known, described))
            if was != now:
                raise ValueError(
                    f"{output} was started with the loss {was or 'cross entropy'}, and "
                    f"{now or 'the cross entropy'} was given: resuming would give a "
                    "run that is neither."
                )
    lock = run_folder.locked if resume else run_folder.claimed
    with contextlib.ExitStack() as stack:
        folder = None
        # Before checkpoints are opened, which clears away what is half written.
        parallel.on_main(lambda: stack.enter_context(lock(output)))
        if not resume:
            stack.push(functools.partial(_withdraw, output))
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
        elif start := start or initial.read(config, dataset, mesh, mine):
            record = start.record
            parallel.on_main(lambda: run_folder.record_start(output, record))
            state = initial.put(config, programs, state, start)
            saved.save(state, {"data": data})  # nobody needs the weights after this
        if resume:
            parallel.on_main(lambda: run_folder.describe(output, config, described))
            folder = parallel.on_main(lambda: run_folder.reopen(output, step))
            stack.callback(_close, folder)
        loop = Loop(
            config, dataset, programs, data, show_progress, folder, saved, callbacks
        )
        if start is not None:
            loop.news = (start.line,)
        return loop.run(state, meta, step)


def _check_outside(output: str | os.PathLike, config: TrainConfig) -> None:
    """Refuses a run among the images of its own data, where it would be a class."""
    if not is_folder(config.data.name):
        return
    images = folder_path(config.data.name, config.data.data_dir).resolve()
    if pathlib.Path(output).resolve().is_relative_to(images):
        raise ValueError(
            f"the run would be written into the folder of its data, {images}, where "
            "each folder is a class: name one outside of it with --output, output= in "
            "Python."
        )


def _withdraw(output: pathlib.Path, kind: type | None, *error: Any) -> None:
    """Leaves no folder behind that blocks the next try, after an error at the start."""
    if kind is not None and parallel.is_main():
        run_folder.withdraw(output)


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
