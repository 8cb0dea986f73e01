r"""MC dropout: a network trained with dropout, predicting with samples of its masks.

.. math:: p(y \mid x) \approx \frac1S \sum_{s=1}^S p(y \mid x, \theta, m_s)

Each sample is one draw of the masks, which all examples of a set share, just as they
share the weights under any other posterior. So a prediction does not depend on the
batch that an example is in, and the predictions of one sample belong to one function.

Reference: Gal & Ghahramani, `Dropout as a Bayesian Approximation: Representing Model
Uncertainty in Deep Learning <https://arxiv.org/abs/1506.02142>`_, ICML 2016.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from otmdr_jax.core import collectives
from otmdr_jax.core.checks import check_count
from otmdr_jax.core.keys import one_key

# Of Uncertainty Baselines' MC dropout (baselines/cifar/dropout.py): WideResNet-28-10.
RATE = 0.1
# The same as for every other posterior here; the paper's experiments take 10 and more.
NUM_SAMPLES = 30
# Folded into a step's key, which is split for other draws: a number that no split has.
_STREAM = 0x64726F70


def rate_of(model: Any) -> float:
    """The rate of a model's dropout; 0 if the model does not say one."""
    rate = getattr(model, "dropout", 0.0)
    number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    return float(rate) if number else 0.0


def example_keys(key: jax.Array, count: int, axis_name: Any = None) -> jax.Array:
    """A PRNG key for each example of a batch, the same on any devices.

    Args:
      key: The step's key, which other draws may use too.
      count: B, the number of examples on this device.
      axis_name: Name of the device axis that the batch is divided over. The examples of
        this device follow those of the devices before it.

    Returns:
      (B,) typed keys; that of an example depends on `key` and its place in the batch.

    Example:
      >>> import jax
      >>> from otmdr_jax.baselines import example_keys
      >>> keys = example_keys(jax.random.key(0), 4)
      >>> keys.shape, bool((keys[:2] == example_keys(jax.random.key(0), 2)).all())
      ((4,), True)
    """
    key = jax.random.fold_in(one_key(key), _STREAM)
    axes = collectives.axes_of(axis_name)
    first = count * jax.lax.axis_index(axes) if axes else 0
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


def mc_dropout(
    method: Any,
    model: Any,
    *,
    num_samples: int = NUM_SAMPLES,
    mean_only: bool = False,
) -> Any:
    """Makes a method that predicts with samples of its model's dropout.

    Args:
      method: A :class:`otmdr_jax.experiments.methods.Method` of one weight vector of
        this model.
      model: A model whose rate `dropout` is above 0 and whose `apply` takes `keys`, as
        that of :class:`otmdr_jax.models.Model` does.
      num_samples: S, the number of forward passes in a prediction.
      mean_only: True to predict with the network without dropout instead. S is then 1.

    Returns:
      A method. `predict` returns (S, B, C) log-probabilities, or outputs where there
      are no classes. It draws the masks from the state's key; BatchNorm uses its
      running statistics.

    Raises:
      ValueError: The model has no dropout, or has it in training alone;
        `num_samples` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from otmdr_jax import methods, models
      >>> from otmdr_jax.baselines import mc_dropout
      >>> model = models.create("cnn_small", 10, dropout=0.1)
      >>> one = methods.create("sgd", model, optax.sgd(0.1))
      >>> method = mc_dropout(one, model, num_samples=5)
      >>> images = jnp.zeros((4, 8, 8, 1))
      >>> state = method.init(jax.random.key(0), images)
      >>> method.predict(state, images).shape
      (5, 4, 10)
    """
    if not rate_of(model):
        raise ValueError(
            "mc-dropout needs a model that drops activations, as "
            f"models.create(..., dropout={RATE}); got dropout="
            f"{getattr(model, 'dropout', None)!r}."
        )
    if not rate_of(model) < 1:  # a flag: an adapted network draws numbers
        raise ValueError(
            "mc-dropout needs a model that drops activations outside of training too, "
            "and a network of one's own (models.adapt) does so in training alone: use "
            "one of the zoo, or a class whose apply drops wherever it is given keys."
        )
    if mean_only:
        return method
    check_count("num_samples", num_samples)

    def predict(state, images):
        def sample(key):
            logits, _ = model.apply(
                state.params, state.model_state, images, train=False, keys=key
            )
            logits = logits.astype(jnp.float32)
            return jax.nn.log_softmax(logits) if method.classes else logits  # (B, C)

        # Of the step, as those of a posterior: all batches see the same samples.
        key = jax.random.split(state.key, 3)[2]
        return jax.lax.map(sample, jax.random.split(key, num_samples))  # (S, B, C)

    return method._replace(predict=predict)
