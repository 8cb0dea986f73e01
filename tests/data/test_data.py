"""Data: against independent NumPy code, real files, and every way they can be broken.

The CIFAR-10 tests need the folder `shared` beside the checkout, whose tool prepares a
small TFDS copy of the real images without network; elsewhere they are skipped.
"""

import io
import json
import os
import signal
import types
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otmdr_jax import data
from otmdr_jax.data import cache, dataset, device, prepared, records, sources
from otmdr_jax.io import progress
from tests.sets import PER_CLASS, SHARED, gray_examples, gray_features, run_python


def random_split(seed=0, num=60, shape=(6, 5, 3), num_classes=4):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, *shape), dtype=np.uint8)
    return images, rng.permutation(np.arange(num) % num_classes)


# -- arrays ---------------------------------------------------------------------------


def test_from_arrays_keeps_pixels_and_casts_labels():
    train, test = random_split(0), random_split(1, num=20)
    made = data.from_arrays(train, test)
    np.testing.assert_array_equal(made.train.images, train[0])
    np.testing.assert_array_equal(made.train.labels, train[1])
    np.testing.assert_array_equal(made.test.images, test[0])
    assert made.train.images is train[0]
    assert made.train.labels.dtype == made.test.labels.dtype == np.int32
    assert made.validation is None
    assert (made.num_classes, made.image_shape) == (4, (6, 5, 3))
    assert (made.train.num_examples, made.test.num_examples) == (60, 20)
    assert repr(made) == (
        "Dataset('arrays': 60 train, 20 test, 6x5x3 uint8, 4 classes)"
    )
    with pytest.raises(AttributeError):
        made.name = "other"


def test_gray_images_get_a_channel_and_column_labels_are_squeezed():
    images, labels = random_split(shape=(6, 5))
    made = data.from_arrays((images, labels[:, None]), (images, labels))
    assert made.image_shape == (6, 5, 1)
    np.testing.assert_array_equal(made.train.images[..., 0], images)
    np.testing.assert_array_equal(made.train.labels, labels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_images_become_float32(dtype):
    images, labels = random_split()
    floats = images.astype(dtype) / 8
    made = data.from_arrays((floats, labels), (floats, labels))
    assert made.train.images.dtype == np.float32
    np.testing.assert_array_equal(made.train.images, floats.astype(np.float32))


@pytest.mark.parametrize("num", [1, 700, 2500])  # within one block and over several
def test_statistics_are_numpys_float64_ones(num):
    images, labels = random_split(num=num)
    made = data.from_arrays((images, labels), (images, labels))
    unit = images.astype(np.float64) / 255
    np.testing.assert_allclose(made.mean, unit.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(made.std, unit.std(axis=(0, 1, 2)), rtol=1e-12)
    made = data.from_arrays((unit * 9, labels), (unit, labels))
    kept = (unit * 9).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(made.mean, kept.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(made.std, kept.std(axis=(0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 7e8])
def test_a_constant_channel_has_std_one(value):
    images, labels = random_split()
    images = images.astype(np.float32)
    images[..., 1] = value
    images[::2, ..., 1] = np.nextafter(np.float32(value), np.float32(np.inf))
    made = data.from_arrays((images, labels), (images, labels))
    assert made.std[1] == 1.0
    assert made.std[0] > 1.0
    out = data.normalise(images, made.mean, made.std)
    assert np.isfinite(out).all()
    assert np.abs(out[..., 1]).max() <= 1e-6 * max(value, 1.0)


def test_statistics_are_of_the_examples_that_remain_for_training():
    train = random_split()
    made = data.from_arrays(train, train, validation=20)
    unit = made.train.images / 255.0
    np.testing.assert_allclose(made.mean, unit.mean(axis=(0, 1, 2)), rtol=1e-12)


def test_given_statistics_win_and_may_be_arrays():
    train = random_split()
    made = data.from_arrays(train, train, mean=np.array([0.1, 0.2, 0.3]))
    assert made.mean == (0.1, 0.2, 0.3)
    np.testing.assert_allclose(made.std, (train[0] / 255).std(axis=(0, 1, 2)))


def test_class_names_are_kept_and_count_the_classes():
    train = random_split()  # labels 0..3
    names = np.array(["cat", "dog", "owl", "fox", "elk"])
    made = data.from_arrays(train, train, class_names=names)
    assert made.class_names == ("cat", "dog", "owl", "fox", "elk")
    assert type(made.class_names[0]) is str and made.num_classes == 5
    assert data.from_arrays(train, train).class_names is None
    for wrong, message in (
        (["cat", "dog", "owl"], r"train labels must be 0\.\.2"),
        ("cats", "must be texts.*'cats'"),
        (["cat", "dog", "owl", 3], "must be texts"),
    ):
        with pytest.raises(ValueError, match=message):
            data.from_arrays(train, train, class_names=wrong)
    with pytest.raises(ValueError, match="must be 4 texts.*got 5: cat, dog"):
        data.from_arrays(train, train, num_classes=4, class_names=names)


def replaced(pair, images=None, labels=None):
    return (
        pair[0] if images is None else images,
        pair[1] if labels is None else labels,
    )


GOOD = random_split()
NANS = GOOD[0].astype(np.float32)
NANS[7, 0, 0, 0] = np.nan
BAD_ARRAYS = {
    "lengths": (replaced(GOOD, labels=GOOD[1][:-1]), "60 images and 59 labels"),
    "empty": ((GOOD[0][:0], GOOD[1][:0]), "must not be empty"),
    "rank": (replaced(GOOD, images=GOOD[0][0, 0]), r"\(N, H, W, C\)"),
    "int images": (replaced(GOOD, images=GOOD[0].astype(int)), r"astype\(np.uint8\)"),
    "bool images": (replaced(GOOD, images=GOOD[0] > 9), "got bool"),
    "nan": (replaced(GOOD, images=NANS), "1 of 60 images, the first at index 7"),
    "overflow": (replaced(GOOD, images=GOOD[0] * 1e300), "finite in float32"),
    "float labels": (replaced(GOOD, labels=GOOD[1] * 1.0), "got dtype float64"),
    "one-hot": (replaced(GOOD, labels=np.eye(4)[GOOD[1]]), "argmax"),
    "negative": (replaced(GOOD, labels=GOOD[1] - 1), r"got -1\.\.2"),
    "huge": (replaced(GOOD, labels=GOOD[1].astype(np.uint64) + 2**63), "num_classes="),
    "no pair": (GOOD[0], "pair"),
    "other shape": (replaced(GOOD, images=GOOD[0][:, 1:]), r"\(5, 5, 3\)"),
    "other dtype": (replaced(GOOD, images=GOOD[0] / 255), "train .*float32"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_unfit_arrays_are_refused_with_advice(case):
    pair, message = BAD_ARRAYS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        data.from_arrays(pair, GOOD, num_classes=4)
    with pytest.raises((ValueError, TypeError), match="test"):
        data.from_arrays(GOOD, pair, num_classes=4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_classes": 3}, r"0\.\.2 .*got 0\.\.3"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": 2.5}, "num_classes=2.5"),
        ({"validation": 60}, r"count in 0\.\.59"),
        ({"validation": -1}, "validation=-1"),
        ({"validation": 1.0}, "fraction in"),
        ({"validation": True}, "validation=True"),
        ({"validation": float("nan")}, "validation=nan"),
        ({"label_noise": 20}, "For 20 % pass 0.2"),
        ({"label_noise": -0.1}, "label_noise=-0.1"),
        ({"label_noise": "0.1"}, "label_noise='0.1'"),
        ({"seed": -3}, "seed=-3"),
        ({"mean": (0.5,)}, "mean must be 3 finite numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"std": (1.0, np.inf, 1.0)}, "std must be 3 finite"),
        ({"augment": ("crop", "cutout")}, r"\('crop', 'flip'\), got 'cutout'"),
    ],
)
def test_unfit_options_are_refused_with_advice(option, message):
    with pytest.raises(ValueError, match=message):
        data.from_arrays(GOOD, GOOD, **option)


def test_label_noise_needs_a_second_class():
    pair = GOOD[0], np.zeros(60, int)
    with pytest.raises(ValueError, match="another class"):
        data.from_arrays(pair, pair, label_noise=0.5)


# -- validation and label noise -------------------------------------------------------


def tagged(num, num_classes=5, seed=3):
    """Images whose pixels say which example they are, with uneven classes."""
    tags = np.arange(num, dtype=np.uint16).view(np.uint8).reshape(num, 1, 2, 1)
    rng = np.random.default_rng(seed)
    labels = rng.choice(num_classes, num, p=np.arange(1, 1 + num_classes) / 15)
    return tags, labels


def tags_of(split):
    return np.ascontiguousarray(split.images).reshape(-1).view(np.uint16)


@pytest.mark.parametrize(
    ("validation", "count"), [(100, 100), (0.1, 50), (1, 1), (499, 499), (0.25, 125)]
)
def test_validation_is_disjoint_stratified_and_of_the_size_asked(validation, count):
    images, labels = tagged(500)
    made = data.from_arrays(
        (images, labels), (images, labels), validation=validation, seed=7
    )
    held, kept = tags_of(made.validation), tags_of(made.train)
    assert len(held) == count
    assert sorted([*held, *kept]) == list(range(500))
    np.testing.assert_array_equal(made.validation.labels, labels[held])
    np.testing.assert_array_equal(made.train.labels, labels[kept])
    share = np.bincount(labels, minlength=5) * count / 500
    assert np.abs(np.bincount(labels[held], minlength=5) - share).max() < 1
    np.testing.assert_array_equal(made.test.labels, labels)


def test_zero_validation_is_none():
    assert data.from_arrays(GOOD, GOOD, validation=0.0).validation is None


def test_the_seed_decides_validation_and_noise_apart_from_each_other():
    pair = tagged(500)

    def make(seed, noise=0.0):
        made = data.from_arrays(pair, pair, validation=50, label_noise=noise, seed=seed)
        return tags_of(made.validation).tolist(), made.train.labels.tolist()

    assert make(1, 0.3) == make(1, 0.3)
    assert make(1)[0] == make(1, 0.3)[0]
    assert make(1)[0] != make(2)[0]
    assert make(1, 0.3)[1] != make(2, 0.3)[1]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.333, 1.0])
def test_label_noise_changes_exactly_the_fraction(fraction):
    images, labels = tagged(500)
    before = labels.copy()
    made = data.from_arrays(
        (images, labels), (images, labels), label_noise=fraction, num_classes=6
    )
    assert (made.train.labels != labels).sum() == round(fraction * 500)
    assert made.train.labels.min() >= 0 and made.train.labels.max() <= 5
    np.testing.assert_array_equal(made.test.labels, labels)
    np.testing.assert_array_equal(labels, before)  # the caller's array


def test_label_noise_spares_validation_and_is_uniform_over_other_classes():
    images, _ = tagged(6000)
    labels = np.zeros(6000, int)
    made = data.from_arrays(
        (images, labels),
        (images, labels),
        validation=1000,
        label_noise=0.8,
        num_classes=5,
    )
    assert not made.validation.labels.any()
    counts = np.bincount(made.train.labels, minlength=5)
    assert counts[0] == 1000
    # 4000 draws over 4 classes: a standard deviation is 27.
    assert np.abs(counts[1:] - 1000).max() < 5 * 27


# -- digits and .npz ------------------------------------------------------------------


def test_digits_are_read_without_scikit_learn_which_is_the_way_out(monkeypatch):
    code = """
        import sys
        from otmdr_jax import data
        data.load("digits")
        assert "sklearn" not in sys.modules
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    direct = sources._sklearn_digits()
    spec = types.SimpleNamespace(submodule_search_locations=["nowhere"])
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: spec)
    for mine, theirs in zip(direct, sources._sklearn_digits(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_digits_are_scikit_learns_split_once_and_for_all():
    from sklearn.datasets import load_digits

    made, other = data.load("digits"), data.load("digits", seed=5)
    assert made.train.images.shape == (1437, 8, 8, 1)
    assert made.test.images.shape == (360, 8, 8, 1)
    assert (made.num_classes, made.augment) == (10, ())
    assert made.class_names == tuple("0123456789")
    np.testing.assert_array_equal(made.test.images, other.test.images)
    np.testing.assert_array_equal(made.train.images, other.train.images)

    def rows(images, labels):
        flat = np.round(images.reshape(len(labels), 64)).astype(int)
        return sorted(map(tuple, np.concatenate([flat, labels[:, None]], 1).tolist()))

    bunch = load_digits()
    ours = [
        np.concatenate(arrays) for arrays in zip(made.train, made.test, strict=True)
    ]
    assert rows(ours[0] * (16 / 255), ours[1]) == rows(bunch.images, bunch.target)
    assert made.train.images.max() == 255
    share = np.bincount(bunch.target) * 360 / 1797
    assert np.abs(np.bincount(made.test.labels) - share).max() < 1


@pytest.mark.parametrize("keras", [False, True])
def test_npz_with_either_set_of_names(tmp_path, keras):
    train, test = random_split(0), random_split(1, num=20)
    names = (
        ("x_train", "y_train", "x_test", "y_test")
        if keras
        else ("train_images", "train_labels", "test_images", "test_labels")
    )
    path = tmp_path / "mine.npz"
    arrays = dict(zip(names, (*train, *test), strict=True))
    np.savez_compressed(path, **arrays)
    for given in (path, str(path)):
        made = data.load(given, validation=12, seed=2)
        assert made.name == "mine"
        assert made.validation.num_examples == 12
        np.testing.assert_array_equal(made.test.images, test[0])
        np.testing.assert_array_equal(made.test.labels, test[1])


@pytest.mark.parametrize("name", ["validation_{}s", "val_{}s", "{}_val", "{}_valid"])
def test_npz_with_a_validation_set_of_its_own(tmp_path, name):
    parts = [random_split(seed, num=20 + seed) for seed in range(3)]
    images, labels = ("x", "y") if name.startswith("{}") else ("image", "label")
    held_out = name.format(images), name.format(labels)
    names = "x_train", "y_train", "x_test", "y_test", *held_out
    arrays = zip(names, (x for part in parts for x in part), strict=True)
    np.savez(path := tmp_path / "mine.npz", **dict(arrays))
    made = data.load(path, label_noise=0.5)
    for split, part in zip((made.test, made.validation), parts[1:], strict=True):
        np.testing.assert_array_equal(split.images, part[0])
        np.testing.assert_array_equal(split.labels, part[1])
    assert made.train.num_examples == 20
    with pytest.raises(ValueError, match="validation set of its own.*validation=0.1"):
        data.load(path, validation=0.1)


def test_npz_without_a_test_set_leaves_a_fifth_of_training(tmp_path):
    images, labels = random_split(0, num=100)
    np.savez(path := tmp_path / "mine.npz", x_train=images, y_train=labels)
    with pytest.warns(UserWarning, match="20 of its 100 .*seed=3"):
        made = data.load(path, seed=3, label_noise=0.5, validation=8)
    sizes = made.train.num_examples, made.validation.num_examples
    assert (*sizes, made.test.num_examples) == (72, 8, 20)
    parts = made.train, made.validation, made.test
    # Each example is in one part, those of test with their own labels.
    found = sorted(image.tobytes() for part in parts for image in part.images)
    assert found == sorted(image.tobytes() for image in images)
    own = dict(zip((image.tobytes() for image in images), labels, strict=True))
    for image, label in zip(made.test.images, made.test.labels, strict=True):
        assert own[image.tobytes()] == label
    share = np.bincount(labels) / 5
    assert np.abs(np.bincount(made.test.labels, minlength=4) - share).max() < 1
    with pytest.warns(UserWarning):
        again = data.load(path, seed=3)
    np.testing.assert_array_equal(again.test.images, made.test.images)


def test_npz_arrays_that_are_not_used_are_named(tmp_path):
    names = "x_train", "y_train", "x_test", "y_test"
    arrays = dict(zip(names, 2 * GOOD, strict=True))
    np.savez(path := tmp_path / "mine.npz", **arrays, extra=np.zeros(3))
    with pytest.warns(UserWarning, match="also holds extra, which"):
        data.load(path)
    with pytest.warns(UserWarning, match="also holds extra, which"):
        data.load_test(path)


@pytest.mark.parametrize(
    ("shape", "refused"),
    [
        ((60, 3, 32, 32), "like .N, C, H, W"),
        ((60, 1, 28, 28), "like .N, C, H, W"),
        ((60, 3, 5, 7), "like .N, C, H, W"),
        ((3, 32, 32), "one image .C, H, W"),
        ((1, 28, 28), "one image .C, H, W"),
        ((60, 3, 32, 4), None),
        ((60, 3, 4, 32), None),
        ((60, 4, 32, 32), None),
        ((60, 32, 32, 3), None),
        ((60, 28, 28), None),
    ],
)
def test_channels_are_the_last_axis(shape, refused):
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    pair = images, np.arange(len(images)) % 3
    if refused is None:
        data.from_arrays(pair, pair)
        return
    with pytest.raises(ValueError, match=refused):
        data.from_arrays(pair, pair, num_classes=3)
    if len(shape) == 4:
        # Statistics for each of the last axis' numbers say that they are channels.
        each = np.full(shape[-1], 0.5)
        made = data.from_arrays(pair, pair, mean=each, std=each)
        assert made.image_shape == shape[1:]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([1, 2, 3, 4, 5], [1, 2], r"from 0 to 5.* none is 0\..*num_classes=6"),
        ([0, 10, 20], [0], r"from 0 to 20.* 1, 2, 3, 4, 5, \.\.\. \(18 classes\)"),
        ([0, 1, 2], [0, 3], r"from 0 to 3, .* none is 3\..*num_classes=4"),
        ([0, 2], [0, 1], "none is 1"),
        ([0, 1, 2], [0, 0], None),
    ],
)
def test_labels_show_every_class(train, test, message):
    def split(labels):
        labels = np.repeat(labels, 3)
        return np.zeros((len(labels), 5, 5, 1), np.uint8), labels

    if message is None:
        assert data.from_arrays(split(train), split(test)).num_classes == 3
        return
    with pytest.raises(ValueError, match=message):
        data.from_arrays(split(train), split(test))
    never = sorted(set(test) - set(train))
    if never:
        with pytest.warns(UserWarning, match=f"3 of {3 * len(test)} test .*{never[0]}"):
            made = data.from_arrays(split(train), split(test), num_classes=30)
    else:
        made = data.from_arrays(split(train), split(test), num_classes=30)
    assert made.num_classes == 30


def test_npz_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.npz.*Correct the path"):
        data.load(tmp_path / "absent.npz")
    path = tmp_path / "some.npz"
    np.savez(path, images=np.zeros(3))
    with pytest.raises(ValueError, match=r"x_train, y_train.*holds \['images'\]"):
        data.load(path)
    pickled = np.array([{}], dtype=object)
    np.savez(path, x_train=pickled, y_train=pickled, x_test=pickled, y_test=pickled)
    with pytest.raises(ValueError, match="plain arrays.*np.savez"):
        data.load(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="plain arrays"):
        data.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))  # a single array under an .npz name
    with pytest.raises(ValueError, match="plain arrays"):
        data.load(path)
    names = "x_train", "y_train", "x_test", "y_test"
    np.savez(path, **dict(zip(names, 2 * GOOD, strict=True)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="plain arrays"):
        data.load(path)


# -- on the device --------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
def test_normalise_is_the_formula(jit):
    images, mean, std = GOOD[0], (0.1, 0.5, 0.9), (0.2, 0.3, 2.0)
    function = jax.jit(data.normalise) if jit else data.normalise
    want = (images / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(function(images, mean, std), want, atol=2e-6)
    floats = images.astype(np.float32)
    want = (floats - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(function(floats, mean, std), want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(  # one image, without a batch axis
        function(floats[0], mean, std), want[0], rtol=1e-5, atol=1e-4
    )


def test_normalise_casts_last():
    images = GOOD[0]
    out = data.normalise(images, (0.5,) * 3, (0.01,) * 3, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    exact = ((images / 255.0 - 0.5) / 0.01).astype(np.float32)
    # One rounding to 8 bits; arithmetic in bfloat16 would be off by whole units.
    np.testing.assert_allclose(out.astype(np.float32), exact, rtol=2**-8, atol=1e-3)


def test_normalise_refuses_other_types_and_channel_counts():
    with pytest.raises(TypeError, match="got int32"):
        data.normalise(GOOD[0].astype(np.int32), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match="each of 3 channels"):
        data.normalise(GOOD[0], (0.5,), (0.5,))


def numpy_crop(image, row, column):
    """A loop over pixels: output (y, x) is input (y + row - 4, x + column - 4)."""
    out = np.zeros_like(image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            source = y + row - 4, x + column - 4
            if 0 <= source[0] < height and 0 <= source[1] < width:
                out[y, x] = image[source]
    return out


def test_crop_is_the_numpy_loop_at_every_offset():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (81, 7, 6, 3), dtype=np.uint8)
    offsets = np.stack(np.divmod(np.arange(81), 9), axis=1)
    want = [numpy_crop(i, *o) for i, o in zip(images, offsets, strict=True)]
    got = jax.jit(device.crop_at)(images, offsets)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[40], images[40])  # (4, 4) is the middle


def test_augment_crops_and_flips_each_image_by_its_own_draw():
    # Position-coded pixels: the shift and the mirroring can be read off the output.
    num, side = 3000, 10
    grid = 1 + np.arange(side * side, dtype=np.uint8).reshape(side, side, 1)
    out = np.asarray(
        jax.jit(data.augment, static_argnums=2)(
            jax.random.key(3), np.tile(grid, (num, 1, 1, 1)), ("crop", "flip")
        )
    )
    variants = {}
    for row in range(9):
        for column in range(9):
            cropped = numpy_crop(grid, row, column)
            variants[cropped.tobytes()] = row, column, 0
            variants[cropped[:, ::-1].tobytes()] = row, column, 1
    assert len(variants) == 162
    draws = np.array([variants[image.tobytes()] for image in out])  # KeyError: no crop
    for axis, choices in ((0, 9), (1, 9), (2, 2)):
        counts = np.bincount(draws[:, axis], minlength=choices)
        expected = num / choices
        deviation = np.sqrt(expected * (1 - 1 / choices))
        assert np.abs(counts - expected).max() < 4.5 * deviation
    # Independent of each other: correlations are within 4.5 / sqrt(num).
    correlation = np.corrcoef(draws.T) - np.eye(3)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(num)


@pytest.mark.slow
def test_augment_uses_one_key_for_each_op_and_position(key):
    images = jnp.asarray(GOOD[0])
    crop_keys, flip_keys = (
        jnp.stack([jax.random.fold_in(op_key, i) for i in range(len(images))])
        for op_key in jax.random.split(key)
    )
    want = device.random_flip(flip_keys, device.random_crop(crop_keys, images))
    np.testing.assert_array_equal(data.augment(key, images, ("crop", "flip")), want)
    again = data.augment(key, images, ["crop", "flip"])
    np.testing.assert_array_equal(again, want)
    assert (data.augment(jax.random.key(1), images, ("crop", "flip")) != want).any()
    half = len(images) // 2  # a device's part is augmented as in the whole batch
    part = data.augment(key, images[half:], ("crop", "flip"), first=half)
    np.testing.assert_array_equal(part, want[half:])


def test_augment_with_nothing_and_with_an_unknown_name(key):
    images = GOOD[0].astype(np.float32)
    np.testing.assert_array_equal(data.augment(key, images, ()), images)
    np.testing.assert_array_equal(
        data.augment(key, images, "flip"), data.augment(key, images, ("flip",))
    )
    with pytest.raises(ValueError, match=r"'crop', 'flip'.*got 'cutmix'"):
        data.augment(key, images, ("cutmix",))


def test_every_example_comes_once_in_an_epoch(key):
    images, labels = tagged(103)
    split = jax.device_put(data.Split(images, labels.astype(np.int32)))
    order = data.epoch_order(key, 103)
    assert order.dtype == jnp.int32
    batch = jax.jit(
        chex.assert_max_traces(data.take, n=1), static_argnames="batch_size"
    )
    seen = [batch(split, order, i, batch_size=8) for i in range(103 // 8 + 1)]
    tags = np.concatenate([tags_of(jax.device_get(b)) for b in seen])
    assert len(tags) == 104
    assert sorted(tags[:103]) == list(range(103))
    np.testing.assert_array_equal(tags[:103], order)
    assert tags[103] == tags[0]  # the last batch is filled from the epoch's start
    for b in seen:
        np.testing.assert_array_equal(b.labels, labels[tags_of(jax.device_get(b))])
    assert (data.epoch_order(key, 103) == order).all()
    assert (data.epoch_order(jax.random.key(9), 103) != order).any()
    assert (order != np.arange(103)).any()


@pytest.mark.parametrize("batch_size", [1, 7, 60, 64])
def test_evaluation_counts_every_example_exactly_once(batch_size):
    split = data.Split(*GOOD)
    images, labels, total = [], [], 0
    for x, y, mask in data.eval_batches(split, batch_size):
        assert x.shape == (batch_size, 6, 5, 3) and x.dtype == np.uint8
        assert y.shape == mask.shape == (batch_size,) and mask.dtype == bool
        assert not x[~mask].any() and not y[~mask].any()
        images.append(x[mask])
        labels.append(y[mask])
        total += 1
    assert total == -(-60 // batch_size)
    np.testing.assert_array_equal(np.concatenate(images), split.images)
    np.testing.assert_array_equal(np.concatenate(labels), split.labels)


def test_evaluation_refuses_an_empty_batch_at_once():
    with pytest.raises(ValueError, match="batch_size=0"):
        data.eval_batches(data.Split(*GOOD), 0)


# -- the cache ------------------------------------------------------------------------

IDENTITY = {"name": "some/config", "version": "1.0.0", "fingerprint": "f" * 64}


@pytest.fixture
def stored(tmp_path):
    arrays = {"a": np.arange(5000, dtype=np.uint8), "b": np.arange(7)}
    path = cache.file_path(tmp_path, IDENTITY)
    cache.write(path, IDENTITY, arrays)
    return path, arrays


def assert_reads(path, arrays, identity=IDENTITY):
    got = cache.read(path, identity)
    assert sorted(got) == sorted(arrays)
    for name in arrays:
        np.testing.assert_array_equal(got[name], arrays[name])
        assert got[name].dtype == arrays[name].dtype


def test_cache_gives_back_what_was_stored(stored):
    path, arrays = stored
    assert path.name == f"some-config-1.0.0-v1-{'f' * 16}.npz"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert_reads(path, arrays)
    assert cache.read(path.with_name("absent.npz"), IDENTITY) is None


def test_a_cache_cut_off_anywhere_is_absent(stored, caplog):
    path, _ = stored
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        caplog.clear()
        path.write_bytes(whole[:size])
        assert cache.read(path, IDENTITY) is None
        assert "made again" in caplog.text


def test_a_flipped_byte_is_never_returned(stored):
    path, arrays = stored
    whole = bytearray(path.read_bytes())
    refused = 0
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        if cache.read(path, IDENTITY) is None:
            refused += 1
        else:  # a byte that nothing depends on, such as a time stamp
            assert_reads(path, arrays)
    assert refused > 50


@pytest.mark.parametrize("part", ["name", "version", "fingerprint"])
def test_a_cache_of_other_data_is_absent(stored, caplog, part):
    path, _ = stored
    assert cache.read(path, {**IDENTITY, part: "other"}) is None
    assert "describes other data" in caplog.text


def test_a_cache_of_another_format_or_shape_is_absent(stored, monkeypatch):
    path, arrays = stored
    manifest = np.array(json.dumps(cache._manifest(IDENTITY, arrays)))
    np.savez(path, manifest=manifest, a=arrays["a"])
    assert cache.read(path, IDENTITY) is None
    np.savez(path, manifest=manifest, **arrays)
    assert_reads(path, arrays)
    monkeypatch.setattr(cache, "FORMAT_VERSION", 2)
    assert cache.read(path, IDENTITY) is None
    assert cache.file_path(path.parent, IDENTITY) != path


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache.write(cache.file_path(blocked / "dir", IDENTITY), IDENTITY, {})
    assert "could not be written" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while writing", "before replacing"])
def test_a_killed_writer_leaves_no_cache(tmp_path, moment):
    code = """
        import os, pathlib, signal, sys
        import numpy as np
        from otmdr_jax.data import cache

        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        def half(file, **arrays):
            file.write(b"PK half of it")
            file.flush()
            die()

        if sys.argv[2] == "while writing":
            cache.np.savez = half
        else:
            os.replace = die
        identity = {"name": "x", "version": "1", "fingerprint": "0" * 64}
        path = cache.file_path(pathlib.Path(sys.argv[1]), identity)
        cache.write(path, identity, {"a": np.arange(9)})
    """
    assert run_python(code, tmp_path, moment).returncode == -signal.SIGKILL
    identity = {"name": "x", "version": "1", "fingerprint": "0" * 64}
    path = cache.file_path(tmp_path, identity)
    (leftover,) = tmp_path.iterdir()
    assert leftover.suffix == ".tmp" and not path.exists()
    assert cache.read(path, identity) is None
    cache.write(path, identity, {"a": np.arange(9)})
    assert_reads(path, {"a": np.arange(9)}, identity)
    assert leftover.exists()  # young: it might belong to a writer at work
    os.utime(leftover, (0, 0))
    cache.write(path, identity, {"a": np.arange(9)})
    assert list(tmp_path.iterdir()) == [path]


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("OTMDR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_directory() == tmp_path / ".cache" / "otmdr_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_directory() == tmp_path / "xdg" / "otmdr_jax"
    monkeypatch.setenv("OTMDR_CACHE", str(tmp_path / "own"))
    assert cache.default_directory() == tmp_path / "own"


def test_a_changed_folder_has_a_new_fingerprint(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    path = tmp_path / "train.array_record"
    path.write_bytes(b"12345")
    os.utime(path, (1, 1))
    seen = [cache.fingerprint(tmp_path)]
    assert cache.fingerprint(tmp_path) == seen[0]
    os.utime(path, (2, 2))
    seen.append(cache.fingerprint(tmp_path))
    path.write_bytes(b"123456")
    os.utime(path, (1, 1))
    seen.append(cache.fingerprint(tmp_path))
    path.rename(tmp_path / "test.array_record")
    seen.append(cache.fingerprint(tmp_path))
    (tmp_path / "dataset_info.json").write_text("{ }")
    seen.append(cache.fingerprint(tmp_path))
    assert len(set(seen)) == 5


# -- TFDS: the real CIFAR-10 ----------------------------------------------------------


def no_decoding(monkeypatch):
    def fail(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(prepared, "_decode", fail)


def source_images():
    """The first PER_CLASS images a class and split, decoded straight from the JPEGs."""
    from PIL import Image

    with np.load(SHARED / "data" / "cifar10_jpeg.npz") as file:
        header, scans = file["header"].tobytes(), file["scans"].tobytes()
        offsets, labels, is_test = file["offsets"], file["labels"], file["is_test"]
    result = {}
    for test in (False, True):
        for label in range(10):
            where = np.flatnonzero((labels == label) & (is_test == test))[:PER_CLASS]
            for i in where:
                jpeg = header + scans[offsets[i] : offsets[i + 1]]
                with Image.open(io.BytesIO(jpeg)) as image:
                    pixels = np.asarray(image.convert("RGB"))
                result[pixels.tobytes()] = (test, label)
    return result


def test_cifar10_has_the_images_of_its_source(cifar_dir, cache_dir):
    made = data.load("cifar10", data_dir=cifar_dir, cache_dir=cache_dir)
    want = source_images()
    got = {}
    for test, split in ((False, made.train), (True, made.test)):
        assert split.images.shape == (200, 32, 32, 3)
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        assert (np.bincount(split.labels) == PER_CLASS).all()
        for image, label in zip(*split, strict=True):
            got[image.tobytes()] = (test, int(label))
    assert got == want
    assert made.augment == ("crop", "flip") and made.num_classes == 10
    assert made.class_names[:3] == ("airplane", "automobile", "bird")
    assert made.mean == (0.4914, 0.4822, 0.4465)
    assert made.std == (0.2471, 0.2435, 0.2616)


def test_the_second_load_decodes_nothing_and_is_the_same(
    cifar_dir, cache_dir, monkeypatch
):
    first = data.load("cifar10", data_dir=str(cifar_dir), cache_dir=str(cache_dir))
    (file,) = cache_dir.iterdir()
    assert file.name.startswith("cifar10-3.0.2-v1-")
    no_decoding(monkeypatch)
    monkeypatch.setenv("OTMDR_CACHE", str(cache_dir))
    second = data.load("cifar10:3.0.2", data_dir=cifar_dir, validation=50)
    tags = {image.tobytes() for image in first.train.images}
    assert len(tags) == 200
    assert {i.tobytes() for i in second.train.images} < tags
    assert second.validation.num_examples == 50
    assert second.augment == ("crop", "flip") and second.mean == first.mean
    np.testing.assert_array_equal(first.test.images, second.test.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "garbage"])
def test_a_bad_cache_is_made_again_with_the_right_data(
    cifar_dir, cache_dir, damage, caplog, monkeypatch
):
    first = data.load("cifar10", data_dir=cifar_dir, cache_dir=cache_dir)
    (file,) = cache_dir.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-5000])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "foreign":
        arrays = {"train_images": np.zeros((3, 4, 4, 1), np.uint8)}
        cache.write(file, IDENTITY, arrays)
    else:
        file.write_bytes(b"garbage")
    again = data.load("cifar10", data_dir=cifar_dir, cache_dir=cache_dir)
    assert "made again" in caplog.text
    chex.assert_trees_all_equal(first.train, again.train)
    chex.assert_trees_all_equal(first.test, again.test)
    no_decoding(monkeypatch)
    data.load("cifar10", data_dir=cifar_dir, cache_dir=cache_dir)


def test_another_data_folder_never_gets_this_cache(own_copy, cache_dir):
    data_dir, folder = own_copy
    data.load("cifar10", data_dir=data_dir, cache_dir=cache_dir)
    names = [
        folder / f"cifar10-{s}.array_record-00000-of-00001" for s in ("train", "test")
    ]
    names[0].rename(folder / "swap")
    names[1].rename(names[0])
    (folder / "swap").rename(names[1])
    swapped = data.load("cifar10", data_dir=data_dir, cache_dir=cache_dir)
    want = source_images()
    # Same names, and possibly sizes: the modification times tell them apart.
    assert all(want[i.tobytes()][0] for i in swapped.train.images)
    assert len(list(cache_dir.iterdir())) == 2


@pytest.mark.slow
def test_neither_tensorflow_nor_the_main_guard_is_needed(cifar_dir, cache_dir):
    code = """
        import sys
        from otmdr_jax import data
        assert not {"tensorflow_datasets", "sklearn", "rich", "PIL"} & set(sys.modules)
        made = data.load("cifar10", data_dir=sys.argv[1], cache_dir=sys.argv[2])
        assert "tensorflow" not in sys.modules
        print(made)
    """
    done = run_python(code, cifar_dir, cache_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "Dataset('cifar10': 200 train, 200 test, 32x32x3 uint8, 10 classes)"
    )


@pytest.mark.parametrize("place", ["cut", "byte", "gone", "empty"])
def test_damaged_records_are_an_error(own_copy, cache_dir, place):
    data_dir, folder = own_copy
    file = folder / "cifar10-train.array_record-00000-of-00001"
    content = bytearray(file.read_bytes())
    if place == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif place == "byte":
        content[200_000] ^= 1
        file.write_bytes(content)
    elif place == "gone":
        file.unlink()
    else:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"prepare or copy it again"):
        data.load("cifar10", data_dir=data_dir, cache_dir=cache_dir)
    assert not cache_dir.exists()


@pytest.mark.parametrize("promised", [150, 250])
def test_a_wrong_number_of_records_is_an_error(own_copy, cache_dir, promised):
    data_dir, folder = own_copy
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"200"', f'"{promised}"', 1))
    with pytest.raises(ValueError, match=f"must hold {promised} records.* 200"):
        data.load("cifar10", data_dir=data_dir, cache_dir=cache_dir)


def test_data_prepared_as_tfrecord_are_refused_with_the_command(own_copy, cache_dir):
    data_dir, folder = own_copy
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for file in folder.glob("*.array_record-*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="holds tfrecord.*file_format='array_record'"):
        data.load("cifar10", data_dir=data_dir, cache_dir=cache_dir)


def test_unreadable_metadata_are_an_error(own_copy, cache_dir):
    data_dir, folder = own_copy
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="TFDS cannot open 'cifar10'.*repair"):
        data.load("cifar10", data_dir=data_dir, cache_dir=cache_dir)


# -- TFDS: other sets -----------------------------------------------------------------


def test_any_set_loads_by_its_supervised_keys(prepare, caplog):
    examples = {"train": gray_examples(11), "validation": gray_examples(5)}
    where = prepare("OwnSet", gray_features, examples, ("picture", "kind"))
    made = data.load("own_set", **where)
    assert 'no "test" split' in caplog.text
    assert (made.num_classes, made.augment, made.image_shape) == (7, (), (6, 6, 1))
    assert made.class_names == tuple("0123456")  # the metadata have no names

    def rows(pairs):
        return sorted((np.asarray(i).tobytes(), int(y)) for i, y in pairs)

    for split, name in ((made.train, "train"), (made.test, "validation")):
        want = [(e["picture"], e["kind"]) for e in examples[name]]
        assert rows(zip(*split, strict=True)) == rows(want)
    unit = np.stack([e["picture"] for e in examples["train"]]) / 255
    np.testing.assert_allclose(made.mean, unit.mean(), rtol=1e-12)
    np.testing.assert_allclose(made.std, unit.std(), rtol=1e-12)


def test_sets_that_do_not_fit_are_refused(prepare):
    def named(features):
        return {"image": features.Image(shape=(None, None, 1)), "note": features.Text()}

    examples = [{"image": e["picture"], "note": ""} for e in gray_examples(2)]
    where = prepare("NoLabel", named, {"train": examples, "test": examples})
    with pytest.raises(ValueError, match="ClassLabel.*image: Image, note: Text.*npz"):
        data.load("no_label", **where)

    splits = {"train": gray_examples(3)}
    where = prepare("OneSplit", gray_features, splits, ("picture", "kind"))
    with pytest.raises(ValueError, match=r"\"train\" and \"test\".*\['train'\]"):
        data.load("one_split", **where)

    splits = {"train": gray_examples(3) + gray_examples(1, 8), "test": gray_examples(2)}
    where = prepare("Sizes", gray_features, splits, ("picture", "kind"))
    with pytest.raises(ValueError, match=r"one shape, and train image \d has"):
        data.load("sizes", **where)


def test_an_unprepared_set_names_the_command(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError) as caught:
        data.load("mnist", data_dir=tmp_path)
    message = str(caught.value)
    command = message[message.index("python -c") :]
    assert f"data_dir={str(tmp_path)!r}" in command
    # The command is valid Python for the set, folder and format that were asked for.
    compile(command.removeprefix('python -c "').removesuffix('"'), "command", "exec")
    assert "builder('mnist'" in command and "file_format='array_record'" in command


def test_download_prepares_as_array_record(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    asked = {}

    def offline(self, **kwargs):
        asked.update(kwargs)
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(ImportError, match="pip install tensorflow"):
        data.load("mnist", data_dir=tmp_path, download=True)
    assert asked == {"file_format": "array_record"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", "close names: cifar"),
        ("digit", "close names: digits"),
        ("MNIST", "mnist"),
        ("qqqqqqqq", "no name is close"),
        ("cifar10/red", "cannot open 'cifar10/red'.*Correct the config"),
        ("cifar10:9.9.9", "cannot open 'cifar10:9.9.9'.*version"),
        ("", "must be"),
    ],
)
def test_an_unknown_name_gets_close_matches(tmp_path, name, message):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load(name, data_dir=tmp_path)


def test_a_bare_machine_imports_and_takes_arrays():
    code = """
        import sys
        absent = ("sklearn", "tensorflow_datasets", "array_record", "PIL", "rich")
        for name in absent:
            sys.modules[name] = None  # import raises ImportError
        import numpy as np
        from otmdr_jax import data
        pair = np.zeros((4, 2, 2), np.uint8), np.arange(4)
        print(data.from_arrays(pair, pair))
        for name in ("digits", "cifar10"):
            try:
                data.load(name)
            except ImportError as error:
                print(error)
        from otmdr_jax.io.progress import Progress
        with Progress(3, 0, "decoding") as bar:
            bar.update(3)
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("decoding: 3/3 steps")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Dataset('arrays': 4 train")
    assert "scikit-learn" in lines[1] and "pip install '.[data]'" in lines[1]
    assert "tensorflow-datasets" in lines[2] and "'.[data]'" in lines[2]


def test_a_long_decoding_reports_on_stderr(monkeypatch, capsys):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(records, "_CHUNK", 1)

    class Source(list):
        def __getitems__(self, rows):
            return [self[i] for i in rows]

    whole = records.Records(Source("abcdefghij"), "x", "train", "again")
    assert list(whole.all("decoding x")) == list(enumerate("abcdefghij"))
    out = capsys.readouterr()
    assert out.out == "" and "decoding x: 5/10 records, 0.5 records/s" in out.err
    assert "0:00:10 left" in out.err


def test_every_known_augmentation_is_implemented():
    assert dataset.AUGMENTATIONS == tuple(device._OPS)


class TestMistakes:
    """What a caller may hand over by mistake, and what is done with it."""

    images = np.zeros((8, 2, 2, 1), np.uint8)
    labels = np.arange(8) % 2

    def test_a_training_set_alone_is_split(self):
        with pytest.warns(UserWarning, match="'mine' has no test set: 2 of its 8"):
            found = data.from_arrays((self.images, self.labels), name="mine")
        assert found.train.num_examples == 6 and found.test.num_examples == 2
        assert set(found.test.labels) == {0, 1}

    def test_signals_with_many_channels_are_split_too(self, tmp_path):
        """A height of 1 is no channel where the statistics are of the last axis."""
        signals = np.random.default_rng(0).normal(size=(20, 1, 16, 6))
        pair, unit = (signals, np.arange(20) % 2), dict(mean=(0,) * 6, std=(1,) * 6)
        with pytest.warns(UserWarning, match="no test set"):
            made = data.from_arrays(pair, **unit)
        assert made.train.images.shape == (16, 1, 16, 6)
        path = tmp_path / "signals.npz"
        data.save(made, path)
        test, count = data.load_test(path)
        np.testing.assert_array_equal(test.images, made.test.images)
        assert count == 2 and data.describe_test(path).image_shape == (1, 16, 6)

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_too_few_examples_to_split_are_refused(self, count):
        pair = self.images[:count], np.arange(count)
        with pytest.raises(ValueError, match="too few training examples .* of class"):
            data.from_arrays(pair)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train": {"images": images, "labels": labels}}, "pair .* got dict"),
            ({"train": ([[0], [0, 1]], [0, 1])}, "one array, got a list whose items"),
            ({"train": (np.ma.masked_less(images, 1), labels)}, "got masked entries"),
            ({"name": ""}, "name must be a text that is not empty"),
            ({"name": None}, "name must be a text that is not empty"),
            ({"num_classes": True}, "num_classes must be an int"),
            ({"augment": ("flip", "flip")}, "must be named once"),
            ({"validation": 0.01}, "less than one of the 8 training examples"),
            ({"label_noise": 0.05}, "less than one of the 8 training labels"),
            ({"mean": 0.0, "std": 0.0}, "mean must be 1 finite numbers"),
        ],
    )
    def test_it_is_refused(self, changes, message):
        pair = self.images, self.labels
        with pytest.raises(ValueError, match=message):
            data.from_arrays(**{"train": pair, "test": pair, **changes})

    @pytest.mark.parametrize("code", [10**6, 10**12, 2**63 + 7])
    def test_codes_are_no_labels(self, code):
        # A count of classes in int64 overflows, an array of all of them fills memory.
        labels = np.asarray([0, 1, 2, code], np.uint64)
        with pytest.raises(ValueError, match=f"got {code}, which looks like a code"):
            data.from_arrays((self.images[:4], labels), (self.images[:4], labels))

    @pytest.mark.parametrize(
        ("scale", "warned"), [(255, 1), (51, 1), (49, 0), (1, 0), (1 / 255, 1), (0, 0)]
    )
    def test_images_of_two_scales_are_named(self, scale, warned):
        train = np.linspace(0, 1, 32, dtype=np.float32).reshape(8, 2, 2, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data.from_arrays((train, self.labels), (train * scale, self.labels))
        assert len(caught) == warned
        assert all("seem to have several scales" in str(w.message) for w in caught)

    def test_a_file_is_saved_into_a_new_folder(self, tmp_path):
        pair = self.images, self.labels
        data.save(data.from_arrays(pair, pair), tmp_path / "new" / "mine.npz")
        assert (tmp_path / "new" / "mine.npz").is_file()
