r"""Dynamic sparse training: networks that are sparse from the first step to the last.

A random mask keeps a share of the weights, a larger share in small layers
(Erdos-Renyi-Kernel). At given steps each layer drops its smallest weights and grows as
many elsewhere: where the gradient of the loss is largest (RigL), or at random (SET). A
sparse network never has more weights than it ends with. :func:`dynamic` does all of
this as an Optax transformation. Its state holds the masks, so checkpoints hold them
too.

References: Liu et al., `Deep Ensembling with No Overhead for either Training or Testing
<https://arxiv.org/abs/2106.14568>`_, ICLR 2022, and their code, FreeTickets;
Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, ICML 2020;
Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive Sparse
Connectivity <https://arxiv.org/abs/1707.04780>`_, 2018.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.core import shards, tree
from otmdr_jax.core.checks import check_number, check_word
from otmdr_jax.core.keys import one_key
from otmdr_jax.core.transform import keep

PyTree = Any

GROWTHS = ("gradient", "random")
# The drop rate at the end of the released code's cosine (sparselearning/core.py).
LOWEST_RATE = 0.005


class Sparse(NamedTuple):
    """The state of :func:`dynamic`.

    Attributes:
      inner: The optimizer's state; zero wherever there is no weight.
      masks: A mask for each array of the parameters, True where there is a weight; a
        scalar True for dense arrays.
      step: The number of steps taken.
      key: The typed PRNG key of random masks.
    """

    inner: PyTree
    masks: PyTree
    step: jax.Array
    key: jax.Array


def erk(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    r"""The density of each layer by the rule of the Erdos-Renyi-Kernel.

    .. math:: d_l = \min\left(1, \epsilon \, \frac{\sum_i n_{l,i}}{\prod_i n_{l,i}}
        \right), \qquad \sum_l d_l N_l = d \sum_l N_l

    The :math:`n_{l,i}` are the sides of layer l's kernel, inputs and outputs included.

    Args:
      shapes: The shapes of the kernels.
      density: d, the share of all weights to keep, in (0, 1).

    Returns:
      The density of each, in (0, 1].

    Example:
      >>> [round(d, 3) for d in erk([(3, 3, 16, 16), (64, 10)], 0.2)]
      [0.087, 0.608]

    Reference: Evci et al., 2020, section 3; Mocanu et al., 2018, for dense layers.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / sum(raw[i] * sizes[i] for i in rest) if rest else 0.0
        full = {i for i in rest if epsilon * raw[i] > 1}
        if not full:
            break
        # They take less than their share now: epsilon grows, and they stay above 1.
        dense |= full
    return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]


def counts(params: PyTree, density: float) -> PyTree:
    """The number of weights that each array keeps; biases and norms keep all.

    Args:
      params: The parameters, or their shapes; arrays of two and more axes are kernels.
      density: The density of all kernels together.

    Returns:
      A pytree of integers, each at least 1.

    Raises:
      ValueError: The density is not in (0, 1), or there is no kernel.
    """
    if not 0 < density < 1:
        raise ValueError(f"density must be in (0, 1), got {density!r}.")
    leaves, structure = jax.tree.flatten(params)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    kernels = [i for i, shape in enumerate(shapes) if len(shape) > 1]
    if not kernels:
        raise ValueError("sparse training needs kernels: arrays of two and more axes.")
    kept = [math.prod(shape) for shape in shapes]
    densities = erk([shapes[i] for i in kernels], density)
    for i, share in zip(kernels, densities, strict=True):
        kept[i] = max(round(share * kept[i]), 1)
    return jax.tree.unflatten(structure, kept)


def draw_masks(key: jax.Array, params: PyTree, density: float) -> PyTree:
    """Random masks with exactly as many weights as :func:`counts` says.

    Args:
      key: A PRNG key.
      params: The parameters, or their shapes.
      density: The density of all kernels together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((40, 30)), "bias": jnp.zeros(30)}
      >>> masks = draw_masks(jax.random.key(0), params, 0.1)
      >>> int(masks["kernel"].sum()), masks["bias"].shape
      (120, ())
    """
    leaves, structure = jax.tree.flatten(params)
    kept = jax.tree.leaves(counts(params, density))
    masks = []
    for leaf, number, own in zip(
        leaves, kept, jax.random.split(key, len(leaves)), strict=True
    ):
        shape = jnp.shape(leaf)
        if number == math.prod(shape):
            masks.append(jnp.ones((), bool))
        else:
            masks.append(_smallest(_uniform(own, leaf), number))
    return jax.tree.unflatten(structure, masks)


def apply(masks: PyTree, values: PyTree) -> PyTree:
    """Values where the masks are True, zero elsewhere."""
    return jax.tree.map(
        lambda mask, x: jnp.where(mask, x, jnp.zeros_like(x)), masks, values
    )


def renew(
    masks: PyTree,
    weights: PyTree,
    grads: PyTree,
    rate: jax.typing.ArrayLike,
    key: jax.Array,
    growth: str = "gradient",
) -> tuple[PyTree, PyTree]:
    """Drops the smallest weights of each layer and grows as many elsewhere.

    Args:
      masks: Masks from :func:`draw_masks`; dense arrays are left alone.
      weights: The parameters.
      grads: The gradient with respect to all of them, masked ones included.
      rate: The share of a layer's weights to drop; their number is rounded up. May be
        traced.
      key: The PRNG key of random growth.
      growth: The place where weights grow, "gradient" or "random".

    Returns:
      (kept, masks): the masks of the weights that stayed, and the new masks with as
      many weights as before. Dropped weights may grow again, from zero.
    """
    leaves, structure = jax.tree.flatten(masks)
    keys = jax.random.split(key, len(leaves))
    pairs = []
    for mask, weight, grad, own in zip(
        leaves, jax.tree.leaves(weights), jax.tree.leaves(grads), keys, strict=True
    ):
        if not mask.ndim:
            pairs.append((mask, mask))
            continue
        # Whole numbers in decimals stay whole: .3 * 100 is just above 30 in float32.
        # A schedule's rate may be anything; NaN drops nothing.
        there = jnp.sum(mask)
        number = jnp.ceil(rate * (1 - 1e-6) * there)
        number = jnp.clip(jnp.nan_to_num(number), 0, there).astype(jnp.int32)
        size = jnp.abs(weight).astype(jnp.float32)
        kept = mask & ~_smallest(jnp.where(mask, size, jnp.inf), number)
        if growth == "random":
            score = _uniform(own, mask)
        else:
            score = jnp.abs(grad).astype(jnp.float32)
        grown = _smallest(jnp.where(kept, jnp.inf, -score), number)
        pairs.append((kept, kept | grown))
    both: Any = zip(*pairs, strict=True)
    kept, new = (jax.tree.unflatten(structure, part) for part in both)
    return kept, new


def dynamic(
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    density: float,
    rate: Callable[[jax.Array], jax.Array] | float,
    steps: Sequence[int],
    growth: str = "gradient",
    escapes: Sequence[int] = (),
    escape_rate: float = 0.8,
) -> optax.GradientTransformationExtraArgs:
    """Sparse training as an Optax transformation.

    It takes the gradient with respect to all weights and passes it to the optimizer
    masked. Masked weights stay exactly zero, whatever momentum and decay do, if they
    start at zero: start from `apply(state.masks, params)`. Weights that grow start from
    zero with a momentum of zero, as in RigL; the released code goes on with the
    momentum of masked weights. A gradient that is not finite moves nothing and is not
    counted as a step: see :mod:`otmdr_jax.core.transform`.

    `ensemble.per_member` starts all members with the same masks, because `key` is one.
    Give each its own after `init`, from M keys: `state = state._replace(masks=jax.vmap(
    redraw)(ensemble.member_keys(key, M), state.masks))`.

    Args:
      optimizer: The transformation that turns the masked gradient into an update. What
        its state keeps of the parameters has their structure, as of all optimizers of
        Optax but `sm3`.
      key: The PRNG key of the first masks and of random growth.
      density: The share of all kernels' weights to keep.
      rate: The share that an update of the masks drops: a number in [0, 1], or a
        schedule of the step.
      steps: The numbers of steps after which masks are updated.
      growth: The place where weights grow, "gradient" or "random".
      escapes: Further numbers of steps, after which `escape_rate` is dropped.
      escape_rate: EDST's larger share, which makes a ticket that differs from the last.

    Returns:
      A transformation whose state is a :class:`Sparse`; `update` needs `params`.

    Raises:
      ValueError: The growth is unknown, the density is not in (0, 1), or a rate is not
        in [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = dynamic(optax.sgd(0.1, 0.9), jax.random.key(0), density=0.1, rate=0.5,
      ...              steps=(1, 2))
      >>> params = {"kernel": jnp.ones((20, 10))}
      >>> state = tx.init(params)
      >>> params = apply(state.masks, params)
      >>> updates, state = tx.update(params, state, params)
      >>> int((optax.apply_updates(params, updates)["kernel"] != 0).sum())
      10
      >>> int(state.masks["kernel"].sum())
      20
    """
    check_word("growth", growth, GROWTHS)
    for name, share in (("rate", rate), ("escape_rate", escape_rate)):
        if not callable(share):
            check_number(name, share)
            if not isinstance(share, jax.core.Tracer) and float(share) > 1:
                raise ValueError(f"{name} is a share, 0 to 1, got {share!r}.")
    optimizer = optax.with_extra_args_support(optimizer)
    key = one_key(key)

    def init(params):
        mask_key, own = jax.random.split(key)
        masks = draw_masks(mask_key, params, density)
        inner = optimizer.init(params)
        return Sparse(inner, masks, jnp.zeros((), jnp.int32), own)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("sparse training needs params in update: pass them.")
        grads, step = updates, state.step + 1
        masked = apply(state.masks, grads)
        updates, inner = optimizer.update(masked, state.inner, params, **extra)
        finite = tree.all_finite((grads, updates))
        escape = _is_among(step, escapes)
        due = escape | _is_among(step, steps)
        share = rate(step) if callable(rate) else rate
        share = jnp.where(escape, escape_rate, share)
        kept, masks = shards.cond(
            due,
            lambda: renew(
                state.masks,
                optax.apply_updates(params, updates),
                grads,
                share,
                jax.random.fold_in(state.key, step),
                growth,
            ),
            lambda: (state.masks, state.masks),
            params,
        )
        # p + (-p) is exactly 0, and what grows starts from there: in the dtype of p,
        # where updates are narrower.
        updates = jax.tree.map(
            lambda mask, u, p: jnp.where(mask, u, -p),
            kept,
            updates,
            params,
        )
        inner = optax.tree_map_params(
            optimizer,
            _forgotten,
            inner,
            kept,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        new = keep(finite, Sparse(inner, masks, step, state.key), state)
        return keep(finite, updates, optax.tree.zeros_like(updates)), new

    return optax.GradientTransformationExtraArgs(init, update)


def _forgotten(values, mask):
    """What an optimizer keeps of an array, 0 where a weight has gone.

    What has another shape is of no single weight (rows and columns of Adafactor).
    """
    if isinstance(values, optax.MaskedNode) or jnp.shape(values) != mask.shape:
        return values
    return jnp.where(mask, values, jnp.zeros_like(values))


def masked_from_the_start(method: Any) -> Any:
    """Makes a method that :func:`dynamic` trains start from masked weights.

    The masks come from the method's key, so members of an ensemble differ.
    """

    def init(key, example_images):
        state = method.init(key, example_images)
        # A key that differs from those that `init` of methods splits off.
        own_key, growth_key = jax.random.split(jax.random.fold_in(key, 3))
        masks = redraw(own_key, state.opt_state.masks)
        opt_state = state.opt_state._replace(masks=masks, key=growth_key)
        return state._replace(params=apply(masks, state.params), opt_state=opt_state)

    return method._replace(init=init)


def redraw(key: jax.Array, masks: PyTree) -> PyTree:
    """Random masks with as many weights as these."""
    leaves, structure = jax.tree.flatten(masks)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            jax.random.permutation(own, mask.ravel()).reshape(mask.shape)
            if mask.ndim
            else mask
            for mask, own in zip(leaves, keys, strict=True)
        ],
    )


def cosine(rate: float, total: int) -> Callable[[jax.Array], jax.Array]:
    """The drop rate that falls from `rate` to 0.005 along half a cosine.

    Example:
      >>> [round(float(cosine(0.5, 100)(step)), 4) for step in (0, 50, 100)]
      [0.5, 0.2525, 0.005]
    """

    def at(step):
        along = jnp.minimum(step / total, 1.0)
        return LOWEST_RATE + (rate - LOWEST_RATE) * (1 + jnp.cos(jnp.pi * along)) / 2

    return at


def update_steps(every: int, ends: Sequence[int]) -> tuple[int, ...]:
    """The steps after which masks are updated: each `every`, but not before an end.

    That gives a network that is about to be kept `every` steps to recover from an
    update. The authors keep the best epoch on held-out images instead.

    Args:
      every: The number of steps between updates.
      ends: The steps after which networks are kept, ascending.

    Example:
      >>> update_steps(10, ends=(45, 60))
      (10, 20, 30, 50)
    """
    return tuple(
        step
        for step in range(every, ends[-1], every)
        if min(end for end in ends if end >= step) - step >= every
    )


def _uniform(key, like):
    return shards.draw(jax.random.uniform, key, like, dtype=jnp.result_type(float))


@jax.jit
def _smallest(scores: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    """True for exactly `number` entries, the smallest; among ties the first.

    A stable sort would give the same. Bisection needs only sums over all entries, so a
    sharded array stays where it is. NaN counts as the largest.
    """
    value = _ordered_bits(scores)
    place = jnp.zeros_like(value)
    stride = 1
    for axis in reversed(range(value.ndim)):
        along = jax.lax.broadcasted_iota(value.dtype, value.shape, axis)
        place, stride = place + along * stride, stride * value.shape[axis]
    bound = _largest(value, number, True)
    below = value < bound
    ties = value == bound
    first = place < _largest(place, number - jnp.sum(below, dtype=jnp.int32), ties)
    return below | (ties & first)


def _ordered_bits(x):
    """Unsigned integers in the order of floating numbers."""
    width = 8 * x.dtype.itemsize
    x = jnp.where(jnp.isnan(x), jnp.nan, jnp.where(x == 0, 0.0, x))
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    sign = jnp.ones((), bits.dtype) << (width - 1)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _largest(values, number, among):
    """The largest bound with at most `number` of the unsigned integers below it."""
    width = 8 * values.dtype.itemsize

    def set_bit(i, bound):
        trial = bound | jnp.ones((), values.dtype) << (width - 1 - i)
        fit = jnp.sum(among & (values < trial), dtype=jnp.int32) <= number
        return jnp.where(fit, trial, bound)

    return jax.lax.fori_loop(0, width, set_bit, jnp.zeros((), values.dtype))


def _is_among(step, steps):
    if not len(steps):
        return jnp.zeros((), bool)
    return jnp.any(step == jnp.asarray(tuple(steps), step.dtype))
