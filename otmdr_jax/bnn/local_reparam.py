r"""Weight noise that differs between examples: local reparameterisation and Flipout.

If a whole batch shares one sample of the weights, its examples share their noise, which
does not average out. Here each example has its own noise, in any loss function: the
program that JAX traces is read, and where a dense layer or a convolution meets a
stochastic kernel W ~ N(M, S^2), its output is drawn instead,

.. math:: y = x M + \sqrt{x^2 S^2} \odot \zeta, \quad \zeta \sim \mathcal N(0, I)
    \qquad\text{(local)}
.. math:: y = x M + ((x \odot s)(S \kappa)) \odot r, \quad s, r \in \{-1, 1\}
    \qquad\text{(flipout)}

Each takes two products in place of one. Stochastic leaves in any other place (biases,
depthwise kernels on CPUs, kernels that are indexed, masked or used in a loop) are
sampled as weights, once for all examples of a micro-batch on a device. If no product
can get noise for each example, there is an error.

OT-MDR can use neither: its ascent steps move *one* weight vector mu + sigma kappa by
steps of fixed length. Here there is no weight vector, only outputs.

References: Kingma et al., `Variational Dropout and the Local Reparameterization Trick
<https://arxiv.org/abs/1506.02557>`_, NIPS 2015; Wen et al., `Flipout
<https://arxiv.org/abs/1803.04386>`_, ICLR 2018.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from otmdr_jax.bnn import posterior
from otmdr_jax.bnn.posterior import MeanField
from otmdr_jax.core import shards

PyTree = Any

# sqrt has no gradient at 0, which occurs if all inputs of an output are 0.
_TINY = 1e-20
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
      function: A function of the model's parameters, which stays differentiable. The
        first axis of the input of dense layers and convolutions is that of the
        examples.
      q: The posterior.
      estimator: "local" or "flipout".
      key: A PRNG key.
      *args: Further arguments of `function`.
      **kwargs: Keyword arguments of `function`.

    Returns:
      The result of `function`.

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
    noisy = _Noisy(estimator, key)
    inputs: list[Any] = list(leaves)
    stds, kappas = posterior.std(q), posterior.noise(q, noisy.next_key())
    parts = [iter(jax.tree.leaves(part)) for part in (q.mean, stds, kappas)]
    for i, stochastic in enumerate(jax.tree.leaves(posterior.chosen(q))):
        if stochastic:
            mean, std, kappa = map(next, parts)
            inputs[i] = _Gaussian(mean, std, std * kappa)
    inputs += jax.tree.leaves(arrays)
    found = _run(program, inputs, noisy)
    if not noisy.products:
        raise ValueError(
            f"estimator={estimator!r} found no dense layer or convolution that uses a "
            "stochastic kernel directly, so no example would have its own noise. Use "
            "estimator='weights'."
        )
    return jax.tree.unflatten(jax.tree.structure(shape), map(_value, found))


class _Gaussian:
    """A stochastic array: its mean, its standard deviation and one draw minus the mean.

    The draw is used wherever examples cannot have their own noise, so that all such
    places see the same weights.
    """

    def __init__(self, mean, std, deviation):
        self.mean, self.std, self.deviation = mean, std, deviation

    def map(self, function):
        return _Gaussian(*map(function, (self.mean, self.std, self.deviation)))


class _Noisy:
    """Draws the noise of outputs, each with its own key."""

    def __init__(self, estimator, key):
        self.estimator, self._key, self._count = estimator, key, 0
        self.products = 0  # that had noise of their own

    def next_key(self):
        self._count += 1
        return jax.random.fold_in(self._key, self._count)

    def product(self, multiply, x, kernel, axes):
        """The output of a layer, drawn.

        Args:
          multiply: (x, kernel) -> output, linear in both.
          x: The layer's input.
          kernel: The layer's kernel, a _Gaussian.
          axes: The axes of x and of the output that tell examples and features apart;
            None if examples cannot be told apart.
        """
        mean = multiply(x, kernel.mean)
        self.products += 1
        if self.estimator == "local":
            variance = multiply(jnp.square(x), jnp.square(kernel.std))
            zeta = shards.draw(jax.random.normal, self.next_key(), mean)
            return mean + jnp.sqrt(variance + _TINY) * zeta
        if axes is None:
            return mean + multiply(x, kernel.deviation)
        of_input, of_output = axes
        s = self._signs(x, of_input)
        r = self._signs(mean, of_output)
        return mean + multiply(x * s, kernel.deviation) * r

    def _signs(self, like, axes):
        shape = [n if i in axes else 1 for i, n in enumerate(like.shape)]
        return shards.draw(jax.random.rademacher, self.next_key(), like, shape=shape)


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
    if name in _TRANSPARENT and len(values) == 1:
        return [values[0].map(lambda x: _bind(eqn, [x])[0])]
    if name in ("mul", "div") and sum(stochastic) == 1:
        place = stochastic.index(True)
        factor = values[1 - place]
        if not jnp.ndim(factor) and (name == "mul" or place == 0):

            def scaled(x):
                return _bind(eqn, [x, factor] if place == 0 else [factor, x])[0]

            return [values[place].map(scaled)]
    if name in _LAYERS and sum(stochastic) == 1:
        place = stochastic.index(True)
        axes = _LAYERS[name](eqn, place)
        if axes is not False:

            def multiply(x, kernel):
                operands = [kernel, x] if place == 0 else [x, kernel]
                return _bind(eqn, operands)[0]

            return [noisy.product(multiply, values[1 - place], values[place], axes)]
    return _bind(eqn, [_value(v) for v in values])


def _value(value):
    return value.mean + value.deviation if isinstance(value, _Gaussian) else value


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
    arrays = [
        (v.mean, v.std, v.deviation) if isinstance(v, _Gaussian) else v for v in values
    ]

    def block(arrays):
        inputs = [_Gaussian(*v) if isinstance(v, tuple) else v for v in arrays]
        return [_value(v) for v in _run(body, inputs, noisy)]

    options = {k: eqn.params[k] for k in ("policy", "prevent_cse") if k in eqn.params}
    return jax.checkpoint(block, **options)(arrays)


def _dense_axes(eqn, place):
    """The axes of x and of the output of a product x W that have signs.

    False for a product with batch axes, which is not a layer.
    """
    contracted, batch = eqn.params["dimension_numbers"]
    if any(batch):
        return False
    x, out = eqn.invars[1 - place].aval, eqn.outvars[0].aval
    summed = tuple(contracted[1 - place])
    if not x.ndim or 0 in summed:
        return None  # the first axis is not that of the examples
    # The output's axes: the free ones of the left operand, then those of the right.
    free_of_x = x.ndim - len(summed)
    first = 0 if place == 1 else out.ndim - free_of_x
    of_x = range(first, first + free_of_x)
    features = [i for i in range(out.ndim) if i not in of_x]
    return (0, *summed), (first, *features)


def _convolution_axes(eqn, place):
    if place != 1 or eqn.params["batch_group_count"] != 1:
        return False
    numbers = eqn.params["dimension_numbers"]
    return tuple(numbers.lhs_spec[:2]), tuple(numbers.out_spec[:2])


# Primitives that multiply inputs by kernels -> the axes that have signs in Flipout;
# "convolve" is that of `otmdr_jax.models`, NHWC.
_LAYERS = {
    "dot_general": _dense_axes,
    "conv_general_dilated": _convolution_axes,
    "convolve": lambda eqn, place: False if place != 1 else ((0, 3), (0, 3)),
}
