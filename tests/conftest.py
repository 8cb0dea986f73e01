"""Strict settings for every test: they run before the first use of a JAX backend."""

import jax
import pytest

# Eight CPU devices, so that pmap and shard_map run for real on any machine.
jax.config.update("jax_num_cpu_devices", 8)
# A silent broadcast of (N,) with (N, 1) is the usual cause of a wrong loss.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)
