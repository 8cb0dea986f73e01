r"""IVON: variational learning at the cost of Adam, by an improved online Newton step.

With :math:`\lambda` the number of training examples and a mean-field Gaussian
:math:`\mathcal N(w, 1 / (\lambda (h + \delta)))`:

.. math::
    \begin{aligned}
    \hat g &= \nabla L_B(w + e), & e &\sim \mathcal N(0, 1 / (\lambda (h + \delta))) \\
    \hat h &= \lambda (h + \delta)\, e\, \hat g \\
    g &\leftarrow \beta_1 g + (1 - \beta_1) \hat g \\
    h &\leftarrow \beta_2 h + (1 - \beta_2) \hat h
        + \tfrac12 (1 - \beta_2)^2 \frac{(h - \hat h)^2}{h + \delta} \\
    w &\leftarrow w - \alpha (h_0 + \delta)\,
        \frac{g / (1 - \beta_1^t) + \delta w}{h + \delta}
    \end{aligned}

:math:`\hat h` is the diagonal of the Hessian by the reparametrisation trick; the last
term of its update keeps h + delta positive.

Reference: Shen et al., `Variational Learning is Effective for Large Deep Networks
<https://arxiv.org/abs/2402.17641>`_, ICML 2024, Algorithm 1, and
https://github.com/team-approx-bayes/ivon.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import optax

from otmdr_jax.baselines import preconditioned
from otmdr_jax.core import loops, tree
from otmdr_jax.core.checks import check_count, check_number
from otmdr_jax.core.gradient import Diagnostics, build
from otmdr_jax.core.keys import one_key
from otmdr_jax.core.options import LossOptions, Options
from otmdr_jax.core.signatures import with_options
from otmdr_jax.core.transform import from_gradient

PyTree = Any

# Of the released code.
B1, B2, HESS = 0.9, 0.99999, 1.0


class IvonState(NamedTuple):
    """State of :func:`ivon`.

    Attributes:
      count: Number of updates so far.
      key: The PRNG key of the next update.
      aux: The auxiliary output of the last update.
      diagnostics: The last update's: both losses are those at the samples.
      hess: h, one for each weight, float32 or wider.
      rule: The state of :func:`ivon_rule`, the momentum.
    """

    count: jax.Array  # type: ignore[assignment]  # as in Optax: hides tuple.count
    key: jax.Array | None
    aux: PyTree
    diagnostics: Diagnostics
    hess: PyTree
    rule: PyTree


@with_options
def ivon(
    loss_fn: Callable[..., Any],
    key: jax.Array,
    *,
    learning_rate: optax.ScalarOrSchedule,
    num_data: float,
    b1: float = B1,
    b2: float = B2,
    weight_decay: float = 1e-4,
    hess_init: float = HESS,
    mc_samples: int = 1,
    clip_radius: float | None = None,
    clip_norm: float | None = None,
    debias: bool = True,
    rescale: bool = True,
    aux_init: PyTree = None,
    **options: Unpack[LossOptions],
) -> optax.GradientTransformationExtraArgs:
    """IVON as an Optax transformation: a whole optimizer, not to be chained with one.

    `update(updates, state, params, *, batch, loss_args=(), loss_kwargs=None)` computes
    its own gradients, as :func:`otmdr_jax.otmdr` does; the incoming updates are not
    used. The trained Gaussian is
    `posterior(params, ivon_precision(state.hess, weight_decay), num_data)`. Devices of
    `axis_name` share their samples.

    Args:
      loss_fn: The mean loss over a batch, a negative log-likelihood in nats: see
        :func:`otmdr_jax.value_and_grad`.
      key: A PRNG key.
      learning_rate: alpha, a number or a schedule; 0.1 for ResNets in the paper.
      num_data: lambda, the effective sample size: the number of training examples.
      b1: beta_1, of the momentum; 0.9 (released code).
      b2: beta_2, of the Hessian; 1 - 1e-5 (released code).
      weight_decay: delta, positive; 1e-4 (released code).
      hess_init: h_0, positive; 1 (released code). Larger values start with less noise.
      mc_samples: Samples a step, a gradient each.
      clip_radius: Bound on each coordinate of the preconditioned gradient; None for
        none.
      clip_norm: Bound on the global norm of the gradient; None for none.
      debias: Whether the momentum is corrected for its start at 0.
      rescale: Whether alpha is multiplied by h_0 + delta, so that a learning rate of
        SGD serves.
      aux_init: See :func:`otmdr_jax.otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.LossOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with an :class:`IvonState`.

    Raises:
      ValueError, TypeError: An option that cannot work; at the update a missing batch.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from otmdr_jax import baselines
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> tx = baselines.ivon(
      ...     loss_fn, jax.random.key(0), learning_rate=0.1, num_data=1000
      ... )
      >>> w, batch = jnp.zeros(2), jnp.eye(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(w, state, w, batch=batch)
      >>> w = optax.apply_updates(w, updates)
      >>> state.hess.shape
      (2,)

    Reference:
      Shen et al., `Variational Learning is Effective for Large Deep Networks
      <https://arxiv.org/abs/2402.17641>`_, ICML 2024, and their released code.
    """
    if key is None:
        raise ValueError("ivon draws noise: pass a key.")
    compute = ivon_gradient(
        loss_fn,
        num_data=num_data,
        weight_decay=weight_decay,
        b2=b2,
        mc_samples=mc_samples,
        **options,
    )
    rule = ivon_rule(
        learning_rate,
        b1=b1,
        weight_decay=weight_decay,
        hess_init=hess_init,
        clip_radius=clip_radius,
        clip_norm=clip_norm,
        debias=debias,
        rescale=rescale,
    )
    gradient = from_gradient(
        compute,
        key,
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
        start=lambda params: preconditioned.full(params, hess_init),
    )

    return preconditioned.whole(
        gradient,
        rule,
        lambda before, after: ivon_precision(after, weight_decay),
        IvonState,
    )


@with_options
def ivon_gradient(
    loss_fn: Callable[..., Any],
    *,
    num_data: float,
    weight_decay: float,
    b2: float = B2,
    mc_samples: int = 1,
    **options: Unpack[LossOptions],
) -> Callable[..., tuple[Any, PyTree]]:
    """The mean gradient at samples of the posterior, and the Hessian's next value.

    Args:
      loss_fn: The loss, as for :func:`ivon`.
      num_data: lambda, the number of training examples.
      weight_decay: delta, the prior's precision per example.
      b2: beta_2, the decay rate of the Hessian.
      mc_samples: The number of samples, each of which takes a gradient.
      **options: Those of :class:`otmdr_jax.core.options.LossOptions`.

    Returns:
      (hess, params, batch, *args, key=, **kwargs) ->
      (:class:`otmdr_jax.RobustGradient`, hess).
    """
    num_data = preconditioned.checked_num_data(num_data, infinite=False)
    preconditioned.check_decay("b2", b2)
    check_number("weight_decay", weight_decay, positive=True)
    check_count("mc_samples", mc_samples)
    plain = build(loss_fn, (), Options(split="shared", **options))

    def compute(hess, params, batch, *args, key=None, **kwargs):
        if key is None:
            raise ValueError("ivon draws noise: pass key=jax.random.key(...).")
        params, key = tree.arrays(params), one_key(key)
        precision = ivon_precision(hess, weight_decay)

        def at_sample(key):
            drawn = preconditioned.noise(key, precision, num_data)
            result = plain(optax.apply_updates(params, drawn), batch, *args, **kwargs)
            info = result.diagnostics._replace(distances=tree.norm(drawn)[None])
            products = jax.tree.map(lambda e, g: e * g, drawn, result.grads)
            return (result._replace(diagnostics=info), products), ()

        keys = key if mc_samples == 1 else jax.random.split(key, mc_samples)
        (mean, products), _ = loops.average(at_sample, keys, mc_samples, "sequential")
        info = mean.diagnostics._replace(grad_norm=tree.norm(mean.grads))
        new = jax.tree.map(
            lambda h, p, eg: _next_hess(h, p, num_data * p * eg, b2),
            hess,
            precision,
            products,
        )
        return mean._replace(diagnostics=info), new

    return compute


def _next_hess(h, precision, estimate, b2):
    """Algorithm 1, line 5: a step on the manifold of positive precisions."""
    away = (1 - b2) * (h - estimate)  # 1 - b2, since float32 rounds b2
    return h - away + 0.5 * away**2 / precision


def ivon_precision(hess: PyTree, weight_decay: float) -> PyTree:
    """The sum h + delta: the posterior's precision per example."""
    return jax.tree.map(lambda h: h + weight_decay, hess)


def ivon_rule(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = B1,
    weight_decay: float,
    hess_init: float = HESS,
    clip_radius: float | None = None,
    clip_norm: float | None = None,
    debias: bool = True,
    rescale: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """What IVON does with its gradient: momentum, decay, division by `precision=`.

    Args:
      learning_rate: alpha, a number or a schedule.
      b1: beta_1, the decay rate of the momentum.
      weight_decay: delta, the prior's precision per example.
      hess_init: h_0, the Hessian at the start.
      clip_radius: The bound on each coordinate; None for none.
      clip_norm: The bound on the global norm of the gradient; None for none.
      debias: Whether the momentum is corrected for its start at 0.
      rescale: Whether alpha is multiplied by h_0 + delta.
    """
    preconditioned.check_learning_rate(learning_rate)
    preconditioned.check_decay("b1", b1)
    check_number("hess_init", hess_init, positive=True)
    parts = [
        *preconditioned.clipping(clip_norm),
        optax.ema(b1, debias=debias),
        optax.add_decayed_weights(weight_decay),
        preconditioned.divide_by_precision(),
    ]
    if clip_radius is not None:
        check_number("clip_radius", clip_radius, positive=True)
        parts.append(optax.clip(clip_radius))
    if rescale:
        parts.append(optax.scale(hess_init + weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
