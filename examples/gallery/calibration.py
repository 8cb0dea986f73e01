"""
# Confidence that is right

    python examples/gallery/calibration.py         # 30 seconds, writes calibration.png

An ensemble of three networks, trained by OT-MDR on digits of which a fifth have a wrong
label: what its probabilities are worth before and after a temperature is fitted to
images that were held back. Expected: the ensemble is right more often than it says; one
number mends it without changing a prediction.
"""

import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np

import otmdr_jax
from otmdr_jax import calibration, config, metrics, training

# %%
# ## A run
# The library's own loop: `training.train` writes a folder, which `open_run` opens. A
# tenth of the training images is held back; their labels, as the test images', are
# right.

folder = pathlib.Path(tempfile.mkdtemp()) / "run"
setting = config.TrainConfig().replace(
    data="digits", method="otmdr", members="3", num_particles=1, epochs=10,
    label_noise=0.2, validation=0.1,
)  # fmt: skip
training.train(setting, output=folder, show_progress=False)
run = otmdr_jax.open_run(folder)
test = run.dataset.test

# %%
# ## Predictions
# The images that were held back fit the temperature, the test images judge it.

held_back = run.dataset.validation
temperature = calibration.fit_temperature(
    np.log(run.predict(held_back.images)), held_back.labels
)
print(f"temperature {temperature:.2f}")


def probabilities(log_probs, temperature):
    return np.exp(calibration.log_softmax(log_probs / temperature))


log_probs, judged = np.log(run.predict(test.images)), test.labels
variants = {
    "as trained": probabilities(log_probs, 1.0),
    f"temperature {temperature:.2f}": probabilities(log_probs, temperature),
}
for name, probs in variants.items():
    print(
        f"{name}: accuracy {metrics.accuracy(probs, judged):.3f}, "
        f"NLL {metrics.nll(probs, judged):.3f}, ECE {metrics.ece(probs, judged):.3f}"
    )

# %%
# ## Reliability, and what the ensemble knows about its errors
# Left: the accuracy of predictions by their confidence; on the diagonal they agree.
# Right: the share of wrong predictions among the most confident ones that one keeps.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
for colour, (name, probs) in zip(("#0072B2", "#D55E00"), variants.items(), strict=True):
    bins = metrics.reliability(probs, judged, num_bins=10)
    left.plot(bins.confidence, bins.accuracy, "o-", color=colour, label=name)
    curve = metrics.risk_coverage(probs, judged)
    right.plot(curve.coverage, curve.risk, color=colour, label=name)
left.plot([0, 1], [0, 1], color="black", linewidth=0.8)
left.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
left.legend(frameon=False)
right.set(
    xlabel="share of images kept", ylabel="share of these that is wrong", xlim=(0.8, 1)
)
figure.savefig("calibration.png", dpi=130)
