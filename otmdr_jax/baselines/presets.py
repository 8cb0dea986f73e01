"""Settings of the competitors in the paper's Table 3, close to their authors' commands.

The network is ResNet-10, as in the table's first part; pass `model="resnet_18"` and
`members="3"` for the second. Options that an entry leaves out keep the run's defaults.
"""

from typing import Any

# Ensembles of trained members by the names they go by -> each member's method.
ENSEMBLES = {"deep-ensemble": "sgd", "sam-ensemble": "sam", "otmdr-ensemble": "otmdr"}
MEMBERS = "5"  # those of the table's first part
# READMEs of gaohuang/SnapshotEnsemble (-nEpochs 200 -nCycles 5 -LR 0.2),
# timgaripov/dnn-mode-connectivity (160 + 40 epochs), wjmaddox/swa_gaussian and
# VITA-Group/FreeTickets (250 and 450 epochs; three members in their paper).
_COMPETITORS: dict[str, dict[str, Any]] = {
    "snapshot": {"method": "snapshot", "epochs": 200, "learning_rate": 0.2},
    "fge": {"method": "fge", "epochs": 200},
    # Each evaluation passes over the training set for BatchNorm: every 25 epochs.
    "swa": {"method": "swa", "epochs": 300, "eval_every": 25},
    "swag": {"method": "swag", "epochs": 300, "eval_every": 25},
    "dst": {"method": "dst", "epochs": 250, "members": "3"},
    "edst": {"method": "edst", "epochs": 450},
}
PRESETS = {
    name: {"method": method, "members": MEMBERS, "epochs": 200}
    for name, method in ENSEMBLES.items()
} | _COMPETITORS


def preset(version: str) -> dict[str, Any]:
    """The options of a run, by the name of a method or an ensemble.

    Args:
      version: A name in `PRESETS`.

    Returns:
      A new dictionary.

    Example:
      >>> preset("deep-ensemble")["members"]
      '5'
    """
    return {"model": "resnet_10", **PRESETS[version]}
