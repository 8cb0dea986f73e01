"""A network of the zoo as two pure functions.

A family is an NNX module `family(layers, in_channels, num_classes, **options)` called
as `module(images, train=..., keys=...)`. `Model` hides how NNX splits such a module
into a static graph and two trees of arrays: it builds the graph abstractly (no array is
allocated), and merges it with the arrays inside `apply`. Nothing is kept between calls,
so `jit`, `grad`, `vmap`, `scan` and `shard_map` can all transform `init` and `apply`.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from otmdr_jax.models.dropout import checked_keys
from otmdr_jax.models.layers import (
    BATCHNORM_MOMENTUM,
    Layers,
    at_least_float32,
)

Params = dict[str, Any]
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as two pure functions, `init` and `apply`; made by `models.create`.

    Two models with the same settings are equal and have the same hash, so a model can
    be a static argument of `jax.jit`.

    Attributes:
      name: The name given to `models.create`.
      num_classes: The number of logits.
      family: The NNX module's class.
      options: The family's options, as sorted pairs.
      dtype: The dtype of convolutions and activations.
      param_dtype: The dtype of the parameters.
      batchnorm_axis_name: Name of the axis that shares batch statistics, or None.
      remat: True if blocks are recomputed in the backward pass.
      dropout: The rate at which activations are dropped, in [0, 1).
      input_size: The side in pixels that images are resized to; None leaves them.
    """

    name: str
    num_classes: int
    family: type[nnx.Module]
    options: tuple[tuple[str, Hashable], ...] = ()
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    param_dtype: jnp.dtype = jnp.dtype(jnp.float32)
    batchnorm_axis_name: str | None = None
    remat: bool = False
    dropout: float = 0.0
    input_size: int | None = None

    @property
    def batchnorm_momentum(self) -> float:
        """The share of the old statistics in BatchNorm's new running ones."""
        return BATCHNORM_MOMENTUM

    def module_fn(self, in_channels: int, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the NNX module itself, for users of Flax.

        Args:
          in_channels: The number of channels of the images, 1 for grey and 3 for
            colour.
          rngs: Random streams, of which `params` is used.

        Returns:
          The module; call it as `module(images, train=..., keys=None)`. Without keys
          nothing is dropped.

        Example:
          >>> from flax import nnx
          >>> from otmdr_jax import models
          >>> model = models.create("cnn_small", num_classes=10)
          >>> module = nnx.eval_shape(lambda: model.module_fn(1, nnx.Rngs(0)))
          >>> module.head.kernel.shape
          (32, 10)
        """
        layers = Layers(
            rngs,
            self.dtype,
            self.param_dtype,
            self.batchnorm_axis_name,
            self.remat,
            self.dropout,
        )
        family: Any = self.family
        return family(layers, in_channels, self.num_classes, **dict(self.options))

    def init(
        self, key: jax.Array, example_images: ArrayLike | jax.ShapeDtypeStruct
    ) -> tuple[Params, State]:
        """Draws initial parameters and fresh BatchNorm statistics.

        Args:
          key: A PRNG key; the same key gives the same parameters.
          example_images: (B, H, W, C); only the shape is read, so a
            `jax.ShapeDtypeStruct` will do. C fixes the network's input channels.

        Returns:
          `(params, state)`: nested dicts of arrays; `state` is float32 even where
            `dtype` or `param_dtype` is narrower.

        Raises:
          ValueError: The images are not of rank 4.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from otmdr_jax import models
          >>> model = models.create("cnn_small", num_classes=10)
          >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
          >>> params["conv1"]["kernel"].shape, state["norm1"]["mean"].shape
          ((3, 3, 1, 16), (16,))
        """
        return _init(self, _channels(example_images), key)

    def apply(
        self,
        params: Params,
        state: State,
        images: ArrayLike,
        *,
        train: bool,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """Computes logits, and the BatchNorm statistics after this batch.

        Args:
          params: The parameters, as `init` returns them.
          state: The BatchNorm statistics, as `init` or the previous call returned them.
          images: (B, H, W, C), normalised; cast to the model's `dtype`.
          train: True normalises by the batch and moves the running statistics to
            0.9 * old + 0.1 * batch; False normalises by the running statistics.
          keys: PRNG keys of dropout, typed or raw: one for each example, (B,), such as
            `jax.random.split(key, B)`, or a single one, which gives all examples one
            mask. An example's mask depends only on its key, so cut the keys along with
            the batch. Training needs them; with `train=False`, None drops nothing. A
            network without dropout ignores them.

        Returns:
          `(logits, state)`: logits (B, num_classes) in float32. No gradient flows
          through the new state; with `train=False` it is the one that came in.

        Raises:
          ValueError: The images are not of rank 4, `params` or `state` are not of this
            network, or keys are missing or have another shape.
          TypeError: `train` is traced, or `keys` are not PRNG keys.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from otmdr_jax import models
          >>> model = models.create("cnn_small", num_classes=10)
          >>> images = jnp.ones((2, 8, 8, 1))
          >>> params, state = model.init(jax.random.key(0), images)
          >>> logits, _ = model.apply(params, state, images, train=False)
          >>> logits.shape, str(logits.dtype)
          ((2, 10), 'float32')
          >>> drops = models.create("cnn_small", num_classes=10, dropout=0.1)
          >>> keys = jax.random.split(jax.random.key(1), 2)
          >>> logits, _ = drops.apply(params, state, images, train=True, keys=keys)
        """
        if not isinstance(train, bool | np.bool_):
            raise TypeError(
                "train must be True or False when traced, since it chooses the code; "
                f"got {train!r}. Under jax.jit, name it in static_argnames."
            )
        graph, param_shapes, state_shapes = _skeleton(self, _channels(images))
        if not self.dropout:
            keys = None
        elif keys is not None:
            keys = checked_keys(keys, np.shape(images)[0])
        elif train:
            raise ValueError(
                f"{self.name!r} with dropout={self.dropout} needs keys to train: pass "
                "keys=jax.random.split(key, B), one for each of the B examples, from a "
                "fresh key each step."
            )
        _check_fits("params", params, param_shapes, self)
        _check_fits("state", state, state_shapes, self)
        module = nnx.merge(graph, params, state, copy=True)
        images = jnp.asarray(images, self.dtype)
        if self.input_size is not None:
            shape = (images.shape[0], self.input_size, self.input_size, images.shape[3])
            images = jax.image.resize(images, shape, "bilinear")
        logits = module(images, train=bool(train), keys=keys)
        if not train:
            return logits, state
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def parameter_count(model: Model, image_shape: tuple[int, ...]) -> int:
    """Counts the trainable parameters without allocating any.

    Args:
      model: A model from `models.create`.
      image_shape: (H, W, C), or (B, H, W, C).

    Returns:
      The number of entries of all leaves of `params`; BatchNorm's running statistics
      are not among them.

    Raises:
      ValueError: The shape has another rank.

    Example:
      >>> from otmdr_jax import models
      >>> model = models.create("wide_resnet_28_10", num_classes=10)
      >>> models.parameter_count(model, (32, 32, 3))
      36479194
    """
    if len(image_shape) not in (3, 4):
        raise ValueError(
            "image_shape must be (height, width, channels), with or without a leading "
            f"batch axis, got {image_shape}."
        )
    _, params, _ = _skeleton(model, image_shape[-1])
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(model: Model, channels: int, key: jax.Array) -> tuple[Params, State]:
    # Compiled, since NNX would dispatch thousands of kernels layer by layer.
    module = model.module_fn(channels, nnx.Rngs(params=key))
    _, *trees = nnx.split(module, nnx.Param, nnx.BatchStat)
    params, state = map(nnx.to_pure_dict, trees)
    # As wide as BatchNorm computes, so that an update keeps the dtype, as in a scan.
    return params, optax.tree.cast(state, at_least_float32(model.dtype))


# A cache of a pure function of static values: building a deep network's graph takes
# as long as tracing it.
@functools.lru_cache(maxsize=128)
def _skeleton(model: Model, channels: int) -> tuple[nnx.GraphDef, Params, State]:
    """Returns the network's static graph and the shapes of its params and state."""
    module = nnx.eval_shape(lambda: model.module_fn(channels, nnx.Rngs(params=0)))
    graph, *trees = nnx.split(module, nnx.Param, nnx.BatchStat)
    params, state = map(nnx.to_pure_dict, trees)
    return graph, params, state


def _channels(images: Any) -> int:
    shape = np.shape(images)
    if len(shape) != 4:
        raise ValueError(
            f"images must be of shape (batch, height, width, channels), got {shape}. "
            "Add the missing axis, for example images[..., None] for grey images."
        )
    return shape[-1]


def _check_fits(what: str, tree: Any, expected: Any, model: Model) -> None:
    """Raises unless a tree has the leaves, with the shapes, that the model expects."""
    leaves = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    if structure != jax.tree.structure(expected):
        raise ValueError(
            f"{what} must be the nested dict that init of this model ({model.name!r}) "
            f"returns, got {structure}. Check that they come from a model of the same "
            "name and options, and that params and state are passed in this order."
        )
    for (path, leaf), got in zip(
        jax.tree.leaves_with_path(expected), leaves, strict=True
    ):
        if np.shape(got) != leaf.shape:
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} must be of shape {leaf.shape} for "
                f"{model.name!r} with {model.num_classes} classes and images of these "
                f"channels, got {np.shape(got)}. If they are stacked (members, "
                "particles), call apply under jax.vmap."
            )
