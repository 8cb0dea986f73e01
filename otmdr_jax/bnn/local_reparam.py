r"""Weight noise that differs between examples: local reparameterisation and Flipout.

If a whole batch shares one sample of the weights, its examples share their noise, which
does not average out. Here each example has its own noise, in any loss function: the
program that JAX traces is read, and where a dense layer or a convolution meets a
stochastic kernel W ~ N(M, S^2), its output is drawn instead,

.. math:: y = x M + \sqrt{x^2 S^2} \odot \zeta, \quad \zeta \sim \mathcal N(0, I)
    \qquad\text{(local)}
.. math:: y = x M + ((x \odot s)(S \kappa)) \odot r, \quad s, r \in \{-1, 1\}
    \qquad\text{(flipout)}

Each takes two products in place of one. What an example sees must be one network, so
that a kernel has noise of each example's own only where the program uses it once, in a
product whose input has the examples on its first axis. All others (kernels that are
tied, that an unrolled or a siamese network uses again, that stand in a loop or are
indexed, depthwise kernels on CPUs, biases) are sampled as weights, once for all
examples of a micro-batch on a device. A warning names those of them that a product
uses; if there is no product at all, there is an error.

A dense layer may have several rows of an example, as the tokens of a sentence, which
one kernel makes depend on each other: their noise is Flipout's in either case. In a
convolution "local" draws each position on its own, as is usual.

OT-MDR can use neither: its ascent steps move *one* weight vector mu + sigma kappa by
steps of fixed length. Here there is no weight vector, only outputs.

References: Kingma et al., `Variational Dropout and the Local Reparameterization Trick
<https://arxiv.org/abs/1506.02557>`_, NIPS 2015; Wen et al., `Flipout
<https://arxiv.org/abs/1803.04386>`_, ICLR 2018.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from otmdr_jax.bnn import posterior
from otmdr_jax.bnn.posterior import MeanField
from otmdr_jax.core import rows, shards

PyTree = Any

# Primitives that a kernel may pass: linear in one operand, the same for every entry.
_TRANSPARENT = set(
    "convert_element_type copy copy_p pcast pvary reshape reshard sharding_constraint "
    "squeeze transpose".split()
)
_CALLS = ("jit", "pjit", "closed_call", "core_call")
_REMATS = ("remat", "remat2", "checkpoint")


def call(
    function: Callable[..., Any],
    q: MeanField,
    estimator: str,
    key: jax.Array,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`function(params, *args, **kwargs)` at params ~ q, with noise for each example.

    Args:
      function: A function of the model's parameters, which stays differentiable.
      q: The posterior.
      estimator: "local" or "flipout".
      key: A PRNG key.
      *args: Further arguments of `function`. The first is the batch, a pytree of arrays
        with a leading axis of the examples. An input has the examples on its first axis
        if a batch of twice the size, which is traced alone, makes that twice as long;
        if the function takes no other size, if the axis is as long as the batch.
      **kwargs: Keyword arguments of `function`.

    Returns:
      The result of `function`.

    Raises:
      ValueError: The number of examples is not known, or no product uses a stochastic
        kernel.

    Warns:
      UserWarning: The kernels of some products are drawn once for all examples.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import bnn
      >>> from otmdr_jax.bnn import local_reparam
      >>> q = bnn.init(jnp.zeros((3, 2)), sigma=1.0)
      >>> x = jnp.ones((100, 3))
      >>> y = local_reparam.call(lambda w, x: x @ w, q, "local", jax.random.key(0), x)
      >>> bool(jnp.all(y[0] == y[1]))  # equal examples, noise of their own
      False
    """
    leaves, treedef = jax.tree.flatten(posterior.mean(q))

    # Flags and strings are not traced, since the program may depend on them.
    others, others_treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(others) if hasattr(x, "dtype")}

    def flat(leaves, arrays):
        own = [arrays.get(i, x) for i, x in enumerate(others)]
        args, kwargs = jax.tree.unflatten(others_treedef, own)
        return function(jax.tree.unflatten(treedef, leaves), *args, **kwargs)

    program, shape = jax.make_jaxpr(flat, return_shape=True)(leaves, arrays)
    examples = _count_examples(args)
    noisy = _Noisy(estimator, key, examples)
    inputs: list[Any] = list(leaves)
    stds, kappas = posterior.std(q), posterior.noise(q, noisy.next_key())
    parts = [iter(jax.tree.leaves(part)) for part in (q.mean, stds, kappas)]
    for i, stochastic in enumerate(jax.tree.leaves(posterior.chosen(q))):
        if stochastic:
            mean, std, kappa = map(next, parts)
            inputs[i] = _Gaussian(i, mean, std, std * kappa)
    inputs += jax.tree.leaves(arrays)

    uses, of_batch = _Uses(), len(jax.tree.leaves(args[:1]))

    def larger(leaves, arrays):
        twice = {i: rows.repeated(x, 2) for i, x in arrays.items() if i < of_batch}
        return flat(leaves, arrays | twice)

    try:  # whatever it is that a function of one size raises
        traced, examples = jax.make_jaxpr(larger)(leaves, arrays), 2 * examples
    except Exception:
        traced = program
    jax.eval_shape(lambda: _arrays(_run(traced, inputs, uses), uses))
    if not uses.kernels:
        raise ValueError(
            f"estimator={estimator!r} found no dense layer or convolution that uses a "
            "stochastic kernel directly, so no example would have its own noise. Use "
            "estimator='weights'."
        )
    noisy.own = {
        leaf
        for leaf, length in uses.kernels.items()
        if uses.count[leaf] == 1 and length == examples
    }
    found = _arrays(_run(program, inputs, noisy), noisy)
    _warn_of_shared(posterior.mean(q), uses.kernels.keys() - noisy.own, noisy)
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _count_examples(args):
    sizes = {x.shape[0] for x in jax.tree.leaves(args[:1]) if jnp.ndim(x)}
    if len(sizes) != 1:
        raise ValueError(
            "the first argument after the parameters must be the batch, arrays whose "
            "leading axis is that of the examples, which have noise of their own; got "
            f"leading axes of {sorted(sizes) or 'nothing'}. Use estimator='weights'."
        )
    return sizes.pop()


def _warn_of_shared(params, shared, noisy):
    """Names the kernels whose noise examples share."""
    names = [
        jax.tree_util.keystr(path) or "the kernel"
        for i, (path, _) in enumerate(jax.tree.leaves_with_path(params))
        if i in shared
    ]
    if names:
        listed = ", ".join(names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"estimator={noisy.estimator!r} draws {listed}{more} once for all "
            "examples, as 'weights' does: a kernel has noise of each example's own "
            "where it is used once, in a dense layer or a convolution whose input has "
            f"the {noisy.examples} examples of the batch on its first axis. A penalty "
            "in the loss is a use too: the prior is the place for it.",
            stacklevel=3,
        )


class _Gaussian:
    """A stochastic array: its mean, its standard deviation and one draw minus the mean.

    The draw is used wherever examples cannot have their own noise, so that all such
    places see the same weights. `leaf` is the number of the parameter that it is.
    """

    def __init__(self, leaf, mean, std, deviation):
        self.leaf, self.mean, self.std, self.deviation = leaf, mean, std, deviation

    def map(self, function):
        parts = map(function, (self.mean, self.std, self.deviation))
        return _Gaussian(self.leaf, *parts)


class _Layer(NamedTuple):
    """How a product x W tells examples and features apart.

    Attributes:
      of_input: The axes of x that have signs: of the examples, then the summed ones.
      of_output: Those of the output: of the examples, then of the features.
      positions: The other axes of x, for which one kernel serves.
      is_dense: Whether it is a dense layer.
    """

    of_input: tuple[int, ...]
    of_output: tuple[int, ...]
    positions: tuple[int, ...]
    is_dense: bool


class _Uses:
    """Counts the places where the program uses each parameter."""

    def __init__(self):
        self.count: dict[int, int] = {}
        # Of those that are a product's kernel: the length of its input's first axis.
        self.kernels: dict[int, int] = {}

    def array(self, value):
        self.count[value.leaf] = self.count.get(value.leaf, 0) + 1
        return value.mean

    def product(self, multiply, x, kernel, layer):
        self.kernels[kernel.leaf] = x.shape[layer.of_input[0]]
        return multiply(x, self.array(kernel))


class _Noisy:
    """Draws the noise of outputs, each with its own key."""

    def __init__(self, estimator, key, examples):
        self.estimator, self._key, self._count = estimator, key, 0
        self.examples = examples
        self.own: set[int] = set()  # the parameters that have noise for each example

    def next_key(self):
        self._count += 1
        return jax.random.fold_in(self._key, self._count)

    def array(self, value):
        return value.mean + value.deviation

    def product(self, multiply, x, kernel, layer):
        """The output of a layer, drawn.

        Args:
          multiply: (x, kernel) -> output, linear in both.
          x: The layer's input.
          kernel: The layer's kernel, a _Gaussian.
          layer: Its _Layer.
        """
        if kernel.leaf not in self.own:
            return multiply(x, self.array(kernel))
        mean = multiply(x, kernel.mean)
        one_row = all(x.shape[i] == 1 for i in layer.positions)
        if self.estimator == "local" and (one_row or not layer.is_dense):
            zeta = shards.draw(jax.random.normal, self.next_key(), mean)
            return mean + _deviation(multiply, x, kernel.std) * zeta
        s = self._signs(x, layer.of_input)
        r = self._signs(mean, layer.of_output)
        return mean + multiply(x * s, kernel.deviation) * r

    def _signs(self, like, axes):
        shape = [n if i in axes else 1 for i, n in enumerate(like.shape)]
        return shards.draw(jax.random.rademacher, self.next_key(), like, shape=shape)


def _deviation(multiply, x, std):
    """The standard deviation of an output, sqrt(x^2 S^2).

    Squares of float16 overflow above 256 and vanish below 1e-4. There both factors are
    divided by their largest number first.
    """
    unit = jnp.ones((), x.dtype)
    if x.dtype == jnp.float16:
        largest = [jnp.max(jnp.abs(jax.lax.stop_gradient(v))) for v in (x, std)]
        a, b = (jnp.where(v > 0, v, 1).astype(x.dtype) for v in largest)
        x, std, unit = x / a, std / b, a * b
    variance = multiply(jnp.square(x), jnp.square(std))
    # sqrt has no gradient at 0, which occurs if all inputs of an output are 0.
    some = variance > 0
    return unit * jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1)), 0)


def _run(program: ClosedJaxpr, inputs, noisy):
    """Evaluates a program on arrays and Gaussians."""
    env: dict[Any, Any] = {}

    def read(var):
        return var.val if isinstance(var, Literal) else env[var]

    env.update(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, inputs, strict=True))
    for eqn in program.jaxpr.eqns:
        found = _evaluate(eqn, [read(v) for v in eqn.invars], noisy)
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in program.jaxpr.outvars]


def _evaluate(eqn, values, noisy):
    name, stochastic = eqn.primitive.name, [isinstance(v, _Gaussian) for v in values]
    if not any(stochastic):
        return _bind(eqn, values)
    if name in _CALLS:
        return _run(eqn.params["jaxpr"], values, noisy)
    if name in _REMATS:
        return _rematerialised(eqn, values, noisy)
    alone = stochastic[0] and sum(stochastic) == 1
    if alone and (name in _TRANSPARENT and len(values) == 1 or _scales_gradient(eqn)):
        return [values[0].map(lambda x: _bind(eqn, [x, *values[1:]])[0])]
    if name in ("mul", "div") and sum(stochastic) == 1:
        place = stochastic.index(True)
        factor = values[1 - place]
        if not jnp.ndim(factor) and (name == "mul" or place == 0):

            def scaled(x):
                return _bind(eqn, [x, factor] if place == 0 else [factor, x])[0]

            return [values[place].map(scaled)]
    if name in _LAYERS and sum(stochastic) == 1:
        place = stochastic.index(True)
        layer = _LAYERS[name](eqn, place)
        if layer is not None:

            def multiply(x, kernel):
                operands = [kernel, x] if place == 0 else [x, kernel]
                return _bind(eqn, operands)[0]

            return [noisy.product(multiply, values[1 - place], values[place], layer)]
    return _bind(eqn, _arrays(values, noisy))


def _scales_gradient(eqn):
    """Whether it is the identity by which `experiments.precision` scales gradients.

    Another function with a gradient of its own, as a straight-through estimator, may
    look at the weight, and must not see its mean or its standard deviation alone.
    """
    if eqn.primitive.name != "custom_vjp_call" or len(eqn.invars) != 2:
        return False
    body = eqn.params["call_jaxpr"].jaxpr
    is_identity = not body.eqns and body.outvars == body.invars[:1]
    return is_identity and body.debug_info.func_name == "_scale_gradient"


def _arrays(values, noisy):
    return [noisy.array(v) if isinstance(v, _Gaussian) else v for v in values]


def _bind(eqn, values):
    params = eqn.primitive.get_bind_params(eqn.params)
    # In some versions of JAX, functions are passed apart from the parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*functions, *values, **params)
    return found if eqn.primitive.multiple_results else [found]


def _rematerialised(eqn, values, noisy):
    """Keeps a block that the backward pass computes again as one block."""
    body = ClosedJaxpr(eqn.params["jaxpr"], ())
    # Of what comes out: a block may hand its parameters on.
    leaves: list[int | None] = []

    def block(parts):
        inputs = [
            _Gaussian(v.leaf, *own) if isinstance(v, _Gaussian) else own
            for v, own in zip(values, parts, strict=True)
        ]
        found = _run(body, inputs, noisy)
        leaves[:] = [getattr(v, "leaf", None) for v in found]
        return _parts(found)

    options = {k: eqn.params[k] for k in ("policy", "prevent_cse") if k in eqn.params}
    found = jax.checkpoint(block, **options)(_parts(values))
    return [
        v if leaf is None else _Gaussian(leaf, *v)
        for leaf, v in zip(leaves, found, strict=True)
    ]


def _parts(values):
    """Gaussians as tuples of arrays, for functions of JAX."""
    return [
        (v.mean, v.std, v.deviation) if isinstance(v, _Gaussian) else v for v in values
    ]


def _dense(eqn, place):
    contracted, batch = eqn.params["dimension_numbers"]
    x, out = eqn.invars[1 - place].aval, eqn.outvars[0].aval
    summed = tuple(contracted[1 - place])
    free = [i for i in range(x.ndim) if i not in summed]
    if any(batch) or not free:
        return None
    # The output's axes: the free ones of the left operand, then those of the right.
    first = 0 if place == 1 else out.ndim - len(free)
    of_x = range(first, first + len(free))
    features = [i for i in range(out.ndim) if i not in of_x]
    return _Layer((free[0], *summed), (first, *features), tuple(free[1:]), True)


def _convolution(eqn, place):
    if place != 1 or eqn.params["batch_group_count"] != 1:
        return None
    x, _, out = eqn.params["dimension_numbers"]
    return _Layer(tuple(x[:2]), tuple(out[:2]), tuple(x[2:]), False)


def _zoo_convolution(eqn, place):
    """Of `otmdr_jax.models`: NHWC."""
    return _Layer((0, 3), (0, 3), (1, 2), False) if place == 1 else None


# Primitives that multiply inputs by kernels -> their _Layer, or None for a product that
# is none.
_LAYERS = {
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    "convolve": _zoo_convolution,
}
