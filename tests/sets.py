"""Image sets on disk for tests: a small real CIFAR-10 and sets of our own, by TFDS."""

import contextlib
import io
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from otmdr_jax import data

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PER_CLASS = 20


def run_python(code, *args, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
    )


@contextlib.contextmanager
def at_most(size):
    """Lets no file of this process become larger, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def small_digits(num_train=320, **options):
    """The first digits, 100 of them to test on: a run takes seconds."""
    digits = data.load("digits")
    train, test = digits.train, digits.test
    return data.from_arrays(
        (train.images[:num_train], train.labels[:num_train]),
        (test.images[:100], test.labels[:100]),
        num_classes=10,
        name="small",
        **options,
    )


@pytest.fixture
def few_digits(monkeypatch):
    """Whatever a command reads are 320 digits, and 100 to test on."""
    few = small_digits()
    monkeypatch.setattr(data, "load", lambda *_, **__: few)
    return few


def real_cifar10(rows):
    """Real CIFAR-10 images (N, 32, 32, 3) uint8 and their labels; skips without them.

    They are sorted by class, 5,000 of each and, from row 50,000 on, 1,000 of each.
    """
    file = SHARED / "data" / "cifar10_jpeg.npz"
    if not file.exists():
        pytest.skip(f"no {file}: it has the real CIFAR-10")
    Image = pytest.importorskip("PIL.Image")
    with np.load(file) as arrays:
        header, scans = arrays["header"].tobytes(), arrays["scans"].tobytes()
        offsets, labels = arrays["offsets"], arrays["labels"]
    pixels = []
    for i in rows:
        jpeg = header + scans[offsets[i] : offsets[i + 1]]
        with Image.open(io.BytesIO(jpeg)) as image:
            pixels.append(np.asarray(image.convert("RGB")))
    return np.stack(pixels), labels[rows].astype(np.int32)


@pytest.fixture(scope="session")
def cifar_dir(tmp_path_factory):
    tool = SHARED / "tools" / "make_cifar10_tfds.py"
    if not tool.exists():
        pytest.skip(f"no {tool}: it prepares CIFAR-10 from a local file")
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run(
        [sys.executable, tool, folder, "--limit-per-class", str(PER_CLASS)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return folder


@pytest.fixture
def own_copy(cifar_dir, tmp_path):
    """A copy that a test may damage, and the folder of its files."""
    shutil.copytree(cifar_dir, tmp_path / "tfds")
    return tmp_path / "tfds", tmp_path / "tfds" / "cifar10" / "3.0.2"


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def encoded(value):
    """An image as a PNG file, which TFDS stores without TensorFlow."""
    from PIL import Image

    if not isinstance(value, np.ndarray):
        return value
    file = io.BytesIO()
    Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value).save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture
def prepare(tmp_path):
    """Prepares a set of the given features and examples as TFDS's own writer does."""
    tfds = pytest.importorskip("tensorflow_datasets")
    registered = pytest.importorskip("tensorflow_datasets.core.registered")

    def make(name, features, splits, supervised=None):
        def generate(self, examples):
            for index, example in enumerate(examples):
                yield index, {k: encoded(v) for k, v in example.items()}

        body = {
            "__module__": "__main__",  # or TFDS looks for files beside the module
            "VERSION": tfds.core.Version("1.2.3"),
            "_info": lambda self: tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features(tfds.features)),
                supervised_keys=supervised,
            ),
            "_split_generators": lambda self, manager: {
                split: self._generate_examples(examples)
                for split, examples in splits.items()
            },
            "_generate_examples": generate,
        }
        with registered.skip_registration():
            builder = type(name, (tfds.core.GeneratorBasedBuilder,), body)
        folder = tmp_path / "own"
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
        return {"data_dir": folder, "cache_dir": tmp_path / "cache"}

    return make


def gray_features(features):
    return {
        "picture": features.Image(shape=(None, None, 1)),
        "kind": features.ClassLabel(num_classes=7),
        "note": features.Text(),
    }


def gray_examples(num, side=6):
    rng = np.random.default_rng(num)
    return [
        {
            "picture": rng.integers(0, 256, (side, side, 1), dtype=np.uint8),
            "kind": int(rng.integers(3)),
            "note": "unused",
        }
        for _ in range(num)
    ]
