"""The training loop: epochs of one compiled step, evaluations, and the end.

The data live on the devices, or stream to them. A step gathers, augments and normalises
its batch inside the compiled program and donates the state, so that the host only
counts; what it logs it reads two steps later, when it is there. Everything random
follows from the seed and the step: a run that is stopped and resumed ends with the same
bits as one that is not. On many hosts each runs this same loop, and one of them writes.
"""

import collections
import math
import os
import statistics
import time
from typing import Any

import jax
import numpy as np

from otmdr_jax import parallel
from otmdr_jax.experiments import members, predictors, windows
from otmdr_jax.experiments.interrupts import Interrupted, Requests
from otmdr_jax.experiments.measure import sharpness
from otmdr_jax.experiments.measure.evaluation import (
    Evaluation,
    evaluate,
    posterior_record,
)
from otmdr_jax.experiments.members import steps_taken
from otmdr_jax.experiments.methods import FITTED
from otmdr_jax.experiments.programs import few_images
from otmdr_jax.experiments.training import divergence
from otmdr_jax.experiments.training.feed import Feed
from otmdr_jax.experiments.training.log import Log
from otmdr_jax.experiments.training.result import Result, final_result
from otmdr_jax.experiments.training.saving import (
    SECONDS_BETWEEN_EPOCHS,
    SECONDS_WITHIN_EPOCH,
    Saver,
)
from otmdr_jax.io.progress import Progress

PyTree = Any

# Enough that a device never waits for the host, few enough that a signal is acted on
# at once.
STEPS_IN_FLIGHT = 2


class Loop:
    """One run of the loop: where it is, what it logs and when it saves."""

    def __init__(
        self, config, dataset, programs, data, show_progress, folder=None, saved=None
    ):
        """Puts the training set on the devices, unless it is to be streamed."""
        self.config, self.dataset, self.programs = config, dataset, programs
        self.data = data  # its checksums
        self.folder, self.saved, self.show_progress = folder, saved, show_progress
        self.feed = Feed(config, dataset, programs)
        # Windows of steps that are dispatched, but whose numbers are not fetched yet.
        self.unlogged: collections.deque[tuple[int, list, jax.Array]]
        self.unlogged = collections.deque()
        self.warm = False  # whether the step has been compiled in this process
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
        self.log = Log(self.programs.steps_per_epoch, self.folder)
        self.saver = None
        if self.saved is not None:
            every = self.config.checkpoint_every
            self.saver = Saver(self.saved, every, steps_taken(state))
        total = self.programs.total_steps
        particles = self.config.num_particles
        many = f" K = {particles}" if particles > 1 else ""
        if self.config.members is not None:
            many += f" x {len(self.config.member_names)}"
        title = f"{self.config.method}{many} seed {self.config.seed}"
        self.progress = Progress(total, steps_taken(state), title, self.show_progress)
        with Requests(self._stop), self.progress:
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
            self.feed.open(steps_taken(state))
            try:
                while (step := steps_taken(state)) < total:
                    state = self._epoch(state, min(self._end_of(step), total))
            finally:
                self.feed.close()
            return self._finish(state)

    def _end_of(self, step: int) -> int:
        """The end of the epoch that `step` is in."""
        per_epoch = self.programs.steps_per_epoch
        return (step // per_epoch + 1) * per_epoch

    def _epoch(self, state: PyTree, end: int) -> PyTree:
        """Trains to the end of an epoch, then evaluates and saves if they are due."""
        step = start = steps_taken(state)
        epoch, first = divmod(start, self.programs.steps_per_epoch)
        order = self.feed.order(epoch)
        window: list[dict[str, jax.Array]] = []
        in_flight: collections.deque[jax.Array] = collections.deque()
        began = time.perf_counter()
        timed_from = start
        for i in range(first, first + end - start):
            state, numbers = self.feed.step(state, order, i)
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
            self.log.write_evaluation(step, split, found)
            if split == "validation" and not math.isnan(values["nll"]):
                # NaN, before a member counts as diverged, would never be beaten.
                score = -values["nll"]
                best = self.meta["best"]
                if best is None or score > best["score"]:
                    self.meta["best"] = {"step": step, "score": score, **values}
        without = tuple(self.meta["diverged"])
        record = posterior_record(self.programs, state, without)
        if record:
            self.log.write_once(step, "posterior", record)
        return score, found

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
        return Result(state, result, self.log.history, found.log_probs, labels, folder)

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
        self.log.write_window(step, window, float(rate), self.meta["speeds"])
        self.progress.update(step, {k: window.means[k] for k in ("loss", "accuracy")})
        try:
            self.meta["diverged"] = divergence.find(
                window,
                step - len(steps) + 1,
                self.meta["diverged"],
                self.config.max_skipped,
                self.progress.say,
            )
        except divergence.NonFiniteError as error:
            if self.saved is None or not self.saved.steps():
                raise
            kept = f"{error} The checkpoint of step {self.saved.steps()[-1]} is kept."
            raise divergence.NonFiniteError(kept) from None

    def _decide(self, step: int, seconds: float) -> tuple[int, bool]:
        """The signal to stop on, 0 for none, and whether to save: as all hosts say."""
        due = self.saver is not None and self.saver.is_due(step, seconds)
        stop, save = parallel.agree(self.signum, due)
        return int(stop), bool(save)

    def _save(self, state: PyTree, score: float | None = None) -> None:
        self._log_windows(steps_taken(state))
        assert self.saver is not None
        self.saver.save(state, self.meta, score)

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
