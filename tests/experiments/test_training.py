"""The loop: exact resumption, clean stops, skipped steps, whole evaluation."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from otmdr_jax import data, models
from otmdr_jax.experiments import (
    methods,
    optimizers,
    programs,
    report,
    run_folder,
    training,
)
from otmdr_jax.experiments.config import TrainConfig, preset
from otmdr_jax.experiments.measure import evaluation, sharpness
from otmdr_jax.experiments.training import feed, loop, saving
from tests.sets import ROOT
from tests.zoo import WITH_ONE_LAYER

pytestmark = pytest.mark.usefixtures("one_layer")

TINY = TrainConfig(
    model="one_layer",
    mesh="data=1",  # others are in test_distributed.py
    method="otmdr",
    noise_std=0.01,
    epochs=3,
    batch_size=64,
    log_every=4,
    seed=3,
    learning_rate=0.3,
)


@pytest.fixture(scope="module")
def small():
    """200 digits of three classes: seconds a run."""
    digits = data.load("digits")
    chosen = [np.flatnonzero(s.labels < 3)[:200] for s in (digits.train, digits.test)]
    train, test = (
        (s.images[c], s.labels[c])
        for s, c in zip((digits.train, digits.test), chosen, strict=True)
    )
    return data.from_arrays(train, test, num_classes=3, name="small", validation=0.2)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """An uninterrupted run: the reference for every way to stop and go on."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return training.train(TINY, small, folder, show_progress=False)


def assert_same_bits(got, want):
    def same(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, got, want)


@pytest.mark.slow
def test_a_program_that_runs_once_has_the_bits_of_one_that_runs_often(small):
    """It is compiled in a third of the time, see `programs.compiled`."""
    compiled = programs.compile_programs(TINY.replace(model="cnn_small"), small)
    key = programs.run_keys(0)[0]
    lowered = compiled.init.lower(key)
    quick, whole = (
        lowered.compile(compiler_options={"xla_backend_optimization_level": level})(key)
        for level in (1, 3)
    )
    assert_same_bits(quick, whole)


@pytest.mark.slow
def test_a_run_learns_and_leaves_everything_in_its_folder(straight, small):
    assert straight.metrics["accuracy"] > 0.5  # of three classes, in six steps
    assert straight.metrics["steps"] == 3 * (160 // 64)
    names = {path.name for path in straight.folder.iterdir()}
    assert {"config.json", "data.json", "metrics.jsonl", "result.json"} <= names
    assert "checkpoints" in names
    assert any(name.startswith("events.out.tfevents") for name in names)
    found = run_folder.read_config(straight.folder)
    assert found == TINY.replace(data="arrays:small")
    lines = (straight.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == straight.history
    with np.load(straight.folder / "predictions.npz") as saved:
        np.testing.assert_allclose(saved["log_probs"], straight.log_probs, rtol=1e-6)
        np.testing.assert_array_equal(saved["labels"], small.test.labels)
    result = json.loads((straight.folder / "result.json").read_text())
    assert result["best"]["step"] in (2, 4, 6) and result["skipped_steps"] == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_does_not(straight, small):
    again = training.train(TINY, small, show_progress=False)
    assert_same_bits(again.state, straight.state)
    other = training.train(TINY.replace(seed=4), small, show_progress=False)
    assert not np.array_equal(other.log_probs, straight.log_probs)


def stop_after(steps, monkeypatch):
    """Sends this process a real SIGTERM once so many steps were dispatched."""
    set_up = training.Loop.__init__

    def counting(loop, config, dataset, compiled, *rest):
        left = [steps]

        def train_step(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return compiled.train_step(*args)

        set_up(loop, config, dataset, compiled._replace(train_step=train_step), *rest)

    monkeypatch.setattr(training.Loop, "__init__", counting)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_resume_is_exact(steps, small, straight, tmp_path, monkeypatch):
    """Pitfalls: stopped anywhere, by a real SIGTERM, and resumed: the same bits."""
    with monkeypatch.context() as patch:
        stop_after(steps, patch)
        with pytest.raises(training.Interrupted, match="--resume") as stop:
            training.train(TINY, small, tmp_path / "run", show_progress=False)
    assert stop.value.signum == signal.SIGTERM
    resumed = training.train(
        TINY, small, tmp_path / "run", resume=True, show_progress=False
    )
    assert_same_bits(resumed.state, straight.state)
    np.testing.assert_array_equal(resumed.log_probs, straight.log_probs)
    steps_logged = [r["step"] for r in resumed.history if r["split"] == "test"]
    assert steps_logged == [2, 4, 6]  # nothing twice, nothing lost


KILLED = TrainConfig(
    model="one_layer", method="otmdr", noise_std=0.01, epochs=4, batch_size=64,
    checkpoint_every=7, log_every=5, label_noise=0.1, mesh="data=1",
)  # fmt: skip
SCRIPT = (
    WITH_ONE_LAYER
    + """
import sys
from otmdr_jax.experiments import config, training
training.train(config.load(sys.argv[1]), output=sys.argv[2],
               resume=sys.argv[3] == "resume", show_progress=False)
"""
)


@pytest.mark.slow
def test_a_run_killed_by_sigkill_resumes_to_the_same_bits(tmp_path):
    """A process is really killed, twice, wherever it is, and its successor finishes."""
    whole = training.train(KILLED, output=tmp_path / "whole", show_progress=False)
    config, run = tmp_path / "whole" / "config.json", tmp_path / "killed"
    log = run / "metrics.jsonl"
    for mode, minimum in (("new", 10), ("resume", 35)):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(config), str(run), mode],
            stderr=subprocess.PIPE,
            cwd=ROOT,
            # As many devices as here: the program of one rounds noise in another way.
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())},
        )
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            lines = log.read_text().splitlines() if log.exists() else []
            if len(lines) > minimum // 5:
                break
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
        process.stderr.close()
    finished = training.train(KILLED, output=run, resume=True, show_progress=False)
    assert_same_bits(finished.state, whole.state)
    assert finished.metrics["nll"] == whole.metrics["nll"]
    assert finished.metrics["steps"] == whole.metrics["steps"] == 88
    events = [json.loads(x)["step"] for x in log.read_text().splitlines()]
    assert events == sorted(events)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(straight, small):
    log = (straight.folder / "metrics.jsonl").read_bytes()
    result = json.loads((straight.folder / "result.json").read_text())
    training.train(TINY, small, straight.folder, resume=True, show_progress=False)
    assert (straight.folder / "metrics.jsonl").read_bytes() == log
    again = json.loads((straight.folder / "result.json").read_text())
    assert again.pop("seconds_per_step") > 0
    assert result.pop("seconds_per_step") > 0
    assert again == result


def test_the_best_checkpoint_and_the_latest_are_kept_over_processes(tmp_path):
    """Scores survive a reopening, and with them the best step."""
    from otmdr_jax.experiments.checkpoint import Checkpoints

    def state(step):
        empty = {"w": jnp.full(2, float(step))}
        numbers = [jnp.asarray(n, jnp.int32) for n in (step, 0, 0)]
        return methods.TrainState(empty, {}, {}, jax.random.key(step), *numbers)

    scores = {1: -3.0, 2: -0.5, 3: -2.0, 4: None, 5: -1.0, 6: -4.0}
    for steps in ((1, 2, 3), (4, 5), (6,)):
        with Checkpoints(tmp_path / "c", keep=2) as saved:
            for step in steps:
                saved.save(state(step), {"at": step}, scores[step])
    with Checkpoints(tmp_path / "c", read_only=True) as saved:
        assert saved.steps() == [2, 5, 6] and saved.best_step() == 2
        restored = saved.restore(state(0), 2)
        assert restored.meta == {"at": 2} and restored.state.params["w"][0] == 2.0
        with pytest.raises(
            FileNotFoundError, match=r"of step 3: there are \[2, 5, 6\]"
        ):
            saved.restore(state(0), 3)


@pytest.mark.slow
def test_reading_a_checkpoint_makes_no_warnings(tmp_path):
    """In a process of its own: the loggers of this one are pytest's."""
    code = """
import sys, warnings
warnings.simplefilter("error")
from otmdr_jax.experiments.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], read_only=len(sys.argv) > 2):
    pass
"""
    for more in ((), ("read",)):
        found = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "checkpoints", *more],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "WARNING" not in found.stderr


@pytest.mark.parametrize(
    "scores",
    [
        (0.5, math.nan, None, 0.2, None, None),
        (math.nan, 0.5, None, math.nan, None, None),
        (0.5, None, math.inf, math.nan, -math.inf, 0.1),
        (math.nan, jnp.float32(math.nan), np.float64(0.5), None, None, math.nan),
    ],
)
def test_a_score_that_is_no_number_does_not_replace_the_best(scores, tmp_path):
    from otmdr_jax.experiments.checkpoint import Checkpoints

    for step, score in enumerate(scores, 1):
        numbers = [jnp.asarray(n, jnp.int32) for n in (step, 0, 0)]
        state = methods.TrainState(
            {"w": jnp.ones(2)}, {}, {}, jax.random.key(0), *numbers
        )
        with Checkpoints(tmp_path / "c", keep=2) as saved:
            saved.save(state, {}, score)
    best = scores.index(0.5) + 1
    with Checkpoints(tmp_path / "c", read_only=True) as saved:
        assert saved.best_step() == best and saved.steps() == [best, 5, 6]


def test_a_folder_whose_scores_are_all_nan_has_no_best(tmp_path):
    from otmdr_jax.experiments.checkpoint import Checkpoints

    for step in (1, 2, 3):
        numbers = [jnp.asarray(n, jnp.int32) for n in (step, 0, 0)]
        state = methods.TrainState(
            {"w": jnp.ones(2)}, {}, {}, jax.random.key(0), *numbers
        )
        with Checkpoints(tmp_path / "c", keep=2) as saved:
            saved.save(state, {}, math.nan)
    with Checkpoints(tmp_path / "c", read_only=True) as saved:
        assert saved.best_step() is None and saved.steps()[-2:] == [2, 3]


def test_a_checkpoint_of_an_older_version_is_read(tmp_path):
    """Written field by field, before there were loss scales and states of methods."""
    import orbax.checkpoint as ocp

    from otmdr_jax.experiments.checkpoint import Checkpoints

    state = methods.TrainState(
        {"w": jnp.ones(2)}, {}, {}, jax.random.key(4), *map(jnp.int32, (3, 1, 0))
    )

    class Old(NamedTuple):
        params: Any
        model_state: Any
        opt_state: Any
        key: Any
        step: Any
        skipped: Any
        skipped_in_row: Any

    with ocp.CheckpointManager(
        tmp_path / "c", item_names=("state", "meta"), options=None
    ) as manager:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(Old(*state[: len(Old._fields)])),
            meta=ocp.args.JsonSave({}),
        )
        manager.save(3, args=items)
    with Checkpoints(tmp_path / "c", scored=False, read_only=True) as saved:
        assert_same_bits(saved.restore(state).state, state)


@pytest.mark.slow
def test_logs_of_a_resumed_run_are_those_of_a_whole_one(small, tmp_path):
    """Windows end at checkpoints, whatever the intervals: no step is lost."""
    config = TINY.replace(
        epochs=2,
        batch_size=16,
        log_every=5,
        checkpoint_every=4,
        keep_checkpoints=9,
    )
    folder = tmp_path / "run"
    training.train(config, small, folder, show_progress=False)

    def losses():
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if r["split"] == "train"]
        return [(r["step"], r["loss"], r["skipped_steps"]) for r in records]

    whole = losses()
    assert [step for step, *_ in whole] == [4, 5, 8, 10, 12, 15, 16, 20]
    for name in ("result.json", "predictions.npz"):
        (folder / name).unlink()
    for step in (folder / "checkpoints").glob("[0-9]*"):
        if int(step.name) > 8:
            shutil.rmtree(step)
    training.train(config, small, folder, resume=True, show_progress=False)
    assert losses() == whole


@pytest.mark.parametrize(
    ("saved", "step", "due"),
    [(4, 7, False), (4, 8, True), (4, 10, True), (8, 10, False)],
)
def test_a_save_is_due_once_a_multiple_has_passed(saved, step, due):
    """On many hosts it is asked at the ends of windows alone, not at each step."""
    assert saving.Saver(None, every=4, step=saved).is_due(step, 600.0) == due


@pytest.mark.slow
def test_a_run_stopped_while_it_measures_its_result_is_saved(
    small, tmp_path, monkeypatch
):
    """After the last step too: SIGTERM saves, and the run resumes to its result."""
    measure, signals = loop.evaluate_run, [signal.SIGTERM]

    def interrupted(*args, **kwargs):
        while signals:
            os.kill(os.getpid(), signals.pop())
        return measure(*args, **kwargs)

    config = TINY.replace(epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_run", interrupted)
        with pytest.raises(training.Interrupted, match="after step 2 of 2"):
            training.train(config, small, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run" / "result.json").exists()
    training.train(config, small, tmp_path / "run", resume=True, show_progress=False)
    assert run_folder.is_finished(tmp_path / "run")


@pytest.mark.slow
def test_a_signal_at_the_end_of_a_run_is_heard(small, tmp_path, monkeypatch):
    """The run is finished, but who has more runs to train must stop."""
    result_of = loop.final_result

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return result_of(*args)

    config = TINY.replace(epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "final_result", interrupted)
        with pytest.raises(
            training.Interrupted, match="at its end: the run is finished"
        ) as stop:
            training.train(config, small, tmp_path / "run", show_progress=False)
    assert stop.value.signum == signal.SIGTERM
    assert run_folder.is_finished(tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_a_run_that_diverges_stops_the_next(small, tmp_path, monkeypatch):
    def diverge(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise training.NonFiniteError("no number")

    config = TINY.replace(epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_run", diverge)
        with pytest.raises(training.NonFiniteError, match="no number"):
            training.train(config, small, show_progress=False)
    with pytest.raises(training.Interrupted, match="after step 1 of 2"):
        training.train(config, small, tmp_path / "run", show_progress=False)


@pytest.mark.slow
def test_a_run_whose_predictions_are_nan_ends_with_null_metrics(
    small, tmp_path, monkeypatch
):
    """Parameters may stay finite while evaluation overflows."""
    right = loop.evaluate_run

    def overflowing(config, state, *args, **kwargs):
        params = jax.tree.map(lambda x: jnp.full_like(x, 1e38), state.params)
        return right(config, state._replace(params=params), *args, **kwargs)

    config = TINY.replace(method="sgd", noise_std=0.0, epochs=1)
    monkeypatch.setattr(loop, "evaluate_run", overflowing)
    training.train(config, small, tmp_path / "run", show_progress=False)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["finished"] and result["nll"] is None and result["accuracy"] is None
    (found,) = report.with_distinct_labels([report.read_run(tmp_path / "run")])
    report.print_summary([found], "one run")


@pytest.mark.slow
def test_a_checkpoint_cut_short_is_not_used(small, straight, tmp_path):
    """What a kill in the middle of a save leaves: a temporary folder, removed."""
    folder = tmp_path / "run"
    shutil.copytree(straight.folder, folder)
    latest = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
    latest.rename(latest.with_name(latest.name + ".orbax-checkpoint-tmp-0"))
    resumed = training.train(TINY, small, folder, resume=True, show_progress=False)
    assert_same_bits(resumed.state, straight.state)


class TestRefusals:
    def test_a_folder_with_another_run(self, small, straight):
        with pytest.raises(FileExistsError, match="It is a finished run"):
            training.train(TINY, small, straight.folder, show_progress=False)

    def test_a_folder_with_anything_else(self, small, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(FileExistsError, match="leave it alone"):
            training.train(TINY, small, tmp_path, show_progress=False)

    def test_resuming_what_is_no_run(self, small, tmp_path):
        with pytest.raises(FileNotFoundError, match="no run folder"):
            training.train(TINY, small, tmp_path, resume=True, show_progress=False)

    def test_resuming_with_other_options(self, small, straight):
        other = TINY.replace(learning_rate=0.2)
        with pytest.raises(ValueError, match="learning_rate: 0.3 -> 0.2"):
            training.train(other, small, straight.folder, resume=True)

    def test_resuming_with_other_data(self, small, straight):
        train = (small.train.images[::-1], small.train.labels[::-1])
        test = (small.test.images, small.test.labels)
        other = data.from_arrays(train, test, num_classes=3, name="small")
        with pytest.raises(ValueError, match="trained on small-160"):
            training.train(TINY, other, straight.folder, resume=True)

    def test_options_that_a_method_has_not(self, small):
        del small
        with pytest.raises(
            ValueError, match="sam has no option noise_std; it has .*rho"
        ):
            TINY.replace(method="sam")

    def test_a_batch_larger_than_the_data(self, small):
        config = TINY.replace(batch_size=500)
        with pytest.raises(ValueError, match="larger than the training set of 160"):
            training.train(config, small, show_progress=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(epochs=0), "epochs must be at least 1, got 0"),
            (dict(batch_size=1.5), "batch_size must be an integer, got 1.5"),
            (dict(method="adam"), "method must be one of sgd, sam"),
            (dict(learning_rate=-1.0), "learning_rate must be at least 0"),
            (dict(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\)"),
            (dict(clip_norm=0.0), "clip_norm must be positive"),
            (dict(steps=0), "steps must be an integer of at least 1"),
            (dict(rho=(-1.0,)), "rho must be finite and not negative"),
            (dict(epochs=True), "epochs must be a number"),
            (dict(learning_rate="0.1"), "learning_rate must be a number"),
            (dict(microbatch_size=2.5), "microbatch_size must be an integer"),
            (dict(remat="yes"), "remat must be a flag"),
            (dict(smoothing="rest"), "smoothing must be one of 'all', 'others'"),
        ],
    )
    def test_bad_numbers_and_words(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)


def poisoned(small, count):
    """Float images, `count` of which are NaN."""
    images = small.train.images.astype(np.float32) / 255
    dataset = data.from_arrays(
        (images, small.train.labels),
        (small.test.images.astype(np.float32) / 255, small.test.labels),
        num_classes=3,
        name="poisoned",
    )
    bad = dataset.train.images.copy()
    bad[:count] = np.nan
    return dataclasses.replace(dataset, train=data.Split(bad, dataset.train.labels))


@pytest.mark.slow
def test_non_finite_steps_are_skipped_and_counted(small):
    """One NaN image: the step that meets it is skipped, training goes on."""
    config = TINY.replace(epochs=8)
    result = training.train(config, poisoned(small, 1), show_progress=False)
    chex.assert_tree_all_finite(
        (result.state.params, result.state.model_state, result.state.opt_state)
    )
    logged = sum(r["skipped_steps"] for r in result.history if r["split"] == "train")
    assert 1 <= result.metrics["skipped_steps"] == logged <= 8
    assert result.metrics["accuracy"] > 0.5


@pytest.mark.slow
def test_a_run_stops_after_too_many_non_finite_steps_in_a_row(small):
    config = TINY.replace(max_skipped=4, epochs=10)
    with pytest.raises(training.NonFiniteError, match="not finite in 4 steps in a row"):
        training.train(config, poisoned(small, 160), show_progress=False)


def test_every_example_counts_exactly_once_in_evaluation(small, straight):
    """Pitfalls: the last batch is padded and masked, not dropped; any batch size."""
    reference = None
    for size in (1000, 64, 7):
        config = TINY.replace(eval_batch_size=size)
        values, log_probs, *_ = evaluation.evaluate(config, straight.state, small)
        assert log_probs.shape == (small.test.num_examples, 3)
        reference = log_probs if reference is None else reference
        np.testing.assert_allclose(log_probs, reference, rtol=1e-4, atol=1e-6)
    model = models.create("one_layer", 3)
    images = data.normalise(small.test.images, small.mean, small.std)
    apply = jax.jit(model.apply, static_argnames="train")
    params, model_state = straight.state.params, straight.state.model_state
    logits, _ = apply(params, model_state, images, train=False)
    right = np.argmax(logits, axis=1) == small.test.labels
    np.testing.assert_allclose(values["accuracy"], np.mean(right))


def test_no_key_of_a_run_is_used_twice(small):
    """Keys of initialisation, data order, augmentation and steps are all different."""
    state_key, data_key = programs.run_keys(3)
    state = programs.compile_programs(TINY, small).init(state_key)
    keys = [state_key, data_key, *jax.random.split(state_key)]
    keys += [jax.random.fold_in(data_key, epoch) for epoch in range(50)]
    key = state.key
    for _ in range(50):  # as train_step and the method's step split it
        key, augment_key = jax.random.split(key)
        key, step_key = jax.random.split(key)
        keys += [augment_key, step_key, *jax.random.split(step_key)]
    data_of = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}
    assert len(data_of) == len(keys)


@pytest.mark.slow
def test_the_step_is_traced_once_for_all_steps_and_seeds(small, monkeypatch):
    traces = []
    create = methods.create

    def counting(*args, **kwargs):
        method = create(*args, **kwargs)

        def step(state, batch):
            traces.append(1)
            return method.step(state, batch)

        return method._replace(step=step)

    monkeypatch.setattr(methods, "create", counting)
    config = TINY.replace(batch_size=32, epochs=2)
    for seed in (0, 1):
        training.train(config.replace(seed=seed), small, show_progress=False)
    assert len(traces) == 1


@pytest.mark.slow
def test_the_host_logs_what_is_done_while_the_device_has_more(small, monkeypatch):
    """A window's numbers are fetched when two more steps are under way."""
    dispatched, ahead = [], []
    step, log = feed.Feed.step, loop.Loop._log_training

    def count(self, *args):
        dispatched.append(1)
        return step(self, *args)

    def look(self, last, window, rate):
        ahead.append(len(dispatched) - last)
        log(self, last, window, rate)

    monkeypatch.setattr(feed.Feed, "step", count)
    monkeypatch.setattr(loop.Loop, "_log_training", look)
    config = TINY.replace(batch_size=16, epochs=1, log_every=2)
    result = training.train(config, small, show_progress=False)
    assert ahead == [2, 2, 2, 2, 0]  # at the end of an epoch nothing more is due
    logged = [r["step"] for r in result.history if r["split"] == "train"]
    assert logged == [2, 4, 6, 8, 10]


@pytest.mark.slow
def test_sharpness_is_the_gap_of_one_ascent_step_on_the_training_set(small, straight):
    """Against a NumPy norm and two plain evaluations."""
    compiled = programs.compile_programs(TINY, small)
    found = sharpness.gap(TINY, straight.state, small, compiled)
    batch = (*small.train, np.ones(160, bool), straight.state.model_state)

    def loss(params):
        total, count = compiled.loss_sums[0](params, batch)
        return total / count

    value, grads = jax.jit(jax.value_and_grad(loss))(straight.state.params)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    away = jax.tree.map(
        lambda p, g: p + 0.05 * g / length, straight.state.params, grads
    )
    np.testing.assert_allclose(found["train_nll"], value, rtol=1e-4)
    np.testing.assert_allclose(
        found["sharpness"], jax.jit(loss)(away) - value, rtol=2e-2, atol=1e-5
    )


# -- methods and optimizers -----------------------------------------------------------


def test_cross_entropy_spreads_the_smoothing_as_named():
    logits = jnp.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    labels = jnp.array([1, 0])
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    for smoothing, own, other in (
        ("all", 0.9 + 0.1 / 3, 0.1 / 3),
        ("others", 0.9, 0.05),
    ):
        target = np.full((2, 3), other)
        target[[0, 1], [1, 0]] = own
        expected = -np.mean(np.sum(target * log_probs, axis=1))
        got = methods.cross_entropy(logits, labels, 0.1, smoothing)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(methods.cross_entropy(logits, labels), expected)


def test_cosine_and_warmup_follow_their_formula():
    config = TrainConfig(schedule="cosine", learning_rate=0.4, warmup_epochs=2)
    rate = optimizers.schedule(config, total_steps=100, steps_per_epoch=5)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 0.2, 0.4], atol=1e-7)
    for step in (10, 40, 99):
        expected = 0.2 * (1 + np.cos(np.pi * (step - 10) / 90))
        np.testing.assert_allclose(rate(step), expected, atol=1e-6)
    with pytest.raises(ValueError, match="shorten the warmup"):
        optimizers.schedule(config, total_steps=10, steps_per_epoch=5)


def test_plateau_lowers_the_rate_when_the_loss_stops_falling():
    config = TrainConfig(
        schedule="plateau", learning_rate=1.0, plateau_patience=2, weight_decay=0.0,
        momentum=0.0,
    )  # fmt: skip
    tx = optimizers.create(config, total_steps=100, steps_per_epoch=3)
    rate = optimizers.schedule(config, 100, 3)
    params = jnp.ones(2)
    state = tx.init(params)
    rates = []
    for step in range(15):
        updates, state = tx.update(jnp.ones(2), state, params, value=jnp.array(1.0))
        rates.append(float(optimizers.learning_rate(rate, step, state)))
        np.testing.assert_allclose(updates, -rates[-1], rtol=1e-6)
    # The first epoch sets the best loss; two more without a lower one are patience.
    np.testing.assert_allclose(rates, [1.0] * 8 + [0.1] * 6 + [0.01], rtol=1e-5)


def test_weight_decay_is_added_to_the_gradient_and_masked_on_request():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for decay_all, bias in ((True, -0.05), (False, 0.0)):
        config = TrainConfig(
            learning_rate=0.1, weight_decay=0.5, decay_all=decay_all,
            schedule="constant",
        )  # fmt: skip
        tx = optimizers.create(config, 10, 5)
        updates, _ = tx.update(zeros, tx.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
        np.testing.assert_allclose(updates["bias"], bias, rtol=1e-6)


def test_biases_of_a_joint_ensemble_decay_as_those_of_one_network():
    """Members of one architecture lie along a first axis, others in a tuple."""
    leaves = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}
    for members, params in (("2", leaves), ("cnn_small,resnet_10", (leaves, leaves))):
        config = TrainConfig(
            members=members, ensemble="joint", learning_rate=0.1, weight_decay=0.5,
            decay_all=False, schedule="constant",
        )  # fmt: skip
        if members != "2":  # of their own, without the first axis
            params = jax.tree.map(lambda x: x[0], params)
        tx = optimizers.create(config, 10, 5)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        for path, update in jax.tree.leaves_with_path(updates):
            want = -0.05 if path[-1].key == "kernel" else 0.0
            np.testing.assert_allclose(update, want, rtol=1e-6)


def test_steps_of_the_rate_that_lie_in_the_warmup_count():
    """Drops at 30, 60 and 80 of 100 steps, whatever the warmup."""
    for warmup in (0, 20, 30, 70):
        config = TrainConfig(schedule="step", learning_rate=1.0, warmup_epochs=warmup)
        rate = optimizers.schedule(config, total_steps=100, steps_per_epoch=1)
        for step in range(warmup, 100):
            want = 0.2 ** sum(step >= start for start in (30, 60, 80))
            np.testing.assert_allclose(rate(step), want, rtol=1e-5)
        assert all(rate(step) <= rate(warmup) for step in range(warmup))


def test_the_patience_of_presets_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    config = preset("paper-bnn-cifar10").replace(optimizer="sgd", learning_rate=1.0)
    tx = optimizers.create(config, total_steps=60, steps_per_epoch=1)
    rate = optimizers.schedule(config, 60, 1)
    theirs = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs)
    state = tx.init(jnp.ones(2))
    # It falls, stands still, falls again, and stands still.
    for epoch, loss in enumerate([3.0, 2.0] + 14 * [2.0] + [1.0] + 30 * [1.0]):
        _, state = tx.update(jnp.ones(2), state, jnp.ones(2), value=jnp.array(loss))
        plateau.step(loss)
        ours = float(optimizers.learning_rate(rate, epoch, state))
        np.testing.assert_allclose(ours, theirs.param_groups[0]["lr"], rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_are_optax_with_clipping_first(name):
    config = TrainConfig(
        optimizer=name, clip_norm=0.5, weight_decay=0.0, schedule="constant"
    )
    tx = optimizers.create(config, 10, 5)
    base = {"sgd": optax.sgd(0.1, 0.9), "adam": optax.adam(0.1),
            "adamw": optax.adamw(0.1, weight_decay=0.0)}[name]  # fmt: skip
    params = jnp.array([1.0, -2.0])
    grads = jnp.array([3.0, 4.0])
    got, _ = tx.update(grads, tx.init(params), params)
    want, _ = base.update(grads / 10, base.init(params), params)
    np.testing.assert_allclose(got, want, rtol=1e-5)


class Quadratic:
    """A "model" of two parameters, so that a step can be followed by hand."""

    def init(self, key, images):
        del key, images
        return {"w": jnp.array([1.0, 2.0])}, {"seen": jnp.zeros(())}

    def apply(self, params, state, images, train):
        logits = images @ jnp.stack([params["w"], -params["w"]], axis=1)
        seen = state["seen"] + 1.0 if train else state["seen"]
        return logits, {"seen": seen}


def test_a_step_is_gradient_update_and_statistics_from_the_center(key):
    images = jnp.array([[1.0, 0.5], [-0.3, 1.0], [0.2, 0.1], [1.0, 1.0]])
    labels = jnp.array([0, 1, 1, 0])
    method = methods.create("sam", Quadratic(), optax.sgd(0.5), rho=(0.2,))
    state = method.init(key, images)
    new, metrics = method.step(state, (images, labels))

    def loss(w):
        x = np.asarray(images, np.float64) @ w * 2  # the logit difference
        sign = np.where(np.asarray(labels) == 0, 1.0, -1.0)
        return np.mean(np.log1p(np.exp(-sign * x)))

    def gradient(w, step=1e-6):
        return np.array(
            [(loss(w + step * e) - loss(w - step * e)) / (2 * step) for e in np.eye(2)]
        )

    w = np.array([1.0, 2.0])
    worst = w + 0.2 * gradient(w) / np.linalg.norm(gradient(w))
    np.testing.assert_allclose(new.params["w"], w - 0.5 * gradient(worst), rtol=1e-5)
    assert new.model_state["seen"] == 1.0  # once, not once a pass
    np.testing.assert_allclose(metrics["loss"], loss(worst), rtol=1e-5)
    np.testing.assert_allclose(metrics["center_loss"], loss(w), rtol=1e-5)
    np.testing.assert_allclose(metrics["distance"], 0.2, rtol=1e-5)
    assert new.step == 1 and metrics["accuracy"] == np.mean(
        [(np.asarray(images) @ w)[i] * (1 if y == 0 else -1) > 0
         for i, y in enumerate(np.asarray(labels))]
    )  # fmt: skip


@pytest.mark.slow
def test_summed_particles_are_k_times_the_mean(key):
    images, labels = jnp.ones((6, 2)) * jnp.arange(6.0)[:, None], jnp.arange(6) % 2
    updates = []
    for sum_particles in (False, True):
        method = methods.create(
            "otmdr", Quadratic(), optax.sgd(1.0), num_particles=3,
            sum_particles=sum_particles,
        )  # fmt: skip
        state = method.init(key, images)
        new, _ = method.step(state, (images, labels))
        updates.append(new.params["w"] - state.params["w"])
    np.testing.assert_allclose(updates[1], 3 * updates[0], rtol=1e-5)


@pytest.mark.slow
def test_no_convolution_of_jax_stands_inside_a_loop_on_cpu(small):
    """Pitfalls: XLA's convolutions in lax.scan crawl on CPUs; auto never makes one."""

    def in_loops(particle_map, backend):
        config = TINY.replace(num_particles=2, particle_map=particle_map)
        jax.clear_caches()  # they know nothing of the replaced name
        with mock.patch.object(jax, "default_backend", lambda: backend):
            compiled = programs.compile_programs(config, small)
            state = jax.eval_shape(compiled.init, jax.random.key(0))
            jaxpr = jax.make_jaxpr(compiled.train_step)(
                state, tuple(small.train), jnp.arange(160), np.int32(0)
            )
        found = [x for x in equations(jaxpr.jaxpr) if "conv" in x[0]]
        return {name for name, inside in found if inside and "convert" not in name}

    # The zoo's own on CPUs are fast in a loop.
    assert in_loops("auto", "cpu") == {"convolve", "convolve_kernel_gradient"}
    assert in_loops("auto", "gpu") == {"conv_general_dilated"}  # the check can fail
    jax.clear_caches()


def equations(jaxpr, in_loop=False):
    """(primitive's name, whether it is inside a loop), however deep."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        yield name, in_loop
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, in_loop or name in ("scan", "while"))


@pytest.mark.parametrize(
    ("options", "noise", "said"),
    [  # noise: in radii, of which ten are the bound
        ({}, 10.1, True),
        ({}, 9.9, False),
        ({}, 0.0, False),
        ({"norm": "per_leaf"}, 22.3, False),  # each of five moves by the radius
        ({"norm": "per_leaf"}, 22.4, True),
        ({"norm": "none"}, 99.0, False),  # the gradient says how far
        ({"members": "3"}, 10.1, True),
        ({"members": "3"}, 9.9, False),
        ({"members": "one_layer,one_layer"}, 10.1, True),
        ({"method": "sam"}, None, False),
    ],
)
def test_noise_that_drowns_the_ascent_is_said(one_layer, small, options, noise, said):
    images = jnp.zeros((1, *small.image_shape))
    params, _ = models.create(one_layer, 3).init(jax.random.key(0), images)
    leaves = [np.asarray(x) for x in jax.tree.leaves(params)]
    assert len(leaves) == 5
    common = {"model": one_layer, "method": "otmdr", "mesh": "data=1"}
    if noise is not None:
        total = sum(x.size for x in leaves)
        common["noise_std"] = noise * (0.05 + 0.1) / math.sqrt(total)
    config = TrainConfig(**common | options)
    compiled = programs.compile_programs(config, small)
    state = jax.eval_shape(compiled.init, programs.run_keys(0)[0])
    found = programs.much_noise(config, state)
    assert (found is not None) == said
    if said:
        assert f" on {total:,} weights" in found


@pytest.mark.slow
def test_a_run_says_what_noise_drowns(one_layer, small, capsys):
    config = TrainConfig(
        model=one_layer, method="otmdr", mesh="data=1", noise_std=1.0, steps=1
    )
    training.train(config, small)
    assert "the particles are mostly noise" in capsys.readouterr().err
