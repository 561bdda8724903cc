"""`batch_norm_act` against torch's batch_norm, add and relu on channels-last tensors, eager and compiled.

"forward" trains without gradients (statistics of the batch, unless the case has them frozen); "both" is forward and
backward with the gradients of x, weight, bias and residual.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import stem_cases
from benchmarks.contest import Stopwatch
from benchmarks.record import Settings
from benchmarks.stem_contest import Compute, Op, Peer, Problem
from simvlm.kernels.stem import batch_norm_spec


def bench_batch_norm_act(
    stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str
) -> None:
    OP.run(stopwatch, benchmark, settings, case, dtype, direction)


def selection(cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
    return OP.selection(cases, dtypes, quick)


def compile_ahead(case: str, dtype: str, direction: str, device: str) -> None:
    OP.compile_ahead(case, dtype, direction, device)


def described(case: batch_norm_spec.Case) -> str:
    batch, height, width, channels = case.shape
    parts = [f"{batch} images of {height}×{width} pixels, {channels} channels"]
    parts.append("statistics given" if case.frozen else "statistics of the batch")
    parts += ["branch scale"] * (case.branch_scale is not None) + ["residual"] * case.residual
    parts += ["relu"] * (case.act == "relu")
    return ", ".join(parts) + f"; {math.prod(case.shape) / 1e6:.1f} million elements"


def _eager(problem: Problem) -> Compute:
    case = problem.case

    def compute(inputs: dict[str, Tensor]) -> Tensor:
        x, scale, residual = inputs["x"].permute(0, 3, 1, 2), inputs.get("branch_scale"), inputs.get("residual")
        y = F.batch_norm(
            x,
            inputs.get("mean"),
            inputs.get("var"),
            inputs["weight"],
            inputs["bias"],
            training=not case.frozen,
            eps=case.eps,
        )
        # In place wherever autograd allows it, as torchvision's ResNet does.
        if scale is not None:
            y = y * scale.to(y.dtype)[:, None, None, None]
        if residual is not None:
            y += residual.permute(0, 3, 1, 2)
        if case.act == "relu":
            y = y.relu_()
        return y.permute(0, 2, 3, 1)

    return compute


def _compiled(problem: Problem) -> Compute:
    return torch.compile(_eager(problem), dynamic=False)


PEERS: tuple[Peer, ...] = (
    Peer(
        name="torch",
        what="F.batch_norm, += residual, relu_ on channels-last tensors; no running statistics are kept",
        prepare=_eager,
    ),
    Peer(name="compiled torch", what="torch.compile of the same, static shapes", prepare=_compiled, compiled=True),
)

OP = Op(
    name="batch_norm_act",
    spec=batch_norm_spec,
    cases=stem_cases.BATCH_NORM,
    gpu_cases=stem_cases.BATCH_NORM_GPU,
    asked=("x",),
    peers=PEERS,
    quick_cases=("base_stage_1_b8", "base_stage_3_inner_b8", "demo_stage_2_b32"),
    described=described,
)
