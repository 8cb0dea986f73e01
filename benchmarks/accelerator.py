"""All figures of an accelerator in one call; nine minutes by default.

    PYTHONPATH=. python benchmarks/accelerator.py --json a.json --cifar10 cifar10.npz
    python benchmarks/accelerator.py --smoke          # tiny, on a CPU, in minutes

It needs this repository (PYTHONPATH serves where the package is not installed), a GPU
with nothing else on it, Python 3.12 or later, JAX with CUDA, Flax and Optax, and no
network. PyTorch, with a C++ compiler, is compared if it is there. CIFAR-10 comes from a
file: an .npz that `otmdr_jax.data.load` reads, or one of JPEG scans, which needs
Pillow. Compilation uses all cores: on 16 of them all is done, on fewer what matters
least is skipped. The .json is small and whole at any time, so a process that is killed
loses what it was measuring alone.

What is measured, most important first:

1. `benchmarks/pytorch_step.py`, where PyTorch is installed, in a process of its own and
   before JAX takes the device's memory: a quarter of the time at most.
2. Peak rates of matrix products (8192^3), bandwidth of a copy (read + write), and
   what part of the maker's figures for an H100 or H200 that is: ten seconds.
3. Steps of SGD, SAM (Optax's and ours) and OT-MDR for WRN-28-10, batch 128 and 512 in
   bfloat16, which the targets are about: two minutes, most of it compilation.
4. Agreement with the CPU of the same process, by method, particle map and dtype:
   `benchmarks/_agreement.py`, half a minute.
5. Training of ResNet-18 on CIFAR-10 by SGD, SAM and OT-MDR: `benchmarks/_training.py`,
   three minutes with compilation. Without `--cifar10` it is recorded as skipped.
6. As long as time is left: steps of ResNet-18, ensembles of 5 ResNet-10 by `jax.vmap`,
   unrolled and one after the other, and steps of both networks by batch size, dtype,
   number of particles and particle map.

Steps are timed in turn, round after round, in one process: medians over rounds of a few
steps that are dispatched without waiting, as in a training loop. `gap` is what a step
takes longer if the host waits for each. Compilation runs in several threads, so that
its seconds hold for a busy host. Memory is the compiled program's own account.

Model FLOPs follow the usual convention: 2 x multiply-adds of the convolutions and
matrix products of one forward pass, padding included; times 3 for a gradient pass
(forward, and twice that backward); times the passes over a whole batch a step (SGD 1,
SAM 2, OT-MDR 2 K: S halves make one). Model-flop utilisation (MFU) is that over the
time and over the peak measured for this dtype in the same run; for float32 the peak of
products as JAX runs them by default.

A measurement that fails (out of memory, say) is recorded with its error, one that does
not fit into `--minutes` any more as skipped. The file is rewritten after each.
Expected: OT-MDR with K = 1 takes as long as SAM; see `targets`.
"""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

# Before JAX starts its backend. What it does not hold is left for cuDNN's and cuBLAS's
# own workspaces; the PyTorch process is over by then.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

import _agreement  # noqa: E402
import _training  # noqa: E402
import jax  # noqa: E402
from _common import REFERENCE, environment  # noqa: E402
from _record import markdown, options_of  # noqa: E402
from _session import Session, Skipped  # noqa: E402
from _speed import ROBUST, measure_peak, time_ensemble, time_steps  # noqa: E402

MAPS = ("scan", "vmap", "unroll")
PARTS = ("pytorch", "peak", "steps", "agreement", "training", "ensemble")
ACCURACY = 0.94
# The share of the time that PyTorch may take; in the smoke form there is little else.
PYTORCH_SHARE, PYTORCH_SHARE_OF_SMOKE = 0.25, 0.8
TRAINING_MINUTES = 3.0


# -- PyTorch and the targets ----------------------------------------------------------


def run_pytorch(session):
    """Runs the script with a time limit; what it has written by then counts."""
    if importlib.util.find_spec("torch") is None:
        raise Skipped("PyTorch is not installed")
    script = pathlib.Path(__file__).with_name("pytorch_step.py")
    # A share of the time: the steps of this package must not be crowded out.
    share = PYTORCH_SHARE_OF_SMOKE if session.options.smoke else PYTORCH_SHARE
    limit = share * session.left()
    failed = ""
    with tempfile.TemporaryDirectory() as folder:
        file, log = pathlib.Path(folder, "pytorch.json"), pathlib.Path(folder, "log")
        command = [sys.executable, str(script), "--json", str(file)]
        command += ["--smoke"] if session.options.smoke else []
        # A group of its own, for the compiler's workers end with it; a file, since
        # a pipe would be held open by those that do not.
        with log.open("w") as errors:
            process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        try:
            if process.wait(limit):
                failed = log.read_text()[-500:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            failed = f"stopped after {limit:.0f} s"
        if file.exists():
            session.record["pytorch"] = json.loads(file.read_text())
    if failed:
        raise RuntimeError(failed)


def targets(record):
    """Rows of what was aimed at, what came out, and whether that is a pass."""

    def value(label, step, key):
        group = record["steps"].get(label, {"results": {}})
        return group["results"].get(step, {}).get(key)

    rows = []

    def row(name, measured, aim, passed):
        known = measured is not None
        rows.append(
            {
                "target": f"{name} {aim}",
                "measured": measured,
                "passed": passed(measured) if known else None,
            }
        )

    for size in (128, 512):
        label = f"wide_resnet_28_10 bfloat16 {size}"
        ratio = value(label, ROBUST, "ratio_to_optax_sam")
        row(
            f"{label}: OT-MDR K=1 / SAM",
            ratio,
            "at most 1.05",
            lambda x: x <= 1.05,
        )
        ours = value(label, ROBUST, "images_per_second")
        theirs = [
            result["images_per_second"]
            for name, result in record["pytorch"].get("results", {}).items()
            if name.startswith(f"bfloat16 {size} ") and "images_per_second" in result
        ]
        row(
            f"{label}: speed / PyTorch's fastest",
            ours / max(theirs) if ours and theirs else None,
            "at least 1",
            lambda x: x >= 1,
        )
    label = "wide_resnet_28_10 bfloat16 512"
    row(
        f"{label}: MFU of OT-MDR K=1",
        value(label, ROBUST, "mfu"),
        "at least 0.45",
        lambda x: x >= 0.45,
    )
    label = "wide_resnet_28_10 bfloat16 128"
    one = value(label, ROBUST, "milliseconds")
    four = [value(label, f"OT-MDR K=4 {how}", "milliseconds") for how in MAPS]
    four = [x for x in four if x]
    row(
        f"{label}: OT-MDR K=4 by its fastest map / K=1",
        min(four) / one if one and four else None,
        "at most 3",
        lambda x: x <= 3,
    )
    agreement = record.get("agreement") or {"results": {}, "planned": 0}
    found = [x for case in agreement["results"].values() for x in case.values()]
    planned = agreement.get("planned")  # what crashed has no result
    row(
        "cases that agree with the CPU",
        sum(x["passed"] for x in found) / planned if planned else None,
        "all of them",
        lambda x: x == 1,
    )
    trained = record.get("training", {}).get("results", {})
    for method in _training.METHODS:
        row(
            f"test accuracy on CIFAR-10 by {method}",
            trained.get(method, {}).get("accuracy"),
            f"at least {ACCURACY}",
            lambda x: x >= ACCURACY,
        )
    return rows


# -- the plan -------------------------------------------------------------------------


def plan(session, dataset):
    """(part, name, least seconds, function, arguments), in this order.

    Args:
      session: The session.
      dataset: A function that gives the set to train on.
    """
    options = session.options

    def steps(network, size, dtype="bfloat16", particles=(), only=None):
        arguments = (session, network, size, dtype, list(particles), only)
        return "steps", f"{network} {dtype} {size}", 15, time_steps, arguments

    def ensemble(*arguments):
        return "ensemble", "ensemble", 30, time_ensemble, (session, *arguments)

    def agreement(network, size):
        arguments = (session, network, size)
        return "agreement", "agreement", 30, _agreement.check, arguments

    def training(network, dtype, size, seconds):
        def run():
            _training.train_all(session, dataset(), network, dtype, size, seconds)

        return "training", "training", min(60, seconds), run, ()

    if options.smoke:
        particles = [(k, "unroll") for k in options.particles]
        return [
            steps("cnn_small", 8, "float32", particles),
            agreement("cnn_small", 8),
            training("cnn_small", "float32", 32, 60 * TRAINING_MINUTES),
            ensemble("cnn_small", 8, "float32", 2),
        ]
    wide, narrow = "wide_resnet_28_10", "resnet_18"
    # Unrolled, many particles compile for as long as all else of a group.
    most, *others = options.particles or [None]
    loops = [(most, how) for how in MAPS[:2] if most]
    rest = [(most, "unroll")] * bool(most)
    rest += [(k, how) for k in others for how in MAPS]

    def more(network, size, particles):
        names = {REFERENCE, *(f"OT-MDR K={k} {how}" for k, how in particles)}
        found = steps(network, size, particles=particles, only=names)
        return [found] if particles else []

    return [
        steps(wide, 128, particles=loops),
        steps(wide, 512),
        agreement("cnn_small", 32),
        training(narrow, "bfloat16", 512, 60 * TRAINING_MINUTES),
        steps(narrow, 128, particles=loops),
        ensemble("resnet_10", 128, "bfloat16", 5),
        steps(wide, 2048),
        *more(wide, 128, rest),
        steps(narrow, 512),
        steps(wide, 128, "float32"),
        steps(narrow, 2048),
        *more(narrow, 128, rest),
        steps(narrow, 128, "float32"),
        steps(wide, 512, "float32"),
        steps(narrow, 512, "float32"),
        *more(wide, 512, loops),
        *more(narrow, 512, loops),
        steps(narrow, 2048, "float32"),
        steps(wide, 2048, "float32"),
    ]


def main():
    parser = options_of(__doc__, "tiny networks, one round, on the CPU")
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="begin nothing that takes longer")
    add("--only", nargs="*", default=list(PARTS), choices=PARTS)
    add("--cifar10", metavar="FILE", help="the set to train on, an .npz")
    add("--particles", type=int, nargs="*", help="K beside 1; default 4 2, smoke 2")
    add("--rounds", type=int, default=31, help="at most")
    add("--threads", type=int, default=6, help="programs compiled at once")
    options = parser.parse_args()
    if options.particles is None:
        options.particles = [2] if options.smoke else [4, 2]
    if options.smoke:
        options.rounds, options.threads = 1, 2
        jax.config.update("jax_platforms", "cpu")
    session = Session(options)
    record = session.record

    # Images are decoded while PyTorch runs.
    reader = concurrent.futures.ThreadPoolExecutor(1)
    file = options.cifar10
    reading = reader.submit(_training.read, file) if file else None

    def dataset():
        if reading is None:
            raise Skipped("no file of CIFAR-10, --cifar10 FILE")
        return reading.result()

    if "pytorch" in options.only:
        session.attempt("pytorch", 60, run_pytorch, session)
    head = session.attempt("environment", 0, environment)
    if head is None:  # no device: nothing below can work
        sys.exit(1)
    record.update(head)
    session.say(f"{head['device']}, JAX {head['jax']}, {head['nvidia_smi']}")
    if jax.default_backend() == "cpu" and not options.smoke:
        sys.exit("JAX sees no accelerator: install jax[cuda13], or use --smoke.")
    if "peak" in options.only:
        measure_peak(session)
    for part, name, seconds, function, arguments in plan(session, dataset):
        if part in options.only:
            session.attempt(name, seconds, function, *arguments)
            # What has been met or missed so far, should the rest be cut off.
            record["targets"] = targets(record)
            session.save()

    rows = [
        [
            row["target"],
            "-" if row["measured"] is None else f"{row['measured']:.3f}",
            {True: "pass", False: "FAIL", None: "not measured"}[row["passed"]],
        ]
        for row in targets(record)
    ]
    print(f"\n{markdown(['target', 'measured', ''], rows)}\n")
    for name in record["skipped"]:
        print(f"skipped: {name}")
    for name, message in record["errors"].items():
        print(f"failed: {name}: {message[:200]}")
    session.say("done")


if __name__ == "__main__":
    main()
