"""Bytes that a compiled TPU program moves through HBM, counted in its optimized HLO text.

    python -m benchmarks.hbm_bytes [v3:2x2 v5p:2x2x1 …]
    python -m benchmarks.hbm_bytes --hlo FILE

The first compiles attention with the table's gradient, forward and backward, ours (`xla`) and
`jax.nn.dot_product_attention` with a dense bias, and compares; the second counts a program that `simvlm tpu-plan
--save-hlo` wrote. Neither needs a TPU.

An instruction reads its operands and writes its results; a fusion counts as one instruction, and what it slices counts
as the slice alone. Layouts with `S(n)` are in VMEM or SMEM, and free. Arrays count with the padding of their tiles. The
bodies of loops count as often as they run: as the text says, otherwise as the caller says. On TPU v2 and v3 the
compiler writes no S(n), so what it keeps on the chip there cannot be told: all counts.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from simvlm.train.hlo import BYTES, Computation, Instruction, parse, rounds
from simvlm.train.tpu_plan import set_environment

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(:[^{}]*)?\})?")
_FREE = frozenset(("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"))


def hbm_bytes(text: str, trips: Iterable[float] = ()) -> int:
    """Bytes that the program whose `compiled.as_text()` this is reads from and writes to HBM.

    Args:
        trips: the rounds of each loop whose number is not in the text, in program order, a body before what follows.

    Raises:
        ValueError: too many or too few of them.
    """
    left = iter(trips)
    total = round(sum(size * times for _, size, times in traffic(text, left)))
    if next(left, None) is not None:
        raise ValueError("hbm_bytes: trips must be one number for each loop of unknown length, got more")
    return total


def traffic(text: str, trips: Iterator[float]) -> Iterator[tuple[Instruction, int, float]]:
    """(instruction, bytes each time, how often) of everything that is not free."""
    computations, entry = parse(text)

    def walk(name: str, times: float) -> Iterator[tuple[Instruction, int, float]]:
        block = computations[name]
        for instruction in block.values():
            if instruction.opcode == "while":
                yield from walk(instruction.called[0], times * _rounds(computations, block, instruction, trips))
            elif instruction.opcode in ("call", "call-start", "async-start"):
                yield from walk(instruction.called[0], times)
            elif instruction.opcode not in _FREE:
                yield instruction, _moved(instruction, block, computations), times

    return walk(entry, 1)


def _rounds(
    computations: dict[str, Computation], block: Computation, loop: Instruction, trips: Iterator[float]
) -> float:
    found: float | None = rounds(computations, block, loop)
    if found is None:
        found = next(trips, None)
    if found is None:
        raise ValueError(
            f"hbm_bytes: trips must be one number for each loop of unknown length, got none for {loop.name}"
        )
    return found


def _moved(instruction: Instruction, block: Computation, computations: dict[str, Computation]) -> int:
    opcode, result = instruction.opcode, instruction.result
    operands = [block[name].result for name in instruction.operands]
    if opcode in ("copy-start", "slice-start"):  # what it gives begins with where it writes, or with what it reads
        parts = _arrays(result)[:2]
        return min(size for size, _ in parts) * sum(on_hbm for _, on_hbm in parts)
    if opcode.endswith("-done"):
        return 0
    assert not opcode.endswith("-start"), f"{opcode} is not known here"
    if opcode in ("dynamic-slice", "slice"):
        return _hbm(result) + _whole(result) * _on_hbm(operands[0])
    if opcode == "dynamic-update-slice":
        return _hbm(operands[1]) + _whole(operands[1]) * _on_hbm(result)
    if opcode != "fusion":
        return sum(map(_hbm, operands)) + _hbm(result)
    inside = computations[instruction.called[0]]
    read = sum(_read(inside, index, computations) * _on_hbm(operand) for index, operand in enumerate(operands))
    return read + _written(inside, result, computations)


def _read(inside: Computation, index: int, computations: dict[str, Computation]) -> int:
    """Bytes of parameter `index` that a fusion reads: all, or no more than the slices that it takes."""
    parameter = next(x for x in inside.values() if x.opcode == "parameter" and x.inside == str(index))
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
                read += _read(computations[x.called[0]], place, computations)
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
            size = min(size, _written(computations[part.called[0]], result, computations))
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
        found.append((math.prod(minor_first) * BYTES.get(dtype, 0), "S(" not in tiling))
    return tuple(found)


def _whole(shape: str) -> int:
    return sum(size for size, _ in _arrays(shape))


def _hbm(shape: str) -> int:
    return sum(size for size, on_hbm in _arrays(shape) if on_hbm)


def _on_hbm(shape: str) -> bool:
    return _arrays(shape)[0][1]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One packed sequence of `rows` rows that begins with side² patches, all of them and `text` tokens its prefix."""

    name: str
    side: int
    text: int
    rows: int

    @property
    def prefix(self) -> int:
        return self.side**2 + self.text

    def trips(self, block_t: int, block_s: int) -> list[float]:
        """Of the six loops over blocks whose lengths are the layout's: the mean over the loops around them.

        Twice forward (maximum, then sums) and once backward: blocks in which the table counts, then the others.
        """
        patches, queries, keys = self.side**2, -(-self.rows // block_t), -(-self.rows // block_s)
        biased = -(-patches // block_t) * -(-patches // block_s)
        forward = sum(-(-max(self.prefix, (t + 1) * block_t) // block_s) for t in range(queries)) - biased
        begins = (0 if s * block_s < self.prefix else s * block_s // block_t for s in range(keys))
        backward = sum(queries - begin for begin in begins) - biased
        return [biased / queries, forward / queries] * 2 + [biased / keys, backward / keys]


SHAPES = (
    Shape("patches alone", side=64, text=0, rows=4096),
    Shape("patches and text", side=30, text=100, rows=4096),
)
HEADS, HEAD_DIM = 16, 64


def attention_bytes(topology: str, shape: Shape) -> tuple[int, int]:
    """Of (ours, dense): forward and backward with the table's gradient, bfloat16, 16 heads of 64.

    Dense is `jax.nn.dot_product_attention` with a mask and a bias of every pair, looked up in the table: what there is
    without a kernel that knows tables.
    """
    set_environment()  # before jax is imported
    import jax
    import jax.numpy as jnp
    from jax.experimental.topologies import get_topology_desc

    from simvlm.kernels import PrefixLayout, prefix_attention
    from simvlm.kernels.attention.xla_blocks import BLOCK_S, BLOCK_T

    rows, side, patches = shape.rows, shape.side, shape.side**2
    layout = PrefixLayout.packed([rows], prefix_lens=[shape.prefix], image_grid=(side, side))
    device = get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def ours(q: Any, k: Any, v: Any, table: Any, _: Any) -> Any:
        return prefix_attention(q, k, v, layout, rel_bias=table, impl="xla")

    def dense(q: Any, k: Any, v: Any, table: Any, index: Any) -> Any:
        bias = jnp.take(table.reshape(HEADS, -1), index, axis=1)
        bias = jnp.pad(bias, ((0, 0), (0, rows - patches), (0, rows - patches)))
        i, j = jnp.arange(rows)[:, None], jnp.arange(rows)
        mask = (j <= i) | (j < shape.prefix)
        return jax.nn.dot_product_attention(q[None], k[None], v[None], bias[None], mask[None, None])[0]

    def text(attend: Any) -> str:
        def step(q: Any, k: Any, v: Any, table: Any, index: Any, dout: Any) -> Any:
            out, pull = jax.vjp(lambda *x: attend(*x, index), q, k, v, table)
            return out, pull(dout)

        def struct(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        x = struct((rows, HEADS, HEAD_DIM), jnp.bfloat16)
        table = struct((HEADS, 2 * side - 1, 2 * side - 1), jnp.float32)
        index = struct((patches, patches), jnp.int32)
        return str(jax.jit(step).lower(x, x, x, table, index, x).compile().as_text())

    return hbm_bytes(text(ours), shape.trips(BLOCK_T, BLOCK_S)), hbm_bytes(text(dense))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("topologies", nargs="*", default=["v3:2x2", "v5p:2x2x1"])
    parser.add_argument("--hlo", help="a program's text instead, as `simvlm tpu-plan --save-hlo` writes it")
    arguments = parser.parse_args()
    if arguments.hlo:
        sizes: collections.Counter[str] = collections.Counter()
        for instruction, size, times in traffic(Path(arguments.hlo).read_text(), itertools.repeat(1)):
            sizes[instruction.opcode] += round(size * times)
        print(f"{sum(sizes.values()) / 1e9:.2f} GB; loops of unknown length counted once")
        for opcode, size in sizes.most_common(12):
            print(f"  {opcode:24} {size / 1e9:8.2f} GB")
        return
    print("| TPU | 4,096 rows | ours, GB | dense bias, GB | ratio |\n| --- | --- | --- | --- | --- |")
    for topology, shape in itertools.product(arguments.topologies, SHAPES):
        ours, dense = attention_bytes(topology, shape)
        print(f"| {topology} | {shape.name} | {ours / 1e9:.2f} | {dense / 1e9:.2f} | {dense / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
