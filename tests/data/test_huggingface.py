"""Sets of Hugging Face's `datasets`: which columns and splits are read, and how."""

import io
import pickle

import numpy as np
import pytest

from otmdr_jax import data
from otmdr_jax.data import encoded

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def table(num, shape=(6, 5, 3), names=("cat", "dog", "owl"), **columns):
    """A table of images as PNG files, and the pixels and labels in it."""
    pixels = RNG.integers(0, 256, (num, *shape), dtype=np.uint8)
    labels = np.arange(num) % len(names)
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=names)}
    images = [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in pixels]
    content = {"picture": images, "kind": labels.tolist()}
    for name, (feature, values) in columns.items():
        features[name], content[name] = feature, values
    made = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    return made, pixels, labels


@pytest.fixture(scope="module")
def three():
    """Tables, pixels and labels of three splits."""
    return {x: table(n) for x, n in (("train", 12), ("test", 6), ("validation", 3))}


@pytest.fixture(scope="module")
def splits(three):
    return datasets.DatasetDict({x: made for x, (made, *_) in three.items()})


@pytest.mark.parametrize("in_memory", [True, False])
def test_columns_are_found_by_their_types(three, splits, in_memory):
    made = data.from_huggingface(splits, in_memory=in_memory)
    for split, (_, pixels, labels) in three.items():
        found = getattr(made, split)
        assert isinstance(found.images, data.LazyImages) != in_memory
        np.testing.assert_array_equal(np.asarray(found.images), pixels)
        np.testing.assert_array_equal(found.labels, labels)
    assert made.class_names == ("cat", "dog", "owl") and made.name == "huggingface"
    unit = three["train"][1] / 255
    np.testing.assert_allclose(made.mean, unit.mean(axis=(0, 1, 2)), rtol=1e-12)


def test_rows_are_those_of_the_object_whatever_was_done_to_it(three):
    """A selection is read as it is, and formats and transforms are not applied."""
    made, pixels, labels = three["train"]

    def fail(batch):
        raise AssertionError("applied")

    for one in (made.with_format("numpy"), made.with_transform(fail)):
        chosen = one.select([5, 3, 7, 1])
        both = {"train": chosen, "test": chosen}
        found = data.from_huggingface(both).train
        np.testing.assert_array_equal(found.images, pixels[[5, 3, 7, 1]])
        np.testing.assert_array_equal(found.labels, labels[[5, 3, 7, 1]])


def test_images_are_resized_and_lazy_ones_can_be_pickled(splits, three):
    want = [encoded.decode(_png(x), (4, 4)) for x in three["train"][1]]
    for in_memory in (True, False):
        made = data.from_huggingface(splits, size=4, in_memory=in_memory)
        np.testing.assert_array_equal(np.asarray(made.train.images), np.stack(want))
    again = pickle.loads(pickle.dumps(made.train.images))
    np.testing.assert_array_equal(again[[3]], want[3][None])
    assert again.checksum() == made.train.images.checksum()


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_files_that_a_table_names_are_read(tmp_path):
    pixels = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    names = [str(tmp_path / f"{i}.png") for i in range(4)]
    for name, one in zip(names, pixels, strict=True):
        Image.fromarray(one).save(name)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)}
    )
    columns = {"image": names, "label": [0, 1, 0, 1]}
    made = datasets.Dataset.from_dict(columns, features=features)
    both = {"train": made, "test": made}
    found = data.from_huggingface(both)
    np.testing.assert_array_equal(found.train.images, pixels)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 are not: train\[2\] \(.*No such"):
        data.from_huggingface(both)


def test_splits_that_are_missing_or_not_used_are_said(splits):
    some = {"train": splits["train"], "validation": splits["validation"]}
    with pytest.warns(UserWarning, match="validation split is the test set"):
        made = data.from_huggingface(some)
    assert made.validation is None and made.test.num_examples == 3
    for alone in (splits["train"], {"train": splits["train"]}):
        with pytest.warns(UserWarning, match="has no test set: 2 of its 12"):
            assert data.from_huggingface(alone).test.num_examples == 2
    more = {**splits, "extra": splits["test"].select(range(2))}
    with pytest.warns(UserWarning, match="other splits, extra"):
        data.from_huggingface(more)
    with pytest.raises(ValueError, match='split "train", and there are test'):
        data.from_huggingface({"test": splits["test"]})
    with pytest.raises(ValueError, match="validation split of its own"):
        data.from_huggingface(splits, validation=3)


def test_options_are_those_of_from_arrays(splits):
    some = {"train": splits["train"], "test": splits["test"]}
    made = data.from_huggingface(
        some, validation=3, label_noise=0.5, seed=4, augment=("flip",), name="pets",
        mean=(0.5,) * 3, std=(0.2,) * 3,
    )  # fmt: skip
    assert repr(made).startswith("Dataset('pets': 9 train, 3 validation, 6 test")
    assert (made.augment, made.mean[0], made.std[0]) == (("flip",), 0.5, 0.2)


TWO = table(4, other=(datasets.Image(), [None] * 4))[0]
TEXTS = table(4, text=(datasets.Value("string"), list("abcd")))[0]


@pytest.mark.parametrize(
    "given, options, error, message",
    [
        (TWO, {}, ValueError, "picture: Image, kind: ClassLabel, other.*image=..."),
        (TWO, {"image": "other"}, ValueError, r"4 are not: train\[0\] \(it is missing"),
        (TEXTS, {"label": "text"}, ValueError, r"class_encode_column\('text'\)"),
        (TEXTS, {"image": "text"}, ValueError, r"cast_column\('text', datasets.Im"),
        (TEXTS, {"label": "nothing"}, ValueError, "no column 'nothing': there are"),
        (TEXTS.to_iterable_dataset(), {}, TypeError, "got a IterableDataset.*stream"),
        ((np.zeros(3), np.zeros(3)), {}, TypeError, "got a tuple"),
        (
            {"train": TEXTS, "test": table(4, names=("dog", "cat", "owl"))[0]},
            {},
            ValueError,
            "column 'kind' must be the same in all splits",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, options, error, message):
    with pytest.raises(error, match=message):
        data.from_huggingface(given, **options)


def test_integers_may_be_labels():
    labels = [0, 1, 1, 0]
    made, pixels, _ = table(4, number=(datasets.Value("int64"), labels))
    found = data.from_huggingface({"train": made, "test": made}, label="number")
    assert found.train.labels.tolist() == labels
    assert found.class_names is None and found.num_classes == 2
