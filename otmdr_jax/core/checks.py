"""Checks of arguments, which every part of the library shares.

Each raises an error that says what must hold and what came.
"""

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def check_rho(rho: Any) -> tuple[jax.typing.ArrayLike, ...]:
    """Returns the radii as a tuple, one for each ascent step.

    Args:
      rho: A number, a sequence of numbers, or an array of rank 0 or 1; traced values
        are taken as they are.

    Raises:
      ValueError: No radius, a negative or a non-finite one.
      TypeError: A radius that is no number.
    """
    if isinstance(rho, (Sequence, list, tuple)) and not isinstance(rho, str):
        radii = tuple(rho)
    elif getattr(rho, "ndim", 0) == 1:
        radii = tuple(rho[i] for i in range(rho.shape[0]))
    else:
        radii = (rho,)
    if not radii:
        raise ValueError(
            "rho must hold one radius for each ascent step, got none: pass "
            "rho=(0.05, 0.1) for OT-MDR or rho=(0.05,) for one step."
        )
    for radius in radii:
        check_number("rho", radius)
    return radii


def check_number(
    name: str, value: Any, *, positive: bool = False, infinite: bool = False
) -> None:
    """Raises unless a value is a finite number that is not negative, or a traced one.

    Args:
      name: What it is called in errors.
      value: A number, a scalar array, or a traced scalar, whose value is not checked.
      positive: Whether 0 is refused too.
      infinite: Whether infinity is taken.

    Raises:
      TypeError: It is no number; ValueError: it is not finite, negative, or no scalar.
    """
    dtype = getattr(value, "dtype", jnp.float32)
    if dtype == jnp.uint32 or jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name} must be a number, got a PRNG key or the words of one. "
            "otmdr_jax.otmdr(loss_fn, key) has a key; value_and_grad and "
            "robust_gradient take it at the call, by name; sam and its like need none."
        )
    if not jnp.issubdtype(dtype, jnp.integer) and not jnp.issubdtype(
        dtype, jnp.floating
    ):
        raise TypeError(f"{name} must be a real number, got one of dtype {dtype}.")
    if isinstance(value, jax.core.Tracer):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got a {value.aval}.")
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number and not (hasattr(value, "dtype") and jnp.shape(value) == ()):
        raise TypeError(f"{name} must be a number or a scalar array, got {value!r}.")
    known = math.isfinite(float(value)) or (infinite and float(value) == math.inf)
    if not known or float(value) < 0 or (positive and not value):
        must = "positive and finite" if positive else "finite and not negative"
        must = "at least 0" if infinite else must
        raise ValueError(f"{name} must be {must}, got {value!r}.")


def is_known(value: Any) -> bool:
    """Whether a value is there, and can be looked at while a program is traced."""
    return value is not None and not isinstance(value, jax.core.Tracer)


def check_count(name: str, value: Any) -> None:
    """Raises unless a value is an integer of at least 1, known at trace time."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        made = isinstance(value, jax.Array)
        raise TypeError(
            f"{name} must be an integer known at trace time, got {value!r}."
            + " optax.inject_hyperparams makes arrays of all numbers: hand it a "
            "function of those alone that may change." * made
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}.")


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for names that are not among the known ones.

    Args:
      owner: What takes options: a function, as users call it.
      given: The names that it was given.
      known: Those that it takes.
    """
    known = list(known)
    if unknown := sorted(set(given) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise TypeError(
            f"{owner} takes no {', '.join(unknown)}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; it takes {', '.join(known)}."
        )


def check_word(name: str, value: Any, known: Sequence[str | None]) -> None:
    """Raises ValueError unless an option's value is one of the known words."""
    if value not in known:
        words = ", ".join(repr(word) for word in known)
        raise ValueError(f"{name} must be one of {words}; got {value!r}.")
