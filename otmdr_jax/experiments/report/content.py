"""What the template of a page asks of the runs, beside their tables and pictures."""

from collections.abc import Sequence
from typing import Any

from otmdr_jax.experiments.report import plots
from otmdr_jax.experiments.report.reading import (
    Run,
    beyond_the_seed,
    by_label,
    differing,
    text_of,
)
from otmdr_jax.experiments.report.significance import Tested
from otmdr_jax.experiments.report.tables import Table


def cautions(runs: Sequence[Run]) -> list[str]:
    """What makes a mean over a label's runs worth less than it looks."""
    found = []
    for label, group in by_label(runs).items():
        options = beyond_the_seed(group)
        if options:
            found.append(
                f"the runs of {label} differ in more than the seed: "
                f"{', '.join(options)}."
            )
        seeds = [run.config["seed"] for run in group if "seed" in run.config]
        if not options and len(set(seeds)) < len(seeds):
            found.append(f"runs of {label} share a seed.")
    return found


def num_examples(runs: Sequence[Run], baseline: str) -> int:
    """The size of the baseline's test set, or of the first run's where it diverged."""
    pooled = plots.pool(by_label(runs)[baseline])
    return len((pooled or runs)[0].labels)


def not_compared(
    runs: Sequence[Run], tested: Sequence[Tested], baseline: str
) -> list[str]:
    """The labels that could not be compared with the baseline."""
    compared = {row.label for row in tested if row.against} | {baseline}
    return [label for label in by_label(runs) if label not in compared]


def counts(records: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The numbers of examples that records are of, in words."""
    known = sorted({record["num_examples"] for _, record in records})
    return " or ".join(map(str, known))


def configuration(runs: Sequence[Run]) -> tuple[Table, Table]:
    """The options that all runs share, and those of each run."""
    # Words in a result (a device, say) are no option, but as good to know.
    settings = [
        {**{k: v for k, v in run.result.items() if isinstance(v, str)}, **run.config}
        for run in runs
    ]
    unlike = differing(settings)
    shared = [
        [f"`{name}`", f"`{text_of(settings[0], name)}`"]
        for name in settings[0]
        if name not in unlike
    ]
    each = [
        [run.label, run.folder.name if run.folder else "-"]
        + [f"`{text_of(setting, name)}`" for name in unlike]
        for run, setting in zip(runs, settings, strict=True)
    ]
    header = ["method", "run", *(f"`{name}`" for name in unlike)]
    return Table(["option", "value"], shared), Table(header, each)
