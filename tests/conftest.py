"""Strict settings for every test: they run before the first use of a JAX backend."""

import contextlib
import os
import tempfile

import jax
import pytest

from tests.sets import cache_dir, cifar_dir, own_copy, prepare  # noqa: F401

# Programs compile once for all workers and for the processes that tests start. The
# first process makes the folder, the others inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="otmdr-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Small programs compile for longer than they run: XLA is told to optimize little, here
# and in the processes that tests start. `optimized` is for the core's tests, and
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs all tests as a user's programs are compiled.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
jax.config.update("jax_disable_most_optimizations", QUICK)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)
# Eight CPU devices, so that pmap and shard_map run for real on any machine.
jax.config.update("jax_num_cpu_devices", 8)
# A silent broadcast of (N,) with (N, 1) is the usual cause of a wrong loss.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)


@contextlib.contextmanager
def _optimized():
    # JAX's caches know nothing of the setting: a program of another test, compiled
    # quickly, would be used beside new ones, and the two differ in rounding.
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", QUICK)
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimized():
    """Programs of a module's tests are compiled as a user's are."""
    with _optimized():
        yield


@pytest.fixture
def optimized_once():
    """Programs of one test are compiled as a user's are: of what runs for longer."""
    with _optimized():
        yield


# The files that take longest, by processor time. Sent first, they leave short ones for
# the end, and no worker waits for the other.
LONG = (
    "distributed parallel ensemble examples training bnn_training baselines_collected "
    "docs bnn_gradients cli models baselines_sharpness"
).split()


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
