"""The numbers that the paper prints: Tables 1 to 5 of Nguyen et al., 2023.

Figures 1 and 2 are pictures without numbers.
"""

from collections.abc import Iterator
from typing import NamedTuple

CIFARS = ("cifar10", "cifar100")
NETWORKS = ("wide_resnet_28_10", "pyramidnet_101", "densenet_121")
BAYESIAN = ("resnet_10", "resnet_18")
# The three kinds of ensembles of Table 3.
FIVE, THREE, MIXED = (
    "five resnet_10",
    "three resnet_18",
    "resnet_18, mobilenet, efficientnet_b0",
)
_ENSEMBLE = ("accuracy", "brier", "nll", "ece", "aac")

# Accuracy in percent, deviations after a colon, "-" where the paper prints none.
_TABLE_1 = """
cifar10  | SAM    | 96.72:0.007 96.20:0.134 91.16:0.240
cifar10  | OT-MDR | 96.97:0.009 96.61:0.063 91.44:0.113
cifar100 | SAM    | 82.69:0.035 81.26:0.636 68.09:0.403
cifar100 | OT-MDR | 84.14:0.172 82.28:0.183 69.84:0.176
"""
_TABLE_2 = """
SGD    | 94.76:0.11 0.926:0.006 76.54:0.26 0.869:0.003
SAM    | 95.72:0.14 0.949:0.003 78.74:0.19 0.887:0.003
bSAM   | 96.15:0.08 0.954:0.001 80.22:0.28 0.892:0.003
OT-MDR | 96.59:0.07 0.992:0.004 81.23:0.13 0.991:0.001
"""
# Of the first two blocks the text at hand has eight names and seven rows of numbers: a
# row is lost, and which name each of the others belongs to is not certain. Only the
# first two rows, and the last one of the second block, are.
_TABLE_3 = {
    FIVE: """
Deep Ensemble  | 92.7 0.091 0.272 0.072 0.108 73.7 0.329 0.870 0.145 0.162
Fast Geometric | 92.5 0.251 0.531 0.121 0.144 63.2 0.606 1.723 0.149 0.162
""",
    THREE: """
Deep Ensemble  | 93.7 0.079 0.273 0.064 0.107 75.4 0.308 0.822 0.140 0.155
Fast Geometric | 93.3 0.087 0.261 0.068 0.108 72.3 0.344 0.950 0.150 0.169
OT-MDR         | 96.2 0.059 0.134 0.018 0.005 81.0 0.268 0.693 0.045 0.045
""",
    MIXED: """
Deep Ensemble | 89.0 0.153 0.395 0.111 0.126 62.7 0.433 1.267 0.176 0.209
DST           | 93.4 0.102 0.282 0.070 0.109 71.7 0.393 1.066 0.148 0.187
SGD           | 92.6 0.113 0.317 - 0.112 72.6 0.403 1.192 - 0.201
SAM           | 93.8 0.094 0.280 0.060 0.110 76.4 0.347 1.005 0.142 0.177
OT-MDR        | 94.8 0.078 0.176 0.021 0.007 78.3 0.310 0.828 0.047 0.063
""",
}
_TABLE_4 = """
cifar10  | SGVB   | 80.52:2.10 0.78:0.23 0.23:0.06 86.74:1.25 0.54:0.01 0.18:0.02
cifar10  | OT-MDR | 81.26:0.06 0.81:0.12 0.26:0.08 87.55:0.14 0.52:0.01 0.17:0.01
cifar100 | SGVB   | 54.40:0.98 1.96:0.05 0.21:0.00 60.91:2.31 1.74:0.15 0.24:0.03
cifar100 | OT-MDR | 55.33:0.11 1.85:0.06 0.18:0.03 63.17:0.04 1.55:0.05 0.20:0.03
"""
_TABLE_5 = """
cifar10 | SAM    | 96 126 136
cifar10 | OT-MDR | 131 192 210
"""


class Number(NamedTuple):
    """A printed number.

    Attributes:
      mean: The number, as it is printed: accuracy in percent.
      std: The deviation that is printed after it, or None.
    """

    mean: float
    std: float | None = None


class Key(NamedTuple):
    """A cell's place: (network or ensemble, data set, method)."""

    part: str
    data: str
    method: str


def numbers(target: str) -> dict[Key, dict[str, Number]]:
    """The printed numbers of a table, by cell and metric.

    Args:
      target: "table1" to "table5"; of "figure1" and "figure2" there are none.

    Example:
      >>> numbers("table1")[Key("pyramidnet_101", "cifar10", "OT-MDR")]
      {'accuracy': Number(mean=96.61, std=0.063)}
    """
    found: dict[Key, dict[str, Number]] = {}
    for key, metric, number in _cells(target):
        if number != "-":
            mean, _, std = number.partition(":")
            cell = found.setdefault(key, {})
            cell[metric] = Number(float(mean), float(std) if std else None)
    return found


def _cells(target: str) -> Iterator[tuple[Key, str, str]]:
    if target in ("table1", "table5"):
        metric = "accuracy" if target == "table1" else "seconds_per_epoch"
        for (data, method), row in _rows(_TABLE_1 if target == "table1" else _TABLE_5):
            for network, number in zip(NETWORKS, row, strict=True):
                yield Key(network, data, method), metric, number
    elif target == "table2":
        columns = [(data, name) for data in CIFARS for name in ("accuracy", "auroc")]
        for (method,), row in _rows(_TABLE_2):
            for (data, metric), number in zip(columns, row, strict=True):
                yield Key("resnet_18", data, method), metric, number
    elif target == "table3":
        columns = [(data, name) for data in CIFARS for name in _ENSEMBLE]
        for part, text in _TABLE_3.items():
            for (method,), row in _rows(text):
                for (data, metric), number in zip(columns, row, strict=True):
                    yield Key(part, data, method), metric, number
    elif target == "table4":
        columns = [(n, name) for n in BAYESIAN for name in ("accuracy", "nll", "ece")]
        for (data, method), row in _rows(_TABLE_4):
            for (network, metric), number in zip(columns, row, strict=True):
                yield Key(network, data, method), metric, number


def _rows(text: str) -> Iterator[tuple[list[str], list[str]]]:
    for line in text.strip().splitlines():
        *head, row = (cell.strip() for cell in line.split("|"))
        yield head, row.split()
