"""Strict settings for every test: they run before the first use of a JAX backend."""

import os
import tempfile

import jax
import pytest

from tests.sets import cache_dir, cifar_dir, own_copy, prepare  # noqa: F401

# Programs compile once for all workers and for the processes that tests start. The
# first process makes the folder, the others inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="otmdr-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
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
