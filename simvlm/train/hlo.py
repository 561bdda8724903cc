"""What a compiled program's text says of its collectives: kinds, bytes, and how often they run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|branch_computations)=\{?([^,}]+(?:, ?%[\w.\-]+)*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


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
    computations, entry = _parse(text)
    counts: dict[str, int] = defaultdict(int)
    sent: dict[str, float] = defaultdict(float)
    for opcode, line, times in _walk(computations, entry, 1):
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            counts[kind] += times
            sent[kind] += times * _sent(kind, line, opcode.endswith("-start"))
    return {kind: Traffic(counts[kind], round(sent[kind])) for kind in KINDS if counts[kind]}


def _parse(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    computations: dict[str, list[tuple[str, str]]] = {}
    entry, block = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            block = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            block.append((found[3], line))
    return computations, entry


def _walk(computations: dict[str, list[tuple[str, str]]], name: str, times: int) -> Iterator[tuple[str, str, int]]:
    for opcode, line in computations[name]:
        yield opcode, line, times
        if opcode in ("while", "fusion", "call", "conditional", "async-start"):
            inner = times * (_rounds(computations, line) if opcode == "while" else 1)
            for called in _CALLED.findall(line):
                for one in re.findall(r"[\w.\-]+", called):
                    if one in computations:
                        yield from _walk(computations, one, inner)


def _rounds(computations: dict[str, list[tuple[str, str]]], line: str) -> int:
    """Of a loop: as the compiler notes them, or what its condition compares a counter from 0 with; else 1."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = [line for _, line in computations.get(condition[1] if condition else "", [])]
    limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
    counts = any("ROOT" in line and " compare(" in line and "direction=LT" in line for line in lines)
    return int(limits[0]) if counts and len(limits) == 1 else 1


def _sent(kind: str, line: str, starts: bool) -> float:
    result = line.partition(" = ")[2].partition(f" {kind}")[0]
    arrays = [
        math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(dtype, 4) for dtype, dims in _ARRAY.findall(result)
    ]
    # The start of an asynchronous one gives its operands and its results; the larger half is what matters.
    size = max(arrays, default=0) if starts and kind != "all-reduce" else sum(arrays)
    if starts and kind == "all-reduce" and result.startswith("(("):
        size //= 2
    devices = _group(line)
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
