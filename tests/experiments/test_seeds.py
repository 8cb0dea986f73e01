"""Seeds: one rule, 0..2**32 - 1, checked before anything is read or trained.

Beyond it JAX would run another seed's run under this one's name, and NumPy would fail
once the run has been trained.
"""

import json
import re

import jax
import numpy as np
import pytest

from otmdr_jax.experiments import cli, config, demo, sweep
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.measure import calibrate, sharpness, shift
from otmdr_jax.experiments.measure.surface import Plan
from otmdr_jax.experiments.programs import run_keys

BAD = [-1, 2**32, 2**63, True, 1.0]
MESSAGE = r"seed must be (an integer|a number|in 0\.\.2\*\*32 - 1)"


@pytest.mark.parametrize("seed", BAD)
@pytest.mark.parametrize(
    "start",
    [
        lambda seed: TrainConfig(seed=seed),
        lambda seed: TrainConfig(data_seed=seed),
        lambda seed: TrainConfig(method="laplace").replace(seed=seed),
        lambda seed: calibrate.calibrate("no run", seed=seed),
        lambda seed: sharpness.measure(None, None, None, None, seed=seed),
        lambda seed: shift.evaluate(None, None, None, seed=seed),
        lambda seed: Plan(seed=seed),
    ],
)
def test_bad_seeds_are_refused_before_anything_is_read(start, seed):
    with pytest.raises(ValueError, match=MESSAGE):
        start(seed)


def test_the_largest_seed_is_a_run_of_its_own():
    seeds = [0, 1, 2**31, 2**32 - 1]
    keys = [run_keys(TrainConfig(seed=seed).run.seed)[0] for seed in seeds]
    bits = {np.asarray(jax.random.key_data(key)).tobytes() for key in keys}
    assert len(bits) == len(seeds)


@pytest.mark.parametrize("command", ["calibrate", "sharpness", "shift", "landscape"])
def test_commands_refuse_them_before_the_run_is_read(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "no-such-run", "--seed", "-1"])
    assert "seed must be in 0..2**32 - 1, got -1" in capsys.readouterr().err


@pytest.mark.parametrize("old", [-1, 2**32, 2**40 + 7, -(2**40) + 7, 2**63 - 1])
def test_a_run_of_an_older_version_says_what_seed_it_had(old, tmp_path):
    """Its keys were those of the seed that the message names."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"method": "sam", "seed": old}))
    with pytest.raises(ValueError, match=rf"got {old}\. JAX keeps") as raised:
        config.load(path)
    new = int(re.search(r"is that of seed (\d+),", str(raised.value))[1])
    words = [jax.random.key_data(jax.random.key(seed)) for seed in (old, new)]
    np.testing.assert_array_equal(*words)
    path.write_text(json.dumps({"method": "sam", "seed": new}))
    assert config.load(path).run.seed == new
    path.write_text(json.dumps({"data_seed": old}))
    with pytest.raises(ValueError, match=rf"data_seed .* {old}\. No other seed"):
        config.load(path)


def test_a_sweep_and_the_demo_refuse_them_before_the_first_run(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('seeds = [0, 4294967296]\n[methods."SGD"]\nmethod = "sgd"\n')
    with pytest.raises(ValueError, match=MESSAGE):
        sweep.plan(path, tmp_path / "out")
    with pytest.raises(ValueError, match=MESSAGE):
        demo.run(tmp_path / "report", seeds=(0, -1))
    for seeds in ((0, 0), ()):
        with pytest.raises(ValueError, match="seeds must be one or several different"):
            demo.run(tmp_path / "report", seeds=seeds)
    assert not (tmp_path / "report").exists()
