"""Checkpoints of a run, by Orbax: asynchronous, atomic, kept to a number."""

import contextlib
import logging
import math
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from otmdr_jax.experiments.members import steps_taken
from otmdr_jax.experiments.methods import TrainState
from otmdr_jax.io import extras

try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies
except ImportError as error:
    raise ImportError(
        f"checkpoints need Orbax, and importing it failed with: {error}. Training "
        f"without an output folder does not. {extras.command('train')}"
    ) from error


PyTree = Any

# The score of a checkpoint between evaluations: never the best.
UNSCORED = float("-inf")


def _score(value: Any) -> float:
    """A score as a number, UNSCORED where it is none: NaN has no order."""
    number = UNSCORED if value is None else float(value)
    return number if math.isfinite(number) else UNSCORED


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: The training state, of one model or of members.
      meta: What was saved beside it: the data's fingerprint, the best score so far.
    """

    state: PyTree
    meta: dict[str, Any]


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax warns that what is opened for reading only is read only."""
    text = str(record.msg)  # any object may be logged
    return "read_only" not in text and "read only" not in text


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints in a folder; a context manager that waits for the last one.

    A save returns once the arrays are copied; writing goes on in the background, into
    a temporary folder that is renamed when it is whole. A killed run therefore leaves
    whole checkpoints and, at most, rubbish that the next opening removes.

    Args:
      folder: Where they are; made at the first save.
      keep: How many of the latest to keep, beside the best one.
      scored: Whether there are scores at all: a validation set.
      read_only: For evaluation: nothing in the folder is touched.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int = 2,
        *,
        scored: bool = True,
        read_only: bool = False,
    ):
        self.run = pathlib.Path(folder).parent  # as the user calls it
        self.folder = pathlib.Path(folder).absolute()
        self._scored = scored
        if read_only:
            logging.getLogger("absl").addFilter(_is_news)
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=lambda metrics: _score(metrics["score"]),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                # Without it Orbax forgets the scores with the process.
                best_fn=(lambda metrics: _score(metrics["score"])) if scored else None,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
            ),
            item_names=("state", "meta"),
        )

    def save(
        self, state: PyTree, meta: dict[str, Any], score: float | None = None
    ) -> bool:
        """Starts to save a state under its step; returns whether it was new.

        Args:
          state: The training state; it may be donated once this returns.
          meta: Anything that JSON holds.
          score: What "best" means, higher is better; None where it was not measured.
            NaN and infinities count as not measured.
        """
        step = steps_taken(state)
        if step in self._manager.all_steps():
            return False  # an interrupt right after a save
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_stored(state)),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics={"score": _score(score)} if self._scored else None,
            )
        return True

    def steps(self) -> list[int]:
        """The steps that whole checkpoints exist for, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest score, None if none was scored."""
        scores = {}
        for step in self.steps():
            metrics = self._manager.metrics(step)
            if metrics is not None and _score(metrics["score"]) > UNSCORED:
                scores[step] = metrics["score"]
        return max(scores, key=lambda step: scores[step]) if scores else None

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside a state, without the state.

        Args:
          step: Which checkpoint; None for the latest.

        Raises:
          FileNotFoundError: There is none, or none of that step.
          OSError: It cannot be read.
        """
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._read(self._known(step), args)["meta"]

    def restore(self, template: PyTree, step: int | None = None) -> Restored:
        """Reads a checkpoint.

        Args:
          template: A state, or its shapes, that fixes structure, dtypes and devices.
          step: Which one; None for the latest.

        Raises:
          FileNotFoundError: There is none, or none of that step.
          OSError: It cannot be read.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_stored(template)),
            meta=ocp.args.JsonRestore(),
        )
        items = self._read(self._known(step), args)
        state: Any = items["state"]
        if isinstance(template, TrainState):
            state = TrainState(**state)
        else:
            state = tuple(TrainState(**member) for member in state)
        return Restored(state, items["meta"])

    def _known(self, step: int | None) -> int:
        known = self.steps()
        if not known or (step is not None and step not in known):
            raise FileNotFoundError(
                f"{self.folder} holds no checkpoint"
                + (f" of step {step}: there are {known}." if known else ".")
            )
        return known[-1] if step is None else step

    def _read(self, step: int, args: Any) -> Any:
        """What Orbax reads, or in one line that it does not."""
        try:
            with _quiet_if_it_fails():
                return self._manager.restore(step, args=args)
        except Exception as error:
            raise OSError(
                f"the checkpoint of step {step} in {self.folder} cannot be read "
                f"({_reason(error)}). If the run was copied, copy it again; else "
                f"remove {self.folder / str(step)} to go on from an earlier one."
            ) from error

    def __exit__(self, kind: Any = None, *exc_info: Any) -> None:
        """Waits until the last save is whole."""
        try:
            with self._writing():
                self._manager.close()
        except OSError:
            if kind is None:  # else what went wrong first says more
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one line that a save failed, this one or the one before it."""
        try:
            yield
        except Exception as error:
            known = self.steps()
            whole = f"that of step {known[-1]} is whole" if known else "there is none"
            raise OSError(
                f"a checkpoint cannot be written into {self.folder} "
                f"({_reason(error)}); {whole}. Once it can, go on with: otmdr train "
                f"--resume {self.run}"
            ) from error


@contextlib.contextmanager
def _quiet_if_it_fails() -> Iterator[None]:
    """Drops the tracebacks of the reads that Orbax leaves behind as one fails.

    They end after Orbax has closed their event loop, from threads of TensorStore and at
    any time, so that after a failure this holds to the end of the process.
    """
    hook, tasks = sys.unraisablehook, logging.getLogger("asyncio")
    unused = "coroutine .* was never awaited"

    def quiet(told: Any) -> None:
        if not re.fullmatch(f"Event loop is closed|{unused}", str(told.exc_value)):
            hook(told)

    def is_another(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(word in text for word in ("orbax", "tensorstore", '" driver: '))

    sys.unraisablehook = quiet
    tasks.addFilter(is_another)
    failed = False
    try:
        yield
    except Exception:
        failed = True
        warnings.filterwarnings("ignore", unused, RuntimeWarning)
        raise
    finally:  # an interrupt is no failure
        if not failed:
            tasks.removeFilter(is_another)
            if sys.unraisablehook is quiet:
                sys.unraisablehook = hook


def _reason(error: BaseException) -> str:
    """The end of what the system said, which Orbax tells in a page of text."""
    told = re.search(r"\[os_error_code: ?\d+ *([^\]]*)\]|: ([^:\n]+) \[", str(error))
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return next(filter(None, told.groups()), text) if told else text[:200]


def _stored(state: PyTree) -> PyTree:
    """What is written: fields by name, without those that a run has not.

    A field that is added to `TrainState` later, None by default, then makes no older
    checkpoint unreadable.
    """
    if isinstance(state, TrainState):
        return {k: v for k, v in state._asdict().items() if v is not None}
    return tuple(_stored(member) for member in state)
