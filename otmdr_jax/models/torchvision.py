"""Weights from checkpoints in torchvision's layout.

A parameter here and its tensor there have the same numbers in another order: kernels
are (height, width, in, out) and (out, in, height, width). Each family maps its modules'
names; PyTorch itself is not needed, any mapping of names to arrays will do.

Reference: https://github.com/pytorch/vision, `torchvision/models/resnet.py`,
`densenet.py` and `efficientnet.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax.models.base import Model, Params, State
from otmdr_jax.models.densenet import DenseNet
from otmdr_jax.models.efficientnet import EfficientNet
from otmdr_jax.models.resnet import ResNet

Path = tuple[str, ...]

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# The file of densenet121's published weights has "norm.1" where the module has "norm1";
# torchvision renames it while loading, as is done here.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def from_torchvision(
    model: Model, state_dict: Mapping[str, Any]
) -> tuple[Params, State]:
    """Converts a checkpoint in torchvision's layout into parameters and statistics.

    Args:
      model: A `resnet_10` or `resnet_18`, a `densenet_121`, or an `efficientnet_b0`
        with `stem="imagenet"`. Torchvision's own networks have the ImageNet stem and
        1000 classes. Normalise images as for the checkpoint; for torchvision's, RGB in
        [0, 1] with mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225).
      state_dict: A mapping of names to tensors or arrays, such as `module.state_dict()`
        or a loaded `.npz`. BatchNorm's `num_batches_tracked` is ignored, since running
        averages have a fixed momentum here, as in torchvision.

    Returns:
      `(params, state)` as `model.init` returns them, for images with the channels of
      the checkpoint's first convolution.

    Raises:
      ValueError: The family has no such layout, or a tensor is missing, is left over or
        has another shape.

    Example:
      >>> import jax, numpy as np
      >>> from otmdr_jax import models
      >>> model = models.create("resnet_18", num_classes=1000, stem="imagenet")
      >>> models.from_torchvision(model, {"conv1.weight": np.zeros((64, 3, 7, 7))})
      Traceback (most recent call last):
        ...
      ValueError: The checkpoint does not fit 'resnet_18' with 1000 classes. 101 tensors
      are missing: bn1.bias, bn1.running_mean, bn1.running_var, bn1.weight, fc.bias, ...
    """
    name_of = _naming(model)
    tensors = {
        _OLD_DENSENET.sub(r"\1\2", name): tensor
        for name, tensor in state_dict.items()
        if not name.endswith("num_batches_tracked")
    }
    channels = _input_channels(tensors, f"{name_of(('stem',))}.weight")
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    wanted = {
        _tensor_name(name_of, path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(shapes)
    }
    _check_names(model, wanted, tensors)

    problems = []

    def convert(path, leaf):
        name = _tensor_name(name_of, path)
        array = np.asarray(tensors[name])
        turned = _turn(array, len(leaf.shape))
        if turned.shape != leaf.shape:
            problems.append(
                f"{name} is {array.shape}, as {leaf.shape} in {path_of(path)}"
            )
            return None
        return jnp.asarray(turned, leaf.dtype)

    def path_of(path):
        return "/".join(entry.key for entry in path[1:])

    params, state = jax.tree.map_with_path(convert, shapes)
    if problems:
        raise ValueError(
            f"The checkpoint does not fit {model.name!r} with {model.num_classes} "
            f"classes: {_listed(problems, '; ')}. Create the model with the "
            "checkpoint's num_classes and stem."
        )
    return params, state


def classes_of(model: Model, state_dict: Mapping[str, Any]) -> int:
    """The number of classes of a checkpoint in torchvision's layout.

    Args:
      model: The network that it is of, as for :func:`from_torchvision`.
      state_dict: The checkpoint.

    Raises:
      ValueError: The family has no such layout, or there is no classifier.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import models
      >>> from otmdr_jax.models.torchvision import classes_of
      >>> model = models.create("resnet_18", num_classes=10, stem="imagenet")
      >>> classes_of(model, {"fc.weight": np.zeros((1000, 512))})
      1000
    """
    name = f"{_naming(model)(('head',))}.weight"
    if name not in state_dict:
        raise ValueError(
            f"The checkpoint does not fit {model.name!r}: it has no {name}, which is "
            f"its classifier, but {_listed(sorted(state_dict))}."
        )
    return int(np.shape(state_dict[name])[0])


def _turn(array: np.ndarray, rank: int) -> np.ndarray:
    """Orders a tensor's axes as here: (out, in, h, w) -> (h, w, in, out)."""
    if array.ndim == 4 and rank == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]  # a 1x1 convolution of pooled features
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T  # (out, in) -> (in, out); vectors stay


def _input_channels(tensors: Mapping[str, Any], name: str) -> int:
    shape: tuple[int, ...] = np.shape(tensors[name]) if name in tensors else ()
    return shape[1] if len(shape) == 4 else 3


def _tensor_name(name_of: Callable[[Path], str], path: tuple[Any, ...]) -> str:
    keys = [entry.key for entry in path[1:]]  # the first tells params from state
    return f"{name_of(tuple(keys[:-1]))}.{_LEAVES[keys[-1]]}"


def _check_names(
    model: Model, wanted: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    missing, extra = (
        sorted(wanted.keys() - tensors.keys()),
        sorted(tensors.keys() - wanted.keys()),
    )
    if not missing and not extra:
        return
    message = (
        f"The checkpoint does not fit {model.name!r} with {model.num_classes} classes."
    )
    if missing:
        message += f" {_count(missing)} missing: {_listed(missing)}."
    if extra:
        message += f" {_count(extra)} of no use here: {_listed(extra)}."
    raise ValueError(
        message + " The names must be those of torchvision's module, without a prefix "
        'such as "module."; check the model\'s name and stem.'
    )


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _listed(items: list[str], separator: str = ", ", most: int = 5) -> str:
    more = ["..."] if len(items) > most else []
    return separator.join([*items[:most], *more])


# --- the families' names ------------------------------------------------------------


def _naming(model: Model) -> Callable[[Path], str]:
    """Returns the function from a module's path here to its name in torchvision."""
    family: Any = model.family
    stem = dict(model.options).get("stem")
    if family is ResNet:
        return _resnet_name
    if family is DenseNet:
        return _densenet_name
    if family is EfficientNet and stem == "imagenet":
        return _efficientnet_name
    raise ValueError(
        "from_torchvision knows the layouts of resnet_10, resnet_18, densenet_121 and "
        f'efficientnet_b0 with stem="imagenet", got {model.name!r} with {stem=}.'
    )


def _resnet_name(path: Path) -> str:
    top = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
    parts = {
        "conv1": "conv1",
        "norm1": "bn1",
        "conv2": "conv2",
        "norm2": "bn2",
        "shortcut": "downsample.0",
        "shortcut_norm": "downsample.1",
    }
    if len(path) == 1:
        return top[path[0]]
    stage, block = _numbers(path[0])
    return f"layer{stage}.{block - 1}.{parts[path[1]]}"


def _densenet_name(path: Path) -> str:
    top = {
        "stem": "features.conv0",
        "stem_norm": "features.norm0",
        "norm": "features.norm5",
        "head": "classifier",
    }
    if len(path) == 1:
        return top[path[0]]
    if path[0].startswith("transition"):
        return f"features.{path[0]}.{path[1]}"
    stage, layer = _numbers(path[0])
    return f"features.denseblock{stage}.denselayer{layer}.{path[1]}"


def _efficientnet_name(path: Path) -> str:
    top = {
        "stem": "features.0.0",
        "stem_norm": "features.0.1",
        "last": "features.8.0",
        "last_norm": "features.8.1",
        "head": "classifier.1",
    }
    if len(path) == 1:
        return top[path[0]]
    stage, block = _numbers(path[0])
    # The first stage has no expansion, so that its modules count from one less.
    shift = 0 if stage > 1 else 1
    parts = {
        "expand": "0.0",
        "expand_norm": "0.1",
        "depthwise": f"{1 - shift}.0",
        "depthwise_norm": f"{1 - shift}.1",
        "excite": f"{2 - shift}",
        "project": f"{3 - shift}.0",
        "project_norm": f"{3 - shift}.1",
    }
    name = f"features.{stage}.{block - 1}.block.{parts[path[1]]}"
    return name + {"reduce": ".fc1", "expand": ".fc2"}[path[2]] if path[2:] else name


def _numbers(name: str) -> tuple[int, int]:
    stage, index = map(int, re.findall(r"\d+", name))
    return stage, index
