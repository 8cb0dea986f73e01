"""Against libraries that measure the same, where they are installed.

torchmetrics (in float32, bins closed on the left), uncertainty-calibration and relplot
(on a grid of 0.001). None of them is needed otherwise.
"""

import numpy as np
import pytest

from otmdr_jax import metrics
from tests.metrics.test_metrics import predictions

PROBS, LABELS = predictions(0, 3000, 10)
CONFIDENCE, RIGHT = PROBS.max(axis=1), PROBS.argmax(axis=1) == LABELS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torchmetrics_agrees():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    probs, labels = torch.tensor(PROBS), torch.tensor(LABELS)
    confidence, wrong = torch.tensor(CONFIDENCE), torch.tensor(~RIGHT).int()
    ours = metrics.summary(PROBS, LABELS)

    def calibration(norm):
        return theirs.multiclass_calibration_error(probs, labels, 10, 15, norm)

    def accuracy(k):
        return theirs.multiclass_accuracy(probs, labels, 10, "micro", k)

    for name, value in {
        "accuracy": accuracy(1),
        "top5_accuracy": accuracy(5),
        "ece": calibration("l1"),
        "mce": calibration("max"),
        "ovr_auroc": theirs.multiclass_auroc(probs, labels, 10),
        "misclassification_auroc": theirs.binary_auroc(1 - confidence, wrong),
        "misclassification_aupr": theirs.binary_average_precision(
            1 - confidence, wrong
        ),
    }.items():
        np.testing.assert_allclose(ours[name], float(value), rtol=1e-6, err_msg=name)


def test_uncertainty_calibration_agrees():
    theirs = pytest.importorskip("calibration")
    want = theirs.lower_bound_scaling_ce(
        CONFIDENCE, RIGHT.astype(int), p=2, debias=True, num_bins=15
    )
    np.testing.assert_allclose(metrics.debiased_ece(PROBS, LABELS), want, rtol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rate", [None, 0.75])
def test_relplot_agrees(rate):
    theirs = pytest.importorskip("relplot")
    probs, labels = PROBS, LABELS
    if rate:  # too sure and not sure enough
        rng = np.random.default_rng(0)
        confidence = np.linspace(0.5, 1.0, 3000)
        probs = np.stack([confidence, 1 - confidence], axis=1)
        labels = (rng.random(3000) > rate).astype(int)
    right = probs.argmax(axis=1) == labels
    want = theirs.smECE(probs.max(axis=1), right.astype(float))
    np.testing.assert_allclose(metrics.smooth_ece(probs, labels), want, atol=1e-3)
