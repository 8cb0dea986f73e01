"""A bare accelerator machine: JAX, Flax, Optax and Orbax, and nothing else of ours."""

import subprocess
import sys

import pytest

# What the extras bring beyond those four. An import of any of them fails.
ABSENT = (
    "tensorflow_datasets", "array_record", "grain", "tyro",
    "sklearn", "tensorboardX", "matplotlib", "PIL", "chex", "hypothesis", "equinox",
    "safetensors",
)  # fmt: skip

BLOCK = f"""
import sys
ABSENT = {ABSENT!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run(code, check=True, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        check=check,
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.essential
def test_zoo_training_and_evaluation_run_on_arrays(tmp_path):
    code = """
import numpy as np, jax
from otmdr_jax import data, models, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import evaluation
rng = np.random.default_rng(0)
labels = rng.integers(0, 3, 96)
images = rng.random((96, 8, 8, 1)) * 40 + 80 * labels[:, None, None, None]
images = images.astype("uint8")
dataset = data.from_arrays((images, labels), (images[:30], labels[:30]), num_classes=3)
config = TrainConfig(
    method="otmdr", epochs=6, batch_size=32, noise_std=0.01, learning_rate=0.02
)
result = training.train(config, dataset, "run")
resumed = training.train(config, dataset, "run", resume=True)
assert resumed.metrics["nll"] == result.metrics["nll"]
values = evaluation.evaluate(config, result.state, dataset).metrics
assert values["accuracy"] == result.metrics["accuracy"]
wide = models.create("wide_resnet_28_10", 10)
assert models.parameter_count(wide, (32, 32, 3)) == 36_479_194
loaded = [name for name in ABSENT if name in sys.modules]
assert not loaded, loaded
print("accuracy", values["accuracy"])
"""
    out = run(code, cwd=tmp_path)
    assert "accuracy" in out.stdout
    assert "18/18 steps" in out.stderr  # progress without a terminal
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("from otmdr_jax import data; data.load('digits')", "data"),
        ("from otmdr_jax import data; data.load('cifar10')", "data"),
        ("import otmdr_jax.experiments.cli", "train"),
        pytest.param(
            "import numpy as np; from otmdr_jax import report;"
            "run = report.Run(None, 'a', {}, {}, [], np.log([[0.5, 0.5]]), [0]);"
            "report.plot_reliability([run], 'x.png')",
            "train",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_missing_is_named_with_the_extra_that_brings_it(code, extra, tmp_path):
    done = run(code, check=False, cwd=tmp_path)
    assert done.returncode != 0
    # The package is on no index: only a clone of it has extras.
    assert f"in a clone of otmdr_jax: pip install '.[{extra}]'" in done.stderr
