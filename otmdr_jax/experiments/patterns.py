"""Leaves of a network's parameters, chosen by patterns of their names.

The name of a leaf is its path with slashes between, as `conv1/kernel`. A pattern is one
of :mod:`fnmatch`, in which `*` stands for slashes too: `conv*` is all of the layers
whose names start so, `*/kernel` is every kernel. A posterior's leaves have the names of
the parameters that they are of.

:func:`split` and :func:`join` take frozen leaves out of what is trained, with None in
their places, which functions of JAX pass over: a method never sees them.
"""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax

from otmdr_jax.bnn import MeanField

PyTree = Any


def names(tree: PyTree) -> list[str]:
    """The names of all leaves, in their order.

    Example:
      >>> names({"head": {"bias": 0.0, "kernel": 1.0}})
      ['head/bias', 'head/kernel']
    """
    return [_name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is of one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def mask(patterns: Sequence[str], params: PyTree) -> PyTree:
    """True for the leaves of a model whose names are of one of the patterns.

    Example:
      >>> mask(["*/kernel"], {"head": {"bias": 0.0, "kernel": 1.0}})
      {'head': {'bias': False, 'kernel': True}}
    """
    return map_named(lambda name, _: matches(name, patterns), params)


def map_named(function: Callable[[str, Any], Any], trained: PyTree) -> PyTree:
    """Maps a function of a leaf's name and the leaf.

    Args:
      function: (name, leaf) -> what stands in its place.
      trained: A model's parameters, or a posterior over them.
    """
    if isinstance(trained, MeanField):
        return MeanField(*(map_named(function, part) for part in trained))
    return jax.tree.map_with_path(lambda path, x: function(_name(path), x), trained)


def check(option: str, patterns: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a pattern that no name is of.

    Args:
      option: The option's name, for the error.
      patterns: Its patterns.
      known: The names that there are.

    Raises:
      ValueError: A pattern without a leaf.

    Example:
      >>> check("freeze", ["cnv*"], ["conv1/kernel"])
      Traceback (most recent call last):
      ValueError: freeze: 'cnv*' is the name of no parameter; there are conv1/kernel.
    """
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            raise ValueError(
                f"{option}: {pattern!r} is the name of no parameter; there "
                + (f"are {', '.join(known)}." if known else "is none left for it.")
            )


def check_frozen(frozen: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that are left to train.

    Args:
      frozen: The patterns of `freeze`.
      known: The names of all parameters.

    Raises:
      ValueError: A pattern matches nothing, or nothing is left.
    """
    check("freeze", frozen, known)
    left = [name for name in known if not matches(name, frozen)]
    if not left:
        raise ValueError(
            f"freeze={tuple(frozen)} leaves nothing to train: it is the names of all "
            f"parameters, {', '.join(known)}."
        )
    return left


def split(frozen: Sequence[str], trained: PyTree) -> tuple[PyTree, PyTree]:
    """Takes frozen leaves out of what is trained.

    Args:
      frozen: Their patterns; none of them takes nothing out.
      trained: Parameters, or a posterior in which frozen ones are :func:`pinned`.

    Returns:
      What is trained, with None in the places of the others; and these, of the model's
      structure, with None in the places of what is trained, or None for all of it where
      nothing is frozen.

    Example:
      >>> split(["head/*"], {"conv": 1.0, "head": {"bias": 2.0}})
      ({'conv': 1.0, 'head': {'bias': None}}, {'conv': None, 'head': {'bias': 2.0}})
    """
    if not frozen:
        return trained, None
    rest = map_named(lambda name, x: None if matches(name, frozen) else x, trained)
    fixed = map_named(lambda name, x: x if matches(name, frozen) else None, trained)
    return rest, fixed.point if isinstance(fixed, MeanField) else fixed


def join(trained: PyTree, fixed: PyTree) -> PyTree:
    """The inverse of :func:`split`: parameters, or a posterior, with all leaves."""
    if fixed is None:
        return trained
    if isinstance(trained, MeanField):
        return trained._replace(point=join(trained.point, fixed))
    return jax.tree.map(
        lambda x, other: other if x is None else x,
        trained,
        fixed,
        is_leaf=lambda x: x is None,
    )


def pinned(frozen: Sequence[str], trained: PyTree, params: PyTree) -> PyTree:
    """Makes frozen leaves of a posterior point estimates, at the model's weights.

    Args:
      frozen: Their patterns.
      trained: What a method trains; parameters are given back as they are.
      params: The parameters of the model.

    Raises:
      ValueError: No weight of the posterior would be left.
    """
    if not frozen or not isinstance(trained, MeanField):
        return trained

    def loose(part):
        return map_named(lambda name, x: None if matches(name, frozen) else x, part)

    mean, scale = loose(trained.mean), loose(trained.raw_scale)
    if not jax.tree.leaves(mean):
        raise ValueError(
            f"freeze={tuple(frozen)} leaves no weight with a posterior, whose are "
            f"{', '.join(names(trained.mean))}: train with a method of one weight "
            "vector."
        )
    point = jax.tree.map_with_path(
        lambda path, x, now: x if matches(_name(path), frozen) else now,
        params,
        trained.point,
    )
    return MeanField(mean, scale, point)


def rates(given: Sequence[str]) -> list[tuple[str, float]]:
    """Patterns with a learning rate each, out of texts.

    Args:
      given: Texts as `head/*=0.1`.

    Raises:
      ValueError: One of them is no such text, or its rate is not positive.

    Example:
      >>> rates(["head/*=0.1", "conv*=1e-3"])
      [('head/*', 0.1), ('conv*', 0.001)]
    """
    found = []
    for text in given:
        pattern, _, number = text.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not pattern or not 0 < rate < float("inf"):
            raise ValueError(
                "learning_rate_of must be patterns with a positive rate each, as "
                f"'head/*=0.1', got {text!r}. What is not to be trained is for freeze."
            )
        found.append((pattern, rate))
    return found


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
