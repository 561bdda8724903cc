"""Where a text is cut into prefix and suffix, and its window into a long document: pure functions of the sample.

A sample's draws come from a hash of (seed, epoch, source, sample id, purpose), so they depend neither on the batch, the
worker, the rank nor on what was drawn before, and a resumed run draws the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from simvlm.data.draws import Draws

BOS, EOS = 1, 2

Objective = Literal["prefix_lm", "lm", "span_corruption"]


@dataclasses.dataclass(frozen=True)
class Split:
    """One text as PrefixLM wants it (SimVLM §3.1): the encoder reads the prefix, the decoder writes the suffix."""

    encoder_text: Sequence[int]
    decoder_inputs: Sequence[int]
    targets: Sequence[int]


def prefix_length(num_tokens: int, has_image: bool, *key: int | str) -> int:
    """Uniform in {0 … m-1} with an image, {1 … m-1} without: the encoder is never empty, nor is the suffix.

    Raises:
        ValueError: fewer tokens than that leaves room for.
    """
    least = 0 if has_image else 1
    if num_tokens <= least:
        raise ValueError(f"prefix_length: num_tokens must be at least {least + 1}, got {num_tokens}")
    return Draws("prefix", *key).between(least, num_tokens - 1)


def split(tokens: Sequence[int], prefix: int) -> Split:
    """x_0 … x_{p-1} to the encoder; BOS, x_p … x_{m-2} to the decoder, whose targets are x_p … x_{m-1}."""
    return Split(tokens[:prefix], [BOS, *tokens[prefix:-1]], tokens[prefix:])


def window(tokens: Sequence[int], max_len: int, *key: int | str) -> list[int]:
    """At most max_len consecutive tokens of a text, EOS among them only if the text really ends there."""
    whole = [*tokens, EOS]
    if len(whole) <= max_len:
        return whole
    start = Draws("window", *key).between(0, len(whole) - max_len)
    return whole[start : start + max_len]
