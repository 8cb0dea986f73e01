r"""One ascent step in weight space: the inner line of Eq. 9.

    w' = w + rho * T^2 d / ||T g||_2 + e,        e ~ N(0, noise_std^2 I)

with g the gradient at w and d the direction: g itself, or the released code's merged
one. T(w, g) is the metric, which says what ball the step stays in, element by element:
T = 1 is the sphere, T = |w| ASAM's, T = (1 + eta g^2)^(-1/2) Fisher SAM's ellipsoid.

The callers differentiate at `w'`, never through it (identity Hessian, as in SAM).
Whoever does (for a radius that is learned, say) finds the step's derivative, and 0 for
a zero gradient, where there is none: the particle stays with the center.

Reference: Nguyen et al., 2023, section 4.2.1; Kwon et al., 2021 (ASAM), Eq. 4; Kim et
al., 2022 (Fisher SAM), section 3.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import draws, tree

PyTree = Any
# (weights, gradients) -> T: a pytree of their structure whose leaves are arrays of
# their shapes, or scalars, in float32 or wider.
Metric = Callable[[PyTree, PyTree], PyTree]


def sphere(params: PyTree, grads: PyTree) -> PyTree:
    """T = 1: all directions are equally far."""
    del grads
    return jax.tree.map(lambda w: jnp.ones((), _real_dtype(w)), params)


def absolute_weights(params: PyTree, grads: PyTree) -> PyTree:
    """T = |w|: ASAM's, without the constant 0.01 that its authors add for kernels.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core.ascent import absolute_weights
      >>> absolute_weights(jnp.array([-2.0, 0.5]), None).tolist()
      [2.0, 0.5]
    """
    del grads
    return jax.tree.map(lambda w: jnp.abs(w).astype(_real_dtype(w)), params)


def fisher(eta: jax.typing.ArrayLike) -> Metric:
    """T = (1 + eta g^2)^(-1/2): Fisher SAM's.

    g^2 stands for the diagonal of the Fisher information, as Kim et al. approximate it;
    of complex weights it is |g|^2.

    Args:
      eta: How far the squared gradient bends the ball; 0 is the sphere.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core.ascent import fisher
      >>> fisher(1.0)(None, jnp.array([0.0, 3.0])).round(4).tolist()
      [1.0, 0.316...]
    """
    return lambda params, grads: jax.tree.map(
        lambda g: _fisher_scale(_wide(jnp.abs(g)), eta), grads
    )


def ascend(
    params: PyTree,
    grads: PyTree,
    rho: jax.typing.ArrayLike | Callable[[jax.Array], jax.Array],
    *,
    metric: Metric = sphere,
    direction: PyTree | None = None,
    norm: str = "global",
    mask: PyTree | None = None,
    norm_mask: PyTree | None = None,
    noise_std: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
) -> tuple[PyTree, jax.Array]:
    """Moves `params` uphill by `rho`, then adds noise.

    Args:
      params: The weights w, a pytree of inexact arrays.
      grads: The gradient g at w, of the same structure; its norm sets the length.
      rho: The radius, a scalar in the units of the weights, or a function of the norm
        ||T g||_2 to it.
      metric: T of the weights and the gradient: :func:`sphere`,
        :func:`absolute_weights`, :func:`fisher` or one of your own.
      direction: The direction d; None for g itself.
      norm: "global", one norm over all perturbed leaves, "per_leaf", or "none": the
        step is rho T^2 d, as long as the gradient makes it.
      mask: A pytree of bools, True where a leaf is perturbed; None for everywhere.
        Other leaves stay as they are and do not count in the norm.
      norm_mask: A pytree of bools, True where a leaf counts in a global norm; None:
        where it is perturbed.
      noise_std: Standard deviation of the noise per coordinate; None for none.
      key: A PRNG key, needed with `noise_std`.

    Returns:
      The new weights, of the dtypes of `params`, and the norm ||T g||_2 over the
      perturbed leaves. A zero gradient moves nothing; a non-finite one makes the
      result NaN, so that a guard further on can see it.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core.ascent import ascend
      >>> w, g = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([3.0, 4.0])}
      >>> moved, length = ascend(w, g, rho=0.5)
      >>> moved["w"].tolist(), float(length)
      ([1.29..., 1.39...], 5.0)
    """
    w, treedef = jax.tree.flatten(params)
    g = jax.tree.leaves(grads)
    d = g if direction is None else jax.tree.leaves(direction)
    moving = [True] * len(w) if mask is None else jax.tree.leaves(mask)

    # Steps are computed in float32 or wider; only the new weights are rounded.
    t = jax.tree.leaves(metric(params, grads))
    tg = [ti * _wide(gi) for ti, gi in zip(t, g, strict=True)]
    counting = moving if norm_mask is None else jax.tree.leaves(norm_mask)
    total = tree.norm([x for x, m in zip(tg, counting, strict=True) if m])
    steps = {}
    for i, m in enumerate(moving):
        if not m:
            continue
        length = tree.norm(tg[i]) if norm == "per_leaf" else total
        divisor = 1.0 if norm == "none" else jnp.where(length == 0, 1.0, length)
        # The steepest ascent of a real function is the conjugate of JAX's gradient
        # for complex weights. Dividing first keeps 1 / length from overflowing.
        uphill = t[i] * (t[i] * jnp.conj(_wide(d[i])))
        steps[i] = uphill / divisor * _radius(rho, length)
    if noise_std is not None:
        drawn = noise(key, steps)
        steps = {i: step + noise_std * drawn[i] for i, step in steps.items()}
    new = [x + steps[i] if i in steps else x for i, x in enumerate(w)]
    return tree.like(jax.tree.unflatten(treedef, new), params), total


def resolve_mask(mask: Any, params: PyTree) -> PyTree | None:
    """Evaluates and checks a mask against the parameters.

    Args:
      mask: None, a pytree of bools, or a function of the parameters to one.
      params: The parameters.

    Returns:
      None or a pytree of Python bools of the structure of `params`.

    Raises:
      ValueError: The mask has another structure than `params`.
      TypeError: A leaf of the mask is no bool.
    """
    if mask is None:
        return None
    mask = mask(params) if callable(mask) else mask
    expected: Any = jax.tree.structure(params)
    got: Any = jax.tree.structure(mask)
    if expected != got:
        raise ValueError(
            "mask must have the structure of the parameters, one bool for each leaf.\n"
            f"  parameters: {expected}\n  mask:       {got}\n"
            "Build it with jax.tree.map(lambda leaf: ..., params)."
        )
    for leaf in jax.tree.leaves(mask):
        if jnp.shape(leaf) or jnp.result_type(leaf) != jnp.bool_:
            raise TypeError(
                f"mask must hold one bool for each leaf, got {leaf!r}: use True where "
                "a leaf may be perturbed and False where it stays."
            )
    return jax.tree.map(bool, mask)


@jax.custom_jvp
def _fisher_scale(size, eta):
    return 1 / jnp.hypot(jnp.ones((), size.dtype), jnp.sqrt(eta) * size)


@_fisher_scale.defjvp
def _fisher_scale_jvp(primals, tangents):
    """-T/2 ((T g)^2 d eta + 2 eta T g T dg): the root of eta has no derivative at 0."""
    (size, eta), (dsize, deta) = primals, tangents
    t = _fisher_scale(size, eta)
    tg = t * size
    return t, -0.5 * t * (tg * tg * deta + 2 * eta * tg * t * dsize)


def _radius(rho: Any, length: jax.Array) -> jax.Array:
    """rho, but 0 for a zero gradient and NaN for one that is not finite."""
    radius = jnp.where(length == 0, 0.0, rho(length) if callable(rho) else rho)
    return jnp.where(jnp.isfinite(length), radius, jnp.nan)


def noise(
    key: jax.Array | None, leaves: Mapping[int, jax.Array]
) -> dict[int, jax.Array]:
    """Normal numbers for leaves, by their index: the same ones whatever the mask is."""
    if key is None:
        raise ValueError("noise_std needs a PRNG key: pass key=jax.random.key(...).")
    # Of complex weights both parts are coordinates; JAX's draws have half of it each.
    return {
        i: drawn * 2**0.5 if jnp.iscomplexobj(drawn) else drawn
        for i, drawn in draws.normals(key, leaves).items()
    }


def _real_dtype(x):
    return jnp.finfo(tree.accumulation_dtype(x)).dtype


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(tree.accumulation_dtype(x))
