r"""LookSAM: SAM every k steps, its direction used again in between.

Every k-th step, with g the gradient at w,

.. math::
    g_s = \nabla L(w + \rho\, g / \|g\|), \qquad
    g_v = g_s - \frac{\langle g_s, g \rangle}{\|g\|^2} g

is computed and :math:`g_s` used; the other steps take one pass and use

.. math:: g + \alpha \frac{\|g\|}{\|g_v\|} g_v

or g where :math:`g_s` is parallel to g up to rounding.

Reference: Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
<https://arxiv.org/abs/2203.02714>`_, CVPR 2022, Algorithm 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.baselines.gsam import orthogonal
from otmdr_jax.core import shards, tree
from otmdr_jax.core.checks import check_count, check_number, check_rho
from otmdr_jax.core.gradient import build
from otmdr_jax.core.options import Options, SamOptions
from otmdr_jax.core.particle import from_one_gradient
from otmdr_jax.core.signatures import with_options
from otmdr_jax.core.transform import from_gradient, schedule_of

PyTree = Any

# SAM's radius; k and alpha as in reimplementations: there is no released code.
RHO, ALPHA, EVERY = 0.05, 0.7, 5


class LookMemory(NamedTuple):
    """What LookSAM remembers.

    Attributes:
      count: Steps taken; those that were skipped, being not finite, do not count.
      direction: g_v of the last step that climbed.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    direction: PyTree


@with_options
def looksam(
    loss_fn: Callable[..., Any],
    rho: Any = RHO,
    *,
    alpha: float = ALPHA,
    every: int = EVERY,
    aux_init: PyTree = None,
    **options: Unpack[SamOptions],
) -> optax.GradientTransformationExtraArgs:
    """LookSAM as an Optax transformation, used like :func:`otmdr_jax.sam`.

    With `norm="per_leaf"` its climb is that of LookLayerSAM.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius, a number or a schedule of the number of updates.
      alpha: Length of the remembered direction in lengths of the gradient.
      every: k: how often it climbs. 1 is SAM.
      aux_init: See :func:`otmdr_jax.otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.SamOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state, a
      :class:`otmdr_jax.core.transform.MemoryState`, holds a :class:`LookMemory`. Under
      `jax.vmap` both kinds of steps are computed and one is chosen, which saves
      nothing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from otmdr_jax import baselines
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> tx = optax.chain(baselines.looksam(loss_fn, every=2), optax.sgd(0.1))
      >>> w, batch = jnp.zeros(2), jnp.eye(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(w, state, w, batch=batch)
      >>> int(state[0].memory.count)
      1

    Reference:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022.
    """
    compute = looksam_gradient(
        loss_fn,
        (0.0,) * schedule_of(rho)[1],
        alpha=alpha,
        every=every,
        **options,
    )
    return from_gradient(
        compute,
        rho=rho,
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
        start=start,
    )


def _rounding(grads: PyTree) -> float:
    """The error of a gradient, of whose coarsest leaf and of sums in float32."""
    leaves = [float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(grads)]
    return max([8 * float(jnp.finfo(jnp.float32).eps), *leaves])


def start(params: PyTree) -> LookMemory:
    """The memory before the first step, which climbs."""
    zeros = jax.tree.map(
        lambda p: jnp.zeros_like(p, tree.accumulation_dtype(p)), params
    )
    return LookMemory(jnp.zeros((), jnp.int32), zeros)


@with_options
def looksam_gradient(
    loss_fn: Callable[..., Any],
    rho: Any = RHO,
    *,
    alpha: float = ALPHA,
    every: int = EVERY,
    **options: Unpack[SamOptions],
) -> Callable[..., Any]:
    """LookSAM's gradient and what it remembers.

    Args:
      loss_fn: The loss, as for :func:`looksam`.
      rho: The radii of a call that names none.
      alpha: The length of the remembered direction in lengths of the gradient.
      every: k, the number of steps from one climb to the next.
      **options: Those of :class:`otmdr_jax.core.options.SamOptions`.

    Returns:
      (memory, params, batch, *args, rho=None, **kwargs) ->
      (:class:`otmdr_jax.RobustGradient`, memory). In a step that does not climb the
      robust loss is the one at the center, and gap and distance are 0.
    """
    check_number("alpha", alpha)
    check_count("every", every)
    radii = check_rho(rho)
    chosen = Options(split="shared", **options)

    def with_direction(step):
        found, first = from_one_gradient(step)
        grads = step.shared(found.grads)
        direction = orthogonal(grads, first)
        # What rounding leaves of parallel gradients (a radius of 0, a linear loss)
        # points anywhere, and would be given a length.
        there = tree.norm(direction) > _rounding(grads) * tree.norm(grads)
        # One norm of all leaves is in the widest dtype of any.
        direction = jax.tree.map(
            lambda g, v: jnp.where(there, v, 0.0).astype(tree.accumulation_dtype(g)),
            grads,
            direction,
        )
        return found._replace(aux=(found.aux, direction), grads=grads)

    climbing = build(loss_fn, radii, chosen, with_direction)
    plain = build(
        loss_fn,
        (),
        Options(
            split="shared",
            has_aux=chosen.has_aux,
            axis_name=chosen.axis_name,
            microbatch_size=chosen.microbatch_size,
            weights=chosen.weights,
        ),
    )

    def compute(memory, params, batch, *args, key=None, rho=None, **kwargs):
        del key
        count = memory.count + 1

        def climb():
            result = climbing(params, batch, *args, rho=rho, **kwargs)
            aux, direction = result.aux
            return result._replace(aux=aux), LookMemory(count, direction)

        def reuse():
            result = plain(params, batch, *args, **kwargs)
            long, length = tree.norm(memory.direction), tree.norm(result.grads)
            factor = alpha * length / jnp.where(long == 0, 1.0, long)
            grads = jax.tree.map(
                lambda g, v: (g + factor * v).astype(g.dtype),
                result.grads,
                memory.direction,
            )
            info = result.diagnostics._replace(
                ascent_norms=jnp.tile(length, len(radii)),
                grad_norm=tree.norm(grads),
                distances=jnp.zeros(1, length.dtype),
            )
            return (
                result._replace(grads=grads, diagnostics=info),
                LookMemory(count, memory.direction),
            )

        if every == 1:
            return climb()
        return shards.cond(memory.count % every == 0, climb, reuse, params)

    return compute
