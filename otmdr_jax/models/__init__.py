"""The model zoo: the paper's networks in Flax NNX behind a functional face.

`create` turns a name into a `Model`, whose `init` and `apply` are pure functions of
nested dicts of arrays: what every transformation of this package and of JAX expects.

    model = models.create("wide_resnet_28_10", num_classes=10, dtype=jnp.bfloat16)
    params, state = model.init(key, example_images)
    logits, state = model.apply(params, state, images, train=True)

`params` are trained; `state` holds BatchNorm's running statistics.
"""

import difflib
import inspect
import re
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from otmdr_jax.io import extras

try:
    import flax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flax":  # Flax is there, but something that it needs is not
        raise
    raise ImportError(
        "otmdr_jax.models builds its networks with Flax, which is not installed. "
        + extras.command("models")
    ) from error

from otmdr_jax.core.checks import check_count, check_number
from otmdr_jax.models.base import Model, parameter_count
from otmdr_jax.models.cnn import SmallCNN
from otmdr_jax.models.counting import output_positions
from otmdr_jax.models.densenet import DenseNet
from otmdr_jax.models.efficientnet import EfficientNet
from otmdr_jax.models.mobilenet import MobileNet
from otmdr_jax.models.own import adapt
from otmdr_jax.models.pyramidnet import PyramidNet
from otmdr_jax.models.resnet import ResNet
from otmdr_jax.models.torchvision import from_torchvision
from otmdr_jax.models.wide_resnet import WideResNet

__all__ = [
    "Model",
    "adapt",
    "create",
    "from_torchvision",
    "names",
    "output_positions",
    "parameter_count",
]

# A name -> its family, and the options that the name fixes.
_REGISTRY: dict[str, tuple[Any, dict[str, Any]]] = {
    "cnn_small": (SmallCNN, {}),
    "densenet_121": (DenseNet, {"stage_sizes": (6, 12, 24, 16), "growth": 32}),
    "efficientnet_b0": (EfficientNet, {"stage_sizes": (1, 2, 2, 3, 3, 4, 1)}),
    "mobilenet": (MobileNet, {}),
    "pyramidnet_101": (PyramidNet, {"depth": 101, "alpha": 64}),
    "resnet_10": (ResNet, {"stage_sizes": (1, 1, 1, 1)}),
    "resnet_18": (ResNet, {"stage_sizes": (2, 2, 2, 2)}),
    "wide_resnet_28_10": (WideResNet, {"depth": 28, "width": 10}),
    "wide_resnet_34_10": (WideResNet, {"depth": 34, "width": 10}),
}


def _equal_stages(depth: int) -> dict[str, Any]:
    """Four stages of n layers of two convolutions, three transitions, stem and head."""
    if depth % 8 != 5 or depth < 13:
        raise ValueError(
            "A dense network's depth must be 8n + 5 (13, 21, 29, ...), four stages of "
            f"n layers, or 121; got {depth=}."
        )
    return {"stage_sizes": (depth // 8,) * 4, "growth": 32}


# Names with numbers in them -> the family, and the options that the numbers are.
_PATTERNS: tuple[tuple[re.Pattern[str], Any, Any], ...] = (
    (
        re.compile(r"wide_resnet_(\d+)_(\d+)"),
        WideResNet,
        lambda depth, width: {"depth": depth, "width": width},
    ),
    (
        re.compile(r"pyramidnet_(\d+)_a(\d+)"),
        PyramidNet,
        lambda depth, alpha: {"depth": depth, "alpha": alpha},
    ),
    (re.compile(r"densenet_(\d+)"), DenseNet, _equal_stages),
)


def names() -> tuple[str, ...]:
    """Lists the registered models.

    Any other `wide_resnet_<depth>_<width>` with depth = 6n + 4,
    `pyramidnet_<depth>_a<alpha>` with depth = 9n + 2 and `densenet_<depth>` with
    depth = 8n + 5 (four stages of n layers) can be created too.

    Returns:
      The names, sorted; `create` takes each of them.

    Example:
      >>> from otmdr_jax import models
      >>> "resnet_18" in models.names()
      True
    """
    return tuple(sorted(_REGISTRY))


def create(
    name: str,
    num_classes: int,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    batchnorm_axis_name: str | None = None,
    remat: bool = False,
    dropout: float = 0.0,
    input_size: int | None = None,
    **options: Any,
) -> Model:
    """Creates a model by name; allocates nothing until `Model.init`.

    Args:
      name: A name in `names()`, or `wide_resnet_<depth>_<width>` with depth = 6n + 4,
        or `pyramidnet_<depth>_a<alpha>` with depth = 9n + 2, or `densenet_<depth>` with
        depth = 8n + 5.
      num_classes: The number of logits, at least 2.
      dtype: The dtype of convolutions and activations. `jnp.bfloat16` halves their
        memory and uses the matrix units of GPUs and TPUs. BatchNorm, the pooled
        features and the logits stay in float32, since rounding them would cost accuracy
        and calibration.
      param_dtype: The dtype of the parameters. Keep float32 for training: bfloat16
        loses an update of a thousandth of a weight.
      batchnorm_axis_name: Name of a mapped axis (of `pmap`, `shard_map` or `vmap`) over
        which BatchNorm shares its batch statistics; None keeps them per device.
      remat: True to recompute activations in the backward pass instead of keeping them:
        those of each block, of each layer of a dense network, or of each convolution
        with its BatchNorm and ReLU in `cnn_small`. Parameters, outputs, gradients and
        statistics are the same up to rounding. A gradient takes about a third more
        operations and, in a deep network, a fraction of the memory. On CPUs XLA undoes
        it, unless `XLA_FLAGS` has `--xla_disable_hlo_passes=cse_barrier_expander`: that
        pass removes the barriers that keep the second computation from being merged
        with the first.
      dropout: The share of activations that are set to 0 at random, in [0, 1); the
        others are divided by 1 - dropout. Parameters and initial weights do not depend
        on it. The WideResNet paper has 0.3 for CIFAR, DenseNet's and EfficientNet-B0
        0.2. Activations are dropped before the second convolution of a block (wide and
        other residual networks; before each but the first in a pyramidal one and in
        `cnn_small`), after each convolution but the stem (densely connected), or before
        the classifier (MobileNet, EfficientNet). To train, `apply` then needs keys.
      input_size: The side in pixels that images are resized to before the first layer,
        bilinearly (antialiased where they shrink); None leaves them as they are. So a
        set of 32 x 32 pixels trains a network at 224 x 224 without being stored so.
      **options: Options of the family. `stem` is "cifar" (3x3, stride 1) or "imagenet"
        (stride 2; 7x7 and a max-pool, but in `efficientnet_b0` 3x3 and 1280 features
        before the classifier). `resnet_10`, `resnet_18` and `efficientnet_b0` default
        to "cifar"; `densenet_121` to "imagenet", as in the paper's table. `activation`
        of `resnet_10` and `resnet_18` is "relu" or "softplus" (the released code's
        Bayesian networks). `width` multiplies the channels of every layer but the last
        (of densely connected ones the growth) of `resnet_10`, `resnet_18`,
        `densenet_<depth>`, `mobilenet` and `efficientnet_b0`: a quarter makes a network
        of a sixteenth of the operations. Default 1. The other names say the width.

    Returns:
      A frozen, hashable `Model`.

    Raises:
      ValueError: The name, `num_classes` or an option's value is not valid.
      TypeError: The family has no such option, a dtype is not floating, `remat` is not
        a bool, or `dropout` not a number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import models
      >>> model = models.create("cnn_small", num_classes=10)
      >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> images = jnp.zeros((2, 8, 8, 1))
      >>> logits, state = model.apply(params, state, images, train=True)
      >>> logits.shape
      (2, 10)
      >>> lean = models.create("cnn_small", num_classes=10, remat=True)
      >>> again, _ = lean.apply(params, state, images, train=True)
      >>> again.shape
      (2, 10)

    Reference:
      Recomputation: Chen et al., `Training deep nets with sublinear memory cost
      <https://arxiv.org/abs/1604.06174>`_, 2016.
      Each family's module cites its architecture's source.
    """
    check_count("num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(
            f"num_classes must be at least 2, got {num_classes}. A binary classifier "
            "has two logits here."
        )
    if input_size is not None:
        check_count("input_size", input_size)
    if not isinstance(remat, bool):
        raise TypeError(f"remat must be True or False, got {remat!r}.")
    family, fixed = _lookup(name)
    _check_known(name, family, fixed, options)
    family.check(**fixed, **options)
    return Model(
        name=name,
        num_classes=int(num_classes),
        family=family,
        options=tuple(sorted({**fixed, **options}.items())),
        dtype=_check_floating("dtype", dtype),
        param_dtype=_check_floating("param_dtype", param_dtype),
        batchnorm_axis_name=batchnorm_axis_name,
        remat=remat,
        dropout=_check_rate(dropout),
        input_size=input_size if input_size is None else int(input_size),
    )


def _lookup(name: str) -> tuple[Any, dict[str, Any]]:
    """Returns the family and the options that a name stands for."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    for pattern, family, options in _PATTERNS:
        if match := pattern.fullmatch(name):
            return family, options(*map(int, match.groups()))
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    module, dot, own = name.rpartition(".")
    if dot and not close:
        hint = f" A network of your own is named {f'{module}:{own}'!r}."
    raise ValueError(
        f"Unknown model {name!r}.{hint} Known models: {', '.join(names())}, and any "
        "wide_resnet_<depth>_<width> with depth = 6n + 4, "
        "pyramidnet_<depth>_a<alpha> with depth = 9n + 2 or densenet_<depth> with "
        "depth = 8n + 5."
    )


def _check_known(
    name: str, family: Any, fixed: dict[str, Any], options: dict[str, Any]
) -> None:
    """Raises TypeError for an option that the family does not take."""
    parameters = inspect.signature(family.check).parameters
    known = [option for option in parameters if option not in fixed]
    for option in options:
        if option not in known:
            takes = f"the options: {', '.join(known)}" if known else "no options"
            raise TypeError(
                f"Model {name!r} has no option {option!r}. Beside dtype, param_dtype, "
                f"batchnorm_axis_name, remat, dropout and input_size it takes {takes}."
            )


def _check_rate(rate: Any) -> float:
    check_number("dropout", rate)
    if not rate < 1:
        raise ValueError(
            f"dropout must be in [0, 1), the share that is dropped, got {rate}."
        )
    return float(rate)


def _check_floating(argument: str, dtype: DTypeLike) -> jnp.dtype:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{argument} must be a floating dtype such as jnp.float32 or "
            f"jnp.bfloat16, got {dtype!r}."
        )
    return jnp.dtype(dtype)
