"""Training on a mesh and on two hosts: real processes, real sockets, a real kill."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.monitoring
import numpy as np
import pytest

from otmdr_jax import data
from otmdr_jax.experiments import programs, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.training.log import Log
from tests.sets import ROOT, small_digits
from tests.zoo import WITH_ONE_LAYER

# BatchNorm and the ordered split see the same examples whatever the number of devices.
SAME = TrainConfig(
    method="otmdr", split="shared", noise_std=0.01, batch_size=64, steps=12,
    sync_batchnorm=True, log_every=4, learning_rate=0.05, augment=("crop", "flip"),
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def small():
    """320 digits: five steps an epoch."""
    return small_digits(320)


@pytest.fixture(scope="module")
def same(one_layer):
    """On a network that compiles in no time."""
    return SAME.replace(model=one_layer)


@pytest.fixture(scope="module")
def alone(small, same):
    config = same.replace(mesh="data=1", num_particles=2)
    return training.train(config, small, show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,particle=2"])
def test_a_run_on_a_mesh_is_the_run_on_one_device(mesh, small, same, alone):
    """Augmentation, order, particles and BatchNorm do not depend on the devices."""
    config = same.replace(mesh=mesh, num_particles=2)
    got = training.train(config, small, show_progress=False)
    assert got.metrics["mesh"] == mesh
    np.testing.assert_allclose(got.log_probs, alone.log_probs, atol=2e-3)
    for name in ("nll", "sharpness", "train_nll"):
        np.testing.assert_allclose(got.metrics[name], alone.metrics[name], rtol=2e-3)
    logs = [[r["loss"] for r in run.history if "loss" in r] for run in (got, alone)]
    np.testing.assert_allclose(*logs, rtol=1e-3)


def test_all_devices_are_used_unless_told_otherwise(digits):
    mesh = programs.make_mesh(TrainConfig())
    assert dict(mesh.shape) == {"data": jax.device_count()}
    assert programs.make_mesh(TrainConfig(mesh="data=1")) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 100}, "batch_size=100 .* 8 devices"),
        ({"mesh": "particle=2", "num_particles": 3}, "num_particles=3 .* 2 devices"),
        ({"mesh": "member=2"}, "needs members of one"),
        ({"mesh": "particle=2", "method": "sgd"}, "sgd has no particles"),
        ({"batch_size": 8}, "fewer examples than the 2 steps"),
        ({"mesh": "rows=2"}, "mesh must name"),
        ({"microbatch_size": 0}, "microbatch_size must be"),
    ],
)
def test_what_cannot_be_spread_is_refused_before_the_data_are_read(
    options, message, monkeypatch
):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("read the data"))
    with pytest.raises(ValueError, match=message):
        training.train(TrainConfig(**options), show_progress=False)


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(small, same, tmp_path, capsys):
    """And says that the rest will not be the same bits."""
    run = tmp_path / "run"
    short = same.replace(mesh="data=4", steps=8, checkpoint_every=4)
    training.train(short, small, run, show_progress=False)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "8")  # as if it had been killed after step 4
    other = short.replace(mesh="data=2")
    got = training.train(other, small, run, resume=True)
    assert "mesh was data=4 and is data=2" in capsys.readouterr().err
    assert got.metrics["mesh"] == "data=2" and got.metrics["steps"] == 8


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({"batch_size": 64}, 4),
        ({"batch_size": 256}, None),
        ({"batch_size": 64, "split": "shared"}, 8),
        ({"batch_size": 64, "sync_batchnorm": True}, None),
        ({"batch_size": 64, "mesh": "data=1"}, None),
        ({"batch_size": 128, "num_subbatches": 16}, 4),
        ({"batch_size": 512, "microbatch_size": 5}, 5),
    ],
)
def test_few_images_a_device_are_named(options, images):
    config = TrainConfig(method="otmdr", **options)
    found = programs.few_images(config, programs.make_mesh(config))
    assert (found is None) == (images is None)
    assert images is None or f"only {images} images a pass on each of 8" in found


@pytest.mark.parametrize(
    ("options", "images", "way"),
    [
        ({"method": "sgd", "batch_size": 1}, 1, "larger --batch-size"),
        ({"method": "sgd", "batch_size": 15}, 15, "larger --batch-size"),
        ({"method": "sgd", "batch_size": 16}, None, ""),
        ({"method": "sam", "batch_size": 16}, None, ""),
        ({"method": "otmdr", "batch_size": 5}, 2, "--split shared"),
        ({"method": "otmdr", "batch_size": 16, "split": "shared"}, None, ""),
        ({"method": "otmdr", "rho": (0.1,) * 4, "batch_size": 63}, 15, "split"),
        ({"method": "sam", "batch_size": 64, "num_subbatches": 8}, 8, "subbatches"),
        ({"method": "sgd", "batch_size": 64, "microbatch_size": 3}, 3, "microbatch"),
        ({"method": "swa", "base_method": "otmdr", "batch_size": 4}, 2, "split"),
    ],
)
def test_few_images_on_one_device_are_named(options, images, way):
    config = TrainConfig(mesh="data=1", **options)
    found = programs.few_images(config, programs.make_mesh(config))
    assert (found is None) == (images is None)
    assert images is None or f"only {images} image" in found and way in found
    assert images is None or "devices" not in found


def test_shared_statistics_are_of_all_devices():
    config = TrainConfig(method="sgd", batch_size=8, sync_batchnorm=True)
    found = programs.few_images(config, programs.make_mesh(config))
    assert "only 8 images a pass, fewer" in found


@pytest.mark.slow
def test_nothing_compiles_after_the_first_step_and_the_first_evaluation(small):
    """Two epochs after the first: no program is built again."""
    events = []
    config = SAME.replace(mesh="data=2", steps=None, epochs=3, seed=11)
    counted = {}

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            events.append(event)

    write = Log.write

    def spy(records, step, split, values):
        counted.setdefault((split, step), len(events))
        write(records, step, split, values)

    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "write", spy)
        training.train(config, small, show_progress=False)
    first_evaluation = counted["test", 5]
    assert first_evaluation > 0  # the listener hears
    assert counted["train", 15] == counted["test", 10] == first_evaluation


# -- two hosts --


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# `python -m otmdr_jax`, which then knows the network of one layer.
COMMAND = WITH_ONE_LAYER + "from otmdr_jax.experiments import cli; cli.main()"


def start(folder, process, port, *options):
    """One of two processes with two CPU devices each, as a user would start them."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable, "-c", COMMAND, "train", "--quiet",
        "--coordinator", f"localhost:{port}", "--num-processes", "2",
        "--process-id", str(process), *options,
    ]  # fmt: skip
    with open(folder / f"log{process}.txt", "a") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT)


def wait_for(condition, processes, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert all(process.poll() is None for process in processes), "one is gone"
        time.sleep(0.05)


def options_of(config):
    flags = []
    for option, value in config.changed().items():
        name = option.replace("_", "-")
        if option != "mesh":
            if value is True:
                flags.append(f"--{name}")
            else:
                values = value if isinstance(value, tuple) else (value,)
                flags += [f"--{name}", *map(str, values)]
    return flags


@pytest.fixture
def two_hosts(tmp_path):
    running = []

    def both(*options):
        port = free_port()
        pair = [start(tmp_path, process, port, *options) for process in (0, 1)]
        running.extend(pair)
        return pair

    yield both
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_two_hosts_killed_and_restarted_are_one(two_hosts, digits, same, tmp_path):
    """One process is killed; both start again from the checkpoint; as one process."""
    run = tmp_path / "run"
    config = same.replace(steps=30, checkpoint_every=5, log_every=5, input="host")
    pair = two_hosts("--output", str(run), *options_of(config))

    def saved():
        return [
            int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()
        ]

    wait_for(lambda: saved() and max(saved()) >= 10, pair)
    pair[1].send_signal(signal.SIGKILL)
    pair[1].wait()
    assert not (run / "result.json").exists(), "it was too fast to be interrupted"
    pair[0].kill()  # alone, it would find out by itself, a minute later
    pair[0].wait()

    again = two_hosts("--resume", str(run))
    logs = [(tmp_path / f"log{i}.txt") for i in (0, 1)]
    for process, log in zip(again, logs, strict=True):
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]

    result = json.loads((run / "result.json").read_text())
    assert result["finished"] and result["steps"] == 30
    assert result["mesh"] == "data=4"
    records = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if r["split"] == "train"]
    assert steps == sorted(set(steps)), "logged twice, or by both"
    assert "Run:" in logs[0].read_text() and "Run:" not in logs[1].read_text()

    one = config.replace(mesh="data=4", checkpoint_every=None, input="device")
    want = training.train(one, digits, show_progress=False)
    logs = [
        {r["step"]: r["loss"] for r in history if "loss" in r}
        for history in (records, want.history)
    ]
    for step, loss in logs[1].items():
        # Rounding grows from step to step.
        np.testing.assert_allclose(
            logs[0][step], loss, rtol=1e-5 if step < 20 else 1e-3
        )
    with np.load(run / "predictions.npz") as found:
        np.testing.assert_allclose(found["log_probs"], want.log_probs, atol=2e-2)
    np.testing.assert_allclose(result["nll"], want.metrics["nll"], rtol=1e-3)


@pytest.mark.slow
def test_hosts_agree_on_numbers_that_float32_does_not_have():
    """As steps of long runs."""
    code = (
        "import sys, jax\nfrom otmdr_jax import parallel\n"
        "port, process = sys.argv[1], int(sys.argv[2])\n"
        "jax.distributed.initialize(f'localhost:{port}', 2, process)\n"
        "print(parallel.agree(-16777217, 20000003 - process, 0.1 * process))\n"
    )
    words, port = [sys.executable, "-c", code], str(free_port())
    pair = [
        subprocess.Popen([*words, port, str(i)], stdout=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]
    for process in pair:
        out, _ = process.communicate(timeout=120)
        assert out.splitlines()[-1] == "(-16777217.0, 20000003.0, 0.1)"


@pytest.mark.slow
def test_two_hosts_start_from_the_weights_of_one(two_hosts, digits, same, tmp_path):
    """Of a run on one device, whose arrays every host reads."""
    source = training.train(
        same.replace(mesh="data=1", steps=2, method="sgd", split=None, noise_std=None),
        digits, tmp_path / "source", show_progress=False,
    )  # fmt: skip
    config = same.replace(steps=2, init_from=source.folder, freeze="conv1/*")
    pair = two_hosts("--output", str(tmp_path / "run"), *options_of(config))
    for i, process in enumerate(pair):
        log = tmp_path / f"log{i}.txt"
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    want = training.train(config.replace(mesh="data=4"), digits, show_progress=False)
    with np.load(tmp_path / "run" / "predictions.npz") as found:
        np.testing.assert_allclose(found["log_probs"], want.log_probs, atol=2e-3)
    for run in ("source", "run"):
        assert (tmp_path / run / "result.json").exists()
    np.testing.assert_array_equal(
        want.state.params["conv1"]["kernel"], source.state.params["conv1"]["kernel"]
    )


@pytest.mark.slow
def test_hosts_stop_together_on_a_signal_to_one(two_hosts, tmp_path):
    run = tmp_path / "run"
    config = TrainConfig(
        model="one_layer", method="sgd", batch_size=64, steps=4000, checkpoint_every=5,
        log_every=5,
    )  # fmt: skip
    pair = two_hosts("--output", str(run), *options_of(config))
    wait_for(lambda: any((run / "checkpoints").glob("[1-9]*")), pair)
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert "--resume" in (tmp_path / "log0.txt").read_text()


OWN_LOOP = """
import sys
import jax, jax.monitoring, jax.numpy as jnp, optax, otmdr_jax
from otmdr_jax import parallel

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(1) if "backend_compile" in event else None
)

parallel.initialize("localhost:" + sys.argv[2], 2, int(sys.argv[1]))

def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

grad_fn = otmdr_jax.value_and_grad(loss_fn, num_particles=2, axis_name="data")

def step(state, batch):
    params, key = state
    key, step_key = jax.random.split(key)
    value, grads = grad_fn(params, batch, key=step_key)
    return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), key), value

batch = {"x": jax.random.normal(jax.random.key(1), (32, 3)), "y": jnp.ones(32)}
start, mesh = ({"w": jnp.zeros(3)}, jax.random.key(0)), parallel.make_mesh()
train = parallel.shard_map_step(step, mesh)
first, last = parallel.host_rows(mesh, 32)
own = parallel.place_local(jax.tree.map(lambda x: x[first:last], batch), mesh)
for state, data in ((start, batch), (parallel.place(start, mesh), own)):
    counts = []
    for _ in range(3):
        state, value = train(state, data)
        counts.append(len(compiled))
    assert counts[0] and counts[1] == counts[2], counts  # moving a batch is kept too
    print("found", float(value), state[0]["w"].tolist(), last - first)
try:
    parallel.pmap_step(step)
except ValueError as error:
    print("refused", error)
"""


@pytest.mark.essential
def test_a_loop_of_ones_own_on_two_hosts():
    """The whole batch on each host, or each host its rows: the same on both."""
    port = str(free_port())
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", OWN_LOOP, process, port],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in ("0", "1")
    ]
    texts = [process.communicate(timeout=200)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    found = [x for text in texts for x in text.splitlines() if x.startswith("found")]
    assert len(found) == 4 and len(set(found)) == 1 and found[0].endswith(" 16")
    assert all("refused pmap_step is for the devices of one host" in t for t in texts)


@pytest.mark.slow
def test_a_signal_before_training_ends_a_host(tmp_path):
    """JAX's own handler would take it and say nothing."""
    code = """
import os, signal, sys
from otmdr_jax import parallel
parallel.initialize(sys.argv[1], 1, 0)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    address = f"localhost:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGTERM and "still here" not in done.stdout


@pytest.mark.slow
def test_hosts_that_were_started_differently_are_refused(two_hosts, tmp_path):
    """They would wait for each other for ever."""
    port = free_port()
    pair = [
        start(tmp_path, process, port, "--output", str(tmp_path / "run"), "--steps", n)
        for process, n in ((0, "4"), (1, "5"))
    ]
    assert [process.wait(timeout=200) for process in pair] == [2, 2]
    for process in (0, 1):
        log = (tmp_path / f"log{process}.txt").read_text()
        assert "configuration must be the same on all hosts" in log


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_both(two_hosts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    pair = two_hosts("--output", str(tmp_path / "run"), "--steps", "2")
    codes = [process.wait(timeout=200) for process in pair]
    assert codes[0] == 2 and codes[1] != 0
    assert "is not empty" in (tmp_path / "log0.txt").read_text()
    assert "process 0 failed" in (tmp_path / "log1.txt").read_text()
