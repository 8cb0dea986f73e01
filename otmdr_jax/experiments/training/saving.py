"""When a checkpoint is due.

Every `checkpoint_every` steps where that is set; otherwise by the clock. A new best on
the validation set and a request to stop are saved whatever is due.
"""

import time
from typing import Any

PyTree = Any

# Between checkpoints, where checkpoint_every is not set: within an epoch, what a kill
# may cost; at the end of one, so that short epochs do not just write checkpoints.
SECONDS_WITHIN_EPOCH = 600.0
SECONDS_BETWEEN_EPOCHS = 15.0


class Saver:
    """A run's checkpoints, and when the last one was saved in this process.

    Attributes:
      checkpoints: Where they are.
    """

    def __init__(self, checkpoints: Any, every: int | None, step: int):
        """Starts the clock; `step` is the one that the run starts from."""
        self.checkpoints, self.every = checkpoints, every
        self.saved_at, self.saved_step = time.perf_counter(), step

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether to save, after `step`: `seconds` since the last one, by the clock."""
        if self.every is not None:
            return step // self.every > self.saved_step // self.every
        return time.perf_counter() - self.saved_at > seconds

    def save(
        self,
        state: PyTree,
        step: int,
        meta: dict[str, Any],
        score: float | None = None,
    ) -> bool:
        """Saves the state after a step, and what is known beside it, unless it is."""
        is_new = self.checkpoints.save(state, meta, score)
        self.saved_at, self.saved_step = time.perf_counter(), step
        return is_new
