"""What the particles of one step have in common: a :class:`Step`.

A method that moves in another way than :func:`otmdr_jax.core.particle.all_particles`
(:mod:`otmdr_jax.bnn`, bSAM, GSAM, LookSAM) replaces a field of the step, or what the
particles return.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, loops, tree, weights
from otmdr_jax.core.ascent import Metric, absolute_weights, fisher, sphere
from otmdr_jax.core.batches import accumulate, split_batch
from otmdr_jax.core.options import Options

PyTree = Any
# What a pass returns: ((loss, aux), gradient).
Pass = tuple[tuple[jax.Array, PyTree], PyTree]


class Particle(NamedTuple):
    """Where a particle arrives, and what it saw on its way; or the mean of several.

    Attributes:
      value: The loss of all of the batch at the particle.
      aux: The auxiliary output of the first pass, at the center; `rows.Rows` of the
        first pass over all of the batch, in its order.
      grads: The gradient on all of the batch at the particle.
      center_loss: The loss of the first pass.
      ascent_norms: (S,) gradient norms of the ascent steps.
      distance: The distance of the particle from the center; of a mean (K,), or None
        where it is kept apart.
    """

    value: jax.Array
    aux: PyTree
    grads: PyTree
    center_loss: jax.Array
    ascent_norms: jax.Array
    distance: Any


class Step(NamedTuple):
    """What the particles of one step have in common.

    Attributes:
      center: theta, marked as differing between the devices of all axes.
      batch: B; on a mesh this device's part.
      radii: S radii.
      options: Checked options.
      mask: Which leaves may move, resolved.
      metric: T of the ascent steps, the shape of the ball.
      key: The step's PRNG key or None.
      keys: (of the split, of the noise) of this device's particles, on a leading axis
        where they are several; (None, None) where nothing is random.
      num_particles: How many particles this device has.
      loss_and_gradient: (params, batch, **own) -> ((loss, aux), gradient), where `own`
        are further arguments of the loss.
      norm_mask: Which leaves count in a global norm; None: those that may move.
      own: Number of ascent steps taken -> further arguments of the loss in that pass.
    """

    center: PyTree
    batch: PyTree
    radii: tuple[jax.typing.ArrayLike, ...]
    options: Options
    mask: PyTree | None
    metric: Metric
    key: jax.Array | None
    keys: Any
    num_particles: int
    loss_and_gradient: Callable[..., Pass]
    norm_mask: PyTree | None = None
    own: Callable[[int], dict[str, Any]] = lambda taken: {}

    def gradient(self, w: PyTree, part: PyTree, taken: int = 0) -> Pass:
        """This device's gradient of the mean loss over a part, by micro-batches."""
        own = self.own(taken)

        def of(piece):
            return self.loss_and_gradient(w, piece, **own)

        # Sums start at zeros that wait for w: else XLA may lay out those of all
        # passes at once, each of the size of the parameters.
        waiting = functools.partial(loops.after, w)
        return accumulate(of, part, self.options.microbatch_size, waiting)

    def shared(self, grads: PyTree) -> PyTree:
        """The gradient that steers a climb: the mean over devices that climb as one."""
        if not self.options.sync_perturbation:
            return grads
        return collectives.pmean(grads, collectives.axes_of(self.options.axis_name))

    def ascent_gradient(self, w: PyTree, part: PyTree, taken: int = 0) -> Pass:
        """The gradient of an ascent step."""
        seen, grads = self.gradient(w, part, taken)
        return seen, self.shared(grads)

    def own_loss(self, found: Pass) -> jax.Array:
        """The loss that a climb is along, of a pass."""
        (loss, aux), _ = found
        return self._own(self.shared(loss), aux)

    def own_gradient(self, found: Pass) -> PyTree:
        """The gradient that a climb is along, of what `ascent_gradient` returns."""
        (_, aux), grads = found
        return self._own(grads, aux)

    def _own(self, values, aux):
        """What a pass gives, but for the weight of its part, which is for means."""
        if self.options.weights is None:
            return values
        return weights.divided(values, self.shared(weights.weight_of(aux)))

    def split(self, keys: Any) -> Sequence[PyTree]:
        """The S parts of the batch for the particle with these keys."""
        count = self.options.num_parts(len(self.radii))
        if self.options.split == "shared":
            return [self.batch] * count
        key = keys[0] if self.options.split == "random" else None
        return split_batch(self.batch, count, key)

    # Displacements from the center: lists of arrays, one for each leaf that may move.

    def uphill(self, grads: PyTree) -> list[jax.Array]:
        """The direction of steepest ascent, in float32 or wider."""
        # Of complex weights it is the conjugate of JAX's gradient.
        return [
            jnp.conj(g.astype(tree.accumulation_dtype(g))) for g in self._moving(grads)
        ]

    def away(self, params: PyTree) -> list[jax.Array]:
        """How far weights are from the center."""
        both = zip(self._moving(params), self._moving(self.center), strict=True)
        return [w.astype(tree.accumulation_dtype(w)) - center for w, center in both]

    def moved(self, away: list[jax.Array]) -> PyTree:
        """The weights at a displacement, of the dtypes of the center."""
        leaves, treedef = jax.tree.flatten(self.center)
        displaced = iter(away)
        moving = self._mask_of(leaves)
        new = [
            w + next(displaced) if m else w for w, m in zip(leaves, moving, strict=True)
        ]
        return tree.like(jax.tree.unflatten(treedef, new), self.center)

    def _moving(self, values):
        leaves = jax.tree.leaves(values)
        return [x for x, m in zip(leaves, self._mask_of(leaves), strict=True) if m]

    def _mask_of(self, leaves):
        return [True] * len(leaves) if self.mask is None else jax.tree.leaves(self.mask)

    def average(
        self,
        function: Callable[["Step", Any], Particle],
        keys: Any = None,
        count: int | None = None,
    ) -> Particle:
        """The mean of the particles that a function makes of their keys.

        Args:
          function: (this step, its center as the map wants it; keys (of the split, of
            the noise)) -> a particle.
          keys: Those of some of the particles; None for all that this device has.
          count: How many these are.
        """
        if count is None:
            keys, count = self.keys, self.num_particles

        def parted(keys, center):
            found = function(self._replace(center=center), keys)
            return found._replace(distance=None), found.distance

        how = self.options.particle_map
        mean, distances = loops.average(parted, keys, count, how, common=self.center)
        return mean._replace(distance=distances)


def metric_of(options: Options) -> Metric:
    """The shape of the ball that options name."""
    if options.curved:
        return fisher(options.fisher)
    return absolute_weights if options.adaptive else sphere
