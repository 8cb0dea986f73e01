r"""bSAM: SAM whose ellipsoid is the Gaussian posterior that it trains.

For each sub-batch :math:`B_j`, with N the number of training examples:

.. math::
    \begin{aligned}
    g_j &= \nabla L_{B_j}(w + e_j), & e_j &\sim \mathcal N(0, 1 / (N s)) \\
    g'_j &= \nabla L_{B_j}(w + \rho\, g_j / s)
    \end{aligned}

and once a step

.. math::
    \begin{aligned}
    m &\leftarrow \beta_1 m + (1 - \beta_1) (\bar g' + \delta w) \\
    w &\leftarrow w - \alpha\, m / s \\
    s &\leftarrow \beta_2 s + (1 - \beta_2) (\sqrt s\, \overline{|g|} + \delta + \gamma)
    \end{aligned}

with bars for means over sub-batches. The second pass is at w, not at the noisy weights:
the perturbation is not normalised, and replaces the noise.

Reference: Moellenhoff & Khan, `SAM as an Optimal Relaxation of Bayes
<https://arxiv.org/abs/2210.01620>`_, ICLR 2023, and
https://github.com/team-approx-bayes/bayesian-sam.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.baselines import preconditioned
from otmdr_jax.core import collectives
from otmdr_jax.core.batches import NO_BATCH
from otmdr_jax.core.checks import check_number, check_word
from otmdr_jax.core.gradient import Diagnostics, build, call
from otmdr_jax.core.options import Options, PartedOptions
from otmdr_jax.core.particle import from_one_gradient
from otmdr_jax.core.signatures import with_options
from otmdr_jax.core.transform import from_gradient, schedule_of

PyTree = Any

# Of the released code: radius and precision for CIFAR-10, damping everywhere.
RHO, PRECISION, DAMPING = 0.01, 1.0, 0.1
B1, B2 = 0.9, 0.999
ORDERS = ("released", "paper")


class BsamState(NamedTuple):
    """State of :func:`bsam`.

    Attributes:
      count: Number of updates so far.
      key: The PRNG key of the next update.
      aux: The auxiliary output of the last update's noisy pass.
      diagnostics: The last update's; the loss at the center is that of the noisy pass.
      precision: s, one for each weight, float32 or wider.
      rule: The state of :func:`bsam_rule`, the momentum.
    """

    count: jax.Array  # type: ignore[assignment]  # as in Optax: hides tuple.count
    key: jax.Array | None
    aux: PyTree
    diagnostics: Diagnostics
    precision: PyTree
    rule: PyTree


@with_options
def bsam(
    loss_fn: Callable[..., Any],
    key: jax.Array | None = None,
    *,
    learning_rate: optax.ScalarOrSchedule,
    b1: float = B1,
    b2: float = B2,
    weight_decay: float,
    rho: Any = RHO,
    num_data: float,
    precision_init: float = PRECISION,
    damping: float = DAMPING,
    order: str = "released",
    clip_norm: float | None = None,
    aux_init: PyTree = None,
    **options: Unpack[PartedOptions],
) -> optax.GradientTransformationExtraArgs:
    """BSAM as an Optax transformation: a whole optimizer, not to be chained with one.

    `update(updates, state, params, *, batch, loss_args=(), loss_kwargs=None)` computes
    its own gradients, as :func:`otmdr_jax.otmdr` does; the incoming updates are not
    used. The trained Gaussian is `posterior(params, state.precision, num_data)`. Each
    of the sub-batches, 8 in the released commands, has noise of its own.

    Args:
      loss_fn: The mean loss over a batch, a negative log-likelihood in nats: see
        :func:`otmdr_jax.value_and_grad`.
      key: A PRNG key; None where `num_data` is infinite.
      learning_rate: alpha, a number or a schedule; 0.5 in the released commands for
        CIFAR, with 5 epochs of warmup and a cosine.
      b1: beta_1, of the momentum; 0.9.
      b2: beta_2, of the precision; 0.999.
      weight_decay: delta, the prior's precision per example; 10 / N in the released
        commands for CIFAR.
      rho: The radius, a number or a schedule; 0.01 in the released commands for CIFAR.
      num_data: N, the number of training examples; the released commands for CIFAR
        multiply it by 4, for the augmentation. `float("inf")` switches the noise off.
      precision_init: s at the start; 1.
      damping: gamma, added to the precision's target; 0.1.
      order: "released" (the step is divided by the precision that its gradients were
        computed with, which is then updated, as in the code) or "paper" (the precision
        first, as in the listing).
      clip_norm: Bound on the global norm of the gradient; None for none.
      aux_init: See :func:`otmdr_jax.otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.PartedOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a :class:`BsamState`.

    Raises:
      ValueError, TypeError: An option that cannot work; at the update a missing batch
        or key, or sub-batches that do not divide it.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from otmdr_jax import baselines
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> tx = baselines.bsam(
      ...     loss_fn, jax.random.key(0), learning_rate=0.1, weight_decay=1e-4,
      ...     rho=0.01, num_data=1000, num_subbatches=2,
      ... )
      >>> w, batch = jnp.zeros(2), jnp.eye(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(w, state, w, batch=batch)
      >>> w = optax.apply_updates(w, updates)
      >>> state.precision.shape
      (2,)

    Reference:
      Moellenhoff & Khan, `SAM as an Optimal Relaxation of Bayes
      <https://arxiv.org/abs/2210.01620>`_, ICLR 2023, and their released code.
    """
    if key is None and num_data != math.inf:
        raise ValueError(
            "bsam draws noise: pass a key, or num_data=float('inf') for none."
        )
    _, radii = schedule_of(rho)
    if radii != 1:
        raise ValueError(f"bsam has one radius, got {rho!r}.")
    compute = bsam_gradient(
        loss_fn,
        num_data=num_data,
        weight_decay=weight_decay,
        b2=b2,
        damping=damping,
        **options,
    )
    check_number("precision_init", precision_init, positive=True)
    check_word("order", order, ORDERS)
    gradient = from_gradient(
        compute,
        key,
        rho=rho,
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
        start=lambda params: preconditioned.full(params, precision_init),
    )
    rule = bsam_rule(
        learning_rate, b1=b1, weight_decay=weight_decay, clip_norm=clip_norm
    )

    return preconditioned.whole(
        gradient,
        rule,
        lambda before, after: bsam_divisor(before, after, order),
        BsamState,
    )


@with_options
def bsam_gradient(
    loss_fn: Callable[..., Any],
    rho: float = RHO,
    *,
    num_data: float,
    weight_decay: float,
    b2: float = B2,
    damping: float = DAMPING,
    **options: Unpack[PartedOptions],
) -> Callable[..., tuple[Any, PyTree]]:
    """The perturbed gradient of bSAM and the precision's next value.

    Args:
      loss_fn: The loss, as for :func:`bsam`.
      rho: The radius of a call that names none.
      num_data: N, the number of training examples.
      weight_decay: delta, the prior's precision per example.
      b2: beta_2, the decay rate of the precision.
      damping: gamma, which is added to the precision's target.
      **options: Those of :class:`otmdr_jax.core.options.PartedOptions`.

    Returns:
      (precision, params, batch, *args, key=None, rho=None, **kwargs) ->
      (:class:`otmdr_jax.RobustGradient`, precision).
    """
    num_data = preconditioned.checked_num_data(num_data, infinite=True)
    preconditioned.check_decay("b2", b2)
    for name, value in (("weight_decay", weight_decay), ("damping", damping)):
        check_number(name, value)
    check_number("rho", rho)
    noisy = isinstance(num_data, jax.core.Tracer) or num_data != math.inf
    chosen = Options(split="shared", norm="none", **options)
    axes = collectives.axes_of(chosen.axis_name)

    def shifted(params, batch=NO_BATCH, *args, bsam_noise=None, **kwargs):
        if bsam_noise is not None:
            params = optax.apply_updates(params, bsam_noise)
        return call(loss_fn, params, batch, *args, **kwargs)

    def compute(precision, params, batch, *args, key=None, rho=None, **kwargs):
        if noisy and key is None:
            raise ValueError(
                "bsam draws noise: pass key=jax.random.key(...), a fresh one each "
                "step, or num_data=float('inf') for none."
            )
        root = jax.tree.map(jnp.sqrt, precision)

        def in_the_ellipsoid(step):
            scale = jax.tree.map(lambda r: 1 / r, root)
            step = step._replace(metric=lambda w, g: scale)
            if noisy:
                own_key = step.key
                own = axes and not chosen.sync_perturbation
                if own and jax.lax.axis_size(axes) > 1:
                    # The noise belongs to the perturbation, which is each device's own.
                    own_key = jax.random.fold_in(own_key, jax.lax.axis_index(axes))
                drawn = preconditioned.noise(own_key, precision, num_data)
                noise = {"bsam_noise": drawn}
                step = step._replace(own=lambda taken: {} if taken else noise)
            found, first = from_one_gradient(step)
            # What the precision follows: sqrt(s) |g|, of the noisy pass.
            curvature = jax.tree.map(lambda r, g: r * jnp.abs(g), root, first)
            grads = step.shared(found.grads)
            return found._replace(aux=(found.aux, curvature), grads=grads)

        compute = build(shifted, (radius,), chosen, in_the_ellipsoid)
        result = compute(params, batch, *args, key=key, rho=rho, **kwargs)
        aux, curvature = result.aux
        new = jax.tree.map(
            lambda s, c: b2 * s + (1 - b2) * (c + damping + weight_decay),
            precision,
            curvature,
        )
        return result._replace(aux=aux), new

    radius = rho
    return compute


def bsam_rule(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = B1,
    weight_decay: float,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """What bSAM does with its gradient: decay, momentum, division by `precision=`.

    Args:
      learning_rate: alpha.
      b1: beta_1; the momentum starts at 0 and is not corrected for it.
      weight_decay: delta.
      clip_norm: Bound on the global norm of the gradient; None for none.
    """
    preconditioned.check_learning_rate(learning_rate)
    preconditioned.check_decay("b1", b1)
    return optax.chain(
        *preconditioned.clipping(clip_norm),
        optax.add_decayed_weights(weight_decay),
        optax.ema(b1, debias=False),
        preconditioned.divide_by_precision(),
        optax.scale_by_learning_rate(learning_rate),
    )


def bsam_divisor(old: PyTree, new: PyTree, order: str = "released") -> PyTree:
    """The precision that a step is divided by.

    Args:
      old: The one before its update.
      new: The one after it.
      order: "released" for the old one, "paper" for the new one.
    """
    return old if order == "released" else new
