"""What the benchmarks write down; imports neither JAX nor PyTorch."""

import argparse
import json
import os
import platform
import subprocess


def options_of(doc, smoke=None):
    """A parser of the options that benchmarks share, to add others to.

    Args:
      doc: What the benchmark says of itself.
      smoke: What --smoke does; None where there is no such option.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="also write everything to this file")
    if smoke is not None:
        parser.add_argument("--smoke", action="store_true", help=smoke)
    return parser


def write_json(path, record):
    """Replaces the file in one go, so that a kill leaves the last whole one."""
    if path:
        with open(f"{path}.part", "w") as file:
            json.dump(record, file, indent=1)
        os.replace(f"{path}.part", path)


def markdown(header, rows):
    """A table: `header` names columns, `rows` are lists of their cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def nvidia_smi():
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor_name():
    """What the operating system calls the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line for line in file if line.startswith("model name")]
        return names[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.processor()
