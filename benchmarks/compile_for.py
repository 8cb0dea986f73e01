"""Compiles training steps for accelerators that are not here, and counts what they run.

    make compilers                        # XLA's, into .compilers; needs the newest JAX
    export PYTHONPATH=.compilers
    python benchmarks/compile_for.py h100                    # all cases of one GPU
    python benchmarks/compile_for.py h100x8 v5e-4 --match FSDP
    python benchmarks/compile_for.py v5e-1 --groups steps --model cnn_small
    python benchmarks/compile_for.py --table                 # the project's own records
    python benchmarks/compile_for.py --smoke                 # two small programs

Targets: h100, h100x8 (up to 8, or a multiple: eight share a node), and slices of TPUs,
v5e-1 to v5e-256, v6e-1 to v6e-256, v5p-4 to v5p-256. Groups: steps, options and
ensembles of one device; scaling and entries of several; methods and networks of either.
XLA's compilers for them run on any CPU. For each step: whether it compiles and in how
many processor seconds, the memory that it needs, the kernels that one execution runs by
kind, operations, bytes moved and exchanged, and what these take at the target's rates:
operations at the peak of products, bytes at the bandwidth of memory, exchange at that
of the links. The longest of the three is an estimate of the least that a step takes:
caches save some bytes. All figures are those of one device. Nothing is run: no time of
a step is measured.

Each target has its record, TARGET.json in --folder, which is written after each case.
Cases that it holds are not compiled again unless --again is given. It is of one
compiler, and each of its groups of one network: others need another --folder.
Expected: half a minute a case on 2 CPU cores, an hour for all of one H100; WRN-28-10
for TPUs ten minutes a case.
"""

import collections
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import sys
import time

# The CPU is JAX's own backend here, whatever plugins are installed.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from _cases import all_cases, of_networks  # noqa: E402
from _common import peak_mib  # noqa: E402
from _program import operations, summary  # noqa: E402
from _record import markdown, options_of, processor_name, write_json  # noqa: E402
from _targets import target_of  # noqa: E402

OWN_FOLDER = pathlib.Path("compiled")
FOLDER = pathlib.Path(__file__).parent / "results" / "compiled"
# Groups of the network of --model; the others have that of --network.
COMPARED = ("steps", "scaling")


def compile_case(target, make):
    """All that is known of a program, without running it."""
    with target.traced_for():
        case = make()
        with jax.set_mesh(case.mesh) if case.mesh else contextlib.nullcontext():
            start = time.process_time()
            lowered = case.function.lower(*case.arguments)
            traced = time.process_time()
            compiled = lowered.compile()
            done = time.process_time()
            counted = operations(case.function, *case.arguments)
    if case.divided:
        devices = len(target.devices)
        counted = {kind: count / devices for kind, count in counted.items()}
    memory = compiled.memory_analysis()
    found = {
        "images": case.images,
        "trace_seconds": round(traced - start, 2),
        "compile_seconds": round(done - traced, 2),
        "peak_mib": round(peak_mib(compiled), 1),
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "operations": counted,
        **summary(compiled.as_text()),
    }
    return {**found, "estimated_ms": estimate(target, found)}


def estimate(target, found):
    """Milliseconds at the target's rates, by what limits them."""
    chip = target.chip
    peaks = collections.defaultdict(lambda: chip.bfloat16)
    peaks["float32"] = chip.float32
    compute = sum(count / peaks[kind] for kind, count in found["operations"].items())
    limits = {
        "operations": compute,
        "memory": found["bytes"] / chip.bandwidth,
        "exchange": found.get("sent_bytes", 0) / target.exchange_rate(),
    }
    return {name: round(1e3 * seconds, 4) for name, seconds in limits.items()}


def head(target):
    """What a record says of its target and of the compiler."""
    packages = (
        "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax",
        "optax",
    )  # fmt: skip
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "target": target.name,
        "chip": target.chip._asdict(),
        "devices": len(target.devices),
        "versions": versions,
    }


def here():
    """Where and when a case was compiled: seconds of another day are no ratio."""
    return {
        "compiled_on": processor_name(),
        "date": datetime.date.today().isoformat(),
    }


def record_of(path):
    return json.loads(path.read_text()) if path.exists() else {"cases": {}}


def continued(target, groups, options):
    """The target's record, with its networks and the compiler of what is added.

    What it holds of other networks or compilers would be shown beside what is new.
    """
    path = options.folder / f"{target.name}.json"
    record, new = record_of(path), head(target)
    networks = record.get("networks", {})
    # A record of before a package was noted says nothing of its version.
    known = record.get("versions", {})
    now = {name: x for name, x in new["versions"].items() if name in known}
    asked = {
        name: options.model if name in COMPARED else options.network
        for name in (group if group in COMPARED else "others" for group in groups)
    }
    for what, held, wanted in (
        ("versions", known or None, now),
        *((f"the network of {x}", networks.get(x), asked[x]) for x in asked),
    ):
        if held not in (None, wanted):
            sys.exit(f"{path} differs in {what}: it has {held}, and what is asked for "
                     f"{wanted}. Use another --folder.")  # fmt: skip
    return {**record, **new, "networks": networks | asked}


def compile_all(name, options):
    target = target_of(name)
    path = options.folder / f"{name}.json"
    found = all_cases(target, options.model, options.network)
    if unknown := set(options.groups or ()) - set(found):
        sys.exit(f"{name} has no groups {', '.join(unknown)}, but {', '.join(found)}.")
    chosen = {x: found[x] for x in found if x in (options.groups or found)}
    record = continued(target, chosen, options)
    for group, cases in chosen.items():
        results = record["cases"].setdefault(group, {})
        for case, make in cases.items():
            if options.match not in case or (case in results and not options.again):
                continue
            # What ends the compiler's process ends this one: the record then says so.
            results[case] = {"error": "the compiler ended the process"}
            write_json(path, record)
            try:
                results[case] = {**compile_case(target, make), **here()}
            except Exception as error:  # any failure of the compiler is a result
                message = f"{type(error).__name__}: {error}"
                results[case] = {"error": message[:600]}
            write_json(path, record)
            print(f"{name}: {group}: {case}: {told(results[case])}", flush=True)


def told(found):
    if "error" in found:
        return f"FAILED, {found['error'][:300]}"
    limit = max(found["estimated_ms"], key=found["estimated_ms"].get)
    return (
        f"{found['compile_seconds']:.0f} s to compile, {found['peak_mib']:.0f} MiB, "
        f"{sum(found['kernels'].values())} kernels, estimated "
        f"{found['estimated_ms'][limit]:.2f} ms ({limit})"
    )


def table(record, group):
    """A line for each case of a group."""
    rows = []
    for name, x in record["cases"].get(group, {}).items():
        if "error" in x:
            rows.append([name, f"does not compile: {x['error'][:60]}", *[""] * 7])
            continue
        kernels = collections.Counter(x["kernels"])
        wide = kernels.pop("convolution", 0) + kernels.pop("product", 0)
        limit = max(x["estimated_ms"], key=x["estimated_ms"].get)
        known = "bytes" in x
        rows.append(
            [
                name,
                f"{x['compile_seconds']:.0f}",
                f"{x['peak_mib']:.4g}",
                wide,
                sum(kernels.values()) - kernels["prefetch"] - kernels["scalar"],
                f"{sum(x['operations'].values()) / 1e12:.3g}",
                f"{x['bytes'] / 1e9:.3g}" if known else "-",
                f"{x.get('sent_bytes', 0) / 1e6:.3g}",
                f"{x['estimated_ms'][limit]:.3g} ({limit})" if known else "-",
            ]
        )
    header = ["step", "compile s", "peak MiB", "convolutions, products"]
    header += ["other kernels", "TFLOP", "GB moved", "MB sent", "estimate, ms"]
    return markdown(header, rows)


def weak_scaling(records):
    """What more devices add to a step: a line for each step, columns for each record.

    Args:
      records: Those of 8, 64 and 256 devices, say, with as many images on each.
    """
    counts = [record["devices"] for record in records]
    rows = []
    for name, first in records[0]["cases"]["scaling"].items():
        alone = max(first["estimated_ms"][kind] for kind in ("operations", "memory"))
        whole = sum(first["exchanged_bytes"].values()) / 1e6
        row = [name, f"{alone:.2g}", f"{whole:.3g}"]
        for record in records:
            exchange = record["cases"]["scaling"][name]["estimated_ms"]["exchange"]
            row.append(f"{exchange:.2g} ({alone / max(alone, exchange):.2f} to ")
            row[-1] += f"{alone / (alone + exchange):.2f})"
        rows.append(row)
    header = ["step", "without exchange, ms", "MB all-reduced"]
    return markdown([*header, *(f"{n} devices: exchange, ms" for n in counts)], rows)


def exchanged(records):
    """What a chip of each target sends in a step: MB, and microseconds at its rate."""
    rows = []
    for name in records[0]["cases"]["scaling"]:
        found = [record["cases"]["scaling"][name] for record in records]
        rows.append([name])
        rows[-1] += [
            f"{x['sent_bytes'] / 1e6:.3g}, {1e3 * x['estimated_ms']['exchange']:.2g}"
            for x in found
        ]
    targets = [f"{record['target']}: MB sent, us" for record in records]
    return markdown(["step", *targets], rows)


def coverage(records):
    """A line for each group of each record: how many of its cases compile."""
    rows, zoo = [], set(of_networks(None))
    for record in records:
        for group, cases in record["cases"].items():
            good = [x for x in cases.values() if "error" not in x]
            seconds = [x["compile_seconds"] for x in good]
            network = record["networks"][group if group in COMPARED else "others"]
            if group == "networks":
                network = "the zoo" if {*cases} >= zoo else ", ".join(cases)
            rows.append(
                [
                    record["target"],
                    group,
                    network,
                    f"{len(good)} of {len(cases)}",
                    f"{min(seconds):.0f} to {max(seconds):.0f}" if good else "-",
                ]
            )
    return markdown(["target", "cases", "network", "compile", "seconds"], rows)


def main():
    parser = options_of(__doc__, "two small programs for one H100; no record")
    add = parser.add_argument
    add("targets", nargs="*", help="h100, h100x8, v5e-4, ...")
    add("--groups", nargs="*", help="steps, options, ensembles, methods, networks, ...")
    add("--match", default="", help="only cases with this in their name")
    add("--model", default="wide_resnet_28_10", help="of the groups steps, scaling")
    add("--network", default="resnet_10", help="of the other groups")
    add("--again", action="store_true", help="compile what the record holds too")
    add("--table", action="store_true", help="print the records; compile nothing")
    add("--folder", type=pathlib.Path, help="of the records; default compiled/, but "
        "for --table benchmarks/results/compiled/")  # fmt: skip
    options = parser.parse_args()
    if options.smoke:
        target = target_of("h100")
        for name in ("SGD", "OT-MDR K=1"):
            make = all_cases(target, "cnn_small", "cnn_small")["steps"][name]
            print(f"{name}: {told(compile_case(target, make))}")
        return
    if options.json:
        parser.error("each target has its own record: use --folder instead of --json.")
    options.folder = options.folder or (FOLDER if options.table else OWN_FOLDER)
    options.folder.mkdir(parents=True, exist_ok=True)
    names = options.targets or [p.stem for p in sorted(options.folder.glob("*.json"))]
    if not options.targets and not options.table:
        sys.exit("name a target, such as h100; --help lists them.")
    for name in names:
        if not options.table:
            compile_all(name, options)
        record = record_of(options.folder / f"{name}.json")
        for group in record["cases"]:
            print(f"\n{name}, {group}\n\n{table(record, group)}")
    records = [record_of(options.folder / f"{name}.json") for name in names]
    print(f"\nwhat compiles\n\n{coverage(records)}")
    alike = collections.defaultdict(list)
    for record in sorted(records, key=lambda record: record["devices"]):
        if "scaling" in record["cases"]:
            alike[record["networks"]["scaling"]].append(record)
    for network, several in alike.items():
        one_chip = len({record["chip"]["name"] for record in several}) == 1
        found = (weak_scaling if one_chip else exchanged)(several)
        print(f"\nexchange, {network}\n\n{found}")


if __name__ == "__main__":
    main()
