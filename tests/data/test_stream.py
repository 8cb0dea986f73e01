"""Streaming: the device path's batches, in its order, from images left in their files.

The CIFAR-10 tests need the folder `shared` beside the checkout, see test_data.py.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import threading
import time
import types

import chex
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from otmdr_jax import data
from otmdr_jax.data import prepared, records, statistics, stream
from otmdr_jax.experiments import training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.programs import compile_programs, run_keys
from otmdr_jax.experiments.training import feed
from tests.sets import gray_examples, gray_features, run_python, small_digits

settings = hypothesis.settings(max_examples=25, deadline=None, database=None)


def numbered(num):
    """Images whose pixels say which example they are, and labels that do."""
    tags = np.arange(num, dtype=np.uint16).view(np.uint8).reshape(num, 1, 2, 1)
    return data.Split(tags, np.arange(num, dtype=np.int32))


def lazily(images, checksums=None):
    return data.LazyImages(lambda rows: images[rows], images.shape, checksums=checksums)


@pytest.fixture(autouse=True)
def no_threads_are_left():
    """A test that leaves a reader behind fails, whatever else it shows."""
    before = readers()  # a test that failed may hold some in its traceback
    yield
    deadline = time.monotonic() + 10
    while readers() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers() - before


def readers():
    return {t for t in threading.enumerate() if t.name.startswith("grain")}


# -- lazy images ----------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (700, 3, 2, 3), dtype=np.uint8)
INDICES = st.one_of(
    st.integers(-700, 699),
    st.integers(-700, 699).map(np.int32),
    st.slices(700),
    st.lists(st.integers(-700, 699), max_size=40),
    st.lists(st.integers(-700, 699), max_size=40).map(lambda x: np.array(x, int)),
)


@settings
@hypothesis.given(INDICES, st.integers(0, 2**32))
def test_lazy_images_index_as_arrays_do(index, seed):
    images = lazily(PIXELS)
    got = images[index]
    assert type(got) is np.ndarray and got.dtype == np.uint8
    np.testing.assert_array_equal(got, PIXELS[index])
    # Views of views, as of a validation split, count from their own first image.
    rng = np.random.default_rng(seed)
    first = rng.random(700) < 0.9
    second = rng.random(first.sum()) < 0.9
    view, want = images[first][second], PIXELS[first][second]
    assert isinstance(view, data.LazyImages)
    assert (view.shape, view.ndim, view.dtype) == (want.shape, want.ndim, want.dtype)
    assert (view.nbytes, len(view)) == (want.nbytes, len(want))
    some = rng.integers(-len(want), len(want), 5)
    np.testing.assert_array_equal(view[some], want[some])


def test_lazy_images_as_a_whole():
    images = lazily(PIXELS)
    np.testing.assert_array_equal(np.asarray(images), PIXELS)
    assert np.asarray(images, np.float32).dtype == np.float32
    np.testing.assert_array_equal(list(images), PIXELS)
    assert repr(images) == "LazyImages(700x3x2x3 uint8)"
    with pytest.raises(ValueError, match="copy=False"):
        np.array(images, copy=False)


def test_masks_decode_nothing():
    def read(rows):
        raise AssertionError("decoded")

    images = data.LazyImages(read, (9, 2, 2, 1), checksums=np.arange(9))
    view = images[np.arange(9) > 5]
    assert view.shape == (3, 2, 2, 1) and images[~np.zeros(9, bool)].shape[0] == 9
    assert view.checksum() != images.checksum()


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ((0, 1), TypeError, r"images\[rows\]\[:, :8\]"),
        (..., TypeError, "a bool mask over the first axis"),
        (None, TypeError, "got None"),
        (1.0, TypeError, "got 1.0"),
        ([[0, 1]], TypeError, "sequence of integers"),
        (700, IndexError, "700"),
        ([3, -701], IndexError, "701"),
        (True, IndexError, r"shape \(700,\)"),
        (np.ones(699, bool), IndexError, r"shape \(700,\), one entry .*\(699,\)"),
    ],
)
def test_unfit_indices_are_refused(index, error, message):
    with pytest.raises(error, match=message):
        lazily(PIXELS)[index]


def test_what_read_returns_is_checked():
    for wrong in (PIXELS[:, :2], PIXELS.astype(np.int32)):
        images = data.LazyImages(lambda rows, wrong=wrong: wrong[rows], PIXELS.shape)
        with pytest.raises(ValueError, match=r"return \(4, 3, 2, 3\) uint8 .* got"):
            images[:4]
    with pytest.raises(ValueError, match=r"\(N, H, W, C\), got \(3, 2\)"):
        data.LazyImages(None, (3, 2))
    with pytest.raises(ValueError, match=r"checksums must have shape \(3,\)"):
        data.LazyImages(None, (3, 2, 2, 1), checksums=np.arange(4))


@pytest.mark.parametrize("checksums", [None, np.arange(700)])
def test_a_checksum_tells_images_and_orders_apart(checksums):
    images, mask = lazily(PIXELS, checksums), np.arange(700) % 2 == 0
    assert images.checksum() == lazily(PIXELS.copy(), checksums).checksum()
    swapped = None if checksums is None else checksums[::-1]
    others = images[mask], images[~mask], lazily(PIXELS[::-1], swapped)
    assert len({images.checksum(), *(o.checksum() for o in others)}) == 4


def test_lazy_images_make_the_dataset_of_arrays():
    labels = np.random.default_rng(1).permutation(np.arange(700) % 4)
    options = {"validation": 0.2, "label_noise": 0.3, "seed": 5}
    want = data.from_arrays((PIXELS, labels), (PIXELS, labels), **options)
    pair = lazily(PIXELS), labels
    made = data.from_arrays(pair, pair, **options)
    assert repr(made) == repr(want)
    for field in dataclasses.fields(made):
        got, expected = getattr(made, field.name), getattr(want, field.name)
        if isinstance(got, data.Split):
            assert isinstance(got.images, data.LazyImages)
            got = jax.tree.map(np.asarray, got)
        chex.assert_trees_all_equal(got, expected)
    blocks = zip(
        data.eval_batches(made.test, 64), data.eval_batches(want.test, 64), strict=True
    )
    for got, expected in blocks:
        chex.assert_trees_all_equal(got, expected)


def test_statistics_read_a_limited_sample(monkeypatch):
    seen = []

    def read(rows):
        seen.extend(rows)
        return PIXELS[rows]

    labels = np.arange(700) % 4
    pair = data.LazyImages(read, PIXELS.shape), labels
    monkeypatch.setattr(statistics, "_STATISTICS_IMAGES", 50)
    made = data.from_arrays(pair, pair)
    assert len(set(seen)) == 50 and (min(seen), max(seen)) == (0, 699)
    unit = PIXELS[np.sort(seen)] / 255.0
    np.testing.assert_allclose(made.mean, unit.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(made.std, unit.std(axis=(0, 1, 2)), rtol=1e-12)
    seen.clear()
    monkeypatch.setattr(statistics, "_STATISTICS_BYTES", 7 * PIXELS[0].nbytes)
    data.from_arrays(pair, pair)
    assert len(seen) == 7
    seen.clear()
    data.from_arrays(pair, pair, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not seen


# -- the order ------------------------------------------------------------------------


@pytest.mark.slow
@settings
@hypothesis.given(
    num=st.sampled_from([1, 2, 31, 90]),  # each compiles
    share=st.floats(0.01, 1),
    hosts=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    place=st.floats(0, 1),
    threads=st.integers(1, 3),
)
def test_streamed_batches_are_those_of_the_device(
    num, share, hosts, seed, place, threads
):
    """Several epochs, any start, any resumption; hosts' blocks make up the batch."""
    per_host = max(1, int(share * num) // hosts)
    batch_size = hosts * per_host
    hypothesis.assume(batch_size <= num)
    per_epoch = num // batch_size
    total = min(3 * per_epoch + 1, 25)
    split, key = numbered(num), run_keys(seed)[1]
    draw = jax.jit(data.epoch_order, static_argnums=1)
    want = []
    for step in range(total):
        epoch, i = divmod(step, per_epoch)
        order = np.asarray(draw(jax.random.fold_in(key, epoch), num))
        rows = order[i * batch_size : (i + 1) * batch_size]
        want.append(data.Split(split.images[rows], split.labels[rows]))

    start = int(place * total)
    streams = [
        data.stream_batches(
            split,
            batch_size,
            key,
            total,
            start_step=start,
            shard_index=host,
            shard_count=hosts,
            num_threads=threads,
            prefetch=3,
        )
        for host in range(hosts)
    ]
    for step in range(start, total):
        parts = [next(iterator) for iterator in streams]
        assert all(part.labels.shape == (per_host,) for part in parts)
        whole = data.Split(*map(np.concatenate, zip(*parts, strict=True)))
        chex.assert_trees_all_equal(whole, want[step])
        assert whole.images.dtype == np.uint8 and whole.labels.dtype == np.int32
    for iterator in streams:
        with pytest.raises(StopIteration):
            next(iterator)
        iterator.close()


def test_streamed_batches_are_those_of_the_training_loop():
    """Its own compiled order and the gather of its step, on real data."""
    made = data.load("digits", validation=1000)
    config = TrainConfig(batch_size=40, epochs=3, method="sgd", seed=3)
    programs = compile_programs(config, made)
    data_key = run_keys(config.run.seed)[1]
    batches = data.stream_batches(made.train, 40, data_key, programs.total_steps)
    resident = jax.device_put(made.train)
    take = jax.jit(data.take, static_argnames="batch_size")
    for step, batch in enumerate(batches):
        epoch, i = divmod(step, programs.steps_per_epoch)
        order = programs.epoch_order(jax.random.fold_in(data_key, epoch))
        want = take(resident, order, np.int32(i), batch_size=40)
        chex.assert_trees_all_equal(batch, jax.device_get(want))
    assert step + 1 == programs.total_steps == 30
    batches.close()


def test_a_state_goes_on_at_the_next_batch_however_far_reading_was_ahead():
    split, key = numbered(50), jax.random.key(1)
    whole = data.stream_batches(split, 8, key, 20)
    want = list(whole)
    assert len(want) == 20
    for consumed in (0, 1, 5, 6, 7, 19, 20):
        first = data.stream_batches(split, 8, key, 20, prefetch=16)
        for _ in range(consumed):
            next(first)
        time.sleep(0.02)  # the buffer fills
        state = json.loads(json.dumps(first.get_state()))
        other = data.stream_batches(split, 8, key, 20, start_step=3, num_threads=1)
        next(other)  # its own buffer is full of other batches
        for iterator in (first, other):
            iterator.set_state(state)
            assert iterator.get_state() == state
            chex.assert_trees_all_equal(list(iterator), want[consumed:])
            iterator.close()
    whole.close()


def test_a_state_counts_steps_of_the_run_whatever_the_number_of_hosts():
    split, key = numbered(50), jax.random.key(1)
    one = data.stream_batches(split, 8, key, 20)
    for _ in range(9):
        next(one)
    half = data.stream_batches(split, 8, key, 20, shard_index=1, shard_count=2)
    half.set_state(one.get_state())
    chex.assert_trees_all_equal(next(half).labels, next(one).labels[4:])
    one.close()
    half.close()


@pytest.mark.parametrize("batch_size", [5, 25, 50])
def test_orders_are_drawn_once_an_epoch_and_on_the_cpu(monkeypatch, batch_size):
    """Also where reading ahead spans epochs, and by threads that fall behind."""
    drawn = []
    draw = stream._epoch_order

    def counting(key, epoch, num_examples):
        (place,) = key.devices()
        assert key.committed
        drawn.append((epoch, place.platform))
        time.sleep(0.05)  # long enough for the other threads to ask for it too
        return draw(key, epoch, num_examples)

    monkeypatch.setattr(stream, "_epoch_order", counting)
    epochs = stream._Orders.__call__

    def slowly(self, epoch):
        if threading.current_thread().name.endswith("_0"):
            time.sleep(0.02)
        return epochs(self, epoch)

    monkeypatch.setattr(stream._Orders, "__call__", slowly)
    steps = 4 * 50 // batch_size
    batches = data.stream_batches(numbered(50), batch_size, jax.random.key(0), steps)
    assert not drawn  # nothing is done before a batch is asked for
    with contextlib.closing(batches):
        list(batches)
    assert sorted(drawn) == [(epoch, "cpu") for epoch in range(4)]


def test_orders_are_kept_while_a_thread_may_ask_for_them(monkeypatch):
    """A late thread reads of epoch 0 when others have begun with epoch 1."""
    drawn = []
    draw = stream._epoch_order
    monkeypatch.setattr(
        stream, "_epoch_order", lambda *args: drawn.append(args[1]) or draw(*args)
    )
    orders = stream._Orders(jax.random.key(0), 30, 1)
    for epoch in (0, 1, 0, 2, 1, 3, 2):
        orders(epoch)
    assert drawn == [0, 1, 2, 3]
    assert set(orders._kept) == {2, 3}
    orders(0)  # as after set_state
    assert set(orders._kept) == {0}


def test_without_a_cpu_backend_orders_are_drawn_where_there_is_one(monkeypatch):
    def absent(backend=None):
        raise RuntimeError("Unknown backend: 'cpu' requested")

    key = jax.random.key(0)
    want = stream._Orders(key, 30)(2)
    monkeypatch.setattr(jax, "local_devices", absent)
    np.testing.assert_array_equal(stream._Orders(key, 30)(2), want)


def test_hosts_default_to_the_processes_of_jax(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    split, key = numbered(40), jax.random.key(0)
    ours = data.stream_batches(split, 8, key, 3)
    every = data.stream_batches(split, 8, key, 3, shard_index=0, shard_count=1)
    chex.assert_trees_all_equal(next(ours).labels, next(every).labels[4:])
    ours.close()
    every.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 41}, r"batch_size must be an int in 1\.\.40, got 41"),
        ({"batch_size": 8.0}, "got 8.0"),
        ({"batch_size": True}, "got True"),
        ({"total_steps": -1}, "total_steps must be an int of at least 0"),
        ({"start_step": 11}, r"start_step must be an int in 0\.\.10"),
        ({"shard_index": 0}, "together.*Leave both out"),
        ({"shard_index": 3, "shard_count": 3}, r"shard_index must be an int in 0\.\.2"),
        ({"shard_index": 0, "shard_count": 3}, "multiple of 3, got batch_size=8"),
        ({"shard_index": 0, "shard_count": 0}, "shard_count"),
        ({"num_threads": 0}, "num_threads"),
        ({"prefetch": 0}, "prefetch"),
    ],
)
def test_unfit_arguments_are_refused(change, message):
    options = {"batch_size": 8, "total_steps": 10, **change}
    with pytest.raises(ValueError, match=message):
        data.stream_batches(numbered(40), key=jax.random.key(0), **options)


@pytest.mark.slow
def test_without_grain_the_error_says_what_to_install():
    code = """
        import sys
        sys.modules["grain"] = None  # import raises ImportError
        import jax, numpy as np
        from otmdr_jax import data, training
        split = data.Split(np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, np.int32))
        try:
            data.stream_batches(split, 2, jax.random.key(0), 3)
        except ImportError as error:
            print(error)
    """
    done = run_python(code)
    assert "pip install '.[data]'" in done.stdout, done.stderr


# -- threads --------------------------------------------------------------------------


def test_an_error_in_a_thread_reaches_the_caller_and_can_be_tried_again():
    broken = threading.Event()
    broken.set()

    def read(rows):
        if broken.is_set() and 7 in rows:
            raise OSError("the disk is gone")
        return PIXELS[:40][rows]

    images = data.LazyImages(read, (40, 3, 2, 3))
    split, key = data.Split(images, np.arange(40, dtype=np.int32)), jax.random.key(0)
    batches = data.stream_batches(split, 4, key, 10)
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for batch in batches:
            seen.append(batch)
    broken.clear()
    batches.set_state(batches.get_state())
    seen += batches
    assert sorted(np.concatenate([b.labels for b in seen])) == list(range(40))
    for batch in seen:
        np.testing.assert_array_equal(batch.images, PIXELS[batch.labels])
    batches.close()


def test_close_ends_the_threads_while_they_read():
    batches = data.stream_batches(numbered(50), 5, jax.random.key(0), 10**6)
    next(batches)
    assert readers()
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    dropped = data.stream_batches(numbered(50), 5, jax.random.key(0), 10**6)
    next(dropped)
    del dropped  # no_threads_are_left looks after both


@pytest.mark.slow
@pytest.mark.parametrize("end", ["close", "nothing", "error"])
def test_a_process_ends_in_the_middle_of_a_stream(end):
    code = """
        import sys, time
        import jax, numpy as np
        from otmdr_jax import data, training
        def read(rows):
            time.sleep(0.2)
            return np.zeros((len(rows), 2, 2, 1), np.uint8)
        split = data.Split(
            data.LazyImages(read, (40, 2, 2, 1)), np.zeros(40, np.int32)
        )
        batches = data.stream_batches(split, 2, jax.random.key(0), 10**6)
        next(batches)
        if sys.argv[1] == "close":
            batches.close()
        print(time.time(), flush=True)
        if sys.argv[1] == "error":
            raise SystemExit(3)
    """
    done = run_python(code, end)
    ended = time.time()
    assert done.returncode == (3 if end == "error" else 0), done.stderr
    # The most that is under way: 8 batches over 4 threads at 0.2 s, and JAX's own exit.
    assert ended - float(done.stdout) < 10


# -- where the data go ----------------------------------------------------------------


@pytest.mark.parametrize(("limit", "fits"), [(4000, True), (3999, False)])
def test_a_quarter_of_the_devices_memory_is_the_limit(limit, fits):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
    assert data.fits_on_device(1000, device) is fits


@pytest.mark.parametrize("stats", [None, {}])
def test_devices_that_tell_nothing_have_the_hosts_memory(stats, monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    pages = {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": 400}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert data.fits_on_device(1000, device) and not data.fits_on_device(1001, device)
    monkeypatch.delattr(os, "sysconf")
    assert data.fits_on_device(10**30, device)


def test_the_training_set_decides_and_lazy_ones_never_fit():
    split = numbered(100)
    made = data.from_arrays(split, split)
    limit = 4 * (100 * 2 + 100 * 4)
    for size, fits in ((limit, True), (limit - 1, False)):
        stats = {"bytes_limit": size}
        device = types.SimpleNamespace(memory_stats=lambda stats=stats: stats)
        assert data.fits_on_device(made, device) is fits
    assert data.fits_on_device(made)
    other = data.from_arrays((lazily(split.images), split.labels), split)
    assert not data.fits_on_device(other)


# -- TFDS: the real CIFAR-10 ----------------------------------------------------------


def test_lazy_cifar10_is_the_one_in_memory(cifar_dir, cache_dir):
    options = {"validation": 50, "label_noise": 0.2, "seed": 4}
    where = {"data_dir": cifar_dir, "cache_dir": cache_dir}
    want = data.load("cifar10", **where, **options)
    for _ in range(2):  # labels read from the records, then from the cache
        made = data.load("cifar10", in_memory=False, **where, **options)
        assert repr(made) == repr(want)
        for name in ("train", "validation", "test"):
            got = getattr(made, name)
            assert isinstance(got.images, data.LazyImages)
            decoded = data.Split(np.asarray(got.images), got.labels)
            chex.assert_trees_all_equal(decoded, getattr(want, name))
        assert (made.mean, made.std, made.augment, made.num_classes) == (
            want.mean, want.std, want.augment, want.num_classes
        )  # fmt: skip
    assert len(list(cache_dir.iterdir())) == 2  # neither writes over the other
    copy = pickle.loads(pickle.dumps(made.train.images))
    np.testing.assert_array_equal(copy[3:9], want.train.images[3:9])
    assert copy.checksum() == made.train.images.checksum()


def test_opening_lazily_decodes_one_image_a_split(cifar_dir, cache_dir, monkeypatch):
    decoded = []
    check = records.Records.check_shape

    def counting(self, image, index, shape):
        decoded.append(index)
        check(self, image, index, shape)

    monkeypatch.setattr(records.Records, "check_shape", counting)
    made = data.load(
        "cifar10", data_dir=cifar_dir, cache_dir=cache_dir, in_memory=False
    )
    assert not decoded and made.train.images.shape == (200, 32, 32, 3)
    made.train.images[[3, 5]]
    assert decoded == [3, 5]


def test_lazy_cifar10_streams_the_batches_in_memory(cifar_dir, cache_dir):
    where = {"data_dir": cifar_dir, "cache_dir": cache_dir, "validation": 20}
    key = run_keys(0)[1]
    streams = [
        data.stream_batches(
            data.load("cifar10", in_memory=in_memory, **where).train, 32, key, 12
        )
        for in_memory in (True, False)
    ]
    want, got = map(list, streams)
    assert len(got) == 12
    chex.assert_trees_all_equal(got, want)
    for iterator in streams:
        iterator.close()


def test_many_threads_read_one_lazy_set(cifar_dir, cache_dir):
    """With a first read under way in all of them at once."""
    where = {"data_dir": cifar_dir, "cache_dir": cache_dir}
    want = data.load("cifar10", **where).train.images
    images = data.load("cifar10", in_memory=False, **where).train.images
    images = pickle.loads(pickle.dumps(images))  # no file is open yet
    barrier, wrong = threading.Barrier(8), []

    def read(seed):
        rows = np.random.default_rng(seed).integers(0, 200, 100)
        barrier.wait()
        if (images[rows] != want[rows]).any():
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("place", ["cut", "byte", "gone", "empty"])
def test_damaged_records_are_an_error_when_opened(own_copy, cache_dir, place):
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
        data.load("cifar10", data_dir=data_dir, cache_dir=cache_dir, in_memory=False)
    assert not cache_dir.exists()


@pytest.mark.parametrize("promised", [150, 250])
def test_a_wrong_number_of_records_is_an_error(own_copy, cache_dir, promised):
    """Too few promised would be too few read, with no word of it."""
    data_dir, folder = own_copy
    where = {"data_dir": data_dir, "cache_dir": cache_dir, "in_memory": False}
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"200"', f'"{promised}"', 1))
    with pytest.raises(ValueError, match=f"must hold {promised} records.* 200"):
        data.load("cifar10", **where)


def test_damage_after_opening_is_an_error_of_the_stream(own_copy, cache_dir):
    data_dir, folder = own_copy
    made = data.load("cifar10", data_dir=data_dir, cache_dir=cache_dir, in_memory=False)
    file = folder / "cifar10-train.array_record-00000-of-00001"
    content = bytearray(file.read_bytes())
    content[200_000] ^= 1
    with file.open("r+b") as same:  # in place: the reader has the file open
        same.write(content)
    batches = data.stream_batches(made.train, 50, jax.random.key(0), 4)
    with pytest.raises(ValueError, match=r"must be intact.*prepare or copy it again"):
        list(batches)
    batches.close()


def test_changed_records_have_other_checksums(own_copy, cache_dir):
    data_dir, folder = own_copy

    def opened():
        where = {"data_dir": data_dir, "cache_dir": cache_dir}
        return data.load("cifar10", in_memory=False, **where)

    first = opened()
    names = [
        folder / f"cifar10-{s}.array_record-00000-of-00001" for s in ("train", "test")
    ]
    names[0].rename(folder / "swap")
    names[1].rename(names[0])
    (folder / "swap").rename(names[1])
    second = opened()
    assert first.train.images.checksum() == second.test.images.checksum()
    assert first.train.images.checksum() != second.train.images.checksum()
    for file in folder.iterdir():
        os.utime(file, (9, 9))  # another machine's copy: the data are the same
    assert opened().train.images.checksum() == second.train.images.checksum()


# -- TFDS: other sets -----------------------------------------------------------------


def test_unknown_sets_have_their_statistics_computed(prepare):
    examples = {"train": gray_examples(11), "test": gray_examples(5)}
    where = prepare("OwnSet", gray_features, examples, ("picture", "kind"))
    want = data.load("own_set", **where)
    made = data.load("own_set", in_memory=False, **where)
    assert (made.mean, made.std) == (want.mean, want.std)
    assert made.num_classes == want.num_classes == 7


def test_images_of_differing_shapes_are_an_error_when_met(prepare):
    splits = {"train": gray_examples(3) + gray_examples(1, 8), "test": gray_examples(2)}
    where = prepare("Sizes", gray_features, splits, ("picture", "kind"))
    with pytest.raises(ValueError, match=r"one shape, and train image \d has"):
        data.load("sizes", in_memory=False, **where).train.images[:]


def test_lazy_images_of_another_dtype_are_refused(prepare, monkeypatch):
    splits = {"train": gray_examples(3), "test": gray_examples(2)}
    where = prepare("Floats", gray_features, splits, ("picture", "kind"))
    parser = prepared._parser

    def floats(*args):  # TFDS writes such images with TensorFlow alone
        parse = parser(*args)
        return lambda record: {
            key: np.asarray(value, np.float32) for key, value in parse(record).items()
        }

    monkeypatch.setattr(prepared, "_parser", floats)
    with pytest.raises(TypeError, match="must be uint8.*float32.*in_memory=True"):
        data.load("floats", in_memory=False, **where)


def test_digits_are_in_memory_whatever_is_asked():
    made = data.load("digits", in_memory=False)
    assert isinstance(made.train.images, np.ndarray)


# -- a whole run --

RUN = TrainConfig(
    model="one_layer", method="otmdr", batch_size=64, steps=9, noise_std=0.01,
    augment=("crop", "flip"),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4"])
def test_a_streamed_run_is_a_resident_one_to_the_bit(mesh, one_layer, tmp_path):
    """Over an epoch's end, and stopped and resumed on the way."""
    config, small = RUN.replace(mesh=mesh), small_digits(320)
    config = config.replace(checkpoint_every=3)
    want = training.train(config.replace(input="device"), small, show_progress=False)
    config = config.replace(input="host")
    got = training.train(config, small, tmp_path / "run", show_progress=False)
    assert_same_bits(got.state.params, want.state.params)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "9")  # go on after step 6
    again = training.train(
        config, small, tmp_path / "run", resume=True, show_progress=False
    )
    assert_same_bits(again.state.params, want.state.params)
    np.testing.assert_array_equal(again.log_probs, want.log_probs)


@pytest.mark.slow
def test_a_run_from_disk_is_one_from_memory_on_cifar10(
    cifar_dir, cache_dir, one_layer, tmp_path
):
    """The real images, to the bit; and a run may go on with the other."""
    config = RUN.replace(
        data="cifar10", data_dir=str(cifar_dir), cache_dir=str(cache_dir),
        steps=6, mesh="data=2", augment=None, eval_batch_size=2_000,
    )  # fmt: skip
    memory = config.replace(input="device")
    want = training.train(memory, output=tmp_path / "run", show_progress=False)
    disk = config.replace(input="disk")
    got = training.train(disk, show_progress=False)
    assert_same_bits(got.state.params, want.state.params)
    for name in ("accuracy", "nll", "sharpness"):
        assert got.metrics[name] == want.metrics[name]
    resumed = training.train(
        disk, output=tmp_path / "run", resume=True, show_progress=False
    )
    assert resumed.metrics["nll"] == want.metrics["nll"]


@pytest.mark.slow
def test_auto_takes_the_first_memory_that_holds_the_images(one_layer, monkeypatch):
    config = RUN.replace(steps=1, mesh="data=1", augment=())
    dataset = data.load("digits")
    compiled = compile_programs(config, dataset)
    with feed.Feed(config, dataset, compiled, 0) as fed:
        assert fed.examples is not None and fed.stream is None
    monkeypatch.setattr(data, "fits_on_device", lambda *_: False)
    with feed.Feed(config, dataset, compiled, 0) as fed:
        assert fed.examples is None and fed.stream is not None


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
