"""Times what a new user waits for: short `otmdr train`, `otmdr report`, `otmdr demo`.

    python benchmarks/first_minutes.py --json benchmarks/results/first_minutes_cpu.json
    python benchmarks/first_minutes.py --against OTHER_CHECKOUT --json FILE
    python benchmarks/first_minutes.py --smoke

Each command runs in a process of its own: `train --epochs 5` with an empty cache of
programs (cold) and again with what that left there (warm), `report` on five runs, and
`demo` with an empty cache. Wall clock and processor seconds of each, and of `train`
what is left of both without its steps, which keep one processor busy. With --against
the same commands of another checkout run in turn with these. Medians. Expected: 7
minutes on 2 CPU cores, and as long again for another checkout.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from _common import environment
from _record import markdown, options_of, write_json

HERE = pathlib.Path(__file__).resolve().parent.parent
# Of the five runs that are reported: two methods are two seeds of one.
RUNS = (("sgd", 0), ("sgd", 1), ("sam", 0), ("asam", 0), ("otmdr", 0))


def otmdr(code, cache, *words):
    """Runs the command line of a checkout; its wall clock and processor seconds."""
    own = {"PYTHONPATH": str(code), "XDG_CACHE_HOME": str(cache)}
    gone = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    others = {k: v for k, v in os.environ.items() if k not in gone}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "otmdr_jax", *map(str, words)],
        env={**others, **own},
        # Python looks there first, before PYTHONPATH.
        cwd=code,
        check=True,
        capture_output=True,
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "processor": used}


def train(code, cache, output, length):
    """Trains a short run, and takes the time of its steps off."""
    found = otmdr(code, cache, "train", "--quiet", "--output", output, *length)
    result = json.loads((output / "result.json").read_text())
    steps = result["steps"] * result["seconds_per_step"]
    beyond = {f"{name}_beyond_steps": x - steps for name, x in found.items()}
    return found | beyond


def commit_of(code):
    """The commit of a clone, with "-dirty" where it was changed; None for no clone."""
    if not (code / ".git").exists():  # git would find the clone around it
        return None
    words = ["git", "-C", str(code), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(words, capture_output=True, text=True)
    return found.stdout.strip() or None


def five_runs(folder, length, runs):
    """Trains the runs that are reported; their folders."""
    folders = []
    for method, seed in runs:
        folders.append(folder / f"{method}{seed}")
        words = ("--quiet", "--method", method, "--seed", seed, *length)
        otmdr(HERE, folder / "cache", "train", "--output", folders[-1], *words)
    return folders


def one_round(code, own, length, folders, with_demo):
    """Command -> its numbers; `own` is a folder that is not there yet."""
    cache = own / "cache"
    found = {
        "cold": train(code, cache, own / "cold", length),
        "warm": train(code, cache, own / "warm", length),
        "report": otmdr(code, cache, "report", *folders, "--output", own / "page"),
    }
    if with_demo:
        words = ("demo", "--quiet", "--output", own / "demo")
        found["demo"] = otmdr(code, own / "fresh", *words)
    return found


def summarise(rounds):
    """Command -> the median of each of its numbers over the rounds."""
    return {
        kind: {
            **{x: statistics.median(one[kind][x] for one in rounds) for x in names},
            "n": len(rounds),
        }
        for kind, names in rounds[0].items()
    }


def table(results):
    """A row for each command of each code."""
    header = ["code", "command", "n", "wall, s", "processor, s"]
    header += ["wall beyond steps, s", "processor beyond steps, s"]
    names = ("wall", "processor", "wall_beyond_steps", "processor_beyond_steps")
    rows = [
        [name, kind, one["n"]] + [f"{one[x]:.1f}" if x in one else "-" for x in names]
        for name, kinds in results.items()
        for kind, one in kinds.items()
    ]
    return markdown(header, rows)


def main():
    parser = options_of(__doc__, "three steps, one round, two runs, no demo")
    parser.add_argument("--against", help="another checkout, such as one of before")
    parser.add_argument("--runs", nargs="+", help="report these, not five new ones")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    codes = {"this": HERE}
    if options.against:
        codes["other"] = pathlib.Path(options.against).resolve()
    commits = {name: commit_of(code) for name, code in codes.items()}
    length = ("--steps", "3") if options.smoke else ("--epochs", "5")
    every = {name: [] for name in codes}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        runs = RUNS[::2][:2] if options.smoke else RUNS
        folders = [pathlib.Path(x).resolve() for x in options.runs or ()]
        folders = folders or five_runs(scratch, length, runs)
        for turn in range(1 if options.smoke else options.rounds):
            for name, code in codes.items():
                own = scratch / f"{name}{turn}"
                every[name].append(
                    one_round(code, own, length, folders, not options.smoke)
                )
                print(f"round {turn + 1}: {name}", flush=True)
            found = {name: summarise(rounds) for name, rounds in every.items()}
            record = {**environment(), "commits": commits, "results": found}
            write_json(options.json, record)
    print(table(found))


if __name__ == "__main__":
    main()
