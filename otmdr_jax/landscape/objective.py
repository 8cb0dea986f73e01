"""The mean loss of a whole set, its gradient and Hessian, in the memory of a batch."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax.core import tree
from otmdr_jax.core.ascent import resolve_mask

PyTree = Any
LossSum = Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]
Leaves = list[jax.Array]


class Objective:
    r"""The mean loss of a set as a function of the leaves that move.

    .. math:: L(\theta) = \sum_b \ell_b(\theta) / \sum_b n_b

    with (\ell_b, n_b) the result of `loss_sum` for batch b. Its programs are compiled
    once for each `loss_sum`, however many solutions and sets are measured with it.

    Args:
      loss_sum: A function (params, batch) -> (sum of losses, number of examples).
      params: The solution.
      batches: The set. An iterator is read into a list; anything else is iterated over
        again in each pass and must give the same batches.
      mask: A pytree of bools, or a function of `params` to one, True where a leaf
        moves; None for all floating leaves.

    Attributes:
      center: The leaves of the solution that move.

    Raises:
      ValueError: No leaf moves, or the mask has another structure than `params`.
      TypeError: A leaf that moves is not a real floating array.
    """

    def __init__(
        self,
        loss_sum: LossSum,
        params: PyTree,
        batches: Iterable[PyTree],
        mask: PyTree | None = None,
    ):
        """Chooses the leaves that move; see the class."""
        leaves, self._treedef = jax.tree.flatten(params)
        resolved = resolve_mask(mask, params)
        self._moving = (
            tuple(tree.is_floating(x) for x in leaves)
            if resolved is None
            else tuple(jax.tree.leaves(resolved))
        )
        moving, self._fixed = _divide(leaves, self._moving)
        for x in moving:
            if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                raise TypeError(
                    "leaves of params that move must be real floating arrays, got one "
                    f"of dtype {jnp.result_type(x)}: leave it out with mask."
                )
        if not sum(jnp.size(x) for x in moving):
            raise ValueError(
                "no leaf of params moves: params needs a floating leaf where mask is "
                "True."
            )
        self.center: Leaves = [jnp.asarray(x) for x in moving]
        self._precision = np.result_type(*map(tree.accumulation_dtype, self.center))
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        try:
            hash(loss_sum)
        except TypeError as error:
            raise TypeError(
                "loss_sum must be hashable, since its programs are kept for the next "
                f"call, got a {type(loss_sum).__name__}: pass a function, as "
                "lambda params, batch: loss_sum(params, batch)."
            ) from error
        self._programs = _compiled(loss_sum, self._treedef, self._moving)

    def loss(self, weights: Leaves) -> float:
        """The mean loss; one pass over the set."""
        loss_of = self._programs.loss
        loss, *_ = self._pass(
            lambda batch, _: (loss_of(weights, self._fixed, batch), ())
        )
        return float(loss)

    def losses(
        self, directions: Sequence[Leaves], points: np.ndarray, at_once: int = 1
    ) -> np.ndarray:
        """Mean losses at the center plus combinations of directions; one pass.

        Args:
          directions: D lists of arrays like the center.
          points: (G, D) coefficients.
          at_once: The number of points in a call of the compiled function.

        Returns:
          (G,) losses in float64.
        """
        coefficients = np.asarray(points, self._precision)
        count = len(coefficients)
        # Calls of one size are one program: the last ones are filled up.
        filled = np.arange(-(-count // at_once) * at_once) % count
        blocks = coefficients[filled].reshape(-1, at_once, coefficients.shape[1])

        def step(batch, _):
            # A call for each block: a loop in the program is no faster.
            sums = [
                self._programs.losses_at(
                    self.center, directions, block, self._fixed, batch
                )
                for block in blocks
            ]
            return ([loss for loss, _ in sums], sums[0][1]), ()

        return self._pass(step)[0].reshape(-1)[:count]

    def bytes_of_a_point(self, directions: Sequence[Leaves]) -> int:
        """Bytes that a point of :meth:`losses` takes beside weights and batch."""
        block = np.zeros((1, len(directions)), self._precision)
        for batch in self._batches:
            program = self._programs.losses_at.lower(
                self.center, directions, block, self._fixed, batch
            ).compile()
            memory = program.memory_analysis()
            return 0 if memory is None else memory.temp_size_in_bytes
        return 0  # no batch: the pass over the set will say so

    def gradient(self, weights: Leaves) -> tuple[float, Leaves]:
        """The mean loss and its gradient, in float32 or wider; one pass."""
        accumulate = self._programs.add_gradient
        loss, count, total = self._pass(
            lambda batch, total: accumulate(total, weights, self._fixed, batch),
            _zeros(self.center),
        )
        return float(loss), _divided(total, count)

    def product(self, vector: Sequence[jax.typing.ArrayLike]) -> Leaves:
        """The Hessian at the center times a vector, in float32 or wider; one pass.

        The vector is rounded to the dtypes of the center, as JAX wants a tangent.
        """
        accumulate = self._programs.add_product
        tangent = [
            jnp.asarray(v, w.dtype) for v, w in zip(vector, self.center, strict=True)
        ]
        _, count, total = self._pass(
            lambda batch, total: accumulate(
                total, self.center, tangent, self._fixed, batch
            ),
            _zeros(self.center),
        )
        return _divided(total, count)

    def leaves(self, vector: PyTree) -> list[Any]:
        """The leaves that move, from a pytree with params' structure and shapes."""
        leaves = jax.tree.leaves(vector)
        got: Any = jax.tree.structure(vector)
        chosen, _ = _divide(leaves, self._moving) if got == self._treedef else ([], [])
        shapes = [jnp.shape(x) for x in chosen]
        if shapes != [w.shape for w in self.center]:
            raise ValueError(
                "a vector or direction must have the structure and shapes of params.\n"
                f"  params: {self._treedef} {[w.shape for w in self.center]}\n"
                f"  got:    {got} {[jnp.shape(x) for x in leaves]}"
            )
        return chosen

    def embed(self, vector: Sequence[Any]) -> PyTree:
        """The inverse of :meth:`leaves`, zero where a leaf does not move."""
        zeros = [jnp.zeros_like(x) for x in self._fixed]
        return _join(self._treedef, self._moving, vector, zeros)

    def _pass(self, step, carry=()):
        """Returns the mean loss, the number of examples and the carry.

        Sums are fetched one batch behind, so that the device has work while the host
        reads the next batch, and few batches are alive.
        """
        totals = np.float64(0), 0.0
        ahead = None
        for batch in self._batches:
            sums, carry = step(batch, carry)
            if ahead is not None:
                totals = _fetched(totals, ahead)
            ahead = sums
        if ahead is None:
            raise ValueError("the set needs at least one batch, got none.")
        loss, examples = _fetched(totals, ahead)
        if not examples > 0:
            raise ValueError(
                "the set needs at least one example: the numbers of examples that "
                f"loss_sum returned add up to {examples:g}."
            )
        return loss / examples, examples, carry


class _Programs(NamedTuple):
    """Compiled functions of one batch; two of them add to earlier sums."""

    loss: Callable[..., Any]
    add_gradient: Callable[..., Any]
    add_product: Callable[..., Any]
    losses_at: Any


@functools.lru_cache(maxsize=16)
def _compiled(loss_sum, treedef, moving):
    def loss_of(weights, fixed, batch):
        result = loss_sum(_join(treedef, moving, weights, fixed), batch)
        if (
            not isinstance(result, tuple)
            or len(result) != 2
            or any(map(jnp.shape, result))
        ):
            raise TypeError(
                "loss_sum(params, batch) must return two scalars, the sum of the "
                "losses and the number of examples; got the shapes "
                f"{jax.tree.map(jnp.shape, result)}."
            )
        return result

    def gradient(weights, fixed, batch):
        return jax.value_and_grad(loss_of, has_aux=True)(weights, fixed, batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def add_gradient(total, weights, fixed, batch):
        sums, more = gradient(weights, fixed, batch)
        return sums, _added(total, more)

    @functools.partial(jax.jit, donate_argnums=0)
    def add_product(total, weights, tangent, fixed, batch):
        # Forward over reverse: one more pass forward, and the memory of a gradient.
        def along(w):
            sums, grads = gradient(w, fixed, batch)
            return grads, sums

        _, more, sums = jax.jvp(along, (weights,), (tangent,), has_aux=True)
        return sums, _added(total, more)

    def loss_at(center, directions, coefficients, fixed, batch):
        weights = []
        for w, *along in zip(center, *directions, strict=True):
            moved = w.astype(tree.accumulation_dtype(w))
            for c, d in zip(coefficients, along, strict=True):
                moved = moved + c.astype(moved.dtype) * d
            weights.append(moved.astype(w.dtype))
        return loss_of(weights, fixed, batch)

    @jax.jit
    def losses_at(center, directions, block, fixed, batch):
        if len(block) == 1:
            loss, count = loss_at(center, directions, block[0], fixed, batch)
            return jnp.reshape(loss, (1,)), count
        losses, counts = jax.vmap(loss_at, in_axes=(None, None, 0, None, None))(
            center, directions, block, fixed, batch
        )
        return losses, counts[0]

    return _Programs(jax.jit(loss_of), add_gradient, add_product, losses_at)


def _fetched(totals, sums):
    losses, examples = jax.device_get(sums)
    return totals[0] + np.asarray(losses, np.float64), totals[1] + float(examples)


def _zeros(leaves):
    return [jnp.zeros_like(x, dtype=tree.accumulation_dtype(x)) for x in leaves]


def _added(total, more):
    return [t + m.astype(t.dtype) for t, m in zip(total, more, strict=True)]


@jax.jit
def _divided(total, count):
    return [x / jnp.asarray(count, x.dtype) for x in total]


def _divide(leaves, moving):
    return (
        [x for x, m in zip(leaves, moving, strict=True) if m],
        [x for x, m in zip(leaves, moving, strict=True) if not m],
    )


def _join(treedef, moving, weights, fixed):
    first, second = iter(weights), iter(fixed)
    return treedef.unflatten([next(first) if m else next(second) for m in moving])
