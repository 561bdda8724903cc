"""A compiled program's text, parsed; and what it says of its collectives: kinds, bytes, and how often they run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = result opcode(operands), attributes`.

    Attributes:
        inside: what stands between the parentheses, a constant's value or a parameter's number among it.
        operands: names in it.
    """

    name: str
    result: str
    opcode: str
    inside: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs; of a loop, the body."""
        return [name for found in _CALLED.findall(self.attributes) for name in re.findall(r"[\w.\-]+", found)]


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the name of the one that is the program) of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, block = "", {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            block = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, result, opcode, rest = found.groups()
            inside, _, attributes = rest.partition(")")
            block[name] = Instruction(name, result, opcode, inside, attributes, bool(root))
    return computations, entry


def rounds(computations: dict[str, Computation], block: Computation, loop: Instruction) -> int | None:
    """Of a loop in `block`: as the compiler notes them, or by its counter from 0 to a constant; else None."""
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    named = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    condition = computations.get(named[1], {}) if named else {}
    compare = next((x for x in condition.values() if x.is_root), None)
    if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, limit = (condition[name] for name in compare.operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    if place is None or limit.opcode != "constant":
        return None
    first = _origin(block, loop.operands[0], int(place[1]))
    return int(limit.inside) if first is not None and first.opcode == "constant" and first.inside == "0" else None


def _origin(block: Computation, state: str, place: int) -> Instruction | None:
    """What a loop's state begins with at a place, copies seen through."""
    found = block.get(state)
    if found is None or found.opcode != "tuple":
        return None
    found = block.get(found.operands[place])
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = block.get(found.operands[0])
    return found


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind of collective, on one device, a run of the program: how many, and bytes sent over links."""

    count: int
    sent_bytes: int


def collectives(text: str) -> dict[str, Traffic]:
    """By kind. A ring's bytes: (n-1)/n of the gathered or scattered array, twice that of a reduced one, n devices.

    Loops of unknown length count once: the model's loops over layers and micro-batches are of known length.

    Args:
        text: `compiled.as_text()`.
    """
    computations, entry = parse(text)
    counts: dict[str, int] = defaultdict(int)
    sent: dict[str, float] = defaultdict(float)
    for instruction, times in _walk(computations, entry, 1):
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            counts[kind] += times
            sent[kind] += times * _sent(kind, instruction)
    return {kind: Traffic(counts[kind], round(sent[kind])) for kind in KINDS if counts[kind]}


def _walk(computations: dict[str, Computation], name: str, times: int) -> Iterator[tuple[Instruction, int]]:
    for x in computations[name].values():
        yield x, times
        if x.opcode in ("while", "fusion", "call", "conditional", "async-start"):
            inner = times * ((rounds(computations, computations[name], x) or 1) if x.opcode == "while" else 1)
            for called in x.called:
                if called in computations:
                    yield from _walk(computations, called, inner)


def _sent(kind: str, instruction: Instruction) -> float:
    result, starts = instruction.result, instruction.opcode.endswith("-start")
    arrays = [
        math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(dtype, 4) for dtype, dims in _ARRAY.findall(result)
    ]
    # The start of an asynchronous one gives its operands and its results; the larger half is what matters.
    size = max(arrays, default=0) if starts and kind != "all-reduce" else sum(arrays)
    if starts and kind == "all-reduce" and result.startswith("(("):
        size //= 2
    devices = _group(instruction.attributes)
    share = (devices - 1) / devices if devices else 1.0
    if kind == "reduce-scatter":
        return size * devices * share if not starts else size * share
    return size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _group(line: str) -> int:
    """Devices of one replica group; 0 where all of them take part."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        # 'axis_0':(2)4 is a part of an axis, of size 4.
        return math.prod(int(axis.rpartition(")")[2] if ":" in axis else sizes[axis]) for axis in named[2].split(","))
    return 0
