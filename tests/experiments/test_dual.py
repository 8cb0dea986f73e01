"""The dual form as a method of runs: what is shared, recorded and refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from otmdr_jax.experiments import members, methods, optimizers, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import cost
from tests.experiments.test_methods import BATCH, IMAGES, Net, small
from tests.experiments.test_training import assert_same_bits

__all__ = ["small"]  # a fixture


def scaled_net(scale):
    """A network whose gradient is longer the larger the scale."""

    class Scaled(Net):
        def apply(self, params, state, images, **options):
            logits, state = super().apply(params, state, images, **options)
            return scale * logits, state

    return Scaled()


def run(method, count, batch=BATCH):
    state, step = method.init(jax.random.key(1), IMAGES), jax.jit(method.step)
    for _ in range(count):
        state, metrics = step(state, batch)
    return state, metrics


@pytest.mark.slow
def test_members_of_a_run_share_one_budget():
    """Of different networks: distances as their gradients, their mean the budget."""
    each = [
        methods.create("otmdr-dual", scaled_net(scale), optax.sgd(0.0), rho=0.3)
        for scale in (1e-3, 4e-3)
    ]
    state, metrics = run(members.lift(each), 120)
    distances = np.asarray(metrics["distance"])
    assert_allclose(np.mean(distances**2), 0.3**2, rtol=1e-3)
    assert_allclose(distances[1] / distances[0], 4, rtol=0.01)
    assert metrics["lambda"][0] == metrics["lambda"][1]
    assert_allclose(np.mean(metrics["budget_used"]), 1, rtol=1e-3)
    assert_same_bits(state[0].memory, state[1].memory)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["vmap", "scan", "unroll"])
def test_a_member_that_is_skipped_goes_on_with_the_others_lambda(how):
    one = methods.create("otmdr-dual", Net(), optax.sgd(0.1), rho=0.3)
    both = members.lift(one, 2, how)
    state, _ = run(both, 2)
    nowhere = jax.tree.map(lambda p: p.at[0].set(jnp.nan), state.params)
    after, metrics = jax.jit(both.step)(state._replace(params=nowhere), BATCH)
    assert metrics["skipped"].tolist() == [1, 0]
    first, second = (jax.tree.map(lambda x, i=i: x[i], after.memory) for i in (0, 1))
    assert_same_bits(first, second)
    assert_allclose(second.budget_used, metrics["budget_used"][1], rtol=1e-6)
    assert first.log_slope != state.memory.log_slope[0]
    nowhere = jax.tree.map(lambda p: p.at[:].set(jnp.nan), state.params)
    after, _ = jax.jit(both.step)(state._replace(params=nowhere), BATCH)
    assert_same_bits(after.memory, state.memory)


RUN = TrainConfig(
    method="otmdr-dual", batch_size=64, epochs=2, log_every=2, rho=(0.2,), mesh="data=1"
)


@pytest.mark.slow
def test_lambda_and_the_radius_are_in_the_records(small, one_layer, tmp_path):
    training.train(
        RUN.replace(model=one_layer), small, tmp_path / "run", show_progress=False
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["split"] == "train"]
    assert len(records) > 3
    for record in records:
        assert record["lambda"] > 0 and 0.02 < record["distance"] < 2
        assert 0.1 < record["budget_used"] < 10
        # The objective is the loss at the particle but for what is left of the budget.
        left = record["dual_value"] - record["loss"]
        assert abs(left) < 2 * record["lambda"] * 0.2**2


@pytest.mark.slow
def test_members_on_their_own_devices_share_it_too(small, one_layer):
    chosen = RUN.replace(model=one_layer, members="2", epochs=1)
    here = training.train(chosen, small, show_progress=False)
    spread = training.train(chosen.replace(mesh="member=2"), small, show_progress=False)
    for found in (here, spread):
        first, second = (
            jax.tree.map(lambda x, i=i: x[i], found.state.memory) for i in (0, 1)
        )
        assert_same_bits(first, second)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-3),
        spread.state.memory,
        here.state.memory,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="float16"),
        dict(dtype="bfloat16", dual_steps=2),
        dict(members="2", ensemble="joint"),
        dict(dual_power=3.0, num_subbatches=2, microbatch_size=8),
        dict(mesh="data=2", sync_perturbation=False),
    ],
    ids=str,
)
def test_it_goes_with_other_options(options, small, one_layer):
    chosen = RUN.replace(model=one_layer, steps=4, **options)
    found = training.train(chosen, small, show_progress=False)
    memory = found.state.memory
    assert memory.started and 0 < memory.multiplier < np.inf
    assert 0 < memory.budget_used < 10 and np.isfinite(memory.value)


@pytest.mark.slow
def test_with_the_ball_of_theorem_43_a_run_is_that_of_sam():
    """And with no rate lambda stays what the first gradient makes it."""
    ball = dict(power=1.0, max_ratio=1.0)
    rule = optax.sgd(0.2, momentum=0.9)
    dual = methods.create("otmdr-dual", Net(), rule, rho=0.1, **ball)
    sam = methods.create("sam", Net(), rule, rho=0.1)
    got, want = run(dual, 3)[0], run(sam, 3)[0]
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got.params,
        want.params,
    )
    kept = TrainConfig(method="otmdr-dual", dual_rate=0.0)
    one = methods.Run(kept, 100, 5, 10, optimizers.schedule(kept, 10, 5), None)
    method = methods.create("otmdr-dual", Net(), rule, **kept.method.options(one))
    first, last = run(method, 2)[0].memory, run(method, 5)[0].memory
    assert first.log_slope == last.log_slope
    assert first.budget_used != last.budget_used


def test_options_reach_the_method():
    chosen = TrainConfig(
        method="otmdr-dual", rho=(0.2,), dual_power=3.0, dual_steps=2,
        dual_max_ratio=2.0,
    )  # fmt: skip
    rate = optimizers.schedule(chosen, 10, 5)
    found = chosen.method.options(methods.Run(chosen, 100, 5, 10, rate, None))
    assert (found["power"], found["num_steps"], found["max_ratio"]) == (3.0, 2, 2.0)
    assert found["rho"] == (0.2,)
    assert cost.gradient_evaluations(chosen) == 3
    for name in ("otmdr-dual", "otmdr-dual-bnn"):
        assert cost.gradient_evaluations(TrainConfig(method=name)) == 2


@pytest.mark.parametrize("method", ["otmdr-dual", "otmdr-dual-bnn"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rho=(0.1, 0.2)), "one radius"),
        (dict(rho=(-0.1,)), "rho must be finite and not negative"),
        (dict(dual_power=1.0), "--dual-max-ratio 1"),
        (dict(dual_power=0.5), "dual_power must be at least 1"),
        (dict(dual_steps=0), "dual_steps must be at least 1"),
        (dict(dual_rate=-1.0), "dual_rate must be at least 0"),
        (dict(dual_max_ratio=0.0), "dual_max_ratio must be positive"),
        (dict(split="ordered"), "has no option split"),
        (dict(num_particles=2), "has no option num_particles"),
        (dict(norm="per_leaf"), "has no option norm"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(method=method, **options)
