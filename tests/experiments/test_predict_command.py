"""`otmdr predict` and `otmdr export`, as they are called."""

import csv
import warnings

import numpy as np
import pytest

import otmdr_jax
from otmdr_jax import data, training
from otmdr_jax.experiments import cli, restore, trained_run
from otmdr_jax.experiments.config import TrainConfig


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    labels = np.arange(30) % 3
    made = data.from_arrays((images, labels), (images, labels), name="own")
    output = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(members="2", epochs=1, batch_size=10, mesh="data=1")
    training.train(config, made, output, show_progress=False)
    return output


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.essential
def test_a_table_of_predictions(folder, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.predict, "_CHUNK", 12)  # three reads
    np.savez(tmp_path / "new.npz", images=images, other=np.zeros(3))
    output = tmp_path / "out" / "predictions.csv"
    command = ["predict", str(folder), str(tmp_path / "new.npz"), "--output"]
    cli.main([*command, str(output), "--quiet"])
    told = capsys.readouterr().out
    assert "30 images, not calibrated" in told and f"Written: {output}" in told
    run = otmdr_jax.open_run(folder)
    want = run.predict(images)
    rows = rows_of(output)
    assert [row["image"] for row in rows] == [str(i) for i in range(30)]
    found = [[float(row[f"p({c})"]) for c in "012"] for row in rows]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert [int(row["class"]) for row in rows] == want.argmax(1).tolist()
    np.testing.assert_allclose(
        [float(row["probability"]) for row in rows], want.max(1), rtol=1e-5
    )
    np.testing.assert_allclose(
        [float(row["entropy"]) for row in rows],
        -(want * np.log(want)).sum(1),
        rtol=1e-4,
    )
    information = run.predict_members(images).mutual_information()
    np.testing.assert_allclose(
        [float(row["mutual_information"]) for row in rows], information, rtol=1e-4
    )
    with pytest.raises(SystemExit):
        cli.main([*command, str(output)])
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("chunk", [4, 12])
def test_images_that_predict_nan_are_named(
    folder, images, tmp_path, monkeypatch, capsys, chunk
):
    monkeypatch.setattr(cli.predict, "_CHUNK", chunk)
    opened = trained_run.TrainedRun
    right = opened.predict_members

    def broken(self, given, report=None):
        found = right(self, given, report)
        bad = (given == images[9]).all(axis=(1, 2, 3))
        log_probs = np.where(bad[:, None], np.nan, found.log_probs)
        members = np.where(bad[:, None], np.nan, found.members)
        return found._replace(log_probs=log_probs, members=members)

    monkeypatch.setattr(opened, "predict_members", broken)
    np.save(tmp_path / "new.npy", images[:12])
    output = tmp_path / "predictions.csv"
    with pytest.raises(SystemExit):
        cli.main(
            ["predict", str(folder), str(tmp_path / "new.npy"), "--output", str(output)]
        )
    assert "predicts NaN for 9, the first of 1" in capsys.readouterr().err
    assert not output.exists()


def test_arrays_of_predictions(folder, images, tmp_path, capsys):
    np.save(tmp_path / "new.npy", images[:4])
    output = tmp_path / "predictions.npz"
    cli.main(
        ["predict", str(folder), str(tmp_path / "new.npy"), "--output", str(output)]
    )
    with np.load(output, allow_pickle=False) as found:
        want = otmdr_jax.open_run(folder).predict(images[:4])
        np.testing.assert_array_equal(found["probabilities"], want)
        assert found["classes"].tolist() == ["0", "1", "2"]
        assert found["image"].tolist() == ["0", "1", "2", "3"]


def test_a_folder_of_images(folder, images, tmp_path, monkeypatch, capsys):
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    (inside := tmp_path / "photos" / "deep").mkdir(parents=True)
    (inside / "notes.txt").write_text("no image")
    for i, name in enumerate(("b.png", "deep/a.png", "c.png")):
        Image.fromarray(images[i]).save(tmp_path / "photos" / name)
    # Resized as a folder for training is: a large one of one colour keeps it.
    gray = Image.new("L", (40, 30), 77)
    gray.save(tmp_path / "photos" / "z.png")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        cli.main(["predict", str(folder), "photos", "--quiet"])
    assert "also holds files that are no images, which" in capsys.readouterr().err
    rows = rows_of(tmp_path / "predictions.csv")
    assert [row["image"] for row in rows] == ["b.png", "c.png", "deep/a.png", "z.png"]
    whole = np.stack([images[0], images[2], images[1], np.full((8, 8, 3), 77)])
    want = otmdr_jax.open_run(folder).predict(whole.astype(np.uint8))
    found = [[float(row[f"p({c})"]) for c in "012"] for row in rows]
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        ({"a": 1, "b": 2}, [], "holds the arrays a, b: say which one"),
        ({"images": 1}, ["--array", "other"], "holds the arrays images"),
        ({"images": 1}, ["--output", "table.txt"], ".csv or .npz"),
        ({"images": np.zeros((0, 8, 8, 1))}, [], "new.npz holds no images"),
        (None, [], "is not there"),
        ("folder", ["--array", "images"], "--array is of .npz files"),
    ],
)
def test_wrong_files_are_refused(
    folder, tmp_path, arrays, options, message, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "new.npz"
    if arrays == "folder":
        path = tmp_path
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(SystemExit) as error:
        cli.main(["predict", str(folder), str(path), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", "cut", np.float32(3)])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_files_that_are_torn_are_named(
    folder, images, tmp_path, content, suffix, capsys
):
    path = tmp_path / f"new{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        (np.save if suffix == ".npy" else np.savez)(path, images)
        path.write_bytes(path.read_bytes()[:-900])
    else:
        (np.save if suffix == ".npy" else np.savez)(path, content)
    with pytest.raises(SystemExit) as error:
        cli.main(["predict", str(folder), str(path)])
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert str(path) in told and "Traceback" not in told


def test_a_place_that_cannot_be_written_is_refused_first(
    folder, images, tmp_path, monkeypatch, capsys
):
    def fails(*args, **kwargs):
        raise AssertionError("it has begun")

    np.save(tmp_path / "new.npy", images)
    where = tmp_path / "new.npy" / "predictions.csv"
    monkeypatch.setattr(restore, "open_run", fails)
    with pytest.raises(SystemExit):
        cli.main(["predict", str(folder), str(tmp_path / "new.npy"),
                  "--output", str(where)])  # fmt: skip
    assert "new.npy is a file, and a folder must be there" in capsys.readouterr().err


def test_export_writes_into_the_run(folder, tmp_path, capsys):
    cli.main(["export", str(folder), "--format", "npz"])
    assert f"Written: {folder / 'export.npz'}" in capsys.readouterr().out
    with np.load(folder / "export.npz") as found:
        assert "members/1/params/head/kernel" in found
    with pytest.raises(SystemExit):
        cli.main(["export", str(folder), "--format", "npz", "--batch-size", "3"])
    assert "batch_size=3 is of the format stablehlo" in capsys.readouterr().err
