"""Many devices give what one gives: data, particle and member axes, micro-batches."""

import re

import hypothesis
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import otmdr_jax
from otmdr_jax import models, parallel
from otmdr_jax.core import batches, collectives, loops
from otmdr_jax.experiments import methods
from otmdr_jax.parallel import hosts
from tests import toy
from tests.marks import one_axis_at_a_time, slow_but

RHO = (0.05, 0.1)


def assert_close(a, b, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def all_reduces(step, *args):
    """How many all-reduces the compiled program has; there are no other collectives."""
    text = step.lower(*args).compile().as_text()
    kinds = "all-gather|all-to-all|collective-permute|reduce-scatter|collective-broad"
    others = re.findall(rf" ((?:ragged-)?(?:{kinds})[\w-]*)\(", text)
    assert not others, others
    return len(re.findall(r" all-reduce(?:-start)?\(", text))


def on_mesh(shape, loss, params, data, key, **options):
    """The robust gradient of a loss on a mesh, told the names of its axes."""
    mesh = parallel.make_mesh(shape)
    for axis, name in (("data", "axis_name"), ("particle", "particle_axis_name")):
        if axis in mesh.shape:
            options[name] = axis
    grad_fn = otmdr_jax.value_and_grad(loss, RHO, **options)
    batch_spec = P("data") if "data" in mesh.shape else P()
    mapped = jax.shard_map(
        lambda p, b, k: grad_fn(p, b, key=k),
        mesh=mesh,
        in_specs=(P(), batch_spec, P()),
        out_specs=P(),
    )
    return jax.jit(mapped), (params, data, key)


# Particles that leave from one gradient: the first ascent step is taken once.
SHARED = {"split": "shared", "num_particles": 2, "noise_std": 0.1}


def on_one(loss, params, data, key=None, rho=RHO, **options):
    grad_fn = otmdr_jax.value_and_grad(loss, rho, **options)
    return jax.jit(grad_fn)(params, data, key=key)


def joined(data, devices, parts=2):
    """The batch whose ordered halves are the devices' ordered halves, joined."""
    size = len(jax.tree.leaves(data)[0])
    order = np.arange(size).reshape(devices, parts, -1).swapaxes(0, 1).ravel()
    return jax.tree.map(lambda x: x[order], data)


@pytest.fixture
def network():
    """A network with BatchNorm shared by the data axis, and a batch for eight."""
    options = {"num_classes": 10}
    model = models.create("cnn_small", batchnorm_axis_name="data", **options)
    alone = models.create("cnn_small", **options)
    images = jax.random.normal(jax.random.key(1), (32, 8, 8, 1))
    batch = images, jnp.arange(32) % 10
    params, state = alone.init(jax.random.key(2), images)

    def loss(model):
        def loss_fn(params, batch, state):
            logits, state = model.apply(params, state, batch[0], train=True)
            return methods.cross_entropy(logits, batch[1]), state

        return loss_fn

    return loss(model), loss(alone), params, state, batch


class TestData:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("devices", "entry"), [(2, "shard_map"), (8, "shard_map"), (4, "pmap")]
    )
    def test_a_network_on_many_devices_is_the_one_on_one(self, devices, entry, network):
        """Value, gradient and BatchNorm's running statistics, on the joined batch."""
        loss, alone, params, state, batch = network
        options = {"split": "ordered", "has_aux": True}
        grad_fn = otmdr_jax.value_and_grad(loss, RHO, axis_name="data", **options)

        def step(params, batch, state):
            (value, state), grads = grad_fn(params, batch, state)
            return grads, (value, state)

        if entry == "pmap":
            step = parallel.pmap_step(step, devices=jax.local_devices()[:devices])
        else:
            mesh = parallel.make_mesh(f"data={devices}")
            step = parallel.shard_map_step(step, mesh, donate=False)
        grads, (value, new_state) = step(params, batch, state)
        want = jax.jit(otmdr_jax.value_and_grad(alone, RHO, **options))(
            params, joined(batch, devices), state
        )
        assert_close(((value, new_state), grads), want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("options", [{}, {"num_subbatches": 4}])
    def test_sums_of_float16_do_not_overflow(self, options):
        """The gradients of four devices, 30000 each, sum to more than float16 has."""
        grad_fn = otmdr_jax.value_and_grad(
            lambda w, batch: jnp.mean(batch @ w.astype(jnp.float32)),
            0.5,
            split="shared",
            axis_name="data",
            **options,
        )
        step = parallel.shard_map_step(
            lambda w, batch: (grad_fn(w, batch)[1], None),
            parallel.make_mesh("data=4"),
            donate=False,
        )
        grads, _ = step(jnp.ones(2, jnp.float16), jnp.full((8, 2), 30_000.0))
        assert grads.dtype == jnp.float16 and grads.tolist() == [30_000, 30_000]

    @pytest.mark.parametrize(
        "make",
        [
            lambda loss: otmdr_jax.robust_gradient(loss, RHO),
            lambda loss: otmdr_jax.robust_gradient(loss, RHO, num_subbatches=2),
            lambda loss: otmdr_jax.robust_gradient(loss, 0.1, split="shared"),
        ],
    )
    def test_a_forgotten_axis_name_is_said(self, make):
        """JAX sums such gradients over devices, and proves that they are equal."""
        gradient = make(toy.regression)
        params, data = toy.regression_problem()

        def step(params, batch):
            found = gradient(params, batch, key=jax.random.key(0))
            return found.grads, jax.lax.pmean(found.value, "data")

        step = parallel.shard_map_step(step, parallel.make_mesh("data=2"))
        with pytest.raises(ValueError, match=r"axis 'data'.*axis_name='data'"):
            step(params, data)

    def test_a_value_that_differs_between_devices_is_said(self):
        """JAX's own advice is to leave the check out."""
        params, data = toy.regression_problem()

        def step(params, batch):
            return params, toy.regression(params, batch)

        step = parallel.shard_map_step(step, parallel.make_mesh("data=2"))
        with pytest.raises(ValueError, match="check_vma") as caught:
            step(params, data)
        assert "jax.lax.pmean(value, 'data')" in " ".join(caught.value.__notes__)

    def test_a_loss_of_all_devices_needs_no_axis_name(self):
        """Each device may add its share: JAX's own way."""
        params, data = toy.regression_problem()

        def share(params, batch):
            mine = toy.regression(params, batch) / jax.lax.axis_size("data")
            return jax.lax.psum(mine, "data")

        grad_fn = otmdr_jax.value_and_grad(share, 0.1, split="shared")
        step = parallel.shard_map_step(
            lambda params, batch: grad_fn(params, batch)[::-1],
            parallel.make_mesh("data=4"),
            donate=False,
        )
        want = otmdr_jax.value_and_grad(toy.regression, 0.1, split="shared")
        assert_close(step(params, data), want(params, data)[::-1], 1e-5, 1e-6)

    def test_axis_names_may_be_a_list(self):
        params, data = toy.regression_problem()
        grad_fn = otmdr_jax.value_and_grad(
            toy.regression, 0.1, split="shared", axis_name=["data", "member"]
        )
        step = parallel.shard_map_step(
            lambda params, batch: grad_fn(params, batch)[::-1],
            parallel.make_mesh("data=2,member=2"),
            batch_spec=P(("data", "member")),
            donate=False,
        )
        want = otmdr_jax.value_and_grad(toy.regression, 0.1, split="shared")
        assert_close(step(params, data), want(params, data)[::-1], 1e-5, 1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("devices", [4])
    def test_plain_jit_on_a_mesh_is_one_device(self, devices, network, key):
        """BatchNorm included, with no axis name: the program is that of one device."""
        _, alone, params, state, batch = network
        grad_fn = jax.jit(
            otmdr_jax.value_and_grad(alone, RHO, num_particles=2, has_aux=True)
        )
        mesh = parallel.make_mesh(f"data={devices}")
        got = grad_fn(params, parallel.place(batch, mesh, P("data")), state, key=key)
        want = grad_fn(params, batch, state, key=key)
        assert_close(got, want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "sync, options, count",
        slow_but(
            [(True, {}, 3), (False, {}, 1)],
            [
                (True, {}, 3),  # two ascent steps and the result
                (True, {"num_particles": 2, "particle_map": "unroll"}, 5),
                (True, {**SHARED, "particle_map": "unroll"}, 4),
                (True, {**SHARED, "particle_map": "scan"}, 3),  # one of them in a loop
                (False, {}, 1),
                (False, {"num_particles": 2, "particle_map": "unroll"}, 1),
                (False, {"num_particles": 2, "particle_map": "scan"}, 1),
                (False, {"split": "ordered", "microbatch_size": 1}, 1),
            ],
        ),
    )
    def test_the_collectives_are_those_that_are_documented(
        self, sync, options, count, key
    ):
        params, data = toy.regression_problem(batch=32)
        options = {"sync_perturbation": sync, **options}
        fn, args = on_mesh("data=8", toy.regression, params, data, key, **options)
        assert all_reduces(fn, *args) == count

    @pytest.mark.slow
    def test_replicas_are_the_same_bits_after_fifty_steps(self, network):
        loss, _, params, state, batch = network
        del loss  # statistics of each device's own part differ, and are averaged
        model = models.create("cnn_small", num_classes=10)
        method = methods.create(
            "otmdr", model, optax.adam(1e-2), axis_name="data", noise_std=0.01
        )
        start = method.init(jax.random.key(3), batch[0])
        # Not proven at compile time, so that it is measured.
        step = parallel.shard_map_step(
            method.step, parallel.make_mesh(), donate=False, check_vma=False
        )
        now = start
        for _ in range(50):
            now, metrics = step(now, batch)
        assert float(metrics["loss"]) < 1.0
        for leaf in jax.tree.leaves((now.params, now.model_state, now.opt_state)):
            shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert len(shards) == 8
            for shard in shards[1:]:
                np.testing.assert_array_equal(shard, shards[0])

    @pytest.mark.slow
    def test_a_counter_in_aux_stays_the_same_on_all_devices(self, key):
        """shard_map would refuse an integer that was marked as differing."""

        def loss(w, batch, count):
            return jnp.mean((batch - w) ** 2), {
                "count": count + 1,
                "x": jnp.mean(batch),
            }

        grad_fn = otmdr_jax.value_and_grad(loss, RHO, has_aux=True, axis_name="data")

        def step(w, batch, count, key):
            (value, aux), grads = grad_fn(w, batch, count, key=key)
            return w - 0.1 * grads, aux

        train = parallel.shard_map_step(step, parallel.make_mesh())
        _, aux = train(jnp.ones(()), jnp.arange(16.0), jnp.int32(4), key)
        assert aux["count"] == 5 and aux["count"].dtype == jnp.int32

    @pytest.mark.slow
    @one_axis_at_a_time(
        options=[
            {"num_particles": 3},  # "auto", which asks for the backend
            {},
            {"num_particles": 3, "particle_map": "scan"},
            {"num_particles": 3, "particle_map": "unroll"},
            {"num_particles": 3, "particle_map": "vmap"},
            {"microbatch_size": 2},
            {"num_particles": 2, "microbatch_size": 3, "particle_map": "scan"},
            {"num_subbatches": 2},
            {
                "rho": (0.1,),
                "sampler": "langevin",
                "tilt": 0.5,
                "num_steps": 4,
                "noise_std": 0.0,
            },
        ],
        backend=["cpu", "gpu"],
    )
    def test_a_loss_may_average_over_devices_itself(
        self, options, backend, key, monkeypatch
    ):
        """Without `axis_name`: then nothing may be marked as differing that is not."""
        params, data = toy.regression_problem(batch=24)
        options = {"split": "shared", "noise_std": 0.1, **options}
        # A part of each device is a part of the whole if its rows stand apart.
        pieces = options.get("num_subbatches", 1)
        options.setdefault("rho", RHO)
        rows = np.arange(24).reshape(pieces, 2, -1).swapaxes(0, 1).ravel()
        want = on_one(toy.regression, params, data, key, **options)

        def loss_fn(params, batch):
            return jax.lax.pmean(toy.regression(params, batch), "data")

        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        fn = otmdr_jax.robust_gradient(loss_fn, **options)

        def call(params, batch):
            found = fn(params, batch, key=key)
            return (found.value, found.grads), found.diagnostics

        got, seen = jax.jit(
            jax.shard_map(
                call,
                mesh=parallel.make_mesh("data=2"),
                in_specs=(P(), P("data")),
                out_specs=P(),
            )
        )(params, jax.tree.map(lambda x: x[rows], data))
        assert_close(got, want, rtol=1e-5)
        assert np.all(np.isfinite(seen.distances)) and np.all(seen.distances > 0)

    @pytest.mark.slow
    def test_barriers_and_sums_keep_the_axes_of_each_value(self):
        """shard_map refuses a result that is marked as differing and is not."""

        def call(own, same):
            passed = collectives.barrier(own, {"own": own, "same": same})
            mean, _ = loops.average(
                lambda x: (jax.lax.pmean(jnp.sum(x * own), "data"), ()),
                jnp.stack([same] * 3),
                3,
                "scan",
                lambda zeros: loops.after(own, zeros),
            )
            return passed, mean

        own, same = jnp.arange(4.0), jnp.full(2, 3.0)
        passed, mean = jax.shard_map(
            call,
            mesh=parallel.make_mesh("data=2"),
            in_specs=(P("data"), P()),
            out_specs=({"own": P("data"), "same": P()}, P()),
        )(own, same)
        assert_close(passed, {"own": own, "same": same})
        assert float(mean) == 3 * (0 + 1 + 2 + 3) / 2

    @pytest.mark.parametrize("entry", ["shard_map", "pmap"])
    def test_a_second_call_compiles_nothing(self, entry):
        """Wherever the state and the batch were before the first."""
        traces = []

        def step(w, batch):
            traces.append(1)
            loss = jax.lax.pmean(jnp.mean(batch @ w), "data")
            return w - jax.lax.pmean(jnp.mean(batch, axis=0), "data"), loss

        if entry == "pmap":
            step = parallel.pmap_step(step)
        else:
            step = parallel.shard_map_step(step, parallel.make_mesh())
        compiled = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, *_, **__: (
                compiled.append(event) if "backend_compile" in event else None
            )
        )
        w, batch = np.ones(3, np.float32), np.ones((16, 3), np.float32)
        w, _ = step(w, batch)
        before = len(compiled), len(traces)
        assert before[0]  # the listener hears
        for _ in range(2):
            w, _ = step(w, batch)
        assert (len(compiled), len(traces)) == before
        step(w, jnp.asarray(batch))  # JAX compiles how to cut it; not the step
        assert len(traces) == before[1]

    def test_axes_that_are_not_there_are_refused(self, key):
        params, data = toy.regression_problem(batch=16)
        grad_fn = otmdr_jax.value_and_grad(toy.regression, RHO, axis_name="data")

        def step(w, batch):
            value, grads = grad_fn(w, batch, key=key)
            return grads, value

        mesh = parallel.make_mesh("particle=2")
        with pytest.raises(ValueError, match="no device axis 'data' here"):
            parallel.shard_map_step(step, mesh)(params, data)
        with pytest.raises(ValueError, match="no device axis 'data' here"):
            step(params, data)
        with pytest.raises(ValueError, match="names the axes .'rows'., but mesh"):
            parallel.shard_map_step(step, mesh, batch_spec=P("rows"))
        with pytest.raises(TypeError, match="mesh must be named axes"):
            parallel.make_mesh(4)

    @pytest.mark.parametrize("entry", ["shard_map", "pmap"])
    def test_a_batch_that_the_devices_do_not_divide_is_refused(self, entry):
        def step(w, batch):
            return w, jnp.mean(batch)

        if entry == "pmap":
            step = parallel.pmap_step(step)
        else:
            step = parallel.shard_map_step(step, parallel.make_mesh())
        with pytest.raises(ValueError, match="batch of 12 .* 8 devices: use 8"):
            step(jnp.ones(2), jnp.ones((12, 2)))


@pytest.mark.parametrize("sync", [True, False])
def test_each_device_splits_its_part_on_its_own(sync, key):
    """Each device has the same four examples, one for each coordinate.

    Its split climbs along two of them, then along the other two. If all devices do so
    along the same ones, coordinates end at two heights, two at each.
    """
    examples = np.eye(4, dtype=np.float32)

    def loss(w, x):
        return jnp.mean(x @ w) + w @ w / 2

    def heights(grads):
        _, counts = np.unique(np.round(grads, 5), return_counts=True)
        return counts.tolist()

    w, keys = jnp.zeros(4), jax.random.split(key, 5)
    alone = [heights(on_one(loss, w, examples, k)[1]) for k in keys]
    assert alone == [[2, 2]] * 5
    data, options = np.tile(examples, (4, 1)), {"sync_perturbation": sync}
    calls = [on_mesh("data=4", loss, w, data, k, **options) for k in keys]
    together = [heights(step(*args)[1]) for step, args in calls]
    assert any(len(found) > 2 for found in together), together


@pytest.mark.parametrize("sync", slow_but([True], [True, False]))
def test_a_mapped_axis_is_as_good_as_devices(sync, key):
    """Whoever tries it on one device writes jit(vmap(..., axis_name))."""
    params, data = toy.regression_problem(batch=16)
    options = dict(axis_name="data", sync_perturbation=sync)
    fn, args = on_mesh("data=4", toy.regression, params, data, key, **options)
    grad_fn = otmdr_jax.value_and_grad(toy.regression, RHO, **options)
    parts = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), data)
    mapped = jax.jit(jax.vmap(lambda b: grad_fn(params, b, key=key), axis_name="data"))
    assert_close(jax.tree.map(lambda x: x[0], mapped(parts)), fn(*args))


class TestSamplers:
    """The same draws on many devices as on one: chains that share them stay alike."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "count"),
        [
            ({"sampler": "first_order", "tilt": 0.6}, 2),
            ({"sampler": "first_order", "tilt": 0.6, "num_particles": 2}, 2),
            (
                {"sampler": "langevin", "split": "shared", "inverse_temperature": 20.0},
                None,
            ),
            (
                {
                    "sampler": "langevin",
                    "split": "ordered",
                    "inverse_temperature": 20.0,
                },
                4,
            ),
        ],
        ids=str,
    )
    def test_on_devices_they_are_those_of_one(self, options, count, key):
        params, data = toy.regression_problem(batch=24)
        if options["sampler"] == "langevin":
            options = {**options, "num_steps": 3, "step_size": 0.3}
        found = {}
        for axis in (None, "data"):
            gradient = otmdr_jax.robust_gradient(
                toy.regression, 0.2, axis_name=axis, **options
            )
            found[axis] = lambda p, b, k, gradient=gradient: gradient(p, b, key=k)
        mesh = parallel.make_mesh("data=4")
        many = jax.jit(
            jax.shard_map(
                found["data"], mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P()
            )
        )
        got = many(params, data, key)
        one = joined(data, 4, 3) if options.get("split") == "ordered" else data
        assert_close(got, jax.jit(found[None])(params, one, key))
        assert got.diagnostics.distances.max() <= 0.2 * (1 + 1e-5)
        if count:  # the draw's or each step's, and the result's
            assert all_reduces(many, params, data, key) == count

    @pytest.mark.slow
    @pytest.mark.parametrize("sampler", ["first_order", "langevin"])
    def test_particles_on_their_own_devices_are_those_of_one(self, sampler, key):
        params, data = toy.regression_problem(batch=16)
        options = dict(num_particles=4, sampler=sampler, tilt=0.5, split="shared")
        if sampler == "langevin":
            options["num_steps"] = 2
        gradient = otmdr_jax.robust_gradient(
            toy.regression, 0.2, particle_axis_name="particle", **options
        )
        many = jax.jit(
            jax.shard_map(
                lambda p, b, k: gradient(p, b, key=k),
                mesh=parallel.make_mesh("particle=2"),
                in_specs=P(),
                out_specs=P(),
            )
        )
        alone = otmdr_jax.robust_gradient(toy.regression, 0.2, **options)
        assert_close(many(params, data, key), alone(params, data, key=key))


class TestParticles:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "shape, split, particle_map",
        [
            ("particle=2", "random", "scan"),
            ("particle=2", "shared", "unroll"),
            ("particle=4", "shared", "scan"),
            ("particle=4", "random", "vmap"),
            ("particle=8", "random", "auto"),
        ],
    )
    def test_particles_on_their_own_devices_are_those_of_one(
        self, shape, split, particle_map, key
    ):
        params, data = toy.regression_problem(batch=16)
        options = dict(num_particles=8, noise_std=0.05, split=split)
        fn, args = on_mesh(
            shape,
            toy.regression,
            params,
            data,
            key,
            particle_map=particle_map,
            **options,
        )
        want = on_one(toy.regression, params, data, key, particle_map="vmap", **options)
        assert_close(fn(*args), want)
        assert all_reduces(fn, *args) == 1

    @pytest.mark.slow
    @one_axis_at_a_time(
        sync=[True, False], shape=["data=2,particle=4", "particle=2,data=4"]
    )
    def test_two_axes_are_the_data_axis_alone(self, sync, shape, key):
        params, data = toy.regression_problem(batch=32)
        options = dict(num_particles=4, noise_std=0.05, sync_perturbation=sync)
        data_only = next(part for part in shape.split(",") if "data" in part)
        got, args = on_mesh(shape, toy.regression, params, data, key, **options)
        want, _ = on_mesh(data_only, toy.regression, params, data, key, **options)
        assert_close(got(*args), want(*args))

    @pytest.mark.slow
    def test_diagnostics_hold_every_particle_in_its_order(self, key):
        params, data = toy.regression_problem(batch=16)
        options = dict(num_particles=4, noise_std=0.05)
        gradient = otmdr_jax.robust_gradient(
            toy.regression, RHO, particle_axis_name="particle", **options
        )
        got = jax.jit(
            jax.shard_map(
                lambda p, b, k: gradient(p, b, key=k).diagnostics,
                mesh=parallel.make_mesh("particle=2"),
                in_specs=P(),
                out_specs=P(),
            )
        )(params, data, key)
        want = jax.jit(otmdr_jax.robust_gradient(toy.regression, RHO, **options))
        assert_close(got, want(params, data, key=key).diagnostics)

    def test_particles_that_the_devices_do_not_divide_are_refused(self, key):
        params, data = toy.regression_problem(batch=16)
        fn, args = on_mesh(
            "particle=4", toy.regression, params, data, key, num_particles=6
        )
        with pytest.raises(ValueError, match="multiple of the 4 devices .* got 6"):
            fn(*args)


class TestMembers:
    @pytest.mark.slow
    @one_axis_at_a_time(
        shape=["member=2,data=2,particle=2", "member=2,data=2", "member=4"],
        particle_map=["unroll", "scan"],
    )
    def test_members_on_their_own_devices_are_those_of_vmap(
        self, shape, particle_map, key
    ):
        """Stacked members, each with its key and momentum; two steps."""
        mesh = parallel.make_mesh(shape)
        _, data = toy.regression_problem(batch=16)
        members = [toy.regression_problem(seed, batch=16)[0] for seed in range(4)]
        params = jax.tree.map(lambda *x: jnp.stack(x), *members)
        keys = jax.random.split(key, 4)
        optimizer = optax.sgd(0.1, momentum=0.9)
        options = dict(num_particles=2, noise_std=0.01, split="ordered")

        def steps(**axes):
            grad_fn = otmdr_jax.value_and_grad(
                toy.regression, RHO, particle_map=particle_map, **options, **axes
            )

            def member(state, batch):
                params, opt_state, key = state
                key, step_key = jax.random.split(key)
                value, grads = grad_fn(params, batch, key=step_key)
                updates, opt_state = optimizer.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state, key), value

            return jax.vmap(member, in_axes=(0, None))

        axes = {}
        if "data" in mesh.shape:
            axes["axis_name"] = "data"
        if "particle" in mesh.shape:
            axes["particle_axis_name"] = "particle"
        got_step = parallel.shard_map_step(
            steps(**axes),
            mesh,
            batch_spec=P("data") if "data" in mesh.shape else P(),
            state_spec=P("member"),
            donate=False,
        )
        got = want = (params, jax.vmap(optimizer.init)(params), keys)
        want_step = jax.jit(steps())
        batch = joined(data, parallel.axis_size(mesh, "data"))
        for _ in range(2):
            got, values = got_step(got, data)
            want, want_values = want_step(want, batch)
            assert_close((got[:2], values), (want[:2], want_values))


class TestMicrobatches:
    @pytest.mark.slow
    @hypothesis.given(
        size=st.integers(2, 13),
        micro=st.integers(1, 14),
        how=st.sampled_from(["unroll", "scan"]),
    )
    @hypothesis.settings(max_examples=40, deadline=None)
    def test_the_mean_is_that_of_the_whole_batch(self, size, micro, how):
        params, data = toy.regression_problem(batch=size, dtype=np.float32)

        def fn(batch):
            (loss, count), grads = jax.value_and_grad(
                lambda p: (toy.regression(p, batch), jnp.int32(7)), has_aux=True
            )(params)
            return loss, count, grads

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loops, "fastest", lambda *_: how)
            got = batches.accumulate(fn, data, micro)
        assert_close(got, fn(data), rtol=1e-4, atol=1e-5)
        assert got[1].dtype == jnp.int32

    @pytest.mark.slow
    @one_axis_at_a_time(
        micro=[3, 4, 8, 100], options=[{}, {"adaptive": True}, {"merge": "sum"}]
    )
    def test_the_objective_stays_that_of_the_whole_batch(self, micro, options, key):
        """Also where it does not divide the parts of 8 and the batch of 16."""
        params, data = toy.regression_problem(batch=16)
        options = dict(num_particles=2, noise_std=0.1, **options)
        want = on_one(toy.regression, params, data, key, **options)
        options["microbatch_size"] = micro
        assert_close(on_one(toy.regression, params, data, key, **options), want)
        fn, args = on_mesh(
            "data=2", toy.regression, params, data, key, microbatch_size=micro
        )
        want, _ = on_mesh("data=2", toy.regression, params, data, key)
        assert_close(fn(*args), want(*args))

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", ["data=2", "data=2,particle=2"])
    def test_scanned_on_a_mesh_as_on_accelerators(
        self, shape, key, one_layer, monkeypatch
    ):
        """With a network, whose statistics are aux; the last micro-batch is smaller."""
        model = models.create(one_layer, num_classes=10)
        images = jax.random.normal(jax.random.key(1), (20, 8, 8, 1))
        params, state = model.init(jax.random.key(2), images)

        def loss_fn(params, batch):
            logits, after = model.apply(params, state, batch[0], train=True)
            return methods.cross_entropy(logits, batch[1]), after

        found = []
        for how in ("unroll", "scan"):
            monkeypatch.setattr(loops, "fastest", lambda *_, how=how: how)
            fn, args = on_mesh(
                shape, loss_fn, params, (images, jnp.arange(20) % 10), key,
                num_particles=2, microbatch_size=3, has_aux=True,
            )  # fmt: skip
            found.append(fn(*args))
        assert_close(*found, rtol=1e-3, atol=1e-5)

    @pytest.mark.slow
    def test_a_sharded_batch_stays_on_its_devices(self):
        """Micro-batches take every n-th example: nothing moves between devices."""
        params, data = toy.regression_problem(batch=32)
        data = parallel.place(data, parallel.make_mesh(), P("data"))
        want = on_one(toy.regression, params, data, split="shared")
        fn = otmdr_jax.value_and_grad(
            toy.regression, RHO, split="shared", microbatch_size=16
        )
        assert_close(jax.jit(fn)(params, data), want)
        all_reduces(jax.jit(fn), params, data)  # refuses gathers

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "size, options, passes, fsdp",
        [
            (256, {"split": "shared", "rho": 0.1}, 2, False),
            (256, {"split": "random"}, 2, False),
            (256, {"split": "random"}, 2, True),
            (256, {"split": "ordered"}, 2, False),
            # Of sizes that parts, or devices, do not divide.
            (200, {"rho": (0.1, 0.1, 0.1)}, 2, False),
            (204, {"split": "random"}, 2, False),
            (204, {"split": "ordered"}, 2, True),
            (256, {"split": "shared", "rho": 0.1, "num_subbatches": 2}, 2, True),
            (256, {"num_particles": 2, "particle_map": "vmap"}, 4, False),
        ],
        ids=str,
    )
    def test_under_plain_jit_each_device_has_its_part_of_the_work(
        self, size, options, passes, fsdp, key, monkeypatch
    ):
        """A part of a batch is spread over all devices, as the batch is."""
        mesh, width = parallel.make_mesh("data=4"), 64

        def loss_fn(params, batch):
            first, second = params
            return jnp.mean((jnp.tanh(batch @ first) @ second) ** 2)

        lies = P(None, "data") if fsdp else P()
        params = parallel.place((np.eye(width, dtype=np.float32),) * 2, mesh, lies)
        batch = np.random.default_rng(0).normal(size=(size, width)).astype(np.float32)
        divided = parallel.place(batch, mesh, P("data"))
        fn = otmdr_jax.value_and_grad(loss_fn, **options)
        program = jax.jit(fn).lower(params, divided, key=key).compile()
        # Forward, and backward by both kernels and the hidden units.
        work = passes * 5 * 2 * size / 4 * width**2
        loop = options.get("num_subbatches", 1)  # counted once
        assert program.cost_analysis()["flops"] * loop < 1.2 * work
        # Where there is one device, parts are cut in the plain way; traced anew for it.
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        alone = jax.jit(lambda p, b: fn(p, b, key=key))
        want = alone(jax.tree.map(np.asarray, params), batch)
        assert_close(program(params, divided, key=key), want, rtol=1e-4, atol=1e-6)

    @pytest.mark.slow
    def test_memory_falls_with_the_micro_batch(self, monkeypatch):
        """Activations of a perceptron, layer after layer, of 1024 examples or 128."""
        monkeypatch.setattr(jax, "device_count", lambda: 1)  # none to spread parts over

        def loss(weights, x):
            for w in weights:
                x = jnp.tanh(x @ w)
            return jnp.mean(x**2)

        weights = [jnp.ones((128, 128)) / 128] * 8
        x = jnp.ones((1024, 128))

        def temporaries(**options):
            fn = otmdr_jax.value_and_grad(loss, RHO, split="ordered", **options)
            program = jax.jit(fn).lower(weights, x).compile()
            return program.memory_analysis().temp_size_in_bytes

        assert temporaries(microbatch_size=128) < 0.5 * temporaries()
        # An odd last one, of 512 - 400 in a part, waits for the others.
        assert temporaries(microbatch_size=400) < 0.65 * temporaries()

    @pytest.mark.parametrize("size", [0, -1, 2.0, True])
    def test_a_size_that_cannot_be_is_refused(self, size):
        with pytest.raises((TypeError, ValueError), match="microbatch_size must be"):
            otmdr_jax.value_and_grad(toy.regression, RHO, microbatch_size=size)


class TestMesh:
    def test_shapes(self):
        assert dict(parallel.make_mesh().shape) == {"data": 8}
        assert dict(parallel.make_mesh("data=2,particle=-1").shape) == {
            "data": 2,
            "particle": 4,
        }
        assert parallel.make_mesh({"member": 2}).devices.size == 2
        assert parallel.axis_size(parallel.make_mesh("data=4"), "member") == 1
        assert parallel.axis_size(None, "data") == 1

    @pytest.mark.parametrize(
        "shape, message",
        [
            ("rows=2", "each of the axes data, particle, member"),
            ("data=two", "each of the axes"),
            ("data=0", "each of the axes"),
            ("data=2,data=2", "at most once"),
            ("", "at least one axis"),
            ("data=-1,particle=-1", "-1 at most once"),
            ("data=16", "needs 16 devices, but there are 8"),
            ("data=16,particle=-1", "needs more devices"),
            ("data=-1,particle=3", "cannot have all 8 devices, .* have 3"),
            ({"data": 1.9}, "each of the axes"),
            ({"data": True}, "each of the axes"),
        ],
    )
    def test_a_mesh_that_cannot_be_is_refused(self, shape, message):
        with pytest.raises(ValueError, match=message):
            parallel.make_mesh(shape)

    def test_no_device_is_refused(self):
        with pytest.raises(ValueError, match="at least one device"):
            parallel.make_mesh(devices=[])

    def test_devices_are_in_the_order_of_their_hosts(self, monkeypatch):
        """On TPU pods `jax.devices()` is not."""
        devices = jax.devices()
        monkeypatch.setattr(jax, "devices", lambda: devices[1::2] + devices[::2])
        assert list(parallel.make_mesh().devices) == devices
        assert list(parallel.make_mesh(devices=devices[::-1]).devices) == devices[::-1]

    def test_rows_of_a_host_that_is_alone(self):
        assert parallel.host_rows(None, 10) == (0, 10)
        assert parallel.host_rows(parallel.make_mesh("data=4"), 12) == (0, 12)
        assert parallel.host_rows(parallel.make_mesh("particle=2"), 3) == (0, 3)
        with pytest.raises(ValueError, match="batch of 10"):
            parallel.host_rows(parallel.make_mesh("data=4"), 10)

    def test_place_divides_and_copies(self):
        mesh = parallel.make_mesh("data=4,particle=2")
        x = np.arange(8.0)
        assert {s.data.shape for s in parallel.place(x, mesh).addressable_shards} == {
            (8,)
        }
        divided = parallel.place(x, mesh, P("data"))
        assert {s.data.shape for s in divided.addressable_shards} == {(2,)}
        np.testing.assert_array_equal(parallel.place_local(x, mesh), x)
        with pytest.raises(ValueError, match="batch of 6"):
            parallel.place(np.arange(6.0), mesh, P("data"))
        with pytest.raises(ValueError, match="batch of 6"):
            parallel.place_local(np.arange(6.0), mesh)
        with pytest.raises(ValueError, match=r"names the axes \['rows'\]"):
            parallel.place(x, mesh, P("rows"))
        with pytest.raises(TypeError, match="one PartitionSpec, got 'data'"):
            parallel.place(x, mesh, "data")

    @pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
    def test_keys_are_placed_as_other_arrays(self, impl):
        mesh = parallel.make_mesh("data=4,particle=2")
        keys = jax.random.split(jax.random.key(0, impl=impl), 8)
        batch = {"x": np.arange(8.0), "keys": keys}
        for placed in (
            parallel.place(batch, mesh, P("data")),
            parallel.place_local(batch, mesh),
        ):
            assert placed["keys"].dtype == keys.dtype
            assert placed["keys"].sharding.shard_shape((8,)) == (2,)
            np.testing.assert_array_equal(
                jax.random.key_data(placed["keys"]), jax.random.key_data(keys)
            )

    def test_one_host_agrees_with_itself(self):
        assert parallel.agree(1, 0.0) == (1, 0.0)
        assert parallel.is_main()
        assert parallel.on_main(lambda: 3) == 3
        with pytest.raises(KeyError):
            parallel.on_main(lambda: {}["missing"])

    @pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
    def test_the_other_hosts_hear_of_any_failure(self, error, monkeypatch):
        heard = []

        def agree(value):
            heard.append(value)
            return (value,)

        def fails():
            raise error

        monkeypatch.setattr(hosts, "agree", agree)
        with pytest.raises(error):
            parallel.on_main(fails)
        assert heard == [1.0]

    def test_half_of_an_address_is_refused(self):
        with pytest.raises(ValueError, match="together, or none"):
            parallel.initialize(coordinator="localhost:1234")
