"""A report as a folder: a page to read, pictures, and every number behind them."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from otmdr_jax import __version__, metrics
from otmdr_jax.report import plots, posterior, tables
from otmdr_jax.report.reading import (
    Run,
    beyond_the_seed,
    by_label,
    differing,
    text_of,
)

# A results.json with this key marks a folder as a report. Its value is the version of
# the files' layout.
MARKER = "otmdr_report"
_LAYOUT = 1
SIGNAL_TO_NOISE = "signal_to_noise.png"
_POSTERIOR = (
    "## Posterior",
    f"![Signal-to-noise ratios of the weights]({SIGNAL_TO_NOISE})",
    "How large a weight's mean is beside its standard deviation: at 0 dB they are "
    "equal. Weights far to the left say nothing; the posterior of those far to the "
    "right is nearly a point.",
)
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def write(
    folder: str | pathlib.Path,
    runs: Iterable[Run],
    title: str,
    command: str | None = None,
) -> pathlib.Path:
    """Writes a report on runs, or replaces an earlier one.

    The files are report.md (table, pictures, what the runs share and where they
    differ), results.json (all rows and results), configs.json (each run's exact
    options), learning_curves.png, reliability.png and, for Bayesian networks,
    signal_to_noise.png. Nothing is written if anything
    is wrong with the runs.

    Args:
      folder: A new or empty folder, or one of an earlier report: that report's files
        are replaced, other files are kept.
      runs: The runs.
      title: The page's heading.
      command: What made the report, for the page.

    Returns:
      The path of report.md.

    Raises:
      FileExistsError: The folder holds something that is no report.
      ImportError: matplotlib is not installed.
      ValueError: No runs, or a run given twice.
    """
    folder, runs = pathlib.Path(folder), list(runs)
    check_folder(folder)
    _check_distinct(runs)
    rows = tables.summarise(runs, tables.known_columns(runs))
    figures = {
        "learning_curves.png": plots.learning_curves_figure(runs),
        "reliability.png": plots.reliability_figure(runs),
    }
    if posterior.bayesian(runs):
        figures[SIGNAL_TO_NOISE] = posterior.signal_to_noise_figure(runs)
    texts = {
        # The marker comes first: a report that was cut off can be written again.
        "results.json": _json(_results(title, rows, runs)),
        "configs.json": _json([{**_name(run), "config": run.config} for run in runs]),
        "report.md": _page(title, command, rows, runs),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        scratch = folder / f"{name}.tmp"
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, folder / name)
    for name, figure in figures.items():
        plots.save(figure, folder / name)
    return folder / "report.md"


def check_folder(folder: str | pathlib.Path) -> None:
    """Checks that a report may be written here, before the work for it is done.

    Args:
      folder: Where :func:`write` shall write.

    Raises:
      FileExistsError: The folder holds something that is no report.
    """
    folder = pathlib.Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or MARKER not in content:
        what = "is not empty and holds no report" if folder.is_dir() else "is a file"
        raise FileExistsError(
            f"{folder} {what} (no results.json with the key {MARKER!r}). Nothing was "
            "written: name a new folder, or empty this one."
        )


def _check_distinct(runs: Sequence[Run]) -> None:
    seen = set()
    for run in runs:
        if run.folder is None:
            continue
        path = pathlib.Path(run.folder).resolve()
        if path in seen:
            raise ValueError(
                f"{run.folder} was given twice: a run counts once in a mean."
            )
        seen.add(path)


def _results(title: str, rows: Sequence[tables.Row], runs: Sequence[Run]) -> dict:
    return {
        MARKER: _LAYOUT,
        "title": title,
        "versions": _versions(),
        "rows": [
            {
                "label": row.label,
                "n": row.n,
                **{
                    name: {"mean": cell.mean, "std": cell.std, "n": cell.n}
                    for name, cell in row.cells.items()
                },
            }
            for row in rows
        ],
        "runs": [{**_name(run), "result": run.result} for run in runs],
    }


def _name(run: Run) -> dict[str, Any]:
    if run.folder is None:
        return {"label": run.label, "folder": None}
    # An absolute path means nothing on another machine.
    path = pathlib.Path(run.folder)
    return {
        "label": run.label,
        "folder": path.name if path.is_absolute() else path.as_posix(),
    }


def _page(
    title: str, command: str | None, rows: Sequence[tables.Row], runs: Sequence[Run]
) -> str:
    meanings = [
        f"- **{column.title.split(' (')[0].rstrip(' ↑↓')}**: {column.meaning}."
        for column, *_ in rows[0].cells.values()
    ]
    parts = [
        f"# {title}",
        tables.markdown_table(rows),
        "Mean ± sample standard deviation (ddof = 1) over n runs; the best mean of a "
        'column in bold; "-" where nothing is known; ↑ higher is better, ↓ lower is '
        "better. The numbers of each run are in `results.json`.",
        *_cautions(runs),
        "\n".join(meanings),
        "## Learning curves",
        "![Learning curves](learning_curves.png)",
        "One colour for each method: thin lines are runs, thick ones their mean. The "
        "training loss is what a method minimises: for SAM, ASAM and OT-MDR the loss "
        "at the perturbed weights, for Bayesian networks with the divergence from the "
        "prior.",
        "## Reliability",
        "![Reliability diagrams](reliability.png)",
        f"Accuracy within {metrics.NUM_BINS} bins of confidence over the pooled test "
        "predictions of a method's runs, and the share of predictions in each bin. ECE "
        "above a panel is that of the pooled predictions; the table's is the mean over "
        "runs.",
        *(_POSTERIOR if posterior.bayesian(runs) else ()),
        "## Configuration",
        *_configuration(runs),
        "## Versions",
        "When this report was written: "
        + ", ".join(f"{name} {version}" for name, version in _versions().items())
        + ".",
    ]
    if command:
        parts += ["## Command", f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


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


def _configuration(runs: Sequence[Run]) -> list[str]:
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
    parts = ["All runs share:", _table(["option", "value"], common)] if common else []
    lines = [
        [run.label, run.folder.name if run.folder else "-"]
        + [f"`{text_of(setting, name)}`" for name in unlike]
        for run, setting in zip(runs, settings, strict=True)
    ]
    header = ["method", "run", *(f"`{name}`" for name in unlike)]
    return [*parts, "Each run:", _table(header, lines)]


def _table(header: list[str], lines: list[list[str]]) -> str:
    grid = [header, [":--"] * len(header), *lines]
    return "\n".join(
        f"| {' | '.join(tables.markdown_cell(text) for text in line)} |"
        for line in grid
    )


def _versions() -> dict[str, str]:
    versions = {"otmdr_jax": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _json(value: Any) -> str:
    return json.dumps(_strict(value), indent=2, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON's values alone: null for what is no number, lists for tuples."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str)) else _other(value)


def _other(value: Any) -> Any:
    return None if value is None else str(value)
