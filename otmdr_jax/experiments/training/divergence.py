"""Divergence: too many steps in a row that are not finite.

A run then stops, and a member of an ensemble no longer counts. A single such step is
skipped on the device.
"""

from collections.abc import Callable, Sequence

from otmdr_jax.experiments.training.windows import Window


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def find(
    window: Window,
    first: int,
    diverged: Sequence[int],
    max_skipped: int,
    say: Callable[[str], None],
) -> list[int]:
    """The members that have diverged by the end of a window of steps.

    Args:
      window: The steps' numbers.
      first: The number of its first step, from 1.
      diverged: The members that had diverged before.
      max_skipped: The number of steps in a row that may be skipped.
      say: A function that is called with a message for each new member.

    Raises:
      NonFiniteError: None is left, or the run has one model alone.
    """
    count = len(next(iter(window.member_means.values()), [0]))
    for member, index in window.stalled.items():
        if member in diverged:
            continue
        if len(diverged) == count - 1:  # the last one
            raise NonFiniteError(
                f"the loss or its gradient was not finite in {max_skipped} steps in a "
                f"row, up to step {first + index}; they were skipped. Try a lower "
                "learning_rate or rho, clip_norm=1.0, a warmup, or look for NaN in the "
                "data; max_skipped sets the limit."
            )
        diverged = sorted([*diverged, member])
        say(
            f"member {member} diverged: its loss or gradient was not finite in "
            f"{max_skipped} steps in a row, up to step {first + index}. It no longer "
            "counts in the ensemble's prediction; the others go on"
        )
    return list(diverged)
