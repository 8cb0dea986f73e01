r"""The Hessian of a whole set's mean loss: its eigenvalues, eigenvectors and trace.

The Hessian is never built. Everything comes from products :math:`H v`, each of which is
one pass over the set. For ReLUs it is the Hessian of the smooth piece that the solution
lies on.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax.core import tree
from otmdr_jax.core.checks import check_count
from otmdr_jax.landscape import lanczos
from otmdr_jax.landscape.objective import LossSum, Objective

PyTree = Any

# The size up to which the whole matrix is as cheap as a search.
_SMALL = 40


class Spectrum(NamedTuple):
    r"""The result of :func:`hessian_eigenvalues`.

    Attributes:
      values: (k,) eigenvalues in float64, in the order of `which`.
      vectors: k eigenvectors, pytrees like the parameters of norm 1, zero where a leaf
        does not move. The sign is such that the largest entry is positive.
      residuals: (k,) norms :math:`\|H v - \lambda v\|_2`: each value is at most this
        far from an eigenvalue.
      products: The number of products H v, each a pass over the set, that it took.
    """

    values: np.ndarray
    vectors: list[PyTree]
    residuals: np.ndarray
    products: int


class Trace(NamedTuple):
    """The result of :func:`hessian_trace`.

    Attributes:
      value: The mean of `samples`.
      standard_error: The standard error of that mean, estimated from the probes.
      samples: (n,) one estimate for each probe.
    """

    value: float
    standard_error: float
    samples: np.ndarray


def hessian_product(
    loss_sum: LossSum,
    params: PyTree,
    batches: Iterable[PyTree],
    vector: PyTree,
    *,
    mask: PyTree | None = None,
) -> PyTree:
    r"""The Hessian of the mean loss times a vector, :math:`\nabla^2 L(\theta) v`.

    Args:
      loss_sum: (params, batch) -> (sum of losses, number of examples). It is compiled
        once, so pass the same function object each time.
      params: The solution.
      batches: The set, in batches of any sizes; iterated over once.
      vector: A pytree like `params`.
      mask: A pytree of bools, or a function of `params` to one, True where a leaf
        moves; None for all floating leaves. The Hessian is that of these leaves.

    Returns:
      A pytree like `params`, zero where a leaf does not move; in float32 or wider. The
      vector is rounded to the dtypes of `params` first: for bfloat16 parameters convert
      these to float32 if three digits are too few.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> def loss_sum(w, batch):
      ...     return 0.5 * (w[0] ** 2 + 9 * w[1] ** 2), 1
      >>> v = jnp.array([1.0, 2.0])
      >>> landscape.hessian_product(loss_sum, jnp.zeros(2), [None], v)
      Array([ 1., 18.], dtype=float32)

    Reference: Pearlmutter, 1994.
    """
    whole = Objective(loss_sum, params, batches, mask)
    return whole.embed(whole.product(whole.leaves(vector)))


def hessian_eigenvalues(
    loss_sum: LossSum,
    params: PyTree,
    batches: Iterable[PyTree],
    k: int = 1,
    *,
    which: str = "largest",
    tol: float = 1e-3,
    max_restarts: int = 100,
    mask: PyTree | None = None,
) -> Spectrum:
    r"""Eigenvalues and eigenvectors of the Hessian at an end of its spectrum.

    They are found by Lanczos' method with thick restarts, each as often as it occurs:
    for k > 1 the method starts again from random vectors outside of what it has found,
    until it finds nothing more. The chance that such a search overlooks an eigenvalue
    is at most 0.001 (see :mod:`otmdr_jax.landscape.lanczos`).

    Products are computed on the device. The host holds :math:`\max(20, 2 k + 1) + k`
    vectors, and four more at work. Random vectors are fixed, so the result is the same
    each time. The whole matrix is built for up to 40 weights, or that many; and for up
    to 2,000 where eigenvalues crowd so much that the search would take longer. The
    result is then exact up to rounding, and the host holds a vector for each weight.

    Args:
      loss_sum: (params, batch) -> (sum of losses, number of examples). It is compiled
        once, so pass the same function object each time.
      params: The solution.
      batches: The set, in batches of any sizes; iterated over once for each product.
        k = 1 takes 21 products if the first eigenvalue stands apart; otherwise it is
        :math:`\max(20, 2 k + 1)`, about 15 for the search for others, and k for the
        residuals. Each time that eigenvalues occur again adds 10 to 20. Up to 2,000
        weights there are at most 5/4 as many products as weights, and k.
      k: The number of eigenvalues.
      which: The end of the spectrum: "largest", the most positive first; "smallest",
        the most negative first; "magnitude", the largest absolute values first.
      tol: Relative error of the eigenvalues; 1e-3 as in PyHessian. Of eigenvalues below
        0.001 of the largest one in magnitude it is relative to that bound.
      max_restarts: The number of restarts, in each search, before it gives up; 100, as
        PyHessian's iterations. Each takes :math:`\max(20, 2 k + 1) / 2` products.
        Up to 2,000 weights there are none.
      mask: A pytree of bools, or a function of `params` to one, True where a leaf
        moves; None for all floating leaves. The Hessian is that of these leaves.

    Returns:
      A :class:`Spectrum`.

    Raises:
      ValueError: k or `which` is not possible, or the Hessian is not finite.
      RuntimeError: The eigenvalues of more than 2,000 weights, or the search for
        others, have not converged. The message says which one, and its residual.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> def loss_sum(w, batch):
      ...     return 0.5 * (w[0] ** 2 + 9 * w[1] ** 2), 1
      >>> found = landscape.hessian_eigenvalues(loss_sum, jnp.zeros(2), [None], k=2)
      >>> found.values.tolist(), found.vectors[0].tolist()
      ([9.0, 1.0], [0.0, 1.0])

    Reference: Wu & Simon, `Thick-Restart Lanczos Method for Large Symmetric Eigenvalue
    Problems <https://doi.org/10.1137/S0895479898334605>`_, 2000; Kuczyński &
    Woźniakowski, `Estimating the Largest Eigenvalue by the Power and Lanczos Algorithms
    with a Random Start <https://doi.org/10.1137/0613066>`_, 1992; Yao et al., 2020
    (PyHessian).
    """
    if which not in lanczos.ORDERS:
        raise ValueError(f"which must be one of {list(lanczos.ORDERS)}, got {which!r}.")
    if not tol > 0:
        raise ValueError(f"tol must be a positive number, got {tol!r}.")
    check_count("max_restarts", max_restarts)
    whole = Objective(loss_sum, params, batches, mask)
    shapes = [w.shape for w in whole.center]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    size = int(ends[-1])
    check_count("k", k)
    if k > size:
        raise ValueError(f"k must be between 1 and the {size} weights, got {k}.")
    dtype = np.result_type(*(tree.accumulation_dtype(w) for w in whole.center))

    def unravel(vector):
        parts = np.split(np.ravel(vector), ends[:-1])
        return [x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)]

    products = 0

    def times(vector):
        nonlocal products
        products += 1
        leaves = jax.device_get(whole.product(unravel(vector)))
        result = np.concatenate([np.ravel(x) for x in leaves]).astype(dtype)
        if not np.isfinite(result).all():
            raise ValueError(
                "the Hessian is not finite at these parameters: check the loss there, "
                "or use a wider dtype."
            )
        return result

    if size <= max(_SMALL, lanczos.room(k)):
        columns = np.stack([times(row) for row in np.eye(size, dtype=dtype)])
        values, vectors = np.linalg.eigh((columns + columns.T) / 2)
        order = np.argsort(lanczos.ORDERS[which](values), kind="stable")[:k]
        values, vectors = values[order], vectors.T[order]
    else:
        values, vectors = lanczos.leading(
            times, size, dtype, k, which, tol, max_restarts
        )
    peaks = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], axis=1)
    vectors = vectors * np.where(peaks < 0, -1, 1).astype(dtype)
    residuals = [
        np.linalg.norm(times(v) - value * v)
        for value, v in zip(values, vectors, strict=True)
    ]
    return Spectrum(
        values.astype(np.float64),
        [whole.embed([*map(jnp.asarray, unravel(v))]) for v in vectors],
        np.asarray(residuals, np.float64),
        products,
    )


def hessian_trace(
    loss_sum: LossSum,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    key: jax.Array,
    num_probes: int = 100,
    mask: PyTree | None = None,
) -> Trace:
    r"""The trace of the Hessian, the sum of its eigenvalues, by Hutchinson's method.

    .. math:: \frac{1}{n} \sum_i z_i^\top H z_i, \quad z_i \in \{-1, 1\}^P

    The estimate has no bias; the variance of a probe is
    :math:`2 \sum_{i \ne j} H_{ij}^2`. The number of probes is fixed, while PyHessian
    stops as soon as two means are alike, which may happen by chance.

    Args:
      loss_sum: (params, batch) -> (sum of losses, number of examples). It is compiled
        once, so pass the same function object each time.
      params: The solution.
      batches: The set, in batches of any sizes; iterated over `num_probes` times.
      key: A PRNG key; the same key gives the same probes.
      num_probes: The number of probes z, at least 2; 100 as in PyHessian. The standard
        error falls with its root.
      mask: A pytree of bools, or a function of `params` to one, True where a leaf
        moves; None for all floating leaves. The Hessian is that of these leaves.

    Returns:
      A :class:`Trace`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> def loss_sum(w, batch):
      ...     return 0.5 * (w[0] ** 2 + 9 * w[1] ** 2) + w[0] * w[1], 1
      >>> found = landscape.hessian_trace(
      ...     loss_sum, jnp.zeros(2), [None], key=jax.random.key(0))
      >>> abs(found.value - 10) < 3 * found.standard_error
      True

    Reference: Hutchinson, 1990; Yao et al., 2020 (PyHessian).
    """
    check_count("num_probes", num_probes)
    if num_probes < 2:
        raise ValueError(
            f"num_probes must be at least 2, for a standard error; got {num_probes}."
        )
    whole = Objective(loss_sum, params, batches, mask)
    samples = np.empty(num_probes)
    for i in range(num_probes):
        probe = _rademacher(whole.center, jax.random.fold_in(key, i))
        samples[i] = sum(map(float, _dots(probe, whole.product(probe))))
    error = np.std(samples, ddof=1) / math.sqrt(num_probes)
    return Trace(float(np.mean(samples)), float(error), samples)


@jax.jit
def _rademacher(center, key):
    return [
        jax.random.rademacher(jax.random.fold_in(key, i), w.shape, w.dtype)
        for i, w in enumerate(center)
    ]


@jax.jit
def _dots(first, second):
    return [jnp.sum(x.astype(y.dtype) * y) for x, y in zip(first, second, strict=True)]
