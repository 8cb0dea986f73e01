"""A pass over the training set that some methods need before they predict."""

from collections.abc import Callable
from typing import Any, NamedTuple

PyTree = Any


class Finalize(NamedTuple):
    """A pass over the training set that makes a state fit to predict.

    Attributes:
      of_batch: (state, batch) -> a pytree, whose sum over batches is wanted.
      finish: (state, that sum) -> a state to predict with, which is not for
        further steps.
      augmented: Whether a batch is augmented images, as in training; else it is
        (images, mask), each example once and as it is.
    """

    of_batch: Callable[[Any, Any], PyTree]
    finish: Callable[[Any, PyTree], Any]
    augmented: bool
