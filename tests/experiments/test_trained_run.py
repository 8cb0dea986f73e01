"""A trained run, opened again: it predicts new images, without its data."""

import json
import warnings

import jax
import numpy as np
import pytest

import otmdr_jax
from otmdr_jax import data, training
from otmdr_jax.experiments import building, prediction, run_folder
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import calibrate

TINY = TrainConfig(
    method="sgd",
    epochs=2,
    batch_size=32,
    learning_rate=0.05,
    eval_batch_size=64,
    mesh="data=1",
)

# One of each way to predict.
KINDS = {
    "point": {},
    "members": {"members": "2"},
    "mixed": {"members": "cnn_small,cnn_small", "member_map": "scan"},
    "joint": {"members": "2", "ensemble": "joint"},
    "posterior": {"method": "sgvb", "num_samples": 3, "optimizer": "adam"},
    "collected": {"method": "snapshot", "cycles": 2},
    "averaged": {"method": "swa", "collect_start": 0.4},
    "sampled": {"method": "swag", "collect_start": 0.4, "num_samples": 3},
    "fitted": {"method": "laplace", "num_samples": 3},
    "dropped": {"method": "mc-dropout", "num_samples": 3},
}


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(160, 8, 8, 1)).astype(np.float32)
    labels = np.arange(160) % 3
    images += 2 * labels[:, None, None, None] / 3
    return data.from_arrays(
        (images[:96], labels[:96]), (images[96:], labels[96:]), name="own"
    )


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    training.train(TINY, small, output, show_progress=False)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_predicts_what_the_run_evaluated_without_its_data(
    kind, small, tmp_path, monkeypatch
):
    if kind != "members":  # which devices share; of the others one predicts
        monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    result = training.train(
        TINY.replace(**KINDS[kind]), small, tmp_path / "run", show_progress=False
    )
    run = otmdr_jax.open_run(tmp_path / "run")
    found = run.predict(small.test.images)
    np.testing.assert_allclose(found, np.exp(result.log_probs), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    # Arrays that were given in Python are nowhere: none was read.
    with pytest.raises(ValueError, match="trained on arrays that were given"):
        _ = run.dataset


@pytest.mark.slow
def test_it_tells_what_it_is(folder, small):
    run = otmdr_jax.open_run(folder)
    assert run.step == run.metrics["steps"] == 6
    assert run.config == run_folder.read_config(folder)
    assert run.class_names == ("0", "1", "2")
    assert repr(run) == f"TrainedRun({str(folder)!r}, sgd, cnn_small, step 6)"
    # The network's own function on these parameters is the prediction.
    (network,) = building.networks(run.config, 3)
    images = (small.test.images - small.mean) / np.asarray(small.std)
    logits, _ = network.apply(
        run.params, run.state.model_state, images.astype(np.float32), train=False
    )
    want = jax.nn.softmax(logits)
    np.testing.assert_allclose(run.predict(small.test.images), want, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 5, 63, 64, 65, 150])
def test_any_number_of_images_gets_the_same_predictions(folder, small, count):
    run = otmdr_jax.open_run(folder)
    images = np.tile(small.test.images, (3, 1, 1, 1))[:count]
    whole = run.predict(np.tile(small.test.images, (3, 1, 1, 1)))
    found = run.predict(images)
    assert found.shape == (count, 3)
    np.testing.assert_allclose(found, whole[:count], rtol=1e-4, atol=1e-7)


def test_all_of_a_size_go_through_one_program(folder, small):
    run = otmdr_jax.open_run(folder)
    run.predict(small.test.images)
    compiled, _ = run._spread
    before = compiled.predict._cache_size()
    for count in (33, 40, 64, 100, 150):  # 64 a batch
        run.predict(np.tile(small.test.images, (3, 1, 1, 1))[:count])
    assert compiled.predict._cache_size() == before


def test_devices_share_a_batch(folder):
    run = otmdr_jax.open_run(folder)
    compiled, state = run._spread
    devices = len(jax.devices())
    if devices == 1:
        pytest.skip("there is one device")
    assert compiled.mesh.shape == {"data": devices}
    assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(state))


def test_gray_images_lazy_images_and_other_floats(folder, small):
    run = otmdr_jax.open_run(folder)
    want = run.predict(small.test.images)
    gray = small.test.images[..., 0]
    np.testing.assert_array_equal(run.predict(gray), want)
    np.testing.assert_array_equal(run.predict(jax.numpy.asarray(gray)), want)
    np.testing.assert_array_equal(
        run.predict(small.test.images.astype(np.float64)), want
    )


@pytest.mark.slow
def test_images_of_bytes(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 8, 8, 3), np.uint8)
    mine = data.from_arrays((images, np.arange(64) % 2), (images, np.arange(64) % 2))
    result = training.train(
        TINY.replace(epochs=1), mine, tmp_path / "run", show_progress=False
    )
    run = otmdr_jax.open_run(tmp_path / "run")
    lazy = data.LazyImages(lambda rows: images[rows], images.shape)
    for given in (images, lazy):
        found = run.predict(given)
        np.testing.assert_allclose(found, np.exp(result.log_probs), rtol=1e-4)
    with pytest.raises(TypeError, match=r"must be uint8 in 0..255.*np.round\(255"):
        run.predict(images / 255)
    with pytest.raises(TypeError, match=r"must be uint8.*int64.*images.astype"):
        run.predict(images.astype(int))
    with warnings.catch_warnings(action="error"):
        run.predict(images)
        run.predict(images[:1] // 16)  # a single one may be dark
    for dark in (images // 16, 0 * images):
        with pytest.warns(UserWarning, match="on a scale of 0..255"):
            run.predict(dark)
    with pytest.raises(ValueError, match=r"\(N, 8, 8, 3\).*\(64, 8, 8, 1\)"):
        run.predict(images[..., :1])


def test_other_images_are_refused(folder, small):
    run = otmdr_jax.open_run(folder)
    image = small.test.images[0]
    with pytest.raises(ValueError, match=r"Of one image give images\[None\]"):
        run.predict(image)
    with pytest.raises(ValueError, match="images must be .* got masked entries"):
        run.predict(np.ma.masked_less(image[None], 5))
    with pytest.raises(ValueError, match=r"\(N, 8, 8, 1\).*Resize"):
        run.predict(np.zeros((2, 9, 9, 1), np.float32))
    for shape in ((3, 64), (1, 64, 1)):
        with pytest.raises(ValueError, match=r"Reshape them: .*reshape\(-1, 8, 8, 1\)"):
            run.predict(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="Move the channels"):
        run.predict(np.zeros((3, 1, 8, 8), np.float32))
    for nothing in (None, "images", [image, image[1:]]):
        with pytest.raises(ValueError, match="Give one array|inhomogeneous"):
            run.predict(nothing)
    with pytest.raises(TypeError, match="must be floats"):
        run.predict(np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.warns(UserWarning, match="of another scale"):
        run.predict(255 * (small.test.images + 1))


def test_a_prediction_is_calibrated_where_a_temperature_was_fitted(small, tmp_path):
    folder = tmp_path / "run"
    result = training.train(TINY, small, folder, show_progress=False)
    raw = otmdr_jax.open_run(folder).predict(small.test.images)
    record = calibrate.calibrate(folder, ("temperature",), show_progress=False)
    # Of the whole test set: the slope of the NLL in the temperature is 0 there.
    labels, temperature = np.asarray(small.test.labels), record["temperature"]

    def nll(t):
        scaled = result.log_probs.astype(np.float64) / t
        scaled -= np.logaddexp.reduce(scaled, axis=1, keepdims=True)
        return -scaled[np.arange(len(labels)), labels].mean()

    assert nll(temperature) < min(nll(temperature * 1.01), nll(temperature / 1.01))

    def write(step):
        text = json.dumps({**record, "settings": {"step": step}})
        (folder / "calibration.json").write_text(text)

    write(6)
    run = otmdr_jax.open_run(folder)
    assert run.temperature == temperature
    scaled = raw ** (1 / temperature)
    want = scaled / scaled.sum(1, keepdims=True)
    np.testing.assert_allclose(run.predict(small.test.images), want, rtol=1e-6)
    np.testing.assert_array_equal(run.predict(small.test.images, calibrated=False), raw)
    write(5)  # fitted to the predictions of another step
    assert otmdr_jax.open_run(folder).temperature is None


@pytest.mark.slow
def test_members_and_their_disagreement(small, tmp_path):
    config = TINY.replace(members="3")
    training.train(config, small, tmp_path / "run", show_progress=False)
    run = otmdr_jax.open_run(tmp_path / "run")
    found = run.predict_members(small.test.images)
    assert isinstance(found, prediction.Predicted)
    assert found.members.shape == (3, 64, 3)
    np.testing.assert_allclose(
        run.predict(small.test.images), np.exp(found.members).mean(0), rtol=1e-9
    )
    assert found.mutual_information().shape == (64,)
    assert len(run.params) == 3
    empty = run.predict_members(small.test.images[:0])
    assert empty.members.shape == (3, 0, 3) and empty.mutual_information().size == 0


@pytest.mark.slow
def test_what_a_pass_gave_is_of_its_step_and_options_alone(small, tmp_path):
    config = TINY.replace(**KINDS["averaged"], keep_checkpoints=9, checkpoint_every=1)
    folder = tmp_path / "run"
    training.train(config, small, folder, show_progress=False)
    run = otmdr_jax.open_run(folder)
    assert run.state.method_state.statistics is not None
    for given in ({"checkpoint": 5}, {"batchnorm_examples": 32}):
        with pytest.raises(ValueError, match="arrays that were given"):
            otmdr_jax.open_run(folder, **given)
        other = otmdr_jax.open_run(folder, **given, dataset=small)
        assert other.state.method_state.statistics is not None
    again = otmdr_jax.open_run(folder, dataset=small)
    for a, b in zip(
        jax.tree.leaves(again.state.method_state),
        jax.tree.leaves(run.state.method_state),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    (folder / "seen.npz").unlink()
    anew = otmdr_jax.open_run(folder, dataset=small)
    np.testing.assert_allclose(
        anew.predict(small.test.images), run.predict(small.test.images), rtol=1e-5
    )


@pytest.mark.slow
def test_a_run_of_an_older_version_needs_its_data(small, tmp_path):
    folder = tmp_path / "run"
    training.train(TINY.replace(epochs=1), small, folder, show_progress=False)
    record = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(
        json.dumps({k: v for k, v in record.items() if k not in ("mean", "std")})
    )
    with pytest.raises(ValueError, match="arrays that were given"):
        otmdr_jax.open_run(folder)
    otmdr_jax.open_run(folder, dataset=small).predict(small.test.images)
