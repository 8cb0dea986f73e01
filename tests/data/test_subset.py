"""Fewer examples to train and to test on."""

import numpy as np
import pytest

from otmdr_jax import data
from otmdr_jax.experiments import programs
from otmdr_jax.experiments.config import TrainConfig


@pytest.fixture(scope="module")
def whole():
    return data.load("digits", validation=100, label_noise=0.1)


def rows(part, split):
    """Where the images of a part stand in the whole."""
    index = {image.tobytes(): i for i, image in enumerate(split.images)}
    return [index[image.tobytes()] for image in part.images]


def test_parts_are_stratified_and_keep_their_order(whole):
    part = data.subset(whole, train=200, test=77, seed=3)
    for name, count in (("train", 200), ("test", 77)):
        few, many = getattr(part, name), getattr(whole, name)
        assert few.num_examples == count
        found = rows(few, many)
        assert found == sorted(found) and len(set(found)) == count
        np.testing.assert_array_equal(few.labels, many.labels[found])
        quota = np.bincount(many.labels, minlength=10) * count / many.num_examples
        assert (abs(np.bincount(few.labels, minlength=10) - quota) < 1).all()
    assert part.validation is whole.validation
    assert (part.mean, part.std) == (whole.mean, whole.std)


def test_one_part_does_not_move_the_other(whole):
    both = data.subset(whole, train=50, test=40)
    one = data.subset(whole, test=40)
    np.testing.assert_array_equal(both.test.images, one.test.images)
    assert one.train is whole.train
    assert data.subset(whole) is whole


def test_the_seed_draws_them(whole):
    first, again, other = (data.subset(whole, test=50, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.test.images, again.test.images)
    assert not np.array_equal(first.test.images, other.test.images)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train": 5}, "leaves no example of class"),
        ({"train": 10_000}, "train=10000, but there are 1337"),
        ({"test": 361}, "test=361, but there are 360"),
        ({"test": 0}, "test must be a number of at least 1"),
        ({"train": 0.5}, "train must be a number of at least 1"),
        ({"test": 10, "seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_taken(whole, options, match):
    with pytest.raises(ValueError, match=match):
        data.subset(whole, **options)


def test_targets_that_are_no_classes_have_no_strata():
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    lines = data.from_targets((x, x[:, :1]), (x, x[:, :1]), name="lines")
    few = data.subset(lines, train=7, test=5)
    assert (few.train.num_examples, few.test.num_examples) == (7, 5)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40, np.uint64(2**63)])
def test_integer_targets_that_would_wrap_are_refused(value):
    kind = np.uint64 if value > 2**40 else np.int64
    x, y = np.zeros((4, 2), np.float32), np.array([0, 1, 2, value], kind)
    with pytest.raises(ValueError, match="those of 32 bits, got .*make them floats"):
        data.from_targets((x, y), (x, y))
    y[3] = 2**31 - 1
    assert data.from_targets((x, y), (x, y)).train.labels[3] == 2**31 - 1


@pytest.mark.parametrize("hidden", ["inputs", "targets"])
def test_hidden_targets_are_no_data(hidden):
    x, y = np.zeros((4, 2)), np.array([0.5, -999.0, 0.25, -999.0])
    if hidden == "targets":
        pair = x, np.ma.masked_equal(y, -999.0)
    else:
        pair = np.ma.masked_array(x, np.eye(4, 2)), y
    with pytest.raises(ValueError, match=f"test {hidden} must be .* masked entries"):
        data.from_targets((x, y), pair)
    whole = np.ma.masked_array(y, False)  # nothing is hidden
    assert data.from_targets((x, whole), (x, y)).train.labels[1] == -999.0


def test_augmentations_of_targets_are_known_ones():
    x, y = np.zeros((4, 8, 8, 1), np.float32), np.zeros(4)
    assert data.from_targets((x, y), (x, y), augment="flip").augment == ("flip",)
    with pytest.raises(ValueError, match="augmentations must be of .*'rotate'"):
        data.from_targets((x, y), (x, y), augment=("rotate",))


def test_images_that_stay_in_their_files(cifar_dir, cache_dir):
    lazy, read = (
        data.load("cifar10", data_dir=cifar_dir, cache_dir=cache_dir, in_memory=x)
        for x in (False, True)
    )
    few, same = (data.subset(one, train=20, test=10) for one in (lazy, read))
    assert isinstance(few.train.images, data.LazyImages)
    np.testing.assert_array_equal(few.train.labels, same.train.labels)
    np.testing.assert_array_equal(few.train.images[:], same.train.images)


def test_a_run_trains_on_the_part_that_its_options_name(whole):
    config = TrainConfig(train_examples=200, test_examples=50, data_seed=2)
    found = programs.load_data(config)
    expected = data.subset(data.load("digits", seed=2), train=200, test=50, seed=2)
    np.testing.assert_array_equal(found.train.images, expected.train.images)
    np.testing.assert_array_equal(found.test.labels, expected.test.labels)
    with pytest.raises(ValueError, match="options of loading"):
        programs.named(config, whole)


def test_a_loader_is_refused():
    batches = [(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4) % 2)] * 3
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.arange(4) % 2
    dataset = data.from_batches(
        batches, [(images, labels)], num_classes=2, mean=(0.0,), std=(1.0,)
    )
    with pytest.raises(ValueError, match="batches of a loader"):
        data.subset(dataset, train=4)
