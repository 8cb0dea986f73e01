"""The cost of a prediction: multiply-adds of each kernel, by tracing the network."""

import jax
import jax.numpy as jnp
from flax import nnx

from otmdr_jax.models.base import Model


def output_positions(model: Model, image_shape: tuple[int, ...]) -> dict[str, int]:
    """Counts how often each kernel is applied to one image.

    That is the number of its output's pixels, or 1 for a dense layer. Each weight takes
    part in as many multiply-adds. Nothing is computed or allocated.

    Args:
      model: A model from `models.create`.
      image_shape: (H, W, C).

    Returns:
      The path of each kernel in the parameters, such as "conv1/kernel", -> positions.

    Raises:
      ValueError: The shape has another rank.

    Example:
      >>> from otmdr_jax import models
      >>> model = models.create("cnn_small", num_classes=10)
      >>> models.output_positions(model, (8, 8, 1))["conv2/kernel"]  # stride 2
      16
    """
    if len(image_shape) != 3:
        raise ValueError(
            f"image_shape must be (height, width, channels), got {image_shape}."
        )
    found: dict[str, int] = {}

    def record(name, function):
        def recorded(*args, **kwargs):
            out = function(*args, **kwargs)
            # (1, H, W, C) of a convolution, (1, C) of a dense layer.
            found[name] = out.size // out.shape[0] // out.shape[-1]
            return out

        return recorded

    def apply(images):
        module = model.module_fn(image_shape[-1], nnx.Rngs(params=0))
        for path, layer in nnx.iter_modules(module):
            name = "/".join(map(str, (*path, "kernel")))
            if isinstance(layer, nnx.Conv):
                layer.conv_general_dilated = record(name, layer.conv_general_dilated)
            elif isinstance(layer, nnx.Linear):
                layer.dot_general = record(name, layer.dot_general)
        return module(images, train=False)

    if model.input_size is not None:
        image_shape = (model.input_size, model.input_size, image_shape[-1])
    jax.eval_shape(apply, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return found
