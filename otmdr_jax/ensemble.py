r"""OT-MDR for a uniform distribution over several models (section 4.2.2, Eqs. 11-12).

Each of M members climbs on its own: its own split of the batch, noise and gradient
norm. Members of one architecture are stacked, with a leading axis of M on every leaf;
members of different architectures are a tuple. Their prediction is the mean of their
probabilities, :func:`log_mean_probs`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from otmdr_jax import collectives, mapping, tree
from otmdr_jax import gradients as single
from otmdr_jax.gradients import PAPER_RHO, RobustGradient
from otmdr_jax.options import MEMBER_MAPS, check_word

PyTree = Any


def value_and_grad(
    loss_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    rho: Any = PAPER_RHO,
    *,
    member_map: str = "auto",
    member_axis_name: Any = None,
    own_batches: bool = False,
    **options: Any,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""The robust gradient of every member of an ensemble.

    .. math::
        g_m = \frac1K \sum_{k=1}^K \nabla L_B(w_{mk}^S), \qquad m = 1, \dots, M

    with the particles of :func:`otmdr_jax.value_and_grad` around each member. Member m
    is a run of its own with the m-th key: to the bit where members are scanned, to
    rounding where they are mapped in another way.

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` of one member, as for
        :func:`otmdr_jax.value_and_grad`. For a tuple of members one function for all,
        or a tuple of M functions.
      rho: Radii, the same for all members.
      member_map: How members of one architecture are mapped: "vmap", "unroll", "scan",
        or "auto". A matter of speed and memory alone; see `docs/performance.md`.
        Different architectures are always unrolled.
      member_axis_name: Name of the device axis inside `jax.shard_map` that stacked
        members are spread over, each device its part. It says which of the keys are
        this device's: nothing is exchanged between members.
      own_batches: Whether each member has a batch of its own: a leading axis of M on
        every leaf of the batch, or a tuple of M batches for a tuple of members.
      **options: Those of :func:`otmdr_jax.value_and_grad`, for every member.

    Returns:
      `grad_fn(members, batch, *args, key=None, rho=None, **kwargs)`, which returns
      `(values, grads)` or, with `has_aux`, `((values, aux), grads)`. `values` is (M,);
      `grads` and `aux` are stacked or a tuple, as the members are. `args` are per
      member, as the members are (BatchNorm statistics, say); `kwargs` are shared.
      `key` is one key, split into M, or M keys.

    Raises:
      ValueError, TypeError: As :func:`otmdr_jax.value_and_grad`; members whose leaves
        do not share their leading axis; functions, arguments, batches or keys that are
        not one for each member.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from otmdr_jax import ensemble
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w - 1.0) ** 2)
      >>> grad_fn = jax.jit(ensemble.value_and_grad(loss_fn, rho=(0.01, 0.02)))
      >>> members = jnp.zeros((5, 2))
      >>> values, grads = grad_fn(members, jnp.eye(2), key=jax.random.key(0))
      >>> values.shape, grads.shape
      ((5,), (5, 2))

    Reference:
      Nguyen et al., `Optimal Transport Model Distributional Robustness
      <https://arxiv.org/abs/2306.04178>`_, NeurIPS 2023, section 4.2.2.
    """
    compute = robust_gradient(
        loss_fn,
        rho,
        member_map=member_map,
        member_axis_name=member_axis_name,
        own_batches=own_batches,
        **options,
    )
    has_aux = options.get("has_aux", False)

    def grad_fn(members, batch, *args, key=None, rho=None, **kwargs):
        found = compute(members, batch, *args, key=key, rho=rho, **kwargs)
        return ((found.value, found.aux) if has_aux else found.value), found.grads

    return grad_fn


def robust_gradient(
    loss_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    rho: Any = PAPER_RHO,
    *,
    member_map: str = "auto",
    member_axis_name: Any = None,
    own_batches: bool = False,
    **options: Any,
) -> Callable[..., RobustGradient]:
    """:func:`value_and_grad` with everything it knows, diagnostics included.

    Args:
      loss_fn: See :func:`value_and_grad`, as for all that follow.
      rho: Radii.
      member_map: How members are mapped.
      member_axis_name: Device axis that they are spread over.
      own_batches: Whether each has its own batch.
      **options: Those of :func:`otmdr_jax.value_and_grad`.

    Returns:
      A function like that of :func:`value_and_grad` which returns a
      :class:`otmdr_jax.RobustGradient`: value and diagnostics with a leading axis of M,
      aux and gradient as the members are.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import ensemble
      >>> def loss_fn(w, batch):
      ...     return 0.5 * jnp.sum(w**2) + 0.0 * jnp.mean(batch)
      >>> gradient = ensemble.robust_gradient(loss_fn, rho=0.5, split="shared")
      >>> found = gradient(jnp.array([[3.0, 4.0], [0.6, 0.8]]), jnp.zeros(2))
      >>> [round(float(gap), 3) for gap in found.diagnostics.gap]
      [2.625, 0.625]
    """
    check_word("member_map", member_map, MEMBER_MAPS)
    functions = _functions(loss_fn)
    computes = [single.robust_gradient(f, rho, **options) for f in functions]

    def compute(members, batch, *args, key=None, rho=None, **kwargs):
        per_member = (*args, batch) if own_batches else args
        count = _check_all(members, per_member, len(computes))

        def of_member(run):
            def member(wait, params, own_key, own_args, own_batch):
                part = wait(own_batch if own_batches else batch)
                return run(params, part, *own_args, key=own_key, rho=rho, **kwargs)

            return member

        found = mapping.each(
            _each_or_one([of_member(run) for run in computes], members),
            (
                members,
                member_keys(key, count, member_axis_name),
                _rows(args, members),
                batch if own_batches else None,
            ),
            member_map,
        )
        if not is_tuple(members):
            return found
        value, aux, grads, diagnostics = zip(*found, strict=True)
        stacked = tree.stack(diagnostics)
        return RobustGradient(jnp.stack(value), aux, grads, stacked)

    return compute


def count_members(members: PyTree) -> int:
    """M: the leading axis that all leaves share, or the length of a tuple.

    Raises:
      ValueError: No members, or leaves that do not share their leading axis.
    """
    if is_tuple(members):
        if not members:
            raise ValueError("an ensemble needs at least one member, got none.")
        return len(members)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(members)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or not all(shapes) or sizes == {(0,)}:
        raise ValueError(
            "members of one architecture must be stacked: one leading axis of M on "
            f"every leaf, got shapes {sorted(set(shapes))[:8]}. Stack them with "
            "otmdr_jax.tree.stack; members that differ are a tuple."
        )
    return shapes[0][0]


def member_keys(key: Any, count: int, axis_name: Any = None) -> Any:
    """The keys of the members that are here: (M,) of them; None for no key.

    Args:
      key: One key, typed or raw, which is split into one for each member; or M keys,
        which are taken as they are.
      count: M, the members of this device.
      axis_name: Device axis that members are spread over, or None: a single key is
        split into those of all devices, each of which takes its own.

    Raises:
      ValueError: Keys that are neither one nor M.
    """
    if key is None:
        return None
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    rank = jnp.ndim(key) - (0 if typed else 1)
    if rank == 1 and key.shape[0] == count:
        return key
    if rank != 0:
        raise ValueError(
            f"key must be one key, or one for each of {count} members, got an array "
            f"of shape {key.shape}."
        )
    axes = collectives.axes_of(axis_name)
    if not axes:
        return jax.random.split(key, count)
    collectives.check_bound(axes)
    keys = jax.random.split(key, count * jax.lax.axis_size(axes))
    start = count * jax.lax.axis_index(axes)
    return jax.lax.dynamic_slice_in_dim(keys, start, count)


def per_member(
    optimizer: optax.GradientTransformation,
    *,
    member_args: Sequence[str] = ("value", "grad"),
) -> optax.GradientTransformationExtraArgs:
    """Lifts an Optax transformation to members: norms, counts and states are of each.

    Around stacked members a bare `optax.clip_by_global_norm` would clip them by one
    norm over all, and a count or an injected hyper-parameter would be one for all.

    Args:
      optimizer: Any transformation of one member.
      member_args: Names of extra arguments that are per member, with a leading axis of
        M (or tuples, for a tuple of members): by default what `optax.contrib.
        reduce_on_plateau` and line searches take. Others are handed on whole.

    Returns:
      A transformation of stacked members, or of a tuple of them. Its state is the
      optimizer's with a leading axis of M on every leaf, or a tuple of states. Typed
      PRNG keys in it are made different for each member: those of
      `per_member(otmdr(loss_fn, key))` are independent.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from otmdr_jax import ensemble
      >>> tx = ensemble.per_member(optax.clip_by_global_norm(1.0))
      >>> grads = jnp.array([[3.0, 4.0], [0.3, 0.4]])
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> [round(float(x), 4) for x in updates.ravel()]  # the second was shorter than 1
      [0.6, 0.8, 0.3, 0.4]
    """
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        count = count_members(params)
        if is_tuple(params):
            return tuple(_own_keys(inner.init(p), i) for i, p in enumerate(params))
        return jax.vmap(lambda p, i: _own_keys(inner.init(p), i))(
            params, jnp.arange(count)
        )

    def update_fn(updates, state, params=None, **extra_args):
        own = {k: extra_args.pop(k) for k in member_args if k in extra_args}

        def update(updates, state, params, own):
            return inner.update(updates, state, params, **own, **extra_args)

        if not is_tuple(updates):
            return jax.vmap(update)(updates, state, params, own)
        found = [
            update(
                updates[i],
                state[i],
                None if params is None else params[i],
                {name: values[i] for name, values in own.items()},
            )
            for i in range(count_members(updates))
        ]
        return tuple(zip(*found, strict=True))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def log_mean_probs(log_probs: jax.Array, axis: int = 0) -> jax.Array:
    """The ensemble's prediction: log of the mean of its members' probabilities.

    Args:
      log_probs: (M, ..., C) log-probabilities of M members.
      axis: The members' axis.

    Returns:
      (..., C) log-probabilities: exact where the probabilities themselves underflow.

    Example:
      >>> import jax.numpy as jnp
      >>> from otmdr_jax import ensemble
      >>> p = jnp.array([[0.9, 0.1], [0.5, 0.5]])
      >>> [round(float(p), 4) for p in jnp.exp(ensemble.log_mean_probs(jnp.log(p)))]
      [0.7, 0.3]
    """
    members = log_probs.shape[axis]
    return jax.nn.logsumexp(log_probs, axis=axis) - jnp.log(float(members))


def joint_loss(
    logits_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    loss: Callable[[jax.Array, PyTree], jax.Array],
    *,
    has_aux: bool = False,
    member_map: str = "auto",
) -> Callable[..., Any]:
    r"""The released code's joint variant: one loss on the members' mean probability.

    .. math:: L(\theta_{1:M}) = \ell\Big(\log \frac1M \sum_m p_{\theta_m}(x), y\Big)

    It is the loss of one model whose parameters are all members, to be given to
    :func:`otmdr_jax.value_and_grad` itself: the gradient norm is then one over all
    members, as in the released code. The paper trains members independently
    (:func:`value_and_grad` of this module).

    Args:
      logits_fn: (params, batch, *args) -> (B, C) logits of one member, or (logits,
        aux). For a tuple of members one function, or a tuple of M.
      loss: ((B, C) log-probabilities, batch) -> scalar, the mean over the batch.
      has_aux: Whether `logits_fn` returns (logits, aux).
      member_map: As for :func:`value_and_grad`.

    Returns:
      `loss_fn(members, batch, *args)` -> loss, or (loss, aux) with aux stacked or a
      tuple; `args` are per member, as the members are.

    Example:
      >>> import jax, jax.numpy as jnp, optax, otmdr_jax
      >>> from otmdr_jax import ensemble
      >>> def nll(log_probs, batch):
      ...     return -jnp.mean(jnp.take_along_axis(log_probs, batch["y"][:, None], 1))
      >>> loss_fn = ensemble.joint_loss(lambda w, batch: batch["x"] @ w, nll)
      >>> members = jnp.zeros((3, 2, 4))  # of 2 features and 4 classes
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([0, 3])}
      >>> round(float(loss_fn(members, batch)), 4)  # log 4
      1.3863
      >>> grad_fn = otmdr_jax.value_and_grad(
      ...     loss_fn, **otmdr_jax.preset("released-cifar10")
      ... )
      >>> grad_fn(members, batch)[1].shape
      (3, 2, 4)

    Reference: the code released with Nguyen et al., 2023.
    """
    check_word("member_map", member_map, MEMBER_MAPS)
    functions = _functions(logits_fn)

    def joint(members, batch, *args):
        _check_all(members, args, len(functions))

        def of_member(function):
            def member(wait, params, own_args):
                del wait  # their backward passes run together: nothing is saved
                out = function(params, batch, *own_args)
                logits, aux = out if has_aux else (out, None)
                wide = logits.astype(tree.accumulation_dtype(logits))
                return jax.nn.log_softmax(wide), aux

            return member

        found: Any = mapping.each(
            _each_or_one([of_member(f) for f in functions], members),
            (members, _rows(args, members)),
            member_map,
        )
        if is_tuple(members):
            log_probs, aux = zip(*found, strict=True)
            found = jnp.stack(log_probs), aux
        log_probs, aux = found
        value = loss(log_mean_probs(log_probs), batch)
        return (value, aux) if has_aux else value

    return joint


def is_tuple(members: PyTree) -> bool:
    """Whether members are a tuple of models; lists and NamedTuples are one model's."""
    return type(members) is tuple


def _functions(function: Any) -> list[Callable[..., Any]]:
    return list(function) if isinstance(function, (tuple, list)) else [function]


def _each_or_one(functions: list, members: PyTree) -> Any:
    """One function for stacked members, one for each of a tuple."""
    if not is_tuple(members):
        return functions[0]
    return functions * len(members) if len(functions) == 1 else functions


def _rows(args: tuple, members: PyTree) -> Any:
    """Arguments that are tuples of M -> M tuples of arguments; stacked ones as is."""
    if not is_tuple(members):
        return args
    return [tuple(arg[i] for arg in args) for i in range(len(members))]


def _check_all(members: PyTree, per_member: tuple, functions: int) -> int:
    """Checks that there is one of everything for each member; returns M."""
    count, different = count_members(members), is_tuple(members)
    if functions > 1 and not (different and functions == count):
        raise ValueError(
            f"{functions} functions need a tuple of as many members, got "
            + (f"{count}." if different else "stacked members, which share one.")
        )
    for values in per_member:
        if different:
            if not is_tuple(values) or len(values) != count:
                raise ValueError(
                    f"an argument must be a tuple of {count}, one for each member, got "
                    f"{type(values).__name__}. What all members share is passed by "
                    "name."
                )
            continue
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(values)]
        if any(shape[:1] != (count,) for shape in shapes):
            raise ValueError(
                f"an argument must have a leading axis of {count}, one for each "
                f"member, got shapes {sorted(set(shapes))[:8]}. What all members share "
                "is passed by name."
            )
    return count


def _own_keys(state: PyTree, index: Any) -> PyTree:
    """Typed PRNG keys of a member's state, made its own."""

    def fold(leaf):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return jax.random.fold_in(leaf, index)
        return leaf

    return jax.tree.map(fold, state)
