"""Runs as files for others: weights by name, and programs that predict without us."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export

import otmdr_jax
from otmdr_jax import bnn, data, models, training
from otmdr_jax.experiments import export
from otmdr_jax.experiments.config import TrainConfig

safetensors = pytest.importorskip("safetensors.numpy")

TINY = TrainConfig(method="sgd", epochs=1, batch_size=32, mesh="data=1")


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 8, 8, 3), np.uint8)
    labels = np.arange(64) % 3
    return data.from_arrays((images, labels), (images[:20], labels[:20]), name="own")


def opened(config, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    training.train(config, small, folder, show_progress=False)
    return otmdr_jax.open_run(folder)


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    return opened(TINY, small, tmp_path_factory)


@pytest.fixture(scope="module")
def members(small, tmp_path_factory):
    return opened(TINY.replace(members="2"), small, tmp_path_factory)


@pytest.fixture(scope="module")
def laplace(small, tmp_path_factory):
    return opened(TINY.replace(method="laplace"), small, tmp_path_factory)


@pytest.fixture(scope="module")
def posterior(small, tmp_path_factory):
    config = TINY.replace(method="sgvb", optimizer="adam", num_samples=3)
    return opened(config, small, tmp_path_factory)


def read(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
        return found, json.loads(str(found.pop("metadata")))
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        text = {name: json.loads(x) for name, x in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()}, text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["safetensors", "npz"])
def test_weights_come_back_by_name_and_predict_the_same(run, small, tmp_path, name):
    path = export.export(run, tmp_path / "deep" / f"weights.{name}")
    found, known = read(path)
    assert known["image_shape"] == [8, 8, 3] and known["classes"] == ["0", "1", "2"]
    assert known["model"] == "cnn_small" and known["step"] == 2
    assert known["scale"] == {"uint8": 255, "float32": 1}[known["dtype"]]

    def nested(prefix):
        tree = {}
        for name, array in found.items():
            first, *middle, last = name.split("/")
            if first == prefix:
                place = tree
                for part in middle:
                    place = place.setdefault(part, {})
                place[last] = array
        return tree

    # All that a reader needs is in the file: the network by name, and how to normalise.
    model = models.create(known["model"], len(known["classes"]))
    images = small.test.images / np.float32(255)
    images = (images - np.float32(known["mean"])) / np.float32(known["std"])
    logits, _ = model.apply(nested("params"), nested("state"), images, train=False)
    want = run.predict(small.test.images)
    np.testing.assert_allclose(jax.nn.softmax(logits), want, atol=1e-5)


@pytest.mark.slow
def test_members_and_posteriors_have_names_of_their_own(members, posterior):
    found = export.arrays(members)
    kernels = [found[f"members/{m}/params/conv1/kernel"] for m in range(2)]
    np.testing.assert_array_equal(
        np.stack(kernels), members.state.params["conv1"]["kernel"]
    )
    assert not any(name.startswith("params") for name in found)
    found = export.arrays(posterior)
    q = posterior.state.params
    np.testing.assert_array_equal(
        found["params/head/kernel"], bnn.mean(q)["head"]["kernel"]
    )
    std = bnn.std(q)
    assert {n for n in found if n.startswith("std/")} == {
        "std/" + jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(std)
    }


# Loads and predicts where neither this library nor Flax can be imported.
BARE = """
import sys
for name in ("otmdr_jax", "flax", "optax", "orbax"):
    sys.modules[name] = None
import jax, numpy as np
from jax import export
program = export.deserialize(open(sys.argv[1], "rb").read())
images = np.load(sys.argv[2])
np.savez(sys.argv[3], **{str(n): program.call(images[:n]) for n in (1, 7, 20)})
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["run", "members", "posterior", "laplace"])
def test_a_program_predicts_without_this_library(which, request, small, tmp_path):
    run = request.getfixturevalue(which)
    export.export(run, tmp_path / "program.stablehlo")
    known = json.loads((tmp_path / "program.json").read_text())
    assert known["platforms"] == ["cpu", "cuda", "tpu"]
    np.save(tmp_path / "images.npy", small.test.images)
    subprocess.run(
        [sys.executable, "-c", BARE]
        + [str(tmp_path / x) for x in ("program.stablehlo", "images.npy", "out.npz")],
        check=True,
        cwd=tmp_path,
    )
    want = run.predict(small.test.images)
    with np.load(tmp_path / "out.npz") as found:
        for count in (1, 7, 20):
            assert found[str(count)].dtype == np.float32
            # Float32, of programs of another batch size: within 2^-20 of each other.
            np.testing.assert_allclose(found[str(count)], want[:count], atol=2**-20)


def test_a_program_is_calibrated_and_may_have_a_fixed_size(run, small):
    run.temperature = 1.7
    try:
        program = jax_export.deserialize(
            bytearray(export.program(run, ("cpu",), batch_size=20))
        )
        want = run.predict(small.test.images)
        raw = run.predict(small.test.images, calibrated=False)
    finally:
        run.temperature = None
    found = program.call(small.test.images)
    np.testing.assert_allclose(found, want, atol=2**-20)
    assert np.abs(np.asarray(found) - raw).max() > 1e-3
    assert program.platforms == ("cpu",)
    with pytest.raises(ValueError, match="20"):
        program.call(small.test.images[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_18", "mobilenet", "densenet_121"])
def test_networks_are_traced_without_the_number_of_images(name):
    network = models.create(name, 10)
    params, state = jax.eval_shape(
        network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    )
    (size,) = jax_export.symbolic_shape("n")
    exported = jax_export.export(
        jax.jit(lambda p, s, x: network.apply(p, s, x, train=False)[0]),
        platforms=export.PLATFORMS,
    )(params, state, jax.ShapeDtypeStruct((size, 32, 32, 3), "float32"))
    assert str(exported.out_avals[0].shape) == "(n, 10)"


def test_what_cannot_be_is_refused(run, tmp_path):
    path = tmp_path / "weights.npz"
    export.export(run, path)
    with pytest.raises(FileExistsError, match="--overwrite"):
        export.export(run, path)
    export.export(run, path, overwrite=True)
    # A program's description goes beside it: neither over it nor over another file.
    with pytest.raises(ValueError, match="another ending than .json"):
        export.export(run, tmp_path / "program.json", "stablehlo")
    assert not (tmp_path / "program.json").exists()
    (tmp_path / "result.json").write_text('{"otmdr_jax": "0.1.0", "steps": 3}')
    with pytest.raises(FileExistsError, match="describes no exported program"):
        export.export(run, tmp_path / "result.stablehlo", overwrite=True)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 3
    with pytest.raises(ValueError, match="format must be one of safetensors"):
        export.export(run, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="batch_size=3 is of the format stablehlo"):
        export.export(run, tmp_path / "other.npz", batch_size=3)
    with pytest.raises(ValueError, match="platforms must be some of"):
        export.program(run, ("gpu",))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        export.program(run, batch_size=0)
