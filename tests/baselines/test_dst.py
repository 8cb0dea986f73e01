"""Dynamic sparse training: allocation, masks, exact zeros, tickets, what it costs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from otmdr_jax import baselines, ensemble, models
from otmdr_jax.baselines import dst, schedules
from otmdr_jax.experiments import (
    cli,
    members,
    methods,
    programs,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from tests.baselines.test_collected import Linear
from tests.experiments.test_training import assert_same_bits
from tests.marks import one_axis_at_a_time
from tests.sets import small_digits

TINY = TrainConfig(
    mesh="data=1", method="edst", epochs=6, batch_size=64, log_every=2, seed=3,
    mask_every=2, eval_every=9,
)  # fmt: skip
# The layers of ResNet-18 as (kernel) shapes.
SHAPES = [(3, 3, 3, 64), (3, 3, 64, 64), (3, 3, 64, 128), (1, 1, 64, 128), (512, 10)]


@pytest.fixture(scope="module")
def small():
    return small_digits(320)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """An uninterrupted run: 30 steps, tickets after 17, 23 and 30."""
    folder = tmp_path_factory.mktemp("straight") / "edst"
    return training.train(TINY, small, folder, show_progress=False)


class TestAllocation:
    @settings(deadline=None, max_examples=60)
    @given(
        st.lists(
            st.one_of(
                st.tuples(st.integers(1, 600), st.integers(1, 600)),
                st.tuples(
                    st.integers(1, 5),
                    st.integers(1, 5),
                    st.integers(1, 200),
                    st.integers(1, 200),
                ),
            ),
            min_size=1,
            max_size=9,
        ),
        st.floats(0.02, 0.95),
    )
    def test_erk_is_the_water_filling_of_its_definition(self, shapes, density):
        """Bisection for epsilon in sum_l min(1, epsilon r_l) N_l = d sum_l N_l."""
        sizes = np.array([math.prod(s) for s in shapes], float)
        raw = np.array([sum(s) for s in shapes]) / sizes
        low, high = 0.0, 1 / raw.min()
        for _ in range(200):
            middle = (low + high) / 2
            kept = np.sum(np.minimum(1, middle * raw) * sizes)
            low, high = (
                (middle, high) if kept < density * sizes.sum() else (low, middle)
            )
        want = np.minimum(1, middle * raw)
        assert_allclose(dst.erk(shapes, density), want, rtol=1e-6)

    def test_small_layers_are_denser(self):
        found = dst.erk(SHAPES, 0.2)
        assert found[0] == 1.0 and found[1] > found[2] and found[3] > found[2]

    @settings(deadline=None, max_examples=20)
    @given(st.floats(0.02, 0.9), st.integers(0, 99))
    def test_masks_have_exactly_as_many_weights(self, density, seed):
        params = {"a": jnp.zeros((9, 30)), "b": jnp.zeros((3, 3, 4, 8)),
                  "bias": jnp.zeros(8)}  # fmt: skip
        kept = dst.counts(params, density)
        masks = dst.draw_masks(jax.random.key(seed), params, density)
        for name in "ab":
            assert (
                jnp.sum(jnp.broadcast_to(masks[name], params[name].shape))
                == (kept[name])
            )
        assert masks["bias"].shape == () and bool(masks["bias"])
        total = kept["a"] + kept["b"]
        assert abs(total - density * (270 + 288)) <= 1.5

    def test_masks_are_drawn_evenly(self):
        params = {"a": jnp.zeros((10, 10))}
        draw = jax.vmap(lambda k: dst.draw_masks(k, params, 0.3)["a"])
        share = np.mean(draw(jax.random.split(jax.random.key(0), 4000)), axis=0)
        assert_allclose(share, 0.3, atol=5 * math.sqrt(0.21 / 4000))

    @pytest.mark.parametrize("density", [0.0, 1.0, -1])
    def test_densities_that_cannot_be(self, density):
        with pytest.raises(ValueError, match="density"):
            dst.counts({"a": jnp.zeros((2, 2))}, density)

    def test_no_kernel(self):
        with pytest.raises(ValueError, match="kernels"):
            dst.counts({"a": jnp.zeros(2)}, 0.5)


class TestRenewal:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.integers(2, 60))
    def test_prune_and_grow_are_those_of_numpy(self, seed, rate, active):
        """A loop over sorted weights; values are all different."""
        rng = np.random.default_rng(seed)
        mask = np.zeros(64, bool)
        mask[rng.permutation(64)[:active]] = True
        weights = np.float32(rng.permutation(np.linspace(-3, 3.1, 64))) * mask
        grads = np.float32(rng.permutation(np.linspace(-2, 2.1, 64)))
        rate = np.float32(rate)
        number = math.ceil(rate * np.float32(1 - 1e-6) * np.float32(active))
        order = sorted(np.flatnonzero(mask), key=lambda i: abs(weights[i]))
        kept = set(order[number:])
        rest = sorted(set(range(64)) - kept, key=lambda i: -abs(grads[i]))
        grown = set(rest[:number])
        arrays = [{"w": jnp.asarray(x.reshape(8, 8))} for x in (mask, weights, grads)]
        got_kept, got = jax.jit(dst.renew, static_argnums=5)(
            *arrays, rate, jax.random.key(0), "gradient"
        )
        assert set(np.flatnonzero(got_kept["w"])) == kept
        assert set(np.flatnonzero(got["w"])) == kept | grown
        assert int(got["w"].sum()) == active

    @pytest.mark.parametrize("rate", [0.3, 0.15, 0.54, 0.6, 0.8])
    def test_a_share_that_is_whole_in_decimals_is_not_rounded_up(self, rate):
        mask = {"w": jnp.arange(300).reshape(30, 10) < 100}
        flat = {"w": jnp.zeros((30, 10))}
        renew = jax.jit(
            lambda rate: dst.renew(mask, flat, flat, rate, jax.random.key(0))[0]
        )
        assert int(renew(rate)["w"].sum()) == 100 - round(100 * rate)

    @pytest.mark.parametrize(
        ("rate", "kept"), [(2.0, 0), (-1.0, 40), (np.nan, 40), (np.inf, 0), (1e-9, 39)]
    )
    def test_a_schedule_that_returns_no_share_keeps_the_number_of_weights(
        self, rate, kept
    ):
        """With a rate of 2 the network had four times its weights."""
        mask = {"w": jnp.arange(300).reshape(30, 10) < 40}
        flat = {"w": jnp.zeros((30, 10))}
        stay, new = dst.renew(mask, flat, flat, jnp.asarray(rate), jax.random.key(0))
        assert int(stay["w"].sum()) == kept and int(new["w"].sum()) == 40

    @pytest.mark.parametrize("name", ["rate", "escape_rate"])
    @pytest.mark.parametrize("share", [1.5, -0.1, math.nan])
    def test_a_number_that_is_no_share_is_refused(self, name, share):
        options = {"density": 0.1, "rate": 0.5, "steps": (1,), name: share}
        with pytest.raises(ValueError, match=name):
            dst.dynamic(optax.sgd(0.1), jax.random.key(0), **options)

    @pytest.mark.parametrize("name", ["rate", "escape_rate"])
    @pytest.mark.parametrize("share", [0, 1, 1.0])
    def test_none_and_all_are_shares(self, name, share):
        options = {"density": 0.1, "rate": 0.5, "steps": (1,), name: share}
        dst.dynamic(optax.sgd(0.1), jax.random.key(0), **options)

    def test_ties_are_broken_and_counts_stay_exact(self):
        mask = {"w": jnp.arange(100).reshape(10, 10) < 40}
        same = {"w": jnp.where(mask["w"], 1.0, 0.0)}
        flat = {"w": jnp.zeros((10, 10))}
        kept, new = dst.renew(mask, same, flat, 0.25, jax.random.key(0))
        assert int(kept["w"].sum()) == 30 and int(new["w"].sum()) == 40

    @pytest.mark.slow
    def test_random_growth_is_even_over_what_is_not_kept(self):
        mask = {"w": jnp.arange(100).reshape(10, 10) < 40}
        weights = {"w": jnp.arange(100.0).reshape(10, 10) * mask["w"] + mask["w"]}
        grads = {"w": jnp.full((10, 10), jnp.nan)}  # not looked at
        renew = jax.vmap(
            lambda key: dst.renew(mask, weights, grads, 0.5, key, "random")[1]["w"]
        )
        drawn = np.asarray(renew(jax.random.split(jax.random.key(0), 3000)))
        assert (drawn.sum((1, 2)) == 40).all()
        share = drawn.mean(0).ravel()
        assert_array_equal(share[20:40], 1.0)
        free = np.r_[0:20, 40:100]
        assert_allclose(share[free], 0.25, atol=5 * math.sqrt(0.1875 / 3000))

    def test_dense_layers_are_left_alone(self):
        masks = {"w": jnp.ones((), bool)}
        values = {"w": jnp.ones((3, 3))}
        kept, new = dst.renew(masks, values, values, 0.9, jax.random.key(0))
        assert kept["w"].shape == new["w"].shape == () and bool(new["w"])

    def test_the_rate_falls_along_a_cosine(self):
        """PyTorch's CosineAnnealingLR(eta_min=0.005), as the released code has it."""
        rate = dst.cosine(0.5, 200)
        for step in range(0, 201, 20):
            want = 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * step / 200)) / 2
            assert_allclose(rate(step), want, rtol=1e-5)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 30), st.lists(st.integers(1, 60), min_size=1, max_size=4))
    def test_no_update_falls_within_an_interval_of_an_end(self, every, lengths):
        ends = tuple(int(x) for x in np.cumsum(lengths))
        found = dst.update_steps(every, ends)
        assert all(step % every == 0 for step in found)
        for step in range(every, ends[-1] + 1, every):
            room = min(end - step for end in ends if end >= step)
            assert (step in found) == (room >= every)


OPTIMIZERS = {
    "momentum": optax.chain(
        optax.add_decayed_weights(5e-2), optax.sgd(0.1, 0.9, nesterov=True)
    ),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "clipped": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(
            1e-2, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
        optax.sgd(optax.cosine_decay_schedule(0.1, 20), 0.9),
    ),
    # Whose states are not arrays of the shapes of all parameters.
    "adafactor": optax.adafactor(0.05, min_dim_size_to_factor=2),
    "partition": optax.partition(
        {"one": optax.adam(0.1), "other": optax.sgd(0.1)}, {"a": "one", "b": "other"}
    ),
}


class TestDynamic:
    def test_zeros_are_exact_where_updates_are_narrower(self):
        """Gradients in bfloat16 of float32 weights: -p rounded is not -p."""
        params = {"a": jax.random.normal(jax.random.key(0), (8, 8))}
        tx = dst.dynamic(
            optax.sgd(0.1), jax.random.key(1), density=0.5, rate=0.5, steps=(1, 3)
        )
        state = tx.init(params)
        params = dst.apply(state.masks, params)
        for _ in range(4):
            grads = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            assert not np.any(np.asarray(params["a"])[~np.asarray(state.masks["a"])])

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_zeros_are_exact_at_every_step(self, name):
        params = {"a": jnp.zeros((12, 10)), "b": jnp.zeros(10)}
        params = jax.tree.map(
            lambda x: jax.random.normal(jax.random.key(0), x.shape), params
        )
        tx = dst.dynamic(
            OPTIMIZERS[name], jax.random.key(1), density=0.3, rate=0.5, steps=(3, 6, 9),
            escapes=(8,),
        )  # fmt: skip
        state = tx.init(params)
        params = dst.apply(state.masks, params)
        target = jax.random.normal(jax.random.key(2), (12, 10))

        @jax.jit
        def step(params, state):
            grads = jax.grad(
                lambda p: jnp.sum((p["a"] - target) ** 2) + jnp.sum((p["b"] - 1) ** 2)
            )(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        changed = []
        for number in range(1, 13):
            before, old = params, state.masks["a"]
            params, state = step(params, state)
            mask = np.asarray(state.masks["a"])
            weights = np.asarray(params["a"])
            assert mask.sum() == 36
            assert not np.any(weights[~mask])  # exactly
            if not np.array_equal(mask, old):
                changed.append(number)
                assert not np.any(weights[mask & ~np.asarray(old)])  # from zero
            for leaf in jax.tree.leaves(state.inner):
                if leaf.shape == (12, 10):  # momentum, second moments
                    assert not np.any(np.asarray(leaf)[~mask])
            assert np.all(np.asarray(params["b"]) != np.asarray(before["b"]))
        assert changed == [3, 6, 8, 9]

    @pytest.mark.slow
    def test_between_updates_it_is_the_optimizer_on_masked_gradients(self):
        key = jax.random.key(0)
        params = {"a": jax.random.normal(key, (12, 10))}
        clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9))
        tx = dst.dynamic(clipped, jax.random.key(1), density=0.3, rate=0.5, steps=())
        state = tx.init(params)
        mask = np.asarray(state.masks["a"])
        mine = dst.apply(state.masks, params)
        want, momentum = np.asarray(mine["a"], np.float64), 0.0
        for i in range(4):
            grads = jax.random.normal(jax.random.key(10 + i), (12, 10))
            updates, state = tx.update({"a": grads}, state, mine)
            mine = optax.apply_updates(mine, updates)
            masked = np.asarray(grads) * mask
            momentum = 0.9 * momentum + masked / max(2 * np.linalg.norm(masked), 1)
            want = want - 0.1 * momentum
        assert_allclose(mine["a"], want, rtol=1e-5, atol=1e-6)

    def test_members_are_given_masks_of_their_own(self, key):
        """`ensemble.per_member` has one key for all; the docstring says what to do."""
        sparse = dst.dynamic(optax.sgd(0.1), key, density=0.1, rate=0.5, steps=(1,))
        state = ensemble.per_member(sparse).init({"kernel": jnp.ones((2, 20, 10))})
        one, other = state.masks["kernel"]
        assert_array_equal(one, other)
        keys = ensemble.member_keys(jax.random.key(1), 2)
        one, other = jax.vmap(dst.redraw)(keys, state.masks)["kernel"]
        assert one.sum() == other.sum() == 20 and jnp.any(one != other)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="growth must be one of"):
            dst.dynamic(
                optax.sgd(0.1), jax.random.key(0), density=0.1, rate=0.5, steps=(1,),
                growth="momentum",
            )  # fmt: skip
        tx = dst.dynamic(
            optax.sgd(0.1), jax.random.key(0), density=0.1, rate=0.5, steps=(1,)
        )
        params = {"a": jnp.ones((4, 4))}
        with pytest.raises(ValueError, match="needs params"):
            tx.update(params, tx.init(params))

    @pytest.mark.slow
    @one_axis_at_a_time(
        bad=[np.nan, np.inf],
        guard=["none", "apply_if_finite", "zero_nans"],
        growth=["gradient", "random"],
    )
    def test_a_bad_batch_leaves_no_trace(self, bad, guard, growth, key):
        """Of each step before, at and after an update of the masks."""
        tx = baselines.dynamic(
            optax.sgd(0.1, 0.9), key, density=0.2, rate=0.5, steps=(2,), growth=growth
        )  # fmt: skip
        chained = {
            "none": tx,
            "apply_if_finite": optax.apply_if_finite(tx, 5),
            "zero_nans": optax.chain(tx, optax.zero_nans()),
        }[guard]
        dense = {"kernel": jax.random.normal(key, (20, 10)), "bias": jnp.ones(10)}
        poison = jax.tree.map(lambda x: x.at[0].set(bad), dense)
        update = jax.jit(chained.update)

        def run(*bad_steps):
            state = chained.init(dense)
            params = dst.apply(tx.init(dense).masks, dense)
            for step in range(3):
                if step in bad_steps:
                    updates, state = update(poison, state, params)
                    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
                updates, state = update(dense, state, params)
                assert any(np.any(u != 0) for u in jax.tree.leaves(updates))
                params = optax.apply_updates(params, updates)
            return params

        clean = run()
        for steps in ((0,), (1,), (2,), (0, 1, 2)):
            assert_same_bits(run(*steps), clean)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("make", "beside"),
        [
            (optax.sgd, 0),
            (optax.inject_hyperparams(optax.sgd), 0),
            (optax.inject_hyperparams(lambda rate: optax.sgd(rate, 0.0)), 0),
            (
                lambda rate: optax.chain(optax.add_decayed_weights(rate), optax.sgd(1)),
                1,
            ),
            (
                lambda rate: optax.masked(
                    optax.inject_hyperparams(optax.sgd)(rate), True
                ),
                0,
            ),
            (
                lambda rate: optax.inject_hyperparams(
                    lambda factor: optax.chain(optax.scale(factor), optax.sgd(rate))
                )(1.0),
                0,
            ),
        ],
    )
    def test_a_bad_batch_counts_for_any_schedule(self, make, beside, key):
        """The rate is that of the step, also where steps before it were skipped."""
        tx = baselines.dynamic(
            make(lambda step: 0.5**step), key, density=0.2, rate=0.5, steps=()
        )
        dense = {"kernel": jnp.ones((20, 10)), "bias": jnp.ones(10)}
        state = tx.init(dense)
        params = dst.apply(state.masks, dense)
        poison = jax.tree.map(lambda x: x.at[0].set(jnp.nan), dense)
        for step in range(5):
            bad = step in (1, 2)
            updates, state = tx.update(poison if bad else dense, state, params)
            right = 0 if bad else 0.5**step + beside
            np.testing.assert_allclose(updates["bias"], -right)


class TestSchedule:
    def test_edst_has_the_rates_of_its_authors_code(self):
        """main_EDST.py: what `param_groups[0]['lr']` is in each of 450 epochs."""
        explo, count, total = 150, 3, 450
        own = (total - explo) / count
        starts, epoch_ = [], explo
        for _ in range(count):
            starts.append(epoch_)
            epoch_ += own
        second = np.ceil(np.array(starts) + own / 2)
        again = np.ceil(starts[1:])
        rate = schedules.edst(0.1, schedules.edst_ends(total, explo, count), explo)
        lr = 0.1
        for epoch in range(1, total + 1):
            assert_allclose(rate(epoch - 1), lr, rtol=1e-6)
            if epoch == explo:
                lr = 0.01
            elif epoch in second:
                lr = 0.001
            elif epoch in again:
                lr = 0.01

    def test_defaults_are_the_authors_commands(self):
        chosen = TrainConfig(method="edst", epochs=450)
        rate, ends = chosen.method.course(0.1, 450 * 390, 390)
        assert ends == (250 * 390, 350 * 390, 450 * 390)
        run = methods.Run(chosen, 50_000, 390, 450 * 390, rate, None)
        options = chosen.method.options(run)
        assert options["steps"][:2] == (1000, 2000) and options["rate"] == 0.5
        assert options["escapes"] == (250 * 390 + 1, 350 * 390 + 1)
        assert (options["escape_rate"], options["density"]) == (0.8, 0.2)

    def test_a_run_that_is_too_short_is_refused(self):
        chosen = TrainConfig(method="edst", tickets=9)
        with pytest.raises(ValueError, match="9 tickets need two steps each"):
            chosen.method.course(0.1, 20, 5)
        chosen = TrainConfig(method="dst", mask_every=20)
        with pytest.raises(ValueError, match="leaves no update"):
            chosen.method.options(
                methods.Run(chosen, 320, 5, 30, optax.constant_schedule(0.1), None)
            )


def masks_of(state):
    return jax.tree.leaves(state.opt_state.masks)


class TestRuns:
    @pytest.mark.slow
    def test_every_step_of_a_run_is_sparse(self, small):
        compiled = programs.compile_programs(TINY, small)
        state = compiled.init(jax.random.key(0))
        examples = jax.device_put(tuple(small.train))
        order = compiled.epoch_order(jax.random.key(1))
        seen = [[np.asarray(mask) for mask in masks_of(state)]]
        tickets = []
        for i in range(30):
            for mask, weights in zip(
                masks_of(state), jax.tree.leaves(state.params), strict=True
            ):
                mask = np.broadcast_to(mask, weights.shape)
                assert not np.any(np.asarray(weights)[~mask])
            state, _ = compiled.train_step(state, examples, order, np.int32(i % 5))
            seen.append([np.asarray(mask) for mask in masks_of(state)])
            sums = [[m.sum() for m in masks] for masks in (seen[0], seen[-1])]
            assert sums[0] == sums[1]
            if i + 1 in (17, 23, 30):
                tickets.append(jax.tree.map(np.asarray, state.params))
        moved = [
            step
            for step in range(1, 31)
            if any(
                not np.array_equal(a, b)
                for a, b in zip(seen[step - 1], seen[step], strict=True)
            )
        ]
        # 10 steps of exploration; tickets after 17, 23 and 30; escapes after the first
        # two, of which that of step 18 falls on an update; none just before a ticket.
        assert moved == [*range(2, 15, 2), 18, 20, 24, 26, 28]
        for ticket, member in zip(tickets, baselines.members(state), strict=True):
            assert_same_bits(member.params, ticket)

    @pytest.mark.slow
    def test_edst_is_an_ensemble_of_sparse_networks(self, straight):
        kept = straight.state.method_state
        assert int(kept.number) == 3
        kernels = np.asarray(kept.params["conv3"]["kernel"])
        there = (kernels != 0).reshape(3, -1)
        assert there.sum(1).max() <= masks_count(straight.state, "conv3")
        # Escapes let tickets differ in most of their topology.
        assert (there[0] & there[1]).sum() < 0.6 * there[0].sum()
        assert len(straight.metrics["members"]) == 3
        assert straight.metrics["disagreement"] > 0

    @pytest.mark.slow
    def test_results_say_how_sparse_it_is(self, straight):
        found = straight.metrics["sparsity"]
        assert_allclose(found["density"], 0.2, atol=2e-3)
        sizes = {"conv1": 144, "conv2": 4608, "conv3": 9216, "head": 320}
        positions = {"conv1": 64, "conv2": 16, "conv3": 16, "head": 1}
        densities = dst.erk(
            [(3, 3, 1, 16), (3, 3, 16, 32), (3, 3, 32, 32), (32, 10)], 0.2
        )
        flops = 0
        for (name, size), density in zip(sizes.items(), densities, strict=True):
            assert_allclose(found["layers"][f"{name}/kernel"], density, atol=1 / size)
            flops += 2 * positions[name] * round(density * size)
        assert found["flops"] == flops
        assert found["dense_flops"] == 2 * sum(
            positions[name] * size for name, size in sizes.items()
        )
        saved = json.loads((straight.folder / "result.json").read_text())
        assert saved["sparsity"] == found

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            dict(members="2", growth="random"),
            dict(mesh="data=2", dtype="float16", optimizer="adam", learning_rate=0.01,
                 prune_decay="constant"),
        ],
    )  # fmt: skip
    def test_it_runs_with_what_other_methods_run_with(self, options, small):
        chosen = TINY.replace(method="dst", epochs=4, **options)
        result = training.train(chosen, small, show_progress=False)
        assert result.metrics["accuracy"] > 0.3
        for member in members.separate(result.state):
            for mask, weights in zip(
                masks_of(member), jax.tree.leaves(member.params), strict=True
            ):
                mask = np.broadcast_to(mask, weights.shape)
                assert not np.any(np.asarray(weights)[~mask])
        if chosen.model.members is not None:
            first, second = members.separate(result.state)
            masks = [m.opt_state.masks["conv3"]["kernel"] for m in (first, second)]
            assert not np.array_equal(*masks)
            assert len(result.metrics["sparsity"]["members"]) == 2

    @pytest.mark.slow
    def test_a_skipped_step_changes_no_mask(self, key):
        method = methods.create(
            "dst", Linear(), optax.sgd(0.1, 0.9), density=0.2, rate=0.5, steps=(1, 2, 3)
        )  # fmt: skip
        images = jax.random.normal(key, (8, 8, 8, 1))
        state = method.init(key, images)
        new, numbers = jax.jit(method.step)(
            state, (images.at[0].set(jnp.nan), jnp.arange(8))
        )
        assert int(numbers["skipped"]) == 1
        assert_same_bits(new.opt_state, state.opt_state)

    def test_options_of_others_are_refused(self):
        for options, message in (
            (dict(method="dst", tickets=5), "dst has no option tickets"),
            (dict(method="edst", schedule="step"), "part of the method"),
            (dict(method="dst", base_method="sam"), "dst has no option base_method"),
            (dict(method="sam", density=0.1), "sam has no option density"),
            (dict(method="dst", members="2", ensemble="joint"), "not defined"),
        ):
            with pytest.raises(ValueError, match=message):
                TrainConfig(**options)
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\)"):
            TrainConfig(method="dst", density=1.0)
        with pytest.raises(ValueError, match="base of dst must be one of 'sgd'"):
            methods.create("dst", None, optax.sgd(0.1), base="sam")


def masks_count(state, layer):
    return int(state.opt_state.masks[layer]["kernel"].sum())


def test_positions_are_those_of_the_papers_networks():
    """Multiply-adds at 32 x 32 that are published: ResNet-18 0.56e9."""
    model = models.create("resnet_18", 10)
    shapes, _ = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        )
    )
    positions = models.output_positions(model, (32, 32, 3))
    total = 0
    for path, leaf in jax.tree.leaves_with_path(shapes):
        name = "/".join(part.key for part in path)
        assert (leaf.ndim > 1) == (name in positions)
        total += positions.get(name, 0) * math.prod(leaf.shape)
    assert_allclose(total, 0.5554e9, rtol=1e-3)
    with pytest.raises(ValueError, match="height, width, channels"):
        models.output_positions(model, (1, 32, 32, 3))


@pytest.mark.slow
def test_the_command_line_trains_and_evaluates(few_digits, tmp_path, capsys):
    folder = tmp_path / "edst"
    cli.main(
        ["train", "--method", "edst", "--tickets", "2", "--steps", "16", "--mesh",
         "data=1", "--output", str(folder), "--quiet"]
    )  # fmt: skip
    assert "0: cnn_small" in capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    assert_allclose(result["sparsity"]["density"], 0.2, atol=2e-3)
    cli.main(["evaluate", str(folder)])
    found = json.loads((folder / "evaluation.json").read_text())
    assert_allclose(found["nll"], result["nll"], rtol=1e-5)
