r"""Eigenvalues at an end of the spectrum of a symmetric matrix, from products alone.

A Krylov space of one vector holds one eigenvector of each eigenvalue, however often it
occurs. So the search goes in rounds. The first one is Lanczos' method from a random
vector, with full orthogonalisation and thick restarts, until the k leading Ritz pairs
have converged. Each further round starts from a random vector outside of what is found.
The search ends with a round that finds nothing beyond the k-th eigenvalue.

When has a round seen enough? If a matrix of size n has an eigenvalue :math:`\mu`, the
top Ritz value :math:`\theta` after m steps from a random vector fulfils

.. math:: P\Bigl[\frac{\mu - \theta}{\mu - \lambda_{min}} > \epsilon\Bigr]
  \le 1.648 \sqrt n \, e^{-\sqrt \epsilon \, (2 m - 1)}

(Kuczyński & Woźniakowski, 1992, theorem 4.2, for the largest eigenvalue). A round ends
where this is at most 1e-3 for all :math:`\mu` beyond the k-th eigenvalue, or where the
best Ritz pair outside of the k has itself converged. Where the k-th eigenvalue stands
apart, that takes some fifteen steps.

For few enough rows there are no restarts: the basis grows. Where it has a vector for
each row, its projected matrix is the whole one in other coordinates, and nothing is
left to search for. Ends of a spectrum where eigenvalues crowd take that way.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# A function from a vector (n,) to the matrix times that vector.
Times = Callable[[np.ndarray], np.ndarray]

# Numbers by which eigenvalues are ordered, the smallest first.
ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "largest": lambda values: -values,
    "smallest": lambda values: values,
    "magnitude": lambda values: -np.abs(values),
}

# Up to so many rows the basis may grow to the whole space, 16 MB in float32.
WHOLE = 2000
# The share of the rows that rounds may multiply by beside those of a whole basis.
_SPARE = 0.25
# The probability of missing an eigenvalue in a round.
_RISK = 1e-3
# The share of the tolerance that a residual may take. A mixture of two eigenvectors
# whose values differ by g has a residual of up to g / 2 and may be off by g.
_SHARE = 0.1
# The steps after which a pair outside may count as converged.
_LEAST_STEPS = 8
# Columns that are rotated at once in a restart.
_COLUMNS = 2**16
# The size of a basis from which on not each step looks at the result.
_RARELY = 128


class Pairs(NamedTuple):
    """Eigenvalues (k,) in their order, and eigenvectors (k, n) of norm 1."""

    values: np.ndarray
    vectors: np.ndarray


def room(k: int) -> int:
    """The number of vectors that :func:`leading` holds of more than WHOLE rows."""
    return first_steps(k) + k


def first_steps(k: int) -> int:
    """The number of steps before the first look at the result; ARPACK's for SciPy."""
    return max(20, 2 * k + 1)


def leading(
    times: Times,
    size: int,
    dtype: np.dtype,
    k: int,
    which: str,
    tol: float,
    max_restarts: int,
) -> Pairs:
    """The k leading eigenpairs, each eigenvalue as often as it occurs.

    Args:
      times: The matrix times a vector.
      size: The number of rows, above `room(k)`.
      dtype: The dtype of vectors.
      k: The number of pairs.
      which: A key of `ORDERS`.
      tol: The error relative to each eigenvalue; those below 0.001 of the largest one
        in magnitude count as that large, and no error is asked for below 100 units of
        rounding of the latter.
      max_restarts: The number of restarts in a round.

    Returns:
      :class:`Pairs`. Up to WHOLE rows they take at most 5/4 `size` products, for k = 1
      at most `size`.

    Raises:
      RuntimeError: The pairs, or the search for others, have not converged; of more
        than WHOLE rows.
    """
    few = size <= WHOLE
    search = _Search(times, size, dtype, size if few else room(k))
    # From here on, to look for the end of the search costs more than it can save.
    many = min(max(_RARELY, size // 2), size) if few else math.inf
    found = None
    while True:  # rounds
        search.start()
        restarts = 0
        while True:  # steps
            search.step()
            if search.count >= many:
                return search.whole(which, k)
            if not search.due:
                search.go_on()
                continue
            ritz = search.ritz(which)
            limits = _limits(ritz.values, tol, dtype)
            converged = ritz.errors <= _SHARE * limits
            if converged[:k].all() and (
                search.count >= first_steps(k)
                if found is None
                else _nothing_beyond(search, ritz, limits, which, k)
            ):
                break
            if search.full:
                if restarts == max_restarts:
                    raise RuntimeError(_failure(k, tol, max_restarts, ritz, converged))
                restarts += 1
                search.keep(ritz, k + (search.count - k) // 2)
            search.go_on()
        values = ritz.values[:k]
        # Of one eigenvalue there is one vector in each space.
        if k == 1 or (
            found is not None and (np.abs(values - found) <= limits[:k]).all()
        ):
            return search.keep(ritz, k)
        found = values
        if few and search.products - k > _SPARE * size:
            return search.whole(which, k)
        search.keep(ritz, k)


class _Ritz(NamedTuple):
    """Ritz values in their order, their coordinates (columns), norms of residuals."""

    values: np.ndarray
    coordinates: np.ndarray
    errors: np.ndarray


class _Search:
    """An orthonormal basis, the matrix projected to it, and the next vector."""

    def __init__(self, times: Times, size: int, dtype: np.dtype, most: int):
        self._times = times
        self.vectors = np.empty((most, size), dtype)
        self._projected = np.zeros((most, most))
        self._random = np.random.default_rng(0)
        self.count = self.products = 0
        # Steps since the last random vector, up to a restart.
        self.steps = 0
        self._restarted = False

    @property
    def full(self) -> bool:
        return self.count == len(self.vectors)

    @property
    def due(self) -> bool:
        """Whether it is time to look at the result, which costs count cubed."""
        each = self.count // 8 if self.count >= _RARELY else 1
        return self.full or self.count % each == 0

    @property
    def size(self) -> int:
        return self.vectors.shape[1]

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans an invariant space, up to rounding."""
        unit = 10 * np.finfo(self.vectors.dtype).eps
        return self._rest <= unit * np.abs(self._projected[: self.count]).max()

    def start(self) -> None:
        """Takes a random vector outside of the basis as the next one."""
        vector = self._random.normal(size=self.size).astype(self.vectors.dtype)
        self._next, _ = self._outside(vector / np.linalg.norm(vector))
        self._next /= np.linalg.norm(self._next)
        self.steps, self._restarted = 0, False

    def step(self) -> None:
        """Multiplies the next vector and adds it to the basis."""
        self.vectors[self.count] = self._next
        self.count += 1
        self.products += 1
        self.steps += not self._restarted
        product = self._times(self._next)
        size = float(np.abs(product).max()) or 1.0  # squares of float32 have an end
        self._next, column = self._outside(product / self._next.dtype.type(size))
        self._norm = float(np.linalg.norm(self._next))
        self._rest, column = size * self._norm, size * column
        last = self.count - 1
        self._projected[: self.count, last] = column
        self._projected[last, : self.count] = column

    def ritz(self, which: str) -> _Ritz:
        """The Ritz pairs of the basis."""
        values, coordinates = np.linalg.eigh(
            self._projected[: self.count, : self.count]
        )
        order = np.argsort(ORDERS[which](values), kind="stable")
        coordinates = coordinates[:, order]
        return _Ritz(values[order], coordinates, self._rest * np.abs(coordinates[-1]))

    def go_on(self) -> None:
        """Makes the next vector of the Krylov space, or a random one outside of it."""
        if self.exhausted:
            self.start()
        else:
            self._next /= self._norm

    def whole(self, which: str, number: int) -> Pairs:
        """The leading pairs of the basis that has a vector for each row."""
        while self.count < self.size:
            self.go_on()
            self.step()
        return self.keep(self.ritz(which), number)

    def keep(self, ritz: _Ritz, number: int) -> Pairs:
        """Replaces the basis by the leading Ritz vectors, in its own memory."""
        chosen = ritz.coordinates[:, :number].T.astype(self.vectors.dtype)
        for start in range(0, self.size, _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            self.vectors[:number, columns] = (
                chosen @ self.vectors[: self.count, columns]
            )
        self._projected[:] = 0.0
        self._projected[:number, :number] = np.diag(ritz.values[:number])
        self.count = number
        self._restarted = True
        return Pairs(ritz.values[:number], self.vectors[:number])

    def _outside(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of a vector outside of the basis, and coordinates of the rest."""
        basis = self.vectors[: self.count]
        first = basis @ vector
        vector = vector - first @ basis
        second = basis @ vector  # what rounding has left inside
        return vector - second @ basis, first.astype(np.float64) + second


def _limits(values: np.ndarray, tol: float, dtype: np.dtype) -> np.ndarray:
    largest = np.abs(values).max()
    relative = tol * np.maximum(np.abs(values), 1e-3 * largest)
    return np.maximum(relative, 10 / _SHARE * np.finfo(dtype).eps * largest)


def _nothing_beyond(
    search: _Search, ritz: _Ritz, limits: np.ndarray, which: str, k: int
) -> bool:
    """Whether a round has seen that no other eigenvalue belongs to the leading k."""
    settled = search.steps >= _LEAST_STEPS and ritz.errors[k] <= _SHARE * limits[k]
    if settled or search.exhausted:
        return True
    edge = abs(ritz.values[k - 1]) if which == "magnitude" else ritz.values[k - 1]
    others, errors = ritz.values[k:], ritz.errors[k:]
    ends = []
    if which != "smallest":
        above = edge + limits[k - 1]
        ends.append((above - others.max()) / (above - (others - errors).min()))
    if which != "largest":
        below = (-edge if which == "magnitude" else edge) - limits[k - 1]
        ends.append((others.min() - below) / ((others + errors).max() - below))
    distance = max(min(ends), 0.0)
    exponent = math.sqrt(distance) * (2 * search.steps - 1)
    return 1.648 * math.sqrt(search.size) * math.exp(-exponent) <= _RISK


def _failure(
    k: int, tol: float, max_restarts: int, ritz: _Ritz, converged: np.ndarray
) -> str:
    number = int(np.count_nonzero(converged[:k]))
    what = (
        f"{number} of {k} eigenvalues converged"
        if number < k
        else f"the {k} eigenvalues converged, but the search for others did not"
    )
    shown = k if number < k else k + 1
    worst = int(np.argmax(np.where(converged, 0.0, ritz.errors)[:shown]))
    return (
        f"{what} to tol={tol:g} within {max_restarts} restarts: eigenvalue {worst + 1} "
        f"is {ritz.values[worst]:.6g} with a residual of {ritz.errors[worst]:.2g}. "
        "Raise tol or max_restarts. Eigenvalues at an end where they crowd, as small "
        "ones near 0, take long."
    )
