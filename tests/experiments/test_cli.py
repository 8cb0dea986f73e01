"""The command line, as a user runs it: one session from training to comparison."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
import typing

import numpy as np
import pytest
from flax import nnx

from otmdr_jax.experiments import cli, config, interrupts, methods, options

QUICK = [
    "--steps", "4", "--batch-size", "32", "--quiet", "--label-noise", "0.2",
    "--mesh", "data=1",
]  # fmt: skip


def otmdr(*args, cwd=None, check=True, env=None):
    """In a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "otmdr_jax", *args],
        check=check,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", **(env or {})},
    )


def otmdr_here(*args, cwd, check=True):
    """In this process, which has its libraries already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "120")
        try:
            cli.main(list(args))
        except SystemExit as stop:
            code = stop.code or 0
    assert not (check and code), err.getvalue()
    return types.SimpleNamespace(
        returncode=code, stdout=out.getvalue(), stderr=err.getvalue()
    )


@pytest.mark.slow
def test_programs_are_kept_by_processor_and_pytorch_is_left_alone(tmp_path):
    """Small programs too; tensorboardX finds PyTorch absent, and nothing else does."""
    (tmp_path / "torch.py").write_text("raise ImportError('it was imported')")
    code = """
        import sys
        from otmdr_jax.experiments import cli
        cli._cache_programs()
        from otmdr_jax.experiments import tensorboard
        tensorboard.Board(sys.argv[1], 0).close()
        assert "tensorboardX" in sys.modules and "torch" not in sys.modules
        import jax
        jax.jit(lambda x: x + 1)(1.0)
    """
    gone = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "board")],
        check=True,
        env={
            **{name: x for name, x in os.environ.items() if name not in gone},
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        },
    )
    (folder,) = (tmp_path / "cache" / "otmdr_jax" / "programs").iterdir()
    assert re.fullmatch("[0-9a-f]{12}", folder.name)
    assert any("lambda" in file.name for file in folder.iterdir())


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_one_line(tmp_path):
    for words in (["info"], ["train", "--steps", "1", "--output", str(tmp_path / "a")]):
        done = subprocess.run(
            [sys.executable, "-m", "otmdr_jax", *words],
            env={**os.environ, "JAX_PLATFORMS": "cuda"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "JAX finds no device of JAX_PLATFORMS='cuda': unset it" in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Two finished runs in a folder."""
    folder = tmp_path_factory.mktemp("session")
    otmdr("train", "--method", "sgd", *QUICK, cwd=folder)
    otmdr_here(
        "train", "--method", "otmdr", "--num-particles", "2", "--rho", "0.05", "0.1",
        "--validation", "0.1", "--output", "robust", *QUICK, cwd=folder,
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_train_writes_a_run_with_its_options(session):
    folder = session / "runs" / "digits-cnn_small-sgd-seed0"
    stored = config.load(folder / "config.json")
    assert stored.method.name == "sgd" and stored.run.steps == 4
    robust = config.load(session / "robust" / "config.json")
    assert robust.method.rho == (0.05, 0.1) and robust.method.num_particles == 2


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused(session):
    done = otmdr("train", "--method", "sgd", *QUICK, cwd=session, check=False)
    assert done.returncode == 2
    assert "is not empty. It is a finished run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_evaluate_prints_a_table_and_writes_files(session):
    done = otmdr_here("evaluate", "robust", "--checkpoint", "best", cwd=session)
    assert "Accuracy" in done.stdout and "OT-MDR (K = 2)" in done.stdout
    path = session / "robust" / "evaluation_best.json"
    evaluation = json.loads(path.read_text())
    result = json.loads((session / "robust" / "result.json").read_text())
    assert evaluation["steps"] == result["best"]["step"]
    picture = session / "robust" / "reliability_best.png"
    assert picture.stat().st_size > 10_000
    done = otmdr_here("evaluate", "robust", cwd=session)
    evaluation = json.loads((session / "robust" / "evaluation.json").read_text())
    assert evaluation["accuracy"] == result["accuracy"]
    assert abs(evaluation["nll"] - result["nll"]) < 1e-6


@pytest.mark.slow
def test_compare_puts_runs_side_by_side(session):
    done = otmdr_here(
        "compare", "runs/digits-cnn_small-sgd-seed0", "robust", cwd=session
    )  # fmt: skip
    assert "SGD" in done.stdout and "OT-MDR (K = 2)" in done.stdout
    page = (session / "comparison" / "report.md").read_text()
    assert "learning_curves.png" in page
    assert (session / "comparison" / "learning_curves.png").stat().st_size > 10_000
    # A report may be replaced, anything else may not.
    done = otmdr_here("compare", "robust", cwd=session, check=False)
    assert done.returncode == 2 and "--overwrite" in done.stderr
    otmdr_here("compare", "robust", "--overwrite", cwd=session)
    (session / "mine").mkdir()
    (session / "mine" / "notes.txt").write_text("precious")
    done = otmdr_here("compare", "robust", "--output", "mine", cwd=session, check=False)
    assert done.returncode == 2 and "mine" in done.stderr


@pytest.mark.slow
def test_configuration_files_go_in_and_out(session):
    done = otmdr_here(
        "train", "--config", "robust/config.json", "--seed", "5", "--output", "again",
        "--quiet", cwd=session,
    )  # fmt: skip
    assert "Run: again" in done.stdout
    again, robust = (
        config.load(session / n / "config.json") for n in ("again", "robust")
    )
    assert again == robust.replace(seed=5)


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.essential),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_says_how_to_resume_and_does(signum, tmp_path):
    args = [
        "train", "--method", "sgd", "--epochs", "3000", "--mesh", "data=1",
        "--output", "run", "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "otmdr_jax", *args],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, stderr
    assert "otmdr train --resume run" in stderr and "Traceback" not in stderr
    stopped_at = max(
        int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()
    )
    assert stopped_at >= json.loads(log.read_text().splitlines()[0])["step"]
    # The rest would take minutes: that it goes on from there is enough.
    process = subprocess.Popen(
        [sys.executable, "-m", "otmdr_jax", "train", "--resume", "run", "--quiet"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while time.time() < deadline + 120:
        last = json.loads(log.read_text().splitlines()[-1])["step"]
        if last > stopped_at + 11:
            break
        time.sleep(0.05)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, stderr
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] > stopped_at
    # What was interrupted can be evaluated, and then compared.
    otmdr_here("evaluate", "run", cwd=tmp_path)
    otmdr_here("compare", "run", cwd=tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'? There are train, "),
        (["train", "--preset", "paper"], "preset must be one of 'demo'"),
        (["train", "--preset", "papr-cifar10"], "Did you mean 'paper-cifar10' or"),
        (["train", "--method", "SAMM"], "Did you mean 'sam'"),
        (["train", "--method", "otmdr_bnn"], "Did you mean 'otmdr-bnn'"),
        (["train", "--config", "nowhere.json"], "nowhere.json"),
        (["train", "--config", "."], "must be a JSON file, and . is none"),
        (["train", "--config", __file__], "is no JSON file of options"),
        (["train", "--output", ""], "--output must name a folder"),
        (["train", "--output", f"{__file__}/run"], "Not a directory"),
        (["train", "--data", ".", "--output", "runs/a"], "into the folder of its data"),
        (["reproduce", "table1", "--scale", "small", "--datasets"], "at least one set"),
        (["train", "--steps", "2", "--epochs", "40"], "--steps and --epochs each say"),
        (["train", "--validation", "inf"], "or a whole number of examples, got inf"),
        (["train", "--augment", "flip", "flip"], "must be named once"),
        (["train", "--label-noise", "1e-9"], "is less than one of the 1437"),
        (["train", "--validation", "1e-9"], "is less than one of the 1437"),
        (["train", "--preset", "demo", "--config", "x"], "give one of them"),
        (["train", "--resume", "nowhere"], "no run folder"),
        (["train", "--model", "resnet_19"], "resnet_18"),
        (["train", "--data", "cifar11"], "cifar10"),
        (["train", "--method", "sam", "--noise-std", "0.1"], "sam has no option noise"),
        (
            ["train", "--num-particles", "2", "--split", "ordered"],
            "gives equal particles",
        ),
        (["train", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "--augment", "blur"], "got 'blur'"),
        (["train", "--validation", "2.5"], "or a whole number of examples, got 2.5"),
        (["train", "--validation", "1.0"], "1 would be a single example"),
        (["train", "--num-particles", "two"], "--num-particles"),
        (["train", "--preset", "demo", "--num_particles", "two"], "--num-particles"),
        (["train", "--base-method"], "no option base_method"),
        (["evaluate", "nowhere"], "no run folder"),
        (["compare", "nowhere"], "nowhere"),
        (["compare"], "at least one run"),
    ],
)
def test_bad_input_is_one_line_without_a_traceback(args, message, capsys, tmp_path):
    where = os.getcwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
    finally:
        os.chdir(where)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert "__main__" not in error and "usage: pytest" not in error
    assert not list(tmp_path.iterdir())  # refused before anything is written


@pytest.mark.slow
def test_a_home_folder_may_follow_an_equals_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        cli.main(["ensemble", "~/a", "b~/c", "--output=~/ens"])
    assert f"{tmp_path}/a is no run folder" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_a_command_without_a_word(tmp_path):
    """Its output is a pipe that nobody reads: head has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        [sys.executable, "-m", "otmdr_jax", "info"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert found.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in found.stderr and "BrokenPipe" not in found.stderr


def help_of(capsys, *args):
    with pytest.raises(SystemExit):
        cli.main([*args, "--help"])
    return capsys.readouterr().out


@pytest.mark.slow
def test_help_documents_every_option(capsys):
    for name, (kind, _) in cli.COMMANDS.items():
        text = help_of(capsys, name)
        for field in dataclasses.fields(kind):
            if (kind.__name__, field.name) != ("Train", "config_file"):
                assert field.name.replace("_", "-") in text.lower(), field.name
    assert "0.05 0.1" in otmdr("train", "--preset", "paper-cifar10", "--help").stdout


def flags_in(text):
    return set(re.findall(r"^\W? --([a-z0-9-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", methods.METHODS)
def test_help_shows_the_options_of_the_chosen_method(name, capsys):
    text = help_of(capsys, "train", "--method", name)
    for group in ("data", "model", "method", "optimizer", "schedule", "run"):
        assert f"{group} options" in text
    mine = methods.METHODS[name].all_options()
    shared = set(config.known_options()) - set(config.method_options())
    wanted = {option.replace("_", "-") for option in {*mine, *shared}}
    of_all = {option.replace("_", "-") for option in config.known_options()}
    assert flags_in(text) & of_all == wanted


def test_help_says_how_to_see_another_methods_options(capsys):
    text = " ".join(help_of(capsys, "train").replace("│", " ").split())
    assert "otmdr train --method NAME --help shows those of another one" in text
    base = ("train", "--method", "snapshot", "--base-method", "sam")
    assert "rho" in flags_in(help_of(capsys, *base))


def test_every_option_of_a_run_has_a_text():
    for kind in (*config.GROUPS.values(), *methods.METHODS.values()):
        for name, option in options.options_of(kind).items():
            assert option.text, (kind, name)


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_are_whole_configurations(name, tmp_path):
    preset = config.preset(name)
    config.save(preset, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == preset


@pytest.mark.parametrize(
    "name, base",
    [("deep-ensemble", "sgd"), ("sam-ensemble", "sam"), ("otmdr-ensemble", "otmdr")],
)
def test_ensembles_go_by_the_names_of_their_tables(name, base):
    five = config.TrainConfig(method=base, members="5")
    assert config.TrainConfig(method=name) == five == five.replace(method=name)
    of_three = config.TrainConfig(method=base, members="3", seed=7)
    assert config.TrainConfig(method=name, members="3", seed=7) == of_three
    with pytest.raises(ValueError, match="members must be a number of at least 2"):
        config.TrainConfig(method=name, members="1")


def test_presets_give_the_papers_and_the_released_codes_settings():
    paper, released = (
        config.preset(f"{version}-cifar10") for version in ("paper", "released")
    )
    for one in (paper, released):
        assert (one.run.epochs, one.run.batch_size, one.schedule.learning_rate) == (
            200,
            128,
            0.1,
        )
        assert (
            one.optimizer.momentum,
            one.optimizer.nesterov,
            one.optimizer.weight_decay,
        ) == (0.9, False, 5e-4)
        assert one.schedule.name == "cosine" and one.method.rho == (0.05, 0.1)
    assert paper.model.name == "wide_resnet_28_10" and paper.method.noise_std == 0.01
    assert (
        released.model.name == "wide_resnet_34_10" and released.method.noise_std == 0.0
    )
    assert (
        released.optimizer.label_smoothing == 0.1
        and released.optimizer.smoothing == "others"
    )
    assert released.method.merge == "sum" and released.method.sum_particles
    assert config.preset("paper-cifar100").method.rho == (0.1, 0.2)
    assert released.method.split == "ordered"
    assert config.preset("released-cifar10", num_particles=2).method.split == "random"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file"),
        ('{"epochs": 3, "epochs": 4}', "epochs stands in it twice"),
        ("\x9f", "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
        ("[1]", "must hold a JSON object"),
        ('{"lr": 0.1}', "unknown options lr"),
        ('{"epochs": "many"}', "epochs must be a number"),
    ],
)
def test_bad_configuration_files_are_refused(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        config.load(path)


def test_a_byte_order_mark_is_no_part_of_a_configuration(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"epochs": 3}', encoding="utf-8-sig")
    assert config.load(path).run.epochs == 3


def test_ctrl_c_is_one_line_wherever_it_comes(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", (cli.about.Info, interrupted))
    with pytest.raises(SystemExit) as stop:
        cli.main(["info"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "otmdr: stopped\n"


def test_a_ctrl_c_that_python_lost_stops_the_run():
    asked = []
    with interrupts.remembered():
        with contextlib.suppress(KeyboardInterrupt):  # as in a callback of an import
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert interrupts.came_early()
        with interrupts.requests(asked.append):
            assert asked == [signal.SIGINT]
        with interrupts.requests(asked.append):
            assert asked == [signal.SIGINT]  # once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_that_a_library_calls_an_error_is_still_one(monkeypatch, capsys):
    def interrupted(options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt as stop:
            raise ImportError("a package is broken") from stop

    monkeypatch.setitem(cli.COMMANDS, "info", (cli.about.Info, interrupted))
    with pytest.raises(SystemExit) as stop:
        cli.main(["info"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "otmdr: stopped\n"


def test_a_terminal_without_arrows_shows_the_table_all_the_same(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setitem(
        cli.COMMANDS, "info", (cli.about.Info, lambda _: print("NLL \u2193 0.5"))
    )
    cli.main(["info"])
    assert written.getvalue() == b"NLL ? 0.5\n"


def test_steps_on_the_command_line_take_the_place_of_a_presets_epochs():
    _, found = cli.train.parse(["--preset", "sam-cifar10", "--steps", "3"])
    found.check_used()
    assert found.run.steps == 3
    own = config.preset("sam-cifar10").replace(steps=3)
    own.check_used()
    assert own.replace(epochs=2).run.steps is None
    with pytest.raises(ValueError, match="steps=3 and epochs=2 each say how long"):
        config.TrainConfig(steps=3, epochs=2).check_used()


def test_a_help_says_what_a_text_is(capsys):
    for name in cli.COMMANDS:
        text = help_of(capsys, name) if name != "info" else ""
        assert not re.search(r"\bSTR\b", text), name


OLD = json.loads(
    (pathlib.Path(__file__).parent / "config_of_older_versions.json").read_text()
)


@pytest.mark.parametrize("name", methods.METHODS)
def test_files_of_older_versions_are_read(name, tmp_path):
    """They held the options of all methods, null where a method had its own default."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**OLD, "method": name, "augment": ["flip"]}))
    assert config.load(path) == config.TrainConfig(method=name, augment=("flip",))
    idle = {"nesterov": True} if not methods.METHODS[name].has_own_update else {}
    path.write_text(json.dumps({**OLD, "method": name, "optimizer": "adam"} | idle))
    if idle:  # of a run that there is
        assert config.load(path).optimizer.nesterov
        with pytest.raises(ValueError, match="nesterov=True does nothing"):
            config.load(path).check_used()
    path.write_text(json.dumps({**OLD, "method": "sgd", "density": 0.3}))
    with pytest.raises(ValueError, match="sgd has no option density"):
        config.load(path)


class TestOptions:
    def test_they_are_given_flat_and_read_by_group(self):
        made = config.TrainConfig(
            data="cifar10", model="resnet_18", method="snapshot", base_method="sam",
            rho=(0.2,), cycles=3, epochs=7, learning_rate=0.3, momentum=0.5,
        )  # fmt: skip
        assert (made.data.name, made.model.name) == ("cifar10", "resnet_18")
        assert (made.method.name, made.method.cycles) == ("snapshot", 3)
        assert (made.method.base.name, made.method.base.rho) == ("sam", (0.2,))
        assert (made.run.epochs, made.schedule.learning_rate) == (7, 0.3)
        assert made.optimizer.momentum == 0.5
        assert config.TrainConfig(**made.flat()) == made == made.replace()
        assert hash(made) == hash(config.TrainConfig(**made.flat()))
        assert made.replace(cycles=None, rho=None, seed=1).flat() == (
            made.flat() | {"cycles": 5, "rho": (0.05,), "seed": 1}
        )

    def test_a_method_takes_what_it_has_along(self):
        sam = config.TrainConfig(method="sam", rho=(0.2,), num_subbatches=2)
        assert sam.replace(method="asam").method.rho == (0.2,)
        with pytest.raises(ValueError, match="sgd has no option rho, num_subbatches"):
            sam.replace(method="sgd")
        plain = sam.replace(method="sgd", rho=None, num_subbatches=None)
        assert plain == config.TrainConfig(method="sgd")

    def test_they_may_be_of_numpy_and_paths(self, tmp_path):
        found = config.TrainConfig(
            seed=np.arange(3)[2],
            rho=np.float32([0.25, 0.5]),
            learning_rate=np.float64(0.1),
            data=tmp_path / "mine.npz",
            augment="flip",
            members=2,
        )
        assert found.method.rho == (0.25, 0.5) and found.run.seed == 2
        assert found.data.augment == ("flip",) and found.model.members == "2"
        config.save(found, tmp_path / "config.json")
        assert config.load(tmp_path / "config.json") == found

    def test_a_model_is_a_name(self):
        for model in (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Linear):
            with pytest.raises(
                ValueError, match=r"name of a network.*got a \w+\. Give one of"
            ):
                config.TrainConfig(model=model)

    def test_unknown_ones_are_refused(self):
        with pytest.raises(TypeError, match="unknown options lr"):
            config.TrainConfig(lr=0.1)
        with pytest.raises(TypeError, match="did you mean learning_rate"):
            config.TrainConfig().replace(learning_rat=0.1)
        with pytest.raises(ValueError, match="method must be one of sgd, sam"):
            config.TrainConfig(method="slam")

    def test_dataclasses_replace_is_refused(self):
        with pytest.raises(TypeError, match=r"config.replace\(epochs=3\)"):
            dataclasses.replace(config.TrainConfig(), epochs=3)


def test_info_lists_versions_and_devices():
    text = otmdr("info").stdout
    for word in ("otmdr_jax", "backend cpu", "flax", "orbax-checkpoint"):
        assert word in text


def test_types_of_options_are_ones_that_the_command_line_can_parse():
    simple = (int, float, str, bool, type(None))
    for name, kind in config.known_options().items():
        union = typing.get_origin(kind) in (types.UnionType, typing.Union)
        parts = typing.get_args(kind) if union else (kind,)
        for part in parts:
            origin = typing.get_origin(part)
            assert part in simple or origin in (typing.Literal, tuple), name
