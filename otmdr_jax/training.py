"""The training loop: one compiled step, evaluation, logs, checkpoints, resumption.

The data live on the devices, or stream to them. A step gathers, augments and normalises
its batch inside the compiled program and donates the state, so that the host only
counts; what it logs it reads two steps later, when it is there. Everything random
follows from the seed and the step: a run that is stopped and resumed ends with the same
bits as one that is not. On many hosts each runs this same loop, and one of them writes.
"""

import collections
import dataclasses
import json
import math
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
from otmdr_jax import data as data_lib
from otmdr_jax import (
    members,
    parallel,
    predictors,
    progress,
    runs,
    sharpness,
    windows,
)
from otmdr_jax.building import check_models, method_options
from otmdr_jax.config import TrainConfig, differences
from otmdr_jax.data import Dataset
from otmdr_jax.evaluation import (
    Evaluation,
    evaluate,
    member_rows,
    posterior_record,
)
from otmdr_jax.members import steps_taken
from otmdr_jax.methods import FITTED
from otmdr_jax.programs import (
    check_same_data,
    compile_programs,
    environment,
    few_images,
    fingerprint,
    load_data,
    make_mesh,
    run_keys,
)

PyTree = Any

# Between checkpoints, where checkpoint_every is not set: within an epoch, what a kill
# may cost; at the end of one, so that short epochs do not just write checkpoints.
SECONDS_WITHIN_EPOCH = 600.0
SECONDS_BETWEEN_EPOCHS = 15.0

# Enough that a device never waits for the host, few enough that a signal is acted on
# at once.
STEPS_IN_FLIGHT = 2


class Result(NamedTuple):
    """What a run gives.

    Attributes:
      state: The final training state: of an ensemble see :mod:`otmdr_jax.members`.
      metrics: Final metrics on the test set, sharpness, speed: see result.json.
      history: The logged events, as in metrics.jsonl.
      log_probs: (N, C) on the test set; of an ensemble, of its mean probability.
      labels: (N,) of the test set.
      folder: Where everything is, or None.
    """

    state: PyTree
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
    mesh = make_mesh(config)
    # What cannot work is refused before the data are read.
    method_options(config)
    check_models(config)
    dataset = load_data(config) if dataset is None else dataset
    data = fingerprint(dataset)
    if jax.process_count() > 1:
        same = dataclasses.replace(config, data_dir=None, cache_dir=None)
        parallel.check_agreement(repr(same), "the configuration")
        parallel.check_agreement(data, "the data")
    programs = compile_programs(config, dataset, mesh)
    show_progress = show_progress and parallel.is_main()
    if output is None:
        if resume:
            raise ValueError("resume=True needs output, the folder of the run.")
        loop = Loop(config, dataset, programs, data, show_progress)
        return loop.run(programs.init(run_keys(config.seed)[0]), {})
    from otmdr_jax import checkpoint  # needs Orbax

    output = pathlib.Path(output)
    folder = None
    if resume:
        _check_same_run(runs.read_config(output), config, output)
        parallel.on_main(lambda: config_lib.save(config, output / "config.json"))
    else:
        folder = parallel.on_main(lambda: runs.create(output, config))
    with checkpoint.Checkpoints(
        output / "checkpoints",
        config.keep_checkpoints,
        scored=dataset.validation is not None,
    ) as saved:
        state = programs.init(run_keys(config.seed)[0])
        meta: dict[str, Any] = {}
        # Directory listings of a shared file system may be of different age.
        (latest,) = parallel.agree(-max(saved.steps(), default=-1))
        if resume and latest <= 0:
            state, meta = saved.restore(state, -int(latest))
            check_same_data(meta["data"], data, output)
        if resume:
            folder = parallel.on_main(lambda: runs.reopen(output, steps_taken(state)))
        try:
            loop = Loop(config, dataset, programs, data, show_progress, folder, saved)
            return loop.run(state, meta)
        finally:
            if folder is not None:
                folder.close()


class Loop:
    """One run of the loop: where it is, what it logs and when it saves."""

    def __init__(
        self, config, dataset, programs, data, show_progress, folder=None, saved=None
    ):
        """Puts the training set on the devices, unless it is to be streamed."""
        self.config, self.dataset, self.programs = config, dataset, programs
        self.data = data  # its checksums
        self.folder, self.saved, self.show_progress = folder, saved, show_progress
        _, self.data_key = run_keys(config.seed)
        streamed = config.input in ("host", "disk") or (
            config.input == "auto" and not data_lib.fits_on_device(dataset)
        )
        self.examples = self.stream = None
        streamed = any(parallel.agree(streamed))
        if streamed and config.member_data == "own":
            raise ValueError(
                "member_data='own' needs the training set on the device, where members "
                "can read it in any order: use --input device, or member_data='shared'."
            )
        if not streamed:
            self.examples = parallel.place(tuple(dataset.train), programs.mesh)
        # Windows of steps that are dispatched, but whose numbers are not fetched yet.
        self.unlogged: collections.deque[tuple[int, list, jax.Array]]
        self.unlogged = collections.deque()
        self.history: list[dict[str, Any]] = []
        self.warm = False  # whether the step has been compiled in this process
        self.saved_at, self.saved_step = time.perf_counter(), 0
        self.meta: dict[str, Any] = {}
        self.signum = 0

    def run(self, state: PyTree, meta: dict[str, Any]) -> Result:
        """Runs from `state` to the end."""
        mesh = "one device"
        if self.programs.mesh is not None:
            mesh = ",".join(f"{a}={n}" for a, n in self.programs.mesh.shape.items())
        fresh: dict[str, Any] = {
            "data": self.data,
            "best": None,
            "speeds": [],
            "diverged": [],
        }
        self.meta = {**fresh, **meta, "mesh": mesh}
        self.saved_step = steps_taken(state)
        self.history = _read_history(self.folder)
        total = self.programs.total_steps
        particles = self.config.num_particles
        many = f" K = {particles}" if particles > 1 else ""
        if self.config.members is not None:
            many += f" x {len(self.config.member_names)}"
        title = f"{self.config.method}{many} seed {self.config.seed}"
        with (
            _signals(self._stop),
            progress.Progress(
                total, steps_taken(state), title, self.show_progress
            ) as self.progress,
        ):
            if steps_taken(state):
                self.progress.say(f"goes on after step {steps_taken(state)}")
            if meta.get("mesh", mesh) != mesh and steps_taken(state) < total:
                self.progress.say(
                    f"the mesh was {meta['mesh']} and is {mesh}: the rest of the run "
                    "will not be the same bits"
                )
            if steps_taken(state) < total:
                if warning := few_images(self.config, self.programs.mesh):
                    self.progress.say(warning)
                self.progress.say("compiling")
            self._open_stream(steps_taken(state))
            try:
                while (step := steps_taken(state)) < total:
                    state = self._epoch(state, min(self._end_of(step), total))
            finally:
                if self.stream is not None:
                    self.stream.close()
            return self._finish(state)

    def _open_stream(self, step: int) -> None:
        """Starts to read this host's rows of the batches from `step` on."""
        if self.examples is not None:
            return
        size = self.config.batch_size
        first, last = parallel.host_rows(self.programs.mesh, size)
        self.stream = data_lib.stream_batches(
            self.dataset.train,
            size,
            self.data_key,
            self.programs.total_steps,
            start_step=step,
            shard_index=first // (last - first),
            shard_count=size // (last - first),
        )

    def _step(self, state: PyTree, order: jax.Array, i: int):
        """Dispatches step i of an epoch."""
        if self.stream is None:
            return self.programs.train_step(state, self.examples, order, np.int32(i))
        batch = parallel.place_local(tuple(next(self.stream)), self.programs.mesh)
        return self.programs.stream_step(state, batch)

    def _end_of(self, step: int) -> int:
        """The end of the epoch that `step` is in."""
        per_epoch = self.programs.steps_per_epoch
        return (step // per_epoch + 1) * per_epoch

    def _epoch(self, state: PyTree, end: int) -> PyTree:
        """Trains to the end of an epoch, then evaluates and saves if they are due."""
        step = start = steps_taken(state)
        epoch, first = divmod(start, self.programs.steps_per_epoch)
        order = self.programs.epoch_order(jax.random.fold_in(self.data_key, epoch))
        window: list[dict[str, jax.Array]] = []
        in_flight: collections.deque[jax.Array] = collections.deque()
        began = time.perf_counter()
        timed_from = start
        for i in range(first, first + end - start):
            state, numbers = self._step(state, order, i)
            step += 1
            window.append(numbers)
            in_flight.append(numbers["loss"])
            if not self.warm:
                # The first step of a process compiles: the clock starts after it.
                jax.block_until_ready(in_flight.popleft())
                began, timed_from, self.warm = time.perf_counter(), step, True
                self.progress.restart(step)
            if len(in_flight) > STEPS_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
                self._log_windows(step - STEPS_IN_FLIGHT)
            # Windows start with the epoch: none is cut short but its last.
            whole = (i + 1) % self.config.log_every == 0 or step == end
            if whole:
                window = self._close_window(state, window, step)
            if step == end:
                break  # what is due at the end of an epoch comes after its evaluation
            # Hosts decide together, and seldom: asking the others waits for them.
            if whole or jax.process_count() == 1:
                stop, save = self._decide(step, SECONDS_WITHIN_EPOCH)
                if stop:
                    self._close_window(state, window, step)
                    self._interrupted(state, step, stop)
                if save:
                    # Its window ends here: a run that goes on from the checkpoint
                    # never sees the numbers of steps before it.
                    window = self._close_window(state, window, step)
                    self._save(state)
        jax.block_until_ready(state)
        if step > timed_from:
            seconds = (time.perf_counter() - began) / (step - timed_from)
            self.meta["speeds"].append(seconds)
        self._log_windows(step)
        self._end_of_epoch(state, step)
        return state

    def _end_of_epoch(self, state: PyTree, step: int) -> None:
        epoch = step // self.programs.steps_per_epoch
        if step == self.programs.total_steps:
            return
        score = None
        if epoch % self.config.eval_every == 0:
            score, _ = self._evaluate(state, step)
        best = self.saved is not None and (self.meta["best"] or {}).get("step") == step
        stop, save = self._decide(step, SECONDS_BETWEEN_EPOCHS)
        if best or save:
            self._save(state, score)
        if stop:
            self._interrupted(state, step, stop)

    def _evaluate(
        self, state: PyTree, step: int, final: bool = False
    ) -> tuple[float | None, Evaluation]:
        """Logs metrics of the validation and the test set.

        Returns:
          The score on the validation set, None without one, and what `evaluate` gives
          for the test set.
        """
        score = None
        # The curvature may cost as much as epochs: until the end the mode predicts.
        settle = final or self.config.method not in FITTED
        if settle:
            state = predictors.settle(self.config, state, self.dataset, self.programs)
        for split in ("validation", "test"):
            if getattr(self.dataset, split) is None:
                continue
            found = evaluate(
                self.config,
                state,
                self.dataset,
                split,
                self.programs,
                without=tuple(self.meta["diverged"]),
                settle=settle,
                show_progress=final and self.show_progress,
            )
            values = found.metrics
            if not self._is_logged(split, step):  # as of a finished run, resumed
                record: dict[str, Any] = {"step": step, "split": split, **values}
                if found.members is not None:
                    record["members"] = {
                        name: [member[name] for member in found.members]
                        for name in found.members[0]
                    }
                self._log(record)
            if split == "validation" and not math.isnan(values["nll"]):
                # NaN, before a member counts as diverged, would never be beaten.
                score = -values["nll"]
                best = self.meta["best"]
                if best is None or score > best["score"]:
                    self.meta["best"] = {"step": step, "score": score, **values}
        without = tuple(self.meta["diverged"])
        record = posterior_record(self.programs, state, without)
        if record and not self._is_logged("posterior", step):
            self._log({"step": step, "split": "posterior", **record})
        return score, found

    def _is_logged(self, split: str, step: int) -> bool:
        recent = self.history[-6:]  # no more than that can be of one evaluation
        return any((old["split"], old["step"]) == (split, step) for old in recent)

    def _finish(self, state: PyTree) -> Result:
        step = steps_taken(state)
        if self.saved is not None and self.dataset.validation is None:
            self._save(state)  # no score to wait for: evaluation may take long
        settled = predictors.settle(self.config, state, self.dataset, self.programs)
        score, found = self._evaluate(settled, step, final=True)
        if self.saved is not None:
            self._save(state, score)
        stop, _ = self._decide(step, SECONDS_BETWEEN_EPOCHS)
        if stop:
            self._interrupted(state, step, stop)
        self.progress.say("measuring sharpness")
        speeds = self.meta["speeds"]
        result = final_result(
            self.config,
            state,
            self.programs,
            found,
            sharpness.gap(
                self.config,
                settled,
                self.dataset,
                self.programs,
                without=tuple(self.meta["diverged"]),
            ),
            self.meta,
        )
        result["seconds_per_step"] = (
            statistics.median(speeds) if speeds else float("nan")
        )
        labels = np.asarray(self.dataset.test.labels)
        if self.folder is not None:
            self.folder.finish(result, found.log_probs, labels, found.member_log_probs)
        folder = None if self.folder is None else self.folder.path
        return Result(state, result, self.history, found.log_probs, labels, folder)

    def _close_window(self, state: PyTree, window: list, step: int) -> list:
        """Leaves a window that ends with `step` to be logged; returns the next one."""
        if window:
            # Dispatched before the next step takes the optimizer's state.
            rate = self.programs.rate(np.int32(step - 1), members.opt_states(state))
            self.unlogged.append((step, window, rate))
        return []

    def _log_windows(self, step: int) -> None:
        """Logs the windows that have ended by `step`."""
        while self.unlogged and self.unlogged[0][0] <= step:
            self._log_training(*self.unlogged.popleft())

    def _log_training(self, step: int, steps: list, rate: jax.Array) -> None:
        """Logs the means over a window of steps; stops a run that has diverged."""
        window = windows.summarise(steps, self.config.max_skipped)
        record: dict[str, Any] = {
            "step": step,
            "split": "train",
            **window.means,
            "learning_rate": float(rate),
            "skipped_steps": window.skipped,
        }
        if window.member_means:
            record["members"] = window.member_means
        if self.meta["speeds"]:  # known from the end of the first epoch on
            record["seconds_per_step"] = self.meta["speeds"][-1]
        self._log(record)
        self.progress.update(step, {k: window.means[k] for k in ("loss", "accuracy")})
        first = step - len(steps) + 1
        count = len(next(iter(window.member_means.values()), [0]))
        for member, index in window.stalled.items():
            if member in self.meta["diverged"]:
                continue
            if len(self.meta["diverged"]) == count - 1:  # the last one
                self._diverged(first + index)
            self.meta["diverged"] = sorted([*self.meta["diverged"], member])
            self.progress.say(
                f"member {member} diverged: its loss or gradient was not finite in "
                f"{self.config.max_skipped} steps in a row, up to step {first + index}."
                " It no longer counts in the ensemble's prediction; the others go on"
            )

    def _diverged(self, step: int) -> None:
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

    def _decide(self, step: int, seconds: float) -> tuple[int, bool]:
        """The signal to stop on, 0 for none, and whether to save: as all hosts say."""
        due = time.perf_counter() - self.saved_at > seconds
        if self.config.checkpoint_every is not None:
            every = self.config.checkpoint_every
            due = step // every > self.saved_step // every
        stop, save = parallel.agree(self.signum, due and self.saved is not None)
        return int(stop), bool(save)

    def _save(self, state: PyTree, score: float | None = None) -> None:
        self._log_windows(steps_taken(state))
        self.saved.save(state, self.meta, score)
        self.saved_at, self.saved_step = time.perf_counter(), steps_taken(state)

    def _stop(self, signum: int) -> None:
        self.signum = signum
        if self.show_progress:
            # Not print: a handler may come in the middle of one.
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def _interrupted(self, state: PyTree, step: int, signum: int) -> None:
        if self.saved is None:
            self._log_windows(step)
            raise Interrupted("stopped; nothing was saved, there is no output.", signum)
        self._save(state)
        raise Interrupted(
            f"stopped after step {step} of {self.programs.total_steps}; the state is "
            f"saved. Go on with: otmdr train --resume {self.saved.run}"
            + (" (on every host)" if jax.process_count() > 1 else ""),
            signum,
        )


def final_result(
    config: TrainConfig,
    state: PyTree,
    programs: Any,
    found: Evaluation,
    sharp: dict[str, Any],
    meta: dict[str, Any],
) -> dict[str, Any]:
    """What result.json holds of a finished run, but for its speed.

    Args:
      config: The run's configuration.
      state: Its final state.
      programs: Its compiled functions.
      found: Its evaluation on the test set.
      sharp: What :func:`otmdr_jax.sharpness.gap` gave.
      meta: What is saved beside the state.
    """
    each = members.separate(state)
    step = steps_taken(state)
    result = {
        "finished": True,
        **found.metrics,
        "sharpness": sharp["sharpness"],
        "train_nll": sharp["train_nll"],
        "steps": step,
        "epochs": step / programs.steps_per_epoch,
        "skipped_steps": sum(int(member.skipped) for member in each),
        "parameters": sum(
            x.size
            for one in predictors.every(config, state)
            for x in jax.tree.leaves(one.params)
        ),
        "best": meta["best"],
        "mesh": meta["mesh"],
        **environment(),
    }
    if found.members is not None:
        result["members"] = member_rows(config, state, found, sharp, meta)
    if programs.sparsity is not None:
        result["sparsity"] = programs.sparsity(state)
    if record := posterior_record(programs, state, tuple(meta.get("diverged", ()))):
        result["posterior"] = record
    return result


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
