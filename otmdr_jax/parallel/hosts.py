"""Runs on many hosts: joining one, and deciding together.

If only one host knows something (a signal, its clock, a failure), it must tell the
others before any of them acts on it. Otherwise the hosts take different ways, and one
waits for another for ever.
"""

import signal
import threading
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to a run on many hosts, by `jax.distributed`.

    Call it before anything uses a device. On SLURM, Open MPI, Kubernetes and Cloud TPU
    the environment provides all arguments.

    Args:
      coordinator: The address "host:port" of process 0, reachable from all hosts.
      num_processes: The number of processes.
      process_id: The number of this process, from 0.

    Raises:
      ValueError: Some of the three are missing and not in the environment.
      RuntimeError: The other processes cannot be reached, or a device is in use
        already.
    """
    given = coordinator, num_processes, process_id
    if any(x is not None for x in given) and None in given:
        raise ValueError(
            "a run on many hosts needs coordinator, num_processes and process_id "
            f"together, or none of them on a cluster that JAX knows; got {given}."
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)
    if threading.current_thread() is threading.main_thread():
        # JAX catches SIGTERM as a notice of preemption, which nothing here asks for:
        # until a training loop listens, the signal must end the process as usual.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_main() -> bool:
    """True for the process that writes logs and reports."""
    return jax.process_index() == 0


def agree(*numbers: float) -> tuple[float, ...]:
    """The maximum over all hosts of each number; every host must call it."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    # As words, since JAX would round float64: steps above 2^24 are no float32.
    words = np.asarray(numbers, np.float64).view(np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(words)).view(np.float64)
    return tuple(np.max(everyone, axis=0).tolist())


def check_agreement(text: str, what: str) -> None:
    """Refuses hosts that were started differently and would wait for each other.

    Args:
      text: The text that must be the same on all hosts.
      what: Its name in the error.

    Raises:
      ValueError: The texts differ; raised on every host.
    """
    high, low = divmod(zlib.crc32(text.encode()), 2**16)  # a float32 holds 24 bits
    found = agree(high, low, -high, -low)
    if found != (high, low, -high, -low):
        raise ValueError(
            f"{what} must be the same on all hosts, and is not: start the same command "
            "on each."
        )


def on_main(function: Callable[[], Any]) -> Any:
    """Calls a function on the main process only; every host must call this.

    Returns:
      The function's result on the main process, None elsewhere.

    Raises:
      RuntimeError: The function failed on the main process, which raises its own error;
        raised on the other hosts, so that they do not wait.
    """
    result: Any = None
    error: BaseException | None = None
    if is_main():
        try:
            result = function()
        except BaseException as caught:  # also of Ctrl-C the others must know
            error = caught
    (failed,) = agree(float(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("process 0 failed; its own log says why.")
    return result
