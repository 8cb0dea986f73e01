"""Networks of one's own: Flax NNX, Flax Linen, Equinox, or two functions.

:func:`adapt` puts each of them behind `init` and `apply`, as the zoo's
:class:`otmdr_jax.models.Model` is. Parameters and state are dicts of arrays with the
path of each as its name, so that checkpoints and exports hold nothing but arrays.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from otmdr_jax.models.dropout import checked_keys

PyTree = Any

# The beginning of the name of a network that cannot be found by it.
GIVEN = "given:"


def adapt(model: Any, num_classes: int | None = None) -> Any:
    """Makes a network of any framework fit for training: `init` and `apply`.

    Args:
      model: One of

        - an NNX module's class, or a function `(rngs) -> module`: called with
          `rngs=nnx.Rngs(...)`. The module is called on a batch of images.
        - a Linen module, or its class;
        - an Equinox module's class, or a function `(key) -> module`, or `(module,
          eqx.nn.State)` as `eqx.nn.make_with_state` gives: called with `key=`. The
          module is called on one image under `jax.vmap(..., axis_name="batch")`, and
          with `key=` or a state where it takes them.
        - a pair of functions `(init, apply)`: `init(key, images) -> params` and
          `apply(params, images) -> outputs`; or with a state, `init(key, images) ->
          (params, state)` and `apply(params, state, images, train=...) -> (outputs,
          state)`;
        - anything with `init` and `apply` as the latter, which is returned as it is.

        Classes and functions that take `num_classes` get it. Modules learn whether
        they train from `module.train()` and `eval()` (NNX), from an argument `train`,
        `training` or `deterministic` of their call (NNX, Linen), or from
        `eqx.nn.inference_mode`.
      num_classes: The number of classes; None where there are none.

    Returns:
      An object with `init(key, images) -> (params, state)` and `apply(params, state,
      images, *, train, keys=None) -> (outputs, state)`; its `dropout` is not 0 where
      training draws random numbers, for which `apply` then needs keys.

    Raises:
      TypeError: It is none of these; an object of NNX or Equinox, whose weights are
        drawn already, is told from its class.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from otmdr_jax import models
      >>> class Net(nnx.Module):
      ...     def __init__(self, num_classes, rngs):
      ...         self.head = nnx.Linear(12, num_classes, rngs=rngs)
      ...     def __call__(self, images):
      ...         return self.head(images.reshape(len(images), -1))
      >>> model = models.adapt(Net, num_classes=5)
      >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
      >>> {name: x.shape for name, x in params["head"].items()}
      {'bias': (5,), 'kernel': (12, 5)}
      >>> logits, state = model.apply(params, state, jnp.ones((4, 2, 2, 3)), train=True)
      >>> logits.shape
      (4, 5)
    """
    for package, word in (("flax.nnx", "rngs"), ("equinox", "key")):
        module = getattr(sys.modules.get(package), "Module", ())
        if isinstance(model, module):
            kind = type(model).__name__
            raise TypeError(
                f"model must be a class or a function ({word}) -> module, got a "
                f"{kind} whose weights are drawn already: the run draws them by its "
                f"seed. Give {kind} itself, or lambda {word}: {kind}(..., "
                f"{word}={word})."
            )
    model = tuple(model) if isinstance(model, list) else model
    try:
        hash(model)
    except TypeError as error:
        raise TypeError(
            f"model must be hashable, since programs are kept by it ({error}): of a "
            "Linen module with a list as a field make it a tuple; an object of yours "
            "needs no __eq__."
        ) from error
    return _adapt(model, num_classes)


@functools.lru_cache(maxsize=32)
def _adapt(model, num_classes):
    # One object for each model, so that what is compiled for it is shared.
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        return Functions(*model)
    if isinstance(model, type) and issubclass(model, linen.Module):
        return Linen(model(**_classes(model, num_classes)))
    if isinstance(model, linen.Module):
        return Linen(model)
    if (
        not isinstance(model, type)
        and hasattr(model, "init")
        and hasattr(model, "apply")
    ):
        return model
    takes = _parameters(model) if callable(model) else {}
    for word, framework in (("rngs", Nnx), ("key", Equinox)):
        if word in takes:
            make = functools.partial(model, **_classes(model, num_classes))
            return framework(make)
    raise TypeError(
        "model must be a class or function that takes rngs (Flax NNX) or key "
        "(Equinox), a Linen module, a pair of functions (init, apply), or an object "
        f"that has both; got {model!r}. Networks of the zoo are named in the options."
    )


def load(name: str) -> Any:
    """The object that "package.module:Name" stands for, of a package on the path.

    Raises:
      ValueError: There is no such module, or no such name in it.
    """
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"model {name!r}: importing {module!r} failed with: {error}. It must be a "
            "module in this folder, or an installed one."
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"model {name!r}: {module!r} has no {path!r}.")
        found = getattr(found, part)
    return found


def name_of(model: Any) -> str:
    """What a run on a model of one's own is recorded by.

    "package.module:Name" where :func:`load` finds it, else "given:Name", which has to
    be given again.
    """
    name = getattr(model, "__qualname__", type(model).__qualname__)
    module = getattr(model, "__module__", "")
    if module and module != "__main__" and name.replace(".", "").isidentifier():
        try:
            if load(f"{module}:{name}") is model:
                return f"{module}:{name}"
        except ValueError:
            pass
    return f"{GIVEN}{name}"


# --- each framework ----------------------------------------------------------------


class Functions:
    """Two functions, with a state or without: see :func:`adapt`."""

    dropout = 0.0

    def __init__(self, init: Callable, apply: Callable):
        self._init, self._apply = init, apply
        positional = [
            p
            for p in inspect.signature(apply).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            and p.default is p.empty
            and p.name not in ("train", "keys")
        ]
        self._stateless = len(positional) < 3
        takes = inspect.signature(apply).parameters
        # **kwargs may hand on both: what they go to says if it takes them.
        any_name = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        self._takes_train = any_name or "train" in takes
        if any_name or "keys" in takes:
            self.dropout = 1.0

    def init(self, key, images):
        """See :func:`adapt`."""
        images = jnp.zeros(images.shape, images.dtype)
        return (
            (self._init(key, images), {})
            if self._stateless
            else self._init(key, images)
        )

    def apply(self, params, state, images, *, train, keys=None):
        """See :func:`adapt`."""
        options = {"train": train} if self._takes_train else {}
        if self.dropout:
            options["keys"] = keys
        if self._stateless:
            return self._apply(params, images, **options), state
        return self._apply(params, state, images, **options)


class Nnx:
    """A Flax NNX module, from a function of random streams."""

    def __init__(self, make: Callable):
        self._make = make
        module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        self._call = _mode_of(module)
        self._graph, *trees = nnx.split(module, nnx.Param, nnx.RngState, ...)
        self._params, self._streams, self._rest = map(nnx.to_pure_dict, trees)
        self.dropout = 1.0 if jax.tree.leaves(self._streams) else 0.0

    def init(self, key, images):
        """See :func:`adapt`."""
        del images  # the module knows its sizes
        module = self._make(rngs=nnx.Rngs(key))
        _, *trees = nnx.split(module, nnx.Param, nnx.RngState, ...)
        params, _, rest = map(nnx.to_pure_dict, trees)
        return _named(params), _named(rest)

    def apply(self, params, state, images, *, train, keys=None):
        """See :func:`adapt`."""
        module = nnx.merge(
            self._graph,
            _unnamed(params, self._params),
            _streams(self._streams, _one(keys, images)),
            _unnamed(state, self._rest),
            copy=True,
        )
        for method in ("train", "eval"):
            if method == ("train" if train else "eval") and hasattr(module, method):
                getattr(module, method)()
        outputs = module(images, **self._call(train))
        if not train:
            return outputs, state
        # What training may add to the graph, as a cache, is not carried on.
        rest: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)[-1]
        moved = _named(nnx.to_pure_dict(rest), self._rest)
        return outputs, jax.lax.stop_gradient(moved)


class Linen:
    """A Flax Linen module."""

    # Whether it draws random numbers is known to its call alone.
    dropout = 1.0

    def __init__(self, module: Any):
        self._module, self._call = module, _mode_of(module)

    def init(self, key, images):
        """See :func:`adapt`."""
        params_key, key = jax.random.split(key)
        streams = {"params": params_key, "dropout": key}
        images = jnp.zeros(images.shape, images.dtype)
        state = dict(self._module.init(streams, images, **self._call(False)))
        params = state.pop("params", {})
        # What a call changes in shape, as what it sows, is no state. The call is one of
        # evaluation: in training BatchNorm may average over an axis that is not here.
        call = functools.partial(self._call_once, train=False, mutable=list(state))
        _, after = jax.eval_shape(call, params, state, images, key)
        return params, _steady(state, after)

    def apply(self, params, state, images, *, train, keys=None):
        """See :func:`adapt`."""
        key = None if keys is None else _one(keys, images)
        mutable = list(state) if train else []
        outputs, after = self._call_once(params, state, images, key, train, mutable)
        if not train:
            return outputs, state
        return outputs, jax.lax.stop_gradient(_those_of(state, after))

    def _call_once(self, params, state, images, key, train, mutable):
        """The outputs, and the collections after a call."""
        outputs, changed = self._module.apply(
            {"params": params, **state},
            images,
            rngs={} if key is None else {"dropout": key},
            mutable=mutable,
            **self._call(train),
        )
        return outputs, {**state, **changed}


class Equinox:
    """An Equinox module, from a function of a key; called on one image at a time.

    Attributes:
      filter_axis: The axis of a weight along which its filters lie.
    """

    filter_axis = 0

    def __init__(self, make: Callable):
        import equinox as eqx

        self._eqx, self._make = eqx, make
        found = eqx.filter_eval_shape(make, key=jax.random.key(0))
        self._stateful = isinstance(found, tuple)
        module, state = found if self._stateful else (found, None)
        takes = _parameters(type(module).__call__)
        self._takes_key = "key" in takes
        self.dropout = 1.0 if self._takes_key else 0.0
        dynamic, self._static = eqx.partition(module, _is_array)
        self._params, self._others = eqx.partition(dynamic, _is_inexact)
        self._state = state

    def init(self, key, images):
        """See :func:`adapt`."""
        del images
        found = self._make(key=key)
        module, state = found if self._stateful else (found, None)
        dynamic, _ = self._eqx.partition(module, _is_array)
        params, others = self._eqx.partition(dynamic, _is_inexact)
        return _named(params), {"others": _named(others), "state": _named(state)}

    def apply(self, params, state, images, *, train, keys=None):
        """See :func:`adapt`."""
        eqx = self._eqx
        module = eqx.combine(
            _unnamed(params, self._params),
            _unnamed(state["others"], self._others),
            self._static,
        )
        module = eqx.nn.inference_mode(module, value=not train)
        kept = _unnamed(state["state"], self._state)
        if keys is not None:
            # Each image by its own, so that it is dropped alike in any part of a batch.
            keys = checked_keys(keys, len(images))
            if not keys.ndim:
                keys = jax.random.split(keys, len(images))

        def one(image, key, kept):
            own = {"key": key} if self._takes_key else {}
            if self._stateful:
                return module(image, kept, **own)
            return module(image, **own), None

        outputs, moved = jax.vmap(
            one,
            in_axes=(0, None if keys is None else 0, None),
            out_axes=(0, None),
            axis_name="batch",
        )(images, keys, kept)
        if not train:
            return outputs, state
        return outputs, jax.lax.stop_gradient({**state, "state": _named(moved)})


# --- helpers -------------------------------------------------------------------------


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    if isinstance(function, type):  # its metaclass may take anything
        each = (c.__dict__.get("__init__") for c in function.__mro__)
        function = next(filter(None, each), function)
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _classes(model, num_classes) -> dict[str, int]:
    takes = _parameters(model)
    return (
        {"num_classes": num_classes} if "num_classes" in takes and num_classes else {}
    )


def _mode_of(module: Any) -> Callable[[bool], dict[str, bool]]:
    """Train -> what the module's call wants to be told."""
    takes = _parameters(type(module).__call__)
    for name, sign in (("train", True), ("training", True), ("deterministic", False)):
        if name in takes:
            return functools.partial(_said, name, sign)
    return lambda train: {}


def _said(name: str, sign: bool, train: bool) -> dict[str, bool]:
    return {name: train == sign}


def _named(tree: PyTree, like: PyTree = None) -> dict[str, Any]:
    """The arrays of a pytree as nested dicts: a layer's arrays stand together.

    Args:
      tree: The pytree.
      like: What else is not in this pytree, as what training sows, is left out.
    """
    wanted = None if like is None else {_name(path) for path, _ in _flatten(like)[0]}
    found: dict[str, Any] = {}
    for path, leaf in _flatten(tree)[0]:
        if wanted is not None and _name(path) not in wanted:
            continue
        place = found
        *parts, last = _name(path).split("/")
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = leaf
    return found


def _steady(before: Any, after: Any) -> Any:
    """What of nested dicts has the same arrays in others, by structure and shape."""
    found = {}
    for name, value in before.items():
        other = after.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            inner = _steady(value, other)
            if inner or not value:
                found[name] = inner
        elif _shapes(value) == _shapes(other):
            found[name] = value
    return found


def _those_of(like: Any, values: Any) -> Any:
    """The values of nested dicts that others have too."""
    if not isinstance(like, Mapping):
        return values
    return {name: _those_of(inner, values[name]) for name, inner in like.items()}


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def _unnamed(arrays: dict[str, Any], like: PyTree) -> PyTree:
    """The pytree of the structure of `like` with these arrays."""
    paths, structure = _flatten(like)
    names = [_name(path) for path, _ in paths]
    known = {_name(path): leaf for path, leaf in _flatten(arrays)[0]}
    if set(names) != set(known):
        missing, others = set(names) - set(known), set(known) - set(names)
        raise ValueError(
            "params and state must be those of this network: missing "
            f"{sorted(missing)[:3]}, and not known to it {sorted(others)[:3]}."
        )
    return structure.unflatten([known[name] for name in names])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _flatten(tree: PyTree) -> tuple[list, Any]:
    return jax.tree_util.tree_flatten_with_path(tree)


def _one(keys: Any, images: jax.Array) -> jax.Array:
    """One key of the keys of a batch's examples, for what draws once for all of them.

    That of the first, so that a part of the batch draws other numbers than all of it.
    """
    if keys is None:
        return jax.random.key(0)
    keys = checked_keys(keys, len(images))
    return keys[0] if keys.ndim else keys


def _streams(shapes: PyTree, key: jax.Array) -> PyTree:
    """Random streams at their beginning, with keys of their own."""
    paths, structure = _flatten(shapes)
    found = []
    for number, (_, leaf) in enumerate(paths):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.append(
            jax.random.fold_in(key, number)
            if is_key
            else jnp.zeros(leaf.shape, leaf.dtype)
        )
    return structure.unflatten(found)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_inexact(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)
