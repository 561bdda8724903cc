"""`prefix_attention` against SDPA, eager PyTorch, torch.compile and FlexAttention.

One contest a case, dtype and direction. Ours is called through the public function. "both" is forward and backward:
gradients of q, k, v and of the table.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.attention_cases import BENCHMARKS, GPU_BENCHMARKS, named
from benchmarks.attention_peers import PEERS, Attend, Peer
from benchmarks.attention_problem import Problem
from benchmarks.contest import Contestant, Stopwatch
from benchmarks.record import Settings, Subject, first_line, record
from simvlm.kernels import parity, prefix_attention
from simvlm.kernels.attention import OP, spec
from simvlm.kernels.attention.table import IMPLS
from simvlm.kernels.parity import DTYPES

DTYPES_TIMED = ("float32", "bfloat16")
QUICK_CASES = ("pretrain", "captions", "decode")
CHECKED_ELSEWHERE = (
    "Its kernels meet their error budgets on the cases of the tests; at this size the column error tells."
)
REFERENCE_SCORES = 2**20
"""The reference is timed too where it has at most this many scores."""

Refusal = tuple[str, str, str]


def bench_prefix_attention(
    stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str
) -> None:
    torch.compiler.reset()  # else the second case's shape would count as dynamic and get a slower program
    found = named(case)
    problem = Problem(found, dtype, settings.device)
    contestants, refused, red = ours(problem, direction)
    contestants += variants(problem, direction, contestants)
    for peer in PEERS:
        if not peer.takes_part(problem, direction):
            continue
        kind = "peer" if peer.exact(problem) else "bound"
        if settings.quick and peer.compiled:
            refused.append((peer.name, kind, "left out by --quick"))
        else:
            contestants.append(contestant(problem, direction, peer, kind))
    subject = Subject(
        op=OP,
        case=case,
        shape=described(found),
        dtype=dtype,
        direction=direction,
        flops=spec.flops(found, direction),
        bytes_moved=spec.bytes_moved(found, direction, DTYPES[dtype].itemsize),
        flops_formula=first_line(spec.flops),
        bytes_formula=first_line(spec.bytes_moved),
        checked=CHECKED_ELSEWHERE if found in GPU_BENCHMARKS else None,
    )
    record(benchmark, stopwatch, settings, subject, contestants, refused)
    if red:
        pytest.fail(f"{OP}: misses its error budget and gets no time: {'; '.join(red)}", pytrace=False)


def compile_ahead(case: str, dtype: str, direction: str, device: str) -> None:
    """Compiles what the contest's peers will, into torch's cache on disk."""
    problem = Problem(named(case), dtype, device)
    for peer in PEERS:
        if peer.compiled and peer.takes_part(problem, direction):
            contestant(problem, direction, peer, "peer" if peer.exact(problem) else "bound").call()


def ours(problem: Problem, direction: str) -> tuple[list[Contestant], list[Refusal], list[str]]:
    """Our contestants in order of preference, the rows without a time, and what is red."""
    contestants: list[Contestant] = []
    refused: list[Refusal] = []
    red: list[str] = []
    table = problem.table if direction == "both" else None
    for impl in IMPLS:
        if impl.family != "torch" or impl.unavailable() is not None:
            continue  # what this machine lacks is said once, in the head of the report
        q, k, v = (problem.stored[name] for name in "qkv")
        name = f"simvlm {impl.name}"
        reason = impl.module.unsupported(q, k, v, problem.layout, table)
        if impl.name == "reference":
            small = problem.mask.numel() * problem.case.heads <= REFERENCE_SCORES
            if contestants and not small:
                continue
            kind = "reference" if contestants or red else "ours"
        else:
            kind = "ours"
            unchecked = reason or problem.case in GPU_BENCHMARKS
            found = [] if unchecked else parity.violations(spec, problem.case, "torch", impl.name, problem.dtype)
            if found:
                red.append(f"{impl.name}: {', '.join(map(str, found))}")
                reason = f"no time: misses the error budget ({found[0]})"
        if reason is not None:
            refused.append((name, kind, reason))
            continue
        contestants.append(contestant(problem, direction, public(impl.name), kind))
    return contestants, refused, red


def variants(problem: Problem, direction: str, ours: list[Contestant]) -> list[Contestant]:
    """The fastest of ours under other conditions: without the table; on a CPU, forward alone, on one thread too."""
    name = next((contestant.name for contestant in ours if contestant.kind == "ours"), None)
    if name is None or (problem.device == "cpu" and direction != "forward"):
        return []
    found = []
    peer = public(name.removeprefix("simvlm "))
    if problem.table is not None:
        without = dataclasses.replace(peer, name=f"{name}, no table", prepare=lambda p: _without_table(peer.prepare(p)))
        found.append(contestant(problem, direction, without, "bound"))
    if problem.device == "cpu" and torch.get_num_threads() > 1:
        alone = contestant(problem, direction, dataclasses.replace(peer, name=f"{name}, one thread"), "variant")
        call = alone.call

        def on_one_thread() -> Any:
            with machine.threads(1):
                return call()

        found.append(dataclasses.replace(alone, call=on_one_thread))
    return found


def _without_table(attend: Attend) -> Attend:
    return lambda q, k, v, table: attend(q, k, v, None)


def public(impl: str) -> Peer:
    """The public function with one implementation, entered like any peer."""

    def prepare(problem: Problem) -> Attend:
        layout, scale = problem.layout, problem.case.scale
        return lambda q, k, v, table: prefix_attention(q, k, v, layout, rel_bias=table, scale=scale, impl=impl)

    return Peer(name=f"simvlm {impl}", what=f"prefix_attention(impl={impl!r})", prepare=prepare, packed=True)


def contestant(problem: Problem, direction: str, peer: Peer, kind: str) -> Contestant:
    """Binds the tensors: `call` returns (out,) or (out, dq, dk, dv[, dtable])."""
    inputs = problem.inputs(peer.packed)
    both, exact = direction == "both", peer.exact(problem) and kind != "bound"
    leaves: list[Tensor] = [
        inputs[name].detach().clone().requires_grad_(both) for name in ("q", "k", "v", "rel_bias") if name in inputs
    ]
    dout = inputs["dout"]
    attend: list[Attend] = []

    def call() -> tuple[Tensor, ...]:
        if not attend:
            attend.append(peer.prepare(problem))  # here, so that a peer that fails to prepare is a row with a reason
        q, k, v, *table = leaves
        with torch.set_grad_enabled(both):
            out = attend[0](q, k, v, table[0] if table else None)
            # A bound leaves the table out, so its gradient may be missing; nobody else's may.
            return (out, *torch.autograd.grad(out, leaves, dout, allow_unused=not exact)) if both else (out,)

    def error(result: tuple[Tensor, ...]) -> float:
        return problem.error(result[0], peer.packed)

    return Contestant(name=peer.name, what=peer.what, kind=kind, call=call, error=error if exact else None)


def selection(cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
    """(case, dtype, direction) of every contest; empty lists mean all that are timed by default."""
    names = cases or [case.name for case in BENCHMARKS if not quick or case.name in QUICK_CASES]
    return [
        (name, dtype, direction)
        for name in names
        for dtype in dtypes or DTYPES_TIMED
        for direction in (("forward", "both") if named(name).gradients else ("forward",))
    ]


def described(case: spec.Case) -> str:
    """The case's shape in a line."""
    layout = case.layout()
    form = "packed" if case.padded is None else f"padded to {case.padded[0]}×{case.padded[1]}"
    parts = [
        f"{layout.batch} sequences, {form}",
        f"{_range(layout.q_lens)} queries",
        f"{_range(layout.k_lens)} keys",
        f"{case.heads} heads of {case.head_dim}",
    ]
    if case.cross:
        parts.append("cross-attention")
    elif (layout.prefix_lens >= layout.k_lens).all():
        parts.append("bidirectional")
    else:
        parts.append(f"prefix {_range(layout.prefix_lens)}" if layout.prefix_lens.any() else "causal")
    if case.has_table and case.image_grid:
        parts.append(f"table over {case.image_grid[0]}×{case.image_grid[1]} patches")
    return ", ".join(parts)


def _range(lengths: Any) -> str:
    low, high = int(lengths.min(initial=2**31 - 1)), int(lengths.max(initial=0))
    return str(high) if low >= high else f"{low}–{high}"
