"""The layout: who may import whom, and what an import of the core costs."""

import ast
import pathlib
import subprocess
import sys

import otmdr_jax

PACKAGE = pathlib.Path(otmdr_jax.__file__).parent

# Top to bottom, as in docs/architecture.md: a module imports from lines above only.
LAYERS = [
    {"_version"},
    {"tree", "options", "keys", "shards"},
    {"collectives", "mapping", "perturbation"},
    {"batches"},
    {"particles"},
    {"engine"},
    {"subbatches"},
    {"gradients"},
    {"adapter"},
    {"presets", "transform", "ensemble"},
    {"bnn"},
    {"baselines"},
    {
        "metrics",
        "diversity",
        "landscape",
        "models",
        "data",
        "parallel",
        "precision",
    },  # leaves: never each other
    {"centers", "calibration"},
    {"config", "methods", "progress", "windows"},
    {"optimizers", "members"},
    {"building"},
    {"programs", "checkpoint", "runs"},
    {"predictors"},
    {"evaluation", "restoring"},
    {"sharpness", "cost", "calibrating", "shift"},
    {"training"},
    {"combine", "surface", "sweep"},
    {"report"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
CORE = {name for layer in LAYERS[:12] for name in layer}


def module_name(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(module, names) of every import statement in a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, [alias.name for alias in node.names]


def project_imports(path):
    for module, names in imports(path):
        if module == "otmdr_jax":
            yield from names
        elif module.startswith("otmdr_jax."):
            yield module.split(".")[1]


def test_every_module_has_a_place_in_the_layout():
    known = set().union(*LAYERS) | {"__init__"}
    found = {module_name(path) for path in PACKAGE.rglob("*.py")}
    assert found <= known, f"unplaced: {found - known}"


def test_imports_go_upward_only():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    public = set(otmdr_jax.__all__)
    for path in PACKAGE.rglob("*.py"):
        name = module_name(path)
        if name == "__init__":
            continue
        for used in project_imports(path):
            if used in public or used == name:
                continue
            assert rank[used] < rank[name] or (
                used in CORE and name in CORE and rank[used] <= rank[name]
            ), f"{path.name} imports {used}"


def test_the_core_imports_jax_and_optax_alone():
    allowed = {"jax", "optax", "otmdr_jax"} | set(sys.stdlib_module_names)
    for path in PACKAGE.rglob("*.py"):
        if module_name(path) in CORE | {"__init__"}:
            roots = {module.split(".")[0] for module, _ in imports(path)}
            assert roots <= allowed, f"{path.name} imports {roots - allowed}"


def test_import_is_light():
    """No TensorFlow, Flax or plots, and well under a second beyond JAX and Optax."""
    code = """
import time, sys, jax, optax
start = time.perf_counter()
import otmdr_jax
seconds = time.perf_counter() - start
heavy = {"tensorflow", "tensorflow_datasets", "flax", "matplotlib", "orbax", "rich",
         "sklearn", "tyro", "grain"} & set(sys.modules)
assert not heavy, heavy
assert seconds < 0.5, seconds
"""
    subprocess.run([sys.executable, "-c", code], check=True)
