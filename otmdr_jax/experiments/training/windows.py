"""Numbers of training steps, fetched late and averaged over windows of steps.

A step that is logged is some steps old: its numbers are fetched when they are there, so
that the device has work queued while the host writes.
"""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

# Enough that a device never waits for the host, few enough that a signal is acted on
# at once.
STEPS_IN_FLIGHT = 2


class Windows:
    """Dispatched steps whose numbers have not been fetched yet."""

    def __init__(self):
        self._open: list[dict[str, jax.Array]] = []
        self._closed: collections.deque[tuple[int, list, jax.Array]]
        self._closed = collections.deque()
        self._in_flight: collections.deque[jax.Array] = collections.deque()

    def add(self, numbers: dict[str, jax.Array]) -> None:
        """Adds a step to the window that is open."""
        self._open.append(numbers)
        self._in_flight.append(numbers["loss"])

    def wait(self, in_flight: int = STEPS_IN_FLIGHT) -> int:
        """Waits until so many steps are under way; returns how many, 0 for fewer."""
        if len(self._in_flight) <= in_flight:
            return 0
        while len(self._in_flight) > in_flight:
            jax.block_until_ready(self._in_flight.popleft())
        return in_flight

    def close(self, step: int, rate: jax.Array) -> None:
        """Ends the open window, if it has steps, with `step` and its learning rate."""
        if self._open:
            self._closed.append((step, self._open, rate))
            self._open = []

    def ended(self, step: int) -> Iterator[tuple[int, list, jax.Array]]:
        """Takes the windows that have ended by `step`: (last step, steps, rate)."""
        while self._closed and self._closed[0][0] <= step:
            yield self._closed.popleft()


class Window(NamedTuple):
    """The numbers of consecutive steps.

    Attributes:
      means: Means over the steps that were finite, and over members; NaN for none.
      member_means: (M,) of each number for an ensemble's members, else empty.
      skipped: How many steps were skipped, of all members together.
      stalled: The members (0 for a single model) that skipped as many steps in a row
        as are allowed, each with the index in the window of the step where it did.
    """

    means: dict[str, float]
    member_means: dict[str, list[float]]
    skipped: int
    stalled: dict[int, int]


def summarise(steps: list[dict[str, jax.Array]], max_skipped: int) -> Window:
    """Fetches and averages the numbers of consecutive steps.

    Args:
      steps: The numbers that each step returned beside the state: scalars, or (M,) for
        an ensemble.
      max_skipped: The number of steps in a row that may be skipped.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.experiments.training import windows
      >>> def step(losses, skipped):
      ...     skipped = jnp.array(skipped)
      ...     return dict(loss=losses, skipped=skipped, skipped_in_row=skipped)
      >>> good = step(jnp.array([1.0, 4.0]), [0, 0])
      >>> bad = step(jnp.array([2.0, jnp.nan]), [0, 1])
      >>> window = windows.summarise([good, bad], max_skipped=1)
      >>> window.member_means["loss"], window.means["loss"], window.stalled
      ([1.5, 4.0], 2.75, {1: 1})
    """
    values = {
        name: np.asarray(jax.device_get([numbers[name] for numbers in steps]))
        for name in steps[0]
    }
    in_row = values.pop("skipped_in_row")  # (steps,) or (steps, members)
    skipped = values.pop("skipped") > 0
    # Skipped steps are counted; their NaN would hide the others.
    of_members = {name: _mean(x, ~skipped) for name, x in values.items()}
    columns = in_row.reshape(len(steps), -1)
    stalled = {
        m: int(np.argmax(columns[:, m]))
        for m in range(columns.shape[1])
        if columns[:, m].max() >= max_skipped
    }
    return Window(
        {name: float(_mean(x, ~np.isnan(x))) for name, x in of_members.items()},
        {n: x.tolist() for n, x in of_members.items()} if in_row.ndim > 1 else {},
        int(np.sum(skipped)),
        stalled,
    )


def _mean(x: Any, counts: Any) -> np.ndarray:
    """The mean over axis 0, if there is one, of the entries that count; else NaN."""
    x, counts = np.atleast_1d(x), np.atleast_1d(counts)
    number = counts.sum(axis=0)
    total = np.where(counts, x, 0.0).sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
