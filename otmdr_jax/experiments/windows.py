"""Numbers of training steps, fetched late and averaged over windows of steps.

A step that is logged is some steps old: its numbers are fetched when they are there, so
that the device has work queued while the host writes.
"""

from typing import Any, NamedTuple

import jax
import numpy as np


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
      steps: What a method's step returned beside the state, step by step: scalars, or
        (M,) for an ensemble.
      max_skipped: How many steps in a row may be skipped.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.experiments import windows
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
