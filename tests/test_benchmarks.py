"""The benchmarks as a user runs them, shrunk, and what they say they count."""

import argparse
import functools
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otmdr_jax import models

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
EXAMPLES = BENCHMARKS.parent / "examples"


def run(name, *args):
    # Small networks compile for longer than they run.
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *args],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env=quick,
    ).stdout


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    return importlib.import_module("accelerator")


def session(accelerator, tmp_path, minutes=1.0):
    options = argparse.Namespace(
        minutes=minutes, json=str(tmp_path / "a.json"), smoke=True, rounds=1, threads=2
    )
    return accelerator.Session(options)


@pytest.mark.slow
def test_accelerator_in_its_smoke_form(tmp_path):
    file = tmp_path / "a.json"
    options = ["--smoke", "--only", "peak", "steps", "--particles"]
    out = run("accelerator.py", *options, "--json", str(file))
    record = json.loads(file.read_text())
    assert not record["errors"] and not record["skipped"]
    assert {"device", "nvidia_smi", "jax", "flax", "optax", "date"} <= set(record)
    assert {"bfloat16", "float32", "float32 highest", "copy"} == set(record["peak"])
    assert "not measured" in out and len(record["targets"]) == 6

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


def test_no_backend_starts_before_pytorch_has_run():
    """Else JAX would hold most of the device's memory by then."""
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import accelerator; "
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
    for remat in (False, True):
        model = models.create("wide_resnet_10_2", 10, remat=remat)
        assert accelerator.forward_flops(model, images) == 3 * expected


def test_a_failure_and_a_lack_of_time_are_recorded(accelerator, tmp_path):
    short = session(accelerator, tmp_path)
    assert short.attempt("works", 0, lambda: 3) == 3
    assert short.attempt("fails", 0, lambda: 1 / 0) is None
    assert short.attempt("is long", 3600, lambda: 3) is None
    ready = accelerator.compile_all(
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
    assert list(accelerator.time_all(short, "group", ready)) == ["good"]
    assert "MemoryError" in short.record["errors"]["group: bad, run"]


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


def test_scaling_counts_what_a_program_exchanges(monkeypatch):
    """Two reductions, of 3 and 5 + 1 floats."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    from otmdr_jax import parallel

    def step(w, batch):
        first = jax.lax.pmean(w * jnp.sum(batch), "data")
        second = jax.lax.pmean((jnp.ones(5) * jnp.sum(first * batch[0]), w[0]), "data")
        return first, second

    mesh = parallel.make_mesh("data=4")
    run = parallel.shard_map_step(step, mesh, donate=False, check_vma=False)
    program = run.lower(jnp.ones(3), jnp.ones((8, 3))).compile()
    assert scaling.collectives(program) == (2, 4 * (3 + 5 + 1))


def test_scaling_predicts_by_the_rings_formula(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    row = scaling.predict()["OT-MDR K=1"]
    seconds = 3 * 4 * 36_479_194 * 2 * (7 / 8) / 400e9
    np.testing.assert_allclose(row["all_reduce_ms_8"], 1e3 * seconds)
    assert row["efficiency_256"] < row["efficiency_8"] < 1


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
def test_sweeps_in_their_smoke_form(tmp_path):
    file, picture = tmp_path / "s.json", tmp_path / "s.png"
    options = ["--smoke", "--json", str(file), "--picture", str(picture)]
    out = run("sweeps.py", str(EXAMPLES / "sweep_digits.toml"), *options)
    rows = json.loads(file.read_text())["results"]
    assert len(rows) == 6 and picture.stat().st_size > 20_000
    sgd = [100 * row["accuracy"] for row in rows[:2]]
    mean, std = np.mean(sgd), np.std(sgd, ddof=1)
    assert f"| SGD | 2 | {mean:.2f} ± {std:.2f} |" in out
