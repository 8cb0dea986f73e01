"""Every option of every public function is seen in what it gives, or is refused.

`TABLE` says of each public function how it is run, and of each of its options with what
other value it is run again: numbers must change, or for what is a matter of speed and
placement the traced program. An option that is not in the table fails a test.
"""

import functools
import inspect
import math
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import otmdr_jax
from otmdr_jax import baselines, bnn, ensemble, parallel
from otmdr_jax.core.options import RobustOptions
from otmdr_jax.core.signatures import fields_of
from otmdr_jax.experiments import building, cli, config, methods, training
from otmdr_jax.experiments.methods.riding import Riding
from tests import toy

KEY = jax.random.key(0)
PARAMS, BATCH = jax.tree.map(jnp.asarray, toy.regression_problem(batch=8))
MASK = {"w": True, "b": False}
MEMBERS = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), PARAMS)
POSTERIOR = bnn.init(PARAMS, sigma=0.1, mask=True)
# What is never left as a default: ascent steps that are long enough to be seen.
RHO = (0.3, 0.4)


# -- how an option is seen -------------------------------------------------------------


class Seen(typing.NamedTuple):
    """How an option is seen.

    Attributes:
      value: What it is changed to.
      given: Options beside it, before and after.
      before: What it is changed from; the default, if left out.
      by: A function of (run, options, arguments) to what is compared.
    """

    value: typing.Any
    given: dict = {}
    before: typing.Any = inspect.Parameter.empty
    by: typing.Callable | None = None


def numbers(run, options):
    return run(options)


def program(run, options):
    """The traced program: of what is a matter of speed and memory."""
    return str(jax.make_jaxpr(lambda: run(options))())


def on_devices(run, options):
    """Numbers on two devices along "data", each with half of the batch."""
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), BATCH)
    return jax.vmap(functools.partial(run, options), axis_name="data")(halves)


def program_on_devices(run, options):
    """The program on devices along "data" and "other"."""
    mesh = jax.make_mesh((2, 2), ("data", "other"), (jax.sharding.AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        lambda _: run(options), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    return str(jax.make_jaxpr(mapped)(0.0))


def differ(one, other):
    """Whether numbers differ by more than rounding, or programs at all."""
    if isinstance(one, str):
        return one != other
    one, other = (
        jax.tree.map(
            lambda x: (
                jax.random.key_data(x)
                if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
                else x
            ),
            tree,
        )
        for tree in (one, other)
    )
    if jax.tree.structure(one) != jax.tree.structure(other):
        return True
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(
        jnp.shape(a) != jnp.shape(b)
        or not np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in pairs
    )


def with_steps(run, options):
    chain = options["sampler"] == "langevin"
    return run(options | ({"num_steps": 2} if chain else {}))


_DRAW = {"sampler": "first_order", "rho": 0.3, "norm": "global"}
_CHAIN = {"sampler": "langevin", "rho": 0.3, "norm": "global", "tilt": 0.5}
# Options of gradients, wherever they are; a function may say otherwise.
COMMON = {
    "sampler": Seen("langevin", _DRAW | {"tilt": 0.5}, "first_order", with_steps),
    "inverse_temperature": Seen(5.0, _DRAW, before=0.1),
    "tilt": Seen(0.9, _DRAW, before=0.1),
    "num_steps": Seen(3, _CHAIN, before=2),
    "step_size": Seen(0.9, _CHAIN | {"num_steps": 2}),
    "project": Seen(True, {"norm": "global"}),
    "rho": Seen((0.6, 0.8)),
    "num_particles": Seen(2),
    "noise_std": Seen(0.5),
    "split": Seen("ordered"),
    "merge": Seen("sum"),
    "particle_axis_name": Seen("other", {"num_particles": 2}, by=program_on_devices),
    "norm": Seen("none"),
    "mask": Seen(MASK),
    "adaptive": Seen(True),
    "fisher": Seen(2.0),
    "num_subbatches": Seen(2),
    "sync_perturbation": Seen(False, {"axis_name": "data"}, by=on_devices),
    "particle_map": Seen("unroll", {"num_subbatches": 2}, by=program),
    "has_aux": Seen(True),
    "axis_name": Seen("data", by=on_devices),
    "microbatch_size": Seen(4, by=program),
    "weights": Seen(lambda batch: jnp.arange(8.0), {"microbatch_size": 4}),
    "aux_init": Seen(jnp.ones(4), {"has_aux": True}, before=jnp.zeros(4)),
    "key": Seen(jax.random.key(1), before=KEY),
}
STEP = {"rho": Seen(0.9)}


# -- how functions are run -------------------------------------------------------------


def loss_of(options, loss=toy.regression):
    """The loss, with an aux where the options say so."""
    if not options.get("has_aux"):
        return loss
    return lambda params, *rest: (loss(params, *rest), params["w"])


def without_diagnostics(found):
    return found._replace(diagnostics=None) if hasattr(found, "diagnostics") else found


def gradient(build, center=PARAMS, *, memories=None, **base):
    """How a function of a loss to a gradient is run, at a center."""

    def run(options, batch=BATCH):
        options = base | options
        fn = build(loss_of(options), **options)
        if memories is None:
            return without_diagnostics(fn(center, batch, key=KEY))
        found = [fn(memory, center, batch, key=KEY) for memory in memories]
        return [(without_diagnostics(one), memory) for one, memory in found]

    return run


def transformation(build, *, steps=1, **base):
    """How an Optax transformation is run: its updates, and its last state."""

    def run(options, batch=BATCH):
        options = base | options
        if options.get("has_aux"):
            options.setdefault("aux_init", jnp.zeros(4))
        tx = build(loss_of(options), **options)
        state, found, center = tx.init(PARAMS), [tx.init(PARAMS).aux], PARAMS
        for _ in range(steps):
            updates, state = tx.update(PARAMS, state, center, batch=batch)
            center = jax.tree.map(lambda w, u: w - 0.1 * u, center, updates)
            found.append(updates)
        return found, without_diagnostics(state)

    return run


def rule(build, **base):
    """How an update that divides by a precision is run, twice."""

    def run(options):
        options = base | options
        tx = build(options.pop("learning_rate", 0.1), **options)
        state, found = tx.init(PARAMS), []
        for factor in (1.0, -3.0):
            updates, state = tx.update(
                jax.tree.map(lambda x, f=factor: f * x, PARAMS),
                state,
                PARAMS,
                precision=jax.tree.map(jnp.ones_like, PARAMS),
            )
            found.append(updates)
        return found

    return run


def plain(function, *args, **base):
    """How a function that returns arrays is run."""
    return lambda options: function(*args, **(base | options))


def sampled(options, batch=BATCH):
    """The particles, and what is known of them."""

    def loss(params, batch, factor=1.0):
        return factor * factor * toy.regression(params, batch)

    options = {"batch": batch, "key": KEY, "rho": RHO, "sampler": "ascent"} | options
    return otmdr_jax.sample_particles(loss_of(options, loss), PARAMS, **options)


def member_gradient(build):
    def run(options, batch=BATCH):
        options = {"rho": RHO, **options}
        if options.get("own_batches"):
            batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), batch)
        return build(loss_of(options), **options)(MEMBERS, batch, key=KEY)

    return run


def stateful(build, center=PARAMS, **base):
    """How a functional form of the dual is run: what two steps give, and the state."""

    def run(options, batch=BATCH):
        options = base | options
        if options.get("own_batches"):
            batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), batch)
        dual = build(loss_of(options), **options)
        state, found = dual.init(), []
        for _ in range(2):
            result, state = dual.apply(state, center, batch, key=KEY)
            found.append(without_diagnostics(result))
        return found, state

    return run


def member_transformation(build, **base):
    """The same for a transformation of all members."""

    def run(options, batch=BATCH):
        options = base | options
        if options.get("has_aux"):
            options.setdefault("aux_init", jnp.zeros((2, 4)))
        if options.get("own_batches"):
            batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), batch)
        tx = build(loss_of(options), **options)
        state, found = tx.init(MEMBERS), [tx.init(MEMBERS).aux]
        for _ in range(2):
            updates, state = tx.update(MEMBERS, state, MEMBERS, batch=batch)
            found.append(updates)
        return found, without_diagnostics(state)

    return run


def joint(options):
    def logits(params, batch):
        out = batch["x"] * params["w"][None]
        return (out, params["b"]) if options.get("has_aux") else out

    loss = ensemble.joint_loss(logits, lambda p, batch: -jnp.mean(p[:, 0]), **options)
    return loss(MEMBERS, BATCH)


def per_member(options):
    tx = ensemble.per_member(optax.contrib.reduce_on_plateau(patience=1), **options)
    state = tx.init(MEMBERS)
    value = jnp.array([1.0, 2.0]) if options["member_args"] else 1.0
    for _ in range(3):
        _, state = tx.update(MEMBERS, state, MEMBERS, value=value)
    return state


def fitted(options):
    return bnn.FittedNormal(**options).kl(PARAMS, jax.tree.map(jnp.exp, PARAMS))


def dynamic(options):
    tx = baselines.dynamic(optax.sgd(0.1), **options)
    params = {"kernel": jax.random.normal(KEY, (6, 5)), "bias": jnp.ones(5)}
    state = tx.init(params)
    params = baselines.dst.apply(state.masks, params)
    for _ in range(2):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state.masks


class Model:
    """A linear model whose input it standardises, as BatchNorm does."""

    batchnorm_momentum = 0.9
    dropout = 0.5

    def init(self, key, images):
        shape = (math.prod(images.shape[1:]), 3)
        head = {"kernel": jax.random.normal(key, shape), "bias": jnp.zeros(3)}
        return {"head": head}, {"mean": jnp.zeros(())}

    def apply(self, params, state, images, *, train, keys=None):
        x = images.reshape(len(images), -1)
        if keys is not None:
            one = keys if keys.ndim == 0 else keys[0]
            x = x * jax.random.bernoulli(one, 0.5, x.shape)
        mean = 0.9 * state["mean"] + 0.1 * jnp.mean(x) if train else state["mean"]
        head = params["head"]
        return (x - mean) @ head["kernel"] + head["bias"][None], {"mean": mean}


class Flat(Model):
    """Parameters that are one array, which a mask of one bool fits; no dropout."""

    dropout = 0.0

    def init(self, key, images):
        params, state = super().init(key, images)
        return params["head"]["kernel"], state

    def apply(self, params, state, images, *, train):
        head = {"kernel": params, "bias": jnp.zeros(3)}
        return super().apply({"head": head}, state, images, train=train)


IMAGES = jax.random.normal(KEY, (8, 2, 2, 1))
LABELS = jnp.arange(8) % 3


def stepped(method, steps=2):
    state = method.init(KEY, IMAGES)
    for _ in range(steps):
        state, _ = method.step(state, (IMAGES, LABELS))
    return state


def method(options):
    """A training method: its state after two steps, and what it predicts."""
    options = {"name": "otmdr", "rho": RHO, **options}
    made = methods.create(options.pop("name"), Model(), optax.sgd(0.1), **options)
    state = stepped(made)
    return state, made.predict(state, IMAGES)


def squares(outputs, targets):
    """A loss of its own for each example: of a regression, not of classes."""
    return jnp.mean(jnp.square(outputs - targets[:, None]), -1)


def riding(build, *args, seen=None, **base):
    """A method around SGD: its predictions after two steps."""

    def run(options):
        one = methods.create("sgd", Model(), optax.sgd(0.1))
        made = build(one, *args, **(base | options))
        state = stepped(made)
        if seen is not None:
            found = made.finalize.of_batch(state, seen)
            state = made.finalize.finish(state, found)
        return made.predict(state, IMAGES)

    return run


# -- the table -------------------------------------------------------------------------

BAYES = {
    "num_data": Seen(10),
    "prior_std": Seen(0.5),
    "prior": Seen(bnn.ScaleMixture()),
    "kl_weight": Seen(9.0),
    "norm": Seen("joint"),
    "sigma_gradient": Seen("particle"),
    "weight_noise": Seen("each_step"),
    "estimator": Seen("local"),
}
WHOLE = {
    "learning_rate": Seen(0.3),
    "num_data": Seen(5.0, before=50.0),
    "weight_decay": Seen(0.3),
    "b1": Seen(0.2),
    "b2": Seen(0.1),
    "rho": Seen(0.9),
    "clip_norm": Seen(1e-3),
}
BSAM = WHOLE | {
    "precision_init": Seen(4.0),
    "damping": Seen(3.0),
    "order": Seen("paper"),
}
IVON = WHOLE | {
    "hess_init": Seen(4.0),
    "mc_samples": Seen(3),
    "clip_radius": Seen(1e-3),
    "debias": Seen(False),
    "rescale": Seen(False, {"hess_init": 4.0}),
}
MEMBER = {
    "member_map": Seen("unroll", by=program),
    "member_axis_name": Seen("other", by=program_on_devices),
    "own_batches": Seen(True),
}
DUAL = {
    "rho": Seen(0.7),
    "power": Seen(3.0, {"max_ratio": 1.5}),
    "num_steps": Seen(2),
    "max_ratio": Seen(0.5),
    "lambda_init": Seen(2.0),
    "lambda_optimizer": Seen(optax.sgd(1.0), {"lambda_init": 0.5}),
}
LOOK = {
    "alpha": Seen(0.1),
    "every": Seen(1),
    # vmap cannot stand for devices around its branch.
    "axis_name": Seen("data", by=program_on_devices),
    "sync_perturbation": Seen(False, {"axis_name": "data"}, by=program_on_devices),
}
_bsam = dict(num_data=50.0, weight_decay=0.1)
_whole = dict(**_bsam, learning_rate=0.1, key=KEY)
_ONES = jax.tree.map(jnp.ones_like, PARAMS)
_AUX = jnp.zeros((2, 4))
_SCHEDULE = lambda step: 0.1 - 0.01 * step  # noqa: E731

# A public function -> how it is run, and how its options are seen beside `COMMON`.
TABLE = {
    otmdr_jax.value_and_grad: (gradient(otmdr_jax.value_and_grad, rho=RHO), {}),
    otmdr_jax.robust_gradient: (gradient(otmdr_jax.robust_gradient, rho=RHO), {}),
    otmdr_jax.otmdr: (transformation(otmdr_jax.otmdr, key=KEY, rho=RHO), {}),
    otmdr_jax.sam: (transformation(otmdr_jax.sam, rho=RHO), {}),
    otmdr_jax.asam: (transformation(otmdr_jax.asam, rho=RHO), {}),
    otmdr_jax.dual: (transformation(otmdr_jax.dual, rho=0.3, steps=2), DUAL),
    otmdr_jax.dual_gradient: (stateful(otmdr_jax.dual_gradient, rho=0.3), DUAL),
    otmdr_jax.sample_particles: (
        sampled,
        {
            "microbatch_size": Seen(2, by=program),
            # Micro-batches of a half of the batch: with one alone there is no mean.
            "weights": Seen(lambda batch: jnp.arange(8.0), {"microbatch_size": 2}),
            "particle_map": Seen("unroll", {"num_particles": 2}, by=program),
            "loss_args": Seen((2.0,), before=(1.0,)),
            "batch": Seen(jax.tree.map(jnp.cos, BATCH), before=BATCH),
        },
    ),
    otmdr_jax.preset: (
        lambda options: str(otmdr_jax.preset("released-cifar10", **options)),
        {"num_particles": Seen(2)},
    ),
    ensemble.value_and_grad: (
        member_gradient(ensemble.value_and_grad),
        MEMBER,
    ),
    ensemble.robust_gradient: (member_gradient(ensemble.robust_gradient), MEMBER),
    ensemble.dual: (
        member_transformation(ensemble.dual, rho=0.3),
        MEMBER | DUAL | {"aux_init": Seen(_AUX + 1, {"has_aux": True}, before=_AUX)},
    ),
    ensemble.dual_gradient: (
        stateful(ensemble.dual_gradient, MEMBERS, rho=0.3),
        MEMBER | DUAL,
    ),
    ensemble.joint_loss: (joint, MEMBER),
    ensemble.per_member: (
        per_member,
        {"member_args": Seen((), before=("value",))},
    ),
    ensemble.log_mean_probs: (
        plain(ensemble.log_mean_probs, jnp.eye(2, 3)),
        {"axis": Seen(1)},
    ),
    ensemble.member_keys: (
        plain(ensemble.member_keys, KEY, 2),
        {"axis_name": Seen("other", by=program_on_devices)},
    ),
    bnn.value_and_grad: (
        gradient(bnn.value_and_grad, POSTERIOR, num_data=50, rho=RHO),
        BAYES,
    ),
    bnn.robust_gradient: (
        gradient(bnn.robust_gradient, POSTERIOR, num_data=50, rho=RHO),
        BAYES,
    ),
    bnn.dual_gradient: (
        stateful(bnn.dual_gradient, POSTERIOR, num_data=50, rho=0.3),
        BAYES | DUAL,
    ),
    bnn.sgvb: (gradient(bnn.sgvb, POSTERIOR, num_data=50), BAYES),
    bnn.sgvb_gradient: (gradient(bnn.sgvb_gradient, POSTERIOR, num_data=50), BAYES),
    bnn.init: (
        plain(bnn.init, PARAMS, mask=True),
        {"sigma": Seen(0.5), "mask": Seen(MASK)},
    ),
    bnn.draw: (
        plain(bnn.draw, PARAMS, KEY, mask=True),
        {
            "mean_std": Seen(0.5),
            "raw_mean": Seen(-1.0),
            "raw_std": Seen(0.5),
            "mask": Seen(MASK),
        },
    ),
    bnn.predict: (
        plain(bnn.predict, lambda w, x: x @ w["w"], POSTERIOR, BATCH["x"], key=KEY),
        {
            "num_samples": Seen(2),
            "mean_only": Seen(True),
            "sample_map": Seen("vmap", by=program),
        },
    ),
    bnn.preset: (
        lambda options: str(bnn.preset("released", **options)),
        {"num_particles": Seen(2)},
    ),
    bnn.kl: (
        plain(bnn.kl, POSTERIOR, prior=bnn.ScaleMixture(), key=KEY),
        {"prior": Seen(bnn.Normal()), "num_samples": Seen(7)},
    ),
    bnn.log_mean_probs: (plain(bnn.log_mean_probs, jnp.eye(2, 3)), {"axis": Seen(1)}),
    bnn.convert_beta: (
        plain(bnn.convert_beta, 0.5, "batch", num_data=50, batch_size=5),
        {"num_data": Seen(7), "batch_size": Seen(2)},
    ),
    bnn.blundell: (
        lambda options: bnn.blundell(3, **options)(1),
        {"weight": Seen(0.3)},
    ),
    bnn.warmup: (lambda options: bnn.warmup(3, **options)(1), {"weight": Seen(0.3)}),
    bnn.Normal: (lambda o: bnn.Normal(**o).log_prob(PARAMS), {"std": Seen(3.0)}),
    bnn.ScaleMixture: (
        lambda options: bnn.ScaleMixture(**options).log_prob(PARAMS),
        {"wide_std": Seen(3.0), "narrow_std": Seen(0.1), "weight": Seen(0.1)},
    ),
    bnn.FittedNormal: (fitted, {"per": Seen("all")}),
    baselines.gsam: (
        transformation(baselines.gsam, rho=RHO),
        {"alpha": Seen(0.9)},
    ),
    baselines.gsam_gradient: (
        gradient(baselines.gsam_gradient, rho=RHO),
        {"alpha": Seen(0.9)},
    ),
    baselines.looksam: (
        transformation(baselines.looksam, rho=RHO, steps=2),
        LOOK,
    ),
    baselines.looksam_gradient: (
        gradient(
            baselines.looksam_gradient,
            rho=RHO,
            # A step that climbs, and one that does not.
            memories=[baselines.LookMemory(jnp.int32(n), _ONES) for n in (0, 1)],
        ),
        LOOK,
    ),
    baselines.fisher_sam: (
        transformation(baselines.fisher_sam, rho=RHO),
        {"eta": Seen(9.0)},
    ),
    baselines.bsam: (transformation(baselines.bsam, steps=2, **_whole), BSAM),
    baselines.bsam_gradient: (
        gradient(baselines.bsam_gradient, memories=[_ONES], **_bsam),
        BSAM,
    ),
    baselines.bsam_rule: (rule(baselines.bsam_rule, weight_decay=0.1), BSAM),
    baselines.bsam_divisor: (
        plain(baselines.bsam_divisor, PARAMS, _ONES),
        {"order": Seen("paper")},
    ),
    baselines.ivon: (transformation(baselines.ivon, steps=2, **_whole), IVON),
    baselines.ivon_gradient: (
        gradient(baselines.ivon_gradient, memories=[_ONES], **_bsam),
        IVON,
    ),
    baselines.ivon_rule: (rule(baselines.ivon_rule, weight_decay=0.1), IVON),
    baselines.follow: (
        lambda options: baselines.follow(_SCHEDULE, 0.5, 0.1, 0.1, **options)(3),
        {"rate_min": Seen(0.05)},
    ),
    baselines.dynamic: (
        plain(
            lambda **options: dynamic(options),
            key=KEY,
            density=0.3,
            rate=0.5,
            steps=(1, 2),
        ),
        {
            "density": Seen(0.5),
            "rate": Seen(0.2),
            "steps": Seen((2,)),
            "growth": Seen("random"),
            "escapes": Seen((2,)),
            "escape_rate": Seen(0.1, {"escapes": (1, 2)}),
        },
    ),
    baselines.average: (
        riding(baselines.average, Model(), (1, 2), seen=IMAGES),
        {"rank": Seen(2, by=program), "num_samples": Seen(3, {"rank": 2})},
    ),
    baselines.laplace: (
        riding(baselines.laplace, Model(), seen=(IMAGES, jnp.ones(8))),
        {
            "structure": Seen("diagonal"),
            "num_samples": Seen(3),
            "prior_precision": Seen(9.0),
        },
    ),
    baselines.mc_dropout: (
        riding(baselines.mc_dropout, Model()),
        {"num_samples": Seen(3), "mean_only": Seen(True)},
    ),
    baselines.example_keys: (
        plain(baselines.example_keys, KEY, 4),
        {"axis_name": Seen("other", by=program_on_devices)},
    ),
    methods.create: (
        method,
        {
            "label_smoothing": Seen(0.3),
            "smoothing": Seen("others", {"label_smoothing": 0.3}),
            "loss": Seen(squares),
            "classes": Seen(False, {"loss": squares}),
            "freeze": Seen(("head/bias",)),
            "sum_particles": Seen(True, {"num_particles": 2}),
            "loss_scaling": Seen(True),
        },
    ),
    methods.cross_entropy: (
        plain(methods.cross_entropy, jnp.eye(3), jnp.arange(3)),
        {
            "label_smoothing": Seen(0.3),
            "smoothing": Seen("others", {"label_smoothing": 0.3}),
        },
    ),
}


def options_of(function):
    """The parameters of a function that may be left out, or are given by name."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
        or parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def name_of(function):
    """As users call it: what is in core is in `otmdr_jax` itself."""
    room = function.__module__.split(".")[1]
    return f"{'otmdr_jax' if room == 'core' else room}.{function.__name__}"


ROWS = [
    pytest.param(function, name, id=f"{name_of(function)}-{name}")
    for function in TABLE
    for name in options_of(function)
]
FUNCTIONS = [pytest.param(function, id=name_of(function)) for function in TABLE]


BEFORE = {}


def seen_before(function, by, options):
    """What is seen before an option is changed: once for all options of a function.

    Values are told apart by identity, since arrays and functions are among them: those
    of rows are kept by the table.
    """
    key = function, by, tuple((name, id(value)) for name, value in options.items())
    if key not in BEFORE:
        run = TABLE[function][0]
        BEFORE[key] = found = by(run, options)
        if isinstance(found, str):  # the text is of the program alone
            assert not differ(found, by(run, options))
    return BEFORE[key]


# -- tests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", [otmdr_jax, ensemble, bnn, baselines], ids=lambda module: module.__name__
)
def test_the_table_has_every_public_function_with_options(module):
    public = (getattr(module, name) for name in module.__all__)
    missing = [
        name_of(function)
        for function in public
        if callable(function)
        and not issubclass(type(function), type)
        and options_of(function)
        and function not in TABLE
    ]
    assert not missing, f"say in TABLE how the options of {missing} are seen"


@pytest.mark.slow
@pytest.mark.parametrize(("function", "name"), ROWS)
def test_every_option_is_seen(function, name):
    run, own = TABLE[function]
    see = (COMMON | own).get(name)
    assert see is not None, f"say in TABLE how {name} of {name_of(function)} is seen"
    by = see.by or numbers
    before = see.given
    if see.before is not inspect.Parameter.empty:
        before = before | {name: see.before}
    after = see.given | {name: see.value}
    found = seen_before(function, by, before)
    assert differ(found, by(run, after)), f"{name} does nothing"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_docstrings_describe_every_option(function):
    doc = inspect.getdoc(function)
    # Of a dataclass they are attributes, described in the class.
    missing = [
        x for x in options_of(function) if not re.search(rf"^ *{x}: ", doc, re.M)
    ]
    assert not missing


@pytest.mark.parametrize(
    "function", [row for row in FUNCTIONS if row.values[0] is not methods.create]
)
def test_what_is_no_option_is_refused_by_name(function):
    """Options of other functions, and misspelt ones; `TestMethods` has those of
    `methods.create`, which hands them on."""
    run, own = TABLE[function]
    takes = inspect.signature(function).parameters
    every = set(fields_of(RobustOptions)) | set(own) | {"particles", "momentum"}
    for name in sorted(every - set(takes)):
        with pytest.raises(TypeError, match=rf"\b{name}\b"):
            run({name: COMMON[name].value if name in COMMON else 1})


DEFINED = [function for function in TABLE if hasattr(function, "__wrapped__")]


@pytest.mark.parametrize(
    "function", [pytest.param(function, id=name_of(function)) for function in DEFINED]
)
def test_signatures_are_those_of_the_one_definition(function):
    """Name, type, default and text of each option; a TypeError that lists them."""
    parameters = inspect.signature(function).parameters
    hidden = inspect.signature(inspect.unwrap(function)).parameters["options"]
    (kind,) = typing.get_args(hidden.annotation)
    assert fields_of(kind)
    text = " ".join(inspect.getdoc(function).split())
    for name, field in fields_of(kind).items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == field.default
        assert parameters[name].annotation == field.type
        assert f"{name}: {' '.join(field.text.split())}" in text
    assert "**options" not in text
    with pytest.raises(TypeError) as caught:
        function(toy.regression, axisname="data")
    assert str(caught.value) == (
        f"{name_of(function)} takes no axisname (did you mean axis_name?); it takes "
        f"{', '.join(list(parameters)[1:])}."
    )


class TestCombinations:
    def test_devices_that_climb_alone_need_an_axis(self):
        for function in (otmdr_jax.value_and_grad, otmdr_jax.sam, baselines.gsam):
            with pytest.raises(ValueError, match="axis_name is None: name the axis"):
                function(toy.regression, sync_perturbation=False)

    def test_an_aux_to_start_from_needs_a_loss_with_aux(self):
        with pytest.raises(ValueError, match="aux_init is where .* has_aux=True"):
            otmdr_jax.sam(toy.regression, aux_init=jnp.zeros(4))

    @pytest.mark.parametrize("name", otmdr_jax.PRESETS)
    def test_presets_are_options(self, name):
        preset = otmdr_jax.preset(name, num_particles=2)
        otmdr_jax.value_and_grad(toy.regression, **preset)
        otmdr_jax.otmdr(toy.regression, KEY, **preset)

    def test_a_merge_of_one_gradient_is_that_gradient(self):
        """Why merge is not refused with one radius: it says nothing false."""
        found = [
            otmdr_jax.value_and_grad(
                toy.regression, rho=0.3, split="shared", merge=merge
            )(PARAMS, BATCH)
            for merge in (None, "sum", "mean")
        ]
        assert not differ(found[0], found[1]) and not differ(found[0], found[2])


class TestSubbatchesOfAPosterior:
    """With one kappa they are the mean over runs on parts of the batch."""

    OPTIONS = dict(num_data=50, rho=RHO, split="ordered", norm="joint")

    @pytest.mark.slow
    @pytest.mark.parametrize("sigma", ["center", "center_first", "particle"])
    def test_against_a_loop(self, sigma):
        options = self.OPTIONS | {"sigma_gradient": sigma, "weight_noise": "each_step"}
        one = bnn.robust_gradient(toy.regression, **options)
        four = bnn.robust_gradient(toy.regression, num_subbatches=4, **options)
        parts = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], BATCH)
                 for i in range(4)]  # fmt: skip
        each = [one(POSTERIOR, part, key=KEY) for part in parts]
        want = jax.tree.map(lambda *x: sum(x) / 4, *each)
        got = four(POSTERIOR, BATCH, key=KEY)
        for name in ("value", "grads", "nll", "kl"):
            assert not differ(getattr(got, name), getattr(want, name)), name

    @pytest.mark.slow
    def test_on_devices_they_are_those_of_one(self):
        options = self.OPTIONS | {"num_subbatches": 4}
        alone = bnn.value_and_grad(toy.regression, **options)
        spread = bnn.value_and_grad(toy.regression, axis_name="data", **options)
        mapped = jax.shard_map(
            lambda q, batch, key: spread(q, batch, key=key),
            mesh=jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,)),
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
        )
        want = alone(POSTERIOR, BATCH, key=KEY)
        assert not differ(jax.jit(mapped)(POSTERIOR, BATCH, KEY), want)

    def test_parts_must_be_of_one_size(self):
        fn = bnn.value_and_grad(toy.regression, num_data=50, num_subbatches=3)
        with pytest.raises(ValueError, match="num_subbatches=3 must divide it"):
            fn(POSTERIOR, BATCH, key=KEY)


class TestMethods:
    """`methods.create` hands options on: each is seen in a step, or refused by name."""

    OPTIONS = tuple(name for name in fields_of(RobustOptions) if name != "has_aux")
    NEEDED = {
        "sgvb": {"num_data": 50},
        "otmdr-bnn": {"num_data": 50},
        "otmdr-dual-bnn": {"num_data": 50},
        "bsam": {"num_data": 50, "weight_decay": 0.1, "learning_rate": 0.1},
        "ivon": {"num_data": 50, "weight_decay": 0.1, "learning_rate": 0.1},
        "snapshot": {"ends": (1, 2)},
    }

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name",
        [
            *(n for n, kind in methods.METHODS.items() if not issubclass(kind, Riding)),
            "snapshot",
        ],
    )
    def test_options_are_seen_or_refused(self, name):
        needed = self.NEEDED.get(name, {})
        kind = methods.METHODS[name]
        if hasattr(kind, "rho") and name != "bsam":
            needed = needed | {"rho": RHO[:1] if "dual" in name else RHO}
        rule = optax.identity() if kind.has_own_update else optax.sgd(0.1)

        def run(options):
            made = methods.create(name, Flat(), rule, **needed, **options)
            return stepped(made, steps=1)

        values = {
            "adaptive": name != "asam",
            "mask": False,
            "norm": "global" if name == "otmdr-bnn" else "none",
            "split": "ordered" if "otmdr" in name else "random",
        }
        axes = {"axis_name", "particle_axis_name", "sync_perturbation"}
        before = functools.cache(lambda by: by(run, {}))
        for option in self.OPTIONS:
            see = COMMON[option]
            value = values.get(option, see.value)
            given = see.given
            by = program_on_devices if option in axes else program
            try:
                after = by(run, given | {option: value})
            except (TypeError, ValueError) as error:
                # By its name, or by that of what must go with it.
                assert any(x in str(error) for x in (option, *given)), (name, option)
                continue
            other = by(run, given) if given else before(by)
            # Without the programs themselves, which are pages long.
            assert differ(after, other), (name, option)

    def test_what_a_method_has_no_use_for_is_refused(self):
        model, rule = Model(), optax.sgd(0.1)
        for name in ("sgd", "gsam", "looksam", "sgvb"):
            with pytest.raises(TypeError, match="no particles to add up"):
                methods.create(name, model, rule, sum_particles=True)
        for name in ("dst", "laplace", "mc-dropout"):
            with pytest.raises(TypeError, match="leave ends out"):
                methods.create(name, model, rule, ends=(1, 2))


class TestRuns:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(optimizer="adam", nesterov=True), "nesterov=True does nothing"),
            (dict(nesterov=True, momentum=0), "nesterov=True does nothing with momen"),
            (dict(decay_all=False, weight_decay=0), "nothing with weight_decay=0"),
            (dict(smoothing="others"), "nothing with label_smoothing=0"),
            (dict(plateau_factor=0.5), "with schedule='cosine', but with plateau"),
            (dict(plateau_patience=3), "plateau_patience=3 does nothing"),
            (
                dict(method="sgvb", posterior_init="released", posterior_std=0.1),
                "posterior_std=0.1 does nothing with posterior_init='released'",
            ),
        ],
    )
    def test_options_that_another_one_makes_idle_are_refused(self, options, message):
        chosen = config.TrainConfig(steps=1, **options)
        with pytest.raises(ValueError, match=message):
            training.train(chosen, show_progress=False)

    def test_a_presets_optimizer_may_be_changed(self):
        chosen = config.preset("paper-bnn-cifar10")
        chosen.replace(optimizer="sgd").check_used()

    @pytest.mark.slow
    def test_a_run_with_an_idle_option_is_still_read(self, tmp_path, capsys):
        """Older versions trained it."""
        run = tmp_path / "run"
        start = ["train", "--optimizer", "adam", "--steps", "2", "--mesh", "data=1"]
        cli.main([*start, "--method", "sgd", "--output", str(run), "--quiet"])
        old = config.load(run / "config.json").replace(nesterov=True)
        config.save(old, run / "config.json")
        cli.main(["evaluate", str(run)])
        cli.main(["train", "--resume", str(run), "--quiet"])
        assert "Accuracy" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(method="sam", rho=0.05), "rho must be a tuple of radii"),
            (dict(method=["sgd"]), "method must be a name"),
            (dict(method="snapshot", base_method=["sgd"]), "base_method must be a"),
            (dict(method="fge", cycle_rates=0.05), "cycle_rates must be two rates"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
    )
    def test_values_of_another_type_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            config.TrainConfig(**options)

    def test_a_posterior_has_subbatches(self):
        found = config.TrainConfig(method="otmdr-bnn", num_subbatches=4)
        run = methods.Run(found, 100, 5, 10, optax.constant_schedule(0.1), None)
        assert found.method.options(run)["num_subbatches"] == 4

    @pytest.mark.parametrize("method", ["otmdr", "sam", "sgd", "sgvb"])
    def test_axes_are_handed_to_methods_that_have_a_use_for_them(self, method):
        options = {} if method.startswith("sg") else {"sync_perturbation": False}
        made = config.TrainConfig(method=method, **options)
        for mesh in (None, parallel.make_mesh("data=2,particle=1")):
            building.methods_of(made, 3, 50, 10, 5, mesh)
