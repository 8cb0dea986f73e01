"""Bad input: an error before any work, that says what must hold and what came."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import otmdr_jax
from otmdr_jax import baselines, ensemble, methods
from tests import toy

PARAMS, DATA = toy.regression_problem()


def call(batch=DATA, loss=toy.regression, params=PARAMS, rho=None, key=None, **options):
    return otmdr_jax.value_and_grad(loss, **options)(params, batch, key=key, rho=rho)


CONSTRUCTION = [
    (dict(rho=()), ValueError, "one radius for each ascent step"),
    (dict(rho=-0.1), ValueError, "rho must be finite and not negative, got -0.1"),
    (dict(rho=(0.1, float("nan"))), ValueError, "rho must be finite"),
    (dict(rho="big"), TypeError, "rho must be a number"),
    (dict(rho=None), TypeError, "rho must be a number"),
    (dict(rho=np.complex64(1)), TypeError, "rho must be a real number.* complex64"),
    (dict(rho=np.array([True])), TypeError, "rho must be a real number.* bool"),
    (dict(num_particles=0), ValueError, "num_particles must be at least 1, got 0"),
    (dict(num_particles=1.5), TypeError, "num_particles must be an integer"),
    (dict(num_particles=jnp.array(2)), TypeError, "inject_hyperparams makes arrays"),
    (dict(noise_std=-1.0), ValueError, "noise_std must be finite and not negative"),
    (dict(split="half"), ValueError, "'random', 'ordered', 'shared'; got 'half'"),
    (dict(norm="l1"), ValueError, "'global', 'per_leaf', 'none'; got 'l1'"),
    (dict(merge="max"), ValueError, "None, 'sum', 'mean'; got 'max'"),
    (dict(particle_map="map"), ValueError, "'auto', 'vmap', 'unroll', 'scan'"),
    (dict(adaptive=0.01), TypeError, "adaptive must be True or False"),
    (dict(has_aux=1), TypeError, "has_aux must be True or False"),
    (dict(sync_perturbation="yes"), TypeError, "sync_perturbation must be True"),
    (dict(particle=3), TypeError, "takes no particle"),
    (dict(sync_perturbation=False), ValueError, "lets each device of axis_name climb"),
]


@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTION)
def test_refused_when_built(options, error, message):
    with pytest.raises(error, match=message):
        otmdr_jax.value_and_grad(toy.regression, **options)
    with pytest.raises(error, match=message):
        otmdr_jax.otmdr(toy.regression, jax.random.key(0), **options)


def test_refuses_a_loss_that_is_no_function():
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        otmdr_jax.value_and_grad(3.0)


CALLS = [
    (dict(), ValueError, r"pass a key, .*otmdr\(loss_fn, key\)"),
    (dict(split="ordered", noise_std=0.1), ValueError, "needs? randomness"),
    (dict(rho=-1.0, split="ordered"), ValueError, "rho must be finite"),
    (dict(batch={}, split="ordered"), ValueError, "leading example axis"),
    (dict(batch=jnp.zeros(()), split="ordered"), ValueError, "leading example axis"),
    (dict(batch=jnp.zeros((0, 3)), split="ordered"), ValueError, "batch is empty"),
    (dict(batch=jnp.zeros((0, 3)), split="shared"), ValueError, "batch is empty"),
    (
        dict(batch={"x": np.zeros((4, 4)), "y": np.zeros(3)}, split="ordered"),
        ValueError,
        "must share their leading axis",
    ),
    (
        dict(batch=jax.tree.map(lambda x: x[:1], DATA), split="ordered"),
        ValueError,
        "a batch of 1 cannot be cut into 2 parts",
    ),
    (
        dict(mask={"w": True}, split="ordered"),
        ValueError,
        "mask must have the structure of the parameters",
    ),
    (
        dict(mask={"w": False, "b": False}, split="ordered"),
        ValueError,
        "mask is False for all parameters",
    ),
    (dict(mask={"w": 1.0, "b": True}, split="ordered"), TypeError, "hold one bool"),
    (
        dict(mask={"w": np.ones(3, bool), "b": True}, split="ordered"),
        TypeError,
        "one bool for each leaf, got array",
    ),
    (
        dict(loss=lambda p, b: (b["x"] @ p["w"]) ** 2, split="ordered"),
        TypeError,
        r"real floating scalar, got shape \(6,\)",
    ),
    (
        dict(loss=lambda p, b: (jnp.sum(p["w"]), 1), split="ordered"),
        TypeError,
        "pass has_aux=True",
    ),
    (
        dict(loss=lambda p, b: jnp.sum(p["w"]), has_aux=True, split="ordered"),
        TypeError,
        r"must return \(loss, aux\)",
    ),
    (
        dict(loss=lambda p, b: jnp.argmax(p["w"]), split="ordered"),
        TypeError,
        "real floating scalar",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), CALLS)
def test_refused_when_called(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)


@pytest.mark.parametrize("size", [1, 2])
def test_refuses_a_batch_smaller_than_the_number_of_random_parts(size):
    batch = jax.tree.map(lambda x: x[:size], DATA)
    with pytest.raises(ValueError, match=f"batch of {size} cannot be cut into 3"):
        call(batch=batch, rho=(0.1, 0.1, 0.1), key=jax.random.key(0))


class Dropout(nnx.Module):
    """A model whose random state is a leaf beside its parameters."""

    def __init__(self):
        self.linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))


class TestParameters:
    """What cannot be differentiated is named, with the way out."""

    LEAVES = [
        ({"w": jnp.ones(4), "step": 3}, r"int32 at params\['step'\]"),
        ({"w": [jnp.ones(4), jax.random.key(0)]}, r"key<fry> at params\['w'\]\[1\]"),
        ({"w": jax.random.PRNGKey(0)}, r"uint32 at params\['w'\]"),
        ({"name": "dense"}, r"str at params\['name'\]"),
        (Dropout(), r"uint32 at params\.dropout\.rngs\.count"),
        (eqx.nn.MLP(4, 1, 3, 1, key=jax.random.key(0)), r"at params\.activation"),
    ]

    @pytest.mark.parametrize(("params", "message"), LEAVES)
    def test_a_leaf_that_cannot_be_differentiated_is_named(self, params, message):
        message = f"got .*{message}.*nnx.split.*equinox.partition"
        with pytest.raises(TypeError, match=message):
            call(params=params, split="shared")
        with pytest.raises(TypeError, match=message):
            otmdr_jax.sam(toy.regression).init(params)

    @pytest.mark.parametrize(
        ("params", "name"),
        [
            (Dropout(), "otmdr_jax.nnx.value_and_grad"),
            (LEAVES[-1][0], "otmdr_jax.equinox.filter_value_and_grad"),
        ],
        ids=["nnx", "equinox"],
    )
    def test_what_takes_a_model_whole_is_named(self, params, name):
        with pytest.raises(TypeError, match=f"loss. {name} takes the model as it is"):
            call(params=params, split="shared")
        with pytest.raises(TypeError, match="argument of the loss. Of a model pass"):
            call(params={"model": 3}, split="shared")

    def test_the_way_out_of_nnx_works(self):
        graphdef, params, rest = nnx.split(Dropout(), nnx.Param, ...)

        def loss(params, batch, rest):
            model = nnx.merge(graphdef, params, rest, copy=True)
            output = model.dropout(model.linear(batch["x"]))[:, 0]
            return jnp.mean((output - batch["y"]) ** 2)

        fn = otmdr_jax.value_and_grad(loss, split="shared")
        value, grads = fn(params, DATA, rest)
        assert np.isfinite(value)
        assert jax.tree.structure(grads) == jax.tree.structure(params)


KEYLESS = [
    otmdr_jax.sam,
    otmdr_jax.asam,
    otmdr_jax.dual,
    otmdr_jax.value_and_grad,
    otmdr_jax.otmdr,
    baselines.gsam,
    baselines.looksam,
    baselines.fisher_sam,
    ensemble.value_and_grad,
    ensemble.dual,
]


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)])
@pytest.mark.parametrize("function", KEYLESS)
def test_a_key_is_no_radius(function, key):
    """The two words of a raw key would be the radii of two steps."""
    with pytest.raises(TypeError, match=r"rho must be a number, got a PRNG key"):
        function(toy.regression, rho=key)


@pytest.mark.parametrize("function", [otmdr_jax.sam, otmdr_jax.otmdr, baselines.gsam])
def test_an_optimizer_is_no_loss(function):
    """As `optax.contrib.sam` is called."""
    with pytest.raises(TypeError, match=r"got a Gradient.*optax.chain\(otmdr_jax.sam"):
        function(optax.sgd(0.1), rho=0.1)


def test_a_loss_without_aux_says_what_it_returned():
    message = r"return \(loss, aux\), got an array of shape \(\): .* leave has_aux out"
    with pytest.raises(TypeError, match=message):
        call(split="shared", has_aux=True)
    with pytest.raises(TypeError, match=r"\(loss, aux\), got a tuple of 3"):
        call(loss=lambda p, b: (0.0, 1, 2), split="shared", has_aux=True)


def test_labels_that_would_be_broadcast_are_refused():
    """Of (B, 1) each label met each example, and the loss was another."""
    logits, labels = jnp.zeros((4, 3)), jnp.arange(4) % 3
    assert float(methods.cross_entropy(logits, labels)) == pytest.approx(np.log(3))
    for wrong in (labels[:, None], jax.nn.one_hot(labels, 3), labels[:3]):
        with pytest.raises(ValueError, match=r"of shape \(4,\), got"):
            methods.cross_entropy(logits, wrong)
    with pytest.raises(TypeError, match="labels must be integers, got dtype float32"):
        methods.cross_entropy(logits, labels * 1.0)


class TestTransformation:
    def test_needs_a_batch(self):
        tx = otmdr_jax.sam(toy.regression)
        with pytest.raises(TypeError, match=r"batch=batch"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    @pytest.mark.parametrize("name", ["rho", "key"])
    def test_what_is_given_before_is_no_argument_of_an_update(self, name):
        tx = otmdr_jax.sam(toy.regression)
        with pytest.raises(TypeError, match=f"update takes no {name}: the place is"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=DATA, **{name: 0.1})

    def test_needs_params(self):
        tx = otmdr_jax.sam(toy.regression)
        with pytest.raises(ValueError, match="taken at the parameters"):
            tx.update(PARAMS, tx.init(PARAMS), batch=DATA)

    def test_needs_aux_init(self):
        with pytest.raises(ValueError, match="needs aux_init"):
            otmdr_jax.sam(toy.regression, has_aux=True)

    def test_aux_keeps_its_structure(self):
        def loss(p, batch):
            return toy.regression(p, batch), {"a": jnp.zeros(2)}

        for aux_init, message in [
            ({"b": jnp.zeros(2)}, "structure of aux_init"),
            ({"a": jnp.zeros(3)}, "shapes of aux_init"),
        ]:
            tx = otmdr_jax.sam(loss, has_aux=True, aux_init=aux_init)
            with pytest.raises(ValueError, match=message):
                tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=DATA)

    def test_missing_key(self):
        tx = otmdr_jax.otmdr(toy.regression)
        with pytest.raises(ValueError, match="needs? randomness"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=DATA)

    def test_unknown_preset_lists_the_known_ones(self):
        with pytest.raises(ValueError, match="'paper-cifar10'.*got 'paper'"):
            otmdr_jax.preset("paper")

    def test_asam_is_adaptive_already(self):
        with pytest.raises(TypeError, match="asam takes no adaptive; it takes"):
            otmdr_jax.asam(toy.regression, adaptive=False)
