"""Folders of images: what is read, what is refused, and what is kept for next time."""

import io
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otmdr_jax import data
from otmdr_jax.data import encoded, folder

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(root, images, suffix=".png"):
    """Writes {"train/cat/1": array or PIL image} as files."""
    for name, image in images.items():
        path = root / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        image.save(path)


def tree(splits, classes=("cat", "dog"), count=3, shape=(6, 5, 3)):
    return {
        f"{split}{name}/{i}": pixels(*shape)
        for split in splits
        for name in classes
        for i in range(count)
    }


@pytest.fixture(scope="module")
def written():
    return tree(["train/", "test/", "val/"])


@pytest.fixture
def photos(tmp_path, written):
    """A folder of three splits, which a test may change."""
    write(tmp_path / "photos", written)
    return tmp_path / "photos"


@pytest.fixture
def load(cache_dir):
    def of(path, size=None, **options):
        return data.from_folder(path, size, cache_dir=cache_dir, **options)

    return of


def stacked(images, split):
    return np.stack([image for name, image in images.items() if split in name])


# -- What is read ---------------------------------------------------------------------


def test_three_splits_are_read_as_they_were_written(photos, written, load):
    made = load(photos)
    assert made.name == "photos" and made.class_names == ("cat", "dog")
    for split, name in (("train", "train"), ("test", "test"), ("validation", "val")):
        images, labels = getattr(made, split)
        np.testing.assert_array_equal(images, stacked(written, f"{name}/"))
        assert labels.tolist() == [0, 0, 0, 1, 1, 1] and labels.dtype == np.int32
    unit = stacked(written, "train/") / 255
    np.testing.assert_allclose(made.mean, unit.mean(axis=(0, 1, 2)), rtol=1e-12)
    assert made.augment == ()


def test_load_takes_folders(photos, load, cache_dir, monkeypatch):
    want = load(photos, 4)
    monkeypatch.chdir(photos.parent)
    for name in (str(photos), photos, "./photos", "photos/", "photos"):
        made = data.load(name, image_size=4, cache_dir=cache_dir)
        np.testing.assert_array_equal(made.train.images, want.train.images)
    moved = shutil.move("photos", "elsewhere")
    for now in (moved, os.path.dirname(os.path.abspath(moved))):
        if now != moved:
            shutil.move(moved, "photos")
        made = data.load(photos, data_dir=now, image_size=4, cache_dir=cache_dir)
        np.testing.assert_array_equal(made.train.images, want.train.images)
    with pytest.raises(ValueError, match=r"image_size is for folders.*\./digits"):
        data.load("digits", image_size=8)
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere'"):
        data.load("./nowhere")
    for of_tests in (data.load_test, data.describe_test):
        with pytest.raises(ValueError, match="folder of images.*data.save"):
            of_tests("./photos")


def test_a_name_is_a_set_unless_it_is_a_path_or_a_folder_of_images(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "cifar10", "mnist", "pets"):
        write(tmp_path, {f"{name}/cat/1": pixels(4, 4, 3)})
    (tmp_path / "svhn" / "1.0.0").mkdir(parents=True)  # as TFDS prepares a set
    (tmp_path / "svhn" / "1.0.0" / "dataset_info.json").write_text("{}")
    names = "digits", "cifar10", "svhn", "nothing", "pets", "mnist", "./digits"
    assert [data.is_folder(name) for name in names] == 4 * [False] + 3 * [True]


@pytest.mark.parametrize(
    "names",
    [("Train", "Test"), ("training", "testing"), ("train", "valid")],
    ids="-".join,
)
def test_splits_by_other_names(tmp_path, load, names):
    write(tmp_path, images := tree([f"{name}/" for name in names]))
    if names[1] == "valid":
        with pytest.warns(UserWarning, match="its valid folder is the test set"):
            made = load(tmp_path)
    else:
        made = load(tmp_path)
    assert made.validation is None
    np.testing.assert_array_equal(made.test.images, stacked(images, f"{names[1]}/"))


@pytest.mark.parametrize("top", ["", "train/"])
def test_a_training_set_alone_is_split_by_class(tmp_path, load, top):
    root = tmp_path / "photos"
    write(root, images := tree([top], count=10))
    with pytest.warns(UserWarning, match="has no test set: 4 of its 20 .* stratified"):
        made = load(root)
    assert np.bincount(made.test.labels).tolist() == [2, 2]
    both = np.concatenate([made.train.images, made.test.images])
    assert {x.tobytes() for x in both} == {x.tobytes() for x in images.values()}
    with pytest.warns(UserWarning, match="has no test set"):
        other = load(root, seed=1)
    assert not np.array_equal(other.test.images, made.test.images)


def test_a_class_may_be_called_train(tmp_path, load):
    write(tmp_path, tree([""], classes=("car", "train"), count=10))
    with pytest.warns(UserWarning, match="no test set"):
        made = load(tmp_path)
    assert made.class_names == ("car", "train")


def test_images_below_the_folder_of_a_class_and_linked_folders(tmp_path, load):
    write(tmp_path / "a", {"train/x/sub/1": (one := pixels(4, 4, 3))})
    write(tmp_path / "b", {"0": (two := pixels(4, 4, 3))})
    write(tmp_path / "a", {"test/x/1": (three := pixels(4, 4, 3))})
    os.symlink(tmp_path / "b", tmp_path / "a" / "train" / "y")
    made = load(tmp_path / "a")
    np.testing.assert_array_equal(made.train.images, np.stack([one, two]))
    np.testing.assert_array_equal(made.test.images, three[None])


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("photos", "."),  # what `ln -s photos photos` leaves the second time
        ("cat/all", "."),
        ("cat/all", "cat"),
        ("cat/more/all", "cat"),
        ("cat/all", ".."),
    ],
)
def test_links_to_a_folder_above_are_refused(link, target, tmp_path, load, monkeypatch):
    root = tmp_path / "data" / "photos"
    write(root, tree([""]))
    (root / link).parent.mkdir(exist_ok=True)
    (root / link).symlink_to((root / target).resolve())
    for path in (root, os.path.relpath(root)):
        with pytest.raises(ValueError, match=f"{link}' is a link to a folder that it"):
            load(path)
    (root / link).unlink()
    monkeypatch.chdir(root)
    for path in (".", "../photos", root):
        with pytest.warns(UserWarning, match="has no test set"):
            assert load(path).class_names[:2] == ("cat", "dog")


def test_classes_are_in_the_order_of_texts(tmp_path, load):
    names = ("10", "2", "B", "a")
    write(tmp_path, tree(["train/", "test/"], classes=names, count=1))
    made = load(tmp_path)
    assert made.class_names == names and made.train.labels.tolist() == [0, 1, 2, 3]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.dictionaries(
        st.text("abAB01 _é", min_size=1).filter(lambda x: x.strip() == x),
        st.integers(1, 3),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_any_folder_gives_back_what_was_written(
    tmp_path_factory, height, width, channels, classes, in_memory
):
    root = tmp_path_factory.mktemp("any")
    images = {
        f"{split}/{name}/{i}": pixels(height, width, channels)
        for split in ("train", "test")
        for name in sorted(classes)
        for i in range(classes[name])
    }
    write(root, images)
    made = data.from_folder(root, cache_dir=root / ".cache", in_memory=in_memory)
    assert made.class_names == tuple(sorted(classes))
    for split in ("train", "test"):
        found = np.asarray(getattr(made, split).images)
        np.testing.assert_array_equal(found, stacked(images, f"{split}/"))


# -- Pixels ---------------------------------------------------------------------------


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_side_that_is_too_long_loses_its_ends():
    """Against resizing the shorter side and cutting the middle out, by Pillow."""
    image = Image.fromarray(pixels(30, 50, 3))
    found = encoded.decode(encode(image), (12, 12))
    whole = image.resize((20, 12), Image.Resampling.BILINEAR)
    want = whole.crop((4, 0, 16, 12))
    np.testing.assert_array_equal(found, np.asarray(want))
    tall = encoded.decode(encode(image.transpose(Image.Transpose.ROTATE_90)), (12, 12))
    assert tall.shape == (12, 12, 3)
    # Antialiased: a fine chessboard is grey, and not black or white.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = encoded.decode(encode(Image.fromarray(board)), (8, 8))
    assert (
        small.shape == (8, 8, 1) and abs(small[1:-1, 1:-1].astype(int) - 127).max() < 6
    )


def test_an_image_of_the_size_keeps_its_bits():
    image = pixels(7, 9, 3)
    found = encoded.decode(encode(Image.fromarray(image)), (7, 9))
    np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(orientation):
    image = pixels(3, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.fromarray(image), exif=exif)
    # The rows and columns that the first row and column of the file are (EXIF 2.3).
    want = {
        1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1],
        5: image.swapaxes(0, 1), 6: np.rot90(image, -1),
        7: image[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(image, 1),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(encoded.decode(content, None), want)
    assert encoded.peek(content, None) == want.shape


def of_mode(mode):
    """An image of a mode, and its pixels by hand."""
    color, gray = pixels(4, 5, 3), pixels(4, 5)
    alpha = np.where(np.arange(5) < 2, 0, 255).astype(np.uint8) * np.ones((4, 1), "u1")
    seen = alpha[..., None] > 0
    if mode == "RGBA":
        image = Image.fromarray(np.concatenate([color, alpha[..., None]], axis=-1))
        return image, np.where(seen, color, 255)
    if mode == "LA":
        image = Image.merge("LA", [Image.fromarray(x) for x in (gray, alpha)])
        return image, np.where(seen, gray[..., None], 255)
    if mode == "1":
        return Image.fromarray(gray > 99), ((gray > 99) * np.uint8(255))[..., None]
    if mode == "P":
        image = Image.fromarray(gray % 4, "P")
        image.putpalette((table := pixels(4, 3)).ravel().tolist())
        return image, table[gray % 4]
    if mode == "P with transparency":
        image, want = of_mode("P")
        image.info["transparency"] = 2
        hidden = np.asarray(image)[..., None] == 2
        return image, np.where(hidden, 255, want)
    if mode == "I;16":
        deep = RNG.integers(0, 2**16, (4, 5)).astype(np.uint16)
        return Image.fromarray(deep), (deep // 256).astype(np.uint8)[..., None]
    if mode == "CMYK":
        ink = Image.fromarray(pixels(4, 5, 4), "CMYK")
        c, m, y, k = (np.asarray(x) / 255 for x in ink.split())
        rgb = np.stack([(1 - x) * (1 - k) for x in (c, m, y)], axis=-1)
        return ink, np.rint(255 * rgb)
    raise AssertionError(mode)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "1", "P", "P with transparency", "I;16", "CMYK"]
)
def test_images_of_any_mode_become_grey_or_rgb(mode):
    image, want = of_mode(mode)
    options = {"transparency": 2} if mode == "P with transparency" else {}
    content = encode(image, "TIFF" if mode == "CMYK" else "PNG", **options)
    found = encoded.decode(content, None)
    assert found.dtype == np.uint8 and encoded.peek(content, None) == want.shape
    np.testing.assert_allclose(found, want, atol=1 if mode == "CMYK" else 0)


def test_pixels_of_an_unknown_scale_are_refused():
    for values in (
        np.ones((2, 2), np.float32),
        np.full((2, 2), 70_000, np.int32),
        np.full((2, 2), 200, np.int32),
    ):
        content = encode(Image.fromarray(values), "TIFF")
        with pytest.raises(ValueError, match="whose scale is not known"):
            encoded.decode(content, None)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("where", ["train/cat/1", "test/dog/0"])
def test_one_image_of_colour_gives_all_three_channels(tmp_path, load, where, in_memory):
    root = tmp_path / "photos"
    gray = tree(["train/", "test/"], shape=(4, 4, 1))
    write(root, gray)
    assert load(root, in_memory=in_memory).image_shape == (4, 4, 1)
    write(root, {where: (color := pixels(4, 4, 3))})
    made = load(root, in_memory=in_memory)
    assert made.image_shape == (4, 4, 3)
    for split in ("train", "test"):
        want = [
            color if name == where else image.repeat(3, axis=-1)
            for name, image in gray.items()
            if split in name
        ]
        found = np.asarray(getattr(made, split).images)
        np.testing.assert_array_equal(found, np.stack(want))


# -- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_several_sizes_need_one(photos, load, in_memory):
    write(photos, {"test/cat/9": pixels(8, 5, 3)})
    with pytest.raises(ValueError, match=r"6x5.*8x5.*size=64.*--image-size"):
        load(photos, in_memory=in_memory)
    write(photos, {"train/dog/1": pixels(6, 9, 3)})
    with pytest.raises(ValueError, match=r"6x5.*train/dog/1\.png 6x9"):
        load(photos, in_memory=in_memory)
    assert load(photos, 5, in_memory=in_memory).image_shape == (5, 5, 3)
    assert load(photos, (3, 4), in_memory=in_memory).image_shape == (3, 4, 3)


def test_files_that_cannot_be_read_are_named(photos, load):
    half = (photos / "train/dog/1.png").read_bytes()[:60]
    (photos / "train/dog/1.png").write_bytes(half)
    (photos / "train/cat/0.png").write_bytes(b"no image")  # the first one
    both = r"2 of 6 are not: train/cat/0\.png \([\w ]+\); train/dog/1\.png \([\w ]+"
    with pytest.raises(ValueError, match=both):
        load(photos)
    (photos / "train/cat/0.png").unlink()
    unit = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    lazy = load(photos, 4, in_memory=False, **unit)  # it looks at the heads alone
    with pytest.raises(ValueError, match=r"train/dog/1\.png is not \(.*Restore"):
        np.asarray(lazy.train.images)


def test_without_pillow_the_error_says_what_to_install(photos, load, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs pillow.*pip install '.\[data\]'"):
        load(photos)


def rename(old, new):
    return lambda root: (root / old).rename(root / new)


@pytest.mark.parametrize(
    "change, message",
    [
        (rename("test/cat", "test/cats"), "cats of '.*test' is none. Rename"),
        (rename("val", "other"), "train, test and val alone.* it has other"),
        (lambda root: shutil.copytree(root / "val", root / "valid"), "val and valid"),
        (lambda root: (root / "train/elk").mkdir(), "'elk' of '.*train' has none"),
        (rename("train/cat/0.png", "train/0.png"), r"1 lie in '.*train' itself, as 0"),
        (lambda root: [shutil.rmtree(x) for x in root.iterdir()], "it has none"),
        (
            lambda root: [x.unlink() for x in root.glob("test/*/*")],
            "the test set of .* holds no images",
        ),
        (
            lambda root: os.mkdir(os.fsencode(root / "train") + b"/h\xfchner"),
            "names of classes must be text",
        ),
        (rename("train", "train_set"), "in it, and none called train"),
        (lambda root: shutil.rmtree(root / "train"), "in it, and none called train"),
    ],
    ids=[
        "foreign", "other", "twice", "empty", "alone", "nothing", "no test", "bytes",
        "name", "gone",
    ],
)  # fmt: skip
def test_folders_of_another_form_are_refused(photos, load, change, message):
    change(photos)
    with pytest.raises(ValueError, match=message):
        load(photos)


def test_sizes_and_own_validation_sets_are_checked(photos, load):
    for size in (0, -1, 2.5, (4,), (4, 4, 3), True, "64"):
        with pytest.raises(ValueError, match="size must be a number of pixels"):
            load(photos, size)
    with pytest.raises(ValueError, match="validation set of its own"):
        load(photos, validation=0.5)


def test_other_files_are_said_and_hidden_ones_are_not(photos, load):
    for name in ("train/cat/notes.TXT", "test/dog/a.heic", "test/dog/b.heic"):
        (photos / name).write_text("x")
    for name in ("train/.DS_Store", "train/cat/.hidden.png", "test/dog/Thumbs.db"):
        (photos / name).write_text("x")
    (photos / "__MACOSX").mkdir()
    with pytest.warns(UserWarning, match=r"not used: 2 \.heic, 1 \.txt\."):
        assert load(photos).train.num_examples == 6


# -- The cache ------------------------------------------------------------------------


@pytest.fixture
def no_decoding(monkeypatch):
    def start():
        def fail(*args):
            raise AssertionError("read again")

        monkeypatch.setattr(encoded, "decode", fail)

    return start


def test_a_second_load_decodes_nothing(photos, load, no_decoding, cache_dir):
    first = load(photos, 4)
    no_decoding()
    again = load(photos, 4)
    for split in ("train", "validation", "test"):
        for got, want in zip(getattr(again, split), getattr(first, split), strict=True):
            np.testing.assert_array_equal(got, want)
    assert again.mean == first.mean and again.class_names == first.class_names
    with pytest.raises(ValueError, match="read again"):  # of another size
        load(photos, 5)
    (file,) = cache_dir.iterdir()
    file.write_bytes(file.read_bytes()[:-9])  # a damaged one is made again
    with pytest.raises(ValueError, match="read again"):
        load(photos, 4)


def test_a_moved_folder_is_not_decoded_again(photos, load, no_decoding):
    load(photos)
    moved = photos.rename(photos.parent / "moved")
    moved.rename(photos)
    no_decoding()
    load(photos)


def replace_bytes(root):
    """By another image of the same size in bytes, with the times of the old one."""
    path = root / "train/cat/0.bmp"
    old = path.stat()
    write(root, {"train/cat/0": pixels(6, 5, 3)}, ".bmp")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (old.st_size, old.st_mtime_ns)


def swap_classes(root):
    """By renaming their folders, which changes no file."""
    train = root / "train"
    (train / "cat").rename(train / "other")
    (train / "dog").rename(train / "cat")
    (train / "other").rename(train / "dog")


@pytest.mark.parametrize(
    "change",
    [
        replace_bytes,
        rename("train/cat/0.bmp", "train/dog/0a.bmp"),
        swap_classes,
        lambda root: (root / "train/cat/0.bmp").unlink(),
        lambda root: write(root, {"train/cat/00": pixels(6, 5, 3)}),
    ],
    ids=["replaced", "relabelled", "swapped", "removed", "added"],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_changed_folder_is_read_anew(photos, load, change, in_memory):
    write(photos, {"train/cat/0": pixels(6, 5, 3)}, ".bmp")
    load(photos, in_memory=in_memory)
    change(photos)
    made = load(photos, in_memory=in_memory)
    found = zip(np.asarray(made.train.images), made.train.labels, strict=True)
    want = [
        (np.asarray(Image.open(file)), i)
        for i, name in enumerate(("cat", "dog"))
        for file in sorted((photos / "train" / name).iterdir())
    ]
    for (image, label), (image_, label_) in zip(found, want, strict=True):
        np.testing.assert_array_equal(image, image_)
        assert label == label_


def test_a_file_that_changes_while_it_is_read_is_noticed(photos, load, monkeypatch):
    read = encoded.read_splits

    def slow(*args, **options):
        found = read(*args, **options)
        write(photos, {"train/cat/0": pixels(6, 5, 3)})
        return found

    monkeypatch.setattr(folder, "read_splits", slow)
    with pytest.raises(ValueError, match="changed while they were read"):
        load(photos)
    monkeypatch.undo()
    made = load(photos)  # and the cache of it is not used
    want = np.asarray(Image.open(photos / "train/cat/0.png"))
    np.testing.assert_array_equal(made.train.images[0], want)


# -- Lazy images ----------------------------------------------------------------------


def test_lazy_images_are_those_in_memory(photos, load, no_decoding):
    whole, lazy = load(photos, 4), load(photos, 4, in_memory=False)
    for split in ("train", "validation", "test"):
        want, found = getattr(whole, split), getattr(lazy, split)
        assert isinstance(found.images, data.LazyImages)
        np.testing.assert_array_equal(np.asarray(found.images), want.images)
        np.testing.assert_array_equal(found.labels, want.labels)
        again = pickle.loads(pickle.dumps(found.images))
        np.testing.assert_array_equal(again[[2, 0]], want.images[[2, 0]])
    assert lazy.mean == whole.mean
    checksums = [load(photos, in_memory=False).train.images.checksum() for _ in "ab"]
    write(photos, {"train/cat/0": pixels(6, 5, 3)})
    assert checksums[0] == checksums[1]
    assert load(photos, in_memory=False).train.images.checksum() != checksums[0]


def test_a_lazy_image_that_has_changed_is_refused(photos, load):
    lazy = load(photos, in_memory=False)
    write(photos, {"train/dog/1": pixels(6, 5, 3)})
    with pytest.raises(ValueError, match=r"train/dog/1\.png is not \(it has changed"):
        lazy.train.images[4]
    np.testing.assert_array_equal(
        lazy.train.images[3], np.asarray(Image.open(photos / "train/dog/0.png"))
    )


def test_what_fits_is_decoded(photos, load, monkeypatch):
    assert isinstance(load(photos).train.images, np.ndarray)
    monkeypatch.setattr(encoded, "fits_in_memory", lambda size: size < 18 * 6 * 5 * 3)
    assert isinstance(load(photos).train.images, data.LazyImages)
