"""The robust gradient of NNX models: nnx's own where nothing moves."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import otmdr_jax

RHO = (0.3, 0.2)
# As many examples as the hidden layer is wide: statistics look like rows of examples.
SIZE = WIDTH = 8
RATE = 0.9  # the momentum of the running statistics


class Net(nnx.Module):
    """All kinds of state: statistics, streams, buffers that a loss leaves alone."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=RATE, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.scales = nnx.Variable(jax.random.normal(rngs.params(), (SIZE,)))
        self.table = nnx.Variable(jnp.arange(SIZE))

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x))) * self.scales[...][self.table[...]][None]
        return self.head(self.dropout(x))


def net(seed=0):
    return Net(nnx.Rngs(seed))


def loss_fn(model, batch):
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), logits


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(SIZE, 4)).astype(np.float32)
    return {"image": image, "label": np.arange(SIZE) % 3}


def numbers(values):
    """The leaves as NumPy's arrays, keys by their words."""

    def of(x):
        is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [of(x) for x in jax.tree.leaves(values)]


def assert_same(got, want, rtol=0.0):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(numbers(got), numbers(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol, atol=rtol)


def assert_as_nnx(loss, arguments, rtol=0.0, **options):
    """A radius of 0 leaves nothing between ours and nnx's: output and objects."""
    own, nnxs = arguments(), arguments()
    ours = otmdr_jax.nnx.value_and_grad(loss, rho=0.0, split="shared", **options)
    got = ours(*own)
    want = nnx.value_and_grad(loss, **options)(*nnxs)
    assert_same(got, want, rtol)
    assert_same(nnx.state(own), nnx.state(nnxs), rtol)
    assert nnx.graphdef(own) == nnx.graphdef(nnxs)
    return got


def of_split(model, batch, loss=loss_fn, filter=nnx.Param, **options):
    """The core's function of the parameters alone, written out."""
    graphdef, params, rest = nnx.split(model, filter, ...)

    def of_params(params, batch):
        copy = nnx.merge(graphdef, params, rest, copy=True)
        value, aux = loss(copy, batch)
        return value, (aux, nnx.state(copy, nnx.BatchStat))

    key = options.pop("key", None)
    fn = otmdr_jax.value_and_grad(of_params, has_aux=True, **options)
    (value, (aux, statistics)), grads = fn(params, batch, key=key)
    nnx.update(model, statistics)
    return (value, aux), grads


# -- the same numbers -----------------------------------------------------------------


@pytest.mark.slow
def test_without_a_radius_it_is_nnx_value_and_grad(batch):
    (_, logits), grads = assert_as_nnx(loss_fn, lambda: (net(), batch), has_aux=True)
    assert isinstance(grads, nnx.State) and logits.shape == (SIZE, 3)


@pytest.mark.slow
def test_one_shared_step_is_sam(batch):
    """Optax's own: the gradient at w + rho g / |g|."""
    model, rho = net(), 0.3
    model.dropout.deterministic = True
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def of_params(params, step=0):
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True), batch)[0]

    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    sam = optax.contrib.sam(optax.sgd(1.0), adversary, sync_period=2, opaque_mode=True)
    first = jax.grad(of_params)(params)
    updates, _ = sam.update(
        first, sam.init(params), params, grad_fn=jax.grad(of_params)
    )
    ours = otmdr_jax.nnx.value_and_grad(loss_fn, rho, split="shared", has_aux=True)
    _, grads = ours(model, batch)
    assert_same(grads, jax.tree.map(lambda x: -x, updates), rtol=2e-5)
    assert not np.allclose(grads.first.kernel[...], first.first.kernel[...], rtol=1e-2)


WAYS = {
    "shared": {"split": "shared", "rho": 0.3},
    "random": {},
    "particles": {"num_particles": 3, "noise_std": 0.1},
    "a scan": {"num_particles": 3, "noise_std": 0.1, "particle_map": "scan"},
    "vmap": {"num_particles": 3, "noise_std": 0.1, "particle_map": "vmap"},
    "merge, norm": {"merge": "sum", "norm": "per_leaf", "split": "ordered"},
    "a mask": {"mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params)},
    "micro-batches": {"microbatch_size": 2},
    "sub-batches": {"num_subbatches": 2},
    "fisher": {"fisher": 1.0, "split": "ordered"},
    "weights": {"weights": lambda batch: 1.0 + batch["label"]},
    "first order": {"sampler": "first_order", "tilt": 0.5, "rho": 0.3},
    "langevin": {
        "sampler": "langevin",
        "tilt": 0.5,
        "rho": 0.3,
        "num_steps": 2,
        "split": "random",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_option_gives_what_the_core_gives_of_the_parameters(way, batch, key):
    options = {"rho": RHO, "key": key} | WAYS[way]
    model, split = net(), net()
    untouched = numbers(nnx.state(model, nnx.Not(nnx.BatchStat)))
    want = nnx.jit(functools.partial(of_split, **options))(split, batch)
    key = options.pop("key")
    ours = otmdr_jax.nnx.value_and_grad(loss_fn, has_aux=True, **options)
    got = nnx.jit(ours)(model, batch, key=key)
    assert_same(got, want, rtol=1e-5)
    assert_same(
        nnx.state(model, nnx.BatchStat), nnx.state(split, nnx.BatchStat), rtol=1e-5
    )
    # The stream has taken one step, and nothing else has moved by one bit.
    assert model.dropout.rngs.count[...] == 1
    model.dropout.rngs.count[...] -= 1
    after = numbers(nnx.state(model, nnx.Not(nnx.BatchStat)))
    for a, b in zip(after, untouched, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "rho",
    [
        pytest.param(0.5, marks=pytest.mark.essential),
        pytest.param([5.0, 5.0], marks=pytest.mark.slow),
    ],
)
def test_state_is_written_once_from_the_center(rho, batch):
    """The statistics of the first of the parts, at weights that have not moved."""
    model = net()
    steps = np.size(rho)
    rows = batch["image"][: SIZE // steps]
    hidden = rows @ np.asarray(model.first.kernel[...])  # its bias is 0
    otmdr_jax.nnx.value_and_grad(loss_fn, rho, split="ordered", has_aux=True)(
        model, batch
    )
    mean = (1 - RATE) * np.mean(hidden, 0)
    var = RATE + (1 - RATE) * np.var(hidden, 0)
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.norm.var[...], var, rtol=1e-4)


@pytest.mark.slow
def test_streams_of_the_loss_advance_once_and_passes_share_their_draw(key):
    """Of streams that are handed over too, as in Flax's MNIST example."""
    seen = []

    def loss(model, x, rngs, noise=None):
        draw = jax.random.uniform(rngs.noise())
        jax.debug.callback(lambda d: seen.append(float(d)), draw, ordered=True)
        return jnp.mean((model(x) - draw) ** 2)

    rngs, model, x = nnx.Rngs(noise=3), nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jnp.eye(2)
    fn = otmdr_jax.nnx.value_and_grad(loss, RHO)
    value, _ = fn(model, x, rngs, key=key)
    assert len(set(seen)) == 1 and len(seen) >= 3 and rngs.noise.count[...] == 1
    fn(model, x, rngs=rngs, key=key)  # by name too
    assert len(set(seen)) == 2 and rngs.noise.count[...] == 2


@pytest.mark.slow
def test_eval_mode_leaves_the_state_alone(batch, key):
    model = net()
    model.eval()
    before = numbers(nnx.state(model))
    fn = otmdr_jax.nnx.value_and_grad(loss_fn, RHO, has_aux=True, num_particles=3)
    fn(model, batch, key=key)
    for a, b in zip(numbers(nnx.state(model)), before, strict=True):
        np.testing.assert_array_equal(a, b)


# -- as tutorials call it -------------------------------------------------------------


def train(value_and_grad, batch, keyed, steps=4):
    model = net()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    metrics = nnx.MultiMetric(
        accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
    )

    @nnx.jit
    def train_step(model, optimizer, metrics, batch, key):
        grad_fn = value_and_grad(loss_fn, has_aux=True)
        keys = {"key": key} if keyed else {}
        (loss, logits), grads = grad_fn(model, batch, **keys)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    for i in range(steps):
        train_step(model, optimizer, metrics, batch, jax.random.key(i))
    assert optimizer.step[...] == steps and model.dropout.rngs.count[...] == steps
    return model, metrics.compute()


@pytest.mark.essential
def test_a_training_step_of_flaxs_tutorials_runs_with_one_changed_line(batch):
    plain, plain_metrics = train(nnx.value_and_grad, batch, keyed=False)
    ours = functools.partial(otmdr_jax.nnx.value_and_grad, rho=0.0, split="shared")
    model, metrics = train(ours, batch, keyed=False)
    assert_same(nnx.state(model), nnx.state(plain), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-5)
    robust, metrics = train(otmdr_jax.nnx.value_and_grad, batch, keyed=True)
    assert np.isfinite(metrics["loss"]) and 0 <= metrics["accuracy"] <= 1
    moved = np.abs(robust.head.kernel[...] - plain.head.kernel[...])
    assert np.max(moved) > 1e-3


@pytest.mark.slow
def test_the_step_of_flaxs_imagenet_example_runs_with_one_changed_line():
    """Linen in `pmap`, a loss of the parameters alone; devices climb on their own."""

    class Linen(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.Dense(5)(x)
            return flax.linen.Dense(3)(flax.linen.BatchNorm(False)(x))

    rng, devices = np.random.default_rng(0), 2
    images = rng.normal(size=(devices, 4, 6)).astype(np.float32)
    labels = rng.integers(0, 3, (devices, 4))
    net = Linen()
    variables = net.init(jax.random.key(0), images[0])

    def step(make, params, image, label):
        def loss(params):
            logits, new = net.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                image,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean(), (new, logits)

        aux, grads = make(loss, has_aux=True)(params)
        new, logits = aux[1]
        accuracy = jnp.mean(logits.argmax(-1) == label)
        return jax.lax.pmean((grads, new, accuracy), "batch"), logits

    def run(make):
        mapped = jax.pmap(
            functools.partial(step, make),
            axis_name="batch",
            in_axes=(None, 0, 0),
            devices=jax.devices()[:devices],
        )
        return mapped(variables["params"], images, labels)

    sam = functools.partial(otmdr_jax.value_and_grad, rho=0.2, split="shared")
    (grads, *plain), logits = run(jax.value_and_grad)
    (robust, *ours), own_logits = run(sam)
    assert_same((ours, own_logits), (plain, logits), rtol=1e-5)
    assert not np.allclose(jax.tree.leaves(robust)[1], jax.tree.leaves(grads)[1])


def test_a_loss_of_the_model_alone_and_one_of_x_and_y(batch):
    """Where nothing is cut, whatever the loss is called with goes through."""
    x, y = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
    as_nnx = functools.partial(assert_as_nnx, has_aux=True)
    as_nnx(lambda m: loss_fn(m, batch), lambda: (net(),))
    as_nnx(lambda m, x, y: loss_fn(m, {"image": x, "label": y}), lambda: (net(), x, y))


def test_it_decorates(batch, key):
    @otmdr_jax.nnx.value_and_grad(rho=0.1, has_aux=True)
    def robust(model, batch):
        return loss_fn(model, batch)

    fn = otmdr_jax.nnx.value_and_grad(loss_fn, rho=0.1, has_aux=True)
    assert_same(robust(net(), batch, key=key), fn(net(), batch, key=key))


# -- what is differentiated -----------------------------------------------------------


class Lora(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.Linear(4, 3, rngs=rngs)
        self.lora = nnx.LoRA(4, 2, 3, base_module=self.base, rngs=rngs)
        self.lora.lora_b[...] = 0.1 + 0 * self.lora.lora_b[...]

    def __call__(self, x):
        return self.lora(x)


@pytest.mark.slow
def test_a_filter_chooses_what_is_differentiated_and_perturbed(batch, key):
    loss = lambda model, batch: loss_fn(model, batch)[0]  # noqa: E731
    lora = nnx.DiffState(0, nnx.LoRAParam)
    make = lambda: (Lora(nnx.Rngs(0)), batch)  # noqa: E731
    _, grads = assert_as_nnx(loss, make, argnums=lora)
    assert {path[-1] for path in nnx.to_flat_state(grads).paths} == {"lora_a", "lora_b"}
    # Three particles: the mean of three equal weights would be off by a rounding.
    model, split = Lora(nnx.Rngs(0)), Lora(nnx.Rngs(0))
    options = {"rho": RHO, "num_particles": 3, "noise_std": 0.01}
    fn = otmdr_jax.nnx.value_and_grad(loss_fn, argnums=lora, has_aux=True, **options)
    got = fn(model, batch, key=key)
    assert_same(
        got, of_split(split, batch, filter=nnx.LoRAParam, key=key, **options), 1e-5
    )
    assert_same(nnx.state(model), nnx.state(Lora(nnx.Rngs(0))))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
    optimizer.update(model, got[1])
    assert_same(nnx.state(model.base), nnx.state(Lora(nnx.Rngs(0)).base))


def linear(seed, outputs=3):
    return nnx.Linear(4, outputs, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("argnums", [0, 2, (0, 2), (2, 0), (3,), (0, 3), 3])
@pytest.mark.slow
def test_several_arguments_are_differentiated_as_nnx_does(argnums, batch):
    def loss(first, batch, second, scale):
        return jnp.mean((first(batch["image"]) - scale * second(batch["image"])) ** 2)

    make = lambda: (linear(0), batch, linear(1), jnp.array(0.3))  # noqa: E731
    assert_as_nnx(loss, make, argnums=argnums)


@pytest.mark.slow
def test_models_in_containers_and_variables_that_stand_alone(batch):
    def loss(models, batch, offset):
        one, [two] = models["one"], models["two"]
        return jnp.mean((one(batch["image"]) + two(batch["image"]) - offset[...]) ** 2)

    def make():
        models = {"one": linear(0), "two": [linear(1)]}
        return models, batch, nnx.BatchStat(jnp.array([[0.5]]))

    with jax.numpy_rank_promotion("allow"):
        assert_as_nnx(loss, make)
        # A variable that is an argument is differentiated, whatever its kind.
        _, (_, grads) = assert_as_nnx(loss, make, argnums=(0, 2))
    assert grads.shape == (1, 1)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.layers[1].kernel = self.layers[0].kernel

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x[:, :3]


@pytest.mark.slow
def test_tied_parameters_are_one(batch, key):
    make = lambda: (Tied(nnx.Rngs(0)), batch)  # noqa: E731
    _, grads = assert_as_nnx(loss_fn, make, has_aux=True)
    assert len(jax.tree.leaves(grads)) == 3
    model = make()[0]
    fn = otmdr_jax.nnx.value_and_grad(loss_fn, RHO, has_aux=True)
    want = of_split(make()[0], batch, rho=RHO, key=key)
    got = fn(model, batch, key=key)
    assert_same(got, want, rtol=1e-6)
    nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param).update(model, got[1])
    assert model.layers[0].kernel is model.layers[1].kernel


# -- state of every kind --------------------------------------------------------------


class Noting(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.linear(x)
        self.seen = nnx.Intermediate(x)
        self.scale = nnx.Variable(jnp.array(1.5))
        return x


@pytest.mark.slow
def test_variables_that_the_loss_makes_come_out(batch, key):
    assert_as_nnx(loss_fn, lambda: (Noting(nnx.Rngs(0)), batch), has_aux=True)
    model = Noting(nnx.Rngs(0))
    fn = otmdr_jax.nnx.value_and_grad(loss_fn, RHO, has_aux=True, num_particles=2)
    (_, logits), _ = nnx.jit(fn)(model, batch, key=key)
    # What each example has is treated as aux is: in its order, from the last pass.
    np.testing.assert_array_equal(model.seen[...], logits)
    assert model.scale[...] == 1.5


@pytest.mark.slow
def test_objects_may_come_back_as_aux(batch):
    def loss(model, batch, count):
        count[...] += 1
        return loss_fn(model, batch)[0], {
            "count": count,
            "name": "loss",
            "model": model,
        }

    def make():
        return net(), batch, nnx.Variable(jnp.array(2))

    arguments = make()
    fn = otmdr_jax.nnx.value_and_grad(loss, RHO, split="ordered", has_aux=True)
    (_, aux), _ = fn(*arguments)
    assert aux["count"] is arguments[2] and aux["count"][...] == 3
    assert aux["model"] is arguments[0] and aux["name"] == "loss"


@pytest.mark.slow
def test_an_ensemble_by_vmap(batch, key):
    """Each member is what it is alone, its state too."""
    keys = jax.random.split(key, 2)
    fn = otmdr_jax.nnx.value_and_grad(loss_fn, RHO, has_aux=True)

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
        return Net(rngs)

    members = create(nnx.Rngs(0))

    def of(i, values):
        return jax.tree.map(lambda x: x[i], values)

    graphdef, states = nnx.split(members)
    alone = [nnx.merge(graphdef, of(i, states), copy=True) for i in range(2)]
    step = nnx.jit(nnx.vmap(lambda m, b, k: fn(m, b, key=k), in_axes=(0, None, 0)))
    got = step(members, batch, keys)
    for i, member in enumerate(alone):
        want = nnx.jit(fn)(member, batch, key=keys[i])
        assert_same(of(i, got), want, rtol=1e-5)
        assert_same(of(i, nnx.state(members)), nnx.state(member), rtol=1e-5)


@pytest.mark.slow
def test_devices_of_an_axis_are_one(batch):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    options = {"rho": RHO, "split": "shared"}
    loss = lambda model, x: jnp.mean(jnp.tanh(model(x)) ** 2)  # noqa: E731
    fn = otmdr_jax.nnx.value_and_grad(loss, axis_name="data", **options)
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    step = nnx.jit(nnx.shard_map(lambda m, x: fn(m, x), mesh=mesh, **specs))
    got = step(linear(0), batch["image"])
    alone = otmdr_jax.nnx.value_and_grad(loss, **options)
    assert_same(got, alone(linear(0), batch["image"]), rtol=1e-5)


@pytest.mark.slow
def test_devices_of_an_axis_are_one_for_a_head_alone(batch):
    """The first argument, which is not differentiated, is the same on all devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    options = {"rho": 0.3, "split": "shared", "argnums": 2}

    def loss(body, x, head):
        return jnp.mean(head(jnp.tanh(body(x))) ** 2)

    fn = otmdr_jax.nnx.value_and_grad(loss, axis_name="data", **options)
    specs = {"in_specs": (P(), P("data"), P()), "out_specs": P()}
    step = nnx.jit(nnx.shard_map(lambda b, x, h: fn(b, x, h), mesh=mesh, **specs))
    head = nnx.Linear(3, 1, rngs=nnx.Rngs(1))
    got = step(linear(0), batch["image"], head)
    alone = otmdr_jax.nnx.value_and_grad(loss, **options)
    assert_same(got, alone(linear(0), batch["image"], head), rtol=1e-5)


# -- what is refused ------------------------------------------------------------------


REFUSED = [
    (dict(argnums=1), ValueError, "has 1, the batch"),
    (dict(argnums=(0, nnx.DiffState(0, ...))), ValueError, "has 0 twice"),
    (dict(argnums=-1), TypeError, "positions of arguments, from 0.*got -1"),
    (dict(argnums=("model",)), TypeError, "got 'model'"),
    (dict(argnums=True), TypeError, "got True"),
    (dict(argnums=()), ValueError, "argnums is empty"),
    (dict(has_aux=1), TypeError, "has_aux must be True or False"),
    (dict(rho=()), ValueError, "one radius for each ascent step"),
    (dict(wrt=nnx.Param), TypeError, "nnx.value_and_grad takes no wrt"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refused_when_built(options, error, message):
    with pytest.raises(error, match=message):
        otmdr_jax.nnx.value_and_grad(loss_fn, **options)


def test_refused_when_built_of_no_function():
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        otmdr_jax.nnx.value_and_grad(3.0)
    with pytest.raises(TypeError, match="got the method __call__ of a model: pass Net"):
        otmdr_jax.nnx.value_and_grad(net().__call__)


def test_refused_at_the_call(batch, key):
    fn = otmdr_jax.nnx.value_and_grad(loss_fn, has_aux=True)
    with pytest.raises(ValueError, match="pass a key"):
        fn(net(), batch)
    with pytest.raises(TypeError, match="must return .loss, aux., got an array"):
        otmdr_jax.nnx.value_and_grad(lambda m, b: m(b["image"]).mean(), has_aux=True)(
            net(), batch, key=key
        )
    with pytest.raises(ValueError, match="names nothing to differentiate"):
        otmdr_jax.nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(
            net(), batch, key=key
        )
    with pytest.raises(ValueError, match="argnums has 2, but the last .* is 1"):
        otmdr_jax.nnx.value_and_grad(loss_fn, argnums=(0, 2))(net(), batch, key=key)

    def of_labels(model, image, label):
        return loss_fn(model, {"image": image, "label": label})[0]

    with pytest.raises(ValueError, match="only the batch.*as .x, y."):
        otmdr_jax.nnx.value_and_grad(of_labels)(
            net(), batch["image"], batch["label"], key=key
        )


@pytest.mark.slow
def test_a_failed_call_leaves_the_model_as_it_was(batch, key):
    model = net()

    def broken(model, batch):
        loss_fn(model, batch)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        otmdr_jax.nnx.value_and_grad(broken)(model, batch, key=key)
    assert_same(nnx.state(model), nnx.state(net()))
    fn = otmdr_jax.nnx.value_and_grad(loss_fn, has_aux=True)
    assert np.isfinite(fn(model, batch, key=key)[0][0])
