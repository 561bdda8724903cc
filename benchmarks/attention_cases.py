"""What the benchmarks of `prefix_attention` time: cases of real shapes, for a CPU and for a GPU. In numpy alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from simvlm.kernels.attention.spec import CASES, Case

# What `make bench` times. Lengths that a training run would draw at random are drawn once and written down: prefixes
# uniform in [196, 452) and [900, 964), captions uniform in 4 … 32.
_PRETRAIN_PREFIXES = (413, 359, 326, 265)
_CAPTION_LENS = (
    28, 11, 7, 12, 16, 27, 17, 6, 13, 21, 27, 25, 32, 9, 29, 5, 20, 11, 9, 23, 12, 20, 11, 8, 25, 16, 23, 23, 31, 16,
    10, 22, 31, 32, 29, 23, 15, 15, 5, 9, 13, 14, 20, 18, 24, 29, 29, 26, 32, 13, 30, 30, 10, 17, 20, 24, 24, 7, 17,
    7, 31, 9, 17, 29,
)  # fmt: skip

BENCHMARKS: tuple[Case, ...] = (
    Case(
        name="pretrain",
        q_lens=(452,) * 4,
        prefix_lens=_PRETRAIN_PREFIXES,
        image_grid=(14, 14),
        padded=(452, 452),
        heads=12,
    ),
    Case(
        name="px480",
        q_lens=(964,) * 2,
        prefix_lens=(930, 932),
        image_grid=(30, 30),
        padded=(964, 964),
        heads=12,
    ),
    Case(
        name="huge",
        q_lens=(452,) * 4,
        prefix_lens=_PRETRAIN_PREFIXES,
        image_grid=(14, 14),
        padded=(452, 452),
        heads=16,
        head_dim=80,
    ),
    Case(name="captions", q_lens=_CAPTION_LENS, prefix_lens=0, tail=0, heads=12),
    Case(name="captions_cross", q_lens=_CAPTION_LENS, k_lens=(214,) * 64, cross=True, tail=0, heads=12),
    Case(
        name="decode",
        q_lens=(1,) * 32,
        k_lens=(452,) * 32,
        q_offsets=451,
        prefix_lens=0,
        padded=(1, 452),
        heads=12,
        gradients=False,
    ),
    Case(name="smallest", q_lens=(1,), heads=1, head_dim=8, tail=0),
)


def _gpu_benchmarks() -> tuple[Case, ...]:
    generator = np.random.default_rng(0)
    prefixes = tuple(int(n) for n in generator.integers(196, 452, 128))
    lens = tuple(int(n) for n in generator.integers(4, 33, 512))
    pretrain = Case(
        name="gpu_pretrain",
        q_lens=(452,) * 128,
        prefix_lens=prefixes,
        image_grid=(14, 14),
        padded=(452, 452),
        heads=12,
    )
    decode = Case(
        name="gpu_decode",
        q_lens=(1,) * 128,
        k_lens=(452,) * 128,
        q_offsets=451,
        prefix_lens=0,
        padded=(1, 452),
        heads=12,
        gradients=False,
    )
    return (
        pretrain,
        dataclasses.replace(
            pretrain,
            name="gpu_px480",
            q_lens=(964,) * 32,
            prefix_lens=tuple(n // 4 + 900 - 49 for n in prefixes[:32]),
            image_grid=(30, 30),
            padded=(964, 964),
        ),
        dataclasses.replace(pretrain, name="gpu_huge", heads=16, head_dim=80),
        dataclasses.replace(
            pretrain,
            name="gpu_long",
            q_lens=(4160,) * 2,
            prefix_lens=(4100, 4140),
            image_grid=(64, 64),
            padded=(4160, 4160),
        ),
        Case(name="gpu_captions", q_lens=lens, prefix_lens=0, tail=0, heads=12),
        decode,
        dataclasses.replace(decode, name="gpu_decode_one", q_lens=(1,), k_lens=(452,)),
    )


GPU_BENCHMARKS = _gpu_benchmarks()
"""Sizes that fill a GPU, every storage row in use. The tests' budget is not asked here: its float64 takes minutes."""


def named(name: str) -> Case:
    """A case of the benchmarks or of the tests by its name."""
    for found in (*BENCHMARKS, *GPU_BENCHMARKS, *CASES):
        if found.name == name:
            return found
    raise ValueError(
        f"prefix_attention: case must be one of {[found.name for found in BENCHMARKS]} or a test's, got {name!r}"
    )
