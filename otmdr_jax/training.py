"""The training loop: one compiled step, evaluation, logs, checkpoints, resumption.

The data live on the device. A step gathers, augments and normalises its batch inside
the compiled program and donates the state, so that the host only counts. Everything
random follows from the seed and the step: a run that is stopped and resumed ends with
the same bits as one that is not.
"""

import json
import os
import pathlib
import signal
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from otmdr_jax import config as config_lib
from otmdr_jax import progress, runs
from otmdr_jax.config import TrainConfig, differences
from otmdr_jax.data import Dataset
from otmdr_jax.methods import TrainState
from otmdr_jax.programs import (
    check_same_data,
    compile_programs,
    environment,
    evaluate,
    fingerprint,
    load_data,
    run_keys,
    sharpness,
)

# Between checkpoints, where checkpoint_every is not set: within an epoch, what a kill
# may cost; at the end of one, so that short epochs do not just write checkpoints.
SECONDS_WITHIN_EPOCH = 600.0
SECONDS_BETWEEN_EPOCHS = 15.0


class Result(NamedTuple):
    """What a run gives.

    Attributes:
      state: The final training state.
      metrics: Final metrics on the test set, sharpness, speed: see result.json.
      history: The logged events, as in metrics.jsonl.
      log_probs: (N, C) on the test set.
      labels: (N,) of the test set.
      folder: Where everything is, or None.
    """

    state: TrainState
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    log_probs: np.ndarray
    labels: np.ndarray
    folder: pathlib.Path | None


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and saved its state.

    Attributes:
      signum: The signal.
    """

    def __init__(self, message: str, signum: int):
        """Keeps the signal for the exit status."""
        super().__init__(message)
        self.signum = signum


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
      config: What to do, see :class:`otmdr_jax.config.TrainConfig`.
      dataset: The data; None loads `config.data`. With arrays of your own
        (:func:`otmdr_jax.data.from_arrays`) nothing but JAX, Flax and Optax is needed.
      output: Folder of the run, with logs and checkpoints (which need Orbax). None
        keeps everything in memory.
      resume: Go on with the run in `output` from its last whole checkpoint.
      show_progress: Whether to show a bar, or lines where there is no terminal.

    Returns:
      A :class:`Result`.

    Raises:
      FileExistsError: `output` holds something and `resume` is False.
      ValueError: The configuration, or the data, are not those of the resumed run.
      NonFiniteError: `config.max_skipped` steps in a row were not finite.
      Interrupted: On Ctrl-C or SIGTERM, after the state is saved.

    Example:
      >>> from otmdr_jax import training
      >>> from otmdr_jax.config import TrainConfig
      >>> result = training.train(
      ...     TrainConfig(method="sgd", steps=11, eval_every=9), show_progress=False
      ... )
      >>> result.metrics["steps"], result.log_probs.shape
      (11, (360, 10))
    """
    dataset = load_data(config) if dataset is None else dataset
    programs = compile_programs(config, dataset)
    if output is None:
        if resume:
            raise ValueError("resume=True needs output, the folder of the run.")
        loop = Loop(config, dataset, programs, None, None, show_progress)
        return loop.run(programs.init(run_keys(config.seed)[0]), {})
    from otmdr_jax import checkpoint  # needs Orbax

    output = pathlib.Path(output)
    folder = None
    if resume:
        _check_same_run(runs.read_config(output), config, output)
        config_lib.save(config, output / "config.json")
    else:
        folder = runs.create(output, config)
    with checkpoint.Checkpoints(
        output / "checkpoints",
        config.keep_checkpoints,
        scored=dataset.validation is not None,
    ) as saved:
        state = programs.init(run_keys(config.seed)[0])
        meta: dict[str, Any] = {}
        if resume and saved.steps():
            state, meta = saved.restore(state)
            check_same_data(meta, dataset, output)
        if folder is None:
            folder = runs.reopen(output, int(state.step))
        try:
            loop = Loop(config, dataset, programs, folder, saved, show_progress)
            return loop.run(state, meta)
        finally:
            folder.close()


class Loop:
    """One run of the loop: where it is, what it logs and when it saves."""

    def __init__(self, config, dataset, programs, folder, saved, show_progress):
        """Puts the training set on the device."""
        self.config, self.dataset, self.programs = config, dataset, programs
        self.folder, self.saved, self.show_progress = folder, saved, show_progress
        self.images = jax.device_put(dataset.train.images)
        self.labels = jax.device_put(dataset.train.labels)
        _, self.data_key = run_keys(config.seed)
        self.history: list[dict[str, Any]] = []
        self.warm = False  # whether the step has been compiled in this process
        self.saved_at = time.perf_counter()
        self.meta: dict[str, Any] = {}
        self.signum = 0

    def run(self, state: TrainState, meta: dict[str, Any]) -> Result:
        """Runs from `state` to the end."""
        fresh: dict[str, Any] = {
            "data": fingerprint(self.dataset),
            "best": None,
            "speeds": [],
        }
        self.meta = {**fresh, **meta}
        self.history = _read_history(self.folder)
        total = self.programs.total_steps
        particles = self.config.num_particles
        many = f" K = {particles}" if particles > 1 else ""
        title = f"{self.config.method}{many} seed {self.config.seed}"
        with (
            _signals(self._stop),
            progress.Progress(
                total, int(state.step), title, self.show_progress
            ) as self.progress,
        ):
            if int(state.step):
                self.progress.say(f"goes on after step {int(state.step)}")
            if int(state.step) < total:
                self.progress.say("compiling")
            while (step := int(state.step)) < total:
                state = self._segment(state, min(self._segment_end(step), total))
            return self._finish(state)

    def _segment_end(self, step: int) -> int:
        """The end of the epoch that `step` is in."""
        per_epoch = self.programs.steps_per_epoch
        return (step // per_epoch + 1) * per_epoch

    def _segment(self, state: TrainState, end: int) -> TrainState:
        """Trains to the end of an epoch, then evaluates and saves if they are due."""
        step = start = int(state.step)
        epoch, first = divmod(start, self.programs.steps_per_epoch)
        order = self.programs.epoch_order(jax.random.fold_in(self.data_key, epoch))
        window: list[dict[str, jax.Array]] = []
        began = time.perf_counter()
        timed_from = start
        for i in range(first, first + end - start):
            state, numbers = self.programs.train_step(
                state, self.images, self.labels, order, np.int32(i)
            )
            step += 1
            window.append(numbers)
            if not self.warm:
                # The first step of a process compiles: the clock starts after it.
                jax.block_until_ready(state.step)
                began, timed_from, self.warm = time.perf_counter(), step, True
                self.progress.restart(step)
            elif len(window) > 2:
                # At most two steps in flight: the device stays busy, a signal is
                # acted on at once.
                jax.block_until_ready(window[-3]["loss"])
            # Windows start with the epoch: none is cut short but its last.
            if (i + 1) % self.config.log_every == 0 or step == end:
                self._log_training(state, window, step)
                window = []
            if step == end:
                break  # what is due at the end of an epoch comes after its evaluation
            if self.signum:
                self._interrupted(state, window, step)
            if self._save_due(step, SECONDS_WITHIN_EPOCH):
                self._save(state)
        jax.block_until_ready(state.params)
        if step > timed_from:
            seconds = (time.perf_counter() - began) / (step - timed_from)
            self.meta["speeds"].append(seconds)
        self._end_of_epoch(state, step)
        return state

    def _end_of_epoch(self, state: TrainState, step: int) -> None:
        epoch = step // self.programs.steps_per_epoch
        if step == self.programs.total_steps:
            return
        score = None
        if epoch % self.config.eval_every == 0:
            score, _ = self._evaluate(state, step)
        best = self.saved is not None and (self.meta["best"] or {}).get("step") == step
        if best or self._save_due(step, SECONDS_BETWEEN_EPOCHS):
            self._save(state, score)
        if self.signum:
            self._interrupted(state, [], step)

    def _evaluate(
        self, state: TrainState, step: int, final: bool = False
    ) -> tuple[float | None, Any]:
        """Logs metrics of the validation and the test set.

        Returns:
          The score on the validation set, None without one, and what `evaluate` gives
          for the test set.
        """
        score = None
        for split in ("validation", "test"):
            if getattr(self.dataset, split) is None:
                continue
            found = evaluate(
                self.config,
                state,
                self.dataset,
                split,
                self.programs,
                show_progress=final and self.show_progress,
            )
            values = found[0]
            done = ((old["split"], old["step"]) for old in self.history[-4:])
            if (split, step) not in done:  # a finished run that is resumed
                self._log({"step": step, "split": split, **values})
            if split == "validation":
                score = -values["nll"]
                best = self.meta["best"]
                if best is None or score > best["score"]:
                    self.meta["best"] = {"step": step, "score": score, **values}
        return score, found

    def _finish(self, state: TrainState) -> Result:
        step = int(state.step)
        if self.saved is not None and self.dataset.validation is None:
            self._save(state)  # no score to wait for: evaluation may take long
        score, (values, log_probs) = self._evaluate(state, step, final=True)
        if self.saved is not None:
            self._save(state, score)
        if self.signum:
            self._interrupted(state, [], step)
        self.progress.say("measuring sharpness")
        speeds = self.meta["speeds"]
        speed = statistics.median(speeds) if speeds else float("nan")
        result = {
            "finished": True,
            **values,
            **sharpness(self.config, state, self.dataset, self.programs),
            "seconds_per_step": speed,
            "steps": step,
            "epochs": step / self.programs.steps_per_epoch,
            "skipped_steps": int(state.skipped),
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "best": self.meta["best"],
            **environment(),
        }
        labels = np.asarray(self.dataset.test.labels)
        if self.folder is not None:
            self.folder.finish(result, log_probs, labels)
        folder = None if self.folder is None else self.folder.path
        return Result(state, result, self.history, log_probs, labels, folder)

    def _log_training(self, state, window, step: int) -> None:
        """Logs the means over a window of steps; stops a run that has diverged."""
        values = {
            name: np.asarray(jax.device_get([numbers[name] for numbers in window]))
            for name in window[0]
        }
        in_row = values.pop("skipped_in_row")
        means = {
            # Skipped steps are counted below; their NaN would hide the others.
            name: float(np.mean(column[in_row == 0])) if np.any(in_row == 0) else np.nan
            for name, column in values.items()
        }
        rate = self.programs.rate(np.int32(step - 1), state.opt_state)
        record = {
            "step": step,
            "split": "train",
            **means,
            "learning_rate": float(rate),
            "skipped_steps": int(np.sum(in_row > 0)),
        }
        if self.meta["speeds"]:  # known from the end of the first epoch on
            record["seconds_per_step"] = self.meta["speeds"][-1]
        self._log(record)
        self.progress.update(step, {k: means[k] for k in ("loss", "accuracy")})
        if np.max(in_row) >= self.config.max_skipped:
            self._diverged(state, step - len(window) + int(np.argmax(in_row)) + 1)

    def _diverged(self, state: TrainState, step: int) -> None:
        where = ""
        if self.saved is not None and self.saved.steps():
            where = f" The checkpoint of step {self.saved.steps()[-1]} is kept."
        raise NonFiniteError(
            f"the loss or its gradient was not finite in {self.config.max_skipped} "
            f"steps in a row, up to step {step}; they were skipped. Try a lower "
            "learning_rate or rho, clip_norm=1.0, a warmup, or look for NaN in the "
            f"data; max_skipped sets the limit.{where}"
        )

    def _log(self, record: dict[str, Any]) -> None:
        epoch = record["step"] / self.programs.steps_per_epoch
        record = {"step": record["step"], "epoch": epoch, **record}
        self.history.append(record)
        if self.folder is not None:
            self.folder.log(record)

    def _save_due(self, step: int, seconds: float) -> bool:
        if self.saved is None:
            return False
        if self.config.checkpoint_every is not None:
            return step % self.config.checkpoint_every == 0
        return time.perf_counter() - self.saved_at > seconds

    def _save(self, state: TrainState, score: float | None = None) -> None:
        self.saved.save(state, self.meta, score)
        self.saved_at = time.perf_counter()

    def _stop(self, signum: int) -> None:
        self.signum = signum
        if self.show_progress:
            # Not print: a handler may come in the middle of one.
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def _interrupted(self, state: TrainState, window, step: int) -> None:
        if self.folder is None:
            raise Interrupted(
                "stopped; nothing was saved, there is no output.", self.signum
            )
        if window:
            self._log_training(state, window, step)
        self._save(state)
        raise Interrupted(
            f"stopped after step {step} of {self.programs.total_steps}; the state is "
            f"saved. Go on with: otmdr train --resume {self.folder.path}",
            self.signum,
        )


def _check_same_run(old: TrainConfig, new: TrainConfig, output: pathlib.Path) -> None:
    if changed := differences(old, new):
        lines = [f"  {name}: {a!r} -> {b!r}" for name, (a, b) in changed.items()]
        raise ValueError(
            f"{output} was started with other options; resuming would give a run that "
            "is neither:\n" + "\n".join(lines) + "\nLeave them out, or start a new run."
        )


def _read_history(folder: runs.RunFolder | None) -> list[dict[str, Any]]:
    if folder is None:
        return []
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class _signals:
    """Turns SIGTERM and the first Ctrl-C into a request; the next one acts as ever."""

    def __init__(self, request: Callable[[int], None]):
        self._request = request
        self._old: dict[int, Any] = {}

    def __enter__(self):
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum, frame):
        del frame
        self._restore()
        self._request(signum)

    def _restore(self):
        for signum, old in self._old.items():
            signal.signal(signum, old)
        self._old = {}

    def __exit__(self, *exc_info):
        self._restore()
