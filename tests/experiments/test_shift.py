"""Shifted test sets: corruptions against SciPy, PIL and NumPy, sets read for real."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otmdr_jax import bnn, data, metrics
from otmdr_jax.data import corruptions
from otmdr_jax.experiments import cli, prediction, programs, report, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import evaluation, shift
from otmdr_jax.experiments.measure.shift import detection, sets
from otmdr_jax.experiments.report import page
from otmdr_jax.experiments.report import shift as tables
from tests.marks import slow_but
from tests.sets import encoded, gray_examples, gray_features, real_cifar10

KEYS = ("picture", "kind")
SHAPES = [(8, 8, 1), (32, 32, 3), (11, 20, 2), (64, 48, 3)]
# All severities of one shape, and one severity of the others.
CASES = [(shape, severity) for shape in SHAPES for severity in data.SEVERITIES
         if shape == (32, 32, 3) or severity == 3]  # fmt: skip


def images_of(shape, num=4, seed=0):
    """Smooth images with black and white in them, as photographs have."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(num, 4, 4, shape[-1]))
    y, x = (np.linspace(0, np.pi, n)[:, None] * np.arange(4) for n in shape[:2])
    x = np.einsum("bijc,hi,wj->bhwc", waves, np.cos(y), np.cos(x))
    return np.clip(np.round(127 + 60 * x), 0, 255).astype(np.uint8)


def corrupt(images, name, severity, seed=0, first=0):
    return np.asarray(data.corrupt(jax.random.key(seed), images, name, severity, first))


def levels(images):
    return images.astype(np.float64)


def assert_rounded(got, want):
    """`want` rounded, where float32 may take a half to either side."""
    np.testing.assert_allclose(levels(got), want, atol=0.5 + 1e-3)


# -- each kind against another implementation --


@pytest.mark.parametrize(("shape", "severity"), CASES, ids=str)
def test_blur_is_scipys(shape, severity):
    ndimage = pytest.importorskip("scipy.ndimage")
    images = images_of(shape)
    std = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1] * max(1.0, min(shape[:2]) / 32)
    want = ndimage.gaussian_filter(
        levels(images), (0, std, std, 0), mode="nearest", truncate=4.0
    )
    assert_rounded(corrupt(images, "gaussian_blur", severity), want)


@pytest.mark.parametrize(
    ("shape", "severity"), [case for case in CASES if case[0][2] != 2], ids=str
)
def test_pixelation_is_pils(shape, severity):
    image_lib = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    fraction = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = (int(fraction * n) for n in shape[:2])
    if shape[0] == 8:  # five sizes, where the fractions make three
        height = width = 8 - severity
    small = image_lib.fromarray(image.squeeze()).resize(
        (width, height), image_lib.Resampling.BOX
    )
    want = small.resize(shape[1::-1], image_lib.Resampling.BOX)
    got = corrupt(image[None], "pixelate", severity)[0]
    # PIL rounds after each of four passes, of which two copy pixels.
    np.testing.assert_allclose(
        levels(got), levels(np.asarray(want).reshape(shape)), atol=1.0
    )


@pytest.mark.parametrize(("shape", "severity"), CASES, ids=str)
def test_rotation_is_scipys_to_one_side_or_the_other(shape, severity):
    ndimage = pytest.importorskip("scipy.ndimage")
    images = images_of(shape, num=12)
    degrees = (5.0, 10.0, 15.0, 20.0, 30.0)[severity - 1]
    either = [
        ndimage.rotate(
            levels(images),
            angle,
            axes=(1, 2),
            reshape=False,
            order=1,
            mode="nearest",
        )
        for angle in (degrees, -degrees)
    ]
    got = corrupt(images, "rotation", severity)
    errors = np.abs(levels(got) - np.stack(either)).max(axis=(2, 3, 4))  # (2, B)
    assert np.all(errors.min(axis=0) < 0.51)
    # Both sides occur, and no image could pass for both.
    assert set(errors.argmin(axis=0)) == {0, 1}
    assert np.all(errors.max(axis=0) > 2.0)


@pytest.mark.parametrize(("shape", "severity"), CASES, ids=str)
def test_contrast_is_its_formula(shape, severity):
    images = images_of(shape)
    mean = levels(images).mean(axis=(1, 2), keepdims=True)
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    want = mean + factor * (levels(images) - mean)
    assert_rounded(corrupt(images, "contrast", severity), want)


@pytest.mark.parametrize("severity", data.SEVERITIES)
def test_brightness_adds_to_the_value_of_hsv(severity):
    colors = pytest.importorskip("matplotlib.colors")
    images = images_of((32, 32, 3))
    images[0, 0, :5] = 0  # black has no hue
    hsv = colors.rgb_to_hsv(images / 255.0)
    added = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0.0, 1.0)
    want = 255.0 * colors.hsv_to_rgb(hsv)
    assert_rounded(corrupt(images, "brightness", severity), want)
    gray = images[..., :1]
    want = np.clip(levels(gray) + 255.0 * added, 0, 255)
    assert_rounded(corrupt(gray, "brightness", severity), want)


@pytest.mark.parametrize(
    ("shape", "severity"), [case for case in CASES if case[0][0] in (8, 32)], ids=str
)
def test_noise_is_normal_with_its_deviation(shape, severity):
    stats = pytest.importorskip("scipy.stats")
    num = 40_000 // (shape[0] * shape[1] * shape[2])
    clean = np.full((num, *shape), 0.5, np.float32)
    noise = levels(corrupt(clean, "gaussian_noise", severity)) - 0.5
    std = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    # Rounding to levels adds the variance of a uniform error.
    expected = np.hypot(std, 1 / 255 / np.sqrt(12))
    error = expected / np.sqrt(2 * noise.size)  # one standard error
    assert abs(noise.std() - expected) < 4.5 * error
    assert abs(noise.mean()) < 4.5 * expected / noise.size**0.5
    rng = np.random.default_rng(0)
    smooth = noise.ravel() + rng.uniform(-0.5, 0.5, noise.size) / 255
    assert stats.kstest(smooth / expected, "norm").pvalue > 1e-3
    # Pixels, channels and images have draws of their own.
    pairs = [(noise[:-1], noise[1:]), (noise[:, 1:], noise[:, :-1])]
    pairs += [(noise[..., 1:], noise[..., :-1])] if shape[-1] > 1 else []
    for first, second in pairs:
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(first.size)
    black = corrupt(np.zeros((num, *shape), np.uint8), "gaussian_noise", severity)
    assert abs((black == 0).mean() - stats.norm.cdf(0.5 / 255 / std)) < 0.02


# -- all kinds --


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3)], ids=str)
@pytest.mark.parametrize("name", data.CORRUPTIONS)
def test_images_get_farther_with_severity(name, shape):
    clean = images_of(shape, num=16)
    distances = [0.0]
    for severity in data.SEVERITIES:
        got = corrupt(clean, name, severity)
        assert got.dtype == np.uint8 and got.shape == clean.shape
        distances.append(np.sqrt(np.mean((levels(got) - levels(clean)) ** 2)))
    # Of pixelation a size that divides the side can be nearer than the one before.
    steps = distances[:2] + distances[-1:] if name == "pixelate" else distances
    assert np.all(np.diff(steps) > 0), distances


@pytest.mark.slow
@pytest.mark.parametrize("name", data.CORRUPTIONS)
def test_an_images_draw_depends_on_its_position_alone(name):
    clean = images_of((8, 8, 3), num=7)
    whole = corrupt(clean, name, 3)
    parts = [corrupt(clean[i : i + 3], name, 3, first=i) for i in (0, 3, 6)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(corrupt(clean, name, 3), whole)
    same = np.repeat(clean[:1], 7, axis=0)
    random = name in ("gaussian_noise", "rotation")
    got = corrupt(same, name, 3)
    assert (len(np.unique(got, axis=0)) > 1) == random
    assert (not np.array_equal(corrupt(same, name, 3, seed=1), got)) == random


@pytest.mark.parametrize("name", data.CORRUPTIONS)
def test_one_program_serves_all_severities_and_positions(name, monkeypatch):
    clean, traces = images_of((9, 7, 1)), []
    function = corruptions._KINDS[name]

    def counted(*args):
        traces.append(name)
        return function(*args)

    monkeypatch.setitem(corruptions._KINDS, name, counted)
    for severity in (1, 2, 5, np.int64(3), jnp.int32(4)):
        corrupt(clean, name, severity, first=7 * int(severity))
    assert len(traces) == 1
    inside = jax.jit(lambda s: data.corrupt(jax.random.key(0), clean, name, s))
    # Another program may round a half to the other side.
    for severity, same in ((4, 4), (9, 5)):  # out of range: the nearest
        got, want = np.asarray(inside(severity)), corrupt(clean, name, same)
        np.testing.assert_allclose(levels(got), levels(want), atol=1.0)
        assert np.mean(got == want) > 0.9


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(data.CORRUPTIONS),
    st.sampled_from(data.SEVERITIES),
    st.integers(0, 2**31 - 1),
    st.sampled_from([np.float32, np.float16]),
)
def test_floats_and_bytes_are_the_same_images(name, severity, seed, dtype):
    images = images_of((8, 8, 1), seed=seed % 100)
    of_bytes = corrupt(images, name, severity, seed)
    of_floats = corrupt((images / 255.0).astype(dtype), name, severity, seed)
    assert of_floats.dtype == dtype
    found = levels(of_floats) * 255.0
    # Half a level of rounding, and half precision's own: 2^-11 of 255.
    tolerance = 1.0 if dtype == np.float32 else 1.5
    np.testing.assert_allclose(found, levels(of_bytes), atol=tolerance)
    if dtype == np.float32:
        np.testing.assert_allclose(found, np.round(found), atol=1e-4)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["contrast", "pixelate", "gaussian_blur"],
        ["contrast", "pixelate", "gaussian_blur", "rotation"],
    ),
)
def test_a_constant_image_has_nothing_to_lose(name):
    flat = np.full((2, 16, 16, 3), 77, np.uint8)
    for severity in data.SEVERITIES:
        np.testing.assert_array_equal(corrupt(flat, name, severity), flat)


@pytest.mark.parametrize("severity", [0, 6, -1, 2.0, True, "3", None, np.array([1, 2])])
def test_a_severity_outside_of_1_to_5_is_an_error(severity):
    with pytest.raises(ValueError, match="severity must be one of 1, 2, 3, 4, 5"):
        corrupt(images_of((8, 8, 1)), "contrast", severity)


def test_what_cannot_be_corrupted_is_an_error():
    images = images_of((8, 8, 1))
    with pytest.raises(ValueError, match="'gaussian_noise', .*; got 'fog"):
        corrupt(images, "fog", 1)
    with pytest.raises(ValueError, match=r"\(B, H, W, C\), got \(8, 8, 1\)"):
        corrupt(images[0], "contrast", 1)
    with pytest.raises(TypeError, match="uint8 .* got int32"):
        corrupt(images.astype(np.int32), "contrast", 1)


def test_sizes_of_pixelation():
    assert corruptions.sizes(32) == [30, 28, 27, 24, 20]  # CIFAR-10-C's
    assert corruptions.sizes(8) == [7, 6, 5, 4, 3]
    assert corruptions.sizes(3) == [2, 1, 1, 1, 1]


@pytest.mark.slow
def test_real_images_change_as_much_as_they_should():
    """CIFAR-10 itself: every kind moves it, none beyond recognition."""
    images, _ = real_cifar10(range(50_000, 60_000, 100))
    for name in data.CORRUPTIONS:
        errors = [
            np.sqrt(np.mean((levels(corrupt(images, name, s)) - levels(images)) ** 2))
            for s in data.SEVERITIES
        ]
        assert np.all(np.diff(errors) > 0)
        assert errors[0] > 1.0 and errors[-1] < 64.0, (name, errors)


# -- sets to test on --


def test_a_test_split_is_read_alone(prepare):
    given = {"test": gray_examples(40), "extra": gray_examples(3)}
    where = prepare("OnlyTest", gray_features, given, KEYS)
    split, classes = data.load_test("only_test", **where)
    assert classes == 7
    # TFDS's writer shuffles.
    found = {image.tobytes(): label for image, label in zip(*split, strict=True)}
    assert found == {x["picture"].tobytes(): x["kind"] for x in given["test"]}
    with pytest.raises(ValueError, match='must have the splits "train" and "test"'):
        data.load("only_test", **where)
    lazy, _ = data.load_test("only_test", in_memory=False, **where)
    assert isinstance(lazy.images, data.LazyImages)
    np.testing.assert_array_equal(lazy.images[:], split.images)


def test_a_test_split_alone_leaves_the_cache_of_both_alone(prepare, caplog):
    given = {"train": gray_examples(11), "test": gray_examples(4)}
    where = prepare("BothSplits", gray_features, given, KEYS)
    whole = data.load("both_splits", **where)
    for _ in range(2):
        split, _ = data.load_test("both_splits", **where)
        np.testing.assert_array_equal(split.images, whole.test.images)
        data.load("both_splits", **where)
    assert len(list(where["cache_dir"].iterdir())) == 2
    assert not [x for x in caplog.records if x.name.startswith("otmdr_jax")]


def test_a_set_without_a_test_split_says_so(prepare):
    where = prepare("NoTest", gray_features, {"train": gray_examples(4)}, KEYS)
    with pytest.raises(ValueError, match=r"the split \"test\" .* it has \['train'\]"):
        data.load_test("no_test", **where)


def test_test_splits_of_files_and_digits(tmp_path):
    images, labels = images_of((6, 5, 2)), np.array([0, 2, 1, 0])
    np.savez(tmp_path / "mine.npz", test_images=images, test_labels=labels)
    split, classes = data.load_test(tmp_path / "mine.npz")
    np.testing.assert_array_equal(split.images, images)
    assert classes == 3 and split.labels.dtype == np.int32
    # It is this file, wherever the run's own data may be.
    (tmp_path / "moved").mkdir()
    for other in ("other.npz", "moved/mine.npz"):
        np.savez(tmp_path / other, test_images=images[:2], test_labels=labels[:2])
    for data_dir in (tmp_path / "other.npz", tmp_path / "moved"):
        split, _ = data.load_test(tmp_path / "mine.npz", data_dir=data_dir)
        np.testing.assert_array_equal(split.images, images)
        found = data.describe_test(tmp_path / "mine.npz", data_dir=data_dir)
        assert found.num_examples == 4
        with pytest.raises(FileNotFoundError, match=r"Correct the path\.$"):
            data.load_test(tmp_path / "gone.npz", data_dir=data_dir)
    np.savez(tmp_path / "bad.npz", test_images=images, train_labels=labels)
    with pytest.raises(ValueError, match="test_images, test_labels or x_test, y_test"):
        data.load_test(tmp_path / "bad.npz")
    np.savez(tmp_path / "short.npz", test_images=images, test_labels=labels[:3])
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        data.load_test(tmp_path / "short.npz")
    split, classes = data.load_test("digits")
    np.testing.assert_array_equal(split.labels, data.load("digits").test.labels)
    assert classes == 10


# -- a state's record --

TINY = TrainConfig(
    mesh="data=1", data="digits", method="sgd", steps=4, batch_size=64, seed=3
)


@pytest.fixture(scope="module")
def small():
    digits = data.load("digits")
    return dataclasses.replace(
        digits,
        train=data.Split(*(x[:300] for x in digits.train)),
        test=data.Split(*(x[:90] for x in digits.test)),
    )


def state_of(config, dataset):
    compiled = programs.compile_programs(config, dataset)
    return compiled, compiled.init(programs.run_keys(config.run.seed)[0])


KINDS = {
    "one model": {},
    "an ensemble": {"members": "3"},
    "a posterior": {"method": "sgvb", "num_samples": 4, "posterior_std": 0.05},
    "an ensemble of posteriors": {
        "method": "sgvb", "num_samples": 3, "posterior_std": 0.05, "members": "2",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_the_evaluation_of_corrupted_sets(kind, small):
    config = TINY.replace(eval_batch_size=32, **KINDS[kind])
    compiled, state = state_of(config, small)
    record = shift.evaluate(
        config,
        state,
        small,
        compiled,
        corruptions=["rotation", "gaussian_noise"],
        severities=[2, 5],
        seed=7,
    )
    clean = evaluation.evaluate(config, state, small, programs=compiled)
    assert record["clean"] == clean.metrics
    assert (record["num_examples"], record["step"], record["seed"]) == (90, 0, 7)
    names = [(row["name"], row["severity"]) for row in record["corruptions"]]
    assert names == [(n, s) for n in ("rotation", "gaussian_noise") for s in (2, 5)]
    for row in record["corruptions"]:
        # The whole set at once, where the record was made in batches of 32.
        key = jax.random.key(7)
        key = jax.random.fold_in(key, data.CORRUPTIONS.index(row["name"]))
        images = data.corrupt(key, small.test.images, row["name"], row["severity"])
        changed = data.Split(np.asarray(images), small.test.labels)
        moved = dataclasses.replace(small, test=changed)
        want = evaluation.evaluate(config, state, moved, programs=compiled).metrics
        assert want != clean.metrics
        assert row == {"name": row["name"], "severity": row["severity"], **want}
    # Foreign sets, against samples and metrics of their own.
    noise = sets.uniform_noise(small, None, 7)
    raw = []
    for split in (small.test, noise):
        log_probs = np.asarray(compiled.predict(state, split.images), np.float64)
        raw.append(np.exp(log_probs))  # (S, N, C)
    scores = {row["score"]: row for row in record["ood"]}
    several = kind != "one model"
    assert set(scores) == set(shift.SCORES[: 3 if several else 2])
    for score, row in scores.items():
        want = metrics.ood_auroc(*raw, score)
        assert row["auroc"] == pytest.approx(want, abs=1e-3)
        assert (row["name"], row["num_examples"]) == ("uniform_noise", 90)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_mutual_information_is_that_of_the_samples(kind, small):
    config = TINY.replace(**KINDS[kind])
    compiled, state = state_of(config, small)
    found = prediction.predict(config, state, small.test, compiled)
    samples = np.exp(np.asarray(compiled.predict(state, small.test.images), float))
    want = metrics.mutual_information(samples)
    np.testing.assert_allclose(found.mutual_information(), want, atol=1e-6)
    assert want.max() > 1e-4
    # Of members that do not count there is nothing in it.
    if config.model.members is not None:
        count = len(config.model.member_names)
        found = prediction.predict(config, state, small.test, compiled, without=(0,))
        each = samples.reshape(count, -1, *samples.shape[1:])[1:]
        want = metrics.mutual_information(each.reshape(-1, *samples.shape[1:]))
        np.testing.assert_allclose(found.mutual_information(), want, atol=1e-6)


def test_detection_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    inside = np.round(rng.normal(size=300), 1)  # with ties
    outside = np.round(rng.normal(1.0, 1.5, size=170), 1)
    found = shift.detect(inside, outside)
    scores = np.concatenate([inside, outside])
    is_outside = np.arange(470) >= 300
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(is_outside, scores))
    want = sklearn.average_precision_score(is_outside, scores)
    assert found["aupr"] == pytest.approx(want)
    fpr, tpr, _ = sklearn.roc_curve(~is_outside, -scores, drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    assert np.isnan(list(shift.detect(inside, np.array([np.nan])).values())).all()


def test_a_diverged_state_has_a_record_of_nan(small):
    compiled, state = state_of(TINY, small)
    nans = jax.tree.map(lambda x: x * np.nan, state.params)
    record = shift.evaluate(
        TINY,
        state._replace(params=nans),
        small,
        compiled,
        corruptions=["contrast"],
        severities=[1],
    )
    assert np.isnan(record["clean"]["nll"]) and np.isnan(record["ood"][0]["auroc"])
    assert [row["score"] for row in record["ood"]] == ["confidence", "entropy"]


def test_fewer_examples_are_spread_evenly(small):
    compiled, state = state_of(TINY, small)
    record = shift.evaluate(
        TINY, state, small, compiled, corruptions=(), max_examples=30
    )
    rows = np.linspace(0, 89, 30).astype(int)
    part = data.Split(*(x[rows] for x in small.test))
    moved = dataclasses.replace(small, test=part)
    want = evaluation.evaluate(TINY, state, moved, programs=compiled).metrics
    assert record["clean"] == want and record["num_examples"] == 30
    assert record["ood"][0]["num_examples"] == 30 and not record["corruptions"]


def test_lazy_images_stay_lazy_where_some_are_chosen(small):
    images = small.test.images
    lazy = data.LazyImages(lambda rows: images[rows], images.shape)
    split = sets.spread(data.Split(lazy, small.test.labels), 7)
    assert isinstance(split.images, data.LazyImages)
    rows = np.linspace(0, 89, 7).astype(int)
    np.testing.assert_array_equal(split.images[:], images[rows])
    np.testing.assert_array_equal(split.labels, small.test.labels[rows])


BAD = {
    "kind": (dict(corruptions=["fog"]), "must be one of 'gaussian_noise'"),
    "twice": (dict(corruptions=["contrast"] * 2), "named once each"),
    "severity": (dict(severities=[0]), "severity must be one of 1, 2, 3, 4, 5"),
    "no severity": (dict(severities=[]), "corruptions need severities"),
    "examples": (dict(max_examples=0), "max_examples must be an integer of at least 1"),
    "name": (dict(other_sets=["nowhere"]), "data must be"),
    "size": (dict(other_sets=["cifar10_1/v6"]), "must be prepared"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_before_anything_is_computed(case, small, tmp_path):
    options, message = BAD[case]
    config = TINY.replace(data_dir=str(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        shift.evaluate(config, None, small, object(), **options)


def test_floats_of_another_scale_cannot_be_corrupted(small):
    floats = data.Split(small.test.images / np.float32(20), small.test.labels)
    with pytest.raises(ValueError, match=r"floats in \[0, 12.75\].*--corruptions"):
        shift.evaluate(TINY, None, dataclasses.replace(small, test=floats), object())
    noise = sets.uniform_noise(dataclasses.replace(small, test=floats), None, 0)
    assert noise.images.dtype == np.float32
    assert 12.0 < noise.images.max() <= 12.75 and noise.images.min() < 0.5


# -- sets of TFDS, as TFDS's own writer prepares them --

VERSIONS = {"cifar10": "3.0.2", "cifar10_1": "1.1.0", "cifar10_corrupted": "1.0.0",
            "svhn_cropped": "3.1.0"}  # fmt: skip


def prepare_photographs(folder, name, **splits):
    """A small set under TFDS's name, version and config, with its features."""
    tfds = pytest.importorskip("tensorflow_datasets")
    registered = pytest.importorskip("tensorflow_datasets.core.registered")
    family, _, config = name.partition("/")
    version = tfds.core.Version(VERSIONS[family])

    def generate(self, split):
        for i, (image, label) in enumerate(zip(*split, strict=True)):
            yield i, {"image": encoded(image), "label": int(label)}

    body = {
        "__module__": "__main__",
        "VERSION": version,
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        ),
        "_split_generators": lambda self, manager: {
            split: self._generate_examples(values) for split, values in splits.items()
        },
        "_generate_examples": generate,
    }
    if config:
        own = tfds.core.BuilderConfig(name=config, version=version)
        body["BUILDER_CONFIGS"] = [own]
    title = "".join(part.title() for part in family.split("_"))
    title = {"cifar10_1": "Cifar10_1"}.get(family, title)
    with registered.skip_registration():
        builder = type(title, (tfds.core.GeneratorBasedBuilder,), body)
    builder(data_dir=folder, file_format="array_record").download_and_prepare()
    assert (folder / name / VERSIONS[family]).is_dir()


def photographs(num, seed):
    images = images_of((32, 32, 3), num, seed)
    return images, np.arange(num, dtype=np.int32) % 10


@pytest.fixture(scope="module")
def photograph_run(tmp_path_factory):
    """A run on sets under the names of CIFAR-10 and what belongs to it."""
    folder = tmp_path_factory.mktemp("photographs")
    tfds = folder / "tfds"
    prepare_photographs(
        tfds, "cifar10", train=photographs(60, 0), test=photographs(40, 1)
    )
    prepare_photographs(tfds, "cifar10_1/v6", test=photographs(30, 2))
    prepare_photographs(tfds, "cifar10_corrupted/fog_3", test=photographs(40, 3))
    prepare_photographs(tfds, "svhn_cropped", train=photographs(5, 4),
                        test=photographs(20, 5))  # fmt: skip
    config = TINY.replace(
        data="cifar10",
        data_dir=str(tfds),
        cache_dir=str(folder / "cache"),
        batch_size=20,
        steps=2,
    )
    training.train(config, output=folder / "run", show_progress=False)
    return folder / "run", config


@pytest.mark.slow
def test_the_command_reads_what_is_prepared_and_names_what_is_not(
    photograph_run, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    folder, config = photograph_run
    cli.main(["shift", str(folder), "--corruptions", "rotation", "contrast",
              "--severities", "1", "3", "--quiet", "--overwrite"])  # fmt: skip
    shown = capsys.readouterr().out
    record = json.loads((folder / "shift.json").read_text(), parse_constant=pytest.fail)
    assert record["step"] == 2 and record["split"] == "test"
    assert [row["severity"] for row in record["corruptions"]] == [1, 3, 1, 3]
    by_name = {row["name"]: row for row in record["sets"]}
    assert {n: row["num_examples"] for n, row in by_name.items()} == {
        "cifar10_1/v6": 30,
        "cifar10_corrupted/fog_3": 40,
    }
    dataset = programs.load_data(config)
    compiled = programs.compile_programs(config, dataset)
    restored = training_state(folder)
    for name, seed in (("cifar10_1/v6", 2), ("cifar10_corrupted/fog_3", 3)):
        num = by_name[name]["num_examples"]
        other = dataclasses.replace(dataset, test=data.Split(*photographs(num, seed)))
        want = evaluation.evaluate(config, restored, other, programs=compiled).metrics
        for metric, value in want.items():
            assert by_name[name][metric] == pytest.approx(value, abs=1e-6), metric
    ood = {(row["name"], row["score"]): row["num_examples"] for row in record["ood"]}
    assert ood == {
        (name, score): num
        for name, num in (("svhn_cropped", 20), ("uniform_noise", 40))
        for score in ("confidence", "entropy")
    }
    missing = {row["name"]: row["why"] for row in record["missing"]}
    assert set(missing) == {"cifar10_1/v4", "cifar10_corrupted", "cifar100"}
    assert "tfds.builder('cifar100'" in missing["cifar100"]
    # At the severities that were asked for; fog_3 alone is there.
    assert missing["cifar10_corrupted"].startswith("29 of its sets")
    for text in ("rotation", "CIFAR-10-C", "cifar10_1/v6", "svhn_cropped",
                 "Missing: cifar100", "Written: "):  # fmt: skip
        assert text in shown, text
    assert (folder / "shift.png").stat().st_size > 10_000


def training_state(folder):
    from otmdr_jax.experiments import restore

    return restore.open_run(folder).state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sets", "cifar10_1/v4"], "'cifar10_1/v4' must be prepared"),
        (["--ood", "cifar100"], "'cifar100' must be prepared"),
        (["--sets", "digits"], "images of 'digits' are (8, 8, 1)"),
        (["--severities", "6"], "severity must be one of 1, 2, 3, 4, 5"),
    ],
)
def test_what_was_asked_for_must_be_there(photograph_run, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["shift", str(photograph_run[0]), "--quiet", "--overwrite", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_sets_of_other_classes_are_no_test_sets(photograph_run, tmp_path):
    config = photograph_run[1]
    dataset = programs.load_data(config)
    of_five = dataclasses.replace(dataset, num_classes=5)
    with pytest.raises(ValueError, match="classes of 'svhn_cropped' are 10, .* 5"):
        sets.find_sets(["svhn_cropped"], [1], of_five, config.data.data_dir)
    images, labels = photographs(6, 0)
    np.savez(tmp_path / "six.npz", test_images=images, test_labels=labels)
    path = str(tmp_path / "six.npz")
    assert sets.find_sets([path], [1], dataset, None).present == [(path, 6)]
    with pytest.raises(ValueError, match="are 6, .* 5"):
        sets.find_sets([path], [1], of_five, None)


def test_the_same_classes_in_another_order_are_refused(photograph_run, tmp_path):
    """Their labels would be compared with those of other classes."""
    names = tuple("abcdefghij")
    dataset = programs.load_data(photograph_run[1])
    dataset = dataclasses.replace(dataset, class_names=names)
    images, labels = photographs(20, 0)
    for i, order in enumerate((names, names[::-1])):
        pair = images, labels % 10
        mine = data.from_arrays(pair, pair, class_names=order)
        data.save(mine, tmp_path / f"{i}.npz")
    same, other = (str(tmp_path / f"{i}.npz") for i in (0, 1))
    assert sets.find_sets([same], [1], dataset, None).present == [(same, 20)]
    with pytest.raises(ValueError, match="another order, got j, .* and a, b"):
        sets.find_sets([other], [1], dataset, None)
    # As a foreign set its labels are not looked at.
    assert sets.find_ood([other], dataset, None).present == [(other, 20)]


def test_a_dtype_is_checked_before_anything_is_computed(photograph_run, tmp_path):
    config = photograph_run[1]
    dataset = programs.load_data(config)
    images, labels = photographs(6, 0)
    path = str(tmp_path / "halves.npz")
    halves = (images / 255).astype(np.float16)
    np.savez(path, test_images=halves, test_labels=labels)
    for options in ({"other_sets": [path]}, {"ood": [path]}):
        with pytest.raises(TypeError, match="halves.npz' are float32, .* uint8"):
            # No programs: what would predict fails in another way.
            shift.evaluate(config, None, dataset, object(), **options)
    # Of "auto" such sets are missing; of a run on floats all of TFDS are.
    floats = data.Split(dataset.test.images / np.float32(255), dataset.test.labels)
    of_floats = dataclasses.replace(dataset, test=floats)
    found = sets.find_sets(["auto"], [3], of_floats, config.data.data_dir)
    missing = {row["name"]: row["why"] for row in found.missing}
    assert not found.present
    assert (
        "are uint8, but the model was trained on float32" in (missing["cifar10_1/v6"])
    )
    found = sets.find_ood(["auto"], of_floats, config.data.data_dir)
    assert [name for name, _ in found.present] == ["uniform_noise"]


@pytest.mark.slow
def test_a_record_of_other_settings_is_not_replaced(
    photograph_run, capsys, monkeypatch
):
    folder, _ = photograph_run
    path = folder / "shift.json"

    def otmdr(*options):
        cli.main(["shift", str(folder), "--quiet", "--sets", "--corruptions", *options])

    def refused(*options):
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(shift, "evaluate", lambda *a, **k: pytest.fail("evaluated"))
            with pytest.raises(SystemExit):
                otmdr(*options)
        assert path.read_bytes() == before
        return capsys.readouterr().err

    quick = ("--ood", "uniform_noise", "--max-examples", "10")
    otmdr(*quick, "--overwrite")
    settings = json.loads(path.read_text())["settings"]
    assert settings == {
        "step": 2, "corruptions": [], "severities": [1, 2, 3, 4, 5], "sets": [],
        "ood": ["uniform_noise"], "max_examples": 10, "seed": 0,
    }  # fmt: skip
    otmdr(*quick)  # the same: replaced freely
    text = refused("--ood", "uniform_noise")
    assert "max_examples: 10, now None" in text and "--overwrite" in text
    # Another step, and a record that says nothing.
    path.write_text(json.dumps({"settings": {**settings, "step": 1}}))
    assert "step: 1, now 2" in refused(*quick)
    for content in ("{}", "[1]", "{"):
        path.write_text(content)
        assert "does not say of which settings" in refused(*quick)
    otmdr(*quick, "--overwrite")
    assert json.loads(path.read_text())["settings"] == settings


def test_what_a_test_split_is_can_be_told_without_reading_it(photograph_run):
    config = photograph_run[1]
    found = data.describe_test("cifar10_1/v6", data_dir=config.data.data_dir)
    assert found[:4] == (30, (32, 32, 3), 10, np.uint8)
    assert found.class_names == tuple("0123456789")  # TFDS makes them up


def test_the_commands_corruptions_are_all_there_are():
    assert cli.shift.CORRUPTIONS == data.CORRUPTIONS


# -- reports --


def record_of(scale=1.0, names=("contrast", "rotation"), levels=(1, 2, 5)):
    def values(x):
        return {"accuracy": 1 - scale * x, "nll": scale * x, "ece": x / 10}

    rows = [
        {"name": name, "severity": s, **values((i + 1) * s / 20)}
        for i, name in enumerate(names)
        for s in levels
    ]
    return {"step": 7, "num_examples": 9, "clean": values(0.0), "sets": [],
            "corruptions": rows, "ood": [],
            "missing": []}  # fmt: skip


def lines_of(ax):
    return {line.get_gid(): line.get_xydata() for line in ax.lines}


def test_the_figure_shows_each_corruption_and_their_mean():
    pytest.importorskip("matplotlib")
    records = [("A", record_of()), ("B", record_of(0.5, levels=(1, 5)))]
    accuracy, nll, _ = report.shift_figure(records).axes
    assert set(lines_of(accuracy)) == {
        f"{name}:{label}"
        for name in ("mean", "contrast", "rotation")
        for label in ("A", "B")
    }
    want = [[0, 100.0], [1, 92.5], [2, 85.0], [5, 62.5]]
    np.testing.assert_allclose(lines_of(accuracy)["mean:A"], want)
    want = [[0, 0.0], [1, 0.05], [5, 0.25]]
    np.testing.assert_allclose(lines_of(nll)["rotation:B"], want)
    third = [*records, ("C", record_of(0.7))]
    accuracy = report.shift_figure(third).axes[0]
    assert set(lines_of(accuracy)) == {"mean:A", "mean:B", "mean:C"}
    # The mean is of what all corruptions have.
    uneven = record_of()
    uneven["corruptions"].pop()
    (ax, *_) = report.shift_figure([("A", uneven)]).axes
    assert lines_of(ax)["mean:A"][:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="needs a record with corruptions"):
        report.shift_figure([("A", record_of(names=()))])


def test_the_figure_goes_into_a_file(tmp_path):
    path = report.plot_shift([("A", record_of())], tmp_path / "shift.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_tables_have_accuracies_by_severity_and_means(capsys):
    record = record_of()
    record["corruptions"][1]["nll"] = None  # a diverged state's, in JSON
    record["sets"] = [
        {"name": "cifar10_corrupted/jpeg_compression_4:1.0.0", "num_examples": 10,
         "accuracy": 0.25, "nll": 2.0, "ece": 0.5},
        {"name": "mine.npz", "num_examples": 7, "accuracy": 0.5, "nll": 1.0,
         "ece": 0.25},
    ]  # fmt: skip
    record["ood"] = [ood_row("entropy", 0.75)]
    record["missing"] = [{"name": "svhn_cropped", "why": "not there"}]
    header, lines = tables.corruption_table(record)
    assert header == ["Corruption", "1", "2", "5", "Accuracy (%)", "NLL (nats)", "ECE"]
    assert lines == [
        ["clean", "", "", "", "100.00", "0.0000", "0.0000"],
        ["contrast", "95.00", "90.00", "75.00", "86.67", "-", "0.0133"],
        ["rotation", "90.00", "80.00", "50.00", "73.33", "0.2667", "0.0267"],
        ["mean", "92.50", "85.00", "62.50", "80.00", "-", "0.0200"],
    ]
    _, lines = tables.published_table(record)
    assert lines == [["jpeg compression", "25.00", "25.00", "2.0000", "0.5000"]]
    _, lines = tables.set_table(record)
    assert lines == [["mine.npz", "7", "50.00", "1.0000", "0.2500"]]
    _, lines = tables.ood_table({"A": record})
    assert lines == [["A", "noise", "9", "entropy", "0.7500", "0.5000", "-"]]
    header, lines = tables.summary_table({"A": record_of()})
    assert header[1:3] == ["Clean accuracy (%)", "Corrupted accuracy (%)"]
    assert lines == [["A", "100.00", "80.00", "0.2000", "0.0200"]]
    report.print_shift(record, "Title")
    shown = capsys.readouterr().out
    for text in ("Title", "rotation", "CIFAR-10-C", "mine.npz", "entropy",
                 "Missing: svhn_cropped: not there"):  # fmt: skip
        assert text in shown


def ood_row(score, auroc):
    return {"name": "noise", "num_examples": 9, "score": score, "auroc": auroc,
            "aupr": 0.5, "fpr95": None}  # fmt: skip


def test_a_mean_record_is_of_what_all_runs_have():
    first, second = record_of(), record_of(0.5, levels=(1, 5))
    first["ood"] = [ood_row("entropy", 0.75), ood_row("confidence", 0.5)]
    second["ood"] = [ood_row("entropy", 0.25)]
    second["clean"]["epistemic"] = 0.1
    found = tables.mean_record([first, second])
    assert found["clean"] == record_of()["clean"]
    rows = {(row["name"], row["severity"]): row for row in found["corruptions"]}
    assert list(rows) == [(n, s) for n in ("contrast", "rotation") for s in (1, 5)]
    assert rows["rotation", 5]["nll"] == pytest.approx((0.5 + 0.25) / 2)
    assert rows["contrast", 1]["ece"] == pytest.approx(0.005)
    assert found["ood"] == [ood_row("entropy", 0.5)]
    second["clean"]["nll"] = None
    assert tables.mean_record([first, second])["clean"]["nll"] is None


def test_a_report_shows_the_shift_of_several_methods(photograph_run, tmp_path):
    folder, _ = photograph_run
    run = report.read_run(folder, "Mine")
    record = {**record_of(), "ood": [ood_row("entropy", 0.75)]}
    record["step"] = run.result["steps"]
    (folder / "shift.json").write_text(json.dumps(record))
    found = page.compose("Title", [run], report.summarise([run]), whole=True)
    text = found.text.split("## Shift")[1].split("## Sharpness")[0]
    assert "![Accuracy, NLL and ECE against the severity of corruptions]" in text
    axes = found.pictures["shift"].figure().axes
    assert set(lines_of(axes[0])) == {"mean:Mine", "contrast:Mine", "rotation:Mine"}
    assert "| Mine | 100.00 | 80.00 | 0.2000 | 0.0200 |" in text
    assert "| contrast | 86.67 |" in text
    assert "| Mine | noise | 9 | entropy | 0.7500 |" in text
    assert "otmdr shift RUN" not in text
    (folder / "shift.json").unlink()
    found = page.compose("Title", [run], report.summarise([run]), whole=True)
    text = found.text.split("## Shift")[1].split("## Sharpness")[0]
    assert "otmdr shift RUN" in text and "shift" not in found.pictures


@pytest.mark.slow
def test_the_uncertainty_of_a_posterior_is_in_its_record(small):
    """What bnn.uncertainty says of samples is what the record's means are of."""
    config = TINY.replace(**KINDS["a posterior"])
    compiled, state = state_of(config, small)
    record = shift.evaluate(
        config, state, small, compiled, corruptions=["contrast"], severities=[5]
    )
    key = jax.random.fold_in(jax.random.key(0), data.CORRUPTIONS.index("contrast"))
    images = data.corrupt(key, small.test.images, "contrast", 5)
    want = bnn.uncertainty(compiled.predict(state, images))
    (row,) = record["corruptions"]
    assert row["epistemic"] == pytest.approx(float(want.epistemic.mean()), abs=1e-5)
    assert row["aleatoric"] == pytest.approx(float(want.aleatoric.mean()), rel=1e-5)


@pytest.mark.slow
def test_a_mesh_of_devices_predicts_the_same_of_corrupted_images(small):
    config = TINY.replace(mesh="data=4", eval_batch_size=32)
    mesh = programs.make_mesh(config)
    spread = programs.compile_programs(config, small, mesh)
    compiled, state = state_of(TINY, small)
    change = shift.evaluation._corruption("gaussian_noise", 5, 1)
    want = prediction.predict(TINY, state, small.test, compiled, change=change)
    everywhere = spread.init(programs.run_keys(config.run.seed)[0])
    got = prediction.predict(config, everywhere, small.test, spread, change=change)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 3])
def test_members_that_agree_have_no_information(samples):
    """Rounding does not rank examples: chance is exactly a half."""
    rng = np.random.default_rng(0)

    def predicted(count):
        logits = rng.normal(size=(count, 5))
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        within = None
        if samples > 1:
            within = np.stack([metrics.entropy(np.exp(log_probs))] * 3)
        members = np.stack([log_probs] * 3)
        mean = prediction._mean(members)
        return prediction.Predicted(mean, members, within, [0, 1, 2])

    inside, outside = (
        detection.scores(predicted(count))["mutual_information"] for count in (200, 300)
    )
    assert not inside.any() and not outside.any()
    assert detection.detect(inside, outside)["auroc"] == 0.5
