"""One op of the stem against its peers: what bench_batch_norm.py and bench_embed.py share.

Problems, peers and our implementations all compute one array from arrays by name, those of the op's `make_inputs`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import stem_cases
from benchmarks.contest import Contestant, Stopwatch
from benchmarks.record import Settings, Subject, first_line, record
from simvlm.kernels import OPS, parity
from simvlm.kernels.parity import DTYPES

DTYPES_TIMED = ("float32", "bfloat16")
CHECKED_ELSEWHERE = (
    "Its kernels meet their error budgets on the cases of the tests; at this size the column error tells."
)

Compute = Callable[[dict[str, Tensor]], Tensor]
"""The op: inputs by name → its first output."""
Refusal = tuple[str, str, str]


class Problem:
    """One case in one dtype on one device.

    Attributes:
        inputs: of `make_inputs`, the cotangent among them; parameters in float32, zeros where no sequence owns the row.
        layout: the case's, on the device, or None.
        leaves: names of the inputs that get gradients.
    """

    def __init__(self, spec: ModuleType, case: Any, dtype: str, device: str, seed: int = 0) -> None:
        self.spec, self.case, self.dtype, self.device = spec, case, dtype, device
        layout = case.layout()
        self.layout = None if layout is None else layout.to(device)
        self.inputs = {
            name: x.to(torch.float32 if name in parity.PARAMETERS else DTYPES[dtype]).to(device)
            for name, x in _inputs(spec, case, device, seed).items()
        }
        self.leaves = [name for name in spec.DIFFERENTIABLE if name in self.inputs]

    @property
    def cotangent(self) -> Tensor:
        return self.inputs[f"d{self.spec.OUTPUTS[0]}"]

    def error(self, out: Tensor) -> float:
        """rms of the output's error against the reference in float64, relative to the output's rms."""
        truth = _truth(self.spec, self.case, self.dtype, self.device)
        return float(((out.detach().double() - truth).square().mean() / truth.square().mean()).sqrt())


def _inputs(spec: ModuleType, case: Any, device: str, seed: int) -> dict[str, Tensor]:
    """float32, by name."""
    if case not in stem_cases.BATCH_NORM_GPU:
        return {name: torch.from_numpy(np.nan_to_num(x)) for name, x in spec.make_inputs(case, seed).items()}
    # numpy would draw a hundred million numbers, and look for relu's kinks among them, for minutes.
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, device=device, generator=generator)
    channels = case.shape[3]
    inputs = {"weight": 1 + 0.3 * draw(channels), "bias": 0.5 * draw(channels)}
    return inputs | {name: draw(*case.shape) for name in ("x", "dy", *(("residual",) if case.residual else ()))}


@functools.lru_cache(maxsize=1)
def _truth(spec: ModuleType, case: Any, dtype: str, device: str) -> Tensor:
    """The reference's output in float64 on inputs rounded to `dtype`."""
    problem = Problem(spec, case, dtype, device)
    inputs = {name: x.double() for name, x in problem.inputs.items()}
    return spec.call(case, problem.layout, inputs, "reference")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One rival.

    Attributes:
        what: one line for the report.
        prepare: what a model does once a batch; returns the function that is timed.
        compiled: built by torch.compile: left out by --quick.
    """

    name: str
    what: str
    prepare: Callable[[Problem], Compute]
    compiled: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """One op and what competes with it.

    Attributes:
        cases, gpu_cases: what is timed on a CPU, on a GPU.
        asked: the inputs that `unsupported` is asked about.
        described: a case's shape in a line.
    """

    name: str
    spec: ModuleType
    cases: tuple[Any, ...]
    gpu_cases: tuple[Any, ...]
    asked: tuple[str, ...]
    peers: tuple[Peer, ...]
    quick_cases: tuple[str, ...]
    described: Callable[[Any], str]

    def run(
        self, stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str
    ) -> None:
        """One contest; fails where a kernel of ours misses its error budget."""
        torch.compiler.reset()  # else the second case's shape would count as dynamic and get a slower program
        spec, found = self.spec, self.named(case)
        problem = Problem(spec, found, dtype, settings.device)
        contestants, refused, red = self.ours(problem, direction)
        for peer in self.peers:
            if settings.quick and peer.compiled:
                refused.append((peer.name, "peer", "left out by --quick"))
            else:
                contestants.append(contestant(problem, direction, peer, "peer"))
        subject = Subject(
            op=self.name,
            case=case,
            shape=self.described(found),
            dtype=dtype,
            direction=direction,
            flops=spec.flops(found, direction),
            bytes_moved=spec.bytes_moved(found, direction, DTYPES[dtype].itemsize),
            flops_formula=first_line(spec.flops),
            bytes_formula=first_line(spec.bytes_moved),
            checked=CHECKED_ELSEWHERE if found in self.gpu_cases else None,
        )
        record(benchmark, stopwatch, settings, subject, contestants, refused)
        if red:
            pytest.fail(f"{self.name}: misses its error budget and gets no time: {'; '.join(red)}", pytrace=False)

    def compile_ahead(self, case: str, dtype: str, direction: str, device: str) -> None:
        """Compiles what the contest's peers will, into torch's cache on disk."""
        problem = Problem(self.spec, self.named(case), dtype, device)
        for peer in self.peers:
            if peer.compiled:
                contestant(problem, direction, peer, "peer").call()

    def ours(self, problem: Problem, direction: str) -> tuple[list[Contestant], list[Refusal], list[str]]:
        """Our contestants in order of preference, the rows without a time, and what is red."""
        contestants: list[Contestant] = []
        refused: list[Refusal] = []
        red: list[str] = []
        for impl in OPS[self.name]:
            if impl.family != "torch" or impl.unavailable() is not None:
                continue  # what this machine lacks is said once, in the head of the report
            kind = "reference" if impl.name == "reference" and (contestants or red) else "ours"
            reason = impl.unsupported(*(problem.inputs.get(name) for name in self.asked))
            if reason is None and impl.name != "reference" and problem.case not in self.gpu_cases:
                found = parity.violations(self.spec, problem.case, "torch", impl.name, problem.dtype)
                parity.forget()  # what the budget is computed from is many times the case's size
                if found:
                    red.append(f"{impl.name}: {', '.join(map(str, found))}")
                    reason = f"no time: misses the error budget ({found[0]})"
            if reason is not None:
                refused.append((f"simvlm {impl.name}", kind, reason))
            else:
                contestants.append(contestant(problem, direction, self.public(impl.name), kind))
        return contestants, refused, red

    def public(self, impl: str) -> Peer:
        """The public function with one implementation, entered like any peer."""

        def prepare(problem: Problem) -> Compute:
            return lambda inputs: problem.spec.call(problem.case, problem.layout, inputs, impl)[0]

        return Peer(name=f"simvlm {impl}", what=f"{self.name}(impl={impl!r})", prepare=prepare)

    def named(self, case: str) -> Any:
        """A case of the benchmarks or of the tests by its name."""
        for found in (*self.cases, *self.gpu_cases, *self.spec.CASES):
            if found.name == case:
                return found
        names = [found.name for found in self.cases]
        raise ValueError(f"{self.name}: case must be one of {names} or a test's, got {case!r}")

    def selection(self, cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
        """(case, dtype, direction) of every contest; empty lists mean all that are timed by default."""
        names = cases or [case.name for case in self.cases if not quick or case.name in self.quick_cases]
        return [
            (name, dtype, direction)
            for name in names
            for dtype in dtypes or DTYPES_TIMED
            for direction in (("forward", "both") if self.named(name).gradients else ("forward",))
        ]


def contestant(problem: Problem, direction: str, peer: Peer, kind: str) -> Contestant:
    """Binds the tensors: `call` returns (output,) or (output, a gradient for each of `problem.leaves`)."""
    both = direction == "both"
    leaves = {name: problem.inputs[name].detach().clone().requires_grad_(both) for name in problem.leaves}
    inputs = problem.inputs | leaves
    computes: list[Compute] = []

    def call() -> tuple[Tensor, ...]:
        if not computes:
            computes.append(peer.prepare(problem))  # here, so that a peer that fails to prepare is a row with a reason
        with torch.set_grad_enabled(both):
            out = computes[0](inputs)
            return (out, *torch.autograd.grad(out, list(leaves.values()), problem.cotangent)) if both else (out,)

    return Contestant(
        name=peer.name, what=peer.what, kind=kind, call=call, error=lambda result: problem.error(result[0])
    )
