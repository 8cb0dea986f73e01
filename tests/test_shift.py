"""Shifted test sets: corruptions against SciPy, PIL and NumPy, sets read for real."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otmdr_jax import data
from otmdr_jax.data import corruptions
from tests.sets import gray_examples, gray_features, real_cifar10

KEYS = ("picture", "kind")
SHAPES = [(8, 8, 1), (32, 32, 3), (11, 20, 2), (64, 48, 3)]


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("severity", data.SEVERITIES)
def test_blur_is_scipys(shape, severity):
    ndimage = pytest.importorskip("scipy.ndimage")
    images = images_of(shape)
    std = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1] * max(1.0, min(shape[:2]) / 32)
    want = ndimage.gaussian_filter(
        levels(images), (0, std, std, 0), mode="nearest", truncate=4.0
    )
    assert_rounded(corrupt(images, "gaussian_blur", severity), want)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] != 2], ids=str)
@pytest.mark.parametrize("severity", data.SEVERITIES)
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("severity", data.SEVERITIES)
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("severity", data.SEVERITIES)
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


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3)], ids=str)
@pytest.mark.parametrize("severity", data.SEVERITIES)
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
    first, second = noise[:-1].ravel(), noise[1:].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(first.size)
    black = corrupt(np.zeros((num, *shape), np.uint8), "gaussian_noise", severity)
    assert abs((black == 0).mean() - stats.norm.cdf(0.5 / 255 / std)) < 0.02


# -- all kinds --


@pytest.mark.parametrize("shape", SHAPES, ids=str)
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
def test_one_program_serves_all_severities_and_positions(name):
    clean = images_of((9, 9, 1))
    corrupt(clean, name, 1)
    before = corruptions._corrupt._cache_size()
    for severity in (2, 5, np.int64(3), jnp.int32(4)):
        corrupt(clean, name, severity, first=7)
    assert corruptions._corrupt._cache_size() == before
    inside = jax.jit(lambda s: data.corrupt(jax.random.key(0), clean, name, s))
    # Another program may round a half to the other side.
    for severity, same in ((4, 4), (9, 5)):  # out of range: the nearest
        got, want = np.asarray(inside(severity)), corrupt(clean, name, same)
        np.testing.assert_allclose(levels(got), levels(want), atol=1.0)
        assert np.mean(got == want) > 0.9


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


@pytest.mark.parametrize("name", ["contrast", "pixelate", "gaussian_blur", "rotation"])
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
    with pytest.raises(ValueError, match="gaussian_noise, gaussian_blur, .*; got 'fog"):
        corrupt(images, "fog", 1)
    with pytest.raises(ValueError, match=r"\(B, H, W, C\), got \(8, 8, 1\)"):
        corrupt(images[0], "contrast", 1)
    with pytest.raises(TypeError, match="uint8 .* got int32"):
        corrupt(images.astype(np.int32), "contrast", 1)


def test_sizes_of_pixelation():
    assert corruptions.sizes(32) == [30, 28, 27, 24, 20]  # CIFAR-10-C's
    assert corruptions.sizes(8) == [7, 6, 5, 4, 3]
    assert corruptions.sizes(3) == [2, 1, 1, 1, 1]


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
    given = {"train": gray_examples(5), "test": gray_examples(4)}
    where = prepare("BothSplits", gray_features, given, KEYS)
    whole = data.load("both_splits", **where)
    for _ in range(2):
        split, _ = data.load_test("both_splits", **where)
        np.testing.assert_array_equal(split.images, whole.test.images)
        data.load("both_splits", **where)
    assert len(list(where["cache_dir"].iterdir())) == 2
    assert not caplog.records


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
    np.savez(tmp_path / "bad.npz", test_images=images, train_labels=labels)
    with pytest.raises(ValueError, match="test_images, test_labels or x_test, y_test"):
        data.load_test(tmp_path / "bad.npz")
    np.savez(tmp_path / "short.npz", test_images=images, test_labels=labels[:3])
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        data.load_test(tmp_path / "short.npz")
    split, classes = data.load_test("digits")
    np.testing.assert_array_equal(split.labels, data.load("digits").test.labels)
    assert classes == 10
