"""Training runs: one compiled step in a loop that logs, saves and can be resumed.

starting.py     train: a run begins, or goes on from its last checkpoint
loop.py         epochs of steps, evaluations, the end
feed.py         batches: from the devices' memory, or streamed to them
log.py          what is recorded, of evaluations and of windows of steps
divergence.py   runs and members whose steps are no longer finite
saving.py       when a checkpoint is due
interrupts.py   Ctrl-C and SIGTERM: a request to save and stop
result.py       what a finished run gives
"""

from otmdr_jax.training.divergence import NonFiniteError
from otmdr_jax.training.interrupts import Interrupted
from otmdr_jax.training.loop import Loop
from otmdr_jax.training.result import Result, final_result
from otmdr_jax.training.starting import train

__all__ = [
    "Interrupted",
    "Loop",
    "NonFiniteError",
    "Result",
    "final_result",
    "train",
]
