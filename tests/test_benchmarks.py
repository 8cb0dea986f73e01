"""The benchmarks as a user runs them, shrunk, and what they say they count."""

import argparse
import functools
import importlib
import io
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from otmdr_jax import data, models
from otmdr_jax.experiments import sweep
from tests import scripts

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
EXAMPLES = BENCHMARKS.parent / "examples"


def run(name, *args):
    return scripts.run(BENCHMARKS / name, *args)


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    return importlib.import_module("accelerator")


def session(accelerator, tmp_path, minutes=1.0):
    options = argparse.Namespace(
        minutes=minutes, json=str(tmp_path / "a.json"), smoke=True, rounds=1, threads=2
    )
    options.particles = [2]
    return accelerator.Session(options)


def parts(*names):
    """Modules that accelerator.py is made of."""
    return [importlib.import_module(name) for name in names]


@pytest.mark.slow
def test_accelerator_in_its_smoke_form(tmp_path):
    file = tmp_path / "a.json"
    options = ["--smoke", "--only", "peak", "steps", "--particles"]
    out = run("accelerator.py", *options, "--json", str(file))
    record = json.loads(file.read_text())
    assert not record["errors"] and not record["skipped"]
    assert {"device", "nvidia_smi", "jax", "flax", "optax", "date"} <= set(record)
    assert {"bfloat16", "float32", "float32 highest", "copy"} == set(record["peak"])
    assert "not measured" in out and len(record["targets"]) == 10

    group = record["steps"]["cnn_small float32 8"]
    assert list(group["results"]) == ["SGD", "SAM (optax.contrib)", "SAM", "OT-MDR K=1"]
    peak = record["peak"]["float32"]["tflops"]
    for name, result in group["results"].items():
        seconds = result["milliseconds"] / 1e3
        assert result["images_per_second"] == pytest.approx(8 / seconds)
        assert result["passes"] == (1 if name == "SGD" else 2)
        tflops = 3 * result["passes"] * group["forward_gflop"] / 1e3 / seconds
        assert result["mfu"] == pytest.approx(tflops / peak)
        assert result["peak_mib"] > 0 and result["n"] == 1
    for name in ("SGD", "OT-MDR K=1"):
        gap = group["results"][name]["gap"]
        assert all(math.isfinite(value) for value in gap.values())


@pytest.mark.slow
def test_metrics_in_its_smoke_form(tmp_path):
    file = tmp_path / "m.json"
    out = run("metrics.py", "--smoke", "--scikit-learn", "--json", str(file))
    record = json.loads(file.read_text())
    assert record["examples"] == 2000 and "| `summary` |" in out
    for dtype in ("float32", "float64"):
        times = record["results"][dtype]["times"]
        assert {"ece", "ovr_auroc", "smooth_ece", "entropy", "summary"} <= set(times)
        assert all(x["seconds"] > 0 and x["n"] == 1 for x in times.values())
        assert record["results"][dtype]["extra_memory"] > 0
    assert abs(record["scikit_learn_difference"]) < 1e-12


@pytest.mark.slow
def test_memory_in_its_smoke_form(tmp_path):
    file = tmp_path / "m.json"
    out = run("memory.py", "--smoke", "--variants", "remat", "--json", str(file))
    results = json.loads(file.read_text())["results"]
    assert list(results) == ["remat"] and "| step | remat, MiB |" in out
    assert all(result["peak_mib"] > 0 for result in results["remat"].values())


@pytest.mark.slow
def test_models_in_its_smoke_form(tmp_path):
    file = tmp_path / "m.json"
    out = run("models.py", "--smoke", "--json", str(file))
    result = json.loads(file.read_text())["results"]["cnn_small"]
    assert "| cnn_small | 14,746 | 17,716 |" in out
    # 2 x multiply-adds, padding left out: XLA counts no products with it.
    padded = 2 * 9 * (64 * 3 * 16 + 16 * 16 * 32 + 16 * 32 * 32) + 2 * 320
    assert 0.6 * padded < 1e6 * result["forward_mflop"] < 1.1 * padded
    assert result["forward_images_per_second"] > 0 and result["n"] == 1


@pytest.mark.slow
def test_ensemble_in_its_smoke_form(tmp_path):
    file = tmp_path / "e.json"
    out = run("ensemble.py", "--smoke", "--json", str(file))
    results = json.loads(file.read_text())["results"]
    assert list(results) == ["1", "2"]
    assert list(results["2"]) == ["separate", "vmap", "unroll", "scan"]
    assert results["2"]["separate"]["ratio_to_separate"] == 1.0
    assert all(x["peak_mib"] > 0 for x in results["2"].values())
    assert "| 2 | scan |" in out


@pytest.mark.slow
def test_bnn_in_its_smoke_form(tmp_path):
    file = tmp_path / "b.json"
    out = run("bnn.py", "--smoke", "--json", str(file))
    record = json.loads(file.read_text())
    results = record["results"]
    assert results["SGVB"]["ratio_to_sgvb"] == 1.0
    assert [x["gradients"] for x in results.values()] == [1, 2.5, 2]
    assert all(x["peak_mib"] > 0 and x["n"] == 1 for x in results.values())
    assert set(record["variance"]) == {"weights", "local", "flipout"}
    assert all(of["8"] > 0 for of in record["variance"].values())
    assert "| SGVB, flipout |" in out and "| flipout |" in out


@pytest.mark.slow
def test_every_step_of_bnn_can_be_traced(monkeypatch):
    """Its smoke form compiles three of them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bnn")
    model, batch = models.create("cnn_small", 10), module.make_batch(8, 8)
    counts = []
    for step, gradients in module.make_steps(model).values():
        arguments = jax.eval_shape(
            functools.partial(module.make_arguments, step, model, batch)
        )
        after = jax.eval_shape(step.function, *arguments)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, arguments[:3])
        counts.append(gradients)
    assert counts == [1, 2.5, 2, 2, 4.5, 2, 2]


@pytest.mark.slow
def test_bnn_digits_in_its_smoke_form(tmp_path):
    file = tmp_path / "d.json"
    out = run("bnn_digits.py", "--smoke", "--json", str(file))
    (row,) = json.loads(file.read_text())["results"]
    assert row["method"] == "SGVB" and row["n"] == 1 and row["epistemic"]["mean"] > 0
    assert "| 0.1 | SGVB | 1 |" in out


@pytest.mark.slow
def test_landscape_in_its_smoke_form(tmp_path):
    file = tmp_path / "l.json"
    out = run("landscape.py", "--smoke", "--json", str(file))
    record = json.loads(file.read_text())
    assert record["points"] == 3 and list(record["grid"]) == ["1", "4"]
    assert all(x["line"]["n"] == 1 for x in record["grid"].values())
    assert all(x["peak_mib"] > 0 for x in record["grid"].values())
    assert record["grid"]["1"]["grid"]["n"] == 1
    assert record["hessian"]["gradient"]["gradients"] == 1.0
    assert "| trace, 2 probes |" in out and {"load", "cores", "date"} <= set(record)


@pytest.mark.slow
def test_cpu_alternatives_in_their_smoke_form(tmp_path):
    """Every formula is right, and what runs is timed."""
    file = tmp_path / "c.json"
    out = run("cpu_alternatives.py", "--smoke", "--json", str(file))
    record = json.loads(file.read_text())
    for part, count in (("forward", 6), ("images", 5), ("kernel", 8)):
        (layer,) = record["layers"][part]
        assert len(set(layer["ways"]) - {"PyTorch"}) == count
        for name, values in layer["ways"].items():
            assert values["error"] < 3e-6, (part, name)
            if part != "images" or name in ("XLA", "ours"):
                assert f"| {part}: {name} | {values['milliseconds']:.1f}" in out
    assert {"XLA", "ours"} <= set(record["steps"]["SGD"])
    assert all(values["n"] == 1 for values in record["steps"]["SGD"].values())
    assert record["flags"]["none"]["SGD, ours"]["speedup"] == 1


@pytest.mark.slow
def test_cpu_versions_in_their_smoke_form(tmp_path):
    """Workers run what they are told, and a second run adds to the first one's file."""
    file = tmp_path / "v.json"
    run("cpu_versions.py", "--smoke", "--only", "layers", "--json", str(file))
    out = run("cpu_versions.py", "--smoke", "--only", "steps", "--json", str(file))
    record = json.loads(file.read_text())
    assert {"jax", "cores", "date", "kept"} <= set(record)
    ways = [f"JAX {jax.__version__}{x}" for x in (": XLA", ": ours")]
    kept = [way.replace(":", ", kept:") for way in ways]
    assert list(record["steps"]) == ["SGD"]
    assert list(record["steps"]["SGD"]) == [*ways, *kept]
    assert [len(ways) for ways in record["layers"].values()] == [1, 2, 2]
    for values in record["steps"]["SGD"].values():
        assert values["n"] == 1 and values["peak_mib"] > 0
        assert f"| {values['processor_milliseconds']:.0f} |" in out


@pytest.mark.slow
@pytest.mark.parametrize("formula", ["winograd", "im2col", "nine_products"])
def test_other_formulas_have_the_gradients_of_a_convolution(formula, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu_alternatives as other

    convolution = other.assemble(getattr(other, formula), other.im2col_kernel)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 6, 4, 16))
    w = jax.random.normal(keys[1], (3, 3, 16, 5))
    y = jax.random.normal(keys[2], (2, 6, 4, 5))
    ours = jax.vjp(lambda *xw: convolution(*xw, (1, 1), other.PAD), x, w)
    expected = jax.vjp(other.xla, x, w)
    for a, b in zip(
        (ours[0], *ours[1](y)), (expected[0], *expected[1](y)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_pytorch_counts_the_same_parameters(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("pytorch_step").WideResNet(28, 10)
    count = models.parameter_count(models.create("wide_resnet_28_10", 10), (32, 32, 3))
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.slow
def test_no_backend_starts_before_pytorch_has_run(tmp_path):
    """Else JAX would hold most of the device's memory by then."""
    images, labels = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 2
    images[:, 0] = 9  # no constant channel
    file = str(tmp_path / "set.npz")
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import accelerator; "
        f"accelerator._training.read({file!r}); "  # images are read meanwhile
        "from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_model_flops_of_a_wide_resnet(backend, accelerator, monkeypatch):
    """Of the zoo's own convolution on CPUs, and of XLA's elsewhere."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def convolution(pixels, inputs, outputs, size=3):
        return 2 * pixels * size**2 * inputs * outputs

    expected = convolution(1024, 3, 16) + 2 * 64 * 10  # stem and classifier
    channels = 16
    for pixels, width in ((1024, 32), (256, 64), (64, 128)):
        expected += convolution(pixels, channels, width)
        expected += convolution(pixels, width, width)
        expected += convolution(pixels, channels, width, size=1)
        channels = width
    expected += 2 * (128 - 64) * 10
    images = jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32)
    (speed,) = parts("_speed")
    for remat in (False, True):
        model = models.create("wide_resnet_10_2", 10, remat=remat)
        assert speed.forward_flops(model, images) == 3 * expected


def test_a_failure_and_a_lack_of_time_are_recorded(accelerator, tmp_path):
    short = session(accelerator, tmp_path)
    assert short.attempt("works", 0, lambda: 3) == 3
    assert short.attempt("fails", 0, lambda: 1 / 0) is None
    assert short.attempt("is long", 3600, lambda: 3) is None
    (own,) = parts("_session")
    ready = own.compile_all(
        short, "group", {"bad": (1, lambda: 1 / 0), "long": (1e6, lambda: 3)}
    )
    assert ready == {}
    record = json.loads((tmp_path / "a.json").read_text())
    assert set(record["errors"]) == {"fails", "group: bad"}
    assert [line.split(":")[0] for line in record["skipped"]] == ["is long", "group"]


def test_what_runs_is_timed_beside_what_fails(accelerator, tmp_path):
    def out_of_memory(times=1):
        raise MemoryError(f"for {times}")

    short = session(accelerator, tmp_path)
    ready = {"good": (lambda times=1: None, {}), "bad": (out_of_memory, {})}
    (speed,) = parts("_speed")
    assert list(speed.time_all(short, "group", ready)) == ["good"]
    assert "MemoryError" in short.record["errors"]["group: bad, run"]


def narrow_products(agreement, monkeypatch):
    """What the accelerator should compute in float32, it computes in bfloat16."""
    real, made = agreement.cases, []

    def cases(model, how):
        made.append(how)  # the first are the CPU's own
        narrow = models.create(model.name, 10, dtype=jnp.bfloat16)
        return real(narrow if len(made) > 1 else model, how)

    monkeypatch.setattr(agreement, "cases", cases)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [lambda *_: None, narrow_products])
def test_agreement_fails_where_products_are_narrow(
    spoil, accelerator, tmp_path, monkeypatch
):
    (agreement,) = parts("_agreement")
    all_cases = agreement.cases
    monkeypatch.setattr(agreement, "MAPS", ("unroll",))
    monkeypatch.setattr(
        agreement, "cases", lambda *args: {"SGD": all_cases(*args)["SGD"]}
    )
    spoil(agreement, monkeypatch)
    run = session(accelerator, tmp_path)
    agreement.check(run, "cnn_small", 8)
    found = run.record["agreement"]["results"]["SGD"]["float32"]
    assert found["passed"] is (spoil is not narrow_products)
    # Between what sums of float32 and products of TF32 (2^-11) are off by.
    assert 2.0**-24 < found["tolerance"] < 2.0**-11
    assert set(found["errors"]) == {"loss", "gradient", "statistics"}


def test_each_output_has_its_own_tolerance(accelerator):
    """One that others would hide; and by chance a tenth of the largest is allowed."""
    (agreement,) = parts("_agreement")
    right = {"loss": np.array(1.0), "gradient": np.array([1.0, 0.0])}
    rounded = {"loss": np.array(1.0001), "gradient": np.array([1.0, 0.01])}
    inputs = {"w": np.ones((2, 2), np.float32)}, {}, (np.ones((2, 2, 2, 1)), None), None

    def compared(loss, tilt):
        def program(given=inputs):
            return right if given is inputs else rounded

        own = {"float32 SGD": program, "bfloat16 SGD": lambda: rounded}
        found = {"loss": np.array(loss), "gradient": np.array([1.0, tilt])}
        return agreement.compare(lambda: found, own, "bfloat16", "SGD", inputs)

    assert compared(1.0039, 0.039)["passed"]
    worse = compared(1.0041, 0.01)
    assert (worse["output"], worse["passed"]) == ("loss", False)
    assert worse["tolerance"] == pytest.approx(4 * 0.01 / 10)
    assert compared(1.0, 0.041)["output"] == "gradient"
    assert not compared(1.0, 0.041)["passed"]
    assert not compared(np.nan, 0.0)["passed"]
    rounded["gradient"] = np.array([np.inf, 0.0])  # then nothing is known
    assert not compared(1.0, 0.01)["passed"]
    nothing = agreement.errors({"x": np.zeros(2)}, {"x": np.zeros(2)})
    something = agreement.errors({"x": np.ones(2)}, {"x": np.zeros(2)})
    assert (nothing["x"], something["x"]) == (0.0, np.inf)


def test_what_crashes_does_not_agree(accelerator):
    record = {"steps": {}, "pytorch": {}}
    record["agreement"] = {
        "planned": 4,
        "results": {"SGD": {"float32": {"passed": True}, "bfloat16": {"passed": True}}},
    }
    rows = {row["target"]: row for row in accelerator.targets(record)}
    found = rows["cases that agree with the CPU all of them"]
    assert (found["measured"], found["passed"]) == (0.5, False)


def test_errors_are_relative_and_over_all_leaves(accelerator):
    (agreement,) = parts("_agreement")
    right = {"gradient": {"a": np.array([3.0, 0.0]), "b": np.array(4.0)}}
    found = {"gradient": {"a": np.array([3.0, 0.3]), "b": np.array(4.4)}}
    assert agreement.errors(found, right)["gradient"] == pytest.approx(0.1)
    found["gradient"]["b"] = np.array(np.nan)
    assert not agreement.largest(agreement.errors(found, right).values()) <= 1e9


@pytest.mark.slow
def test_every_case_of_agreement_can_be_traced(accelerator, monkeypatch):
    """As on an accelerator, in float16, whose loss is scaled: smoke is in float32."""
    (agreement,) = parts("_agreement")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = models.create("cnn_small", 10, dtype=jnp.float16)
    *trees, batch, data = agreement.make_inputs(model, 8, 8)
    key = jax.random.wrap_key_data(data)
    names = []
    for how in agreement.MAPS:
        for name, case in agreement.cases(model, how).items():
            found = jax.eval_shape(case, *trees, batch, key)
            assert jax.tree.map(jnp.shape, found["gradient"]) == jax.tree.map(
                jnp.shape, trees[0]
            )
            names.append(name)
            assert agreement.reference_of(name) in agreement.cases(model, "unroll")
    assert len(names) == len(set(names)) == 10


def test_the_learning_rate_rises_and_falls_linearly(accelerator):
    (training,) = parts("_training")
    found = np.asarray(training.rates(10, 16, 256))
    # A fifth of 10 steps up to 0.4 * 256 / 512, and down to 0 after the last.
    expected = np.interp(np.arange(10), [-0.0, 2, 10], [0.1, 0.2, 0.0])
    np.testing.assert_allclose(found, [*expected, *np.zeros(6)], rtol=1e-5, atol=1e-8)


def test_jpeg_scans_are_read_as_images(accelerator, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    (training,) = parts("_training")
    # Plain colours, which JPEG keeps: images of class i have the level 20 i.
    levels, scans = 20 * np.arange(12) % 200, []
    for level in levels:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (int(level),) * 3).save(file, "JPEG")
        header, scan = file.getvalue().split(b"\xff\xda", 1)
        scans.append(np.frombuffer(b"\xff\xda" + scan, np.uint8))
    np.savez(
        tmp_path / "scans.npz",
        header=np.frombuffer(header, np.uint8),
        scans=np.concatenate(scans),
        offsets=np.cumsum([0, *map(len, scans)]).astype(np.uint32),
        labels=(levels // 20).astype(np.uint8),
        is_test=np.arange(12) >= 10,
    )
    found = training.read(tmp_path / "scans.npz")
    assert found.train.num_examples == 10 and found.test.labels.tolist() == [0, 1]
    wrong = found.train.images.astype(int) - levels[:10, None, None, None]
    assert np.abs(wrong).max() <= 1 and found.augment == ("crop", "flip")


@pytest.mark.parametrize(("seconds", "epochs"), [(10.0, 30), (4.0, 12), (0.1, None)])
def test_epochs_are_as_many_as_fit(seconds, epochs, accelerator, tmp_path, monkeypatch):
    (training,) = parts("_training")
    images, labels = np.zeros((96, 8, 8, 3), np.uint8), np.arange(96) % 4
    images[:, 0] = 9  # no constant channel
    dataset = data.from_arrays((images, labels), (images[:8], labels[:8]))
    ready = {name: ((), {}) for name in training.METHODS}
    monkeypatch.setattr(training, "compile_all", lambda *_: ready)
    # Three batches of 32 an epoch, and three methods: 0.3 s an epoch of all.
    monkeypatch.setattr(training, "seconds_a_step", lambda *_: 1 / 30)
    chosen = []

    def train(ready, dataset, examples, epochs, batch_size):
        chosen.append(epochs)
        values = ("accuracy", "nll", "ece", "seconds", "images_per_second")
        return {**dict.fromkeys(values, 0.5), "epochs": epochs}

    monkeypatch.setattr(training, "train", train)
    run = session(accelerator, tmp_path)
    arguments = (run, dataset, "cnn_small", "float32", 32, seconds)
    run.attempt("training", 0, training.train_all, *arguments)
    assert chosen == [epochs] * 3 if epochs else not chosen and run.record["skipped"]
    assert not run.record["errors"]


def test_no_set_is_recorded_and_the_rest_of_the_plan_goes_on(accelerator, tmp_path):
    def no_set():
        raise accelerator.Skipped("no file")

    run = session(accelerator, tmp_path)
    order = []
    for part, name, _, function, arguments in accelerator.plan(run, no_set):
        order.append(part)
        if part == "training":
            run.attempt(name, 0, function, *arguments)
    assert order == ["steps", "agreement", "training", "ensemble"]
    assert run.record["skipped"] == ["training: no file"]


def test_the_plan_has_every_group_once_and_targets_first(accelerator, tmp_path):
    run = session(accelerator, tmp_path)
    run.options.smoke, run.options.particles = False, [4, 2]
    found = accelerator.plan(run, lambda: None)
    assert [row[:2] for row in found[:4]] == [
        ("steps", "wide_resnet_28_10 bfloat16 128"),
        ("steps", "wide_resnet_28_10 bfloat16 512"),
        ("agreement", "agreement"),
        ("training", "training"),
    ]
    groups = [str(row[4][1:]) for row in found if row[0] == "steps"]
    assert len(groups) == len(set(groups)) == 16


@pytest.mark.slow
def test_agreement_and_training_in_their_smoke_form(tmp_path):
    labels = np.arange(96) % 4
    images = np.random.default_rng(0).random((96, 8, 8, 3)) * 60
    images = (images + 45 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(
        tmp_path / "set.npz",
        x_train=images, y_train=labels, x_test=images[:32], y_test=labels[:32],
    )  # fmt: skip
    file = tmp_path / "a.json"
    options = ["--smoke", "--only", "agreement", "training"]
    options += ["--cifar10", str(tmp_path / "set.npz"), "--json", str(file)]
    out = run("accelerator.py", *options)
    record = json.loads(file.read_text())
    assert not record["errors"] and not record["skipped"]
    cases = record["agreement"]["results"]
    assert len(cases) == 10 and all(x["float32"]["passed"] for x in cases.values())
    trained = record["training"]["results"]
    assert list(trained) == ["SGD", "SAM", "OT-MDR K=1"]
    for values in trained.values():
        assert values["accuracy"] > 0.9 and values["skipped_steps"] == 0
        assert values["epochs"] == len(values["last_loss_of_epochs"]) >= 1
    assert "| cases that agree with the CPU all of them | 1.000 | pass |" in out


@pytest.mark.parametrize(("four", "passed"), [(29.0, True), (31.0, False)])
def test_targets_pass_and_fail(accelerator, four, passed):
    results = {
        "OT-MDR K=1": {"milliseconds": 10.0, "ratio_to_optax_sam": 1.04},
        "OT-MDR K=4 vmap": {"milliseconds": four},
    }
    results["OT-MDR K=1"]["images_per_second"] = 12_800
    record = {
        "steps": {"wide_resnet_28_10 bfloat16 128": {"results": results}},
        "pytorch": {
            "results": {
                "bfloat16 128 eager": {"images_per_second": 10_000},
                "bfloat16 128 compiled": {"error": "no compiler"},
            }
        },
    }
    rows = {row["target"]: row for row in accelerator.targets(record)}
    at_128 = {name: row for name, row in rows.items() if " 128:" in name}
    assert [row["passed"] for row in at_128.values()] == [True, True, passed]
    assert {row["passed"] for name, row in rows.items() if " 512:" in name} == {None}


@pytest.mark.slow
def test_corruptions_in_their_smoke_form(tmp_path):
    file = tmp_path / "c.json"
    out = run("corruptions.py", "--smoke", "--json", str(file))
    record = json.loads(file.read_text())
    assert {"cnn_small", "rotation", "pixelate"} < set(record["results"])
    assert record["results"]["cnn_small"]["share"] == 1.0 and "| `rotation` |" in out
    run("corruptions.py", "--picture", str(tmp_path / "sheet.png"))
    assert (tmp_path / "sheet.png").stat().st_size > 20_000


@pytest.mark.slow
def test_dropout_in_its_smoke_form(tmp_path):
    file = tmp_path / "d.json"
    out = run("dropout.py", "--smoke", "--json", str(file))
    found = json.loads(file.read_text())["results"]["cnn_small"]
    assert found["step"]["ratio"] == 1.0 and "| `cnn_small` |" in out
    assert found["step with dropout"]["milliseconds"] > 0


@pytest.mark.slow
def test_shift_digits_in_its_smoke_form(tmp_path):
    file, picture = tmp_path / "s.json", tmp_path / "s.png"
    options = ["--smoke", "--json", str(file), "--picture", str(picture)]
    out = run("shift_digits.py", *options)
    records = json.loads(file.read_text())["results"]["SGD"]
    assert len(records) == 2 and picture.stat().st_size > 20_000
    values = [x["accuracy"] for record in records for x in record["corruptions"]]
    assert len(values) == 24 and f"| {100 * np.mean(values):.2f} ± " in out


@pytest.mark.slow
def test_methods_in_their_smoke_form(tmp_path):
    file = tmp_path / "m.json"
    out = run("methods.py", "--smoke", "--json", str(file))
    results = json.loads(file.read_text())["results"]
    assert results["sgd"]["ratio_to_sgd"] == 1.0 and results["sam"]["gradients"] == 2
    # SWAG holds its mean, variance and 20 deviations beside the weights.
    extra = results["swag"]["peak_mib"] - results["sgd"]["peak_mib"]
    assert extra > 22 * 4 * 14_746 / 2**20 and "| `swag` | 1 |" in out


@pytest.mark.slow
def test_first_minutes_in_their_smoke_form(tmp_path):
    file = tmp_path / "f.json"
    out = run("first_minutes.py", "--smoke", "--json", str(file))
    found = json.loads(file.read_text())["results"]["this"]
    assert found["cold"]["processor"] > found["warm"]["processor"] > 0.5
    assert 0 < found["warm"]["wall_beyond_steps"] < found["warm"]["wall"]
    assert found["report"]["n"] == 1 and "| this | report | 1 |" in out


@pytest.mark.slow
def test_noise_in_its_smoke_form(tmp_path):
    file = tmp_path / "n.json"
    out = run("noise.py", "--smoke", "--json", str(file))
    (found,) = json.loads(file.read_text())["networks"].values()
    ways = found["ways"]
    assert list(ways) == ["no noise", "together", "leaf by leaf"]
    assert all(way["n"] == 2 and way["milliseconds"] > 0 for way in ways.values())
    # They are programs of their own: noise takes operations.
    assert ways["no noise"]["gflop"] < min(ways[w]["gflop"] for w in list(ways)[1:])
    third = ways["leaf by leaf"]["compile_seconds"]
    assert f"| cnn_small | {found['leaves']} | leaf by leaf | {third:.1f} |" in out


@pytest.mark.slow
def test_sweeps_in_their_smoke_form(tmp_path):
    file, picture = tmp_path / "s.json", tmp_path / "s.png"
    options = ["--smoke", "--json", str(file), "--picture", str(picture)]
    out = run("sweeps.py", str(EXAMPLES / "sweep_digits.toml"), *options)
    rows = json.loads(file.read_text())["results"]
    assert len(rows) == 6 and picture.stat().st_size > 20_000
    sgd = [100 * row["accuracy"] for row in rows[:2]]
    mean, std = np.mean(sgd), np.std(sgd, ddof=1)
    assert f"| SGD | 2 | {mean:.2f} ± {std:.2f} |" in out


def test_the_comparison_asks_about_the_methods_of_its_sweep(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    comparison = importlib.import_module("comparison")
    plan = sweep.plan(EXAMPLES / "sweep_fair.toml", tmp_path)
    named = {name for _, *both in comparison.QUESTIONS for name in both}
    assert named == {setting.method for setting in plan.settings}
    # All that are tuned go the same five distances at most, but for the fixed ones.
    distances = {}
    for one in plan.tuning.runs:
        name = next(x.method for x in plan.settings if x.label == one.label)
        distances.setdefault(name, []).append(sum(one.config.method.rho))
    assert len(distances) == 10
    for name, found in distances.items():
        np.testing.assert_allclose(found, [0.075, 0.15, 0.3, 0.45, 0.6], err_msg=name)
    assert plan.unequal == []


@pytest.mark.slow
def test_the_comparison_in_its_smoke_form(tmp_path, monkeypatch):
    file = tmp_path / "c.json"
    options = ["--smoke", "--json", str(file), "--pictures", str(tmp_path)]
    out = run("comparison.py", str(EXAMPLES / "sweep_fair.toml"), *options)
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("SGD", "SAM", "OT-MDR") for seed in (0, 1)
    ]
    assert all(row["shifted_nll"] > 0 and row["sharpness"] != 0 for row in rows)
    for name in ("differences", "radii"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    ours, theirs = (
        [100 * row["accuracy"] for row in rows if row["method"] == name]
        for name in ("OT-MDR", "SAM")
    )
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    text = f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}"
    assert f"| OT-MDR - SAM | {text} |" in out
    assert run("comparison.py", "--read", str(file)) in out
