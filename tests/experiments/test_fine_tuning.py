"""Fine-tuning: weights to start from, frozen layers, rates and radii by name."""

import dataclasses
import importlib.util
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from otmdr_jax import bnn, data, models, parallel
from otmdr_jax.experiments import (
    building,
    cli,
    export,
    members,
    methods,
    optimizers,
    patterns,
    programs,
    restore,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.training import initial
from otmdr_jax.io import files
from tests.experiments.test_methods import NEEDS, RUN_OPTIONS, close
from tests.experiments.test_training import assert_same_bits, stop_after
from tests.marks import slow_but
from tests.sets import small_digits

SIZE, INPUTS, WIDTH, CLASSES = 8, 5, 4, 3
IMAGES = jax.random.normal(jax.random.key(7), (SIZE, 1, 1, INPUTS))
BATCH = IMAGES, jnp.arange(SIZE) % CLASSES
ALL = tuple(methods.METHODS)
SPARSE = ("dst", "edst")


# --- networks without a zoo ---------------------------------------------------------


def first_layer():
    kernel = 0.5 * jax.random.normal(jax.random.key(2), (INPUTS, WIDTH))
    return {"kernel": kernel, "bias": jnp.full(WIDTH, 0.1)}


@dataclasses.dataclass(frozen=True)
class Net:
    """Two layers; with `whole=False` the first one is a constant of the program."""

    whole: bool = True
    dropout: float = 0.0
    batchnorm_momentum: float = 0.9

    def init(self, key, images):
        head = {
            "kernel": 0.5 * jax.random.normal(key, (WIDTH, CLASSES)),
            "bias": jnp.zeros(CLASSES),
        }
        params = {"head": head} | ({"first": first_layer()} if self.whole else {})
        return params, {"mean": jnp.zeros(WIDTH)}

    def apply(self, params, state, images, *, train, keys=None):
        first = params["first"] if self.whole else first_layer()
        x = images.reshape(len(images), -1) @ first["kernel"] + first["bias"][None]
        if train:
            moved = 0.9 * state["mean"] + 0.1 * jnp.mean(x, axis=0)
            state = {"mean": jax.lax.stop_gradient(moved)}
        x = jnp.tanh(x)
        return x @ params["head"]["kernel"] + params["head"]["bias"][None], state


DECAYS = optax.chain(
    optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1), optax.sgd(0.2, 0.9)
)


def make(name, model, freeze=(), **options):
    model = dataclasses.replace(model, dropout=0.0)
    own = methods.METHODS[name].has_own_update
    if name == "mc-dropout":  # masks are of the model, and the model has no place
        options["mean_only"], model = True, dataclasses.replace(model, dropout=0.5)
    needs = NEEDS.get(name, {}) | options
    rule = optax.identity() if own else DECAYS
    return methods.create(name, model, rule, freeze=freeze, **needs)


def run(method, count=2):
    state, step = jax.jit(method.init)(jax.random.key(1), IMAGES), jax.jit(method.step)
    states = [state]
    for _ in range(count):
        state, metrics = step(state, BATCH)
        states.append(state)
    return states, metrics


# --- frozen -------------------------------------------------------------------------


def without_first(tree):
    """A state's leaves but for those of the first layer."""
    with_paths = jax.tree.leaves_with_path(tree)
    return [x for path, x in with_paths if "first" not in jax.tree_util.keystr(path)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in ALL if x not in SPARSE])
def test_frozen_leaves_are_constants_of_every_method(name):
    """The run is that of a network without them: their bits stay, no norm counts them.

    Clipping, decay, perturbations, noise, precisions and posteriors are of the rest.
    """
    states, metrics = run(make(name, Net(), freeze=("first/*",)), 3)
    wanted, want = run(make(name, Net(whole=False)), 3)
    for got, other in zip(states, wanted, strict=True):
        params = methods.weights_of(got.params)
        assert_same_bits(params["first"], first_layer())
        mine, theirs = (without_first(s._replace(method_state=None))
                        for s in (got, other))  # fmt: skip
        for a, b in zip(mine, theirs, strict=True):
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    close(metrics, want, rtol=2e-5)
    before, after = (methods.weights_of(s.params)["head"] for s in states[::3])
    for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert not np.array_equal(a, b)
    if isinstance(states[-1].params, bnn.MeanField):
        assert states[-1].params.mean["first"] == {"bias": None, "kernel": None}
    if name not in ("laplace", "swag"):  # whose Gaussians are fitted, or drawn by leaf
        rows = [
            jax.jit(make(name, net, freeze).predict)(last[-1], IMAGES)
            for net, freeze, last in (
                (Net(), ("first/*",), states),
                (Net(whole=False), (), wanted),
            )
        ]
        assert_allclose(*rows, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("structure", "freeze", "message"),
    [
        ("diagonal", ("first/*",), "laplace='diagonal' is of all weights"),
        ("last-layer", ("head/*",), "is of the last layer, which freeze="),
    ],
)
def test_frozen_weights_have_no_gaussian(structure, freeze, message):
    options = {"structure": structure, "num_samples": 2}
    with pytest.raises(ValueError, match=message):
        methods.create("laplace", Net(), DECAYS, freeze=freeze, **options)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_methods_freeze_nothing(name):
    with pytest.raises(ValueError, match=f"freeze is not for {name}"):
        make(name, Net(), freeze=("first/*",))
    with pytest.raises(ValueError, match=f"freeze is not for {name}"):
        TrainConfig(method=name, freeze="conv*")


@pytest.mark.slow
def test_frozen_leaves_with_loss_scaling_micro_batches_and_particles():
    options = dict(loss_scaling=True, microbatch_size=2, num_particles=2, noise_std=0.1)
    states, _ = run(make("otmdr", Net(), freeze=("first/*",), **options))
    wanted, _ = run(make("otmdr", Net(whole=False), **options))
    assert_same_bits(states[-1].params["first"], first_layer())
    close(states[-1].params["head"], wanted[-1].params["head"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["otmdr", "sgvb"])
def test_frozen_leaves_on_two_devices(name):
    options = {"split": "shared"} if name == "otmdr" else {}
    one, _ = run(make(name, Net(), freeze=("first/*",), **options))
    spread = make(name, Net(), freeze=("first/*",), axis_name="data", **options)
    step = parallel.shard_map_step(
        spread.step, parallel.make_mesh("data=2"), donate=False
    )
    state = one[0]
    for _ in range(2):
        state, _ = step(state, BATCH)
    assert_same_bits(methods.weights_of(state.params)["first"], first_layer())
    close(state.params, one[-1].params)


def test_statistics_of_frozen_layers_go_on():
    states, _ = run(make("sgd", Net(), freeze=("first/*",)))
    assert np.all(np.asarray(states[1].model_state["mean"]) != 0)


@pytest.mark.slow
def test_one_frozen_leaf_of_a_layer_and_a_posterior_of_its_own():
    states, _ = run(make("otmdr-bnn", Net(), freeze=("*/bias",)))
    params = states[-1].params
    assert params.mean["first"]["bias"] is None is params.point["first"]["kernel"]
    assert_array_equal(params.point["first"]["bias"], first_layer()["bias"])
    moved = params.mean["first"]["kernel"] != first_layer()["kernel"]
    assert np.all(np.asarray(moved))
    # A bias beside a frozen kernel keeps its posterior.
    q = make("sgvb", Net(), freeze=("*/kernel",)).init(jax.random.key(0), IMAGES).params
    assert q.mean["head"]["kernel"] is None and q.mean["head"]["bias"].shape == (3,)


def test_nothing_to_freeze_or_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"freeze: 'cnv\*' is .* first/bias, .*head/k"):
        make("sgd", Net(), freeze=("cnv*",)).init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        make("sgd", Net(), freeze=("first*", "head*")).init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="leaves no weight with a posterior"):
        q = bnn.init({"conv": {"kernel": jnp.ones((2, 2))}, "norm": jnp.ones(2)})
        patterns.pinned(["conv*"], q, bnn.mean(q))
    with pytest.raises(ValueError, match="laplace='diagonal' is of all weights"):
        TrainConfig(method="laplace", laplace="diagonal", freeze="conv*")
    with pytest.raises(ValueError, match="is of the last layer, which freeze="):
        TrainConfig(method="laplace", freeze="*/kernel")
    TrainConfig(method="laplace", prediction="mean", freeze="*/kernel")


# --- learning rates -----------------------------------------------------------------

PARAMS = {"conv": {"kernel": jnp.ones((2, 2))}, "head": {"bias": jnp.full(3, -2.0)}}
GRADS = {"conv": {"kernel": jnp.full((2, 2), 0.3)}, "head": {"bias": jnp.full(3, 0.7)}}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("sgd", lambda lr: [optax.add_decayed_weights(0.1), optax.sgd(lr, 0.9)]),
        ("adam", lambda lr: [optax.add_decayed_weights(0.1), optax.adam(lr, 0.9)]),
        ("adamw", lambda lr: [optax.adamw(lr, 0.9, weight_decay=0.1)]),
    ],
)
def test_a_group_has_an_optimizer_of_its_rate(name, own):
    """As if each group had a chain of its own, along the schedule of the run."""
    config = TrainConfig(
        method="sgd", optimizer=name, learning_rate=0.2, weight_decay=0.1,
        learning_rate_of=("head/*=0.05", "*bias=9"),  # the first one counts
    )  # fmt: skip
    tx = optimizers.create(config, 10, 5)
    want = optax.partition(
        {
            group: optax.chain(*own(optax.cosine_decay_schedule(rate, 10)))
            for group, rate in (("conv", 0.2), ("head", 0.05))
        },
        {"conv": {"kernel": "conv"}, "head": {"bias": "head"}},
    )

    def updates_of(tx):
        params, state, found = PARAMS, tx.init(PARAMS), []
        for _ in range(3):
            updates, state = tx.update(GRADS, state, params)
            params = optax.apply_updates(params, updates)
            found.append(updates)
        return found

    for got, wanted in zip(updates_of(tx), updates_of(want), strict=True):
        close(got, wanted, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_rates_of_groups_with_every_method(name):
    """The first update is the rate times what does not depend on it."""
    model = Net(dropout=0.5 if name == "mc-dropout" else 0.0)

    def moves(texts):
        config = TrainConfig(
            method=name if name in ("bsam", "ivon") else "sgd",
            learning_rate=0.2, momentum=0.0, learning_rate_of=texts,
            schedule="constant",
        )  # fmt: skip
        rule = optimizers.create(config, 10, 5)
        method = methods.create(name, model, rule, **NEEDS.get(name, {}))
        state = method.init(jax.random.key(1), IMAGES)
        after, _ = jax.jit(method.step)(state, BATCH)
        both = (methods.weights_of(s.params) for s in (after, state))
        # A connection that is dropped moves to 0, whatever the rate.
        return jax.tree.map(lambda x, before: jnp.where(x == 0, 0.0, x - before), *both)

    plain, found = moves(None), moves("first/*=0.02")
    close(found["head"], plain["head"], rtol=1e-6, atol=0)
    assert jnp.any(plain["first"]["kernel"] != 0)
    close(found["first"], jax.tree.map(lambda x: x / 10, plain["first"]), atol=1e-7)


# --- radii --------------------------------------------------------------------------


@pytest.mark.slow
def test_perturb_is_the_mask_of_the_transformation():
    config = TrainConfig(method="sam", perturb="head/*", rho=(0.3,))
    of_run = methods.Run(config, 100, 10, 10, optax.constant_schedule(0.1), None)
    method = methods.create(
        "sam", Net(), optax.sgd(1.0), **config.method.options(of_run)
    )
    state = method.init(jax.random.key(1), IMAGES)
    after, metrics = jax.jit(method.step)(state, BATCH)
    params = state.params

    def loss_fn(params, batch):
        logits, _ = Net().apply(params, state.model_state, batch[0], train=True)
        return methods.cross_entropy(logits, batch[1])

    grads = jax.grad(loss_fn)(params, BATCH)
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(grads["head"])))
    head = jax.tree.map(lambda w, g: w + 0.3 * g / norm, params["head"], grads["head"])
    there = jax.grad(loss_fn)({**params, "head": head}, BATCH)
    close(after.params, jax.tree.map(jnp.subtract, params, there))
    assert_allclose(metrics["distance"], 0.3, rtol=1e-5)


@pytest.mark.parametrize(
    "name", slow_but(("otmdr",), [
        x for x in ALL if "perturb" in methods.METHODS[x].all_options("sam")
    ])
)  # fmt: skip
def test_perturb_of_every_method_that_has_it(name):
    """Its options hand the mask on, and its step takes it."""
    more = {"base_method": "sam"} if "base_method" in methods.METHODS[name].all_options(
        "sam") else {}  # fmt: skip
    config = TrainConfig(method=name, perturb="head/kernel", **more)
    mask = config.method.gradient.options(
        methods.Run(config, 100, 10, 10, optax.constant_schedule(0.1), None)
    )["mask"]
    options = dict(NEEDS.get(name, {}), mask=mask) | ({"base": "sam"} if more else {})
    method = make(name, Net(), **options)
    _, metrics = run(method, 1)  # looksam does not climb in its second
    assert metrics["distance"] > 0 and jnp.isfinite(metrics["loss"])
    assert mask(Net().init(jax.random.key(0), IMAGES)[0]) == {
        "first": {"bias": False, "kernel": False},
        "head": {"bias": False, "kernel": True},
    }


def test_options_without_effect_are_refused():
    for options, message in (
        (dict(method="sgd", perturb="head/*"), "sgd has no option perturb"),
        (dict(method="bsam", perturb="head/*"), "bsam has no option perturb"),
        (dict(new_head=True), "new_head is for weights of init_from"),
        (dict(learning_rate_of="head/*"), "patterns with a positive rate each"),
        (dict(learning_rate_of="head/*=0"), "patterns with a positive rate each"),
        (dict(learning_rate_of="head=1", learning_rate=0.0), "must then be positive"),
        (dict(freeze=()), "freeze must be patterns of parameters' names"),
        (dict(method="sgvb", posterior_init="released", init_from="x"), "draws the m"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)
    for options, message in (
        (dict(freeze="cnv*"), r"freeze: 'cnv\*' is the name of no .* conv1/kernel, "),
        (dict(freeze="*"), "leaves nothing to train"),
        (dict(perturb="conv1/*", freeze="conv*"), "perturb: 'conv1/.*head/bias, "),
        (dict(learning_rate_of=("head/*=1", "head/bias=2")), "'head/bias' is the"),
        (dict(learning_rate_of=("*=1", "head/*=2")), "there is none left for it"),
        (dict(method="otmdr-bnn", perturb="norm*"), r"perturb: 'norm\*' is .* conv1"),
        (dict(members="cnn_small,wide_resnet_10_1", freeze="norm1/*"), "freeze: 'norm"),
    ):
        with pytest.raises(ValueError, match=message):
            config = TrainConfig(**({"method": "sam"} | options))
            building.check_patterns(config, 10, (8, 8, 1))
    joint = TrainConfig(members="2", ensemble="joint", freeze="conv1/*")
    building.check_patterns(joint, 10, (8, 8, 1))


# --- weights to start from ----------------------------------------------------------

TINY = TrainConfig(
    model="one_layer", method="sgd", steps=3, batch_size=32, mesh="data=1",
    eval_every=9, log_every=2,
)  # fmt: skip


def few_classes(count):
    full = small_digits()
    train, test = (
        tuple(x[split.labels < count] for x in split)
        for split in (full.train, full.test)
    )
    return data.from_arrays(train, test, num_classes=count, name="few")


@pytest.fixture(scope="module")
def ten():
    return small_digits()


@pytest.fixture(scope="module")
def five():
    return few_classes(5)


@pytest.fixture(scope="module")
def source(ten, one_layer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    return training.train(TINY, ten, folder, show_progress=False)


def named(result):
    """The arrays of a run of one model by the names of their paths."""
    both = {"params": result.state.params, "state": result.state.model_state}
    return {
        "/".join(entry.key for entry in path): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(both)
    }


def drawn(config, dataset):
    """The state that a run has without weights to start from."""
    compiled = programs.compile_programs(config, dataset)
    return compiled, compiled.init(programs.run_keys(config.run.seed)[0])


def begun(config, dataset):
    """The state that a run starts with, and what it says."""
    compiled, state = drawn(config, dataset)
    start = initial.read(config, dataset)
    return initial.put(config, compiled, state, start), start


@pytest.mark.slow
def test_a_new_head_where_classes_differ(source, five, tmp_path, capsys):
    folder = source.folder
    config = TINY.replace(init_from=folder)
    state, start = begun(config, five)
    _, random = drawn(config, five)
    assert_same_bits(state.params["conv1"], source.state.params["conv1"])
    assert_same_bits(state.params["norm1"], source.state.params["norm1"])
    assert_same_bits(state.params["head"], random.params["head"])
    assert_same_bits(state.model_state, source.state.model_state)
    assert_same_bits(state.opt_state, random.opt_state)
    training.train(config, five, tmp_path / "run")
    line = f"head: 10 classes in {folder}, 5 here: drawn anew; 5 of 7 arrays are taken"
    assert capsys.readouterr().err.count(line) == 1
    record = json.loads((tmp_path / "run" / "initial.json").read_text())
    assert record == {
        "init_from": str(folder), "step": 3, "checksum": start.record["checksum"],
        "taken": 5, "drawn": ["params/head/bias", "params/head/kernel"],
    }  # fmt: skip


def test_the_head_is_taken_where_classes_are_as_many_but_on_request(source, ten):
    config = TINY.replace(init_from=source.folder)
    state, start = begun(config, ten)
    assert_same_bits(state.params, source.state.params)
    assert start.line == f"starts from {source.folder}: all 7 arrays are taken"
    config = config.replace(new_head=True)
    state, start = begun(config, ten)
    assert_same_bits(state.params["head"], drawn(config, ten)[1].params["head"])
    assert "5 of 7 arrays are taken" in start.line


def liberal(arrays, change):
    return {change(name): x for name, x in arrays.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name,
        lambda name: name.replace("/", "."),
        lambda name: name.split("/", 1)[1],
        lambda name: name.split("/", 1)[1].replace("/", "."),
    ],
    ids=["exact", "dots", "no prefix", "neither"],
)
def test_files_hold_what_a_run_does(source, ten, change, tmp_path):
    from safetensors.numpy import save_file

    arrays = liberal(named(source), change)
    save_file(arrays, tmp_path / "weights.safetensors")
    np.savez(tmp_path / "weights.npz", **arrays)
    _, of_run = begun(TINY.replace(init_from=source.folder), ten)
    for name in ("weights.safetensors", "weights.npz"):
        state, start = begun(TINY.replace(init_from=tmp_path / name), ten)
        assert_same_bits(state.params, source.state.params)
        assert_same_bits(state.model_state, source.state.model_state)
        assert start.record["checksum"] == of_run.record["checksum"]


def test_what_does_not_fit_is_named(source, ten, five, tmp_path):
    arrays = named(source)

    def refused(message, change=lambda x: x, dataset=ten, error=ValueError, **options):
        file = tmp_path / "changed.npz"
        np.savez(file, **change(dict(arrays)))
        with pytest.raises(error, match=message):
            initial.read(TINY.replace(**{"init_from": file, **options}), dataset)

    def without(x):
        del x["params/conv1/kernel"]
        return x

    refused("params/conv1/kernel is missing", without)
    refused("extra/array is of no use", lambda x: {**x, "extra/array": np.zeros(1)})
    color = np.zeros((3, 3, 3, 8), np.float32)
    refused(
        r"conv1/kernel is \(3, 3, 3, 8\) there, \(3, 3, 1, 8\) here; .*|channels",
        lambda x: {**x, "params/conv1/kernel": color},
    )
    # Other features are no other classes.
    wide = np.zeros((64, 5), np.float32)
    refused(
        r"head/kernel is \(64, 5\) there, \(32, 10\) here",
        lambda x: {**x, "params/head/kernel": wide},
    )
    nan = np.full(8, np.nan, np.float32)
    refused("norm1/bias .* not finite", lambda x: {**x, "params/norm1/bias": nan})
    whole = np.zeros(8, np.int32)
    refused("norm1/bias .* floating", lambda x: {**x, "params/norm1/bias": whole})
    refused("names of two arrays are one",
            lambda x: {**x, "norm1.bias": x["params/norm1/bias"]})  # fmt: skip
    refused(r"and \d+ more\. The model, its options", model="cnn_small")
    refused("where there is none", error=FileNotFoundError, init_from=tmp_path / "no")
    refused("no run folder", error=FileNotFoundError, init_from=tmp_path)
    (tmp_path / "weights.txt").write_text("")
    refused("of another kind", error=FileNotFoundError,
            init_from=tmp_path / "weights.txt")  # fmt: skip
    torn = ["torn.npz", "torn.safetensors"]
    for name in torn + ["torn.pt"] * (importlib.util.find_spec("torch") is not None):
        (tmp_path / name).write_bytes(b"PK\x03\x04half of it")
        refused(f"{name}' cannot be read as arrays", init_from=tmp_path / name)


def test_a_head_may_be_missing_where_it_is_drawn_anew(source, ten, tmp_path):
    body = {k: x for k, x in named(source).items() if "head" not in k}
    np.savez(tmp_path / "body.npz", **body)
    config = TINY.replace(init_from=tmp_path / "body.npz", new_head=True)
    state, start = begun(config, ten)
    assert "head: none in" in start.line
    assert_same_bits(state.params["conv1"], source.state.params["conv1"])


@dataclasses.dataclass(frozen=True)
class Given:
    """A network whose initial weights are given."""

    model: models.Model
    weights: tuple

    __hash__ = object.__hash__

    def __getattr__(self, name):
        return getattr(self.model, name)

    def init(self, key, images):
        return self.weights


@pytest.mark.parametrize("name", slow_but(("sgd",), ALL))
def test_every_method_starts_there_as_if_its_network_did(
    name, source, ten, one_layer, monkeypatch
):
    config = TINY.replace(
        method=name, init_from=source.folder, **RUN_OPTIONS.get(name, {})
    ).replace(steps=20)
    got, _ = begun(config, ten)
    create = models.create
    weights = source.state.params, source.state.model_state
    monkeypatch.setattr(
        models,
        "create",
        lambda *args, **options: Given(create(*args, **options), weights),
    )
    (method,) = building.methods_of(config, 10, 320, 20, 10, None)
    key = programs.run_keys(config.run.seed)[0]
    assert_same_bits(got, method.init(key, jnp.zeros((1, 8, 8, 1))))


@pytest.mark.slow
def test_members_start_from_one_run_each_with_a_head_of_its_own(source, five):
    for how in ("independent", "joint"):
        config = TINY.replace(init_from=source.folder, members="2", ensemble=how)
        state, start = begun(config, five)
        for m in range(2):
            params = jax.tree.map(lambda x, m=m: x[m], state.params)
            assert_same_bits(params["conv1"], source.state.params["conv1"])
        heads = state.params["head"]["kernel"]
        assert not np.array_equal(heads[0], heads[1])
        assert "5 of 7 arrays are taken" in start.line


@pytest.mark.slow
@pytest.mark.parametrize("how", ["independent", "joint"])
def test_an_ensemble_starts_from_as_many_members(how, ten, one_layer, tmp_path):
    config = TINY.replace(members="2", ensemble=how, steps=1)
    result = training.train(config, ten, tmp_path / "both", show_progress=False)
    state, _ = begun(config.replace(init_from=tmp_path / "both", seed=1), ten)
    assert_same_bits(state.params, result.state.params)
    assert_same_bits(state.model_state, result.state.model_state)
    for wrong in (None, "3"):
        with pytest.raises(ValueError, match="an ensemble of 2 members"):
            one = TINY.replace(init_from=tmp_path / "both", members=wrong)
            initial.read(one, ten)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["independent", "joint"])
def test_architectures_that_differ_start_from_their_own(how, ten, one_layer, tmp_path):
    config = TINY.replace(
        model=None, members="one_layer,cnn_small", ensemble=how, steps=1
    )
    result = training.train(config, ten, tmp_path / "both", show_progress=False)
    state, _ = begun(config.replace(init_from=tmp_path / "both", seed=1), ten)
    for got, want in zip(*map(members.separate, (state, result.state)), strict=True):
        assert_same_bits(got.params, want.params)


@pytest.mark.slow
def test_averages_give_their_mean_and_its_statistics(ten, tmp_path):
    tiny = TINY.replace(model="cnn_small")
    config = tiny.replace(method="swa", steps=6, collect_start=0.5, collect_every=0.1)
    result = training.train(config, ten, tmp_path / "swa", show_progress=False)
    state, _ = begun(tiny.replace(init_from=tmp_path / "swa"), ten)
    kept = result.state.method_state
    assert int(kept.number) > 1
    assert_same_bits(state.params, kept.mean)
    # BatchNorm's are those of the mean, not of the last weights.
    written = export.arrays(restore.open_run(tmp_path / "swa", dataset=ten))
    for name in ("mean", "var"):
        got = state.model_state["norm1"][name]
        assert_array_equal(got, written[f"state/norm1/{name}"])
        assert not np.allclose(got, result.state.model_state["norm1"][name])


def test_devices_share_the_weights(source, five):
    config = TINY.replace(init_from=source.folder, mesh="data=2")
    mesh = programs.make_mesh(config)
    compiled = programs.compile_programs(config, five, mesh)
    state = compiled.init(programs.run_keys(0)[0])
    got = initial.put(config, compiled, state, initial.read(config, five))
    assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(
        lambda x: x.sharding, state
    )
    want, _ = begun(config.replace(mesh="data=1"), five)
    assert_same_bits(got, want)


@pytest.mark.essential
def test_a_run_that_goes_on_does_not_need_the_weights(
    source, five, tmp_path, monkeypatch
):
    copy = shutil.copytree(source.folder, tmp_path / "source")
    config = TINY.replace(
        init_from=copy, freeze="conv1/*", learning_rate_of="head/*=0.5", steps=6
    )
    whole = training.train(config, five, tmp_path / "whole", show_progress=False)
    assert_same_bits(whole.state.params["conv1"], source.state.params["conv1"])
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(training.Interrupted):
            training.train(config, five, tmp_path / "run", show_progress=False)
    other = tmp_path / "early"  # killed after its first save, before a step was saved
    shutil.copytree(tmp_path / "run", other)
    assert {x.name for x in (other / "checkpoints").iterdir()} >= {"0", "3"}
    shutil.rmtree(other / "checkpoints" / "3")
    shutil.rmtree(copy)
    for folder in (tmp_path / "run", other):
        resumed = training.train(config, five, folder, resume=True, show_progress=False)
        assert_same_bits(resumed.state, whole.state)


def test_a_run_without_a_checkpoint_goes_on_with_the_same_weights_alone(
    source, five, tmp_path
):
    file, folder = tmp_path / "weights.npz", tmp_path / "run"
    np.savez(file, **named(source))
    config = TINY.replace(init_from=file)
    result = training.train(config, five, folder, show_progress=False)
    record = files.read_json(folder / "initial.json")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    np.savez(file, **{k: x + 1 for k, x in named(source).items()})
    with pytest.raises(ValueError, match="started from other weights"):
        training.train(config, five, folder, resume=True, show_progress=False)
    np.savez(file, **named(source))
    again = training.train(config, five, folder, resume=True, show_progress=False)
    assert_same_bits(again.state, result.state)
    assert files.read_json(folder / "initial.json") == record


@pytest.mark.slow
def test_from_the_command_line(source, few_digits, tmp_path, capsys):
    out = tmp_path / "run"
    cli.main(
        f"train --model one_layer --method sam --steps 2 --batch-size 32 --mesh data=1 "
        f"--init-from {source.folder} --freeze conv1/* norm1/scale "
        f"--learning-rate-of head/*=0.5 --perturb head/* --output {out}".split()
    )
    config = json.loads((out / "config.json").read_text())
    assert config["freeze"] == ["conv1/*", "norm1/scale"]
    assert config["learning_rate_of"] == ["head/*=0.5"]
    assert config["perturb"] == ["head/*"]
    assert f"starts from {source.folder}" in capsys.readouterr().err


# --- torchvision --------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("torch")
    from tests.models.test_torchvision import ResNet

    return ResNet((1, 1, 1, 1), 7).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvisions_files(theirs, suffix, tmp_path):
    import torch
    from safetensors.torch import save_file

    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(theirs, file)
    else:
        save_file({k: x.contiguous() for k, x in theirs.items()}, file)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    color = data.from_arrays((images, np.arange(40) % 4), (images, np.arange(40) % 4))
    config = TINY.replace(model="resnet_10", stem="imagenet", init_from=file)
    start = initial.read(config, color)
    ((params, statistics),) = start.weights
    model = models.create("resnet_10", num_classes=7, stem="imagenet")
    want, wanted = models.from_torchvision(model, theirs)
    assert params.pop("head") == {"bias": None, "kernel": None}
    want.pop("head")
    assert_same_bits(params, want)
    assert_same_bits(statistics, wanted)
    assert "head: 7 classes in" in start.line and "4 here: drawn anew" in start.line
    with pytest.raises(ValueError, match=r"stem/kernel is \(7, 7, 3, 64\) there"):
        initial.read(config, few_classes(4))  # grey images
    with pytest.raises(ValueError, match="The checkpoint does not fit 'resnet_18'"):
        initial.read(config.replace(model="resnet_18"), color)


def test_a_file_of_pytorch_must_hold_a_state_dict(ten, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    file = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {}, "epoch": 3}, file)
    with pytest.raises(ValueError, match="got a dict of state_dict, epoch"):
        initial.read(TINY.replace(model="cnn_small", init_from=file), ten)
    for package, path in (("torch", file), ("safetensors", tmp_path / "x.safetensors")):
        path.touch()
        with monkeypatch.context() as patch:
            for name in (package, "safetensors.flax"):
                patch.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match=f"(?i)by (Py)?{package}, which is"):
                initial.read(TINY.replace(model="cnn_small", init_from=path), ten)
