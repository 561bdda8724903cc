"""`make quick`: what runs here, that it is right, and how fast it is; a look of less than a minute, not a result."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.attention_cases import named
from benchmarks.attention_peers import PEERS
from benchmarks.attention_problem import Problem
from benchmarks.bench_attention import contestant, described, ours
from benchmarks.contest import Contest, Contestant
from simvlm import doctor
from simvlm.kernels import batch_norm_act, implementations, parity
from simvlm.kernels.attention import spec as attention_spec
from simvlm.kernels.stem import batch_norm_spec, embed_spec

_CASES = 6
"""of each op: the smallest of the core tier"""
_SPECS = {"prefix_attention": attention_spec, "batch_norm_act": batch_norm_spec, "embed_sequence": embed_spec}
_ROUNDS = 7
_SHAPE = (64, 32, 32, 64)
"""of the images of batch_norm_act"""
_INTERPRETED = ("triton",)
"""takes CPU tensors in its interpreter alone, one tile in milliseconds"""


def main() -> int:
    """Returns 1 where a kernel misses its error budget."""
    console = Console()
    began = time.perf_counter()
    console.print(doctor.report(), highlight=False)
    console.print(f"\nagainst the reference: how many of {_CASES} cases are within the error budget", highlight=False)
    table, missed = _parity()
    console.print(table)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for direction, words in (("forward", "forward"), ("both", "forward and backward, the table's gradient included")):
        problem = Problem(named("pretrain"), "float32", device)
        peers = [peer for peer in PEERS if not peer.compiled and peer.exact(problem)]
        rivals = [contestant(problem, direction, peer, "peer") for peer in peers if peer.takes_part(problem, direction)]
        title = f"prefix_attention, {described(problem.case)}, float32, {words}"
        console.print(f"\n{title}", highlight=False)
        console.print(_speeds([*ours(problem, direction)[0], *rivals]))
    console.print(f"\nbatch_norm_act, relu, {list(_SHAPE)}, float32, forward and backward", highlight=False)
    console.print(_speeds(_batch_norm(device)))
    console.print(f"{time.perf_counter() - began:.0f} s; whole measurements: make bench, all tests: make test")
    return 1 if missed else 0


def _parity() -> tuple[Table, int]:
    """The table, and how many cases miss the budget."""
    missed = 0
    table = Table("op", "arrays", "kernel", "float32", "bfloat16")
    for op, spec in _SPECS.items():
        cases = [case for case in spec.CASES if case.tier == "core"]
        cases = sorted(cases, key=lambda case: sum(x.size for x in spec.make_inputs(case).values()))[:_CASES]
        for status in implementations(op):
            if not status.available or status.name in ("reference", *_INTERPRETED):
                continue
            cells = []
            for dtype in ("float32", "bfloat16"):
                passed = sum(not parity.violations(spec, case, status.family, status.name, dtype) for case in cases)
                missed += len(cases) - passed
                cells.append(f"{passed} of {len(cases)}")
            table.add_row(op, status.family, status.name, *cells)
    return table, missed


def _speeds(contestants: Sequence[Contestant]) -> Table:
    contest = Contest(contestants, contestants[0].name)
    contest.warm_up()
    for _ in range(_ROUNDS):
        contest.round()
    table = Table("contestant", "ms", "× ours")
    for name, timing in contest.timings().items():
        table.add_row(name, f"{timing.median_ms:.1f}", f"{timing.ratio:.2f}")
    return table


def _batch_norm(device: str) -> list[Contestant]:
    x = torch.randn(_SHAPE, device=device, requires_grad=True)
    weight, bias = torch.ones(_SHAPE[-1], device=device), torch.zeros(_SHAPE[-1], device=device)

    def call(impl: str) -> Any:
        y, _, _ = batch_norm_act(x, weight, bias, impl=impl)
        return torch.autograd.grad(y.sum(), x)

    names = [s.name for s in implementations("batch_norm_act") if s.family == "torch" and s.available]
    return [
        Contestant(name=f"simvlm {name}", what="", kind="ours", call=functools.partial(call, name)) for name in names
    ]


if __name__ == "__main__":
    sys.exit(main())
