"""Ensembles through the loop, the checkpoints and the command line."""

import json
import re
import shutil

import jax
import numpy as np
import optax
import pytest

from otmdr_jax import data, ensemble, metrics
from otmdr_jax.experiments import (
    checkpoint,
    cli,
    combine,
    members,
    methods,
    programs,
    report,
    restore,
    run_folder,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import evaluation
from otmdr_jax.experiments.training import starting
from otmdr_jax.metrics import diversity
from tests.marks import slow_but
from tests.sets import real_cifar10, small_digits

pytestmark = pytest.mark.usefixtures("one_layer")

TINY = TrainConfig(
    model="one_layer", members="3", mesh="data=1", method="otmdr", noise_std=0.01,
    epochs=2, batch_size=32, log_every=4, eval_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def small(digits):
    """160 digits: five steps an epoch."""
    train = digits.train.images[:160], digits.train.labels[:160]
    test = digits.test.images[:80], digits.test.labels[:80]
    return data.from_arrays(train, test, num_classes=10, name="small")


@pytest.fixture(scope="module")
def trio(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trio") / "run"
    return training.train(TINY, small, folder, show_progress=False)


@pytest.fixture(scope="module")
def mixed(small, tmp_path_factory):
    """Two architectures."""
    config = TINY.replace(
        model="cnn_small", members="one_layer,cnn_small", method="sgd", noise_std=0.0
    )
    folder = tmp_path_factory.mktemp("mixed") / "run"
    return training.train(config, small, folder, show_progress=False)


def assert_same_bits(got, want):
    def same(a, b):
        if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, got, want)


def losses(result):
    return [r["loss"] for r in result.history if r["split"] == "train"]


class TestRun:
    @pytest.mark.slow
    def test_a_member_is_a_run_of_its_own(self, small, trio):
        """The loop of one model, from each member's key, gives its losses."""
        keys = jax.random.split(programs.run_keys(TINY.run.seed)[0], 3)
        config = TINY.replace(members=None)
        for m in range(3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    starting,
                    "run_keys",
                    lambda seed, m=m: (keys[m], programs.run_keys(seed)[1]),
                )
                alone = training.train(config, small, show_progress=False)
            mine = [
                r["members"]["loss"][m] for r in trio.history if r["split"] == "train"
            ]
            np.testing.assert_allclose(mine, losses(alone), rtol=1e-3)
            np.testing.assert_allclose(
                trio.metrics["members"][m]["nll"], alone.metrics["nll"], rtol=2e-3
            )

    @pytest.mark.slow
    def test_the_prediction_is_the_mean_of_probabilities(self, small, trio):
        with np.load(trio.folder / "predictions.npz") as saved:
            each, mean = np.exp(saved["member_log_probs"]), np.exp(saved["log_probs"])
        np.testing.assert_allclose(each.mean(axis=0), mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            trio.metrics["nll"],
            metrics.nll(trio.log_probs, small.test.labels, log_probs=True),
        )
        result = json.loads((trio.folder / "result.json").read_text())
        for m, row in enumerate(result["members"]):
            log_probs = np.log(each[m].astype(np.float64))
            want = metrics.evaluate(log_probs, small.test.labels)
            np.testing.assert_allclose(row["nll"], want["nll"], rtol=1e-4)
            assert row["model"] == "one_layer" and not row["diverged"]
        want = diversity.evaluate(np.log(each.astype(np.float64)), small.test.labels)
        for name in diversity.NAMES:
            np.testing.assert_allclose(result[name], want[name], rtol=1e-3)
        own = [row["nll"] for row in result["members"]]
        gain = np.mean(own) - result["nll"]
        np.testing.assert_allclose(result["nll_ambiguity"], gain, rtol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", ["trio", "mixed"])
    def test_resumption_is_exact(self, case, small, tmp_path, request):
        want = request.getfixturevalue(case)
        config = run_folder.read_config(want.folder)
        folder = tmp_path / "run"
        half = config.replace(checkpoint_every=5)
        with pytest.MonkeyPatch.context() as patch:

            def killed(*args, **kwargs):
                raise KeyboardInterrupt

            patch.setattr(training.Loop, "_finish", killed)
            with pytest.raises(KeyboardInterrupt):
                training.train(half, small, folder, show_progress=False)
        got = training.train(half, small, folder, resume=True, show_progress=False)
        assert_same_bits(got.state, want.state)
        assert got.metrics["nll"] == want.metrics["nll"]

    @pytest.mark.slow
    def test_evaluation_of_a_checkpoint(self, small, mixed):
        config = run_folder.read_config(mixed.folder)
        compiled = programs.compile_programs(config, small)
        restored = restore.restore(config, compiled, mixed.folder)
        found = evaluation.evaluate(config, restored.state, small, "test", compiled)
        np.testing.assert_array_equal(found.log_probs, mixed.log_probs)
        assert [row["model"] for row in mixed.metrics["members"]] == [
            "one_layer",
            "cnn_small",
        ]

    @pytest.mark.slow
    @pytest.mark.parametrize("mesh", ["member=3,data=2"])
    def test_members_on_their_own_devices(self, mesh, small, trio):
        """With the split of one device: BatchNorm and halves see the same examples."""
        config = TINY.replace(mesh=mesh, split="shared", epochs=1,
                                     sync_batchnorm="data" in mesh)  # fmt: skip
        got = training.train(config, small, show_progress=False)
        one = config.replace(mesh="data=1", sync_batchnorm=False)
        want = training.train(one, small, show_progress=False)
        np.testing.assert_allclose(losses(got), losses(want), rtol=1e-3)
        np.testing.assert_allclose(got.log_probs, want.log_probs, atol=5e-3)
        assert got.metrics["mesh"] == mesh

    @pytest.mark.slow
    def test_a_plateau_of_each_member_on_a_mesh(self, small):
        # So high a rate that the losses of members rise in different epochs.
        config = TINY.replace(
            mesh="member=3", method="sgd", noise_std=0.0, schedule="plateau",
            plateau_patience=1, plateau_factor=0.5, epochs=6, learning_rate=3.0,
            momentum=0.0, log_every=1,
        )  # fmt: skip
        got = training.train(config, small, show_progress=False)
        one = config.replace(mesh="data=1")
        want = training.train(one, small, show_progress=False)
        np.testing.assert_allclose(losses(got)[:3], losses(want)[:3], rtol=1e-3)
        for result in (got, want):
            steps = [r for r in result.history if r["split"] == "train"]
            each = np.array([r["members"]["loss"] for r in steps])  # (steps, M)
            epochs = each.reshape(6, -1, 3).mean(axis=1)
            scales = []
            for own in epochs.T:  # PyTorch's rule, by hand
                best, since, scale = np.inf, 0, 1.0
                for value in own:
                    better = value < best * (1 - 1e-4)
                    best, since = (value, 0) if better else (best, since + 1)
                    if since >= 1:
                        scale, since = 0.5 * scale, 0
                scales.append(scale)
            found = optax.tree.get(result.state.opt_state, "scale")
            np.testing.assert_allclose(found, scales)
            assert len(set(scales)) > 1

    @pytest.mark.slow
    def test_orders_of_their_own(self, small):
        """Each member is a single run on its own order, on one device and on three."""
        shared = TINY.replace(epochs=1, method="sgd", noise_std=0.0,
                                     augment=(), log_every=1)  # fmt: skip
        config = shared.replace(member_data="own")
        state_key, data_key = programs.run_keys(TINY.run.seed)
        order = programs.compile_programs(config, small).epoch_order(
            jax.random.fold_in(data_key, 0)
        )
        assert order.shape == (3, 160)
        assert all(sorted(row) == list(range(160)) for row in order.tolist())
        assert len({tuple(row) for row in order.tolist()}) == 3

        def of_members(config):
            found = training.train(config, small, show_progress=False)
            rows = [r for r in found.history if r["split"] == "train"]
            return np.array([r["members"]["loss"] for r in rows])  # (steps, M)

        got = of_members(config)
        assert got.shape == (5, 3)
        assert np.abs(got - of_members(shared)).min() > 1e-4
        one = shared.replace(members=None)
        compiled = programs.compile_programs(one, small)
        for m, key in enumerate(jax.random.split(state_key, 3)):
            state = compiled.init(key)
            for i in range(5):
                state, metrics = compiled.train_step(
                    state, tuple(small.train), order[m], np.int32(i)
                )
                np.testing.assert_allclose(got[i, m], metrics["loss"], rtol=1e-4)
        spread = of_members(config.replace(mesh="member=3"))
        np.testing.assert_allclose(spread, got, rtol=1e-3)
        with pytest.raises(ValueError, match="member_data='own' .* on the device"):
            training.train(config.replace(input="host"), small, show_progress=False)

    @pytest.mark.slow
    def test_streamed_members_are_resident_ones(self, small, trio):
        config = TINY.replace(input="host")
        got = training.train(config, small, show_progress=False)
        assert_same_bits(got.state.params, trio.state.params)

    @pytest.mark.slow
    def test_a_member_that_diverges_is_named_and_does_not_stop_the_rest(
        self, small, capsys, monkeypatch, tmp_path
    ):
        init = members.lift_init

        def poisoned(*args):
            state = init(*args)
            bad = jax.tree.map(lambda x: x.at[1].set(np.nan), state.params)
            return state._replace(params=bad)

        monkeypatch.setattr(members, "lift_init", poisoned)
        config = TINY.replace(max_skipped=4, clip_norm=1.0, epochs=3)
        result = training.train(config, small, tmp_path / "run")
        said = capsys.readouterr().err
        assert said.count("member 1 diverged") == 1 and "up to step 4" in said
        rows = result.metrics["members"]
        assert [row["diverged"] for row in rows] == [False, True, False]
        assert [row["skipped_steps"] for row in rows] == [0, 15, 0]
        assert np.isfinite(result.log_probs).all() and np.isfinite(
            result.metrics["nll"]
        )
        with np.load(tmp_path / "run" / "predictions.npz") as saved:
            each = saved["member_log_probs"]
        want = ensemble.log_mean_probs(each[[0, 2]])
        np.testing.assert_allclose(result.log_probs, want, rtol=1e-4, atol=1e-5)
        assert np.isfinite(result.metrics["sharpness"])
        written = json.loads((tmp_path / "run" / "result.json").read_text())
        assert written["members"][1]["nll"] is None

    @pytest.mark.slow
    def test_an_evaluation_that_is_nan_is_never_the_best(self, small, monkeypatch):
        """It comes before the member has skipped steps enough to count as diverged."""
        init = members.lift_init

        def poisoned(*args):
            state = init(*args)
            bad = jax.tree.map(lambda x: x.at[1].set(np.nan), state.params)
            return state._replace(params=bad)

        monkeypatch.setattr(members, "lift_init", poisoned)
        train = small.train.images, small.train.labels
        test = small.test.images, small.test.labels
        held = data.from_arrays(train, test, num_classes=10, name="held", validation=32)
        config = TINY.replace(epochs=4, eval_every=1, max_skipped=6)
        found = training.train(config, held, show_progress=False).metrics["best"]
        assert np.isfinite(found["score"]) and found["step"] > 4

    @pytest.mark.slow
    def test_a_run_ends_when_all_have_diverged(self, small):
        config = TINY.replace(
            method="sgd", noise_std=0.0, learning_rate=1e20, schedule="constant",
            max_skipped=2, epochs=9,
        )  # fmt: skip
        with pytest.raises(training.NonFiniteError, match="not finite in 2 steps"):
            training.train(config, small, show_progress=False)

    @pytest.mark.slow
    def test_joint(self, small, tmp_path):
        config = TINY.replace(ensemble="joint", epochs=1, members="2")
        result = training.train(config, small, tmp_path / "run", show_progress=False)
        assert isinstance(result.state, methods.TrainState)
        assert result.state.params["head"]["kernel"].shape[0] == 2
        assert len(result.metrics["members"]) == 2
        label = report.read_run(tmp_path / "run").label
        assert label == "OT-MDR (K = 1), 2 members, joint"
        with pytest.raises(ValueError, match="trained for each other"):
            combine.combine([tmp_path / "run"], tmp_path / "new", [0, 1])


@pytest.mark.slow
def test_three_networks_beat_each_of_them_on_real_cifar10():
    """1,000 training and 1,000 test images of 8x8: the mean has the lowest NLL."""
    images, labels = real_cifar10(np.r_[0:50_000:50, 50_000:60_000:10])
    images = images.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4)).astype(np.uint8)
    dataset = data.from_arrays(
        (images[:1_000], labels[:1_000]),
        (images[1_000:], labels[1_000:]),
        num_classes=10,
        name="cifar10-small",
    )
    config = TrainConfig(
        members="3", method="sgd", mesh="data=1", epochs=10, batch_size=50,
        learning_rate=0.1, eval_every=10,
    )  # fmt: skip
    found = training.train(config, dataset, show_progress=False).metrics
    assert found["accuracy"] > 0.3
    assert found["nll"] < min(row["nll"] for row in found["members"]) - 0.01
    assert found["brier"] < min(row["brier"] for row in found["members"])


COMMON = [
    "train", "--steps", "6", "--batch-size", "32", "--quiet", "--mesh", "data=1",
    "--method", "sam",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(one_layer, tmp_path_factory):
    """From the command line: three members, two of another seed, a model."""
    root = tmp_path_factory.mktemp("cli")
    few = small_digits(160)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: few)
        for name, options in {
            "three": ["--model", "one_layer", "--members", "3"],
            "two": ["--model", "one_layer", "--members", "2", "--seed", "1"],
            "one": ["--model", "cnn_small", "--seed", "2"],
        }.items():
            cli.main([*COMMON, *options, "--output", str(root / name)])
        yield root


def predictions(folder):
    with np.load(folder / "predictions.npz") as saved:
        return saved["member_log_probs"]


class TestCombine:
    @pytest.mark.slow
    def test_members_are_added(self, folders, capsys):
        before = (folders / "three" / "result.json").read_bytes()
        out = folders / "five"
        cli.main(["ensemble", str(folders / "three"), str(folders / "two"),
                  "--output", str(out)])  # fmt: skip
        shown = capsys.readouterr().out
        assert "SAM, 5 members" in shown and "4: one_layer" in shown
        assert "Diversity: disagreement" in shown
        want = np.concatenate([predictions(folders / n) for n in ("three", "two")])
        np.testing.assert_allclose(predictions(out), want, rtol=1e-3, atol=1e-4)
        assert (folders / "three" / "result.json").read_bytes() == before
        # It is a run like any other.
        cli.main(["evaluate", str(out)])
        assert "5 members" in capsys.readouterr().out

    @pytest.mark.slow
    def test_members_are_dropped(self, folders):
        out = folders / "pair"
        cli.main(["ensemble", str(folders / "three"), "--keep", "2", "0",
                  "--output", str(out)])  # fmt: skip
        want = predictions(folders / "three")[[2, 0]]
        np.testing.assert_allclose(predictions(out), want, rtol=1e-3, atol=1e-4)
        assert run_folder.read_config(out).model.members == "2"

    @pytest.mark.slow
    def test_single_models_join(self, folders):
        out = folders / "mixed"
        combine.combine(
            [folders / "three", folders / "one"], out, [1, 3], show_progress=False
        )
        assert run_folder.read_config(out).model.members == "one_layer,cnn_small"
        assert len(predictions(out)) == 2

    @pytest.mark.slow
    def test_a_network_counts_once_in_whatever_folder_it_is(
        self, folders, tmp_path, capsys
    ):
        shutil.copytree(folders / "one", tmp_path / "copied")
        copied, out = str(tmp_path / "copied"), tmp_path / "out"
        words = ["ensemble", str(folders / "one"), str(folders / "two"), copied]
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--output", str(out)])
        assert stop.value.code == 2 and not out.exists()
        message = r"members 0 \(of .*one\) and 3 \(of .*copied\) have the same weights"
        assert re.search(message, capsys.readouterr().err)
        cli.main([*words, "--keep", "1", "2", "3", "--output", str(out)])
        assert len(predictions(out)) == 3

    @pytest.mark.parametrize(
        ("names", "options", "message"),
        [
            (["three"], ["--keep", "0", "3"], r"out of 0\.\.2"),
            (["three"], ["--keep", "1", "1"], "once each"),
            (["one"], [], "at least two members"),
            (["three", "nowhere"], [], "no run folder"),
            (["three", "three"], [], "named once"),
            pytest.param(
                ["three", "other"],
                [],
                "rho: .0.05,. and .0.1,.",
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_refusals(self, names, options, message, folders, capsys):
        if "other" in names and not (folders / "other").exists():
            cli.main([*COMMON, "--model", "one_layer", "--rho", "0.1",
                      "--output", str(folders / "other")])  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main(["ensemble", *(str(folders / n) for n in names),
                      "--output", str(folders / "new"), *options])  # fmt: skip
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (folders / "new").exists()

    def test_what_fails_late_leaves_nothing_behind(self, folders, monkeypatch):
        def full(*args, **kwargs):
            raise OSError("no space left")

        monkeypatch.setattr(combine, "evaluate_run", full)
        with pytest.raises(OSError, match="no space"):
            combine.combine([folders / "three"], folders / "late")
        assert not (folders / "late").exists()

    @pytest.mark.parametrize(
        "at", slow_but(["describe"], ["save", "write_result", "describe"])
    )
    def test_a_full_disk_leaves_no_run_behind(self, folders, at, monkeypatch):
        # One without a checkpoint would be trained anew from random weights.
        def full(*args, **kwargs):
            raise OSError("no space left")

        owner = checkpoint.Checkpoints if at == "save" else run_folder
        monkeypatch.setattr(owner, at, full)
        out = folders / f"full_{at}"
        with pytest.raises(OSError, match="no space"):
            combine.combine([folders / "three"], out, [0, 1], show_progress=False)
        assert not list(out.iterdir())
        monkeypatch.undo()
        combine.combine([folders / "three"], out, [0, 1], show_progress=False)
        assert run_folder.is_finished(out)

    def test_nothing_is_overwritten(self, folders, capsys):
        with pytest.raises(SystemExit):
            cli.main(["ensemble", str(folders / "three"),
                      "--output", str(folders / "two")])  # fmt: skip
        assert "is not empty" in capsys.readouterr().err


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(members=2.5), "members must be text"),
            (dict(members="1"), "members must be a number of at least 2"),
            (dict(members="cnn_small,"), "members must be"),
            (dict(members="resnet_10"), "members must be"),
            (dict(ensemble="joint"), "ensemble must be left out without members"),
            (dict(members="a,b", model="resnet_18"), "model must be left out"),
            (
                dict(members="2", ensemble="joint", method="sam", norm="per_leaf"),
                "would be a norm over all of them",
            ),
            (
                dict(members="2", ensemble="joint", member_data="own"),
                "'shared' for a joint loss",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(mesh="member=2"), "needs members of one architecture"),
            (dict(mesh="member=2", members="cnn_small,resnet_10"), "one architecture"),
            (dict(mesh="member=2", members="3"), "members=3 cannot be divided"),
            (dict(mesh="member=2", members="2", ensemble="joint"), "joint loss depend"),
        ],
    )
    def test_meshes(self, options, message):
        with pytest.raises(ValueError, match=message):
            programs.make_mesh(TrainConfig(**options))

    def test_names(self):
        assert TrainConfig(members="2", model="resnet_10").model.member_names == (
            "resnet_10",
            "resnet_10",
        )
        config = TrainConfig(members="resnet_18, cnn_small")
        assert config.model.member_names == ("resnet_18", "cnn_small")
        assert not config.model.stacked and TrainConfig(members="4").model.stacked
        with pytest.raises(ValueError, match="own is named 'my.nets:Net'"):
            training.train(TrainConfig(model="my.nets.Net", mesh="data=1"))
        with pytest.raises(ValueError, match="Unknown model 'resnet_8'"):
            training.train(TrainConfig(members="resnet_18,resnet_8", mesh="data=1"))
