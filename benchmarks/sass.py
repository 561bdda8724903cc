"""What a compiled GPU kernel's warps must issue: its inner loops, instructions counted by kind, from `cuobjdump -sass`.

A loop reaches from a backward branch's target to the branch. A kernel's inner loops are those with matrix instructions
that hold no smaller one; where the kernel has no matrix instruction, all loops that hold no other. (Waiting on a
barrier is a loop too, of a few instructions, inside the one that counts.)
"""

from __future__ import annotations

import re

KINDS = ("matrix", "load_store", "math", "exp", "conversions", "integer", "other")

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_OPCODES = (
    ("matrix", r"[HIDQBO]?G?MMA|UTC\w*MMA"),
    ("load_store", r"(LD|ST)[GSL]?|LDSM|STSM|LDGSTS|LDTM|STTM|ATOM\w*|REDG?|UTMA(LDG|STG|REDG)|UBLK(CP|RED)|UTCCP"),
    ("exp", r"MUFU"),
    ("conversions", r"F2FP?|F2I|I2FP?|I2F|F2F|I2I|FRND"),
    ("math", r"F(ADD|MUL|FMA)2?|F(MNMX3?|SEL|SETP?|SWZADD|CHK)|H(ADD|MUL|FMA|MNMX|SETP?)2|D(ADD|MUL|FMA|SETP)"),
    (
        "integer",
        r"U?(IADD3?|IMAD|IMUL|IABS|ISETP|IMNMX|LEA|LOP3?|SHF|SHL|SHR|SEL|PRMT|MOV|SGXT|BMSK|FLO|POPC|PLOP3|VIADD)"
        r"|VI\w+|IDP|CS2R|S2U?R|R2UR|R2P|P2R|U?LDCU?|ULDC|UP2UR|UR2UP|MOVM",
    ),
)


def kind(opcode: str, modifiers: str = "") -> str:
    """One of KINDS. `HADD2.F32` widens 16 bits to 32, which is what compilers use it for."""
    if opcode == "HADD2" and ".F32" in modifiers:
        return "conversions"
    return next((name for name, pattern in _OPCODES if re.fullmatch(pattern, opcode)), "other")


def instructions(sass: str) -> list[tuple[int, str, int | None]]:
    """(address, kind, target of a branch or None) of every instruction, in the order of addresses."""
    found = []
    for address, opcode, modifiers, operands in _LINE.findall(sass):
        target = _TARGET.search(operands) if opcode == "BRA" else None
        found.append((int(address, 16), kind(opcode, modifiers), int(target[1], 16) if target else None))
    return found


def inner_loops(sass: str) -> list[dict[str, int]]:
    """For each inner loop, in the order of addresses, its instructions of each kind and their "total"."""
    code = instructions(sass)
    # A branch to itself, after the exit, is padding.
    spans = sorted({(target, address) for address, _, target in code if target is not None and target < address})
    counted = {}
    for begin, end in spans:
        inside = [kind for address, kind, _ in code if begin <= address <= end]
        counted[begin, end] = {name: inside.count(name) for name in KINDS} | {"total": len(inside)}
    if any(kind == "matrix" for _, kind, _ in code):
        counted = {span: counts for span, counts in counted.items() if counts["matrix"]}
    return [
        counts
        for (begin, end), counts in counted.items()
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in counted)
    ]


def ratios(loops: list[dict[str, int]], plain: list[dict[str, int]]) -> list[float]:
    """Instructions of each loop over those of the loop that does the same work in the kernel without the extra.

    Every plain loop is taken to be still there: it is paired with the loop nearest to it in length. What remains is
    what the extra added, paired in order where it is as many, otherwise with the shortest plain loop.
    """
    pairs: dict[int, int] = {}
    for other, counts in enumerate(plain):
        free = [i for i in range(len(loops)) if i not in pairs]
        if free:
            pairs[min(free, key=lambda i: abs(loops[i]["total"] - counts["total"]))] = other
    added = [i for i in range(len(loops)) if i not in pairs]
    if plain:
        shortest = min(range(len(plain)), key=lambda i: plain[i]["total"])
        for place, i in enumerate(added):
            pairs[i] = place if len(added) == len(plain) else shortest
    return [loops[i]["total"] / plain[pairs[i]]["total"] for i in range(len(loops)) if i in pairs]
