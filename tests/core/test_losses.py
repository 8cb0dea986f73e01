"""Losses as people have them: weighted ones, without a batch, of graphs, of (x, y)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import otmdr_jax
from otmdr_jax import baselines, bnn, ensemble
from otmdr_jax.core.transform import plain
from tests import toy
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("optimized")
RHO = (0.3, 0.2)


def close(got, expected, rtol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6),
        got,
        expected,
    )


# -- weights ---------------------------------------------------------------------------


def weighted(params, batch):
    """A loss that is normalised by the sum of its weights."""
    losses = (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2
    return jnp.sum(batch["weight"] * losses) / jnp.sum(batch["weight"])


def weights_of(batch):
    return batch["weight"]


def weighted_problem(weight=None, batch=12):
    params, data = toy.regression_problem(batch=batch)
    if weight is None:
        weight = np.random.default_rng(1).uniform(0, 2, batch)
        weight[3:5] = 0
    return params, data | {"weight": np.asarray(weight, np.float32)}


def reference(params, batch, rows=slice(None)):
    """The gradient of `weighted` in NumPy: 0 where there is no weight."""
    x, y, v = (np.float64(batch[name][rows]) for name in ("x", "y", "weight"))
    residual = x @ params["w"] + params["b"] - y
    share = v / v.sum() if v.sum() else v
    grads = {"w": 2 * x.T @ (share * residual), "b": 2 * np.sum(share * residual)}
    return np.sum(share * residual**2), grads


def climb(params, steps):
    """The steps of one global norm along gradients, none for a zero one."""
    for gradient, rho in steps:
        _, g = gradient(params)
        length = np.sqrt(np.sum(g["w"] ** 2) + g["b"] ** 2)
        rho = rho / length if length else 0.0
        params = {name: params[name] + rho * g[name] for name in params}
    return params


FIRST, LAST = slice(0, 6), slice(6, 12)
HALVES = {
    "some": None,
    "none in the first part": [0] * 6 + [1, 2, 0, 1, 3, 1],
    "none in the second part": [1, 2, 0, 1, 3, 1] + [0] * 6,
}


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize("weight", HALVES)
def test_a_part_has_the_weights_of_its_examples(weight, microbatch_size):
    params, data = weighted_problem(HALVES[weight])
    fn = otmdr_jax.value_and_grad(
        weighted,
        RHO,
        split="ordered",
        weights=weights_of,
        microbatch_size=microbatch_size,
    )
    value, grads = jax.jit(fn)(params, data)
    steps = [
        (functools.partial(reference, batch=data, rows=part), rho)
        for part, rho in zip((FIRST, LAST), RHO, strict=True)
    ]
    particle = climb(jax.tree.map(np.float64, params), steps)
    close((value, grads), reference(particle, data))


def norm_of(g):
    return np.sqrt(np.sum(g["w"] ** 2) + g["b"] ** 2)


# How a climb of two steps moves, from its gradients and radii.
CLIMBS = {
    "none": (dict(norm="none"), lambda g, rho: rho * g[-1]),
    "sum": (
        dict(merge="sum"),
        lambda g, rho: rho * sum(g) / np.linalg.norm(g[-1]),
    ),
    "mean": (
        dict(merge="mean"),
        lambda g, rho: rho * sum(g) / len(g) / np.linalg.norm(g[-1]),
    ),
    "fisher": (
        dict(fisher=2.0),
        lambda g, rho: (
            rho
            * (g[-1] / (1 + 2 * g[-1] ** 2))
            / np.linalg.norm(g[-1] / np.sqrt(1 + 2 * g[-1] ** 2))
        ),
    ),
}


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("name", CLIMBS)
def test_a_climb_is_along_the_loss_of_its_own_part(name, microbatch_size):
    """Parts of very different weights: each is a batch of its own to the climb."""
    options, move = CLIMBS[name]
    params, data = weighted_problem([90, 99, 110, 80, 100, 70, 1, 2, 0, 1, 3, 1])
    result = otmdr_jax.robust_gradient(
        weighted,
        RHO,
        split="ordered",
        weights=weights_of,
        microbatch_size=microbatch_size,
        **options,
    )(params, data)

    def flat(tree):
        return np.append(tree["w"], tree["b"])

    at, seen = flat(params).astype(float), []
    for part, rho in zip((FIRST, LAST), RHO, strict=True):
        seen.append(flat(reference({"w": at[:-1], "b": at[-1]}, data, part)[1]))
        at = at + move(seen, rho)
    close((result.value, result.grads), reference({"w": at[:-1], "b": at[-1]}, data))
    (distance,) = result.diagnostics.distances
    np.testing.assert_allclose(distance, np.linalg.norm(at - flat(params)), rtol=1e-5)
    if "fisher" not in options:
        lengths = [np.linalg.norm(g) for g in seen]
        np.testing.assert_allclose(result.diagnostics.ascent_norms, lengths, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["ascent", "first_order", "langevin"])
def test_draws_are_of_the_loss_of_their_own_part(sampler, key):
    """Where each part has weight, `weights` says nothing that the loss does not."""
    params, data = weighted_problem([90, 99, 110, 80, 100, 70, 1, 2, 1, 1, 3, 1])
    options = {"rho": 0.1, "sampler": sampler, "num_particles": 2}
    if sampler == "ascent":
        options |= {"rho": RHO, "split": "ordered"}
    elif sampler == "langevin":
        options |= {"split": "ordered", "num_steps": 2}
    if sampler != "ascent":
        options["inverse_temperature"] = 5.0
    one, other = (
        otmdr_jax.sample_particles(
            weighted, params, data, key, weights=weights, **options
        )
        for weights in (None, weights_of)
    )
    close(other, one)


@pytest.mark.slow
def test_the_dual_sees_the_slope_of_each_sub_batch_itself():
    params, data = weighted_problem([90, 99, 110, 80, 100, 70, 1, 2, 0, 1, 3, 1])
    tx = otmdr_jax.dual(weighted, 0.1, num_subbatches=2, weights=weights_of)
    _, state = tx.update(params, tx.init(params), params, batch=data)
    slopes = [norm_of(reference(params, data, part)[1]) for part in (FIRST, LAST)]
    np.testing.assert_allclose(
        state.diagnostics.ascent_norms, [np.mean(slopes)], rtol=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"num_subbatches": 4}])
def test_weights_in_float16(options):
    """Two of three examples of a sub-batch have all weight: it counts four times."""
    batch = np.zeros(12, np.float32)
    batch[:2] = 1
    w = jnp.ones(2, jnp.float16)

    def loss(w, weight):
        return jnp.sum(weight / weight.sum() * w.sum() * jnp.float16(20_000)), w[0]

    fn = otmdr_jax.value_and_grad(
        loss, 0.0, split="shared", weights=lambda x: x, has_aux=True, **options
    )
    (value, aux), grads = fn(w, jnp.asarray(batch, jnp.float16))
    assert (value.dtype, aux.dtype, grads.dtype) == (jnp.float16,) * 3
    assert (float(value), float(aux)) == (40_000, 1)
    assert grads.tolist() == [20_000, 20_000]


WAYS = {
    "random": {},
    "three particles": {"num_particles": 3},
    "ordered": {"split": "ordered"},
    "shared": {"split": "shared"},
    "micro-batches": {"microbatch_size": 3},
    "micro-batches, uneven": {"microbatch_size": 5, "split": "shared"},
    "single examples": {"microbatch_size": 1},
    "sub-batches": {"num_subbatches": 3, "microbatch_size": 2},
}


@pytest.mark.parametrize(
    "way", slow_but(("random", "ordered", "micro-batches, uneven"), WAYS)
)
def test_without_a_radius_it_is_the_gradient_of_the_whole_batch(way, key):
    params, data = weighted_problem([0, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 5])
    fn = otmdr_jax.value_and_grad(weighted, (0.0, 0.0), weights=weights_of, **WAYS[way])
    close(jax.jit(fn)(params, data, key=key), reference(params, data))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_equal_weights_are_none(way, key):
    params, data = weighted_problem(np.full(12, 0.7))
    got = otmdr_jax.value_and_grad(weighted, RHO, weights=weights_of, **WAYS[way])
    expected = otmdr_jax.value_and_grad(toy.regression, RHO, **WAYS[way])
    close(got(params, data, key=key), expected(params, data, key=key))


@pytest.mark.slow
def test_weights_of_tokens(key):
    """Sequences whose padding is masked, with sequences of padding alone."""
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 5, 3)).astype(np.float32)}
    batch["label"] = rng.integers(0, 4, size=(8, 5))
    batch["label"][:5] = -100
    batch["label"][6, 2:] = -100

    def loss(w, batch):
        log_probs = jax.nn.log_softmax(batch["x"] @ w)
        mask = batch["label"] != -100
        label = jnp.where(mask, batch["label"], 0)[..., None]
        losses = -jnp.take_along_axis(log_probs, label, -1)[..., 0]
        return jnp.sum(jnp.where(mask, losses, 0)) / jnp.sum(mask)

    w = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    plain_value, plain_grads = jax.value_and_grad(loss)(w, batch)
    for options in ({}, {"num_subbatches": 2}, {"microbatch_size": 1}):
        fn = functools.partial(
            otmdr_jax.value_and_grad(
                loss, weights=lambda batch: batch["label"] != -100, **options
            ),
            w,
            batch,
            key=key,
        )
        close(fn(rho=(0.0, 0.0)), (plain_value, plain_grads))
        value, grads = fn()
        assert np.isfinite(value) and np.all(np.isfinite(grads))


def test_a_batch_without_weight_gives_zero(key):
    params, data = weighted_problem(np.zeros(12))
    value, grads = otmdr_jax.value_and_grad(weighted, weights=weights_of)(
        params, data, key=key
    )
    close((value, grads), (0.0, jax.tree.map(np.zeros_like, params)))


def test_a_loss_that_is_not_finite_shows(key):
    params, data = weighted_problem()
    data["y"][7] = np.nan
    value, _ = otmdr_jax.value_and_grad(weighted, weights=weights_of)(
        params, data, key=key
    )
    assert np.isnan(value)


def test_sub_batches_count_by_their_weights():
    params, data = weighted_problem([0] * 4 + [1, 2, 0, 1] + [5, 1, 1, 1])
    fn = otmdr_jax.value_and_grad(
        weighted, 0.3, split="shared", num_subbatches=3, weights=weights_of
    )
    value, grads = fn(params, data)
    total, expected, mean = data["weight"].sum(), {"w": 0.0, "b": 0.0}, 0.0
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        of_part = functools.partial(reference, batch=data, rows=part)
        loss, g = of_part(climb(jax.tree.map(np.float64, params), [(of_part, 0.3)]))
        share = data["weight"][part].sum() / total
        mean += share * loss
        expected = {name: expected[name] + share * g[name] for name in g}
    close((value, grads), (mean, expected))


def weighted_with_aux(params, batch):
    """Aux that is normalised as the loss is, a mean over examples, and rows."""
    losses = (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2
    share = batch["weight"] / jnp.sum(batch["weight"])
    y = batch["y"]
    aux = {"y": jnp.sum(share * y), "plain": jnp.mean(y), "count": len(y), "rows": y}
    return jnp.sum(share * losses), aux


# Part of the batch that is seen at the center -> the slices of 12 examples.
SEEN = {
    "ordered": (dict(split="ordered"), [slice(0, 6)]),
    "shared": (dict(split="shared"), [slice(0, 12)]),
    "ordered, micro-batches": (dict(split="ordered", microbatch_size=2), [slice(0, 6)]),
    "uneven micro-batches": (dict(split="shared", microbatch_size=5), [slice(0, 12)]),
    "single examples": (dict(split="shared", microbatch_size=1), [slice(0, 12)]),
    "sub-batches": (
        dict(split="ordered", num_subbatches=3),
        [slice(0, 2), slice(4, 6), slice(8, 10)],
    ),
}
LIGHT = {
    "everywhere": [3, 1, 2, 5, 1, 1, 2, 4, 1, 3, 1, 2],
    "few": [0, 0, 0, 0, 2, 0, 0, 1, 4, 0, 0, 5],
    "none in the first part": [0] * 10 + [1, 2],
    "none": [0] * 12,
}


@pytest.mark.parametrize("way", slow_but(("ordered",), SEEN))
def test_aux_and_gap_are_those_of_the_weights(way):
    """By NumPy, of the examples that the passes at the center see."""
    options, parts = SEEN[way]
    fn = jax.jit(
        otmdr_jax.robust_gradient(
            weighted_with_aux, RHO, has_aux=True, weights=weights_of, **options
        )
    )
    seen = np.concatenate([np.arange(12)[part] for part in parts])
    for weight in LIGHT.values():
        params, data = weighted_problem(weight)
        found, info = fn(params, data), fn(params, data).diagnostics
        v, y = data["weight"][seen], np.float64(data["y"])
        right = v @ y[seen] / v.sum() if v.any() else 0.0
        np.testing.assert_allclose(found.aux["y"], right, rtol=1e-5)
        np.testing.assert_array_equal(found.aux["rows"], data["y"])
        if v.any():
            center, _ = reference(params, data, seen)
            np.testing.assert_allclose(info.center_loss, center, rtol=1e-5)
            assert np.isfinite(found.aux["plain"])
        else:  # then statistics are those of all that is seen
            assert info.center_loss == found.value
            np.testing.assert_allclose(found.aux["plain"], y[seen].mean(), rtol=1e-5)
        np.testing.assert_allclose(info.gap, found.value - info.center_loss, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 3, "particle_map": "vmap"}],
)
def test_aux_of_random_parts_is_that_of_their_weights(options, key):
    """The loss as aux is the loss at the center, whatever part that is of."""
    params, data = weighted_problem(LIGHT["few"])
    fn = jax.jit(
        otmdr_jax.robust_gradient(
            lambda params, batch: (weighted(params, batch),) * 2,
            RHO,
            has_aux=True,
            weights=weights_of,
            **options,
        )
    )
    for own in jax.random.split(key, 5):
        found = fn(params, data, key=own)
        if found.diagnostics.gap != 0:
            np.testing.assert_allclose(
                found.aux, found.diagnostics.center_loss, rtol=1e-5
            )
            losses = (data["x"] @ params["w"] + params["b"] - data["y"]) ** 2
            assert losses.min() <= found.aux <= losses.max()


def test_aux_of_devices_is_that_of_their_weights():
    params, data = weighted_problem(HALVES["none in the first part"])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    fn = otmdr_jax.robust_gradient(
        weighted_with_aux,
        0.3,
        split="ordered",
        has_aux=True,
        weights=weights_of,
        axis_name="data",
    )
    specs = P(), P(), {"y": P(), "plain": P(), "count": P(), "rows": P("data")}

    def of(params, batch):
        found = fn(params, batch)
        return found.value, found.diagnostics.gap, found.aux

    mapped = jax.shard_map(of, mesh=mesh, in_specs=(P(), P("data")), out_specs=specs)
    value, gap, aux = jax.jit(mapped)(params, data)
    center, _ = reference(params, data)
    np.testing.assert_allclose(value - gap, center, rtol=1e-5)
    v = data["weight"]
    np.testing.assert_allclose(aux["y"], v @ data["y"] / v.sum(), rtol=1e-5)
    np.testing.assert_array_equal(aux["rows"], data["y"])


@pytest.mark.parametrize("options", [{}, {"num_subbatches": 4}, {"microbatch_size": 2}])
@pytest.mark.parametrize("rho", slow_but([0.3], [0.0, 0.3]))
def test_devices_count_by_their_weights(options, rho):
    """The first device has no weight at all."""
    params, data = weighted_problem(HALVES["none in the first part"])
    if rho and "num_subbatches" in options:
        options = {}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    fn = otmdr_jax.value_and_grad(
        weighted, rho, split="shared", weights=weights_of, axis_name="data", **options
    )
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    whole = functools.partial(reference, batch=data)
    particle = climb(jax.tree.map(np.float64, params), [(whole, rho)])
    close(jax.jit(mapped)(params, data), whole(particle))


@pytest.mark.parametrize(
    "tx",
    [
        otmdr_jax.sam(weighted, 0.0, weights=weights_of, microbatch_size=2),
        plain(weighted, weights=weights_of, microbatch_size=2),
        otmdr_jax.dual(weighted, 0.0, weights=weights_of, num_subbatches=6),
        baselines.gsam(weighted, 0.0, weights=weights_of, microbatch_size=2),
        baselines.looksam(weighted, 0.0, every=1, weights=weights_of, num_subbatches=6),
    ],
    ids=["sam", "plain", "dual", "gsam", "looksam"],
)
def test_transformations_take_weights(tx):
    params, data = weighted_problem(HALVES["none in the first part"])
    updates, _ = tx.update(params, tx.init(params), params, batch=data)
    close(updates, reference(params, data)[1])


def test_wrong_weights_are_refused(key):
    params, data = weighted_problem()
    with pytest.raises(TypeError, match="weights must be a function of the batch"):
        otmdr_jax.value_and_grad(weighted, weights="weight")
    for wrong in (lambda batch: 1.0, lambda batch: batch["weight"][:5]):
        with pytest.raises(ValueError, match="give each of the 12 examples a weight"):
            otmdr_jax.value_and_grad(weighted, weights=wrong)(params, data, key=key)
    with pytest.raises(TypeError, match="takes no weights"):
        bnn.value_and_grad(weighted, num_data=100, weights=weights_of)


# -- pairs -----------------------------------------------------------------------------


def pairs(z):
    """A contrastive loss: every example is a negative of every other one."""
    return jnp.mean(jax.nn.logsumexp(z @ z.T, axis=1) - jnp.sum(z * z, axis=1))


def test_pairs_of_a_part_are_those_inside_of_it():
    w, x = np.eye(3, 2, dtype=np.float32), toy.regression_problem(dim=3)[1]["x"]

    @jax.jit
    def loss(w, x):
        return pairs(jnp.tanh(x @ w))

    found = otmdr_jax.robust_gradient(loss, RHO, split="ordered")(w, x)
    first = jax.grad(loss)(w, x[:6])
    np.testing.assert_allclose(found.diagnostics.center_loss, loss(w, x[:6]), rtol=1e-5)
    moved = w + 0.3 * first / np.linalg.norm(first)
    second = jax.grad(loss)(moved, x[6:])
    moved = moved + 0.2 * second / np.linalg.norm(second)
    close((found.value, found.grads), jax.value_and_grad(loss)(moved, x))


@pytest.mark.parametrize("check_vma", slow_but([False], [True, False]))
def test_pairs_over_devices_are_gathered_inside_of_the_loss(check_vma):
    w, x = np.eye(3, 2, dtype=np.float32), toy.regression_problem(dim=3)[1]["x"]

    def gathered(w, x):
        return pairs(jax.lax.all_gather(jnp.tanh(x @ w), "data", tiled=True))

    fn = otmdr_jax.value_and_grad(gathered, 0.3, split="shared", axis_name="data")
    mapped = jax.shard_map(
        fn,
        mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    whole = otmdr_jax.value_and_grad(
        lambda w, x: pairs(jnp.tanh(x @ w)), 0.3, split="shared"
    )
    close(jax.jit(mapped)(w, x), whole(w, x))


# -- no batch, or one of graphs --------------------------------------------------------

W = jnp.array([1.0, -2.0, 0.5])
A = np.array([1.0, 3.0, 10.0])
POSTERIOR = {"num_data": 9, "kl_weight": 0.0, "rho": 0.3, "split": "shared"}


def potential(w):
    return 0.5 * jnp.sum(jnp.asarray(A, jnp.float32) * w**2)


def sam_of_potential(w, rho):
    g = A * w
    moved = w + rho * g / np.linalg.norm(g)
    return 0.5 * np.sum(A * moved**2), A * moved


@pytest.mark.parametrize("jit", [True, False])
def test_a_loss_may_have_no_batch(jit):
    fn = otmdr_jax.value_and_grad(potential, 0.3, split="shared")
    close((jax.jit(fn) if jit else fn)(W), sam_of_potential(np.asarray(W), 0.3))


@pytest.mark.parametrize("batch", [{"batch": None}, {"batch": 2.0}])
def test_what_is_given_is_passed_on(batch):
    """None is a batch like any other, and numbers without axes are too."""
    seen = []

    def loss(w, batch):
        seen.append(batch)
        return potential(w)

    otmdr_jax.value_and_grad(loss, split="shared")(W, **batch)
    assert seen == [batch["batch"]] * len(seen)


def test_further_arguments_without_a_batch():
    fn = otmdr_jax.value_and_grad(
        lambda w, *, scale: scale * potential(w), 0.3, split="shared"
    )
    value, grads = sam_of_potential(np.asarray(W), 0.3)
    close(fn(W, scale=2.0), (2 * value, 2 * grads))


@pytest.mark.parametrize(
    "tx",
    [
        otmdr_jax.sam(potential, 0.3),
        otmdr_jax.otmdr(potential, rho=0.3, split="shared"),
        otmdr_jax.dual(potential, 0.3),  # the first step
        baselines.gsam(potential, 0.3, alpha=0.0),
        baselines.looksam(potential, 0.3, every=1),
    ],
    ids=["sam", "otmdr", "dual", "gsam", "looksam"],
)
def test_transformations_of_a_loss_without_a_batch(tx):
    updates, _ = jax.jit(tx.update)(W, tx.init(W), W)
    close(updates, sam_of_potential(np.asarray(W), 0.3)[1])


@pytest.mark.parametrize(
    "tx",
    [
        plain(potential),
        baselines.bsam(
            potential,
            learning_rate=1.0,
            weight_decay=0.0,
            rho=0.0,
            num_data=jnp.inf,
            b1=0.0,
        ),
    ],
    ids=["plain", "bsam"],
)
def test_plain_gradients_of_a_loss_without_a_batch(tx):
    updates, _ = tx.update(W, tx.init(W), W)
    close(jnp.abs(updates), np.abs(A * W))


@pytest.mark.slow
def test_members_and_posteriors_of_a_loss_without_a_batch(key):
    members = jnp.stack([W, 2 * W])
    for how in ("vmap", "unroll", "scan"):
        fn = ensemble.value_and_grad(potential, 0.3, split="shared", member_map=how)
        _, grads = fn(members)
        close(grads, [sam_of_potential(np.asarray(w), 0.3)[1] for w in members])
    q = bnn.init(W, sigma=1e-6, mask=True)
    fn = bnn.value_and_grad(
        potential, num_data=9, kl_weight=0.0, rho=0.3, split="shared"
    )
    close(fn(q, key=key)[1].mean, sam_of_potential(np.asarray(W), 0.3)[1], 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split": "ordered"},
        {"split": "shared", "microbatch_size": 2},
        {"split": "shared", "num_subbatches": 2},
    ],
)
def test_what_cuts_the_batch_needs_one(options, key):
    fn = otmdr_jax.value_and_grad(potential, **options)
    with pytest.raises(
        TypeError, match='a batch that it cuts into parts.*split="shared"'
    ):
        fn(W, key=key)


def test_a_batch_that_was_forgotten():
    with pytest.raises(TypeError, match=r"called without a batch.*'batch'.*pass one"):
        otmdr_jax.value_and_grad(toy.quadratic, split="shared")(W)
    tx = otmdr_jax.sam(toy.quadratic)
    with pytest.raises(TypeError, match=r"batch=batch"):
        tx.update(W, tx.init(W), W)


GRAPH = {
    "nodes": np.arange(15, dtype=np.float32).reshape(5, 3) / 15,
    "senders": np.array([0, 1, 2, 3, 4, 0, 2]),
    "receivers": np.array([1, 2, 3, 4, 0, 2, 4]),
    "globals": np.float32(0.5),
}


def graph_loss(w, graph):
    messages = (graph["nodes"] @ w)[graph["senders"]]
    sums = jax.ops.segment_sum(messages, graph["receivers"], 5)
    return jnp.mean((sums - graph["globals"]) ** 2)


@pytest.mark.slow
def test_graphs_have_no_axis_in_common():
    adjacency = np.zeros((5, 5))
    np.add.at(adjacency, (GRAPH["receivers"], GRAPH["senders"]), 1)
    x = adjacency @ np.float64(GRAPH["nodes"])

    def gradient(w):
        return 2 * x.T @ (x @ w - 0.5) / 5

    w, g = np.float64(W), gradient(np.float64(W))
    moved = w + 0.3 * g / np.linalg.norm(g)
    value, grads = otmdr_jax.value_and_grad(graph_loss, 0.3, split="shared")(W, GRAPH)
    close((value, grads), (np.mean((x @ moved - 0.5) ** 2), gradient(moved)))
    with pytest.raises(ValueError, match="a leading example axis"):
        otmdr_jax.value_and_grad(graph_loss, split="ordered")(W, GRAPH)
    numbers = [[1.0, 2.0]] * 500
    with pytest.raises(ValueError, match=r"\(\) and 992 more\.") as caught:
        otmdr_jax.value_and_grad(graph_loss, split="ordered")(W, numbers)
    assert len(str(caught.value)) < 400
    q = bnn.init(W, sigma=1e-6, mask=True)
    fn = bnn.value_and_grad(
        graph_loss, num_data=5, kl_weight=0.0, rho=0.3, split="shared"
    )
    close(fn(q, GRAPH, key=jax.random.key(0))[1].mean, gradient(moved), 1e-4)


# -- labels beside the batch -----------------------------------------------------------


def of_two(params, x, y):
    return toy.regression(params, {"x": x, "y": y})


def indexing(params, x, y):
    """An indexing that JAX clamps where it is out of bounds."""
    logits = jnp.outer(x @ params["w"], jnp.arange(3.0))
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])


CUTS = [
    {},
    {"rho": (0.1, 0.1, 0.1)},
    {"split": "ordered"},
    {"split": "shared", "microbatch_size": 1},
    {"split": "shared", "microbatch_size": 6},
    {"split": "shared", "num_subbatches": 2},
]


@pytest.mark.parametrize("options", CUTS)
def test_labels_beside_the_batch_are_refused_where_it_is_cut(options, key):
    params, data = toy.regression_problem()
    labels = np.arange(12) % 3
    for loss, y in ((of_two, data["y"]), (indexing, labels)):
        fn = otmdr_jax.value_and_grad(loss, **options)
        with pytest.raises(
            ValueError, match=r"got 12 examples.*shape \(12,\).*\(x, y\)"
        ):
            fn(params, data["x"], y, key=key)
        with pytest.raises(ValueError, match="only the batch, the first argument"):
            fn(params, data["x"], y=y, key=key)


@pytest.mark.parametrize("options", CUTS)
def test_a_loss_that_fails_anyway_says_why_itself(options, key):
    """Statistics of the batch's length are not blamed for what they did not do."""
    params, data = toy.regression_problem()

    def loss(params, batch, statistics):
        return toy.regression(params, batch) + jnp.zeros(3) @ params["w"]

    fn = otmdr_jax.value_and_grad(loss, **options)
    with pytest.raises(TypeError, match="dot_general"):
        fn(params, data, np.ones(12, np.float32), key=key)


@pytest.mark.parametrize("options", CUTS)
def test_functions_and_words_may_stand_beside_it(options, key):
    """As Flax's `apply_fn` does."""
    params, data = toy.regression_problem()

    class Config:
        def __len__(self):
            return 12

    def loss(params, batch, function, config, mode="x"):
        assert (config, mode) == (given, "train")
        return function(toy.regression(params, batch))

    given = Config()
    fn = otmdr_jax.value_and_grad(loss, **options)
    same = otmdr_jax.value_and_grad(
        lambda params, batch: jnp.sin(toy.regression(params, batch)), **options
    )
    got = fn(params, data, jnp.sin, given, mode="train", key=key)
    close(got, same(params, data, key=key))


@pytest.mark.parametrize("how", ["vmap", "scan", "unroll"])
def test_a_flag_in_the_batch_of_members(how):
    params, data = toy.regression_problem()
    members = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)

    def loss(params, batch):
        assert batch["kind"] == "mine" and batch["train"] is True
        return toy.regression(params, batch["data"])

    batch = {"data": data, "train": True, "kind": "mine"}
    got = ensemble.value_and_grad(loss, 0.1, split="shared", member_map=how)
    want = ensemble.value_and_grad(toy.regression, 0.1, split="shared")
    close(got(members, batch), want(members, data))


@pytest.mark.parametrize("how", ["vmap", "scan", "unroll"])
def test_jax_sees_no_key_used_twice(how, key):
    """Its checker is strict: also a slice that only a trace looked at counts."""
    params, data = toy.regression_problem()
    options = dict(rho=0.1, noise_std=0.1, particle_map=how, num_particles=2)
    members = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    with jax.debug_key_reuse(True):
        jax.jit(otmdr_jax.value_and_grad(toy.regression, **options))(
            params, data, key=jax.random.clone(key)
        )
        jax.jit(ensemble.value_and_grad(toy.regression, member_map=how, **options))(
            members, data, key=jax.random.clone(key)
        )


def test_labels_beside_the_batch_serve_where_nothing_is_cut():
    params, data = toy.regression_problem()
    got = otmdr_jax.value_and_grad(of_two, split="shared")(params, data["x"], data["y"])
    close(got, otmdr_jax.value_and_grad(toy.regression, split="shared")(params, data))


@pytest.mark.parametrize("options", CUTS)
def test_statistics_of_the_batchs_length_may_stand_beside_it(options, key):
    params, data = toy.regression_problem()
    extra = np.linspace(0, 1, 12).astype(np.float32)

    def loss(params, batch, statistics, raw_key):
        return toy.regression(params, batch) + jnp.sum(statistics * params["w"][0])

    fn = otmdr_jax.value_and_grad(loss, **options)
    value, _ = fn(params, data, extra, jax.random.PRNGKey(0), key=key)
    assert np.isfinite(value)
