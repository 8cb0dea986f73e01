r"""Slices through the loss of a whole set: along lines and planes in weight space.

.. math:: f(a, b) = L(\theta + a\, x + b\, y)

where x and y are random directions, eigenvectors of the Hessian, or directions between
solutions. At every point BatchNorm uses the running statistics of `loss_sum`.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax.core import tree
from otmdr_jax.core.ascent import resolve_mask
from otmdr_jax.core.checks import check_count
from otmdr_jax.landscape.objective import LossSum, Objective

PyTree = Any

# The time between two reports of a grid: short, so that little is lost, but long enough
# that reading the set again costs nothing.
SECONDS_A_REPORT = 2.0
# The most points that an accelerator evaluates at once; they fit in half of its memory.
MOST_AT_ONCE = 16


class Subspace(NamedTuple):
    """A line or plane through or near solutions.

    Attributes:
      origin: The solution at 0: the first of :func:`through`, the last of
        :func:`trajectory_plane`.
      directions: One or two pytrees like it, orthogonal and of equal length.
      points: (n, d) coordinates of the n solutions.
      explained: (d,) shares of the solutions' variance along the directions; None if
        they hold all of it by construction.
    """

    origin: PyTree
    directions: tuple[PyTree, ...]
    points: np.ndarray
    explained: np.ndarray | None = None


def random_direction(
    params: PyTree,
    key: jax.Array,
    *,
    filter_axis: int = -1,
    mask: PyTree | None = None,
) -> PyTree:
    r"""A Gaussian direction whose filters have the norms of the parameters' filters.

    .. math:: d_{ij} \leftarrow d_{ij} \|\theta_{ij}\|_2 / \|d_{ij}\|_2

    for filter j of leaf i, so that a network is shown at the scale of its weights.
    Leaves with fewer than two axes (biases, BatchNorm) get 0.

    Args:
      params: The solution.
      key: A PRNG key; the same key gives the same direction before normalisation, so
        that two runs of one architecture can be compared along it.
      filter_axis: The axis of the outputs, each of which is a filter: the last as in
        Flax; 0 for Equinox and PyTorch.
      mask: A pytree of bools, or a function of `params` to one, True where the
        direction may differ from 0; None for everywhere.

    Returns:
      A pytree like `params`, in float32 or wider.

    Raises:
      ValueError: `filter_axis` is another one: kernels have different numbers of axes,
        and only the first and the last are there in each.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> d = landscape.random_direction(params, jax.random.key(0))
      >>> jnp.linalg.norm(d["kernel"], axis=0).round(4).tolist(), d["bias"].tolist()
      ([5.0, 2.0], [0.0, 0.0])

    Reference: Li et al., 2018, section 4, with `ignore="biasbn"` of their code.
    """
    if filter_axis not in (0, -1):
        raise ValueError(
            "filter_axis must be -1, as of Flax, or 0, as of Equinox and PyTorch; got "
            f"{filter_axis!r}."
        )
    leaves, treedef = jax.tree.flatten(params)
    resolved = resolve_mask(mask, params)
    moving = [True] * len(leaves) if resolved is None else jax.tree.leaves(resolved)
    found = []
    for i, (w, moves) in enumerate(zip(leaves, moving, strict=True)):
        w = jnp.asarray(w)
        floating = jnp.issubdtype(w.dtype, jnp.floating)
        if not moves or w.ndim < 2 or not w.size or not floating:
            found.append(jnp.zeros_like(w))
        else:
            found.append(_of_leaf(w, jax.random.fold_in(key, i), filter_axis))
    return jax.tree.unflatten(treedef, found)


@functools.partial(jax.jit, static_argnums=2)
def _of_leaf(w, key, filter_axis):
    """The part of a direction: a program for each shape, which leaves share."""
    dtype = tree.accumulation_dtype(w)
    d = jax.random.normal(key, w.shape, dtype)
    others = tuple(a for a in range(w.ndim) if a != filter_axis % w.ndim)

    def norms(x):  # of x over a power of 2, with squares in range
        _, bits = jnp.frexp(jnp.max(jnp.abs(x), axis=others, keepdims=True))
        squares = jnp.ldexp(x, -bits) ** 2
        return jnp.ldexp(jnp.sqrt(jnp.sum(squares, axis=others, keepdims=True)), bits)

    return d * norms(w.astype(dtype)) / norms(d)


def through(first: PyTree, second: PyTree, third: PyTree | None = None) -> Subspace:
    r"""The line through two solutions, or the plane through three.

    The first is at 0, the second at 1, so the unit of both axes is the distance between
    them. The second axis points from the line to the third solution.

    Args:
      first: A solution, a pytree.
      second: Another, of the same structure and shapes.
      third: A third one, or None for the line.

    Returns:
      A :class:`Subspace` for :func:`loss_grid`.

    Raises:
      ValueError: The solutions differ in structure or shape, coincide or lie on a line.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> plane = landscape.through(jnp.zeros(2), jnp.array([2.0, 0.0]), jnp.ones(2))
      >>> plane.points.tolist(), plane.directions[1].tolist()
      ([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]], [0.0, 2.0])

    Reference: Goodfellow et al., 2015 (lines); Garipov et al., 2018 (planes).
    """
    solutions = [first, second] if third is None else [first, second, third]
    for other in solutions[1:]:
        check_like(first, other)
    x = _difference(second, first)
    length = float(tree.norm(x))
    if not np.isfinite(length):
        raise ValueError(
            "the solutions must be finite: the first or the second holds NaN or inf."
        )
    if not length > 0:
        raise ValueError(
            "the first and the second solution coincide, so there is no line."
        )
    if third is None:
        return Subspace(first, (x,), np.array([[0.0], [1.0]]))
    away = _difference(third, first)
    along = _dot(_over(away, length), _over(x, length))
    across = jax.tree.map(lambda d, e: d - jnp.asarray(along, d.dtype) * e, away, x)
    height = float(tree.norm(across))
    if not np.isfinite(height):
        raise ValueError("the solutions must be finite: the third holds NaN or inf.")
    if not height > 1e-5 * float(tree.norm(away)):
        raise ValueError(
            "the three solutions lie on one line: leave the third out, and read the "
            "line's axis further."
        )
    y = jax.tree.map(lambda d: d * jnp.asarray(length / height, d.dtype), across)
    points = np.array([[0.0, 0.0], [1.0, 0.0], [along, height / length]])
    return Subspace(first, (x, y), points)


def loss_grid(
    loss_sum: LossSum,
    params: PyTree,
    batches: Iterable[PyTree],
    directions: Sequence[PyTree],
    axes: Sequence[Any],
    *,
    at_once: int | None = None,
    known: Any = (),
    report: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    r"""The mean loss on a grid of points :math:`\theta + \sum_i c_i d_i`.

    One compiled function evaluates `at_once` points on a batch. Points are taken in C
    order, the last axis fastest. To continue an interrupted grid, to the same bits,
    pass what it last reported as `known`, with the same other arguments.

    Args:
      loss_sum: (params, batch) -> (sum of losses, number of examples). It is compiled
        once, so pass the same function object each time.
      params: The solution, where all coefficients are 0.
      batches: The set, in batches of any sizes; iterated over once, and with `report`
        about every two seconds.
      directions: D pytrees like `params`: one for a line, two for a plane.
      axes: D vectors of coefficients, in units of the directions.
      at_once: The number of points that are evaluated at once, with as many times the
        activations. The grid is the same up to rounding. None: the number of
        :func:`points_at_once`, which is 1 on CPUs, where more are slower.
      known: (n,) losses of the first n points, from an interrupted grid.
      report: A function that is called about every two seconds with the losses of the
        points so far, (n,) in float64, known ones included.

    Returns:
      Losses (len(axes[0]), ...) in float64, with D axes in the order of the directions;
      they are not finite where the loss is not.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import landscape
      >>> def loss_sum(w, batch):
      ...     return w[0] ** 2 + 10 * w[1], 1
      >>> landscape.loss_grid(loss_sum, jnp.zeros(2), [None],
      ...     [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])], [[-1, 0, 2], [0, 1]])
      array([[ 1., 11.],
             [ 0., 10.],
             [ 4., 14.]])

    Reference: Li et al., 2018.
    """
    if not isinstance(directions, list | tuple):
        raise TypeError(
            "directions must be a list of pytrees like the parameters, one for each of "
            f"axes; got a {type(directions).__name__}."
        )
    if not directions or len(directions) != len(axes):
        raise ValueError(
            "directions and axes must be of the same number, at least one; got "
            f"{len(directions)} directions and {len(axes)} axes."
        )
    grids = [np.asarray(axis, np.float64) for axis in axes]
    for axis in grids:
        if axis.ndim != 1 or not axis.size or not np.isfinite(axis).all():
            raise ValueError(
                "each of axes must be a vector of finite numbers, at least one; got "
                f"shape {axis.shape}."
            )
    whole = Objective(loss_sum, params, batches)
    moving = [[jnp.asarray(d) for d in whole.leaves(x)] for x in directions]
    points = np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1)
    flat = points.reshape(-1, len(grids))
    known = np.asarray(known, np.float64)
    if known.ndim != 1 or len(known) > len(flat):
        raise ValueError(
            f"known must be a vector of at most the grid's {len(flat)} losses, got "
            f"shape {known.shape}."
        )
    if at_once is None:
        at_once = _fitting(whole, moving, _free_memory())
    check_count("at_once", at_once)
    losses = np.empty(len(flat))
    done = len(known) if len(known) == len(flat) else len(known) // at_once * at_once
    losses[:done] = known[:done]
    count = len(flat) if report is None else at_once
    while done < len(flat):
        began = time.monotonic()
        end = min(done + count, len(flat))
        losses[done:end] = whole.losses(moving, flat[done:end], at_once)
        done = end
        if report is not None:
            report(losses[:done].copy())
            pace = SECONDS_A_REPORT / max(time.monotonic() - began, 1e-9)
            # The first pass compiles: what it took says little.
            count = max(int(count * min(pace, 8)) // at_once, 1) * at_once
    return losses.reshape(points.shape[:-1])


def points_at_once(
    loss_sum: LossSum,
    params: PyTree,
    batches: Iterable[PyTree],
    directions: Sequence[PyTree],
) -> int:
    """The number of points that :func:`loss_grid` evaluates at once by default.

    On accelerators it depends on the free memory. To continue a grid to the same bits
    later, pass the number that it started with.

    Args:
      loss_sum: A function (params, batch) -> (sum of losses, number of examples).
      params: The solution.
      batches: The set, of which the first batch is read on accelerators.
      directions: One pytree like `params` for a line, two for a plane.

    Returns:
      1 on CPUs; elsewhere the number that fits in half of the free memory, at most 16.
    """
    whole = Objective(loss_sum, params, batches)
    moving = [[jnp.asarray(d) for d in whole.leaves(x)] for x in directions]
    return _fitting(whole, moving, _free_memory())


def _free_memory() -> int | None:
    """Bytes that are free on an accelerator; None on CPUs."""
    if jax.default_backend() == "cpu":
        return None
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


def _fitting(whole: Objective, directions: Sequence[Any], free: int | None) -> int:
    """The number of points to evaluate at once, given the free memory."""
    if free is None:  # on CPUs vectorised convolutions are slower
        return 1
    each = max(whole.bytes_of_a_point(directions), 1)
    return int(np.clip(free // 2 // each, 1, MOST_AT_ONCE))


def check_like(first: PyTree, other: PyTree) -> None:
    """Raises ValueError unless two solutions have the same structure and shapes."""
    one: Any = jax.tree.structure(first)
    two: Any = jax.tree.structure(other)
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(t)] for t in (first, other)]
    if one != two or shapes[0] != shapes[1]:
        raise ValueError(
            "solutions must have the same structure and shapes.\n"
            f"  first: {one} {shapes[0]}\n  other: {two} {shapes[1]}"
        )


def _difference(first, second):
    def minus(x, y):
        x, y = jnp.asarray(x), jnp.asarray(y)
        if not tree.is_floating(x):  # it does not move
            return jnp.zeros(x.shape)
        dtype = tree.accumulation_dtype(x)
        return x.astype(dtype) - y.astype(dtype)

    return jax.tree.map(minus, first, second)


def _over(solution, length):
    return jax.tree.map(
        lambda x: x / jnp.asarray(length, x.dtype) if tree.is_floating(x) else x,
        solution,
    )


def _dot(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return sum(float(jnp.sum(x * y)) for x, y in pairs)
