"""The runs behind each table and figure of the paper, at three scales.

"paper" is the paper's setting. "small" is a miniature that two processor cores train in
hours: the same families of networks at small width on a tenth of the training images,
without augmentation. "smoke" runs every cell in minutes, to see that it runs.
"""

import dataclasses
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from otmdr_jax.experiments import config as config_lib
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.reproduce.printed import (
    BAYESIAN,
    CIFARS,
    FIVE,
    MIXED,
    NETWORKS,
    THREE,
    Key,
    Number,
    numbers,
)

VARIANTS = ("paper", "released")


class Target(NamedTuple):
    """A table or a figure.

    Attributes:
      title: What it shows.
      metrics: The metrics of its columns, by their names in a run's result.
      calibrated: Whether these are at the optimal temperature (appendix B.2).
      note: What one must know to compare with the paper's numbers.
      ours: The row that it is about.
      claims: What the paper says of that row in words, beside other rows: "higher" or
        "lower", by metric.
    """

    title: str
    metrics: tuple[str, ...]
    calibrated: bool = False
    note: str = ""
    ours: str = "OT-MDR"
    claims: Mapping[str, str] = types.MappingProxyType({})


TARGETS = {
    "table1": Target("Table 1: one network, one particle", ("accuracy",)),
    "table2": Target(
        "Table 2: ResNet-18 at 224 x 224",
        ("accuracy", "misclassification_auroc", "ovr_auroc"),
        note="The paper prints one AUROC. Its baselines' are those of bSAM's paper, "
        "where it is that of errors; 0.99 for OT-MDR is typical of one class against "
        "the rest. Both are given. The paper takes its baselines from there too.",
    ),
    "table3": Target(
        "Table 3: ensembles",
        ("accuracy", "brier", "nll", "ece", "aac"),
        calibrated=True,
        note="At the optimal temperature, fitted on the other half of the test set. "
        "Deep Ensemble's members see batches of their own, SGD's the same batches. "
        "Rows whose printed numbers are not certain have none (docs/reproduction.md).",
    ),
    "table4": Target(
        "Table 4: a Gaussian over the weights", ("accuracy", "nll", "ece")
    ),
    "table5": Target(
        "Table 5: seconds per epoch",
        ("seconds_per_epoch",),
        note="The paper's device is not known here: compare the methods' ratio.",
    ),
    "figure1": Target(
        "Figure 1: particles",
        ("accuracy",),
        note="The paper prints no numbers. It says that two particles are better than "
        "one, and that more are worse.",
        ours="K = 2",
        claims={"accuracy": "higher"},
    ),
    "figure2": Target(
        "Figure 2: the loss around ensembles",
        ("accuracy", "nll", "sharpness"),
        note="The paper prints no numbers. Its picture is of CIFAR-100; it says that "
        "OT-MDR's ensembles lie lower and flatter. Sharpness is how much a step of "
        "length 0.05 along a member's gradient raises its training loss, the mean over "
        "members.",
        claims={"nll": "lower", "sharpness": "lower"},
    ),
}


class Scale(NamedTuple):
    """How large the runs are.

    Attributes:
      seeds: The seeds of each cell.
      epochs: The share of the paper's epochs.
      ensemble_epochs: The same of ensembles, which take several times as long.
      options: Options of all runs.
      networks: The paper's networks -> options of those that take their places.
    """

    seeds: tuple[int, ...]
    epochs: float
    ensemble_epochs: float
    options: dict[str, Any]
    networks: dict[str, dict[str, Any]]


_SIDE = {"stem": "imagenet", "input_size": 224}
_SMALL: dict[str, dict[str, Any]] = {
    "wide_resnet_28_10": {"model": "wide_resnet_10_1"},
    "wide_resnet_34_10": {"model": "wide_resnet_16_1"},
    "pyramidnet_101": {"model": "pyramidnet_11_a12"},
    "densenet_121": {"model": "densenet_21", "width": 0.5},
    "resnet_10": {"model": "resnet_10", "width": 0.125},
    "resnet_18": {"model": "resnet_18", "width": 0.125},
    "mixed": {"members": "resnet_18,mobilenet,efficientnet_b0", "width": 0.125},
    "224": {"model": "resnet_18", "width": 0.125, "stem": "imagenet", "input_size": 64},
}
_TINY = {"model": "cnn_small"}
# The batches need not suit the machine: one device.
_ONE = {"mesh": "data=1"}
_SMOKE: dict[str, dict[str, Any]] = {
    **dict.fromkeys((*NETWORKS, *BAYESIAN, "wide_resnet_34_10"), _TINY),
    "mixed": {"members": "cnn_small,wide_resnet_10_1"},
    "224": {**_TINY, "input_size": 16},
}
SCALES = {
    "paper": Scale(
        (0, 1, 2),
        1.0,
        1.0,
        {},
        {
            **{name: {"model": name} for name in (*NETWORKS, *BAYESIAN)},
            "wide_resnet_34_10": {"model": "wide_resnet_34_10"},
            "mixed": {"members": "resnet_18,mobilenet,efficientnet_b0"},
            "224": {"model": "resnet_18", **_SIDE},
        },
    ),
    "small": Scale(
        (0, 1, 2),
        0.1,
        0.05,
        # Smaller batches, so that 20 epochs of a tenth of the images are 1,560 steps.
        # Without augmentation the networks fit the images in so few.
        {
            "train_examples": 5_000,
            "test_examples": 2_000,
            "batch_size": 64,
            "augment": (),
            **_ONE,
        },
        _SMALL,
    ),
    "smoke": Scale(
        (0, 1),
        0.0,
        0.0,
        {"train_examples": 320, "test_examples": 100, "batch_size": 32, **_ONE},
        _SMOKE,
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table: runs of one configuration over the scale's seeds.

    Attributes:
      part: The paper's network or ensemble.
      data: The paper's data set.
      method: The row.
      config: The options of the runs, whatever the seed.
      printed: The paper's numbers, by metric.
      seeds: The seeds.
      kind: What tells its runs from those of another target with the same key.
    """

    part: str
    data: str
    method: str
    config: TrainConfig
    printed: dict[str, Number]
    seeds: tuple[int, ...]
    kind: str = ""

    @property
    def name(self) -> str:
        """The name of its runs' folder; the same where two targets share runs."""
        words = f"{self.data}-{self.part}-{self.method}{self.kind}"
        return re.sub(r"[^\w.=-]+", "-", words)


def cells(
    target: str,
    scale: str = "paper",
    variant: str = "paper",
    *,
    datasets: Sequence[str] = CIFARS,
    data_dir: str | None = None,
) -> list[Cell]:
    """The cells of a table or figure.

    Args:
      target: A name in `TARGETS`.
      scale: A name in `SCALES`.
      variant: "paper", its text; or "released", its published code: the merged second
        step without noise, smoothed labels, a step schedule for SAM, the deeper network
        that it calls WideResNet28x10, and a joint loss for ensembles of OT-MDR.
      datasets: The paper's data sets among "cifar10" and "cifar100". "smoke" trains on
        scikit-learn's digits, whatever these are.
      data_dir: Folder of prepared TFDS data.

    Returns:
      The :class:`Cell` s, in the paper's order.

    Raises:
      ValueError: An unknown name, or a data set that the target does not have.

    Example:
      >>> [cell.method for cell in cells("table2", datasets=["cifar10"])]
      ['SGD', 'SAM', 'bSAM', 'OT-MDR']
      >>> cells("table4")[1].config.method.name
      'otmdr-bnn'
    """
    for name, value, known in (
        ("target", target, tuple(TARGETS)),
        ("scale", scale, tuple(SCALES)),
        ("variant", variant, VARIANTS),
        *(("datasets", data, CIFARS) for data in datasets),
    ):
        if value not in known:
            raise ValueError(
                f"{name} must be of {', '.join(map(repr, known))}; got {value!r}."
            )
    if target == "table5" and "cifar10" not in datasets:
        raise ValueError("table5 is of cifar10: leave datasets out.")
    printed, size = numbers(target), SCALES[scale]
    found = []
    for key, config in _of_paper(target, variant, tuple(datasets)):
        own = _scaled(config, key, size, target, scale)
        shown = _shown(printed.get(key, {}))
        if scale != "smoke":
            own = own.replace(data_dir=data_dir)
        # The seconds of an epoch need no more than one.
        kind = {"table2": "-224", "table4": "-posterior", "table5": "-timed"}
        place = (key.part, key.data, key.method)
        found.append(Cell(*place, own, shown, size.seeds, kind.get(target, "")))
    return found


def _shown(printed: dict[str, Number]) -> dict[str, Number]:
    """The paper's AUROC stands beside both that it may be."""
    if "auroc" not in printed:
        return printed
    value = printed["auroc"]
    rest = {name: number for name, number in printed.items() if name != "auroc"}
    return rest | {"misclassification_auroc": value, "ovr_auroc": value}


def _of_paper(target, variant, datasets):
    """(key, options at the paper's scale but for the network) of each cell."""
    if target in ("table1", "table5"):
        epochs = {"epochs": 1} if target == "table5" else {}
        for data in datasets if target == "table1" else ("cifar10",):
            for network in NETWORKS:
                for method in ("SAM", "OT-MDR"):
                    config = _single(method, data, variant).replace(**epochs)
                    yield Key(network, data, method), config
    elif target == "table2":
        for data in datasets:
            for method in ("SGD", "SAM", "bSAM", "OT-MDR"):
                yield Key("resnet_18", data, method), _single(method, data, variant)
    elif target in ("table3", "figure2"):
        both = ("SAM", "OT-MDR")
        for part in (FIVE, THREE, MIXED):
            for data in datasets:
                for method, make in _ENSEMBLES.items():
                    if part == MIXED and method in ("Fast Geometric", "Snapshot"):
                        continue
                    if part == MIXED and method == "EDST":
                        continue
                    if target == "figure2" and method not in both:
                        continue
                    yield Key(part, data, method), make(part, data, variant)
    elif target == "table4":
        for data in datasets:
            for network in BAYESIAN:
                for method in ("SGVB", "OT-MDR"):
                    yield Key(network, data, method), _bayesian(method, data, variant)
    else:
        for data in datasets:
            for k in (1, 2, 3, 4):
                config = config_lib.preset(f"{variant}-{data}", k).replace(epochs=100)
                yield Key(NETWORKS[0], data, f"K = {k}"), config


def _single(method: str, data: str, variant: str) -> TrainConfig:
    """A row of Tables 1, 2 and 5."""
    if method == "bSAM":
        return config_lib.preset(f"bsam-{data}")
    if method == "OT-MDR":
        return config_lib.preset(f"{variant}-{data}")
    config = config_lib.preset(f"sam-{data}")
    if method == "SGD":
        config = TrainConfig(method="sgd", data=data, epochs=200)
    return _as_released(config) if variant == "released" else config


def _bayesian(method: str, data: str, variant: str) -> TrainConfig:
    """A row of Table 4; the released networks and batches are those of both rows."""
    if method == "OT-MDR":
        return config_lib.preset(f"{variant}-bnn-{data}")
    config = config_lib.preset(f"sgvb-{data}")
    if variant == "paper":
        return config
    return config.replace(
        batch_size=1024, activation="softplus", posterior_init="released"
    )


def _as_released(config: TrainConfig) -> TrainConfig:
    """What the published commands for SAM and SGD have beside the paper's text."""
    model = config.model.name
    return config.replace(
        # What the code calls WideResNet28x10 has five blocks a stage.
        model="wide_resnet_34_10" if model == NETWORKS[0] else model,
        schedule="step",
        label_smoothing=0.1,
        smoothing="others",
    )


def _ensemble(name: str, **options: Any) -> Callable[..., TrainConfig]:
    """Members by one of the presets; in the released code on a joint loss."""

    def make(part: str, data: str, variant: str) -> TrainConfig:
        del part
        config = config_lib.preset(f"{name}-{data}").replace(**options)
        if variant == "paper":
            return config
        config = config.replace(label_smoothing=0.1, smoothing="others")
        joint = config.model.member_data == "shared"
        return config.replace(ensemble="joint") if joint else config

    return make


def _competitor(
    name: str, **number: Callable[[int], Any]
) -> Callable[..., TrainConfig]:
    """A competitor with the epochs and the rate of all (caption of Table 3).

    `number` makes the option that says how many members there are.
    """

    def make(part: str, data: str, variant: str) -> TrainConfig:
        del variant
        members = 5 if part == FIVE else 3
        own = {option: of(members) for option, of in number.items()}
        config = config_lib.preset(f"{name}-{data}")
        return config.replace(epochs=200, learning_rate=0.1, **own)

    return make


def _otmdr(part: str, data: str, variant: str) -> TrainConfig:
    del part
    if variant == "released":
        return config_lib.preset(f"released-ensemble-{data}")
    return config_lib.preset(f"otmdr-ensemble-{data}")


_ENSEMBLES: dict[str, Callable[..., TrainConfig]] = {
    "Deep Ensemble": _ensemble("deep-ensemble", member_data="own"),
    # The last fifth of the run, in as many cycles as there are members.
    "Fast Geometric": _competitor("fge", cycle_epochs=lambda count: 40 / count),
    "Snapshot": _competitor("snapshot", cycles=lambda count: count),
    "EDST": _competitor("edst", tickets=lambda count: count),
    "DST": _competitor("dst", members=str),
    "SGD": _ensemble("deep-ensemble"),
    "SAM": _ensemble("sam-ensemble"),
    "OT-MDR": _otmdr,
}


def _scaled(
    config: TrainConfig, key: Key, size: Scale, target: str, scale: str
) -> TrainConfig:
    """The options at a scale: networks, lengths and data."""
    if key.part == MIXED:
        network = dict(size.networks["mixed"])
        config = config.replace(model="cnn_small")
    elif target == "table2":
        network = dict(size.networks["224"])
    else:
        name = key.part.split()[-1]
        if name == NETWORKS[0]:  # the deeper one of the released code
            name = config.model.name
        network = dict(size.networks[name])
        if config.model.members is not None:
            network["members"] = {FIVE: "5", THREE: "3"}[key.part]
    options: dict[str, Any] = {**network, **size.options}
    if scale != "paper":
        of_ensembles = target in ("table3", "figure2")
        share = size.ensemble_epochs if of_ensembles else size.epochs
        epochs = max(round(config.run.epochs * share), 1)
        options |= {"epochs": epochs, "eval_every": epochs, "log_every": 50}
        if config.schedule.warmup_epochs:
            options["warmup_epochs"] = config.schedule.warmup_epochs * share
        if config.method.name == "fge":
            options["cycle_epochs"] = config.flat()["cycle_epochs"] * share or 0.1
        if config.method.name == "bsam":
            # Its prior and its posterior are those of as many examples as there are.
            options["weight_decay"] = 10 / (4.0 * size.options["train_examples"])
            # Its eight would leave BatchNorm eight images of 64.
            options["num_subbatches"] = 2
        if config.schedule.name == "plateau":
            patience = round(config.schedule.plateau_patience * share)
            options["plateau_patience"] = max(patience, 1)
        if config.optimizer.name == "adam":
            options["adam_eps"] = 1e-8 / size.options["train_examples"]
    if scale == "smoke":
        options |= {"data": "digits", "activation": "relu"}
    return config.replace(**options)
