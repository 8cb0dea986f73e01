"""Runs on folders of images and on batches of a loader: trained, resumed, refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from otmdr_jax import data
from otmdr_jax.experiments import cli, programs, report, restore, training
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import evaluation
from otmdr_jax.experiments.programs import run_keys
from otmdr_jax.experiments.report import examples
from tests.marks import one_axis_at_a_time, slow_but
from tests.sets import small_digits

TINY = TrainConfig(
    model="one_layer",
    method="sgd",
    batch_size=20,
    steps=6,
    eval_every=1,
    mesh="data=1",
    log_every=1,
)


def images_of(seed, num, classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % classes).astype(np.int32)
    return rng.integers(0, 256, (num, 8, 8, 1), dtype=np.uint8), labels


def back_to(run, step):
    """Makes a finished run one that was killed after a step."""
    for name in ("result.json", "predictions.npz"):
        (run / name).unlink()
    saved = {int(x.name): x for x in (run / "checkpoints").glob("[0-9]*")}
    assert step in saved
    for later in saved:
        if later > step:
            shutil.rmtree(saved[later])


# -- Folders --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    Image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("photos") / "pets"
    for split, (images, labels) in {
        "train": images_of(0, 60), "test": images_of(1, 30)
    }.items():  # fmt: skip
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            own = root / split / ("cat", "dog", "owl")[label]
            own.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(own / f"{i:02}.png")
    return root


@pytest.mark.slow
def test_a_folder_is_trained_on_and_resumed_from_the_command_line(
    photos, tmp_path, one_layer, monkeypatch, capsys
):
    monkeypatch.setenv("OTMDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(photos.parent)
    options = "--image-size 4 --model one_layer --method sgd --batch-size 20 --steps 2"
    command = ["train", *options.split(), "--mesh", "data=1", "--quiet"]
    cli.main([*command, "--data", "pets", "--output", "run"])
    config = json.loads((photos.parent / "run" / "config.json").read_text())
    assert config["data"] == str(photos) and config["image_size"] == 4
    record = json.loads((photos.parent / "run" / "data.json").read_text())
    assert record["class_names"] == ["cat", "dog", "owl"]
    assert (record["name"], record["image_shape"]) == ("pets", [4, 4, 1])
    # It is opened from elsewhere, where the folder is and where it has been moved.
    monkeypatch.chdir(tmp_path)
    run = photos.parent / "run"
    want = restore.open_run(run).dataset
    moved = photos.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="no folder '.*pets'"):
        _ = restore.open_run(run).dataset
    found = restore.open_run(run, data_dir=str(moved)).dataset
    np.testing.assert_array_equal(found.train.images, want.train.images)
    moved.rename(photos)
    # Reports read its images and name its classes.
    (shown,) = examples.of_labels([report.read_run(run)])
    assert shown.why == "" and shown.images.shape == (30, 4, 4, 1)
    assert examples.worst(shown.run).names == ["cat", "dog", "owl"]
    capsys.readouterr()


@pytest.mark.slow
def test_a_run_on_a_folder_that_has_changed_is_not_resumed(photos, tmp_path, one_layer):
    config = TINY.replace(data=str(photos), cache_dir=str(tmp_path / "cache"))
    config = config.replace(checkpoint_every=2)
    run = tmp_path / "run"
    whole = training.train(config, output=run, show_progress=False)
    back_to(run, 4)
    again = training.train(config, output=run, resume=True, show_progress=False)
    np.testing.assert_array_equal(again.log_probs, whole.log_probs)
    file = next((photos / "train" / "cat").iterdir())
    other = next((photos / "train" / "dog").iterdir()).read_bytes()
    before = file.read_bytes()
    try:
        file.write_bytes(other)
        with pytest.raises(ValueError, match="was trained on pets-60-.*now pets-60-"):
            training.train(config, output=run, resume=True, show_progress=False)
    finally:
        file.write_bytes(before)
    training.train(config, output=run, resume=True, show_progress=False)


@pytest.mark.slow
def test_the_folder_itself_may_be_given(photos, tmp_path, one_layer):
    made = data.from_folder(photos, 4, cache_dir=tmp_path / "cache")
    config = TINY.replace(
        data=str(photos), image_size=4, cache_dir=str(tmp_path / "cache")
    )
    training.train(config, made, tmp_path / "run", show_progress=False)
    known = json.loads((tmp_path / "run" / "config.json").read_text())
    assert known["data"] == str(photos)
    with pytest.raises(ValueError, match=r"\(image_size\) do nothing"):
        training.train(config.replace(image_size=5), made, show_progress=False)


def test_image_size_is_for_folders():
    for name in ("digits", "mine.npz", "cifar10"):
        with pytest.raises(ValueError, match="image_size must be left out"):
            TINY.replace(data=name, image_size=8)
    assert TINY.replace(data="./pets", image_size=8).data.image_size == 8


# -- Arrays with a validation set of their own ----------------------------------------


@pytest.mark.parametrize("saved", slow_but([True], [False, True]))
def test_an_own_validation_set_chooses_the_best_checkpoint(saved, tmp_path, one_layer):
    """In memory, and from a file by name."""
    train, test, validation = images_of(0, 60), images_of(1, 30), images_of(2, 21)
    given, config = None, TINY
    if saved:
        arrays = {"train": train, "test": test, "validation": validation}
        np.savez(
            tmp_path / "mine.npz",
            **{f"{x}_images": images for x, (images, _) in arrays.items()},
            **{f"{x}_labels": labels for x, (_, labels) in arrays.items()},
        )
        config = TINY.replace(data=str(tmp_path / "mine.npz"))
    else:
        given = data.from_arrays(train, test, validation=validation, name="mine")
    run = tmp_path / "run"
    training.train(config, given, run, show_progress=False)
    opened = restore.open_run(run, "best", dataset=given)
    np.testing.assert_array_equal(opened.dataset.validation.images, validation[0])
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {x["step"]: x["nll"] for x in lines if x["split"] == "validation"}
    assert len(scores) > 1 and opened.meta["best"]["nll"] == min(scores.values())
    record = json.loads((run / "data.json").read_text())
    assert [record[x] for x in ("train", "validation", "test")] == [60, 21, 30]


# -- Batches of a loader --------------------------------------------------------------


@pytest.fixture(scope="module")
def arrays():
    """60 examples, three batches of 20."""
    return data.from_arrays(
        images_of(0, 60), images_of(1, 30), validation=images_of(2, 21), name="mine"
    )


def as_batches(dataset, seed=0, size=20, **options):
    """The same data as a loader that gives the batches of a run on arrays."""
    _, key = run_keys(seed)

    def epoch(number):
        count = dataset.train.num_examples // size
        return data.stream_batches(
            dataset.train, size, key, (number + 1) * count, start_step=number * count
        )

    held = {"test": dataset.test, "validation": dataset.validation}
    return data.from_batches(
        epoch,
        mean=dataset.mean,
        std=dataset.std,
        num_classes=dataset.num_classes,
        steps_per_epoch=dataset.train.num_examples // size,
        **{**held, **options},
    )


METHODS = {
    "otmdr": {"num_particles": 2, "noise_std": 0.01, "augment": ("flip",)},
    "sgd": {},
    "otmdr-bnn": {"num_samples": 2},
}


@pytest.mark.slow
@one_axis_at_a_time(method=list(METHODS), devices=[1, 2])
def test_a_loader_of_the_same_batches_gives_the_same_bits(
    arrays, method, devices, one_layer
):
    """As a run on arrays: the state, what is logged and what is predicted."""
    config = TINY.replace(method=method, mesh=f"data={devices}", **METHODS[method])
    want = training.train(config, arrays, show_progress=False)
    found = training.train(config, as_batches(arrays), show_progress=False)
    np.testing.assert_array_equal(found.log_probs, want.log_probs)
    for got, here in zip(
        *map(jax.tree.leaves, (found.state.params, want.state.params)), strict=True
    ):
        np.testing.assert_array_equal(got, here)
    keys = ("step", "split", "loss", "nll", "accuracy")
    for got, here in zip(found.history, want.history, strict=True):
        assert [got.get(x) for x in keys] == [here.get(x) for x in keys]


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3])
def test_a_run_on_a_loader_goes_on_with_the_same_bits(
    arrays, tmp_path, step, one_layer
):
    """From within an epoch and from its end."""
    config = TINY.replace(checkpoint_every=1, keep_checkpoints=9)
    run = tmp_path / "run"
    whole = training.train(config, as_batches(arrays), run, show_progress=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    back_to(run, step)
    made = as_batches(arrays)
    again = training.train(config, made, run, resume=True, show_progress=False)
    np.testing.assert_array_equal(again.log_probs, whole.log_probs)

    def losses(lines):
        return [
            (x["step"], x.get("loss"), x.get("nll")) for x in map(json.loads, lines)
        ]

    assert losses((run / "metrics.jsonl").read_text().splitlines()) == losses(lines)
    record = json.loads((run / "data.json").read_text())
    assert (record["train"], record["dtype"]) == (60, "uint8")
    # Opened again with the same, and refused with a test set of other images.
    assert restore.open_run(run, dataset=made).dataset is made
    other = as_batches(arrays, test=images_of(5, 30))
    with pytest.raises(ValueError, match="was trained on batches-60-"):
        restore.open_run(run, dataset=other)
    with pytest.raises(ValueError, match="given to it in Python"):
        _ = restore.open_run(run).dataset


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 10}, "batch_size=10, but the loader's batches have 20"),
        ({"members": "2", "member_data": "own"}, "member_data='own' needs"),
        ({"input": "host"}, "input='host' does nothing"),
        ({"label_noise": 0.1}, r"\(label_noise\) do nothing"),
    ],
)
def test_options_that_need_more_than_batches_are_refused_before_training(
    arrays, options, message, one_layer
):
    with pytest.raises(ValueError, match=message):
        training.train(TINY.replace(**options), as_batches(arrays), show_progress=False)


def test_the_training_set_of_a_loader_is_not_evaluated_on(arrays, one_layer):
    made = as_batches(arrays)
    result = training.train(TINY, made, show_progress=False)
    with pytest.raises(ValueError, match="batches of a loader"):
        evaluation.evaluate(TINY, result.state, made, "train")
    # Sharpness is measured on the loader's first examples: here on all of them.
    assert result.metrics["sharpness"] == pytest.approx(
        training.train(TINY, arrays, show_progress=False).metrics["sharpness"], rel=1e-4
    )


@pytest.mark.slow
def test_laplace_is_fitted_to_one_pass_over_a_loader(arrays, one_layer):
    """To the same sums as over the arrays, in another order."""
    config = TINY.replace(method="laplace", num_samples=2)
    want = training.train(config, arrays, show_progress=False)
    found = training.train(config, as_batches(arrays), show_progress=False)
    for name in ("prior_precision", "effective_parameters", "nll"):
        assert found.metrics[name] == pytest.approx(want.metrics[name], rel=1e-3)
    few = config.replace(laplace_examples=20)
    fewer = training.train(few, as_batches(arrays), show_progress=False)
    effective = [x.metrics["effective_parameters"] for x in (fewer, found)]
    assert effective[0] != pytest.approx(effective[1], rel=1e-3)


@pytest.mark.slow
def test_averaged_weights_get_batchnorm_statistics_from_a_loader():
    """Of the batches of epoch 0: against a mean over them by hand."""
    small = small_digits(96)
    config = TrainConfig(
        model="cnn_small", method="swa", batch_size=32, steps=6, eval_every=9,
        collect_start=0.4, mesh="data=1",
    )  # fmt: skip
    made = as_batches(small, size=32, validation=None)
    result = training.train(config, made, show_progress=False)
    compiled = programs.compile_programs(config, made)
    state = result.state._replace(
        method_state=result.state.method_state._replace(statistics=None)
    )
    keys = [
        jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2), i)
        for i in range(3)
    ]
    batches = [batch.images for batch in made.train.epoch(0)]
    each = [
        compiled.of_batch(state, x, key) for x, key in zip(batches, keys, strict=True)
    ]
    want = compiled.finish(state, jax.tree.map(lambda *x: sum(x), *each))
    found = config.method.finalize(config, state, made, compiled)
    leaves = map(jax.tree.leaves, (found.method_state, want.method_state))
    for got, here in zip(*leaves, strict=True):
        np.testing.assert_allclose(got, here, rtol=1e-5, atol=1e-6)
    assert jax.tree.leaves(found.method_state.statistics)
    unlike = jax.tree.map(lambda *x: x[0] * 3, *each)
    other = compiled.finish(state, unlike).method_state.statistics
    pairs = zip(
        *map(jax.tree.leaves, (found.method_state.statistics, other)), strict=True
    )
    assert not all(np.allclose(a, b, rtol=1e-3) for a, b in pairs)
