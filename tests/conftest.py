"""Strict settings for every test: they run before the first use of a JAX backend."""

import contextlib
import gc
import os
import pathlib
import resource
import shutil
import sys

# NumPy's threads would wait for those of the other worker, and waiting costs processor
# time: read where NumPy is imported first.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

from tests.frames import in_one_piece
from tests.sets import (  # noqa: F401
    cache_dir,
    cifar_dir,
    few_digits,
    own_copy,
    prepare,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent

# --- How programs are compiled ------------------------------------------------------

# Compilation is most of the time of a first run. Programs are kept for the next one,
# for all workers and for the processes that tests start. Their keys hold the version,
# the flags and the settings; those of machines with other processors have a folder of
# their own, since a program of one may not run on the other.
CACHE = ROOT / ".cache" / "xla"
CACHE_LIMIT = 2 * 2**30  # bytes; above it the cache starts anew


def _prepare_cache():
    if CACHE.exists() and sum(f.stat().st_size for f in CACHE.rglob("*")) > CACHE_LIMIT:
        shutil.rmtree(CACHE)
    return CACHE / _processor()


def _processor():
    """A name that differs where the instructions of processors do."""
    import hashlib
    import platform

    facts = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        facts += "".join(sorted({x for x in lines if x.startswith(("flags", "model"))}))
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process: no worker yet
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_prepare_cache())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Small programs compile for longer than they run: XLA is told to optimize little, here
# and in the processes that tests start. `optimized` is for tests of the core, and
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs all tests as a user's programs are compiled.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
# XLA's older code for fusions compiles twice as fast. Later versions do not have it.
EMITTERS = "xla_cpu_use_fusion_emitters"
OLD_EMITTERS = QUICK and jax.__version_info__ < (0, 11)
# A program that is compiled in one part takes a tenth less than one in parts, which
# wait for each other where every processor has a worker of its own.
FLAGS = {"xla_cpu_parallel_codegen_split_count": "1"} if QUICK else {}
if OLD_EMITTERS:
    FLAGS[EMITTERS] = "false"
if QUICK:  # a quarter less with the new emitters, a twentieth with the old ones
    FLAGS["xla_cpu_opt_preset"] = "FAST_COMPILE"
# Nobody reads where in the source each operation of a program stands: lowering that
# takes a twentieth of the time. Nor does tracing leave garbage in circles for long.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
jax.config.update(
    "jax_traceback_in_locations_limit",
    int(os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"]),
)
gc.set_threshold(200_000, 50, 100)
if jax.__version_info__ < (0, 12):
    from tests.lowering import share_contexts

    share_contexts()
for name, value in FLAGS.items():
    if name not in (given := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{given} --{name}={value}".strip()
jax.config.update("jax_disable_most_optimizations", QUICK)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)
# Eight CPU devices, so that pmap and shard_map run for real on any machine.
jax.config.update("jax_num_cpu_devices", 8)
# A silent broadcast of (N,) with (N, 1) is the usual cause of a wrong loss.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="module")
def one_layer():
    """A name by which a module's tests may create a network of one layer."""
    from otmdr_jax import models
    from tests.zoo import OneLayer

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._REGISTRY, "one_layer", (OneLayer, {}))
        yield "one_layer"


@pytest.fixture
def users_fusions():
    """Options of `jax.jit`: fusions as users have them, for equality to the bit."""
    return {"compiler_options": {EMITTERS: True}} if OLD_EMITTERS else {}


@pytest.fixture(scope="module")
def optimized(request):
    """Programs of a module's tests get LLVM's optimizations, by `make test-all`.

    XLA's preset stays: `make test-optimized` compiles as a user's programs are. `make
    test` leaves these tests as others are, since they take half as long again.
    """
    if request.config.getoption("markexpr") == "not slow":
        yield
        return
    # JAX's caches in memory know nothing of the setting: a program of another test,
    # compiled quickly, would be used beside new ones, and the two differ in rounding.
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", QUICK)
        jax.clear_caches()


_IN_ONE_PIECE = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Runs pytest's own loop inside of a frame that has room for all others."""
    if _IN_ONE_PIECE in session.stash:
        return None  # the next one's turn
    session.stash[_IN_ONE_PIECE] = True
    return in_one_piece(session.config.hook.pytest_runtestloop, session=session)


# --- How long tests take ------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption(
        "--cpu-limit",
        type=float,
        default=3.0,
        help="processor seconds that a test may take without a mark (default: 3; "
        "0: any)",
    )


def _processor_seconds():
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test without a mark that takes long, so that `make test` stays short."""
    start, modules = _processor_seconds(), len(sys.modules)
    result = yield
    spent, limit = _processor_seconds() - start, item.config.getoption("--cpu-limit")
    marked = item.get_closest_marker("slow") or item.get_closest_marker("essential")
    # Whichever test is the first to use a library pays for its import; examples in
    # docstrings cannot be marked.
    excused = len(sys.modules) > modules + 100 or isinstance(item, pytest.DoctestItem)
    if limit and spent > limit and not marked and not excused:
        pytest.fail(
            f"{item.nodeid} took {spent:.1f} processor seconds, and a test without a "
            f"mark may take {limit:g}: make it smaller, or mark it slow (make test-all "
            "runs it) or essential (make test does too). On a slow machine raise "
            "--cpu-limit.",
            pytrace=False,
        )
    return result


# The files that take longest, by processor time. Sent first, they leave short ones for
# the end, and no worker waits for the other.
LONG = (
    "models/test_families parallel/test_distributed experiments/test_bnn_training "
    "experiments/test_members test_benchmarks experiments/test_methods "
    "parallel/test_parallel experiments/test_training test_examples "
    "ensemble/test_ensemble core/test_parameters core/test_options test_docs "
    "models/test_dropout baselines/test_collected bnn/test_gradients "
    "experiments/test_cli bnn/test_local_reparam"
).split()


def pytest_collection_modifyitems(items):
    place = {str(ROOT / "tests" / f"{name}.py"): i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(str(item.path), len(LONG)))
