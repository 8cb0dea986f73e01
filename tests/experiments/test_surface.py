"""Landscapes of runs: against loops over points by hand, on disk, and interrupted."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otmdr_jax import bnn, data, landscape, models
from otmdr_jax.experiments import checkpoint, cli, programs, run_folder, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import surface
from otmdr_jax.experiments.measure.surface import Plan, measuring
from otmdr_jax.experiments.training import Interrupted

BASE = TrainConfig(
    model="one_layer", method="sgd", steps=6, batch_size=64, eval_every=9,
    checkpoint_every=2, keep_checkpoints=9, mesh="data=1", log_every=2,
)  # fmt: skip
SMALL = Plan(points=3, num_examples=70)


@pytest.fixture(scope="module")
def trained(one_layer, tmp_path_factory):
    """Runs by name: one is trained, with checkpoints; the others have just begun."""
    root = tmp_path_factory.mktemp("runs")
    options = {
        "other": {"seed": 1},
        "bnn": {"method": "otmdr-bnn"},
        "pair": {"members": "2"},
        "joint": {"members": "2", "ensemble": "joint"},
        "mixed": {"model": "cnn_small", "members": "one_layer,cnn_small"},
        "diverged": {"members": "3", "seed": 5},
        "noisy": {"label_noise": 0.3},
        "split": {"validation": 0.2},
    }
    done = {
        "sgd": training.train(BASE, output=root / "sgd", show_progress=False),
    }

    def begin(name):
        if name not in done:
            config = BASE.replace(**options[name])
            dataset = programs.load_data(config)
            compiled = programs.compile_programs(config, dataset)
            state = compiled.init(programs.run_keys(config.run.seed)[0])
            described = programs.describe(dataset)
            run_folder.create(root / name, config, described).close()
            meta = {
                "data": programs.fingerprint(dataset),
                "diverged": [1] if name == "diverged" else [],
            }
            with checkpoint.Checkpoints(root / name / "checkpoints") as saved:
                saved.save(state, meta)
            done[name] = types.SimpleNamespace(folder=root / name, state=state)
        return done[name]

    return begin


def measure(results, plan, output, **options):
    folders = [result.folder for result in results]
    return surface.measure(folders, plan, output, show_progress=False, **options)


def examples(split="train", count=SMALL.num_examples):
    digits = data.load("digits")
    part = getattr(digits, split)
    rows = np.linspace(0, part.num_examples - 1, count).astype(int)
    images = (np.float32(part.images[rows]) / 255 - digits.mean) / digits.std
    return np.float32(images), part.labels[rows]


def probabilities(params, state, images, train=False):
    logits, _ = models.create("one_layer", 10).apply(params, state, images, train=train)
    logits = np.asarray(logits, np.float64)
    unnormalised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return unnormalised / unnormalised.sum(axis=1, keepdims=True)


def by_hand(weights, states, directions, axes, split="train", train=False):
    """Losses of the mean probability of members, point by point, in float64."""
    images, labels = examples(split)
    found = np.empty([len(axis) for axis in axes])
    for index in np.ndindex(*found.shape):
        probs = 0
        for m, (own, state) in enumerate(zip(weights, states, strict=True)):
            for axis, i, direction in zip(axes, index, directions, strict=True):
                c = np.float32(axis[i])
                own = jax.tree.map(lambda w, d, c=c: w + c * d, own, direction[m])
            probs = probs + probabilities(own, state, images, train)
        right = probs[np.arange(len(labels)), labels] / len(weights)
        found[index] = -np.mean(np.log(right))
    return found


def keys(seed, count):
    return [jax.random.fold_in(jax.random.key(seed), axis) for axis in range(count)]


def member(state, m):
    return jax.tree.map(lambda x: x[m], (state.params, state.model_state))


class TestLosses:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["sgd", "bnn"])
    def test_around_a_weight_vector_or_the_mean_of_a_posterior(
        self, name, trained, tmp_path
    ):
        result = trained(name)
        plan = dataclasses.replace(SMALL, seed=3, split="test", range=(-0.5, 1.0))
        record = measure([result], plan, tmp_path)
        weights = result.state.params
        weights = bnn.mean(weights) if name == "bnn" else weights
        directions = [[landscape.random_direction(weights, k)] for k in keys(3, 2)]
        axes = [np.linspace(-0.5, 1.0, 3)] * 2
        want = by_hand([weights], [result.state.model_state], directions, axes, "test")
        np.testing.assert_allclose(record["losses"], want, rtol=2e-4)
        assert record["step"] == (6 if name == "sgd" else 0)
        assert record["statistics"] == "running"

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["pair", "joint", "diverged"])
    def test_of_an_ensemble_are_those_of_its_mean_probability(
        self, name, trained, tmp_path
    ):
        """Each member moves along a direction of its own, at its own filters' scale."""
        state = trained(name).state
        record = measure([trained(name)], SMALL, tmp_path)
        # A member that diverged has no part in the ensemble's prediction.
        shown = [0, 2] if name == "diverged" else [0, 1]
        weights, states = zip(*(member(state, m) for m in shown), strict=True)
        directions = [
            [
                landscape.random_direction(own, jax.random.fold_in(key, m))
                for m, own in zip(shown, weights, strict=True)
            ]
            for key in keys(0, 2)
        ]
        want = by_hand(weights, states, directions, [[-1, 0, 1]] * 2)
        np.testing.assert_allclose(record["losses"], want, rtol=2e-4)
        assert record["members"] == shown

    @pytest.mark.slow
    def test_of_one_member(self, trained, tmp_path):
        plan = dataclasses.replace(SMALL, member=1, dimensions=1)
        record = measure([trained("pair")], plan, tmp_path)
        weights, state = member(trained("pair").state, 1)
        directions = [[landscape.random_direction(weights, keys(0, 1)[0])]]
        want = by_hand([weights], [state], directions, [[-1, 0, 1]])
        np.testing.assert_allclose(record["losses"], want, rtol=2e-4)
        assert record["members"] == [1]

    @pytest.mark.slow
    def test_of_members_of_different_architectures(self, trained, tmp_path):
        plan = dataclasses.replace(SMALL, dimensions=1)
        record = measure([trained("mixed")], plan, tmp_path)
        images, labels = examples()
        networks = [models.create(name, 10) for name in ("one_layer", "cnn_small")]
        probs = [
            jax.nn.softmax(
                net.apply(one.params, one.model_state, images, train=False)[0]
            )
            for net, one in zip(networks, trained("mixed").state, strict=True)
        ]
        right = np.mean(probs, axis=0)[np.arange(len(labels)), labels]
        assert record["losses"][1] == pytest.approx(-np.mean(np.log(right)), rel=1e-4)
        assert record["model"] == ("one_layer", "cnn_small")

    @pytest.mark.slow
    def test_along_eigenvectors_of_the_hessian(self, trained, tmp_path):
        plan = dataclasses.replace(SMALL, kind="hessian")
        record = measure([trained("sgd")], plan, tmp_path)
        state = trained("sgd").state
        images, labels = examples()

        def loss_sum(params, batch):
            logits, _ = models.create("one_layer", 10).apply(
                params, state.model_state, batch, train=False
            )
            log_probs = jax.nn.log_softmax(logits)
            return -jnp.sum(log_probs[jnp.arange(len(labels)), labels]), len(labels)

        top = landscape.hessian_eigenvalues(loss_sum, state.params, [images], k=2)
        np.testing.assert_allclose(record["eigenvalues"], top.values, rtol=2e-3)
        want = by_hand(
            [state.params], [state.model_state], [[v] for v in top.vectors],
            [[-1, 0, 1]] * 2,
        )  # fmt: skip
        np.testing.assert_allclose(record["losses"], want, rtol=1e-2)

    @pytest.mark.slow
    @pytest.mark.parametrize("statistics", ["running", "auto"])
    def test_between_runs_with_statistics_as_asked(self, statistics, trained, tmp_path):
        one, two = trained("sgd"), trained("other")
        plan = dataclasses.replace(
            SMALL, kind="runs", range=(0, 1), statistics=statistics
        )
        record = measure([one, two], plan, tmp_path)
        difference = jax.tree.map(
            lambda x, y: y - x, one.state.params, two.state.params
        )
        want = by_hand(
            [one.state.params], [one.state.model_state], [[difference]],
            [[0, 0.5, 1]], train=statistics == "auto",
        )  # fmt: skip
        np.testing.assert_allclose(record["losses"], want, rtol=2e-4)
        assert record["points"] == [[0.0], [1.0]]
        assert record["labels"] == ["sgd", "other"]
        assert record["statistics"] == {"auto": "point"}.get(statistics, statistics)

    @pytest.mark.slow
    def test_in_the_plane_of_a_trajectory(self, trained, tmp_path):
        plan = dataclasses.replace(SMALL, kind="trajectory")
        record = measure([trained("sgd")], plan, tmp_path)
        assert record["labels"] == [f"step {i}" for i in (2, 4, 6)]
        points = np.array(record["points"])
        np.testing.assert_allclose(points[-1], 0, atol=1e-5)
        # Three points lie in their plane: all is explained, and all distances are kept.
        assert sum(record["explained_variance"]) == pytest.approx(1)
        for axis, coordinates in zip(record["axes"], points.T, strict=True):
            low, high = coordinates.min(), coordinates.max()
            more = 0.25 * (high - low)
            np.testing.assert_allclose(axis[0], low - more, atol=1e-6)
            np.testing.assert_allclose(axis[-1], high + more, atol=1e-6)
        earlier = dataclasses.replace(plan, checkpoint="4", dimensions=1)
        found = measure([trained("sgd")], earlier, tmp_path / "earlier")
        assert found["labels"] == ["step 2", "step 4"] and found["step"] == 4
        far = np.linalg.norm(points[0] - points[1])
        assert abs(found["points"][0][0]) == pytest.approx(far, rel=1e-4)


def interrupt(monkeypatch, after):
    """Ctrl-C after so many reports, each of one call of the program."""
    monkeypatch.setattr("otmdr_jax.landscape.slices.SECONDS_A_REPORT", 0.0)
    count = 0

    class Stopped(measuring.Progress):
        def update(self, step, numbers):
            nonlocal count
            count += 1
            super().update(step, numbers)
            if count == after:
                raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "Progress", Stopped)


class TestFiles:
    def test_hold_the_same_numbers(self, trained, tmp_path):
        record = measure([trained("sgd")], SMALL, tmp_path)
        stored = json.loads((tmp_path / "landscape.json").read_text())
        assert stored == json.loads(json.dumps(record)) == surface.read(tmp_path)
        with np.load(tmp_path / "landscape.npz") as arrays:
            np.testing.assert_array_equal(arrays["losses"], record["losses"])
            for i in range(2):
                np.testing.assert_array_equal(arrays[f"axis{i}"], [-1, 0, 1])
        files = {path.name for path in tmp_path.iterdir()}
        assert files == {"landscape.json", "landscape.npz"}
        assert surface.read(tmp_path / "nowhere") is None

    def test_what_is_not_finite_is_kept_exactly(self, trained, tmp_path):
        plan = dataclasses.replace(SMALL, dimensions=1, range=(-3e38, 3e38))
        record = measure([trained("sgd")], plan, tmp_path)
        assert not np.isfinite(record["losses"]).all()
        assert None in json.loads((tmp_path / "landscape.json").read_text())["losses"]
        np.testing.assert_array_equal(
            surface.read(tmp_path)["losses"], record["losses"]
        )

    def test_an_interrupted_grid_goes_on_to_the_same_bits(
        self, trained, tmp_path, monkeypatch
    ):
        run = [trained("sgd")]
        whole = measure(run, SMALL, tmp_path / "whole")
        other = dataclasses.replace(SMALL, seed=1)
        with monkeypatch.context() as patch:
            interrupt(patch, 3)
            with pytest.raises(Interrupted, match="stopped at 3 of 9 points"):
                measure(run, SMALL, tmp_path / "part")
        with np.load(tmp_path / "part" / "landscape.partial.npz") as arrays:
            assert arrays["losses"].tolist() == np.ravel(whole["losses"])[:3].tolist()
        with pytest.raises(FileExistsError, match="seed: 0, now 1"):
            measure(run, other, tmp_path / "part")
        evaluated = []
        grid = landscape.loss_grid

        def spy(*args, known, **options):
            evaluated.append(len(known))
            return grid(*args, known=known, **options)

        monkeypatch.setattr(landscape, "loss_grid", spy)
        record = measure(run, SMALL, tmp_path / "part")
        assert evaluated == [3] and record["losses"] == whole["losses"]
        assert not (tmp_path / "part" / "landscape.partial.npz").exists()

    def test_other_settings_replace_nothing_unasked(
        self, trained, tmp_path, monkeypatch
    ):
        run = [trained("sgd")]
        plan = dataclasses.replace(SMALL, dimensions=1)
        first = measure(run, plan, tmp_path)
        monkeypatch.setattr(measuring, "_grid", lambda *_: pytest.fail("measured"))
        assert measure(run, plan, tmp_path)["losses"] == first["losses"]
        monkeypatch.undo()
        other = dataclasses.replace(plan, seed=1)
        with pytest.raises(FileExistsError, match="seed: 0, now 1"):
            measure(run, other, tmp_path)
        assert surface.read(tmp_path) == json.loads(json.dumps(first))
        # Interrupted while it replaces: the old one stays, the same command goes on.
        with monkeypatch.context() as patch:
            interrupt(patch, 2)
            with pytest.raises(Interrupted):
                measure(run, other, tmp_path, overwrite=True)
        assert surface.read(tmp_path)["losses"] == first["losses"]
        known = []
        grid = landscape.loss_grid
        monkeypatch.setattr(
            landscape,
            "loss_grid",
            lambda *a, **k: known.append(len(k["known"])) or grid(*a, **k),
        )
        second = measure(run, other, tmp_path, overwrite=True)
        assert known == [2] and surface.read(tmp_path)["losses"] == second["losses"]
        assert second["losses"] != first["losses"]

    def test_other_weights_are_other_settings(self, trained, tmp_path):
        plan = dataclasses.replace(SMALL, dimensions=1)
        measure([trained("sgd")], plan, tmp_path)
        with pytest.raises(FileExistsError, match="weights"):
            measure([trained("other")], plan, tmp_path)

    @pytest.mark.slow
    def test_what_is_no_landscape_is_said_so(self, trained, tmp_path, monkeypatch):
        plan = dataclasses.replace(SMALL, dimensions=1)
        run = [trained("sgd")]
        measure(run, plan, tmp_path)
        json_file, exact = tmp_path / "landscape.json", tmp_path / "landscape.npz"
        with monkeypatch.context() as patch:
            patch.setattr(measuring, "_grid", lambda *_: pytest.fail("measured"))

            def refused(message, kind=ValueError):
                files = {p: p.read_bytes() for p in tmp_path.iterdir()}
                with pytest.raises(kind, match=message):
                    measure(run, plan, tmp_path)
                assert files == {p: p.read_bytes() for p in tmp_path.iterdir()}

            exact.unlink()
            refused("landscape.json must be .* landscape.npz is not beside it.*--over")
            exact.write_text("no archive")
            refused("but landscape.npz holds no losses")
            np.savez(exact, mine=np.ones(3))
            refused("but landscape.npz holds no losses")
            for content in ("mine", "[1]", '{"axes": [[1]]}'):
                json_file.write_text(content)
                refused("landscape.json must be .* but it holds none")
            with pytest.raises(ValueError, match="it holds none"):
                surface.read(tmp_path)
            json_file.unlink()
            refused("holds a landscape.npz without the landscape.json", FileExistsError)
            partial = tmp_path / "landscape.partial.npz"
            partial.write_text("half of it")
            refused("landscape.partial.npz must hold .* cannot be read")
            (tmp_path / "file").write_text("mine")
            for folder in (tmp_path / "file", tmp_path / "file" / "below"):
                with pytest.raises(NotADirectoryError, match="file is a file, and"):
                    measure(run, plan, folder)
        record = measure(run, plan, tmp_path, overwrite=True)
        assert surface.read(tmp_path) == json.loads(json.dumps(record))
        assert not partial.exists()


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(kind="star"), "kind must be one of 'random', 'hessian'"),
            (dict(split="all"), "split must be one of"),
            (dict(statistics="batch"), "statistics must be one of"),
            (dict(dimensions=3), "dimensions must be one of"),
            (dict(points=1), "points must be at least 2"),
            (dict(num_examples=0), "num_examples must be at least 1"),
            (dict(range=(1.0, 1.0)), "the lower one first"),
            (dict(range=(0.0, np.inf)), "two finite numbers"),
        ],
    )
    def test_of_a_plan(self, options, message):
        with pytest.raises(ValueError, match=message):
            Plan(**options)

    @pytest.mark.parametrize(
        ("names", "options", "message"),
        [
            (["sgd", "other"], {}, "one run's, got 2"),
            (["sgd"], dict(kind="runs"), "two runs"),
            (["sgd", "other"], dict(kind="runs", dimensions=2), "span 1 dimensions"),
            (["sgd", "pair"], dict(kind="runs"), "one architecture"),
            (["other"], dict(kind="trajectory"), "--keep-checkpoints"),
            (["sgd"], dict(member=0), "single model"),
            (["pair"], dict(member=2), "members 0 to 1"),
            (["sgd"], dict(split="validation"), "without a validation set"),
        ],
    )
    def test_of_runs(self, names, options, message, trained, tmp_path):
        plan = dataclasses.replace(SMALL, **options)
        with pytest.raises(ValueError, match=message):
            measure([trained(name) for name in names], plan, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_of_several_runs_without_a_folder(self, trained):
        plan = dataclasses.replace(SMALL, kind="runs")
        with pytest.raises(ValueError, match="output folder"):
            measure([trained("sgd"), trained("other")], plan, None)


class TestCommand:
    def otmdr(self, *arguments):
        cli.main(["landscape", *map(str, arguments), "--points", "3", "--quiet"])

    @pytest.mark.slow
    def test_one_run_into_its_folder(self, trained, capsys):
        folder = trained("sgd").folder
        self.otmdr(folder, "--num-examples", "70")
        out = capsys.readouterr().out
        assert "SGD: 9 points" in out and "70 images of the train set, step 6" in out
        for name in ("landscape.png", "landscape_surface.png"):
            assert (folder / name).stat().st_size > 10_000
        assert surface.read(folder)["kind"] == "random"
        with pytest.raises(SystemExit) as stop:
            self.otmdr(folder, "--dimensions", "1")
        assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
        self.otmdr(folder, "--dimensions", "1", "--overwrite")
        assert not (folder / "landscape_surface.png").exists()

    @pytest.mark.slow
    def test_runs_side_by_side_along_the_same_directions(self, trained, tmp_path):
        folders = [trained(name).folder for name in ("sgd", "other")]
        self.otmdr(*folders, "--seed", "2", "--output", tmp_path / "both")
        records = [surface.read(tmp_path / "both" / x) for x in ("0-sgd", "1-other")]
        assert [record["seed"] for record in records] == [2, 2]
        assert records[0]["axes"] == records[1]["axes"]
        assert (tmp_path / "both" / "landscape.png").exists()
        assert not (folders[1] / "landscape.json").exists()

    def refused(self, capsys, monkeypatch, *arguments):
        """What is said where nothing may be measured."""
        with monkeypatch.context() as patch:
            patch.setattr(measuring, "_grid", lambda *_: pytest.fail("measured"))
            with pytest.raises(SystemExit) as stop:
                self.otmdr(*arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    @pytest.mark.slow
    def test_foreign_pictures_are_left_alone(
        self, trained, tmp_path, capsys, monkeypatch
    ):
        both = [trained(name).folder for name in ("sgd", "other")]
        few = ("--dimensions", "1", "--num-examples", "20")
        for i, folders in enumerate((both, both[:1])):
            for name in ("landscape.png", "landscape_surface.png"):
                mine = tmp_path / str(i) / name
                mine.parent.mkdir(exist_ok=True)
                mine.write_text("mine")
                asked = (*folders, *few, "--output", mine.parent)
                text = self.refused(capsys, monkeypatch, *asked)
                assert f"holds {name}, not drawn from" in text and "--overwrite" in text
                assert [p.name for p in mine.parent.iterdir()] == [name]
                mine.unlink()
            # Asked for, a picture that no line needs still stays.
            mine.write_text("mine")
            self.otmdr(*asked, "--overwrite")
            assert mine.read_text() == "mine"
        (tmp_path / "file").touch()
        text = self.refused(capsys, monkeypatch, *both, "--output", tmp_path / "file")
        assert "is a file, and a folder must be there" in text

    @pytest.mark.slow
    def test_another_comparison_is_left_alone(
        self, trained, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        one, two, three = (trained(n).folder for n in ("sgd", "other", "bnn"))
        few = ("--num-examples", "20")
        self.otmdr(one, two, *few)
        output = tmp_path / "landscape-comparison"
        pictures = [output / "landscape.png", output / "landscape_surface.png"]
        before = [picture.read_bytes() for picture in pictures]
        self.otmdr(one, two, *few)  # the same: drawn again
        text = self.refused(capsys, monkeypatch, one, three, *few)
        assert "of other settings:\n  runs: [" in text and "--overwrite" in text
        text = self.refused(capsys, monkeypatch, one, two, *few, "--split", "test")
        assert "split: 'train', now 'test'" in text
        text = self.refused(capsys, monkeypatch, one, *few, "--output", output)
        assert "holds a comparison of landscapes" in text
        assert [picture.read_bytes() for picture in pictures] == before
        line = ("--dimensions", "1", "--overwrite")
        self.otmdr(one, three, *few, *line)
        assert pictures[0].read_bytes() != before[0] and not pictures[1].exists()
        # A landscape of its own makes them its pictures, and no comparison's.
        self.otmdr(one, *few, *line, "--output", output)
        text = self.refused(capsys, monkeypatch, one, three, *few, *line[:2])
        assert "holds landscape.png, not drawn from this comparison" in text

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("pair", [], "weights of different shapes (one_layer, members shown: 1; "),
            ("noisy", [], "different examples in their train sets (digits-1437-"),
            ("split", ["--split", "validation"], "without a validation set"),
        ],
    )
    def test_runs_that_cannot_be_compared(
        self, name, options, message, trained, tmp_path, capsys, monkeypatch
    ):
        folders = trained("sgd").folder, trained(name).folder
        # The run that cannot be shown last: it is seen before the first is measured.
        order = folders[::-1] if name == "split" else folders
        output = tmp_path / "new"
        asked = (*order, *options, "--output", output)
        assert message in self.refused(capsys, monkeypatch, *asked)
        assert not output.exists()

    def test_runs_that_learned_from_other_labels_share_a_test_set(
        self, trained, tmp_path
    ):
        folders = trained("sgd").folder, trained("noisy").folder
        few = ("--split", "test", "--dimensions", "1", "--num-examples", "20")
        self.otmdr(*folders, *few, "--output", tmp_path)
        assert (tmp_path / "landscape.png").exists()

    def test_a_comparison_looks_at_every_folder_first(
        self, trained, tmp_path, capsys, monkeypatch
    ):
        folders = [trained(name).folder for name in ("sgd", "other")]
        plan = dataclasses.replace(SMALL, num_examples=20, dimensions=1)
        measure([trained("other")], plan, tmp_path / "1-other")
        text = self.refused(capsys, monkeypatch, *folders, "--output", tmp_path)
        assert "dimensions: 1, now 2" in text
        assert not (tmp_path / "0-sgd").exists()

    @pytest.mark.slow
    def test_between_runs_and_along_a_trajectory(self, trained, tmp_path, capsys):
        folders = [trained(name).folder for name in ("sgd", "other")]
        self.otmdr(*folders, "--kind", "runs", "--output", tmp_path / "line")
        assert (tmp_path / "line" / "landscape.png").exists()
        self.otmdr(folders[0], "--kind", "trajectory", "--output", tmp_path / "path")
        assert "of the variance of checkpoints" in capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            self.otmdr(*folders, "--kind", "trajectory")
        assert stop.value.code == 2
        assert "planes of their own" in capsys.readouterr().err

    def test_an_interrupt_says_how_to_go_on(
        self, trained, tmp_path, monkeypatch, capsys
    ):
        interrupt(monkeypatch, 1)
        with pytest.raises(SystemExit) as stop:
            self.otmdr(trained("sgd").folder, "--output", tmp_path)
        assert stop.value.code == 130
        assert "The same command goes on from there" in capsys.readouterr().err
        assert run_folder.is_run(trained("sgd").folder)
        assert (tmp_path / "landscape.partial.npz").exists()


def test_points_at_once_is_that_of_the_device():
    def loss_sum(w, batch):
        return jnp.sum(w), 1

    one = landscape.points_at_once(loss_sum, jnp.ones(2), [None], [jnp.ones(2)])
    assert one == 1  # the tests run on CPUs
