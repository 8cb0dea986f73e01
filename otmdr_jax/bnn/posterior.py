r"""The mean-field Gaussian over the weights of any model: its leaves and its samples.

.. math:: Q = \mathcal N(\mu, \mathrm{diag}(\sigma^2)), \qquad
    \theta = \mu + \sigma \kappa, \qquad \kappa \sim \mathcal N(0, I), \qquad
    \sigma = \log(1 + e^{r})

Reference: Blundell et al., `Weight Uncertainty in Neural Networks
<https://arxiv.org/abs/1505.05424>`_, ICML 2015; Nguyen et al., 2023, section 4.2.3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.core import draws, tree
from otmdr_jax.core.ascent import resolve_mask

PyTree = Any

# softplus(-5), the initial value in the code released with Nguyen et al., 2023.
SIGMA = 0.0067

# The logarithm of softplus is finite in float32 for a sigma of at least this.
SMALLEST_SIGMA = 1e-37


class MeanField(NamedTuple):
    """A mean-field Gaussian posterior: a pytree that any optimizer can train.

    All three have the structure of the parameters, with None where a leaf is of the
    other kind.

    Attributes:
      mean: The means of the stochastic leaves, float32 or wider.
      raw_scale: The r of the standard deviations softplus(r).
      point: The other leaves, which are point estimates.
    """

    mean: PyTree
    raw_scale: PyTree
    point: PyTree


def init(params: PyTree, sigma: Any = SIGMA, mask: Any = None) -> MeanField:
    """Makes a posterior around the parameters of a model.

    Args:
      params: The model's parameters, any pytree of arrays; they become the means.
      sigma: The initial standard deviation, in the units of the weights: a positive
        number, or a pytree with the structure of `params`. Default 0.0067, which is
        softplus(-5) as in the released code.
      mask: A choice of the stochastic leaves: a pytree of bools, a function from the
        parameters to one, or True for all. Default: :func:`weights_and_biases`, which
        takes the kernels and biases of convolutions and dense layers, but not those of
        BatchNorm.

    Returns:
      A :class:`MeanField`.

    Raises:
      ValueError: A sigma is not positive, or the mask selects nothing or has another
        structure; TypeError: a stochastic leaf is not a real floating array.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> dense = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
      >>> q = bnn.init({"dense": dense, "norm": {"scale": jnp.ones(2)}})
      >>> round(float(bnn.std(q)["dense"]["kernel"][0, 0]), 6)
      0.0067
      >>> q.point["dense"]["kernel"], q.point["norm"]["scale"].tolist()
      (None, [1.0, 1.0])
    """
    if isinstance(params, MeanField):
        raise TypeError(
            "init takes the parameters of a model, got a posterior: take its mean with "
            "bnn.mean(q) first."
        )
    if isinstance(mask, bool):
        everywhere = mask
        mask = jax.tree.map(lambda _: everywhere, params)
    named = resolve_mask(weights_and_biases if mask is None else mask, params)
    if not any(jax.tree.leaves(named)):
        raise ValueError(
            "mask selects nothing, so no leaf would be stochastic. The default takes "
            "arrays of two or more axes and the arrays beside them; pass mask=True "
            "for all leaves, or a pytree of bools."
        )
    structures: Any = [jax.tree.structure(x) for x in (sigma, params)]
    if structures[0] != structures[1]:
        if not jax.tree_util.all_leaves([sigma]) or jnp.ndim(sigma):
            raise ValueError(
                "sigma must be a positive number, or a pytree of the structure of the "
                f"parameters, got {structures[0]}."
            )
        sigma = jax.tree.map(lambda _: sigma, params)

    def part(function, of_named):
        return jax.tree.map(
            lambda n, *leaves: function(*leaves) if n is of_named else None,
            named,
            params,
            sigma,
        )

    return MeanField(
        part(lambda p, _: _wide(p), True),
        part(_raw_scale, True),
        part(lambda p, _: p, False),
    )


def draw(
    params: PyTree,
    key: jax.Array,
    *,
    mean_std: float = 0.1,
    raw_mean: float = -5.0,
    raw_std: float = 0.1,
    mask: Any = None,
) -> MeanField:
    """Draws a random posterior, as the released code initialises it.

    It draws mu ~ N(0, mean_std^2) and r ~ N(raw_mean, raw_std^2), whatever the model's
    own initialisation is. Point estimates stay as they are.

    Args:
      params: The model's parameters; of stochastic leaves only the shapes matter.
      key: A PRNG key.
      mean_std: Standard deviation of the means; 0.1 in the released code.
      raw_mean: Mean of the raw scales; -5 in the released code, a sigma of 0.0067.
      raw_std: Standard deviation of the raw scales; 0.1 in the released code.
      mask: A choice of the stochastic leaves, as for :func:`init`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> q = bnn.draw(jnp.zeros((100, 100)), jax.random.key(0))
      >>> round(float(q.mean.std()), 2), round(float(q.raw_scale.mean()), 2)
      (0.1, -5.0)
    """
    q = init(params, mask=mask)
    of_means, of_scales = (noise(q, k) for k in jax.random.split(key))
    return MeanField(
        jax.tree.map(lambda k: mean_std * k, of_means),
        jax.tree.map(lambda k: raw_mean + raw_std * k, of_scales),
        q.point,
    )


def weights_and_biases(params: PyTree) -> PyTree:
    """The default mask: arrays of two or more axes, and arrays beside them.

    A bias is stochastic if a kernel is in the same dict, tuple or module. So the scale
    and bias of normalisation layers are point estimates. A single array is stochastic.

    Args:
      params: Any pytree of arrays.

    Returns:
      A pytree of bools.
    """
    with_paths = jax.tree.leaves_with_path(params)
    if len(with_paths) == 1:
        return jax.tree.map(lambda _: True, params)
    groups = {
        jax.tree_util.keystr(path[:-1])
        for path, leaf in with_paths
        if jnp.ndim(leaf) >= 2
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[:-1]) in groups, params
    )


def mean(q: MeanField) -> PyTree:
    """The model's parameters at the mean of the posterior.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> bnn.mean(bnn.init({"w": jnp.ones((1, 2))}))
      {'w': Array([[1., 1.]], dtype=float32)}
    """
    return join(check(q).mean, q.point)


def std(q: MeanField) -> PyTree:
    """The standard deviations sigma = softplus(r), with None for point estimates.

    None is below 1e-37, where float32 would make it 0, the divergence infinite and its
    gradient NaN. The derivative of its logarithm is 1 there, as in the limit.
    """
    return jax.tree.map(_softplus, check(q).raw_scale)


def sample(q: MeanField, key: jax.Array) -> PyTree:
    """Draws the model's parameters from the posterior.

    Args:
      q: The posterior.
      key: A PRNG key.

    Returns:
      Parameters with the model's structure; stochastic ones are mu + sigma kappa.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> q = bnn.init(jnp.full((1000, 100), 3.0), sigma=0.5)
      >>> w = bnn.sample(q, jax.random.key(0))
      >>> round(float(w.mean()), 2), round(float(w.std()), 2)
      (3.0, 0.5)
    """
    return at(q, noise(q, key))


def noise(q: MeanField, key: jax.Array) -> PyTree:
    """kappa: standard normal noise for every stochastic leaf."""
    means, treedef = jax.tree.flatten(check(q).mean)
    drawn = draws.normals(key, dict(enumerate(means)))
    return jax.tree.unflatten(treedef, [drawn[i] for i in range(len(means))])


def at(q: MeanField, kappa: PyTree) -> PyTree:
    """The model's parameters mu + sigma kappa."""
    drawn = jax.tree.map(lambda m, s, k: m + s * k, q.mean, std(q), kappa)
    return join(drawn, q.point)


def signal_to_noise(q: MeanField) -> PyTree:
    r"""\|mu\| / sigma of every stochastic weight, with None for point estimates.

    Weights with a low ratio hardly matter and can be pruned (Blundell et al., 2015,
    section 5.1, who show its distribution in decibel, 20 log10).
    """
    return jax.tree.map(lambda m, s: jnp.abs(m) / s, check(q).mean, std(q))


def join(stochastic: PyTree, point: PyTree) -> PyTree:
    """Puts the two kinds of leaves together again."""
    return jax.tree.map(
        lambda s, p: p if s is None else s, stochastic, point, is_leaf=_is_none
    )


def check(q: Any) -> MeanField:
    """Returns a posterior unchanged if it is valid.

    Raises:
      TypeError: It is not a posterior; ValueError: its parts do not fit each other.
    """
    if not isinstance(q, MeanField):
        raise TypeError(
            "expected a posterior, a MeanField as bnn.init(params) returns it, got "
            f"{type(q).__name__}."
        )
    parts = q.mean, q.raw_scale
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(part)] for part in parts]
    alike: Any = [jax.tree.structure(part) for part in parts]
    if alike[0] != alike[1] or shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            "mean and raw_scale of a posterior must have the same leaves and shapes, "
            f"at least one, got\n  mean:      {shapes[0]}\n  raw_scale: {shapes[1]}"
        )
    kinds: Any = [
        jax.tree.structure(part, is_leaf=_is_none) for part in (q.mean, q.point)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "mean and point of a posterior must have the structure of one model, got\n"
            f"  mean:  {kinds[0]}\n  point: {kinds[1]}"
        )
    return q


def chosen(q: MeanField) -> PyTree:
    """The mask of a posterior: True where a leaf of the model is stochastic."""

    def which(mean, point):
        return None if mean is None and point is None else mean is not None

    return jax.tree.map(which, q.mean, q.point, is_leaf=_is_none)


def map_means(function: Callable[[PyTree], PyTree], q: MeanField) -> PyTree:
    """Makes a mask over a posterior that selects only means.

    Args:
      function: A function from the model's parameters to a pytree of bools.
      q: The posterior.
    """
    named = resolve_mask(function, mean(q))
    means = jax.tree.map(
        lambda m, n: None if m is None else n, q.mean, named, is_leaf=_is_none
    )
    no = jax.tree.map(lambda _: False, q)
    return MeanField(means, no.raw_scale, no.point)


@jax.custom_jvp
def _softplus(raw):
    return jnp.maximum(jax.nn.softplus(raw), SMALLEST_SIGMA)


@_softplus.defjvp
def _softplus_jvp(primals, tangents):
    (raw,), (move,) = primals, tangents
    return _softplus(raw), jnp.maximum(jax.nn.sigmoid(raw), SMALLEST_SIGMA) * move


def _is_none(x):
    return x is None


def _wide(leaf):
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"a stochastic leaf must be a real floating array, got {leaf.dtype} of "
            f"shape {leaf.shape}: leave it out of mask."
        )
    return leaf.astype(tree.accumulation_dtype(leaf))


def _raw_scale(leaf, sigma):
    """The inverse of softplus; log(e^s - 1) would lose all digits of a small s."""
    if not isinstance(sigma, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            good = bool(jnp.all((sigma >= SMALLEST_SIGMA) & jnp.isfinite(sigma)))
        if not good:
            raise ValueError(
                f"sigma must be positive and finite (at least {SMALLEST_SIGMA}), got "
                f"{sigma!r}: it is a standard deviation. For a point estimate leave a "
                "leaf out of mask."
            )
    sigma, shape = jnp.asarray(sigma, _wide(leaf).dtype), jnp.shape(leaf)
    raw = sigma + jnp.log(-jnp.expm1(-sigma))
    raw = raw.reshape((1,) * (len(shape) - raw.ndim) + raw.shape)
    return raw + jnp.zeros_like(leaf, raw.dtype)
