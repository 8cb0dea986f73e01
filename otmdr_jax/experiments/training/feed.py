"""The batches of a run: gathered in the devices' memory, or streamed to the devices.

Both give the same batches in the same order. The training set lies on the devices where
it fits, and a step gathers its batch inside the compiled program. Batches of a loader
are streamed in the loader's order.
"""

import contextlib
from typing import Any

import jax
import numpy as np

from otmdr_jax import data as data_lib
from otmdr_jax import parallel
from otmdr_jax.data import Dataset, Loader
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.programs import Programs, run_keys

PyTree = Any


class Feed(contextlib.AbstractContextManager):
    """The steps of a run, each with its batch; a context manager."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset, programs: Programs, step: int
    ):
        """Puts the training set on the devices, or starts to stream it from `step` on.

        Each host reads its own rows of a streamed batch.
        """
        self.programs = programs
        _, self.key = run_keys(config.run.seed)
        streamed = config.run.input in ("host", "disk") or (
            config.run.input == "auto" and not data_lib.fits_on_device(dataset)
        )
        self.examples: PyTree = None
        self.stream: Any = None
        if isinstance(dataset.train, Loader):
            self.stream = dataset.train.stream(step, programs.total_steps)
            return
        streamed = any(parallel.agree(streamed))
        if streamed and config.model.member_data == "own":
            raise ValueError(
                "member_data='own' needs the training set on the device, where members "
                "can read it in any order: use --input device, or member_data='shared'."
            )
        if not streamed:
            self.examples = parallel.place(tuple(dataset.train), programs.mesh)
            return
        size = config.run.batch_size
        first, last = parallel.host_rows(programs.mesh, size)
        self.stream = data_lib.stream_batches(
            dataset.train,
            size,
            self.key,
            programs.total_steps,
            start_step=step,
            shard_index=first // (last - first),
            shard_count=size // (last - first),
        )

    def __exit__(self, *exc_info: Any) -> None:
        """Stops the threads that read."""
        if self.stream is not None:
            self.stream.close()

    def order(self, epoch: int) -> jax.Array:
        """The order of an epoch's examples."""
        return self.programs.epoch_order(jax.random.fold_in(self.key, epoch))

    def step(self, state: PyTree, order: jax.Array, i: int):
        """Dispatches step i of an epoch."""
        if self.stream is None:
            return self.programs.train_step(state, self.examples, order, np.int32(i))
        batch = parallel.place_local(tuple(next(self.stream)), self.programs.mesh)
        return self.programs.stream_step(state, batch)
