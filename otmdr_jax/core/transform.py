"""The robust gradient as Optax transformations: `otmdr`, `sam` and `asam`.

They compute their own gradient from `batch=`, so the updates that come in are not
used. Everything chained after them (clipping, decay, momentum, accumulation) acts on
the robust gradient at the center. What is carried from update to update (key, count,
auxiliary output, memory) is the state. :func:`from_gradient` makes the same of any
function that computes a gradient from a batch.

A batch in which a loss or a gradient of any pass is NaN or infinite leaves no trace but
in the count, the key and the diagnostics: what is remembered stays as it was. The
gradient is passed on as it is, so that a guard after it (`optax.apply_if_finite` around
the optimizer, `optax.zero_nans`) sees it. What is a whole optimizer, after which there
is no guard (bSAM, IVON, sparse training), makes no step: its update is 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.core import tree
from otmdr_jax.core.batches import NO_BATCH
from otmdr_jax.core.checks import check_rho
from otmdr_jax.core.gradient import PAPER_RHO, Diagnostics, build, robust_gradient
from otmdr_jax.core.keys import one_key
from otmdr_jax.core.options import (
    FixedShapeOptions,
    LossOptions,
    Options,
    RobustOptions,
    SamOptions,
)
from otmdr_jax.core.signatures import with_options

PyTree = Any


class OtmdrState(NamedTuple):
    """State of :func:`otmdr_jax.otmdr`, :func:`sam` and :func:`asam`.

    Attributes:
      count: Number of updates so far.
      key: The PRNG key of the next update, a typed one whatever it was made of, or None
        where nothing is random.
      aux: The auxiliary output of the center pass of the last update whose losses and
        gradients were finite; `aux_init` at first. A leaf that is not finite then stays
        what it was.
      diagnostics: The last update's :class:`otmdr_jax.Diagnostics`; infinite at
        first, since `jax.debug_nans` stops at NaN.
    """

    count: jax.Array  # type: ignore[assignment]  # as in Optax: hides tuple.count
    key: jax.Array | None
    aux: PyTree
    diagnostics: Diagnostics


class MemoryState(NamedTuple):
    """State of a transformation whose gradient remembers something.

    Attributes:
      count: Number of updates so far.
      key: The PRNG key of the next update, or None where nothing is random.
      aux: See :class:`OtmdrState`.
      diagnostics: The last update's :class:`otmdr_jax.Diagnostics`.
      memory: What the gradient remembers of the updates whose losses and gradients were
        finite.
    """

    count: jax.Array  # type: ignore[assignment]
    key: jax.Array | None
    aux: PyTree
    diagnostics: Diagnostics
    memory: PyTree


@with_options
def otmdr(
    loss_fn: Callable[..., Any],
    key: jax.Array | None = None,
    *,
    rho: Any = PAPER_RHO,
    aux_init: PyTree = None,
    **options: Unpack[RobustOptions],
) -> optax.GradientTransformationExtraArgs:
    """OT-MDR as an Optax transformation: replaces updates by the robust gradient.

    `update(updates, state, params, *, batch, loss_args=(), loss_kwargs=None)` computes
    the gradient of `loss_fn(params, batch, *loss_args, **loss_kwargs)` itself: the
    incoming `updates` are not used (pass zeros, or the parameters, and skip the
    backward pass that would make them). Other extra arguments are ignored.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      key: A PRNG key, typed or raw. It lives in the state, as a typed one, and is split
        at each update. May be None where nothing is random.
      rho: Radii as for :func:`otmdr_jax.value_and_grad`; each one, or the whole, may
        be an Optax schedule of the number of updates so far. So may the options
        `inverse_temperature` and `tilt` of a sampler.
      aux_init: With `has_aux`: a pytree of arrays of the structure, shapes and dtypes
        of aux, the initial BatchNorm statistics, say. The state then holds aux:
        `optax.tree.get(opt_state, "aux")`.
      **options: Those of :class:`otmdr_jax.core.options.RobustOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. To accumulate over micro-batches put
      `optax.MultiSteps` after it in the chain, around the optimizer: around the whole
      chain it would hand on the last micro-batch alone. To skip non-finite steps chain
      `optax.apply_if_finite(optimizer, n)` after it.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.value_and_grad`; one of `has_aux` and
        `aux_init` without the other; at the update a missing batch, or an aux of
        another structure; parameters of which `optax.masked` or `optax.partition` took
        some away.

    Example:
      >>> import jax, jax.numpy as jnp, optax, otmdr_jax
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> tx = optax.chain(
      ...     otmdr_jax.otmdr(loss_fn, jax.random.key(0), rho=(0.01, 0.02)),
      ...     optax.sgd(0.1, momentum=0.9),
      ... )
      >>> w, batch = jnp.zeros(2), jnp.eye(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(w, state, w, batch=batch)
      >>> int(state[0].count)  # of the chain's first part
      1
      >>> float(optax.tree.get(state, "diagnostics").robust_loss)
      1.03...

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023.
    """
    _, num_radii = schedule_of(rho)
    schedules: dict[str, Any] = {
        name: options.get(name)
        for name in ("inverse_temperature", "tilt")
        if callable(options.get(name))
    }

    def compute_at(count):
        strength = {name: schedule(count) for name, schedule in schedules.items()}
        return robust_gradient(loss_fn, (0.0,) * num_radii, **{**options, **strength})

    compute = compute_at(jnp.zeros((), jnp.int32))
    return from_gradient(
        compute,
        key,
        compute_at=compute_at if schedules else None,
        rho=rho,
        num_particles=options.get("num_particles", 1),
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
    )


@with_options
def sam(
    loss_fn: Callable[..., Any],
    rho: Any = 0.05,
    *,
    aux_init: PyTree = None,
    **options: Unpack[SamOptions],
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-Aware Minimization: OT-MDR with one step on the whole batch.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius; 0.05 as in Foret et al. for CIFAR-10. Several radii give
        several ascent steps; schedules as in :func:`otmdr`.
      aux_init: See :func:`otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.SamOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, used like :func:`otmdr`.

    Example:
      >>> import jax.numpy as jnp, optax, otmdr_jax
      >>> tx = otmdr_jax.sam(lambda w, batch: jnp.mean(batch) * w[0] ** 2, rho=0.5)
      >>> w, batch = jnp.array([1.0]), jnp.ones(4)
      >>> grads, _ = tx.update(w, tx.init(w), w, batch=batch)
      >>> grads.tolist()
      [3.0]

    Reference:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021; Nguyen et al.,
      2023, Theorem 4.3.
    """
    return otmdr(loss_fn, rho=rho, aux_init=aux_init, split="shared", **options)


@with_options
def asam(
    loss_fn: Callable[..., Any],
    rho: Any = 0.5,
    *,
    aux_init: PyTree = None,
    **options: Unpack[FixedShapeOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the ball is measured in units of each weight.

    .. math:: w' = w + \rho \frac{T^2 g}{\|T g\|_2}, \qquad T = |w|

    The authors' implementation adds 0.01 to T for kernels and sets T = 1 for biases;
    the one here, as the released code of OT-MDR, does neither.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius; 0.5 as in Kwon et al. for CIFAR-10.
      aux_init: See :func:`otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.FixedShapeOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, used like :func:`otmdr`.

    Example:
      >>> import jax.numpy as jnp, optax, otmdr_jax
      >>> tx = otmdr_jax.asam(lambda w, batch: jnp.mean(batch) * w[0] ** 2, rho=0.5)
      >>> w, batch = jnp.array([2.0]), jnp.ones(4)
      >>> grads, _ = tx.update(w, tx.init(w), w, batch=batch)
      >>> grads.tolist()  # at w + 0.5 |w|
      [6.0]

    Reference:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.
    """
    return sam(loss_fn, rho, aux_init=aux_init, adaptive=True, **options)


@with_options
def plain(
    loss_fn: Callable[..., Any],
    *,
    aux_init: PyTree = None,
    **options: Unpack[LossOptions],
) -> optax.GradientTransformationExtraArgs:
    """The plain gradient as a transformation: what the others are compared with.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      aux_init: See :func:`otmdr`.
      **options: Those of :class:`otmdr_jax.core.options.LossOptions`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, used like :func:`otmdr`. Its
      diagnostics say that the gap and the distance are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax.core.transform import plain
      >>> tx = plain(lambda w, batch: jnp.mean(batch) * w[0] ** 2)
      >>> w, batch = jnp.array([1.0]), jnp.ones(4)
      >>> grads, _ = tx.update(w, tx.init(w), w, batch=batch)
      >>> grads.tolist()
      [2.0]
    """
    return from_gradient(
        build(loss_fn, (), Options(split="shared", **options)),
        has_aux=options.get("has_aux", False),
        aux_init=aux_init,
    )


def from_gradient(
    compute: Callable[..., Any],
    key: jax.Array | None = None,
    *,
    rho: Any = None,
    num_particles: int = 1,
    has_aux: bool = False,
    aux_init: PyTree = None,
    start: Callable[[PyTree], PyTree] | None = None,
    compute_at: Callable[[jax.Array], Callable[..., Any]] | None = None,
    members: Callable[[PyTree], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A function that computes a gradient from a batch, as a transformation.

    Args:
      compute: (params, batch, *args, key=, rho=, **kwargs) ->
        :class:`otmdr_jax.RobustGradient`; with `start` (memory, params, batch, ...) ->
        (RobustGradient, memory).
      key: A PRNG key, or None where nothing is random.
      rho: The radii, as for :func:`otmdr_jax.otmdr`; None for a gradient that takes no
        ascent steps.
      num_particles: K, the number of particles.
      has_aux: Whether the loss returns (loss, aux).
      aux_init: The first aux, as for :func:`otmdr_jax.otmdr`.
      start: What the gradient remembers from step to step, made of the parameters. The
        state is then a :class:`MemoryState`.
      compute_at: The count of updates so far -> the function that takes the place of
        `compute`, whose options follow a schedule.
      members: The parameters -> how many members of an ensemble they are, each of which
        has its own diagnostics, on a leading axis; None for one model.

    Raises:
      ValueError: `has_aux` without `aux_init`, or `aux_init` without `has_aux`.
    """
    radii_at, num_radii = (None, 0) if rho is None else schedule_of(rho)
    key = one_key(key)
    if has_aux and aux_init is None:
        raise ValueError(
            "has_aux=True needs aux_init, a pytree of the structure, shapes and dtypes "
            "of aux: it fixes the state's structure before the first update."
        )

    if aux_init is not None and not has_aux:
        raise ValueError(
            "aux_init is where the aux of a loss that returns (loss, aux) starts: pass "
            "has_aux=True with it, or leave it out."
        )

    def init_fn(params):
        _check_whole(params)
        tree.arrays(params)
        # Each array is new, the caller's key and aux_init copied: whoever donates the
        # state must neither donate one buffer twice nor lose what is theirs.
        shapes = ((), (), (), (num_radii,), (), (num_particles,))
        lead = () if members is None else (members(params),)
        diagnostics = Diagnostics(
            *[jnp.full((*lead, *shape), jnp.inf, jnp.float32) for shape in shapes]
        )
        if num_radii == 0:
            diagnostics = diagnostics._replace(ascent_norms=None)
        own_key, aux = jax.tree.map(
            # Strongly typed, as after an update.
            lambda x: jnp.array(x, jnp.result_type(x)),
            (key, aux_init),
        )
        state = jnp.zeros((), jnp.int32), own_key, aux, diagnostics
        if start is None:
            return OtmdrState(*state)
        return MemoryState(*state, start(params))

    def update_fn(
        updates,
        state,
        params=None,
        *,
        batch=NO_BATCH,
        loss_args=(),
        loss_kwargs=None,
        **extra_args,
    ):
        del updates
        if fixed := {"rho", "key"} & extra_args.keys():
            raise TypeError(
                f"tx.update takes no {' and no '.join(sorted(fixed))}: the place is "
                "where the transformation is made. A radius that changes is a "
                "schedule, rho=lambda count: ..., or one of optax.inject_hyperparams."
            )
        if params is None:
            raise ValueError(
                "the robust gradient is taken at the parameters: call "
                "tx.update(updates, state, params, batch=batch)."
            )
        _check_whole(params)
        next_key, step_key = _split(state.key)
        arguments = (params, batch, *loss_args)
        options = {"key": step_key}
        if radii_at is not None:
            options["rho"] = radii_at(state.count)
        if start is None:
            run = compute_at(state.count) if compute_at else compute
            result = run(*arguments, **options, **(loss_kwargs or {}))
        else:
            result, memory = compute(
                state.memory, *arguments, **options, **(loss_kwargs or {})
            )
        seen = result.diagnostics
        if num_radii == 0:  # Orbax saves no empty arrays
            seen = seen._replace(ascent_norms=None)
        diagnostics = jax.tree.map(
            lambda new, old: new.astype(old.dtype), seen, state.diagnostics
        )
        finite = tree.all_finite(result.diagnostics)
        aux = jax.tree.map(
            lambda new, old: keep(finite & tree.all_finite(new), new, old),
            _like(result.aux, state.aux),
            state.aux,
        )
        count = optax.safe_increment(state.count)
        new = count, next_key, aux, diagnostics
        if start is None:
            return result.grads, OtmdrState(*new)
        finite &= tree.all_finite(memory)
        return result.grads, MemoryState(*new, keep(finite, memory, state.memory))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep(finite: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """What a step leaves behind: the new state if all was finite, else the old one.

    A schedule's count goes on in any case, as the state's own does: or the learning
    rate would lag behind the step, and never reach its end. A schedule has a state that
    is a count alone (that of Adam belongs to its moments), or is one of
    `optax.inject_hyperparams`.

    Args:
      finite: A scalar, whether all that the step saw was finite.
      new: The state after it.
      old: The state before it, of the same structure.
    """

    def kept(n, o):
        if _is_count(n):
            return n
        if _has_schedules(n):
            return n._replace(inner_state=keep(finite, n.inner_state, o.inner_state))
        return jnp.where(finite, n, o)

    return jax.tree.map(
        kept, new, old, is_leaf=lambda x: _is_count(x) or _has_schedules(x)
    )


def _is_count(node):
    return isinstance(node, tuple) and getattr(node, "_fields", None) == ("count",)


def _has_schedules(node):
    return isinstance(node, optax.InjectStatefulHyperparamsState)


def schedule_of(rho: Any) -> tuple[Callable[[jax.Array], tuple], int]:
    """A function from the count to the radii, and how many radii there are."""
    if callable(rho):
        radii_at = lambda count: check_rho(rho(count))  # noqa: E731
        return radii_at, len(radii_at(jnp.zeros((), jnp.int32)))
    if isinstance(rho, (list, tuple)):
        check_rho([0.0 if callable(r) else r for r in rho])
        return lambda count: tuple(r(count) if callable(r) else r for r in rho), len(
            rho
        )
    radii = check_rho(rho)
    return lambda count: radii, len(radii)


def _check_whole(params):
    """Refuses what `optax.masked` and `optax.partition` leave of the parameters."""
    leaves = jax.tree.leaves(params, is_leaf=_is_masked)
    if any(_is_masked(leaf) for leaf in leaves):
        raise TypeError(
            "the robust gradient needs all parameters, got some that optax.masked or "
            "optax.partition took away. Put these around the optimizer that is chained "
            "after it, optax.chain(otmdr(...), optax.partition(...)); to perturb some "
            "leaves alone use the option mask= of the transformation."
        )


def _is_masked(leaf):
    return isinstance(leaf, optax.MaskedNode)


def _split(key):
    return (None, None) if key is None else tuple(jax.random.split(key))


def _like(aux, expected):
    """`aux` with the dtypes of the state's, which must not change between updates."""
    got: Any = jax.tree.structure(aux)
    want: Any = jax.tree.structure(expected)
    if got != want:
        raise ValueError(
            "aux must have the structure of aux_init.\n"
            f"  aux_init: {want}\n  aux:      {got}"
        )

    def cast(new, old):
        if jnp.shape(new) != jnp.shape(old):
            raise ValueError(
                "aux must have the shapes of aux_init, got "
                f"{jnp.shape(new)} where aux_init has {jnp.shape(old)}."
            )
        return jnp.asarray(new, old.dtype)

    return jax.tree.map(cast, aux, expected)
