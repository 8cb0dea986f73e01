"""`otmdr evaluate`: metrics of a run at one of its checkpoints."""

import dataclasses
from typing import Any, Literal

import tyro

from otmdr_jax.experiments.cli.common import Checkpoint, DataPath, RunPath, print_tables
from otmdr_jax.experiments.methods.sampled import Sampled


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run: print a table, write evaluation.json and reliability.png.

    For a Bayesian network it also writes signal_to_noise.png.

    For an interrupted run it also writes result.json, so that the run can be compared
    with others.

    For another split, checkpoint or prediction than the run's own, the names of the
    files say so: evaluation_validation.json, evaluation_best.json or
    evaluation_mean.json.
    """

    run: tyro.conf.Positional[RunPath]
    """Folder of the run."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the data to evaluate on."""
    checkpoint: Checkpoint = "latest"
    """Checkpoint: latest, best (on the validation set), or a step."""
    data_dir: DataPath = None
    """Folder of prepared TFDS data, or an .npz file or its folder, if they have moved
    since the run."""
    num_samples: int | None = None
    """Number of samples that a posterior, SWAG, MC dropout or a Laplace approximation
    predicts with. Default: the run's own."""
    prediction: Literal["samples", "mean"] | None = None
    """Predict with the mean over samples, or with the mean weights alone. Default: the
    run's own."""
    laplace: Literal["last-layer", "last-layer-kron", "diagonal"] | None = None
    """Fit a Laplace approximation to a run of sgd, sam, asam or otmdr, without
    training. Writes evaluation_laplace_<which>.json and
    reliability_laplace_<which>.png."""
    prior_precision: float | None = None
    """Precision of the Laplace prior. Default: the one of highest marginal
    likelihood."""
    laplace_examples: int | None = None
    """Number of training images for the Laplace fit. Default: all."""
    overwrite: bool = False
    """Replace a record of other settings."""


def run(options: Evaluate) -> None:
    """`otmdr evaluate RUN`."""
    from otmdr_jax.experiments import report, restore, run_folder
    from otmdr_jax.experiments.measure import evaluation
    from otmdr_jax.experiments.measure.record import record_of
    from otmdr_jax.experiments.members import steps_taken

    given = {
        name: getattr(options, name)
        for name in ("data_dir", "num_samples", "prediction")
        if getattr(options, name) is not None
    }
    if given.get("prediction") == "mean":
        # The run's options of samples have no meaning for a prediction with the mean.
        names = ("num_samples", "laplace", "prior_precision", "laplace_examples")
        given = dict.fromkeys(names) | given
    if options.laplace is not None:
        if options.prediction == "mean":
            raise ValueError(
                "--laplace with --prediction mean predicts just as the run itself: "
                "leave one of them out."
            )
        given |= restore.with_laplace(
            options.run,
            options.laplace,
            options.prior_precision,
            options.laplace_examples,
        )
    elif options.prior_precision is not None or options.laplace_examples is not None:
        raise ValueError(
            "--prior-precision and --laplace-examples are options of --laplace: give "
            "--laplace too."
        )
    run_folder.check_classes(options.run, "otmdr evaluate")
    opened = restore.open_run(
        options.run,
        options.checkpoint,
        split=options.split,
        predicts=options.laplace is None,  # a Laplace approximation is fitted below
        **given,
    )
    folder, config, dataset = opened.folder, opened.config, opened.dataset
    compiled, state = opened.programs, opened.state
    settings: dict[str, Any] = {
        "split": options.split,
        "checkpoint": options.checkpoint,
    }
    own = ("prediction", "num_samples", "prior_precision", "laplace_examples")
    settings |= {x: getattr(config.method, x) for x in own if hasattr(config.method, x)}
    if options.laplace is not None:
        settings |= {"laplace": options.laplace, "step": steps_taken(state)}
    suffix = _suffix(options, config, run_folder.read_config(folder))
    record, picture, ratios = (
        folder / f"{name}{suffix}.{kind}"
        for name, kind in (
            ("evaluation", "json"),
            ("reliability", "png"),
            ("signal_to_noise", "png"),
        )
    )
    run_folder.check_record(record, settings, options.overwrite)
    of_run = evaluation.evaluate_run(
        config,
        state,
        dataset,
        compiled,
        splits=(options.split,),
        without=opened.diverged,
        show_progress=True,
    )
    found = of_run.splits[options.split]
    result = {
        "split": options.split,
        "checkpoint": options.checkpoint,
        **record_of(config, of_run, dataset, compiled, options.split),
        "seconds_per_step": None,
    }
    how = ""
    if isinstance(method := config.method, Sampled):
        samples = method.prediction == "samples"
        how = f", {method.num_samples} samples" if samples else ", mean"
        result["prediction"] = method.prediction
        result["num_samples"] = method.num_samples if samples else None
    if "prior_precision" in result:
        how += (
            f", prior precision {result['prior_precision']:.3g}, "
            f"{result['effective_parameters']:.4g} effective parameters"
        )
    labels = getattr(dataset, options.split).labels
    run_folder.write_record(record, result, settings, options.overwrite)
    result["settings"] = settings
    predicted = found.log_probs, labels, found.member_log_probs
    if not suffix and not run_folder.is_finished(folder):
        # This is the run's result until the run is resumed and finished.
        run_folder.write_result(folder, result, *predicted)
    elif not suffix and not (folder / "predictions.npz").exists():
        run_folder.write_predictions(folder, *predicted)  # the result stays the run's
    label = report.label_of(config.flat())
    run = report.Run(folder, label, config.flat(), result, [], found.log_probs, labels)
    title = f"{folder}, step {result['steps']}, {options.split} set{how}"
    print_tables(run, title)
    written = [record, picture]
    report.plot_reliability([run], picture)
    if of_run.posterior:
        written.append(ratios)
        report.plot_signal_to_noise([run], ratios)
    print(f"Written: {', '.join(map(str, written))}")


def _suffix(options: Evaluate, config: Any, own: Any) -> str:
    """Returns the part of file names that tells an evaluation from the run's own.

    Args:
      options: Options of the command.
      config: Configuration of the evaluation.
      own: Configuration of the run.
    """
    parts: list[str] = [] if options.split == "test" else [options.split]
    if options.checkpoint != "latest":
        step = "step_" * options.checkpoint.isdigit()
        parts.append(step + options.checkpoint)
    if options.laplace is not None:
        parts.append(f"laplace_{options.laplace.replace('-', '_')}")
    elif isinstance(own.method, Sampled):
        if config.method.prediction != own.method.prediction:
            parts.append(config.method.prediction)
        if options.num_samples not in (None, own.method.num_samples):
            parts.append(f"{options.num_samples}_samples")
    return "".join(f"_{part}" for part in parts)
