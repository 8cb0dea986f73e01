r"""The Gauss-Newton matrix of a classifier over a data set, batch by batch.

For the softmax cross entropy it equals the Fisher information, whose labels are drawn
from the model:

.. math:: H = \sum_n J_n^T \Lambda_n J_n, \qquad
    \Lambda_n = \mathrm{diag}(p_n) - p_n p_n^T, \qquad
    J_n = \partial f(x_n) / \partial w

Three parts of it are computed exactly, as sums over examples: the block of the last
layer, whose Jacobian is its input; the Kronecker factors of that block; and the
diagonal over all weights, by one backward pass for each class and example.

References: Martens, `New Insights and Perspectives on the Natural Gradient Method
<https://arxiv.org/abs/1412.1193>`_, JMLR 2020; Ritter et al., `A Scalable Laplace
Approximation for Neural Networks <https://openreview.net/forum?id=Skdvd2xAZ>`_, ICLR
2018.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import tree

PyTree = Any

STRUCTURES = ("last-layer", "last-layer-kron", "diagonal")

# The most parameters of a head whose whole matrix is used: it takes 400 MB in float32,
# and its eigenvectors take as much.
MOST_PARAMETERS = 10_000

# How many numbers the gradients of a micro-batch may take: 256 MB in float32.
NUMBERS_AT_ONCE = 2**26


def head_of(params: PyTree) -> tuple[jax.Array, jax.Array | None]:
    """The kernel (D, C) and the bias (C,), or None, of a classifier's last layer.

    Args:
      params: Nested dictionaries with the last layer in `params["head"]`: a `kernel`
        and, if it has one, a `bias`. All models of the zoo have it there.

    Raises:
      ValueError: There is no such layer.
    """
    head = params.get("head") if isinstance(params, dict) else None
    good = isinstance(head, dict) and set(head) in ({"kernel"}, {"kernel", "bias"})
    if not isinstance(head, dict) or not good or head["kernel"].ndim != 2:
        raise ValueError(
            "a Laplace approximation of the last layer needs that layer as "
            'params["head"], with a kernel (features, classes) and a bias or none; got '
            f"{jax.tree.map(jnp.shape, params)}. Rename the layer, or use "
            "laplace='diagonal', which looks at no layer."
        )
    return head["kernel"], head.get("bias")


def check_size(params: PyTree, structure: str) -> None:
    """Raises ValueError if these parameters do not allow a structure."""
    if structure == "diagonal":
        return
    kernel, bias = head_of(params)
    rows = kernel.shape[0] + (bias is not None)
    size = rows * kernel.shape[1]
    if structure == "last-layer" and size > MOST_PARAMETERS:
        raise ValueError(
            f"the last layer has {size:,} parameters, whose Gauss-Newton matrix would "
            f"take {size**2 * 4 / 2**30:.1f} GiB; up to {MOST_PARAMETERS:,} are "
            "possible. Use --laplace last-layer-kron, its Kronecker factors, or "
            "--laplace diagonal."
        )


def features(
    model: Any, params: PyTree, model_state: PyTree, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits and the input of the last layer, found from the model's derivative.

    Logits are linear in the head's kernel, so their derivative along a tangent is the
    head's input times the tangent. A tangent with a single one in each of its C columns
    shows C features at once. Only the head of the network is differentiated.

    Args:
      model: The model, with `apply`.
      params: Its parameters, as for :func:`head_of`.
      model_state: Its statistics, used to normalise.
      images: (B, H, W, C), normalised.

    Returns:
      (B, C) logits, and (B, D) features, (B, D + 1) with a last one of 1 where the head
      has a bias; float32 or wider.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import models
      >>> from otmdr_jax.baselines import curvature
      >>> model, images = models.create("cnn_small", 10), jnp.ones((4, 8, 8, 1))
      >>> logits, phi = curvature.features(
      ...     model, *model.init(jax.random.key(0), images), images
      ... )
      >>> logits.shape, phi.shape  # 32 features and the bias's
      ((4, 10), (4, 33))
    """
    kernel, bias = head_of(params)
    size, classes = kernel.shape

    def logits_of(kernel):
        changed = {**params, "head": {**params["head"], "kernel": kernel}}
        return _logits(model, changed, model_state, images)

    logits, along = jax.linearize(logits_of, kernel)
    groups = -(-size // classes)
    ones = jnp.eye(size, groups * classes, dtype=kernel.dtype)
    tangents = ones.reshape(size, groups, classes).swapaxes(0, 1)  # (groups, D, C)
    found = jax.vmap(along, out_axes=1)(tangents)  # (B, groups, C)
    found = found.reshape(logits.shape[0], -1)[:, :size]
    if bias is not None:
        found = jnp.concatenate([found, jnp.ones_like(found[:, :1])], axis=1)
    return logits, found


def of_batch(
    model: Any,
    params: PyTree,
    model_state: PyTree,
    images: jax.Array,
    mask: jax.Array,
    structure: str,
) -> dict[str, PyTree]:
    """The part of the matrix that a batch adds.

    Args:
      model: The model, with `apply`. BatchNorm normalises by its running statistics, so
        examples do not depend on each other.
      params: Its parameters.
      model_state: Its statistics.
      images: (B, H, W, C), normalised.
      mask: (B,) numbers, 0 for examples that do not count.
      structure: The part to compute, one of :data:`STRUCTURES`.

    Returns:
      A dictionary. For "diagonal": `diagonal`, with the structure of `params`. For
      "last-layer": the `full` matrix (D C, D C), where D counts the bias and rows are
      ordered as in a (D, C) array. For "last-layer-kron": the sums `features` (D, D)
      and `logits` (C, C) of each example's Kronecker factors, and their `count`. The
      last two also have `mismatch` and `scale`: the sums of squares of the difference
      between the logits and those of the last layer, and of the logits.
    """
    mask = mask.astype(jnp.float32)
    if structure == "diagonal":
        return {"diagonal": _diagonal(model, params, model_state, images, mask)}
    kernel, bias = head_of(params)
    logits, phi = features(model, params, model_state, images)
    weights = kernel if bias is None else jnp.concatenate([kernel, bias[None]])
    with jax.default_matmul_precision("highest"):
        away = logits - phi @ weights
        probs = jax.nn.softmax(logits)
        eye = jnp.eye(probs.shape[-1], dtype=probs.dtype)
        # (B, C, C) diag(p) - p p^T of the examples that count.
        inner = probs[:, :, None] * (eye[None] - probs[:, None, :])
        inner = inner * mask[:, None, None]
        found: dict[str, PyTree] = {
            "mismatch": jnp.sum(away**2 * mask[:, None]),
            "scale": jnp.sum(logits**2 * mask[:, None]),
        }
        if structure == "last-layer-kron":
            return found | {
                "features": (phi * mask[:, None]).T @ phi,
                "logits": jnp.sum(inner, axis=0),
                "count": jnp.sum(mask),
            }

        def row(of_class):  # (B, C) -> (D, C, D), a class's rows: B D C numbers at once
            both = phi[:, :, None] * of_class[:, None, :]
            return jnp.einsum("ndc,ne->edc", both, phi)

        rows = jax.lax.map(row, inner.swapaxes(0, 1))  # (C, D, D, C)
        size = phi.shape[1] * probs.shape[1]
        return found | {"full": rows.swapaxes(0, 1).reshape(size, size)}


def _diagonal(model, params, model_state, images, mask):
    """sum_n sum_c p_nc (d log p_nc / dw)^2, micro-batch by micro-batch."""
    zeros = jax.tree.map(
        lambda p: jnp.zeros_like(p, tree.accumulation_dtype(p)), params
    )

    def of_example(image, weight):
        def logits_of(params):
            return _logits(model, params, model_state, image[None])[0]

        logits, pull = jax.vjp(logits_of, params)
        probs = jax.nn.softmax(logits)
        eye = jnp.eye(len(probs), dtype=probs.dtype)
        # Lambda is roots^T roots: a backward pass for each row.
        roots = jnp.sqrt(probs)[:, None] * (eye - probs[None])

        def add(total, root):
            (grads,) = pull(root)
            return jax.tree.map(
                lambda t, g: t + weight * g.astype(t.dtype) ** 2, total, grads
            ), None

        return jax.lax.scan(add, zeros, roots)[0]

    def of_part(part):
        each = jax.vmap(of_example)(*part)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), each)

    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    size = min(max(NUMBERS_AT_ONCE // numbers, 1), len(images))
    parts = -(-len(images) // size)

    def cut(x):
        x = jnp.pad(x, [(0, parts * size - len(x))] + [(0, 0)] * (x.ndim - 1))
        # Strided, so that devices that share a batch share each part of it.
        return x.reshape(size, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(part)), None

    return jax.lax.scan(add, zeros, (cut(images), cut(mask)))[0]


def _logits(model, params, model_state, images):
    logits, _ = model.apply(params, model_state, images, train=False)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def prior_precision(eigenvalues: PyTree, squared_norm: jax.Array) -> jax.Array:
    r"""The precision of a Gaussian prior that maximises the marginal likelihood.

    .. math:: \log p(D \mid \delta) = \text{const} + \tfrac P2 \log \delta
        - \tfrac\delta2 \|w\|^2 - \tfrac12 \sum_i \log(h_i + \delta)

    Its derivative by log delta is half of sum_i h_i / (h_i + delta) - delta |w|^2,
    which falls from the rank of H to minus infinity: there is one maximum, MacKay's
    fixed point, and bisection finds it.

    Args:
      eigenvalues: The eigenvalues of H, or its diagonal: arrays in any pytree, not
        negative.
      squared_norm: The squared norm of the weights.

    Returns:
      delta, a scalar.

    Reference: MacKay, A Practical Bayesian Framework for Backpropagation Networks,
    Neural Computation 1992; Immer et al., `Scalable Marginal Likelihood Estimation for
    Model Selection in Deep Learning <https://arxiv.org/abs/2104.04975>`_, ICML 2021.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.baselines.curvature import prior_precision
      >>> round(float(prior_precision(jnp.array([4.0]), jnp.array(1.25))), 3)
      0.683
    """
    leaves = jax.tree.leaves(eigenvalues)
    number = sum(x.size for x in leaves)
    tiny = jnp.finfo(jnp.float32).tiny
    norm = jnp.maximum(squared_norm, tiny * number)
    high = jnp.log(number / norm)  # where the first term could be P at the most

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = effective_number(leaves, jnp.exp(middle)) > jnp.exp(middle) * norm
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    # The bounds span thirty orders of magnitude; the result has all digits of float32.
    low, high = jax.lax.fori_loop(0, 40, halve, (high - 69.0, high))
    return jnp.exp((low + high) / 2)


def effective_number(eigenvalues: PyTree, precision: jax.Array) -> jax.Array:
    """The number of parameters that the data determine: the sum of h / (h + delta)."""
    leaves = jax.tree.leaves(eigenvalues)
    return sum((jnp.sum(x / (x + precision)) for x in leaves), jnp.zeros(()))
