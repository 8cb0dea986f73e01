"""Runs on data of the user's own: what is recorded of them, and how they are opened."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from otmdr_jax import data
from otmdr_jax.experiments import (
    cli,
    combine,
    programs,
    report,
    restore,
    training,
)
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.programs import inputs
from otmdr_jax.experiments.report import examples

TINY = TrainConfig(
    model="one_layer",
    method="sgd",
    batch_size=20,
    steps=2,
    eval_every=9,
    mesh="data=1",
    log_every=1,
)


def images_of(seed, num, classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % classes).astype(np.int32)
    return rng.integers(0, 256, (num, 8, 8, 1), dtype=np.uint8), labels


@pytest.fixture(scope="module")
def mine():
    return data.from_arrays(
        images_of(0, 60),
        images_of(1, 30),
        name="mine",
        validation=9,
        label_noise=0.1,
        augment=("crop",),
        class_names=("cat", "dog", "owl"),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, mine, one_layer):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    result = training.train(TINY, mine, folder, show_progress=False)
    return folder, result


@pytest.mark.slow
def test_what_was_trained_on_is_recorded(run, mine):
    folder, _ = run
    assert json.loads((folder / "config.json").read_text())["data"] == "arrays:mine"
    record = json.loads((folder / "data.json").read_text())
    assert record.pop("fingerprint").startswith("mine-51-")
    assert record.pop("test_fingerprint").startswith("mine-30-")
    images = mine.train.images.astype(np.float64) / 255
    for name, of_images in (("mean", np.mean), ("std", np.std)):
        assert record[name] == list(getattr(mine, name))  # to the bit
        assert record.pop(name) == pytest.approx([of_images(images)], rel=1e-12)
    assert record == {
        "name": "mine", "num_classes": 3, "class_names": ["cat", "dog", "owl"],
        "image_shape": [8, 8, 1], "dtype": "uint8",
        "augment": ["crop"], "train": 51, "validation": 9, "test": 30,
    }  # fmt: skip


@pytest.mark.slow
def test_arrays_are_opened_by_the_dataset_or_its_file(run, mine, tmp_path, capsys):
    folder, result = run
    with pytest.raises(ValueError, match=r"given to it in Python .*data\.save\(.*mine"):
        _ = restore.open_run(folder).dataset
    opened = restore.open_run(folder, dataset=mine)
    assert opened.dataset is mine and opened.config.data.name == "arrays:mine"
    data.save(mine, tmp_path / "elsewhere.npz")
    opened = restore.open_run(folder, data_dir=str(tmp_path / "elsewhere.npz"))
    for name in ("train", "validation", "test"):
        for got, want in zip(
            getattr(opened.dataset, name), getattr(mine, name), strict=True
        ):
            np.testing.assert_array_equal(got, want)
    assert (opened.dataset.mean, opened.dataset.std) == (mine.mean, mine.std)
    cli.main(["evaluate", str(folder), "--data-dir", str(tmp_path / "elsewhere.npz")])
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["nll"] == pytest.approx(result.metrics["nll"], abs=1e-6)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(folder)])
    assert "given to it in Python" in capsys.readouterr().err


def test_other_data_are_refused_before_the_state_is_read(run, mine, tmp_path):
    """Of other classes too, where Orbax would complain of shapes."""
    folder, _ = run
    for other in (images_of(0, 60), images_of(2, 60, classes=5)):
        changed = data.from_arrays(other, images_of(1, 30), num_classes=5)
        with pytest.raises(ValueError, match="was trained on mine-51-.*now arrays-60-"):
            restore.open_run(folder, dataset=changed)
        with pytest.raises(ValueError, match="was trained on mine-51-.*now arrays-60-"):
            training.train(TINY, changed, folder, resume=True, show_progress=False)
    with pytest.raises(ValueError, match="was trained on mine-51-"):
        restore.open_run(folder, data="digits")


def test_a_run_on_arrays_is_resumed_whatever_they_are_called(run, mine):
    """The checksums decide."""
    folder, result = run
    renamed = dataclasses.replace(mine, name="yours")
    again = training.train(TINY, renamed, folder, resume=True, show_progress=False)
    np.testing.assert_array_equal(again.log_probs, result.log_probs)
    assert json.loads((folder / "config.json").read_text())["data"] == "arrays:yours"
    training.train(TINY, mine, folder, resume=True, show_progress=False)


@pytest.mark.parametrize(
    "option", [{"label_noise": 0.2}, {"validation": 0.1}, {"data_seed": 1}]
)
def test_options_of_loading_are_refused_with_a_dataset(mine, option):
    with pytest.raises(ValueError, match=rf"\({next(iter(option))}\) do nothing"):
        training.train(TINY.replace(**option), mine, show_progress=False)


@pytest.mark.slow
def test_an_npz_may_move_and_is_found_from_any_folder(tmp_path, monkeypatch, one_layer):
    (first := tmp_path / "first").mkdir()
    (second := tmp_path / "second").mkdir()
    train, test = images_of(0, 60), images_of(1, 30)
    names = "train_images", "train_labels", "test_images", "test_labels"
    np.savez(first / "set.npz", **dict(zip(names, (*train, *test), strict=True)))
    monkeypatch.chdir(first)
    config = TINY.replace(data="set.npz")
    assert config.data.name == str(first / "set.npz")
    folder = tmp_path / "run"
    result = training.train(config, output=folder, show_progress=False)
    monkeypatch.chdir(second)
    np.testing.assert_array_equal(restore.open_run(folder).dataset.test.images, test[0])
    (first / "set.npz").rename(second / "renamed.npz")
    with pytest.raises(FileNotFoundError, match=r"set\.npz"):
        _ = restore.open_run(folder).dataset
    moved = config.replace(data_dir=str(second / "renamed.npz"))
    for given in ({"data_dir": "renamed.npz"}, {"data": "renamed.npz"}):
        opened = restore.open_run(folder, **given)
        np.testing.assert_array_equal(opened.dataset.test.images, test[0])
    again = training.train(moved, output=folder, resume=True, show_progress=False)
    np.testing.assert_array_equal(again.log_probs, result.log_probs)
    (second / "renamed.npz").rename(second / "set.npz")
    restore.open_run(folder, data_dir=str(second))
    # Other images in its place are refused.
    np.savez(second / "set.npz", **dict(zip(names, (*test, *test), strict=True)))
    with pytest.raises(ValueError, match="was trained on set-60-.*--data-dir"):
        restore.open_run(folder, data_dir=str(second))


def test_save_keeps_a_dataset_whole(mine, tmp_path):
    path = tmp_path / "mine.npz"
    data.save(mine, path)
    again = data.load(path)
    assert repr(again) == repr(mine) and again.augment == mine.augment
    assert again.class_names == mine.class_names == ("cat", "dog", "owl")
    with pytest.raises(FileExistsError, match="is there already"):
        data.save(mine, path)
    with pytest.raises(ValueError, match="must end in .npz"):
        data.save(mine, tmp_path / "mine.npy")
    floats = data.from_arrays(
        (images_of(0, 9)[0] / 7, images_of(0, 9)[1]),
        (images_of(1, 9)[0] / 7, images_of(1, 9)[1]),
        num_classes=4,
        mean=(1.0,),
        std=(3.0,),
        augment=("flip",),
    )
    data.save(floats, tmp_path / "floats.npz")
    again = data.load(tmp_path / "floats.npz")
    assert (again.mean, again.std, again.augment) == ((1.0,), (3.0,), ("flip",))
    assert again.num_classes == 4
    np.testing.assert_array_equal(again.train.images, floats.train.images)


@pytest.mark.slow
def test_evaluations_of_other_settings_leave_each_other_alone(run, mine, tmp_path):
    folder, _ = run
    data.save(mine, tmp_path / "mine.npz")
    common = "--data-dir", str(tmp_path / "mine.npz")
    names = {
        (): "",
        ("--split", "validation"): "_validation",
        ("--checkpoint", "2"): "_step_2",
        ("--split", "train", "--checkpoint", "best"): "_train_best",
    }
    for options in names:
        cli.main(["evaluate", str(folder), *options, *common])
    found = {
        options: json.loads((folder / f"evaluation{suffix}.json").read_text())
        for options, suffix in names.items()
    }
    splits = [x["split"] for x in found.values()]
    assert splits == ["test", "validation", "test", "train"]
    assert len({x["nll"] for x in found.values()}) == 3
    for suffix in names.values():
        assert (folder / f"reliability{suffix}.png").exists()
    # A record that does not say of which settings it is, as of an older version.
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(folder), *common])
    assert (folder / "evaluation.json").read_text() == "{}"
    cli.main(["evaluate", str(folder), *common, "--overwrite"])
    assert json.loads((folder / "evaluation.json").read_text())["split"] == "test"


def test_a_report_shows_no_images_of_a_file_that_has_changed(tmp_path, one_layer):
    train, test = images_of(0, 60), images_of(1, 30)
    names = "train_images", "train_labels", "test_images", "test_labels"
    np.savez(tmp_path / "a.npz", **dict(zip(names, (*train, *test), strict=True)))
    config = TINY.replace(data=str(tmp_path / "a.npz"))
    training.train(config, output=tmp_path / "run", show_progress=False)
    run = report.read_run(tmp_path / "run")
    (shown,) = examples.of_labels([run])
    np.testing.assert_array_equal(shown.images, test[0])
    changed = test[0].copy()
    changed[3] = 255 - changed[3]
    arrays = dict(zip(names, (*train, changed, test[1]), strict=True))
    np.savez(tmp_path / "a.npz", **arrays)
    (shown,) = examples.of_labels([run])
    assert shown.images is None and "differ from its test set" in shown.why


@pytest.mark.slow
def test_warnings_of_the_command_line_are_one_line(tmp_path, one_layer, capfd):
    images, labels = images_of(0, 60)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels)
    common = ["--steps", "1", "--batch-size", "20", "--mesh", "data=1", "--quiet"]
    model = ["--model", one_layer, "--method", "sgd", "--output", str(tmp_path / "run")]
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # here they are errors
        cli.main(["train", "--data", str(tmp_path / "a.npz"), *common, *model])
    err = capfd.readouterr().err
    assert "otmdr: warning: " in err and "12 of its 60 examples" in err
    assert "UserWarning" not in err and "data_lib.load" not in err


def test_a_result_shows_its_numbers_alone(run):
    _, result = run
    text = repr(result)
    assert text.startswith("Result(accuracy=0.") and "steps=2, folder=" in text
    assert len(text) < 300
    with pytest.raises(TypeError, match="must be a TrainConfig.*got 'digits'"):
        training.train("digits")


def test_a_finished_run_is_not_gone_on_with(run, mine):
    with pytest.raises(FileExistsError, match="It is a finished run"):
        training.train(TINY, mine, run[0], show_progress=False)


def test_a_run_without_a_checkpoint_is_not_resumed_on_other_data(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "data.json"):
        (folder / name).write_bytes((run[0] / name).read_bytes())
    (folder / "metrics.jsonl").touch()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = data.from_arrays(images_of(5, 60), images_of(1, 30), name="mine")
    with pytest.raises(ValueError, match="was trained on mine-51-.*now mine-60-"):
        training.train(TINY, other, folder, resume=True, show_progress=False)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_loaded_dataset_keeps_the_name_of_what_it_is():
    """Others are recorded as given, whatever they are called."""
    config = TINY.replace(validation=0.1, label_noise=0.2)
    same = data.load("digits", validation=0.1, label_noise=0.2)
    assert programs.named(config, same) == config
    with pytest.raises(ValueError, match="do nothing to the dataset 'digits'"):
        programs.named(config, data.load("digits"))
    found = programs.named(TINY, data.load("digits", validation=0.1))
    assert found.data.name == "arrays:digits"


@pytest.mark.slow
def test_a_dataset_is_loaded_again_only_to_record_what_it_is(
    one_layer, tmp_path, monkeypatch
):
    loads = []
    real = inputs.load_data
    monkeypatch.setattr(inputs, "load_data", lambda c: loads.append(c) or real(c))
    digits = data.load("digits")
    training.train(TINY.replace(steps=1), digits, show_progress=False)
    assert not loads
    small = data.load("digits", validation=0.1)
    config = TINY.replace(steps=1, validation=0.1)
    training.train(config, small, show_progress=False)  # do its options say so?
    assert len(loads) == 1
    training.train(TINY, digits, tmp_path / "run", show_progress=False)
    assert len(loads) == 2
    other = dataclasses.replace(digits, name="other")
    training.train(TINY, other, tmp_path / "other", show_progress=False)
    assert len(loads) == 2


def test_a_run_that_did_not_read_the_validation_set_of_its_file_says_so(
    tmp_path, one_layer
):
    """As runs of older versions; the way out that the message names is one."""
    dataset = data.from_arrays(
        images_of(0, 60), images_of(1, 30), name="own", validation=images_of(2, 9)
    )
    ignored = dataclasses.replace(dataset, validation=None)
    folder = tmp_path / "run"
    training.train(TINY, ignored, folder, show_progress=False)
    data.save(dataset, tmp_path / "own.npz")
    data.save(ignored, tmp_path / "without.npz")
    config = TINY.replace(data=str(tmp_path / "own.npz"))
    (folder / "config.json").write_text(json.dumps(config.flat()))
    message = "validation set alone, which older versions did not read"
    with pytest.raises(ValueError, match=message):
        _ = restore.open_run(folder).dataset
    with pytest.raises(ValueError, match=message):
        training.train(config, None, folder, resume=True, show_progress=False)
    found = restore.open_run(folder, data_dir=str(tmp_path / "without.npz"))
    assert found.dataset.validation is None
    changed = data.from_arrays(
        images_of(5, 60), images_of(1, 30), validation=images_of(2, 9)
    )
    with pytest.raises(ValueError, match="Restore the data, say where") as raised:
        restore.open_run(folder, dataset=changed)
    assert "older versions" not in str(raised.value)


def test_arrays_of_other_names_in_an_npz_change_nothing(tmp_path):
    (images, labels), test = images_of(0, 60), images_of(1, 30)
    names = "train_images", "train_labels", "test_images", "test_labels"
    arrays = dict(zip(names, (images, labels, *test), strict=True))
    np.savez(tmp_path / "a.npz", **arrays, mean=[127.0], std=[60.0], num_classes=[9])
    with pytest.warns(UserWarning, match="also holds mean, num_classes, std, which"):
        found = data.load(tmp_path / "a.npz")
    want = data.from_arrays((images, labels), test)
    assert (found.mean, found.std, found.num_classes) == (want.mean, want.std, 3)


@pytest.mark.slow
def test_an_ensemble_of_runs_on_other_data_is_refused(run, mine, tmp_path):
    other = data.from_arrays(images_of(5, 60), images_of(1, 30), name="mine")
    training.train(TINY, other, tmp_path / "other", show_progress=False)
    with pytest.raises(ValueError, match="was trained on mine-60-.*now mine-51-"):
        combine.combine([run[0], tmp_path / "other"], tmp_path / "both", dataset=mine)
    assert not (tmp_path / "both").exists()
