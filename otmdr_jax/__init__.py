"""OT-MDR for JAX and Optax: robust gradients against the worst model nearby."""

from otmdr_jax._version import __version__

__all__ = ["__version__"]
