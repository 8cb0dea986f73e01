r"""The dual form: a radius that adapts, from a budget and its Lagrange multiplier.

.. math::
    \min_\theta \min_{\lambda > 0} \; \lambda \rho^p
        + \mathbb E_\theta \max_w \left[ L(w) - \lambda \|w - \theta\|_2^p \right]

(Eqs. 14, 26, where the budget is for d itself; :math:`\rho^p` keeps :math:`\rho` a
length, as in the set :math:`\Gamma_{\rho, \phi}` of Theorem 4.1). For a loss that is
linear around :math:`\theta` with a gradient of norm G the maximum is a step uphill,

.. math::
    \frac{\|w - \theta\|}{\rho} = \left( \frac G \mu \right)^{1 / (p - 1)}, \qquad
    \mu = \lambda \, p \, \rho^{p - 1},

so that :math:`\mu` is the gradient norm whose particle is exactly :math:`\rho` away.
Its logarithm is what an optimizer moves: it is free, and knows neither the scale of the
loss nor, where the radius follows a schedule, that of the weights. The objective's
derivative by :math:`\log \mu` is :math:`\lambda \rho^p (1 - u)` with the part u of the
budget that is used, :math:`u = \mathbb E \|w - \theta\|^p / \rho^p`.

Reference: Nguyen et al., 2023, section 4.3; Blanchet & Murthy, `Quantifying
Distributional Model Risk via Optimal Transport <https://arxiv.org/abs/1604.01446>`_,
2019, for the dual.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.core import collectives, shards, tree
from otmdr_jax.core.ascent import ascend
from otmdr_jax.core.checks import check_count, check_number, check_rho
from otmdr_jax.core.gradient import build
from otmdr_jax.core.options import LossOptions, Options, PartOptions, ShapeOptions
from otmdr_jax.core.particle import particle
from otmdr_jax.core.signatures import fields_of, filled, with_options
from otmdr_jax.core.step import Particle, Pass, Step
from otmdr_jax.core.transform import from_gradient, keep, schedule_of

PyTree = Any

# SAM's radius; our choices: a budget that is used twice over loses a tenth of it a
# step, and no particle goes further than where a mean over 100 members would be spent.
RHO, RATE, MAX_RATIO = 0.05, 0.1, 10.0
# The multiplier stays in the range of float32, and so do squares of the violation.
_LOG_RANGE, _MOST = 80.0, 1e15


class BudgetOptions(TypedDict, total=False):
    """Of the dual form alone."""

    power: Annotated[
        float,
        2.0,
        """p, above 1, of the distance d. With 2 particles go as far as their gradients
        are long; the larger p, the more alike they go. 1 needs `max_ratio` of at most
        1: with both at 1, d is that of Theorem 4.3 and the method is SAM.""",
    ]
    num_steps: Annotated[
        int,
        1,
        """Steps towards the inner maximum, a gradient each. Every one maximises the
        loss linearised where the step before arrived, less lambda d: the
        concave-convex procedure, which never descends on a convex loss.""",
    ]
    max_ratio: Annotated[
        float,
        MAX_RATIO,
        """How many rho a particle may be away: further d is infinite. Where it is at
        most 1 the budget always suffices, lambda is 0 in the limit and every particle
        lies on the sphere.""",
    ]
    lambda_init: Annotated[
        float | None,
        None,
        """Where lambda starts, at the first rho above 0. None for the solution of the
        dual for the first gradient that is not 0, linearised:
        :math:`G / (p \\rho^{p - 1})`.""",
    ]
    lambda_optimizer: Annotated[
        Any,
        None,
        """An Optax optimizer of log lambda. Its gradient is 1 - u, of which the step
        for :math:`\\log \\mu` is the share (p - 1) / p. None for
        `optax.chain(optax.clip(1.0), optax.sgd(0.1))`: a gradient of 1 changes
        d by a tenth, whatever p. `optax.set_to_zero()` keeps mu, and so lambda, unless
        rho is a schedule (Eq. 4).""",
    ]


class DualOptions(BudgetOptions, ShapeOptions, PartOptions, LossOptions, total=False):
    """Of the dual form: nothing is random, so that there are no draws, halves, noise.

    There is one norm, that of d: the budget is shared by all weights.
    """

    mask: Annotated[Any, None, "Which leaves may be perturbed, as for `otmdr_jax.sam`."]


class DualState(NamedTuple):
    r"""What the dual form remembers: scalars, equal on all devices.

    A step first moves :math:`\mu` by what the step before saw, then climbs.

    Attributes:
      log_slope: :math:`\log \mu`, between -80 and 80.
      started: Whether it has been set, at a gradient that is not 0; with `lambda_init`
        at a radius that is not 0, until which `multiplier` is that.
      opt_state: The state of its optimizer.
      multiplier: lambda of the last step.
      slope: G of its last ascent step, a mean over parts, devices and members.
      budget_used: u, the mean of d over :math:`\rho^p`.
      value: The dual objective :math:`\lambda \rho^p (1 - u) + E L(w)`; infinite at
        first.
    """

    log_slope: jax.Array
    started: jax.Array
    opt_state: PyTree
    multiplier: jax.Array
    slope: jax.Array
    budget_used: jax.Array
    value: jax.Array


class DualGradient(NamedTuple):
    """The functional form of the dual.

    Attributes:
      init: () -> the first :class:`DualState`.
      apply: (state, params, batch, *args, rho=None, **kwargs) -> the result, and the
        next state. A step whose losses or gradients are not finite leaves it as it was.
    """

    init: Callable[[], DualState]
    apply: Callable[..., Any]


@with_options
def dual(
    loss_fn: Callable[..., Any],
    rho: Any = RHO,
    *,
    aux_init: PyTree = None,
    **options: Unpack[DualOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""The dual form of OT-MDR as an Optax transformation, used like `otmdr_jax.sam`.

    .. math::
        \min_\theta \min_{\lambda > 0} \; \lambda \rho^p
            + \max_w \left[ L(w) - \lambda \|w - \theta\|_2^p \right]

    The mean distance is that of a budget, and each batch goes as far as its gradient
    makes it; SAM goes as far for all of them. A step costs as many gradients: two.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius in the units of the weights, whose budget is :math:`\rho^p`; 0.05
        as in SAM. A number, or an Optax schedule of the number of updates. 0 is the
        plain gradient.
      aux_init: See :func:`otmdr_jax.otmdr`.
      **options: Those of :class:`DualOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs` without randomness, whose state, a
      :class:`otmdr_jax.core.transform.MemoryState`, holds a :class:`DualState`:
      `optax.tree.get(opt_state, "multiplier")`.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.sam`; several radii; a power below 1,
        or 1 without a ball.

    Example:
      >>> import jax.numpy as jnp, optax, otmdr_jax
      >>> tx = otmdr_jax.dual(lambda w, batch: 3.0 * w[0] + 0.0 * jnp.mean(batch), 0.5)
      >>> w, batch = jnp.zeros(1), jnp.ones(4)
      >>> _, state = tx.update(w, tx.init(w), w, batch=batch)
      >>> float(state.memory.multiplier)  # 3 / (2 * 0.5)
      3.0
      >>> state.diagnostics.distances.tolist()
      [0.5]

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023, section 4.3, Eqs. 14 and 26.
    """
    radii_at, _ = schedule_of(rho)
    made = dual_gradient(loss_fn, radii_at(jnp.zeros((), jnp.int32)), **options)
    return from_gradient(
        made.apply,
        rho=rho,
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
        start=lambda params: made.init(),
    )


@with_options
def dual_gradient(
    loss_fn: Callable[..., Any], rho: Any = RHO, **options: Unpack[DualOptions]
) -> DualGradient:
    """The functional form of :func:`dual`: state in, state out.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius.
      **options: Those of :class:`DualOptions`.

    Returns:
      A :class:`DualGradient`, whose `apply` gives a :class:`otmdr_jax.RobustGradient`
      and a :class:`DualState`.

    Example:
      >>> import jax.numpy as jnp, otmdr_jax
      >>> def loss_fn(w):
      ...     return 0.5 * jnp.sum(w**2)
      >>> dual = otmdr_jax.dual_gradient(loss_fn, rho=0.5)
      >>> found, state = dual.apply(dual.init(), jnp.array([3.0, 4.0]))
      >>> found.grads
      Array([3.3, 4.4], dtype=float32)
      >>> float(state.value)  # L(w) where the budget is used up
      15.125
    """
    given = filled(DualOptions, options)
    budget = Budget.of(given)
    radius = one_radius(rho)
    others = {name: x for name, x in given.items() if name not in vars(budget)}
    opts = Options(split="shared", **others)

    def by(climb):
        return build(loss_fn, (radius,), opts, climb)

    by(budget.climb)  # here, that what cannot work is refused before there is a state

    def apply(state, params, *batch, key=None, rho=None, **kwargs):
        del key  # nothing is random
        now = radius if rho is None else one_radius(rho)
        return budget.step(
            state, now, lambda climb: by(climb)(params, *batch, rho=now, **kwargs)
        )

    return DualGradient(lambda: budget.init(radius), apply)


def lambda_optimizer(rate: float) -> optax.GradientTransformation:
    """The default optimizer of log lambda, with a learning rate."""
    return optax.chain(optax.clip(1.0), optax.sgd(rate))


def one_radius(rho: Any) -> jax.typing.ArrayLike:
    """The radius of the budget; refuses several."""
    radii = check_rho(rho)
    if len(radii) != 1:
        raise ValueError(
            f"the dual form has one radius, that of its budget, got {len(radii)}: "
            "pass rho=0.05, say; num_steps is the number of ascent steps."
        )
    return radii[0]


@dataclasses.dataclass(frozen=True)
class Budget:
    """The constraint E d <= rho^p: the fields of :class:`BudgetOptions`, checked."""

    power: float
    num_steps: int
    max_ratio: float
    lambda_init: float | None
    lambda_optimizer: Any

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Budget":
        """The budget of all options of a function."""
        return cls(**{name: given[name] for name in fields_of(BudgetOptions)})

    def __post_init__(self):
        """Checks every field, then what goes together."""
        check_count("num_steps", self.num_steps)
        for name in ("power", "max_ratio", "lambda_init"):
            value = getattr(self, name)
            if isinstance(value, jax.core.Tracer):
                raise TypeError(f"{name} must be a number known at trace time.")
            if value is not None:
                check_number(name, value, positive=True)
        if self.power < 1 or (self.power == 1 and self.max_ratio > 1):
            raise ValueError(
                f"power must be above 1, got {self.power!r}: at 1 the inner maximum is "
                "at the center or infinitely far, but for a ball, max_ratio=1, which "
                "makes the distance that of Theorem 4.3."
            )
        if self.lambda_optimizer is None:
            object.__setattr__(self, "lambda_optimizer", lambda_optimizer(RATE))
        elif not isinstance(self.lambda_optimizer, optax.GradientTransformation):
            raise TypeError(
                "lambda_optimizer must be an Optax optimizer, as optax.sgd(0.1), got "
                f"{self.lambda_optimizer!r}."
            )

    def init(self, rho: jax.typing.ArrayLike) -> DualState:
        """The state before the first step."""
        log_slope, started = jnp.zeros(()), False
        if self.lambda_init is None and self.max_ratio <= 1:
            # The objective grows with lambda.
            log_slope, started = jnp.asarray(-_LOG_RANGE), True
        log_slope = _bounded(log_slope)
        zero, one, none = (jnp.full((), x, jnp.float32) for x in (0, 1, jnp.inf))
        return DualState(
            log_slope,
            jnp.asarray(started),
            self.lambda_optimizer.init(log_slope),
            self._multiplier(log_slope, rho, jnp.asarray(started)),
            zero,
            one,
            none,
        )

    def step(
        self,
        state: DualState,
        rho: jax.typing.ArrayLike,
        run: Callable[[Callable[..., Particle]], Any],
    ) -> tuple[Any, DualState]:
        """One step: moves lambda, climbs, and looks at what was used of the budget.

        Args:
          state: The state before it.
          rho: The radius.
          run: A function of what becomes of a step, (step, first=None) -> particle as
            the hook of :func:`otmdr_jax.core.gradient.build`, to a gradient and its
            diagnostics.
        """
        moved = self._moved(state, rho)

        def climb(step, first=None):
            found = self.climb(step, moved, first)
            (slope,) = found.ascent_norms
            used = self._ratio(moved, slope) ** self.power
            # Both are averaged on their way, over parts and devices.
            both = jnp.stack([slope, jnp.minimum(used, _MOST)])
            return found._replace(ascent_norms=both)

        result = run(climb)
        slope, used = result.diagnostics.ascent_norms
        info = result.diagnostics._replace(ascent_norms=slope[None])
        log_slope = jnp.where(moved.started, moved.log_slope, _log(slope))
        rest = jnp.exp(log_slope) * rho / self.power * (1 - used)
        seen = (
            self._multiplier(log_slope, rho, moved.started), slope, used,
            result.value + rest,
        )  # fmt: skip
        new = DualState(*moved[:3], *(x.astype(jnp.float32) for x in seen))
        finite = tree.all_finite((info, new))
        return result._replace(diagnostics=info), keep(finite, new, state)

    def climb(
        self, step: Step, state: DualState | None = None, first: Pass | None = None
    ) -> Particle:
        """The particle at the inner maximum.

        Args:
          step: What it is computed from.
          state: The state that says how far it goes; None for as far as the radius.
          first: The gradient at the center, where it is known already.
        """
        (rho,) = step.radii

        def radius(slope):
            return rho if state is None else self._ratio(state, slope) * rho

        for taken in range(1, self.num_steps):
            first = first or step.ascent_gradient(step.center, step.batch)
            grads = step.own_gradient(first)
            w, _ = ascend(
                step.center, grads, radius, metric=step.metric, mask=step.mask
            )
            first = first[0], step.ascent_gradient(w, step.batch, taken)[1]
        reach: Any = (radius,)
        alone = step._replace(radii=reach)
        return particle(alone, (None, None), [step.batch], first)

    def _moved(self, state, rho):
        """The state with another mu, by what it holds of the step before."""
        violation = jnp.where(state.started, 1 - state.budget_used, 0.0)
        step, opt_state = self.lambda_optimizer.update(
            violation, state.opt_state, state.log_slope
        )
        step = jnp.where(jnp.isnan(step), 0.0, step)  # an infinite rate times 0
        # In units in which the budget that is used reacts alike, whatever the power.
        share = (self.power - 1) / self.power if self.power > 1 else 1.0
        first, begins = _log(state.slope), state.slope > 0
        if self.lambda_init is not None:
            # At a radius of 0 no mu has that lambda.
            first = _bounded(math.log(self.lambda_init) + self._log_unit(rho))
            begins = jnp.asarray(rho) > 0
        later = _bounded(state.log_slope + share * step)
        log_slope = jnp.where(state.started, later, first)
        started = state.started | begins
        return state._replace(log_slope=log_slope, started=started, opt_state=opt_state)

    def _ratio(self, state, slope):
        """How many radii a particle goes for a gradient norm; the closed form."""
        above, most = _log(slope) - state.log_slope, math.log(self.max_ratio)
        if self.power > 1:
            far = above / (self.power - 1)
        else:
            far = jnp.where(above > 0, most, -jnp.inf)
        far = jnp.where(state.started, far, 0.0)
        return jnp.where(slope > 0, jnp.exp(jnp.minimum(far, most)), 0.0)

    def _log_unit(self, rho):
        """The logarithm of mu / lambda."""
        if self.power == 1:
            return 0.0
        # A schedule to 0 may end at -3e-9 in compiled programs.
        rho = jnp.maximum(jnp.asarray(rho), 0)
        return math.log(self.power) + (self.power - 1) * jnp.log(rho)

    def _multiplier(self, log_slope, rho, started):
        found = jnp.exp(_bounded(log_slope - self._log_unit(rho)))
        if self.lambda_init is None:
            return found
        return jnp.where(started, found, jnp.float32(self.lambda_init))


def share(states: DualState, finite: jax.Array, axis_name: Any = None) -> DualState:
    """One state of members that took a step with the same one: their mean budget.

    Args:
      states: Those that they came out with, on a leading axis.
      finite: (M,) bools, whose step was finite; the others do not count.
      axis_name: The device axis that members are spread over, or None.

    Returns:
      A :class:`DualState`; where no step was finite, as it was.
    """
    axes = collectives.axes_of(axis_name)
    states, finite = collectives.gather((states, finite), axes)

    def one_of(states, finite):
        first = jnp.argmax(finite)
        count = jnp.maximum(jnp.sum(finite), 1)

        def mean(x):
            total = jnp.sum(jnp.where(finite, x, 0.0))
            return jnp.where(jnp.any(finite), total / count, x[first])

        own = jax.tree.map(lambda x: x[first], states)
        return DualState(*own[:3], *map(mean, states[3:]))

    # Members may be spread over an explicit mesh.
    return shards.left_to_compiler(one_of, finite, whole=True)(states, finite)


def _log(slope):
    """Its logarithm, in range also for a gradient of 0, and so is the derivative."""
    slope = slope.astype(jnp.float32)
    found = jnp.log(jnp.where(slope > 0, slope, 1.0))
    return _bounded(jnp.where(slope > 0, found, -_LOG_RANGE))


def _bounded(x):
    return jnp.clip(jnp.asarray(x, jnp.float32), -_LOG_RANGE, _LOG_RANGE)
