"""The convolution stage in JAX: resnet.py's network, channels-last, the equal blocks of a stage in one scan.

Every padding is explicit and symmetric (XLA's SAME pads a stride of 2 on one side). The images of all units are one
batch, so statistics are the global batch's on any mesh: the compiler puts the reductions over devices in.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simvlm.kernels import batch_norm_act
from simvlm.model.config import SimVLMConfig
from simvlm.model.jax_transformer import INIT_STD, Array, Execution, precision

MOMENTUM = 0.1
"""of the batch, in the running statistics; flax counts the other way round and says 0.9"""
EPS = 1e-5
_LAYOUT = ("NHWC", "OIHW", "NHWC")


class Conv(nnx.Module):
    """A convolution without bias; weight [Cout, Cin, k, k]."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
        depth: tuple[int, ...] = (),
    ) -> None:
        self.stride, self.padding = stride, kernel // 2
        shape = (*depth, outputs, channels, kernel, kernel)
        self.weight = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape))

    def __call__(self, x: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            self.weight[...].astype(x.dtype),
            (self.stride, self.stride),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=_LAYOUT,
            precision=precision(x.dtype),
        )


class BatchNorm(nnx.Module):
    """Batch normalization with the residual sum and activation that follow it, in one kernel.

    The running variance is unbiased, as torch's BatchNorm2d keeps it.
    """

    def __init__(
        self, channels: int, *, act: str = "relu", initial_weight: float = 1.0, depth: tuple[int, ...] = ()
    ) -> None:
        self.act = act
        shape = (*depth, channels)
        self.weight = nnx.Param(jnp.full(shape, initial_weight, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape))
        self.running_mean = nnx.BatchStat(jnp.zeros(shape))
        self.running_var = nnx.BatchStat(jnp.ones(shape))

    def __call__(self, x: Array, execution: Execution, train: bool, residual: Array | None = None) -> Array:
        live = train and x.shape[0] > 0  # a batch without images leaves the statistics alone
        y, mean, var = batch_norm_act(
            x,
            self.weight[...],
            self.bias[...],
            mean=None if live else self.running_mean[...],
            var=None if live else self.running_var[...],
            residual=residual,
            eps=EPS,
            act=self.act,
            impl=execution.impl_of("batch_norm_act"),
        )
        if live:
            pixels = x.shape[0] * x.shape[1] * x.shape[2]
            for running, new in ((self.running_mean, mean), (self.running_var, var * (pixels / max(pixels - 1, 1)))):
                running.set_value(running[...] + MOMENTUM * (jax.lax.stop_gradient(new) - running[...]))
        return y


class Bottleneck(nnx.Module):
    """1×1 down, 3×3 with the stride, 1×1 up, and the shortcut; `depth` of them, alike, where it is given."""

    def __init__(
        self,
        channels: int,
        inner: int,
        stride: int,
        last_weight: float,
        *,
        rngs: nnx.Rngs,
        depth: tuple[int, ...] = (),
    ) -> None:
        outer = 4 * inner
        same: dict[str, Any] = {"depth": depth}
        self.conv1, self.norm1 = Conv(channels, inner, rngs=rngs, **same), BatchNorm(inner, **same)
        self.conv2, self.norm2 = Conv(inner, inner, 3, stride, rngs=rngs, **same), BatchNorm(inner, **same)
        self.conv3, self.norm3 = (
            Conv(inner, outer, rngs=rngs, **same),
            BatchNorm(outer, initial_weight=last_weight, **same),
        )
        changes = channels != outer or stride != 1
        self.shortcut = Conv(channels, outer, 1, stride, rngs=rngs, **same) if changes else None
        self.shortcut_norm = BatchNorm(outer, act="none", **same) if changes else None

    def __call__(self, x: Array, execution: Execution, train: bool) -> Array:
        residual = x
        if self.shortcut is not None and self.shortcut_norm is not None:
            residual = self.shortcut_norm(self.shortcut(x), execution, train)
        y = self.norm1(self.conv1(x), execution, train)
        y = self.norm2(self.conv2(y), execution, train)
        return execution.on_images(self.norm3(self.conv3(y), execution, train, residual))


class Stage(nnx.Module):
    """The first block, with the stride and the change of channels, and the rest, which are alike."""

    def __init__(self, channels: int, inner: int, depth: int, stride: int, last_weight: float, rngs: nnx.Rngs) -> None:
        self.first = Bottleneck(channels, inner, stride, last_weight, rngs=rngs)
        alike: dict[str, Any] = {"rngs": rngs, "depth": (depth - 1,)}
        self.rest = Bottleneck(4 * inner, inner, 1, last_weight, **alike) if depth > 1 else None

    def __call__(self, x: Array, execution: Execution, train: bool) -> Array:
        x, statistics = _block(self.first, x, execution, train)
        nnx.update(self.first, statistics)
        if self.rest is not None:
            x, statistics = _block(self.rest, x, execution, train, stacked=True)
            nnx.update(self.rest, statistics)
        return x


def _block(block: Bottleneck, x: Array, execution: Execution, train: bool, stacked: bool = False) -> tuple[Array, Any]:
    """(x, running statistics) after the block, or after as many as are stacked in it; the block itself is untouched."""
    definition, state = nnx.split(block)

    def one(x: Array, own: Any) -> tuple[Array, Any]:
        block = nnx.merge(definition, own)
        return block(x, execution, train), nnx.state(block, nnx.BatchStat)

    return execution.over_depth(one, x, state) if stacked else execution.checkpointed(one)(x, state)


class ConvStage(nnx.Module):
    """uint8[U, Bi, S, S, 3] → float[U, Bi, Gh, Gw, C], normalized pixels through stem and stages, cut into patches."""

    def __init__(self, config: SimVLMConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        channels, kernel = config.conv_stem_width, 7 if config.conv_stem == "resnet" else 3
        self.stem = Conv(3, channels, kernel, 2, rngs=rngs) if config.conv_depths else None
        self.stem_norm = BatchNorm(channels) if config.conv_depths else None
        self.stages: Any = nnx.List([])
        for depth, inner, stride in zip(config.conv_depths, config.conv_widths, config.conv_strides, strict=False):
            self.stages.append(Stage(channels, inner, depth, stride, config.conv_last_weight, rngs))
            channels = 4 * inner

    def __call__(self, images: Array, execution: Execution, train: bool) -> Array:
        mean, std = (255 * jnp.array(x, jnp.float32) for x in (self.config.image_mean, self.config.image_std))
        units = images.shape[:2]
        x = images.reshape(-1, *images.shape[2:])
        x = execution.on_images(((x - mean) / std).astype(execution.dtype))
        if self.stem is not None and self.stem_norm is not None:
            x = self.stem_norm(self.stem(x), execution, train)
            if self.config.conv_stem == "resnet":
                x = _max_pool(x)
        for stage in self.stages:
            x = stage(x, execution, train)
        x = _patches(x, self.config.patch_size)
        return execution.on_units(x.reshape(*units, *x.shape[1:]))


def _max_pool(x: Array) -> Array:
    """3×3, stride 2, padded by one on each side."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _patches(x: Array, side: int) -> Array:
    """[B, Hh, Ww, C] → [B, Hh/side, Ww/side, side·side·C], pixels of a patch row-major."""
    if side == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels).swapaxes(2, 3)
    return x.reshape(batch, height // side, width // side, side * side * channels)
