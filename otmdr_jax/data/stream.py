"""The batches of a training run, read ahead on the host, for data that stay there.

The order is the device's (`device.epoch_order` of the run's key and the epoch), so a
streamed run sees the same batches, bit for bit, as one with its data on the device.
"""

import functools
import numbers
import threading
from typing import TYPE_CHECKING

import jax
import numpy as np

from otmdr_jax.data.dataset import Dataset, Split
from otmdr_jax.data.device import epoch_order
from otmdr_jax.data.lazy import LazyImages, fits_in_memory
from otmdr_jax.data.loader import Loader
from otmdr_jax.io import extras

if TYPE_CHECKING:
    import grain


def stream_batches(
    split: Split,
    batch_size: int,
    key: jax.Array,
    total_steps: int,
    *,
    start_step: int = 0,
    shard_index: int | None = None,
    shard_count: int | None = None,
    num_threads: int = 4,
    prefetch: int = 8,
) -> "grain.DatasetIterator[Split]":
    """Streams the batches of a training run in the order of the device path.

    Step i is batch i % (N // B) of epoch e = i // (N // B), which is
    `order[b * B : (b + 1) * B]` of `order = epoch_order(fold_in(key, e), N)`. As on the
    device, the N % B examples that an epoch's order leaves over are not visited.

    The iterator is Grain's. `get_state()` returns a small dictionary that JSON can
    hold. `set_state(state)` continues with the batch that would have come next, however
    far reading had run ahead. A state counts steps from 0, whatever `start_step` and
    the number of hosts were. `close()` ends its threads. `next` raises the errors of
    threads; `set_state(get_state())` then tries the batch again.

    Args:
      split: Images (N, H, W, C), in memory or `LazyImages`, and labels (N,).
      batch_size: B, the size of the global batch, in 1..N.
      key: The PRNG key of the run's data order. Orders are drawn on the host's CPU,
        which gives the same bits as the device for JAX's default generator; "rbg"
        generators differ between kinds of devices.
      total_steps: The number of steps of the run, after which the stream ends.
      start_step: The first step, in 0..total_steps. Default 0.
      shard_index: h of P hosts, each of which reads the contiguous block
        `[h * B / P, (h + 1) * B / P)` of each batch. None: this JAX process.
      shard_count: P, which must divide B. None: the number of JAX processes.
      num_threads: The number of threads, each of which reads whole batches. Default 4.
      prefetch: The number of batches to hold ready, at least 1. Default 8.

    Returns:
      An iterator of `Split`s in NumPy arrays: images (B / P, H, W, C) in the dtype of
      the split (raw uint8, to be augmented and normalised on the device) and labels
      (B / P,) int32.

    Raises:
      ImportError: Grain is missing; the message says what to install.
      ValueError: An argument is not as above.

    Example:
      >>> import jax, numpy as np
      >>> images = np.zeros((5, 2, 2, 1), np.uint8)
      >>> split = Split(images, np.arange(5, dtype=np.int32))
      >>> batches = stream_batches(split, 2, jax.random.key(0), total_steps=4)
      >>> first, state = next(batches), batches.get_state()
      >>> rest = [batch.labels.tolist() for batch in batches]
      >>> batches.set_state(state)
      >>> [batch.labels.tolist() for batch in batches] == rest, len(rest)
      (True, 3)
      >>> batches.close()
    """
    grain = _import_grain()
    if shard_index is None and shard_count is None:
        ours = grain.sharding.ShardByJaxProcess()
        shard_index, shard_count = ours.shard_index, ours.shard_count
    if shard_index is None or shard_count is None:
        raise ValueError(
            "shard_index and shard_count must be given together, got "
            f"{shard_index=} and {shard_count=}. Leave both out to take this JAX "
            "process of all."
        )
    _check_integers(
        (
            ("batch_size", batch_size, 1, split.num_examples),
            ("total_steps", total_steps, 0, None),
            ("start_step", start_step, 0, total_steps),
            ("shard_count", shard_count, 1, None),
            ("shard_index", shard_index, 0, shard_count - 1),
            ("num_threads", num_threads, 1, None),
            ("prefetch", prefetch, 1, None),
        )
    )
    if batch_size % shard_count:
        raise ValueError(
            f"each of {shard_count} hosts reads the same part of a batch, so "
            f"batch_size must be a multiple of {shard_count}, got {batch_size=}."
        )
    # Threads are at most `prefetch` batches apart, so in epochs at most so far apart.
    spread = 1 + (prefetch - 1) // (split.num_examples // batch_size)
    orders = _Orders(key, split.num_examples, spread)
    batches = _Batches(split, orders, batch_size, total_steps, shard_index, shard_count)
    # More threads than batches to hold would have nothing to do.
    options = grain.ReadOptions(min(num_threads, prefetch), prefetch)
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    # Not a slice of the steps: states would then count from start_step.
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


def fits_on_device(data: Dataset | int, device: jax.Device | None = None) -> bool:
    """Says whether a training set should be put on the device.

    It should if it takes at most a quarter of the device's memory. For a device that
    does not report its memory (a CPU), the host's memory counts. Lazy images, and
    batches of a loader, are never put on a device.

    Args:
      data: A dataset, whose training set counts, or a number of bytes.
      device: The device; None for JAX's first local one.

    Returns:
      True if the data should be put on the device, False if they should be streamed.

    Example:
      >>> fits_on_device(1000), fits_on_device(10**18)
      (True, False)
    """
    if isinstance(data, Dataset):
        if isinstance(data.train, Loader) or isinstance(data.train.images, LazyImages):
            return False
        data = sum(array.nbytes for array in data.train)
    device = jax.local_devices()[0] if device is None else device
    return fits_in_memory(data, (device.memory_stats() or {}).get("bytes_limit"))


class _Batches:
    """Random access to the batches of a run: item i is this host's part of step i's."""

    def __init__(self, split, orders, batch_size, total_steps, index, count):
        images, labels = split
        if not isinstance(images, LazyImages):
            images = np.asarray(images)  # threads gather on the host
        self._images, self._labels = images, np.asarray(labels)
        self._batch_size, self._total_steps = batch_size, total_steps
        self._part = batch_size // count
        self._offset = index * self._part
        self._order = orders

    def __len__(self) -> int:
        return self._total_steps

    def __getitem__(self, step) -> Split:
        epoch, i = divmod(int(step), len(self._labels) // self._batch_size)
        start = i * self._batch_size + self._offset
        rows = self._order(epoch)[start : start + self._part]
        return Split(self._images[rows], self._labels[rows])


class _Orders:
    """Each epoch's order as a NumPy array, drawn on the CPU when it is first needed."""

    def __init__(self, key: jax.Array, num_examples: int, spread: int = 1):
        # A key on the CPU moves the whole computation there. JAX may be told to leave
        # the CPU out (JAX_PLATFORMS); then its own device is used.
        try:
            key = jax.device_put(key, jax.local_devices(backend="cpu")[0])
        except RuntimeError:
            pass
        self._draw = lambda epoch: np.asarray(_epoch_order(key, epoch, num_examples))
        self._spread = spread
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __call__(self, epoch: int) -> np.ndarray:
        with self._lock:  # or all threads would draw the new epoch's at once
            if epoch not in self._kept:
                # Not the least recently used: a thread that falls behind would make
                # the others draw again.
                for other in [e for e in self._kept if abs(e - epoch) > self._spread]:
                    del self._kept[other]
                self._kept[epoch] = self._draw(epoch)
            return self._kept[epoch]


@functools.partial(jax.jit, static_argnums=2)
def _epoch_order(key, epoch, num_examples):
    return epoch_order(jax.random.fold_in(key, epoch), num_examples)


def _check_integers(bounds) -> None:
    for name, value, low, high in bounds:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            span = f"of at least {low}" if high is None else f"in {low}..{high}"
            raise ValueError(f"{name} must be an int {span}, got {value!r}.")


def _import_grain():
    try:
        import grain
        import grain.experimental
        import grain.sharding
    except ImportError as error:
        raise ImportError(
            f"streaming needs grain, and importing it failed with: {error}. "
            + extras.command("data")
        ) from error
    return grain
