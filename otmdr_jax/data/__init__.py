"""Image classification data: load once on the host, keep and augment on the device.

Small sets fit in an accelerator's memory, so training reads no files and waits for no
host: put `Dataset.train` on the device as uint8, then gather, augment and normalise
each batch inside the jitted step.

    dataset = load("cifar10", data_dir="~/tensorflow_datasets")
    train = jax.device_put(dataset.train)
    order = epoch_order(epoch_key, train.num_examples)
    images, labels = take(train, order, i, batch_size=128)          # inside jit
    images = augment(step_key, images, dataset.augment)
    images = normalise(images, dataset.mean, dataset.std)

Sets that do not fit there are streamed: `load(..., in_memory=False)` leaves the images
in their files, and `stream_batches` reads the same batches ahead of training.

To test on other images: `corrupt` shifts a batch on the device, `load_test` reads sets
that have no training split.

Importing this needs NumPy and JAX alone; TFDS, Grain, scikit-learn and rich are loaded
when something asks for them, TensorFlow never.
"""

from otmdr_jax.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    check_corruption,
    check_severity,
    corrupt,
)
from otmdr_jax.data.dataset import Dataset, Split, from_arrays, subset
from otmdr_jax.data.device import augment, epoch_order, eval_batches, normalise, take
from otmdr_jax.data.folder import from_folder
from otmdr_jax.data.huggingface import from_huggingface
from otmdr_jax.data.lazy import LazyImages
from otmdr_jax.data.loader import Loader, from_batches
from otmdr_jax.data.npz import save
from otmdr_jax.data.sources import (
    TestInfo,
    describe_test,
    is_folder,
    load,
    load_test,
)
from otmdr_jax.data.stream import fits_on_device, stream_batches
from otmdr_jax.data.targets import from_targets

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "Dataset",
    "LazyImages",
    "Loader",
    "Split",
    "TestInfo",
    "augment",
    "check_corruption",
    "check_severity",
    "corrupt",
    "describe_test",
    "epoch_order",
    "eval_batches",
    "fits_on_device",
    "from_arrays",
    "from_batches",
    "from_folder",
    "from_huggingface",
    "from_targets",
    "is_folder",
    "load",
    "load_test",
    "normalise",
    "save",
    "stream_batches",
    "subset",
    "take",
]
