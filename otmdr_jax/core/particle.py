"""One particle: it leaves the center, then the gradient is taken where it arrives.

How it leaves is the sampler's, see :mod:`otmdr_jax.core.samplers`. :func:`particle` is
one of those of a step, :func:`all_particles` their mean. A method that moves in another
way has a function of its own in the place of :func:`all_particles`.

Reference: Nguyen et al., 2023, section 4.2.1 and Algorithm 1.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives, rows, tree
from otmdr_jax.core.samplers import SAMPLERS
from otmdr_jax.core.step import Particle, Pass, Step

PyTree = Any


def all_particles(step: Step) -> Particle:
    """The mean over this device's particles (Eq. 10)."""
    if step.options.split == "random":
        return step.average(lambda own, keys: particle(own, keys, own.split(keys)))
    return from_one_gradient(step)[0]


def from_one_gradient(step: Step) -> tuple[Particle, PyTree]:
    """The mean where all particles leave from one gradient, and that gradient.

    None for a step without radii, which takes no ascent step.
    """
    parts = step.split(step.keys)
    first = step.ascent_gradient(step.center, parts[0]) if parts else None
    found = step.average(lambda own, keys: particle(own, keys, parts, first))
    return found, first[1] if first else None


def particle(
    step: Step,
    keys: Any,
    parts: Sequence[PyTree],
    first: Pass | None = None,
) -> Particle:
    """Leaves the center, then takes the gradient on all of the batch.

    Args:
      step: What it has in common with the others.
      keys: (of the split, of the noise).
      parts: The parts of the batch.
      first: The first pass' loss and gradient, where they are known already.
    """
    arrive = SAMPLERS[step.options.sampler]
    w, first, norms, last, _ = arrive(step, keys, parts, first)
    distance = _distance(w, step.center) if norms else jnp.zeros(())
    if last is None:
        batch = step.batch
        if step.options.watched:
            # Left to itself, XLA measures it at the end of the step, and keeps all
            # gradients of the climb for it: 194 MiB of WRN-28-10 on eight H100.
            batch = collectives.barrier(distance, batch)
        # Never differentiated through: the gradient is taken afresh at the particle.
        last = step.gradient(w, batch, len(norms))
    seen, grads = last
    center_loss, aux = seen if first is None else first[0]
    if step.options.split != "shared":
        aux = rows.replaced(aux, seen[1])
    ascent_norms = jnp.stack(norms) if norms else jnp.zeros(0)
    return Particle(seen[0], aux, grads, center_loss, ascent_norms, distance)


def _distance(particle, center):
    away = jax.tree.map(
        lambda a, b: a.astype(tree.accumulation_dtype(a)) - b, particle, center
    )
    return tree.norm(away)
