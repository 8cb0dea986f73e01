"""The options of the robust gradient, checked once, when it is built."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SPLITS = ("random", "ordered", "shared")
NORMS = ("none", "global", "per_leaf")
MERGES = (None, "sum", "mean")
PARTICLE_MAPS = MEMBER_MAPS = ("auto", "vmap", "unroll", "scan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What :func:`otmdr_jax.value_and_grad` takes besides the loss and the radii.

    The fields are documented there. Construction raises a ValueError or a TypeError
    for anything that cannot work.
    """

    num_particles: int = 1
    noise_std: jax.typing.ArrayLike = 0.0
    split: str = "random"
    norm: str = "global"
    adaptive: bool = False
    merge: str | None = None
    mask: Any = None
    has_aux: bool = False
    axis_name: Any = None
    sync_perturbation: bool = True
    particle_map: str = "auto"
    particle_axis_name: Any = None
    microbatch_size: int | None = None
    num_subbatches: int = 1
    fisher: jax.typing.ArrayLike = 0.0

    def __post_init__(self):
        """Checks every field."""
        check_count("num_particles", self.num_particles)
        check_count("num_subbatches", self.num_subbatches)
        if self.microbatch_size is not None:
            check_count("microbatch_size", self.microbatch_size)
        check_number("noise_std", self.noise_std)
        check_number("fisher", self.fisher)
        check_word("split", self.split, SPLITS)
        check_word("norm", self.norm, NORMS)
        check_word("merge", self.merge, MERGES)
        check_word("particle_map", self.particle_map, PARTICLE_MAPS)
        for name in ("adaptive", "has_aux", "sync_perturbation"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"{name} must be True or False, got {getattr(self, name)!r}."
                )
        if self.adaptive and self.curved:
            raise ValueError(
                f"adaptive=True and fisher={self.fisher!r} are two shapes of the ball: "
                "use one of them."
            )

    @property
    def noisy(self) -> bool:
        """Whether ascent steps add noise (a traced noise_std counts as noise)."""
        return isinstance(self.noise_std, jax.core.Tracer) or bool(self.noise_std != 0)

    @property
    def curved(self) -> bool:
        """Whether the ball has the shape of a Fisher information."""
        return isinstance(self.fisher, jax.core.Tracer) or bool(self.fisher != 0)

    @property
    def random(self) -> bool:
        """Whether a PRNG key is needed."""
        return self.noisy or self.split == "random"


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


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Raises unless a value is a finite number that is not negative, or a traced one.

    Args:
      name: What it is called in errors.
      value: A number, a scalar array, or a traced scalar, whose value is not checked.
      positive: Whether 0 is refused too.

    Raises:
      TypeError: It is no number; ValueError: it is not finite, negative, or no scalar.
    """
    if isinstance(value, jax.core.Tracer):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got a {value.aval}.")
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number and not (hasattr(value, "dtype") and jnp.shape(value) == ()):
        raise TypeError(f"{name} must be a number or a scalar array, got {value!r}.")
    if not math.isfinite(float(value)) or float(value) < 0 or (positive and not value):
        must = "positive and finite" if positive else "finite and not negative"
        raise ValueError(f"{name} must be {must}, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Raises unless a value is an integer of at least 1, known at trace time."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer known at trace time, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}.")


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for options that are not among the known ones."""
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(
            f"unknown options {', '.join(unknown)}; "
            f"there are {', '.join(sorted(known))}."
        )


def check_word(name: str, value: Any, known: Sequence[str | None]) -> None:
    """Raises ValueError unless an option's value is one of the known words."""
    if value not in known:
        words = ", ".join(repr(word) for word in known)
        raise ValueError(f"{name} must be one of {words}; got {value!r}.")
