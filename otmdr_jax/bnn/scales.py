"""The gradient of the standard deviations, at the center beside the particles."""

import jax
import jax.numpy as jnp

from otmdr_jax.core import loops, tree
from otmdr_jax.core.batches import batch_size
from otmdr_jax.core.particle import particle
from otmdr_jax.core.step import Particle, Step


def scales_at_center(step: Step, *, whole: bool) -> Particle:
    """The mean over particles, but with the gradient of the scales at the center.

    The first ascent step has that gradient on the first part of the batch.

    Args:
      step: What the particles have in common.
      whole: Whether the gradient of the scales is that of all of the batch, which takes
        one pass over the other parts. The first particle's parts serve all particles.
    """

    def begin(own, parts):
        seen, grads = own.gradient(own.center, parts[0])
        return (seen, own.shared(grads)), grads.raw_scale

    def complete(scales, parts):
        """The gradient on all parts; the parts, available after it."""
        if step.options.split == "shared" or not jax.tree.leaves(scales):
            return scales, parts
        rest = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts[1:])
        _, grads = step.gradient(step.center, loops.after(scales, rest))
        sizes = batch_size(parts[0]), batch_size(rest)
        scales = tree.weighted_mean(scales, grads.raw_scale, *sizes)
        return scales, loops.after(scales, parts)

    def replaced(found, scales):
        return found._replace(grads=found.grads._replace(raw_scale=scales))

    def one(own, keys, parts=None, first=None):
        parts = own.split(keys) if parts is None else parts
        return replaced(particle(own, keys, parts, first), None)

    def alone(own, keys):
        parts = own.split(keys)
        first, scales = begin(own, parts)
        return replaced(one(own, keys, parts, first), scales)

    keys, count = step.keys, step.num_particles
    completes = whole and step.options.num_parts(len(step.radii)) > 1
    if step.options.split != "random":
        parts = step.split(keys)
        first, scales = begin(step, parts)
        if completes:
            scales, parts = complete(scales, parts)
        found = step.average(lambda own, keys: one(own, keys, parts, first))
        return replaced(found, scales)
    if not completes:
        return step.average(alone)
    lead = jax.tree.map(lambda k: k[0], keys) if count > 1 else keys
    parts = step.split(lead)
    first, scales = begin(step, parts)
    scales, parts = complete(scales, parts)
    found = step.average(lambda own, keys: one(own, keys, parts, first), lead, 1)
    if count > 1:
        others = jax.tree.map(lambda k: k[1:] if count > 2 else k[1], keys)
        others = loops.after(found._replace(distance=None), others)
        more = step.average(one, others, count - 1)
        distances = jnp.concatenate([found.distance, more.distance])
        found = tree.weighted_mean(
            found._replace(distance=None), more._replace(distance=None), 1, count - 1
        )._replace(distance=distances)
    return replaced(found, scales)
