"""How a particle leaves the center: by steps of ascent, a draw or a Markov chain.

:func:`climb` takes one step of Eq. 9 on each part of the batch, as the paper's
experiments. :func:`draw` and :func:`chain` draw the weights of the distribution that
Theorem 4.2 finds to be the worst in the ball.

Reference: Nguyen et al., 2023, Theorem 4.2 and section 4.2.1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core import langevin, loops, sampling, tree
from otmdr_jax.core.ascent import ascend
from otmdr_jax.core.step import Pass, Step

PyTree = Any


class Arrival(NamedTuple):
    """Where a particle arrives, by whatever sampler.

    Attributes:
      params: The weights there.
      first: The first pass; None if there was none.
      norms: The gradient norms of the steps, or of the one gradient of a draw.
      last: (loss, aux), gradient on all of the batch at these weights, if a sampler has
        taken it already.
      chain: What a Markov chain saw, or None.
    """

    params: PyTree
    first: Pass | None
    norms: list[jax.Array]
    last: Pass | None = None
    chain: langevin.Chain | None = None


def climb(step: Step, keys: Any, parts: Any, first: Pass | None = None) -> Arrival:
    """One ascent step on each part (Eq. 9)."""
    options, (_, noise_key) = step.options, keys
    w, total, norms, center = step.center, None, [], None
    for s, (part, radius) in enumerate(zip(parts, step.radii, strict=True)):
        known = first if s == 0 else None
        found = known or step.ascent_gradient(w, part, s)
        center = center or found
        grads = step.own_gradient(found)
        direction = None
        if options.merge is not None:
            # The released code never clears the gradients: g1, then g1 + g2, ...
            # over the norm of the last one alone.
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            seen_parts = s + 1 if options.merge == "mean" else 1
            direction = jax.tree.map(lambda g, n=seen_parts: g / n, total)
        w, length = ascend(
            w,
            grads,
            radius,
            metric=step.metric,
            direction=direction,
            norm=options.norm,
            mask=step.mask,
            norm_mask=step.norm_mask,
            noise_std=options.noise_std if options.noisy else None,
            key=None if noise_key is None else jax.random.fold_in(noise_key, s),
        )
        if options.project:
            largest = functools.reduce(jnp.maximum, step.radii)
            w = step.moved(langevin.onto_ball(step.away(w), largest))
        norms.append(length)
    return Arrival(w, center, norms)


def draw(step: Step, keys: Any, parts: Any, first: Pass | None = None) -> Arrival:
    """A draw of gamma* of the linearised loss (Theorem 4.2)."""
    options, (rho,) = step.options, step.radii
    first = first or step.ascent_gradient(step.center, parts[0])
    w, length = sampling.draw(
        step.center,
        step.own_gradient(first),
        rho,
        # Or XLA may draw before the first pass, and hold the draws through it.
        loops.after(first[1], keys[1]),
        strength=sampling.Strength(options.inverse_temperature, options.tilt),
        metric=step.metric,
        norm=options.norm,
        mask=step.mask,
    )
    return Arrival(w, first, [length])


def chain(step: Step, keys: Any, parts: Any, first: Pass | None = None) -> Arrival:
    """The end of a Markov chain for gamma* of the loss.

    On the whole batch it begins with a draw of the linearised loss's, in which it would
    stay for ever if the loss were that. On parts of the batch it begins at the center.
    """
    options, (rho,) = step.options, step.radii
    first = first or step.ascent_gradient(step.center, parts[0])
    grads = step.own_gradient(first)
    uphill = step.uphill(grads)
    length = tree.norm(uphill)
    along = [g / jnp.where(length == 0, 1.0, length) for g in uphill]
    size = tree.num_coordinates(uphill)
    strength = sampling.Strength(options.inverse_temperature, options.tilt)
    heat = sampling.inverse_temperature_of(strength, rho, length, size)
    for_start, for_chain = jax.random.split(keys[1])
    shared = options.split == "shared"
    h = options.step_size
    if h is None and shared:
        h = 1 / (size + heat * rho * length)
    elif h is None:
        h = (2 / (len(parts) * (size + 2))) ** 0.5
    how: Any = {"inverse_temperature": heat, "step_size": h * rho, "along": along}

    def at(part, taken=0):
        def of(away):
            found = step.ascent_gradient(step.moved(away), part, taken)
            return found, step.own_loss(found), step.uphill(step.own_gradient(found))

        return of

    if shared:
        w, _ = sampling.draw(
            step.center, grads, rho, for_start, strength=strength, mask=step.mask
        )
        count = options.num_steps
        found = langevin.metropolis(
            at(step.batch), step.away(w), for_chain, rho, num_steps=count, **how
        )
        return Arrival(step.moved(found.away), first, [length], found.found, found)
    passes = [lambda _: (first, step.own_loss(first), uphill)]
    passes += [at(part, s) for s, part in enumerate(parts[1:], 1)]
    found = langevin.projected(passes, step.away(step.center), for_chain, rho, **how)
    return Arrival(step.moved(found.away), first, [length], None, found)


SAMPLERS = {"ascent": climb, "first_order": draw, "langevin": chain}
