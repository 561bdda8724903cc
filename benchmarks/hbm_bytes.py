"""Bytes that a compiled TPU program moves through HBM, counted in its optimized HLO text.

An instruction reads its operands and writes its results; a fusion counts as one instruction, and what it slices counts
as the slice alone. Layouts with `S(n)` are in VMEM or SMEM, and free. Arrays count with the padding of their tiles. The
bodies of loops count as often as they run: `known_trip_count` where the compiler wrote it, otherwise what the caller
says. On TPU v2 and v3 the compiler writes no S(n), so what it keeps on the chip there cannot be told: all counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(:[^{}]*)?\})?")
_HEAD = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|branch_computations)=\{?%([\w.\-]+)")
_FREE = frozenset(("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"))
_ALIASES = ("bitcast", "copy-done")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = result opcode(operands), attributes`."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called(self) -> str:
        found = _CALLED.search(self.attributes)
        assert found, f"{self.name} calls nothing"
        return found[1]


Computation = dict[str, Instruction]


def hbm_bytes(text: str, trips: Iterable[int] = ()) -> int:
    """Bytes that the program whose `compiled.as_text()` this is reads from and writes to HBM.

    Args:
        trips: the rounds of each loop whose number is not in the text, in program order, a body before what follows.

    Raises:
        ValueError: too many or too few of them.
    """
    left = iter(trips)
    total = sum(size * times for _, size, times in traffic(text, left))
    if next(left, None) is not None:
        raise ValueError("hbm_bytes: trips must be one number for each loop of unknown length, got more")
    return total


def traffic(text: str, trips: Iterator[int]) -> Iterator[tuple[Instruction, int, int]]:
    """(instruction, bytes each time, how often) of everything that is not free."""
    computations, entry = _parse(text)

    def walk(name: str, times: int) -> Iterator[tuple[Instruction, int, int]]:
        block = computations[name]
        for instruction in block.values():
            if instruction.opcode == "while":
                yield from walk(instruction.called, times * _rounds(instruction, trips))
            elif instruction.opcode == "call":
                yield from walk(instruction.called, times)
            elif instruction.opcode not in _FREE:
                yield instruction, _moved(instruction, block, computations), times

    return walk(entry, 1)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, block = "", {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            block = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, result, opcode, rest = found.groups()
            inside, _, attributes = rest.partition(")")
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            if opcode == "parameter":
                attributes = inside
            block[name] = Instruction(name, result, opcode, operands, attributes, bool(root))
    return computations, entry


def _rounds(loop: Instruction, trips: Iterator[int]) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    rounds = int(known[1]) if known else next(trips, None)
    if rounds is None:
        raise ValueError(
            f"hbm_bytes: trips must be one number for each loop of unknown length, got none for {loop.name}"
        )
    return rounds


def _moved(instruction: Instruction, block: Computation, computations: dict[str, Computation]) -> int:
    opcode, result = instruction.opcode, instruction.result
    operands = [block[name].result for name in instruction.operands]
    if opcode == "copy-start":
        size = _whole(operands[0])
        return size * (_on_hbm(operands[0]) + _on_hbm(result.lstrip("(")))
    if opcode.endswith("-done"):
        return 0
    assert not opcode.endswith("-start"), f"{opcode} is not known here"
    if opcode in ("dynamic-slice", "slice"):
        return _hbm(result) + _whole(result) * _on_hbm(operands[0])
    if opcode == "dynamic-update-slice":
        return _hbm(operands[1]) + _whole(operands[1]) * _on_hbm(result)
    if opcode != "fusion":
        return sum(map(_hbm, operands)) + _hbm(result)
    inside = computations[instruction.called]
    read = sum(_read(inside, index, computations) * _on_hbm(operand) for index, operand in enumerate(operands))
    return read + _written(inside, result, computations)


def _read(inside: Computation, index: int, computations: dict[str, Computation]) -> int:
    """Bytes of parameter `index` that a fusion reads: all, or no more than the slices that it takes."""
    parameter = next(x for x in inside.values() if x.opcode == "parameter" and x.attributes == str(index))
    names, read = {parameter.name}, 0
    for x in inside.values():
        for place, operand in enumerate(x.operands):
            if operand not in names:
                continue
            if x.opcode == "bitcast":
                names.add(x.name)
            elif x.opcode in ("dynamic-slice", "slice") and place == 0:
                read += _whole(x.result)
            elif x.opcode == "fusion":
                read += _read(computations[x.called], place, computations)
            elif x.opcode == "dynamic-update-slice" and place == 0:
                pass  # in place
            else:
                return _whole(parameter.result)
    return min(read, _whole(parameter.result))


def _written(inside: Computation, result: str, computations: dict[str, Computation]) -> int:
    """Bytes that a fusion writes: its results, of those updated in place only the update."""
    root = next(x for x in inside.values() if x.is_root)
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = 0
    for part, (size, on_hbm) in zip(parts, _arrays(result), strict=True):
        while part.opcode == "bitcast":
            part = inside[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            size = min(size, _whole(inside[part.operands[1]].result))
        elif part.opcode == "fusion":
            size = min(size, _written(computations[part.called], result, computations))
        written += size * on_hbm
    return written


@functools.cache
def _arrays(shape: str) -> tuple[tuple[int, bool], ...]:
    """(bytes with padding, lives in HBM) of every array of a shape."""
    found = []
    for dtype, dims, order, tiling in _ARRAY.findall(shape):
        sizes = [int(n) for n in dims.split(",") if n]
        minor_first = [sizes[int(axis)] for axis in order.split(",") if axis] or sizes[::-1]
        tile = re.match(r":T\(([\d,]+)\)", tiling)
        if tile and sizes:
            for place, side in enumerate(reversed([int(n) for n in tile[1].split(",")])):
                if place < len(minor_first):
                    minor_first[place] = -(-minor_first[place] // side) * side
        found.append((math.prod(minor_first) * _BYTES.get(dtype, 0), "S(" not in tiling))
    return tuple(found)


def _whole(shape: str) -> int:
    return sum(size for size, _ in _arrays(shape))


def _hbm(shape: str) -> int:
    return sum(size for size, on_hbm in _arrays(shape) if on_hbm)


def _on_hbm(shape: str) -> bool:
    return _arrays(shape)[0][1]
