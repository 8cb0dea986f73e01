"""The training loop: a run begins, takes steps in epochs, evaluates, saves and ends.

The data live on the devices, or stream to them. A step gathers, augments and normalises
its batch inside the compiled program and donates the state, so that the host only
counts; what it logs it reads two steps later, when it is there. Everything random
follows from the seed and the step: a run that is stopped and resumed ends with the same
bits as one that is not. On many hosts each runs this same loop, and one of them writes.
"""

import math
import os
import time
from typing import Any

import jax
import numpy as np

from otmdr_jax import parallel
from otmdr_jax.experiments import run_folder
from otmdr_jax.experiments.interrupts import Interrupted, remember, requests
from otmdr_jax.experiments.measure.evaluation import RunEvaluation, evaluate_run
from otmdr_jax.experiments.programs import few_images, much_noise
from otmdr_jax.experiments.training import divergence
from otmdr_jax.experiments.training.feed import Feed
from otmdr_jax.experiments.training.log import Log
from otmdr_jax.experiments.training.result import Result, final_result
from otmdr_jax.experiments.training.saving import (
    SECONDS_BETWEEN_EPOCHS,
    SECONDS_WITHIN_EPOCH,
    Saver,
)
from otmdr_jax.experiments.training.windows import Windows, summarise
from otmdr_jax.io.progress import Progress

PyTree = Any


class Loop:
    """One run of the loop: where it is, what it logs and when it saves.

    Attributes:
      step: Steps that have been dispatched.
      meta: What is saved beside the state: checksums of the data, the best evaluation,
        seconds a step in each epoch, members that have diverged, the mesh.
      news: Lines to say at the start.
    """

    news: tuple[str, ...] = ()

    def __init__(
        self,
        config,
        dataset,
        programs,
        data,
        show_progress,
        folder=None,
        saved=None,
        callbacks=(),
    ):
        self.config, self.dataset, self.programs = config, dataset, programs
        self.data = data  # its checksums
        self.folder, self.saved, self.show_progress = folder, saved, show_progress
        self.callbacks = callbacks
        self.windows = Windows()
        self.warm = False  # whether the step has been compiled in this process
        self.first, self.step, self.signum = 0, 0, 0
        self.meta: dict[str, Any] = {}

    def run(self, state: PyTree, meta: dict[str, Any], step: int = 0) -> Result:
        """Runs from a state, after so many steps, to the end."""
        self._begin(meta, step)
        total = self.programs.total_steps
        self.progress = Progress(total, step, self._title(), self.show_progress)
        with requests(self._stop), self.progress:
            self._say_where(meta, state)
            try:
                with Feed(self.config, self.dataset, self.programs, step) as feed:
                    while self.step < total:
                        state = self._epoch(state, feed)
                        if self.step < total:
                            self._between_epochs(state)
                result = self._finish(state)
            except divergence.NonFiniteError:
                if self.signum:  # too late for this run: the next one hears of it
                    remember(self.signum)
                raise
        if self.signum:  # as it ended: whoever has more runs to train has to stop
            raise Interrupted("stopped at its end: the run is finished.", self.signum)
        return result

    # --- It begins ---

    def _begin(self, meta, step):
        self.first, self.step, self.saver = step, step, None
        mesh = "one device"
        if self.programs.mesh is not None:
            mesh = ",".join(f"{a}={n}" for a, n in self.programs.mesh.shape.items())
        fresh = {"data": self.data, "best": None, "speeds": [], "diverged": []}
        self.meta = {**fresh, **meta, "mesh": mesh}
        self.log = Log(self.programs.steps_per_epoch, self.folder)
        if self.saved is not None:
            self.saver = Saver(self.saved, self.config.run.checkpoint_every, step)

    def _title(self):
        particles = self.config.method.gradient.num_particles
        many = f" K = {particles}" if particles > 1 else ""
        if self.config.model.members is not None:
            many += f" x {len(self.config.model.member_names)}"
        return f"{self.config.method.name}{many} seed {self.config.run.seed}"

    def _say_where(self, meta, state):
        """Says where the run resumes, and warns of what is unusual about it."""
        say, mesh = self.progress.say, self.meta["mesh"]
        left = self.step < self.programs.total_steps
        for line in self.news:
            say(line)
        if self.step:
            say(f"goes on after step {self.step}")
        if left and meta.get("mesh", mesh) != mesh:
            say(
                f"the mesh was {meta['mesh']} and is {mesh}: the rest of the run will "
                "not be the same bits"
            )
        if left:
            few = few_images(self.config, self.programs.mesh)
            for warning in filter(None, (few, much_noise(self.config, state))):
                say(warning)
            say("compiling")

    # --- It takes steps ---

    def _epoch(self, state: PyTree, feed: Feed) -> PyTree:
        """Trains to the end of the epoch, or of the run."""
        epoch, first = divmod(self.step, self.programs.steps_per_epoch)
        end = min(
            (epoch + 1) * self.programs.steps_per_epoch, self.programs.total_steps
        )
        order = feed.order(epoch)
        began, timed_from = time.perf_counter(), self.step
        for i in range(first, first + end - self.step):
            state, numbers = feed.step(state, order, i)
            self.step += 1
            self.windows.add(numbers)
            if not self.warm:
                # The first step of a process compiles: the clock starts after it.
                self.windows.wait(0)
                began, timed_from, self.warm = time.perf_counter(), self.step, True
                self.progress.restart(self.step)
            if done := self.windows.wait():
                self._log_windows(self.step - done)
            # Windows start with the epoch: none is cut short but its last.
            whole = (i + 1) % self.config.run.log_every == 0 or self.step == end
            if whole:
                self._close_window(state)
            # What is due at the end of an epoch comes after its evaluation. Hosts
            # decide together, and seldom: asking the others waits for them.
            if self.step < end and (whole or jax.process_count() == 1):
                stop, save = self._decide(SECONDS_WITHIN_EPOCH)
                if stop or save:
                    # Its window ends here: a run that goes on from the checkpoint
                    # never sees the numbers of steps before it.
                    self._close_window(state)
                if stop:
                    self._interrupted(state, stop)
                if save:
                    self._save(state)
        jax.block_until_ready(state)
        self.windows.wait(0)
        if self.step > timed_from:
            seconds = (time.perf_counter() - began) / (self.step - timed_from)
            self.meta["speeds"].append(seconds)
        self._log_windows(self.step)
        return state

    def _between_epochs(self, state: PyTree) -> None:
        """Evaluates, saves and stops, where each of these is due."""
        epoch, score = self.step // self.programs.steps_per_epoch, None
        if epoch % self.config.run.eval_every == 0:
            score, _ = self._evaluate(state)
        best = (self.meta["best"] or {}).get("step") == self.step
        stop, save = self._decide(SECONDS_BETWEEN_EPOCHS)
        if self.saved is not None and (best or save):
            self._save(state, score)
        if stop:
            self._interrupted(state, stop)

    def _close_window(self, state: PyTree) -> None:
        """Closes the window that ends with this step; it is logged later."""
        # Dispatched before the next step takes the optimizer's state.
        rate = self.programs.rate(np.int32(self.step - 1), state)
        self.windows.close(self.step, rate)

    def _log_windows(self, step: int) -> None:
        """Logs the windows that have ended by `step`."""
        for ended in self.windows.ended(step):
            self._log_training(*ended)

    def _log_training(self, step: int, steps: list, rate: jax.Array) -> None:
        """Logs the means over a window of steps; stops a run that has diverged."""
        window = summarise(steps, self.config.run.max_skipped)
        self.log.write_window(step, window, float(rate), self.meta["speeds"])
        shown = [name for name in ("loss", "accuracy") if name in window.means]
        self.progress.update(step, {name: window.means[name] for name in shown})
        for callback in self.callbacks:
            callback.on_window(step, dict(window.means))
        try:
            self.meta["diverged"] = divergence.find(
                window,
                step - len(steps) + 1,
                self.meta["diverged"],
                self.config.run.max_skipped,
                self.progress.say,
            )
        except divergence.NonFiniteError as error:
            if self.saved is None or not self.saved.steps():
                raise
            kept = f"{error} The checkpoint of step {self.saved.steps()[-1]} is kept."
            raise divergence.NonFiniteError(kept) from None

    # --- It evaluates ---

    def _evaluate(
        self, state: PyTree, final: bool = False
    ) -> tuple[float | None, RunEvaluation]:
        """Evaluates and logs; returns the validation score, or None, and everything."""
        validation = self.dataset.validation is not None
        of_run = evaluate_run(
            self.config,
            state,
            self.dataset,
            self.programs,
            splits=("validation", "test") if validation else ("test",),
            without=tuple(self.meta["diverged"]),
            final=final,
            show_progress=final and self.show_progress,
        )
        self.log.write_evaluation(self.step, of_run)
        found = {split: dict(x.metrics) for split, x in of_run.splits.items()}
        for callback in self.callbacks:
            callback.on_evaluation(self.step, found)
        values = of_run.splits["validation"].metrics if validation else {}
        what = "nll" if self.programs.classes else "loss"
        # NaN, before a member counts as diverged, would never be beaten.
        if math.isnan(values.get(what, math.nan)):
            return None, of_run
        score, best = -values[what], self.meta["best"]
        if best is None or score > best["score"]:
            self.meta["best"] = {"step": self.step, "score": score, **values}
        return score, of_run

    # --- It saves, or stops ---

    def _decide(self, seconds: float) -> tuple[int, bool]:
        """The signal to stop on (0: none) and whether to save; all hosts agree."""
        due = self.saver is not None and self.saver.is_due(self.step, seconds)
        stop, save = parallel.agree(self.signum, due)
        return int(stop), bool(save)

    def _save(self, state: PyTree, score: float | None = None) -> None:
        self._log_windows(self.step)
        assert self.saver is not None
        if self.saver.save(state, self.step, self.meta, score):
            for callback in self.callbacks:
                callback.on_checkpoint(self.step, state)

    def _stop(self, signum: int) -> None:
        self.signum = signum
        if self.show_progress:
            # Not print: a handler may come in the middle of one.
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def _interrupted(self, state: PyTree, signum: int) -> None:
        if self.saved is None:
            self._log_windows(self.step)
            raise Interrupted("stopped; nothing was saved, there is no output.", signum)
        self._save(state)
        raise Interrupted(
            f"stopped after step {self.step} of {self.programs.total_steps}; the state "
            f"is saved. Go on with: otmdr train --resume {self.saved.run}"
            + (" (on every host)" if jax.process_count() > 1 else ""),
            signum,
        )

    # --- It ends ---

    def _finish(self, state: PyTree) -> Result:
        if self.saved is not None and self.dataset.validation is None:
            self._save(state)  # no score to wait for: evaluation may take long
        score, of_run = self._evaluate(state, final=True)
        if self.saved is not None:
            self._save(state, score)
        stop, _ = self._decide(SECONDS_BETWEEN_EPOCHS)
        if stop:
            self._interrupted(state, stop)
        self.progress.say("measuring sharpness")
        result = final_result(
            self.config, of_run, self.dataset, self.programs, self.meta
        )
        found = of_run.splits["test"]
        labels = np.asarray(self.dataset.test.labels)
        folder = None if self.folder is None else self.folder.path
        if folder is not None:
            if of_run.seen is not None:
                run_folder.write_seen(folder, self.step, of_run.seen)
            same = self.step == self.first and run_folder.is_finished(folder)
            if same and (folder / "predictions.npz").exists():
                result = run_folder.read_result(folder)  # it may be of another machine
            else:
                run_folder.write_result(
                    folder, result, found.log_probs, labels, found.member_log_probs
                )
        whole = Result(state, result, self.log.history, found.log_probs, labels, folder)
        for callback in self.callbacks:
            callback.on_end(whole)
        return whole
