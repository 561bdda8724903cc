"""The convolution stage: the first stages of a ResNet v1.5 (stride in the 3×3), channels-last, from pixels to patches.

    block(x) = relu(branch_scale · norm(conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(x)))))))) + shortcut(x))

He et al. 2015, figure 5 right. Every padding is explicit and symmetric (k // 2 on each side), so that frameworks agree.
Tensors are [B, Hh, Ww, C] here; the convolutions see the same memory as NCHW in channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simvlm.kernels import batch_norm_act
from simvlm.kernels.stem import torch_op
from simvlm.model.config import SimVLMConfig
from simvlm.model.remat import is_recomputing, rematerialized
from simvlm.model.transformer import INIT_STD

MOMENTUM = 0.1
EPS = 1e-5


class Conv(nn.Module):
    """A convolution without bias; weight [Cout, Cin, k, k]."""

    def __init__(self, channels: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(outputs, channels, kernel, kernel))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight, None)

    def with_norm(
        self, x: Tensor, norm: BatchNorm, residual: Tensor | None = None, branch_scale: Tensor | None = None
    ) -> Tensor:
        """norm(self(x), residual, branch_scale); at inference the norm's constants are folded into the convolution's.

        That saves a pass over the feature map. The folding itself is one pass over the weights.
        """
        if norm.live or torch.is_grad_enabled() or branch_scale is not None:
            return norm(self(x), residual, branch_scale)
        factor = norm.weight * torch.rsqrt(norm.running_var + EPS)
        shift = norm.bias - norm.running_mean * factor
        y = self._convolve(x, self.weight * factor[:, None, None, None], shift.to(x.dtype))
        if residual is not None:
            y += residual
        return y.relu_() if norm.act == "relu" else y

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, self.stride, self.kernel // 2)
        return y.permute(0, 2, 3, 1).contiguous()


class BatchNorm(nn.Module):
    """Batch normalization with what may follow it: branch scale, residual sum, activation, in one kernel.

    Running statistics are those of torch's BatchNorm2d: the variance unbiased, the batch's share `MOMENTUM`.

    Attributes:
        frozen: normalize with the running statistics even in training.
        group: name of a process group whose processes' pictures are one batch; "": this process's own.
        images: float64[], how many pictures that batch has; None: those that are here.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, impl: str | None, *, act: str = "relu", initial_weight: float = 1.0) -> None:
        super().__init__()
        self.impl, self.act, self.initial_weight = impl, act, initial_weight
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.frozen, self.group = False, ""
        self.images: Tensor | None = None

    def reset_parameters(self) -> None:
        constants = (
            (self.weight, self.initial_weight),
            (self.bias, 0.0),
            (self.running_mean, 0.0),
            (self.running_var, 1.0),
        )
        for tensor, value in constants:
            nn.init.constant_(tensor, value)

    @property
    def live(self) -> bool:
        """Normalizes with the batch's own statistics."""
        return self.training and not self.frozen

    def forward(self, x: Tensor, residual: Tensor | None = None, branch_scale: Tensor | None = None) -> Tensor:
        if self.live and self.group:
            y, mean, var = torch_op.batch_norm_act(
                x,
                self.weight,
                self.bias,
                None,
                None,
                residual,
                branch_scale,
                EPS,
                self.act,
                self.impl,
                self.group,
            )
            assert self.images is not None
            self._move_statistics(mean, var, self.images * (x.shape[1] * x.shape[2]))
            return y
        y, mean, var = batch_norm_act(
            x,
            self.weight,
            self.bias,
            mean=None if self.live else self.running_mean,
            var=None if self.live else self.running_var,
            residual=residual,
            branch_scale=branch_scale,
            eps=EPS,
            act=self.act,
            impl=self.impl,
        )
        if self.live and x.shape[0]:
            self._move_statistics(mean, var, x.shape[0] * x.shape[1] * x.shape[2])
        return y

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, var: Tensor, pixels: int | Tensor) -> None:
        if is_recomputing():
            return
        momentum: float | Tensor
        unbiased: float | Tensor
        if isinstance(pixels, Tensor):  # a micro-batch without images leaves the statistics alone
            momentum = (MOMENTUM * pixels.clamp(max=1)).to(self.running_mean.dtype)
            unbiased = (pixels / (pixels - 1).clamp(min=1)).to(var.dtype)
        else:
            momentum, unbiased = MOMENTUM, pixels / max(pixels - 1, 1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * unbiased).to(self.running_var.dtype), momentum)


class Bottleneck(nn.Module):
    """1×1 down, 3×3 with the stride, 1×1 up, and the shortcut; the last norm's weight starts at `last_weight`."""

    def __init__(self, channels: int, inner: int, stride: int, last_weight: float, impl: str | None) -> None:
        super().__init__()
        outer = 4 * inner
        self.conv1, self.norm1 = Conv(channels, inner), BatchNorm(inner, impl)
        self.conv2, self.norm2 = Conv(inner, inner, 3, stride), BatchNorm(inner, impl)
        self.conv3, self.norm3 = Conv(inner, outer), BatchNorm(outer, impl, initial_weight=last_weight)
        self.shortcut: Conv | None = None
        self.shortcut_norm: BatchNorm | None = None
        if channels != outer or stride != 1:
            self.shortcut = Conv(channels, outer, 1, stride)
            self.shortcut_norm = BatchNorm(outer, impl, act="none")
        self.remat = "none"

    def forward(self, x: Tensor, branch_scale: Tensor | None) -> Tensor:
        return rematerialized(self.remat, self._forward, x, branch_scale)

    def _forward(self, x: Tensor, branch_scale: Tensor | None) -> Tensor:
        residual = x
        if self.shortcut is not None and self.shortcut_norm is not None:
            residual = self.shortcut.with_norm(x, self.shortcut_norm)
        y = self.conv1.with_norm(x, self.norm1)
        y = self.conv2.with_norm(y, self.norm2)
        return self.conv3.with_norm(y, self.norm3, residual, branch_scale)


class ConvStage(nn.Module):
    """uint8[Bi, S, S, 3] → float[Bi, Gh, Gw, C], normalized pixels through stem and stages, cut into patches."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: SimVLMConfig, impl: str | None) -> None:
        super().__init__()
        self.config = config
        self.stem: Conv | None = None
        self.stem_norm: BatchNorm | None = None
        self.stages = nn.ModuleList()
        self.register_buffer("mean", torch.empty(3), persistent=False)
        self.register_buffer("std", torch.empty(3), persistent=False)
        if not config.conv_depths:
            return
        channels = config.conv_stem_width
        self.stem = Conv(3, channels, 7 if config.conv_stem == "resnet" else 3, 2)
        self.stem_norm = BatchNorm(channels, impl)
        for depth, inner, stride in zip(config.conv_depths, config.conv_widths, config.conv_strides, strict=True):
            blocks = nn.ModuleList()
            for block in range(depth):
                first_stride = stride if block == 0 else 1
                blocks.append(Bottleneck(channels, inner, first_stride, config.conv_last_weight, impl))
                channels = 4 * inner
            self.stages.append(blocks)

    def set_constants(self) -> None:
        """Fills the buffers that the config determines and no file holds."""
        with torch.no_grad():
            self.mean.copy_(255 * torch.tensor(self.config.image_mean))
            self.std.copy_(255 * torch.tensor(self.config.image_std))

    def freeze_statistics(self, frozen: bool = True) -> None:
        """Normalize with the running statistics even in training, and leave them alone."""
        for norm in self._norms():
            norm.frozen = frozen

    def share_statistics(self, group: str) -> None:
        """In training BatchNorm's statistics are those of the pictures of a whole process group, named here."""
        for norm in self._norms():
            norm.group = group

    def _norms(self) -> list[BatchNorm]:
        return [module for module in self.modules() if isinstance(module, BatchNorm)]

    @property
    def num_blocks(self) -> int:
        return sum(self.config.conv_depths)

    def forward(self, images: Tensor, branch_scales: list[Tensor] | None = None) -> Tensor:
        """Features of the images; `branch_scales`: one float[Bi] per block, stochastic depth."""
        norms = self._norms()
        if norms and norms[0].live and norms[0].group:
            own = torch.full((), images.shape[0], dtype=torch.float64, device=images.device)
            count = torch_op.all_reduce(own, norms[0].group)  # one for all norms
            for norm in norms:
                norm.images = count
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        if self.stem is not None and self.stem_norm is not None:
            x = self.stem.with_norm(x, self.stem_norm)
            if self.config.conv_stem == "resnet":
                x = F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1).contiguous()
        scales: Iterator[Tensor | None] = iter(branch_scales) if branch_scales else itertools.repeat(None)
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x, next(scales))
        return _patches(x, self.config.patch_size)


def _patches(x: Tensor, side: int) -> Tensor:
    """[B, Hh, Ww, C] → [B, Hh/side, Ww/side, side·side·C], pixels of a patch row-major."""
    if side == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels).transpose(2, 3)
    return x.reshape(batch, height // side, width // side, side * side * channels)
