r"""The dual form over a posterior: draws share a budget, each goes by its gradient.

.. math::
    \min_{\lambda > 0} \; \lambda \rho^p + \mathbb E_\kappa \max_{\mu'} \left[
        L(\mu' + \sigma \kappa) - \lambda \|\mu' - \mu\|_2^p \right]

One :math:`\kappa` is drawn a step, so that the expectation, as that over batches, is
what the multiplier sees over steps.
"""

from collections.abc import Callable
from typing import Annotated, Any, Unpack

from otmdr_jax.bnn.gradient import of_means, options_of_means
from otmdr_jax.bnn.options import ObjectiveOptions
from otmdr_jax.core.batches import NO_BATCH
from otmdr_jax.core.dual import RHO, Budget, BudgetOptions, DualGradient, one_radius
from otmdr_jax.core.options import PartOptions, PassOptions, ShapeOptions
from otmdr_jax.core.signatures import filled, with_options


class DualMeansOptions(
    ObjectiveOptions,
    BudgetOptions,
    ShapeOptions,
    PartOptions,
    PassOptions,
    total=False,
):
    """Of the dual form over a posterior."""

    mask: Annotated[
        Any, None, "Which means may be perturbed, as for :func:`bnn.value_and_grad`."
    ]


@with_options
def dual_gradient(
    loss_fn: Callable[..., Any], rho: Any = RHO, **options: Unpack[DualMeansOptions]
) -> DualGradient:
    """The dual form for a Bayesian network: state in, state out.

    The means climb, all in one ball; the gradient of the scales is that at the center,
    which the first pass has. Two gradients of the batch in all.

    Args:
      loss_fn: The loss of one model, as for :func:`otmdr_jax.bnn.value_and_grad`.
      rho: The radius of the budget, over the means of all layers together; 0.05 as for
        :func:`otmdr_jax.dual`, our choice.
      **options: Those of :class:`DualMeansOptions`.

    Returns:
      A :class:`otmdr_jax.DualGradient`, whose `apply(state, q, batch, *args, key,
      rho=None, kl_weight=None, **kwargs)` gives a
      :class:`otmdr_jax.bnn.gradient.BayesGradient` and a
      :class:`otmdr_jax.DualState`.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.dual` and
        :func:`otmdr_jax.bnn.robust_gradient`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> q, batch = bnn.init(jnp.zeros((2, 1))), jnp.eye(2)
      >>> dual = bnn.dual_gradient(loss_fn, num_data=50_000)
      >>> found, state = dual.apply(dual.init(), q, batch, key=jax.random.key(0))
      >>> found.grads.raw_scale.shape, float(state.budget_used)
      ((2, 1), 1.0)
    """
    given = filled(DualMeansOptions, options)
    budget = Budget.of(given)
    radius = one_radius(rho)
    given["rho"] = (radius,)
    names = [name for name in given if name not in vars(budget)]
    opts = options_of_means({name: given[name] for name in names}, split="shared")

    def by(climb):
        def with_scales(step):
            seen, grads = step.gradient(step.center, step.batch)
            found = climb(step, (seen, step.shared(grads)))
            at_center = found.grads._replace(raw_scale=grads.raw_scale)
            return found._replace(grads=at_center)

        return of_means(loss_fn, given, opts, with_scales)

    by(budget.climb)  # here, that what cannot work is refused before there is a state

    def apply(state, q, batch=NO_BATCH, *args, rho=None, **kwargs):
        now = radius if rho is None else one_radius(rho)
        return budget.step(
            state, now, lambda climb: by(climb)(q, batch, *args, rho=now, **kwargs)
        )

    return DualGradient(lambda: budget.init(radius), apply)
