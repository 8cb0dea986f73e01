"""Training runs: one compiled step in a loop that logs, saves and can be resumed.

starting.py     train: a run begins, or goes on from its last checkpoint
initial.py      weights that a run starts from: of a run, a file, torchvision
loop.py         epochs of steps, evaluations, the end
feed.py         batches: from the devices' memory, or streamed to them
windows.py      numbers of steps, fetched late, averaged over windows
log.py          what is recorded, of evaluations and of windows of steps
divergence.py   runs and members whose steps are no longer finite
saving.py       when a checkpoint is due
callbacks.py    what a run calls on its way
result.py       what a finished run gives
"""

from otmdr_jax.experiments.interrupts import Interrupted
from otmdr_jax.experiments.training.callbacks import Callback
from otmdr_jax.experiments.training.divergence import NonFiniteError
from otmdr_jax.experiments.training.loop import Loop
from otmdr_jax.experiments.training.result import Result, final_result
from otmdr_jax.experiments.training.starting import train

__all__ = [
    "Callback",
    "Interrupted",
    "Loop",
    "NonFiniteError",
    "Result",
    "final_result",
    "train",
]
