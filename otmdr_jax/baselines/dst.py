r"""Dynamic sparse training: networks that are sparse from the first step to the last.

A random mask keeps a share of the weights, more of them in small layers
(Erdos-Renyi-Kernel). Now and then each layer drops the smallest of its weights and
grows as many elsewhere: where the gradient of the loss with respect to all weights is
largest (RigL), or at random (SET). A sparse network never has more weights than it
ends with. :func:`dynamic` is all of this as an Optax transformation; its state holds
the masks, so that checkpoints do.

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

from otmdr_jax.core import shards
from otmdr_jax.core.keys import one_key

PyTree = Any

GROWTHS = ("gradient", "random")
# Where the released code's cosine of the drop rate ends (sparselearning/core.py).
LOWEST_RATE = 0.005


class Sparse(NamedTuple):
    """The state of :func:`dynamic`.

    Attributes:
      inner: That of the optimizer; zero wherever no weights are.
      masks: True where there is a weight, for each array of the parameters; a scalar
        True for those that are dense.
      step: Steps taken.
      key: Where random masks come from, typed.
    """

    inner: PyTree
    masks: PyTree
    step: jax.Array
    key: jax.Array


def erk(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    r"""Erdos-Renyi-Kernel: how dense each layer is, so that all together are `density`.

    .. math:: d_l = \min\left(1, \epsilon \, \frac{\sum_i n_{l,i}}{\prod_i n_{l,i}}
        \right), \qquad \sum_l d_l N_l = d \sum_l N_l

    with the sides :math:`n_{l,i}` of layer l's kernel, inputs and outputs among them.

    Args:
      shapes: Of the kernels.
      density: d, the share of all weights that are kept, in (0, 1).

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
    """How many weights each array keeps: all of biases, norms and dense layers.

    Args:
      params: Arrays or their shapes; those of two and more axes are kernels.
      density: Of all kernels together.

    Returns:
      A pytree of integers; at least 1.

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
      density: Of all kernels together.

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
      masks: As :func:`draw_masks` gives them; dense arrays are left alone.
      weights: The parameters.
      grads: The gradient with respect to all of them, masked ones included.
      rate: Share of a layer's weights to drop, rounded up; may be traced.
      key: For random growth.
      growth: "gradient" or "random".

    Returns:
      (kept, masks): the masks of the weights that stayed, and the new masks, with as
      many weights as before. What was dropped may grow again, from zero.
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
        number = jnp.ceil(rate * jnp.sum(mask)).astype(jnp.int32)
        size = jnp.abs(weight.astype(jnp.float32))
        kept = mask & ~_smallest(jnp.where(mask, size, jnp.inf), number)
        if growth == "random":
            score = _uniform(own, mask)
        else:
            score = jnp.abs(grad.astype(jnp.float32))
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

    The gradient that comes in is that of all weights; the optimizer sees it masked.
    Weights that are not there are exactly zero after each update, whatever momentum and
    decay do, if they were before: start from `apply(state.masks, params)`. What grows
    starts from zero, with a momentum of zero, as in RigL; in the released code momentum
    goes on where there is no weight.

    Args:
      optimizer: What turns the masked gradient into an update.
      key: PRNG key of the first masks and of random growth.
      density: The share of all kernels' weights that there are.
      rate: The share that an update drops: a number, or a schedule of the step.
      steps: The numbers of steps taken after which masks are updated.
      growth: "gradient" or "random".
      escapes: Further ones, at which `escape_rate` is dropped.
      escape_rate: EDST's larger share, for a ticket that differs from the last.

    Returns:
      A transformation whose state is a :class:`Sparse`; `update` needs `params`.

    Raises:
      ValueError: An unknown growth, or a density that is not in (0, 1).

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
    if growth not in GROWTHS:
        raise ValueError(f"growth must be one of {', '.join(GROWTHS)}; got {growth!r}.")
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
        # p + (-p) is exactly 0, and what grows starts from there.
        updates = jax.tree.map(
            lambda mask, u, p: jnp.where(mask, u, -jnp.asarray(p, u.dtype)),
            kept,
            updates,
            params,
        )
        inner = optax.tree_map_params(
            optimizer,
            lambda x, mask: jnp.where(mask, x, jnp.zeros_like(x)),
            inner,
            kept,
        )
        return updates, Sparse(inner, masks, step, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def masked_from_the_start(method: Any) -> Any:
    """A method trained by :func:`dynamic` whose first weights are masked too.

    Its masks come from the method's key: members of an ensemble differ.
    """

    def init(key, example_images):
        state = method.init(key, example_images)
        # None of the keys that `init` of methods split off: see methods.create.
        own_key, growth_key = jax.random.split(jax.random.fold_in(key, 3))
        masks = redraw(own_key, state.opt_state.masks)
        opt_state = state.opt_state._replace(masks=masks, key=growth_key)
        return state._replace(params=apply(masks, state.params), opt_state=opt_state)

    return method._replace(init=init)


def redraw(key: jax.Array, masks: PyTree) -> PyTree:
    """Masks of as many weights, anywhere."""
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

    A network that is about to be kept has `every` steps to recover from an update. The
    authors keep the best epoch on held-out images instead.

    Args:
      every: Steps between updates.
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
    """True for exactly so many entries, the smallest ones; of ties the first.

    It is what a stable sort would give, found by bisection: sums over all entries are
    all that it takes, so that a sharded array stays where it is. NaN is the largest.
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
    """The largest bound that at most `number` of some unsigned integers are below."""
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
