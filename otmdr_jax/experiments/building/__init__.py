"""From a configuration to its networks and methods.

networks.py   networks, of one architecture or several
assembly.py   methods, with what depends on the data and the length of the run
"""

from otmdr_jax.experiments.building.assembly import methods_of
from otmdr_jax.experiments.building.networks import check_models, dropout_rate, networks

__all__ = ["check_models", "dropout_rate", "methods_of", "networks"]
