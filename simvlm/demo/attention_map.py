"""Where a decoder looks in the picture while it writes each word."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simvlm.data.tokenizer import Tokenizer
from simvlm.model.batch import IMAGE_TEXT, Batch
from simvlm.model.torch_model import SimVLM
from simvlm.model.transformer import CrossAttention

_BOS = 1
_SPACE = "▁"


def attention_per_word(
    model: SimVLM, tokenizer: Tokenizer, image: np.ndarray, prompt: str, caption: str
) -> list[tuple[str, np.ndarray]]:
    """(word, float32[Gh, Gw]) of a caption: cross-attention on each patch when the word was about to be written.

    Mean over heads, decoder layers and the word's tokens; what goes to the prompt's tokens is left out.

    Args:
        model: an encoder-decoder, in eval mode.
        image: uint8[S, S, 3].
    """
    tokens = tokenizer.encode(caption)
    maps = _attention(model, image, tokenizer.encode(prompt), tokens).numpy()
    words: list[tuple[str, list[np.ndarray]]] = []
    for token, weights in zip(tokens, maps, strict=True):
        piece = tokenizer.piece(token)
        if piece.startswith(_SPACE) or not words:
            words.append((piece.removeprefix(_SPACE), []))
        else:
            words[-1] = (words[-1][0] + piece, words[-1][1])
        words[-1][1].append(weights)
    return [(word, np.mean(weights, 0)) for word, weights in words]


def _attention(model: SimVLM, image: np.ndarray, prompt: list[int], tokens: list[int]) -> Tensor:
    """float32[len(tokens), Gh, Gw]."""
    config = model.config
    batch = Batch(
        images=image[None],
        has_image=np.ones(1, bool),
        encoder_text=np.array(prompt, np.int32),
        encoder_text_lens=np.array([len(prompt)], np.int32),
        decoder_inputs=np.array([_BOS, *tokens[:-1]], np.int32),
        targets=np.array(tokens, np.int32),
        decoder_lens=np.array([len(tokens)], np.int32),
        sources=np.full(1, IMAGE_TEXT, np.int8),
        sample_ids=np.zeros(1, np.int64),
    )
    layers: list[Tensor] = []

    # The kernels keep no weights, so they are computed again from what the layer is given.
    def note(module: CrossAttention, arguments: tuple[Tensor, ...]) -> None:
        x, states = arguments[:2]
        q, (k, _) = module.project_query(x), module.project_memory(states)
        logits = torch.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
        layers.append(logits.softmax(-1)[:, :, : config.image_len].mean(0))

    crosses = [module for module in model.modules() if isinstance(module, CrossAttention)]
    hooks = [cross.register_forward_pre_hook(note) for cross in crosses]
    try:
        with torch.no_grad():
            model(batch.inputs(config).to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(layers).mean(0).unflatten(1, config.image_grid)
