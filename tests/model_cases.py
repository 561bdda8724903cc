"""Tiny models and packed batches for the tests of the model room."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from simvlm.model import Batch, SimVLM, SimVLMConfig

TINY = SimVLMConfig(
    width=32,
    mlp_dim=64,
    num_heads=2,
    encoder_depth=2,
    decoder_depth=1,
    conv_depths=(1, 1),
    conv_widths=(8, 12),
    conv_strides=(1, 2),
    conv_stem="small",
    conv_stem_width=8,
    image_size=16,
    vocab_size=40,
    max_text_len=24,
)
ONE_STACK = dataclasses.replace(TINY, encoder_depth=0, decoder_depth=2)
ARCHS = {"encoder_decoder": TINY, "decoder_only": ONE_STACK}


def tiny_model(config: SimVLMConfig, **options: object) -> SimVLM:
    """A model in float64 whose parts all matter: no norm is at its initial 1 or 0, no table is small."""
    model = SimVLM(config, **options).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("norm.weight", "running_var")) or (".norm" in name and name.endswith(".weight")):
                tensor.copy_(1 + 0.3 * noise.tanh())
            else:
                tensor.copy_(noise * (0.5 if tensor.ndim < 2 else 3 * tensor[0].numel() ** -0.5))
    return model


def packed(config: SimVLMConfig, sequences: list[tuple[bool, int, int]], *, seed: int = 0, spare: int = 3) -> Batch:
    """A batch of (has an image, prefix tokens, suffix tokens), with `spare` rows that nobody owns."""
    rng = np.random.default_rng(seed)
    has_image = np.array([has for has, _, _ in sequences], bool)
    prefix, suffix = (np.array([s[i] for s in sequences], np.int32) for i in (1, 2))
    side = config.image_size

    def ids(count: int) -> np.ndarray:
        return rng.integers(4, config.vocab_size, count).astype(np.int32)

    targets = ids(int(suffix.sum()) + spare)
    targets[int(suffix.sum()) :] = -100
    return Batch(
        images=rng.integers(0, 256, (int(has_image.sum()), side, side, 3), dtype=np.uint8),
        has_image=has_image,
        encoder_text=ids(int(prefix.sum()) + spare),
        encoder_text_lens=prefix,
        decoder_inputs=ids(int(suffix.sum()) + spare),
        targets=targets,
        decoder_lens=suffix,
        sources=(~has_image).astype(np.int8),
        sample_ids=np.arange(len(sequences)) + 10,
    )


def alone(batch: Batch, b: int) -> Batch:
    """Sequence b of a batch, with nothing beside it."""
    image = int(batch.has_image[:b].sum())
    text = slice(int(batch.encoder_text_lens[:b].sum()), int(batch.encoder_text_lens[: b + 1].sum()))
    rows = slice(int(batch.decoder_lens[:b].sum()), int(batch.decoder_lens[: b + 1].sum()))
    one = slice(b, b + 1)
    return Batch(
        images=batch.images[image : image + int(batch.has_image[b])],
        has_image=batch.has_image[one],
        encoder_text=batch.encoder_text[text],
        encoder_text_lens=batch.encoder_text_lens[one],
        decoder_inputs=batch.decoder_inputs[rows],
        targets=batch.targets[rows],
        decoder_lens=batch.decoder_lens[one],
        sources=batch.sources[one],
        sample_ids=batch.sample_ids[one],
    )
