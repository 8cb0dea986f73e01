"""From a configuration to its networks and methods.

networks.py   networks, of one architecture or several
options.py    which options a method has, and which go together
assembly.py   methods, with what depends on the data and the length of the run
"""

from otmdr_jax.experiments.building.assembly import methods_of
from otmdr_jax.experiments.building.networks import check_models, dropout_rate, networks
from otmdr_jax.experiments.building.options import (
    check_used,
    method_names,
    method_options,
    num_subbatches,
    options_of,
)
from otmdr_jax.experiments.methods import method_of

__all__ = [
    "check_models",
    "check_used",
    "dropout_rate",
    "method_names",
    "method_of",
    "method_options",
    "methods_of",
    "networks",
    "num_subbatches",
    "options_of",
]
