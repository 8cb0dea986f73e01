r"""Fisher SAM: the ball of SAM is an ellipsoid of the Fisher information.

.. math::
    w' = w + \rho \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad
    F^{-1} = \mathrm{diag}\left(\frac{1}{1 + \eta g^2}\right)

The diagonal of the Fisher information is approximated by the squared gradient of the
batch, plus one. It is an option of the robust gradient (`fisher=`), so that all its
other options work with it.

Reference: Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware
Minimisation <https://arxiv.org/abs/2206.04920>`_, ICML 2022, section 3.
"""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from otmdr_jax.core.gradient import robust_gradient
from otmdr_jax.core.options import FixedShapeOptions
from otmdr_jax.core.signatures import with_options
from otmdr_jax.core.transform import from_gradient, schedule_of

PyTree = Any

# There are no released settings: those of reimplementations.
RHO, ETA = 0.1, 1.0


@with_options
def fisher_sam(
    loss_fn: Callable[..., Any],
    rho: Any = RHO,
    *,
    eta: float = ETA,
    aux_init: PyTree = None,
    **options: Unpack[FixedShapeOptions],
) -> optax.GradientTransformationExtraArgs:
    """Fisher SAM as an Optax transformation, used like :func:`otmdr_jax.sam`.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius, gamma in the paper, or several; schedules as in
        :func:`otmdr_jax.otmdr`.
      eta: How far the squared gradient bends the ball. 0 is SAM, as is a gradient whose
        entries are all of one size.
      aux_init: See :func:`otmdr_jax.otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.FixedShapeOptions`.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import baselines
      >>> tx = baselines.fisher_sam(
      ...     lambda w, batch: jnp.mean(batch) * w[0] ** 2, rho=1.0, eta=0.75
      ... )
      >>> w, batch = jnp.ones(1), jnp.ones(4)
      >>> grads, _ = tx.update(w, tx.init(w), w, batch=batch)
      >>> grads.tolist()  # at 1 + 1 / sqrt(1 + 0.75 * 2^2)
      [3.0]

    Reference:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, ICML 2022.
    """
    compute = robust_gradient(
        loss_fn,
        (0.0,) * schedule_of(rho)[1],
        split="shared",
        fisher=eta,
        **options,
    )
    return from_gradient(
        compute,
        rho=rho,
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
    )
