"""Data whose targets are no class numbers: regression, several labels at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from otmdr_jax.data.checks import plain
from otmdr_jax.data.dataset import Dataset, Split, check_augmentations
from otmdr_jax.data.statistics import check_statistics


def from_targets(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    validation: tuple[Any, Any] | None = None,
    name: str = "arrays",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Sequence[str] = (),
) -> Dataset:
    """Makes a dataset of inputs and targets of any shape, after checking them.

    Training on it needs a network and a loss of one's own:
    :func:`otmdr_jax.training.train`.

    Args:
      train: (inputs, targets). Inputs are (N, ..., C), images or rows of features,
        uint8 or floats; targets are (N, ...) numbers: floats stay float32, integers and
        bools int32.
      test: Inputs and targets of the test split, of the same shapes and dtypes.
      validation: Those of a validation split; None for none.
      name: A name for the dataset.
      mean: The mean of each feature or channel, C numbers; on the [0, 1] scale for
        uint8. None computes it over the training inputs.
      std: The standard deviation, in the same way; 1 for a constant one.
      augment: Names of augmentations of images, as for
        :func:`otmdr_jax.data.from_arrays`. Default none.

    Returns:
      The dataset; its `num_classes` is 0.

    Raises:
      ValueError: Splits differ in their shapes, or values are not finite.
      TypeError: A dtype is not as above.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import data
      >>> x = np.linspace(-1, 1, 20)[:, None]
      >>> data.from_targets((x, np.sin(x)), (x[:5], np.sin(x[:5])))
      Dataset('arrays': 20 train, 5 test, 1 float32, no classes)
    """
    given = {"train": train, "test": test}
    if validation is not None:
        given["validation"] = validation
    splits = {split: _checked(pair, split) for split, pair in given.items()}
    first = splits["train"]
    for split, (inputs, targets) in splits.items():
        for what, ours, theirs in (
            ("inputs", first.images, inputs),
            ("targets", first.labels, targets),
        ):
            if (ours.shape[1:], ours.dtype) != (theirs.shape[1:], theirs.dtype):
                raise ValueError(
                    f"train and {split} {what} must agree, got {ours.shape[1:]} "
                    f"{ours.dtype} and {theirs.shape[1:]} {theirs.dtype}."
                )
    augment = check_augmentations(augment)
    if augment and first.images.ndim != 4:
        raise ValueError(
            f"augment={augment} is of images (N, H, W, C), got inputs of shape "
            f"{first.images.shape}."
        )
    mean, std = check_statistics(first.images, mean, std)
    return Dataset(
        name=name,
        train=first,
        validation=splits.get("validation"),
        test=splits["test"],
        num_classes=0,
        mean=mean,
        std=std,
        augment=augment,
    )


def _checked(pair, split) -> Split:
    try:
        inputs, targets = pair
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{split} must be a pair (inputs, targets), got {type(pair).__name__}."
        ) from error
    inputs = plain(inputs, f"{split} inputs")
    targets = plain(targets, f"{split} targets")
    if inputs.ndim < 2 or targets.ndim < 1 or len(inputs) != len(targets):
        raise ValueError(
            f"{split} needs inputs (N, ..., C) and as many targets (N, ...), got "
            f"shapes {inputs.shape} and {targets.shape}."
        )
    if not len(inputs):
        raise ValueError(f"{split} has no examples.")
    for what, array in (("inputs", inputs), ("targets", targets)):
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{split} {what} must be numbers, got {array.dtype}.")
        # Unsigned integers of 64 bits compare with Python's numbers.
        if array.dtype.kind in "iu" and array.size:
            low, high = int(array.min()), int(array.max())
            if low < -(2**31) or high >= 2**31:
                raise ValueError(
                    f"{split} {what} that are integers must be those of 32 bits, got "
                    f"{low} to {high}: make them floats."
                )
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float32)
        if not np.isfinite(narrow).all():
            raise ValueError(f"{split} {what} must be finite in float32.")
    if inputs.dtype != np.uint8:
        if inputs.dtype.kind != "f":
            raise TypeError(
                f"{split} inputs must be uint8 or floats, got {inputs.dtype}: "
                "inputs.astype(np.float32)."
            )
        inputs = inputs.astype(np.float32)
    kind = np.float32 if targets.dtype.kind == "f" else np.int32
    return Split(inputs, targets.astype(kind))
