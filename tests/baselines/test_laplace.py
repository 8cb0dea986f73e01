"""Laplace approximations, against explicit Jacobians, closed forms and laplax."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from otmdr_jax import models
from otmdr_jax.baselines import curvature
from otmdr_jax.baselines.laplace import _check_last_layer
from otmdr_jax.experiments import methods
from tests.marks import slow_but

STRUCTURES = curvature.STRUCTURES


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
    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
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
    @pytest.mark.slow
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

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize(
        "structure", slow_but([x for x in STRUCTURES if x != "last-layer"], STRUCTURES)
    )
    def test_an_image_that_is_not_finite_is_left_out(self, structure, bad):
        """It is as if it were not there; training had skipped its batches."""
        images = points(12)
        method, state = state_of(Net(), images, structure=structure, num_samples=2)
        of_batch = method.finalize.of_batch
        got = of_batch(state, (images.at[3].set(bad), jnp.ones(12)))
        want = of_batch(state, (images, jnp.ones(12).at[3].set(0.0)))
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
        )

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize(
        "structure", slow_but([x for x in STRUCTURES if x != "diagonal"], STRUCTURES)
    )
    def test_narrow_parameters_have_the_posterior_of_wide_ones(self, structure, dtype):
        images, found = points(40), []
        method, state = state_of(Net(), images, structure=structure)
        narrow = jax.tree.map(lambda x: x.astype(dtype), state.params)
        for params in (narrow, jax.tree.map(jnp.float32, narrow)):
            sums = method.finalize.of_batch(
                state._replace(params=params), (images, jnp.ones(40))
            )
            fitted = method.finalize.finish(state._replace(params=params), sums)
            found.append((sums, jnp.exp(method.predict(fitted, images))))
        (got, probs), (want, wanted) = found
        jax.tree.map(lambda x: np.testing.assert_equal(x.dtype, jnp.float32), got)
        for name in got.keys() - {"mismatch", "scale"}:
            flat = [jax.flatten_util.ravel_pytree(x[name])[0] for x in (got, want)]
            assert_allclose(*flat, atol=0.02 * float(jnp.max(jnp.abs(flat[1]))))
        assert_allclose(probs, wanted, atol=0.05)

    @pytest.mark.slow
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_logits_have_its_mean_and_covariance(self, structure):
        images = points(40)

        # Over many draws those of f(x) + J (w - w*): J Sigma J^T.
        model, delta, count = Net(), 0.7, 6000
        method, state = state_of(
            model, images, structure=structure, num_samples=count, prior_precision=delta
        )
        found = method.finalize.of_batch(state, (images, jnp.ones(40)))
        log_probs = jax.jit(method.predict)(
            method.finalize.finish(state, found), images[:2]
        )
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

    @pytest.mark.slow
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
        found = method.finalize.of_batch(state, (images, jnp.ones(60)))
        draws = method.finalize.finish(state, found).method_state.draws
        got = np.cov((draws[:, :, 1] - draws[:, :, 0]).T)
        scale = np.sqrt(np.diag(covariance))
        assert_allclose(
            got / np.outer(scale, scale), covariance / np.outer(scale, scale), atol=0.08
        )

    @pytest.mark.slow
    def test_a_strong_prior_gives_the_mode_and_a_weak_one_more_doubt(self):
        images = points(40)
        entropies = []
        for delta in (1e10, 1.0, 0.01):
            method, state = state_of(
                Net(), images, structure="diagonal", prior_precision=delta
            )
            found = method.finalize.of_batch(state, (images, jnp.ones(40)))
            log_probs = method.predict(method.finalize.finish(state, found), images)
            mode = method.predict(state, images)
            assert mode.shape == (1, 40, 3) and log_probs.shape == (30, 40, 3)
            if delta == 1e10:
                assert_allclose(log_probs, np.tile(mode, (30, 1, 1)), atol=1e-3)
            entropies.append(float(np.mean(np.var(log_probs, axis=0))))
        assert entropies == sorted(entropies)

    @pytest.mark.slow
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_no_curvature_gives_no_prior(self, structure):
        """Draws had a length of 1e17: the marginal likelihood is highest at 0."""
        images = points(12)
        method, state = state_of(Net(), images, structure=structure, num_samples=2)
        found = method.finalize.of_batch(state, (images, jnp.zeros(12)))
        with pytest.raises(ValueError, match="Give a prior_precision"):
            method.finalize.finish(state, found)
        given, _ = state_of(
            Net(), images, structure=structure, num_samples=2, prior_precision=4e8
        )  # the prior alone is left
        drawn = given.finalize.finish(state, found)
        mode = method.predict(state, images)
        assert_allclose(given.predict(drawn, images), mode.repeat(2, 0), atol=1e-2)

    @pytest.mark.slow
    def test_a_head_that_is_not_the_last_layer_is_refused(self):
        images = points(40)

        class Scaled(Net):
            def apply(self, params, state, images, *, train):
                logits, state = super().apply(params, state, images, train=train)
                return jnp.tanh(logits), state

        method, state = state_of(Scaled(), images)
        found = method.finalize.of_batch(state, (images, jnp.ones(40)))
        with pytest.raises(ValueError, match="an affine map of its input"):
            method.finalize.finish(state, found)
        # Of members, one of which diverged, as well.
        two = {"mismatch": jnp.array([jnp.nan, 9.0]), "scale": jnp.ones(2)}
        with pytest.raises(ValueError, match="they differ from these by 3 of"):
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

    @pytest.mark.slow
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
        kept = method.finalize.finish(
            state, method.finalize.of_batch(state, (images, ones))
        )
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
