"""Priors over weights: a normal, a scale mixture, and a normal that is fitted.

A prior has a method `log_prob(weights)`, a scalar in nats, and, if there is a closed
form, `kl(mean, std)`. Any object with these methods works. They take pytrees of the
stochastic leaves; None stands for a point estimate, which has no prior.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core.checks import check_number

PyTree = Any

# The code released with Nguyen et al., 2023; also a common choice.
PRIOR_STD = 0.1
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Independent zero-mean normals.

    Attributes:
      std: The standard deviation, in the units of the weights: a positive number, or a
        pytree with one for each stochastic leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.bnn import Normal
      >>> float(Normal(2.0).kl(jnp.zeros(3), jnp.full(3, 2.0)))  # the prior itself
      0.0
    """

    std: Any = PRIOR_STD

    def __post_init__(self):
        """Checks the standard deviation."""
        if not jax.tree.leaves(self.std):
            raise ValueError(f"std of a prior must be positive, got {self.std!r}.")
        for std in jax.tree.leaves(self.std):
            check_number("std of a prior", std, positive=True)

    def log_prob(self, weights: PyTree) -> jax.Array:
        """Log p(w) in nats, summed over all weights."""

        def of_leaf(w, s):
            return jnp.sum(-0.5 * (w / s) ** 2 - jnp.log(s) - _HALF_LOG_2PI)

        return _total(of_leaf, weights, self._stds(weights))

    def kl(self, mean: PyTree, std: PyTree) -> jax.Array:
        r"""KL(N(mean, std^2) || p) in nats.

        sum log(s / sigma) + (sigma^2 + mu^2) / (2 s^2) - 1/2, over all weights.
        """

        def of_leaf(m, sigma, s):
            ratio = sigma / s
            return 0.5 * jnp.sum(ratio**2 + (m / s) ** 2 - 1.0) - jnp.sum(
                jnp.log(ratio)  # of the square would underflow
            )

        return _total(of_leaf, mean, std, self._stds(mean))

    def _stds(self, like):
        if jax.tree_util.all_leaves([self.std]):  # one number for all
            return jax.tree.map(lambda _: self.std, like)
        structures: Any = [jax.tree.structure(x) for x in (self.std, like)]
        if structures[0] != structures[1]:
            raise ValueError(
                "std of a prior must be a number, or one for each stochastic leaf and "
                f"None for point estimates:\n  std:    {structures[0]}\n"
                f"  leaves: {structures[1]}"
            )
        return self.std


@dataclasses.dataclass(frozen=True)
class ScaleMixture:
    """A mixture of two zero-mean normals, one wide and one narrow, for each weight.

    Its KL divergence has no closed form and is estimated by Monte Carlo.

    Attributes:
      wide_std: Standard deviation of the wide normal; 1 as in Blundell et al., who
        tried e^0, e^-1, e^-2.
      narrow_std: Standard deviation of the narrow one; e^-6 (they tried e^-6, e^-7,
        e^-8).
      weight: The share of the wide normal, 0 to 1; 0.5 (they tried 1/4, 1/2, 3/4).

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.bnn import ScaleMixture
      >>> round(float(ScaleMixture(1.0, 1.0).log_prob(jnp.zeros(1))), 4)  # N(0; 0, 1)
      -0.9189

    Reference: Blundell et al., 2015, Eq. 7 and section 5.1.
    """

    wide_std: float = 1.0
    narrow_std: float = math.exp(-6)
    weight: float = 0.5

    def __post_init__(self):
        """Checks the numbers."""
        check_number("wide_std of a prior", self.wide_std, positive=True)
        check_number("narrow_std of a prior", self.narrow_std, positive=True)
        if not 0 < self.weight < 1:
            raise ValueError(f"weight must lie between 0 and 1, got {self.weight!r}.")

    def log_prob(self, weights: PyTree) -> jax.Array:
        """Log p(w) in nats, summed over all weights."""
        parts = (
            (math.log(self.weight), self.wide_std),
            (math.log1p(-self.weight), self.narrow_std),
        )

        def of_leaf(w):
            logs = [c - 0.5 * (w / s) ** 2 - math.log(s) for c, s in parts]
            return jnp.sum(jnp.logaddexp(*logs) - _HALF_LOG_2PI)

        return _total(of_leaf, weights)


@dataclasses.dataclass(frozen=True)
class FittedNormal:
    r"""Zero-mean normals whose variances maximise the ELBO (empirical Bayes).

    The variance s^2 is the mean of mu^2 + sigma^2, computed anew at every step. The
    gradient is that of the ELBO, since the ELBO is stationary in s^2.

    Attributes:
      per: The weights that share a variance: "leaf" for those of one array, "all" for
        all.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.bnn import FittedNormal
      >>> float(FittedNormal().fit(jnp.full(4, 3.0), jnp.full(4, 4.0)).std)
      5.0

    Reference: MacKay, "Bayesian Interpolation", 1992, for the idea.
    """

    per: str = "leaf"

    def __post_init__(self):
        """Checks the word."""
        if self.per not in ("leaf", "all"):
            raise ValueError(f"per must be 'leaf' or 'all', got {self.per!r}.")

    def fit(self, mean: PyTree, std: PyTree) -> Normal:
        """The prior that maximises the ELBO of a posterior."""
        squares = jax.tree.map(lambda m, s: jnp.sum(m**2 + s**2), mean, std)
        sizes = jax.tree.map(jnp.size, mean)
        if self.per == "all":
            total = sum(jax.tree.leaves(squares)) / sum(jax.tree.leaves(sizes))
            squares = jax.tree.map(lambda _: total, squares)
            sizes = jax.tree.map(lambda _: 1, sizes)
        return Normal(jax.tree.map(lambda q, n: jnp.sqrt(q / n), squares, sizes))

    def kl(self, mean: PyTree, std: PyTree) -> jax.Array:
        """KL(N(mean, std^2) || fitted prior) in nats."""
        return self.fit(mean, std).kl(mean, std)


def check_prior(prior: Any) -> Any:
    """Raises TypeError unless an object can serve as a prior."""
    known = hasattr(prior, "kl") or hasattr(prior, "log_prob")
    if isinstance(prior, type) or not known:
        raise TypeError(
            "prior must have kl(mean, std) or log_prob(weights), as bnn.Normal(0.1), "
            f"bnn.ScaleMixture() or bnn.FittedNormal() have, got {prior!r}."
        )
    return prior


def _total(of_leaf, *trees):
    parts = jax.tree.leaves(jax.tree.map(of_leaf, *trees))
    return sum(parts, start=jnp.zeros(()))
