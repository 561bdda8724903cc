"""What the benchmarks of the stem's ops time: the layers of the models, for a CPU and for a GPU. In numpy alone."""

from __future__ import annotations

import numpy as np

from simvlm.kernels.stem import batch_norm_spec, embed_spec

# Norms of Base at 224 × 224 with 8 images, and of the demo with its 32.
BATCH_NORM: tuple[batch_norm_spec.Case, ...] = (
    batch_norm_spec.Case(name="base_stem_b8", shape=(8, 112, 112, 64)),
    batch_norm_spec.Case(name="base_stage_1_b8", shape=(8, 56, 56, 256), residual=True),
    batch_norm_spec.Case(name="base_stage_2_b8", shape=(8, 28, 28, 512), residual=True),
    batch_norm_spec.Case(name="base_stage_3_inner_b8", shape=(8, 14, 14, 256)),
    batch_norm_spec.Case(name="base_stage_3_b8", shape=(8, 14, 14, 1024), residual=True),
    batch_norm_spec.Case(name="base_stage_3_frozen_b8", shape=(8, 14, 14, 1024), residual=True, frozen=True),
    batch_norm_spec.Case(name="demo_stem_b32", shape=(32, 32, 32, 32)),
    batch_norm_spec.Case(name="demo_stage_2_b32", shape=(32, 8, 8, 128), residual=True),
)

BATCH_NORM_GPU: tuple[batch_norm_spec.Case, ...] = (
    batch_norm_spec.Case(name="gpu_stem_b128", shape=(128, 112, 112, 64)),
    batch_norm_spec.Case(name="gpu_stage_1_b128", shape=(128, 56, 56, 256), residual=True),
    batch_norm_spec.Case(name="gpu_stage_2_b128", shape=(128, 28, 28, 512), residual=True),
    batch_norm_spec.Case(name="gpu_stage_3_b128", shape=(128, 14, 14, 1024), residual=True),
)
"""Norms of Base with a GPU's 128 images of 224 × 224."""

# Text lengths that a training run would draw at random are drawn once and written down:
# uniform in 32 … 256, the demo's in 4 … 32.
_TEXT_LENS = (197, 63, 241, 118, 32, 256, 150, 89)
_DEMO_TEXT_LENS = (
    *(9, 21, 30, 4, 17, 26, 12, 19, 7, 31, 15, 23, 28, 5, 11, 20, 32, 8),
    *(14, 25, 18, 6, 29, 22, 10, 27, 13, 16, 24, 31, 9, 20, 32, 30, 27, 32),
)

EMBED: tuple[embed_spec.Case, ...] = (
    embed_spec.Case(name="base_b8", text_lens=_TEXT_LENS, image_grid=(14, 14), channels=1024, width=768, tail=0),
    embed_spec.Case(
        name="base_padded_b8", text_lens=_TEXT_LENS, image_grid=(14, 14), channels=1024, width=768, padded=452, tail=0
    ),
    embed_spec.Case(
        name="large_b8", text_lens=_TEXT_LENS, image_grid=(14, 14), channels=None, bias=False, width=1024, tail=0
    ),
    embed_spec.Case(
        name="demo_b36",
        text_lens=_DEMO_TEXT_LENS,
        image_grid=(8, 8),
        has_image=(True,) * 32 + (False,) * 4,
        channels=None,
        bias=False,
        width=128,
        tail=0,
    ),
)

EMBED_GPU: tuple[embed_spec.Case, ...] = (
    embed_spec.Case(
        name="gpu_base_b128",
        text_lens=tuple(int(n) for n in np.random.default_rng(0).integers(32, 257, 128)),
        image_grid=(14, 14),
        channels=1024,
        width=768,
        tail=0,
    ),
)
