"""Span corruption, T5's objective (Raffel et al. 2020, recalled): 15 % of a text, in spans of 3 tokens on average.

    text      x0 x1 x2 x3 x4 x5 x6 x7        spans: x2 x3, x6
    encoder   x0 x1 S0 x4 x5 S1 x7
    targets   S0 x2 x3 S1 x6 EOS

The sentinels S0, S1, … are the ids after the tokenizer's. EOS, which generation stops at, stands for T5's final
sentinel. Spans may lie anywhere, at either end too. As prefix lengths they come from a hash of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

from simvlm.data.draws import Draws
from simvlm.data.prefixes import BOS, EOS, Split

_PERCENT, _SPAN = 15, 3
_MULTIPLE = 64
"""of the sentinels, so that a vocabulary can still be cut into as many parts as before"""


def extent(num_tokens: int) -> tuple[int, int]:
    """(tokens to corrupt, spans) of a text, to the nearest and at least 1 each."""
    corrupted = max((_PERCENT * num_tokens + 50) // 100, 1)
    return corrupted, max((corrupted + _SPAN // 2) // _SPAN, 1)


def longest_text(max_text_len: int) -> int:
    """The longest text whose corrupted form and targets together are at most `max_text_len` tokens.

    A decoder-only model reads one after the other; and every model is given the same texts.

    Raises:
        ValueError: there is none of two tokens.
    """
    fitting = [length for length in range(2, max_text_len) if length + 2 * extent(length)[1] + 1 <= max_text_len]
    if not fitting:
        raise ValueError(f"span_corruption: max_text_len must be at least 5, got {max_text_len}")
    return fitting[-1]


def num_sentinels(max_text_len: int) -> int:
    """How many ids a model of that `max_text_len` has after the tokenizer's."""
    return -(-extent(longest_text(max_text_len))[1] // _MULTIPLE) * _MULTIPLE


def corrupt(tokens: Sequence[int], first_sentinel: int, *key: int | str) -> Split:
    """
    Args:
        tokens: at least two, without EOS.
        first_sentinel: the id of S0.
        key: of the sample.

    Raises:
        ValueError: fewer tokens: none would be left, or none taken.
    """
    if len(tokens) < 2:
        raise ValueError(f"corrupt: tokens must be at least 2, got {len(tokens)}")
    corrupted, spans = extent(len(tokens))
    draws = Draws("spans", *key)
    taken = _parts(draws, corrupted, spans)
    kept = _parts(draws, len(tokens) - corrupted + 2, spans + 1)
    kept[0], kept[-1] = kept[0] - 1, kept[-1] - 1  # only between two spans must there be a token
    encoder_text: list[int] = []
    targets: list[int] = []
    place = 0
    for span, (before, length) in enumerate(zip(kept, taken, strict=False)):
        sentinel, start = first_sentinel + span, place + before
        encoder_text += [*tokens[place:start], sentinel]
        place = start + length
        targets += [sentinel, *tokens[start:place]]
    return Split([*encoder_text, *tokens[place:]], [BOS, *targets], [*targets, EOS])


def _parts(draws: Draws, total: int, count: int) -> list[int]:
    """`total` as a sum of `count` numbers of at least 1, all such sums equally likely."""
    cuts = sorted(draws.shuffled(range(1, total))[: count - 1])
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
