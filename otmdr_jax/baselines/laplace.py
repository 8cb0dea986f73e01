r"""Laplace approximations: a Gaussian around trained weights, from curvature.

.. math:: \mathcal N\left(w^*, (H + \delta I)^{-1}\right)

H is the Gauss-Newton matrix of the last layer over the training set
(:mod:`otmdr_jax.baselines.curvature`), or its diagonal over all weights; delta is the
precision of the prior. Any method of one weight vector does the training; `finalize`
fits the Gaussian afterwards, and only predictions use it. Samples of the last layer
predict directly. Samples of all weights predict through the network's linearisation at
the mode, since H is the curvature of that (Immer et al., 2021).

References: MacKay, A Practical Bayesian Framework for Backpropagation Networks, 1992;
Daxberger et al., `Laplace Redux <https://arxiv.org/abs/2106.14806>`_, NeurIPS 2021;
Immer et al., `Improving predictions of Bayesian neural nets via local linearization
<https://arxiv.org/abs/2008.08400>`_, AISTATS 2021.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.baselines import curvature
from otmdr_jax.baselines.finalize import Finalize
from otmdr_jax.core import tree
from otmdr_jax.core.checks import check_count, check_word

PyTree = Any

# The largest relative difference between the model's logits and those of the layer that
# is taken for its last one.
_TOLERANCE = 1e-2


class LaplacePosterior(NamedTuple):
    """A fitted Gaussian, as predictions need it.

    Attributes:
      prior_precision: delta, the precision of the prior.
      effective_parameters: The number of parameters that the data determine.
      draws: (S, D, C) draws of the last layer minus its mode, with the bias as the last
        row of D; None for the diagonal.
      std: Standard deviations of all weights; None for the last layer.
    """

    prior_precision: jax.Array
    effective_parameters: jax.Array
    draws: jax.Array | None
    std: PyTree | None


def laplace(
    method: Any,
    model: Any,
    structure: str = "last-layer",
    *,
    num_samples: int = 30,
    prior_precision: float | None = None,
) -> Any:
    """Makes a method that predicts with a Laplace approximation of what it trains.

    Args:
      method: A :class:`otmdr_jax.experiments.methods.Method` of one weight vector.
      model: The method's model.
      structure: The part of the matrix to use: "last-layer", the whole matrix of the
        last layer, for up to 10,000 parameters; "last-layer-kron", its Kronecker
        factors; or "diagonal", the diagonal over all weights.
      num_samples: S, the number of samples in a prediction.
      prior_precision: delta; None chooses the one of highest marginal likelihood.

    Returns:
      A method. Its `finalize.of_batch` takes (images, mask). Sum its results over the
      training set, each example once, and give them to `finalize.finish`, which puts a
      :class:`LaplacePosterior` into `method_state` and cannot be compiled by `jax.jit`.
      `predict` then returns (S, B, C) log-probabilities; before, it returns those of
      the method itself, (1, B, C).

    Raises:
      ValueError: The structure is unknown, or the number of samples or the precision is
        not valid; in `finish` a matrix that is 0, without a precision.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from otmdr_jax import methods, models
      >>> from otmdr_jax.baselines import laplace
      >>> model = models.create("cnn_small", 10)
      >>> method = laplace(methods.create("sgd", model, optax.sgd(0.1)), model)
      >>> images = jax.random.normal(jax.random.key(0), (20, 8, 8, 1))
      >>> state = method.init(jax.random.key(0), images)
      >>> found = method.finalize.of_batch(state, (images, jnp.ones(20)))
      >>> method.predict(method.finalize.finish(state, found), images).shape
      (30, 20, 10)
    """
    check_word("laplace", structure, curvature.STRUCTURES)
    check_count("num_samples", num_samples)
    if prior_precision is not None and not 0 < prior_precision < float("inf"):
        raise ValueError(
            f"prior_precision must be positive, or left out, got {prior_precision}."
        )
    # Squares of gradients, and gradients without a loss scale, underflow in float16.
    # Whole batches are seen outside of any device axis.
    if getattr(model, "dtype", None) == jnp.float16:
        model = dataclasses.replace(model, dtype=jnp.dtype(jnp.float32))
    if getattr(model, "batchnorm_axis_name", None) is not None:
        model = dataclasses.replace(model, batchnorm_axis_name=None)

    def init(key, example_images):
        state = method.init(key, example_images)
        curvature.check_size(state.params, structure)
        return state

    def of_batch(state, batch):
        images, mask = batch
        # An image that is not finite was in no step of training either.
        axes = tuple(range(1, images.ndim))
        finite = jnp.all(jnp.isfinite(images), axis=axes, keepdims=True)
        images, mask = jnp.where(finite, images, 0), mask * finite.reshape(mask.shape)
        return curvature.of_batch(
            model, state.params, state.model_state, images, mask, structure
        )

    @jax.jit
    def fitted(state, found):
        weights = state.params if structure == "diagonal" else _head(state.params)
        values, draw = _eigen(found, structure, jax.tree.map(jnp.shape, weights))
        norm = tree.norm(weights) ** 2
        delta = (
            curvature.prior_precision(values, norm)
            if prior_precision is None
            else jnp.asarray(prior_precision, jnp.float32)
        )
        number = curvature.effective_number(values, delta)
        if structure == "diagonal":
            std = jax.tree.map(lambda h: 1 / jnp.sqrt(h + delta), values)
            return LaplacePosterior(delta, number, None, std)
        noise = jax.random.normal(_key(state), (num_samples, *weights.shape))
        return LaplacePosterior(delta, number, draw(noise, delta), None)

    def finish(state, found):
        _check_last_layer(found)
        kept = state._replace(opt_state=None, memory=None)  # not to be mapped over
        if state.step.ndim:  # members of one architecture
            posterior = jax.lax.map(lambda row: fitted(*row), (kept, found))
        else:
            posterior = fitted(kept, found)
        if prior_precision is None:
            _check_curvature(posterior.effective_parameters)
        return state._replace(method_state=posterior)

    def predict(state, images):
        posterior = state.method_state
        state = state._replace(method_state=None)
        if posterior is None:
            return method.predict(state, images)
        if posterior.draws is not None:
            logits, phi = curvature.features(
                model, state.params, state.model_state, images
            )
            moved = jnp.einsum("nd,sdc->snc", phi, posterior.draws)
            return jax.nn.log_softmax(logits[None] + moved)

        def logits_of(params):
            logits, _ = model.apply(params, state.model_state, images, train=False)
            return logits.astype(jnp.float32)

        logits, along = jax.linearize(logits_of, state.params)

        def row(i):  # the same sample for all batches
            moved = _noise(posterior.std, jax.random.fold_in(_key(state), i))
            return jax.nn.log_softmax(logits + along(tree.like(moved, state.params)))

        return jax.lax.map(row, jnp.arange(num_samples))

    return method._replace(
        init=init,
        predict=predict,
        finalize=Finalize(of_batch, finish, augmented=False),
    )


def _key(state):
    return jax.random.split(state.key, 3)[2]


def _head(params):
    """The last layer as one array (D, C), the bias as the last row."""
    kernel, bias = curvature.head_of(params)
    return kernel if bias is None else jnp.concatenate([kernel, bias[None]])


def _noise(std, key):
    leaves, structure = jax.tree.flatten(std)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        x * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def _eigen(found, structure, shape):
    """Eigenvalues of H, and the function that turns normal noise into draws.

    The prior is added to the eigenvalues of the whole matrix, for a Kronecker product
    too.
    """
    if structure == "diagonal":
        return found["diagonal"], None

    def spectrum(matrix):
        values, vectors = jnp.linalg.eigh(matrix)
        return jnp.maximum(values, 0.0), vectors  # of a matrix without negative ones

    if structure == "last-layer":
        values, vectors = spectrum(found["full"])

        def rotate(scaled):
            return (scaled.reshape(len(scaled), -1) @ vectors.T).reshape(scaled.shape)

        values = values.reshape(shape)  # of eigenvectors, in any order
    else:
        of_features, left = spectrum(found["features"])
        of_logits, right = spectrum(found["logits"] / jnp.maximum(found["count"], 1))
        values = of_features[:, None] * of_logits[None]

        def rotate(scaled):
            return left @ scaled @ right.T

    def draw(noise, delta):
        with jax.default_matmul_precision("highest"):
            return rotate(noise / jnp.sqrt(values + delta)[None])

    return values, draw


def _check_curvature(effective_parameters):
    """The likelihood is then highest at delta = 0: draws of any length."""
    if jnp.any(effective_parameters == 0):
        raise ValueError(
            "the Gauss-Newton matrix is 0, from which no precision of a prior follows: "
            "all predictions of the training set are certain to rounding, or no "
            "example counted. Give a prior_precision, or a network that is less sure."
        )


def _check_last_layer(found):
    if "mismatch" not in found:
        return
    shares = jnp.sqrt(found["mismatch"] / found["scale"])  # of each member
    # NaN is that of a member that diverged, which says so elsewhere.
    share = float(jnp.max(jnp.nan_to_num(shares, nan=0.0)))
    if share > _TOLERANCE:
        raise ValueError(
            'the logits must be those of params["head"], an affine map of its input, '
            f"but they differ from these by {share:.3g} of their size. A Laplace "
            "approximation of the last layer needs it to be the last; use "
            "laplace='diagonal'."
        )
