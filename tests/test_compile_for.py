"""Programs for accelerators: compiled where XLA's compilers for them are, and counted.

`make compilers` puts the compilers into .compilers, for a JAX of their version.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otmdr_jax import parallel

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RECORDS = sorted((BENCHMARKS / "results" / "compiled").glob("*.json"))
COMPILERS = ROOT / ".compilers"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    """Benchmarks are scripts, which import each other from their own folder."""
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        yield


def compiled(function, *arguments):
    return _summary(jax.jit(function).lower(*arguments).compile())


def _summary(program):
    import _program

    return _program.summary(program.as_text())


class TestOperations:
    """Counted by hand, and by XLA."""

    def test_products_and_loops(self):
        import _program

        a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
        assert _program.operations(jnp.matmul, a, b) == {"float32": 2 * 3 * 5 * 7}

        def looped(a, b):
            def body(carry, _):
                return carry + jnp.sum(jax.jit(jnp.matmul)(a, b)), None

            return jax.lax.scan(body, 0.0, None, length=4)[0]

        assert _program.operations(looped, a, b) == {"float32": 4 * 2 * 3 * 5 * 7}
        half = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        assert _program.operations(jnp.matmul, *half) == {"bfloat16": 2 * 3 * 5 * 7}

    def test_the_dearer_branch_counts(self):
        import _program

        def either(x):
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x)

        assert _program.operations(either, jnp.ones((4, 4))) == {"float32": 2 * 2 * 64}

    @pytest.mark.parametrize("stride", [1, 2, 3])
    @pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 1), (2, 0))])
    def test_convolutions_and_their_gradients(self, stride, padding):
        """A loop over output pixels and taps counts those that meet the image."""
        import _program

        images, kernel = jnp.ones((2, 7, 8, 3)), jnp.ones((3, 3, 3, 4))

        def convolve(images, kernel):
            return jax.lax.conv_general_dilated(
                images,
                kernel,
                (stride, stride),
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        out = jax.eval_shape(convolve, images, kernel).shape
        taps = 0
        for position in np.ndindex(out[1], out[2]):
            for tap in np.ndindex(3, 3):
                at = [
                    p * stride + t - low
                    for p, t, (low, _) in zip(position, tap, padding, strict=True)
                ]
                taps += 0 <= at[0] < 7 and 0 <= at[1] < 8
        want = 2 * 2 * taps * 3 * 4
        assert _program.operations(convolve, images, kernel) == {"float32": want}

        def loss(images, kernel):
            return jnp.sum(convolve(images, kernel) ** 2)

        # The gradients of the images and of the kernel take as many.
        both = jax.grad(loss, (0, 1))
        assert _program.operations(both, images, kernel) == {"float32": 3 * want}

    def test_depthwise(self):
        import _program

        images, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 1, 6))

        def convolve(images, kernel):
            return jax.lax.conv_general_dilated(
                images,
                kernel,
                (1, 1),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=6,
            )

        want = 2 * 2 * 36 * 9 * 6
        assert _program.operations(convolve, images, kernel) == {"float32": want}


class TestKernels:
    """Of programs that are compiled for this CPU."""

    def test_a_loop_counts_as_often_as_it_runs(self):
        def looped(x):
            return jax.lax.fori_loop(0, 6, lambda i, x: jnp.sin(x) @ x, x)

        found = compiled(looped, jnp.ones((32, 32)))["kernels"]
        once = compiled(lambda x: jnp.sin(x) @ x, jnp.ones((32, 32)))["kernels"]
        assert once["product"] == 1
        assert found["product"] == 6

    @pytest.mark.parametrize(
        ("function", "floats"),
        [
            # Fused with a sine: 100 of 10,000 are read, and as many written.
            (lambda x: jnp.sin(x[300:400]), 200),
            (
                lambda x: jnp.sin(jax.lax.dynamic_slice(x, (x.shape[0] // 3,), (100,))),
                200,
            ),
            (lambda x: jnp.sin(x), 20_000),
            (lambda x: jnp.sin(x[:100]) + x[100:200] * x[-100:], 400),
        ],
    )
    def test_of_a_slice_only_the_part_is_read(self, function, floats):
        found = compiled(function, jnp.ones(10_000))
        assert found["bytes"] == pytest.approx(4 * floats, abs=64)

    def test_an_update_in_place_writes_the_part(self):
        def update(x, y):
            return jax.lax.dynamic_update_slice(x, jnp.sin(y), (300,))

        program = jax.jit(update, donate_argnums=0)
        program = program.lower(jnp.ones(10_000), jnp.ones(100)).compile()
        assert _summary(program)["bytes"] == pytest.approx(4 * 200, abs=64)

    def test_a_loop_whose_length_nobody_knows_is_told_of(self):
        def looped(x):
            return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ x, x)

        found = compiled(looped, jnp.ones((32, 32)))
        assert found["loops of unknown length"] == 1
        assert found["kernels"]["product"] == 1

    def test_a_loop_of_a_compiler_that_notes_no_length(self):
        """Its condition tells."""
        import _program

        text = HLO.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
        assert '"n"' not in text
        found = _program.summary(text)
        assert found["kernels"]["elementwise"] == 5
        unclear = text.replace("direction=LT", "direction=NE")
        assert _program.summary(unclear)["loops of unknown length"] == 1

    def test_all_reduces_and_what_they_send(self):
        mesh = parallel.make_mesh("data=4")

        def mean(x):
            return jax.lax.pmean(jnp.sum(x, axis=0), "data")

        spec = jax.sharding.PartitionSpec("data")
        call = jax.shard_map(
            mean, mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec()
        )
        found = compiled(call, jnp.ones((8, 5)))
        assert found["kernels"]["all-reduce"] == 1
        assert found["exchanged_bytes"] == {"all-reduce": 20}
        assert found["sent_bytes"] == 2 * 20 * 3 / 4
        assert found["collectives"]["in the program"] == 1

    def test_two_exchanges_of_which_one_joins_arrays(self):
        """Of 3 and of 5 + 1 floats."""

        def step(w, batch):
            first = jax.lax.pmean(w * jnp.sum(batch), "data")
            both = jnp.ones(5) * jnp.sum(first * batch[0]), w[0]
            return first, jax.lax.pmean(both, "data")

        mesh = parallel.make_mesh("data=4")
        run = parallel.shard_map_step(step, mesh, donate=False, check_vma=False)
        program = run.lower(jnp.ones(3), jnp.ones((8, 3))).compile()
        found = _summary(program)
        assert found["kernels"]["all-reduce"] == 2
        assert found["exchanged_bytes"] == {"all-reduce": 4 * (3 + 5 + 1)}
        assert found["sent_bytes"] == 2 * 4 * (3 + 5 + 1) * 3 / 4

    @pytest.mark.parametrize(
        ("collective", "whole", "sent"),
        [
            # Pairs of 4 devices: 12 floats of each, 24 gathered, 12 scattered.
            (lambda x: jax.lax.all_gather(x, "particle"), 4 * 24, 4 * 12),
            (lambda x: jax.lax.psum_scatter(x, "particle", tiled=True), 4 * 12, 4 * 6),
            (
                lambda x: jax.lax.all_to_all(x, "particle", 0, 0, tiled=True),
                4 * 12,
                4 * 6,
            ),
            (
                lambda x: jax.lax.ppermute(x, "particle", [(0, 1), (1, 0)]),
                4 * 12,
                4 * 12,
            ),
            (lambda x: jax.lax.psum(x, "particle"), 4 * 12, 4 * 12),
            (lambda x: jax.lax.psum(x, ("data", "particle")), 4 * 12, 4 * 18),
        ],
    )
    def test_what_a_device_sends_in_a_ring(self, collective, whole, sent):
        call = jax.shard_map(
            collective,
            mesh=parallel.make_mesh("data=2,particle=2"),
            in_specs=jax.sharding.PartitionSpec(("data", "particle")),
            out_specs=jax.sharding.PartitionSpec(("data", "particle")),
            check_vma=False,
        )
        found = compiled(call, jnp.ones((16, 3)))
        assert sum(found["exchanged_bytes"].values()) == whole
        assert found["sent_bytes"] == sent


HLO = """
HloModule jit_step, is_scheduled=true

%grown (a.1: f32[8,4]) -> f32[8,4] {
  %a.1 = f32[8,4]{1,0} parameter(0)
  ROOT %t.1 = f32[8,4]{1,0} tanh(%a.1)
}

%moved (b.1: bf16[4,2,3]) -> bf16[3,4,2] {
  %b.1 = bf16[4,2,3]{2,1,0} parameter(0)
  ROOT %t.2 = bf16[3,4,2]{2,1,0} transpose(%b.1), dimensions={2,0,1}
}

%more (s.2: (s32[], f32[8,4])) -> pred[] {
  %s.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  %n.2 = s32[]{:T(128)} constant(5)
  ROOT %l.2 = pred[]{:T(512)} compare(%i.2, %n.2), direction=LT
}

%body (s.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %x.1 = f32[8,4]{1,0} get-tuple-element(%s.1), index=1
  %f.1 = f32[8,4]{1,0} fusion(%x.1), kind=kLoop, calls=%grown
  ROOT %r.1 = (s32[], f32[8,4]{1,0}) tuple(%i.1, %f.1)
}

%scattered (g.1: bf16[128]) -> bf16[16] {
  %g.1 = bf16[128]{0} parameter(0)
  ROOT %g.2 = bf16[16]{0} reduce-scatter(%g.1), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main (p.1: f32[8,4], p.2: bf16[4,2,3], p.3: bf16[16]) -> f32[8,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  %p.2 = bf16[4,2,3]{2,1,0} parameter(1)
  %p.3 = bf16[16]{0} parameter(2)
  %start.1 = bf16[16]{0} all-reduce-start(%p.3), replica_groups={{0,1,2,3},{4,5,6,7}}
  %m.1 = bf16[3,4,2]{2,1,0} fusion(%p.2), kind=kInput, calls=%moved
  %w.1 = (s32[], f32[8,4]{1,0}) while(%init.1), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %end.1 = bf16[16]{0} all-reduce-done(%start.1)
  %c.1 = (bf16[2,2]{1,0}, u8[999]{0}) custom-call(%m.1, %end.1), custom_call_target="__cudnn$convForward"
  %start.2 = ((bf16[16]{0}), bf16[128]{0}) all-gather-start(%end.1), replica_groups=[1,8]<=[8], dimensions={0}
  %end.2 = bf16[128]{0} all-gather-done(%start.2)
  %start.3 = ((bf16[128]{0}), bf16[16]{0}, u32[]) async-start(%end.2), calls=%scattered
  %c.3 = bf16[2,2]{1,0} get-tuple-element(%c.1), index=0
  %c.2 = bf16[4]{0} custom-call(%c.3), custom_call_target="__cublas$gemm"
  %end.3 = bf16[16]{0} async-done(%start.3)
  %start.4 = ((bf16[128]{0}), bf16[8]{0}, s32[]) slice-start(%end.2), slice={[0:8]}
  %end.4 = bf16[8]{0} slice-done(%start.4)
  ROOT %out.1 = f32[8,4]{1,0} get-tuple-element(%w.1), index=1
}
"""  # noqa: E501


def test_a_program_of_a_gpu():
    import _program

    moved = {
        "5 rounds": 5 * (128 + 128),
        "transpose": 48 + 48,
        "all-reduce": 32 + 32,
        "convolution": 48 + 32 + 8,  # without the 999 bytes of its workspace
        "all-gather": 32 + 256,
        "reduce-scatter": 256 + 32,
        "product": 8 + 8,
        "slice": 16,
    }
    assert _program.summary(HLO) == {
        "kernels": {
            "all-gather": 1,
            "all-reduce": 1,
            "convolution": 1,
            "elementwise": 5,
            "prefetch": 1,
            "product": 1,
            "reduce-scatter": 1,
            "transpose": 1,
        },
        "bytes": sum(moved.values()),
        "exchanged_bytes": {"all-reduce": 32, "all-gather": 256, "reduce-scatter": 256},
        # By groups of 4, of 8 and of 8.
        "sent_bytes": 2 * 32 * 3 // 4 + 256 * 7 // 8 + 256 * 7 // 8,
        # The transpose and the loop run while the sum is under way, the product while
        # parts are scattered.
        "collectives": {
            "in the program": 3,
            "asynchronous": 3,
            "kernels beside them": 3,
        },
    }


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['data'=2,'model'=4] {'data'}", 2),
        ("mesh['data'=2,'model'=4] {'data','model'}", 8),
        ("{}", 8),
    ],
)
def test_the_devices_that_exchange(groups, size):
    """In all the ways in which XLA writes them; none means all."""
    import _program

    text = HLO.replace("{{0,1,2,3},{4,5,6,7}}", groups)
    text = text.replace("is_scheduled=true", "is_scheduled=true, num_partitions=8")
    found = _program.summary(text)["sent_bytes"]
    assert found == round(2 * 32 * (size - 1) / size + 2 * 256 * 7 / 8)


def test_collectives_inside_of_fusions_are_told_of():
    """As TPUs have them: begun in one fusion, ended in another."""
    import _program

    inside = """
%part.{0} (a.{0}: f32[8,4]) -> f32[8,4] {{
  %a.{0} = f32[8,4]{{1,0}} parameter(0)
  ROOT %g.{0} = f32[8,4]{{1,0}} all-reduce(%a.{0}), channel_id=7
}}
"""
    runs = "".join(
        f"  %fused.{i} = f32[8,4]{{1,0}} fusion(%p.1), kind=kCustom, calls=%part.{i}\n"
        for i in (7, 8)
    )
    text = inside.format(7) + inside.format(8) + HLO
    text = "HloModule x\n" + text.replace("  %start.1", runs + "  %start.1")
    found = _program.summary(text)
    assert found["collectives in fusions, not counted"] == 1
    assert found["collectives"]["in the program"] == 3


def test_a_target_that_nobody_knows():
    import _targets

    for name in ("h200", "v5e-3", "h100x", "h100x0", "h100x12", "v5p-1"):
        with pytest.raises(ValueError, match="targets are h100"):
            _targets.target_of(name)


@pytest.mark.parametrize(
    ("name", "kind", "platform", "devices", "rate"),
    [
        ("h100x8", "h100", "gpu", 8, 450e9),  # NVLink
        ("h100x64", "h100", "gpu", 64, 8 * 400e9 / 8),  # eight links of 400 Gb/s
        ("v5e-256", "v5e", "tpu", 256, 1600e9 / 8),
    ],
)
def test_the_rate_of_the_slowest_link(name, kind, platform, devices, rate):
    import _targets

    target = _targets.Target(name, _targets.CHIPS[kind], platform, [None] * devices)
    assert target.exchange_rate() == rate


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
class TestRecords:
    """What docs/accelerators.md says of every target holds in its record."""

    def cases(self, path):
        record = json.loads(path.read_text())
        return {
            (group, name): x
            for group, found in record["cases"].items()
            for name, x in found.items()
        }

    def test_everything_compiles_that_fits(self, path):
        """What does not fit is named on the page."""
        errors = {n: x["error"] for n, x in self.cases(path).items() if "error" in x}
        if path.stem == "v5e-4":
            large = errors.pop(("networks", "pyramidnet_101 at 224"))
            assert "49.21G) exceeds available HBM (15.75G)" in large
        assert errors == {}

    def test_memory_of_the_compared_steps(self, path):
        cases = self.cases(path)
        network = json.loads(path.read_text())["networks"].get("steps")
        if ("steps", "SAM") not in cases or network != "wide_resnet_28_10":
            pytest.skip("the record has no steps of WRN-28-10")
        peak = {n: x["peak_mib"] for (g, n), x in cases.items() if g == "steps"}
        assert peak["OT-MDR K=1"] <= 1.02 * peak["SAM"]
        for how in ("scan", "unroll"):
            assert peak[f"OT-MDR K=4 {how}"] <= 1.1 * peak["OT-MDR K=1"]


def shown(name, page="accelerators.md"):
    text = (ROOT / "docs" / page).read_text()
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def test_the_page_shows_the_records():
    import compile_for

    records = {path.stem: json.loads(path.read_text()) for path in RECORDS}
    assert compile_for.coverage(records.values()) in shown("coverage")
    for target, group in (
        ("h100", "steps"),
        ("h100", "ensembles"),
        ("h100", "methods"),
        ("h100x8", "scaling"),
        ("h100x8", "entries"),
        ("v5e-1", "steps"),
        ("v5e-4", "scaling"),
        ("v5e-4", "entries"),
    ):
        table = compile_for.table(records[target], group)
        assert table in shown(f"{group} {target}")
    slices = [records[x] for x in ("v5e-4", "v6e-8", "v5e-16", "v5p-256")]
    assert compile_for.exchanged(slices) in shown("exchange of TPUs")
    nodes = [records[x] for x in ("h100x8", "h100x64", "h100x256")]
    assert compile_for.weak_scaling(nodes) in shown("programs", "scaling.md")


def test_what_the_page_says_of_the_kernels_of_one_gpu():
    """OT-MDR's kernels beside SAM's, and what runs in float32."""
    steps = json.loads((RECORDS[0].parent / "h100.json").read_text())["cases"]["steps"]

    def others(name):
        found = steps[name]["kernels"]
        return sum(found.values()) - found["convolution"] - found["product"]

    ratio = others("OT-MDR K=1") / others("SAM")
    assert ratio <= 1.5
    page = (ROOT / "docs" / "accelerators.md").read_text()
    assert f"{ratio:.2f} times SAM's" in page
    for name, x in steps.items():
        in_float32 = x["operations"]["float32"] / sum(x["operations"].values())
        assert in_float32 < 2e-6, name


def test_what_the_page_says_of_the_exchange_of_tpus():
    """Whole gradients S + 1 times, whatever the chip and however many there are."""
    for target in ("v5e-4", "v6e-8", "v5e-16", "v5p-256"):
        path = RECORDS[0].parent / f"{target}.json"
        cases = json.loads(path.read_text())["cases"]["scaling"]
        once, two, three, alone = (
            sum(x["exchanged_bytes"].values()) for x in cases.values()
        )
        assert (two, three) == pytest.approx((2 * once, 3 * once), rel=1e-2)
        assert alone == pytest.approx(once, rel=1e-2)


def test_what_the_page_says_of_the_exchange_of_eight_gpus():
    """Whole gradients S + 1 times; with FSDP the weights once a pass, and the batch."""
    cases = json.loads((RECORDS[0].parent / "h100x8.json").read_text())["cases"]
    for found in (cases["scaling"], cases["entries"]):
        sent = {n: x["exchanged_bytes"] for n, x in found.items() if "sent_bytes" in x}
        once = sent["SGD"]["all-reduce"]
        for name, times in (
            ("SAM", 2),
            ("OT-MDR K=1", 3),
            ("OT-MDR K=1, per device", 1),
        ):
            assert sent[name]["all-reduce"] == pytest.approx(times * once, rel=1e-3)
    batch = 8 * 128 * (32 * 32 * 3 + 1) * 4
    weights = sent["FSDP: SGD"]["all-gather"]
    for name, passes in (("FSDP: OT-MDR K=1", 3), ("FSDP: OT-MDR K=2 scan", 6)):
        batches = passes // 3  # each particle has a split of its own
        want = passes * weights + batches * batch
        assert sent[name]["all-gather"] == pytest.approx(want, rel=1e-3)
    assert sent["FSDP: SAM"]["all-gather"] == pytest.approx(2 * weights, rel=1e-3)


class TestContinuing:
    """A record goes on with the same networks and the same compiler alone."""

    def target(self):
        import _targets

        chip = _targets.CHIPS["v5e"]
        return _targets.Target("v5e-4", chip, "tpu", [None] * 4)

    def options(self, folder, model="cnn_small", network="resnet_10"):
        return argparse.Namespace(folder=folder, model=model, network=network)

    def write(self, folder, **changes):
        import compile_for

        record = compile_for.continued(self.target(), ["scaling"], self.options(folder))
        record["cases"]["scaling"] = {"SGD": {}}
        (folder / "v5e-4.json").write_text(json.dumps(record | changes))

    def test_another_group_may_have_another_network(self, tmp_path):
        import compile_for

        self.write(tmp_path)
        options = self.options(tmp_path, "wide_resnet_28_10", "cnn_small")
        record = compile_for.continued(self.target(), ["entries"], options)
        assert record["networks"] == {"scaling": "cnn_small", "others": "cnn_small"}
        assert record["cases"] == {"scaling": {"SGD": {}}}

    def test_another_network_is_refused(self, tmp_path):
        import compile_for

        self.write(tmp_path)
        options = self.options(tmp_path, "wide_resnet_28_10")
        message = "network of scaling: it has cnn_small, .* for wide_resnet_28_10"
        with pytest.raises(SystemExit, match=message):
            compile_for.continued(self.target(), ["scaling"], options)

    def test_another_compiler_is_refused(self, tmp_path):
        import compile_for

        self.write(tmp_path, versions={"jax": "0.1"})
        with pytest.raises(SystemExit, match="differs in versions"):
            compile_for.continued(self.target(), ["entries"], self.options(tmp_path))

    def test_a_group_that_nobody_knows_is_refused(self, tmp_path, monkeypatch):
        import compile_for

        monkeypatch.setattr(compile_for, "target_of", lambda name: self.target())
        options = self.options(tmp_path)
        options.groups = ["steps"]
        with pytest.raises(SystemExit, match="no groups steps, but scaling, entries"):
            compile_for.compile_all("v5e-4", options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("h100", "--groups options --match K=4"),
        ("h100", "--groups methods --match otmdr"),
        ("h100", "--groups ensembles --match scan"),
        ("h100x8", "--match explicit"),
        ("h100x8", "--match FSDP"),
        ("h100x8", "--match axis"),
        ("v5e-4", "--match explicit"),
    ],
)
def test_steps_compile_for_accelerators(target, options, tmp_path):
    """The small network, by the compilers that users' devices have."""
    if not COMPILERS.exists():
        pytest.skip("XLA's compilers are not installed: run `make compilers`.")
    found = {
        d.metadata["Name"]: d.version
        for d in importlib.metadata.distributions(path=[str(COMPILERS)])
    }
    version = found.get("jax-cuda13-plugin", "none")
    if not jax.__version__.startswith(version.rpartition(".")[0]):
        pytest.skip(f"the compilers are those of JAX {version}, not {jax.__version__}.")
    path = [str(COMPILERS), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "benchmarks/compile_for.py", target]
    command += [*options.split(), "--network", "cnn_small", "--folder", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / f"{target}.json").read_text())
    cases = [x for group in record["cases"].values() for x in group.values()]
    assert cases
    assert [x["error"] for x in cases if "error" in x] == []
