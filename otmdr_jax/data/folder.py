"""A folder of images, with a folder for each class."""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from otmdr_jax.data import cache
from otmdr_jax.data.dataset import Dataset, from_arrays
from otmdr_jax.data.encoded import check_size, read_splits
from otmdr_jax.data.lazy import LazyImages

# What a folder of one split may be called, in small letters.
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
_SUFFIXES = {
    ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
}  # fmt: skip
# What other programs leave in folders.
_OF_SYSTEMS = {"__MACOSX", "Thumbs.db", "desktop.ini"}


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files below a folder: an :class:`otmdr_jax.data.encoded.Encoded`."""

    root: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        """The number of files."""
        return len(self.names)

    def read(self, row: int) -> bytes:
        """The content of a file."""
        with open(os.path.join(self.root, self.names[row]), "rb") as file:
            return file.read()

    def name_of(self, row: int) -> str:
        """Its path below the folder."""
        return self.names[row]


def from_folder(
    path: str | os.PathLike,
    size: int | tuple[int, int] | None = None,
    *,
    validation: int | float = 0,
    label_noise: float = 0.0,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Sequence[str] = (),
    cache_dir: str | os.PathLike | None = None,
    in_memory: bool | None = None,
) -> Dataset:
    """Loads a folder of images that has a folder for each class.

    Either `path/train/CLASS/...` with `path/test/CLASS/...`, `path/val/CLASS/...` or
    both, or `path/CLASS/...` alone. Classes are numbered in the order of their names as
    texts, so that "10" comes before "2"; images may lie in folders below their class's.
    Without a test folder the validation folder is the test set, with a warning; without
    either a fifth of the images is left to test on, stratified by class and drawn by
    `seed`, with a warning.

    Pillow decodes the images, by threads. Each becomes uint8: turned as its EXIF
    orientation says, transparent pixels over white, 16 bits by their high byte,
    palettes and CMYK as RGB, the first frame of several. They have one channel if all
    of them are greyscale, three otherwise.

    Args:
      path: The folder.
      size: The side in pixels, or (height, width), that images are resized to: the
        shorter side is resized, with bilinear antialiasing, and the middle of the other
        one is cut out. None for images that have one size.
      validation: Training images to hold out, a count or a fraction, stratified.
        Default 0: none, or those of the validation folder.
      label_noise: The fraction of training labels to replace by other classes. Default
        0.
      seed: The seed of the splits and of the label noise.
      mean: The mean of each channel; None computes it as :func:`from_arrays` does.
      std: The standard deviation of each channel; None computes it.
      augment: Names of augmentations for training, "crop" and "flip". Default none.
      cache_dir: The folder where decoded images are kept, so that only the first load
        decodes; the default is that of :func:`load`. A file whose name, size or times
        have changed is noticed.
      in_memory: True to decode all images now. False to decode them when they are
        needed, as `LazyImages` to train on with `stream_batches`; files are then read
        once to check them. None, the default, decodes them if they take at most a
        quarter of the host's memory.

    Returns:
      A `Dataset` of the folder's name, with the names of the classes.

    Raises:
      FileNotFoundError: There is no such folder.
      ImportError: Pillow is missing; the message says what to install.
      ValueError: The folders are not as above, images cannot be read (their names are
        said) or have several sizes, or an option is not as above.

    Warns:
      UserWarning: There is no test folder; there are files that are no images.

    Example:
      >>> import pathlib, tempfile
      >>> from PIL import Image
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for split, count in (("train", 4), ("test", 2)):
      ...         for name in ("cat", "dog"):
      ...             (own := pathlib.Path(folder, split, name)).mkdir(parents=True)
      ...             for i in range(count):
      ...                 Image.new("RGB", (20, 16), (i, 9, 9)).save(own / f"{i}.png")
      ...     pets = from_folder(folder, size=8, cache_dir=f"{folder}/.cache")
      >>> pets.image_shape, pets.class_names, pets.train.labels.tolist()
      ((8, 8, 3), ('cat', 'dog'), [0, 0, 0, 0, 1, 1, 1, 1])
    """
    root = pathlib.Path(path).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {str(root)!r}: correct the path.")
    shape = check_size(size)
    splits = _splits(root)
    classes = _classes(root, splits)
    number = {name: i for i, name in enumerate(classes)}
    files, labels = {}, {}
    skipped: Counter[str] = Counter()
    for split, folder in splits.items():
        listed = list(_images(root, folder, skipped))
        files[split] = Files(str(root), tuple(name for name, _ in listed))
        labels[split] = np.array([number[own] for _, own in listed], np.int32)
    _warn_of(skipped, root)
    identity = {
        "name": root.name[:64],
        "version": "as-is" if shape is None else f"{shape[0]}x{shape[1]}",
        "fingerprint": _fingerprint(files),
    }
    directory = pathlib.Path(cache_dir or cache.default_directory()).expanduser()
    images = read_splits(
        files, shape, root.name, in_memory=in_memory, cached=(directory, identity)
    )
    if _fingerprint(files) != identity["fingerprint"]:
        raise ValueError(
            f"files of {str(root)!r} have changed while they were read: wait until "
            "nothing writes there, and load it again."
        )
    pairs: dict[str, Any] = {x: (images[x], labels[x]) for x in splits}
    if "validation" in pairs:
        if validation:
            raise ValueError(
                f"{str(root)!r} has a validation set of its own: leave "
                f"validation={validation!r} out."
            )
        validation = pairs["validation"]
    return from_arrays(
        pairs["train"],
        pairs.get("test"),
        name=root.name,
        class_names=classes,
        validation=validation,
        label_noise=label_noise,
        seed=seed,
        mean=mean,
        std=std,
        augment=augment,
    )


def images_below(
    path: str | os.PathLike, shape: tuple[int, int, int]
) -> tuple[LazyImages, tuple[str, ...]]:
    """The images of a folder without classes, to predict them.

    Args:
      path: The folder; images are taken at any depth.
      shape: (H, W, C) of the images that a network takes. They are resized and cropped
        as :func:`from_folder` does it; greyscale ones get C equal channels.

    Returns:
      The images, decoded when they are indexed, and their paths below the folder.

    Raises:
      ValueError: There are none, some cannot be read, or they have colours and C is 1.
    """
    root, skipped = pathlib.Path(path), Counter[str]()
    names = tuple(_images_of(root, root, skipped))
    if not names:
        kinds = ", ".join(sorted(_SUFFIXES))
        raise ValueError(f"{str(root)!r} must hold images, and has none ({kinds}).")
    _warn_of(skipped, root)
    encoded = {"images": Files(str(root), names)}
    found: Any = read_splits(encoded, shape[:2], root.name, in_memory=False)["images"]
    if found.shape[-1] > shape[-1]:
        raise ValueError(
            f"the images of {str(root)!r} must be greyscale, as the network's are, and "
            "some have colours. Convert them."
        )
    if found.shape[-1] == shape[-1]:
        return found, names

    def read(rows):
        return np.repeat(found[rows], shape[-1], axis=-1)

    return LazyImages(read, (len(names), *shape)), names


def holds_images(path: str | os.PathLike) -> bool:
    """Whether there is such a folder, with images in it at any depth."""
    root = pathlib.Path(path)
    return root.is_dir() and any(_is_image(file) for file in _walk(root))


def _splits(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folder of each split; that of training alone may be the root itself."""
    inside = _folders(root)
    found: dict[str, pathlib.Path] = {}
    for folder in inside:
        if (split := _SPLITS.get(folder.name.lower())) is None:
            continue
        if split in found:
            raise ValueError(
                f"{str(root)!r} must have one folder of a split, and it has "
                f"{found[split].name} and {folder.name}. Move one of them away."
            )
        found[split] = folder
    # A class may be called "train" or "test"; its folder then has images, no folders.
    if "train" not in found or not _folders(found["train"]):
        if parted := [x.name for x in found.values() if _folders(x)]:
            raise ValueError(
                f"{str(root)!r} has a folder {parted[0]} with folders of classes in "
                "it, and none called train. Rename the folder of the training images, "
                "or give a folder of classes alone."
            )
        found = {"train": root}
    elif others := [x.name for x in inside if x not in found.values()]:
        raise ValueError(
            f"{str(root)!r} must hold train, test and val alone, or folders of classes "
            f"alone, and beside {found['train'].name} it has {', '.join(others[:5])}. "
            "Move them away."
        )
    for folder in found.values():
        if alone := [x.name for x in _files(folder) if _is_image(x)]:
            raise ValueError(
                f"images must lie in the folder of their class, and {len(alone)} lie "
                f"in {str(folder)!r} itself, as {alone[0]}. Move them, or give the "
                "folder above."
            )
    if "train" in found and "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
        warnings.warn(
            f"{str(root)!r} has no test folder; its {found['test'].name} folder is the "
            "test set.",
            stacklevel=3,
        )
    return {x: found[x] for x in ("train", "validation", "test") if x in found}


def _classes(root: pathlib.Path, splits: dict[str, pathlib.Path]) -> tuple[str, ...]:
    """The names of the classes, which training has images of."""
    classes = tuple(x.name for x in _folders(splits["train"]))
    if not classes:
        raise ValueError(
            f"{str(root)!r} must hold a folder for each class, or train, test and val "
            "with these, and it has none. Make them, or correct the path."
        )
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"names of classes must be text, and {name!r} of "
                f"{str(splits['train'])!r} is none in UTF-8. Rename the folder."
            ) from error
        if not any(_is_image(x) for x in _walk(splits["train"] / name)):
            raise ValueError(
                f"each class must have images to train on, and {name!r} of "
                f"{str(splits['train'])!r} has none ({', '.join(sorted(_SUFFIXES))}). "
                "Remove its folder, or add images."
            )
    for split, folder in splits.items():
        if foreign := [x.name for x in _folders(folder) if x.name not in classes]:
            raise ValueError(
                f"each class of the {split} set must be one of training, and "
                f"{', '.join(foreign[:5])} of {str(folder)!r} is none. Rename it, or "
                "move it away."
            )
    return classes


def _images(
    root: pathlib.Path, folder: pathlib.Path, skipped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """(path below the root, class) of each image of a split, in order."""
    for own in _folders(folder):
        for name in _images_of(root, own, skipped):
            yield name, own.name


def _images_of(root, folder, skipped):
    """Paths below the root of images at any depth; counts what is none by its kind."""
    for file in _walk(folder):
        if _is_image(file):
            yield file.relative_to(root).as_posix()
        else:
            skipped[file.suffix.lower() or file.name] += 1


def _warn_of(skipped, root):
    if skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in skipped.most_common(5))
        warnings.warn(
            f"{str(root)!r} also holds files that are no images, which are not used: "
            f"{kinds}.",
            stacklevel=3,
        )


def _fingerprint(files: dict[str, Files]) -> str:
    """A hash that changes when an image is added, removed, renamed or written.

    Of the name, size and times of each file; to read them all would take as long as to
    decode them. The time of the last change of the inode tells a file that was replaced
    by one of the same size whose time of modification has been set back, as copying
    programs do.
    """
    digest = hashlib.sha256()
    for split, listed in files.items():
        for name in listed.names:
            stat = os.stat(os.path.join(listed.root, name))
            entry = [split, name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _is_image(file: pathlib.Path) -> bool:
    return file.suffix.lower() in _SUFFIXES


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return [x for x in _listed(folder) if x.is_dir()]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [x for x in _listed(folder) if not x.is_dir()]


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    shown = (x for x in folder.iterdir() if not _is_hidden(x.name))
    return sorted(shown, key=lambda x: x.name)


def _walk(
    folder: pathlib.Path, above: pathlib.Path | None = None
) -> Iterator[pathlib.Path]:
    """All files at any depth, in order; a folder that cannot be read is an error.

    So is a link to a folder that it lies in: what is there would be read again and
    again, as images of another class.
    """
    above = (above or pathlib.Path(os.path.abspath(folder)).parent).resolve()
    place = folder.resolve()
    if above.is_relative_to(place):
        raise ValueError(
            f"{str(folder)!r} is a link to a folder that it lies in, {str(place)!r}, "
            "whose images would be read twice: remove the link."
        )
    for one in _listed(folder):
        if one.is_dir():
            yield from _walk(one, folder)
        else:
            yield one
