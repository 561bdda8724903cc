"""SimVLM in PyTorch: convolution stage, encoder, decoder, tied logits (Wang et al. 2022); thin over the kernels.

Parameter names are the canonical ones, shared by every framework and by the files that weights are stored in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simvlm.kernels import OPS, PrefixLayout, embed_sequence
from simvlm.kernels.dispatch import did_you_mean
from simvlm.model import noise as noises
from simvlm.model.batch import Inputs
from simvlm.model.config import SimVLMConfig
from simvlm.model.remat import REMAT
from simvlm.model.resnet import Bottleneck, ConvStage
from simvlm.model.transformer import INIT_STD, Layer, Linear, Memory, Stack

if TYPE_CHECKING:
    import numpy as np

    from simvlm.model.generate import Generated, Sampling

_DECODER_SALT = 0x5EED  # the decoder's masks are not the encoder's


class SimVLM(nn.Module):
    """The model of one config.

    Args:
        config: the architecture.
        impl: the kernels to run: None for the best that takes each call, or a name as in `implementations`; ops that
            have none of that name run their best.
        dropout, stochastic_depth: rates of finetuning; pretraining has none. Where one is above 0, `forward` in
            training mode wants `noise`.
    """

    def __init__(
        self,
        config: SimVLMConfig,
        *,
        impl: str | None = None,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        for name, rate in (("dropout", dropout), ("stochastic_depth", stochastic_depth)):
            if not 0 <= rate < 1:
                raise ValueError(f"SimVLM: {name} must lie in 0 … 1 (1 excluded), got {rate}")
        self.config, self.dropout, self.stochastic_depth = config, dropout, stochastic_depth
        impls = {op: _impl_of(op, impl) for op in OPS}
        if impl is not None and not any(impls.values()):
            names = sorted({row.name for rows in OPS.values() for row in rows if row.family == "torch"})
            raise ValueError(f"SimVLM: impl must be one of {names}, got {impl!r}{did_you_mean(impl, names)}")
        self._embed_impl = impls["embed_sequence"]
        width = config.width
        height, breadth = config.image_grid
        table_shape = (config.num_heads, 2 * height - 1, 2 * breadth - 1)

        self.conv = ConvStage(config, impls["batch_norm_act"])
        self.projection = Linear(config.patch_channels, width) if config.has_projection else None
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, width))
        self.image_positions = nn.Parameter(torch.empty(config.image_len, width))
        self.text_positions = nn.Parameter(torch.empty(config.max_text_len, width))

        def stack(depth: int, table_shape: tuple[int, ...] | None, cross: bool) -> Stack:
            return Stack(
                depth,
                width,
                config.mlp_dim,
                config.num_heads,
                table_shape=table_shape,
                cross=cross,
                impl=impls["prefix_attention"],
            )

        has_encoder = config.encoder_depth > 0
        self.encoder = stack(config.encoder_depth, table_shape, False) if has_encoder else None
        self.decoder = stack(config.decoder_depth, None if has_encoder else table_shape, has_encoder)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights N(0, `config.init_std`), convolutions, embeddings, positions, tables N(0, 0.02); biases 0."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if isinstance(module, Linear):
                module.reset_parameters(self.config.init_std)
            elif reset is not None and module is not self:
                reset()
        for table in (self.embedding, self.image_positions, self.text_positions):
            nn.init.normal_(table, std=INIT_STD)
        self.conv.set_constants()

    def set_remat(self, remat: str) -> None:
        """What backward passes compute again: "none", "layer" (layers and convolution blocks, from their inputs) or
        "dots" (the same, but products, convolutions and attention are kept)."""
        if remat not in REMAT:
            raise ValueError(f"SimVLM: remat must be one of {list(REMAT)}, got {remat!r}")
        for module in self.modules():
            if isinstance(module, (Layer, Bottleneck)):
                module.remat = remat

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(self, inputs: Inputs, noise: tuple[int, int | Tensor] | None = None) -> Tensor:
        """Final decoder states, float[Rd, D], of `batch.inputs(config).to(device)`.

        Args:
            inputs: the batch, on the model's device.
            noise: (seed, step), which with the samples' ids key dropout and stochastic depth; training only.
        """
        if self.encoder is None:
            return self._only_stack(inputs, None, noise)[inputs.suffix_rows]
        return self.decode(self.encode(inputs, noise), inputs, noise)

    def encode(self, inputs: Inputs, noise: tuple[int, int | Tensor] | None = None) -> Tensor:
        """Final encoder states, float[R, D], packed as `inputs.layout` says.

        A decoder-only model gives the states of its only stack, suffix included.
        """
        if self.encoder is None:
            return self._only_stack(inputs, None, noise)
        rows = self._embed(inputs, noise)
        row_noise = self._row_noise(noise, inputs, inputs.layout, rows, depth_rate=self.stochastic_depth)
        return self.encoder(rows, inputs.layout, noise=row_noise)

    def decode(self, states: Tensor, inputs: Inputs, noise: tuple[int, int | Tensor] | None = None) -> Tensor:
        """Final decoder states, float[Rd, D], of an encoder-decoder, from `encode`'s states."""
        assert inputs.decoder_layout is not None, "a decoder-only model decodes in `forward`"
        rows = self.embed_text(inputs.decoder_inputs, inputs.decoder_positions)
        return self.decoder(
            rows,
            inputs.decoder_layout,
            states=states,
            cross_layout=inputs.cross_layout,
            noise=self._row_noise(noise, inputs, inputs.decoder_layout, rows, salt=_DECODER_SALT),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """float[…, V]: the states against the embedding; tied, no bias."""
        return F.linear(hidden, self.embedding)

    def encode_image(self, images: np.ndarray | Tensor) -> Tensor:
        """Final encoder states of images alone, float[Bi, I, D], from uint8[Bi, S, S, 3]."""
        from simvlm.model.generate import encode_image

        return encode_image(self, images)

    def generate(
        self,
        images: Sequence[np.ndarray | None] | np.ndarray | None,
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        beam: int = 1,
        sample: Sampling | None = None,
        max_len: int = 30,
        begin: Sequence[int] = (),
    ) -> list[Generated]:
        """What the model writes after each image and prompt; see `simvlm.model.generate.generate`."""
        from simvlm.model.generate import generate

        return generate(self, images, prompts, beam=beam, sample=sample, max_len=max_len, begin=begin)

    def score(
        self,
        images: Sequence[np.ndarray | None] | np.ndarray | None,
        texts: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """ln P of each text and its end; see `simvlm.model.generate.score`."""
        from simvlm.model.generate import score

        return score(self, images, texts, prompts)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Weights, config and tokenizer into one folder; see `simvlm.model.weights.save_pretrained`."""
        from simvlm.model.weights import save_pretrained

        save_pretrained(self, folder, tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, image_size: int | None = None, **options: Any) -> SimVLM:
        """The model of a folder, resized where `image_size` is another; see `simvlm.model.weights.from_pretrained`."""
        from simvlm.model.weights import from_pretrained

        return from_pretrained(folder, image_size=image_size, **options)

    def embed_text(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """float[R, D]: embedding and position of each token."""
        return F.embedding(tokens, self.embedding) + F.embedding(positions, self.text_positions)

    def prefix_memory(self, inputs: Inputs) -> Memory:
        """Keys and values that a suffix looks at, layer by layer: cross-attention's, or the only stack's own."""
        if self.encoder is None:
            memory: Memory = []
            self._only_stack(inputs, memory, None)
            return memory
        return self.decoder.cross_memory(self.encode(inputs))

    def _only_stack(self, inputs: Inputs, memory: Memory | None, noise: tuple[int, int | Tensor] | None) -> Tensor:
        rows = self._embed(inputs, noise)
        row_noise = self._row_noise(noise, inputs, inputs.layout, rows)
        return self.decoder(rows, inputs.layout, memory=memory, noise=row_noise)

    def _embed(self, inputs: Inputs, noise: tuple[int, int | Tensor] | None) -> Tensor:
        """The first rows: patches, projected, and text, each with its position."""
        scales = None
        if self._is_noisy(noise) and self.stochastic_depth:
            assert noise is not None
            scales = [
                noises.image_branch_scale(*noise, inputs.image_sample_ids, self.stochastic_depth, block)
                for block in range(self.conv.num_blocks)
            ]
        rows = embed_sequence(
            self.conv(inputs.images, scales),
            None if self.projection is None else self.projection.weight,
            None if self.projection is None else self.projection.bias,
            self.image_positions,
            self.embed_text(inputs.text, inputs.text_positions),
            inputs.layout,
            impl=self._embed_impl,
        )
        return rows.to(self.embedding.dtype)  # under autocast too the residual stream is not rounded to 16 bits

    def _is_noisy(self, noise: tuple[int, int | Tensor] | None) -> bool:
        if not (self.training and (self.dropout or self.stochastic_depth)):
            return False
        if noise is None:
            raise ValueError(
                "SimVLM: noise must be (seed, step) in training with dropout or stochastic depth, got None"
            )
        return True

    def _row_noise(
        self,
        noise: tuple[int, int | Tensor] | None,
        inputs: Inputs,
        layout: PrefixLayout,
        rows: Tensor,
        *,
        depth_rate: float = 0.0,
        salt: int = 0,
    ) -> noises.Noise | None:
        if not self._is_noisy(noise):
            return None
        assert noise is not None
        seed, step = noise
        starts, count = layout.q_starts, rows.shape[0]
        return noises.row_noise(seed + salt, step, inputs.sample_ids, starts, count, self.dropout, depth_rate)


def _impl_of(op: str, name: str | None) -> str | None:
    return name if any(row.name == name and row.family == "torch" for row in OPS[op]) else None
