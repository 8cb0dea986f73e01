"""The compiled functions behind a configuration: data and model in, numbers out.

inputs.py       the data and the devices that it names
compiled.py     Programs: a step, predictions and what else runs on devices
provenance.py   versions, and checksums of data
"""

from otmdr_jax.experiments.programs.compiled import (
    Programs,
    compile_programs,
    loss_sum,
    run_keys,
    step_memory_mib,
)
from otmdr_jax.experiments.programs.inputs import (
    few_images,
    load_data,
    make_mesh,
    much_noise,
    named,
)
from otmdr_jax.experiments.programs.provenance import (
    DataInfo,
    check_same_data,
    describe,
    environment,
    fingerprint,
    fingerprint_of_test,
    same_data,
)

__all__ = [
    "DataInfo",
    "Programs",
    "check_same_data",
    "compile_programs",
    "describe",
    "environment",
    "few_images",
    "fingerprint",
    "load_data",
    "loss_sum",
    "make_mesh",
    "much_noise",
    "named",
    "run_keys",
    "same_data",
    "step_memory_mib",
    "fingerprint_of_test",
]
