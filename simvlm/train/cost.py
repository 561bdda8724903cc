"""What one training step costs, by arithmetic: floating-point operations and bytes, of a config and a batch's lengths.

Counted by hand, because compilers count the body of a loop once. Products only: 2 operations for each multiply-add,
backward twice the forward; attention over the pairs that see each other (attention/spec.py). Bytes are those of an
execution in which every operation reads its inputs from memory and writes its result there once, normalizations and
activations being part of the product beside them; 16-bit activations, float32 residual stream.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from simvlm.model.config import CONV_STEMS, SimVLMConfig, parameter_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one step over the whole batch, forward pass alone.

    Attributes:
        flops: by part: conv, projection, encoder, decoder, logits.
        activation_bytes: by part, the same.
        rows: of the encoder and of the decoder that sequences own.
    """

    flops: dict[str, int]
    activation_bytes: dict[str, int]
    rows: tuple[int, int]

    @property
    def model_flops(self) -> int:
        """Forward and backward, nothing computed again: what model FLOP utilization counts."""
        return 3 * sum(self.flops.values())

    def hardware_flops(self, remat: str) -> int:
        """With what `remat` computes again."""
        again = sum(self.flops[part] for part in ("conv", "encoder", "decoder")) if remat == "layer" else 0
        return self.model_flops + again

    def hardware_bytes(self, remat: str) -> int:
        """Of activations, forward and backward; a backward pass moves about twice what the forward moves."""
        again = sum(self.activation_bytes[part] for part in ("conv", "encoder", "decoder"))
        return 3 * sum(self.activation_bytes.values()) + (again if remat != "none" else 0)


def step_cost(config: SimVLMConfig, images: int, encoder_text_lens: np.ndarray, decoder_lens: np.ndarray) -> Cost:
    """Of a batch whose first `images` sequences have a picture.

    Args:
        encoder_text_lens, decoder_lens: int[B], tokens of each sequence.
    """
    width, mlp, heads = config.width, config.mlp_dim, config.num_heads * config.head_dim
    encoder_lens = encoder_text_lens.astype(np.int64)
    encoder_lens[:images] += config.image_len
    decoder_lens = decoder_lens.astype(np.int64)
    if config.arch == "decoder_only":
        lens = encoder_lens + decoder_lens
        pairs = int((encoder_lens * encoder_lens + decoder_lens * encoder_lens).sum())
        pairs += int((decoder_lens * (decoder_lens + 1) // 2).sum())
        layers = {"encoder": 0, "decoder": config.decoder_depth * _layer(int(lens.sum()), pairs, width, mlp, heads)}
        bytes_of = {"encoder": 0, "decoder": config.decoder_depth * _layer_bytes(int(lens.sum()), width, mlp)}
        rows = 0, int(lens.sum())
    else:
        rows = int(encoder_lens.sum()), int(decoder_lens.sum())
        causal = int((decoder_lens * (decoder_lens + 1) // 2).sum())
        across = int((decoder_lens * encoder_lens).sum())
        cross = 2 * width * (2 * width * rows[1] + 2 * width * rows[0]) + 4 * heads * across
        cross_bytes = 2 * width * (10 * rows[1] + 3 * rows[0])
        layers = {
            "encoder": config.encoder_depth * _layer(rows[0], int((encoder_lens**2).sum()), width, mlp, heads),
            "decoder": config.decoder_depth * (_layer(rows[1], causal, width, mlp, heads) + cross),
        }
        bytes_of = {
            "encoder": config.encoder_depth * _layer_bytes(rows[0], width, mlp),
            "decoder": config.decoder_depth * (_layer_bytes(rows[1], width, mlp) + cross_bytes),
        }
    conv, conv_bytes = _conv(config)
    patches = images * config.image_len
    projection = 2 * config.patch_channels * width * patches if config.has_projection else 0
    suffix = int(decoder_lens.sum())
    flops = {
        "conv": images * conv,
        "projection": projection,
        **layers,
        "logits": 2 * width * config.vocab_size * suffix,
    }
    activation_bytes = {
        "conv": images * conv_bytes,
        "projection": 2 * patches * (config.patch_channels + width),
        **bytes_of,
        "logits": 4 * config.vocab_size * suffix * 2,
    }
    return Cost(flops=flops, activation_bytes=activation_bytes, rows=rows)


def state_bytes(config: SimVLMConfig) -> int:
    """What AdamW's step moves: gradient read; parameter and two moments read and written; float32."""
    return 7 * 4 * parameter_counts(config)["total"]


def _layer(rows: int, pairs: int, width: int, mlp: int, heads: int) -> int:
    return 2 * rows * (3 * width * heads + heads * width + 2 * width * mlp) + 4 * pairs * heads


def _layer_bytes(rows: int, width: int, mlp: int) -> int:
    """Residual stream: read by two norms, read and written by two sums, float32. Else in 16 bits: two normed
    inputs written and read, qkv written and read, attention's and the MLP's results too, the hidden layer twice."""
    return rows * (4 * width * 6 + 2 * width * (4 + 6 + 4 + 2) + 2 * mlp * 2)


def _conv(config: SimVLMConfig) -> tuple[int, int]:
    """(operations, bytes) of one image's convolution stage, forward."""
    if not config.conv_depths:
        return 0, 0
    kernel = 7 if config.conv_stem == "resnet" else 3
    side, channels = config.image_size // 2, config.conv_stem_width
    flops, moved = 2 * kernel**2 * 3 * channels * side**2, _norm_bytes(side, channels)
    side = config.image_size // CONV_STEMS[config.conv_stem]
    for depth, inner, stride in zip(config.conv_depths, config.conv_widths, config.conv_strides, strict=True):
        outer = 4 * inner
        for block in range(depth):
            before, step = side, stride if block == 0 else 1
            side //= step
            flops += 2 * channels * inner * before**2 + 2 * (9 * inner**2 + inner * outer) * side**2
            moved += _norm_bytes(before, inner) + _norm_bytes(side, inner) + _norm_bytes(side, outer)
            moved += 2 * side**2 * outer  # the residual
            if channels != outer or step != 1:
                flops += 2 * channels * outer * side**2
                moved += _norm_bytes(side, outer)
            channels = outer
    return flops, moved


def _norm_bytes(side: int, channels: int) -> int:
    """A convolution's result and its norm: written, read for the statistics, read, written, read by what follows."""
    return 5 * 2 * side**2 * channels
