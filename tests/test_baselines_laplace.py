"""Laplace approximations, against explicit Jacobians, closed forms and laplax."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from otmdr_jax import (
    building,
    cli,
    config,
    cost,
    data,
    methods,
    models,
    predictors,
    programs,
    report,
    restoring,
    runs,
    training,
)
from otmdr_jax.baselines import curvature, laplace
from otmdr_jax.baselines.laplace import _check_last_layer
from otmdr_jax.config import TrainConfig
from tests.sets import small_digits
from tests.test_training import assert_same_bits, stop_after

STRUCTURES = curvature.STRUCTURES
TINY = TrainConfig(
    mesh="data=1", method="laplace", epochs=3, batch_size=64, log_every=2, seed=3,
    num_samples=6, eval_every=2,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Small networks compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def small():
    return small_digits(320)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """Uninterrupted runs: of each structure, and of the base alone."""
    folder = tmp_path_factory.mktemp("straight")
    found = {
        name: training.train(
            dataclasses.replace(TINY, laplace=name),
            small,
            folder / name,
            show_progress=False,
        )
        for name in STRUCTURES
    }
    base = dataclasses.replace(TINY, method="sgd", num_samples=30)
    found["sgd"] = training.train(base, small, folder / "sgd", show_progress=False)
    return found


@dataclasses.dataclass(frozen=True)
class Net:
    """A smooth network small enough for explicit Jacobians; images (B, 1, 1, D)."""

    hidden: int = 4
    classes: int = 3
    bias: bool = True
    last: str = "head"

    def init(self, key, images):
        keys = jax.random.split(key, 4)
        body = {"kernel": jax.random.normal(keys[0], (images.shape[-1], self.hidden))}
        head = {"kernel": jax.random.normal(keys[1], (self.hidden, self.classes))}
        if self.bias:
            head["bias"] = jax.random.normal(keys[2], (self.classes,))
        return {"body": body, self.last: head}, {}

    def apply(self, params, state, images, *, train):
        x = jnp.tanh(images[:, 0, 0] @ params["body"]["kernel"])
        head = params[self.last]
        bias = head.get("bias", jnp.zeros(self.classes))
        return x @ head["kernel"] + bias[None], state


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Linear softmax regression: its Gauss-Newton matrix is the Hessian."""

    classes: int = 3

    def init(self, key, images):
        shape = (images.shape[-1], self.classes)
        head = {"kernel": jax.random.normal(key, shape), "bias": jnp.zeros(shape[1])}
        return {"head": head}, {}

    def apply(self, params, state, images, *, train):
        x = images[:, 0, 0]
        return x @ params["head"]["kernel"] + params["head"]["bias"][None], state


def points(n, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, 1, 1, d)), jnp.float32)


def state_of(model, images, **options):
    method = methods.create("laplace", model, optax.sgd(0.1), **options)
    return method, method.init(jax.random.key(1), images)


def curve(model, params, images, structure, mask=None):
    mask = jnp.ones(len(images)) if mask is None else mask
    of_batch = jax.jit(curvature.of_batch, static_argnums=(0, 5))
    return of_batch(model, params, {}, images, mask, structure)


def jacobians(model, params, images):
    """(B, C, P) in float64, and the order of P: head last, kernel before bias."""

    def logits(params):
        return model.apply(params, {}, images, train=False)[0]

    tree = jax.jacrev(logits)(params)
    order = [tree["body"]["kernel"], tree["head"]["kernel"]]
    order += [tree["head"]["bias"]] if model.bias else []
    flat = [np.asarray(x, np.float64).reshape(*x.shape[:2], -1) for x in order]
    return np.concatenate(flat, axis=2), np.asarray(jax.nn.softmax(logits(params)))


def explicit(jac, probs):
    inner = np.einsum("nc,cd->ncd", probs, np.eye(probs.shape[1]))
    inner -= np.einsum("nc,nd->ncd", probs, probs)
    return np.einsum("ncp,ncd,ndq->pq", jac, inner, jac)


class TestCurvature:
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_is_that_of_explicit_jacobians(self, bias):
        model, images = Net(bias=bias), points(17)
        params, _ = model.init(jax.random.key(0), images)
        want = explicit(*jacobians(model, params, images))
        head = model.classes * (model.hidden + bias)
        found = curve(model, params, images, "last-layer")
        assert_allclose(found["full"], want[-head:, -head:], rtol=2e-4, atol=1e-5)
        assert float(found["mismatch"] / found["scale"]) < 1e-10
        diagonal = curve(model, params, images, "diagonal")["diagonal"]
        order = [diagonal["body"]["kernel"], diagonal["head"]["kernel"]]
        order += [diagonal["head"]["bias"]] if bias else []
        got = np.concatenate([np.ravel(x) for x in order])
        assert_allclose(got, np.diag(want), rtol=2e-4, atol=1e-5)

    def test_of_a_linear_model_it_is_the_hessian_of_the_loss(self):
        model, images = Softmax(), points(30)
        params, _ = model.init(jax.random.key(0), images)
        labels = np.random.default_rng(0).integers(3, size=30)

        def loss(weights):  # the bias as the last row, summed over examples
            x = np.concatenate([np.asarray(images)[:, 0, 0], np.ones((30, 1))], axis=1)
            logits = jnp.asarray(x) @ weights
            return 30 * methods.cross_entropy(logits, jnp.asarray(labels))

        weights = jnp.concatenate(
            [params["head"]["kernel"], params["head"]["bias"][None]]
        )
        want = jax.hessian(loss)(weights).reshape(18, 18)
        found = curve(model, params, images, "last-layer")
        assert_allclose(found["full"], want, rtol=1e-3, atol=1e-4)
        diagonal = curve(model, params, images, "diagonal")["diagonal"]["head"]
        got = np.concatenate([diagonal["kernel"], diagonal["bias"][None]])
        assert_allclose(got.ravel(), np.diag(want), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("structure", STRUCTURES)
    @settings(deadline=None, max_examples=5)
    @given(cut=st.integers(1, 12))
    def test_batches_and_masked_examples_make_no_difference(self, structure, cut):
        model, images = Net(), points(13)
        params, _ = model.init(jax.random.key(0), images)
        whole = curve(model, params, images, structure)
        mask = jnp.arange(13) < cut
        parts = [curve(model, params, images, structure, m) for m in (mask, ~mask)]
        both = jax.tree.map(jnp.add, *parts)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-4, 1e-4), both, whole)
        alone = curve(model, params, images[:cut], structure)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-4, 1e-4), parts[0], alone)

    def test_micro_batches_of_the_diagonal_make_no_difference(self, monkeypatch):
        model, images = Net(), points(13)
        params, _ = model.init(jax.random.key(0), images)
        whole = curve(model, params, images, "diagonal")
        monkeypatch.setattr(curvature, "NUMBERS_AT_ONCE", 4 * 35)  # four examples
        jax.clear_caches()
        parts = curve(model, params, images, "diagonal")
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-4, 1e-5), parts, whole)

    def test_factors_of_one_example_are_its_matrix(self):
        model, images = Net(), points(1)
        params, _ = model.init(jax.random.key(0), images)
        whole = curve(model, params, images, "last-layer")["full"]
        found = curve(model, params, images, "last-layer-kron")
        got = np.kron(found["features"], found["logits"] / found["count"])
        assert_allclose(got, whole, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("name", ["cnn_small", "resnet_10", "mobilenet"])
    def test_the_last_layer_of_the_zoo_is_found(self, name):
        model = models.create(name, 7)
        shape = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        key = jax.random.key(0)
        if name == "cnn_small":
            images = jax.random.normal(key, shape.shape)
            params, state = model.init(key, images)
            found = jax.jit(curvature.of_batch, static_argnums=(0, 5))(
                model, params, state, images, jnp.ones(2), "last-layer"
            )
            assert float(found["mismatch"] / found["scale"]) < 1e-8
        params, state = jax.eval_shape(lambda: model.init(key, shape))
        logits, phi = jax.eval_shape(
            lambda p, s, x: curvature.features(model, p, s, x), params, state, shape
        )
        assert logits.shape == (2, 7)
        assert phi.shape == (2, params["head"]["kernel"].shape[0] + 1)


class TestPriorPrecision:
    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 2**31 - 1), st.floats(-3, 3), st.integers(1, 40))
    def test_it_is_the_maximum_of_the_marginal_likelihood(self, seed, scale, size):
        rng = np.random.default_rng(seed)
        h = rng.exponential(size=size) * 10**scale
        norm = float(rng.exponential()) + 0.01

        def minus_evidence(log_delta):
            delta = np.exp(log_delta)
            evidence = size / 2 * log_delta - delta / 2 * norm
            return -(evidence - np.sum(np.log(h + delta)) / 2)

        bounds = (np.log(size / norm) - 40, np.log(size / norm))
        best = scipy.optimize.minimize_scalar(
            minus_evidence, bounds=bounds, method="bounded", options={"xatol": 1e-10}
        )
        got = float(curvature.prior_precision(jnp.asarray(h), jnp.asarray(norm)))
        assert minus_evidence(np.log(got)) <= best.fun + 1e-4 * abs(best.fun) + 1e-5
        used = float(curvature.effective_number(jnp.asarray(h), jnp.asarray(got)))
        assert_allclose(got, used / norm, rtol=1e-3)  # MacKay's fixed point

    def test_without_curvature_or_weights_it_is_finite(self):
        for h, norm in ((0.0, 1.0), (1.0, 0.0)):
            got = curvature.prior_precision(jnp.full(3, h), jnp.asarray(norm))
            assert 0 < float(got) and np.isfinite(float(jnp.log(got)))


class TestPosterior:
    @pytest.fixture(scope="class")
    def images(self):
        return points(40)

    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_logits_have_its_mean_and_covariance(self, structure):
        images = points(40)

        # Over many draws those of f(x) + J (w - w*): J Sigma J^T.
        model, delta, count = Net(), 0.7, 6000
        method, state = state_of(
            model, images, structure=structure, num_samples=count, prior_precision=delta
        )
        found = method.batch_statistics(state, (images, jnp.ones(40)))
        log_probs = jax.jit(method.predict)(method.settle(state, found), images[:2])
        logits, _ = model.apply(state.params, {}, images[:2], train=False)
        jac, probs = jacobians(model, state.params, images)
        want = explicit(jac, probs)
        jac = jac[:2]
        if structure == "diagonal":
            want = np.diag(np.diag(want))
        else:
            head = 15
            want, jac = want[-head:, -head:], jac[:, :, -head:]
        if structure == "last-layer-kron":
            want = np.kron(found["features"], found["logits"] / 40)
        sigma = np.linalg.inv(want + delta * np.eye(len(want)))
        # Differences of log-probabilities are those of logits.
        contrast = np.array([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
        got = np.einsum("kc,snc->snk", contrast, log_probs)
        for n in range(2):
            mean = contrast @ np.asarray(logits[n])
            cov = contrast @ jac[n] @ sigma @ jac[n].T @ contrast.T
            deviation = np.sqrt(np.diag(cov))
            away = np.abs(got[:, n].mean(0) - mean) / deviation
            assert np.all(away < 5 / np.sqrt(count))
            ratio = np.cov(got[:, n].T) / np.outer(deviation, deviation)
            assert_allclose(ratio, cov / np.outer(deviation, deviation), atol=0.08)

    def test_logistic_regression_has_its_closed_form(self):
        """Two classes are one weight vector u = w1 - w0, with twice its covariance."""
        linear_model = pytest.importorskip("sklearn.linear_model")
        x = np.random.default_rng(0).normal(size=(60, 2))
        labels = (x @ [1.5, -1.0] + np.random.default_rng(1).normal(size=60) > 0) * 1
        fit = linear_model.LogisticRegression(C=2.0, tol=1e-10).fit(x, labels)
        weights = np.append(fit.coef_[0], fit.intercept_)
        p = fit.predict_proba(x)[:, 1]
        rows = np.append(x, np.ones((60, 1)), axis=1)
        hessian = np.einsum("nd,ne,n->de", rows, rows, p * (1 - p))
        # Prior N(0, 1/delta) of w0 and w1 is N(0, 2/delta) of u.
        delta = 0.5
        covariance = np.linalg.inv(hessian + delta / 2 * np.eye(3))
        half = jnp.asarray(np.stack([-weights, weights], axis=1) / 2, jnp.float32)
        model, images = Softmax(2), jnp.asarray(x[:, None, None], jnp.float32)
        method, state = state_of(model, images, num_samples=6000, prior_precision=delta)
        head = {"kernel": half[:2], "bias": half[2]}
        state = state._replace(params={"head": head})
        found = method.batch_statistics(state, (images, jnp.ones(60)))
        draws = method.settle(state, found).method_state.draws
        got = np.cov((draws[:, :, 1] - draws[:, :, 0]).T)
        scale = np.sqrt(np.diag(covariance))
        assert_allclose(
            got / np.outer(scale, scale), covariance / np.outer(scale, scale), atol=0.08
        )

    def test_a_strong_prior_gives_the_mode_and_a_weak_one_more_doubt(self):
        images = points(40)
        entropies = []
        for delta in (1e10, 1.0, 0.01):
            method, state = state_of(
                Net(), images, structure="diagonal", prior_precision=delta
            )
            found = method.batch_statistics(state, (images, jnp.ones(40)))
            log_probs = method.predict(method.settle(state, found), images)
            mode = method.predict(state, images)
            assert mode.shape == (1, 40, 3) and log_probs.shape == (30, 40, 3)
            if delta == 1e10:
                assert_allclose(log_probs, np.tile(mode, (30, 1, 1)), atol=1e-3)
            entropies.append(float(np.mean(np.var(log_probs, axis=0))))
        assert entropies == sorted(entropies)

    def test_a_head_that_is_not_the_last_layer_is_refused(self):
        images = points(40)

        class Scaled(Net):
            def apply(self, params, state, images, *, train):
                logits, state = super().apply(params, state, images, train=train)
                return jnp.tanh(logits), state

        method, state = state_of(Scaled(), images)
        found = method.batch_statistics(state, (images, jnp.ones(40)))
        with pytest.raises(ValueError, match="an affine map of its input"):
            method.settle(state, found)
        # Of members, one of which diverged, as well.
        two = {"mismatch": jnp.array([jnp.nan, 9.0]), "scale": jnp.ones(2)}
        with pytest.raises(ValueError, match="they differ by 3 of"):
            _check_last_layer(two)
        with pytest.raises(ValueError, match="needs that layer as"):
            state_of(Net(last="top"), images)
        state_of(Net(last="top"), images, structure="diagonal")
        with pytest.raises(ValueError, match="12,000 parameters.*last-layer-kron"):
            state_of(Net(hidden=3999), images)
        for options, message in (
            (dict(structure="full"), "laplace must be one of"),
            (dict(prior_precision=0.0), "must be positive"),
            (dict(num_samples=-1), "at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                state_of(Net(), images, **options)


class TestLaplax:
    """The JAX library of Laplace approximations, where it does the same."""

    @pytest.mark.parametrize("structure", ["last-layer", "diagonal"])
    def test_curvature_posterior_and_evidence_are_its(self, structure):
        pytest.importorskip("laplax")
        from laplax.curv import cov, ggn
        from laplax.eval import likelihood

        model, images = Net(), points(25)
        params, _ = model.init(jax.random.key(0), images)
        labels = jnp.asarray(np.random.default_rng(2).integers(3, size=25))
        kind = "full" if structure == "last-layer" else "diagonal"
        weights = params["head"] if kind == "full" else params

        def of_example(input, params):
            changed = {"body": weights_of_body, "head": params}
            changed = changed if kind == "full" else params
            return model.apply(changed, {}, input[None], train=False)[0][0]

        weights_of_body = params["body"]

        def loss(logits, label):
            return optax.softmax_cross_entropy_with_integer_labels(logits, label)

        data = {"input": images, "target": labels}
        product = ggn.create_ggn_mv(of_example, weights, data, loss_fn=loss)
        theirs = cov.estimate_curvature(kind, product, layout=weights)
        found = curve(model, params, images, structure)
        if kind == "full":
            # Theirs are of the bias (3), then the kernel; the bias is our last row.
            order = np.r_[12:15, 0:12]
            ours = np.asarray(found["full"])[np.ix_(order, order)]
        else:
            ours = np.concatenate([x.ravel() for x in jax.tree.leaves(found)])
        assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)

        # Its marginal likelihood is highest where ours is.
        def evidence(delta):
            return likelihood.marginal_log_likelihood(
                theirs,
                {"prior_prec": delta},
                data,
                of_example,
                weights,
                lambda logits, label: jnp.sum(jax.vmap(loss)(logits, label)),
                kind,
                vmap_over_data=True,
            )

        method, state = state_of(model, images, structure=structure)
        state = state._replace(params=params)
        ones = jnp.ones(len(images))
        kept = method.settle(state, method.batch_statistics(state, (images, ones)))
        best = kept.method_state.prior_precision
        assert abs(float(jax.grad(evidence)(best)) * best) < 1e-2
        assert float(evidence(best)) > max(
            float(evidence(best * factor)) for factor in (0.5, 2.0)
        )
        if kind == "diagonal":
            state = cov.set_posterior_fn(kind, theirs, layout=weights)(
                {"prior_prec": best}
            ).state
            std = jax.tree.leaves(kept.method_state.std)
            got = np.concatenate([x.ravel() for x in std])
            assert_allclose(got, state["scale"], rtol=1e-3)


class TestRuns:
    def test_training_is_the_bases_bit_for_bit(self, straight):
        base = straight["sgd"]
        for name in STRUCTURES:
            run = straight[name]
            assert_same_bits(run.state, base.state)
            assert run.state.method_state is None
            assert run.metrics["epistemic"] > 0
            assert run.metrics["prior_precision"] > 0
            assert run.metrics["sharpness"] == base.metrics["sharpness"]
            # Before the end it is the mode that predicts.
            early = [
                next(r for r in one.history if r["split"] == "test")
                for one in (run, base)
            ]
            assert early[0]["step"] == 10 and early[0]["nll"] == early[1]["nll"]
            assert "epistemic" not in early[0]

    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_neither_batches_nor_devices_matter(self, structure, straight, small):
        chosen = dataclasses.replace(TINY, laplace=structure)
        state = straight[structure].state
        found = {}
        for name, size, mesh in (("a", 512, None), ("b", 100, None), ("c", 64, 2)):
            own = dataclasses.replace(chosen, eval_batch_size=size)
            if mesh:
                mesh = programs.make_mesh(dataclasses.replace(own, mesh="data=2"))
            compiled = programs.compile_programs(own, small, mesh)
            found[name] = predictors.settle(own, state, small, compiled).method_state
        for name in ("b", "c"):
            assert_allclose(
                found[name].prior_precision, found["a"].prior_precision, rtol=1e-3
            )
            assert_allclose(
                found[name].effective_parameters,
                found["a"].effective_parameters,
                rtol=1e-3,
            )
        for x, y in zip(*(jax.tree.leaves(found[n].std) for n in "ac"), strict=True):
            assert_allclose(x, y, rtol=1e-3)

    def test_some_examples_stand_for_all(self, straight, small):
        chosen = dataclasses.replace(
            TINY, laplace="diagonal", laplace_examples=100, prior_precision=2.0
        )
        compiled = programs.compile_programs(chosen, small)
        state = predictors.settle(chosen, straight["sgd"].state, small, compiled)
        kept = state.method_state
        assert predictors.settle(chosen, state, small, compiled) is state
        # The sum over those hundred, by hand, and scaled up.
        count = small.train.num_examples
        rows = np.sort(np.random.default_rng(chosen.seed).permutation(count)[:100])
        images = data.normalise(small.train.images[rows], small.mean, small.std)
        trained = straight["sgd"].state
        summed = curvature.of_batch(
            models.create("cnn_small", 10),
            trained.params,
            trained.model_state,
            images,
            jnp.ones(100),
            "diagonal",
        )["diagonal"]
        for std, h in zip(*map(jax.tree.leaves, (kept.std, summed)), strict=True):
            assert_allclose(1 / std**2, 2.0 + h * count / 100, rtol=1e-3)

    def test_a_resumed_run_is_the_same(self, small, straight, tmp_path, monkeypatch):
        stop_after(7, monkeypatch)
        with pytest.raises(training.Interrupted):
            training.train(TINY, small, tmp_path / "run", show_progress=False)
        monkeypatch.undo()
        again = training.train(
            TINY, small, tmp_path / "run", resume=True, show_progress=False
        )
        assert_same_bits(again.state, straight["last-layer"].state)
        assert_array_equal(again.log_probs, straight["last-layer"].log_probs)

    @pytest.mark.parametrize("structure", ["last-layer", "diagonal"])
    def test_members_have_their_own(self, structure, small):
        chosen = dataclasses.replace(TINY, members="2", laplace=structure, epochs=1)
        compiled = programs.compile_programs(chosen, small)
        state = compiled.init(jax.random.key(0))
        state = predictors.settle(chosen, state, small, compiled)
        kept = predictors.posteriors(chosen, state)
        assert len(kept) == 2
        assert float(kept[0].prior_precision) != float(kept[1].prior_precision)
        rows = compiled.predict(state, jnp.asarray(small.test.images[:4]))
        assert rows.shape == (12, 4, 10)
        assert set(predictors.fitted_record(chosen, state)) == {
            "prior_precision",
            "effective_parameters",
        }

    def test_float16_has_a_finite_curvature(self, small):
        chosen = dataclasses.replace(TINY, dtype="float16", laplace="diagonal", steps=2)
        result = training.train(chosen, small, show_progress=False)
        assert np.isfinite(result.metrics["nll"]) and result.metrics["epistemic"] > 0

    def test_the_mean_is_the_mode(self, small):
        chosen = dataclasses.replace(TINY, prediction="mean", num_samples=30)
        compiled = programs.compile_programs(chosen, small)
        state = compiled.init(jax.random.key(0))
        assert compiled.settle is None
        assert predictors.settle(chosen, state, small, compiled) is state
        assert compiled.predict(state, small.test.images[:4]).shape == (1, 4, 10)


def test_options():
    for options, message in (
        (dict(method="sgd", laplace="diagonal"), "sgd has no option laplace"),
        (dict(method="laplace", rho=(0.1,)), "laplace has no option rho"),
        (dict(method="laplace", members="2", ensemble="joint"), "joint ensemble"),
    ):
        with pytest.raises(ValueError, match=message):
            building.method_options(TrainConfig(**options))
    for options in (
        dict(prior_precision=0.0),
        dict(laplace_examples=0),
        dict(laplace="full"),
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            TrainConfig(**options)
    sam = TrainConfig(method="laplace", base_method="sam", rho=(0.1,))
    assert building.method_options(sam) == {"rho": (0.1,)}
    assert cost.gradient_evaluations(sam) == 2.0
    assert report.label_of(dataclasses.asdict(sam)) == "Laplace of SAM"
    mode = dataclasses.replace(sam, prediction="mean")
    assert building.method_options(mode) == {"rho": (0.1,)}
    for own in (dict(laplace="diagonal"), dict(prior_precision=1.0)):
        with pytest.raises(ValueError, match="for which nothing is fitted"):
            building.method_options(dataclasses.replace(mode, **own))
    assert callable(laplace)


def test_the_command_line_trains_and_gives_runs_a_posterior(tmp_path, capsys):
    common = ["--steps", "12", "--mesh", "data=1", "--quiet"]
    own, base = str(tmp_path / "laplace"), str(tmp_path / "sam")
    options = ["--base-method", "sam", "--num-samples", "4"]
    cli.main(["train", "--method", "laplace", "--output", own, *options, *common])
    cli.main(["train", "--method", "sam", "--output", base, *common])
    cli.main(["evaluate", own])
    result, found = (
        json.loads((tmp_path / "laplace" / name).read_text())
        for name in ("result.json", "evaluation.json")
    )
    for name in ("nll", "epistemic", "prior_precision"):
        assert_allclose(found[name], result[name], rtol=1e-4)
    assert config.load(tmp_path / "laplace" / "config.json").laplace == "last-layer"

    before = {p.name: p.read_bytes() for p in (tmp_path / "sam").glob("*.*")}
    cli.main(["evaluate", base, "--laplace", "last-layer", "--num-samples", "4"])
    out = capsys.readouterr().out
    assert "evaluation_laplace_last_layer.json" in out
    shown = " ".join(out.split())
    assert f"prior precision {result['prior_precision']:.3g}," in shown
    after = {p.name: p.read_bytes() for p in (tmp_path / "sam").glob("*.*")}
    new = {"evaluation_laplace_last_layer.json", "reliability_laplace_last_layer.png"}
    assert set(after) - set(before) == new
    assert all(after[name] == content for name, content in before.items())
    found = json.loads(after["evaluation_laplace_last_layer.json"])
    for name in ("nll", "accuracy", "epistemic", "prior_precision"):
        assert_allclose(found[name], result[name], rtol=1e-4)  # trained alike
    assert found["num_samples"] == 4 and found["settings"]["step"] == 12
    # A run that has one is given another, whole; without samples there is none.
    cli.main(["evaluate", own, "--laplace", "last-layer-kron"])
    path = tmp_path / "laplace" / "evaluation_laplace_last_layer_kron.json"
    kron = json.loads(path.read_text())
    assert kron["settings"]["prior_precision"] is None
    assert kron["prior_precision"] not in (3.0, result["prior_precision"])
    cli.main(["evaluate", own, "--prediction", "mean"])
    mode = json.loads((tmp_path / "laplace" / "evaluation.json").read_text())
    assert mode["num_samples"] is None and "prior_precision" not in mode
    for options, message in (
        (["--laplace", "last-layer"], "--overwrite"),  # of 30 samples
        (["--laplace", "diagonal", "--prediction", "mean"], "leave one of them out"),
        (["--laplace-examples", "9"], "are of --laplace"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", base, *options])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="one trained weight vector"):
        runs.write_json(
            tmp_path / "sam" / "config.json",
            {"method": "swa"},
        )
        restoring.with_laplace(tmp_path / "sam", "diagonal")
