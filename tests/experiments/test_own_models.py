"""Runs on networks, losses, metrics and callbacks of one's own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import otmdr_jax
from otmdr_jax import data, models, training
from otmdr_jax.experiments import cli, combine, own, programs
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import evaluation

TINY = TrainConfig(
    method="otmdr", epochs=2, batch_size=16, learning_rate=0.05, mesh="data=1"
)


class Net(nnx.Module):
    """A network of images, with all that has a state."""

    def __init__(self, num_classes, *, rngs):
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(12, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(x.reshape(len(x), -1))))


class Line(nnx.Module):
    """Two outputs of three features."""

    def __init__(self, *, rngs):
        self.line = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.line(x)


def squares(outputs, targets):
    return jnp.mean((outputs - targets) ** 2, axis=-1)


def chosen(outputs, labels):
    return -outputs[jnp.arange(len(labels)), labels]


def rmse(outputs, targets):
    return np.sqrt(np.mean((outputs - targets) ** 2))


@pytest.fixture(scope="module")
def classes():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 2, 2, 3)).astype(np.float32)
    labels = (images.sum((1, 2, 3)) > 0).astype(int) + 2 * (images[:, 0, 0, 0] > 0)
    return data.from_arrays((images[:48], labels[:48]), (images[48:], labels[48:]))


@pytest.fixture(scope="module")
def numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 3)).astype(np.float32)
    y = x @ np.array([[1.0, 0.0], [-2.0, 1.0], [0.5, 3.0]]) + [1.0, 2.0]
    return data.from_targets((x[:64], y[:64]), (x[64:], y[64:]), name="lines")


@pytest.mark.slow
def test_a_network_of_the_zoo_given_as_an_object_gives_the_same_bits(classes):
    named = training.train(TINY, classes, show_progress=False)
    zoo = models.create("cnn_small", classes.num_classes)
    given = training.train(TINY, classes, model=zoo, show_progress=False)
    np.testing.assert_array_equal(given.log_probs, named.log_probs)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.essential),
        pytest.param({"members": "2"}, marks=pytest.mark.slow),
        pytest.param({"method": "sgvb"}, marks=pytest.mark.slow),
        pytest.param({"method": "snapshot", "cycles": 2}, marks=pytest.mark.slow),
        pytest.param({"mesh": "data=4"}, marks=pytest.mark.slow),
        pytest.param({"method": "bsam"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_is_recorded_opened_and_resumed(options, classes, tmp_path):
    config, folder = TINY.replace(**options), tmp_path / "run"
    result = training.train(
        config, classes, folder, model=Net, metrics={"mine": top}, show_progress=False
    )
    record = json.loads((folder / "config.json").read_text())
    assert record["model"] == f"{__name__}:Net"
    assert result.metrics["mine"] == pytest.approx(result.metrics["accuracy"])
    run = otmdr_jax.open_run(folder)  # found by its name
    found = run.predict(classes.test.images)
    np.testing.assert_allclose(found, np.exp(result.log_probs), rtol=1e-4, atol=1e-7)
    again = training.train(
        config,
        classes,
        folder,
        model=Net,
        metrics={"mine": top},
        resume=True,
        show_progress=False,
    )
    np.testing.assert_array_equal(again.log_probs, result.log_probs)


def top(outputs, targets):
    np.testing.assert_allclose(outputs.sum(1), 1, rtol=1e-6)  # probabilities
    return np.mean(outputs.argmax(1) == targets)


@pytest.mark.slow
def test_a_network_without_a_name_is_given_again(classes, tmp_path):
    def local(num_classes, rngs):
        return Net(num_classes, rngs=rngs)

    result = training.train(
        TINY.replace(epochs=1),
        classes,
        tmp_path / "run",
        model=local,
        show_progress=False,
    )
    with pytest.raises(ValueError, match="give it again"):
        otmdr_jax.open_run(tmp_path / "run")
    with pytest.raises(ValueError, match="local, and .*Net was given"):
        otmdr_jax.open_run(tmp_path / "run", model=Net)
    run = otmdr_jax.open_run(tmp_path / "run", model=local)
    found = run.predict(classes.test.images)
    np.testing.assert_allclose(found, np.exp(result.log_probs), rtol=1e-4, atol=1e-7)


@pytest.mark.essential
def test_the_command_line_takes_a_network_by_its_module(
    classes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_mine.py").write_text(
        "from flax import nnx\n"
        "class Flat(nnx.Module):\n"
        "    def __init__(self, num_classes, rngs):\n"
        "        self.head = nnx.Linear(12, num_classes, rngs=rngs)\n"
        "    def __call__(self, images):\n"
        "        return self.head(images.reshape(len(images), -1))\n"
    )
    data.save(classes, "mine.npz")
    cli.main(
        "train --data mine.npz --model nets_of_mine:Flat --method sam --epochs 1 "
        "--batch-size 16 --mesh data=1 --output run --quiet".split()
    )
    np.savez("new.npz", images=classes.test.images)
    cli.main("predict run new.npz --quiet".split())
    assert "16 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main("train --data mine.npz --model nets_of_mine:Other --quiet".split())
    assert "has no 'Other'" in capsys.readouterr().err


@pytest.mark.slow
def test_regression_reaches_least_squares(numbers, tmp_path):
    """SGD on the mean square ends at the closed solution."""
    config = TINY.replace(
        method="sgd", epochs=150, learning_rate=0.2, weight_decay=0.0, eval_every=150
    )
    result = training.train(
        config,
        numbers,
        tmp_path / "run",
        model=Line,
        loss=squares,
        metrics={"rmse": rmse},
        show_progress=False,
    )
    design = np.c_[numbers.train.images, np.ones(64)]
    solution = np.linalg.lstsq(design, numbers.train.labels, rcond=None)[0]
    test = numbers.test
    want = np.c_[test.images, np.ones(32)] @ solution
    np.testing.assert_allclose(result.log_probs, want, atol=1e-3)
    assert result.metrics["rmse"] == pytest.approx(rmse(want, test.labels), abs=1e-3)
    assert result.metrics["loss"] < 1e-5 and "accuracy" not in result.metrics
    run = otmdr_jax.open_run(tmp_path / "run")
    np.testing.assert_allclose(run.predict(test.images), want, atol=1e-3)
    assert "accuracy" not in result.history[0]


@pytest.mark.slow
def test_a_step_on_a_loss_of_ones_own_is_the_gradient_of_its_mean(numbers):
    config = TINY.replace(
        method="sgd",
        steps=1,
        epochs=None,
        momentum=0.0,
        weight_decay=0.0,
        batch_size=64,
        schedule="constant",
    )
    result = training.train(
        config, numbers, model=Line, loss=squares, show_progress=False
    )
    model = models.adapt(Line)
    key = otmdr_jax.programs.run_keys(0)[0]
    params, state = model.init(jax.random.split(key, 3)[0], numbers.train.images)
    x = (numbers.train.images - numbers.mean) / np.asarray(numbers.std)

    def mean_square(params):
        outputs, _ = model.apply(params, state, x.astype(np.float32), train=True)
        return jnp.mean((outputs - numbers.train.labels) ** 2)

    grads = jax.grad(mean_square)(params)
    want = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    for a, b in zip(
        jax.tree.leaves(result.state.params), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_several_labels_at_once():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 3)).astype(np.float32)
    y = np.stack([x[:, 0] > 0, x.sum(1) > 0], axis=1)
    mine = data.from_targets((x, y), (x, y))

    def loss(outputs, targets):
        return optax.sigmoid_binary_cross_entropy(outputs, targets).sum(-1)

    result = training.train(
        TINY.replace(epochs=20, learning_rate=0.5, members="2", eval_every=20),
        mine,
        model=Line,
        loss=loss,
        metrics={"right": lambda z, y: np.mean((z > 0) == y)},
        show_progress=False,
    )
    assert result.metrics["right"] > 0.95
    assert result.metrics["members"][0]["right"] > 0.95


@pytest.mark.slow
def test_callbacks_are_called(classes, tmp_path):
    calls = []

    class Told(training.Callback):
        def on_window(self, step, means):
            calls.append(("window", step, means["loss"]))

        def on_evaluation(self, step, metrics):
            calls.append(("evaluation", step, metrics["test"]["nll"]))

        def on_checkpoint(self, step, state):
            calls.append(("checkpoint", step, int(state.step)))

        def on_end(self, result):
            calls.append(("end", result.metrics["steps"], result.metrics["nll"]))

    result = training.train(
        TINY.replace(checkpoint_every=3),
        classes,
        tmp_path / "run",
        callbacks=[Told()],
        show_progress=False,
    )
    told = [(r["split"], r["step"]) for r in result.history]
    steps = {kind: [s for k, s, _ in calls if k == kind] for kind, _, _ in calls}
    assert steps["window"] == [s for split, s in told if split == "train"]
    assert steps["evaluation"] == [s for split, s in told if split == "test"] == [3, 6]
    assert steps["checkpoint"] == [3, 6] and steps["end"] == [6]
    assert calls[-1][2] == result.metrics["nll"]

    class Stop(training.Callback):
        def on_evaluation(self, step, metrics):
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        training.train(
            TINY, classes, tmp_path / "other", callbacks=[Stop()], show_progress=False
        )


class Wide(Net):
    """As many outputs as it likes."""

    outputs = 20

    def __init__(self, num_classes, *, rngs):
        super().__init__(self.outputs, rngs=rngs)


class Narrow(Wide):
    outputs = 2


class Pixels(Net):
    def __call__(self, x):
        return jnp.broadcast_to(super().__call__(x)[:, None], (len(x), 2, 4))


@pytest.mark.parametrize(
    "model, shape",
    [(Wide, r"\(3, 20\)"), (Narrow, r"\(3, 2\)"), (Pixels, r"\(3, 2, 4\)")],
)
@pytest.mark.parametrize("loss", [None, chosen])
def test_outputs_that_are_not_of_the_classes_are_refused(
    model, shape, loss, classes, tmp_path
):
    with pytest.raises(ValueError, match=rf"4 classes, \(B, 4\), .* returns {shape}"):
        training.train(TINY, classes, tmp_path / "run", model=model, loss=loss)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("callbacks", [[3], training.Callback(), [training.Callback]])
def test_what_is_no_callback_is_refused(callbacks, classes):
    with pytest.raises(TypeError, match="callbacks must be a list of objects"):
        training.train(TINY, classes, callbacks=callbacks)


@pytest.mark.slow
def test_a_metric_that_fails_is_named(classes):
    def fails(outputs, targets):
        raise ZeroDivisionError("boo")

    config = TINY.replace(epochs=1)
    with pytest.raises(ZeroDivisionError, match="boo") as caught:
        training.train(config, classes, metrics={"mine": fails}, show_progress=False)
    assert caught.value.__notes__ == ["It comes from the metric 'mine'."]


@pytest.mark.parametrize(
    "options, given, message",
    [
        ({"model": "resnet_18"}, {"model": Net}, "name the model resnet_18, and"),
        ({"dtype": "bfloat16"}, {"model": Net}, "dtype='bfloat16' is of the zoo"),
        ({"dropout": 0.1}, {"model": Net}, "dropout=0.1 is of the zoo"),
        ({"label_smoothing": 0.1}, {"loss": chosen}, "label_smoothing=0.1 is of the"),
        ({"method": "laplace"}, {"loss": chosen}, "laplace fits the curvature"),
        (
            {},
            {"model": Net, "loss": lambda z, y: jnp.mean(z)},
            r"losses of the examples.*\(\)",
        ),
        ({}, {"model": Net, "loss": lambda z, y: z[:, 0] > 0}, "floats of shape"),
        (
            {},
            {"model": Net, "loss": lambda z, y: jnp.mean(z[:, :1] - y[None], -1)},
            r"must not depend on the others.*become \(B, B\)",
        ),
        ({}, {"metrics": [top]}, "functions by name"),
        pytest.param(
            {},
            {"metrics": {"a": lambda p, y: p}},
            "'a' must give one number",
            marks=pytest.mark.slow,
        ),
        ({}, {"metrics": {"nll": top}}, "names of their own, got nll"),
        ({"method": "mc-dropout"}, {"model": Net}, "mc-dropout drops activations"),
        ({"method": "dst"}, {"model": Net}, "dst counts the operations"),
        ({"method": "swa"}, {"model": Net}, "swa computes BatchNorm.*momentum"),
        ({}, {"model": "cnn_small"}, "is a name: it belongs to the options"),
        ({}, {"loss": 3}, "loss must be a function"),
    ],
)
def test_what_does_not_go_together_is_refused(options, given, message, classes):
    with pytest.raises((ValueError, TypeError), match=message):
        training.train(
            TINY.replace(epochs=1, **options), classes, show_progress=False, **given
        )


def test_targets_need_a_network_and_a_loss(numbers):
    for given in ({}, {"loss": squares}, {"model": Line}):
        with pytest.raises(ValueError, match="is a classifier|need a loss"):
            training.train(TINY, numbers, show_progress=False, **given)
    with pytest.raises(ValueError, match="joint ensemble"):
        training.train(
            TINY.replace(members="2", ensemble="joint"),
            numbers,
            model=Line,
            loss=squares,
            show_progress=False,
        )


@pytest.mark.slow
def test_a_run_is_measured_by_its_own_loss(numbers, classes, tmp_path, capsys):
    """Found by its name, or asked for; never the cross entropy in its place."""
    config = TINY.replace(epochs=1)
    folder = tmp_path / "named"
    result = training.train(
        config, numbers, folder, model=Line, loss=squares, show_progress=False
    )
    run = otmdr_jax.open_run(folder, split="test", dataset=numbers)
    assert run.programs.own.loss is squares
    found = evaluation.evaluate(
        run.config, run.state, numbers, "test", run.programs
    ).metrics
    assert found["loss"] == pytest.approx(result.metrics["loss"], rel=1e-4)
    with pytest.raises(ValueError, match="the loss .*:squares, and given:"):
        training.train(
            config,
            numbers,
            folder,
            resume=True,
            model=Line,
            loss=lambda z, y: squares(z, y),
            show_progress=False,
        )
    for command in ("calibrate", "shift"):
        with pytest.raises(SystemExit):
            cli.main([command, str(folder)])
        assert "no class numbers" in capsys.readouterr().err
    np.savez(tmp_path / "new.npz", images=numbers.test.images)
    output = tmp_path / "out.csv"
    cli.main(
        ["predict", str(folder), str(tmp_path / "new.npz"), "--output", str(output)]
    )
    rows = np.loadtxt(output, delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows[:, 1:], result.log_probs, rtol=1e-4)
    other = tmp_path / "local"
    training.train(
        config,
        numbers,
        other,
        model=Line,
        loss=lambda z, y: squares(z, y),
        show_progress=False,
    )
    run = otmdr_jax.open_run(other, dataset=numbers)
    run.predict(numbers.test.images)  # for which it is not needed
    with pytest.raises(ValueError, match="given to it in Python.*give it again"):
        evaluation.evaluate(run.config, run.state, numbers, "test", run.programs)
    with pytest.raises(ValueError, match="no cross entropy"):
        evaluation.evaluate(
            run.config, run.state, numbers, "test",
            programs.compile_programs(run.config, numbers, own=own.Own(Line)),
        )  # fmt: skip
    with np.load(other / "predictions.npz") as kept:
        np.testing.assert_array_equal(kept["labels"], numbers.test.labels)
    with pytest.raises(ValueError, match="loss that was given in Python"):
        combine.combine([folder, other], tmp_path / "both", dataset=numbers)


@pytest.mark.slow
def test_a_gaussian_of_the_last_layer_finds_the_head(classes, tmp_path):
    config = TINY.replace(method="laplace", num_samples=3, epochs=1)
    result = training.train(
        config, classes, tmp_path / "run", model=Net, show_progress=False
    )
    assert result.metrics["effective_parameters"] > 0
    found = otmdr_jax.open_run(tmp_path / "run").predict(classes.test.images)
    np.testing.assert_allclose(found, np.exp(result.log_probs), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_network_of_ones_own_is_fine_tuned(classes, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    training.train(TINY, classes, first, model=Net, show_progress=False)
    before = otmdr_jax.open_run(first).params
    config = TINY.replace(init_from=str(first), freeze="norm/*", epochs=1)
    training.train(config, classes, second, model=Net, show_progress=False)
    after = otmdr_jax.open_run(second).params
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(after["norm"][name], before["norm"][name])
    assert (after["head"]["kernel"] != before["head"]["kernel"]).any()
    with pytest.raises(ValueError, match="the run was trained on|do not fit"):
        training.train(
            config.replace(freeze=None), classes, tmp_path / "third",
            model=lambda num_classes, rngs: Wide(num_classes, rngs=rngs),
            show_progress=False,
        )  # fmt: skip


class Wide(Net):
    """A network with other shapes."""

    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.more = nnx.Linear(2, 2, rngs=rngs)
