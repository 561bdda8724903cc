"""What a SimVLM is made of, its five sizes, and how many parameters each part of it has. Imports no array library."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from simvlm.kernels.dispatch import did_you_mean

CONV_STEMS = {"resnet": 4, "small": 2}
"""What stands before the first stage, and its stride: ResNet's 7×7 with a max-pool, or one 3×3."""
DECODER_POSITIONS = ("restart", "continue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimVLMConfig:
    """The architecture of one model; nothing of its training, its data or its kernels.

    Attributes:
        width, mlp_dim, num_heads: D, the hidden width of the MLPs, N; of both stacks.
        encoder_depth, decoder_depth: layers of each stack. An `encoder_depth` of 0 is the decoder-only PrefixLM: one
            stack reads image, prefix and suffix.
        conv_depths: bottleneck blocks of each ResNet stage; () for none: pixels are cut into patches at once.
        conv_widths: inner width of each stage's blocks; a stage gives four times as many channels.
        conv_strides: of each stage's first block.
        conv_stem: "resnet" (7×7 stride 2, max-pool stride 2) or "small" (3×3 stride 2); before the first stage.
        conv_stem_width: its channels.
        conv_last_weight: where the weight of each block's last norm starts: 0, a block that passes its input on (Goyal
            et al. 2017, §5.1), or 1. From 0 it opens by a learning rate a step at the most, too slowly for a run of
            minutes.
        init_std: of the linear maps' weights at the start; all other weights have 0.02. A narrow model wants more: 0.02
            is half of 1/√D at D = 768, a fifth of it at D = 128.
        patch_size: side of the square of the last stage's pixels (the image's, without stages) that is one token.
        image_size: side S of the square images, in pixels.
        vocab_size, max_text_len: V, and the most tokens of one text.
        num_sentinels: how many of the V, the last, are no pieces of the tokenizer but mark the spans of span
            corruption; they are never generated.
        decoder_positions: "restart" at 0 in the decoder, or "continue" after the encoder's text. A decoder-only model
            always continues.
        image_mean, image_std: of each colour channel, on a scale of 0 … 1.
    """

    width: int
    mlp_dim: int
    num_heads: int
    encoder_depth: int
    decoder_depth: int
    conv_depths: tuple[int, ...]
    conv_widths: tuple[int, ...] = (64, 128, 256)
    conv_strides: tuple[int, ...] = (1, 2, 2)
    conv_stem: str = "resnet"
    conv_stem_width: int = 64
    conv_last_weight: float = 0.0
    init_std: float = 0.02
    patch_size: int = 1
    image_size: int = 224
    vocab_size: int = 32_000
    max_text_len: int = 256
    num_sentinels: int = 0
    decoder_positions: str = "restart"
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON has lists only
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        self._check()

    def _check(self) -> None:
        for name in ("width", "mlp_dim", "num_heads", "decoder_depth", "patch_size", "image_size", "max_text_len"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.encoder_depth >= 0, "encoder_depth", "at least 0", self.encoder_depth)
        _require(self.num_sentinels >= 0, "num_sentinels", "at least 0", self.num_sentinels)
        least = 4 + self.num_sentinels
        beside = f" and {self.num_sentinels} sentinels" if self.num_sentinels else ""
        _require(
            self.vocab_size >= least, "vocab_size", f"at least {least} (pad, bos, eos, unk{beside})", self.vocab_size
        )
        _require(self.width % self.num_heads == 0, "width", f"a multiple of num_heads = {self.num_heads}", self.width)
        head_dim_is_legal = self.head_dim % 8 == 0 and 8 <= self.head_dim <= 128
        _require(head_dim_is_legal, "width / num_heads", "a multiple of 8 from 8 to 128", self.head_dim)
        for name in ("conv_widths", "conv_strides"):
            value = getattr(self, name)
            if self.conv_depths:
                same = len(value) == len(self.conv_depths)
                _require(same, name, f"as long as conv_depths, {len(self.conv_depths)} stages", value)
        _require(all(depth >= 1 for depth in self.conv_depths), "conv_depths", "at least 1 each", self.conv_depths)
        for name, choices in (("conv_stem", tuple(CONV_STEMS)), ("decoder_positions", DECODER_POSITIONS)):
            value = getattr(self, name)
            _require(value in choices, name, f"one of {list(choices)}", repr(value) + did_you_mean(value, choices))
        divides = self.image_size % self.stride == 0
        _require(divides, "image_size", f"a multiple of the stride, {self.stride}", self.image_size)

    @property
    def arch(self) -> str:
        """ "encoder_decoder" or "decoder_only"."""
        return "encoder_decoder" if self.encoder_depth else "decoder_only"

    @property
    def num_pieces(self) -> int:
        """Ids that the tokenizer knows: all below this one."""
        return self.vocab_size - self.num_sentinels

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def stride(self) -> int:
        """Pixels of the image along one side of a token."""
        conv = CONV_STEMS[self.conv_stem] * math.prod(self.conv_strides) if self.conv_depths else 1
        return conv * self.patch_size

    @property
    def image_grid(self) -> tuple[int, int]:
        """(Gh, Gw)."""
        return self.image_size // self.stride, self.image_size // self.stride

    @property
    def image_len(self) -> int:
        """I, the tokens of one image."""
        return self.image_grid[0] * self.image_grid[1]

    @property
    def patch_channels(self) -> int:
        """C: channels of a patch before its projection."""
        return (4 * self.conv_widths[-1] if self.conv_depths else 3) * self.patch_size**2

    @property
    def has_projection(self) -> bool:
        return self.patch_channels != self.width

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SimVLMConfig:
        """The config with these fields.

        Raises:
            ValueError: a field is unknown, or missing; all of them are named.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        wrong = [f"unknown {name}{did_you_mean(name, list(fields))}" for name in values if name not in fields]
        wrong += [
            f"missing {name}"
            for name, field in fields.items()
            if name not in values and field.default is dataclasses.MISSING
        ]
        if wrong:
            raise ValueError(f"SimVLMConfig: fields must be the config's own, got {'; '.join(wrong)}")
        return cls(**values)


def _require(fine: bool, name: str, what: str, value: Any) -> None:
    if not fine:
        raise ValueError(f"SimVLMConfig: {name} must be {what}, got {value}")


_RESNET50, _RESNET101, _RESNET152 = (3, 4, 6), (3, 4, 23), (3, 8, 36)  # He et al. 2015, table 1: conv2_x … conv4_x
_ADDED_DEPTH = 3  # conv5_x of all three
_WIDER = {"conv_stem_width": 80, "conv_widths": (80, 160, 320)}  # ×1.25, so that channels meet the width 1280


# fmt: off
def _size(layers: int, width: int, heads: int, mlp: int, conv: tuple[int, ...], **rest: Any) -> SimVLMConfig:
    return SimVLMConfig(width=width, mlp_dim=mlp, num_heads=heads, encoder_depth=layers, conv_depths=conv,
                        **({"decoder_depth": layers} | rest))


VARIANTS: dict[str, SimVLMConfig] = {
    "demo": _size(2, 128, 4, 512, (1, 3), decoder_depth=3, conv_stem="small", conv_stem_width=32, conv_widths=(16, 32),
                  conv_strides=(2, 2), conv_last_weight=1.0, init_std=0.08,  # as a short run of a narrow model wants it
                  image_size=64, vocab_size=512, max_text_len=128),  # ours: learns on two CPU cores
    "small": _size(8, 512, 8, 2048, _RESNET50),  # ours; depth and width: the paper's ablations (recalled)
    "base": _size(12, 768, 12, 3072, _RESNET101),  # ViT-B (Dosovitskiy et al. 2021, table 1) in each stack
    "large": _size(24, 1024, 16, 4096, _RESNET152),  # ViT-L
    "huge": _size(32, 1280, 16, 5120, _RESNET152, **_WIDER),  # ViT-H
}
# fmt: on


def variant(name: str) -> SimVLMConfig:
    """The config of that size.

    Raises:
        ValueError: no size has that name; the nearest are offered.
    """
    if name not in VARIANTS:
        raise ValueError(
            f"variant: name must be one of {list(VARIANTS)}, got {name!r}{did_you_mean(name, [*VARIANTS])}"
        )
    return VARIANTS[name]


def as_decoder_only(config: SimVLMConfig) -> SimVLMConfig:
    """One stack with as many layers as both had; a model of one stack as it is."""
    return dataclasses.replace(config, encoder_depth=0, decoder_depth=config.encoder_depth + config.decoder_depth)


def with_conv_stages(config: SimVLMConfig, stages: int) -> SimVLMConfig:
    """The config with so many convolution stages and as many image tokens: the patches grow by the strides of those
    that are left out, down to pixels cut into patches at once; one that is added has a stride of 1.

    Raises:
        ValueError: there are to be fewer than none, or more than one to add (to a model without stages: any).
    """
    own = len(config.conv_depths)
    most = own + 1 if own else 0
    if not 0 <= stages <= most:
        raise ValueError(f"conv_stages must be from 0 to {most} for a model of {own} stages, got {stages}")
    if stages > own:
        return dataclasses.replace(
            config,
            conv_depths=(*config.conv_depths, _ADDED_DEPTH),
            conv_widths=(*config.conv_widths, 2 * config.conv_widths[-1]),
            conv_strides=(*config.conv_strides, 1),
        )
    strides = config.conv_strides[:stages]
    kept = CONV_STEMS[config.conv_stem] * math.prod(strides) if stages else 1
    return dataclasses.replace(
        config,
        conv_depths=config.conv_depths[:stages],
        conv_widths=config.conv_widths[:stages],
        conv_strides=strides,
        patch_size=config.stride // kept,
    )


def parameter_counts(config: SimVLMConfig) -> dict[str, int]:
    """How many parameters each part has, by arithmetic, and their "total"; running statistics are no parameters."""
    width, mlp = config.width, config.mlp_dim
    norm = 2 * width
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * mlp + mlp + width
    encoder_layer = 2 * norm + attention + feed_forward
    decoder_layer = encoder_layer + (norm + attention if config.encoder_depth else 0)
    height, breadth = config.image_grid
    table = config.num_heads * (2 * height - 1) * (2 * breadth - 1)
    counts = {
        "conv": _conv_count(config),
        "projection": (config.patch_channels + 1) * width if config.has_projection else 0,
        "embeddings": config.vocab_size * width,
        "positions": (config.image_len + config.max_text_len) * width,
        "tables": (config.encoder_depth or config.decoder_depth) * table,
        "encoder": config.encoder_depth * encoder_layer + norm if config.encoder_depth else 0,
        "decoder": config.decoder_depth * decoder_layer + norm,
    }
    return counts | {"total": sum(counts.values())}


def _conv_count(config: SimVLMConfig) -> int:
    if not config.conv_depths:
        return 0
    kernel = 7 if config.conv_stem == "resnet" else 3
    channels = config.conv_stem_width
    total = kernel**2 * 3 * channels + 2 * channels
    for depth, inner, stride in zip(config.conv_depths, config.conv_widths, config.conv_strides, strict=True):
        outer = 4 * inner
        for block in range(depth):
            total += channels * inner + 9 * inner**2 + inner * outer + 2 * (inner + inner + outer)
            if channels != outer or (stride != 1 and block == 0):
                total += channels * outer + 2 * outer
            channels = outer
    return total
