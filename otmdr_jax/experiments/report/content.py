"""What stands on a report's pages, from the runs and what their folders hold."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from otmdr_jax import metrics
from otmdr_jax.experiments import programs
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.report import (
    cost,
    examples,
    measured,
    plots,
    posterior,
    predictions,
    records,
    significance,
    tables,
)
from otmdr_jax.experiments.report.document import Document, Picture, Section, missing
from otmdr_jax.experiments.report.reading import (
    Run,
    beyond_the_seed,
    by_label,
    differing,
    text_of,
)
from otmdr_jax.metrics import intervals

Part = str | Picture


def comparison(title: str, runs: Sequence[Run], versions: str) -> Document:
    """The short page: table, learning curves, reliability, configuration.

    Args:
      title: The page's heading.
      runs: The runs.
      versions: Of the packages, in words.
    """
    sections = [
        _overview(runs),
        _curves(runs),
        _reliability(runs),
        _posterior(runs),
        _configuration(runs),
        _versions(versions),
    ]
    return Document(title, tuple(s for s in sections if s is not None))


def everything(
    title: str,
    runs: Sequence[Run],
    versions: str,
    baseline: str | None = None,
    costs: Sequence[dict[str, Any]] | None = None,
) -> Document:
    """The whole page: all that is known of the runs; what is missing is named.

    Args:
      title: The page's heading.
      runs: The runs.
      versions: Of the packages, in words.
      baseline: The label that others are compared with. Default: the first one.
      costs: Rows of a sweep, if the runs are one's.

    Raises:
      ValueError: No such label; a record in a run's folder that cannot be read.
    """
    baseline = next(iter(by_label(runs))) if baseline is None else baseline
    sections = [
        _overview(runs),
        _significance(runs, baseline),
        _cost(costs, baseline),
        _curves(runs),
        _reliability(runs),
        _all_metrics(runs),
        measured.calibration_section(runs),
        _confusion(runs),
        _risk(runs),
        measured.shift_section(runs),
        measured.sharpness_section(runs),
        measured.landscape_section(runs),
        _posterior(runs),
        *_examples(runs),
        _configuration(runs),
        _versions(versions),
    ]
    return Document(title, tuple(s for s in sections if s is not None))


def _drawn(name: str, alt: str, figure: Callable[..., Any], what: Any) -> Picture:
    """A picture that a `*_figure` function of the runs, or of their rows, draws."""
    return Picture(name, alt, lambda narrow: figure(what, narrow=narrow))


def _overview(runs):
    rows = tables.summarise(runs, tables.known_columns(runs))
    meanings = [
        f"- **{column.title.split(' (')[0].rstrip(' ↑↓')}**: {column.meaning}."
        for column, *_ in rows[0].cells.values()
    ]
    return Section(
        "",
        (
            tables.markdown_table(rows),
            "Mean ± sample standard deviation (ddof = 1) over n runs; the best mean of "
            'a column in bold; "-" where nothing is known; ↑ higher is better, ↓ lower '
            "is better. The numbers of each run are in `results.json`.",
            *_cautions(runs),
            "\n".join(meanings),
        ),
    )


def _cautions(runs: Sequence[Run]) -> list[str]:
    """What makes a mean over a label's runs worth less than it looks."""
    cautions = []
    for label, group in by_label(runs).items():
        options = beyond_the_seed(group)
        if options:
            cautions.append(
                f"**Note:** the runs of {label} differ in more than the seed: "
                f"{', '.join(options)}."
            )
        seeds = [run.config["seed"] for run in group if "seed" in run.config]
        if not options and len(set(seeds)) < len(seeds):
            cautions.append(f"**Note:** runs of {label} share a seed.")
    return cautions


def _significance(runs, baseline):
    found = significance.compare(runs, baseline)
    if not found:
        return Section("Significance", (missing("no run has finite predictions."),))
    parts: list[Part] = [
        records.markdown(significance.table(found)),
        "Means over a method's runs with their 95 % intervals by the bootstrap over "
        f"{_num_examples(runs, baseline)} test examples ({intervals.NUM_SAMPLES} "
        f"draws), and Δ, the difference from {baseline}, with its interval and the "
        "p-value of a paired randomisation test over examples; in bold below 0.05. "
        "This is about the choice of test examples; how much seeds matter is the "
        "standard deviation above.",
    ]
    compared = {row.label for row in found if row.against}
    left_out = [x for x in by_label(runs) if x not in compared and x != baseline]
    if left_out:
        parts.append(
            missing(
                f"{', '.join(left_out)}: their test sets are not {baseline}'s, or they "
                "diverged, so that they cannot be compared example by example."
            )
        )
    return Section("Significance", tuple(parts))


def _num_examples(runs, baseline):
    """Of the baseline's test set, or of the first run's where it diverged."""
    pooled = plots.pool(by_label(runs)[baseline])
    return len((pooled or runs)[0].labels)


def _cost(rows, baseline):
    if rows is None:
        return None
    return Section(
        "Cost and seeds",
        (
            _drawn("cost", "Accuracy against gradient evaluations", cost.figure, rows),
            records.markdown(cost.table(rows)),
            "Means over a method's runs. A gradient is one of a whole batch; a pass "
            "over a part of it counts as that part. Memory is the compiler's account "
            "of a training step, data included.",
            records.markdown(cost.paired_table(rows, baseline)),
            f"Differences from {baseline} over the seeds that both have: the mean, and "
            "the p-value of Student's paired t-test over seeds.",
        ),
    )


def _curves(runs):
    return Section(
        "Learning curves",
        (
            _drawn(
                "learning_curves", "Learning curves", plots.learning_curves_figure, runs
            ),
            "One colour for each method: thin lines are runs, thick ones their mean. "
            "The training loss is what a method minimises: for SAM, ASAM and OT-MDR "
            "the loss at the perturbed weights, for Bayesian networks with the "
            "divergence from the prior.",
        ),
    )


def _reliability(runs):
    return Section(
        "Reliability",
        (
            _drawn(
                "reliability", "Reliability diagrams", plots.reliability_figure, runs
            ),
            f"Accuracy within {metrics.NUM_BINS} bins of confidence over the pooled "
            "test predictions of a method's runs, and the share of predictions in each "
            "bin. ECE above a panel is that of the pooled predictions; the table's is "
            "the mean over runs.",
        ),
    )


def _all_metrics(runs):
    return Section(
        "All metrics",
        (
            records.markdown(significance.summary_table(runs)),
            "Means over a method's runs, each over the whole test set in float64; the "
            "definitions are those of `otmdr_jax.metrics`.",
            _drawn(
                "confidence",
                "Histograms of the confidence of right and wrong predictions",
                predictions.confidence_figure,
                runs,
            ),
            "How often each confidence was given, to predictions that are right and to "
            "those that are wrong.",
        ),
    )


def _confusion(runs):
    return Section(
        "Confusion",
        (
            _drawn(
                "confusion", "Confusion matrices", predictions.confusion_figure, runs
            ),
            "Of the test examples of a class (row), the share that is predicted as "
            "each class (column), over a method's pooled runs. The colour scale is a "
            "root scale, so that errors are seen.",
        ),
    )


def _risk(runs):
    return Section(
        "Risk and coverage",
        (
            _drawn(
                "risk_coverage",
                "Risk-coverage curves",
                predictions.risk_coverage_figure,
                runs,
            ),
            "The error among the surest predictions, against how many of them are "
            "kept: lower is better, and the right end is the error of all. AURC is the "
            "area under it.",
        ),
    )


def _posterior(runs):
    if not posterior.bayesian(runs):
        return None
    return Section(
        "Posterior",
        (
            _drawn(
                "signal_to_noise",
                "Signal-to-noise ratios of the weights",
                posterior.signal_to_noise_figure,
                runs,
            ),
            "How large a weight's mean is beside its standard deviation: at 0 dB they "
            "are equal. Weights far to the left say nothing; the posterior of those "
            "far to the right is nearly a point.",
        ),
    )


def _examples(runs):
    """Images of the first run of each label that has its data at hand."""
    worst: list[Part] = []
    uncertain: list[Part] = []
    for i, group in enumerate(by_label(runs).values()):
        run = next(iter(plots.pool(group)), None)
        if run is None:
            gone = f"{group[0].label}: its predictions are not finite."
            worst.append(missing(gone))
            uncertain.append(missing(gone))
            continue
        images = _test_images(run, measured.name_of(run, runs))
        if isinstance(images, str):
            worst.append(missing(images))
            uncertain.append(missing(images))
            continue
        for parts, kind, choose in (
            (worst, "worst", examples.worst),
            (uncertain, "uncertain", examples.most_uncertain),
        ):
            draw = functools.partial(_draw_examples, images, choose(run))
            alt = f"{kind.capitalize()} examples of {run.label}"
            parts += [
                f"### {measured.name_of(run, runs)}",
                Picture(f"{kind}_{i}", alt, draw),
            ]
    return (
        Section(
            "Worst examples",
            (
                *worst,
                "The test images whose label was found least probable: label → "
                "prediction, and the prediction's confidence.",
            ),
        ),
        Section(
            "Most uncertain examples",
            (
                *uncertain,
                "The test images with the largest entropy of the prediction: label → "
                "prediction, or = where it is right, and its confidence.",
            ),
        ),
    )


def _draw_examples(images, chosen, narrow):
    return examples.examples_figure(images, chosen, narrow=narrow)


def _test_images(run: Run, name: str) -> Any:
    """A run's test images, or why they cannot be had."""
    options = {n: v for n, v in run.config.items() if n in _DATA and v is not None}
    if "data" not in options:
        return f"{name}: its configuration names no data."
    try:
        dataset = _load(TrainConfig(**{n: _hashable(v) for n, v in options.items()}))
    except (ValueError, TypeError, OSError, ImportError) as error:
        return f"{name}: its images cannot be read: {error}"
    if list(dataset.test.labels) != list(run.labels):
        return f"{name}: the data at hand are not those of its test set."
    return dataset.test.images


# Options of a run that say which test images are its own, and where.
_DATA = ("data", "data_dir", "cache_dir")


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


@functools.lru_cache(maxsize=2)
def _load(config):
    return programs.load_data(config)


def _configuration(runs: Sequence[Run]) -> Section:
    # Words in a result (a device, say) are no option, but as good to know.
    settings = [
        {**{k: v for k, v in run.result.items() if isinstance(v, str)}, **run.config}
        for run in runs
    ]
    unlike = differing(settings)
    common = [
        [f"`{name}`", f"`{text_of(settings[0], name)}`"]
        for name in settings[0]
        if name not in unlike
    ]
    parts: list[Part] = []
    if common:
        parts += ["All runs share:", records.markdown((["option", "value"], common))]
    lines = [
        [run.label, run.folder.name if run.folder else "-"]
        + [f"`{text_of(setting, name)}`" for name in unlike]
        for run, setting in zip(runs, settings, strict=True)
    ]
    header = ["method", "run", *(f"`{name}`" for name in unlike)]
    parts += ["Each run:", records.markdown((header, lines))]
    return Section("Configuration", tuple(parts))


def _versions(versions: str) -> Section:
    return Section("Versions", (f"When this report was written: {versions}.",))
