"""The layout: who may import whom, and what an import of the core costs."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import otmdr_jax

PACKAGE = pathlib.Path(otmdr_jax.__file__).parent
ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.py")]

# From the ground up, as in docs/architecture.md: a module imports from the floors below
# its own. Those of one floor never import each other.
FLOORS = [
    {"_version", "core", "io"},
    {"ensemble"},
    {"bnn"},
    {"baselines"},
    # These need the core, and files and progress, alone.
    {"models", "data", "parallel", "metrics", "landscape", "frameworks"},
    {"experiments"},
    {"__main__"},
]
LIBRARY = set().union(*FLOORS[:5])
LEAVES = FLOORS[4]
CORE = [
    {"checks", "keys", "shards"},
    {"draws", "signatures", "tree"},
    {"options"},
    {"collectives", "ascent", "rows"},
    {"loops"},
    {"batches", "langevin", "sampling"},
    {"weights"},
    {"step"},
    {"samplers"},
    {"particle"},
    {"gradient"},
    {"presets", "sample", "transform"},
    {"dual"},
]
EXPERIMENTS = [
    {"interrupts", "patterns", "precision", "tensorboard"},
    {"options"},
    {"methods"},
    {"config"},
    {"optimizers", "members", "own"},
    {"building"},
    {"programs", "checkpoint", "run_folder"},
    {"prediction"},
    {"trained_run"},
    {"restore"},
    {"measure", "export"},
    {"training"},
    {"jobs"},
    {"combine", "sweep"},
    {"report"},
    {"demo", "reproduce"},
    {"cli"},
]


def floor_of(name, floors):
    return next((i for i, floor in enumerate(floors) if name in floor), None)


def place(path, folder=PACKAGE):
    return path.relative_to(folder).parts[0].removesuffix(".py")


def imports(path):
    """(module, names) of every import statement in a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, [alias.name for alias in node.names]


def project_imports(path):
    """Each thing imported, as its path below the package: ("core", "tree")."""
    for module, names in imports(path):
        if module == "otmdr_jax" or module.startswith("otmdr_jax."):
            inside = tuple(module.split(".")[1:])
            yield from ((*inside, name) for name in names or [()] if name)
            if not names:
                yield inside


def test_few_entries_at_the_top():
    entries = {p.name for p in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= 16, sorted(entries)


def test_every_module_has_a_place_in_the_layout():
    for folder, floors in (
        (PACKAGE, FLOORS),
        (PACKAGE / "core", CORE),
        (PACKAGE / "experiments", EXPERIMENTS),
    ):
        known = set().union(*floors) | {"__init__"}
        found = {place(path, folder) for path in folder.rglob("*.py")}
        assert found == known, f"unplaced or gone: {found ^ known}"


@pytest.mark.parametrize(
    "folder, floors",
    [("", FLOORS), ("core", CORE), ("experiments", EXPERIMENTS)],
    ids=["otmdr_jax", "core", "experiments"],
)
def test_imports_go_down_only(folder, floors):
    inside = tuple(filter(None, [folder]))
    for path in (PACKAGE / folder).rglob("*.py"):
        name = place(path, PACKAGE / folder)
        if name == "__init__":
            continue
        for used in project_imports(path):
            if used[: len(inside)] != inside or len(used) == len(inside):
                continue
            used_floor = floor_of(used[len(inside)], floors)
            if used[len(inside)] == name or used_floor is None:  # a public name
                assert used[len(inside)] in {name, *otmdr_jax.__all__}, (path, used)
                continue
            assert used_floor < floor_of(name, floors), f"{path} imports {used}"


def test_the_library_never_imports_the_experiments():
    for path in PACKAGE.rglob("*.py"):
        if place(path) in LIBRARY:
            found = [used for used in project_imports(path) if used[0] == "experiments"]
            assert not found, f"{path} imports {found}"


def test_leaves_import_the_core_and_io_alone():
    for path in PACKAGE.rglob("*.py"):
        if (name := place(path)) in LEAVES:
            used = {u[0] for u in project_imports(path)} - set(otmdr_jax.__all__)
            assert used <= {"core", "io", name}, f"{path} imports {used}"


def test_the_core_imports_jax_and_optax_alone():
    allowed = {"jax", "optax", "otmdr_jax"} | set(sys.stdlib_module_names)
    for path in PACKAGE.rglob("*.py"):
        if place(path) in {"core", "ensemble", "bnn", "baselines", "__init__"}:
            roots = {module.split(".")[0] for module, _ in imports(path)}
            assert roots <= allowed, f"{path.name} imports {roots - allowed}"


# Names that the documentation has had from the start, wherever they stand today.
PARTS = (
    "baselines bnn calibration config data diversity ensemble equinox landscape "
    "members methods metrics models nnx parallel precision report shift sweep training"
).split()


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_found_by_the_name_that_users_know(name):
    scope = {}
    exec(f"from otmdr_jax import {name}", scope)
    assert scope[name] is getattr(otmdr_jax, name)
    assert name in dir(otmdr_jax)


def test_type_checkers_find_the_parts_where_they_are_loaded_from():
    (block,) = [
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If)
    ]
    seen = {
        alias.asname: f"{line.module}.{alias.name}"
        for line in block.body
        for alias in line.names
    }
    names = {name: f"{module}.{name}" for name, module in otmdr_jax._NAMES.items()}
    assert seen == otmdr_jax._PARTS | names
    assert set(PARTS) <= set(seen)


def test_no_part_is_imported_as_a_module_that_is_not_there():
    """`import otmdr_jax.training` would be no module to Python and to type checkers."""
    with pytest.raises(ModuleNotFoundError, match="otmdr_jax.training"):
        importlib.import_module("otmdr_jax.training")
    pattern = re.compile(r"(?:import|from) otmdr_jax\.(\w+)")
    for path in [*PAGES, *PACKAGE.rglob("*.py")]:
        for name in pattern.findall(path.read_text()):
            home = PACKAGE / name
            assert home.is_dir() or home.with_suffix(".py").exists(), (path, name)


def test_import_is_light():
    """No TensorFlow, Flax or plots; half a processor second beyond JAX and Optax."""
    code = """
import time, sys, jax, optax
start = time.process_time()
import otmdr_jax
seconds = time.process_time() - start
heavy = {"tensorflow", "tensorflow_datasets", "flax", "matplotlib", "orbax", "rich",
         "sklearn", "tyro", "grain"} & set(sys.modules)
assert not heavy, heavy
assert seconds < 0.5, seconds
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_may_import_parts_at_once():
    """None of them sees a part that is half there."""
    code = """
import sys, threading, otmdr_jax
failures, go = [], threading.Barrier(8)
def work():
    go.wait()
    try:
        from otmdr_jax import calibration, diversity
        diversity.evaluate, calibration.cross_calibrate
    except (ImportError, AttributeError) as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
assert otmdr_jax.diversity is sys.modules["otmdr_jax.metrics.diversity"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_completion_offers_what_is_public():
    import otmdr_jax

    offered = {name for name in dir(otmdr_jax) if not name.startswith("__")}
    public = {*otmdr_jax.__all__, *otmdr_jax._PARTS, *otmdr_jax._NAMES}
    assert offered == public - {"__version__"}
