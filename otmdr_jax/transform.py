"""The robust gradient as Optax transformations: `otmdr`, `sam` and `asam`.

They compute their own gradient from `batch=`, so the updates that come in are not
used. Everything chained after them (clipping, decay, momentum, accumulation) acts on
the robust gradient at the center.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from otmdr_jax.gradients import PAPER_RHO, Diagnostics, robust_gradient
from otmdr_jax.options import check_rho

PyTree = Any


class OtmdrState(NamedTuple):
    """State of :func:`otmdr`, :func:`sam` and :func:`asam`.

    Attributes:
      count: Number of updates so far.
      key: The PRNG key of the next update, or None where nothing is random.
      aux: The auxiliary output of the center pass of the last update whose gradient was
        finite; `aux_init` at first.
      diagnostics: The last update's :class:`otmdr_jax.Diagnostics`; NaN at first.
    """

    count: jax.Array  # type: ignore[assignment]  # as in Optax: hides tuple.count
    key: jax.Array | None
    aux: PyTree
    diagnostics: Diagnostics


def otmdr(
    loss_fn: Callable[..., Any],
    key: jax.Array | None = None,
    *,
    rho: Any = PAPER_RHO,
    num_particles: int = 1,
    noise_std: jax.typing.ArrayLike = 0.0,
    split: str = "random",
    norm: str = "global",
    adaptive: bool = False,
    merge: str | None = None,
    mask: Any = None,
    has_aux: bool = False,
    aux_init: PyTree = None,
    axis_name: Any = None,
    sync_perturbation: bool = True,
    particle_map: str = "auto",
    particle_axis_name: Any = None,
    microbatch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """OT-MDR as an Optax transformation: replaces updates by the robust gradient.

    `update(updates, state, params, *, batch, loss_args=(), loss_kwargs=None)` computes
    the gradient of `loss_fn(params, batch, *loss_args, **loss_kwargs)` itself: the
    incoming `updates` are not used (pass zeros, or the parameters, and skip the
    backward pass that would make them). Other extra arguments are ignored.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      key: A PRNG key, typed or raw. It lives in the state and is split at each update.
        May be None where nothing is random.
      rho: Radii as for :func:`otmdr_jax.value_and_grad`; each one, or the whole, may
        be an Optax schedule of the number of updates so far.
      num_particles: See :func:`otmdr_jax.value_and_grad`, as for all below.
      noise_std: Standard deviation of the noise per coordinate.
      split: "random", "ordered" or "shared".
      norm: "global" or "per_leaf".
      adaptive: ASAM's element-wise scaling.
      merge: None, "sum" or "mean".
      mask: What may be perturbed.
      has_aux: Whether `loss_fn` returns (loss, aux). The state then holds aux:
        `optax.tree.get(opt_state, "aux")`.
      aux_init: With `has_aux`: a pytree of arrays of the structure, shapes and dtypes
        of aux, the initial BatchNorm statistics, say.
      axis_name: Device axis inside pmap or shard_map.
      sync_perturbation: One global perturbation, or one for each device.
      particle_map: How the K particles are mapped.
      particle_axis_name: Device axis that the K particles are spread over.
      microbatch_size: Examples that a pass differentiates at a time.

    Returns:
      An `optax.GradientTransformationExtraArgs`. To accumulate over micro-batches put
      `optax.MultiSteps` after it in the chain, around the optimizer: around the whole
      chain it would hand on the last micro-batch alone. To skip non-finite steps chain
      `optax.apply_if_finite(optimizer, n)` after it.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.value_and_grad`; `has_aux` without
        `aux_init`; at the update a missing batch, or an aux of another structure.

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
    radii_at, num_radii = _schedule(rho)
    options = dict(
        num_particles=num_particles,
        noise_std=noise_std,
        split=split,
        norm=norm,
        adaptive=adaptive,
        merge=merge,
        mask=mask,
        has_aux=has_aux,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        particle_map=particle_map,
        particle_axis_name=particle_axis_name,
        microbatch_size=microbatch_size,
    )
    compute = robust_gradient(loss_fn, (0.0,) * num_radii, **options)
    if has_aux and aux_init is None:
        raise ValueError(
            "has_aux=True needs aux_init, a pytree of the structure, shapes and dtypes "
            "of aux: it fixes the state's structure before the first update."
        )

    def init_fn(params):
        del params
        # Each array is new, the caller's key and aux_init copied: whoever donates the
        # state must neither donate one buffer twice nor lose what is theirs.
        shapes = ((), (), (), (num_radii,), (), (num_particles,))
        diagnostics = Diagnostics(
            *[jnp.full(shape, jnp.nan, jnp.float32) for shape in shapes]
        )
        own_key, aux = jax.tree.map(jnp.array, (key, aux_init if has_aux else None))
        return OtmdrState(jnp.zeros((), jnp.int32), own_key, aux, diagnostics)

    def update_fn(
        updates,
        state,
        params=None,
        *,
        batch=None,
        loss_args=(),
        loss_kwargs=None,
        **extra_args,
    ):
        del updates, extra_args
        if params is None:
            raise ValueError(
                "the robust gradient is taken at the parameters: call "
                "tx.update(updates, state, params, batch=batch)."
            )
        if batch is None:
            raise TypeError(
                "the robust gradient is computed from the batch: call "
                "tx.update(updates, state, params, batch=batch)."
            )
        next_key, step_key = _split(state.key)
        result = compute(
            params,
            batch,
            *loss_args,
            key=step_key,
            rho=radii_at(state.count),
            **(loss_kwargs or {}),
        )
        diagnostics = jax.tree.map(
            lambda new, old: new.astype(old.dtype),
            result.diagnostics,
            state.diagnostics,
        )
        # A step that apply_if_finite will skip leaves no NaN statistics behind either.
        finite = jnp.isfinite(result.diagnostics.grad_norm)
        aux = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            _like(result.aux, state.aux),
            state.aux,
        )
        count = optax.safe_increment(state.count)
        return result.grads, OtmdrState(count, next_key, aux, diagnostics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sam(
    loss_fn: Callable[..., Any],
    rho: Any = 0.05,
    *,
    norm: str = "global",
    adaptive: bool = False,
    mask: Any = None,
    has_aux: bool = False,
    aux_init: PyTree = None,
    axis_name: Any = None,
    sync_perturbation: bool = True,
    microbatch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-Aware Minimization: OT-MDR with one step on the whole batch.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius; 0.05 as in Foret et al. for CIFAR-10. Several radii give
        several ascent steps; schedules as in :func:`otmdr`.
      norm: "global" or "per_leaf".
      adaptive: See :func:`asam`.
      mask: What may be perturbed.
      has_aux: See :func:`otmdr`.
      aux_init: See :func:`otmdr`.
      axis_name: Device axis inside pmap or shard_map.
      sync_perturbation: False is m-sharpness, each device its own perturbation.
      microbatch_size: See :func:`otmdr`.

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
    return otmdr(
        loss_fn,
        rho=rho,
        split="shared",
        norm=norm,
        adaptive=adaptive,
        mask=mask,
        has_aux=has_aux,
        aux_init=aux_init,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        microbatch_size=microbatch_size,
    )


def asam(
    loss_fn: Callable[..., Any], rho: Any = 0.5, **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the ball is measured in units of each weight.

    .. math:: w' = w + \rho \frac{T^2 g}{\|T g\|_2}, \qquad T = |w|

    The authors' implementation adds 0.01 to T for kernels and sets T = 1 for biases;
    the one here, as the released code of OT-MDR, does neither.

    Args:
      loss_fn: See :func:`otmdr_jax.value_and_grad`.
      rho: The radius; 0.5 as in Kwon et al. for CIFAR-10.
      **options: As for :func:`sam`.

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
    if "adaptive" in options:
        raise TypeError("asam is adaptive already: leave adaptive out, or use sam.")
    return sam(loss_fn, rho, adaptive=True, **options)


def _schedule(rho: Any) -> tuple[Callable[[jax.Array], tuple], int]:
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
