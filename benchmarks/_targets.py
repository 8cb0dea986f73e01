"""Accelerators that are not here: what XLA needs to compile for them, and their rates.

Compilation needs a recent JAX with `libtpu` for TPUs, and with `jax-cuda13-plugin` and
`jax-cuda13-pjrt` for GPUs (`pip install --no-deps` suffices, the CUDA libraries are
not used). Rates are those of the makers' data sheets.
"""

import os
import re
from typing import NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

# Facts of an H100 SXM as XLA's GpuTargetConfigProto asks for them: 132 multiprocessors
# at 1.98 GHz, 50 MiB of L2, 3.35 TB/s, compute capability 9.0, cuDNN 9.10.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 85029158912
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Chip(NamedTuple):
    """A kind of chip.

    Attributes:
      name: What its maker calls it.
      bfloat16: Peak of dense products in bfloat16, operations a second.
      float32: The same for float32 as XLA computes it by default: TF32 on GPUs; TPUs
        round the factors to bfloat16.
      bandwidth: Of its memory, bytes a second.
      memory: Bytes.
      interconnect: Bytes a second that a chip sends to others of its slice or node,
        all links together.
      outside: Bytes a second of its link to other nodes; None where the slice is the
        whole.
    """

    name: str
    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    interconnect: float
    outside: float | None = None


NODE = 8  # GPUs
CHIPS = {
    # NVLink 4: 900 GB/s in both directions together. Nodes of 8 with an InfiniBand
    # NDR link of 400 Gb/s for each GPU.
    "h100": Chip("NVIDIA H100 SXM", 989e12, 494e12, 3.35e12, 80e9, 450e9, 50e9),
    # Google's figures for a chip: v5e 1,600 Gb/s, v5p 4,800 Gb/s, v6e 3,584 Gb/s of
    # interchip interconnect in all.
    "v5e": Chip("TPU v5e", 197e12, 197e12, 0.82e12, 16e9, 200e9),
    "v5p": Chip("TPU v5p", 459e12, 459e12, 2.765e12, 95e9, 600e9),
    "v6e": Chip("TPU v6e", 918e12, 918e12, 1.64e12, 32e9, 448e9),
}
# Chips -> the topology that libtpu knows. v5p is a torus of three dimensions.
TPU_SHAPES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 64: "4x4x4", 256: "4x8x8"},
}


class Target(NamedTuple):
    """Chips of one kind.

    Attributes:
      name: What the command line calls it: "h100", "h100x8", "v5e-4".
      chip: What one of them is.
      platform: "gpu" or "tpu", as `jax.default_backend()` calls it.
      devices: What to lower and compile for; nothing runs on them.
    """

    name: str
    chip: Chip
    platform: str
    devices: list

    def traced_for(self):
        """A context in which the library sees this target as JAX's default backend."""
        return mock.patch.multiple(
            jax,
            default_backend=lambda: self.platform,
            device_count=lambda: len(self.devices),
        )

    def exchange_rate(self):
        """Bytes a second that each chip sends in rings; the slowest link decides.

        A ring leaves each node once; eight of them, one for each link to other nodes,
        share the bytes.
        """
        if self.platform == "tpu" or len(self.devices) <= NODE:
            return self.chip.interconnect
        return min(self.chip.interconnect, NODE * self.chip.outside)


def target_of(name):
    """Finds the chips that a name stands for.

    Args:
      name: "h100" or "h100x8" (any number of them), or a slice of TPUs such as "v5e-4".

    Raises:
      ValueError: Nobody knows it.
      RuntimeError: The compiler is not installed.
    """
    found = re.fullmatch(r"(h100)(?:x(\d+))?|(v5e|v5p|v6e)-(\d+)", name)
    count = int(found[2] or found[4] or 1) if found else 0
    kind = found and (found[1] or found[3])
    known = count if kind == "h100" else count in (TPU_SHAPES[kind] if kind else ())
    if not known or (kind == "h100" and count > NODE and count % NODE):
        slices = ", ".join(f"{k}-{n}" for k, sizes in TPU_SHAPES.items() for n in sizes)
        raise ValueError(
            "targets are h100, h100x8 (or another number up to 8, or a multiple of "
            f"it), {slices}; got {name!r}."
        )
    # Without these libtpu asks the network what it runs on.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs on a TPU
    try:
        if kind == "h100":
            nodes, each = (count // NODE, NODE) if count > NODE else (1, count)
            topology = topologies.get_topology_desc(
                name, "cuda", target_config=H100, topology=f"1x{nodes}x{each}"
            )
        else:
            shape = TPU_SHAPES[kind][count]
            options = {}
            if count == 1:
                shape, options = "1x1", {"chips_per_host_bounds": (1, 1, 1)}
            topology = topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **options)
    except Exception as error:
        package = (
            "jax-cuda13-plugin and jax-cuda13-pjrt" if kind == "h100" else "libtpu"
        )
        raise RuntimeError(
            f"there is no compiler for {name} here ({type(error).__name__}: "
            f"{str(error)[:200]}). Install {package} for JAX {jax.__version__}: "
            "pip install --no-deps."
        ) from error
    platform = "gpu" if kind == "h100" else "tpu"
    return Target(name, CHIPS[kind], platform, list(topology.devices))
