r"""docs/miniature.md: the paper's tables and figures in miniature.

    for target in table1 table2 table3 table4 figure1 figure2; do   # two cores: a day
        otmdr reproduce $target --scale small --datasets cifar10 --data-dir ~/tfds \
            --jobs 2
    done
    otmdr reproduce table5 --scale small --data-dir ~/tfds
    python benchmarks/reproduction.py --collect reproduction/small-paper

--collect takes the records and pictures of the folder's targets, but for those that
have no finished runs, or fewer than the record that is there. Without it the page is
written from the records.
"""

import argparse
import json
import pathlib
import re
import shutil

from _common import environment
from _record import markdown

from otmdr_jax.experiments import reproduce
from otmdr_jax.experiments.reproduce import claims, tables
from otmdr_jax.io import files

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "reproduction"
PAGE = ROOT / "docs" / "miniature.md"
PICTURES = ROOT / "docs" / "miniature"
INTRODUCTION = """# The paper's tables in miniature

What `otmdr reproduce --scale small` gives for CIFAR-10: networks of the same families
at small width, 5,000 training and 2,000 test images, a tenth of the paper's epochs
(of ensembles a twentieth), three seeds ([what that is, and
why](reproduction.md#scales)). Each claim of the paper is tested over these seeds:
*holds* and *reversed* are differences that a paired t-test decides at 5 %. Three
seeds decide large differences only, so *not decided* is no refutation. Where the
paper's own row is no better in print, it makes no claim, and the page says so.
[Where the gain comes from](comparison.md) has five seeds and tuned radii.

`benchmarks/reproduction.py` writes this page from the records in
`benchmarks/results/reproduction/`.

Runs of Table 5 had the machine to themselves. Seconds a run of the other tables were
taken beside other work, and a run of PyramidNet by each method was also paused for an
hour: they are no measure of a method.
"""


def records():
    """The committed records, in the paper's order."""
    paths = [RECORDS / f"{target}.json" for target in reproduce.TARGETS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def collect(folder):
    """Takes what a folder of `otmdr reproduce` has; other records stay."""
    for target in reproduce.TARGETS:
        source = pathlib.Path(folder) / f"{target}.json"
        if not source.exists():
            continue
        record = json.loads(source.read_text())
        what = [record[name] for name in ("target", "scale", "variant")]
        if what[1:] != ["small", "paper"]:
            raise SystemExit(f"{source} is {' '.join(what)}, and the page small paper.")
        known = RECORDS / source.name
        before = runs_of(json.loads(known.read_text())) if known.exists() else 0
        if runs_of(record) < max(before, 1):
            print(f"{target}: {runs_of(record)} runs, and the record has {before}.")
            continue
        # With the tests and words of today, and before anything is replaced.
        record = tables.record(*what, tables.read(record))
        record |= {"collected": environment(), "pictures": []}
        for name in re.findall(
            r"\]\(([\w-]+\.png)\)", source.with_suffix(".md").read_text()
        ):
            PICTURES.mkdir(exist_ok=True)
            shutil.copy(source.parent / name, PICTURES / name)
            record["pictures"].append(name)
        RECORDS.mkdir(parents=True, exist_ok=True)
        files.write_json(known, record)


def runs_of(record):
    return sum(len(cell["seeds"]) for cell in record["cells"])


def summary(found):
    """How many claims of each target hold."""
    verdicts = ("holds", "reversed", "not decided", "not tested")
    lines = []
    for record in found:
        target = record["target"]
        tested = claims.tested(target, tables.read(record))
        of_paper = [one for one in tested if one.is_claimed]
        counts = [sum(one.verdict == v for one in of_paper) for v in verdicts]
        sure = sum(one.q < claims.LEVEL for one in of_paper if one.verdict == "holds")
        behind = [one for one in tested if one.claimed is not None]
        behind = [one for one in behind if not one.is_claimed]
        better = sum(one.verdict.endswith("better here") for one in behind)
        title = reproduce.TARGETS[target].title
        link = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        row = [f"[{title}](#{link})", runs_of(record), len(of_paper), *counts, sure]
        lines.append([*row, len(behind), better])
    header = ["", "runs", "claims", *verdicts, "hold with q < 0.05"]
    header += ["no better in print", "of these better here"]
    return markdown(header, lines)


def section(record):
    """The page of a target, a level lower."""
    target, scale, variant = (record[k] for k in ("target", "scale", "variant"))
    words = ["otmdr", "reproduce", target, "--scale", scale, "--data-dir", "~/tfds"]
    words += ["--variant", variant] * (variant != "paper")
    if target != "table5":
        data = dict.fromkeys(cell["data"] for cell in record["cells"])
        words += ["--datasets", *data, "--jobs", "2"]
    command = " ".join(words)
    page = tables.page(target, scale, variant, tables.read(record), command)
    text = re.sub(r"^## ", "### ", page.text, flags=re.M)
    for name in record["pictures"]:
        if f"]({name})" not in text:  # a landscape, of which the record has no numbers
            text += f"\n![{name.removesuffix('.png').replace('-', ' ')}]({name})\n"
        text = text.replace(f"]({name})", f"](miniature/{name})")
    return f"## {page.title}\n\n{text}"


def missing(found):
    known = {record["target"] for record in found}
    names = [name for name in reproduce.TARGETS if name not in known]
    return f"\nNot made yet: {', '.join(names)}.\n" if names else ""


def page(found):
    parts = [INTRODUCTION, summary(found), missing(found), *map(section, found)]
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", metavar="FOLDER", help="of `otmdr reproduce`")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
    PAGE.write_text(page(records()))
    print(f"Written: {PAGE.relative_to(ROOT)}")
