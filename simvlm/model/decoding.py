"""One token at a time for many hypotheses: keys and values of the past are cached, those of the prefix are shared.

Hypotheses h = item·K + beam. Each has cache rows of its own; the prefix (image and prompt) of an item exists once, and
its K hypotheses all point at it (`k_starts`), no copy is made. An encoder-decoder looks at the prefix by
cross-attention. In a decoder-only model one softmax spans both, so two partial results are joined by their lse:

    out = Σ_part exp(lse_part - lse) · out_part,    lse = ln Σ_part exp(lse_part)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simvlm.kernels import PrefixLayout, prefix_attention
from simvlm.model.batch import Batch
from simvlm.model.torch_model import SimVLM
from simvlm.model.transformer import Layer


class Decoding:
    """The state of one decoding.

    Args:
        model: in eval mode, without gradients.
        batch: images and prompts; its decoder part is empty.
        beams: K, hypotheses per item.
        max_len: steps at the most.
    """

    def __init__(self, model: SimVLM, batch: Batch, beams: int, max_len: int) -> None:
        config, device = model.config, model.device
        inputs = batch.inputs(config)
        lens = np.repeat(inputs.layout.q_lens, beams)
        starts = np.repeat(inputs.layout.q_starts, beams)
        continues = config.arch == "decoder_only" or config.decoder_positions == "continue"
        first = np.repeat(batch.encoder_text_lens * continues, beams)
        if first.max(initial=0) + max_len > config.max_text_len:
            raise ValueError(
                f"generate: max_len must be at most {config.max_text_len - first.max(initial=0)}, what the model's "
                f"max_text_len {config.max_text_len} leaves after the longest prompt, got {max_len}"
            )
        self.model, self.max_len = model, max_len
        self.prefix = model.prefix_memory(inputs.to(device))
        self.prefix_layout = PrefixLayout.packed(np.ones_like(lens), lens, k_starts=starts, cross=True).to(device)
        self.first_position = torch.from_numpy(first.astype(np.int64)).to(device)
        self.cache: list[tuple[Tensor, Tensor]] = []

    def step(self, tokens: Tensor, time: int, parents: Tensor | None) -> Tensor:
        """Logits of the next token, float[n·K, V].

        Args:
            tokens: int64[n·K], the last token of every hypothesis (BOS at first).
            time: how many came before it.
            parents: int64[n·K], the hypothesis of the last step that each goes on from; None: itself.
        """
        if parents is not None:
            self.cache = [(k[parents], v[parents]) for k, v in self.cache]
        count = tokens.shape[0]
        own = PrefixLayout.padded(count, 1, self.max_len, k_lens=time + 1, prefix_lens=0, q_offsets=time)
        own = own.to(self.model.device)
        x = self.model.embed_text(tokens, self.first_position + time)
        for i, layer in enumerate(self.model.decoder.each_layer()):
            x = self._layer(layer, i, x, time, own)
        return self.model.logits(self.model.decoder.norm(x))

    def _layer(self, layer: Layer, index: int, x: Tensor, time: int, own: PrefixLayout) -> Tensor:
        impl = layer.attention.impl
        q, k, v = layer.attention.project(layer.attention_norm(x))
        if index == len(self.cache):
            shape = (k.shape[0], self.max_len, *k.shape[1:])
            self.cache.append((k.new_empty(shape), v.new_empty(shape)))
        keys, values = self.cache[index]
        keys[:, time], values[:, time] = k, v
        out, lse = prefix_attention(q[:, None], keys, values, own, return_lse=True, impl=impl)
        out, lse = out[:, 0], lse[:, 0]
        k, v = self.prefix[index]
        if layer.cross is None or layer.cross_norm is None:
            seen, seen_lse = prefix_attention(q, k, v, self.prefix_layout, return_lse=True, impl=impl)
            share = torch.sigmoid(lse - seen_lse)[..., None]
            out = (share * out + (1 - share) * seen).to(out.dtype)
        x = x + layer.attention.out(out.flatten(1))
        if layer.cross is not None and layer.cross_norm is not None:
            q = layer.cross.project_query(layer.cross_norm(x))
            x = x + layer.cross.out(prefix_attention(q, k, v, self.prefix_layout, impl=impl).flatten(1))
        return x + layer.mlp(layer.mlp_norm(x))
