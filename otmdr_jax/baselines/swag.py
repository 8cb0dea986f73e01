r"""SWA and SWAG: the mean of the weights along a run, and a Gaussian around it.

After given steps the weights enter a running mean and, for SWAG, a running variance and
a low-rank matrix D of the last K deviations from the mean at the time. A prediction of
SWA is that of the mean, one of SWAG averages over S samples

.. math:: \tilde\theta = \bar\theta + \frac1{\sqrt2} \sigma \odot z_1
    + \frac1{\sqrt{2 (K - 1)}} D z_2, \qquad z_1, z_2 \sim \mathcal N(0, I)

The network never saw a batch with these weights, so BatchNorm's running statistics do
not belong to them. `finalize` of the method computes new ones from training data before
a prediction. See docs/collected.md.

Moments are float32 or wider, whatever the weights are: in bfloat16 the hundredth weight
vector moves no mean. SWA adds 4 bytes for each weight to a state and its checkpoints,
SWAG 4 (K + 2).

References: Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
Generalization <https://arxiv.org/abs/1803.05407>`_, UAI 2018; Maddox et al., `A Simple
Baseline for Bayesian Uncertainty in Deep Learning <https://arxiv.org/abs/1902.02476>`_,
NeurIPS 2019.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from otmdr_jax.baselines.finalize import Finalize
from otmdr_jax.baselines.mc_dropout import example_keys, rate_of
from otmdr_jax.baselines.snapshot import check_ends, is_due, put
from otmdr_jax.core import tree

PyTree = Any

# K and S of Maddox et al., sections 3.2 and 5.
RANK, NUM_SAMPLES = 20, 30


class Moments(NamedTuple):
    """Moments of the weights along a run.

    Attributes:
      mean: The mean of the weights, float32 or wider, as all moments are.
      variance: Their variance, divided by `number`; None for SWA.
      deviations: The last K weights minus the mean at the time, with a leading axis of
        K, in no particular order; None for SWA.
      number: The number of weight vectors that entered.
      statistics: BatchNorm statistics of the mean and then of the samples, along a
        leading axis. None until `finalize` has computed them; never in a checkpoint.
    """

    mean: PyTree
    variance: PyTree | None
    deviations: PyTree | None
    number: jax.Array
    statistics: PyTree | None = None


def average(
    method: Any,
    model: Any,
    ends: Sequence[int],
    *,
    rank: int = 0,
    num_samples: int = 0,
) -> Any:
    """Makes a method that averages its weights after given steps: SWA, or SWAG.

    Args:
      method: A :class:`otmdr_jax.experiments.methods.Method` of one weight vector.
      model: The method's model. If it has BatchNorm, its `batchnorm_momentum` says how
        the running statistics move.
      ends: The numbers of steps after which the weights enter, ascending.
      rank: K, the number of deviations that SWAG keeps, at least 2; 0 for SWA.
      num_samples: S, the number of samples in a prediction; 0 predicts with the mean
        only.

    Returns:
      A method. Its state's `method_state` is a :class:`Moments`. `predict` returns
      (max(S, 1), B, C) log-probabilities, those of the current weights until some have
      entered. Its `finalize` computes BatchNorm statistics; without it, the running
      statistics of the current weights are used.

    Raises:
      ValueError: The steps, the rank or the number of samples is not valid.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from otmdr_jax import methods, models
      >>> from otmdr_jax.baselines import average
      >>> model = models.create("cnn_small", 10)
      >>> one = methods.create("sgd", model, optax.sgd(0.1))
      >>> method = average(one, model, ends=(1, 2), rank=2, num_samples=5)
      >>> batch = jnp.zeros((4, 8, 8, 1)), jnp.arange(4)
      >>> state = method.init(jax.random.key(0), batch[0])
      >>> state, _ = jax.jit(method.step)(state, batch)
      >>> found = jax.jit(method.finalize.of_batch)(state, batch[0])
      >>> state = method.finalize.finish(state, found)
      >>> jax.jit(method.predict)(state, batch[0]).shape
      (5, 4, 10)
    """
    check_ends(ends)
    if rank == 1 or rank < 0 or num_samples < 0 or (num_samples and not rank):
        raise ValueError(
            "rank must be 0 (SWA) or at least 2, and samples need a rank; got "
            f"rank={rank} and num_samples={num_samples}."
        )
    # Whole batches are seen outside of any device axis.
    if getattr(model, "batchnorm_axis_name", None) is not None:
        model = dataclasses.replace(model, batchnorm_axis_name=None)
    spread = rank > 0

    def init(key, example_images):
        state = method.init(key, example_images)

        def zeros(*leading):
            return jax.tree.map(
                lambda x: jnp.zeros((*leading, *x.shape), tree.accumulation_dtype(x)),
                state.params,
            )

        kept = Moments(
            zeros(),
            zeros() if spread else None,
            zeros(rank) if spread else None,
            jnp.zeros((), jnp.int32),
        )
        return state._replace(method_state=kept)

    def step(state, batch):
        kept = state.method_state
        state, metrics = method.step(state._replace(method_state=None), batch)
        kept = _enter(kept, state.params, is_due(state.step, ends))
        return state._replace(method_state=kept), metrics

    def weights(state, i):
        """The mean for i = 0, sample i - 1 after; the current weights before any."""
        kept = state.method_state
        drawn = kept.mean
        if num_samples:
            key = jax.random.fold_in(jax.random.split(state.key, 3)[2], i)
            drawn = _sample(kept, key, jnp.where(i > 0, 1.0, 0.0))
        return jax.tree.map(
            lambda x, now: jnp.where(kept.number > 0, x.astype(now.dtype), now),
            drawn,
            state.params,
        )

    def predict(state, images):
        kept = state.method_state
        indices = jnp.arange(1, num_samples + 1) if num_samples else jnp.arange(1)

        def row(i):
            if kept.statistics is None:
                model_state = state.model_state
            else:
                model_state = jax.tree.map(lambda x: x[i], kept.statistics)
            one = state._replace(
                params=weights(state, i), model_state=model_state, method_state=None
            )
            return method.predict(one, images)[0]

        return jax.lax.map(row, indices)  # (S, B, C)

    def batch_statistics(state, images):
        def row(i):
            # One for all batches: their statistics are a mean over them.
            key = jax.random.split(state.key, 3)[2]
            found = statistics_of(
                model, weights(state, i), state.model_state, images, key
            )
            # Training skips a batch that is not finite; so does this mean.
            finite = tree.all_finite(found)
            found = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), found)
            return found, finite.astype(jnp.float32)

        return jax.lax.map(row, jnp.arange(num_samples + 1))

    def finish(state, seen):
        total, number = seen

        def mean(x, now):
            # Of members that are stacked there is an axis more. Where no batch was
            # finite the statistics of training stay.
            count = jnp.expand_dims(number, tuple(range(number.ndim, x.ndim)))
            if x.ndim > now.ndim:  # of several weight vectors of a member
                now = jnp.expand_dims(now, number.ndim - 1)
            # A mean over batches has a share of them here.
            return jnp.where(count > 0, x / jnp.where(count > 0, count, 1), now)

        statistics = jax.tree.map(mean, total, state.model_state)
        kept = state.method_state._replace(statistics=statistics)
        return state._replace(method_state=kept)

    return method._replace(
        init=init,
        step=step,
        predict=predict,
        finalize=Finalize(batch_statistics, finish, augmented=True),
    )


def statistics_of(
    model: Any,
    params: PyTree,
    model_state: PyTree,
    images: jax.Array,
    key: jax.Array | None = None,
) -> PyTree:
    """BatchNorm's mean and variance of one batch, as its running statistics have them.

    Args:
      model: The model, with `apply` and `batchnorm_momentum` m: its new running
        statistics are m old + (1 - m) batch.
      params: The model's weights.
      model_state: Statistics of the same structure; their values are not used.
      images: (B, H, W, C), normalised.
      key: The PRNG key of the masks if the model has dropout, since training statistics
        are taken under masks too.
    """
    if not jax.tree.leaves(model_state):
        return model_state
    if not hasattr(model, "batchnorm_momentum"):
        raise TypeError(
            "to compute BatchNorm statistics anew, the model must say how its running "
            "ones move: give it an attribute batchnorm_momentum (m in m old + (1 - m) "
            f"batch); {type(model).__name__} has none."
        )
    nothing = jax.tree.map(jnp.zeros_like, model_state)
    dropped = {}
    if rate_of(model) and key is not None:
        dropped["keys"] = example_keys(key, len(images))
    _, moved = model.apply(params, nothing, images, train=True, **dropped)
    return jax.tree.map(lambda x: x / (1 - model.batchnorm_momentum), moved)


def moments_of(state: Any) -> Any:
    """The training state of the mean weights, in the dtypes of the weights.

    With statistics of their own if these are known.
    """
    kept = state.method_state
    if not int(kept.number):
        return state._replace(method_state=None)
    model_state = state.model_state
    if kept.statistics is not None:
        model_state = jax.tree.map(lambda x: x[0], kept.statistics)
    mean = jax.tree.map(lambda x, now: x.astype(now.dtype), kept.mean, state.params)
    return state._replace(params=mean, model_state=model_state, method_state=None)


def _enter(kept: Moments, params: PyTree, due: jax.Array) -> Moments:
    """Adds a weight vector by Welford's updates, in which nothing cancels."""
    share = 1 / (kept.number + 1)

    def moved(old, by):
        # Not by 0 where nothing is due: 0 times NaN is NaN.
        return jnp.where(due, old + share.astype(old.dtype) * by, old)

    mean = jax.tree.map(lambda m, x: moved(m, x - m), kept.mean, params)
    variance, deviations = kept.variance, kept.deviations
    if deviations is not None:
        variance = jax.tree.map(
            lambda v, x, old, new: moved(v, (x - old) * (x - new) - v),
            variance,
            params,
            kept.mean,
            mean,
        )
        rank = jax.tree.leaves(deviations)[0].shape[0]
        # From the mean that the weights are part of, as in the authors' code.
        latest = jax.tree.map(jnp.subtract, params, mean)
        deviations = put(deviations, latest, kept.number % rank, due)
    return Moments(mean, variance, deviations, kept.number + due)


def _sample(kept: Moments, key: jax.Array, scale: jax.Array) -> PyTree:
    """A draw from the Gaussian; its mean if `scale` is 0."""
    diagonal_key, low_rank_key = jax.random.split(key)
    leaves, structure = jax.tree.flatten(kept.mean)
    keys = jax.random.split(diagonal_key, len(leaves))
    rank = jax.tree.leaves(kept.deviations)[0].shape[0]
    z = jax.random.normal(low_rank_key, (rank,))  # rows of no member are 0
    columns = jnp.maximum(jnp.minimum(kept.number, rank) - 1, 1)
    drawn = []
    for mean, variance, deviation, leaf_key in zip(
        leaves,
        jax.tree.leaves(kept.variance),
        jax.tree.leaves(kept.deviations),
        keys,
        strict=True,
    ):
        noise = jax.random.normal(leaf_key, mean.shape, mean.dtype)
        diagonal = jnp.sqrt(jnp.maximum(variance, 0.0) / 2) * noise
        low_rank = jnp.tensordot(z.astype(mean.dtype), deviation, 1)
        low_rank = low_rank / jnp.sqrt(2.0 * columns).astype(mean.dtype)
        drawn.append(mean + scale.astype(mean.dtype) * (diagonal + low_rank))
    return jax.tree.unflatten(structure, drawn)
