"""Batches of a loader as training data: what is taken, checked and refused."""

import threading
import time

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otmdr_jax import data
from otmdr_jax.data.loader import Loader

RNG = np.random.default_rng(0)
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
TEST = RNG.integers(0, 256, (7, 4, 5, 3), dtype=np.uint8), np.arange(7) % 3


def examples(num):
    return RNG.integers(0, 256, (num, 4, 5, 3), dtype=np.uint8), np.arange(num) % 3


def batches_of(images, labels, size):
    starts = range(0, len(labels), size)
    return [(images[i : i + size], labels[i : i + size]) for i in starts]


def made(train, test=TEST, **options):
    return data.from_batches(train, test, **{"num_classes": 3, **UNIT, **options})


def read(loader, start=0, steps=None):
    total = loader.steps_per_epoch if steps is None else steps
    stream = loader.stream(start, total)
    found = [next(stream) for _ in range(total - start)]
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()
    return found


# -- What is taken --------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30), st.integers(1, 30))
def test_steps_are_the_whole_batches_of_each_epoch_in_order(num, size, start, more):
    """Against the definition, from any step on."""
    size = min(size, num)
    images, labels = examples(num)
    dataset = made(batches_of(images, labels, size))
    whole = num // size
    assert dataset.train.steps_per_epoch == whole
    assert dataset.train.num_examples == whole * size
    found = read(dataset.train, start, start + more)
    for step, batch in enumerate(found, start):
        rows = slice(step % whole * size, (step % whole + 1) * size)
        np.testing.assert_array_equal(batch.images, images[rows])
        np.testing.assert_array_equal(batch.labels, labels[rows])
        assert batch.labels.dtype == np.int32


def test_the_dataset_says_what_it_is():
    train = batches_of(*examples(20), 6)
    dataset = made(
        train,
        batches_of(*TEST, 3),
        validation=TEST,
        class_names=("cat", "dog", "owl"),
        num_classes=None,
        name="pets",
    )
    assert repr(dataset) == (
        "Dataset('pets': 18 train, 7 validation, 7 test, 4x5x3 uint8, 3 classes)"
    )
    for split in (dataset.test, dataset.validation):
        np.testing.assert_array_equal(split.images, TEST[0])
        np.testing.assert_array_equal(split.labels, TEST[1])
    assert dataset.class_names == ("cat", "dog", "owl") and dataset.augment == ()
    assert not data.fits_on_device(dataset)


def kinds():
    images, labels = examples(18)
    pairs = batches_of(images, labels, 6)

    def torch():
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        held = torch.from_numpy(images), torch.from_numpy(labels)
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*held), batch_size=6
        )

    def grain_map():
        rows = grain.MapDataset.source(range(18))
        return rows.map(lambda i: {"image": images[i], "label": labels[i]}).batch(6)

    def grain_loader():
        class Take(grain.transforms.Map):
            def map(self, i):
                return images[i], labels[i]

        return grain.DataLoader(
            data_source=range(18),
            sampler=grain.samplers.SequentialSampler(18, grain.sharding.NoSharding()),
            operations=[Take(), grain.transforms.Batch(6)],
        )

    return (images, labels), {
        "list": lambda: pairs,
        "lists": lambda: [list(pair) for pair in pairs],
        "splits": lambda: [data.Split(*pair) for pair in pairs],
        "dictionaries": lambda: [{"image": x, "label": y, "id": 1} for x, y in pairs],
        "plural": lambda: [{"images": x, "labels": y} for x, y in pairs],
        "jax": lambda: [tuple(map(jax.numpy.asarray, pair)) for pair in pairs],
        "function": lambda: lambda: iter(pairs),
        "function of the epoch": lambda: lambda epoch: iter(pairs),
        "torch": torch,
        "grain.MapDataset": grain_map,
        "grain.IterDataset": lambda: grain_map().to_iter_dataset(),
        "grain.DataLoader": grain_loader,
    }


@pytest.mark.parametrize("kind", list(kinds()[1]))
def test_loaders_of_many_kinds(kind):
    (images, labels), loaders = kinds()
    dataset = made(loaders[kind](), steps_per_epoch=3)
    for _ in range(2):
        found = read(dataset.train)
        np.testing.assert_array_equal(np.concatenate([x.images for x in found]), images)
        np.testing.assert_array_equal(np.concatenate([x.labels for x in found]), labels)


def test_floats_become_float32_and_one_channel_may_be_left_out():
    images = RNG.normal(size=(9, 4, 5))
    labels = np.arange(9, dtype=np.int64) % 3
    one = {"mean": (0.0,), "std": (1.0,)}
    dataset = made(batches_of(images, labels, 3), (images, labels), **one)
    found = read(dataset.train)[1]
    assert found.images.dtype == np.float32 and dataset.image_shape == (4, 5, 1)
    np.testing.assert_array_equal(found.images[..., 0], images[3:6].astype(np.float32))


def test_a_loader_may_write_into_the_same_memory_again():
    images, labels = examples(24)
    image, label = np.empty((4, 4, 5, 3), np.uint8), np.empty(4, int)

    def reusing():
        for x, y in batches_of(images, labels, 4):
            image[:], label[:] = x, y
            yield image, label
        image[:], label[:] = 0, 0

    found = read(made(reusing, steps_per_epoch=6).train)
    np.testing.assert_array_equal(np.concatenate([x.images for x in found]), images)
    np.testing.assert_array_equal(np.concatenate([x.labels for x in found]), labels)


class Told:
    """A loader whose order is that of the epoch that it was told last."""

    def __init__(self, pairs):
        self.pairs, self.epoch = pairs, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.pairs)

    def __iter__(self):
        order = np.random.default_rng([9, self.epoch]).permutation(len(self.pairs))
        return (self.pairs[i] for i in order)


class Sampled:
    def __init__(self, pairs):
        self.sampler, self.pairs = Told(pairs), pairs

    def __len__(self):
        return len(self.pairs)

    def __iter__(self):
        return iter(self.sampler)


@pytest.mark.parametrize("kind", ["told", "its sampler", "a function"])
def test_an_epoch_has_its_order_whatever_came_before(kind):
    pairs = batches_of(*examples(20), 4)
    loader = {
        "told": Told(pairs),
        "its sampler": Sampled(pairs),
        "a function": lambda epoch: (
            pairs[i] for i in np.random.default_rng([9, epoch]).permutation(5)
        ),
    }[kind]
    dataset = made(loader, steps_per_epoch=5)
    whole = read(dataset.train, 0, 15)
    for start in (3, 5, 12):
        for got, want in zip(
            read(dataset.train, start, 15), whole[start:], strict=True
        ):
            np.testing.assert_array_equal(got.images, want.images)
    epochs = [[x.images.tobytes() for x in whole[i : i + 5]] for i in (0, 5, 10)]
    assert len(set(map(tuple, epochs))) == 3  # the orders do differ
    np.testing.assert_array_equal(dataset.train.first(6).images[:4], whole[0].images)


def test_a_loader_without_an_end_is_cut():
    pairs = batches_of(*examples(20), 4)

    def forever():
        while True:
            yield from pairs

    dataset = made(forever, steps_per_epoch=7)
    assert dataset.train.num_examples == 28
    found = read(dataset.train, 0, 9)
    np.testing.assert_array_equal(found[7].images, pairs[0][0])
    assert dataset.train.first(100).num_examples == 28


# -- What is read ahead ---------------------------------------------------------------


def test_batches_are_read_ahead_by_a_thread_within_an_epoch():
    pairs, asked, threads = batches_of(*examples(40), 2), [], set()

    def watched(epoch):
        for i, pair in enumerate(pairs):
            asked.append((epoch, i))
            threads.add(threading.get_ident())
            yield pair

    dataset = made(watched, steps_per_epoch=20)
    asked.clear()
    threads.clear()
    stream = dataset.train.stream(0, 40)
    next(stream)
    deadline = time.monotonic() + 30
    while len(asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [(0, i) for i in range(5)] and len(threads) == 1
    assert threading.get_ident() not in threads
    for _ in range(19):
        next(stream)
    assert asked == [(0, i) for i in range(20)]  # nothing of the next one
    next(stream)
    before = threading.active_count()
    stream.close()
    assert threading.active_count() == before - 1


def test_an_error_of_the_loader_comes_through():
    pairs = batches_of(*examples(20), 4)

    def failing():
        yield from pairs[:3]
        raise OSError("the disk is gone")

    stream = made(failing, steps_per_epoch=5).train.stream(0, 5)
    for _ in range(3):
        next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    stream.close()


# -- What is refused ------------------------------------------------------------------


def with_third(change):
    """Six batches of four, the third one changed."""
    pairs = batches_of(*examples(24), 4)
    pairs[2] = change(*pairs[2])
    return pairs


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x[:3], y[:3]), "4 examples.*batch 2 of epoch 0 has 3"),
        (lambda x, y: (x[:, :3], y), r"\(4, 4, 5, 3\) uint8.*has \(4, 3, 5, 3\)"),
        (lambda x, y: (x / 255, y), r"uint8, as the first.*has .*float32"),
        (lambda x, y: (x, y + 1), r"batch 2 of epoch 0 labels must be 0\.\.2.*1\.\.3"),
        (lambda x, y: (x, y[:3]), "one label for each image, got 4 images and 3"),
        (lambda x, y: (x, y / 1), "labels must be integers"),
        (lambda x, y: (x, np.ma.masked_equal(y, 0)), "batch 2 .* got masked entries"),
        (lambda x, y: (np.ma.masked_less(x, 99), y), "batch 2 .* got masked entries"),
        (lambda x, y: (x, np.eye(3)[y]), "argmax"),
        (lambda x, y: (x.astype(int), y), r"images.astype\(np.uint8\)"),
        (lambda x, y: (x, y, y), "pair.*got a tuple of 3"),
        (lambda x, y: {"image": x, "class": y}, "got a dictionary of image, class"),
    ],
)
def test_each_batch_is_checked(change, message):
    dataset = made(with_third(change), steps_per_epoch=6)
    stream = dataset.train.stream(0, 6)
    next(stream), next(stream)
    with pytest.raises((ValueError, TypeError), match=message):
        next(stream)
    stream.close()


def test_images_with_channels_first_are_refused_with_the_way_out():
    images, labels = RNG.normal(size=(8, 3, 16, 16)), np.arange(8) % 3
    with pytest.raises(ValueError, match=r"the first training batch.*transpose\(0, 2"):
        made(batches_of(images, labels, 4), (images, labels))


def test_signals_with_many_channels_are_those_that_the_statistics_are_of():
    signals, labels = RNG.normal(size=(8, 1, 16, 6)), np.arange(8) % 3
    unit = {"mean": (0.0,) * 6, "std": (1.0,) * 6}
    for steps in (2, None):
        found = made(
            batches_of(signals, labels, 4),
            (signals, labels),
            steps_per_epoch=steps,
            **unit,
        )
        assert found.train.steps_per_epoch == 2


def test_tensors_that_numpy_cannot_take_are_refused():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    images = torch.zeros((4, 4, 5, 3), dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="NumPy makes arrays of.*BFloat16"):
        made([(images, torch.zeros(4, dtype=torch.int64))])
    with pytest.raises(TypeError, match="requires grad"):
        made([(images.float().requires_grad_(), torch.zeros(4, dtype=torch.int64))])


def once():
    yield from batches_of(*examples(8), 4)


PAIRS = batches_of(*examples(8), 4)


@pytest.mark.parametrize(
    "train, options, message",
    [
        (once(), {}, "read anew each epoch, and a generator can be read once"),
        (once, {}, "steps_per_epoch must be given.*function"),
        (grain.MapDataset.source(PAIRS).repeat(), {}, "steps_per_epoch must be given"),
        (3, {}, "iterable of batches.*got a int"),
        ([], {}, "first training batch must be a pair.*got nothing"),
        (PAIRS, {"steps_per_epoch": 0}, "at least 1"),
        (PAIRS, {"steps_per_epoch": 2.0}, "must be an int, got 2.0"),
        (PAIRS, {"num_classes": None}, "num_classes or class_names must be given"),
        (PAIRS, {"num_classes": 2}, "labels must be 0..1"),
        (PAIRS, {"mean": (0.0,)}, "mean must be 3 finite numbers"),
        (PAIRS, {"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        (PAIRS, {"class_names": ("a", "b")}, "must be 3 texts"),
        (PAIRS, {"augment": ("jump",)}, "augmentations must be of"),
        (PAIRS, {"test": (TEST[0][:, :3], TEST[1])}, "one shape.*Resize"),
        (PAIRS, {"test": (TEST[0] / 255, TEST[1])}, "both be uint8 or both floats"),
        (PAIRS, {"test": iter(())}, "test must have batches"),
        (PAIRS, {"validation": (TEST[0], TEST[1] + 1)}, "validation labels must be"),
        ([PAIRS[0], (PAIRS[1][0][:2], PAIRS[1][1][:2]), PAIRS[0]], {}, "but the last"),
    ],
)
def test_what_cannot_work_is_refused_at_once(train, options, message):
    test = options.pop("test", TEST)
    with pytest.raises((ValueError, TypeError), match=message):
        made(train, test, **options)


def test_an_epoch_that_is_too_short_is_refused():
    dataset = made(PAIRS, steps_per_epoch=3)
    stream = dataset.train.stream(0, 3)
    next(stream), next(stream)
    with pytest.raises(ValueError, match="3 batches, and epoch 0 ended after 2"):
        next(stream)
    stream.close()


def test_whatever_needs_all_images_is_told_that_there_are_none(tmp_path):
    dataset = made(PAIRS)
    assert isinstance(dataset.train, Loader)
    for ask in (
        lambda: dataset.train.images,
        lambda: dataset.train.labels,
        lambda: tuple(dataset.train),
        lambda: data.save(dataset, tmp_path / "mine.npz"),
        lambda: data.stream_batches(dataset.train, 4, jax.random.key(0), 2),
        lambda: data.eval_batches(dataset.train, 4),
    ):
        with pytest.raises(ValueError, match="batches of a loader.*from_arrays"):
            ask()
    assert not list(tmp_path.iterdir())
