"""The documentation: its code runs, and what it names exists."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
import sys
import types
import typing

import pytest
import tyro
import yaml

import otmdr_jax
from otmdr_jax.experiments import cli, methods
from otmdr_jax.experiments.reproduce import tables
from otmdr_jax.io import files
from tests.test_layout import FLOORS

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *([ROOT / "README.md"] if (ROOT / "README.md").exists() else [])]
IDS = [page.name for page in PAGES]

# A fence may be indented (in a list item); it ends at the same indentation.
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+|~~~+) *(?P<language>[\w+-]*)")
SKIP = re.compile(r"<!-- skip:(?P<reason>.*)-->")
# A block that is left out where a package is missing that no extra brings.
NEEDS = re.compile(r"<!-- needs: (?P<package>\w+) -->")


class Block(typing.NamedTuple):
    """A fenced block: its language, code, first line's number, the line before it."""

    language: str
    code: str
    line: int
    before: str


def blocks(text):
    lines = text.splitlines()
    found, i = [], 0
    while i < len(lines):
        if not (match := FENCE.match(lines[i])):
            i += 1
            continue
        width = len(match["indent"])
        end = i + 1
        while not lines[end].strip().startswith(match["ticks"]):
            end += 1
        code = "\n".join(line[width:] for line in lines[i + 1 : end]) + "\n"
        before = lines[i - 1].strip() if i else ""
        found.append(Block(match["language"], code, i + 2, before))
        i = end + 1
    return found


def without_blocks(text):
    """The prose of a page, fenced code left out."""
    prose, ticks = [], None
    for line in text.splitlines():
        match = FENCE.match(line)
        if ticks is None and match:
            ticks = match["ticks"]
        elif ticks is not None:
            ticks = None if line.strip().startswith(ticks) else ticks
        else:
            prose.append(line)
    return "\n".join(prose)


def page_texts():
    return [(page, page.read_text()) for page in PAGES]


# -- code -----------------------------------------------------------------------------


FIRST = ("README.md",)  # what everybody reads
# Changes the package itself: tests/test_extending.py follows it on a copy.
CHANGING = "extending.md"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.name,
            marks=pytest.mark.essential if page.name in FIRST else pytest.mark.slow,
        )
        for page in PAGES
        if page.name != CHANGING
    ],
)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    """All blocks of a page share one namespace, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    name = f"_docs_{page.stem}".replace("-", "_")
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    for block in blocks(page.read_text()):
        if block.language != "python" or SKIP.match(block.before):
            continue
        needs = NEEDS.match(block.before)
        if needs and importlib.util.find_spec(needs["package"]) is None:
            continue
        # Tracebacks show the page's own line.
        source = "\n" * (block.line - 1) + block.code
        exec(compile(source, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_skipped_blocks_have_a_reason(page):
    for block in blocks(page.read_text()):
        if match := SKIP.match(block.before):
            assert match["reason"].strip(), f"{page.name}:{block.line} gives no reason"


def test_blocks_are_found_and_fail_where_they_are_wrong():
    """The extraction itself: indentation, skipping, and an error that is not lost."""
    text = "a\n```python\nx = 1\n```\n- b\n\n    ```python\n    y = x\n    ```\n"
    text += "<!-- skip: too slow -->\n```python\n1 / 0\n```\n```sh\nls\n```\n"
    found = blocks(text)
    assert [block.code for block in found] == ["x = 1\n", "y = x\n", "1 / 0\n", "ls\n"]
    assert [block.language for block in found] == ["python"] * 3 + ["sh"]
    assert found[1].line == 8 and text.splitlines()[7].strip() == "y = x"
    assert SKIP.match(found[2].before)["reason"].strip() == "too slow"


# -- links and pages ------------------------------------------------------------------


def anchors(page):
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    for line in page.read_text().splitlines():
        if match := re.match(r"#+ +(.*)", line):
            words = re.sub(r"[^\w\- ]", "", match[1].lower())
            yield re.sub(r"[ ]", "-", words.strip())


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_relative_links_point_to_files_and_headings(page):
    prose = re.sub(r"`[^`]*`", "", without_blocks(page.read_text()))
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", prose)
    links += re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.MULTILINE)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in set(anchors(target)), f"{page.name} links to {link}"


def test_navigation_names_every_page_and_no_other():
    def paths(entry):
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [path for child in children for path in paths(child)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    # The gallery's pages are made when the site is built.
    found = sorted(set(paths(site["nav"])) - {"gallery"})
    assert found == [page.name for page in DOCS]


def test_the_citation_has_the_version_and_the_authors_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == otmdr_jax.__version__
    paper = citation["preferred-citation"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    authors = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert f"{{{' and '.join(authors)}}}" in readme
    assert paper["title"] in readme and f"{{{paper['year']}}}" in readme


def test_templates_and_hooks_are_yaml_with_what_their_readers_require():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form), path
        assert all(field["attributes"]["label"] for field in form["body"]), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    found = [hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert found == ["ruff-check", "ruff-format", "mypy"]


# -- names ----------------------------------------------------------------------------


def known_tests():
    """{"tests/a/test_b.py::test_c", "tests/a/test_b.py::TestD", ...}."""
    known = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(f"{name}::{node.name}")
            if isinstance(node, ast.ClassDef):
                known |= {
                    f"{name}::{node.name}::{child.name}"
                    for child in node.body
                    if isinstance(child, ast.FunctionDef)
                }
    return known


def test_every_test_that_is_named_exists():
    known = known_tests()
    for page, text in page_texts():
        for name in re.findall(r"[\w/]*\btest_\w+\.py(?:::\w+)+", text):
            assert name in known, f"{page.name} names {name}"
        for name in re.findall(r"\btests/([\w/]+\.py)", text):
            assert (ROOT / "tests" / name).exists(), f"{page.name} names {name}"


def test_every_pitfall_and_limit_names_a_test():
    rows = [
        line
        for line in (ROOT / "docs" / "pitfalls.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| what goes wrong")
    ]
    assert len(rows) >= 20
    for row in rows:
        assert "::test_" in row, row


def test_every_preset_that_is_named_exists():
    from otmdr_jax.experiments import config

    known = {*otmdr_jax.PRESETS, *config.PRESETS}
    pattern = r"\b(?:paper|released|a?sam)(?:-[\w.]+)*-cifar\d+\b"
    named = r"--preset[ =]([a-z][\w.-]*)"
    for page, text in page_texts():
        for name in re.findall(pattern, text) + re.findall(named, text):
            assert name in known, f"{page.name} names the preset {name}"
        for name in re.findall(r"\botmdr_jax\.preset\(\"([^\"]+)\"", text):
            assert name in otmdr_jax.PRESETS, f"{page.name} calls preset({name!r})"
    assert re.findall(pattern, "released-mode1.1-cifar10 and asam-cifar10") == [
        "released-mode1.1-cifar10",
        "asam-cifar10",
    ]


def command_flags():
    """{"train": {"--rho", ...}, ...}, from the dataclasses behind the commands."""
    from otmdr_jax.experiments import config

    def flags(kind):
        found = {"--help"}
        for field in dataclasses.fields(kind):
            word = {"config_file": "config"}.get(field.name, field.name)
            word = word.replace("_", "-")
            found.add(f"--{word}")
            if isinstance(field.default, bool):
                found.add(f"--no-{word}")
        return found

    commands = {name: flags(kind) for name, (kind, _) in cli.COMMANDS.items()}
    for option, kind in config.known_options().items():
        word = option.replace("_", "-")
        commands["train"] |= {f"--{word}"} | (
            {f"--no-{word}"} if kind is bool else set()
        )
    (positional,) = tyro.conf.Positional[str].__metadata__
    for name, (kind, _) in cli.COMMANDS.items():
        hints = typing.get_type_hints(kind, include_extras=True)
        commands[name] -= {
            f"--{field.replace('_', '-')}"
            for field, type_ in hints.items()
            if positional in getattr(type_, "__metadata__", ())
        }
    return commands


def joined_lines(text):
    """Lines, with those that end in a backslash joined to the next."""
    return re.sub(r"\\\n\s*", " ", text).splitlines()


FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]")
# A script that is run, with what follows; not the language of a fence.
SCRIPT = re.compile(r"(?<!`)\bpython \S*?(\w+\.py)([^`|#]*)")
# Programs with flags of their own.
OTHERS = re.compile(
    r"\b(pip|uv|twine|mkdocs|pytest|make|ruff|mypy|git|docker|xprof|SBATCH|gcloud|XLA_FLAGS)\b"
)


def flags_of_script(text):
    shared = {"--json"} if "options_of(__doc__" in text else set()
    shared |= {"--smoke"} if "options_of(__doc__, " in text else set()
    return set(FLAG.findall(text)) | {"--help"} | shared


def test_every_flag_that_is_named_exists():
    commands = command_flags()
    folders = ("examples", "benchmarks", "docs")
    scripts = [path for name in folders for path in (ROOT / name).glob("*.py")]
    of_scripts = {path.name: flags_of_script(path.read_text()) for path in scripts}
    anywhere = set().union(*commands.values(), *of_scripts.values(), {"--version"})
    anywhere |= {"--merge_grad"}  # the released code's
    for page, text in page_texts():
        for line in joined_lines(text):
            for command, rest in re.findall(r"\botmdr (\w+)([^`|#]*)", line):
                if command in commands:
                    missing = set(FLAG.findall(rest)) - commands[command]
                    assert not missing, f"{page.name}: otmdr {command} has no {missing}"
            for script, rest in SCRIPT.findall(line):
                missing = set(FLAG.findall(rest)) - of_scripts[script]
                assert not missing, f"{page.name}: {script} has no {missing}"
            if not OTHERS.search(line):
                missing = set(FLAG.findall(line)) - anywhere
                assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.essential  # train has a page for each method
def test_the_flags_are_those_that_help_prints(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    # That of train shows the options of one method at a time.
    kinds = methods.METHODS if command == "train" else ()
    for chosen in [["--method", name] for name in kinds] or [[]]:
        with pytest.raises(SystemExit):
            cli.main([command, *chosen, "--help"])
    assert set(FLAG.findall(capsys.readouterr().out)) == command_flags()[command]


def test_every_module_that_is_named_exists():
    package = pathlib.Path(otmdr_jax.__file__).parent
    text = (ROOT / "docs" / "api.md").read_text()
    for name in re.findall(r"^::: otmdr_jax\.(\S+)", text, re.MULTILINE):
        path = package / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name
    layout = (ROOT / "docs" / "architecture.md").read_text()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).parts[0]
        assert name in layout, f"docs/architecture.md leaves out {name}"


def parts():
    """What users reach by a name of `otmdr_jax`, with what is public there."""
    yield otmdr_jax, (name for name in otmdr_jax.__all__ if name != "__version__")
    for name in dir(otmdr_jax):
        part = getattr(otmdr_jax, name)
        if inspect.ismodule(part) and part.__name__.startswith("otmdr_jax."):
            yield part, getattr(part, "__all__", None) or own(part)


def own(module):
    """The functions and classes that a module without a list defines."""
    for name, thing in vars(module).items():
        defined = inspect.isfunction(thing) or inspect.isclass(thing)
        if defined and thing.__module__ == module.__name__ and name[0] != "_":
            yield name


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(
        r"^::: (\S+)(?:\n    options:\n      members: \[([^\]]*)\])?",
        text,
        re.MULTILINE,
    )
    known = {module: re.findall(r"\w+", members) for module, members in blocks}
    missing, seen = [], 0
    for part, names in parts():
        for name in names:
            thing, seen = getattr(part, name), seen + 1
            if inspect.ismodule(thing):
                found = thing.__name__ in known
            else:
                # Constants do not know where they stand: any module below the part.
                below = [m for m in known if m.startswith(part.__name__ + ".")]
                homes = below if name.isupper() else [getattr(thing, "__module__", "")]
                found = any(
                    name in known[home] or not known[home]
                    for home in [part.__name__, *homes]
                    if home in known
                )
            if not found:
                missing.append(f"{part.__name__}.{name}")
    assert seen > 250 and not missing


def test_the_drawing_of_the_rooms_is_that_of_the_imports(monkeypatch):
    """Made by `python docs/rooms.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import rooms

    assert rooms.SVG.read_text() == rooms.draw()
    assert set(rooms.ROOMS) == set().union(*FLOORS) - {"_version", "__main__"}


def test_readme_shows_the_table_of_the_committed_demo_report():
    """Made by `otmdr demo --output docs/demo`; the rows are copied as they are."""
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("<!-- demo table -->")[1].split("<!-- /demo table -->")[0]
    report = (ROOT / "docs" / "demo" / "report.md").read_text()
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 7 and "\n".join(rows) in report


RESULTS = ROOT / "benchmarks" / "results"


def shown(page, name):
    """What stands on a page of docs/ between two comments of this name."""
    text = (ROOT / "docs" / page).read_text()
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def assert_same(table, text):
    """The lines of a table are those of the text, no more and no fewer."""
    found = [line for line in text.splitlines() if line.startswith("|")]
    assert found == table.strip().splitlines()


@pytest.mark.parametrize(
    ("script", "record", "name"),
    [
        ("theory", "theory.json", "theory"),
        ("sweeps", "sweep_tilt.json", "sweep tilt"),
        ("draws", "draws_cpu.json", "draws"),
    ],
)
def test_theory_page_shows_the_committed_measurements(
    script, record, name, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module(script).table
    results = json.loads((RESULTS / record).read_text())["results"]
    assert_same(table(results), shown("theory.md", name))


def test_performance_page_shows_the_committed_costs_of_noise(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    record = json.loads((RESULTS / "noise_cpu.json").read_text())
    table = importlib.import_module("noise").table(record["networks"])
    assert_same(table, shown("performance.md", "noise"))


def test_the_papers_tables_in_miniature_are_those_of_their_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("reproduction")
    records = script.records()
    assert script.PAGE.read_text() == script.page(records)
    for record in records:  # the tests that a record holds are those of its values
        target = record["target"]
        again = tables.record(
            target, record["scale"], record["variant"], tables.read(record)
        )
        assert record.items() >= json.loads(files.dumps(again)).items()


def test_the_page_takes_no_records_of_another_scale(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("reproduction")
    record = script.records()[0] | {"variant": "released"}
    (tmp_path / f"{record['target']}.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="small released, and the page small paper"):
        script.collect(tmp_path)


@pytest.fixture
def comparison(monkeypatch):
    """benchmarks/comparison.py and its committed record."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    record = json.loads((RESULTS / "comparison.json").read_text())
    return importlib.import_module("comparison"), record


def test_comparison_page_shows_the_committed_measurements(comparison):
    script, record = comparison
    assert_same(script.means_table(record["rows"]), shown("comparison.md", "means"))
    assert_same(
        script.questions_table(record["rows"]), shown("comparison.md", "questions")
    )
    assert_same(script.tuning_table(record), shown("comparison.md", "tuning"))
    # It is of the sweep that is in examples, but for where its data lie.
    text = (ROOT / "examples" / "sweep_fair.toml").read_text()
    assert record["sweep"] == text


# What the page's sentences say, in the order of the text.
SAID = (
    ("SAM", "SGD", "accuracy"),
    ("SAM", "SGD", "nll"),
    ("OT-MDR", "SGD", "accuracy"),
    ("OT-MDR at the paper's radii", "SAM at rho1", "accuracy"),
    ("OT-MDR at the paper's radii", "SAM at rho1", "nll"),
    ("SAM at rho1 + rho2", "SAM at rho1", "accuracy"),
    ("SAM at rho1 + rho2", "SAM at rho1", "nll"),
    ("OT-MDR at the paper's radii", "SAM at rho2", "accuracy"),
    ("OT-MDR at the paper's radii", "SAM at rho1 + rho2", "nll"),
    ("OT-MDR at the paper's radii", "SAM at rho1 + rho2", "accuracy"),
    ("OT-MDR", "SAM", "accuracy"),
    ("OT-MDR", "SAM", "nll"),
    ("OT-MDR", "SAM", "calibrated_nll"),
    ("OT-MDR", "SAM", "shifted_accuracy"),
    ("SAM, two steps", "SAM", "accuracy"),
    ("OT-MDR", "SAM, two steps", "accuracy"),
    ("OT-MDR, released", "OT-MDR", "accuracy"),
    ("OT-MDR, K = 2", "OT-MDR", "accuracy"),
    ("OT-MDR, projected", "OT-MDR", "accuracy"),
    ("OT-MDR, noise 0.01", "OT-MDR", "accuracy"),
    ("Exact distribution, tilt 0.5", "SAM", "accuracy"),
    ("Random weights", "SGD", "accuracy"),
    ("Dual form", "SAM", "accuracy"),
)


def test_comparison_page_says_what_came_out(comparison):
    script, record = comparison
    page = (ROOT / "docs" / "comparison.md").read_text().split("<!-- /questions -->")[1]
    found = re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", page.split("## The radii")[0])
    assert found == [script.text_of(record["rows"], *one) for one in SAID]
    means = {}
    for one in record["rows"]:
        means.setdefault(one["method"], []).append(100 * one["accuracy"])
    gains = {x: sum(v) / len(v) - sum(means["SGD"]) / 5 for x, v in means.items()}
    less = ("OT-MDR, released", "OT-MDR, projected", "OT-MDR, noise 0.01")
    more = ("SAM", "SAM, two steps", "OT-MDR", "OT-MDR, K = 2", "Dual form")
    assert all(0.5 < gains[x] < 1.55 for x in (*less, "Random weights"))
    assert all(2 < gains[x] < 3.3 for x in (*more, "Exact distribution, tilt 0.5"))
    scores = {x["label"]: x["score"] for x in record["tuning"]}
    merged, text = (
        scores[f"{name}, rho = 0.05 0.1"] for name in ("OT-MDR, released", "OT-MDR")
    )
    page = " ".join(page.split())
    assert f"{merged:.3f} against {text:.3f} in validation NLL" in page
    lines = script.questions_table(record["rows"]).splitlines()[2:]
    small = [
        q for line in lines for q in line.split(" | ")[4::3] if float(q[:5]) < 0.05
    ]
    assert len(small) == 4 and "four are below q = 0.05" in page

    def fit(method):
        values = script.values_of(record["rows"], method, "train_nll").values()
        return sum(values) / len(values)

    ends = [
        fit(x["method"]) for x in record["tuning"] if x["method"] != "Random weights"
    ]
    assert f"NLL of {min(ends):.2f} to {max(ends):.2f}, where SGD's" in page
    assert f"where SGD's end at {fit('SGD'):.2f}" in page


def by_label(record):
    """The rows of a sweep's record, by the label of their method."""
    groups = {}
    for row in json.loads((RESULTS / record).read_text())["results"]:
        groups.setdefault(row["label"], []).append(row)
    return groups


def test_theory_page_says_what_came_out_of_the_sweep():
    from otmdr_jax.experiments.report.cost import paired_difference

    record = json.loads((RESULTS / "sweep_tilt.json").read_text())
    text = (ROOT / "examples" / "sweep_tilt.toml").read_text()
    assert record["sweep"].strip() == text.strip()
    groups = by_label("sweep_tilt.json")
    page = " ".join((ROOT / "docs" / "theory.md").read_text().split())
    alone = "Draws, tilt = {}, num_particles = 1".format
    for one, other, text in (
        (alone(0.0), "SGD", "({:.2f} points against SGD, p = {:.2f})"),
        (
            alone(0.75),
            "OT-MDR, num_particles = 1",
            "(+{:.2f} for the draws, p = {:.2f})",
        ),
        ("SAM", "OT-MDR, num_particles = 1", "more accurate by {:.2f} (p < 0.001)"),
        ("OT-MDR, projected", "OT-MDR, num_particles = 1", "({:.2f}, p = {:.2f})"),
    ):
        gap, p, _ = paired_difference(groups[one], groups[other], "accuracy")
        assert text.format(100 * gap, p) in page, text
        assert (p < 0.001) == ("0.001" in text)


@pytest.mark.parametrize(
    ("script", "record", "name"),
    [("sweeps", "sweep_dual.json", "sweep dual"), ("draws", "dual_cpu.json", "dual")],
)
def test_dual_page_shows_the_committed_measurements(script, record, name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module(script).table
    content = json.loads((RESULTS / record).read_text())
    assert_same(table(content["results"]), shown("dual.md", name))
    if script == "sweeps":
        assert content["sweep"] == (ROOT / "examples" / "sweep_dual.toml").read_text()


def test_dual_page_says_what_came_out():
    """The differences to methods with fixed radii, and their p-values."""
    from otmdr_jax.experiments.report.cost import paired_difference

    groups = by_label("sweep_dual.json")
    page = " ".join((ROOT / "docs" / "dual.md").read_text().split())
    for one, other, what in (
        ("Dual, rho = 0.15", "SAM, rho = 0.15", "(+{:.2f} points at 0.15, p = {:.2f}"),
        ("Dual, rho = 0.05", "SAM, rho = 0.05", "; {:.2f} at 0.05, p = {:.2f})"),
        ("Dual ensemble", "SAM ensemble", "in an ensemble ({:.2f}, p = {:.2f})"),
        ("Dual, rho = 0.15", "OT-MDR", "more accurate alone (+{:.2f}, p < 0.001)"),
    ):
        gap, p, _ = paired_difference(groups[one], groups[other], "accuracy")
        assert what.format(100 * gap, p) in page, what
        assert (p < 0.001) == ("0.001" in what)
    for one, other in (
        ("Dual, rho = 0.15", "OT-MDR"),
        ("Dual ensemble", "OT-MDR ensemble"),
    ):
        gap, p, _ = paired_difference(groups[one], groups[other], "ece")
        assert gap > 0 and p < 0.05  # worse calibrated


def test_performance_page_shows_the_committed_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import step_time

    record = json.loads((RESULTS / "step_time_cpu.json").read_text())
    assert_same(step_time.table(record["results"]), shown("performance.md", "table"))
    # What the text below says in figures.
    page = (ROOT / "docs" / "performance.md").read_text()
    mib = {name: f"{x['peak_mib']:.0f}" for name, x in record["results"].items()}
    assert mib["OT-MDR K=2 scan"] == mib["OT-MDR K=4 auto"] == mib["OT-MDR K=2 auto"]
    sentence = (
        f"A scan takes {mib['OT-MDR K=4 auto']} MiB for two particles and for four, "
        f"where one takes {mib['OT-MDR K=1']}, and no more time; unrolled, two take "
        f"{mib['OT-MDR K=2 unroll']}"
    )
    assert sentence in " ".join(page.split())


@pytest.mark.parametrize("file", ["cpu_convolution", "cpu_convolution_epyc"])
def test_performance_page_shows_the_committed_convolutions(file, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cpu_convolution

    record = json.loads((RESULTS / f"{file}.json").read_text())
    for name, table in zip(
        ("steps", "layers", "loops"), cpu_convolution.tables(record), strict=True
    ):
        if name == "steps" or file == "cpu_convolution":
            assert_same(table, shown("performance.md", f"{file} {name}"))


def test_performance_page_shows_the_committed_alternatives(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cpu_alternatives

    record = json.loads((RESULTS / "cpu_alternatives.json").read_text())
    for name, table in zip(
        ("layers", "steps", "flags"), cpu_alternatives.tables(record), strict=True
    ):
        assert_same(table, shown("performance.md", f"alternatives {name}"))


def test_performance_page_says_who_is_faster():
    """The figures of its sentence on PyTorch, from the record."""
    record = json.loads((RESULTS / "cpu_alternatives.json").read_text())
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    for step, ways in record["steps"].items():
        step = step.replace("OT-MDR K=1", "OT-MDR with $K = 1$")
        wall, processor = (
            ways["PyTorch"][f"ours_{clock}speedup"] for clock in ("", "processor_")
        )
        sentence = f"{wall:.1f} times as fast as ours for {step} ({processor:.1f} by"
        assert sentence in page
    layers = [ways for part in record["layers"].values() for ways in part]
    (n,) = {x["n"] for layer in layers for x in layer["ways"].values()}
    (of_flags,) = {
        x["n"] for values in record["flags"].values() for x in values.values()
    }
    assert f"n = {n} each: <!-- alternatives layers -->" in page
    assert f"n = {of_flags}: <!-- alternatives flags -->" in page


def test_performance_page_shows_the_committed_versions(monkeypatch):
    """Tables and the figures of the sentences below them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cpu_convolution
    import cpu_versions

    record = json.loads((RESULTS / "cpu_versions.json").read_text())
    for name, table in zip(
        ("steps", "layers"), cpu_versions.tables(record), strict=True
    ):
        assert_same(table, shown("performance.md", f"cpu_versions {name}"))
    loops = json.loads((RESULTS / "cpu_convolution_newest.json").read_text())
    table = cpu_convolution.tables(loops)[2]
    assert_same(table, shown("performance.md", "cpu_convolution_newest loops"))

    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    new, old = "JAX 0.12.0.1", "JAX 0.10.2"
    assert loops["jax"] == new.removeprefix("JAX ")

    def ratio(step, key):
        return f"{record['steps'][step][key]['processor_ratio']:.2f}"

    sgd, robust = (
        [ratio(step, f"{new}{kept}: ours") for kept in ("", ", kept")]
        for step in ("SGD", "OT-MDR K=1")
    )
    assert (
        f"takes {sgd[0]} times PyTorch's processor time for SGD, and {robust[0]} times "
        f"for OT-MDR with $K = 1$; with memory kept it takes {sgd[1]} and {robust[1]}."
    ) in page

    again = json.loads((RESULTS / "cpu_versions_again.json").read_text())["steps"]
    sgd, robust = (
        [
            f"{again[step][f'{new}{kept}: ours']['processor_ratio']:.2f}"
            for kept in ("", ", kept")
        ]
        for step in ("SGD", "OT-MDR K=1")
    )
    assert (
        f"A second run of 7 rounds gave {sgd[0]} and {robust[0]}, and {sgd[1]} and "
        f"{robust[1]}."
    ) in page

    def total(part, key):
        counted = zip(cpu_convolution.LAYERS, cpu_convolution.COUNTS, strict=True)
        return sum(
            count
            * record["layers"][cpu_convolution.layer_name(layer, part)][key][
                "processor_milliseconds"
            ]
            for layer, count in counted
        )

    pytorch = next(key for key in record["steps"]["SGD"] if key.startswith("PyTorch"))
    forward, images = (
        [total(part, key) for key in (f"{new}: XLA", f"{old}: XLA", pytorch)]
        for part in ("forward", "images")
    )
    kernel = [total("kernel", f"{new}: {way}") for way in ("XLA", "ours")]
    assert (
        f"take {forward[0]:.0f} ms with the newest, {forward[1]:.0f} with 0.10.2 and "
        f"{forward[2]:.0f} with PyTorch (oneDNN), the gradients of images "
        f"{images[0]:.0f}, {images[1]:.0f} and {images[2]:.0f}."
    ) in page
    assert f"take {kernel[0]:.0f} ms by XLA alone and {kernel[1]:.0f} by ours" in page

    others = json.loads((RESULTS / "cpu_alternatives_newest.json").read_text())
    winograd, xla = (
        [
            f"{layer['ways'][way]['processor_milliseconds']:.1f}"
            for layer in others["layers"]["forward"][1:]
        ]
        for way in ("Winograd", "XLA")
    )
    assert (
        f"takes {winograd[0]} ms with 64 channels and {winograd[1]} with 128, where "
        f"XLA takes {xla[0]} and {xla[1]} (JAX 0.12, n = 7)"
    ) in page


def test_shift_page_shows_the_committed_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import corruptions
    import shift_digits

    record = json.loads((RESULTS / "corruptions_cpu.json").read_text())
    assert_same(corruptions.table(record["results"]), shown("shift.md", "corruptions"))
    record = json.loads((RESULTS / "shift_digits.json").read_text())
    assert record["seeds"] == 3
    table = shift_digits.table(record["results"])
    assert_same(table, shown("shift.md", "shift digits"))
    # What the text below says in figures.
    means = {k: shift_digits.mean_record(v) for k, v in record["results"].items()}
    members = means["OT-MDR (K = 1), 3 members"]
    ece = []
    for found in (means["SGD"], members):
        worst = [row["ece"] for row in found["corruptions"] if row["severity"] == 5]
        ece += [found["clean"]["ece"], sum(worst) / len(worst)]
    auroc = {row["score"]: row["auroc"] for row in members["ood"]}
    page = " ".join((ROOT / "docs" / "shift.md").read_text().split())
    sgd, own = (f"from {a:.3f} to {b:.3f}" for a, b in (ece[:2], ece[2:]))
    assert f"SGD's goes {sgd} at severity 5, that of three members {own}." in page
    assert f"confidence (AUROC {auroc['confidence']:.2f})" in page
    assert f"disagree about ({auroc['mutual_information']:.2f})" in page


def test_performance_page_shows_the_first_minutes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import first_minutes

    record = json.loads((RESULTS / "first_minutes_cpu.json").read_text())
    table = first_minutes.table(record["results"])
    assert_same(table, shown("performance.md", "first minutes"))
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"with commit {record['commits']['other']}," in page


def test_baselines_page_shows_the_committed_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sweeps

    record = json.loads((RESULTS / "sweep_digits.json").read_text())
    assert record["sweep"] == (ROOT / "examples" / "sweep_digits.toml").read_text()
    table = sweeps.table(record["results"])
    assert_same(table, shown("baselines.md", "sweep digits"))
    # What the text below says.
    means = {}
    for row in record["results"]:
        means.setdefault(row["label"], []).append(row)
    means = {
        label: {n: sum(r[n] for r in rows) / len(rows) for n in ("accuracy", "nll")}
        for label, rows in means.items()
    }
    assert min(means, key=lambda x: means[x]["nll"]) == "OT-MDR ensemble"
    best = sorted(means, key=lambda x: -means[x]["accuracy"])
    assert best[:3] == ["LookSAM", "SGVB", "MC dropout"] and len(best) == 24
    sgd = means["SGD"]["accuracy"]
    away = sorted(best, key=lambda x: abs(means[x]["accuracy"] - sgd))
    assert away[:2] == ["SGD", "Laplace"]
    one = means["OT-MDR, num_particles = 1"]["accuracy"]
    assert abs(one - means["SAM, rho = 0.1"]["accuracy"]) < 5e-4
    assert means["SAM, rho = 0.15"]["accuracy"] > one


def test_baselines_page_shows_the_small_sweep_of_cifar10(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sweeps

    record = json.loads((RESULTS / "sweep_cifar10_small.json").read_text())
    file = ROOT / "examples" / "sweep_cifar10_small.toml"
    assert record["sweep"] == file.read_text()
    table = sweeps.table(record["results"])
    assert_same(table, shown("baselines.md", "sweep cifar10 small"))
    # What the text below says.
    found = {}
    for row in record["results"]:
        found.setdefault(row["label"], []).append(row["accuracy"])
    means = {label: sum(rows) / len(rows) for label, rows in found.items()}
    order = sorted(means, key=lambda label: -means[label])
    assert order[0] == "SGD" and order[-1] == "OT-MDR, released"
    radii = [means[f"SAM, rho = {rho}"] for rho in (0.05, 0.1, 0.15)]
    assert radii == sorted(radii, reverse=True)
    assert radii[2] < means["OT-MDR, paper"] < radii[1]


def test_models_page_shows_what_dropout_costs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dropout

    results = json.loads((RESULTS / "dropout_cpu.json").read_text())["results"]
    assert_same(dropout.table(results), shown("models.md", "dropout"))
    for found in results.values():
        assert round(found[dropout.DROPS]["ratio"], 2) == 1.05
        samples = (
            found[dropout.MANY]["milliseconds"] / found[dropout.ONE]["milliseconds"]
        )
        assert 6.5 < samples < 7.7


def test_shift_page_shows_the_parameters_of_the_corruptions():
    from otmdr_jax.data import CORRUPTIONS, corruptions

    rows = {
        cells[1].strip(" `"): re.findall(r"[\d.]+", cells[3])
        for line in (ROOT / "docs" / "shift.md").read_text().splitlines()
        if len(cells := line.split("|")) == 5 and "= " in cells[3]
    }
    parameters = zip(
        CORRUPTIONS,
        (
            corruptions.NOISE_STD,
            corruptions.BLUR_STD,
            corruptions.CONTRAST,
            corruptions.BRIGHTNESS,
            corruptions.PIXELATE,
            corruptions.DEGREES,
        ),
        strict=True,
    )
    for name, values in parameters:
        assert [float(x) for x in rows[name]] == list(values), name


def test_performance_page_shows_the_committed_depthwise_convolutions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import depthwise

    record = json.loads((RESULTS / "depthwise_cpu.json").read_text())
    assert_same(
        depthwise.table(record["results"]), shown("performance.md", "depthwise")
    )
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert f"(n = {record['n']}, {record['processor']}, JAX {record['jax']})" in page


def test_scaling_page_shows_the_committed_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    record = json.loads((RESULTS / "scaling_cpu.json").read_text())
    tables = scaling.tables(record)
    for name, table in zip(("collectives", "weak scaling"), tables, strict=True):
        assert_same(table, shown("scaling.md", name))


def test_performance_page_shows_the_committed_memory():
    rows = {
        cells[0]: cells[1:]
        for line in shown("performance.md", "memory").splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    results = json.loads((RESULTS / "memory_cpu.json").read_text())["results"]
    for step in results["plain"]:
        costs = [column.get(step) for column in results.values()]
        of_step = ["-" if c is None else f"{c['peak_mib']:.1f}" for c in costs]
        assert rows[step] == of_step
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    ours, theirs, sam = (
        [column[step]["peak_mib"] for column in results.values()]
        for step in ("OT-MDR K=1", "SAM (optax.contrib)", "SAM")
    )
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} of the memory of" in page
    largest = max(a / b for a, b in zip(ours, sam, strict=True))
    assert f"at most {largest:.2f} of ours" in page


def test_ensembles_page_shows_the_committed_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ensemble as benchmark

    record = json.loads((RESULTS / "ensemble_cpu.json").read_text())
    assert_same(benchmark.table(record), shown("ensembles.md", "ensemble"))


def test_bayesian_page_shows_the_committed_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bnn as steps
    import bnn_digits

    record = json.loads((RESULTS / "bnn_cpu.json").read_text())
    assert_same(steps.table(record), shown("bayesian.md", "bnn"))
    variance = steps.variance_table(record["variance"])
    assert_same(variance, shown("bayesian.md", "bnn variance"))
    assert record["model"] == "wide_resnet_16_2" and record["batch_size"] == 32
    digits = json.loads((RESULTS / "bnn_digits.json").read_text())
    assert_same(bnn_digits.table(digits["results"]), shown("bayesian.md", "bnn digits"))
    config = digits["config"]
    assert (config["epochs"], config["learning_rate"]) == (28, 0.03)
    assert (config["prior_std"], config["posterior_std"]) == (0.1, 0.02)


def test_metrics_page_shows_the_committed_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import metrics as benchmark

    record = json.loads((RESULTS / "metrics_cpu.json").read_text())
    assert_same(benchmark.table(record["results"]), shown("metrics.md", "metrics"))
    page = " ".join((ROOT / "docs" / "metrics.md").read_text().split())
    assert record["examples"] == 1_000_000 and record["classes"] == 100
    assert f"took {record['scikit_learn_seconds']:.0f} s" in page
    assert f"{record['processor']}, {record['cores']} cores" in page
    rounds = {(x["n"]) for r in record["results"].values() for x in r["times"].values()}
    assert f"median of {rounds.pop()}" in page and not rounds


def test_models_page_shows_the_committed_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import models as benchmark

    table = shown("models.md", "models")
    record = json.loads((RESULTS / "models_cpu.json").read_text())
    assert benchmark.table(record["results"]) in table
    assert f"batch {record['batch_size']}, " in table and record["jax"] in table
    labels = [
        " ".join([name, *(f"{k}={v}" for k, v in options.items())])
        for name, options in benchmark.MODELS
    ]
    assert list(record["results"]) == labels


def test_models_page_names_every_model():
    from otmdr_jax import models

    page = (ROOT / "docs" / "models.md").read_text()
    for name in models.names():
        assert re.search(rf"`{name}`|\| {name} ", page), f"models.md leaves out {name}"
