"""Temperature, vector and matrix scaling: log_softmax(W z + b), fitted by NLL.

The NLL is convex in W and b. Optax's L-BFGS minimises it, always in float64; of a
temperature alone its slope has one root.

Where classes can be told apart without error, and with few examples they can, the NLL
has no minimum: weights grow without bound, and the next wrong prediction costs hundreds
of nats. Vector and matrix scaling therefore pull to the identity, with a force that
falls with the number of examples. Guo et al. (2017) fit matrices without a penalty and
report that they overfit; Kull et al. (2019) penalise the squares of what is off the
diagonal and of the bias (ODIR), by factors from cross-validation.
"""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from otmdr_jax.metrics.predictions import Array, check_labels, tolerance, unmasked

# Beyond these, probabilities are practically 0 and 1, or equal.
TEMPERATURES = (0.01, 100.0)

# A gradient of 1e-9 leaves the NLL within about 1e-18 of its minimum, and parameters
# within about 1e-8 where its curvature is 0.1.
_TOLERANCE = 1e-9
_STEPS = 2_000


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A calibrator: logits (N, C) to log-probabilities (N, C), in float64.

    Attributes:
      weight: The weight of the logits: a number (1 / T), (C,) or (C, C).
      bias: The bias, 0.0 or (C,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, logits: Array) -> np.ndarray:
        """The calibrated log-probabilities."""
        logits = check_logits(logits)
        if np.ndim(self.weight) and logits.shape[1] != len(self.weight):
            raise ValueError(
                f"the scaling was fitted on {len(self.weight)} classes, got logits of "
                f"{logits.shape[1]}."
            )
        matrix = np.ndim(self.weight) == 2
        scaled = logits @ self.weight.T if matrix else logits * self.weight
        return log_softmax(scaled + self.bias)


def fit_temperature(logits: Array, labels: Array) -> float:
    r"""The temperature that minimises the NLL of softmax(z / T).

    .. math:: T^* = \arg\min_T -\frac{1}{N} \sum_n \log \mathrm{softmax}(z_n / T)_{y_n}

    It is one number, so it changes neither the ranking of classes nor accuracy. It is
    unique, since the NLL is convex in 1 / T. Fit it on held-out data: on the training
    set it reflects how sure the model became of what it saw.

    Args:
      logits: (N, C) logits or log-probabilities; of an ensemble the logarithm of its
        mean probability.
      labels: (N,) integers in 0..C-1.

    Returns:
      T, in 0.01..100, above 1 if the model is too sure. If no temperature inside is
      best, it is the nearer end (all predictions right: 0.01; worse than guessing:
      100), with a warning.

    Raises:
      ValueError: The shape is another, the set is empty, numbers are not finite, or
        labels are out of range.
      TypeError: Labels are not integers.

    Reference: Guo et al., `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, ICML 2017.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import calibration
      >>> logits = np.array([[4.0, 0.0]] * 4)  # says 98 %, right in 3 of 4
      >>> T = calibration.fit_temperature(logits, [0, 0, 0, 1])
      >>> round(float(1 / (1 + np.exp(-4.0 / T))), 6)
      0.75
    """
    logits = check_logits(logits)
    labels = check_labels(labels, logits, logits.shape, "logits")
    low, high = TEMPERATURES

    # The NLL is convex in 1 / T: its slopes at the ends say on which side it is least.
    if _slope(logits, labels, 1.0 / high) >= 0.0:
        return _end(
            high, "above", "logits are no better than guessing, or far too large"
        )
    if _slope(logits, labels, 1.0 / low) <= 0.0:
        return _end(low, "below", "all predictions are right, or logits far too small")
    from scipy import optimize  # comes with JAX

    # In log T, where the slope is neither flat nor steep over the whole range.
    return math.exp(
        optimize.brentq(
            lambda log_t: _slope(logits, labels, math.exp(-log_t)),
            math.log(low),
            math.log(high),
            xtol=1e-12,
        )
    )


def fit_vector(logits: Array, labels: Array, *, l2: float | None = None) -> Scaling:
    """Vector scaling: softmax(w * z + b) with a weight and a bias for each class.

    It changes the ranking of classes, and so accuracy. Without a penalty the optimum is
    unique up to a number added to all biases, and there is none if classes can be told
    apart without error.

    Args:
      logits: (N, C) logits or log-probabilities, held out from training.
      labels: (N,) integers in 0..C-1.
      l2: The factor of a penalty l2 / 2 (|w - 1|^2 + |b|^2) beside the mean NLL; None
        for 1 / N, a Gaussian prior of deviation 1 (as scikit-learn's C = 1 of a
        logistic regression). 0 is the authors' fit without a penalty.

    Returns:
      :class:`Scaling`.

    Raises:
      ValueError: Bad input, as in :func:`fit_temperature`.

    Reference: Guo et al., `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, ICML 2017.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import calibration
      >>> logits = np.array([[2.0, 0.0], [0.0, 2.0]] * 4)
      >>> scaling = calibration.fit_vector(logits, [0, 0, 0, 1, 0, 1, 1, 1], l2=0)
      >>> np.exp(scaling(logits[:2])).round(4)[:, 0]
      array([0.75, 0.25])
    """
    logits = check_logits(logits)
    classes = logits.shape[1]
    start = {"weight": np.ones(classes), "bias": np.zeros(classes)}
    labels = check_labels(labels, logits, logits.shape, "logits")
    return Scaling(**_fit(logits, labels, start, _penalty(l2, labels), "vector"))


def fit_matrix(logits: Array, labels: Array, *, l2: float | None = None) -> Scaling:
    """Matrix scaling: softmax(W z + b), a logistic regression on the logits.

    It fits C (C + 1) numbers, so many classes need many examples, or a larger `l2`.
    (Kull et al., 2019, penalise only the off-diagonal and the bias, by two factors from
    cross-validation.)

    Args:
      logits: (N, C) logits or log-probabilities, held out from training.
      labels: (N,) integers in 0..C-1.
      l2: The factor of a penalty l2 / 2 (|W - I|^2 + |b|^2) beside the mean NLL; None
        for 1 / N, as in :func:`fit_vector`.

    Returns:
      :class:`Scaling`.

    Raises:
      ValueError: Bad input, as in :func:`fit_temperature`.

    Reference: Guo et al., `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, ICML 2017; Kull et al., `Beyond temperature
    scaling <https://arxiv.org/abs/1910.12656>`_, NeurIPS 2019.

    Example:
      >>> import numpy as np
      >>> from otmdr_jax import calibration
      >>> logits = np.array([[2.0, 0.0], [0.0, 2.0]] * 4)
      >>> scaling = calibration.fit_matrix(logits, [0, 0, 0, 1, 0, 1, 1, 1], l2=0)
      >>> np.exp(scaling(logits[:2])).round(4)[:, 0]
      array([0.75, 0.25])
    """
    logits = check_logits(logits)
    classes = logits.shape[1]
    start = {"weight": np.eye(classes), "bias": np.zeros(classes)}
    labels = check_labels(labels, logits, logits.shape, "logits")
    return Scaling(**_fit(logits, labels, start, _penalty(l2, labels), "matrix"))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits, in float64 on the host."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def check_logits(logits: Array) -> np.ndarray:
    """Finite logits (N, C), in float64."""
    logits = unmasked(logits)
    if np.iscomplexobj(logits):
        raise TypeError(f"logits must be real numbers, got dtype {logits.dtype}.")
    allowed = tolerance(logits.dtype)
    logits = logits.astype(np.float64)
    if logits.ndim != 2:
        raise ValueError(
            f"calibration needs logits of shape (N, C), got {logits.shape}. For "
            "samples give the logarithm of the mean probability."
        )
    if not np.isfinite(logits).all():
        row = int(np.argmin(np.isfinite(logits).all(axis=1)))
        raise ValueError(
            f"logits must be finite, but row {row} is {logits[row]}. For probabilities "
            "that may be 0 give np.log(np.maximum(probs, 1e-30))."
        )
    ones = abs(logits.sum(axis=1) - 1) <= allowed
    if logits.size and (logits >= 0).all() and ones.all():
        raise ValueError(
            "calibration needs logits or log-probabilities, and these rows are "
            "probabilities: at least 0, with a sum of 1. Give "
            "np.log(np.maximum(probs, 1e-30))."
        )
    return logits


def _slope(logits: np.ndarray, labels: np.ndarray, weight: float) -> float:
    """The derivative of the NLL of softmax(weight z) by the weight."""
    probs = np.exp(log_softmax(weight * logits))
    of_label = logits[np.arange(len(labels)), labels]
    return float(np.mean(np.sum(probs * logits, axis=1) - of_label))


def _end(temperature: float, side: str, why: str) -> float:
    warnings.warn(
        f"the NLL still falls {side} the temperature {temperature}, the end of the "
        f"range: {why}. It may be far worse than 1 for other examples: give more, or "
        "rescale the logits.",
        stacklevel=3,
    )
    return temperature


def _penalty(l2: float | None, labels: np.ndarray) -> float:
    if l2 is None:
        return 1.0 / len(labels)
    if not 0.0 <= l2 < np.inf:
        raise ValueError(f"l2 must be finite and not negative, got {l2}.")
    return l2


def _fit(logits, labels, start, l2: float, name: str) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        found, norm = _minimise(logits, labels, start, l2)
        found, norm = jax.tree.map(np.asarray, found), float(norm)
    # Line searches end when the NLL no longer tells points apart, at about 1e-8.
    if not norm <= 1e-6:
        warnings.warn(
            f"{name} scaling has not converged: its gradient is {norm:.1e} after "
            f"{_STEPS} steps. Where classes can be told apart without error there is "
            "no optimum: give l2 > 0, or more examples.",
            stacklevel=3,
        )
    return found


@jax.jit
def _minimise(logits, labels, start, l2):
    """L-BFGS from `start`; returns the norm of the final gradient too."""

    def loss(params):
        weight = params["weight"]
        scaled = logits @ weight.T if weight.ndim == 2 else logits * weight[None]
        scaled += params["bias"][None]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(scaled, labels)
        moved = jax.tree.map(jnp.subtract, params, start)
        return jnp.mean(losses) + l2 / 2 * optax.tree.norm(moved, squared=True)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, _, count = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return optax.apply_updates(params, updates), state, norm, count + 1

    def going(carry):
        _, _, norm, count = carry
        return (norm > _TOLERANCE) & (count < _STEPS)

    state = optimizer.init(start)
    params, _, norm, _ = jax.lax.while_loop(going, step, (start, state, jnp.inf, 0))
    return params, norm
