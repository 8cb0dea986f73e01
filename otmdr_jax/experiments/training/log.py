"""The records of a run, in memory and in its metrics.jsonl."""

import json
from typing import Any

from otmdr_jax.experiments.measure.evaluation import Evaluation, RunEvaluation
from otmdr_jax.experiments.run_folder import RunFolder
from otmdr_jax.experiments.training.windows import Window


class Log:
    """The records of a run from its start, also those from before it was resumed.

    Attributes:
      history: The records.
    """

    def __init__(self, steps_per_epoch: int, folder: RunFolder | None):
        """Reads the folder's earlier records; without a folder all stay in memory."""
        self.steps_per_epoch, self.folder = steps_per_epoch, folder
        self.history: list[dict[str, Any]] = []
        if folder is not None:
            lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8")
            self.history = [json.loads(line) for line in lines.splitlines()]

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Adds a record."""
        epoch = step / self.steps_per_epoch
        record = {"step": step, "epoch": epoch, "split": split, **values}
        self.history.append(record)
        if self.folder is not None:
            self.folder.log(record)

    def write_evaluation(self, step: int, of_run: RunEvaluation) -> None:
        """Adds an evaluation, unless a finished run that is resumed has it already."""
        records = {split: _with_members(x) for split, x in of_run.splits.items()}
        if of_run.posterior:
            records["posterior"] = of_run.posterior
        recent = self.history[-6:]  # no more than that can be of one evaluation
        known = {old["split"] for old in recent if old["step"] == step}
        for split, values in records.items():
            if split not in known:
                self.write(step, split, values)

    def write_window(
        self, step: int, window: Window, rate: float, speeds: list[float]
    ) -> None:
        """Adds the means over a window of steps that ends with `step`."""
        values: dict[str, Any] = {
            **window.means,
            "learning_rate": rate,
            "skipped_steps": window.skipped,
        }
        if window.member_means:
            values["members"] = window.member_means
        if speeds:  # known from the end of the first epoch on
            values["seconds_per_step"] = speeds[-1]
        self.write(step, "train", values)


def _with_members(found: Evaluation) -> dict[str, Any]:
    """The metrics of a split, and of each member (M,)."""
    if found.members is None:
        return found.metrics
    each = {x: [member[x] for member in found.members] for x in found.members[0]}
    return {**found.metrics, "members": each}
