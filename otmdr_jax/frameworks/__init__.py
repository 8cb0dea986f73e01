"""Models as objects: the gradient functions of Flax NNX and Equinox, robust.

The core sees pytrees of parameters alone. Here a model is taken apart and put together
in each pass, as the framework's own gradient function does it. Each module needs its
package, and loads when it is first used: `otmdr_jax.nnx`, `otmdr_jax.equinox`.
"""
