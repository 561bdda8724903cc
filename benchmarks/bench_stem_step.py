"""A training step of the convolution stage alone: forward and backward of every weight, in training mode.

The rival is the same stage with torch's own layers in place of ours: nn.BatchNorm2d, then += residual and relu_, on the
same channels-last tensors, between the same convolutions. The optimizer is no part of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contest import Contestant, Stopwatch
from benchmarks.record import Settings, Subject, record
from simvlm.kernels import implementations
from simvlm.kernels.parity import DTYPES
from simvlm.model.config import SimVLMConfig, variant
from simvlm.model.resnet import MOMENTUM, BatchNorm, ConvStage

OP = "stem_step"
DTYPES_TIMED = ("float32", "bfloat16")
CASES: dict[str, tuple[str, int]] = {"base_b4": ("base", 4), "base_b1": ("base", 1), "demo_b32": ("demo", 32)}
"""name → variant and images."""
QUICK_CASES = ("base_b1",)
NORMS = "batch_norm_act"
M = TypeVar("M", bound=nn.Module)


def bench_stem_step(
    stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str
) -> None:
    name, batch = CASES[case]
    config = variant(name)
    problem = Problem(config, batch, dtype, settings.device)
    subject = Subject(
        op=OP,
        case=case,
        shape=f"{batch} images of {config.image_size}×{config.image_size} pixels, the stage of {name}: "
        f"{sum(config.conv_depths)} blocks",
        dtype=dtype,
        direction=direction,
        flops=problem.flops(),
        bytes_moved=None,
        flops_formula="Floating-point operations of the convolutions, forward and backward, as "
        "torch.utils.flop_counter counts them.",
        bytes_formula=None,
        checked="Its kernels meet their error budgets in the benchmarks of their ops; here the column error tells.",
    )
    record(benchmark, stopwatch, settings, subject, problem.contestants())


def selection(cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
    for name in cases:
        if name not in CASES:
            raise ValueError(f"{OP}: case must be one of {list(CASES)}, got {name!r}")
    names = cases or (QUICK_CASES if quick else ("base_b4", "demo_b32"))
    return [(name, dtype, "step") for name in names for dtype in dtypes or DTYPES_TIMED]


class TorchNorm(nn.Module):
    """What `BatchNorm` of simvlm.model.resnet computes, in torch's layers."""

    def __init__(self, ours: BatchNorm) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(ours.weight.shape[0], momentum=MOMENTUM)
        self.norm.load_state_dict(ours.state_dict(), strict=False)  # torch counts batches too
        self.act = ours.act

    @property
    def live(self) -> bool:
        return self.training

    def forward(self, x: Tensor, residual: Tensor | None = None, branch_scale: Tensor | None = None) -> Tensor:
        assert branch_scale is None
        y = self.norm(x.permute(0, 3, 1, 2))
        if residual is not None:
            y += residual.permute(0, 3, 1, 2)
        if self.act == "relu":
            y = y.relu_()
        return y.permute(0, 2, 3, 1)


def with_torch_norms(model: M) -> M:
    """The same model, torch's norms in place of ours."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, TorchNorm(module).to(module.weight.device))
    return model


class Problem:
    """The stage's weights, its images and the gradient of its features, in one dtype: float32, or autocast to it."""

    def __init__(self, config: SimVLMConfig, batch: int, dtype: str, device: str) -> None:
        # A last weight of 0, as Base begins with, would leave each block's branch without gradients to compare.
        self.config = dataclasses.replace(config, conv_last_weight=1.0)
        self.dtype, self.device = DTYPES[dtype], device
        generator = torch.Generator().manual_seed(0)
        size = (batch, config.image_size, config.image_size, 3)
        self.images = torch.randint(256, size, dtype=torch.uint8, generator=generator).to(device)
        features = (batch, *config.image_grid, config.patch_channels)
        self.dfeatures = torch.randn(features, generator=generator).to(device)

    def stage(self, impl: str | None) -> ConvStage:
        """In training mode, the same weights every time."""
        torch.manual_seed(0)
        stage = ConvStage(self.config, impl)
        for module in stage.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        stage.set_constants()
        return stage.to(self.device).train()

    def rival(self) -> ConvStage:
        """The stage with torch's norms, its weights laid channels-last as torch's convolutions like them."""
        stage = with_torch_norms(self.stage(None))
        return stage.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def contestants(self) -> list[Contestant]:
        """Our kernels in order of preference, torch, our reference."""
        names = [status.name for status in implementations(NORMS) if status.family == "torch" and status.available]
        found = []
        for name in names:
            kind = "ours" if name != "reference" or len(names) == 1 else "reference"
            what = f"the model's convolution stage, {NORMS}(impl={name!r})"
            found.append(self.contestant(f"simvlm {name}", what, kind, self.stage(name)))
        what = "the same with nn.BatchNorm2d, += residual, relu_; weights channels-last"
        return [*found, self.contestant("torch", what, "peer", self.rival())]

    def contestant(self, name: str, what: str, kind: str, stage: ConvStage) -> Contestant:
        """`call` returns (features, a gradient for each weight)."""
        parameters = list(stage.parameters())

        def call() -> tuple[Tensor, ...]:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                features = stage(self.images)
            return (features, *torch.autograd.grad(features, parameters, self.dfeatures.to(features.dtype)))

        return Contestant(name=name, what=what, kind=kind, call=call, error=lambda result: self.error(result[0]))

    def error(self, features: Tensor) -> float:
        """rms of the features' error against the reference in float64, relative to their rms."""
        truth = self._truth
        return float(((features.detach().double() - truth).square().mean() / truth.square().mean()).sqrt())

    @functools.cached_property
    def _truth(self) -> Tensor:
        with torch.no_grad():
            return self.stage("reference").double()(self.images)

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.contestant("", "", "reference", self.rival()).call()
        return counter.get_total_flops()
