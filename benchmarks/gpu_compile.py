"""`python -m benchmarks.gpu_compile`: every Triton kernel as shipped, compiled for GPUs that need not be there.

    python -m benchmarks.gpu_compile                                            everything (make gpu-compile)
    python -m benchmarks.gpu_compile --targets sm_90 --head-dims 64 --dtypes bfloat16 --json out.json

The package's own launchers run on CPU tensors; only the launch itself is recorded and then compiled ahead of time, so
that signature, constants, alignment and options are those of a real call. Each call is made with two batches of
different lengths: what the second would compile anew is named too. A new kernel is included by its op's row in CALLS.

Exit status 1, with the reason, where a bf16 or fp16 kernel spills, a kernel takes more shared or tensor memory than the
chip has, does not compile, compiles again as lengths change, or has a matrix product off the tensor cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import sass
from simvlm.kernels import PrefixLayout
from simvlm.kernels.attention import triton_gpu, triton_gpu_launch
from simvlm.kernels.stem import triton_gpu as stem_gpu
from simvlm.kernels.stem.places import places

SHARED_BYTES = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Shared memory that one block may have on H100 and B200 (CUDA C++ Programming Guide, compute capabilities), and for
sm_80 what 8.6, 8.9 and 12.0 allow, which take the same choices; A100 has 163 KB."""
GATHERING_MAY_SPILL = {"sm_80": 32}
"""Bytes: a few registers of kernels that gather the table, and cannot take other tiles than those that load it."""
TENSOR_MEMORY_COLUMNS = 512
MATRIX = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma_sync": "mma.sync"}
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (8, 16, 32, 64, 72, 80, 128)
BATCHES = ([230, 60], [200, 7, 193, 12, 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One public call in one configuration.

    Attributes:
        launch: makes the call for a batch of these lengths, on CPU tensors of which nothing is read.
        table: None where the op has none; two calls that differ in this alone are compared.
    """

    op: str
    dtype: str
    shape: str
    table: bool | None
    launch: Callable[[list[int]], None]

    @property
    def name(self) -> str:
        table = {None: "", False: " no table", True: " table"}[self.table]
        return f"{self.op} {self.dtype} {self.shape}{table}"


def attention(lens: list[int], *, dtype: str, head_dim: int, table: bool, padded: bool, offsets: bool = False) -> None:
    """`prefix_attention`, forward and every gradient; with `offsets` the kernels gather the table."""
    heads = 2
    shared: dict[str, Any] = {
        "prefix_lens": [n // 2 for n in lens],
        "image_grid": (14, 14),
        "has_image": [n >= 196 for n in lens],
        "q_offsets": 0 if offsets else None,
    }
    shape: tuple[int, ...] = (sum(lens),)
    layout = PrefixLayout.packed(lens, **shared)
    if padded:
        shape = (len(lens), max(lens))
        layout = PrefixLayout.padded(*shape, q_lens=lens, **shared)
    layout = layout.to("cpu")
    q, k, v, dout = (torch.empty(*shape, heads, head_dim, dtype=getattr(torch, dtype)) for _ in range(4))
    rel_bias = torch.empty(heads, 27, 27) if table else None
    out, lse = triton_gpu.forward(q, k, v, layout, rel_bias, 0.1)
    triton_gpu.backward(
        dout, torch.empty_like(lse), q, k, v, out, lse, layout, rel_bias, 0.1, (True, True, True, table)
    )


def decode(lens: list[int], *, dtype: str, head_dim: int) -> None:
    """`prefix_attention` of one query over four times so many keys, in chunks: forward alone, without a table."""
    keys = [4 * n for n in lens]
    layout = PrefixLayout.packed([1] * len(lens), keys, prefix_lens=0, q_offsets=[n - 1 for n in keys]).to("cpu")
    q, k, v = (torch.empty(rows, 2, head_dim, dtype=getattr(torch, dtype)) for rows in (len(lens), *[sum(keys)] * 2))
    triton_gpu.forward(q, k, v, layout, None, 0.1)


def batch_norm(lens: list[int], *, dtype: str, channels: int, plain: bool) -> None:
    """`batch_norm_act`'s four halves, without residual and branch scale if `plain`; images change with the lengths."""
    shape = (len(lens), lens[0] // 4, lens[0] // 4, channels)
    x, dy, residual = (torch.empty(shape, dtype=getattr(torch, dtype)) for _ in range(3))
    weight, bias = torch.empty(2, channels)
    mean, var = stem_gpu.batch_norm_statistics(x)
    added, branch_scale = (None, None) if plain else (residual, torch.empty(len(lens)))
    y = stem_gpu.batch_norm_apply(x, mean, var, weight, bias, added, branch_scale, 1e-5, "relu")
    kept, act = (None, "relu") if plain else (y, "none")
    sums = stem_gpu.batch_norm_backward_reductions(dy, x, kept, mean, var, weight, bias, branch_scale, 1e-5, "relu")
    dz = dy if sums[2] is None else sums[2]
    stem_gpu.batch_norm_backward_apply(dz, x, mean, var, weight, bias, branch_scale, sums[0], sums[1], 1e-5, act)


def embed(lens: list[int], *, dtype: str, channels: int, width: int | None) -> None:
    """`embed_sequence` and every gradient, over enough images that the weight's is summed in chunks."""
    has_image = [n >= 196 for n in lens] * 24
    layout = PrefixLayout.packed(lens * 24, image_grid=(14, 14), has_image=has_image)
    placed = places(torch.as_tensor(layout.bounds), torch.stack).int()
    columns = width or channels
    features = torch.empty(sum(has_image), 14, 14, channels, dtype=getattr(torch, dtype))
    weight = torch.empty(columns, channels, dtype=features.dtype) if width else None
    text = torch.empty(sum(lens) * 24 - sum(has_image) * 196, columns, dtype=features.dtype)
    bias, positions = torch.empty(columns), torch.empty(196, columns)
    rows = stem_gpu.embed_sequence(features, weight, bias, positions, text, placed, None)
    kept = None if weight is None else features
    stem_gpu.embed_sequence_backward(
        rows, kept, weight, placed, tuple(features.shape), text.shape[0], None, (True,) * 5
    )


def _attention_calls(dtype: str, head_dims: list[int], padded: bool) -> Iterator[list[Call]]:
    for head_dim in head_dims:
        make = functools.partial(Call, op="prefix_attention", dtype=dtype)
        launch = functools.partial(attention, dtype=dtype, head_dim=head_dim, padded=padded)
        yield [
            make(shape=f"H={head_dim}", table=table, launch=functools.partial(launch, table=table))
            for table in (False, True)
        ]
        offsets = functools.partial(launch, table=True, offsets=True)
        yield [make(shape=f"H={head_dim} offsets", table=True, launch=offsets)]
        few = functools.partial(decode, dtype=dtype, head_dim=head_dim)
        yield [make(shape=f"H={head_dim} decode", table=False, launch=few)]


def _batch_norm_calls(dtype: str, head_dims: list[int], padded: bool) -> Iterator[list[Call]]:
    make = functools.partial(Call, op="batch_norm_act", dtype=dtype, table=None)
    for channels in (64, 256, 80):
        for plain in (False, True):
            launch = functools.partial(batch_norm, dtype=dtype, channels=channels, plain=plain)
            yield [make(shape=f"C={channels}{' plain' if plain else ''}", launch=launch)]


def _embed_calls(dtype: str, head_dims: list[int], padded: bool) -> Iterator[list[Call]]:
    make = functools.partial(Call, op="embed_sequence", dtype=dtype, table=None)
    for width in (768, None):
        launch = functools.partial(embed, dtype=dtype, channels=256, width=width)
        yield [make(shape=f"C=256 D={width}" if width else "C=256 identity", launch=launch)]


Calls = Callable[[str, list[int], bool], Iterator[list[Call]]]
CALLS: dict[str, Calls] = {
    "prefix_attention": _attention_calls,
    "batch_norm_act": _batch_norm_calls,
    "embed_sequence": _embed_calls,
}
"""Of each op with Triton kernels: its calls in one dtype, of these head_dims, padded or packed; those of a list are
compared with each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What Triton's launcher was given, as its compiler takes it."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]


def recorded(target: str, launch: Callable[[], None]) -> dict[str, Launch]:
    """The launches that `launch` makes on a device of this target, by what a GPU's cache would tell them apart by."""
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(_gpu(target))
    found: dict[str, Launch] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, given = bind(*args, **kwargs)
        key = f"{kernel.__name__} {specialization} {given}"
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, given)
        found[key] = Launch(
            kernel=kernel, signature=signature, constants=constants, attributes=attributes, options=options.__dict__
        )

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(_capability(target), 10)),
        mock.patch.object(triton_gpu_launch, "capability", return_value=_capability(target)),
    ):
        launch()
    return found


def compiled(target: str, launch: Launch) -> dict[str, Any]:
    """Resources, matrix instructions and inner loops of one kernel."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    binary = triton.compile(source, _gpu(target), launch.options)
    cubin, ttgir = binary.asm["cubin"], binary.asm["ttgir"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "-sass"))
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spilled_bytes": _number(r"STACK:(\d+)", usage),
        "shared_bytes": binary.metadata.shared,
        "tensor_memory_columns": getattr(binary.metadata, "tmem_size", None) or 0,
        **{name: binary.asm["ptx"].count(text) for name, text in MATRIX.items()},
        # A dot that kept the layout of plain arithmetic is computed by FMAs.
        "products_off_tensor_cores": len(re.findall(r"tt\.dot\b[^\n]*->\s*tensor<[^>]*#blocked\d*>", ttgir)),
        "cubin_bytes": len(cubin),
        "num_warps": binary.metadata.num_warps,
        "loops_instructions": sass.inner_loops(code),
    }


def rows_of(target: str, calls: list[Call]) -> list[dict[str, Any]]:
    """One row for each kernel of these calls; a kernel that two of them launch alike is compiled once."""
    rows, known = [], {}
    for call in calls:
        first, second = (recorded(target, functools.partial(call.launch, lens)) for lens in BATCHES)
        for key, launch in (first | second).items():
            if key not in known:
                try:
                    with contextlib.redirect_stdout(io.StringIO()):  # Triton prints all of the PTX that ptxas refused
                        known[key] = compiled(target, launch)
                except Exception as error:  # whatever a compiler raises is what is to be told
                    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                    told = next((line for line in lines if "fatal" in line), "".join(lines[:1]))
                    known[key] = {"error": f"{type(error).__name__}: {told}"}
            row = {"target": target, "op": call.op, "dtype": call.dtype, "shape": call.shape, "table": call.table}
            rows.append(row | {"call": call.name, "kernel": launch.kernel.__name__, "again": key not in first})
            rows[-1] |= known[key]
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Gives each kernel with table "loops_ratio", instructions of its loops over those without."""
    plain = {
        (row["target"], row["op"], row["dtype"], row["shape"], row["kernel"]): row
        for row in rows
        if row["table"] is False and "error" not in row
    }
    for row in rows:
        other = plain.get((row["target"], row["op"], row["dtype"], row["shape"], row["kernel"]))
        if row["table"] and other and "error" not in row:
            row["loops_ratio"] = sass.ratios(row["loops_instructions"], other["loops_instructions"])


def failures(row: dict[str, Any]) -> list[str]:
    """What is wrong with one kernel."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["again"]:
        found.append("is compiled again when a batch's lengths change")
    allowed = GATHERING_MAY_SPILL.get(row["target"], 0) if "offsets" in row["shape"] else 0
    if row["spilled_bytes"] > allowed and row["dtype"] in ("bfloat16", "float16"):
        found.append(f"spills {row['spilled_bytes']} bytes")
    if row["shared_bytes"] > SHARED_BYTES[row["target"]]:
        found.append(f"takes {row['shared_bytes']} bytes of shared memory, a block has {SHARED_BYTES[row['target']]}")
    if row["tensor_memory_columns"] > TENSOR_MEMORY_COLUMNS:
        found.append(f"takes {row['tensor_memory_columns']} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
    if row["products_off_tensor_cores"]:
        found.append(f"has {row['products_off_tensor_cores']} matrix products off the tensor cores")
    return found


def main(arguments: list[str] | None = None, calls: dict[str, Calls] = CALLS) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", type=_listed, default=list(SHARED_BYTES), help="with commas: sm_80,sm_90,sm_100")
    parser.add_argument("--ops", type=_listed, default=list(calls), help="with commas")
    parser.add_argument("--dtypes", type=_listed, default=list(DTYPES), help="with commas")
    parser.add_argument("--head-dims", type=_listed, default=[str(n) for n in HEAD_DIMS], help="with commas")
    parser.add_argument("--padded", action="store_true", help="padded storage (default: packed, which has more code)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - set(SHARED_BYTES):
        parser.error(f"--targets must be of {', '.join(SHARED_BYTES)}, got {', '.join(sorted(unknown))}")
    if unknown := set(options.ops) - set(calls):
        parser.error(f"--ops must be of {', '.join(calls)}, got {', '.join(sorted(unknown))}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET must not be set: nothing is compiled in the interpreter")

    started = time.monotonic()
    jobs = []
    for dtype in options.dtypes:
        for op in options.ops:
            for group in calls[op](dtype, [int(head_dim) for head_dim in options.head_dims], options.padded):
                jobs += [(target, group) for target in options.targets]
    rows = []
    print(_HEADER)
    with _pool(options.processes) as map_over:
        for part in map_over(rows_of, *zip(*jobs, strict=True)):
            compare(part)
            for row in part:
                print(_shown(row), flush=True)
            rows += part
    complaints = [f"{row['target']} {row['call']} {row['kernel']}: {what}" for row in rows for what in failures(row)]
    print(f"\n{len(rows)} kernels in {time.monotonic() - started:.0f} s, {len(complaints)} failures")
    for line in complaints:
        print(line)
    if options.json:
        options.json.write_text(json.dumps({"kernels": rows, "failures": complaints}, indent=1) + "\n")
    return 1 if complaints or not rows else 0


_HEADER = (
    "loops: matrix/load+store/math/exp/conversions/integer/other = instructions (× without table)\n"
    f"{'target':7}{'call':46}{'kernel':20}{'regs':>5}{'spill B':>8}{'shared B':>9}{'wgmma':>6}{'tcgen05':>8}"
    f"{'mma.sync':>9}{'cubin B':>8}  loops"
)


def _shown(row: dict[str, Any]) -> str:
    begin = f"{row['target']:7}{row['call']:46}{row['kernel']:20}"
    if "error" in row:
        return begin + row["error"]
    ratios = [f" (×{ratio:.2f})" for ratio in row.get("loops_ratio", ())]
    loops = [
        "/".join(str(loop[kind]) for kind in sass.KINDS) + f" = {loop['total']}" for loop in row["loops_instructions"]
    ]
    if len(ratios) == len(loops):
        loops = [loop + ratio for loop, ratio in zip(loops, ratios, strict=True)]
    return (
        begin + f"{row['registers']:5}{row['spilled_bytes']:8}{row['shared_bytes']:9}{row['wgmma']:6}{row['tcgen05']:8}"
        f"{row['mma_sync']:9}{row['cubin_bytes']:8}  " + "; ".join(loops)
    )


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    if processes == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as executor:
        yield executor.map


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", _capability(target), 32)


def _cuobjdump(option: str, cubin: str) -> str:
    from triton.backends import nvidia

    program = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([program, option, cubin], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text!r}"
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
