"""Reading programs: operations of a traced one, kernels and bytes of a compiled one."""

import collections
import itertools
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# What takes no time of its own: names for memory, and ends of what began before.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "domain",
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_LAYOUT_ONLY = {"parameter", "copy", "transpose", "bitcast", "reshape", "convert"}


class Instruction(NamedTuple):
    """A line of a compiled program."""

    name: str
    shape: str
    opcode: str
    rest: str

    def operands(self):
        """The names between the brackets."""
        steps = ((x == "(") - (x == ")") for x in self.rest)
        depths = itertools.accumulate(steps, initial=1)
        end = next((i for i, depth in enumerate(depths) if not depth), None)
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    def attribute(self, name):
        """The computation that an attribute such as `body` names, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    def target(self):
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]+)"', self.rest)
        return found[1] if found else ""


class Kernel(NamedTuple):
    """An instruction that runs.

    Attributes:
      instruction: The line.
      kind: What it mostly does.
      times: How often it runs in one execution of the program.
      bytes: What it reads from memory and writes to it.
      exchanged: Of a collective the bytes of the array that it makes of all devices'
        parts, or takes apart.
      sent: Of a collective the bytes that a device sends for that, in a ring.
    """

    instruction: Instruction
    kind: str
    times: int
    bytes: int
    exchanged: int = 0
    sent: float = 0.0


class Program:
    """The text of a compiled program, read."""

    def __init__(self, text):
        self.computations = {}
        self.unknown_loops = 0
        sizes = [
            int(found[1])
            for name in ("replica_count", "num_partitions")
            if (found := re.search(rf"(?m)^HloModule .*\b{name}=(\d+)", text))
        ]
        self.devices = math.prod(sizes)
        self.entry = None
        current = None
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = found[2]
                self.computations[current] = []
                if found[1]:
                    self.entry = current
            elif current and (found := _INSTRUCTION.match(line)):
                self.computations[current].append(Instruction(*found.groups()))

    def kernels(self):
        """What runs, in the order of the schedule; of a loop once, with its count."""
        return list(self._run(self.entry, 1))

    def _run(self, computation, times):
        instructions = self.computations[computation]
        shapes = {x.name: x.shape for x in instructions}
        # What began before is there at the end: a start's shape holds operands too.
        ends = {
            x.operands()[0]: x.shape
            for x in instructions
            if x.opcode.endswith("-done") and x.operands()
        }
        for x in instructions:
            if x.opcode in _FREE or x.opcode.endswith(("-done", "-update")):
                continue
            if x.opcode == "while":
                length = self.trip_count(x)
                self.unknown_loops += length is None
                yield from self._run(x.attribute("body"), times * (length or 1))
            elif x.opcode == "call":
                yield from self._run(x.attribute("to_apply"), times)
            elif x.opcode == "conditional":
                named = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
                names = (
                    re.findall(r"%?([\w.\-]+)", named[1])
                    if named
                    else [
                        x.attribute("true_computation"),
                        x.attribute("false_computation"),
                    ]
                )
                branches = [list(self._run(name, times)) for name in names]
                yield from max(branches, key=len)  # the longest one
            else:
                kind = self.kind(x)
                operands = [shapes.get(name, "") for name in x.operands()]
                result = ends.get(x.name, x.shape)
                if x.opcode == "custom-call":
                    result = without_workspace(result)
                if kind == "prefetch":  # a copy of a part; the rest is not read
                    moved = all_bytes(result)
                else:
                    moved = sum(map(outer_bytes, self.touched(x, operands, result)))
                if kind == "elementwise" and moved <= 64 and x.opcode != "fusion":
                    kind = "scalar"
                if kind not in COLLECTIVES:
                    yield Kernel(x, kind, times, moved)
                    continue
                whole = max(sum(map(all_bytes, operands)), all_bytes(result))
                others = 1 - 1 / self.group_size(x)
                share = {"all-reduce": 2 * others, "collective-permute": 1}
                sent = whole * share.get(kind, others)
                yield Kernel(x, kind, times, moved, whole, sent)

    def touched(self, x, operands, result):
        """Shapes of what an instruction reads and writes: of slices, the part alone.

        XLA joins small arrays to exchange them, and reads each from what is joined.
        """
        if x.opcode in ("slice", "dynamic-slice"):
            return [result, result]
        if x.opcode == "dynamic-update-slice":  # in place
            return [operands[1], operands[1]]
        if not x.opcode.endswith("fusion"):
            return [*operands, result]
        inside = self.computations[x.attribute("calls")]
        shapes = {y.name: y.shape for y in inside}
        index = {}  # the operands by their names inside
        for y in inside:
            if y.opcode == "parameter":
                index[y.name] = int(re.match(r"\d+", y.rest)[0])
            elif y.opcode == "bitcast" and y.operands()[0] in index:
                index[y.name] = index[y.operands()[0]]
        used = [[] for _ in operands]
        for y in inside:
            for position, name in enumerate(y.operands()):
                if name not in index or y.opcode == "bitcast":
                    continue
                if position == 0 and y.opcode in ("slice", "dynamic-slice"):
                    used[index[name]].append(y.shape)
                elif position or y.opcode != "dynamic-update-slice":
                    used[index[name]].append(operands[index[name]])
        parts = [" ".join(shapes) for shapes in used]
        read = [
            part if all_bytes(part) < outer_bytes(operand) else operand
            for part, operand in zip(parts, operands, strict=True)
        ]
        if inside[-1].opcode == "dynamic-update-slice":
            result = shapes[inside[-1].operands()[1]]
        return [*read, result]

    def trip_count(self, loop):
        """How often a loop runs, by the compiler's notes or its condition, or None."""
        found = re.search(r'known_trip_count"?[:=]\s*\{"?n"?:\s*"?(\d+)', loop.rest)
        if found:
            return int(found[1])
        *before, last = self.computations[loop.attribute("condition")]
        if last.opcode == "compare" and "direction=LT" in last.rest:  # i < constant
            limits = {x.name: x.rest for x in before if x.opcode == "constant"}
            found = re.match(r"(\d+)\)", limits.get(last.operands()[1], ""))
        return int(found[1]) if found else None

    def group_size(self, x):
        """How many devices exchange with each other in a collective."""
        called = x.attribute("calls")
        rest = self.computations[called][-1].rest if called else x.rest
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return found[1].count(",") + 1
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
            return int(found[2])
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            return math.prod(int(sizes[x]) for x in re.findall(r"'(\w+)'", found[2]))
        return self.devices

    def kind(self, x):
        """What an instruction mostly does: convolution, product, reduction, ..."""
        opcode = x.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            return opcode
        if x.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            return "prefetch"
        if opcode == "async":
            called = self.computations[x.attribute("calls")]
            return self.kind(called[-1])
        if opcode in ("fusion", "custom-fusion"):
            inside = self.computations[x.attribute("calls")]
            opcodes = self._opcodes(inside)
            labels = [y.rest for y in inside if y.opcode == "convolution"]
            if any("window={" in rest for rest in labels):
                return "convolution"
            if labels or "dot" in opcodes:
                return "product"
            if opcodes <= _LAYOUT_ONLY and opcodes & {"copy", "transpose"}:
                return "transpose" if _moves_axes(inside) else "copy"
            if opcodes & {"reduce", "reduce-window"}:
                return "reduction"
            return "elementwise"
        if opcode == "custom-call":
            target = x.target()
            if "conv" in target.lower():
                return "convolution"
            if "gemm" in target.lower() or "matmul" in target.lower():
                return "product"
            return f"custom call {target}"
        if opcode == "convolution":
            return "convolution" if "window={" in x.rest else "product"
        names = {"dot": "product", "reduce": "reduction", "reduce-window": "reduction"}
        if opcode in names or opcode in ("copy", "transpose"):
            return names.get(opcode, opcode)
        return "elementwise"

    def _opcodes(self, instructions):
        """Of a fusion and of what it calls."""
        found = {x.opcode for x in instructions}
        for x in instructions:
            if x.opcode in ("fusion", "call"):
                called = x.attribute("calls") or x.attribute("to_apply")
                found |= self._opcodes(self.computations[called])
        return found - {"fusion", "call", "constant", "tuple", "get-tuple-element"}

    def fused_collectives(self):
        """Collectives inside of fusions, which TPUs have: their exchange is not read.

        A fusion begins one, others run beside it, another ends it: one channel.
        """
        return len(
            {
                re.search(r"channel_id=\d+|$", x.rest)[0] or x.name
                for instructions in self.computations.values()
                for fusion in instructions
                if fusion.opcode.endswith("fusion")
                for x in self.computations[fusion.attribute("calls")]
                if x.opcode.removesuffix("-start") in COLLECTIVES
            }
        )

    def overlap(self):
        """Kernels that the schedule puts between a collective's start and its end.

        Returns:
          (collectives, of which asynchronous, kernels that run beside them).
        """
        total = apart = beside = 0
        wrapped = {
            x.attribute("calls")
            for instructions in self.computations.values()
            for x in instructions
            if x.opcode == "async-start" or x.opcode.endswith("fusion")
        }
        for name, instructions in self.computations.items():
            if name in wrapped:
                continue
            open_, count = {}, 0
            for x in instructions:
                starts = x.opcode.endswith("-start")
                if x.opcode.removesuffix("-start") in COLLECTIVES or (
                    x.opcode == "async-start" and self.kind(x) in COLLECTIVES
                ):
                    total += 1
                    if starts:
                        apart += 1
                        open_[x.name] = count
                elif x.opcode.endswith("-done"):
                    start = next((n for n in x.operands() if n in open_), None)
                    if start is not None:
                        beside += count - open_.pop(start)
                elif x.opcode not in _FREE:
                    count += 1
        return total, apart, beside


def _moves_axes(instructions):
    return any(x.opcode == "transpose" for x in instructions)


def _arrays(shape):
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if dtype not in ("token", "opaque"):
            bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
            count = math.prod(int(n) for n in sizes.split(",") if n)
            yield count * bits // 8, layout


def all_bytes(shape):
    """Bytes of an instruction's result."""
    return sum(size for size, _ in _arrays(shape))


def outer_bytes(shape):
    """The same without what lies in a TPU's own fast memory, S(1) in its layout."""
    return sum(size for size, layout in _arrays(shape) if "S(" not in layout)


def without_workspace(shape):
    """The shape of a custom call's result without scratch memory, bytes at its end."""
    return re.sub(r",\s*[su]8\[\d+\](\{[^}]*\})?\s*\)$", ")", shape)


def summary(text):
    """What a compiled program runs.

    Args:
      text: Its own text, `compiled.as_text()`.

    Returns:
      A dict: "kernels", by kind; "bytes", moved to and from memory by them all; with
      collectives also "exchanged_bytes", by kind, of whole arrays; "sent_bytes", what a
      device sends for them in a ring; and what the schedule hides of them.
    """
    program = Program(text)
    kernels, exchanged = collections.Counter(), collections.Counter()
    moved = sent = 0
    for kernel in program.kernels():
        kernels[kernel.kind] += kernel.times
        moved += kernel.times * kernel.bytes
        sent += kernel.times * kernel.sent
        if kernel.kind in COLLECTIVES:
            exchanged[kernel.kind] += kernel.times * kernel.exchanged
    total, apart, beside = program.overlap()
    found = {"kernels": dict(sorted(kernels.items())), "bytes": moved}
    if fused := program.fused_collectives():
        found["collectives in fusions, not counted"] = fused
    if program.unknown_loops:  # as those of rejection sampling; counted as one round
        found["loops of unknown length"] = program.unknown_loops
    if total:
        found["exchanged_bytes"] = dict(exchanged)
        found["sent_bytes"] = round(sent)
        found["collectives"] = {
            "in the program": total,
            "asynchronous": apart,
            "kernels beside them": beside,
        }
    return found


def operations(function, *arguments):
    """Floating-point operations of the convolutions and products of a traced function.

    2 x multiply-adds, without those whose factor is a zero of padding or dilation. The
    body of a scan counts as often as it runs, of conditionals the dearer branch, of
    loops of unknown length one round; inside `jax.shard_map` it is those of one device.

    Args:
      function: Any function.
      *arguments: Its arguments, or their shapes.

    Returns:
      The dtype of the factors -> operations.
    """
    return dict(_operations(jax.make_jaxpr(function)(*arguments).jaxpr))


def _operations(jaxpr):
    total = collections.Counter()
    for eqn in jaxpr.eqns:
        dtype = str(eqn.invars[0].aval.dtype) if eqn.invars else ""
        if eqn.primitive.name == "conv_general_dilated":
            total[dtype] += _of_convolution(eqn)
        elif eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracting)
            total[dtype] += 2 * math.prod(eqn.outvars[0].aval.shape) * inner
        elif eqn.primitive.name == "cond":
            branches = [_operations(b.jaxpr) for b in eqn.params["branches"]]
            total.update(max(branches, key=lambda c: sum(c.values())))
        else:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            for inner in jaxprs_in_params(eqn.params):
                for key, value in _operations(inner).items():
                    total[key] += times * value
    return total


def _of_convolution(eqn):
    left, right = (x.aval.shape for x in eqn.invars)
    p = eqn.params
    numbers = p["dimension_numbers"]
    pairs = 1
    for i, (low, high) in enumerate(p["padding"]):
        size, window = left[numbers.lhs_spec[2 + i]], right[numbers.rhs_spec[2 + i]]
        stride, dilation = p["window_strides"][i], p["lhs_dilation"][i]
        steps = p["rhs_dilation"][i]
        padded = low + high + (size - 1) * dilation + 1
        outputs = (padded - (window - 1) * steps - 1) // stride + 1
        at = np.arange(outputs)[:, None] * stride + np.arange(window) * steps - low
        inside = (at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)
        pairs *= int(inside.sum())
    batch = left[numbers.lhs_spec[0]] // p["batch_group_count"]
    features, inputs = (right[axis] for axis in numbers.rhs_spec[:2])
    return 2 * batch * pairs * features * inputs
